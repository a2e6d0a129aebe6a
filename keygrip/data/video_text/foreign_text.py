"""Convert text of shards from other programs to the form of this project's own `json` member.

Supported forms: a caption in `txt`, or under `caption` or `text` of `json`; turns under `conversations`, `messages` or
`texts`, each {"from", "value"}, {"role", "content"} or {"user", "assistant"}, where content is text or a list of
{"type": "text" | "image" | "video"} items. Shards of the published model have one question at the top level of the
json, {"user", "assistant", "source", "frame_count"}; if `user` is empty, the request depends on `source` (`REQUESTS`),
as for captions. Each form may state its number of images (`COUNTS`), and a single question may have `answers` of
annotators. Anything else is refused with a message that lists its fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from keygrip.data.video_text.placeholders import BARE, Placeholders, kinds_at_line_ends

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHOWN = "shown"  # key in this project's form: whether the text is about an image or a video and so requires frames
PLACES = "places"  # key for converted text: its number of placeholders for images or videos
# Keys of a json that name images and videos, whatever their values are: image, videos, media, video_path, ...
MEDIA = re.compile(r"(image|video|media)s?(_?(path|file|filename|file_name|name|url|uri)s?)?", re.IGNORECASE)
# ... and keys that name media if their value is a name with the ending of an image or a video.
MAY_NAME = re.compile(r"clip|file|frame|image|img|media|path|photo|picture|url|video", re.IGNORECASE)
ENDING = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|webm|mkv|mov|avi|m4v)$", re.IGNORECASE)
OF_VIDEO = re.compile(r"\.(gif|mp4|webm|mkv|mov|avi|m4v)$", re.IGNORECASE)
CAPTIONS, TURNS = ("caption", "text"), ("conversations", "messages", "texts")
PAIR = ("user", "assistant")
ANSWERS = "answers"  # key for annotators' answers, in a json with one question and in the evidence
COUNTS = ("frame_count", "num_frames")  # keys of a json for the number of images that belong to a text
# The published model's requests for captions, by the `source` of a sample, and the request for other sources.
REQUESTS = {
    "openvid": "Write a brief caption for this video.",
    "webvid": "What would be the WebVid caption for this video?",
    "vript": "Provide a detailed narration of what happens in this video.",
    "sharegpt4video": "Describe what happens in this video in detail.",
}
UNNAMED_REQUEST = "Describe this."


def holds_text(content: Any) -> bool:
    """Whether a sample's json has turns, well-formed or not, or a caption that is not blank."""
    if not isinstance(content, Mapping):
        return isinstance(content, list)
    return any(map(content.get, TURNS)) or _caption(content) is not None or is_pair(content)


def _caption(content: Mapping[str, Any]) -> str | None:
    """Return the key of a json's caption: the first key whose text is not blank."""
    return next((name for name in CAPTIONS if isinstance(content.get(name), str) and content[name].strip()), None)


def is_pair(content: Mapping[str, Any]) -> bool:
    """Whether a json has one question and its answer at the top level, well-formed or not, and no turns or caption. One
    of the two keys alone, or together with a caption, is metadata that downloaders write about an uploader or a model.
    """
    told = any(map(content.get, TURNS)) or _caption(content) is not None
    return "user" in content and bool(content.get("assistant")) and not told


def own_text(content: Any, request: str, packed: bool = False) -> dict[str, Any]:
    """Convert the json of a sample to this project's own form.

    Args:
        content: the parsed json. request: the user's turn before a caption. packed: the sample has an image or a video.

    Raises:
        ValueError: the json has neither turns nor a caption, or they are malformed.
    """
    if isinstance(content, list):
        content = {"conversations": content}
    if not isinstance(content, Mapping):
        raise ValueError("its json is no object")
    name = next((name for name in TURNS if content.get(name)), None)
    if is_pair(content):
        return _convert_pair(content, packed)
    if name is not None:
        turns = content[name]
        if not isinstance(turns, list):
            raise ValueError(f"the {name} of its json are no list")
        if name == "conversations" and isinstance(turns[0], Mapping) and "turns" in turns[0]:
            return dict(content) | {SHOWN: media_key(content) is not None, PLACES: 0}
        role_texts = [turn for each in turns for turn in turns_of(each)]
        role_texts = with_system(role_texts, content.get("system"))
        names_media, prompts = media_key(content) is not None, asked_in(role_texts)
        # a sample has media of one kind; if no key shows which kind, the placeholders in the text may
        kinds = stated_media_kinds(content) or kinds_at_line_ends(prompts) or BARE
        places = Placeholders.of(prompts, kinds if packed or names_media else ())
        count, images = places.count(prompts), _count_named_images(content)
        of_video = places.of_one_video(prompts)
        if images and (problem := places_problem(count, {images, 1} if of_video else {images})):
            raise ValueError(problem)
        role_texts = without_placeholders(role_texts, places)
        converted = _add_answers(_convert_turns(role_texts, "text", content), content) | {
            SHOWN: names_media or count > 0,
            PLACES: count,
        }
        return converted if of_video else _clear_time_of_images(converted, max(count, images), content)
    name = _caption(content)
    non_text_keys = [each for each in CAPTIONS if content.get(each) and not isinstance(content[each], str)]
    if name is None and non_text_keys:
        raise ValueError(
            f"the {non_text_keys[0]} of its json is a {type(content[non_text_keys[0]]).__name__}, not text"
        )
    empty_keys = [each for each in (*TURNS, *CAPTIONS) if each in content]
    empty_keys += ["assistant"] if "user" in content and "assistant" in content else []
    if name is None and empty_keys:
        raise ValueError(f"the {empty_keys[0]} of its json is empty ({json.dumps(content[empty_keys[0]])[:20]})")
    if name is None:
        known_keys = ", ".join((*TURNS, *CAPTIONS, " with ".join(PAIR)))
        raise ValueError(f"its json holds none of {known_keys}; it holds {_format_keys(content)}")
    captioned = caption_text(content[name], caption_request(content, request), content)
    return _clear_time_of_images(captioned, _count_named_images(content), content)


