"""Multi-head attention for self and cross use, over a context whose keys and values may be computed once.

Shape legend: B batch, N queries, M context tokens, D width of the queries, Dc width of the context, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.nn.precision import without_autocast
from keygrip.models.nn.processor_attention import training_attention


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of a context for attention: ``keys`` and ``values``, both ``[B, H, M, d]``."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        """M, the number of context tokens."""
        return self.keys.shape[2]

    def joined(self, other: KeyValues) -> KeyValues:
        """This context followed by another of the same batch, ``[B, H, M + M', d]``."""
        keys = torch.cat([self.keys, other.keys.to(self.keys.dtype)], dim=2)
        return KeyValues(keys, torch.cat([self.values, other.values.to(self.values.dtype)], dim=2))

    def rows(self, index: Tensor | slice) -> KeyValues:
        """Select the contexts of some samples: ``index`` applies to the batch axis."""
        return KeyValues(self.keys[index], self.values[index])

    def repeated(self, times: int) -> KeyValues:
        """Repeat every sample ``times`` times in a row, ``[B * times, H, M, d]``: noise samples can share a context."""
        return KeyValues(self.keys.repeat_interleave(times, dim=0), self.values.repeat_interleave(times, dim=0))


class Attention(nn.Module):
    """Attention by torch's fused kernels, with optional QK normalisation.

    QK normalisation (Henry et al., "Query-Key Normalization for Transformers", 2020; here a layer norm without bias of
    every head's queries and keys, as in Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023)
    bounds the logits, which otherwise grow until bf16 training diverges.

    Args:
        d_model: D, width of the queries and of the output. heads: H, divides D.
        d_context: Dc, width of what is attended to; None is D.
        qk_norm: normalise queries and keys.
        zero_output: the output layer starts at zero, so that a residual branch adds nothing at first.
        bias: of the query, key and value layers.

    Raises:
        ValueError: D does not divide into H heads.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        d_context: int | None = None,
        qk_norm: bool = True,
        zero_output: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"A width of {d_model} does not divide into {heads} heads.")
        self.heads, self.d_head = heads, d_model // heads
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key_value = nn.Linear(d_context or d_model, 2 * d_model, bias=bias)
        self.query_norm = nn.LayerNorm(self.d_head, eps=1e-6, bias=False) if qk_norm else None
        self.key_norm = nn.LayerNorm(self.d_head, eps=1e-6, bias=False) if qk_norm else None
        self.output = nn.Linear(d_model, d_model)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def keys_values(self, context: Tensor, angles: Tensor | None = None) -> KeyValues:
        """Compute keys and values of a context ``[B, M, Dc]``; a sampler computes those of a fixed context once.

        Args:
            angles: see ``forward``.
        """
        keys, values = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        if self.key_norm is not None:
            keys = _apply_norm(self.key_norm, keys)
        return KeyValues(keys if angles is None else rotated(keys, angles), values)

    def forward(
        self,
        x: Tensor,
        keys_values: KeyValues | None = None,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output ``[B, N, D]`` of each query of ``x`` ``[B, N, D]``.

        Args:
            keys_values: those of the context; None attends to ``x`` itself.
            mask: bool ``[B, M]``, ``[B, 1, M]`` or ``[B, N, M]``, True = attend. None attends to everything, which lets
                the fastest kernels run; a mask over the context alone (the first two forms) is broadcast, never copied,
                so that the memory-efficient kernels run. A query that may attend to nothing has no defined output.
            angles: rotary positions of ``x``, ``[N, d / 2]`` or ``[B, N, d / 2]`` (see `rotated`); its queries and,
                without another context, its keys are rotated by them.
        """
        if keys_values is None:
            keys_values = self.keys_values(x, angles)
        queries = self._queries(x, keys_values)
        queries = queries if angles is None else rotated(queries, angles)
        attended = training_attention(queries, keys_values.keys, keys_values.values, attn_mask=_broadcast(mask))
        return self.output(attended.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def shares(
        self, x: Tensor, groups: Sequence[int], keys_values: KeyValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the share of attention to each group of context tokens, ``[B, G]`` float32, averaged over heads and
        queries; the rows add up to 1.

        This computes the attention matrix, which the fused kernels never hold: for monitoring, not for every step.

        Args:
            groups: G sizes of consecutive groups of context tokens; their sum is M.
            x, keys_values, mask: as in ``forward``.
        """
        weights, _ = self._weights(x, groups, keys_values, mask)
        mass = weights.mean(dim=(1, 2))  # [B, M]
        return torch.stack([part.sum(dim=-1) for part in mass.split(list(groups), dim=-1)], dim=-1)

    @torch.no_grad()
    def reads(
        self, x: Tensor, groups: Sequence[int], keys_values: KeyValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the share of each group of context tokens in this layer's output, ``[B, G]`` float32, by root mean
        square over queries and width; the rows add up to 1. Much attention on small values gives a small share.

        For monitoring, with the arguments of `shares`.
        """
        weights, context = self._weights(x, groups, keys_values, mask)
        parts = zip(weights.split(list(groups), -1), context.values.float().split(list(groups), 2), strict=True)
        group_outputs = [(part @ values).transpose(1, 2).flatten(2) for part, values in parts]  # of [B, N, D]
        sizes = torch.stack(
            [F.linear(part, self.output.weight.float()).square().mean(dim=(1, 2)) for part in group_outputs], -1
        )
        sizes = sizes.sqrt()
        return sizes / sizes.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)

    def _weights(
        self, x: Tensor, groups: Sequence[int], keys_values: KeyValues | None, mask: Tensor | None
    ) -> tuple[Tensor, KeyValues]:
        """Return the attention matrix ``[B, H, N, M]`` float32, and the context that it attends to."""
        if keys_values is None:
            keys_values = self.keys_values(x)
        if sum(groups) != len(keys_values):
            raise ValueError(f"Groups of {list(groups)} tokens do not make up a context of {len(keys_values)}.")
        queries = self._queries(x, keys_values).float()
        logits = queries @ keys_values.keys.float().transpose(-1, -2) * self.d_head**-0.5  # [B, H, N, M]
        broadcast = _broadcast(mask)
        if broadcast is not None:
            logits = logits.masked_fill(~broadcast, float("-inf"))
        return logits.softmax(dim=-1), keys_values

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.d_head)).transpose(1, 2)  # [B, H, N, d]

    def _queries(self, x: Tensor, keys_values: KeyValues) -> Tensor:
        queries = self._split(self.query(x))
        if self.query_norm is not None:
            queries = _apply_norm(self.query_norm, queries)
        return queries.to(keys_values.values.dtype)


