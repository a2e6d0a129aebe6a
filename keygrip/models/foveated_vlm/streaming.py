"""A video that is seen as it comes: frames and text one after the other, an answer at any time.

Each frame costs the encoder, a query and a step of the language model or two; the past is in the language model's
cache. The same as the autoregressive mode (or coarse_only) of a whole video, up to rounding.
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
from keygrip.models.foveated_vlm.generation import check_count, refuse_half_characters
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.sampling import GREEDY, Sampling, refuse_settings
from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.tokenizers import ChatTokenizer

STREAMED_MODES = ("autoregressive", "coarse_only")
NO_STREAM = "a {} answers whole videos only: leave out stream=true (in Python, use generate)"
MOST_SECONDS = 2.0**20  # 12 days; times of float32 are still a sixteenth of a second apart
UNFINISHED = "\ufffd"  # an incomplete character decodes to this


class _Reader:
    """A language model that reads a row in parts, with its cache."""

    def __init__(self, network: FoveatedVLM) -> None:
        self.language = network.language
        self.cache = LanguageCache()
        self.state: Tensor | None = None  # [1, 1, C], after the last position

    def read(self, embeddings: Tensor) -> None:
        self.state = self.language.extend(embeddings, self.cache)[:, -1:]

    def mark(self) -> tuple[int, Tensor | None]:
        return self.cache.length, self.state

    def back(self, mark: tuple[int, Tensor | None]) -> None:
        """Forgets everything after a mark."""
        length, self.state = mark
        self.cache.cut(length)


@dataclass(frozen=True)
class Mark:
    """A place in a stream: frames pushed so far, when the last one was taken, and where each of its readers stands."""

    frames: int
    second: float | None
    readers: tuple[tuple[int, Tensor | None], ...]


ANSWER_TOKENS = 64  # kept for an answer


class StreamingSession:
    """One row of text and frames that grows.

    Args:
        network: foveated. tokenizer: its. mode: `autoregressive` or `coarse_only`.

    Attributes:
        frames: pushed so far.

    Raises:
        ValueError: a mode in which a frame depends on later ones.
    """

    def __init__(self, network: FoveatedVLM, tokenizer: ChatTokenizer, mode: str = "autoregressive") -> None:
        if mode not in STREAMED_MODES:
            raise ValueError(f"mode={mode}: a stream is seen in {' or '.join(STREAMED_MODES)}")
        self.network, self.tokenizer, self.mode = network, tokenizer, mode
        self.frames = 0
        self._second: float | None = None  # when the last frame was taken
        self._answering = False
        self._row = _Reader(network)
        # Chosen queries come from the row itself, or from a second one of coarse tokens.
        self._driving = _Reader(network) if mode == "autoregressive" and network.query_source == "coarse" else self._row

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Text, as token ids. Raises ValueError: it does not fit into the context, or an answer is under way."""
        self._check_free()
        self._append(ids)

    def _append(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        device = self.network.static_query.device
        self._append_embedded(self.network.language.embed(torch.tensor([list(ids)], dtype=torch.int64, device=device)))

    @torch.inference_mode()
    def read_embedded(self, embedded: Tensor) -> None:
        """What stands in the row, as the language model's input [1, T, C]. Raises ValueError: as `read`."""
        self._check_free()
        self._append_embedded(embedded)

    def _append_embedded(self, embedded: Tensor) -> None:
        for reader in self._readers():
            reader.read(embedded)

    @torch.inference_mode()
    def push(self, frame: Tensor, second: float | None = None) -> None:
        """A frame [3, H, W], normalised as the backbone wants it, on the network's device.

        Args:
            second: when it was taken, for a clock that counts seconds; None: a second after the last frame, 0 for the
                first.

        Raises:
            ValueError: the row does not fit into the language model's context, the network numbers fewer frames, an
                answer is under way, or a second that is not finite or lies before that of the last frame. The stream
                is then as it was.
        """
        self._check_free()
        network, taken = self.network, self._time_of(second)
        now = torch.tensor([[taken]], device=frame.device)
        kv = network.encode(frame[None])
        coarse = None
        if self.mode == "coarse_only" or self._driving is not self._row:
            coarse = network.connector(network.query_frames(network.static_query, kv))
        if self.mode == "coarse_only":
            assert coarse is not None
            self._row.read(network.with_frame_positions(coarse, self.frames, now))
        else:
            query = network.query_after(self._driving.state, self.frames, now)
            fine = network.connector(network.query_frames(query, kv))
            self._row.read(network.with_frame_positions(fine, self.frames, now))
            if self._driving is not self._row:
                assert coarse is not None
                self._driving.read(network.with_frame_positions(coarse, self.frames, now))
        self.frames += 1
        self._second = taken

    def _time_of(self, second: float | None) -> float:
        last = self._second
        taken = (0.0 if last is None else last + 1.0) if second is None else float(second)
        if MOST_SECONDS < taken < math.inf:
            raise ValueError(
                f"a frame of second {taken:.10g}: seconds count from the video's beginning, up to {MOST_SECONDS:.0f}; "
                "take that of the first frame away"
            )
        if not math.isfinite(taken) or (last is not None and taken < last):
            behind = "the first one" if last is None else f"behind one of second {last:g}"
            raise ValueError(f"a frame of second {taken:g}, {behind}: seconds are finite and do not fall back")
        return taken

    @property
    def positions(self) -> int:
        """Of the row so far."""
        return self._row.cache.length

    def mark(self) -> Mark:
        """Where the row stands, for `back`."""
        return Mark(self.frames, self._second, tuple(reader.mark() for reader in self._readers()))

    def back(self, mark: Mark) -> None:
        """Forgets everything after a mark."""
        self.frames, self._second = mark.frames, mark.second
        for reader, place in zip(self._readers(), mark.readers, strict=True):
            reader.back(place)

    @torch.inference_mode()
    def tokens(
        self, ids: Sequence[int], max_new_tokens: int = 64, sampling: Sampling = GREEDY, keep: bool = False
    ) -> Iterator[int]:
        """Token ids of an answer to text that ends where the assistant is to speak, as they come.

        Args:
            sampling: how they are chosen.
            keep: text and answer stay in the row (a conversation goes on); otherwise, and where the answer is not taken
                to its end, the row is as before.

        Raises:
            ValueError: they do not fit into the language model's context, or another answer is under way.
        """
        self._check_free()
        mark, self._answering, kept = self.mark(), True, False
        try:
            self._append(ids)
            said = yield from self._continue(max_new_tokens, sampling)
            if keep:  # in every row: while the answer was made, only its own row had read it
                self.back(mark)
                self._append([*ids, *said, self.tokenizer.end_of_turn])
                kept = True
        finally:
            self._answering = False
            if not kept:
                self.back(mark)

    def _continue(self, max_new_tokens: int, sampling: Sampling) -> Generator[int, None, list[int]]:
        language, state = self.network.language, self._row.state
        assert state is not None
        generators = [sampling.generator(state.device)]
        said: list[int] = []
        for _ in range(max_new_tokens):
            logits = language.logits(state[:, 0]).float()
            logits[:, self.tokenizer.size :] = -torch.inf  # rows of the table that no token has
            token = int(sampling.next(logits, generators))
            if token in self.tokenizer.stop_tokens:
                break
            said.append(token)
            yield token
            self._row.read(language.embed(torch.tensor([[token]], device=state.device)))
            state = self._row.state
            assert state is not None
        return said

    def _check_free(self) -> None:
        """An answer stands in the row until it ends: what came behind it would be forgotten with it."""
        if self._answering:
            raise ValueError("an answer is under way: take its pieces to the end, or close it, before more is read")

    def _readers(self) -> list[_Reader]:
        return [self._row] if self._driving is self._row else [self._row, self._driving]


class VideoStream:
    """A question about a video that is still coming: ``push(frame)`` as often as wanted, ``answer()`` at any time.

    Args:
        module: a trained foveated model. question: what is asked. mode: see `StreamingSession`.
        seconds: when the frames to come were taken, all of them: so many can be pushed, each of its second. A model
            that reads times (`collator.timestamps`) needs it, and so cannot follow a camera. One with
            `frame_clock="seconds"` can: see `push`.
        answer_tokens: so much of the language model's context is kept for an answer: `push` takes no frame into it.
            None: 64, or a quarter of what the question leaves where that is less.

    Raises:
        ValueError: a question that is no text, is empty or leaves no room for a frame, a mode in which a frame depends
            on later ones, or seconds that are needed and not known, not finite or not in order.
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
        left = max(4, module.network.language.context - len(text.ids))
        self.answer_tokens = min(ANSWER_TOKENS, left // 4) if answer_tokens is None else answer_tokens
        if self.room < 0:  # text alone needs none
            raise ValueError(
                f"the question takes {len(text.ids)} positions and its answer up to {self.answer_tokens}; the "
                f"language model holds {module.network.language.context}: no frame has room. Give a shorter question "
                "or fewer answer_tokens"
            )

    @property
    def frames(self) -> int:
        """Pushed so far."""
        return self.session.frames

    @property
    def room(self) -> int:
        """Frames that can still be pushed: before the language model's context is full, and of those that the network
        numbers and whose seconds the stream was told."""
        return min(room for room, _ in self._rooms())

    def _rooms(self) -> list[tuple[int, str]]:
        """How many more frames each limit leaves room for, and what is said where it is none."""
        network = self.module.network
        taken = self.session.positions + len(self._rest) + self.answer_tokens
        rooms = [
            (
                int(network.language.context - taken) // int(network.tokens_per_frame),
                f"{self.frames} frames and room for an answer of {self.answer_tokens} tokens take the language model's "
                f"context of {network.language.context}",
            )
        ]
        if self._seconds is not None:
            said = f"it was told the seconds of {len(self._seconds)} frames, and all have been pushed"
            rooms.append((len(self._seconds) - self.frames, said))
        if network.frame_tokens is not None:
            numbers = len(network.frame_tokens)
            said = (
                f"it would have {self.frames + 1} frames and model.network.frame_numbers={numbers}; a model trained "
                "with frame_clock=true has no such limit"
            )
            rooms.append((numbers - self.frames, said))
        return rooms

    def push(self, frame: np.ndarray | Image.Image, second: float | None = None) -> None:
        """A frame, uint8 [H, W, 3] RGB or a PIL image, which is brought to the model's image size as in training. It is
        one frame of a video: where a single image was shown as several frames (`data.image_frames`), push it as often.

        Args:
            second: when it was taken; None: as the stream was told (`seconds`), or else a second after the last frame,
                0 for the first.

        Raises:
            ValueError: another shape or type, no room for it (`room`), or a second that is not finite, lies before that
                of the last frame or is not what the stream was told.
        """
        full = next((said for room, said in self._rooms() if room < 1), None)
        if full is not None:
            raise ValueError(
                f"the stream is full: {full}. Answers can still be had; begin a new stream for further frames"
            )
        if self._seconds is not None:
            second = self._known_second(second)
        images = self.module.image_options
        if not isinstance(frame, Image.Image):
            if not isinstance(frame, np.ndarray):
                raise ValueError(f"a frame is uint8 [H, W, 3] or a PIL image, not {type(frame).__name__}")
            if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size or frame.dtype != np.uint8:
                raise ValueError(f"a frame is uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
            frame = Image.fromarray(frame)
        fitted = shown_image(frame, images["image_size"], images["fit"])
        self.session.push(self.module.as_input(fitted[None])[0, 0], second)

    def _known_second(self, second: float | None) -> float:
        assert self._seconds is not None
        known = self._seconds[self.frames]
        if second is not None and second != known:
            raise ValueError(f"a frame of second {second:g}; the stream was told that it is of second {known:g}")
        return known

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
        """Pieces of the answer to what was seen so far, as they come; together they are `answer()`.

        Args:
            max_new_tokens: of the answer. None: 64, or `answer_tokens` where that is more; fewer where there is no room
                for so many.
            temperature, seed, top_k, top_p: see `Sampling`.

        Raises:
            ValueError: no new token, more than there is room for, or as `Sampling`. TypeError: another setting.
        """
        refuse_settings(others, ("max_new_tokens", "temperature", "seed", "top_k", "top_p"), "a session's answer")
        sampling = Sampling(temperature, seed, top_k, top_p)
        left = self.module.network.language.context - self.session.positions - len(self._rest)
        if max_new_tokens is None:
            max_new_tokens = min(max(ANSWER_TOKENS, self.answer_tokens), left)
        check_count(max_new_tokens)
        if max_new_tokens > left:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: behind {self.frames} frames the language model's context has room "
                f"for {left} tokens of an answer"
            )
        tokens = self.session.tokens(self._rest, max_new_tokens, sampling)
        yield from pieces(self.module.tokenizer, tokens)

    def answer(self, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0, **others: Any) -> str:
        """The answer to what was seen so far; more frames may follow. Arguments as of `stream`."""
        return "".join(self.stream(max_new_tokens, temperature, seed, **others))


def pieces(tokenizer: ChatTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens as they come, whole characters only, and without white space at both ends of the whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        if tokenizer.is_byte(token):  # bytes in a row are decoded together: an incomplete one spoils those before it
            continue
        text = tokenizer.decode(ids).strip()
        if not text.endswith(UNFINISHED) and text != shown and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(ids).strip() if ids else ""
    if text != shown and text.startswith(shown):
        yield text[len(shown) :]
