"""Exports demonstrations as one LeRobot v3 data set (see `layout` for its content)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import yaml

from keygrip.artifacts import atomic_folder, write_json, write_text
from keygrip.data.bad_samples import join_first
from keygrip.data.robot.discovery import find_demos, refuse_no_selection
from keygrip.data.robot.frame_rates import longest_gap
from keygrip.data.robot.lerobot_export import statistics
from keygrip.data.robot.lerobot_export.files import (
    DATA_FILE_MB,
    DATA_PATH,
    FILES_PER_CHUNK,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    DataFiles,
    VideoFiles,
)
from keygrip.data.robot.lerobot_export.layout import IMAGES, Layout, numbers_of
from keygrip.data.robot.schema import Demo, DemoError
from keygrip.progress import Progress

logger = logging.getLogger(__name__)

EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


@dataclass(frozen=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        root: the data set. episodes, frames, tasks: how many.
        broken: (name, reason) of demos that could not be read and were left out.
        left_out: names of the data for which the format has no place.
    """

    root: str
    episodes: int
    frames: int
    tasks: int
    broken: list[tuple[str, str]]
    left_out: list[str]


def export_lerobot(
    root: Path | str,
    to: Path | str,
    format: str = "auto",
    calibration: Path | str | None = None,
    cameras: Sequence[str] | None = None,
    max_demos: int | None = None,
    max_broken_share: float = 0.1,
    progress: bool = True,
) -> ExportSummary:
    """Write the demos under `root` as one LeRobot v3 data set, completely or not at all.

    Args:
        root: folder of demos. to: folder of the data set; must be missing or empty.
        format, calibration: as for `find_demos`.
        cameras: cameras to keep; None: all. A demo that lacks one of them counts as broken.
        max_demos: number of demos to export, the first ones by name; None: all.
        max_broken_share: a larger share of unreadable demos is an error, which lists them, and nothing is written.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError: no data. FileExistsError: `to` is not empty.
        ValueError: demos differ in arms, their models, cameras, sizes or rate; a rate that is not whole; an odd image
            size; too many broken demos; `cameras` is empty or `max_demos` below 1.
    """
    refuse_no_selection(cameras, max_demos=max_demos)
    references = find_demos(Path(root), format, calibration)[:max_demos]
    broken: list[tuple[str, str]] = []
    left_out: dict[str, None] = {}
    gaps: list[str] = []
    with atomic_folder(to) as folder:
        writer: DatasetWriter | None = None
        bar = Progress(references, desc="exporting", unit="demo", shown=progress)
        try:
            for reference in bar:
                try:
                    demo = reference.read(cameras=cameras, uncalibrated=True)
                    layout = Layout.of(demo, cameras)
                    writer = writer or DatasetWriter(folder, layout)
                    writer.add(demo, layout)
                except DemoError as error:
                    broken.append((error.name, error.reason))
                    continue
                if gap := longest_gap(demo):
                    gaps.append(f"{demo.name} ({gap:.2f} s)")
                left_out |= dict.fromkeys(f"depth of {name}" for name, track in demo.cameras.items() if track.depth)
                left_out |= {"text (captions, questions)": None} if demo.text else {}
            reasons = "; ".join(f"{name}: {reason}" for name, reason in broken[:10])
            if writer is None or not writer.episodes or len(broken) > max_broken_share * len(references):
                raise ValueError(f"{len(broken)} of {len(references)} demos in {root} are broken: {reasons}")
            writer.finish()
        finally:
            if writer is not None:
                writer.close()
    if broken:
        logger.warning("%d of %d demos are broken and left out: %s", len(broken), len(references), reasons)
    if gaps:
        logger.warning(
            "time stamps jump in %d demos (%s): frames were dropped there. LeRobot derives time from the frame "
            "index, without the gaps (time_s holds the recorded times)",
            len(gaps),
            join_first(gaps),
        )
    if left_out:
        logger.warning("LeRobot has no place for: %s", ", ".join(left_out))
    return ExportSummary(str(to), writer.episodes, writer.frames, len(writer.tasks), broken, list(left_out))


