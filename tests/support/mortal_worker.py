"""A worker process that dies if its jobs demand it; started by `keygrip.envs.workers.run_jobs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keygrip.envs.workers import serve_jobs


def start(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Jobs: `number`; `dies`: once | always | after a report | fails (an error that may not happen again) | refuses."""
    folder = Path(setup["folder"])

    def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        before = folder / f"{job['number']}"
        first = not before.exists()
        before.touch()
        dies = job.get("dies")
        if dies == "after a report":
            yield {"number": job["number"]}
        if dies in ("always", "after a report") or (dies == "once" and first):
            os._exit(9)
        if dies == "fails" and first:
            raise RuntimeError("the simulator became unstable")
        if dies == "refuses":
            raise ValueError("no such task")
        yield {"number": job["number"], "first": first}

    return work


if __name__ == "__main__":
    serve_jobs(start)
