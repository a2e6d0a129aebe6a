"""Base class of all LightningModules of keygrip: optimizer recipe, logging of values and images, evaluation kind.

The module of a model implements its loss, metrics and figures; the code that all modules need is here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from keygrip.config import leaves_of
from keygrip.training import loggers
from keygrip.training.accumulation import WindowMean
from keygrip.training.checkpoints import load_module, misfit
from keygrip.training.lightning_loops import completes_step
from keygrip.training.memory import StepMemory, count_step, measure_step, outside_modules
from keygrip.training.optimizers import AdamW, ScheduledRates

log = logging.getLogger(__name__)


class System(LightningModule):
    """Base class of a network in training.

    A subclass sets ``network`` and defines the steps. It may also define ``set_statistics(statistics)``, called before
    training with the statistics of the data module's training split; ``resume_data(datamodule, checkpoint)``, called
    before the data module of a resumed run is set up; ``on_save_checkpoint`` and ``on_load_checkpoint`` for state that
    must be stored in addition to the weights; ``loss(batch)``, with which a dry run determines memory; ``policy()`` for
    robot policies; and ``export_graph()``.

    Attributes:
        batch_type: the type of its training batches (`keygrip.data.batches`).
        evaluation_kind: how `keygrip evaluate` measures it (`keygrip.evaluation.kinds`); None: it cannot be evaluated.
        headline_metrics: names of the metrics by which runs are compared; None: all.
        toy_overrides: overrides of `keygrip.train`, including a data set, that make the model so small that a training
            step takes a second; the contract suite of the tests trains every model with them.
        about: description of the model for the model card of an export ("a robot policy that ..."); the `about` of the
            network has precedence. None: the card names the class.
        usage: lines of Python for that card, with {name} for its folder; None: those of its `evaluation_kind`.
        own_files: files that the run's settings name and no checkpoint contains, by dotted key; set when a run builds
            its module. A run whose weights this one starts from may need the same files.
        own_packages: packages other than keygrip whose classes the run's settings name; set and used in the same way.
        network_settings: the settings of ``network``, from the run's configuration or the checkpoint's; empty if it was
            built by hand.
        window: the batches of an optimizer step, if gradients of several batches are accumulated.
        resumed: whether the run is resumed: its weights come from its own checkpoint, and `init_from` is not read.

    Args:
        optimizer: the recipe of optimizer and schedule.
    """

    batch_type: Any = None
    evaluation_kind: ClassVar[str | None] = None
    headline_metrics: ClassVar[tuple[str, ...] | None] = None
    toy_overrides: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[str | None] = None
    usage: ClassVar[str | None] = None
    network: Any

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__()
        self.optimizer_recipe = optimizer
        self.own_files: Mapping[str, Any] = {}
        self.own_packages: tuple[str, ...] = ()
        self.network_settings: Mapping[str, Any] = {}
        self.resumed = False
        self.window = WindowMean()
        self._images_at: int | None = None  # step of the last validation with images

    def trained_part(self) -> nn.Module:
        """Return the module whose parameters the optimizer gets."""
        return self.network

    def configure_optimizers(self) -> Any:
        return self.optimizer_recipe.configure(self.trained_part(), self.trainer.estimated_stepping_batches)

    def progress(self) -> float:
        """Return the completed share of the run, 0 to 1: of its steps, or of its time (`max_minutes`) if that is
        larger; the same in every process."""
        schedules = [each.scheduler for each in self.trainer.lr_scheduler_configs]
        of_time = [each.time_share for each in schedules if isinstance(each, ScheduledRates)]
        return min(1.0, max(self.global_step / max(1, self.trainer.estimated_stepping_batches), *of_time, 0.0))

    def on_after_backward(self) -> None:
        """Convert accumulated gradients to those of the mean over the actual batches of a step. A subclass that
        overrides this method must also call it."""
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated > 1:
            self.window.add_batch()
            if completes_step(self.trainer):
                self.window.finish(self.parameters(), accumulated)

    def mean_of_step(self, mean: Tensor, count: Tensor) -> Tensor:
        """Return the value that `training_step` returns for a loss that is a mean over `count` local terms, if their
        number differs between batches: with accumulated gradients, weighted so that the step's gradient is that of the
        mean over the terms of all its batches (`WindowMean`), otherwise ``mean``. Log the mean itself."""
        return mean if self.trainer.accumulate_grad_batches == 1 else self.window.weighted(mean, count)

    # -- before training ----------------------------------------------------------------------------------------------

    def check_run(self, max_steps: int, begins: bool) -> None:
        """Check the run; called by `keygrip.train` before any data is read.

        Args:
            max_steps: steps of the run; -1: no limit. begins: whether a new training starts: no dry run, not resumed.

        Raises:
            ValueError: the settings request something that such a run does not support.
        """

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a training step on a batch, without logging."""
        name = type(self).__name__
        raise ValueError(f"dry_run=true: {name} does not define loss(batch); define it, or train with max_steps=1")

    def dry_run(self, batch: Any) -> dict[str, Any]:
        """Run one forward pass; return shapes, parameters by part (millions; all and trained) and the loss."""
        with torch.no_grad():
            loss = self.loss(batch)
        shapes = {name: list(value.shape) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return {"batch": shapes, "parameters_m": parameters_m(self.trained_part()), "loss": round(float(loss), 5)}

    def step_memory(self, batch: Any, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
        """Return the memory of a training step on a batch: measured on a GPU, otherwise counted.

        Args:
            bf16, ema, accumulated: see `keygrip.training.memory.count_step`.
        """
        was_training = self.training
        self.train()
        try:
            on_gpu = next(self.parameters()).device.type == "cuda"
            step = measure_step if on_gpu else count_step
            return step(self.trained_part(), lambda change: self.loss(batch.map(change)), bf16, ema, accumulated)
        finally:
            self.train(was_training)

    def sharded_parts(self) -> list[nn.Module]:
        """Return the blocks that are only called via ``forward``, which FSDP may shard separately."""
        return list(self.network.sharded_parts())

    def compiled_parts(self) -> list[nn.Module]:
        """Return the blocks that `compile` compiles separately."""
        return self.sharded_parts()

    def take_weights(self, path: str, kind: str) -> Self:
        """Load the initial weights from the network of another run, and return that run's module.

        Args:
            path: run folder or checkpoint, whose EMA weights are used if it has them. kind: description of this model,
            for messages. Files that the checkpoint needs and does not contain, and packages whose parts it may name,
            are those of this run's own settings (`own_files`, `own_packages`).

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing, of another model, or does not fit.
        """
        earlier = load_module(path, trust=self.own_packages, offered=self.own_files)
        if not isinstance(earlier, type(self)):
            raise ValueError(f"model.init_from={path} holds a {type(earlier).__name__}, not {kind}")
        self.check_start(earlier)
        try:
            self.network.load_state_dict(self.started_from(earlier.network.state_dict()))
        except RuntimeError as error:
            differing = _differing(earlier.network_settings, self.network_settings)
            raise ValueError(
                f"the weights of model.init_from={path} do not fit this network: {misfit(error)}"
                + (f"; settings that differ: {differing}" if differing else "")
            ) from error
        log.info("weights of %s are the start", path)
        return earlier

    def check_start(self, before: Self) -> None:
        """Raise ValueError if the weights of another run fit in shape but have a different meaning here."""

    def started_from(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial weights from those of another run's network; override this method if parts are new."""
        return weights

    # -- logging ------------------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Return whether the current training batch completes an optimizer step whose number, from 1, is a multiple of
        `every`; 0: never. With accumulated gradients this is the last batch of a step, whose values Lightning logs.
        """
        return bool(every) and (self.global_step + 1) % every == 0 and completes_step(self.trainer)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log as Lightning does. With `sync_dist` give `batch_size`, the weight of a step's value. It is converted to
        float, because Lightning's mean over processes truncates integers (31 samples in two processes would be 30).
        """
        if options.get("batch_size") is not None:
            options["batch_size"] = float(options["batch_size"])
        super().log(name, value, *args, **options)

    def log_values(
        self,
        split: str,
        values: Mapping[str, Tensor],
        batch_size: int,
        bar: Collection[str] = ("total",),
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Log a step's values as ``<split>/<name>``; the loss ``total`` becomes ``<split>/loss``.

        Args:
            split: train or val; the means of val are over all processes. values: scalars. bar: names of the values in
                the progress line.
            counts: for values that are means over elements whose number differs between batches: the number of elements
                in this process's batch. The mean of val is then that over all elements, and NaN if there is none. Other
                values are weighted by the batch's samples. A batch of val without elements is not part of the mean,
                whatever its value; train logs the value unchanged (of losses the `mean_over_processes`).
        """
        for name, value in values.items():
            weight = float(batch_size)
            if counts is not None and name in counts:
                weight = float(counts[name])
                value = torch.zeros_like(value) if split == "val" and weight == 0 else value
            self.log(
                f"{split}/{'loss' if name == 'total' else name}",
                value.detach(),
                prog_bar=name in bar,
                batch_size=weight,
                sync_dist=split == "val",
            )

    @property
    def shows_images(self) -> bool:
        """Whether this process has a logger that accepts images."""
        return self.trainer.is_global_zero and loggers.takes_images(self.loggers)

    def images_are_due(self, every_n_steps: int) -> bool:
        """Return whether a validation is to show images, and note its step: not less than `every_n_steps` after the
        last one that did; 0: none. Call it once per validation, in every process."""
        last = self._images_at
        if not every_n_steps or (last is not None and self.global_step - last < every_n_steps):
            return False
        self._images_at = self.global_step
        return True

    def show_image(self, key: str, image: np.ndarray) -> None:
        """Log an image ``[H, W, 3]`` uint8 to every logger that accepts images, from the first process."""
        if self.trainer.is_global_zero:
            loggers.log_image(self.loggers, key, image, self.global_step)

    def show_text(self, key: str, text: str) -> None:
        """Log a text to every logger that accepts text, from the first process."""
        if self.trainer.is_global_zero:
            loggers.log_text(self.loggers, key, text, self.global_step)


def parameters_m(network: nn.Module) -> dict[str, dict[str, float]]:
    """Return the parameters of a network and of its parts in millions: `all`, including those of `outside_modules`, and
    `trained`."""
    counts = {}
    for name, part in ({"all": network} | dict(network.named_children())).items():
        inside, outside = list(part.parameters()), [p for each in outside_modules(part) for p in each.parameters()]
        if inside or outside or part is network:
            counts[name] = {
                "all": round(sum(p.numel() for p in (*inside, *outside)) / 1e6, 3),
                "trained": round(sum(p.numel() for p in inside if p.requires_grad) / 1e6, 3),
            }
    return counts


def check_names(where: str, **names: tuple[Sequence[str], Sequence[str]]) -> None:
    """Compare names that correspond to indices in the weights, such as `arms` and `cameras`, with those of another run.

    Args:
        where: description of the other run for messages. names: names there and here; a side without names is skipped.

    Raises:
        ValueError: the same names in another order. For different names it only warns, since the weights may still be
            useful initial weights.
    """
    for name, (stored, current) in names.items():
        if tuple(stored) == tuple(current) or not stored or not current:
            continue
        if sorted(stored) == sorted(current):
            raise ValueError(
                f"{where} has the {name} {', '.join(stored)}, this run {', '.join(current)}: weights refer to them by "
                f"index. Set data.{name}=[{','.join(stored)}]."
            )
        log.warning(
            "%s has the %s %s, this run %s: weights refer to them by index, so those of the first are now used for "
            "the first of these, and so on",
            *(where, name, ", ".join(stored), ", ".join(current)),
        )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the settings of two networks that differ: four of them, and the number of further ones."""
    old, new = ({".".join(path): value for path, value in leaves_of(each, ())} for each in (before, now))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    texts = [f"model.network.{name} ({old.get(name)} there, {new.get(name)} here)" for name in names[:4]]
    return ", ".join(texts) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
