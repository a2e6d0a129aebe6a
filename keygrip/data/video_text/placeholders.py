"""Marks in the text of other programs' conversations of where an image or a video goes; here the model decides that.

They are looked for in the turns of users and of the system: what an assistant says is learned as it is, code and HTML
with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

# Also the tags of HTML: what `Placeholders.of` decides.
BARE = ("image", "video")
# <image_1>, <|video|>, <|vision_start|><|image_pad|><|vision_end|>: no words of any text. <img>a.jpg</img> is of
# Qwen-VL, <IMG_CONTEXT> of InternVL (one for each token of an image), <start_of_image> of Gemma.
MARKS = (
    r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)+<\|vision_end\|>|<\|vision_(?:start|end)\|>|"
    r"<\|?(?:image|video)(?:_?\d+|_pad)\|?>|<\|(?:image|video)\|?>|<(?:image|video)\|>|"
    r"<img>(?:<IMG_CONTEXT>|[^<>])*</img>|(?:<IMG_CONTEXT>)+|<start_of_image>"
)
NO_PLACE = re.compile(r"<\|vision_(?:start|end)\|>", re.IGNORECASE)  # alone it stands beside the one that counts
NUMBERED = re.compile(r"<\|?(?:image|video)_?(\d+)\|?>", re.IGNORECASE)
LINE_ENDS = re.compile(r"^[ \t]*<(?:image|video)>|<(?:image|video)>[ \t]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Placeholders:
    """The placeholders of a conversation.

    Args:
        bare: those of <image> and <video> that are placeholders in it, and no words.
    """

    bare: tuple[str, ...] = BARE

    @classmethod
    def of(cls, asked: Sequence[str], shown: Collection[str]) -> Placeholders:
        """What counts in the turns of a user and a system, beside images and videos of which kinds ("image", "video").

        "How does the <video> tag work?" has none: without media, <image> and <video> count only where one of them
        begins or ends a line; so does <video> where images alone are shown, and not at all beside an <image> that
        stands so, and the other way round. They never count beside </image> and </video>, nor beside the <|image|> and
        <|video|> that items of a chat become.
        """
        if any(item in text for text in asked for item in ("<|image|>", "<|video|>")):
            return cls(())
        kinds = tuple(kind for kind in BARE if not any(f"</{kind}>" in text.lower() for text in asked))
        standing = standing_kinds(asked)
        if len(kinds) > 1 and len(set(shown)) == 1:
            known = standing | {_kind(mark) for mark in cls(())._places(asked)}
            return cls(tuple(kind for kind in kinds if kind in shown or (kind in standing and not known & set(shown))))
        return cls(kinds if shown or standing & set(kinds) else ())

    def count(self, asked: Sequence[str]) -> int:
        """How many images and videos the turns have a place for; <image_1> said twice is one."""
        return len(self._places(asked))

    def of_one_video(self, asked: Sequence[str]) -> bool:
        """Whether the turns have one place, and that is a video's: what is shown may be its frames."""
        return [_kind(mark) for mark in self._places(asked)] == ["video"]

    def split(self, asked: Sequence[str]) -> list[list[tuple[str, str]]]:
        """Each turn as ("", words) and ("image" | "video", mark) in their order. A number that was said before, in
        whichever turn, is no further place: what `without` leaves of a mark is left of it.
        """
        seen: set[tuple[str, int]] = set()
        return [self._split(self._said_once(text, seen)) for text in asked]

    def _split(self, text: str) -> list[tuple[str, str]]:
        parts: list[tuple[str, str]] = []
        end = 0
        for match in _one(self.bare).finditer(text):
            mark = match.group()
            parts.append(("", text[end : match.start()]))
            end = match.end()
            if not NO_PLACE.fullmatch(mark):
                parts.append((_kind(mark), mark))
        return [(kind, said) for kind, said in [*parts, ("", text[end:])] if kind or said]

    def _said_once(self, text: str, seen: set[tuple[str, int]]) -> str:
        def repeated(match: re.Match[str]) -> str:
            number = number_of(match.group(1))
            if number is None:
                return match.group()
            place = (_kind(match.group(1)), number)
            if place not in seen:
                seen.add(place)
                return match.group()
            return "" if match.start() == 0 or match.end() == len(text) else _left_of(match)

        return _spaced(self.bare).sub(repeated, text)

    def _places(self, asked: Sequence[str]) -> list[str]:
        """The mark of each place."""
        return [mark for parts in self.split(asked) for kind, mark in parts if kind]

    def without(self, text: str) -> str:
        """A turn without them. Words on both sides of one stay apart, by a line break where one stood beside it."""
        run = _run(self.bare)
        if not run.search(text):
            return text
        return run.sub(_left_of, text).strip()


def standing_kinds(asked: Sequence[str]) -> set[str]:
    """Of which kinds a bare mark begins or ends a line."""
    return {_kind(match.group()) for text in asked for match in LINE_ENDS.finditer(text)}


def number_of(mark: str) -> int | None:
    """The number in a mark; None: it has none."""
    numbered = NUMBERED.fullmatch(mark)
    return int(numbered.group(1)) if numbered else None


def _left_of(match: re.Match[str]) -> str:
    return "\n" if "\n" in match.group() else " "


def _kind(mark: str) -> str:
    # <img> may hold the path of an image in a folder of videos
    return "video" if "video" in mark.lower() and not mark.lower().startswith("<img") else "image"


@lru_cache
def _one(bare: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join((MARKS, *(f"<{kind}>" for kind in bare))), re.IGNORECASE)


@lru_cache
def _spaced(bare: tuple[str, ...]) -> re.Pattern[str]:
    # a run of white space is begun once, at its start: text with long ones would take the square of their length
    return re.compile(rf"(?:(?<!\s)\s+)?({_one(bare).pattern})\s*", re.IGNORECASE)


@lru_cache
def _run(bare: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:(?<!\s)\s+)?(?:(?:{_one(bare).pattern})\s*)+", re.IGNORECASE)
