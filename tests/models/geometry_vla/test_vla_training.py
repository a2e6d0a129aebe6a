"""From demonstrations to plans: train with the command, resume in mid-epoch, load, plan; and that it learns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from policy_batches import trained_in_pieces, validated_in_pieces
from vla_parts import (
    CAMERAS,
    INSTRUCTIONS,
    ready_module,
    small_batch,
    small_geometry,
    small_module,
    small_statistics,
    small_vlm,
    write_demos,
)

from keygrip import load_policy, train
from keygrip.config import compose
from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.data.robot.native import read_native
from keygrip.data.robot.split import split_demos
from keygrip.models.geometry_vla.actions import LEAST_RANGE
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.geometry_vla.network import ActionSampling, Scene
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy
from keygrip.models.nn.flow_matching import BetaTimesteps
from keygrip.training import memory
from keygrip.training.checkpoints import Header, build_module, load_module, read_checkpoint
from keygrip.training.optimizers import AdamW
from keygrip.training.saving import AtomicCheckpointIO

SMALL = [
    "model=geometry_vla",
    "data=yam_language",
    "data.targets=commanded",
    "data.horizon=4",
    "data.frame_stride=1",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.val_fraction=0.3",
    "backbone.image_size=32",
    "backbone.width=16",
    "backbone.depth=1",
    "backbone.heads=2",
    "vlm.layers=2",
    "vlm.width=32",
    "vlm.heads=2",
    "vlm.kv_heads=1",
    "vlm.mlp_width=48",
    "vlm.rope_sections=[2,3,3]",
    "vlm.vision.layers=1",
    "vlm.vision.width=16",
    "vlm.vision.heads=2",
    "vlm.vision.mlp_width=24",
    "vlm.vision.patch_size=8",
    "vlm.vision.window=32",
    "vlm.vision.full_attention=[0]",
    "geometry.dim=16",
    "geometry.heads=2",
    "model.network.blocks=2",
    "model.network.head_size=16",
    "model.network.geom_dit_tokens=4",
    "model.draws=2",
    "strategy=cpu",
    "strategy.precision=32-true",
    "logger=none",
    "val_every_n_steps=3",
    "limit_val_batches=1",
    "log_every_n_steps=1",
    "max_steps=5",
]


OBSERVATION: dict[str, Any] = {
    "cameras": {
        name: {
            "image": np.full((40, 40, 3), 90, dtype=np.uint8),
            "intrinsics": np.array([[40.0, 0, 20], [0, 40.0, 20], [0, 0, 1]]),
            "world_to_camera": np.eye(4),
        }
        for name in CAMERAS
    },
    "instruction": INSTRUCTIONS[0],
    "position": np.array([0.2, 0.0, 0.1]),
    "quaternion": np.array([0.0, 1.0, 0.0, 0.0]),
    "gripper": 1.0,
}


@pytest.fixture
def overrides(tmp_path: Path) -> Callable[..., list[str]]:
    root = write_demos(tmp_path / "demos")

    def make(name: str, *more: str) -> list[str]:
        return [*SMALL, f"data.root={root}", f"run_dir={tmp_path / name}", *more]

    return make


@pytest.mark.slow
def test_train_resume_load_and_plan(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    metrics = train.run(compose("train", overrides("whole")))
    for name in ("train/loss", "val/position_cm", "val/point_cm", "val/geometry_share", "parameters/compressor_m"):
        assert np.isfinite(metrics[name]), name
    train.run(compose("train", overrides("parts", "max_steps=2", "optimizer.schedule=constant")))
    train.run(compose("train", overrides("parts", "resume=true", "optimizer.schedule=constant")))
    train.run(compose("train", overrides("straight", "optimizer.schedule=constant")))
    resumed, straight = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("parts", "straight"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)

    # The checkpoint contains the tokenizer, the statistics and the cameras; the demonstrations may be gone.
    loaded = load_module(tmp_path / "whole", expected=GeometryVLAModule)
    assert isinstance(loaded, GeometryVLAModule)
    assert loaded.views == CAMERAS
    plan = loaded.policy().plan(OBSERVATION)
    assert plan.position.shape == (1, 4, 3)
    assert np.isfinite(plan.position).all()
    assert loaded.evaluation_kind == "policy"


RECORDS_DTYPES = """
import os

