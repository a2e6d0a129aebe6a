"""Poses or joints that do not change at all while other data show that the arm moves: a logger that hung.

Pauses are not faults. The rows of a resting arm are often exactly equal, too, so equal rows alone are no evidence:
commands, joints, images or a jump at the end must show that the arm moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keygrip.data.robot.doctor.examination import Examination, Severity
from keygrip.data.robot.doctor.tracks import are_degrees
from keygrip.data.robot.frame_rates import GAP
from keygrip.data.robot.schema import ArmTrajectory, Demo

LEAST_FRAMES, LEAST_S = 5, 0.5  # shortest span: both apply
TOLD_M, TURNED_RAD, WENT_M = 0.03, 0.15, 0.03  # motion of commands, joints and poses that shows that the arm moved
ANSWER_S = 0.3  # the arm may not have followed the last commands of a span yet
LEAST_SHARE = 0.1  # of the motion in the whole demo: with positions in millimetres, noise exceeds the above limits
JUMP_M, JUMP_RATIO = 0.02, 3.0  # step at the end of a span, and its ratio to the demo's largest usual steps
MOVING_M = 0.003  # motion between two frames that are read, from which the arm counts as moving
# Share of changing pixels from frame to frame: relative to the usual one while arms move, and absolute if that is not
# known. In clean recordings it is 0.03 to 0.09 while the arm moves and 0.01 at most while it rests.
ACTIVE, ACTIVE_SHARE, LEAST_REFERENCE = 0.4, 0.02, 0.002
RESTING, CLEAR = 0.1, 1.5  # quantile of the shares that gives the noise at rest; factor by which motion must exceed it

Span = tuple[int, int]  # first and last frame


def constant_spans(rows: np.ndarray, least: int) -> list[Span]:
    """Return spans of `least` frames or more in which rows [N, D] are exactly equal."""
    equal = (np.diff(rows, axis=0) == 0).all(axis=1)
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    pairs = bounds.reshape(-1, 2).tolist()
    return [(first, last) for first, last in pairs if last - first + 1 >= least]


def shortest_span(demo: Demo) -> int:
    """Return the number of frames of the shortest span that is examined."""
    return max(LEAST_FRAMES, int(np.ceil(LEAST_S * demo.fps)))


def check_frozen_poses(exam: Examination) -> None:
    """Report poses that do not change while commands or joints move or before a jump, and joints that do not change
    while poses move.

    Commands alone give a warning, because something may block the arm. So do frozen joints, because the base may move.
    """
    for arm in exam.arms:
        poses: dict[Severity, dict[str, tuple[Span, str]]] = {"error": {}, "warning": {}}
        joints: dict[str, tuple[Span, str]] = {}
        for demo in exam.with_arm(arm):
            track, least = demo.arms[arm], shortest_span(demo)
            for span in constant_spans(np.hstack([track.position, track.quaternion]), least):
                if found := _find_motion_evidence(demo, track, span):
                    severity, reason = found
                    poses[severity][demo.name] = span, reason
                    break
            for first, last in [] if track.joints is None else constant_spans(track.joints, least):
                distance = _motion_extent(track.position[first : last + 1])
                if demo.name not in joints and distance > max(WENT_M, LEAST_SHARE * _motion_extent(track.position)):
                    joints[demo.name] = (first, last), f"while the gripper's position moves by {distance * 100:.0f} cm"
        for severity, demos in poses.items():
            _report(exam, "poses", arm, demos, severity)
        _report(exam, "joints", arm, joints, "warning")


def _find_motion_evidence(demo: Demo, track: ArmTrajectory, span: Span) -> tuple[Severity, str] | None:
    """Return severity and text of the evidence that an arm moved while its poses did not change; None: no evidence."""
    first, last = span
    step = _step_after(demo, track, last)
    if track.commanded is not None:
        commands = track.commanded.position[first : max(first, last - int(np.ceil(ANSWER_S * demo.fps))) + 1]
        if (distance := _motion_extent(commands)) > max(TOLD_M, LEAST_SHARE * _motion_extent(track.commanded.position)):
            return "error" if step else "warning", f"while the commands move by {distance * 100:.0f} cm"
    if track.joints is not None and not are_degrees(track):
        joint_motion = float(np.ptp(track.joints[first : last + 1], axis=0).max())
        if joint_motion > TURNED_RAD:
            return "error", f"while the joints turn by {np.degrees(joint_motion):.0f} degrees"
    return ("error", f"and the arm is {step * 100:.0f} cm elsewhere right after") if step else None


def _step_after(demo: Demo, track: ArmTrajectory, last_frame: int) -> float:
    """Return the step (m) after a span that ends with frame `last_frame`; 0: it is not larger than others, or
    time jumps."""
    seconds = np.diff(demo.timestamps)
    if last_frame + 1 >= len(demo) or seconds[last_frame] > GAP * np.median(seconds):
        return 0.0
    steps = np.linalg.norm(np.diff(track.position, axis=0), axis=1)
    other_steps = np.delete(steps, last_frame)
    usual_step = float(np.quantile(other_steps[other_steps > 0], 0.95)) if (other_steps > 0).any() else 0.0
    return float(steps[last_frame]) if steps[last_frame] > max(JUMP_M, JUMP_RATIO * usual_step) else 0.0


def _motion_extent(positions: np.ndarray) -> float:
    return float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 0.0


def check_poses_of_moving_images(exam: Examination) -> None:
    """Report poses and openings of all arms that do not change while the images change as when an arm moves.

    Each camera whose images change when an arm moves must show it. Someone may walk by while an arm waits at the
    beginning or the end: there it is a warning, unless the span is more than half of the demo.
    """
    reported = exam.named("frozen_poses")
    usual_activity = {camera: _usual_activity(exam, camera) for camera in exam.cameras}
    frozen_spans: dict[Severity, dict[str, tuple[Span, str]]] = {"error": {}, "warning": {}}
    for demo in exam.demos:
        if demo.name in reported or not demo.arms:
            continue
        columns = [
            part
            for track in demo.arms.values()
            for part in (track.position, track.quaternion, np.reshape(track.gripper, (-1, 1)))
        ]
        for span in constant_spans(np.hstack(columns), shortest_span(demo)):
            if not _images_show_motion(exam, demo, span, usual_activity):
                continue
            inside = span[0] > 0 and span[1] < len(demo) - 1
            severity: Severity = "error" if inside or span[1] - span[0] + 1 > len(demo) / 2 else "warning"
            frozen_spans[severity][demo.name] = span, "while the images change as when the arm moves"
            break
    for severity, demos in frozen_spans.items():
        _report(exam, "poses", "", demos, severity)


def _usual_activity(exam: Examination, camera: str) -> tuple[float, float] | None:
    """Return shares of pixels that change from frame to frame, over all demos: at rest, and the median while an arm
    moves; None: no arm moves in enough frames."""
    moving_shares: list[float] = []
    all_shares: list[float] = []
    for demo in exam.with_camera(camera):
        index, changed = exam.activity[demo.name, camera]
        all_shares += changed.tolist()
        step_lengths = [np.linalg.norm(np.diff(track.position[index], axis=0), axis=1) for track in demo.arms.values()]
        if step_lengths:
            moving_shares += changed[np.max(step_lengths, axis=0) > MOVING_M].tolist()
    return (
        (float(np.quantile(all_shares, RESTING)), float(np.median(moving_shares)))
        if len(moving_shares) >= LEAST_FRAMES
        else None
    )


def _images_show_motion(
    exam: Examination, demo: Demo, span: Span, usual_activity: dict[str, tuple[float, float] | None]
) -> bool:
    """Return whether all cameras whose images show arm motion show motion in a span."""
    motion_by_camera: list[bool] = []
    for camera in demo.cameras:
        index, changed = exam.activity[demo.name, camera]
        in_span = (index[:-1] >= span[0]) & (index[1:] <= span[1])
        resting_share, moving_share = usual_activity[camera] or (0.0, ACTIVE_SHARE / ACTIVE)
        if not in_span.any() or moving_share < max(LEAST_REFERENCE, CLEAR * resting_share):
            continue
        motion_by_camera.append(
            float(changed[in_span].mean()) > resting_share + ACTIVE * (moving_share - resting_share)
        )
    return bool(motion_by_camera) and all(motion_by_camera)


def _report(
    exam: Examination, kind: str, arm: str, spans_by_demo: dict[str, tuple[Span, str]], severity: Severity = "error"
) -> None:
    if not spans_by_demo:
        return
    name, ((first, last), reason) = next(iter(spans_by_demo.items()))
    exam.add(
        f"frozen_{kind}",
        severity,
        f"recorded {kind} stand exactly still at frames {first} to {last} of {name}, {reason}",
        f"The recorder's {kind} hung: cut the demos there or leave them out, and look for what held the recorder up",
        cause=f"{kind} frozen in frames {first} to {last}",
        demos=spans_by_demo,
        arm=arm,
        frames=range(first, last + 1),
    )


def demos_with_frozen_poses(exam: Examination, arm: str, tracks: Sequence[str] = ("poses", "joints")) -> set[str]:
    """Return names of the demos in which poses or joints of an arm are known to be frozen."""
    checks = [f"frozen_{track}" for track in tracks]
    return exam.named(*checks, arm=arm) | exam.named(*checks, arm="")
