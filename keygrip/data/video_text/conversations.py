"""The contents of shards of videos with text: the meaning of their parts, and how they are written, read and decoded.

Members of a sample: "json" with `source`, `fps`, `frames` and `conversations` ([{"kind", "turns": [{"role", "text"}],
"evidence"}]), and the images: "00.jpg", "01.jpg", ... (from 0 or 1; also PNG and WebP; also under separate keys, see
`keygrip.data.shards.separate_images`), one "jpg", or one "mp4", from which one frame per second is read. For other
forms of text see `foreign_text`. Upper case counts as lower. Columns: `frames`, `text_length` (characters of the
longest conversation; see there), `first_answer` (smallest number of characters to the end of a conversation's first
answer), `conversations` (their number) and `kinds` ("cue mark"; `kinds_column`).

For a sample with both "json" and "txt", the json is used if it has turns or a caption, and the txt is not read. If the
json has only metadata, the txt is the caption, and the request depends on the json's `source` as for its own caption.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from keygrip.data.bad_samples import BadSample, convert_errors, join_first, raise_connection_error
from keygrip.data.image_text.decoding import refuse_frames, upright
from keygrip.data.shards.index import MOST_FRAMES, Parts, lower_case
from keygrip.data.shards.reader import ShardSet, all_samples
from keygrip.data.shards.separate_images import MEDIA, TEXT
from keygrip.data.spacing import evenly
from keygrip.data.untrusted_files import open_image, parse_fields
from keygrip.data.video import TIME_TOLERANCE_S, duration_s, frames_at
from keygrip.data.video_text.foreign_text import (
    ANSWERS,
    CAPTIONS,
    COUNTS,
    PLACES,
    SHOWN,
    TURNS,
    caption_request,
    caption_text,
    holds_text,
    own_text,
    places_problem,
    stated_media_kinds,
)
from keygrip.data.video_text.sample_types import (
    Conversation,
    Turn,
    VideoTextSample,
    image_seconds,
    kind_problem,
    kinds_column,
    seconds_of,
)

ROLES = ("system", "user", "assistant")
IMAGE = re.compile(r"^(?:(\d{1,6})\.)?(jpg|jpeg|png|webp)$", re.IGNORECASE)
VIDEO = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
KNOWN_MEMBERS = "json or txt, 00.jpg 01.jpg ... or one jpg (jpeg, png, webp), or one mp4 (webm, mkv, mov, avi, m4v)"
MAX_FRAMES = 64  # frames of a sample that preparations write, and the default in training
LARGEST = 16384  # pixels of a frame's side
FITS = ("stretch", "crop", "pad")
CAPTION_REQUEST = "Describe what happens in the video."
IMAGE_CAPTION_REQUEST = "Describe the image."  # for a sample with one image whose json names no video


# Version of image decoding, a setting of a set: other versions decode transparent, rotated and deep images differently.
DECODING = 3


def frame_settings(image_size: Any, fit: Any, max_frames: Any, image_frames: Any = 1) -> dict[str, Any]:
    """Return the settings of frame preparation by name: size, one of `FITS`, the largest number of frames of a video,
    and the number of frames that show a single image.

    Raises:
        ValueError: a setting is invalid.
    """

    def fits(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    if not fits(image_size, LARGEST):
        raise ValueError(f"image_size={image_size!r}: a frame's sides have 1 to {LARGEST} pixels")
    if not fits(max_frames, MOST_FRAMES):
        raise ValueError(f"max_frames={max_frames!r}: a sample has 1 to {MOST_FRAMES}")
    if not fits(image_frames, max_frames):
        raise ValueError(f"image_frames={image_frames!r}: an image has 1 to max_frames={max_frames}")
    if fit not in FITS:
        raise ValueError(f"fit={fit!r}: must be one of {', '.join(FITS)}")
    return {"image_size": image_size, "fit": fit, "max_frames": max_frames, "image_frames": image_frames}


def image_frames_of(settings: Mapping[str, Any]) -> int:
    """Return how many frames show a single image, from `frame_settings` with a possibly lower `max_frames`."""
    return int(min(settings.get("image_frames", 1), settings["max_frames"]))


def shard_frame_settings(image_size: int, fit: str, max_frames: int) -> dict[str, Any]:
    """Return the `frame_settings` that are stored with a set; without `max_frames` if it has the default value."""
    settings = frame_settings(image_size, fit, max_frames)
    del settings["image_frames"]
    return {name: value for name, value in settings.items() if name != "max_frames" or value != MAX_FRAMES}


def caption(text: str, evidence: Mapping[str, Any] | None = None, request: str = CAPTION_REQUEST) -> Conversation:
    """Return a conversation of a request for a caption and the caption."""
    return Conversation((Turn("user", request), Turn("assistant", text)), "caption", dict(evidence or {}))


def answer(question: str, text: str, kind: str, evidence: Mapping[str, Any] | None = None) -> Conversation:
    """Return a conversation of a question and its answer."""
    return Conversation((Turn("user", question), Turn("assistant", text)), kind, dict(evidence or {}))


# ---- writing ---------------------------------------------------------------------------------------------------------


def video_text_parts(
    frames: Sequence[bytes],
    conversations: Sequence[Conversation],
    source: str,
    fps: float | None = 1.0,
    extension: str = "jpg",
) -> tuple[Parts, dict[str, int | float | str]]:
    """Create the parts and columns of a sample from encoded images.

    Args:
        fps: of the frames; None: they have no common time.

    Raises:
        ValueError: there is no conversation, one is empty, or there are more than 4096 frames.
    """
    if len(frames) > MOST_FRAMES:
        raise ValueError(f"{len(frames)} frames are more than the {MOST_FRAMES} that a sample may have")
    for conversation in conversations:
        problem = conversation_problem(conversation)
        if problem:
            raise ValueError(problem)
    if not conversations:
        raise ValueError("a sample needs at least one conversation")
    content = {
        "source": source,
        "fps": fps,
        "frames": len(frames),
        "conversations": [
            {
                "kind": conversation.kind,
                "turns": [{"role": turn.role, "text": turn.text} for turn in conversation.turns],
                "evidence": conversation.evidence,
            }
            for conversation in conversations
        ],
    }
    parts = {"json": json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()}
    parts |= {f"{number:02d}.{extension}": image for number, image in enumerate(frames)}
    return parts, {"frames": len(frames), **_text_columns(conversations)}


def text_length(conversations: Sequence[Conversation]) -> int:
    """Return the characters of the longest conversation, from which batches are planned with four characters per token.
    Characters beyond ASCII (Chinese, Greek, ...) are at least one token each and count as four."""
    return max((_turns_length(c.turns) for c in conversations), default=0)


def _turns_length(turns: Sequence[Turn]) -> int:
    return sum(_text_length(turn.text) for turn in turns)


def _text_length(text: str) -> int:
    plain = len(text.encode("ascii", "ignore"))
    return plain + 4 * (len(text) - plain)


def _text_columns(conversations: Sequence[Conversation]) -> dict[str, int | float | str]:
    first = [next((n for n, turn in enumerate(c.turns) if turn.role == "assistant"), 0) + 1 for c in conversations]
    return {
        "text_length": text_length(conversations),
        "first_answer": min((_turns_length(c.turns[:n]) for c, n in zip(conversations, first, strict=True)), default=0),
        "conversations": len(conversations),
        "kinds": kinds_column(c.kind for c in conversations),
    }


def conversation_problem(conversation: Conversation) -> str | None:
    """Return what is wrong with a conversation; None if it is valid."""
    unknown = [turn.role for turn in conversation.turns if turn.role not in ROLES]
    if unknown:
        return f"a conversation has a turn of {unknown[0]!r}; roles are {', '.join(ROLES)}"
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    if not answers or not all(turn.text.strip() for turn in answers):
        return "a conversation has no answer, or an empty one: it would carry no loss"
    if conversation.turns[0].role == "assistant":
        return "a conversation begins with an answer"
    if not any(turn.role == "user" for turn in conversation.turns):
        return "a conversation has no user's turn"
    return kind_problem(conversation.kind)


def encode_jpeg(frame: np.ndarray, quality: int = 92) -> bytes:
    """Return the content of a JPEG file of an image uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_text(parts: Parts, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the sample's text from its json, or from its txt if the json has no turns and no caption.

    Args:
        names: of all parts of the sample. None: `parts` contains all of them.

    Raises:
        ValueError: the text is missing or malformed.
    """
    names = [*parts] if names is None else names
    parts = lower_case(parts)
    text_fields = (*TURNS, *CAPTIONS)
    counted_fields = text_fields if "txt" in parts else (*text_fields, *COUNTS, "fps", "system", ANSWERS)
    content = parse_fields(parts["json"], "json", counted_fields) if "json" in parts else {}
    request = IMAGE_CAPTION_REQUEST if _is_one_image(names, content) else CAPTION_REQUEST
    if "txt" in parts and not holds_text(content):  # video downloaders write the caption to txt, metadata to json
        return caption_text(parts["txt"].decode("utf-8-sig"), caption_request(content, request))
    if "json" in parts:
        return own_text(content, request, _has_media(names))
    dotted = any(name.rpartition(".")[2] in TEXT for name in parts)
    hint = ": a key ends at the first dot of a name; write another character for the others" if dotted else ""
    only = (
        join_first(sorted(parts), 5, ", ") or "nothing"
    )  # few names: long reasons are cut off, and the hint comes last
    raise ValueError(f"it has no json or txt part, only {only}{hint}")


def parse_conversations(content: Mapping[str, Any]) -> tuple[Conversation, ...]:
    """Parse the conversations of a sample's text. Raise BadSample if they are malformed."""
    with convert_errors("its conversations"):
        return tuple(_parse_conversation(conversation) for conversation in content["conversations"])


def _parse_conversation(content: Mapping[str, Any]) -> Conversation:
    turns, kind, evidence = content["turns"], content.get("kind", "text"), content.get("evidence") or {}
    for name, value in [("kind", kind)] + [(key, turn[key]) for turn in turns for key in ("role", "text")]:
        if not isinstance(value, str):
            raise ValueError(f"the {name} of a conversation is not text but {str(value)[:80]}")
    if not turns or not isinstance(evidence, dict):
        raise ValueError("a conversation has no turns, or its evidence is not an object")
    checked_evidence = {name: value for name, value in evidence.items() if name != ANSWERS}
    if answers := annotators_answers(evidence.get(ANSWERS)):
        checked_evidence[ANSWERS] = list(answers)
    return Conversation(tuple(Turn(turn["role"], turn["text"]) for turn in turns), kind, checked_evidence)


def annotators_answers(given: Any) -> tuple[str, ...]:
    """Return the annotators' answers from a list of texts, or of objects {"answer", ...} as in VQAv2, OK-VQA and
    TextVQA; None and an empty list give no answers. Raise ValueError if they have another form."""
    listed = given if isinstance(given, list) else [] if given is None else [None]
    answers: list[Any] = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError('its `answers` are no list of texts, nor of objects with a text "answer"')
    return tuple(answers)


def _is_one_image(names: Sequence[str], content: Any) -> bool:
    """Whether a sample is one image, and not a frame of a video that its json names."""
    if any(name.lower() in VIDEO for name in names) or sum(IMAGE.match(name) is not None for name in names) != 1:
        return False
    return not isinstance(content, Mapping) or "video" not in stated_media_kinds(content)


def _has_media(names: Iterable[str]) -> bool:
    return any(IMAGE.match(name) or name.lower() in VIDEO for name in names)


def unknown_members(parts: Parts) -> list[str]:
    """Return the names of members that are neither text nor image nor video."""
    return [name for name in parts if name not in (*TEXT, *VIDEO) and not IMAGE.match(name)]


def media_of(parts: Parts) -> tuple[str | None, list[str]]:
    """Return the name of the video, or the names of the images in order, from `lower_case` parts.

    Raises:
        ValueError: an image in between is missing, there are several videos, a video and images, or unsupported media.
    """
    images = sorted((int(match[1] or 0), name) for name in parts if (match := IMAGE.match(name)))
    numbers = [number for number, _ in images]
    if numbers and numbers != list(range(numbers[0] != 0, len(images) + (numbers[0] != 0))):
        raise ValueError(f"its images are numbered {numbers}: some are missing, or one number stands for two")
    videos = [name for name in VIDEO if name in parts]
    if len(videos) > 1 or (videos and images):
        raise ValueError(f"it holds {', '.join(videos + [name for _, name in images][:2])}: one video, or images")
    unknown = unknown_members(parts)
    refused = [name for name in unknown if MEDIA.search(name) or not (images or videos)]
    if refused:
        raise ValueError(f"unknown member {refused[0]!r} (known: {KNOWN_MEMBERS}); remove it or add a decoder")
    return (videos[0] if videos else None), [name for _, name in images]


def describe_video_text(parts: Parts) -> dict[str, int | float | str]:
    """Return the columns of a sample, as :func:`video_text_parts`. Raise BadSample or ValueError if it is malformed."""
    parts = lower_case(parts)
    content = parse_text(parts)
    conversations = parse_conversations(content)
    problem = next((problem for c in conversations if (problem := conversation_problem(c))), None)
    if problem:
        raise ValueError(problem)
    video, images = media_of(parts)
    if video is None:
        _check_frame_count(content, images)
        image_seconds(content.get("fps", 1.0), range(len(images)))
    frames = len(images) if video is None else len(_frame_times(duration_s(parts[video]), MOST_FRAMES))
    if video is not None and (wrong := places_problem(content.get(PLACES, 0), {1, frames})):
        raise ValueError(wrong)
    return {"frames": frames, **_text_columns(conversations)}


def _check_frame_count(content: Mapping[str, Any], images: Sequence[str]) -> None:
    if content.get("frames", len(images)) != len(images):
        claim = f"{str(content['frames'])[:40]} that its json says (frames, {', '.join(COUNTS)})"
        raise ValueError(f"it has {len(images)} images of {claim}: pack them all beside it, or correct the number")
    if images and (problem := places_problem(content.get(PLACES, 0), {1, len(images)})):  # 1: frames of a video
        raise ValueError(problem)
    if content.get(SHOWN) is True and not images:
        raise ValueError(
            "its text is about an image or a video, or its json names one, and the shard holds none of it: pack the "
            "file beside the text, under the same name"
        )


def fit_image(image: Any, size: int, fit: str) -> np.ndarray:
    """Convert a PIL image to a square uint8 [S, S, 3]: stretched, centre-cropped, or padded with black bars."""
    if image.size != (size, size):
        if fit == "crop":
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        elif fit == "pad":
            image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC)
        else:
            image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image)


