"""Frame rates of data sets: what their time stamps say, and how many frames of each one target step is, in all of them
as many seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from keygrip.data.bad_samples import first_names, first_of
from keygrip.data.robot.schema import Demo

log = logging.getLogger(__name__)

GAP = 2.5  # median steps; a longer time between two frames is a gap
JUDGED_FROM = 10  # steps: of fewer a single late frame decides the rate
SAME = 1.05  # steps whose seconds differ by a smaller factor are one step: recorders keep their rate to a few percent
LARGEST_STRIDE = 30  # of the slowest data set, in what an error proposes
PERCENT = 0.4  # a percent by which steps differ is as bad there as a step that is longer by a factor of 2 ** 0.4


def checked_strides(frame_stride: int | Sequence[int], roots: int) -> list[int]:
    """Frames from one target step to the next, of each root.

    Args:
        frame_stride: the setting, of all roots or one of each. roots: how many there are.

    Raises:
        ValueError: another number of them than of roots, or one that is no whole number from 1.
    """
    strides = list(frame_stride) if isinstance(frame_stride, Sequence) else [frame_stride] * roots
    if len(strides) != roots:
        raise ValueError(
            f"data.frame_stride={strides} names {len(strides)} strides for {roots} roots: give one for all, or one of "
            "each"
        )
    if any(isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 for stride in strides):
        raise ValueError(f"data.frame_stride={frame_stride}: must be whole numbers of at least 1")
    return strides


def measured_rate(demo: Demo) -> float:
    """Frames per second that the time stamps say: by the median of the times between frames, by the mean of those that
    are no gaps, or by all of them, whichever is nearest to `fps`.

    Single dropped frames move the means, jitter that alternates moves the median, and frames that come in bursts all
    but the whole duration; another rate moves them alike.
    """
    steps = np.diff(demo.timestamps) * 1e-9
    median = float(np.median(steps))
    means = (float(steps[steps <= GAP * median].mean()), float(steps.mean()))
    return min((1 / step for step in (median, *means)), key=lambda rate: abs(math.log(rate / demo.fps)))


def differs(measured: float, stated: float) -> bool:
    """Whether a rate is another one than the stated, and not the same one with a recorder's inaccuracy (`SAME`)."""
    return not 1 / SAME <= measured / stated <= SAME


def longest_gap(demo: Demo) -> float:
    """Seconds of the longest time between two frames that is a gap (`GAP`); 0 where there is none."""
    steps = np.diff(demo.timestamps) * 1e-9
    return float(steps.max()) if steps.max() > GAP * np.median(steps) else 0.0


def other_rates(demos: Sequence[Demo], root: object) -> dict[str, str]:
    """What is wrong with each demo whose time stamps say another rate than its `fps`, at which the plans would run; of
    those alone that have at least `JUDGED_FROM` steps.

    Args:
        root: for the message.

    Raises:
        ValueError: with most of them it is so: the stated rate is wrong.
    """
    rates = {demo.name: (measured_rate(demo), demo.fps) for demo in demos if len(demo) > JUDGED_FROM}
    wrong = {name: pair for name, pair in rates.items() if differs(*pair)}
    if 2 * len(wrong) <= len(rates):
        return {
            name: f"its time stamps say {measured:.4g} frames per second, its fps is {stated:g}: plans would run "
            f"{stated / measured:.3g} times as fast as what was shown"
            for name, (measured, stated) in wrong.items()
        }
    measured, stated = next(iter(wrong.values()))
    named = first_of([f"{name}: {measured:.4g} for {stated:g}" for name, (measured, stated) in wrong.items()])
    raise ValueError(
        f"{root}: the time stamps of {len(wrong)} of {len(demos)} demos say other frames per second than their fps, by "
        f"more than {100 * (SAME - 1):.0f} % ({named}): plans would run {stated / measured:.3g} times as fast as what "
        "was shown; correct the stated rate (fps, Raiden's framerate, yam-abc's control_hz; where it is missing, 30 is "
        "assumed) or the time stamps"
    )


def report_gaps(demos: Sequence[Demo], root: object) -> None:
    """Warns of demos in which frames are missing: the step over a gap counts as one like the others."""
    gaps = {demo.name: gap for demo in demos if (gap := longest_gap(demo))}
    if gaps:
        log.warning(
            "%s: time stamps jump in %d of %d demos, by up to %.2f s; frames were dropped there, and a policy learns "
            "to move too fast (leave these demos out, or record them again): %s",
            root,
            len(gaps),
            len(demos),
            max(gaps.values()),
            first_names([f"{name} ({gap:.2f} s)" for name, gap in gaps.items()]),
        )


def step_seconds(demos: Sequence[Demo], strides: Sequence[int]) -> float:
    """Seconds from one target step to the next.

    Args:
        strides: frames of a step, of each demo.
    """
    return float(np.median([stride / demo.fps for demo, stride in zip(demos, strides, strict=True)]))


def refuse_unequal_steps(
    demos: Sequence[Demo], root_of: Sequence[int], roots: Sequence[str], strides: Sequence[int]
) -> None:
    """Raises ValueError: a step means different times in some demos.

    Args:
        root_of: number of each demo's root. roots, strides: name, and frames of a step, of each root.
    """
    rates = np.array([demo.fps for demo in demos])
    owner = np.array(root_of)
    seconds = np.array(strides)[owner] / rates
    if seconds.max() <= SAME * seconds.min():
        return
    numbers = sorted(set(root_of))
    for number in numbers:
        own = np.flatnonzero(owner == number)
        slow, fast = own[rates[own].argmin()], own[rates[own].argmax()]
        if rates[fast] > SAME * rates[slow]:
            raise ValueError(
                f"the demos of {roots[number]} run at different rates ({demos[slow].name}: {rates[slow]:g} frames/s, "
                f"{demos[fast].name}: {rates[fast]:g}), so that a step of data.frame_stride frames means different "
                "times: move them into a folder for each rate, and give data.root=[FOLDER,FOLDER] and one "
                "data.frame_stride of each"
            )
    own_rates = [float(np.median(rates[owner == number])) for number in numbers]
    told = ", ".join(
        f"{roots[number]} {rate:g} frames/s and a stride of {strides[number]}: {strides[number] / rate:.3g} s"
        for number, rate in zip(numbers, own_rates, strict=True)
    )
    equal = equal_strides(own_rates, float(np.median(seconds)))
    raise ValueError(
        f"a step of data.frame_stride frames means different times in the data sets ({told}): "
        f"data.frame_stride=[{','.join(map(str, equal))}], in the order of data.root, makes steps of "
        f"{equal[0] / own_rates[0]:.3g} s in all"
    )


def equal_strides(rates: Sequence[float], seconds: float) -> list[int]:
    """Strides that make a step of (nearly) as many seconds at several rates, and of about `seconds`."""
    found = []
    for slowest in range(1, LARGEST_STRIDE + 1):
        strides = [round(slowest * rate / min(rates)) for rate in rates]
        steps = [stride / rate for stride, rate in zip(strides, rates, strict=True)]
        unequal = max(steps) / min(steps)
        if unequal <= SAME:  # at least the largest is: it is rounded by 2 % at most
            found.append((abs(math.log2(steps[0] / seconds)) + PERCENT * 100 * (unequal - 1), strides))
    return min(found)[1]
