"""A folder of pictures with captions as shards in aspect buckets: latents, DINO features and text states.

Loader processes decode and crop, one process a device encodes, a thread writes. Every shard is claimed by a lock on a
file beside it, so that the same command may run many times over: on all GPUs of a machine with torchrun, on many nodes
with srun, or again after an interruption. Nothing that is complete is computed again.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from keygrip.data.image_text.crops import Box, Bucket, aspect_buckets, cut_out, nearest_bucket, shared_crop
from keygrip.data.image_text.datamodule import INFO, write_info
from keygrip.data.image_text.samples import describe_image_text, image_text_parts
from keygrip.data.shards.sampling import start_worker
from keygrip.data.shards.tars import MANIFEST, Parts, Row, ShardWriter, index_path, write_manifest, write_whole
from keygrip.data.video_text.sources.writing import check_settings, failures_path, remove_stale

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CAPTION_FILES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_NAMES, CAPTION_NAMES = ("file_name", "file", "image"), ("caption", "text")
ITEMS_FILE = ".items.jsonl"
FAILED_FILE = "failed.jsonl"
KEY_BYTES = 80
PENDING_WRITES = 8
NAMED_AT_MOST = 10
LOOK_AGAIN_S = 2.0


class ViewShapes(Protocol):
    """Of a picture's DINO view: its size (width, height) in pixels and its grid (rows, columns) of patches."""

    def view_size(self, width: int, height: int) -> tuple[int, int]: ...
    def dino_grid(self, width: int, height: int) -> tuple[int, int]: ...


class ImageEncoders(ViewShapes, Protocol):
    """What turns pictures and captions into features; see :class:`keygrip.models.patch_dit.encoders.Encoders`."""

    latent_stride: int

    @property
    def fingerprint(self) -> str: ...
    @property
    def description(self) -> dict[str, Any]: ...
    def to(self, device: torch.device | str) -> Any: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def encode_view(self, views: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]: ...


# ---- one picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedImage:
    """A picture ready to be encoded: both pictures show `record["crop"]` of the source.

    Args:
        pixels: uint8 [H, W, 3], of the bucket's size. view: uint8 [vh, vw, 3], for DINO.
    """

    key: str
    pixels: np.ndarray
    view: np.ndarray
    caption: str
    record: dict[str, Any]


def prepare_image(
    picture: Any, caption: str, bucket: Bucket, shapes: ViewShapes, key: str, more: Mapping[str, Any] | None = None
) -> PreparedImage:
    """Cuts the shared crop out of a PIL picture twice, once for the latent and once for DINO.

    Args:
        more: further entries of the record, for example `evidence`.
    """
    box: Box = shared_crop(picture.width, picture.height, bucket)
    view_size = shapes.view_size(bucket.width, bucket.height)
    record = {
        "caption": caption,
        "size": [picture.width, picture.height],
        "crop": [round(edge, 3) for edge in box],
        "bucket": [bucket.width, bucket.height],
        "patch_grid": list(shapes.dino_grid(bucket.width, bucket.height)),
        **(more or {}),
    }
    pixels = cut_out(picture, box, (bucket.width, bucket.height))
    return PreparedImage(key, pixels, cut_out(picture, box, view_size), caption, record)


@dataclass(frozen=True)
class Encoded:
    """Features of some prepared pictures, on the CPU, as numpy arrays with a first dimension for the pictures."""

    latents: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    cls: np.ndarray
    patches: np.ndarray

    def sample(self, number: int, record: Mapping[str, Any], trim_text: bool) -> tuple[Parts, Row]:
        """Parts and columns of one of them. Raises ValueError: numbers that cannot be stored."""
        n = number
        return image_text_parts(
            self.latents[n], self.states[n], self.mask[n], self.cls[n], self.patches[n], record, trim_text
        )


def encode_images(encoders: ImageEncoders, pixels: Tensor, views: Tensor, captions: Sequence[str]) -> Encoded:
    """Encodes pictures of one bucket: uint8 [B, 3, H, W] and [B, 3, vh, vw]."""
    latents = encoders.encode_images(pixels)
    cls, patches = encoders.encode_view(views)
    states, mask = encoders.encode_text(captions)
    return Encoded(*(part.cpu().numpy() for part in (latents, states, mask, cls, patches)))


