"""Positions of text and visual tokens in the language model's input, computed once per batch on the CPU.

Legend: V videos, F frames of the longest, M real frames of all videos, B rows of text, L text tokens of the longest
row, N visual tokens of the longest row, T positions of the longest row, S streams (see `Streams`), C language width.

A row is text with its visual tokens inserted as one contiguous block. Rows have no gaps and are padded on the right, so
that under causal attention no real token attends to padding: no mask is needed, and the result of a row does not depend
on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.data.shards.packing import bins_of, positions_of_passes


@dataclass(frozen=True)
class TextRows:
    """B rows of text about V videos.

    Args:
        input_ids: int64 [B, L], padded on the right.
        lengths: B counts of real tokens.
        visual_at: B positions in the text before which the visual tokens stand (0: before all text).
        videos: B indices of videos. frame_counts: V counts of frames; a row about a video without frames is plain text.
        seconds: V sequences of frame times; () for images without a common time; None (for all, or for one video) if
            the times are not known.
    """

    input_ids: Tensor
    lengths: Sequence[int]
    visual_at: Sequence[int]
    videos: Sequence[int]
    frame_counts: Sequence[int]
    seconds: Sequence[Sequence[float] | None] | None = None

    def __post_init__(self) -> None:
        rows = len(self.input_ids)
        if not len(self.lengths) == len(self.visual_at) == len(self.videos) == rows:
            raise ValueError(
                f"{rows} rows of text with {len(self.lengths)} lengths, {len(self.visual_at)} places and "
                f"{len(self.videos)} videos"
            )
        if any(not 0 <= at <= length for at, length in zip(self.visual_at, self.lengths, strict=True)):
            raise ValueError("visual_at must lie inside each row's text")
        if any(not 0 <= video < len(self.frame_counts) for video in self.videos):
            raise ValueError(f"video indices must lie in 0..{len(self.frame_counts) - 1}")

    def seconds_of(self, videos: Sequence[int], frames: int) -> Tensor | None:
        """Return the frame times of some videos, float32 [len(videos), frames], 0 after a video's end; None if those of
        one video are not known. For images without a common time, they are the frame numbers."""
        if self.seconds is None:
            return None
        table = torch.zeros(len(videos), frames)
        for index, video in enumerate(videos):
            times, count = self.seconds[video], self.frame_counts[video]
            times = tuple(map(float, range(count))) if times is not None and not len(times) else times
            if count and (times is None or len(times) != count):
                return None
            if times and count:
                table[index, :count] = torch.tensor(times, dtype=torch.float32)
        return table.to(self.input_ids.device, non_blocking=True)

    def layout(self, tokens_per_frame: int = 1) -> RowLayout:
        """Return the layout of whole rows, text and visual tokens."""
        counts = [self.frame_counts[video] * tokens_per_frame for video in self.videos]
        return RowLayout.build(self.lengths, self.visual_at, counts, self.input_ids.shape[1], self.input_ids.device)

    def positions(
        self, tokens_per_frame: int = 1, packed: bool = False, query_passes: float = 0.0
    ) -> tuple[float, float]:
        """Return how many positions hold tokens over all passes of the language model, and how many there are in total:
        in rows padded to the longest one, or with `packed` in the bins that `Packing` fills.

        Args:
            query_passes: number of passes over the `streams` before the pass over the rows, or its mean.
        """
        pairs = zip(self.lengths, self.videos, strict=True)
        lengths = [length + self.frame_counts[video] * tokens_per_frame for length, video in pairs]
        streams = self.streams.read_lengths if query_passes else []
        return positions_of_passes(lengths, streams, query_passes, packed)

    def padding_share(self, tokens_per_frame: int = 1, packed: bool = False, query_passes: float = 0.0) -> float:
        """Share of the language model's `positions` that are padding."""
        occupied, total = self.positions(tokens_per_frame, packed, query_passes)
        return 1 - occupied / total if total else 0.0

    @cached_property
    def streams(self) -> Streams:
        """The distinct streams: a video with the text before its visual tokens."""
        return Streams.of(self)