class DatasetWriter:
    """Writes episodes one by one into an empty folder, then `finish`. `close` closes its files, also after failures."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout, self.features = folder, layout, layout.features()
        self.episodes = self.frames = 0
        self.tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._statistics: list[dict[str, statistics.Statistics]] = []
        self._data = DataFiles(folder)
        self._videos = {
            camera: VideoFiles(folder, f"{IMAGES}{camera}", size, layout.fps) for camera, size in layout.sizes.items()
        }

    def add(self, demo: Demo, layout: Layout) -> None:
        """Append an episode.

        Raises:
            ValueError: it differs from the first one. DemoError: a frame cannot be read; the episode is then left out.
        """
        if layout != self.layout:
            for name in (each.name for each in fields(Layout)):
                expected, actual = getattr(self.layout, name), getattr(layout, name)
                if expected != actual:
                    raise ValueError(
                        f"demo {demo.name!r} has {name} {actual}, the first one {expected}: a LeRobot data set holds "
                        "one kind; export them apart, or name the cameras that all have with cameras=[...]"
                    )
        task = demo.instruction or demo.task
        feature_statistics: dict[str, statistics.Statistics] = {}
        locations: dict[str, Any] = {}
        for camera, files in self._videos.items():
            key = f"{IMAGES}{camera}"
            location, feature_statistics[key] = files.write(demo, camera)
            locations |= {f"videos/{key}/{name}": value for name, value in location.items()}
        task_index = self.tasks.setdefault(task, len(self.tasks))
        values = numbers_of(demo, self.layout) | {
            "episode_index": np.full(len(demo), self.episodes),
            "index": self.frames + np.arange(len(demo)),
            "task_index": np.full(len(demo), task_index),
        }
        feature_statistics |= {key: statistics.of_numbers(each.reshape(len(demo), -1)) for key, each in values.items()}
        chunk, file = self._data.write(values, self.features)
        self._rows.append(
            {
                "episode_index": self.episodes,
                "tasks": [task],
                "length": len(demo),
                "keygrip/task": demo.task,
                "keygrip/instruction": demo.instruction,  # "" if the task's name replaces it
                "keygrip/fps": float(demo.fps),
                "keygrip/name": demo.name,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + len(demo),
                **locations,
                **{
                    f"stats/{key}/{name}": value.tolist()
                    for key, entry in feature_statistics.items()
                    for name, value in entry.items()
                },
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._statistics.append(feature_statistics)
        self.episodes, self.frames = self.episodes + 1, self.frames + len(demo)

    def close(self) -> None:
        """Close the open files. May be called again."""
        self._data.close()
        for files in self._videos.values():
            files.close()

    def finish(self) -> None:
        """Write the metadata of the data set."""
        self.close()
        episodes = self.folder / EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(self._rows), episodes)
        parquet.write_table(_task_table(self.tasks), self.folder / "meta" / "tasks.parquet")
        merged = {key: statistics.of_episodes([each[key] for each in self._statistics]) for key in self._statistics[0]}
        plain = {key: {name: value.tolist() for name, value in entry.items()} for key, entry in merged.items()}
        write_json(self.folder / "meta" / "stats.json", plain)
        for camera, (height, width) in self.layout.sizes.items():
            self.features[f"{IMAGES}{camera}"]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self.layout.fps,
                "video.channels": 3,
                "has_audio": False,
            }
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.layout.robot,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.layout.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self.features,
        }
        write_json(self.folder / "meta" / "info.json", info)
        write_text(self.folder / "calibration.yaml", yaml.safe_dump(self.layout.sidecar(), sort_keys=False))


def _task_table(tasks: dict[str, int]) -> pa.Table:
    """Return the task numbers with the sentences as index, in the form in which pandas stores and restores an index."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})

    def column(name: str, kind: str, stored: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}

    pandas_metadata = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas_metadata)})
