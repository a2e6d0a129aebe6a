"""Write checkpoints: when they are saved, and atomically, so that killing the process leaves no partial file."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import time
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from keygrip.artifacts import atomic_write, read_record, write_json
from keygrip.launch import is_first_process, requeue_job
from keygrip.override_values import as_typed
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.distributed import maximum_over_processes
from keygrip.training.ema import EMA
from keygrip.training.integrity import HashedFile, sign
from keygrip.training.lightning_loops import (
    completes_step,
    count_resumed_epoch,
    is_last_batch,
    training_is_done,
    undo_validation,
)
from keygrip.training.monitors import non_finite_parameters
from keygrip.training.parts import ReadWhere
from keygrip.training.run_folder import CHECKPOINT, kept_by_step
from keygrip.training.signals import Interrupted
from keygrip.training.sweep_jobs import is_launcher_process
from keygrip.training.torch_files import copied_but_large

log = logging.getLogger(__name__)

LATEST = CHECKPOINT.name
BEST = "best.ckpt"
TRAINED_PER_SAVE = 20  # saves by minutes: seconds of training per second of saving; they take at most 5 % of the time
OF_TRAINING = ("train/", "lr-")  # names of values that are logged in training, not in validation


class AtomicCheckpointIO(CheckpointIO):
    """Write files atomically with their hash: a kill keeps the previous file, and a changed byte is detected."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint with its hash, completely or not at all."""
        with atomic_write(path) as file:
            hashed = HashedFile(file)
            torch.save(checkpoint, cast(IO[bytes], hashed))  # it only writes and flushes
            file.flush()
            sign(Path(file.name), hashed.digest())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load as `read_checkpoint` does: no stored code is executed. On the CPU the weights, their EMA and the moments
        stay memory-mapped, so that processes of one machine share them: the first two are copied when they are
        restored, the moments by `CopyRestoredMoments`. In-place changes of mapped tensors do not reach the file."""
        return copied_but_large(read_checkpoint(path, map_location or "cpu", mapped=True))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file if it exists."""
        Path(path).unlink(missing_ok=True)


