"""The volume-query network: shapes, what each input changes, and the invariants of its design."""

from __future__ import annotations

import pytest
import torch

from keygrip.models.backbone import DinoBackbone
from keygrip.models.nn.adaln import AdaLNZeroMLP
from keygrip.models.nn.sinusoids import sinusoidal_features
from keygrip.models.volume_query.network import VolumeQueryNetwork, sample_features
from keygrip.models.volume_query.volume import best_places, hard_target, volume_cross_entropy


def tiny_backbone() -> DinoBackbone:
    torch.manual_seed(0)
    return DinoBackbone(variant="tiny", image_size=64, weights="random", width=32, depth=1, heads=2)


def build(**options: object) -> VolumeQueryNetwork:
    backbone = tiny_backbone()
    settings: dict[str, object] = {"image_size": 64, "rotation_classes": 6, "horizon": 3, "pred_size": 12}
    return VolumeQueryNetwork(backbone, **{**settings, **options}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arms": ["left", "right"]},
        {
            "state": ["height", "gripper", "rotation"],
            "logit_scale": "learned",
            "height_head": "sinusoidal_and_linear",
            "step_features": True,
            "trunk_width": 64,
        },
        {"coupling": "bilinear", "coupling_rank": 2, "arms": ["left", "right"]},
    ],
)
def test_shapes(options: dict[str, object]) -> None:
    network = build(**options)
    arms = len(network.arms)
    state = torch.randn(2, arms, 8) if network.state_parts else None
    output = network(torch.randn(2, 3, 64, 64), torch.rand(2, arms, 2) * 64, state)
    assert output.volume.pixel.shape == (2, arms, 3, 12, 12)
    assert output.volume.height.shape == (2, arms, 3, 32)
    assert output.volume.dense().shape == (2, arms, 3, 32, 12, 12)
    assert output.gripper.shape == (2, arms, 3, 32)
    assert output.rotation.shape == (2, arms, 3, 6)


def test_pixel_logits_are_inner_products_of_query_and_features() -> None:
    network = build()
    image, start = torch.randn(1, 3, 64, 64), torch.tensor([[[20.0, 30.0]]])
    with torch.no_grad():
        output = network(image, start)
        features = network.backbone(image)
        feature_map = network.refiner(features.grid_map())
        stream = network.streams["right"]
        trunk = stream(*stream.start(sample_features(feature_map, start, 64)[:, 0], features.cls, None, network.sin_t))
        q_feat, q_z, q_t = trunk.split([48, 24, 24], dim=-1)
        for t, z, y, x in [(0, 0, 0, 0), (2, 31, 11, 3), (1, 17, 5, 9)]:
            logit = q_feat[0, t] @ feature_map[0, :, y, x] + q_z[0, t] @ network.sin_z[z] + q_t[0, t] @ network.sin_t[t]
            torch.testing.assert_close(output.volume.dense()[0, 0, t, z, y, x], logit)


def test_q_t_gets_no_gradient_from_the_volume_loss() -> None:
    network = build()
    output = network(torch.randn(2, 3, 64, 64), torch.rand(2, 1, 2) * 64)
    target = hard_target(torch.zeros(2, 1, 3, 2, dtype=torch.long), torch.zeros(2, 1, 3, dtype=torch.long))
    volume_cross_entropy(output.volume, target).sum().backward()
    # With a trunk as wide as the query, its last 24 outputs are q_t, computed by the last block's MLP.
    gradient = network.streams["right"].blocks[-1].modulation.linear.weight.grad.view(3, 96, -1)[2]  # the gate's rows
    assert gradient[:72].abs().max() > 0
    assert gradient[72:].abs().max() == 0


def test_trunk_blocks_are_the_identity_at_initialisation() -> None:
    block = AdaLNZeroMLP(16, 8)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(block(x, torch.randn(1, 5, 8)), x, rtol=0, atol=0)


