"""Which option of a multiple-choice question an answer in words names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from keygrip.evaluation.text_metrics import ARTICLES, normalised_answer

# What models put around a letter: brackets, quotes, Markdown, LaTeX, tags.
WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|<[^<>]{2,20}>|[*_`$\"'“”‘’]")
THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|$)|^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
ABSTAINS = re.compile(r"\bn\s?/\s?a\b|\bn\.\s?a\.(?!\w)", re.IGNORECASE)
# Capitals that are no letters of a list: "A/C unit", "U.S.A.".
COMPOUND = re.compile(r"(?<!\w)[A-Z][/&][A-Z](?=\s+[a-z])(?!\s+(?:and|are|because|both|or)\b)|(?<!\w)(?:[A-Z]\.){2,}")
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
I_SAY = rf"\b(?:i(?: would| d)? (?:say|answer|think|guess|believe)|it is|it s|it must be)\b\s*,?{OPENED}"
REASON = r"(?:because|since|as(?!\s+well)|given|based|due|and\s+not)\b"
# What follows a letter that is named as the answer ("B is the most likely answer"), or is said not to be it.
FITTING = r"(?:accurate|appropriate|consistent|fitting|likely|logical|plausible|probable|reasonable|suitable)"
MOST = rf"most\s+{FITTING}|more\s+{FITTING}(?=\s*(?:[.,;:!)]|$|(?:than|because|since)\b))"
FITS = r"(?:answers|captures|describes|explains|fits|matches|reflects|represents|summari[sz]es)"
RIGHT = (
    r"\s+(?:(?:is|was|seems|looks|appears|would be|must be|should be|has to be)\s+(?:to be\s+)?(?:\w+ly\s+)?"
    rf"(?:(?:the\s+|my\s+)?(?:(?:one|only|single|final)\s+)?(?:correct|best|{MOST}|"
    r"right(?!\s+(?:behind|next|beside|after|before)))|"
    rf"(?:the|my)\s+(?:(?:only|single|final)\s+)?(?:answer|choice|one))|(?:best|most \w+ly)\s+{FITS}|{FITS}\s+best)\b"
)
WRONG = (
    r"[)\]}]?\s+(?:(?:is|was|seems|looks|would be|can be|could be)\s+(?:\w+ly\s+)?"
    r"(?:not|incorrect|wrong|false|unlikely|impossible|less|least|ruled|excluded|eliminated)\b|"
    r"(?:does|did|can|could|would)\s+not\b|(?:isn|doesn|didn|can|couldn|wouldn)\s?t\b|cannot\b)"
)
DENIES = r"(?:not|never|cannot|(?:is|are|was|were|do|does|did|has|have|had|ca|could|would|wo|should)n\s?t)"
NOT = re.compile(
    r"\b(?:not|neither|nor|no|than|unlike|"
    rf"{DENIES}(?:\s+(?:actually|even|ever|quite|really))?(?:\s+(?:appear|be|become|contain|depict|find|have|look|see|seem"
    r"|show|turn)s?(?:\s+(?:like|to\s+be|to\s+have))?)?(?:\s+any)?|"
    r"(?:any|anything|everything|all)\s+(?:but|except)|"
    # "A: wrong. B" says so of the one before
    r"instead of|(?<![:;,.)–—-]\s)(?:wrong|incorrect|worst)|"
    r"(?:not|don t|doesn t|didn t|cannot|can t)\s+(?:think|believe|say|mean)(?:\s+that)?(?:\s+the)?|doubt(?:\s+that)?)"
    r"\s*(?:option|choice)?\s*[(\[]?$",
    re.IGNORECASE,
)
# "Is it C?", and what stands before a letter whose truth is left open ("whether A or B is right").
ASKS = re.compile(
    r"\b(?i:is|was|could|would|might|can|should)\s+(?i:it|that|this)\s+(?i:be\s+)?(?i:(?:option|choice|letter)\s+)?"
    r"[(\[]?[A-Z][)\]]?\s*\?"
)
OPEN = re.compile(r"\b(?:or|whether|if)\s*(?:(?:option|choice)\s*)?[(\[]?$", re.IGNORECASE)
# Words before capitals that may name something else than an option ("clip A", "Player B").
LABELS = re.compile(
    r"\b(?:angle|camera|chart|clip|column|exhibit|figure|frame|graph|group|image|line|panel|part|person|phase|photo|"
    r"picture|plan|player|point|position|room|row|scene|section|segment|shot|side|speaker|step|team|type|video|view|"
    r"vitamin|zone)\s+$",
    re.IGNORECASE,
)
# Texts that have little beside a letter, or beside the number of an option.
LIKE = r"(?:(?i:(?:it|that|this)\s+)?(?i:looks|seems)\s+(?i:like)\s+)"
SURE = r"(?:\s+(?i:for sure|it is|to me))"
COUNTED = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
NUMBERED = re.compile(
    r"(?:it(?:\s+i)?\s?s\s+)?(?:(?:the|my)\s+)?(?:(?:(?:correct|right|best|final)\s+)?(?:answer|choice|option)\s*(?:is|:)\s*)?"
    rf"(?:(?:option|choice)\s+(?:number\s+|#\s*)?([1-9]|{'|'.join(COUNTED)})|"
    rf"the\s+({'|'.join(ORDINALS)}|[1-9](?=st|nd|rd|th))(?:st|nd|rd|th)?\s+(?:option|choice|one))\W*",
    re.IGNORECASE,
)


# Words behind which an option of yes or no stands for itself, and not for a part of a sentence ("there is no cat").
ENDS_NO = rf"\s*(?:[.,;:!)\]}}]|$|{REASON})"


@dataclass(frozen=True)
class _Options:
    """The options of a question: ``plain``, by the VQA rule; ``literal``, in lower case with signs (C++, -5, 50%);
    ``last``, the letter of the last one."""

    plain: list[str]
    literal: list[str]
    last: str

    @classmethod
    def of(cls, options: Sequence[str]) -> _Options:
        literal = [_literal(unicodedata.normalize("NFKC", option)) for option in options]
        # Of articles and signs alone ("A", "-") the VQA rule leaves nothing.
        # An article at the end of other words is a name ("Team A").
        plain = [
            option if option.split()[-1:] and option.split()[-1] in ARTICLES else normalised_answer(option) or option
            for option in literal
        ]
        return cls(plain, literal, chr(ord("A") + len(options) - 1))


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: by its words alone, by a letter ("B", "(b)", "B. red", "Answer: B", "**B**"), or
    by words among others; None: none, or several.

    A word is no letter: "A person jumps" and "The answer is A person" do not name A. Behind words that announce an
    answer every other letter names its option, whatever follows ("The answer is B as shown"); A, and I, do so before
    punctuation and words that give a reason. Words that are denied ("not the red cube") name nothing, nor does the "no"
    of a sentence ("there is no cat"). A letter within an option's own words ("Team B") is a part of these. What a model
    thinks before it answers (`<think>`), and a repetition of the options, though it be cut off, is no answer.
    """
    known = _Options.of(options)
    said = THOUGHT.sub("", unicodedata.normalize("NFKC", answer))
    tagged = TAGGED.findall(said)
    said = WRAPPED.sub(lambda match: match.group(1) or " ", tagged[-1] if tagged else said).strip()
    own = " ".join(said.split())
    if not own:
        return None
    letter = re.fullmatch(r"[\W_]*[a-z][.:)\]}\s]*", own.lower()) is not None  # of options that are letters, it counts
    for ours, theirs in ((_literal(own), known.literal), (normalised_answer(own), known.plain)):
        if theirs.count(ours) == 1 and ours and not letter:
            return theirs.index(ours)
    if not any(ABSTAINS.search(option) for option in known.literal):
        said = ABSTAINS.sub(" ", said)
    said = _without_repetition(ASKS.sub(" ", BESIDE_CJK.sub(" ", said)), known)
    if _one_per_line(said, known):
        return None
    words = " ".join(said.split())
    text = _apart(words, known)
    first_line = _alone(said.partition("\n")[0], known)
    if first_line is not None:
        return first_line
    listed = _listed(text, known)
    if listed is not None:
        return listed.pop() if len(listed) == 1 else None
    for find in (_alone, _leading, _said, _bracketed):
        found = find(text, known)
        if found is not None:
            return found
    named, (alone, labelling) = _by_words(words, known), _capitals(text, known)
    if len(alone) == 1:
        return alone.pop() if named is None or named in alone else None
    if named is None and not alone and len(labelling) == 1:
        return labelling.pop()
    return _numbered(words, known) if named is None else named


