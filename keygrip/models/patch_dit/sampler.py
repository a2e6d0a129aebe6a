"""Sampling under two conditions: branches with and without text and image, guided apart, run as one batch.

    v = v_none + text_scale (v_text - v_none) + dino_scale (v_dino - v_none) + full_scale (v_full - v_none)

or one after the other, so that the branch with both conditions, which is trained most, takes part in every step
(``guidance="dino_then_text"``; the other order likewise)::

    v = v_none + dino_scale (v_dino - v_none) + text_scale (v_full - v_dino)

and with ``cls_scale`` in two steps for the DINO features: the CLS vector alone, then its patches. ``guide_scale`` goes
on from there, away from what a worse version of the network predicts from everything given
(`keygrip.models.patch_dit.guide`)::

    v = ... + guide_scale (v_full - v_guide)

Every branch has null embeddings in place of the conditions that it lacks. A branch whose weight is zero is not
computed, so that the usual pair of scales costs three evaluations per step. Without any change of the result, branches
of a step run as one batch, keys and values of text and patches are computed once per sample (only the CLS token depends
on the noise level), and text padding is cut off instead of masked. On a CPU large images run a branch at a time: three
of them as one batch exceed its caches and must share one mask, which costs more than it saves. Approximations are
optional: an interval of noise levels outside of which one evaluation with all conditions replaces the branches
(Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024), and solvers of second order, which need fewer
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from keygrip.models.nn.flow_matching import SOLVERS, Solver, data_from_velocity, integrate, noise_levels, seeded_noise
from keygrip.models.patch_dit.context import Conditions, Context
from keygrip.models.patch_dit.network import ContextCache, PatchDiT
from keygrip.training.parts import model_part

# What each branch is conditioned on: text, CLS vector, patches.
BRANCHES = {
    "none": (False, False, False),
    "text": (True, False, False),
    "cls": (False, True, False),
    "text_cls": (True, True, False),
    "dino": (False, True, True),
    "full": (True, True, True),
}
GUIDE = "guide"  # the branch of another network, on everything given
Guidance = Literal["independent", "dino_then_text", "text_then_dino", "none"]
GUIDANCE: tuple[Guidance, ...] = ("independent", "dino_then_text", "text_then_dino", "none")
CPU_BATCH = 2**18  # numbers in one branch's tokens up to which a CPU is faster with all branches in one batch
NEGLIGIBLE = 1e-9  # guidance weights that differ from zero by rounding only
SAME_LEVEL = 1e-6  # noise levels that differ by rounding only: those of diffusers' schedulers are float32
NOT_FINITE = "what was drawn is not finite: give smaller scales of guidance, or another timestep_shift or solver"
SCALES = ("text_scale", "dino_scale", "full_scale", "guide_scale")
# Each with the scales of the terms that it brings back.
RESCALED = {
    "text_rescale": ("text_scale",),
    "dino_rescale": ("dino_scale", "cls_scale"),
    "full_rescale": ("full_scale",),
}
RESCALES = tuple(RESCALED)
GUIDED = (*SCALES, "cls_scale", "interval", *RESCALES)  # what guidance=none leaves without effect
MOST_SCALE = 1000.0  # far above any that is of use, and far below what overflows
FLOOR = 1e-3  # with x-prediction: below the last level of any reasonable number of steps, so that nothing is cut off


class Term(NamedTuple):
    """A step of guidance: scale (v_positive - v_negative), of the velocities of two branches."""

    name: str  # of the condition, by which the rescale is chosen, or GUIDE
    scale: float
    positive: str
    negative: str


def _interval(given: Any) -> tuple[float, float]:
    try:
        low, high = (float(level) for level in given)
    except (TypeError, ValueError):
        raise ValueError(f"interval={given}: give two noise levels, [LOWEST,HIGHEST].") from None
    return low, high


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
        guidance: how text and DINO are guided together, see the module's description; unused where only one is given.
            "none": each step is one evaluation on everything given, whatever the scales, for distilled models.
        cls_scale: of the CLS vector; dino_scale is then that of the patches. None: both together by dino_scale. Wants
            a model that was trained with the CLS vector alone too (model.dropout.cls_alone above 0).
        guide_scale: of autoguidance, beside the others; 0: none. Wants a model that keeps a guide (model.guide).
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
    guidance: Guidance = "independent"
    cls_scale: float | None = None
    guide_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise ValueError(f"guidance={self.guidance!r}: must be one of {', '.join(GUIDANCE)}.")
        for name, scales in RESCALED.items():
            if getattr(self, name) and not any(getattr(self, scale) for scale in scales):
                raise ValueError(f"{name}={getattr(self, name)} has no effect with {scales[0]}=0: 0.")
        if self.guidance != "independent" and self.full_scale:
            raise ValueError(f"full_scale={self.full_scale} has no effect with guidance={self.guidance}: 0.")
        for name in (*SCALES, *RESCALES, "cls_scale", "timestep_shift"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= MOST_SCALE:  # NaN too
                raise ValueError(f"{name}={value}: must be a finite number up to {MOST_SCALE:g}.")
        if self.cls_scale is not None and self.cls_scale < 0:
            raise ValueError(f"cls_scale={self.cls_scale}: must not be negative.")
        if self.guide_scale and self.guidance == "none":
            raise ValueError(f"guide_scale={self.guide_scale} has no effect with guidance=none: 0.")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval={list(self.interval)}: noise levels between 0 and 1, the lower one first.")
        if min(getattr(self, name) for name in SCALES) < 0:
            raise ValueError(f"Guidance scales must not be negative: {', '.join(SCALES)}.")
        for name in RESCALES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in 0..1.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: must be one of {', '.join(SOLVERS)}.")
        noise_levels(self.steps, self.timestep_shift)  # refuses what it cannot divide

    def replaced(self, **parts: Any) -> Sampling:
        """With these parts in place of its own; a term that they leave out takes its rescale with it."""
        for name, scales in RESCALED.items():
            if not any(parts.get(scale, getattr(self, scale)) for scale in scales):
                parts.setdefault(name, 0.0)
        return replace(self, **parts)

    def levels(self, strength: float = 1.0) -> list[float]:
        """The noise levels of the steps, falling to 0.

        Args:
            strength: that of an `Edit`, from which they fall, in so many fewer steps.
        """
        steps = max(1, round(self.steps * strength))
        return [strength * level for level in noise_levels(steps, self.timestep_shift)]

    def is_guided(self, strength: float = 1.0) -> bool:
        """Whether a step has a noise level within `interval`. strength: as of `levels`."""
        return any(self._within_interval(level) for level in self.levels(strength)[:-1])

    def changed(self, changes: Mapping[str, Any]) -> Sampling:
        """This way of drawing with some parts changed, by name; None leaves a part as it is.

        Raises:
            ValueError: there is no such part, its value is impossible, or it has no effect.
        """
        unknown = sorted(set(changes) - set(Sampling.__dataclass_fields__))
        if unknown:
            raise ValueError(f"sampling has no {', '.join(unknown)}; it has {', '.join(Sampling.__dataclass_fields__)}")
        given = {name: value for name, value in changes.items() if value is not None}
        if "interval" in given:
            given["interval"] = _interval(given["interval"])
        if given.get("guidance") == "none":  # what the model itself has beside other guidance falls away with it
            given = {"full_scale": 0.0, "guide_scale": 0.0} | given
        found = self.replaced(**given)
        given = {name: value for name, value in given.items() if changes.get(name) is not None}
        idle = [f"{name}={given[name]}" for name in GUIDED if name in given]
        if found.guidance == "none" and idle:
            raise ValueError(
                f"{', '.join(idle)}: no effect with guidance=none, where each step is one evaluation: leave it out"
            )
        return found

    def terms(self, conditions: Conditions) -> list[Term]:
        """The steps of guidance that these conditions allow, without those of scale zero."""
        text, dino = conditions.has_text, conditions.has_dino
        chained = text and dino and self.guidance != "independent"
        text_first = chained and self.guidance == "text_then_dino"
        found = []
        if text and not (chained and not text_first):
            found.append(Term("text", self.text_scale, "text", "none"))
        if dino:
            below, cls, all_of_it = ("text", "text_cls", "full") if text_first else ("none", "cls", "dino")
            if self.cls_scale is not None and conditions.patches is not None:
                found.append(Term("dino", self.cls_scale, cls, below))
                found.append(Term("dino", self.dino_scale, all_of_it, cls))
            else:
                found.append(Term("dino", self.dino_scale, all_of_it, below))
        if chained and not text_first:
            found.append(Term("text", self.text_scale, "full", "dino"))
        if text and dino and not chained:
            found.append(Term("full", self.full_scale, "full", "none"))
        found.append(Term(GUIDE, self.guide_scale, everything_given(conditions), GUIDE))
        return [term for term in found if term.scale != 0]

    def weights(self, conditions: Conditions) -> dict[str, float]:
        """The weight of each branch in the guided velocity, `none` first; they add up to 1."""
        terms = self.terms(conditions)
        if all(term.negative == "none" for term in terms):
            scales = {term.positive: term.scale for term in terms}
            return {"none": 1 - sum(scales.values())} | scales
        found = {"none": 1.0}
        for term in terms:
            found[term.positive] = found.get(term.positive, 0.0) + term.scale
            found[term.negative] = found.get(term.negative, 0.0) - term.scale
        return found

    def branches(self, conditions: Conditions, level: float) -> tuple[str, ...]:
        """The branches to compute at a noise level, `none` first where it counts."""
        if self.guidance == "none" or not self._within_interval(level):
            return (everything_given(conditions),)
        weights = self.weights(conditions)
        rescaled = any(self._rescale(term.name) for term in self.terms(conditions))
        return tuple(name for name, weight in weights.items() if rescaled or abs(weight) > NEGLIGIBLE)

    def evaluations(self, conditions: Conditions) -> int:
        """How often the network is evaluated for one sample."""
        levels = noise_levels(self.steps, self.timestep_shift)
        visited = levels[:-1] + (levels[1:-1] if self.solver == "heun" else [])
        return sum(len(self.branches(conditions, level)) for level in visited)

    def combine(self, velocities: dict[str, Tensor], x: Tensor, level: float, conditions: Conditions) -> Tensor:
        """The velocity to follow, from those of `branches`."""
        if len(velocities) == 1:
            return next(iter(velocities.values()))
        terms, weights = self.terms(conditions), self.weights(conditions)
        if not all(name in velocities for term in terms for name in (term.positive, term.negative)):
            parts = (weights[name] * velocity for name, velocity in velocities.items())
            return sum(parts, start=torch.zeros_like(x))
        guided = velocities["none"]
        for term in terms:
            positive, negative = velocities[term.positive], velocities[term.negative]
            push = term.scale * (positive - negative)
            rescale = self._rescale(term.name)
            if rescale:
                push = _rescaled(negative + push, positive, x, level, rescale) - negative
            guided = guided + push
        return guided

    def _within_interval(self, level: float) -> bool:
        low, high = self.interval
        return low - SAME_LEVEL <= level <= high + SAME_LEVEL

    def _rescale(self, name: str) -> float:
        value: float = 0.0 if name == GUIDE else getattr(self, f"{name}_rescale")
        return value


def everything_given(conditions: Conditions) -> str:
    """The branch with all conditions."""
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
    """The branches' velocities for one batch of conditions: one pass per step, with cached keys and values.

    Args:
        network: in eval mode. conditions: normalised. batch: number of samples. aspect: width over height.
        guide: the network of the branch `GUIDE`, in eval mode; None: that branch is refused.
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
        guide: PatchDiT | None = None,
    ) -> None:
        self.network, self.conditions, self.batch, self.aspect = network, conditions, batch, aspect
        self.guide = guide
        self.together, self.cached, self.trimmed = together, cached, trimmed
        self._contexts: dict[tuple[str, ...], tuple[Context, ContextCache | None]] = {}

    def __call__(self, x: Tensor, level: float, branches: Sequence[str]) -> dict[str, Tensor]:
        """Velocities ``[B, C, h, w]`` of the named branches at x_s."""
        together = self._one_batch(x) if self.together is None else self.together
        own = tuple(name for name in branches if name != GUIDE)
        groups = [own] if together else [(name,) for name in own]
        groups += [(GUIDE,)] if GUIDE in branches else []
        found: dict[str, Tensor] = {}
        for group in groups:
            network = self._network_of(group)
            context, cache = self._context(group, x.device)
            inputs = x.repeat(len(group), 1, 1, 1)
            levels = torch.full((len(inputs),), level, device=x.device)
            output = network(inputs, levels, context, cache=cache, floor=FLOOR).velocity
            found |= dict(zip(group, output.to(x.dtype).chunk(len(group)), strict=True))
        return found

    def _one_batch(self, x: Tensor) -> bool:
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
            kept = [BRANCHES[everything_given(self.conditions) if name == GUIDE else name] for name in group]
            keep = torch.tensor(kept, device=device).repeat_interleave(self.batch, dim=0)
            conditions = self.conditions.repeated(len(group))
            context = self._network_of(group).context_builder(
                conditions, keep[:, 0], keep[:, 1], self.aspect, keep[:, 2]
            )
            context = context.trimmed() if self.trimmed else context
            self._contexts[group] = context, ContextCache() if self.cached else None
        return self._contexts[group]


