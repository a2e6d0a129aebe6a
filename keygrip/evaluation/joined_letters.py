"""Letters of a multiple-choice answer that are joined ("B or C", "A to C") and so name no single option."""

from __future__ import annotations

import re

from keygrip.evaluation.answer_forms import CHANGES, JOINS, NOT
from keygrip.evaluation.option_texts import before_place


def another_letter_pattern(last_letter: str) -> str:
    """Return a pattern of a further letter ("B or C", "(B), (C)", "B, maybe C"); then no letter is the answer."""
    return (
        rf"[)\]}}.:]?\s*(?:[,;/&]|[,;]?\s*\b{JOINS})\s*(?:(?:maybe|possibly|perhaps|also|even)\s+)?"
        rf"(?:(?:the\s+)?(?i:option|opt\.?|choice|letter)\s+)?[(\[{{]*[A-{last_letter}]"
        r"(?:[)\]}]|\b(?!\s+[a-z])|\b(?=\s+(?:or|and)\b))"
    )


def joins_letters(text: str, joined: str) -> bool:
    """Return whether a text has letters that are joined ("B or C"), apart from "not A, then B" and changes of mind."""
    return any(
        not _is_replaced(match.group(), before_place(text, match.start())) for match in re.finditer(joined, text)
    )


def _is_replaced(joined: str, preceding: str) -> bool:
    """Return whether the first of two joined letters is not the answer ("not A, then B", "from A to B")."""
    if re.search(r"\bthen\b", joined):
        return NOT.search(preceding) is not None
    change = CHANGES.search(preceding)
    # "I change my answer: A to B", but not "I change my answer: A and B"
    return (
        change is not None and re.search(r"\b(?:from|through|to)\b", change.group() + joined, re.IGNORECASE) is not None
    )


def without_joined_letters(text: str, last_letter: str) -> str | None:
    """Return the text without the first letter of a change of mind ("I change my answer from A to B"), or None if it
    has letters that are joined. If "from A to B" describes something, only letters that are a sentence of their own
    are left ("He moves from A to B. B")."""
    begins, ends = list[int](), list[int]()
    pair = rf"\b([A-{last_letter}])\b[)\]]?\s+(?:to|through)\s+(?:(?i:option)\s+)?[(\[]?([A-{last_letter}])\b"
    for match in re.finditer(pair, text):
        preceding = before_place(text, match.start())
        changed = CHANGES.search(preceding) is not None
        if changed or re.search(r"\bfrom\s+[(\[]?$", preceding, re.IGNORECASE):
            begins.append(match.start(1))
            ends += [] if changed else [match.start(2)]
    # The second letter stays until it is known whether a third is joined to it ("from A to B or C").
    text = _without_places(text, begins)
    another = rf"\b[A-{last_letter}]\b{another_letter_pattern(last_letter)}"
    if joins_letters(text, another):
        return None
    if not ends:
        return text
    text = _without_places(text, ends)
    alone = rf"(?:^|[.:;!?_–—-])\s*[(\[]?([A-{last_letter}])(?=[)\]]?\s*(?:[.:;!?]|$))"
    kept = {match.start(1) for match in re.finditer(alone, text)}
    others = [match.start() for match in re.finditer(rf"\b[A-{last_letter}]\b", text)]
    return _without_places(text, [place for place in others if place not in kept])


def _without_places(text: str, places: list[int]) -> str:
    """Return the text with other characters at these places, so that its length is unchanged."""
    letters = list(text)
    for place in places:
        letters[place] = "_"
    return "".join(letters)
