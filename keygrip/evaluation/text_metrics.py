"""Metrics of generated text: BLEU, CIDEr and METEOR for captions, the ten-annotator rule for question answering."""

from __future__ import annotations

import logging
import re
import shutil
import string
import threading
from collections.abc import Sequence

log = logging.getLogger(__name__)

METEOR_S = 120.0
NOTHING_SAID = "xxnothingxx"  # replaces an empty caption, for which the Java program waits forever
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Contractions that the published script writes with their apostrophe; "were" and "we're", "well" and "we'll" differ.
CONTRACTIONS = {
    "d": "he how it someone something there they where who you",
    "ll": "how it somebody someone something they what who why you",
    "re": "there they what why you",
    "s": "he how somebody someone that there what when where who why",
    "t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won "
    "wouldn",
    "ve": "could might must not should they we what where who would you",
}
TWICE_CONTRACTED = {
    "d've": "he it she somebody someone something there they we who you",
    "t've": "couldn hadn mightn shouldn wouldn",
}
OTHER_CONTRACTIONS = {
    **{"oclock": "o'clock", "maam": "ma'am", "twas": "'twas", "somebody'd": "somebodyd"},
    **{"yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll"},
    **{"yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"},
    **{"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"},
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}


def caption_metrics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `bleu_1` .. `bleu_4`, `cider`, and `meteor` if Java runs, computed by pycocoevalcap.

    With Java, sentences are split by the Penn Treebank tokenizer, as in published figures (`treebank_tokenizer` is 1).
    Without Java, they are split at white space after punctuation is removed (0), and a warning is logged: BLEU and
    CIDEr of the two are not comparable. CIDEr weights words by their rarity in all references; with fewer than two
    captions it is meaningless and left out.

    Args:
        candidates: one caption per video. references: the true captions of each.

    Raises:
        ValueError: There is no caption, or a video without a reference.
        ImportError: pycocoevalcap is not installed.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError(f"{len(candidates)} captions for {len(references)} videos: each needs one, and a reference")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError("caption metrics need pycocoevalcap: pip install 'keygrip[vlm]'") from error
    generated = {index: [text] for index, text in enumerate(candidates)}
    true = {index: list(texts) for index, texts in enumerate(references)}
    treebank = _treebank_words([generated, true])
    if treebank is None:
        generated, true = (
            {n: [" ".join(_split_words(t)) for t in texts] for n, texts in table.items()} for table in (generated, true)
        )
    else:
        generated, true = treebank
    scores, _ = Bleu(4).compute_score(true, generated, verbose=0)
    figures = {f"bleu_{order}": float(score) for order, score in enumerate(scores, 1)}
    figures["treebank_tokenizer"] = float(treebank is not None)
    if len(candidates) > 1:
        figures["cider"] = float(Cider().compute_score(true, generated)[0])
    if treebank is not None and (meteor := _compute_meteor(true, generated)) is not None:
        figures["meteor"] = meteor
    return figures


def _treebank_words(tables: Sequence[dict[int, list[str]]]) -> list[dict[int, list[str]]] | None:
    """Return the texts of tables as the Penn Treebank tokenizer splits them, or None, with a warning, if it cannot run:
    there is no Java, only a placeholder for it (as on macOS), or its folder cannot be written, as it requires."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    reason = "they need Java, which is not installed"
    if shutil.which("java") is not None:
        try:
            words: list[dict[int, list[str]]] = [
                PTBTokenizer().tokenize(
                    {key: [{"caption": _join_lines(text)} for text in texts] for key, texts in table.items()}
                )
                for table in tables
            ]
        except OSError as error:
            reason = f"the tokenizer failed ({error})"
        else:
            if [_count_texts(table) for table in words] == [_count_texts(table) for table in tables]:
                return words
            reason = "they need Java, which is installed but does not run"
    log.warning("going on without METEOR and the Penn Treebank tokenizer: %s", reason)
    return None


def _count_texts(table: dict[int, list[str]]) -> dict[int, int]:
    return {key: len(texts) for key, texts in table.items()}


def _compute_meteor(true: dict[int, list[str]], generated: dict[int, list[str]]) -> float | None:
    """Compute METEOR with its Java program, which never answers to some inputs; it is left out after a time limit."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    watchdog = threading.Timer(METEOR_S + 0.1 * len(generated), scorer.meteor_p.kill)
    watchdog.start()
    try:
        filled = {index: [texts[0] or NOTHING_SAID] for index, texts in generated.items()}
        return float(scorer.compute_score(true, filled)[0])
    except (ValueError, OSError) as error:
        log.warning(
            "METEOR's Java program failed (%s): going on without it", (str(error).splitlines() or ["no answer"])[0]
        )
        # the failed call still holds the old lock, and the scorer's end would wait for it
        scorer.lock = threading.Lock()
        return None
    finally:
        watchdog.cancel()


def _join_lines(text: str) -> str:
    """Remove line breaks, and never return empty text, because the Java programs read line by line."""
    return " ".join(text.split()) or "."


def _split_words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def _written_with_apostrophes() -> dict[str, str]:
    """Return the contractions by their forms without an apostrophe, or without one of two."""
    known = dict(OTHER_CONTRACTIONS)
    for ending, words in CONTRACTIONS.items():
        known |= {f"{word}{ending}": f"{word}'{ending}" for word in words.split()}
    for endings, words in TWICE_CONTRACTED.items():
        first, second = endings.split("'")
        for word in words.split():
            known[f"{word}{first}'{second}"] = known[f"{word}'{first}{second}"] = f"{word}'{endings}"
    return known


WITH_APOSTROPHES = _written_with_apostrophes()


def normalised_answer(answer: str) -> str:
    """Normalise an answer for the VQA rule: lower case, digits for number words, no articles and no punctuation.

    Each sign of punctuation becomes a space ("t-shirt" is "t shirt"), or is removed wherever it occurs, if it is next
    to a space once or the answer has a comma between digits ("1,000" is "1000"). Points without a following digit are
    removed ("5 p.m." is "5 pm", 3.5 stays). Contractions of the script's list have their apostrophes ("dont" is
    "don't"; "its" and "it's" differ). Signs that the script does not count as punctuation stay (50%, $5, 5:30).

    Source: vqaEval.py of the VQA data set's evaluation script (github.com/GT-Vision-Lab/VQA).
    """
    text = answer.lower().replace("\n", " ").replace("\t", " ").replace("\u2019", "'").strip()
    joined = re.search(r"\d,\d", text) is not None
    removed = {sign for sign in PUNCTUATION if joined or f"{sign} " in text or f" {sign}" in text}
    text = text.translate({ord(sign): "" if sign in removed else " " for sign in PUNCTUATION})
    words = (NUMBER_WORDS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split())
    return " ".join(WITH_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """VQA accuracy: the mean of min(1, agreeing annotators / 3) over all subsets that leave out one annotator.

    With the usual ten annotators, an answer given by three or more has (nearly) full accuracy. With fewer than four
    annotators, one who agrees is enough. Answers are normalised also if all annotators agree. The data set's script
    omits this and counts "Yes" as wrong if all ten annotators gave "yes".

    Raises:
        ValueError: There is no annotated answer.
    """
    if not annotated:
        raise ValueError("the VQA rule needs at least one annotated answer")
    candidate = normalised_answer(answer)
    agree = [normalised_answer(other) == candidate for other in annotated]
    if len(agree) < 4:
        return float(any(agree))
    return sum(min(1.0, (sum(agree) - agrees) / 3) for agrees in agree) / len(agree)
