"""Geometry encoders: depth targets against projection, which inputs each uses, MapAnything's own conditions."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import on_two_ranks
from vla_parts import S, V, ready_module, small_batch, small_geometry, small_module

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.models.geometry.cameras import project
from keygrip.models.geometry.rotations import quaternion_to_matrix, rotation_exp
from keygrip.models.geometry_vla.feature_cache import FeatureCache
from keygrip.models.geometry_vla.geometry import depth_targets
from keygrip.models.geometry_vla.mapanything import COMMIT, MapAnythingGeometry
from keygrip.training.distributed import mean_over_processes
from keygrip.training.memory import SMALL, count_forward, is_counting


def test_depth_targets_are_the_points_that_project_to_their_pixels() -> None:
    batch = small_batch()
    assert batch.depth is not None
    batch.depth[0, 0, 0, :8] = 0.0
    points, known, metres = depth_targets(batch.depth, batch.view_intrinsics, batch.view_world_to_camera, 8, limit=1.1)
    assert points.shape == (2, V, 8, 8, 3)
    pixels, depth = project(
        points, batch.view_intrinsics[:, :, None, None], batch.view_world_to_camera[:, :, None, None]
    )
    own = (torch.arange(8) * 4 + 2 + 0.5).float()  # the centre of the pixel that contains the centre of the cell
    shown = metres > 0
    torch.testing.assert_close(pixels[..., 0][shown], own.expand_as(metres)[shown], atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels[..., 1][shown], own[:, None].expand_as(metres)[shown], atol=1e-3, rtol=0)
    torch.testing.assert_close(depth[shown], metres[shown])
    torch.testing.assert_close(metres, batch.depth[..., 2::4, 2::4])
    assert torch.equal(known, (metres > 0) & (metres < 1.1))


def test_predictions_stand_where_their_targets_do() -> None:
    """A head that predicts the row of its patch must be compared with the targets of the same row."""
    encoder = small_geometry(cells=2)
    batch = small_batch()
    assert encoder.head is not None
    with torch.no_grad():
        encoder.norm.weight.zero_()  # tokens then equal the norm's bias everywhere
        encoder.head.weight.zero_()
        encoder.head.bias.copy_(torch.arange(16.0))  # per cell: x, y, z, log depth
    features = encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera)
    assert features.points is not None
    assert features.points.shape == (2, V, 4, 4, 3)
    cell = features.points[0, 0, :2, :2, 0]
    torch.testing.assert_close(cell, torch.tensor([[0.0, 4.0], [8.0, 12.0]]))


def test_losses_ignore_what_is_unknown_and_vanish_for_the_truth() -> None:
    encoder, batch = small_geometry(), small_batch()
    assert batch.depth is not None
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    features = encoder(batch.images, *cameras)
    plain = encoder.losses(features, batch.depth, *cameras)
    assert plain["points"] > 0
    assert plain["depth"] > 0
    holes = batch.depth.clone()
    holes[:, :, : S // 2] = 0.0
    far = batch.depth.clone()
    far[:, :, : S // 2] = 50.0
    for name in ("points", "depth"):
        torch.testing.assert_close(
            encoder.losses(features, holes, *cameras)[name], encoder.losses(features, far, *cameras)[name]
        )
    none = encoder.losses(features, torch.zeros_like(batch.depth), *cameras)
    assert all(float(value.detach()) == 0 for value in none.values())
    points, _, metres = depth_targets(batch.depth, *cameras, 4, 2.0)
    true = type(features)(features.tokens, points, metres.log())
    assert all(float(value) < 1e-5 for value in encoder.losses(true, batch.depth, *cameras).values())


def test_logged_losses_and_errors_are_means_over_the_cells_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has a sample without most of its depth."""
    encoder, batch = small_geometry(), small_batch()
    assert batch.depth is not None
    batch.depth[0, :, : S // 2] = 0.0
    inputs = batch.images, batch.depth, batch.view_intrinsics, batch.view_world_to_camera

    def losses(part: slice) -> dict[str, float]:
        images, depth, *cameras = (value[part] for value in inputs)
        logged = mean_over_processes(encoder.losses(encoder(images, *cameras), depth, *cameras))
        return {name: float(value) for name, value in logged.items()}

    whole = losses(slice(2))
    assert whole.keys() == {"points", "depth", "point_cm", "depth_cm"}
    halves = on_two_ranks(monkeypatch, lambda rank: losses(slice(rank, rank + 1)))
    assert halves == [pytest.approx(whole, rel=1e-4)] * 2


def test_every_view_reaches_every_views_tokens() -> None:
    encoder, batch = small_geometry(), small_batch()
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    plain = encoder(batch.images, *cameras).tokens
    assert plain.shape == (2, V * 4, 16)
    for view in range(V):
        other = batch.images.clone()
        other[:, view] = 255 - other[:, view]
        difference = (encoder(other, *cameras).tokens - plain).abs().amax(dim=(0, 2))
        assert (difference > 1e-4).all()
    # which camera an image belongs to matters
    swapped = encoder(batch.images.flip(1), *cameras).tokens.unflatten(1, (V, -1)).flip(1).flatten(1, 2)
    assert (swapped - plain).abs().max() > 1e-4


def test_rays_tell_the_calibration_and_images_alone_do_not() -> None:
    batch = small_batch()
    moved = batch.view_world_to_camera.clone()
    moved[..., 0, 3] += 0.2
    for rays in (False, True):
        encoder = small_geometry(camera_rays=rays)
        plain = encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens
        other = encoder(batch.images, batch.view_intrinsics, moved).tokens
        assert bool((other - plain).abs().max() > 1e-4) == rays


@pytest.mark.parametrize("kind", ["tokens", "points", "maps"])
def test_the_actions_gradient_can_be_kept_out(kind: str, tmp_path: Path) -> None:
    pointing = {"pointing_cells": 2, "pointed_tokens": True}
    options: dict[str, dict[str, Any]] = {
        "tokens": {},
        "points": {**pointing, "geom_dit_tokens": 0},  # the head receives geometry at the pointed places alone
        "maps": {**pointing, "pointing_patch_cells": 2, "geom_inject_to_vlm": True},
    }
    for let in (True, False):
        module = ready_module(tmp_path, geometry=small_geometry(action_gradient=let), **options[kind]).train()
        batch = small_batch()
        losses = module.losses(module(batch), batch)
        losses["action"].backward(retain_graph=True)
        assert module.network.geometry is not None
        assert module.learns_depth
        encoder = dict(module.network.geometry.named_parameters())
        moved = {name for name, each in encoder.items() if each.grad is not None and bool(each.grad.any())}
        assert bool(moved) == let, moved
        (losses["points"] + losses["depth"]).backward()
        assert all(encoder[name].grad is not None for name in ("head.weight", "reduce.weight")), "depth trains it"


def test_an_encoder_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set one of them above 0, or action_gradient=true"):
        small_geometry(action_gradient=False, point_weight=0.0, depth_weight=0.0)
    assert small_geometry(point_weight=0.0, depth_weight=0.0).head is None


def test_more_views_than_built_for_are_refused() -> None:
    batch = small_batch()
    with pytest.raises(ValueError, match="built for 1 views, got 2"):
        small_geometry(views=1)(batch.images, batch.view_intrinsics, batch.view_world_to_camera)


# ---------------------------------------------------------------------- MapAnything


def test_mapanything_gets_images_in_its_own_normalisation(mapanything: Path) -> None:
    encoder, batch = MapAnythingGeometry(str(mapanything), image_size=S), small_batch()
    encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera)
    seen = encoder._model[0].seen
    assert len(seen) == V
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.25, 0.4])[:, None, None]
    for view in range(V):
        torch.testing.assert_close(seen[view]["img"], (batch.images[:, view] / 255 - mean) / std)


