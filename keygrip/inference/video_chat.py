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

from keygrip.data.video_text.conversations import image_frames_of
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
from keygrip.models.foveated_vlm.generation import check_count, check_room, encoded, generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.sampling import Sampling, refuse_settings
from keygrip.models.foveated_vlm.streaming import STREAMED_MODES, StreamingSession, VideoStream, pieces
from keygrip.training.checkpoints import (
    WEIGHTS_ARE,
    dtypes_of,
    load_module,
    read_checkpoint,
    run_content,
    weights_of,
)
from keygrip.training.integrity import refuse_unfit_weights

BATCH_ROWS = 64  # conversations that are answered together at most
BATCH_TEXT = 16384  # tokens of text that are answered together at most, padding with them
BATCH_FRAMES = 256  # answered together: their keys and values take 9 MB per frame in DINOv2 small, float32
SETTINGS = ("max_new_tokens", "temperature", "seed", "top_k", "top_p", "mode")  # of an answer


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
        self.reader = PromptReader(images["image_size"], images["fit"], images["max_frames"], image_frames_of(images))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        trust: Sequence[str] = (),
        dtype: str | torch.dtype = "auto",
    ) -> Self:
        """Loads a run folder, a checkpoint, an export or what `save_pretrained` wrote; nothing in it is executed.

        Args:
            dtype: as of transformers: "auto", in which the weights were saved (those of a run: float32), or a type or
                its name, as torch.bfloat16 or "bfloat16".

        Raises:
            FileNotFoundError, ValueError: no such model, damaged, or of another kind; no such dtype.
        """
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module: Any = load_module(path, map_location=place, expected=FoveatedVLMModule, trust=tuple(trust), dtype=dtype)
        return cls(module, path)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes config.json, tokenizer, chat template, processor and the weights that the model has now in the hub's
        layout, as `keygrip export`.

        Raises:
            FileExistsError: the folder holds something. ValueError: the model's configuration is not known, it is no
                longer that of the weights or of the collator, weights are not finite, or of several types.
        """
        if changed := [name for name, value in _layout(self.module).items() if value != self._given[name]]:
            raise ValueError(
                f"save_pretrained: collator.{changed[0]} was {self._given[changed[0]]!r} when the model was loaded and "
                f"is {getattr(self.module.collator, changed[0])!r} now, which the configuration beside the weights "
                "does not say: set it back, or train with it"
            )
        weights = self.module.state_dict()
        if len(kinds := dtypes_of(self.module, weights)) > 1:
            raise ValueError(
                f"save_pretrained: the weights are of {' and '.join(sorted(map(str, kinds)))}, and a saved model is "
                "loaded in one type: bring all into one, chat.module.to(torch.bfloat16)"
            )
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
        which = next((which for state, which in known if _same(weights, state)), "changed after that step")
        rounded = map(str, dtypes_of(self.module, weights) - dtypes_of(self.module, stored))
        return content, ", as ".join([which, *(name.removeprefix("torch.") for name in rounded)])

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
        *,
        samples: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **others: Any,
    ) -> Any:
        """The answer to a conversation, or answers to several, which are computed together.

        Images and videos that stand in the first user's message before its words are placed where training placed
        them; others stand where they are said, which no training has shown the model. Several have no common
        time: a clock of seconds (`frame_clock`) then counts their frames.

        Args:
            temperature, seed, top_k, top_p: how tokens are chosen, see `Sampling`. Each conversation is drawn as if it
                stood alone: the same one several times has the same answer each time. Several answers to it are
                `samples`.
            mode: how videos are looked at; None: as at inference. Images or videos in several places, or behind words,
                are read one after the other: in `STREAMED_MODES` of the foveated model alone.
            batch_frames: conversations are decoded and answered so many frames at a time (of one that has more, all),
                where each sample counts its conversation's.
            left_out: conversations that have another form, cannot be read or do not fit go here, by number with the
                reason, and have the answer "" (each sample of them); None: the first of them ends all.
            samples: answers to draw to each conversation, which then has a list of so many: the first is the answer
                without `samples`, the others are drawn with `seed` + 1, `seed` + 2, ... None: one answer, no list.

        Raises:
            ValueError, FileNotFoundError: as `check`, before anything is decoded; as `PromptReader.read`; as
                `Sampling`; several samples where nothing is drawn, no new token, or no list.
            TypeError: a setting that is none of these.
        """
        refuse_settings(others, (*SETTINGS, "samples", "batch_frames", "left_out"), "VideoChat.generate")
        sampling = Sampling(temperature, seed, top_k, top_p)
        count = checked_samples(samples, sampling)
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
        answers: list[list[str]] = [[""] * count for _ in wanted]
        waiting: list[tuple[int, Prompt, int]] = []  # with the tokens of its text

        def answer_waiting() -> None:
            prompts = [prompt for _, prompt, _ in waiting]
            said = self._together(prompts, max_new_tokens, sampling, how, count, batch_frames) if prompts else []
            for (number, _, _), texts in zip(waiting, said, strict=True):
                answers[number] = texts
            waiting.clear()

        for number, messages in enumerate(wanted):
            if number in unfit:
                continue
            try:
                prompt = self._read(messages)
                text = self._check_room(prompt, max_new_tokens)
                if not prompt.at_its_place:
                    session, ids = self._read_in_parts(prompt, how)
                    for sample in range(count):
                        said = session.tokens(ids, max_new_tokens, sampling.of(sample))
                        answers[number][sample] = "".join(pieces(self.module.tokenizer, said))
                    continue
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                unfit[number] = str(error)
                continue
            grown = [*waiting, (number, prompt, text)]
            longest = max(tokens for _, _, tokens in grown)
            if _repeats([each for _, each, _ in grown], longest, batch_frames) < count:
                answer_waiting()
            waiting.append((number, prompt, text))
        answer_waiting()
        if left_out is not None:
            left_out.update(sorted(unfit.items()))
        found: list[Any] = answers if samples is not None else [texts[0] for texts in answers]
        return found if several else found[0]

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
        *,
        top_k: int | None = None,
        top_p: float | None = None,
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
        top_k: int | None = None,
        top_p: float | None = None,
        **others: Any,
    ) -> VideoStream | Iterator[str]:
        """Of a question (a text) about a video that is still coming, its session: `push(frame)`, and `answer()` at any
        time. Of a conversation (a list of messages), pieces of the answer as they come.

        Args:
            max_new_tokens, temperature, seed, top_k, top_p: of a conversation's answer, as in `generate`; a session's
                `answer` takes them. seconds, answer_tokens: of a session, see `VideoStream`.

        Raises:
            ValueError: of a question as `FoveatedVLMModule.stream`, of a conversation as `generate`, or an argument of
                the other one. FileNotFoundError: as `generate`. TypeError: another setting.
        """
        refuse_settings(others, (*SETTINGS, "seconds", "answer_tokens"), "VideoChat.stream")
        if isinstance(messages, str):
            if (max_new_tokens, temperature, seed, top_k, top_p) != (64, 0.0, 0, None, None):
                raise ValueError(
                    "stream of a question (a text) gives a session, whose answer(...) takes max_new_tokens, "
                    "temperature, seed, top_k and top_p; mode, seconds and answer_tokens are given here, by their names"
                )
            return self.module.stream(messages, mode, seconds, answer_tokens)
        if seconds is not None or answer_tokens is not None:
            raise ValueError(
                "seconds and answer_tokens are for the session that stream gives of a question (a text); of a "
                "conversation give max_new_tokens, and the times are those of its video"
            )
        sampling = Sampling(temperature, seed, top_k, top_p)
        check_count(max_new_tokens)
        how = mode or self.module.answer_mode
        self.check(messages, how, streamed=True)
        prompt = self._read(messages)
        self._check_room(prompt, max_new_tokens)
        return self._streamed(prompt, max_new_tokens, sampling, how)

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
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        mode: str,
        samples: int,
        batch_frames: int,
    ) -> list[list[str]]:
        """So many answers to each prompt, with as many of them at a time as there is room for."""
        module = self.module
        padded, counts = self.reader.together(prompts)
        frames = module.as_input(padded.reshape(-1, *padded.shape[2:]))[0].unflatten(0, padded.shape[:2])
        seconds = [() if prompt.seconds is None else prompt.seconds for prompt in prompts]  # (): numbered
        texts = [module.collator.prompt(prompt.words, prompt.seconds) for prompt in prompts]
        together = max(1, _repeats(prompts, max(len(text.ids) for text in texts), batch_frames))
        kv = encoded(module.network, frames, counts) if samples > together else None  # once for all parts
        answers: list[list[str]] = [[] for _ in prompts]
        for first in range(0, samples, together):
            numbers = range(first, min(first + together, samples))
            rows = [row for row in range(len(texts)) for _ in numbers]
            said = generate(
                module.network,
                module.tokenizer,
                frames,
                counts,
                [texts[row] for row in rows],
                rows,
                mode,
                max_new_tokens,
                sampling,
                kv,
                seconds,
                [number for _ in texts for number in numbers],
            )
            for row, text in zip(rows, said.texts, strict=True):
                answers[row].append(text)
        return answers

    def _streamed(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling, mode: str) -> Iterator[str]:
        session, ids = self._read_in_parts(prompt, mode)
        yield from pieces(self.module.tokenizer, session.tokens(ids, max_new_tokens, sampling))

    def _read_in_parts(self, prompt: Prompt, mode: str) -> tuple[StreamingSession, list[int]]:
        """A session that has read a conversation up to its last text, and the ids of this."""
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
        return session, parts[-1]

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


def checked_samples(samples: int | None, sampling: Sampling) -> int:
    """How many answers are drawn to each conversation. Raises ValueError: no such number, nothing is drawn, or there
    are not so many seeds."""
    if samples is None:
        return 1
    check_count(samples, "samples")
    if samples > 1 and not sampling.temperature:
        raise ValueError(
            f"samples={samples}: at temperature=0 all answers to a conversation are the same; give a temperature (1: "
            "the model's own shares)"
        )
    sampling.of(samples - 1)
    return int(samples)


def _repeats(prompts: Sequence[Prompt], longest: int, batch_frames: int) -> int:
    """How often prompts can be answered together, 0: not once. longest: tokens of the longest text."""
    frames, rows = padded_frames(prompts), len(prompts)
    by_frames = batch_frames // frames if frames else BATCH_ROWS
    return min(by_frames, BATCH_TEXT // max(1, longest * rows), BATCH_ROWS // rows)


def _same(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether weights are the stored ones, or these rounded to another type."""
    return all(torch.equal(value.cpu(), stored[name].to(value.dtype)) for name, value in weights.items())
