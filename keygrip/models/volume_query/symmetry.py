"""Equivalent grips: turns of the gripper about the vertical under which the object is symmetric.

A cube can be gripped equally well after a quarter turn, a bar after a half turn; a policy that moves both kinds
distinguishes them by a word of the instruction. Planning another of these grips than the demonstration is not an error:
the loss uses the summed probability of their classes, and errors are measured to the nearest of them. Once the object
is held there is no choice, so all this applies only to plans that begin with an open gripper. Steps are decoded one by
one and may come out as different equivalents. Each is therefore replaced by the equivalent nearest to the previous
step, so that the gripper does not turn from one grip to another.

Shape legend: ``*`` leading shape, T steps, R rotation classes, N the order of the symmetry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keygrip.models.geometry.rotation_codecs import RotationCodec
from keygrip.models.geometry.rotations import geodesic_angle, quaternion_multiply

MOST_TURNS = 8


@dataclass(frozen=True)
class GripSymmetry:
    """Number of equal turns about the vertical that give the same grip.

    Args:
        orders: one number for every plan, 1 (none) to 8; or one number from 2 to 8 per word of the instruction, e.g.
            {"cube": 4, "bar": 2}. Plans whose instruction contains none of these words have one grip.

    Raises:
        ValueError: a number out of range, or no words.
    """

    orders: int | Mapping[str, int]

    def __post_init__(self) -> None:
        if isinstance(self.orders, Mapping):
            object.__setattr__(self, "orders", {str(word).lower(): int(n) for word, n in self.orders.items()})
        least = 2 if self.depends_on_instruction else 1
        if not self._numbers or not all(least <= order <= MOST_TURNS for order in self._numbers):
            raise ValueError(
                f"model.rotation_symmetry is 1 (none) to {MOST_TURNS} equal turns, or 2 to {MOST_TURNS} by a word of "
                f"the instruction ({{cube: 4, bar: 2}}), not {self.orders}"
            )

    @property
    def depends_on_instruction(self) -> bool:
        """Whether the number depends on the instruction."""
        return isinstance(self.orders, Mapping)

    @property
    def _numbers(self) -> list[int]:
        return sorted(set(self.orders.values())) if isinstance(self.orders, Mapping) else [self.orders]

    @property
    def is_symmetric(self) -> bool:
        """Whether any plan has several equivalent grips."""
        return self.orders != 1

    def order_of(self, instruction: str) -> int:
        """The number of equal turns for an instruction.

        Raises:
            ValueError: the instruction contains words with different numbers.
        """
        if not isinstance(self.orders, Mapping):
            return self.orders
        words = [word for word in dict.fromkeys(re.findall(r"\w+", instruction.lower())) if word in self.orders]
        if len({self.orders[word] for word in words}) > 1:
            raise ValueError(
                f"model.rotation_symmetry has different numbers for {' and '.join(words)}, which the instruction "
                f"{instruction!r} names both: leave out the word that is not of the object to grip"
            )
        return self.orders[words[0]] if words else 1

    def refuse_unfit(self, instructions: Sequence[str]) -> None:
        """Raise ValueError if a word is in no training instruction, or an instruction's words have unequal numbers."""
        words = {word for sentence in instructions for word in re.findall(r"\w+", sentence.lower())}
        unknown = sorted(set(self.orders) - words) if isinstance(self.orders, Mapping) else []
        if unknown:
            raise ValueError(
                f"model.rotation_symmetry names {unknown[0]!r}, a word that no instruction of the demonstrations has"
            )
        for sentence in instructions:
            self.order_of(sentence)

    def choices(self, instructions: Sequence[str], free: Tensor) -> list[tuple[int, Tensor]]:
        """Each number of turns with the plans that have it: ``free`` ``[B, *]``, False for other instructions."""
        if not self.depends_on_instruction:
            return [(self._numbers[0], free)]
        orders = torch.tensor([self.order_of(sentence) for sentence in instructions], device=free.device)
        return [(order, free & (orders == order).view(-1, *[1] * (free.ndim - 1))) for order in self._numbers]


def equivalent_turns(quaternion: Tensor, order: int) -> Tensor:
    """Apply N equal turns about the world's vertical to rotations ``[*, 4]``: ``[*, N, 4]``; the first turn is zero."""
    half = math.pi / order * torch.arange(order, device=quaternion.device, dtype=quaternion.dtype)
    turn = torch.stack([half.cos(), torch.zeros_like(half), torch.zeros_like(half), half.sin()], dim=-1)  # [N, 4]
    return quaternion_multiply(turn.expand(*quaternion.shape[:-1], order, 4), quaternion[..., None, :])


def equivalent_classes(codec: RotationCodec, quaternion: Tensor, free: Tensor, order: int) -> Tensor:
    """Bool ``[*, R]``: the classes of the rotations ``[*, 4]`` and, where ``free`` ``[*]``, of their equivalents.

    An equivalent that the codec cannot represent (no training rotation is near it) has no class.
    """
    equivalents = equivalent_turns(quaternion, order)
    codes = codec.encode(equivalents)  # [*, N]
    counts = codec.covers(equivalents, like=equivalents[..., :1, :]) & free[..., None]
    counts[..., 0] = True
    chosen = torch.zeros(*quaternion.shape[:-1], codec.classes, dtype=torch.int64, device=quaternion.device)
    return chosen.scatter_add(-1, codes, counts.long()) > 0


def shared_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Negative log of the summed probability ``[*]`` of the classes, bool ``[*, R]``, under logits ``[*, R]``."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits.masked_fill(~classes, -torch.inf).logsumexp(-1)


def steady_turns(quaternion: Tensor, start: Tensor, free: Tensor, codec: RotationCodec, order: int) -> Tensor:
    """Rotations ``[*, T, 4]`` of a plan's steps; each is the equivalent nearest to the previous step.

    Args:
        quaternion: ``[*, T, 4]`` as decoded. start: ``[*, 4]``, the gripper's present rotation, before the first step.
        free: ``[*]``, whether equivalents may be chosen. codec: equivalents that it does not cover are left out.
    """
    equivalents = equivalent_turns(quaternion, order)  # [*, T, N, 4]
    allowed = codec.covers(equivalents, like=equivalents[..., :1, :]) & free[..., None, None]
    allowed[..., 0] = True
    chosen, previous = [], start
    for t in range(quaternion.shape[-2]):
        angles = geodesic_angle(equivalents[..., t, :, :], previous[..., None, :]).masked_fill(
            ~allowed[..., t, :], torch.inf
        )
        index = angles.argmin(-1)[..., None, None].expand(*angles.shape[:-1], 1, 4)
        previous = equivalents[..., t, :, :].gather(-2, index)[..., 0, :]
        chosen.append(previous)
    return torch.stack(chosen, dim=-2)


def nearest_angle(found: Tensor, true: Tensor, free: Tensor, order: int) -> Tensor:
    """Angles ``[*]`` in radians between rotations ``[*, 4]`` and the true ones (nearest equivalent where ``free``)."""
    angles = geodesic_angle(found[..., None, :], equivalent_turns(true, order))  # [*, N]
    return torch.where(free, angles.amin(-1), angles[..., 0])
