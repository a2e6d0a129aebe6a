"""Images in a tar that have other keys than the text about them.

A sample consists of all files with one key. Some programs give every frame its own key: KEY_000.jpg, KEY_001.jpg, ...
together with KEY.json. These frames are joined here, as the parts 000.jpg, 001.jpg, ... of KEY. In other layouts
(images/a.jpg with texts/a.json, a folder for each sample) the texts are refused: without its images, each would be
learned as text about nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

Member = tuple[str, int, int]
Tie = tuple[str, str]  # a possible relation of an image and a text: its kind, and the name that both have in common
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
ELSEWHERE = "not all of its images are in its tar:"  # beginning of a reason that only the whole set can show


def group_members(
    parts: Mapping[str, Sequence[Member]], bad: Collection[str]
) -> tuple[dict[str, list[Member]], dict[str, str]]:
    """Group the members of a tar by sample, and find the texts that must be refused.

    Args:
        parts: by key, (name, offset, bytes). bad: keys that cannot be samples.

    Returns:
        First, the members by key. Members of the keys KEY_<digits> are moved to KEY if KEY has text and no image or
        video, and each of these keys has exactly one JPEG, PNG or WebP file and nothing else. Second, the refused texts
        by key with the reason: texts without an image or a video that may be about one with a different key.
    """
    members = {key: list(part_members) for key, part_members in parts.items()}
    texts = {key for key, part_members in parts.items() if _has_text(part_members)}
    with_media = {key for key, part_members in parts.items() if _has_media(part_members)}
    alone = {key: None for key in parts if key in texts and key not in with_media and key not in bad}  # keeps the order
    if not alone or not with_media - texts:
        return members, {}
    frames: dict[str, list[str]] = {}
    for key in parts:
        if (match := NUMBERED.fullmatch(key)) and match[1] in alone:
            frames.setdefault(match[1], []).append(key)
    for stem, keys in frames.items():
        # if some of them are unreadable or are samples themselves, the others would be an incomplete video
        if all(key not in bad and _is_image(parts[key]) for key in keys):
            numbered = sorted((int(key[len(stem) + 1 :]), key) for key in keys)
            for _, key in numbered:
                ((ending, offset, size),) = members.pop(key)
                members[stem].append((f"{key[len(stem) + 1 :]}.{ending}", offset, size))
            del alone[stem]
            with_media.add(stem)
            with_media.difference_update(keys)
    return members, _find_refused_texts(alone, sorted(with_media - texts), with_media & texts, parts)


def media_without_text(parts: Mapping[str, Sequence[Member]]) -> dict[str, tuple[str, ...]]:
    """Return by key the names of images and videos without text, from the members that `group_members` returns."""
    return {
        key: tuple(name for name, _, _ in members if MEDIA.search(name))
        for key, members in parts.items()
        if _has_media(members) and not _has_text(members)
    }


class TextlessImages:
    """The images and videos without text in all tars of a set, used to find samples that are divided between tars.
    First call `add` for every tar, then `divided`."""

    def __init__(self) -> None:
        self._numbered: dict[str, list[tuple[str, str]]] = {}  # by the text before the number, (key, tar)
        self._named: dict[str, list[tuple[str, str]]] = {}  # by name, the first (key, tar) of every tar
        self._own: dict[str, list[tuple[Sequence[str], str]]] = {}  # by key, the names of its images, and the tar

    def __bool__(self) -> bool:
        """Whether there are any images or videos without text."""
        return bool(self._named)

    def add(self, tar: str, images: Mapping[str, Sequence[str]]) -> None:
        """Add the images and videos without text of the tar named `tar`: their names by key."""
        for key, names in images.items():
            self._own.setdefault(key, []).append((names, tar))
            if (stem := _strip_number(key)) != key:
                self._numbered.setdefault(stem, []).append((key, tar))
            name = _last(key)[1]
            for base_name in dict.fromkeys((name, _strip_number(name))):
                entries = self._named.setdefault(base_name, [])
                if not entries or entries[-1][1] != tar:
                    entries.append((key, tar))

    def divided(self, samples: Mapping[str, Sequence[str]], tar: str) -> dict[str, str]:
        """Return the samples of a tar whose images are all or partly in another tar: by key, the reason.

        This includes sets whose keys start again in every tar. An image in another tar may have lost its text, or this
        sample may continue there. The two cases cannot be distinguished, and in the second case an incomplete video
        would be learned. An image with this sample's key and a number that the sample has itself belongs to another
        sample, which has lost its text.

        Args:
            samples: by key, the names of the sample's members. tar: name of the tar.
        """
        reasons = {}
        for key, members in samples.items():
            media = [name for name in members if MEDIA.search(name)]
            frame_numbers = {int(digits) for name in media if (digits := name.partition(".")[0]).isdecimal()}
            own_images = self._own.get(key, ())
            places = set(map(_image_position, media)) if own_images else set()
            images = [
                (f"{key}.{name}", archive)
                for names, archive in own_images
                for name in names
                if _image_position(name) not in places
            ]
            if frame_numbers or not media:  # otherwise the sample is one image or video, and KEY_1 is not part of it
                images += [
                    candidate
                    for candidate in self._numbered.get(key, ())
                    if int(candidate[0].rpartition("_")[2]) not in frame_numbers
                ]
            if not media:
                images += self._named.get(_last(key)[1], ())
            image, archive = next((candidate for candidate in images if candidate[1] != tar), ("", ""))
            if image:
                reasons[key] = (
                    f"{ELSEWHERE} {archive} has {image} without text, so that its text may be about that: pack all "
                    "files of a sample into one tar"
                )
        return reasons


def _find_refused_texts(
    lone_texts: Collection[str],
    images: Sequence[str],
    complete_keys: Collection[str],
    parts: Mapping[str, Sequence[Member]],
) -> dict[str, str]:
    """Return the texts that are refused: by key, the reason.

    Args:
        lone_texts: keys of texts without an image or a video. images: keys of images and videos without text.
        complete_keys: keys with both. parts: the members of all keys.
    """
    image_keys = {image.lower(): image for image in reversed(images)}
    text_keys = {text.lower() for text in lone_texts}
    begins = chain(
        _match_key_prefixes(text_keys, image_keys),
        ((text, image) for image, text in _match_key_prefixes(image_keys, text_keys)),
    )
    tied: dict[Tie, str] = {}
    explained = set()
    for text, image in begins:
        tied.setdefault(("key", text), image_keys[image])
        explained.add(image)
    text_ties = {tie for text in lone_texts for tie in _ties_of_text(text)}
    unexplained: dict[str, str] = {}
    for image in images:
        image_ties = [tie for tie in _ties_of_image(image) if tie in text_ties]
        for tie in image_ties:
            tied.setdefault(tie, image)
        if not image_ties and image.lower() not in explained:
            unexplained[_strip_number(image)] = image
    # Images in a folder that are related to no text by their names: if they are at most as many as complete samples,
    # they are samples that lost their texts. If they are more, images and texts are in an unknown layout, such as a
    # folder for each sample or many questions about each image.
    left_in = Counter(_last(image)[0] for image in unexplained)
    whole_in = Counter(_last(key)[0] for key in complete_keys)
    layouts = {folder: image for image in unexplained.values() if left_in[folder := _last(image)[0]] > whole_in[folder]}
    reasons = {}
    for text in lone_texts:
        ties = (("key", text.lower()), *_ties_of_text(text))
        near = next((tied[tie] for tie in ties if tie in tied), None) or layouts.get(_last(text)[0])
        if near is not None:
            reasons[text] = (
                f"it has no image or video under its key, and {near}.{parts[near][0][0]} in the same tar has no text "
                f"under its own, so that its text may be about that: {HOW}"
            )
    return reasons


def _match_key_prefixes(prefixes: Iterable[str], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a beginning and a key that continues after it with a character that is no letter and no digit.

    In sorted order, keys with the same beginning are adjacent. So only the beginnings that match the current key are
    stored, and not all possible beginnings of every key: a long key has hundreds.
    """
    open_ones: list[str] = []
    for key, goes_on in sorted({*((each, False) for each in prefixes), *((each, True) for each in keys)}):
        while open_ones and not key.startswith(open_ones[-1]):
            open_ones.pop()
        if goes_on:
            yield from ((each, key) for each in open_ones if each != key and not key[len(each)].isalnum())
        else:
            open_ones.append(key)


def _ties_of_image(key: str) -> Iterator[Tie]:
    """Yield the names by which an image can be related to a text, in addition to equal beginnings of their keys: the
    image's name or folder may be the name of a text, and the image's name may be the folder of a text."""
    folder, name = _last(key)
    yield from (("name", each) for each in dict.fromkeys((name, _strip_number(name), *([folder] if folder else []))))
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


def _image_position(name: str) -> int | str:
    """Return the position of an image in its sample, from its name (without a number: the first); for a video, the
    name itself."""
    number, _, ending = name.lower().rpartition(".")
    if ending not in IMAGES:
        return name.lower()
    return int(number or 0) if (number or "0").isdecimal() else name.lower()


def _last(key: str) -> tuple[str, str]:
    """Return the name of a key's last folder ("": none) and the key inside that folder, in lower case."""
    folder, _, name = key.lower().rpartition("/")
    return folder.rpartition("/")[2], name


def _strip_number(key: str) -> str:
    match = NUMBERED.fullmatch(key)
    return match[1] if match else key
