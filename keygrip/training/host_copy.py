"""Values of buffers as Python reads them, without a wait for the GPU at every read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class HostCopy:
    """What a buffer says, as `Tensor.tolist` gives it, read from its device once after every change.

    Such a read waits until the GPU has done all that it was given before, and the GPU then waits for the next kernel. A
    buffer that is replaced, as by moving its module, or changed in place, as by loading a checkpoint, is read anew. A
    copy of the module that holds it begins with nothing kept.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Any] | None = None

    def __call__(self, buffer: Tensor) -> Any:
        """Do not change what it returns."""
        if buffer.is_inference():  # torch counts no changes of such tensors
            return buffer.tolist()
        kept = self._kept  # another thread may put another one in its place
        if kept is None or kept[0] is not buffer or kept[1] != buffer._version:
            self._kept = kept = (buffer, buffer._version, buffer.tolist())
        return kept[2]

    def __reduce__(self) -> tuple[type[HostCopy], tuple[()]]:
        return HostCopy, ()
