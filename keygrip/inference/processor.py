"""The processor of an exported video-language model, as transformers' AutoProcessor reads it.

    from keygrip.inference.processor import KeygripProcessor
    processor = KeygripProcessor.from_pretrained(FOLDER)  # of `keygrip export` or `VideoChat.save_pretrained`
    inputs = processor([{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                     {"type": "text", "text": "What happens?"}]}])

Nothing in a folder is executed. Importing this module also registers the processor, so that
`AutoProcessor.from_pretrained(FOLDER)` reads an export; but what kind of processor a folder holds transformers finds
out itself, and of a folder that only looks like an export it may load other classes, or ask on the terminal whether to
execute code that lies in it: the line above is the one for folders of others.

Ids and frames are those that `VideoChat` gives its model. The model itself is keygrip's (`keygrip.load`): transformers
has no class for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

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
from keygrip.inference.prompts import Message, PromptReader, check, marked, refuse_message
from keygrip.models.foveated_vlm.conversations import ConversationCollator, PromptOrder, text_columns
from keygrip.models.foveated_vlm.hub_files import MODEL_TYPE
from keygrip.models.language.hub import checked_tokenizer, file_of, from_pretrained
from keygrip.models.language.tokenizers import ChatTokenizer, PretrainedTokenizer

WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")  # options of `from_pretrained`


class KeygripConfig(PretrainedConfig):
    """Under which the processor is registered: `model_type` of an export's config.json."""

    model_type = MODEL_TYPE


