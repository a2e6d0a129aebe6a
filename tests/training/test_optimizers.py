from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from vla_parts import small_module

from keygrip.models.backbone import DinoBackbone
from keygrip.training.muon import MuonAndAdamW
from keygrip.training.optimizers import AdamW


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)
        self.words = nn.Embedding(5, 4)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def groups_of(recipe: AdamW, module: nn.Module) -> dict[str, dict[str, object]]:
    """Return learning rate and weight decay by parameter name."""
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, dict[str, object]] = {}
    for group in recipe.parameter_groups(module):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    return found


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    found = groups_of(AdamW(lr=1.0, weight_decay=0.1), Network())
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.1}
    assert decayed == {"backbone.0.weight", "head.weight"}
    assert set(found) == {name for name, p in Network().named_parameters() if p.requires_grad}


def test_learned_tokens_of_the_pointed_places_do_not_decay() -> None:
    network = small_module(pointing_cells=2, pointed_tokens=True).network
    found = groups_of(AdamW(lr=1.0, weight_decay=0.1), network)
    pointed = {name: group["weight_decay"] for name, group in found.items() if name.startswith("pointed.")}
    matrices = {name for name, parameter in network.named_parameters() if parameter.ndim == 2} & pointed.keys()
    tokens = {"pointed.slots", "pointed.views"}
    assert {name for name in matrices if pointed[name] == 0.0} == tokens < matrices


def test_multipliers_apply_to_a_part_wherever_it_is_nested() -> None:
    outer = nn.ModuleDict({"network": Network()})
    found = groups_of(AdamW(lr=2.0, lr_multipliers={"backbone": 0.1, "backbone.1": 0.5}), outer)
    assert found["network.backbone.0.weight"]["lr"] == pytest.approx(0.2)
    assert found["network.backbone.1.weight"]["lr"] == pytest.approx(1.0)
    assert found["network.head.weight"]["lr"] == 2.0


def test_a_multiplier_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="'bakbone'"):
        AdamW(lr=1.0, lr_multipliers={"bakbone": 0.1}).parameter_groups(Network())


def test_a_multiplier_of_a_frozen_part_has_no_effect_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """For example in the recipe of a stage whose encoder the user freezes."""
    network = backbone_and_head("frozen")
    recipe, plain = AdamW(2.0, lr_multipliers={"backbone": 0.1, "head": 0.5}), AdamW(2.0, lr_multipliers={"head": 0.5})
    with caplog.at_level(logging.INFO):
        recipe.check(network, endless=False)
        assert groups_of(recipe, network) == groups_of(plain, network)
    assert caplog.messages == ["optimizer.lr_multipliers of backbone: no effect, nothing of it is trained"]
    with pytest.raises(ValueError, match="'bakbone'"):
        AdamW(2.0, lr_multipliers={"bakbone": 0.1}).check(network, endless=False)
    shadowed = AdamW(2.0, lr_multipliers={"head": 0.5, "head.weight": 0.1, "head.bias": 0.1})
    with pytest.raises(ValueError, match="'head'"):
        shadowed.check(network, endless=False)


def test_a_multiplier_of_none_is_none() -> None:
    """An ablation sets None for a part that its network does not have."""
    multipliers = {"backbone": None, "query_path": None, "head": 0.5}
    assert groups_of(AdamW(2.0, lr_multipliers=multipliers), Network()) == groups_of(
        AdamW(2.0, lr_multipliers={"head": 0.5}), Network()
    )


def test_nested_multipliers_are_dotted_names() -> None:
    """The command line gives them for `optimizer.lr_multipliers.backbone.0=0.1`."""
    nested = {"backbone": {0: 0.1, "1": {"weight": 0.5}}, "head": None}
    assert groups_of(AdamW(2.0, lr_multipliers=nested), Network()) == groups_of(
        AdamW(2.0, lr_multipliers={"backbone.0": 0.1, "backbone.1.weight": 0.5}), Network()
    )
    with pytest.raises(ValueError, match=r"lr_multipliers\.backbone\.0=-1"):
        AdamW(2.0, lr_multipliers={"backbone": {"0": -1.0}})
    for wrong in ("fast", [1], True):
        with pytest.raises(ValueError, match=r"lr_multipliers\.backbone="):
            AdamW(2.0, lr_multipliers={"backbone": wrong})


def backbone_and_head(trainable: str | int = "all") -> nn.ModuleDict:
    small = {"width": 16, "depth": 3, "heads": 1}
    backbone = DinoBackbone("dinov3_vits16", image_size=32, weights="random", trainable=trainable, **small)
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(16, 2)})


