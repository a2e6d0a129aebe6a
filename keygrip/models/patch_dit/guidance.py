"""Guidance by two conditions: branches with and without text and image, and the combined velocity.

The worse version of the network for autoguidance is in `keygrip.models.patch_dit.guide`.

    v = v_none + text_scale (v_text - v_none) + dino_scale (v_dino - v_none) + full_scale (v_full - v_none)

or sequentially, so that the branch with both conditions, which is trained most, is part of every step
(``guidance="dino_then_text"``; the other order likewise)::

    v = v_none + dino_scale (v_dino - v_none) + text_scale (v_full - v_dino)

and with ``cls_scale`` in two steps for the DINO features: the CLS vector alone, then its patches. ``guide_scale``
adds guidance away from what a worse version of the network predicts from all given conditions (autoguidance)::

    v = ... + guide_scale (v_full - v_guide)

Every branch has null embeddings in place of the conditions that it lacks. A branch whose weight is zero is not
computed, so the usual pair of scales costs three evaluations per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from keygrip.models.nn.flow_matching import data_from_velocity
from keygrip.models.patch_dit.context import Conditions

# What each branch is conditioned on: text, CLS vector, patches.
BRANCHES = {
    "none": (False, False, False),
    "text": (True, False, False),
    "cls": (False, True, False),
    "text_cls": (True, True, False),
    "dino": (False, True, True),
    "full": (True, True, True),
}
GUIDE = "guide"  # the branch of another network, with all given conditions
Order = Literal["independent", "dino_then_text", "text_then_dino", "none"]
ORDERS: tuple[Order, ...] = ("independent", "dino_then_text", "text_then_dino", "none")
NEGLIGIBLE = 1e-9  # guidance weights that differ from zero by rounding only
SAME_LEVEL = 1e-6  # noise levels that differ by rounding only: those of diffusers' schedulers are float32
SCALES = ("text_scale", "dino_scale", "full_scale", "guide_scale")
# Each rescale with the scales of the terms that it applies to.
RESCALED = {
    "text_rescale": ("text_scale",),
    "dino_rescale": ("dino_scale", "cls_scale"),
    "full_rescale": ("full_scale",),
}
RESCALES = tuple(RESCALED)
GUIDED = (*SCALES, "cls_scale", "interval", *RESCALES)  # settings without effect with guidance=none
MOST_SCALE = 1000.0  # far above useful scales, and far below an overflow


class Term(NamedTuple):
    """A term of guidance: scale (v_positive - v_negative), from the velocities of two branches."""

    name: str  # of the condition, which selects the rescale, or GUIDE
    scale: float
    positive: str
    negative: str


def check_finite(name: str, value: float) -> None:
    """Raise ValueError if a scale or shift is not finite, or far too large to be intended."""
    if not abs(value) <= MOST_SCALE:  # NaN too
        raise ValueError(f"{name}={value}: must be a finite number up to {MOST_SCALE:g}.")


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance: how strongly samples follow their conditions.

    Args:
        text_scale, dino_scale: guidance by each condition alone. full_scale: by both together, a fourth branch.
        text_rescale, dino_rescale, full_rescale: in 0..1, how far the guided prediction of a branch is rescaled to the
            spread of the unguided one, against over-saturated images at high scales (Lin et al., "Common Diffusion
            Noise Schedules and Sample Steps are Flawed", 2024; here on the predicted clean latent).
        interval: lowest and highest noise level with guidance; outside, one evaluation with all given conditions.
        guidance: how text and DINO are guided together, see the module's description; unused where only one is given.
            "none": each step is one evaluation with all given conditions, whatever the scales, for distilled models.
        cls_scale: of the CLS vector; dino_scale is then that of the patches. None: both together by dino_scale.
            Requires a model that was also trained with the CLS vector alone (model.dropout.cls_alone above 0).
        guide_scale: of autoguidance, in addition to the others; 0: none. Requires a model with a guide (model.guide).

    Raises:
        ValueError: invalid values, or values that have no effect with the others.
    """

    text_scale: float = 3.0
    dino_scale: float = 2.0
    full_scale: float = 0.0
    text_rescale: float = 0.0
    dino_rescale: float = 0.0
    full_rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    guidance: Order = "independent"
    cls_scale: float | None = None
    guide_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.guidance not in ORDERS:
            raise ValueError(f"guidance={self.guidance!r}: must be one of {', '.join(ORDERS)}.")
        for name, scales in RESCALED.items():
            if getattr(self, name) and not any(getattr(self, scale) for scale in scales):
                raise ValueError(f"{name}={getattr(self, name)} has no effect with {scales[0]}=0: 0.")
        if self.guidance != "independent" and self.full_scale:
            raise ValueError(f"full_scale={self.full_scale} has no effect with guidance={self.guidance}: 0.")
        for name in (*SCALES, *RESCALES, "cls_scale"):
            if getattr(self, name) is not None:
                check_finite(name, getattr(self, name))
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

    def terms(self, conditions: Conditions) -> list[Term]:
        """The terms of guidance that these conditions allow, without those of scale zero."""
        text, dino = conditions.has_text, conditions.has_dino
        chained = text and dino and self.guidance != "independent"
        text_first = chained and self.guidance == "text_then_dino"
        allowed = []
        if text and not (chained and not text_first):
            allowed.append(Term("text", self.text_scale, "text", "none"))
        if dino:
            base, cls, with_dino = ("text", "text_cls", "full") if text_first else ("none", "cls", "dino")
            if self.cls_scale is not None and conditions.patches is not None:
                allowed.append(Term("dino", self.cls_scale, cls, base))
                allowed.append(Term("dino", self.dino_scale, with_dino, cls))
            else:
                allowed.append(Term("dino", self.dino_scale, with_dino, base))
        if chained and not text_first:
            allowed.append(Term("text", self.text_scale, "full", "dino"))
        if text and dino and not chained:
            allowed.append(Term("full", self.full_scale, "full", "none"))
        allowed.append(Term(GUIDE, self.guide_scale, branch_of(conditions), GUIDE))
        return [term for term in allowed if term.scale != 0]

    def weights(self, conditions: Conditions) -> dict[str, float]:
        """The weight of each branch in the guided velocity, `none` first; they add up to 1."""
        terms = self.terms(conditions)
        if all(term.negative == "none" for term in terms):
            scales = {term.positive: term.scale for term in terms}
            return {"none": 1 - sum(scales.values())} | scales
        by_branch = {"none": 1.0}
        for term in terms:
            by_branch[term.positive] = by_branch.get(term.positive, 0.0) + term.scale
            by_branch[term.negative] = by_branch.get(term.negative, 0.0) - term.scale
        return by_branch

    def branches(self, conditions: Conditions, level: float) -> tuple[str, ...]:
        """The branches to compute at a noise level, `none` first if it is needed."""
        if self.guidance == "none" or not self._within_interval(level):
            return (branch_of(conditions),)
        weights = self.weights(conditions)
        rescaled = any(self._rescale(term.name) for term in self.terms(conditions))
        return tuple(name for name, weight in weights.items() if rescaled or abs(weight) > NEGLIGIBLE)

    def combine(self, velocities: dict[str, Tensor], x: Tensor, level: float, conditions: Conditions) -> Tensor:
        """The guided velocity, from those of `branches`."""
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
                push = _match_std(negative + push, positive, x, level, rescale) - negative
            guided = guided + push
        return guided

    def _within_interval(self, level: float) -> bool:
        low, high = self.interval
        return low - SAME_LEVEL <= level <= high + SAME_LEVEL

    def _rescale(self, name: str) -> float:
        value: float = 0.0 if name == GUIDE else getattr(self, f"{name}_rescale")
        return value


def branch_of(conditions: Conditions) -> str:
    """The branch with all given conditions."""
    if conditions.has_text and conditions.has_dino:
        return "full"
    return "text" if conditions.has_text else "dino" if conditions.has_dino else "none"


def _match_std(guided: Tensor, conditional: Tensor, x: Tensor, level: float, share: float) -> Tensor:
    """The guided velocity whose clean latent gets the conditional one's standard deviation, blended by ``share``."""
    if level == 0:
        return guided
    levels = torch.full((len(x),), level, device=x.device)
    clean, reference = data_from_velocity(x, guided, levels), data_from_velocity(x, conditional, levels)
    axes = tuple(range(1, x.ndim))
    factor = reference.std(dim=axes, keepdim=True) / clean.std(dim=axes, keepdim=True).clamp(min=1e-6)
    return (x - clean * (share * factor + 1 - share)) / level
