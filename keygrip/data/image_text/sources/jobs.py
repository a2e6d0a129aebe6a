"""Shards as jobs: one process claims each job, loader processes prepare its images, and a thread writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from keygrip.artifacts import locked, write_json
from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.decoding import decode_image
from keygrip.data.image_text.near_copies import THUMBNAIL, thumbnail_of
from keygrip.data.image_text.sources.encoding import Encoded, ImageEncoders, PreparedImage, as_tensor, prepare_image
from keygrip.data.image_text.sources.listing import Item
from keygrip.data.shards.index import index_path
from keygrip.data.shards.set_writer import failures_path
from keygrip.data.shards.writer import ShardWriter
from keygrip.data.untrusted_files import read_json

PENDING_WRITES = 8


@dataclass(frozen=True)
class Job:
    """A shard to write."""

    path: Path
    bucket: Bucket
    items: tuple[Item, ...]

    @property
    def done(self) -> bool:
        """Whether the shard, its index and its list of failures are all written."""
        return self.path.is_file() and index_path(self.path).is_file() and failures_path(self.path).is_file()

    @property
    def lock_path(self) -> Path:
        """The file that a process locks while it writes the shard."""
        return self.path.with_name(f".{self.path.stem}.lock")


def jobs_of(root: Path, items: Sequence[Item], images_per_shard: int) -> list[Job]:
    """Return the shards of all buckets, the bucket with the most images first; images added later get new shards."""
    by_bucket: dict[str, dict[int, list[Item]]] = {}
    for item in items:
        if item.bucket is not None:
            by_bucket.setdefault(item.bucket, {}).setdefault(item.generation, []).append(item)
    jobs = []
    for name, generations in sorted(by_bucket.items(), key=lambda pair: (-sum(map(len, pair[1].values())), pair[0])):
        shard_index = 0
        for _, members in sorted(generations.items()):
            for start in range(0, len(members), images_per_shard):
                path = root / name / f"shard-{shard_index:06d}.tar"
                jobs.append(Job(path, Bucket.from_name(name), tuple(members[start : start + images_per_shard])))
                shard_index += 1
    return jobs


def unread_images(jobs: Sequence[Job]) -> dict[str, str]:
    """Return the images that finished shards could not include, with the reasons. If an image was repaired and tried
    again, the result of the last shard is used."""
    reasons: dict[str, str] = {}
    for job in sorted(jobs, key=lambda job: job.items[0].generation):
        names = {item.path for item in job.items}
        reasons = {path: reason for path, reason in reasons.items() if path not in names}
        for line in read_json(failures_path(job.path)):
            parts = line.split(": ")  # a name may hold a colon too
            ends = (": ".join(parts[:end]) for end in range(1, len(parts)))
            path = next((end for end in ends if end in names), parts[0])
            reasons[path] = line.removeprefix(f"{path}: ")
    return reasons


class Claims(Sampler[list[tuple[int, int]]]):
    """Yield batches of (job, item) from the jobs that this process can claim; each batch is from one job.

    A job is claimed when its first batch is requested, and released with `release`. The lock is a file lock of the
    operating system, which disappears with the process that holds it.

    Args:
        jobs: of all processes. batch_size: items. first: the job to begin with, so that processes do not all try to
            claim the same jobs.
    """

    def __init__(self, jobs: Sequence[Job], batch_size: int, first: int = 0) -> None:
        self.jobs, self.batch_size = list(jobs), batch_size
        self.order = [*range(first, len(self.jobs)), *range(first)]
        self.held: dict[int, contextlib.ExitStack] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.order:
            if self.claim(number):
                count = len(self.jobs[number].items)
                for start in range(0, count, self.batch_size):
                    yield [(number, item) for item in range(start, min(start + self.batch_size, count))]

    def claim(self, number: int) -> bool:
        """Claim a job; return whether it was open and is now claimed by this process."""
        job = self.jobs[number]
        if job.done:
            return False
        lock = contextlib.ExitStack()
        try:
            lock.enter_context(locked(job.lock_path, wait=False))
        except BlockingIOError:
            return False
        if job.done:  # another process was just finishing it
            lock.close()
            return False
        self.held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Release a job. The lock file is removed only for a finished job: for an open job, two processes could then
        hold locks on two different files with the same name."""
        if self.jobs[number].done:
            self.jobs[number].lock_path.unlink(missing_ok=True)
        self.held.pop(number).close()

    def release_all(self) -> None:
        """Release all claimed jobs."""
        for number in list(self.held):
            self.release(number)


@dataclass(frozen=True)
class ReadyBatch:
    """Prepared images of one job; `failed` lists the images that could not be read."""

    job: int
    keys: list[str]
    pixels: Tensor | None
    views: Tensor | None
    captions: list[str]
    records: list[dict[str, Any]]
    failed: list[str]
    last: bool


