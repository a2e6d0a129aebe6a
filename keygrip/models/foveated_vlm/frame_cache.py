"""Cache in memory for a frozen encoder's outputs on frames, which are the same in every epoch.

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
    """Return the names of a batch's M real frames, video by video: hashes of their pixels. Clips, single frames and
    whole videos then share entries, and samples of different shards with the same key are not confused."""
    frames = batch.frames[batch.frame_mask].cpu().numpy()
    return [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames]


SLAB_BYTES = 256 * 2**20


class FrameCache:
    """The encoder's output for each frame, by the name of the frame, as long as there is room.

    Each frame is encoded alone, so that its entry does not depend on the batch in which it first occurred, and a
    resumed run computes the same as an uninterrupted one. This is slower than encoding many frames together: give the
    cache room for all frames.

    Args:
        limit_gb: memory limit; frames that do not fit are encoded each time.

    Attributes:
        room: bytes that are left.
        kept: outputs of `encode` by name; views of slabs that hold many frames.
    """

    def __init__(self, limit_gb: float) -> None:
        self.room = int(limit_gb * 2**30)
        self.kept: dict[bytes, Encoded] = {}
        self._slabs: dict[tuple[object, ...], _Slab] = {}  # being filled, by shapes, types and devices

    def get(self, names: Sequence[bytes], frames: Tensor, encode: Callable[[Tensor], Encoded]) -> Encoded:
        """Return the outputs for all M frames, as `encode` would return them.

        Args:
            names: M; the same name always stands for the same frame. frames: [M, 3, S, S].
            encode: computes the outputs of some of these frames.
        """
        outputs = []
        for index, name in enumerate(names):
            output = self.kept.get(name)
            if output is None:
                with torch.no_grad():
                    output = encode(frames[index : index + 1])
                size = sum(part.nbytes for part in _list_tensors(output))
                if size <= self.room:
                    output = self.kept[name] = self._slab_for(output, size).add(output)
                    self.room -= size
            outputs.append(output)
        return _concatenate(outputs)

    def _slab_for(self, output: Encoded, size: int) -> _Slab:
        kind = tuple((part.shape, part.dtype, part.device) for part in _list_tensors(output))
        slab = self._slabs.get(kind)
        if slab is None or slab.full:
            slab = self._slabs[kind] = _Slab(output, max(1, min(SLAB_BYTES, self.room) // size))
        return slab


class _Slab:
    """Memory for several frames. One allocation per frame, between the tensors of training steps, would fragment the
    memory."""

    def __init__(self, like: Encoded, frames: int) -> None:
        with torch.inference_mode(False):  # validation (inference mode) fills it too
            self.parts = [
                torch.empty((frames, *part.shape[1:]), dtype=part.dtype, device=part.device)
                for part in _list_tensors(like)
            ]
        self.used = 0

    @property
    def full(self) -> bool:
        return self.used == len(self.parts[0])

    def add(self, one: Encoded) -> Encoded:
        """Copy the output of a frame into the next place; return views of that place."""
        with torch.inference_mode(False), torch.no_grad():
            views = [part[self.used : self.used + 1] for part in self.parts]
            for view, part in zip(views, _list_tensors(one), strict=True):
                view.copy_(part)
        self.used += 1
        return _rebuild(one, views)


def _list_tensors(encoded: Encoded) -> list[Tensor]:
    if isinstance(encoded, Tensor):
        return [encoded]
    return [part for block in encoded for part in (block.key, block.value)]


def _rebuild(template: Encoded, tensors: Sequence[Tensor]) -> Encoded:
    """Return tensors in the structure of `template`."""
    if isinstance(template, Tensor):
        return tensors[0]
    return [BlockKV(key, value) for key, value in zip(tensors[::2], tensors[1::2], strict=True)]


def _concatenate(encoded: Sequence[Encoded]) -> Encoded:
    """Concatenate the outputs of single frames."""
    return _rebuild(encoded[0], [torch.cat(parts) for parts in zip(*map(_list_tensors, encoded), strict=True)])
