"""Intervals for success rates, and comparisons of policies on the same episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

RESAMPLES = 10_000  # bootstrap resamples of episodes, for an interval


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate (Wilson, 1927).

    Unlike the normal approximation it stays inside [0, 1] and is meaningful at 0 and 100 %.

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A success rate needs trials and at most as many successes, got {successes} of {trials}.")
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def pooled_interval(outcomes: Sequence[Mapping[Any, bool]], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the success rate over several trainings that were evaluated on the same episodes.

    It is Wilson's for the effective number of episodes: all episodes of all trainings, divided by the design effect of
    the repeated ones, which Rao and Scott (1992) estimate from the successes by episode ("A simple method for the
    analysis of clustered binary data", Biometrics 48). That number is at least the number of distinct episodes (all
    trainings succeed in the same ones) and at most the number of all. With one training it is Wilson's interval.

    The interval covers the choice of episodes, for these trainings. It does not cover the spread between trainings.

    Args:
        outcomes: for each training, success by episode.

    Raises:
        ValueError: There are no episodes.
    """
    by_episode: dict[Any, list[bool]] = {}
    for training in outcomes:
        for episode, success in training.items():
            by_episode.setdefault(episode, []).append(success)
    if not by_episode:
        raise ValueError("the interval of a success rate needs episodes, got none")
    successes = np.array([sum(results) for results in by_episode.values()], dtype=float)
    trials = np.array([len(results) for results in by_episode.values()], dtype=float)
    distinct, total = len(trials), trials.sum()
    rate = float(successes.sum() / total)
    effective = float(distinct)  # if every episode, or none, succeeds, repeated ones may add nothing
    if distinct > 1 and 0 < rate < 1:
        residuals = successes - rate * trials
        variance = distinct / (distinct - 1) * np.square(residuals).sum() / total**2
        design_effect = variance / (rate * (1 - rate) / total)
        effective = float(np.clip(total / max(design_effect, 1.0), distinct, total))
    return _wilson(rate, effective, confidence)


def _wilson(rate: float, trials: float, confidence: float) -> tuple[float, float]:
    """Return `wilson_interval` for a number of trials that need not be whole; scipy's `binomtest` takes whole ones."""
    z = float(norm.ppf((1 + confidence) / 2))
    centre = rate + z**2 / (2 * trials)
    reach = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + sign * reach) / (1 + z**2 / trials) for sign in (-1, 1))
    return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)


@dataclass(frozen=True)
class PairedDifference:
    """Success of one policy minus that of another on the same episodes.

    Attributes:
        difference: of the success rates. low, high: 95 % interval over episodes.
        p_value: two-sided, for the null hypothesis of no difference.
        only_first, only_second: number of pairs in which only this policy succeeded. pairs: number of all pairs.
        by_seed: the difference of each training seed; the test does not include their spread.
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
    """Compare two policies episode by episode.

    The p-value is that of the exact sign-flip test. Its unit is an episode's difference over all training seeds,
    because the same episode is not an independent sample for each seed. Without a difference between the policies, both
    signs are equally likely. With one seed it is McNemar's exact test (McNemar, 1947). The interval is a seeded
    bootstrap over episodes.

    Args:
        first, second: success ``[seeds][episodes]`` on the same episodes in the same order.

    Raises:
        ValueError: There is nothing to compare, or the numbers of seeds and episodes differ.
    """
    first_hits, second_hits = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first_hits.ndim != 2 or first_hits.shape != second_hits.shape or not first_hits.size:
        raise ValueError(
            f"a paired comparison needs the same seeds and episodes of both policies, got {list(first_hits.shape)} and "
            f"{list(second_hits.shape)}"
        )
    pairs = first_hits - second_hits
    by_episode = pairs.mean(axis=0)
    ahead, behind = int((pairs > 0).sum()), int((pairs < 0).sum())
    generator = np.random.default_rng(0)
    # How often a resample holds each of the few different values: equivalent to sampling episodes, with less memory.
    values, counts = np.unique(pairs.sum(axis=0), return_counts=True)
    resamples = generator.multinomial(len(by_episode), counts / len(by_episode), RESAMPLES)
    low, high = np.quantile(resamples @ values / pairs.size, [0.025, 0.975])
    return PairedDifference(
        difference=float(by_episode.mean()),
        low=float(low),
        high=float(high),
        p_value=_sign_flip_p_value(pairs.sum(axis=0).astype(int)),
        only_first=ahead,
        only_second=behind,
        pairs=pairs.size,
        by_seed=tuple(float(value) for value in pairs.mean(axis=1)),
    )


def _sign_flip_p_value(differences: np.ndarray) -> float:
    """Return the two-sided p-value of integer differences whose signs are equally likely. The distribution of their sum
    is computed by adding one difference after another."""
    sizes = np.abs(differences)
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # probability of each sum from -reach to reach
    chances[reach] = 1.0
    for size in sizes[sizes > 0]:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # the ends are zero, so nothing wraps around
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method (Holm, 1979), in the given order.

    Rejecting adjusted p-values of at most 0.05 limits the probability of any false rejection to 5 %, for any dependence
    between the tests.
    """
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
