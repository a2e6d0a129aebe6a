"""TensorBoard and W&B receive the same: settings, images, text, one W&B run for each run folder."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader

from keygrip import train
from keygrip.config import compose
from keygrip.training import loggers
from keygrip.training.loss_curves import STEP_TFLOP
from keygrip.training.monitors import GradientNorm
from keygrip.training.signals import Interrupted

IMAGE = np.full((4, 5, 3), 7, np.uint8)


class WandbLogger:
    """The interface of Lightning's logger of that name, as far as it is used here."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []

    @property
    def experiment(self) -> Any:
        raise RuntimeError("a run is begun where it is asked for")

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.calls.append(("settings", params))

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        self.calls.append((key, images[0].shape, step))

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.calls.append((key, data[0][0], step))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def test_wandb_gets_settings_images_and_text_and_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [WandbLogger(id=loggers.wandb_id(tmp_path), resume="allow")]
    package = SimpleNamespace(run=made[0])
    monkeypatch.setitem(sys.modules, "wandb", package)
    loggers.log_settings(made, {"model": {"width": 3, "sizes": [1, 2]}, "seed": 0})
    loggers.log_image(made, "val/x", IMAGE, 5)
    loggers.log_text(made, "val/y", "words", 5)
    assert loggers.takes_images(made)
    loggers.finish(made, failed=False)
    package.run = None
    loggers.finish(made, failed=True)  # none was started
    settings = ("settings", {"model.width": 3, "model.sizes": "[1, 2]", "seed": 0})
    assert made[0].calls == [settings, ("val/x", (4, 5, 3), 5), ("val/y", "words", 5), ("finish", 0)]


def test_loggers_get_no_password_of_an_address(tmp_path: Path) -> None:
    wandb, board = WandbLogger(), TensorBoardLogger(tmp_path, name="", version="board")
    data = {"root": "https://me:secret@host/set", "roots": ["s3://b/x@y", "https://secret@host"]}
    loggers.log_settings([wandb, board], {"data": data})
    board.finalize("success")
    shown = {"data.root": "https://host/set", "data.roots": "['s3://b/x@y', 'https://host']"}
    assert wandb.calls == [("settings", shown)]
    files = [path.read_bytes() for path in (tmp_path / "board").iterdir()]
    assert len(files) == 2
    for content in files:
        assert b"https://host/set" in content
        assert b"secret" not in content


