"""The options of a multiple-choice question, and texts in the forms in which answers are compared with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from keygrip.evaluation.answer_forms import WRAPPED
from keygrip.evaluation.text_metrics import ARTICLES, NUMBER_WORDS


@dataclass(frozen=True)
class Options:
    """The options of a question: ``plain``, without case, articles and signs; ``literal``, in lower case with signs
    (C++, -5, 50%); ``last``, the letter of the last one."""

    plain: list[str]
    literal: list[str]
    last: str

    @classmethod
    def of(cls, options: Sequence[str]) -> Options:
        whole = [unicodedata.normalize("NFKC", option) for option in options]
        # What is taken out of answers is taken out of options too; of "<div>" nothing would be left.
        literal = [literal_text(unwrapped(option)) or literal_text(option) for option in whole]
        # Of articles and signs alone ("A", "-") nothing is left.
        # An article at the end of other words is a name ("Team A").
        plain = [
            option if option.split()[-1:] and option.split()[-1] in ARTICLES else plain_text(option) or option
            for option in literal
        ]
        return cls(plain, literal, chr(ord("A") + len(options) - 1))

    def lettered(self, text: str) -> int | None:
        """The option that is a text's whole words behind its own letter ("B. red", "(B) red", "B - red")."""
        own = literal_text(text)
        letter = re.match(r"[(\[{]?\s*([a-z])(?![a-z])", own)
        if letter is None or number_of(letter.group(1)) >= len(self.literal):
            return None
        number = number_of(letter.group(1))
        between = r"\s*[)\]}.:,;]*\s*(?:[-–—]+\s+)?"
        return number if re.fullmatch(between + re.escape(self.literal[number]), own[letter.end() :]) else None


def unwrapped(text: str) -> str:
    """Without what models put around letters and words."""
    return WRAPPED.sub(lambda match: match.group(1) or " ", text)


def literal_text(text: str) -> str:
    """In lower case with its signs, without a full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def plain_text(text: str) -> str:
    """In lower case without articles and signs (points between digits stay), with digits for number words."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "")
    text = re.sub(r"[^\w\s.]|_", " ", re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)


def number_of(letter: str) -> int:
    """Of the option with this letter, from 0."""
    return ord(letter.upper()) - ord("A")
