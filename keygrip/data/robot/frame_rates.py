"""Frame rates of data sets: the rate given by their time stamps, and strides that give target steps the same duration
in all data sets."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from keygrip.data.bad_samples import join_first, join_first_names
from keygrip.data.robot.schema import Demo

log = logging.getLogger(__name__)

GAP = 2.5  # in median steps; a longer time between two frames is a gap
JUDGED_FROM = 10  # steps; with fewer, a single late frame could decide the rate
SAME = 1.05  # durations that differ by a smaller factor count as equal: recorders keep their rate to a few percent
LARGEST_STRIDE = 30  # largest stride of the slowest data set that an error message proposes
PERCENT = 0.4  # for the proposal, 1 % difference between steps counts as much as a step 2 ** 0.4 times as long


def checked_strides(frame_stride: int | Sequence[int], roots: int) -> list[int]:
    """Return the number of frames from one target step to the next for each root.

    Args:
        frame_stride: the setting, one value for all roots or one per root. roots: number of roots.

    Raises:
        ValueError: the number of strides is not that of the roots, or a stride is not a whole number of at least 1.
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
    """Return the frames per second given by the time stamps of a demo, see `rate_of_times`."""
    return rate_of_times(demo.timestamps, demo.fps)


def rate_of_times(times_ns: np.ndarray, stated: float) -> float:
    """Return the frames per second given by time stamps [N]: from the median of the times between frames, from the mean
    of those that are not gaps, or from the mean of all, whichever is nearest to the
    `stated` rate.

    Single dropped frames change the means, alternating jitter changes the median, and frames that arrive in bursts
    change everything except the mean of all. A different rate changes all three by the same factor.
    """
    steps = np.diff(times_ns) * 1e-9
    median = float(np.median(steps))
    means = (float(steps[steps <= GAP * median].mean()), float(steps.mean()))
    return min((1 / step for step in (median, *means)), key=lambda rate: abs(math.log(rate / stated)))


def rates_differ(measured: float, stated: float) -> bool:
    """Return whether a rate differs from the stated one by more than the inaccuracy of recorders (`SAME`)."""
    return not 1 / SAME <= measured / stated <= SAME


def longest_gap(demo: Demo) -> float:
    """Return the longest time between two frames in seconds if it is a gap (`GAP`), otherwise 0."""
    steps = np.diff(demo.timestamps) * 1e-9
    return float(steps.max()) if steps.max() > GAP * np.median(steps) else 0.0


def other_rates(demos: Sequence[Demo], root: object) -> dict[str, str]:
    """Describe, by demo, a difference between the rate of the time stamps and `fps`, at which the plans would run. Only
    demos with at least `JUDGED_FROM` steps are checked.

    Args:
        root: for the message.

    Raises:
        ValueError: the rates of most of these demos differ, so the stated rate is wrong.
    """
    rates = {demo.name: (measured_rate(demo), demo.fps) for demo in demos if len(demo) > JUDGED_FROM}
    wrong = {name: pair for name, pair in rates.items() if rates_differ(*pair)}
    if 2 * len(wrong) <= len(rates):
        return {
            name: f"its time stamps say {measured:.4g} frames per second, its fps is {stated:g}: plans would run "
            f"{stated / measured:.3g} times as fast as what was shown"
            for name, (measured, stated) in wrong.items()
        }
    measured, stated = next(iter(wrong.values()))
    cases = join_first([f"{name}: {measured:.4g} for {stated:g}" for name, (measured, stated) in wrong.items()])
    raise ValueError(
        f"{root}: the time stamps of {len(wrong)} of {len(demos)} demos say other frames per second than their fps, by "
        f"more than {100 * (SAME - 1):.0f} % ({cases}): plans would run {stated / measured:.3g} times as fast as what "
        "was shown; correct the stated rate (fps, Raiden's framerate, yam-abc's control_hz; where it is missing, 30 is "
        "assumed) or the time stamps"
    )


def report_gaps(demos: Sequence[Demo], root: object) -> None:
    """Warn about demos in which frames are missing: a step over a gap counts like any other step."""
    gaps = {demo.name: gap for demo in demos if (gap := longest_gap(demo))}
    if gaps:
        log.warning(
            "%s: time stamps jump in %d of %d demos, by up to %.2f s; frames were dropped there, and a policy learns "
            "to move too fast (leave these demos out, or record them again): %s",
            root,
            len(gaps),
            len(demos),
            max(gaps.values()),
            join_first_names([f"{name} ({gap:.2f} s)" for name, gap in gaps.items()]),
        )


