"""Seeds of the samples that the simulator makes, by split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_SEEDS = {"train": 0, "val": 500_000, "test": 1_000_000}  # far apart: no seed is in two splits


def split_seeds(options: Mapping[str, Any]) -> dict[str, range]:
    """The seeds of each split, as many as `options` names for it; empty for a split that is not wanted."""
    return {split: range(first, first + int(options[split])) for split, first in FIRST_SEEDS.items()}
