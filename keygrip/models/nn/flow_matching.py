"""Flow matching on straight paths: training targets, times, and the solvers that sample.

One convention everywhere. The noise level s runs from 0 (data) to 1 (noise)::

    x_s = (1 - s) data + s noise          velocity = dx_s / ds = noise - data

and sampling integrates from s = 1 down to s = 0. Papers that count time the other way (t = 1 - s, x_t = (1 - t) noise +
t data, target = data - noise; usual for policies, where data are actions) describe the same path with the opposite sign
of the velocity: their target is ``-velocity(data, noise)``, and their step from t to t + dt is a step here from s to
s - dt.

Sources: Lipman et al., "Flow Matching for Generative Modeling" (2023); Liu et al., "Flow Straight and Fast" (2023);
logit-normal times and the shift of the noise levels from Esser et al., "Scaling Rectified Flow Transformers" (2024).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.distributions import Gamma

from keygrip.training.parts import ReadWhere, model_part

Solver = Literal["euler", "heun", "adams_bashforth"]
MOST_STEPS = 10_000  # of sampling: far above any that is of use
SOLVERS: tuple[Solver, ...] = ("euler", "heun", "adams_bashforth")


def interpolate(data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_s ``[B, ...]`` of data and noise ``[B, ...]`` at the noise levels ``[B]``."""
    level = _align(level, data)
    return (1 - level) * data + level * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the target of the network, which is the same at every level of one path: noise - data."""
    return noise - data


def velocity_from_data(x: Tensor, data: Tensor, level: Tensor, floor: float = 0.05) -> Tensor:
    """The velocity that a prediction ``data`` of the clean sample implies at x_s: (x - data) / max(s, floor).

    The floor bounds the weight that the last, nearly clean levels get in a velocity loss.
    """
    return (x - data) / _align(level, x).clamp(min=floor)


def data_from_velocity(x: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """The clean sample that a velocity at x_s leads to on a straight path: x - s v."""
    return x - _align(level, x) * velocity


def _align(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


# -- noise levels in training ------------------------------------------------------------------------------------------


class TimestepSampler(Protocol):
    """Samples noise levels for training."""

    def __call__(self, count: int, device: torch.device | str | None = None) -> Tensor:
        """``[count]`` float32 levels in [0, 1], from torch's global generator (so that resuming restores them)."""


@model_part
class LogitNormalTimesteps:
    """sigmoid(mean + std * normal): levels in the middle, where the prediction is hardest, are more frequent.

    Args:
        mean: above 0 shifts towards noise. std: width, positive.
        uniform_share: share of the samples that are uniform instead, so that no level is left out; 1: all of them.
    """

    read_where: ClassVar = dict.fromkeys(("mean", "std"), ReadWhere("uniform_share", unless=1))

    def __init__(self, mean: float = 0.0, std: float = 1.0, uniform_share: float = 0.0) -> None:
        if std <= 0:
            raise ValueError(f"The width of logit-normal noise levels must be positive, got std={std}.")
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"The uniform share of noise levels must lie in 0..1, got uniform_share={uniform_share}.")
        self.mean, self.std, self.uniform_share = mean, std, uniform_share

    def __call__(self, count: int, device: torch.device | str | None = None) -> Tensor:
        levels = torch.sigmoid(torch.randn(count, device=device) * self.std + self.mean)
        if not self.uniform_share:
            return levels
        uniform = torch.rand(count, device=device)
        return torch.where(torch.rand(count, device=device) < self.uniform_share, uniform, levels)


@model_part
class BetaTimesteps:
    """min(Beta(alpha, beta) / top, 1): with (1.5, 1) levels near noise are more frequent, as in the training of
    flow-matching action heads (Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control",
    2024).

    Args:
        alpha, beta: positive. top: samples above it count as pure noise.
    """

    def __init__(self, alpha: float = 1.5, beta: float = 1.0, top: float = 0.999) -> None:
        if alpha <= 0 or beta <= 0 or not 0 < top <= 1:
            raise ValueError(
                f"Beta noise levels need alpha, beta > 0 and 0 < top <= 1, got alpha={alpha}, beta={beta}, top={top}."
            )
        self.alpha, self.beta, self.top = alpha, beta, top

    def __call__(self, count: int, device: torch.device | str | None = None) -> Tensor:
        # torch has no in-place sampling of beta: a ratio of gamma samples is beta. On the CPU they take no time.
        first, second = Gamma(torch.tensor([[self.alpha], [self.beta]]).expand(2, count), 1.0).sample()
        return (first / (first + second) / self.top).clamp(max=1.0).to(device)


