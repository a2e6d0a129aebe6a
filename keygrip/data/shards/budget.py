"""Form batches within a budget of frames and positions, not with a fixed number of samples, so that they fit in memory.

A batch holds similar samples, as many as the budget allows. Like everything about the order of samples, the batches are
a pure function of (seed, epoch).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from keygrip.training.parts import data_part

POOL = 128  # batches among which a bucket's samples are sorted by length
BLUR = 0.03  # random relative change of each length, so that batches change between epochs in small buckets too
# One spare batch is planned per this many: the number of filled batches varies a little, and all epochs must have the
# same number.
SLACK = 100


@data_part
@dataclass(frozen=True)
class Budget:
    """Upper limits for a batch, over all processes together.

    Args:
        frames: total number of frames of its videos. positions: positions of the language model for all rows of the
            batch: the number of rows times the length of the longest row, visual and text tokens together.
        exact_lengths: True: encode every text once before training begins, and plan batches with the exact numbers of
            tokens. False: estimate tokens from characters, at a rate measured on a few texts; this causes much more
            padding and is meant for remote shards that are too large to be read once beforehand.

    Raises:
        ValueError: a limit is below 1.
    """

    frames: int
    positions: int
    # repr=False: not part of the fingerprint of an order, which contains the lengths themselves
    exact_lengths: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.positions < 1:
            raise ValueError(f"data.budget: frames={self.frames}, positions={self.positions}; both must be above 0")


@dataclass(frozen=True)
class Sizes:
    """The parts of a budget that samples use, [N] each: frames, positions of the longest row, and rows."""

    frames: np.ndarray
    positions: np.ndarray
    rows: np.ndarray


def pack_batches(
    samples: np.ndarray, sizes: Sizes, budget: Budget, most: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Pack samples of similar size into batches within the budget, of at most `most` samples; in random order.

    A sample that is larger than the budget becomes a batch of its own.

    Args:
        samples: [n], in random order, indices into `sizes`.
    """
    frames, positions = sizes.frames[samples], sizes.positions[samples]
    length = positions * rng.uniform(1 - BLUR, 1 + BLUR, len(samples))
    # group videos of similar length (samples without frames separately), and within these, rows of similar length
    kind = np.where(frames > 0, 1 + np.round(2 * np.log2(np.maximum(frames, 1))), 0)
    by_kind = np.argsort(kind, kind="stable")
    order: list[np.ndarray] = []
    for group in np.split(by_kind, np.flatnonzero(np.diff(kind[by_kind])) + 1):
        for start in range(0, len(group), POOL * most):
            pool = group[start : start + POOL * most]
            order.append(pool[np.argsort(length[pool], kind="stable")])
    arranged = np.concatenate(order) if order else np.zeros(0, np.int64)
    cuts = _find_batch_ends(frames[arranged], positions[arranged], sizes.rows[samples][arranged], budget, most)
    batches = np.split(samples[arranged], cuts)
    return [batches[n] for n in rng.permutation(len(batches))]


def _find_batch_ends(
    frames: np.ndarray, positions: np.ndarray, rows: np.ndarray, budget: Budget, max_samples: int
) -> list[int]:
    """Return where batches end if each batch takes the next samples in order as long as the budget allows."""
    cuts, count, frame_count, row_count, longest = [], 0, 0, 0, 0.0
    for index, (new_frames, new_length, new_rows) in enumerate(
        zip(frames.tolist(), positions.tolist(), rows.tolist(), strict=True)
    ):
        longest_now = max(longest, new_length)
        full = (
            count == max_samples
            or frame_count + new_frames > budget.frames
            or (row_count + new_rows) * longest_now > budget.positions
        )
        if count and full:
            cuts.append(index)
            count, frame_count, row_count, longest_now = 0, 0, 0, new_length
        count, frame_count, row_count, longest = count + 1, frame_count + new_frames, row_count + new_rows, longest_now
    return cuts


