"""The layer-wise flow-matching transformer that predicts an action chunk.

    [state | future tokens | noisy actions] -> block 0 .. N - 1 -> velocity of the actions

Block i reads its own context: the hidden states of one layer of the vision-language model, and the geometry tokens::

    x + cross_attention(AdaLN(x), context_i)    then    x + MLP(LayerNorm(x))

In these blocks the tokens attend to the context and not to each other. Between them stand blocks of the same form with
self-attention over the tokens. Without self-attention the state would have no effect on the actions.

Sources: Bjorck et al., "GR00T N1: An Open Foundation Model for Generalist Humanoid Robots" (2025) for tokens and
conditioning; Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control" (2024) for the times.

Shape legend: B samples, R noise samples for each, T action steps, Da values of an action step, Ds values of a state, n
tokens of the head, M tokens of a context, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from keygrip.models.nn.adaln import AdaLNModulation, modulate
from keygrip.models.nn.attention import Attention, AttentionRecord, KeyValues
from keygrip.models.nn.precision import without_autocast
from keygrip.models.nn.sinusoids import TimestepEmbedding, continuous_features


@dataclass
class BlockContext:
    """Context of one block for B samples; its keys and values are computed once, on first use.

    They are cached only if no gradients are recorded (that is, over the steps of a sampler).

    Attributes:
        tokens: ``[B, M, H]``. mask: bool ``[B, M]``, False for padding; None: no padding.
    """

    tokens: Tensor
    mask: Tensor | None = None
    _kept: KeyValues | None = field(default=None, init=False, repr=False)

    def keys_values(self, attention: Attention) -> KeyValues:
        if self._kept is not None:
            return self._kept
        found = attention.keys_values(self.tokens)
        if not torch.is_grad_enabled():
            self._kept = found
        return found


class HeadBlock(nn.Module):
    """AdaLN (shift and scale, no gate) -> attention -> LayerNorm -> GELU MLP, both residual."""

    def __init__(self, width: int, heads: int, d_cond: int, expansion: int) -> None:
        super().__init__()
        self.modulation = AdaLNModulation(d_cond, width, parts=2)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, qk_norm=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))

    def forward(
        self, x: Tensor, condition: Tensor, context: BlockContext | None = None, record: AttentionRecord | None = None
    ) -> Tensor:
        """Map tokens ``[B R, n, H]`` to new ones, given ``condition`` ``[B R, d_cond]``; without a context the tokens
        attend to each other."""
        shift, scale = self.modulation(condition[:, None])
        normed = modulate(self.norm(x), shift, scale)
        if context is None:
            read = self.attention(normed)
        else:
            # The R noise samples of a sample are queries of one sequence, so its keys and values are not copied.
            queries = normed.unflatten(0, (len(context.tokens), -1)).flatten(1, 2)  # [B, R n, H]
            keys_values = context.keys_values(self.attention)
            read = self.attention(queries, keys_values, context.mask).reshape(x.shape)
            if record is not None:
                record.add(self.attention, queries, keys_values, context.mask)
        x = x + read
        return x + self.mlp(self.mlp_norm(x))


class ActionEncoder(nn.Module):
    """Encode noisy actions ``[B R, T, Da]`` and their noise levels ``[B R]`` as tokens ``[B R, T, H]``."""

    def __init__(self, action_size: int, width: int, horizon: int) -> None:
        super().__init__()
        self.width = width
        self.lift = nn.Linear(action_size, width)
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(horizon, width))

    def forward(self, actions: Tensor, level: Tensor) -> Tensor:
        lifted = self.lift(actions)
        time = continuous_features(level, self.width)[:, None].expand_as(lifted)
        return self.mix(torch.cat([lifted, time], dim=-1)) + self.pos_embed


class ActionHead(nn.Module):
    """The whole head. It always computes in float32, because the errors of four Euler steps add up.

    Args:
        width: H, that of the vision-language model. blocks: N, each with its own context.
        state_size: Ds. action_size: Da. horizon: T.
        future_tokens: learned tokens without an input, in which blocks can store what several actions need.
        head_size: width of an attention head. expansion: of the MLPs.
        self_attention_every: a self-attention block follows every `self_attention_every` of the N blocks (after the
            last block only if this number divides N).

    Raises:
        ValueError: sizes that do not fit, or no self-attention at all.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        state_size: int,
        action_size: int,
        horizon: int,
        future_tokens: int = 32,
        head_size: int = 64,
        expansion: int = 4,
        self_attention_every: int = 1,
    ) -> None:
        super().__init__()
        if width % head_size:
            raise ValueError(
                f"model.network.head_size={head_size} does not divide the vision-language model's width {width}."
            )
        if not 1 <= self_attention_every <= blocks:
            raise ValueError(
                f"model.network.self_attention_every={self_attention_every}: give 1 to {blocks}. Without "
                "self-attention the head's tokens never meet, and the state has no effect on the actions."
            )
        if future_tokens < 0:
            raise ValueError(f"model.network.future_tokens must not be negative, got {future_tokens}.")
        self.width, self.horizon, self.action_size = width, horizon, action_size
        self.self_attention_every = self_attention_every
        heads = width // head_size
        self.condition = TimestepEmbedding(width)
        self.state = nn.Sequential(nn.Linear(state_size, width), nn.SiLU(), nn.Linear(width, width))
        self.actions = ActionEncoder(action_size, width, horizon)
        self.future_tokens = nn.Parameter(0.02 * torch.randn(future_tokens, width)) if future_tokens else None
        self.blocks = nn.ModuleList(HeadBlock(width, heads, width, expansion) for _ in range(blocks))
        self.mixers = nn.ModuleList(
            HeadBlock(width, heads, width, expansion) for _ in range(blocks // self_attention_every)
        )
        self.decode = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, action_size)
        )

    def forward(
        self,
        actions: Tensor,
        level: Tensor,
        state: Tensor,
        contexts: Sequence[BlockContext],
        record: AttentionRecord | None = None,
        action_bias: Tensor | None = None,
    ) -> Tensor:
        """The velocity of noisy actions, ``[B R, T, Da]`` float32 (noise minus data, see `nn.flow_matching`).

        Args:
            actions: ``[B R, T, Da]``, the R noise samples of a sample in a row. level: ``[B R]``, 0 data .. 1 noise.
            state: ``[B, Ds]``.
            contexts: one for each of the N blocks, of B samples.
            action_bias: ``[B, T, H]``, added to the actions' tokens; None: nothing.
        """
        assert len(contexts) == len(self.blocks), "a context for every block"
        with without_autocast(actions):
            draws = len(actions) // len(state)
            parts = [self.state(state.float()).repeat_interleave(draws, dim=0)[:, None]]
            if self.future_tokens is not None:
                parts.append(self.future_tokens.expand(len(actions), -1, -1))
            tokens = self.actions(actions.float(), level)
            if action_bias is not None:
                tokens = tokens + action_bias.repeat_interleave(draws, dim=0)
            parts.append(tokens)
            x = torch.cat(parts, dim=1)
            condition = self.condition(level)
            for index, (block, context) in enumerate(zip(self.blocks, contexts, strict=True)):
                x = block(x, condition, context, record)
                mixer_count, remainder = divmod(index + 1, self.self_attention_every)
                if not remainder:
                    x = self.mixers[mixer_count - 1](x, condition)
            return self.decode(x[:, -self.horizon :])