def refuse_idle_interval(ways: Sequence[Sampling], strength: float = 1.0) -> None:
    """Refuses an interval of guidance that no step reaches.

    Args:
        ways: one for each size of latents, of one number of steps. strength: of an `Edit`.

    Raises:
        ValueError: in none of these ways a step has a noise level in it.
    """
    if ways and not any(way.is_guided(strength) for way in ways):
        raise ValueError(
            f"interval={list(ways[0].interval)} has no effect: none of the {len(ways[0].levels(strength)) - 1} steps "
            "has a noise level in it; guidance=none draws so"
        )


@dataclass(frozen=True)
class Edit:
    """Normalised latents ``[B, C, h, w]`` of images to edit: inpainting by a mask, or sampling from partial noise.

    Args:
        strength: in (0, 1]: noise level from which they are drawn; 1: nothing of them is left but what `mask` keeps.
        mask: float or bool ``[B, 1, h, w]``: 1 where they are drawn anew, 0 where they stay. None: everywhere.
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
        network: put in eval mode meanwhile. conditions: of len(seeds) samples, on the network's device.
        size: (h, w) of the latents. seeds: one a sample; a sample depends on no other one.
        on_step: called with the number of steps done and the latents after each.
        noise: in place of the seeds' own, ``[B, C, h, w]``.
        together, cached, trimmed: see `Velocities`.
        edit: images to start from, and the part of them that stays; None: from noise alone.
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
    levels, start, kept = sampling.levels(1.0 if edit is None else edit.strength), noise, None
    if edit is not None:
        latents = edit.latents.to(noise)
        start = (1 - edit.strength) * latents + edit.strength * noise
        # Along this velocity the straight path leads from the noise exactly to the latents, with every solver.
        kept = None if edit.mask is None else (edit.mask.to(noise), noise - latents)

    def velocity_at(x: Tensor, level: float) -> Tensor:
        found = velocities(x, level, sampling.branches(conditions, level))
        guided = sampling.combine(found, x, level, conditions)
        return guided if kept is None else kept[0] * guided + (1 - kept[0]) * kept[1]

    try:
        return integrate(velocity_at, start, levels, sampling.solver, on_step)
    finally:
        network.train(training)
