"""The data module of images with text in aspect buckets: one bucket a batch, resumable in mid-epoch.

A root holds `bucket_<width>x<height>/` folders, each a shard set, or `train/`, `val/` and perhaps `test/` with such
folders; `images.json` beside them says with what they were made. A sample that lacks its patches (or another part) is
skipped, counted and reported; a set in which all are skipped is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from keygrip.data.batches import ImageTextBatch, ImageTextStatistics
from keygrip.data.image_text.crops import BUCKET_NAME, Bucket
from keygrip.data.image_text.samples import ImageTextSample, missing_parts, read_image_text
from keygrip.data.shards.bad_samples import SUBSTITUTES, Collate, Skipped, SkippingLoader, SubstitutingSamples
from keygrip.data.shards.made_shards import MadeShards, held_out
from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler, SampleKey
from keygrip.data.shards.tars import MANIFEST, SampleError, ShardCache, ShardSet, is_remote, write_whole
from keygrip.training.parts import data_part

log = logging.getLogger(__name__)

SCHEMA = "keygrip.images/1"
INFO = "images.json"
SPLITS = ("train", "val", "test")
MEASURED = 2048  # samples from which the statistics are computed
SMALLEST_STD = 1e-4
UNKNOWN = "unknown"


# ---- what lies in a folder -------------------------------------------------------------------------------------------


def write_info(root: Path | str, encoders: dict[str, Any] | None) -> dict[str, Any]:
    """Writes `images.json`: the buckets of every split, and the encoders ({"fingerprint", "description"})."""
    root = Path(root)
    splits = {split: [bucket.name for bucket in buckets_in(folder)] for split, folder in split_folders(root).items()}
    info = {"schema": SCHEMA, "splits": splits, "encoders": encoders}
    write_whole(root / INFO, (json.dumps(info, indent=1) + "\n").encode())
    return info


def split_folders(root: Path) -> dict[str, Path]:
    """Folders with buckets by split; "" for a root without splits."""
    found = {split: root / split for split in SPLITS if buckets_in(root / split)}
    return found or ({"": root} if buckets_in(root) else {})


def buckets_in(folder: Path) -> list[Bucket]:
    """The buckets of a local folder that have a manifest."""
    names = [path.parent.name for path in folder.glob(f"bucket_*/{MANIFEST}")]
    return sorted(Bucket.from_name(name) for name in names if BUCKET_NAME.match(name))


def read_info(root: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What `images.json` says; of a local folder without one, what lies there.

    Raises:
        FileNotFoundError: no such folder, or nothing in it. ValueError: a file of another kind.
    """
    if is_remote(root):
        digest = hashlib.sha256(root.encode()).hexdigest()[:16]
        folder = Path(cache_dir or Path.home() / ".cache" / "keygrip" / "shards") / digest
        content = json.loads(ShardCache(root, folder, 1 << 30).fetch(INFO).read_text())
    elif (Path(root) / INFO).is_file():
        content = json.loads((Path(root) / INFO).read_text())
    else:
        found = split_folders(Path(root))
        if not found:
            raise FileNotFoundError(
                f"no bucket_<width>x<height>/{MANIFEST} in {root} or its train/: make shards with `python -m "
                f"keygrip.prepare step=images source=... root={root}`, or index foreign ones with step=manifest"
            )
        splits = {split: [bucket.name for bucket in buckets_in(folder)] for split, folder in found.items()}
        content = {"schema": SCHEMA, "splits": splits, "encoders": None}
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{root}/{INFO} is a file of {content.get('schema')!r}, not of {SCHEMA!r}")
    return dict(content)


