"""Text of shards that other programs wrote, brought into the form of this project's own `json` member.

Read are: a caption in `txt`, or under `caption` or `text` of `json`; and turns under `conversations`, `messages` or
`texts`, each {"from", "value"}, {"role", "content"} or {"user", "assistant"}; content is text or a list of
{"type": "text" | "image" | "video"} items. Or, as the published model's own shards have it, one question at the top of
the json, {"user", "assistant", "source", "frame_count"}, whose `user` may be empty: then its `source` says what is
asked (`REQUESTS`), as it does of a caption. Each may say of how many images it is (`COUNTS`), and one question may have
`answers` of annotators beside it. Anything else is refused by what it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from keygrip.data.video_text.placeholders import BARE, Placeholders, standing_kinds

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHOWN = "shown"  # of text in this project's form: whether it is about an image or a video, so that frames belong to it
PLACES = "places"  # of text in another form: for how many images or videos it has placeholders
# Keys of a json that name images and videos whatever they hold: image, videos, media, video_path, image_urls, ...
MEDIA = re.compile(r"(image|video|media)s?(_?(path|file|filename|file_name|name|url|uri)s?)?", re.IGNORECASE)
# ... and those that do where they hold a name with such an ending.
MAY_NAME = re.compile(r"clip|file|frame|image|img|media|path|photo|picture|url|video", re.IGNORECASE)
ENDING = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|webm|mkv|mov|avi|m4v)$", re.IGNORECASE)
OF_VIDEO = re.compile(r"\.(gif|mp4|webm|mkv|mov|avi|m4v)$", re.IGNORECASE)
CAPTIONS, TURNS = ("caption", "text"), ("conversations", "messages", "texts")
PAIR = ("user", "assistant")
ANSWERS = "answers"  # of annotators: in a json, beside one question, and in the evidence
COUNTS = ("frame_count", "num_frames")  # keys of a json that say how many images belong to a text
# What the published model was asked for captions, by the `source` of a sample, and where that is another one.
REQUESTS = {
    "openvid": "Write a brief caption for this video.",
    "webvid": "What would be the WebVid caption for this video?",
    "vript": "Provide a detailed narration of what happens in this video.",
    "sharegpt4video": "Describe what happens in this video in detail.",
}
UNNAMED_REQUEST = "Describe this."


def holds_text(content: Any) -> bool:
    """Whether a sample's json has turns, well-formed or not, or a caption of words."""
    if not isinstance(content, Mapping):
        return isinstance(content, list)
    return any(map(content.get, TURNS)) or _caption(content) is not None or is_pair(content)


def _caption(content: Mapping[str, Any]) -> str | None:
    """The key of a json's caption: the first that holds words."""
    return next((name for name in CAPTIONS if isinstance(content.get(name), str) and content[name].strip()), None)


def is_pair(content: Mapping[str, Any]) -> bool:
    """Whether a json has one question and its answer at its top, well-formed or not, and no turns or caption: either
    key alone, or beside a caption, is what downloaders note of an uploader or of a model."""
    told = any(map(content.get, TURNS)) or _caption(content) is not None
    return "user" in content and bool(content.get("assistant")) and not told


def own_text(content: Any, request: str, packed: bool = False) -> dict[str, Any]:
    """The json of a sample in this project's own form.

    Args:
        content: as parsed. request: the user's turn before a caption. packed: an image or a video lies beside it.

    Raises:
        ValueError: it holds neither turns nor a caption.
    """
    if isinstance(content, list):
        content = {"conversations": content}
    if not isinstance(content, Mapping):
        raise ValueError("its json is no object")
    name = next((name for name in TURNS if content.get(name)), None)
    if is_pair(content):
        return _of_pair(content, packed)
    if name is not None:
        turns = content[name]
        if not isinstance(turns, list):
            raise ValueError(f"the {name} of its json are no list")
        if name == "conversations" and isinstance(turns[0], Mapping) and "turns" in turns[0]:
            return dict(content) | {SHOWN: media_key(content) is not None, PLACES: 0}
        said = [turn for each in turns for turn in turns_of(each)]
        said = with_system(said, content.get("system"))
        named, asked = media_key(content) is not None, asked_in(said)
        # a sample has media of one kind, which the text may say where no key does
        kinds = kinds_named(content) or standing_kinds(asked) or BARE
        places = Placeholders.of(asked, kinds if packed or named else ())
        count, images = places.count(asked), _named_images(content)
        of_video = places.of_one_video(asked)
        if images and (problem := places_problem(count, {images, 1} if of_video else {images})):
            raise ValueError(problem)
        said = without_placeholders(said, places)
        own = _answered(_of_turns(said, "text", content), content) | {SHOWN: named or count > 0, PLACES: count}
        return own if of_video else _timed(own, max(count, images), content)
    name = _caption(content)
    odd = [each for each in CAPTIONS if content.get(each) and not isinstance(content[each], str)]
    if name is None and odd:
        raise ValueError(f"the {odd[0]} of its json is a {type(content[odd[0]]).__name__}, not text")
    empty = [each for each in (*TURNS, *CAPTIONS) if each in content]
    empty += ["assistant"] if "user" in content and "assistant" in content else []
    if name is None and empty:
        raise ValueError(f"the {empty[0]} of its json is empty ({json.dumps(content[empty[0]])[:20]})")
    if name is None:
        known = ", ".join((*TURNS, *CAPTIONS, " with ".join(PAIR)))
        raise ValueError(f"its json holds none of {known}; it holds {_listed(content)}")
    captioned = caption_text(content[name], caption_request(content, request), content)
    return _timed(captioned, _named_images(content), content)


