"""Order, read and batch the samples of image shards by aspect bucket; each batch is from one bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from keygrip.data.bad_samples import BadSample
from keygrip.data.batches import ImageTextBatch
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.samples import ImageTextSample, read_image_text, read_stored_record
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.sampling import GlobalBatchSampler, SampleKey
from keygrip.data.shards.substitution import SUBSTITUTES, SubstitutingSamples


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


class BucketBatchSampler(GlobalBatchSampler):
    """Yield global batches from one bucket each; otherwise the same as :class:`GlobalBatchSampler`.

    In training, samples that do not fill a batch of their bucket are left out of the epoch; these are different samples
    in every epoch. With `window_shards`, the shards of all buckets are grouped into windows in random order, and the
    batches come window after window; samples that do not fill a batch of their bucket move to the next window that has
    samples of this bucket. In validation (`shuffle=False`, `drop_last=False`) every sample occurs once. The last batch
    of a bucket may then be smaller, or larger by fewer samples than there are ranks.

    Args:
        bucket: [N] int, bucket of each sample.
        shard: [N] int, shard of each sample, used only with `window_shards`.
        window_shards: number of shards in a window, over all buckets; None: shuffle over everything.

    Raises:
        ValueError: no bucket fills a batch, `window_shards` is below 1, or an error of the parent class.
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
        shard: np.ndarray | None = None,
        window_shards: int | None = None,
    ) -> None:
        super().__init__(len(bucket), batch_size, rank, ranks, seed, shuffle, drop_last)
        self.bucket, self.shard, self.window_shards = bucket, shard, window_shards
        if window_shards is not None and (shard is None or window_shards < 1):
            raise ValueError(f"window_shards must be at least 1, with the shard of each sample, not {window_shards}")
        self.counts = np.unique(bucket, return_counts=True)[1] if len(bucket) else np.zeros(0, int)
        if drop_last and not len(self):
            raise ValueError(
                f"the fullest of {len(self.counts)} aspect buckets holds {self.counts.max()} samples, fewer than one "
                f"batch of {batch_size}; lower data.batch_size"
            )

    def __len__(self) -> int:
        whole, rest = np.divmod(self.counts, self.batch_size)
        if not self.drop_last:
            whole = whole + ((rest >= self.ranks) | ((whole == 0) & (rest > 0)))
        return int(whole.sum())

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the global batches (for all ranks together) of an epoch, in order."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch if self.shuffle else 0))))
        window = self._windows(rng)
        all_batches = []
        for bucket in np.unique(self.bucket):
            members = rng.permutation(np.flatnonzero(self.bucket == bucket))
            if window is not None:
                members = members[np.argsort(window[members], kind="stable")]
            stop = len(members) // self.batch_size * self.batch_size if self.drop_last else len(members)
            parts = [members[start : start + self.batch_size] for start in range(0, stop, self.batch_size)]
            if len(parts) > 1 and len(parts[-1]) < self.ranks:
                # an empty batch keeps the position, so that the order is the same as with one process
                parts[-2:] = [np.concatenate(parts[-2:]), members[:0]]
            all_batches += parts
        order = rng.permutation(len(all_batches))
        if window is not None:  # each batch in the window that completes it
            last = np.array([window[batch].max(initial=0) for batch in all_batches])
            order = order[np.argsort(last[order], kind="stable")]
        return [all_batches[index] for index in order if len(all_batches[index])]

    def _windows(self, rng: np.random.Generator) -> np.ndarray | None:
        """Return the window of each sample, int [N]; None without `window_shards`."""
        if self.window_shards is None or self.shard is None:
            return None
        shards, shard = np.unique(self.shard, return_inverse=True)
        return (rng.permutation(len(shards)) // self.window_shards)[shard]

    def parts_of(self, epoch: int, first: int = 0) -> Iterator[Sequence[np.ndarray]]:
        for batch in self.batches(epoch)[first:]:
            # a bucket with fewer samples than ranks repeats its samples, so that no rank waits forever
            yield np.array_split(np.resize(batch, max(len(batch), self.ranks)), self.ranks)


class ImageTextSamples(SubstitutingSamples[ImageTextSample]):
    """The samples of some buckets, numbered consecutively; indexed by `SampleKey`.

    Args:
        vary_captions: use the captions of an image with several captions in turn, one per epoch; otherwise always the
            first caption.
        with_images: also return the images' pixels, if the shards contain them.
        numbers: [N], place of each sample in its split (`ImageTextSample.number`); None: these are the whole split.
    """

    def __init__(
        self,
        parts: Sequence[BucketPart],
        sizes: dict[str, int],
        vary_captions: bool = False,
        with_images: bool = False,
        numbers: np.ndarray | None = None,
    ) -> None:
        self.parts, self.sizes, self.vary_captions = list(parts), sizes, vary_captions
        self.with_images = with_images
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.numbers = np.arange(len(self)) if numbers is None else numbers

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bucket(self) -> np.ndarray:
        """[N], index of each sample's bucket."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    @property
    def shard(self) -> np.ndarray:
        """[N], shard of each sample, with the shards numbered consecutively over all buckets."""
        first = np.cumsum([0, *(len(part.shards.shards) for part in self.parts)]).tolist()
        chosen = [part.shards.shard[part.chosen].astype(np.int64) for part in self.parts]
        return np.concatenate([start + shard for start, shard in zip(first[:-1], chosen, strict=True)])

    def __getitem__(self, key: SampleKey) -> ImageTextSample:
        """Read a sample. Raise BadSample if it cannot be read or its sizes differ from the rest of its bucket."""
        part_index = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        part = self.parts[part_index]
        index = int(part.chosen[key.sample - int(self.starts[part_index])])
        caption = key.epoch + key.sample if self.vary_captions else 0
        sample = read_image_text(part.shards, index, caption, self.with_images)
        expected = (part.first("latent_height"), part.first("latent_width"))
        grid = (part.first("grid_height"), part.first("grid_width"))
        if sample.latent.shape[1:] != expected or sample.patch_grid != grid:
            raise BadSample(
                f"{part.shards.where(index)}: its latent is {sample.latent.shape[1:]} and its patches "
                f"{sample.patch_grid}; in {part.bucket.name} they are {expected} and {grid}"
            )
        actual_sizes = {
            "latent_channels": len(sample.latent),
            "dino": len(sample.dino_cls),
            "text_dim": sample.text_states.shape[1],
            "text_length": len(sample.text_mask),
        }
        if sample.image is not None and sample.image.shape[1::-1] != (part.bucket.width, part.bucket.height):
            raise BadSample(f"{part.shards.where(index)}: its image is {sample.image.shape[:2]}, of {part.bucket.name}")
        for name, size in self.sizes.items():
            if actual_sizes[name] != size:
                raise BadSample(f"{part.shards.where(index)}: {name} is {actual_sizes[name]}, elsewhere {size}")
        return replace(sample, number=int(self.numbers[key.sample]))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the samples, in order and without their arrays; unreadable ones are left out."""
        for part in self.parts:
            for index in part.chosen.tolist():
                try:
                    yield read_stored_record(part.shards, index)
                except BadSample:  # counted and named when the whole sample is read
                    continue

    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield the sample itself and then the following samples of its bucket."""
        number = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        start, count = int(self.starts[number]), len(self.parts[number])
        for step in range(min(SUBSTITUTES + 1, count)):
            yield SampleKey(start + (key.sample - start + step) % count, key.epoch)


def make_batch(samples: Sequence[ImageTextSample], trim_text: bool = False) -> ImageTextBatch:
    """Stack samples of one bucket into a batch.

    Args:
        trim_text: cut off the padding after the longest caption: 512 states of T5-XXL are 8 MB per image.
    """
    length = max(1, *(int(sample.text_mask.sum()) for sample in samples)) if trim_text else None

    def stacked(name: str) -> torch.Tensor:
        cut = slice(length if name.startswith("text") else None)
        return torch.from_numpy(np.stack([getattr(sample, name)[cut] for sample in samples]))

    images = [sample.image for sample in samples if sample.image is not None]
    return ImageTextBatch(
        latents=stacked("latent"),
        text_states=stacked("text_states"),
        text_mask=stacked("text_mask"),
        dino_cls=stacked("dino_cls"),
        dino_patches=stacked("dino_patches"),
        patch_grid=samples[0].patch_grid,
        captions=[str(sample.record.get("caption", "")) for sample in samples],
        keys=[sample.key for sample in samples],
        numbers=[sample.number for sample in samples],
        records=[sample.record for sample in samples],
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if len(images) == len(samples) else None,
    )
