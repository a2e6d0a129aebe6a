"""Closed-loop evaluation at the end of training: its environment, and what is refused before training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gym_lab import GOAL
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from keygrip.config import compose
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.callback import EvaluateClosedLoop, show_in_loggers
from keygrip.evaluation.closed_loop import ClosedLoop
from keygrip.evaluation.image_callback import EvaluateImages
from keygrip.models.policy import Needs, Plan
from keygrip.setting_types import refuse_ill_typed
from keygrip.training.checkpoints import Header

LOOP = "callbacks.closed_loop.closed_loop"


@dataclass
class ToGoal:
    """Plans straight to the goal of `gym_lab`."""

    needs: Needs

    def plan(self, observation: Any) -> Plan:
        here = np.asarray(observation["position"], float).reshape(3)
        share = np.linspace(0.25, 1, 4)[:, None]
        pose = np.tile([1.0, 0, 0, 0], (1, 4, 1))
        return Plan((here + share * (GOAL - here))[None], pose, np.ones((1, 4)), step_seconds=0.2)


class Module(LightningModule):
    """Returns a robot policy; a part of it is frozen."""

    def __init__(self, **needs: Any) -> None:
        super().__init__()
        self.needs = Needs(**{"arms": ("right",), **needs})
        self.frozen = torch.nn.Dropout().eval()

    def policy(self) -> ToGoal:
        self.eval()
        return ToGoal(self.needs)


def set_up(module: Module, run_dir: Path, *overrides: str) -> tuple[EvaluateClosedLoop, Trainer]:
    """Return the callback of a training with these settings, and its trainer, as they are at the start of training."""
    config = compose("train", [*overrides, f"run_dir={run_dir}"])
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    refuse_ill_typed(resolved["callbacks"])
    callback = instantiate(config.callbacks.closed_loop, _convert_="all")
    trainer = Trainer(callbacks=[Header(resolved, {}), callback], logger=False, enable_checkpointing=False)
    callback.setup(trainer, module, "fit")
    return callback, trainer


def recorded(root: Path, **settings: Any) -> str:
    root.mkdir()
    (root / "recording.json").write_text(json.dumps({"settings": settings}))
    return f"data.root={root}"


def test_the_environment_is_that_of_the_recording(tmp_path: Path) -> None:
    root = recorded(tmp_path / "pick", task={"name": "pick", "object_size_m": 0.03}, image_size=64, hz=5.0)
    module = Module()
    callback, _ = set_up(module, tmp_path, "closed_loop=yam", root)
    found = callback.closed_loop
    assert found is not None
    assert (found.task, found.image_size, found.hz) == (TaskOptions(name="pick", object_size_m=0.03), 64, 5.0)
    assert found.control.keywords["execute_seconds"] == 1.2  # type: ignore[attr-defined]
    assert (module.training, module.frozen.training) == (True, False)  # not changed by the check of the policy


def test_the_policy_plans_where_training_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = recorded(tmp_path / "pick", task={"name": "pick"}, image_size=64, hz=5.0)
    monkeypatch.setattr(ClosedLoop, "check", lambda *_: None)
    monkeypatch.setattr("keygrip.evaluation.closed_loop.refuse_missing_device", lambda device: None)
    callback, trainer = set_up(Module(), tmp_path, "closed_loop=yam", root, f"{LOOP}.device=cuda:1")
    assert callback.closed_loop is not None
    assert callback.closed_loop.device == "cuda:1"
    callback.settings["device"] = None  # the default
    for place in ("cpu", "cuda:2"):
        device = torch.device(place)
        monkeypatch.setattr(type(trainer.strategy), "root_device", property(lambda self, device=device: device))
        callback.setup(trainer, Module(), "fit")
        assert callback.closed_loop.device == place


@pytest.mark.slow
def test_two_arms_are_judged_with_two_arms(tmp_path: Path) -> None:
    root = recorded(tmp_path / "handover", task={"name": "handover"}, image_size=64, hz=10.0)
    both = ("data.arms=[left,right]", root)
    callback, _ = set_up(Module(arms=("left", "right")), tmp_path, "closed_loop=yam_handover", *both)
    assert callback.closed_loop is not None
    assert callback.closed_loop.task == HandoverTask()
    with pytest.raises(ValueError, match="the environment has 1 arms, the policy moves 2"):
        set_up(Module(arms=("left", "right")), tmp_path, "closed_loop=yam", *both)


def test_what_the_environment_lacks_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = "callbacks.closed_loop.env"
    gym = ["closed_loop=gymnasium", f"{env}.task.id=gym_lab:TwoCameraPointMass-v0", f"{env}.image_size=32"]
    root = recorded(tmp_path / "reach", environment="gymnasium", image_size=32, hz=20.0)
    callback, _ = set_up(Module(), tmp_path, *gym, root, "data.camera=side")
    assert callback.closed_loop is not None
    assert (callback.closed_loop.cameras, callback.closed_loop.hz) == (["side"], 20.0)
    with pytest.raises(ValueError, match="has no camera 'wrist'"):
        set_up(Module(), tmp_path, *gym, root, "data.camera=wrist")
    monkeypatch.chdir(tmp_path)  # without .venv-metaworld
    with pytest.raises(ValueError, match=r"no Python interpreter at \.venv-metaworld/bin/python.*metaworld-install"):
        set_up(Module(), tmp_path, "closed_loop=metaworld", root)
    with pytest.raises(ValueError, match="ToGoal has no setting 'temprature'"):
        set_up(Module(), tmp_path, *gym, root, "data.camera=side", f"+{LOOP}.policy.temprature=1")
    with pytest.raises(ValueError, match="a LightningModule is no robot policy"):
        set_up(LightningModule(), tmp_path, *gym, root)  # type: ignore[arg-type]
    several = Module()
    several.embodiments = ("yam", "panda")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the model was trained for yam, panda: choose one .*policy.embodiment=NAME"):
        set_up(several, tmp_path, *gym, root, "data.camera=side")
    with pytest.raises(InstantiationException, match=r"nothing reads callbacks\.closed_loop\.env\.control"):
        set_up(Module(), tmp_path, *gym, root, f"{env}.control={{execute_seconds: 0.5}}")


def test_all_tasks_together_are_a_figure_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = "callbacks.closed_loop.env"
    gym = ["closed_loop=gymnasium", f"{env}.task.id=gym_lab:CalibratedPointMass-v0", f"{env}.image_size=32"]
    root = recorded(tmp_path / "reach", environment="gymnasium", image_size=32, hz=10.0)
    small = [f"{LOOP}.episodes=2", f"{LOOP}.processes=1", f"{LOOP}.videos=1"]
    callback, trainer = set_up(Module(), tmp_path, *gym, *small, root)
    assert callback.closed_loop is not None
    tasks = {"reach-v3": [{}], "push-v3": [{"time_limit_s": 0.1}]}
    callback.closed_loop = replace(callback.closed_loop, conditions=tasks, of_tasks=True)  # as Meta-World's are
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: Module())
    callback.on_fit_end(trainer, Module())
    assert trainer.callback_metrics["closed_loop/reach-v3/success_rate"] == 1.0
    assert trainer.callback_metrics["closed_loop/all/success_rate"] == 0.5
    stored = json.loads((tmp_path / "closed_loop" / "result.json").read_text())
    assert stored["all"]["by_difficulty"]["hard"]["successes"] == 0
    assert (tmp_path / "closed_loop" / "rollouts.mp4").is_file()
    assert len((tmp_path / "closed_loop" / "episodes.jsonl").read_text().splitlines()) == 4
    # a continued run whose second evaluation fails has no figures beside the new episodes
    monkeypatch.setattr(ClosedLoop, "run", lambda *_: (_ for _ in ()).throw(OSError("no display")))
    with pytest.raises(OSError, match="no display"):
        callback.on_fit_end(trainer, Module())
    assert [path.name for path in (tmp_path / "closed_loop").iterdir()] == ["videos"]
    assert list((tmp_path / "closed_loop" / "videos").iterdir()) == []


@pytest.mark.parametrize(
    ("log_figures", "name"),
    [
        pytest.param(
            lambda trainer, value: show_in_loggers(trainer, {"a": {"success_rate": value}}, [], Path()),
            "closed_loop/a/success_rate",
            id="closed loop",
        ),
        pytest.param(
            lambda trainer, value: EvaluateImages._show(trainer, {"a": value}, []), "images/a", id="generated images"
        ),
    ],
)
def test_a_repeated_evaluation_replaces_its_row_of_the_table(
    log_figures: Callable[[Any, float], None], name: str, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    for value in (0.25, 0.75):
        log_figures(SimpleNamespace(loggers=[logger], global_step=2), value)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [(row["step"], row[name]) for row in csv.DictReader(file)] == [("2", "0.75")]
