"""Images that stand in a tar under keys of their own, beside the text that is about them.

A sample is all files of one key. Some programs give every frame a key: KEY_000.jpg, KEY_001.jpg, ... beside KEY.json.
Those are brought together here, as the parts 000.jpg, 001.jpg, ... of KEY. Of other layouts (images/a.jpg beside
texts/a.json, a folder for each sample) the texts are refused: alone, each would be learned as text about nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

Member = tuple[str, int, int]
TEXT = ("json", "txt")
IMAGES = ("jpg", "jpeg", "png", "webp")
MEDIA = re.compile(
    r"(^|\.)(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jp2|jfif|npy|npz|mp4|webm|mkv|avi|mov|m4v|mpe?g|ts)$",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"(.+)_(\d{1,6})", re.DOTALL)
HOW = (
    "read are KEY.00.jpg KEY.01.jpg ..., KEY_000.jpg KEY_001.jpg ... or one KEY.jpg or KEY.mp4 beside KEY.json in one "
    "tar, where KEY is folder and name: pack them so, or take out of the tar what belongs to no text"
)
ELSEWHERE = "not all of its images are in its tar:"  # how the reason of a sample begins that only a whole set shows


def gathered(
    parts: Mapping[str, Sequence[Member]], bad: Collection[str]
) -> tuple[dict[str, list[Member]], dict[str, str]]:
    """The members of a tar by sample, and the texts that are refused.

    Args:
        parts: by key, (name, offset, bytes). bad: keys that cannot be samples.

    Returns:
        By key, the members, with those of the keys KEY_<digits> at KEY where KEY has text and no image or video, and
        each of them is one JPEG, PNG or WebP file and nothing else; by key, the reason of each text without an image
        or a video that may be about one which has a key of its own and is not read with it.
    """
    members = {key: list(each) for key, each in parts.items()}
    texts = {key for key, each in parts.items() if _has_text(each)}
    shown = {key for key, each in parts.items() if _has_media(each)}
    alone = {key: None for key in parts if key in texts and key not in shown and key not in bad}  # in their order
    if not alone or not shown - texts:
        return members, {}
    frames: dict[str, list[str]] = {}
    for key in parts:
        if (match := NUMBERED.fullmatch(key)) and match[1] in alone:
            frames.setdefault(match[1], []).append(key)
    for stem, keys in frames.items():
        # where some cannot be read or are samples themselves, the others alone would be a part of a video
        if all(key not in bad and _is_image(parts[key]) for key in keys):
            numbered = sorted((int(key[len(stem) + 1 :]), key) for key in keys)
            for _, key in numbered:
                ((ending, offset, size),) = members.pop(key)
                members[stem].append((f"{key[len(stem) + 1 :]}.{ending}", offset, size))
            del alone[stem]
            shown.add(stem)
            shown.difference_update(keys)
    return members, _refused(alone, sorted(shown - texts), shown & texts, parts)


def textless(parts: Mapping[str, Sequence[Member]]) -> list[str]:
    """Keys with images or videos and no text, of the members that `gathered` gives."""
    return [key for key, each in parts.items() if _has_media(each) and not _has_text(each)]


class TextlessImages:
    """The images and videos without text of all tars of a set.

    Args:
        keys: of each, the key and the name of its tar.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self._numbered: dict[str, list[tuple[str, str]]] = {}
        self._named: dict[str, list[tuple[str, str]]] = {}
        for key, tar in keys:
            if match := NUMBERED.fullmatch(key):
                self._numbered.setdefault(match[1], []).append((key, tar))
            name = _last(key)[1]
            for each in {name, _without_number(name)}:
                self._named.setdefault(each, []).append((key, tar))

    def divided(self, samples: Mapping[str, Sequence[str]], tar: str) -> dict[str, str]:
        """By key, the reasons of the samples of a tar whose images stand in another one, all or some.

        Args:
            samples: by key, the names of its members. tar: its name.
        """
        found = {}
        for key, members in samples.items():
            shown = [name for name in members if MEDIA.search(name)]
            known = {int(number) for name in shown if (number := name.partition(".")[0]).isdecimal()}
            if shown and not known:  # one image or one video
                continue
            numbered = self._numbered.get(key, ())
            images = [each for each in numbered if int(each[0].rpartition("_")[2]) not in known]
            if not shown:
                images += self._named.get(_last(key)[1], ())
            image, place = next((each for each in images if each[1] != tar), ("", ""))
            if image:
                found[key] = (
                    f"{ELSEWHERE} {place} has {image} without text, so that its text may be about that: pack all files "
                    "of a sample into one tar"
                )
        return found


