"""Shards of videos with text: padding, loading speed and time to resume, without a model that trains on the batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from keygrip.config import compose
from keygrip.data.batches import VideoTextBatch, stack_frames
from keygrip.data.shards.budget import Budget
from keygrip.data.shards.mixing import Component, Mixture, padded_share, padding_of
from keygrip.data.shards.packing import positions_of
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, encode_jpeg, video_text_parts
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.lengths import CHARACTERS_A_TOKEN, NEARLY_ALL
from keygrip.data.video_text.sample_types import VideoTextSample
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.progress import Progress

MAX_FRAMES = 64
BATCHES = 300  # of an epoch that are packed: the packing is the slow part


class Bytes:
    """Stand-in for a language model's collator: one token per four characters, without a tokenizer."""

    def __call__(self, samples: list[VideoTextSample]) -> VideoTextBatch:
        frames, frame_mask = stack_frames(samples)
        texts = [sample.conversations[0] for sample in samples]
        lengths = torch.tensor([int(sum(len(t.text) for t in c.turns) / CHARACTERS_A_TOKEN) for c in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return VideoTextBatch(
            frames=frames,
            frame_mask=frame_mask,
            video_index=torch.arange(len(samples)),
            input_ids=mask.long(),
            attention_mask=mask,
            loss_mask=mask,
            answer_mask=mask,
            visual_at=[0] * len(samples),
            truncated=0,
            kind=[c.kind for c in texts],
            source=[sample.source for sample in samples],
            key=[sample.key for sample in samples],
            texts=texts,
        )


def web_videos(samples: int) -> list[Component]:
    """Return two components like those of a collection of web videos: `samples` videos, most of them short, with
    captions and conversations of widely varying length; and texts without videos, 14 % of an epoch."""
    rng = np.random.default_rng(0)
    frames = np.clip(np.exp(rng.normal(2.5, 0.8, samples)), 1, MAX_FRAMES).astype(np.int64)
    videos = np.clip(np.exp(rng.normal(4.8, 0.7, samples)), 20, 4000) / CHARACTERS_A_TOKEN
    texts = np.clip(np.exp(rng.normal(7.0, 0.8, samples // 4)), 50, 8000) / CHARACTERS_A_TOKEN
    shard = np.zeros(samples, dtype=np.int32)
    text = Component("text", np.zeros(len(texts), dtype=np.int64), texts, shard[: len(texts)], 0.14)
    return [Component("videos", frames, videos, shard), text]


@dataclass(frozen=True)
class Shards:
    """Padding, loading speed and time to resume.

    ``padding_share``: fraction of the language model's positions that are padding, over an epoch of videos of 1 to 64
    frames with 14 % text (``unbucketed_padding_share``: without buckets). ``samples_per_s``: samples decoded and
    batched by one process. ``resume_s``: time to open the shards, compute the order of such an epoch, and load the
    first batch.

    Args:
        epoch_samples: samples of the manifest from which the padding is computed. batch_size: of the epoch and of the
            loader (the loader uses at most 8).
        videos, quick_videos: number of videos that are written and read, each of `frames` images of `image_size`
            pixels.
    """

    epoch_samples: int
    batch_size: int
    videos: int
    quick_videos: int
    frames: int
    image_size: int

    def run(self, quick: bool) -> dict[str, float]:
        """Return the figures."""
        mixture = self.mixture()
        started = time.perf_counter()
        order = mixture.order(1)
        order_s = time.perf_counter() - started
        unordered = np.random.default_rng(0).permutation(order)
        figures = {
            "padding_share": padded_share(order, self.batch_size, mixture.bucket, mixture.length),
            "unbucketed_padding_share": padded_share(unordered, self.batch_size, mixture.bucket, mixture.length),
            "text_only_share": float((mixture.bucket[order] == 0).mean()),
        }
        with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as name:
            root = self.write(Path(name), self.quick_videos if quick else self.videos)
            started = time.perf_counter()
            batches = iter(self.module(root).train_dataloader())
            first = next(batches)
            figures["resume_s"] = order_s + time.perf_counter() - started
            started, count = time.perf_counter(), 0
            for batch in Progress(batches, desc="shards", unit="batch", leave=False):
                count += len(batch)
            figures["samples_per_s"] = count / (time.perf_counter() - started)
        return figures | {"order_s": order_s, "frames_a_sample": float(first.frame_mask.sum() / len(first))}

    def mixture(self) -> Mixture:
        """Return the samples of the epoch in batches of `batch_size`."""
        return Mixture(web_videos(self.epoch_samples), self.batch_size)

    def write(self, root: Path, videos: int) -> Path:
        """Write a shard set of noise images that are about as costly to decode as real images; return its folder."""
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (self.frames, self.image_size // 8, self.image_size // 8, 3), dtype=np.uint8)
        images = [encode_jpeg(np.kron(frame, np.ones((8, 8, 1), np.uint8)), 90) for frame in coarse]
        for start in range(0, videos, 100):
            with ShardWriter(root / f"noise-{start // 100:03d}.tar") as writer:
                for index in range(start, min(start + 100, videos)):
                    caption = answer("What is it?", "noise " * (1 + index % 20), "caption")
                    writer.add(f"v{index}", *video_text_parts(images, [caption], "noise"))
        write_manifest(root, describe_video_text, progress=False)
        return root

    def module(self, root: Path) -> VideoTexts:
        """Return the data module, which loads in one process."""
        source = ShardSource(root, val_fraction=0.0)
        data = VideoTexts({"noise": source}, Bytes(), self.image_size, min(self.batch_size, 8), num_workers=0)
        data.setup("fit")
        return data


@dataclass(frozen=True)
class BudgetPadding:
    """Padding of the batches that a stage's budget allows, computed from lengths; nothing is timed.

    An index contains the number of characters of a text. The number of tokens per character differs from text to text,
    here by a log-normal factor with `spread`. Batches are planned by the number of tokens, as in training, and for
    comparison by the number of characters (``data.budget.exact_lengths=false``, with an upper estimate that holds for
    nearly all texts). In both cases the batches are then limited to the budget by the number of tokens.

    Args:
        recipe: overrides of ``keygrip.train``. epoch_samples, quick_samples: number of videos in `web_videos`. spread:
            standard deviation of the logarithm of the tokens per character, over texts.
    """

    recipe: Sequence[str]
    epoch_samples: int
    quick_samples: int
    spread: float

    def run(self, quick: bool) -> dict[str, float]:
        """`padding_share` of the positions; `packed_padding_share` with `model.network.pack_rows=true`; `filled_share`:
        used fraction of the budget's frames or positions, whichever is larger; `left_out_share` of the samples;
        `same_neighbours_share`: fraction of the samples in the same batch as a sample that share its batch again in the
        next epoch. `estimated_*`: the same figures of batches planned by characters. `known_padding_share`: padding
        planned by characters if the number of tokens per character were constant."""
        samples = self.quick_samples if quick else self.epoch_samples
        estimated = self._figures(samples, self.spread, exact=False)
        return {
            **self._figures(samples, self.spread, exact=True),
            **{f"estimated_{name}": value for name, value in estimated.items()},
            "known_padding_share": self._figures(samples, 0, exact=False)["padding_share"],
        }

    def _figures(self, samples: int, spread: float, exact: bool) -> dict[str, float]:
        data: Any = OmegaConf.to_container(compose("train", list(self.recipe)), resolve=True)
        budget = Budget(data["data"]["budget"]["frames"], data["data"]["budget"]["positions"])
        batch_size, cut = data["data"]["batch_size"], data["collator"]["max_tokens"]
        components = web_videos(samples)
        rng = np.random.default_rng(1)
        real = [
            np.minimum(p.length * np.exp(spread * rng.standard_normal(len(p))), cut).round().clip(1) for p in components
        ]
        positions = np.concatenate([p.bucket + tokens for p, tokens in zip(components, real, strict=True)])
        planned = [
            replace(part, length=tokens, positions=part.bucket + tokens)
            if exact
            else self._with_upper_estimate(part, cut, spread)
            for part, tokens in zip(components, real, strict=True)
        ]
        mixture = Mixture(planned, batch_size, budget=budget)
        planned_batches = mixture.batches_of(0)
        batches = [self._kept(batch, positions, budget) for batch in planned_batches]
        filled = [
            max(mixture.bucket[batch].sum() / budget.frames, len(batch) * positions[batch].max() / budget.positions)
            for batch in batches
        ]
        sampled = [batches[n] for n in rng.permutation(len(batches))[:BATCHES]]
        places = sum(positions_of(positions[batch].tolist(), packed=True) for batch in sampled)
        return {
            "padding_share": round(padding_of(batches, positions), 4),
            "packed_padding_share": round(1 - float(sum(positions[batch].sum() for batch in sampled) / places), 4),
            "filled_share": round(float(np.mean(filled)), 4),
            "left_out_share": round(1 - sum(map(len, batches)) / sum(map(len, planned_batches)), 5),
            "same_neighbours_share": round(same_neighbours(planned_batches, mixture.batches_of(1)), 4),
        }

    def _with_upper_estimate(self, part: Component, cut: int, spread: float) -> Component:
        """Return the component with an upper estimate of positions that holds for nearly all samples."""
        nearly_all = np.exp(spread * NormalDist().inv_cdf(NEARLY_ALL))
        return replace(
            part,
            length=np.minimum(part.length, cut),
            positions=part.bucket + np.minimum(part.length * nearly_all, cut),
        )

    def _kept(self, batch: np.ndarray, positions: np.ndarray, budget: Budget) -> np.ndarray:
        """Limit a batch to the budget like `keygrip.data.video_text.batching.WithinBudget`, with one row per sample."""
        order = batch[np.argsort(positions[batch], kind="stable")]
        fits = np.arange(1, len(order) + 1) * positions[order] <= budget.positions
        return order[: max(1, int(fits.sum()))]


def same_neighbours(batches: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Return the fraction of sample pairs in the same batch in one epoch that are in the same batch in another epoch
    too; only samples that occur in both epochs count."""
    batch_of = {sample: index for index, batch in enumerate(others) for sample in batch.tolist()}
    pairs = shared = 0
    for batch in batches:
        batch_indices = np.array([batch_of[sample] for sample in batch.tolist() if sample in batch_of])
        _, counts = np.unique(batch_indices, return_counts=True)
        pairs += len(batch_indices) * (len(batch_indices) - 1)
        shared += int((counts * (counts - 1)).sum())
    return shared / pairs if pairs else 0.0
