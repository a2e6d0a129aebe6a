"""Make batches of videos with text: interfaces of the collators, and the choice of a video's conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.data.video_text.sample_types import Conversation, VideoTextSample, kinds_of

Questions = int | Mapping[str, int] | None
MANY = 1 << 30  # number of conversations for kinds whose conversations are all used


class Collator(Protocol):
    """Makes a batch for the model from samples, in a loader worker."""

    def __call__(self, samples: list[VideoTextSample]) -> Any: ...


@runtime_checkable
class PreparedCollator(Protocol):
    """A collator that needs files derived from the data's text before the first batch (a tokenizer).

    Every process calls `prepare`, one after the other, when the shards exist: the first process creates the missing
    files in `folder`, and all processes load them. `texts()` returns an iterator over the text of every training turn.
    """

    def prepare(self, folder: Path, texts: Callable[[], Iterator[str]]) -> None: ...


@runtime_checkable
class CheckingCollator(Protocol):
    """A collator that cannot use every conversation. If it can use none of a sample's, the sample is a bad sample."""

    def problem(self, conversation: Conversation, seconds: Sequence[float] | None = ()) -> str | None:
        """Return why a conversation cannot be a row; None if it can.

        Args:
            seconds: times of the frames, for rows that contain them; empty for text alone.
        """
        ...


@runtime_checkable
class MeasuringCollator(Protocol):
    """A collator that computes the positions of rows in the language model.

    Attributes:
        tokens_per_frame: visual tokens of an image. max_tokens: length at which texts are cut; None: they are not cut.
    """

    tokens_per_frame: int
    max_tokens: int | None

    def lengths_depend_on(self) -> str:
        """Return a hash of everything except the text that `text_tokens` depends on: tokenizer, template, settings."""
        ...

    def text_tokens(
        self, conversation: Conversation, seconds: Sequence[float] | None = None, whole: bool = False
    ) -> int:
        """Return the tokens of a conversation's row without its frames; 0 if the conversation cannot be a row.

        Args:
            seconds: times of the frames, for rows that contain them. whole: count the tokens before the text is cut.
        """
        ...

    def tokens_before_frames(self, conversation: Conversation, seconds: Sequence[float] | None = None) -> int:
        """Return how many of the `text_tokens` stand before the frames."""
        ...

    def __call__(self, samples: list[VideoTextSample]) -> Any: ...


@runtime_checkable
class PackingCollator(Protocol):
    """A collator with a setting for packing the rows of a batch.

    Attributes:
        pack_rows: rows are packed into bins (`keygrip.data.shards.packing.bins_of`) instead of being padded.
    """

    pack_rows: bool


@dataclass(frozen=True)
class WithinBudget:
    """A collator that keeps batches within a budget by the actual lengths of their rows.

    Batches are planned before their samples are read: from characters, or from counted tokens; and a broken sample may
    be replaced by another one. If a batch is too large, the samples with the longest rows are left out, but at least
    one sample stays; the rows left out are counted in the batch's `left_out`. The number of samples is not always a
    multiple of the number of processes: each process may exceed its share by one sample (see
    `keygrip.data.shards.budget.split_over_ranks`).

    Args:
        positions: of a batch over all processes. ranks: number of processes, each with its part of the samples.
        frames: of a batch over all processes; None: any number.
    """

    collator: MeasuringCollator
    positions: int
    ranks: int = 1
    frames: int | None = None

    def __call__(self, samples: list[VideoTextSample]) -> Any:
        rows = [self._rows(sample) for sample in samples]
        longest = [max(lengths, default=0) for lengths in rows]
        kept_indices: set[int] = set()
        row_count = held_frames = most_rows = 0
        frame_limit = math.inf if self.frames is None else float(self.frames)
        if (
            self.ranks > 1
        ):  # a process may have one video more than another; in a planned batch all have similar lengths
            frame_limit += (
                2 * self.ranks * min((len(sample.frames) for sample in samples if len(sample.frames)), default=0)
            )
        for index in sorted(range(len(samples)), key=longest.__getitem__):
            sample_rows, frames = len(rows[index]), held_frames + len(samples[index].frames)
            extra_rows = max(most_rows, sample_rows) if self.ranks > 1 else 0  # the rows of one additional sample
            if kept_indices and (row_count + sample_rows - extra_rows) * longest[index] * self.ranks > self.positions:
                break
            if kept_indices and frames * self.ranks > frame_limit:
                continue  # a shorter video with a longer row may still have room
            kept_indices.add(index)
            row_count, held_frames, most_rows = row_count + sample_rows, frames, extra_rows
        batch = self.collator([sample for index, sample in enumerate(samples) if index in kept_indices])
        dropped = sum(len(lengths) for index, lengths in enumerate(rows) if index not in kept_indices)
        return replace(batch, left_out=batch.left_out + dropped) if dropped else batch

    def _rows(self, sample: VideoTextSample) -> list[int]:
        """Return the positions of each of a sample's rows."""
        frames = len(sample.frames)
        token_counts = (self.collator.text_tokens(c, sample.seconds if frames else ()) for c in sample.conversations)
        return [frames * self.collator.tokens_per_frame + tokens for tokens in token_counts if tokens]


def uses_kind(kind: str, kinds: Sequence[str] | None, questions: Questions) -> bool:
    """Whether conversations of a kind are used: a source's `kinds` contain it (None: all), and `questions` does not
    exclude it ({kind: 0})."""
    return (kinds is None or kind in kinds) and not (isinstance(questions, Mapping) and questions.get(kind) == 0)


def uses_all_of_kind(kind: str, kinds: Sequence[str] | None, *questions: Questions) -> bool:
    """Whether all of a video's conversations of a kind are used: a source's `kinds` contain it (None: all), and none of
    `questions` selects only some of them."""
    return (kinds is None or kind in kinds) and all(
        each is None or (isinstance(each, Mapping) and kind not in each) for each in questions
    )


def held_out_questions(questions: Questions, val_questions: Questions) -> Questions:
    """Return which conversations are chosen in validation and evaluation: `val_questions`, without the kinds that are
    not trained ({kind: 0} in `questions`) and that `val_questions` does not name. A number is of conversations of all
    kinds."""
    if isinstance(val_questions, int) or not isinstance(questions, Mapping):
        return val_questions
    untrained = {kind: 0 for kind, count in questions.items() if not count}
    return {**untrained, **(val_questions or {})} or None


def choose_conversations(
    conversations: Sequence[Conversation], questions: Questions, rng: np.random.Generator
) -> list[Conversation]:
    """Choose some of a video's conversations: all (None), a number at random, or a number of each named kind and all of
    the other kinds."""
    if questions is None:
        return list(conversations)
    order = rng.permutation(len(conversations))
    if isinstance(questions, int):
        return [conversations[n] for n in sorted(order[:questions].tolist())]
    left, chosen = dict(questions), []
    for index in order.tolist():
        kind = conversations[index].kind
        if left.get(kind, 1):
            left[kind] = left.get(kind, len(order)) - 1
            chosen.append(index)
    return [conversations[n] for n in sorted(chosen)]


def rows_of(questions: Questions, conversations: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Return the largest number of text rows of each sample, [N] int.

    Args:
        questions: which conversations are chosen. conversations: [N] int, number in each sample. kinds: N strings, the
            kinds in each sample ("cue mark").
    """
    if questions is None:
        return conversations
    if isinstance(questions, int):
        return np.minimum(conversations, questions)
    row_limits = {each: sum(questions.get(kind, MANY) for kind in kinds_of(each)) for each in set(kinds)}
    return np.maximum(1, np.minimum(conversations, [row_limits[each] for each in kinds]))
