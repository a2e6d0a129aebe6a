"""Every config composes, fits the code it names and builds: models with their optimiser, sweeps with their jobs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from keygrip.config import config_folder, known_keys, nearest
from keygrip.training.checkpoints import build_module
from keygrip.training.run_folder import register_resolvers
from keygrip.training.sweeps import planned_jobs

CONF = config_folder()
STARTED = ("vlm_stage2", "vlm_stage3", "vlm_long_videos", "vlm_pooled_long_videos")  # from a run before
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
# What a config leaves to the user; the values stand for any.
GIVEN = {
    "experiment=yam_dinov3": ["data.root=folder"],
    "prepare": ["step=record"],
    **{
        f"data={name}": ["model=foveated_vlm"]
        for name in ("robot_videos", "robot_tours", "robot_long_tours", "webvid", "cauldron", "video_sft")
    },
    **{f"optimizer={name}": ["model=foveated_vlm", "data=robot_videos"] for name in ("vlm", "vlm_from_scratch")},
    **{
        f"ablation={path.stem}": ["model=foveated_vlm", "data=robot_videos"]
        for path in (CONF / "ablation").glob("vlm_*.yaml")
    },
    **{
        f"ablation={path.stem}": ["model=patch_dit", "data=robot_images"]
        for path in (CONF / "ablation").glob("dit_*.yaml")
    },
    **{
        f"optimizer={path.stem}": ["model=patch_dit", "data=robot_images"]
        for path in (CONF / "optimizer").glob("dit*.yaml")
    },
    **{f"experiment={name}": ["model.start_from=folder"] for name in STARTED},
    **{
        f"ablation={path.stem}": ["model=geometry_vla", "data=yam_language"]
        for path in (CONF / "ablation").glob("vla_*.yaml")
    },
    **{f"ablation=vla_{policy}": ["data=yam_language"] for policy in ("volume_query", "coordinate_regression")},
    **{f"optimizer={name}": ["model=geometry_vla", "data=yam_language"] for name in ("vla", "vla_from_scratch")},
    # MapAnything reads its sizes from its weights, which are not there.
    "experiment=vla_qwen_mapanything": ["data.root=folder", "geometry=dino_multiview"],
}


def composed(root: str, overrides: list[str], with_hydra: bool = False) -> DictConfig:
    import importlib

    importlib.import_module(f"keygrip.{root}")  # registers its schema
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, overrides=overrides, return_hydra_config=with_hydra)


@pytest.mark.parametrize("root", ROOTS)
def test_no_setting_of_a_root_has_the_name_of_a_group(root: str) -> None:
    """Hydra takes `name=value` for the choice of a config then, and refuses a value that is none."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    plain = yaml.safe_load((CONF / f"{root}.yaml").read_text()) or {}
    assert not (set(plain) - {"hydra"}) & groups


def groups_of(root: str) -> set[str]:
    """Groups that the defaults list of a root config names."""
    defaults = yaml.safe_load((CONF / f"{root}.yaml").read_text()).get("defaults", [])
    names = {next(iter(entry)) for entry in defaults if isinstance(entry, dict)}
    return {name.removeprefix("override ").removeprefix("/").partition("@")[0] for name in names}


def choices() -> Iterator[Any]:
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        for option in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
            yield pytest.param(group, option, id=f"{group}={option}")


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``_target_``, with its place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from nodes(child, f"{path}.{name}" if path else str(name))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from nodes(child, f"{path}[{number}]")


def assert_fits(path: str, node: dict[str, Any]) -> None:
    """The keys of a config node are parameters of what it builds, and all that are needed are there."""
    target = get_object(node["_target_"])
    signature = inspect.signature(target)
    given = {key: value for key, value in node.items() if not (key.startswith("_") and key.endswith("_"))}
    if node["_target_"].startswith("keygrip."):
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{path}: {node['_target_']} takes **kwargs"
    if node.get("_partial_"):
        signature.bind_partial(**given)
    else:
        signature.bind(**given)


@pytest.mark.parametrize("root", ROOTS)
def test_root_config_composes_and_fits_the_code(root: str) -> None:
    cfg = composed(root, GIVEN.get(root, []))
    for path, node in nodes(OmegaConf.to_container(cfg, resolve=False)):
        assert_fits(path, node)