def with_count(batches: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return exactly `count` batches: halve the largest ones, or leave out the last ones. The batches are in random
    order, so the last ones are arbitrary; leaving out the smallest would always omit the longest samples.

    Raises:
        ValueError: there are not enough samples.
    """
    # a heap by size, then by position: the position of a part is the path of halves from its batch, and sorts in order
    heap: list[tuple[int, tuple[int, ...], np.ndarray]] = [(-len(b), (n,), b) for n, b in enumerate(batches)]
    heapq.heapify(heap)
    while len(heap) < count:
        size, position, largest = heap[0] if heap else (0, (), np.zeros(0, np.int64))
        if size > -2:
            raise ValueError(f"{sum(map(len, batches))} samples do not make {count} batches")
        first, second = largest[: -size // 2], largest[-size // 2 :]
        heapq.heapreplace(heap, (-len(first), (*position, 0), first))
        heapq.heappush(heap, (-len(second), (*position, 1), second))
    return [batch for _, _, batch in sorted(heap, key=lambda each: each[1])[:count]]


def split_over_ranks(batch: np.ndarray, sizes: Sizes, ranks: int) -> list[np.ndarray]:
    """Split a batch over the ranks: samples are dealt out in turn, those with the most rows first.

    A rank therefore has at most its share of the rows plus the rows of one sample, and at most one sample more than
    another rank. If a batch has fewer samples than there are ranks, samples are repeated so that no rank waits forever.
    """
    if ranks == 1:
        return [batch]
    order = batch[np.lexsort((-sizes.positions[batch], -sizes.frames[batch], -sizes.rows[batch]))]
    order = np.resize(order, max(len(order), ranks))
    return [order[rank::ranks] for rank in range(ranks)]


def group_by_rank(batches: Sequence[np.ndarray], ranks: int) -> list[list[np.ndarray]]:
    """Group batches that are each for a single rank into groups of `ranks`, so that every sample occurs once. The
    largest are halved until their number is a multiple of `ranks`; samples are repeated only if there are too few."""
    total = -(-len(batches) // ranks) * ranks
    if sum(map(len, batches)) < total:
        rank_batches = np.split(np.resize(np.concatenate(batches), total), total)
    else:
        rank_batches = with_count(batches, total)
    return [rank_batches[start : start + ranks] for start in range(0, total, ranks)]


def cost(batch: np.ndarray, sizes: Sizes) -> tuple[float, float]:
    """Return what a batch uses of a budget: frames, and the number of rows times the positions of the longest row."""
    return float(sizes.frames[batch].sum()), float(sizes.rows[batch].sum() * sizes.positions[batch].max())


def queries(frames: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray) -> float:
    """Return an upper bound for the number of (row, frame) pairs in a batch, for models in which each row attends to
    the frames of its video separately: the frames of all videos times the most rows of one video, since rows are padded
    to the same number for every video.

    Args:
        frames, rows: of each video.
    """
    frames, rows = np.asarray(frames), np.asarray(rows)
    return float(frames.sum() * rows[frames > 0].max(initial=0))


@dataclass(frozen=True)
class Load:
    """The quantities of a batch that need memory: shares of a budget's `frames` and `positions`, and `queries`."""

    frames: float
    positions: float
    queries: float


# Measures by which a batch may need the most memory: frames and positions together, each of the two alone, and queries,
# which no budget limits.
MEASURES: tuple[Callable[[Load], float], ...] = (
    lambda load: load.frames + load.positions,
    lambda load: load.frames,
    lambda load: load.positions,
    lambda load: load.queries,
)


def costliest(batches: Sequence[np.ndarray], sizes: Sizes, budget: Budget, count: int) -> list[np.ndarray]:
    """Return the batches (or parts of batches) that are largest by one of `MEASURES`: `count` for each measure."""

    def load(batch: np.ndarray) -> Load:
        frames, positions = cost(batch, sizes)
        query_count = queries(sizes.frames[batch], sizes.rows[batch])
        return Load(frames / budget.frames, positions / budget.positions, query_count)

    loads = [load(batch) for batch in batches]
    first = [sorted(range(len(batches)), key=lambda n: measure(loads[n]), reverse=True)[:count] for measure in MEASURES]
    return [batches[index] for index in dict.fromkeys(chain.from_iterable(first))]
