"""Commanded and reached tracks, and clocks: exactly the injected difference is reported, and a sound pair gives no
finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.data.robot.checks import pose_outliers, reached_outliers
from keygrip.data.robot.corrections import Correction, corrected
from keygrip.data.robot.doctor import commands
from keygrip.data.robot.doctor.commands import LEFT_OUT, check_commands
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.exchanged_arms import check_exchanged_arms
from keygrip.data.robot.doctor.frozen_poses import check_frozen_poses, check_poses_of_moving_images
from keygrip.data.robot.doctor.grippers import check_gripper
from keygrip.data.robot.doctor.images import Stream, _check_colour_order, _colour_of_object
from keygrip.data.robot.doctor.tracks import check_outlier_poses
from keygrip.data.robot.doctor.trajectories import check_heights, check_jumps, check_quaternions, check_times
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo
from keygrip.robots.inverse_kinematics import pointing_down

FRAMES, DELAY = 60, 1.6


def at(when: np.ndarray, number: int) -> ArmTrajectory:
    """Return a reach that starts tilted and then points straight down, at the [N] frame numbers `when`."""
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


def blocked(found: Demo, side: float) -> Demo:
    """Return the demo with an arm that an obstacle stops on its way to the left, and that turns more slowly there."""
    arm = found.arms["right"]
    stopped = arm.position[:, 1] > side
    position = np.stack([arm.position[:, 0], np.minimum(arm.position[:, 1], side), arm.position[:, 2]], axis=1)
    turn = Rotation.from_quat(arm.quaternion, scalar_first=True) * Rotation.from_rotvec(stopped[:, None] * [0, 0, 0.4])
    return reached(found, position=position, quaternion=turn.as_quat(scalar_first=True))


def test_an_arm_that_is_blocked_is_no_scale_offset_lag_or_rotation_of_its_commands():
    sound = [demo(number, lambda track: track) for number in range(3)]
    exam = examined([blocked(sound[0], 0.0), *sound[1:]])
    check_commands(exam)
    assert [(f.check, f.severity, f.demos) for f in exam.findings] == [("command_following", "warning", ("demo_0",))]


@pytest.mark.parametrize(("factor", "checks"), [(1.0, []), (0.8, ["command_scale"]), (1000.0, ["command_scale"])])
def test_an_arm_that_tracks_its_commands_badly_is_no_scale(factor, checks):
    """The deviations of 2 cm lengthen the reached track: a regression on it alone gives a scale below 0.94."""
    found = demo(0, lambda track: track)
    arm = found.arms["right"]
    position = arm.position + 0.02 * np.sin(np.arange(FRAMES)[:, None] * [1.5, 1.6, 1.7])
    commanded = replace(arm.commanded, position=factor * arm.commanded.position)
    exam = examined([reached(found, position=position, commanded=commanded)])
    check_commands(exam)
    assert [finding.check for finding in exam.findings] == checks


def increments(track: ArmTrajectory, unit: float = 1.0) -> ArmTrajectory:
    """Return the steps from each row to the next, in a unit of so many metres, as commands of a controller."""
    turn = Rotation.from_quat(track.quaternion, scalar_first=True)
    steps = turn[1:] * turn[:-1].inv()
    quaternion = np.concatenate([steps.as_quat(scalar_first=True), [[1.0, 0, 0, 0]]])
    position = np.diff(track.position, axis=0, append=track.position[-1:]) / unit
    return replace(track, position=position, quaternion=quaternion)


@pytest.mark.parametrize("unit", [1.0, 0.01, 0.05])
@pytest.mark.parametrize("concerned", [(0, 1, 2), (1,)])
def test_increments_recorded_as_commands_are_no_lag_and_no_rotation(unit: float, concerned: tuple[int, ...]) -> None:
    demos = [
        demo(n, (lambda track: increments(track, unit)) if n in concerned else lambda track: track) for n in range(3)
    ]
    exam = examined(demos)
    check_commands(exam)
    found = [(finding.check, finding.severity, finding.demos) for finding in exam.findings]
    assert found == [("command_increments", "error", tuple(f"demo_{n}" for n in concerned))]


@pytest.mark.parametrize(
    ("order", "signs", "axes"),
    [
        ([1, 0, 2], [1, 1, 1], "y, x, z"),
        ([1, 0, 2], [-1, 1, 1], "y, -x, z"),
        ([0, 2, 1], [1, 1, -1], "x, -z, y"),
        ([0, 1, 2], [1, -1, 1], "x, -y, z"),
    ],
)
@pytest.mark.parametrize("concerned", [(0, 1, 2), (1,)])
def test_exchanged_axes_of_commands_are_named(
    order: list[int], signs: list[int], axes: str, concerned: tuple[int, ...]
) -> None:
    def exchanged(track: ArmTrajectory) -> ArmTrajectory:
        return replace(track, position=track.position[:, order] * signs)

    exam = examined([demo(n, exchanged if n in concerned else lambda track: track) for n in range(3)])
    check_commands(exam)
    assert [(f.check, f.severity, f.demos) for f in exam.findings] == [
        ("command_axes", "error", tuple(f"demo_{n}" for n in concerned))
    ]
    assert f"taken to be {axes}" in exam.findings[0].what


@pytest.mark.parametrize(("concerned", "severity"), [((0, 1, 2), "error"), ((0, 1), "error"), ((2,), "warning")])
def test_commands_of_another_recording_are_an_error_if_most_demos_have_them(
    concerned: tuple[int, ...], severity: str
) -> None:
    def other(track: ArmTrajectory) -> ArmTrajectory:
        along = np.arange(FRAMES) / 6
        position = np.stack([0.3 + 0.1 * np.sin(along), 0.1 * np.cos(2.3 * along), 0.2 + 0.1 * np.sin(3.1 * along)], 1)
        return replace(track, position=position)

    exam = examined([demo(n, other if n in concerned else lambda track: track) for n in range(3)])
    check_commands(exam)
    found = [(finding.check, finding.severity, finding.demos) for finding in exam.findings]
    assert found == [("command_following", severity, tuple(f"demo_{n}" for n in concerned))]


def recording(number: int, commanded: np.ndarray, reached: np.ndarray, fps: float) -> Demo:
    """Return a demo of two tracks [N, 3] whose gripper points down."""
    turn = np.tile(pointing_down(0.0, 0.0), (len(reached), 1, 1))
    quaternion, opening = Rotation.from_matrix(turn).as_quat(scalar_first=True), np.ones(len(reached))
    tracks = (ArmTrajectory(position, quaternion, opening) for position in (reached, commanded))
    arm, command = tracks
    times = (np.arange(len(reached)) * 1e9 / fps).astype(np.int64)
    arms = {"right": replace(arm, commanded=command)}
    return Demo(f"demo_{number}", Path(), "arm", "stir", "stir it", fps, times, arms, {})


@pytest.mark.parametrize(("fps", "turns", "lag"), [(50.0, 1.0, 0.2), (20.0, 1.2, 0.2), (30.0, 1.2, 0.2)])
@pytest.mark.parametrize("line", [False, True])
def test_a_late_arm_that_goes_to_and_fro_or_in_circles_has_no_other_axes(fps, turns, lag, line):
    def place(times: np.ndarray) -> np.ndarray:
        angle = 2 * np.pi * turns * times
        return np.array([0.38, 0, 0.1]) + 0.08 * np.stack(
            [0 * angle if line else np.cos(angle), np.sin(angle), 0 * angle], 1
        )

    times = np.arange(int(6 * fps)) / fps
    exam = examined([recording(n, place(times + n), place(times + n - lag), fps) for n in range(3)])
    check_commands(exam)
    assert {finding.check for finding in exam.findings} <= {"command_lag"}


def test_commands_that_stay_where_they_are_are_no_increments():
    """Their sum moves away from the origin, as a reach outwards does."""
    low = np.array([0.3, 0.0, 0.06])
    reach = low + np.linspace(0, 1, 60)[:, None] * [0.25, 0, 0.03]
    exam = examined([recording(n, np.tile(low, (60, 1)), reach, 10.0) for n in range(3)])
    check_commands(exam)
    assert {finding.check for finding in exam.findings} == {"command_scale"}


def test_commands_below_a_table_on_which_the_arm_stays_are_no_scale():
    """As with an arm that is controlled by impedance: along the table it reaches its commands."""
    along = np.linspace(0, 1, 40)[:, None]
    corners = np.array([[0.35, 0, 0.25], [0.35, 0.05, -0.06], [0.45, -0.1, -0.06], [0.35, 0, 0.25]])
    commanded = np.concatenate([a + along * (b - a) for a, b in pairwise(corners)])
    reached = np.maximum(np.concatenate([commanded[:1], commanded[:1], commanded[:-2]]), [-9, -9, 0.03])
    exam = examined([recording(n, commanded, reached, 20.0) for n in range(3)])
    check_commands(exam)
    assert {(f.check, f.severity) for f in exam.findings} <= {("command_following", "warning")}


def test_an_arm_that_is_slower_than_its_commands_is_a_warning_in_all_demos():
    low = np.array([0.35, 0.0, 0.1])
    corners = low + np.array([[0, 0, 0], [0.2, 0.2, 0.1], [0.1, -0.2, 0], [0.2, 0.1, 0.1], [0, 0, 0]])
    commanded = np.repeat(corners, 30, axis=0)
    reached = commanded.copy()
    for row in range(1, len(reached)):
        step = commanded[row - 1] - reached[row - 1]
        reached[row] = reached[row - 1] + step * min(1.0, 0.005 / max(np.linalg.norm(step), 1e-9))
    exam = examined([recording(n, commanded, reached, 30.0) for n in range(3)])
    check_commands(exam)
    assert [(f.check, f.severity) for f in exam.findings] == [("command_following", "warning")]


def test_one_demo_with_inverted_commands_is_told_from_the_others():
    exam = examined([demo(number, inverted if number == 1 else lambda track: track) for number in range(3)])
    check_commands(exam)
    assert [(finding.check, finding.demos) for finding in exam.findings] == [("command_direction", ("demo_1",))]


def upside_down_commands(track: ArmTrajectory) -> ArmTrajectory:
    """Return commands that are early, displaced and rotated, with inverted openings."""
    turn = (Rotation.from_rotvec([0, 0, 0.4]) * Rotation.from_quat(track.quaternion, scalar_first=True)).as_quat(
        scalar_first=True
    )
    track = early(replace(track, quaternion=turn))
    return replace(track, position=track.position + [0.05, 0, 0], gripper=1 - track.gripper)


NEEDED = {"lag": "delay"}
SAID_OF = {"lag": "command_lag", "places": "command_offset", "turns": "command_rotation"}


@pytest.mark.parametrize("check", LEFT_OUT)
def test_what_is_wrong_of_the_reached_track_is_not_compared_and_the_rest_is(check):
    for severity in ("error", "warning"):
        exam = examined([demo(number, upside_down_commands) for number in range(3)])
        exam.add(check, severity, "measured", "advice", cause="cause", demos=["demo_0", "demo_1"], arm="right")
        exam.add(check, "error", "measured", "advice", cause="cause", demos=["demo_2"], arm="left")
        check_commands(exam)
        found = {finding.check: finding.demos for finding in exam.findings[2:]}
        everywhere = ("demo_0", "demo_1", "demo_2")
        expected = {
            said: ("demo_2",) if severity == "error" and {part, NEEDED.get(part)} & {*LEFT_OUT[check]} else everywhere
            for part, said in SAID_OF.items()
        }
        assert found == {**expected, "command_gripper": everywhere}


def reached(found: Demo, **changed: Any) -> Demo:
    return replace(found, arms={"right": replace(found.arms["right"], **changed)})


def test_a_lag_is_that_of_the_demos_that_a_finding_names(monkeypatch):
    demos = [demo(number, lambda track, n=number: early(track, 2 + 2 * (n == 1))) for number in range(3)]
    monkeypatch.setattr(commands, "_by_joints", lambda *_: {"demo_0": None, "demo_2": None})
    exam = examined(demos)
    check_commands(exam)
    assert [(finding.cause, finding.demos) for finding in exam.findings] == [
        ("commanded track early by 2 frames", ("demo_0", "demo_2")),
        ("commanded track early or reached track late, by 4 frames", ("demo_1",)),
    ]


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2, 3.28])
def test_scaled_reached_positions_are_no_late_commands(factor):
    """If the scales of the tracks differ, the best delay is frames off: openings are compared at the usual delay."""
    sound = [demo(number, lambda track: track) for number in range(3)]
    exam = examined([reached(found, position=factor * found.arms["right"].position) for found in sound])
    names = [found.name for found in sound]
    exam.add("position_scale", "error", "measured", "advice", cause="cause", demos=names, arm="right")
    check_commands(exam)
    assert len(exam.findings) == 1


def inverted_opening(track: ArmTrajectory) -> ArmTrajectory:
    return replace(track, gripper=1 - track.gripper)


def test_openings_say_of_each_demo_which_of_both_tracks_is_inverted():
    sound = [demo(number, lambda track: track) for number in range(3)]
    reached_wrong = [reached(found, gripper=1 - found.arms["right"].gripper) for found in sound]
    told_wrong = [replace(demo(number, inverted_opening), name=f"told_{number}") for number in range(5)]
    exam = examined([*reached_wrong, *told_wrong])
    check_gripper(exam)
    check_commands(exam)
    assert [(finding.cause, finding.demos) for finding in exam.findings] == [
        ("gripper opening inverted (1 for closed)", ("demo_0", "demo_1", "demo_2")),
        ("commanded gripper inverted", tuple(found.name for found in told_wrong)),
        ("commanded or reached gripper inverted", ("demo_0", "demo_1", "demo_2")),
    ]


def test_inverted_commands_of_a_task_that_begins_with_an_object_in_the_gripper_are_named():
    def placing(track: ArmTrajectory) -> ArmTrajectory:
        return replace(track, gripper=1.3 - track.gripper)

    demos = [demo(number, lambda track: inverted_opening(placing(track))) for number in range(3)]
    exam = examined([reached(found, gripper=placing(found.arms["right"]).gripper) for found in demos])
    check_gripper(exam)
    check_commands(exam)
    assert [(finding.check, finding.cause) for finding in exam.findings] == [
        ("gripper_polarity", "gripper opening inverted (1 for closed)"),
        ("command_gripper", "commanded or reached gripper inverted"),
    ]


def outliers_found(position: np.ndarray, seconds: np.ndarray | None = None, hz: float = 10.0) -> tuple[int, ...]:
    """Return the frames that the doctor names, of reached positions [N, 3] at times [N] (None: at the rate)."""
    seconds = np.arange(len(position)) / hz if seconds is None else seconds
    turned = np.tile([0.0, 1.0, 0.0, 0.0], (len(position), 1))
    track = ArmTrajectory(position, turned, np.ones(len(position)))
    times = (seconds * 1e9).astype(np.int64)
    exam = examined([Demo("demo_0", Path(), "arm", "pick", "pick it up", hz, times, {"right": track}, {})])
    check_outlier_poses(exam)
    return exam.findings[0].frames if exam.findings else ()


ABOVE = (0.0, 0.0, 0.8)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({}, ()),
        ({30: ABOVE}, (30,)),
        ({0: (0, 0, 0)}, (0,)),
        ({0: (0, 0, 0), 1: (0, 0, 0)}, (0, 1)),
        ({59: ABOVE}, (59,)),
        ({58: ABOVE, 59: (0, 0, 0)}, (58, 59)),
        ({0: ABOVE, 59: (0, 0, 0)}, (0, 59)),
        ({30: ABOVE, 31: ABOVE}, (30, 31)),
        ({30: (0, 0, 0), 31: ABOVE}, (30, 31)),
        ({1: ABOVE, 2: ABOVE}, (1, 2)),
        ({1: ABOVE}, (1,)),
        ({58: ABOVE}, (58,)),
        ({30: (0, 0, 0), 33: (0, 0, 0)}, (30, 33)),
        ({30: (0, 0, 0), 31: (0, 0, 0), 34: (0, 0, 0), 35: (0, 0, 0)}, (30, 31, 34, 35)),
        ({0: ABOVE, 20: ABOVE, 40: ABOVE, 41: ABOVE}, (0, 20, 40, 41)),
    ],
)
def test_wrong_readings_are_named_also_at_the_ends_and_in_pairs(wrong, found):
    position = at(np.arange(FRAMES, dtype=float), 1).position
    for frame, value in wrong.items():
        position[frame] = value
    assert outliers_found(position) == found


@pytest.mark.parametrize("track", ["reached", "commanded"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda turn: turn * Rotation.from_euler("x", 146, degrees=True), id="tilted"),
        pytest.param(lambda turn: turn * Rotation.from_euler("z", 60, degrees=True), id="turned"),
        pytest.param(lambda turn: Rotation.from_quat(turn.as_quat(scalar_first=True)), id="another order"),
    ],
)
def test_single_wrong_rotations_are_named_where_positions_are_right(track, wrong):
    """The warning about rotations that are far from their codes promises this."""
    frames = np.arange(FRAMES, dtype=float)
    for places in ([], [12, 40]):
        goal = at(frames, 1)
        turned = Rotation.from_quat(goal.quaternion, scalar_first=True)
        quaternion = goal.quaternion.copy()
        for place in places:
            quaternion[place] = wrong(turned[place]).as_quat(scalar_first=True)
        changed = replace(goal, quaternion=quaternion)
        reached, commanded = (changed, goal) if track == "reached" else (goal, changed)
        arms = {"right": replace(reached, commanded=commanded)}
        exam = examined([Demo("demo_0", Path(), "arm", "pick", "", 10.0, (frames * 1e8).astype(np.int64), arms, {})])
        check_outlier_poses(exam)
        assert [(found.cause, found.frames) for found in exam.findings] == [
            (f"outlier {track} pose", tuple(places))
        ] * bool(places)


def test_commands_that_jump_to_their_target_at_once_are_no_wrong_readings():
    frames = np.arange(FRAMES)
    goal = at(frames.astype(float), 1)
    for jumps in (frames > 0, frames == FRAMES - 1, (frames < 30) | (frames > 31)):
        commanded = replace(goal, position=np.where(jumps[:, None], [0.5, 0.3, 0.3], [0.2, -0.2, 0.1]))
        exam = examined([demo(0, lambda track, commanded=commanded: commanded)])
        check_outlier_poses(exam)
        assert exam.findings == []


def moved(distance: np.ndarray) -> np.ndarray:
    """Return positions [N, 3] at a distance along a line, with the tremor of a hand."""
    tremor = np.random.default_rng(0).normal(0, 2e-4, (len(distance), 3))
    return np.array([0.3, -0.2, 0.1]) + distance[:, None] * [0.6, 0.8, 0.0] + tremor


def driven(seconds: np.ndarray, metres: float, m_s2: float) -> np.ndarray:
    """Return the distance [N] of a motion from rest to rest that begins at 0 s and is as fast as the acceleration
    allows."""
    half = np.sqrt(metres / m_s2)
    since = np.clip(seconds, 0, 2 * half)
    return np.where(since < half, m_s2 / 2 * since**2, metres - m_s2 / 2 * (2 * half - since) ** 2)


@pytest.mark.parametrize("hz", [1.0, 5.0, 10.0, 20.0, 30.0, 50.0])
@pytest.mark.parametrize("metres", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("m_s2", [5.0, 25.0])
def test_fast_starts_stops_and_strokes_are_no_wrong_readings(hz, metres, m_s2):
    """The arm is still otherwise. `pose_outliers` may name a stroke of one frame; nothing is added to that."""
    times = (np.arange(60) / hz * 1e9).astype(np.int64)
    turned = np.tile([0.0, 1.0, 0.0, 0.0], (60, 1))
    duration = 2 * np.sqrt(metres / m_s2)
    for before in np.linspace(-1 / hz, duration, 9):  # seconds of the motion before the first frame
        seconds = np.arange(60) / hz + before
        start, abrupt = driven(seconds, metres, m_s2), np.clip(1.5 * seconds, 0, metres)
        stroke = driven(seconds - 9.5 / hz, metres, m_s2) - driven(seconds - 10 / hz - duration, metres, m_s2)
        for distance in (start, start[::-1], abrupt, abrupt[::-1], stroke):
            track = ArmTrajectory(moved(distance), turned, np.ones(60))
            np.testing.assert_array_equal(reached_outliers(track, times, hz), pose_outliers(track))


@pytest.mark.parametrize(("m_s", "found"), [(0.3, (0,)), (1.6, ())])
def test_a_step_is_compared_with_the_speeds_of_its_own_path(m_s, found):
    seconds = np.arange(FRAMES) / 10.0
    position = moved(m_s / 3 * np.sin(3 * seconds))
    position[0, 2] += 0.5
    assert outliers_found(position) == found


def test_a_gap_in_time_is_no_wrong_reading():
    position = at(np.arange(FRAMES, dtype=float), 1).position
    position[0] = ABOVE
    seconds = np.arange(FRAMES) / 10.0
    seconds[1:] += 1.0
    assert outliers_found(position, seconds) == ()
    seconds = np.arange(FRAMES) / 10.0
    seconds[0] += 0.099  # a wrong time stamp does not make a motion faster
    position[0] = position[1] + [0.2, 0.0, 0.0]
    assert outliers_found(position, seconds) == ()


def hung(track: ArmTrajectory, first: int, last: int) -> ArmTrajectory:
    rows = np.arange(FRAMES)
    rows[first : last + 1] = first
    joints = None if track.joints is None else track.joints[rows]
    return ArmTrajectory(track.position[rows], track.quaternion[rows], track.gripper[rows], joints)


def hung_demo(first: int, last: int, told: bool = True, joints: bool = False) -> Demo:
    """Return a demo whose poses are frozen in some frames; its commands and joints, if there are any, are not."""
    found = demo(1, lambda track: track)
    arm = found.arms["right"]
    angles = np.linspace(0, 1, FRAMES)[:, None] * np.ones(6)
    track = replace(
        hung(arm, first, last), commanded=arm.commanded if told else None, joints=angles if joints else None
    )
    return replace(found, arms={"right": track})


@pytest.mark.parametrize(
    ("first", "last", "told", "joints", "why"),
    [
        (10, 29, True, False, "while the commands move by"),
        (10, 29, False, True, "while the joints turn by"),
        (10, 29, False, False, "elsewhere right after"),
        (40, 59, False, True, "while the joints turn by"),
        (20, 23, True, False, None),  # less than half a second
        (50, 59, True, False, None),  # the arm stands still: the reach has ended
        (50, 59, False, False, None),
    ],
)
def test_poses_that_hang_are_named_with_their_frames_and_no_other_fault(first, last, told, joints, why):
    exam = examined([demo(0, lambda track: track), hung_demo(first, last, told, joints), demo(2, lambda track: track)])
    check_times(exam)
    check_frozen_poses(exam)
    exam.measures["arm/right/height_range_m"] = [0.05, 0.2]
    check_jumps(exam)
    check_commands(exam)
    if why is None:
        assert exam.findings == []
        return
    (found,) = exam.findings
    assert (found.check, found.severity, found.demos) == ("frozen_poses", "error", ("demo_1",))
    assert found.cause == f"poses frozen in frames {first} to {last}"
    assert why in found.what
    assert found.frames == tuple(range(first, last + 1))


def paused(number: int, unit: float = 1.0, tremble: float = 0.0, pressed: float = 0.0) -> Demo:
    """Return a demo in which the arm waits for 20 frames, with equal rows. Its commands are in units of `unit` metres,
    oscillate by `tremble` units, and lie `pressed` metres lower during the wait."""
    found = demo(number, lambda track: track)
    arm, index = found.arms["right"], np.concatenate([np.arange(20), np.full(20, 20), np.arange(20, 40)])
    assert arm.commanded is not None
    told = arm.commanded.position[index] / unit + tremble * np.sin(np.arange(FRAMES))[:, None]
    told[22:38, 2] -= pressed / unit
    waits = replace(arm, position=arm.position[index], quaternion=arm.quaternion[index], gripper=arm.gripper[index])
    commanded = replace(arm.commanded, position=told, quaternion=arm.commanded.quaternion[index])
    return replace(found, arms={"right": replace(waits, commanded=commanded)})


@pytest.mark.parametrize(
    ("unit", "tremble", "pressed", "severity"),
    [(1.0, 0.0, 0.0, None), (0.001, 0.1, 0.0, None), (1.0, 0.0, 0.08, "warning")],
    ids=["pause", "commands in millimetres", "held by the table"],
)
def test_a_pause_is_no_hang_and_commands_alone_are_a_warning(unit, tremble, pressed, severity):
    exam = examined([paused(number, unit, tremble, pressed) for number in range(2)])
    check_frozen_poses(exam)
    assert [(f.check, f.severity) for f in exam.findings] == ([("frozen_poses", severity)] if severity else [])


def test_noise_of_images_at_rest_is_no_motion():
    demos = [paused(number) for number in range(3)]
    exam = examined(demos)
    noisy = np.where((np.arange(FRAMES - 1) >= 20) & (np.arange(FRAMES - 1) < 40), 0.009, 0.015)
    demos[:] = [seen_by(found, exam, "over", noisy) for found in demos]
    check_poses_of_moving_images(exam)
    assert exam.findings == []


def test_joints_that_hang_are_named():
    found = demo(1, lambda track: track)
    arm = found.arms["right"]
    angles = np.clip(np.arange(FRAMES) / 45, 0, 1)[:, None] * np.ones(6)
    exam = examined(
        [replace(found, arms={"right": replace(arm, joints=hung(replace(arm, joints=angles), 5, 30).joints)})]
    )
    check_frozen_poses(exam)
    assert [(f.check, f.cause) for f in exam.findings] == [("frozen_joints", "joints frozen in frames 5 to 30")]


MOVING = np.where(np.arange(FRAMES - 1) < 46, 0.05, 0.002)  # share of changed pixels: the arm stands from frame 46


def seen_by(found: Demo, exam: Examination, camera: str, changed: np.ndarray) -> Demo:
    images: Any = np.zeros((FRAMES, 8, 8, 3), dtype=np.uint8)
    track = CameraTrack.without_calibration(8, 8, images, FRAMES, "none needed")
    exam.activity[found.name, camera] = np.arange(FRAMES), changed
    return replace(found, cameras={**found.cameras, camera: track})


@pytest.mark.parametrize(
    ("first", "last", "while_hung", "other_camera", "severity"),
    [
        (0, 59, 0.05, None, "error"),
        (5, 25, 0.05, None, "error"),
        (45, 59, 0.05, None, "warning"),  # someone may walk past while the arm waits
        (5, 25, 0.004, None, None),  # the arm waits
        (5, 25, 0.05, 0.004, None),  # someone walks past one of two cameras
    ],
)
def test_poses_that_hang_while_images_show_the_arm_move_are_named(first, last, while_hung, other_camera, severity):
    demos = [demo(number, lambda track: track) for number in range(3)]
    demos = [replace(d, arms={"right": replace(d.arms["right"], commanded=None)}) for d in demos]
    exam = examined(demos)
    for number in range(3):
        for camera, share in {"over": while_hung, "side": other_camera}.items():
            changed = MOVING.copy()
            if number == 1 and share is not None:
                changed[first:last] = share
            if share is not None:
                demos[number] = seen_by(demos[number], exam, camera, changed)
    demos[1] = reached(demos[1])
    demos[1] = replace(demos[1], arms={"right": hung(demos[1].arms["right"], first, last)})
    check_poses_of_moving_images(exam)
    expected = [] if severity is None else [("frozen_poses", severity, ("demo_1",), f"frames {first} to {last}")]
    assert [
        (f.check, f.severity, f.demos, f.cause[-len(f"frames {first} to {last}") :]) for f in exam.findings
    ] == expected


def test_an_arm_that_waits_for_the_other_one_is_no_fault():
    demos = [two_armed(number) for number in range(2)]
    exam = examined(demos)
    for number, found in enumerate(demos):
        left = replace(hung(found.arms["left"], 0, 59), commanded=None)
        demos[number] = seen_by(replace(found, arms={**found.arms, "left": left}), exam, "over", MOVING)
    check_frozen_poses(exam)
    check_poses_of_moving_images(exam)
    assert exam.findings == []


def openings(*values: float) -> np.ndarray:
    """Return openings with the given values at evenly spaced times, linear in between."""
    return np.interp(np.linspace(0, 1, FRAMES), np.linspace(0, 1, len(values)), values)


def lifted(number: int, opening: np.ndarray) -> Demo:
    """Return a demo in which the arm moves down to the table until mid-demo, and up again."""
    found = demo(number, lambda track: track)
    arm = found.arms["right"]
    height = np.interp(np.arange(FRAMES), [0, 25, 35, 59], [0.3, 0.03, 0.03, 0.3])
    track = replace(arm, position=np.column_stack([arm.position[:, :2], height]), gripper=opening, commanded=None)
    return replace(found, arms={"right": track})


PICK = openings(1, 1, 1, 1, 0, 0, 0, 0)
CLOSED_FIRST = openings(0, 1, 1, 1, 0, 0, 0, 0)
DRAWER = openings(0, 1, 1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("opening", "severity"),
    [(PICK, None), (1 - PICK, "error"), (CLOSED_FIRST, None), (1 - CLOSED_FIRST, None), (DRAWER, "warning")],
    ids=["pick", "inverted", "closed first", "closed first and inverted", "at one height"],
)
def test_an_opening_is_inverted_where_it_opens_for_a_grasp_and_not_where_it_began_closed(opening, severity):
    exam = examined([lifted(number, opening) for number in range(3)])
    check_gripper(exam)
    assert [(f.check, f.severity) for f in exam.findings] == ([("gripper_polarity", severity)] if severity else [])


PLACE = 1 - PICK  # begins with an object in the gripper
PICK_AND_PLACE = openings(1, 1, 1, 0, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("usual", "odd", "count", "severity"),
    [
        (PICK, 1 - PICK, 1, "error"),
        (PICK, 1 - PICK, 2, "error"),
        (PICK_AND_PLACE, 1 - PICK_AND_PLACE, 1, "error"),
        (PICK, CLOSED_FIRST, 1, None),
        (PICK, DRAWER, 1, "warning"),
        (PICK, openings(0, 1, 1, 1, 1, 1, 1, 1), 1, "warning"),  # opens on its way, and never grips
        (CLOSED_FIRST, DRAWER, 1, None),
    ],
    ids=["pick", "two", "pick and place", "closed first", "at one height", "never grips", "task begins closed"],
)
def test_openings_that_begin_unlike_those_of_the_other_demos_of_the_task_are_named(usual, odd, count, severity):
    wrong = range(2, 2 + count)
    exam = examined([lifted(number, odd if number in wrong else usual) for number in range(5)])
    check_gripper(exam)
    names = tuple(f"demo_{number}" for number in wrong)
    expected = [("gripper_polarity", severity, names)] if severity else []
    assert [(f.check, f.severity, f.demos) for f in exam.findings] == expected


def test_openings_are_compared_within_a_task_and_with_two_demos_at_least():
    picks = [lifted(number, PICK) for number in range(4)]
    places = [replace(lifted(number, PLACE), name=f"place_{number}", task="place") for number in range(3)]
    alone = [replace(lifted(0, opening), name=f"alone_{n}", task="alone") for n, opening in enumerate((PICK, PLACE))]
    exam = examined([*picks, *places, *alone])
    check_gripper(exam)
    assert exam.findings == []


def tilted_down(number: int, yaw: float) -> ArmTrajectory:
    """Return a gripper that turns from `yaw` by 0.4 rad while it goes down, tilted by 0.15 rad."""
    found = lifted(number, PICK).arms["right"]
    turns = [pointing_down(float(angle), 0.15) for angle in np.linspace(yaw, yaw + 0.4, FRAMES)]
    return replace(found, quaternion=Rotation.from_matrix(np.stack(turns)).as_quat(scalar_first=True))


@pytest.mark.parametrize("wrong", [(), (2,), (1, 3), (0, 1, 2, 4), (0, 1, 2, 3, 4)])
def test_the_order_of_quaternions_without_joints_is_told_by_the_other_demos(wrong):
    demos = []
    for number in range(5):
        track = tilted_down(number, 0.8 + 0.02 * number)
        if number in wrong:
            track = replace(track, quaternion=np.roll(track.quaternion, -1, axis=1))
        demos.append(replace(lifted(number, PICK), arms={"right": track}))
    exam = examined(demos)
    check_quaternions(exam)
    expected = [("quaternion_order", tuple(f"demo_{number}" for number in wrong))] if wrong else []
    assert [(f.check, f.demos) for f in exam.findings] == expected


def test_no_order_of_quaternions_is_guessed_from_few_frames_or_one_other_demo():
    tracks = [tilted_down(number, 0.8) for number in range(5)]
    tracks[2] = replace(tracks[2], quaternion=np.roll(tracks[2].quaternion, -1, axis=1))
    demos = [replace(lifted(number, PICK), arms={"right": track}) for number, track in enumerate(tracks)]
    short = tracks[2]
    short = ArmTrajectory(short.position[:7], short.quaternion[:7], short.gripper[:7])
    aborted = replace(demos[2], arms={"right": short}, timestamps=demos[2].timestamps[:7])
    for found in ([*demos[:2], aborted, *demos[3:]], [*demos[:2], replace(demos[2], task="other"), *demos[3:]]):
        exam = examined(found)
        check_quaternions(exam)
        assert exam.findings == []


def test_an_opening_that_is_dead_in_some_demos_is_named_by_the_others_of_its_task():
    dead = np.full(FRAMES, 1.0)
    demos = [lifted(number, dead if number == 2 else PICK) for number in range(5)]
    exam = examined([*demos, replace(demos[2], name="pushed", task="push")])
    check_gripper(exam)
    (found,) = exam.findings
    assert (found.check, found.severity, found.demos) == ("gripper_still", "warning", ("demo_2",))
    assert "never changes in 1 of 5 demos" in found.what


def test_an_arm_that_hardly_moves_in_a_demo_is_not_asked_to_grip():
    demos = [lifted(number, PICK) for number in range(5)]
    arm = demos[2].arms["right"]
    idle = replace(arm, position=arm.position[:1] + 1e-3 * arm.position, gripper=np.full(FRAMES, 1.0))
    demos[2] = replace(demos[2], arms={"right": idle})
    exam = examined(demos)
    check_gripper(exam)
    assert exam.findings == []


@pytest.mark.parametrize(
    ("instruction", "colour"),
    [
        ("pick up the red cube", "red"),
        ("put the cube into the red bowl", None),
        ("put the blue cube into the red bowl", "blue"),
        ("place the yellow block next to the red one", "yellow"),
        ("Stack the red cube on the blue cube", "red"),
        ("pick up the red or the blue cube", None),
    ],
)
def test_the_colour_of_an_instruction_is_that_of_the_gripped_thing(instruction, colour):
    assert _colour_of_object(instruction) == colour


@pytest.mark.parametrize(("colours", "severity"), [(("red",), "warning"), (("red", "blue"), "error")])
def test_exchanged_colours_by_words_alone_are_a_warning_unless_several_colours_say_so(monkeypatch, colours, severity):
    demos = [
        replace(demo(n, lambda track: track), instruction=f"pick up the {colours[n % len(colours)]} cube")
        for n in range(4)
    ]
    exam = examined(demos)
    demos[:] = [seen_by(found, exam, "over", MOVING) for found in demos]
    monkeypatch.setattr("keygrip.data.robot.doctor.images._vote", lambda *_: -1)
    streams = {found.name: Stream(np.arange(4), np.full((4, 8, 8, 3), 90, np.uint8)) for found in demos}
    _check_colour_order(exam, "over", streams)
    assert [(f.check, f.severity, len(f.demos)) for f in exam.findings] == [("colour_order", severity, 4)]


def two_armed(number: int) -> Demo:
    """Return a demo of two arms whose bases are 0.9 m apart."""
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


def test_a_jump_of_a_gripper_high_above_the_origin_is_named():
    """With the origin on the floor, heights are large though their range is that of an arm."""
    found = demo(0, lambda track: track)
    place = found.arms["right"].position + [0, 0, 1.4]
    place[30:] += [0, 0.6, 0]
    exam = examined([reached(found, position=place)])
    check_heights(exam)
    assert exam.measures["arm/right/height_range_m"][1] > 1.5
    check_jumps(exam)
    assert [(finding.check, finding.frames) for finding in exam.findings] == [("jump", (29,))]


def test_corrections_keep_what_the_controller_was_told():
    sound = demo(0, lambda track: track)
    arm = replace(sound.arms["right"], controller=np.arange(FRAMES * 2.0).reshape(FRAMES, 2))
    images: Any = np.zeros((FRAMES, 8, 8, 3), dtype=np.uint8)
    cameras = {"over": CameraTrack.without_calibration(8, 8, images, FRAMES, "none needed")}
    late = {"over": Correction(np.eye(4), 1.0, 3)}
    found = corrected(replace(sound, arms={"right": arm}, cameras=cameras), late, Path("c.yaml"))
    assert np.array_equal(found.arms["right"].controller, arm.controller[:-3])
