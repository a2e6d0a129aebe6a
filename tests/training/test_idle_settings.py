"""Settings that have no effect because of other settings are refused if they are given on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import keygrip
from keygrip.config import SettingError, compose, config_folder
from keygrip.training.idle_settings import refuse_idle, refuse_idle_ablation, unread
from keygrip.training.parts import READ_WHERE

VLM = ("model=foveated_vlm", "data=robot_tours")
DIT = ("model=patch_dit", "data=robot_images")
DIT_SOURCE = ("model=patch_dit_source", "data=image_shards")
VLA = ("model=geometry_vla", "data=yam_language")
STAGE = ("experiment=vlm_stage1",)
SMALL = ("experiment=vlm_robot_videos",)
BLIND = ("model=geometry_vla_no_injection", "data=yam_language")


@pytest.mark.parametrize(
    ("choices", "idle", "reader"),
    [
        ((), "model.network.look_size=32", "model.network.second_look=192"),
        ((), "model.network.look_backbone=own", "model.network.second_look=192"),
        ((), "model.network.coupling_rank=2", "model.network.coupling=bilinear"),
        ((), "model.decoder.candidates=9", "model.decoder.name=viterbi"),
        (("model.decoder.name=argmax",), "model.decoder.window=2", "model.decoder.name=viterbi"),
        (("optimizer.schedule=constant",), "optimizer.final_lr_share=0.1", "optimizer.schedule=cosine"),
        ((), "callbacks.checkpoint.mode=max", "callbacks.checkpoint.monitor=val/loss"),
        (("data.root=here", "data.camera=front"), "data.record.task.camera=wrist", "data.root=null"),
        (("data.root=here",), "data.record.demos=5", "data.root=null"),
        (("data.root=here", "closed_loop=yam"), "data.record.task.object=bar", "data.root=null"),
        (("closed_loop=yam",), "callbacks.closed_loop.closed_loop.control.ensemble_decay=1", ""),
        ((*VLM, "model.refinement=0"), "model.refinement_from=0.5", "model.refinement=1"),
        ((*VLM, "model.monitor_every_n_steps=0"), "model.monitor_from_step=5", "model.monitor_every_n_steps=10"),
        (
            (*VLM, "data.sources.tours.root=here"),
            "data.sources.tours.make.options.test=5",
            "data.sources.tours.root=null",
        ),
        (DIT, "model.init_from_min_share=0.9", "model.init_from=run"),
        (DIT, "model.init_from_renames=[[a,b]]", "model.init_from=run"),
        ((*DIT, "data.root=here"), "data.make.options.train=5", "data.root=null"),
        (DIT_SOURCE, "model.network.position_cells=64", "model.network.patch_positions=true"),
        (DIT_SOURCE, "model.network.position_cells=64", "model.network.latent_positions=frame"),
        (DIT_SOURCE, "model.network.position_cells=64", "model.network.rotary=true"),
        (("experiment=dit_few_steps",), "model.sampling.text_scale=4", "model.sampling.guidance=independent"),
        (VLA, "model.network.geom_qformer_heads=4", "model.network.geom_compression_type=qformer"),
        ((*VLA, "model.network.geom_inject_to_dit=false"), "model.network.geom_dit_tokens=4", ""),
        (VLA, "model.actions.osc_position_m=0.1", "model.actions.kind=osc"),
        (VLA, "model.actions.gripper=other", "model.actions.kind=joint"),
        ((*VLA, "model.network.pointing_cells=0"), "model.pointing_weight=1", "model.network.pointing_cells=2"),
        # a part of the configuration's root is read if an object that is built reads it
        (BLIND, "geometry.layers=4", "model.network.geom_inject_to_vlm=true"),
        (BLIND, "geometry=mapanything", "model.network.geom_inject_to_dit=true"),
        (BLIND, "backbone.width=48", "model.network.geom_inject_to_dit=true"),
        ((*VLA, "geometry.frozen=true"), "geometry.depth_weight=2", "geometry.frozen=false"),
        (
            (*VLA, "geometry=dino_multiview_pretrained"),
            "geometry.max_depth_m=1",
            "geometry=dino_multiview_continued",
        ),
        ((*VLA, "geometry.frozen=true"), "backbone.drop_path=0.1", "geometry.frozen=false"),
        (
            (*VLA, "geometry=dino_multiview_pretrained"),
            "backbone.gradient_checkpointing=true",
            "geometry=dino_multiview_continued",
        ),
        ((*VLA, "geometry=dino_multiview_no_depth"), "geometry.cells=4", "geometry.point_weight=0.1"),
        ((*VLA, "geometry=dino_multiview_no_depth"), "geometry.max_depth_m=3", "geometry.depth_weight=0.1"),
        ((*VLA, "model.init_from=run"), "geometry.init_from=other", "model.init_from=null"),
        (("backbone.trainable=frozen",), "backbone.drop_path=0.5", "backbone.trainable=2"),
        (
            ("backbone=dinov3_base", "backbone.trainable=frozen"),
            "backbone.gradient_checkpointing=true",
            "backbone.trainable=all",
        ),
        (("backbone=dinov3_large",), "backbone.gradient_checkpointing=true", "backbone.trainable=all"),
        # and a part that is read only where yet another setting requires it
        (
            (*VLA, "model.network.geom_dit_tokens=0"),
            "model.network.geom_compression_type=qformer",
            "model.network.geom_dit_tokens=4",
        ),
    ],
)
def test_an_idle_setting_is_refused_with_what_would_read_it(choices: tuple[str, ...], idle: str, reader: str) -> None:
    refuse_idle(compose("train", [*choices]), choices)
    refused = [*choices, idle]
    with pytest.raises(
        SettingError, match=rf"nothing in this run reads '{idle.lstrip('+').partition('=')[0]}'.* where"
    ):
        refuse_idle(compose("train", refused), refused)
    if reader:
        refuse_idle(compose("train", [*refused, reader]), [*refused, reader])


def test_settings_of_a_part_of_a_part_are_told_too() -> None:
    options = OmegaConf.to_container(compose("train", [*VLA, "model.init_from=runs/a"]).model, resolve=True)
    assert ("network", "geometry", "init_from") in unread(options)
    assert ("network", "geometry", "init_from") not in unread({**options, "init_from": None})
    assert unread({"network": options["network"]}) == set(), "of no class"
    network = {**options["network"], "geom_inject_to_dit": False, "geom_compression_type": "qformer"}
    assert {("geometry",), ("geom_compression_type",), ("geom_qformer_heads",)} <= unread(network), "by way of others"


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.root=here", "data.record.task.camera=wrist"),  # data.camera is set from it
        ("experiment=demo", "data.root=here"),  # data.record comes from the experiment, not from the user
        (
            *VLA,
            "model.network.geom_inject_to_dit=false",
            "model.network.geom_inject_to_vlm=true",
            "model.network.geom_dit_tokens=4",
        ),
        ("~model.decoder.window",),
        (*BLIND, "backbone.image_size=128", "vlm.width=256", "seed=3"),  # the images' size is also that of the data
        (*VLA, "geometry.layers=4", "backbone.width=48", "geometry=dino_multiview_pretrained"),
        ("experiment=depth_reader", "geometry.dim=64"),
        (*VLA, "geometry.frozen=true", "geometry.init_from=run", "geometry.cells=4"),  # of that run's head
    ],
)
def test_what_is_read_elsewhere_or_not_asked_for_passes(overrides: tuple[str, ...]) -> None:
    refuse_idle(compose("train", [*overrides]), overrides)


def test_the_python_call_refuses_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="read where second_look is set"):
        keygrip.train(["model.network.look_size=32"])
    assert list(tmp_path.iterdir()) == []


def test_conditions_name_settings_that_there_are() -> None:
    found = set()

    def walk(node: object) -> None:
        if isinstance(node, DictConfig):
            target = node.get("_target_")
            built = get_object(target) if isinstance(target, str) else None
            known = set(inspect.signature(built).parameters) if built is not None else set()
            for name, where in getattr(built, READ_WHERE, {}).items():
                found.add(f"{target}.{name}")
                assert {each.partition(".")[0] for each in (name, *where.settings)} <= known, (target, name)
            for key in node:
                walk(node._get_node(key))

    for file in (config_folder() / "model").glob("*.yaml"):
        walk(OmegaConf.load(file))
    for choices in ((), ("closed_loop=yam",), VLM, DIT, VLA):
        walk(compose("train", [*choices]))
    assert len(found) >= 25


@pytest.mark.parametrize(
    ("choices", "ablation", "idle"),
    [
        (("model=patch_dit_base", "data=image_shards"), "patch_dit/v_prediction", True),
        (("model=patch_dit_base", "data=image_shards"), "patch_dit/no_rotary", True),
        (DIT, "patch_dit/v_prediction", False),
        (DIT, "patch_dit/no_final_modulation", False),
        ((*DIT, "optimizer=adamw"), "patch_dit/no_rotary", False),
        (DIT, "patch_dit/none", False),  # it is meant to change nothing
        ((*DIT, "model.dropout.masked_patches=0.7"), "patch_dit/masked_patches", False),  # a different share
        ((*DIT, "model.dropout.masked_patches=0.3"), "patch_dit/masked_patches", True),
        ((*DIT, "model.guide.at_step=3"), "patch_dit/early_guide", False),  # only this ablation has that setting
        ((*DIT, "model.network.qk_norm=false"), "patch_dit/no_qk_norm", True),
        (STAGE, "foveated_vlm/shared_query_path", True),  # sets a missing multiplier to null
        (STAGE, "foveated_vlm/visual_first", True),
        (STAGE, "foveated_vlm/no_frame_numbers", True),
        (STAGE, "foveated_vlm/no_text", False),
        (STAGE, "foveated_vlm/random_encoder", False),
        (SMALL, "foveated_vlm/shared_query_path", False),
        (SMALL, "foveated_vlm/no_text", False),
        ((*SMALL, "data.sources.texts=null"), "foveated_vlm/no_text", True),  # sets a missing source to null
        (("experiment=demo",), "volume_query/own_look", True),  # sets what only a second look reads
        (("experiment=demo", "model.network.second_look=192"), "volume_query/own_look", False),
    ],
)
def test_an_ablation_that_changes_nothing_is_refused(choices: tuple[str, ...], ablation: str, idle: bool) -> None:
    overrides = [*choices, f"ablation={ablation}"]
    if not idle:
        refuse_idle_ablation(overrides)
        return
    with pytest.raises(SettingError, match=f"ablation={ablation} changes nothing here"):
        refuse_idle(compose("train", overrides), overrides)


def test_ablations_of_the_foveated_model_do_in_the_stages_what_they_name() -> None:
    """The text source has another name there, and the encoder's weights are pretrained."""
    sources = compose("train", [*STAGE, "ablation=foveated_vlm/no_text"]).data.sources
    assert [name for name, source in sources.items() if source is not None] == ["webvid"]
    encoder = compose("train", [*STAGE, "ablation=foveated_vlm/random_encoder"]).backbone
    assert (encoder.weights, encoder.init_from, encoder.trainable) == ("random", None, "all")
    rates = compose("train", [*STAGE, "ablation=foveated_vlm/trained_encoder"]).optimizer.lr_multipliers
    assert rates == {"backbone": 0.25, "language": 0.1, "query_path": None}


