"""Plain attention for short rows: the same numbers, and only where it is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vla_parts import INSTRUCTIONS, S, small_vlm
from vlm_parts import frames_of, small_backbone, small_language

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


def gradients(network: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Of a forward pass under plain attention, with the backward pass outside of it, as Lightning runs it."""
    with short_attention(torch.device("cpu"), 20):
        output = run()
    output.square().sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def assert_the_same(found: list[list[Tensor]]) -> None:
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_recomputed_activations_come_from_the_kernel_of_the_forward_pass(tmp_path: Path) -> None:
    """Gradient checkpointing computes what was computed, in every model that has it."""
    languages, backbones, views = [], [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        language = small_language(gradient_checkpointing=recompute).train()
        embedded = language.embed(torch.arange(3, 12)[None])
        languages.append(gradients(language, lambda: language(embedded)))  # noqa: B023
        backbone = small_backbone()
        backbone.gradient_checkpointing = recompute
        frames = frames_of([1])[0]
        backbones.append(gradients(backbone, lambda: backbone.train()(frames).patches))  # noqa: B023
        vlm = small_vlm(gradient_checkpointing=recompute).train()
        vlm.prepare(tmp_path, INSTRUCTIONS)
        seen = torch.randint(256, (1, 1, 3, S, S), dtype=torch.uint8)
        views.append(gradients(vlm, lambda: vlm(seen, INSTRUCTIONS[:1], 1).layers[0]))  # noqa: B023
    for found in (languages, backbones, views):
        assert_the_same(found)
