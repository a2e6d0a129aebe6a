"""Checks that use only the recorded poses and time stamps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.doctor.examination import MOVED_M, Examination
from keygrip.data.robot.doctor.frozen_poses import demos_with_frozen_poses
from keygrip.data.robot.doctor.kinematics import demos_shown_by_joints
from keygrip.data.robot.frame_rates import GAP, longest_gap, measured_rate, rates_differ
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.data.spacing import evenly
from keygrip.robots.kinematics import matrix_from_quaternion

LARGEST_BIN_MM = 20.0  # larger height bins cannot distinguish a grasp from a miss
SMALLEST_RANGE_M = 0.02  # range of heights; with less, the height bins carry no information
LARGEST_RANGE_M = 1.5  # range of heights that an arm on a table does not reach
OUTLIER_RATIO = 1.5  # full height range divided by the range without 2 % of the frames
RATE_TOLERANCE = 0.1  # relative tolerance of the rate ratio by which the unit of time stamps is recognised
JUMP_SPEED_M_S = 5.0  # speed that no arm reaches
ORDER_MARGIN = 0.5  # least gain by another order in the mean cosine between the approach and straight down
# Angles (degrees) between rotations of a demo and those of the other demos of its task: from FAR_DEG on they are other
# rotations (OTHER_APPROACH_DEG: other directions of the approach), and up to NEAR_DEG the same ones.
FAR_DEG, OTHER_APPROACH_DEG, NEAR_DEG = 60.0, 20.0, 10.0
LEAST_OTHERS, LEAST_FRAMES = 2, 8  # least number of other demos, and of frames, for a decision about one demo


def check_heights(exam: Examination) -> None:
    """Check the range of heights (too small, too large, or stretched by a few frames) and the size of a height bin."""
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        heights = np.concatenate([demo.arms[arm].position[:, 2] for demo in demos])
        low, high = float(heights.min()), float(heights.max())
        bulk_low, bulk_high = (float(value) for value in np.quantile(heights, [0.01, 0.99]))
        bin_mm = (high - low) / exam.height_bins * 1e3
        exam.measures[f"arm/{arm}/height_range_m"] = [low, high]
        exam.measures[f"arm/{arm}/height_bin_mm"] = bin_mm
        names = [demo.name for demo in demos]
        if high - low > LARGEST_RANGE_M:
            exam.add(
                "height_range",
                "error",
                f"the gripper's height runs from {low:.3g} to {high:.3g}, which no arm on a table reaches in metres",
                "Convert positions to metres (millimetres are likely), or fix the world frame: z must point up",
                cause="positions in another unit, or another axis as z",
                demos=names,
                arm=arm,
            )
        elif high - low < SMALLEST_RANGE_M:
            exam.add(
                "height_range",
                "warning",
                f"the gripper's height changes by only {(high - low) * 1e3:.1f} mm",
                "Check that z is the vertical axis of the world and that the positions move at all",
                cause="another axis as z, or a track that stands still",
                demos=names,
                arm=arm,
            )
        elif high - low > OUTLIER_RATIO * (bulk_high - bulk_low):
            margin = 0.25 * (bulk_high - bulk_low)
            stray = {
                demo.name: np.flatnonzero((height < bulk_low - margin) | (height > bulk_high + margin)).tolist()
                for demo in demos
                for height in [demo.arms[arm].position[:, 2]]
            }
            stray = {name: frames for name, frames in stray.items() if frames}
            exam.add(
                "height_outlier",
                "warning",
                f"98 % of the heights lie between {bulk_low:.3f} and {bulk_high:.3f} m, but the bins must reach from "
                f"{low:.3f} to {high:.3f} m",
                "Leave these demos out or cut the stray frames: they make every height bin coarser",
                cause="stray heights",
                demos=stray,
                arm=arm,
                frames=next(iter(stray.values()), []),
            )
        elif bin_mm > LARGEST_BIN_MM:
            exam.add(
                "height_bin",
                "warning",
                f"one of {exam.height_bins} height bins is worth {bin_mm:.0f} mm",
                "Use more height bins, or leave out demos that go needlessly high",
                cause="few bins for this range of heights",
                demos=names,
                arm=arm,
            )


def check_jumps(exam: Examination) -> None:
    """Report speeds between neighbouring frames that no arm reaches."""
    for arm in exam.arms:
        jumping: dict[str, tuple[float, int]] = {}  # by demo: m/s, and the frame from which it jumps
        fastest = 0.0
        for demo in exam.with_arm(arm):
            seconds = np.maximum(np.diff(demo.timestamps) * 1e-9, 1e-6)
            # an arm may move far during a gap: only neighbouring frames count
            adjacent = seconds <= GAP * np.median(seconds)
            distances = np.linalg.norm(np.diff(demo.arms[arm].position, axis=0), axis=1)
            speeds = np.where(adjacent, distances / seconds, 0.0)
            frame = int(speeds.argmax())
            speed = float(speeds[frame])
            fastest = max(fastest, speed)
            if demo.name in demos_with_frozen_poses(exam, arm, ["poses"]):
                continue  # after a frozen span, the pose jumps to the arm's current place
            if speed > JUMP_SPEED_M_S and distances[adjacent].max() > MOVED_M:
                jumping[demo.name] = speed, frame
        exam.measures[f"arm/{arm}/fastest_m_s"] = fastest
        low, high = exam.measures[f"arm/{arm}/height_range_m"]
        if jumping and not exam.found("time_unit") and high - low <= LARGEST_RANGE_M:
            name, (speed, frame) = max(jumping.items(), key=lambda entry: entry[1])
            exam.add(
                "jump",
                "warning",
                f"the gripper jumps between neighbouring frames, at up to {speed:.1f} m/s in {name} after frame "
                f"{frame}",
                "Check for dropped frames and for positions in another frame or unit part of the time",
                cause="dropped frames, or another frame or unit for a while",
                demos=[name, *(other for other in jumping if other != name)],
                arm=arm,
                frames=[frame],
            )


def check_quaternions(exam: Examination) -> None:
    """Report sign flips of the quaternions, and quaternions in another order than wxyz."""
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        flips: dict[str, list[int]] = {}
        for demo in demos:
            quaternion = demo.arms[arm].quaternion
            frames = np.flatnonzero((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0) + 1
            if len(frames):
                flips[demo.name] = frames.tolist()
        count = sum(len(frames) for frames in flips.values())
        exam.measures[f"arm/{arm}/quaternion_sign_flips"] = count
        if flips:
            exam.add(
                "quaternion_flip",
                "warning",
                f"the quaternion changes its sign from one frame to the next {count} times",
                "Give each quaternion the sign that is nearer to the one before: q and -q are one rotation, but "
                "interpolation and averages treat them as different ones",
                cause="quaternions of either sign, as they come out of a conversion",
                demos=flips,
                arm=arm,
                frames=next(iter(flips.values())),
            )
        exam.measures[f"arm/{arm}/approach_down"], exam.measures[f"arm/{arm}/turning_about_vertical"] = _attitude(
            [demo.arms[arm] for demo in demos], lambda quaternion: quaternion
        )
        _check_order(exam, arm, demos)


def _check_order(exam: Examination, arm: str, demos: list[Demo]) -> None:
    """Report quaternions in another order than wxyz where no joints show the order: in single demos that have the
    rotations of the other demos of their task only in that order, or by the attitude of the gripper in all demos."""
    confirmed = demos_shown_by_joints(exam, arm)
    unconfirmed = [demo for demo in demos if demo.name not in confirmed]
    if not unconfirmed:
        return
    misread = exam.named("quaternion_order", "pose_direction", arm=arm)
    reference = [demo for demo in demos if demo.name not in misread]
    odd = [demo for demo in unconfirmed if _is_in_other_order(demo, reference, arm)]
    named = odd or [demo for demo in unconfirmed if not _are_others_in_other_order(demo, unconfirmed, arm)]
    if not named:
        return
    stated, rolled = _attitudes(named, arm)
    upside = rolled[0] - stated[0] > ORDER_MARGIN and stated[0] < 0.5 < rolled[0]
    tilting = rolled[0] > 0.7 and rolled[1] - stated[1] > ORDER_MARGIN and stated[1] < 0.3
    if upside or tilting or odd:
        exam.add(
            "quaternion_order",
            "error" if upside else "warning",
            f"as the file is read, the gripper points down by {stated[0]:.2f} when it is low (1 is straight down) "
            f"and {stated[1]:.0%} of its turning is about the vertical; were its quaternions x, y, z, w, by "
            f"{rolled[0]:.2f} and {rolled[1]:.0%}, as {'in the other demos' if odd else 'on a table'}",
            "Store quaternions as w, x, y, z; the axes on the contact sheet show which reading is right",
            cause="quaternions stored x, y, z, w",
            demos=[demo.name for demo in named],
            arm=arm,
        )


def _is_in_other_order(demo: Demo, demos: list[Demo], arm: str) -> bool:
    """Return whether a demo has rotations of the other demos of its task only if its quaternions are x, y, z, w.

    The approach must differ, too: a gripper that was turned by 180 degrees about it grips in the same way, and points
    down in either order.
    """
    others = _others_of_task(demo, demos, arm)
    if len(others) < LEAST_OTHERS or len(demo) < LEAST_FRAMES:
        return False
    own = _some_quaternions(demo.arms[arm])
    if _distance_to_others(own, others) < FAR_DEG or _distance_to_others(_from_xyzw(own), others) > NEAR_DEG:
        return False
    approach = matrix_from_quaternion(own)[:, :, 2]
    cosines = [(approach @ matrix_from_quaternion(other)[:, :, 2].T).max(axis=1) for other in others]
    angles = [np.degrees(np.arccos(np.clip(np.median(nearest), -1, 1))) for nearest in cosines]
    return float(np.median(angles)) > OTHER_APPROACH_DEG


def _are_others_in_other_order(demo: Demo, demos: list[Demo], arm: str) -> bool:
    """Return whether the other demos of a demo's task have its rotations only if their quaternions are x, y, z, w."""
    others = _others_of_task(demo, demos, arm)
    if len(others) < LEAST_OTHERS or len(demo) < LEAST_FRAMES:
        return False
    own = _some_quaternions(demo.arms[arm])
    return (
        _distance_to_others(own, others) >= FAR_DEG
        and _distance_to_others(own, [_from_xyzw(other) for other in others]) <= NEAR_DEG
    )


