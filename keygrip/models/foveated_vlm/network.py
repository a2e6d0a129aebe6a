"""The foveated video-language network: one visual token per frame, from a query that the language model chooses.

Legend: V videos, F frames of the longest, M real frames of all videos, S streams (`rows.Streams`: videos, or questions
about videos), Q streams of a video, B rows of text, L text tokens, T positions, D backbone width, C language width,
H heads and R + N prefix and patch tokens of the encoder.

Every real frame passes through the backbone once, and the keys and values of all blocks are stored. A query enters
before block 1 and leaves the last block as the frame's embedding z. All queries use the same keys and values. A chosen
query is a projection of the language model's hidden state:

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
    """Copy a backbone for queries; only the parts that queries pass through are trained: last blocks and norm."""
    path = copy.deepcopy(backbone)
    for name, parameter in path.named_parameters():
        parameter.requires_grad_(path.layer_of(name) >= first_block)
    return path


@model_part
class FoveatedVLM(VideoLanguageNetwork):
    """Compute one visual token per frame: a query that the language model chooses passes through the encoder's blocks.

    Source: the architecture of fVLM (huggingface.co/sanps/fVLM-135M, code github.com/spsanps/nanoSmol).

    Args:
        backbone, language: the encoder and the language model.
        deep_query: the query passes through all blocks; otherwise only through the last one (ablation).
        query_std: standard deviation of the two learned queries, and of the chosen ones at initialisation.
        projection_std: standard deviation of the chosen queries alone; None: query_std.
        query_start: initial value of the learned query of the coarse pass: `random`, or `cls`, the encoder's CLS
            token, so that the coarse pass starts with what CLS has learned.
        query_bias: add a bias to the projection of hidden states to queries; with `published_projections`, to the
            projection of all queries into the encoder instead (ablation).
        published_projections: two linear maps in place of one, as in the published model, with torch's default
            initial values: from hidden states to queries, with a bias, and from all queries (the learned ones too) to
            the encoder's input. Another linear map is applied to the encoder's embeddings before the connector.
        query_path: `shared`: queries pass through the encoder's own blocks. `own`: they pass through a copy that is
            trained while the encoder is frozen. The encoder's keys and values then never change and can be cached
            (`frame_cache.py`). Both start with the same weights.
        query_source: hidden states that choose the queries at inference: `fine`, those after the fine tokens of
            earlier frames, or `coarse`, those of a second stream of coarse tokens with its own cache, as in the
            parallel pass of training.
        visual_scale: scale of the visual tokens; None: the standard deviation of the language model's embeddings.
        frame_numbers, pack_rows, frame_clock: see `VideoLanguageNetwork`.

    Raises:
        ValueError: an unknown choice, or query_path=own with an encoder that is trained.
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
        """Compute the keys and values of frames [M, 3, H, W] at every block that the query passes through."""
        return self.backbone.keys_and_values(frames)[self.first_block :]

    def query_frames(self, queries: Tensor, kv: Sequence[BlockKV]) -> Tensor:
        """Compute the embeddings [M, Q, D] of frames for queries [M, Q, D]."""
        embeddings = self._query_encoder.query(self._project_into_encoder(queries), kv, self.first_block)
        return embeddings if self.embedding_output is None else self.embedding_output(embeddings).to(embeddings.dtype)

    def choose_queries(self, visual: Tensor, streams: Streams) -> Tensor:
        """Compute queries [S, F, D] from visual tokens [S, F, C]: for each frame, from the hidden state before it."""
        if streams.layout.source.shape[1]:
            prefix = self.language.embed(streams.input_ids)
            embeddings = streams.layout.place(prefix, self.with_frame_positions(visual, 0, streams.seconds))
            hidden = take(self.hidden_of(embeddings, streams.read_lengths), streams.query_at)
        else:  # single frames with nothing before them: zeros that depend on `visual`, so that it has a gradient
            hidden = 0.0 * visual
        return self._project_queries(self.with_clock(hidden, 0, streams.seconds), streams.first)

    def with_clock(self, hidden: Tensor, first: int, seconds: Tensor | None = None) -> Tensor:
        """Add the clock's embedding of each frame's number (or time, seconds [S, F]) to the hidden states [S, F, C]
        before the frames from `first` on; return them unchanged without a clock."""
        if self.frame_clock is None:
            return hidden
        return hidden + self.clock_embeddings(first, hidden.shape[1], seconds)

    def query_passes(self, mode: str, refinement: int = 0) -> int:
        """See `VideoLanguageNetwork.query_passes`. The mode `autoregressive` reads the same positions one by one."""
        return 0 if mode == "coarse_only" else 1 + refinement

    def run_passes(self, kv: Sequence[BlockKV], streams: Streams, mode: str, refinement: int = 0) -> Passes:
        """Compute the visual tokens of all streams from the keys and values of the M real frames, in one of the modes.

        Args:
            refinement: coarse_fine only; how often the queries are recomputed from the tokens that they produced.
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
        unused: dict[str, tuple[nn.Module | nn.Parameter, ...]] = {
            "coarse_only": (self.first_query, self.query_projection),
            "autoregressive": (self.static_query,),
        }
        return passes.visual[streams.of_row], passes, self.zero_of_unused(*unused.get(mode, ()))

    @torch.no_grad()
    def attention(self, passes: Passes, streams: Streams) -> Tensor:
        """Return the attention of the queries, [S, F, blocks, H, R + N]; rows sum to 1 and are zero after a stream's
        end."""
        table = self.attention_by_frame(passes, streams)
        return streams.to_streams(table.flatten(2)).unflatten(-1, table.shape[2:])

    @torch.no_grad()
    def attention_by_frame(self, passes: Passes, streams: Streams, limit: int | None = None) -> Tensor:
        """Attention [M, Q, blocks, H, R + N] of the chosen queries (the learned one, Q = 1, in coarse_only).

        Args:
            limit: number of frames to use, from the first on; None: all.
        """
        if passes.queries is None:
            queries = self.static_query.expand(len(passes.coarse), -1, -1)
        else:
            queries = streams.to_frames(passes.queries)
        kv = [BlockKV(block.key[:limit], block.value[:limit]) for block in passes.kv]
        query_inputs = self._project_into_encoder(queries[:limit])
        _, weights = self._query_encoder.query_with_attention(query_inputs, kv, self.first_block)
        return torch.stack([block.float() for block in weights], dim=2).permute(0, 3, 2, 1, 4)

    # ------------------------------------------------------------------ parts

    @property
    def _query_encoder(self) -> DinoBackbone:
        return self.backbone if self.query_path is None else self.query_path

    def _project_into_encoder(self, queries: Tensor) -> Tensor:
        # in the parameters' precision, which the encoder's residual stream has under autocast too
        return queries if self.query_input is None else self.query_input(queries).to(queries.dtype)

    def _project_queries(self, hidden: Tensor, is_first: Tensor) -> Tensor:
        projected = self.query_projection(hidden)
        return torch.where(is_first[..., None], self.first_query, projected.to(self.first_query.dtype))

    def query_after(self, state: Tensor | None, frame: int, seconds: Tensor | None = None) -> Tensor:
        """Compute the query [1, 1, D] of a frame.

        Args:
            state: hidden state [1, 1, C] before the frame; None: nothing precedes it.
            frame: its number. seconds: [1, 1], its time.
        """
        if state is None:
            return self.first_query
        return self.query_projection(self.with_clock(state, frame, seconds)).to(self.first_query.dtype)

    def _fine_pass(self, kv: Sequence[BlockKV], streams: Streams, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [S, F, D] chosen from given visual tokens, and the frames' embeddings for them [S, F, D]."""
        queries = self.choose_queries(visual, streams)
        return queries, streams.to_streams(self.query_frames(streams.to_frames(queries), kv))

    def _autoregressive_pass(self, kv: Sequence[BlockKV], streams: Streams, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and embeddings, computed as at inference: frame by frame, each query from the cached past."""
        cache = LanguageCache()
        state = coarse.new_zeros(len(streams), 1, self.language.width)
        if streams.input_ids.shape[1]:
            state = self._read_prefix(streams, cache)
        queries, fine = [], []
        # the longest text and video may belong to different rows: then nothing after a row's end may take a position
        needs_mask = cache.length + streams.longest > self.language.context
        counts = torch.tensor(streams.frame_counts, device=coarse.device)[:, None]
        for frame in range(streams.longest):
            seconds = None if streams.seconds is None else streams.seconds[:, frame : frame + 1]
            hidden = self.with_clock(state, frame, seconds)
            query = self._project_queries(hidden, streams.first[:, frame : frame + 1])  # [S, 1, D]
            embeddings = self._query_frame(query, kv, streams, frame)
            queries.append(query)
            fine.append(embeddings)
            if frame + 1 < streams.longest:
                visual = coarse[:, frame : frame + 1] if self.query_source == "coarse" else self.connector(embeddings)
                visual = self.with_frame_positions(visual, frame, seconds)
                state = self.language.extend(visual, cache, counts > frame if needs_mask else None)
        return torch.cat(queries, dim=1), torch.cat(fine, dim=1)

    def _read_prefix(self, streams: Streams, cache: LanguageCache) -> Tensor:
        """Read the text before the frames into the cache; return the hidden state of each stream's last token
        [S, 1, C]."""
        prefix = self.language.embed(streams.input_ids)
        width = streams.input_ids.shape[1]
        if all(length == width for length in streams.lengths):
            return self.language.extend(prefix, cache)[:, -1:]
        length = torch.tensor(streams.lengths, device=prefix.device)[:, None]
        valid = torch.arange(width, device=prefix.device)[None] < length
        return take(self.language.extend(prefix, cache, valid), (length - 1).clamp_min(0))

    def _query_frame(self, query: Tensor, kv: Sequence[BlockKV], streams: Streams, frame: int) -> Tensor:
        """Return embeddings [S, 1, D] of frame number `frame` of each stream for queries [S, 1, D]; zero where a stream
        has ended."""
        counts = [after - before for before, after in zip(streams.frame_starts, streams.frame_starts[1:], strict=False)]
        active = [video for video, count in enumerate(counts) if count > frame]
        video_index = {video: position for position, video in enumerate(active)}
        stream_slots = [
            (stream, video_index[video] * streams.slots_per_frame + slot)
            for stream, (video, slot) in enumerate(zip(streams.videos, streams.video_slots, strict=True))
            if video in video_index
        ]
        index = [streams.frame_starts[video] + frame for video in active]
        # one frame: a view, which copies nothing
        selection = slice(index[0], index[0] + 1) if len(index) == 1 else torch.tensor(index, device=query.device)
        frame_kv = [BlockKV(block.key[selection], block.value[selection]) for block in kv]
        if len(streams) == len(stream_slots) == len(active) == 1:
            return self.query_frames(query, frame_kv)
        stream, slot = (torch.tensor(list(v), device=query.device) for v in zip(*stream_slots, strict=True))
        table = query.new_zeros(len(active) * streams.slots_per_frame, query.shape[-1]).index_copy(
            0, slot, query[stream, 0]
        )
        embeddings = self.query_frames(table.view(len(active), streams.slots_per_frame, -1), frame_kv).flatten(0, 1)
        return embeddings.new_zeros(len(streams), embeddings.shape[-1]).index_copy(0, stream, embeddings[slot])[:, None]
