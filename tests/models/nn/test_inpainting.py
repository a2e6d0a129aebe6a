"""Guided sampling compared with closed-form results."""

from __future__ import annotations

import math

import torch

from keygrip.models.nn.flow_matching import integrate, noise_levels
from keygrip.models.nn.inpainting import guided_velocity, soft_mask


def test_soft_mask_is_the_papers() -> None:
    weight = soft_mask(8, 2, 6)
    expected = [1.0, 1.0]
    for index in range(2, 6):
        c = (6 - index) / (6 - 2 + 1)
        expected.append(c * math.expm1(c) / (math.e - 1))
    torch.testing.assert_close(weight, torch.tensor([*expected, 0.0, 0.0]))
    assert (soft_mask(4, 4, 4) == 1).all()


def test_guidance_continues_what_is_fixed_and_stays_with_the_model() -> None:
    """The data is a random walk with steps of 0.02 around a common normal offset: the known start determines the
    rest."""
    torch.manual_seed(0)
    steps = 8
    covariance = torch.ones(steps, steps) + 4e-4 * torch.eye(steps)

    def velocity(x: torch.Tensor, level: float) -> torch.Tensor:
        # E[noise - data | x] of jointly normal variables
        total = (1 - level) ** 2 * covariance + level**2 * torch.eye(steps)
        gain = (level * torch.eye(steps) - (1 - level) * covariance) @ torch.linalg.inv(total)
        return (gain @ x[..., 0, None])[..., 0][..., None]

    noise, known = torch.randn(64, steps, 1), torch.full((64, steps, 1), 1.5)
    weight = soft_mask(steps, 2, 5)
    levels = noise_levels(20)
    free = integrate(velocity, noise, levels)
    led = integrate(guided_velocity(velocity, known, weight), noise, levels)
    assert (free - known)[:, :2].abs().mean() > 1.0
    assert (led - known)[:, :2].abs().mean() < 0.1
    assert (led - known)[:, 5:].abs().mean() < 0.15  # nothing fixed these steps: the model's correlation did
    unled = integrate(guided_velocity(velocity, known, torch.zeros(steps)), noise, levels)
    torch.testing.assert_close(unled, free)
