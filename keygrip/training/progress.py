"""What a person sees of a run: a progress bar on standard error, samples a second, and the share of time spent waiting on data."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """One bar over the optimiser steps of the run (on a terminal), or one line now and then (in a log file).

    Args:
        refresh_s: seconds between refreshes on a terminal.
        line_every_s: seconds between lines elsewhere.
    """

    def __init__(self, refresh_s: float = 0.5, line_every_s: float = 30.0) -> None:
        super().__init__()
        self.refresh_s = refresh_s
        self.line_every_s = line_every_s
        self._bar: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._bar = self._make("training", int(total) if total != float("inf") else None, initial=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        bar = self._bar
        if bar is not None and trainer.global_step > bar.n:
            if trainer.global_step % trainer.log_every_n_steps == 0:  # reading figures waits for the device
                bar.set_postfix(self._figures(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = sum(int(n) for n in trainer.num_val_batches if n != float("inf"))
        self._validation = self._make("validation", batches or None, leave=False)

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

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        shown = trainer.progress_bar_metrics
        return {name.removeprefix("train/"): f"{value:.3g}" for name, value in shown.items() if isinstance(value, int | float)}

    def _make(self, name: str, total: int | None, initial: int = 0, leave: bool = True) -> tqdm[Any]:
        terminal = sys.stderr.isatty()
        return tqdm(
            desc=name,
            total=total,
            initial=initial,
            leave=leave and terminal,
            file=sys.stderr,
            mininterval=self.refresh_s if terminal else self.line_every_s,
            dynamic_ncols=terminal,
            disable=not self._enabled or self.trainer.global_rank != 0,
        )

    def _close(self) -> None:
        for bar in (self._bar, self._validation):
            if bar is not None:
                bar.close()
        self._bar = self._validation = None


class Throughput(Callback):
    """Logs ``speed/samples_per_s`` (all processes) and ``speed/data_wait_share``, the part of training time spent waiting on data.

    The first steps, in which workers start and kernels are chosen, and validation are left out.

    Args:
        every_n_steps: batches over which each figure is taken.
        skip_batches: batches at the start that do not count.
    """

    def __init__(self, every_n_steps: int = 20, skip_batches: int = 5) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.throughput.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.skip_batches = skip_batches
        self.total_wait_s = 0.0
        self.total_s = 0.0
        self.total_samples = 0
        self._reset_window()
        self._seen = 0
        self._ended: float | None = None
        self._started = 0.0

    @property
    def summary(self) -> dict[str, float]:
        """Figures over the whole run; empty where it was too short."""
        if self.total_s == 0:
            return {}
        return {"samples_per_s": self.total_samples / self.total_s, "data_wait_share": self.total_wait_s / self.total_s}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self._seen += 1
        if self._ended is not None and self._seen > self.skip_batches:
            self._wait_s += self._started - self._ended
            self._time_s += now - self._ended
            self._samples += _size(batch) * trainer.world_size
            self._batches += 1
        self._ended = now
        if self._batches >= self.every_n_steps:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
                self._time_s += time.perf_counter() - now
                self._ended = time.perf_counter()
            figures = {
                "speed/samples_per_s": self._samples / self._time_s,
                "speed/data_wait_share": self._wait_s / self._time_s,
            }
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
            self.total_wait_s += self._wait_s
            self.total_s += self._time_s
            self.total_samples += self._samples
            self._reset_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def _reset_window(self) -> None:
        self._wait_s = self._time_s = 0.0
        self._samples = self._batches = 0


def _size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(batch, torch.Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else vars(batch).values()
    return next((len(part) for part in parts if isinstance(part, torch.Tensor) and part.ndim), 0)
