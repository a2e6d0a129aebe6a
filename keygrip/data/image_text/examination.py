"""Examination of shards of images with text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from keygrip.data.image_text.near_copies import near_copies, thumbnail_in
from keygrip.data.image_text.samples import (
    IMAGE,
    LATENT,
    MORE_TEXT,
    NEEDED,
    PATCHES,
    TEXT,
    TEXT_MASK,
    captions_of,
    read_image_text,
)
from keygrip.data.shards.examination import NAMED_AT_MOST, ShardReport, digest_of, unknown_member
from keygrip.data.shards.index import SPLITS, Parts
from keygrip.data.shards.reader import ShardSet

log = logging.getLogger(__name__)


def examine_image_text(shards: ShardSet, sample: int, parts: Parts, report: ShardReport) -> None:
    """Count which parts an image sample has, and read the sample if it is complete.

    A sample that lacks a part is skipped in training: it is counted and is not a problem.

    Raises:
        BadSample: a part cannot be read, or parts do not belong together.
    """
    report.has["images"] += 1
    report.has["latents"] += LATENT in parts
    report.has["patches"] += PATCHES in parts
    report.has["text"] += TEXT in parts and TEXT_MASK in parts
    name = shards.where(sample)
    if not set(NEEDED) - set(parts):
        report.has["complete"] += 1
        content = read_image_text(shards, sample, with_image=True)
        for caption in range(1, len(captions_of(content.record))):
            read_image_text(shards, sample, caption=caption)
        if (source := content.record.get("source")) is not None:
            name = f"{source} ({name})"
        if not content.record.get("caption"):
            report.has["without_caption"] += 1
        if (thumbnail := thumbnail_in(content.record)) is not None:
            report.thumbnails[name] = thumbnail
    unknown = [name for name in parts if name not in (*NEEDED, IMAGE) and not MORE_TEXT.match(name)]
    if unknown:
        report.problems.append(unknown_member(shards.where(sample), unknown[0], ", ".join(NEEDED)))
    # The digest is of the image alone: with another caption or in another file it must not be in two splits either.
    report.contents.append((digest_of({LATENT: parts[LATENT]} if LATENT in parts else parts), name))


def split_of(report: ShardReport, root: Path | str) -> str:
    """Return the split to which a shard below the root belongs; "" in a set without splits."""
    folder = Path(report.name).relative_to(root).parts[0]
    return folder if folder in SPLITS else ""


def report_near_copies(root: Path | str, reports: Sequence[ShardReport]) -> int | None:
    """Warn about images that look nearly the same: held-out images compared with those of train/, or all images of a
    set without splits, which is divided by keys. Return their number; None if fewer than two images have a thumbnail.
    """
    thumbnails: dict[str, dict[str, bytes]] = {}
    for report in reports:
        thumbnails.setdefault(split_of(report, root), {}).update(report.thumbnails)
    images, thumbnail_count = sum(report.has["complete"] for report in reports), sum(map(len, thumbnails.values()))
    if thumbnail_count < 2:
        return None
    if thumbnail_count < images:
        log.warning(
            "%d of %d images have no thumbnail, and no near copies were looked for", images - thumbnail_count, images
        )
    pool = thumbnails.get("train") or thumbnails.get("") or {}
    names, count = list(pool), 0
    for split, split_thumbnails in thumbnails.items():
        if split == "train":
            continue
        pairs = near_copies(list(split_thumbnails.values()), None if split_thumbnails is pool else list(pool.values()))
        count += len(pairs)
        split_names = list(split_thumbnails)
        pair_names = [f"{split_names[index]} and {names[copy]}" for index, copy in pairs[:NAMED_AT_MOST]]
        if pairs and split:
            log.warning(
                "%d images of %s/ are near copies of images of train/: %s", len(pairs), split, "; ".join(pair_names)
            )
        elif pairs:
            log.warning(
                "%d images are near copies of another one; a set without val/ is divided by keys, and copies may be "
                "trained on and held out: %s",
                len(pairs),
                "; ".join(pair_names),
            )
    return count


def image_counts(root: Path | str, reports: Sequence[ShardReport]) -> dict[str, dict[str, int]]:
    """Return for each folder how many images have which parts; empty for other kinds of shards."""
    counts: dict[str, dict[str, int]] = {}
    for report in reports:
        if report.has:
            name = Path(report.name).parent.relative_to(root).as_posix()
            row = counts.setdefault(name, dict.fromkeys(("images", "complete", "latents", "patches", "text"), 0))
            for part_name, count in report.has.items():
                row[part_name] = row.get(part_name, 0) + count
    for name, row in counts.items():
        log.info("%s: %s", name, ", ".join(f"{count} {part_name}" for part_name, count in row.items()))
    return counts
