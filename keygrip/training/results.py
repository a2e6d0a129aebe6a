"""``result.json`` of a run folder: how the run ended, its metrics, and its command."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keygrip.artifacts import json_text, read_record, write_text
from keygrip.launch import id_of_start, is_first_process, started_together

RESULT = "result.json"
REFUSED = "refused.json"  # why the latest start of a sweep's job was refused, beside the result of an earlier start
START = "start"  # which start of the run wrote the result: see `id_of_start`; left out when it has finished
# Values of "status". A killed process leaves "running".
FINISHED, FAILED, INTERRUPTED, RUNNING, DRY_RUN = "finished", "failed", "interrupted", "running", "dry run"
_BEGUN: dict[Path, float] = {}  # beginning of this process's training in a folder, on the monotonic clock
# Messages of gloo and NCCL about a process that has ended.
OTHER_ENDED = r"gloo/transport.*(Read error|Write error|Connection (reset|closed) by peer|Broken pipe)|ncclRemoteError"


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


def tells_that_another_ended(error: BaseException) -> bool:
    """Return whether an error of gloo or NCCL reports that another process of the run has ended."""
    return isinstance(error, RuntimeError) and re.search(OTHER_ENDED, str(error)) is not None


def note_beginning(folder: Path, moment: float) -> None:
    """Keep when training in a folder began in this process (`time.monotonic`), for `wall_time`."""
    _BEGUN[folder.absolute()] = moment


def this_start() -> dict[str, str]:
    """Return the part of ``result.json`` that identifies this start of the run."""
    return {START: id_of_start()}


def belongs_to_another_start(folder: Path) -> bool:
    """Return whether a run folder has the result of a training that this start has not begun: an earlier one, or, for a
    process that is not the first, a run that is going on while this start was refused."""
    earlier = read_result(folder)
    if "started_at" not in earlier or folder.absolute() in _BEGUN:
        return False
    return is_first_process() or earlier.get(START) != id_of_start()


def wall_time(folder: Path, earlier: dict[str, Any]) -> float:
    """Return the seconds that a run has taken: those of its result so far, and of this process's training, which has
    ended. Starts that were killed are not in the result."""
    return round(float(earlier.get("wall_s", 0.0)) + time.monotonic() - _BEGUN.pop(folder.absolute()), 1)


def record_failure(folder: Path, status: str, line: str, overrides: Sequence[str], error: BaseException) -> None:
    """Write how a run ended, and its trace (``error.txt``); do not change the result of an earlier, finished run, or
    the cause that another process of this run has recorded."""
    earlier = read_result(folder)
    if not folder.is_dir() or earlier.get("status") == FINISHED or _follows(earlier, status, error):
        return
    result = {**earlier, "status": status, "error": line, "overrides": list(overrides)}
    if folder.absolute() in _BEGUN:
        result["wall_s"] = wall_time(folder, earlier)
    write_result(folder, {"metrics": {}, **result})
    write_trace(folder, error)


def record_refusal(folder: Path, line: str, overrides: Sequence[str]) -> None:
    """Write why a start was refused, for the table of its sweep; the result of an earlier start stays as it is."""
    write_text(folder / REFUSED, json_text({"error": line, "overrides": list(overrides)}, indent=1) + "\n")


def remove_traces(folder: Path) -> None:
    """Remove what earlier starts left of their errors, since this start goes on."""
    for name in ("error.txt", REFUSED):
        (folder / name).unlink(missing_ok=True)


def write_trace(folder: Path, error: BaseException) -> None:
    """Write the trace of an error to ``error.txt`` of a run folder."""
    write_text(folder / "error.txt", "".join(traceback.format_exception(error)))


def _follows(earlier: dict[str, Any], status: str, error: BaseException) -> bool:
    """Return whether an error only follows from the recorded end of another process of this run. The launcher then ends
    the other processes with a signal, or they fail because the connection to that process is closed.

    The first process may replace a recorded failure by an error of its own: the record may be from an earlier start, if
    this start was refused before it wrote its own.
    """
    if tells_that_another_ended(error):
        return earlier.get("status") in (FAILED, INTERRUPTED)
    ended_by_launcher = status == INTERRUPTED and started_together() > 1
    return earlier.get("status") == FAILED and (ended_by_launcher or not is_first_process())
