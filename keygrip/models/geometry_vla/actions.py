"""Normalisation of actions to vectors that a flow-matching head can learn, and back. The numbers of an action are
defined in `action_spaces.py`.

Shape legend: B samples, A arms, T steps, C numbers of an arm's action.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from keygrip.data.batches import PolicyTargets
from keygrip.models.geometry_vla.action_spaces import (
    COLUMNS,
    ActionKind,
    ControllerSpace,
    JointSpace,
    PoseSpace,
    action_space,
    pose_numbers,
)
from keygrip.models.nn.precision import without_autocast
from keygrip.training.host_copy import HostCopy
from keygrip.training.parts import ReadWhere, model_part

if TYPE_CHECKING:
    from keygrip.data.robot.statistics import Range

log = logging.getLogger(__name__)

SIZE = 10  # numbers of an arm's pose: position 3, rotation columns 6, opening 1
FARTHEST = 20.0  # beyond this normalised value, the error of one number outweighs those of hundreds of others
LEAST_RANGE = 0.01  # smallest range used as a scale (metres, or entries of a rotation matrix): less is no motion


@model_part
class PoseActions(nn.Module):
    """Actions of all arms as normalised vectors ``[..., C A]``, and the statistics for it.

    A pose is its position, two columns of its rotation matrix (continuous, unlike angles or quaternions) and the
    gripper's opening (C = 10). The state is a pose, whatever the actions are. Each number is scaled so that almost
    all of the training split lies in -1 .. 1; values outside stay outside in both directions: nothing is clipped. The
    statistics are buffers: every checkpoint contains them, training and inference use the same ones, and an error is
    raised if they are used before they are set.

    Args:
        arms: their names, in the order of the batch's arm axis.
        kind: ``absolute`` poses in the world, or ``delta``: displacements from the present pose (positions along the
            world's axes, rotations in the gripper's frame); the opening is absolute in both. ``joint``: reached joint
            angles and the opening. ``osc``: the recorded inputs of an operational-space controller, as in LIBERO.
        tail: share of the values at each end that may lie outside -1 .. 1.
        arm, gripper: models of `keygrip.robots.kinematics`, for ``joint``.
        osc_position_m, osc_rotation_rad: the controller's largest translation and rotation per step, for ``osc``.
        embodiments: names of robots (in the demonstrations) that have their own statistics, with ``osc`` also their own
            shares of the controller's inputs; none: one set for all.
    """

    read_where: ClassVar = {
        "arm": ReadWhere("kind", "joint"),
        "gripper": ReadWhere("kind", "joint"),
        "osc_position_m": ReadWhere("kind", "osc"),
        "osc_rotation_rad": ReadWhere("kind", "osc"),
    }
    known: Tensor
    low: Tensor
    high: Tensor
    state_low: Tensor
    state_high: Tensor
    position_range: Tensor

    def __init__(
        self,
        arms: Sequence[str],
        kind: ActionKind = "absolute",
        tail: float = 0.01,
        arm: str = "yam",
        gripper: str = "linear_4310",
        osc_position_m: float = 0.05,
        osc_rotation_rad: float = 0.5,
        embodiments: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= tail < 0.5:
            raise ValueError(f"model.actions.tail must lie in [0, 0.5), got {tail}.")
        self.arms, self.kind, self.tail = tuple(arms), kind, tail
        self.embodiments = tuple(embodiments or ())
        robots = len(self.embodiments)
        self.space = action_space(kind, self.arms, arm, gripper, osc_position_m, osc_rotation_rad, robots)
        self.columns = COLUMNS[kind]
        self.size = len(self.arms) * self.columns
        if len(set(self.embodiments)) != len(self.embodiments):
            raise ValueError(f"model.actions.embodiments names a robot twice: {', '.join(self.embodiments)}.")
        if self.embodiments and kind == "joint":
            raise ValueError("model.actions.embodiments and kind=joint: joints are of one model of an arm.")
        robot_shape = (len(self.embodiments),) if self.embodiments else ()
        self._known = HostCopy()
        self.register_buffer("known", torch.tensor(False))
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(*robot_shape, self.size))
        for name in ("state_low", "state_high"):
            self.register_buffer(name, torch.zeros(*robot_shape, len(self.arms) * SIZE))
        if robot_shape:
            self.register_buffer("position_range", torch.zeros(*robot_shape, 2, 3))

    @property
    def reads(self) -> tuple[str, ...]:
        """Recordings that actions are computed from, other than poses: "joints" or "controller"."""
        return () if self.space.reads is None else (self.space.reads,)

    def take(self, chunks: PolicyTargets, robot_ranges: Mapping[str, Range] | None = None) -> None:
        """Compute the statistics from action chunks of the training split; padded steps do not count.

        Args:
            robot_ranges: with `embodiments`, the lowest and highest position of each robot, metres.
        """
        if chunks.position.shape[1] != len(self.arms):
            raise ValueError(
                f"The data has {chunks.position.shape[1]} arms and the model {len(self.arms)}: set data.arms."
            )
        if isinstance(self.space, JointSpace) or (isinstance(self.space, ControllerSpace) and not self.embodiments):
            self.space.take(chunks)
        state = pose_numbers(chunks.start_position, chunks.start_quaternion, chunks.start_gripper).flatten(-2)
        actions, mask = self._raw(chunks), self.mask(chunks)
        if not self.embodiments:
            self._take_rows(state, actions, mask, ...)
        for robot, name in enumerate(self.embodiments):
            rows = self._require_embodiment(chunks.embodiment) == robot
            if not rows.any():
                raise ValueError(
                    f"model.actions.embodiments names {name!r}, of which there is no training demonstration."
                )
            if isinstance(self.space, ControllerSpace):
                self.space.take(chunks, rows, robot, name)
            self._take_rows(state[rows], actions[rows], mask[rows], robot)
            if robot_ranges is None or name not in robot_ranges:
                raise ValueError(f"the data module's statistics hold no range of the positions of {name!r}")
            self.position_range[robot] = torch.tensor(robot_ranges[name])
        self.known.fill_(True)

    def _take_rows(self, state: Tensor, actions: Tensor, mask: Tensor, row: Any) -> None:
        reach = {}
        for column in range(state.shape[-1]):
            values = state[:, column]
            reach[self._describe_column("state", column, SIZE)] = self._take(
                values, self.state_low[row], self.state_high[row], column
            )
        for column in range(self.size):
            values = actions[..., column][mask[..., column]]
            reach[self._describe_column("actions", column, self.columns)] = self._take(
                values, self.low[row], self.high[row], column
            )
        far = {name: beyond for name, beyond in reach.items() if beyond > FARTHEST}
        if far:
            log.warning(
                "of the training split's normalised numbers, of which all but %g %% lie in -1 .. 1, some reach %s: "
                "errors there will outweigh all others. Repair outliers, or normalise by the whole range with "
                "model.actions.tail=0",
                200 * self.tail,
                ", ".join(f"{beyond:.0f} ({name})" for name, beyond in sorted(far.items(), key=lambda each: -each[1])),
            )

    def _describe_column(self, quantity: str, column: int, columns: int) -> str:
        return f"number {column % columns + 1} of the {self.arms[column // columns]} arm's {quantity}"

    def _take(self, values: Tensor, low: Tensor, high: Tensor, column: int) -> float:
        """Store the bounds of one number; return the largest absolute value of its normalised values."""
        if not len(values):
            raise ValueError("The training split holds no action that is not padding: give longer demonstrations.")
        bounds = torch.tensor([self.tail, 1 - self.tail], dtype=torch.float64)
        low_value, high_value = torch.quantile(values.double().sort().values, bounds).tolist()
        middle, half = (low_value + high_value) / 2, max((high_value - low_value) / 2, LEAST_RANGE)
        low[column] = middle - half
        high[column] = middle + half
        return float((values.double() - middle).abs().max()) / half

    def _require_embodiment(self, embodiment: Tensor | None) -> Tensor:
        if embodiment is None:
            raise ValueError(f"the model distinguishes {', '.join(self.embodiments)}: name the robot of each sample")
        return embodiment

    def _of(self, name: str, embodiment: Tensor | None) -> Tensor:
        """A statistic by name: ``[Da]``, or with several robots that of each sample's robot, ``[B, Da]``."""
        values: Tensor = getattr(self, name)
        return values[self._require_embodiment(embodiment)] if self.embodiments else values

    def _check(self) -> None:
        if not self._known(self.known):
            raise ValueError(
                "The policy has no statistics of its training actions: train it, or load a checkpoint written by "
                "keygrip.train."
            )

    def state(self, position: Tensor, quaternion: Tensor, gripper: Tensor, embodiment: Tensor | None = None) -> Tensor:
        """The arms' present poses, normalised: ``[B, 10 A]`` from ``[B, A, 3]``, ``[B, A, 4]`` and ``[B, A]``; with
        several robots ``embodiment`` ``[B]`` gives each sample's robot."""
        self._check()
        numbers = pose_numbers(position, quaternion, gripper).flatten(-2)
        return _normalise_min_max(numbers, self._of("state_low", embodiment), self._of("state_high", embodiment))

    def places(self, points: Tensor, embodiment: Tensor | None = None) -> Tensor:
        """Normalise world points ``[B, A, M, 3]``, metres, in the same way as the state's positions."""
        self._check()
        shape = (-1, len(self.arms), 1, SIZE)
        low, high = (self._of(name, embodiment).reshape(shape)[..., :3] for name in ("state_low", "state_high"))
        return _normalise_min_max(points, low, high)

    def encode(self, targets: PolicyTargets) -> Tensor:
        """Convert the targets of a batch to normalised actions, ``[B, T, C A]``."""
        self._check()
        return self._normalised(self._raw(targets), targets.embodiment)

    def encode_poses(
        self,
        position: Tensor,
        quaternion: Tensor,
        gripper: Tensor,
        start_position: Tensor,
        start_quaternion: Tensor,
        embodiment: Tensor | None = None,
    ) -> Tensor:
        """Convert poses to normalised actions ``[B, T, 10 A]``, the inverse of `decode`.

        Args:
            position: ``[B, A, T, 3]``. quaternion: ``[B, A, T, 4]``. gripper: ``[B, A, T]``.
            start_position, start_quaternion: ``[B, A, 3]`` and ``[B, A, 4]``, the present pose.
            embodiment: ``[B]``, with several robots.

        Raises:
            ValueError: actions are not poses.
        """
        self._check()
        if not isinstance(self.space, PoseSpace):
            raise ValueError(f"actions of kind {self.kind} are not made of poses: use absolute or delta")
        numbers = self.space.from_poses(position, quaternion, gripper, start_position, start_quaternion)
        return self.encode_numbers(numbers, embodiment)

    def encode_numbers(self, numbers: Tensor, embodiment: Tensor | None = None) -> Tensor:
        """Normalise actions in their own units ``[B, A, T, C]`` to ``[B, T, C A]``, the inverse of `numbers`."""
        self._check()
        return self._normalised(numbers.transpose(1, 2).flatten(-2), embodiment)

    def _normalised(self, raw: Tensor, embodiment: Tensor | None) -> Tensor:
        low, high = self._of("low", embodiment), self._of("high", embodiment)
        if self.embodiments:
            low, high = low[:, None], high[:, None]  # the same at all steps
        return _normalise_min_max(raw, low, high)

    def numbers(self, actions: Tensor, embodiment: Tensor | None = None) -> Tensor:
        """Convert normalised actions ``[B, T, C A]`` to their own units, ``[B, A, T, C]``; values outside -1 .. 1 are
        valid."""
        self._check()
        low, high = self._of("low", embodiment), self._of("high", embodiment)
        if self.embodiments:
            low, high = low[:, None], high[:, None]
        raw = low + (actions.float() + 1) / 2 * (high - low)
        return raw.unflatten(-1, (len(self.arms), self.columns)).transpose(1, 2)

    def decode(
        self, actions: Tensor, position: Tensor, quaternion: Tensor, embodiment: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Poses of normalised actions: position ``[B, A, T, 3]``, quaternion ``[B, A, T, 4]``, opening ``[B, A, T]``.

        Args:
            actions: ``[B, T, C A]``. position, quaternion: ``[B, A, 3]`` and ``[B, A, 4]``, the present pose.
            embodiment: ``[B]``, with several robots.
        """
        with without_autocast(actions):  # a pose in bf16 is off by millimetres
            numbers = self.numbers(actions, embodiment)
            if isinstance(self.space, ControllerSpace):
                return self.space.poses(numbers, position, quaternion, embodiment)
            return self.space.poses(numbers, position, quaternion)

    def target_poses(self, targets: PolicyTargets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the poses that the actions of a batch are for, as `decode` gives them: the batch's own, and for
        ``joint`` those of its joints, which are reached ones also where the batch's poses are commanded."""
        if not isinstance(self.space, JointSpace):
            return targets.position, targets.quaternion, targets.gripper
        with without_autocast(targets.position):
            return self.space.poses(self.space.numbers(targets), targets.start_position, targets.start_quaternion)

    def mask(self, targets: PolicyTargets) -> Tensor:
        """bool ``[B, T, C A]``: False where the step is padding after the end of a demonstration."""
        return (~targets.action_is_pad).transpose(1, 2).repeat_interleave(self.columns, dim=-1)

    def _raw(self, targets: PolicyTargets) -> Tensor:
        return self.space.numbers(targets).transpose(1, 2).flatten(-2)


def _normalise_min_max(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (values - low) / (high - low) * 2 - 1
