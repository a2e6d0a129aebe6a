"""Base class of the foveated network and its baseline: a language model reads rows of text with visual tokens.

Legend: V videos, F frames of the longest, M real frames of all videos, S streams (`rows.Streams`: videos, or questions
about videos), B rows of text, L text tokens, N visual tokens of a row, T positions, D backbone width, C language width.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from keygrip.models.backbone import BlockKV, DinoBackbone
from keygrip.models.foveated_vlm.clock import FrameClock
from keygrip.models.foveated_vlm.frame_cache import Encoded
from keygrip.models.foveated_vlm.rows import Packing, RowLayout, TextRows
from keygrip.models.language.decoder import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passes:
    """Results of the passes over the videos.

    Attributes:
        visual: [S, F, C], the visual tokens that the answer is computed from, zero after a stream's end.
        coarse: [M, 1, D], embeddings for the learned query. fine: [S, F, D], embeddings for the chosen queries, None
            in coarse_only.
        queries: [S, F, D], the chosen queries, None in coarse_only.
        kv: keys and values of the M frames by block.
    """

    visual: Tensor
    coarse: Tensor
    fine: Tensor | None
    queries: Tensor | None
    kv: Sequence[BlockKV]


@dataclass(frozen=True)
class VLMOutput:
    """Hidden states of whole rows.

    Attributes:
        hidden: [B, T, C] after the language model's last norm. layout: positions of text and visual tokens in them.
        visual: [B, N, C], the visual tokens of the rows. passes: None if no row has frames, and for the baseline.
    """

    hidden: Tensor
    layout: RowLayout
    visual: Tensor
    passes: Passes | None

    def predicting(self, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the hidden states [n, C] that predict the text tokens selected by a mask [B, L], and the tokens' rows
        [n] and positions in the text [n], to index other tensors [B, L]; each use of a mask would wait for the GPU.

        A token with nothing before it (the first of a row without frames) cannot be predicted and is left out.
        """
        state_positions = self.layout.text_at - 1
        row, token = (mask & (state_positions >= 0)).nonzero(as_tuple=True)
        return self.hidden[row, state_positions[row, token]], (row, token)