class KeygripProcessor(ProcessorMixin):
    """Conversations with images and videos as inputs of a network.

    Args:
        tokenizer: with a chat template. image_size, fit, max_frames, image_frames: see `PromptReader`.
        image_mean, image_std: [3], of pixels in 0-1.
        prompt_order, system, timestamps: see `ConversationCollator`.
        chat_template: transformers hands over the tokenizer's own; kept for `save_pretrained`.

    Raises:
        ValueError: settings that cannot be.
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
            numbers = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
            if not numbers or len(values) != 3 or (name == "image_std" and not all(value > 0 for value in values)):
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
        """As of transformers, with the tokenizer and its files checked; no code of the folder's is executed.

        Raises:
            ValueError: see `keygrip.models.language.tokenizer_json.parse_tokenizer`; settings that cannot be; the
                folder needs Python code of its own, or names an audio tokenizer.
        """
        source = str(pretrained_model_name_or_path)
        if options.pop("trust_remote_code", None):
            raise ValueError("trust_remote_code: keygrip executes no code of a folder or the hub, leave it out")
        where = {name: options[name] for name in WHERE if name in options}
        _refuse_audio_tokenizer(source, where)
        loader = super()  # which has no meaning in a function within this one
        vocabulary = _vocabulary(pretrained_model_name_or_path)
        found: Self = checked_tokenizer(lambda: from_pretrained(loader, source, **options), source, vocabulary, **where)
        return found

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
        """Inputs for the answers to a conversation, or to several.

        Args:
            images, text, videos: what transformers' processors also take; refused, for images and videos belong into
                conversations here. return_tensors: "pt"; None gives the same.
            others: what transformers' processors also take, where it says what is done anyway (`DONE`): `padding=True`.

        Returns:
            input_ids int64 [B, T] up to where the assistant begins to speak, attention_mask bool [B, T] (padded on the
            right), visual_at [B] (tokens before the visual ones), pixel_values float32 [B, F, 3, S, S], frame_counts
            [B], and seconds: for each conversation when its frames were taken, or None where that is not known.

        Raises:
            ValueError: as `PromptReader.read`, images and videos elsewhere than before the first user's words, or an
                argument that is refused. FileNotFoundError: an image or a video is not there.
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
        _refuse_others(others, "processor(conversations)", ("return_tensors",))
        refuse_message(conversations)
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        talks: Any = conversations if several else [conversations]
        for talk in talks:
            check(talk)
        reader = PromptReader(self.image_size, self.fit, self.max_frames, self.image_frames)
        prompts = [reader.read(talk) for talk in talks]
        if not all(prompt.at_its_place for prompt in prompts):
            raise ValueError(
                "images and videos of a row stand before the first user's words; elsewhere, and in several places, "
                "they are read part by part: VideoChat.generate does so"
            )
        collator = ConversationCollator(
            PretrainedTokenizer(self.tokenizer.name_or_path),
            self.prompt_order,
            "answers",
            system=self.system,
            timestamps=self.timestamps,
        )
        collator.tokenizer = ChatTokenizer(self.tokenizer)
        columns = text_columns([collator.prompt(prompt.words, prompt.seconds) for prompt in prompts])
        frames, counts = reader.together(prompts)
        return BatchFeature(
            {
                "input_ids": columns["input_ids"],
                "attention_mask": columns["attention_mask"],
                "visual_at": torch.tensor(columns["visual_at"]),
                "pixel_values": normalised(
                    torch.from_numpy(frames).permute(0, 1, 4, 2, 3), self.image_mean, self.image_std
                ),
                "frame_counts": torch.tensor(counts),
                "seconds": [prompt.seconds for prompt in prompts],
            }
        )

    def apply_chat_template(  # type: ignore[override]  # what has no meaning here is not taken
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> Any:
        """A conversation in the chat template with <image> and <video> where they are said, and with the system turn
        that `__call__` gives it; with `tokenize` what `__call__` gives, without `return_dict` the ids alone.

        The rendered text holds no times of frames (`timestamps`): they are known when a video is decoded.

        Raises:
            ValueError: as `__call__`, or ids are asked for without the beginning of an answer. Rendered as text, a
                conversation may end with an answer where none is to begin, and no file is looked for.
        """
        _check_tensors(return_tensors)
        named = ("tokenize", "add_generation_prompt", "return_dict", "return_tensors")
        inner = others.pop("processor_kwargs", None) or {}  # where transformers has those of `__call__`
        _refuse_others({**others, **inner}, "apply_chat_template", named)
        if not tokenize:
            refuse_message(conversation)
            several = bool(conversation) and not isinstance(conversation[0], Mapping)
            talks: Any = conversation if several else [conversation]
            for talk in talks:
                marked(talk, answering=add_generation_prompt)
            tokenizer = ChatTokenizer(self.tokenizer)
            said = [tokenizer.render_messages(_plain(self._with_system(talk)), add_generation_prompt) for talk in talks]
            return said if several else said[0]
        if not add_generation_prompt:
            raise ValueError("ids end where the assistant begins to speak: add_generation_prompt=True")
        inputs = self(conversation)
        return inputs if return_dict else inputs["input_ids"]

    def _with_system(self, talk: Sequence[Message]) -> Sequence[Message]:
        """As `ConversationCollator.with_system`. The exported template does it too; one of an earlier export, or of
        another system turn than this processor's, does not."""
        if self.system is None or (talk and talk[0].get("role") == "system"):
            return talk
        return [{"role": "system", "content": self.system}, *talk]


def _plain(talk: Sequence[Message]) -> list[dict[str, Any]]:
    """A checked conversation as a template of somebody else's may see it: no image, whose methods would write files."""

    def shown(item: Mapping[str, Any]) -> dict[str, str]:
        return {"type": str(item["type"])} | ({"text": str(item["text"])} if item["type"] == "text" else {})

    contents = [(message["role"], message["content"]) for message in talk]
    return [
        {"role": role, "content": content if isinstance(content, str) else [shown(item) for item in content]}
        for role, content in contents
    ]


def _vocabulary(folder: str | os.PathLike[str]) -> int | None:
    """Tokens of the model that a folder's config.json describes; None: it has none."""
    file = Path(folder) / CONFIG
    try:
        content = read_json(file) if file.is_file() else None
    except BadSample:
        return None  # transformers, which needs it, says so
    found = content.get("vocab_size") if isinstance(content, dict) else None
    return found if type(found) is int else None


def _refuse_audio_tokenizer(source: str, where: Mapping[str, Any]) -> None:
    """Raises ValueError: one is named. transformers would load it, by a class and from a place of the folder's choice,
    without a word on what may be executed."""
    named = file_of(source, "audio_tokenizer_config.json", **where)
    if (file := file_of(source, "processor_config.json", **where)) is not None:
        try:
            content = read_json(file)
        except BadSample as error:
            raise ValueError(f"{file} is damaged or no configuration ({error})") from error
        named = named or (file if isinstance(content, dict) and "audio_tokenizer" in content else None)
    if named:
        raise ValueError(f"{named} names an audio tokenizer, which no processor of keygrip has")


def _check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in ("pt", None):
        raise ValueError(f"return_tensors={return_tensors!r}: inputs are PyTorch's tensors, give 'pt' or leave it out")


# Of what transformers' processors take, what says that to be done which is done here anyway.
DONE: dict[str, tuple[Any, ...]] = {
    "padding": (True, "longest"),
    "padding_side": ("right",),
    "truncation": (False, "do_not_truncate"),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "return_attention_mask": (True,),
}
REASONS = {
    "padding": "rows are padded on the right to the longest of them",
    "truncation": "no conversation is cut off: give less text, or fewer frames",
    "continue_final_message": "an answer begins anew behind a user's message: leave the last answer out",
}


def _refuse_others(others: Mapping[str, Any], what: str, named: Sequence[str]) -> None:
    """Raises ValueError: an argument of transformers' processors that asks for something else than what is done."""
    for name, value in others.items():
        # 1 equals True, and is no padding that transformers knows
        if value is None or any(type(value) is type(done) and value == done for done in DONE.get(name, ())):
            continue
        known = [f"{key}={done[0]!r}" for key, done in DONE.items()]
        reason = f" ({REASONS[name]})" if name in REASONS else ""
        raise ValueError(
            f"{what}: {name}={str(value)[:60]} is not taken{reason}; there are {', '.join(named)}, and what is done "
            f"anyway: {', '.join(known)}"
        )


AutoConfig.register(MODEL_TYPE, KeygripConfig, exist_ok=True)
AutoProcessor.register(KeygripConfig, KeygripProcessor, exist_ok=True)
