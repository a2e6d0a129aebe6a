"""Finds demonstrations whose arm does not follow its commands, and commands that are increments or have other axes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import permutations, product

import numpy as np

from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.track_differences import add_difference
from keygrip.data.robot.doctor.tracks import pair_with_delay
from keygrip.data.robot.schema import ArmTrajectory

LEAST_MOTION_M = 0.05  # a scale is measured of a motion along one axis that is larger than this
# Largest share of the distance of the tracks that may remain with a scale or an offset that is named as its cause (an
# arm that does not reach its commands moves less far than they do, too).
EXPLAINED_SHARE = 0.8
# A scale is that of every axis along which the arm moves, within this share of its difference from 1, and this much.
ONE_SCALE, ODD_AXIS = 0.5, 0.05
FOLLOWED_M = 0.03  # an arm that stays further from its commands than this does not follow them
MANY_DEMOS = 3  # from this number on, an arm that is not followed in most of them was not blocked by chance
# Correlations by which commands are increments: of their sum with the reached positions, and of themselves.
SUMMED, NOT_SUMMED = 0.95, 0.7
# Exchanged axes are named if they leave this share of the distance of both tracks.
AXES_SHARE = 0.35
STEPS_OF_A_DEMO = 30  # motions over this share of a demonstration are those of increments
DELAYS = range(4)  # frames of the reached track after such commands
SOUND_DELAYS = range(-12, 31)  # frames by which a sound track may follow the other, if one of them is late
RELATED = 0.5  # correlation from which an arm goes after its commands, only slowly or not to their end


def find_increments(
    exam: Examination, arm: str, tracks: dict[str, ArmTrajectory], by_joints: Collection[str]
) -> list[str]:
    """Return the names of demos whose commands are increments of the position, in any unit, and report them."""
    names = [name for name, reached in tracks.items() if _are_increments(reached)]
    cause, advice = "commanded increments in place of positions", "Store the commanded pose of each frame as a command"
    further = " (the sum of all increments so far, in metres, from the first pose on)"
    add_difference(
        exam,
        "command_increments",
        arm,
        names,
        by_joints,
        "the sum of the commanded positions moves as the reached positions do, and they themselves do not",
        commanded=(cause, advice + further),
        either=(cause, advice + further),
    )
    return names


def _are_increments(reached: ArmTrajectory) -> bool:
    assert reached.commanded is not None
    position, command = reached.position, reached.commanded.position
    if len(reached) <= max(DELAYS) or np.ptp(position, axis=0).max() <= LEAST_MOTION_M:
        return False
    total = command.cumsum(axis=0)
    # The sum of commands that do not change, or of another recording, moves away from the origin, as a reach does, so
    # steps are compared too: of several frames, because reached positions may be noisy, late, or read less often than
    # frames are recorded.
    frames = max(1, len(reached) // STEPS_OF_A_DEMO)
    steps, total_steps = (track[frames:] - track[:-frames] for track in (position, total))
    themselves, summed, by_step = (
        max(_correlation(*pair_with_delay(moved, told, delay)) for delay in DELAYS)
        for moved, told in ((position, command), (position, total), (steps, total_steps))
    )
    return themselves < NOT_SUMMED and summed > SUMMED and by_step > RELATED


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Return the correlation of two tracks [N, 3] over all axes; 0 if one does not move."""
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    size = np.linalg.norm(left) * np.linalg.norm(right)
    return float((left * right).sum() / size) if size > 1e-12 else 0.0


def find_exchanged_axes(
    exam: Examination, arm: str, tracks: dict[str, ArmTrajectory], by_joints: Collection[str]
) -> list[str]:
    """Return the names of demos whose commanded and reached positions have other axes, and report them."""
    by_axes: dict[str, list[str]] = {}
    for name, reached in tracks.items():
        if (axes := _exchanged_axes(reached)) is not None:
            by_axes.setdefault(axes, []).append(name)
    for axes, names in by_axes.items():
        add_difference(
            exam,
            "command_axes",
            arm,
            names,
            by_joints,
            f"commanded positions move as the reached ones do if their x, y, z are taken to be {axes}",
            commanded=("commanded axes exchanged", f"Store {axes} of the commanded positions as x, y, z"),
            either=("commanded or reached axes exchanged", "Store both tracks in one frame of the world, with z up"),
        )
    return [name for names in by_axes.values() for name in names]


