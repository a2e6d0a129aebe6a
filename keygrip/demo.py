"""``make demo``: record demonstrations, train a robot policy and evaluate it, with metrics and videos at the end.

Records demonstrations of the simulated arm, trains the volume-query policy on them, runs the policy on held-out seeds
and prints a report. An interrupted demo continues. Overrides are those of ``keygrip.train``, e.g.
``data.record.task.name=pick``.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from keygrip.artifacts import json_text
from keygrip.command import entry_point
from keygrip.config import compose
from keygrip.launch import is_first_process
from keygrip.override_values import as_typed
from keygrip.training.results import RESULT, read_result, write_result
from keygrip.training.run_folder import CHECKPOINT
from keygrip.training.sweep_jobs import in_sweep

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train and evaluate with the settings of ``cfg``; write ``result.json`` with success rate, errors and times to
    the run folder."""
    from keygrip.train import run as train

    started = time.perf_counter()
    _refuse_without_report(cfg)
    cfg = _resume_if_interrupted(cfg)
    continued = bool(cfg.resume)
    folder = Path(cfg.run_dir)
    metrics = train(cfg)
    trained = read_result(folder)
    conditions = read_result(folder / "closed_loop")["conditions"]
    (success,) = conditions.values()
    result = {
        "success_rate": success["success_rate"],
        "success_low": success["success_low"],
        "success_high": success["success_high"],
        "episodes": success["episodes"],
        "failures": success["failures"],
        "task": cfg.data.record.task.name,
        "demos": cfg.data.record.demos,
        "wall_s": round(time.perf_counter() - started, 1),
        "continued": continued,
        "plan_ms_median": round(success["plan_ms_median"], 1),
        **{name.replace("/", "_"): round(value, 4) for name, value in metrics.items() if name.startswith("val/")},
    }
    write_result(folder, {**trained, **result})
    return result


def _refuse_without_report(cfg: DictConfig) -> None:
    """Raise ValueError if the demo could not report one success rate at the end, from the folder ``run_dir``."""
    if cfg.run_dir is None:
        raise ValueError("the demo continues or replaces the one in run_dir: leave out run_dir=null, or give a folder")
    if cfg.dry_run:
        raise ValueError("the demo trains and reports: for a dry run use `keygrip train experiment=demo dry_run=true`")
    if (cfg.callbacks or {}).get("closed_loop") is None:
        raise ValueError(
            "the demo reports episodes in the simulator, and callbacks.closed_loop=null leaves them out: for training "
            "alone use `keygrip train experiment=demo callbacks.closed_loop=null`"
        )
    conditions = OmegaConf.select(cfg, "callbacks.closed_loop.closed_loop.conditions") or {}
    tested = [name for name, grid in conditions.items() if grid is not None]
    if len(tested) > 1:
        raise ValueError(
            f"the demo reports one condition, and these settings test {len(tested)} ({', '.join(tested)}): set all but "
            "one to null, or use `keygrip train experiment=demo` with these settings"
        )
    if cfg.data.get("root") is not None:
        raise ValueError(
            "the demo records its own demonstrations: for others use `keygrip train experiment=demo data.root=FOLDER`"
        )
    processes = instantiate(cfg.strategy).processes
    if processes > 1:
        raise ValueError(
            f"the demo computes in one process, and strategy asks for {processes}: leave it out, or use "
            "`keygrip train experiment=demo` with this strategy"
        )


def _resume_if_interrupted(cfg: DictConfig) -> DictConfig:
    """Resume an interrupted demo; start a new one if there is none or if it is finished."""
    folder = Path(cfg.run_dir)
    _put_finished_aside(folder)
    if not (folder / CHECKPOINT).is_file():
        return cfg
    log.info("going on with the interrupted demo in %s", folder)
    cfg = cfg.copy()
    cfg.resume = True
    return cfg


def _put_finished_aside(folder: Path) -> None:
    """Rename the folder of a finished demo, so that ``runs/demo`` is always the newest."""
    result = folder / RESULT
    if not (folder / CHECKPOINT).is_file() or "success_rate" not in read_result(folder):
        return
    time_stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(result.stat().st_mtime))
    aside = folder.with_name(f"{folder.name}_{time_stamp}")
    folder.rename(aside)
    folder.mkdir()
    sys.stderr.write(f"keygrip: the earlier demo now lies in {aside}\n")


def _make_room(arguments: Sequence[str]) -> None:
    """Rename the folder of a finished demo before Hydra writes its log and settings to the same folder."""
    if not is_first_process() or any(argument.startswith("-") for argument in arguments):  # --help, --cfg: nothing runs
        return
    try:
        cfg = compose("demo", arguments)
        _refuse_without_report(cfg)
    except Exception:  # the command itself reports the error
        return
    _put_finished_aside(Path(cfg.run_dir))


def report(result: dict[str, Any], folder: Path) -> str:
    """Return the report that is printed at the end."""

    def against_floor(label: str, name: str, unit: str, scale: float = 1.0) -> str:
        value, floor = result.get(f"val_{name}"), result.get(f"val_{name}_floor", result.get("val_pix_floor"))
        if value is None or floor is None:
            return ""
        return f"  {label:<18}{value * scale:8.2f} {unit:<4} (quantisation alone: {floor * scale:.2f} {unit})\n"

    errors = (
        against_floor("pixel", "pix_argmax", "px")
        + against_floor("height", "height_m", "mm", 1000)
        + against_floor("position", "position_cm", "cm")
        + against_floor("rotation", "rotation_deg", "deg")
    )
    # `make demo` runs in an environment that the user's shell need not have activated
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
    since = " since it was continued" if result["continued"] else ""
    return (
        f"\n{result['task']}: {result['success_rate']:.0%} of {result['episodes']} held-out episodes succeeded "
        f"(95 % interval {result['success_low']:.0%} to {result['success_high']:.0%}), after {result['demos']} "
        f"demonstrations and {result['wall_s'] / 60:.1f} minutes{since}.\n"
        + (
            f"Errors on held-out demonstrations, mean over the steps of a plan:\n{errors}"
            if errors
            else "Errors on held-out demonstrations: none, the run ended before its first validation.\n"
        )
        + f"Videos:      {folder}/closed_loop/videos\n"
        f"TensorBoard: {python} -m tensorboard.main --logdir {folder}\n"
        f"Next: {python} -m keygrip.evaluate {as_typed('checkpoint', folder)}   (shifted positions and viewpoints)\n"
        f"      {python} -m keygrip.train experiment=yam_dinov3 data.root=YOUR_DEMOS data.camera=NAME   "
        "(a real robot)\n"
    )


def print_report(cfg: DictConfig) -> None:
    """Run the demo and print its report, then the result as one line of JSON.

    Raises:
        ValueError: the command is a sweep, or could not report one success rate at the end.
    """
    if in_sweep():
        raise ValueError("the demo is one run in one folder: for several use `keygrip train -m experiment=demo ...`")
    result = run(cfg)
    sys.stderr.flush()
    print(report(result, Path(cfg.run_dir)))
    print(json_text(result, ascii_only=True))


def main() -> None:
    """Command line."""
    _make_room(sys.argv[1:])
    entry_point("demo", print_report)


if __name__ == "__main__":
    main()
