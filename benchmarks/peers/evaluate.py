"""Evaluates whatever a server plans (ours or a peer's) in the simulated YAM cell, on given seeds.

``python benchmarks/peers/evaluate.py --server http://127.0.0.1:8422 --task reach --episodes 20``. Environment, seeds
and controller are those of `keygrip evaluate`. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from tqdm import tqdm

from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import HELD_OUT_SEED
from keygrip.evaluation.statistics import wilson_interval
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--task", default="pick", help="a task of the YAM cell, with its default options")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED, help="settings are chosen on 500000 and up")
    parser.add_argument("--image-size", type=int, default=224, help="as recorded")
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--cameras", nargs="+", default=None)
    arguments = parser.parse_args()
    cameras = None if arguments.cameras is None else tuple(arguments.cameras)
    cell = YamCell(TaskOptions(name=arguments.task), arguments.image_size, arguments.hz, cameras)
    won, seconds, errors = [], [], 0
    with RemotePolicy(arguments.server, timeout_s=60.0) as policy:
        for seed in tqdm(range(arguments.first_seed, arguments.first_seed + arguments.episodes), disable=None):
            policy.reset(seed)
            controller = RecedingHorizon(policy, arguments.hz)
            observation, _ = cell.reset(seed=seed)
            success = truncated = False
            steps = 0
            while not (success or truncated):
                try:
                    action = controller.act(observation)
                except ValueError:  # it finds no plan: a failure, as in `keygrip evaluate`
                    errors += 1
                    break
                cell.advance(action[0])
                success, truncated, _ = cell.outcome()
                steps += 1
                if controller.wants_observation and not (success or truncated):
                    observation = cell.observation()
            won.append(success)
            seconds.append(steps / arguments.hz)
        model = policy.health()["model"]
    cell.close()
    low, high = wilson_interval(sum(won), len(won))
    report = {
        "model": model,
        "task": arguments.task,
        "episodes": len(won),
        "successes": int(sum(won)),
        "success_rate": float(np.mean(won)),
        "success_low": low,
        "success_high": high,
        "policy_errors": errors,
        "episode_s_median": float(np.median(seconds)),
        "first_seed": arguments.first_seed,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
