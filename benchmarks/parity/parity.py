"""Whether training still computes what it did: losses, weights and plans of short runs, bit for bit.

    python benchmarks/parity/parity.py --data DATA --write FILE.json    # at the old commit
    python benchmarks/parity/parity.py --data DATA --against FILE.json  # at the new one

Every case is a few steps of a small training run with all settings that matter given explicitly, in a process of its
own, on data that is recorded once in the folder DATA and used by both commits. Losses, validation metrics and plans
are written as hexadecimal floats, weights as a hash that does not depend on parameter names. Equal figures are
promised on one machine with one version of torch only; the file names both. Exit code 1: something differs.

``CASES`` holds the settings under their present names. To write a baseline at a commit with other names, run that
commit's package with this script: ``PYTHONPATH=CHECKOUT python .../parity.py --package-settings OLD.json ...``, where
OLD.json maps a case to the settings that replace those here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL_RUN = [
    "strategy=cpu",
    "strategy.precision=32-true",
    "seed=0",
    "deterministic=true",
    "logger=none",
    "data.num_workers=0",
    "accumulate_grad_batches=1",
    "log_every_n_steps=10",
    "limit_val_batches=2",
]
DEMO = [
    "model=volume_query_tuned",
    "data=yam",
    "backbone=tiny",
    "rotation=pca_1d",
    "optimizer=adamw",
    "optimizer.lr=1.0e-3",
    "optimizer.warmup_steps=150",
    "model.log_images_every_n_steps=0",
    "data.batch_size=32",
    "data.root={data}/pick_place",
    "data.record.demos=6",
    "callbacks.ema.decay=0.998",
]
VLM_OPTIMIZER = [
    "optimizer=adamw",
    "optimizer.lr=2.0e-3",
    "optimizer.weight_decay=0.02",
    "optimizer.warmup_steps=40",
    "optimizer.final_lr_share=0.05",
]
VLA = [
    "data=yam_language",
    "data.root={data}/named_place",
    "backbone=tiny",
    "backbone.image_size=128",
    "geometry=dino_multiview",
    "model.log_images_every_n_steps=0",
    "data.batch_size=4",
]
TOURS = [
    "data.sources.tours.root={data}/tours",
    "data.sources.texts.root={data}/texts",
    "backbone=tiny",
    "backbone.image_size=128",
]

# Case: settings of a run of so many steps. "{data}" is the folder of recordings.
CASES: dict[str, tuple[int, list[str]]] = {
    "demo": (50, [*DEMO]),
    "coordinate_regression": (
        20,
        ["model=coordinate_regression", *[s for s in DEMO[1:] if not s.startswith(("rotation", "model."))]],
    ),
    "foveated_vlm": (
        20,
        [
            "model=foveated_vlm",
            "data=robot_videos",
            *TOURS,
            "data.sources.demos=null",
            "language=tiny",
            *VLM_OPTIMIZER,
            "+optimizer.lr_multipliers.backbone=0.25",
            "model.log_images_every_n_steps=0",
            "model.monitor_from_step=5",
            "model.monitor_every_n_steps=5",
            "data.batch_size=8",
        ],
    ),
    "foveated_vlm_coarse_source": (
        20,
        [
            "model=foveated_vlm",
            "data=robot_videos",
            *TOURS,
            "data.sources.demos=null",
            "language=tiny",
            *VLM_OPTIMIZER,
            "model.log_images_every_n_steps=0",
            "model.network.query_path=own",
            "model.network.query_source=coarse",
            "model.network.query_start=cls",
            "model.network.frame_numbers=64",
            "model.refinement=0",
            "backbone.trainable=frozen",
            "data.batch_size=8",
        ],
    ),
    "mark_reader": (
        10,
        [
            "model=vlm_encoder_pretraining",
            "data=robot_videos",
            *TOURS,
            "data.sources.demos=null",
            "data.sources.texts=null",
            "data.val_questions=null",
            "data.questions=null",
            "model.weights.asked=1.0",
            "optimizer=adamw",
            "optimizer.lr=1.5e-3",
            "callbacks.ema=null",
            "data.batch_size=4",
        ],
    ),
    "patch_dit": (
        20,
        [
            "model=patch_dit",
            "data=robot_images",
            "encoders=tiny",
            "optimizer=adamw",
            "optimizer.lr=1.0e-3",
            "optimizer.weight_decay=0.01",
            "optimizer.warmup_steps=50",
            "optimizer.final_lr_share=0.03",
            "data.root={data}/images",
            "model.log_images_every_n_steps=0",
            "model.monitor_from_step=5",
            "model.monitor_every_n_steps=5",
            "data.batch_size=8",
            # as when the baseline was recorded
            "model.network.prediction=v",
            "model.network.timestep_floor=null",
            "model.network.rotary=false",
            "model.network.final_modulation=false",
            "model.timesteps.mean=0.3",
            "model.timesteps.std=1.0",
            "model.sampling.text_scale=4.0",
            "model.sampling.dino_scale=3.0",
            "model.sampling.timestep_shift=1.0",
            "model.sampling.guidance=independent",
        ],
    ),
    "geometry_vla": (20, ["model=geometry_vla", "vlm=tiny", "optimizer=muon", *VLA]),
    "depth_reader": (10, ["model=depth_reader", "optimizer=adamw", *VLA]),
}

# What is recorded first where it is missing: (folder in DATA, setting of its place, settings of a run that records it).
RECORDINGS: list[tuple[list[str], str, list[str]]] = [
    (["pick_place"], "data.record.folder", ["data=yam", "data.record.demos=6", "model=coordinate_regression"]),
    (
        ["named_place"],
        "data.record.folder",
        ["data=yam_language", "data.record.demos=6", "model=geometry_vla", "optimizer=muon"],
    ),
    (
        ["tours", "texts"],
        "",
        [
            "model=foveated_vlm",
            "data=robot_videos",
            "data.image_size=128",
            "data.sources.demos=null",
            "data.sources.tours.make.folder={making}",
            "data.sources.texts.make.folder={making}",
            *(
                f"data.sources.{s}.make.options.{k}"
                for s in ("tours", "texts")
                for k in ("train=60", "val=8", "test=1")
            ),
        ],
    ),
    (
        ["images"],
        "data.make.folder",
        [
            "model=patch_dit",
            "data=robot_images",
            "data.make.options.train=120",
            "data.make.options.val=16",
            "data.make.options.test=8",
        ],
    ),
]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the recordings, made where it lacks some")
    parser.add_argument("--write", type=Path, help="write what this checkout computes to this file")
    parser.add_argument("--against", type=Path, help="compare what this checkout computes with this file")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE", help="which")
    parser.add_argument("--package-settings", type=Path, help="JSON: settings by case for a commit with other names")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = {name: each for name, (_, each) in CASES.items()}
    if arguments.package_settings:
        settings |= json.loads(arguments.package_settings.read_text())
    data = arguments.data.resolve()
    if arguments.worker:
        case, file = arguments.worker
        overrides = [setting.replace("{data}", str(data)) for setting in settings[case]]
        Path(file).write_text(json.dumps(train(CASES[case][0], overrides)))
        return
    record(data)
    result: dict[str, Any] = {**surroundings(), "cases": {}}
    for case in arguments.cases:
        figures = in_own_process(case)
        print(f"{case}: first loss {float.fromhex(figures['losses'][0]):.6g}", file=sys.stderr)
        result["cases"][case] = figures
        if arguments.write:
            write(arguments.write, result)
    if arguments.against:
        lines = differences(json.loads(arguments.against.read_text()), result)
        print("\n".join(lines) or f"equal: {', '.join(arguments.cases)}")
        sys.exit(1 if lines else 0)


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the result; cases that an earlier file of the same commit has beside these are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = dict(result["cases"])
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier["commit"] == result["commit"]:
            cases = {**earlier["cases"], **cases}
    path.write_text(json.dumps({**result, "cases": cases}, indent=1) + "\n")


def in_own_process(case: str) -> dict[str, Any]:
    """The figures of a case, computed by one thread in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="keygrip-parity-") as folder:
        file = Path(folder) / "figures.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", case, str(file)]
        subprocess.run(command, check=True, stdout=sys.stderr.fileno(), env=environment)
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures


