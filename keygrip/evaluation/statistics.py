"""Intervals for success rates, and comparisons of policies on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

FLIPS = 20_000  # random signs of a permutation test: a standard error of 0.0016 at p = 0.05
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

    With one training seed the p-value is McNemar's exact one (McNemar, 1947): the binomial test on the pairs in which
    one alone succeeded. With several, an episode's unit is its mean difference over the seeds, because the same episode
    is no independent draw for each of them, and its sign is flipped at random (a permutation test). The interval is a
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
    if len(pairs) == 1:
        p_value = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
    else:
        differing = by_episode[by_episode != 0]
        signs = generator.integers(0, 2, (FLIPS, len(differing)), dtype=np.int8) * 2 - 1
        extreme = int((np.abs(signs @ differing) >= abs(differing.sum()) - 1e-9).sum())
        p_value = (extreme + 1) / (FLIPS + 1)
    drawn = generator.integers(0, len(by_episode), (RESAMPLES, len(by_episode)))
    low, high = np.quantile(by_episode[drawn].mean(axis=1), [0.025, 0.975])
    return PairedDifference(
        difference=float(by_episode.mean()),
        low=float(low),
        high=float(high),
        p_value=p_value,
        only_first=ahead,
        only_second=behind,
        pairs=pairs.size,
        by_seed=tuple(float(value) for value in pairs.mean(axis=1)),
    )


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
