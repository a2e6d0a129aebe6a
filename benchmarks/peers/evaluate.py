"""Evaluates whatever a server plans (ours or a peer's) on given seeds, in the simulated YAM cell or in Meta-World.

``python benchmarks/peers/evaluate.py --server http://127.0.0.1:8422 --task reach --episodes 20``, or ``--env metaworld
--task mt10``, after ``make metaworld-install``. Environment, seeds and controller are those of `keygrip evaluate`.
Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keygrip.envs.environment import open_environment
from keygrip.envs.metaworld.tasks import HZ, MetaWorldTask, task_names
from keygrip.envs.workers import run_jobs
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import HELD_OUT_SEED, ConditionResult
from keygrip.evaluation.remote_rollouts import ADVICE, WORKER, RemoteSettings
from keygrip.evaluation.rollout_report import over_tasks
from keygrip.evaluation.rollouts import EpisodeResult, run_episode
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy

PYTHON = Path(__file__).resolve().parents[2] / ".venv-metaworld/bin/python"


def in_the_cell(
    arguments: argparse.Namespace, control: Any, seeds: Sequence[int]
) -> Iterator[tuple[str, EpisodeResult]]:
    """(task, result) of each episode of the YAM cell."""
    cameras = None if arguments.cameras is None else tuple(arguments.cameras)
    cell = open_environment(TaskOptions(name=arguments.task), arguments.image_size, arguments.hz or 10.0, cameras)
    with RemotePolicy(arguments.server, timeout_s=60.0) as policy:
        for seed in seeds:
            yield arguments.task, run_episode(cell, policy, control, seed)
    cell.close()


def in_metaworld(
    arguments: argparse.Namespace, control: Any, seeds: Sequence[int]
) -> Iterator[tuple[str, EpisodeResult]]:
    """(task, result) of each episode of Meta-World, from workers of its own Python environment."""
    kind = f"{MetaWorldTask.__module__}.{MetaWorldTask.__qualname__}"
    settings = RemoteSettings(arguments.python, kind, arguments.image_size, HZ, arguments.cameras, control)
    jobs = [
        {"task": asdict(MetaWorldTask(name=name)), "seed": seed, "video": None}
        for name in task_names(arguments.task)
        for seed in seeds
    ]
    setup = settings.as_dict() | {"url": arguments.server}
    for number, report in run_jobs(arguments.python, WORKER, setup, jobs, arguments.processes or 1, ADVICE):
        yield jobs[number]["task"]["name"], EpisodeResult(**report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--env", choices=("yam", "metaworld"), default="yam")
    parser.add_argument(
        "--task", default="pick", help="a task of the YAM cell, or tasks of Meta-World: mt10, mt50, ..."
    )
    parser.add_argument("--episodes", type=int, default=20, help="of each task")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED, help="settings are chosen on 500000 and up")
    parser.add_argument("--image-size", type=int, default=224, help="as recorded")
    parser.add_argument(
        "--hz", type=float, default=None, help="control periods per second of the YAM cell, 10 by default"
    )
    parser.add_argument("--execute-seconds", type=float, default=1.2, help="of a plan before the next one")
    parser.add_argument("--cameras", nargs="+", default=None)
    parser.add_argument("--python", default=str(PYTHON), help="interpreter with metaworld: make metaworld-install")
    parser.add_argument("--processes", type=int, default=None, help="workers of Meta-World, 1 by default")
    arguments = parser.parse_args()
    if arguments.env == "metaworld" and arguments.hz is not None:
        parser.error(f"--hz is for the YAM cell: Meta-World has one rate, {HZ:g} Hz")
    if arguments.env == "yam" and arguments.processes is not None:
        parser.error("--processes is for Meta-World: the YAM cell runs in one process")
    if arguments.env == "metaworld" and not Path(arguments.python).is_file():
        sys.exit(
            f"there is no Python interpreter at {arguments.python}: `make metaworld-install` makes an environment of "
            "Meta-World; or give --python PATH of one"
        )
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.episodes)
    run = in_metaworld if arguments.env == "metaworld" else in_the_cell
    found: dict[str, list[EpisodeResult]] = {}
    control = partial(RecedingHorizon, execute_seconds=arguments.execute_seconds)
    for task, result in tqdm(run(arguments, control, seeds), disable=None):
        found.setdefault(task, []).append(result)
    results = [ConditionResult(name, {}, sorted(each, key=lambda one: one.seed)) for name, each in found.items()]
    with RemotePolicy(arguments.server) as policy:
        model = policy.health()["model"]
    report = {
        "model": model,
        "env": arguments.env,
        "first_seed": arguments.first_seed,
        "all": over_tasks(results),
        "tasks": {result.name: result.summary() for result in results},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
