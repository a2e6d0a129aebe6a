"""The observation of a one-armed robot at the first sample of a batch; and validation of a batch in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from keygrip.data.batches import PolicyBatch, PolicyTargets

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
    batches = [
        replace(
            data,
            instruction=data.instruction[piece],
            **{name: value[piece] for name, value in vars(data).items() if isinstance(value, Tensor)},
        )
        for piece in pieces
    ]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **options)
    (logged,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return dict(logged)
