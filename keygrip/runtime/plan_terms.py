"""Select what is followed of a plan: its poses, or its joints if it holds both.

Commands along a plan are rows of W values for each arm: pose (7), gripper opening (1), and the joints (J) last if they
are followed. The pose is then the tool pose of those joints, so limits on poses also limit the joints. The arm is sent
the joints themselves unless a limit has changed the pose.

Shape legend: A arms, T planned steps, J joints of an arm, W = 8 or 8 + J.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from keygrip.models.policy import Needs, Observation, Plan, arm_axis
from keygrip.robots.joint_arms import JointArms
from keygrip.runtime.limits import UnsafePlanError

Follow = Literal["auto", "joints", "poses"]
"""auto: joints if the arms accept them and the plan has them, else poses; joints: a plan without them is refused;
poses: a plan's joints are ignored."""

POSE = 8  # values of a pose with its opening
# largest difference between the tool poses of a plan's joints and the poses of the same plan
BESIDE_M, BESIDE_RAD = 0.02, 0.1


def check_follow(follow: Follow, setting: str) -> None:
    """Raise ValueError if the option does not exist. `setting`: its name, for the message."""
    if follow not in get_args(Follow):
        raise ValueError(f"{setting} is one of {', '.join(get_args(Follow))}, not {follow!r}")


def refuse_idle_follow(follow: Follow, setting: str, needs: Needs | None, takes_joints: bool) -> None:
    """Raise ValueError if joints are requested that cannot be followed, or poses if there is nothing else.

    Args:
        setting: name of the option, for the message. needs: of the policy; None: it is unknown what its plans hold,
            and each plan is checked when it arrives.
        takes_joints: whether the robot or the environment accepts joints.
    """
    if follow == "auto" or (needs is None and takes_joints):
        return
    lacking = []
    if not takes_joints:
        lacking.append("the arms take no joints")
    if needs is not None and not needs.plans_joints:
        lacking.append("the policy plans none (geometry_vla with model.actions.kind=joint does)")
    if follow == "joints" and lacking:
        raise ValueError(f"{setting}=joints cannot be: {' and '.join(lacking)}; leave it out")
    if follow == "poses" and lacking:
        raise ValueError(f"{setting}=poses has no effect, since {' and '.join(lacking)}: leave it out")


def as_followed(plan: Plan, follow: Follow, arms: JointArms | None) -> Plan:
    """Return the plan in the form in which it is followed: with joints if they are followed, and then with their poses.

    Joints out of their range are clipped to it.

    Args:
        plan: of the policy. arms: the arms that are driven; None: they accept no joints.

    Raises:
        UnsafePlanError: Joints are required and missing, have another shape than the arms', are not finite, or give
            other tool poses than the plan's own poses.
    """
    if follow == "poses" or (follow == "auto" and (plan.joints is None or arms is None)):
        return plan if plan.joints is None else replace(plan, joints=None)
    if arms is None:
        raise UnsafePlanError("follow=joints, and the arms take none")
    if plan.joints is None:
        raise UnsafePlanError(
            "follow=joints, and the plan holds none: the policy plans none, or its poses were moved into the box of "
            "the training positions; follow=auto follows the poses of such a plan"
        )
    ranges = arms.joint_ranges
    shape = (*plan.gripper.shape, ranges.shape[1])
    if plan.joints.shape != shape or len(ranges) != len(plan.joints):
        raise UnsafePlanError(
            f"the plan's joints have the shape {plan.joints.shape}; {len(ranges)} arms of {ranges.shape[1]} joints and "
            f"{plan.gripper.shape[1]} steps are {(len(ranges), *shape[1:])}"
        )
    if not np.isfinite(plan.joints).all():
        raise UnsafePlanError("the plan's joints are not finite")
    joints = np.clip(plan.joints, ranges[:, None, :, 0], ranges[:, None, :, 1])
    poses = arms.poses_at(joints)
    away = np.linalg.norm(poses[..., :3] - plan.position, axis=-1).max()
    cosine = np.abs((poses[..., 3:] * plan.quaternion).sum(-1)) / np.linalg.norm(plan.quaternion, axis=-1)
    angle = 2 * np.arccos(np.minimum(cosine, 1.0)).max()
    if not (away <= BESIDE_M and angle <= BESIDE_RAD):  # also true if the poses are not finite
        beyond = np.abs(joints - plan.joints).max()
        reason = f"joints are up to {beyond:.2f} rad out of their range" if beyond > 0 else "are they of another arm?"
        raise UnsafePlanError(
            f"the plan's joints put the tool up to {100 * away:.1f} cm and {np.rad2deg(angle):.0f} degrees beside the "
            f"plan's poses: {reason}"
        )
    return replace(plan, joints=joints, position=poses[..., :3], quaternion=poses[..., 3:])


def observed_poses(observation: Observation) -> np.ndarray:
    """Return [A, 8] the poses and gripper openings of an observation."""
    position, quaternion = arm_axis(observation["position"], 1), arm_axis(observation["quaternion"], 1)
    return np.concatenate([position, quaternion, arm_axis(observation["gripper"], 0)[:, None]], axis=1)


def waypoints_of(plan: Plan) -> np.ndarray:
    """Return [A, T, W] the steps of a plan, in the form in which it is followed."""
    parts = [plan.position, plan.quaternion, plan.gripper[..., None]]
    return np.concatenate(parts if plan.joints is None else [*parts, plan.joints], axis=2, dtype=np.float64)


def complete_command(command: np.ndarray, arms: JointArms | None) -> np.ndarray:
    """Complete an interpolated command [A, W]: with joints, its pose becomes the tool pose of those joints instead of
    the interpolated pose."""
    if command.shape[1] == POSE:
        return command
    assert arms is not None
    return np.concatenate([arms.poses_at(command[:, POSE:]), command[:, POSE - 1 :]], axis=1)
