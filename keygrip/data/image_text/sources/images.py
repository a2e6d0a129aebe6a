"""Encode a folder of images with captions into shards in aspect buckets: latents, DINO features and text states.

Loader processes decode and crop, one process per device encodes, and a thread writes. A process claims a shard with a
lock on a file next to it. The same command may therefore run several times: on all GPUs of a machine with torchrun, on
many nodes with srun, or again after an interruption. Complete shards are not computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from keygrip.artifacts import remove_stale, write_text
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import NAMED_AT_MOST
from keygrip.data.image_text.bucket_folders import INFO, write_info
from keygrip.data.image_text.crops import Bucket, aspect_buckets
from keygrip.data.image_text.samples import describe_image_text
from keygrip.data.image_text.sources.encoding import ImageEncoders, encode_images
from keygrip.data.image_text.sources.jobs import (
    Claims,
    Job,
    ReadyBatch,
    ShardThread,
    SourceImages,
    ViewSizes,
    jobs_of,
    unread_images,
)
from keygrip.data.image_text.sources.listing import TOO_SMALL, Item, frozen_items, last_entries, lists_usable_images
from keygrip.data.shards.sampling import start_worker
from keygrip.data.shards.set_writer import check_settings
from keygrip.data.shards.writer import write_manifest
from keygrip.data.source_files import refuse_written_into_source
from keygrip.progress import Progress

log = logging.getLogger(__name__)

DECODING = 5  # version of decoding: shards of another version have different pixels for unusual images
FAILED_FILE = "failed.jsonl"
LOOK_AGAIN_S = 2.0


def _only_sample(batch: list[ReadyBatch]) -> ReadyBatch:
    return batch[0]


@dataclass
class Prepared:
    """Report of `prepare step=images`: what it wrote, and how long its parts took.

    Args:
        items: images that this call processed. data_wait_share: share of the time since the first batch in which this
            process waited for images; near 0 the encoders are saturated. encode_share: share of the time in the
            encoders.
        start_s: time until the first batch: reading the list, loading the encoders, starting the loaders.
        captions_cut: captions of this call that are longer than the text encoder accepts.
        failed: failed images of the whole set, listed in failed.jsonl. duplicates: files with the same content as
            another file, listed there too.
    """

    root: str
    shards: int = 0
    samples: int = 0
    items: int = 0
    captions_cut: int = 0
    failed: int = 0
    duplicates: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    items_per_s: float = 0.0
    data_wait_share: float = 0.0
    encode_share: float = 0.0
    start_s: float = 0.0
    wall_s: float = 0.0
    rank: int = 0

    def take_times(self, clock: Clock, wall_s: float) -> None:
        """Compute rates and shares from the times of a clock, in seconds."""
        spent = max(clock.spent, 1e-9)
        self.items_per_s, self.start_s = round(self.items / spent, 3), round(clock.start or 0.0, 2)
        self.data_wait_share, self.encode_share = round(clock.wait / spent, 4), round(clock.busy / spent, 4)
        self.wall_s = round(wall_s, 2)


@dataclass(frozen=True)
class Rank:
    """The rank of this process among several, from torchrun or SLURM."""

    rank: int
    ranks: int
    local: int

    @classmethod
    def here(cls) -> Rank:
        """Read the rank from the environment variables of torchrun or SLURM; without them, it is a single process."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)))
        return cls(0, 1, 0)

    def device(self, wanted: str) -> str:
        """Return the device of this process; "auto" selects its own GPU, or the CPU if there is none."""
        if wanted != "auto":
            return wanted
        count = torch.cuda.device_count()
        return f"cuda:{self.local % count}" if count else "cpu"


@dataclass
class Clock:
    """Seconds since the first batch: in total, waiting for data, and in the encoders."""

    spent: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    start: float | None = None  # until the first batch


