"""Optimizer recipes: what a model's ``configure_optimizers`` returns, chosen in the config group ``optimizer``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from keygrip.training.parts import ReadWhere, model_part

log = logging.getLogger(__name__)


@model_part
@dataclass(frozen=True)
class AdamW:
    """AdamW with decoupled weight decay on matrices only, linear warm-up, and a cosine or constant schedule by step.

    Args:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        weight_decay: for parameters with two or more dimensions, except embeddings and tokens (`_ids_without_decay`).
        warmup_steps: linear, from lr / warmup_steps; at most a tenth of the run.
        final_lr_share: the cosine ends at this share of ``lr``.
        schedule: ``cosine`` or ``constant``.
        clip_norm: global norm at which gradients are clipped; None: never.
        lr_multipliers: by prefix of the parameter's name, e.g. ``{"backbone": 0.1}``; the longest matching prefix is
            used. None removes the multiplier of this name that another file sets. The multiplier of a frozen part has
            no effect, which `check` logs, because a recipe may name parts that a run freezes. Nested mappings are read
            as dotted names: ``{"backbone": {"net": 0.1}}`` is ``{"backbone.net": 0.1}``.
        layer_decay: learning rates of image backbones decrease from block to block towards the image, as in BEiT: the
            rate of block l (from 0) of n is multiplied by ``layer_decay ** (n - l)``, that of the patch embedding and
            the prefix tokens by ``layer_decay ** (n + 1)``, that of the final norm by 1. None: no decay.

    Paper: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).
    """

    read_where: ClassVar = {"final_lr_share": ReadWhere("schedule", "cosine")}
    not_divided: ClassVar[str | None] = None  # why parameters must not be sharded (strategy=fsdp); None: they may be
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_lr_share: float = 0.0
    schedule: str = "cosine"
    clip_norm: float | None = None
    lr_multipliers: Mapping[str, Any] = field(default_factory=dict)
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr}: must be above 0")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optimizer.schedule={self.schedule!r}: must be cosine or constant")
        if self.warmup_steps < 0 or not 0 <= self.final_lr_share <= 1 or self.weight_decay < 0:
            raise ValueError(
                "optimizer: warmup_steps and weight_decay must not be negative, final_lr_share lies in 0..1"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)}: each lies in [0, 1)")
        for name, multiplier in _by_dotted_name(self.lr_multipliers).items():
            is_number = isinstance(multiplier, int | float) and not isinstance(multiplier, bool)
            if multiplier is not None and not (is_number and 0 <= multiplier < math.inf):
                raise ValueError(f"optimizer.lr_multipliers.{name}={multiplier}: must be a number from 0 on")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay={self.layer_decay}: must lie above 0 and at most at 1, or be null")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm={self.clip_norm}: must be above 0, or null for none")

    def configure(self, module: nn.Module, total_steps: int | float) -> dict[str, Any]:
        """Return the optimizer and its schedule in the form that Lightning requires.

        Args:
            module: its trainable parameters are optimised, grouped by learning rate and weight decay.
            total_steps: optimizer steps of the whole run (``trainer.estimated_stepping_batches``); inf for a run
                without an end, which requires ``schedule=constant``.

        Raises:
            ValueError: nothing to train, a multiplier that matches no parameter, `layer_decay` without a trained
                backbone, or a cosine schedule without an end.
        """
        self.check_end(total_steps)
        optimizer = torch.optim.AdamW(self.parameter_groups(module), lr=self.lr, betas=(self.betas[0], self.betas[1]))
        rates = ScheduledRates(optimizer, Schedule(self, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def moments(self, module: nn.Module) -> int:
        """Return the number of float32 values in the optimizer's state: two per trained parameter."""
        return 2 * sum(p.numel() for p in module.parameters() if p.requires_grad)

    def check(self, module: nn.Module, endless: bool) -> None:
        """Make the checks of `configure` before any data is read, and log multipliers without effect.

        Args:
            module: as for `configure`. endless: whether the run has neither a last step nor a last epoch.

        Raises:
            ValueError: as `configure`.
        """
        self.parameter_groups(module)
        changed = [prefix for prefix, multiplier in self._multipliers().items() if multiplier != 1.0]
        if frozen := [prefix for prefix in changed if _frozen(module, prefix)]:
            log.info("optimizer.lr_multipliers of %s: no effect, nothing of it is trained", ", ".join(frozen))
        if endless:
            self.check_end(math.inf)

    def check_end(self, total_steps: int | float) -> None:
        """Raise ValueError if the schedule needs an end and the run has none."""
        if self.schedule == "cosine" and not math.isfinite(total_steps):
            raise ValueError(
                "optimizer.schedule=cosine needs an end: give max_steps or max_epochs (max_minutes, where it comes "
                "first, ends the cosine too), or schedule=constant"
            )

    def parameter_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups for torch (``params, lr, weight_decay, name``); each parameter is in exactly one."""
        groups: dict[tuple[str, bool, int], list[nn.Parameter]] = {}
        used: set[str] = set()
        multipliers = self._multipliers()
        layers_below = {} if self.layer_decay is None else _layers_below_the_end(module)
        undecayed = _ids_without_decay(module)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            prefix = max((p for p in multipliers if belongs_to(name, p)), key=len, default="")
            used.add(prefix)
            decay = parameter.ndim >= 2 and id(parameter) not in undecayed
            groups.setdefault((prefix, decay, layers_below.get(id(parameter), 0)), []).append(parameter)
        if not groups:
            raise ValueError("nothing to train: every parameter is frozen")
        for prefix, multiplier in multipliers.items():
            if multiplier != 1.0 and prefix not in used and not _frozen(module, prefix):
                raise ValueError(
                    f"optimizer.lr_multipliers: no trainable parameter's name starts with or holds {prefix!r}"
                )
        return [
            {
                "params": parameters,
                "lr": self.lr * multipliers.get(prefix, 1.0) * (self.layer_decay or 1.0) ** layers,
                "weight_decay": self.weight_decay if decay else 0.0,
                "name": f"{prefix or 'rest'}{f'_{layers}_below' if layers else ''}{'' if decay else '_no_decay'}",
            }
            for (prefix, decay, layers), parameters in groups.items()
        ]

    def _multipliers(self) -> dict[str, float]:
        """Return the given multipliers by dotted name."""
        return {name: each for name, each in _by_dotted_name(self.lr_multipliers).items() if each is not None}


class Schedule:
    """Share of the peak learning rate at a step.

    Attributes:
        time_share: elapsed share of the time limit, 0 without a limit. If it is larger than the share of the steps, the
            cosine follows it, so that a run which ends at its time limit ends with a small learning rate.
    """

    def __init__(self, recipe: AdamW, total_steps: int | float) -> None:
        self.cosine = recipe.schedule == "cosine"
        self.final = recipe.final_lr_share
        self.total = total_steps
        self.warmup = recipe.warmup_steps
        self.time_share = 0.0
        if math.isfinite(total_steps):
            self.warmup = min(self.warmup, int(total_steps // 10))

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.cosine:
            return 1.0
        progress = min(1.0, max((step - self.warmup) / max(1, self.total - self.warmup), self.time_share))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class ScheduledRates(torch.optim.lr_scheduler.LambdaLR):
    """An optimizer's learning rates by a schedule. A checkpoint contains the step but not the schedule, which is that
    of the current settings: a resumed run may be longer or shorter than before.

    Args:
        optimizer: its groups' rates are the peaks. schedule: the schedule of all groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        super().__init__(optimizer, schedule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a stored step, from the first step on with the rates of the current schedule."""
        super().load_state_dict({**state_dict, "lr_lambdas": [None] * len(self.lr_lambdas)})
        self.apply()

    @property
    def time_share(self) -> float:
        """The largest `Schedule.time_share`."""
        return max(schedule.time_share for schedule in self.lr_lambdas if isinstance(schedule, Schedule))

    def take_time_share(self, share: float) -> None:
        """Set `Schedule.time_share`, which affects the rates from the next step on."""
        for schedule in self.lr_lambdas:
            assert isinstance(schedule, Schedule)
            schedule.time_share = share

    def apply(self) -> None:
        """Set the rates of the optimizer's groups to those of the current step."""
        rates = [
            peak * schedule(self.last_epoch) for peak, schedule in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def belongs_to(name: str, prefix: str) -> bool:
    """Return whether a parameter belongs to a part: ``backbone`` matches ``backbone.x`` and ``network.backbone.x``."""
    return name == prefix or name.startswith(f"{prefix}.") or f".{prefix}." in name


def _frozen(module: nn.Module, prefix: str) -> bool:
    """Return whether a named part exists and is completely frozen."""
    trainable_flags = [each.requires_grad for name, each in module.named_parameters() if belongs_to(name, prefix)]
    return bool(trainable_flags) and not any(trainable_flags)


def _by_dotted_name(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, which the command line creates from a dotted name."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= _by_dotted_name(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _layers_below_the_end(module: nn.Module) -> dict[int, int]:
    """Return, by id of each parameter of an image backbone, the number of layers between it and the backbone's end.

    Raises:
        ValueError: no backbone is trained.
    """
    backbones: list[Any] = [part for part in module.modules() if hasattr(part, "layer_of")]
    layers_below = {
        id(parameter): part.depth - part.layer_of(name)
        for part in backbones
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
    if not layers_below:
        reason = (
            "the backbone is frozen (backbone.trainable=frozen)" if backbones else "this model has no image backbone"
        )
        raise ValueError(f"optimizer.layer_decay has no effect: {reason}; leave it out")
    return layers_below


def _ids_without_decay(module: nn.Module) -> set[int]:
    """Return the ids of embeddings and learned tokens or positions, which have several dimensions but no weight decay,
    because they are not matrices of a product. Apart from embeddings, they are recognised by their names; `slots` and
    `views` are those of geometry_vla's pointed tokens."""
    undecayed = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        if last.endswith(("token", "tokens", "pos_embed", "query", "queries", "slots", "views")):
            undecayed.add(id(parameter))
    return undecayed
