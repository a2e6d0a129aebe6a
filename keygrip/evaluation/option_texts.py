"""The options of a multiple-choice question, and texts in the forms in which answers are compared with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from keygrip.evaluation.answer_forms import COMPOUND, WRAPPED
from keygrip.evaluation.text_metrics import ARTICLES, NUMBER_WORDS


@dataclass(frozen=True)
class Options:
    """The options of a question: ``plain``, without case, articles and signs; ``literal``, in lower case with signs
    (C++, -5, 50%); ``exact``, as they are; ``last``, the letter of the last one. Of several letters alone ("b, e, a")
    nothing is plain: some are articles."""

    plain: list[str]
    literal: list[str]
    exact: list[str]
    last: str

    @classmethod
    def of(cls, options: Sequence[str]) -> Options:
        whole = [unicodedata.normalize("NFKC", option) for option in options]
        # What is taken out of answers is taken out of options too; of "<div>" nothing would be left.
        literal = [literal_text(unwrapped(option)) or literal_text(option) for option in whole]
        plain = [_plain_option(option) for option in literal]
        return cls(plain, literal, [exact_text(option) for option in whole], chr(ord("A") + len(options) - 1))

    def whole(self, said: str) -> int | None:
        """The option of which a text has all the words and no others, perhaps behind its own letter. A letter by itself
        is none: it counts of options that are letters."""
        words = unwrapped(said)
        exact, literal, plain = ((exact_text(said), exact_text(words)), (literal_text(words),), (plain_text(words),))
        alone = re.fullmatch(r"[\W_]*[a-z]([\W_]*)", words.strip().lower())
        if alone is None or re.search(r"[^.:)\]}\s]", alone.group(1)):  # "C#" is no letter by itself
            for own, options in ((exact, self.exact), (literal, self.literal)):
                found = next((each for each in own if each and options.count(each) == 1), None)
                if found is not None:
                    return options.index(found)
        for own, options in ((exact, self.exact), (literal, self.literal)):
            lettered = next((number for each in own if (number := _lettered(each, options)) is not None), None)
            if lettered is not None:
                return lettered
        if alone is None and plain[0] and self.plain.count(plain[0]) == 1:
            return self.plain.index(plain[0])
        return None

    def lettered(self, text: str) -> int | None:
        """The option that is a text's whole words behind its own letter ("B. red", "(B) red", "B - red")."""
        return _lettered(literal_text(text), self.literal)


def _lettered(own: str, options: Sequence[str]) -> int | None:
    letter = re.match(r"[\W_]*([A-Za-z])(?![A-Za-z])", own)
    if letter is None or number_of(letter.group(1)) >= len(options):
        return None
    number = number_of(letter.group(1))
    between = r"\s*[)\]}.:,;]*\s*(?:[-–—]+\s+)?"
    return (
        number if options[number] and re.fullmatch(between + re.escape(options[number]), own[letter.end() :]) else None
    )


def _plain_option(literal: str) -> str:
    if re.fullmatch(r"[\W_]*[a-z](?:[\W_]+[a-z])+[\W_]*", literal):
        return ""
    # Of articles and signs alone ("A", "-") nothing is left.
    # An article at the end of other words is a name ("Team A").
    return literal if literal.split()[-1:] and literal.split()[-1] in ARTICLES else plain_text(literal) or literal


def unwrapped(text: str) -> str:
    """Without what models put around letters and words."""
    return WRAPPED.sub(lambda match: match.group(1) or " ", text)


def exact_text(text: str) -> str:
    """As it is, without a full stop, or two of an option and a sentence that both end in one."""
    return re.sub(r"(?<!\.)\.{1,2}$", "", " ".join(text.split())).rstrip()


def literal_text(text: str) -> str:
    """In lower case with its signs, without a full stop."""
    return exact_text(text.lower())


def plain_text(text: str) -> str:
    """In lower case without articles and signs (points between digits stay), with digits for number words."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "")
    text = re.sub(r"[^\w\s.]|_", " ", re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)


def number_of(letter: str) -> int:
    """Of the option with this letter, from 0."""
    return ord(letter.upper()) - ord("A")


def own_words(number: int, known: Options) -> str:
    """Pattern of an option's words."""
    return r"\s+".join(map(re.escape, known.literal[number].split()))


def apart(text: str, known: Options) -> str:
    """The text in which capitals within an option's own words ("Team B") are other signs, so that they are not taken
    for letters of the list. `normal_text` takes that back. As long as the text."""
    for option in known.literal:
        if re.search(r"\w\W+\w", option) and re.search(rf"\b[a-{known.last.lower()}]\b", option):
            own = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)
            text = own.sub(_all_bold, text)
    return COMPOUND.sub(_all_bold, text)


def _all_bold(found: re.Match[str]) -> str:
    return re.sub(r"\b[A-Z]\b", _bold, found.group())


def _bold(letter: re.Match[str]) -> str:
    """A capital as a mathematical sign, of which NFKC, applied to every answer, leaves none."""
    return chr(0x1D400 + number_of(letter.group()))


def normal_text(text: str) -> str:
    """A text with the signs of `apart` as letters again."""
    return unicodedata.normalize("NFKC", text)


def before_place(text: str, place: int) -> str:
    """What a pattern of words before a place looks at: not all of a long text again at each place."""
    return text[max(0, place - 300) : place]
