"""The options of a multiple-choice question, and normalised texts for comparing answers with them."""

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
    (C++, -5, 50%); ``exact``, unchanged; ``last``, the letter of the last option. An option of several letters ("b, e,
    a") has no plain form, because some of the letters are articles."""

    plain: list[str]
    literal: list[str]
    exact: list[str]
    last: str

    @classmethod
    def of(cls, options: Sequence[str]) -> Options:
        whole = [unicodedata.normalize("NFKC", option) for option in options]
        # The same marks are removed from options as from answers, unless nothing would be left ("<div>").
        literal = [literal_text(strip_marks(option)) or literal_text(option) for option in whole]
        plain = [_plain_option(option) for option in literal]
        return cls(plain, literal, [exact_text(option) for option in whole], chr(ord("A") + len(options) - 1))

    def whole(self, said: str) -> int | None:
        """Return the option of which a text has exactly the words, possibly after its own letter. A single letter does
        not count here, except for options that are letters."""
        words = strip_marks(said)
        exact, literal, plain = ((exact_text(said), exact_text(words)), (literal_text(words),), (plain_text(words),))
        single_letter = re.fullmatch(r"[\W_]*[a-z]([\W_]*)", words.strip().lower())
        if single_letter is None or re.search(r"[^.:)\]}\s]", single_letter.group(1)):  # "C#" is not a single letter
            for forms, options in ((exact, self.exact), (literal, self.literal)):
                found = next((each for each in forms if each and options.count(each) == 1), None)
                if found is not None:
                    return options.index(found)
        for forms, options in ((exact, self.exact), (literal, self.literal)):
            lettered = next(
                (index for each in forms if (index := _parse_lettered_option(each, options)) is not None), None
            )
            if lettered is not None:
                return lettered
        if single_letter is None and plain[0] and self.plain.count(plain[0]) == 1:
            return self.plain.index(plain[0])
        return None

    def lettered(self, text: str) -> int | None:
        """Return the option whose complete words follow its own letter in the text ("B. red", "(B) red", "B - red")."""
        return _parse_lettered_option(literal_text(text), self.literal)


def _parse_lettered_option(literal: str, options: Sequence[str]) -> int | None:
    letter = re.match(r"[\W_]*([A-Za-z])(?![A-Za-z])", literal)
    if letter is None or number_of(letter.group(1)) >= len(options):
        return None
    index = number_of(letter.group(1))
    separator = r"\s*[)\]}.:,;]*\s*(?:[-–—]+\s+)?"
    return (
        index
        if options[index] and re.fullmatch(separator + re.escape(options[index]), literal[letter.end() :])
        else None
    )


def _plain_option(literal: str) -> str:
    if re.fullmatch(r"[\W_]*[a-z](?:[\W_]+[a-z])+[\W_]*", literal):
        return ""
    # Articles and signs alone ("A", "-") would leave nothing.
    # An article at the end of other words is a name ("Team A").
    return literal if literal.split()[-1:] and literal.split()[-1] in ARTICLES else plain_text(literal) or literal


def strip_marks(text: str) -> str:
    """Remove the marks that models put around letters and words."""
    return WRAPPED.sub(lambda match: match.group(1) or " ", text)


def exact_text(text: str) -> str:
    """Return the text unchanged except for a full stop at the end, or two (of an option and of the sentence)."""
    return re.sub(r"(?<!\.)\.{1,2}$", "", " ".join(text.split())).rstrip()


def literal_text(text: str) -> str:
    """Return the text in lower case with its signs, without a full stop at the end."""
    return exact_text(text.lower())


def plain_text(text: str) -> str:
    """Return the text in lower case without articles and signs (decimal points stay), with digits for number words."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).replace("'", "")
    text = re.sub(r"[^\w\s.]|_", " ", re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)


def number_of(letter: str) -> int:
    """Return the index of the option with this letter, from 0."""
    return ord(letter.upper()) - ord("A")


def option_pattern(number: int, known: Options) -> str:
    """Return a pattern of an option's words."""
    return r"\s+".join(map(re.escape, known.literal[number].split()))


def mask_own_capitals(text: str, known: Options) -> str:
    """Replace capitals within an option's own words ("Team B") by other characters, so that they are not read as option
    letters. `normal_text` reverses this. The length of the text is unchanged."""
    for option in known.literal:
        if re.search(r"\w\W+\w", option) and re.search(rf"\b[a-{known.last.lower()}]\b", option):
            pattern = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)
            text = pattern.sub(_embolden_capitals, text)
    return COMPOUND.sub(_embolden_capitals, text)


def _embolden_capitals(match: re.Match[str]) -> str:
    return re.sub(r"\b[A-Z]\b", _embolden_letter, match.group())


def _embolden_letter(letter: re.Match[str]) -> str:
    """Replace a capital by a mathematical symbol, which no answer contains after NFKC normalisation."""
    return chr(0x1D400 + number_of(letter.group()))


def normal_text(text: str) -> str:
    """Convert the symbols of `mask_own_capitals` back to letters."""
    return unicodedata.normalize("NFKC", text)


def before_place(text: str, place: int) -> str:
    """Return the text before a place, limited in length, so that a long text is not searched again at each place."""
    return text[max(0, place - 300) : place]
