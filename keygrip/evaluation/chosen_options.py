"""Find the option of a multiple-choice question that an answer in words names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from keygrip.evaluation.answer_forms import (
    ABSTAINS,
    AGREES,
    ANSWERS_IT,
    ASKS,
    BEFORE_SAID,
    BESIDE_CJK,
    CONCLUDES,
    CORRECTS,
    GOES_ON,
    I_SAY,
    JOINS,
    LABELS,
    LIKE,
    MENTIONS,
    NOT,
    OPEN,
    QUALIFIES,
    REASON,
    RIGHT,
    SAID_NO,
    SAID_OF_IT,
    SAID_OF_THAT_WRONG,
    SAYS,
    SET_OFF,
    SHOWN,
    SUPPOSES,
    SURE,
    TAGGED,
    THOUGHT,
    VERDICT,
    WRONG,
    WRONG_ONES,
)
from keygrip.evaluation.joined_letters import another_letter_pattern, joins_letters, without_joined_letters
from keygrip.evaluation.named_options import option_by_number, option_by_words, remove_yes_or_no
from keygrip.evaluation.option_texts import (
    Options,
    before_place,
    literal_text,
    mask_own_capitals,
    normal_text,
    number_of,
    option_pattern,
    plain_text,
    strip_marks,
)
from keygrip.evaluation.refusals import may_explain, text_after_refusal
from keygrip.evaluation.repeated_options import remove_repeated_options
from keygrip.evaluation.weighed_options import (
    Weighed,
    has_remarks,
    option_called_right,
    remaining_option,
    weighed_options,
)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the option that an answer names: by its words alone, by a letter ("B", "(b)", "B. red", "Answer: B",
    "**B**"), or by words within a text; None if it names none or several.

    A word is not a letter: "A person jumps" and "The answer is A person" do not name A. After words that announce an
    answer, every other letter names its option, whatever follows ("The answer is B as shown"). A and I do so only
    before punctuation and words that give a reason; the same holds for an option "I" if the list has no letter I. If a
    text discusses the options one by one from A on, the chosen option is the one announced afterwards, called right or
    left over; it is None if none of these applies ("A: 10%, B: 70%"). "A:" before only another option or before a
    refusal ("A: I don't know") means "Answer:", unless option A denies something ("Not mentioned").
    Denied words ("not the red cube") name nothing, nor does the "no" of a sentence ("there is no cat"). A letter within
    an option's own words ("Team B") is part of them. Not part of the answer are: reasoning before the answer
    (`<think>`), a repetition of the options, even if cut off, and answers to further questions that the model invents.
    """
    known = Options.of(options)
    text = THOUGHT.sub("", unicodedata.normalize("NFKC", answer))
    text = next((each for tag in TAGGED for each in reversed(tag.findall(text)) if each.strip()), text)
    announced = GOES_ON.split(text, maxsplit=1)[0]  # a text that only describes something is no answer yet
    if announced != text and (found := _read_option(announced, known, announced_only=True)) is not None:
        return found
    return _read_option(text, known)