@dataclass(frozen=True)
class RowLayout:
    """Positions of B rows.

    Attributes:
        source: int64 [B, T], for each position an index into the row's text (below L) or visual tokens (L + n); padding
            repeats the first text token.
        valid: bool [B, T], False for padding.
        text_at: int64 [B, L], the position of each text token. visual_at: int64 [B, N], of each visual token.
    """

    source: Tensor
    valid: Tensor
    text_at: Tensor
    visual_at: Tensor

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        visual_at: Sequence[int],
        counts: Sequence[int],
        width: int,
        device: torch.device | None = None,
    ) -> RowLayout:
        """Lay out texts of `lengths` in [B, width], with `counts` visual tokens before text token `visual_at`."""
        length, visual_start, count = (
            torch.tensor(list(v), dtype=torch.int64)[:, None] for v in (lengths, visual_at, counts)
        )
        longest = max((text + frames for text, frames in zip(lengths, counts, strict=True)), default=0)
        position = torch.arange(longest)[None]
        is_visual = (position >= visual_start) & (position < visual_start + count)
        text = torch.where(position < visual_start, position, position - count)
        valid = position < length + count
        source = torch.where(is_visual, width + position - visual_start, text)
        source = torch.where(valid, source, 0)
        token = torch.arange(width)[None]
        text_at = torch.where(token < visual_start, token, token + count)
        visual = visual_start + torch.arange(max(counts, default=0))[None]
        return cls(*(part.to(device, non_blocking=True) for part in (source, valid, text_at, visual)))

    def place(self, text: Tensor, visual: Tensor) -> Tensor:
        """Arrange embeddings of text [B, L, C] and visual tokens [B, N, C] in the order of the rows, [B, T, C]."""
        both = torch.cat([text, visual.to(text.dtype)], dim=1)
        return take(both, self.source)


@dataclass(frozen=True)
class Packing:
    """B rows concatenated in n bins of X positions (`bins_of`), so that there is little padding.

    Attributes:
        source: int64 [n, X], index into the flattened rows [B * T]. rows: int64 [n, X], index of the row; -1: padding.
        positions: int64 [n, X], position in the row. places: int64 [B, T], index of each position in the flattened
            bins; 0 for padding.
    """

    source: Tensor
    rows: Tensor
    positions: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device | None = None) -> Packing:
        """Pack rows of these lengths in [B, width]."""
        bins, longest = bins_of(lengths)
        room = int(longest)
        source = torch.zeros(len(bins), room, dtype=torch.int64)
        owner = torch.full((len(bins), room), -1)
        positions = torch.zeros(len(bins), room, dtype=torch.int64)
        places = torch.zeros(len(lengths), width, dtype=torch.int64)
        for bin_index, members in enumerate(bins):
            start = 0
            for row in members:
                length = lengths[row]
                offsets = torch.arange(length)
                source[bin_index, start : start + length] = row * width + offsets
                owner[bin_index, start : start + length] = row
                positions[bin_index, start : start + length] = offsets
                places[row, :length] = bin_index * room + start + offsets
                start += length
        return cls(*(part.to(device, non_blocking=True) for part in (source, owner, positions, places)))

    def pack(self, values: Tensor) -> Tensor:
        """[B, T, C] -> [n, X, C]."""
        return values.flatten(0, 1)[self.source]

    def unpack(self, values: Tensor) -> Tensor:
        """[n, X, C] -> [B, T, C]; values at padding are undefined."""
        return values.flatten(0, 1)[self.places]


