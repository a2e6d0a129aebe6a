"""Validation of shards: decodes and checks every sample before training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.artifacts import sha256_of, write_text
from keygrip.data.bad_samples import BadSample, guard, read_json
from keygrip.data.image_text.bucket_folders import INFO, buckets_there, read_info, write_info
from keygrip.data.image_text.crops import BUCKET_NAME, Bucket
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
    describe_image_text,
    is_image_text,
    read_image_text,
)
from keygrip.data.shards.index import MANIFEST, SPLITS, Parts, Row, ShardError, index_shard, lower_case
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.remote import is_remote
from keygrip.data.shards.writer import compressed_shards, tar_files, write_manifest
from keygrip.data.video_text.conversations import (
    KNOWN_MEMBERS,
    conversation_problem,
    describe_video_text,
    parse_conversations,
    parse_text,
    read_sample,
    unknown_members,
)
from keygrip.data.video_text.conversations import TEXT as TEXT_MEMBERS
from keygrip.progress import Progress

log = logging.getLogger(__name__)

NAMED_AT_MOST = 20
PROBLEMS_FILE = "problems.txt"
PROBE_SIZE = 32  # images are decoded whole and made small, since only whether they decode matters


@dataclass
class ShardReport:
    """Result of examining a shard."""

    name: str
    problems: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # that its index names, and the manifest
    keys: list[str] = field(default_factory=list)
    contents: list[tuple[str, str]] = field(default_factory=list)  # digests of images and text, and whose
    media: list[str] = field(default_factory=list)  # of images and videos alone, of samples with text
    kinds: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    has: Counter[str] = field(default_factory=Counter)  # of images with text: how many samples have what
    thumbnails: dict[str, bytes] = field(default_factory=dict)  # of images with text that have one, by name


def describe(parts: Parts) -> Row:
    """Columns of a sample of either kind, known by its parts."""
    parts = lower_case(parts)
    return describe_image_text(parts) if is_image_text(parts) else describe_video_text(parts)


def split_folders(root: Path | str) -> list[str]:
    """The shard sets at a root: itself, or its splits.

    Raises:
        FileNotFoundError: none. ValueError: the root is a URL, or has shards both beside its splits (or buckets) and in
            them, of which training would read the ones or the others; or those of a bucket that is named as none.
    """
    if is_remote(root):
        raise ValueError(f"{root} is a URL: manifests are made and shards validated where the files lie")
    whole, *splits = (_sets_in(place) for place in (Path(root), *(Path(root) / split for split in SPLITS)))
    divided = [folder for split in splits for folder in split]
    if whole and divided:
        raise ValueError(
            f"{root} has shards in {whole[0]} and in {divided[0]}: bring all of them into train/, val/ and test/, or "
            "all out of these"
        )
    if not whole and not divided:
        raise FileNotFoundError(f"no shards (*.tar) in {root}, its train/, val/ and test/, or bucket_*/ in these")
    return whole or divided


def _sets_in(place: Path) -> list[str]:
    """The shard sets of a split: its folder, or the buckets in it. Raises ValueError: both, or no bucket's name."""
    found = [
        folder
        for folder in (place, *sorted(place.glob("bucket_*")))
        if folder.is_dir() and (tar_files(folder) or compressed_shards(folder))
    ]
    buckets = [folder for folder in found if folder != place]
    for folder in buckets:
        if not BUCKET_NAME.match(folder.name) or Bucket.from_name(folder.name).name != folder.name:
            raise ValueError(
                f"{folder} holds shards that training would not read as part of {place}: buckets of images are called "
                "bucket_<width>x<height>, in pixels; rename the folder, or name it as a root of its own"
            )
    if len(found) > len(buckets) > 0:
        raise ValueError(
            f"{place} has shards and so has {buckets[0]}, and training would read the ones or the others: bring all of "
            "them into one folder, or move it away and name it as a root of its own"
        )
    return [str(folder) for folder in found]


def tar_files_below(root: Path | str) -> list[Path]:
    """Tar files anywhere below a folder, compressed ones too."""
    folders = [Path(root), *(path for path in sorted(Path(root).rglob("*")) if path.is_dir())]
    return [path for folder in folders for path in (*tar_files(folder), *compressed_shards(folder))]


