"""Compares recorded poses with forward kinematics, if a YAM's joints were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keygrip.data.robot.doctor.examination import Examination, yam_model
from keygrip.data.robot.doctor.frozen_poses import demos_with_frozen_poses
from keygrip.data.robot.doctor.misread_rotations import (
    INVERTED,
    SCATTER_DEG,
    XYZW,
    ComparedPoses,
    Misread,
    find_misread,
    mean_turn,
)
from keygrip.data.robot.doctor.tracks import reached_frames_on_path
from keygrip.data.robot.schema import Demo
from keygrip.data.spacing import evenly
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion

SITE_OFFSET_M = 0.005  # distance from the recorded position to the grasp site; other robot models cause 7 to 44 mm
LARGE_SITE_OFFSET_M = 0.01  # from here on an error
KINEMATICS_SPREAD_M = 0.01  # spread of the difference between recorded poses and forward kinematics


def with_joints(exam: Examination, arm: str) -> list[tuple[Demo, np.ndarray, tuple[str, str]]]:
    """Return demos whose joints give the gripper's position of an arm, with the joints [N, 6] and the arm's model:
    joints of a YAM, in rad, stored under the right arm's name."""
    if exam.named("joint_unit", arm=arm):
        return []  # small angles in degrees cannot be distinguished from radians
    left_out = exam.named("exchanged_arms") | demos_with_frozen_poses(exam, arm)
    found = []
    for demo in exam.with_arm(arm):
        joints, model = demo.arms[arm].joints, yam_model(demo, arm)
        if demo.name not in left_out and joints is not None and joints.shape[1] == 6 and model is not None:
            found.append((demo, joints, model))
    return found


def demos_shown_by_joints(exam: Examination, arm: str) -> set[str]:
    """Return names of demos whose joints show the convention of an arm's poses."""
    return {demo.name for demo, *_ in with_joints(exam, arm)} - exam.named("kinematics", arm=arm)


class PoseDifferences(NamedTuple):
    """Differences between recorded poses and joints: rotations (degrees), spread of positions (m) along the axes of the
    world and of the tool, and the mean along the tool's axes [3]."""

    scatter: float
    in_world: float
    in_tool: float
    offset: np.ndarray

    @property
    def have_one_cause(self) -> bool:
        """Whether a different base or grasp site explains the differences."""
        return min(self.in_world, self.in_tool) <= KINEMATICS_SPREAD_M and self.scatter <= SCATTER_DEG


def _measure_differences(demos: Sequence[ComparedPoses]) -> PoseDifferences:
    base, scatter = mean_turn(np.concatenate([demo.turns() for demo in demos]))
    residual = np.concatenate([demo.position - demo.own_position @ base.T for demo in demos])
    tool_residual = (np.concatenate([demo.rotation for demo in demos]).transpose(0, 2, 1) @ residual[..., None])[..., 0]
    return PoseDifferences(
        scatter, float(residual.std(axis=0).max()), float(tool_residual.std(axis=0).max()), tool_residual.mean(axis=0)
    )


def check_kinematics(exam: Examination) -> None:
    """Compare recorded poses with forward kinematics, if a YAM's joints were recorded. Demos whose rotations are in
    another convention are named first; the others must share one base and one grasp site."""
    for arm in exam.arms:
        demos = [_compared(demo, arm, joints, model) for demo, joints, model in with_joints(exam, arm)]
        if not demos:
            exam.measures[f"arm/{arm}/site_offset_m"] = None
            continue
        misread: set[str] = set()
        for group in find_misread(demos):
            _report_misread(exam, arm, group)
            misread |= {demo.name for demo in group.demos}
        if remaining := [demo for demo in demos if demo.name not in misread]:
            _check_site(exam, arm, remaining)


def _compared(demo: Demo, arm: str, joints: np.ndarray, model: tuple[str, str]) -> ComparedPoses:
    frames = reached_frames_on_path(demo, arm)  # outliers have a finding of their own
    frames = frames[evenly(len(frames), 40)]
    position, quaternion = forward_kinematics(joints[frames], *model)
    recorded = demo.arms[arm].quaternion[frames]
    return ComparedPoses(
        demo.name,
        demo.arms[arm].position[frames],
        matrix_from_quaternion(recorded),
        position,
        matrix_from_quaternion(quaternion),
        matrix_from_quaternion(np.roll(recorded, 1, axis=1)),
    )


def _report_misread(exam: Examination, arm: str, group: Misread) -> None:
    names = [demo.name for demo in group.demos]
    differ = f"the recorded rotations differ from the forward kinematics by {group.as_recorded:.0f} degrees"
    if group.reading == XYZW:
        exam.add(
            "quaternion_order",
            "error",
            f"{differ} as the file is read and by {group.as_read:.0f} if its quaternions are x, y, z, w",
            "Store quaternions as w, x, y, z",
            cause="quaternions stored x, y, z, w",
            demos=names,
            arm=arm,
        )
        return
    exam.add(
        "pose_direction",
        "error",
        f"{differ}, inverted by {group.as_read:.0f}",
        "Store gripper-to-world poses",
        cause="poses inverted (world to gripper in place of gripper to world)"
        if group.reading == INVERTED
        else "quaternions conjugated (world to gripper)",
        demos=names,
        arm=arm,
    )


def _check_site(exam: Examination, arm: str, demos: list[ComparedPoses]) -> None:
    """Report demos whose poses do not go with the joints, and positions of another point than the grasp site."""
    differences = _measure_differences(demos)
    offset = differences.offset
    exam.measures[f"arm/{arm}/site_offset_m"] = [round(float(value), 4) for value in offset]
    if not differences.have_one_cause:
        odd = [
            demo for demo in demos if not _measure_differences([demo]).have_one_cause
        ] or demos  # all, if their bases differ
        worst = _measure_differences(odd)
        exam.add(
            "kinematics",
            "warning",
            "recorded poses and the forward kinematics of the recorded joints do not go together "
            f"({worst.in_tool * 1e3:.0f} mm, {worst.scatter:.0f} degrees of spread)",
            "Check the joints' zero positions and order, the arm's model, and whether poses and joints have the "
            "same clock",
            cause="other zero positions or order of the joints, another arm's model, or another clock",
            demos=[demo.name for demo in odd],
            arm=arm,
        )
    # while the gripper points down, a shift of the base and of the site along the approach look the same
    elif np.linalg.norm(offset) > SITE_OFFSET_M and (
        differences.in_tool < differences.in_world or abs(offset[2]) > 0.95 * np.linalg.norm(offset)
    ):
        millimetres = ", ".join(f"{value * 1e3:.0f}" for value in offset)
        exam.add(
            "site_offset",
            "error" if np.linalg.norm(offset) > LARGE_SITE_OFFSET_M else "warning",
            "the recorded position is not the grasp site between the finger tips but "
            f"{np.linalg.norm(offset) * 1e3:.0f} mm off ({millimetres} mm along the tool's x, y, z)",
            "Record the grasp site's position (a flange or wrist frame is likely, or, with 7 to 44 mm, the "
            "grasp_site of I2RT's own robot models), or add the offset on import; look at the contact sheet for "
            "the point that is marked",
            cause=f"positions of a point {np.linalg.norm(offset) * 1e3:.0f} mm from the grasp site",
            demos=[demo.name for demo in demos],
            arm=arm,
        )
