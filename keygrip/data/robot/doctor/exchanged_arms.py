"""Arms with exchanged names: commanded tracks that match another arm's reached track, and single demos in which each
of two arms begins where the other one begins in the other demos."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.tracks import INVERTED_GAIN, INVERTED_M, track_distance
from keygrip.data.robot.schema import Demo

APART_M = 0.1  # least distance of an arm's start from its usual start for which the track may belong to another arm


def check_exchanged_arms(exam: Examination) -> None:
    """For each pair of arms, report the demos in which each arm matches the other arm better than itself."""
    for first, second in itertools.combinations(exam.arms, 2):
        demos = [demo for demo in exam.demos if {first, second} <= demo.arms.keys()]
        commanded_demos = [
            demo for demo in demos if all(demo.arms[arm].commanded is not None for arm in (first, second))
        ]
        _report(
            exam,
            "exchanged_commands",
            [
                demo.name
                for demo in commanded_demos
                if _are_exchanged(_command_distance(demo), first, second, INVERTED_M)
            ],
            f"the commanded track of {first} goes with the reached track of {second}, and that of {second} with "
            f"{first}'s",
            f"commanded tracks of {first} and {second} exchanged",
        )
        exchanged = [
            demo.name
            for demo in demos
            if len(demos) > 2 and _are_exchanged(_start_distance(demo, demos), first, second, APART_M)
        ]
        if len(exchanged) < len(demos) / 2:  # else it is not known which ones are exchanged
            _report(
                exam,
                "exchanged_arms",
                exchanged,
                f"{first} begins where {second} does in the other demos, and {second} where {first} does",
                f"arms {first} and {second} exchanged in these demos",
            )


def _are_exchanged(distance: Callable[[str, str], float], first: str, second: str, least_distance: float) -> bool:
    """Return whether both arms are far from themselves and near each other; `distance` (m) is of two arms by name."""
    return all(
        distance(arm, arm) > least_distance and distance(arm, other) < INVERTED_GAIN * distance(arm, arm)
        for arm, other in ((first, second), (second, first))
    )


def _command_distance(demo: Demo) -> Callable[[str, str], float]:
    """Return the distance of one arm's commanded positions from another arm's reached ones, as a function of names."""

    def distance(commanded_arm: str, reached: str) -> float:
        commanded = demo.arms[commanded_arm].commanded
        assert commanded is not None
        return track_distance(demo.arms[reached].position, commanded.position)

    return distance


def _start_distance(demo: Demo, demos: list[Demo]) -> Callable[[str, str], float]:
    """Return the distance of one arm's start in a demo from another arm's usual start in the other demos, as a
    function of names."""

    def distance(arm: str, usual: str) -> float:
        starts = [other.arms[usual].position[0] for other in demos if other is not demo]
        return float(np.linalg.norm(demo.arms[arm].position[0] - np.median(starts, axis=0)))

    return distance


def _report(exam: Examination, check: str, names: list[str], message: str, cause: str) -> None:
    if names:
        exam.add(
            check,
            "error",
            message,
            "Give each arm its own track under its own name in all demos",
            cause=cause,
            demos=names,
        )