def _convert_pair(content: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """Convert one question and its answer at the top level of a json to this project's own form. Raise ValueError if
    there is neither a question nor a frame, or a turn is not text."""
    count, user = stated_frame_counts(content).get("frames"), content["user"]
    captioned = user is None or (isinstance(user, str) and not user.strip())
    if captioned and not (packed or count):
        raise ValueError("its user is empty, and it has no frames of which a caption could be asked")
    pair_content = dict(content) | ({"user": caption_request(content, UNNAMED_REQUEST)} if captioned else {})
    converted = own_text(pair_content | {"conversations": [{name: pair_content[name] for name in PAIR}]}, "", packed)
    if captioned:
        converted["conversations"][0]["kind"] = "caption"
    return converted


def stated_frame_counts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of images that a json in another form states, as `frames`: a number, a list if several numbers
    differ (then no number of images is accepted), or nothing."""
    counts = [content[name] for name in COUNTS if content.get(name) is not None]
    different = counts[:1] + [count for count in counts[1:] if count != counts[0]]
    return {"frames": different if len(different) > 1 else counts[0]} if counts else {}


def caption_request(content: Any, otherwise: str) -> str:
    """Return the request for a sample's caption, by the `source` in its json."""
    source = content.get("source") if isinstance(content, Mapping) else None
    return REQUESTS.get(source, otherwise) if isinstance(source, str) else otherwise


def _clear_time_of_images(converted: dict[str, Any], images: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text with fps=None if it is about several images: they have no common time, unless the json has a rate
    or names a video whose frames they are."""
    return converted if images < 2 or _names_video(content) else {"fps": None, **converted}


def caption_text(text: str, request: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Convert a caption to this project's own form. Raise ValueError if it is empty."""
    if not text.strip():
        raise ValueError("its caption is empty")
    return _convert_turns([("user", request), ("assistant", text.strip())], "caption", content or {}) | {SHOWN: True}


def media_key(content: Mapping[str, Any]) -> str | None:
    """Return the key of a json that names an image or a video; None if there is none. Without this image or video, the
    text would be learned as text about nothing."""
    for name, value in content.items():
        if value and MEDIA.fullmatch(name):
            return name
        values = value if isinstance(value, list) else [value]
        if MAY_NAME.search(name) and any(isinstance(each, str) and ENDING.search(each) for each in values):
            return name
    return None


def stated_media_kinds(content: Mapping[str, Any]) -> set[str]:
    """Return the kinds of media ("image", "video") that a json names, from the keys; none if a key does not show the
    kind, or an "image" key names a video."""
    names = [name for name, value in content.items() if media_key({name: value}) is not None]
    files = [content[name] for name in names]
    kinds = {kind for name in names for kind in BARE if name.lower().startswith(kind)}
    flat_files = [file for listed in files for file in (listed if isinstance(listed, list) else [listed])]
    if kinds == {"image"} and any(isinstance(file, str) and OF_VIDEO.search(file) for file in flat_files):
        return set()
    return kinds if all(name.lower().startswith(BARE) for name in names) else set()


def _convert_turns(turns: list[tuple[str, str]], kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    source = content.get("source")
    times = {"fps": content["fps"]} if "fps" in content else {}
    return (
        stated_frame_counts(content)
        | times
        | {
            "source": source if isinstance(source, str) else "",
            "conversations": [{"kind": kind, "turns": [{"role": role, "text": text} for role, text in turns]}],
        }
    )


def _add_answers(converted: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Add the annotators' answers in a sample's json to the evidence; their form is checked when the evidence is read.
    Raise ValueError if there are several questions: it is unknown which of them the answers belong to."""
    answers = content.get(ANSWERS)
    if answers is None or answers == []:
        return converted
    (conversation,) = converted["conversations"]
    questions = sum(turn["role"] == "assistant" for turn in conversation["turns"])
    if questions != 1:
        raise ValueError(
            f"its `{ANSWERS}` are of annotators to one question, and it has {questions}: leave them out, or make each "
            "question a sample"
        )
    return converted | {"conversations": [conversation | {"evidence": {ANSWERS: answers}}]}


def turns_of(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield (role, text with its placeholders) from an entry in any known form. Raise ValueError for other forms."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"a turn is no object but {str(entry)[:60]!r}")
    if "user" in entry and "assistant" in entry:
        role_contents = [("user", entry["user"]), ("assistant", entry["assistant"])]
    else:
        role_contents = [(entry.get("from", entry.get("role")), entry.get("value", entry.get("content")))]
    for role, content in role_contents:
        text = _join_items(content) if isinstance(content, list) else content
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"a turn has no role or no text; it has {_format_keys(entry)}")
        if role.lower() not in ROLES:
            raise ValueError(f"a turn is from {role[:40]!r}; known are {', '.join(ROLES)}")
        if ROLES[role.lower()] == "assistant" and isinstance(content, list) and not all(map(_is_text, content)):
            raise ValueError("an answer holds an image or a video, and only words are learned")
        yield ROLES[role.lower()], text


def files_of_items(entry: Mapping[str, Any]) -> list[str]:
    """Return the files that the items of a turn name, in order."""
    content = entry.get("value", entry.get("content"))
    file_names = []
    for item in content if isinstance(content, list) else []:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind in ("image", "video"):
            named = [item[key] for key in (kind, "path", "url") if isinstance(item.get(key), str) and item[key]]
            file_names += named[:1]
    return file_names


def with_system(turns: Sequence[tuple[str, str]], system: object) -> list[tuple[str, str]]:
    """Return (role, text) turns, preceded by the separate system text if they do not begin with a system turn."""
    if not isinstance(system, str) or not system.strip() or (turns and turns[0][0].lower() == "system"):
        return list(turns)
    return [("system", system), *turns]


def asked_in(turns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the texts of (role, text) turns that may contain placeholders: those of users and of the system."""
    return [text for role, text in turns if role != "assistant"]


def without_placeholders(turns: Sequence[tuple[str, str]], places: Placeholders) -> list[tuple[str, str]]:
    """Remove the placeholders from (role, text) turns of users and of the system.

    Raises:
        ValueError: the user's turns before an answer then have no words; inference does not accept such requests either
            (`keygrip.inference.prompts`).
    """
    stripped_turns = [(role, text if role == "assistant" else places.without(text)) for role, text in turns]
    user_texts: list[str] = []  # the user's texts before the next answer
    for role, text in stripped_turns:
        if role == "assistant" and user_texts and not any(map(str.strip, user_texts)):
            raise ValueError("an answer follows a user's turn without words: say what is asked beside the placeholder")
        user_texts = [] if role == "assistant" else [*user_texts, text] if role == "user" else user_texts
    return stripped_turns


def places_problem(places: int, shown: Collection[int]) -> str | None:
    """Return what is wrong with a text with `places` placeholders if the numbers `shown` of images or videos are valid;
    None if it has a valid number or no placeholder."""
    if not places or places in shown:
        return None
    valid = " or ".join(map(str, sorted(shown)))
    return (
        f"its text has {places} placeholders, and its images or videos are {valid}: give each its own, leave all out, "
        "or show several images as the frames of one <video>"
    )


def _count_named_images(content: Mapping[str, Any]) -> int:
    """Return how many images a json names; 0 if it also names a video, whose frames they may be."""
    if _names_video(content):
        return 0
    named: Any = next((content[name] for name in ("image", "images") if content.get(name)), [])
    return len(named) if isinstance(named, list) else 1


def _names_video(content: Mapping[str, Any]) -> bool:
    return any(content.get(name) for name in ("video", "videos"))


def _is_text(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "text" and isinstance(item.get("text"), str)


def _join_items(items: list[Any]) -> str:
    """Return the text of a turn that is a list of items. Raise ValueError if an item is of an unknown type."""
    words = []
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if _is_text(item):
            words.append(item["text"])
        elif kind in ("image", "video"):
            words.append(f"<|{kind}|>")  # cannot be confused with a word of the text
        else:
            raise ValueError(f"an item of a turn is {str(item)[:60]!r}; known are text, image and video")
    return "\n".join(words)


def _format_keys(content: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in [*content][:8]) or "nothing"
