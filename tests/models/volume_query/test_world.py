"""Several cameras in one volume: loss, gradient and argmax against an explicit dense volume, voxel by voxel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keygrip.models.geometry.cameras import project, recover_3d
from keygrip.models.volume_query import world as world_module
from keygrip.models.volume_query.volume import (
    VolumeLogits,
    argmax_voxel,
    bilinear_target,
    hard_target,
    pixel_entropy,
    soft_argmax,
    volume_cross_entropy,
)
from keygrip.models.volume_query.world import KnownProjections, VoxelProjection, WorldScores, project_voxels

B, A, T, V, Z, P, S = 2, 2, 3, 2, 4, 6, 60


def cameras(views: int, dtype: torch.dtype = torch.float64, size: int = S) -> tuple[torch.Tensor, torch.Tensor]:
    """Return intrinsics [B, 1 + views, 3, 3] and poses of cameras a metre above the table that point down from
    different places and differ between the samples; `size`: side of their images."""
    focal = 80 * size / S
    k = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], dtype=dtype)
    poses = torch.eye(4, dtype=dtype).repeat(B, 1 + views, 1, 1)
    for b in range(B):
        for v in range(1 + views):
            turn = torch.tensor(0.2 * v + 0.05 * b, dtype=dtype)  # about the camera's x axis
            tilt = torch.tensor([[1, 0, 0], [0, turn.cos(), -turn.sin()], [0, turn.sin(), turn.cos()]], dtype=dtype)
            down = torch.diag(torch.tensor([1.0, -1, -1], dtype=dtype))
            poses[b, v, :3, :3] = tilt @ down
            poses[b, v, :3, 3] = torch.tensor([0.03 * v, 0.02 * v, 1.0 + 0.02 * b], dtype=dtype)
    return k.expand(B, 1 + views, 3, 3).clone(), poses


def random_logits(seed: int = 0, size: int = S) -> VolumeLogits:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    usable = torch.tensor([[True, True], [True, False]])
    heights = torch.linspace(0, 0.2, Z, dtype=torch.float64)
    where = project_voxels(*cameras(V, size=size), heights, P, size, usable)
    world = WorldScores(draw(B, A, T, V, P, P), where)
    return VolumeLogits(draw(B, A, T, P, P), draw(B, A, T, Z), draw(B, A, T), world)


def written_out(logits: VolumeLogits, size: int = S) -> torch.Tensor:
    """Compute the volume [B, A, T, Z, P, P], each voxel projected and interpolated explicitly; sample 1 lacks view
    2."""
    assert isinstance(logits.voxel, WorldScores)
    k, poses = cameras(V, size=size)
    heights = torch.linspace(0, 0.2, Z, dtype=torch.float64)
    rows = []
    for b in range(B):
        for z in range(Z):
            for y in range(P):
                for x in range(P):
                    pixel = torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64) * size / P
                    point = recover_3d(pixel, heights[z], k[b, 0], poses[b, 0])
                    value = logits.pixel[b, ..., y, x] + logits.height[b, ..., z] + logits.constant[b]
                    for v in range(1, 1 + V):
                        u = project(point, k[b, v], poses[b, v])[0]
                        if (b, v) == (1, 2) or not bool(((u >= 0) & (u < size)).all()):
                            continue
                        gx, gy = ((u * P / size) - 0.5).clamp(0, P - 1).tolist()
                        x0, y0 = min(int(gx), P - 2), min(int(gy), P - 2)
                        fx, fy = gx - x0, gy - y0
                        m = logits.voxel.maps[b, :, :, v - 1]
                        value = value + (1 - fy) * ((1 - fx) * m[..., y0, x0] + fx * m[..., y0, x0 + 1])
                        value = value + fy * ((1 - fx) * m[..., y0 + 1, x0] + fx * m[..., y0 + 1, x0 + 1])
                    rows.append(value)
    return torch.stack(rows).unflatten(0, (B, Z, P, P)).permute(0, 4, 5, 1, 2, 3)


@pytest.mark.parametrize("size", [S, 100])  # 100 / P is not exact in float32
def test_loss_gradient_and_argmax_equal_the_dense_reference(size: int) -> None:
    logits = random_logits(size=size)
    assert isinstance(logits.voxel, WorldScores)
    dense = written_out(logits, size)
    assert 0.2 < float(logits.voxel.where.seen.mean()) < 0.95  # some voxels are not in the further views
    torch.testing.assert_close(logits.dense(), dense, rtol=0, atol=1e-9)
    generator = torch.Generator().manual_seed(1)
    position = torch.rand(B, A, T, 2, generator=generator, dtype=torch.float64) * P
    height = torch.rand(B, A, T, generator=generator, dtype=torch.float64) * Z
    weights = torch.rand(B, A, T, generator=generator, dtype=torch.float64)
    leaves = [logits.pixel, logits.height, logits.voxel.maps]
    log_prob = F.log_softmax(dense.flatten(3), -1)
    for target in (
        bilinear_target(position, height, (P, P), Z),
        hard_target(position.floor().long().flip(-1), height.long()),
    ):
        mass = torch.zeros(B, A, T, Z, P, P, dtype=torch.float64)
        for b, a, t in np.ndindex(B, A, T):
            for cell, weight in zip(target.cells[b, a, t], target.cell_weights[b, a, t], strict=True):
                for z, z_weight in zip(target.heights[b, a, t], target.height_weights[b, a, t], strict=True):
                    mass[b, a, t, z, cell[0], cell[1]] += weight * z_weight
        reference = -(mass.flatten(3) * log_prob).sum(-1)
        ours = volume_cross_entropy(logits, target)
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)
        for one, other in zip(
            torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True),
            torch.autograd.grad((reference * weights).sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    cells, heights = argmax_voxel(logits)
    assert torch.equal((heights * P + cells[..., 0]) * P + cells[..., 1], dense.flatten(3).argmax(-1))
    marginal = dense.flatten(3).softmax(-1).unflatten(-1, (Z, P * P)).sum(-2)
    torch.testing.assert_close(logits.pixel_marginal().flatten(-2).softmax(-1), marginal)
    over = dense.flatten(-2).gather(-1, (cells[..., 0] * P + cells[..., 1])[..., None, None].expand(B, A, T, Z, 1))
    torch.testing.assert_close(
        logits.height_given_pixel(cells).softmax(-1), over[..., 0].softmax(-1), rtol=0, atol=1e-9
    )
    assert float(pixel_entropy(logits).max()) <= 1
    assert torch.isfinite(soft_argmax(logits, cells)[0]).all()


def test_known_projections_are_those_that_would_be_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: Any) -> VoxelProjection:
        made.append(arguments)
        return project_voxels(*arguments)

    monkeypatch.setattr(world_module, "project_voxels", counted)
    known = KnownProjections(keep=5)
    heights = torch.linspace(0, 0.2, Z, dtype=torch.float64)
    k, poses = cameras(V)
    usable = torch.tensor([[True, False], [True, True]])

    def same(k: torch.Tensor, poses: torch.Tensor, usable: torch.Tensor | None) -> int:
        """Check that the result equals a new projection; return how many pairs of cameras were projected."""
        made.clear()
        ours, fresh = known(k, poses, heights, P, S, usable), project_voxels(k, poses, heights, P, S, usable)
        assert torch.equal(ours.grid, fresh.grid)
        assert torch.equal(ours.seen, fresh.seen)
        return len(made)

    assert same(k, poses, None) == 4
    assert same(k, poses, usable) == 0  # a covered camera has not moved
    assert same(k.flip(0), poses.flip(0), None) == 0
    poses[1, 2, 0, 3] += 0.01  # one further camera moves: the projections of the others stay cached
    assert same(k, poses, None) == 1
    poses[:, 0, 0, 3] += 0.01  # the first camera moves: its voxels change
    assert same(k, poses, None) == 4
    assert same(k, poses, None) == 0
    k[0, 1, 0, 0] = 90.0
    assert same(k, poses, usable) == 1
    assert len(known._known) == 5
    made.clear()
    known(k, poses, heights + 0.1, P, S)  # other heights, other voxels
    assert len(made) == 4


def test_a_view_that_sees_nothing_leaves_the_one_view_volume() -> None:
    logits = random_logits()
    assert isinstance(logits.voxel, WorldScores)
    where = VoxelProjection(logits.voxel.where.grid, torch.zeros_like(logits.voxel.where.seen))
    blind = replace(logits, voxel=WorldScores(logits.voxel.maps, where))
    plain = replace(logits, voxel=None)
    target = hard_target(torch.zeros(B, A, T, 2, dtype=torch.long), torch.ones(B, A, T, dtype=torch.long))
    torch.testing.assert_close(volume_cross_entropy(blind, target), volume_cross_entropy(plain, target))
    assert torch.equal(argmax_voxel(blind)[0], argmax_voxel(plain)[0])
