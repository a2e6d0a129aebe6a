"""Runs that another run builds on, trained where they are missing."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from keygrip import train
from keygrip.artifacts import sha256_file
from keygrip.config import compose
from keygrip.training import checkpoints, pretraining
from keygrip.training.integrity import sign
from keygrip.training.pretraining import PretrainingStage, complete_stages, with_run_folders
from keygrip.training.signals import Interrupted


def made(overrides: Sequence[str], folder: str) -> PretrainingStage:
    return PretrainingStage(overrides, "vlm_encoder_pretraining", folder)


def resolved(*overrides: str) -> Any:
    return OmegaConf.to_container(compose("train", list(overrides)), resolve=True)


def finished(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Write the files of a finished run of these overrides, without its weights."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    header = {"format": checkpoints.FORMAT, "config": resolved(*overrides)}
    torch.save({checkpoints.HEADER: header, "state_dict": {}, "global_step": 1}, checkpoint)
    sign(checkpoint, sha256_file(checkpoint))
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str]) -> int:
        calls.append(command)
        finished(Path(command[-1].partition("=")[2]), command[3:])
        return 0

    monkeypatch.setattr(pretraining, "_run", run)
    run = made(["experiment=vlm_encoder_pretraining", "seed=3"], str(tmp_path))
    assert run.complete() == run.complete() == run.run_dir
    assert len(calls) == 1
    assert calls[0][1:] == ["-m", "keygrip.train", *run.overrides, f"run_dir={run.run_dir}"]
    assert made(["experiment=vlm_encoder_pretraining", "seed=4"], str(tmp_path)).run_dir != run.run_dir


def test_a_run_of_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    stage = made(["experiment=vlm_encoder_pretraining", "seed=3"], str(tmp_path))
    before = [*stage.overrides, "backbone.depth=3", "max_steps=7", "logger=none", "log_every_n_steps=1"]
    finished(stage.run_dir, before)  # made with an earlier recipe
    with pytest.raises(ValueError, match=r"backbone\.depth \(3 then, None now\), max_steps \(7 then") as no:
        stage.complete()
    assert f"move it away to train {stage.name} anew, or name {stage.run_dir} itself" in str(no.value)
    assert "log" not in str(no.value).partition("now:")[2]


def stage_of(*overrides: str) -> PretrainingStage:
    """Return the stage that a run with these overrides begins with."""
    wanted: dict[Path, PretrainingStage] = {}
    with_run_folders(resolved(*overrides), wanted)
    (stage,) = wanted.values()
    return stage


@pytest.mark.parametrize(
    ("run", "experiment"),
    [
        ("vlm_query_pretraining", "vlm_encoder_pretraining"),
        ("vlm_robot_videos", "vlm_query_pretraining"),
        ("vlm_pooled_lengths", "vlm_encoder_self_supervised"),
        ("vlm_robot_videos ablation=foveated_vlm/self_supervised_encoder", "vlm_encoder_self_supervised"),
    ],
)
def test_the_encoder_is_trained_on_images_of_the_runs_size(run: str, experiment: str) -> None:
    """A stage of its recipe's own size keeps its folder; another size is passed on, also when it is given again."""
    overrides = [f"experiment={experiment}", "seed=0"]
    name = experiment if experiment.endswith("self_supervised") else "vlm_encoder_pretraining"
    chosen = f"experiment={run}".split()
    assert stage_of(*chosen, "backbone.image_size=128").run_dir == PretrainingStage(overrides, name).run_dir
    larger = stage_of(*chosen, "backbone.image_size=192")
    assert larger.overrides == [*overrides, "backbone.image_size=192"]
    trained = compose("train", larger.overrides)
    assert (trained.backbone.image_size, trained.data.image_size) == (192, 192)
    assert PretrainingStage(**vars(larger)) == larger