def _literal(text: str) -> str:
    """In lower case with its signs, without a full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _without_repetition(text: str, known: _Options) -> str:
    """The text without its options, two or more of them from A on, lettered and in their order, as the question gave
    them; the last one may be cut off where the text ends."""
    lines = [line.strip() for line in re.sub(r"[^\w\n]+", " ", text).split("\n") if line.strip()]
    if len(lines) > 1 and "".join(lines) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(lines)] and known.literal[0] != "b":
        return ""
    begin = 0
    while first := re.compile(r"(?<!\w)\(?A[.):]", re.IGNORECASE).search(text, begin):
        end = _repeated_to(text, first.start(), known)
        if end is None:
            begin = first.end()
        else:
            text, begin = f"{text[: first.start()]} {text[end:]}", first.start()
    return text.strip()


def _repeated_to(text: str, start: int, known: _Options) -> int | None:
    """Where a repetition of options that begins at `start` ends; None: there are fewer than two."""
    end, whole = start, 0
    for number, option in enumerate(known.literal):
        letter = chr(ord("A") + number)
        label = re.compile(rf"\W*(?<!\w)\(?{letter}(?:[.):]\s*|\s*$)", re.IGNORECASE).match(text, end)
        if label is None:
            break
        own = r"\s+".join(re.escape(word) for word in option.split())
        words = re.compile(rf"{own}(?!\w)", re.IGNORECASE).match(text, label.end())
        if words is None:  # the last one, cut off, or another text
            cut = whole > 0 and option.startswith(_literal(text[label.end() :]))
            return len(text) if cut else end if whole > 1 else None
        end, whole = words.end(), whole + 1
    return end if whole > 1 else None


def _apart(text: str, known: _Options) -> str:
    """The text in which capitals within an option's own words ("Team B") are other signs, so that they are not taken
    for letters of the list. `_words` takes that back. As long as the text."""
    for option in known.literal:
        if re.search(r"\w\W+\w", option) and re.search(rf"\b[a-{known.last.lower()}]\b", option):
            own = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)
            text = own.sub(_all_bold, text)
    return COMPOUND.sub(_all_bold, text)


def _all_bold(found: re.Match[str]) -> str:
    return re.sub(r"\b[A-Z]\b", _bold, found.group())


def _bold(letter: re.Match[str]) -> str:
    """A capital as a mathematical sign, of which NFKC, applied to every answer, leaves none."""
    return chr(0x1D400 + _number(letter.group()))


def _words(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _number(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _another(last: str) -> str:
    """Pattern of a further letter behind one ("B or C", "(B), (C)", "B, maybe C"): none of them is the answer."""
    return (
        r"[)\]}.:]?\s*(?:[,;/&]|[,;]?\s*\b(?:or|and)\b)\s*(?:(?:maybe|possibly|perhaps|also|even)\s+)?"
        rf"(?:(?:the\s+)?(?:option|choice|letter)\s+)?[(\[{{]*[A-{last}](?:[)\]}}]|\b(?!\s+[a-z])|\b(?=\s+(?:or|and)\b))"
    )


def _listed(text: str, known: _Options) -> set[int] | None:
    """The letters of a text that has nothing else, two or more of them; None: it is another text."""
    last, between = known.last, r"[)\]}.:]*(?:\s*[,;/&]\s*|\s+(?:and|or)\s+|\s+)[(\[{]*"
    if not re.fullmatch(rf"[\W_]*[A-{last}](?:{between}[A-{last}])+[\W_]*", text):
        return None
    letters = re.findall(rf"[A-{last}]", text)
    if len(letters) == 2 and known.literal[_number(letters[0])] == letters[1].lower():
        return {_number(letters[0])}  # "B. A" of an option that is the letter A
    return {_number(letter) for letter in letters}


def _alone(text: str, known: _Options) -> int | None:
    """Nothing but a letter, with any punctuation."""
    match = re.fullmatch(rf"[\W_]*([A-{known.last}a-{known.last.lower()}])[\W_]*", text)
    return _number(match.group(1)) if match else None


def _leading(text: str, known: _Options) -> int | None:
    """A letter first, set off from what follows, or followed by that option's words. Where options are gone through
    ("A: wrong. B: right. The answer is B.") the letter that the text arrives at."""
    last, plain = known.last, known.plain
    match = re.match(
        rf"[(\[{{]?\s*([A-{last}a-{last.lower()}])(?!{_another(last)})\s*(?:[)\]}}.:]|[,;]|\s[-–—]\s|-\s)", text
    )
    if match:
        number, rest = _number(match.group(1)), text[match.end() :]
        if _names_another(_words(rest), number, known):
            return None
        denied = _denied_there(_words(rest), number, known)
        if not denied and plain[number] and normalised_answer(_words(rest)).startswith(plain[number]):
            return number
        arrived = _announced((SAYS, CONCLUDES), rest, known)
        arrived = _stated(rest, last) if arrived is None else arrived
        return number if arrived is None and not denied else arrived
    before_another = rf"(?:rather\s+than|instead\s+of|not|over)\s+(?:option\s+)?[(\[]?[A-{last}]\b"
    reasoned = re.match(
        rf"[(\[]?([A-{last}])[)\]]?\s+(?:(?:because|since)\b|{before_another})|((?![AI])[A-{last}])\s+{REASON}", text
    )
    if reasoned:
        return _number(reasoned.group(1) or reasoned.group(2))
    match = re.match(rf"[(\[]?([A-{last}])\s+(.*)", text)
    if match and normalised_answer(_words(match.group(2))).startswith(plain[_number(match.group(1))] or "\0"):
        return _number(match.group(1))
    match = re.fullmatch(rf"(?:{LIKE}(?!I)([A-{last}]){SURE}?|(?!I)([A-{last}]){SURE})[\s.!]*", text)
    return _number(match.group(1) or match.group(2)) if match else None


def _one_per_line(text: str, known: _Options) -> bool:
    """Whether each line is a letter, or one with its option's words, and they are not all the same. What follows an
    empty line is another text."""
    found = set()
    for line in map(str.strip, text.split("\n")):
        letter = re.match(rf"[(\[]?([A-{known.last}])(?:[.):\]]+\s*(.*)|)$", line)
        words = _literal(letter.group(2) or "") if letter else ""
        if letter is None or words not in ("", known.literal[_number(letter.group(1))]):
            return False
        found.add(letter.group(1))
    return len(found) > 1


def _denied_there(text: str, number: int, known: _Options) -> bool:
    """Whether behind a letter stands that it is wrong ("A. red: wrong.", "A: No B: Yes")."""
    own = re.match(rf"\s*{_own(number, known)}(?!\w)", text, re.IGNORECASE)
    if own is None:
        return re.match(rf"\s*(?i:no|wrong|incorrect|false)\W+[A-{known.last}][.):]", text) is not None
    denial = r"[\s:,;(–—-]*(?:(?:is|was|would\s+be|seems|looks)\s+)?(?:not\s+\w+|no|wrong|incorrect|false|unlikely)\b"
    # "B. blue, not red" denies another
    return (
        re.match(rf"(?!\W*not\s+(?:the\s+)?(?:{_others(number, known)}))(?:{denial})", text[own.end() :], re.I)
        is not None
    )


def _own(number: int, known: _Options) -> str:
    """Pattern of an option's words."""
    return r"\s+".join(map(re.escape, known.literal[number].split()))


