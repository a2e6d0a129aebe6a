"""The time limit of a whole case with quick=true. Imports no torch, because the command imports it at its start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

QUICK_S = 30.0  # from the start of a case with quick=true; afterwards no repetition starts beyond the least number
deadlines: list[float] = []  # of `deadline`, on the clock of `time.perf_counter`


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Limit all measurements of `measuring.interleaved_seconds` within the context together to some seconds: later ones
    do only the least number of repetitions. Preparation counts, and is not interrupted."""
    deadlines.append(time.perf_counter() + seconds)
    try:
        yield
    finally:
        deadlines.pop()
