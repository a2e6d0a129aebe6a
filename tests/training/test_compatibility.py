"""Pairs of model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from keygrip import train
from keygrip.config import compose
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.training.checkpoints import build_module
from keygrip.training.compatibility import (
    batch_type,
    data_sets_of,
    no_validation,
    refuse_missing_weights,
    refuse_uneven_batch,
    refuse_unfit,
)
from keygrip.training.pretraining import PretrainingStage, with_run_folders


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("volume_query", "webvid", r"VolumeQueryModule learns from PolicyBatch and VideoTexts gives Video.*data=yam"),
        ("volume_query", "robot_images", r"choose .*data=yam"),
        ("foveated_vlm", "yam", r"choose .*data=robot_videos"),
        ("foveated_vlm", "image_shards", r"choose .*data=robot_videos"),
        ("patch_dit", "yam", r"choose .*data=robot_images"),
        ("geometry_vla", "yam", r"choose .*data=yam_language"),
    ],
)
def test_systems_do_not_take_each_others_data(model: str, data: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_unfit(compose("train", [f"model={model}", f"data={data}"]))


@pytest.mark.parametrize(
    "choices",
    [
        ["experiment=vlm_robot_videos", "backbone=dinov2_small"],
        ["experiment=vlm_stage1", "ablation=foveated_vlm/self_supervised_encoder"],
    ],
)
def test_two_sources_of_an_encoders_weights_are_refused_before_a_stage_is_trained(choices: list[str]) -> None:
    with pytest.raises(ValueError, match=r"backbone\.init_from and backbone\.weights=pretrained both give"):
        refuse_unfit(compose("train", choices))
    refuse_unfit(compose("train", [*choices, "backbone.weights=random"]))
    refuse_unfit(compose("train", [*choices, "backbone.init_from=null"]))


@pytest.mark.parametrize(
    ("choices", "said", "without"),
    [
        (["backbone=dinov3_small"], "weights=pretrained", "weights=random"),
        (["backbone.init_from=RUN"], "init_from", "init_from=null"),
        (["backbone=dinov3_small", "geometry.init_from=RUN"], "weights=pretrained", "weights=random"),
    ],
)
def test_a_depth_reader_beside_other_weights_of_its_backbone_is_refused_before_it_is_trained(
    choices: list[str], said: str, without: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PretrainingStage, "complete", lambda self: pytest.fail("it began"))
    overrides = ["experiment=vla_yam_language", *choices]
    with pytest.raises(ValueError, match=rf"geometry\.init_from and backbone\.{said} .*: set backbone\.{without}, or"):
        train.run(compose("train", [*overrides, f"run_dir={tmp_path / 'run'}"]))
    refuse_unfit(compose("train", [*overrides, f"backbone.{without}"]))
    refuse_unfit(compose("train", [*overrides, "geometry=dino_multiview", "geometry.init_from=null"]))


def test_depth_that_is_learned_and_not_read_is_refused_before_a_stage_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PretrainingStage, "complete", lambda self: pytest.fail("it began"))
    overrides = ["experiment=vla_yam_language", "data.depth=false", f"run_dir={tmp_path / 'run'}"]
    said = r"^data\.depth=false, but the geometry encoder learns from depth: .*geometry=dino_multiview_no_depth"
    with pytest.raises(ValueError, match=said):
        train.run(compose("train", overrides))
    for fitting in ("geometry=dino_multiview_pretrained", "ablation=geometry_vla/no_injection"):
        refuse_unfit(compose("train", [*overrides, fitting]))
    cfg = compose("train", [*overrides, "geometry=dino_multiview_no_depth"])
    refuse_unfit(cfg)
    module: Any = build_module(with_run_folders(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]
    module.network.geometry.take_start()  # there is no run with other sizes to start from
    assert not module.learns_depth


def test_a_start_that_is_not_there_is_refused_before_a_stage_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainingStage, "complete", lambda self: pytest.fail("it began"))
    gone = [f"model.init_from={tmp_path / 'gone'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(FileNotFoundError, match=r"geometry\.init_from=gone: there is no run folder"):
        refuse_missing_weights({"geometry": {"init_from": "gone"}, "model": {"init_from": None}})
    with pytest.raises(FileNotFoundError, match=r"model\.init_from=.*gone: there is no run folder"):
        train.run(compose("train", ["experiment=vlm_robot_videos", *gone]))


def test_a_mistyped_kind_of_weights_is_no_second_source() -> None:
    refuse_unfit(compose("train", ["experiment=vlm_robot_videos", "backbone.weights=pretraned"]))


def test_the_choices_named_are_those_that_pass() -> None:
    named = data_sets_of(batch_type(compose("train", ["model=foveated_vlm"]).model))  # type: ignore[arg-type]
    assert set(named) == {
        "robot_videos",
        "robot_tours",
        "robot_tours_single_first",
        "robot_long_tours",
        "robot_lengths",
        "webvid",
        "cauldron",
        "video_sft",
    }
    for name in named:
        refuse_unfit(compose("train", ["model=foveated_vlm", f"data={name}"]))


@pytest.mark.parametrize("never", ["limit_val_batches=0", "val_every_n_steps=1000"])
def test_settings_that_leave_no_validation_are_said(never: str) -> None:
    settings = ["max_steps=9", "val_every_n_steps=3"]
    assert not no_validation(compose("train", settings))
    assert no_validation(compose("train", [*settings, never])).startswith(never)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_batch_that_the_processes_cannot_share_is_refused_before_data_are_recorded(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr("keygrip.training.fit.complete_stages", lambda *_, **__: begun.append("stages"))
    monkeypatch.setattr(RobotDemos, "prepare_data", lambda self: begun.append("data"))
    settings = ["data=yam", "data.batch_size=8", "strategy=ddp_cpu", "strategy.devices=3", f"dry_run={dry_run}"]
    with pytest.raises(ValueError, match=r"data\.batch_size=8 is the global batch and .* the 3 processes; 6 would"):
        train.run(compose("train", [*settings, f"run_dir={tmp_path / 'run'}"]))
    assert begun == []


def test_batches_of_a_budget_and_of_other_data_modules_need_not_divide() -> None:
    budgeted = compose("train", ["model=foveated_vlm", "data=webvid"])
    assert budgeted.data.budget is not None
    refuse_uneven_batch(budgeted.data, 3)
    budgeted.data.budget = None
    with pytest.raises(ValueError, match=r"data\.batch_size=64 .* must divide by the 3 processes; 63 would"):
        refuse_uneven_batch(budgeted.data, 3)
    refuse_uneven_batch({"_target_": "toy_parts.ToyData", "batch_size": 5}, 2)