class CopyRestoredMoments(Callback):
    """Copy optimizer state on the CPU, which torch restores without a copy: while a tensor is mapped from a checkpoint,
    the disk space of the file is not freed after a later one has replaced it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                        state[name] = value.clone()


class SaveLatest(Checkpoint):
    """Save the latest state as ``last.ckpt``, the last few states by step, and optionally the best one by a metric.

    Files such as ``step-00001000.ckpt`` are earlier versions of ``last.ckpt`` (hard links if the file system has
    them), so that runs can be compared at equal steps.

    Saves at the end of training in any case, and after the given steps, epochs or minutes.

    Args:
        folder: folder of the files; of a run's ``callbacks.checkpoint`` always ``checkpoints`` in the run folder.
        every_n_steps: optimizer steps between saves.
        every_n_epochs: epochs between saves.
        every_n_minutes: minutes between saves, at least 20 times as long as the last save took; the most that is lost
            after kill -9.
        monitor: name of a validation metric whose best state is also kept; None: only the latest. If processes have
            logged different values, that of the first process decides.
        mode: ``min`` or ``max``: whether lower or higher values are better.
        keep: how many checkpoints by step are kept; 0: only ``last.ckpt``.
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
        if monitor is not None and monitor.startswith(OF_TRAINING):
            raise ValueError(
                f"callbacks.checkpoint.monitor={monitor!r} is a value of single training steps: give a metric of "
                "validation, as val/loss"
            )
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
        self._save_s = 0.0  # how long the last save took
        self._interval_reported = False

    @property
    def latest_path(self) -> Path:
        """Path of the latest state."""
        return self.folder / LATEST

    @property
    def best_path(self) -> Path:
        """Path of the best state, if one is kept."""
        return self.folder / BEST

    def save(self, trainer: Trainer) -> None:
        """Save the latest state now, on all processes together.

        Raises:
            ValueError: the weights are NaN or infinite; the file on disk stays unchanged.
        """
        if self._saved_step != trainer.global_step:
            _refuse_non_finite(trainer)
            started_at = time.monotonic()
            trainer.save_checkpoint(self.latest_path, weights_only=False)
            if trainer.is_global_zero and self.keep:
                keep_by_step(self.latest_path, trainer.global_step, self.keep)
            # of the slowest process: the first one may also have copied the file
            self._save_s = maximum_over_processes(time.monotonic() - started_at)
            self._report_interval(trainer)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _interval_s(self, minutes: float) -> float:
        """Return the seconds from the end of a save to the next save by minutes."""
        return max(60 * minutes, TRAINED_PER_SAVE * self._save_s)

    def _report_interval(self, trainer: Trainer) -> None:
        """Log once that saves take so long that those by minutes are farther apart than configured."""
        minutes = self.every_n_minutes
        if minutes is None or self._interval_reported or self._interval_s(minutes) == 60 * minutes:
            return
        self._interval_reported = True
        if trainer.is_global_zero:
            log.info(
                "saving took %.3g s: the next save by minutes follows after %.3g minutes of training instead of "
                "callbacks.checkpoint.every_n_minutes=%g, so that saving takes at most 5 %% of the time",
                self._save_s,
                self._interval_s(minutes) / 60,
                minutes,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        count_resumed_epoch(trainer)
        if training_is_done(trainer):  # nothing is trained, and the state between epochs does not resume exactly
            self._saved_step = trainer.global_step
        self._restore_best(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the last validation of a run without a step left
            self._restore_best(trainer)

    def _restore_best(self, trainer: Trainer) -> None:
        """Read the best value so far; remove the best state if it is of a later step."""
        if trainer.global_step == 0:
            return
        try:
            step, best = self._read_best()
        except FileNotFoundError:  # there is no record, or the first process has just removed it
            return
        if step <= trainer.global_step:
            self.best = best
        elif trainer.is_global_zero:
            log.warning("%s is removed: training goes on from an earlier step", self.best_path)
            self.best_path.unlink(missing_ok=True)
            self._best_record.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # All states are saved here and not in the hooks at the end of an epoch. From here Lightning resumes exactly,
        # also after the last batch of an epoch; a state saved between epochs would resume with a shortened epoch.
        if not completes_step(trainer):
            return  # while gradients are accumulated; they would be lost
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        last_batch = is_last_batch(trainer)
        due = bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0
        due |= bool(self.every_n_epochs) and last_batch and epoch % (self.every_n_epochs or 1) == 0
        due |= step == trainer.max_steps or (last_batch and epoch == trainer.max_epochs) or trainer.should_stop
        if self.every_n_minutes is not None:
            late = time.monotonic() - self._saved_at >= self._interval_s(self.every_n_minutes)
            due = _is_true_on_any_process(late) or due
        if due:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        # All processes must decide alike, because they save together. A module may log a value for each process alone,
        # and on disks that nodes do not share, only the first process has read the record of the best.
        if _is_true_on_any_process(self.monitor not in trainer.callback_metrics):
            names = (name for name in trainer.callback_metrics if not name.startswith(OF_TRAINING))
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor!r} is not logged in validation"
                f"{' by every process' if trainer.world_size > 1 else ''}; logged: {', '.join(sorted(names)) or 'none'}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        value, better = trainer.strategy.broadcast((value, math.isfinite(value) and better))
        if better:
            self.best = value
            trainer.save_checkpoint(self.best_path, weights_only=False)
            if trainer.is_global_zero:
                write_json(self._best_record, {self.monitor: value, "step": trainer.global_step}, indent=None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def _read_best(self) -> tuple[int, float | None]:
        """Return step and value of the best state so far; the value is None if the record is for another metric.

        Raises:
            FileNotFoundError: there is no record. ValueError: the record is damaged.
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
        """Path of the record of the best value, so that a resumed run does not replace a better state with a worse."""
        return self.folder / "best.json"


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}.ckpt"


def keep_resumed(file: Path, folder: Path) -> None:
    """Copy the checkpoint from which a run has resumed without a step left, if the run's folder has none."""
    if is_first_process() and not (folder / CHECKPOINT).exists():
        _copy(file, folder / CHECKPOINT)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file, source.open("rb") as opened:
        shutil.copyfileobj(opened, file)


def keep_by_step(latest: Path, step: int, keep: int) -> None:
    """Also store the file ``latest`` under the name of its step, and remove all but the last ``keep`` such files.

    Files of later steps are also removed: they belong to a training that was abandoned for an earlier checkpoint.
    """
    step_file = step_path(latest.parent, step)
    for later_file in [file for number, file in kept_by_step(latest.parent).items() if number > step]:
        log.warning("%s is removed: training went on from an earlier step", later_file)
        later_file.unlink(missing_ok=True)
    step_file.unlink(missing_ok=True)
    try:
        step_file.hardlink_to(latest)
    except OSError:  # no hard links on this file system
        _copy(latest, step_file)
    for old in list(kept_by_step(latest.parent).values())[:-keep]:
        old.unlink(missing_ok=True)


class SaveOnInterrupt(Callback):
    """Save after Ctrl-C, SIGTERM, SIGHUP of a closed terminal, and SIGUSR1, by which schedulers warn before they end a
    job: finish the training step or validation batch, save, and report how to resume.

    During validation the state of the preceding training step is saved; a resumed run skips that validation. A second
    Ctrl-C ends the process at once; under nohup SIGHUP has no effect. The processes agree on the step or validation
    batch at which they stop, so each must have the same number of these, as `keygrip.training.distributed.global_mean`
    also requires. A signal after the last of these, e.g. during the last save, ends the run before the evaluation that
    follows training. After SIGUSR1 a SLURM job is queued again; it then finds its run folder and resumes. With
    ``sbatch --requeue --signal=USR1@120`` SLURM sends the signal to processes of srun, not to other commands of the
    batch script.
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
        self._restore_handlers()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._received is not None:  # from here no process waits for another, so they need not agree
            self._stop(trainer, self._received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _note(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received != signal.SIGUSR1:  # after SIGUSR1 the job is queued again, whatever signal follows
            self._received = number
        log.warning("%s: finishing this step or validation batch, then saving", signal.Signals(number).name)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        number = int(maximum_over_processes(self._received or 0))
        if number:
            self._stop(trainer, number)

    def _stop(self, trainer: Trainer, number: int) -> None:
        outcome = "nothing was saved: the run has no checkpoint callback"
        if trainer.validating:
            _leave_validation(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveLatest):
                callback.save(trainer)
                outcome = f"saved {callback.latest_path}; continue with {as_typed('resume', callback.folder.parent)}"
        # The launcher of a sweep's jobs queues the SLURM job again when all its jobs have saved.
        if number == signal.SIGUSR1 and trainer.is_global_zero and not is_launcher_process():
            requeue_job()
        raise Interrupted(f"stopped by {signal.Signals(number).name} at step {trainer.global_step}: {outcome}", number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _leave_validation(trainer: Trainer) -> None:
    """Restore weights and progress to the end of the last training batch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            callback.take_out(trainer.lightning_module)
    undo_validation(trainer)


def _refuse_non_finite(trainer: Trainer) -> None:
    broken = non_finite_parameters(trainer.lightning_module)
    if _is_true_on_any_process(bool(broken)):
        raise ValueError(
            f"weights became NaN or infinite before step {trainer.global_step} ({', '.join(broken[:3])}; "
            f"{len(broken)} in all): the last checkpoint is kept as it is; lower optimizer.lr or optimizer.clip_norm"
        )


def _is_true_on_any_process(decision: bool) -> bool:
    return maximum_over_processes(int(decision)) > 0
