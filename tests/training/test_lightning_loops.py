"""Lightning's trainer has every attribute that `keygrip.training.lightning_loops` uses, with the meaning expected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from keygrip.training import lightning_loops

BATCHES = 5  # of an epoch


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Exception):
    pass


def fit(*callbacks: Callback, max_epochs: int = 2, checkpoint: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    data = DataLoader(torch.ones(BATCHES, 1)), DataLoader(torch.ones(3, 1))
    trainer.fit(Line(), *data, ckpt_path=checkpoint)
    return trainer


class Positions(Callback):
    """Records the position at the start and at the end of each batch, and validates as `validate` says."""

    def __init__(self, validate: Callable[[int], bool] = lambda batches: False) -> None:
        self.validate = validate
        self.begun: list[tuple[int, int]] = []
        self.ended: list[tuple[int, int]] = []
        self.last: list[bool] = []
        self.stepped: list[tuple[bool, bool]] = []  # as said, and as it was
        self.validated: list[int] = []
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not lightning_loops.training_is_done(trainer)
        assert (lightning_loops.batches_begun(trainer), lightning_loops.batches_done(trainer)) == (0, 0)
        lightning_loops.plan_validation(trainer, now=False)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.begun.append((lightning_loops.batches_begun(trainer), lightning_loops.batches_done(trainer)))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.ended.append((lightning_loops.batches_begun(trainer), lightning_loops.batches_done(trainer)))
        self.last.append(lightning_loops.is_last_batch(trainer))
        self.stepped.append((lightning_loops.completes_step(trainer), trainer.global_step > self._steps))
        self._steps = trainer.global_step
        lightning_loops.plan_validation(trainer, now=self.validate(lightning_loops.batches_begun(trainer)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(lightning_loops.batches_begun(trainer))


def test_batches_are_counted_from_the_start_of_training() -> None:
    positions = Positions()
    trainer = fit(positions)
    numbers = range(1, 2 * BATCHES + 1)
    assert positions.begun == [(number, number - 1) for number in numbers]
    assert positions.ended == [(number, number) for number in numbers]
    assert positions.last == [number % BATCHES == 0 for number in numbers]
    assert lightning_loops.training_is_done(trainer)


def test_a_step_ends_with_the_last_of_its_batches() -> None:
    """Also at the end of an epoch, with fewer of them."""
    positions = Positions()
    fit(positions, accumulate_grad_batches=2)
    assert positions.stepped == [(stepped, stepped) for stepped in [False, True, False, True, True] * 2]


def test_validation_follows_the_batches_that_are_planned() -> None:
    positions = Positions(validate=lambda batches: batches in (2, 7, 8))
    fit(positions, check_val_every_n_epoch=None, val_check_interval=1)
    assert positions.validated == [2, 7, 8]


class StopInValidation(Callback):
    """Compares the progress with that at the end of the batch before, and stops."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.before = copy.deepcopy(trainer.fit_loop.state_dict())

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        during = trainer.fit_loop.state_dict()
        assert during != self.before
        lightning_loops.undo_validation(trainer)
        self.after = trainer.fit_loop.state_dict()
        raise Stop


def test_a_validation_that_is_undone_leaves_the_progress_of_the_last_batch() -> None:
    stop = StopInValidation()
    with pytest.raises(Stop):
        fit(stop, val_check_interval=2)
    assert stop.after == stop.before


class SaveAt(Callback):
    """Saves at the end of some batches; `counted`: as keygrip's runs, with the epochs counted that are resumed."""

    def __init__(self, file: Path, at: int, counted: bool = True) -> None:
        self.file, self.at, self.counted = file, at, counted
        self.epochs: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.counted:
            lightning_loops.count_resumed_epoch(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.epochs.append(trainer.fit_loop.epoch_progress.current.ready)
        if lightning_loops.batches_begun(trainer) == self.at:
            trainer.save_checkpoint(self.file)
            raise Stop


@pytest.mark.parametrize("counted", [True, False])
def test_an_epoch_that_begins_at_a_resume_is_counted(counted: bool, tmp_path: Path) -> None:
    """Not counted by Lightning itself: where it counts it, `count_resumed_epoch` is no longer needed."""
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    with pytest.raises(Stop):
        fit(SaveAt(first, at=BATCHES), max_epochs=3)
    resumed = SaveAt(second, at=BATCHES + 2, counted=counted)
    with pytest.raises(Stop):
        fit(resumed, max_epochs=3, checkpoint=first)
    assert resumed.epochs == ([2, 2] if counted else [1, 1])
