"""Pinhole cameras: project metric points to pixels and, with a known height, recover points from pixels.

Conventions (the same everywhere in keygrip): world frame z up, metres; camera frame OpenCV (x right, y down, z
forward); ``world_to_camera`` is the 4x4 rigid transform into the camera frame; pixels are (x, y) with (0, 0) at the
top left *corner* of the first pixel, so that the centre of the first pixel is (0.5, 0.5).

Shape legend: ``...`` any batch shape (broadcast), Z height bins, P cells along a side of the prediction grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest usable vertical component of a ray's unit direction, about 0.6 degrees from parallel. Below it, the ray meets
# the plane z = h so far away that a pixel's width moves the point by metres.
MIN_VERTICAL_SLOPE = 0.01
# Weight of the world's origin in the least-squares point of several rays; each ray has weight 1. It determines the
# directions that the rays leave open. With two rays 8 degrees apart it moves a point one metre away by a millimetre.
ORIGIN_PULL = 1e-5


class ParallelRayError(ValueError):
    """A viewing ray runs (nearly) parallel to the plane that it should meet, or meets it behind the camera."""


def transform(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrix times vector, ``[..., 3]`` from ``[..., 3, 3]`` and ``[..., 3]``, broadcast.

    Written as products and sums, whose precision autocast does not change: a matrix product in bfloat16 would move a
    pixel by half a pixel and a point by millimetres, without a warning.
    """
    x, y, z = vectors.unbind(dim=-1)
    rows = matrix.unbind(dim=-2)  # row by row: the nine products of many vectors are never held at once
    return torch.stack([row[..., 0] * x + row[..., 1] * y + row[..., 2] * z for row in rows], dim=-1)


def project(points: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points into the image.

    Args:
        points: ``[..., 3]`` metres, world frame.
        intrinsics: ``[..., 3, 3]`` K, broadcast against ``points``' batch shape.
        world_to_camera: ``[..., 4, 4]``.

    Returns:
        Pixels ``[..., 2]`` (x, y) and depth along the optical axis ``[...]`` in metres. Points at or behind the camera
        (depth <= 0) have no projection: their pixels are NaN, so that no comparison counts them as visible.
    """
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    camera = transform(rotation, points) + translation
    depth = camera[..., 2]
    homogeneous = transform(intrinsics, camera)
    safe_depth = torch.where(depth > 0, homogeneous[..., 2], torch.nan)
    return homogeneous[..., :2] / safe_depth[..., None], depth


def inside_image(pixels: Tensor, width: int, height: int) -> Tensor:
    """Which pixels ``[..., 2]`` lie in an image of ``width`` x ``height``; NaN counts as outside. Returns bool
    ``[...]``."""
    x, y = pixels[..., 0], pixels[..., 1]
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def camera_centre(world_to_camera: Tensor) -> Tensor:
    """Position of the camera in the world, ``[..., 3]`` metres, from ``[..., 4, 4]``."""
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    return -transform(rotation.transpose(-1, -2), translation)


def pixel_rays(pixels: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> Tensor:
    """Unit directions ``[..., 3]`` in the world frame of the rays through pixels ``[..., 2]``."""
    ones = torch.ones_like(pixels[..., :1])
    camera = torch.linalg.solve(intrinsics, torch.cat([pixels, ones], dim=-1)[..., None])[..., 0]
    world = transform(world_to_camera[..., :3, :3].transpose(-1, -2), camera)
    return world / world.norm(dim=-1, keepdim=True)


def nearest_to_rays(centres: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Find the points nearest to V rays each, by least squares, and their root mean square distances from the rays.

    If the rays do not determine the point (for one ray or parallel rays: the position along them), the solution nearest
    to the world's origin is used.

    Args:
        centres: ``[..., V, 3]`` metres, of the cameras. directions: ``[..., V, 3]``, of unit length.

    Returns:
        ``[..., 3]`` and ``[...]`` metres.
    """
    identity = torch.eye(3, dtype=directions.dtype, device=directions.device)
    across = identity - directions[..., :, None] * directions[..., None, :]  # removes the part along the ray
    projected_centres = transform(across, centres)
    system = across.sum(dim=-3) + ORIGIN_PULL * identity
    points = torch.linalg.solve(system, projected_centres.sum(dim=-2)[..., None])[..., 0]
    residuals = transform(across, points[..., None, :]) - projected_centres
    return points, residuals.square().sum(dim=-1).mean(dim=-1).sqrt()


def _distance_to_plane(origin_z: Tensor, direction_z: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along a unit ray to z = height, and whether the intersection is well conditioned and in front of the
    camera."""
    distance = (height - origin_z) / direction_z
    return distance, (direction_z.abs() >= MIN_VERTICAL_SLOPE) & (distance > 0)


def recover_3d(
    pixels: Tensor, height: Tensor, intrinsics: Tensor, world_to_camera: Tensor, *, strict: bool = True
) -> Tensor:
    """Intersect the pixels' viewing rays with the horizontal planes ``z = height``.

    Args:
        pixels: ``[..., 2]``. height: ``[...]`` metres. intrinsics: ``[..., 3, 3]``. world_to_camera: ``[..., 4, 4]``.
        strict: raise when any ray is unusable; otherwise those points are NaN, for callers who mask them.

    Returns:
        ``[..., 3]`` metres in the world frame.

    Raises:
        ParallelRayError: a ray is within about 0.6 degrees of the plane, or meets it behind the camera.
    """
    origin = camera_centre(world_to_camera)
    directions = pixel_rays(pixels, intrinsics, world_to_camera)
    distance, usable = _distance_to_plane(origin[..., 2], directions[..., 2], height)
    if strict and not bool(usable.all()):
        bad = (~usable).nonzero()[0].tolist()
        raise ParallelRayError(
            f"{int((~usable).sum())} of {usable.numel()} viewing rays do not meet their height plane in front of "
            f"the camera (first at index {bad}): the pixel looks along or away from the plane. Check "
            "world_to_camera, or aim the camera further down."
        )
    points = origin + directions * distance[..., None]
    return torch.where(usable[..., None], points, torch.nan)


def cell_centres(
    pred_size: int, image_size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Pixel coordinates of the prediction grid's cell centres: ``[P, P, 2]``, (x, y), indexed [row, column]."""
    centres = (torch.arange(pred_size, device=device, dtype=dtype) + 0.5) * (image_size / pred_size)
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([columns, rows], dim=-1)


def world_xyz_table(
    intrinsics: Tensor, world_to_camera: Tensor, heights: Tensor, pred_size: int, image_size: int
) -> Tensor:
    """Voxel centres: where the rays through the prediction grid's cell centres meet the planes of the heights.

    Args:
        intrinsics: ``[B, 3, 3]``, of the network's image. world_to_camera: ``[B, 4, 4]``. heights: ``[Z]`` metres.
        pred_size: P. image_size: side of the image, pixels.

    Returns:
        ``[B, Z, P, P, 3]`` metres in the world frame, in the intrinsics' precision; NaN where a ray does not meet its
        plane (see `recover_3d`).
    """
    centres = cell_centres(pred_size, image_size, dtype=intrinsics.dtype, device=intrinsics.device)
    camera = intrinsics[:, None, None, None], world_to_camera[:, None, None, None]
    return recover_3d(centres, heights.to(intrinsics.dtype)[:, None, None], *camera, strict=False)
