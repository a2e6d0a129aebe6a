"""Metrics of how the head uses geometry, each on cases whose result is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vla_parts import INSTRUCTIONS, T, V, ready_module, small_batch

from keygrip.models.geometry_vla.diagnostics import exchanged_geometry, slot_share, token_similarity
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.nn.attention import Attention, KeyValues

POINTED = {"pointing_cells": 2, "pointed_tokens": True}


def exchanged(module: GeometryVLAModule) -> dict[str, float]:
    batch = small_batch()
    scene = module.eval()(batch)
    found = exchanged_geometry(module, scene, batch, module.sample(scene, batch))
    return {name: float(value) for name, value in found.items()}


def test_variance_between_slots_and_between_scenes() -> None:
    generator = torch.Generator().manual_seed(0)
    places = 3 * torch.randn(1, 16, 32, generator=generator)
    seen = 2 * torch.randn(64, 16, 32, generator=generator)
    assert float(slot_share(places + seen)) == pytest.approx(9 / 13, abs=0.05)
    assert float(slot_share(seen)) == pytest.approx(0.0, abs=0.01)
    assert float(slot_share(seen[:2])) < 0.1, "two samples' means differ by chance"
    assert float(slot_share(places.expand(64, -1, -1))) == pytest.approx(1.0)


def test_tokens_that_say_the_same_are_alike() -> None:
    same = torch.randn(3, 1, 8).expand(-1, 5, -1)
    assert float(token_similarity(same)) == pytest.approx(1.0, abs=1e-5)
    assert float(token_similarity(2 * torch.eye(4).expand(3, -1, -1))) == pytest.approx(0.0, abs=1e-6)


def test_attention_on_small_values_reads_little() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2, qk_norm=False), torch.randn(2, 3, 8)
    context = attention.keys_values(torch.randn(2, 6, 8))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 0] = False
    values = context.values.clone()
    values[:, :, 2:] = 0
    silent = KeyValues(context.keys, values)
    torch.testing.assert_close(attention.reads(x, (2, 4), silent, mask), torch.tensor([[1.0, 0.0]] * 2))
    assert (attention.shares(x, (2, 4), silent, mask)[:, 1] > 0.1).all()
    found = attention.reads(x, (2, 4), context, mask)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2))
    # the output of the layer without its bias is the sum of its parts
    first = attention(x, silent, mask) - attention.output.bias
    second = attention(x, context, mask) - attention(x, silent, mask)
    sizes = torch.stack([part.square().mean(dim=(1, 2)).sqrt() for part in (first, second)], dim=-1)
    torch.testing.assert_close(found, sizes / sizes.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"geom_dit_tokens": 0, **POINTED},
        {"geom_inject_to_dit": False, "geom_inject_to_vlm": True},
    ],
    ids=["compressed", "pointed", "language"],
)
def test_another_scenes_geometry_moves_the_plan(tmp_path: Path, options: dict[str, object]) -> None:
    assert exchanged(ready_module(tmp_path, **options))["geometry_moves_cm"] > 1e-3


def test_geometry_that_nobody_reads_moves_nothing(tmp_path: Path) -> None:
    module = ready_module(tmp_path)
    assert module.network.compressor is not None
    with torch.no_grad():
        module.network.compressor.projection.weight.zero_()  # type: ignore[union-attr,operator]
    assert exchanged(module) == {"geometry_moves_cm": 0.0, "geometry_worth_cm": 0.0}
    assert exchanged(ready_module(tmp_path, geom_inject_to_dit=False)) == {}


def test_geometry_is_worth_what_plans_lose_without_it(tmp_path: Path) -> None:
    module = ready_module(tmp_path).eval()
    batch = small_batch()
    scene = module(batch)
    sampled = module.sample(scene, batch)
    batch.position = module.decode(sampled, batch)[0].detach()  # so that the plan is exact
    batch.action_is_pad[:, :, 1:] = True
    found = exchanged_geometry(module, scene, batch, sampled)
    assert float(found["geometry_worth_cm"]) > 1e-3
    torch.testing.assert_close(found["geometry_worth_cm"], found["geometry_moves_cm"])


def test_a_validation_says_what_the_head_reads(tmp_path: Path) -> None:
    module = ready_module(tmp_path, **POINTED).eval()
    batch = small_batch()
    scene = module(batch)
    sampled = module.sample(scene, batch)
    found = {name: float(value) for name, value in module.diagnostics(scene, batch, sampled).items()}
    groups = ("prompt", "geometry", "pointed")
    for figure in ("share", "even", "read"):
        assert sum(found[f"{group}_{figure}"] for group in groups) == pytest.approx(1.0, abs=1e-5), figure
    lengths = [int(count) for count in scene.contexts[0].mask.sum(dim=1)]  # type: ignore[union-attr]
    assert lengths[0] != lengths[1], "padding of the shorter prompt does not count"
    assert found["pointed_even"] == pytest.approx(sum(V * T / length for length in lengths) / 2)
    assert found["geometry_rms"] == pytest.approx(1.0, abs=0.01), "context_norm"
    assert found["geometry_share"] == pytest.approx(
        float(module.metrics(scene, batch, sampled)["geometry_share"]), abs=1e-6
    )
    assert {"geometry_alike", "geometry_slot", "geometry_moves_cm", "geometry_worth_cm"} <= set(found)
    compared = ("geometry_slot", "geometry_moves_cm", "geometry_worth_cm")
    for size in (1, 2):  # a single sample has nothing to exchange its geometry with
        part = small_batch(INSTRUCTIONS[:size])
        assert {int(module.counts(module(part), part)[name]) for name in compared} == {0 if size == 1 else 2}
    loud = ready_module(tmp_path, context_norm=False)
    with torch.no_grad():
        loud.network.compressor.projection.weight.mul_(100)  # type: ignore[union-attr,operator]
    scene = loud(batch)
    quiet = loud.diagnostics(scene, batch, loud.sample(scene, batch))
    assert quiet["geometry_rms"] > 10
    assert "pointed_share" not in quiet
