"""Read torch files from untrusted sources as plain data, without using more memory than the file's size.

`torch.load(weights_only=True)` runs no code from a file. But it decompresses records, creates tensors and bytes of any
size (expanded, without storage, by a constructor that takes a size), and raises many kinds of exceptions.
"""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from keygrip.training.nested_values import inside_of, size_of

LARGE = ("state_dict", "ema", "optimizer_states")  # parts of a checkpoint that are as large as the weights

# Exceptions of torch.load for a file that is truncated, damaged or malicious, in addition to its UnpicklingError.
BROKEN: tuple[type[Exception], ...] = (
    *(RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, MemoryError, ImportError, struct.error, zipfile.BadZipFile, pickle.PickleError),
)
EXPANDED_BYTES = 1 << 26  # by which a tensor may be larger than its storage: small expanded buffers are harmless
MOST_VALUES = 10_000_000  # in nested containers; a value is counted once per reference
# All names that tensors and plain values need. Torch allows more names, some of which accept any size as an argument
# (bytearray, the constructors of tensors), while others enlarge their input (codecs, casts).
NAMED = {
    *(
        "collections OrderedDict",
        "collections Counter",
        "builtins set",
        "builtins complex",
        "__builtin__ set",
        "__builtin__ complex",
    ),
    *("torch Size", "torch device", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("torch.nn.parameter Parameter", "torch BFloat16Storage", "torch HalfStorage", "torch FloatStorage"),
    *("torch DoubleStorage", "torch ByteStorage", "torch CharStorage", "torch ShortStorage", "torch IntStorage"),
    *("torch LongStorage", "torch BoolStorage", "torch ComplexFloatStorage", "torch ComplexDoubleStorage"),
    *(f"torch {name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
}
ARCHIVE = b"PK\3\4"
LEGACY_PICKLES = 5  # before torch 1.6: a number, a version, the machine, the content, the names of its storages


class TorchFileError(ValueError):
    """A torch file is rejected; the message states which file and why.

    Attributes:
        is_archive: whether the file is a complete zip archive, as torch writes them.
    """

    def __init__(self, message: str, is_archive: bool) -> None:
        super().__init__(message)
        self.is_archive = is_archive


def read_torch_file(file: str | Path, map_location: Any = "cpu", mapped: bool = False) -> Any:
    """Read a file that `torch.save` wrote, with tensors and plain values. Runs no code from it.

    Args:
        map_location: device of the tensors. mapped: on the CPU, memory-map the tensors (archives only; while the file
            is in use it must not be overwritten, only replaced).

    Raises:
        OSError: there is no such file, or it is not readable.
        TorchFileError: the file is truncated, contains more than tensors and plain values, or would use more memory
            than its size.
    """
    path = Path(file)
    with path.open("rb") as opened:  # errors of the system are not changed
        begins_as_archive = opened.read(len(ARCHIVE)) == ARCHIVE  # how torch recognises an archive
    is_archive = zipfile.is_zipfile(path)
    if begins_as_archive != is_archive:  # the content checked here must be the content that torch reads
        raise TorchFileError(f"{path} {_describe_load_error(EOFError(), False, path)}", is_archive)
    if is_archive:
        _refuse_compressed(path)
    try:
        unknown = _unknown_name(path, is_archive)
        if unknown is None:
            content = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped and is_archive)
    except BROKEN as error:
        raise TorchFileError(f"{path} {_describe_load_error(error, is_archive, path)}", is_archive) from error
    if unknown is not None:
        raise TorchFileError(f"{path} names {unknown}: it holds more than tensors and plain values", is_archive)
    if size_of(content) > MOST_VALUES:
        raise TorchFileError(
            f"{path} holds more than {MOST_VALUES} values, or a container inside itself: keygrip writes no such file, "
            "it is not read",
            is_archive,
        )
    for tensor in _tensors(content):
        problem = _describe_unstored_values(tensor)
        if problem:
            raise TorchFileError(f"{path} holds {problem}: keygrip writes no such file, it is not read", is_archive)
    return content


def refuse_missing_device(device: Any) -> None:
    """Reject a device that this machine does not have.

    Raises:
        ValueError: torch has no such device, or cannot use it here.
    """
    try:
        requested = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device}: torch has no such device; give cpu or cuda") from error
    if requested.type == "cpu":
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != requested.type:
        raise ValueError(
            f"device={device}: this machine has none that torch can use; give device=cpu, or check the driver "
            "(nvidia-smi)"
        )
    if requested.index is not None and requested.index >= torch.accelerator.device_count():
        raise ValueError(f"device={device}: this machine has {torch.accelerator.device_count()}, numbered from 0")


def _refuse_compressed(path: Path) -> None:
    """Reject compressed records: torch does not compress, and a record may unpack to a thousand times its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, struct.error, OSError) as error:
        # torch has its own archive reader and may find content that was not checked here
        raise TorchFileError(f"{path} {_describe_load_error(error, True, path)}", is_archive=True) from error
    if packed:
        raise TorchFileError(
            f"{path} holds compressed records ({packed[0].filename[:80]!r}, {packed[0].file_size} bytes unpacked), "
            "which torch does not write: it is not read",
            is_archive=True,
        )


def _unknown_name(path: Path, is_archive: bool) -> str | None:
    """Return a class or function named in a file that tensors and plain values do not need; None if there is none."""
    with path.open("rb") as file:
        if is_archive:  # with torch's own reader, since another reader may find another record
            pickles: list[IO[bytes]] = [io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))]
        else:
            pickles = [file] * LEGACY_PICKLES
        for stream in pickles:
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "STACK_GLOBAL":
                    return "a class or function by values of the stack"
                if operation.name in ("GLOBAL", "INST") and argument not in NAMED:
                    return str(argument).replace(" ", ".")[:80]
    return None


def _describe_load_error(error: Exception, is_archive: bool, path: Path) -> str:
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "asks for more memory than this machine has"
    if is_archive:
        return "holds more than tensors and plain values, or is damaged"
    return f"is truncated or no file of torch ({path.stat().st_size} bytes)"


def _tensors(content: Any) -> list[Tensor]:
    """Return all tensors in nested containers; each container is visited once, as a pickle may repeat it many times."""
    tensors, waiting, seen = [], [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += inside_of(value)
    return tensors


def _describe_unstored_values(tensor: Tensor) -> str | None:
    """Return why the values of a tensor are not all stored in the file, or None."""
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes() + EXPANDED_BYTES:
        return f"a tensor of {size} bytes in {tensor.untyped_storage().nbytes()} of storage"
    return None


def copied_but_large(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a memory-mapped checkpoint with copies of all parts except `LARGE`, because modules and
    callbacks may keep them: reading a mapped tensor would end the process if the file is truncated later."""
    return checkpoint | copy.deepcopy({name: part for name, part in checkpoint.items() if name not in LARGE})
