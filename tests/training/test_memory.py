"""Memory of a step: the count without computation is the same as that of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from keygrip.models.nn import attention
from keygrip.models.nn.attention import Attention
from keygrip.models.nn.processor_attention import float32_attention
from keygrip.training.memory import SMALL, Step, StepMemory, count_forward, count_step, measure_step
from keygrip.training.system import parameters_m


def allocated(step: Step) -> int:
    """Return the peak number of bytes that torch's allocator gave out during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(lambda tensor: tensor).backward()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_counted_is_what_a_step_takes(recompute: bool) -> None:
    blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)]
    network, batch = nn.ModuleList(blocks), torch.randn(256, 32)

    def step(of_batch: object) -> Tensor:
        hidden = of_batch(batch)  # type: ignore[operator]
        for block in network:
            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
        return hidden.square().mean()

    counted = count_step(network, step, bf16=False, ema=True)
    assert all(p.grad is None and type(p) is nn.Parameter for p in network.parameters())
    taken = allocated(step) + batch.nbytes  # a real batch is there before the step
    assert counted.step == (pytest.approx(taken, rel=0.04) if recompute else taken)  # checkpoints keep generator states
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert (counted.weights, counted.optimizer, counted.ema) == (weights, 2 * weights, weights)
    assert counted.total == 4 * weights + counted.step
    assert not counted.measured


@pytest.mark.parametrize(("width", "rows", "last"), [(256, 64, 256), (32, 1024, 32), (32, 256, 4096)])
def test_the_second_batch_of_a_step_finds_gradients_of_the_first(width: int, rows: int, last: int) -> None:
    """With wide layers, whose gradients are most of it; with narrow layers and large activations; and with many
    classes, where the peak comes after the forward pass, when the gradients of the scores exist too."""
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(6)]
    network = nn.Sequential(*layers, nn.Linear(width, last))
    batch = torch.randn(rows, width)

    def step(of_batch: object) -> Tensor:
        return network(of_batch(batch)).square().mean()  # type: ignore[operator, no-any-return]

    step(lambda tensor: tensor).backward()
    gradients = sum(p.numel() * 4 for p in network.parameters())
    taken = allocated(step) + batch.nbytes + gradients
    network.zero_grad(set_to_none=True)
    first = count_step(network, step, bf16=False, ema=False).step
    second = count_step(network, step, bf16=False, ema=False, accumulated=True).step
    assert first <= second <= first + gradients
    assert second == pytest.approx(taken, rel=0.01)


def test_under_autocast_each_use_of_a_weight_makes_a_copy_as_in_training() -> None:
    """In Lightning's trainer, torch does not cache the copy for the next use of the same weight."""
    layer, batch = nn.Linear(2048, 2048, bias=False), torch.randn(4, 2048)

    def step(of_batch: object) -> Tensor:
        return layer(layer(of_batch(batch))).square().mean()  # type: ignore[operator, no-any-return]

    def trained(of_batch: object) -> Tensor:
        with MixedPrecision("bf16-mixed", "cpu").autocast_context_manager():
            return step(of_batch)

    taken = allocated(trained) + batch.nbytes
    # with shapes alone, gradients of two uses are not added in place
    assert taken <= count_step(layer, step, bf16=True, ema=False).step < 1.25 * taken


def test_attention_is_counted_as_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 it uses the fused kernel. A CPU trains attention in float32, whose copies are not in a GPU's memory."""
    network, batch = Attention(64, heads=2), torch.randn(4, 256, 64)

    def counted() -> int:
        return count_step(network, lambda change: network(change(batch)).square().mean(), bf16=True, ema=False).step

    def plain(*operands: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*operands, **options)

    used, found = counted(), list[int]()
    for other in (F.scaled_dot_product_attention, plain, float32_attention):
        monkeypatch.setattr(attention, "training_attention", other)
        found.append(counted())
    fused, by_products, in_float32 = found
    assert used == fused < min(by_products, in_float32)


