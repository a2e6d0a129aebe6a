"""The sampler: equal to the plain sampler, the guidance formula, which branches are evaluated, seeds."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import CHANNELS, conditions_of, flags, small_dit
from torch import Tensor

from keygrip.models.nn.flow_matching import seeded_noise
from keygrip.models.patch_dit import sampler
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.sampler import Edit, Sampling, sample

SIZE = (8, 8)
PLAIN: dict[str, Any] = {"together": False, "cached": False, "trimmed": False}


def only(conditions: Conditions, what: str) -> Conditions:
    if what == "text":
        return replace(conditions, cls=None, patches=None)
    return replace(conditions, text=None, text_mask=None) if what == "dino" else conditions


def counted(network: PatchDiT) -> list[int]:
    """Record the batch sizes of the network's passes."""
    batches: list[int] = []
    network.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    return batches


@pytest.mark.parametrize("given", ["both", "text", "dino"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_scale": 1.5},
        {"solver": "heun"},
        {"solver": "adams_bashforth", "interval": (0.2, 0.7)},
        {"text_rescale": 0.7, "dino_rescale": 0.3},
    ],
    ids=["dual", "four branches", "heun", "interval", "rescale"],
)
@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.quick_sets(12)
def test_equals_the_plain_sampler(given: str, options: dict[str, Any], prediction: Any) -> None:
    """Batched branches, cached keys and values and trimmed padding change only the rounding."""
    network, conditions = small_dit(prediction=prediction), only(conditions_of(lengths=(3, 5)), given)
    sampling = Sampling(steps=4, **options)
    fast = sample(network, conditions, SIZE, sampling, seeds=[1, 2])
    plain = sample(network, conditions, SIZE, sampling, seeds=[1, 2], **PLAIN)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert (fast - seeded_noise([1, 2], (CHANNELS, *SIZE))).abs().max() > 0.1


def test_the_formula_by_hand() -> None:
    """Compared with calling the network directly: Euler, two steps."""
    network, conditions = small_dit(), conditions_of()
    sampling = Sampling(text_scale=3.0, dino_scale=2.0, steps=2)
    x = seeded_noise([4, 5], (CHANNELS, *SIZE))
    drawn = sample(network, conditions, SIZE, sampling, seeds=[4, 5])
    with torch.no_grad():
        for level in (1.0, 0.5):
            v = {}
            for name, text, dino in (("none", False, False), ("text", True, False), ("dino", False, True)):
                context = network.context_builder(conditions, flags(text, text), flags(dino, dino), 1.0)
                v[name] = network(x, torch.full((2,), level), context).velocity
            x = x - 0.5 * (v["none"] + 3.0 * (v["text"] - v["none"]) + 2.0 * (v["dino"] - v["none"]))
    torch.testing.assert_close(drawn, x, atol=1e-5, rtol=1e-5)


def test_passes_and_branches() -> None:
    """Three branches in one batch; one branch outside of the interval; no branch for a scale of zero."""
    conditions = conditions_of()
    for given, options, expected in (
        ("both", {}, [6, 6, 6, 6]),
        ("both", {"full_scale": 1.0}, [8] * 4),
        ("both", {"interval": (0.5, 0.8)}, [2, 6, 6, 2]),
        ("both", {"text_scale": 0.0, "dino_scale": 0.0, "full_scale": 4.0}, [4] * 4),
        ("both", {"text_scale": 0.0, "dino_scale": 0.0, "full_scale": 1.0}, [2] * 4),
        ("both", {"text_scale": 0.4, "dino_scale": 0.6}, [4] * 4),
        ("both", {"dino_scale": 0.0}, [4] * 4),
        ("text", {}, [4] * 4),
        ("dino", {"text_scale": 9.0}, [4] * 4),
        ("text", {"solver": "heun"}, [4] * 7),
    ):
        network = small_dit()
        batches = counted(network)
        sample(network, only(conditions, given), SIZE, Sampling(steps=4, **options), seeds=[1, 2])
        assert batches == expected, (given, options)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_a_bound_of_the_interval_that_is_a_level_of_a_step_has_guidance(shift: float) -> None:
    """However the timestep is rounded: as written, computed in float64, or in the float32 of diffusers' schedulers."""
    conditions, plain = conditions_of(), Sampling(steps=10, timestep_shift=shift)
    levels = plain.levels()[:-1]
    assert plain.evaluations(conditions) == 30
    for number, level in enumerate(levels[1:], 1):
        written = float(f"{level:.9f}")  # 0.2, where 1 - 8 / 10 is 0.19999999999999996
        for interval, guided in (((written, 1.0), levels[: number + 1]), ((0.0, written), levels[number:])):
            sampling = replace(plain, interval=interval)
            assert sampling.is_guided()
            for computed in (levels, torch.tensor(levels).tolist()):
                found = [
                    at for at, own in zip(levels, computed, strict=True) if len(sampling.branches(conditions, own)) > 1
                ]
                assert found == guided


