"""Sampling under two conditions: branches with and without text and image, guided apart, run as one batch.

    v = v_none + text_scale (v_text - v_none) + dino_scale (v_dino - v_none) + full_scale (v_full - v_none)

Every branch has the null embeddings of what it is not told. A branch whose weight is zero is not computed, so that the
usual pair of scales costs three evaluations a step. What is saved without changing the result: the branches of a step
run together, keys and values of text and patches are computed once a sample (only the CLS token depends on the noise
level), and text padding is cut off instead of masked. On a CPU large images run a branch at a time: three of them as
one batch fall out of its caches and must share one mask, which costs more than it saves. What is saved at a price is
chosen: an interval of noise levels outside of which one evaluation on everything given takes the place of the branches
(Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024), and solvers of second order, which need fewer
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keygrip.models.nn.flow_matching import SOLVERS, Solver, data_from_velocity, integrate, noise_levels, seeded_noise
from keygrip.models.patch_dit.context import Conditions, Context
from keygrip.models.patch_dit.network import ContextCache, PatchDiT
from keygrip.training.parts import model_part

BRANCHES = {"none": (False, False), "text": (True, False), "dino": (False, True), "full": (True, True)}
CPU_BATCH = 2**18  # numbers in the tokens of one branch up to which a CPU is faster with all branches as one batch
FLOOR = 1e-3  # with x-prediction: below the last level of any reasonable number of steps, so that nothing is cut off


@model_part
@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Args:
        text_scale, dino_scale: guidance by each condition alone. full_scale: by both together, a fourth branch.
        text_rescale, dino_rescale, full_rescale: in 0..1, how far the guided prediction of a branch is brought back to
            the spread of the unguided one, against burnt-out images at high scales (Lin et al., "Common Diffusion
            Noise Schedules and Sample Steps are Flawed", 2024; here on the predicted clean latent).
        interval: lowest and highest noise level at which there is guidance; outside one evaluation on everything given.
        steps, solver, timestep_shift: see `keygrip.models.nn.flow_matching.integrate` and `noise_levels`.
    """

    text_scale: float = 3.0
    dino_scale: float = 2.0
    full_scale: float = 0.0
    text_rescale: float = 0.0
    dino_rescale: float = 0.0
    full_rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    steps: int = 50
    solver: Solver = "euler"
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval={list(self.interval)}: noise levels between 0 and 1, the lower one first.")
        if min(self.text_scale, self.dino_scale, self.full_scale) < 0:
            raise ValueError("Guidance scales must not be negative: text_scale, dino_scale, full_scale.")
        for name in ("text_rescale", "dino_rescale", "full_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in 0..1.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: must be one of {', '.join(SOLVERS)}.")
        noise_levels(self.steps, self.timestep_shift)  # refuses what it cannot divide

    def scales(self, conditions: Conditions) -> dict[str, float]:
        """Scale of each guiding branch that these conditions allow, without those at zero."""
        scales = {}
        if conditions.has_text:
            scales["text"] = self.text_scale
        if conditions.has_dino:
            scales["dino"] = self.dino_scale
        if conditions.has_text and conditions.has_dino:
            scales["full"] = self.full_scale
        return {name: scale for name, scale in scales.items() if scale != 0}

    def branches(self, conditions: Conditions, level: float) -> tuple[str, ...]:
        """The branches to compute at a noise level, `none` first where it counts."""
        low, high = self.interval
        if not low <= level <= high:
            return (everything_given(conditions),)
        scales = self.scales(conditions)
        needs_none = not scales or sum(scales.values()) != 1 or any(self._rescale(name) for name in scales)
        return ("none", *scales) if needs_none else tuple(scales)

    def combine(self, velocities: dict[str, Tensor], x: Tensor, level: float, conditions: Conditions) -> Tensor:
        """The velocity to follow, from those of `branches`."""
        if len(velocities) == 1:
            return next(iter(velocities.values()))
        scales = self.scales(conditions)
        if "none" not in velocities:  # the scales add up to 1
            return sum((scale * velocities[name] for name, scale in scales.items()), start=torch.zeros_like(x))
        none = velocities["none"]
        guided = none
        for name, scale in scales.items():
            push = scale * (velocities[name] - none)
            rescale = self._rescale(name)
            if rescale:
                push = _rescaled(none + push, velocities[name], x, level, rescale) - none
            guided = guided + push
        return guided

    def _rescale(self, name: str) -> float:
        value: float = getattr(self, f"{name}_rescale")
        return value


def everything_given(conditions: Conditions) -> str:
    """The branch that is told all there is."""
    if conditions.has_text and conditions.has_dino:
        return "full"
    return "text" if conditions.has_text else "dino" if conditions.has_dino else "none"


