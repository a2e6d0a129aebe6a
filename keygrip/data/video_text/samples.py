"""Samples of videos with text, from the shards of several sources."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keygrip.data.bad_samples import BadSample
from keygrip.data.shards.index import MOST_FRAMES
from keygrip.data.shards.mixing import Component
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.sampling import SampleKey, sample_generator
from keygrip.data.shards.substitution import SUBSTITUTES, CountingLoader, SubstitutingSamples, UnusableSample
from keygrip.data.video_text.batching import (
    CheckingCollator,
    Collator,
    Questions,
    choose_conversations,
    rows_of,
    uses_kind,
)
from keygrip.data.video_text.clips import SubClips, clipped
from keygrip.data.video_text.context import Context
from keygrip.data.video_text.conversations import VideoTextSample, read_sample
from keygrip.data.video_text.lengths import FIRST_ANSWER, TextLengths, TokenLengths
from keygrip.data.video_text.sample_types import Conversation, kinds_of, repeat_image

log = logging.getLogger(__name__)

TEMPLATE = 128  # upper bound for the tokens of a conversation in addition to its words
TEXT_BYTES = 2048  # approximate size of a conversation and its metadata as Python objects


@dataclass(frozen=True)
class Part:
    """A source's samples of one split.

    Args:
        name: of the source. shards: contain the samples. chosen: int64 [N], indices of the samples in `shards`.
        share, kinds: see `keygrip.data.video_text.shard_source.ShardSource`.
        lengths: of the texts, in tokens; None: one token per four characters.
        clips: settings for clips cut out of the videos; None: videos stay whole.
        context: of the language model, if rows may be longer than it; None: no row can be longer.
        image_frames: number of frames as which a sample with one image is shown.
        excluded: kinds of the samples that `of_used_kinds` left out.
    """

    name: str
    shards: ShardSet
    chosen: np.ndarray
    share: float | None = None
    kinds: Sequence[str] | None = None
    lengths: TextLengths | None = None
    clips: SubClips | None = None
    context: Context | None = None
    image_frames: int = 1
    excluded: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.chosen)

    def column(self, name: str) -> np.ndarray:
        """Return a column of the index for the samples of this part, [N]."""
        return self.shards.columns[name][self.chosen]

    def frames(self, max_frames: int = MOST_FRAMES) -> np.ndarray:
        """Return the numbers of frames of the samples as they are shown, int64 [N]; at most `max_frames`."""
        held = self.column("frames").astype(np.int64)
        return np.where(held == 1, self.image_frames, np.minimum(held, max_frames))

    def longest_shown(self, max_frames: int) -> int:
        """Return the most frames of a sample as it is shown, or of a clip of it; 0 without samples."""
        frames = self.frames(max_frames)
        if self.clips is not None and self.clips.share == 1:  # otherwise the other videos stay whole
            frames = np.minimum(frames, self.clips.frames[1])
        return int(frames.max(initial=0))

    def kinds_present(self) -> set[str]:
        """Return the kinds of the samples' conversations, including those that are not used."""
        return set(self.excluded).union(*map(kinds_of, set(self.column("kinds").tolist())))

    def of_used_kinds(self, questions: Questions) -> Part:
        """Return the part without samples that only have conversations of kinds that are not used (`uses_kind`)."""
        if not isinstance(questions, Mapping) or 0 not in questions.values():
            return self  # the source has already been filtered by its `kinds`
        columns = self.column("kinds")
        unused = [
            kinds
            for kinds in set(columns.tolist())
            if kinds and not any(uses_kind(kind, self.kinds, questions) for kind in kinds_of(kinds))
        ]
        excluded = self.excluded.union(*map(kinds_of, unused))
        return replace(self, chosen=self.chosen[~np.isin(columns, unused)], excluded=excluded) if unused else self

    def component(self, max_frames: int, questions: Questions = None) -> Component:
        """Return the component for a mixture without a budget: buckets by number of frames, and estimated text lengths.
        If the index does not contain the numbers of conversations, each sample counts as one row.

        Args:
            questions: which conversations of each sample are chosen.
        """
        frames = self.frames(max_frames)
        tokens = TokenLengths().tokens(self.shards, self.chosen)
        subset, rows = (self.shards, self.chosen), None
        if "conversations" in self.shards.columns:
            rows = rows_of(questions, TokenLengths().rows(*subset), self.column("kinds").tolist())
        return Component(self.name, frames, tokens, self.shards.shard[self.chosen], self.share, rows=rows)

    def within_budget(self, max_frames: int, questions: Questions) -> Component:
        """Return the component for a mixture with a budget: it also contains what samples use of the budget.

        Args:
            questions: which conversations of each sample are chosen.

        Raises:
            ValueError: the index does not contain the numbers of conversations.
        """
        part, lengths, subset = self.component(max_frames), self.lengths or TokenLengths(), (self.shards, self.chosen)
        rows = rows_of(questions, lengths.rows(*subset), self.column("kinds").tolist())
        positions = lengths.tokens_per_frame * part.bucket + lengths.tokens(*subset, most=True)
        part = replace(part, length=lengths.tokens(*subset), positions=positions, rows=rows)
        tokens, prefixes = lengths.tokens_of_rows(*subset, rows), lengths.prefixes_of_rows(*subset, rows)
        return replace(part, row_tokens=tokens, row_prefixes=prefixes)

    def usable(self) -> Part:
        """Return the part without samples that have no conversation that can be a row, as far as this is known (see
        `TextLengths`): nothing could be learned from them."""
        if self.context is None:
            return self.within_max_tokens()
        frames = self.frames()
        if self.clips is not None:  # a clip may have as few frames as this
            frames = np.minimum(frames, self.clips.frames[0])
        room = self.context.room(frames)
        is_usable = room > 0
        if self.lengths is not None:
            is_usable &= self.lengths.usable(self.shards, self.chosen, room)
        return replace(self, chosen=self.chosen[is_usable])

    def within_max_tokens(self) -> Part:
        """Return the same as `usable`, but by the length of texts alone."""
        if self.lengths is None:
            return self
        return replace(self, chosen=self.chosen[self.lengths.usable(self.shards, self.chosen)])

    def may_be_too_long(self, max_tokens: int | None) -> bool:
        """Whether some first answer might end after `max_tokens` tokens, if every character were one token."""
        if max_tokens is None or FIRST_ANSWER not in self.shards.columns:
            return False
        return bool((self.column(FIRST_ANSWER) > max_tokens - TEMPLATE).any())


