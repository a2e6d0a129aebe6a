"""The whole pipeline with the real parts, small: record, train, interrupt, resume, evaluate, demo."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keygrip import demo, evaluate, prepare, train
from keygrip.config import compose
from keygrip.data.robot.split import split_demos
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.parts import UntrustedPartError

SMALL = [
    "backbone.image_size=64", "backbone.width=32", "backbone.depth=1", "backbone.heads=2", "model.network.pred_size=16",
    "data.record.task.name=reach", "data.record.demos=4", "data.record.image_size=72", "data.record.processes=1",
    "data.batch_size=8", "data.num_workers=0", "strategy=cpu", "strategy.precision=32-true", "log_every_n_steps=1",
    "val_every_n_steps=3", "limit_val_batches=1",
]  # fmt: skip


def without_model(overrides: list[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("model.")]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.record.folder={tmp_path_factory.mktemp('recordings')}"


@pytest.fixture(scope="module")
def trained(recordings: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of 6 steps that records its demonstrations first, with closed-loop evaluation and logged images."""
    folder = tmp_path_factory.mktemp("run")
    loop = "callbacks.closed_loop.closed_loop"
    extra = [
        "closed_loop=yam", f"{loop}.episodes=1", f"{loop}.processes=1", f"{loop}.videos=1",
        "model.log_images_every_n_steps=5", "max_steps=6", f"run_dir={folder}",
    ]  # fmt: skip
    metrics = train.run(compose("train", [*SMALL, recordings, *extra]))
    assert {"train/pix_argmax", "val/pix_argmax", "val/rotation_deg_floor"} <= metrics.keys()
    assert 0 <= metrics["closed_loop/in_distribution/success_rate"] <= 1
    return folder