def make_manifests(root: Path | str, again: bool = False, max_broken_share: float = 0.1) -> dict[str, Any]:
    """Indexes the shards of a set (or of its splits) that have no index, and writes the manifests.

    Args:
        root: folder of shards. again: index all anew. max_broken_share: more broken shards than this are an error.
    """
    report: dict[str, Any] = {"root": str(root), "shards": 0, "samples": 0, "broken": 0, "bad_samples": 0}
    folders = split_folders(root)
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
        report["bad_samples"] += sum(len(left) for left in manifest["bad_samples"].values())
    if any(Path(folder).name.startswith("bucket_") and Path(folder) != Path(root) for folder in folders):
        info = Path(root) / INFO
        known = read_info(str(root))["encoders"] if info.is_file() else None
        write_info(root, known)
    return report


def examine_shard(place: str, number: int) -> ShardReport:
    """Reads, decodes and checks everything in a shard of a set."""
    shards = ShardSet(place, quiet=True)
    entry = shards.shards[number]
    report = ShardReport(f"{place}/{entry['name']}")
    try:
        fresh = index_shard(Path(place) / entry["name"], describe)
        report.known += [f"{key} of {report.name}: {reason}" for key, reason in fresh.bad.items()]
        fresh, stored = fresh.without(fresh.bad), shards.index(number).without(fresh.bad)
        for what in ("keys", "first_part", "part_names", "part_offsets", "part_sizes"):
            if not np.array_equal(getattr(fresh, what), getattr(stored, what)):
                problem = f"{report.name}: its index is not of this tar ({what} differ): step=manifest again=true"
                report.problems.append(problem)
                return report
        for name, values in fresh.columns.items():
            for row in np.flatnonzero(values != stored.columns[name]).tolist():
                said = stored.columns[name][row]
                problem = f"{report.name}: {fresh.keys[row]} has {name} {values[row]}, its manifest says {said}"
                report.problems.append(problem)
    except ShardError as error:
        report.problems.append(str(error))
        return report
    first = shards.first_sample(number)
    for sample in range(first, first + entry["samples"]):
        report.keys.append(shards.key(sample))
        try:
            with guard(shards.where(sample)):
                parts = lower_case(shards.read(sample))
            if is_image_text(parts):
                _examine_image(shards, sample, parts, report)
                continue
            read_sample(shards, sample, PROBE_SIZE)
            conversations = parse_conversations(parse_text(parts))
        except BadSample as error:
            report.problems.append(str(error))
            continue
        unknown = unknown_members(parts)
        if unknown:
            report.problems.append(_unknown_member(shards.where(sample), unknown[0], KNOWN_MEMBERS))
        for conversation in conversations:
            report.kinds[conversation.kind] += 1
            fault = conversation_problem(conversation)
            if fault:
                report.problems.append(f"{shards.where(sample)}: {fault}")
        report.frames[int(shards.columns["frames"][sample])] += 1
        report.contents.append((_digest(parts), shards.where(sample)))
        if shown := {name: part for name, part in parts.items() if name not in TEXT_MEMBERS}:
            report.media.append(_digest(shown))
    return report


def _unknown_member(where: str, name: str, known: str) -> str:
    return f"{where}: unknown member {name!r} (known: {known}); remove it or add a decoder"


def _digest(parts: Parts) -> str:
    return sha256_of(name.encode() + b"\0" + parts[name] for name in sorted(parts))


def _examine_image(shards: ShardSet, sample: int, parts: Parts, report: ShardReport) -> None:
    """Counts what an image has, and reads what is whole. What lacks a part is skipped in training: no fault by itself,
    and only counted."""
    report.has["images"] += 1
    report.has["latents"] += LATENT in parts
    report.has["patches"] += PATCHES in parts
    report.has["text"] += TEXT in parts and TEXT_MASK in parts
    name = shards.where(sample)
    if not set(NEEDED) - set(parts):
        report.has["complete"] += 1
        try:
            found = read_image_text(shards, sample, with_image=True)
            for caption in range(1, len(captions_of(found.record))):
                read_image_text(shards, sample, caption=caption)
            if (source := found.record.get("source")) is not None:
                name = f"{source} ({name})"
            if not found.record.get("caption"):
                report.has["without_caption"] += 1
            if (thumbnail := thumbnail_in(found.record)) is not None:
                report.thumbnails[name] = thumbnail
        except BadSample as error:
            report.problems.append(str(error))
            return
    unknown = [name for name in parts if name not in (*NEEDED, IMAGE) and not MORE_TEXT.match(name)]
    if unknown:
        report.problems.append(_unknown_member(shards.where(sample), unknown[0], ", ".join(NEEDED)))
    # The image alone: with another caption or in another file it must not stand on both sides of a split either.
    report.contents.append((_digest({LATENT: parts[LATENT]} if LATENT in parts else parts), name))


