"""The benchmark cases on a small network: they measure what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import SMALL, write_images

from keygrip import train
from keygrip.benchmarks import patch_dit
from keygrip.benchmarks.measuring import peak_extra_bytes
from keygrip.benchmarks.patch_dit import (
    FOUR,
    THREE,
    DiTCurve,
    DiTSampler,
    DiTStep,
    SamplingStep,
    ToyImages,
    TrainingStep,
    held_out_batch,
    random_conditions,
    random_network,
)
from keygrip.config import compose

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    **{"overrides": SMALL, "quick_depth": 2, "latent": 4, "text_tokens": 3, "patch_grid": 3, "batch": 1, "threads": 1},
    **{"repetitions": 3, "quick_repetitions": 1, "limit_s": 5.0, "quick_limit_s": 1.0},
}


@torch.inference_mode()
def test_both_ways_compute_the_same_and_something() -> None:
    network, length = random_network(SMALL, CPU)
    step = SamplingStep(network, random_conditions(network, 1, length, 3, 3, CPU), latent=4)
    plain = step.plain(FOUR)
    assert plain.std() > 0.01
    assert step.difference(FOUR) < 1e-4
    assert step.difference(THREE) < 1e-4
    torch.testing.assert_close(step.first(), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step.next(), plain, atol=1e-4, rtol=1e-4)
    assert (step.next(0.3) - plain).abs().max() > 1e-3  # the timestep matters
    passes: list[tuple[int, int]] = []
    keys = network.blocks[0].cross_attention.key_value
    keys.register_forward_pre_hook(lambda _, arguments: passes.append(tuple(arguments[0].shape[:2])))
    step.plain(FOUR)
    step.first()
    step.next()
    assert passes == [(1, length + 1 + 9)] * 4 + [(3, 3 + 1 + 9), (3, 1)]


def test_figures_of_the_sampler() -> None:
    figures = DiTSampler(**SIZES).run(quick=True)
    assert {"speedup_over_four", "speedup_over_three", "step_ms"} <= figures.keys()
    assert figures["blocks"] == 2
    assert (figures["context_tokens"], figures["plain_context_tokens"]) == (13, 16)
    assert figures["max_relative_difference"] < 1e-4


def test_a_sampler_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingStep, "next", lambda self: 2 * self.plain(THREE))
    with pytest.raises(RuntimeError, match="differs from the plain"):
        DiTSampler(**SIZES).run(quick=True)


def test_peak_of_a_step_has_the_gradients() -> None:
    """The weights take more memory than anything else in the step."""
    network, length = random_network([*SMALL, "model.network.width=192"], CPU)
    step = TrainingStep(network.train(), random_conditions(network, 1, length, 3, 3, CPU), latent=4)
    assert peak_extra_bytes(step, CPU) >= 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.slow
def test_figures_of_a_step() -> None:
    figures = DiTStep(**(SIZES | {"patch_grid": 12})).run(quick=False)  # enough patches to take noticeable memory
    assert {"patches_over_cls_time", "step_ms", "peak_mb", "patches_over_cls_memory"} <= figures.keys()
    assert figures["patches_over_cls_memory"] > 1
    assert figures["blocks"] == 3
    network, _ = random_network(SMALL, CPU)
    parameters = sum(p.numel() for p in network.parameters())
    assert figures["estimated_weights_and_states_gb"] == pytest.approx(parameters * 16 / 1e9, abs=0.01)


@pytest.mark.slow
def test_the_curve_falls_with_the_steps() -> None:
    settings = [["euler", 4, 0, 1], ["euler", 16, 0, 1], ["adams_bashforth", 16, 0, 1], ["euler", 4, 0.3, 0.8]]
    curve = DiTCurve(None, 10, 10, 2, 2, 64, 64, settings=settings, threads=1)
    figures = curve.run(quick=True)
    assert figures["euler_16_distance"] < figures["euler_4_distance"]
    assert figures["adams_bashforth_16_distance"] < figures["euler_16_distance"]
    assert figures["euler_4_evaluations"] == 12
    assert figures["euler_4_interval_0.3_0.8_evaluations"] == 1 + 3 + 3 + 1


@pytest.mark.slow
def test_the_curve_of_a_run_is_drawn_as_that_run_is(tmp_path: Path) -> None:
    """With the captions and features of its val images, and with its own scales and shift."""
    root = write_images(tmp_path / "images")
    options = ["model.sampling.timestep_shift=3", "model.sampling.guidance=dino_then_text", "max_steps=1"]
    train.run(compose("train", [*SMALL, *options, f"data.root={root}", f"run_dir={tmp_path / 'run'}"]))
    curve = DiTCurve(str(tmp_path / "run"), 1, 1, 4, 4, 8, 8, settings=[["euler", 4, 0, 1]], threads=1)
    _, conditions, size, sampling, guide = curve._trained(4, 1)
    assert guide is None
    assert (sampling.timestep_shift, sampling.guidance) == (3, "dino_then_text")
    batch = held_out_batch(str(tmp_path / "run"), 4)
    assert size == tuple(batch.latents.shape[2:])
    assert torch.equal(conditions.text, batch.text_states)  # type: ignore[arg-type]
    assert conditions.patches.std() == pytest.approx(1, abs=0.2)  # type: ignore[union-attr]
    assert not torch.equal(conditions.text[0], conditions.text[1])  # type: ignore[index]
    assert {"euler_4_distance", "euler_4_ms"} <= curve.run(quick=True).keys()
    with pytest.raises(ValueError, match="fewer than 99 val images of one size"):
        held_out_batch(str(tmp_path / "run"), 99)


@pytest.mark.slow
def test_the_curve_of_a_run_with_a_guide_is_drawn_with_it(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    options = ["ablation=patch_dit/early_guide", "model.guide.at_step=1", "max_steps=2"]
    options += ["model.sampling.guide_scale=0.5", f"data.root={root}", f"run_dir={tmp_path / 'run'}"]
    train.run(compose("train", [*SMALL, *options]))
    settings = [["euler", 4, 0, 1], ["euler", 4, 0.3, 0.8]]
    figures = DiTCurve(str(tmp_path / "run"), 1, 1, 4, 4, 8, 8, settings=settings, threads=1).run(quick=True)
    assert figures["euler_4_evaluations"] == 16  # three branches and the guide
    assert figures["euler_4_distance"] > 0


def test_toy_images_are_learned() -> None:
    toy = ToyImages()
    first, again, other = toy.batch(4, 1), toy.batch(4, 1), toy.batch(4, 2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert patch_dit.STEPS == 50
    network = toy.trained(3)
    assert network.latent_out.weight.any()
