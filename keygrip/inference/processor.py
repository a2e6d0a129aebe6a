"""The processor of an exported video-language model, as transformers' AutoProcessor reads it.

    from keygrip.inference.processor import KeygripProcessor
    processor = KeygripProcessor.from_pretrained(FOLDER)  # of `keygrip export` or `VideoChat.save_pretrained`
    inputs = processor([{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                     {"type": "text", "text": "What happens?"}]}])

Nothing in a folder is executed. Importing this module also registers the processor, so that
`AutoProcessor.from_pretrained(FOLDER)` reads an export. But transformers itself decides what kind of processor a folder
holds: from a folder that only resembles an export it may load other classes, or ask on the terminal whether to execute
code from the folder. For untrusted folders, use `KeygripProcessor.from_pretrained` as above.

The ids and frames are the same as those that `VideoChat` gives its model. The model itself is keygrip's
(`keygrip.load`): transformers has no class for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    BatchFeature,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from keygrip.data.bad_samples import BadSample
from keygrip.data.batches import normalised
from keygrip.data.untrusted_files import read_json
from keygrip.data.video_text.conversations import frame_settings
from keygrip.exporting.folder import CONFIG
from keygrip.inference.prompts import (
    Message,
    PromptReader,
    check,
    mark_media,
    parts_in_order,
    refuse_message,
    refuse_several_times,
)
from keygrip.models.foveated_vlm.conversations import ConversationCollator, EncodedText, text_columns
from keygrip.models.foveated_vlm.hub_files import MODEL_TYPE
from keygrip.models.language import PromptOrder
from keygrip.models.language.hub import checked_tokenizer, file_of, from_pretrained
from keygrip.models.language.tokenizers import ChatTokenizer, PretrainedTokenizer

PROCESSOR_CONFIG = "processor_config.json"
WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")  # options of `from_pretrained`


class KeygripConfig(PretrainedConfig):
    """Configuration under which the processor is registered: `model_type` of an export's config.json."""

    model_type = MODEL_TYPE


