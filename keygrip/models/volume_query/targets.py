"""Convert metric poses to training targets; the quantised targets also give the quantisation floor of every error.

Shape legend: B batch, A arms, T steps, P grid side in cells, S image side in pixels, Z height bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keygrip.data.batches import PolicyBatch, normalised
from keygrip.models.dark_images import shows_nothing
from keygrip.models.geometry.cameras import inside_image, project
from keygrip.models.geometry.rotations import quaternion_to_matrix
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.models.volume_query.network import VolumeQueryNetwork
from keygrip.models.volume_query.volume import VolumeTarget, bilinear_target, hard_target
from keygrip.models.volume_query.world import FurtherViews, VoxelProjection, project_voxels


@dataclass(frozen=True)
class StepTargets:
    """Targets of every arm and step.

    Attributes:
        pixels: ``[B, A, T, 2]`` input pixels. inside: bool ``[B, A, T]``, the step projects inside the image.
        valid: bool ``[B, A, T]``, the step counts in losses and metrics: inside and, if padding is masked, not padded.
        cells: ``[B, A, T, 2]`` (row, column). heights: ``[B, A, T]`` bin indices.
        grid_position: ``[B, A, T, 2]`` (x, y) in cells; height_position: ``[B, A, T]`` in bins: the unquantised
            targets.
        gripper: ``[B, A, T]`` bin indices. start_pixels: ``[B, A, 2]``.
    """

    pixels: Tensor
    inside: Tensor
    valid: Tensor
    cells: Tensor
    heights: Tensor
    grid_position: Tensor
    height_position: Tensor
    gripper: Tensor
    start_pixels: Tensor

    def volume(self, kind: Literal["hard", "bilinear"], pred_size: int, height_bins: int) -> VolumeTarget:
        if kind == "hard":
            return hard_target(self.cells, self.heights)
        return bilinear_target(self.grid_position, self.height_position, (pred_size, pred_size), height_bins)


def step_targets(
    batch: PolicyBatch,
    *,
    image_size: int,
    pred_size: int,
    height_bins: int,
    gripper_bins: int,
    height_range: Tensor,
    mask_padded: bool = False,
) -> StepTargets:
    """Project and bin the poses of a batch; ``height_range`` ``[2]`` metres is the training split's.

    The cell is ``floor(pixel * P / S)``. Heights beyond the range are put in the outermost bins. Steps outside the
    image get an arbitrary cell and ``valid`` False. With ``mask_padded``, ``valid`` is also False past the demo's end.
    """
    intrinsics, extrinsics = batch.intrinsics[:, None], batch.world_to_camera[:, None]
    pixels, _ = project(batch.position, intrinsics[:, None], extrinsics[:, None])
    start_pixels, _ = project(batch.start_position, intrinsics, extrinsics)
    inside = inside_image(pixels, image_size, image_size)
    grid_position = (pixels * (pred_size / image_size)).nan_to_num(0.0).clamp(0, pred_size)
    columns_rows = grid_position.floor().long().clamp_max(pred_size - 1)
    low, high = height_range.unbind()
    height_position = ((batch.position[..., 2] - low) / (high - low) * height_bins).clamp(0, height_bins)
    return StepTargets(
        pixels=pixels,
        inside=inside,
        valid=inside & ~batch.action_is_pad if mask_padded else inside,
        cells=columns_rows.flip(-1),
        heights=height_position.long().clamp_max(height_bins - 1),
        grid_position=grid_position,
        height_position=height_position,
        gripper=(batch.gripper * gripper_bins).long().clamp(0, gripper_bins - 1),
        start_pixels=start_pixels,
    )


def height_centres(height_range: Tensor, height_bins: int) -> Tensor:
    """Heights ``[Z]`` of the bins' centres, metres."""
    low, high = height_range.unbind()
    return low + (torch.arange(height_bins, device=height_range.device) + 0.5) * (high - low) / height_bins


def arm_state(
    parts: Sequence[str], position: Tensor, quaternion: Tensor, gripper: Tensor, height_range: Tensor
) -> Tensor | None:
    """The parts of the arm's state that a network reads, ``[..., state_size]``; None if it reads no part.

    height and gripper are scaled to -1 .. 1; rotation is two columns of the matrix.
    """
    low, high = height_range.unbind()
    values = {
        "height": ((position[..., 2] - low) / (high - low) * 2 - 1)[..., None],
        "gripper": gripper[..., None] * 2 - 1,
        "rotation": quaternion_to_matrix(quaternion)[..., :2].flatten(-2),
    }
    return torch.cat([values[part] for part in parts], dim=-1) if parts else None


def views_of_images(
    images: Tensor,
    intrinsics: Tensor,
    world_to_camera: Tensor,
    network: VolumeQueryNetwork,
    statistics: PolicyStatistics,
    there: Tensor | None = None,
    project_voxels: Callable[..., VoxelProjection] = project_voxels,
) -> FurtherViews:
    """The views of all cameras but the first, with the projections of the first camera's voxels into them.

    A view counts as missing if its image shows nothing (`keygrip.models.dark_images`) or its calibration is not finite
    (demonstrations and observations with such a calibration are rejected before this function is called).

    Args:
        images: uint8 ``[B, 1 + V, 3, S, S]``. intrinsics: ``[B, 1 + V, 3, 3]``. world_to_camera: ``[B, 1 + V, 4, 4]``.
        there: bool ``[B, 1 + V]``, False for views that are masked whatever their image shows; None: no such view.
        project_voxels: the function of this name, or its caching version (`KnownProjections`).
    """
    has_image = ~shows_nothing(images)  # [B, 1 + V]
    if there is not None:
        has_image = has_image & there
    calibrated = torch.isfinite(intrinsics).flatten(2).all(-1) & torch.isfinite(world_to_camera).flatten(2).all(-1)
    centres = height_centres(statistics.height_range, network.height_bins)
    projection = project_voxels(
        intrinsics, world_to_camera, centres, network.pred_size, network.image_size, (has_image & calibrated)[:, 1:]
    )
    geometry = statistics.geometry
    return FurtherViews(normalised(images[:, 1:], geometry.mean, geometry.std), projection, has_image[:, 0])
