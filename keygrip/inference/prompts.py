"""Conversations from users, with their images and videos decoded, for `VideoChat` and `KeygripProcessor`.

They have the form that transformers' processors take: messages with a role and content. The content is text or a list
of {"type": "text" | "image" | "video"} items. An image or video is a path, a PIL image, a list of images or of their
paths (frames of a video), or an array uint8 [H, W, 3] or [F, H, W, 3], under the item's type, `path` or `url`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keygrip.data.batches import Turn
from keygrip.data.spacing import evenly
from keygrip.data.video_text.animations import animation_frames, frame_count
from keygrip.data.video_text.conversations import shown_image, whole_seconds
from keygrip.data.video_text.sample_types import pad_videos, repeat_image
from keygrip.data.video_text.video_files import SUFFIXES, is_animation, read_image, read_timed_frames
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.generation import refuse_half_characters
from keygrip.models.language import PromptOrder

ROLES = ("system", "user", "assistant")
# Further keys of a video in Qwen's messages. They choose frames, which the model's settings do here.
FRAMES_OF_IT = ("fps", "sample_fps", "nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end")
AS_IT_IS = {"fps": ("1", "1.0"), "sample_fps": ("1", "1.0"), "video_start": ("0", "0.0")}  # values without effect
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
EMBEDDED = re.compile(r"data:[^,]{0,100},", re.IGNORECASE)
LONGEST_SHOWN = 300  # characters of a path in an error
MARK = "\ue000"  # placeholder for an image or video in text that a template renders; removed from user text
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A conversation split into text and visuals.

    Attributes:
        turns: with a `MARK` in the text for each image or video. visuals: their frames, uint8 [F, S, S, 3].
        times: of each visual, the times of its frames; frames given as arrays or one by one count as one per second.
        before_text: number of visuals that come before all text, without a mark.
    """

    turns: tuple[Turn, ...]
    visuals: tuple[np.ndarray, ...]
    times: tuple[tuple[float, ...], ...]
    before_text: int = 0

    @property
    def seconds(self) -> tuple[float, ...] | None:
        """The times of all frames; None for several visuals, which have no common time."""
        if len(self.times) > 1:
            return None
        return self.times[0] if self.times else ()

    @property
    def at_training_place(self) -> bool:
        """See `at_training_place`."""
        return at_training_place(self.turns)

    def placed(self, prompt_order: PromptOrder) -> Prompt:
        """Return the prompt with the visuals before the first user's text moved to the position used in training
        (`encode_conversation`), also if further images or videos follow. The others keep their position in the text."""
        first = next((n for n, turn in enumerate(self.turns) if turn.role == "user"), None)
        if self.at_training_place or first is None:
            return self
        text = self.turns[first].text
        stripped = text.lstrip(MARK)
        leading = len(text) - len(stripped)
        end = len(stripped.rstrip(MARK + string.whitespace))  # end of its text
        if not leading or not end:
            return self
        if prompt_order == "visual_first":
            turn, order = Turn("user", stripped), list(range(len(self.visuals)))
        else:
            passed = leading + stripped[:end].count(MARK)
            turn = Turn("user", f"{stripped[:end]}{MARK * leading}{stripped[end:]}")
            order = [*range(leading, passed), *range(leading), *range(passed, len(self.visuals))]
        return Prompt(
            (*self.turns[:first], turn, *self.turns[first + 1 :]),
            tuple(self.visuals[n] for n in order),
            tuple(self.times[n] for n in order),
            leading if prompt_order == "visual_first" else 0,
        )

    @property
    def words(self) -> tuple[Turn, ...]:
        """The turns without marks, otherwise unchanged."""
        return tuple(Turn(turn.role, turn.text.replace(MARK, "")) for turn in self.turns)


