"""Write a shard set in parallel and resumably, for every source of shards."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from keygrip.artifacts import json_values, locked_or_wait, remove_stale, sha256_bytes, write_json
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import NAMED_AT_MOST, BadSample, convert_errors
from keygrip.data.shards.index import MANIFEST, Describe, Parts, Row, index_path
from keygrip.data.shards.remote import cache_of, is_remote
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.untrusted_files import read_json
from keygrip.progress import Progress
from keygrip.worker_processes import prepare_worker

log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class MadeSample:
    """A sample that is ready to be written."""

    key: str
    parts: Parts
    row: Row


@dataclass(frozen=True)
class Broken:
    """Something that could not be made into a sample."""

    reason: str


class Maker(Protocol):
    """Creates the samples of one item; picklable, and called in a separate process.

    Broken parts of an item are yielded as `Broken`; if the whole item is broken, an exception is raised. Both are
    counted, named in the log and left out.
    """

    def __call__(self, item: Any, /) -> Iterable[MadeSample | Broken]: ...


@dataclass
class Written:
    """The result of `write_shards`."""

    root: str
    shards: int = 0
    samples: int = 0
    written: int = 0  # samples written by this call
    failed: int = 0  # items, or parts of them
    reasons: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def report(self) -> dict[str, Any]:
        """Return the report that `python -m keygrip.prepare` prints."""
        names = ("root", "shards", "samples", "written", "failed")
        return {name: getattr(self, name) for name in names} | {"wall_s": round(self.wall_s, 1)}


def write_shards(
    root: Path | str,
    items: Sequence[Any],
    make: Maker,
    settings: Mapping[str, Any],
    items_per_shard: int,
    name: str,
    processes: int | None = None,
    max_failed_share: float = 0.5,
    progress: bool = True,
    *,
    describe: Describe,
    kind: str = "samples",
) -> Written:
    """Write a shard set, one shard for every `items_per_shard` items. Complete shards are kept unless their items
    changed, or the size of the files that the items name (also if such a file was missing before).

    The same items and settings give the same bytes, independent of the number of processes and interruptions.

    Args:
        root: folder of the set. items: the input of the maker, in order. make: see :class:`Maker`.
        settings: settings of the set; if the folder has a set with other settings, this is an error.
        items_per_shard: see above. name: beginning of the file names.
        processes: None: one per core; 1: write in this process.
        max_failed_share: a larger share of broken items is an error.
        describe: returns the columns of a sample, as for `write_manifest`.
        kind: what the samples are called in errors, with the conditions under which the maker yields none.

    Raises:
        ValueError: there is nothing to write, the folder has a set with other settings, or too many items are broken.
        ChildProcessError: a worker process died.
    """
    started = time.monotonic()
    root = Path(root)
    if not items:
        raise ValueError(f"nothing to write to {root}: no items were found")
    if processes is not None and processes < 1:
        raise ValueError(f"{processes} processes cannot write {root}: at least 1, or null for one for each core")
    if items_per_shard < 1:
        raise ValueError(f"items_per_shard must be at least 1, not {items_per_shard}")
    if not 0 <= max_failed_share <= 1:  # false for NaN too
        raise ValueError(f"max_failed_share={max_failed_share}: it is a share, from 0 to 1")
    root.mkdir(parents=True, exist_ok=True)
    all_settings = {**settings, "items": len(items), "items_per_shard": items_per_shard}
    if (root / SETTINGS_FILE).is_file():  # refused before waiting for another process
        check_settings(root, all_settings)
    with locked_or_wait(root / ".write_shards.lock", root):
        check_settings(root, all_settings)
        remove_stale(root, of_any_machine=True)  # a killed job may continue on another node
        jobs, result = [], Written(str(root))
        for index, start in enumerate(range(0, len(items), items_per_shard)):
            path, shard_items = root / f"{name}-{index:06d}.tar", items[start : start + items_per_shard]
            made_of = fingerprint(shard_items)
            if not (path.is_file() and index_path(path).is_file() and _read_log(path).get("items") == made_of):
                jobs.append((path, shard_items, made_of))
        if changed := sum(failures_path(path).is_file() for path, _, _ in jobs):
            log.info("%s: %d shards are made anew, whose items have changed", root, changed)
        total = sum(len(shard_items) for _, shard_items, _ in jobs)
        with Progress(total=total, desc=f"write {root}", unit="item", shown=progress) as bar:
            for count, samples in _run(jobs, make, min(processes or usable_cores(), max(1, len(jobs)))):
                result.written += samples
                bar.update(count)
        for path in sorted(root.glob(f"{name}-*.tar")):
            reasons = _read_log(path).get("failed", [])
            result.failed += len(reasons)
            result.reasons += reasons
        for reason in result.reasons[:NAMED_AT_MOST]:
            log.warning("left out: %s", reason)
        if result.failed:
            log.warning("%d items are broken and left out of %s", result.failed, root)
        manifest = write_manifest(root, describe, progress=progress)
        result.shards, result.samples = len(manifest["shards"]), manifest["samples"]
        too_many = result.failed > max_failed_share * (result.samples + result.failed)
        if too_many or not result.samples:
            (root / MANIFEST).unlink()  # an incomplete set must not be trained on
            first = f"; the first: {result.reasons[0]}" if result.reasons else ""
            limit = f", more than max_failed_share={max_failed_share:g} allows" if too_many else ""
            raise ValueError(
                f"{root} would hold {result.samples} {kind}, and {result.failed} items are broken{limit}"
                + (f", all named in {root}/*.failed.json{first}" if result.failed else "")
            )
    result.wall_s = time.monotonic() - started
    return result


def failures_path(shard: Path) -> Path:
    """Return the path of a shard's log, next to the shard: reasons of left-out items, and the items' fingerprint."""
    return shard.with_suffix(".failed.json")


def _read_log(shard: Path) -> dict[str, Any]:
    """Read a shard's log: `items`: the items' fingerprint; `failed`: reasons. Empty if there is no such log."""
    path = failures_path(shard)
    stored = read_json(path) if path.is_file() else None
    return stored if isinstance(stored, dict) and isinstance(stored.get("failed"), list) else {}


def fingerprint(items: Sequence[Any]) -> str:
    """Return a hash of the items' values. Files that they name are hashed by name and size, so that a set and its files
    can be moved."""
    return sha256_bytes(json.dumps([_fingerprint_values(item) for item in items]).encode())


def _fingerprint_values(item: Any) -> Any:
    if isinstance(item, Path):
        try:
            return [item.name, item.stat().st_size]
        except OSError:
            return [item.name, None]
    if is_dataclass(item) and not isinstance(item, type):
        return {each.name: _fingerprint_values(getattr(item, each.name)) for each in fields(item)}
    if isinstance(item, Mapping):
        return {str(key): _fingerprint_values(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_fingerprint_values(value) for value in item]
    if isinstance(item, functools.partial):
        return [_fingerprint_values(item.func), _fingerprint_values(item.args), _fingerprint_values(item.keywords)]
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    return getattr(item, "__qualname__", type(item).__qualname__)  # a repr may contain a memory address


def check_settings(root: Path, settings: Mapping[str, Any], new: bool = False) -> None:
    """Refuse to mix two sets in a folder; store the settings of a new set.

    Args:
        new: nothing has been written to the folder yet; settings stored there are replaced.

    Raises:
        ValueError: the folder has a set with other settings.
    """
    path = root / SETTINGS_FILE
    current = json_values(settings)
    if new or not path.is_file():
        write_json(path, current)
        return
    stored = read_json(path)
    if stored != current:
        keys = [key for key in {**stored, **current} if stored.get(key) != current.get(key)]
        differences = ", ".join(f"{key}: {stored.get(key)!r} there, {current.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{root} holds shards made with other settings ({differences}); use another folder or remove it"
        )


def settings_of(place: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Read the settings of the shard set at a folder or URL; empty if there are none (shards of other programs).

    Raises:
        ValueError: the settings cannot be read. ConnectionError: it is unknown whether there are settings.
    """
    path = cache_of(place, cache_dir).fetch_optional(SETTINGS_FILE) if is_remote(place) else Path(place) / SETTINGS_FILE
    stored = read_json(path) if path is not None and path.is_file() else {}
    if not isinstance(stored, dict):
        raise ValueError(f"{place}/{SETTINGS_FILE} holds no settings by name: {stored!r:.80}")
    return stored


