"""Chat with a video-language model: give conversations with images and videos, receive answers.

    chat = VideoChat.from_pretrained("runs/foveated_vlm_webvid/...")      # or an export, or what save_pretrained wrote
    chat.generate([{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                {"type": "text", "text": "What happens?"}]}])
    session = chat.stream("What happens?")      # for live video: session.push(frame), session.answer()
    chat.save_pretrained("my-model")

For the form of conversations see `keygrip.inference.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor

from keygrip.data.video_text.conversations import image_frames_of
from keygrip.exporting.folder import model_card, write_export
from keygrip.inference.prompts import (
    Message,
    Prompt,
    PromptReader,
    at_training_place,
    check,
    padded_frames,
    parts_in_order,
    refuse_message,
    refuse_several_times,
)
from keygrip.models.foveated_vlm.generation import check_count, check_room, encoded, evaluating, generate
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

BATCH_ROWS = 64  # maximum number of conversations that are answered together
BATCH_TEXT = 16384  # maximum number of text tokens that are answered together, padding included
BATCH_FRAMES = 256  # answered together; keys and values take 9 MB per frame in DINOv2 small, float32
SETTINGS = ("max_new_tokens", "temperature", "seed", "top_k", "top_p", "mode")  # of an answer


class VideoChat:
    """A trained foveated model with its processor.

    Args:
        module: the model. Answers are computed in evaluation mode; after each call its parts have their former modes,
            so that training can go on. source: the run, checkpoint or export that it was loaded from. `save_pretrained`
            reads the configuration from there; without a source it uses the run that is training the module.
    """

    def __init__(self, module: FoveatedVLMModule, source: str | Path | None = None) -> None:
        self.module, self.source = module, source
        self._loaded = _row_settings(module)
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
        """Load a run folder, a checkpoint, an export or a folder of `save_pretrained`. Nothing in it is executed.

        Args:
            dtype: as in transformers: "auto" for the dtype of the saved weights (float32 for a run), or a dtype or its
                name, such as torch.bfloat16 or "bfloat16".

        Raises:
            FileNotFoundError, ValueError: The model does not exist, is damaged or is of another kind; or the dtype does
                not exist.
        """
        target_device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module: Any = load_module(
            path, map_location=target_device, expected=FoveatedVLMModule, trust=tuple(trust), dtype=dtype
        )
        return cls(module, path)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, tokenizer, chat template, processor and the model's current weights in the hub's layout,
        as `keygrip export` does.

        Raises:
            FileExistsError: The folder holds something. ValueError: The model's configuration is unknown or no longer
                matches the weights or the collator, or weights are not finite or have several dtypes.
        """
        if changed := [name for name, value in _row_settings(self.module).items() if value != self._loaded[name]]:
            raise ValueError(
                f"save_pretrained: collator.{changed[0]} was {self._loaded[changed[0]]!r} when the model was loaded "
                f"and is {getattr(self.module.collator, changed[0])!r} now, which the configuration beside the weights "
                "does not say: set it back, or train with it"
            )
        weights = self.module.state_dict()
        if len(kinds := dtypes_of(self.module, weights)) > 1:
            raise ValueError(
                f"save_pretrained: the weights are of {' and '.join(sorted(map(str, kinds)))}, and a saved model is "
                "loaded in one type: bring all into one, chat.module.to(torch.bfloat16)"
            )
        content, origin = self._described(weights)
        files, facts = self.module.export_files()
        content[WEIGHTS_ARE] = origin
        card = model_card(Path(folder).name, content, weights, origin, {}, self.module)
        return write_export(folder, content, weights, card, files=files, facts=facts)

    def _described(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
        """Return the contents of an export besides the weights, and a description of which weights they are."""
        if self.source is None:
            try:
                trainer = self.module.trainer
            except RuntimeError as error:  # Lightning raises this for a module without a trainer
                raise ValueError(
                    "save_pretrained: this model's configuration is not known; load it with from_pretrained, or give "
                    "VideoChat the source that it is from"
                ) from error
            refuse_unfit_weights(weights, weights, "the model")
            return run_content(trainer, self.module), "of the last step"
        content = read_checkpoint(self.source)
        saved = [weights_of(content, use_ema) for use_ema in (True, False)]
        stored = saved[0][0]
        mismatched = sorted(
            name
            for name in weights.keys() | stored.keys()
            if name not in weights or name not in stored or weights[name].shape != stored[name].shape
        )
        if mismatched:
            raise ValueError(
                f"save_pretrained: {', '.join(mismatched[:3])} of this model and of {self.source} differ in name or "
                "shape: the configuration there does not build this model"
            )
        refuse_unfit_weights(weights, stored, "the model")
        self.module.on_save_checkpoint(content)
        origin = next((origin for state, origin in saved if _equal_weights(weights, state)), "changed after that step")
        rounded = map(str, dtypes_of(self.module, weights) - dtypes_of(self.module, stored))
        return content, ", as ".join([origin, *(name.removeprefix("torch.") for name in rounded)])

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
        """Answer one conversation, or several together in batches.

        Images and videos before the text of the first user's message are placed where training placed them. Others stay
        where they are in the text, which does not occur in training. Several visuals have no common time; a clock of
        seconds (`frame_clock`) then counts their frames.

        Args:
            temperature, seed, top_k, top_p: how tokens are chosen, see `Sampling`. Each conversation is sampled as if
                it were alone: repeated conversations have the same answer. For several answers to one, give `samples`.
            mode: how the model attends to videos; None: as at inference. Images or videos in several places, or after
                text, are read one after the other; this requires the foveated model in a mode of `STREAMED_MODES`.
            batch_frames: maximum number of frames decoded and answered at a time. A conversation with more frames is
                answered alone. Each sample counts the frames of its conversation.
            left_out: conversations with an invalid form, unreadable files or too much content are added here, by number
                with the reason; their answers are "" (for each sample). None: the first such conversation raises.
            samples: number of answers sampled for each conversation, returned as a list. The first is the answer
                without `samples`, the others are sampled with `seed` + 1, `seed` + 2, ... None: one answer, no list.

        Raises:
            ValueError, FileNotFoundError: as in `check`, before anything is decoded; as in `PromptReader.read`; as in
                `Sampling`; several samples are requested without sampling, no new token, or a value is not a list.
            TypeError: An unknown setting is given.
        """
        refuse_settings(others, (*SETTINGS, "samples", "batch_frames", "left_out"), "VideoChat.generate")
        sampling = Sampling(temperature, seed, top_k, top_p)
        count = checked_samples(samples, sampling)
        check_count(max_new_tokens)
        check_count(batch_frames, "batch_frames")
        refuse_message(conversations)
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        talks: Any = conversations if several else [conversations]
        attention_mode = mode or self.module.answer_mode
        unfit: dict[int, str] = {}
        for index, messages in enumerate(talks):
            try:
                self.check(messages, attention_mode)
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                unfit[index] = str(error)
        answers: list[list[str]] = [[""] * count for _ in talks]
        waiting: list[tuple[int, Prompt, int]] = []  # with the number of tokens of its text

        def answer_waiting() -> None:
            prompts = [prompt for _, prompt, _ in waiting]
            with evaluating(self.module.network):
                generated = (
                    self._together(prompts, max_new_tokens, sampling, attention_mode, count, batch_frames)
                    if prompts
                    else []
                )
            for (index, _, _), texts in zip(waiting, generated, strict=True):
                answers[index] = texts
            waiting.clear()

        for index, messages in enumerate(talks):
            if index in unfit:
                continue
            try:
                prompt = self._read(messages)
                text = self._check_room(prompt, max_new_tokens)
                if not prompt.at_training_place:
                    session, ids = self._read_in_parts(prompt, attention_mode)
                    for sample in range(count):
                        generated = session.tokens(ids, max_new_tokens, sampling.of(sample))
                        answers[index][sample] = "".join(pieces(self.module.tokenizer, generated))
                    continue
            except (ValueError, OSError) as error:
                if left_out is None:
                    raise
                unfit[index] = str(error)
                continue
            grown = [*waiting, (index, prompt, text)]
            longest = max(tokens for _, _, tokens in grown)
            if _parallel_repeats([each for _, each, _ in grown], longest, batch_frames) < count:
                answer_waiting()
            waiting.append((index, prompt, text))
        answer_waiting()
        if left_out is not None:
            left_out.update(sorted(unfit.items()))
        result: list[Any] = answers if samples is not None else [texts[0] for texts in answers]
        return result if several else result[0]

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
        """Return a session for a question (a text) about live video: `push(frame)`, and `answer()` at any time. For a
        conversation (a list of messages), yield pieces of the answer while it is generated.

        Args:
            max_new_tokens, temperature, seed, top_k, top_p: for the answer to a conversation, as in `generate`; for a
                session, give them to its `answer`. seconds, answer_tokens: for a session, see `VideoStream`.

        Raises:
            ValueError: for a question as in `FoveatedVLMModule.stream`, for a conversation as in `generate`, or an
                argument belongs to the other use. FileNotFoundError: as in `generate`. TypeError: An unknown setting is
                given.
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
        attention_mode = mode or self.module.answer_mode
        self.check(messages, attention_mode, streamed=True)
        prompt = self._read(messages)
        self._check_room(prompt, max_new_tokens)
        return self._streamed(prompt, max_new_tokens, sampling, attention_mode)

    def check(self, messages: Sequence[Message], mode: str, streamed: bool = False) -> None:
        """Check a conversation without decoding anything.

        Args:
            mode: how the model attends to the videos. streamed: the conversation is read part by part, as in `stream`.

        Raises:
            ValueError, FileNotFoundError: as in `keygrip.inference.prompts.check`; the network does not have the mode
                or cannot read the conversation in it; several images or videos for a model that receives frame times.
        """
        turns, network = check(messages), self.module.network
        if mode not in network.modes:
            raise ValueError(f"mode={mode}: {type(network).__name__} has {', '.join(network.modes)}")
        refuse_several_times(turns, self.module.collator.timestamps)
        if at_training_place(turns) and not streamed:
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
        """Return the number of text tokens. Raises ValueError if text, frames and answer exceed the context."""
        text = sum(len(part) for part in parts_in_order(prompt, self.module.collator) if isinstance(part, list))
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
        """Return `samples` answers to each prompt, computing as many at a time as the limits allow."""
        module = self.module
        padded, counts = self.reader.join_frames(prompts)
        frames = module.as_input(padded.reshape(-1, *padded.shape[2:]))[0].unflatten(0, padded.shape[:2])
        seconds = [() if prompt.seconds is None else prompt.seconds for prompt in prompts]  # (): frames are numbered
        texts = [module.collator.prompt(prompt.words, prompt.seconds) for prompt in prompts]
        parallel_samples = max(1, _parallel_repeats(prompts, max(len(text.ids) for text in texts), batch_frames))
        # encoded once for all parts
        kv = encoded(module.network, frames, counts) if samples > parallel_samples else None
        answers: list[list[str]] = [[] for _ in prompts]
        for first in range(0, samples, parallel_samples):
            sample_indices = range(first, min(first + parallel_samples, samples))
            rows = [row for row in range(len(texts)) for _ in sample_indices]
            generated = generate(
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
                [sample for _ in texts for sample in sample_indices],
            )
            for row, text in zip(rows, generated.texts, strict=True):
                answers[row].append(text)
        return answers

    def _streamed(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling, mode: str) -> Iterator[str]:
        session, ids = self._read_in_parts(prompt, mode)
        yield from pieces(self.module.tokenizer, session.tokens(ids, max_new_tokens, sampling))

    def _read_in_parts(self, prompt: Prompt, mode: str) -> tuple[StreamingSession, list[int]]:
        """Return a session that has read a conversation up to its last text, and the ids of that text."""
        module = self.module
        session = StreamingSession(module.network, module.tokenizer, mode)
        parts = parts_in_order(prompt, module.collator)
        # Several visuals have no common time: their frames are numbered, as such images are in training.
        times = iter(prompt.times if prompt.seconds is not None else [[None] * len(each) for each in prompt.times])
        for part in parts[:-1]:
            if isinstance(part, list):
                session.read(part)
            else:
                for frame, second in zip(module.as_input(part)[0], next(times), strict=True):
                    session.push(frame, second)
        assert isinstance(parts[-1], list)
        return session, parts[-1]


def _row_settings(module: FoveatedVLMModule) -> dict[str, Any]:
    """Return the settings that determine a conversation's row and that are also in a run's configuration."""
    collator = module.collator
    return {"system": collator.system, "prompt_order": collator.prompt_order, "timestamps": collator.timestamps}


def checked_samples(samples: int | None, sampling: Sampling) -> int:
    """Return how many answers are sampled for each conversation. Raises ValueError if the number is invalid, nothing is
    sampled, or there are not enough seeds."""
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


def _parallel_repeats(prompts: Sequence[Prompt], longest: int, batch_frames: int) -> int:
    """Return how often prompts can be answered together; 0: not even once. longest: tokens of the longest text."""
    frames, rows = padded_frames(prompts), len(prompts)
    by_frames = batch_frames // frames if frames else BATCH_ROWS
    return min(by_frames, BATCH_TEXT // max(1, longest * rows), BATCH_ROWS // rows)


def _equal_weights(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Return whether the weights are the stored ones, possibly rounded to another dtype."""
    return all(torch.equal(value.cpu(), stored[name].to(value.dtype)) for name, value in weights.items())
