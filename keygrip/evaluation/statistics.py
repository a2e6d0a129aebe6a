"""Intervals for success rates, and comparisons of policies on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000  # bootstrap resamples of episodes, for an interval


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson, 1927).

    Unlike the normal approximation it stays inside [0, 1] and says something sensible at 0 and 100 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A success rate needs trials and at most as many successes, got {successes} of {trials}.")
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedDifference:
    """Success of one policy minus that of another on the same episodes.

    Attributes:
        difference: of the success rates. low, high: 95 % interval over episodes.
        p_value: two-sided, of no difference.
        only_first, only_second: pairs in which one of them alone succeeded. pairs: all of them.
        by_seed: the difference of each training seed; the test knows nothing of their spread.
    """

    difference: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int
    pairs: int
    by_seed: tuple[float, ...]


def paired_difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> PairedDifference:
    """Compares two policies episode by episode.

    The p-value is that of the sign-flip test, exact: an episode's unit is its difference over all training seeds,
    because the same episode is no independent draw for each of them, and without a difference between the policies each
    sign is as likely as the other. With one seed that is McNemar's exact test (McNemar, 1947). The interval is a
    bootstrap over episodes, seeded.

    Args:
        first, second: success ``[seeds][episodes]`` on the same episodes in the same order.

    Raises:
        ValueError: nothing to compare, or not the same number of seeds and episodes.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.ndim != 2 or one.shape != other.shape or not one.size:
        raise ValueError(
            f"a paired comparison needs the same seeds and episodes of both policies, got {list(one.shape)} and "
            f"{list(other.shape)}"
        )
    pairs = one - other
    by_episode = pairs.mean(axis=0)
    ahead, behind = int((pairs > 0).sum()), int((pairs < 0).sum())
    generator = np.random.default_rng(0)
    # How often a resample holds each of the few different values: the same as drawing episodes, without their memory.
    values, counts = np.unique(pairs.sum(axis=0), return_counts=True)
    drawn = generator.multinomial(len(by_episode), counts / len(by_episode), RESAMPLES)
    low, high = np.quantile(drawn @ values / pairs.size, [0.025, 0.975])
    return PairedDifference(
        difference=float(by_episode.mean()),
        low=float(low),
        high=float(high),
        p_value=_sign_flip(pairs.sum(axis=0).astype(int)),
        only_first=ahead,
        only_second=behind,
        pairs=pairs.size,
        by_seed=tuple(float(value) for value in pairs.mean(axis=1)),
    )


def _sign_flip(differences: np.ndarray) -> float:
    """The two-sided p-value of whole differences whose signs are as likely as their opposites: the distribution of
    their sum is built up one difference after the other."""
    sizes = np.abs(differences)
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chances[reach] = 1.0
    for size in sizes[sizes > 0]:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # nothing is left at the ends to wrap around
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method (Holm, 1979), in the given order.

    Rejecting what is at most 0.05 afterwards keeps the chance of any false rejection at 5 %, whatever the dependence
    between the tests.
    """
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