def test_large_images_on_a_cpu_run_a_branch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same, and each branch's context is cached from step to step."""
    conditions, sampling = conditions_of(), Sampling(steps=3)
    network = small_dit()
    usual = sample(network, conditions, SIZE, sampling, seeds=[1, 2])
    monkeypatch.setattr(sampler, "CPU_BATCH", 2 * 16 * 32 - 1)  # 2 samples of 4 x 4 tokens, 32 wide
    lengths: list[int] = []
    layer = network.blocks[0].cross_attention.key_value
    layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    batches = counted(network)
    single = sample(network, conditions, SIZE, sampling, seeds=[1, 2])
    assert batches == [2] * 9
    assert lengths == [1 + 1 + 9, 5 + 1 + 9, 1 + 1 + 9] + [1] * 6  # none, text, dino: each is trimmed separately
    torch.testing.assert_close(single, usual, atol=1e-5, rtol=1e-5)


def test_scales_that_add_up_to_one_need_no_unconditional_branch() -> None:
    network, conditions = small_dit(), conditions_of()
    mixed = sample(network, conditions, SIZE, Sampling(0.4, 0.6, steps=2), seeds=[1, 2])
    nearly = sample(network, conditions, SIZE, Sampling(0.4, 0.6 + 1e-7, steps=2), seeds=[1, 2])
    torch.testing.assert_close(mixed, nearly, atol=1e-4, rtol=1e-4)


def test_context_is_computed_once_but_for_cls() -> None:
    """After the first step, every block computes keys and values of 1 token per step."""
    network = small_dit()
    lengths: list[int] = []
    layer = network.blocks[1].cross_attention.key_value
    layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    sample(network, conditions_of(lengths=(3, 5)), SIZE, Sampling(steps=3), seeds=[1, 2])
    assert lengths == [5 + 1 + 9, 1, 1]


@torch.no_grad()
def test_the_cls_token_in_the_cache_is_the_current_one() -> None:
    """A sampler that cached the first step's CLS token would not have the current timestep in the context."""
    network, conditions = small_dit(), conditions_of()
    for block in network.blocks:  # remove every other path of the timestep
        block.modulation.linear.weight.zero_()
    fast = sample(network, conditions, SIZE, Sampling(steps=4), seeds=[1, 2])
    torch.testing.assert_close(fast, sample(network, conditions, SIZE, Sampling(steps=4), seeds=[1, 2], **PLAIN))


def test_a_sample_depends_on_its_own_seed_and_conditions() -> None:
    network, conditions = small_dit(), conditions_of(lengths=(3, 5))
    pair = sample(network, conditions, SIZE, Sampling(steps=3), seeds=[7, 8])
    again = sample(network, conditions, SIZE, Sampling(steps=3), seeds=[7, 9])
    assert torch.equal(pair[0], again[0])
    assert not torch.equal(pair[1], again[1])
    halves = [t[1:] if isinstance(t, Tensor) else t for t in vars(conditions).values()]
    alone = sample(network, Conditions(*halves), SIZE, Sampling(steps=3), seeds=[8])
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=1e-5)


def test_rescale_brings_back_the_spread() -> None:
    """With full rescaling, the guided prediction for text alone has the standard deviation of the conditional
    prediction."""
    network, conditions = small_dit(), only(conditions_of(), "text")
    x, level = seeded_noise([1, 2], (CHANNELS, *SIZE)), 0.7
    with torch.no_grad():
        v = {}
        for name, text in (("none", False), ("text", True)):
            context = network.context_builder(conditions, flags(text, text), flags(False, False), 1.0)
            v[name] = network(x, torch.full((2,), level), context).velocity
    spread = {}
    for share in (0.0, 1.0):
        guided = Sampling(text_scale=8.0, text_rescale=share).combine(v, x, level, conditions)
        spread[share] = (x - level * guided).std(dim=(1, 2, 3))
    plain = (x - level * v["text"]).std(dim=(1, 2, 3))
    torch.testing.assert_close(spread[1.0], plain)
    assert (spread[0.0] / plain).min() > 1.05