def encode_folder(
    source: str | Path,
    root: str | Path,
    encoders: ImageEncoders,
    size: int,
    bucket_step: int,
    max_aspect: float,
    images_per_shard: int = 1000,
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "auto",
    max_enlargement: float = 1.0,
    max_failed_share: float = 0.1,
    trim_text: bool = True,
    keep_images: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the shards of a folder of images. Complete shards are kept; images that are added or repaired later are
    written to new shards.

    Args:
        source: folder, searched with all subfolders. Captions are read from metadata.jsonl or captions.csv (columns
            file_name, relative to the folder of the list, and caption or text) in the folder or any subfolder, or from
            <name>.txt, .caption or .json next to each image. All captions of an image are stored, and training uses
            them in turn.
        root: receives bucket_<width>x<height>/shard-<number>.tar, failed.jsonl and, when the set is complete,
            images.json.
        encoders: see :class:`ImageEncoders`.
        size, bucket_step, max_aspect: of the buckets, see :func:`keygrip.data.image_text.crops.aspect_buckets`.
        images_per_shard: an interruption loses at most one unfinished shard. batch_size: images encoded at once.
        workers: loader processes; None: the number of cores minus one, at most 16; 0: load in this process.
        device: "auto", or a device's name.
        max_enlargement: images that would have to be enlarged by a larger factor are left out.
        max_failed_share: a larger share (0..1) of broken images is an error.
        trim_text: do not store text states of padding: 512 x 4096 values are 4 MB per image.
        keep_images: store the images too, as PNG: evaluation then compares with them instead of the autoencoder's
            reconstructions.

    Returns:
        The fields of :class:`Prepared`.

    Raises:
        FileNotFoundError, ValueError: there are no images, the root lies inside its source, the settings differ from
            earlier ones, or too many images are broken.
    """
    started = time.perf_counter()
    rank, root, source = Rank.here(), Path(root), Path(source)
    buckets = aspect_buckets(size, bucket_step, max_aspect)
    _check_stride(buckets, encoders.latent_stride)
    if images_per_shard < 1 or batch_size < 1:
        raise ValueError(f"images_per_shard={images_per_shard} and batch_size={batch_size} must be at least 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} must be at least 0 (0: load in this process), or null")
    if not max_enlargement > 0:  # true for NaN too
        raise ValueError(f"max_enlargement={max_enlargement:g} must be above 0 (1: no enlargement)")
    if not 0 <= max_failed_share <= 1:  # false for NaN too
        raise ValueError(f"max_failed_share={max_failed_share}: it is a share, from 0 to 1")
    refuse_written_into_source(root, source, below=True)
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images at {source}")
    encoding_device = rank.device(device)
    encoders.to(encoding_device)
    identity = {"fingerprint": encoders.fingerprint, "description": encoders.description}
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": str(source.resolve()),
        "encoders": identity,
        "buckets": [bucket.name for bucket in buckets],
        "images_per_shard": images_per_shard,
        "max_enlargement": max_enlargement,
        "trim_text": trim_text,
        "decoding": DECODING,
        "keep_images": keep_images,
    }
    # a folder without a list of usable images has no shards, whatever settings earlier attempts used
    check_settings(root, settings, new=not lists_usable_images(root))

    def unread_of(items: Sequence[Item]) -> dict[str, str] | None:
        jobs = jobs_of(root, items, images_per_shard)
        return unread_images(jobs) if all(job.done for job in jobs) else None

    items = frozen_items(root, source, buckets, max_enlargement, progress and rank.rank == 0, unread_of)
    jobs = jobs_of(root, items, images_per_shard)
    if not jobs:
        reasons = "; ".join(f"{item.path}: {item.reason}" for item in items[:3])
        too_small = sum(TOO_SMALL in item.reason for item in items)
        advice = "Repair them and run the same command again"
        if too_small:
            advice = (
                f"{too_small} are smaller than their bucket: give a size below {size}, or max_enlargement above "
                f"{max_enlargement:g}{'' if too_small == len(items) else '; repair the others'}"
            )
        raise ValueError(f"none of the {len(items)} images in {source} can be used: {reasons}. {advice}")
    for name in {job.path.parent for job in jobs}:
        if name.is_dir():
            remove_stale(name, of_any_machine=True)
    result = Prepared(str(root), rank=rank.rank)
    open_items = sum(len(job.items) for job in jobs if not job.done)
    listed = sum(not item.removed for item in last_entries(items).values())
    log.info("%d images, %d of them to do, on %s", listed, open_items, encoding_device)
    if workers is None:
        workers = min(usable_cores() - 1, 16)
    sizes = ViewSizes.of(encoders, buckets)
    clock, cut_before = Clock(), encoders.captions_cut
    with Progress(total=open_items, desc=f"encode {source}", unit="image", shown=progress and rank.rank == 0) as bar:
        while any(not job.done for job in jobs):
            claims = Claims(jobs, batch_size, rank.rank * len(jobs) // rank.ranks)
            thread = ShardThread(claims, trim_text, keep_images)
            count = _encode_claimed_jobs(
                claims, SourceImages(jobs, source, sizes), encoders, workers, thread, clock, bar, started
            )
            result.items += count
            if not count:  # other processes hold all remaining shards
                if rank.rank > 0:
                    break
                time.sleep(LOOK_AGAIN_S)  # a process that dies releases its shards
    result.captions_cut = encoders.captions_cut - cut_before
    if result.captions_cut:
        log.warning("%d captions are longer than the text encoder takes, and were cut off", result.captions_cut)
    result.take_times(clock, time.perf_counter() - started)
    if rank.rank == 0:
        _write_manifests(root, jobs, items, identity, max_failed_share, progress, result)
    log.info(
        "%d images in %.1f s, %.2f per second; %.1f %% of the time waiting for data, %.1f %% in the encoders",
        result.items,
        result.wall_s,
        result.items_per_s,
        100 * result.data_wait_share,
        100 * result.encode_share,
    )
    return asdict(result)


def _check_stride(buckets: Sequence[Bucket], stride: int) -> None:
    for bucket in buckets:
        if bucket.width % stride or bucket.height % stride:
            raise ValueError(f"{bucket.name} does not divide by the latent's stride {stride}; raise bucket_step")


def _encode_claimed_jobs(
    claims: Claims,
    images: SourceImages,
    encoders: ImageEncoders,
    workers: int,
    thread: ShardThread,
    clock: Clock,
    bar: Progress,
    started: float,
) -> int:
    """Process all jobs that can be claimed, once; return the number of processed images."""
    loader = DataLoader(
        images,
        batch_sampler=claims,
        num_workers=workers,
        collate_fn=_only_sample,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    image_count, begin_time = 0, time.perf_counter()
    try:
        batches: Iterator[ReadyBatch] = iter(loader)
        while True:
            request_time = time.perf_counter()
            batch = next(batches, None)
            arrival_time = time.perf_counter()
            if batch is None:
                break
            if not image_count:  # the loaders had to start before the first batch
                begin_time = arrival_time
                clock.start = clock.start or arrival_time - started
            else:
                clock.wait += arrival_time - request_time
            encoded = None
            if batch.pixels is not None and batch.views is not None:
                further_captions = (
                    (index, record.get("captions", [])[1:]) for index, record in enumerate(batch.records)
                )
                captions_by_index = {index: captions for index, captions in further_captions if captions}
                encoded = encode_images(encoders, batch.pixels, batch.views, batch.captions, captions_by_index)
            clock.busy += time.perf_counter() - arrival_time
            thread.add(batch, encoded)
            image_count += len(batch.keys) + len(batch.failed)
            bar.update(len(batch.keys) + len(batch.failed))
            bar.set_postfix(waiting=f"{clock.wait / max(clock.wait + clock.busy, 1e-9):.0%}", refresh=False)
    except BaseException as error:
        thread.close(error)
        raise
    thread.close()
    clock.spent += time.perf_counter() - begin_time if image_count else 0.0
    return image_count


def _write_manifests(
    root: Path,
    jobs: Sequence[Job],
    items: Sequence[Item],
    identity: dict[str, Any],
    max_failed_share: float,
    progress: bool,
    result: Prepared,
) -> None:
    """Write the manifests, the list of failed images and, last, images.json."""
    last = last_entries(items)
    count = sum(not item.removed for item in last.values())
    left = {path: item for path, item in last.items() if item.bucket is None}
    failed = [
        {"source": path, "reason": item.reason}
        for path, item in left.items()
        if not item.duplicate and not item.removed
    ]
    duplicates = [{"source": path, "reason": item.reason} for path, item in left.items() if item.duplicate]
    unread = unread_images(jobs)
    failed += [{"source": path, "reason": reason} for path, reason in unread.items() if path not in left]
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*failed, *duplicates])
    write_text(root / FAILED_FILE, rows)
    for row in failed[:NAMED_AT_MOST]:
        log.warning("left out: %s: %s", row["source"], row["reason"])
    if failed:
        log.warning("%d of %d images are left out; all are listed in %s", len(failed), count, root / FAILED_FILE)
    if duplicates:
        log.warning("%d files have the content of another one, which keeps their captions", len(duplicates))
    for folder in sorted({job.path.parent for job in jobs}):
        manifest = write_manifest(folder, describe_image_text, progress=progress)
        result.buckets[folder.name] = manifest["samples"]
        result.shards += len(manifest["shards"])
        result.samples += manifest["samples"]
    result.failed, result.duplicates = len(failed), len(duplicates)
    if len(failed) > max_failed_share * count or not result.samples:
        with contextlib.suppress(FileNotFoundError):
            (root / INFO).unlink()  # an incomplete set must not be trained on
        first = f"{failed[0]['source']}: {failed[0]['reason']}"
        raise ValueError(
            f"{len(failed)} of {count} images are left out of {root}, more than max_failed_share="
            f"{max_failed_share:g} allows; the first: {first}. All are listed in {root / FAILED_FILE}: repair or "
            "remove them, or raise max_failed_share, and run the same command again"
        )
    write_info(root, identity)