def _others(number: int, known: _Options) -> str:
    return "|".join(_own(other, known) for other in range(len(known.literal)) if other != number)


def _names_another(text: str, number: int, known: _Options) -> bool:
    """Whether behind a letter stand its option's words and then another option, lettered too ("B. blue / C. green")."""
    own = _own(number, known)
    between = r"[\s.]*(?:[,;/&]|(?i:\bor\b|\band\b))\s*"
    other = re.match(rf"\s*(?i:{own})(?!\w){between}[(\[]?([A-{known.last}])[.):]\s*", text)
    return other is not None and text[other.end() :].lower().startswith(known.literal[_number(other.group(1))])


def _said(text: str, known: _Options) -> int | None:
    """A letter behind words that say that an answer follows, or before words that say that it is the answer."""
    found = _announced((SAYS, CONCLUDES, MENTIONS, I_SAY), text, known)
    return _stated(text, known.last) if found is None else found


def _announced(announcements: Sequence[str], text: str, known: _Options) -> int | None:
    """The letter behind the first of these announcements that has one; its last such letter, and none that is denied or
    is one of several."""
    last = known.last
    upper, lower = rf"([A-{last}])\b", rf"([a-{last.lower()}])(?:\s*(?:[)\]}}.,;:]|$)|(?={RIGHT}))"
    several = rf"(?!{_another(last)})"
    for says in announcements:
        found: list[tuple[int, int]] = []
        for letter in (upper + several, lower):
            for match in re.finditer(rf"(?i:{says}){letter}", text):
                before, behind = text[: match.start()], text[match.end(1) :]
                if re.search(r"\bor\s*$", before) or NOT.search(before) or re.match(WRONG, behind):
                    continue
                if re.match(r"\s*\?", behind):  # it asks
                    continue
                if _names_another(_words(behind.lstrip(".):] ")), _number(match.group(1)), known):
                    continue
                signed = _begins_literally(text[match.start(1) :], known)
                if signed is not None:  # "The answer is C++"
                    found.append((match.start(1), signed))
                    continue
                if re.match(r"\s+[a-z]", behind) and not re.match(rf"\s+{REASON}|{RIGHT}", behind):
                    named = _begins_with(text[match.start(1) :], known.plain)
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
    own = f"{normalised_answer(_words(text))} "
    begun = [number for number, option in enumerate(plain) if " " in option and own.startswith(f"{option} ")]
    return max(begun, key=lambda number: len(plain[number]), default=None)