def test_start_pixel_and_state_change_the_output() -> None:
    network = build(state=["height", "gripper", "rotation"])
    image, state = torch.randn(1, 3, 64, 64), torch.randn(1, 1, 8)
    here = network(image, torch.tensor([[[10.0, 10.0]]]), state).volume.pixel
    there = network(image, torch.tensor([[[50.0, 40.0]]]), state).volume.pixel
    other = network(image, torch.tensor([[[10.0, 10.0]]]), state + 1).volume.pixel
    assert (here - there).abs().max() > 1e-4
    assert (here - other).abs().max() > 1e-4


def test_step_features_look_at_the_decoded_pixel_unless_told() -> None:
    network = build(step_features=True)
    image, start = torch.randn(1, 3, 64, 64), torch.tensor([[[20.0, 20.0]]])
    own = network(image, start)
    told = network(image, start, step_pixels=best_places(own.volume).grid * (64 / 12))
    elsewhere = network(image, start, step_pixels=torch.full((1, 1, 3, 2), 5.0))
    torch.testing.assert_close(told.gripper, own.gripper)
    assert (elsewhere.gripper - own.gripper).abs().max() > 1e-5
    torch.testing.assert_close(elsewhere.volume.pixel, own.volume.pixel)


def test_bilinear_sampling_follows_the_corner_convention() -> None:
    # If a feature equals its cell centre's x coordinate, sampling must return the x of the pixel.
    centres = (torch.arange(8) + 0.5) * 4
    feature_map = torch.stack([centres[None].expand(8, 8), centres[:, None].expand(8, 8)])[None]
    pixels = torch.tensor([[[7.3, 20.1], [16.0, 3.0]]])
    torch.testing.assert_close(sample_features(feature_map, pixels, 32), pixels)


def test_features_of_a_bf16_map_are_read_at_the_very_place() -> None:
    torch.manual_seed(0)
    feature_map, pixels = torch.randn(2, 4, 56, 56).bfloat16(), torch.rand(2, 7, 2) * 448
    assert torch.equal(sample_features(feature_map, pixels, 448), sample_features(feature_map.float(), pixels, 448))


def test_wrong_image_size_and_missing_state_are_named() -> None:
    with pytest.raises(ValueError, match="built for 64 x 64 images, got 80 x 80"):
        build()(torch.randn(1, 3, 80, 80), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="state"):
        build(state=["height", "gripper", "rotation"])(torch.randn(1, 3, 64, 64), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="additive or bilinear"):
        build(coupling="linear")


def test_sinusoidal_rows_differ_and_refuse_odd_widths() -> None:
    table = sinusoidal_features(32, 24)
    distance = torch.cdist(table, table) + torch.eye(32) * 10
    assert table.shape == (32, 24)
    assert distance.min() > 0.5
    with pytest.raises(ValueError, match="even width"):
        sinusoidal_features(4, 3)


def test_coupled_arms_see_each_other_and_start_as_single_ones() -> None:
    two: dict[str, object] = {"arms": ["left", "right"], "state": ["height", "gripper"]}
    single, coupled = build(**two), build(**two, couple_arms=True)
    for name, value in single.state_dict().items():
        assert torch.equal(value, coupled.state_dict()[name]), name
    image, start, state = torch.randn(2, 3, 64, 64), torch.rand(2, 2, 2) * 64, torch.randn(2, 2, 2)
    with torch.no_grad():
        before = single(image, start, state).rotation
        assert torch.equal(before, coupled(image, start, state).rotation)
        for network in (single, coupled):  # blocks and couplings are zero at initialisation
            torch.manual_seed(3)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        moved = state.clone()
        moved[:, 0] += 1.0  # only the left arm
        for network, sees in ((single, False), (coupled, True)):
            right = [network(image, start, each).rotation[:, 1] for each in (state, moved)]
            assert torch.equal(*right) != sees
    with pytest.raises(ValueError, match="needs two arms"):
        build(couple_arms=True)
