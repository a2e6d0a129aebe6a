from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from keygrip import train
from keygrip.config import compose
from keygrip.data.bad_samples import BadSamples
from keygrip.training.progress import Progress, SkippedSamples, Throughput


def trainer_of(loggers: list[Any], complete: bool) -> SimpleNamespace:
    """Return what the callbacks read of a trainer; `complete`: the batch completes an optimizer step."""
    epoch_loop = SimpleNamespace(_should_accumulate=lambda: not complete)
    return SimpleNamespace(loggers=loggers, global_step=1, fit_loop=SimpleNamespace(epoch_loop=epoch_loop))


def test_waiting_for_data_is_measured(toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_parts

    quick = toy_parts.ToyLoader.__iter__

    def slow(self: toy_parts.ToyLoader) -> Iterator[dict[str, Tensor]]:
        for batch in quick(self):
            if self.shuffled:
                time.sleep(0.05)
            yield batch

    monkeypatch.setattr(toy_parts.ToyLoader, "__iter__", slow)
    limits = ("limit_val_batches=0", "callbacks.throughput.every_n_steps=3", "callbacks.throughput.skip_batches=2")
    metrics = train.run(compose("train", toy_overrides("run", *limits)))
    assert metrics["data_wait_share"] > 0.5
    assert 0 < metrics["samples_per_s"] < 8 / 0.05


def test_saving_is_no_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("keygrip.training.progress.time.perf_counter", lambda: clock[0])
    throughput = Throughput(every_n_steps=2, skip_batches=0)
    trainer: Any = trainer_of([], complete=True)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for number in range(4):
        throughput.on_train_batch_start(trainer, module, torch.zeros(8), number)
        clock[0] += 1.0
        throughput.on_train_batch_end(trainer, module, None, torch.zeros(8), number)
        if number == 0:
            throughput.on_save_checkpoint(trainer, module, {})
            clock[0] += 50.0
    assert throughput.summary == {"samples_per_s": 8.0, "data_wait_share": 0.0}


def test_speed_is_logged_when_the_step_is_complete() -> None:
    """Otherwise its number would be that of the step before, which a checkpoint may already contain."""
    throughput = Throughput(every_n_steps=2, skip_batches=0)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    logged: list[int] = []
    for number in range(9):
        logger = SimpleNamespace(log_metrics=lambda figures, step, number=number: logged.append(number))
        trainer: Any = trainer_of([logger], complete=number % 3 == 2)
        throughput.on_train_batch_start(trainer, module, torch.zeros(8), number)
        throughput.on_train_batch_end(trainer, module, None, torch.zeros(8), number)
    assert logged == [2, 5, 8]
    assert throughput.total_samples == 8 * 8  # the first batch has no time before it


def test_figures_reach_the_loggers(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    train.run(compose("train", [*toy_overrides("run"), "logger=tensorboard", "callbacks.throughput.every_n_steps=2"]))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"train/loss", "val/loss", "speed/samples_per_s", "speed/data_wait_share", "lr-AdamW/rest"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.step for event in board.Scalars("lr-AdamW/rest")] == list(range(13))
    assert board.Scalars("lr-AdamW/rest")[1].value == pytest.approx(1e-3)


def skipped_board(overrides: list[str], folder: Path) -> EventAccumulator:
    train.run(compose("train", [*overrides, "logger=tensorboard", "limit_val_batches=0"]))
    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(["callbacks.skipped.every_n_steps=5"], [(5, 5.0), (10, 10.0)], id="one batch per step"),
        # the steps have 2, 2 and 1 batches per epoch; the steps with batch 4 and batch 8 are complete after 4 and 9
        pytest.param(
            ["callbacks.skipped.every_n_steps=4", "accumulate_grad_batches=2", "max_steps=6"],
            [(2, 4.0), (5, 9.0)],
            id="several batches per step",
        ),
    ],
)
def test_skipped_samples_are_counted_in_the_event_files(
    options: list[str],
    expected: list[tuple[int, float]],
    toy_overrides: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each training batch adds one here."""
    import toy_parts

    skipped = BadSamples(max_share=1.0)
    step = toy_parts.ToyModule.training_step

    def noted(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        skipped.add(8, ["broken"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy_parts.ToyModule, "training_step", noted)
    monkeypatch.setattr(toy_parts.ToyData, "skipped", skipped, raising=False)
    figures = skipped_board(toy_overrides("skipping", *options), tmp_path / "skipping").Scalars("data/skipped")
    assert [(event.step, event.value) for event in figures] == expected


def test_data_that_cannot_skip_samples_log_no_count(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    board = skipped_board(toy_overrides("plain", "callbacks.skipped.every_n_steps=5"), tmp_path / "plain")
    assert "data/skipped" not in board.Tags()["scalars"]


def test_lines_instead_of_a_bar_where_there_is_no_terminal(
    toy_overrides: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train.run(compose("train", toy_overrides("run", "callbacks.progress.line_every_s=0")))
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert len(lines) == 13
    assert lines[4].startswith("step 5/13, ")
    assert "loss=" in lines[4]


def test_intervals_must_be_positive() -> None:
    for callback in (Throughput, SkippedSamples):
        with pytest.raises(ValueError, match="every_n_steps"):
            callback(every_n_steps=0)
    with pytest.raises(ValueError, match=r"callbacks\.throughput\.skip_batches=-1: must be at least 0"):
        Throughput(skip_batches=-1)
    with pytest.raises(ValueError, match=r"callbacks\.progress\.refresh_s=-1: must be at least 0"):
        Progress(refresh_s=-1)


def test_a_batch_is_as_large_as_its_first_tensor() -> None:
    from keygrip.training.progress import _size

    batch = torch.zeros(6, 2)
    assert _size(batch) == _size({"names": ["a"], "x": batch}) == _size([batch]) == 6
