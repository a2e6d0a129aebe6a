"""Shards of videos with text: padding, loading speed and time to resume, without a model that trains on the batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from keygrip.config import compose
from keygrip.data.batches import VideoTextBatch, stack_frames
from keygrip.data.shards.budget import Budget, Sizes
from keygrip.data.shards.mixing import Component, Mixture, padded_share, row_lengths_of, sizes_of
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, encode_jpeg, video_text_parts
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.lengths import CHARACTERS_A_TOKEN, NEARLY_ALL
from keygrip.data.video_text.sample_types import VideoTextSample
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.progress import Progress

MAX_FRAMES = 64
BATCHES = 300  # of an epoch that are packed: the packing is the slow part
PROMPT = 35  # assumed tokens of a chat template before the question, system turn included
QUESTION, QUESTION_SPREAD = 18.0, 0.5  # assumed tokens of questions: median, and standard deviation of the logarithm
ANSWER, ANSWER_SPREAD = 20.0, 0.75  # the same of answers about images
QUESTIONS = 6  # assumed mean number of question-answer pairs per image (a geometric distribution)


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


def captions(samples: int) -> list[Component]:
    """Return `web_videos` with one row per sample, no text of which stands before the frames."""
    return [replace(part, row_tokens=part.length, row_prefixes=np.zeros(len(part))) for part in web_videos(samples)]


def questions_about_videos(samples: int) -> list[Component]:
    """Return `web_videos` with a prompt and a question before the frames of each video."""
    videos, texts = captions(samples)
    prefixes = _prompts(np.random.default_rng(2), samples)
    tokens = prefixes + videos.length
    return [replace(videos, length=tokens, row_tokens=tokens, row_prefixes=prefixes), texts]


def questions_about_images(samples: int, most: int) -> list[Component]:
    """Return images with 1 to `most` questions each, each a row; and the texts of `web_videos`."""
    rng, texts = np.random.default_rng(3), captions(samples)[1]
    rows = np.minimum(rng.geometric(1 / QUESTIONS, samples), most)
    prefixes = _prompts(rng, int(rows.sum()))
    tokens = prefixes + ANSWER * np.exp(ANSWER_SPREAD * rng.standard_normal(len(prefixes)))
    longest = np.maximum.reduceat(tokens, np.cumsum(rows) - rows)
    shard = np.zeros(samples, dtype=np.int32)
    images = Component("images", np.ones(samples, dtype=np.int64), longest, shard)
    return [replace(images, rows=rows, row_tokens=tokens, row_prefixes=prefixes), texts]


def _prompts(rng: np.random.Generator, rows: int) -> np.ndarray:
    return np.asarray(PROMPT + QUESTION * np.exp(QUESTION_SPREAD * rng.standard_normal(rows)))


@dataclass(frozen=True)
class BudgetPadding:
    """Padding of the batches that the stages' budgets allow, computed from lengths; nothing is timed.

    Positions are counted over both passes of the language model in a step: the one that predicts queries and the one
    over the rows. An index contains the number of characters of a text. The number of tokens per character differs from
    text to text, here by a log-normal factor with `spread`. Batches are planned by the number of tokens, as in
    training, and for comparison by the number of characters (``data.budget.exact_lengths=false``, with an upper
    estimate that holds for nearly all texts). In both cases the batches are then limited to the budget by the number of
    tokens.

    Args:
        recipes: overrides of ``keygrip.train`` by name. With the frames first, the lengths are those of `captions`,
            otherwise those of `questions_about_videos`. images: names of recipes with the lengths of
            `questions_about_images`. epoch_samples, quick_samples: number of videos or images. spread: standard
            deviation of the logarithm of the tokens per character, over texts.
    """

    recipes: Mapping[str, Sequence[str]]
    images: Sequence[str]
    epoch_samples: int
    quick_samples: int
    spread: float

    def run(self, quick: bool) -> dict[str, float]:
        """For each recipe: `recipe_padding_share` of the positions, with the recipe's `model.network.pack_rows`;
        `padding_share` with padded rows, and `rows_padding_share` without the pass that predicts queries;
        `packed_padding_share` with packed rows; `filled_share`: used fraction of the budget's frames or positions,
        whichever is larger; `left_out_share` of the samples; `same_neighbours_share`: fraction of the samples in the
        same batch as a sample that share its batch again in the next epoch. `estimated_*`: the same figures of batches
        planned by characters. `known_padding_share`: padding planned by characters if the number of tokens per
        character were constant."""
        samples = self.quick_samples if quick else self.epoch_samples
        figures: dict[str, float] = {}
        for name, overrides in self.recipes.items():
            recipe: Any = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
            components = self._components(recipe, name in self.images, samples)
            estimated = self._figures(recipe, components, self.spread, exact=False)
            own = {
                **self._figures(recipe, components, self.spread, exact=True),
                **{f"estimated_{figure}": value for figure, value in estimated.items()},
                "known_padding_share": self._figures(recipe, components, 0, exact=False)["padding_share"],
            }
            figures |= {f"{name}_{figure}": value for figure, value in own.items()}
        return figures

    def _components(self, recipe: Any, images: bool, samples: int) -> list[Component]:
        if images:
            return questions_about_images(samples, recipe["data"]["questions"])
        visual_first = recipe["collator"]["prompt_order"] == "visual_first"
        return captions(samples) if visual_first else questions_about_videos(samples)

    def _figures(self, recipe: Any, components: Sequence[Component], spread: float, exact: bool) -> dict[str, float]:
        data, cut = recipe["data"], recipe["collator"]["max_tokens"]
        budget = Budget(data["budget"]["frames"], data["budget"]["positions"])
        rng = np.random.default_rng(1)
        real = [self._with_tokens(part, cut, spread, rng) for part in components]
        planned = real if exact else [self._with_upper_estimate(part, cut, spread) for part in components]
        mixture = Mixture(planned, data["batch_size"], budget=budget)
        planned_batches, sizes, lengths = mixture.batches_of(0), sizes_of(real), row_lengths_of(real)
        batches = [self._kept(batch, sizes, budget) for batch in planned_batches]
        filled = [
            max(
                sizes.frames[batch].sum() / budget.frames,
                sizes.rows[batch].sum() * sizes.positions[batch].max() / budget.positions,
            )
            for batch in batches
        ]
        sampled = [batches[n] for n in rng.permutation(len(batches))[:BATCHES]]

        def padding(chosen: Sequence[np.ndarray], packed: bool, query_passes: int = 1) -> float:
            held, total = np.sum([lengths.positions(batch, packed, query_passes) for batch in chosen], axis=0)
            return round(1 - float(held / total), 4)

        padded, packed = padding(batches, packed=False), padding(sampled, packed=True)
        return {
            "recipe_padding_share": packed if recipe["model"]["network"]["pack_rows"] else padded,
            "padding_share": padded,
            "rows_padding_share": padding(batches, packed=False, query_passes=0),
            "packed_padding_share": packed,
            "filled_share": round(float(np.mean(filled)), 4),
            "left_out_share": round(1 - sum(map(len, batches)) / sum(map(len, planned_batches)), 5),
            "same_neighbours_share": round(same_neighbours(planned_batches, mixture.batches_of(1)), 4),
        }

    def _with_tokens(self, part: Component, cut: int, spread: float, rng: np.random.Generator) -> Component:
        """Return the component with the numbers of tokens that its texts turn out to have."""
        assert part.row_tokens is not None
        assert part.row_prefixes is not None
        factor = np.exp(spread * rng.standard_normal(len(part.row_tokens)))
        tokens = np.minimum(part.row_tokens * factor, cut).round().clip(1)
        rows = np.ones(len(part), dtype=np.int64) if part.rows is None else part.rows
        longest = np.maximum.reduceat(tokens, np.cumsum(rows) - rows)
        prefixes = np.minimum(part.row_prefixes * factor, tokens).round()
        part = replace(part, length=longest, positions=part.bucket + longest)
        return replace(part, row_tokens=tokens, row_prefixes=prefixes)

    def _with_upper_estimate(self, part: Component, cut: int, spread: float) -> Component:
        """Return the component with an upper estimate of positions that holds for nearly all samples."""
        nearly_all = np.exp(spread * NormalDist().inv_cdf(NEARLY_ALL))
        return replace(
            part,
            length=np.minimum(part.length, cut),
            positions=part.bucket + np.minimum(part.length * nearly_all, cut),
        )

    def _kept(self, batch: np.ndarray, sizes: Sizes, budget: Budget) -> np.ndarray:
        """Limit a batch to the budget like `keygrip.data.video_text.batching.WithinBudget`."""
        order = batch[np.argsort(sizes.positions[batch], kind="stable")]
        fits = np.cumsum(sizes.rows[order]) * sizes.positions[order] <= budget.positions
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
