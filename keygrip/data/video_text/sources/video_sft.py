"""Instructions about videos and images in the most common format of such collections: JSON or JSON lines with `id`,
`video` or `image` (or `videos`, `images`) and `conversations` [{"from": "human" | "gpt", "value"}] or `messages`
[{"role", "content"}], next to the media files that they name. Optional: `answers` of annotators to the last question,
texts or [{"answer"}]. Content is text or a list of items, as in Hugging Face's chat templates (`foreign_text`); an item
may name its file itself ({"type": "image", "image": "a.jpg"}, also under `path` or `url`)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.keys import file_keys
from keygrip.data.shards.set_writer import Broken, MadeSample, write_shards
from keygrip.data.source_files import file_below, files_in, refuse_written_into_source
from keygrip.data.untrusted_files import parse_fields, parse_json, parse_loosely, read_text, regular_file, sound_fields
from keygrip.data.video_text.conversations import (
    DECODING,
    MAX_FRAMES,
    VIDEO,
    annotators_answers,
    decode_timed,
    describe_video_text,
    encode_jpeg,
    rate_of,
    shard_frame_settings,
    video_text_parts,
)
from keygrip.data.video_text.foreign_text import (
    asked_in,
    files_of_items,
    places_problem,
    stated_media_kinds,
    turns_of,
    with_system,
    without_placeholders,
)
from keygrip.data.video_text.placeholders import BARE, Placeholders
from keygrip.data.video_text.sample_types import Conversation, Turn
from keygrip.data.video_text.video_files import SUFFIXES, read_animation, read_image

log = logging.getLogger(__name__)

MAX_LIST_BYTES = 1 << 33
TURNS, MEDIA = ("conversations", "messages"), ("video", "videos", "image", "images")
COUNTED = (*TURNS, *MEDIA, "system", "answers", "start", "end")  # used fields of an entry; others may be broken
SHOWN = (*SUFFIXES, ".gif", *(f".{ending}" for ending in VIDEO))


@dataclass(frozen=True)
class Entry:
    """An entry of a list."""

    key: str
    media: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    collection: str
    problem: str = ""  # why the entry cannot be used
    named: str = ""  # the key of MEDIA that names the files; empty if items of the turns name them
    answers: tuple[str, ...] = ()  # annotators' answers to the last question, for the VQA rule

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class VideoSFTMaker:
    """Makes the sample from an entry."""

    image_size: int
    fit: str
    max_frames: int = MAX_FRAMES

    def __call__(self, entry: Entry) -> Iterable[MadeSample | Broken]:
        if entry.problem:
            raise ValueError(entry.problem)
        images: list[np.ndarray] = []
        fps: float | None = 1.0
        stills = True
        for path in entry.media:
            if not path.exists():
                raise FileNotFoundError(f"{path} is not there")
            if path.suffix.lower() in SUFFIXES:
                animation = read_animation(path, self.image_size, self.fit, self.max_frames)
                if animation is None:
                    images.append(read_image(path, self.image_size, self.fit)[None])
                    continue
                frames, times = animation[0], np.array(animation[1])
            else:
                regular_file(path)
                frames, times = decode_timed(str(path), self.image_size, self.fit, self.max_frames)
            images.append(frames)
            fps, stills = rate_of(times), False
        all_frames = np.concatenate(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
        prompts = asked_in(entry.turns)
        places = Placeholders.of(prompts, _media_kinds(entry))
        count = places.count(prompts)
        if not len(all_frames) and count:
            raise ValueError(f"its text shows an image or a video, and none of {', '.join(MEDIA)} names one")
        valid_counts = {len(entry.media)}
        frames_of_one = stills and (entry.named in ("video", "videos") or places.of_one_video(prompts))
        if frames_of_one:
            valid_counts.add(1)
        elif not stills:  # one placeholder for a video, or one for each frame
            valid_counts.add(len(all_frames))
        if problem := places_problem(count, valid_counts):
            raise ValueError(problem)
        if len(entry.media) > 1 and not frames_of_one:
            fps = None  # several media have no common time
        if len(all_frames) > self.max_frames:
            raise ValueError(f"{len(all_frames)} frames are more than max_frames={self.max_frames}")
        turns = [Turn(role, text) for role, text in without_placeholders(entry.turns, places)]
        evidence: dict[str, Any] = {"collection": entry.collection}
        if entry.answers:
            evidence["answers"] = list(entry.answers)
        conversation = Conversation(tuple(turns), "video_instruction", evidence)
        files = [encode_jpeg(frame) for frame in all_frames]
        yield MadeSample(entry.key, *video_text_parts(files, [conversation], "video_sft", fps))


def _media_kinds(entry: Entry) -> Collection[str]:
    """Return the kinds of an entry's media, from their key; both kinds if the key does not show it."""
    return (stated_media_kinds({entry.named: [path.name for path in entry.media]}) or BARE) if entry.media else ()