def _read_option(answer: str, options: Options, announced_only: bool = False) -> int | None:
    """Return the option of a text. `announced_only`: options named only by words or capitals do not count."""
    whole = options.whole(answer)
    if whole is not None:
        return whole
    answer = strip_marks(answer).strip()
    if not answer:
        return None
    if not any(ABSTAINS.search(option) for option in options.literal):
        answer = ABSTAINS.sub(r"\1 " if may_explain(options.literal[0]) else " ", answer)
    if len(options.literal[0]) > 1:  # "A: B" may be an option "B" with its letter
        answer = ANSWERS_IT.sub("\nAnswer:", answer).strip()
    answer = remove_yes_or_no(ASKS.sub(" ", BESIDE_CJK.sub(" ", answer)), options)
    through, ends_at = _read_discussion(answer, options)
    if through:
        return ends_at
    answer = remove_repeated_options(answer, options)
    if _has_letter_per_line(answer, options):
        return None
    answer = _remove_denied_option(answer, options)
    answer = _remove_answer_mark(answer, options)
    words = _join_lines(answer)
    text = mask_own_capitals(words, options)
    first_line = _parse_lone_letter(answer.partition("\n")[0], options)
    if first_line is not None:
        return first_line
    listed = _parse_letter_list(text, options)
    if listed is not None:
        return listed.pop() if len(listed) == 1 else None
    last_line = _find_letter_of_last_line(answer, options)
    for found in (
        _parse_lone_letter(text, options),
        _find_leading_letter(text, options),
        _find_stated_letter(text, options, supposed=last_line is None),
        last_line,
        None if announced_only else _find_bracketed_letter(text, options),
    ):
        if found is not None:
            return found
    if announced_only:
        return None
    agreed = answer if any(map(AGREES.search, options.literal)) else AGREES.sub(" ", answer)
    named = option_by_words(_join_lines(QUALIFIES.sub(r"\1", agreed)), options)
    alone, labelling = _find_capitals(text, options)
    if len(alone) == 1:
        return alone.pop() if named is None or named in alone else None
    if named is None and not alone and len(labelling) == 1:
        return labelling.pop()
    return option_by_number(words, options) if named is None else named


def _remove_answer_mark(answer: str, options: Options) -> str:
    """Remove an "A:" at the beginning if it means "Answer:", because only another option follows it, by letter or in
    words ("A: B", "A: C. green", "A: It is green."), or a refusal ("A: I don't know", "A. I'm sorry, ...")."""
    refused = re.match(r"\W*A\s*(?:(:)|[.)\]}–—-])\s*", answer, re.IGNORECASE)
    behind = None if refused is None else text_after_refusal(answer[refused.end() :], options)
    if refused is not None and behind is not None:
        named = option_by_words(_join_lines(answer[refused.end() :]), options)
        # "A. None of the above" is option A, although option D may have these words.
        if named is None or (named and refused[1]):
            # "I'm not sure about B" names no option, but "I don't know" may be option D.
            return answer[refused.end() :] if named and may_explain(options.literal[named]) else behind
    mark = re.match(r"\W*A:\s*(?=[(\[]?\w)", answer)
    if mark is None:
        return answer
    rest = answer[mark.end() :]
    line = rest.partition("\n")[0].strip()
    last, called = options.last, r"(?:(?i:option|choice|letter)\s+)?"
    letter = re.match(rf"{called}[(\[]?(?:([B-{last}])(?:[)\].:]|$)|[b-{last.lower()}][)\].]*$)", line)
    if letter is not None and not (letter[1] and re.match(another_letter_pattern(last), line[letter.end(1) :])):
        return rest
    reasons = re.match(REASON, line, re.IGNORECASE) or re.search(r"[.;!?]\W*\w", line)
    return answer if reasons or option_by_words(line, options) in (None, 0) else rest


def _join_lines(text: str) -> str:
    """Join the lines of a text, with a semicolon after each line that ends in a verdict, so that patterns of
    corrections and denials do not match across it."""
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    closed = [f"{line};" if VERDICT.search(line) else line for line in lines[:-1]]
    return " ".join(closed + lines[-1:])


def _read_discussion(answer: str, options: Options) -> tuple[bool, int | None]:
    """Return whether a text discusses options one by one from A on, and its conclusion: a letter announced after them,
    the only option with a tick or called right, or the only option left over."""
    weighed = weighed_options(answer, options)
    if not weighed:
        return False, None
    # The text after the list is the answer, whatever the list says.
    listed_to = next((one.end for one, each in pairwise(weighed) if each.option != one.option + 1), weighed[-1].end)
    behind = answer[listed_to:]
    arrived = _find_conclusion(behind, options, (CORRECTS, SAYS, CONCLUDES, MENTIONS))
    earlier_lines, _, last_line = behind.strip().rpartition("\n")
    if arrived is None and re.search(r"\w", earlier_lines):  # otherwise the list continues
        arrived = _parse_lone_letter(last_line, options)
        arrived = options.lettered(last_line) if arrived is None else arrived
    speaks = has_remarks(weighed)
    if arrived is None and speaks:
        arrived = option_called_right(weighed, options)
    if arrived is None:
        arrived = _find_conclusion(_remove_verdicts(answer, weighed), options, (CORRECTS, SAYS, CONCLUDES))
    if arrived is None and speaks:
        arrived = remaining_option(weighed, options)
    return arrived is not None or speaks, arrived


