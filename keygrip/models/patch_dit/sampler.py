"""Sampling under two conditions: the solver's steps, each with the branches of `guidance.py` run as one batch.

Three optimisations do not change the result: branches of a step run as one batch, keys and values of text and patches
are computed once per sample (only the CLS token depends on the noise level), and text padding is cut off instead of
masked. On a CPU, large images run one branch at a time: three branches in one batch exceed its caches and must share
one mask, which costs more than it saves. Approximations are optional: an interval of noise levels outside of which one
evaluation with all conditions replaces the branches (Kynkäänniemi et al., "Applying Guidance in a Limited Interval",
2024), and solvers of second order, which need fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from keygrip.models.nn.flow_matching import SOLVERS, Solver, integrate, noise_levels, seeded_noise
from keygrip.models.patch_dit.context import Conditions, Context
from keygrip.models.patch_dit.guidance import (
    BRANCHES,
    GUIDE,
    GUIDED,
    ORDERS,
    RESCALED,
    RESCALES,
    Guidance,
    branch_of,
    check_finite,
)
from keygrip.models.patch_dit.network import ContextCache, PatchDiT
from keygrip.training.parts import ReadWhere, model_part

CPU_BATCH = 2**18  # largest number of values in one branch's tokens for which a CPU is faster with one batch
NOT_FINITE = "what was drawn is not finite: give smaller scales of guidance, or another timestep_shift or solver"
FLOOR = 1e-3  # with x-prediction: below the last level of any reasonable number of steps, so that it never applies


def _parse_interval(levels: Any) -> tuple[float, float]:
    try:
        low, high = (float(level) for level in levels)
    except (TypeError, ValueError):
        raise ValueError(f"interval={levels}: give two noise levels, [LOWEST,HIGHEST].") from None
    return low, high


@model_part
@dataclass(frozen=True)
class Sampling(Guidance):
    """Settings of sampling.

    Args:
        text_scale, dino_scale, full_scale, text_rescale, dino_rescale, full_rescale, interval, guidance, cls_scale,
            guide_scale: see `Guidance`.
        steps, solver, timestep_shift: see `keygrip.models.nn.flow_matching.integrate` and `noise_levels`.

    Raises:
        ValueError: as `Guidance`, an unknown solver, or impossible `steps` or `timestep_shift`.
    """

    read_where: ClassVar = dict.fromkeys(  # full_scale and guide_scale are refused where they have no effect
        ("text_scale", "dino_scale", "cls_scale", "interval", *RESCALES),
        ReadWhere("guidance", *(order for order in ORDERS if order != "none")),
    )
    steps: int = 50
    solver: Solver = "euler"
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("timestep_shift", self.timestep_shift)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: must be one of {', '.join(SOLVERS)}.")
        noise_levels(self.steps, self.timestep_shift)  # raises ValueError for impossible values

    def replaced(self, **parts: Any) -> Sampling:
        """Copy with these parts replaced; a term that becomes zero also loses its rescale."""
        for name, scales in RESCALED.items():
            if not any(parts.get(scale, getattr(self, scale)) for scale in scales):
                parts.setdefault(name, 0.0)
        return replace(self, **parts)

    def levels(self, strength: float = 1.0) -> list[float]:
        """The noise levels of the steps, falling to 0.

        Args:
            strength: that of an `Edit`, the first noise level; the number of steps is reduced by this factor.
        """
        steps = max(1, round(self.steps * strength))
        return [strength * level for level in noise_levels(steps, self.timestep_shift)]

    def is_guided(self, strength: float = 1.0) -> bool:
        """Whether a step has a noise level within `interval`. strength: as in `levels`."""
        return any(self._within_interval(level) for level in self.levels(strength)[:-1])

    def changed(self, changes: Mapping[str, Any]) -> Sampling:
        """Copy with some parts changed, by name; None leaves a part unchanged.

        Raises:
            ValueError: a part is unknown, its value is impossible, or it has no effect.
        """
        parts = [part.name for part in fields(Sampling)]
        unknown = sorted(set(changes) - set(parts))
        if unknown:
            raise ValueError(f"sampling has no {', '.join(unknown)}; it has {', '.join(parts)}")
        given = {name: value for name, value in changes.items() if value is not None}
        if "interval" in given:
            given["interval"] = _parse_interval(given["interval"])
        if given.get("guidance") == "none":  # these settings of the model itself are then dropped
            given = {"full_scale": 0.0, "guide_scale": 0.0} | given
        sampling = self.replaced(**given)
        given = {name: value for name, value in given.items() if changes.get(name) is not None}
        idle = [f"{name}={given[name]}" for name in GUIDED if name in given]
        if sampling.guidance == "none" and idle:
            raise ValueError(
                f"{', '.join(idle)}: no effect with guidance=none, where each step is one evaluation: leave it out"
            )
        return sampling

    def evaluations(self, conditions: Conditions) -> int:
        """Number of network evaluations for one sample."""
        levels = noise_levels(self.steps, self.timestep_shift)
        visited = levels[:-1] + (levels[1:-1] if self.solver == "heun" else [])
        return sum(len(self.branches(conditions, level)) for level in visited)


class Velocities:
    """The branches' velocities for one batch of conditions: one pass per step, with cached keys and values.

    Args:
        network: in eval mode. conditions: normalised. batch: number of samples. aspect: width over height.
        guide: the network of the branch `GUIDE`, in eval mode; None: that branch is refused.
        together: the branches of a step as one batch; None: whichever is faster. cached: reuse keys and values of the
            context in all steps. trimmed: cut off text padding. All three change the time and not the result; without
            them this is the plain sampler that tests and benchmarks compare with.
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
        guide: PatchDiT | None = None,
    ) -> None:
        self.network, self.conditions, self.batch, self.aspect = network, conditions, batch, aspect
        self.guide = guide
        self.together, self.cached, self.trimmed = together, cached, trimmed
        self._contexts: dict[tuple[str, ...], tuple[Context, ContextCache | None]] = {}

    def __call__(self, x: Tensor, level: float, branches: Sequence[str]) -> dict[str, Tensor]:
        """Velocities ``[B, C, h, w]`` of the named branches at x_s."""
        one_batch = self._prefers_one_batch(x) if self.together is None else self.together
        own_branches = tuple(name for name in branches if name != GUIDE)
        groups = [own_branches] if one_batch else [(name,) for name in own_branches]
        groups += [(GUIDE,)] if GUIDE in branches else []
        velocities: dict[str, Tensor] = {}
        for group in groups:
            network = self._network_of(group)
            context, cache = self._context(group, x.device)
            inputs = x.repeat(len(group), 1, 1, 1)
            levels = torch.full((len(inputs),), level, device=x.device)
            output = network(inputs, levels, context, cache=cache, floor=FLOOR).velocity
            velocities |= dict(zip(group, output.to(x.dtype).chunk(len(group)), strict=True))
        return velocities

    def _prefers_one_batch(self, x: Tensor) -> bool:
        rows, columns = self.network.grid(x)
        return x.device.type != "cpu" or len(x) * rows * columns * self.network.width <= CPU_BATCH

    def _network_of(self, group: tuple[str, ...]) -> PatchDiT:
        if group != (GUIDE,):
            return self.network
        if self.guide is None:
            raise ValueError(
                "guide_scale: there is no guide to go away from, the model keeps none or its step has not come: 0"
            )
        return self.guide

    def _context(self, group: tuple[str, ...], device: torch.device) -> tuple[Context, ContextCache | None]:
        if group not in self._contexts:
            flags = [BRANCHES[branch_of(self.conditions) if name == GUIDE else name] for name in group]
            keep = torch.tensor(flags, device=device).repeat_interleave(self.batch, dim=0)
            conditions = self.conditions.repeated(len(group))
            context = self._network_of(group).context_builder(
                conditions, keep[:, 0], keep[:, 1], self.aspect, keep[:, 2]
            )
            context = context.trimmed() if self.trimmed else context
            self._contexts[group] = context, ContextCache() if self.cached else None
        return self._contexts[group]


