"""Shards of videos with text: padding, speed and the time to resume, with nothing that consumes the batches."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from keygrip.data.batches import VideoTextBatch, stack_frames
from keygrip.data.shards.mixing import Component, Mixture, padded_share
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import (
    VideoTextSample,
    answer,
    describe_video_text,
    encode_jpeg,
    video_text_parts,
)
from keygrip.data.video_text.datamodule import ShardSource, VideoTexts
from keygrip.data.video_text.lengths import CHARACTERS_A_TOKEN
from keygrip.progress import Progress

MAX_FRAMES = 64


class Bytes:
    """Stands for a language model's collator: a token for every four characters, and no tokenizer to wait for."""

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
            prompt_lengths=[1] * len(samples),
            truncated=0,
            kind=[c.kind for c in texts],
            source=[sample.source for sample in samples],
            key=[sample.key for sample in samples],
            texts=texts,
        )


@dataclass(frozen=True)
class Shards:
    """Three figures, and what is behind them.

    ``padding_share``: of the language model's positions, over an epoch of videos of 1 to 64 frames with 14 % text (and
    what it would be without buckets). ``samples_per_s``: decoded and batched by one process. ``resume_s``: opening the
    shards, computing the order of such an epoch, and the first batch.

    Args:
        epoch_samples: of the manifest from which the padding is computed. batch_size: of the epoch and of the loader.
        videos, quick_videos: that are written and read, each of `frames` images of `image_size` pixels.
    """

    epoch_samples: int
    batch_size: int
    videos: int
    quick_videos: int
    frames: int
    image_size: int

    def run(self, quick: bool) -> dict[str, float]:
        """The figures."""
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
        """An epoch as of a collection of web videos: most are short, captions and conversations vary widely."""
        rng = np.random.default_rng(0)
        frames = np.clip(np.exp(rng.normal(2.5, 0.8, self.epoch_samples)), 1, MAX_FRAMES).astype(np.int64)
        videos = np.clip(np.exp(rng.normal(4.8, 0.7, self.epoch_samples)), 20, 4000) / CHARACTERS_A_TOKEN
        texts = np.clip(np.exp(rng.normal(7.0, 0.8, self.epoch_samples // 4)), 50, 8000) / CHARACTERS_A_TOKEN
        shard = np.zeros(self.epoch_samples, dtype=np.int32)
        text = Component("text", np.zeros(len(texts), dtype=np.int64), texts, shard[: len(texts)], 0.14)
        return Mixture([Component("videos", frames, videos, shard), text], self.batch_size)

    def write(self, root: Path, videos: int) -> Path:
        """A shard set of noise that is about as hard to decode as images are."""
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (self.frames, self.image_size // 8, self.image_size // 8, 3), dtype=np.uint8)
        images = [encode_jpeg(np.kron(frame, np.ones((8, 8, 1), np.uint8)), 90) for frame in coarse]
        for start in range(0, videos, 100):
            with ShardWriter(root / f"noise-{start // 100:03d}.tar") as writer:
                for number in range(start, min(start + 100, videos)):
                    said = answer("What is it?", "noise " * (1 + number % 20), "caption")
                    writer.add(f"v{number}", *video_text_parts(images, [said], "noise"))
        write_manifest(root, describe_video_text, progress=False)
        return root

    def module(self, root: Path) -> VideoTexts:
        """The data module, in one process."""
        source = ShardSource(root, val_fraction=0.0)
        data = VideoTexts({"noise": source}, Bytes(), self.image_size, min(self.batch_size, 8), num_workers=0)
        data.setup("fit")
        return data