def test_jobs_of_a_sweep_are_warned_of_what_their_arm_does_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Arms of a comparison share their settings, and one of them may have no encoder."""
    overrides = [*BLIND, "geometry.dim=64"]
    cfg = compose("train", overrides)
    with pytest.raises(SettingError, match=r"nothing in this run reads 'geometry\.dim'"):
        refuse_idle(cfg, overrides)
    monkeypatch.setattr("keygrip.training.idle_settings.in_sweep", lambda: True)
    refuse_idle(cfg, overrides)
    assert "nothing in this job reads 'geometry.dim'" in caplog.text
    with pytest.raises(SettingError, match="geom_dit_tokens"):
        refuse_idle(cfg, [*BLIND, "model.network.geom_dit_tokens=64"])


def test_a_shift_whose_data_are_not_recorded_is_refused() -> None:
    """It would be trained on the data of the folder, and reported under the shift's name."""
    shifted = ["shift=demos_20", "closed_loop=yam"]
    refuse_idle(compose("train", shifted), shifted)
    foreign = [*shifted, "data.root=here"]
    with pytest.raises(SettingError, match=r"shift=demos_20 sets data\.record\.demos, .* read where root is null"):
        refuse_idle(compose("train", foreign), foreign)
    views = ["shift=views", "closed_loop=yam", "data.root=here"]  # differs only in what is tested
    refuse_idle(compose("train", views), views)


