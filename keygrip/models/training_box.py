"""Clamps plans to the neighbourhood of the positions seen in training, and warns if that moves a position.

Shape legend: B observations, A arms, T planned steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from keygrip.models.policy import Plan, held_back_m

log = logging.getLogger(__name__)

# Metres around the box of the training positions, in all directions or along x, y and z; None: no limit.
Margin = float | tuple[float | None, float | None, float | None] | None


def check_margin(margin_m: Margin) -> None:
    """Raises ValueError: a margin is negative or not finite, or there are neither one nor three of them."""
    if not isinstance(margin_m, int | float | None) and len(margin_m) != 3:
        raise ValueError(f"policy.margin_m={margin_m}: must be one distance, or three along x, y and z")
    if any(each is not None and not 0 <= each < math.inf for each in _margin_per_axis(margin_m)):
        raise ValueError(f"policy.margin_m={margin_m}: must be a distance in metres, at least 0, or null for no limit")


def kept_in_box(planned: Tensor, box: Tensor, margin_m: Margin) -> tuple[Tensor, Tensor]:
    """Clamp positions, axis by axis, to the box of the training positions plus a margin.

    Args:
        planned: ``[B, A, T, 3]`` metres. box: ``[2, 3]``, its lowest and highest corner. margin_m: metres, per axis or
            for all axes; None: positions are not changed.

    Returns:
        The positions, and the largest distance by which steps of each plan were moved, ``[B, A, 3]`` metres along x, y
        and z.
    """
    margin = box.new_tensor([math.inf if each is None else each for each in _margin_per_axis(margin_m)])
    low, high = box
    clamped = planned.clamp(low - margin, high + margin)
    return clamped, (clamped - planned).abs().amax(dim=2)


def _margin_per_axis(margin_m: Margin) -> Sequence[float | None]:
    return [margin_m] * 3 if isinstance(margin_m, int | float | None) else margin_m


def _format_margin(margin_m: Margin) -> str:
    """Format a margin as on the command line: 0.01, [null,null,0.01]."""
    words = ["null" if each is None else f"{each:g}" for each in _margin_per_axis(margin_m)]
    return words[0] if isinstance(margin_m, int | float | None) else f"[{','.join(words)}]"


class HeldBackWarning:
    """Warns once per episode that a plan was held back, and by how much; one object for each episode or session."""

    def __init__(self) -> None:
        self._warned = False

    def begin(self) -> None:
        """Start an episode."""
        self._warned = False

    def check_plan(self, plan: Plan, arms: Sequence[str], margin_m: Margin) -> None:
        """Warn if the plan was held back and no earlier plan of the episode was.

        Args:
            plan: with its `held_back`. arms: names, in the order of its arms. margin_m: margin of the policy, metres.
        """
        if self._warned or plan.held_back is None or not held_back_m(plan):
            return
        self._warned = True
        arm, axis = divmod(int(np.nanargmax(plan.held_back)), 3)
        log.warning(
            "a plan was held back by %.1f cm along %s (arm %s): it leads farther than policy.margin_m=%s out of the "
            "box of the training positions; a larger policy.margin_m lets it go there (said once an episode)",
            100 * plan.held_back[arm, axis],
            "xyz"[axis],
            arms[arm],
            _format_margin(margin_m),
        )
