"""Folders of image shards in aspect buckets, and `images.json`, which lists their buckets and encoders.

A root contains `bucket_<width>x<height>/` folders, each a shard set; or `train/`, `val/` and optionally `test/` with
such folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from keygrip.artifacts import write_json
from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import BUCKET_NAME, Bucket
from keygrip.data.image_text.encoder_settings import differing_settings
from keygrip.data.shards.index import MANIFEST, SPLITS
from keygrip.data.shards.made_shards import MadeShards
from keygrip.data.shards.remote import cache_of, is_remote
from keygrip.data.untrusted_files import read_json
from keygrip.training.parts import data_part

SCHEMA = "keygrip.images/1"
INFO = "images.json"
MAKE_AGAIN = "make it again with step=manifest, or, for a set of step=images, with the same step=images command"
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
    """Read `images.json`; for a local folder without this file, return the same information from the existing buckets
    and from the `images.json` of its splits.

    Raises:
        FileNotFoundError: there is no such folder, or no bucket in it. ValueError: the file is damaged or of another
            kind; or the local folder or a split of it is a set of `step=images` that is not complete; or a local
            folder has other buckets or encoders than the file says (see `find_contradictions`).
    """
    if is_remote(root):
        return _read_object(cache_of(root, cache_dir).fetch(INFO, fresh=True), root)
    folder = Path(root)
    if found := [*incomplete_sets(folder), *find_contradictions(folder)]:
        raise ValueError(found[0])
    content = _stored_info(folder)
    if content is None:
        splits = buckets_by_split(folder)
        if not splits:
            raise FileNotFoundError(
                f"no bucket_<width>x<height>/{MANIFEST} in {root} or its train/: make shards with `python -m "
                f"keygrip.prepare step=images source=... root={root}`, or index foreign ones with step=manifest"
            )
        content = {"schema": SCHEMA, "splits": splits, "encoders": None}
    return content | {"encoders": encoders_of(folder)}


def encoders_of(root: Path) -> dict[str, Any] | None:
    """Return the encoders of a local folder: those in the `images.json` of its splits, which `step=images` wrote
    together with the shards, or else in its own; None if no file names them.

    Raises:
        ValueError: the splits have different encoders, or a file is damaged or of another kind.
    """
    by_split = _encoders_by_split(root)
    if found := _find_different_splits(root, by_split):
        raise ValueError(found[0])
    return next(iter(by_split.values()), None) or (_stored_info(root) or {}).get("encoders")


def find_contradictions(root: Path) -> list[str]:
    """Return a message for each point in which `images.json` of a local folder, by which training goes, contradicts the
    existing buckets or the `images.json` of the splits, and for splits with different encoders.

    Raises:
        ValueError: a file is damaged or of another kind.
    """
    by_split, content = _encoders_by_split(root), _stored_info(root)
    messages = _find_different_splits(root, by_split)
    if content is None:
        return messages
    listed, existing = _bucket_names(content.get("splits")), _bucket_names(buckets_by_split(root))
    differences = [
        f"{title}: {', '.join(sorted(names))}"
        for title, names in (("not named", existing - listed), ("not there", listed - existing))
        if names
    ]
    if differences:
        messages.append(
            f"{root}/{INFO}, which training goes by, names other buckets than there are ({'; '.join(differences)}): "
            f"run step=manifest root={root}"
        )
    if by_split and content.get("encoders") and not messages:
        split, encoders = next(iter(by_split.items()))
        if difference := _describe_difference(encoders, content["encoders"], (f"in {split}/{INFO}", f"in {INFO}")):
            messages.append(
                f"{root}/{INFO}, which training goes by, names other encoders than {root}/{split}/{INFO} "
                f"({difference}): run step=manifest root={root}"
            )
    return messages


def _bucket_names(splits: Any) -> set[str]:
    """Return the buckets of all splits as "train/bucket_64x64"; none if the value is not of that kind."""
    if not isinstance(splits, dict):
        return set()
    listed = ((split, names) for split, names in splits.items() if isinstance(names, list))
    return {f"{split}/{name}".lstrip("/") for split, names in listed for name in names}


def _encoders_by_split(root: Path) -> dict[str, dict[str, Any]]:
    """Return the encoders in the `images.json` of each split, where there is one that names them."""
    remedy = "run the same step=images command again"  # step=manifest writes the file of the root alone
    named = {split: (_stored_info(root / split, remedy) or {}).get("encoders") for split in SPLITS}
    return {split: encoders for split, encoders in named.items() if encoders}


def _find_different_splits(root: Path, by_split: dict[str, dict[str, Any]]) -> list[str]:
    """Return a message for each split that was made with other encoders than the first one."""
    messages = []
    for split in list(by_split)[1:]:
        first = next(iter(by_split))
        difference = _describe_difference(by_split[first], by_split[split], (f"in {first}/", f"in {split}/"))
        if difference:
            messages.append(
                f"{root}/{first} and {root}/{split} were made with different encoders ({difference}): make one of the "
                "two again with the encoders of the other, by step=images in an empty folder"
            )
    return messages


def _describe_difference(one: dict[str, Any], other: dict[str, Any], places: tuple[str, str]) -> str:
    """Return how two encoders of `images.json` differ; empty if they are the same."""
    if one.get("fingerprint") == other.get("fingerprint"):
        return ""
    settings = differing_settings(one.get("description") or {}, other.get("description") or {}, places=places)
    prints = (
        f"fingerprint {each.get('fingerprint')} {place}" for each, place in zip((one, other), places, strict=True)
    )
    return "; ".join(settings) or " and ".join(prints)


def _stored_info(folder: Path, remedy: str = MAKE_AGAIN) -> dict[str, Any] | None:
    """Return the content of a local `images.json`; None if there is no such file."""
    return _read_object(folder / INFO, str(folder), remedy) if (folder / INFO).is_file() else None


def _read_object(file: Path, root: str, remedy: str = MAKE_AGAIN) -> dict[str, Any]:
    """Read the JSON object of `images.json`; `file`: its copy, or itself. Raise ValueError if it is damaged or of
    another kind; `remedy`: what to do after a damaged file was removed."""
    try:
        content, reason = read_json(file), "it holds no JSON object"
    except BadSample as error:
        content, reason = None, error.what
    if not isinstance(content, dict):
        raise ValueError(f"{root}/{INFO} is damaged ({reason}): remove it, and {remedy}")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{root}/{INFO} is a file of {content.get('schema')!r}, not of {SCHEMA!r}")
    if not isinstance(content.get("encoders"), dict | None):
        raise ValueError(f"{root}/{INFO} is damaged (its encoders are no JSON object): remove it, and {remedy}")
    return content


@data_part(from_checkpoint={"make_missing": False}, plain=["options"], makers=["maker"])
@dataclass(frozen=True)
class MadeImages(MadeShards):
    """Image shards that the program generates if they are missing; they are complete if `images.json`, which is written
    last, exists."""

    hashed_as: ClassVar[Mapping[str, str]] = {"image": "picture"}

    def is_whole(self, root: Path) -> bool:
        return (root / INFO).is_file()
