"""The data module of videos with text: no sample lost or repeated, resumed from one number, broken samples skipped."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from shard_sets import CharacterCollator, picture, small_video, write_set

from keygrip.config import compose
from keygrip.data.bad_samples import BadSample
from keygrip.data.batches import Conversation, Turn, VideoTextBatch
from keygrip.data.shards.budget import Budget
from keygrip.data.shards.curriculum import Stage
from keygrip.data.shards.index import ShardError
from keygrip.data.shards.made_shards import MadeShards, held_out
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.shards.substitution import UnusableSample
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video import write_video
from keygrip.data.video_text import shard_source
from keygrip.data.video_text.batching import choose_conversations
from keygrip.data.video_text.conversations import (
    answer,
    conversation_problem,
    describe_video_text,
    parse_conversations,
    read_sample,
    video_text_parts,
)
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.placeholders import Placeholders
from keygrip.data.video_text.sample_types import thinned
from keygrip.data.video_text.shard_source import OpenedSets, ShardSource
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.training.fit import _build_data

LENGTH = {"accumulated": 1, "max_steps": -1, "max_epochs": -1}
FRAMES = [1, 2, 3, 1] * 40  # 160 samples; in a known error, four workers saw only 40 of them


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 160 videos in 4 shards for training, 12 for validation, and 60 texts."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "videos" / "train", FRAMES, per_shard=40)
    write_set(folder / "videos" / "val", [2] * 12, prefix="v", kinds=("mark", "cue"))
    write_set(folder / "texts" / "train", [0] * 60, prefix="t", kinds=("text",))
    write_set(folder / "texts" / "val", [0] * 10, prefix="u", kinds=("text",))
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without writing a log."""

    def log_message(self, *_: object) -> None:
        pass


def module(root: Path, rank: int = 0, ranks: int = 1, share: float | None = None, **options: Any) -> VideoTexts:
    """Return a data module that is set up as rank `rank` of `ranks`."""
    sources: dict[str, ShardSource | None] = {"videos": ShardSource(root / "videos"), "left_out": None}
    if share is not None:
        sources["texts"] = ShardSource(root / "texts", share=share)
    settings: dict[str, Any] = {"sources": sources, "image_size": 8, "batch_size": 12, "num_workers": 0, **options}
    accumulated, steps, epochs = (settings.pop(name, none) for name, none in LENGTH.items())
    data = VideoTexts(collator=CharacterCollator(), **settings)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=ranks,
        fit_loop=loop,
        accumulate_grad_batches=accumulated,
        max_steps=steps,
        max_epochs=epochs,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def advance(data: VideoTexts, batches: int) -> None:
    data.trainer.fit_loop.epoch_loop.batch_progress.total.processed += batches  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 4), (3, 2), (1, 6)])
def test_every_sample_once_an_epoch_whatever_the_ranks_and_workers(root: Path, ranks: int, workers: int) -> None:
    reference = [batch.key for batch in module(root).train_dataloader()]
    parts = [list(module(root, rank, ranks, num_workers=workers).train_dataloader()) for rank in range(ranks)]
    assert {len(part) for part in parts} == {13}
    seen = Counter(key for part in parts for batch in part for key in batch.key)
    assert set(seen.values()) == {1}
    assert len(seen) == 13 * 12  # 4 of 160 do not fill a batch
    together = [[key for batch in step for key in batch.key] for step in zip(*parts, strict=True)]
    assert together == reference
    for batch in (batch for part in parts for batch in part):
        assert [FRAMES[int(key[1:])] for key in batch.key] == batch.frame_mask.sum(dim=1).tolist()


