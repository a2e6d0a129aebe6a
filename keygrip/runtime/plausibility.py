"""Bounds on observations and plans, derived from the training data; checked by the server and by `keygrip run`.

A network extrapolates without a warning: a start pose in millimetres gives a plan that seems plausible, one of 1e20
gives NaN. A covered lens and the intrinsics of another resolution are not detected by the network either.
:meth:`Bounds.refuse_start`, :meth:`Bounds.refuse_images` and :meth:`Bounds.refuse_plan` refuse them with a message. The
limits of the robot itself (speed, workspace, table) are in `keygrip.runtime.limits`, at the robot. The bounds here are
wider and stop plans that no robot should ever receive.

Frames and units: world frame, metres, seconds; quaternions w, x, y, z; gripper 0 closed .. 1 open.
Shape legend: A arms, T planned steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from keygrip.models.dark_images import DARK_LEVELS, spread_of_image
from keygrip.models.policy import (
    Needs,
    Observation,
    Plan,
    Policy,
    arm_axis,
    image_of,
    view_names,
    views_of,
    views_or_none,
)

QUATERNION_SLACK = 1e-3  # deviation of a planned quaternion's norm from 1
GRIPPER_SLACK = 0.05  # how far an opening may lie beyond 0 and 1


class ImplausibleError(ValueError):
    """An observation far from the training data, or a plan that must not be sent; the text gives the reason."""


@dataclass(frozen=True)
class Bounds:
    """How far an observation and a plan may be outside the box of the positions seen in training.

    Args:
        start_m: for the arm's position. plan_m: for a planned position.
        speed_m_s: between planned positions, starting from the arm's own.
        image_levels: an image whose brightness varies by less (of 255) counts as dark; 0: every image is accepted.
        centre_share: largest offset of the intrinsics' principal point from the image centre, as a fraction of a side.
    """

    start_m: float = 0.2
    plan_m: float = 0.1
    speed_m_s: float = 3.0
    image_levels: float = DARK_LEVELS
    centre_share: float = 0.2

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and bound.name == "image_levels"))):
                raise ValueError(f"bounds.{bound.name} must be finite and above 0, not {value}")

    def refuse_images(self, observation: Observation, needs: Needs, masks: bool = False) -> None:
        """Raise ImplausibleError if a camera image is dark, or its intrinsics belong to another resolution.

        Args:
            needs: inputs of the policy. masks: the policy masks dark images by its own criterion
                (`keygrip.models.dark_images`); such images are accepted unless all images are dark.
        """
        names: Sequence[str] = needs.cameras or ("",)
        camera_names = names
        views: list[Mapping[str, Any] | None] = [observation]
        if needs.cameras:
            views = [*(views_or_none if masks else views_of)(observation, needs.cameras)]
            camera_names = view_names(observation, needs.cameras)
        levels = [
            0.0 if view is None else spread_of_image(image_of(view, name))
            for name, view in zip(camera_names, views, strict=True)
        ]
        masked = [masks and spread < DARK_LEVELS for spread in levels]
        dark = [spread < self.image_levels for spread in levels]
        refused = [
            name
            for name, is_dark, is_masked in zip(camera_names, dark, masked, strict=True)
            if is_dark and (all(masked) or not is_masked)
        ]
        if refused:
            raise ImplausibleError(
                f"{_name_image(refused[0])} shows nothing: its brightness varies by less than bounds.image_levels="
                f"{self.image_levels:g} of 255; is the lens covered, the light off, or the camera not running?"
            )
        for name, camera_name, view in zip(names, camera_names, views, strict=True):
            if view is None or not needs.calibrated(name):
                continue
            height, width = np.shape(view["image"])[:2]
            centre = np.asarray(view["intrinsics"], float)[:2, 2]
            if not np.abs(centre / (width, height) - 0.5).max() <= self.centre_share:  # also true for NaN
                raise ImplausibleError(
                    f"{_name_image(camera_name)} has {width} x {height} pixels and its intrinsics put the centre at "
                    f"({centre[0]:.4g}, {centre[1]:.4g}), farther from the middle than bounds.centre_share="
                    f"{self.centre_share:g} of a side: are they of another resolution?"
                )

    def refuse_start(self, observation: Observation, workspace: np.ndarray | None) -> None:
        """Raise ImplausibleError if an arm is far from every position seen in training.

        Args:
            workspace: [2, 3] lowest and highest training position; None: unknown, every position is accepted.
        """
        self._refuse_far("'position'", arm_axis(observation["position"], 1), workspace)

    def refuse_under_way(self, plan: Plan, workspace: np.ndarray | None) -> None:
        """Raise ImplausibleError if the current plan sent by a client leads far outside the positions seen in training.

        Args:
            workspace: as in `refuse_start`.
        """
        self._refuse_far("'executing/position'", plan.position.reshape(-1, 3), workspace)

    def _refuse_far(self, name: str, positions: np.ndarray, workspace: np.ndarray | None) -> None:
        if workspace is None:
            return
        outside, index = _distance_outside(positions, workspace)
        if outside > self.start_m:
            raise ImplausibleError(
                f"{name} {_format_position(positions[index])} lies {outside:.3g} m outside the box of the training "
                f"data, {_format_position(workspace[0])} to {_format_position(workspace[1])} m, more than "
                f"bounds.start_m={self.start_m:g}: is it in metres, in the world frame of the training data?"
            )

    def refuse_plan(self, plan: Plan, observation: Observation, workspace: np.ndarray | None) -> None:
        """Raise ImplausibleError if a plan does not consist of finite, unit, reachable poses.

        Args:
            observation: the plan's observation. workspace: as in `refuse_start`.
        """
        start = arm_axis(observation["position"], 1)
        arms, steps = len(start), np.shape(plan.gripper)[-1] if np.ndim(plan.gripper) else 0
        shapes = {"position": (arms, steps, 3), "quaternion": (arms, steps, 4), "gripper": (arms, steps)}
        arrays = {name: np.asarray(getattr(plan, name)) for name in shapes}
        if plan.uncertainty is not None:
            shapes["uncertainty"], arrays["uncertainty"] = (arms, steps), np.asarray(plan.uncertainty)
        if plan.held_back is not None:
            shapes["held_back"], arrays["held_back"] = (arms, 3), np.asarray(plan.held_back)
        for name in ("joints", "controller"):
            if (further := getattr(plan, name)) is not None:
                arrays[name] = np.asarray(further)
                shapes[name] = (arms, steps, *arrays[name].shape[2:])
        for name, value in arrays.items():
            if value.shape != shapes[name] or not steps:
                raise ImplausibleError(f"the policy's plan is malformed: its {name} has the shape {value.shape}")
            if not np.isfinite(value).all():
                raise ImplausibleError(f"the policy's plan is not finite in its {name}; it is not sent")
        if not (math.isfinite(plan.step_seconds) and plan.step_seconds > 0):
            raise ImplausibleError(f"the policy's plan has steps of {plan.step_seconds} s; it is not sent")
        norms = np.linalg.norm(arrays["quaternion"], axis=-1)
        if (abs(norms - 1) > QUATERNION_SLACK).any():
            raise ImplausibleError(f"the policy's plan has a quaternion of norm {norms.min():.3g} to {norms.max():.3g}")
        if (arrays["gripper"] < -GRIPPER_SLACK).any() or (arrays["gripper"] > 1 + GRIPPER_SLACK).any():
            raise ImplausibleError("the policy's plan has a gripper opening outside 0 to 1; it is not sent")
        self.refuse_far_plan(plan, workspace)
        path = np.concatenate([start[:, None], arrays["position"]], axis=1)
        speed = float(np.linalg.norm(np.diff(path, axis=1), axis=-1).max()) / plan.step_seconds
        if speed > self.speed_m_s:
            raise ImplausibleError(
                f"the policy's plan moves at {speed:.3g} m/s, above bounds.speed_m_s={self.speed_m_s:g}; it is not sent"
            )

    def refuse_far_plan(self, plan: Plan, workspace: np.ndarray | None) -> None:
        """Raise ImplausibleError if a plan leads far outside the positions seen in training.

        Args:
            workspace: as in `refuse_start`.
        """
        if workspace is None:
            return
        positions = np.asarray(plan.position).reshape(-1, 3)
        outside, index = _distance_outside(positions, workspace)
        if outside > self.plan_m:
            raise ImplausibleError(
                f"the policy's plan reaches {_format_position(positions[index])}, {outside:.3g} m outside the box of "
                f"the training data, more than bounds.plan_m={self.plan_m:g}; it is not sent"
            )


@dataclass
class PlausiblePolicy:
    """A policy that refuses observations and plans far from the training data, as a server does.

    Args:
        policy: computes plans. bounds: see `Bounds`; shapes and speeds of plans are checked by the robot's limits.
    """

    policy: Any
    bounds: Bounds

    def plan(self, observation: Observation) -> Plan:
        """Return the policy's plan. Raises ImplausibleError if the observation or the plan is far from the training
        data."""
        self._refuse(observation)
        return self._checked(self.policy.plan(observation))

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """As `plan`, for a policy that continues the current plan."""
        self._refuse(observation)
        return self._checked(self.policy.plan_continuing(observation, executing, delay_s))

    def refusal(self, observation: Observation, plan: Plan) -> str | None:
        """Return why an observation or its plan would be refused; None: they would not."""
        try:
            self._refuse(observation)
            self._checked(plan)
        except ImplausibleError as error:
            return str(error)
        return None

    def _checked(self, plan: Plan) -> Plan:
        self.bounds.refuse_far_plan(plan, getattr(self.policy, "workspace", None))
        return plan

    def _refuse(self, observation: Observation) -> None:
        self.bounds.refuse_start(observation, getattr(self.policy, "workspace", None))
        self.bounds.refuse_images(observation, self.policy.needs, masks_views(self.policy))


def masks_views(policy: Policy) -> bool:
    """Return whether a policy masks cameras with dark images."""
    return bool(getattr(policy, "masks_views", False))


def _name_image(camera: str) -> str:
    return f"the image of camera {camera!r}" if camera else "'image'"


def _distance_outside(positions: np.ndarray, workspace: np.ndarray) -> tuple[float, int]:
    """Return the largest distance of positions [N, 3] outside a box [2, 3] along one axis, metres, and its index."""
    beyond = np.maximum(workspace[0] - positions, positions - workspace[1]).max(axis=1)
    index = int(np.argmax(beyond))
    return float(beyond[index]), index


def _format_position(position: np.ndarray) -> str:
    return f"({', '.join(f'{value:.3g}' for value in position)})"
