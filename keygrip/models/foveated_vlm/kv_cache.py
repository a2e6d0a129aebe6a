"""Keys and values of frames kept in memory: a frozen encoder gives the same ones every epoch.

Legend: M real frames of a batch, H heads, R + N tokens, E head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.models.backbone import BlockKV

Encode = Callable[[Tensor], Sequence[BlockKV]]


def frame_names(batch: VideoTextBatch) -> list[bytes]:
    """M names of a batch's real frames, video after video: a hash of their pixels, so that clips, single frames and
    whole videos share what is kept, and no key that begins anew in another shard is mistaken."""
    frames = batch.frames[batch.frame_mask].cpu().numpy()
    return [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames]


class KeyValueCache:
    """Keys and values by the name of the frame, as long as there is room.

    Each frame is encoded by itself, so that what is kept does not depend on the batch in which it first came, and a
    resumed run computes what the uninterrupted one did. That is slower than many together: give it room for all.

    Args:
        limit_gb: of memory; further frames are encoded each time.

    Attributes:
        room: bytes that are left of it.
    """

    def __init__(self, limit_gb: float) -> None:
        self.room = int(limit_gb * 2**30)
        self.kept: dict[bytes, list[BlockKV]] = {}

    def get(self, names: Sequence[bytes], frames: Tensor, encode: Encode) -> list[BlockKV]:
        """Keys and values [M, H, R + N, E] by block.

        Args:
            names: M; the same name always stands for the same frame. frames: [M, 3, S, S].
            encode: of these [m, 3, S, S] -> keys and values by block.
        """
        parts = []
        for place, name in enumerate(names):
            found = self.kept.get(name)
            if found is None:
                with torch.no_grad():
                    # contiguous: parts of a larger tensor would keep all of it
                    found = [
                        BlockKV(block.key.contiguous(), block.value.contiguous())
                        for block in encode(frames[place : place + 1])
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