import torch

from keygrip import train
from keygrip.models.geometry_vla import network

build = network.GeometryVLA.__init__


def build_with_records(self, *arguments, **named):
    build(self, *arguments, **named)
    parts = {"head": (*self.head.blocks, *self.head.mixers, self.head.decode), "compressor": (self.compressor,)}
    parts["language"] = (self.vlm.model.language_model.layers[0].mlp.down_proj,)
    for name, modules in parts.items():
        for module in modules:
            module.register_forward_hook(lambda _, __, out, name=name: record(name, out))


def record(name, out):
    out = out[0] if isinstance(out, (tuple, list)) else out
    with open(f"dtypes_{os.environ.get('LOCAL_RANK', '0')}", "a") as file:
        file.write(f"{name} {out.dtype}\\n")


network.GeometryVLA.__init__ = build_with_records
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.slow
def test_two_processes_of_each_kind_train_the_same_weights_in_bf16_with_a_head_in_float32(
    overrides: Callable[..., list[str]], command: Callable[..., Any], tmp_path: Path
) -> None:
    """DDP ends with an error in the second step if a trained parameter has had no gradient. Compared with each other,
    because noise depends on the number of processes."""
    (tmp_path / "records_dtypes.py").write_text(RECORDS_DTYPES)
    sizes = ("max_steps=3", "val_every_n_steps=3", "optimizer.lr=1e-3", "optimizer.schedule=constant")
    two_processes = ("strategy.accelerator=cpu", "strategy.devices=2", "strategy.precision=bf16-mixed")
    for kind in ("ddp", "fsdp"):
        settings = [each for each in overrides(kind, *sizes) if not each.startswith("strategy")]
        done = command("records_dtypes", *settings, f"strategy={kind}", *two_processes)
        assert done.returncode == 0, done.stderr
        for rank in range(2):
            file = tmp_path / f"dtypes_{rank}"
            assert set(file.read_text().splitlines()) == {
                *("head torch.float32", "compressor torch.float32", "language torch.bfloat16"),
            }, kind
            file.unlink()
    copied, divided = (read_checkpoint(tmp_path / kind) for kind in ("ddp", "fsdp"))
    assert copied["global_step"] == divided["global_step"] == 3
    assert copied["state_dict"].keys() == divided["state_dict"].keys()
    for name, value in copied["state_dict"].items():
        # Other gradients move a weight by up to 1e-3 in each step. Single elements may differ by that, too, where Adam
        # divides a gradient near 0, which bf16 rounds, by itself.
        assert (divided["state_dict"][name].float() - value.float()).abs().mean() < 2e-4, name


def test_accumulated_batches_have_the_gradient_of_one_large_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without losses on depth and maps, as in the recipes that accumulate, and with the same noise in both."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(BetaTimesteps, "__call__", lambda self, count, device: torch.full((count,), 0.5, device=device))
    module = ready_module(tmp_path, geometry=small_geometry(point_weight=0.0, depth_weight=0.0))
    assert not module.learns_depth
    data = small_batch(2 * INSTRUCTIONS)
    data.action_is_pad[0, :, 1:] = True
    data.action_is_pad[3, :, 2:] = True
    whole, (all_together,) = trained_in_pieces(module, data, [slice(4)])
    parts, logged = trained_in_pieces(module, data, [slice(at, at + 1) for at in range(4)])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    mean = sum(each["total"] * count for each, count in zip(logged, (1, 4, 4, 2), strict=True)) / 11
    assert mean == pytest.approx(all_together["total"], rel=1e-5)


