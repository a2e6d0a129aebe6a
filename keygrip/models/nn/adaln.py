"""Adaptive layer normalisation: a condition shifts, scales and gates a residual branch.

AdaLN-Zero is from Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023): the layer that produces shift,
scale and gate starts at zero, so that a residual block starts as the identity.
"""

from __future__ import annotations

from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; all ``[..., D]``, broadcast."""
    return x * (1 + scale) + shift


class AdaLNModulation(nn.Module):
    """Map a condition ``[..., d_cond]`` to ``parts`` vectors ``[..., d_model]``, all zero at initialisation."""

    def __init__(self, d_cond: int, d_model: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.activation = nn.SiLU()
        self.linear = nn.Linear(d_cond, parts * d_model)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.activation(condition)).chunk(self.parts, dim=-1)


class AdaLNZeroMLP(nn.Module):
    """A residual MLP block under AdaLN-Zero: ``x + gate * MLP(modulate(norm(x)))``; the identity at initialisation.

    Args:
        d_model: width of ``x`` ``[..., d_model]``. d_cond: width of the condition ``[..., d_cond]`` (broadcast).
        expansion: hidden width of the MLP as a multiple of ``d_model``.
    """

    def __init__(self, d_model: int, d_cond: int, expansion: int = 4) -> None:
        super().__init__()
        self.modulation = AdaLNModulation(d_cond, d_model, parts=3)
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, expansion * d_model), nn.GELU(), nn.Linear(expansion * d_model, d_model)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))
