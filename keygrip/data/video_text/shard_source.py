"""A source of a mixture: one shard set with its splits, and the selection of its samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from keygrip.data.shards.index import MANIFEST, SPLITS
from keygrip.data.shards.made_shards import MadeShards, held_out
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.remote import cache_of, is_remote
from keygrip.data.shards.set_writer import SETTINGS_FILE, settings_of
from keygrip.data.spacing import evenly
from keygrip.data.video_text.clips import SubClips
from keygrip.data.video_text.conversations import FITS
from keygrip.data.video_text.sample_types import kinds_of
from keygrip.training.parts import ReadWhere, data_part

log = logging.getLogger(__name__)

AUTO = "auto"


class OpenedSets:
    """The shard sets that sources read, each opened once: the splits of a set without `val/`, and sources with the same
    set, share one object, since the index of a large set takes gigabytes.

    Args: see `ShardSet`.
    """

    def __init__(
        self, cache_dir: str | Path | None = None, cache_gb: float = 32.0, spares_copies: bool = False
    ) -> None:
        self.cache_dir, self.cache_gb, self.spares_copies = cache_dir, cache_gb, spares_copies
        self._sets: dict[str, ShardSet] = {}
        self._held_out: dict[tuple[str, float], np.ndarray] = {}

    def open(self, folder: str) -> ShardSet:
        """Return the set of a folder or URL.

        Raises:
            FileNotFoundError, ShardError: see `ShardSet`.
        """
        if folder not in self._sets:
            self._sets[folder] = ShardSet(folder, self.cache_dir, self.cache_gb, spares_copies=self.spares_copies)
        return self._sets[folder]

    def held_out(self, folder: str, fraction: float) -> np.ndarray:
        """Return bool [N], True for the validation samples of a set that has no splits (`held_out`)."""
        if (folder, fraction) not in self._held_out:
            self._held_out[folder, fraction] = held_out(self.open(folder), fraction)
        return self._held_out[folder, fraction]


@data_part(places=["root"])
@dataclass(frozen=True)
class ShardSource:
    """One source of a mixture.

    Args:
        root: folder or URL with `train/`, `val/` and optionally `test/`, each a shard set; or one shard set, directly
            or as `train/` without `val/`, in which a share `val_fraction` of the samples is used for validation (chosen
            by a hash of the keys: always the same samples). None: use the set of `make`.
        make: how a missing set is generated.
        share: of all training samples; None: a lead source, with each sample once per epoch.
        kinds: only conversations of these kinds; None: all.
        max_samples: largest number of training samples, spread evenly; None: all.
        frames: only samples whose number of frames is within [fewest, most], for a curriculum over lengths; None: all.
        clips: of this source, in place of `data.clips`; two sources with the same set may use different clips.
        train_only: the set is not read for validation and test: another source reads its held-out samples.

    Raises:
        ValueError: a setting is invalid; the message names it.
    """

    read_where: ClassVar = {"make": ReadWhere("root", None)}
    root: str | Path | None = None
    make: MadeShards | None = None
    share: float | None = None
    kinds: Sequence[str] | None = None
    max_samples: int | None = None
    val_fraction: float = 0.02
    frames: Sequence[int] | None = None
    clips: SubClips | None = None
    train_only: bool = False

    def __post_init__(self) -> None:
        setting = "data.sources.NAME"
        if self.frames is not None and (len(self.frames) != 2 or not 0 <= self.frames[0] <= self.frames[1]):
            raise ValueError(f"{setting}.frames={list(self.frames)}: [fewest, most] frames, from 0 (text alone)")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"{setting}.max_samples={self.max_samples}: at least 1, or null for all")
        if not 0 <= self.val_fraction <= 1:
            raise ValueError(f"{setting}.val_fraction={self.val_fraction}: a share of the samples lies in 0..1")

    @property
    def place(self) -> str:
        """The root, or the folder of `make`. Raises ValueError if neither is given."""
        if self.root is not None:
            return str(self.root)
        if self.make is None:
            raise ValueError("a source needs a root: the folder or URL of its shards (data.sources.NAME.root=PATH)")
        return str(self.make.root)

    def refuse_missing(self) -> None:
        """Raise FileNotFoundError if the local folder of the shards does not exist."""
        place = self.place
        if not is_remote(place) and not Path(place).is_dir():
            raise FileNotFoundError(
                f"no shards at {place}: prepare them first (`python -m keygrip.prepare step=...`), or name another "
                "folder with data.sources.NAME.root=PATH"
            )

    def open(self, split: str, sets: OpenedSets) -> tuple[ShardSet, np.ndarray] | None:
        """Open a split: return its shard set and the indices of the split's samples; None if there is no such split.

        Args:
            sets: those that are open already; the split's set is added.

        Raises:
            FileNotFoundError: there are no shards.
        """
        if self.train_only and split != "train":
            return None
        self.refuse_missing()
        place = self.place
        folder, divided = self._folder_of(place, split, sets.cache_dir)
        if folder is None or (divided and split == "test"):
            return None
        shards = sets.open(folder)
        chosen = np.arange(len(shards))
        if divided:
            chosen = np.flatnonzero(sets.held_out(folder, self.val_fraction) == (split == "val"))
        if self.kinds is not None:
            requested_kinds = set(self.kinds)
            columns = shards.columns["kinds"].tolist()
            kinds_in = {column: kinds_of(column) for column in set(columns)}
            fits = np.array([not requested_kinds.isdisjoint(kinds_in[column]) for column in columns], bool)
            present_kinds = sorted({kind for kinds in kinds_in.values() for kind in kinds})
            missing = sorted(requested_kinds.difference(present_kinds))
            if not fits.any() or (missing and split == "train"):  # held-out samples may be few
                hint = "; an index of an earlier version parts kinds at their blanks: step=manifest again=true"
                raise ValueError(
                    f"{place} holds no conversations of {missing}; it holds {', '.join(present_kinds)}"
                    + hint * any(" " in kind for kind in requested_kinds)
                )
            chosen = chosen[fits[chosen]]
        if self.frames is not None:
            fewest, most = self.frames
            counts = shards.columns["frames"][chosen]
            chosen = chosen[(counts >= fewest) & (counts <= most)]
        if split == "train" and self.max_samples is not None and len(chosen) > self.max_samples:
            chosen = chosen[evenly(len(chosen), self.max_samples)]
        return shards, chosen

    def prepared_fit(self, cache_dir: str | Path | None = None) -> str | None:
        """Return how the frames of the set were fitted into a square when it was prepared; None if unknown (shards of
        other programs, text alone).

        Raises:
            FileNotFoundError: there are no shards. ValueError: the stored value is none of `FITS`.
        """
        self.refuse_missing()
        folder, _ = self._folder_of(self.place, "train", cache_dir)
        fit = None if folder is None else settings_of(folder, cache_dir).get("fit")
        if fit is not None and fit not in FITS:
            raise ValueError(f"{folder}/{SETTINGS_FILE} says fit={fit!r}, which is none of {', '.join(FITS)}")
        return fit

    def _folder_of(self, place: str, split: str, cache_dir: str | Path | None) -> tuple[str | None, bool]:
        """Return the shard set that contains a split (None if there is none), and whether training and validation
        divide that set.

        Raises:
            FileNotFoundError: there are no shards. ValueError: the folder and a split's subfolder are both shard sets.
        """
        if _is_shard_set(place, cache_dir):
            if not is_remote(place) and (
                other := next((s for s in SPLITS if _is_shard_set(f"{place}/{s}", None)), None)
            ):
                raise ValueError(
                    f"{place} is a shard set and so is its {other}/: bring all shards into train/, val/ and test/, or "
                    f"all out of these, delete {place}/{MANIFEST} and make it anew with `python -m keygrip.prepare "
                    f"step=manifest root={place}`"
                )
            return place, True
        train, part = f"{place.rstrip('/')}/train", f"{place.rstrip('/')}/{split}"
        if not _is_shard_set(train, cache_dir):
            raise FileNotFoundError(
                f"{place} has neither {MANIFEST} nor train/{MANIFEST}: make it with `python -m keygrip.prepare "
                f"step=manifest root={'FOLDER` where the set lies' if is_remote(place) else f'{place}`'}"
            )
        # for a set that is generated without val/, another source has the held-out samples
        if self.root is not None and split != "test" and not _is_shard_set(f"{place.rstrip('/')}/val", cache_dir):
            return train, True
        return (part if _is_shard_set(part, cache_dir) else None), False


def common_fit(sources: Mapping[str, ShardSource], given: str, cache_dir: str | Path | None = None) -> str:
    """Return how frames are fitted into a square; it must be the same in inference as in training.

    Args:
        given: one of `FITS`, or `AUTO`: as the sources were prepared.

    Raises:
        ValueError: `AUTO` is given, and the sources were prepared in different ways.
    """
    fits = {name: source.prepared_fit(cache_dir) for name, source in sources.items()}
    known_fits = {name: fit for name, fit in fits.items() if fit is not None}
    listed = ", ".join(f"{name}: {fit}" for name, fit in known_fits.items())
    if given != AUTO:
        if set(known_fits.values()) - {given}:
            log.warning("frames are read with fit=%s, and were prepared with other ones (%s)", given, listed)
        return given
    if len(set(known_fits.values())) > 1:
        raise ValueError(
            f"frames were prepared in different ways ({listed}), and a model is asked in one: prepare the sources "
            f"with one fit, or say with data.fit=... how it is asked"
        )
    return next(iter(known_fits.values()), FITS[0])


def _is_shard_set(place: str, cache_dir: str | Path | None) -> bool:
    if is_remote(place):
        return cache_of(place, cache_dir).fetch_optional(MANIFEST) is not None
    return (Path(place) / MANIFEST).is_file()
