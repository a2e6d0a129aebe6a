"""What the scripted policies reach that Meta-World's demonstrations are made with: the best that imitation can reach.

``python benchmarks/metaworld/script.py --tasks mt50 --episodes 10``, after ``make metaworld-install``. Seeds, step
limit and success are those of `keygrip evaluate`; the scripts run as in recordings, without disturbances, from where
the benchmark starts the arm. Prints one line of JSON.

``--period 0.1`` is what imitation of such plans can reach: each episode that the script solves is started again, and
what the script commanded is followed from its positions every 0.1 s, straight from one to the next, as a policy's plan
is. ``--shift -0.03 0 0`` adds so many metres to each position: a policy that is so far off. ``--as-published`` runs the
benchmark's scripts where twelve of ours are eased or replaced. The other corrections of demonstrations stay: raised
goals, the stop before a grasp, the limit of the mocap body's lead, and the environment's effort of the fingers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STEP_LIMIT = 500
PYTHON = Path(__file__).resolve().parents[2] / ".venv-metaworld/bin/python"


def episodes_of(
    task: str, seeds: range, period: float, shift: list[float], as_published: bool = False
) -> list[dict[str, Any]]:
    """Runs the script on each seed, and follows its positions again where `period` is above 0; needs `metaworld`."""
    import numpy as np

    from keygrip.envs.metaworld.environment import DOWN, MetaWorldEnvironment
    from keygrip.envs.metaworld.expert import Expert
    from keygrip.envs.metaworld.tasks import HZ, MetaWorldTask

    environment = MetaWorldEnvironment(MetaWorldTask(name=task), render_images=False)
    found = []
    for seed in seeds:
        environment.reset(seed=seed)
        expert = Expert(environment, seed, step_limit=STEP_LIMIT, as_published=as_published)
        commands = []
        for _ in expert:
            commands.append([*environment.commanded_position, *DOWN, expert.opening])
            if expert.succeeded and not period:
                break
        success = expert.succeeded
        if period and success:
            commands.append([*environment.commanded_position, *DOWN, expert.opening])
            environment.reset(seed=seed)
            success = followed(environment, np.array(commands) + [*shift, *np.zeros(5)], round(period * HZ))
        found.append({"seed": seed, "success": success, "seconds": environment.elapsed / HZ})
    environment.close()
    return found


def followed(environment: Any, commands: Any, steps: int) -> bool:
    """Whether every `steps`-th of the commands ``[N, 8]``, straight from one to the next, ends in success."""
    kept = commands[::steps]
    for step in range(1, STEP_LIMIT + 1):
        before, share = divmod(step, steps)
        ends = kept[min(before, len(kept) - 1)], kept[min(before + 1, len(kept) - 1)]
        action = ends[0] + (ends[1] - ends[0]) * share / steps
        action[7] = ends[0][7]  # a position's opening is sent once it is reached, as plans are followed
        environment.advance(action)
        if environment.outcome()[0]:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="mt50", help="mt10, mt50, a difficulty group or one task")
    parser.add_argument("--episodes", type=int, default=10, help="of each task")
    parser.add_argument(
        "--first-seed", type=int, default=1_000_000, help="held out; settings are chosen on 500000 and up"
    )
    parser.add_argument("--python", default=str(PYTHON), help="interpreter with metaworld: make metaworld-install")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--period", type=float, default=0.0, help="seconds between the positions that are followed again; 0: none are"
    )
    parser.add_argument(
        "--shift", type=float, nargs=3, default=[0.0, 0.0, 0.0], help="metres added to the positions that are followed"
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="the benchmark's scripts, neither replaced nor eased; our goals, stops, lead and effort stay",
    )
    parser.add_argument("--worker", action="store_true", help="run one task here and print its episodes")
    arguments = parser.parse_args()
    if any(arguments.shift) and not arguments.period:
        parser.error("--shift moves the positions that --period follows: give both")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.episodes)
    if arguments.worker:
        how = (arguments.period, arguments.shift, arguments.as_published)
        print(json.dumps(episodes_of(arguments.tasks, seeds, *how)))
        return
    if not Path(arguments.python).is_file():
        sys.exit(
            f"there is no Python interpreter at {arguments.python}: `make metaworld-install` makes an environment of "
            "Meta-World; or give --python PATH of one"
        )
    from keygrip.envs.metaworld.tasks import task_names
    from keygrip.evaluation.closed_loop import ConditionResult
    from keygrip.evaluation.rollout_report import over_tasks
    from keygrip.evaluation.rollouts import EpisodeResult

    def run(task: str) -> ConditionResult:
        command = [arguments.python, __file__, "--worker", "--tasks", task]
        command += ["--episodes", str(arguments.episodes), "--first-seed", str(arguments.first_seed)]
        command += ["--period", str(arguments.period), "--shift", *map(str, arguments.shift)]
        command += ["--as-published"] if arguments.as_published else []
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise SystemExit(f"{task}: {finished.stderr.strip().splitlines()[-1]}")
        return ConditionResult(task, {}, [_result(each) for each in json.loads(finished.stdout.splitlines()[-1])])

    def _result(each: dict[str, Any]) -> EpisodeResult:
        failure = None if each["success"] else "timeout"
        return EpisodeResult(**each, failure=failure, plans=0, plan_ms=0.0, yaw_error_deg=None, video=None)

    names = task_names(arguments.tasks)
    with ThreadPoolExecutor(arguments.processes) as pool:
        results = []
        for result in pool.map(run, names):
            results.append(result)
            print(f"{len(results)} of {len(names)} tasks", file=sys.stderr)
    summaries = {result.name: result.summary() for result in results}
    print(json.dumps({"first_seed": arguments.first_seed, "all": over_tasks(results), "tasks": summaries}))


if __name__ == "__main__":
    main()
