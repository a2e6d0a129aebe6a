"""Intervals for success rates."""

from __future__ import annotations

import math


def wilson_interval(successes: int, trials: int, confidence_z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson, 1927); 95 % at the default z.

    Unlike the normal approximation it stays inside [0, 1] and says something sensible at 0 and 100 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A success rate needs trials and at most as many successes, got {successes} of {trials}.")
    rate, z2 = successes / trials, confidence_z**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = confidence_z / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, where rounding would leave 1e-16
    return low, 1.0 if successes == trials else centre + half
