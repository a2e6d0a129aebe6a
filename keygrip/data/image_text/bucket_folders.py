"""Folders of image shards in aspect buckets, and `images.json`, which lists their buckets and encoders.

A root contains `bucket_<width>x<height>/` folders, each a shard set; or `train/`, `val/` and optionally `test/` with
such folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.artifacts import write_json
from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import BUCKET_NAME, Bucket
from keygrip.data.shards.index import MANIFEST, SPLITS
from keygrip.data.shards.made_shards import MadeShards
from keygrip.data.shards.remote import cache_of, is_remote
from keygrip.data.untrusted_files import read_json
from keygrip.training.parts import data_part

SCHEMA = "keygrip.images/1"
INFO = "images.json"
ITEMS_FILE = ".items.jsonl"  # list of images, which `step=images` writes before the first shard


def write_info(root: Path | str, encoders: dict[str, Any] | None) -> dict[str, Any]:
    """Write `images.json`: the buckets of every split, and the encoders ({"fingerprint", "description"})."""
    root = Path(root)
    info = {"schema": SCHEMA, "splits": buckets_by_split(root), "encoders": encoders}
    write_json(root / INFO, info)
    return info


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders with buckets by split; the split of a root without splits is ""."""
    found = {split: root / split for split in SPLITS if buckets_of_folder(root / split)}
    return found or ({"": root} if buckets_of_folder(root) else {})


def buckets_by_split(root: Path) -> dict[str, list[str]]:
    """Return the names of the buckets with a manifest, by split."""
    return {
        split: [bucket.name for bucket in buckets_of_folder(folder)] for split, folder in split_folders(root).items()
    }


def buckets_of_folder(folder: Path) -> list[Bucket]:
    """Return the buckets of a local folder that have a manifest."""
    names = [path.parent.name for path in folder.glob(f"bucket_*/{MANIFEST}")]
    return sorted(Bucket.from_name(name) for name in names if BUCKET_NAME.match(name))


def incomplete_sets(root: Path) -> list[str]:
    """Return a message for each set of `step=images`, the root or a split of it, whose shards are not all finished, or
    from which too many images were left out. A set that is complete has `images.json` in its own folder; that of a root
    does not make its splits complete."""
    folders = [root, *(root / split for split in SPLITS)]
    return [
        f"{folder} is not complete (no {INFO}): step=images was interrupted there, or it left out too many images; run "
        "the same step=images command again"
        for folder in folders
        if (folder / ITEMS_FILE).is_file() and not (folder / INFO).is_file()
    ]


def read_info(root: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Read `images.json`; for a local folder without this file, return the same information from the existing buckets.

    Raises:
        FileNotFoundError: there is no such folder, or no bucket in it. ValueError: the file is damaged or of another
            kind, or the local folder or a split of it is a set of `step=images` that is not complete.
    """
    if not is_remote(root) and (incomplete := incomplete_sets(Path(root))):
        raise ValueError(incomplete[0])
    if is_remote(root):
        content = _read_object(cache_of(root, cache_dir).fetch(INFO, fresh=True), root)
    elif (Path(root) / INFO).is_file():
        content = _read_object(Path(root) / INFO, root)
    else:
        splits = buckets_by_split(Path(root))
        if not splits:
            raise FileNotFoundError(
                f"no bucket_<width>x<height>/{MANIFEST} in {root} or its train/: make shards with `python -m "
                f"keygrip.prepare step=images source=... root={root}`, or index foreign ones with step=manifest"
            )
        content = {"schema": SCHEMA, "splits": splits, "encoders": None}
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{root}/{INFO} is a file of {content.get('schema')!r}, not of {SCHEMA!r}")
    return content


def _read_object(file: Path, root: str) -> dict[str, Any]:
    """Read the JSON object of `images.json`; `file`: its copy, or itself. Raise ValueError if it is damaged."""
    try:
        content, reason = read_json(file), "it holds no JSON object"
    except BadSample as error:
        content, reason = None, error.what
    if not isinstance(content, dict):
        raise ValueError(
            f"{root}/{INFO} is damaged ({reason}): remove it, and make it again with step=manifest, or, for a set of "
            "step=images, with the same step=images command"
        )
    return content


@data_part(from_checkpoint={"make_missing": False}, plain=["options"], makers=["maker"])
@dataclass(frozen=True)
class MadeImages(MadeShards):
    """Image shards that the program generates if they are missing; they are complete if `images.json`, which is written
    last, exists."""

    def is_whole(self, root: Path) -> bool:
        return (root / INFO).is_file()