def _others_of_task(demo: Demo, demos: list[Demo], arm: str) -> list[np.ndarray]:
    return [
        _some_quaternions(other.arms[arm])
        for other in demos
        if other.task == demo.task and other.name != demo.name and len(other) >= LEAST_FRAMES
    ]


def _some_quaternions(track: ArmTrajectory) -> np.ndarray:
    return track.quaternion[evenly(len(track), 40)]


def _from_xyzw(quaternions: np.ndarray) -> np.ndarray:
    return np.roll(quaternions, 1, axis=1)


def _distance_to_others(quaternions: np.ndarray, others: list[np.ndarray]) -> float:
    """Return the angle (degrees) of rotations [N, 4] to those of other demos: of the tenth of the frames that is
    nearest, because demos of a task often have only the start in common, and in the median of the other demos."""
    cosines = [np.abs(quaternions @ other.T).max(axis=1) for other in others]
    return float(np.median([np.degrees(2 * np.arccos(np.clip(np.quantile(near, 0.9), 0, 1))) for near in cosines]))


def _attitudes(demos: list[Demo], arm: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the attitude in demos as the file is read, and if their quaternions are x, y, z, w; see `_attitude`."""
    tracks = [demo.arms[arm] for demo in demos]
    return _attitude(tracks, lambda quaternion: quaternion), _attitude(tracks, _from_xyzw)


def _attitude(trajectories: list[ArmTrajectory], reading: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Return two values for an interpretation of the quaternions: the mean cosine between the approach (tool z) and
    straight down in the lowest quarter of each demo, and the share of all rotation that is about the world's vertical
    (0.5 if nothing rotates)."""
    cosines: list[np.ndarray] = []
    rotation_sums = np.zeros(3)
    for trajectory in trajectories:
        height = trajectory.position[:, 2]
        rotations = matrix_from_quaternion(reading(trajectory.quaternion))
        cosines.append(-rotations[height <= np.quantile(height, 0.25), 2, 2])
        rotation_vectors = Rotation.from_matrix(rotations[1:] @ rotations[:-1].transpose(0, 2, 1)).as_rotvec()
        rotation_sums += np.abs(rotation_vectors).sum(axis=0)
    total = float((rotation_sums**2).sum())
    return float(np.concatenate(cosines).mean()), float(rotation_sums[2] ** 2 / total) if total > 1e-4 else 0.5


def check_times(exam: Examination) -> None:
    """Report gaps in the time stamps, and rates that differ from the stated rate."""
    gaps = {demo.name: gap for demo in exam.demos if (gap := longest_gap(demo))}
    nominal = {demo.name: demo.fps for demo in exam.demos}
    rates = {demo.name: measured_rate(demo) for demo in exam.demos}
    rates = {name: rate for name, rate in rates.items() if rates_differ(rate, nominal[name])}
    exam.measures["demos_with_gaps"] = len(gaps)
    units = {name: unit for name, rate in rates.items() if (unit := _clock_unit(rate / nominal[name])) is not None}
    if units:
        exam.add(
            "time_unit",
            "error",
            f"time stamps of {rates[next(iter(units))]:.4g} frames per second where {nominal[next(iter(units))]:g} "
            f"are stated: they count {next(iter(units.values()))}",
            "Store time stamps in nanoseconds",
            cause=f"time stamps in {next(iter(units.values()))}",
            demos=units,
        )
        rates = {name: rate for name, rate in rates.items() if name not in units}
    if gaps:
        longest = max(gaps, key=lambda name: gaps[name])
        frame = next(int(np.diff(demo.timestamps).argmax()) for demo in exam.demos if demo.name == longest)
        exam.add(
            "time_gap",
            "warning",
            f"time stamps jump: the longest gap is {gaps[longest]:.2f} s, in {longest} after frame {frame}",
            "Frames were dropped there: the policy would learn to move too fast. Leave the demos out or record them "
            "again",
            cause="dropped frames",
            demos=[longest, *(name for name in gaps if name != longest)],
            frames=[frame],
        )
    if rates:
        name, rate = next(iter(rates.items()))
        exam.add(
            "frame_rate",
            "error",
            f"the time stamps say {rate:.1f} frames per second, the file of {name} states {nominal[name]:g}",
            "Correct fps in the metadata, or the time stamps: control runs at the stated rate, and training leaves "
            "demos of another one out",
            cause=f"stated frame rate {nominal[name]:g} in place of {rate:.1f}, or wrong time stamps",
            demos=rates,
        )


def _clock_unit(ratio: float) -> str | None:
    """Return the unit of time stamps whose rate, read as nanoseconds, is `ratio` times the stated rate."""
    units = {1e3: "microseconds", 1e6: "milliseconds", 1e9: "seconds"}
    return next((name for size, name in units.items() if abs(ratio / size - 1) < RATE_TOLERANCE), None)