class Pieces(nn.Module):
    """Its shapes depend on the content of the batch, like those of a tower that reads images of many sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("longest", torch.tensor(40))

    def forward(self, x: Tensor, lengths: Tensor, kept: Tensor) -> Tensor:
        order = torch.argsort(lengths, descending=True)
        assert int(lengths[order[0]]) <= int(self.longest)  # type: ignore[arg-type]
        pieces = [self.layer(piece).relu() for piece in torch.split(x, lengths.tolist())]
        return torch.cat(pieces)[kept].square().mean()


def test_shapes_may_depend_on_small_tensors() -> None:
    network, rows = Pieces(), torch.randn(100, 32)
    lengths, kept = torch.tensor([40, 25, 35]), torch.arange(100) % 2 == 0

    def step(of_batch: object) -> Tensor:
        return network(of_batch(rows), of_batch(lengths), of_batch(kept))  # type: ignore[operator]

    state = torch.get_rng_state()
    counted = count_step(network, step, bf16=False, ema=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(network.longest) == 40  # type: ignore[arg-type]
    assert counted.step == pytest.approx(allocated(step) + rows.nbytes, rel=0.04)


def test_a_forward_pass_alone_keeps_no_activations() -> None:
    network = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4))
    batch = torch.randn(256, 32)

    def forward(change: object) -> Tensor:
        hidden = change(batch)  # type: ignore[operator]
        for block in network:
            hidden = block(hidden)
        return hidden

    found = count_forward(network, forward)
    # the batch, the input of a block, and the input and output of GELU
    assert found.step == pytest.approx(4 * 256 * (32 + 32 + 128 + 128), rel=0.05)
    assert (found.optimizer, found.ema, found.weights) == (0, 0, sum(4 * p.numel() for p in network.parameters()))


class BesideAnother(nn.Module):
    """A trained layer on the features of a frozen one that is no submodule."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(2048, 8)
        self.frozen = [frozen]

    def outside_modules(self) -> list[nn.Module]:
        return self.frozen

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen[0].weight.device != x.device:
            self.frozen[0].to(x.device)
        with torch.no_grad():
            features = self.frozen[0](x)
        return self.layer(features).square().mean()


def test_weights_outside_of_a_module_are_counted_once_and_on_every_process() -> None:
    frozen = nn.Linear(1024, 2048).requires_grad_(False)  # more numbers than are computed for real
    assert frozen.weight.numel() > SMALL
    before = frozen.weight
    network, rows = BesideAnother(frozen), torch.randn(64, 1024)

    def step(of_batch: object) -> Tensor:
        return network(of_batch(rows))  # type: ignore[operator]

    counted = count_step(network, step, bf16=False, ema=True)
    own, outside = (4 * sum(p.numel() for p in part.parameters()) for part in (network, frozen))
    assert (counted.weights, counted.undivided, counted.optimizer, counted.ema) == (
        own + outside,
        outside,
        2 * own,
        own,
    )
    assert counted.step == allocated(step) + rows.nbytes, "the frozen weights are no part of the step"
    assert frozen.weight is before
    assert network.frozen[0].weight.requires_grad is False
    assert counted.divided(2).weights == own / 2 + outside
    alone = count_forward(network, step)
    assert (alone.weights, alone.undivided) == (own + outside, outside)
    assert parameters_m(nn.ModuleDict({"network": network}))["network"] == {
        "all": round((own + outside) / 4e6, 3),
        "trained": round(own / 4e6, 3),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_outside_of_a_module_are_measured_once() -> None:
    frozen = nn.Linear(1024, 2048).requires_grad_(False)
    network, rows = BesideAnother(frozen).to("cuda"), torch.randn(64, 1024)
    found = [measure_step(network, lambda change: network(change(rows)), bf16=False, ema=False) for _ in range(2)]
    assert found[0].undivided == 4 * sum(p.numel() for p in frozen.parameters())
    assert found[0].weights == found[1].weights
    assert found[0].step < found[0].undivided, "which were brought to the GPU before it"


def test_weights_moments_and_ema_are_divided_over_processes_and_a_step_is_not() -> None:
    whole = StepMemory(weights=10, optimizer=20, ema=9, step=7, measured=False)
    assert whole.divided(4) == StepMemory(weights=3, optimizer=5, ema=3, step=7, measured=False)
    assert whole.divided(1) == whole


def test_what_a_run_keeps_beside_is_told() -> None:
    whole = StepMemory(weights=2**30, optimizer=0, ema=0, step=2**30, measured=False, cache=2**31)
    assert whole.total == 2**32
    assert whole.report()["cache_gib"] == 2
    assert whole.divided(4).cache == 2**31  # each process has its own
    assert "cache_gib" not in StepMemory(weights=1, optimizer=0, ema=0, step=1, measured=False).report()
