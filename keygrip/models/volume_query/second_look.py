"""Second look: correct gripper and rotation from a high-resolution window around each step's pixel.

At the network's own resolution a small object is a few pixels wide, too few to see its rotation. The same crop of the
camera's image is therefore also kept at a higher resolution (the sharp image). A window of it around the pixel of each
step goes through the same backbone once more, and the result corrects the logits of gripper and rotation (similar to
the second stage of RVT-2, which zooms in where it will act: Goyal et al., "RVT-2: Learning Precise Manipulation from
Few Demonstrations", 2024). The pixel of a step is the target's pixel in training and the decoded pixel at inference.

Shape legend: B batch, A arms, T steps, N = B * T windows, S side of the network's image, Q side of the sharp image, L
side of a window, in pixels; D width of the backbone, W width of the second look's features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keygrip.data.batches import normalised
from keygrip.models.backbone import DinoBackbone

REDUCED = 32  # channels of a window's patches before they are flattened
FREQUENCIES = 3  # frequencies of the encoding of a window's position


@dataclass(frozen=True)
class SharpImage:
    """Input of the second look.

    Attributes:
        pixels: uint8 ``[B, 3, Q, Q]``, the same crop as the network's image. mean, std: the backbone's.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]


def windows(image: Tensor, centres: Tensor, side: int) -> Tensor:
    """Cut windows ``[B, T, 3, L, L]`` from images ``[B, 3, Q, Q]`` around their pixels ``[B, T, 2]``.

    A window lies on whole pixels: its middle is the corner between pixels that is nearest to the centre. What lies
    beyond the image's edge is 0; a centre that is not finite, or far outside, gives a window of zeros.
    """
    size, half = image.shape[-1], side // 2
    middle = centres.nan_to_num(-2.0 * side).clamp(-half, size + half).round().long()
    padded = nn.functional.pad(image, (side, side, side, side))
    start = middle - half + side  # [B, T, 2] of the window in the padded image
    along = torch.arange(side, device=image.device)
    columns, rows = start[..., 0, None] + along, start[..., 1, None] + along  # [B, T, L]
    batch = torch.arange(len(image), device=image.device)[:, None, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[..., :, None], columns[..., None, :]].permute(0, 1, 4, 2, 3)


def place_code(places: Tensor) -> Tensor:
    """Places ``[..., 2]`` in -1 .. 1 with their sines and cosines, ``[..., 2 + 4 * FREQUENCIES]``."""
    angles = places[..., None] * (math.pi / 2 * 2.0 ** torch.arange(FREQUENCIES, device=places.device))
    return torch.cat([places, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


class SecondLook(nn.Module):
    """Compute corrections of the gripper and rotation logits; initially zero.

    Args:
        arms: names. backbone: read for its width and patch size; not stored. image_size: S. sharp_size: Q. side: L, a
            multiple of the patch. trunk: width of a step. gripper_bins, rotation_classes: of the heads. width: W.
        own_backbone: windows go through a copy of the backbone with its own weights. With shared weights Adam's updates
            follow the volume loss, whose gradient is larger, and a small object's rotation is learned late.

    Raises:
        ValueError: the window does not fit the patches or the sharp image.
    """

    def __init__(
        self,
        arms: Sequence[str],
        backbone: DinoBackbone,
        *,
        image_size: int,
        sharp_size: int,
        side: int,
        trunk: int,
        gripper_bins: int,
        rotation_classes: int,
        width: int = 96,
        own_backbone: bool = False,
    ) -> None:
        super().__init__()
        patch = backbone.patch_size
        if side < patch or side % patch or side % 2 or side > sharp_size:
            raise ValueError(
                f"model.network.look_size={side} must be an even multiple of the backbone's patch ({patch}) and at "
                f"most model.network.second_look={sharp_size}."
            )
        self.image_size, self.sharp_size, self.side = image_size, sharp_size, side
        self.reduce = nn.Linear(backbone.embed_dim, REDUCED)
        self.read = nn.Sequential(nn.GELU(), nn.Linear((side // patch) ** 2 * REDUCED, width))
        self.place = nn.Linear(2 + 4 * FREQUENCIES, width)
        self.heads = nn.ModuleDict(
            {arm: _head(trunk + width, gripper_bins + rotation_classes, hidden=2 * width) for arm in arms}
        )
        self.gripper_bins = gripper_bins
        self.backbone = copy.deepcopy(backbone) if own_backbone else None

    def forward(
        self, arm: str, backbone: DinoBackbone, image: SharpImage, pixels: Tensor, trunk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Corrections to be added to the gripper logits ``[B, T, G]`` and the rotation logits ``[B, T, R]``.

        Args:
            backbone: the network's. pixels: ``[B, T, 2]`` of the network's image. trunk: ``[B, T, trunk]``.
        """
        if image.pixels.shape[-2:] != (self.sharp_size, self.sharp_size):
            raise ValueError(
                f"the second look was built for sharp images of {self.sharp_size} pixels, got "
                f"{image.pixels.shape[-1]}: set data.detail_size={self.sharp_size}"
            )
        crops = windows(image.pixels, pixels * (self.sharp_size / self.image_size), self.side)  # [B, T, 3, L, L]
        encoder = backbone if self.backbone is None else self.backbone
        patches = encoder(normalised(crops.flatten(0, 1), image.mean, image.std).to(trunk.dtype)).patches  # [N, n, D]
        features = self.read(self.reduce(patches).flatten(1)).unflatten(0, pixels.shape[:2])  # [B, T, W]
        scaled_pixels = (pixels / self.image_size * 2 - 1).nan_to_num(0.0).clamp(-2, 2)
        features = features + self.place(place_code(scaled_pixels).to(features.dtype))
        corrections = self.heads[arm](torch.cat([trunk, features], dim=-1))
        return corrections[..., : self.gripper_bins], corrections[..., self.gripper_bins :]


def copy_backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a copy of the backbone's weights for a second look with its own backbone, if the weights have none."""
    shared, own = "backbone.", "second_look.backbone."
    if any(name.startswith(own) for name in weights):
        return weights
    return weights | {own + name[len(shared) :]: value for name, value in weights.items() if name.startswith(shared)}


def _head(width: int, classes: int, hidden: int) -> nn.Module:
    last = nn.Linear(hidden, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
