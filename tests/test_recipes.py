"""Every option of every group composes, fits the code and is read; every sweep builds job by job."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import assert_fits, assert_sound, composed, nodes
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from keygrip.config import TrainSchema, config_folder, group_options, leaves_of
from keygrip.setting_types import refuse_ill_typed
from keygrip.training.checkpoints import build_module
from keygrip.training.idle_settings import refuse_idle, refuse_idle_ablation
from keygrip.training.sweeps import planned_jobs
from keygrip.unread_settings import models_with

CONF = config_folder()
MODELS = group_options("model")
# The data that each model is tried with (the others: yam), and the model that each data set is tried with.
DATA_OF = {
    "foveated_vlm": "robot_videos",
    "pooled_vlm": "robot_videos",
    **dict.fromkeys(("vlm_encoder_self_supervised", "vlm_encoder_pretraining"), "robot_tours"),
    "depth_reader": "yam_stills",
    "geometry_vla": "yam_language",
    "geometry_vla_no_injection": "yam_depth",
    "image_autoencoder": "robot_images",
    "patch_dit": "robot_images",
    **dict.fromkeys(("patch_dit_base", "patch_dit_source"), "image_shards"),
}
MODEL_OF = {
    **dict.fromkeys(
        (
            "robot_videos",
            "robot_long_tours",
            "robot_lengths",
            "robot_tours_single_first",
            "webvid",
            "cauldron",
            "video_sft",
        ),
        "foveated_vlm",
    ),
    **{data: model for model, data in DATA_OF.items() if data != "robot_videos"},
}
# Settings that a config leaves to the user; the values are arbitrary.
GIVEN = {
    "experiment=yam_dinov3": ["data.root=folder"],
    "experiment=vlm_encoder_probe": ["backbone.init_from=null"],
    "experiment=metaworld": ["data.root=folder"],
    "experiment=metaworld_two_cameras": ["data.root=folder"],
    "experiment=metaworld_vla": ["data.root=folder"],
    **{
        f"experiment=vla_qwen_mapanything{kind}": ["data.root=folder", "data.cameras=[left,right]"]
        for kind in ("", "_lora", "_frozen")
    },
    "geometry=mapanything": ["data.image_size=224"],
    "geometry=mapanything_cached": ["data.image_size=224"],
    **{
        f"experiment={name}": ["model.init_from=folder"]
        for name in (
            *(
                f"vlm_stage{number}{kind}"
                for number in (2, 3)
                for kind in ("", "_best", "_published", "_360m", "_1700m", "_published_360m", "_published_1700m")
            ),
            *("vlm_long_videos", "vlm_pooled_long_videos"),
            *("dit_few_steps_128px", "dit_few_steps_latents_128px", "dit_few_steps_512px"),
        )
    },
}


# Options that differ only in their sizes from an option that is tried as well.
SIBLINGS = {
    *(
        f"experiment=vlm_stage{number}{kind}_{size}"
        for number in (1, 2, 3)
        for kind in ("", "_published")
        for size in ("360m", "1700m")
    ),
    *(f"backbone={name}" for name in ("dinov2_base", "dinov2_base_reg", "dinov3_base")),
    *("language=smollm2_360m", "language=smollm2_1700m"),
}


def without_stages(node: Any) -> Any:
    """Return a resolved configuration with null in place of each pretraining stage: nothing is trained here."""
    if isinstance(node, dict):
        stage = str(node.get("_target_", "")).endswith(".PretrainingStage")
        return None if stage else {name: without_stages(child) for name, child in node.items()}
    return [without_stages(child) for child in node] if isinstance(node, list) else node


def pair(model: str) -> list[str]:
    return [f"model={model}", f"data={DATA_OF.get(model, 'yam')}"]


def context(group: str, option: str) -> tuple[str, list[str]]:
    """Return a command and overrides with which an option can be chosen."""
    choice = f"{group}={option}"
    given = [choice, *GIVEN.get(choice, [])]
    if group in ("step", "evaluate"):
        return "prepare" if group == "step" else group, [choice]
    if group in ("robot", "motion_limits", "execution", "takeover"):
        return "run", [choice]
    if group == "env":
        return "evaluate", ["evaluate=policy", choice]
    if group == "data":
        return "train", [f"model={MODEL_OF.get(option, 'volume_query')}", *given]
    model = {"model": option, "optimizer": "geometry_vla", "ablation": option.partition("/")[0]}.get(group)
    if model is None and group not in TrainSchema.__dataclass_fields__ and models_with(group):
        model = "volume_query" if "volume_query" in models_with(group) else models_with(group)[-1]
    return "train", [*(pair(model) if model in MODELS else []), *given]


def choices() -> Iterator[Any]:
    """Yield the options of all groups, except those that the sweeps choose from, which are tried there."""
    swept = {override for sweep in group_options("sweep") for job in tried_jobs(sweep) for override in job}
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "sweep")):
        for option in group_options(group):
            if group not in ("ablation", "shift") or f"{group}={option}" not in swept:
                choice = f"{group}={option}"
                yield pytest.param(group, option, id=choice, marks=pytest.mark.slow if choice in SIBLINGS else ())


def tried_jobs(sweep: str) -> list[list[str]]:
    """Return jobs of a sweep in which every value of every parameter occurs; for a grid, not every combination."""
    config = OmegaConf.load(CONF / "sweep" / f"{sweep}.yaml")
    if "sweeper" not in config.hydra:  # another sweep's jobs
        return tried_jobs(config.defaults[0])
    params = config.hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{name}={value}" for name, value in params.items()])
    values = [
        list(each.sweep_string_iterator()) if each.is_sweep_override() else [str(each.value())] for each in parsed
    ]
    names = [str(name) for name in params]
    jobs = []
    for place, each in enumerate(values):
        for value in each[1 if place else 0 :]:
            chosen = [value if other == place else options[0] for other, options in enumerate(values)]
            jobs.append([f"{name}={value}" for name, value in zip(names, chosen, strict=True)])
    return jobs


def assert_configures(cfg: DictConfig) -> tuple[type, int]:
    """Assert that the module builds (a large one without memory for its weights), and that its optimizer has all
    trained parameters. Return the optimizer's class and the number of parameters."""
    large = (
        "dinov" in str(cfg.get("backbone"))
        or "Qwen/" in str(cfg.get("vlm"))
        or any(part.get("width", 0) > 512 for part in (cfg.get("language", {}).get("model", {}), cfg.model.network))
    )
    with open_dict(cfg):
        for pretrained in (cfg.get("backbone"), cfg.get("vlm"), (cfg.get("language") or {}).get("model")):
            if pretrained is not None:
                pretrained.weights = "random"
    model = without_stages(OmegaConf.to_container(cfg, resolve=True)["model"])  # type: ignore[index, call-overload]
    return configured_once("meta" if large else "cpu", json.dumps(model))


