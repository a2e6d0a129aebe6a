"""Seeds of the samples that the simulator makes, by split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEEDS = 500_000  # of a split
FIRST_SEEDS = {"train": 0, "val": SEEDS, "test": 2 * SEEDS}  # no seed is in two splits


def split_seeds(options: Mapping[str, Any]) -> dict[str, range]:
    """The seeds of each split, as many as `options` names for it; empty for a split of 0.

    Raises:
        ValueError: fewer than none, or so many that they would be those of the next split too.
    """
    counts = {split: int(options[split]) for split in FIRST_SEEDS}
    for split, count in counts.items():
        if not 0 <= count <= SEEDS:
            raise ValueError(f"{split}={count}: a split has 0 (none) to {SEEDS} samples")
    return {split: range(first, first + counts[split]) for split, first in FIRST_SEEDS.items()}