class PromptReader:
    """Decode the images and videos of conversations with the settings that the model was trained with.

    Args:
        image_size: S, of square frames. fit: see `fit_image`. max_frames: a longer video is reduced to that many
            evenly spaced frames. image_frames: a single image without other visuals is repeated as that many frames.
    """

    def __init__(self, image_size: int, fit: str, max_frames: int, image_frames: int = 1) -> None:
        self.image_size, self.fit, self.max_frames = image_size, fit, max_frames
        self.image_frames = image_frames

    def read(self, messages: Sequence[Message]) -> Prompt:
        """Decode the images and videos of a conversation.

        Raises:
            ValueError: as in `check`, or an image or a video cannot be decoded. FileNotFoundError: as in `check`.
        """
        turns, visuals = mark_media(messages)
        decoded = [self._frames(content, kind) for kind, content in visuals]
        if len(decoded) == 1:
            decoded = [repeat_image(*decoded[0], self.image_frames)]
        return Prompt(turns, tuple(frames for frames, _ in decoded), tuple(seconds for _, seconds in decoded))

    def join_frames(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, list[int]]:
        """Concatenate the frames of each prompt, uint8 [B, F, S, S, 3], padded at the end with black frames. Also
        return the number of frames of each prompt."""
        none = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        videos = [np.concatenate([none, *prompt.visuals]) for prompt in prompts]
        return pad_videos(videos), [len(video) for video in videos]

    def _frames(self, content: Any, kind: str) -> tuple[np.ndarray, tuple[float, ...]]:
        if isinstance(content, str | Path):
            if kind == "video":
                return read_timed_frames(content, self.image_size, self.fit, self.max_frames)
            if (found := self._read_one_image(Path(content))) is None:
                raise ValueError(f"{content} is a folder, a video or an animation, and no image: give it as a video")
            return found, (0.0,)
        if isinstance(content, Image.Image) and (count := frame_count(content)) > 1:
            if kind == "image":
                raise ValueError(f"an image of {count} frames: give it as a video")
            return animation_frames(
                content, self.image_size, self.fit, lambda length: evenly(whole_seconds(length), self.max_frames)
            )
        if _is_path_list(content):
            return self._still_files(content, kind)
        frames = _still_frames(content, kind)
        if kind == "image" and len(frames) > 1:
            raise ValueError(f"an image of {len(frames)} frames: give them as a video")
        indices = evenly(len(frames), self.max_frames)
        images = [frames[n] if isinstance(frames[n], Image.Image) else Image.fromarray(frames[n]) for n in indices]
        fitted = np.stack([shown_image(image, self.image_size, self.fit) for image in images])
        return fitted, tuple(map(float, indices))

    def _still_files(self, paths: Sequence[str | Path], kind: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """Read a video that is given as image files, one per frame."""
        if kind == "image" and len(paths) > 1:
            raise ValueError(f"an image of {len(paths)} frames: give them as a video")
        indices = evenly(len(paths), self.max_frames)
        images = []
        for path in (paths[n] for n in indices):
            if (frames := self._read_one_image(Path(path))) is None:
                raise ValueError(f"{path} is one of several frames, and no image: give a folder or a video alone")
            images.append(frames)
        return np.concatenate(images), tuple(map(float, indices))

    def _read_one_image(self, path: Path) -> np.ndarray | None:
        """Return [1, S, S, 3], or None for a folder, a video (however short) or an image file with several frames."""
        if path.is_file():
            try:
                several = is_animation(path)
            except ValueError:
                if path.suffix.lower() in SUFFIXES:
                    raise
            else:
                return None if several else read_image(path, self.image_size, self.fit)[None]
        read_timed_frames(path, self.image_size, self.fit, 1)  # raises an error if it is no video either
        return None


def _is_path_list(content: Any) -> bool:
    return isinstance(content, list | tuple) and bool(content) and all(isinstance(each, str | Path) for each in content)


def _still_frames(content: Any, kind: str) -> Sequence[Image.Image] | np.ndarray:
    """Return an item that is no path as PIL images or arrays uint8 [H, W, 3]. Raises ValueError for any other type."""
    if isinstance(content, Image.Image):
        return [content]
    if isinstance(content, Sequence) and content and all(isinstance(each, Image.Image) for each in content):
        if animated := next((each for each in content if frame_count(each) > 1), None):
            raise ValueError(f"one of several images has {frame_count(animated)} frames itself: give it alone")
        return content
    try:
        array = np.asarray(content)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor with gradients, frames of different sizes
        raise ValueError(f"an item of type {kind} is no array: {error}") from error
    if array.dtype != np.uint8 or array.shape[-1:] != (3,) or array.ndim not in (3, 4) or not array.size:
        raise ValueError(
            f"an item of type {kind} is a path, a PIL image, a list of either, or uint8 [H, W, 3] or [F, H, W, 3]; not "
            f"{array.dtype} {list(array.shape)}"
        )
    return array[None] if array.ndim == 3 else array


def refuse_message(conversations: Any) -> None:
    """Raise ValueError if a value is not a list (but a message, a text, a generator, ...)."""
    if isinstance(conversations, str) or not isinstance(conversations, Sequence):
        raise ValueError(
            'a conversation is a list of messages: [{"role": "user", "content": ...}], and several are a list of such; '
            f"not {type(conversations).__name__}"
        )


def check(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Check a conversation without decoding anything. Return its turns, with a `MARK` for each image and video.

    Raises:
        ValueError: A role or item is unknown, or the conversation does not end with a user's turn that has text.
        FileNotFoundError: An image or a video does not exist.
    """
    turns, visuals = mark_media(messages)
    for _, content in visuals:
        for path in content if _is_path_list(content) else [content]:
            if isinstance(path, str | Path) and not _exists(path):
                raise FileNotFoundError(f"there is no video, image or folder at {str(path)[:LONGEST_SHOWN]}")
    return turns


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a path can be
        return False


def mark_media(messages: Sequence[Message], answering: bool = True) -> tuple[tuple[Turn, ...], list[tuple[str, Any]]]:
    """Return the turns of a conversation with a `MARK` for each image and video, and the visuals in order as (kind,
    content).

    Args:
        answering: an answer follows, so the conversation must end with a user's message that has text.

    Raises:
        ValueError: The conversation has another form or another end.
    """
    refuse_message(messages)
    turns: list[Turn] = []
    visuals: list[tuple[str, Any]] = []
    for number, message in enumerate(messages, 1):
        try:
            turns.append(_parse_turn(message, visuals))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    if not turns:
        raise ValueError("a conversation without a message: one to answer ends with a user's message")
    if not answering:
        return tuple(turns), visuals
    if turns[-1].role != "user":
        raise ValueError(
            "a conversation to answer ends with a user's message, and this one with that of the "
            f"{turns[-1].role}: leave it out"
        )
    if not turns[-1].text.replace(MARK, "").strip():
        raise ValueError("the last message has no words: say what is asked")
    return tuple(turns), visuals


def _parse_turn(message: Any, visuals: list[tuple[str, Any]]) -> Turn:
    """Convert a message to a turn and append its visuals to `visuals`. Raises ValueError if it has another form."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is no object but {str(message)[:80]!r}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"a message is from {str(role)[:80]!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str | list | tuple):
        raise ValueError(f"the content of a {role}'s message is {str(content)[:80]!r}: it is text or a list of items")
    pieces = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            pieces.append(item["text"].replace(MARK, ""))
        elif kind in ("image", "video") and role == "user":
            visuals.append((kind, _visual_content(item, kind)))
            pieces.append(MARK)
        else:
            raise ValueError(
                f"an item of a {role}'s message is {str(item)[:80]!r}; known are text, and of users image and video"
            )
    text = "".join(pieces)
    refuse_half_characters(text, f"a {role}'s message")
    return Turn(role, text)


def _visual_content(item: Mapping[str, Any], kind: str) -> Any:
    """Return the path, PIL image, list of them or array of an item. Raises ValueError if it has none, is an address, or
    selects frames itself."""
    content: Any = next((item[key] for key in (kind, "path", "url") if item.get(key) is not None), None)
    paths = [path for path in (content if _is_path_list(content) else [content]) if isinstance(path, str)]
    if content is None or not all(map(str.strip, paths)):  # an empty path would be the current folder
        raise ValueError(f"an item of type {kind} has none: give it under {kind}, path or url")
    if embedded := next(filter(EMBEDDED.match, paths), None):
        raise ValueError(
            f"{embedded[:40]!r}... holds a file in its own text: decode it and give a PIL image, an array or a path"
        )
    if address := next(filter(ADDRESS.match, paths), None):
        if address.lower().startswith("file:"):
            raise ValueError(f"{address[:80]!r} is the address of a local file: give its path, without file://")
        raise ValueError(f"{address[:80]!r} is an address, and nothing is fetched: download it and give its local path")
    options = {name: str(item[name]) for name in FRAMES_OF_IT if kind == "video" and item.get(name) is not None}
    options = {name: value for name, value in options.items() if value not in AS_IT_IS.get(name, ())}
    if options:
        listing = ", ".join(f"{name}={value[:20]}" for name, value in options.items())
        raise ValueError(
            f"a video with {listing}: of a video a frame per second is seen, from its beginning to its end, and of one "
            "longer than the model's max_frames so many evenly spaced; of several images each counts as one second: "
            "leave that out, and of a longer video give the part alone"
        )
    return content


def at_training_place(turns: Sequence[Turn]) -> bool:
    """Return whether all visuals are in the first user turn, before its text: the position used in training."""
    marks = [turn.text.count(MARK) for turn in turns]
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), 0)
    if not any(marks):
        return True
    return sum(marks) == marks[first] and turns[first].text.lstrip(MARK).count(MARK) == 0


