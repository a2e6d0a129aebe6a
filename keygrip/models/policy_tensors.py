"""Conversion between the interface of policies and their networks: observations of several sessions to tensors, and
planned tensors to plans.

Shape legend: B observations, V views, A arms, T planned steps, S side of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from keygrip.data.robot.augmentation import View
from keygrip.models.policy import Observation, Plan, poses_of, refuse_not_finite


def stacked(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Stack arrays of one shape to a tensor ``[len(arrays), ...]``, float32."""
    return torch.as_tensor(np.stack(arrays), dtype=torch.float32, device=device)


def stacked_poses(
    observations: Sequence[Observation], arms: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return present poses, float32: position ``[B, A, 3]`` metres, quaternion ``[B, A, 4]`` wxyz, gripper ``[B, A]``.

    Raises:
        ValueError: as `keygrip.models.policy.poses_of`.
    """
    poses = [poses_of(observation, arms) for observation in observations]
    position, quaternion, gripper = (stacked(parts, device) for parts in zip(*poses, strict=True))
    return position, quaternion, gripper


def stacked_views(views: Sequence[Sequence[View]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Stack images uint8 ``[B, V, 3, S, S]``, and float32 intrinsics ``[B, V, 3, 3]`` and world_to_camera
    ``[B, V, 4, 4]``."""
    images = np.stack([np.stack([view.image.transpose(2, 0, 1) for view in row]) for row in views])
    intrinsics = [np.stack([view.intrinsics for view in row]) for row in views]
    world_to_camera = [np.stack([view.world_to_camera for view in row]) for row in views]
    return torch.from_numpy(images).to(device), stacked(intrinsics, device), stacked(world_to_camera, device)


@contextmanager
def restored_on_error(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Return the generators to their present states if the block raises.

    After a failed batch, a server plans for each session alone; these plans must be the ones that the session's seed
    gives without the batch.
    """
    states = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:  # also a panic of a Rust extension, after which the server plans on
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        raise


def plans_of(
    position: Tensor,
    quaternion: Tensor,
    gripper: Tensor,
    step_seconds: float,
    uncertainty: Tensor | None = None,
    held_back: Tensor | None = None,
) -> list[Plan]:
    """Return a plan for each observation.

    Args:
        position: ``[B, A, T, 3]``. quaternion: ``[B, A, T, 4]``. gripper, uncertainty: ``[B, A, T]``.
        held_back: ``[B, A, 3]``. See `Plan`.

    Raises:
        ValueError: a number is not finite.
    """
    entropies, distances = (
        [None] * len(position) if part is None else part.double().cpu().numpy() for part in (uncertainty, held_back)
    )
    poses = (part.double().cpu().numpy() for part in (position, quaternion, gripper))
    plans = [
        Plan(path, rotations, openings, step_seconds, entropy, held_back=distance)
        for path, rotations, openings, entropy, distance in zip(*poses, entropies, distances, strict=True)
    ]
    for plan in plans:
        refuse_not_finite(plan)
    return plans