@pytest.mark.parametrize(("group", "option"), list(choices()))
def test_every_option_composes_and_fits_the_code(group: str, option: str) -> None:
    roots = [root for root in ROOTS if group in groups_of(root)]
    assert roots, f"no root config names the group {group}"
    for root in roots:
        choice = f"{group}={option}"
        given = [] if group == "step" else GIVEN.get(root, [])
        cfg = composed(root, [choice, *given, *GIVEN.get(choice, [])])
        for path, node in nodes(OmegaConf.to_container(cfg, resolve=False)):
            assert_fits(path, node)


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_every_launcher_composes(option: str) -> None:
    cfg = composed("train", [f"hydra/launcher={option}"], with_hydra=True)
    assert_fits(option, OmegaConf.to_container(cfg.hydra.launcher, resolve=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_job_of_a_sweep_composes(option: str) -> None:
    cfg = composed("train", [f"sweep={option}"], with_hydra=True)
    assert str(cfg.hydra.mode) in ("MULTIRUN", "RunMode.MULTIRUN")
    jobs = planned_jobs(cfg)
    assert len(jobs) > 1
    assert len({tuple(sorted(job)) for job in jobs}) == len(jobs)
    for job in jobs:
        composed("train", job)


def training_options() -> Iterator[Any]:
    for group in ("model", "backbone", "rotation", "optimizer", "experiment", "ablation"):
        for path in sorted((CONF / group).glob("*.yaml")):
            yield pytest.param(f"{group}={path.stem}", id=f"{group}={path.stem}")


@pytest.mark.parametrize("choice", list(training_options()))
def test_every_model_builds_and_configures_its_optimiser(choice: str) -> None:
    # Large backbones at a depth and size that build in a second; their own tests build them whole.
    cfg = composed("train", [choice, *GIVEN.get(choice, []), "backbone.weights=random"])
    resolved = OmegaConf.to_container(cfg, resolve=True)
    large = "dinov" in str(cfg.backbone.variant) or cfg.vlm.width > 1024
    with torch.device("meta") if large else torch.device("cpu"):
        module = build_module(resolved, random_backbone=True)  # type: ignore[arg-type]
    module._trainer = SimpleNamespace(estimated_stepping_batches=1000)  # type: ignore[assignment]
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = [id(p) for p in module.parameters() if p.requires_grad]
    assert sorted(owned) == sorted(trainable)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_compared_policies_have_optimizers_that_fit_them() -> None:
    kinds = set()
    for job in planned_jobs(composed("train", ["sweep=vla_comparison"], with_hydra=True)):
        module = build_module(OmegaConf.to_container(composed("train", job), resolve=True), random_backbone=True)  # type: ignore[arg-type]
        module._trainer = SimpleNamespace(estimated_stepping_batches=1000)  # type: ignore[assignment]
        kinds.add((type(module).__name__, type(module.configure_optimizers()["optimizer"]).__name__))
    assert kinds == {
        ("VolumeQueryModule", "AdamW"),
        ("CoordinateRegressionModule", "AdamW"),
        ("GeometryVLAModule", "MuonWithAdamW"),
    }


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_data_module_builds_without_touching_the_disk(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    instantiate(composed("train", [f"data={option}", *GIVEN.get(f"data={option}", [])]).data, _convert_="all")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "callbacks").glob("*.yaml")))
def test_callbacks_build(option: str, tmp_path: Path) -> None:
    cfg = composed("train", [f"callbacks={option}", f"run_dir={tmp_path}"])
    for part in cfg.callbacks.values():
        instantiate(part, _convert_="all")


def test_every_default_has_a_reason_beside_it_or_says_it_with_its_name() -> None:
    """Config files are explained: each has at least a comment."""
    bare = [str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml") if "#" not in path.read_text()]
    assert set(bare) <= {"logger/tensorboard.yaml", "logger/csv.yaml", "hydra/hydra_logging/keygrip.yaml"}


def test_nearest_key() -> None:
    keys = known_keys("train")
    assert nearest("max_step", keys) == "max_steps"
    assert nearest("optimiser.lr", keys) == "optimizer.lr"
    assert nearest("batchsize", keys) == "data.batch_size"
    assert nearest("zzzzzz", keys) is None