@dataclass(frozen=True)
class Streams:
    """S streams: each a video with the text that stands before its visual tokens.

    In the published order (visual tokens first) no text precedes them: there is one stream per video, shared by its
    rows. With the question first, there is one stream per row.

    Attributes:
        input_ids: int64 [S, P] of the text before the visual tokens. lengths: S lengths of that text.
        frame_counts: S counts. videos: S indices.
        of_row: int64 [B], each row's stream (0 for rows without frames, whose layout does not use it).
        layout: the text before the frames, and all frames except the last, whose hidden state no query needs.
        query_at: int64 [S, F], position in `layout` whose hidden state becomes the frame's query (clamped to 0).
        first: bool [S, F], frames with nothing before them, which use the learned first query.
        places: int64 [n], for each real frame of each stream its index in [S * F].
        slots: int64 [n], its index in [M * Q], the query table of the M real frames with Q streams per video.
        slots_per_frame: Q.
        frame_starts: V + 1 offsets of the videos in the M frames.
        video_slots: S, the stream's number among the streams of its video.
        seconds: float32 [S, F], time of each frame; None if the times are not known.
    """

    input_ids: Tensor
    lengths: list[int]
    frame_counts: list[int]
    videos: list[int]
    of_row: Tensor
    layout: RowLayout
    query_at: Tensor
    first: Tensor
    places: Tensor
    slots: Tensor
    slots_per_frame: int
    frame_starts: list[int]
    video_slots: list[int]
    seconds: Tensor | None

    def __len__(self) -> int:
        return len(self.frame_counts)

    @property
    def read_lengths(self) -> list[int]:
        """S numbers of positions that a query pass reads: the text before the frames, and all frames but the last."""
        return [text + frames - 1 for text, frames in zip(self.lengths, self.frame_counts, strict=True)]

    @property
    def longest(self) -> int:
        """F, frames of the longest stream."""
        return max(self.frame_counts, default=0)

    @classmethod
    def of(cls, rows: TextRows) -> Streams:
        device = rows.input_ids.device
        visual_rows = [row for row, video in enumerate(rows.videos) if rows.frame_counts[video]]
        by_video = all(rows.visual_at[row] == 0 for row in visual_rows)
        stream_index: dict[int, int] = {}  # stream by video or by row
        members: list[int] = []  # one row of each stream
        of_row = [0] * len(rows.videos)
        for row in visual_rows:
            stream_key = rows.videos[row] if by_video else row
            if stream_key not in stream_index:
                stream_index[stream_key] = len(members)
                members.append(row)
            of_row[row] = stream_index[stream_key]
        videos = [rows.videos[row] for row in members]
        lengths = [rows.visual_at[row] for row in members]
        counts = [rows.frame_counts[video] for video in videos]
        width = max(lengths, default=0)
        input_ids = rows.input_ids[torch.tensor(members, dtype=torch.int64, device=device), :width]
        layout = RowLayout.build(lengths, lengths, [count - 1 for count in counts], width, device)
        frame_index = torch.arange(max(counts, default=0))[None]
        query_at = torch.tensor(lengths, dtype=torch.int64)[:, None] + frame_index - 1
        query_at = torch.where(frame_index < torch.tensor(counts, dtype=torch.int64)[:, None], query_at, 0)
        starts = [0]
        for count in rows.frame_counts:
            starts.append(starts[-1] + count)
        stream_slots: list[int] = []
        slot_counts: dict[int, int] = {}
        for video in videos:
            stream_slots.append(slot_counts.get(video, 0))
            slot_counts[video] = stream_slots[-1] + 1
        slots_per_frame, longest = max(slot_counts.values(), default=1), max(counts, default=0)
        places, slots = [], []
        for stream, (video, count, slot) in enumerate(zip(videos, counts, stream_slots, strict=True)):
            places += [stream * longest + frame for frame in range(count)]
            slots += [(starts[video] + frame) * slots_per_frame + slot for frame in range(count)]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        return cls(
            input_ids=input_ids,
            lengths=lengths,
            frame_counts=counts,
            videos=videos,
            of_row=tensor(of_row),
            layout=layout,
            query_at=query_at.clamp_min(0).to(device, non_blocking=True),
            first=(query_at < 0).to(device, non_blocking=True),
            places=tensor(places),
            slots=tensor(slots),
            slots_per_frame=slots_per_frame,
            frame_starts=starts,
            video_slots=stream_slots,
            seconds=rows.seconds_of(videos, longest),
        )

    def to_frames(self, values: Tensor) -> Tensor:
        """[S, F, C] by stream -> [M, Q, C] by frame; slots that no stream uses are zero."""
        frames = self.frame_starts[-1] * self.slots_per_frame
        table = values.new_zeros(frames, values.shape[-1])
        return table.index_copy(0, self.slots, values.flatten(0, 1)[self.places]).view(
            -1, self.slots_per_frame, values.shape[-1]
        )

    def to_streams(self, values: Tensor) -> Tensor:
        """[M, Q, C] by frame (Q = 1: the same for all streams) -> [S, F, C] by stream, zero after a stream's end."""
        slots = self.slots if values.shape[1] == self.slots_per_frame else self.slots // self.slots_per_frame
        table = values.new_zeros(len(self) * self.longest, values.shape[-1])
        return table.index_copy(0, self.places, values.flatten(0, 1)[slots]).view(len(self), self.longest, -1)


def text_rows(batch: VideoTextBatch) -> TextRows:
    """Convert a batch to the rows that the network reads."""
    rows = len(batch)
    # read together, since each read waits for the GPU
    numbers = torch.cat([batch.attention_mask.sum(1), batch.video_index, batch.frame_mask.sum(1)]).tolist()
    lengths, videos, frames = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
    return TextRows(batch.input_ids, lengths, batch.visual_at, videos, frames, batch.seconds or None)


def real_frames(frames: Tensor, counts: Sequence[int]) -> Tensor:
    """[V, F, 3, H, W] -> the M real frames [M, 3, H, W] of all videos in order, without padding."""
    videos, longest = frames.shape[:2]
    if list(counts) == [longest] * videos:
        return frames.flatten(0, 1)
    keep = [video * longest + frame for video, count in enumerate(counts) for frame in range(count)]
    return frames.flatten(0, 1)[torch.tensor(keep, dtype=torch.int64, device=frames.device)]


def take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, X, C] at index [B, Y] -> [B, Y, C]. Whole positions are indexed: in deterministic mode on a GPU, the
    gradient of `gather` sorts every single value."""
    row_starts = torch.arange(len(values), device=index.device)[:, None] * values.shape[1]
    return values.flatten(0, 1)[row_starts + index]  # no view, for which a compiled block is compiled again