class Connector(nn.Module):
    """Map frame embeddings [..., D] to visual tokens [..., C] at about the scale of the language model's embeddings.

    Args:
        scale: factor of the visual tokens; None: the standard deviation of the language model's embeddings after
            loading.
    """

    scale: Tensor

    def __init__(self, dim: int, language: LanguageModel, scale: float | None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, language.width)
        nn.init.normal_(self.linear.weight, std=dim**-0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("scale", language.embedding_std if scale is None else torch.tensor(float(scale)))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.linear(embeddings) * self.scale


class VideoLanguageNetwork(nn.Module):
    """Base class of the foveated network and its baselines: a language model reads rows of text with visual tokens.

    Args:
        backbone: the encoder. language: the language model.
        visual_scale: see `Connector`.
        frame_numbers: number of frames that get a learned vector each, added to the frame's visual tokens. 0: none (as
            published); then only the positions in the row distinguish frames.
        frame_clock: add a learned map of sinusoids of the frame's number to its visual tokens and to the hidden state
            that its query is computed from; the number of frames has no limit. `seconds`: sinusoids of the frame's
            time instead, which differs from its number where a long video is subsampled.
        pack_rows: concatenate rows of different lengths for the language model, which costs a mask and saves the
            padding; the results are the same up to rounding.
    """

    tokens_per_frame = 1
    modes: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: DinoBackbone,
        language: LanguageModel,
        visual_scale: float | None = None,
        frame_numbers: int = 0,
        pack_rows: bool = False,
        frame_clock: bool | Literal["seconds"] = False,
    ) -> None:
        super().__init__()
        if frame_clock not in (True, False, "seconds"):
            raise ValueError(f"model.network.frame_clock is true, false or seconds, not {frame_clock!r}")
        self.counts_seconds = frame_clock == "seconds"
        if frame_numbers < 0:
            raise ValueError(f"model.network.frame_numbers={frame_numbers}: 0 for none, or up to how many frames")
        if frame_numbers and frame_clock:
            raise ValueError("model.network: frame_numbers and frame_clock both number frames: choose one of them")
        self.pack_rows = pack_rows
        self.backbone = backbone
        self.language = language
        self.visual_scale = visual_scale
        self.connector = Connector(backbone.embed_dim, language, visual_scale)
        self.frame_tokens = (
            nn.Parameter(torch.randn(frame_numbers, language.width) * language.embedding_scale())
            if frame_numbers
            else None
        )
        self.frame_clock = FrameClock(language) if frame_clock else None

    def with_own_scale(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of another network, with this one's scale of the visual tokens if its setting names it."""
        if self.visual_scale is None:
            return weights
        own = self.connector.scale
        before = float(weights.get("connector.scale", own))
        if not math.isclose(before, self.visual_scale, rel_tol=0.01):
            log.warning(
                "model.network.visual_scale=%g replaces %g, the scale of the visual tokens with which the initial "
                "weights were trained; model.network.visual_scale=null keeps that one",
                *(self.visual_scale, before),
            )
        return weights | {"connector.scale": own}

    def read(self, visual: Tensor, rows: TextRows) -> tuple[Tensor, RowLayout]:
        """Return the hidden states [B, T, C] of rows with visual tokens [B, N, C], and their layout."""
        layout = rows.layout(self.tokens_per_frame)
        visual = self.with_frame_positions_of(visual, rows)
        text = self.language.embed(rows.input_ids)
        lengths = [
            length + rows.frame_counts[video] * self.tokens_per_frame
            for length, video in zip(rows.lengths, rows.videos, strict=True)
        ]
        return self.hidden_of(layout.place(text, visual), lengths), layout

    def hidden_of(self, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the language model's hidden states [B, T, C] for rows of these lengths; undefined at padding."""
        if not self.pack_rows:
            return self.language(embeddings)
        packing = Packing.of(lengths, embeddings.shape[1], embeddings.device)
        packed = self.language.packed(
            packing.pack(embeddings), packing.rows, packing.positions, max(lengths, default=0)
        )
        return packing.unpack(packed)

    def with_frame_positions_of(self, visual: Tensor, rows: TextRows) -> Tensor:
        """Add their frames' positions to visual tokens [B, N, C] of whole rows; see `with_frame_positions`."""
        frames = visual.shape[1] // self.tokens_per_frame
        seconds = rows.seconds_of(rows.videos, frames) if self.counts_seconds else None
        return self.with_frame_positions(visual, 0, seconds)

    def clock_embeddings(self, first: int, count: int, seconds: Tensor | None) -> Tensor:
        """Return the clock's embeddings of `count` frames from `first` on, [count, C], or of their seconds [B, count].

        Raises:
            ValueError: the clock counts seconds, and they are not known.
        """
        assert self.frame_clock is not None
        if not self.counts_seconds:
            return self.frame_clock(first, count)
        if seconds is None:
            raise ValueError(
                "model.network.frame_clock=seconds: when the frames were taken is not known here; give their seconds, "
                "or train with frame_clock=true, which counts frames"
            )
        return self.frame_clock.at(seconds)

    def with_frame_positions(self, visual: Tensor, first: int = 0, seconds: Tensor | None = None) -> Tensor:
        """Add the vectors of frame numbers or seconds to visual tokens [B, N, C], which begin with frame `first`.

        Args:
            seconds: [B, N / tokens_per_frame], times of the frames; only for a clock that counts seconds.

        Raises:
            ValueError: more frames than there are vectors, or seconds that are not known.
        """
        if self.frame_clock is not None and visual.shape[1]:
            count = visual.shape[1] // self.tokens_per_frame
            clock = self.clock_embeddings(first, count, seconds)
            return visual + clock.repeat_interleave(self.tokens_per_frame, dim=-2)
        if self.frame_tokens is None or not visual.shape[1]:
            return visual
        frames = first + visual.shape[1] // self.tokens_per_frame
        if frames > len(self.frame_tokens):
            raise ValueError(
                f"a video has {frames} frames and model.network.frame_numbers={len(self.frame_tokens)}: raise it, "
                "take model.network.frame_clock, or lower data.max_frames"
            )
        return visual + self.frame_tokens[first:frames].repeat_interleave(self.tokens_per_frame, dim=0)

    def query_passes(self, mode: str, refinement: int = 0) -> int:
        """Return how many passes of the language model predict queries before the pass over whole rows."""
        return 0

    @abstractmethod
    def encode(self, frames: Tensor) -> Encoded:
        """Compute what all questions about frames [M, 3, H, W] share; see `Encoded`."""

    @abstractmethod
    def visual_tokens(
        self, frames: Tensor, rows: TextRows, mode: str, refinement: int = 0, kv: Encoded | None = None
    ) -> tuple[Tensor, Passes | None, Tensor]:
        """Return the visual tokens [B, N, C] of the rows, results of the passes, and `zero_of_unused`.

        Args:
            frames: [V, F, 3, H, W], normalised for the backbone; F may be 0. Unused if `kv` is given.
            rows: the text. mode: one of `modes`.
            refinement: coarse_fine only; how often queries are recomputed from the tokens that they produced.
            kv: `encode` of the real frames if it is computed already (another mode's `Passes.kv`).

        Raises:
            ValueError: an unknown mode, or refinement outside of coarse_fine.
        """

    def forward(
        self, frames: Tensor, rows: TextRows, mode: str, refinement: int = 0, kv: Encoded | None = None
    ) -> VLMOutput:
        """Compute the hidden states of rows of text about videos; arguments and errors as in `visual_tokens`."""
        visual, passes, zero = self.visual_tokens(frames, rows, mode, refinement, kv)
        hidden, layout = self.read(visual, rows)
        return VLMOutput(hidden + zero, layout, visual, passes)

    def _without_frames(
        self, rows: TextRows, *frame_parts: nn.Module | nn.Parameter | None
    ) -> tuple[Tensor, None, Tensor]:
        """Return `visual_tokens` for text alone; ``frame_parts``: parts of a subclass that only frames use."""
        visual = self.connector.linear.weight.new_zeros(len(rows.input_ids), 0, self.language.width)
        parts = (self.backbone, self.connector, self.frame_tokens, self.frame_clock, *frame_parts)
        return visual, None, self.zero_of_unused(*(part for part in parts if part is not None))

    def zero_of_unused(self, *parts: nn.Module | nn.Parameter) -> Tensor:
        """Return a zero that depends on parameters unused in this batch: every process then has gradients for all."""
        total = torch.zeros((), device=self.connector.scale.device)
        if not (self.training and torch.is_grad_enabled()):
            return total
        for part in parts:
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                if parameter.requires_grad:
                    total = total + 0.0 * parameter.sum()
        return total
