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
NAMES = r"\b(?:answer|ans|option|choice|correct one|solution|answer choice)\b"
OPENED = r"\s*(?:option|choice|letter|answer)?\s*[:=-]?\s*[(\[{]?\s*"
# Words that announce a letter, the surest first: whichever of them name one, the surest decide.
SAYS = (
    rf"{NAMES}\s*(?:(?:is|are|was|would be|should be|must be|will be|seems to be|here is)\s*[:=-]?|[:=-]){OPENED}"
    r"|\bi(?: would| ll| will| d)? (?:choose|chose|pick|picked|select|selected|go with|opt for)\b\s*,?" + OPENED
)
CONCLUDES = rf"\b(?:therefore|thus|so|hence)\b\s*,?{OPENED}"
MENTIONS = rf"{NAMES}{OPENED}"
I_SAY = rf"\b(?:i(?: would| d)? (?:say|answer)|it is|it s|it must be)\b\s*,?{OPENED}"
REASON = r"(?:because|since|as(?!\s+well)|given|based|due|and\s+not)\b"
# What follows a letter that is named as the answer ("B is the most likely answer"), or is said not to be it.
MOST = r"most\s+(?:accurate|appropriate|consistent|fitting|likely|logical|plausible|probable|reasonable|suitable)"
RIGHT = (
    r"\s+(?:(?:is|was|seems|looks|appears|would be|must be|should be|has to be)\s+(?:to be\s+)?(?:\w+ly\s+)?"
    rf"(?:(?:the\s+|my\s+)?(?:(?:one|only|single|final)\s+)?(?:correct|best|{MOST}|"
    r"right(?!\s+(?:behind|next|beside|after|before)))|"
    r"(?:the|my)\s+(?:(?:only|single|final)\s+)?(?:answer|choice|one))|(?:best|most \w+ly)\s+"
    r"(?:answers|captures|describes|explains|fits|matches|reflects|represents|summari[sz]es))\b"
)
WRONG = (
    r"[)\]}]?\s+(?:(?:is|was|seems|looks|would be|can be|could be)\s+(?:\w+ly\s+)?"
    r"(?:not|incorrect|wrong|false|unlikely|impossible|less|least|ruled|excluded|eliminated)\b|"
    r"(?:does|did|can|could|would)\s+not\b|(?:isn|doesn|didn|can|couldn|wouldn)\s?t\b|cannot\b)"
)
NOT = re.compile(
    r"\b(?:not|neither|nor|isn t|isnt|cannot be|can t be|than|unlike|instead of|wrong|incorrect|worst|"
    r"(?:not|don t|doesn t|didn t|cannot|can t)\s+(?:think|believe|say|mean)(?:\s+that)?(?:\s+the)?|doubt(?:\s+that)?)"
    r"\s*(?:option|choice)?\s*[(\[]?$",
    re.IGNORECASE,
)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: by its words alone, by a letter ("B", "(b)", "B. red", "Answer: B", "**B**"), or
    by words among others; None: none, or several.

    A word is no letter: "A person jumps" and "The answer is A person" do not name A. Behind words that announce an
    answer every other letter names its option, whatever follows ("The answer is B as shown"); A, and I, do so before
    punctuation and words that give a reason. What a model thinks before it answers (`<think>`), and a repetition of
    all options, is no answer.
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
        arrived = _announced((SAYS, CONCLUDES), rest, last, plain)
        arrived = _stated(rest, last) if arrived is None else arrived
        return number if arrived is None else arrived
    reasoned = re.match(rf"([A-{last}])\s+(?:because|since)\b|((?![AI])[A-{last}])\s+{REASON}", text)
    if reasoned:
        return _number(reasoned.group(1) or reasoned.group(2))
    match = re.match(rf"[(\[]?([A-{last}])\s+(.*)", text)
    if match and normalised_answer(match.group(2)).startswith(plain[_number(match.group(1))] or "\0"):
        return _number(match.group(1))
    return None


def _said(text: str, last: str, plain: Sequence[str]) -> int | None:
    """A letter behind words that say that an answer follows, or before words that say that it is the answer."""
    found = _announced((SAYS, CONCLUDES, MENTIONS, I_SAY), text, last, plain)
    return _stated(text, last) if found is None else found


def _announced(announcements: Sequence[str], text: str, last: str, plain: Sequence[str]) -> int | None:
    """The letter behind the first of these announcements that has one; its last such letter, and none that is denied or
    is one of several."""
    upper, lower = rf"([A-{last}])\b", rf"([a-{last.lower()}])\s*(?:[)\]}}.,;:]|$)"
    several = rf"(?![)\]}}]?\s*(?:or|and|[/&])\s*(?:(?:option|choice)\s+)?[(\[]?[A-{last}]\b)"
    for says in announcements:
        found: list[tuple[int, int]] = []
        for letter in (upper + several, lower):
            for match in re.finditer(rf"(?i:{says}){letter}", text):
                before, behind = text[: match.start()], text[match.end(1) :]
                if re.search(r"\bor\s*$", before) or NOT.search(before) or re.match(WRONG, behind):
                    continue
                if re.match(r"\s*\?", behind):  # it asks
                    continue
                if re.match(r"\s+[a-z]", behind) and not re.match(rf"\s+{REASON}|{RIGHT}", behind):
                    named = _begins_with(text[match.start(1) :], plain)
                    if named is not None:  # "The answer is C major"
                        found.append((match.start(1), named))
                    if named is not None or says != SAYS or match.group(1) in "AI":
                        continue
                found.append((match.start(1), _number(match.group(1))))
        if found:
            return max(found)[1]
    return None


def _begins_with(text: str, plain: Sequence[str]) -> int | None:
    """The option of several words with which a text begins."""
    own = f"{normalised_answer(text)} "
    begun = [number for number, option in enumerate(plain) if " " in option and own.startswith(f"{option} ")]
    return max(begun, key=lambda number: len(plain[number]), default=None)


def _stated(text: str, last: str) -> int | None:
    """The first letter that is said to be the answer."""
    for match in re.finditer(rf"(?:^|\s)[(\[]?([A-{last}])[)\]]?(?:{RIGHT})", text):
        if not NOT.search(text[: match.start(1)]):
            return _number(match.group(1))
    return None


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
        if not NOT.search(text[: match.start()]) and _is_letter(match.group(1), text[match.end() :])
    ]
    return _number(capitals[0]) if len(set(capitals)) == 1 else None


def _is_letter(letter: str, behind: str) -> bool:
    """Whether a capital before this text is no word of a sentence."""
    return not re.match(r"\s+[a-z]", behind) or (letter not in "AI" and re.match(rf"\s+{REASON}", behind) is not None)
