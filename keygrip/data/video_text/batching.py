"""What makes a batch of videos with text: the collators that data modules call, and which conversations of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.data.video_text.conversations import Conversation, VideoTextSample

Questions = int | Mapping[str, int] | None


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
    """A collator that cannot use every conversation: `problem` says why, or None. A sample of which it can use none is
    a bad sample."""

    def problem(self, conversation: Conversation) -> str | None: ...


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


def rows_of(questions: Questions) -> int:
    """Rows of text that a video gives at most, for a budget. Of all conversations (None) one is counted, and of kinds
    that are not named none: how many there are no manifest says."""
    if questions is None:
        return 1
    return max(1, questions if isinstance(questions, int) else sum(questions.values()))
