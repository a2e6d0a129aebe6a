"""Poses or joints that stand exactly still while something else says that the arm moves: a logger that hung.

Pauses are no fault. What is recorded of an arm that stands is often exactly equal, too, so that equal rows alone say
nothing: commands, joints, images or the jump at the end must show that the arm went on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keygrip.data.robot.doctor.examination import Examination, Severity
from keygrip.data.robot.frame_rates import GAP
from keygrip.data.robot.schema import ArmTrajectory, Demo

LEAST_FRAMES, LEAST_S = 5, 0.5  # shortest span: both
TOLD_M, TURNED_RAD, WENT_M = 0.03, 0.15, 0.03  # motion of commands, joints and poses that shows that the arm moved
ANSWER_S = 0.3  # commands of the last moments of a span may not have been followed yet
JUMP_M, JUMP_RATIO = 0.02, 3.0  # step out of a span, and its ratio to the demo's largest usual steps
MOVING_M = 0.003  # way between two frames that are read, from which the arm is moving
# Share of the pixels that change from frame to frame: of the usual one while arms move, and where none is known. In
# clean recordings it is 0.03 to 0.09 while the arm moves and 0.01 at most while it stands.
ACTIVE, ACTIVE_SHARE, LEAST_REFERENCE = 0.4, 0.02, 0.002

Span = tuple[int, int]  # first and last frame


def spans(rows: np.ndarray, least: int) -> list[Span]:
    """Spans of `least` frames or more in which rows [N, D] are exactly equal."""
    equal = (np.diff(rows, axis=0) == 0).all(axis=1)
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    pairs = bounds.reshape(-1, 2).tolist()
    return [(first, last) for first, last in pairs if last - first + 1 >= least]


def shortest(demo: Demo) -> int:
    """Frames of the shortest span that is looked at."""
    return max(LEAST_FRAMES, int(np.ceil(LEAST_S * demo.fps)))


def check_frozen_poses(exam: Examination) -> None:
    """Poses that stand still while commands or joints move or the arm is elsewhere right after, and joints that do so
    while poses move."""
    for arm in exam.arms:
        poses: dict[str, tuple[Span, str]] = {}
        joints: dict[str, tuple[Span, str]] = {}
        for demo in exam.with_arm(arm):
            track, least = demo.arms[arm], shortest(demo)
            for span in spans(np.hstack([track.position, track.quaternion]), least):
                if demo.name not in poses and (why := _went_on(demo, track, span)):
                    poses[demo.name] = span, why
            for first, last in [] if track.joints is None else spans(track.joints, least):
                way = _way(track.position[first : last + 1])
                if demo.name not in joints and way > WENT_M:
                    joints[demo.name] = (first, last), f"while the gripper's position moves by {way * 100:.0f} cm"
        _report(exam, "poses", arm, poses)
        _report(exam, "joints", arm, joints)


def _went_on(demo: Demo, track: ArmTrajectory, span: Span) -> str:
    """What shows that an arm went on while its poses stood still; "": nothing does."""
    first, last = span
    if track.commanded is not None:
        followed = track.commanded.position[first : max(first, last - int(np.ceil(ANSWER_S * demo.fps))) + 1]
        if (way := _way(followed)) > TOLD_M:
            return f"while the commands move by {way * 100:.0f} cm"
    if (
        track.joints is not None
        and (turned := float(np.ptp(track.joints[first : last + 1], axis=0).max())) > TURNED_RAD
    ):
        return f"while the joints turn by {np.degrees(turned):.0f} degrees"
    seconds = np.diff(demo.timestamps)
    if last + 1 < len(demo) and seconds[last] <= GAP * np.median(seconds):
        steps = np.linalg.norm(np.diff(track.position, axis=0), axis=1)
        others = np.delete(steps, last)
        usual = float(np.quantile(others[others > 0], 0.95)) if (others > 0).any() else 0.0
        if steps[last] > max(JUMP_M, JUMP_RATIO * usual):
            return f"and the arm is {steps[last] * 100:.0f} cm elsewhere right after"
    return ""


def _way(positions: np.ndarray) -> float:
    return float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 0.0


def check_poses_of_moving_images(exam: Examination) -> None:
    """Poses and openings of all arms that stand still while the images change as they do when an arm moves.

    Each camera whose images change when an arm moves must show it. Someone may walk by while an arm waits at the begin
    or the end: there it is a warning, unless half the demo is like that.
    """
    known = exam.named("frozen_poses")
    usual = {camera: _usual_activity(exam, camera) for camera in exam.cameras}
    found: dict[Severity, dict[str, tuple[Span, str]]] = {"error": {}, "warning": {}}
    for demo in exam.demos:
        if demo.name in known or not demo.arms:
            continue
        parts = [
            part
            for track in demo.arms.values()
            for part in (track.position, track.quaternion, np.reshape(track.gripper, (-1, 1)))
        ]
        for span in spans(np.hstack(parts), shortest(demo)):
            if not _active(exam, demo, span, usual):
                continue
            inside = span[0] > 0 and span[1] < len(demo) - 1
            severity: Severity = "error" if inside or span[1] - span[0] + 1 > len(demo) / 2 else "warning"
            found[severity][demo.name] = span, "while the images change as when the arm moves"
            break
    for severity, demos in found.items():
        _report(exam, "poses", "", demos, severity)


def _usual_activity(exam: Examination, camera: str) -> float | None:
    """Median share of pixels that change from frame to frame while an arm moves, over all demos; None: none moves."""
    shares: list[float] = []
    for demo in exam.with_camera(camera):
        index, changed = exam.activity[demo.name, camera]
        ways = [np.linalg.norm(np.diff(track.position[index], axis=0), axis=1) for track in demo.arms.values()]
        if ways:
            shares += changed[np.max(ways, axis=0) > MOVING_M].tolist()
    return float(np.median(shares)) if len(shares) >= LEAST_FRAMES else None


def _active(exam: Examination, demo: Demo, span: Span, usual: dict[str, float | None]) -> bool:
    """Whether every camera that shows when arms move shows it in a span."""
    said: list[bool] = []
    for camera in demo.cameras:
        index, changed = exam.activity[demo.name, camera]
        inside = (index[:-1] >= span[0]) & (index[1:] <= span[1])
        reference = usual[camera]
        if not inside.any() or (reference is not None and reference < LEAST_REFERENCE):
            continue
        said.append(float(changed[inside].mean()) > (ACTIVE_SHARE if reference is None else ACTIVE * reference))
    return bool(said) and all(said)


def _report(
    exam: Examination, what: str, arm: str, found: dict[str, tuple[Span, str]], severity: Severity = "error"
) -> None:
    if not found:
        return
    name, ((first, last), why) = next(iter(found.items()))
    exam.add(
        f"frozen_{what}",
        severity,
        f"recorded {what} stand exactly still at frames {first} to {last} of {name}, {why}",
        f"The recorder's {what} hung: cut the demos there or leave them out, and look for what held the recorder up",
        cause=f"{what} frozen in frames {first} to {last}",
        demos=found,
        arm=arm,
        frames=range(first, last + 1),
    )


def frozen(exam: Examination, arm: str, tracks: Sequence[str] = ("poses", "joints")) -> set[str]:
    """Names of the demos in which poses or joints of an arm are known to hang."""
    checks = [f"frozen_{track}" for track in tracks]
    return exam.named(*checks, arm=arm) | exam.named(*checks, arm="")
