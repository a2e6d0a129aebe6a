"""Prepared sets in training: frames as in inference, kinds, budgets and the worst batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_sets import CharacterCollator, write_conversations

from keygrip.data.batches import Turn
from keygrip.data.shards.budget import Budget
from keygrip.data.shards.curriculum import Stage
from keygrip.data.shards.mixing import Component, Mixture
from keygrip.data.shards.set_writer import settings_of
from keygrip.data.video_text.batching import WithinBudget
from keygrip.data.video_text.conversations import answer, read_sample
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.foreign_text import own_text
from keygrip.data.video_text.sample_types import Conversation, VideoTextSample
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.data.video_text.sources.video_sft import video_sft
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.tokenizers import TrainedTokenizer

SIZE = 32


def prepared(folder: Path, fit: str) -> Path:
    """Write a set of instructions about a wide image with a red bar at its left end."""
    source = folder / "source"
    source.mkdir(parents=True)
    wide = np.full((45, 80, 3), 200, np.uint8)
    wide[:, :16] = (255, 0, 0)
    Image.fromarray(wide).save(source / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]
    entries = [{"id": number, "image": "a.png", "conversations": said} for number in range(4)]
    (source / "list.json").write_text(json.dumps(entries))
    video_sft(source, folder / "set", image_size=SIZE, fit=fit, workers=1)
    return folder / "set"


def module(sources: dict[str, ShardSource], **options: Any) -> VideoTexts:
    settings = {"collator": CharacterCollator(), "image_size": SIZE, "batch_size": 4, "num_workers": 0, **options}
    data = VideoTexts(sources, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


# ---- frames as they were prepared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_a_file_that_is_asked_about_looks_as_it_did_in_training(tmp_path: Path, fit: str) -> None:
    root = prepared(tmp_path, fit)
    data = module({"sft": ShardSource(root, val_fraction=0.0)})
    told = data.statistics
    assert told.fit == fit
    trained = read_sample(data.parts["train"][0].shards, 0, SIZE, data.fit).frames[0].astype(int)
    asked = read_timed_frames(tmp_path / "source" / "a.png", told.image_size, told.fit, 64)[0][0].astype(int)
    assert np.abs(trained - asked).mean() < 3  # the shard stores a JPEG
    for other in {"pad", "crop", "stretch"} - {fit}:
        shown = read_timed_frames(tmp_path / "source" / "a.png", SIZE, other, 64)[0][0].astype(int)
        assert np.abs(trained - shown).mean() > 10


def test_sets_that_were_prepared_in_different_ways_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {fit: ShardSource(prepared(tmp_path / fit, fit), val_fraction=0.0) for fit in ("pad", "crop")}
    with pytest.raises(ValueError, match=r"frames were prepared in different ways \(pad: pad, crop: crop\)"):
        module(sources)
    assert module(sources, fit="pad").statistics.fit == "pad"
    assert "frames are read with fit=pad, and were prepared with other ones (pad: pad, crop: crop)" in caplog.text


def test_a_set_that_says_nothing_is_read_as_before(tmp_path: Path) -> None:
    root = write_conversations(tmp_path / "foreign", [(1, [answer("What?", "It.", "text")])] * 8, "f")
    assert settings_of(str(root / "train")) == {}
    assert settings_of((root / "train").as_uri()) == {}
    assert module({"foreign": ShardSource(root, val_fraction=0.0)}).statistics.fit == "stretch"
    both = {"foreign": ShardSource(root, val_fraction=0.0)}
    both["sft"] = ShardSource(prepared(tmp_path, "crop"), val_fraction=0.0)
    assert module(both).statistics.fit == "crop"
    assert settings_of((tmp_path / "set").as_uri())["fit"] == settings_of(str(tmp_path / "set"))["fit"] == "crop"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def words_of(sources: Sequence[Path], vocabulary: int = 400) -> dict[str, str]:
    """Return the words of the tokenizer that a run on these sets uses."""
    collator = ConversationCollator(TrainedTokenizer(vocabulary), "question_first", "answers")
    module({root.name: ShardSource(root, val_fraction=0.0) for root in sources}, collator=collator)
    assert collator.tokenizer is not None
    return collator.tokenizer.words()


def test_a_tokenizer_depends_on_the_texts_and_its_size_and_on_no_earlier_run(tmp_path: Path) -> None:
    def made(folder: str) -> tuple[Path, Path]:
        said = {
            "tours": "which of these cubes did the gripper touch before it went home, and what number was upon it?",
            "texts": "somebody wrote something else altogether",
        }
        told = {name: [(int(name == "tours"), [answer(text * 3, text, "text")])] * 4 for name, text in said.items()}
        tours, texts = (write_conversations(tmp_path / folder / name, each) for name, each in told.items())
        return tours, texts

    found = []
    for folder in ("one", "other"):
        tours, texts = made(folder)
        runs = {"both": ([tours, texts], 400), "tours": ([tours], 400), "smaller": ([tours], 300)}
        order = runs if folder == "one" else reversed(runs)
        found.append({name: words_of(*runs[name]) for name in order})
        assert words_of(*runs["both"]) == found[-1]["both"]
    assert found[0] == found[1]
    assert len({words["tokenizer"] for words in found[0].values()}) == 3


# ---- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions", "val_questions"])
def test_kinds_that_no_source_holds_are_refused(tmp_path: Path, name: str) -> None:
    said = [answer("What?", "It.", kind) for kind in ("mark", "cue")]
    root = write_conversations(tmp_path / "set", [(1, said)] * 8, "s")
    sources = {"set": ShardSource(root, val_fraction=0.0)}
    with pytest.raises(
        ValueError, match=rf"data\.{name} names 'mrak', of which no source holds .* they hold cue, mark"
    ):
        module(sources, **{name: {"mrak": 4}})
    module(sources, **{name: {"mark": 1, "caption": 0}})  # a kind that no source has may be given 0


# ---- the worst batch -------------------------------------------------------------------------------------------------


def told(frames: int, count: int) -> Component:
    whole = np.full(count, frames)
    return Component(f"of {frames}", bucket=whole, length=np.full(count, 9), shard=np.zeros(count, np.int64))


def test_the_epochs_of_all_stages() -> None:
    stages = [Stage({"of 2": 1.0}, 40), Stage({"of 2": 0.5, "of 32": 0.5}, 10), Stage({"of 32": 1.0})]
    mixture = Mixture([told(2, 64), told(32, 16)], 8, 0, None, stages)
    assert mixture.curriculum is not None
    epochs = mixture.epochs_of_stages()
    assert {number for epoch in epochs for number, _ in mixture.curriculum.stages_of(epoch)} == {0, 1, 2}
    assert max(epochs) <= 50 // mixture.batches + 1
    assert Mixture([told(2, 64)], 8).epochs_of_stages() == [0]


@pytest.mark.parametrize("budget", [None, Budget(256, 4096)])
def test_the_worst_batch_is_that_of_the_longest_stage(tmp_path: Path, budget: Budget | None) -> None:
    said = [answer("What?", "It is a longer answer.", "text")]
    sources = {
        name: ShardSource(write_conversations(tmp_path / name, [(frames, said)] * count, name), val_fraction=0.0)
        for name, frames, count in (("short", 2, 64), ("long", 32, 16))
    }
    curriculum = [Stage({"short": 1.0}, 40), Stage({"long": 1.0})]
    collator = ConversationCollator(TrainedTokenizer(320), "visual_first", "answers", 256)
    data = module(sources, batch_size=8, curriculum=curriculum, budget=budget, collator=collator)
    assert data.mixture is not None
    every = [data.mixture.sizes.frames[batch].sum() for epoch in range(8) for batch in data.mixture.batches_of(epoch)]
    assert int(data.worst_batches()[0].frame_mask.sum()) == max(every) == 256


# ---- within a budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_longer_video_in_the_place_of_another_does_not_break_the_budget_of_frames(ranks: int) -> None:
    class Lengths(CharacterCollator):
        tokens_per_frame, max_tokens = 1, None

        def lengths_depend_on(self) -> str:
            return ""

        def text_tokens(self, conversation: Conversation, *_: Any, **__: Any) -> int:
            return len(conversation.turns[-1].text)

        def tokens_before_frames(self, *_: Any) -> int:
            return 0

    def sample(frames: int, key: str) -> VideoTextSample:
        pixels = np.zeros((frames, 8, 8, 3), np.uint8)
        return VideoTextSample(pixels, (answer("What?", "x" * 5, "text"),), "s", key, tuple(map(float, range(frames))))

    samples = [sample(1, f"image {n}") for n in range(10)] + [sample(40, "video")] + [sample(3, "short")]
    batch = WithinBudget(Lengths(), 10_000, ranks, 40)(samples)
    held = int(batch.frame_mask.sum())
    assert held * ranks <= 40 + (ranks - 1) * 4  # with several processes, one of them may have one sample more
    assert "video" not in batch.key
    assert "short" in batch.key
    assert batch.left_out == 1
    assert WithinBudget(Lengths(), 10_000, ranks, 40)([sample(50, "alone")]).key == ["alone"]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_what_nobody_answered_is_not_trained_on(tmp_path: Path) -> None:
    collator = ConversationCollator(TrainedTokenizer(320), "visual_first", "all")
    collator.prepare(tmp_path, lambda: iter(["and then? it is"]))
    talk = (Turn("user", "and then?"), Turn("assistant", "it is"))
    whole = VideoTextSample(np.zeros((0, 8, 8, 3), np.uint8), (Conversation(talk, "text", {}),), "s", "k", ())
    asked = VideoTextSample(whole.frames, (Conversation((*talk, talk[0]), "text", {}),), "s", "k", ())
    first, second = collator([whole]), collator([asked])
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.loss_mask.tolist() == second.loss_mask.tolist()


def test_foreign_text_keeps_its_system_turn_and_its_rate() -> None:
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "It."}]
    found = own_text({"system": "Be brief.", "conversations": turns, "fps": 2}, "Describe it.")
    said = [(turn["role"], turn["text"]) for turn in found["conversations"][0]["turns"]]
    assert said == [("system", "Be brief."), ("user", "What?"), ("assistant", "It.")]
    assert found["fps"] == 2
    own = [
        {"role": "system", "content": "Mine."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    kept = own_text({"system": "Be brief.", "messages": own}, "")["conversations"][0]["turns"]
    assert [turn["text"] for turn in kept] == ["Mine.", "a", "b"]
    with pytest.raises(ValueError, match="the caption of its json is a list, not text"):
        own_text({"caption": ["a", "b"]}, "")
