"""Attention: against a dense reference, cached against uncached, masks, fused kernels, attention shares."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from keygrip.models.nn.attention import Attention, KeyValues


def dense(layer: Attention, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the same with explicit matrices, one head at a time."""
    queries, (keys, values) = layer.query(x), layer.key_value(context).chunk(2, dim=-1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * layer.d_head, (head + 1) * layer.d_head)
        q, k, v = queries[..., part], keys[..., part], values[..., part]
        if layer.query_norm is not None and layer.key_norm is not None:
            q = (q - q.mean(-1, True)) / (q.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * layer.query_norm.weight
            k = (k - k.mean(-1, True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * layer.key_norm.weight
        logits = q @ k.mT / layer.d_head**0.5
        if mask is not None:
            logits = logits + torch.where(mask, 0.0, float("-inf"))
        heads.append(logits.softmax(-1) @ v)
    return layer.output(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("form", ["none", "context", "context_3d", "queries"])
def test_equals_dense(qk_norm: bool, form: str) -> None:
    torch.manual_seed(0)
    layer = Attention(16, heads=4, d_context=12, qk_norm=qk_norm)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
    allowed = torch.rand(3, 7) > 0.4
    allowed[:, 0] = True
    queries = torch.rand(3, 5, 7) > 0.4
    queries[..., 0] = True
    mask = {"none": None, "context": allowed, "context_3d": allowed[:, None], "queries": queries}[form]
    wide = None if mask is None else mask[:, None] if mask.ndim == 2 else mask
    read = layer(x, layer.keys_values(context), mask)
    torch.testing.assert_close(read, dense(layer, x, context, wide))


def test_self_attention_is_attention_to_itself() -> None:
    layer, x = Attention(16, heads=2), torch.randn(2, 6, 16)
    torch.testing.assert_close(layer(x), dense(layer, x, x, None))


def test_context_in_two_parts() -> None:
    """Keys and values of a fixed part, computed once, are joined with those of a changing token."""
    layer, x, context = Attention(16, heads=2), torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    joined = layer.keys_values(context[:, :4]).joined(layer.keys_values(context[:, 4:]))
    assert len(joined) == 5
    torch.testing.assert_close(layer(x, joined), layer(x, layer.keys_values(context)))


def test_masked_tokens_do_not_count() -> None:
    layer, x, context = Attention(16, heads=2), torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, -1)
    changed = context.clone()
    changed[:, 3:] = 1e3
    read = layer(x, layer.keys_values(context), mask)
    torch.testing.assert_close(read, layer(x, layer.keys_values(changed), mask))
    torch.testing.assert_close(read, layer(x, layer.keys_values(context[:, :3])))


def test_repeated_and_rows() -> None:
    layer, x, context = Attention(8, heads=2), torch.randn(4, 3, 8), torch.randn(2, 5, 8)
    pairs = layer.keys_values(context)
    read = layer(x, pairs.repeated(2))
    torch.testing.assert_close(read[1:2], layer(x[1:2], pairs.rows(slice(0, 1))))
    torch.testing.assert_close(read[2:3], layer(x[2:3], pairs.rows(torch.tensor([1]))))


@pytest.mark.parametrize("masked", [True, False])
def test_stays_fused(masked: bool) -> None:
    """Neither the mask nor QK-norm makes torch use its unfused fallback."""
    layer, x, context = Attention(32, heads=2), torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    mask = torch.tensor([[True, True, False, False, True]]).expand(2, -1) if masked else None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        layer(x, layer.keys_values(context), mask).sum().backward()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            read = layer(x, layer.keys_values(context), mask)
    assert read.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [True, False])
def test_training_in_bf16_on_a_cpu_agrees_with_the_fused_kernel(masked: bool) -> None:
    torch.manual_seed(0)
    layer, x, context = Attention(32, heads=2), torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    mask = torch.tensor([[True, True, False, False, True], [True] * 5]) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(x, layer.keys_values(context), mask)
        with torch.no_grad():
            fused = layer(x, layer.keys_values(context), mask)
    torch.testing.assert_close(trained, fused, atol=2e-2, rtol=2e-2)
    trained.float().pow(2).sum().backward()
    half = layer.query.weight.grad
    layer.zero_grad()
    layer(x, layer.keys_values(context), mask).pow(2).sum().backward()
    whole = layer.query.weight.grad
    assert half is not None
    assert whole is not None
    assert (half - whole).norm() < 0.05 * whole.norm()


def test_qk_norm_bounds_the_logits() -> None:
    """Scaling queries and keys by a thousand does not change the attention."""
    layer, x = Attention(16, heads=2, bias=False), torch.randn(2, 6, 16)
    values = layer.keys_values(x).values
    large = KeyValues(layer.keys_values(1000 * x).keys, values)
    torch.testing.assert_close(layer(1000 * x, large), layer(x), rtol=1e-4, atol=1e-5)


def test_shares() -> None:
    torch.manual_seed(0)
    layer, x, context = Attention(16, heads=2), torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    shares = layer.shares(x, [2, 3], layer.keys_values(context), mask)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))
    # If all logits are equal, a group's share is the number of its unmasked tokens.
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.zero_()
    flat = layer.shares(x, [2, 3], layer.keys_values(context), mask)
    torch.testing.assert_close(flat, torch.tensor([[1 / 3, 2 / 3], [0.4, 0.6]]))
    with pytest.raises(ValueError, match="do not make up a context of 5"):
        layer.shares(x, [2, 2], layer.keys_values(context))


def test_zero_output_and_errors() -> None:
    assert Attention(16, heads=2, zero_output=True)(torch.randn(1, 3, 16)).abs().max() == 0
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        Attention(16, heads=3)
    with pytest.raises(ValueError, match="mask is bool"):
        Attention(16, heads=2)(torch.randn(1, 3, 16), mask=torch.ones(1, 3))