@dataclass
class AttentionRecord:
    """Collects each block's cross-attention to groups of its context, for monitoring.

    Attributes:
        groups: sizes of consecutive groups of context tokens.
        shares: `Attention.shares`, a tensor ``[B, groups]`` per block. reads: `Attention.reads`, in the same form, if
            `sizes` is set.
        sizes: whether `reads` are recorded.
    """

    groups: Sequence[int]
    sizes: bool = False
    shares: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)

    def add(self, attention: Attention, x: Tensor, keys_values: KeyValues, mask: Tensor | None) -> None:
        """Record one block's attention; arguments as for `Attention.forward`."""
        self.shares.append(attention.shares(x, self.groups, keys_values, mask))
        if self.sizes:
            self.reads.append(attention.reads(x, self.groups, keys_values, mask))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate queries or keys ``[B, H, N, d]``: values i and i + d / 2 of each head are rotated as a pair by the i-th
    angle of the token. Products of queries and keys then depend only on the difference of their angles.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        angles: ``[N, d / 2]``, or ``[B, N, d / 2]`` where samples differ; radians.
    """
    angles = angles.float() if angles.ndim == 2 else angles.float()[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _apply_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the norm in the type of ``x``: autocast would convert to float32 and back."""
    with without_autocast(x):
        return F.layer_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), None, norm.eps)


def _broadcast(mask: Tensor | None) -> Tensor | None:
    """Convert any form of mask that `Attention.forward` accepts to ``[B, 1, 1 | N, M]``."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim not in (2, 3):
        raise ValueError(
            f"An attention mask is bool [B, M], [B, 1, M] or [B, N, M], got {mask.dtype} of shape {list(mask.shape)}."
        )
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]
