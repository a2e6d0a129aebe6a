"""Which option of a multiple-choice question an answer in words names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from keygrip.evaluation.text_metrics import normalised_answer

# What models put around a letter: brackets, quotes, Markdown, LaTeX, tags.
WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|<[^<>]{2,20}>|[*_`$\"'“”‘’]")
THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|$)|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that put no space beside a letter
BESIDE_CJK = re.compile(rf"(?<=[{CJK}])(?=[A-Za-z])|(?<=[A-Za-z])(?=[{CJK}])")
SAYS = (
    r"\b(?:answer|ans|option|choice|correct one|solution|answer choice|correct answer|correct option|correct choice)\b"
    r"\s*(?:is|are|was|would be|should be|must be|will be|seems to be|here is)?\s*[:=-]?\s*"
    r"(?:option|choice|letter|answer)?\s*[:=-]?\s*[(\[{]?\s*"
)
NOT = re.compile(r"\b(?:not|neither|nor|isn t|isnt|cannot be|can t be)\s*(?:option|choice)?\s*[(\[]?$", re.IGNORECASE)
I_SAY = (
    r"\b(?:i(?: would)? (?:choose|pick|select|go with|say|answer)|i d (?:choose|pick|say|go with)|it is|it s|"
    r"it must be|therefore|thus|so|hence)\b\s*,?\s*(?:option|choice|letter)?\s*[(\[{]?\s*"
)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: by its words alone, by a letter ("B", "(b)", "B. red", "Answer: B", "**B**"), or
    by words among others; None: none, or several.

    A word that begins an answer is no letter: "A person jumps" does not name A. What a model thinks before it answers
    (`<think>`), and a repetition of all options, is no answer.
    """
    plain = [normalised_answer(unicodedata.normalize("NFKC", option)) for option in options]
    said = THOUGHT.sub("", unicodedata.normalize("NFKC", answer))
    tagged = TAGGED.findall(said)
    said = WRAPPED.sub(lambda match: match.group(1) or " ", tagged[-1] if tagged else said).strip()
    own = normalised_answer(" ".join(said.split()))
    last = chr(ord("A") + len(options) - 1)
    if plain.count(own) == 1 and _alone(said, last, plain) is None:  # of options that are letters, the letter counts
        return plain.index(own)
    said = _without_repetition(BESIDE_CJK.sub(" ", said), options)
    text = " ".join(said.split())
    if re.fullmatch(rf"[\W_]*[A-{last}](?:(?:\s*[,;/&]\s*|\s+and\s+|\s+or\s+)+[A-{last}])+[\W_]*", text):
        return None
    first_line = _alone(said.partition("\n")[0], last, plain)
    if first_line is not None:
        return first_line
    for find in (_alone, _leading, _said, _anywhere):
        found = find(text, last, plain)
        if found is not None:
            return found
    own = normalised_answer(text)
    named = [number for number, option in enumerate(plain) if option and re.search(rf"\b{re.escape(option)}\b", own)]
    longest = [n for n in named if not any(n != m and _inside(plain[n], plain[m]) for m in named)]
    return longest[0] if len(longest) == 1 else None


def _without_repetition(text: str, options: Sequence[str]) -> str:
    """The text without all options, lettered and in their order, as the question gave them."""
    lettered = (
        rf"\(?{chr(ord('A') + number)}[.):]\s*" + r"\s+".join(re.escape(word) for word in option.split())
        for number, option in enumerate(options)
    )
    return re.sub(r"\W+".join(lettered), " ", text, flags=re.IGNORECASE).strip()


def _inside(short: str, long: str) -> bool:
    """Whether an option's words are part of another's that was named as well ("red" of "dark red")."""
    return len(short) < len(long) and re.search(rf"\b{re.escape(short)}\b", long) is not None


def _number(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _alone(text: str, last: str, plain: Sequence[str]) -> int | None:
    """Nothing but a letter, with any punctuation."""
    match = re.fullmatch(rf"[\W_]*([A-{last}a-{last.lower()}])[\W_]*", text)
    return _number(match.group(1)) if match else None


def _leading(text: str, last: str, plain: Sequence[str]) -> int | None:
    """A letter first, set off from what follows, or followed by that option's words. Where options are gone through
    ("A: wrong. B: right. The answer is B.") the letter that the text arrives at."""
    match = re.match(
        rf"[(\[{{]?\s*([A-{last}a-{last.lower()}])\s*(?:[)\]}}.:]|[,;](?!\s*[A-{last}]\b)|\s[-–—]\s|-\s)", text
    )
    if match:
        number, rest = _number(match.group(1)), text[match.end() :]
        if plain[number] and normalised_answer(rest).startswith(plain[number]):
            return number
        arrived = re.findall(rf"(?i:\banswer\s*(?:is|:)\s*(?:option\s*)?[(\[]?\s*)([A-{last}])\b(?!\s+[a-z])", rest)
        return _number(arrived[-1]) if arrived else number
    reasoned = re.match(rf"([A-{last}])\s+(?:because|since)\b", text)
    if reasoned:
        return _number(reasoned.group(1))
    match = re.match(rf"[(\[]?([A-{last}])\s+(.*)", text)
    if match and normalised_answer(match.group(2)).startswith(plain[_number(match.group(1))] or "\0"):
        return _number(match.group(1))
    return None


def _said(text: str, last: str, plain: Sequence[str]) -> int | None:
    """A letter behind words that say that an answer follows; the last such one, and none that is denied."""
    found = None
    for says in (SAYS, I_SAY):
        for letter in (rf"([A-{last}])\b(?!\s+[a-z])", rf"([A-{last}a-{last.lower()}])\s*(?:[)\]}}.,;:]|$)"):
            for match in re.finditer(rf"(?i:{says}){letter}", text):
                if not re.search(r"\bor\s*$", text[: match.start()]):  # one of several
                    found = _number(match.group(1))
        if found is not None:
            return found
    right = r"\s+(?:is|seems|looks|would be)\s+(?:the\s+)?(?:correct|right|best)"
    stated = re.search(rf"(?:^|\s)[(\[]?([A-{last}])[)\]]?{right}", text)
    return _number(stated.group(1)) if stated else None


def _anywhere(text: str, last: str, plain: Sequence[str]) -> int | None:
    """The one letter in brackets, or the one capital that is no word of a sentence."""
    bracketed = {_number(letter) for letter in re.findall(rf"[(\[]([A-{last}])[)\]]", text)}
    if len(bracketed) == 1:
        return bracketed.pop()
    if re.search(rf"\b[A-{last}]\b\s*(?:or|and|/|,)\s*(?:option\s+)?[A-{last}]\b", text):
        return None
    capitals = [
        match.group(1)
        for match in re.finditer(rf"\b([A-{last}])\b(?!['’])", text)
        if not re.match(r"\s+[a-z]", text[match.end() :]) and not NOT.search(text[: match.start()])
    ]
    return _number(capitals[0]) if len(set(capitals)) == 1 else None
