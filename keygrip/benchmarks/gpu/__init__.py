"""``python -m keygrip.bench suite=gpu``: measurements that need a GPU, one part after another.

A part is a frozen dataclass of options, built from ``conf/bench.yaml`` (``gpu``), whose ``run(toy, figures)`` adds
figures when they are measured, so that those before a failure are kept. ``toy`` is for tests: the same code at a size
that a CPU computes in seconds. All weights are random.
"""

from __future__ import annotations

from typing import Protocol

Figures = dict[str, float]


class Part(Protocol):
    """A measurement on a GPU."""

    def run(self, toy: bool, figures: Figures) -> None:
        """Add figures by name, with the unit in the name."""
        ...