@pytest.mark.parametrize("recipe", [AdamW, partial(MuonAndAdamW, matrices_of=("backbone.net.blocks",))])
def test_learning_rates_fall_towards_the_image_with_layer_decay(recipe: Callable[..., AdamW]) -> None:
    network = backbone_and_head()
    multipliers = {"backbone.net.blocks.1.mlp": 0.1}
    found = recipe(lr=2.0, layer_decay=0.5, lr_multipliers=multipliers).configure(network, 100)["optimizer"]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rates = {names[id(parameter)]: group["initial_lr"] for group in found.param_groups for parameter in group["params"]}
    expected = dict.fromkeys(rates, 2.0)
    for name in rates:
        if name.startswith("backbone.net.blocks."):
            expected[name] = 2.0 * 0.5 ** (3 - int(name.split(".")[3]))
        elif name.startswith("backbone.") and ".norm." not in name:
            expected[name] = 2.0 * 0.5**4
        if ".blocks.1.mlp." in name:
            expected[name] *= 0.1
    assert set(rates) == set(names.values())
    assert rates == pytest.approx(expected)
    assert {0.125, 0.25, 0.5, 1.0, 2.0} <= {round(rate, 6) for rate in rates.values()}
    labels = [group["name"] for group in found.param_groups]
    assert len(set(labels)) == len(labels), "the monitor of learning rates wants different names"


def test_layer_decay_of_one_and_of_last_blocks() -> None:
    network = backbone_and_head(trainable=1)
    assert groups_of(AdamW(2.0, layer_decay=1.0), network) == groups_of(AdamW(2.0), network)
    rates = {name: group["lr"] for name, group in groups_of(AdamW(2.0, layer_decay=0.5), network).items()}
    assert {rate for name, rate in rates.items() if ".blocks." in name} == {1.0}
    assert all(".blocks.2." in name for name in rates if ".blocks." in name)


def test_layer_decay_without_a_trained_backbone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer_decay has no effect: the backbone is frozen"):
        AdamW(2.0, layer_decay=0.5).check(backbone_and_head("frozen"), endless=False)
    with pytest.raises(ValueError, match=r"layer_decay has no effect: this model has no image backbone"):
        AdamW(2.0, layer_decay=0.5).parameter_groups(Network())


def test_a_run_with_layer_decay_goes_on_with_the_groups_that_it_had() -> None:
    recipe = AdamW(lr=2.0, layer_decay=0.5)
    before, after = (recipe.configure(backbone_and_head(), 100)["optimizer"] for _ in range(2))
    after.load_state_dict(before.state_dict())
    assert [(group["name"], len(group["params"])) for group in after.param_groups] == [
        (group["name"], len(group["params"])) for group in before.param_groups
    ]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        AdamW(lr=1.0).parameter_groups(Network().requires_grad_(False))


def test_schedule_warms_up_linearly_and_ends_at_its_share() -> None:
    recipe = AdamW(lr=2.0, warmup_steps=4, final_lr_share=0.1)
    module = nn.Linear(2, 1)
    configured = recipe.configure(module, 100)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[52] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)


@pytest.mark.parametrize("now", [10, 100])
def test_a_resumed_run_follows_the_schedule_of_its_present_length(now: int) -> None:
    recipe = AdamW(lr=2.0, lr_multipliers={"head": 0.5})

    def start(total: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        configured = recipe.configure(Network(), total)
        return configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def share_at(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / now))

    (before, its_rates), (optimizer, rates) = start(10), start(now)
    for _ in range(8):
        before.step()
        its_rates.step()
    optimizer.load_state_dict(before.state_dict())
    rates.load_state_dict(its_rates.state_dict())
    for step in range(8, 10):
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found["rest"] == pytest.approx(2.0 * share_at(step))
        assert found["head"] == pytest.approx(1.0 * share_at(step))
        optimizer.step()
        rates.step()


def test_warmup_is_shortened_in_a_short_run() -> None:
    scheduler = AdamW(lr=1.0, warmup_steps=150).configure(nn.Linear(2, 1), 20)["lr_scheduler"]["scheduler"]
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5)


def test_a_cosine_needs_an_end_and_a_constant_rate_does_not() -> None:
    with pytest.raises(ValueError, match="max_steps or max_epochs"):
        AdamW(lr=1.0).configure(nn.Linear(2, 1), math.inf)
    scheduler = AdamW(lr=1.0, schedule="constant").configure(nn.Linear(2, 1), math.inf)["lr_scheduler"]["scheduler"]
    assert scheduler.lr_lambdas[0](10**6) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        *({"lr": 0.0}, {"schedule": "linear"}, {"clip_norm": 0.0}, {"warmup_steps": -1}, {"final_lr_share": 2.0}),
        *({"betas": (0.9, 1.5)}, {"lr_multipliers": {"head": -1.0}}, {"lr_multipliers": {"head": math.nan}}),
        *({"layer_decay": 0.0}, {"layer_decay": 1.5}, {"layer_decay": math.nan}),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdamW(**({"lr": 1.0} | settings))  # type: ignore[arg-type]
