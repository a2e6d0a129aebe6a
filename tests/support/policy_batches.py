"""What a robot of one arm sees where a batch of policy samples begins."""

from __future__ import annotations

from typing import Any

import numpy as np

from keygrip.data.batches import PolicyBatch


def observation_of(data: PolicyBatch, image: np.ndarray) -> dict[str, Any]:
    """An image ``[H, W, 3]`` uint8 with the first sample's camera and gripper pose."""
    return {
        "image": image,
        "intrinsics": data.intrinsics[0].numpy(),
        "world_to_camera": data.world_to_camera[0].numpy(),
        "position": data.start_position[0, 0].numpy(),
        "quaternion": data.start_quaternion[0, 0].numpy(),
        "gripper": data.start_gripper[0].numpy(),
    }
