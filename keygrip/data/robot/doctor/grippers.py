"""Checks of the gripper's opening: an opening that does not change, and one that is inverted."""

from __future__ import annotations

from collections import Counter

import numpy as np

from keygrip.data.robot.doctor.examination import Examination, Severity
from keygrip.data.robot.doctor.frozen_poses import demos_with_frozen_poses
from keygrip.data.robot.schema import ArmTrajectory, Demo

STILL, MOVED, STROKE = 0.05, 0.3, 0.3  # change below which an opening stands still, and from which it opens or closes
LEAST_OTHERS = 2  # least number of demos that show how the opening usually moves in a task
USUAL_SHARE = 2 / 3  # share of a task's demos in which the opening must change, so that the other demos are odd
USUAL_WAY = 0.5  # share of the motion in the other demos: an arm that moves less may have nothing to grip
LOWER = 0.25  # share of the height range by which a grasp is below the place where the gripper opened before


def check_gripper(exam: Examination) -> None:
    """Report grippers that hardly move between open and closed, and openings that are inverted."""
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        ranges = {demo.name: float(np.ptp(demo.arms[arm].gripper)) for demo in demos}
        exam.measures[f"arm/{arm}/gripper_range"] = max(ranges.values())
        if max(ranges.values()) < STILL:
            _check_still(exam, arm, demos, max(ranges.values()))
            continue
        _check_dead(exam, arm, demos, ranges)
        _check_polarity(exam, arm, demos)


def _check_still(exam: Examination, arm: str, demos: list[Demo], largest_range: float) -> None:
    """Report openings that change in no demo."""
    means = [float(demo.arms[arm].gripper.mean()) for demo in demos]
    if max(min(mean, 1 - mean) for mean in means) < 0.02:
        return  # open or closed throughout: a task without grasping
    if max(float(demo.arms[arm].gripper.max()) for demo in demos) < 0.15:
        return  # see check_opening_unit
    exam.add(
        "gripper_still",
        "warning",
        f"the gripper's opening never changes by more than {largest_range:.2f}",
        "Fine for a task without grasping; else check which signal is recorded as the opening",
        cause="another signal recorded as the opening, or a task without grasping",
        demos=[demo.name for demo in demos],
        arm=arm,
    )


def _check_dead(exam: Examination, arm: str, demos: list[Demo], ranges: dict[str, float]) -> None:
    """Report openings that never change in some demos, but do change in most demos of the same task. Demos in which the
    arm hardly moves are not reported: there may be nothing to grip."""
    frozen_demos = demos_with_frozen_poses(exam, arm, ["poses"])
    dead: list[str] = []
    total = 0
    for task in {demo.task for demo in demos}:
        group = [demo for demo in demos if demo.task == task and demo.name not in frozen_demos]
        moving_demos = [demo for demo in group if ranges[demo.name] > MOVED]
        still_demos = [demo for demo in group if ranges[demo.name] < STILL]
        if len(moving_demos) < LEAST_OTHERS or len(moving_demos) < USUAL_SHARE * len(group):
            continue
        usual_distance = float(np.median([_motion_extent(demo, arm) for demo in moving_demos]))
        still_demos = [demo for demo in still_demos if _motion_extent(demo, arm) > USUAL_WAY * usual_distance]
        dead += [demo.name for demo in still_demos]
        total += len(group) if still_demos else 0
    if dead:
        exam.add(
            "gripper_still",
            "warning",
            f"the gripper's opening never changes in {len(dead)} of {total} demos of a task in which it usually does",
            "Check the gripper's signal and look whether it grips in the images; leave these demos out",
            cause="a gripper whose signal is dead in these demos, or that never gripped",
            demos=dead,
            arm=arm,
        )


def _motion_extent(demo: Demo, arm: str) -> float:
    return float(np.linalg.norm(np.ptp(demo.arms[arm].position, axis=0)))


def _check_polarity(exam: Examination, arm: str, demos: list[Demo]) -> None:
    """Report inverted openings: a grasp begins with closing the gripper. If most demos begin with opening, they are
    reported together, else each demo that does not begin as most demos of its task do."""
    first_changes = {demo.name: grasp_start(demo.arms[arm]) for demo in demos}
    opening_demos = [name for name, change in first_changes.items() if change > 0]
    opening, closing = len(opening_demos), sum(change < 0 for change in first_changes.values())
    exam.measures[f"arm/{arm}/starts_by_closing"] = closing
    exam.measures[f"arm/{arm}/starts_by_opening"] = opening
    if opening <= closing:
        _check_odd_polarity(exam, arm, demos, first_changes)
        return
    closing_again = sum(later_closing(demo.arms[arm]) is not None for demo in demos if demo.name in set(opening_demos))
    # a gripper that only opens may place an object; one that closes later may begin closed
    certain = closing_again < opening / 2
    exam.add(
        "gripper_polarity",
        "error" if certain else "warning",
        f"in {opening} of {opening + closing} demos the gripper first opens, as the file is read, "
        + ("" if certain else "and closes later, at no lower place; ")
        + "a grasp begins with closing",
        "Store 0 for closed and 1 for open (the other way round is likely); ignore this for tasks that begin "
        + ("with an object in the gripper" if certain else "with a closed gripper: images must show which it is"),
        cause="gripper opening inverted (1 for closed)",
        demos=opening_demos,
        arm=arm,
    )