def _begins_literally(text: str, known: _Options) -> int | None:
    """The option with which a text begins and which is a letter with signs (C#, A+)."""
    own = _words(text).lower()
    begun = [
        number
        for number, option in enumerate(known.literal)
        if re.fullmatch(r"[a-z][^\w\s]+", option) and re.match(rf"{re.escape(option)}(?![^\s.,;:!?)])", own)
    ]
    return max(begun, key=lambda number: len(known.literal[number]), default=None)


def _stated(text: str, last: str) -> int | None:
    """The first letter that is said to be the answer; one that only seems to be it where no other is it."""
    seeming: int | None = None
    for match in re.finditer(rf"(?:^|\s)[(\[]?([A-{last}])[)\]]?({RIGHT})", text):
        before = text[: match.start(1)]
        if NOT.search(before) or OPEN.search(before):
            continue
        if re.match(r"\s+(?:seems|looks|appears)\b", match.group(2)) is None:
            return _number(match.group(1))
        seeming = _number(match.group(1)) if seeming is None else seeming
    return seeming


def _bracketed(text: str, known: _Options) -> int | None:
    """The one letter in brackets."""
    found = {_number(letter) for letter in re.findall(rf"[(\[]([A-{known.last}])[)\]]", text)}
    return found.pop() if len(found) == 1 else None


