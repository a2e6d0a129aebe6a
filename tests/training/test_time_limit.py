"""max_minutes shapes the cosine schedule if it ends the run before the steps do."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import toy_parts
from torch import nn

from keygrip import train
from keygrip.config import compose
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.optimizers import AdamW
from keygrip.training.results import read_result
from keygrip.training.signals import Interrupted
from keygrip.training.time_limit import TimeLimit

LIMIT_S = 20.0


class Ones(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.rates: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return AdamW(lr=1.0, warmup_steps=0, final_lr_share=0.0).configure(self, self.trainer.max_steps)


def rates(monkeypatch: pytest.MonkeyPatch, max_steps: int, step_s: float) -> list[float]:
    """Return the learning rates of a run whose steps take `step_s` on a simulated clock."""
    module = Module()
    monkeypatch.setattr(TimeLimit, "time_elapsed", lambda self, stage="train": len(module.rates) * step_s)
    monkeypatch.setattr(TimeLimit, "time_remaining", lambda self, stage="train": LIMIT_S - len(module.rates) * step_s)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[TimeLimit(LIMIT_S / 60)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, torch.utils.data.DataLoader(Ones()))
    return module.rates


def test_the_rate_is_small_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, max_steps=1000, step_s=1.0)
    assert len(found) == int(LIMIT_S)
    assert found[10] == pytest.approx(0.5 * (1 + torch.tensor(torch.pi * 9 / LIMIT_S).cos().item()), abs=1e-6)
    assert found[-1] < 0.03
    assert found == sorted(found, reverse=True)


def test_a_limit_that_is_not_reached_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, max_steps=12, step_s=1.0) == rates(monkeypatch, max_steps=12, step_s=0.0)


@pytest.mark.parametrize(("limit", "expected"), [("max_minutes=1", 0.5), ("max_minutes=null", 0.8)])
def test_a_resumed_run_follows_the_share_of_time_from_its_first_step(
    limit: str,
    expected: float,
    toy_overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the time and a fifth of the steps have passed; without a limit only the steps count."""
    cosine = ("max_steps=10", "optimizer.lr=1.0e-3", "optimizer.warmup_steps=0", "optimizer.final_lr_share=0")
    monkeypatch.setattr(TimeLimit, "time_elapsed", lambda self, stage="train": 30.0)
    monkeypatch.setenv("TOY_STOP_AT", "1")
    monkeypatch.setenv("TOY_SIGNAL", "SIGTERM")
    with pytest.raises(Interrupted, match="at step 2"):
        train.run(compose("train", toy_overrides("run", *cosine, "max_minutes=1")))
    monkeypatch.delenv("TOY_STOP_AT")
    train.run(compose("train", toy_overrides("run", *cosine, limit, "resume=true", "logger=csv", "max_steps=10")))
    with (tmp_path / "run" / "csv" / "metrics.csv").open(newline="") as file:
        found = [float(row["lr-AdamW/rest"]) for row in csv.DictReader(file) if row["lr-AdamW/rest"]]
    assert found[0] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * (1 - expected))))


@pytest.mark.parametrize(
    ("length", "shares"),
    [
        ({"max_steps": -1, "optimizer.schedule": "constant"}, [0.0, 0.25, 0.5, 0.75]),
        ({"max_steps": 100}, [0.0, 0.25, 0.5, 0.75]),
        ({"max_steps": 2}, [0.0, 0.5]),
    ],
)
def test_what_depends_on_the_share_of_the_run_follows_the_time_where_that_is_further(
    length: dict[str, Any],
    shares: list[float],
    toy_overrides: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the simulated clock, a step takes 15 seconds of the minute."""
    found: list[float] = []
    step = toy_parts.ToyModule.training_step

    def noted(self: toy_parts.ToyModule, batch: Any, batch_idx: int) -> torch.Tensor:
        found.append(self.progress())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy_parts.ToyModule, "training_step", noted)
    monkeypatch.setattr(TimeLimit, "time_elapsed", lambda self, stage="train": 15.0 * len(found))
    settings = [f"{name}={value}" for name, value in length.items()]
    train.run(compose("train", toy_overrides("run", *settings, "max_minutes=1")))
    assert found == pytest.approx(shares)


def test_minutes_alone_end_a_run_with_a_constant_rate(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    endless = ("max_steps=-1", "max_minutes=0.005")  # less than a second
    with pytest.raises(ValueError, match=r"optimizer\.schedule=cosine needs an end"):
        train.run(compose("train", toy_overrides("cosine", *endless)))
    train.run(compose("train", toy_overrides("constant", *endless, "optimizer.schedule=constant")))
    result = read_result(tmp_path / "constant")
    assert result["status"] == "finished"
    assert result["steps"] > 0
    assert Path(result["checkpoint"]).is_file()


def test_the_time_ends_with_a_step_and_a_longer_run_goes_on_as_if_it_had_not(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulated = ("accumulate_grad_batches=2", "optimizer.schedule=constant")
    train.run(compose("train", toy_overrides("whole", *accumulated)))
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "time_elapsed", lambda self, stage="train": 100.0)  # from the first batch on
        patch.setattr(TimeLimit, "on_fit_start", lambda *_: None)
        train.run(compose("train", toy_overrides("ended", *accumulated, "max_minutes=1")))
    assert read_result(tmp_path / "ended")["steps"] == 1
    train.run(compose("train", toy_overrides("ended", *accumulated, "max_minutes=1000", "resume=true")))
    one, two = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "ended"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("left_out", ["callbacks.checkpoint=null", "~callbacks.checkpoint"])
def test_a_run_that_saves_nothing_names_no_checkpoint_and_warns(
    left_out: str, toy_overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "callbacks.checkpoint is left out: without checkpoints/last.ckpt this run cannot be resumed, evaluated"
    train.run(compose("train", toy_overrides("run", "max_steps=2", "val_every_n_steps=1", left_out)))
    assert read_result(tmp_path / "run")["checkpoint"] is None
    assert list((tmp_path / "run").rglob("*.ckpt")) == []  # nor does Lightning save one of its own
    assert [warning in each.message for each in caplog.records if each.levelname == "WARNING"].count(True) == 1
    caplog.clear()
    train.run(compose("train", toy_overrides("saved", "max_steps=2")))
    assert warning not in caplog.text


def test_a_time_that_is_restored_late_ends_the_run_before_a_step() -> None:
    """With sharded parameters, the checkpoint is read after Lightning's own check."""
    limit = TimeLimit(1.0)
    limit.load_state_dict({"time_elapsed": {"train": 61.0}})
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(global_step=5, should_stop=False, strategy=strategy, lr_scheduler_configs=[])
    limit.on_train_start(trainer, Module())
    assert trainer.should_stop
