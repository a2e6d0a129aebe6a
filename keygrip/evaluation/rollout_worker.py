"""Run episodes in the Python environment of a simulator; plans come from a policy server on this machine.

Started by `keygrip.evaluation.closed_loop`; needs neither torch nor Hydra.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from keygrip.envs.environment import Environment, open_environment
from keygrip.envs.workers import serve_jobs
from keygrip.evaluation.rollouts import check_environment, run_episode
from keygrip.models.policy import Needs
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy

_opened: dict[str, Environment] = {}  # the environment of the last job, by its task


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the function that runs one episode; consecutive jobs of one task share its environment. If the settings
    have no server address, return the function that checks an environment."""
    if settings["url"] is None:
        return partial(_check_job, settings)
    policy = policy_at(settings["url"], settings["processes"])
    control = partial(RecedingHorizon, **settings["control"])
    kind: Any = pkgutil.resolve_name(settings["task_class"])
    cameras = _parse_cameras(settings)

    def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        task = kind(**job["task"])
        key = repr(task)
        if key not in _opened:
            close_environments()
            _opened[key] = open_environment(task, settings["image_size"], settings["hz"], cameras)
        video = None if job["video"] is None else Path(job["video"])
        yield asdict(run_episode(_opened[key], policy, control, job["seed"], video))

    return work


def policy_at(url: str, processes: int) -> RemotePolicy:
    """Return a client of the server of an evaluation with that many workers; it waits for the plans of the others."""
    timeout_s = plan_timeout_s(processes) + 60.0  # later than the server's answer that a plan takes too long
    return RemotePolicy(url, timeout_s=timeout_s, patience_s=timeout_s)


def plan_timeout_s(processes: int) -> float:
    """Return the time limit of a plan in an evaluation, in seconds: 300 for the plan itself, which suffice for a large
    model on a few cores, and 30 for each of the processes, whose plans are computed one after another."""
    return 300.0 + 30.0 * processes


def close_environments() -> None:
    """Close the environment of the last job, if there is one."""
    while _opened:
        _opened.popitem()[1].close()


def _check_job(settings: dict[str, Any], job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Refuse an environment that does not provide what the policy needs; nothing else is reported."""
    task = pkgutil.resolve_name(settings["task_class"])(**job["task"])
    needs = None if job["needs"] is None else Needs(**job["needs"])
    follow = settings["control"].get("follow", "auto")
    check_environment(
        task, settings["image_size"], settings["hz"], _parse_cameras(settings), job["seed"], needs, follow
    )
    yield from ()


def _parse_cameras(settings: dict[str, Any]) -> tuple[str, ...] | None:
    return None if settings["cameras"] is None else tuple(settings["cameras"])


if __name__ == "__main__":
    try:
        serve_jobs(start)
    finally:
        close_environments()