def with_mapanything(overrides: list[str], weights: Path, *more: str) -> list[str]:
    """The same settings as the recipe of the real size: MapAnything, no pointing, no depth."""
    plain = [each for each in overrides if not each.startswith(("backbone.", "geometry."))]
    sizes = ("data.image_size=32", "geometry.image_size=32", "data.depth=false", "data.verify=false", "max_steps=2")
    off = [f"model.network.{name}" for name in ("pointing_cells=0", "pointing_keyframe=false", "pointed_tokens=false")]
    return [*plain, "geometry=mapanything", f"geometry.weights={weights}", *sizes, *off, *more]


@pytest.fixture
def without_mapanything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mapanything", "mapanything.models"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_baseline_without_geometry_is_built_and_loaded_without_mapanything(
    without_mapanything: None, tmp_path: Path
) -> None:
    """The settings of the run name MapAnything, and so do checkpoints written where it was installed."""
    weights, blind = tmp_path / "nowhere", "model.network.geom_inject_to_dit=false"
    given = [*SMALL, "data.root=demos", "data.cameras=[over,front]"]
    config: Any = OmegaConf.to_container(compose("train", with_mapanything(given, weights, blind)), resolve=True)
    built: Any = build_module(config)
    assert (built.network.geometry, built.network.compressor, built.own_files) == (None, None, {})
    built.set_statistics(small_statistics(tmp_path))
    assert config["model"]["network"]["geometry"]["weights"] == str(weights), "as in checkpoints from before"
    content = {"keygrip": Header(config, {}).of(built), "global_step": 0, "state_dict": built.state_dict()}
    built.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    files = {"network.geometry.weights": str(weights)}  # had to be named before
    for external in ({}, files):
        loaded: Any = load_module(tmp_path / "last.ckpt", expected=GeometryVLAModule, external=external)
        assert loaded.network.geometry is None
        assert np.isfinite(loaded.policy().plan(OBSERVATION).position).all()
    with pytest.raises(ValueError, match=r"external: network\.vlm\.file is no setting of this checkpoint"):
        load_module(tmp_path / "last.ckpt", external={"network.vlm.file": "x"})
    config["model"]["network"]["geom_inject_to_dit"] = True
    with pytest.raises(InstantiationException, match="geometry=mapanything needs the package"):
        build_module(config)


@pytest.mark.slow
def test_a_baseline_without_geometry_is_trained_and_resumed_without_mapanything(
    overrides: Callable[..., list[str]], without_mapanything: None, tmp_path: Path
) -> None:
    blind = ("model.network.geom_inject_to_dit=false", "optimizer.schedule=constant")

    def settings(name: str, *more: str) -> list[str]:
        return with_mapanything(overrides(name), tmp_path / "nowhere", *blind, *more)

    train.run(compose("train", settings("whole")))
    train.run(compose("train", settings("parts", "max_steps=1")))
    train.run(compose("train", settings("parts", "resume=true")))
    whole, parts = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert np.isfinite(load_policy(tmp_path / "parts").plan(OBSERVATION).position).all()


def uncalibrate(demos: Path, camera: str) -> None:
    for path in demos.glob("*/metadata.json"):
        metadata = json.loads(path.read_text())
        metadata["cameras"][camera]["uncalibrated"] = "its board was not seen"
        path.write_text(json.dumps(metadata))


