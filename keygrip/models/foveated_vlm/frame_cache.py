"""What a frozen encoder makes of frames, kept in memory: it is the same every epoch.

Legend: M real frames of a batch, H heads, R + N tokens, E head width, K pooled tokens, D backbone width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.models.backbone import BlockKV

# Of M frames: keys and values [M, H, R + N, E] by block, which queries attend to, or pooled patches [M, K, D].
Encoded = Sequence[BlockKV] | Tensor


def frame_names(batch: VideoTextBatch) -> list[bytes]:
    """M names of a batch's real frames, video after video: a hash of their pixels, so that clips, single frames and
    whole videos share what is kept, and no key that begins anew in another shard is mistaken."""
    frames = batch.frames[batch.frame_mask].cpu().numpy()
    return [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames]


class FrameCache:
    """What the encoder makes of each frame, by the name of the frame, as long as there is room.

    Each frame is encoded by itself, so that what is kept does not depend on the batch in which it first came, and a
    resumed run computes what the uninterrupted one did. That is slower than many together: give it room for all.

    Args:
        limit_gb: of memory; further frames are encoded each time.

    Attributes:
        room: bytes that are left of it.
    """

    def __init__(self, limit_gb: float) -> None:
        self.room = int(limit_gb * 2**30)
        self.kept: dict[bytes, Encoded] = {}

    def get(self, names: Sequence[bytes], frames: Tensor, encode: Callable[[Tensor], Encoded]) -> Encoded:
        """Of all M frames, as `encode` would give it.

        Args:
            names: M; the same name always stands for the same frame. frames: [M, 3, S, S].
            encode: of some of these frames.
        """
        found = []
        for place, name in enumerate(names):
            one = self.kept.get(name)
            if one is None:
                with torch.no_grad():
                    one = _own_memory(encode(frames[place : place + 1]))
                size = sum(part.nbytes for part in _tensors(one))
                if size <= self.room:
                    self.room -= size
                    self.kept[name] = one
            found.append(one)
        return _joined(found)


def _tensors(encoded: Encoded) -> list[Tensor]:
    if isinstance(encoded, Tensor):
        return [encoded]
    return [part for block in encoded for part in (block.key, block.value)]


def _own_memory(encoded: Encoded) -> Encoded:
    """Parts of a larger tensor would keep all of it."""
    if isinstance(encoded, Tensor):
        return encoded.contiguous()
    return [BlockKV(block.key.contiguous(), block.value.contiguous()) for block in encoded]


def _joined(encoded: Sequence[Encoded]) -> Encoded:
    """Of single frames, one behind the other."""
    tensors = [torch.cat(parts) for parts in zip(*map(_tensors, encoded), strict=True)]
    if isinstance(encoded[0], Tensor):
        return tensors[0]
    return [BlockKV(key, value) for key, value in zip(tensors[::2], tensors[1::2], strict=True)]
