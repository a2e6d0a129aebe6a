"""The factorised volume against the dense volume: loss, gradient, argmax, sampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from keygrip.models.volume_query.volume import (
    BilinearCoupling,
    VolumeLogits,
    argmax_voxel,
    bilinear_target,
    hard_target,
    pixel_entropy,
    sample_voxel,
    soft_argmax,
    two_hot,
    volume_cross_entropy,
)

B, T, Z, H, W, R = 2, 3, 5, 7, 6, 2


def random_logits(coupled: bool, seed: int = 0) -> VolumeLogits:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    coupling = BilinearCoupling(draw(B, T, R, H, W), draw(R, Z)) if coupled else None
    return VolumeLogits(draw(B, T, H, W), draw(B, T, Z), draw(B, T), coupling)


def leaves(logits: VolumeLogits) -> list[torch.Tensor]:
    found = [logits.pixel, logits.height]
    if isinstance(logits.voxel, BilinearCoupling):
        found += [logits.voxel.pixel_factor, logits.voxel.height_factor]
    return found


@pytest.mark.parametrize("coupled", [False, True])
def test_hard_loss_and_gradient_equal_the_dense_reference(coupled: bool) -> None:
    logits = random_logits(coupled)
    cells = torch.stack([torch.randint(0, H, (B, T)), torch.randint(0, W, (B, T))], dim=-1)
    heights = torch.randint(0, Z, (B, T))
    weights = torch.rand(B, T, dtype=torch.float64)  # unequal weights: a gradient scaled wrongly in one step would show
    flat_target = (heights * H + cells[..., 0]) * W + cells[..., 1]
    dense = F.cross_entropy(logits.dense().flatten(2).flatten(0, 1), flat_target.flatten(), reduction="none").view(B, T)
    fast = volume_cross_entropy(logits, hard_target(cells, heights))
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)
    dense_grads = torch.autograd.grad((dense * weights).sum(), leaves(logits))
    fast_grads = torch.autograd.grad((fast * weights).sum(), leaves(logits))
    for ours, reference in zip(fast_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("coupled", [False, True])
def test_soft_loss_and_gradient_equal_the_dense_reference(coupled: bool) -> None:
    logits = random_logits(coupled, seed=1)
    position = torch.rand(B, T, 2, dtype=torch.float64) * torch.tensor([W, H])
    height = torch.rand(B, T, dtype=torch.float64) * Z
    target = bilinear_target(position, height, (H, W), Z)
    dense_target = torch.zeros(B, T, Z, H, W, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for cell, weight in zip(target.cells[b, t], target.cell_weights[b, t], strict=True):
                for z, z_weight in zip(target.heights[b, t], target.height_weights[b, t], strict=True):
                    dense_target[b, t, z, cell[0], cell[1]] += weight * z_weight
    torch.testing.assert_close(dense_target.sum((2, 3, 4)), torch.ones(B, T, dtype=torch.float64))
    dense = -(dense_target.flatten(2) * F.log_softmax(logits.dense().flatten(2), -1)).sum(-1)
    fast = volume_cross_entropy(logits, target)
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)
    for ours, reference in zip(
        torch.autograd.grad(fast.sum(), leaves(logits)), torch.autograd.grad(dense.sum(), leaves(logits)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


def test_bf16_autocast_rounds_no_logit() -> None:
    """The normaliser, its gradient and the decoded values are computed from the same float32 logits."""
    logits = random_logits(coupled=True).map(lambda part: part.float())
    cells = torch.stack([torch.randint(0, H, (B, T)), torch.randint(0, W, (B, T))], dim=-1)
    target = hard_target(cells, torch.randint(0, Z, (B, T)))
    leaf = logits.map(lambda part: part.detach().clone().requires_grad_())
    plain = [volume_cross_entropy(leaf, target), leaf.pixel_marginal(), leaf.dense(), *argmax_voxel(leaf)]
    plain[0].sum().backward()
    again = logits.map(lambda part: part.detach().clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        found = [volume_cross_entropy(again, target), again.pixel_marginal(), again.dense(), *argmax_voxel(again)]
        found[0].sum().backward()
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(leaves(again), leaves(leaf), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_constant_term_cancels() -> None:
    logits = random_logits(coupled=False)
    target = hard_target(torch.zeros(B, T, 2, dtype=torch.long), torch.zeros(B, T, dtype=torch.long))
    loss = volume_cross_entropy(logits, target).sum()
    (gradient,) = torch.autograd.grad(loss, [logits.constant], allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("coupled", [False, True])
def test_argmax_equals_dense(coupled: bool) -> None:
    for seed in range(20):
        logits = random_logits(coupled, seed)
        cells, heights = argmax_voxel(logits)
        index = logits.dense().flatten(2).argmax(-1)
        assert torch.equal((heights * H + cells[..., 0]) * W + cells[..., 1], index)


@pytest.mark.parametrize("coupled", [False, True])
def test_samples_follow_the_dense_distribution(coupled: bool) -> None:
    draws = 40_000
    one = random_logits(coupled, seed=3)
    coupling = None
    if isinstance(one.voxel, BilinearCoupling):
        factor = one.voxel.pixel_factor[0, 0].detach().expand(draws, R, H, W)
        coupling = BilinearCoupling(factor, one.voxel.height_factor.detach())
    single = VolumeLogits(
        one.pixel[0, 0].detach().expand(draws, H, W),
        one.height[0, 0].detach().expand(draws, Z),
        torch.zeros(draws),
        coupling,
    )
    cells, heights = sample_voxel(single, torch.Generator().manual_seed(0))
    index = (heights * H + cells[..., 0]) * W + cells[..., 1]
    frequency = torch.bincount(index, minlength=Z * H * W) / draws
    expected = one.dense()[0, 0].detach().flatten().softmax(-1)
    # The total variation of an empirical distribution over 210 voxels from 40 000 samples is about 0.02.
    assert float((frequency - expected).abs().sum() / 2) < 0.04


@pytest.mark.parametrize("coupled", [False, True])
def test_marginal_and_entropy_equal_dense(coupled: bool) -> None:
    logits = random_logits(coupled, seed=5)
    dense = logits.dense().flatten(2).softmax(-1).view(B, T, Z, H, W).sum(2).flatten(2)
    torch.testing.assert_close(logits.pixel_marginal().flatten(2).softmax(-1), dense)
    entropy = -(dense * dense.log()).sum(-1) / torch.log(torch.tensor(float(H * W)))
    torch.testing.assert_close(pixel_entropy(logits), entropy, check_dtype=False)


def test_soft_argmax_finds_a_sub_cell_peak() -> None:
    x, y, z = 3.3, 2.75, 2.6  # corner convention: between the centres 2.5 and 3.5, 2.5 and 3.5, 2.5 and 3.5
    target = bilinear_target(torch.tensor([[x, y]]), torch.tensor([z]), (H, W), Z)
    pixel = torch.full((1, H, W), -30.0)
    pixel[0, target.cells[0, :, 0], target.cells[0, :, 1]] = target.cell_weights[0].log()
    height = torch.full((1, Z), -30.0)
    height[0, target.heights[0]] = target.height_weights[0].log()
    logits = VolumeLogits(pixel, height, torch.zeros(1))
    position, height_position = soft_argmax(logits, argmax_voxel(logits)[0], window=1)
    torch.testing.assert_close(position, torch.tensor([[x, y]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(height_position, torch.tensor([z]), atol=1e-4, rtol=0)


def test_two_hot_puts_all_mass_on_the_outer_bins_beyond_their_centres() -> None:
    bins, weights = two_hot(torch.tensor([0.2, 0.5, 1.0, 4.9]), 5)
    mass = torch.zeros(4, 5).scatter_add_(1, bins, weights)
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    torch.testing.assert_close(mass, expected)
