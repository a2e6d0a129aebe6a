"""Seeds of simulated samples, by split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEEDS = 500_000  # number of seeds of a split
FIRST_SEEDS = {"train": 0, "val": SEEDS, "test": 2 * SEEDS}  # no seed is in two splits


def split_seeds(options: Mapping[str, Any]) -> dict[str, range]:
    """Return the seeds of each split, as many as `options` gives for it; empty for a split of 0.

    Raises:
        ValueError: A number is negative, or so large that the seeds would overlap with those of the next split.
    """
    counts = {split: int(options[split]) for split in FIRST_SEEDS}
    for split, count in counts.items():
        if not 0 <= count <= SEEDS:
            raise ValueError(f"{split}={count}: a split has 0 (none) to {SEEDS} samples")
    return {split: range(first, first + counts[split]) for split, first in FIRST_SEEDS.items()}
