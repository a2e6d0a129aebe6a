"""Typed batches: what a data module hands to a training module.

Legend of shapes: B samples, A arms, T future steps, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import default_collate


@dataclass
class PolicyBatch:
    """Samples for a policy. Holds metres and quaternions only: the module projects and bins them on its device.

    Args:
        image: float32 [B, 3, S, S], normalised with the backbone's mean and std (here and nowhere else).
        intrinsics: float32 [B, 3, 3], of that picture (augmented and resized).
        world_to_camera: float32 [B, 4, 4].
        start_position: float32 [B, A, 3] metres, start_quaternion [B, A, 4] w x y z, start_gripper [B, A]: the pose
            reached now.
        position: float32 [B, A, T, 3], quaternion [B, A, T, 4], gripper [B, A, T]: the targets.
        repeated: bool [B, A, T], the step lies past the end of the demo and repeats the last pose.
        demo_index: int64 [B], into the data module's list of demos. frame_index: int64 [B].
        instruction: B sentences.
    """

    image: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    start_position: Tensor
    start_quaternion: Tensor
    start_gripper: Tensor
    position: Tensor
    quaternion: Tensor
    gripper: Tensor
    repeated: Tensor
    demo_index: Tensor
    frame_index: Tensor
    instruction: list[str]

    def __len__(self) -> int:
        return len(self.image)

    def _map(self, change: Any) -> Self:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return type(self)(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """Moved to a device. Only floats change to `dtype` (indices stay integers, masks stay bool)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    @classmethod
    def collate(cls, samples: Sequence[Self]) -> Self:
        """Stacks samples, in a loader worker straight into shared memory.

        Each sample has the batch's fields without the first dimension, and one sentence as `instruction`.
        """
        values: dict[str, Any] = {}
        for part in fields(cls):
            column = [getattr(sample, part.name) for sample in samples]
            values[part.name] = column if part.name == "instruction" else default_collate(column)
        return cls(**values)
