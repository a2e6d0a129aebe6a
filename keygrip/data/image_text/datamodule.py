"""The data module for images with text in aspect buckets: one bucket per batch, resumable in mid-epoch.

A sample without its patches (or another required member) is skipped, counted and reported; a set in which all samples
are skipped is an error.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from keygrip.artifacts import atomic_write, make_once
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import BadSamples
from keygrip.data.batches import ImageTextBatch, ImageTextStatistics
from keygrip.data.image_text.bucket_folders import MadeImages, read_info
from keygrip.data.image_text.bucket_samples import BucketBatchSampler, BucketPart, ImageTextSamples, make_batch
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.samples import missing_parts
from keygrip.data.image_text.statistics import measure
from keygrip.data.shards.index import SPLITS
from keygrip.data.shards.made_shards import complete_sets, held_out
from keygrip.data.shards.reader import ShardSet, share_cache_limit, warn_of_small_cache
from keygrip.data.shards.remote import folder_beside
from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler
from keygrip.data.shards.substitution import Collate, CountingLoader
from keygrip.data.spacing import evenly
from keygrip.data.untrusted_files import read_npz
from keygrip.training.parts import ReadWhere, data_part

log = logging.getLogger(__name__)

UNKNOWN = "unknown"


@data_part(from_checkpoint={"cache_dir": None}, external=["cache_dir"], places=["root"])
class ImageShards(ResumableData):
    """Images with text from shards in aspect buckets.

    Args:
        root: folder or URL, see `keygrip.data.image_text.bucket_folders`. None: use the shards of `make`.
        make: how missing shards are generated.
        batch_size: images in a global batch, over all ranks; every batch is from one bucket.
        seed: of the order of samples.
        val_fraction: validation share of a set without splits; chosen by a hash of the keys: always the same samples.
        max_val_samples: the largest number of validation samples, spread evenly over each bucket; None: all.
        max_skipped_share: a larger share of samples without a needed part, or of unreadable ones, stops the run.
        window_shards: shuffle within windows of this many shards, over all buckets (remote shards); None: over
            everything.
        cache_dir, cache_gb: for remote shards: folder of the local copies, and the limit of all of them together.
        num_workers: loader processes; None: the number of cores minus one, at most 4.
        prefetch_batches: batches that each worker prepares in advance.
        trim_text: pad texts to the longest caption of the batch; False: to the encoder's full length.
    """

    read_where: ClassVar = {"make": ReadWhere("root", None)}
    batch_type = ImageTextBatch
    order_depends_on = ("batch_size", "seed", "fingerprint", "window_shards")
    compares_contents = True

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
        trim_text: bool = False,
        window_shards: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction:g} must lie between 0 and 1")
        if window_shards is not None and window_shards < 1:
            raise ValueError(f"data.window_shards must be at least 1, not {window_shards}; null shuffles everything")
        self.root, self.make, self.batch_size, self.seed = root, make, batch_size, seed
        self.val_fraction, self.max_val_samples = val_fraction, max_val_samples
        self.max_skipped_share = max_skipped_share
        self.cache_dir, self.cache_gb, self.window_shards = cache_dir, cache_gb, window_shards
        self.num_workers = min(usable_cores() - 1, 4) if num_workers is None else num_workers
        self.prefetch_batches, self.trim_text = prefetch_batches, trim_text
        self.skipped = BadSamples(max_skipped_share)
        self.prepare_data_per_node = False  # every node can read the shards in the same place
        self.parts: dict[str, list[BucketPart]] = {}
        self.encoders = UNKNOWN
        self.encoder_settings: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.divided_by_keys = False  # True: the set has no splits of its own

    @property
    def place(self) -> str:
        """The root, or the folder of `make`. Raises ValueError if neither is given."""
        if self.root is not None:
            return str(self.root)
        if self.make is None:
            raise ValueError("no data: name the folder or URL of the shards with data.root=PATH")
        return str(self.make.root)

    def prepare_data(self) -> None:
        """Generate the shards if they are missing and no `root` is given."""
        if self.root is None and self.make is not None:
            complete_sets({"data.root": self.make})

    def setup(self, stage: str | None = None) -> None:
        """Open all splits; later calls do nothing.

        Raises:
            FileNotFoundError, ShardError: shards are missing or broken (the message names them). ValueError: all
                samples are skipped, or more than `max_skipped_share` of them.
        """
        if self.parts:
            return
        info = read_info(self.place, self.cache_dir)
        if info["encoders"] is not None:
            self.encoders = str(info["encoders"]["fingerprint"])
            self.encoder_settings = info["encoders"].get("description") or {}
        opened: dict[str, list[BucketPart]] = {split: [] for split in SPLITS}
        sets: list[ShardSet] = []
        for split, names in info["splits"].items():
            for name in names:
                folder = "/".join(part for part in (self.place.rstrip("/"), split, name) if part)
                shards = ShardSet(folder, self.cache_dir, self.cache_gb, spares_copies=self.spares_copies)
                sets.append(shards)
                usable = self._usable(shards, folder)
                for part, chosen in self._divide_samples(split, shards, usable):
                    if len(chosen):
                        opened[part].append(BucketPart(Bucket.from_name(name), shards, chosen))
        share_cache_limit(sets)
        if not opened["train"]:
            raise ValueError(f"no sample at {self.place} can be trained on: run step=validate root={self.place}")
        for split, parts in opened.items():
            parts.sort(key=lambda part: (-len(part), part.bucket))
            opened[split] = parts
        self.sizes = self._common_sizes(opened)
        self.parts, self.divided_by_keys = opened, "" in info["splits"]
        if stage == "fit":
            used = [part.shards for split in ("train", "val") for part in opened[split]]
            warn_of_small_cache(used, self.cache_gb, self.window_shards)
        self._report()

    def _usable(self, shards: ShardSet, folder: str) -> np.ndarray:
        """Return bool [N], True for samples that have all parts. Missing parts are counted and logged."""
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

    def _divide_samples(self, split: str, shards: ShardSet, usable: np.ndarray) -> list[tuple[str, np.ndarray]]:
        if split:
            return [(split, np.flatnonzero(usable))]
        val = held_out(shards, self.val_fraction)
        return [("train", np.flatnonzero(usable & ~val)), ("val", np.flatnonzero(usable & val))]

    def _common_sizes(self, opened: dict[str, list[BucketPart]]) -> dict[str, int]:
        """Return the sizes that are the same for all samples. Raise ValueError if they differ between buckets."""
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
            bucket_counts = ", ".join(f"{p.bucket.width} x {p.bucket.height}: {len(p)}" for p in parts)
            log.info("%s: %d images (%s)", split, sum(len(part) for part in parts), bucket_counts or "none")
        for part in self.parts["train"]:
            if not self._is_trained_on(part):
                log.warning(
                    "%s holds %d training samples, fewer than a batch of %d: they are never trained on",
                    part.bucket.name,
                    len(part),
                    self.batch_size,
                )

    def _is_trained_on(self, part: BucketPart) -> bool:
        """Whether a part of the training split fills a batch."""
        return len(part) >= self.batch_size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `ResumableData`; checkpoints from before there was `window_shards` were trained without it."""
        super().load_state_dict({"window_shards": None, **state_dict})

    # ------------------------------------------------------------------------------------------------------- statistics

    @property
    def folder(self) -> Path:
        """Where files derived from the data may be stored (`folder_beside`)."""
        return folder_beside(self.place)

    def shard_hashes(self) -> dict[str, str]:
        parts = self.parts["train"]
        return {name: told for part in parts for name, told in part.shards.hashes(part.bucket.name).items()}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order of training samples depends on."""
        return self.fingerprint_of("train")

    def fingerprint_of(self, split: str) -> str:
        """Return a hash of the samples of a split and their order; requires `setup`."""
        digest = hashlib.sha256()
        for part in self.parts[split]:
            digest.update(f"{part.bucket.name}:{part.shards.fingerprint}:".encode())
            digest.update(np.ascontiguousarray(part.chosen).tobytes())
        return digest.hexdigest()[:16]

    @property
    def statistics(self) -> ImageTextStatistics:
        """Statistics of the training split, computed once and stored next to the shards; requires `setup`. Its sizes
        are those of the buckets that fill a batch: the others are never trained on.

        Raises:
            ValueError: no bucket fills a batch.
        """
        parts = [part for part in self.parts["train"] if self._is_trained_on(part)]
        if not parts:
            raise ValueError(
                f"the fullest bucket of {self.place} holds {len(self.parts['train'][0])} training images, fewer than a "
                f"batch of {self.batch_size}: lower data.batch_size"
            )
        measured = {name: torch.from_numpy(values) for name, values in self._measured().items()}
        return ImageTextStatistics(
            **measured,
            text_length=self.sizes["text_length"],
            text_dim=self.sizes["text_dim"],
            latent_sizes=[_latent_size(part) for part in parts],
            patch_grids=[(part.first("grid_height"), part.first("grid_width")) for part in parts],
            fingerprint=self.fingerprint,
            encoders=self.encoders,
            folder=str(self.folder),
            val_latent_sizes=[_latent_size(part) for part in self.parts["val"]],
            encoder_settings=self.encoder_settings,
        )

    def _measured(self) -> dict[str, np.ndarray]:
        file = self.folder / f"statistics-{self.fingerprint}.npz"
        make_once(file, Path.is_file, self._measure, together_without=True)  # one process computes, the others wait
        return dict(read_npz(file))

    def _measure(self, file: Path) -> None:
        measured = measure(self.samples("train"))
        with atomic_write(file) as opened:
            np.savez(opened, **measured)  # type: ignore[arg-type]

    # ---------------------------------------------------------------------------------------------------------- loading

    def samples(
        self, split: str, limit: int | None = None, vary_captions: bool = False, with_images: bool = False
    ) -> ImageTextSamples:
        """Return the samples of a split, or `limit` of them, spread evenly over each bucket. The number of a sample is
        its place in the whole split, whatever the limit."""
        parts, numbers = self.parts[split], None
        starts = np.cumsum([0, *(len(part) for part in parts)])
        total = int(starts[-1])
        if limit is not None and limit < total:
            counts = np.diff((starts * limit / total).round().astype(int))
            kept = [np.array(evenly(len(part), n), dtype=int) for part, n in zip(parts, counts, strict=True)]
            numbers = np.concatenate([start + places for start, places in zip(starts[:-1], kept, strict=True)])
            parts = [
                BucketPart(p.bucket, p.shards, p.chosen[places])
                for p, places in zip(parts, kept, strict=True)
                if len(places)
            ]
        return ImageTextSamples(parts, self.sizes, vary_captions, with_images, numbers)

    def _loader(self, samples: ImageTextSamples, sampler: GlobalBatchSampler) -> DataLoader[Any]:
        loader = CountingLoader(
            collate_fn=Collate(partial(make_batch, trim_text=self.trim_text)), **self.loader_options(samples, sampler)
        )
        loader.skipped = self.skipped
        return loader

    def train_dataloader(self) -> DataLoader[Any]:
        samples = self.samples("train", vary_captions=True)
        sampler = BucketBatchSampler(
            samples.bucket,
            self.batch_size,
            *self.ranks,
            seed=self.seed,
            shard=samples.shard,
            window_shards=self.window_shards,
        )
        if self.trainer is not None:
            sampler.follow(self.batches_done)
        return self._loader(samples, sampler)

    def held_out(
        self, split: str, limit: int | None = None, with_images: bool = False, batch_size: int | None = None
    ) -> DataLoader[Any] | list[Any]:
        """Return a loader of a split's samples, each once and always in the same order; [] if the split is empty.

        Args:
            with_images: also load the images' pixels, if the shards contain them. batch_size: None: as in training.
        """
        samples = self.samples(split, limit, with_images=with_images)
        if not len(samples):
            return []
        samples.leaves_out, samples.never_empty = True, self.ranks[1] > 1
        size = batch_size or self.batch_size
        sampler = BucketBatchSampler(samples.bucket, size, *self.ranks, shuffle=False, drop_last=False)
        return self._loader(samples, sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.parts["val"]:
            why = f"data.val_fraction={self.val_fraction:g} takes none" if self.divided_by_keys else "there is no val/"
            log.warning("%s has no images for validation (%s): training writes no val/ figures", self.place, why)
        return self.held_out("val", self.max_val_samples)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.held_out("test")


def _latent_size(part: BucketPart) -> tuple[int, int]:
    """Return (h, w) of a bucket's latents."""
    return part.first("latent_height"), part.first("latent_width")
