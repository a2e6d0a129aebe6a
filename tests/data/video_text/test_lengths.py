"""Texts that are too long to be used, and batches that keep within a budget by what their rows really hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import picture

from keygrip.data.batches import Turn, VideoTextBatch
from keygrip.data.shards.budget import Budget
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import Conversation, answer, describe_video_text, video_text_parts
from keygrip.data.video_text.datamodule import ShardSource, VideoTexts
from keygrip.data.video_text.samples import Part
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.tokenizers import TrainedTokenizer

WORDS = ("the gripper closes around a red cube and carries it over the table into the bowl " * 90).split(" ")


def words(characters: int) -> str:
    return " ".join(WORDS)[:characters].strip()


def write(root: Path, samples: Sequence[tuple[int, Sequence[Conversation]]], prefix: str = "s") -> Path:
    """A set of (frames, conversations)."""
    with ShardWriter(root / "train" / f"{prefix}-000.tar") as writer:
        for number, (frames, said) in enumerate(samples):
            images = [picture(number % 256)] * frames
            writer.add(f"{prefix}{number}", *video_text_parts(images, said, prefix, extension="png"))
    write_manifest(root / "train", describe_video_text, progress=False)
    return root


def talk(characters: int, kind: str = "text") -> Conversation:
    return answer("Tell a story.", words(characters), kind)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """60 videos with captions; texts as SmolTalk has them, of which most are far longer than a row."""
    write(tmp_path / "videos", [(2, [talk(60 + n % 40, "caption")]) for n in range(60)], "v")
    long = [(0, [talk(6900 + n % 50)]) for n in range(120)]
    turns = (*talk(200).turns, Turn("user", "More."), Turn("assistant", words(6000)))
    kept = [(0, [talk(100 + 5 * n)]) for n in range(20)] + [(0, [Conversation(turns, "text", {})])]
    write(tmp_path / "texts", [*long, *kept], "t")
    return tmp_path


def module(root: Path, max_tokens: int = 256, **options: Any) -> VideoTexts:
    sources = {"videos": ShardSource(root / "videos", val_fraction=0.0)}
    if (root / "texts").is_dir():
        sources["texts"] = ShardSource(root / "texts", share=0.14, val_fraction=0.0)
    tokens_per_frame = options.pop("tokens_per_frame", 1)
    tokenizer = TrainedTokenizer(500)
    collator = ConversationCollator(tokenizer, "visual_first", "answers", max_tokens, tokens_per_frame=tokens_per_frame)
    data = VideoTexts(sources, collator, 8, **{"batch_size": 8, "num_workers": 0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def keys(batches: Sequence[VideoTextBatch], source: str) -> list[str]:
    return [key for batch in batches for key, of in zip(batch.key, batch.source, strict=True) if of == source]


def test_texts_of_which_no_answer_fits_a_row_are_left_out_beforehand(
    stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = module(stage)
    assert "train: 120 of 141 samples of texts are left out: their first answer ends beyond" in caplog.text
    batches = list(data.train_dataloader())
    texts = keys(batches, "texts")
    assert {int(key[1:]) for key in texts} <= set(range(120, 141))
    assert len(texts) in (8, 9)  # the share holds: 60 / 0.86 * 0.14 are 9.8, in whole batches
    assert data.skipped.count == data.unusable.count == 0


def test_where_an_index_does_not_tell_them_shorter_ones_take_their_place(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine neighbours in length that are all too long ended the run, and fewer of them counted as broken samples."""
    monkeypatch.setattr(Part, "usable", lambda part, lengths: part)
    data = module(stage)
    batches = list(data.train_dataloader())
    assert {int(key[1:]) for key in keys(batches, "texts")} <= set(range(120, 141))
    assert data.unusable.count >= 5
    assert data.skipped.count == 0
    assert data.skipped.seen == sum(len(batch) for batch in batches)
    assert "does not end within collator.max_tokens=256" in next(iter(data.unusable.reasons))


def test_a_source_in_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "videos", [(1, [talk(3000)])] * 20, "v")
    with pytest.raises(ValueError, match=r"no sample of the source 'videos' has an answer that ends within"):
        module(tmp_path)


def digits(count: int) -> str:
    """A token each: four times what English has."""
    return "".join(str(n % 10) for n in range(count))


@pytest.mark.parametrize("tokens_per_frame", [1, 16])
@pytest.mark.parametrize("questions", [None, 2])
def test_batches_keep_within_the_budget_by_what_they_really_hold(
    tmp_path: Path, tokens_per_frame: int, questions: int | None
) -> None:
    rng = np.random.default_rng(0)
    samples = [
        (int(frames), [answer("Which number?", digits(int(rng.integers(5, 150))), "text") for _ in range(1 + n % 5)])
        for n, frames in enumerate(rng.integers(0, 9, 200))
    ]
    write(tmp_path / "videos", samples, "v")
    budget = Budget(frames=64, positions=2048)
    options: dict[str, Any] = {"questions": questions, "tokens_per_frame": tokens_per_frame}
    data = module(tmp_path, batch_size=64, budget=budget, **options)
    batches = list(data.train_dataloader())
    taken = []
    for batch in batches:
        assert int(batch.frame_mask.sum()) <= 64
        longest = (batch.frame_mask.sum(1)[batch.video_index] * tokens_per_frame + batch.attention_mask.sum(1)).max()
        taken.append(len(batch) * int(longest))
    assert max(taken) <= 2048
    assert np.median(taken) > 1000  # and fill it
    assert sum(batch.left_out for batch in batches) <= 0.02 * sum(map(len, batches))
    worst = data.worst_batch()
    share = int(worst.frame_mask.sum()) / 64 + len(worst) * data._tokens_per_frame * worst.frame_mask.shape[1] / 2048
    assert share > 0.5
    estimate = data.lengths["videos"]
    assert estimate.typical > 0.5  # tokens per character: the usual 0.25 would be far off
    assert estimate.tokens_per_frame == tokens_per_frame


def test_what_nobody_foresaw_is_left_out_of_a_batch_and_counted(tmp_path: Path) -> None:
    """A few texts have many more tokens than nearly all others of their length."""
    samples = [(1, [answer("What?", digits(200) if n % 120 == 7 else words(200), "text")]) for n in range(240)]
    data = module_of(tmp_path, samples)
    batches = list(data.train_dataloader())
    assert max(len(b) * (1 + b.attention_mask.shape[1]) for b in batches) <= 1024
    assert 1 <= sum(batch.left_out for batch in batches) <= 4


def module_of(root: Path, samples: Sequence[tuple[int, Sequence[Conversation]]]) -> VideoTexts:
    write(root / "videos", samples, "v")
    return module(root, batch_size=32, budget=Budget(frames=64, positions=1024))


def test_an_index_without_the_number_of_conversations_is_refused_with_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardSet.__init__

    def older(self: ShardSet, *options: Any) -> None:
        opened(self, *options)
        del self.columns["conversations"]

    monkeypatch.setattr(ShardSet, "__init__", older)
    with pytest.raises(
        ValueError, match=r"earlier version: make it anew with `keygrip prepare step=manifest again=true"
    ):
        module_of(tmp_path, [(1, [talk(50)])] * 40)
