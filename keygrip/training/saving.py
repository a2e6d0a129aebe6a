"""When checkpoints are written, and how: whole or not at all, also when the process is killed."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from keygrip.artifacts import atomic_write, read_record, write_json
from keygrip.launch import queue_again
from keygrip.training.accumulation import completes_step
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.ema import EMA
from keygrip.training.integrity import sign
from keygrip.training.monitors import non_finite_parameters
from keygrip.training.parts import ReadWhere
from keygrip.training.run_folder import CHECKPOINT, kept_by_step
from keygrip.training.signals import Interrupted

log = logging.getLogger(__name__)

LATEST = CHECKPOINT.name
BEST = "best.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Writes whole files with their hash: a kill at any moment leaves the previous one, a changed byte is found."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint with its hash, whole or not at all."""
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            sign(Path(file.name))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As `read_checkpoint`: nothing stored is executed."""
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the file if it is there."""
        Path(path).unlink(missing_ok=True)


class SaveLatest(Checkpoint):
    """Keeps the latest state as ``last.ckpt``, the last few by step beside it, and optionally the best by a metric.

    ``step-00001000.ckpt`` and its like are the same files as ``last.ckpt`` was when they were saved (hard links where
    the file system has them), so that runs can be compared at equal steps.

    Saves at the end of training in any case, and by steps, epochs or minutes where those are given.

    Args:
        folder: where the files go.
        every_n_steps: optimiser steps between saves.
        every_n_epochs: epochs between saves.
        every_n_minutes: minutes between saves; what a kill -9 loses at most.
        monitor: name of a validation metric whose best state is kept as well; None: only the latest.
        mode: ``min`` or ``max``, which is better.
        keep: how many checkpoints by step stay; 0: ``last.ckpt`` alone.
    """

    read_where: ClassVar = {"mode": ReadWhere("monitor")}

    def __init__(
        self,
        folder: str,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        every_n_minutes: float | None = None,
        monitor: str | None = None,
        mode: str = "min",
        keep: int = 3,
    ) -> None:
        if keep < 0:
            raise ValueError(f"callbacks.checkpoint.keep={keep}: must be 0 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoint.mode={mode!r}: must be min or max")
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("every_n_epochs", every_n_epochs),
            ("every_n_minutes", every_n_minutes),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"callbacks.checkpoint.{name}={value}: must be above 0, or null for never")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.every_n_minutes = every_n_minutes
        self.monitor = monitor
        self.mode = mode
        self.keep = keep
        self.best: float | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def latest_path(self) -> Path:
        """Where the latest state is."""
        return self.folder / LATEST

    @property
    def best_path(self) -> Path:
        """Where the best state is, if one is kept."""
        return self.folder / BEST

    def save(self, trainer: Trainer) -> None:
        """Saves the latest state now, on all processes together.

        Raises:
            ValueError: the weights are NaN or infinite; the file on disk stays as it is.
        """
        if self._saved_step != trainer.global_step:
            _refuse_non_finite(trainer)
            trainer.save_checkpoint(self.latest_path, weights_only=False)
            if trainer.is_global_zero and self.keep:
                keep_by_step(self.latest_path, trainer.global_step, self.keep)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.global_step == 0:
            return
        try:
            step, best = self._best_before()
        except FileNotFoundError:  # there is none, or the first process has just removed it
            return
        if step <= trainer.global_step:
            self.best = best
        elif trainer.is_global_zero:
            log.warning("%s is removed: training goes on from an earlier step", self.best_path)
            self.best_path.unlink(missing_ok=True)
            self._best_record.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # Everything is saved here and not in the hooks of an epoch's end: from here Lightning resumes exactly, also
        # on the last batch of an epoch, whereas what is saved between epochs is resumed with an epoch cut short.
        if not completes_step(trainer):
            return  # in the middle of accumulating gradients: they would be lost
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        due = bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0
        due |= bool(self.every_n_epochs) and last_batch and epoch % (self.every_n_epochs or 1) == 0
        due |= step == trainer.max_steps or (last_batch and epoch == trainer.max_epochs) or trainer.should_stop
        if self.every_n_minutes is not None and (trainer.world_size == 1 or step % 10 == 0):
            late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
            due = _any_process(trainer, late) or due
        if due:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor!r} is not logged in validation; logged: {known}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if math.isfinite(value) and better:
            self.best = value
            trainer.save_checkpoint(self.best_path, weights_only=False)
            if trainer.is_global_zero:
                write_json(self._best_record, {self.monitor: value, "step": trainer.global_step}, indent=None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def _best_before(self) -> tuple[int, float | None]:
        """Step and value of the best state so far; no value: that of another metric.

        Raises:
            FileNotFoundError: there is no record of one. ValueError: it is damaged.
        """
        try:
            record = read_record(self._best_record)
            step, best = record.get("step"), record.get(self.monitor) if self.monitor else None
            if type(step) is not int or not (best is None or (isinstance(best, int | float) and math.isfinite(best))):
                raise ValueError(f"{self._best_record} is damaged: it holds no step, or no number")
        except ValueError as error:
            raise ValueError(f"{error}: remove it, and the next validation's state counts as the best") from error
        return step, best

    @property
    def _best_record(self) -> Path:
        """The best value so far: a resumed run must not put a worse state in the place of a better one."""
        return self.folder / "best.json"


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"step-{step:08d}.ckpt"


def keep_by_step(latest: Path, step: int, keep: int) -> None:
    """Keeps the file ``latest`` under its step too, and removes all but the last ``keep`` such files.

    Those of later steps are removed as well: they are of a training that was given up for an earlier checkpoint.
    """
    kept = step_path(latest.parent, step)
    for later in [file for number, file in kept_by_step(latest.parent).items() if number > step]:
        log.warning("%s is removed: training went on from an earlier step", later)
        later.unlink(missing_ok=True)
    kept.unlink(missing_ok=True)
    try:
        kept.hardlink_to(latest)
    except OSError:  # no hard links on this file system
        with atomic_write(kept) as file, latest.open("rb") as source:
            shutil.copyfileobj(source, file)
    for old in list(kept_by_step(latest.parent).values())[:-keep]:
        old.unlink(missing_ok=True)


class SaveOnInterrupt(Callback):
    """Ctrl-C, SIGTERM, SIGHUP of a terminal that is closed, and SIGUSR1, by which schedulers warn before they end a
    job: finish the step, or the batch of a validation, save, and say how to go on.

    What is saved in a validation is the state of the training step before it; a resumed run leaves that validation out.
    A second Ctrl-C ends at once; under nohup SIGHUP is nothing. Processes agree on the step or validation batch at
    which they stop: each must have equally many of these, as `keygrip.training.distributed.global_mean` wants too.
    A signal behind the last of these, as in the last save, ends the run before anything is evaluated after training.
    After SIGUSR1 a SLURM job is queued again; it then finds its run folder and goes on. With ``sbatch --requeue
    --signal=USR1@120`` SLURM sends it to what srun started, and not to other commands of the batch script.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = None
        for number in self.signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            with contextlib.suppress(ValueError):  # not the main thread
                self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if completes_step(trainer):
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking and completes_step(trainer):
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._received is not None:  # no process waits for another from here: they need not agree
            self._stop(trainer, self._received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received != signal.SIGUSR1:  # after which the job is queued again, whatever follows
            self._received = number
        log.warning("%s: finishing this step or validation batch, then saving", signal.Signals(number).name)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        number = _largest(trainer, self._received or 0)
        if number:
            self._stop(trainer, number)

    def _stop(self, trainer: Trainer, number: int) -> None:
        where = "nothing was saved: the run has no checkpoint callback"
        if trainer.validating:
            _leave_validation(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveLatest):
                callback.save(trainer)
                where = f"saved {callback.latest_path}; go on with resume={callback.folder.parent}"
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            queue_again()
        raise Interrupted(f"stopped by {signal.Signals(number).name} at step {trainer.global_step}: {where}", number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _leave_validation(trainer: Trainer) -> None:
    """Weights and progress as where the last training batch ended, from where Lightning resumes exactly; in the middle
    of a validation it would go on with a part of it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            callback.take_out(trainer.lightning_module)
    loop = trainer.fit_loop.epoch_loop
    loop.val_loop.batch_progress.reset()
    for progress in (loop.batch_progress.total, loop.batch_progress.current):
        progress.completed -= 1


def _refuse_non_finite(trainer: Trainer) -> None:
    broken = non_finite_parameters(trainer.lightning_module)
    if _any_process(trainer, bool(broken)):
        raise ValueError(
            f"weights became NaN or infinite before step {trainer.global_step} ({', '.join(broken[:3])}; "
            f"{len(broken)} in all): the last checkpoint is kept as it is; lower optimizer.lr or optimizer.clip_norm"
        )


def _any_process(trainer: Trainer, decision: bool) -> bool:
    return _largest(trainer, int(decision)) > 0


def _largest(trainer: Trainer, number: int) -> int:
    """The largest of all processes' numbers."""
    if trainer.world_size == 1:
        return number
    own = torch.tensor(float(number), device=trainer.strategy.root_device)
    return int(torch.as_tensor(trainer.strategy.reduce(own, reduce_op="max")).item())