def test_the_network_comes_back_in_its_mode() -> None:
    network = small_dit().train()
    sample(network, conditions_of(), SIZE, Sampling(steps=1), seeds=[1, 2])
    assert network.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.7, 0.2)}, "lower one first"),
        ({"text_scale": -1.0}, "not be negative"),
        ({"dino_rescale": 2.0}, "dino_rescale=2"),
        ({"solver": "rk4"}, "one of euler"),
        ({"steps": 0}, "1 to 10000 steps"),
        ({"steps": 999999999}, "1 to 10000 steps"),
        ({"timestep_shift": math.inf}, "timestep_shift=inf: must be a finite number"),
        ({"timestep_shift": math.nan}, "timestep_shift=nan: must be a finite number"),
        ({"text_scale": math.nan}, "text_scale=nan: must be a finite number"),
        ({"cls_scale": math.inf}, "cls_scale=inf: must be a finite number"),
        ({"guide_scale": 1e39}, "guide_scale=.*: must be a finite number up to 1000"),
        ({"guidance": "both"}, "guidance='both'"),
        ({"guidance": "dino_then_text", "full_scale": 1.0}, "full_scale=1.0 has no effect"),
        ({"cls_scale": -1.0}, "must not be negative"),
        ({"guide_scale": -1.0}, "must not be negative"),
        ({"guide_scale": 1.0, "guidance": "none"}, "guide_scale=1.0 has no effect"),
        ({"full_rescale": 0.5}, "full_rescale=0.5 has no effect with full_scale=0"),
        ({"text_scale": 0.0, "text_rescale": 0.5}, "text_rescale=0.5 has no effect with text_scale=0"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_term_that_is_left_out_takes_its_rescale_with_it() -> None:
    own = Sampling(text_rescale=0.5, dino_rescale=0.5)
    assert own.changed({"text_scale": 0.0}).text_rescale == 0.0
    assert own.replaced(dino_scale=0.0).dino_rescale == 0.0
    assert own.replaced(dino_scale=0.0, cls_scale=1.0).dino_rescale == 0.5
    with pytest.raises(ValueError, match=r"text_rescale=1\.0 has no effect with text_scale=0"):
        own.changed({"text_scale": 0.0, "text_rescale": 1.0})


@pytest.mark.parametrize("interval", [0.5, [0.5], [None, 1], ["a", "b"], [0.1, 0.2, 0.3]])
def test_intervals_that_are_none_are_named(interval: Any) -> None:
    with pytest.raises(ValueError, match=r"interval=.*: give two noise levels, \[LOWEST,HIGHEST\]"):
        Sampling().changed({"interval": interval})


def test_without_guidance_what_the_model_has_beside_it_falls_away() -> None:
    own = Sampling(guidance="independent", full_scale=1.0, guide_scale=0.4)
    assert own.changed({"guidance": "none"}) == replace(own, guidance="none", full_scale=0.0, guide_scale=0.0)
    with pytest.raises(ValueError, match=r"text_scale=2\.0: no effect with guidance=none"):
        own.changed({"guidance": "none", "text_scale": 2.0})


# ---- sequential guidance by one condition after the other, and images that are redrawn -------------------------------


def branch(network: PatchDiT, conditions: Conditions, x: Tensor, level: float, told: tuple[bool, bool, bool]) -> Tensor:
    keep = [flags(value, value) for value in told]
    context = network.context_builder(conditions, keep[0], keep[1], 1.0, keep[2])
    return network(x, torch.full((2,), level), context).velocity


NONE, TEXT, CLS, DINO = (False,) * 3, (True, False, False), (False, True, False), (False, True, True)
TEXT_CLS, FULL = (True, True, False), (True,) * 3


@pytest.mark.parametrize("attention", ["joint", "separate"])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"guidance": "dino_then_text"}, [(2.0, DINO, NONE), (3.0, FULL, DINO)]),
        ({"guidance": "text_then_dino"}, [(3.0, TEXT, NONE), (2.0, FULL, TEXT)]),
        ({"cls_scale": 1.5}, [(3.0, TEXT, NONE), (1.5, CLS, NONE), (2.0, DINO, CLS)]),
        ({"guidance": "dino_then_text", "cls_scale": 0.5}, [(0.5, CLS, NONE), (2.0, DINO, CLS), (3.0, FULL, DINO)]),
        (
            {"guidance": "text_then_dino", "cls_scale": 4.0},
            [(3.0, TEXT, NONE), (4.0, TEXT_CLS, TEXT), (2.0, FULL, TEXT_CLS)],
        ),
    ],
    ids=["DINO then text", "text then DINO", "CLS apart", "CLS, patches, text", "text, CLS, patches"],
)
def test_chained_guidance_by_hand(options: dict[str, Any], steps: list[Any], attention: Any) -> None:
    network, conditions = small_dit(patch_attention=attention), conditions_of()
    sampling = Sampling(text_scale=3.0, dino_scale=2.0, steps=2, **options)
    drawn = sample(network, conditions, SIZE, sampling, seeds=[4, 5])
    plain = sample(network, conditions, SIZE, sampling, seeds=[4, 5], **PLAIN)
    x = seeded_noise([4, 5], (CHANNELS, *SIZE))
    with torch.no_grad():
        for level in (1.0, 0.5):
            v = branch(network, conditions, x, level, NONE)
            for scale, told, untold in steps:
                pushed = branch(network, conditions, x, level, told) - branch(network, conditions, x, level, untold)
                v = v + scale * pushed
            x = x - 0.5 * v
    torch.testing.assert_close(drawn, x, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(plain, x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("given", ["both", "text", "dino"])
def test_autoguidance_by_hand(given: str) -> None:
    """Guidance away from another network's prediction with all conditions, in addition to the guidance by
    conditions."""
    network, guide, conditions = small_dit(), small_dit(seed=1), only(conditions_of(lengths=(3, 5)), given)
    sampling = Sampling(text_scale=3.0, dino_scale=2.0, steps=2, guide_scale=1.5, guidance="dino_then_text")
    batches = counted(guide)
    drawn = sample(network, conditions, SIZE, sampling, seeds=[4, 5], guide=guide)
    assert batches == [2, 2]
    plain = sample(network, conditions, SIZE, sampling, seeds=[4, 5], guide=guide, **PLAIN)
    everything = {"both": FULL, "text": TEXT, "dino": DINO}[given]
    x, usual = seeded_noise([4, 5], (CHANNELS, *SIZE)), replace(sampling, guide_scale=0.0)
    with torch.no_grad():
        for level in (1.0, 0.5):
            velocities = sampler.Velocities(network, conditions, 2, 1.0)(x, level, usual.branches(conditions, level))
            away = branch(network, conditions, x, level, everything) - branch(guide, conditions, x, level, everything)
            x = x - 0.5 * (usual.combine(velocities, x, level, conditions) + 1.5 * away)
    torch.testing.assert_close(drawn, x, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(plain, x, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="there is no guide"):
        sample(network, conditions, SIZE, sampling, seeds=[4, 5])


def test_a_guide_alone_costs_two_evaluations_and_one_that_is_the_network_changes_nothing() -> None:
    network, conditions = small_dit(), only(conditions_of(), "text")
    sampling = Sampling(text_scale=1.0, guide_scale=2.0, steps=3)
    assert sampling.evaluations(conditions) == 6
    guided = sample(network, conditions, SIZE, sampling, seeds=[1, 2], guide=network)
    usual = sample(network, conditions, SIZE, replace(sampling, guide_scale=0.0), seeds=[1, 2])
    torch.testing.assert_close(guided, usual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "options", "more"),
    [
        ("both", {"guidance": "dino_then_text"}, 1),
        ("both", {"guidance": "text_then_dino"}, 1),
        ("both", {"guidance": "independent"}, 2),
        ("both", {"guidance": "independent", "full_scale": 1.0}, 1),
        ("text", {"guidance": "independent"}, 1),
        ("dino", {"guidance": "independent"}, 1),
    ],
)
def test_a_guide_costs_what_the_page_says(given: str, options: dict[str, Any], more: int) -> None:
    """Its own prediction, and that of the network with all conditions where guidance does not need it otherwise."""
    conditions, sampling = only(conditions_of(), given), Sampling(steps=3, **options)
    guided = replace(sampling, guide_scale=0.4)
    assert guided.evaluations(conditions) - sampling.evaluations(conditions) == 3 * more
    page = " ".join((Path(__file__).parents[3] / "docs" / "patch_dit.md").read_text(encoding="utf-8").split())
    assert re.search(
        "one more evaluation per step, or two where .* `guidance=independent` on text and image together", page
    )


def test_equal_scales_one_after_the_other_are_guidance_on_both_together() -> None:
    """The branch between them cancels out and is not computed."""
    network, conditions = small_dit(), conditions_of()
    batches = counted(network)
    chained = sample(network, conditions, SIZE, Sampling(2.5, 2.5, steps=2, guidance="dino_then_text"), seeds=[1, 2])
    assert batches == [4, 4]
    joint = sample(network, conditions, SIZE, Sampling(0.0, 0.0, 2.5, steps=2), seeds=[1, 2])
    torch.testing.assert_close(chained, joint, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["text", "dino"])
def test_with_one_condition_the_order_of_guidance_is_of_no_account(given: str) -> None:
    network, conditions = small_dit(), only(conditions_of(), given)
    usual = sample(network, conditions, SIZE, Sampling(steps=2), seeds=[1, 2])
    for guidance in ("dino_then_text", "text_then_dino"):
        assert torch.equal(sample(network, conditions, SIZE, Sampling(steps=2, guidance=guidance), seeds=[1, 2]), usual)


@pytest.mark.parametrize("solver", ["euler", "heun", "adams_bashforth"])
def test_inpainting_keeps_what_is_not_masked(solver: Any) -> None:
    network, conditions = small_dit(), conditions_of()
    latents, mask = torch.randn(2, CHANNELS, *SIZE), torch.zeros(2, 1, *SIZE)
    mask[..., :4] = 1
    drawn = sample(network, conditions, SIZE, Sampling(steps=5, solver=solver), [1, 2], edit=Edit(latents, mask=mask))
    torch.testing.assert_close(drawn[..., 4:], latents[..., 4:], atol=1e-5, rtol=1e-5)
    assert (drawn[..., :4] - latents[..., :4]).abs().mean() > 0.1


def test_less_strength_stays_nearer_to_the_image_and_takes_fewer_steps() -> None:
    network, conditions, latents = small_dit(), conditions_of(), torch.randn(2, CHANNELS, *SIZE)
    far = []
    for strength, steps in ((0.1, 1), (0.5, 5), (1.0, 10)):
        batches = counted(network)
        drawn = sample(network, conditions, SIZE, Sampling(steps=10), [1, 2], edit=Edit(latents, strength))
        assert len(batches) == steps
        far.append(float((drawn - latents).pow(2).mean()))
    assert far[0] < far[1] < far[2]
    torch.testing.assert_close(drawn, sample(network, conditions, SIZE, Sampling(steps=10), [1, 2]))


def test_masked_patches_say_nothing() -> None:
    """The content of a masked patch does not matter; that of the other patches does."""
    network, conditions = small_dit(), conditions_of()
    assert conditions.patches is not None
    mask = torch.ones(conditions.patches.shape[:2], dtype=torch.bool)
    whole = sample(network, conditions, SIZE, Sampling(steps=2), [1, 2])
    assert torch.equal(sample(network, replace(conditions, patch_mask=mask), SIZE, Sampling(steps=2), [1, 2]), whole)
    mask[:, :4] = False
    other = conditions.patches.clone()
    other[:, :4] += 5
    masked = sample(network, replace(conditions, patch_mask=mask), SIZE, Sampling(steps=2), [1, 2])
    again = sample(network, replace(conditions, patches=other, patch_mask=mask), SIZE, Sampling(steps=2), [1, 2])
    assert torch.equal(masked, again)
    assert not torch.equal(masked, whole)


def test_each_condition_is_rescaled_on_its_own() -> None:
    conditions, x = conditions_of(), seeded_noise([1, 2], (CHANNELS, *SIZE))
    v = {name: seeded_noise([n, n + 1], (CHANNELS, *SIZE)) for n, name in enumerate(("none", "text", "dino"), 3)}

    def guided(*names: str, **scales: float) -> Tensor:
        return Sampling(**scales).combine({name: v[name] for name in names}, x, 0.7, conditions)

    text = guided("none", "text", text_scale=8.0, dino_scale=0.0, text_rescale=0.7)
    dino = guided("none", "dino", text_scale=0.0, dino_scale=5.0, dino_rescale=0.3)
    both = guided("none", "text", "dino", text_scale=8.0, dino_scale=5.0, text_rescale=0.7, dino_rescale=0.3)
    torch.testing.assert_close(both, text + dino - v["none"])
