"""Projection and its inverses on cameras built by hand."""

from __future__ import annotations

import pytest
import torch

from keygrip.models.geometry.cameras import (
    ParallelRayError,
    camera_centre,
    cell_centres,
    inside_image,
    nearest_to_rays,
    pixel_rays,
    project,
    recover_3d,
    world_xyz_table,
)


def camera_above(height: float = 1.0, tilt: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and world_to_camera of a camera above the origin that points down and forward (+y) by ``tilt``
    radians."""
    k = torch.tensor([[200.0, 0, 96], [0, 220.0, 90], [0, 0, 1]], dtype=torch.float64)
    c, s = torch.cos(torch.tensor(tilt, dtype=torch.float64)), torch.sin(torch.tensor(tilt, dtype=torch.float64))
    forward = torch.stack([torch.zeros_like(c), s, -c])
    right = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward])
    extrinsics = torch.eye(4, dtype=torch.float64)
    extrinsics[:3, :3] = rotation
    extrinsics[:3, 3] = -rotation @ torch.tensor([0.0, 0.0, height], dtype=torch.float64)
    return k, extrinsics


def test_projection_by_hand() -> None:
    k = torch.tensor([[100.0, 0, 50], [0, 100.0, 40], [0, 0, 1]])
    pixels, depth = project(torch.tensor([[0.1, -0.2, 2.0]]), k, torch.eye(4))
    torch.testing.assert_close(pixels, torch.tensor([[100 * 0.1 / 2 + 50, 100 * -0.2 / 2 + 40]]))
    assert depth.item() == 2.0


def test_points_behind_the_camera_have_no_pixel() -> None:
    k = torch.eye(3)
    pixels, depth = project(torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), k, torch.eye(4))
    assert torch.isnan(pixels).all()
    assert (depth <= 0).all()
    assert not inside_image(pixels, 10, 10).any()


def test_recover_inverts_project() -> None:
    k, extrinsics = camera_above()
    points = torch.rand(50, 3, dtype=torch.float64) * torch.tensor([0.6, 0.6, 0.3]) - torch.tensor([0.3, 0.0, 0.0])
    pixels, _ = project(points, k, extrinsics)
    torch.testing.assert_close(recover_3d(pixels, points[:, 2], k, extrinsics), points, rtol=0, atol=1e-12)


def test_parallel_and_backward_rays_are_errors() -> None:
    k, extrinsics = camera_above(tilt=torch.pi / 2)  # points along the horizon
    with pytest.raises(ParallelRayError, match="1 of 1"):
        recover_3d(
            torch.tensor([[96.0, 90.0]], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64), k, extrinsics
        )
    k, extrinsics = camera_above(tilt=0.2)
    above = torch.tensor([2.0], dtype=torch.float64)  # a plane above the camera, which points down
    with pytest.raises(ParallelRayError):
        recover_3d(torch.tensor([[96.0, 90.0]], dtype=torch.float64), above, k, extrinsics)
    masked = recover_3d(torch.tensor([[96.0, 90.0]], dtype=torch.float64), above, k, extrinsics, strict=False)
    assert torch.isnan(masked).all()


def test_the_table_of_voxel_centres_is_of_each_samples_own_camera() -> None:
    cameras = [camera_above(1.0, 0.3), camera_above(0.8, 1.4)]  # the horizon is visible in the second
    k, extrinsics = (torch.stack(parts) for parts in zip(*cameras, strict=True))
    heights = torch.tensor([0.0, 0.1, 0.25])
    table = world_xyz_table(k, extrinsics, heights, pred_size=6, image_size=192)
    assert (table.shape, table.dtype) == ((2, 3, 6, 6, 3), torch.float64)
    missing = table.isnan().any(dim=-1)
    assert not missing[0].any()
    assert missing[1, :, :2].all()
    assert not missing[1, :, 5].any()
    pixels, depth = project(table, k[:, None, None, None], extrinsics[:, None, None, None])
    cells = cell_centres(6, 192, dtype=torch.float64).expand(2, 3, 6, 6, 2)
    torch.testing.assert_close(pixels[~missing], cells[~missing])
    assert bool((depth[~missing] > 0).all())
    expected = heights.double()[:, None, None].expand(2, 3, 6, 6)
    torch.testing.assert_close(table[..., 2][~missing], expected[~missing])


def test_cells_are_indexed_by_row_and_column() -> None:
    centres = cell_centres(6, 192)
    assert centres.shape == (6, 6, 2)
    torch.testing.assert_close(centres[2, 4], torch.tensor([4.5 * 32, 2.5 * 32]))


def test_reduced_precision_leaves_geometry_alone() -> None:
    """Projections, camera centres and rays stay float32 under autocast, in which training steps compute their
    targets."""
    k, pose = (matrix.float() for matrix in camera_above())
    points = torch.tensor([[0.1, 0.3, 0.05], [-0.2, 0.41, 0.0], [0.033, 0.27, 0.11]])
    exact = *project(points, k, pose), camera_centre(pose), pixel_rays(torch.tensor([[33.3, 71.7]]), k, pose)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = *project(points, k, pose), camera_centre(pose), pixel_rays(torch.tensor([[33.3, 71.7]]), k, pose)
    for ours, theirs in zip(reduced, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_rays_meet_where_they_come_from() -> None:
    torch.manual_seed(0)
    points = torch.tensor([[0.1, -0.2, 0.05], [0.4, 0.0, 0.0]])
    centres = torch.tensor([[1.0, 0.2, 0.8], [0.3, -0.9, 0.7], [-0.5, 0.4, 1.1]]).expand(2, 3, 3)
    rays = torch.nn.functional.normalize(points[:, None] - centres, dim=-1)
    found, apart = nearest_to_rays(centres, rays)
    torch.testing.assert_close(found, points, atol=1e-4, rtol=0)
    assert apart.max() < 1e-4
    # two rays that pass each other at right angles, 2 cm apart: the midpoint, one centimetre from both
    found, apart = nearest_to_rays(
        torch.tensor([[1.0, 0.0, 0.31], [0.0, 1.0, 0.29]]), torch.tensor([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    )
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.3]), atol=1e-4, rtol=0)
    assert apart.item() == pytest.approx(0.01, abs=1e-4)


def test_one_ray_leaves_the_point_nearest_to_the_origin() -> None:
    centre = torch.tensor([1.0, 0.2, 0.8], dtype=torch.float64)
    towards = torch.nn.functional.normalize(torch.tensor([-1.0, 0.0, -0.5], dtype=torch.float64), dim=-1)
    found, apart = nearest_to_rays(centre[None], towards[None])
    torch.testing.assert_close(found, centre - towards * (centre @ towards), atol=1e-4, rtol=0)
    assert apart < 1e-4
