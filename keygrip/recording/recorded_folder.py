"""Files of recorders next to the demonstrations: lock, settings and the seeds that failed.

Imports no simulator, because workers in a simulator's own environment use it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keygrip.artifacts import json_values, read_record, write_json
from keygrip.data.robot.native import RECORDING_FILE

LOCK_FILE = ".recording.lock"


def demo_name(task: str, seed: int) -> str:
    """Return the folder name of an episode."""
    return f"{task}_{seed:07d}"


def failed_seeds(root: Path, settings: dict[str, Any], none: Any) -> Any:
    """Read the failed seeds of a recording in `root`. For a new recording, store its settings, with `none` for the
    seeds.

    Raises:
        ValueError: `root` holds demonstrations with other settings or other data, which are never mixed with a
            recording, or its description is damaged.
    """
    path = root / RECORDING_FILE
    if not path.is_file():
        _refuse_other_data(root)
        store(root, settings, none)
        return none
    try:
        stored = read_record(path)
    except ValueError as error:
        raise ValueError(f"{error}: record into another folder, or remove this one") from error
    # a recording that ended before its first demonstration (e.g. an invalid image size) does not fix the settings
    empty = not any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
    if empty and stored.get("settings") != json_values(settings):
        store(root, settings, none)
        return none
    stored_settings, failed = stored.get("settings"), stored.get("failed_seeds")
    if not isinstance(stored_settings, dict) or type(failed) is not type(none):
        raise ValueError(
            f"{path} is damaged: it lacks the settings or the failed seeds of a recording; record into another "
            "folder, or remove this one"
        )
    _refuse_other_settings(root, stored_settings, json_values(settings))
    return failed


def store(root: Path, settings: dict[str, Any], failed: Any) -> None:
    """Write settings and failed seeds atomically."""
    write_json(root / RECORDING_FILE, {"settings": json_values(settings), "failed_seeds": failed})


def _refuse_other_data(root: Path) -> None:
    """Raise ValueError if a folder without the description of a recording holds anything; hidden files (a lock, caches)
    do not count. Other data would be trained on together with the recording, or no longer be found beside it."""
    names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    if names:
        listed = ", ".join(names[:3] + ([f"and {len(names) - 3} more"] if len(names) > 3 else []))
        raise ValueError(
            f"{root} holds other data ({listed}) and no {RECORDING_FILE} of a recording: record into "
            "a new or empty folder"
        )


def _refuse_other_settings(root: Path, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise ValueError, with the settings that differ, if a recording was made with other settings."""
    stored, requested = dict(_flatten_settings(stored)), dict(_flatten_settings(requested))
    keys = [key for key in {**stored, **requested} if stored.get(key) != requested.get(key)]
    if keys:
        difference = ", ".join(f"{key}: {stored.get(key)!r} there, {requested.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{root} holds a recording with other settings ({difference}); use another folder or remove it"
        )


def _flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings; those of a mapping have dotted names (task.region)."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