def _capitals(text: str, known: _Options) -> tuple[set[int], set[int]]:
    """The capitals that are no words of a sentence: by themselves, and behind a word that they may name something with
    ("clip A")."""
    own, labelling = set[int](), set[int]()
    if re.search(rf"\b[A-{known.last}]\b{_another(known.last)}", text):
        return own, labelling
    for match in re.finditer(rf"\b([A-{known.last}])\b(?!['’])", text):
        before = text[: match.start()]
        if not NOT.search(before) and _is_letter(match.group(1), text[match.end() :]):
            (labelling if LABELS.search(before) else own).add(_number(match.group(1)))
    return own, labelling


def _is_letter(letter: str, behind: str) -> bool:
    """Whether a capital before this text is no word of a sentence."""
    return not re.match(r"\s+[a-z]|-[a-z]", behind) or (
        letter not in "AI" and re.match(rf"\s+{REASON}", behind) is not None
    )


def _by_words(text: str, known: _Options) -> int | None:
    """The one option whose words stand in the text, not denied and not as part of another's ("red" of "dark red")."""
    plain = ["" if option == "no" else option for option in known.plain]  # without points and commas none is an answer
    for own, options in ((text.lower(), known.literal), (normalised_answer(text), plain)):
        found = [
            (match.start(), match.end(), number)
            for number, option in enumerate(options)
            if option not in ("", "a", "i")
            for match in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", own)
            if option != "no" or _answers_no(own, match.start(), match.end())
        ]
        longest = [this for this in found if not any(_inside(this, other) for other in found)]
        named: set[int] = set()
        denied_to: int | None = None  # where the last one ends that is denied
        for start, end, number in sorted(longest):
            before = re.sub(r"\b(?:the|an?)\s+$", "", own[:start], flags=re.IGNORECASE)
            also = denied_to is not None and re.fullmatch(r"\s*,?\s*(?:or|nor)\s+", before[denied_to:])
            if also or NOT.search(before):
                denied_to = end
            else:
                named.add(number)
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _numbered(text: str, known: _Options) -> int | None:
    """The option that a text names by its place ("Option 2", "The second option") and by nothing else; None where
    options are themselves numbers."""
    match = NUMBERED.fullmatch(text)
    if match is None or re.search(rf"\d|\b(?:{'|'.join((*COUNTED, *ORDINALS))})\b", " ".join(known.literal)):
        return None
    cardinal, ordinal = (match.group(n).lower() if match.group(n) else None for n in (1, 2))
    if cardinal is not None:
        number = int(cardinal) - 1 if cardinal.isdigit() else COUNTED.index(cardinal)
    else:
        number = int(str(ordinal)) - 1 if str(ordinal).isdigit() else ORDINALS.index(str(ordinal))
    return number if number < len(known.literal) else None


def _inside(this: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether words from start to end are part of longer ones."""
    return other[0] <= this[0] and this[1] <= other[1] and other[1] - other[0] > this[1] - this[0]


def _answers_no(text: str, start: int, end: int) -> bool:
    """Whether a "no" there is an answer, and not a part of a sentence ("there is no cat")."""
    begins = not text[:start].strip() and not re.match(r"\s+(?:idea|clue|answer|option|information|way)\b", text[end:])
    return begins or re.match(ENDS_NO, text[end:]) is not None