def entries(source: Path) -> list[Entry]:
    """Return all entries of the lists below a folder.

    Raises:
        FileNotFoundError: there are no lists. ValueError: a list cannot be read, or no entry can be used.
    """
    lists = files_in(source, ".json", ".jsonl", below=True)
    if not lists:
        raise FileNotFoundError(f"no *.json or *.jsonl with instructions below {source}")
    all_entries = []
    for path, name in zip(lists, file_keys(source, lists), strict=True):
        content = _read_list(path)
        if content and not any(isinstance(each, BadSample) or _has_turns(each) for each in content):
            log.warning("%s is not read: none of its %d entries has %s", path, len(content), " or ".join(TURNS))
            continue
        for index, entry in enumerate(content):
            key = f"{name}-{index:08d}"
            if isinstance(entry, BadSample):
                all_entries.append(Entry(key, (), (), name, str(entry)))
            elif not _has_turns(entry):
                all_entries.append(Entry(key, (), (), name, f"entry {index} of {path} has no {' or '.join(TURNS)}"))
            else:
                try:
                    with convert_errors(f"entry {index} of {path}"):
                        all_entries.append(_make_entry(key, name, source, path.parent, entry))
                except BadSample as error:
                    all_entries.append(Entry(key, (), (), name, str(error)))
    if not any(not entry.problem for entry in all_entries):
        raise ValueError(
            f"the lists below {source} hold no entries with {' or '.join(TURNS)} that can be used"
            + (f"; the first: {all_entries[0].problem}" if all_entries else "")
        )
    return all_entries