@cache
def configured_once(device: str, model: str) -> tuple[type, int]:
    """Build a model from its configuration, which many options leave as it is, and check its optimizer."""
    with torch.device(device):
        module = build_module({"model": json.loads(model)})
    module._trainer = SimpleNamespace(estimated_stepping_batches=1000)  # type: ignore[assignment]
    configured: Any = module.configure_optimizers()
    owned = [id(p) for group in configured["optimizer"].param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert configured["lr_scheduler"]["interval"] == "step"
    return type(configured["optimizer"]), sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("group", "option"), list(choices()))
def test_every_option(group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, overrides = context(group, option)
    cfg = composed(root, overrides)
    if root != "train":
        for path, node in nodes(OmegaConf.to_container(cfg, resolve=False)):
            assert_fits(path, node)
        if root != "prepare":  # its steps pass on settings that the user must give
            refuse_ill_typed(OmegaConf.to_container(cfg, resolve=True))
        return
    assert_sound(cfg)
    if group == "data":  # builds without touching the disk
        monkeypatch.chdir(tmp_path)
        instantiate(cfg.data, _convert_="all")
        assert list(tmp_path.iterdir()) == []
    if group == "callbacks":
        with open_dict(cfg):
            cfg.run_dir = str(tmp_path)
        for part in cfg.callbacks.values():
            instantiate(part, _convert_="all")
    if group in ("model", "backbone", "rotation", "optimizer", "experiment", "ablation", "language"):
        if option.endswith("lora"):
            pytest.importorskip("peft")
        if option.startswith("vla_qwen_mapanything"):  # its MapAnything reads its sizes from weights
            with open_dict(cfg):
                cfg.geometry = composed("train", pair("geometry_vla")).geometry
                cfg.backbone = composed("train", []).backbone
        assert_configures(cfg)


def test_low_rank_differences_start_from_a_run_with_autoguidance() -> None:
    """The guide does not have the differences: without the recipe's guide and its scale, the run can begin."""
    pytest.importorskip("peft")
    recipe = ["experiment=dit_robot_images_latents_128px", "ablation=patch_dit/lora", "model.init_from=folder"]
    cfg = composed("train", recipe)
    assert (cfg.model.guide, cfg.model.sampling.guide_scale) == (None, 0)
    assert_sound(cfg)
    assert_configures(cfg)


@pytest.mark.parametrize("recipe", ["metaworld_vla", "vla_yam_language", "vla_yam_depth"])
def test_recipes_of_the_small_encoder_take_the_large_one(recipe: str) -> None:
    """The settings that a recipe has for its own encoder are not required of another."""
    option = f"experiment={recipe}"
    cfg = composed("train", [option, *GIVEN.get(option, []), "geometry=mapanything", "backbone.image_size=224"])
    assert_sound(cfg)
    assert cfg.data.image_size == 224
    alone = composed("train", [*pair("geometry_vla"), "geometry=mapanything", *GIVEN["geometry=mapanything"]])
    assert dict(cfg.geometry, cameras=None) == dict(alone.geometry, cameras=None)


def test_make_metaworld_validates_its_last_step() -> None:
    steps = re.search(r"(?m)^STEPS \?= (\d+)$", (CONF.parent / "Makefile").read_text())
    assert steps is not None
    option = "experiment=metaworld_two_cameras"
    cfg = composed("train", [option, *GIVEN[option], f"max_steps={steps[1]}"])
    assert cfg.max_steps % cfg.val_every_n_steps == 0


@pytest.mark.parametrize("recipe", ["metaworld_vla", "vla_yam_language", "vla_yam_depth"])
def test_the_ablation_of_the_optimizer_changes_nothing_but_the_optimizer(recipe: str) -> None:
    option = f"experiment={recipe}"
    muon, adamw = (
        composed("train", [option, *GIVEN.get(option, []), *ablation]).optimizer
        for ablation in ([], ["ablation=geometry_vla/adamw"])
    )
    assert {name for name in adamw if adamw[name] != muon[name]} == {"_target_"}
    assert {str(name) for name in muon} - {str(name) for name in adamw} == {
        *("matrices_of", "momentum", "matrix_lr_multiplier", "iteration"),
    }


@pytest.mark.parametrize("option", ["experiment=vlm_stage1", "experiment=vlm_stage2_published"])
def test_a_stage_takes_a_frozen_encoder(option: str) -> None:
    """The recipe sets a learning rate for the encoder, which the user did not write."""
    overrides = [option, *GIVEN.get(option, []), "backbone.trainable=frozen"]
    cfg = composed("train", overrides)
    assert_sound(cfg)
    refuse_idle(cfg, overrides)
    assert_configures(cfg)


@pytest.mark.parametrize("kind", ["", "_lora", "_frozen"])
def test_recipes_for_own_cameras_cut_nothing_of_the_workspace_off(kind: str) -> None:
    option = f"experiment=vla_qwen_mapanything{kind}"
    data = composed("train", [option, *GIVEN[option]]).data
    assert (data.fit, data.field) == ("auto", 1.0)


def test_a_coarse_token_in_the_published_order_differs_from_chosen_ones_in_being_coarse_alone() -> None:
    """The arms of a claim must have no other difference: prompt order, query source and start are the same."""

    def of(job: str) -> dict[str, Any]:
        cfg = composed("train", ["experiment=vlm_robot_videos", f"ablation=vlm_claims/{job}"])
        return dict(leaves_of(OmegaConf.to_container(cfg, resolve=False), ()))

    chosen, coarse = of("published_order"), of("coarse_only_published")
    different = {".".join(path) for path in chosen.keys() | coarse.keys() if chosen.get(path) != coarse.get(path)}
    assert different == {"model.mode", "model.val_modes"}
    network = ("model", "network")
    order = coarse[("collator", "prompt_order")], coarse[(*network, "query_source")], coarse[(*network, "query_start")]
    assert order == ("visual_first", "fine", "random")


@pytest.mark.parametrize(
    ("job", "beside", "setting"),
    [
        ("shallow_query", "deep_query", "deep_query"),
        ("query_bias", "deep_query", "query_bias"),
        ("published_projections", "deep_query", "published_projections"),
        ("published_projections_bias", "published_projections", "query_bias"),
    ],
)
def test_claims_about_the_query_change_one_setting_each(job: str, beside: str, setting: str) -> None:
    def of(job: str) -> dict[str, Any]:
        cfg = composed("train", ["experiment=vlm_robot_videos_self_supervised", f"ablation=vlm_claims/{job}"])
        return dict(leaves_of(OmegaConf.to_container(cfg, resolve=False), ()))

    one, other = of(job), of(beside)
    different = {".".join(path) for path in one.keys() | other.keys() if one.get(path) != other.get(path)}
    assert different == {f"model.network.{setting}"}


def test_the_sweeps_of_claims_differ_in_their_encoder_alone() -> None:
    def of(*overrides: str) -> dict[str, Any]:
        cfg = composed("train", [*overrides, "ablation=vlm_claims/deep_query"], with_hydra=True)
        jobs = cfg.hydra.sweeper.params
        assert str(jobs.seed) == "0,1,2"
        return dict(leaves_of(OmegaConf.to_container(cfg.backbone.init_from, resolve=False), ()))

    alone = composed("train", ["experiment=vlm_robot_videos", "ablation=vlm_claims/deep_query"])
    own = dict(leaves_of(OmegaConf.to_container(alone.backbone.init_from, resolve=False), ()))
    assert of("sweep=vlm_claims_label_taught") == own
    asked = composed("train", ["experiment=vlm_robot_videos", "ablation=foveated_vlm/self_supervised_encoder"])
    unlabelled = dict(leaves_of(OmegaConf.to_container(asked.backbone.init_from, resolve=False), ()))
    assert of("sweep=vlm_claims") == unlabelled != own


def test_one_token_differs_from_many_in_how_a_frame_becomes_tokens_alone() -> None:
    """Both train on the same frozen encoder: neither has a trained copy of its blocks, and optimizer and data are the
    same."""

    def of(job: str) -> dict[str, Any]:
        cfg = composed("train", [f"experiment={job}", "ablation=foveated_vlm/self_supervised_encoder"])
        return dict(leaves_of(OmegaConf.to_container(cfg, resolve=False), ()))

    one, many = of("vlm_tokens_1"), of("vlm_tokens_4")
    different = {".".join(path) for path in one.keys() | many.keys() if one.get(path) != many.get(path)}
    own = {f"optimizer.lr_multipliers.{name}" for name in ("first_query", "static_query", "query_path")}
    own |= {"model.coarse_share", "model.coarse_kinds"}  # many tokens have no coarse pass to train
    logged = {"model.monitor_every_n_steps", "model.monitor_from_step"}
    unused = {"model.refinement_from"}  # refinement is 0
    different -= own | logged | unused | {"model.mode", "collator.tokens_per_frame"}
    assert {path.rpartition(".")[0] for path in different} == {"model.network"}
    assert one[("model", "network", "query_path")] == "shared"
    for left, right in ((4, 16), (4, 64)):
        few, more = of(f"vlm_tokens_{left}"), of(f"vlm_tokens_{right}")
        changed = {path for path in few.keys() | more.keys() if few.get(path) != more.get(path)}
        assert changed == {("model", "network", "tokens_per_frame")}


def test_the_jobs_of_the_scaling_sweep_have_batches_of_one_size() -> None:
    """Jobs with fewer frames would otherwise have larger batches and fewer steps."""
    batches = set()
    for job in tried_jobs("vlm_scaling"):
        cfg = composed("train", ["sweep=vlm_scaling", *job])
        data, frames = cfg.data, cfg.data.max_frames
        longest_row = frames * cfg.collator.tokens_per_frame + cfg.collator.max_tokens
        batches.add(min(data.batch_size, data.budget.frames // frames, data.budget.positions // longest_row))
    assert batches == {24}


def test_stages_whose_batches_differ_are_validated_on_all_held_out_samples() -> None:
    """A number of batches would hold other samples with another budget, number of frames or number of processes."""
    names = [name for name in group_options("experiment") if name.startswith("vlm_stage")]
    assert len(names) > 15
    options = [[f"experiment={name}", *GIVEN.get(f"experiment={name}", [])] for name in names]
    for overrides in [*options, ["sweep=vlm_scaling"]]:
        cfg = composed("train", overrides)
        assert cfg.data.budget is not None
        assert cfg.data.max_val_samples == 10_000
        assert cfg.limit_val_batches is None, overrides


def test_stages_tell_the_model_the_times_of_frames_and_pack_questions_and_published_ones_are_as_published() -> None:
    for name in [f"vlm_stage{number}{kind}" for number in (1, 2, 3) for kind in ("", "_published")]:
        cfg = composed("train", [f"experiment={name}", *GIVEN.get(f"experiment={name}", [])])
        network, stage, published = cfg.model.network, int(name[len("vlm_stage")]), "published" in name
        assert network.frame_clock == (False if published else "seconds"), name
        assert network.visual_scale == (0.14 if published else None), name
        assert network.pack_rows == cfg.collator.pack_rows == (stage > 1), name
        assert cfg.collator.max_tokens == (1024 if published and stage > 1 else 512), name
        assert not cfg.collator.timestamps, name  # the clock says the times; words would cost positions


MANY_JOBS = (  # 3 s or more
    *("geometry_comparison", "vlm_ablations", "vlm_claims", "vlm_claims_label_taught", "vlm_token_counts"),
    *("vla_ablations", "shifts", "volume_query_options", "dit_ablations", "geometry_compression", "vlm_scaling"),
    "dit_claims",
)


@pytest.mark.parametrize(
    "sweep",
    [pytest.param(name, marks=pytest.mark.slow if name in MANY_JOBS else ()) for name in group_options("sweep")],
)
def test_every_job_of_a_sweep(sweep: str) -> None:
    cfg = composed("train", [f"sweep={sweep}"], with_hydra=True)
    assert str(cfg.hydra.mode) in ("MULTIRUN", "RunMode.MULTIRUN")
    jobs = planned_jobs(cfg)
    assert len(jobs) > 1
    assert len({tuple(sorted(job)) for job in jobs}) == len(jobs)
    if sweep == "geometry_compression":
        kinds = [f"{kind}_{tokens}" for kind in ("pool", "per_layer", "qformer") for tokens in (4, 16, 64)]
        assert [job[0] for job in jobs] == [f"ablation=geometry_vla/{kind}" for kind in ("no_injection", *kinds)]
    optimizers, sizes, networks = {}, {}, {}
    for job in jobs if sweep == "vlm_learning_rates" else tried_jobs(sweep):
        assert any(set(job) <= set(planned) for planned in jobs)
        refuse_idle_ablation([f"sweep={sweep}", *job])
        cfg = composed("train", [f"sweep={sweep}", *job])
        assert_sound(cfg)
        assert all("_target_" in part for part in cfg.callbacks.values() if part is not None)
        name = job[0].rpartition("/")[2]
        networks[name] = cfg.model.network
        optimizer, sizes[name] = assert_configures(cfg)
        optimizers[name] = optimizer.__name__
    if sweep == "geometry_comparison":
        assert len(sizes) == 30
        middle = sizes["arm_both"]
        assert all(abs(size / middle - 1) <= 0.05 for size in sizes.values()), sizes
    if sweep == "geometry_compression":
        assert not networks.pop("no_injection").geom_inject_to_dit
        for name, network in networks.items():
            assert network.geom_inject_to_dit
            assert name == f"{network.geom_compression_type}_{network.geom_dit_tokens}"
    if sweep == "vla_comparison":
        assert optimizers == {
            "volume_query": "AdamW",
            "coordinate_regression": "AdamW",
            "no_injection": "MuonWithAdamW",
            "geometry_vla": "MuonWithAdamW",
        }


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_every_launcher_composes(option: str) -> None:
    cfg = composed("train", [f"hydra/launcher={option}"], with_hydra=True)
    assert_fits(option, OmegaConf.to_container(cfg.hydra.launcher, resolve=False))  # type: ignore[arg-type]


def test_the_recipe_for_real_robots_trains_no_steps_past_a_demonstrations_end() -> None:
    cfg = composed("train", ["experiment=yam_dinov3", *GIVEN["experiment=yam_dinov3"]])
    assert cfg.data.horizon * cfg.data.frame_stride == 150, "frames, of demonstrations of some hundred"
    assert cfg.model.mask_padded_steps is True
    assert composed("train", ["model=volume_query"]).model.mask_padded_steps is False, "the design's"
