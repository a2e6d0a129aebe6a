"""Recognise answers to a multiple-choice question that name no option because they refuse ("I don't know", "Sorry, I
can't see the video") or reject all options ("None of the above")."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keygrip.evaluation.answer_forms import FITTING
from keygrip.evaluation.option_texts import Options, number_of, plain_text

# The patterns are matched against texts without quotes, in which "don't" is "don t".
NEGATED = r"(?:\s?not|n\s?t)"
SUBJECT = r"(?:(?:i|one|we|you)\s+(?:(?:honestly|just|really|simply)\s+)?)?"
I_AM = r"(?:(?:i|we)\s*(?:am|are|m|re)\s+)?"
IT_IS = r"(?:(?:it|that|the\s+answer|this)\s*(?:is|s)\s+)?"
VIDEO = (
    r"(?:(?:an?|any|that|the|these|this|your)\s+)?(?:(?:given|provided)\s+)?"
    r"(?:clip|content|footage|frame|image|picture|scene|video)s?"
)
INFORMATION = r"(?:\w+\s+)?(?:context|data|details?|evidence|information)\b"
UNABLE = rf"(?:{SUBJECT}(?:ca|can|could){NEGATED}|{I_AM}(?:not\s+able|unable)\s+to)\s+"
FIND = r"(?:answer|determine|identify|infer|know|say|tell)\b"
# The refusal is complete, so that "Unknown people walk" and "None of the people walk" are no refusals.
ENDS = r"(?=\s*(?:$|(?:at|based|by|for|from|given|here|in|on|with|without)\b))"
ALL_OPTIONS = (
    r"(?:it|them|these|those|(?:(?:the|these|those)\s+)?(?:(?:available|given|listed|provided)\s+)?"
    r"(?:above|answers|choices|options))"
)
# After "I cannot tell", "it is impossible to tell" and the like, these words say what is seen ("them apart").
SEEN = r"other\b|the\s+difference\b|(?:both|the|them|these|those)\s+(?:\w+\s+){0,2}apart\b|why\b"
NOT_DESCRIBING = (
    r"(?!\s+(?:(?:an?|any)\s+(?!more\b|(?:\w+\s+){0,2}(?:answers?|choice|option)\b|"
    rf"of\s+(?:that|this|{ALL_OPTIONS})\b)|{SEEN}))"
)
# Without "I", "a" and "any" begin what is seen only with these nouns: "impossible to tell a number" is a refusal.
NOT_SEEN = rf"(?!\s+(?:(?:an?|any)\s+(?:\w+\s+)?(?:changes?|differences?|distinctions?)\b|{SEEN}))"
# These may follow an answer: "I don't know why", "I don't know if that is right".
NOT_OF_REASONS = r"(?!\s+(?:why|(?:if|whether)\s+(?:it|that|this))\b)"
REFUSES = re.compile(
    "|".join(
        (
            rf"{I_AM}(?:(?:really|so|very)\s+)?sorry\b(?!\s+(?:about|for)\b)",
            r"(?:(?:i\s+apologi[sz]e|my\s+apologies|apologies)\b(?!\s+(?:about|for)\b))",
            r"as\s+an?\s+(?:ai|(?:large\s+)?language\s+model)\b",
            rf"{UNABLE}{FIND}{NOT_DESCRIBING}",
            rf"{UNABLE}(?:(?:assist|help)|(?:access|process|see|view|watch)\s+{VIDEO}){ENDS}",
            rf"(?:(?:it|that|the\s+(?:answer|question)|this)\s+)?(?:ca|can|could){NEGATED}\s+be\s+"
            r"(?:answered|determined|inferred|known|told)\b(?!\s+apart\b)",
            rf"{SUBJECT}do(?:es)?{NEGATED}\s+know\b{NOT_OF_REASONS}",
            rf"{SUBJECT}(?:have\s+)?no\s+(?:clue|idea)\b{NOT_OF_REASONS}",
            rf"{I_AM}(?:not\s+sure|uncertain|unsure)(?:{ENDS}|\s+(?:about|how|what|when|where|which|who)\b)",
            rf"{IT_IS}(?:not\s+clear|unanswerable|unclear|undetermined|unknown|unspecified){ENDS}",
            rf"{IT_IS}(?:impossible|not\s+possible)\s+to\s+{FIND}{NOT_SEEN}",
            rf"there\s*(?:is|s)\s+no\s+way\s+(?:of\s+(?:knowing|telling)|to\s+{FIND}){NOT_SEEN}",
            rf"(?:there\s*(?:is|s)\s+)?(?:insufficient|not\s+enough)\s+{INFORMATION}",
            rf"there\s+isn\s?t\s+(?:enough|sufficient)\s+{INFORMATION}",
            rf"(?:{VIDEO}\s+do(?:es)?|{SUBJECT}do){NEGATED}\s+(?:contain|give|have|provide|show)\s+"
            rf"(?:any|enough|sufficient|the)\s+{INFORMATION}",
            rf"{SUBJECT}do{NEGATED}\s+have\s+access\b",
        )
    ),
    re.IGNORECASE,
)
REJECTS_ALL = re.compile(
    rf"none(?:\s+of\s+{ALL_OPTIONS})?(?:\s+(?:appl(?:y|ies)|fits?|match(?:es)?|(?:are|is)\s+(?:correct|right|shown)))?{ENDS}|"
    rf"{SUBJECT}(?:(?:ca|can|do){NEGATED}\s+see\s+any|see\s+none)\s+of\s+{ALL_OPTIONS}{ENDS}",
    re.IGNORECASE,
)
FINDS_NOTHING = re.compile(
    rf"{VIDEO}\s+do(?:es)?{NEGATED}\s+(?:contain|say|show|tell)"
    rf"(?:\s+(?:it|that|the\s+answer|this|any\s+of\s+{ALL_OPTIONS}))?{ENDS}|"
    rf"(?:(?:that|the\s+answer|this)\s*(?:is|s)\s+)?not\s+(?:given|mentioned|shown|specified|stated){ENDS}",
    re.IGNORECASE,
)
# Options that such a text may explain in other words, because they deny something or state that something is not known
# ("Not revealed", "He never sits", "Hard to say").
UN = (  # "unknown", but not "under", "unlock"
    r"un(?!button|cle|clip|cork|cover|der|do(?:es|ing)?\b|dress|fasten|fold|hook|i(?!dent|mag|nform)|load|lock|pack|plug|"
    r"roll|screw|seal|t(?:ie|il|o)|veil|wind|wrap|zip)\w{3,}"
)
OPTION_DENIES = re.compile(
    # "No" alone denies too, see OPTION_REJECTS.
    r"\b(?:no(?!\W*$)|(?<=\W)no|not|non|none|nor|neither|never|nobody|nothing|nowhere|cannot|ain\W?t|"
    r"(?:are|could|did|do|does|had|has|have|is|might|must|need|should|was|were|would|ca|wo)n\W?t|n\W{0,2}a|"
    rf"{UN}|illegible|impossible|in(?:accessible|applicable|audible|complete|conclusive|determina\w+|discernible|distinct|"
    r"sufficient|visible)|(?:absen|ambigu|apolog|confus|contradict|depend|disagree|doubt|fail|forg[eo]t|guess|hesita|"
    r"ignor|lack|myster|obscure|omit|puzzl|refus|refut|reject|speculat|vague|withh[eo]ld|wonder(?!ful))\w*|"
    r"den(?:y|ies|ied)|(?:difficult|hard)\s+to|hidden|idk|maybe|missing|more\s+(?:context|data|information)|neutral|"
    r"perhaps|possibly|secret|sorry|without)\b|^(?:other)?\W*$",
    re.IGNORECASE,
)
# Options of which every such text but a plain refusal may be an explanation ("No": "There is no information on this").
OPTION_REJECTS = re.compile(
    r"(?:f|n|nah|negative|no|nope)\W*$|.*\b(?:0|empty|false|incorrect|wrong|zero)\b", re.IGNORECASE | re.DOTALL
)
PLAINLY_REFUSES = re.compile(
    rf"{I_AM}(?:(?:really|so|very)\s+)?sorry|(?:i\s+apologi[sz]e|my\s+apologies|apologies)|"
    rf"as\s+an?\s+(?:ai|(?:large\s+)?language\s+model)(?:\s+language\s+model)?|{SUBJECT}do{NEGATED}\s+know|"
    rf"{SUBJECT}(?:have\s+)?no\s+(?:clue|idea)|{I_AM}(?:not\s+sure|unsure)|"
    rf"{UNABLE}(?:answer(?:\s+(?:that|the|this|your)\s+question)?|(?:assist|help)(?:\s+(?:you\s+)?with\s+(?:that|this))?|"
    rf"(?:access|process|see|view|watch)\s+{VIDEO})",
    re.IGNORECASE,
)
# After a refusal, words that call the option named before them the answer ("I'm not sure, but this is my best guess").
AFFIRMS = re.compile(
    r"(?!(?:correct|my|right)$)(?:i\s+(?:believe|guess|suppose|think)\s+(?:that\s+)?)?"
    r"(?:(?:(?:it|that|this)(?:\s+(?:answer|choice|one|option))?|the\s+(?:answer|choice|option))\s*"
    r"(?:appears|is|looks|s|seems|sounds|(?:could|may|might|must|should|would)\s+be)\s+(?:to\s+be\s+)?)?"
    r"(?:(?:likely|most\s+likely|probably)\s+)?"
    rf"(?:(?:an?|my|the)\s+)?(?:best|closest|correct|likely|(?:more|most)\s+{FITTING}|my|plausible|probable|probably|right)"
    r"(?:\s+(?:answer|bet|choice|fit|guess|match|one|option))?"
    rf"(?:\s+(?:to\s+me|in\s+my\s+(?:opinion|view)|(?:among|of|out\s+of)\s+{ALL_OPTIONS}|(?:based|given|judging)\b.*))?|"
    r"i\s+(?:believe|guess|suppose|think)\s+so|"
    r"i(?:\s+(?:d|ll|will|would))?\s+(?:choose|go\s+(?:for|with)|pick|select)\s+(?:it|that|this)(?:\s+(?:one|option))?",
    re.IGNORECASE,
)
CLAUSE_END = re.compile(
    r"[.,;:!?\n]+|\s(?=(?:because|but|however|though)\b)|"
    r"(?<!believe)(?<!guess)(?<!suppose)(?<!think)\s(?=so\b)",  # "I think so" is one clause
    re.IGNORECASE,
)
INTRODUCES = re.compile(
    r"\s*(?:(?:because|but|however|i\s*(?:am|m)\s+afraid(?:\s+that)?|since|so|though|unfortunately)\b\s*)*",
    re.IGNORECASE,
)
DENIED = re.compile(r"\b(?:cannot|no|none|not|\w+n\s+t)\b", re.IGNORECASE)
FUNCTION_WORDS = re.compile(
    r"\b(?:and|are|as|at|be|but|by|for|from|had|has|have|he|her|him|his|i|in|is|it|its|my|of|on|or|she|so|that|their|them|"
    r"there|they|this|to|was|we|were|will|with|you)\b"
)


def may_explain(option: str) -> bool:
    """Return whether an option (in lower case, without quotes) denies something or states that something is not known,
    so that a text that resembles a refusal may be its explanation."""
    return OPTION_REJECTS.match(option) is not None or OPTION_DENIES.search(option) is not None


def text_after_refusal(text: str, options: Options) -> str | None:
    """Return the text after the refusing clause at the beginning of a text that follows "A:"; None if the text does not
    begin with a refusal or may explain option A.

    It may explain option A if a further clause contains words of this option and no denial, or calls it the answer
    ("but this is my best guess"), or if the option denies something or states that something is not known ("Not
    revealed", "He never sits"). With the option "No", only plain refusals ("I don't know") explain nothing: "The video
    does not show this" does.
    """
    ends = [match.span() for match in CLAUSE_END.finditer(text)]
    begins = [0, *(end for _, end in ends)]
    spans = [
        (INTRODUCES.sub("", text[begin:end], count=1), behind)
        for begin, (end, behind) in zip(begins, [*ends, (len(text), len(text))], strict=True)
    ]
    spans = [(clause, behind) for clause, behind in spans if re.search(r"\w", clause)]
    if not spans or not any(pattern.match(spans[0][0]) for pattern in (REFUSES, REJECTS_ALL, FINDS_NOTHING)):
        return None
    clauses = [clause.strip() for clause, _ in spans]
    if OPTION_DENIES.search(options.literal[0]):
        return None
    if OPTION_REJECTS.match(options.literal[0]) and not all(map(PLAINLY_REFUSES.fullmatch, clauses)):
        return None
    own_words = set(FUNCTION_WORDS.sub(" ", options.plain[0]).split())
    explained = any(
        own_words & set(plain_text(clause).split())
        for clause in clauses[1:]
        if not (REFUSES.match(clause) or DENIED.search(clause))
    )
    return None if explained or _affirms(clauses[1:], options) else text[spans[0][1] :]


def _affirms(clauses: Sequence[str], options: Options) -> bool:
    """Return whether a clause after a refusal calls the option before it the answer, and neither this clause nor a
    later one names another option or refuses again."""
    first = next((index for index, clause in enumerate(clauses) if AFFIRMS.fullmatch(clause)), None)
    return first is not None and not any(
        REFUSES.match(clause) or _names_another_option(clause, options) for clause in clauses[first:]
    )


def _names_another_option(clause: str, options: Options) -> bool:
    """Return whether a clause contains the letter or the words of an option other than A."""
    # "I" is a pronoun here. A clause may have small letters that are no option ("I d say").
    small = re.fullmatch(r"(?:(?:choice|option)\s+)?[(\[]?([a-z])[)\]]?", clause, re.IGNORECASE)
    letters = [small[1]] if small else re.findall(rf"\b(?!I\b)[A-{options.last}]\b", clause)
    words = f" {plain_text(clause)} "
    return any(map(number_of, letters)) or any(own and f" {own} " in words for own in options.plain[1:])
