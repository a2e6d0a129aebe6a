"""Keys and values of videos kept in memory: a frozen encoder gives the same ones every epoch.

Legend: V videos, M their real frames, H heads, R + N tokens, E head width.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.models.backbone import BlockKV

Encode = Callable[[Tensor], Sequence[BlockKV]]


def video_names(batch: VideoTextBatch) -> list[str]:
    """A name of each video that stands for its frames alone: source, key and a checksum of the frames, since keys begin
    anew in every shard and split of some programs."""
    rows = {video: row for row, video in reversed(list(enumerate(batch.video_index.tolist())))}
    pixels, counts = batch.frames.cpu().numpy(), batch.frame_mask.sum(1).tolist()
    names = []
    for video, count in enumerate(counts):
        row = rows.get(video)  # None: all its conversations were left out
        name = "" if row is None else f"{batch.source[row]}/{batch.key[row]}"
        names.append(f"{name}/{zlib.crc32(pixels[video, :count].tobytes()):08x}")
    return names


class KeyValueCache:
    """Keys and values by the name of the video, as long as there is room.

    Each video is encoded by itself, so that what is kept does not depend on the batch in which it first came, and a
    resumed run computes what the uninterrupted one did.

    Args:
        limit_gb: of memory; further videos are encoded each time.
    """

    def __init__(self, limit_gb: float) -> None:
        self.room = int(limit_gb * 2**30)
        self.kept: dict[str, list[BlockKV]] = {}

    def get(self, names: Sequence[str], frames: Tensor, counts: Sequence[int], encode: Encode) -> list[BlockKV]:
        """Keys and values [M, H, R + N, E] by block, of all videos' real frames one behind the other.

        Args:
            names: V; the same name always stands for the same frames. frames: [V, F, 3, S, S], normalised.
            counts: V real frames. encode: frames [m, 3, S, S] -> keys and values by block.
        """
        parts = []
        for video, (name, count) in enumerate(zip(names, counts, strict=True)):
            if not count:
                continue
            found = self.kept.get(name)
            if found is None:
                with torch.no_grad():
                    # contiguous: parts of a larger tensor would keep all of it
                    found = [
                        BlockKV(block.key.contiguous(), block.value.contiguous())
                        for block in encode(frames[video, :count])
                    ]
                size = sum(block.key.nbytes + block.value.nbytes for block in found)
                if size <= self.room:
                    self.room -= size
                    self.kept[name] = found
            parts.append(found)
        return [
            BlockKV(torch.cat([block.key for block in blocks]), torch.cat([block.value for block in blocks]))
            for blocks in zip(*parts, strict=True)
        ]
