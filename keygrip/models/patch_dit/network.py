"""The patch-conditioned diffusion transformer: noisy latents in, velocities out, conditioned on context tokens.

    latent -> patches -> + 2D position -> 18 x [self-attention, cross-attention over the context, MLP] -> velocity
    context = [text, CLS + noise level, DINO patches at their places]; every adaLN also reads CLS + noise level

Shape legend: B samples, C h w a latent, p the latent's patch size, N = h w / p^2 latent tokens, D width, M context
tokens (see context.py), H heads.

The blocks follow Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), with cross-attention as in Chen
et al., "PixArt-alpha" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keygrip.models.nn.adaln import AdaLNModulation, modulate
from keygrip.models.nn.attention import Attention, AttentionRecord, KeyValues
from keygrip.models.nn.flow_matching import velocity, velocity_from_data
from keygrip.models.nn.sinusoids import TimestepEmbedding
from keygrip.models.patch_dit.context import Context, ContextBuilder
from keygrip.models.patch_dit.detail import DetailHead
from keygrip.models.patch_dit.positions import cell_features, grid_positions, position_features, rotary_angles
from keygrip.models.patch_dit.routing import TokenRouting
from keygrip.training.parts import ReadWhere, model_part

AdaLN = Literal["shift_scale", "gated"]
Prediction = Literal["v", "x"]
PatchAttention = Literal["joint", "separate"]
LatentPositions = Literal["frame", "cells"]
TimestepFrequencies = Literal["inclusive", "exclusive"]
# Settings whose value determines how weights are used, and their possible values.
CHOICES: dict[str, tuple[str, ...]] = {
    "adaln": get_args(AdaLN),
    "prediction": get_args(Prediction),
    "patch_attention": get_args(PatchAttention),
    "latent_positions": get_args(LatentPositions),
    "timestep_frequencies": get_args(TimestepFrequencies),
}


@dataclass
class BlockCache:
    """Keys and values of a context at one block, None before the first pass.

    Attributes:
        cls_place: index of the CLS token in the context. context, patches: of the two cross-attentions; the second only
            in networks that attend to patches separately.
    """

    cls_place: int
    context: KeyValues | None = None
    patches: KeyValues | None = None


@dataclass
class ContextCache:
    """Keys and values of a context at every block, filled by the first pass that is given it.

    From the second pass on, only the keys and values of the CLS token are computed and replaced, since no other token
    depends on the noise level. For sampling, without gradients, and for one context only.
    """

    blocks: list[BlockCache] = field(default_factory=list)


@dataclass(frozen=True)
class Tapped:
    """Tokens after one of the blocks, for a loss of their own.

    Args:
        tokens: ``[B, K, D]``. index: int64 ``[B, K]``, which of the N latent tokens they are; None: all of them.
    """

    tokens: Tensor
    index: Tensor | None


@dataclass(frozen=True)
class DiTOutput:
    """``velocity``: ``[B, C, h, w]``. ``tapped``: if tokens of a block were requested."""

    velocity: Tensor
    tapped: Tapped | None = None


class DiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each after a norm that the condition modulates.

    With ``adaln="shift_scale"`` the condition gives 6 vectors (shift and scale for each of the three) and the last
    layers of the branches start at zero; with ``"gated"`` it gives 9 (a gate too) and the gates start at zero. In both
    the block starts as the identity.

    Args:
        separate_patches: patches have their own cross-attention in addition to that over text and CLS. Its output layer
            starts at zero: a network trained without patches keeps its output until it is trained further (Ye et
            al., "IP-Adapter", 2023).
    """

    def __init__(
        self, width: int, heads: int, adaln: AdaLN, mlp_ratio: int, qk_norm: bool, separate_patches: bool = False
    ) -> None:
        super().__init__()
        self.gated = adaln == "gated"
        self.modulation = AdaLNModulation(width, width, parts=9 if self.gated else 6)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(3))
        zero = not self.gated  # a zero layer behind a zero gate would never get a gradient
        self.self_attention = Attention(width, heads, qk_norm=qk_norm, zero_output=zero)
        self.cross_attention = Attention(width, heads, qk_norm=qk_norm, zero_output=zero)
        last = nn.Linear(mlp_ratio * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), last)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.patch_attention = Attention(width, heads, qk_norm=qk_norm, zero_output=True) if separate_patches else None

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        patches: Tensor | None = None,
        angles: Tensor | None = None,
        cache: BlockCache | None = None,
        record: AttentionRecord | None = None,
    ) -> Tensor:
        """``[B, N, D]``.

        Args:
            x: ``[B, N, D]``. condition: ``[B, D]``. tokens: ``[B, M, D]``; with a filled ``cache`` the CLS token alone,
                ``[B, 1, D]``. mask: bool ``[B, M]`` or None.
            patches: ``[B, P, D]``, for their own attention, if there is one.
            angles: rotary positions of x, ``[N, d / 2]`` or ``[B, N, d / 2]``, for the self-attention.
            cache: filled or read. record: stores this block's cross-attention to text, CLS and patches.
        """
        parts = [part[:, None] for part in self.modulation(condition)]
        shifts, scales, gates = parts[:3], parts[3:6], parts[6:]

        def inner(branch: int) -> Tensor:
            return modulate(self.norms[branch](x), shifts[branch], scales[branch])

        def gated(branch: int, value: Tensor) -> Tensor:
            return gates[branch] * value if self.gated else value

        x = x + gated(0, self.self_attention(inner(0), angles=angles))
        context = self._context(tokens, cache)
        queries = inner(1)
        if record is not None:
            record.add(self.cross_attention, queries, context, mask)
        read = self.cross_attention(queries, context, mask)
        if self.patch_attention is not None and patches is not None:
            read = read + self.patch_attention(queries, self._patch_context(patches, cache))
        x = x + gated(1, read)
        return x + gated(2, self.mlp(inner(2)))

    def _patch_context(self, patches: Tensor, cache: BlockCache | None) -> KeyValues:
        assert self.patch_attention is not None
        if cache is not None and cache.patches is not None:
            return cache.patches
        new = self.patch_attention.keys_values(patches)
        if cache is not None:
            cache.patches = new
        return new

    def _context(self, tokens: Tensor, cache: BlockCache | None) -> KeyValues:
        new = self.cross_attention.keys_values(tokens)
        if cache is None:
            return new
        if cache.context is None:
            cache.context = new
        else:  # only of the CLS token
            cache.context.keys[:, :, cache.cls_place : cache.cls_place + 1] = new.keys
            cache.context.values[:, :, cache.cls_place : cache.cls_place + 1] = new.values
        return cache.context


