"""Replaces the processes of a closed-loop evaluation: the first episode ends at once, the others do not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from keygrip.evaluation.closed_loop import EpisodeResult

FIRST = 1_000_000


def start(checkpoint: Path, settings: Any) -> None:
    """Loads nothing."""


def work(job: Any) -> EpisodeResult:
    if job.seed != FIRST:
        time.sleep(60)
    return EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None)
