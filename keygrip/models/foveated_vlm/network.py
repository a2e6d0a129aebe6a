"""The foveated video-language network: one visual token per frame, from a query that the language model chooses.

Legend: V videos, F frames of the longest, M real frames of all videos, S streams (`rows.Streams`: videos, or questions
about videos), Q streams of a video, B rows of text, L text tokens, T positions, D backbone width, C language width.

Every real frame goes once through the backbone, and the keys and values of all its blocks are kept. A query enters
before block 1 and comes out as the frame's embedding z; any number of queries use the same keys and values:

    coarse pass: one learned query for all frames            -> z_coarse -> language model -> hidden states
    fine pass:   hidden state before frame t, projected      -> z_fine   -> language model with the text -> answer
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from keygrip.models.backbone import BlockKV, DinoBackbone
from keygrip.models.foveated_vlm.frame_cache import Encoded
from keygrip.models.foveated_vlm.rows import Streams, TextRows, real_frames, take
from keygrip.models.foveated_vlm.video_language import Passes, VideoLanguageNetwork
from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.decoder import LanguageModel
from keygrip.training.parts import model_part

MODES = ("coarse_only", "coarse_fine", "autoregressive")


def query_blocks(backbone: DinoBackbone, first_block: int) -> DinoBackbone:
    """A copy of a backbone of which only what queries go through is trained: its last blocks and its norm."""
    path = copy.deepcopy(backbone)
    for name, parameter in path.named_parameters():
        parameter.requires_grad_(path.layer_of(name) >= first_block)
    return path


@model_part
class FoveatedVLM(VideoLanguageNetwork):
    """One visual token per frame: a query that the language model chooses goes through the encoder's blocks.

    Source: the architecture of fVLM (huggingface.co/sanps/fVLM-135M, code github.com/spsanps/nanoSmol).

    Args:
        backbone, language: the parts.
        deep_query: the query goes through all blocks; otherwise only through the last one (ablation).
        query_std: of the two learned queries, and of the chosen ones at initialisation.
        projection_std: of the chosen ones alone; None: as query_std.
        query_start: what the learned query of the coarse pass begins as: `random`, or `cls`, the encoder's own CLS
            token, so that the coarse pass begins with what CLS has learned to say.
        query_bias: give the projection of hidden states to queries a bias; with `published_projections` that of all
            queries into the encoder (ablation).
        published_projections: two linear maps in place of one, as in the published model, with torch's own initial
            values: hidden states to queries, with a bias, and all queries, the learned ones too, into the encoder;
            likewise its embeddings before the connector.
        query_path: `shared`, queries go through the encoder's own blocks; or `own`, through a copy of them that is
            trained beside a frozen encoder, whose keys and values then never change and can be kept
            (`frame_cache.py`). At the start both are the same.
        query_source: whose hidden states choose the queries at inference: `fine`, what was seen so far with chosen
            queries, or `coarse`, a second stream of coarse tokens with a cache of its own, as in training's parallel
            pass.
        visual_scale: of the visual tokens; None: the language model's embedding standard deviation.
        frame_numbers, pack_rows, frame_clock: see `VideoLanguageNetwork`.

    Raises:
        ValueError: an unknown choice, or a query path of its own beside an encoder that is trained.
    """

    modes = MODES

    def __init__(
        self,
        backbone: DinoBackbone,
        language: LanguageModel,
        deep_query: bool = True,
        query_std: float = 1.0,
        query_bias: bool = False,
        query_source: Literal["fine", "coarse"] = "fine",
        visual_scale: float | None = None,
        query_path: Literal["shared", "own"] = "shared",
        frame_numbers: int = 0,
        query_start: Literal["random", "cls"] = "random",
        pack_rows: bool = False,
        frame_clock: bool | Literal["seconds"] = False,
        projection_std: float | None = None,
        published_projections: bool = False,
    ) -> None:
        super().__init__(backbone, language, visual_scale, frame_numbers, pack_rows, frame_clock)
        if query_start not in ("random", "cls"):
            raise ValueError(f"model.network.query_start is random or cls, not {query_start!r}")
        if query_path not in ("shared", "own"):
            raise ValueError(f"model.network.query_path is shared or own, not {query_path!r}")
        if query_path == "own" and backbone.trainable != "frozen":
            raise ValueError(
                "model.network.query_path=own is for a frozen encoder (backbone.trainable=frozen): beside one that is "
                "trained, two copies would learn the same"
            )
        if query_source not in ("fine", "coarse"):
            raise ValueError(f"model.network.query_source is fine or coarse, not {query_source!r}")
        for name, std in (("query_std", query_std), ("projection_std", projection_std)):
            if std is not None and not 0 < std < math.inf:
                raise ValueError(f"model.network.{name}={std}: a standard deviation, above 0")
        if published_projections and (projection_std is not None or query_start == "cls"):
            raise ValueError(
                "model.network.published_projections=true needs query_start=random and projection_std=null: its maps "
                "have initial values of their own, and a query goes through one before the encoder"
            )
        self.query_source = query_source
        self.first_block = 0 if deep_query else backbone.depth - 1
        dim = backbone.embed_dim
        self.static_query = nn.Parameter(torch.randn(1, 1, dim) * query_std)
        self.first_query = nn.Parameter(torch.randn(1, 1, dim) * query_std)
        self.query_projection = nn.Linear(language.width, dim, bias=query_bias or published_projections)
        self.query_input: nn.Linear | None = None
        self.embedding_output: nn.Linear | None = None
        if published_projections:
            self.query_input = nn.Linear(dim, dim, bias=query_bias)
            self.embedding_output = nn.Linear(dim, dim)
            self.connector.linear.reset_parameters()
        else:
            chosen_std = query_std if projection_std is None else projection_std
            nn.init.normal_(self.query_projection.weight, std=chosen_std * language.width**-0.5)
        self.query_path = None if query_path == "shared" else query_blocks(backbone, self.first_block)
        self.starts_as_cls = query_start == "cls"
        if self.starts_as_cls:
            with torch.no_grad():
                self.static_query.copy_(self.backbone.cls_input())

    # ------------------------------------------------------------------ passes

    def encode(self, frames: Tensor) -> list[BlockKV]:
        """Keys and values of frames [M, 3, H, W] at every block that the query goes through."""
        return self.backbone.keys_and_values(frames)[self.first_block :]

    def query_frames(self, queries: Tensor, kv: Sequence[BlockKV]) -> Tensor:
        """Embeddings [M, Q, D] of frames under queries [M, Q, D]."""
        embeddings = self._query_encoder.query(self._into_encoder(queries), kv, self.first_block)
        return embeddings if self.embedding_output is None else self.embedding_output(embeddings).to(embeddings.dtype)

    def choose_queries(self, visual: Tensor, streams: Streams) -> Tensor:
        """Queries [S, F, D] of all frames from visual tokens [S, F, C]: frame t's from the hidden state before it."""
        if streams.layout.source.shape[1]:
            prefix = self.language.embed(streams.input_ids)
            placed = streams.layout.place(prefix, self.with_frame_positions(visual, 0, streams.seconds))
            lengths = [text + frames - 1 for text, frames in zip(streams.lengths, streams.frame_counts, strict=True)]
            hidden = take(self.hidden_of(placed, lengths), streams.query_at)
        else:  # single frames with nothing before them: zero, with gradients (of zero) as in any other batch
            hidden = 0.0 * visual
        return self._as_queries(self.with_clock(hidden, 0, streams.seconds), streams.first)

    def with_clock(self, hidden: Tensor, first: int, seconds: Tensor | None = None) -> Tensor:
        """Hidden states [S, F, C] before the frames from `first` on, plus the clock's embedding of each frame's number
        (or of its seconds [S, F]); unchanged without a clock."""
        if self.frame_clock is None:
            return hidden
        return hidden + self.clock_embeddings(first, hidden.shape[1], seconds)

    def run_passes(self, kv: Sequence[BlockKV], streams: Streams, mode: str, refinement: int = 0) -> Passes:
        """Visual tokens of all streams from the keys and values of the M real frames, in one of the three modes.

        Args:
            refinement: coarse_fine only; how often the queries are chosen again from what they have just shown.
        """
        coarse = self.query_frames(self.static_query.expand(len(kv[0].key), -1, -1), kv)
        driving = streams.to_streams(self.connector(coarse))  # [S, F, C]
        if mode == "coarse_only":
            return Passes(driving, coarse, None, None, kv)
        if mode == "autoregressive":
            queries, fine = self._autoregressive_pass(kv, streams, driving)
            return Passes(self.connector(fine), coarse, fine, queries, kv)
        queries, fine = self._fine_pass(kv, streams, driving)
        for _ in range(refinement):
            queries, fine = self._fine_pass(kv, streams, self.connector(fine))
        return Passes(self.connector(fine), coarse, fine, queries, kv)

    def visual_tokens(
        self, frames: Tensor, rows: TextRows, mode: str, refinement: int = 0, kv: Encoded | None = None
    ) -> tuple[Tensor, Passes | None, Tensor]:
        """See `VideoLanguageNetwork.visual_tokens`."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
        if refinement and mode != "coarse_fine":
            raise ValueError(f"refinement={refinement} has no effect in mode={mode}")
        streams = rows.streams
        if len(streams) == 0:
            queries = (self.static_query, self.first_query, self.query_projection, self.query_path)
            return self._without_frames(rows, *queries, self.query_input, self.embedding_output)
        kv = self.encode(real_frames(frames, rows.frame_counts)) if kv is None else kv
        assert not isinstance(kv, Tensor)
        passes = self.run_passes(kv, streams, mode, refinement)
        unused = (self.first_query, self.query_projection) if mode == "coarse_only" else ()
        return passes.visual[streams.of_row], passes, self.zero_of_unused(*unused)

    @torch.no_grad()
    def attention(self, passes: Passes, streams: Streams) -> Tensor:
        """Where the queries looked, [S, F, blocks, H, R + N]: rows sum to 1, and are zero behind a stream's end."""
        table = self.attention_by_frame(passes, streams)
        return streams.to_streams(table.flatten(2)).unflatten(-1, table.shape[2:])

    @torch.no_grad()
    def attention_by_frame(self, passes: Passes, streams: Streams, limit: int | None = None) -> Tensor:
        """Attention [M, Q, blocks, H, R + N] of the chosen queries (the learned one, Q = 1, in coarse_only).

        Args:
            limit: only the first so many frames.
        """
        if passes.queries is None:
            queries = self.static_query.expand(len(passes.coarse), -1, -1)
        else:
            queries = streams.to_frames(passes.queries)
        kv = [BlockKV(block.key[:limit], block.value[:limit]) for block in passes.kv]
        entering = self._into_encoder(queries[:limit])
        _, weights = self._query_encoder.query_with_attention(entering, kv, self.first_block)
        return torch.stack([block.float() for block in weights], dim=2).permute(0, 3, 2, 1, 4)

    # ------------------------------------------------------------------ parts

    @property
    def _query_encoder(self) -> DinoBackbone:
        return self.backbone if self.query_path is None else self.query_path

    def _into_encoder(self, queries: Tensor) -> Tensor:
        # in the parameters' precision: the residual stream that they enter stays so under autocast
        return queries if self.query_input is None else self.query_input(queries).to(queries.dtype)

    def _as_queries(self, hidden: Tensor, first: Tensor) -> Tensor:
        projected = self.query_projection(hidden)
        return torch.where(first[..., None], self.first_query, projected.to(self.first_query.dtype))

    def query_after(self, state: Tensor | None, frame: int, seconds: Tensor | None = None) -> Tensor:
        """The query [1, 1, D] of a frame from the hidden state [1, 1, C] before it; None: nothing stands before it.

        Args:
            frame: its number. seconds: [1, 1], when it was taken.
        """
        if state is None:
            return self.first_query
        return self.query_projection(self.with_clock(state, frame, seconds)).to(self.first_query.dtype)

    def _fine_pass(self, kv: Sequence[BlockKV], streams: Streams, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [S, F, D] chosen from given visual tokens, and what they show [S, F, D]."""
        queries = self.choose_queries(visual, streams)
        return queries, streams.to_streams(self.query_frames(streams.to_frames(queries), kv))

    def _autoregressive_pass(self, kv: Sequence[BlockKV], streams: Streams, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """As at inference: frame by frame, each query from the cached past."""
        cache = LanguageCache()
        state = coarse.new_zeros(len(streams), 1, self.language.width)
        if streams.input_ids.shape[1]:
            state = self._read_prefix(streams, cache)
        queries, fine = [], []
        # the longest text and the longest video may be of two rows: what is behind a row's end takes no position then
        full = cache.length + streams.longest > self.language.context
        counts = torch.tensor(streams.frame_counts, device=coarse.device)[:, None]
        for frame in range(streams.longest):
            now = None if streams.seconds is None else streams.seconds[:, frame : frame + 1]
            before = self.with_clock(state, frame, now)
            query = self._as_queries(before, streams.first[:, frame : frame + 1])  # [S, 1, D]
            seen = self._query_frame(query, kv, streams, frame)
            queries.append(query)
            fine.append(seen)
            if frame + 1 < streams.longest:
                visual = coarse[:, frame : frame + 1] if self.query_source == "coarse" else self.connector(seen)
                visual = self.with_frame_positions(visual, frame, now)
                state = self.language.extend(visual, cache, counts > frame if full else None)
        return torch.cat(queries, dim=1), torch.cat(fine, dim=1)

    def _read_prefix(self, streams: Streams, cache: LanguageCache) -> Tensor:
        """The text before the frames goes into the cache; the hidden state of each stream's last token, [S, 1, C]."""
        prefix = self.language.embed(streams.input_ids)
        width = streams.input_ids.shape[1]
        if all(length == width for length in streams.lengths):
            return self.language.extend(prefix, cache)[:, -1:]
        length = torch.tensor(streams.lengths, device=prefix.device)[:, None]
        valid = torch.arange(width, device=prefix.device)[None] < length
        return take(self.language.extend(prefix, cache, valid), (length - 1).clamp_min(0))

    def _query_frame(self, query: Tensor, kv: Sequence[BlockKV], streams: Streams, frame: int) -> Tensor:
        """What queries [S, 1, D] show of each stream's frame number `frame`, [S, 1, D]; zero where one has ended."""
        counts = [after - before for before, after in zip(streams.frame_starts, streams.frame_starts[1:], strict=False)]
        going = [video for video, count in enumerate(counts) if count > frame]
        place = {video: number for number, video in enumerate(going)}
        now = [
            (stream, place[video] * streams.slots_per_frame + slot)
            for stream, (video, slot) in enumerate(zip(streams.videos, streams.video_slots, strict=True))
            if video in place
        ]
        index = [streams.frame_starts[video] + frame for video in going]
        # one frame: a view, which copies nothing
        at = slice(index[0], index[0] + 1) if len(index) == 1 else torch.tensor(index, device=query.device)
        part = [BlockKV(block.key[at], block.value[at]) for block in kv]
        if len(streams) == len(now) == len(going) == 1:
            return self.query_frames(query, part)
        stream, slot = (torch.tensor(list(v), device=query.device) for v in zip(*now, strict=True))
        table = query.new_zeros(len(going) * streams.slots_per_frame, query.shape[-1]).index_copy(
            0, slot, query[stream, 0]
        )
        seen = self.query_frames(table.view(len(going), streams.slots_per_frame, -1), part).flatten(0, 1)
        return seen.new_zeros(len(streams), seen.shape[-1]).index_copy(0, stream, seen[slot])[:, None]
