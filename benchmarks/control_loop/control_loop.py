"""The control loop measured on the simulated YAM cell, on a simulated clock: nothing here depends on wall time.

    python benchmarks/control_loop/control_loop.py CHECKPOINT --episodes 100 > benchmarks/control_loop.json

Success with a policy under 150 ms of latency (uniform jitter of 50 ms either way), asynchronous and blocking, against
no latency. `--conditions asynchronous_150_ms continued_150_ms` compares a flow-matching policy that continues the plan
under way (real-time chunking, `execution.continue_chunks`) with the same one that plans anew. Limits of speed,
acceleration, workspace, joints and self-collision are on. Seeds are held out (1 000 000 and up) unless --first-seed
says otherwise.

`share_changed_by_limits` of a condition is the share of control periods in which the limits changed the command: it
differed from the plan's target by more than 1 mm, 0.01 rad or 0.01 of the gripper's opening.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

import keygrip
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import HELD_OUT_SEED
from keygrip.evaluation.statistics import wilson_interval
from keygrip.robots.joint_motion import JointLimits
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.control_loop import BESIDE_M, BESIDE_RAD, ControlLoop, Tick
from keygrip.runtime.limits import MotionLimits
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.sim_yam import SimulatedYam

LIMITS = MotionLimits(workspace_low=(0.05, -0.55, 0.0), workspace_high=(0.7, 0.55, 0.65))


class Condition(NamedTuple):
    """How plans are asked for, and when they arrive (seconds); continued: of the policy that continues its own."""

    asynchronous: bool = True
    latency: float = 0.0
    jitter: float = 0.0
    continued: bool = False


CONDITIONS = {
    "blocking_no_latency": Condition(asynchronous=False),
    "asynchronous_no_latency": Condition(),
    "blocking_150_ms": Condition(False, 0.15, 0.05),
    "asynchronous_150_ms": Condition(True, 0.15, 0.05),
    "asynchronous_300_ms": Condition(True, 0.3, 0.05),
    # of flow-matching policies alone
    "continued_150_ms": Condition(True, 0.15, 0.05, continued=True),
    "continued_300_ms": Condition(True, 0.3, 0.05, continued=True),
}
USUAL = list(CONDITIONS)[:4]
BESIDE_OPENING = 0.01
_state: dict[str, Any] = {}


def changed_by_limits(tick: Tick) -> bool:
    """Return whether the limits changed the command of a period, which is otherwise the plan's target. A held arm has
    no target."""
    if tick.target is None:
        return False
    sent, planned = (Rotation.from_quat(poses[:, 3:7], scalar_first=True) for poses in (tick.command, tick.target))
    distance = np.linalg.norm(tick.command[:, :3] - tick.target[:, :3], axis=1)
    opening = np.abs(tick.command[:, 7] - np.clip(tick.target[:, 7], 0.0, 1.0))
    beside = (distance > BESIDE_M) | ((sent.inv() * planned).magnitude() > BESIDE_RAD) | (opening > BESIDE_OPENING)
    return bool(beside.any())


def episode(checkpoint: str, options: dict[str, Any], condition: str, seed: int) -> dict[str, Any]:
    """One episode under a condition."""
    if "policy" not in _state:
        import torch

        torch.set_num_threads(1)
        _state["policy"] = keygrip.load_policy(checkpoint)
        _state["robot"] = SimulatedYam(
            TaskOptions(**options["task"]),
            cameras=list(_state["policy"].needs.cameras) or None,
            joints=JointLimits(),
            real_time=False,
            seed=seed,
        )
    policy, robot = _state["policy"], _state["robot"]
    robot.reset(seed)
    if hasattr(policy, "reset"):
        policy.reset(seed)
    of = CONDITIONS[condition]
    draw = np.random.default_rng(seed)
    planner = SimulatedPlanner(policy, lambda: float(draw.uniform(of.latency - of.jitter, of.latency + of.jitter)))
    extra = options["asynchronous"] | {"continue_chunks": of.continued} if of.asynchronous else {}
    changed: list[bool] = []
    loop = ControlLoop(
        robot,
        ChunkExecution(planner, robot.control_hz, of.asynchronous, **extra),
        LIMITS,
        on_tick=lambda tick: changed.append(changed_by_limits(tick)),
    )
    limit_s = robot.cell.task.time_limit_s
    report = loop.run(limit_s, over=lambda: any(map(bool, robot.outcome())))
    success, failure = robot.outcome()
    return {
        "condition": condition,
        "seed": seed,
        "success": success,
        "failure": None if success else (failure or report.state.value),
        "ticks_changed_by_limits": sum(changed),
        **report.summary(),
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one condition."""
    won = sum(each["success"] for each in results)
    low, high = wilson_interval(won, len(results))
    failures = [each["failure"] for each in results if not each["success"]]
    return {
        "success_rate": won / len(results),
        "success_low": round(low, 4),
        "success_high": round(high, 4),
        "episodes": len(results),
        "failures": {name: failures.count(name) for name in sorted(set(failures))},
        "episode_s_median": float(np.median([each["seconds"] for each in results])),
        "plans_median": float(np.median([each["plans"] for each in results])),
        "holds": sum(each["holds"] for each in results),
        "share_changed_by_limits": round(
            sum(each["ticks_changed_by_limits"] for each in results) / sum(each["ticks"] for each in results), 4
        ),
        "stopped": sum(each["state"] == "stopped" for each in results),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--task", type=json.loads, default={"name": "pick_place"}, help="fields of TaskOptions, JSON")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--conditions", nargs="*", default=USUAL, choices=list(CONDITIONS))
    parser.add_argument("--asynchronous", type=json.loads, default={}, help="settings of ChunkExecution, JSON")
    given = parser.parse_args()
    options = {"task": given.task, "asynchronous": given.asynchronous}
    run = partial(episode, given.checkpoint, options)
    jobs = [(name, given.first_seed + index) for index in range(given.episodes) for name in given.conditions]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.conditions}
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        for done, future in enumerate(as_completed([pool.submit(run, *job) for job in jobs]), start=1):
            result = future.result()
            found[result["condition"]].append(result)
            if done % 10 == 0:
                rates = {name: f"{sum(r['success'] for r in each)}/{len(each)}" for name, each in found.items()}
                sys.stderr.write(f"{done} of {len(jobs)}: {rates}\n")
    arguments = ["CHECKPOINT" if each == given.checkpoint else each for each in sys.argv[1:]]
    record = {
        "case": "control_loop",
        "command": shlex.join(["python", "benchmarks/control_loop/control_loop.py", *arguments]),
        "task": given.task,
        "first_seed": given.first_seed,
        "latency": "as a condition's name says, uniform jitter of 0.05 s either way, on a simulated clock at 10 Hz",
        "asynchronous": given.asynchronous,
        "checkpoint": Path(given.checkpoint).name,
        "machine": f"{os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": f"{datetime.date.today()}",
        "conditions": {name: summary(each) for name, each in found.items() if each},
    }
    sys.stdout.write(f"{json.dumps(record, indent=1)}\n")


if __name__ == "__main__":
    main()
