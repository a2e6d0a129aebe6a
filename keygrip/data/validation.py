"""Validation of shards: decode and check every sample before training."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.artifacts import write_text
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.image_text.bucket_folders import find_contradictions, incomplete_sets
from keygrip.data.image_text.examination import examine_image_text, image_counts, report_near_copies, split_of
from keygrip.data.image_text.samples import is_image_text
from keygrip.data.manifests import describe, has_buckets, split_folders
from keygrip.data.shards.examination import NAMED_AT_MOST, ShardReport
from keygrip.data.shards.index import MANIFEST, ShardError, index_shard, lower_case
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import tar_files
from keygrip.data.untrusted_files import read_json
from keygrip.data.video_text.examination import examine_video_text, report_shared
from keygrip.progress import Progress
from keygrip.worker_processes import prepare_worker

log = logging.getLogger(__name__)

PROBLEMS_FILE = "problems.txt"


def examine_shard(place: str, number: int) -> ShardReport:
    """Read, decode and check everything in a shard of a set."""
    shards = ShardSet(place, quiet=True)
    entry = shards.shards[number]
    report = ShardReport(f"{place}/{entry['name']}")
    try:
        fresh = index_shard(Path(place) / entry["name"], describe)
        report.known += [f"{key} of {report.name}: {reason}" for key, reason in fresh.bad.items()]
        stored = shards.index(number)
        left_out = shards.left_out(number)  # found only in the whole set; examining this tar alone does not find it
        report.known += [f"{key} of {report.name}: {reason}" for key, reason in left_out.items()]
        fresh, stored = fresh.without({*fresh.bad, *left_out}), stored.without(fresh.bad)
        for attribute in ("keys", "first_part", "part_names", "part_offsets", "part_sizes"):
            if not np.array_equal(getattr(fresh, attribute), getattr(stored, attribute)):
                problem = f"{report.name}: its index is not of this tar ({attribute} differ): step=manifest again=true"
                report.problems.append(problem)
                return report
        if missing := sorted(set(fresh.columns) - set(stored.columns)):
            problem = f"{report.name}: its index is of an earlier version (no {', '.join(missing)})"
            report.problems.append(f"{problem}: step=manifest again=true")
            return report
        for name, values in fresh.columns.items():
            for row in np.flatnonzero(values != stored.columns[name]).tolist():
                stated = stored.columns[name][row]
                problem = f"{report.name}: {fresh.keys[row]} has {name} {values[row]}, its manifest says {stated}"
                problem += ": step=manifest again=true"
                report.problems.append(problem)
    except ShardError as error:
        report.problems.append(str(error))
        return report
    first = shards.first_sample(number)
    for sample in range(first, first + entry["samples"]):
        report.keys.append(shards.key(sample))
        try:
            with convert_errors(shards.where(sample)):
                parts = lower_case(shards.read(sample))
            examine = examine_image_text if is_image_text(parts) else examine_video_text
            examine(shards, sample, parts, report)
        except BadSample as error:
            report.problems.append(str(error))
    return report


def validate(root: Path | str, processes: int | None = 1) -> dict[str, Any]:
    """Examine every sample of a set and of its splits.

    Checks: every shard is complete and agrees with its index and manifest; every sample has its text and images and can
    be decoded; contents and keys occur once over all splits (keys of images: once in each split, which is made from a
    folder of its own); every conversation has answers, so that its loss mask is not empty. The first problems are
    logged, beginning with those that the manifest does not list; all problems are written into ``problems.txt`` of the
    root.

    A set that `step=images` began and did not finish is not examined: that it is not complete is its only problem.

    For images with text, the samples with latents, patches and text are counted in every bucket. Samples without
    patches are skipped in training; a bucket in which every sample lacks something is an error.

    Near copies are not errors: they are counted, and the first ones are named in the log. Held-out images are compared
    with training images; in a set without splits all images are compared with each other.

    Returns:
        `errors` (number), `problems` (the first ones), `problems_file` (with all problems, or None), `shards`,
        `samples`, `kinds` and `frames` (number of each); for images with text also `images`, `near_copies` (number of
        images that have a near copy; None if they were not compared), and `buckets` with the counts of each bucket.
    """
    if incomplete := incomplete_sets(Path(root)):
        return _report_problems(root, incomplete) | {"shards": 0, "samples": 0, "kinds": {}, "frames": {}}
    jobs = [
        (folder, number) for folder in split_folders(root) for number in range(len(ShardSet(folder, quiet=True).shards))
    ]
    reports = _examine_shards(jobs, usable_cores() if processes is None else processes, f"validate {root}")
    problems = [problem for report in reports for problem in report.problems]
    problems += _find_repeated_samples(root, reports)
    report_shared(reports)
    buckets = image_counts(root, reports)
    for name, counts in buckets.items():
        if not counts["complete"]:
            problems.append(f"{name}: none of its {counts['images']} images has all parts ({dict(counts)})")
    problems += _find_manifest_problems(root)
    problems += [problem for report in reports for problem in report.known]
    kinds: Counter[str] = sum((report.kinds for report in reports), Counter())
    frames: Counter[int] = sum((report.frames for report in reports), Counter())
    return (
        _report_problems(root, problems)
        | {
            "shards": len(reports),
            "samples": sum(len(report.keys) for report in reports),
            "kinds": dict(sorted(kinds.items())),
            "frames": {str(count): number for count, number in sorted(frames.items())},
        }
        | (
            {
                "images": sum((Counter(c) for c in buckets.values()), Counter()),
                "near_copies": report_near_copies(root, reports),
                "buckets": buckets,
            }
            if buckets
            else {}
        )
    )


def _examine_shards(jobs: Sequence[tuple[str, int]], processes: int, title: str) -> list[ShardReport]:
    """Return the reports on shards, in order; after an error or a signal only the shards in work are finished."""
    if processes == 1 or len(jobs) == 1:
        return [examine_shard(*job) for job in Progress(jobs, desc=title, unit="shard")]
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare_worker, (os.getpid(),)) as pool:
        try:
            futures = [pool.submit(examine_shard, *job) for job in jobs]
            return [future.result() for future in Progress(futures, desc=title, unit="shard")]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _report_problems(root: Path | str, problems: Sequence[str]) -> dict[str, Any]:
    """Write all problems into the root and log the first ones; return the part of the report on them."""
    problems_file = _write_problems(Path(root) / PROBLEMS_FILE, problems)
    for problem in problems[:NAMED_AT_MOST]:
        log.error("%s", problem)
    if len(problems) > NAMED_AT_MOST:
        log.error("and %d more%s", len(problems) - NAMED_AT_MOST, f": see {problems_file}" if problems_file else "")
    return {
        "root": str(root),
        "errors": len(problems),
        "problems": list(problems[:NAMED_AT_MOST]),
        "problems_file": problems_file,
    }


def _find_repeated_samples(root: Path | str, reports: Sequence[ShardReport]) -> list[str]:
    """Return a problem for each key and each content that an earlier sample of the set already has.

    The keys of images are those of their split: they are made from file names, which may be equal in two folders.
    """
    problems = []
    keys: dict[tuple[str, str], str] = {}
    contents: dict[str, str] = {}
    for report in reports:
        split = split_of(report, root) if report.has else ""
        for index, key in enumerate(report.keys):
            location = f"{report.name} (sample {index})"
            if (split, key) in keys:
                problems.append(f"the key {key} occurs twice: in {keys[split, key]} and in {location}")
            keys[split, key] = location
        for digest, name in report.contents:
            if digest in contents:
                problems.append(f"the same content occurs twice: {contents[digest]} and {name}")
            contents[digest] = name
    return problems


def _find_manifest_problems(root: Path | str) -> list[str]:
    """Return what the manifests left out, and where they and `images.json` differ from the existing files."""
    folders, problems = split_folders(root), []
    if has_buckets(root, folders):
        try:
            problems = find_contradictions(Path(root))
        except ValueError as error:  # a damaged file
            problems = [str(error)]
    for folder in folders:
        manifest = read_json(Path(folder) / MANIFEST)
        problems += list(manifest["broken"].values())
        empty = [shard["name"] for shard in manifest["shards"] if not shard["samples"]]  # not examined: without samples
        for name in empty:
            reasons = manifest["bad_samples"].get(name, {}).items()
            problems += [f"{folder}/{name}, {key}: {reason}" for key, reason in reasons]
        listed = {shard["name"] for shard in manifest["shards"]} | set(manifest["broken"])
        unlisted = sorted({path.name for path in tar_files(Path(folder))} - listed)
        problems += [
            f"{folder}/{name} is not in the manifest, so it is not read: run step=manifest" for name in unlisted
        ]
    return problems


def _write_problems(file: Path, problems: Sequence[str]) -> str | None:
    """Write one line per problem. Return the file, or None if it cannot be written or there are no problems."""
    try:
        if not problems:
            file.unlink(missing_ok=True)  # written by an earlier validation
            return None
        write_text(file, "".join(f"{' '.join(problem.split())}\n" for problem in problems))
    except OSError as error:
        log.warning("%s cannot be written: %s", file, error)
        return None
    return str(file)
