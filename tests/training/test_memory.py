"""Memory of a step: what is counted without computing is what a real step takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from keygrip.training.memory import Step, count_step


def allocated(step: Step) -> int:
    """The most bytes that torch's allocator gave out during a step, beyond those before it."""
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
