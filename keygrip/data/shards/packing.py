"""Pack rows of different lengths into bins, to reduce padding, and count the language model's positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Bins may be longer than the longest row, up to this many positions: if no two rows fit into a bin as long as the
# longest row, packing saves nothing. Larger bins cost more: attention is computed over whole bins, with a mask of their
# width.
BIN = 256


def bins_of(lengths: Sequence[float]) -> tuple[list[list[int]], float]:
    """Pack rows into bins; return the bins and their common length. Tried lengths are the longest row, twice and four
    times that and so on up to `BIN`, and `BIN` itself. The length with the fewest positions in total is used, shortened
    to the fullest bin. No row is divided."""
    longest = max(lengths, default=0)
    rooms, room = [longest], 2 * longest
    while longest and room < BIN:
        rooms.append(room)
        room *= 2
    if longest < BIN:
        rooms.append(BIN)
    packings = [_fill_bins(lengths, room) for room in rooms]
    return min(packings, key=lambda each: len(each[0]) * each[1])  # among equal ones the shortest bins


def _fill_bins(lengths: Sequence[float], capacity: float) -> tuple[list[list[int]], float]:
    """Put each row, the longest first, into the first bin with room; return the bins and the fullest bin's length."""
    bins: list[list[int]] = []
    free_space: list[float] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        bin_index = next((n for n, free in enumerate(free_space) if free >= lengths[row]), len(bins))
        if bin_index == len(bins):
            bins.append([])
            free_space.append(capacity)
        bins[bin_index].append(row)
        free_space[bin_index] -= lengths[row]
    return bins, capacity - min(free_space, default=capacity)


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenate the ranges first[i] .. first[i] + count[i] - 1, int64 [sum of `count`]."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))


def positions_of(lengths: Sequence[float], packed: bool) -> float:
    """Return the number of positions that rows need: packed into bins, or each padded to the longest."""
    if packed:
        bins, room = bins_of(lengths)
        return len(bins) * room
    return len(lengths) * max(lengths, default=0)


def positions_of_passes(
    rows: Sequence[float], streams: Sequence[float], query_passes: float, packed: bool
) -> tuple[float, float]:
    """Return how many positions hold tokens over all passes of the language model over a batch, and how many there are
    in total.

    Args:
        rows: lengths of the rows, read in the last pass. streams: lengths of the sequences from which queries are
            predicted (`keygrip.models.foveated_vlm.rows.Streams`). query_passes: number of passes over these, or its
            mean over steps. packed: see `positions_of`.
    """
    held, total = float(sum(rows)), float(positions_of(rows, packed))
    if query_passes:
        held += query_passes * sum(streams)
        total += query_passes * positions_of(streams, packed)
    return held, total


@dataclass(frozen=True)
class RowLengths:
    """Lengths of the text rows of N samples with R rows in total.

    Args:
        frames, rows: [N], numbers of frames and of rows of each sample.
        tokens: [R], tokens of each row without its frames, sample after sample.
        prefixes: [R], those of them before the frames; None: not known, and query passes are not counted.
    """

    frames: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    prefixes: np.ndarray | None = None

    @cached_property
    def first(self) -> np.ndarray:
        """[N], the index of each sample's first row."""
        return np.asarray(np.cumsum(self.rows) - self.rows)

    def positions(
        self, samples: np.ndarray, packed: bool = False, query_passes: float = 0.0, tokens_per_frame: int = 1
    ) -> tuple[float, float]:
        """Return `positions_of_passes` for a batch of samples."""
        rows = self.rows[samples]
        frames = np.repeat(self.frames[samples], rows)
        indices = ranges(self.first[samples], rows)
        lengths = tokens_per_frame * frames + self.tokens[indices]
        streams = np.zeros(0)
        if self.prefixes is not None and query_passes:
            prefixes = np.where(frames > 0, self.prefixes[indices], 0)
            if prefixes.any():  # a stream for each row about a video
                streams = (prefixes + frames - 1)[frames > 0]
            else:  # one for each video
                shown = self.frames[samples]
                streams = shown[shown > 0] - 1
        return positions_of_passes(lengths.tolist(), streams.tolist(), query_passes, packed)
