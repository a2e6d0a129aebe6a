"""`model.init_from`: a policy starts from the weights of another run, and afterwards no longer needs that run."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vla_parts import ready_module, small_module, small_statistics

import keygrip
from keygrip.models.volume_query.module import VolumeQueryModule

QUICK = ("callbacks.ema=null", "logger=none", "data.num_workers=0", "data.batch_size=2", "limit_val_batches=1")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that makes the tests record into one folder, so that shared recordings are made once."""
    return f"data.record.folder={tmp_path_factory.mktemp('recordings')}"


@pytest.mark.slow
def test_a_policy_starts_from_another_run(recordings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["model=volume_query", *VolumeQueryModule.toy_overrides, *QUICK, recordings]
    keygrip.train([*common, "max_steps=2", "run_dir=first"])
    start = ["optimizer.lr=1e-12", "model.init_from=first", "seed=7", "max_steps=1"]
    keygrip.train([*common, *start, "run_dir=second"])
    before = keygrip.load("first").network.state_dict()
    shutil.move("first", "gone")
    after = keygrip.load("second").network.state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0, msg=name)

    wider = ["model.network.trunk_width=80", "model.init_from=gone"]
    reason = (
        r"weights of model\.init_from=gone do not fit this network: .*size mismatch.*; settings that differ: "
        r"model\.network\.trunk_width \(None there, 80 here\)$"
    )
    with pytest.raises(ValueError, match=reason):
        keygrip.train([*common, *wider, "max_steps=1", "run_dir=third"])
    other = ["model=coordinate_regression", *common[1:], "model.init_from=gone", "max_steps=1", "run_dir=fourth"]
    with pytest.raises(ValueError, match=r"init_from=gone holds a VolumeQueryModule, not a regression policy"):
        keygrip.train(other)


@pytest.mark.slow
def test_new_words_come_beside_those_of_the_other_run(
    recordings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["model=volume_query_language", *VolumeQueryModule.toy_overrides, *QUICK, recordings, "max_steps=1"]
    keygrip.train([*common, "run_dir=first"])
    keygrip.train([*common, "data.record.task.name=pick", "model.init_from=first", "run_dir=second"])
    reach, pick = (keygrip.load(name).network.instruction_encoder for name in ("first", "second"))
    assert reach.unknown_words("touch the ball and pick up the cube") == ["and", "pick", "up", "cube"]
    assert pick.unknown_words("touch the ball and pick up the cube") == ["and"]


def test_a_vla_starts_with_the_words_of_the_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ready_module(tmp_path / "before")
    monkeypatch.setattr("keygrip.training.system.load_module", lambda path, **options: before)
    after = small_module()
    with torch.no_grad():
        for value in after.network.parameters():
            value.add_(1.0)
    after.init_from = "run"
    after.set_statistics(small_statistics(tmp_path / "after", ("quite other words", "and longer ones")))
    for name, value in after.network.state_dict().items():
        assert torch.equal(value, before.network.state_dict()[name]), name
    mine, theirs = after.network.vlm.tokenizer, before.network.vlm.tokenizer
    assert mine is not None
    assert theirs is not None
    assert mine.state() == theirs.state()


def test_a_vla_does_not_start_with_weights_that_mean_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = ready_module(tmp_path / "before", kind="delta")
    monkeypatch.setattr("keygrip.training.system.load_module", lambda path, **options: before)
    statistics = small_statistics(tmp_path / "after")
    turned = replace(statistics, cameras=statistics.cameras[::-1])

    after = small_module()
    after.init_from = "run"
    with pytest.raises(ValueError, match=r"of kind delta, this run absolute.*Set model\.actions\.kind=delta"):
        after.set_statistics(statistics)
    after = small_module(kind="delta")
    after.init_from = "run"
    with pytest.raises(ValueError, match=r"has the cameras over, front, this run front, over.*data\.cameras=\[over,fr"):
        after.set_statistics(turned)
    caplog.clear()  # remove the messages of building it
    with caplog.at_level(logging.WARNING):
        after.set_statistics(statistics)
        assert not caplog.messages
        after.set_statistics(replace(statistics, cameras=("front",), step_seconds=0.1))
    assert len(caplog.messages) == 2
    assert "has the cameras over, front, this run front: weights refer to them by index" in caplog.messages[0]
    assert "plans steps of 0.3 s, this run of 0.1 s" in caplog.messages[1]
