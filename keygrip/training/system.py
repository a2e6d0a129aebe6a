"""The base of all LightningModules of keygrip: optimiser recipe, logging of values and images, evaluation kind.

A model's module holds its loss, its metrics and its figures; what every module needs stands here once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from keygrip.training import loggers
from keygrip.training.accumulation import WindowMean, completes_step
from keygrip.training.checkpoints import load_module, misfit
from keygrip.training.memory import StepMemory, count_step, measure_step, outside_modules
from keygrip.training.optimizers import AdamW, ScheduledRates

log = logging.getLogger(__name__)


class System(LightningModule):
    """A network in training.

    A subclass sets ``network`` and defines the steps. It may also define ``set_statistics(statistics)``, called before
    training with what the data module found in its training split; ``resume_data(datamodule, checkpoint)``, called
    before the data module of a resumed run is set up; ``on_save_checkpoint`` and ``on_load_checkpoint`` for what must
    be stored beside the weights; ``loss(batch)``, by which a dry run counts memory; ``policy()`` for robot policies;
    and ``export_graph()``.

    Attributes:
        batch_type: the type of batch that it learns from (`keygrip.data.batches`).
        evaluation_kind: how `keygrip evaluate` measures it (`keygrip.evaluation.kinds`); None: it cannot.
        headline_metrics: names of the metrics that runs are compared by; None: all.
        toy_overrides: of `keygrip.train`, a data set among them, that make the model small enough to train a step of in
            a second; the contract suite of the tests trains every model so.
        about: what the model is, for the model card of an export ("a robot policy that ..."); a network with an `about`
            of its own has the word. None: the card names the class.
        usage: lines of Python for that card, with {name} for its folder; None: those of its `evaluation_kind`.
        own_files: files that the run's settings name and no checkpoint holds, by dotted key; set where a run builds its
            module. A run that this one starts from may need the same.
        own_packages: those beside keygrip whose classes the run's settings name; likewise.
        window: the batches of an optimiser step, where gradients of several are accumulated for it.
        resumed: whether a run goes on: its weights come from its own checkpoint, and where it began is not read again.

    Args:
        optimizer: the recipe of optimiser and schedule.
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
        self.resumed = False
        self.window = WindowMean()

    def trained_part(self) -> nn.Module:
        """The module whose parameters the optimiser gets."""
        return self.network

    def configure_optimizers(self) -> Any:
        return self.optimizer_recipe.configure(self.trained_part(), self.trainer.estimated_stepping_batches)

    def progress(self) -> float:
        """The share of the run that has passed, 0 to 1: of its steps, or of its time (`max_minutes`) where that is
        further; the same in every process."""
        schedules = [each.scheduler for each in self.trainer.lr_scheduler_configs]
        of_time = [each.time_share for each in schedules if isinstance(each, ScheduledRates)]
        return min(1.0, max(self.global_step / max(1, self.trainer.estimated_stepping_batches), *of_time, 0.0))

    def on_after_backward(self) -> None:
        """Makes accumulated gradients those of the mean over a step's batches, as many as there are. A subclass that
        overrides it calls this one too."""
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated > 1:
            self.window.add_batch()
            if completes_step(self.trainer):
                self.window.finish(self.parameters(), accumulated)

    # -- before training ----------------------------------------------------------------------------------------------

    def check_run(self, max_steps: int, begins: bool) -> None:
        """Called by `keygrip.train` before any data is read.

        Args:
            max_steps: of the run; -1: no limit. begins: it trains from these weights: no dry run, and not resumed.

        Raises:
            ValueError: the settings ask for something that such a run does not do.
        """

    def loss(self, batch: Any) -> Tensor:
        """The loss of a training step on a batch; nothing is logged."""
        name = type(self).__name__
        raise ValueError(f"dry_run=true: {name} does not define loss(batch); define it, or train with max_steps=1")

    def dry_run(self, batch: Any) -> dict[str, Any]:
        """One batch forwards: shapes, parameters by part (millions; all and trained) and the loss."""
        with torch.no_grad():
            loss = self.loss(batch)
        shapes = {name: list(value.shape) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return {"batch": shapes, "parameters_m": parameters_m(self.trained_part()), "loss": round(float(loss), 5)}

    def step_memory(self, batch: Any, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
        """Memory of a training step on a batch: measured on a GPU, counted elsewhere.

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
        """Blocks that are used through their ``forward`` alone, which FSDP may shard one by one."""
        return list(self.network.sharded_parts())

    def compiled_parts(self) -> list[nn.Module]:
        """Blocks that `compile` compiles one by one."""
        return self.sharded_parts()

    def take_weights(self, path: str, kind: str) -> Self:
        """Starts from the network of another run, and returns that run's module.

        Args:
            path: run folder or checkpoint; its EMA weights, where it has them. kind: what this is, for messages.
            Files that it needs and does not hold, and packages whose parts it may name, are those of this run's own
            settings (`own_files`, `own_packages`).

        Raises:
            FileNotFoundError, ValueError: it is missing, of another model, or does not fit.
        """
        before = load_module(path, trust=self.own_packages, offered=self.own_files)
        if not isinstance(before, type(self)):
            raise ValueError(f"model.init_from={path} holds a {type(before).__name__}, not {kind}")
        self.check_start(before)
        try:
            self.network.load_state_dict(self.started_from(before.network.state_dict()))
        except RuntimeError as error:
            raise ValueError(
                f"the weights of model.init_from={path} do not fit this network: {misfit(error)}"
            ) from error
        log.info("weights of %s are the start", path)
        return before

    def check_start(self, before: Self) -> None:
        """Raises ValueError: the weights of this other run would fit, and mean something else here."""

    def started_from(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another run's network that this network starts from; override it where parts are new."""
        return weights

    # -- logging ------------------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether the training batch at hand completes an optimiser step whose number, from 1, `every` divides; 0:
        never. Of the batches that a step accumulates only the last one is it, and Lightning writes what that one logs.
        """
        return bool(every) and (self.global_step + 1) % every == 0 and completes_step(self.trainer)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """As Lightning's. With `sync_dist` give `batch_size`, by which a step's value is weighted: as a float, since
        Lightning's mean over processes cuts a whole number off (31 samples in two processes would count as 30).
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
        """Logs a step's values as ``<split>/<name>``; the loss ``total`` becomes ``<split>/loss``.

        Args:
            split: train or val; the means of val are over all processes. values: scalars. bar: shown in the progress
                line.
            counts: over how many elements of this process's batch a value is a mean, where batches hold different
                numbers of them: the mean of val is then that over all elements, and not a number where there is none.
                Others are weighted by the batch's samples. A batch of val without any element adds nothing to the mean,
                whatever its value; train logs the value as it is.
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
        """Whether this process has a logger that takes images."""
        return self.trainer.is_global_zero and loggers.takes_images(self.loggers)

    def show_image(self, key: str, image: np.ndarray) -> None:
        """Shows ``[H, W, 3]`` uint8 in every logger that takes images, from the first process."""
        if self.trainer.is_global_zero:
            loggers.log_image(self.loggers, key, image, self.global_step)

    def show_text(self, key: str, text: str) -> None:
        """Shows a text in every logger that takes text, from the first process."""
        if self.trainer.is_global_zero:
            loggers.log_text(self.loggers, key, text, self.global_step)


def parameters_m(network: nn.Module) -> dict[str, dict[str, float]]:
    """Parameters of a network and of its parts in millions: `all`, those of `outside_modules` among them, and
    `trained`."""
    found = {}
    for name, part in ({"all": network} | dict(network.named_children())).items():
        own, outside = list(part.parameters()), [p for each in outside_modules(part) for p in each.parameters()]
        if own or outside or part is network:
            found[name] = {
                "all": round(sum(p.numel() for p in (*own, *outside)) / 1e6, 3),
                "trained": round(sum(p.numel() for p in own if p.requires_grad) / 1e6, 3),
            }
    return found


def check_names(where: str, **names: tuple[Sequence[str], Sequence[str]]) -> None:
    """Compares what weights know by numbers alone, such as `arms` and `cameras`: of another run, and of this one.

    Args:
        where: names the other run in messages. names: there and here; nothing is compared where a side has none.

    Raises:
        ValueError: the same in another order. Of others it warns, since weights may still be a start.
    """
    for name, (there, here) in names.items():
        if tuple(there) == tuple(here) or not there or not here:
            continue
        if sorted(there) == sorted(here):
            raise ValueError(
                f"{where} has the {name} {', '.join(there)}, this run {', '.join(here)}: weights know them by their "
                f"numbers. Set data.{name}=[{','.join(there)}]."
            )
        log.warning(
            "%s has the %s %s, this run %s: weights know them by their numbers, those of the first are now taken for "
            "the first of these, and so on",
            *(where, name, ", ".join(there), ", ".join(here)),
        )
