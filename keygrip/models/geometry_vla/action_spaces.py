"""Action spaces: poses, displacements from the present pose, joint angles, or the inputs of a controller.

Each space converts the targets of a batch to the numbers of an action, and these numbers back to poses, which metrics,
limits and robots use. No space normalises.

Shape legend: B samples, A arms, T steps, C numbers of an arm's action, J joints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from keygrip.data.batches import PolicyTargets
from keygrip.models.geometry.rotations import (
    columns_to_quaternion,
    matrix_to_quaternion,
    quaternion_conjugate,
    quaternion_multiply,
    quaternion_to_columns,
    quaternion_to_matrix,
    rotation_exp,
    rotation_log,
)
from keygrip.robots.kinematics import ARM_JOINTS, arm_chain

ActionKind = Literal["absolute", "delta", "joint", "osc"]
COLUMNS: dict[str, int] = {"absolute": 10, "delta": 10, "joint": ARM_JOINTS + 1, "osc": 7}  # C of each kind
LARGEST_RESIDUAL_M = 0.02  # largest allowed distance of recorded positions from those computed from the joints
LEAST_INPUT = 1e-9  # smallest sum of squared controller inputs to which a share can be fitted
LARGEST_SHARE = 1.5  # largest share of the requested motion that an arm makes in a step; 1: all of it
LEAST_CORRELATION = 0.1  # between requested and actual motion; below it one does not predict the other

log = logging.getLogger(__name__)


def pose_numbers(position: Tensor, quaternion: Tensor, gripper: Tensor) -> Tensor:
    """``[..., 10]``: position, two columns of the rotation matrix, opening."""
    columns = quaternion_to_columns(quaternion).flatten(-2)
    return torch.cat([position, columns, gripper[..., None]], dim=-1)


class PoseSpace(nn.Module):
    """Poses in the world, or their displacements from the present pose (positions along the world's axes, rotations in
    the gripper's frame); the opening is absolute in both."""

    reads: str | None = None

    def __init__(self, delta: bool) -> None:
        super().__init__()
        self.delta = delta

    def from_poses(
        self, position: Tensor, quaternion: Tensor, gripper: Tensor, start_position: Tensor, start_quaternion: Tensor
    ) -> Tensor:
        """Numbers ``[B, A, T, 10]`` of poses; the inverse of `poses`.

        Args:
            position: ``[B, A, T, 3]`` m. quaternion: ``[B, A, T, 4]``. gripper: ``[B, A, T]``.
            start_position, start_quaternion: ``[B, A, 3]`` and ``[B, A, 4]``, the present pose.
        """
        if self.delta:
            position = position - start_position[:, :, None]
            inverse = quaternion_conjugate(start_quaternion)[:, :, None].expand_as(quaternion)
            quaternion = quaternion_multiply(inverse, quaternion)
        return pose_numbers(position, quaternion, gripper)

    def numbers(self, targets: PolicyTargets) -> Tensor:
        poses = (targets.position, targets.quaternion, targets.gripper)
        return self.from_poses(*poses, targets.start_position, targets.start_quaternion)

    def poses(self, numbers: Tensor, position: Tensor, quaternion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_position, columns, gripper = numbers[..., :3], numbers[..., 3:9].unflatten(-1, (3, 2)), numbers[..., 9]
        new_quaternion = columns_to_quaternion(columns)
        if self.delta:
            new_position = position[:, :, None] + new_position
            new_quaternion = quaternion_multiply(quaternion[:, :, None].expand_as(new_quaternion), new_quaternion)
        return new_position, new_quaternion, gripper


class JointSpace(nn.Module):
    """Joint angles, radians, and the gripper's opening. Poses are computed with the arm's kinematic model, whose base
    pose is estimated from the training data.

    Args:
        arms: their names. arm, gripper: models in `keygrip.robots.kinematics`, the same for every arm.
    """

    reads: str | None = "joints"
    axes: Tensor
    offsets: Tensor
    rotations: Tensor
    tool_offset: Tensor
    tool_rotation: Tensor
    base_position: Tensor
    base_rotation: Tensor

    def __init__(self, arms: Sequence[str], arm: str = "yam", gripper: str = "linear_4310") -> None:
        super().__init__()
        chain = arm_chain(arm, gripper)
        for name in ("offsets", "rotations", "axes", "tool_offset", "tool_rotation"):
            values = torch.from_numpy(np.asarray(getattr(chain, name), dtype=np.float32))
            self.register_buffer(name, values, persistent=False)  # depends on the robot's model, not on training
        self.register_buffer("base_position", torch.zeros(len(arms), 3))
        self.register_buffer("base_rotation", torch.eye(3).repeat(len(arms), 1, 1))
        self.arms = tuple(arms)

    def numbers(self, targets: PolicyTargets) -> Tensor:
        joints = _require_recorded(targets.joints, "joints")
        if joints.shape[-1] != ARM_JOINTS:
            raise ValueError(
                f"model.actions.kind=joint drives arms of {ARM_JOINTS} joints, the demonstrations have "
                f"{joints.shape[-1]}: use absolute or delta"
            )
        return torch.cat([joints, targets.gripper[..., None]], dim=-1)

    def take(self, targets: PolicyTargets) -> None:
        """Estimate the pose of each arm's base from recorded poses and joints.

        Raises:
            ValueError: the recorded positions differ from those of the arm's model at the recorded joints.
        """
        joints = _require_recorded(targets.start_joints, "joints")
        position, rotation = self._in_base(joints[..., :ARM_JOINTS])  # [B, A, 3] and [B, A, 3, 3]
        base_rotations = quaternion_to_matrix(targets.start_quaternion) @ rotation.transpose(-1, -2)
        left, _, right = torch.linalg.svd(base_rotations.double().mean(dim=0))
        base = left @ right
        rotated_position = (base.float() @ position[..., None])[..., 0]
        offset = (targets.start_position - rotated_position).mean(dim=0)
        residual = (targets.start_position - rotated_position - offset).norm(dim=-1).max()
        if not residual < LARGEST_RESIDUAL_M:
            raise ValueError(
                f"model.actions.kind=joint: the recorded positions are up to {100 * float(residual):.1f} cm from those "
                "of a YAM at the recorded joints, so that joints could not be turned into poses: use absolute or delta"
            )
        self.base_rotation.copy_(base)
        self.base_position.copy_(offset)

    def poses(self, numbers: Tensor, position: Tensor, quaternion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_position, rotation = self._in_base(numbers[..., :ARM_JOINTS])
        base = self.base_rotation[:, None]
        new_position = (base @ new_position[..., None])[..., 0] + self.base_position[:, None]
        return new_position, matrix_to_quaternion(base @ rotation), numbers[..., ARM_JOINTS]

    def _in_base(self, joints: Tensor) -> tuple[Tensor, Tensor]:
        """Position ``[..., 3]`` and rotation ``[..., 3, 3]`` of the grasp site in the arm's base."""
        shape = joints.shape[:-1]
        rotation = torch.eye(3, device=joints.device).expand(*shape, 3, 3)
        position = torch.zeros(*shape, 3, device=joints.device)
        for index in range(ARM_JOINTS):
            position = position + rotation @ self.offsets[index]
            rotation = rotation @ self.rotations[index]
            turn = rotation_exp(joints[..., index, None] * self.axes[index])
            rotation = rotation @ quaternion_to_matrix(turn)
        return position + rotation @ self.tool_offset, rotation @ self.tool_rotation


class ControllerSpace(nn.Module):
    """Inputs of an operational-space controller at every step (robosuite's OSC_POSE, LIBERO's actions): a translation
    and a rotation (rotation vector; both along the world's axes) as shares of the largest ones, and the gripper, -1
    open to 1 closed.

    Each input sets a goal relative to the pose that the arm has reached, not to the previous goal, and the arm covers
    only part of the way within a step. Poses are therefore an estimate: in each step the arm makes one share of the
    requested translation and another share of the requested rotation. Both shares are fitted to the recordings.

    Args:
        position_m, rotation_rad: the controller's largest translation and rotation per step (its `output_max`). They
            are the same for all robots; a robot whose controller has others gets shares that make up for it.
        robots: number of robots that have their own shares; 0: one pair for all.

    Attributes:
        shares: ``[2]``, the shares of the requested translation and rotation that the arm makes in a step; with
            `robots`, those of each robot, ``[robots, 2]``.
    """

    reads: str | None = "controller"
    shares: Tensor

    def __init__(self, position_m: float = 0.05, rotation_rad: float = 0.5, robots: int = 0) -> None:
        super().__init__()
        if not (position_m > 0 and rotation_rad > 0):
            raise ValueError(f"the controller's largest way and turn are positive, not {position_m}, {rotation_rad}")
        self.position_m, self.rotation_rad = position_m, rotation_rad
        self.register_buffer("shares", torch.ones(robots, 2) if robots else torch.ones(2))
        self.register_load_state_dict_pre_hook(_adopt_common_shares)

    def numbers(self, targets: PolicyTargets) -> Tensor:
        controller = _require_recorded(targets.controller, "controller actions")
        if controller.shape[-1] != COLUMNS["osc"]:
            raise ValueError(
                f"model.actions.kind=osc needs 7 numbers per step, the recordings have {controller.shape[-1]}"
            )
        return controller

    def take(self, targets: PolicyTargets, rows: Tensor | None = None, robot: int = 0, name: str = "") -> None:
        """Fit the shares by least squares to the motion of the arms in each recorded step.

        Args:
            rows: bool ``[B]``, the samples of one of several robots. robot, name: its number and name.

        Raises:
            ValueError: the arms do not follow the inputs: the axes, or the row of the recording, are others.
        """
        inputs, real, owner = self.numbers(targets), ~targets.action_is_pad, f" of {name!r}" if name else ""
        if rows is not None:
            real = real & rows[:, None, None]
        previous_position = torch.cat([targets.start_position[:, :, None], targets.position[:, :, :-1]], dim=2)
        previous_quaternion = torch.cat([targets.start_quaternion[:, :, None], targets.quaternion[:, :, :-1]], dim=2)
        commands = (inputs[..., :3] * self.position_m, inputs[..., 3:6] * self.rotation_rad)
        motions = (
            targets.position - previous_position,
            rotation_log(quaternion_multiply(targets.quaternion, quaternion_conjugate(previous_quaternion))),
        )
        shares = self.shares if rows is None else self.shares[robot]
        for i, (values, command, motion) in enumerate(zip(("positions", "rotations"), commands, motions, strict=True)):
            command, motion = command[real].double(), motion[real].double()
            size = command.square().sum()
            if size < LEAST_INPUT:
                continue  # never requested in training, so not in plans either
            share = float((command * motion).sum() / size)
            correlation = float((command * motion).sum() / (size * motion.square().sum()).sqrt().clamp_min(1e-12))
            if abs(correlation) < LEAST_CORRELATION:
                share = min(max(share, 0.0), 1.0)
                log.warning(
                    "the recorded %s%s hardly follow the controller's inputs (correlation %.2f)",
                    *(values, owner, correlation),
                )
            elif not 0 < share <= LARGEST_SHARE:
                raise ValueError(
                    f"model.actions.kind=osc: the recorded {values}{owner} move by {share:.2f} times what the "
                    "controller's inputs ask for, where a controller comes part of the way: its largest way and turn "
                    "(model.actions.osc_position_m, osc_rotation_rad) or its axes are others; use absolute or delta"
                )
            shares[i] = share

    def poses(
        self, numbers: Tensor, position: Tensor, quaternion: Tensor, embodiment: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = self.shares
        if shares.dim() == 2:
            if embodiment is None:
                raise ValueError("each robot has its own shares of the controller's inputs: name that of each sample")
            shares = shares[embodiment][:, None, None, None]  # [B, 1, 1, 1, 2]
        position_share, rotation_share = shares.unbind(-1)
        new_position = position[:, :, None] + torch.cumsum(numbers[..., :3] * self.position_m * position_share, dim=2)
        current, quaternions = quaternion, []
        for step in rotation_exp(numbers[..., 3:6] * self.rotation_rad * rotation_share).unbind(dim=2):
            current = quaternion_multiply(step, current)
            quaternions.append(current)
        return new_position, torch.stack(quaternions, dim=2), (1 - numbers[..., 6]) / 2


def _adopt_common_shares(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give each robot the one pair of shares of checkpoints from before robots had their own."""
    built, stored = module.shares, state.get(f"{prefix}shares")
    if isinstance(stored, Tensor) and isinstance(built, Tensor) and stored.shape == (2,) and built.dim() == 2:
        state[f"{prefix}shares"] = stored.expand_as(built)


def _require_recorded(values: Tensor | None, quantity: str) -> Tensor:
    if values is None:
        raise ValueError(
            f"the demonstrations hold no {quantity}, which model.actions.kind asks for: use absolute or delta"
        )
    return values


def action_space(
    kind: str, arms: Sequence[str], arm: str, gripper: str, osc_position_m: float, osc_rotation_rad: float, robots: int
) -> PoseSpace | JointSpace | ControllerSpace:
    """Build the space of a kind of action. `robots`: number of those with their own statistics; 0: one set for all.

    Raises:
        ValueError: there is no such kind, arm or gripper.
    """
    if kind not in COLUMNS:
        raise ValueError(f"model.actions.kind is one of {', '.join(COLUMNS)}, not {kind!r}.")
    if kind == "joint":
        return JointSpace(arms, arm, gripper)
    return ControllerSpace(osc_position_m, osc_rotation_rad, robots) if kind == "osc" else PoseSpace(kind == "delta")