@pytest.mark.parametrize(("dim", "patch_size"), [(24, 8), (40, 16)])
def test_dimensions_are_read_from_the_model(mapanything: Path, dim: int, patch_size: int) -> None:
    (mapanything / "config.json").write_text(json.dumps({"width": 10, "dim": dim, "patch_size": patch_size}))
    encoder, batch = MapAnythingGeometry(str(mapanything), image_size=S), small_batch()
    assert encoder.dim == dim
    tokens = encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens
    assert tokens.shape == (2, V * (S // patch_size) ** 2, dim)
    module = small_module(encoder)
    assert module.network.compressor is not None
    assert module.network.compressor.geom_dim == dim
    larger = MapAnythingGeometry(str(mapanything), image_size=2 * S)
    assert (
        larger(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens.shape[1] == 4 * tokens.shape[1]
    )
    with pytest.raises(ValueError, match=f"multiple of MapAnything's {patch_size}"):
        MapAnythingGeometry(str(mapanything), image_size=S + 1)


def test_mapanything_is_frozen_and_not_in_the_checkpoint(mapanything: Path) -> None:
    encoder, batch = MapAnythingGeometry(str(mapanything), image_size=S), small_batch()
    assert not list(encoder.parameters())
    assert list(encoder.state_dict()) == ["_digest"]
    assert not encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens.requires_grad
    (mapanything / "config.json").write_text(json.dumps({"width": 10, "dim": 40, "patch_size": 8}))
    other = MapAnythingGeometry(str(mapanything), image_size=S)
    with pytest.raises(ValueError, match="not the MapAnything weights that the checkpoint was trained with"):
        other.load_state_dict(encoder.state_dict())


def test_cached_features_are_those_of_the_model(mapanything: Path, tmp_path: Path) -> None:
    batch = small_batch()
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    plain = MapAnythingGeometry(str(mapanything), image_size=S)
    cached = MapAnythingGeometry(str(mapanything), image_size=S, cache=FeatureCache(tmp_path / "cache", 0.1))
    kind = type(cached._model[0])
    kind.calls = 0
    expected = plain(batch.images, *cameras).tokens
    for _ in range(3):
        torch.testing.assert_close(cached(batch.images, *cameras).tokens, expected, atol=2e-3, rtol=2e-3)
    assert kind.calls == 2


@pytest.mark.parametrize(("samples", "size"), [(4, 448), (1, 32)])
def test_a_count_of_memory_asks_no_cache(mapanything: Path, tmp_path: Path, samples: int, size: int) -> None:
    """When memory is counted, images of the real size have no content; small images have content and are not cached."""
    (mapanything / "config.json").write_text(json.dumps({"width": 10, "dim": 24, "patch_size": 16}))
    images = torch.zeros(samples, V, 3, size, size, dtype=torch.uint8)
    assert (images.numel() > SMALL) == (size == 448)
    cameras = torch.eye(3).expand(samples, V, 3, 3), torch.eye(4).expand(samples, V, 4, 4)
    found = []
    for cache in (None, FeatureCache(tmp_path / "cache", 0.1)):
        encoder = MapAnythingGeometry(str(mapanything), image_size=size, calibration=True, cache=cache)
        found.append(count_forward(encoder, lambda change, own=encoder: own(change(images), *cameras).tokens))
    assert found[0] == found[1]
    assert found[0].step > 4 * images.numel(), "normalised images in float32"
    assert not (tmp_path / "cache").exists()
    assert not is_counting()


def test_mapanything_reads_calibration_in_its_own_terms(mapanything: Path) -> None:
    """Rays and poses are those that its package computes from intrinsics and camera poses, at its own image size."""
    encoder, batch = MapAnythingGeometry(str(mapanything), image_size=2 * S, calibration=True), small_batch()
    turned = batch.view_world_to_camera.clone()
    turned[:, 1, :3, :3] = quaternion_to_matrix(rotation_exp(torch.tensor([0.3, -0.2, 0.5])))
    turned[1, :, 2, 3] = 0.7
    encoder(batch.images, batch.view_intrinsics, turned)
    for number, view in enumerate(encoder._model[0].seen):
        rays, quaternion = view["ray_directions_cam"], view["camera_pose_quats"]
        assert rays.shape == (2, 2 * S, 2 * S, 3)
        torch.testing.assert_close(rays.norm(dim=-1), torch.ones(2, 2 * S, 2 * S))
        # At twice the size, the centre of the pixel in column 10, row 5 lies at (5.25, 2.75) of the image.
        expected = torch.tensor([(5.25 - 16) / 40, (2.75 - 16) / 40, 1.0])
        torch.testing.assert_close(rays[0, 5, 10] / rays[0, 5, 10, 2], expected)
        camera_to_world = torch.linalg.inv(turned[:, number])
        torch.testing.assert_close(view["camera_pose_trans"], camera_to_world[:, :3, 3])
        torch.testing.assert_close(quaternion_to_matrix(quaternion.roll(1, dims=-1)), camera_to_world[:, :3, :3])
        assert view["is_metric_scale"].tolist() == [True, True]
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    moved = batch.view_intrinsics, turned
    assert not torch.allclose(encoder(batch.images, *cameras).tokens, encoder(batch.images, *moved).tokens)
    alone = MapAnythingGeometry(str(mapanything), image_size=S)
    assert torch.equal(alone(batch.images, *cameras).tokens, alone(batch.images, *moved).tokens)
    assert (encoder.reads_cameras, alone.reads_cameras) == (True, False)


def test_mapanything_is_told_the_cameras_that_are_calibrated(mapanything: Path, tmp_path: Path) -> None:
    """The same as giving the optional inputs of all views and removing those of the uncalibrated views."""
    batch = small_batch()
    names = ("over", "front")
    every, some, again = (
        MapAnythingGeometry(str(mapanything), S, calibration=calibration, cameras=names)
        for calibration in (True, ["over"], list(names))
    )
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    whole = every(batch.images, *cameras).tokens
    found = some(batch.images, *cameras).tokens
    views = some._model[0].seen
    assert set(views[1]) == {"img", "data_norm_type"}
    for name, value in views[0].items():
        own = every._model[0].seen[0][name]
        assert torch.equal(value, own) if isinstance(value, torch.Tensor) else value == own
    model = every._model[0]
    forward = model.forward

    def masked(views: list[dict[str, Any]]) -> None:
        forward([views[0], {name: views[1][name] for name in ("img", "data_norm_type")}])

    model.forward = masked
    assert torch.equal(every(batch.images, *cameras).tokens, found)
    assert not torch.allclose(found, whole)
    assert torch.equal(again(batch.images, *cameras).tokens, whole)
    # the other view's matrices have no effect, neither on the features nor on their cache key
    unknown = tuple(part.clone() for part in cameras)
    unknown[0][:, 1], unknown[1][:, 1] = torch.eye(3), torch.eye(4)
    assert torch.equal(some(batch.images, *unknown).tokens, found)
    kind = type(model)
    cached, all_cached = (
        MapAnythingGeometry(
            str(mapanything), S, calibration=each, cameras=names, cache=FeatureCache(tmp_path / "cache", 0.1)
        )
        for each in (["over"], True)
    )
    for encoder, seen, expected, calls in (
        (cached, cameras, found, 1),
        (cached, unknown, found, 0),
        (all_cached, cameras, whole, 1),
    ):
        kind.calls = 0
        torch.testing.assert_close(encoder(batch.images, *seen).tokens, expected, atol=2e-3, rtol=2e-3)
        assert kind.calls == calls
    module = ready_module(tmp_path, geometry=some)
    assert module.reads_calibration == ("over",)
    assert not module.learns_depth
    assert (some.reads_cameras, again.reads_cameras, every.reads_cameras) == (("over",), names, True)
    pointed = ready_module(tmp_path, geometry=some, pointing_cells=2)
    assert pointed.reads_calibration is True  # its maps have targets in every view


def test_mapanything_is_told_what_is_calibrated_in_the_demonstrations(
    mapanything: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch, names = small_batch(), ("over", "front")
    cameras = batch.view_intrinsics, batch.view_world_to_camera

    def encoder(calibration: Any) -> MapAnythingGeometry:
        return MapAnythingGeometry(str(mapanything), S, calibration=calibration, cameras=names)

    undecided = encoder("auto")
    assert undecided.reads_cameras == ()
    with pytest.raises(ValueError, match=r"geometry\.calibration=auto is decided by demonstrations"):
        undecided(batch.images, *cameras)
    for calibrated, equal in ((names, True), (("over",), ["over"]), ((), False), (("front",), False)):
        found = encoder("auto")
        caplog.clear()
        with caplog.at_level("INFO"):
            found.take_calibrated(calibrated)
        expected = encoder(equal)
        assert found.reads_cameras == expected.reads_cameras
        assert torch.equal(found(batch.images, *cameras).tokens, expected(batch.images, *cameras).tokens)
        said = {names: "all cameras", ("over",): "over"}.get(calibrated, "no camera")
        assert f"receives the calibration of {said}" in caplog.text
        assert ("put one of them first in data.cameras" in caplog.text) == (calibrated == ("front",))
        found.take_calibrated(calibrated)
        with pytest.raises(ValueError, match="restore them, or start a new run"):
            found.take_calibrated(("over",) if equal != ["over"] else names)
    named = encoder(["over"])
    named.take_calibrated(names)
    assert named.reads_cameras == ("over",)
    with pytest.raises(ValueError, match=r"auto chooses among geometry\.cameras, which names none"):
        MapAnythingGeometry(str(mapanything), S, calibration="auto")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"names no camera: set it to false"),
        (["over", "wrist"], r"names 'wrist', which is none of the views over, front"),
        (["front"], r"lacks the first view, over, .*put a calibrated camera first in data\.cameras"),
    ],
)
def test_cameras_that_mapanything_cannot_be_told_are_refused(
    mapanything: Path, calibration: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MapAnythingGeometry(str(mapanything), S, calibration=calibration, cameras=("over", "front"))


def test_views_are_those_that_geometry_cameras_names(mapanything: Path) -> None:
    encoder, batch = MapAnythingGeometry(str(mapanything), S, calibration=["over"], cameras=("over",)), small_batch()
    with pytest.raises(ValueError, match=r"geometry\.cameras names 1 views, and the batch has 2"):
        encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera)


def test_mapanything_leaves_float32_products_as_they_were(mapanything: Path) -> None:
    before = torch.get_float32_matmul_precision()
    MapAnythingGeometry(str(mapanything), S)
    assert torch.get_float32_matmul_precision() == before == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_mapanything_draws_nothing_from_the_runs_generators(mapanything: Path) -> None:
    batch = small_batch()
    for calibration in (False, True):
        encoder = MapAnythingGeometry(str(mapanything), image_size=S, calibration=calibration)
        settings = dict(encoder._model[0].geometric_input_config)
        torch.manual_seed(7)
        untouched = torch.rand(3)
        torch.manual_seed(7)
        found = [encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens]
        assert torch.equal(torch.rand(3), untouched)
        for _ in range(8):  # the features do not depend on random numbers either
            found.append(encoder(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens)
            assert torch.equal(found[-1], found[0])
        assert encoder._model[0].geometric_input_config == settings


def test_mapanythings_scale_token_reaches_the_actions(mapanything: Path, tmp_path: Path) -> None:
    batch = small_batch()
    cameras = batch.view_intrinsics, batch.view_world_to_camera
    plain = MapAnythingGeometry(str(mapanything), image_size=S)(batch.images, *cameras)
    assert plain.scale is None
    for cache in (None, FeatureCache(tmp_path / "cache", 0.1)):
        encoder = MapAnythingGeometry(str(mapanything), image_size=S, scale_token=True, cache=cache)
        features = encoder(batch.images, *cameras)
        torch.testing.assert_close(features.tokens, plain.tokens, atol=2e-3, rtol=2e-3)
        assert features.scale is not None
        assert features.scale.shape == (2, encoder.dim)
    module = ready_module(tmp_path, geometry=MapAnythingGeometry(str(mapanything), image_size=S, scale_token=True))
    scene = module(batch)
    assert scene.groups[1] == 4 + 1
    before = module.sample(scene, batch)
    assert module.network.scale is not None
    with torch.no_grad():
        module.network.scale.weight.normal_()
    assert not torch.allclose(module.sample(module(batch), batch), before, atol=1e-5)


def test_the_scale_token_tells_a_blank_control_nothing_and_is_not_dropped(mapanything: Path, tmp_path: Path) -> None:
    def encoder() -> MapAnythingGeometry:
        return MapAnythingGeometry(str(mapanything), image_size=S, scale_token=True)

    batch = small_batch()
    other = replace(batch, images=255 - batch.images)
    for blank in (True, False):
        network = ready_module(tmp_path, geometry=encoder(), geom_blank=blank).eval().network
        tokens = [network.encode(*arguments(each)).contexts[0].tokens[:, -5:] for each in (batch, other)]
        assert torch.equal(*tokens) == blank
    pointed = {"pointing_cells": 2, "pointed_tokens": True}
    for ways in (
        {"geom_dit_tokens": 0, **pointed},
        {"geom_inject_to_dit": False, "geom_inject_to_vlm": True},
    ):
        with pytest.raises(ValueError, match=r"scale_token=true.* there are none .*set geometry.scale_token=false"):
            small_module(encoder(), **ways)  # type: ignore[arg-type]
    assert small_module(encoder(), geom_inject_to_dit=False).network.geometry is None


def arguments(batch: MultiViewPolicyBatch) -> tuple[Any, ...]:
    return batch.images, batch.instruction, batch.view_intrinsics, batch.view_world_to_camera


def test_cached_features_are_kept_by_their_cameras_too(mapanything: Path, tmp_path: Path) -> None:
    batch = small_batch()
    cached = MapAnythingGeometry(
        str(mapanything), image_size=S, calibration=True, cache=FeatureCache(tmp_path / "cache", 0.1)
    )
    plain = MapAnythingGeometry(str(mapanything), image_size=S, calibration=True)
    kind = type(cached._model[0])
    moved = batch.view_world_to_camera.clone()
    moved[1, 0, 0, 3] += 0.5
    for poses, calls in ((batch.view_world_to_camera, 1), (moved, 1), (moved, 0)):
        expected = plain(batch.images, batch.view_intrinsics, poses).tokens
        kind.calls = 0
        found = cached(batch.images, batch.view_intrinsics, poses).tokens
        assert kind.calls == calls
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("file", ["Makefile", "conf/geometry/options.yaml"])
def test_the_commit_that_is_installed_is_the_one_compared_with(file: str) -> None:
    text = (Path(__file__).parents[3] / file).read_text()
    assert f"mapanything @ git+https://github.com/facebookresearch/map-anything.git@{COMMIT}" in text


def test_without_the_package_or_its_weights_it_is_said_what_to_do(
    mapanything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MapAnythingGeometry("./nowhere", image_size=S)
    with pytest.raises(FileNotFoundError, match=r"download config\.json and model\.safetensors"):
        MapAnythingGeometry("facebook/map-anything-apache", image_size=S)
    (mapanything / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        MapAnythingGeometry(str(mapanything), image_size=S)
    monkeypatch.setitem(sys.modules, "mapanything", None)
    monkeypatch.setitem(sys.modules, "mapanything.models", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'mapanything @ git\+https://github.com\S+@[0-9a-f]{40}'"
    ):
        MapAnythingGeometry(str(mapanything), image_size=S)


def test_what_torch_hub_lacks_is_not_taken_for_missing_weights(
    mapanything: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The code and weights of the image encoder come from torch.hub when the model is built; an error there is
    reported."""
    encoder = MapAnythingGeometry(str(mapanything), image_size=S)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kind = type(encoder._model[0])

    def without_network(name: str) -> None:
        torch.hub.load(str(tmp_path / "facebookresearch_dinov2_main"), "dinov2_vitg14", source="local")

    monkeypatch.setattr(kind, "from_pretrained", without_network)
    with pytest.raises(FileNotFoundError, match=r"comes from torch\.hub, .*TORCH_HOME"):
        MapAnythingGeometry(str(mapanything), image_size=S)

    def broken(name: str) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(kind, "from_pretrained", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        MapAnythingGeometry(str(mapanything), image_size=S)
