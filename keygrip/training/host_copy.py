"""Read the values of buffers in Python without waiting for the GPU at every read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class HostCopy:
    """Cached `Tensor.tolist` of a buffer, which is read from its device only once after every change.

    Reading waits until the GPU has finished all queued work, and the GPU then waits for the next kernel. A buffer that
    is replaced, e.g. by moving its module, or changed in place, e.g. by loading a checkpoint, is read again. A copy of
    the module starts with an empty cache.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Any] | None = None

    def __call__(self, buffer: Tensor) -> Any:
        """Return the values of the buffer. Do not modify the result."""
        if buffer.is_inference():  # torch does not count changes of such tensors
            return buffer.tolist()
        kept = self._kept  # another thread may replace it
        if kept is None or kept[0] is not buffer or kept[1] != buffer._version:
            self._kept = kept = (buffer, buffer._version, buffer.tolist())
        return kept[2]

    def __reduce__(self) -> tuple[type[HostCopy], tuple[()]]:
        return HostCopy, ()
