"""Poses as vectors that a flow-matching head can learn, and back: what an action is, and how it is normalised.

Shape legend: B samples, A arms, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from keygrip.data.batches import PolicyTargets
from keygrip.models.geometry.rotations import (
    columns_to_quaternion,
    quaternion_conjugate,
    quaternion_multiply,
    quaternion_to_columns,
)
from keygrip.training.parts import model_part

PoseKind = Literal["absolute", "delta"]
SIZE = 10  # of an arm's pose: position 3, rotation columns 6, opening 1
LEAST_RANGE = 0.01  # metres, or what a rotation matrix holds: less than this is standing still, not a scale


@model_part
class PoseActions(nn.Module):
    """Poses of all arms as normalised vectors ``[..., 10 A]``, and the statistics that this takes.

    A pose is its position, two columns of its rotation matrix (continuous, unlike angles or quaternions) and the
    gripper's opening. Each number is scaled so that almost all of the training split lies in -1 .. 1; what lies beyond
    stays beyond, both ways: nothing is clipped. The statistics are buffers: they lie in every checkpoint, training and
    inference read the same ones, and reading them before they are there raises.

    Args:
        arms: their names, in the order of the batch's arm axis.
        kind: ``absolute`` poses in the world, or ``delta``: the way from the present pose (positions in the world's
            axes, rotations in the gripper's). The opening is absolute in both.
        tail: share of the values at either end that may lie beyond -1 .. 1.
    """

    known: Tensor
    low: Tensor
    high: Tensor
    state_low: Tensor
    state_high: Tensor

    def __init__(self, arms: Sequence[str], kind: PoseKind = "absolute", tail: float = 0.01) -> None:
        super().__init__()
        if kind not in ("absolute", "delta"):
            raise ValueError(f"model.actions.kind is absolute or delta, not {kind!r}.")
        if not 0 <= tail < 0.5:
            raise ValueError(f"model.actions.tail must lie in [0, 0.5), got {tail}.")
        self.arms, self.kind, self.tail = tuple(arms), kind, tail
        self.size = len(self.arms) * SIZE
        self.register_buffer("known", torch.tensor(False))
        for name in ("low", "high", "state_low", "state_high"):
            self.register_buffer(name, torch.zeros(self.size))

    def take(self, chunks: PolicyTargets) -> None:
        """Computes the statistics from action chunks of the training split; padded steps do not count."""
        if chunks.position.shape[1] != len(self.arms):
            raise ValueError(
                f"The data has {chunks.position.shape[1]} arms and the model {len(self.arms)}: set data.arms."
            )
        state = self._flat(_features(chunks.start_position, chunks.start_quaternion, chunks.start_gripper))
        actions = self._raw(chunks)
        mask = self.mask(chunks)
        for column in range(self.size):
            self._take(column, state[:, column], "state_low", "state_high")
            self._take(column, actions[..., column][mask[..., column]], "low", "high")
        self.known.fill_(True)

    def _take(self, column: int, values: Tensor, low: str, high: str) -> None:
        if not len(values):
            raise ValueError("The training split holds no action that is not padding: give longer demonstrations.")
        bounds = torch.tensor([self.tail, 1 - self.tail], dtype=torch.float64)
        low_value, high_value = torch.quantile(values.double().sort().values, bounds).tolist()
        middle, half = (low_value + high_value) / 2, max((high_value - low_value) / 2, LEAST_RANGE)
        getattr(self, low)[column] = middle - half
        getattr(self, high)[column] = middle + half

    def _check(self) -> None:
        if not bool(self.known):
            raise ValueError(
                "The policy has no statistics of its training actions: train it, or load a checkpoint written by "
                "keygrip.train."
            )

    def state(self, position: Tensor, quaternion: Tensor, gripper: Tensor) -> Tensor:
        """The arms' present poses, normalised: ``[B, 10 A]`` from ``[B, A, 3]``, ``[B, A, 4]`` and ``[B, A]``."""
        self._check()
        return _scaled(self._flat(_features(position, quaternion, gripper)), self.state_low, self.state_high)

    def encode(self, targets: PolicyTargets) -> Tensor:
        """The targets of a batch as normalised actions, ``[B, T, 10 A]``."""
        self._check()
        return _scaled(self._raw(targets), self.low, self.high)

    def encode_poses(
        self, position: Tensor, quaternion: Tensor, gripper: Tensor, start_position: Tensor, start_quaternion: Tensor
    ) -> Tensor:
        """Poses as normalised actions ``[B, T, 10 A]``, the inverse of `decode`.

        Args:
            position: ``[B, A, T, 3]``. quaternion: ``[B, A, T, 4]``. gripper: ``[B, A, T]``.
            start_position, start_quaternion: ``[B, A, 3]`` and ``[B, A, 4]``, the present pose.
        """
        self._check()
        if self.kind == "delta":
            position = position - start_position[:, :, None]
            inverse = quaternion_conjugate(start_quaternion)[:, :, None].expand_as(quaternion)
            quaternion = quaternion_multiply(inverse, quaternion)
        return _scaled(self._flat(_features(position, quaternion, gripper).transpose(1, 2)), self.low, self.high)

    def decode(self, actions: Tensor, position: Tensor, quaternion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Poses of normalised actions: position ``[B, A, T, 3]``, quaternion ``[B, A, T, 4]``, opening ``[B, A, T]``.

        Args:
            actions: ``[B, T, 10 A]``; values beyond -1 .. 1 are as good as others.
            position, quaternion: ``[B, A, 3]`` and ``[B, A, 4]``, the present pose.
        """
        self._check()
        raw = self.low + (actions.float() + 1) / 2 * (self.high - self.low)
        poses = raw.unflatten(-1, (len(self.arms), SIZE)).transpose(1, 2)  # [B, A, T, 10]
        where, columns, gripper = poses[..., :3], poses[..., 3:9].unflatten(-1, (3, 2)), poses[..., 9]
        turned = columns_to_quaternion(columns)
        if self.kind == "delta":
            where = position[:, :, None] + where
            turned = quaternion_multiply(quaternion[:, :, None].expand_as(turned), turned)
        return where, turned, gripper

    def mask(self, targets: PolicyTargets) -> Tensor:
        """bool ``[B, T, 10 A]``: False where the step is padding behind the end of a demonstration."""
        return (~targets.action_is_pad).transpose(1, 2).repeat_interleave(SIZE, dim=-1)

    def _raw(self, targets: PolicyTargets) -> Tensor:
        position, quaternion = targets.position, targets.quaternion
        if self.kind == "delta":
            position = position - targets.start_position[:, :, None]
            inverse = quaternion_conjugate(targets.start_quaternion)[:, :, None].expand_as(quaternion)
            quaternion = quaternion_multiply(inverse, quaternion)
        return self._flat(_features(position, quaternion, targets.gripper).transpose(1, 2))

    def _flat(self, features: Tensor) -> Tensor:
        return features.flatten(-2)


def _features(position: Tensor, quaternion: Tensor, gripper: Tensor) -> Tensor:
    """``[..., 10]``."""
    columns = quaternion_to_columns(quaternion).flatten(-2)
    return torch.cat([position, columns, gripper[..., None]], dim=-1)


def _scaled(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (values - low) / (high - low) * 2 - 1