def _remove_verdicts(answer: str, weighed: Sequence[Weighed]) -> str:
    """Remove the "no" at the end of each option's line, because it corrects nothing ("- No. B. blue")."""
    for each in reversed(weighed):
        if re.match(SET_OFF, answer[each.end :]):
            answer = f"{answer[: each.end]}; {re.sub(rf'^{SAID_NO}', '', answer[each.end :])}"
    return answer


def _find_conclusion(answer: str, options: Options, announcements: Sequence[str]) -> int | None:
    """Return the option that a text announces or calls right."""
    text = mask_own_capitals(_join_lines(answer), options)
    announced = _find_announced_letter(announcements, text, options)
    return _find_letter_called_right(text, options.last) if announced is None else announced


def _denied_letter_pattern(last_letter: str) -> str:
    """Return a pattern of another letter that is not the answer, after the letter that is ("C rather than D")."""
    return rf"\s+(?:rather\s+than|instead\s+of|not|over)\s+(?:(?i:option|choice)\s+)?[(\[]?[A-{last_letter}]\b"


def _parse_letter_list(text: str, options: Options) -> set[int] | None:
    """Return the letters of a text that consists of two or more letters only; None for any other text."""
    last, separator = options.last, rf"(?:[)\]}}.:]*(?:\s*[,;/&]\s*|,?\s+{JOINS}\s+|\s+)|[)\]}}]+)[(\[{{]*"
    if not re.fullmatch(rf"[\W_]*[A-{last}](?:{separator}[A-{last}])+[\W_]*", text):
        return None
    letters = re.findall(rf"[A-{last}]", text)
    if len(letters) == 2 and options.literal[number_of(letters[0])] == letters[1].lower():
        return {number_of(letters[0])}  # "B. A", for an option that is the letter A
    return {number_of(letter) for letter in letters}


def _parse_lone_letter(text: str, options: Options) -> int | None:
    """Return the option of a text that is only a letter, with any punctuation, possibly repeated ("C.C.C.")."""
    match = re.fullmatch(rf"[\W_]*([A-{options.last}a-{options.last.lower()}])(?:[\W_]+\1)*[\W_]*", text)
    return number_of(match.group(1)) if match else None


def _find_letter_of_last_line(answer: str, options: Options) -> int | None:
    """Return the option of a letter alone on the last line; None after a denial and in a list of letters or of wrong
    options."""
    earlier, _, last_line = answer.rpartition("\n")
    found, words = _parse_lone_letter(last_line, options), _join_lines(earlier)
    if found is None or NOT.search(f"{words} ") or WRONG_ONES.search(words):
        return None
    return found if _parse_lone_letter(earlier.strip().rpartition("\n")[2], options) in (None, found) else None