def _has_turns(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(name in entry for name in TURNS)


def _read_list(path: Path) -> list[Any]:
    """Return the entries of a list; an unreadable line of a .jsonl file is represented by its error.

    Raises:
        ValueError: the file cannot be read, or is not a list.
    """
    text = read_text(path, MAX_LIST_BYTES)
    if path.suffix.lower() == ".jsonl":
        return [_parse_line(line, f"line {n} of {path}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        try:
            content = parse_json(text, path, MAX_LIST_BYTES)
        except BadSample:  # perhaps only one entry is invalid
            content = parse_loosely(text, path, MAX_LIST_BYTES)
            if isinstance(content, list):
                content = [_check_fields(entry, f"entry {number} of {path}") for number, entry in enumerate(content)]
    except BadSample as error:
        raise ValueError(f"{path} is not valid JSON: {error.what}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} holds no list of entries")
    return content


def _parse_line(line: str, location: str) -> Any:
    try:
        return parse_fields(line, location, COUNTED)
    except BadSample as error:
        return error


def _check_fields(entry: Any, location: str) -> Any:
    try:
        return sound_fields(entry, location, COUNTED) if isinstance(entry, Mapping) else entry
    except BadSample as error:
        return error


def _find_medium(source: Path, list_folder: Path, name: str) -> Path:
    """Return the file of a name that is relative to the list's folder or to `source`: both are common. If it exists in
    neither, return the path in the list's folder. Raise ValueError if it lies outside `source`."""
    first = _path_within_source(source, list_folder, name)
    if first.is_file() or os.path.normpath(list_folder) == os.path.normpath(source):
        return first
    try:
        second = _path_within_source(source, source, name)
    except ValueError:  # "../videos/a.mp4" of a list in a folder
        return first
    return second if second.is_file() else first


def _make_entry(key: str, collection: str, source: Path, list_folder: Path, entry: Mapping[str, Any]) -> Entry:
    names = [name for name in MEDIA if entry.get(name)]
    if len(names) > 1:
        raise ValueError(f"it has {' and '.join(names)}: their order is not known")
    if entry.get("start") is not None or entry.get("end") is not None:
        raise ValueError("it has `start` or `end`: clips are not cut here, cut the video first")
    key_of_turns = next(name for name in TURNS if name in entry)
    listed_turns = _check_list(entry[key_of_turns], key_of_turns)
    if not all(isinstance(turn, Mapping) for turn in listed_turns):
        raise ValueError(f"a turn of its `{key_of_turns}` is no object")
    turns = [turn for each in listed_turns for turn in turns_of(each)]
    in_items = [name for each in listed_turns for name in files_of_items(each)]
    if in_items and names:
        raise ValueError(f"it has {names[0]} and items that name files: name each once")
    if in_items and len(in_items) != Placeholders.of(asked := asked_in(turns), BARE).count(asked):
        raise ValueError(f"its items name {len(in_items)} files, and others of its images and videos have none")
    if not names and not in_items and (unknown := _unknown_medium(entry, source, list_folder)):
        raise ValueError(f"its `{unknown}` names an image or a video; known are {', '.join(MEDIA)}")
    named = entry[names[0]] if names else in_items
    media = []
    for name in [named] if isinstance(named, str) else _check_list(named, names[0] if names else ""):
        # relative to the list or to the whole folder: both are common
        media.append(_find_medium(source, list_folder, name))
    return Entry(
        key,
        tuple(media),
        tuple(with_system(turns, entry.get("system"))),
        collection,
        answers=annotators_answers(entry.get("answers")),
        named=names[0] if names else "",
    )


def _unknown_medium(entry: Mapping[str, Any], source: Path, list_folder: Path) -> str | None:
    """Return the key, in an entry without known media, whose value is a name with the ending of an image or a video, if
    this file exists or the key's name suggests media. None: there is no such key, and the entry is text alone."""
    for key, value in entry.items():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or len(name) > 500 or not name.lower().endswith(SHOWN):
                continue
            if re.search(r"clip|file|frame|image|img|media|path|photo|picture|video", str(key), re.IGNORECASE):
                return str(key)
            if any((folder / name).is_file() for folder in (list_folder, source)):
                return str(key)
    return None


def _check_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its `{name}` is no list")
    return value


def _path_within_source(source: Path, folder: Path, name: object) -> Path:
    """Return the path of a file that a list names. Raise ValueError if it lies outside the collection."""
    if not isinstance(name, str):
        raise ValueError(f"it names a file by {str(name)[:80]!r}, which is no text")
    return file_below(source, folder, name)


def video_sft(
    source: Path | str,
    root: Path | str,
    image_size: int = 224,
    fit: str = "pad",
    entries_per_shard: int = 500,
    workers: int | None = None,
    max_failed_share: float = 0.5,
    max_frames: int = MAX_FRAMES,
) -> dict[str, Any]:
    """Write a collection of video (and image) instructions as shards.

    Args:
        source: folder with lists and media. root: of the set. image_size, fit: of the frames.
        workers: processes; None: one per core. max_failed_share: a larger share of broken entries is an error.
        max_frames: number of evenly spaced frames for videos with more seconds.
    """
    refuse_written_into_source(root, source, below=True)
    settings = {"data": "video_sft", **shard_frame_settings(image_size, fit, max_frames)}
    settings["decoding"] = DECODING
    maker = VideoSFTMaker(image_size, fit, max_frames)
    found = entries(Path(source))
    return write_shards(
        root, found, maker, settings, entries_per_shard, "sft", workers, max_failed_share, describe=describe_video_text
    ).report()
