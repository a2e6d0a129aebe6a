"""Where the gripper will be in the images: the layout of the maps, the targets, and that the loss reaches the model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from looking import looking_at
from torch import Tensor
from vla_parts import S, V, observation, ready_module, small_batch, small_geometry, small_module, small_statistics

from keygrip.data.robot.statistics import CameraDistance
from keygrip.models.backbone import DinoBackbone
from keygrip.models.geometry.cameras import project
from keygrip.models.geometry_vla.geometry import DECIMETRES, DinoMultiView, GeometryFeatures
from keygrip.models.geometry_vla.pointing import (
    PatchPointing,
    PointedActions,
    PointedTokens,
    Pointing,
    meeting_points,
    peak_means,
    pointing_losses,
    resampled,
)
from keygrip.models.nn.image_sampling import bilinear_cells

A, T, P, C, H = 1, 4, 3, 2, 8


def test_cells_lie_where_their_tokens_are() -> None:
    torch.manual_seed(0)
    pointing = Pointing(H, A, T, C)
    places = torch.zeros(2, 2 + V * P * P + 1, 3)
    places[:, 2:-1, 0] = torch.arange(V).repeat_interleave(P * P) + 1.0
    hidden = torch.randn(2, places.shape[1], H)
    before = pointing(hidden, places, V)
    assert before.shape == (2, V, A, T, P * C, P * C)
    row, column = 2, 1
    hidden[1, 2 + P * P + row * P + column] *= torch.linspace(-1, 1, H)  # of the second sample's second view
    changed = (pointing(hidden, places, V) != before).any(dim=(2, 3)).nonzero().tolist()
    assert all(sample == 1 and view == 1 for sample, view, _, _ in changed)
    assert {(r // C, c // C) for _, _, r, c in changed} == {(row, column)}


def test_cells_of_patches_lie_where_the_patches_are() -> None:
    torch.manual_seed(0)
    side, dim, cells = 2 * P, 6, 2  # two patches per token side, so that there are 12 cells per image side
    pointing = PatchPointing(H, dim, A, T, cells)
    places = torch.zeros(2, 2 + V * P * P + 1, 3)
    places[:, 2:-1, 0] = torch.arange(V).repeat_interleave(P * P) + 1.0
    hidden, patches = torch.randn(2, places.shape[1], H), torch.randn(2, V * side * side, dim)
    assert not pointing(hidden, places, V, patches).any(), "no difference at first"
    torch.nn.init.normal_(pointing.ask[1].weight)  # type: ignore[arg-type]
    before = pointing(hidden, places, V, patches)
    assert before.shape == (2, V, A, T, side * cells, side * cells)
    row, column = 3, 4
    other = patches.clone()
    other[1, side * side + row * side + column] *= torch.linspace(-1, 1, dim)  # of the second sample's second view
    changed = (pointing(hidden, places, V, other) != before).any(dim=(2, 3)).nonzero().tolist()
    assert all(sample == 1 and view == 1 for sample, view, _, _ in changed)
    assert {(r // cells, c // cells) for _, _, r, c in changed} == {(row, column)}
    asked = hidden.clone()
    asked[0, 2 + (row // 2) * P + column // 2] *= torch.linspace(-1, 1, H)  # the token over it, first view
    changed = (pointing(asked, places, V, patches) != before).any(dim=(2, 3)).nonzero().tolist()
    assert {(sample, view, r // cells // 2, c // cells // 2) for sample, view, r, c in changed} == {
        (0, 0, row // 2, column // 2)
    }
    with pytest.raises(ValueError, match=r"pointing_patch_cells=2: 50 geometry tokens of 2 views .* set it to 0"):
        pointing(hidden, places, V, torch.randn(2, V * 25, dim))


def test_maps_read_from_patches_train_the_geometry_encoder(tmp_path: Path) -> None:
    geometry = small_geometry(point_weight=0.0, depth_weight=0.0)
    module = ready_module(tmp_path, geometry=geometry, pointing_cells=2, pointing_patch_cells=2)
    batch = small_batch()
    plain = module(batch).pointing
    finer = module.network.patch_pointing
    assert finer is not None
    torch.nn.init.normal_(finer.ask[1].weight)  # type: ignore[arg-type]
    scene = module(batch)
    assert scene.pointing is not None
    assert plain is not None
    assert scene.pointing.shape == plain.shape
    assert (scene.pointing - plain).abs().max() > 1e-3
    pointing_losses(scene.pointing, batch)["pointing"].backward()
    assert all(parameter.grad is not None for parameter in finer.parameters())
    stem = [parameter.grad for parameter in geometry.backbone.net.patch_embed.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in stem)


def test_maps_read_from_patches_need_maps_and_one_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pointing_patch_cells=1 is a number of cells.*: set it to 0"):
        small_module(pointing_patch_cells=1, pointing_cells=0)
    without = small_module(pointing_patch_cells=1, pointing_cells=2, geom_inject_to_dit=False)
    assert without.network.patch_pointing is None
    said = r"patch_cells=1 gives maps of 2 cells per side, and pointing_cells=2 of 4: .* set pointing_patch_cells=2"
    module = small_module(pointing_cells=2, pointing_patch_cells=1)  # the encoder accepts images of any size
    with pytest.raises(ValueError, match=said):
        module.set_statistics(small_statistics(tmp_path))


class FixedSize(DinoMultiView):
    """An encoder with one fixed image size, like MapAnything."""

    side = 2

    def grid_side(self, image_size: int | None = None) -> int:
        return self.side


@pytest.mark.parametrize(
    ("side", "cells", "said"),
    [
        (4, 2, "gives maps of 8 cells per side, and pointing_cells=2 of 4: both must give the same; .*_patch_cells=1"),
        (3, 2, "2 x 2 tokens of a view do not divide the geometry encoder's 3 x 3 patches: set it to 0"),
        (2, 2, None),
    ],
)
def test_maps_that_fit_no_encoder_of_one_size_are_refused_when_the_network_is_built(
    side: int, cells: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FixedSize, "side", side)
    backbone = DinoBackbone("tiny", S, "random", width=16, depth=1, heads=2)
    geometry = FixedSize(backbone, views=V, dim=16, layers=1, heads=2)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        small_module(geometry, pointing_cells=2, pointing_patch_cells=cells)


def test_the_loss_is_least_at_the_gripper_and_counts_what_is_seen() -> None:
    batch = small_batch()
    batch.action_is_pad[0, 0, 2:] = True
    size, cells = batch.images.shape[-1], 8
    cameras = batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    pixels, _ = project(batch.position[:, None], *cameras)
    batch.position[1, 0, 1] = torch.tensor([50.0, 0.0, 0.1])  # far outside of both images
    logits = torch.full((2, V, 1, T, cells, cells), -20.0)
    for sample, view, step in torch.cartesian_prod(torch.arange(2), torch.arange(V), torch.arange(T)).tolist():
        x, y = (pixels[sample, view, 0, step] * cells / size - 0.5).tolist()
        for column, across in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
            for row, down in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                logits[sample, view, 0, step, row, column] = torch.tensor(across * down).clamp(min=1e-9).log()
    logits.requires_grad_()
    losses = pointing_losses(logits, batch)
    # A map that equals the target has no gradient, and its mean is the pixel itself.
    (gradient,) = torch.autograd.grad(losses["pointing"], logits)
    assert gradient.abs().max() < 1e-5
    assert losses["pointing_px"] < 0.01
    shifted = pointing_losses(logits.detach().roll(1, dims=-1), batch)
    assert shifted["pointing"] > losses["pointing"] + 1
    assert shifted["pointing_px"] == pytest.approx(size / cells, rel=0.01)
    spoilt = logits.detach().clone()
    spoilt[0, :, :, 2:] = torch.randn(V, 1, 2, cells, cells)  # padding
    spoilt[1, :, :, 1] = torch.randn(V, 1, cells, cells)  # outside
    torch.testing.assert_close(pointing_losses(spoilt, batch)["pointing"], losses["pointing"].detach())


def test_the_keyframe_has_a_map_of_its_own() -> None:
    batch = small_batch()
    batch.action_is_pad[:] = True  # padded steps do not affect the keyframe
    logits = torch.randn(2, V, 1, T + 1, 8, 8)
    losses = pointing_losses(logits, batch)
    assert losses["pointing"] == 0
    moved = replace(
        batch, position=batch.keyframe[:, :, None].expand(-1, -1, T, -1), action_is_pad=~batch.action_is_pad
    )
    as_steps = pointing_losses(logits[:, :, :, -1:].expand(-1, -1, -1, T, -1, -1), moved)
    torch.testing.assert_close(losses["keyframe"], as_steps["pointing"])
    torch.testing.assert_close(losses["keyframe_px"], as_steps["pointing_px"])
    assert "keyframe" not in pointing_losses(logits[:, :, :, :T], batch)


def test_the_keyframe_trains_its_own_map_and_is_told_to_the_head(tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2, pointing_keyframe=True, pointed_tokens=True)
    batch = small_batch()
    scene = module(batch)
    assert scene.pointing is not None
    assert scene.pointing.shape[3] == T + 1
    assert scene.groups[2] == V * (T + 1)
    losses = module.losses(scene, batch)
    parts = [losses[name] for name in ("action", "points", "depth")]
    total = sum(parts) + 0.1 * (losses["pointing"] + losses["keyframe"])
    torch.testing.assert_close(losses["total"], total)


def test_figures_show_where_it_points_for_the_keyframe(tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2, pointing_keyframe=True)
    batch = small_batch()
    with torch.no_grad():
        scene = module(batch)
        assert scene.pointing is not None
        shown, plain = module.figure(scene, batch), module.figure(replace(scene, pointing=None), batch)
        steps_alone = module.figure(replace(scene, pointing=scene.pointing[:, :, :, :T]), batch)
    assert shown.shape[1] == plain.shape[1]
    assert np.array_equal(steps_alone, plain)
    assert not np.array_equal(shown, plain)


def test_it_trains_the_language_model_and_not_the_head(tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2)
    batch = small_batch()
    scene = module(batch)
    assert scene.pointing is not None
    pointing_losses(scene.pointing, batch)["pointing"].backward()
    language = module.network.vlm.model.language_model.layers[0].mlp.gate_proj.weight
    assert language.grad is not None
    assert language.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.network.head.parameters())
    losses = module.losses(replace(module(batch), pointing=None), batch)
    assert "pointing" not in losses


def test_bad_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="pointing_cells"):
        Pointing(H, A, T, -1)


@pytest.mark.parametrize("side", [2, 4, 8, 16, 6])
def test_maps_keep_their_sum_on_other_grids(side: int) -> None:
    maps = torch.rand(2, 3, 8, 8)
    maps = maps / maps.sum(dim=(-2, -1), keepdim=True)
    found = resampled(maps, side)
    assert found.shape == (2, 3, side, side)
    torch.testing.assert_close(found.sum(dim=(-2, -1)), torch.ones(2, 3))
    if side == 4:
        torch.testing.assert_close(found, maps.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).sum(dim=(-3, -1)))


def only(tokens: PointedTokens, part: str) -> PointedTokens:
    """Set all parameters to zero except one part, which copies its input into the first values of a token."""
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.zero_()
        weight = getattr(tokens, part).weight
        weight[: weight.shape[1]] = torch.eye(weight.shape[1])
    return tokens


def test_pointed_tokens_hold_the_geometry_of_the_place() -> None:
    dim = 6
    logits = torch.full((2, V, A, T, 8, 8), -30.0)
    logits[1, 1, 0, 2, 5, 3] = 30.0  # row 5, column 3 of 8 x 8: patch (2, 1) of 4 x 4, cells (5, 3) of the points
    geometry = GeometryFeatures(torch.randn(2, V * 16, dim), torch.randn(2, V, 8, 8, 3), torch.zeros(2, V, 8, 8))
    assert geometry.points is not None
    slot = A * T + 2  # the second view, the third step
    seen = only(PointedTokens(H, A, T, V, dim), "seen")(logits, geometry)
    assert seen.shape == (2, V * A * T, H)
    torch.testing.assert_close(seen[1, slot, :dim], geometry.tokens[1, 16 + 2 * 4 + 1])
    torch.testing.assert_close(seen[0, 0, :dim], geometry.tokens[0, :16].mean(dim=0))  # a uniform map
    points = only(PointedTokens(H, A, T, V, dim), "points")(logits, geometry)
    torch.testing.assert_close(points[1, slot, :3], DECIMETRES * geometry.points[1, 1, 5, 3])
    without = PointedTokens(H, A, T, V)
    moved = logits.roll(1, dims=-1)
    assert not torch.allclose(without(logits)[1, slot], without(moved)[1, slot])


def test_a_peak_is_not_moved_by_what_lies_far_from_it() -> None:
    maps = torch.zeros(2, 16, 16)
    maps[:, 4, 6], maps[:, 5, 6] = 0.3, 0.6
    maps[1, 14, 1] = 0.1
    torch.testing.assert_close(peak_means(maps), torch.tensor([6.5, (0.3 * 4.5 + 0.6 * 5.5) / 0.9]).expand(2, 2) / 16)
    maps[1, 5, 9] = 0.3  # within the window of the peak
    assert peak_means(maps)[1, 0] * 16 == pytest.approx((0.9 * 6.5 + 0.3 * 9.5) / 1.2)


def test_triangulated_tokens_hold_the_place_that_the_views_point_at() -> None:
    table = np.array([0.3, 0.0, 0.1])
    eyes = [np.array([0.9, 0.1, 0.8]), np.array([0.6, -0.8, 0.7])]
    poses = torch.from_numpy(np.stack([looking_at(eye, table) for eye in eyes])).float()
    batch = replace(small_batch(), view_world_to_camera=poses.expand(2, V, 4, 4))
    size, cells = batch.images.shape[-1], 16
    cameras = batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    pixels, _ = project(batch.position[:, None], *cameras)
    around, weights = bilinear_cells(pixels * (cells / size), (cells, cells))
    maps = torch.zeros(2, V, A, T, cells * cells).scatter_add(-1, around[..., 0] * cells + around[..., 1], weights)
    logits = maps.clamp(min=1e-9).log().unflatten(-1, (cells, cells))
    shares = batch.view_intrinsics / torch.tensor([[size], [size], [1.0]])
    tokens = only(PointedTokens(H, A, T, V, triangulated=True), "meeting")
    where, off = meeting_points(logits, shares, batch.view_world_to_camera)
    torch.testing.assert_close(where, batch.position, atol=2e-4, rtol=0)  # to a fifth of a millimetre
    found = tokens(logits, None, (where, off)).unflatten(1, (V, A, T))
    expected = DECIMETRES * batch.position[:, None].expand(-1, V, -1, -1, -1)
    torch.testing.assert_close(found[..., :3], expected, atol=2e-3, rtol=0)
    assert found[..., 3].abs().max() < 1e-3
    _, apart = meeting_points(logits.roll(1, dims=1), shares, batch.view_world_to_camera)  # maps exchanged
    assert apart.median() > 0.05  # rays that do not meet


@pytest.mark.parametrize("keyframe", [True, False])
def test_each_action_is_told_its_own_meeting_point_and_the_keyframes(keyframe: bool) -> None:
    torch.manual_seed(0)
    arms, maps = 2, T + keyframe
    told = PointedActions(H, arms, T, keyframe)
    met, present = torch.randn(3, arms, maps, 3), torch.randn(3, arms, 3)
    assert not told(met, present).any(), "no difference at first"
    torch.nn.init.normal_(told.mlp[2].weight)  # type: ignore[arg-type]
    before = told(met, present)
    assert before.shape == (3, T, H)

    def changed(met: Tensor, present: Tensor = present) -> list[list[int]]:
        return (told(met, present) != before).any(dim=-1).nonzero().tolist()

    for arm in range(arms):
        other = met.clone()
        other[1, arm, 2] += 0.01  # the third step
        assert changed(other) == [[1, 2]]
        if keyframe:
            other = met.clone()
            other[1, arm, T] += 0.01
            assert changed(other) == [[1, step] for step in range(T)]
        aside = present.clone()
        aside[2, arm, 1] += 0.01  # the position of the gripper
        assert changed(met, aside) == [[2, step] for step in range(T)]
    away = met.clone()
    away[0, 0, 0, 0] = 1e6  # from rays that are nearly parallel
    assert told(away, present)[0, 0].abs().max() < 100 * before.abs().max()


@pytest.mark.parametrize("draws", [1, 3])
def test_what_an_action_is_told_is_where_the_rays_meet_normalised_as_the_state(tmp_path: Path, draws: int) -> None:
    module = ready_module(
        tmp_path, draws=draws, pointing_cells=2, pointing_keyframe=True, pointed_actions=True, pointed_tokens=False
    )
    batch = small_batch()
    scene = module(batch)
    assert scene.met is not None
    assert scene.places is not None
    assert scene.met.shape == (2, A, T + 1, 3)
    state = module.state(batch).unflatten(-1, (A, 10))[..., :3]
    at_the_gripper = batch.start_position[:, :, None].expand_as(scene.met)
    torch.testing.assert_close(module.actions.places(at_the_gripper), state[:, :, None].expand_as(scene.met))
    torch.testing.assert_close(scene.places, module.actions.places(scene.met))
    assert module.network.pointed_actions is not None
    torch.nn.init.normal_(module.network.pointed_actions.mlp[2].weight, std=0.3)  # type: ignore[arg-type]
    # all noise samples of a sample receive the same points, alone or in a batch
    level, noisy = torch.rand(2).repeat_interleave(draws), torch.randn(2 * draws, T, 10)
    found = module.network.velocity(scene, noisy, level, module.state(batch))
    for sample in range(2):
        one = small_batch()
        one = replace(
            one,
            **{
                name: value[sample : sample + 1]
                for name, value in vars(one).items()
                if isinstance(value, Tensor | list) and name not in ("mean", "std")
            },
        )
        rows = slice(sample * draws, (sample + 1) * draws)
        alone = module.network.velocity(module(one), noisy[rows], level[rows], module.state(one))
        torch.testing.assert_close(found[rows], alone, atol=1e-4, rtol=1e-4)
    # plans use the points too
    policy = module.policy()
    seen, aside = observation(), observation()
    aside["cameras"]["over"]["world_to_camera"] = np.eye(4)
    policy.reset(0)
    plan = policy.plan(seen)
    policy.reset(0)
    assert not np.allclose(policy.plan(aside).position, plan.position, atol=1e-4)


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("where", ["pointed_triangulated", "pointed_actions"])
def test_triangulated_places_reach_the_actions(tmp_path: Path, geometry: bool, where: str) -> None:
    options = {"pointing_cells": 2, "pointed_tokens": True, where: True}
    module = ready_module(tmp_path, geom_inject_to_dit=geometry, **options)
    if module.network.pointed_actions is not None:  # zero at first
        torch.nn.init.normal_(module.network.pointed_actions.mlp[2].weight, std=0.3)  # type: ignore[arg-type]
    batch = small_batch()
    before = module.sample(module(batch), batch)
    aside = torch.eye(4).expand_as(batch.view_world_to_camera).clone()
    aside[..., 0, 3] = 0.1
    moved = replace(batch, view_world_to_camera=batch.view_world_to_camera @ aside)
    assert not torch.allclose(module.sample(module(moved), moved), before, atol=1e-5)
    module.losses(module(batch), batch)["total"].backward()
    reading = [part for part in (module.network.pointed, module.network.pointed_actions) if part is not None]
    assert all(parameter.grad is not None for part in reading for parameter in part.parameters())


@pytest.mark.parametrize("where", ["pointed_triangulated", "pointed_actions"])
def test_rays_of_one_camera_are_refused(tmp_path: Path, where: str) -> None:
    module = small_module(pointing_cells=2, pointed_tokens=True, **{where: True})
    one = replace(small_statistics(tmp_path), cameras=("over",))
    with pytest.raises(
        ValueError, match=rf"{where}=true: .*one camera \(over\) meet nowhere.* data.cameras two or more"
    ):
        module.set_statistics(one)


@pytest.mark.parametrize("where", ["pointed_triangulated", "pointed_actions"])
def test_cameras_at_one_place_are_refused_and_near_ones_warned_of(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def take(**apart: float) -> None:
        pairs = {
            ("over", "front"): CameraDistance(0.01, apart["front"]),
            ("front", "hand"): CameraDistance(0.4, apart["hand"]),
        }
        module = small_module(pointing_cells=2, pointed_tokens=True, **{where: True})
        module.set_statistics(replace(small_statistics(tmp_path), cameras=("over", "front", "hand"), apart=pairs))

    with pytest.raises(ValueError, match=rf"{where}=true: even over and front, .* stand 1 cm apart, 1\.9 degrees"):
        take(front=1.9, hand=0.5)
    assert not caplog.records
    take(front=0.0, hand=7.0)
    (warned,) = caplog.messages
    assert "front and hand, of all two the widest, stand 40 cm apart, 7 degrees" in warned
    assert "8 times less exact" in warned  # 1 / sin 7 degrees
    caplog.clear()
    take(front=0.0, hand=12.0)
    assert not caplog.records


def test_triangulated_places_need_pointed_tokens() -> None:
    with pytest.raises(ValueError, match=r"pointed_triangulated=true is of pointed tokens"):
        small_module(pointed_triangulated=True)


def test_pointed_tokens_reach_the_actions_and_so_does_geometry_through_them(tmp_path: Path) -> None:
    module = ready_module(tmp_path, pointing_cells=2, pointed_tokens=True)
    batch = small_batch()
    scene = module(batch)
    assert scene.groups == (scene.groups[0], 4, V * T)
    assert scene.contexts[0].tokens.shape[1] == sum(scene.groups)
    assert {"geometry_share", "pointed_share"} <= set(module.metrics(scene, batch, module.sample(scene, batch)))
    before = module.sample(scene, batch)
    assert module.network.pointed is not None
    for part in (module.network.pointed.slots, module.network.pointed.seen, module.network.pointed.points):
        assert part is not None
        changed = part if isinstance(part, torch.nn.Parameter) else part.weight
        kept = changed.detach().clone()
        with torch.no_grad():
            changed.add_(torch.randn_like(changed))
        assert not torch.allclose(module.sample(module(batch), batch), before, atol=1e-4)
        with torch.no_grad():
            changed.copy_(kept)
    torch.testing.assert_close(module.sample(module(batch), batch), before)
    module.losses(module(batch), batch)["total"].backward()
    assert all(parameter.grad is not None for parameter in module.network.pointed.parameters())


def test_an_encoder_without_points_leaves_no_parameter_without_gradient(tmp_path: Path) -> None:
    geometry = small_geometry(point_weight=0.0, depth_weight=0.0)
    module = ready_module(tmp_path, geometry=geometry, pointing_cells=2, pointed_tokens=True)
    batch = small_batch()
    module.losses(module(batch), batch)["total"].backward()
    assert module.network.pointed is not None
    assert all(parameter.grad is not None for parameter in module.network.pointed.parameters())


def test_geometry_tokens_without_places_are_refused() -> None:
    tokens = PointedTokens(H, A, T, V, 6)
    with pytest.raises(ValueError, match=r"square grid, got 5 per view"):
        tokens(torch.zeros(1, V, A, T, 4, 4), GeometryFeatures(torch.zeros(1, V * 5, 6)))


def test_pointed_tokens_need_maps() -> None:
    for option in ("pointed_tokens", "pointing_keyframe", "pointed_actions"):
        with pytest.raises(ValueError, match=rf"{option}=true needs maps .* set pointing_cells above 0"):
            small_module(**{option: True})
