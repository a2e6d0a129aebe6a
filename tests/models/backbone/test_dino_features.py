"""Features of every variant: shapes, exactness of the deep query, modes, gradient checkpointing, sizes."""

from __future__ import annotations

import copy

import pytest
import torch

from keygrip.models.backbone import VARIANTS, DinoBackbone

ALL = list(VARIANTS)
FAMILIES = ["tiny", "dinov3_vits16", "dinov3_vits16plus", "dinov2_vits14", "dinov2_vits14_reg"]


@pytest.mark.parametrize("variant", ALL)
def test_features_have_the_stated_shapes_on_any_grid(small, images, variant):
    backbone = small(variant)
    patch = backbone.patch_size
    features = backbone(images(4 * patch, 7 * patch))
    prefix = 1 + VARIANTS[variant].registers
    assert backbone.num_prefix_tokens == prefix
    assert features.grid == (4, 7)
    assert features.cls.shape == (2, 64)
    assert features.prefix.shape == (2, prefix, 64)
    assert features.registers.shape == (2, prefix - 1, 64)
    assert features.patches.shape == (2, 28, 64)
    assert torch.equal(features.prefix[:, 0], features.cls)
    picture = features.grid_map()
    assert picture.shape == (2, 64, 4, 7)
    assert torch.equal(picture[:, :, 2, 3], features.patches[:, 2 * 7 + 3])


@pytest.mark.parametrize("variant", FAMILIES)
def test_patches_lie_where_the_image_changed(small, images, variant):
    """Row-major order: a change in one patch changes that patch's token most."""
    patch = VARIANTS[variant].patch_size
    torch.manual_seed(0)
    backbone = DinoBackbone(variant, 6 * patch, "random", depth=1, width=64, heads=4).eval()
    picture = images(6 * patch, 8 * patch)
    changed = picture.clone()
    changed[:, :, 2 * patch : 3 * patch, 5 * patch : 6 * patch] *= -1.0
    moved = (backbone(changed).grid_map() - backbone(picture).grid_map()).norm(dim=1)
    assert (moved.flatten(1).argmax(1) == 2 * 8 + 5).all()


