"""Checkpoint files with a hash at their end, and checks that weights fit a model.

A checkpoint is a zip archive. Its SHA-256 is stored in the archive's comment, the last bytes of the file, so that any
changed byte is detected: zip's own checksums cover neither names nor headers nor padding. The hash is that of the file
before the comment was added.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from keygrip.artifacts import read_blocks, sha256_of
from keygrip.training.torch_files import read_torch_file

PREFIX = b"keygrip-sha256:"
COMMENT_BYTES = len(PREFIX) + 64
COMMENT = re.compile(re.escape(PREFIX) + rb"[0-9a-f]{64}")
END_BYTES = 22  # of zip's end record without comment; its last two bytes are the comment's length
END_SIGNATURE = b"PK\x05\x06"
SHOWN = 3
SETTLED_S = 2.0  # a file may change once more within the resolution of its time stamps, up to 2 s on some disks


class ChangedFileError(ValueError):
    """A checkpoint differs from the file that was written."""


class HashedFile:
    """A file for torch.save that also computes the SHA-256 of what is written, so that it is not read back for it.
    Torch writes from the first byte to the last, without going back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes and return their number."""
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Pass what is buffered on to the operating system."""
        self._file.flush()

    def digest(self) -> str:
        """Return the SHA-256 of all bytes so far."""
        return self._hash.hexdigest()


def sign(file: Path, digest: str) -> None:
    """Add the hash to a zip file that has no comment yet.

    Args:
        file: the whole file. digest: SHA-256 of its bytes (`HashedFile.digest`).

    Raises:
        ValueError: the file does not end like a zip file without comment.
    """
    with file.open("r+b") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - END_BYTES))
        end = handle.read()
        if not end.startswith(END_SIGNATURE) or end[-2:] != b"\0\0":
            raise ValueError(f"{file} does not end like a zip file without comment")
        handle.seek(size - 2)
        handle.write(COMMENT_BYTES.to_bytes(2, "little") + PREFIX + digest.encode())


def is_signed(file: Path) -> bool:
    """Return whether the file ends with a hash (correct or not)."""
    with file.open("rb") as handle:
        size = handle.seek(0, 2)
        if size < END_BYTES + COMMENT_BYTES:
            return False
        handle.seek(size - COMMENT_BYTES)
        return COMMENT.fullmatch(handle.read()) is not None


def verify(file: Path) -> None:
    """Check a signed file. A file that this process has checked is not read again until it is changed or replaced: one
    start reads its checkpoint several times, and hashing tens of gigabytes takes minutes.

    Raises:
        ChangedFileError: a byte differs from what was written.
    """
    with file.open("rb") as handle:
        status = os.fstat(handle.fileno())  # before the file is read: a change in the meantime is a later one
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if version in _verified:
            return
        settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
        size = handle.seek(0, 2)
        handle.seek(max(0, size - COMMENT_BYTES - 2))
        tail = handle.read()
    length, comment = tail[:2], tail[2:]
    well_formed = COMMENT.fullmatch(comment) is not None and length == COMMENT_BYTES.to_bytes(2, "little")
    if not well_formed or _digest(file, size - COMMENT_BYTES).encode() != comment.removeprefix(PREFIX):
        raise ChangedFileError(f"{file} is damaged: a byte differs from what was written; take another copy of it")
    if settled:
        _verified.add(version)


_verified: set[tuple[int, ...]] = set()  # device, inode, size and times of change of files that this process checked


def refuse_damaged(file: Path) -> None:
    """Check a file of tensors: a checkpoint by its hash, another file of torch.save by the checksums of its zip
    archive, which torch.load does not check. Older files of torch.save have no checksums.

    Raises:
        ChangedFileError: a byte differs from what was written.
    """
    if is_signed(file):
        verify(file)
        return
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            # torch does not compress; a compressed entry from elsewhere may have any size
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            broken = archive.testzip() if plain else None
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError) as error:  # encrypted ones are RuntimeErrors
        raise ChangedFileError(f"{file} is damaged ({error}): take another copy of it") from error
    if broken is not None:
        raise ChangedFileError(f"{file} is damaged (the checksum of {broken} differs): take another copy of it")


def load_tensors(file: Path) -> Any:
    """Read tensors and plain values that torch.save wrote, on the CPU; checked by `refuse_damaged`.

    Raises:
        ChangedFileError: a byte differs from what was written. OSError, TorchFileError: see `read_torch_file`.
    """
    refuse_damaged(file)
    return read_torch_file(file)


def same_kind_of_number(a: Tensor, b: Tensor) -> bool:
    """Return whether both tensors hold floating-point numbers, or both complex ones, or neither does."""
    return (a.is_floating_point(), a.is_complex()) == (b.is_floating_point(), b.is_complex())


def refuse_unfit_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Reject weights of another kind of number than the model's, and weights that are not finite.

    Args:
        state: weights to be loaded. expected: the model's own state dictionary. where: the file, for messages.

    Raises:
        ValueError: the message lists the first such weights.
    """
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{where}: {_first(wrong)} is no tensor")
    kinds = [
        name for name, value in state.items() if name in expected and not same_kind_of_number(value, expected[name])
    ]
    if kinds:
        name = kinds[0]
        raise ValueError(
            f"{where}: {_first(kinds)} has numbers of another kind ({state[name].dtype}, the model has "
            f"{expected[name].dtype})"
        )
    broken = [
        name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        raise ValueError(f"{where}: {_first(broken)} holds NaN or infinite weights: take an earlier checkpoint")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _digest(file: Path, size: int) -> str:
    """Return the SHA-256 of the first ``size`` bytes, with zeros for the last two (the comment's length)."""
    return sha256_of(itertools.chain(read_blocks(file, size - 2), [b"\0\0"]))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 digits of the SHA-256 of tensors and their names, independent of their dtype."""
    parts = (
        name.encode() + np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes()
        for name, value in sorted(tensors.items())
    )
    return sha256_of(parts)[:16]
