"""Set the noise levels of a model on a scheduler of diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from keygrip.models.nn.flow_matching import noise_levels, shifted
from keygrip.models.patch_dit.sampler import Sampling

OWN_SCHEDULER = "leave the pipeline the scheduler that it came with"
LEVEL_TOLERANCE = 1e-4  # of noise levels; schedulers compute them in float32
START_TOLERANCE = 0.01  # of the initial noise level, if a scheduler's own options choose the other levels


def set_levels(
    scheduler: Any, sampling: Sampling, shift: float, strength: float, device: torch.device, student: bool = False
) -> None:
    """Set a scheduler's noise levels, from `strength` to 0, to those that `sample` uses. The scheduler applies its own
    configured shift to the levels given here; two shifts in sequence equal one shift by their product.

    The options of a `FlowMatchEulerDiscreteScheduler`, its shift included, may choose other levels, but not for a
    few-steps student (`student`), which is trained for its own alone.

    Args:
        sampling: the model's; its steps are from pure noise, and a lower `strength` takes fewer. shift: the
            resolution's.

    Raises:
        ValueError: The scheduler cannot take noise levels, would sample at others, or does not interpret the model's
            output as a velocity.
    """
    own_shift = _own_shift(scheduler)
    if not isinstance(own_shift, int | float) or isinstance(own_shift, bool) or not 0 < own_shift < math.inf:
        raise ValueError(f"the scheduler's shift is {own_shift!r} (scheduler_config.json, set_shift): a number above 0")
    own = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    own_options = own and not student  # which may change the levels
    class_name = type(scheduler).__name__
    levels = torch.tensor(noise_levels(max(1, round(sampling.steps * strength)), shift)[:-1], dtype=torch.float64)
    expected_shift = own_shift if own_options else sampling.timestep_shift
    expected = [*(strength * shifted(levels, expected_shift)).tolist(), 0.0]
    if strength != 1 and not own:
        raise ValueError(
            f"strength={strength:g} starts between noise and data, where {class_name} cannot: {OWN_SCHEDULER}"
        )
    if strength != 1:  # the scheduler applies its own shift last: remove it here
        levels = shifted(strength * shifted(levels, own_shift), 1 / own_shift)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{class_name} takes no noise levels (sigmas): {OWN_SCHEDULER}")
    if scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{class_name} has use_dynamic_shifting=True, and the model shifts its noise levels by the resolution "
            f"itself: give use_dynamic_shifting=False, or {OWN_SCHEDULER}"
        )
    try:
        scheduler.set_timesteps(sigmas=levels.numpy(), device=device)  # some compute with arrays only
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{class_name} does not take the model's noise levels ({error}): {OWN_SCHEDULER}") from error
    actual = scheduler.sigmas.tolist()
    difference = _first_difference(actual, expected)
    if difference and not own_options:
        setting = _shift_setting(scheduler)
        advice = f"give {setting}={expected_shift:g}, or " if setting and own_shift != expected_shift else ""
        raise ValueError(
            f"{class_name} would draw at other noise levels than the model's ({difference}): {advice}{OWN_SCHEDULER}"
        )
    falls = all(left > right for left, right in pairwise(actual)) and abs(actual[-1]) <= LEVEL_TOLERANCE
    if not falls or not abs(actual[0] - expected[0]) <= START_TOLERANCE:
        raise ValueError(
            f"{class_name} has options by which noise levels do not fall from {expected[0]:.3g} to 0: they go from "
            f"{actual[0]:.3g} to {actual[-1]:.3g}, and {difference}; {OWN_SCHEDULER}"
        )
    predicted = scheduler.config.get("prediction_type") if _has_setting(scheduler, "prediction_type") else None
    if predicted not in (None, "flow_prediction"):
        raise ValueError(
            f"{class_name} has prediction_type={predicted!r}, and the model predicts the velocity of flow matching: "
            f"give prediction_type='flow_prediction', or {OWN_SCHEDULER}"
        )


def take_step(
    scheduler: Any, velocity: Tensor, time: Tensor, x: Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Tensor:
    """Take one step of a scheduler. Added noise comes from `generator`, or from each image's generator in a list."""
    given = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    found: Tensor = scheduler.step(velocity, time, x, return_dict=False, **given)[0]
    return found


def _own_shift(scheduler: Any) -> Any:
    """Return the shift that a scheduler applies to the given levels; 1 if it has none."""
    setting = _shift_setting(scheduler)
    if setting is None:
        return 1.0
    if setting == "shift":
        return getattr(scheduler, "shift", scheduler.config.shift)  # set_shift may change it
    return scheduler.config[setting]


def _shift_setting(scheduler: Any) -> str | None:
    """Return the name of the scheduler's setting for the shift. `from_config` of a scheduler that has another name for
    it keeps that other setting without effect."""
    return next((name for name in ("flow_shift", "shift") if _has_setting(scheduler, name)), None)


def _has_setting(scheduler: Any, setting: str) -> bool:
    """Return whether the scheduler has this setting. Its configuration may contain settings of another scheduler."""
    return setting in inspect.signature(type(scheduler).__init__).parameters


def _first_difference(actual: Sequence[float], expected: Sequence[float]) -> str:
    """Return a message with the first noise level that differs from the expected one; empty if all agree."""
    for number, (left, right) in enumerate(zip_longest(actual, expected), 1):
        if left is None or right is None:
            return f"{len(actual)} levels in place of {len(expected)}"
        if not abs(left - right) <= LEVEL_TOLERANCE:
            return f"level {number} of {len(expected)} is {left:.6g} in place of {right:.6g}"
    return ""
