"""Conversion of conversations to token ids: chat template, position of the visual tokens, and which tokens carry loss.

A conversation is rendered with the language model's own template and split at the visual tokens, at the beginning of
each answer and at the end of each answer's turn. The pieces are encoded one by one, so that a prompt has the same ids
in training, where the answer follows it, and in generation, where it does not. The text of a turn is encoded as words:
control tokens come from the template alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from keygrip.artifacts import sha256_bytes
from keygrip.data.batches import Conversation, Turn, VideoTextBatch, VideoTextSample, stack_frames
from keygrip.models.language import PromptOrder
from keygrip.models.language.tokenizers import ChatTokenizer, TokenizerSource
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)

KEPT_TEXTS = 4096  # encoded conversations that a collator caches
PLACE = "\ufdd1"  # marks the end of words in a rendered conversation; Unicode reserves it, so that no text contains it
EXAMPLE = (Turn("user", "a?"), Turn("assistant", "b"), Turn("user", "c?"), Turn("assistant", "d"))
Supervise = Literal["all", "answers"]


@dataclass(frozen=True)
class EncodedText:
    """Ids of a conversation.

    Attributes:
        ids: all tokens except the visual ones. loss, answer: whether each token carries loss, and whether it belongs to
            an answer (including the token that ends the answer).
        visual_at: number of tokens before the visual ones. prompt: number of tokens before the last answer.
        truncated: whether turns at the end were left out. whole: whether the text contains a whole answer with its
            end; a truncated text ends with the last answer that fits.
    """

    ids: list[int]
    loss: list[bool]
    answer: list[bool]
    visual_at: int
    prompt: int
    truncated: bool = False
    whole: bool = True


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    prompt_order: PromptOrder,
    supervise: Supervise,
    max_tokens: int | None = None,
) -> EncodedText:
    """Encode a conversation that ends with an answer or (for generation) with a question.

    Args:
        prompt_order: `visual_first` puts the visual tokens before all text, `question_first` after the words of the
            first user turn; if that turn has no words, where they would begin.
        supervise: `all` text tokens carry loss (captioning), or only `answers`: each assistant turn's words and the
            token that ends the turn.
        max_tokens: longer texts lose their last answers, so that the text ends with the token that ends an answer's
            turn. If not even the first answer fits, the text is cut after `max_tokens` and `whole` is False.

    Raises:
        ValueError: no user turn before the first answer, or a chat template that does not keep the words.
    """
    messages = [(turn.role, tokenizer.as_words(turn.text)) for turn in turns]
    if not messages:
        raise ValueError("a conversation needs at least one turn")
    generating = messages[-1][0] != "assistant"
    rendered = tokenizer.render(messages, answering=generating)
    visual = 0
    if prompt_order == "question_first":
        visual = _end_of_first_question(messages, tokenizer, rendered, generating)
    answers = _answer_spans(messages, tokenizer, rendered)
    if generating:
        answers.append((len(rendered), len(rendered)))
    cuts = sorted({0, visual, len(rendered), *(edge for span in answers for edge in span)})
    ids: list[int] = []
    answer: list[bool] = []
    visual_at = 0
    begins, ends = [], []  # of the answers, in tokens
    for start, stop in itertools.pairwise(cuts):
        if start == visual:
            visual_at = len(ids)
        if start in (first for first, _ in answers):
            begins.append(len(ids))
        piece = tokenizer.encode(rendered[start:stop], after=rendered[:start])
        ids += piece
        answer += [any(first <= start < last for first, last in answers)] * len(piece)
        if stop in (last for _, last in answers):
            ends.append(len(ids))
    prompt = len(ids) if generating else begins[-1]
    if visual == len(rendered):
        visual_at = len(ids)
    loss = [True] * len(ids) if supervise == "all" else answer
    if max_tokens is None or len(ids) <= max_tokens:
        return EncodedText(ids, list(loss), list(answer), visual_at, prompt)
    fitting = [index for index, end in enumerate(ends) if end <= max_tokens]
    keep = ends[fitting[-1]] if fitting else max_tokens
    prompt = begins[fitting[-1]] if fitting else min(prompt, keep)
    return EncodedText(
        ids[:keep], list(loss[:keep]), list(answer[:keep]), min(visual_at, keep), prompt, True, bool(fitting)
    )


def encode_around(turns: Sequence[Turn], tokenizer: ChatTokenizer, mark: str) -> list[list[int]]:
    """Return the ids before, between and after the `mark` characters in the words of a conversation that ends with a
    question. It is split around its answers as in `encode_conversation`, so that the same words have the same ids.

    Raises:
        ValueError: as `encode_conversation`.
    """
    messages = [(turn.role, tokenizer.as_words(turn.text)) for turn in turns]
    rendered = tokenizer.render(messages, answering=True)
    edges = sorted({0, len(rendered), *itertools.chain(*_answer_spans(messages, tokenizer, rendered))})
    parts: list[list[int]] = [[]]
    for start, stop in itertools.pairwise(edges):
        first, *others = _encode_pieces(tokenizer, rendered[start:stop].split(mark), rendered[:start].replace(mark, ""))
        parts[-1] += first
        parts += others
    return parts


def _encode_pieces(tokenizer: ChatTokenizer, texts: Sequence[str], before: str) -> Iterator[list[int]]:
    for text in texts:
        yield tokenizer.encode(text, after=before)
        before += text


def _end_of_first_question(
    messages: list[tuple[str, str]], tokenizer: ChatTokenizer, rendered: str, generating: bool
) -> int:
    """Return where the words of the first user turn end in the rendered conversation, or where they would begin if it
    has none. The same words may occur in other turns and in the template too, so the conversation is rendered again
    with a mark after them: the two renderings first differ at the mark."""
    turn_index = next((n for n, (role, _) in enumerate(messages) if role == "user"), None)
    if turn_index is None:
        raise ValueError("prompt_order=question_first needs a user turn in every conversation")
    text = messages[turn_index][1]
    words = text.rstrip()
    marked_turns = [
        *messages[:turn_index],
        ("user", f"{words}{PLACE}{text[len(words) :]}"),
        *messages[turn_index + 1 :],
    ]
    marked_rendered = tokenizer.render(marked_turns, answering=generating)
    pairs = enumerate(zip(rendered, marked_rendered, strict=False))
    end = next((place for place, (plain, marked) in pairs if plain != marked), len(rendered))
    if not marked_rendered.startswith(PLACE, end) or not rendered[:end].endswith(words.lstrip()):
        raise ValueError(f"the chat template does not keep the words of a user turn as they are: {words[:60]!r}")
    return end


def _answer_spans(messages: list[tuple[str, str]], tokenizer: ChatTokenizer, rendered: str) -> list[tuple[int, int]]:
    spans = [
        _answer_span(messages, turn, tokenizer, rendered)
        for turn, (role, _) in enumerate(messages)
        if role == "assistant"
    ]
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):  # the end token is that of a later turn
        raise ValueError(
            f"the chat template does not end every assistant's turn with {tokenizer.end_text}: name the token that "
            "does as eos_token in tokenizer_config.json"
        )
    return spans


def _answer_span(
    messages: list[tuple[str, str]], turn: int, tokenizer: ChatTokenizer, rendered: str
) -> tuple[int, int]:
    """Return where, in the rendered conversation, an answer begins and the token that ends its turn ends."""
    if not turn:
        raise ValueError("a conversation begins with an answer: it needs a user turn before the first one")
    prompt = tokenizer.render(messages[:turn], answering=True)
    words = messages[turn][1].strip()
    start = rendered.find(words, len(prompt))
    if not rendered.startswith(prompt) or start < 0:
        raise ValueError(f"the chat template does not keep an answer behind its prompt: {words[:60]!r}")
    end = rendered.find(tokenizer.end_text, start + len(words))
    if end < 0:
        raise ValueError(f"the chat template does not end an assistant's turn with {tokenizer.end_text}")
    return len(prompt), end + len(tokenizer.end_text)


@model_part
class ConversationCollator:
    """Make batches of videos with text for the foveated VLM; picklable, given to the data module.

    Args:
        tokenizer: source of the tokenizer; `prepare` loads it (or trains it on the text of the data).
        prompt_order, supervise, max_tokens: see `encode_conversation`.
        system: system turn for conversations without one; None: that of the chat template.
        timestamps: begin the first user turn with the times of the video's frames (`frame_times`).
        tokens_per_frame: visual tokens of the network, for the budget of batches.
        pack_rows: same as the network's, for the padding share that is reported before training.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource,
        prompt_order: PromptOrder,
        supervise: Supervise,
        max_tokens: int | None = None,
        system: str | None = None,
        timestamps: bool = False,
        tokens_per_frame: int = 1,
        pack_rows: bool = False,
    ) -> None:
        if prompt_order not in get_args(PromptOrder):
            raise ValueError(f"prompt_order is {' or '.join(get_args(PromptOrder))}, not {prompt_order!r}")
        if supervise not in ("all", "answers"):
            raise ValueError(f"supervise is all or answers, not {supervise!r}")
        if system is not None and not isinstance(system, str):
            raise ValueError(f"collator.system={system!r} is no text")
        if max_tokens is not None and max_tokens < 8:
            raise ValueError(f"max_tokens={max_tokens}: a chat template alone is longer")
        self.source = tokenizer
        self.prompt_order: PromptOrder = prompt_order
        self.supervise: Supervise = supervise
        self.max_tokens = max_tokens
        self.system, self.timestamps = system, timestamps
        self.tokens_per_frame, self.pack_rows = tokens_per_frame, pack_rows
        self.tokenizer: ChatTokenizer | None = None
        self._encoded: dict[tuple[Turn, ...], EncodedText] = {}
        self._recent: dict[tuple[Turn, ...], EncodedText] = {}  # texts of the batch in progress

    def prepare(self, folder: Path, texts: Callable[[], Iterator[str]]) -> None:
        """Load the tokenizer; if its source trains one and `folder` has none yet, train it on `texts()` first.

        Raises:
            ValueError: the chat template cannot be used for training: `encode_conversation` fails for one question
                with its answer. If it fails only for several questions, a warning reports that such samples are
                refused.
        """
        if self.tokenizer is None:
            try:
                tokenizer = self.source.load(folder)
            except FileNotFoundError:
                tokenizer = self.source.load(folder, texts())
            encode_conversation(self.with_system(EXAMPLE[:2]), tokenizer, self.prompt_order, self.supervise)
            try:
                encode_conversation(self.with_system(EXAMPLE), tokenizer, self.prompt_order, self.supervise)
            except ValueError as error:
                log.warning("samples of several questions will be refused: %s", error)
            self.tokenizer = tokenizer

    def _encode(self, turns: tuple[Turn, ...]) -> EncodedText:
        """Encode a conversation, with a cache: simulated questions repeat, and rendering a template takes time."""
        if self.tokenizer is None:
            raise RuntimeError("the collator has no tokenizer yet: call prepare (the data module's prepare_data does)")
        encoded = self._encoded.get(turns) or self._recent.get(turns)
        if encoded is None:
            conversation = self.with_system(up_to_last_answer(turns))
            encoded = encode_conversation(
                conversation, self.tokenizer, self.prompt_order, self.supervise, self.max_tokens
            )
            if len(self._recent) >= KEPT_TEXTS:  # many texts were measured without making a batch
                self._recent.clear()
            cache = self._encoded if len(self._encoded) < KEPT_TEXTS else self._recent
            cache[turns] = encoded
        return encoded

    def with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Return a conversation with the system turn of training."""
        if self.system is None or (turns and turns[0].role == "system"):
            return turns
        return (Turn("system", self.system), *turns)

    def with_times(self, turns: Sequence[Turn], seconds: Sequence[float] | None) -> tuple[Turn, ...]:
        """Return a conversation with the times of its video's frames, if `timestamps` is set. Images without a common
        time, whose `seconds` are empty, get no times.

        Raises:
            ValueError: `timestamps` is set and the times are not known.
        """
        if not self.timestamps or (seconds is not None and not len(seconds)):
            return tuple(turns)
        if seconds is None:
            raise ValueError("collator.timestamps=true: when the frames of a video were taken is not known here")
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            return tuple(turns)
        timed_turn = Turn("user", f"{frame_times(seconds)}\n{turns[first].text}")
        return (*turns[:first], timed_turn, *turns[first + 1 :])

    def prompt(self, turns: Sequence[Turn], seconds: Sequence[float] | None = None) -> EncodedText:
        """Encode a conversation for generation or scoring: as in training, but never truncated.

        Args:
            seconds: times of its video's frames; required if `timestamps` is set, empty for text alone.
        """
        if self.tokenizer is None:
            raise RuntimeError("the collator has no tokenizer yet: call prepare (the data module's prepare_data does)")
        turns = self.with_times(turns, seconds)
        return encode_conversation(self.with_system(turns), self.tokenizer, self.prompt_order, "answers")

    def prompt_around(
        self, turns: Sequence[Turn], mark: str, seconds: Sequence[float] | None = None
    ) -> list[list[int]]:
        """Encode a conversation as `prompt`, but split at each `mark` in its words, see `encode_around`."""
        if self.tokenizer is None:
            raise RuntimeError("the collator has no tokenizer yet: call prepare (the data module's prepare_data does)")
        return encode_around(self.with_system(self.with_times(turns, seconds)), self.tokenizer, mark)

    def problem(self, conversation: Conversation, seconds: Sequence[float] | None = ()) -> str | None:
        """See `keygrip.data.video_text.batching.CheckingCollator`."""
        try:
            self._row(conversation, seconds)
        except ValueError as error:
            return str(error)
        return None

    def lengths_depend_on(self) -> str:
        """See `keygrip.data.video_text.batching.MeasuringCollator`; needs `prepare`."""
        if self.tokenizer is None:
            raise RuntimeError("the collator has no tokenizer yet: call prepare (the data module's prepare_data does)")
        settings = (self.prompt_order, self.supervise, self.max_tokens, self.system, self.timestamps)
        return sha256_bytes(repr((sorted(self.tokenizer.words().items()), settings)).encode())

    def text_tokens(
        self, conversation: Conversation, seconds: Sequence[float] | None = None, whole: bool = False
    ) -> int:
        """See `keygrip.data.video_text.batching.MeasuringCollator`."""
        try:
            if whole:
                return len(self.prompt(conversation.turns, seconds).ids)
            return len(self._row(conversation, seconds).ids)
        except ValueError:
            return 0

    def tokens_before_frames(self, conversation: Conversation, seconds: Sequence[float] | None = None) -> int:
        """See `keygrip.data.video_text.batching.MeasuringCollator`."""
        try:
            return self._row(conversation, seconds).visual_at
        except ValueError:
            return 0

    def _row(self, conversation: Conversation, seconds: Sequence[float] | None) -> EncodedText:
        """Raises ValueError: the conversation cannot be a row."""
        text = self._encode(self.with_times(conversation.turns, seconds))
        if not text.whole:
            raise ValueError(f"its first answer does not end within collator.max_tokens={self.max_tokens} tokens")
        if not any(text.loss):
            raise ValueError("no token of it carries loss")
        return text

    def __call__(self, samples: list[VideoTextSample]) -> VideoTextBatch:
        """Make a row of each conversation of each sample; conversations with a problem are left out and counted.

        Raises:
            ValueError: every conversation has a problem.
        """
        rows, row_sources, videos, problems = [], [], [], []
        for sample_index, sample in enumerate(samples):
            for conversation in sample.conversations:
                try:
                    rows.append(self._row(conversation, sample.seconds if len(sample.frames) else ()))
                except ValueError as error:
                    problems.append(f"{sample.key} of {sample.source}: {error}")
                    continue
                row_sources.append((sample, conversation))
                videos.append(sample_index)
        self._recent.clear()
        if not rows:
            raise ValueError(f"a batch without a row: {problems[0] if problems else 'no conversations'}")
        frames, frame_mask = stack_frames(samples)
        return VideoTextBatch(
            frames=frames,
            frame_mask=frame_mask,
            video_index=torch.tensor(videos, dtype=torch.int64),
            **text_columns(rows),
            kind=[conversation.kind for _, conversation in row_sources],
            source=[sample.source for sample, _ in row_sources],
            key=[sample.key for sample, _ in row_sources],
            texts=[conversation for _, conversation in row_sources],
            left_out=len(problems) + sum(sample.left_out for sample in samples),
            seconds=[sample.seconds for sample in samples],
            clips=sum(sample.cut for sample in samples),
        )


def up_to_last_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Return a conversation without the turns after its last answer; the whole conversation if it has no answer."""
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    return turns[: answers[-1] + 1] if answers else turns


