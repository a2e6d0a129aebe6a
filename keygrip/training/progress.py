"""Progress of a run on standard error, samples per second, time spent waiting for data, skipped samples."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from tqdm import tqdm

from keygrip.training.distributed import total_of
from keygrip.training.lightning_loops import batches_begun, completes_step

log = logging.getLogger(__name__)


class Progress(ProgressBar):
    """A bar over the optimizer steps of the run on a terminal; elsewhere a line at intervals.

    Args:
        refresh_s: seconds between refreshes on a terminal.
        line_every_s: seconds between lines elsewhere; 0: a line for each step.
    """

    def __init__(self, refresh_s: float = 0.5, line_every_s: float = 30.0) -> None:
        super().__init__()
        for name, value in (("refresh_s", refresh_s), ("line_every_s", line_every_s)):
            if not value >= 0:
                raise ValueError(f"callbacks.progress.{name}={value}: must be at least 0")
        self.refresh_s = refresh_s
        self.line_every_s = line_every_s
        self._bar: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None
        self._enabled = True
        self._started = self._line_at = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """As `ProgressBar.disable`."""
        self._enabled = False

    def enable(self) -> None:
        """As `ProgressBar.enable`."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, on standard error."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._line_at = time.monotonic()
        self._first_step = trainer.global_step
        self._bar = self._make("training", _steps(trainer), initial=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if self._bar is not None and step > self._bar.n:
            if step % self._logging_interval == 0:  # reading values waits for the device
                self._bar.set_postfix(self._figures(trainer), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._bar is None and self._enabled and time.monotonic() - self._line_at >= self.line_every_s:
            self._line_at = time.monotonic()
            log.info("%s", self._line(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            batches = sum(int(n) for n in trainer.num_val_batches if n != float("inf"))
            self._validation = self._make("validation", batches or None, delay=1.0)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._validation is not None:
            self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @property
    def _logging_interval(self) -> int:
        return max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _line(self, trainer: Trainer) -> str:
        step, total = trainer.global_step, _steps(trainer)
        pace = (time.monotonic() - self._started) / max(1, step - self._first_step)
        figures = " ".join(f"{name}={value}" for name, value in self._figures(trainer).items())
        left = f"/{total}, {(total - step) * pace / 60:.1f} min left" if total else ""
        return f"step {step}{left} ({pace:.3g} s per step) {figures}".rstrip()

    def _figures(self, trainer: Trainer) -> dict[str, str]:
        metrics = {**trainer.progress_bar_metrics}
        if "train/loss" in trainer.callback_metrics:
            metrics.setdefault("train/loss", float(trainer.callback_metrics["train/loss"]))
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        return {name.removeprefix("train/"): f"{value:.3g}" for name, value in numbers.items()}

    def _make(self, name: str, total: int | None, initial: int = 0, delay: float = 0.0) -> tqdm[Any] | None:
        if not self._enabled or self.trainer.global_rank != 0 or not sys.stderr.isatty():
            return None
        return tqdm(
            desc=name,
            total=total,
            initial=initial,
            delay=delay,
            leave=delay == 0,
            file=sys.stderr,
            mininterval=self.refresh_s,
            dynamic_ncols=True,
            disable=None,
        )

    def _close(self) -> None:
        for bar in (self._bar, self._validation):
            if bar is not None:
                bar.close()
        self._bar = self._validation = None


def _steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps of the whole run; None if it has no end."""
    total = trainer.estimated_stepping_batches
    return int(total) if total != float("inf") else None


class Throughput(Callback):
    """Log ``speed/samples_per_s`` (all processes) and ``speed/data_wait_share``, the share of training time spent
    waiting for data.

    Validation and the first steps, in which workers start and kernels are chosen, are not included.

    Args:
        every_n_steps: batches over which each value is computed, and further ones until the optimizer step is complete.
        skip_batches: batches at the start that do not count.
    """

    def __init__(self, every_n_steps: int = 20, skip_batches: int = 5) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.throughput.every_n_steps={every_n_steps}: must be at least 1")
        if skip_batches < 0:
            raise ValueError(f"callbacks.throughput.skip_batches={skip_batches}: must be at least 0")
        self.every_n_steps = every_n_steps
        self.skip_batches = skip_batches
        self.total_wait_s = 0.0
        self.total_s = 0.0
        self.total_samples = 0.0
        self._reset_window()
        self._total_batches = 0
        self._ended: float | None = None
        self._started = 0.0

    @property
    def summary(self) -> dict[str, float]:
        """Values over the whole run; empty if it was too short."""
        if self.total_s == 0:
            return {}
        return {"samples_per_s": self.total_samples / self.total_s, "data_wait_share": self.total_wait_s / self.total_s}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._total_batches += 1
        if self._ended is not None and self._total_batches > self.skip_batches:
            self._wait_s += self._started - self._ended
            self._time_s += now - self._ended
            self._samples += _size(batch)
            self._batches += 1
        self._ended = now
        if self._batches >= self.every_n_steps and completes_step(trainer):
            samples = total_of(self._samples, pl_module.device)
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._ended = time.perf_counter()
            self._time_s += self._ended - now
            figures = {
                "speed/samples_per_s": samples / self._time_s,
                "speed/data_wait_share": self._wait_s / self._time_s,
            }
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
            self.total_wait_s += self._wait_s
            self.total_s += self._time_s
            self.total_samples += samples
            self._reset_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ended = None  # saving is no waiting for data

    def _reset_window(self) -> None:
        self._wait_s = self._time_s = 0.0
        self._samples = self._batches = 0


class SkippedSamples(Callback):
    """Log ``data/skipped``, the number of samples that could not be read completely (all their views), and
    ``data/unusable``, the number of intact samples without any usable content; in training and validation, over all
    processes.

    The counts start with this process; a resumed run counts from 0. Data modules without these attributes log nothing.

    Args:
        every_n_steps: batches between log entries, which follow once the optimizer step is complete.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.skipped.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches = batches_begun(trainer)
        batches_of_step = batch_idx % trainer.accumulate_grad_batches + 1
        if not completes_step(trainer) or batches % self.every_n_steps >= batches_of_step:
            return
        for name in ("skipped", "unusable"):
            counted = getattr(getattr(trainer, "datamodule", None), name, None)
            if counted is None:
                continue
            everywhere = total_of(float(counted.count), pl_module.device)
            for logger in trainer.loggers:
                logger.log_metrics({f"data/{name}": everywhere}, step=trainer.global_step)


def _size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return len(batch)
    parts = (
        batch.values()
        if isinstance(batch, dict)
        else batch
        if isinstance(batch, list | tuple)
        else vars(batch).values()
    )
    return next((len(part) for part in parts if isinstance(part, torch.Tensor) and part.ndim), 0)