def _find_leading_letter(text: str, options: Options) -> int | None:
    """Return the option of a letter at the beginning, separated from the text or followed by that option's words. If
    the text discusses several options ("A: wrong. B: right. The answer is B."), return the letter of its conclusion."""
    last, plain = options.last, options.plain
    match = re.match(
        rf"[(\[{{]?\s*([A-{last}a-{last.lower()}])(?!{another_letter_pattern(last)})\s*(?:[)\]}}.:]|[,;]|\s[-–—]\s|-\s)",
        text,
    )
    if match:
        index, remainder = number_of(match.group(1)), text[match.end() :]
        if _names_another_option(normal_text(remainder), index, options):
            return None
        if plain[index] and plain_text(normal_text(remainder)).startswith(plain[index]):
            return index
        arrived = _find_announced_letter((SAYS, CONCLUDES), remainder, options)
        arrived = _find_letter_called_right(remainder, last) if arrived is None else arrived
        return index if arrived is None else arrived
    preferred = rf"[(\[]?([A-{last}])[)\]]?(?:\s+(?:because|since)\b|{_denied_letter_pattern(last)})"
    reasoned = re.match(rf"{preferred}|((?![AI])[A-{last}])\s+{REASON}", text)
    if reasoned:
        return number_of(reasoned.group(1) or reasoned.group(2))
    match = re.match(rf"[(\[]?([A-{last}])\s+(.*)", text)
    if match and plain[number_of(match.group(1))]:
        index, remainder = number_of(match.group(1)), normal_text(match.group(2))
        if words := re.match(rf"[(\[]?{option_pattern(index, options)}(?!\w)[)\]]?", remainder, re.IGNORECASE):
            behind = remainder[words.end() :]
            arrived = _find_announced_letter((SAYS, CONCLUDES), behind, options)
            # "A dog jumps" begins with an article
            article = match.group(1) in "AI" and re.match(r"\s+\w", behind)
            if arrived is not None or not (article or re.match(WRONG, behind)):
                return index if arrived is None else arrived
    match = re.fullmatch(rf"(?:{LIKE}(?!I)([A-{last}]){SURE}?|(?!I)([A-{last}]){SURE})[\s.!]*", text)
    return number_of(match.group(1) or match.group(2)) if match else None


def _has_letter_per_line(text: str, options: Options) -> bool:
    """Return whether each line is a letter, or a letter with its option's words, and the letters differ. Text after an
    empty line is not considered."""
    letters = set()
    for line in map(str.strip, text.split("\n")):
        letter = re.match(rf"[(\[]?([A-{options.last}])(?:[.):\]]+\s*(.*)|)$", line)
        words = literal_text(letter.group(2) or "") if letter else ""
        if letter is None or words not in ("", options.literal[number_of(letter.group(1))]):
            return False
        letters.add(letter.group(1))
    return len(letters) > 1


def _remove_denied_option(answer: str, options: Options) -> str:
    """Remove the option at the beginning of a text if the text rejects it ("A. red: wrong.", "A. red. This is wrong.",
    "A (red) is wrong.", "A: No B: Yes")."""
    marks = r"\s*(?P<mark>[)\]}.:,;]|\s[-–—]\s|-\s)|\s"
    label = re.match(rf"\W*(?P<letter>[A-{options.last}])(?:{marks})", answer, re.IGNORECASE)
    if label is None:
        return answer
    index = number_of(label["letter"])
    own_words = rf"\s*[(\[]?{option_pattern(index, options)}(?!\w)[)\]]?"
    words = re.compile(own_words, re.IGNORECASE).match(answer, label.end())
    if words is None and label["mark"] is None:
        return answer
    remainder = answer[label.end() if words is None else words.end() :]
    # a full stop may belong to the option ("A. A man runs. is not shown")
    verb = rf"(?:[\s:,;.(–—-]*\b(?:is|was|would\s+be|seems|looks)\s+|{BEFORE_SAID})"
    # "B. blue, not red" denies another option
    other_letter = rf"(?:(?:option|choice)\s+)?[(\[]?(?-i:[A-{options.last}])"
    denial = (
        rf"(?!\W*not\s+(?:the\s+)?(?:{other_letter}\W*(?!\w)|(?:{other_letter}[)\].:,]*\s+)?"
        rf"(?:{_other_options_pattern(index, options)})))"
        rf"{verb}(?:not\s+\w+|no|wrong|incorrect|false|unlikely)\b"
    )
    bare_denial = rf"\s*(?:no|wrong|incorrect|false)\W+(?-i:[A-{options.last}])(?:[.):]|\s[-–—]\s)"
    denied = re.match(rf"(?:{bare_denial if words is None else denial}|{SAID_OF_THAT_WRONG})", remainder, re.IGNORECASE)
    return answer if denied is None else remainder


def _other_options_pattern(number: int, options: Options) -> str:
    return "|".join(option_pattern(other, options) for other in range(len(options.literal)) if other != number)