@model_part
class PatchDiT(nn.Module):
    """The whole network.

    Args:
        latent_channels: C. text_dim, dino_dim: widths of the features.
        width: D, a multiple of 4 and of heads. depth: blocks. heads: H. mlp_ratio: hidden width of the MLPs over D.
        patch_size: p; latents must divide by it.
        adaln: see `DiTBlock`.
        prediction: "v", the velocity; or "x", the clean latent, from which the velocity follows (no grain in small
            images).
        timestep_floor: only with "x", the timestep below which the weight of the prediction's error in the loss stops
            increasing (None: 0.05): a velocity loss weighs the error by 1 / s^2, which near the data would put all
            weight on the finest detail.
        use_dino_patches, patch_positions, position_cells: see `ContextBuilder`.
        patch_attention: "joint": patches are in one context with text and CLS; "separate": each block has a
            cross-attention for them, see `DiTBlock`.
        final_modulation: the last norm is shifted and scaled by the condition and the noise level, as in DiT;
            initially without effect.
        rotary: the self-attention also has rotary positions in two dimensions, in addition to the sinusoids that
            latent tokens and patches share.
        qk_norm: normalise queries and keys.
        timestep_hidden: hidden width of the timestep's MLP.
        timestep_frequencies: of the timestep's sinusoids, from 1000 to 0.1 in equal ratios; "exclusive": 0.1 itself is
            left out.
        latent_positions: "frame": latent tokens have their places in the image's own frame, which patches share (see
            `grid_positions`); "cells": row and column of their cell, see `cell_features`.
        output_convolution: a 3 x 3 convolution of the output is added to it; initially zero.
        detail: makes a `DetailHead` from latent_channels, token_width and patch_size: convolutions over the whole
            image correct the output of the last layer, which is computed per token; None: none.
        routing: in training, a share of the tokens skips the middle blocks; None: no token skips a block.
        gradient_checkpointing: recompute activations in the backward pass; about a third more time, far less memory.

    Attributes:
        meaning: the settings that change what the same weights compute, to check weights of another network; most of
            them cannot be inferred from the names or shapes of weights.

    Raises:
        ValueError: sizes that do not divide, or an unknown option.
    """

    read_where: ClassVar = {"position_cells": ReadWhere("latent_positions rotary patch_positions", "frame", True)}

    def __init__(
        self,
        latent_channels: int,
        text_dim: int,
        dino_dim: int,
        width: int = 768,
        depth: int = 18,
        heads: int = 12,
        mlp_ratio: int = 4,
        patch_size: int = 2,
        adaln: AdaLN = "shift_scale",
        prediction: Prediction = "v",
        timestep_floor: float | None = None,
        use_dino_patches: bool = True,
        patch_positions: bool = True,
        position_cells: int = 32,
        qk_norm: bool = True,
        routing: TokenRouting | None = None,
        gradient_checkpointing: bool = False,
        patch_attention: PatchAttention = "joint",
        final_modulation: bool = False,
        rotary: bool = False,
        detail: Callable[..., DetailHead] | None = None,
        timestep_hidden: int = 256,
        timestep_frequencies: TimestepFrequencies = "inclusive",
        latent_positions: LatentPositions = "frame",
        output_convolution: bool = False,
    ) -> None:
        super().__init__()
        chosen = {
            "adaln": adaln,
            "prediction": prediction,
            "patch_attention": patch_attention,
            "latent_positions": latent_positions,
            "timestep_frequencies": timestep_frequencies,
        }
        for name, values in CHOICES.items():
            if chosen[name] not in values:
                raise ValueError(f"model.network.{name} is {' or '.join(values)}, not {chosen[name]!r}.")
        if timestep_hidden < 1:
            raise ValueError(f"model.network.timestep_hidden={timestep_hidden}: must be at least 1.")
        if rotary and (width % heads or width // heads % 4):
            raise ValueError(
                f"model.network.rotary=true needs heads whose width divides by 4, not {width} / {heads} numbers."
            )
        if patch_attention == "separate" and not use_dino_patches:
            raise ValueError("model.network.patch_attention=separate has no effect with use_dino_patches=false: joint.")
        if timestep_floor is not None and prediction != "x":
            raise ValueError(
                f"model.network.timestep_floor={timestep_floor} has no effect with prediction={prediction}: null"
            )
        if timestep_floor is not None and not 0 < timestep_floor <= 1:
            raise ValueError(f"model.network.timestep_floor={timestep_floor}: must lie in (0, 1].")
        if width % 4:
            raise ValueError(f"model.network.width={width}: must be a multiple of 4, for positions in two dimensions.")
        if patch_positions and not use_dino_patches:
            patch_positions = False  # there are no patches to place
        self.routed = (-1, -1)
        if routing is not None:
            routing.check(depth)
            self.routed = routing.span(depth)
        self.latent_channels, self.patch_size, self.width, self.depth = latent_channels, patch_size, width, depth
        self.text_dim, self.dino_dim = text_dim, dino_dim
        self.prediction: Prediction = prediction
        self.timestep_floor = 0.05 if timestep_floor is None else timestep_floor
        self.use_dino_patches, self.position_cells = use_dino_patches, position_cells
        self.routing, self.gradient_checkpointing = routing, gradient_checkpointing
        self.rotary, self.d_head = rotary, width // heads
        self.meaning: dict[str, Any] = {
            "prediction": prediction,
            "heads": heads,
            "patch_size": patch_size,
            "rotary": rotary,
            "position_cells": position_cells,
            "patch_positions": patch_positions,
            "patch_attention": patch_attention,
            "qk_norm": qk_norm,
            "timestep_hidden": timestep_hidden,
            "timestep_frequencies": timestep_frequencies,
            "latent_positions": latent_positions,
            "output_convolution": output_convolution,
        }
        if latent_positions == "cells" and not rotary and not patch_positions:
            del self.meaning["position_cells"]  # nothing reads it
        self.context_builder = ContextBuilder(
            width, text_dim, dino_dim, use_dino_patches, patch_positions, position_cells
        )
        self.level_embedding = TimestepEmbedding(
            width, hidden=timestep_hidden, endpoint=timestep_frequencies == "inclusive"
        )
        self.latent_positions: LatentPositions = latent_positions
        self.latent_in = nn.Linear(latent_channels * patch_size**2, width)
        self.separate_patches = patch_attention == "separate"
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, adaln, mlp_ratio, qk_norm, self.separate_patches) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width, eps=1e-6)
        self.latent_out = nn.Linear(width, latent_channels * patch_size**2)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)
        self.final_modulation = AdaLNModulation(width, width, parts=2) if final_modulation else None
        self.output_convolution: nn.Conv2d | None = None
        if output_convolution:
            self.output_convolution = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
            for parameter in self.output_convolution.parameters():
                nn.init.zeros_(parameter)
        self.detail = detail and detail(latent_channels=latent_channels, token_width=width, patch_size=patch_size)

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        context: Context,
        cache: ContextCache | None = None,
        tap: int | None = None,
        floor: float | None = None,
        record: AttentionRecord | None = None,
    ) -> DiTOutput:
        """The velocity at x_s.

        Args:
            x: ``[B, C, h, w]``, noisy normalised latents. level: ``[B]``, noise levels s.
            context: of the B samples, from ``context_builder``.
            cache: keys and values of exactly this context, reused between passes; without gradients.
            tap: number of blocks after which tokens are also returned.
            floor: with ``prediction="x"``, the smallest level to divide by; None: ``timestep_floor``, as in the loss
                (see `target`). Sampling passes a smaller value.
            record: stores every block's cross-attention to ``context.groups``.
        """
        rows, columns = self.grid(x)
        condition = context.cls + self.level_embedding(level)  # [B, D], used twice: here and as the CLS token
        patches: Tensor | None = None
        if self.separate_patches:
            patches, context = context.patches, replace(context, patches=None)
        first_pass = cache is None or not cache.blocks
        tokens = context.tokens(condition) if first_pass else condition[:, None]
        if cache is not None and first_pass:
            cache.blocks = [BlockCache(cls_place=context.groups[0]) for _ in self.blocks]
        hidden = self.latent_in(self._to_tokens(x))
        positions = grid_positions((rows, columns), columns / rows, x.device)
        if self.latent_positions == "cells":
            places = cell_features((rows, columns), self.width, x.device)
        else:
            places = position_features(positions, self.width, self.position_cells)
        hidden = hidden + places.to(hidden.dtype)
        angles = rotary_angles(positions, self.d_head, self.position_cells) if self.rotary else None
        routing = self.routing if self.training else None
        all_tokens, index = hidden, None  # index: of the tokens that go through the block; None: all tokens
        block_angles = angles
        mask = context.mask
        tapped: Tapped | None = None
        for block_index, block in enumerate(self.blocks):
            if routing is not None and block_index == self.routed[0]:
                all_tokens, index = hidden, routing.choose(hidden.shape[0], hidden.shape[1], hidden.device)
                hidden = routing.take(all_tokens, index)
                block_angles = None if angles is None else angles[index]  # [B, K, d / 2]
            elif routing is not None and block_index == self.routed[1] and index is not None:
                hidden, index, block_angles = routing.put_back(all_tokens, hidden, index), None, angles
            block_cache = None if cache is None else cache.blocks[block_index]
            hidden = self._run(block, hidden, condition, tokens, mask, patches, block_angles, block_cache, record)
            if tap is not None and block_index + 1 == tap:
                tapped = Tapped(hidden, index)
        last = self.final_norm(hidden)
        if self.final_modulation is not None:
            last = modulate(last, *(part[:, None] for part in self.final_modulation(condition)))
        raw = self._to_latent(self.latent_out(last), rows, columns)
        if self.output_convolution is not None:
            raw = raw + self.output_convolution(raw)
        if self.detail is not None:
            raw = self._run(self.detail, x, raw, last, condition)
        raw = raw.to(x.dtype)
        if self.prediction == "x":
            raw = velocity_from_data(x, raw, level, self.timestep_floor if floor is None else floor)
        return DiTOutput(raw, tapped)

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        """A part's output, whose activations are recomputed in the backward pass with `gradient_checkpointing`."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def target(self, x: Tensor, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The target of the velocity of `forward` in training: noise - data. With ``prediction="x"``, below
        ``timestep_floor``, the smaller velocity that a perfect prediction would give there."""
        if self.prediction == "x":
            return velocity_from_data(x, data, level, self.timestep_floor)
        return velocity(data, noise)

    @torch.no_grad()
    def attention_shares(self, x: Tensor, level: Tensor, context: Context) -> Tensor:
        """Shares of cross-attention on text, CLS and patches by block, ``[depth, B, 3]``; arguments as in `forward`."""
        joint = replace(context, patches=None) if self.separate_patches else context
        record = AttentionRecord(joint.groups)
        training = self.training
        self.eval()
        self(x, level, context, record=record)
        self.train(training)
        return torch.stack(record.shares)

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError if latents of one of these sizes (h, w) do not divide by the patch size."""
        for height, width in sizes:
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(
                    f"Latents of {height} x {width} do not divide by model.network.patch_size={self.patch_size}."
                )

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of latent tokens of latents ``[B, C, h, w]``."""
        _, channels, height, width = x.shape
        if channels != self.latent_channels or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The network takes latents of {self.latent_channels} channels whose sides divide by "
                f"{self.patch_size}, got {channels} x {height} x {width}."
            )
        return height // self.patch_size, width // self.patch_size

    def _to_tokens(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)  # [B, N, C p p]

    def _to_latent(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size)
