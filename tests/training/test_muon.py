"""Muon with AdamW: which parameters each updates, the effect of a step, and that the state is saved and loaded."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from keygrip import train
from keygrip.config import compose
from keygrip.data.robot.recordings import Recording
from keygrip.training import strategies
from keygrip.training.muon import Float32Muon, MuonAndAdamW, MuonWithAdamW, orthogonalised
from keygrip.training.optimizers import AdamW
from keygrip.training.pretraining import PretrainingStage


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 12))
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 6), blocks=layers, last=nn.Linear(12, 2)))


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (module(x) - 1).pow(2).mean().backward()
        optimizer.step()


def optimizer_of(module: nn.Module, **options: object) -> MuonWithAdamW:
    recipe = MuonAndAdamW(lr=1e-2, weight_decay=0.1, schedule="constant", **options)  # type: ignore[arg-type]
    optimizer = recipe.configure(module, 100)["optimizer"]
    assert isinstance(optimizer, MuonWithAdamW)
    return optimizer


def test_hidden_matrices_are_muons_and_the_rest_adamws() -> None:
    module = network()
    optimizer = optimizer_of(module)
    names = {id(p): name for name, p in module.named_parameters()}
    by_kind: dict[str, set[str]] = {"matrices": set(), "rest": set()}
    for group in optimizer.param_groups:
        by_kind[group["kind"]] |= {names[id(p)] for p in group["params"]}
    assert by_kind["matrices"] == {"blocks.0.weight", "blocks.2.weight"}
    assert by_kind["rest"] == set(names.values()) - by_kind["matrices"]


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), MuonAndAdamW(lr=1e-2)], ids=["adamw", "muon"])
def test_a_dry_run_counts_the_moments_that_the_optimizer_keeps(recipe: AdamW) -> None:
    module = network()
    module.get_submodule("first").requires_grad_(False)
    optimizer = recipe.configure(module, 100)["optimizer"]
    trained(module, optimizer, 1)
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert recipe.moments(module) == sum(value.numel() for value in kept)


def test_a_step_of_muon_is_orthogonal_and_of_adamws_size() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    recipe = MuonAndAdamW(lr=1e-2, schedule="constant")
    trained(module, recipe.configure(module, 100)["optimizer"], 1)
    change = module.state_dict()["blocks.0.weight"] - before["blocks.0.weight"]
    values = torch.linalg.svdvals(change)
    # The layer norm removes one direction from the gradient. The other singular values become similar in size; in the
    # gradient itself they differ by orders of magnitude.
    assert values[0] / values[-2] < 2
    assert change.pow(2).mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_the_rest_steps_as_with_adamw_alone() -> None:
    module, other = network(), network()
    trained(module, optimizer_of(module), 1)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    trained(other, plain, 1)
    torch.testing.assert_close(module.state_dict()["first.bias"], other.state_dict()["first.bias"])
    assert not torch.allclose(module.state_dict()["blocks.0.weight"], other.state_dict()["blocks.0.weight"])


def test_state_is_saved_and_loaded() -> None:
    whole, part = network(), network()
    optimizer = optimizer_of(whole)
    trained(whole, optimizer, 3)
    first = optimizer_of(part)
    trained(part, first, 2, seed=1)
    saved = copy.deepcopy((part.state_dict(), first.state_dict()))
    resumed = network(seed=5)
    resumed.load_state_dict(saved[0])
    again = optimizer_of(resumed)
    again.load_state_dict(saved[1])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 4, generator=generator)
    again.zero_grad()
    (resumed(x) - 1).pow(2).mean().backward()
    again.step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_the_schedule_reaches_both() -> None:
    module = network()
    configured = MuonAndAdamW(lr=1e-2, schedule="constant", warmup_steps=4, matrix_lr_multiplier=2.0).configure(
        module, 100
    )
    rates = {group["kind"]: group["lr"] for group in configured["optimizer"].param_groups}
    assert rates == pytest.approx({"matrices": 2e-2 / 4, "rest": 1e-2 / 4})
    trained(module, configured["optimizer"], 1)
    configured["lr_scheduler"]["scheduler"].step()
    rates = {group["kind"]: group["lr"] for group in configured["optimizer"].param_groups}
    assert rates == pytest.approx({"matrices": 2e-2 / 2, "rest": 1e-2 / 2})


def test_nothing_for_muon_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable matrix"):
        optimizer_of(network(), matrices_of=("layers",))


@pytest.mark.parametrize("setting", [{"momentum": 1.5}, {"momentum": -0.1}, {"matrix_lr_multiplier": -1.0}])
def test_settings_of_muon_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(setting))}="):
        MuonAndAdamW(lr=1.0, **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("bf16", [True, False])
def test_the_iteration_is_in_float32_where_bfloat16_would_be_slower(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "cpu_is_faster_in_bf16", lambda: bf16)
    assert isinstance(optimizer_of(network())._parts["matrices"], Float32Muon) != bf16
    for iteration, float32 in (("float32", True), ("bfloat16", False)):
        chosen = optimizer_of(network(), iteration=iteration)
        assert isinstance(chosen._parts["matrices"], Float32Muon) == float32
    with pytest.raises(ValueError, match="must be auto, bfloat16 or float32"):
        MuonAndAdamW(lr=1e-3, iteration="float16")


def test_the_iteration_in_float32_is_torchs_within_bfloat16() -> None:
    """It is compared with torch's Muon, which computes in bfloat16, on the same gradients; then each continues from the
    other's state."""
    options = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = (nn.Parameter(torch.zeros(6, 9)) for _ in range(2))
    optimizers = [Float32Muon([ours], **options), torch.optim.Muon([theirs], **options)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for _ in range(3):
            gradient = torch.randn(6, 9, generator=generator)
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        for optimizer, state in zip(optimizers, reversed(states), strict=True):
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (16, 40), (40, 16), (8, 48), (1, 5)])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_iteration_by_gram_matrices_is_the_plain_one(shape: tuple[int, int], rank: int | None, steps: int) -> None:
    """Wide and tall matrices, of full and of low rank, are compared with the quintic iteration as written, in
    float64."""
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    if rank is not None:
        left, right = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((shape[0], 2), (2, shape[1])))
        matrix = left @ right
    expected = matrix / matrix.norm()
    for _ in range(steps):
        gram = expected @ expected.T
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    torch.testing.assert_close(orthogonalised(matrix, coefficients, steps), expected.float(), atol=1e-4, rtol=0)


