"""Plain attention for short rows: the same numbers, and only where it is meant."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from keygrip.models.nn.short_attention import SHORT, short_attention


def flash_is_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def test_only_short_rows_on_a_processor_take_the_plain_kernel() -> None:
    with short_attention(torch.device("cpu"), SHORT):
        assert not flash_is_allowed()
    for device, positions in (("cpu", SHORT + 1), ("cuda", SHORT)):
        with short_attention(torch.device(device), positions):
            assert flash_is_allowed()


def test_both_kernels_give_the_same() -> None:
    query, key, value = torch.randn(3, 2, 4, 20, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    query.requires_grad_()
    found = []
    for positions in (20, SHORT + 1):
        with short_attention(torch.device("cpu"), positions):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), query)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
