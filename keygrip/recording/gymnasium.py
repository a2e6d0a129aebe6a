"""Record the scripted expert of any gymnasium environment into native folders, in several processes and resumable.

The environment is one that `env=gymnasium` evaluates (`keygrip.envs.gymnasium_environment`), with a method
`expert_action()`. A folder is named after its episode's seed and is a function of (task, seed, settings).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keygrip.artifacts import locked
from keygrip.cores import usable_cores
from keygrip.envs.gymnasium_environment import GymnasiumTask
from keygrip.envs.workers import run_jobs
from keygrip.progress import Progress
from keygrip.recording.episodes import record_successes
from keygrip.recording.recorded_folder import LOCK_FILE, failed_seeds, store

WORKER = "keygrip.recording.gymnasium_worker"
ADVICE = "Give env.python=PATH of an environment that has the simulator and keygrip."


def record_step(
    task: GymnasiumTask,
    root: str | Path,
    demos: int,
    seed: int,
    image_size: int,
    hz: float,
    processes: int | None,
    cameras: Sequence[str] | None,
    video: bool,
    python: str | None,
) -> dict[str, Any]:
    """Record the first `demos` episodes from `seed` on in which the expert succeeds. Existing ones are kept.

    Args:
        task: selects the environment. root: folder of the demo folders; created if missing.
        demos: total number when finished. seed: of the first episode; seeds from 500000 on are reserved for tuning and
            evaluation.
        image_size: shorter edge of the images, which the environment must provide. hz: its control rate; every step is
            a frame.
        cameras: names among the observation's `cameras`; if it has none, one name for its `image`. None: all of them,
            or "camera".
        video: one H.264 file per camera instead of JPEG files.
        processes: workers, at least 1; None: one per core. python: interpreter with the environment; None: this one.

    Returns:
        Counts and seconds.

    Raises:
        ValueError: A setting is out of range, `root` holds another recording or other data, the environment does not
            fit or has no expert, or there are more failures than successes.
    """
    if demos < 1 or hz <= 0 or not 16 <= image_size <= 4096:
        raise ValueError("demos is at least 1, hz above 0, image_size within 16 .. 4096")
    workers = usable_cores() if processes is None else processes
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        "environment": "gymnasium",
        "task": json.loads(json.dumps(asdict(task))),
        "image_size": image_size,
        "hz": float(hz),
        "cameras": None if cameras is None else list(cameras),
        "video": video,
    }

    def run(seeds: list[int]) -> Iterator[tuple[int, bool]]:
        jobs, setup = [{"seed": s} for s in seeds], settings | {"root": str(root)}
        for _, episode in run_jobs(python or sys.executable, WORKER, setup, jobs, workers, ADVICE):
            yield episode["seed"], episode["success"]

    started = time.monotonic()
    with locked(root / LOCK_FILE), Progress(total=demos, desc=f"record {task.name}", unit="demo") as bar:
        failed = set(failed_seeds(root, settings, []))
        counts = record_successes(
            root, task.name, demos, seed, failed, run, lambda: store(root, settings, sorted(failed)), bar
        )
    return {
        "root": str(root),
        "demos": counts.demos,
        "recorded": counts.recorded,
        "failed_episodes": counts.failed,
        "wall_s": round(time.monotonic() - started, 1),
    }