def test_a_gradient_of_zeros_makes_no_step_of_muon() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 12), (3.4445, -4.775, 2.0315), 5), torch.zeros(3, 12))


@pytest.mark.parametrize("iteration", ["bfloat16", "float32"])
def test_a_step_with_a_closure_is_the_step_after_its_backward_pass(iteration: str) -> None:
    """The closure is called once, with gradients enabled, and the step returns its loss."""
    plain, closed = network(), network()
    x, losses = torch.randn(8, 4), []

    def closure() -> torch.Tensor:
        losses.append((closed(x) - 1).pow(2).mean())
        losses[-1].backward()
        return losses[-1]

    loss = (plain(x) - 1).pow(2).mean()
    loss.backward()
    optimizers = [optimizer_of(module, iteration=iteration) for module in (plain, closed)]
    assert optimizers[0].step() is None
    with torch.no_grad():
        returned = optimizers[1].step(closure)
    assert returned is losses[0]
    assert len(losses) == 1
    assert torch.equal(returned, loss)
    for one, other in zip(plain.parameters(), closed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_torchs_muon_in_float32_takes_a_closure_and_its_options() -> None:
    options = {"lr": 1e-2, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}
    ours, theirs = (nn.Parameter(torch.eye(3, 4)) for _ in range(2))
    optimizers = [Float32Muon([ours], **options), torch.optim.Muon([theirs], **options)]  # type: ignore[arg-type]
    for seed in range(2):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            factor = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))

            def closure(parameter: nn.Parameter = parameter, factor: torch.Tensor = factor) -> torch.Tensor:
                parameter.grad = None
                loss = (parameter * factor).sum()
                loss.backward()
                return loss

            before = (parameter.detach() * factor).sum()
            assert torch.equal(optimizer.step(closure), before)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="adjust_lr_fn"):
        Float32Muon([ours], lr=1e-2).step()


def test_groups_have_names_of_their_own() -> None:
    """Lightning's monitor of learning rates rejects equal names."""
    names = [group["name"] for group in optimizer_of(network()).param_groups]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_sharding_is_refused_before_stages_are_trained_and_data_drawn(
    dry_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, name in ((PretrainingStage, "complete"), (PretrainingStage, "require"), (Recording, "complete")):
        monkeypatch.setattr(part, name, lambda self: pytest.fail("it began"))
    fsdp = ["strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=2"]
    settings = ["experiment=vla_yam_language", *fsdp, f"dry_run={dry_run}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="Muon needs whole matrices and strategy=fsdp divides them: use strategy=ddp"):
        train.run(compose("train", settings))
