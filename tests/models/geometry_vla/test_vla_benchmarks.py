"""The benchmark cases: parameters at the published sizes, and the parts of computing a chunk on a small policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vla_parts import ready_module

from keygrip import bench
from keygrip.benchmarks import geometry_vla
from keygrip.benchmarks.geometry_vla import VLAChunk, VLAMemory, VLAPlanMemory
from keygrip.config import compose
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy

COMPILED = ("without_compiled_p50_ms", "without_compiled_p95_ms")


def test_parameters_are_the_published_ones() -> None:
    figures = bench.run(compose("bench", ["case=vla_params"]))
    expected = {"pool_m": 2.1, "per_layer_m": 33.6, "qformer_m": 19.0}
    assert {name: figures[name] for name in expected} == {
        name: pytest.approx(value, rel=0.1) for name, value in expected.items()
    }


def test_parts_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("bench").cases.vla_chunk
    limits = {"repetitions": 3, "quick_repetitions": 3, "warm_up": 1, "limit_s": 5.0, "quick_limit_s": 5.0}
    assert set(config) == {"_target_", "policies", "compiled", "threads", *limits}
    assert set(config.compiled) <= set(config.policies)
    sizes = {name: compose("train", overrides).data.image_size for name, overrides in config.policies.items()}
    assert sizes == {"recipe": 128, "large_images": 192}
    made = []

    def small(_: object) -> object:
        made.append(ready_module(tmp_path, geom_inject_to_dit=not made))
        return made[-1]

    monkeypatch.setattr(geometry_vla, "untrained", small)
    small_images = ["model=geometry_vla", "data=yam_language", "backbone.image_size=32"]
    case = VLAChunk({"injected": small_images, "without": small_images}, ["without"], threads=config.threads, **limits)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        figures = case.run(quick=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert figures["threads"] == 1
    measured = {"px", "vlm_ms", "head_ms", "p50_ms", "p95_ms"}
    first = (measured - {"px"}) | {"geometry_ms"}
    expected = {f"{name}_{what}" for name in ("injected", "without") for what in measured} | {"threads"}
    expected |= first | {"injected_geometry_ms"}
    assert figures.keys() == expected
    assert {name: figures[name] for name in first} == {name: figures[f"injected_{name}"] for name in first}
    assert figures["injected_px"] == 32
    assert 0 < figures["injected_p50_ms"] <= figures["injected_p95_ms"]
    ready: list[object] = []
    monkeypatch.setattr(GeometryVLAPolicy, "make_ready", lambda policy: ready.append((policy.module, policy.compiled)))
    made.clear()
    figures = case.run(quick=False)
    assert figures.keys() == expected | {*COMPILED}
    assert (made[2], True) in ready, "on a module of its own"
    assert (made[1], True) not in ready


def test_parts_of_a_chunk_with_geometry_at_the_pointed_places_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointed = ready_module(tmp_path, geom_dit_tokens=0, pointing_cells=2, pointed_tokens=True)
    assert pointed.network.compressor is None
    monkeypatch.setattr(geometry_vla, "untrained", lambda config: pointed)
    limits = {"repetitions": 2, "quick_repetitions": 2, "warm_up": 1, "limit_s": 5.0, "quick_limit_s": 5.0}
    small_images = ["model=geometry_vla", "data=yam_language", "backbone.image_size=32"]
    case = VLAChunk({"pointed": small_images}, [], threads=1, **limits)
    assert case.run(quick=True)["pointed_geometry_ms"] > 0


@pytest.mark.slow
def test_memory_of_a_recipe_is_counted() -> None:
    """On the small model: the parts add up, sharding divides the memory that persists between steps, and a frozen
    vision-language model needs less."""
    small = ["model=geometry_vla", "data=yam_language", "data.batch_size=2", "data.image_size=64"]
    recipes = {"whole": small, "sharded": [*small, "data.batch_size=4"], "frozen": [*small, "vlm.trainable=frozen"]}
    gpus = {"whole": 1, "sharded": 2, "frozen": 1}
    found = VLAMemory(recipes, gpus, geom_dim=32, geom_tokens=16, gpu_gib=1.0).run(quick=False)
    assert found["whole_batch"] == found["sharded_batch"] == 2
    assert found["whole_step_gib"] == found["sharded_step_gib"] > found["frozen_step_gib"] > 0
    assert found["sharded_total_gib"] < found["whole_total_gib"]
    assert found["whole_spare_gib"] == pytest.approx(1 - found["whole_total_gib"], abs=0.011)
    assert found["frozen_trained_m"] < found["frozen_parameters_m"] == found["whole_parameters_m"]


@pytest.mark.slow
def test_gradients_of_the_batches_before_are_counted_where_a_recipe_accumulates_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("keygrip.training.memory.GIB", 1)  # so that memory is in bytes: the model is small
    small = ["model=geometry_vla", "data=yam_language", "data.batch_size=2", "data.image_size=64"]
    recipes = {"single": small, "several": [*small, "accumulate_grad_batches=2"]}
    found = VLAMemory(recipes, dict.fromkeys(recipes, 1), geom_dim=32, geom_tokens=16, gpu_gib=1.0).run(quick=False)
    config = compose("train", small)
    module = geometry_vla._without_memory(config, 32, 16)
    counted = module.step_memory(geometry_vla._shapes(module, config, 2), True, True, accumulated=True)
    assert found["several_step_gib"] == counted.step > found["single_step_gib"]
    assert found["several_weights_gib"] == found["single_weights_gib"]


@pytest.mark.slow
def test_memory_of_the_recipes_is_of_the_mapanything_that_they_use(
    mapanything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its weights are available it is counted, in full on each GPU; otherwise the width of its tokens is that of
    V1.1."""
    cases = compose("bench").cases
    assert (cases.vla_memory.geom_dim, cases.vla_plan_memory.geom_dim) == (1536, 1536)
    assert cases.vla_memory.weights is None
    monkeypatch.setattr(geometry_vla, "GIB", 1)
    monkeypatch.setattr("keygrip.training.memory.GIB", 1)  # so that memory is in bytes: the model is small
    small = ["model=geometry_vla", "data=yam_language", "geometry=mapanything_cached", "data.image_size=64"]
    off = [f"model.network.{name}" for name in ("pointing_cells=0", "pointing_keyframe=false", "pointed_tokens=false")]
    recipe = [*small, *off, "geometry.image_size=64", "data.batch_size=4", "data.depth=false"]
    dim, tokens, outside = 24, (64 // 8) ** 2, (3 * 8 * 8 + 1) * 10 + (10 + 1) * 24
    found = {
        weights: VLAMemory({"recipe": recipe}, {"recipe": 2}, dim, tokens, 1.0, weights).run(quick=False)
        for weights in (None, str(mapanything))
    }
    without, whole = found[None], found[str(mapanything)]
    assert whole["recipe_parameters_m"] - without["recipe_parameters_m"] == pytest.approx(outside / 1e6, abs=1.1e-3)
    assert whole["recipe_trained_m"] == without["recipe_trained_m"]
    digest = 32 // 2  # bytes of the encoder's own buffer on each GPU
    assert whole["recipe_weights_gib"] - without["recipe_weights_gib"] == pytest.approx(4 * outside + digest, abs=1)
    plan = VLAPlanMemory(recipe, dim, tokens, ["float32"], str(mapanything)).run(quick=False)
    alone = VLAPlanMemory(recipe, dim, tokens, ["float32"]).run(quick=False)
    assert plan["float32_weights_gib"] - alone["float32_weights_gib"] == 4 * outside + 32


@pytest.mark.slow
def test_memory_of_a_plan_is_counted_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_vla, "GIB", 1)  # so that memory is in bytes: the model is small
    small = ["model=geometry_vla", "data=yam_language", "data.image_size=64"]
    case = VLAPlanMemory(small, geom_dim=32, geom_tokens=16, precisions=["float32", "bfloat16", "int8"])
    found = case.run(quick=False)
    vlm = geometry_vla._without_memory(compose("train", small), 32, 16).network.vlm
    count = sum(parameter.numel() for parameter in vlm.parameters())
    assert found["float32_weights_gib"] - found["bfloat16_weights_gib"] == 2 * count
    assert 2 * count < found["float32_weights_gib"] - found["int8_weights_gib"] < 3 * count
    for precision in case.precisions:
        assert found[f"{precision}_plan_gib"] > 0
        total = found[f"{precision}_weights_gib"] + found[f"{precision}_plan_gib"]
        assert found[f"{precision}_total_gib"] == pytest.approx(total)
    assert set(case.run(quick=True)) == {"float32_weights_gib", "float32_plan_gib", "float32_total_gib"}
