"""Replaces parts of the processes of a closed-loop evaluation: with `work` the first episode ends at once, the others
do not; with `start_closing` every episode ends at once, and each process writes that it has closed its environment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from keygrip.evaluation import closed_loop
from keygrip.evaluation.closed_loop import EpisodeResult

FIRST = 1_000_000


def start(checkpoint: Path, settings: Any) -> None:
    """Loads nothing."""


def work(job: Any) -> EpisodeResult:
    if job.seed != FIRST:
        time.sleep(60)
    return EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None)


class ClosingWorker:
    """Takes the place of a loaded policy with its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def episode(self, job: Any) -> EpisodeResult:
        (self.folder / f"worked-{os.getpid()}").touch()
        return EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None)

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()


def start_closing(checkpoint: Path, settings: Any) -> None:
    closed_loop._worker = ClosingWorker(checkpoint)  # type: ignore[assignment]