def decode_image(content: bytes, size: int, fit: str) -> np.ndarray:
    """Decode an image to uint8 [S, S, 3] RGB. Raise BadSample if it is broken, too large or has several frames."""
    with open_image(content) as opened:
        refuse_frames(opened)
        if fit == "stretch":
            opened.draft("RGB", (size, size))
        return shown_image(opened, size, fit)


def shown_image(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """Convert a PIL image of any mode to uint8 [S, S, 3] RGB, as viewers show it (`keygrip.data.image_text.decoding`).

    Raises:
        ValueError: it is unknown which value is white.
    """
    return fit_image(upright(image), size, fit)


def whole_seconds(duration: float) -> int:
    """Return the number of frames in a video of this duration in seconds, at one frame per second; at least 1."""
    return max(1, int(duration + TIME_TOLERANCE_S))


def _frame_times(duration: float, max_frames: int) -> np.ndarray:
    """Return the times of frames: one per second, or `max_frames` evenly spaced times if there would be more."""
    count = whole_seconds(duration)
    return np.arange(count) if count <= max_frames else np.linspace(0, duration - 1, max_frames)


def decode_timed(content: bytes | str, size: int, fit: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode a video file or its bytes to uint8 [F, S, S, 3], at one frame per second (of longer videos, `most` evenly
    spaced frames), and return the second of each frame, float [F].

    Raises:
        ValueError: the video cannot be decoded, or ends long before its stated length.
    """
    times = np.zeros(0)

    def chosen(length: float) -> np.ndarray:
        nonlocal times
        times = _frame_times(length, most)
        return times

    frames = frames_at(content, chosen, lambda image: fit_image(image, size, fit))
    return np.stack(frames), times


def rate_of(times: np.ndarray) -> float:
    """Return the frames per second of evenly spaced times; 1 for a single time."""
    return 1.0 if len(times) < 2 else float((len(times) - 1) / (times[-1] - times[0]))


def read_sample(
    shards: ShardSet, sample: int, size: int, fit: str = "stretch", max_frames: int = MAX_FRAMES
) -> VideoTextSample:
    """Read and decode a sample with all its conversations; of more than `max_frames` frames, use evenly spaced ones.

    Raises:
        BadSample: something in the sample is broken; the message names the sample and its shard.
    """
    stored = shards.read(sample)
    with convert_errors(shards.where(sample)):
        parts = lower_case(stored)
        content = parse_text(parts)
        conversations = parse_conversations(content)
        video, names = media_of(parts)
        if video is not None:
            frames, times = decode_timed(parts[video], size, fit, max(MAX_FRAMES, max_frames))
            indices = evenly(len(frames), max_frames)
            frames, seconds = frames[indices], seconds_of(times, indices)
            # evidence counts the frames of a video file in seconds, also where fewer are decoded
            numbers = [int(times[n]) if float(times[n]).is_integer() else -1 for n in indices]
        else:
            _check_frame_count(content, names)
            indices = evenly(len(names), max_frames)
            images = [decode_image(parts[names[n]], size, fit) for n in indices]
            frames = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
            seconds, numbers = image_seconds(content.get("fps", 1.0), indices), list(indices)
        conversations = tuple(each.for_frames(numbers) for each in conversations)
        if any(each.has_place for each in conversations):
            stored_sizes = _frame_sizes(parts, video, [names[n] for n in indices] if video is None else indices)
            conversations = tuple(each.in_square(stored_sizes, size, fit) for each in conversations)
        problem = next((problem for c in conversations if (problem := conversation_problem(c))), None)
        if problem:
            raise ValueError(problem)
    return VideoTextSample(frames, conversations, str(content.get("source", "")), shards.key(sample), seconds)


def _frame_sizes(parts: Parts, video: str | None, frames: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the stored (width, height) of each frame: `frames` are the names of images, or the frames of a video."""
    if video is not None:
        return frames_at(parts[video], lambda _: [0.0], lambda image: image.size) * len(frames)
    sizes = []
    for name in frames:
        with open_image(parts[name]) as opened:
            sizes.append(opened.size)
    return sizes


def read_conversations(shards: ShardSet, sample: int) -> tuple[Conversation, ...]:
    """Read the conversations of a sample without its images. Raise BadSample if its text is broken."""
    parts = shards.read(sample, TEXT)
    with convert_errors(shards.where(sample)):
        return parse_conversations(parse_text(parts, _part_names(shards, sample)))


def _part_names(shards: ShardSet, sample: int) -> list[str]:
    """Return the names of all parts of a sample, without reading the parts."""
    number, row = shards.locate(sample)
    index = shards.index(number)
    return index.part_names[index.first_part[row] : index.first_part[row + 1]].tolist()


def read_timed_conversations(
    shards: ShardSet, sample: int, max_frames: int
) -> tuple[tuple[Conversation, ...], tuple[float, ...] | None]:
    """Return the result of `read_conversations` and the `seconds` that `read_sample` returns. For a video file of more
    seconds than used frames, these are off by less than a second, since the exact length is not read.

    Raises:
        BadSample: the sample's text is broken.
    """
    names, count = _part_names(shards, sample), int(shards.columns["frames"][sample])
    parts = shards.read(sample, TEXT)
    with convert_errors(shards.where(sample)):
        content = parse_text(parts, names)
        conversations = parse_conversations(content)
        if any(name.lower() in VIDEO for name in names):
            times = _frame_times(count, max(MAX_FRAMES, max_frames))
            return conversations, seconds_of(times, evenly(len(times), max_frames))
        return conversations, image_seconds(content.get("fps", 1.0), evenly(count, max_frames))


def iterate_texts(sets: Sequence[ShardSet]) -> Iterator[str]:
    """Yield the text of every turn of some shard sets, in order (to train a tokenizer); skips unreadable samples.
    Raises ConnectionError if a remote shard cannot be reached: the tokenizer is stored as that of all texts."""
    for shards, sample in all_samples(sets):
        try:
            conversations = read_conversations(shards, sample)
        except BadSample as error:
            raise_connection_error(error)
            continue
        for conversation in conversations:
            for turn in conversation.turns:
                yield turn.text