def _refused(
    alone: Collection[str], images: Sequence[str], whole: Collection[str], parts: Mapping[str, Sequence[Member]]
) -> dict[str, str]:
    """By key, why a text is refused.

    Args:
        alone: keys of texts without an image or a video. images: keys of images and videos without text. whole: keys
            with both. parts: the members of all.
    """
    tied = {tie: image for image in reversed(images) for tie in _ties_of_image(image)}
    ties = {tie for text in alone for tie in _ties_of_text(text)}
    # Of folders, what no name ties to a text: with fewer of these than whole samples, they are samples that lost their
    # texts; with more, they lie beside texts in a layout of which nothing is known, such as a folder for each sample.
    left = {_without_number(image): image for image in images if not any(tie in ties for tie in _ties_of_image(image))}
    left_in = Counter(_last(image)[0] for image in left)
    whole_in = Counter(_last(key)[0] for key in whole)
    layouts = {folder: image for image in left.values() if left_in[folder := _last(image)[0]] > whole_in[folder]}
    found = {}
    for text in alone:
        image = next((tied[tie] for tie in _ties_of_text(text) if tie in tied), None) or layouts.get(_last(text)[0])
        if image is not None:
            found[text] = (
                f"it has no image or video under its key, and {image}.{parts[image][0][0]} in the same tar has no text "
                f"under its own, so that its text may be about that: {HOW}"
            )
    return found


def _ties_of_image(key: str) -> Iterator[tuple[str, str]]:
    """What an image has in common with texts that may be about it: see `_ties_of_text`."""
    folder, name = _last(key)
    yield from (("key", beginning) for beginning in _beginnings(key))
    yield from (("name", each) for each in dict.fromkeys((name, _without_number(name), *([folder] if folder else []))))
    yield from (("beginning", key.lower()), ("folder", name))


def _ties_of_text(key: str) -> Iterator[tuple[str, str]]:
    """Its key, with which that of an image begins; its name, which an image or its folder has; the beginnings of its
    key and its folder, of which one is an image's."""
    folder, name = _last(key)
    yield from (("key", key.lower()), ("name", name))
    yield from (("beginning", beginning) for beginning in _beginnings(key))
    yield from [("folder", folder)] if folder else []


def _has_text(members: Sequence[Member]) -> bool:
    return any(name.lower() in TEXT for name, _, _ in members)


def _has_media(members: Sequence[Member]) -> bool:
    return any(MEDIA.search(name) for name, _, _ in members)


def _is_image(members: Sequence[Member]) -> bool:
    return [name.lower() in IMAGES for name, _, _ in members] == [True]


def _last(key: str) -> tuple[str, str]:
    """The name of a key's folder ("": none) and the key in it, in lower case."""
    folder, _, name = key.lower().rpartition("/")
    return folder.rpartition("/")[2], name


def _without_number(key: str) -> str:
    match = NUMBERED.fullmatch(key)
    return match[1] if match else key


def _beginnings(key: str) -> Iterator[str]:
    """What a key begins with, in lower case, before each character that is no letter and no digit."""
    key = key.lower()
    yield from (key[:place] for place, letter in enumerate(key) if place and not letter.isalnum())
