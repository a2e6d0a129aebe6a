"""Noise levels of a model, given to a scheduler of diffusers."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from keygrip.models.nn.flow_matching import noise_levels, shifted

OWN_SCHEDULER = "leave the pipeline the scheduler that it came with"
LEVEL_TOLERANCE = 1e-4  # of noise levels; schedulers compute them in float32


def set_levels(scheduler: Any, steps: int, shift: float, strength: float, device: torch.device) -> None:
    """Sets a scheduler's noise levels, from `strength` to 0: as those of `sample`, since two shifts are one by their
    product and the scheduler has that of its own configuration.

    Args:
        steps: from pure noise; fewer from a lower `strength`. shift: the resolution's.

    Raises:
        ValueError: it cannot take them, or would draw at others.
    """
    own = getattr(scheduler, "shift", scheduler.config.get("shift", 1.0))  # set_shift may change it
    if not isinstance(own, int | float) or isinstance(own, bool) or not 0 < own < math.inf:
        raise ValueError(f"the scheduler's shift is {own!r} (scheduler_config.json, set_shift): a number above 0")
    own_options = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # which may ask for other levels
    named = type(scheduler).__name__
    levels = torch.tensor(noise_levels(max(1, round(steps * strength)), shift)[:-1], dtype=torch.float64)
    if strength != 1 and not own_options:
        raise ValueError(f"strength={strength:g} starts between noise and data, where {named} cannot: {OWN_SCHEDULER}")
    if strength != 1:  # the scheduler's shift comes last: taken off here, put on again there
        levels = shifted(strength * shifted(levels, own), 1 / own)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{named} takes no noise levels (sigmas): {OWN_SCHEDULER}")
    scheduler.set_timesteps(sigmas=levels.tolist(), device=device)
    wanted = [*shifted(levels, own).tolist(), 0.0]
    found = scheduler.sigmas.tolist()
    other = len(found) != len(wanted) or max(map(abs, map(operator.sub, found, wanted))) > LEVEL_TOLERANCE
    if other and not own_options:
        raise ValueError(
            f"{named} would draw at other noise levels than the model's ({_first(found)} in place of "
            f"{_first(wanted)}): {OWN_SCHEDULER}"
        )


def _first(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:.3f}" for level in levels[:3]) + ", ..."
