"""Chat with a video-language model: conversations with images and videos in, answers out.

    chat = VideoChat.from_pretrained("runs/foveated_vlm_webvid/...")      # or an export, or what save_pretrained wrote
    chat.generate([{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                {"type": "text", "text": "What happens?"}]}])
    session = chat.stream("What happens?")      # a video that is still coming: session.push(frame), session.answer()
    chat.save_pretrained("my-model")

What a conversation may hold: `keygrip.inference.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from keygrip.exporting.folder import model_card, write_export
from keygrip.inference.prompts import (
    MARK,
    Message,
    Prompt,
    PromptReader,
    at_its_place,
    check,
    padded_frames,
    refuse_message,
)
from keygrip.models.foveated_vlm.conversations import encode_around
from keygrip.models.foveated_vlm.generation import check_count, check_room, check_seed, check_temperature, generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.streaming import STREAMED_MODES, StreamingSession, VideoStream, pieces
from keygrip.training.checkpoints import WEIGHTS_ARE, load_module, read_checkpoint, run_content, weights_of
from keygrip.training.integrity import refuse_unfit_weights

BATCH_ROWS = 64  # conversations that are answered together at most
BATCH_TEXT = 16384  # tokens of text that are answered together at most, padding with them
BATCH_FRAMES = 256  # answered together: their keys and values take 9 MB per frame in DINOv2 small, float32


class VideoChat:
    """A trained foveated model with its processor.

    Args:
        module: the model. source: the run, checkpoint or export that it is from; `save_pretrained` takes its
            configuration from there, and without one from the run that is training the module.
    """

    def __init__(self, module: FoveatedVLMModule, source: str | Path | None = None) -> None:
        self.module, self.source = module.eval(), source
        self._given = _layout(module)
        images = module.image_options
        self.reader = PromptReader(images["image_size"], images["fit"], images["max_frames"])

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
        """Writes config.json, tokenizer, chat template, processor and the weights that the model has now in the hub's
        layout, as `keygrip export`.

        Raises:
            FileExistsError: the folder holds something. ValueError: the model's configuration is not known, it is no
                longer that of the weights or of the collator, or weights are not finite.
        """
        if changed := [name for name, value in _layout(self.module).items() if value != self._given[name]]:
            raise ValueError(
                f"save_pretrained: collator.{changed[0]} was {self._given[changed[0]]!r} when the model was loaded and "
                f"is {getattr(self.module.collator, changed[0])!r} now, which the configuration beside the weights "
                "does not say: set it back, or train with it"
            )
        weights = self.module.state_dict()
        content, which = self._described(weights)
        files, facts = self.module.export_files()
        content[WEIGHTS_ARE] = which
        card = model_card(Path(folder).name, content, weights, which, {}, self.module)
        return write_export(folder, content, weights, card, files=files, facts=facts)

    def _described(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
        """What an export says beside the weights, and in words which weights they are."""
        if self.source is None:
            try:
                trainer = self.module.trainer
            except RuntimeError as error:  # what Lightning raises for a module that nothing trains
                raise ValueError(
                    "save_pretrained: this model's configuration is not known; load it with from_pretrained, or give "
                    "VideoChat the source that it is from"
                ) from error
            refuse_unfit_weights(weights, weights, "the model")
            return run_content(trainer, self.module), "of the last step"
        content = read_checkpoint(self.source)
        known = [weights_of(content, use_ema) for use_ema in (True, False)]
        stored = known[0][0]
        other = sorted(
            name
            for name in weights.keys() | stored.keys()
            if name not in weights or name not in stored or weights[name].shape != stored[name].shape
        )
        if other:
            raise ValueError(
                f"save_pretrained: {', '.join(other[:3])} of this model and of {self.source} differ in name or shape: "
                "the configuration there does not build this model"
            )
        refuse_unfit_weights(weights, stored, "the model")
        self.module.on_save_checkpoint(content)
        return content, next((which for state, which in known if _same(weights, state)), "changed after that step")

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
        them; others stand where they are said, which no training has shown the model. Several have no common
        time: a clock of seconds (`frame_clock`) then counts their frames.

        Args:
            mode: how videos are looked at; None: as at inference. Images or videos in several places, or behind words,
                are read one after the other: in `STREAMED_MODES` of the foveated model alone.
            batch_frames: conversations are decoded and answered so many frames at a time (of one that has more, all).
            left_out: conversations that have another form, cannot be read or do not fit go here, by number with the
                reason, and have the answer ""; None: the first of them ends all.

        Raises:
            ValueError, FileNotFoundError: as `check`, before anything is decoded; as `PromptReader.read`; a temperature
                that is negative or not finite, no new token, or no list.
        """
        check_temperature(temperature)
        check_seed(seed)
        check_count(max_new_tokens)
        check_count(batch_frames, "batch_frames")
        refuse_message(conversations)
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        wanted: Any = conversations if several else [conversations]
        how = mode or self.module.answer_mode
        unfit: dict[int, str] = {}
        for number, messages in enumerate(wanted):
            try:
                self.check(messages, how)
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                unfit[number] = str(error)
        answers: list[str] = [""] * len(wanted)
        waiting: list[tuple[int, Prompt, int]] = []  # with the tokens of its text

        def answer_waiting() -> None:
            prompts = [prompt for _, prompt, _ in waiting]
            said = self._together(prompts, max_new_tokens, temperature, seed, how) if prompts else []
            for (number, _, _), text in zip(waiting, said, strict=True):
                answers[number] = text
            waiting.clear()

        for number, messages in enumerate(wanted):
            if number in unfit:
                continue
            try:
                prompt = self._read(messages)
                text = self._check_room(prompt, max_new_tokens)
                if not prompt.at_its_place:
                    answers[number] = "".join(self._streamed(prompt, max_new_tokens, temperature, seed, how))
                    continue
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                unfit[number] = str(error)
                continue
            grown = [*waiting, (number, prompt, text)]
            longest = max(tokens for _, _, tokens in grown)
            if (
                padded_frames([each for _, each, _ in grown]) > batch_frames
                or longest * len(grown) > BATCH_TEXT
                or len(grown) > BATCH_ROWS
            ):
                answer_waiting()
            waiting.append((number, prompt, text))
        answer_waiting()
        if left_out is not None:
            left_out.update(sorted(unfit.items()))
        return answers if several else answers[0]

    @overload
    def stream(
        self,
        question: str,
        /,
        *,
        mode: str | None = None,
        seconds: Sequence[float] | None = None,
        answer_tokens: int | None = None,
    ) -> VideoStream: ...

    @overload
    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        mode: str | None = None,
    ) -> Iterator[str]: ...

    def stream(
        self,
        messages: str | Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        mode: str | None = None,
        *,
        seconds: Sequence[float] | None = None,
        answer_tokens: int | None = None,
    ) -> VideoStream | Iterator[str]:
        """Of a question (a text) about a video that is still coming, its session: `push(frame)`, and `answer()` at any
        time. Of a conversation (a list of messages), pieces of the answer as they come.

        Args:
            max_new_tokens, temperature, seed: of a conversation's answer, as in `generate`; a session's `answer` takes
                them. seconds, answer_tokens: of a session, see `VideoStream`.

        Raises:
            ValueError: of a question as `FoveatedVLMModule.stream`, of a conversation as `generate`, or an argument of
                the other one. FileNotFoundError: as `generate`.
        """
        if isinstance(messages, str):
            if (max_new_tokens, temperature, seed) != (64, 0.0, 0):
                raise ValueError(
                    "stream of a question (a text) gives a session, whose answer(...) takes max_new_tokens, "
                    "temperature and seed; mode, seconds and answer_tokens are given here, by their names"
                )
            return self.module.stream(messages, mode, seconds, answer_tokens)
        if seconds is not None or answer_tokens is not None:
            raise ValueError(
                "seconds and answer_tokens are for the session that stream gives of a question (a text); of a "
                "conversation give max_new_tokens, and the times are those of its video"
            )
        check_temperature(temperature)
        check_seed(seed)
        check_count(max_new_tokens)
        how = mode or self.module.answer_mode
        self.check(messages, how, streamed=True)
        prompt = self._read(messages)
        self._check_room(prompt, max_new_tokens)
        return self._streamed(prompt, max_new_tokens, temperature, seed, how)

    def check(self, messages: Sequence[Message], mode: str, streamed: bool = False) -> None:
        """Checks a conversation without decoding anything.

        Args:
            mode: how it is to be looked at. streamed: it is to be read part by part, as `stream` does.

        Raises:
            ValueError, FileNotFoundError: as `keygrip.inference.prompts.check`; a mode that the network does not have
                or in which it cannot read the conversation; several images or videos where times are told.
        """
        turns, network = check(messages), self.module.network
        if mode not in network.modes:
            raise ValueError(f"mode={mode}: {type(network).__name__} has {', '.join(network.modes)}")
        if self.module.collator.timestamps and sum(turn.text.count(MARK) for turn in turns) > 1:
            raise ValueError(
                "the model is told when frames were taken (collator.timestamps=true), and several images or videos "
                "have no common time: ask about one at a time"
            )
        if at_its_place(turns) and not streamed:
            return
        if not isinstance(network, FoveatedVLM):
            raise ValueError(f"{type(network).__name__} reads whole videos at one place: it cannot be streamed")
        if mode not in STREAMED_MODES:
            raise ValueError(
                f"mode={mode}: what is read part by part (a stream, images between words) is seen in "
                f"{' or '.join(STREAMED_MODES)}"
            )

    def _read(self, messages: Sequence[Message]) -> Prompt:
        return self.reader.read(messages).placed(self.module.collator.prompt_order)

    def _check_room(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Tokens of its text. Raises ValueError: with its frames and the answer they do not fit into the context."""
        text = sum(len(part) for part in self._parts(prompt) if isinstance(part, list))
        check_room(self.module.network, text, sum(map(len, prompt.visuals)), max_new_tokens)
        return text

    def _together(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, mode: str
    ) -> list[str]:
        module = self.module
        padded, counts = self.reader.together(prompts)
        frames = module.as_input(padded.reshape(-1, *padded.shape[2:]))[0].unflatten(0, padded.shape[:2])
        seconds = [() if prompt.seconds is None else prompt.seconds for prompt in prompts]  # (): numbered
        texts = [module.collator.prompt(prompt.words, prompt.seconds) for prompt in prompts]
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
        session = StreamingSession(module.network, module.tokenizer, mode)
        parts = self._parts(prompt)
        # Several visuals have no common time: their frames are numbered, as training numbers such images.
        times = iter(prompt.times if prompt.seconds is not None else [[None] * len(each) for each in prompt.times])
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
            text = module.collator.prompt(prompt.words, prompt.seconds)
            return [text.ids[: text.visual_at], *prompt.visuals, text.ids[text.visual_at :]]
        turns = module.collator.with_system(module.collator.with_times(prompt.turns, prompt.seconds))
        texts = encode_around(turns, module.tokenizer, MARK)
        parts: list[list[int] | np.ndarray] = [*prompt.visuals[: prompt.before_text], texts[0]]
        for visual, ids in zip(prompt.visuals[prompt.before_text :], texts[1:], strict=True):
            parts += [visual, ids]
        return parts


def _layout(module: FoveatedVLMModule) -> dict[str, Any]:
    """What decides how a conversation becomes a row, and stands in a run's configuration too."""
    collator = module.collator
    return {"system": collator.system, "prompt_order": collator.prompt_order, "timestamps": collator.timestamps}


def _same(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    return all(
        value.dtype == stored[name].dtype and torch.equal(value.cpu(), stored[name]) for name, value in weights.items()
    )