def _names_another_option(text: str, number: int, options: Options) -> bool:
    """Return whether a letter is followed by its option's words and then another lettered option ("B. blue / C.
    green")."""
    option_words = option_pattern(number, options)
    separator = r"[\s.]*(?:[,;/&]|(?i:\bor\b|\band\b))\s*"
    label = re.match(rf"\s*(?i:{option_words})(?!\w){separator}[(\[]?([A-{options.last}])[.):]\s*", text)
    return label is not None and text[label.end() :].lower().startswith(options.literal[number_of(label.group(1))])


def _find_stated_letter(text: str, options: Options, supposed: bool = True) -> int | None:
    """Return the option of a letter after words that announce an answer, or before words that call it the answer.
    Hypothetical letters count only if `supposed`."""
    found = _find_announced_letter((CORRECTS, SAYS, CONCLUDES, MENTIONS, I_SAY), text, options, supposed)
    found = _find_letter_called_right(text, options.last) if found is None else found
    return _find_letter_called_fitting(text, options.last) if found is None else found


def _find_announced_letter(
    announcements: Sequence[str], text: str, options: Options, supposed: bool = True
) -> int | None:
    """Return the last letter after the first announcement that has one, without denied letters and letters of a list. A
    hypothetical letter counts only if there is no other, and if `supposed`."""
    last, hypothetical = options.last, None
    upper, lower = rf"([A-{last}])\b", rf"([a-{last.lower()}])(?:\s*(?:[)\]}}.,;:]|$)|(?={RIGHT}))"
    not_listed = rf"(?!{another_letter_pattern(last)})"
    said_of_letter = rf"\s+{REASON}|{RIGHT}|{_denied_letter_pattern(last)}|{SURE}\s*(?:[.,;:!)]|$)"
    for says in announcements:
        announced: list[tuple[int, int]] = []
        for letter in (upper + not_listed, lower):
            for match in re.finditer(rf"(?i:{says}){letter}", text):
                preceding, behind = before_place(text, match.start()), _text_after(text, match.end(1), options)
                if re.search(r"\bor\s*$", preceding) or NOT.search(preceding) or re.match(WRONG, behind):
                    continue
                if joins_letters(preceding, rf"\b[A-{last}][)\]]?,?\s+{JOINS}\s*$"):  # "option B and option C"
                    continue
                if re.match(r"\s*\?", behind):  # a question
                    continue
                if says == CORRECTS and (
                    _is_word_of_option(match.group().split()[0], options) or _is_verdict(match.group(), behind)
                ):
                    continue
                if SUPPOSES.search(before_place(text, match.start(1))) and not re.match(
                    CORRECTS, match.group(), re.IGNORECASE
                ):
                    hypothetical = number_of(match.group(1)) if hypothetical is None else hypothetical
                    continue
                if _names_another_option(normal_text(behind.lstrip(".):] ")), number_of(match.group(1)), options):
                    continue
                announced_text = match.group(1) + behind
                signed = _match_initial_signs(announced_text, options)
                if signed is not None:  # "The answer is C++"
                    announced.append((match.start(1), signed))
                    continue
                if re.match(r"\s+[a-z]", behind) and not re.match(said_of_letter, behind):
                    option_named = _match_initial_words(announced_text, options.plain)
                    if option_named is not None:  # "The answer is C major"
                        announced.append((match.start(1), option_named))
                    if option_named is not None or says != SAYS or match.group(1) in "AI":
                        continue
                announced.append((match.start(1), number_of(match.group(1))))
        if announced:
            return max(announced)[1]
    return hypothetical if supposed else None


def _text_after(text: str, position: int, options: Options) -> str:
    """Return the text after a place, limited to a length in which two options fit."""
    return text[position : position + 300 + 2 * max(map(len, options.literal))]


def _is_verdict(correction: str, following: str) -> bool:
    """Return whether a "no" before a letter is a verdict on the previous option ("C: no. D: no."), no correction."""
    return (
        re.match(r"no\s*[.:,–—-]", correction, re.IGNORECASE) is not None
        and re.match(SAID_OF_IT, following) is not None
    )


