"""Where text and visual tokens lie in the language model's input, computed once a batch on the CPU.

Legend: V videos, F frames of the longest, M real frames of all videos, B rows of text, L text tokens of the longest
row, N visual tokens of the longest row, T positions of the longest row, S streams (see `Streams`), C language width.

A row is text with its visual tokens put in as one run. Rows are compact (no holes) and padded on the right, so that
under causal attention nothing real ever sees padding: no mask is needed, and a row gives the same alone and in any
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.data.shards.packing import bins_of, positions_of


@dataclass(frozen=True)
class TextRows:
    """B rows of text about V videos.

    Args:
        input_ids: int64 [B, L], padded on the right.
        lengths: B counts of real tokens.
        visual_at: B positions in the text before which the visual tokens stand (0: before all text).
        videos: B indices of videos. frame_counts: V counts of frames; a row about a video without frames is plain text.
        seconds: V, when each frame was taken; () of images that have no common time; None (all, or of one video) where
            it is not known.
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
        """When the frames of some videos were taken, float32 [len(videos), frames], 0 behind a video's end; None where
        that is not known of all of them. Images without a common time are numbered."""
        if self.seconds is None:
            return None
        table = torch.zeros(len(videos), frames)
        for number, video in enumerate(videos):
            known, count = self.seconds[video], self.frame_counts[video]
            known = tuple(map(float, range(count))) if known is not None and not len(known) else known
            if count and (known is None or len(known) != count):
                return None
            if known and count:
                table[number, :count] = torch.tensor(known, dtype=torch.float32)
        return table.to(self.input_ids.device, non_blocking=True)

    def layout(self, tokens_per_frame: int = 1) -> RowLayout:
        """The whole rows, text and visual tokens."""
        counts = [self.frame_counts[video] * tokens_per_frame for video in self.videos]
        return RowLayout.build(self.lengths, self.visual_at, counts, self.input_ids.shape[1], self.input_ids.device)

    def positions(self, tokens_per_frame: int = 1, packed: bool = False) -> tuple[int, int]:
        """How many of the language model's positions hold something, and how many there are: of the rows, each as long
        as the longest, or of the bins that `Packing` fills."""
        pairs = zip(self.lengths, self.videos, strict=True)
        lengths = [length + self.frame_counts[video] * tokens_per_frame for length, video in pairs]
        return sum(lengths), int(positions_of(lengths, packed))

    def padding_share(self, tokens_per_frame: int = 1, packed: bool = False) -> float:
        """Share of the language model's `positions` that are padding."""
        held, places = self.positions(tokens_per_frame, packed)
        return 1 - held / places if places else 0.0

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
        """For texts of `lengths` in [B, width], with `counts` visual tokens before text token `visual_at`."""
        length, at, count = (torch.tensor(list(v), dtype=torch.int64)[:, None] for v in (lengths, visual_at, counts))
        longest = max((text + frames for text, frames in zip(lengths, counts, strict=True)), default=0)
        position = torch.arange(longest)[None]
        inside = (position >= at) & (position < at + count)
        text = torch.where(position < at, position, position - count)
        valid = position < length + count
        source = torch.where(inside, width + position - at, text)
        source = torch.where(valid, source, 0)
        token = torch.arange(width)[None]
        text_at = torch.where(token < at, token, token + count)
        visual = at + torch.arange(max(counts, default=0))[None]
        return cls(*(part.to(device, non_blocking=True) for part in (source, valid, text_at, visual)))

    def place(self, text: Tensor, visual: Tensor) -> Tensor:
        """Embeddings of text [B, L, C] and visual tokens [B, N, C] in their order, [B, T, C]."""
        both = torch.cat([text, visual.to(text.dtype)], dim=1)
        return take(both, self.source)


@dataclass(frozen=True)
class Packing:
    """B rows one behind the other in n bins of X positions (`bins_of`), so that little is padding.

    Attributes:
        source: int64 [n, X], place in the flattened rows [B * T]. rows: int64 [n, X], which row it is of; -1: padding.
        positions: int64 [n, X], in the row. places: int64 [B, T], place of each position in the flattened bins; padding
            has that of the first.
    """

    source: Tensor
    rows: Tensor
    positions: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device | None = None) -> Packing:
        """Of rows of these lengths in [B, width]."""
        bins, longest = bins_of(lengths)
        room = int(longest)
        source = torch.zeros(len(bins), room, dtype=torch.int64)
        owner = torch.full((len(bins), room), -1)
        positions = torch.zeros(len(bins), room, dtype=torch.int64)
        places = torch.zeros(len(lengths), width, dtype=torch.int64)
        for number, members in enumerate(bins):
            start = 0
            for row in members:
                length = lengths[row]
                inside = torch.arange(length)
                source[number, start : start + length] = row * width + inside
                owner[number, start : start + length] = row
                positions[number, start : start + length] = inside
                places[row, :length] = number * room + start + inside
                start += length
        return cls(*(part.to(device, non_blocking=True) for part in (source, owner, positions, places)))

    def pack(self, values: Tensor) -> Tensor:
        """[B, T, C] -> [n, X, C]."""
        return values.flatten(0, 1)[self.source]

    def unpack(self, values: Tensor) -> Tensor:
        """[n, X, C] -> [B, T, C]; what stands in padding means nothing."""
        return values.flatten(0, 1)[self.places]