def frame_times(seconds: Sequence[float]) -> str:
    """Describe the times of a video's frames in words: "12 frames, one every 1 s, from 0 s to 11 s."."""
    count, first, last = len(seconds), seconds[0], seconds[-1]
    if count == 1:
        return f"1 frame, at {_rounded(first, 4)} s."
    interval = _rounded((last - first) / (count - 1), 3)
    return f"{count} frames, one every {interval} s, from {_rounded(first, 4)} s to {_rounded(last, 4)} s."


def _rounded(seconds: float, digits: int) -> str:
    """Return a time with so many significant digits; a longer one is rounded to a second, not written as "1.08e+04"."""
    return f"{seconds:.0f}" if seconds >= 10**digits - 0.5 else f"{seconds:.{digits}g}"


def text_columns(rows: Sequence[EncodedText]) -> dict[str, Any]:
    """Return the text columns of a `VideoTextBatch`, padded on the right to the longest row."""
    longest = max((len(row.ids) for row in rows), default=0)

    def padded(columns: Sequence[Sequence[int]], kind: torch.dtype) -> Tensor:
        table = torch.zeros(len(columns), longest, dtype=kind)
        for index, column in enumerate(columns):
            table[index, : len(column)] = torch.tensor(column, dtype=kind)
        return table

    return {
        "input_ids": padded([row.ids for row in rows], torch.int64),
        "attention_mask": padded([[True] * len(row.ids) for row in rows], torch.bool),
        "loss_mask": padded([row.loss for row in rows], torch.bool),
        "answer_mask": padded([row.answer for row in rows], torch.bool),
        "visual_at": [row.visual_at for row in rows],
        "truncated": sum(row.truncated for row in rows),
    }
