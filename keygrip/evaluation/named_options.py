"""Find the option of a multiple-choice question that a text names by the option's words or by its place in the list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keygrip.evaluation.answer_forms import (
    COUNTED,
    EITHER_WAY,
    ENDS_NO,
    NOT,
    NUMBERED,
    ORDINALS,
    SAID_WRONG,
)
from keygrip.evaluation.option_texts import Options, before_place, plain_text


def option_by_words(text: str, known: Options) -> int | None:
    """Return the only option whose words are in the text, not denied and not part of another's ("red", "dark red")."""
    # Without full stops and commas, "no" and "I" cannot be recognised as answers.
    plain = ["" if option in ("no", "i") else option for option in known.plain]
    for searched, options in ((text.lower(), known.literal), (plain_text(text), plain)):
        matches = [
            (match.start(), match.end(), index)
            for index, option in enumerate(options)
            if option not in ("", "a", "i" if known.last >= "I" else "")
            for match in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", searched)
            if option not in ("no", "i") or _is_answer(option, searched, match.start(), match.end(), options)
        ]
        longest, widest = list[tuple[int, int, int]](), (0, 0, 0)  # widest: the match that ends last so far
        for this in sorted(matches, key=lambda each: (each[0], -each[1])):
            if this[1] > widest[1] or this[1] - this[0] >= widest[1] - widest[0]:
                longest.append(this)
            widest = max(widest, this, key=lambda each: each[1])
        chosen: set[int] = set()
        denied_to: int | None = None  # end of the last denied option
        wrong = _find_rejected(searched, longest) if "i" in known.plain else set()
        for start, end, index in longest:
            before = re.sub(r"\b(?:the|an?)\s+$", "", before_place(searched, start), flags=re.IGNORECASE)
            between = "" if denied_to is None else searched[denied_to:start]
            also = re.fullmatch(r"\s*,?\s*(?:or|nor)\s+(?:(?:the|an?)\s+)?", between, re.IGNORECASE)
            if also or end in wrong or NOT.search(before):
                denied_to = end
            else:
                chosen.add(index)
        if chosen:
            return chosen.pop() if len(chosen) == 1 else None
    return None


def _find_rejected(text: str, matches: Sequence[tuple[int, int, int]]) -> set[int]:
    """Return the ends of the options that a text calls wrong ("I is wrong", "I and II are wrong"), because each of
    several numbered statements may be called right or wrong. Empty if no other option is named, because a question may
    ask which one is wrong."""
    wrong = set[int]()
    for index, (_, end, _) in reversed(list(enumerate(matches))):
        of_next = index + 1 < len(matches) and matches[index + 1][1] in wrong
        between = text[end : matches[index + 1][0]] if of_next else ""
        joined = re.fullmatch(r"[)\]]?\s+(?:and|or)\s+[(\[]?", between, re.IGNORECASE)
        if joined or re.compile(SAID_WRONG, re.IGNORECASE).match(text, end):
            wrong.add(end)
    return (
        wrong
        if {number for _, _, number in matches} - {number for _, end, number in matches if end in wrong}
        else set()
    )


def remove_yes_or_no(text: str, known: Options) -> str:
    """Remove "yes or no" if yes and no are two options: it names the kind of a question, or neither option. In a longer
    list ("yes or no or maybe") it is kept."""
    if not {"yes", "no"} <= set(known.literal) or any(re.search(EITHER_WAY, option) for option in known.literal):
        return text
    others = "|".join(re.escape(option) for option in known.literal if option not in ("", "yes", "no")) or r"(?!)"
    row = r"(?:\s*[,/&]\s*|\s+)(?:(?:or|and)\s+)?"
    longer = re.compile(rf"(?<!\w)(?:{others}){row}{EITHER_WAY}|{EITHER_WAY}{row}(?:{others})(?!\w)", re.IGNORECASE)
    return text if longer.search(text) else re.sub(EITHER_WAY, "such", text, flags=re.IGNORECASE)


def option_by_number(text: str, known: Options) -> int | None:
    """Return the option named only by its place ("Option 2", "The second option"); None if options are numbers."""
    match = NUMBERED.fullmatch(text)
    if match is None or re.search(rf"\d|\b(?:{'|'.join((*COUNTED, *ORDINALS))})\b", " ".join(known.literal)):
        return None
    cardinal, ordinal = (match.group(n).lower() if match.group(n) else None for n in (1, 2))
    if cardinal is not None:
        index = int(cardinal) - 1 if cardinal.isdigit() else COUNTED.index(cardinal)
    else:
        index = int(str(ordinal)) - 1 if str(ordinal).isdigit() else ORDINALS.index(str(ordinal))
    return index if index < len(known.literal) else None


def _is_answer(option: str, text: str, start: int, end: int, options: Sequence[str]) -> bool:
    """Return whether a "no" or "I" is an answer, and not part of a sentence ("there is no cat", "I see"). It is an
    answer if joined to another option ("I and III", "III or I is right"), except in "II, and I am sure"."""
    begins = not text[:start].strip() and not re.match(r"\s+(?:idea|clue|answer|option|information|way)\b", text[end:])
    if (begins and option == "no") or re.match(ENDS_NO, text[end:]):
        return True
    others = "|".join(re.escape(other) for other in options if other not in ("", "a", option))
    other = rf"(?:the\s+|an?\s+)?(?:(?:option|opt\.?|choice)\s+)?[(\[]?(?<!\w)(?:{others})(?!\w)"
    joined = r"[)\]]?(?:\s*[,/&]|(?:\s*,)?\s+(?:and|or)\b)\s*(?:(?:maybe|possibly|perhaps|also|even)\s+)?"
    if re.compile(joined + other).match(text, end):
        return True
    preceding, label = before_place(text, start), r"(?:(?:option|opt\.?|choice)\s+)?[(\[]?$"
    if option == "no":  # "Yes, no doubt" joins no options
        return re.search(other + r"\s*(?:\band\b|\bor\b|/)\s*" + label, preceding) is not None
    said_of_it = r"[)\]]?\s+(?:is|are|was|were|(?:may|might|could|can|should|must)\s+be|seems?|looks?)\b"
    if re.compile(said_of_it).match(text, end) is None:
        return False
    # "I is" and "I seems" contain no pronoun, while "I was" may
    alone = re.compile(r"[)\]]?\s+(?:is|seems)\b").match(text, end) is not None
    called = re.search(r"\b(?:option|opt\.?|choice|statement)\s+[(\[]?$", preceding) is not None
    return alone or called or re.search(other + joined + label, preceding) is not None
