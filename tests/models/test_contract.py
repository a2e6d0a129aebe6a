"""The requirements for every model, over all options of the group `model`: a new option is included without an edit.

Each is trained for a step in a small size (its module's `toy_overrides`), then loaded from its checkpoint alone, with
every data folder and run folder gone. It plans, answers or draws according to its `evaluation_kind`; it is exported,
loaded from the export, and evaluated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_parts import EVALUATE, OPTIONS, QUICK, SMALLER, observation, wrong_observations
from hydra.utils import get_class
from lightning.pytorch import LightningModule
from metric_table import one_sided, unexplained
from PIL import Image

import keygrip
from keygrip import export, sample
from keygrip.config import compose, group_options
from keygrip.evaluation.attribute_classifier import ClassifierOptions
from keygrip.inference.video_chat import VideoChat
from keygrip.training.parts import MARK
from keygrip.training.system import System

MODELS = group_options("model")
VARIANTS = (
    "geometry_vla_no_injection",
    "patch_dit_source",
    "volume_query_language",
    "volume_query_tuned",
)  # variants of modules that are tested anyway
BASELINES = ("coordinate_regression", "pooled_vlm", "patch_dit_base", "vlm_encoder_pretraining")
STAGES = ("depth_reader", "image_autoencoder", "vlm_encoder_self_supervised")
LONGEST = ("foveated_vlm", "geometry_vla", "patch_dit")  # their tests train, load and evaluate them too
PRETRAINING = ("vlm_encoder_pretraining",)
FOLDERS = ("data", "runs")
DRAWN = {"loss_text", "loss_dino", "loss_none"}  # in training only where a sample with these conditions was drawn


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of all models: recordings that two of them share are made once."""
    folder = tmp_path_factory.mktemp("contract")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def use(module: System, source: Path) -> None:
    """Use a loaded model for its purpose."""
    if module.evaluation_kind == "policy":
        policy: Any = keygrip.load_policy(source)
        assert "over" in (*policy.needs.cameras, policy.needs.camera)  # a robot with several must provide this one
        plan = policy.plan(observation(policy))
        assert plan.position.shape[:1] + plan.position.shape[2:] == (len(policy.needs.arms), 3)
        assert np.isfinite(plan.position).all()
        assert np.allclose(np.linalg.norm(plan.quaternion, axis=-1), 1, atol=1e-4)
        assert plan.step_seconds > 0
        for wrong, said in wrong_observations(observation(policy)):
            with pytest.raises(ValueError, match=said):
                policy.plan(wrong)
    elif module.evaluation_kind == "image_text":
        encoders = module.ready_encoders()  # type: ignore[operator]
        assert encoders.quick_fingerprint == module.statistics.encoders  # type: ignore[union-attr]
        folder = source.with_name(f"{source.name}-drawn")
        (drawn,) = sample.run(
            compose("sample", [f"checkpoint={source}", "prompt='a red cube'", "steps=1", f"run_dir={folder}"])
        )["images"]
        with Image.open(drawn) as image:
            assert image.mode == "RGB"
            assert len(image.getcolors(image.width * image.height) or []) > 1
    elif module.evaluation_kind == "video_text":
        assert module.tokenizer.decode(module.tokenizer.encode("which digit?")) == "which digit?"  # type: ignore[union-attr, operator]
        black = {"type": "video", "video": np.zeros((2, 32, 32, 3), np.uint8)}
        talk = [{"role": "user", "content": [black, {"type": "text", "text": "which digit?"}]}]
        assert isinstance(VideoChat.from_pretrained(source, "cpu").generate(talk, max_new_tokens=2), str)


def settings_of(name: str) -> tuple[list[str], Any]:
    """Return the overrides that choose a model in a small size, and its class."""
    chosen = OPTIONS.get(name, (f"model={name}",))
    node = compose("train", [*chosen, "run_dir=x"]).model
    kind: Any = get_class(node._target_)
    return [*chosen, *kind.toy_overrides, *SMALLER.get(name, ())], kind


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *OPTIONS])
def test_a_dry_run_of_a_model_counts_its_memory(name: str, home: Path) -> None:
    settings, _ = settings_of(name)
    run = home / "runs" / f"{name}-dry"
    report = keygrip.train.run(  # type: ignore[attr-defined]
        compose("train", [*QUICK, *settings, f"run_dir={run}", "dry_run=true"])
    )
    assert report.get("memory", report.get("worst_bucket"))["how"] in ("counted, as of a GPU", "measured on the GPU")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in (*VARIANTS, *BASELINES, *STAGES, *LONGEST, *OPTIONS) else []
        )
        for name in (*MODELS, *OPTIONS)
    ],
)
def test_a_model_keeps_its_promises(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the attribute classifier is trained for 400 steps by default: its results are tested elsewhere
    monkeypatch.setattr(ClassifierOptions.__init__, "__defaults__", (8, 2, 4, 3e-3, 0.08))
    settings, kind = settings_of(name)
    assert issubclass(kind, System)
    assert MARK in vars(kind), "declare it with @model_part: else its checkpoints cannot be loaded"
    run = home / "runs" / name
    logged = [setting if setting != "logger=none" else "logger=csv" for setting in QUICK]
    result = keygrip.train([*logged, *settings, f"run_dir={run}"])
    assert result["status"] == "finished"
    if name not in STAGES and name not in PRETRAINING:  # the four systems and their baselines
        (table,) = run.rglob("metrics.csv")
        scalars = table.read_text().partition("\n")[0].split(",")
        assert {"train/loss", "val/loss"} <= set(scalars)
        assert unexplained(scalars) == [], "add a row to the table of docs/training.md"
        wrong = set(one_sided(name, scalars)) - DRAWN
        assert wrong == set(), "correct the prefix in the table of docs/training.md"
    assert any(metric.startswith("train/") for metric in result["metrics"])
    assert [metric for metric, value in result["metrics"].items() if not np.isfinite(value)] == []

    file = home / f"{name}.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", file)
    for folder in FOLDERS:  # whatever data it was trained on
        (home / folder).rename(home / f"{folder}-gone")
    try:
        module: Any = keygrip.load(file)
        assert type(module) is kind
        assert not module.training
        assert isinstance(module.sharded_parts(), list)  # FSDP and `compile` ask every model
        if kind.on_load_checkpoint is not LightningModule.on_load_checkpoint:
            with pytest.raises(
                ValueError, match=r"the checkpoint has no .*: it was written by another model, or by .*again"
            ):
                module.on_load_checkpoint({})
        exported = home / f"{name}-export"
        export.run(compose("export", [f"checkpoint={file}", f"to={exported}"]))
        again = keygrip.load(exported)
        for key, value in module.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        for source in (file, exported):
            use(module, source)
    finally:
        for folder in FOLDERS:
            (home / f"{folder}-gone").rename(home / folder)

    if kind.evaluation_kind is None:
        with pytest.raises(ValueError, match="has no evaluation"):
            keygrip.evaluate(run)
    else:
        keygrip.evaluate(run, EVALUATE[kind.evaluation_kind])
        assert json.loads((run / "evaluation" / "result.json").read_text())["model"] == kind.__name__


