"""Rows of different lengths one behind the other in bins, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Positions up to which bins may be longer than the longest row. Where no two rows fit into one as long as that, nothing
# is saved; but attention is computed over whole bins, with a mask as wide as they are.
BIN = 256


def bins_of(lengths: Sequence[float]) -> tuple[list[list[int]], float]:
    """Rows in bins, and how long all these are: as long as the longest row, twice, four times as long and so on up to
    `BIN`, or `BIN`, whichever takes the fewest positions, cut to the fullest. No row is divided."""
    longest = max(lengths, default=0)
    rooms, room = [longest], 2 * longest
    while longest and room < BIN:
        rooms.append(room)
        room *= 2
    if longest < BIN:
        rooms.append(BIN)
    found = [_filled(lengths, room) for room in rooms]
    return min(found, key=lambda each: len(each[0]) * each[1])  # of equal ones the shortest


def _filled(lengths: Sequence[float], room: float) -> tuple[list[list[int]], float]:
    """The longest row first, each into the first bin with room; and what is in the fullest."""
    bins: list[list[int]] = []
    left: list[float] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((n for n, free in enumerate(left) if free >= lengths[row]), len(bins))
        if place == len(bins):
            bins.append([])
            left.append(room)
        bins[place].append(row)
        left[place] -= lengths[row]
    return bins, room - min(left, default=room)


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`count` numbers from `first` on, of each pair one behind the other, int64 [sum of `count`]."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))


def positions_of(lengths: Sequence[float], packed: bool) -> float:
    """How many positions rows take: each as long as the longest, or in bins."""
    if packed:
        bins, room = bins_of(lengths)
        return len(bins) * room
    return len(lengths) * max(lengths, default=0)