def surroundings() -> dict[str, str]:
    """Commit, machine and versions that figures belong to."""
    import torch

    import keygrip

    package = Path(keygrip.__file__).resolve().parent
    commit = subprocess.run(
        ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def train(steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Losses of every step, validation metrics at the end, a hash of the weights, and a plan, of one run."""
    import lightning
    import torch

    torch.set_num_threads(1)
    recorder = _recorder()
    fit = lightning.Trainer.fit

    def recording_fit(trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks.append(recorder)
        fit(trainer, module, *args, **kwargs)

    lightning.Trainer.fit = recording_fit  # type: ignore[method-assign]
    from keygrip import train as command
    from keygrip.config import compose

    with tempfile.TemporaryDirectory(prefix="keygrip-parity-") as folder:
        run = Path(folder) / "run"
        more = [f"max_steps={steps}", f"val_every_n_steps={steps}", f"run_dir={run}", f"data.cache_dir={folder}/cache"]
        config = compose("train", [*overrides, *SMALL_RUN, *more])
        command.run(config)
        figures = {
            "losses": [loss.hex() for loss in recorder.losses],
            "val_metrics": {name: value.hex() for name, value in sorted(recorder.metrics.items())},
            "weights_sha256": recorder.weights,
        }
        image_size = (config.data.get("record") or {}).get("image_size")
        if image_size is not None and not config.data.get("cameras"):
            figures["plan"] = plan(run, image_size)
    return figures


def plan(run: Path, image_size: int) -> list[str]:
    """Positions, rotations and gripper of the plan that the trained policy makes for one fixed observation."""
    from keygrip.benchmarks.inference import looking_down

    observation = looking_down(image_size)
    try:
        from keygrip import load_policy

        policy = load_policy(run)
    except ImportError:  # commits before the public functions
        from keygrip.training.checkpoints import load_module

        policy = load_module(run).policy()
    made = policy.plan(observation)
    return [float(x).hex() for part in (made.position, made.quaternion, made.gripper) for x in part.ravel()]


def _recorder() -> Any:
    import torch
    from lightning.pytorch import Callback

    class Recorder(Callback):
        """What a run computes."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.metrics: dict[str, float] = {}
            self.weights = ""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(outputs["loss"]))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            each = sorted(
                hashlib.sha256(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                for p in pl_module.parameters()
                if p.ndim > 0
            )
            self.weights = hashlib.sha256("".join(each).encode()).hexdigest()

    return Recorder()


def record(data: Path) -> None:
    """Makes the recordings that the folder lacks, with this checkout's own recorders."""
    data.mkdir(parents=True, exist_ok=True)
    for names, place, overrides in RECORDINGS:
        if all((data / name).is_dir() for name in names):
            continue
        making = data / "making"
        shutil.rmtree(making, ignore_errors=True)
        settings = [setting.replace("{making}", str(making)) for setting in overrides]
        settings += [f"{place}={making}"] if place else []
        command = [sys.executable, "-m", "keygrip.train", *settings, *SMALL_RUN, "max_steps=1", "limit_val_batches=0"]
        subprocess.run([*command, f"run_dir={making / 'run'}"], check=True, stdout=sys.stderr.fileno())
        for name in names:
            (made,) = (
                p for p in making.iterdir() if p.is_dir() and p.name != "run" and (len(names) == 1 or name in p.name)
            )
            made.rename(data / name)
        shutil.rmtree(making)
    for kept in data.glob("*/.keygrip"):  # caches and tokenizers that an earlier commit may have left
        shutil.rmtree(kept)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each figure of `now` that differs from `before`; both as written by this script.

    Metrics are compared where both have them: they may be renamed, losses and weights may not change.
    """
    lines = [
        f"{key} differs ({before[key]} then, {now[key]} now): equal figures are not promised"
        for key in ("torch", "cpu", "cpu_capability")
        if before[key] != now[key]
    ]
    for case, figures in now["cases"].items():
        old = before["cases"].get(case)
        if old is None:
            lines.append(f"{case}: the earlier file lacks it")
            continue
        lines += _case_differences(case, old, figures)
    return lines


def _case_differences(case: str, old: dict[str, Any], now: dict[str, Any]) -> list[str]:
    lines = []
    if old["losses"] != now["losses"]:
        pairs = list(zip(old["losses"], now["losses"], strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            lines.append(f"{case}: {len(old['losses'])} losses then, {len(now['losses'])} now")
        else:
            a, b = (float.fromhex(x) for x in pairs[first])
            lines.append(f"{case}: the loss of step {first} was {a:.9g} and is {b:.9g}")
    if old["weights_sha256"] != now["weights_sha256"]:
        lines.append(f"{case}: the trained weights differ")
    common = old["val_metrics"].keys() & now["val_metrics"].keys()
    if old["val_metrics"] and not common:
        lines.append(f"{case}: no validation metric has its earlier name")
    lines += [
        f"{case}: {name} was {float.fromhex(old['val_metrics'][name]):.9g} and is "
        f"{float.fromhex(now['val_metrics'][name]):.9g}"
        for name in sorted(common)
        if old["val_metrics"][name] != now["val_metrics"][name]
    ]
    if old.get("plan") != now.get("plan"):
        lines.append(f"{case}: the plan differs")
    return lines


if __name__ == "__main__":
    main()