def validate(root: Path | str, processes: int | None = 1) -> dict[str, Any]:
    """Looks at every sample of a set and of its splits.

    Checked: every shard is whole and agrees with its index and manifest; every sample has its text and images and
    decodes; keys and contents occur once over all splits; every conversation has answers, so that its loss mask is not
    empty. The first problems are named in the log, those before the rest that the manifest does not know; all of them
    are written into ``problems.txt`` of the root.

    Of images with text: how many have latents, patches and text, in every bucket. Samples without patches are skipped
    in training; a bucket in which all lack something is an error.

    Held-out images that are near copies of trained ones, or of a set without splits any near copies, are no errors:
    they are counted and the first ones named in the log.

    Returns:
        `errors` (how many), `problems` (the first ones), `problems_file` (with all, or None), `shards`, `samples`,
        `kinds` and `frames` (how many of each); of images with text `images`, `near_copies` (how many images have one;
        None where they were not compared), and `buckets` with the counts of each.
    """
    jobs = [
        (place, number) for place in split_folders(root) for number in range(len(ShardSet(place, quiet=True).shards))
    ]
    if processes == 1 or len(jobs) == 1:
        reports = [examine_shard(*job) for job in Progress(jobs, desc=f"validate {root}", unit="shard")]
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            futures = [pool.submit(examine_shard, *job) for job in jobs]
            reports = [f.result() for f in Progress(futures, desc=f"validate {root}", unit="shard")]
    problems = [problem for report in reports for problem in report.problems]
    problems += _repeated(reports)
    report_shared(reports)
    buckets = _image_counts(root, reports)
    for name, counts in buckets.items():
        if not counts["complete"]:
            problems.append(f"{name}: none of its {counts['images']} images has all parts ({dict(counts)})")
    problems += _listed_problems(root)
    problems += [problem for report in reports for problem in report.known]
    problems_file = _write_problems(Path(root) / PROBLEMS_FILE, problems)
    for problem in problems[:NAMED_AT_MOST]:
        log.error("%s", problem)
    if len(problems) > NAMED_AT_MOST:
        log.error("and %d more%s", len(problems) - NAMED_AT_MOST, f": see {problems_file}" if problems_file else "")
    kinds: Counter[str] = sum((report.kinds for report in reports), Counter())
    frames: Counter[int] = sum((report.frames for report in reports), Counter())
    return {
        "root": str(root),
        "errors": len(problems),
        "problems": problems[:NAMED_AT_MOST],
        "problems_file": problems_file,
        "shards": len(reports),
        "samples": sum(len(report.keys) for report in reports),
        "kinds": dict(sorted(kinds.items())),
        "frames": {str(count): number for count, number in sorted(frames.items())},
    } | (
        {
            "images": sum((Counter(c) for c in buckets.values()), Counter()),
            "near_copies": report_near_copies(root, reports),
            "buckets": buckets,
        }
        if buckets
        else {}
    )


def _repeated(reports: Sequence[ShardReport]) -> list[str]:
    """A problem for each key and each content that an earlier sample of the set has."""
    problems = []
    keys: dict[str, str] = {}
    contents: dict[str, str] = {}
    for report in reports:
        for number, key in enumerate(report.keys):
            where = f"{report.name} (sample {number})"
            if key in keys:
                problems.append(f"the key {key} occurs twice: in {keys[key]} and in {where}")
            keys[key] = where
        for digest, name in report.contents:
            if digest in contents:
                problems.append(f"the same content occurs twice: {contents[digest]} and {name}")
            contents[digest] = name
    return problems


