"""Record demonstrations of Meta-World's scripted policies into native folders: one process per task, resumable.

The recorder's processes run in the Python environment that has `metaworld`. A folder is a function of (task, seed,
settings); tasks share one root, with folders named ``<task>_<seed>``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keygrip.artifacts import locked
from keygrip.cores import usable_cores
from keygrip.envs.metaworld.tasks import CAMERAS, HZ, TRAINING_SEED, TUNING_SEED, newly_rotated_cameras, task_names
from keygrip.envs.workers import run_jobs
from keygrip.progress import Progress
from keygrip.recording.recorded_folder import LOCK_FILE, failed_seeds, store

ROBOT = "sawyer"
ARM = "right"
WORKER = "keygrip.recording.metaworld_worker"
INSTALL = "`make metaworld-install` makes one; or give python=PATH of an environment that has metaworld and keygrip."


def record_step(
    tasks: str | Sequence[str],
    root: str | Path,
    demos: int,
    seed: int = TRAINING_SEED,
    image_size: int = 224,
    hz: float = 20.0,
    cameras: Sequence[str] = ("corner2",),
    recoveries: float = 0.2,
    shadows: bool = False,
    video: bool = False,
    jpeg_quality: int = 95,
    processes: int | None = None,
    python: str | None = None,
) -> dict[str, Any]:
    """Record, for each task, the first `demos` episodes from `seed` on in which the scripted policy succeeds.

    Args:
        tasks: "mt10", "mt50", a difficulty group, or names.
        root: folder of the demo folders; created if missing. Existing demos are kept.
        demos: per task. seed: of the first episode; seeds from 500000 on are reserved for tuning and evaluation.
        image_size: edge of the square images, pixels. hz: stored frames per second, a divisor of 80.
        cameras: of the scene, the main one first.
        recoveries: fraction of episodes that start in the middle of the task, after a disturbance.
        shadows, video, jpeg_quality: as in the task and `DemoWriter`.
        processes: workers, at least 1; None: one per core. python: interpreter with metaworld; None: this one.

    Returns:
        Counts and seconds; failures of the expert by task.

    Raises:
        ValueError: A setting is out of range, `root` holds another recording or other data, the interpreter does not
            exist, or of at least 20 episodes of a task fewer than a tenth succeeded.
    """
    names = task_names(tasks)
    every = _control_steps_per_frame(hz)
    unknown = [camera for camera in cameras if camera not in CAMERAS]
    if unknown or not cameras:
        raise ValueError(f"Meta-World has no camera {unknown[0] if unknown else ''!r}; it has {', '.join(CAMERAS)}")
    if demos < 1 or not 0 <= recoveries <= 1 or not 92 <= jpeg_quality <= 100 or not 16 <= image_size <= 1280:
        raise ValueError(
            "demos is at least 1, recoveries within 0 .. 1, jpeg_quality within 92 .. 100, image_size within 16 .. 1280"
        )
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    # stored, so that a folder with images that were not rotated is not continued
    upright_cameras = newly_rotated_cameras(cameras)
    settings = {
        "environment": "metaworld",
        "image_size": image_size,
        "every": every,
        "cameras": list(cameras),
        "recoveries": recoveries,
        "shadows": shadows,
        "video": video,
        "jpeg_quality": jpeg_quality,
        **({"turned_upright": upright_cameras} if upright_cameras else {}),
    }
    started, recorded = time.monotonic(), 0
    with locked(root / LOCK_FILE):
        failed: dict[str, list[int]] = failed_seeds(root, settings, {})
        jobs = [{"task": name, "demos": demos, "seed": seed, "failed": failed.get(name, [])} for name in names]
        # number of episodes processed by this call
        successes, failures = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        bar = Progress(total=demos * len(names), desc="record metaworld", unit="demo")
        with bar:
            for _, episode in run_jobs(
                python or sys.executable,
                WORKER,
                settings | {"root": str(root)},
                jobs,
                usable_cores() if processes is None else processes,
                INSTALL,
            ):
                name = episode["task"]
                recorded += episode["recorded"]
                successes[name] += episode["success"]
                failures[name] += not episode["success"]  # known failures are reported again
                bar.update(int(episode["success"]))
                if not episode["success"]:
                    failed[name] = sorted({*failed.get(name, []), episode["seed"]})
                    store(root, settings, failed)
                _refuse_failing(name, successes[name], failures[name])
    return {
        "root": str(root),
        "tasks": len(names),
        "demos": sum(successes.values()),
        "recorded": recorded,
        "failed_episodes": {name: count for name, count in failures.items() if count},
        "held_out_from": TUNING_SEED,
        "wall_s": round(time.monotonic() - started, 1),
    }


def _control_steps_per_frame(hz: float) -> int:
    """Return the control periods per stored frame. Raises ValueError if it is not a whole number."""
    every = round(HZ / hz)
    if every < 1 or abs(every * hz - HZ) > 1e-9:
        raise ValueError(f"hz={hz}: stored frames must be whole control periods of 1/{HZ:g} s; use 10, 20 or 40")
    return every


def _refuse_failing(task: str, succeeded: int, failed: int) -> None:
    """Raise ValueError if of at least 20 episodes fewer than a tenth succeeded."""
    tried = succeeded + failed
    if tried >= 20 and succeeded < 0.1 * tried:
        raise ValueError(f"the scripted policy failed in {failed} of {tried} episodes of {task}")
