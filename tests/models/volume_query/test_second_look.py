"""The fine pass: windows against plain slices, the same network without it, training and inference that agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from policy_batches import observation_of

from keygrip.data.batches import normalised
from keygrip.data.robot.augmentation import Augmentation, ImageGeometry
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.models.volume_query.second_look import SharpImage, place_code, windows
from keygrip.models.volume_query.volume import best_places
from keygrip.models.volume_query.world import WorldScores
from tests.models.volume_query.test_module import S, T, batch, build, several, statistics
from tests.models.volume_query.test_network import build as build_network

Q, L = 128, 32
LOOK = {"second_look": Q, "look_size": L}


def decoded_as_validation_does(module: VolumeQueryModule, output: Any, data: Any) -> Any:
    """Decode the poses of a batch from the network's output, without a policy."""
    return module.decoder.decode(
        output, [module.codec("right")], intrinsics=data.intrinsics, world_to_camera=data.world_to_camera,
        height_range=module.statistics.height_range, image_size=S,
    )  # fmt: skip


def test_windows_are_slices_and_black_beyond_the_edge() -> None:
    image = torch.randint(1, 256, (2, 3, 20, 20), dtype=torch.uint8)
    centres = torch.tensor([[[8.2, 11.9], [1.0, 19.6]], [[9.6, 4.4], [float("nan"), 3.0]]])
    seen = windows(image, centres, 6)
    assert torch.equal(seen[0, 0], image[0, :, 9:15, 5:11])  # rows around 12, columns around 8
    assert torch.equal(seen[1, 0], image[1, :, 1:7, 7:13])
    assert torch.equal(seen[0, 1, :, :3, 2:], image[0, :, 17:20, 0:4])
    assert not seen[0, 1, :, 3:].any()
    assert not seen[0, 1, :, :, :2].any()
    assert not seen[1, 1].any()
    assert not windows(image, torch.full((2, 1, 2), 1e9), 6).any()