@pytest.mark.slow
def test_mapanything_is_told_the_calibrated_camera_beside_another(
    overrides: Callable[..., list[str]], mapanything: Path, tmp_path: Path
) -> None:
    uncalibrate(tmp_path / "demos", "front")

    def settings(name: str, *more: str) -> list[str]:
        return with_mapanything(overrides(name), mapanything, *more)

    with pytest.raises(ValueError, match="camera 'front' is not calibrated, which this model needs: its board"):
        train.run(compose("train", settings("all", "geometry.calibration=true")))
    with pytest.raises(InstantiationException, match=r"geometry\.calibration=\[front\] lacks the first view, over"):
        train.run(compose("train", settings("front", "geometry.calibration=[front]")))
    train.run(compose("train", settings("over", "geometry.calibration=[over]")))
    train.run(compose("train", settings("auto", "max_steps=1", "optimizer.schedule=constant")))
    train.run(compose("train", settings("auto", "resume=true", "optimizer.schedule=constant")))
    files = {"network.geometry.weights": str(mapanything)}
    policies = [
        load_module(tmp_path / name, expected=GeometryVLAModule, external=files).policy() for name in ("over", "auto")
    ]
    cameras = {name: dict(view) for name, view in OBSERVATION["cameras"].items()}
    for name in ("intrinsics", "world_to_camera"):
        del cameras["front"][name]
    tilted = cameras | {"over": cameras["over"] | {"intrinsics": np.diag([60.0, 20.0, 1.0])}}
    for policy in policies:
        assert policy.needs.calibration == ("over",)
        policy.reset(0)
        expected = policy.plan(OBSERVATION).position
        policy.reset(0)
        np.testing.assert_array_equal(policy.plan(OBSERVATION | {"cameras": cameras}).position, expected)
        policy.reset(0)
        assert np.abs(policy.plan(OBSERVATION | {"cameras": tilted}).position - expected).max() > 0
    uncalibrate(tmp_path / "demos", "over")
    again = ("resume=true", "max_steps=3", "optimizer.schedule=constant", "data.allow_changed=true")
    with pytest.raises(ValueError, match=r"trained with the calibration of over, and .* now give that of no camera"):
        train.run(compose("train", settings("auto", *again)))


@pytest.mark.slow
def test_a_run_goes_on_with_features_and_data_in_another_place(
    overrides: Callable[..., list[str]], mapanything: Path, tmp_path: Path
) -> None:
    cached = ("geometry=mapanything_cached", "data.augmentation=null", "optimizer.schedule=constant")

    def settings(name: str, folder: str, *more: str) -> list[str]:
        own = [each for each in with_mapanything(overrides(name), mapanything) if each != "geometry=mapanything"]
        return [*own, *cached, f"geometry.cache.folder={tmp_path / folder}", *more]

    train.run(compose("train", settings("whole", "features")))
    train.run(compose("train", settings("parts", "features", "max_steps=1")))
    moved = (tmp_path / "demos").rename(tmp_path / "elsewhere")
    changed = ("geometry.cache.limit_gb=1", "data.max_broken_share=0.5", "resume=true")
    changed = (f"data.root={moved}", "data.allow_changed=true", *changed)  # these options verify no images
    train.run(compose("train", settings("parts", "other", *changed)))
    assert list((tmp_path / "other").glob("*/*.safetensors"))
    whole, parts = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


ROBOTS = {"yam": {"begin": (0.2, 0.0, 0.1), "step_m": 0.01}, "panda": {"begin": (0.7, -0.4, 0.5), "step_m": 0.06}}


