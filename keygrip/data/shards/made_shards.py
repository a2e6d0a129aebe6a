"""Shards that the program generates, and the choice of held-out samples."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hydra.utils import get_method

from keygrip.artifacts import make_once
from keygrip.data.shards.index import MANIFEST
from keygrip.data.shards.reader import ShardSet
from keygrip.training.parts import data_part

log = logging.getLogger(__name__)


@data_part(from_checkpoint={"make_missing": False}, plain=["options"], makers=["maker"])
@dataclass(frozen=True)
class MadeShards:
    """Shards that the program generates if they are missing.

    The maker is imported only if shards are missing.

    Args:
        maker: dotted name of a function that is called with `root` and `options`, and generates a complete set there.
        options: plain values for the maker.
        folder: parent folder of the sets; each set has its own subfolder, named by a hash of the maker and its options.
        name: beginning of the subfolder's name.
        make_missing: False: missing shards are an error (nothing in a checkpoint starts generating shards).
    """

    maker: str
    options: Mapping[str, Any]
    folder: str | Path = "data"
    name: str = "shards"
    make_missing: bool = True
    # Options that the hash has under a former name, so that sets made before a new name keep their folder.
    hashed_as: ClassVar[Mapping[str, str]] = {}

    @property
    def root(self) -> Path:
        """The set's folder. The hash in its name does not depend on the number of processes."""
        counted = {self.hashed_as.get(key, key): value for key, value in self.options.items() if key != "processes"}
        content = json.dumps({"maker": self.maker, **counted}, sort_keys=True, default=str)
        return Path(self.folder) / f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def is_whole(self, root: Path) -> bool:
        """Whether every split that the options request is complete, that is, has a manifest, which is written last."""
        asked = {"train", *(split for split in ("val", "test") if self.options.get(split))}
        return all((root / split / MANIFEST).is_file() for split in asked)

    def complete(self) -> None:
        """Generate missing shards and log this. Several processes may call it: one generates, the others wait."""
        make_once(self.root, self.is_whole, self._make)

    def _make(self, root: Path) -> None:
        log.info("%s is not complete: making its shards", root)
        get_method(self.maker)(root=root, options=dict(self.options))


def complete_sets(sets: Mapping[str, MadeShards]) -> None:
    """Generate missing shards of several sets.

    Args:
        sets: by the setting that names the folder of existing shards instead.

    Raises:
        FileNotFoundError: Shards are missing that may not be generated; the message names those of all sets.
    """
    kept = {setting: made.root for setting, made in sets.items() if not made.make_missing}
    missing = {setting: root for setting, root in kept.items() if not sets[setting].is_whole(root)}
    if missing:
        folders = dict.fromkeys(map(str, missing.values()))
        raise FileNotFoundError(
            f"no complete shards of the run in {', '.join(folders)}: if they are elsewhere, give "
            f"{' '.join(f'{setting}=FOLDER' for setting in missing)}; otherwise train with the same settings again, "
            "which makes them"
        )
    for made in sets.values():
        made.complete()


def held_out(shards: ShardSet, fraction: float) -> np.ndarray:
    """Return bool [N], True for the validation samples of a set without splits; depends on each sample's key alone."""
    threshold = int(fraction * 2**32)
    keys = (key for shard in range(len(shards.shards)) for key in shards.index(shard).keys.tolist())
    draws = (hashlib.sha256(key.encode()).digest()[:4] for key in keys)
    return np.array([int.from_bytes(draw, "big") < threshold for draw in draws], dtype=bool)