@pytest.mark.parametrize("number", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])  # of torchrun, of srun
def test_a_run_is_made_by_one_process(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(number, "2")
    overrides = ["model=nothing", "data.name=two words"]
    with pytest.raises(ValueError, match="is missing, and it is trained by one process") as no:
        made(overrides, str(tmp_path)).complete()
    # quoted for a shell
    assert "run `python -m keygrip.train model=nothing 'data.name=two words' run_dir=" in str(no.value)


@pytest.mark.usefixtures("two_without_locks")
def test_a_missing_run_is_refused_with_its_command_on_a_disk_without_locks_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run `python -m keygrip\.train model=nothing run_dir="):
        made(["model=nothing"], str(tmp_path)).complete()


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
    ready = complete_stages(resolved("experiment=vla_yam_depth", *ways))
    assert asked == [tmp_path / "depth_reader"] * trained
    names = [encoder["init_from"] for encoder in (ready["geometry"], ready["model"]["network"]["geometry"])]
    assert names[0] == names[1], "named where it is not made too: a run goes on with the same settings"
    assert names[0].startswith("runs/depth_reader-")


def test_an_encoder_whose_weights_the_run_brings_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(stage: PretrainingStage) -> Path:
        raise AssertionError(f"{stage.name} is trained")

    monkeypatch.setattr(PretrainingStage, "complete", complete)
    complete_stages(resolved("experiment=vla_yam_language", "model.init_from=runs/other"))
    with pytest.raises(AssertionError, match="depth_reader is trained"):
        complete_stages(resolved("experiment=vla_yam_language"))


def test_a_dry_run_refuses_a_missing_stage(tmp_path: Path) -> None:
    stage = made(["experiment=vlm_encoder_pretraining", "seed=3"], str(tmp_path))
    target = f"{PretrainingStage.__module__}.{PretrainingStage.__qualname__}"
    node = {"_target_": target, "overrides": list(stage.overrides), "name": stage.name, "folder": stage.folder}
    config = {"model": {"backbone": {"init_from": node}}}
    with pytest.raises(ValueError, match="a dry run trains nothing") as refused:
        complete_stages(config, train=False)
    command = f"python -m keygrip.train experiment=vlm_encoder_pretraining seed=3 run_dir={stage.run_dir}"
    assert f"run `{command}` first, or name other weights (null: random ones, of an encoder)" in str(refused.value)
    finished(stage.run_dir, stage.overrides)
    assert complete_stages(config, train=False) == {"model": {"backbone": {"init_from": str(stage.run_dir)}}}


STAGE = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    time.sleep(0.5)
    Path(sys.argv[1], "saved").write_text("")
    sys.exit(1)

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1], "began").write_text("")
time.sleep(60)
"""


def test_a_stage_saves_before_the_run_that_waits_for_it_is_stopped(tmp_path: Path) -> None:
    def stopped(number: int, frame: object) -> None:
        if (tmp_path / "began").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, stopped)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(Interrupted):
            pretraining._run([sys.executable, "-c", STAGE, str(tmp_path)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "saved").exists()


def test_a_run_begins_with_a_stage_that_is_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on its folder is kept, however the run ends: hours may have been spent on the stage."""
    stage, said = made(["seed=3"], str(tmp_path)), list[str]()
    target = f"{PretrainingStage.__module__}.{PretrainingStage.__qualname__}"
    node = {"_target_": target, "overrides": list(stage.overrides), "name": stage.name, "folder": stage.folder}
    monkeypatch.setattr(PretrainingStage, "complete", lambda self: said.append("trained"))
    complete_stages({"model": {"init_from": node}}, begin=lambda: said.append("begun"))
    assert said == ["begun", "trained"]
    finished(stage.run_dir, stage.overrides)
    complete_stages({"model": {"init_from": node}}, begin=lambda: said.append("begun again"))
    assert said == ["begun", "trained", "trained"]


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        (["model=volume_query"], ["data", "stages"]),
        (["experiment=dit_robot_images_latents"], ["stages", "data"]),  # the stage's weights encode the images
    ],
)
def test_data_are_looked_for_before_stages_that_they_do_not_need(
    settings: list[str], order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def end(*_: Any) -> Any:
        raise ValueError("the module is built")

    monkeypatch.setattr("keygrip.training.fit._build_data", lambda *_: said.append("data") or object())
    monkeypatch.setattr("keygrip.training.fit.complete_stages", lambda *_, **__: said.append("stages"))
    monkeypatch.setattr("keygrip.training.fit.build_module", end)
    with pytest.raises(ValueError, match="the module is built"):
        train.run(compose("train", [*settings, "strategy=cpu", f"run_dir={tmp_path / 'run'}"]))
    assert said == order
