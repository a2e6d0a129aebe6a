"""``prepare step=manifest``: what a data set holds, with hashes, whatever kind of data set it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keygrip.data.robot import integrity, native
from keygrip.data.shards import validation


def make_manifests(root: Path | str, again: bool = False, max_broken_share: float = 0.1) -> dict[str, Any]:
    """Writes the manifests of native recordings, or of shards, that have none.

    Args:
        root: folder of a data set. again: also those that have one.
        max_broken_share: more broken recordings or shards than this are an error.

    Raises:
        ValueError: too many are broken. FileNotFoundError: there is nothing.
    """
    if "://" not in str(root) and Path(root).is_dir() and native.detect(Path(root)):
        return integrity.make_manifests(root, again, max_broken_share)
    return validation.make_manifests(root, again, max_broken_share)
