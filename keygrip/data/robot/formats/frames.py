"""Frame sources for foreign formats, in addition to those of `keygrip.data.robot.frames`. All hold no open file and can
be pickled."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.parquet_tables import EXPANSION, Allowance, open_parquet, refuse_large
from keygrip.data.robot.frames import checked_index, rgb_pixels, verify_source
from keygrip.data.robot.schema import FrameSource
from keygrip.data.untrusted_files import MAX_ARRAY_BYTES, MAX_PIXELS, inside, open_image, regular_file
from keygrip.data.video_index import file_identity

GROUPS_KEPT = 64  # largest number of row groups that a thread caches: each read searches them
SMALL_BYTES = 1 << 24  # arrays up to this size are read however little is stored: 87 000 rows of LIBERO's 24 numbers
KEPT_BYTES = 1 << 26  # limit of a thread's cached row groups together, not counting the one read last


@dataclass(frozen=True)
class SelectedFrames:
    """Frames of another source in another order: frame i is `source`'s frame `indices[i]`."""

    source: FrameSource
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.indices[checked_index(index, len(self), "selected frames")])

    def verify(self) -> None:
        """Check the whole source, see `verify_source`."""
        verify_source(self.source)

    def identity(self) -> str:
        return f"{self.source.identity()}:{hashlib.sha256(str(self.indices).encode()).hexdigest()}"


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading. Raises BadSample: it is a named pipe or a device. OSError: it is not HDF5."""
    import h5py

    regular_file(path)
    with h5py.File(path, "r") as file:
        yield file


def own_object(group: Any, name: str) -> Any:
    """Return the object `name` of an HDF5 file or group, from this file only. No link is followed, not even one to
    another place in the file, because a further link there may lead out of the file.

    Raises:
        KeyError: there is no such object. ValueError: it is behind a link.
    """
    import h5py

    for part in name.split("/"):
        if not isinstance(group, h5py.Group):  # h5py would read a data set to find the name in it
            raise ValueError(f"what should hold {name} is no group")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink | None):
            raise ValueError(f"{name} is a link to another place or file, which is not followed: copy what it names")
        group = group[part]
    return group


def own_group(group: Any, name: str) -> Any:
    """As `own_object`, for a group. Raises ValueError: the object is not a group, or is behind a link."""
    import h5py

    found = own_object(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{name} is no group")
    return found


def own_dataset(group: Any, name: str) -> Any:
    """Return the data set `name` of an HDF5 file or group, stored in this file only.

    Raises:
        ValueError: it is behind a link, its values lie in another file, or an entry or a chunk of it is too large.
    """
    import h5py

    dataset = own_object(group, name)
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} does not hold its numbers in this file")
    entry_bytes = math.prod(dataset.shape[1:] or dataset.shape) * dataset.dtype.itemsize
    if entry_bytes > 3 * MAX_PIXELS:
        raise ValueError(f"{name} has shape {dataset.shape}, more than can be read")
    # a chunk is always unpacked as a whole, and may be larger than the data set
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > 3 * MAX_PIXELS:
        raise ValueError(
            f"{name} is stored in chunks of shape {dataset.chunks}, more than can be read: h5repack stores it in others"
        )
    return dataset


def own_array(group: Any, name: str) -> np.ndarray:
    """Return all values of a data set as float64; see :func:`own_dataset`. Raise ValueError if they are too many."""
    dataset = own_dataset(group, name)
    if math.prod(dataset.shape) * 8 > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} has shape {dataset.shape}, more than can be read")
    return np.asarray(dataset, dtype=np.float64)


def refuse_unstored(group: Any, names: Collection[str]) -> None:
    """Check that data sets which are read together are stored in the file; they may be compressed. HDF5 returns zeros
    for values that were never written and compresses repeated values a thousandfold, so that a few kilobytes may expand
    to gigabytes.

    Raises:
        ValueError: as float64 the data sets take more than `SMALL_BYTES` and more than `EXPANSION` times their bytes in
            the file; see also :func:`own_dataset`.
    """
    datasets = [own_dataset(group, name) for name in names]
    size = sum(math.prod(dataset.shape) * 8 for dataset in datasets)
    # the size that the file states for its chunks may exceed the file's size
    stored = min(sum(dataset.id.get_storage_size() for dataset in datasets), group.file.id.get_filesize())
    if size > max(SMALL_BYTES, EXPANSION * stored):
        raise ValueError(
            f"{', '.join(names)} would take {size} bytes, but only {stored} are stored: most of it was never written "
            "or repeats, so that it is no recording"
        )


@dataclass(frozen=True)
class HDF5Frames:
    """Images in an HDF5 data set [N, H, W, 3] uint8.

    Args:
        path: the file. dataset: its name inside, such as `data/demo_0/obs/agentview_rgb`. frames: how many.
        upside_down: the rows are stored bottom first (OpenGL).
    """

    path: Path
    dataset: str
    frames: int
    upside_down: bool = False

    def __len__(self) -> int:
        return self.frames

    def read(self, index: int) -> np.ndarray:
        checked_index(index, self.frames, f"{self.path}: {self.dataset}")
        with open_hdf5(self.path) as file:
            image = np.asarray(own_dataset(file, self.dataset)[index])
        return np.ascontiguousarray(image[::-1] if self.upside_down else image)

    def identity(self) -> str:
        stat = self.path.stat()
        return f"{self.path}:{stat.st_size}:{stat.st_mtime_ns}:{self.dataset}:{self.frames}:{self.upside_down}"


class _RowGroups(threading.local):
    """Cache of the row groups of image columns that a thread read last. Parquet cannot read single rows: without the
    cache, reading an episode frame by frame, with all cameras in turn, would read each group once per row. There is one
    cache per thread, so that threads neither wait for nor displace each other and a forked process meets no lock."""

    def __init__(self) -> None:
        self.held: list[_RowGroup] = []  # ordered by use, the last used at the end

    def value(self, path: Path, column: str, row: int) -> Any:
        """Return the value of a row in a file's column. Raise OSError if the file has no such row."""
        key = (file_identity(path), column)
        for index, group in enumerate(self.held):
            if group.key == key and 0 <= row - group.first < len(group.values):
                self.held.append(self.held.pop(index))
                break
        else:
            group = _RowGroup.read(path, column, row, key)
            self.held = [*self.held, group][-GROUPS_KEPT:]
            while len(self.held) > 1 and sum(each.values.nbytes for each in self.held) > KEPT_BYTES:
                del self.held[0]
        return group.values[row - group.first].as_py()


