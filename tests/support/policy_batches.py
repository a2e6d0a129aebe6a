"""The observation of a one-armed robot at the first sample of a batch; validation and training of a batch in pieces."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from keygrip.data.batches import PolicyBatch, PolicyTargets
from keygrip.training.system import System

Batch = TypeVar("Batch", bound=PolicyTargets)


def observation_of(data: PolicyBatch, image: np.ndarray) -> dict[str, Any]:
    """Return an observation: an image ``[H, W, 3]`` uint8 with the first sample's camera and gripper pose."""
    return {
        "image": image,
        "intrinsics": data.intrinsics[0].numpy(),
        "world_to_camera": data.world_to_camera[0].numpy(),
        "position": data.start_position[0, 0].numpy(),
        "quaternion": data.start_quaternion[0, 0].numpy(),
        "gripper": data.start_gripper[0].numpy(),
    }


def validated_in_pieces(module: LightningModule, data: Batch, pieces: Sequence[slice]) -> dict[str, float]:
    """Return what a validation logs whose batches are pieces of one batch."""
    batches = _pieces_of(data, pieces)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **options)
    (logged,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return dict(logged)


class Gradients(Callback):
    """Keep the gradients of an optimizer step, by the name of the parameter."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.found = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def trained_in_pieces(
    module: System, data: Batch, pieces: Sequence[slice]
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Return the gradients of one optimizer step of a copy of a module, whose accumulated batches are pieces of one
    batch, and what the step logs for each of them."""
    module, logged, gradients = copy.deepcopy(module), list[dict[str, float]](), Gradients()
    module.log_values = lambda split, values, *_: logged.append(  # type: ignore[method-assign]
        {name: float(value.detach()) for name, value in values.items()}
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    Trainer(
        accelerator="cpu",
        enable_model_summary=False,
        max_steps=1,
        accumulate_grad_batches=len(pieces),
        callbacks=[gradients],
        **options,  # type: ignore[arg-type]
    ).fit(module, DataLoader(_pieces_of(data, pieces), batch_size=None))  # type: ignore[arg-type]
    return gradients.found, logged


def _pieces_of(data: Batch, pieces: Sequence[slice]) -> list[Batch]:
    return [
        replace(
            data,
            instruction=data.instruction[piece],
            **{name: value[piece] for name, value in vars(data).items() if isinstance(value, Tensor)},
        )
        for piece in pieces
    ]
