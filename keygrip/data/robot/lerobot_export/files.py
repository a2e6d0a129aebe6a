"""Data and video files of a LeRobot data set, many episodes per file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from keygrip.data.robot.lerobot_export.statistics import ImageCounter, Statistics, sampled_frames
from keygrip.data.robot.schema import Demo, DemoError, demo_guard
from keygrip.data.video import VideoWriter

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200  # LeRobot's defaults
VIDEO_FILE_S = 1000.0  # LeRobot finds frames by float32 seconds to 1e-4 s; in a longer file that would fail


@dataclass
class DataFiles:
    """The Parquet files of the rows, one row group per episode."""

    folder: Path
    number: int = 0
    _writer: parquet.ParquetWriter | None = field(default=None, init=False)
    _path: Path | None = field(default=None, init=False)

    def write(self, values: dict[str, np.ndarray], features: dict[str, dict[str, Any]]) -> tuple[int, int]:
        """Append an episode's values, each [N] or [N, F]; return the numbers of the chunk and of the file."""
        if self._path is not None and self._path.stat().st_size > DATA_FILE_MB * 2**20:
            self.close()
            self.number += 1
        columns = {}
        for key, feature in features.items():
            if feature["dtype"] == "video":
                continue
            kind, value = pa.from_numpy_dtype(feature["dtype"]), values[key]
            columns[key] = pa.array(value.tolist(), pa.list_(kind, value.shape[1]) if value.ndim == 2 else kind)
        table = pa.table(columns)
        chunk, file = divmod(self.number, FILES_PER_CHUNK)
        if self._writer is None:
            self._path = self.folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        return chunk, file

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = self._path = None


@dataclass
class VideoFiles:
    """The videos of one camera, several episodes per file. Frames of failed episodes stay in the file, unused."""

    folder: Path
    key: str
    size: tuple[int, int]
    fps: int
    number: int = 0
    _writer: VideoWriter | None = field(default=None, init=False)
    _path: Path | None = field(default=None, init=False)
    _frames: int = field(default=0, init=False)

    def write(self, demo: Demo, camera: str) -> tuple[dict[str, Any], Statistics]:
        """Append an episode; return its place in the files, and the statistics of its images.

        Raises:
            DemoError: a frame cannot be read, or has another size.
        """
        begun = self._path is not None and self._path.is_file()  # the encoder writes after its first ten frames or so
        full = begun and self._path is not None and self._path.stat().st_size > VIDEO_FILE_MB * 2**20
        if self._writer is not None and (full or (self._frames + len(demo)) / self.fps > VIDEO_FILE_S):
            self.close()
            self.number += 1
        chunk, file = divmod(self.number, FILES_PER_CHUNK)
        if self._writer is None:
            self._path = self.folder / VIDEO_PATH.format(video_key=self.key, chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer, self._frames = VideoWriter(self._path, self.size[1], self.size[0], self.fps), 0
        first, counter, sampled = self._frames, ImageCounter(), set(sampled_frames(len(demo)))
        for index in range(len(demo)):
            image = _read_image(demo, camera, index)
            if image.shape != (*self.size, 3):
                raise DemoError(demo.name, f"camera {camera!r}: frame {index} is {image.shape}, not {self.size}")
            self._writer.write(image)
            self._frames += 1
            if index in sampled:
                counter.add(image)
        location = {
            "chunk_index": chunk,
            "file_index": file,
            "from_timestamp": first / self.fps,
            "to_timestamp": self._frames / self.fps,
        }
        return location, counter.statistics()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = self._path = None


def _read_image(demo: Demo, camera: str, index: int) -> np.ndarray:
    with demo_guard(demo.name, f"camera {camera!r}, frame {index}: "):
        return np.ascontiguousarray(demo.cameras[camera].frames.read(index))
