"""Files of torch that somebody else may have written: read as plain data, within the memory that the file itself takes.

`torch.load(weights_only=True)` runs no code of a file, but it unpacks compressed records, builds tensors whose size
has nothing to do with the file's (expanded, sparse, without storage), and what it raises depends on what is wrong.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a file that is cut off, damaged or made for this purpose can raise in torch.load, beside its UnpicklingError.
BROKEN: tuple[type[Exception], ...] = (
    *(RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, MemoryError, ImportError, struct.error, zipfile.BadZipFile, pickle.PickleError),
)
EXPANDED_BYTES = 1 << 26  # by which a tensor may be larger than its storage: small expanded buffers do no harm


class TorchFileError(ValueError):
    """A file of torch that is not read; the message says which and why.

    Attributes:
        is_archive: whether the file is a whole zip archive, as torch writes them.
    """

    def __init__(self, message: str, is_archive: bool) -> None:
        super().__init__(message)
        self.is_archive = is_archive


def read_torch_file(file: str | Path, map_location: Any = "cpu", mapped: bool = False) -> Any:
    """The content of a file that `torch.save` wrote: tensors and plain values. Runs no code of it.

    Args:
        map_location: device of the tensors. mapped: on the CPU they stay in the file until they are read (archives
            alone; the file must not be overwritten so long, only replaced).

    Raises:
        OSError: there is no such file, or it may not be read.
        TorchFileError: it is cut off, holds more than tensors and plain values, or would take more memory than the
            file.
    """
    path = Path(file)
    with path.open("rb"):  # what the system refuses is said in its own words
        pass
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _refuse_compressed(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped and is_archive)
    except BROKEN as error:
        raise TorchFileError(f"{path} {_what_is_wrong(error, is_archive, path)}", is_archive) from error
    for tensor in _tensors(content):
        problem = _oddity(tensor)
        if problem:
            raise TorchFileError(f"{path} holds {problem}: keygrip writes no such file, it is not read", is_archive)
    return content


def refuse_missing_device(device: Any) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device}: torch knows no such device; give cpu or cuda") from error
    if wanted.type == "cpu":
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != wanted.type:
        raise ValueError(
            f"device={device}: this machine has none that torch can use; give device=cpu, or check the driver "
            "(nvidia-smi)"
        )
    if wanted.index is not None and wanted.index >= torch.accelerator.device_count():
        raise ValueError(f"device={device}: this machine has {torch.accelerator.device_count()}, numbered from 0")


def _refuse_compressed(path: Path) -> None:
    """torch stores its records as they are; a compressed one may unpack to a thousand times its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, struct.error, OSError):
        return  # torch reads archives in its own way, and says what is wrong
    if packed:
        raise TorchFileError(
            f"{path} holds compressed records ({packed[0].filename[:80]!r}, {packed[0].file_size} bytes unpacked), "
            "which torch does not write: it is not read",
            is_archive=True,
        )


def _what_is_wrong(error: Exception, is_archive: bool, path: Path) -> str:
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "asks for more memory than this machine has"
    if is_archive:
        return "holds more than tensors and plain values, or is damaged"
    return f"is truncated or no file of torch ({path.stat().st_size} bytes)"


def _tensors(content: Any) -> list[Tensor]:
    """All tensors in nested containers, each once: a pickle may name one container many times, or inside itself."""
    found, waiting, seen = [], [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return found


def _oddity(tensor: Tensor) -> str | None:
    """Why a tensor is not one of numbers that lie in the file, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return "a sparse, nested or quantised tensor"
    if tensor.is_meta:
        return "a tensor without numbers"
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes() + EXPANDED_BYTES:
        return f"a tensor of {size} bytes in {tensor.untyped_storage().nbytes()} of storage"
    return None
