"""Flow matching: the convention, timesteps, and the order of the solvers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from keygrip.models.nn import flow_matching as flow


def test_path_and_velocity_agree() -> None:
    """The velocity is the derivative of the path, whose ends are the data and the noise."""
    data, noise = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2)), noise)
    level, step = torch.tensor([0.2, 0.7]).double(), 1e-3
    change = flow.interpolate(data, noise, level + step) - flow.interpolate(data, noise, level)
    torch.testing.assert_close(change / step, flow.velocity(data, noise))
    x = flow.interpolate(data, noise, level)
    torch.testing.assert_close(flow.data_from_velocity(x, flow.velocity(data, noise), level), data)
    torch.testing.assert_close(flow.velocity_from_data(x, data, level), flow.velocity(data, noise))


def test_velocity_from_data_is_bounded_near_the_data() -> None:
    x, data = torch.ones(1, 2), torch.zeros(1, 2)
    assert flow.velocity_from_data(x, data, torch.tensor([0.001]), floor=0.05).max() == pytest.approx(20)


def test_the_other_convention_is_the_same_path() -> None:
    """t = 1 - s with target data - noise, integrated from t = 0 to 1, gives the same result as this module."""
    noise, data = torch.randn(4), torch.randn(4)
    x = noise.clone()
    for _ in range(5):
        x = x + 0.2 * (data - noise)
    mine = flow.integrate(lambda x, level: flow.velocity(data, noise), noise, flow.noise_levels(5))
    torch.testing.assert_close(mine, x)
    torch.testing.assert_close(mine, data)


def test_level_samplers() -> None:
    torch.manual_seed(0)
    count = 20000
    uniform = flow.LogitNormalTimesteps(uniform_share=1.0)(count)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    logit = torch.logit(flow.LogitNormalTimesteps(0.3, 0.8)(count))
    assert logit.mean() == pytest.approx(0.3, abs=0.02)
    assert logit.std() == pytest.approx(0.8, abs=0.02)
    beta = flow.BetaTimesteps(1.5, 1.0)(count)
    assert beta.mean() == pytest.approx(0.6, abs=0.01)
    assert beta.var() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.003)
    for levels in (uniform, beta):
        assert levels.shape == (count,)
        assert levels.min() >= 0
        assert levels.max() <= 1
    mixed = flow.LogitNormalTimesteps(mean=9.0, uniform_share=0.5)(count)
    assert (mixed < 0.5).float().mean() == pytest.approx(0.25, abs=0.01)
    everywhere = flow.LogitNormalTimesteps(mean=9.0, uniform_share=1.0)(count)
    assert everywhere.var() == pytest.approx(1 / 12, abs=0.003)
    with pytest.raises(ValueError, match="uniform_share=2"):
        flow.LogitNormalTimesteps(uniform_share=2)
    with pytest.raises(ValueError, match="must be positive"):
        flow.LogitNormalTimesteps(std=0)
    with pytest.raises(ValueError, match="alpha, beta > 0"):
        flow.BetaTimesteps(alpha=0)


@pytest.mark.parametrize(
    "sampler", [flow.LogitNormalTimesteps(), flow.LogitNormalTimesteps(uniform_share=0.3), flow.BetaTimesteps()]
)
def test_levels_follow_the_global_seed(sampler: flow.TimestepSampler) -> None:
    torch.manual_seed(3)
    first = sampler(5)
    torch.manual_seed(3)
    assert torch.equal(first, sampler(5))


def error(solver: flow.Solver, steps: int) -> float:
    """Return the error of integrating dx/ds = x cos(3 s) from s = 1 to 0."""
    start = torch.ones(1, dtype=torch.float64)
    end = flow.integrate(lambda x, level: x * math.cos(3 * level), start, flow.noise_levels(steps), solver)
    return abs(float(end) - math.exp(-math.sin(3) / 3))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams_bashforth", 2)])
def test_order_of_the_solvers(solver: flow.Solver, order: int) -> None:
    assert math.log2(error(solver, 64) / error(solver, 128)) == pytest.approx(order, abs=0.15)


def test_heun_is_second_order_but_for_its_last_step() -> None:
    """The last step is an Euler step of length 1 / steps: its error is of second order too."""
    assert math.log2(error("heun", 64) / error("heun", 128)) == pytest.approx(2, abs=0.25)
    assert error("heun", 32) < error("euler", 64)


def test_evaluations_and_steps_reported() -> None:
    calls: list[float] = []
    done: list[int] = []

    def velocity_at(x: torch.Tensor, level: float) -> torch.Tensor:
        calls.append(level)
        return x

    for solver, count in (("euler", 4), ("adams_bashforth", 4), ("heun", 7)):
        calls.clear()
        flow.integrate(
            velocity_at, torch.ones(1), flow.noise_levels(4), solver, on_step=lambda step, _: done.append(step)
        )
        assert len(calls) == count
        assert calls[0] == 1.0
    assert done == [1, 2, 3, 4] * 3


def test_noise_levels() -> None:
    assert flow.noise_levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow.noise_levels(4, shift=3.0)
    assert shifted[0] == 1.0
    assert shifted[-1] == 0.0
    assert all(wide > even for wide, even in zip(shifted[1:-1], flow.noise_levels(4)[1:-1], strict=True))
    with pytest.raises(ValueError, match="1 to 10000 steps"):
        flow.noise_levels(0)
    with pytest.raises(ValueError, match="must fall"):
        flow.integrate(lambda x, level: x, torch.ones(1), [0.5, 0.7])
    with pytest.raises(ValueError, match="one of euler"):
        flow.integrate(lambda x, level: x, torch.ones(1), [1.0, 0.0], solver="rk9")  # type: ignore[arg-type]


def test_noise_levels_fall_from_1_to_0_under_every_shift() -> None:
    """Exactly: rounding made the first level exceed 1, which is outside the guidance interval that ends at 1."""
    resolutions = [flow.resolution_shift(tokens, 256) for tokens in range(16, 4097, 16)]
    for shift in [*(number / 100 for number in range(1, 1001)), *resolutions, *(0.2 * own for own in resolutions)]:
        levels = flow.noise_levels(10, shift)
        assert levels[0] == 1.0
        assert levels[-1] == 0.0
        assert all(after < before for before, after in pairwise(levels))


def test_seeded_noise_is_each_samples_own() -> None:
    together = flow.seeded_noise([5, 9], (2, 3))
    assert torch.equal(together[1], flow.seeded_noise([9], (2, 3))[0])
    assert not torch.equal(together[0], together[1])


def test_adams_bashforth_is_exact_for_linear_velocities_over_uneven_levels() -> None:
    levels = [1.0, 0.9, 0.5, 0.0]
    end = flow.integrate(lambda x, level: torch.full_like(x, level), torch.zeros(1), levels, "adams_bashforth")
    assert float(end) == pytest.approx(-0.1 - (0.81 - 0.25) / 2 - 0.25 / 2)  # the first step is Euler's


def test_the_top_of_beta_timesteps_is_the_largest_scaled_value() -> None:
    drawn = flow.BetaTimesteps(1.5, 1.0, top=0.5)(20_000)
    assert float((drawn == 1).float().mean()) == pytest.approx(1 - 0.5**1.5, abs=0.02)


def test_seeds_of_64_bits_have_noise_of_their_own() -> None:
    """torch's generator reads 32 bits of a seed."""
    noise = flow.seeded_noise([1, 1 + 2**32, -1, 2**32 - 1, 2**63], (4, 2))
    assert len({tuple(each.flatten().tolist()) for each in noise}) == 5
    assert torch.equal(noise[0], torch.randn(4, 2, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(noise[1], flow.seeded_noise([1 + 2**32], (4, 2))[0])