def parts_in_order(prompt: Prompt, collator: ConversationCollator) -> list[list[int] | np.ndarray]:
    """Return token ids and frames (uint8 [F, S, S, 3], of one visual each) in reading order, of a prompt that is
    `placed`. The last element is token ids."""
    if prompt.at_training_place:
        text = collator.prompt(prompt.words, prompt.seconds)
        return [text.ids[: text.visual_at], *prompt.visuals, text.ids[text.visual_at :]]
    texts = collator.prompt_around(prompt.turns, MARK, prompt.seconds)
    parts: list[list[int] | np.ndarray] = [*prompt.visuals[: prompt.before_text], texts[0]]
    for visual, ids in zip(prompt.visuals[prompt.before_text :], texts[1:], strict=True):
        parts += [visual, ids]
    return parts


def refuse_several_times(turns: Sequence[Turn], timestamps: bool) -> None:
    """Raise ValueError if a model that receives the times of frames would get several images or videos."""
    if timestamps and sum(turn.text.count(MARK) for turn in turns) > 1:
        raise ValueError(
            "the model receives the times of frames (collator.timestamps=true), and several images or videos have no "
            "common time: ask about one at a time"
        )


def padded_frames(prompts: Sequence[Prompt]) -> int:
    """Return the number of frames of a batch of conversations, padding of shorter videos included."""
    return len(prompts) * max((sum(map(len, prompt.visuals)) for prompt in prompts), default=0)