class KeygripProcessor(ProcessorMixin):
    """Convert conversations with images and videos to inputs of a network.

    Args:
        tokenizer: with a chat template. image_size, fit, max_frames, image_frames: see `PromptReader`.
        image_mean, image_std: [3], of pixels in 0-1.
        prompt_order, system, timestamps: see `ConversationCollator`.
        chat_template: transformers passes the tokenizer's own; stored for `save_pretrained`.

    Raises:
        ValueError: A setting is invalid.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int,
        fit: str,
        max_frames: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        prompt_order: PromptOrder,
        system: str | None = None,
        timestamps: bool = False,
        chat_template: str | None = None,
        image_frames: int = 1,
    ) -> None:
        frame_settings(image_size, fit, max_frames, image_frames)
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            is_numeric = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
            if not is_numeric or len(values) != 3 or (name == "image_std" and not all(value > 0 for value in values)):
                raise ValueError(f"{name}={values!r}: must be three numbers, those of image_std above 0")
        if not isinstance(timestamps, bool):
            raise ValueError(f"timestamps={timestamps!r}: must be true or false")
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_size, self.fit, self.max_frames = image_size, fit, max_frames
        self.image_frames = image_frames
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.prompt_order, self.system, self.timestamps = prompt_order, system, timestamps

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:  # type: ignore[override]
        """Load the processor as transformers does, but check the tokenizer and its files; no code of the folder is
        executed.

        Raises:
            ValueError: see `keygrip.models.language.tokenizer_json.parse_tokenizer`. Also: a setting is invalid, or the
                folder needs Python code of its own, names an audio tokenizer or has no processor.
        """
        source = str(pretrained_model_name_or_path)
        if options.pop("trust_remote_code", None):
            raise ValueError("trust_remote_code: keygrip executes no code of a folder or the hub, leave it out")
        location = {name: options[name] for name in WHERE if name in options}
        if Path(source).is_dir() and file_of(source, PROCESSOR_CONFIG, **location) is None:
            raise ValueError(
                f"{source} holds no {PROCESSOR_CONFIG}: it is no export of a video-language model; make one with "
                "`keygrip export checkpoint=RUN to=FOLDER` or `VideoChat.save_pretrained`"
            )
        _refuse_audio_tokenizer(source, location)
        loader = super()  # super() without arguments does not work inside the lambda
        vocabulary = _read_vocabulary_size(pretrained_model_name_or_path)
        processor: Self = checked_tokenizer(
            lambda: from_pretrained(loader, source, **options), source, vocabulary, **location
        )
        return processor

    def __call__(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        *,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> BatchFeature:
        """Return the inputs for answering one conversation or several.

        Args:
            images, text, videos: arguments of transformers' processors; refused, because images and videos are part of
                the conversations here. return_tensors: "pt"; None and "auto" have the same effect.
            others: further arguments of transformers' processors. Accepted only if they request what is done anyway
                (`DONE`): `padding=True`.

        Returns:
            input_ids int64 [B, T] up to the beginning of the assistant's answer, attention_mask bool [B, T] (padded on
            the right), pixel_values float32 [B, F, 3, S, S] (frames in reading order), frame_counts [B], and for each
            conversation: visuals, for each image or video (number of tokens before it, number of its frames), in
            reading order; and seconds, the times of its frames, or None for several images or videos. Also visual_at
            [B] (number of tokens before all visual ones), unless a conversation has visuals in several places or after
            the first user's words: the network reads such conversations part by part (`StreamingSession`), as
            `VideoChat` does.

        Raises:
            ValueError: as in `PromptReader.read` or `refuse_several_times`, or an argument is refused.
            FileNotFoundError: An image or a video does not exist.
        """
        if (
            conversations is None
            or isinstance(conversations, str)
            or any(each is not None for each in (images, text, videos))
        ):
            raise ValueError(
                "text=, images= and videos= are not taken: give conversations with both in them, processor([{'role': "
                "'user', 'content': [{'type': 'video', 'video': 'a.mp4'}, {'type': 'text', 'text': 'What happens?'}]}])"
            )
        _check_tensors(return_tensors)
        _refuse_unsupported(others, "processor(conversations)", ("return_tensors",))
        refuse_message(conversations)
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        talks: Any = conversations if several else [conversations]
        for talk in talks:
            refuse_several_times(check(talk), self.timestamps)
        reader = PromptReader(self.image_size, self.fit, self.max_frames, self.image_frames)
        prompts = [reader.read(talk).placed(self.prompt_order) for talk in talks]
        collator = ConversationCollator(
            PretrainedTokenizer(self.tokenizer.name_or_path),
            self.prompt_order,
            "answers",
            system=self.system,
            timestamps=self.timestamps,
        )
        collator.tokenizer = ChatTokenizer(self.tokenizer)
        texts, visuals = zip(*(_join_parts(parts_in_order(prompt, collator)) for prompt in prompts), strict=True)
        columns = text_columns(texts)
        frames, counts = reader.join_frames(prompts)
        inputs = {
            "input_ids": columns["input_ids"],
            "attention_mask": columns["attention_mask"],
            "pixel_values": normalised(
                torch.from_numpy(frames).permute(0, 1, 4, 2, 3), self.image_mean, self.image_std
            ),
            "frame_counts": torch.tensor(counts),
            "visuals": list(visuals),
            "seconds": [prompt.seconds for prompt in prompts],
        }
        if all(prompt.at_training_place for prompt in prompts):
            inputs["visual_at"] = torch.tensor(columns["visual_at"])
        return BatchFeature(inputs)

    def apply_chat_template(  # type: ignore[override]  # what has no meaning here is not taken
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> Any:
        """Render a conversation with the chat template, including the system turn that `__call__` adds. Images and
        videos become <image> and <video>. With `tokenize` return the result of `__call__`, without `return_dict` only
        the ids.

        The rendered text contains no times of frames (`timestamps`), which are known only after a video is decoded.

        Raises:
            ValueError: as in `__call__`, or ids are requested without the beginning of an answer. When rendered as
                text, a conversation may end with an answer if no new answer follows, and files need not exist.
        """
        _check_tensors(return_tensors)
        supported = ("tokenize", "add_generation_prompt", "return_dict", "return_tensors")
        inner = others.pop("processor_kwargs", None) or {}  # transformers' name for those of `__call__`
        _refuse_unsupported({**others, **inner}, "apply_chat_template", supported)
        if not tokenize:
            refuse_message(conversation)
            several = bool(conversation) and not isinstance(conversation[0], Mapping)
            talks: Any = conversation if several else [conversation]
            for talk in talks:
                mark_media(talk, answering=add_generation_prompt)
            tokenizer = ChatTokenizer(self.tokenizer)
            texts = [
                tokenizer.render_messages(_without_image_objects(self._with_system(talk)), add_generation_prompt)
                for talk in talks
            ]
            return texts if several else texts[0]
        if not add_generation_prompt:
            raise ValueError("ids end where the assistant begins to speak: add_generation_prompt=True")
        inputs = self(conversation)
        return inputs if return_dict else inputs["input_ids"]

    def _with_system(self, talk: Sequence[Message]) -> Sequence[Message]:
        """Add the system turn as `ConversationCollator.with_system`. The exported template does the same, but the
        template of an earlier export, or of an export with another system turn, does not."""
        if self.system is None or (talk and talk[0].get("role") == "system"):
            return talk
        return [{"role": "system", "content": self.system}, *talk]


def _join_parts(parts: Sequence[list[int] | np.ndarray]) -> tuple[EncodedText, list[tuple[int, int]]]:
    """Return the text of a conversation and, for each image or video, (number of tokens before it, number of frames).

    Args:
        parts: token ids and frames in reading order; the text before visuals at the training place comes first.
    """
    ids: list[int] = []
    visuals: list[tuple[int, int]] = []
    for part in parts:
        if isinstance(part, list):
            ids += part
        else:
            visuals.append((len(ids), len(part)))
    before = len(parts[0]) if isinstance(parts[0], list) else 0
    nothing = [False] * len(ids)
    return EncodedText(ids, nothing, nothing, before, len(ids)), visuals


def _without_image_objects(talk: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a checked conversation without image objects: a foreign template could call methods that write files."""

    def shown(item: Mapping[str, Any]) -> dict[str, str]:
        return {"type": str(item["type"])} | ({"text": str(item["text"])} if item["type"] == "text" else {})

    contents = [(message["role"], message["content"]) for message in talk]
    return [
        {"role": role, "content": content if isinstance(content, str) else [shown(item) for item in content]}
        for role, content in contents
    ]