LAB = '''
"""A policy of somebody else: the mean colour of the image moves the gripper."""

import numpy as np
import torch
from torch import nn

from keygrip.data.batches import PolicyBatch
from keygrip.models.policy import Needs, Plan
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.training.parts import model_part
from keygrip.training.system import System


@model_part
class MeanColour(nn.Module):
    def __init__(self, horizon):
        super().__init__()
        self.horizon, self.head = horizon, nn.Linear(3, 3 * horizon)

    def forward(self, image):
        return self.head(image.mean((2, 3))).unflatten(-1, (self.horizon, 3))


@model_part
class MeanColourModule(System):
    batch_type = PolicyBatch
    evaluation_kind = "policy"

    def __init__(self, network, optimizer):
        super().__init__(optimizer)
        self.network, self.statistics = network, PolicyStatistics()

    def set_statistics(self, statistics):
        self.statistics.take(statistics, self.network.horizon)
        return {}

    def training_step(self, batch, batch_idx):
        loss = (self.network(batch.image) - batch.position[:, 0]).abs().mean()
        self.log_values("train", {"total": loss}, len(batch.image))
        return loss

    def validation_step(self, batch, batch_idx):
        loss = (self.network(batch.image) - batch.position[:, 0]).abs().mean()
        self.log_values("val", {"total": loss}, len(batch.image))

    def policy(self):
        return MeanColourPolicy(self)


class MeanColourPolicy:
    needs = Needs(arms=("right",))

    def __init__(self, module):
        self.module = module

    @torch.inference_mode()
    def plan(self, observation):
        geometry = self.module.statistics.geometry
        image, _ = geometry.apply(np.asarray(observation["image"]), np.asarray(observation["intrinsics"]))
        position = self.module.network(image[None])[None, 0].double().numpy()
        turns = np.tile([1.0, 0, 0, 0], (1, position.shape[1], 1))
        return Plan(position, turns, np.ones(position.shape[:2]), self.module.statistics.step_seconds)
'''
LAB_YAML = """
# @package _global_
# The mean colour of the image moves the gripper.
defaults:
  - /closed_loop: null
  - /shift: null
  - /window: null
  - _self_

backbone:
  image_size: 64  # the data module reads it
model:
  _target_: toy_lab.MeanColourModule
  network:
    _target_: toy_lab.MeanColour
    horizon: ${data.horizon}
  optimizer: ${optimizer}
"""


def test_two_files_add_a_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = home / "lab"
    (lab / "conf" / "model").mkdir(parents=True)
    (lab / "toy_lab.py").write_text(LAB)
    (lab / "conf" / "model" / "mean_colour.yaml").write_text(LAB_YAML.lstrip())
    monkeypatch.syspath_prepend(str(lab))
    toy = ["data=yam", "data.record.task.name=reach", "data.record.demos=4", "data.record.image_size=72"]
    search = f"hydra.searchpath=[file://{lab / 'conf'}]"
    run = home / "runs" / "mean_colour"
    result = keygrip.train([search, "model=mean_colour", *QUICK, *toy, f"run_dir={run}"])
    assert result["metrics"]["val/loss"] > 0
    policy: Any = keygrip.load_policy(run, trust=["toy_lab"])
    assert policy.plan(observation(policy)).position.shape == (1, 8, 3)
    figures = keygrip.evaluate(run, ["trust=[toy_lab]", "simulate=false"])
    assert figures["open_loop"]["loss"] > 0
    export.run(compose("export", [f"checkpoint={run}", f"to={home / 'lab-export'}", "trust=[toy_lab]"]))
    assert type(keygrip.load(home / "lab-export", trust=["toy_lab"])).__name__ == "MeanColourModule"
