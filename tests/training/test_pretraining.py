"""Runs that another one builds on, made where they are missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from keygrip.config import compose
from keygrip.training.pretraining import PretrainingStage, complete_stages


def made(overrides: Sequence[str], folder: str) -> PretrainingStage:
    return PretrainingStage(overrides, "vlm_encoder_pretraining", folder)


def finished(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], check: bool) -> Done:
        calls.append(command)
        finished(Path(command[-1].partition("=")[2]))
        return Done()

    monkeypatch.setattr("keygrip.training.pretraining.subprocess.run", run)
    run = made(["experiment=vlm_encoder_pretraining", "seed=3"], str(tmp_path))
    assert run.complete() == run.complete() == run.run_dir
    assert len(calls) == 1
    assert calls[0][1:] == ["-m", "keygrip.train", *run.overrides, f"run_dir={run.run_dir}"]
    assert made(["experiment=vlm_encoder_pretraining", "seed=4"], str(tmp_path)).run_dir != run.run_dir


def test_a_run_is_made_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"is trained by one process: run `-m keygrip\.train seed=0"):
        made(["seed=0"], str(tmp_path)).complete()


def test_a_failed_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"training vlm_encoder_pretraining failed: keygrip\.train model=nothing"):
        made(["model=nothing"], str(tmp_path)).complete()


@pytest.mark.parametrize(("into", "trained"), [(None, False), ("dit", True), ("vlm", True)])
def test_an_encoder_that_the_run_leaves_out_is_not_made(
    into: str | None, trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def complete(stage: PretrainingStage) -> Path:
        asked.append(tmp_path / stage.name)
        return asked[-1]

    monkeypatch.setattr(PretrainingStage, "complete", complete)
    ways = [f"model.network.geom_inject_to_{way}={str(way == into).lower()}" for way in ("dit", "vlm")]
    plain = OmegaConf.to_container(compose("train", ["experiment=vla_yam_depth", *ways]), resolve=True)
    ready = complete_stages(plain)
    assert asked == [tmp_path / "depth_reader"] * trained
    for encoder in (ready["geometry"], ready["model"]["network"]["geometry"]):
        assert encoder["init_from"] == (str(asked[0]) if trained else None)
