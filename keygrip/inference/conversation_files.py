"""Read files of conversations to answer: JSON Lines, each line a list of messages or an object with `messages`.

Instead of `messages` an object may have `conversations`, with messages of the form {"from": "human" | "gpt", "value"}
instead of role and content. This is the format of ShareGPT and LLaVA, which `keygrip prepare step=video_sft` reads too.

Next to `messages` an object may list its files under `images` and `videos` (or `image`, `video`), as ms-swift and
LLaMA-Factory write them. The files replace the placeholders in the users' messages, in order or by the numbers of
<image_1>. Without placeholders they are placed before the first user's text. Several images under `video` or `videos`
are the frames of one video if the messages have one placeholder or none. A path, next to the messages or in an item of
a message, is relative to the folder of the file, or otherwise to the current folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.untrusted_files import parse_json, read_text
from keygrip.data.video_text.foreign_text import ROLES, media_key, with_system
from keygrip.data.video_text.placeholders import Placeholders, number_of
from keygrip.data.video_text.video_files import SUFFIXES

SHOWN = ("image", "video", "path", "url")  # keys under which an item names its image or video
NAMING = {"images": "image", "image": "image", "videos": "video", "video": "video"}
AUDIO = ("audio", "audios")  # keys under which other programs name audio files
TURNS = ("messages", "conversations")  # keys of a line that hold its messages
ONE_PER_LINE = "each conversation stands on a line of its own"
SEVERAL = f"{ONE_PER_LINE} (jq -c '.[]' FILE makes such lines of a JSON list)"
Item = tuple[Any, int | None]  # an item of a message, with the number of its placeholder


def read_conversations(path: str | Path) -> tuple[list[list[Any]], dict[int, str]]:
    """Read the conversations of a file.

    Returns:
        The conversations, and the error message of each line that has another form, by its number. Such a line is an
        empty conversation in the list.

    Raises:
        FileNotFoundError: The file does not exist. ValueError: It holds no conversation.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"conversations={path}: there is no such file")
    if not Path(path).is_file():
        raise ValueError(f"conversations={path}: it is a folder, a named pipe or a device, not a file")
    talks: list[list[Any]] = []
    broken: dict[int, str] = {}
    text = read_text(path)
    for number, line in enumerate(text.split("\n"), 1):  # text may contain other line separators
        if not line.strip():
            continue
        talk: Any = None
        try:
            with convert_errors(f"{path}, line {number}"):
                content = parse_json(line, "JSON")
                talk = next(filter(None, map(content.get, TURNS)), None) if isinstance(content, dict) else content
                if not isinstance(talk, list) or not talk:
                    raise ValueError(f"it is no list of messages, nor an object with {' or '.join(TURNS)}")
                if _is_conversation_list(talk):
                    raise ValueError(f"it is a list of conversations: {SEVERAL}")
                talk = [_resolve_message_paths(_as_message(each), Path(path).parent) for each in talk]
                if isinstance(content, dict):
                    talk = _insert_files(content, talk, Path(path).parent)
        except BadSample as error:
            broken[len(talks)] = str(error)
            talk = []
        talks.append(talk)
    if len(broken) == len(talks):
        if len(broken) > 1 and text.lstrip()[0] in "[{" and not _is_json(text.strip().partition("\n")[0]):
            raise ValueError(f"{path} is JSON over several lines, and not JSON Lines: {_how_to_split(text)}")
        raise ValueError(broken[0] if broken else f"conversations={path}: it holds no conversation")
    return talks, broken


def _is_json(line: str) -> bool:
    try:
        parse_json(line, "JSON")
    except BadSample:
        return False
    return True


def _is_conversation_list(content: Any) -> bool:
    """Return whether JSON is a list of conversations, in any of the usual forms, and not the messages of one."""
    if not isinstance(content, list) or not content:
        return False
    first = content[0]
    return isinstance(first, list) or (isinstance(first, dict) and not set(TURNS).isdisjoint(first))


def _how_to_split(text: str) -> str:
    """Explain how to convert JSON over several lines (one object, several objects, a list) to JSON Lines."""
    try:
        return SEVERAL if _is_conversation_list(parse_json(text, "JSON")) else f"{ONE_PER_LINE} (jq -c . FILE makes it)"
    except BadSample:  # perhaps several objects, one after the other
        return f"{ONE_PER_LINE} (jq -c . FILE makes such lines of JSON)"


