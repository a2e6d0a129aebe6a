"""Streaming of a live video: frames and text arrive one after the other, and an answer is possible at any time.

Each frame costs an encoder pass, a query and one or two steps of the language model; the past is in the language
model's cache. The result is that of the autoregressive (or coarse_only) mode for the whole video, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keygrip.data.batches import Turn
from keygrip.data.video_text.conversations import shown_image
from keygrip.models.foveated_vlm.generation import check_count, evaluating, refuse_half_characters
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.sampling import GREEDY, Sampling, refuse_settings
from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.tokenizers import ChatTokenizer

STREAMED_MODES = ("autoregressive", "coarse_only")
NO_STREAM = "a {} answers whole videos only: leave out stream=true (in Python, use generate)"
MOST_SECONDS = 2.0**20  # 12 days; up to here, neighbouring float32 times are at most 1/16 s apart
UNFINISHED = "\ufffd"  # an incomplete character decodes to this


class _Reader:
    """A language model with its cache, which reads a row in parts."""

    def __init__(self, network: FoveatedVLM) -> None:
        self.language = network.language
        self.cache = LanguageCache()
        self.state: Tensor | None = None  # [1, 1, C], after the last position

    def read(self, embeddings: Tensor) -> None:
        with evaluating(self.language):
            self.state = self.language.extend(embeddings, self.cache)[:, -1:]

    def mark(self) -> tuple[int, Tensor | None]:
        return self.cache.length, self.state

    def back(self, mark: tuple[int, Tensor | None]) -> None:
        """Discard everything after a mark."""
        length, self.state = mark
        self.cache.cut(length)


@dataclass(frozen=True)
class Mark:
    """A position in a stream: number of frames pushed so far, time of the last one, and the state of each reader."""

    frames: int
    second: float | None
    readers: tuple[tuple[int, Tensor | None], ...]


ANSWER_TOKENS = 64  # reserved for an answer


class StreamingSession:
    """A growing row of text and frames. The network computes in evaluation mode; its own mode is left as it is.

    Args:
        network: a foveated network. tokenizer: its tokenizer. mode: `autoregressive` or `coarse_only`.

    Attributes:
        frames: number of frames pushed so far.

    Raises:
        ValueError: a mode in which a frame depends on later frames.
    """

    def __init__(self, network: FoveatedVLM, tokenizer: ChatTokenizer, mode: str = "autoregressive") -> None:
        if mode not in STREAMED_MODES:
            raise ValueError(f"mode={mode}: a stream is seen in {' or '.join(STREAMED_MODES)}")
        self.network, self.tokenizer, self.mode = network, tokenizer, mode
        self.frames = 0
        self._second: float | None = None  # when the last frame was taken
        self._answering = False
        self._row = _Reader(network)
        # Chosen queries come from the row itself, or from a second row of coarse tokens.
        self._driving = _Reader(network) if mode == "autoregressive" and network.query_source == "coarse" else self._row

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Append token ids of text. Raises ValueError: they do not fit the context, or an answer is in progress."""
        self._check_free()
        self._append(ids)

    def _append(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        device = self.network.static_query.device
        self._append_embedded(self.network.language.embed(torch.tensor([list(ids)], dtype=torch.int64, device=device)))

    @torch.inference_mode()
    def read_embedded(self, embedded: Tensor) -> None:
        """Append embeddings [1, T, C], the language model's input. Raises ValueError: as `read`."""
        self._check_free()
        self._append_embedded(embedded)

    def _append_embedded(self, embedded: Tensor) -> None:
        for reader in self._readers():
            reader.read(embedded)

    @torch.inference_mode()
    def push(self, frame: Tensor, second: float | None = None) -> None:
        """Append a frame [3, H, W], normalised for the backbone, on the network's device.

        Args:
            second: time of the frame, for a clock that counts seconds; None: one second after the last frame, 0 for
                the first frame.

        Raises:
            ValueError: the row does not fit into the language model's context, the network can number fewer frames,
                an answer is in progress, or `second` is not finite or before the time of the last frame. The stream
                is then unchanged.
        """
        self._check_free()
        network, time_s = self.network, self._check_time(second)
        seconds = torch.tensor([[time_s]], device=frame.device)
        with evaluating(network):
            kv = network.encode(frame[None])
            coarse = None
            if self.mode == "coarse_only" or self._driving is not self._row:
                coarse = network.connector(network.query_frames(network.static_query, kv))
            if self.mode == "coarse_only":
                assert coarse is not None
                self._row.read(network.with_frame_positions(coarse, self.frames, seconds))
            else:
                query = network.query_after(self._driving.state, self.frames, seconds)
                fine = network.connector(network.query_frames(query, kv))
                self._row.read(network.with_frame_positions(fine, self.frames, seconds))
                if self._driving is not self._row:
                    assert coarse is not None
                    self._driving.read(network.with_frame_positions(coarse, self.frames, seconds))
        self.frames += 1
        self._second = time_s

    def _check_time(self, second: float | None) -> float:
        last = self._second
        time_s = (0.0 if last is None else last + 1.0) if second is None else float(second)
        if MOST_SECONDS < time_s < math.inf:
            raise ValueError(
                f"a frame of second {time_s:.10g}: seconds count from the video's beginning, up to {MOST_SECONDS:.0f}; "
                "take that of the first frame away"
            )
        if not math.isfinite(time_s) or (last is not None and time_s < last):
            behind = "the first one" if last is None else f"behind one of second {last:g}"
            raise ValueError(f"a frame of second {time_s:g}, {behind}: seconds are finite and do not fall back")
        return time_s

    @property
    def positions(self) -> int:
        """Number of positions of the row so far."""
        return self._row.cache.length

    def mark(self) -> Mark:
        """Return the current position of the row, for `back`."""
        return Mark(self.frames, self._second, tuple(reader.mark() for reader in self._readers()))

    def back(self, mark: Mark) -> None:
        """Discard everything after a mark."""
        self.frames, self._second = mark.frames, mark.second
        for reader, reader_mark in zip(self._readers(), mark.readers, strict=True):
            reader.back(reader_mark)

    @torch.inference_mode()
    def tokens(
        self, ids: Sequence[int], max_new_tokens: int = 64, sampling: Sampling = GREEDY, keep: bool = False
    ) -> Iterator[int]:
        """Generate an answer to text that ends where the assistant's words begin; yield the token ids one by one.

        Args:
            ids: token ids of the text. sampling: how tokens are chosen.
            keep: keep text and answer in the row, to continue the conversation. Otherwise, and if the iteration stops
                before the answer ends, the row is restored.

        Raises:
            ValueError: text and answer do not fit into the language model's context, or another answer is in progress.
        """
        self._check_free()
        mark, self._answering, kept = self.mark(), True, False
        try:
            self._append(ids)
            answer_ids = yield from self._continue(max_new_tokens, sampling)
            if keep:  # append to every row: during generation, only `_row` read the answer
                self.back(mark)
                self._append([*ids, *answer_ids, self.tokenizer.end_of_turn])
                kept = True
        finally:
            self._answering = False
            if not kept:
                self.back(mark)

    def _continue(self, max_new_tokens: int, sampling: Sampling) -> Generator[int, None, list[int]]:
        language, state = self.network.language, self._row.state
        assert state is not None
        generators = [sampling.generator(state.device)]
        answer_ids: list[int] = []
        for _ in range(max_new_tokens):
            logits = language.logits(state[:, 0]).float()
            logits[:, self.tokenizer.size :] = -torch.inf  # rows of the output table without a token
            token = int(sampling.next(logits, generators))
            if token in self.tokenizer.stop_tokens:
                break
            answer_ids.append(token)
            yield token
            self._row.read(language.embed(torch.tensor([[token]], device=state.device)))
            state = self._row.state
            assert state is not None
        return answer_ids

    def _check_free(self) -> None:
        """Raise ValueError while an answer is in progress: what is appended after it would be discarded with it."""
        if self._answering:
            raise ValueError("an answer is under way: take its pieces to the end, or close it, before more is read")

    def _readers(self) -> list[_Reader]:
        return [self._row] if self._driving is self._row else [self._row, self._driving]


class VideoStream:
    """A question about a live video: call ``push(frame)`` for each frame and ``answer()`` at any time.

    Args:
        module: a trained foveated model. question: text of the question. mode: see `StreamingSession`.
        seconds: times of all frames to come, in seconds; no other frames can be pushed. A model that reads times
            (`collator.timestamps`) requires it, and so cannot follow a camera. A model with `frame_clock="seconds"`
            can: see `push`.
        answer_tokens: positions of the language model's context that are reserved for an answer; `push` does not use
            them. None: 64, or a quarter of the positions that the question leaves, if that is less.

    Raises:
        ValueError: a question that is no text, is empty or leaves no room for a frame, a mode in which a frame depends
            on later frames, or seconds that are required but missing, not finite or not in order.
    """

    def __init__(
        self,
        module: Any,
        question: str,
        mode: str = "autoregressive",
        seconds: Sequence[float] | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        if answer_tokens is not None:
            check_count(answer_tokens, "answer_tokens")
        if not isinstance(question, str):
            raise ValueError(f"a question is a text, not {type(question).__name__}")
        if not question.strip():
            raise ValueError("question='': a question is empty")
        refuse_half_characters(question, "the question")
        self.module = module
        try:
            self._seconds = None if seconds is None else tuple(map(float, seconds))
        except (TypeError, ValueError) as error:
            raise ValueError(f"seconds={seconds!r}: a number for each frame to come") from error
        if self._seconds and not (
            all(map(math.isfinite, self._seconds)) and list(self._seconds) == sorted(self._seconds)
        ):
            raise ValueError(f"seconds={list(self._seconds)[:8]}: those of frames are finite and do not fall back")
        text = module.collator.prompt((Turn("user", question),), self._seconds)
        self.session = StreamingSession(module.network, module.tokenizer, mode)
        self.session.read(text.ids[: text.visual_at])
        self._rest = text.ids[text.visual_at :]
        remaining = max(4, module.network.language.context - len(text.ids))
        self.answer_tokens = min(ANSWER_TOKENS, remaining // 4) if answer_tokens is None else answer_tokens
        if self.room < 0:  # 0 is accepted: text alone needs no room for frames
            raise ValueError(
                f"the question takes {len(text.ids)} positions and its answer up to {self.answer_tokens}; the "
                f"language model holds {module.network.language.context}: no frame has room. Give a shorter question "
                "or fewer answer_tokens"
            )

    @property
    def frames(self) -> int:
        """Number of frames pushed so far."""
        return self.session.frames

    @property
    def room(self) -> int:
        """Number of frames that can still be pushed; the language model's context, the frame numbers of the network and
        the stream's `seconds` limit it."""
        return min(room for room, _ in self._frame_limits())

    def _frame_limits(self) -> list[tuple[int, str]]:
        """Return for each limit how many more frames it allows, and the error text for the case that it allows none."""
        network = self.module.network
        used_positions = self.session.positions + len(self._rest) + self.answer_tokens
        rooms = [
            (
                int(network.language.context - used_positions) // int(network.tokens_per_frame),
                f"{self.frames} frames and room for an answer of {self.answer_tokens} tokens take the language model's "
                f"context of {network.language.context}",
            )
        ]
        if self._seconds is not None:
            message = f"it was given the times of {len(self._seconds)} frames, and all have been pushed"
            rooms.append((len(self._seconds) - self.frames, message))
        if network.frame_tokens is not None:
            max_frames = len(network.frame_tokens)
            message = (
                f"it would have {self.frames + 1} frames and model.network.frame_numbers={max_frames}; a model trained "
                "with frame_clock=true has no such limit"
            )
            rooms.append((max_frames - self.frames, message))
        return rooms

    def push(self, frame: np.ndarray | Image.Image, second: float | None = None) -> None:
        """Append a frame, uint8 [H, W, 3] RGB or a PIL image; it is resized to the model's image size as in training.
        It is one frame of a video: if training showed a single image as n frames (`data.image_frames`), push n frames.

        Args:
            second: time of the frame; None: the time in the stream's `seconds`, or without them one second after the
                last frame, 0 for the first frame.

        Raises:
            ValueError: another shape or type, no room for it (`room`), or `second` is not finite, is before the time
                of the last frame or differs from the stream's `seconds`.
        """
        limit_message = next((message for room, message in self._frame_limits() if room < 1), None)
        if limit_message is not None:
            raise ValueError(
                f"the stream is full: {limit_message}. Answers can still be had; begin a new stream for further frames"
            )
        if self._seconds is not None:
            second = self._expected_second(second)
        images = self.module.image_options
        if not isinstance(frame, Image.Image):
            if not isinstance(frame, np.ndarray):
                raise ValueError(f"a frame is uint8 [H, W, 3] or a PIL image, not {type(frame).__name__}")
            if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size or frame.dtype != np.uint8:
                raise ValueError(f"a frame is uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
            frame = Image.fromarray(frame)
        fitted = shown_image(frame, images["image_size"], images["fit"])
        self.session.push(self.module.as_input(fitted[None])[0, 0], second)

    def _expected_second(self, second: float | None) -> float:
        assert self._seconds is not None
        expected = self._seconds[self.frames]
        if second is not None and second != expected:
            raise ValueError(f"the frame has second={second:g}; `seconds` of the stream gives {expected:g} for it")
        return expected

    def stream(
        self,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        **others: Any,
    ) -> Iterator[str]:
        """Answer from the frames pushed so far; yield the text in pieces, which together are the text of `answer()`.

        Args:
            max_new_tokens: longest answer in tokens. None: 64, or `answer_tokens` if that is more; fewer if the context
                has no room for that many.
            temperature, seed, top_k, top_p: see `Sampling`.

        Raises:
            ValueError: `max_new_tokens` is below 1 or more than there is room for, or as `Sampling`.
            TypeError: another setting.
        """
        refuse_settings(others, ("max_new_tokens", "temperature", "seed", "top_k", "top_p"), "a session's answer")
        sampling = Sampling(temperature, seed, top_k, top_p)
        remaining = self.module.network.language.context - self.session.positions - len(self._rest)
        if max_new_tokens is None:
            max_new_tokens = min(max(ANSWER_TOKENS, self.answer_tokens), remaining)
        check_count(max_new_tokens)
        if max_new_tokens > remaining:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: behind {self.frames} frames the language model's context has room "
                f"for {remaining} tokens of an answer"
            )
        tokens = self.session.tokens(self._rest, max_new_tokens, sampling)
        yield from pieces(self.module.tokenizer, tokens)

    def answer(self, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0, **others: Any) -> str:
        """Answer from the frames pushed so far; more frames may follow. Arguments as for `stream`."""
        return "".join(self.stream(max_new_tokens, temperature, seed, **others))


def pieces(tokenizer: ChatTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as they arrive: whole characters, without white space at both ends of the whole text."""
    ids: list[int] = []
    emitted = ""
    for token in tokens:
        ids.append(token)
        if tokenizer.is_byte(token):  # consecutive bytes are decoded together: an incomplete character spoils them
            continue
        text = tokenizer.decode(ids).strip()
        if not text.endswith(UNFINISHED) and text != emitted and text.startswith(emitted):
            yield text[len(emitted) :]
            emitted = text
    text = tokenizer.decode(ids).strip() if ids else ""
    if text != emitted and text.startswith(emitted):
        yield text[len(emitted) :]