def test_the_look_is_what_a_plain_reference_computes() -> None:
    torch.manual_seed(0)
    network = build_network(**LOOK, arms=["left", "right"])
    look = network.second_look
    assert look is not None
    for head in look.heads.values():
        torch.nn.init.normal_(head[-1].weight)  # type: ignore[index]
    image = SharpImage(torch.randint(0, 256, (2, 3, Q, Q), dtype=torch.uint8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels, trunk = torch.rand(2, 3, 2) * 40 + 12, torch.randn(2, 3, 96)
    gripper, rotation = look("right", network.backbone, image, pixels, trunk)
    for b in range(2):
        for t in range(3):
            x, y = (int(v) for v in (pixels[b, t] * 2).round())
            window = image.pixels[b : b + 1, :, y - L // 2 : y + L // 2, x - L // 2 : x + L // 2]
            patches = network.backbone(normalised(window, image.mean, image.std)).patches
            seen = look.read(look.reduce(patches).flatten(1)) + look.place(place_code(pixels[b, t] / 32 - 1))
            logits = look.heads["right"](torch.cat([trunk[b, t], seen[0]])[None])[0]
            torch.testing.assert_close(torch.cat([gripper[b, t], rotation[b, t]]), logits, atol=1e-5, rtol=1e-4)


def test_at_first_it_changes_nothing_and_adds_only_its_own_weights(tmp_path: Path) -> None:
    plain, looking = build(tmp=tmp_path), build(tmp=tmp_path, network=LOOK)
    weights = looking.network.state_dict()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, weights.pop(name)), name
    assert all(name.startswith("second_look.") for name in weights)
    data = batch()
    data.detail = torch.randint(0, 256, (2, 3, Q, Q), dtype=torch.uint8)
    for teacher in (True, False):
        one = plain(data, plain.targets(data), teacher=teacher)
        other = looking(data, looking.targets(data), teacher=teacher)
        assert torch.equal(one.rotation, other.rotation)
        assert torch.equal(one.gripper, other.gripper)
        assert torch.equal(one.volume.pixel, other.volume.pixel)


@pytest.mark.slow
def test_it_learns_a_turn_that_only_the_sharp_image_shows(tmp_path: Path) -> None:
    module = build(tmp=tmp_path, network=LOOK)
    data = batch(size=6)
    data.image.zero_()
    data.quaternion = data.quaternion[:, :, :1].expand(-1, -1, T, -1).contiguous()  # one rotation per sample
    code = module.codec("right").encode(data.quaternion)[:, 0, 0]
    data.detail = torch.full((6, 3, Q, Q), 128, dtype=torch.uint8)
    stripes = torch.arange(Q)
    for sample, turn in enumerate(code.tolist()):
        data.detail[sample, :, :, stripes % 16 < 2 * (turn + 1)] = 255
    optimizer = torch.optim.Adam(module.network.second_look.parameters(), lr=1e-2)  # type: ignore[union-attr]
    for _ in range(40):
        targets = module.targets(data)
        loss = module.losses(module(data, targets, teacher=True), data, targets)["rotation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3  # 1.8 at chance level


def test_own_backbone_begins_as_the_shared_one_and_reads_the_windows(tmp_path: Path) -> None:
    shared, own = build(tmp=tmp_path, network=LOOK), build(tmp=tmp_path, network=LOOK | {"look_backbone": "own"})
    for name, value in shared.network.state_dict().items():
        assert torch.equal(value, own.network.state_dict()[name]), name
    for module in (shared, own):
        torch.nn.init.normal_(module.network.second_look.heads["right"][-1].weight)  # type: ignore[union-attr,index]
    with torch.no_grad():
        for weight in shared.network.parameters():
            weight.add_(0.01)
    with pytest.raises(RuntimeError, match=r"second_look\.backbone"):
        own.network.load_state_dict(shared.network.state_dict())  # a checkpoint that lacks weights is still an error
    own.network.load_state_dict(own.started_from(shared.network.state_dict()))  # as in a run with model.init_from
    data = batch()
    data.detail = torch.randint(0, 256, (2, 3, Q, Q), dtype=torch.uint8)

    def rotation(module: VolumeQueryModule) -> torch.Tensor:
        return module(data, module.targets(data), teacher=True).rotation

    assert torch.equal(rotation(shared), rotation(own))
    rotation(own).sum().backward()
    look = own.network.second_look
    assert look is not None
    assert look.backbone is not None
    assert all(weight.grad is not None for weight in look.reduce.parameters())
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in look.backbone.parameters())
    again = build(tmp=tmp_path, network=LOOK | {"look_backbone": "own"})
    with torch.no_grad():
        next(look.backbone.parameters()).add_(1.0)
    again.network.load_state_dict(own.network.state_dict())  # its own weights, not the shared ones
    assert torch.equal(rotation(own), rotation(again))
    with pytest.raises(ValueError, match="look_backbone"):
        build(network=LOOK | {"look_backbone": "borrowed"})


def test_policy_looks_as_validation_does(tmp_path: Path) -> None:
    module = build(tmp=tmp_path, network=LOOK).eval()
    torch.nn.init.normal_(module.network.second_look.heads["right"][-1].weight)  # type: ignore[union-attr,index]
    data = batch(size=1)
    picture = np.random.default_rng(0).integers(0, 256, (Q, Q, 3), dtype=np.uint8)
    intrinsics = np.diag([2.0, 2.0, 1.0]) @ data.intrinsics[0].numpy()
    geometry = module.statistics.geometry
    image, k = geometry.apply(picture, intrinsics)
    torch.testing.assert_close(k, data.intrinsics[0])
    data.image, data.detail = image[None], geometry.detail(picture, Q)[None]
    assert torch.equal(data.detail[0], torch.from_numpy(picture).permute(2, 0, 1))
    plan = module.policy().plan({**observation_of(data, picture), "intrinsics": intrinsics})
    with torch.no_grad():
        output = module(data, module.targets(data), teacher=False)
        decoded = decoded_as_validation_does(module, output, data)
    np.testing.assert_allclose(plan.quaternion, decoded.quaternion[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(plan.gripper, decoded.gripper[0].numpy(), atol=1e-5)


def test_with_several_cameras_it_looks_into_the_first(tmp_path: Path) -> None:
    known = statistics(("right",), tmp_path, cameras=("over", "front"))
    plain, module = build(network={"world_views": True}), build(network=LOOK | {"world_views": True})
    plain.set_statistics(known)
    module.set_statistics(known)
    data = several(batch(size=1), 2)
    pictures = np.random.default_rng(0).integers(0, 256, (2, Q, Q, 3), dtype=np.uint8)
    geometry = module.statistics.geometry
    views = []
    for number, picture in enumerate(pictures):
        intrinsics = np.diag([2.0, 2.0, 1.0]) @ data.view_intrinsics[0, number].numpy()
        pose = data.view_world_to_camera[0, number].numpy()
        data.images[0, number] = torch.tensor(geometry.view(picture, intrinsics, pose).image).permute(2, 0, 1)
        views.append({"image": picture, "intrinsics": intrinsics, "world_to_camera": pose})
    with pytest.raises(ValueError, match=r"data\.detail_size=128"):
        module(data, module.targets(data), teacher=True)
    data.detail = geometry.detail(pictures[0], Q)[None]
    for teacher in (True, False):  # at first it changes nothing
        one, other = (each(data, each.targets(data), teacher=teacher) for each in (plain, module))
        assert torch.equal(one.rotation, other.rotation)
        assert torch.equal(one.gripper, other.gripper)
        assert isinstance(other.volume.voxel, WorldScores)
        assert torch.equal(one.volume.voxel.maps, other.volume.voxel.maps)

    head = module.network.second_look.heads["right"][-1]  # type: ignore[union-attr,index]
    torch.nn.init.normal_(head.weight)  # type: ignore[arg-type]
    targets = module.targets(data)
    looked = module(data, targets, teacher=True)
    assert float((looked.rotation - one.rotation).detach().abs().max()) > 0.1
    module.losses(looked, data, targets)["total"].backward()
    assert bool(head.weight.grad.any())  # type: ignore[union-attr]
    module.eval()
    observation = {
        "cameras": {"over": views[0], "front": views[1]},
        "position": data.start_position[0, 0].numpy(),
        "quaternion": data.start_quaternion[0, 0].numpy(),
        "gripper": data.start_gripper[0].numpy(),
    }
    plan = module.policy().plan(observation)
    with torch.no_grad():
        output = module(data, targets, teacher=False)
        decoded = decoded_as_validation_does(module, output, data)
        np.testing.assert_allclose(plan.quaternion, decoded.quaternion[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(plan.gripper, decoded.gripper[0].numpy(), atol=1e-5)
        # the windows are centred on the decoded volume of both cameras, not on that of the first alone
        volumes = output.volume, replace(output.volume, voxel=None)
        pixels, alone = (best_places(volume).grid * (S / module.network.pred_size) for volume in volumes)
        assert float((pixels - alone).abs().max()) > 0.5
        again = module.network(
            data.image, targets.start_pixels, step_pixels=pixels, views=module.further_views(data),
            sharp=module.sharp_image(data),
        )  # fmt: skip
        torch.testing.assert_close(again.rotation, output.rotation, atol=1e-4, rtol=1e-4)
        # with a covered first camera, nothing is corrected
        data.images[:, 0] = 0
        data.detail.zero_()
        covered, without = (each(data, targets, teacher=True) for each in (module, plain))
        assert torch.equal(covered.rotation, without.rotation)
        assert torch.equal(covered.gripper, without.gripper)


def test_the_sharp_image_is_the_same_view_in_the_same_colours() -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC))
    geometry, augmentation = ImageGeometry(48, (0.0,) * 3, (1.0,) * 3, 0.8), Augmentation(rotate_degrees=5.0)
    camera = np.eye(3), np.eye(4)
    image, *_, detail = augmentation.apply(np.random.default_rng(1), geometry, picture, *camera, detail_size=96)
    plain = augmentation.apply(np.random.default_rng(1), geometry, picture, *camera)
    assert torch.equal(image, plain[0])
    assert detail is not None
    assert detail.dtype == torch.uint8
    small = torch.nn.functional.avg_pool2d(detail[None].float() / 255, 2)[0]
    assert float((small - image).abs().mean()) < 0.01
    assert float((small.flip(-1) - image).abs().mean()) > 0.05


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"second_look": Q, "look_size": 20}, "look_size=20"),
        ({"second_look": 16, "look_size": 32}, "second_look=16"),
    ):
        with pytest.raises(ValueError, match=words):
            build_network(**options)
    module = build(tmp=tmp_path, network=LOOK)
    data = batch()
    with pytest.raises(ValueError, match=r"data\.detail_size=128"):
        module(data, module.targets(data), teacher=True)
    data.detail = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"data\.detail_size=128"):
        module(data, module.targets(data), teacher=True)
    with pytest.raises(ValueError, match="no exported graph"):
        module.export_graph()