def _is_word_of_option(word: str, options: Options) -> bool:
    """Return whether a word occurs in an option."""
    own = re.compile(rf"(?<!\w){re.escape(word.strip(',.:;').lower())}(?!\w)")
    return any(own.search(option) for option in options.literal)


def _match_initial_words(text: str, plain_options: Sequence[str]) -> int | None:
    """Return the option of several words with which a text begins."""
    own = f"{plain_text(normal_text(text))} "
    begun = [number for number, option in enumerate(plain_options) if " " in option and own.startswith(f"{option} ")]
    return max(begun, key=lambda number: len(plain_options[number]), default=None)


def _match_initial_signs(text: str, options: Options) -> int | None:
    """Return the option with which a text begins, for letters with signs (C#, A+) or several letters (b, e, a)."""
    lowered = normal_text(text).lower()
    matching = [
        number
        for number, option in enumerate(options.literal)
        if re.fullmatch(r"[a-z](?:[^\w\s]+|(?:[\W_]+[a-z])+)", option)
        and re.match(rf"{re.escape(option)}(?![^\s.,;:!?)])", lowered)
    ]
    return max(matching, key=lambda number: len(options.literal[number]), default=None)


def _find_letter_called_right(text: str, last_letter: str) -> int | None:
    """Return the first letter called the answer; a letter that only "seems" to be it is used if there is no other."""
    seeming: int | None = None
    for match in re.finditer(rf"(?:^|\s)[(\[]?([A-{last_letter}])[)\]]?({RIGHT})", text):
        before = before_place(text, match.start(1))
        if NOT.search(before) or OPEN.search(before):
            continue
        if re.match(r"\s+(?:seems|looks|sounds|appears)\b", match.group(2)) is None:
            return number_of(match.group(1))
        seeming = number_of(match.group(1)) if seeming is None else seeming
    return seeming


def _find_letter_called_fitting(text: str, last_letter: str) -> int | None:
    """Return the option of which a text says that it fits ("Option C matches the video"), if it is only one."""
    option = rf"(?i:\b(?:option|choice|answer|only(?:\s+option)?)\s+)[(\[]?([A-{last_letter}])[)\]]?(?i:{SHOWN})"
    options_shown = {
        number_of(match.group(1))
        for match in re.finditer(option, text)
        if not NOT.search(before_place(text, match.start()))
    }
    return options_shown.pop() if len(options_shown) == 1 else None


def _find_bracketed_letter(text: str, options: Options) -> int | None:
    """Return the letter in brackets, if it is only one and not joined to a further letter ("(B) or C")."""
    if re.search(rf"[(\[][A-{options.last}]{another_letter_pattern(options.last)}", text):
        return None
    found = {number_of(letter) for letter in re.findall(rf"[(\[]([A-{options.last}])[)\]]", text)}
    return found.pop() if len(found) == 1 else None


def _find_capitals(text: str, options: Options) -> tuple[set[int], set[int]]:
    """Return the capitals that are not words of a sentence: those that stand alone, and those after a word that they
    may label ("clip A")."""
    standalone, labelling = set[int](), set[int]()
    unjoined = without_joined_letters(text, options.last)
    if unjoined is None:
        return standalone, labelling
    text = unjoined
    for match in re.finditer(rf"\b([A-{options.last}])\b(?!['’])", text):
        preceding = before_place(text, match.start())
        if NOT.search(preceding) or WRONG_ONES.search(preceding.rstrip()) or re.match(WRONG, text[match.end() :]):
            continue
        if _is_letter(match.group(1), text[match.end() :]):
            (labelling if LABELS.search(preceding) else standalone).add(number_of(match.group(1)))
    return standalone, labelling


def _is_letter(letter: str, following: str) -> bool:
    """Return whether a capital before this text is not a word of a sentence."""
    return not re.match(r"\s+[a-z]|-[a-z]", following) or (
        letter not in "AI" and re.match(rf"\s+{REASON}", following) is not None
    )