def _listed_problems(root: Path | str) -> list[str]:
    """What the manifests left out, and where they and `images.json` differ from the files that are there."""
    problems = []
    if (Path(root) / INFO).is_file() and read_info(str(root)).get("splits") != buckets_there(Path(root)):
        problems.append(f"{root}/{INFO}, which training goes by, names other buckets than there are: run step=manifest")
    for place in split_folders(root):
        manifest = read_json(Path(place) / MANIFEST)
        problems += list(manifest["broken"].values())
        empty = [shard["name"] for shard in manifest["shards"] if not shard["samples"]]  # of which nothing was examined
        for name in empty:
            found = manifest["bad_samples"].get(name, {}).items()
            problems += [f"{place}/{name}, {key}: {reason}" for key, reason in found]
        known = {shard["name"] for shard in manifest["shards"]} | set(manifest["broken"])
        new = sorted({path.name for path in tar_files(Path(place))} - known)
        problems += [f"{place}/{name} is not in the manifest, so it is not read: run step=manifest" for name in new]
    return problems


def _write_problems(file: Path, problems: Sequence[str]) -> str | None:
    """Writes a line for each problem; the file, or None where it cannot be written or there are none."""
    try:
        if not problems:
            file.unlink(missing_ok=True)  # of an earlier validation
            return None
        write_text(file, "".join(f"{' '.join(problem.split())}\n" for problem in problems))
    except OSError as error:
        log.warning("%s cannot be written: %s", file, error)
        return None
    return str(file)


def report_shared(reports: Sequence[ShardReport]) -> None:
    """Warns of images and videos that are asked about in several splits: what was trained on is no held-out question's.
    Of a set without splits each sample is held out by its key, so that copies can come to lie on both sides."""
    splits: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for report in reports:
        for digest in report.media:
            splits.setdefault(digest, set()).add(str(Path(report.name).parent))
            counts[digest] += 1
    several = [digest for digest, places in splits.items() if len(places) > 1]
    if several:
        first = ", ".join(sorted(splits[several[0]]))
        log.warning(
            "%d images or videos stand in several splits, with other text (the first in %s)", len(several), first
        )
    copies = sum(count - 1 for count in counts.values())
    if copies and len(set().union(*splits.values())) == 1:
        log.warning(
            "%d samples have the images or the video of another one: a set without val/ is divided by keys, and copies "
            "may be trained on and held out; write val/ by video",
            copies,
        )


def report_near_copies(root: Path | str, reports: Sequence[ShardReport]) -> int | None:
    """Warns of images that look as good as the same: held-out ones beside those of train/, or any of a set without
    splits, which is divided by keys. How many there are; None where fewer than two images have a thumbnail."""
    thumbnails: dict[str, dict[str, bytes]] = {}
    for report in reports:
        place = Path(report.name).relative_to(root).parts[0]
        split = place if place in SPLITS else ""
        thumbnails.setdefault(split, {}).update(report.thumbnails)
    images, compared = sum(report.has["complete"] for report in reports), sum(map(len, thumbnails.values()))
    if compared < 2:
        return None
    if compared < images:
        log.warning("%d of %d images have no thumbnail, and no near copies were looked for", images - compared, images)
    pool = thumbnails.get("train") or thumbnails.get("") or {}
    names, count = list(pool), 0
    for split, held in thumbnails.items():
        if split == "train":
            continue
        pairs = near_copies(list(held.values()), None if held is pool else list(pool.values()))
        count += len(pairs)
        own = list(held)
        told = [f"{own[number]} and {names[other]}" for number, other in pairs[:NAMED_AT_MOST]]
        if pairs and split:
            log.warning("%d images of %s/ are near copies of images of train/: %s", len(pairs), split, "; ".join(told))
        elif pairs:
            log.warning(
                "%d images are near copies of another one; a set without val/ is divided by keys, and copies may be "
                "trained on and held out: %s",
                len(pairs),
                "; ".join(told),
            )
    return count


def _image_counts(root: Path | str, reports: Sequence[ShardReport]) -> dict[str, dict[str, int]]:
    """How many images of each folder have what; empty for other shards."""
    counts: dict[str, dict[str, int]] = {}
    for report in reports:
        if report.has:
            name = Path(report.name).parent.relative_to(root).as_posix()
            row = counts.setdefault(name, dict.fromkeys(("images", "complete", "latents", "patches", "text"), 0))
            for what, count in report.has.items():
                row[what] = row.get(what, 0) + count
    for name, row in counts.items():
        log.info("%s: %s", name, ", ".join(f"{count} {what}" for what, count in row.items()))
    return counts
