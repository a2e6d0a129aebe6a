"""``result.json`` of a run folder: how the run ended, its metrics, and its command."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keygrip.artifacts import json_text, read_record, write_text

RESULT = "result.json"
# Values of "status". A killed process leaves "running".
FINISHED, FAILED, INTERRUPTED, RUNNING, DRY_RUN = "finished", "failed", "interrupted", "running", "dry run"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` to a run folder, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json_text(result, indent=1, ascii_only=True, default=str) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a run folder; return an empty result if there is none or it cannot be read.

    A metric that is null in the file is returned as NaN, because JSON has no NaN (`keygrip.artifacts.json_text`).
    """
    try:
        content = read_record(folder / RESULT)
    except (OSError, ValueError):
        return {}
    if isinstance(content.get("metrics"), dict):
        figures = content["metrics"].items()
        content["metrics"] = {name: math.nan if value is None else value for name, value in figures}
    return content


def record_failure(folder: Path, status: str, line: str, overrides: Sequence[str], error: BaseException) -> None:
    """Write how a run ended, and its trace (``error.txt``); do not change the result of an earlier, finished run."""
    if not folder.is_dir() or read_result(folder).get("status") == FINISHED:
        return
    result = {**read_result(folder), "status": status, "error": line, "overrides": list(overrides)}
    write_result(folder, {"metrics": {}, **result})
    write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
