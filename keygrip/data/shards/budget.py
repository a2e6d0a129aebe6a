"""Batches by a budget of frames and positions in place of a number of samples, so that every batch fits the memory.

As everything about the order of samples, a pure function of (seed, epoch): batches hold like samples, each as many as
the budget allows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from keygrip.training.parts import data_part

POOL = 128  # batches among which a bucket's samples are sorted by length
BLUR = 0.03  # of each length, at random: who shares a batch changes from epoch to epoch in small buckets too
# One batch in so many is kept free: epochs differ a little in how many they fill, and all have equally many.
SLACK = 100


@data_part
@dataclass(frozen=True)
class Budget:
    """What a batch may hold, over all processes together.

    Args:
        frames: of all its videos. positions: of the language model, of all its rows: their number times the longest,
            visual and text tokens together.
        exact_lengths: every text is encoded once before training begins, so that batches are planned by the tokens
            that rows really have. False: planned from characters at the rate of a few texts, with much more padding;
            for remote shards that are too large to be read once beforehand.

    Raises:
        ValueError: nothing fits.
    """

    frames: int
    positions: int
    # not in the fingerprint of an order, which the lengths themselves are
    exact_lengths: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.positions < 1:
            raise ValueError(f"data.budget: frames={self.frames}, positions={self.positions}; both must be above 0")


@dataclass(frozen=True)
class Sizes:
    """What samples take of a budget, [N] each: frames, positions of the longest row, and rows."""

    frames: np.ndarray
    positions: np.ndarray
    rows: np.ndarray


def pack_batches(
    samples: np.ndarray, sizes: Sizes, budget: Budget, most: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Samples in batches of similar size, each within the budget and of at most `most`; in random order.

    A sample that is larger than the budget is a batch of its own.

    Args:
        samples: [n], in random order, numbers into the sizes.
    """
    frames, positions = sizes.frames[samples], sizes.positions[samples]
    length = positions * rng.uniform(1 - BLUR, 1 + BLUR, len(samples))
    # videos of about one length together (text alone by itself), and of these, rows of about one length
    kind = np.where(frames > 0, 1 + np.round(2 * np.log2(np.maximum(frames, 1))), 0)
    by_kind = np.argsort(kind, kind="stable")
    order: list[np.ndarray] = []
    for group in np.split(by_kind, np.flatnonzero(np.diff(kind[by_kind])) + 1):
        for start in range(0, len(group), POOL * most):
            pool = group[start : start + POOL * most]
            order.append(pool[np.argsort(length[pool], kind="stable")])
    arranged = np.concatenate(order) if order else np.zeros(0, np.int64)
    cuts = _cuts(frames[arranged], positions[arranged], sizes.rows[samples][arranged], budget, most)
    batches = np.split(samples[arranged], cuts)
    return [batches[n] for n in rng.permutation(len(batches))]


def _cuts(frames: np.ndarray, positions: np.ndarray, rows: np.ndarray, budget: Budget, most: int) -> list[int]:
    """Where batches end, when samples are taken in order for as long as the budget allows."""
    cuts, count, held, taken, longest = [], 0, 0, 0, 0.0
    for place, (more, long, own) in enumerate(zip(frames.tolist(), positions.tolist(), rows.tolist(), strict=True)):
        longest_now = max(longest, long)
        full = count == most or held + more > budget.frames or (taken + own) * longest_now > budget.positions
        if count and full:
            cuts.append(place)
            count, held, taken, longest_now = 0, 0, 0, long
        count, held, taken, longest = count + 1, held + more, taken + own, longest_now
    return cuts


def with_count(batches: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """As many batches as wanted: the largest are halved, or the last left out. In random order these are any; the
    smallest would always be those of the longest samples.

    Raises:
        ValueError: there are not enough samples.
    """
    # by size, and of equal ones the first: places are paths of halves below a batch, and sort as these lie in order
    found: list[tuple[int, tuple[int, ...], np.ndarray]] = [(-len(b), (n,), b) for n, b in enumerate(batches)]
    heapq.heapify(found)
    while len(found) < count:
        size, place, largest = found[0] if found else (0, (), np.zeros(0, np.int64))
        if size > -2:
            raise ValueError(f"{sum(map(len, batches))} samples do not make {count} batches")
        first, second = largest[: -size // 2], largest[-size // 2 :]
        heapq.heapreplace(found, (-len(first), (*place, 0), first))
        heapq.heappush(found, (-len(second), (*place, 1), second))
    return [batch for _, _, batch in sorted(found, key=lambda each: each[1])[:count]]


def split_over_ranks(batch: np.ndarray, sizes: Sizes, ranks: int) -> list[np.ndarray]:
    """The parts of a batch for each of the ranks: one sample in turn, those with the most rows first.

    So a rank has at most its share of the rows and the rows of one sample more, and at most one sample more than
    another. Samples are repeated where a batch holds fewer than there are ranks: no rank waits forever.
    """
    if ranks == 1:
        return [batch]
    order = batch[np.lexsort((-sizes.positions[batch], -sizes.frames[batch], -sizes.rows[batch]))]
    order = np.resize(order, max(len(order), ranks))
    return [order[rank::ranks] for rank in range(ranks)]


def group_by_rank(batches: Sequence[np.ndarray], ranks: int) -> list[list[np.ndarray]]:
    """Batches of one rank each, so many of them next to each other, so that every sample comes once. The largest are
    halved to make them go up; samples are repeated only where there are too few."""
    wanted = -(-len(batches) // ranks) * ranks
    if sum(map(len, batches)) < wanted:
        own = np.split(np.resize(np.concatenate(batches), wanted), wanted)
    else:
        own = with_count(batches, wanted)
    return [own[start : start + ranks] for start in range(0, wanted, ranks)]


def cost(batch: np.ndarray, sizes: Sizes) -> tuple[float, float]:
    """What a batch takes of a budget: frames, and rows times the longest one's positions."""
    return float(sizes.frames[batch].sum()), float(sizes.rows[batch].sum() * sizes.positions[batch].max())


def queries(frames: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray) -> float:
    """At most so often frames of a batch are looked at, where each row looks at the frames of its video by itself:
    those of all videos times the most rows of one, since all are given equal room.

    Args:
        frames, rows: of each video.
    """
    frames, rows = np.asarray(frames), np.asarray(rows)
    return float(frames.sum() * rows[frames > 0].max(initial=0))


@dataclass(frozen=True)
class Load:
    """What may take memory in a batch: shares of a budget's `frames` and `positions`, and `queries`."""

    frames: float
    positions: float
    queries: float


# What may take most memory: frames and positions together, each by itself, and queries, which no budget limits.
MEASURES: tuple[Callable[[Load], float], ...] = (
    lambda load: load.frames + load.positions,
    lambda load: load.frames,
    lambda load: load.positions,
    lambda load: load.queries,
)


def costliest(batches: Sequence[np.ndarray], sizes: Sizes, budget: Budget, count: int) -> list[np.ndarray]:
    """The batches, or parts of batches, that take most by some of `MEASURES`: so many by each."""

    def load(batch: np.ndarray) -> Load:
        frames, positions = cost(batch, sizes)
        own = queries(sizes.frames[batch], sizes.rows[batch])
        return Load(frames / budget.frames, positions / budget.positions, own)

    taken = [load(batch) for batch in batches]
    first = [sorted(range(len(batches)), key=lambda n: of(taken[n]), reverse=True)[:count] for of in MEASURES]
    return [batches[number] for number in dict.fromkeys(chain.from_iterable(first))]