def own_ranges(folders: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return two ranges ``[2, 3]`` of some recordings: the middle 98 % of the positions of all four-step targets before
    the end, and the box of all reached and commanded positions."""
    targets, everything = [], []
    for folder in folders:
        arm = read_native(folder).arms["right"]
        assert arm.commanded is not None
        last = len(arm) - 1
        targets += [arm.commanded.position[frame : min(frame + 4, last)] for frame in range(last)]
        everything += [arm.position, arm.commanded.position]
    boxed = np.concatenate(everything)
    middle = np.quantile(np.concatenate(targets), [0.01, 0.99], axis=0)
    return middle, np.stack([boxed.min(axis=0), boxed.max(axis=0)])


@pytest.mark.slow
def test_a_mixture_of_robots_is_normalised_by_each_ones_own_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = {name: write_demos(tmp_path / name, robot=name, **options) for name, options in ROBOTS.items()}  # type: ignore[arg-type]

    def overrides(name: str, *more: str) -> list[str]:
        mixture = f"data.root=[{','.join(map(str, roots.values()))}]"
        robots = f"model.actions.embodiments=[{','.join(ROBOTS)}]"
        return [*SMALL, mixture, robots, f"run_dir={tmp_path / name}", "optimizer.schedule=constant", *more]

    metrics = train.run(compose("train", overrides("straight")))
    assert np.isfinite(metrics["train/loss"])
    train.run(compose("train", overrides("parts", "max_steps=2")))
    train.run(compose("train", overrides("parts", "resume=true")))
    resumed, straight = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("parts", "straight"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)

    names = sorted(f"{name}/{folder.name}" for name, root in roots.items() for folder in root.glob("demo_*"))
    chosen, _ = split_demos(names, 0.3, compose("train", overrides("straight")).data.split_seed)
    module = load_module(tmp_path / "straight", expected=GeometryVLAModule)
    assert isinstance(module, GeometryVLAModule)
    sampled: list[tuple[np.ndarray, np.ndarray]] = []  # the head's actions and state, as normalised for the head
    whole = module.network.sample

    def seen(scene: Scene, noise: torch.Tensor, state: torch.Tensor, sampling: ActionSampling) -> torch.Tensor:
        actions = whole(scene, noise, state, sampling)
        sampled.append((actions[0].numpy(), state[0].numpy()))
        return actions

    monkeypatch.setattr(module.network, "sample", seen)
    plans = []
    for number, (name, options) in enumerate(ROBOTS.items()):
        bounds, box = own_ranges([tmp_path / names[index] for index in chosen if names[index].startswith(name)])
        middle, half = bounds.mean(axis=0), np.maximum(np.ptp(bounds, axis=0) / 2, LEAST_RANGE)
        policy = GeometryVLAPolicy(module, embodiment=name, margin_m=0.01)
        np.testing.assert_allclose(policy.workspace, box, atol=1e-6)
        start = np.array(options["begin"])
        plan = policy.plan(OBSERVATION | {"position": start})
        actions, state = sampled[-1]
        expected = middle + half * actions[:, :3]
        np.testing.assert_allclose(plan.position[0], expected.clip(box[0] - 0.01, box[1] + 0.01), atol=1e-5)
        assert (np.abs(plan.position[0] - expected) < 1e-5).any(), "else nothing but the box is compared"
        np.testing.assert_allclose(plan.held_back, np.abs(plan.position - expected).max(axis=1), atol=1e-5)
        low, high = module.actions.state_low, module.actions.state_high
        np.testing.assert_allclose(
            state[:3], 2 * (start - low[number, :3].numpy()) / (high - low)[number, :3].numpy() - 1, atol=1e-5
        )
        assert np.abs(state[:3]).max() < 1.5, "its own beginning lies in its own range"
        plans.append(plan)
    assert (plans[1].position.min(axis=1) > plans[0].position.max(axis=1))[..., [0, 2]].all()


@pytest.mark.slow
def test_a_dry_run_is_of_one_process_of_several(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keygrip.training.memory.GIB", 1)  # so that memory is in bytes: the model is small

    def dry(name: str, *more: str) -> dict[str, Any]:
        return train.run(compose("train", overrides(name, "dry_run=true", *more)))

    several = ("strategy.accelerator=gpu", "strategy.devices=2")  # counted even if there are no GPUs
    whole, copied = dry("one"), dry("ddp", *several, "strategy.kind=ddp")
    divided = dry("fsdp", *several, "strategy.kind=fsdp")
    assert [(each["processes"], each["images"][0]) for each in (whole, copied, divided)] == [(1, 4), (2, 2), (2, 2)]
    assert copied["memory"]["weights_gib"] == whole["memory"]["weights_gib"]
    assert divided["memory"]["how"] == "counted, as of a GPU"
    for part in ("weights", "optimizer"):
        assert divided["memory"][f"{part}_gib"] == pytest.approx(whole["memory"][f"{part}_gib"] / 2, abs=1)
    if not torch.cuda.is_available():
        assert divided["memory"]["step_gib"] == copied["memory"]["step_gib"] < whole["memory"]["step_gib"]
    with pytest.raises(ValueError, match="batch_size=4 is the global batch and must divide by the 3 processes"):
        dry("three", "strategy.kind=fsdp", "strategy.devices=3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun or srun"):
        dry("torchrun")


@pytest.mark.slow
def test_a_dry_run_counts_mapanything_and_asks_no_cache_for_images_without_content(
    overrides: Callable[..., list[str]], mapanything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keygrip.training.memory.GIB", 1)  # so that memory is in bytes
    (mapanything / "config.json").write_text(json.dumps({"width": 10, "dim": 24, "patch_size": 32}))
    outside = (3 * 32 * 32 + 1) * 10 + (10 + 1) * 24

    def dry(name: str, *more: str) -> dict[str, Any]:
        cached = ("geometry=mapanything_cached", f"geometry.cache.folder={tmp_path / 'cache'}", "dry_run=true")
        real_size = ("data.image_size=448", "geometry.image_size=448")
        return train.run(compose("train", with_mapanything(overrides(name), mapanything, *cached, *real_size, *more)))

    whole = dry("one", "data.batch_size=4")
    assert np.prod(whole["images"]) > memory.SMALL
    assert whole["parameters_m"]["geometry"] == {"all": round(outside / 1e6, 3), "trained": 0.0}
    divided = dry("fsdp", "data.batch_size=8", "strategy.accelerator=gpu", "strategy.devices=2", "strategy.kind=fsdp")
    assert divided["images"] == whole["images"]
    own = whole["memory"]["weights_gib"] - 4 * outside
    assert divided["memory"]["weights_gib"] == pytest.approx(4 * outside + own / 2, abs=1), (
        "every process holds it whole"
    )


def test_one_camera_is_refused_with_the_data_that_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MultiViewPolicyBatch.*choose .*data=yam_language"):
        train.run(compose("train", ["model=geometry_vla", "data=yam", f"run_dir={tmp_path / 'none'}"]))


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_of_the_maps_that_is_none_is_refused(weight: float) -> None:
    whole = small_module(pointing_cells=2)
    with pytest.raises(ValueError, match=r"model\.pointing_weight must be finite and not negative"):
        GeometryVLAModule(whole.network, whole.actions, AdamW(lr=1e-3), BetaTimesteps(), pointing_weight=weight)


@pytest.mark.parametrize("trainable", ["language", "frozen"])
def test_a_run_that_would_keep_random_weights_is_refused(trainable: str) -> None:
    module = small_module(vlm=small_vlm(trainable=trainable))
    with pytest.raises(ValueError, match=rf"vlm\.trainable={trainable} would keep random weights: .*model\.init_from"):
        module.check_run(max_steps=1, begins=True)
    module.init_from = "run"
    module.check_run(max_steps=1, begins=True)
    small_module().check_run(max_steps=1, begins=True)


def metrics_of(module: GeometryVLAModule, batch: MultiViewPolicyBatch) -> dict[str, torch.Tensor]:
    scene = module(batch)
    return module.metrics(scene, batch, module.sample(scene, batch))


def test_errors_at_the_grip_are_of_the_steps_that_close(tmp_path: Path) -> None:
    module = ready_module(tmp_path)
    batch = small_batch()
    batch.start_gripper = torch.tensor([[1.0], [0.0]])
    batch.gripper = torch.tensor([[[1.0, 0.9, 0.1, 0.0]], [[0.0, 1.0, 1.0, 0.2]]])  # they close at steps 2 and 3
    sampled = module.actions.encode(batch)
    exact = module.grip_errors(batch, sampled)
    assert all(len(errors) == 2 and errors.abs().max() < 1e-3 for errors in exact.values())
    batch.position[0, 0, 2] += torch.tensor([0.03, -0.04, 0.01])
    batch.position[1, 0, 3] += torch.tensor([0.0, 0.0, -0.02])
    batch.position[:, 0, 1] += 1.0  # the gripper does not close there
    found = module.grip_errors(batch, sampled)
    torch.testing.assert_close(found["grip_side_cm"], torch.tensor([5.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found["grip_height_cm"], torch.tensor([1.0, 2.0]), atol=1e-3, rtol=0)
    batch.action_is_pad[0, 0, 2] = True  # padded
    assert len(module.grip_errors(batch, sampled)["grip_side_cm"]) == 1


def test_a_validation_is_the_mean_over_all_steps(tmp_path: Path) -> None:
    """The mean does not depend on how the steps are divided into batches, one of which is all padding."""
    module, data = ready_module(tmp_path), small_batch(2 * INSTRUCTIONS)
    module.log_images_every_n_steps = 0
    data.action_is_pad[0, :, 1:] = True
    data.action_is_pad[-1] = True
    count = len(data)
    whole, parts = (
        validated_in_pieces(module, data, pieces)
        for pieces in ([slice(count)], [slice(1), slice(1, count - 1), slice(count - 1, count)])
    )
    for name in ("position_cm", "height_m", "rotation_deg", "gripper_acc"):
        assert parts[f"val/{name}"] == pytest.approx(whole[f"val/{name}"], rel=1e-3), name


def unevenly_seen() -> MultiViewPolicyBatch:
    """Four samples: the first is in no image and has no depth, and the others have different shares of both."""
    data = small_batch(2 * INSTRUCTIONS)
    assert data.depth is not None
    away = data.view_world_to_camera.clone()
    away[0, :, 0, 3] += 10.0
    away[1, 1, 0, 3] += 10.0
    data.view_world_to_camera = away
    data.depth[0] = 0.0
    data.depth[1, :, 8:] = 0.0
    data.depth[2, 1] = 0.0
    return data


def test_a_validation_of_maps_and_depth_is_the_mean_over_all_that_count(tmp_path: Path) -> None:
    """The mean does not depend on the batches, one of which has no valid values; a batch of one sample affects no
    other."""
    module = ready_module(tmp_path, pointing_cells=2, pointing_keyframe=True, pointed_tokens=True)
    module.log_images_every_n_steps = 0
    data = unevenly_seen()
    divisions = ([slice(4)], [slice(2), slice(2, 4)], [slice(1), slice(1, 4)])
    whole, halves, uneven = (validated_in_pieces(module, data, pieces) for pieces in divisions)
    names = [name for kind in ("pointing", "keyframe") for name in (kind, f"{kind}_px")]
    for name in (*names, "points", "depth", "point_cm", "depth_cm"):
        assert whole[f"val/{name}"] > 0, name
        for parts in (halves, uneven):
            assert parts[f"val/{name}"] == pytest.approx(whole[f"val/{name}"], rel=1e-3), name
    alone = validated_in_pieces(module, data, [slice(1, 4)])
    assert uneven["val/geometry_slot"] == pytest.approx(alone["val/geometry_slot"], rel=1e-4)


def test_errors_at_the_grip_are_means_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, logged = ready_module(tmp_path), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    others = iter([8.0, 1.0, 8.0, 1.0])  # the sum of the other process's errors, and their number
    monkeypatch.setattr("keygrip.models.geometry_vla.module.global_sum", lambda value: value + next(others))
    module._grips = {"grip_side_cm": [torch.tensor([1.0, 3.0]), torch.zeros(0)], "grip_height_cm": [torch.zeros(0)]}
    module.on_validation_epoch_end()
    assert logged == {"val/grip_side_cm": 4.0, "val/grip_height_cm": 8.0}


@pytest.mark.slow
def test_it_learns_actions_and_depth(tmp_path: Path) -> None:
    module = ready_module(tmp_path, draws=4)
    batch = small_batch()
    assert batch.depth is not None
    batch.depth = torch.full_like(batch.depth, 0.9)
    batch.depth[1] = 1.1
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=3e-3)
    before = metrics_of(module, batch)
    first: dict[str, float] = {}
    torch.manual_seed(0)
    for step in range(80):
        losses = module.losses(module(batch), batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        if step == 0:
            first = {name: float(value.detach()) for name, value in losses.items()}
    after = metrics_of(module, batch)
    assert float(losses["action"].detach()) < 0.75 * first["action"]
    assert float(losses["point_cm"]) < 0.2 * first["point_cm"]
    assert float(losses["depth_cm"]) < 0.3 * first["depth_cm"]
    assert float(after["position_cm"]) < 0.8 * float(before["position_cm"])
