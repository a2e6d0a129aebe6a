"""Chat with a video-language model: conversations with images and videos in, answers out.

    chat = VideoChat.from_pretrained("runs/foveated_vlm_webvid/...")      # or an export, or what save_pretrained wrote
    chat.generate([{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                {"type": "text", "text": "What happens?"}]}])
    chat.save_pretrained("my-model")

Conversations have the form that transformers' processors take: messages with a role and content, which is text or a
list of {"type": "text" | "image" | "video"} items; an image or video is a path, a PIL image, or an array uint8
[H, W, 3] or [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from keygrip.data.batches import Turn
from keygrip.data.video_text.conversations import fit_image, shown_image
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.exporting.folder import model_card, write_export
from keygrip.models.foveated_vlm.generation import generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.streaming import StreamingSession, pieces
from keygrip.training.checkpoints import load_module, read_checkpoint, weights_of

ROLES = ("system", "user", "assistant")
MARK = "\ue000"  # stands for an image or video in text that a template renders; user text never holds it
BATCH_ROWS = 64  # conversations that are answered together at most
BATCH_FRAMES = 256  # answered together: their keys and values take 9 MB per frame in DINOv2 small, float32
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A conversation in parts.

    Attributes:
        turns: with a `MARK` where an image or video stands among the words. visuals: their frames, uint8 [F, S, S, 3].
        times: of each, when its frames were taken; of frames that come as arrays one per second.
    """

    turns: tuple[Turn, ...]
    visuals: tuple[np.ndarray, ...]
    times: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> tuple[float, ...] | None:
        """When all frames were taken; None where several visuals have no common time."""
        if len(self.times) > 1:
            return None
        return self.times[0] if self.times else ()

    @property
    def at_its_place(self) -> bool:
        """Whether all images and videos are in the first user turn, before its words: the place of training's."""
        marked = [turn.text.count(MARK) for turn in self.turns]
        first = next((n for n, turn in enumerate(self.turns) if turn.role == "user"), None)
        if not any(marked):
            return True
        return sum(marked) == marked[first or 0] and self.turns[first or 0].text.lstrip(MARK).count(MARK) == 0


