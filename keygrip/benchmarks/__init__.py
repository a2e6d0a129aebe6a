"""Cases of ``python -m keygrip.bench``: what keygrip costs, measured side by side in one run.

A case is a frozen dataclass of options, built from ``conf/bench.yaml``, whose ``run(quick)`` returns figures by name; a
figure's unit stands in its name. New cases need an entry in that file and nothing else.
"""

from __future__ import annotations

from typing import Protocol


class Case(Protocol):
    """Something to measure."""

    def run(self, quick: bool) -> dict[str, float]:
        """The figures; ``quick`` takes fewer repetitions, so that it ends within 40 s on two cores."""
        ...