@dataclass(frozen=True)
class Streams:
    """S streams: each a video with the text that stands before its visual tokens.

    In the published order (visual tokens first) nothing stands before them: one stream per video, shared by its rows.
    With the question first, a stream per row.

    Attributes:
        input_ids: int64 [S, P] of the text before the visual tokens, and its lengths.
        frame_counts: S counts. videos: S indices.
        of_row: int64 [B], each row's stream (0 for rows without frames, whose layout takes nothing from it).
        layout: text before and all frames but the last, whose hidden state no query needs.
        query_at: int64 [S, F], position in `layout` whose hidden state becomes the frame's query (clamped to 0).
        first: bool [S, F], frames with nothing before them: the learned first query.
        places: int64 [n], for each real frame of each stream its place in [S * F].
        slots: int64 [n], its place in [M * Q], the query table of the M real frames with Q streams per video.
        slots_per_frame: Q.
        frame_starts: V + 1 offsets of the videos in the M frames.
        video_slots: S, the stream's number among those of its video.
        seconds: float32 [S, F], when each frame was taken; None where that is not known.
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
    def longest(self) -> int:
        """F, frames of the longest stream."""
        return max(self.frame_counts, default=0)

    @classmethod
    def of(cls, rows: TextRows) -> Streams:
        device = rows.input_ids.device
        seeing = [row for row, video in enumerate(rows.videos) if rows.frame_counts[video]]
        by_video = all(rows.visual_at[row] == 0 for row in seeing)
        numbers: dict[int, int] = {}  # stream by video or by row
        members: list[int] = []  # a row of each stream
        of_row = [0] * len(rows.videos)
        for row in seeing:
            name = rows.videos[row] if by_video else row
            if name not in numbers:
                numbers[name] = len(members)
                members.append(row)
            of_row[row] = numbers[name]
        videos = [rows.videos[row] for row in members]
        lengths = [rows.visual_at[row] for row in members]
        counts = [rows.frame_counts[video] for video in videos]
        width = max(lengths, default=0)
        input_ids = rows.input_ids[torch.tensor(members, dtype=torch.int64, device=device), :width]
        layout = RowLayout.build(lengths, lengths, [count - 1 for count in counts], width, device)
        number = torch.arange(max(counts, default=0))[None]
        query_at = torch.tensor(lengths, dtype=torch.int64)[:, None] + number - 1
        query_at = torch.where(number < torch.tensor(counts, dtype=torch.int64)[:, None], query_at, 0)
        starts = [0]
        for count in rows.frame_counts:
            starts.append(starts[-1] + count)
        slot_of: list[int] = []
        used: dict[int, int] = {}
        for video in videos:
            slot_of.append(used.get(video, 0))
            used[video] = slot_of[-1] + 1
        per_frame, longest = max(used.values(), default=1), max(counts, default=0)
        places, slots = [], []
        for stream, (video, count, slot) in enumerate(zip(videos, counts, slot_of, strict=True)):
            places += [stream * longest + frame for frame in range(count)]
            slots += [(starts[video] + frame) * per_frame + slot for frame in range(count)]

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
            slots_per_frame=per_frame,
            frame_starts=starts,
            video_slots=slot_of,
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
        """[M, Q, C] by frame (Q = 1: the same for all streams) -> [S, F, C] by stream, zero behind a stream's end."""
        slots = self.slots if values.shape[1] == self.slots_per_frame else self.slots // self.slots_per_frame
        table = values.new_zeros(len(self) * self.longest, values.shape[-1])
        return table.index_copy(0, self.places, values.flatten(0, 1)[slots]).view(len(self), self.longest, -1)


def text_rows(batch: VideoTextBatch) -> TextRows:
    """A batch's rows as the network takes them."""
    rows = len(batch)
    # together, since each read waits for the GPU
    numbers = torch.cat([batch.attention_mask.sum(1), batch.video_index, batch.frame_mask.sum(1)]).tolist()
    lengths, videos, frames = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
    return TextRows(batch.input_ids, lengths, batch.visual_at, videos, frames, batch.seconds or None)


def real_frames(frames: Tensor, counts: Sequence[int]) -> Tensor:
    """[V, F, 3, H, W] -> the M real frames [M, 3, H, W] of all videos in order; padding is never computed with."""
    videos, longest = frames.shape[:2]
    if list(counts) == [longest] * videos:
        return frames.flatten(0, 1)
    keep = [video * longest + frame for video, count in enumerate(counts) for frame in range(count)]
    return frames.flatten(0, 1)[torch.tensor(keep, dtype=torch.int64, device=frames.device)]


def take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, X, C] at index [B, Y] -> [B, Y, C]. Whole positions are looked up: the gradient of a `gather` is, in
    deterministic mode on a GPU, sorted number by number."""
    first = torch.arange(len(values), device=index.device)[:, None] * values.shape[1]
    return values.flatten(0, 1)[first + index]  # no view, which a compiled block would be compiled anew for
