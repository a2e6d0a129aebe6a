"""``python -m keygrip.bench suite=gpu``: what only a GPU can say, one part after the other.

A part is a frozen dataclass of options, built from ``conf/bench.yaml`` (``gpu``), whose ``run(toy, figures)`` fills in
figures as it finds them, so that those before a failure are kept. ``toy`` is for tests: the same code at a size that a
CPU computes in seconds. All weights are random.
"""

from __future__ import annotations

from typing import Protocol

Figures = dict[str, float]


class Part(Protocol):
    """Something to measure on a GPU."""

    def run(self, toy: bool, figures: Figures) -> None:
        """Adds figures by name, with the unit in the name."""
        ...