@dataclass(frozen=True)
class _RowGroup:
    """One column of a row group: `values` of the rows from `first` on, each a dictionary with an encoded image."""

    key: tuple[str, str]
    first: int
    values: Any

    @classmethod
    def read(cls, path: Path, column: str, row: int, key: tuple[str, str]) -> _RowGroup:
        """Read the group with a row. Raises OSError: there is none. BadSample: it cannot be read, or is too large."""
        first = 0
        with open_parquet(path) as file:
            for index in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                if row < first + rows:
                    refuse_large(path, file, [index], [column], Allowance([path]))
                    return cls(key, first, file.read_row_group(index, columns=[column]).column(column))
                first += rows
        raise OSError(f"{path} has no row {row}")


_row_groups = _RowGroups()


def _holds_all_images(path: Path, column: str) -> bool:
    """Whether a table's footer states that the `bytes` of all its images are present, so that no row must be read."""
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    nulls = [
        chunk.statistics.null_count if chunk.is_stats_set and chunk.statistics.has_null_count else None
        for chunk in chunks
        if chunk.path_in_schema == f"{column}.bytes"
    ]
    return bool(nulls) and all(count == 0 for count in nulls)


@dataclass(frozen=True)
class ParquetFrames:
    """Images stored as encoded bytes in a column of a Parquet file (LeRobot's `image` features).

    Args:
        path: the file. column: its column of {bytes, path}. rows: the file's row for each frame. root: folder of
            relative image paths.
    """

    path: Path
    column: str
    rows: tuple[int, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> np.ndarray:
        row = self.rows[checked_index(index, len(self), self.path)]
        value = _row_groups.value(self.path, self.column, row)
        content = value["bytes"] if isinstance(value, dict) else value
        source = content if content else inside(self.root, value["path"])
        with open_image(source, f"{self.path}: row {row}") as image:
            return rgb_pixels(image)

    def identity(self) -> str:
        stat = self.path.stat()
        rows = f"{self.rows[0]}:{len(self.rows)}"
        return f"{self.path}:{stat.st_size}:{stat.st_mtime_ns}:{self.column}:{rows}{self._files_identity()}"

    def _files_identity(self) -> str:
        """Return the identities of the first and the last image if they are files beside the table, else nothing."""
        found = ""
        for row in (self.rows[0], self.rows[-1]):
            try:
                if _holds_all_images(self.path, self.column):
                    return ""
                value = _row_groups.value(self.path, self.column, row)
                if not isinstance(value, dict) or value.get("bytes"):
                    return ""
                found += f":{file_identity(inside(self.root, value['path']))}"
            except (OSError, ValueError):  # reading the image reports it
                found += ":missing"
        return found
