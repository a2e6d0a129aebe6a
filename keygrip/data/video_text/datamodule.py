"""The data module for videos with text from shards: mixed, bucketed, decoded in workers, resumable in mid-epoch."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from keygrip.artifacts import locked
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import BadSample, BadSamples
from keygrip.data.batches import VideoTextBatch, VideoTextStatistics
from keygrip.data.shards.budget import MEASURES, Budget, Load, costliest, queries
from keygrip.data.shards.curriculum import Stage, first_steps, warn_of_unreached
from keygrip.data.shards.index import MOST_FRAMES, SPLITS
from keygrip.data.shards.made_shards import complete_sets
from keygrip.data.shards.mixing import (
    BucketedSampler,
    Component,
    MixedBatchSampler,
    Mixture,
)
from keygrip.data.shards.reader import share_cache_limit, warn_of_small_cache
from keygrip.data.shards.remote import folder_beside
from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler, SampleKey
from keygrip.data.shards.substitution import Collate
from keygrip.data.video_text.batching import (
    Collator,
    MeasuringCollator,
    PackingCollator,
    PreparedCollator,
    Questions,
    WithinBudget,
    held_out_questions,
    uses_all_of_kind,
    uses_kind,
)
from keygrip.data.video_text.checks import check_clips, check_kinds, usable_parts
from keygrip.data.video_text.clips import SubClips
from keygrip.data.video_text.context import Context
from keygrip.data.video_text.conversations import FITS, MAX_FRAMES, iterate_texts
from keygrip.data.video_text.exact_lengths import count_lengths
from keygrip.data.video_text.lengths import TextLengths, measure_lengths
from keygrip.data.video_text.samples import Part, ReportingLoader, VideoTextSamples, select_held_out
from keygrip.data.video_text.shard_source import AUTO, OpenedSets, ShardSource, common_fit
from keygrip.training.parts import data_part

log = logging.getLogger(__name__)

COSTLY = 4  # number of batches with the largest estimates, among which the actually largest one is searched


@data_part(from_checkpoint={"cache_dir": None}, external=["cache_dir"])
class VideoTexts(ResumableData):
    """Videos, images and text from shard sets.

    Args:
        sources: by name; None removes a source of the config.
        collator: makes batches from samples (specific to the language model); picklable.
        image_size: edge of the square frames. fit: "stretch" | "crop" | "pad" for frames that are not square, in
            training and inference; "auto": as the sources were prepared, or "stretch" if no source states it.
        batch_size: videos in a global batch, over all ranks.
        seed: of the order and the choice of questions.
        max_frames: number of evenly spaced frames used of longer samples.
        image_frames: a sample with one image is shown as this number of equal frames, also in inference: queries then
            learn from images too if the frames come first. Not with time stamps.
        questions: conversations per video in training: all (null), this number at random, or numbers by kind
            ({mark: 4}: 4 of this kind and all of other kinds). Samples of which all kinds have the number 0 are left
            out beforehand.
        val_questions: the same for validation and test, where the choice never changes. Kinds that have the number 0 in
            `questions`, and none here, are left out.
        max_val_samples: size limit of the validation set, which always has the same samples; None: no limit. The test
            set has none.
        window_shards: shuffle within windows of this many shards (remote shards); None: over everything.
        cache_dir, cache_gb: for remote shards: folder of the local copies, and the limit of all of them together.
        max_skipped_share: a larger share of unreadable samples stops the run. Samples that the collator cannot use (too
            long by themselves or for the language model's context) are left out beforehand if the index shows it;
            otherwise training replaces them by shorter ones. They are counted separately.
        num_workers: loader processes; None: the number of cores minus one, at most 4.
        prefetch_batches: batches that each worker prepares in advance.
        memory_gb: memory per reading process for caching decoded training samples; 0: decode every time.
        curriculum: see :class:`keygrip.data.shards.mixing.Mixture`; for the lead sources, by name.
        budget: of frames and positions per batch, over all ranks; `batch_size` is then the largest number of videos.
            None: always `batch_size` videos. Batches are planned with the tokens of all texts, counted once
            (`exact_lengths`), or with lengths that nearly all texts stay below (`lengths`). Each batch is then kept
            within the positions by its actual row lengths: excess samples are left out and counted.
        clips: cut out of longer training videos; batches and a budget count whole videos. An error if none can be cut.
            None: videos stay whole.
    """

    batch_type = VideoTextBatch
    order_depends_on = ("batch_size", "seed", "fingerprint", "window_shards")
    compares_contents = True

    def __init__(
        self,
        sources: Mapping[str, ShardSource | None],
        collator: Collator,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        fit: str = "auto",
        max_frames: int = MAX_FRAMES,
        questions: Questions = None,
        val_questions: Questions = None,
        max_val_samples: int | None = 10_000,
        window_shards: int | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 32.0,
        max_skipped_share: float = 0.05,
        num_workers: int | None = None,
        prefetch_batches: int = 4,
        memory_gb: float = 0.0,
        curriculum: Sequence[Stage] | None = None,
        budget: Budget | None = None,
        clips: SubClips | None = None,
        image_frames: int = 1,
    ) -> None:
        super().__init__()
        self.budget, self.clips = budget, clips
        self.sources = {name: source for name, source in sources.items() if source is not None}
        if not self.sources:
            raise ValueError("no data: name at least one source with data.sources.NAME.root=PATH")
        if fit not in (*FITS, AUTO):
            raise ValueError(f"data.fit must be one of {', '.join((*FITS, AUTO))}, not {fit!r}")
        if not 1 <= max_frames <= MOST_FRAMES:
            raise ValueError(f"data.max_frames must be 1 to {MOST_FRAMES}, not {max_frames}")
        if not 1 <= image_frames <= max_frames:
            raise ValueError(f"data.image_frames={image_frames}: 1 to data.max_frames={max_frames}")
        if image_frames > 1 and getattr(collator, "timestamps", False):
            raise ValueError(
                f"data.image_frames={image_frames} and collator.timestamps=true: the frames of an image have one time; "
                "set image_frames=1"
            )
        for name, chosen in (("questions", questions), ("val_questions", val_questions)):
            if isinstance(chosen, int) and chosen < 1:
                raise ValueError(f"data.{name} must be at least 1, not {chosen}; null takes all")
            if isinstance(chosen, Mapping) and min(chosen.values(), default=0) < 0:
                raise ValueError(f"data.{name} counts questions of each kind, from 0, not {dict(chosen)}")
        if max_val_samples is not None and max_val_samples < 1:
            raise ValueError(f"data.max_val_samples must be at least 1, not {max_val_samples}; null takes all")
        for name, size in (("cache_gb", cache_gb), ("memory_gb", memory_gb)):
            if size < 0:
                raise ValueError(f"data.{name} must not be negative, not {size}")
        self.collator, self.image_size, self.max_frames = collator, image_size, max_frames
        self.image_frames = image_frames
        self.given_fit, self.fit = fit, FITS[0] if fit == AUTO else fit  # `setup` replaces "auto" by the sources' fit
        self.batch_size, self.seed = batch_size, seed
        self.questions, self.val_questions = questions, held_out_questions(questions, val_questions)
        self.max_val_samples, self.window_shards = max_val_samples, window_shards
        self.cache_dir, self.cache_gb = cache_dir, cache_gb
        self.memory_gb, self.curriculum = memory_gb, list(curriculum or [])
        self.num_workers = min(usable_cores() - 1, 4) if num_workers is None else num_workers
        self.prefetch_batches = prefetch_batches
        self.skipped = BadSamples(max_skipped_share)
        self.unusable = BadSamples(math.inf)  # valid samples: they are counted and never stop a run
        self.prepare_data_per_node = False  # every node can read the shards in the same place
        self.parts: dict[str, list[Part]] = {}
        self._prepared_sets: OpenedSets | None = None  # from `prepare_data` to `setup`
        self.mixture: Mixture | None = None
        self.longest_row: int | None = None  # positions of the language model's context; None: unknown
        self.query_passes = 0.0  # of the language model in a training step, on average

    # ---------------------------------------------------------------------------------------------------------- reading

    def configure_for(self, module: Any) -> None:
        """Store the model's `longest_row` and, for `padding_share`, its `query_passes`; call it before `setup`."""
        self.longest_row, self.query_passes = getattr(module, "longest_row", None), getattr(module, "query_passes", 0.0)

    def refuse_missing(self) -> None:
        """Raise FileNotFoundError if a source that cannot be generated is missing. Called before fetching weights."""
        for source in self.sources.values():
            if source.root is not None or source.make is None:
                source.refuse_missing()

    def prepare_data(self) -> None:
        """Generate the missing sources that have a maker, and prepare the collator."""
        made = {name: source.make for name, source in self.sources.items() if source.root is None}
        complete_sets({f"data.sources.{name}.root": make for name, make in made.items() if make is not None})
        for source in self.sources.values():
            source.prepared_fit(self.cache_dir)  # raises if there are no shards, before a lock file is created there
        if isinstance(self.collator, PreparedCollator) and not self.parts:  # otherwise `setup` has prepared it
            self._prepared_sets = self._new_sets()
            self._prepare_collator(self.collator, self._open("train", self._prepared_sets))

    def _prepare_collator(self, collator: PreparedCollator, train: Sequence[Part]) -> None:
        with locked(self._beside / ".collator.lock", together_without=True):
            collator.prepare(self._folder_of(train), partial(iterate_texts, [part.shards for part in train]))

    def setup(self, stage: str | None = None) -> None:
        """Open all splits and, except for stage "validate", compute the mixture; later calls do nothing.

        Raises:
            FileNotFoundError, ShardError: shards are missing or broken (named). ValueError: there is nothing to train
                on, no source has a requested kind of questions, or frames of sources were prepared in different ways.
        """
        fitting = stage != "validate"
        if self.parts and (self.mixture is not None or not fitting):
            return
        self.fit = common_fit(self.sources, self.given_fit, self.cache_dir)
        sets, self._prepared_sets = self._prepared_sets or self._new_sets(), None
        opened: dict[str, list[Part]] = {split: self._open(split, sets) for split in SPLITS}
        share_cache_limit(part.shards for parts in opened.values() for part in parts)
        if fitting:
            read = [part.shards for split in ("train", "val") for part in opened[split]]
            mixed_in = [part.shards for part in opened["train"] if part.share is not None]
            warn_of_small_cache(read, self.cache_gb, self.window_shards, mixed_in)
        chosen = {"questions": self.questions, "val_questions": self.val_questions}
        check_kinds([part for parts in opened.values() for part in parts], chosen)
        if isinstance(self.collator, PreparedCollator):  # on every rank: loads the files that the first process created
            self._prepare_collator(self.collator, opened["train"])
        opened = self._measured(opened, fitting)
        for split, parts in opened.items():
            asked = self.questions if split == "train" else self.val_questions
            opened[split] = usable_parts(split, parts, asked, fitting)
        if fitting:
            check_clips(opened["train"], self.questions)
            self.mixture = self._make_mixture(opened["train"])
        self.parts = opened
        self._report()

    def _measured(self, opened: Mapping[str, Sequence[Part]], fitting: bool) -> dict[str, list[Part]]:
        """Return the parts with the lengths of their texts, if a budget needs them or some may be too long to be used.
        Training texts are counted only if training will begin. Raise ValueError if they cannot be counted."""
        collator, exact = self.collator, self.budget is not None and self.budget.exact_lengths
        if not isinstance(collator, MeasuringCollator):
            if exact:
                raise ValueError(
                    f"data.budget.exact_lengths=true: {type(collator).__name__} cannot count the tokens of a text "
                    "(MeasuringCollator); with false, a token is assumed for every four characters"
                )
            return {split: list(parts) for split, parts in opened.items()}
        lengths: dict[tuple[str, str], TextLengths] = {}
        for split, part in [(split, part) for split, parts in opened.items() for part in parts]:
            if exact and (fitting or split != "train"):
                folder = folder_beside(self.sources[part.name].place)
                count_options = (folder, part.kinds, self.max_frames, self.num_workers)
                lengths[split, part.name] = count_lengths(part.shards, part.chosen, collator, *count_options)
            needs_rate = (
                self.budget is not None or part.may_be_too_long(collator.max_tokens) or part.context is not None
            )
            if not exact and split == "train" and needs_rate:  # the rate of the training texts is used for all splits
                rate = measure_lengths(part.shards, part.chosen, collator, part.kinds)
                lengths |= dict.fromkeys(((each, part.name) for each in SPLITS), rate)
        return {s: [replace(p, lengths=lengths.get((s, p.name))) for p in parts] for s, parts in opened.items()}

    def _new_sets(self) -> OpenedSets:
        return OpenedSets(self.cache_dir, self.cache_gb, self.spares_copies)

    def _open(self, split: str, sets: OpenedSets) -> list[Part]:
        parts = []
        for name, source in self.sources.items():
            opened = source.open(split, sets)
            if opened is not None and len(opened[1]):
                clips = (source.clips or self.clips) if split == "train" else None
                part = Part(name, *opened, source.share, source.kinds, clips=clips, image_frames=self.image_frames)
                parts.append(replace(part, context=self._context_of(part)))
            elif split == "train":
                raise ValueError(f"the source {name!r} at {source.place} holds no training samples")
        share_cache_limit(part.shards for part in parts)
        return parts

    def _context_of(self, part: Part) -> Context | None:
        """Return the language model's context if some row of a part may be longer; otherwise None."""
        if self.longest_row is None or not isinstance(self.collator, MeasuringCollator):
            return None
        context = Context(self.longest_row, self.collator, self.max_frames)
        return context if context.may_be_exceeded(part.frames()) else None

    def _make_mixture(self, parts: Sequence[Part]) -> Mixture:
        how = (self.batch_size, self.seed, self.window_shards, self.curriculum, self.budget, self.batches_per_step)
        return Mixture(self._make_components(parts, self.questions), *how)

    def _make_components(self, parts: Sequence[Part], questions: Questions) -> list[Component]:
        if self.budget is None:
            return [part.component(self.max_frames, questions) for part in parts]
        return [part.within_budget(self.max_frames, questions) for part in parts]

    def _report(self) -> None:
        for split, parts in self.parts.items():
            log.info("%s: %s", split, ", ".join(f"{part.name} {len(part)}" for part in parts) or "none")
        if self.mixture is None:
            return
        if self.curriculum:
            per_step, batches = self.batches_per_step, self.mixture.batches
            first = first_steps(self.curriculum, batches, per_step)
            why = f" (an epoch's {batches} batches do not divide by {per_step})" if batches % per_step else ""
            log.info("stages of the curriculum begin at optimizer steps %s%s", ", ".join(map(str, first)), why)
            warn_of_unreached(self.curriculum, first, self.last_step(batches))
        shares = {p.name: p.share for p in self.mixture.components if p.share is not None}
        exact = self.budget is not None and self.budget.exact_lengths
        left_out = ", without the passes that predict queries" if self.query_passes else ""
        log.info(
            "an epoch: %d batches of %s; padding about %.1f %%%s%s",
            self.mixture.batches,
            self.batch_size
            if self.budget is None
            else f"up to {self.batch_size} ({self.budget.frames} frames, {self.budget.positions} positions)",
            100 * self.padding_share(),
            "" if exact else f" if all rows of a sample were as long as the longest, by estimate{left_out}",
            "".join(f"; {name} {100 * share:g} %" for name, share in shares.items()),
        )
        ranks = self.ranks[1]
        small = sum(len(batch) < ranks for batch in self.mixture.batches_of(0)) if ranks > 1 else 0
        if small:
            log.warning(
                "%d of %d batches hold fewer samples than there are processes (%d), so that some of these are trained "
                "on twice in a step; a larger data.budget makes them fewer",
                *(small, self.mixture.batches, ranks),
            )

    def padding_share(self, epoch: int = 0) -> float:
        """Return the share of the language model's positions that are padding in an epoch, over all passes, rows and
        processes; requires `setup`. It differs from `train/padding_share` for samples that are cut into clips or
        replaced. If questions are chosen at random, it uses other ones; without counted tokens, estimates of the
        longest rows, without the query passes."""
        assert self.mixture is not None
        packed = isinstance(self.collator, PackingCollator) and self.collator.pack_rows
        return self.mixture.padding(epoch, self.ranks[1], self._tokens_per_frame, packed, self.query_passes)

    @property
    def _tokens_per_frame(self) -> int:
        return self.collator.tokens_per_frame if isinstance(self.collator, MeasuringCollator) else 1

    @property
    def folder(self) -> Path:
        """Where files derived from the training text of all sources may be stored; requires `setup`. It is next to the
        first source (`folder_beside`), named by a hash of all sources: runs with other sources share that place."""
        return self._folder_of(self.parts["train"])

    def _folder_of(self, train: Sequence[Part]) -> Path:
        told = ",".join(part.shards.fingerprint for part in train)
        return self._beside / f"texts-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    @property
    def _beside(self) -> Path:
        return folder_beside(next(iter(self.sources.values())).place)

    def texts(self) -> Iterator[str]:
        """Return an iterator over the text of every training turn of all sources; requires `setup`."""
        return iterate_texts([part.shards for part in self.parts["train"]])

    @property
    def statistics(self) -> VideoTextStatistics:
        """Statistics of the training data; requires `setup`."""
        parts, asked = self.parts["train"], (self.questions, self.val_questions)
        return VideoTextStatistics(
            folder=self.folder,
            fingerprint=self.fingerprint,
            image_size=self.image_size,
            fit=self.fit,
            max_frames=self.max_frames,
            image_frames=self.image_frames,
            texts=self.texts,
            clips_keep_times=any(part.clips is not None and not part.clips.rebased for part in parts),
            kinds=frozenset(k for p in parts for k in p.kinds_present() if uses_kind(k, p.kinds, self.questions)),
            partial_kinds=frozenset(
                k for p in parts for k in p.kinds_present() if not uses_all_of_kind(k, p.kinds, *asked)
            ),
            longest_video=max(part.longest_shown(self.max_frames) for part in (*parts, *self.parts["val"])),
        )

    def shard_hashes(self) -> dict[str, str]:
        return {name: told for part in self.parts["train"] for name, told in part.shards.hashes(part.name).items()}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order of training samples depends on."""
        return self._fingerprint(self.batches_per_step)

    def _fingerprint(self, per_step: int) -> str:
        """Return the fingerprint if a step of a curriculum's stage has `per_step` batches."""
        digest = hashlib.sha256()
        for part in self.parts["train"]:
            digest.update(f"{part.name}:{part.shards.fingerprint}:{part.share}:".encode())
            digest.update(np.ascontiguousarray(part.chosen).tobytes())
        if self.curriculum:
            stages = [(sorted(stage.weights.items()), stage.batches(per_step)) for stage in self.curriculum]
            digest.update(repr(stages).encode())
        if self.budget is not None:
            lengths = sorted((part.name, part.lengths) for part in self.parts["train"] if part.lengths is not None)
            digest.update(repr((self.budget, self.questions, lengths)).encode())
        return digest.hexdigest()[:16]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `ResumableData`; checkpoints of a version whose curriculum stages counted batches get their own error."""
        if self.curriculum and state_dict["fingerprint"] == self._fingerprint(1) != self.fingerprint:
            raise ValueError(
                "the stages of data.curriculum count optimizer steps now, and batches in the run of the checkpoint: "
                f"divide their steps by accumulate_grad_batches={self.batches_per_step}"
            )
        super().load_state_dict({"window_shards": self.window_shards, **state_dict})  # older checkpoints lack it

    # ---------------------------------------------------------------------------------------------------------- loading

    def _samples(self, parts: Sequence[Part], questions: Questions, memory_gb: float = 0.0) -> VideoTextSamples:
        decode_options = (self.image_size, self.fit, self.max_frames)
        return VideoTextSamples(parts, *decode_options, questions, self.seed, memory_gb, self.collator)

    def _loader(
        self,
        parts: Sequence[Part],
        sampler: GlobalBatchSampler,
        questions: Questions,
        memory_gb: float = 0.0,
        collator: Collator | None = None,
        split: str = "train",
    ) -> DataLoader[Any]:
        samples = self._samples(parts, questions, memory_gb)
        samples.leaves_out, samples.never_empty = split != "train", self.ranks[1] > 1
        collate = Collate(collator or self.collator)
        loader = ReportingLoader(collate_fn=collate, **self.loader_options(samples, sampler))
        loader.skipped, loader.unusable, loader.split = self.skipped, self.unusable, split
        return loader

    @property
    def _training_collator(self) -> Collator:
        if self.budget is None or not isinstance(self.collator, MeasuringCollator):
            return self.collator
        return WithinBudget(self.collator, self.budget.positions, self.ranks[1], self.budget.frames)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.mixture is not None
        sampler = MixedBatchSampler(self.mixture, *self.ranks)
        if self.trainer is not None:
            sampler.follow(self.batches_done)
        collator = self._training_collator
        return self._loader(self.parts["train"], sampler, self.questions, self.memory_gb, collator)

    def worst_batches(self) -> list[Any]:
        """Return the parts of batches, of any process, one of which needs the most memory: the largest by each of
        `MEASURES`, measured on the loaded batches; requires `setup`. They are searched in the first epoch and, with a
        curriculum, in the epochs in which its stages begin."""
        assert self.mixture is not None
        sizes, ranks = self.mixture.sizes, self.ranks[1]
        parts = [
            (part, epoch)
            for epoch in self.mixture.epochs_of_stages()
            for batch in self.mixture.batches_of(epoch)
            for part in self.mixture.parts(batch, ranks)
        ]
        epochs = {id(part): epoch for part, epoch in parts}
        budget = self.budget or Budget(int(sizes.frames.max()) + 1, int(sizes.positions.max()) + 1)
        uncut_parts = [replace(part, clips=None) for part in self.parts["train"]]
        samples, collate = self._samples(uncut_parts, self.questions), Collate(self._training_collator)
        batches = []
        for chosen in costliest([part for part, _ in parts], sizes, budget, COSTLY):
            keys = [SampleKey(int(index), epochs[id(chosen)]) for index in chosen]
            batch = collate(samples.__getitems__(keys))
            if isinstance(batch, BadSample):
                raise batch
            batches.append(batch[0])
        loads = [self._load_of(batch, budget) for batch in batches]
        worst = [max(range(len(batches)), key=lambda number: measure(loads[number])) for measure in MEASURES]
        return [batches[number] for number in dict.fromkeys(worst)]

    def _load_of(self, batch: Any, budget: Budget) -> Load:
        """Return the load of a batch; if the batch trains only an encoder, its frames."""
        if not isinstance(batch, VideoTextBatch):
            return Load(float(len(batch.frames)), 0.0, 0.0)
        frames, rows = batch.frame_mask.sum(1), np.bincount(batch.video_index.numpy(), minlength=len(batch.frame_mask))
        lengths = frames[batch.video_index] * self._tokens_per_frame + batch.attention_mask.sum(1)
        positions = len(batch) * int(lengths.max()) / budget.positions
        return Load(float(frames.sum()) / budget.frames, positions, queries(frames.numpy(), rows))

    def _held_out_loader(self, split: str) -> DataLoader[Any] | list[Any]:
        """Return a loader of a split's lead samples, and samples of the other sources by share; always the same."""
        parts = self.parts[split]
        if not any(len(part) for part in parts if part.share is None):
            if parts:
                log.warning("no %s samples but those that are mixed in: nothing is evaluated on them alone", split)
            elif split == "val":
                leads = {name: source.val_fraction for name, source in self.sources.items() if source.share is None}
                settings = ", ".join(f"data.sources.{name}.val_fraction={share:g}" for name, share in leads.items())
                log.warning(
                    "no validation, and no val/ figures: there is no val/, and %s takes none (raise it); or all "
                    "samples are left out, as logged before",
                    settings,
                )
            return []
        parts = select_held_out(parts, self.max_val_samples if split == "val" else None)
        components = self._make_components(parts, self.val_questions)
        sampler = BucketedSampler(components, self.batch_size, *self.ranks, budget=self.budget)
        return self._loader(parts, sampler, self.val_questions, split=split)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._held_out_loader("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._held_out_loader("test")