def test_stages_count_optimizer_steps_also_where_an_earlier_run_goes_on(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of(steps: int, accumulated: int) -> VideoTexts:
        stages = [Stage({"videos": 1.0}, steps), Stage({"videos": 1.0})]
        return module(root, curriculum=stages, accumulated=accumulated)

    with caplog.at_level(logging.INFO):
        data = of(2, 3)
    assert "stages of the curriculum begin at optimizer steps 0, 2" in caplog.text
    assert data.mixture is not None
    assert data.mixture.batches % 3
    told = f"{data.mixture.batches} batches do not divide by 3"
    assert told in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        of(2, 1)
    assert "begin at optimizer steps 0, 2\n" in caplog.text
    data.load_state_dict(of(6, 1).state_dict())  # whose stage counted 6 batches
    with pytest.raises(ValueError, match="divide their steps by accumulate_grad_batches=3"):
        data.load_state_dict(of(2, 1).state_dict())
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        data.load_state_dict(of(7, 1).state_dict())


@pytest.mark.parametrize(
    ("length", "end"),
    [
        ({"max_steps": 3}, None),  # the second stage has the last step
        ({"max_steps": 2}, 2),
        ({"max_steps": 1}, 1),
        ({"max_epochs": 1, "accumulated": 7}, 2),  # 13 batches
        ({"max_epochs": 1, "accumulated": 6}, None),
        ({"max_epochs": 1, "max_steps": 2}, 2),
        ({}, None),
    ],
)
def test_a_stage_that_the_training_does_not_reach_is_warned_of(
    root: Path, caplog: pytest.LogCaptureFixture, length: dict[str, int], end: int | None
) -> None:
    sources = {"videos": ShardSource(root / "videos"), "others": ShardSource(root / "videos")}
    stages = [Stage({"videos": 1.0}, 2), Stage({"videos": 0.5, "others": 0.5})]
    module(root, sources=sources, curriculum=stages, batch_size=24, **length)
    told = [record.getMessage() for record in caplog.records if "data.curriculum" in record.getMessage()]
    assert len(told) == (end is not None)
    if end is not None:
        assert f"stage 2 begins at optimizer step 2, but training ends at step {end}," in told[0]
        assert "nothing is trained on others;" in told[0]


@pytest.mark.parametrize(("length", "end"), [({"max_epochs": 2}, 4), ({"max_steps": 4}, 4), ({"max_steps": 5}, None)])
def test_a_stage_begins_later_where_the_last_step_of_an_epoch_has_fewer_batches(
    root: Path, caplog: pytest.LogCaptureFixture, length: dict[str, int], end: int | None
) -> None:
    """An epoch has a step of 10 batches and one of 3: the 30 batches of the first stage end within the fifth step."""
    stages = [Stage({"videos": 1.0}, 3), Stage({"videos": 1.0})]
    with caplog.at_level(logging.INFO):
        data = module(root, curriculum=stages, accumulated=10, **length)
    assert data.mixture is not None
    assert data.mixture.curriculum is not None
    assert [data.mixture.curriculum.stages_of(epoch) for epoch in range(3)] == [[(0, 13)], [(0, 13)], [(0, 4), (1, 9)]]
    assert "begin at optimizer steps 0, 4 (an epoch's 13 batches do not divide by 10)" in caplog.text
    told = f"stage 2 begins at optimizer step 4, but training ends at step {end}, so the stage is not reached; train"
    assert (told in caplog.text) == (end is not None)
    assert ("not reached" in caplog.text) == (end is not None)


def test_a_remote_source_without_val_takes_its_space_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training and validation, and other sources of the same address, read the same copies."""
    source = ShardSource(f"file://{root}/videos/train")
    gb = sum(path.stat().st_size for path in (root / "videos" / "train").glob("*.tar")) / 1e9
    for cache, warned in ((1.2, False), (0.8, True)):
        data = module(root, sources={"a": source, "b": source}, cache_dir=tmp_path, cache_gb=cache * gb)
        assert data.parts["val"]
        assert (f"the remote shards have {gb:.3g} GB" in caplog.text) == warned
        assert ("the remote shards have" in caplog.text) == warned


def test_every_shard_of_a_remote_source_with_a_share_is_needed_beside_the_windows(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {name: [path.stat().st_size for path in (root / name).rglob("*.tar")] for name in ("videos", "texts")}
    sources = {
        "videos": ShardSource(f"file://{root}/videos"),
        "texts": ShardSource(f"file://{root}/texts", share=0.2),
    }
    mixed_in = sum(path.stat().st_size for path in (root / "texts" / "train").glob("*.tar"))
    needed = mixed_in + sum(sorted(sizes["videos"])[-2:])
    module(root, sources=sources, cache_dir=tmp_path, cache_gb=1.05 * needed / 1e9, window_shards=1)
    assert "data.cache_gb" not in caplog.text
    module(root, sources=sources, cache_dir=tmp_path, cache_gb=0.95 * needed / 1e9, window_shards=1)
    assert f"with the {mixed_in / 1e9:.3g} GB of the sources with a share" in caplog.text
    assert f"have up to {needed / 1e9:.3g} GB" in caplog.text


def test_a_stage_that_is_not_reached_is_warned_of_before_there_is_a_trainer(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training and dry runs set up the data before they make a trainer, or without one."""
    settings = {"image_size": 8, "batch_size": 24, "num_workers": 0, "collator": CharacterCollator()}
    source = {"_target_": f"{ShardSource.__module__}.ShardSource", "root": str(root / "videos")}
    stage = {"_target_": f"{Stage.__module__}.Stage"}
    stages = [stage | {"weights": {"videos": 1.0}, "steps": 2}, stage | {"weights": {"videos": 0.5, "others": 0.5}}]
    target = f"{VideoTexts.__module__}.VideoTexts"
    data = {"_target_": target, "sources": {"videos": source, "others": source}, "curriculum": stages, **settings}
    limits = {"accumulate_grad_batches": 7, "max_steps": -1, "max_epochs": 1}
    cfg = OmegaConf.create({"data": data, **limits}, flags={"allow_objects": True})
    module = _build_data(cfg, processes=1)
    module.setup("fit")
    assert module.trainer is None
    assert "stage 2 begins at optimizer step 2, but training ends at step 2," in caplog.text  # of 13 batches


def test_pixels_belong_to_their_text(root: Path) -> None:
    for batch in module(root).train_dataloader():
        assert batch.frames.dtype == torch.uint8
        for row, key in enumerate(batch.key):
            video = int(batch.video_index[row])
            real = batch.frames[video][batch.frame_mask[video]]
            assert (real == int(key[1:])).all()
            assert (batch.frames[video][~batch.frame_mask[video]] == 0).all()
        assert len(batch) == 12


def test_text_retention_comes_as_samples_without_frames(root: Path) -> None:
    data = module(root, share=0.14)
    assert data.mixture is not None
    assert data.mixture.batches == 15  # 160 / 0.86 / 12
    text_only, rows = 0, 0
    for _ in range(3):
        for batch in data.train_dataloader():
            without = (batch.frame_mask.sum(1)[batch.video_index] == 0).tolist()
            assert [source == "texts" for source in batch.source] == without
            text_only, rows = text_only + sum(without), rows + len(batch)
        advance(data, 15)
    assert rows == 3 * 180
    assert abs(text_only - 0.14 * rows) <= 1


def test_a_run_goes_on_with_the_same_windows_only(root: Path) -> None:
    state = module(root, window_shards=1).state_dict()
    with pytest.raises(
        ValueError, match=r"trained with data\.window_shards=1, this run has None; the order of samples"
    ):
        module(root).load_state_dict(state)
    del state["window_shards"]  # checkpoints of earlier versions
    module(root, window_shards=1).load_state_dict(state)


def test_one_number_resumes_in_mid_epoch_with_other_workers_and_ranks(root: Path) -> None:
    whole = module(root, share=0.14, questions=1)
    expected = []
    for _ in range(2):
        expected += [(batch.key, batch.frames) for batch in whole.train_dataloader()]
        advance(whole, 15)
    interrupted = module(root, share=0.14, questions=1)
    advance(interrupted, 11)
    state = interrupted.state_dict()
    assert state["batches_done"] == 11
    resumed = [module(root, rank, 2, share=0.14, questions=1, num_workers=2) for rank in range(2)]
    for data in resumed:
        data.load_state_dict(state)
        assert data.batches_done() == 11
    after: list[list[tuple[list[str], torch.Tensor]]] = [[], []]
    for rank, data in enumerate(resumed):
        after[rank] = [(batch.key, batch.frames) for batch in data.train_dataloader()]
        assert len(after[rank]) == 4
    for step in range(4):
        assert after[0][step][0] + after[1][step][0] == expected[11 + step][0]


def test_a_state_of_other_data_is_refused(root: Path, tmp_path: Path) -> None:
    state = module(root).state_dict()
    with pytest.raises(ValueError, match=r"trained with data.batch_size=12, this run has 10"):
        module(root, batch_size=10).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"the data are not those of the checkpoint: 6 added \(texts/t-000\.tar, .*\); the order"
    ):
        module(root, share=0.14).load_state_dict(state)
    shutil.copytree(root / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train" / "s-001.tar").unlink()
    (tmp_path / "videos" / "train" / "s-001.tar.index.npz").unlink()
    write_manifest(tmp_path / "videos" / "train", describe_video_text, progress=False)
    with pytest.raises(ValueError, match=r"checkpoint: 1 removed \(videos/s-001\.tar\); .*restore them, or start"):
        module(tmp_path).load_state_dict(state)
    del state["shards"]  # as in checkpoints of earlier versions
    with pytest.raises(ValueError, match=r"fingerprint=.*; the order of samples cannot be continued"):
        module(tmp_path).load_state_dict(state)


def test_validation_is_frozen_and_holds_all_its_sources(root: Path) -> None:
    data = module(root, share=0.14, val_questions=None)
    first = [(batch.key, batch.kind) for batch in data.val_dataloader()]
    advance(data, 20)
    assert [(batch.key, batch.kind) for batch in data.val_dataloader()] == first
    kinds = Counter(kind for _, batch_kinds in first for kind in batch_kinds)
    assert kinds == {"mark": 12, "cue": 12, "text": 2}  # 12 / 0.86 * 0.14 texts
    few = module(root, max_val_samples=5)
    assert sum(len(set(batch.key)) for batch in few.val_dataloader()) == 5
    assert data.test_dataloader() == []


def test_the_test_set_has_no_limit_and_leaves_out_what_cannot_be_read(root: Path, tmp_path: Path) -> None:
    """A sample in place of a damaged one would count twice."""
    folder = damaged(root, tmp_path, [5, 6])
    shutil.move(folder / "videos" / "train", folder / "videos" / "test")
    shutil.copytree(root / "videos" / "train", folder / "videos" / "train")
    data = module(folder, max_val_samples=5)
    keys = Counter(key for batch in data.test_dataloader() for key in batch.key)
    assert keys == {f"s{number}": 1 for number in range(len(FRAMES)) if number not in (5, 6)}
    assert (data.skipped.count, data.unusable.count) == (2, 0)


def test_mixed_in_samples_alone_are_no_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_set(tmp_path / "videos" / "train", [1] * 24)
    write_set(tmp_path / "texts" / "train", [0] * 12, prefix="t", kinds=("text",))
    write_set(tmp_path / "texts" / "val", [0] * 10, prefix="u", kinds=("text",))
    assert module(tmp_path, share=0.14).val_dataloader() == []
    assert "no val samples but those that are mixed in" in caplog.text


def damaged(root: Path, tmp_path: Path, samples: list[int]) -> Path:
    """Copy the set and overwrite the images of some samples."""
    shutil.copytree(root, tmp_path / "damaged")
    place = tmp_path / "damaged" / "videos" / "train"
    shards = ShardSet(place)
    for sample in samples:
        shard, row = shards.locate(sample)
        index = shards.index(shard)
        with (place / shards.shards[shard]["name"]).open("r+b") as file:
            for part in range(int(index.first_part[row]), int(index.first_part[row + 1])):
                if str(index.part_names[part]).endswith("png"):
                    file.seek(int(index.part_offsets[part]))
                    file.write(b"\0" * int(index.part_sizes[part]))
    return tmp_path / "damaged"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_replaced_by_one_alike_counted_and_named(
    root: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damaged(root, tmp_path, [5, 6])
    data = module(broken, num_workers=workers)
    clean = module(root)
    batches = list(data.train_dataloader())
    keys = [key for batch in batches for key in batch.key]
    assert "s5" not in keys
    assert "s6" not in keys
    assert [len(batch) for batch in batches] == [12] * 13
    expected = [key for batch in clean.train_dataloader() for key in batch.key]
    different = [(a, b) for a, b in zip(expected, keys, strict=True) if a != b]
    assert {a for a, _ in different} == {"s5", "s6"}
    assert all(FRAMES[int(a[1:])] == FRAMES[int(b[1:])] for a, b in different)
    assert data.skipped.count == 2
    assert data.skipped.seen == 156
    assert "skipped: s5 of" in caplog.text
    assert "s-000.tar" in caplog.text


def test_a_run_in_which_too_much_or_everything_is_skipped_fails(root: Path, tmp_path: Path) -> None:
    broken = damaged(root, tmp_path, list(range(0, 160, 9)))
    data = module(broken)
    with pytest.raises(ValueError, match=r"of \d+ samples could not be read in full, more than .*_skipped_share=0\.05"):
        for _ in range(4):
            list(data.train_dataloader())
            advance(data, 13)
    shutil.rmtree(broken)
    broken = damaged(root, tmp_path, list(range(160)))
    with pytest.raises(ValueError, match=r"9 samples in a row cannot be read; the first: s\d+ of .*s-00\d\.tar"):
        list(module(broken).train_dataloader())


def test_a_cut_off_shard_is_named_before_training(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "cut")
    path = tmp_path / "cut" / "videos" / "train" / "s-002.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"s-002\.tar has \d+ bytes, its manifest says"):
        module(tmp_path / "cut")


def test_kinds_choose_samples_and_conversations(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [1] * 40, kinds=("mark", "cue", "caption"))
    write_set(tmp_path / "b", [1] * 40, kinds=("mark",), prefix="b")
    sources = {"a": ShardSource(tmp_path / "a", kinds=["cue", "caption"], val_fraction=0.0)}
    data = module(tmp_path, sources=sources)
    batch = next(iter(data.train_dataloader()))
    assert Counter(batch.kind) == {"cue": 12, "caption": 12}
    assert batch.video_index.tolist() == [n for n in range(12) for _ in range(2)]
    with pytest.raises(ValueError, match=r"holds no conversations of \['cue'\]; it holds mark"):
        module(tmp_path, sources={"b": ShardSource(tmp_path / "b", kinds=["cue"])})
    with pytest.raises(ValueError, match=r"holds no conversations of \['captoin'\]; it holds caption, cue, mark"):
        module(tmp_path, sources={"a": ShardSource(tmp_path / "a", kinds=["cue", "captoin"], val_fraction=0.0)})


def write_mixed(root: Path) -> Path:
    """Write 24 samples with only marks and 14 with only captions for training, and 3 and 2 for validation."""
    for split, marks, captions in (("train", 24, 14), ("val", 3, 2)):
        write_set(root / split, [1] * marks, prefix=f"{split}-mark", kinds=("mark",))
        write_set(root / split, [1] * captions, prefix=f"{split}-caption", kinds=("caption",))
    return root


@pytest.mark.parametrize("budget", [None, Budget(frames=12, positions=4096, exact_lengths=False)])
def test_samples_without_a_kind_that_is_used_are_left_out_beforehand(
    budget: Budget | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training and validation leave them out by separate settings, and do not count them as unreadable."""
    sources = {"mine": ShardSource(write_mixed(tmp_path / "mine"))}
    asked = {"questions": {"caption": 0, "mark": 4}, "val_questions": {"mark": 0, "caption": 2}}
    with caplog.at_level(logging.INFO):
        data = module(tmp_path, sources=sources, max_skipped_share=0.0, budget=budget, **asked)
    train = [batch.key for batch in data.train_dataloader()]
    assert sorted(key for keys in train for key in keys) == sorted(f"train-mark{n}" for n in range(24))
    held_out = sorted(key for batch in data.val_dataloader() for key in batch.key)
    assert held_out == ["val-caption0", "val-caption1"]
    assert (data.skipped.count, data.unusable.count) == (0, 0)
    assert "train: 14 of 38 samples of mine are left out: they hold only caption, and data.questions={" in caplog.text
    assert "val: 3 of 5 samples of mine are left out: they hold only mark, and data.val_questions={" in caplog.text
    assert data.statistics.kinds == {"mark"}
    assert data.statistics.partial_kinds == {"mark", "caption"}  # also a kind all of whose samples are left out


@pytest.mark.parametrize(
    ("val_questions", "held_out"),
    [
        (None, {"mark": 3}),
        ({"mark": 1}, {"mark": 3}),
        ({"caption": 1}, {"mark": 3, "caption": 2}),
        (5, {"mark": 3, "caption": 2}),
    ],
)
def test_kinds_that_are_not_trained_are_validated_only_if_that_is_asked_for(
    val_questions: Any, held_out: dict[str, int], tmp_path: Path
) -> None:
    sources = {"mine": ShardSource(write_mixed(tmp_path / "mine"))}
    data = module(tmp_path, sources=sources, questions={"caption": 0}, val_questions=val_questions)
    assert Counter(kind for batch in data.train_dataloader() for kind in batch.kind).keys() == {"mark"}
    assert Counter(kind for batch in data.val_dataloader() for kind in batch.kind) == held_out


def simulated(data: str, *overrides: str) -> VideoTexts:
    """Return a data module of the simulator's config `data` with other videos, set up for training."""
    chosen = compose("train", ["model=foveated_vlm", f"data={data}", "data.curriculum=null", *overrides])
    settings = {"image_size": 8, "batch_size": 4, "num_workers": 0, "collator": CharacterCollator()}
    made: VideoTexts = instantiate(chosen.data, **settings, _convert_="all")
    made.setup("fit")
    return made


@pytest.mark.parametrize("data", ["robot_videos", "robot_tours", "robot_long_tours"])
def test_captions_of_the_simulators_videos_are_trained_and_validated_by_one_setting(data: str, tmp_path: Path) -> None:
    said = ("mark", "cue", "glance", "caption")
    for split in ("train", "val", "test"):
        write_set(tmp_path / split, [1] * 8, prefix=split, kinds=said)
    others = {name for name in compose("train", ["model=foveated_vlm", f"data={data}"]).data.sources if name != "tours"}
    sources = [f"data.sources.tours.root={tmp_path}", *(f"data.sources.{name}=null" for name in others)]
    for overrides, kinds in (([], set(said[:3])), (["data.questions.caption=1"], set(said))):
        made = simulated(data, *sources, *overrides)
        for loader in (made.train_dataloader(), made.val_dataloader(), made.test_dataloader()):
            assert {kind for batch in loader for kind in batch.kind} == kinds


def test_demonstrations_that_have_captions_alone_are_trained_as_the_refusal_advises(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_set(tmp_path / "tours" / split, [1] * 8, prefix=f"t{split}", kinds=("mark", "cue", "glance", "caption"))
        write_set(tmp_path / "demos" / split, [1] * 8, prefix=f"d{split}", kinds=("caption",))
    roots = [f"data.sources.{name}.root={tmp_path / name}" for name in ("tours", "demos")]
    settings = [*roots, "data.sources.texts=null"]
    with pytest.raises(ValueError, match=r"no sample of the source 'demos' .*they hold caption") as refused:
        simulated("robot_videos", *settings)
    advice = re.findall(r"\((data\.[^)]*)\)", str(refused.value))
    assert advice == ["data.questions.caption=1", "data.sources.demos=null"]
    for setting, demos in zip(advice, (8, 0), strict=True):
        made = simulated("robot_videos", *settings, setting)
        for loader in (made.train_dataloader(), made.val_dataloader()):
            keys = {key for batch in loader for key in batch.key}
            assert (sum(key[0] == "t" for key in keys), sum(key[0] == "d" for key in keys)) == (8, demos)


def test_the_refusal_of_a_source_advises_a_kind_of_its_own(tmp_path: Path) -> None:
    """A caption, the first of the videos' kinds, would not be used: the source's `kinds` leave it out."""
    write_set(tmp_path / "tours" / "train", [1] * 12, kinds=("mark", "cue", "glance", "caption"))
    sources = {"tours": ShardSource(tmp_path / "tours", kinds=["mark", "glance"])}
    untrained = {"caption": 0, "mark": 0, "glance": 0}
    with pytest.raises(ValueError, match=r"no sample of the source 'tours' ") as refused:
        module(tmp_path, sources=sources, questions=untrained)
    assert re.findall(r"\((data\.questions[^)]*)\)", str(refused.value)) == ["data.questions.glance=1"]
    made = module(tmp_path, sources=sources, questions=untrained | {"glance": 1})
    assert {kind for batch in made.train_dataloader() for kind in batch.kind} == {"glance"}


def test_the_order_changes_only_where_samples_are_left_out(root: Path, tmp_path: Path) -> None:
    for place, questions in ((root, {"mark": 1}), (root, {"cue": 0}), (tmp_path, {"caption": 0})):
        if place == tmp_path:  # each sample also has a kind that is used
            write_set(tmp_path / "videos" / "train", [1] * 40, kinds=("mark", "caption"))
        assert module(place, questions=questions).fingerprint == module(place).fingerprint
    sources = {"mine": ShardSource(write_mixed(tmp_path / "mine"))}
    with pytest.raises(ValueError, match=r"fingerprint=.*; the order of samples cannot be continued"):
        module(tmp_path, sources=sources, questions={"caption": 0}).load_state_dict(
            module(tmp_path, sources=sources).state_dict()
        )


def test_a_source_without_a_kind_that_is_used_is_refused_for_training_and_named_for_validation(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        write_set(tmp_path / "captions" / split, [1] * 20, prefix="c", kinds=("caption",))
    sources = {"videos": ShardSource(root / "videos"), "demos": ShardSource(tmp_path / "captions")}
    with pytest.raises(
        ValueError,
        match=r"no sample of the source 'demos' has .*they hold caption, and data\.questions=\{'caption': 0\}: raise .*"
        r"\(data\.sources\.demos=null\)",
    ):
        module(tmp_path, sources=sources, questions={"caption": 0})
    only = {"demos": sources["demos"]}
    assert module(tmp_path, sources=only, val_questions={"caption": 0}).val_dataloader() == []
    said = {record.message: record.levelno for record in caplog.records}
    told = "val: 20 of 20 samples of demos are left out: they hold only caption, and data.val_questions={'caption': 0}"
    assert said[f"{told} (kinds with 0 in data.questions included)"] == logging.WARNING


def test_a_readable_sample_without_a_kind_that_is_used_is_unusable(root: Path) -> None:
    """This remains where the index does not say it."""
    data = module(root)
    with pytest.raises(UnusableSample, match=r"s7 of .*s-000\.tar: no conversation of the kinds asked for"):
        data._samples(data.parts["train"], {"mark": 0})[SampleKey(7, 0)]


def test_questions_are_chosen_anew_each_epoch() -> None:
    asked = [answer(f"{kind} {n}", "x", kind) for kind in ("mark", "cue", "caption") for n in range(6)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert Counter(c.kind for c in choose_conversations(asked, {"mark": 4, "cue": 2, "caption": 0}, rng)) == {
            "mark": 4,
            "cue": 2,
        }
        assert Counter(c.kind for c in choose_conversations(asked, {"mark": 1}, rng)) == {
            "mark": 1,
            "cue": 6,
            "caption": 6,
        }
        assert len(choose_conversations(asked, 5, rng)) == 5
    assert choose_conversations(asked, None, rng) == asked
    drawn = Counter(
        c.turns[0].text
        for _ in range(600)
        for c in choose_conversations(asked, {"mark": 2, "cue": 0, "caption": 0}, rng)
    )
    assert len(drawn) == 6
    assert min(drawn.values()) > 150  # 200 expected, standard deviation 12


@pytest.mark.parametrize("folder", ["", "train"])
def test_a_set_without_splits_holds_out_by_key_and_for_ever(tmp_path: Path, folder: str) -> None:
    """The same holds for a set with train/ only."""
    write_set(tmp_path / "small" / folder, [1] * 100)
    write_set(tmp_path / "large" / folder, [1] * 200)
    held: list[set[str]] = []
    for name in ("small", "large"):
        source = ShardSource(tmp_path / name, val_fraction=0.2)
        sets = OpenedSets()
        parts = {split: source.open(split, sets) for split in ("train", "val", "test")}
        assert parts["test"] is None
        names = {s: {p[0].key(int(n)) for n in p[1]} for s, p in parts.items() if p is not None}
        assert not names["train"] & names["val"]
        assert len(names["train"] | names["val"]) == (100 if name == "small" else 200)
        held.append(names["val"])
    assert 8 <= len(held[0]) <= 32
    assert held[0] == {key for key in held[1] if int(key[1:]) < 100}


@pytest.mark.parametrize("fraction", [0.01, 0.2])
def test_a_set_that_holds_nothing_out_is_said(
    fraction: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A share of a small set may be empty, since keys are selected by their hashes."""
    write_set(tmp_path / "mine", [1] * 30)
    write_set(tmp_path / "texts", [0] * 9)
    sources = {
        "mine": ShardSource(tmp_path / "mine", val_fraction=fraction),
        "texts": ShardSource(tmp_path / "texts", share=0.1, val_fraction=0.0),
    }
    batches = list(module(tmp_path, sources=sources).val_dataloader())
    said = "no validation, and no val/ figures: there is no val/, and data.sources.mine.val_fraction=0.01 takes none (r"
    assert (batches == []) == (said in caplog.text) == (fraction == 0.01)


def test_sets_are_made_where_they_are_missing_and_only_there(tmp_path: Path) -> None:
    made = MadeShards("keygrip.recording.video_text.make_texts", {"train": 30, "val": 5, "test": 0}, tmp_path, "t")
    data = module(tmp_path, sources={"texts": ShardSource(make=made)})
    assert len(data.parts["train"][0]) == 30
    before = {path: path.stat().st_mtime_ns for path in made.root.rglob("*") if path.is_file()}
    module(tmp_path, sources={"texts": ShardSource(make=made)})
    assert {path: path.stat().st_mtime_ns for path in made.root.rglob("*") if path.is_file()} == before
    assert MadeShards(made.maker, {**made.options, "processes": 3}, tmp_path, "t").root == made.root
    assert MadeShards(made.maker, {**made.options, "train": 31}, tmp_path, "t").root != made.root


def test_sets_of_a_run_that_are_elsewhere_are_named_with_the_settings_for_their_folders(tmp_path: Path) -> None:
    """All at once, since the settings of a checkpoint generate none."""
    options = {"train": 6, "val": 5, "test": 0}
    here, moved, tours = (
        MadeShards("keygrip.recording.video_text.make_texts", options, tmp_path, name, make_missing=False)
        for name in ("here", "moved", "tours")
    )
    replace(here, make_missing=True).complete()
    sources = {"here": ShardSource(make=here), "a": ShardSource(make=moved), "b": ShardSource(make=tours)}
    with pytest.raises(FileNotFoundError) as raised:
        module(tmp_path, sources=sources)
    assert str(raised.value).startswith(f"no complete shards of the run in {moved.root}, {tours.root}: if they are ")
    assert "give data.sources.a.root=FOLDER data.sources.b.root=FOLDER; otherwise train with" in str(raised.value)
    elsewhere = {"a": replace(sources["a"], root=here.root), "b": replace(sources["b"], root=here.root)}
    assert [len(part) for part in module(tmp_path, sources=sources | elsewhere).parts["train"]] == [6, 6, 6]


class Learner(CharacterCollator):
    """A collator that must read the texts before training."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.folder: Path | None = None

    def prepare(self, folder: Path, texts: Callable[[], Iterator[str]]) -> None:
        self.folder, self.texts = folder, list(texts())


def test_a_collator_sees_the_training_text_before_the_first_batch(root: Path) -> None:
    collator = Learner()
    data = VideoTexts({"videos": ShardSource(root / "videos")}, collator, 8, 12, num_workers=0)
    data.setup("fit")
    assert collator.folder == data.folder
    assert data.folder.parent == root / "videos" / ".keygrip"
    assert len(collator.texts) == 2 * 160
    assert collator.texts[:2] == ["mark s0?????", "s0"]


def test_each_shard_set_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a set without val/, other sources of the set, and the collator's texts are read from one object, and
    the samples are those of separate objects."""
    train_folder = write_set(tmp_path / "videos" / "train", [1, 2, 3, 1] * 10)
    val_folder = write_set(tmp_path / "videos" / "val", [2] * 6, prefix="v")
    sources: dict[str, ShardSource | None] = {
        "whole": ShardSource(train_folder, val_fraction=0.2),
        "part": ShardSource(train_folder, val_fraction=0.4, frames=[2, 3], share=0.25),
        "divided": ShardSource(tmp_path / "videos"),  # the same train/, and its own val/
        "texts": ShardSource(write_set(tmp_path / "texts", [0] * 30, kinds=("text",)), share=0.2),
    }
    opened: list[str] = []
    divided: list[float] = []
    open_set = ShardSet.__init__

    def counted(self: ShardSet, root: Path | str, *arguments: Any, **options: Any) -> None:
        opened.append(str(root))
        open_set(self, root, *arguments, **options)

    def divide(shards: ShardSet, fraction: float) -> np.ndarray:
        divided.append(fraction)
        return held_out(shards, fraction)

    def make(workers: int) -> VideoTexts:
        opened.clear()
        divided.clear()
        data = VideoTexts(sources, Learner(), 8, 12, num_workers=workers)
        data.prepare_data()
        data.setup("fit")
        data.prepare_data()  # the trainer calls both again
        data.setup("fit")
        return data

    monkeypatch.setattr(ShardSet, "__init__", counted)
    monkeypatch.setattr(shard_source, "held_out", divide)
    data = make(1)
    folders = [tmp_path / "texts", train_folder, val_folder]
    assert sorted(opened) == sorted(map(str, folders))
    assert sorted(divided) == [0.02, 0.2, 0.4]  # once per set and share
    train, val = ({part.name: part for part in data.parts[split]} for split in ("train", "val"))
    assert train["whole"].shards is train["part"].shards is train["divided"].shards is val["whole"].shards
    assert val["divided"].shards is not train["divided"].shards
    for name in ("whole", "part"):
        assert not set(train[name].chosen) & set(val[name].chosen)

    monkeypatch.setattr(OpenedSets, "open", lambda self, folder: ShardSet(folder, self.cache_dir, self.cache_gb))
    separate = make(0)
    assert len(opened) > 2 * len(folders)
    assert data.fingerprint == separate.fingerprint
    assert data.collator.texts == separate.collator.texts  # type: ignore[attr-defined]
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(data, loader)(), getattr(separate, loader)(), strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert (ours.key, ours.source) == (theirs.key, theirs.source)
            assert torch.equal(ours.frames, theirs.frames)


def test_sets_are_opened_anew_after_a_setup_that_failed(tmp_path: Path) -> None:
    write_set(tmp_path / "set" / "train", [1] * 20)
    write_set(tmp_path / "set" / "val", [1] * 5, prefix="v")
    data = VideoTexts({"a": ShardSource(tmp_path / "set")}, Learner(), 8, 4, num_workers=0)
    data.prepare_data()
    index = next((tmp_path / "set" / "val").glob("*.index.npz"))
    content = index.read_bytes()
    index.write_bytes(content[:-1])
    with pytest.raises(ShardError, match="does not belong to the manifest"):
        data.setup("fit")
    index.write_bytes(content)
    write_set(tmp_path / "set" / "train", [1] * 30)
    data.setup("fit")
    assert [len(part) for part in data.parts["train"]] == [30]


def test_bad_settings_are_refused(root: Path, tmp_path: Path) -> None:
    source = {"videos": ShardSource(root / "videos")}
    for options, message in (
        ({"fit": "shrink"}, r"data\.fit must be one of stretch, crop, pad, auto, not 'shrink'"),
        ({"max_frames": 5000}, r"data\.max_frames must be 1 to 4096, not 5000"),
        ({"questions": 0}, r"data\.questions must be at least 1"),
        ({"val_questions": -3}, r"data\.val_questions must be at least 1, not -3"),
        ({"val_questions": {"mark": -1}}, r"data\.val_questions counts questions of each kind, from 0"),
        ({"max_val_samples": 0}, r"data\.max_val_samples must be at least 1, not 0"),
        ({"cache_gb": -1}, r"data\.cache_gb must not be negative, not -1"),
        ({"memory_gb": -1}, r"data\.memory_gb must not be negative, not -1"),
        ({"max_skipped_share": 2}, r"data\.max_skipped_share=2: it is a share, from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoTexts(source, CharacterCollator(), 8, 12, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no data: name at least one source"):
        VideoTexts({"a": None}, CharacterCollator(), 8, 12)
    with pytest.raises(FileNotFoundError, match=r"no shards at .*nothing: prepare them first"):
        module(root, sources={"a": ShardSource(tmp_path / "nothing")})
    with pytest.raises(FileNotFoundError, match=r"has neither manifest\.json nor train/manifest\.json"):
        module(root, sources={"a": ShardSource(tmp_path)})
    with pytest.raises(ValueError, match="a source needs a root"):
        module(root, sources={"a": ShardSource()})


def test_long_videos_are_thinned_evenly(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [9] * 20)
    data = module(tmp_path, sources={"a": ShardSource(tmp_path / "a", val_fraction=0.0)}, max_frames=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.frames.shape == (12, 4, 3, 8, 8)


def test_metadata_of_thinned_videos_counts_the_frames_that_are_left(tmp_path: Path) -> None:
    """Of ten frames 0, 3, 6 and 9 are left: frame 3 becomes the second one, and frame 4 is no longer referred to."""
    told = [answer(f"Frame {n}?", "1", "mark", {"frame": n, "pixel": [1, 2]}) for n in (0, 3, 4, 9)]
    with ShardWriter(tmp_path / "s-000.tar") as writer:
        writer.add("s0", *video_text_parts([picture(n) for n in range(10)], told, "s", extension="png"))
    write_manifest(tmp_path, describe_video_text, progress=False)
    shards = ShardSet(tmp_path)
    whole = read_sample(shards, 0, 8)
    assert [text.evidence["frame"] for text in whole.conversations] == [0, 3, 4, 9]
    for thin in (read_sample(shards, 0, 8, max_frames=4), thinned(whole, 4)):
        assert thin.frames[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
        assert [text.evidence.get("frame") for text in thin.conversations] == [0, 1, None, 3]
        assert all(text.evidence["pixel"] == [1, 2] for text in thin.conversations)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_place_in_a_frame_is_in_pixels_of_the_square(tmp_path: Path, fit: str) -> None:
    """A wide frame with a bright field: the evidence gives its place in the shown image, or nothing if it was cut
    off."""
    kept, cut = (60.0, 20.0), (8.0, 20.0)
    for name, (x, y) in {"kept": kept, "cut": cut}.items():
        frame = np.zeros((48, 96, 3), np.uint8)
        frame[int(y) - 6 : int(y) + 6, int(x) - 6 : int(x) + 6] = 255
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        told = [answer("?", "1", "mark", {"frame": 0, "pixel": [x, y], "pixels_seen": 144, "colour": "red"})]
        with ShardWriter(tmp_path / name / "s-000.tar") as writer:
            writer.add("s0", *video_text_parts([file.getvalue()], told, "s", extension="png"))
        write_manifest(tmp_path / name, describe_video_text, progress=False)
    sample = read_sample(ShardSet(tmp_path / "kept"), 0, 24, fit)
    bright = sample.frames[0, :, :, 0].astype(float)
    centre = [float((bright.sum(axis) * (np.arange(24) + 0.5)).sum() / bright.sum()) for axis in (0, 1)]
    evidence = sample.conversations[0].evidence
    assert evidence["pixel"] == pytest.approx(centre, abs=0.15)
    assert evidence["pixels_seen"] == pytest.approx(bright.sum() / 255, rel=0.1)
    cut_off = read_sample(ShardSet(tmp_path / "cut"), 0, 24, fit).conversations[0].evidence
    assert ("pixel" in cut_off, "pixels_seen" in cut_off) == (fit != "crop", fit != "crop")
    assert cut_off["colour"] == "red"


def test_a_place_in_a_video_file_is_in_pixels_of_the_square(tmp_path: Path) -> None:
    told = answer("?", "1", "mark", {"frame": 1, "pixel": [12, 4], "pixels_seen": 16})
    parts, columns = video_text_parts([], [told], "s")
    content = {name: value for name, value in json.loads(parts["json"]).items() if name != "frames"}
    with ShardWriter(tmp_path / "s-000.tar") as writer:
        writer.add("s0", {"json": json.dumps(content).encode(), "mp4": small_video()}, columns | {"frames": 2})
    write_manifest(tmp_path, describe_video_text, progress=False)
    evidence = read_sample(ShardSet(tmp_path), 0, 8).conversations[0].evidence
    assert evidence == {"frame": 1, "pixel": [6.0, 2.0], "pixels_seen": 4.0}


def test_evidence_counts_the_seconds_of_a_video_file_of_which_fewer_frames_are_read(tmp_path: Path) -> None:
    """Of 100 seconds 64 frames are decoded; of the named ones only the first and the last are among them."""
    write_video(tmp_path / "long.mp4", np.zeros((100, 16, 16, 3), np.uint8), fps=1.0)
    told = [answer(f"Second {n}?", "1", "mark", {"frame": n, "colour": "red"}) for n in (0, 30, 99)]
    parts, columns = video_text_parts([], told, "s")
    content = {name: value for name, value in json.loads(parts["json"]).items() if name != "frames"}
    video = (tmp_path / "long.mp4").read_bytes()
    with ShardWriter(tmp_path / "s-000.tar") as writer:
        writer.add("s0", {"json": json.dumps(content).encode(), "mp4": video}, columns | {"frames": 100})
    write_manifest(tmp_path, describe_video_text, progress=False)
    sample = read_sample(ShardSet(tmp_path), 0, 8)
    assert len(sample.frames) == 64
    assert [text.evidence.get("frame") for text in sample.conversations] == [0, None, 63]
    assert all(text.evidence["colour"] == "red" for text in sample.conversations)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("frames", [1]), ("frames", [5, 1]), ("frames", [-1, 4]), ("max_samples", -3), ("max_samples", 0)),
        *(("val_fraction", float("nan")), ("val_fraction", 2.0), ("val_fraction", -1.0)),
    ],
)
def test_settings_of_a_source_that_cannot_be_are_named(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"data\.sources\.NAME\.{setting}="):
        ShardSource("x", **{setting: value})


def test_normalised_frames_and_padding_share() -> None:
    """The rows have 4 + 2, 1 + 1 and 2 + 1 positions of text and frames."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = torch.tensor([[True] * 4, [True, False, False, False], [True, True, False, False]])
    batch = VideoTextBatch(
        frames=torch.full((2, 3, 3, 2, 2), 255, dtype=torch.uint8),
        frame_mask=mask,
        video_index=torch.tensor([0, 1, 1]),
        input_ids=text.long(),
        attention_mask=text,
        loss_mask=text,
        answer_mask=text,
        visual_at=[0] * 3,
        truncated=0,
        kind=["a"] * 3,
        source=["s"] * 3,
        key=["k"] * 3,
        texts=[Conversation((Turn("user", "q"), Turn("assistant", "a")), "a", {})] * 3,
    )
    rows = text_rows(batch)
    assert rows.padding_share() == pytest.approx(1 - 11 / (3 * 6))
    assert rows.padding_share(packed=True) == 0  # all three in one bin
    assert rows.padding_share(5) == pytest.approx(1 - (14 + 6 + 7) / (3 * 14))
    assert rows.padding_share(100, packed=True) == pytest.approx(1 - (204 + 101 + 102) / (2 * 204))  # two bins
    pixels = batch.normalised((0.5, 0.5, 0.0), (0.5, 0.25, 1.0))
    assert pixels[0, 0, :, 0, 0].tolist() == [1.0, 2.0, 1.0]
    assert batch.to("cpu", dtype=torch.float16).frames.dtype == torch.uint8


def test_shards_on_a_web_server(root: Path, tmp_path: Path) -> None:
    """Batches equal those from the folder; the cached copies stay within their limit."""
    handler = partial(QuietHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        options = {"cache_dir": tmp_path / "cache", "cache_gb": 1e-4, "window_shards": 1}
        far = module(root, sources={"videos": ShardSource(f"{url}/videos")}, **options)
        near = module(root, window_shards=1)
        assert far.fingerprint == near.fingerprint
        for ours, theirs in zip(far.train_dataloader(), near.train_dataloader(), strict=True):
            assert ours.key == theirs.key
            assert torch.equal(ours.frames, theirs.frames)
        assert [batch.key for batch in far.val_dataloader()] == [batch.key for batch in near.val_dataloader()]
        largest = max(path.stat().st_size for path in root.rglob("*.tar"))
        copies = list((tmp_path / "cache").rglob("*.tar"))
        assert sum(path.stat().st_size for path in copies) <= max(1e5, 2 * largest)
        with pytest.raises(FileNotFoundError, match=r"nothing has neither manifest\.json nor train/manifest\.json"):
            module(root, sources={"videos": ShardSource(f"{url}/nothing")}, **options)
        server.shutdown()


@pytest.mark.parametrize("spares", [True, False])
def test_copies_that_a_training_made_are_spared(
    spares: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoTexts, "spares_copies", spares)
    data = module(
        root, sources={"videos": ShardSource(f"file://{root}/videos")}, cache_dir=tmp_path / "cache", cache_gb=0.0
    )
    before = [folder / "before.tar" for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    for path in before:
        path.write_bytes(bytes(10))
    for _ in data.train_dataloader():
        pass
    assert before
    assert all(path.is_file() for path in before) is spares  # else removed in the folders that it read


def test_the_copies_of_all_sources_stay_within_one_limit(root: Path, tmp_path: Path) -> None:
    limit = 1.2 * max(path.stat().st_size for path in root.rglob("*.tar"))
    sources = {name: ShardSource(f"file://{root}/{name}") for name in ("videos", "texts")}
    data = module(root, sources=sources, cache_dir=tmp_path, cache_gb=limit / 1e9)
    assert sum(path.stat().st_size for path in root.rglob("*.tar")) > 2 * limit
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= limit


class FailingHandler(QuietHandler):
    """Answers one path with an error."""

    failing: tuple[str, int] | None = None

    def send_head(self) -> Any:
        if self.failing is not None and self.path.endswith(self.failing[0]):
            self.send_error(self.failing[1])
            return None
        return super().send_head()


def test_what_a_web_server_cannot_say_is_no_missing_split(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only 404 means that a set has no val/ or settings. After any other error the run ends, or cached copies are
    read."""
    monkeypatch.setattr("keygrip.data.shards.remote.RETRY_S", 0.0)
    shutil.copytree(root / "videos", tmp_path / "set")
    (tmp_path / "set" / "train" / "settings.json").write_text('{"fit": "pad"}')

    class Handler(FailingHandler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set"

        def opened(cache: str) -> VideoTexts:
            return module(root, sources={"videos": ShardSource(url)}, cache_dir=tmp_path / cache, fit="auto")

        for path, status in (("val/manifest.json", 500), ("train/settings.json", 403), ("train/manifest.json", 500)):
            Handler.failing = (path, status)
            with pytest.raises(ConnectionError, match=rf"{path} cannot be read \(.*{status}"):
                opened(f"failing-{path.replace('/', '-')}")
        Handler.failing = (".tar.index.npz", 404)
        with pytest.raises(FileNotFoundError, match=r"index\.npz is not there: check the address, or write"):
            opened("no index")
        Handler.failing = ("/val/manifest.json", 404)
        assert len(opened("without val").parts["val"][0]) < 12  # a share of train/
        Handler.failing = None
        whole = opened("copies")
        assert (len(whole.parts["val"][0]), whole.fit) == (12, "pad")
        server.shutdown()
    offline = opened("copies")
    assert (offline.fingerprint, offline.fit) == (whole.fingerprint, "pad")


def test_a_set_prepared_in_an_unknown_way_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "videos", tmp_path / "set")
    (tmp_path / "set" / "train" / "settings.json").write_text('{"fit": "Crop"}')
    with pytest.raises(ValueError, match=r"settings\.json says fit='Crop', which is none of stretch, crop, pad"):
        module(root, sources={"videos": ShardSource(tmp_path / "set")}, fit="auto")


class ChoosyCollator(CharacterCollator):
    """Refuses the conversations of the samples s3 and s77."""

    def problem(self, conversation: Conversation, seconds: Sequence[float] | None = ()) -> str | None:
        return "too long" if conversation.turns[1].text in ("s3", "s77") else None


def test_samples_of_which_no_conversation_can_be_used_are_replaced_and_counted(root: Path) -> None:
    data = module(root)
    data.collator = ChoosyCollator()
    keys = Counter(key for batch in data.train_dataloader() for key in batch.key)
    assert sum(keys.values()) == 13 * 12
    assert not {"s3", "s77"} & set(keys)
    assert data.unusable.count >= 2
    assert all("too long" in reason for reason in data.unusable.reasons)
    assert data.skipped.count == 0


def test_a_data_module_with_a_budget(tmp_path: Path) -> None:
    frames = [1, 2, 3, 8] * 20
    write_set(tmp_path / "videos" / "train", frames, per_shard=40)
    write_set(tmp_path / "videos" / "val", [2] * 12, prefix="v")
    budget = Budget(16, 400, exact_lengths=False)  # this collator gives no lengths
    data = module(tmp_path, budget=budget, batch_size=12)
    batches = list(data.train_dataloader())
    assert len(batches) == data.mixture.batches  # type: ignore[union-attr]
    assert max(int(batch.frame_mask.sum()) for batch in batches) == 16
    keys = Counter(key for batch in batches for key in batch.key)
    assert set(keys.values()) == {1}
    worst = data.worst_batches()[0]
    assert int(worst.frame_mask.sum()) == 16
    assert sum(len(batch) for batch in data.val_dataloader()) == 12
    assert data.fingerprint != module(tmp_path, batch_size=12).fingerprint
    assert module(tmp_path, budget=budget, batch_size=12, questions=1).fingerprint != data.fingerprint
    with pytest.raises(ValueError, match=r"exact_lengths=true: CharacterCollator cannot count the tokens"):
        module(tmp_path, budget=Budget(16, 400), batch_size=12)


def test_a_source_can_be_cut_by_length(root: Path) -> None:
    """For a curriculum over lengths, several sources use the same set; no sample is lost or repeated."""
    sources = {
        name: ShardSource(root / "videos", frames=frames) for name, frames in (("short", [1, 1]), ("long", [2, 64]))
    }
    data = module(root, sources=sources)
    seen = Counter(
        (batch.source[row], batch.key[row]) for batch in data.train_dataloader() for row in range(len(batch))
    )
    assert set(seen.values()) == {1}
    assert {FRAMES[int(key[1:])] for source, key in seen if source == "short"} == {1}
    assert {FRAMES[int(key[1:])] for source, key in seen if source == "long"} == {2, 3}


def test_more_than_64_frames(tmp_path: Path) -> None:
    write_set(tmp_path / "videos" / "train", [100, 100, 100, 90])
    write_set(tmp_path / "videos" / "val", [2] * 4, prefix="v")
    batch = next(iter(module(tmp_path, batch_size=4, max_frames=96).train_dataloader()))
    assert sorted(batch.frame_mask.sum(1).tolist()) == [90, 96, 96, 96]
    with pytest.raises(ValueError, match=r"data\.max_frames must be 1 to 4096"):
        module(tmp_path, max_frames=5000)


def test_annotators_answers_are_read_as_benchmarks_have_them_or_refused() -> None:
    """Regression: a text in place of a list was compared letter by letter."""

    def told(answers: Any) -> dict[str, Any]:
        turns = [{"role": "user", "text": "Which?"}, {"role": "assistant", "text": "yes"}]
        (found,) = parse_conversations({"conversations": [{"turns": turns, "evidence": {"n": 1, "answers": answers}}]})
        return found.evidence

    assert told(["yes", "no"]) == told([{"answer": "yes", "answer_id": 1}, {"answer": "no"}])
    assert told(["yes", "no"]) == {"n": 1, "answers": ["yes", "no"]}
    assert told([]) == told(None) == {"n": 1}
    for wrong in ("yes", [3] * 10, {"a": 1}, [{"a": "yes"}]):
        with pytest.raises(BadSample, match="its `answers` are no list of texts"):
            told(wrong)


def test_a_conversation_without_a_users_turn_is_refused() -> None:
    talk = Conversation((Turn("system", "Be brief."), Turn("assistant", "Yes.")), "text", {})
    assert conversation_problem(talk) == "a conversation has no user's turn"


@pytest.mark.parametrize(
    ("asked", "shown", "bare"),
    [
        ("<image>\nWhich page uses the <video> tag?", ("image",), ("image",)),
        ("Which page uses the <video> tag?", ("image",), ("image",)),
        ("<img>videos/0.jpg</img>\n<video>\nis on which page?", ("image",), ("image",)),
        ("<image>\nA.\n<video>\nB.\n<div>", ("image",), ("image",)),
        ("<video>\nWhat?", ("image",), ("image", "video")),  # the images are its frames
        ("In <image> what?\n<video>", ("image",), ("image", "video")),  # ambiguous: either may be meant
        ("<video>\nIs there an <image> tag?", ("video",), ("video",)),
        ("<image>\nWhat?", ("video",), ("image", "video")),
        ("In <image> and <video>?", ("image", "video"), ("image", "video")),
        ("In <image> and <video>?", (), ()),
        ("<image>\nMend <video></video>", ("image",), ("image",)),
    ],
)
def test_a_mark_of_another_kind_than_what_is_shown_may_be_a_word(
    asked: str, shown: tuple[str, ...], bare: tuple[str, ...]
) -> None:
    assert Placeholders.of([asked], shown).bare == bare


def test_long_white_space_is_read_once() -> None:
    """A pattern that starts again at each blank would take minutes here."""
    blanks = " " * 200_000
    assert Placeholders().without(f"a{blanks}b") == f"a{blanks}b"
    assert Placeholders().without(f"a{blanks}<image>{blanks}b") == "a b"
    assert Placeholders.of([f"a{blanks}<image>{blanks}b"], ()).bare == ()