def _rescaled(guided: Tensor, plain: Tensor, x: Tensor, level: float, share: float) -> Tensor:
    """The guided velocity whose predicted clean latent has the plain one's standard deviation, blended by ``share``."""
    if level == 0:
        return guided
    levels = torch.full((len(x),), level, device=x.device)
    clean, reference = data_from_velocity(x, guided, levels), data_from_velocity(x, plain, levels)
    axes = tuple(range(1, x.ndim))
    factor = reference.std(dim=axes, keepdim=True) / clean.std(dim=axes, keepdim=True).clamp(min=1e-6)
    return (x - clean * (share * factor + 1 - share)) / level


class Velocities:
    """The branches' velocities for one batch of conditions: one pass a step, with what can be kept kept.

    Args:
        network: in eval mode. conditions: normalised. batch: number of samples. aspect: width over height.
        together: the branches of a step as one batch; None: as is faster. cached: keep keys and values of the context
            from step to step. trimmed: cut off text padding. All three change the time and not the result; off, they
            are the plain sampler that tests and benchmarks compare with.
    """

    def __init__(
        self,
        network: PatchDiT,
        conditions: Conditions,
        batch: int,
        aspect: float,
        together: bool | None = None,
        cached: bool = True,
        trimmed: bool = True,
    ) -> None:
        self.network, self.conditions, self.batch, self.aspect = network, conditions, batch, aspect
        self.together, self.cached, self.trimmed = together, cached, trimmed
        self._contexts: dict[tuple[str, ...], tuple[Context, ContextCache | None]] = {}

    def __call__(self, x: Tensor, level: float, branches: Sequence[str]) -> dict[str, Tensor]:
        """Velocities ``[B, C, h, w]`` of the named branches at x_s."""
        together = self._one_batch(x) if self.together is None else self.together
        groups = [tuple(branches)] if together else [(name,) for name in branches]
        found: dict[str, Tensor] = {}
        for group in groups:
            context, cache = self._context(group, x.device)
            inputs = x.repeat(len(group), 1, 1, 1)
            levels = torch.full((len(inputs),), level, device=x.device)
            output = self.network(inputs, levels, context, cache=cache, floor=FLOOR).velocity
            found |= dict(zip(group, output.to(x.dtype).chunk(len(group)), strict=True))
        return found

    def _one_batch(self, x: Tensor) -> bool:
        rows, columns = self.network.grid(x)
        return x.device.type != "cpu" or len(x) * rows * columns * self.network.width <= CPU_BATCH

    def _context(self, group: tuple[str, ...], device: torch.device) -> tuple[Context, ContextCache | None]:
        if group not in self._contexts:
            keep = torch.tensor([BRANCHES[name] for name in group], device=device).repeat_interleave(self.batch, dim=0)
            conditions = self.conditions.repeated(len(group))
            context = self.network.context_builder(conditions, keep[:, 0], keep[:, 1], self.aspect)
            context = context.trimmed() if self.trimmed else context
            self._contexts[group] = context, ContextCache() if self.cached else None
        return self._contexts[group]


@torch.no_grad()
def sample(
    network: PatchDiT,
    conditions: Conditions,
    size: tuple[int, int],
    sampling: Sampling,
    seeds: Sequence[int],
    on_step: Callable[[int, Tensor], None] | None = None,
    noise: Tensor | None = None,
    together: bool | None = None,
    cached: bool = True,
    trimmed: bool = True,
) -> Tensor:
    """Normalised latents ``[B, C, h, w]`` float32.

    Args:
        network: put in eval mode meanwhile. conditions: of len(seeds) samples, on the network's device.
        size: (h, w) of the latents. seeds: one a sample; a sample depends on no other one.
        on_step: called with the number of steps done and the latents after each.
        noise: in place of the seeds' own, ``[B, C, h, w]``.
        together, cached, trimmed: see `Velocities`.
    """
    device = next(network.parameters()).device
    if noise is None:
        noise = seeded_noise(seeds, (network.latent_channels, *size), device)
    training = network.training
    network.eval()
    velocities = Velocities(network, conditions, len(seeds), size[1] / size[0], together, cached, trimmed)

    def velocity_at(x: Tensor, level: float) -> Tensor:
        found = velocities(x, level, sampling.branches(conditions, level))
        return sampling.combine(found, x, level, conditions)

    try:
        return integrate(
            velocity_at, noise, noise_levels(sampling.steps, sampling.timestep_shift), sampling.solver, on_step
        )
    finally:
        network.train(training)
