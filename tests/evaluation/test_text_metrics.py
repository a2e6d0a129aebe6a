"""Caption metrics against known values of the library, the VQA rule computed by hand, and options in generated text."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from pathlib import Path

import pytest

from keygrip.evaluation import text_metrics as metrics
from keygrip.evaluation.text_metrics import caption_metrics, normalised_answer, vqa_accuracy

TRUE = [["the cat sat on the mat"], ["a dog runs in the park"]]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Java takes seconds; only one test does it."""
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_java")
def test_true_captions_score_highest_and_unlike_ones_nothing() -> None:
    best = caption_metrics([texts[0] for texts in TRUE], TRUE)
    assert best["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert best["cider"] == pytest.approx(10.0, abs=1e-6)
    worst = caption_metrics(["zebra", "zebra"], TRUE)
    assert worst["cider"] == pytest.approx(0.0, abs=1e-6)
    assert worst["bleu_1"] < 1e-6


@pytest.mark.usefixtures("no_java")
def test_bleu_counts_matching_runs_of_words() -> None:
    found = caption_metrics(["the cat sat on a mat", "a dog runs in the park"], TRUE)
    assert found["bleu_1"] == pytest.approx(11 / 12, abs=1e-6)
    assert found["bleu_2"] == pytest.approx(math.sqrt(11 / 12 * 8 / 10), abs=1e-6)


@pytest.mark.usefixtures("no_java")
def test_without_java_there_is_no_meteor_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = caption_metrics(["The cat, sat on a mat.", "a dog runs in the park"], TRUE)
    assert "meteor" not in found
    assert found["treebank_tokenizer"] == 0
    assert found["bleu_1"] == pytest.approx(11 / 12, abs=1e-6)
    assert "Java" in caplog.text


@pytest.mark.parametrize(
    ("script", "reason"), [("exit 1", "installed but does not run"), (None, r"failed \(.*Permission denied")]
)
def test_a_java_that_does_not_run_is_as_none(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """macOS has a program of this name that only says where Java can be had. The tokenizer writes into its package."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script or 'cat'}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if script is None:

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "site-packages")

        monkeypatch.setattr(ptbtokenizer.tempfile, "NamedTemporaryFile", refused)
    found = caption_metrics(["The cat, sat on a mat.", "a dog runs in the park"], TRUE)
    assert "meteor" not in found
    assert found["bleu_1"] == pytest.approx(11 / 12, abs=1e-6)
    assert found["cider"] > 0
    assert re.search(reason, caplog.text)


@pytest.mark.slow
def test_java_adds_meteor() -> None:
    java = shutil.which("java") is not None
    found = caption_metrics(["the cat sat on a mat", ""], TRUE)
    assert ("meteor" in found) == java


@pytest.mark.usefixtures("no_java")
def test_one_caption_has_no_cider_and_none_is_an_error() -> None:
    assert "cider" not in caption_metrics(["the cat"], TRUE[:1])
    with pytest.raises(ValueError, match="reference"):
        caption_metrics([], [])
    with pytest.raises(ValueError, match="reference"):
        caption_metrics(["a"], [[]])


def test_answers_are_compared_without_articles_punctuation_case_and_number_words() -> None:
    for said, same in (
        ("The Red one!", "red 1"),
        ("Two,", "2"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("a man's hat", "man's hat"),
        *(("5 p.m.", "5 pm"), ("U.S.A.", "usa"), ("Washington D.C.", "washington dc"), (".5", ".5")),
        *(
            ("50%", "50%"),
            ("$5", "$5"),
            ("it's", "it's"),
            ("What\u2019s", "what's"),
            ("whats", "what's"),
            ("5:30", "5:30"),
        ),
        *(("black & white", "black & white"), ("red/blue", "red blue"), ("she'll", "she'll"), ("whos", "who's")),
        # next to a space once, a sign is removed wherever it occurs; so are all signs beside a number with a comma
        *(("t-shirt", "t shirt"), ("t-shirt - blue", "tshirt blue"), ("t-shirt, blue", "t shirt blue")),
        *(("red / white", "red white"), ("1,000 t-shirts", "1000 tshirts"), ("1,000-2,000", "10002000")),
        *(("red, t-shirt", "red t shirt"), ("red (dark)", "red dark"), ("red(dark)", "red dark")),
        *(("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("hed've", "he'd've"), ("twas", "'twas")),
        *(("somebody'd", "somebodyd"), ("y'allll", "y'all'll"), ("mustve", "must've"), ("ive", "ive")),
        ("yes\n", "yes"),
    ):
        assert normalised_answer(said) == same


def test_the_ten_annotator_rule() -> None:
    # min(1, agreeing / 3), averaged over the ten subsets of nine annotators
    assert vqa_accuracy("blue", ["blue"] * 10) == 1.0
    assert vqa_accuracy("blue", ["blue"] + ["red"] * 9) == pytest.approx(9 / 10 / 3)
    assert vqa_accuracy("blue", ["blue"] * 2 + ["red"] * 8) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("blue", ["blue"] * 3 + ["red"] * 7) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("blue", ["blue"] * 4 + ["red"] * 6) == 1.0
    assert vqa_accuracy("green", ["blue"] * 10) == 0.0
    for given, true in (("12 oclock", "12 o'clock"), ("yall", "y'all"), ("maam", "ma'am"), ("dont", "don't")):
        assert vqa_accuracy(given, [true] * 7 + ["noon"] * 3) == vqa_accuracy(true, [given] * 7 + ["noon"] * 3) == 1.0
    # the published script does not join these
    apart = (("lets go", "let's go"), ("im here", "i'm here"), ("were", "we're"), ("well", "we'll"), ("hell", "he'll"))
    for given, true in apart:
        assert vqa_accuracy(given, [true] * 10) == 0.0
    assert vqa_accuracy("The blue.", ["blue"]) == 1.0
    with pytest.raises(ValueError, match="annotated"):
        vqa_accuracy("blue", [])
