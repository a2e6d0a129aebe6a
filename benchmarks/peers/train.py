"""Trains a LeRobot policy by LeRobot's own `lerobot-train` on an exported data set, for a given wall time.

Runs in LeRobot's environment: ``.venv-lerobot/bin/python benchmarks/peers/train.py --dataset SET --policy act --minutes
16 --output runs/act``; arguments that it does not know go to lerobot-train (``--policy.chunk_size=20``). A probe of a
few steps measures the time of a step; the number of steps, which shapes the learning-rate schedule, follows from it. A
run that took less than 0.9 of the minutes, because the probe ran beside other work, is trained anew, once, with as many
steps as its own time of a step says. ``--steps`` in place of ``--minutes`` trains just so many. SmolVLA's configuration
and tokenizer are written to ``OUTPUT-vlm`` first, where the checkpoint looks for them later. Prints one line of JSON
last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smolvla import SIZES, instructions_of, write_vlm

POLICIES = {
    "act": ["--policy.pretrained_backbone_weights=null"],  # random weights, as ours
    "diffusion": [],
    # random weights, as ours: all of them are trained
    "smolvla": [
        "--policy.load_vlm_weights=false", "--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false",
    ],
}  # fmt: skip
VLM = "--policy.vlm_model_name"
TIMES = re.compile(r"updt_s:([\d.]+) data_s:([\d.]+)")
LEAST_SHARE = 0.9  # of the minutes; a run that took less is not one of equal time


def lerobot_train(
    dataset: Path, policy: str, output: Path, steps: int, log_every: int, batch: int, seed: int, more: list[str]
) -> str:
    """Runs lerobot-train; returns its log.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    command = [
        sys.executable, "-m", "lerobot.scripts.lerobot_train", f"--dataset.repo_id=local/{dataset.name}",
        f"--dataset.root={dataset}", "--dataset.video_backend=pyav", f"--policy.type={policy}", "--policy.device=cpu",
        "--policy.push_to_hub=false", f"--output_dir={output}", f"--steps={steps}", f"--save_freq={steps}",
        f"--log_freq={log_every}", "--eval_freq=0", "--wandb.enable=false", f"--batch_size={batch}",
        "--num_workers=1", f"--seed={seed}", *POLICIES[policy], *more,
    ]  # fmt: skip
    finished = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    log = finished.stdout + finished.stderr
    if finished.returncode:
        raise RuntimeError(f"lerobot-train ended with {finished.returncode}: " + "\n".join(log.splitlines()[-15:]))
    return log


def step_times(log: str) -> list[float]:
    """Seconds of a step, of each line of a log of lerobot-train that says so."""
    return [max(float(update), 1e-3) + float(data) for update, data in TIMES.findall(log)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder of step=export_lerobot")
    parser.add_argument("--policy", choices=sorted(POLICIES), required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training, loading left out")
    length.add_argument("--steps", type=int, help="of training, however long they take; nothing is probed")
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--batch-size", type=int, default=8, help="LeRobot's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-steps", type=int, default=10)
    parser.add_argument("--vlm-size", choices=sorted(SIZES), help="of smolvla; small where nothing else is said")
    arguments, more = parser.parse_known_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    if any(each.split("=")[0] == "--log_freq" for each in more):
        parser.error("--log_freq follows from the number of steps here: the time of a step is read from the log")
    makes_vlm = arguments.policy == "smolvla" and not any(each.split("=")[0] == VLM for each in more)
    if arguments.vlm_size is not None and not makes_vlm:
        parser.error(f"--vlm-size has an effect only with --policy smolvla and without {VLM}")
    vlm_size = (arguments.vlm_size or "small") if makes_vlm else None
    vlm = []
    if vlm_size is not None:
        folder = arguments.output.absolute().with_name(f"{arguments.output.name}-vlm")
        write_vlm(folder, SIZES[vlm_size], instructions_of(arguments.dataset))
        vlm, more = [f"{VLM}={folder}"], [*SIZES[vlm_size].arguments, *more]
    common = (arguments.batch_size, arguments.seed, [*vlm, *more])
    given = arguments.steps is not None
    if not given:
        with tempfile.TemporaryDirectory() as temporary:
            half = max(1, arguments.probe_steps // 2)
            log = lerobot_train(
                arguments.dataset, arguments.policy, Path(temporary) / "probe", arguments.probe_steps, half, *common
            )
        step_s = step_times(log)[-1]
    for last in (False, True):
        steps = arguments.steps if given else max(1, round(60 * arguments.minutes / step_s))
        began = time.monotonic()
        log = lerobot_train(
            arguments.dataset, arguments.policy, arguments.output, steps, max(1, min(200, steps // 5)), *common
        )
        wall_s = time.monotonic() - began
        step_s = statistics.fmean(step_times(log))
        trained_min = steps * step_s / 60
        if last or given or trained_min >= LEAST_SHARE * arguments.minutes:
            break
        print(
            f"{steps} steps took {trained_min:.1f} of {arguments.minutes:g} minutes: all is trained anew, with more",
            file=sys.stderr,
        )
        shutil.rmtree(arguments.output)
    losses = re.findall(r"loss:([\d.]+)", log)
    report = {
        "policy": arguments.policy,
        "vlm_size": vlm_size,
        "steps": steps,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "step_s": round(step_s, 4),
        "trained_min": round(trained_min, 2),
        "wall_min": round(wall_s / 60, 2),
        "first_loss": float(losses[0]) if losses else None,
        "last_loss": float(losses[-1]) if losses else None,
        "checkpoint": str(arguments.output / "checkpoints" / "last" / "pretrained_model"),
        "arguments": more,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
