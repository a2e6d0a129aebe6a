"""Decoders on distributions whose best trajectory is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

from keygrip.models.geometry.cameras import ParallelRayError, project, recover_3d
from keygrip.models.geometry.rotation_codecs import PCARotation
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.models.volume_query.decoding import Decoder, DecoderName
from keygrip.models.volume_query.network import VolumeQueryOutput
from keygrip.models.volume_query.volume import BilinearCoupling, VolumeLogits

P, Z, S, T = 24, 16, 96, 4
HEIGHTS = torch.tensor([0.0, 0.16])


def overhead_camera() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a camera 1 m above the table that points straight down: 1 px is 1 cm on the table."""
    k = torch.tensor([[[100.0, 0, 48], [0, 100.0, 48], [0, 0, 1]]])
    extrinsics = torch.tensor([[[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]])
    return k, extrinsics


def codec() -> PCARotation:
    fitted = PCARotation(classes=8)
    fitted.fit(rotation_exp(torch.linspace(-0.5, 0.5, 50)[:, None] * torch.tensor([0.0, 0.0, 1.0])))
    return fitted


def output(pixel: torch.Tensor, height: torch.Tensor) -> VolumeQueryOutput:
    steps = pixel.shape[2]
    rotation = torch.zeros(1, 1, steps, 8)
    rotation[..., 6] = 9.0
    gripper = torch.zeros(1, 1, steps, 10)
    gripper[..., 0] = 9.0
    return VolumeQueryOutput(VolumeLogits(pixel, height, torch.zeros(1, 1, steps)), gripper, rotation)


def decode(  # type: ignore[no-untyped-def]
    decoder: Decoder,
    result: VolumeQueryOutput,
    generator: torch.Generator | None = None,
    camera: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    k, extrinsics = camera or overhead_camera()
    return decoder.decode(
        result,
        [codec()],
        intrinsics=k,
        world_to_camera=extrinsics,
        height_range=HEIGHTS,
        image_size=S,
        generator=generator,
    )


def peaked(cells: list[tuple[int, int]], bins: list[int], strength: float = 20.0) -> VolumeQueryOutput:
    pixel, height = torch.zeros(1, 1, len(cells), P, P), torch.zeros(1, 1, len(cells), Z)
    for step, ((row, column), z) in enumerate(zip(cells, bins, strict=True)):
        pixel[0, 0, step, row, column] = strength
        height[0, 0, step, z] = strength
    return output(pixel, height)


@pytest.mark.parametrize("name", ["argmax", "soft_argmax", "viterbi", "sample"])
def test_every_decoder_finds_a_sharp_trajectory(name: str) -> None:
    cells, bins = [(10, 10), (10, 11), (11, 12), (12, 13)], [8, 7, 6, 5]
    decoded = decode(Decoder(name), peaked(cells, bins), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    centres = torch.tensor([[(column + 0.5) * 4, (row + 0.5) * 4] for row, column in cells])
    torch.testing.assert_close(decoded.pixels[0, 0], centres, atol=0.02, rtol=0)
    heights = (torch.tensor(bins) + 0.5) / Z * 0.16
    torch.testing.assert_close(decoded.position[0, 0, :, 2], heights, atol=1e-3, rtol=0)
    back, _ = project(decoded.position, *(part[:, None, None] for part in overhead_camera()))
    torch.testing.assert_close(back, decoded.pixels, atol=1e-3, rtol=0)
    assert decoded.gripper.max() < 0.1
    torch.testing.assert_close(decoded.quaternion.norm(dim=-1), torch.ones(1, 1, 4))
    assert float(decoded.entropy.max()) < 0.01


def test_viterbi_prefers_the_consistent_path_over_a_slightly_better_jump() -> None:
    result = peaked([(10, 10), (10, 11), (10, 12), (10, 13)], [8, 8, 8, 8], strength=8.0)
    result.volume.pixel[0, 0, 2, 20, 2] = 8.5  # a distant second mode that is best for this step alone
    jumps = decode(Decoder("argmax"), result).pixels[0, 0, 2]
    stays = decode(Decoder("viterbi", motion_std_m=0.05), result).pixels[0, 0, 2]
    torch.testing.assert_close(jumps, torch.tensor([10.0, 82.0]))
    torch.testing.assert_close(stays, torch.tensor([50.0, 42.0]), atol=0.1, rtol=0)


def test_viterbi_equals_exhaustive_search() -> None:
    torch.manual_seed(1)
    result = output(torch.randn(1, 1, 3, P, P) * 3, torch.randn(1, 1, 3, Z))
    decoder = Decoder("viterbi", candidates=4, motion_std_m=0.1, window=1)
    log_prob = result.volume.pixel.flatten(3).log_softmax(-1)[0, 0]
    best, index = log_prob.topk(4, dim=-1)
    heights = (result.volume.height[0, 0].argmax(-1) + 0.5) / Z * 0.16
    _k, _ = overhead_camera()
    points = torch.zeros(3, 4, 3)
    for t in range(3):
        x, y = (index[t] % P + 0.5) * 4, (index[t] // P + 0.5) * 4
        depth = 1 - heights[t]
        points[t] = torch.stack([(x - 48) / 100 * depth, -(y - 48) / 100 * depth, heights[t].expand(4)], dim=-1)
    scores = {
        (a, b, c): float(
            best[0, a] + best[1, b] + best[2, c]
            - (points[0, a] - points[1, b]).square().sum() / (2 * 0.1**2)
            - (points[1, b] - points[2, c]).square().sum() / (2 * 0.1**2)
        )
        for a in range(4)
        for b in range(4)
        for c in range(4)
    }  # fmt: skip
    path = max(scores, key=lambda key: scores[key])
    cells, _ = decoder._most_probable_path(
        result.volume,
        4.0,
        lambda position: position / Z * 0.16,
        *(p[:, None, None] for p in overhead_camera()),  # type: ignore[arg-type]
    )
    expected = torch.stack([torch.stack([index[t, c] // P, index[t, c] % P]) for t, c in enumerate(path)])
    assert torch.equal(cells[0, 0], expected)


def test_a_camera_along_the_table_is_an_error_not_a_far_point() -> None:
    k, _ = overhead_camera()
    level = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -1, 0.08], [0, 1, 0, 0], [0, 0, 0, 1]]])  # points along +y, 8 cm up
    result = peaked([(12, 12)] * 2, [8, 8])
    k = k.clone()
    k[:, 1, 1] = 1e6  # nothing above or below is in the image
    for name in get_args(DecoderName):
        decode = partial(
            Decoder(name).decode, result, [codec()], world_to_camera=level, height_range=HEIGHTS, image_size=S
        )
        with pytest.raises(ParallelRayError):
            decode(intrinsics=k)
        assert decode(intrinsics=k, strict=False).position.isnan().all()


def tilted_camera(down: float, height: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a wide-angle camera `height` metres up, pointing `down` degrees below the horizon along +y."""
    k = torch.tensor([[[40.0, 0, 48], [0, 40.0, 48], [0, 0, 1]]])
    turn = torch.deg2rad(torch.tensor(down))
    pose = torch.eye(4)
    pose[1, 1:3] = torch.stack([-turn.sin(), -turn.cos()])
    pose[2, 1:3] = torch.stack([turn.cos(), -turn.sin()])
    pose[:3, 3] = -pose[:3, :3] @ torch.tensor([0.0, 0.0, height])
    return k, pose[None]


@pytest.mark.parametrize("height", [0.5, 0.08], ids=["above the heights", "amid the heights"])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", ["argmax", "soft_argmax", "viterbi", "sample"])
def test_what_is_no_point_is_not_decoded(name: str, coupled: bool, height: float) -> None:
    k, pose = tilted_camera(10.0, height)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 2

    steps = 40
    coupling = BilinearCoupling(draw(1, 1, steps, 2, P, P), draw(2, Z)) if coupled else None
    drawn = output(draw(1, 1, steps, P, P), draw(1, 1, steps, Z))
    result = replace(drawn, volume=replace(drawn.volume, voxel=coupling))
    decoded = decode(Decoder(name), result, torch.Generator().manual_seed(0), (k, pose))  # type: ignore[arg-type]
    assert torch.isfinite(decoded.position).all()
    assert torch.isfinite(decoded.entropy).all()
    back, _ = project(decoded.position, k[:, None, None], pose[:, None, None])
    torch.testing.assert_close(back, decoded.pixels, atol=1e-3, rtol=0, check_dtype=False)
    if name == "argmax":  # the best of all voxels that are points
        dense = result.volume.float().dense()[0, 0]  # [T, Z, P, P]
        cells = torch.stack(torch.meshgrid(*[torch.arange(P) + 0.5] * 2, indexing="xy"), dim=-1) * 4
        heights = (torch.arange(Z) + 0.5) / Z * 0.16
        points = recover_3d(cells, heights[:, None, None], k[0], pose[0], strict=False)
        there = torch.isfinite(points).all(-1)
        assert 0.05 < float(there.double().mean()) < 0.95
        assert not there.flatten()[dense.flatten(1).argmax(-1)].all()  # unmasked, some steps would be above the horizon
        best = dense.masked_fill(~there, -torch.inf).flatten(1).argmax(-1)
        torch.testing.assert_close(
            decoded.position[0, 0], points.flatten(0, 2)[best], check_dtype=False, atol=1e-3, rtol=1e-4
        )


def test_unknown_decoder_is_named() -> None:
    with pytest.raises(ValueError, match="soft_argmax"):
        Decoder("best")  # type: ignore[arg-type]