def _check_odd_polarity(exam: Examination, arm: str, demos: list[Demo], first_changes: dict[str, int]) -> None:
    """Report demos whose gripper first opens while it first closes in most demos of the same task.

    They are an error if all changes are the reverse of the usual ones, and the first one is at a similar height: a
    gripper that began closed opens on its way. Otherwise the finding is a warning.
    """
    certain: list[str] = []
    uncertain: list[str] = []
    total = 0
    for task in dict.fromkeys(demo.task for demo in demos):
        closing = [demo.arms[arm] for demo in demos if demo.task == task and first_changes[demo.name] < 0]
        opening = [demo for demo in demos if demo.task == task and first_changes[demo.name] > 0]
        if not opening or len(closing) < LEAST_OTHERS or len(closing) <= len(opening):
            continue
        total += len(closing) + len(opening)
        usual_changes = Counter(_changes(track.gripper) for track in closing).most_common(1)[0][0]
        usual_height = float(np.median([_height_of_first_change(track) for track in closing]))
        for demo in opening:
            track = demo.arms[arm]
            changes = _changes(track.gripper)
            if changes == usual_changes:
                continue  # most demos of the task begin with a closed gripper, too
            is_reversed = tuple(-change for change in changes) == usual_changes
            same_height = abs(_height_of_first_change(track) - usual_height) < LOWER
            (certain if is_reversed and same_height else uncertain).append(demo.name)
    reports: tuple[tuple[list[str], Severity, str, str], ...] = (
        (certain, "error", ", and later changes are reversed, too", "with an object in the gripper"),
        (uncertain, "warning", "", "with a closed gripper: images must show which it is"),
    )
    for names, severity, how, exception in reports:
        if names:
            exam.add(
                "gripper_polarity",
                severity,
                f"in {len(names)} of {total} demos the gripper first opens, as the file is read, where in most demos "
                f"of the task it first closes{how}",
                "Store 0 for closed and 1 for open (the other way round is likely in these demos); ignore this if "
                f"they begin {exception}",
                cause="gripper opening inverted (1 for closed)",
                demos=names,
                arm=arm,
            )


def _changes(opening: np.ndarray) -> tuple[int, ...]:
    """Return the directions of all changes by more than 0.3 of the stroke, in turn: -1 closing, 1 opening."""
    found: list[int] = []
    low = high = float(opening[0])
    for value in opening.tolist():
        low, high = min(low, value), max(high, value)
        if value - low > STROKE and found[-1:] != [1]:
            found.append(1)
            high = value
        elif high - value > STROKE and found[-1:] != [-1]:
            found.append(-1)
            low = value
    return tuple(found)


def _height_of_first_change(track: ArmTrajectory) -> float:
    """Return the height at which the opening first changes, from 0 (the lowest of the demo) to 1."""
    height = track.position[:, 2]
    _, frame = first_change(track.gripper)
    return float((height[frame] - height.min()) / max(float(np.ptp(height)), 1e-6))


def first_change(opening: np.ndarray) -> tuple[int, int]:
    """Return direction and frame of the first change by more than 0.3 of the stroke: -1 closing, 1 opening, 0 none."""
    change = opening - opening[0]
    large = np.flatnonzero(np.abs(change) > STROKE)
    return (0, 0) if len(large) == 0 else (int(np.sign(change[large[0]])), int(large[0]))


def later_closing(track: ArmTrajectory) -> int | None:
    """Return the frame in which a gripper that opened first closes later; None: it does not."""
    _, opened = first_change(track.gripper)
    later = track.gripper[opened:]
    closed = np.flatnonzero(np.maximum.accumulate(later) - later > STROKE)
    return int(opened + closed[0]) if len(closed) else None


def grasp_start(track: ArmTrajectory) -> int:
    """Return whether a grasp begins with closing (-1), as it should, with opening (1), or with neither (0).

    On some rigs the gripper begins closed: it opens on its way and closes at a lower place, at the object. With an
    inverted opening both are reversed: it opens at the object, and closes where the object is put down.
    """
    change, opened = first_change(track.gripper)
    closed = later_closing(track) if change > 0 else None
    if closed is None:
        return change
    height = track.position[:, 2]
    return -1 if height[opened] - height[closed] > LOWER * np.ptp(height) else change