def _exchanged_axes(reached: ArmTrajectory) -> str | None:
    """Return the axes of the commanded positions, as "y, -x, z", that go with x, y, z of the reached ones, if these are
    far from each other as stored; else None."""
    assert reached.commanded is not None
    command = reached.commanded.position
    as_stored = _least_distance(command, reached.position, SOUND_DELAYS)
    if as_stored <= FOLLOWED_M:
        return None
    best, found = AXES_SHARE * as_stored, None
    for order, signs in _other_axes():
        distance = _least_distance(command[:, order] * signs, reached.position)
        if distance < best:
            names = ("xyz"[axis] if sign > 0 else f"-{'xyz'[axis]}" for axis, sign in zip(order, signs, strict=True))
            best, found = distance, ", ".join(names)
    return found


def _least_distance(command: np.ndarray, position: np.ndarray, delays: Iterable[int] = DELAYS) -> float:
    """Return the distance (m) of two tracks [N, 3] that a tenth of the frames exceeds, with their offset removed, at
    the delay with the least, of those that leave half of the frames. An arm rests at some places, where the offset
    explains every exchange of axes."""
    distances = []
    for delay in (each for each in delays if 2 * abs(each) <= len(command)):
        difference = np.subtract(*pair_with_delay(position, command, delay))
        distances.append(np.quantile(np.linalg.norm(difference - np.median(difference, axis=0), axis=1), 0.9))
    return float(min(distances))


def _other_axes() -> Iterable[tuple[list[int], list[int]]]:
    """Return the 47 orders of three axes and their signs that change something."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        if (order, signs) != ((0, 1, 2), (1, 1, 1)):
            yield list(order), list(signs)


def find_not_followed(
    exam: Examination, arm: str, tracks: dict[str, ArmTrajectory], delays: dict[str, float]
) -> list[str]:
    """Return the names of demos in which the arm does not follow its commands, and report them: as a warning, since it
    may have been held or blocked, unless it does not go after them in most of several demos."""
    distances: dict[str, float] = {}  # median distance (m) of both tracks
    unrelated = 0
    for name, reached in tracks.items():
        if name not in delays:
            continue
        assert reached.commanded is not None
        command, position = pair_with_delay(reached.position, reached.commanded.position, round(delays[name]))
        offset = np.median(command - position, axis=0)
        apart = np.median(np.linalg.norm(command - position - offset, axis=1)) > FOLLOWED_M
        if apart and scale_of_motion(command, position) is None:
            distances[name] = float(np.median(np.linalg.norm(command - position, axis=1)))
            unrelated += _correlation(command, position) < RELATED
    if distances:
        every_time = len(tracks) >= MANY_DEMOS and 2 * unrelated > len(tracks)
        exam.add(
            "command_following",
            "error" if every_time else "warning",
            f"the arm stays {max(distances.values()) * 100:.1f} cm (median) from its commanded positions, which no "
            "delay of up to 12 frames, offset, scale or exchange of axes explains",
            "Check from which recording and in which frame the commands are"
            if every_time
            else "Look at these demos: leave those out in which the arm is held or blocked, and check from which "
            "recording and in which frame the commands of the others are",
            cause="commands of another recording or frame"
            if every_time
            else "an arm that does not follow its commands, or commands of another recording or frame",
            demos=list(distances),
            arm=arm,
        )
    return list(distances)


def scale_of_motion(command: np.ndarray, position: np.ndarray) -> float | None:
    """Return how many times as far as `position` [N, 3] `command` [N, 3] moves; None: no scale explains the difference.

    An arm that tracks its commands badly gives a regression below 1, too, but is then no nearer to them. One that a
    table or a joint limit stops along one axis has other scales along the others.
    """
    position, command = position - position.mean(axis=0), command - command.mean(axis=0)
    moved = np.ptp(position, axis=0) > LEAST_MOTION_M
    if not moved.any():
        return None
    scale = float((position * command).sum() / (position**2).sum())
    by_axis = (position * command).sum(axis=0)[moved] / (position**2).sum(axis=0)[moved]
    if np.abs(by_axis - scale).max() > ONE_SCALE * abs(scale - 1) + ODD_AXIS:
        return None
    unscaled, scaled = (np.linalg.norm(command - factor * position, axis=1).mean() for factor in (1.0, scale))
    return scale if scaled < EXPLAINED_SHARE * unscaled else None
