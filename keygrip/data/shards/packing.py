"""Pack rows of different lengths into bins, to reduce padding."""

from __future__ import annotations

from collections.abc import Sequence

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
