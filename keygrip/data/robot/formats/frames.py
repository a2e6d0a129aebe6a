"""Frame sources that foreign formats need beside those of `keygrip.data.robot.frames`. All hold no open file and can be
pickled."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from keygrip.data.robot.schema import FrameSource


@dataclass(frozen=True)
class SelectedFrames:
    """Frames of another source in another order: frame i is `source`'s frame `indices[i]`."""

    source: FrameSource
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self.indices):
            raise IndexError(f"frame {index} asked for, there are {len(self.indices)}")
        return self.source.read(self.indices[index])

    def identity(self) -> str:
        return f"{self.source.identity()}:{hashlib.sha256(str(self.indices).encode()).hexdigest()}"


@dataclass(frozen=True)
class HDF5Frames:
    """Pictures in an HDF5 data set [N, H, W, 3] uint8.

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
        import h5py

        if not 0 <= index < self.frames:
            raise IndexError(f"{self.path}: frame {index} asked for, {self.dataset} holds 0 to {self.frames - 1}")
        with h5py.File(self.path, "r") as file:
            picture = np.asarray(file[self.dataset][index])
        return np.ascontiguousarray(picture[::-1] if self.upside_down else picture)

    def identity(self) -> str:
        stat = self.path.stat()
        return f"{self.path}:{stat.st_size}:{stat.st_mtime_ns}:{self.dataset}:{self.frames}:{self.upside_down}"


@dataclass(frozen=True)
class ParquetFrames:
    """Pictures stored as encoded bytes in a column of a Parquet file (LeRobot's `image` features).

    Args:
        path: the file. column: its column of {bytes, path}. rows: row of the file of each frame. root: where relative
            picture paths start.
    """

    path: Path
    column: str
    rows: tuple[int, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> np.ndarray:
        import pyarrow.parquet as parquet

        if not 0 <= index < len(self.rows):
            raise IndexError(f"{self.path}: frame {index} asked for, there are {len(self.rows)}")
        file = parquet.ParquetFile(self.path)
        row = self.rows[index]
        for group in range(file.metadata.num_row_groups):
            held = file.metadata.row_group(group).num_rows
            if row < held:
                value = file.read_row_group(group, columns=[self.column]).column(self.column)[row].as_py()
                break
            row -= held
        else:
            raise OSError(f"{self.path} has no row {self.rows[index]}")
        content = value["bytes"] if isinstance(value, dict) else value
        with Image.open(io.BytesIO(content) if content else self.root / value["path"]) as picture:
            return np.asarray(picture.convert("RGB"))

    def identity(self) -> str:
        stat = self.path.stat()
        return f"{self.path}:{stat.st_size}:{stat.st_mtime_ns}:{self.column}:{self.rows[0]}:{len(self.rows)}"
