"""Ways in which geometry reaches the head, for controlled comparisons: the content of each context and its effect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import composed
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from vla_parts import S, T, V, ready_module, small_batch, small_geometry, small_module, small_vlm

from keygrip.config import config_folder
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.language.qwen_vl import Vision

POINTED = {"pointing_cells": 2, "pointed_tokens": True}


def changed_by_geometry(module: GeometryVLAModule) -> bool:
    """Return whether the geometry encoder's weights change the plan."""
    batch = small_batch()
    before = module.sample(module(batch), batch)
    assert module.network.geometry is not None
    with torch.no_grad():
        module.network.geometry.reduce.weight.normal_()  # type: ignore[union-attr,operator]
    return bool((module.sample(module(batch), batch) - before).abs().max() > 1e-4)


def test_geometry_at_pointed_places_without_compressed_tokens(tmp_path: Path) -> None:
    module = ready_module(tmp_path, geom_dit_tokens=0, **POINTED)
    assert module.network.compressor is None
    assert module(small_batch()).groups[1:] == (0, V * T)
    assert changed_by_geometry(module)
    with pytest.raises(ValueError, match="geom_dit_tokens=0 leaves geometry at the pointed places"):
        small_module(geom_dit_tokens=0)


def test_geometry_through_the_language_model(tmp_path: Path) -> None:
    module = ready_module(tmp_path, geom_inject_to_dit=False, geom_inject_to_vlm=True, **POINTED)
    plain = ready_module(tmp_path, geom_inject_to_dit=False, **POINTED)
    batch = small_batch()
    scene = module(batch)
    prompt = plain(batch).groups[0]
    assert scene.groups == (prompt + 4, 0, V * T)
    assert module.network.pointed is not None
    assert module.network.pointed.seen is None, "pointed tokens hold places alone"
    assert changed_by_geometry(module)
    losses = module.losses(module(batch), batch)
    losses["action"].backward()
    assert module.network.vlm_compressor is not None
    for part in (module.network.vlm_compressor, module.network.geometry):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]  # type: ignore[union-attr]
        assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)
    with pytest.raises(ValueError, match="per_layer gives each block of the head its own"):
        small_module(geom_inject_to_dit=False, geom_inject_to_vlm=True, geom_compression_type="per_layer")


@pytest.mark.parametrize("kind", ["pool", "per_layer", "qformer"])
def test_geometry_tokens_carry_their_places(kind: str, tmp_path: Path) -> None:
    """If the encoder outputs the same at every place, tokens differ by their places alone."""
    options = {"geom_compression_type": kind, "geom_dit_tokens": 2}
    module = ready_module(tmp_path, geom_places=True, **options)
    plain = ready_module(tmp_path, **options)
    places = module.network.geometry_places
    assert places is not None
    batch = small_batch()
    start, compressed = module(batch).groups[0], slice(-2, None)
    first = module(batch).contexts[0].tokens[:, compressed]
    torch.testing.assert_close(first, plain(batch).contexts[0].tokens[:, compressed], msg="zeros at first")
    tokens = torch.ones(1, V * 16, module.network.geometry.dim)  # type: ignore[union-attr]
    with torch.no_grad():
        places.lift.weight.normal_()
        placed = module.network._placed(tokens, V)
    assert placed.shape == tokens.shape
    assert len(torch.unique(placed[0].mul(1e4).round(), dim=0)) == V * 16
    moved = module(batch).contexts[0].tokens
    assert moved.shape[1] == start + 2
    assert (moved[:, compressed] - first).abs().max() > 1e-3
    with pytest.raises(ValueError, match="square grid, got 17"):
        module.network._placed(torch.ones(1, 17, module.network.geometry.dim), 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"geom_dit_tokens": 0, **POINTED}], ids=["compressed", "pointed"])
def test_blank_tokens_hold_nothing_of_the_scene(tmp_path: Path, options: dict[str, Any]) -> None:
    """There are as many tokens and parameters, depth alone trains the encoder, and the model points as before."""
    module, plain = (ready_module(tmp_path, geom_blank=value, **options) for value in (True, False))
    assert {name: p.shape for name, p in module.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    batch = small_batch()
    scene, other = module(batch), plain(batch)
    assert scene.groups == other.groups
    assert scene.groups[2 if options else 1] > 0
    assert scene.geometry is not None
    assert other.geometry is not None
    torch.testing.assert_close(scene.geometry.points, other.geometry.points)
    if options:
        torch.testing.assert_close(scene.pointing, other.pointing)
    losses = module.losses(scene, batch)
    geometry = module.network.geometry
    assert geometry is not None
    parameters = list(geometry.blocks.parameters())  # type: ignore[union-attr]
    gradients = torch.autograd.grad(losses["action"], parameters, retain_graph=True)
    assert all(not gradient.any() for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in torch.autograd.grad(losses["depth"], parameters))
    assert not changed_by_geometry(module)
    assert changed_by_geometry(plain)


def test_standardised_tokens_differ_between_scenes_alone(tmp_path: Path) -> None:
    """Values that the K tokens share in all samples are removed; evaluation uses the statistics of training."""
    module, plain = (ready_module(tmp_path, geom_standardised=value, geom_dit_tokens=2) for value in (True, False))
    batch = small_batch()
    start = module(batch).groups[0]
    module.train()
    seen = module(batch).contexts[1].tokens[:, start:]
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros_like(seen[0]), atol=1e-4, rtol=0)
    module.eval()
    assert module.network.standardised is not None
    held = {name: value.clone() for name, value in module.network.standardised.state_dict().items()}
    alone = module(small_batch()).contexts[1].tokens[:, start:]
    torch.testing.assert_close(alone, seen, msg="the same batch under the same statistics")
    assert all(torch.equal(value, held[name]) for name, value in module.network.standardised.state_dict().items())
    common = plain.eval()(batch).contexts[1].tokens[:, plain(batch).groups[0] :].mean(dim=0)
    assert common.abs().max() > 0.5
    assert changed_by_geometry(module)


