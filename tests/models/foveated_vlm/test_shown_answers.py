"""Answers logged as figures in training: for the rows of training, truncated rows too; a failed figure ends no run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from vlm_parts import small_module

from keygrip.data.batches import Conversation, Turn, VideoTextBatch
from keygrip.data.video_text.sample_types import VideoTextSample
from keygrip.models.foveated_vlm.figures import show_answers
from keygrip.models.foveated_vlm.module import FoveatedVLMModule

TEXTS = ["What happens? question about it, answer", "yes no"]


def batch_of(module: FoveatedVLMModule, turns: int, words: str = "") -> VideoTextBatch:
    """Return a conversation of `turns` questions and answers about two frames."""
    said = [
        Turn(role, f"{text} {number} {words}")
        for number in range(turns)
        for role, text in (("user", "question"), ("assistant", "answer"))
    ]
    frames = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3)).astype(np.uint8)
    return module.collator([VideoTextSample(frames, (Conversation(tuple(said), "text", {}),), "s", "k", (0.0, 1.0))])


def test_the_last_answer_that_fits_is_shown(tmp_path: Path) -> None:
    module = small_module(tmp_path, TEXTS, context=128)
    module.collator.max_tokens = 64
    batch = batch_of(module, 12)
    assert batch.truncated == 1
    figure, table = show_answers(module, batch, 4)
    assert figure is not None
    row = table.splitlines()[2]
    shown = next(number for number in range(11, -1, -1) if f"question {number} " in row)
    assert 0 <= shown < 11
    assert f"answer {shown} " in row
    _, short = show_answers(module, batch_of(module, 2), 4)
    assert "question 1 " in short


def test_a_batch_without_a_row_that_fits_shows_nothing(tmp_path: Path) -> None:
    module = small_module(tmp_path, TEXTS, context=96)
    figure, table = show_answers(module, batch_of(module, 1, "and much more of it " * 4), 4)
    assert figure is None
    assert "fits into the language model's context" in table


def test_a_model_that_is_trained_in_one_pass_answers_so(tmp_path: Path) -> None:
    module = small_module(tmp_path, TEXTS)
    module.mode = "coarse_only"
    assert module.answer_mode == "coarse_only"
    figure, table = show_answers(module, batch_of(module, 1), 4)
    assert figure is not None
    assert "question 0" in table
