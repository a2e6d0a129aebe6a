"""Scores that further cameras give to the voxels of the first camera's volume.

The volume stays that of the first camera: a cell's ray and a height plane meet in a voxel centre, a point in the world.
Every further camera scores that point by its own features where the point projects: ``q_F . F_v(project(point))``.
Interpolating a map of features and then taking the inner product equals interpolating the map of inner products, so
only one map per step and view is sampled, not a feature vector per voxel.

These scores differ from voxel to voxel and do not factorise: sums over the volume are streamed over z.

Shape legend: B batch, ``*`` further leading shape (arms, steps), V further views, P cells along a side (P' of a
further view's map), Z height bins, S image side in pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keygrip.models.geometry.cameras import inside_image, project, world_xyz_table
from keygrip.models.volume_query.volume import VolumeTarget, VoxelScores


@dataclass(frozen=True)
class VoxelProjection:
    """Projections of voxel centres into the further views.

    Attributes:
        grid: ``[B, V, Z, P, P, 2]`` in -1 .. 1, as ``grid_sample`` reads positions. seen: ``[B, V, Z, P, P]``, 1 where
            the view shows the point and is itself usable, else 0.
    """

    grid: Tensor
    seen: Tensor

    def of_usable(self, usable: Tensor) -> VoxelProjection:
        """Return a copy in which views that are not usable, bool ``[B, V]``, see no voxel."""
        shown = usable[:, :, None, None, None]
        grid = self.grid.masked_fill(~shown[..., None], 0.0)
        return VoxelProjection(grid, self.seen * shown.to(self.seen.dtype))


@dataclass(frozen=True)
class FurtherViews:
    """Views of cameras other than the first.

    Attributes:
        images: ``[B, V, 3, S, S]``, normalised as the first's. where: projections of the first camera's voxels.
        first: bool ``[B]``, whether the first camera's own image is usable; its calibration always is.
    """

    images: Tensor
    where: VoxelProjection
    first: Tensor


@torch.no_grad()
def project_voxels(
    intrinsics: Tensor,
    world_to_camera: Tensor,
    heights: Tensor,
    pred_size: int,
    image_size: int,
    usable: Tensor | None = None,
) -> VoxelProjection:
    """Project the first camera's voxel centres into the others; cameras may move from sample to sample.

    Args:
        intrinsics: ``[B, 1 + V, 3, 3]``, the first camera first. world_to_camera: ``[B, 1 + V, 4, 4]``.
        heights: ``[Z]`` metres, of the bins' centres. usable: bool ``[B, V]``; None: all views are.
    """
    points = world_xyz_table(intrinsics[:, 0], world_to_camera[:, 0], heights, pred_size, image_size)  # [B, Z, P, P, 3]
    other_cameras = intrinsics[:, 1:, None, None, None], world_to_camera[:, 1:, None, None, None]
    pixels, _ = project(points[:, None], *other_cameras)  # [B, V, Z, P, P, 2], NaN behind a camera or without a point
    inside = inside_image(pixels, image_size, image_size)
    grid = (pixels / image_size * 2 - 1).masked_fill(~inside[..., None], 0.0)
    projection = VoxelProjection(grid, inside.to(intrinsics.dtype))
    return projection if usable is None else projection.of_usable(usable)


class KnownProjections:
    """`project_voxels` with a cache: for cameras that do not move, voxels are projected once.

    Each pair of the first camera and a further one is cached separately: if one camera moves, the others stay cached.

    Args:
        keep: number of cached pairs; the least recently used pair is removed first.
    """

    def __init__(self, keep: int = 16) -> None:
        self.keep = keep
        self._known: OrderedDict[tuple[Hashable, ...], VoxelProjection] = OrderedDict()

    def __call__(
        self,
        intrinsics: Tensor,
        world_to_camera: Tensor,
        heights: Tensor,
        pred_size: int,
        image_size: int,
        usable: Tensor | None = None,
    ) -> VoxelProjection:
        """As `project_voxels`."""
        batch, cameras = intrinsics.shape[:2]
        pairs = [
            [
                self._project_pair(
                    intrinsics[row, [0, view]], world_to_camera[row, [0, view]], heights, pred_size, image_size
                )
                for view in range(1, cameras)
            ]
            for row in range(batch)
        ]
        grid = torch.stack([torch.stack([pair.grid[0, 0] for pair in views]) for views in pairs])
        inside = torch.stack([torch.stack([pair.seen[0, 0] for pair in views]) for views in pairs])
        projection = VoxelProjection(grid, inside)
        return projection if usable is None else projection.of_usable(usable)

    def _project_pair(
        self, intrinsics: Tensor, world_to_camera: Tensor, heights: Tensor, pred_size: int, image_size: int
    ) -> VoxelProjection:
        contents = (part.cpu().numpy().tobytes() for part in (intrinsics, world_to_camera, heights))
        key = (*contents, intrinsics.dtype, intrinsics.device, pred_size, image_size)
        projection = self._known.pop(key, None)
        if projection is None:
            projection = project_voxels(intrinsics[None], world_to_camera[None], heights, pred_size, image_size)
        self._known[key] = projection  # at the end: the most recently used
        while len(self._known) > self.keep:
            self._known.popitem(last=False)
        return projection


@dataclass(frozen=True)
class WorldScores(VoxelScores):
    """Logits that further views add to every voxel; the leading shape ``*`` of `VoxelScores` is here ``[B, *]``.

    Attributes:
        maps: ``[B, *, V, P', P']``, scores per step, view and place. where: the voxels' projections into those views.
    """

    maps: Tensor
    where: VoxelProjection

    def map(self, change: Callable[[Tensor], Tensor]) -> WorldScores:
        return WorldScores(change(self.maps), VoxelProjection(change(self.where.grid), change(self.where.seen)))

    @classmethod
    def stack(cls, scores: Sequence[WorldScores]) -> WorldScores:
        return cls(torch.stack([each.maps for each in scores], dim=1), scores[0].where)

    def dense(self, bins: int) -> Tensor:
        return torch.stack([self.slice(z) for z in range(bins)], dim=-3)

    def slice(self, z: int) -> Tensor:
        flat = self.maps.flatten(1, -4)  # [B, N, V, P', P']
        total: Tensor | None = None
        for view in range(flat.shape[2]):
            grid = self.where.grid[:, view, z].to(flat.dtype)
            sampled = F.grid_sample(flat[:, :, view], grid, padding_mode="border", align_corners=False)
            sampled = sampled * self.where.seen[:, view, z, None].to(flat.dtype)
            total = sampled if total is None else total + sampled
        assert total is not None
        return total.unflatten(1, self.maps.shape[1:-3])

    def at(self, cells: Tensor) -> Tensor:
        flat = self.maps.flatten(1, -4)  # [B, N, V, P', P']
        batch, steps, views = flat.shape[:3]
        width, levels = self.where.grid.shape[-2], self.where.grid.shape[2]
        index = (cells[..., 0] * width + cells[..., 1]).flatten(1)[:, None, :]  # [B, 1, N]
        total = flat.new_zeros(batch, steps, levels)
        for view in range(views):
            grid = self.where.grid[:, view].flatten(2, 3)  # [B, Z, PP, 2]
            chosen = grid.gather(2, index[..., None].expand(batch, levels, steps, 2)).transpose(1, 2)  # [B, N, Z, 2]
            seen = self.where.seen[:, view].flatten(2).gather(2, index.expand(batch, levels, steps)).transpose(1, 2)
            sampled = F.grid_sample(
                flat[:, :, view].flatten(0, 1)[:, None],
                chosen.flatten(0, 1)[:, :, None].to(flat.dtype),
                padding_mode="border",
                align_corners=False,
            )  # [BN, 1, Z, 1]
            total = total + sampled.view(batch, steps, levels) * seen.to(flat.dtype)
        return total.unflatten(1, self.maps.shape[1:-3])

    def expectation(self, target: VolumeTarget) -> Tensor:
        total = torch.zeros_like(target.height_weights[..., 0], dtype=self.maps.dtype)
        for corner in range(target.cells.shape[-2]):
            at_cell = self.at(target.cells[..., corner, :])  # [B, *, Z]
            expected = (at_cell.gather(-1, target.heights) * target.height_weights).sum(-1)
            total = total + target.cell_weights[..., corner] * expected
        return total

    def log_normaliser(self, pixel: Tensor, height: Tensor) -> Tensor:
        def over_pixels(pixel: Tensor, maps: Tensor, z: int) -> Tensor:
            return (pixel + WorldScores(maps, self.where).slice(z)).flatten(-2).logsumexp(-1)

        slices = [  # recomputed in the backward pass, not stored
            checkpoint(over_pixels, pixel, self.maps, z, use_reentrant=False, preserve_rng_state=False)
            for z in range(height.shape[-1])
        ]
        return (torch.stack(slices, dim=-1) + height).logsumexp(-1)
