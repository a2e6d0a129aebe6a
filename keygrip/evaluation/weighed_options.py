"""Read the remarks of a text that discusses options one by one, from A on, before or instead of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keygrip.evaluation.answer_forms import DENIES, ENDS_SAID, SET_OFF, TICK
from keygrip.evaluation.option_texts import Options, number_of, option_pattern

CALLS = r"(?:^|\b(?:is|was|be|seems|looks)\s)\W*(?:\w+ly\s+)?(?:the\s+|an?\s+)?(?:only\s+)?"
# Words that call an option right, excluding directions ("the cup is right of it") and concessions ("correct, but").
APPROVES = re.compile(
    rf"{CALLS}(?:yes|right|correct|true)(?:\s+(?:answer|choice|one|option|statement))?(?!\W*\bbut\b)"
    r"(?=\s*(?:[.,;:!)\]\n–—-]|$)|\s+(?:because|since|as)\b)|^\W*(?:because|since)\b",
    re.IGNORECASE,
)
REJECTS = re.compile(
    rf"{CALLS}(?:no(?!\s+(?:other|doubt)\b)|incorrect|wrong|false|unlikely|impossible)\b|"
    rf"\b{DENIES}\s+(?:be\s+)?(?:the\s+)?(?:\w+ly\s+)?(?:correct|right|true)\b",
    re.IGNORECASE,
)
# Words that deny a clause, except "not only", "not wrong" and "no other", and words that support the option in it.
DENIED = re.compile(
    rf"\b(?:{DENIES}(?!\s+(?:only|just|wrong|incorrect|false|ruled|eliminated)\b)|no(?!\s+(?:other|doubt)\b)|neither|nor|"
    r"absent|(?<!not )(?:ruled\s+out|eliminated))\b",
    re.IGNORECASE,
)
SUPPORTS = r"appears?|depicted|fits|matches|present|seen|shown|supported|visible"


@dataclass(frozen=True)
class Weighed:
    """An option in a text: its index, the end of its letter and words, and the remark after them."""

    option: int
    end: int
    remark: str

    @property
    def empty(self) -> bool:
        """Whether the text contains no remark on it."""
        return re.search(rf"\w|{TICK}", self.remark) is None


def weighed_options(said: str, known: Options) -> list[Weighed]:
    """Return the options of a text, each lettered at the beginning of a line, a sentence or a part of a sentence, with
    its own words or with the letter after the previous one. Empty if they do not begin with A and B."""
    label_pattern = re.compile(
        rf"(?:^|[\n.;!?,%][)\]]?|{ENDS_SAID})\s*(?P<label>(?:[-*•]\s*)?(?:(?i:option|choice)\s+)?[(\[]?"
        rf"(?P<letter>[A-{known.last}])(?:[)\].:]+|\s+[–—-]+(?=\s))\s*)"
    )
    labels: list[tuple[int, int, int]] = []  # the option, the start of its label and the end of its words
    for match in label_pattern.finditer(said):
        index = number_of(match["letter"])
        words = re.compile(option_pattern(index, known) + r"(?!\w)", re.IGNORECASE).match(said, match.end())
        if words is not None or index == (labels[-1][0] + 1 if labels else 0):
            labels.append((index, match.start("label"), match.end() if words is None else words.end()))
    if [index for index, _, _ in labels[:2]] != [0, 1]:
        return []
    ends = [start for _, start, _ in labels[1:]]
    blank = re.compile(r"\n[^\S\n]*\n|$").search(said, labels[-1][2])  # text after an empty line refers to all options
    ends.append(len(said) if blank is None else blank.start())
    return [Weighed(index, end, said[end:stop]) for (index, _, end), stop in zip(labels, ends, strict=True)]


def has_remarks(weighed: list[Weighed]) -> bool:
    """Return whether there are remarks on the options and not only a repetition of them. Text after the last option may
    be the answer, unless it is separated in the option's own line."""
    return any(not each.empty for each in weighed[:-1]) or re.match(SET_OFF, weighed[-1].remark) is not None


def option_called_right(weighed: list[Weighed], known: Options) -> int | None:
    """Return the only option that has a tick, or that is called right."""
    for options_right in (
        {each.option for each in weighed if re.match(rf"\W{{0,4}}{TICK}", each.remark)},
        {each.option for each in weighed if _verdict(each, known) == "right"},
    ):
        if len(options_right) == 1:
            return options_right.pop()
    return None


def remaining_option(weighed: list[Weighed], known: Options) -> int | None:
    """Return the only option that is not denied, if all options are discussed, or something supports it, or it stands
    without a remark before others that are denied ("A. red. B. blue is wrong")."""
    verdicts = [_verdict(each, known) for each in weighed]
    denied = {each.option for each, verdict in zip(weighed, verdicts, strict=True) if verdict == "denied"}
    remaining = {each.option for each in weighed} - denied
    if not denied or len(remaining) != 1:
        return None
    option = remaining.pop()
    supported = any(each.option == option and verdict for each, verdict in zip(weighed, verdicts, strict=True))
    without_remark = all(each.empty for each in weighed if each.option == option) and option != weighed[-1].option
    return option if supported or without_remark or len(denied) == len(known.literal) - 1 else None


def _verdict(weighed: Weighed, known: Options) -> str | None:
    """Return the verdict of a remark on its option: "right" or "denied" if it says so. Otherwise the verdict of the
    first clause that denies something ("denied") or has the option's own words or other supporting words ("supported").
    None if there is no such clause."""
    right, wrong = APPROVES.search(weighed.remark), REJECTS.search(weighed.remark)
    if right or wrong:
        return "right" if right and (wrong is None or right.start() < wrong.start()) else "denied"
    supports = re.compile(rf"(?<!\w)(?:{option_pattern(weighed.option, known)}|{SUPPORTS})(?!\w)", re.IGNORECASE)
    for clause in re.split(r"[.,;:!?\n]", weighed.remark):
        if DENIED.search(clause):
            return "denied"
        if supports.search(clause):
            return "supported"
    return None