def as_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [B, 3, H, W] of pictures [H, W, 3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


# ---- what there is to do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A picture of the source. bucket: None where it cannot be used, and `reason` says why."""

    key: str
    path: str
    caption: str
    bucket: str | None
    reason: str = ""


def find_captions(source: Path) -> dict[str, str]:
    """Captions by file name from a list beside the pictures (metadata.jsonl, captions.csv, ...); empty without one.

    Raises:
        ValueError: a list that cannot be read, or without the columns of file and caption.
    """
    path = next((source / name for name in CAPTION_FILES if (source / name).is_file()), None)
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        names = next(name for name in FILE_NAMES if name in rows[0])
        texts = next(name for name in CAPTION_NAMES if name in rows[0])
        return {str(row[names]): str(row[texts]) for row in rows}
    except (ValueError, StopIteration, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a list of captions: it needs one of the columns {', '.join(FILE_NAMES)} and one of "
            f"{', '.join(CAPTION_NAMES)} ({type(error).__name__} {error})"
        ) from error


def caption_beside(path: Path) -> str | None:
    """The caption of a picture from `<name>.txt`, `<name>.caption` or `<name>.json` ("caption"); None without one."""
    for suffix in (".txt", ".caption"):
        if path.with_suffix(suffix).is_file():
            return " ".join(path.with_suffix(suffix).read_text(encoding="utf-8").split())
    if path.with_suffix(".json").is_file():
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return str(content["caption"]) if isinstance(content, dict) and "caption" in content else None
    return None


def key_of(name: str, taken: set[str]) -> str:
    """A key for a file: its path without dots, cut short where it is long; never one that is taken."""
    stem, _, suffix = name.rpartition(".")
    key = stem.replace(".", "-")
    if key in taken:
        key = f"{key}-{suffix}"
    if len(key.encode()) > KEY_BYTES or not key.isascii() or key in taken:
        key = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    taken.add(key)
    return key


def open_picture(path: Path) -> Any:
    """A PIL picture, turned as its EXIF data says. Raises OSError: it cannot be read."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture after its EXIF turn, from its header."""
    from PIL import Image

    with Image.open(path) as picture:
        turned = picture.getexif().get(0x0112, 1) >= 5
        return (picture.height, picture.width) if turned else (picture.width, picture.height)


def list_items(source: Path, buckets: Sequence[Bucket], max_enlargement: float, progress: bool) -> list[Item]:
    """Every picture below a folder with its bucket, in the order of names; those that cannot be used with a reason.

    Raises:
        FileNotFoundError: no folder, or no pictures in it.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {source}")
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {source}")
    listed, taken = find_captions(source), set[str]()
    items = []

    def look(path: Path) -> tuple[str | None, Bucket | None, str]:
        name = path.relative_to(source).as_posix()
        try:
            caption = listed.get(name) if listed else caption_beside(path)
            if caption is None:
                return None, None, "it has no caption"
            width, height = size_of(path)
        except (OSError, ValueError, SyntaxError) as error:
            return None, None, f"{type(error).__name__}: {error}"
        bucket = nearest_bucket(width, height, buckets)
        enlargement = max(bucket.width / width, bucket.height / height)
        if enlargement > max_enlargement:
            return (
                caption,
                None,
                f"{width} x {height} pixels would be enlarged {enlargement:.2g} times for {bucket.name}",
            )
        return caption, bucket, ""

    with (
        ThreadPoolExecutor(16) as pool,
        tqdm(total=len(paths), desc=f"look at {source}", unit="image", delay=1, disable=not progress) as bar,
    ):
        for path, (caption, bucket, reason) in zip(paths, pool.map(look, paths), strict=True):
            name = path.relative_to(source).as_posix()
            items.append(Item(key_of(name, taken), name, caption or "", bucket.name if bucket else None, reason))
            bar.update()
    return items


def frozen_items(root: Path, source: Path, buckets: Sequence[Bucket], enlargement: float, progress: bool) -> list[Item]:
    """The list of items of a root, made by the first process that asks and never changed after."""
    file = root / ITEMS_FILE
    with (root / ".items.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            items = list_items(source, buckets, enlargement, progress)
            write_whole(file, "".join(json.dumps(asdict(item)) + "\n" for item in items).encode())
    return [Item(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Job:
    """A shard to write."""

    path: Path
    bucket: Bucket
    items: tuple[Item, ...]

    @property
    def done(self) -> bool:
        return self.path.is_file() and index_path(self.path).is_file() and failures_path(self.path).is_file()

    @property
    def lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.stem}.lock")


def jobs_of(root: Path, items: Sequence[Item], images_per_shard: int) -> list[Job]:
    """The shards of all buckets, the fullest bucket first."""
    by_bucket: dict[str, list[Item]] = {}
    for item in items:
        if item.bucket is not None:
            by_bucket.setdefault(item.bucket, []).append(item)
    jobs = []
    for name, members in sorted(by_bucket.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        for number, start in enumerate(range(0, len(members), images_per_shard)):
            path = root / name / f"shard-{number:06d}.tar"
            jobs.append(Job(path, Bucket.from_name(name), tuple(members[start : start + images_per_shard])))
    return jobs


# ---- reading ahead ---------------------------------------------------------------------------------------------------


class Claims(Sampler[list[tuple[int, int]]]):
    """Batches of (job, item) of the jobs that this process could claim, each batch of one job.

    A job is claimed when its first batch is asked for, and released with `release`. The lock is the file system's: it
    goes with the process that holds it.

    Args:
        jobs: of all processes. batch_size: items. first: the job to begin with, so that processes do not all ask for
            the same ones.
    """

    def __init__(self, jobs: Sequence[Job], batch_size: int, first: int = 0) -> None:
        self.jobs, self.batch_size = list(jobs), batch_size
        self.order = [*range(first, len(self.jobs)), *range(first)]
        self.held: dict[int, IO[str]] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.order:
            if self.claim(number):
                count = len(self.jobs[number].items)
                for start in range(0, count, self.batch_size):
                    yield [(number, item) for item in range(start, min(start + self.batch_size, count))]

    def claim(self, number: int) -> bool:
        """Whether the job is open and now ours."""
        job = self.jobs[number]
        if job.done:
            return False
        job.path.parent.mkdir(parents=True, exist_ok=True)
        lock = job.lock_path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        if job.done:  # another process was just finishing it
            lock.close()
            return False
        self.held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Gives a job back. The file of the lock goes only with a finished job: of an open one, two processes could
        come to hold locks on two files of that name."""
        if self.jobs[number].done:
            self.jobs[number].lock_path.unlink(missing_ok=True)
        self.held.pop(number).close()

    def release_all(self) -> None:
        for number in list(self.held):
            self.release(number)


@dataclass(frozen=True)
class ReadyBatch:
    """Prepared pictures of one job; `failed` names what could not be read."""

    job: int
    keys: list[str]
    pixels: Tensor | None
    views: Tensor | None
    captions: list[str]
    records: list[dict[str, Any]]
    failed: list[str]
    last: bool


class Pictures(Dataset[PreparedImage]):
    """Decoded and cropped in loader processes; indexed by whole batches of `Claims`."""

    def __init__(self, jobs: Sequence[Job], source: Path, sizes: ViewSizes) -> None:
        self.jobs, self.source, self.sizes = list(jobs), source, sizes

    def __getitem__(self, key: tuple[int, int]) -> PreparedImage:
        job = self.jobs[key[0]]
        item = job.items[key[1]]
        picture = open_picture(self.source / item.path)
        return prepare_image(picture, item.caption, job.bucket, self.sizes, item.key, {"source": item.path})

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[ReadyBatch]:
        found: list[PreparedImage] = []
        failed = []
        for key in keys:
            try:
                found.append(self[key])
            except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNG files
                failed.append(f"{self.jobs[key[0]].items[key[1]].path}: {type(error).__name__}: {error}")
        number, item = keys[-1]
        return [
            ReadyBatch(
                number,
                [image.key for image in found],
                as_tensor([image.pixels for image in found]) if found else None,
                as_tensor([image.view for image in found]) if found else None,
                [image.caption for image in found],
                [image.record for image in found],
                failed,
                item == len(self.jobs[number].items) - 1,
            )
        ]


@dataclass(frozen=True)
class ViewSizes:
    """Sizes of DINO views by bucket: what loader processes need to know of the encoders."""

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


def _only(batch: list[ReadyBatch]) -> ReadyBatch:
    return batch[0]


# ---- writing ---------------------------------------------------------------------------------------------------------


class ShardThread:
    """Writes shards in the order of batches, in a thread of its own; at most a few batches wait."""

    def __init__(self, claims: Claims, trim_text: bool) -> None:
        self.claims, self.trim_text = claims, trim_text
        self._pool = ThreadPoolExecutor(1, "shards")
        self._pending: list[Future[None]] = []
        self._writer: ShardWriter | None = None
        self._failed: list[str] = []
        self._broken = False

    def add(self, batch: ReadyBatch, encoded: Encoded | None) -> None:
        """Raises what went wrong in writing an earlier batch."""
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
        for number, key in enumerate(batch.keys):
            assert encoded is not None
            try:
                self._writer.add(key, *encoded.sample(number, batch.records[number], self.trim_text))
            except ValueError as error:
                self._failed.append(f"{batch.records[number]['source']}: {error}")
        if batch.last:
            write_whole(failures_path(job.path), (json.dumps(self._failed, indent=1) + "\n").encode())
            self._writer.__exit__(None)
            self._writer = None
            self.claims.release(batch.job)

    def close(self, error: BaseException | None = None) -> None:
        """Writes what waits, and with an error leaves no shard half written."""
        self._pool.shutdown(wait=True)
        if self._writer is not None:
            self._writer.__exit__(type(error) if error is not None else RuntimeError)
            self._writer = None
        self.claims.release_all()
        if error is None:
            for future in self._pending:
                future.result()


# ---- the step --------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """What `images` did, and where its time went.

    Args:
        items: pictures that this call took on. data_wait_share: of the time from the first batch on, how much this
            process waited for pictures; the encoders are saturated where it is near 0. encode_share: spent in encoders.
        start_s: until the first batch was there: reading the list, loading the encoders, starting the loaders.
        failed: of the whole set, listed in failed.jsonl.
    """

    root: str
    shards: int = 0
    samples: int = 0
    items: int = 0
    failed: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    items_per_s: float = 0.0
    data_wait_share: float = 0.0
    encode_share: float = 0.0
    start_s: float = 0.0
    wall_s: float = 0.0
    rank: int = 0


@dataclass(frozen=True)
class Rank:
    """Which of several processes this is, as torchrun or SLURM say."""

    rank: int
    ranks: int
    local: int

    @classmethod
    def here(cls) -> Rank:
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)))
        return cls(0, 1, 0)

    def device(self, wanted: str) -> str:
        """The device of this process; "auto" is its own GPU, or the CPU without one."""
        if wanted != "auto":
            return wanted
        count = torch.cuda.device_count()
        return f"cuda:{self.local % count}" if count else "cpu"


@dataclass
class Clock:
    """Seconds from the first batch on: of all, waiting for data, and in the encoders."""

    spent: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    start: float | None = None  # until the first batch


def images(
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
    trim_text: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the shards of a folder of pictures; shards that are complete are kept.

    Args:
        source: folder, looked through with all below it. Captions stand in metadata.jsonl or captions.csv (columns
            file_name and caption or text), or beside each picture as <name>.txt, .caption or .json.
        root: receives bucket_<width>x<height>/shard-<number>.tar, failed.jsonl and, when all is there, images.json.
        encoders: see :class:`ImageEncoders`.
        size, bucket_step, max_aspect: of the buckets, see :func:`keygrip.data.image_text.crops.aspect_buckets`.
        images_per_shard: see above; a shard is also what an interruption loses at most. batch_size: pictures encoded at
            once.
        workers: loader processes; None: one for each core but one, 16 at most; 0: in this process.
        device: "auto", or a device's name.
        max_enlargement: pictures that would have to be enlarged more are left out.
        max_failed_share: more broken pictures than this are an error.
        trim_text: do not store text states of padding: 512 x 4096 numbers are 4 MB a picture.

    Returns:
        the fields of :class:`Prepared`.

    Raises:
        FileNotFoundError, ValueError: no pictures, other settings than before, or too many are broken.
    """
    started = time.perf_counter()
    rank, root, source = Rank.here(), Path(root), Path(source)
    buckets = aspect_buckets(size, bucket_step, max_aspect)
    for bucket in buckets:
        if bucket.width % encoders.latent_stride or bucket.height % encoders.latent_stride:
            raise ValueError(
                f"{bucket.name} does not divide by the latent's stride {encoders.latent_stride}; raise bucket_step"
            )
    if images_per_shard < 1 or batch_size < 1:
        raise ValueError(f"images_per_shard={images_per_shard} and batch_size={batch_size} must be at least 1")
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {source}")
    place = rank.device(device)
    encoders.to(place)
    identity = {"fingerprint": encoders.fingerprint, "description": encoders.description}
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": str(source.resolve()),
        "encoders": identity,
        "buckets": [bucket.name for bucket in buckets],
        "images_per_shard": images_per_shard,
        "max_enlargement": max_enlargement,
        "trim_text": trim_text,
    }
    check_settings(root, settings)
    items = frozen_items(root, source, buckets, max_enlargement, progress and rank.rank == 0)
    jobs = jobs_of(root, items, images_per_shard)
    if not jobs:
        reasons = "; ".join(f"{item.path}: {item.reason}" for item in items[:3])
        raise ValueError(f"none of the {len(items)} pictures in {source} can be used: {reasons}")
    for name in {job.path.parent for job in jobs}:
        if name.is_dir():
            remove_stale(name)
    result = Prepared(str(root), rank=rank.rank)
    open_items = sum(len(job.items) for job in jobs if not job.done)
    log.info("%d pictures, %d of them to do, on %s", len(items), open_items, place)
    if workers is None:
        workers = min((os.cpu_count() or 1) - 1, 16)
    sizes = ViewSizes.of(encoders, buckets)
    clock = Clock()
    with tqdm(total=open_items, desc=f"encode {source}", unit="image", disable=not progress or rank.rank > 0) as bar:
        while any(not job.done for job in jobs):
            claims = Claims(jobs, batch_size, rank.rank * len(jobs) // rank.ranks)
            taken = _encode(claims, Pictures(jobs, source, sizes), encoders, workers, trim_text, clock, bar, started)
            result.items += taken
            if not taken:  # all that is left is another process's
                if rank.rank > 0:
                    break
                time.sleep(LOOK_AGAIN_S)  # it may die, and its shards be free again
    spent = max(clock.spent, 1e-9)
    result.items_per_s, result.start_s = round(result.items / spent, 3), round(clock.start or 0.0, 2)
    result.data_wait_share, result.encode_share = round(clock.wait / spent, 4), round(clock.busy / spent, 4)
    result.wall_s = round(time.perf_counter() - started, 2)
    if rank.rank == 0:
        _finish(root, jobs, items, identity, max_failed_share, progress, result)
    log.info(
        "%d pictures in %.1f s, %.2f a second; %.1f %% of the time waiting for data, %.1f %% in the encoders",
        result.items,
        result.wall_s,
        result.items_per_s,
        100 * result.data_wait_share,
        100 * result.encode_share,
    )
    return asdict(result)


def _encode(
    claims: Claims,
    pictures: Pictures,
    encoders: ImageEncoders,
    workers: int,
    trim_text: bool,
    clock: Clock,
    bar: tqdm[Any],
    started: float,
) -> int:
    """Goes once over the jobs; how many pictures were taken on."""
    loader = DataLoader(
        pictures,
        batch_sampler=claims,
        num_workers=workers,
        collate_fn=_only,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    thread = ShardThread(claims, trim_text)
    taken, begun = 0, time.perf_counter()
    try:
        batches: Iterator[ReadyBatch] = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            now = time.perf_counter()
            if batch is None:
                break
            if not taken:  # loaders had to start
                begun = now
                clock.start = clock.start or now - started
            else:
                clock.wait += now - asked
            encoded = None
            if batch.pixels is not None and batch.views is not None:
                encoded = encode_images(encoders, batch.pixels, batch.views, batch.captions)
            clock.busy += time.perf_counter() - now
            thread.add(batch, encoded)
            taken += len(batch.keys) + len(batch.failed)
            bar.update(len(batch.keys) + len(batch.failed))
            bar.set_postfix(waiting=f"{clock.wait / max(clock.wait + clock.busy, 1e-9):.0%}", refresh=False)
    except BaseException as error:
        thread.close(error)
        raise
    thread.close()
    clock.spent += time.perf_counter() - begun if taken else 0.0
    return taken


def _finish(
    root: Path,
    jobs: Sequence[Job],
    items: Sequence[Item],
    identity: dict[str, Any],
    max_failed_share: float,
    progress: bool,
    result: Prepared,
) -> None:
    """Manifests, the list of what failed, and images.json last."""
    failed = [{"source": item.path, "reason": item.reason} for item in items if item.bucket is None]
    for job in jobs:
        for line in json.loads(failures_path(job.path).read_text()):
            path, _, reason = line.partition(": ")
            failed.append({"source": path, "reason": reason})
    write_whole(root / FAILED_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failed).encode())
    for row in failed[:NAMED_AT_MOST]:
        log.warning("left out: %s: %s", row["source"], row["reason"])
    if failed:
        log.warning("%d of %d pictures are left out; all are listed in %s", len(failed), len(items), root / FAILED_FILE)
    for folder in sorted({job.path.parent for job in jobs}):
        manifest = write_manifest(folder, describe_image_text, progress=progress)
        result.buckets[folder.name] = manifest["samples"]
        result.shards += len(manifest["shards"])
        result.samples += manifest["samples"]
        if not manifest["samples"]:
            (folder / MANIFEST).unlink()
    result.failed = len(failed)
    if len(failed) > max_failed_share * len(items) or not result.samples:
        with contextlib.suppress(FileNotFoundError):
            (root / INFO).unlink()  # nobody shall train on it
        first = f"{failed[0]['source']}: {failed[0]['reason']}"
        raise ValueError(
            f"{len(failed)} of {len(items)} pictures are left out of {root}, more than max_failed_share="
            f"{max_failed_share:g} allows; the first: {first}"
        )
    write_info(root, identity)