def refuse_idle_interval(ways: Sequence[Sampling], strength: float = 1.0) -> None:
    """Refuse a guidance interval that no step reaches.

    Args:
        ways: sampling settings for each size of latents, all with the same number of steps. strength: of an `Edit`.

    Raises:
        ValueError: with none of these settings a step has a noise level in the interval.
    """
    if ways and not any(way.is_guided(strength) for way in ways):
        raise ValueError(
            f"interval={list(ways[0].interval)} has no effect: none of the {len(ways[0].levels(strength)) - 1} steps "
            "has a noise level in it; guidance=none draws so"
        )


def refuse_idle_solver(sampling: Sampling, strength: float = 1.0) -> None:
    """Raise ValueError for a solver of second order with a single step, which is a step of Euler's method.

    Args:
        strength: of an `Edit`.
    """
    if sampling.solver != "euler" and len(sampling.levels(strength)) == 2:
        shortened = "" if strength == 1 else f", strength={strength:g}"
        raise ValueError(
            f"solver={sampling.solver} has no effect with a single step (steps={sampling.steps}{shortened}): leave it "
            "out, or give more steps"
        )


@dataclass(frozen=True)
class Edit:
    """Normalised latents ``[B, C, h, w]`` of images to edit: inpainting by a mask, or sampling from partial noise.

    Args:
        strength: in (0, 1]: noise level from which sampling starts; 1: only what `mask` preserves is left of the image.
        mask: float or bool ``[B, 1, h, w]``: 1 where the image is sampled again, 0 where it stays. None: 1 everywhere.
    """

    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}: must lie above 0 and at most at 1.")


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
    edit: Edit | None = None,
    guide: PatchDiT | None = None,
) -> Tensor:
    """Normalised latents ``[B, C, h, w]`` float32.

    Args:
        network: temporarily put in eval mode. conditions: of len(seeds) samples, on the network's device.
        size: (h, w) of the latents. seeds: one per sample; samples do not depend on each other.
        on_step: called with the number of steps done and the latents after each.
        noise: used instead of that of the seeds, ``[B, C, h, w]``.
        together, cached, trimmed: see `Velocities`.
        edit: images to start from, and the part of them that stays; None: start from noise alone.
        guide: a worse version of the network, for `guide_scale`; in eval mode.

    Raises:
        ValueError: `guide_scale` without a guide.
    """
    device = next(network.parameters()).device
    if noise is None:
        noise = seeded_noise(seeds, (network.latent_channels, *size), device)
    training = network.training
    network.eval()
    velocities = Velocities(network, conditions, len(seeds), size[1] / size[0], together, cached, trimmed, guide)
    levels, start, fixed_part = sampling.levels(1.0 if edit is None else edit.strength), noise, None
    if edit is not None:
        latents = edit.latents.to(noise)
        start = (1 - edit.strength) * latents + edit.strength * noise
        # With this velocity, every solver goes from the noise exactly to the latents on a straight path.
        fixed_part = None if edit.mask is None else (edit.mask.to(noise), noise - latents)

    def velocity_at(x: Tensor, level: float) -> Tensor:
        by_branch = velocities(x, level, sampling.branches(conditions, level))
        guided = sampling.combine(by_branch, x, level, conditions)
        return guided if fixed_part is None else fixed_part[0] * guided + (1 - fixed_part[0]) * fixed_part[1]

    try:
        return integrate(velocity_at, start, levels, sampling.solver, on_step)
    finally:
        network.train(training)
