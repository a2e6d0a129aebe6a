"""In which terms a plan is followed: its poses, or the joints that it may hold beside them.

Commands on the way of a plan are rows of W numbers for each arm: pose (7) and gripper opening (1), and behind them the
joints (J) where these are followed. The pose is then where those joints put the tool, so that whatever bounds poses
bounds joints too; the arm is sent the joints themselves as long as nothing has moved the pose away from them.

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
"""auto: joints where the arms take them and the plan has them, else poses; joints: a plan without them is refused;
poses: a plan's joints are left unused."""

POSE = 8  # numbers of a pose with its opening
BESIDE_M, BESIDE_RAD = 0.02, 0.1  # most that joints may put the tool beside the poses of the same plan


def check_follow(follow: Follow, setting: str) -> None:
    """Raises ValueError: there is no such option. `setting`: its name, for the message."""
    if follow not in get_args(Follow):
        raise ValueError(f"{setting} is one of {', '.join(get_args(Follow))}, not {follow!r}")


def refuse_idle_follow(follow: Follow, setting: str, needs: Needs | None, takes_joints: bool) -> None:
    """Raises ValueError where joints are asked for that cannot be followed, or poses where nothing else is there.

    Args:
        setting: name of the option, for the message. needs: of the policy; None: it does not say what its plans hold,
            and each plan is looked at when it is there.
        takes_joints: whether the robot or the environment does.
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


def followed(plan: Plan, follow: Follow, arms: JointArms | None) -> Plan:
    """The plan in the terms in which it is followed: it holds joints where these are, and its poses are then theirs.

    Joints beyond their range are moved to its end.

    Args:
        plan: as the policy made it. arms: that are driven; None: they take no joints.

    Raises:
        UnsafePlanError: its joints are asked for and missing, of another shape than the arms', not finite, or put the
            tool elsewhere than the plan's own poses.
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
    turned = 2 * np.arccos(np.minimum(cosine, 1.0)).max()
    if not (away <= BESIDE_M and turned <= BESIDE_RAD):  # also where the poses are not finite
        beyond = np.abs(joints - plan.joints).max()
        why = f"joints are up to {beyond:.2f} rad out of their range" if beyond > 0 else "are they of another arm?"
        raise UnsafePlanError(
            f"the plan's joints put the tool up to {100 * away:.1f} cm and {np.rad2deg(turned):.0f} degrees beside the "
            f"plan's poses: {why}"
        )
    return replace(plan, joints=joints, position=poses[..., :3], quaternion=poses[..., 3:])


def observed_poses(observation: Observation) -> np.ndarray:
    """[A, 8] the poses and gripper openings that an observation shows."""
    position, quaternion = arm_axis(observation["position"], 1), arm_axis(observation["quaternion"], 1)
    return np.concatenate([position, quaternion, arm_axis(observation["gripper"], 0)[:, None]], axis=1)


def waypoints_of(plan: Plan) -> np.ndarray:
    """[A, T, W] the steps of a plan, in the terms in which it is followed."""
    parts = [plan.position, plan.quaternion, plan.gripper[..., None]]
    return np.concatenate(parts if plan.joints is None else [*parts, plan.joints], axis=2, dtype=np.float64)


def placed(command: np.ndarray, arms: JointArms | None) -> np.ndarray:
    """A command [A, W] between two others; with joints, its pose is where these put the tool, and not between the two
    poses."""
    if command.shape[1] == POSE:
        return command
    assert arms is not None
    return np.concatenate([arms.poses_at(command[:, POSE:]), command[:, POSE - 1 :]], axis=1)
