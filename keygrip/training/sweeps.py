"""Sweeps (`-m`): every job is recorded, failed ones too, and one table at the end sets overrides against headline metrics."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from keygrip.training.interruption import Interrupted

log = logging.getLogger(__name__)

RESULT = "result.json"
PLAN = "sweep.json"
_open_sweeps: list[Path] = []
_failures: list[str] = []


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json`` into a run folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RESULT}.writing"
    temporary.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / RESULT)


def run_job(run: Callable[[DictConfig], Any], cfg: DictConfig, config_name: str, debug: bool) -> Any:
    """One job of a sweep: what goes wrong in it is written into its folder and the sweep goes on."""
    from hydra.core.hydra_config import HydraConfig

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    started = time.time()
    (folder / RESULT).unlink(missing_ok=True)
    try:
        _refuse_several_devices(cfg, hydra_cfg.launcher.get("_target_", ""))
        figures = run(cfg)
    except Interrupted:
        raise
    except Exception as error:
        import traceback

        from keygrip.config import describe_error

        line, _ = describe_error(error, config_name, overrides)
        trace = "".join(traceback.format_exception(error))
        (folder / "error.txt").write_text(trace, encoding="utf-8")
        if debug:
            sys.stderr.write(trace)
        log.error("job %s (%s) failed: %s", hydra_cfg.job.num, " ".join(overrides), line)
        figures = {}
        wall_s = round(time.time() - started, 1)
        write_result(folder, {"status": "failed", "error": line, "overrides": overrides, "metrics": {}, "wall_s": wall_s})
        return None
    if not (folder / RESULT).is_file():
        metrics = {k: v for k, v in (figures or {}).items() if isinstance(v, int | float)} if isinstance(figures, dict) else {}
        wall_s = round(time.time() - started, 1)
        write_result(folder, {"status": "finished", "overrides": overrides, "metrics": metrics, "wall_s": wall_s})
    return figures


class SweepSummary(Callback):
    """Hydra callback: notes at the start which jobs there will be, and writes the table at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"jobs": planned_jobs(config), "started": time.time()}
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        _open_sweeps.append(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish_sweep(Path(config.hydra.sweep.dir))


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job that Hydra's basic sweeper will start, in its order; empty for other sweepers."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return []
    overrides = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides(overrides + list(config.hydra.overrides.task))
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def finish_sweep(folder: Path) -> list[dict[str, Any]]:
    """Writes ``summary.csv``, ``summary.md`` and TensorBoard's hparams for a sweep, prints the table, and returns its rows."""
    if folder in _open_sweeps:
        _open_sweeps.remove(folder)
    rows = collect(folder)
    header, lines = table(rows)
    temporary = folder / ".summary.csv.writing"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    temporary.replace(folder / "summary.csv")
    text = markdown(header, lines)
    (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
    _write_hparams(folder, rows)
    bad = [row for row in rows if row["status"] != "finished"]
    sys.stderr.write(f"\n{text}\n\n{len(rows) - len(bad)} of {len(rows)} jobs finished; table: {folder / 'summary.csv'}\n")
    if bad:
        names = ", ".join(f"{row['job']} ({row['status']})" for row in bad)
        _failures.append(f"{len(bad)} of {len(rows)} jobs of the sweep did not finish: {names}; see {folder}")
    return rows


def close_sweeps() -> list[str]:
    """Finishes sweeps that were cut off, and returns one line for each that had jobs which did not finish."""
    for folder in list(_open_sweeps):
        with contextlib.suppress(OSError):
            finish_sweep(folder)
    lines = list(_failures)
    _failures.clear()
    return lines


def collect(folder: Path) -> list[dict[str, Any]]:
    """One row a job: ``job, status, overrides {name: value}, metrics, wall_s, error``; planned jobs without a result are ``missing``."""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rows = []
    for number, overrides in enumerate(plan["jobs"]):
        row: dict[str, Any] = {"job": number, "status": "missing", "metrics": {}, "wall_s": None, "error": "no result was written"}
        found = [p for p in folder.glob(f"**/{RESULT}") if _same(_result(p).get("overrides", []), overrides)]
        result = _result(found[0]) if found else {}
        row.update({key: result[key] for key in ("status", "metrics", "wall_s", "error") if key in result})
        if result.get("status") == "finished":
            row["error"] = ""
        row["overrides"] = dict(o.lstrip("+~").partition("=")[::2] for o in overrides)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Header and lines: job, status, the overrides that differ between jobs, metrics, seconds, error."""
    names = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    varied = [name for name in names if len({row["overrides"].get(name) for row in rows}) > 1] or names
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    header = ["job", "status", *varied, *metrics, "wall_s", "error"]
    lines = [
        [row["job"], row["status"]]
        + [row["overrides"].get(name, "") for name in varied]
        + [_figure(row["metrics"].get(name, "")) for name in metrics]
        + ["" if row["wall_s"] is None else row["wall_s"], row.get("error") or ""]
        for row in rows
    ]
    return header, lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """The table as aligned Markdown."""
    cells = [[str(cell).replace("|", "/") for cell in line] for line in [list(header), *lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    drawn = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([drawn[0], "| " + " | ".join("-" * width for width in widths) + " |", *drawn[1:]])


def _write_hparams(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    for row in rows:
        settings = {**row["overrides"], "status": row["status"]}
        figures = {name: float(v) for name, v in row["metrics"].items() if isinstance(v, int | float)}
        with SummaryWriter(str(folder / "tensorboard" / f"job_{row['job']}")) as writer:
            experiment, start, end = hparams(settings, {name: 0.0 for name in figures})
            for part in (experiment, start, end):
                writer.file_writer.add_summary(part)  # type: ignore[union-attr]
            for name, value in figures.items():
                writer.add_scalar(name, value)


def _refuse_several_devices(cfg: DictConfig, launcher: str) -> None:
    """Hydra's serial launcher and joblib run jobs inside one process: a second device would need that process started again."""
    if not launcher.endswith(("BasicLauncher", "JoblibLauncher")) or "strategy" not in cfg or cfg.strategy is None:
        return
    from hydra.utils import instantiate

    if "LOCAL_RANK" not in os.environ and instantiate(cfg.strategy).processes > 1:
        raise ValueError(
            "a sweep job that uses several devices must be a process of its own: add hydra/launcher=processes "
            "(or hydra/launcher=slurm on a cluster)"
        )


def _result(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _same(left: Sequence[str], right: Sequence[str]) -> bool:
    return sorted(left) == sorted(right)


def _figure(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