def test_one_mean_pooled_vector_knows_no_layout(tmp_path: Path) -> None:
    module = ready_module(tmp_path, geom_dit_tokens=1)
    assert module.network.compressor is not None
    tokens = torch.randn(1, 32, module.network.geometry.dim)  # type: ignore[union-attr]
    shuffled = tokens[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(module.network.compressor(tokens)[0], module.network.compressor(shuffled)[0])


def test_geometry_that_would_reach_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="geom_places=true is of compressed geometry tokens, and there are none"):
        small_module(geom_inject_to_dit=False, geom_places=True)
    with pytest.raises(ValueError, match="geom_blank=true has no effect"):
        small_module(geom_inject_to_dit=False, geom_blank=True)
    with pytest.raises(ValueError, match="geom_standardised=true is of compressed geometry tokens"):
        small_module(small_geometry(), geom_dit_tokens=0, geom_standardised=True, pointing_cells=2, pointed_tokens=True)
    with pytest.raises(ValueError, match="at least 1 with geom_inject_to_vlm"):
        small_module(geom_inject_to_dit=False, geom_inject_to_vlm=True, geom_dit_tokens=0)
    with pytest.raises(ValueError, match="at least 0"):
        small_module(small_geometry(), geom_dit_tokens=-1)


def test_a_dry_run_says_what_there_is(module: GeometryVLAModule) -> None:
    report = module.dry_run(small_batch())
    assert report["context_tokens"] == {"prompt": module(small_batch()).groups[0], "geometry": 4, "pointed": 0}
    total = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    assert report["parameters_m"]["all"]["all"] == pytest.approx(total, abs=1e-3)
    assert report["parameters_m"]["vlm"]["trained"] > 0
    assert report["losses"]["total"] > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_recomputed_activations_train_on_a_processor(tmp_path: Path) -> None:
    """A whole training step with the CPU kernel for short rows, whose backward pass runs outside of the context
    manager."""
    batch, found = small_batch(), []
    for recompute in (False, True):
        module = ready_module(tmp_path, vlm=small_vlm(gradient_checkpointing=recompute)).train()
        module.log_values = lambda *args: None  # type: ignore[method-assign]
        module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]
        torch.manual_seed(0)
        module.training_step(batch, 0).backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


TRIANGULATED = ("arm_triangulated", "arm_both_triangulated")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "meaningless"),
    [
        (("experiment=vla_yam_depth",), ()),
        (("experiment=vla_yam_language",), ()),
        (("experiment=metaworld_vla", "data.root=folder"), ("depth_only",)),  # there is no depth
    ],
    ids=lambda value: str(value[0]).partition("=")[2] if value else "",
)
def test_every_ablation_fits_every_small_recipe(recipe: tuple[str, ...], meaningless: tuple[str, ...]) -> None:
    """Each ablation switches off what it needs off in every recipe, and an arm has the same meaning in each recipe."""
    whole = composed("train", [*recipe])
    OmegaConf.set_struct(whole, False)
    sections = OmegaConf.load(config_folder() / "ablation" / "geometry_vla" / "options.yaml")
    assert isinstance(sections, DictConfig)
    assert len(sections) > 40
    for name, section in sections.items():
        if "defaults" in section:  # extends another section; or another optimizer
            continue
        cfg = OmegaConf.merge(whole, section, {"geometry": {"init_from": None}})
        if name in meaningless:
            with pytest.raises(InstantiationException, match="trains the encoder by depth alone"):
                instantiate(cfg.geometry)
            continue
        with torch.device("meta"):  # no weights are sampled
            network = instantiate(cfg.model.network, _convert_="all")
        if str(name).startswith(("arm_", "no_triangulation")) and name != "arm_both":
            assert network.triangulates == (name in TRIANGULATED), name
            assert network.pointed_actions is None, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("trainable", ["all", "language"])
def test_recomputed_activations_train_on_a_gpu(trainable: str, tmp_path: Path) -> None:
    """A whole step under bf16 autocast: the same loss and gradients in less memory."""
    deep = Vision(layers=8, width=16, heads=2, mlp_width=256, patch_size=8, window=S, full_attention=[7])
    batch, found, peaks = small_batch().to("cuda"), [], []
    for recompute in (False, True):
        vlm = small_vlm(layers=12, mlp_width=512, vision=deep, trainable=trainable, gradient_checkpointing=recompute)
        module = ready_module(tmp_path, vlm=vlm, pointing_cells=2, pointed_tokens=True).to("cuda").train()
        module.log_values = lambda *args: None  # type: ignore[method-assign]
        module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]
        torch.manual_seed(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.training_step(batch, 0)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.isfinite(loss)
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((found[1][name] - gradient).abs().max()) < 0.02 * scale, name
    assert peaks[1] < peaks[0]
