"""After any interruption, a run continues to the same weights as without it."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from keygrip import train
from keygrip.config import compose
from keygrip.training import run_folder
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.ema import EMA
from keygrip.training.fit import TrainedMetrics
from keygrip.training.results import read_result, write_result
from keygrip.training.resuming import differing_settings
from keygrip.training.saving import AtomicCheckpointIO, SaveLatest, SaveOnInterrupt
from keygrip.training.signals import Interrupted

EPOCHS = ("max_steps=-1", "max_epochs=2")  # ten steps
# The environment variables of a SLURM job of one task.
SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"} | {
    f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID", "STEP_ID")
}


def state_of(folder: Path) -> dict[str, Tensor]:
    """Return weights, EMA weights and optimizer state of a run, by name."""
    checkpoint = read_checkpoint(folder)
    state = dict(checkpoint["state_dict"])
    state |= {f"ema.{name}": value for name, value in checkpoint["ema"]["parameters"].items()}
    for number, entry in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    state["lr"] = torch.tensor(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"], dtype=torch.float64)
    state["updates"] = torch.tensor(checkpoint["ema"]["updates"])
    return state


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    return {}


@pytest.fixture
def uninterrupted(
    trained: dict[str, Tensor], toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> dict[str, Tensor]:
    """Return the state of a run that is not interrupted; it is trained once."""
    if not trained:
        train.run(compose("train", toy_overrides("whole")))
        trained |= state_of(tmp_path / "whole")
    return trained


@pytest.mark.parametrize(
    ("stop_at", "saves"),
    [
        pytest.param(7, "callbacks.checkpoint.every_n_steps=3", id="mid-epoch"),
        pytest.param(11, "callbacks.checkpoint.every_n_steps=10", id="saved on the last batch of an epoch"),
        pytest.param(7, "callbacks.checkpoint.every_n_epochs=1", id="saved by epochs"),
        pytest.param(9, "callbacks.checkpoint.every_n_minutes=1e-9", id="saved by minutes"),
        pytest.param(6, "callbacks.checkpoint.every_n_steps=4", id="saved just before a validation"),
    ],
)
def test_a_failed_run_resumes_to_the_same_bits(
    stop_at: int,
    saves: str,
    toy_overrides: Callable[..., list[str]],
    uninterrupted: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import toy_parts

    whole_step = toy_parts.ToyModule.training_step

    def failing_step(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == stop_at:
            raise RuntimeError("power cut")
        now[0] += 1
        return whole_step(self, batch, batch_idx)

    now = [0.0]  # seconds, one per step; saving takes no time
    overrides = toy_overrides("cut", saves)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr("keygrip.training.saving.time", SimpleNamespace(monotonic=lambda: now[0]))
        patch.setattr(toy_parts.ToyModule, "training_step", failing_step)
        train.run(compose("train", overrides))
    assert read_checkpoint(tmp_path / "cut")["global_step"] < 13
    train.run(compose("train", [*overrides, "resume=true"]))
    assert_equal(state_of(tmp_path / "cut"), uninterrupted)


def test_a_resumed_run_holds_no_tensor_of_its_checkpoint_file(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space of a replaced file is not freed while one of its tensors is mapped."""
    import toy_parts

    loaded: list[dict[str, Any]] = []
    used: set[int] = set()
    load, step = AtomicCheckpointIO.load_checkpoint, toy_parts.ToyModule.training_step

    def recording_load(self: AtomicCheckpointIO, *args: Any, **options: Any) -> dict[str, Any]:
        loaded.append(load(self, *args, **options))
        return loaded[-1]

    def recording_step(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        callback = next(each for each in self.trainer.callbacks if isinstance(each, EMA))
        state = [value for each in self.trainer.optimizers[0].state.values() for value in each.values()]
        tensors = [*self.state_dict().values(), *callback._ema.values(), *state]
        used.update(value.untyped_storage().data_ptr() for value in tensors)
        return step(self, batch, batch_idx)

    train.run(compose("train", toy_overrides("run", "max_steps=4")))
    monkeypatch.setattr(AtomicCheckpointIO, "load_checkpoint", recording_load)
    monkeypatch.setattr(toy_parts.ToyModule, "training_step", recording_step)
    train.run(compose("train", toy_overrides("run", "max_steps=6", "resume=true")))
    (content,) = loaded
    moments = [value for each in content["optimizer_states"][0]["state"].values() for value in each.values()]
    stored = [*content["state_dict"].values(), *content["ema"]["parameters"].values(), *moments]
    assert len(moments) == 3 * 4
    assert {value.untyped_storage().data_ptr() for value in stored}.isdisjoint(used)


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training step after `step` optimizer steps fail."""
    import toy_parts

    whole_step = toy_parts.ToyModule.training_step

    def failing_step(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == step:
            raise RuntimeError("power cut")
        return whole_step(self, batch, batch_idx)

    monkeypatch.setattr(toy_parts.ToyModule, "training_step", failing_step)


@pytest.mark.parametrize("stops", [(7, 12), (5, 7, 11), (10, 12)])
def test_a_run_that_is_limited_by_epochs_and_fails_several_times_trains_them_once(
    stops: tuple[int, ...], toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 steps per epoch; every state is saved on the last batch of an epoch, or in the next epoch."""
    limits = ("max_steps=-1", "max_epochs=4", "val_every_n_steps=null", "callbacks.checkpoint.every_n_epochs=1")
    train.run(compose("train", toy_overrides("whole", *limits)))
    overrides = toy_overrides("cut", *limits, "callbacks.checkpoint.every_n_steps=6")
    for number, stop in enumerate(stops):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            fail_at(patch, stop)
            train.run(compose("train", [*overrides, f"resume={number > 0}"]))
    result = train.run(compose("train", [*overrides, "resume=true"]))
    assert read_result(tmp_path / "cut")["steps"] == 20
    assert_equal(state_of(tmp_path / "cut"), state_of(tmp_path / "whole"))
    assert result["val/error"] == read_result(tmp_path / "whole")["metrics"]["val/error"]
    before = (tmp_path / "cut" / "checkpoints" / "last.ckpt").read_bytes()
    train.run(compose("train", [*overrides, "resume=true"]))
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert read_result(tmp_path / "cut")["steps"] == 20


def test_the_position_of_the_data_is_known_before_the_trainer_restores_it(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded parameters, Lightning may make the first iterator before it reads the checkpoint."""
    import toy_parts

    train.run(compose("train", toy_overrides("run", "max_steps=7")))
    calls: list[Any] = []
    monkeypatch.setattr(toy_parts.ToyData, "begin_from", lambda _, state: calls.append(state), raising=False)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: calls.append("fit"))
    train.run(compose("train", [*toy_overrides("run"), "resume=true"]))
    assert calls == [{"position": 7}, "fit"]


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(
    toy_overrides: Callable[..., list[str]],
    uninterrupted: dict[str, Tensor],
    command: Callable[..., object],
    tmp_path: Path,
) -> None:
    overrides = toy_overrides("killed", "callbacks.checkpoint.every_n_steps=3")
    done = command("keygrip.train", *overrides, TOY_STOP_AT="7", TOY_SIGNAL="SIGKILL")
    assert done.returncode == -signal.SIGKILL
    assert read_checkpoint(tmp_path / "killed")["global_step"] == 6
    train.run(compose("train", [*overrides, "resume=true"]))
    assert_equal(state_of(tmp_path / "killed"), uninterrupted)


@pytest.fixture
def terminal() -> Iterator[None]:
    """Set the default for SIGHUP, as without nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signal_saves_says_how_to_go_on_and_resumes_to_the_same_bits(
    name: str,
    toy_overrides: Callable[..., list[str]],
    uninterrupted: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    overrides = toy_overrides("stopped")
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setenv("TOY_STOP_AT", "7")
        patch.setenv("TOY_SIGNAL", name)
        train.run(compose("train", overrides))
    folder = tmp_path / "stopped"
    saved = folder / "checkpoints" / "last.ckpt"
    assert str(stop.value) == f"stopped by {name} at step 8: saved {saved}; continue with resume={folder}"
    assert stop.value.signal_number == getattr(signal, name)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    train.run(compose("train", [*overrides[:-1], f"resume={folder}"]))
    assert_equal(state_of(folder), uninterrupted)


@pytest.mark.parametrize(
    ("stop_at", "more"),
    [
        pytest.param("8 2", (), id="mid-epoch"),
        pytest.param("12 4", (), id="in the last batch of the last validation"),
        pytest.param("12 1", ("max_steps=12",), id="after the last step"),
        pytest.param("10 1", (*EPOCHS, "val_every_n_steps=null"), id="after the last epoch"),
        pytest.param("10 0", (*EPOCHS, "val_every_n_steps=5"), id="after the last step of the last epoch"),
        pytest.param("5 1", ("val_every_n_steps=5",), id="at the end of an epoch"),
        pytest.param("10 0", ("val_every_n_steps=null",), id="by epochs", marks=pytest.mark.slow),
        pytest.param("4 1", ("callbacks.checkpoint.every_n_steps=4",), id="saved before it", marks=pytest.mark.slow),
        pytest.param("4 1", ("accumulate_grad_batches=2", "val_every_n_steps=2", "data.samples=48"), id="accumulated"),
    ],
)
@pytest.mark.quick_sets(3)
def test_a_signal_in_a_validation_saves_the_step_before_it_and_resumes_to_the_same_bits(
    stop_at: str,
    more: tuple[str, ...],
    toy_overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    more = (*more, "callbacks.ema.decay=0.5")
    caplog.set_level("INFO", "keygrip")
    train.run(compose("train", toy_overrides("whole", *more)))
    overrides, step = toy_overrides("stopped", *more), stop_at.partition(" ")[0]
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step}: saved .*last.ckpt"):
        patch.setenv("TOY_STOP_IN_VALIDATION", stop_at)
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        train.run(compose("train", overrides))
    train.run(compose("train", [*overrides, "resume=true"]))
    assert_equal(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))
    metrics = [read_result(tmp_path / name)["metrics"] for name in ("stopped", "whole")]
    no_step_left = "max_steps=12" in more or "max_epochs=2" in more
    if not no_step_left:
        assert metrics[0]["train/loss"] == metrics[1]["train/loss"]
    # a validation that was cut off is repeated only if no step is left, as a step changes the weights
    left_out = step in ("10", "12") and not no_step_left
    assert metrics[0].get("val/error") == (None if left_out else metrics[1]["val/error"])
    assert (
        "no step is left, and no figures of the last validation are stored: validate" in caplog.text
    ) == no_step_left


def test_a_file_elsewhere_without_a_step_left_is_the_checkpoint_of_its_new_run(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    train.run(compose("train", [*toy_overrides("first"), "max_steps=4"]))
    file = tmp_path / "elsewhere" / "my.ckpt"
    file.parent.mkdir()
    file.write_bytes((tmp_path / "first/checkpoints/last.ckpt").read_bytes())
    overrides = [each for each in toy_overrides("x") if not each.startswith("run_dir=")]
    result = train.run(compose("train", [*overrides, "max_steps=4", f"resume={file}"]))
    assert result is not None
    found = read_result(file.parent)
    assert (found["status"], found["steps"]) == ("finished", 4)
    assert Path(found["checkpoint"]).read_bytes() == file.read_bytes()
    assert_equal(state_of(file.parent), state_of(tmp_path / "first"))


def test_the_last_validation_may_be_cut_off_several_times(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts

    def power_cut(*_: Any) -> None:
        raise RuntimeError("power cut")

    overrides = toy_overrides("run", *EPOCHS, "val_every_n_steps=null")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped by SIGTERM at step 10"):
        patch.setenv("TOY_STOP_IN_VALIDATION", "10 1")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        train.run(compose("train", overrides))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(toy_parts.ToyModule, "validation_step", power_cut)
        train.run(compose("train", [*overrides, "resume=true"]))

    def evaluate(_: Any, trainer: Any, module: Any) -> None:
        trainer.callback_metrics["closed_loop/success_rate"] = torch.tensor(0.75)

    monkeypatch.setattr(TrainedMetrics, "on_fit_end", evaluate, raising=False)  # an evaluation after training
    assert "val/error" in train.run(compose("train", [*overrides, "resume=true"]))
    result = read_result(tmp_path / "run")
    assert (result["status"], result["steps"]) == ("finished", 10)
    assert result["metrics"]["val/error"] > 0
    assert result["metrics"]["closed_loop/success_rate"] == 0.75


def test_a_run_without_a_validation_has_none_when_it_is_resumed(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = toy_overrides("run", *EPOCHS, "val_every_n_steps=11")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 10"):
        patch.setenv("TOY_STOP_AT", "9")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        train.run(compose("train", overrides))
    assert "val/error" not in train.run(compose("train", [*overrides, "resume=true"]))


def test_under_nohup_a_closed_terminal_is_nothing(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_STOP_AT", "7")
    monkeypatch.setenv("TOY_SIGNAL", "SIGHUP")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "train/loss" in train.run(compose("train", toy_overrides("run")))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_warning_that_another_process_got_queues_the_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM signals all processes of a step, and one may reach the end of its training step before its signal
    arrives."""
    queued: list[bool] = []
    monkeypatch.setattr("keygrip.training.saving.requeue_job", lambda: queued.append(True))
    monkeypatch.setattr("keygrip.training.saving.maximum_over_processes", lambda own: float(max(own, signal.SIGUSR1)))
    first = SimpleNamespace(is_global_zero=True, global_step=3, callbacks=[], validating=False)
    with pytest.raises(Interrupted, match="stopped by SIGUSR1 at step 3") as stop:
        SaveOnInterrupt()._stop_if_asked(first)  # type: ignore[arg-type]
    assert (stop.value.signal_number, queued) == (signal.SIGUSR1, [True])


def test_a_job_of_the_processes_launcher_leaves_queueing_again_to_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM would end the other jobs of the sweep before they have saved."""
    queued: list[bool] = []
    monkeypatch.setattr("keygrip.training.saving.requeue_job", lambda: queued.append(True))
    monkeypatch.setattr("keygrip.training.saving.is_launcher_process", lambda: True)
    only = SimpleNamespace(is_global_zero=True, global_step=3, callbacks=[], validating=False)
    with pytest.raises(Interrupted, match="stopped by SIGUSR1 at step 3"):
        SaveOnInterrupt()._stop(only, signal.SIGUSR1)  # type: ignore[arg-type]
    assert queued == []


@pytest.fixture
def started_by_slurm(
    toy_overrides: Callable[..., list[str]], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """Train as a job of SLURM, whose scontrol writes its arguments into called.txt; the function takes overrides and
    returns the exit code."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> called.txt\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)

    def start(*more: str) -> int:
        for names in (run_folder.run_name, run_folder._claimed):
            names.cache_clear()
        return int(cli(*(each for each in toy_overrides("", *more) if not each.startswith("run_dir="))).code)

    yield start
    for names in (run_folder.run_name, run_folder._claimed):
        names.cache_clear()


def test_a_slurm_job_that_is_warned_saves_is_queued_again_and_goes_on(
    started_by_slurm: Callable[[], int],
    uninterrupted: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TOY_STOP_AT", "7")
        patch.setenv("TOY_SIGNAL", "SIGUSR1")
        assert started_by_slurm() == 128 + signal.SIGUSR1
    assert (tmp_path / "called.txt").read_text() == "requeue 42\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started_by_slurm() == 0
    (folder,) = (tmp_path / "runs" / "toy_toy").iterdir()
    assert not list(folder.glob("hpc_ckpt*"))  # Lightning's checkpoint, which no resumed run reads
    assert_equal(state_of(folder), uninterrupted)


@pytest.mark.parametrize("keep", [1, 9])
def test_a_job_that_began_from_a_checkpoint_file_goes_on_from_its_own_latest(
    started_by_slurm: Callable[..., int],
    toy_overrides: Callable[..., list[str]],
    uninterrupted: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: int,
) -> None:
    """Its saves have removed the file, or (`keep`) not yet. The run had been trained further before."""
    folder = tmp_path / "run"
    saves = "callbacks.checkpoint.every_n_steps=2"
    train.run(compose("train", toy_overrides("run", saves, "callbacks.checkpoint.keep=9")))
    file = folder / "checkpoints" / "step-00000004.ckpt"
    job = (saves, f"callbacks.checkpoint.keep={keep}", f"resume={file}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its first start ended before it saved
    with monkeypatch.context() as patch:
        patch.setenv("TOY_STOP_AT", "7")
        patch.setenv("TOY_SIGNAL", "SIGUSR1")
        assert started_by_slurm(*job) == 128 + signal.SIGUSR1
    assert read_checkpoint(folder)["global_step"] == 8
    assert file.is_file() == (keep == 9)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert started_by_slurm(*job) == 0
    assert f"resuming {folder / 'checkpoints' / 'last.ckpt'} at step 8" in (folder / "train.log").read_text()
    assert_equal(state_of(folder), uninterrupted)
    assert read_result(folder)["resumed_by"] == f"job 42 with resume={file}"


def test_a_job_that_resumed_the_newest_run_goes_on_with_that_run(
    started_by_slurm: Callable[..., int],
    toy_overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = tmp_path / "runs" / "toy_toy"
    with monkeypatch.context() as patch:
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        patch.setenv("TOY_STOP_AT", "3")
        with pytest.raises(Interrupted, match="at step 4"):
            train.run(compose("train", toy_overrides("runs/toy_toy/a")))
        shutil.copytree(runs / "a", tmp_path / "b")
        patch.setenv("TOY_SIGNAL", "SIGUSR1")
        patch.setenv("TOY_STOP_AT", "7")
        assert started_by_slurm("resume=true") == 128 + signal.SIGUSR1
    (tmp_path / "b").rename(runs / "b")
    other = read_result(runs / "b")
    write_result(runs / "b", other | {"started_at": other["started_at"] + 9})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started_by_slurm("resume=true") == 0
    assert [read_checkpoint(runs / name)["global_step"] for name in ("a", "b")] == [13, 4]


def test_a_slurm_job_that_is_warned_before_it_trains_is_queued_again(
    started_by_slurm: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training it may import classes, train a pretraining stage, or compute statistics for hours."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("keygrip.training.fit.complete_stages", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
            assert started_by_slurm() == 128 + signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "called.txt").read_text() == "requeue 42\n"
    (folder,) = (tmp_path / "runs" / "toy_toy").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started_by_slurm() == 0
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("limits", [(), ("max_steps=-1", "max_epochs=2")], ids=["by steps", "by epochs"])
def test_a_run_cut_off_after_its_training_keeps_the_metrics_of_it(
    limits: tuple[str, ...],
    toy_overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import toy_parts

    def power_cut(self: toy_parts.ToyModule) -> None:
        raise RuntimeError("power cut")

    whole = train.run(compose("train", toy_overrides("whole", *limits)))
    overrides = toy_overrides("cut", *limits)
    for resume in (False, True):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(toy_parts.ToyModule, "on_fit_end", power_cut, raising=False)
            train.run(compose("train", [*overrides, f"resume={resume}"]))
    cut = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert cut["metrics"]["train/loss"] == whole["train/loss"]
    resumed = train.run(compose("train", [*overrides, "resume=true"]))
    assert resumed.keys() == whole.keys()
    assert resumed["tflop"] == whole["tflop"] > 0
    losses = [name for name in whole if name.endswith("loss")]
    assert losses
    assert [resumed[name] for name in losses] == [whole[name] for name in losses]
    result = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["metrics"] == resumed


def test_metrics_of_a_shorter_training_are_not_kept(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    train.run(compose("train", toy_overrides("run")))
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"steps": 3, "metrics": {"stale": 1.0}}))
    assert "stale" not in train.run(compose("train", [*toy_overrides("run"), "resume=true"]))


@pytest.mark.parametrize("sweep", [False, True])
def test_ctrl_c_after_the_last_step_is_recorded(
    sweep: bool, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is left that would save, and Lightning turns the interruption into an exit with code 1."""

    def stop(callback: object, trainer: object, module: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("keygrip.training.fit.TrainedMetrics.on_fit_end", stop, raising=False)
    conf = str(Path(__file__).parents[1] / "support" / "conf")
    toy = ["--config-dir", conf, "model=toy", "data=toy", "strategy=cpu", "logger=none", "max_steps=2"]
    several = ["-m", "seed=0,1", "hydra.sweep.dir=run", "callbacks.checkpoint.every_n_steps=2"]
    done = cli(*toy, *(several if sweep else ["run_dir=run"]))
    assert done.code == 130
    assert "stopped by SIGINT" in done.err
    result = json.loads(Path("run/0/result.json" if sweep else "run/result.json").read_text())
    assert (result["status"], result["error"]) == ("interrupted", "stopped by SIGINT")
    if sweep:
        rows = Path("run/summary.csv").read_text().splitlines()
        assert "interrupted" in rows[1]
        assert "missing" in rows[2]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_in_the_last_save_ends_the_run_before_anything_is_evaluated(
    name: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, sent, evaluated, queued = SaveLatest.save, list[str](), list[int](), list[bool]()

    def long_save(self: SaveLatest, trainer: Trainer) -> None:
        saved(self, trainer)
        if trainer.global_step == 2 and not sent:
            sent.append(name)
            signal.raise_signal(getattr(signal, name))

    conf = str(Path(__file__).parents[1] / "support" / "conf")
    toy = ["--config-dir", conf, "model=toy", "data=toy", "strategy=cpu", "logger=none", "max_steps=2", "run_dir=run"]
    toy += ["callbacks.checkpoint.every_n_steps=2", "val_every_n_steps=null"]
    monkeypatch.setattr(
        "keygrip.training.fit.TrainedMetrics.on_fit_end",
        lambda self, trainer, module: evaluated.append(trainer.global_step),
        raising=False,
    )
    monkeypatch.setattr("keygrip.training.saving.requeue_job", lambda: queued.append(True))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(SaveLatest, "save", long_save)
        stopped = cli(*toy)
    assert (stopped.code, evaluated) == (128 + getattr(signal, name), [])
    run = Path("run").resolve()
    assert f"stopped by {name} at step 2: saved {run}/checkpoints/last.ckpt; continue with resume={run}" in stopped.err
    assert queued == ([True] if name == "SIGUSR1" else [])
    assert signal.getsignal(signal.SIGTERM) == before
    interrupted = read_result(Path("run"))
    assert interrupted["status"] == "interrupted"
    metrics = interrupted["metrics"]
    write_result(Path("run"), interrupted | {"wall_s": interrupted["wall_s"] + 1000})
    assert cli(*toy, "resume=true").code == 0
    assert 1000 <= read_result(Path("run"))["wall_s"] < 1500, "the time of all starts"
    assert evaluated == [2]
    assert read_result(Path("run"))["metrics"]["train/loss"] == metrics["train/loss"]


def test_metrics_of_a_finished_training_are_not_kept_where_it_goes_on(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    train.run(compose("train", toy_overrides("run")))
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"metrics": result["metrics"] | {"closed_loop/all/success_rate": 0.9}}))
    longer = train.run(compose("train", [*toy_overrides("run"), "resume=true", "max_steps=20"]))
    assert "closed_loop/all/success_rate" not in longer
    result = json.loads(path.read_text())
    assert (result["steps"], result["metrics"]) == (20, longer)


def test_resuming_with_other_settings_names_them(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    overrides = toy_overrides("run")
    train.run(compose("train", overrides))
    with pytest.raises(ValueError, match=r"other settings: model\.dropout \(0\.1 then, 0\.3 now\), .*optimizer\.lr"):
        train.run(compose("train", [*overrides, "resume=true", "model.dropout=0.3", "optimizer.lr=0.1"]))
    with pytest.raises(ValueError, match=r"already holds a run: continue it with resume=.*, or give another run_dir"):
        train.run(compose("train", overrides))


@pytest.mark.parametrize(
    "name",
    [
        *("geometry.cache.folder", "model.network.geometry.cache.folder", "geometry.cache.limit_gb"),
        *("model.network.geometry.cache.limit_gb", "data.max_skipped_share", "data.max_broken_share"),
        *("data.record.processes", "data.make.options.processes", "data.sources.tours.make.options.processes"),
        *("data.memory_gb", "data.root", "data.sources.tours.root", "strategy.reshard_after_forward"),
        *("model.log_images_every_n_steps", "model.shown", "model.monitor_from_step", "data.val_questions"),
    ],
)
def test_settings_that_change_no_weight_may_differ(name: str) -> None:
    def settings(value: Any, data: str = "keygrip.data.robot.datamodule.RobotDemos") -> dict[str, Any]:
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        return nested | {"data": nested.get("data", {}) | {"_target_": data}}

    assert differing_settings(settings("there"), settings("here")) == ""
    if name.endswith("root"):  # a root may differ only if both runs verify the contents
        for verified, before in ((False, True), (True, False), (False, False)):
            then, now = settings("there"), settings("here")
            then["data"]["verify"], now["data"]["verify"] = before, verified
            assert differing_settings(then, now | {"data": now["data"]}).startswith(name)
        assert name in differing_settings(settings("there"), settings("here"), finished=True)
        assert name in differing_settings(settings("there", "toy_parts.ToyData"), settings("here", "toy_parts.ToyData"))


@pytest.mark.parametrize(
    ("then", "now"), [({"caption": 0}, None), ({"caption": 0, "mark": 8}, {"mark": 8}), (None, {"mark": 8}), (16, 8)]
)
def test_other_questions_of_validation_may_be_chosen_when_a_run_is_resumed(then: Any, now: Any) -> None:
    """Earlier recipes set val_questions.caption=0 beside questions.caption=0, from which it follows now."""

    def settings(questions: Any, val_questions: Any) -> dict[str, Any]:
        return {"data": {"questions": questions, "val_questions": val_questions}}

    assert differing_settings(settings({"caption": 0}, then), settings({"caption": 0}, now)) == ""
    assert differing_settings(settings(then, None), settings(now, None)).startswith("data.questions")


@pytest.mark.parametrize(
    ("target", "maker"),
    [
        ("keygrip.data.robot.datamodule.RobotDemos", {"record": {"folder": "a", "demos": 4}}),
        ("keygrip.data.image_text.datamodule.ImageShards", {"make": {"options": {"train": 32}}}),
    ],
)
def test_generated_data_may_have_moved(target: str, maker: dict[str, Any]) -> None:
    """How they are made is not read if data.root names them; the contents are compared by hashes."""

    def settings(root: str | None, made: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"_target_": target, "root": root, **made}}

    assert differing_settings(settings(None, maker), settings("moved", {})) == ""
    assert differing_settings(settings("moved", {}), settings("again", maker)) == ""
    (name,) = maker
    assert differing_settings(settings(None, maker), settings(None, {})).startswith(f"data.{name}.")
    unverified = settings("moved", {"verify": False})
    assert differing_settings(settings(None, maker), unverified).startswith(f"data.{name}.")


def test_stages_that_counted_batches_may_be_given_in_optimizer_steps() -> None:
    """An earlier version counted batches; the order of samples stays the same and is compared by its fingerprint."""

    def settings(*steps: int, accumulated: int = 4) -> dict[str, Any]:
        stages = [{"weights": {"easy": 1.0}, "steps": each} for each in steps] + [{"weights": {"hard": 1.0}}]
        return {"data": {"curriculum": stages}, "accumulate_grad_batches": accumulated}

    assert differing_settings(settings(8, 40), settings(2, 10)) == ""
    assert differing_settings(settings(8, 40), settings(2, 10), finished=True).startswith("data.curriculum")
    for now in (settings(2, 11), settings(8, 41), settings(2)):
        assert differing_settings(settings(8, 40), now).startswith("data.curriculum")
    assert "data.curriculum" in differing_settings(settings(8, accumulated=1), settings(2, accumulated=1))


def test_a_run_from_before_there_was_a_setting_goes_on_with_its_default() -> None:
    network = {"_target_": "keygrip.models.foveated_vlm.network.FoveatedVLM", "query_std": 1.0}
    earlier = {"model": {"network": network}}

    def differing(**added: object) -> str:
        return differing_settings(earlier, {"model": {"network": network | added}})

    assert differing(published_projections=False, query_bias=False) == ""
    assert differing(published_projections=True).startswith("model.network.published_projections")
    assert differing(no_such_setting=False).startswith("model.network.no_such_setting")
    later = {"model": {"network": network | {"published_projections": True}}}
    assert differing_settings(later, earlier).startswith("model.network.published_projections")
    plain = {"model": {"depth": 1}}, {"model": {"depth": 1, "width": 3}}
    assert differing_settings(*plain).startswith("model.width"), "no class says its default"


def test_a_longer_run_goes_on_from_a_finished_one_along_its_own_cosine(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = toy_overrides("run", "optimizer.lr=1.0e-3", "optimizer.final_lr_share=0", "optimizer.warmup_steps=0")
    train.run(compose("train", overrides))
    with caplog.at_level("INFO"):
        train.run(compose("train", [*overrides, "resume=true", "max_steps=20", "callbacks.checkpoint.every_n_steps=4"]))
    assert "the cosine of a run of the new length: max_steps (13 then, 20 now)" in caplog.text
    assert read_checkpoint(tmp_path / "run")["global_step"] == 20
    rate = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000016.ckpt")["optimizer_states"][0]
    expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * 16 / 20))
    assert rate["param_groups"][0]["lr"] == pytest.approx(expected)


def test_accumulated_gradients_resume_to_the_same_bits(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = ("accumulate_grad_batches=2", "val_every_n_steps=2", "max_steps=8")
    train.run(compose("train", toy_overrides("whole", *accumulate)))
    overrides = toy_overrides("stopped", *accumulate)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 5"):
        patch.setenv("TOY_STOP_AT", "4")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        train.run(compose("train", overrides))
    train.run(compose("train", [*overrides, "resume=true"]))
    assert_equal(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))


def test_the_best_state_is_kept_beside_the_latest(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    overrides = toy_overrides("run", "callbacks.checkpoint.monitor=val/loss", "optimizer.lr=0.05")
    train.run(compose("train", overrides))
    folder = tmp_path / "run" / "checkpoints"
    record = json.loads((folder / "best.json").read_text())
    assert read_checkpoint(folder / "best.ckpt")["global_step"] == record["step"]
    # From a record that nothing can beat, the resumed run must leave the best state alone.
    (folder / "best.json").write_text(json.dumps({"val/loss": 0.0, "step": record["step"]}))
    before = (folder / "best.ckpt").read_bytes()
    train.run(compose("train", [*overrides, "resume=true", "max_steps=20"]))
    assert (folder / "best.ckpt").read_bytes() == before
    with pytest.raises(ValueError, match=r"monitor='val/los' is not logged in validation; logged: .*val/loss"):
        train.run(compose("train", toy_overrides("other", "callbacks.checkpoint.monitor=val/los")))


def test_a_validation_without_training_leaves_a_better_state_alone(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped in its last validation has no step left, and only validates when it is resumed."""
    monitor = ("callbacks.checkpoint.monitor=val/loss", "max_steps=12")
    overrides = toy_overrides("run", *monitor)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 12"):
        patch.setenv("TOY_STOP_IN_VALIDATION", "12 1")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        train.run(compose("train", overrides))
    folder = tmp_path / "run" / "checkpoints"
    record = json.loads((folder / "best.json").read_text())
    (folder / "best.json").write_text(json.dumps({"val/loss": 0.0, "step": record["step"]}))
    before = (folder / "best.ckpt").read_bytes()
    train.run(compose("train", [*overrides, "resume=true"]))
    assert (folder / "best.ckpt").read_bytes() == before
    assert json.loads((folder / "best.json").read_text())["val/loss"] == 0.0


def test_an_interruption_travels_between_processes() -> None:
    stopped = Interrupted("stopped by SIGINT", signal.SIGINT)
    again = pickle.loads(pickle.dumps(stopped))
    assert (str(again), again.signal_number) == ("stopped by SIGINT", signal.SIGINT)