def _of_pair(content: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """A sample's one question and answer at the top of its json, in this project's own form. Raises ValueError: nothing
    is asked of nothing, or a turn is no text."""
    count, user = frames_told(content).get("frames"), content["user"]
    captioned = user is None or (isinstance(user, str) and not user.strip())
    if captioned and not (packed or count):
        raise ValueError("its user is empty, and it has no frames of which a caption could be asked")
    told = dict(content) | ({"user": caption_request(content, UNNAMED_REQUEST)} if captioned else {})
    own = own_text(told | {"conversations": [{name: told[name] for name in PAIR}]}, "", packed)
    if captioned:
        own["conversations"][0]["kind"] = "caption"
    return own


def frames_told(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of how many images a json in another form says that it is, as `frames`: a number, a list of those that differ (no
    number of images is right then), or nothing."""
    told = [content[name] for name in COUNTS if content.get(name) is not None]
    different = told[:1] + [count for count in told[1:] if count != told[0]]
    return {"frames": different if len(different) > 1 else told[0]} if told else {}


def caption_request(content: Any, otherwise: str) -> str:
    """What is asked for a caption of a sample, by the `source` that its json names."""
    source = content.get("source") if isinstance(content, Mapping) else None
    return REQUESTS.get(source, otherwise) if isinstance(source, str) else otherwise


def _timed(own: dict[str, Any], images: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """A text of so many images, which have no common time unless its json names a rate, or a video whose frames they
    are."""
    return own if images < 2 or _names_video(content) else {"fps": None, **own}


def caption_text(text: str, request: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A caption in this project's own form. Raises ValueError: it is empty."""
    if not text.strip():
        raise ValueError("its caption is empty")
    return _of_turns([("user", request), ("assistant", text.strip())], "caption", content or {}) | {SHOWN: True}


def media_key(content: Mapping[str, Any]) -> str | None:
    """The key of a json that names an image or a video: alone without it, its text would be learned as text about
    nothing. None: there is none."""
    for name, value in content.items():
        if value and MEDIA.fullmatch(name):
            return name
        held = value if isinstance(value, list) else [value]
        if MAY_NAME.search(name) and any(isinstance(each, str) and ENDING.search(each) for each in held):
            return name
    return None


def kinds_named(content: Mapping[str, Any]) -> set[str]:
    """Of which kinds ("image", "video") a json names media, by their keys; none where a key says nothing of it, or
    "image" of a video."""
    names = [name for name, value in content.items() if media_key({name: value}) is not None]
    files = [content[name] for name in names]
    kinds = {kind for name in names for kind in BARE if name.lower().startswith(kind)}
    each = [file for listed in files for file in (listed if isinstance(listed, list) else [listed])]
    if kinds == {"image"} and any(isinstance(file, str) and OF_VIDEO.search(file) for file in each):
        return set()
    return kinds if all(name.lower().startswith(BARE) for name in names) else set()


def _of_turns(turns: list[tuple[str, str]], kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    source = content.get("source")
    times = {"fps": content["fps"]} if "fps" in content else {}
    return (
        frames_told(content)
        | times
        | {
            "source": source if isinstance(source, str) else "",
            "conversations": [{"kind": kind, "turns": [{"role": role, "text": text} for role, text in turns]}],
        }
    )


def _answered(own: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's text with the answers of annotators that its json has, in the evidence; their form is checked where
    that is read. Raises ValueError: they are of one of several questions, and which one is not said."""
    given = content.get(ANSWERS)
    if given is None or given == []:
        return own
    (conversation,) = own["conversations"]
    asked = sum(turn["role"] == "assistant" for turn in conversation["turns"])
    if asked != 1:
        raise ValueError(
            f"its `{ANSWERS}` are of annotators to one question, and it has {asked}: leave them out, or make each "
            "question a sample"
        )
    return own | {"conversations": [conversation | {"evidence": {ANSWERS: given}}]}


def turns_of(entry: Any) -> Iterator[tuple[str, str]]:
    """(role, text with its placeholders) of an entry of any of the known forms. Raises ValueError: it has another."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"a turn is no object but {str(entry)[:60]!r}")
    if "user" in entry and "assistant" in entry:
        found = [("user", entry["user"]), ("assistant", entry["assistant"])]
    else:
        found = [(entry.get("from", entry.get("role")), entry.get("value", entry.get("content")))]
    for role, said in found:
        text = _joined(said) if isinstance(said, list) else said
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"a turn has no role or no text; it has {_listed(entry)}")
        if role.lower() not in ROLES:
            raise ValueError(f"a turn is from {role[:40]!r}; known are {', '.join(ROLES)}")
        if ROLES[role.lower()] == "assistant" and isinstance(said, list) and not all(map(_is_text, said)):
            raise ValueError("an answer holds an image or a video, and only words are learned")
        yield ROLES[role.lower()], text


def files_of_items(entry: Mapping[str, Any]) -> list[str]:
    """The files that the items of a turn name themselves, in their order."""
    content = entry.get("value", entry.get("content"))
    found = []
    for item in content if isinstance(content, list) else []:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind in ("image", "video"):
            named = [item[key] for key in (kind, "path", "url") if isinstance(item.get(key), str) and item[key]]
            found += named[:1]
    return found


def with_system(turns: Sequence[tuple[str, str]], system: object) -> list[tuple[str, str]]:
    """(role, text) of turns behind the system turn that stands beside them, where they begin with none of their own."""
    if not isinstance(system, str) or not system.strip() or (turns and turns[0][0].lower() == "system"):
        return list(turns)
    return [("system", system), *turns]


def asked_in(turns: Sequence[tuple[str, str]]) -> list[str]:
    """The texts of (role, text) turns in which placeholders stand: those of users and of the system."""
    return [text for role, text in turns if role != "assistant"]


def without_placeholders(turns: Sequence[tuple[str, str]], places: Placeholders) -> list[tuple[str, str]]:
    """(role, text) of turns, those of users and of the system without placeholders.

    Raises:
        ValueError: what an answer follows has no words then; no model is asked so (`keygrip.inference.prompts`).
    """
    said = [(role, text if role == "assistant" else places.without(text)) for role, text in turns]
    before: list[str] = []  # the answer
    for role, text in said:
        if role == "assistant" and before and not any(map(str.strip, before)):
            raise ValueError("an answer follows a user's turn without words: say what is asked beside the placeholder")
        before = [] if role == "assistant" else [*before, text] if role == "user" else before
    return said


def places_problem(places: int, shown: Collection[int]) -> str | None:
    """What is wrong with a text that has so many placeholders where so many images or videos are shown (any of the
    numbers); None: nothing, or it has no placeholder."""
    if not places or places in shown:
        return None
    known = " or ".join(map(str, sorted(shown)))
    return (
        f"its text has {places} placeholders, and its images or videos are {known}: give each its own, leave all out, "
        "or show several images as the frames of one <video>"
    )


def _named_images(content: Mapping[str, Any]) -> int:
    """How many images a json names beside no video, of which they may be frames; 0: none."""
    if _names_video(content):
        return 0
    named: Any = next((content[name] for name in ("image", "images") if content.get(name)), [])
    return len(named) if isinstance(named, list) else 1


def _names_video(content: Mapping[str, Any]) -> bool:
    return any(content.get(name) for name in ("video", "videos"))


def _is_text(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "text" and isinstance(item.get("text"), str)


def _joined(items: list[Any]) -> str:
    """The text of a turn that is a list of items. Raises ValueError: an item is none of the known."""
    words = []
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if _is_text(item):
            words.append(item["text"])
        elif kind in ("image", "video"):
            words.append(f"<|{kind}|>")  # no word of the text beside it can be taken for it
        else:
            raise ValueError(f"an item of a turn is {str(item)[:60]!r}; known are text, image and video")
    return "\n".join(words)


def _listed(content: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in [*content][:8]) or "nothing"
