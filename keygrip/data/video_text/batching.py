"""What makes a batch of videos with text: the collators that data modules call, and which conversations of a video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.data.video_text.sample_types import Conversation, VideoTextSample, kinds_of

Questions = int | Mapping[str, int] | None
MANY = 1 << 30  # conversations of a kind of which all are taken


class Collator(Protocol):
    """Makes a batch of samples, in a loader worker: what the model takes."""

    def __call__(self, samples: list[VideoTextSample]) -> Any: ...


@runtime_checkable
class PreparedCollator(Protocol):
    """A collator that needs something made of the data's text before the first batch (a tokenizer).

    `prepare` is called by every process, one after the other, when the shards are there: the first makes what is
    missing in `folder`, all load it. `texts()` goes through the text of every training turn.
    """

    def prepare(self, folder: Path, texts: Callable[[], Iterator[str]]) -> None: ...


@runtime_checkable
class CheckingCollator(Protocol):
    """A collator that cannot use every conversation. A sample of which it can use none is a bad sample."""

    def problem(self, conversation: Conversation, seconds: Sequence[float] | None = ()) -> str | None:
        """Why a conversation cannot be a row; None where it can.

        Args:
            seconds: when the frames were taken, for rows that tell it; empty for text alone.
        """
        ...


@runtime_checkable
class MeasuringCollator(Protocol):
    """A collator that knows what rows take of the language model.

    Attributes:
        tokens_per_frame: visual tokens of an image. max_tokens: where texts are cut; None: nowhere.
    """

    tokens_per_frame: int
    max_tokens: int | None

    def lengths_depend_on(self) -> str:
        """A hash of everything that `text_tokens` depends on beside the text: tokenizer, template, settings."""
        ...

    def text_tokens(
        self, conversation: Conversation, seconds: Sequence[float] | None = None, whole: bool = False
    ) -> int:
        """Tokens of a conversation's row without its frames; 0 where it cannot be one. whole: before it is cut.

        Args:
            seconds: when the frames were taken, for rows that tell it.
        """
        ...

    def __call__(self, samples: list[VideoTextSample]) -> Any: ...


@runtime_checkable
class PackingCollator(Protocol):
    """A collator that knows whether the language model reads the rows of a batch one behind the other.

    Attributes:
        pack_rows: rows are put into bins (`keygrip.data.shards.packing.bins_of`) in place of being padded.
    """

    pack_rows: bool


@dataclass(frozen=True)
class WithinBudget:
    """A collator whose batches keep within a budget by the lengths that their rows really have.

    Batches are planned before their samples are read: from characters, or from counted tokens where another sample may
    take the place of a broken one. In one that turns out too large the samples with the longest rows are left out, at
    most all but one; their rows are counted in the batch's `left_out`. Samples do not always divide by the processes:
    each may have those of one sample more than its share (see `keygrip.data.shards.budget.split_over_ranks`).

    Args:
        positions: of a batch over all processes. ranks: how many these are: each has its part of the samples.
        frames: of a batch over all processes; None: any number.
    """

    collator: MeasuringCollator
    positions: int
    ranks: int = 1
    frames: int | None = None

    def __call__(self, samples: list[VideoTextSample]) -> Any:
        rows = [self._rows(sample) for sample in samples]
        longest = [max(lengths, default=0) for lengths in rows]
        kept: set[int] = set()
        taken = held = most_rows = 0
        most = math.inf if self.frames is None else float(self.frames)
        if self.ranks > 1:  # one process may have a video more than another; in a planned batch all are about as long
            most += 2 * self.ranks * min((len(sample.frames) for sample in samples if len(sample.frames)), default=0)
        for number in sorted(range(len(samples)), key=longest.__getitem__):
            own, frames = len(rows[number]), held + len(samples[number].frames)
            more = max(most_rows, own) if self.ranks > 1 else 0  # rows of one sample more
            if kept and (taken + own - more) * longest[number] * self.ranks > self.positions:
                break
            if kept and frames * self.ranks > most:
                continue  # a shorter video with a longer row may still have room
            kept.add(number)
            taken, held, most_rows = taken + own, frames, more
        batch = self.collator([sample for number, sample in enumerate(samples) if number in kept])
        dropped = sum(len(lengths) for number, lengths in enumerate(rows) if number not in kept)
        return replace(batch, left_out=batch.left_out + dropped) if dropped else batch

    def _rows(self, sample: VideoTextSample) -> list[int]:
        """Positions of each of a sample's rows."""
        frames = len(sample.frames)
        found = (self.collator.text_tokens(c, sample.seconds if frames else ()) for c in sample.conversations)
        return [frames * self.collator.tokens_per_frame + tokens for tokens in found if tokens]


def is_asked(kind: str, kinds: Sequence[str] | None, questions: Questions) -> bool:
    """Whether conversations of a kind are used: a source's `kinds` name it (None: all), and `questions` does not leave
    it out ({kind: 0})."""
    return (kinds is None or kind in kinds) and not (isinstance(questions, Mapping) and questions.get(kind) == 0)


def all_asked(kind: str, kinds: Sequence[str] | None, *questions: Questions) -> bool:
    """Whether a video's conversations of a kind are all used, whatever else is: as `is_asked`, and none of `questions`
    draws some of them."""
    return (kinds is None or kind in kinds) and all(
        each is None or (isinstance(each, Mapping) and kind not in each) for each in questions
    )


def choose(conversations: Sequence[Conversation], questions: Questions, rng: np.random.Generator) -> list[Conversation]:
    """Some of a video's conversations: all (None), so many at random, or so many of each named kind (of others all)."""
    if questions is None:
        return list(conversations)
    order = rng.permutation(len(conversations))
    if isinstance(questions, int):
        return [conversations[n] for n in sorted(order[:questions].tolist())]
    left, chosen = dict(questions), []
    for number in order.tolist():
        kind = conversations[number].kind
        if left.get(kind, 1):
            left[kind] = left.get(kind, len(order)) - 1
            chosen.append(number)
    return [conversations[n] for n in sorted(chosen)]


def rows_of(questions: Questions, conversations: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Rows of text that samples give at most, [N] int.

    Args:
        questions: chosen of each. conversations: [N] int, how many each holds. kinds: N strings, which ("cue mark").
    """
    if questions is None:
        return conversations
    if isinstance(questions, int):
        return np.minimum(conversations, questions)
    asked = {each: sum(questions.get(kind, MANY) for kind in kinds_of(each)) for each in set(kinds)}
    return np.maximum(1, np.minimum(conversations, [asked[each] for each in kinds]))
