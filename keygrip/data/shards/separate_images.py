"""Images that stand in a tar under keys of their own, beside the text that is about them.

A sample is all files of one key. Some programs give every frame a key: KEY_000.jpg, KEY_001.jpg, ... beside KEY.json.
Those are brought together here, as the parts 000.jpg, 001.jpg, ... of KEY. Of other layouts (images/a.jpg beside
texts/a.json, a folder for each sample) the texts are refused: alone, each would be learned as text about nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

Member = tuple[str, int, int]
Tie = tuple[str, str]  # of an image and a text: its kind, and what both have
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


def textless(parts: Mapping[str, Sequence[Member]]) -> dict[str, tuple[str, ...]]:
    """By key, the names of images and videos that have no text, of the members that `gathered` gives."""
    return {
        key: tuple(name for name, _, _ in each if MEDIA.search(name))
        for key, each in parts.items()
        if _has_media(each) and not _has_text(each)
    }


class TextlessImages:
    """The images and videos without text of all tars of a set, which show the samples that are divided between tars:
    every tar is first given to `add`, then `divided` answers."""

    def __init__(self) -> None:
        self._numbered: dict[str, list[tuple[str, str]]] = {}  # by what stands before the number, (key, tar)
        self._named: dict[str, list[tuple[str, str]]] = {}  # by name, the first (key, tar) of every tar
        self._own: dict[str, list[tuple[Sequence[str], str]]] = {}  # by key, the names of its images, and the tar

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._named)

    def add(self, tar: str, images: Mapping[str, Sequence[str]]) -> None:
        """Takes the images and videos without text of a tar, whose name is `tar`: their names by key."""
        for key, names in images.items():
            self._own.setdefault(key, []).append((names, tar))
            if (stem := _without_number(key)) != key:
                self._numbered.setdefault(stem, []).append((key, tar))
            name = _last(key)[1]
            for each in dict.fromkeys((name, _without_number(name))):
                known = self._named.setdefault(each, [])
                if not known or known[-1][1] != tar:
                    known.append((key, tar))

    def divided(self, samples: Mapping[str, Sequence[str]], tar: str) -> dict[str, str]:
        """By key, the reasons of the samples of a tar whose images stand in another one, all or some.

        Keys that begin anew in every tar are no exception: whether an image has lost its text, or its sample goes on in
        the next tar, cannot be told apart, and the second would be learned as a part of a video. An image of this
        sample's key and number in another tar is another sample's, which has lost its text.

        Args:
            samples: by key, the names of its members. tar: its name.
        """
        found = {}
        for key, members in samples.items():
            shown = [name for name in members if MEDIA.search(name)]
            known = {int(number) for name in shown if (number := name.partition(".")[0]).isdecimal()}
            own = self._own.get(key, ())
            places = set(map(_place, shown)) if own else set()
            images = [(f"{key}.{name}", place) for names, place in own for name in names if _place(name) not in places]
            if known or not shown:  # otherwise it is one image or one video, and KEY_1 no part of it
                images += [each for each in self._numbered.get(key, ()) if int(each[0].rpartition("_")[2]) not in known]
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
    keys = {image.lower(): image for image in reversed(images)}
    asked = {text.lower() for text in alone}
    begins = chain(_begins(asked, keys), ((text, image) for image, text in _begins(keys, asked)))
    tied: dict[Tie, str] = {}
    explained = set()
    for text, image in begins:
        tied.setdefault(("key", text), keys[image])
        explained.add(image)
    known = {tie for text in alone for tie in _ties_of_text(text)}
    unexplained: dict[str, str] = {}
    for image in images:
        own = [tie for tie in _ties_of_image(image) if tie in known]
        for tie in own:
            tied.setdefault(tie, image)
        if not own and image.lower() not in explained:
            unexplained[_without_number(image)] = image
    # Of folders, what no name ties to a text: with fewer of these than whole samples, they are samples that lost their
    # texts; with more, they lie beside texts in a layout of which nothing is known, such as a folder for each sample or
    # many questions about each image.
    left_in = Counter(_last(image)[0] for image in unexplained)
    whole_in = Counter(_last(key)[0] for key in whole)
    layouts = {folder: image for image in unexplained.values() if left_in[folder := _last(image)[0]] > whole_in[folder]}
    found = {}
    for text in alone:
        ties = (("key", text.lower()), *_ties_of_text(text))
        near = next((tied[tie] for tie in ties if tie in tied), None) or layouts.get(_last(text)[0])
        if near is not None:
            found[text] = (
                f"it has no image or video under its key, and {near}.{parts[near][0][0]} in the same tar has no text "
                f"under its own, so that its text may be about that: {HOW}"
            )
    return found


def _begins(beginnings: Iterable[str], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a beginning and a key that goes on after it with a character that is no letter and no digit.

    In sorted order all that begins alike stands together, so that the beginnings of one key are kept and not, of every
    key, all that it may begin with: those of a long key are hundreds.
    """
    open_ones: list[str] = []
    for key, goes_on in sorted({*((each, False) for each in beginnings), *((each, True) for each in keys)}):
        while open_ones and not key.startswith(open_ones[-1]):
            open_ones.pop()
        if goes_on:
            yield from ((each, key) for each in open_ones if each != key and not key[len(each)].isalnum())
        else:
            open_ones.append(key)


def _ties_of_image(key: str) -> Iterator[Tie]:
    """What an image has in common with texts that may be about it, beside what their keys begin with: its name and its
    folder may be called as a text, and its name as the folder of one."""
    folder, name = _last(key)
    yield from (("name", each) for each in dict.fromkeys((name, _without_number(name), *([folder] if folder else []))))
    yield ("folder", name)


def _ties_of_text(key: str) -> Iterator[Tie]:
    folder, name = _last(key)
    yield ("name", name)
    yield from [("folder", folder)] if folder else []


def _has_text(members: Sequence[Member]) -> bool:
    return any(name.lower() in TEXT for name, _, _ in members)


def _has_media(members: Sequence[Member]) -> bool:
    return any(MEDIA.search(name) for name, _, _ in members)


def _is_image(members: Sequence[Member]) -> bool:
    return [name.lower() in IMAGES for name, _, _ in members] == [True]


def _place(name: str) -> int | str:
    """Of an image in its sample, as its name says it: one without a number is the first. A video has its name."""
    number, _, ending = name.lower().rpartition(".")
    if ending not in IMAGES:
        return name.lower()
    return int(number or 0) if (number or "0").isdecimal() else name.lower()


def _last(key: str) -> tuple[str, str]:
    """The name of a key's folder ("": none) and the key in it, in lower case."""
    folder, _, name = key.lower().rpartition("/")
    return folder.rpartition("/")[2], name


def _without_number(key: str) -> str:
    match = NUMBERED.fullmatch(key)
    return match[1] if match else key
