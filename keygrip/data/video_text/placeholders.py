"""Placeholders for images and videos in conversations of other programs; here the model decides where these go.

Placeholders are searched in the turns of users and of the system. An assistant's text is learned unchanged, including
code and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

# <image> and <video> may also be words or HTML tags: `Placeholders.of` decides.
BARE = ("image", "video")
# <image_1>, <|video|>, <|vision_start|><|image_pad|><|vision_end|>: never words of a text. <image 1> is used by MMMU,
# <img>a.jpg</img> by Qwen-VL, <IMG_CONTEXT> by InternVL (one for each token of an image), <start_of_image> by Gemma.
MARKS = (
    r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)+<\|vision_end\|>|<\|vision_(?:start|end)\|>|"
    r"<\|?(?:image|video)(?:[_ ]?\d+|_pad)\|?>|<\|(?:image|video)\|?>|<(?:image|video)\|>|"
    r"<img>(?:<IMG_CONTEXT>|[^<>])*</img>|(?:<IMG_CONTEXT>)+|<start_of_image>"
)
NO_PLACE = re.compile(r"<\|vision_(?:start|end)\|>", re.IGNORECASE)  # alone, it accompanies another mark that counts
NUMBERED = re.compile(r"<\|?(?:image|video)[_ ]?(\d+)\|?>", re.IGNORECASE)
LINE_ENDS = re.compile(r"^[ \t]*<(?:image|video)>|<(?:image|video)>[ \t]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Placeholders:
    """The placeholders of a conversation.

    Args:
        bare: which of <image> and <video> are placeholders in this conversation, and not words.
    """

    bare: tuple[str, ...] = BARE

    @classmethod
    def of(cls, asked: Sequence[str], shown: Collection[str]) -> Placeholders:
        """Decide which bare marks are placeholders in the turns of a user and a system.

        "How does the <video> tag work?" has no placeholder: without media, <image> and <video> count only if one of
        them begins or ends a line. If only images are shown, <video> counts only if it begins or ends a line and no
        <image> does; the same holds for <image> if only videos are shown. A mark never counts if its closing tag
        (</image>, </video>) occurs, nor if the text has <|image|> or <|video|>, which replace items of a chat.

        Args:
            asked: texts of the turns. shown: kinds of the shown media ("image", "video").
        """
        if any(item in text for text in asked for item in ("<|image|>", "<|video|>")):
            return cls(())
        kinds = tuple(kind for kind in BARE if not any(f"</{kind}>" in text.lower() for text in asked))
        standing = kinds_at_line_ends(asked)
        if len(kinds) > 1 and len(set(shown)) == 1:
            known_kinds = standing | {_medium_kind(mark) for mark in cls(())._places(asked)}
            return cls(
                tuple(kind for kind in kinds if kind in shown or (kind in standing and not known_kinds & set(shown)))
            )
        return cls(kinds if shown or standing & set(kinds) else ())

    def count(self, asked: Sequence[str]) -> int:
        """Return the number of placeholders in the turns; a repeated <image_1> counts once."""
        return len(self._places(asked))

    def of_one_video(self, asked: Sequence[str]) -> bool:
        """Whether the turns have exactly one placeholder, for a video: the shown images may be its frames."""
        return [_medium_kind(mark) for mark in self._places(asked)] == ["video"]

    def split(self, asked: Sequence[str]) -> list[list[tuple[str, str]]]:
        """Split each turn into ("", words) and ("image" | "video", mark) in order. If a mark's number occurred before,
        in any turn, the mark is not a new placeholder: it is replaced by white space, as in `without`.
        """
        seen: set[tuple[str, int]] = set()
        return [self._split(self._remove_repeats(text, seen)) for text in asked]

    def _split(self, text: str) -> list[tuple[str, str]]:
        parts: list[tuple[str, str]] = []
        end = 0
        for match in _placeholder_pattern(self.bare).finditer(text):
            mark = match.group()
            parts.append(("", text[end : match.start()]))
            end = match.end()
            if not NO_PLACE.fullmatch(mark):
                parts.append((_medium_kind(mark), mark))
        return [(kind, piece) for kind, piece in [*parts, ("", text[end:])] if kind or piece]

    def _remove_repeats(self, text: str, seen: set[tuple[str, int]]) -> str:
        def repeated(match: re.Match[str]) -> str:
            number = number_of(match.group(1))
            if number is None:
                return match.group()
            place = (_medium_kind(match.group(1)), number)
            if place not in seen:
                seen.add(place)
                return match.group()
            return "" if match.start() == 0 or match.end() == len(text) else _remaining_whitespace(match)

        return _spaced_placeholder_pattern(self.bare).sub(repeated, text)

    def _places(self, prompts: Sequence[str]) -> list[str]:
        """Return the mark of each placeholder."""
        return [mark for parts in self.split(prompts) for kind, mark in parts if kind]

    def without(self, text: str) -> str:
        """Remove the placeholders from a turn. Words on both sides stay separated, by a line break if there was one."""
        run = _run(self.bare)
        if not run.search(text):
            return text
        return run.sub(_remaining_whitespace, text).strip()


def kinds_at_line_ends(asked: Sequence[str]) -> set[str]:
    """Return the kinds of bare marks that begin or end a line."""
    return {_medium_kind(match.group()) for text in asked for match in LINE_ENDS.finditer(text)}


def number_of(mark: str) -> int | None:
    """Return the number in a mark; None if it has none."""
    numbered = NUMBERED.fullmatch(mark)
    return int(numbered.group(1)) if numbered else None


def _remaining_whitespace(match: re.Match[str]) -> str:
    return "\n" if "\n" in match.group() else " "


def _medium_kind(mark: str) -> str:
    # <img> may contain the path of an image in a folder of videos
    return "video" if "video" in mark.lower() and not mark.lower().startswith("<img") else "image"


@lru_cache
def _placeholder_pattern(bare: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join((MARKS, *(f"<{kind}>" for kind in bare))), re.IGNORECASE)


@lru_cache
def _spaced_placeholder_pattern(bare: tuple[str, ...]) -> re.Pattern[str]:
    # the lookbehind matches white space only from its start: otherwise the time is quadratic in its length
    return re.compile(rf"(?:(?<!\s)\s+)?({_placeholder_pattern(bare).pattern})\s*", re.IGNORECASE)


@lru_cache
def _run(bare: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:(?<!\s)\s+)?(?:(?:{_placeholder_pattern(bare).pattern})\s*)+", re.IGNORECASE)