def shifted(level: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise by a factor above 1 (towards data below 1): s' = shift s / (1 + (shift - 1) s).
    Two successive shifts equal one shift by their product."""
    return shift * level / (1 + (shift - 1) * level)


def resolution_shift(tokens: int, base: int) -> float:
    """Return the shift with which images of `tokens` latent tokens are as noisy as images of `base` tokens without a
    shift: sqrt(tokens / base) (Esser et al., 2024, section 5.3.2)."""
    return float((tokens / base) ** 0.5)


# -- sampling ----------------------------------------------------------------------------------------------------------


def noise_levels(steps: int, shift: float = 1.0) -> list[float]:
    """Return the ``steps + 1`` levels from 1 to 0 between which a sampler steps.

    Args:
        shift: above 1 spends more of the steps near noise: s' = shift s / (1 + (shift - 1) s), for large images.
    """
    if not 1 <= steps <= MOST_STEPS or not 0 < shift < math.inf:
        raise ValueError(
            f"Sampling needs 1 to {MOST_STEPS} steps and a positive, finite shift, got steps={steps}, shift={shift}."
        )
    even = [1 - index / steps for index in range(steps)] + [0.0]
    levels = [shift * level / (1 + (shift - 1) * level) for level in even]
    return [1.0, *levels[1:]]  # pure noise is 1 under every shift; rounding might put it above 1


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise ``[len(seeds), *shape]``, each sample a function of its own seed alone.

    Sampled on the CPU, so that a seed gives the same image on every device and in every batch.
    """
    generators = (torch.Generator().manual_seed(_seed_of_32_bits(seed)) for seed in seeds)
    draws = [torch.randn(*shape, generator=generator) for generator in generators]
    return torch.stack(draws).to(device, dtype)


def _seed_of_32_bits(seed: int) -> int:
    """torch's generator on the CPU reads the lower 32 bits of a seed only; other seeds are hashed to 32 bits."""
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


def integrate(
    velocity_at: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    levels: Sequence[float],
    solver: Solver = "euler",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from ``noise`` at the first of ``levels`` to the sample at the last.

    Args:
        velocity_at: v(x, s), of the shape of x.
        noise: ``[B, ...]``, the sample at ``levels[0]``.
        levels: falling noise levels, as returned by `noise_levels`.
        solver: "euler", first order; "adams_bashforth", second order at one evaluation per step (it extrapolates from
            the last velocity); "heun", second order at two evaluations per step (one in the last step, because the
            model's velocity at s = 0 is least reliable).
        on_step: called with the number of steps done and the sample after each.

    Raises:
        ValueError: an unknown solver, or levels that do not fall.
    """
    if solver not in SOLVERS:
        raise ValueError(f"The solver is one of {', '.join(SOLVERS)}, not {solver!r}.")
    if len(levels) < 2 or any(next_level >= previous for previous, next_level in pairwise(levels)):
        raise ValueError(f"Noise levels must fall from noise to data, got {list(levels)}.")
    x = noise
    last: tuple[Tensor, float] | None = None  # velocity of the step before, and its length
    for index, (level, next_level) in enumerate(pairwise(levels)):
        step = next_level - level  # negative
        v = velocity_at(x, level)
        if solver == "heun" and index < len(levels) - 2:
            slope = (v + velocity_at(x + step * v, next_level)) / 2
        elif solver == "adams_bashforth" and last is not None:
            previous, length = last
            slope = v + (v - previous) * (step / (2 * length))
        else:
            slope = v
        x, last = x + step * slope, (v, step)
        if on_step is not None:
            on_step(index + 1, x)
    return x