def step_seconds(demos: Sequence[Demo], strides: Sequence[int]) -> float:
    """Return the seconds from one target step to the next.

    Args:
        strides: frames per step, for each demo.
    """
    return float(np.median([stride / demo.fps for demo, stride in zip(demos, strides, strict=True)]))


def refuse_unequal_steps(
    demos: Sequence[Demo], root_of: Sequence[int], roots: Sequence[str], strides: Sequence[int]
) -> None:
    """Raise ValueError if a step has different durations in some demos.

    Args:
        root_of: index of each demo's root. roots, strides: name and frames per step, for each root.
    """
    rates = np.array([demo.fps for demo in demos])
    owner = np.array(root_of)
    seconds = np.array(strides)[owner] / rates
    if seconds.max() <= SAME * seconds.min():
        return
    root_indices = sorted(set(root_of))
    for index in root_indices:
        demo_indices = np.flatnonzero(owner == index)
        slow, fast = demo_indices[rates[demo_indices].argmin()], demo_indices[rates[demo_indices].argmax()]
        if rates[fast] > SAME * rates[slow]:
            raise ValueError(
                f"the demos of {roots[index]} run at different rates ({demos[slow].name}: {rates[slow]:g} frames/s, "
                f"{demos[fast].name}: {rates[fast]:g}), so that a step of data.frame_stride frames means different "
                "times: move them into a folder for each rate, and give data.root=[FOLDER,FOLDER] and one "
                "data.frame_stride of each"
            )
    own_rates = [float(np.median(rates[owner == index])) for index in root_indices]
    description = ", ".join(
        f"{roots[index]} {rate:g} frames/s and a stride of {strides[index]}: {strides[index] / rate:.3g} s"
        for index, rate in zip(root_indices, own_rates, strict=True)
    )
    equal = equal_strides(own_rates, float(np.median(seconds)))
    raise ValueError(
        f"a step of data.frame_stride frames means different times in the data sets ({description}): "
        f"data.frame_stride=[{','.join(map(str, equal))}], in the order of data.root, makes steps of "
        f"{equal[0] / own_rates[0]:.3g} s in all"
    )


def refuse_other_steps(demos: Sequence[Demo], root_of: Sequence[int], strides: Sequence[int], seconds: float) -> None:
    """Raise ValueError if a target step does not last as long as a step that a policy plans.

    Args:
        demos: with equal steps, see `refuse_unequal_steps`. root_of: index of each demo's root. strides: frames per
            step, for each root. seconds: of a planned step.
    """
    own = step_seconds(demos, [strides[root] for root in root_of])
    if not rates_differ(own, seconds):
        return
    rate_of = {
        root: float(np.median([demo.fps for demo, of in zip(demos, root_of, strict=True) if of == root]))
        for root in set(root_of)
    }
    fitting = [
        max(round(seconds * rate_of[root]), 1) if root in rate_of else stride for root, stride in enumerate(strides)
    ]
    if any(rates_differ(fitting[root] / rate, seconds) for root, rate in rate_of.items()):
        rates = " and ".join(f"{rate:g}" for rate in sorted(set(rate_of.values())))
        advice = f"no data.frame_stride gives such steps at {rates} frames/s: give demonstrations of another frame rate"
    else:
        advice = f"set data.frame_stride={_stride_setting(fitting)}"
    raise ValueError(
        f"a step of data.frame_stride={_stride_setting(strides)} frames lasts {own:.3g} s in these demonstrations, and "
        f"the policy plans steps of {seconds:.3g} s, which would be compared with poses of other times: {advice}"
    )


def _stride_setting(strides: Sequence[int]) -> str:
    """Return the value of `data.frame_stride` for the strides of all roots."""
    return str(strides[0]) if len(strides) == 1 else f"[{','.join(map(str, strides))}]"


def equal_strides(rates: Sequence[float], seconds: float) -> list[int]:
    """Return strides that make a step (nearly) equally long at several rates, and about `seconds` long."""
    candidates = []
    for slowest in range(1, LARGEST_STRIDE + 1):
        strides = [round(slowest * rate / min(rates)) for rate in rates]
        steps = [stride / rate for stride, rate in zip(strides, rates, strict=True)]
        unequal = max(steps) / min(steps)
        if unequal <= SAME:  # true at least for LARGEST_STRIDE, where rounding changes steps by at most 2 %
            candidates.append((abs(math.log2(steps[0] / seconds)) + PERCENT * 100 * (unequal - 1), strides))
    return min(candidates)[1]
