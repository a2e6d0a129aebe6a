"""What is flushed to the disk, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Flushes:
    """Records every `os.fsync` from now on: the size of the file or folder, and whether `target` was there already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
        self.target = target
        self._seen: dict[tuple[int, int, bool], int] = {}  # by inode and size, how often
        monkeypatch.setattr(os, "fsync", self._flush)

    def _flush(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        key = state.st_ino, state.st_size, self.target.exists()
        self._seen[key] = self._seen.get(key, 0) + 1

    def before_target(self, path: Path) -> int:
        """Return how often a path was flushed, with its present content, before the target had its name."""
        state = path.stat()
        return self._seen.get((state.st_ino, state.st_size, False), 0)

    def after_target(self, path: Path) -> int:
        """Return how often a path was flushed, as it is, since the target has its name."""
        state = path.stat()
        return self._seen.get((state.st_ino, state.st_size, True), 0)
