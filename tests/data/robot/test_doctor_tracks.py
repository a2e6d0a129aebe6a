"""Commanded against reached tracks and clocks: a difference alone is named, a sound pair gives no finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.data.robot.corrections import Correction, corrected
from keygrip.data.robot.doctor.commands import REACHED_WRONG, check_commands
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.exchanged_arms import check_exchanged_arms
from keygrip.data.robot.doctor.trajectories import check_jumps, check_times
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo
from keygrip.robots.inverse_kinematics import pointing_down

FRAMES, DELAY = 60, 1.6


def at(when: np.ndarray, number: int) -> ArmTrajectory:
    """A reach that starts tilted, then points straight down: [N] frame numbers."""
    along = np.clip(when / 45, 0, 1)
    side, depth = np.sin(3 * along + number), np.cos(4 * along - number)
    position = np.stack([0.38 + 0.08 * depth, 0.14 * side, 0.2 - 0.15 * along], axis=1)
    tilt = 0.5 * np.clip(1 - 3 * along, 0, 1)
    turn = [
        pointing_down(0.5 * float(s), 0.0) @ Rotation.from_rotvec([0, t, 0]).as_matrix()
        for s, t in zip(side, tilt, strict=True)
    ]
    opening = np.interp(when, [0, 30, 36, FRAMES], [1.0, 1.0, 0.3, 0.3])
    return ArmTrajectory(position, Rotation.from_matrix(np.stack(turn)).as_quat(scalar_first=True), opening)


def demo(number: int, fault: Callable[[ArmTrajectory], ArmTrajectory]) -> Demo:
    frames = np.arange(FRAMES, dtype=float)
    arm = replace(at(frames - DELAY, number), commanded=fault(at(frames, number)))
    times = (frames * 1e8).astype(np.int64)
    return Demo(f"demo_{number}", Path(), "arm", "pick", "pick it up", 10.0, times, {"right": arm}, {})


def examined(demos: list[Demo]) -> Examination:
    return Examination(demos, frames_per_demo=4, height_bins=32, pred_size=56)


def inverted(track: ArmTrajectory) -> ArmTrajectory:
    turn = Rotation.from_quat(track.quaternion, scalar_first=True).inv()
    return replace(track, position=-turn.apply(track.position), quaternion=turn.as_quat(scalar_first=True))


def early(track: ArmTrajectory, frames: int = 2) -> ArmTrajectory:
    rows = np.minimum(np.arange(FRAMES) + frames, FRAMES - 1)
    return ArmTrajectory(track.position[rows], track.quaternion[rows], track.gripper[rows])


@pytest.mark.parametrize(
    ("fault", "check", "cause"),
    [
        (lambda track: track, None, ""),
        (
            lambda track: replace(track, position=1.1 * track.position),
            "command_scale",
            "commanded positions scaled by 1.1 or reached ones scaled by 0.9",
        ),
        (
            lambda track: replace(track, position=track.position + [0.03, 0, 0]),
            "command_offset",
            "commanded or reached track offset by",
        ),
        (
            lambda track: replace(track, quaternion=track.quaternion * [1, -1, -1, -1]),
            "command_rotation",
            "commanded or reached quaternions conjugated (world to gripper)",
        ),
        (inverted, "command_direction", "commanded or reached poses inverted (world to gripper"),
        (early, "command_lag", "commanded track early or reached track late, by 2 frames"),
    ],
    ids=["sound", "scaled", "offset", "conjugated", "inverted", "early"],
)
def test_difference_of_both_tracks_is_named_without_joints_that_tell_which_is_wrong(fault, check, cause):
    exam = examined([demo(number, fault) for number in range(3)])
    check_commands(exam)
    assert [finding.check for finding in exam.findings] == ([check] if check else []), exam.findings
    assert all(finding.cause.startswith(cause) and len(finding.demos) == 3 for finding in exam.findings)


def test_one_demo_with_inverted_commands_is_told_from_the_others():
    exam = examined([demo(number, inverted if number == 1 else lambda track: track) for number in range(3)])
    check_commands(exam)
    assert [(finding.check, finding.demos) for finding in exam.findings] == [("command_direction", ("demo_1",))]


@pytest.mark.parametrize("check", REACHED_WRONG)
def test_where_the_reached_track_of_an_arm_is_known_to_be_wrong_its_commands_are_not_blamed(check):
    def told(track: ArmTrajectory) -> ArmTrajectory:
        return replace(early(track), position=early(track).position + [0.05, 0, 0])

    for arm, blamed in (("left", ("demo_0", "demo_1", "demo_2")), ("right", ("demo_2",))):
        exam = examined([demo(number, told) for number in range(3)])
        exam.add(check, "error", "measured", "advice", cause="cause", demos=["demo_0", "demo_1"], arm=arm)
        check_commands(exam)
        found = exam.findings[1:]
        assert [(finding.check, finding.demos) for finding in found] == [
            ("command_lag", blamed),
            ("command_offset", blamed),
        ]


def two_armed(number: int) -> Demo:
    """Arms whose bases are 0.9 m apart."""
    sound = demo(number, lambda track: track)
    left = demo(number + 9, lambda track: track).arms["right"]
    assert left.commanded is not None
    told = replace(left.commanded, position=left.commanded.position + [0, 0.9, 0])
    left = replace(left, position=left.position + [0, 0.9, 0], commanded=told)
    return replace(sound, arms={**sound.arms, "left": left})


def test_commands_under_the_other_arms_name_are_named_and_nothing_else():
    demos = [two_armed(number) for number in range(3)]
    for number, found in enumerate(demos[1:], 1):
        right, left = found.arms["right"], found.arms["left"]
        told = {"right": replace(right, commanded=left.commanded), "left": replace(left, commanded=right.commanded)}
        demos[number] = replace(found, arms=told)
    exam = examined(demos)
    check_exchanged_arms(exam)
    check_commands(exam)
    assert [(finding.cause, finding.demos) for finding in exam.findings] == [
        ("commanded tracks of left and right exchanged", ("demo_1", "demo_2"))
    ]


@pytest.mark.parametrize("exchanged", [(), (1,), (1, 2)])
def test_arms_that_stand_in_each_others_place_are_named_where_most_demos_say_which_is_which(exchanged):
    demos = [two_armed(number) for number in range(4)]
    for number in exchanged:
        arms = demos[number].arms
        demos[number] = replace(demos[number], arms={"right": arms["left"], "left": arms["right"]})
    exam = examined(demos)
    check_exchanged_arms(exam)
    named = [("arms left and right exchanged in these demos", ("demo_1",))] if exchanged == (1,) else []
    assert [(finding.cause, finding.demos) for finding in exam.findings] == named


@pytest.mark.parametrize(("divided", "unit"), [(1_000, "microseconds"), (1_000_000, "milliseconds")])
def test_unit_of_time_stamps_is_named_and_nothing_is_said_to_jump(divided, unit):
    sound = demo(0, lambda track: track)
    exam = examined([replace(sound, timestamps=sound.timestamps // divided)])
    exam.measures["arm/right/height_range_m"] = [0.05, 0.2]
    check_times(exam)
    check_jumps(exam)
    assert [(finding.check, finding.cause) for finding in exam.findings] == [("time_unit", f"time stamps in {unit}")]


def test_corrections_keep_what_the_controller_was_told():
    sound = demo(0, lambda track: track)
    arm = replace(sound.arms["right"], controller=np.arange(FRAMES * 2.0).reshape(FRAMES, 2))
    images: Any = np.zeros((FRAMES, 8, 8, 3), dtype=np.uint8)
    cameras = {"over": CameraTrack.without_calibration(8, 8, images, FRAMES, "none needed")}
    late = {"over": Correction(np.eye(4), 1.0, 3)}
    found = corrected(replace(sound, arms={"right": arm}, cameras=cameras), late, Path("c.yaml"))
    assert np.array_equal(found.arms["right"].controller, arm.controller[:-3])
