"""Compression of geometry tokens: expected results, odd numbers of tokens, sizes at the published dimensions."""

from __future__ import annotations

import pytest
import torch

from keygrip.models.geometry_vla.compression import TYPES, build_geom_compressor, pooled


@pytest.mark.parametrize("count", [12, 4, 3, 1])
def test_pooling_is_the_mean_of_consecutive_tokens(count: int) -> None:
    tokens = torch.randn(2, 12, 5)
    expected = torch.stack([part.mean(dim=1) for part in tokens.chunk(count, dim=1)], dim=1)
    torch.testing.assert_close(pooled(tokens, count), expected)


def test_a_number_of_tokens_that_does_not_divide_leaves_none_out() -> None:
    tokens = torch.eye(10)[None]  # one-hot tokens
    share = pooled(tokens, 4)[0]  # [4, 10] weights of the means
    torch.testing.assert_close(share.sum(dim=1), torch.ones(4))
    assert (share.sum(dim=0) > 0).all()
    order = [row.nonzero().flatten() for row in share]
    assert all((run.diff() == 1).all() for run in order)
    assert [int(run[0]) for run in order] == sorted(int(run[0]) for run in order)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("tokens", [16, 18, 37])
def test_every_kind_gives_k_tokens_to_every_block(type: str, tokens: int) -> None:
    compressor = build_geom_compressor(type, geom_dim=6, width=8, blocks=3, tokens=16, heads=2)
    found = compressor(torch.randn(2, tokens, 6))
    assert [tuple(part.shape) for part in found] == [(2, 16, 8)] * 3


@pytest.mark.parametrize("type", TYPES)
def test_too_few_tokens_are_refused(type: str) -> None:
    compressor = build_geom_compressor(type, geom_dim=6, width=8, blocks=3, tokens=16, heads=2)
    with pytest.raises(ValueError, match=r"15 geometry tokens cannot be compressed to 16: set model\.network\.geom"):
        compressor(torch.randn(2, 15, 6))


def test_unknown_kind_and_wrong_width_are_named() -> None:
    with pytest.raises(ValueError, match="pool, per_layer, qformer"):
        build_geom_compressor("mean", 6, 8, 3)
    with pytest.raises(ValueError, match=r"\[B, G, 6\]"):
        build_geom_compressor("pool", 6, 8, 3, 4)(torch.randn(2, 16, 7))


def test_pool_is_linear_then_mean() -> None:
    compressor = build_geom_compressor("pool", 6, 8, 3, tokens=4)
    geometry = torch.randn(2, 12, 6)
    expected = pooled(compressor.projection(geometry), 4)  # type: ignore[operator]
    found = compressor(geometry)
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[0], found[2])


def test_layers_differ_and_the_qformer_depends_on_the_input() -> None:
    torch.manual_seed(0)
    geometry = torch.randn(2, 12, 6)
    per_layer = build_geom_compressor("per_layer", 6, 8, 3, tokens=4)(geometry)
    assert (per_layer[0] - per_layer[1]).abs().max() > 0.01
    qformer = build_geom_compressor("qformer", 6, 8, 3, tokens=4, heads=2)
    found = qformer(geometry)
    assert torch.equal(found[0], found[2])
    assert (found[0][:, 0] - found[0][:, 1]).abs().max() > 0.01  # queries do not all attend to the same tokens
    # attention, not pooling: the order of the tokens does not matter, only their content
    torch.testing.assert_close(qformer(geometry.flip(1))[0], found[0])
    assert (qformer(geometry * 2)[0] - found[0]).abs().max() > 0.01


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused_by_their_setting(heads: int) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.network\.geom_qformer_heads={heads} must divide the head's width, 8"
    ):
        build_geom_compressor("qformer", 6, 8, 3, heads=heads)


@pytest.mark.parametrize(("type", "millions"), [("pool", 2.1), ("per_layer", 33.6), ("qformer", 19.0)])
def test_parameters_at_the_published_sizes(type: str, millions: float) -> None:
    with torch.device("meta"):
        compressor = build_geom_compressor(type, geom_dim=1024, width=2048, blocks=16, tokens=16, heads=8)
    count = sum(parameter.numel() for parameter in compressor.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.1)