class VideoChat:
    """A trained foveated model with its processor.

    Args:
        module: the model. source: the run, checkpoint or export that it is from; `save_pretrained` needs it.
    """

    def __init__(self, module: FoveatedVLMModule, source: str | Path | None = None) -> None:
        self.module, self.source = module.eval(), source

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | None = None, trust: Sequence[str] = ()) -> Self:
        """Loads a run folder, a checkpoint, an export or what `save_pretrained` wrote; nothing in it is executed.

        Raises:
            FileNotFoundError, ValueError: no such model, damaged, or of another kind.
        """
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module: Any = load_module(path, map_location=place, expected=FoveatedVLMModule, trust=tuple(trust))
        return cls(module, path)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes weights, config.json, tokenizer, chat template and processor in the hub's layout, as `keygrip export`.

        Raises:
            FileExistsError: the folder holds something. ValueError: it is not known where the model is from.
        """
        if self.source is None:
            raise ValueError("save_pretrained writes what a run or an export holds: load one with from_pretrained")
        content = read_checkpoint(self.source)
        weights, which = weights_of(content, True)
        files, facts = self.module.export_files()
        card = model_card(Path(folder).name, content, weights, which, {}, self.module.usage)
        return write_export(folder, content, weights, card, files=files, facts=facts)

    # ------------------------------------------------------------------ processor

    def check(self, messages: Sequence[Message]) -> None:
        """Checks a conversation without decoding anything.

        Raises:
            ValueError: an unknown role or item, or it does not end with a user's turn. FileNotFoundError: an image or
                a video is not there.
        """
        for _, items in _turns(messages):
            for kind, content in items:
                if kind != "text" and isinstance(content, str | Path) and not Path(content).exists():
                    raise FileNotFoundError(f"there is no video, image or folder at {content}")

    def read(self, messages: Sequence[Message]) -> Prompt:
        """A conversation with its images and videos decoded.

        Raises:
            ValueError: as `check`, or an image or a video that cannot be decoded. FileNotFoundError: as `check`.
        """
        turns, visuals, times = [], [], []
        for role, items in _turns(messages):
            words = []
            for kind, content in items:
                if kind == "text":
                    words.append(content.replace(MARK, ""))
                    continue
                frames, seconds = self._frames(content, kind)
                visuals.append(frames)
                times.append(seconds)
                words.append(MARK)
            turns.append(Turn(role, "".join(words)))
        return Prompt(tuple(turns), tuple(visuals), tuple(times))

    def _frames(self, given: Any, kind: str) -> tuple[np.ndarray, tuple[float, ...]]:
        images = self.module.image_options
        size, fit = images["image_size"], images["fit"]
        if isinstance(given, str | Path):
            return read_timed_frames(given, size, fit, 1 if kind == "image" else images["max_frames"])
        if isinstance(given, Image.Image):
            return shown_image(given, size, fit)[None], (0.0,)
        array = np.asarray(given)
        if array.dtype != np.uint8 or array.shape[-1:] != (3,) or array.ndim not in (3, 4):
            raise ValueError(
                f"an {kind} is a path, a PIL image, or uint8 [H, W, 3] or [F, H, W, 3]; not {array.dtype} "
                f"{list(array.shape)}"
            )
        frames = array[None] if array.ndim == 3 else array
        fitted = np.stack([fit_image(Image.fromarray(frame), size, fit) for frame in frames])
        return fitted, tuple(float(number) for number in range(len(frames)))

    # ------------------------------------------------------------------ answers

    def generate(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        mode: str | None = None,
        batch_frames: int = BATCH_FRAMES,
        left_out: dict[int, str] | None = None,
    ) -> Any:
        """The answer to a conversation, or answers to several, which are computed together.

        Images and videos that stand in the first user's message before its words are placed where training placed
        them; elsewhere each stands where it is said, which no training has shown the model.

        Args:
            mode: how videos are looked at; None: as at inference.
            batch_frames: conversations are decoded and answered so many frames at a time (of one that has more, all).
            left_out: conversations that cannot be decoded or do not fit go here, by number with the reason, and have
                the answer ""; None: the first of them ends all.

        Raises:
            ValueError: as `read`, or a baseline's conversation with images in several places.
        """
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        wanted: Any = conversations if several else [conversations]
        for each in wanted:
            self.check(each)
        how = mode or self.module.network.modes[-1]
        answers: list[str] = [""] * len(wanted)
        waiting: list[tuple[int, Prompt]] = []

        def answer_waiting() -> None:
            prompts = [prompt for _, prompt in waiting]
            said = self._together(prompts, max_new_tokens, temperature, seed, how) if prompts else []
            for (number, _), text in zip(waiting, said, strict=True):
                answers[number] = text
            waiting.clear()

        for number, messages in enumerate(wanted):
            try:
                prompt = self.read(messages)
                self._check_room(prompt, max_new_tokens)
                if not prompt.at_its_place:
                    answers[number] = "".join(self._streamed(prompt, max_new_tokens, temperature, seed, how)).strip()
                    continue
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                left_out[number] = str(error)
                continue
            if padded_frames([*(each for _, each in waiting), prompt]) > batch_frames or len(waiting) == BATCH_ROWS:
                answer_waiting()
            waiting.append((number, prompt))
        answer_waiting()
        return answers if several else answers[0]

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        mode: str | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer to a conversation as they come; arguments and errors as in `generate`."""
        prompt = self.read(messages)
        return self._streamed(prompt, max_new_tokens, temperature, seed, mode or self.module.network.modes[-1])

    def _check_room(self, prompt: Prompt, max_new_tokens: int) -> None:
        network = self.module.network
        text = sum(len(part) for part in self._parts(prompt) if isinstance(part, list))
        taken = text + network.tokens_per_frame * sum(map(len, prompt.visuals))
        if taken + max_new_tokens > network.language.context:
            raise ValueError(
                f"the conversation takes {taken} positions and the answer up to {max_new_tokens}; the language model "
                f"holds {network.language.context}: lower max_new_tokens, or give fewer frames or less text"
            )

    def _together(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, mode: str
    ) -> list[str]:
        module = self.module
        size = module.image_options["image_size"]
        videos = [np.concatenate([np.zeros((0, size, size, 3), np.uint8), *prompt.visuals]) for prompt in prompts]
        counts = [len(video) for video in videos]
        padded = np.zeros((len(videos), max(counts), size, size, 3), np.uint8)
        for row, video in enumerate(videos):
            padded[row, : len(video)] = video
        frames = module.as_input(padded.reshape(-1, size, size, 3))[0].unflatten(0, padded.shape[:2])
        seconds = [prompt.seconds for prompt in prompts]
        texts = [module.collator.prompt(_without_marks(prompt.turns), prompt.seconds) for prompt in prompts]
        said = generate(
            module.network,
            module.tokenizer,
            frames,
            counts,
            texts,
            list(range(len(texts))),
            mode,
            max_new_tokens,
            temperature,
            seed,
            seconds=seconds,
        )
        return said.texts

    def _streamed(self, prompt: Prompt, max_new_tokens: int, temperature: float, seed: int, mode: str) -> Iterator[str]:
        module = self.module
        if not isinstance(module.network, FoveatedVLM):
            raise ValueError(f"{type(module.network).__name__} reads whole videos at one place: it cannot be streamed")
        session = StreamingSession(module.network, module.tokenizer, mode)
        parts = self._parts(prompt)
        times = iter(prompt.times)
        for part in parts[:-1]:
            if isinstance(part, list):
                session.read(part)
            else:
                for frame, second in zip(module.as_input(part)[0], next(times), strict=True):
                    session.push(frame, second)
        assert isinstance(parts[-1], list)
        yield from pieces(module.tokenizer, session.tokens(parts[-1], max_new_tokens, temperature, seed))

    def _parts(self, prompt: Prompt) -> list[list[int] | np.ndarray]:
        """Token ids and frames in the order in which they are read; ids come last."""
        module = self.module
        if prompt.at_its_place:
            text = module.collator.prompt(_without_marks(prompt.turns), prompt.seconds)
            return [text.ids[: text.visual_at], *prompt.visuals, text.ids[text.visual_at :]]
        turns = module.collator.with_system(prompt.turns)
        said = [(turn.role, module.tokenizer.as_words(turn.text)) for turn in turns]
        rendered = module.tokenizer.render(said, answering=True)
        texts = [module.tokenizer.encode(piece) for piece in rendered.split(MARK)]
        parts: list[list[int] | np.ndarray] = [texts[0]]
        for visual, ids in zip(prompt.visuals, texts[1:], strict=True):
            parts += [visual, ids]
        return parts


def _turns(messages: Sequence[Message]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(role, items) of a conversation, each item (kind, text or image or video). Raises ValueError: it has another form
    or does not end with a user's message."""
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message is no object but {str(message)[:80]!r}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"a message is from {role!r}; known are {', '.join(ROLES)}")
        items: list[tuple[str, Any]] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text" and isinstance(item.get("text"), str):
                items.append((kind, item["text"]))
            elif kind in ("image", "video") and role == "user":
                items.append((kind, item.get(kind, item.get("path"))))
            else:
                raise ValueError(
                    f"an item of a {role}'s message is {str(item)[:80]!r}; known are text, and of users image and video"
                )
        turns.append((role, items))
    if not turns or turns[-1][0] != "user":
        raise ValueError("a conversation to answer ends with a user's message")
    return turns


def padded_frames(prompts: Sequence[Prompt]) -> int:
    """Frames of a batch of conversations, the padding of shorter videos with them."""
    return len(prompts) * max((sum(map(len, prompt.visuals)) for prompt in prompts), default=0)


def _without_marks(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, turn.text.replace(MARK, "").strip()) for turn in turns)