class SourceImages(Dataset[PreparedImage]):
    """Images of the source, decoded and cropped in loader processes; indexed by whole batches of `Claims`."""

    def __init__(self, jobs: Sequence[Job], source: Path, sizes: ViewSizes) -> None:
        self.jobs, self.source, self.sizes = list(jobs), source, sizes

    def __getitem__(self, key: tuple[int, int]) -> PreparedImage:
        job = self.jobs[key[0]]
        item = job.items[key[1]]
        image = decode_image(self.source / item.path)
        extra_fields = {"source": item.path} | ({"captions": list(item.captions)} if len(item.captions) > 1 else {})
        prepared = prepare_image(image, item.captions[0], job.bucket, self.sizes, item.key, extra_fields)
        prepared.record[THUMBNAIL] = thumbnail_of(prepared.pixels)
        return prepared

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[ReadyBatch]:
        images: list[PreparedImage] = []
        failed = []
        for key in keys:
            path = self.jobs[key[0]].items[key[1]].path
            try:
                with convert_errors(self.source / path):
                    images.append(self[key])
            except BadSample as error:
                failed.append(f"{path}: {error.what}")
        job_index, item_index = keys[-1]
        return [
            ReadyBatch(
                job_index,
                [image.key for image in images],
                as_tensor([image.pixels for image in images]) if images else None,
                as_tensor([image.view for image in images]) if images else None,
                [image.caption for image in images],
                [image.record for image in images],
                failed,
                item_index == len(self.jobs[job_index].items) - 1,
            )
        ]


@dataclass(frozen=True)
class ViewSizes:
    """Sizes of DINO views by bucket: all that loader processes need of the encoders."""

    views: dict[tuple[int, int], tuple[int, int]]
    grids: dict[tuple[int, int], tuple[int, int]]

    @classmethod
    def of(cls, encoders: ImageEncoders, buckets: Sequence[Bucket]) -> ViewSizes:
        sizes = [(bucket.width, bucket.height) for bucket in buckets]
        return cls({s: encoders.view_size(*s) for s in sizes}, {s: encoders.dino_grid(*s) for s in sizes})

    def view_size(self, width: int, height: int) -> tuple[int, int]:
        return self.views[width, height]

    def dino_grid(self, width: int, height: int) -> tuple[int, int]:
        return self.grids[width, height]


class ShardThread:
    """Write shards in the order of the batches, in a separate thread; at most a few batches wait."""

    def __init__(self, claims: Claims, trim_text: bool, keep_images: bool = False) -> None:
        self.claims, self.trim_text, self.keep_images = claims, trim_text, keep_images
        self._pool = ThreadPoolExecutor(1, "shards")
        self._pending: list[Future[None]] = []
        self._writer: ShardWriter | None = None
        self._failed: list[str] = []
        self._broken = False

    def add(self, batch: ReadyBatch, encoded: Encoded | None) -> None:
        """Queue a batch for writing. Raise the error of an earlier batch if writing it failed."""
        self._pending.append(self._pool.submit(self._write, batch, encoded))
        while self._pending and (len(self._pending) > PENDING_WRITES or self._pending[0].done()):
            self._pending.pop(0).result()

    def _write(self, batch: ReadyBatch, encoded: Encoded | None) -> None:
        if self._broken:
            return  # a shard must not be finished without the batch that could not be written
        try:
            self._append(batch, encoded)
        except BaseException:
            self._broken = True
            raise

    def _append(self, batch: ReadyBatch, encoded: Encoded | None) -> None:
        job = self.claims.jobs[batch.job]
        if self._writer is None:
            self._writer = ShardWriter(job.path).__enter__()
            self._failed = []
        self._failed += batch.failed
        for index, key in enumerate(batch.keys):
            assert encoded is not None
            assert batch.pixels is not None
            image = batch.pixels[index].permute(1, 2, 0).numpy() if self.keep_images else None
            try:
                self._writer.add(key, *encoded.sample(index, batch.records[index], self.trim_text, image))
            except ValueError as error:
                self._failed.append(f"{batch.records[index]['source']}: {error}")
        if batch.last:
            write_json(failures_path(job.path), self._failed)
            self._writer.__exit__(None)
            self._writer = None
            self.claims.release(batch.job)

    def close(self, error: BaseException | None = None) -> None:
        """Write the queued batches. With an error, discard the unfinished shard."""
        self._pool.shutdown(wait=True)
        if self._writer is not None:
            stopped = error or RuntimeError("the shard was not finished")
            with contextlib.suppress(type(stopped)):
                self._writer.__exit__(type(stopped), stopped, stopped.__traceback__)
            self._writer = None
        self.claims.release_all()
        if error is None:
            for future in self._pending:
                future.result()
