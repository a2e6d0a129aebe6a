"""Pointing: the vision-language model says where in each picture the gripper will be.

A pretrained vision-language model can point. One that starts from random weights learns where to look only through the
action head, and needs very many demonstrations' worth of steps for that. So its picture tokens are also asked for a
map of pixels for each step of the action chunk, as the volume-query policy is: the demonstrations hold the answer.

Shape legend: B samples, V views, A arms, T steps, P tokens along a side of a picture, c cells along a side of a token,
g = c P cells along a side of a picture, L tokens of a prompt, H width, S side of a picture in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.geometry.cameras import inside_image, project
from keygrip.training.reduction import global_mean
from keygrip.volume_query.volume import bilinear_cells, gather_pixels


class Pointing(nn.Module):
    """Logits over the cells of each picture, for every arm and step.

    Args:
        width: H. arms: A. horizon: T. cells: c.

    Raises:
        ValueError: fewer cells than one.
    """

    def __init__(self, width: int, arms: int, horizon: int, cells: int) -> None:
        super().__init__()
        if cells < 1:
            raise ValueError(f"model.network.pointing_cells must not be negative, got {cells}.")
        self.arms, self.horizon, self.cells = arms, horizon, cells
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, arms * horizon * cells * cells))

    def forward(self, hidden: Tensor, places: Tensor, views: int) -> Tensor:
        """Logits ``[B, V, A, T, g, g]`` of a layer's hidden states ``[B, L, H]``.

        Args:
            places: ``[B, L, 3]`` (see `keygrip.geometry_vla.encoders.Semantics`): which tokens are whose.
        """
        pictures = hidden[places[..., 0] > 0].unflatten(0, (len(hidden), views, -1))  # [B, V, P P, H]
        side = round(pictures.shape[2] ** 0.5)
        cells = (self.arms, self.horizon, self.cells, self.cells)
        logits = self.read(pictures).unflatten(-1, cells).unflatten(2, (side, side))  # [B, V, P, P, A, T, c, c]
        return logits.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5)


def pointing_losses(logits: Tensor, batch: MultiViewPolicyBatch) -> dict[str, Tensor]:
    """Cross-entropy against the four cells around the pixel where the gripper will be, `pointing`; and how far the
    maps' means are from it, `pointing_px`, without gradient.

    Steps that are padding or outside of a picture do not count.

    Args:
        logits: ``[B, V, A, T, g, g]``.
    """
    size, cells = batch.images.shape[-1], logits.shape[-1]
    cameras = batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    pixels, _ = project(batch.position[:, None], *cameras)  # [B, V, A, T, 2]
    counts = inside_image(pixels, size, size) & ~batch.repeated[:, None]
    around, weights = bilinear_cells(pixels.nan_to_num(0.0) * (cells / size), (cells, cells))  # [B, V, A, T, 4]
    logs = logits.float().flatten(-2).log_softmax(dim=-1).unflatten(-1, (cells, cells))
    surprise = -(gather_pixels(logs, around) * weights).sum(dim=-1)
    with torch.no_grad():
        maps = logs.exp()
        centres = (torch.arange(cells, device=maps.device) + 0.5) * (size / cells)
        mean = torch.stack([(maps.sum(-2) * centres).sum(-1), (maps.sum(-1) * centres).sum(-1)], dim=-1)
        off = (mean - pixels.nan_to_num(0.0)).norm(dim=-1).masked_fill(~counts, 0.0)
    return {
        "pointing": global_mean(surprise.masked_fill(~counts, 0.0).sum(), counts.sum()),
        "pointing_px": off.sum() / counts.sum().clamp(min=1),
    }
