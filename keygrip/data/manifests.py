"""``prepare step=manifest``: list the contents of a data set of any kind, with hashes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keygrip.data.image_text.bucket_folders import encoders_of, incomplete_sets, write_info
from keygrip.data.image_text.crops import BUCKET_NAME, Bucket
from keygrip.data.image_text.samples import describe_image_text, is_image_text
from keygrip.data.robot import integrity, native
from keygrip.data.shards.index import SPLITS, Parts, Row, lower_case
from keygrip.data.shards.remote import is_remote
from keygrip.data.shards.writer import compressed_shards, tar_files, write_manifest
from keygrip.data.video_text.conversations import describe_video_text

log = logging.getLogger(__name__)


def make_manifests(root: Path | str, again: bool = False, max_broken_share: float = 0.1) -> dict[str, Any]:
    """Write the manifests of native recordings or of shards that have none.

    Args:
        root: folder of a data set. again: also rewrite existing manifests.
        max_broken_share: a larger share of broken recordings or shards is an error.

    Raises:
        ValueError: too many recordings or shards are broken. FileNotFoundError: there are none.
    """
    if "://" not in str(root) and Path(root).is_dir() and native.detect(Path(root)):
        return integrity.make_manifests(root, again, max_broken_share)
    return make_shard_manifests(root, again, max_broken_share)


def describe(parts: Parts) -> Row:
    """Return the columns of an image-text or video-text sample; its parts determine which of the two it is."""
    parts = lower_case(parts)
    return describe_image_text(parts) if is_image_text(parts) else describe_video_text(parts)


def split_folders(root: Path | str, sought: str = "shards") -> list[str]:
    """Return the folders of the shard sets at a root: the root itself or its splits, or the buckets in these.

    Args:
        root: folder of a data set. sought: what was looked for there, for the error.

    Raises:
        FileNotFoundError: the root does not exist or has no shards. ValueError: the root is a URL; or it has shards
            both inside and outside its splits (or buckets), and training would read only one of the two; or the name of
            a bucket's folder is not a valid bucket name.
    """
    if is_remote(root):
        raise ValueError(f"{root} is a URL: manifests are made and shards validated where the files lie")
    if not Path(root).exists():
        raise FileNotFoundError(f"data folder {root} does not exist; name a folder of recordings or shards")
    unsplit, *splits = (_find_shard_sets(place) for place in (Path(root), *(Path(root) / split for split in SPLITS)))
    divided = [folder for split in splits for folder in split]
    if unsplit and divided:
        raise ValueError(
            f"{root} has shards in {unsplit[0]} and in {divided[0]}: bring all of them into train/, val/ and test/, or "
            "all out of these"
        )
    if not unsplit and not divided:
        raise FileNotFoundError(f"no {sought} (*.tar) in {root}, its train/, val/ and test/, or bucket_*/ in these")
    return unsplit or divided


def has_buckets(root: Path | str, folders: Iterable[str]) -> bool:
    """Return whether the folders of a root (`split_folders`) are aspect buckets, which `images.json` lists."""
    return any(Path(folder).name.startswith("bucket_") and Path(folder) != Path(root) for folder in folders)


def _find_shard_sets(root: Path) -> list[str]:
    """Return the shard sets of a split: its folder, or the buckets in it.

    Raises:
        ValueError: both have shards, or a folder's name is not a valid bucket name.
    """
    folders = [
        folder
        for folder in (root, *sorted(root.glob("bucket_*")))
        if folder.is_dir() and (tar_files(folder) or compressed_shards(folder))
    ]
    buckets = [folder for folder in folders if folder != root]
    for folder in buckets:
        if not BUCKET_NAME.match(folder.name) or Bucket.from_name(folder.name).name != folder.name:
            raise ValueError(
                f"{folder} holds shards that training would not read as part of {root}: buckets of images are called "
                "bucket_<width>x<height>, in pixels; rename the folder, or name it as a root of its own"
            )
    if len(folders) > len(buckets) > 0:
        raise ValueError(
            f"{root} has shards and so has {buckets[0]}, and training would read the ones or the others: bring all of "
            "them into one folder, or move it away and name it as a root of its own"
        )
    return [str(folder) for folder in folders]


def tar_files_below(root: Path | str) -> list[Path]:
    """Return all tar files at any depth below a folder, including compressed ones."""
    folders = [Path(root), *(path for path in sorted(Path(root).rglob("*")) if path.is_dir())]
    return [path for folder in folders for path in (*tar_files(folder), *compressed_shards(folder))]


def make_shard_manifests(root: Path | str, again: bool = False, max_broken_share: float = 0.1) -> dict[str, Any]:
    """Index the shards of a set (or of its splits) that have no index, and write the manifests.

    Args:
        root: folder of shards. again: index all shards again.
        max_broken_share: a larger share of broken shards is an error.

    Raises:
        ValueError: the root is a set of `step=images` that is not complete, or an `images.json` of its buckets is
            damaged, or its splits have different encoders; or as `split_folders` and `write_manifest`.
        FileNotFoundError: there are no shards.
    """
    if incomplete := incomplete_sets(Path(root)):
        raise ValueError(incomplete[0])  # an images.json written here would make the set complete for training
    report: dict[str, Any] = {"root": str(root), "shards": 0, "samples": 0, "broken": 0, "bad_samples": 0}
    folders = split_folders(root, "native recordings and no shards")
    in_buckets = has_buckets(root, folders)
    # before anything is written: splits of different encoders are no set; other shards may lie beside an images.json of
    # another program
    encoders = encoders_of(Path(root)) if in_buckets else None
    elsewhere = [path for path in tar_files_below(root) if str(path.parent) not in folders]
    if elsewhere:
        log.warning(
            "%d tar files below %s lie in folders that are not read as part of this set; the first: %s. Name the "
            "folder as root, or bring them into train/, val/ and test/",
            len(elsewhere),
            root,
            elsewhere[0],
        )
    for folder in folders:
        manifest = write_manifest(folder, describe, max_broken_share, again)
        report["shards"] += len(manifest["shards"])
        report["samples"] += manifest["samples"]
        report["broken"] += len(manifest["broken"])
        report["bad_samples"] += sum(len(reasons) for reasons in manifest["bad_samples"].values())
    if in_buckets:
        write_info(root, encoders)
    return report
