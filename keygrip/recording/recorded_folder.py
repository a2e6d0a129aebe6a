"""What recorders keep in their folder beside the demonstrations: its lock, its settings and the seeds that failed.

Imports no simulator: workers in a simulator's own environment use it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keygrip.artifacts import json_values, read_record, write_json

SETTINGS_FILE = "recording.json"
LOCK_FILE = ".recording.lock"


def demo_name(task: str, seed: int) -> str:
    """Folder name of an episode."""
    return f"{task}_{seed:07d}"


def failed_seeds(root: Path, settings: dict[str, Any], none: Any) -> Any:
    """What a recording in `root` stored of failed seeds. A new one notes its settings, and `none` for the seeds.

    Raises:
        ValueError: `root` holds demonstrations with other settings; two recordings are never mixed. Or what it says of
            itself is damaged.
    """
    path = root / SETTINGS_FILE
    try:
        stored = read_record(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}: record into another folder, or remove this one") from error
    # a try that ended before its first demonstration (an image size that the environment does not have) binds nobody
    empty = not any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
    if not stored or (empty and stored.get("settings") != json_values(settings)):
        store(root, settings, none)
        return none
    there, failed = stored.get("settings"), stored.get("failed_seeds")
    if not isinstance(there, dict) or type(failed) is not type(none):
        raise ValueError(
            f"{path} is damaged: it lacks the settings or the failed seeds of a recording; record into another "
            "folder, or remove this one"
        )
    _refuse_other_settings(root, there, json_values(settings))
    return failed


def store(root: Path, settings: dict[str, Any], failed: Any) -> None:
    """Writes settings and failed seeds, whole or not at all."""
    write_json(root / SETTINGS_FILE, {"settings": json_values(settings), "failed_seeds": failed})


def _refuse_other_settings(root: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, with the settings that differ, where those of a recording are not those asked for."""
    there, now = dict(_by_name(there)), dict(_by_name(now))
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if keys:
        difference = ", ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{root} holds a recording with other settings ({difference}); use another folder or remove it"
        )


def _by_name(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings, those of a mapping by names of their own (task.region)."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _by_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