def select_held_out(parts: Sequence[Part], max_samples: int | None) -> list[Part]:
    """Return the parts of a held-out split with all their lead samples, of which there is at least one, and samples of
    the other sources by share; always the same.

    Args:
        max_samples: size limit of all parts together; None: no limit.
    """
    lead = sum(len(part) for part in parts if part.share is None)
    shares = sum(part.share or 0.0 for part in parts)
    total = lead / (1 - shares)
    if max_samples is not None:
        total = min(total, max_samples)
    selected = []
    for part in parts:
        share = part.share if part.share is not None else (1 - shares) * len(part) / lead
        fixed = np.random.default_rng(0).permutation(len(part))[: max(1, round(total * share))]
        selected.append(replace(part, chosen=part.chosen[np.sort(fixed)]))
    return selected


class VideoTextSamples(SubstitutingSamples[VideoTextSample]):
    """Samples of several parts, numbered consecutively; indexed by `SampleKey`.

    Args:
        parts: the parts. image_size, fit, max_frames: see `VideoTexts`.
        questions: number of conversations per video; None: all. seed: of that choice.
        memory_gb: memory for caching decoded frames and text, in each process that reads.
        collator: decides which conversations can be used, if it is a `CheckingCollator`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        image_size: int,
        fit: str,
        max_frames: int,
        questions: Questions,
        seed: int,
        memory_gb: float = 0.0,
        collator: Collator | None = None,
    ) -> None:
        self.collator = collator if isinstance(collator, CheckingCollator) else None
        self.parts, self.questions, self.seed = list(parts), questions, seed
        self._kept: dict[int, VideoTextSample] = {}
        self._room = memory_gb * 2**30
        self.image_size, self.fit, self.max_frames = image_size, fit, max_frames
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self._alike: list[np.ndarray | None] = [None] * len(self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: SampleKey) -> VideoTextSample:
        """Read a sample. Raise BadSample if it cannot be read, UnusableSample if nothing of it can be used."""
        part_index = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        part = self.parts[part_index]
        position = key.sample - int(self.starts[part_index])
        whole = self._read(part, key.sample, position)
        requested = tuple(c for c in whole.conversations if uses_kind(c.kind, part.kinds, self.questions))
        # filter before cutting: a clip must have at least one conversation that is used
        sample = clipped(replace(whole, conversations=requested), part.clips, self.max_frames, self.seed, key)
        if len(whole.frames) == 1:
            frames, times = repeat_image(sample.frames, sample.seconds or (), part.image_frames)
            sample = replace(sample, frames=frames, seconds=None if sample.seconds is None else times)
        conversations = choose_conversations(sample.conversations, self.questions, sample_generator(self.seed, key))
        if not conversations:
            problem_type = UnusableSample if whole.conversations else BadSample
            raise problem_type(part.shards.where(int(part.chosen[position])), "no conversation of the kinds asked for")
        seconds = sample.seconds if len(sample.frames) else ()
        too_long = [self._too_long(part, c, len(sample.frames), seconds) for c in conversations]
        problems = [long or self._problem(c, seconds) for c, long in zip(conversations, too_long, strict=True)]
        if None not in problems:
            raise UnusableSample(part.shards.where(int(part.chosen[position])), str(problems[0]))
        usable = tuple(c for c, long in zip(conversations, too_long, strict=True) if long is None)
        return replace(sample, conversations=usable, source=part.name, left_out=len(conversations) - len(usable))

    def _problem(self, conversation: Conversation, seconds: Sequence[float] | None) -> str | None:
        return None if self.collator is None else self.collator.problem(conversation, seconds)

    def _too_long(
        self, part: Part, conversation: Conversation, frames: int, seconds: Sequence[float] | None
    ) -> str | None:
        return None if part.context is None else part.context.problem(conversation, frames, seconds)

    def _read(self, part: Part, number: int, position: int) -> VideoTextSample:
        """Return a sample with all its text, from the cache if it is there."""
        sample = self._kept.get(number)
        if sample is None:
            most = self.max_frames if part.clips is None else MOST_FRAMES  # clips are cut out of whole videos
            sample = read_sample(part.shards, int(part.chosen[position]), self.image_size, self.fit, most)
            size = sample.frames.nbytes + TEXT_BYTES * len(sample.conversations)
            if size <= self._room:
                self._room -= size
                self._kept[number] = sample
        return sample

    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield the sample and then the most similar ones of its source, by number of frames and length of text."""
        yield key
        start, order, position = self._neighbours(key)
        for step in range(1, min(SUBSTITUTES, len(order) - 1) + 1):
            yield SampleKey(int(start + order[(position + step) % len(order)]), key.epoch)

    def usable_candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield samples with as many frames and shorter text, down to the shortest text; then with fewer frames."""
        start, order, position = self._neighbours(key)
        part = self.parts[int(np.searchsorted(self.starts, key.sample, side="right")) - 1]
        frames = part.frames(self.max_frames)[order]
        first = int(np.searchsorted(frames, frames[position]))
        shorter = np.linspace(position, first, SUBSTITUTES + 1)[1:].round().astype(int).tolist()
        with_fewer_frames = [(first - step) % len(order) for step in range(1, SUBSTITUTES + 1)]
        for index in dict.fromkeys([*shorter, *with_fewer_frames]):
            if index != position:
                yield SampleKey(int(start + order[index]), key.epoch)

    def _neighbours(self, key: SampleKey) -> tuple[int, np.ndarray, int]:
        """Return the index of the first sample in a sample's part; the part's samples sorted by frames and then length
        of text, int64 [n]; and the sample's position in that order."""
        part_index = int(np.searchsorted(self.starts, key.sample, side="right")) - 1
        start, order = int(self.starts[part_index]), self._alike[part_index]
        if order is None:  # computed only when a sample must be replaced
            component = self.parts[part_index].component(self.max_frames)
            order = self._alike[part_index] = np.lexsort((component.length, component.bucket))
        return start, order, int(np.flatnonzero(order == key.sample - start)[0])


class ReportingLoader(CountingLoader):
    """A loader that logs once, after a complete pass over a held-out split, what was left out while reading it."""

    split: str = "train"
    reported: bool = False

    def __iter__(self) -> Any:
        count_before = 0 if self.unusable is None else self.unusable.count
        rows = 0
        for batch in super().__iter__():
            rows += getattr(batch, "left_out", 0)
            yield batch
        samples = 0 if self.unusable is None else self.unusable.count - count_before
        if self.split != "train" and (samples or rows) and not self.reported:
            self.reported = True
            log.warning(
                "%s: %d samples are left out whole, and %d rows of others, since they are too long or cannot be rows",
                *(self.split, samples, rows),
            )