@pytest.mark.parametrize("signal_name", [None, "SIGTERM"])
def test_wandb_is_told_whether_a_run_came_to_its_end(
    signal_name: str | None, toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    monkeypatch.setattr("keygrip.training.fit.finish", lambda _, failed: found.append(failed))
    if signal_name is None:
        train.run(compose("train", toy_overrides("run", "max_steps=2")))
    else:
        monkeypatch.setenv("TOY_STOP_AT", "1")
        monkeypatch.setenv("TOY_SIGNAL", signal_name)
        with pytest.raises(Interrupted):
            train.run(compose("train", toy_overrides("run", "max_steps=2")))
    assert found == [signal_name is not None]


def test_a_wandb_run_is_finished_where_its_job_fails_before_training(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise Lightning's logger of the sweep's next job would log into it."""
    begun, found = WandbLogger(), []
    monkeypatch.setattr("keygrip.training.fit.build_loggers", lambda *_: [begun])
    monkeypatch.setattr("keygrip.training.fit.finish", lambda made, failed: found.append((made, failed)))

    def refused(*_: object) -> None:
        raise ValueError("no such monitor")

    monkeypatch.setattr("keygrip.training.fit.ValidateBySteps", refused)
    with pytest.raises(ValueError, match="no such monitor"):
        train.run(compose("train", toy_overrides("run")))
    assert [name for name, _ in begun.calls] == ["settings"]
    assert found == [([begun], True)]


def test_a_run_folder_keeps_its_wandb_run(tmp_path: Path) -> None:
    first = loggers.wandb_id(tmp_path / "a")
    assert loggers.wandb_id(tmp_path / "a") == first  # the resumed run
    assert loggers.wandb_id(tmp_path / "b") != first  # the next job of a sweep


def test_another_process_of_a_run_does_not_change_its_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert loggers.wandb_id(tmp_path)  # it came first, but writes nothing
    monkeypatch.setenv("RANK", "0")
    first = loggers.wandb_id(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert loggers.wandb_id(tmp_path) == first


def test_wandb_that_is_not_installed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "_installed", lambda package: False)
    group = OmegaConf.create({"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger"}})
    with pytest.raises(ValueError, match="pip install 'keygrip\\[wandb\\]'"):
        loggers.refuse_missing_packages(group)
    left_out = OmegaConf.create({"tensorboard": None})  # logger.tensorboard=null
    loggers.refuse_missing_packages(left_out)
    assert loggers.build_loggers(left_out, tmp_path, 0) == []


def test_tensorboard_gets_settings_images_and_the_gradient_norm(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    train.run(compose("train", toy_overrides("run", "logger=tensorboard", "max_steps=4", "val_every_n_steps=4")))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    norms = events.Scalars("train/grad_norm")
    assert norms
    assert all(norm.value > 0 for norm in norms)
    settings = (tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text()
    assert "model.width: 8" in settings
    plugins = {tag: data.plugin_data.plugin_name for tag, data in events.summary_metadata.items()}
    assert plugins["_hparams_/session_start_info"] == "hparams"  # TensorBoard's table of runs
    started = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert started.hparams["model.width"].number_value == 8
    assert b"width: 8" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert not loggers.takes_images([])


@pytest.mark.parametrize("stop_at", [7, 8])
def test_a_resumed_run_keeps_its_table(
    stop_at: int, toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a killed run logged after its last checkpoint also appear only once."""
    import toy_parts

    whole_step = toy_parts.ToyModule.training_step

    def failing_step(self: toy_parts.ToyModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == stop_at:
            raise RuntimeError("power cut")
        return whole_step(self, batch, batch_idx)

    def logged(name: str) -> list[tuple[str, ...]]:
        with (tmp_path / name / "csv" / "metrics.csv").open(newline="") as file:
            return [
                (row["step"], row["train/loss"], row["val/loss"], row["lr-AdamW/rest"]) for row in csv.DictReader(file)
            ]

    settings = ("logger=csv", "callbacks.checkpoint.every_n_steps=4", "callbacks.throughput=null")
    train.run(compose("train", toy_overrides("whole", *settings)))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(toy_parts.ToyModule, "training_step", failing_step)
        train.run(compose("train", toy_overrides("cut", *settings)))
    train.run(compose("train", toy_overrides("cut", *settings, "resume=true")))
    assert logged("cut") == logged("whole")


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        pytest.param("loss,step\n0.5,0\n0.4,1\n0.3,2\n", ["loss,step", "0.5,0", "0.4,1"], id="whole"),
        pytest.param("loss,step,x\n0.5,0,1\n0.4", ["loss,step,x", "0.5,0,1"], id="torn"),
        pytest.param("loss,step\n0.5,0\n0.4,1", ["loss,step", "0.5,0"], id="torn in its last number"),
        pytest.param("loss,step,x\n0.4\n0.5,0,1\n", ["loss,step,x", "0.5,0,1"], id="torn and written behind"),
        pytest.param("loss,step\n0.5,0,7\n0.4,1\n", ["loss,step", "0.4,1"], id="surplus"),
        pytest.param("", None, id="empty"),
        pytest.param("loss\n0.5\n", None, id="no steps"),
    ],
)
def test_a_killed_runs_table_keeps_its_whole_rows(
    content: str, kept: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(content)
    logger = CSVLogger(tmp_path, name="", version="")
    loggers._keep_table(logger, resumed_step=2)
    assert ("torn rows" in caplog.text) == ("x\n0.4\n" in content or ",7" in content)
    assert ("begins anew" in caplog.text) == (kept is None)
    logger.log_metrics({"loss": 0.1}, step=2)
    logger.save()
    written = file.read_text().splitlines()
    assert written[0].split(",")[:2] == ["loss", "step"]
    assert written[1:-1] == ([] if kept is None else kept[1:])
    assert written[-1].startswith("0.1,2")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_rows_of_callbacks_at_the_resumed_step_are_kept(tmp_path: Path) -> None:
    """Callbacks number their rows by the steps that are done. What is logged once the next step has begun comes again
    in the resumed run."""
    file = tmp_path / "metrics.csv"
    names = "epoch,step,train/loss,speed/samples_per_s,closed_loop/all/success_rate,lr-AdamW,health/gap,train/grad_norm"
    kept = [f"{names},{STEP_TFLOP}", ",1,,,,0.1,,,", "0,1,0.5,,,,,,", ",2,,90.0,,,,,", ",2,,,0.75,,,,"]
    again = ["0,2,0.4,,,,,,", ",2,,,,0.1,,,", ",2,,,,,0.3,,", ",2,,,,,,0.9,", ",2,,,,,,,0.7", ",3,,80.0,,,,,"]
    file.write_text("\n".join([*kept, *again, ""]))
    loggers._keep_table(CSVLogger(tmp_path, name="", version=""), resumed_step=2)
    assert file.read_text().splitlines() == kept


def test_figures_measured_again_at_the_last_step_replace_the_earlier_ones(tmp_path: Path) -> None:
    """A finished run that is resumed without further steps repeats the evaluation after training."""

    def run(resumed_step: int, figures: dict[str, float], step: int) -> list[tuple[str, ...]]:
        logger = CSVLogger(tmp_path, name="", version="")
        if resumed_step:
            loggers._keep_table(logger, resumed_step)
        else:
            logger.log_metrics({"epoch": 0, "train/loss": 0.5}, step=1)
            logger.log_metrics({"speed/samples_per_s": 90.0}, step=2)
        loggers.log_final_figures([logger], figures, step)
        logger.finalize("success")
        with (tmp_path / "metrics.csv").open(newline="") as file:
            names = ("step", "speed/samples_per_s", "closed_loop/a/success_rate", "closed_loop/b/success_rate")
            return [tuple(row.get(name, "") for name in names) for row in csv.DictReader(file)]

    rate = "closed_loop/{}/success_rate".format
    others = [("1", "", "", ""), ("2", "90.0", "", "")]
    assert run(0, {rate("a"): 0.25, rate("b"): 0.5}, 2) == [*others, ("2", "", "0.25", "0.5")]
    assert run(2, {rate("a"): 0.75}, 2) == [*others, ("2", "", "0.75", "")]
    assert run(2, {rate("a"): 1.0}, 3) == [*others, ("2", "", "0.75", ""), ("3", "", "1.0", "")]  # a longer run


def test_a_resumed_run_that_is_killed_at_its_start_keeps_its_table(tmp_path: Path) -> None:
    class Killed(CSVLogger):
        @property
        def experiment(self) -> Any:
            (tmp_path / "metrics.csv").unlink()
            raise KeyboardInterrupt

    (tmp_path / "metrics.csv").write_text("loss,step\n0.5,0\n0.4,1\n0.3,2\n")
    with pytest.raises(KeyboardInterrupt):
        loggers._keep_table(Killed(tmp_path, name="", version=""), resumed_step=2)
    loggers._keep_table(CSVLogger(tmp_path, name="", version=""), resumed_step=2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["loss,step", "0.5,0", "0.4,1"]


def test_rows_laid_aside_do_not_hide_a_table_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.before_resume.csv").write_text("loss,step\n0.5,0\n")
    (tmp_path / "metrics.csv").write_text("loss,step\n0.5,0\n0.4,1\n")
    loggers._keep_table(CSVLogger(tmp_path, name="", version=""), resumed_step=2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["loss,step", "0.5,0", "0.4,1"]


def test_an_integer_that_no_float_holds_is_text_among_the_settings(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="")
    loggers.log_settings([board], {"seed": 10**400, "width": 10**300})
    board.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (shown["seed"].string_value, shown["width"].number_value) == (str(10**400), 1e300)


class Growing(LightningModule):
    """The gradient at step n, counted from 1, is n."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return (self.weight * (self.global_step + 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def norms_of_ten_steps(folder: Path, every_n_steps: int, batches: int) -> list[tuple[int, float]]:
    """Train for ten steps with log_every_n_steps=3 and return the steps and norms in the table."""
    trainer = Trainer(
        max_steps=10,
        log_every_n_steps=3,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[GradientNorm(every_n_steps)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Growing(), DataLoader(torch.zeros(batches, 1)))
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["train/grad_norm"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize("batches", [2, 4, 100])
def test_the_gradient_norm_is_that_of_the_step_beside_it(batches: int, tmp_path: Path) -> None:
    """This also holds where epochs are shorter than the logging interval."""
    assert norms_of_ten_steps(tmp_path, 3, batches) == [(2, 3.0), (5, 6.0), (8, 9.0)]


@pytest.mark.parametrize("interval", [1, 4, 6])
def test_the_gradient_norm_is_written_at_its_own_interval(interval: int, tmp_path: Path) -> None:
    """Not at that of the loggers, 3, and no value twice."""
    steps = range(interval, 11, interval)
    assert norms_of_ten_steps(tmp_path, interval, 100) == [(step - 1, float(step)) for step in steps]
