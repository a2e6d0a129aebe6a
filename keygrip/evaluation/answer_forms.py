"""Patterns of the forms in which models answer multiple-choice questions.

They are matched against answers after NFKC normalisation and removal of `WRAPPED`; for example "don't" has become
"don t".
"""

from __future__ import annotations

import re

# Marks that models put around a letter: brackets, quotes, Markdown, LaTeX, tags.
WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|<[^<>]{2,20}>|[*_`$\"'“”‘’]")
THOUGHT = re.compile(
    r"<think(?:ing)?>.*?(?:</think(?:ing)?>|$)|^.*</think(?:ing)?>|◁think▷.*?(?:◁/think▷|$)|^.*◁/think▷|"
    r"\[think\].*?(?:\[/think\]|$)|^.*\[/think\]",
    re.DOTALL | re.IGNORECASE,
)
# Tags of the answer after tagged reasoning. <conclusion> (LLaVA-CoT) is used if there is no <answer>.
TAGGED = tuple(
    re.compile(rf"<{tag}>(.*?)(?:</{tag}>|$)", re.DOTALL | re.IGNORECASE) for tag in ("answer", "conclusion")
)
# A further question that a model invents when it does not stop after its answer.
GOES_ON = re.compile(r"\n[^\S\n]*(?:<\|\w+\|>\s*)?(?:(?:question|q)(?:\s*\d+)?|user|human)\s*:", re.IGNORECASE)
# Words of an announcement that may also be options ("The right answer is left"). At a line's end they announce nothing.
QUALIFIES = re.compile(
    r"(^[^\w\n]*|\b(?:an?|my|the)[^\S\n]+)(?:(?:best|correct|final|right|true)[^\S\n]+)+"
    r"(?=(?:answer|choice|option)[^\S\n]*(?:(?:is|was|would be|should be)\b|[:=-]))",
    re.IGNORECASE | re.MULTILINE,
)
# Words of agreement that are not an option "right" ("All right: B", "That's right, it moves up").
AGREES = re.compile(
    r"(?:(?<=[\n.;!?])|^)\W{0,4}(?:all\s+right|(?:that|this|you)\s(?:s|is|re|are)\s+right)[,:.!;–—-](?=\s*\w)",
    re.IGNORECASE,
)
# "A:" that means "Answer:", after a repeated question ("Q: What colour? A: B") or before a letter at the text's end.
ANSWERS_IT = re.compile(
    r"(?:(?:^|\n)[^\S\n]*(?:question|q)(?:[^\S\n]*\d+)?[^\S\n]*:[^\n]*\n\s*A:(?=\s*\w)|\n[^\S\n]*A:(?=\s*[(\[]?[B-Z]\W*$))",
    re.IGNORECASE,
)
# "A:" before a refusal means "Answer:" too.
ABSTAINS = re.compile(r"(^\W*A\s*[:.)–—-]\s*)?(?:\bn\s?/\s?a\b|\bn\.\s?a\.(?!\w))", re.IGNORECASE)
# Capitals that are no option letters: "A/C unit", "U.S.A.".
COMPOUND = re.compile(r"(?<!\w)[A-Z][/&][A-Z](?=\s+[a-z])(?!\s+(?:and|are|because|both|or)\b)|(?<!\w)(?:[A-Z]\.){2,}")
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts without spaces around a letter
BESIDE_CJK = re.compile(rf"(?<=[{CJK}])(?=[A-Za-z])|(?<=[A-Za-z])(?=[{CJK}])")
NAMES = r"\b(?:(?:answer|option|choice|correct one|solution|answer choice)\b|(?:ans|opt)\b\.?)"
OPENED = r"\s*(?:option|opt\b\.?|choice|letter|answer)?\s*[:=-]?\s*[(\[{]?\s*"
# Words that announce a letter, in order of reliability: the first group that names a letter decides.
SAYS = (
    rf"{NAMES}\s*(?:(?:is|are|was|would be|should be|must be|will be|seems to be|here is)\s*[:=-]?|[:=-]){OPENED}"
    r"|\bi(?: would| ll| will| d| am| m)? (?:choose|chose|pick|picked|select|selected|go with|go for|opt for|"
    r"lean(?:ing)? to(?:wards?)?)\b\s*,?" + OPENED
)
CONCLUDES = (
    rf"\b(?:therefore|thus|so|hence|(?:in\s+)?conclusion|leav(?:es|ing)(?:\s+(?:only|us\s+with))?)\b\s*,?{OPENED}"
)
MENTIONS = rf"{NAMES}{OPENED}"
I_SAY = (
    r"\b(?:i(?: would| d)? (?:say|answer|think|guess|believe)|it is|it ?s|it must be|(?:most\s+likely|probably))\b\s*,?"
    + OPENED
)
# Words between two letters that name both ("B and/or C", "A to D").
JOINS = (
    r"(?:(?:or|and)(?:\s*/\s*(?:or|and))?|as\s+well\s+as|plus|(?:along|together)\s+with|(?:and\s+)?then|to|through)\b"
)
MY_ANSWER = (
    r"(?:my\s+(?:\w+\s+)?(?:answer|choice|guess|mind|opinion|option|response|selection)|"
    r"the\s+(?:\w+\s+)?(?:answer|choice|option))"
)
# Words before the first of two letters that only the second replaces ("I change my answer from A to B").
CHANGES = re.compile(
    rf"\b(?:(?:chang|correct|revis|switch|updat)(?:es?|ed|ing)?\s+(?:{MY_ANSWER}\s*[:,]?\s*)?|"
    rf"(?:adjust|alter|amend|modif|mov|shift)(?:e|ed|ied|ing|y|ying)?\s+{MY_ANSWER}\s*[:,]?\s*|"
    rf"{MY_ANSWER}\s+(?:(?:has|is|was)\s+)?(?:goes|moved|moves|shifted|shifts|went)\s+|correction\s*[:,]\s*|"
    # "it" is the answer only in the first person and the imperative: "He changes it from A to B" describes something
    r"(?:^|[.:;,!?–—-]|\b(?:actually|but|let\s+me|no|please|so|wait|"
    r"i(?:\s+(?:am|d|going|have|like|ll|m|must|need|should|to|want|will|would))*))\s*"
    r"(?:chang|correct|revis|switch|updat)(?:e|ed|ing)?\s+(?:it|that|this)\s+)"
    r"(?:from\s+)?(?:option\s+)?[(\[]?$",
    re.IGNORECASE,
)
# A letter that corrects an earlier one ("The answer is A. No wait, C.").
CORRECTS = (
    r"(?:\b(?:actually|however|rather|correction|(?:no\W+)?wait(?:\W+no)?)\b|(?<!anything )(?<!everything )(?<!any )"
    rf"(?<!all )\bbut\b|\bno\s*[,:.–—-])[\s,:.–—-]*(?:(?:the\s+)?(?:{SAYS})|{I_SAY})?{OPENED}"
)
# Words earlier in the sentence that make a letter hypothetical ("If it were red, the answer would be A").
SUPPOSES = re.compile(
    r"\b(?:at first|first glance|initially|first thought|(?:might|may|could|would) (?:think|say|assume|guess)|"
    # not "whether it barks, the answer is B" or "he thought it was open, so the answer is B"
    r"(?:whether|thought(?: that)?) (?:the (?:\w+ )?(?:answer|choice|option)\b|"
    r"it (?:is|was|could be|might be|should be) (?:(?:option|choice) )?[(\[]?$)|"
    r"if the answer|if (?!(?:i|we) (?:had|have|must)\b|asked\b|forced\b|you\b)[^.;!?]*\b(?:was|were|had|would)\b)"
    r"(?:(?!\b(?:but|however)\b)[^.;!?])*$",
    re.IGNORECASE,
)
REASON = r"(?:because|since|as(?!\s+well)|given|based|due|and\s+not)\b"
# Words after a letter that call it the answer ("B is the most likely answer"), or not the answer.
FITTING = r"(?:accurate|appropriate|consistent|fitting|likely|logical|plausible|probable|reasonable|suitable)"
MOST = rf"most\s+{FITTING}|more\s+{FITTING}(?=\s*(?:[.,;:!)]|$|(?:than|because|since)\b))"
BETTER = r"better(?=\s*(?:[.,;:!)]|$|(?:than|answer|choice|option|fit|match)\b))"
FITS = r"(?:answers|captures|describes|explains|fits|matches|reflects|represents|summari[sz]es)"
RIGHT = (
    r"\s+(?:ist\s+(?:die\s+)?richtig\w*|(?:est|es|est\u00e1|\u00e8)\s+(?:la\s+)?(?:corr?ect[aeo]?|corrett[ao]|bonne|juste)|"
    r"(?:is|was|seems|looks|sounds|appears|would be|must be|should be|has to be)\s+(?:to be\s+)?(?:\w+ly\s+)?"
    rf"(?:(?:the\s+|my\s+)?(?:(?:one|only|single|final)\s+)?(?:correct|best|{BETTER}|{MOST}|"
    r"right(?!\s+(?:behind|next|beside|after|before)))|"
    rf"(?:the|my)\s+(?:(?:only|single|final)\s+)?(?:answer|choice|one))|(?:best|most \w+ly)\s+{FITS}|{FITS}\s+best)\b"
)
# Words that say of an option that it fits; used if they refer to only one option ("Option C matches the video").
SHOWN = (
    r"\s+(?:(?:\w+ly\s+)?(?:aligns\s+with|corresponds\s+to|"
    rf"{FITS})|(?:is|was)\s+(?:\w+ly\s+)?(?:confirmed|depicted|seen|shown|supported|visible))\b"
)
TICK = r"[\u2705\u2714\u2713\u2611]"
WRONG = (
    r"[)\]}]?(?:\s*(?:\u4e0d|\u9519|\u662f\u9519)|\s+(?:(?:is|was|seems|looks|would be|can be|could be)\s+(?:\w+ly\s+)?"
    r"(?:not|incorrect|wrong|false|unlikely|impossible|less|least|ruled|excluded|eliminated)\b|"
    r"(?:does|did|can|could|would)\s+not\b|(?:isn|doesn|didn|can|couldn|wouldn)\s?t\b|cannot\b))"
)
# A rejection of an option, where several options may be joined, and a concession ("I may be true, but"). Not every
# "not" is a rejection: "II is not ruled out", "II does not contradict it".
SAID_WRONG = (
    r"[)\]]?\s+(?:(?:is|are|was|were|seems?|looks?|(?:may|might|must|should|will|would|can|could)\s+be)\s+"
    r"(?:(?:both|all)\s+)?(?:\w+ly\s+)?(?:incorrect|wrong|false|unlikely|impossible)\b|"
    r"(?:(?:is|are|was|were|seems?|looks?|(?:can|could)\s+be)\s+not|(?:is|are|was|were)n\s?t|cannot\s+be)\s+"
    r"(?:\w+ly\s+)?(?:correct|right|true|it|supported|confirmed|shown|seen|depicted|visible|the\s+(?:\w+\s+)?"
    r"(?:answer|option|choice|one))\b|"
    r"(?:may|might|could|can)\s+be\s+\w+\W*\b(?:but|however|yet)\b)"
)
# Part of a question ("a yes/no question"), or an undecided answer ("yes or no").
EITHER_WAY = (
    r"(?<!\w)(?:yes(?:\s*[/&]\s*|,?[\s-]+or[\s-]+|\s+and\s+)no|no(?:\s*[/&]\s*|,?[\s-]+or[\s-]+|\s+and\s+)yes)(?!\w)"
)
DENIES = r"(?:not|never|cannot|(?:is|are|was|were|do|does|did|has|have|had|ca|could|would|wo|should)n\s?t)"
NOT = re.compile(
    r"(?:\u4e0d\u662f|\u5e76\u975e|\u4e0d\u9009|\b(?:not|neither|nor|no|than|unlike|hardly|unlikely(?:\s+to\s+be)?|"
    rf"{DENIES}(?:\s+(?:actually|even|ever|quite|really))?(?:\s+(?:appear|be|become|contain|depict|find|have|look|see|seem"
    r"|show|turn)s?(?:\s+(?:like|to\s+be|to\s+have))?)?(?:\s+any)?|"
    r"(?:any|anything|everything|all)\s+(?:but|except)|"
    # in "A: wrong. B" the word refers to the previous option
    r"instead of|(?<![:;,.)–—-]\s)(?:wrong|incorrect|worst)|"
    r"(?:not|don t|doesn t|didn t|cannot|can t)\s+(?:think|believe|say|mean)(?:\s+that)?(?:\s+the)?|doubt(?:\s+that)?))"
    r"\s*(?:option|opt\.?|choice)?\s*[(\[]?$",
    re.IGNORECASE,
)
# Words before a list of wrong options ("Incorrect options:"); "The false statement is:" and "not sure, but:" are none.
_ONES = r"(?:answers?|choices?|letters?|ones?|options?)(?:\s*\(s\))?"
WRONG_ONES = re.compile(
    r"(?:(?:(?<!\bis\s)|(?<=\bfollowing\sis\s))\b(?:incorrect|wrong|false|eliminated|excluded|rejected|ruled?\s+out)"
    rf"(?:\s+the\s+following)?(?:\s+{_ONES})?|\b{_ONES}\s+(?:that|which)\s+(?:(?:are|is|was|were)\s+not|"
    r"(?:are|is|was|were)n\s?['’]?t|do(?:es)?\s+not)\s[^.,:;!?]*|"
    r"\b(?:following|these|answers|choices|letters|ones|options)\s+"
    r"(?:(?:are|were)\s+not|(?:are|were)n\s?['’]?t|not)\s+"
    r"(?:correct|possible|right|seen|shown|supported|true|valid|visible)\b[^.,:;!?]*)\s*:$",
    re.IGNORECASE,
)
# A line that ends with a verdict on an option ("C. Green - No."): the verdict does not refer to the next line. A line
# with only "No." rejects the text before it.
VERDICT = re.compile(
    r"\b(?:no|not|never|wrong|incorrect|false|worst|hardly|unlikely|impossible)\s*[)\]}]*$|(?!^)\bno\s*[)\]}]*[,:.–—-]$",
    re.IGNORECASE,
)
# A verdict on an option directly after its letter.
SAID_OF_IT = r"[)\]}.:]*\s*[:–—>(-]*\s*(?i:no|not|yes|wrong|right|correct|incorrect|false|true|unlikely)\b"
# Text between an option's words, which may end in a full stop, and its verdict ("A man runs. - No").
BEFORE_SAID = r"(?:\.?\s*[:,;(\[>=\u2192\u2013\u2014-][\s:,;(\[>=\u2192\u2013\u2014-]*|\s*)"
# A verdict in a further sentence ("B. red. This is wrong").
SAID_OF_THAT_WRONG = (
    r"[\s.:,;(–—-]*\b(?:(?:this|that|it)\b|(?:this|that|the)\s+(?:option|answer|choice|one|statement))\s*(?:is|was|s)"
    r"(?:\s+(?:\w+ly\s+)?(?:incorrect|wrong|false)|(?:\s+not|n\s?t)\s+(?:the\s+)?(?:correct|right|true))\b"
)
SAID_NO = rf"(?i:(?:\.{{1,2}}\s+|{BEFORE_SAID})(?:(?:is|was)\s+)?(?:no|not|wrong|incorrect|false)\b)"
# in the option's line, so it refers only to this option
SET_OFF = r"\.?[^\S\n]*(?:[:,;(\[>=\u2192\u2013\u2014-]|(?:is|was)\b)"
# A verdict that the next option may follow directly ("A. red - No B. blue - Yes").
ENDS_SAID = r"\b(?i:yes|no|wrong|right|incorrect|correct|false|true)[)\]]?"
# "Is it C?", and words before a letter that leave its truth open ("whether A or B is right").
ASKS = re.compile(
    r"\b(?i:is|was|could|would|might|can|should)\s+(?i:it|that|this)\s+(?i:be\s+)?"
    r"(?i:(?:option|opt\.?|choice|letter)\s+)?[(\[]?[A-Z][)\]]?\s*\?"
)
OPEN = re.compile(r"\b(?:or|whether|if)\s*(?:(?:option|opt\.?|choice)\s*)?[(\[]?$", re.IGNORECASE)
# Words before capitals that may name something other than an option ("clip A", "Player B").
LABELS = re.compile(
    r"\b(?:angle|camera|chart|clip|column|exhibit|figure|frame|graph|group|image|line|panel|part|person|phase|photo|"
    r"picture|plan|player|point|position|room|row|scene|section|segment|shot|side|speaker|step|team|type|video|view|"
    r"vitamin|zone)\s+$",
    re.IGNORECASE,
)
# Texts that contain little besides a letter, or besides the number of an option.
LIKE = r"(?:(?i:(?:it|that|this)\s+)?(?i:looks|seems)\s+(?i:like)\s+)"
SURE = r"(?:\s+(?i:for sure|it is|to me|in my (?:opinion|view)|then))"
COUNTED = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
NUMBERED = re.compile(
    r"(?:it(?:\s+i)?\s?s\s+)?(?:(?:the|my)\s+)?(?:(?:(?:correct|right|best|final)\s+)?(?:answer|choice|option)\s*(?:is|:)\s*)?"
    rf"(?:(?:option|choice)\s+(?:number\s+|#\s*)?([1-9]|{'|'.join(COUNTED)})|"
    rf"the\s+({'|'.join(ORDINALS)}|[1-9](?=st|nd|rd|th))(?:st|nd|rd|th)?\s+(?:option|choice|one))\W*",
    re.IGNORECASE,
)


# Text after an option "no" or "I" that is an answer and not part of a sentence ("there is no cat", "I see", "i.e.").
ENDS_NO = rf"(?!\.\s?e\b)\s*(?:[.,;:!)\]}}]|$|{REASON})"