def _read_vocabulary_size(folder: str | os.PathLike[str]) -> int | None:
    """Return the vocabulary size of the model that the folder's config.json describes; None: it has none."""
    file = Path(folder) / CONFIG
    try:
        content = read_json(file) if file.is_file() else None
    except BadSample:
        return None  # transformers needs the file and reports the error
    size = content.get("vocab_size") if isinstance(content, dict) else None
    return size if type(size) is int else None


def _refuse_audio_tokenizer(source: str, location: Mapping[str, Any]) -> None:
    """Raise ValueError if an audio tokenizer is named. transformers would load it, with a class and from a location
    chosen by the folder, without asking whether code may be executed."""
    naming_file = file_of(source, "audio_tokenizer_config.json", **location)
    if (file := file_of(source, PROCESSOR_CONFIG, **location)) is not None:
        try:
            content = read_json(file)
        except BadSample as error:
            raise ValueError(f"{file} is damaged or no configuration ({error})") from error
        naming_file = naming_file or (file if isinstance(content, dict) and "audio_tokenizer" in content else None)
    if naming_file:
        raise ValueError(f"{naming_file} names an audio tokenizer, which no processor of keygrip has")


def _check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in ("pt", "auto", None):  # "auto": transformers' default for conversations
        raise ValueError(f"return_tensors={return_tensors!r}: inputs are PyTorch's tensors, give 'pt' or leave it out")


# Arguments of transformers' processors with the values that request what this processor does anyway.
DONE: dict[str, tuple[Any, ...]] = {
    "padding": (True, "longest"),
    "padding_side": ("right",),
    "truncation": (False, "do_not_truncate"),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "return_attention_mask": (True,),
    "return_assistant_tokens_mask": (False,),
    "load_audio_from_video": (False,),
    "sanitize_control_tokens": (False,),  # the default; ids never contain control tokens that words spell
}
REASONS = {
    "padding": "rows are padded on the right to the longest of them",
    "truncation": "no conversation is cut off: give less text, or fewer frames",
    "continue_final_message": "an answer begins anew behind a user's message: leave the last answer out",
}


def _refuse_unsupported(arguments: Mapping[str, Any], call: str, named: Sequence[str]) -> None:
    """Raise ValueError if an argument of transformers' processors requests something that is not done here."""
    for name, value in arguments.items():
        # 1 equals True, but transformers does not accept it as padding
        if value is None or any(type(value) is type(done) and value == done for done in DONE.get(name, ())):
            continue
        accepted = [f"{key}={done[0]!r}" for key, done in DONE.items()]
        reason = f" ({REASONS[name]})" if name in REASONS else ""
        raise ValueError(
            f"{call}: {name}={str(value)[:60]} is not taken{reason}; there are {', '.join(named)}, and what is done "
            f"anyway: {', '.join(accepted)}"
        )


AutoConfig.register(MODEL_TYPE, KeygripConfig, exist_ok=True)
AutoProcessor.register(KeygripConfig, KeygripProcessor, exist_ok=True)
