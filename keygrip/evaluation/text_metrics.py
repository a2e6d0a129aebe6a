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
# Apostrophes of contractions; an answer is the same with and without them.
CONTRACTED = re.compile(
    r"\b(\w+(?='(?:ve|re|ll|d)\b)|\w*n(?='t\b)|o(?='clock\b)|y(?='all\b)|ma(?='am\b)|"
    r"(?:he|how|she|somebody|someone|that|there|what|when|where|who|why)(?='s\b))'"
)
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")
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


def normalised_answer(answer: str) -> str:
    """Normalise an answer for the VQA rule: lower case, digits for number words, no articles and no punctuation.

    Points without a following digit are removed ("5 p.m." is "5 pm", 3.5 stays), and so are commas between digits
    (1,000) and the apostrophes of contractions ("don't" is "dont", "it's" and "its" differ). Other punctuation becomes
    a space; signs that the evaluation script does not count as punctuation stay (50%, $5, 5:30).

    Source: vqaEval.py of the VQA data set's evaluation script (github.com/GT-Vision-Lab/VQA).
    """
    text = answer.lower().replace("\n", " ").replace("\u2019", "'").strip()
    text = CONTRACTED.sub(r"\1", re.sub(r"(?<=\d),(?=\d)", "", text))
    text = re.sub(r"\.(?!\d)", "", PUNCTUATION.sub(" ", text))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)


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