@pytest.mark.parametrize(
    ("choices", "option", "setting"),
    [
        (("experiment=vla_yam_depth",), "shift=demos_20", "data.record.demos=20"),
        (("experiment=vla_yam_language", "data=yam_language"), "shift=demos_50", "data.record.demos=50"),
        (("experiment=metaworld", "data.root=here"), "window=dense", "data.horizon=50"),
    ],
)
def test_a_shift_or_window_that_a_recipe_overrides_is_refused(
    choices: tuple[str, ...], option: str, setting: str
) -> None:
    """The run would be reported under its name, with the recipe's value."""
    overridden = [*choices, option]
    with pytest.raises(SettingError, match=rf"^{option} sets .* of this run sets it to \d+: add {setting}, or leave "):
        refuse_idle(compose("train", overridden), overridden)
    typed = [*overridden, setting]
    refuse_idle(compose("train", typed), typed)
    for passing in (["experiment=vla_yam_depth", "shift=flat"], ["experiment=demo", "window=dense"]):
        refuse_idle(compose("train", passing), passing)


def test_an_ablation_of_the_demo_is_compared_with_the_demo(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is another one than that of the train command, in which the ablation may change nothing."""

    def run(cfg: DictConfig) -> None:
        refuse_idle(cfg, HydraConfig.get().overrides.task)
        seen.append(cfg.model.network.state)

    seen: list[list[str]] = []
    monkeypatch.setattr("keygrip.demo.print_report", run)
    with pytest.raises(SettingError, match="changes nothing here"):
        refuse_idle_ablation(["ablation=volume_query/no_state"])
    outcome = cli("ablation=volume_query/no_state", of="demo")
    assert (outcome.code, seen) == (0, [[]]), outcome.err