@pytest.mark.parametrize("variant", ALL)
def test_query_from_the_cls_input_is_the_cls_output(small, images, variant):
    backbone = small(variant).double()
    picture = images(6 * backbone.patch_size, 5 * backbone.patch_size).double()
    features = backbone(picture)
    again, kv = backbone.forward_with_kv(picture)
    for name in ("cls", "prefix", "patches"):
        torch.testing.assert_close(getattr(again, name), getattr(features, name), rtol=0, atol=1e-12)
    cls = backbone.query(backbone.cls_input().expand(2, -1, -1), kv)
    torch.testing.assert_close(cls[:, 0], features.cls, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", FAMILIES)
def test_query_is_exact_in_float32(variant):
    """Models with their default random weights, without the strong test weights."""
    torch.manual_seed(0)
    backbone = DinoBackbone(variant, 8 * VARIANTS[variant].patch_size, "random", depth=4, width=128, heads=2).eval()
    picture = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    backbone.requires_grad_(False)
    features, kv = backbone.forward_with_kv(picture)
    cls = backbone.query(backbone.cls_input().expand(2, -1, -1), kv)[:, 0]
    # 1e-6 for features of size 1: float32 rounding of a dozen sums in a different order.
    assert (cls - features.cls).norm(dim=-1).max() < 1e-6 * features.cls.norm(dim=-1).max()


@pytest.mark.parametrize("variant", FAMILIES)
def test_queries_do_not_see_each_other_and_carry_gradients(small, images, variant):
    backbone = small(variant, trainable="frozen")
    _, kv = backbone.forward_with_kv(images(backbone.image_size, backbone.image_size))
    tokens = torch.randn(2, 3, 64, requires_grad=True)
    together = backbone.query(tokens, kv)
    alone = torch.cat([backbone.query(tokens[:, i : i + 1], kv) for i in range(3)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    together[:, 1].sum().backward()
    assert tokens.grad[:, 1].abs().min() > 0
    assert tokens.grad[:, [0, 2]].abs().max() == 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_query_with_attention_gives_the_same_and_rows_that_sum_to_one(small, images):
    backbone = small("dinov3_vits16")
    _, kv = backbone.forward_with_kv(images(96, 96))
    tokens = torch.randn(2, 3, 64)
    plain = backbone.query(tokens, kv)
    result, attention = backbone.query_with_attention(tokens, kv)
    torch.testing.assert_close(result, plain, rtol=0, atol=2e-5)
    assert [part.shape for part in attention] == [(2, 4, 3, 5 + 36)] * 3
    torch.testing.assert_close(attention[0].sum(-1), torch.ones(2, 4, 3))
    last = backbone.query(tokens, kv[-1:], first_block=2)
    assert last.shape == (2, 3, 64)
    assert (last - plain).abs().max() > 1e-2


def test_query_refuses_what_does_not_fit(small, images):
    backbone = small("tiny")
    _, kv = backbone.forward_with_kv(images(96, 96))
    with pytest.raises(ValueError, match="needs 3 blocks of keys, got 2"):
        backbone.query(torch.zeros(2, 1, 64), kv[1:])
    with pytest.raises(ValueError, match=r"must be \[2, Q, 64\]"):
        backbone.query(torch.zeros(3, 1, 64), kv)


@pytest.mark.parametrize("variant", FAMILIES)
def test_frozen_stays_in_eval_mode_and_out_of_the_graph(small, images, variant):
    backbone = small(variant, trainable="frozen", drop_path=0.5).train()
    assert not any(module.training for module in backbone.net.modules())
    picture = images(backbone.image_size, backbone.image_size)
    assert torch.equal(backbone(picture).patches, backbone(picture).patches)
    backbone.requires_grad_(True)  # as a wrapper might do
    assert not backbone(picture).patches.requires_grad
    parent = torch.nn.Sequential(backbone)
    parent.train()
    assert not any(module.training for module in backbone.net.modules())


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_last_blocks_are_trained_and_nothing_else(small, images, variant):
    backbone = small(variant, trainable=2).train()
    backbone(images(backbone.image_size, backbone.image_size)).patches.square().mean().backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    expected = {
        name
        for name, _ in backbone.named_parameters()
        if name.startswith(("net.blocks.1.", "net.blocks.2.", "net.norm."))
    }
    assert with_gradient == expected
    assert all(parameter.requires_grad == (name in expected) for name, parameter in backbone.named_parameters())
    assert not backbone.net.blocks[0].training
    assert backbone.net.blocks[1].training


@pytest.mark.parametrize("variant", FAMILIES)
def test_all_trains_every_parameter(small, images, variant):
    backbone = small(variant, trainable="all").train()
    features = backbone(images(backbone.image_size, backbone.image_size))
    (features.prefix.square().mean() + features.patches.square().mean()).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("trainable", ["all", 2])
@pytest.mark.parametrize("variant", FAMILIES)
def test_recomputation_changes_no_gradient(small, images, variant, trainable):
    plain = small(variant, trainable=trainable).train()
    recomputing = copy.deepcopy(plain)
    recomputing.gradient_checkpointing = True
    picture = images(plain.image_size, plain.image_size)
    for backbone in (plain, recomputing):
        features, kv = backbone.forward_with_kv(picture)
        query = backbone.query(backbone.cls_input().expand(2, -1, -1), kv)
        loss = backbone(picture).patches.square().mean() + features.cls.square().mean() + query.abs().mean()
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_recomputation_keeps_fewer_activations(small, images):
    def kept_bytes(recompute: bool) -> int:
        backbone = small("dinov3_vits16", depth=6, gradient_checkpointing=recompute).train()
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(images(192, 192))
        return sum(seen.values())

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


def test_sizes_that_do_not_divide_are_refused_with_the_nearest(small, images):
    with pytest.raises(ValueError, match=r"504 does not divide by the patch size 16 .* 496 or 512"):
        small("dinov3_vits16", image_size=504)
    assert small("dinov2_vits14", image_size=504).image_size == 504
    backbone = small("tiny")
    with pytest.raises(ValueError, match=r"image 96 x 100: 100 does not divide .* 96 or 112"):
        backbone(images(96, 100))
    with pytest.raises(ValueError, match=r"takes images \[B, 3, H, W\]"):
        backbone(torch.zeros(3, 96, 96))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dinov3_vits16pls"}, r"did you mean 'dinov3_vits16plus'\?"),
        ({"variant": "dinov2_vits14", "stem": "conv"}, "stem=conv is for variant tiny"),
        ({"trainable": 4}, "has 3 blocks; give 1 to 3"),
        ({"trainable": 0}, "give 1 to 3, all or frozen"),
        ({"trainable": "some"}, "choose frozen, all, or a number"),
        ({"trainable": True}, "choose frozen, all, or a number"),
        ({"stem": "linear"}, "choose patch or conv"),
        ({"width": 66}, "multiple of 4"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    settings = {"variant": "tiny", "image_size": 112, "weights": "random", "width": 64, "depth": 3, "heads": 4}
    with pytest.raises(ValueError, match=message) as caught:
        DinoBackbone(**{**settings, **options})
    assert "\n" not in str(caught.value)


def test_tiny_has_a_convolutional_stem_without_batch_statistics():
    backbone = DinoBackbone("tiny", 192, "random")
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert "GroupNorm" in kinds
    assert not any("BatchNorm" in kind for kind in kinds)
    assert 0.9e6 < sum(parameter.numel() for parameter in backbone.parameters()) < 3e6
    patch = DinoBackbone("tiny", 192, "random", stem="patch")
    assert patch.net.patch_embed.proj.weight.shape == (128, 3, 16, 16)
    # The features of an image do not depend on the other images of the batch.
    pictures = torch.randn(3, 3, 192, 192)
    torch.testing.assert_close(backbone(pictures).patches[1:2], backbone(pictures[1:2]).patches, rtol=0, atol=1e-5)


def test_tokens_of_the_convolutional_stem_sit_on_their_patches():
    """The centre of a token's receptive field is the centre of its patch, to half a pixel, as for a linear
    embedding."""
    torch.manual_seed(0)
    stem = DinoBackbone("tiny", 192, "random").net.patch_embed.proj
    pictures = torch.randn(16, 3, 192, 192, requires_grad=True)
    weights = torch.randn(16, 128)
    (stem(pictures)[:, :, 5, 7] * weights).sum().backward()
    near = pictures.grad.square().sum(dim=(0, 1))[40:136, 72:168]  # GroupNorm spreads a little over the whole image
    pixels = torch.arange(96) + 0.5
    row = float((near.sum(1) * pixels).sum() / near.sum()) + 40
    column = float((near.sum(0) * pixels).sum() / near.sum()) + 72
    assert abs(row - (5 * 16 + 8)) < 1.0
    assert abs(column - (7 * 16 + 8)) < 1.0


def test_layers_for_optimizers(small):
    backbone = small("dinov3_vits16")
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert layers["net.cls_token"] == layers["net.patch_embed.proj.weight"] == -1
    assert layers["net.blocks.2.mlp.fc1.weight"] == 2
    assert layers["net.norm.weight"] == 3
    assert set(layers.values()) == {-1, 0, 1, 2, 3}
    with pytest.raises(ValueError, match="not a parameter of the backbone"):
        backbone.layer_of("head.weight")


@pytest.mark.parametrize("variant", FAMILIES)
def test_mixed_precision_keeps_a_float32_residual_stream(small, images, variant):
    """Only matrix products run in bfloat16; otherwise the sums over blocks would lose small updates."""
    backbone = small(variant)
    picture = images(backbone.image_size, backbone.image_size)
    exact = backbone(picture)
    streams = []
    for block in backbone.net.blocks:
        block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(picture)
        _, kv = backbone.forward_with_kv(picture)
        cls = backbone.query(backbone.cls_input().expand(2, -1, -1), kv)[:, 0]
    assert streams[:3] == [torch.float32] * 3
    for one, other in ((mixed.patches, exact.patches), (cls.float(), exact.cls)):
        assert (one - other).norm() < 0.05 * other.norm()
