"""The attention of a bf16 training step on a CPU is computed in float32, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vla_parts import INSTRUCTIONS, S, small_vlm
from vlm_parts import frames_of, small_backbone, small_language

from keygrip.models.nn.processor_attention import FLOAT32_KEYS, trained_on, training_attention, within

CPU = torch.device("cpu")


class Types(TorchFunctionMode):
    """Record the dtype of the queries of each attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is F.scaled_dot_product_attention:
            bf16 = torch.is_autocast_enabled("cpu") or args[0].dtype == torch.bfloat16
            self.found.append(torch.bfloat16 if bf16 else torch.float32)
        return func(*args, **(kwargs or {}))


def operands(positions: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, 4, positions, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril()},
        {"attn_mask": torch.randn(20, 20, generator=torch.Generator().manual_seed(1))},
        {"scale": 0.5},
    ],
    ids=["all", "causal", "mask", "added mask", "scale"],
)
def test_values_and_gradients_are_those_of_float32(options: dict) -> None:
    """The operands are exact in bf16: the result is then rounded once, and no intermediate value is rounded."""
    query, key, value = (each.detach().bfloat16().float().requires_grad_() for each in operands())
    exact = F.scaled_dot_product_attention(query, key, value, **options)
    expected = torch.autograd.grad(exact.bfloat16().float().square().sum(), (query, key, value))
    with bf16(), trained_on(CPU):
        found = F.scaled_dot_product_attention(query, key, value, **options)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    for ours, theirs in zip(
        torch.autograd.grad(found.float().square().sum(), (query, key, value)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_operands_in_bf16_are_computed_in_float32_too() -> None:
    mask = torch.randn(20, 20, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    query, key, value = (each.detach().bfloat16().requires_grad_() for each in operands())
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask.float())
    with Types() as types:
        found = training_attention(query, key, value, attn_mask=mask)
    assert types.found == [torch.float32]
    assert torch.equal(found, expected.bfloat16())


def test_only_training_in_bf16_on_a_processor_has_it() -> None:
    with trained_on(CPU):
        assert not within()  # float32 needs no change
    with bf16(), trained_on(torch.device("cuda")):
        assert not within()
    with Types() as types, bf16(), trained_on(CPU):
        assert within()
        F.scaled_dot_product_attention(*operands())
        with torch.no_grad():  # without gradients the bf16 kernel is the faster one
            F.scaled_dot_product_attention(*operands())
    assert not within()
    assert types.found == [torch.float32, torch.bfloat16]


def test_rows_with_many_keys_are_left_to_the_kernel_in_bf16() -> None:
    """The bf16 kernel is faster for them; the number of queries does not matter."""
    (few, many), (short, long) = ((operands(n)[0] for n in sizes) for sizes in ((3, 600), (FLOAT32_KEYS, 513)))
    with Types() as types, bf16(), trained_on(CPU):
        for queries in (few, many):
            for keys in (short, long):
                found = F.scaled_dot_product_attention(queries, keys, keys)
                assert found.dtype == torch.bfloat16
    assert types.found == [torch.float32, torch.bfloat16] * 2


def gradients(network: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return the gradients of a training step's forward pass; its backward pass runs outside of the context, as in
    Lightning."""
    with bf16(), trained_on(CPU):
        output = run()
    output.float().square().sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def assert_the_same(found: list[list[Tensor]]) -> None:
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_recomputed_activations_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    """Gradient checkpointing recomputes the same values in every model that supports it."""
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
