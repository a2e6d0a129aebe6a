"""Reader of LeRobot data sets, codebase versions 2.0 and 2.1, the versions of most data sets on the hub.

Layout: `meta/info.json` (fps, features, path templates), `meta/tasks.jsonl`, `meta/episodes.jsonl` (one line per
episode), `data/chunk-*/episode_*.parquet` and `videos/chunk-*/<key>/episode_*.mp4` (one episode per file). The
calibration file and the values that are read are the same as in `lerobot_v3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.robot.formats import lerobot_v3
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import words
from keygrip.data.untrusted_files import parse_json, read_json, read_text

MAX_LISTING_BYTES = 1 << 28  # limit for meta/episodes.jsonl: about a million episodes
CHUNK = 1000  # episodes per folder, if info.json does not state it


LAYOUT = "meta/info.json of version 2"  # files by which a folder of this format is recognised


def detect(root: Path) -> bool:
    """Return whether a folder holds LeRobot's `meta/info.json` of version 2."""
    return lerobot_v3.stated_version(root).startswith("v2.")


def find(root: Path, calibration: Path | None = None) -> list[DemoReference]:
    """Return references to the episodes of the data set.

    Raises:
        FileNotFoundError: a part of the data set or the calibration file is missing.
        ValueError: another version of LeRobot's format, or a calibration file that does not fit the features.
    """
    version = lerobot_v3.stated_version(root)
    if not version.startswith("v2."):
        raise ValueError(f"{root} is a LeRobot data set of version {version or 'unknown'}, not 2.0 or 2.1")
    info = read_json(root / "meta" / "info.json")
    with convert_errors(root / "meta" / "info.json"):
        chunk = int(info.get("chunks_size") or CHUNK)
        tasks = {int(row["task_index"]): words(row["task"]) for row in _read_json_lines(root / "meta" / "tasks.jsonl")}
    episodes: list[dict[str, Any]] = []
    for row in _read_json_lines(root / "meta" / "episodes.jsonl"):
        with convert_errors(root / "meta" / "episodes.jsonl"):
            episode_index = int(row["episode_index"])
            task_entries = row.get("tasks") or []
            task_texts = [tasks.get(task, "") if isinstance(task, int) else words(task) for task in task_entries]
            location = {"episode_index": episode_index, "episode_chunk": episode_index // max(1, chunk)}
            episodes.append({**location, "length": int(row["length"]), "tasks": task_texts, lerobot_v3.PLACE: location})
    if not episodes:
        raise FileNotFoundError(f"{root}/meta/episodes.jsonl names no episode")
    episodes.sort(key=lambda row: row["episode_index"])
    return lerobot_v3.references(root, info, episodes, calibration, "lerobot_v2")


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object per line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the data set is incomplete")
    # not `splitlines`: a task's text may contain other line separators
    lines = [line for line in read_text(path, MAX_LISTING_BYTES).split("\n") if line.strip()]
    rows = [parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadSample(path, f"line {number} holds no object")
    return rows