@data_part(from_checkpoint={"make_missing": False})
@dataclass(frozen=True)
class MadeImages(MadeShards):
    """Image shards that the program makes itself where they are missing; `images.json`, written last, says that they
    are whole."""

    def complete(self) -> None:
        """Makes what is missing; says so. Several processes may call it: one works, the others wait."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with (self.root.parent / f".{self.root.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.root / INFO).is_file():
                self.refuse_missing()
                from hydra.utils import get_method

                log.info("%s is not complete: making its shards", self.root)
                get_method(self.maker)(root=self.root, options=dict(self.options))


@dataclass(frozen=True)
class BucketPart:
    """The usable samples of one bucket in one split."""

    bucket: Bucket
    shards: ShardSet
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def first(self, column: str) -> int:
        return int(self.shards.columns[column][self.chosen[0]])


# ---- order -----------------------------------------------------------------------------------------------------------


class BucketBatchSampler(GlobalBatchSampler):
    """Global batches of one bucket each; otherwise as :class:`GlobalBatchSampler`.

    In training, what does not fill a batch of its bucket is left out of the epoch, other samples in each. In
    validation (`shuffle=False`, `drop_last=False`) every sample comes once, and a bucket's last batch may be smaller.

    Args:
        bucket: [N] int, of each sample.

    Raises:
        ValueError: no bucket fills a batch, or as the parent class.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        super().__init__(len(bucket), batch_size, rank, ranks, seed, shuffle, drop_last)
        self.bucket = bucket
        self.counts = np.unique(bucket, return_counts=True)[1] if len(bucket) else np.zeros(0, int)
        if drop_last and not len(self):
            raise ValueError(
                f"the fullest of {len(self.counts)} aspect buckets holds {self.counts.max()} samples, fewer than one "
                f"batch of {batch_size}; lower data.batch_size"
            )

    def __len__(self) -> int:
        whole = self.counts // self.batch_size
        return int((whole if self.drop_last else -(-self.counts // self.batch_size)).sum())

    def batches(self, epoch: int) -> list[np.ndarray]:
        """All ranks' batches of an epoch, in order."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch if self.shuffle else 0))))
        found = []
        for bucket in np.unique(self.bucket):
            members = rng.permutation(np.flatnonzero(self.bucket == bucket))
            stop = len(members) // self.batch_size * self.batch_size if self.drop_last else len(members)
            found += [members[start : start + self.batch_size] for start in range(0, stop, self.batch_size)]
        return [found[place] for place in rng.permutation(len(found))]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = (self.epoch, 0) if self.position is None else divmod(self.position(), max(1, len(self)))
        for batch in self.batches(epoch)[first:]:
            if len(batch) < self.ranks:
                batch = np.resize(batch, self.ranks)  # so that no rank waits for ever
            yield [SampleKey(int(index), epoch) for index in np.array_split(batch, self.ranks)[self.rank]]


# ---- samples ---------------------------------------------------------------------------------------------------------


class ImageTextSamples(SubstitutingSamples[ImageTextSample]):
    """The samples of some buckets, numbered one behind the other; indexed by `SampleKey`."""

    def __init__(self, parts: Sequence[BucketPart], sizes: dict[str, int]) -> None:
        self.parts, self.sizes = list(parts), sizes
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bucket(self) -> np.ndarray:
        """[N], number of each sample's bucket."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def __getitem__(self, key: SampleKey) -> ImageTextSample:
        """Raises SampleError: it cannot be read, or has other sizes than the rest of its bucket."""
        number = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        part = self.parts[number]
        place = int(part.chosen[key.sample - int(self.starts[number])])
        sample = read_image_text(part.shards, place)
        expected = (part.first("latent_height"), part.first("latent_width"))
        grid = (part.first("grid_height"), part.first("grid_width"))
        if sample.latent.shape[1:] != expected or sample.patch_grid != grid:
            raise SampleError(
                f"{part.shards.where(place)}: its latent is {sample.latent.shape[1:]} and its patches "
                f"{sample.patch_grid}; in {part.bucket.name} they are {expected} and {grid}"
            )
        found = {
            "latent_channels": len(sample.latent),
            "dino": len(sample.dino_cls),
            "text_dim": sample.text_states.shape[1],
            "text_length": len(sample.text_mask),
        }
        for name, size in self.sizes.items():
            if found[name] != size:
                raise SampleError(f"{part.shards.where(place)}: {name} is {found[name]}, elsewhere {size}")
        return sample

    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """The next ones of its bucket."""
        number = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        start, count = int(self.starts[number]), len(self.parts[number])
        for step in range(min(SUBSTITUTES + 1, count)):
            yield SampleKey(start + (key.sample - start + step) % count, key.epoch)


def make_batch(samples: Sequence[ImageTextSample]) -> ImageTextBatch:
    """Samples of one bucket as a batch."""

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    return ImageTextBatch(
        latents=stacked("latent"),
        text_states=stacked("text_states"),
        text_mask=stacked("text_mask"),
        dino_cls=stacked("dino_cls"),
        dino_patches=stacked("dino_patches"),
        patch_grid=samples[0].patch_grid,
        captions=[str(sample.record.get("caption", "")) for sample in samples],
        keys=[sample.key for sample in samples],
        records=[sample.record for sample in samples],
    )


# ---- statistics ------------------------------------------------------------------------------------------------------


class Moments:
    """Mean and standard deviation of many rows of numbers."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D]."""
        values = rows.astype(np.float64)
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(axis=0), self.squares + (values**2).sum(axis=0)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [D] each; no standard deviation is smaller than 1e-4."""
        mean = self.sum / self.count
        variance = np.maximum(self.squares / self.count - mean**2, 0)
        return mean.astype(np.float32), np.maximum(np.sqrt(variance), SMALLEST_STD).astype(np.float32)


def measure(samples: ImageTextSamples, progress: bool = True) -> dict[str, np.ndarray]:
    """Means and standard deviations of latents, CLS vectors and patches, channel by channel, over evenly chosen
    samples."""
    latent, cls, patches = Moments(), Moments(), Moments()
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(MEASURED, len(samples))).round().astype(int))
    for number in tqdm(chosen.tolist(), desc="statistics", unit="image", delay=2, leave=False, disable=not progress):
        try:
            sample = samples[SampleKey(number, 0)]
        except SampleError:
            continue  # counted when it is trained on
        latent.add(sample.latent.reshape(len(sample.latent), -1).T)
        cls.add(sample.dino_cls[None])
        patches.add(sample.dino_patches)
    if not latent.count:
        raise ValueError("none of the samples can be read: run step=validate on the shards")
    found = {"latent": latent, "cls": cls, "patch": patches}
    results = {name: moments.result() for name, moments in found.items()}
    return {
        key: value
        for name, (mean, std) in results.items()
        for key, value in ((f"{name}_mean", mean), (f"{name}_std", std))
    }


# ---- the data module -------------------------------------------------------------------------------------------------


@data_part
class ImageShards(ResumableData):
    """Images with text from shards in aspect buckets.

    Args:
        root: folder or URL, see the module's description. None: `make`.
        make: how the shards are made where they are missing.
        batch_size: images, global over all ranks; every batch is of one bucket.
        seed: of the order.
        val_fraction: of a set without splits, by a hash of the keys: always the same samples.
        max_val_samples: validation sees at most so many, spread evenly over each bucket; None: all.
        max_skipped_share: more samples without a needed part, or unreadable ones, stop the run.
        cache_dir, cache_gb: for remote shards.
        num_workers: loader processes; None: one for each core but one, 4 at most.
        prefetch_batches: batches that each worker keeps ready.
    """

    batch_type = ImageTextBatch
    order_depends_on = ("batch_size", "seed", "fingerprint")

    def __init__(
        self,
        batch_size: int,
        root: str | Path | None = None,
        make: MadeImages | None = None,
        seed: int = 0,
        val_fraction: float = 0.02,
        max_val_samples: int | None = 1000,
        max_skipped_share: float = 0.05,
        cache_dir: str | Path | None = None,
        cache_gb: float = 32.0,
        num_workers: int | None = None,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction:g} must lie between 0 and 1")
        self.root, self.make, self.batch_size, self.seed = root, make, batch_size, seed
        self.val_fraction, self.max_val_samples, self.max_skipped_share = (
            val_fraction,
            max_val_samples,
            max_skipped_share,
        )
        self.cache_dir, self.cache_gb = cache_dir, cache_gb
        self.num_workers = min((os.cpu_count() or 1) - 1, 4) if num_workers is None else num_workers
        self.prefetch_batches = prefetch_batches
        self.skipped = Skipped(max_skipped_share)
        self.prepare_data_per_node = False  # shards lie where every node sees them
        self.parts: dict[str, list[BucketPart]] = {}
        self.encoders = UNKNOWN
        self.sizes: dict[str, int] = {}

    @property
    def place(self) -> str:
        """The root, or where `make` puts it. Raises ValueError: neither is given."""
        if self.root is not None:
            return str(self.root)
        if self.make is None:
            raise ValueError("no data: name the folder or URL of the shards with data.root=PATH")
        return str(self.make.root)

    def prepare_data(self) -> None:
        """Makes the shards where they are missing and no other place was named."""
        if self.root is None and self.make is not None:
            self.make.complete()

    def setup(self, stage: str | None = None) -> None:
        """Opens all splits; once.

        Raises:
            FileNotFoundError, ShardError: shards are missing or broken (named). ValueError: all samples are skipped, or
                more than `max_skipped_share` of them.
        """
        if self.parts:
            return
        info = read_info(self.place, self.cache_dir)
        if info["encoders"] is not None:
            self.encoders = str(info["encoders"]["fingerprint"])
        opened: dict[str, list[BucketPart]] = {split: [] for split in SPLITS}
        for split, names in info["splits"].items():
            for name in names:
                folder = "/".join(part for part in (self.place.rstrip("/"), split, name) if part)
                shards = ShardSet(folder, self.cache_dir, self.cache_gb)
                usable = self._usable(shards, folder)
                for part, chosen in self._divided(split, shards, usable):
                    if len(chosen):
                        opened[part].append(BucketPart(Bucket.from_name(name), shards, chosen))
        if not opened["train"]:
            raise ValueError(f"no sample at {self.place} can be trained on: run step=validate root={self.place}")
        for split, parts in opened.items():
            parts.sort(key=lambda part: (-len(part), part.bucket))
            opened[split] = parts
        self.sizes = self._common_sizes(opened)
        self.parts = opened
        self._report()

    def _usable(self, shards: ShardSet, folder: str) -> np.ndarray:
        """bool [N]: samples that have everything. What is missing is counted and said."""
        names = list(shards.columns)
        rows = zip(*(shards.columns[name].tolist() for name in names), strict=True)
        lacks = [missing_parts(dict(zip(names, row, strict=True))) for row in rows]
        reasons = Counter(f"no {' and no '.join(missing)}" for missing in lacks if missing)
        usable = np.array([not missing for missing in lacks], dtype=bool)
        for reason, count in reasons.items():
            log.warning("skipped: %d of %d samples in %s have %s", count, len(shards), folder, reason)
        if len(shards) and not usable.any():
            raise ValueError(
                f"all {len(shards)} samples in {folder} are skipped: {next(iter(reasons))}; make the shards again with "
                "`python -m keygrip.prepare step=images`"
            )
        if (~usable).sum() > self.max_skipped_share * len(shards):
            raise ValueError(
                f"{(~usable).sum()} of {len(shards)} samples in {folder} are skipped ({next(iter(reasons))}), more "
                f"than data.max_skipped_share={self.max_skipped_share:g} allows"
            )
        return usable

    def _divided(self, split: str, shards: ShardSet, usable: np.ndarray) -> list[tuple[str, np.ndarray]]:
        if split:
            return [(split, np.flatnonzero(usable))]
        val = held_out(shards, self.val_fraction)
        return [("train", np.flatnonzero(usable & ~val)), ("val", np.flatnonzero(usable & val))]

    def _common_sizes(self, opened: dict[str, list[BucketPart]]) -> dict[str, int]:
        """Sizes that all samples have in common. Raises ValueError: they differ between buckets."""
        sizes: dict[str, int] = {}
        for parts in opened.values():
            for part in parts:
                for name in ("latent_channels", "dino", "text_dim", "text_length"):
                    size = sizes.setdefault(name, part.first(name))
                    if size != part.first(name):
                        raise ValueError(
                            f"{part.shards.root}: {name} is {part.first(name)}, in other buckets {size}; they were "
                            "made with different encoders"
                        )
        return sizes

    def _report(self) -> None:
        for split, parts in self.parts.items():
            held = ", ".join(f"{p.bucket.width} x {p.bucket.height}: {len(p)}" for p in parts)
            log.info("%s: %d images (%s)", split, sum(len(part) for part in parts), held or "none")
        for part in self.parts["train"]:
            if len(part) < self.batch_size:
                log.warning(
                    "%s holds %d training samples, fewer than a batch of %d: they are never trained on",
                    part.bucket.name,
                    len(part),
                    self.batch_size,
                )

    # ------------------------------------------------------------------------------------------------------- statistics

    @property
    def folder(self) -> Path:
        """Where something derived from the data may be kept: beside it, or in the cache where it is remote or cannot be
        written."""
        place = self.place
        if not is_remote(place) and Path(place).is_dir() and os.access(place, os.W_OK):
            return Path(place) / ".keygrip"
        return Path.home() / ".cache" / "keygrip" / hashlib.sha256(place.encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """Of everything that the order of training samples depends on."""
        digest = hashlib.sha256()
        for part in self.parts["train"]:
            digest.update(f"{part.bucket.name}:{part.shards.fingerprint}:".encode())
            digest.update(np.ascontiguousarray(part.chosen).tobytes())
        return digest.hexdigest()[:16]

    @property
    def statistics(self) -> ImageTextStatistics:
        """Of the training split, computed once and kept beside the shards; needs `setup`."""
        parts = self.parts["train"]
        measured = {name: torch.from_numpy(values) for name, values in self._measured().items()}
        return ImageTextStatistics(
            **measured,
            text_length=self.sizes["text_length"],
            text_dim=self.sizes["text_dim"],
            latent_sizes=[(part.first("latent_height"), part.first("latent_width")) for part in parts],
            patch_grids=[(part.first("grid_height"), part.first("grid_width")) for part in parts],
            fingerprint=self.fingerprint,
            encoders=self.encoders,
            folder=str(self.folder),
        )

    def _measured(self) -> dict[str, np.ndarray]:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"statistics-{self.fingerprint}.npz"
        with (self.folder / ".statistics.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process computes, the others wait for it
            if not file.is_file():
                buffer = io.BytesIO()
                np.savez(buffer, **measure(self.samples("train")))  # type: ignore[arg-type]
                write_whole(file, buffer.getvalue())
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}

    # ---------------------------------------------------------------------------------------------------------- loading

    def samples(self, split: str, limit: int | None = None) -> ImageTextSamples:
        """The samples of a split, or so many of them, spread evenly over each bucket."""
        parts = self.parts[split]
        total = sum(len(part) for part in parts)
        if limit is not None and limit < total:
            ends = np.cumsum([0, *(len(part) for part in parts)]) * limit / total
            counts = np.diff(ends.round().astype(int))
            parts = [
                BucketPart(p.bucket, p.shards, p.chosen[np.linspace(0, len(p) - 1, n).round().astype(int)])
                for p, n in zip(parts, counts, strict=True)
                if n
            ]
        return ImageTextSamples(parts, self.sizes)

    def _loader(self, samples: ImageTextSamples, sampler: GlobalBatchSampler) -> DataLoader[Any]:
        loader = SkippingLoader(collate_fn=Collate(make_batch), **self.loader_options(samples, sampler))
        loader.skipped = self.skipped
        return loader

    def train_dataloader(self) -> DataLoader[Any]:
        samples = self.samples("train")
        sampler = BucketBatchSampler(samples.bucket, self.batch_size, *self.ranks, seed=self.seed)
        if self.trainer is not None:
            sampler.follow(self.batches_done)
        return self._loader(samples, sampler)

    def held_out(self, split: str, limit: int | None = None) -> DataLoader[Any] | list[Any]:
        """A split's samples, each once and always in the same order; empty where there is no such split."""
        samples = self.samples(split, limit)
        if not len(samples):
            return []
        order = {"shuffle": False, "drop_last": False}
        return self._loader(samples, BucketBatchSampler(samples.bucket, self.batch_size, *self.ranks, **order))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.held_out("val", self.max_val_samples)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.held_out("test")
