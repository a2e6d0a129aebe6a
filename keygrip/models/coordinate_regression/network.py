"""CLS and state -> MLP -> poses: the outputs have no spatial correspondence to pixels of the image.

The loss and the pooled input are those of commonly used regression policies (L1 on normalised poses, as in Zhao et
al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023), without their generative part.

Shape legend: B batch, A arms, T steps, S image side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keygrip.models.backbone import DinoBackbone
from keygrip.training.parts import model_part

STATE_SIZE = 10  # features of an arm's state: position 3, opening 1, two columns of the rotation 6


@dataclass(frozen=True)
class RegressionOutput:
    """Poses in normalised units.

    Attributes:
        position: ``[B, A, T, 3]``, -1 .. 1 over the training range. rotation: ``[B, A, T, 3, 2]``, two columns of the
            matrix, not yet orthonormal. gripper: ``[B, A, T]``, logit of the opening.
    """

    position: Tensor
    rotation: Tensor
    gripper: Tensor


@model_part
class CoordinateRegressionNetwork(nn.Module):
    """One MLP on the image's CLS vector and the arms' states.

    Args:
        backbone: the shared DINO module. image_size: S. arms: in the order of the batch's arm axis. horizon: T.
        width: of the hidden layers. layers: number of hidden layers.
    """

    def __init__(
        self,
        backbone: DinoBackbone,
        image_size: int,
        arms: Sequence[str] = ("right",),
        horizon: int = 8,
        width: int = 512,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if layers < 1 or not arms:
            raise ValueError("model.network needs at least one layer and one arm.")
        self.backbone, self.image_size, self.arms, self.horizon = backbone, image_size, tuple(arms), horizon
        sizes = [backbone.embed_dim + len(self.arms) * STATE_SIZE, *[width] * layers]
        hidden: list[nn.Module] = []
        for wide_in, wide_out in itertools.pairwise(sizes):
            hidden += [nn.Linear(wide_in, wide_out), nn.LayerNorm(wide_out), nn.GELU()]
        self.trunk = nn.Sequential(*hidden)
        self.head = nn.Linear(width, len(self.arms) * horizon * 10)

    def forward(self, image: Tensor, state: Tensor) -> RegressionOutput:
        """Poses from ``[B, 3, S, S]`` normalised images and ``[B, A, STATE_SIZE]`` states."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The network was built for {self.image_size} x {self.image_size} images, got {image.shape[-1]} "
                f"x {image.shape[-2]}."
            )
        pooled = torch.cat([self.backbone(image).cls, state.flatten(1)], dim=-1)
        poses = self.head(self.trunk(pooled)).unflatten(-1, (len(self.arms), self.horizon, 10)).float()
        return RegressionOutput(poses[..., :3], poses[..., 3:9].unflatten(-1, (3, 2)), poses[..., 9])


class CoordinateRegressionGraph(nn.Module):
    """The network with plain tensors as outputs, for torch.export and ONNX."""

    def __init__(self, network: CoordinateRegressionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.network(image, state)
        return output.position, output.rotation, output.gripper