def _insert_files(content: Mapping[str, Any], talk: list[Any], folder: Path) -> list[Any]:
    """Insert the files and the system message of an object into its messages. Raises ValueError if the number of
    placeholders and the number of files differ, if another key or one of `AUDIO` names files, or if the items name
    their own."""
    unknown = media_key({key: value for key, value in content.items() if key not in (*NAMING, *TURNS)})
    if unknown is not None:
        raise ValueError(f"its `{unknown}` names an image or a video; known beside messages are {', '.join(NAMING)}")
    if audio := next(filter(content.get, AUDIO), None):
        raise ValueError(f"its `{audio}` names audio files, and only images and videos are read")
    files: dict[str, list[str]] = {"image": [], "video": []}
    for key, kind in NAMING.items():
        entry = content.get(key) or []
        for name in [entry] if isinstance(entry, str) else entry if isinstance(entry, list) else [entry]:
            if not isinstance(name, str):
                raise ValueError(f"its `{key}` names a file by {str(name)[:80]!r}, which is no text")
            files[kind].append(_resolve_path(folder, name))
    if isinstance(content.get("system"), str) and all(isinstance(message, Mapping) for message in talk):
        roles = [(str(message.get("role")), "") for message in talk]
        if len(with_system(roles, content["system"])) > len(talk):
            talk = [{"role": "system", "content": content["system"]}, *talk]
    if not (files["image"] or files["video"]):
        return talk
    user_texts = [
        message["content"] for message in talk if _is_user_message(message) and isinstance(message["content"], str)
    ]
    placeholders = Placeholders.of(user_texts, [kind for kind, names in files.items() if names])
    split = iter(placeholders.split(user_texts))
    messages: list[Any] = []
    places: list[Item] = []
    for message in talk:
        if not _is_user_message(message):
            messages.append(message)
            continue
        content = message["content"]
        items = (
            _items_from_parts(next(split))
            if isinstance(content, str)
            else [(_copy_item(item), None) for item in content]
        )
        messages.append({**message, "content": [item for item, _ in items]})
        places += [
            (item, number)
            for item, number in items
            if isinstance(item, dict) and item.get("type") in ("image", "video") and not _names_file(item)
        ]
    first = next((message["content"] for message in messages if _is_user_message(message)), None)
    if not places and first is not None:
        if any(_names_file(item) for message in messages if _is_user_message(message) for item in message["content"]):
            raise ValueError("its items name their files, and so do images or videos beside them: name each once")
        if files["image"] and files["video"]:
            raise ValueError("it has images and videos, and its messages no places for them: their order is not known")
        places = [
            ({"type": kind}, None)
            for kind, names in files.items()
            for _ in (names[:1] if _are_frames(kind, names) else names)
        ]
        first[:0] = [item for item, _ in places]
    _assign_files(places, files)
    return messages


def _as_message(entry: Any) -> Any:
    """Convert {"from", "value"} to a message with role and content; return any other entry unchanged. Raises ValueError
    if `from` is an unknown role."""
    if not isinstance(entry, Mapping) or "from" not in entry or "role" in entry:
        return entry
    role = ROLES.get(str(entry["from"]).lower())
    if role is None:
        raise ValueError(f"a message is from {str(entry['from'])[:40]!r}; known are {', '.join(ROLES)}")
    return {"role": role, "content": entry.get("value")}


def _resolve_message_paths(message: Any, folder: Path) -> Any:
    """Return a message with the paths in its items relative to the current folder."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_resolve_item_paths(item, folder) for item in message["content"]]}


def _resolve_item_paths(item: Any, folder: Path) -> Any:
    if not isinstance(item, Mapping) or item.get("type") not in ("image", "video"):
        return item
    named = {key: item[key] for key in SHOWN if key in item}
    return {**item, **{key: _resolve_paths(folder, value) for key, value in named.items()}}


def _resolve_paths(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_resolve_paths(folder, each) for each in value]
    return _resolve_path(folder, value) if isinstance(value, str) else value


def _resolve_path(folder: Path, name: str) -> str:
    """Return the path relative to the file's folder, or unchanged if nothing exists there."""
    with contextlib.suppress(OSError):  # the name may be too long
        if name and (folder / name).exists():
            return str(folder / name)
    return name


def _is_user_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and message.get("role") == "user"
        and isinstance(message.get("content"), str | list)
    )


def _names_file(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") in ("image", "video") and any(map(item.get, SHOWN))


def _copy_item(item: Any) -> Any:
    return dict(item) if isinstance(item, Mapping) else item


def _items_from_parts(parts: list[tuple[str, str]]) -> list[Item]:
    """Return the items of a text split by `Placeholders.split`. White space at its ends is removed as in training,
    where it is removed together with the placeholders."""
    items: list[Item] = [
        ({"type": kind}, number_of(text)) if kind else ({"type": "text", "text": text}, None) for kind, text in parts
    ]
    text_items = [item for item, _ in items if item["type"] == "text"]
    if len(text_items) < len(items) and text_items:
        if items[0][0] is not text_items[0]:
            text_items[0]["text"] = text_items[0]["text"].lstrip()
        if items[-1][0] is not text_items[-1]:
            text_items[-1]["text"] = text_items[-1]["text"].rstrip()
    return items


def _are_frames(kind: str, names: list[str]) -> bool:
    """Return whether the files can be the frames of one video."""
    return kind == "video" and len(names) > 1 and all(name.lower().endswith(SUFFIXES) for name in names)


def _assign_files(places: list[Item], files: dict[str, list[str]]) -> None:
    """Assign files to placeholders: numbered placeholders by number, the others in order. <image> is a placeholder for
    a video if the object lists no image."""
    for place, _ in places:
        if place["type"] == "image" and not files["image"]:
            place["type"] = "video"
    for kind, names in files.items():
        kind_places = [(place, number) for place, number in places if place["type"] == kind]
        if len(kind_places) == 1 and _are_frames(kind, names):
            kind_places[0][0][kind] = names
            continue
        if len(kind_places) != len(names):
            raise ValueError(f"its messages have {len(kind_places)} places for {kind}s, and it names {len(names)}")
        numbers = [number for _, number in kind_places if number is not None]
        begin = 0 if 0 in numbers else 1
        free_numbers = [number for number in range(begin, begin + len(names)) if number not in numbers]
        if len(free_numbers) + len(numbers) != len(names):
            raise ValueError(
                f"its placeholders have the numbers {numbers}, and its {kind}s {begin} to {begin + len(names) - 1}"
            )
        for place, number in kind_places:
            place[kind] = names[(free_numbers.pop(0) if number is None else number) - begin]