Job = tuple[Path, Sequence[Any], str]  # a shard, its items and their fingerprint


def _write_one(job: Job, make: Maker) -> tuple[int, int]:
    """Write a shard; return its numbers of items and samples."""
    path, items, made_of = job
    failures_path(path).unlink(missing_ok=True)  # an existing shard is from other items, or unfinished
    reasons: list[str] = []
    with ShardWriter(path) as writer:
        for item in items:
            for sample in _make_samples(make, item):
                if isinstance(sample, Broken):
                    reasons.append(sample.reason)
                    continue
                try:
                    writer.add(sample.key, sample.parts, sample.row)
                except ValueError as error:
                    reasons.append(f"{_abbreviate(item)}: {error}")
        count = len(writer)
    # written after the tar and its index: a shard that was interrupted earlier has no log, and is written again
    write_json(failures_path(path), {"items": made_of, "failed": reasons})
    return len(items), count


def _make_samples(make: Maker, item: Any) -> Iterator[MadeSample | Broken]:
    """Yield the samples of an item; an error that ends the item is yielded last, as `Broken`."""
    try:
        with convert_errors(_abbreviate(item)):
            samples = iter(make(item))
        while True:
            with convert_errors(_abbreviate(item)):
                sample = next(samples, None)
            if sample is None:
                return
            yield sample
    except BadSample as error:
        yield Broken(str(error))


def _abbreviate(item: Any) -> str:
    text = str(item)
    return text if len(text) <= 200 else text[:200] + "..."


def _run(jobs: Sequence[Job], make: Maker, processes: int) -> Iterator[tuple[int, int]]:
    if processes == 1:
        for job in jobs:
            yield _write_one(job, make)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (make, os.getpid())) as pool:
        try:
            for future in as_completed([pool.submit(_run_job, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that writes shards died (out of memory?); the shards that are there are whole: run again to "
                "continue, perhaps with fewer processes"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_make: Maker | None = None  # one per process, with its open files


def _start_process(make: Maker, parent: int) -> None:
    global _make
    prepare_worker(parent)
    _make = make


def _run_job(job: Job) -> tuple[int, int]:
    assert _make is not None
    return _write_one(job, _make)