def test_a_run_leaves_everything_behind(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/volume", "train/gripper", "train/rotation", "val/position_cm_floor"} <= set(tags["scalars"])
    assert {"train/prediction_right", "val/prediction_right"} <= set(tags["images"])
    (film,) = [tag for tag in tags["images"] if tag.startswith("closed_loop/")]
    assert events.Images(film)[0].encoded_image_string[:4] == b"GIF8"
    assert len(list((trained / "closed_loop" / "videos").iterdir())) == 1
    result = json.loads((trained / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["steps"] == 6
    assert (trained / "metadata.json").is_file()
    assert (trained / "config.yaml").is_file()


def test_the_checkpoint_alone_makes_a_policy(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "only.ckpt").write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    module = load_module(tmp_path / "only.ckpt", expected=VolumeQueryModule)
    observation = {
        "image": np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8),
        "intrinsics": np.array([[120.0, 0, 36], [0, 120.0, 36], [0, 0, 1]]),
        "world_to_camera": np.array([[1.0, 0, 0, -0.3], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]),
        "position": np.array([0.3, 0.0, 0.1]),
        "quaternion": np.array([0.0, 0.0, 1.0, 0.0]),
        "gripper": np.array([1.0]),
    }
    plan = module.policy().plan(observation)
    assert plan.position.shape == (1, 8, 3)
    assert np.isfinite(plan.position).all()
    assert plan.step_seconds == pytest.approx(0.3)
    np.testing.assert_allclose(np.linalg.norm(plan.quaternion, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("model", [pytest.param("volume_query_tuned", marks=pytest.mark.slow), "coordinate_regression"])
def test_interrupted_mid_epoch_the_real_model_resumes_to_the_same_bits(
    model: str, recordings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SMALL if model.startswith("volume") else without_model(SMALL)
    common = [
        *small,
        recordings,
        f"model={model}",
        "logger=none",
        "callbacks.checkpoint.every_n_steps=2",
        "max_steps=6",
    ]
    train.run(compose("train", [*common, f"run_dir={tmp_path / 'whole'}"]))

    module_class = type(load_module(tmp_path / "whole"))
    original = module_class.training_step

    def fail_at_step_five(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module_class, "training_step", fail_at_step_five)
    with pytest.raises(RuntimeError, match="power cut"):
        train.run(compose("train", [*common, f"run_dir={tmp_path / 'cut'}"]))
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "cut")["global_step"] == 4
    train.run(compose("train", [*common, f"run_dir={tmp_path / 'cut'}", "resume=true"]))
    whole, cut = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "cut")
    for part in (whole["state_dict"], whole["ema"]["parameters"]):
        other = cut["state_dict"] if part is whole["state_dict"] else cut["ema"]["parameters"]
        assert part.keys() == other.keys()
        for name in part:
            assert torch.equal(part[name], other[name]), name


@pytest.mark.slow
def test_two_processes_train_the_real_model_to_the_weights_of_one(
    recordings: str, trained: Path, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    common = [*SMALL, recordings, "logger=none", "max_steps=4", "callbacks.checkpoint.every_n_steps=4"]
    train.run(compose("train", [*common, f"run_dir={tmp_path / 'one'}"]))
    overrides = [override for override in common if not override.startswith("strategy")]
    done = command(
        "keygrip.train", *overrides, "strategy=ddp_cpu", "strategy.precision=32-true", f"run_dir={tmp_path / 'two'}"
    )
    assert done.returncode == 0, done.stderr
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5, msg=name)


def test_evaluate_reports_open_and_closed_loop(trained: Path, recordings: str, tmp_path: Path) -> None:
    overrides = [f"checkpoint={trained}", "suites=[in_distribution,viewpoint]", "episodes=1", "processes=1", "videos=0"]
    result = evaluate.run(compose("evaluate", [*overrides, f"run_dir={tmp_path}"]))
    assert result["open_loop"]["pix_argmax"] > 0
    assert "position_cm_floor" in result["open_loop"]
    assert set(result["closed_loop"]) == {"in_distribution", "azimuth_10", "azimuth_20", "elevation_10"}
    assert result["closed_loop"]["azimuth_10"]["episodes"] == 1
    assert json.loads((tmp_path / "result.json").read_text())["model"] == "VolumeQueryModule"
    (recorded,) = Path(recordings.partition("=")[2]).glob("reach-*")
    moved = shutil.copytree(recorded, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))
    named = [f"data.root={moved}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'elsewhere'}"]
    again = evaluate.run(compose("evaluate", [f"checkpoint={trained}", "simulate=false", *named]))
    assert again["open_loop"] == result["open_loop"]
    assert (tmp_path / "cache" / "verified.json").is_file()
    assert not list(moved.glob(".*"))
    stored = read_checkpoint(trained)
    config = stored["keygrip"]["config"]["data"]
    names = list(stored["RobotDemos"]["demonstrations"])
    for index in split_demos(names, config["val_fraction"], config["split_seed"])[1]:
        shutil.rmtree(moved / names[index])
    with pytest.raises(ValueError, match=r"1 of 1 demonstrations that would be validated on were trained on"):
        evaluate.run(compose("evaluate", [f"checkpoint={trained}", "simulate=false", *named]))
    cautious = [f"checkpoint={trained}", "open_loop=false", "suites=[in_distribution]", "episodes=1", "processes=1"]
    options = [
        "policy.decoder=argmax",
        "control.execute_seconds=0.9",
        "task.object_size_m=0.05",
        f"run_dir={tmp_path / 'cautious'}",
        "videos=0",
    ]
    assert evaluate.run(compose("evaluate", [*cautious, *options]))["closed_loop"]["in_distribution"]["episodes"] == 1
    for option, said in (("decodr=argmax", "did you mean 'decoder'"), ("decoder=best", "not 'best'")):
        with pytest.raises(ValueError, match=said):
            evaluate.run(compose("evaluate", [*cautious, f"policy.{option}"]))
    with pytest.raises(ValueError, match="suites are"):
        evaluate.run(compose("evaluate", [f"checkpoint={trained}", "suites=[moon]", "open_loop=false"]))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate.run(compose("evaluate", ["checkpoint=/nowhere"]))


@pytest.mark.slow
def test_a_policy_on_a_frozen_text_tower_is_judged_where_its_folder_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_text_tower import write_text_tower

    root, tower = tmp_path / "demos", write_text_tower(tmp_path / "tower")
    recording = ["step=record", f"root={root}", "demos=3", "task.name=reach", "image_size=72", "processes=1"]
    prepare.run(compose("prepare", recording))
    small = [override for override in SMALL if not override.startswith("data.record")]
    language = [
        "instruction=pretrained",
        f"instruction.source={tower}",
        "instruction.width=16",
        "instruction.length=12",
    ]
    loop = "callbacks.closed_loop.closed_loop"
    common = [*small, "model=volume_query_language", *language, f"data.root={root}", "max_steps=1", "logger=none"]
    judged = ["closed_loop=yam", f"{loop}.episodes=1", f"{loop}.processes=1", f"{loop}.videos=0"]
    train.run(compose("train", [*common, *judged, f"run_dir={tmp_path / 'run'}"]))
    stored = json.loads((tmp_path / "run" / "closed_loop" / "result.json").read_text())
    (episode,) = stored["episodes"]["in_distribution"]
    assert "ball" in episode["instruction"]  # of reach, not of data.record.task
    assert json.loads((tmp_path / "run" / "closed_loop" / "episodes.jsonl").read_text())["seed"] == episode["seed"]

    options = ["open_loop=false", "suites=[in_distribution]", "episodes=1", "processes=1", "videos=0"]
    again = [f"checkpoint={tmp_path / 'run'}", *options]
    with pytest.raises(UntrustedPartError, match=r"name them yourself: external=\{network\.instruction\.source: PATH"):
        evaluate.run(compose("evaluate", again))
    found = evaluate.run(compose("evaluate", [*again, f"external.network.instruction.source={tower}"]))
    assert found["closed_loop"]["in_distribution"]["episodes"] == 1
    other = write_text_tower(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another text tower than the one that was trained with"):
        evaluate.run(compose("evaluate", [*again, f"external.network.instruction.source={other}"]))

    train.run(compose("train", [*common, f"model.init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'next'}"]))


@pytest.mark.slow
def test_demo_leaves_its_result_and_puts_the_last_one_aside(
    recordings: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = "callbacks.closed_loop.closed_loop"
    overrides = [
        *SMALL,
        recordings,
        f"run_dir={tmp_path / 'demo'}",
        "max_steps=3",
        f"{loop}.episodes=1",
        f"{loop}.processes=1",
    ]
    result = demo.run(compose("demo", [*overrides, f"{loop}.videos=0"]))
    stored = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert stored["success_rate"] == result["success_rate"]
    assert stored["episodes"] == 1
    assert stored["wall_s"] > 0
    assert "of 1 held-out episodes" in demo.report(result, tmp_path)
    assert "quantisation alone" in demo.report(result, tmp_path)
    assert "continued" not in demo.report(result, tmp_path)
    assert "minutes since it was continued" in demo.report({**result, "continued": True}, tmp_path)
    unseen = {name: value for name, value in result.items() if not name.startswith("val_")}
    assert "ended before its first validation" in demo.report(unseen, tmp_path)
    with caplog.at_level(logging.INFO):
        demo.run(compose("demo", [*overrides, f"{loop}.videos=0"]))
    assert len([folder for folder in tmp_path.iterdir() if folder.name.startswith("demo_")]) == 1


def test_the_demo_names_an_interpreter_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"success_rate": 1.0, "success_low": 0.9, "success_high": 1.0}
    result = {"task": "reach", "episodes": 1, "demos": 1, "wall_s": 1.0, "continued": False, **rates}
    for found in ("/elsewhere/python", None, sys.executable):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        named = re.findall(
            r"(\S+) -m (keygrip\.evaluate|keygrip\.train|tensorboard\.main) ", demo.report(result, tmp_path)
        )
        python = "python" if found == sys.executable else sys.executable
        assert [each for each, _ in named] == [python] * 3


def test_a_finished_demo_is_put_aside_before_hydra_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its log and its settings are moved with it; nothing is moved if no demo would run."""
    folder, chosen = tmp_path / "demo", [f"run_dir={tmp_path / 'demo'}"]
    (folder / "checkpoints").mkdir(parents=True)
    for file in ("demo.log", "checkpoints/last.ckpt"):
        (folder / file).write_text("earlier")
    (folder / "result.json").write_text('{"status": "running"}')
    demo._make_room(chosen)
    (folder / "result.json").write_text('{"success_rate": 0.5}')
    for refused in (["--help"], ["dry_run=true"], ["no_such_setting=1"]):
        demo._make_room([*chosen, *refused])
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    demo._make_room(chosen)
    aside, made = sorted(tmp_path.iterdir(), reverse=True)
    assert (aside.name[:5], made.name) == ("demo_", "demo")
    assert list(made.iterdir()) == []
    assert (aside / "demo.log").read_text() == "earlier"
    assert f"the earlier demo now lies in {aside}" in capsys.readouterr().err


def test_preparation_steps_record_examine_and_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "demos"
    recorded = prepare.run(
        compose(
            "prepare", ["step=record", f"root={root}", "demos=3", "task.name=reach", "image_size=64", "processes=1"]
        )
    )
    assert recorded["demos"] == 3
    assert len(list(root.glob("reach_*"))) == 3
    fitted = prepare.run(compose("prepare", ["step=rotation", f"data.root={root}"]))
    assert 0 < fitted["right"]["pc1_explained"] <= 1
    assert Path(fitted["folder"]).is_dir()
    examined = prepare.run(compose("prepare", ["step=doctor", f"root={root}", f"output={tmp_path / 'doctor'}"]))
    assert examined["errors"] == 0
    assert (tmp_path / "doctor" / "contact_sheet_over.png").is_file()
    imported = prepare.run(compose("prepare", ["step=import", f"source={root}", f"root={tmp_path / 'copy'}"]))
    assert imported["written"] == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dry_run=true", "for a dry run use `keygrip train experiment=demo dry_run=true`"),
        (
            "callbacks.closed_loop=null",
            "for training alone use `keygrip train experiment=demo callbacks.closed_loop=nul",
        ),
        ("data.root=demos", "for others use `keygrip train experiment=demo data.root=FOLDER`"),
        ("strategy=ddp_cpu", "asks for 2: leave it out, or use `keygrip train experiment=demo` with this strategy"),
        (
            "shift=left_right",
            r"these settings test 2 \(left, left_to_right\): set all but one to null, or use ",
        ),
        ("run_dir=null", "leave out run_dir=null, or give a folder"),
    ],
)
def test_a_demo_that_could_not_report_is_refused_before_it_trains(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        demo.run(compose("demo", [f"run_dir={tmp_path / 'run'}", override]))
    assert not (tmp_path / "run").exists()


def test_a_sweep_of_demos_is_refused_before_any_trains(cli: Callable[..., Any]) -> None:
    outcome = cli("-m", "seed=1,2", "hydra.sweep.dir=sweep", of="demo")
    assert outcome.code == 1
    jobs = json.loads(Path("sweep/summary.json").read_text())["jobs"]
    assert ["use `keygrip train -m experiment=demo ...`" in job["error"] for job in jobs] == [True, True]
