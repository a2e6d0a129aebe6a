"""Run benchmarks: ``python -m keygrip.bench [case=NAME] [quick=true] [record=true]``; prints results as a line of JSON.

``python -m keygrip.bench suite=gpu`` runs and records the measurements that need a GPU (see `keygrip.benchmarks.gpu`).

Standard output ends with the line of JSON: the values of the case by name, with the unit in the name, and a description
of the machine. Progress and logs are written to standard error.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.artifacts import json_text, write_json
from keygrip.benchmarks.deadline import QUICK_S, deadline
from keygrip.command import entry_point
from keygrip.config import EntrySchema, config_folder, register
from keygrip.training.strategies import use_tf32
from keygrip.training.sweep_jobs import in_sweep

log = logging.getLogger(__name__)

ALL = "all"
PART_PROCESS = "KEYGRIP_BENCH_PART"  # set in the environment of the process of a part


@dataclass
class BenchSchema(EntrySchema):
    """Root of ``conf/bench.yaml``."""

    case: str = ALL
    run_dir: str | None = None
    quick: bool = False
    record: bool = False
    output: str | None = None
    cases: Any = MISSING
    suite: str | None = None
    part: Any = ALL
    minutes: float | None = None
    toy: bool = False
    tf32: bool = False
    commit: str | None = None
    gpu: Any = MISSING


register("bench_schema", BenchSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run one case, all cases in turn, or a suite; return the printed result.

    Raises:
        ValueError: no such case, suite or part; a setting without effect; a GPU suite on a machine without a GPU.
    """
    _refuse_unused_settings(cfg)
    if cfg.suite is not None:
        return _run_suite(cfg)
    import torch

    from keygrip.training.metadata import machine

    names = list(cfg.cases) if cfg.case == ALL else [_check_choice("case", cfg.case, list(cfg.cases))]
    _refuse_settings_of_others(cfg, "cases", names, f"with case={cfg.case}: give case={{}}")
    _refuse_settings_of_others(cfg, "gpu", [], "without a suite: give suite=gpu part={}")
    if cfg.tf32:
        _refuse_tf32_elsewhere({name: str(cfg.cases[name]["_target_"]) for name in names})
    use_tf32(cfg.tf32, torch.cuda.is_available())
    # Otherwise torch's profiler, which counts memory, warns about missing GPUs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    figures = {}
    for name in names:
        log.info("measuring %s", name)
        case = instantiate(cfg.cases[name], _convert_="all")
        with deadline(QUICK_S if cfg.quick else math.inf):
            figures[name] = case.run(cfg.quick)
        for figure, value in figures[name].items():
            log.info("  %-36s %.5g", figure, value)
    result = {"case": cfg.case, **(figures if cfg.case == ALL else figures[cfg.case])}
    result |= {"quick": cfg.quick, "machine": machine()} | ({"tf32": True} if cfg.tf32 else {})
    if cfg.output or cfg.record:
        _write_result(Path(cfg.output or Path("benchmarks") / f"{cfg.case}.json"), result)
    return result


def _refuse_tf32_elsewhere(targets: Mapping[str, str]) -> None:
    """Raise ValueError if cases, by name with their class, measure other processes than this one, where `use_tf32` has
    no effect."""
    elsewhere = [name for name, target in targets.items() if getattr(get_class(target), "in_other_processes", False)]
    if elsewhere:
        rest = "give one of the other cases" if len(targets) > 1 else "leave it out"
        raise ValueError(f"tf32=true has no effect on {', '.join(elsewhere)}, measured in other processes: {rest}")


def _refuse_unused_settings(cfg: DictConfig) -> None:
    """Raise ValueError if a setting of a suite is given for a case, or the other way round, where it has no effect."""
    idle = {"case": ALL, "quick": False, "record": False}
    if cfg.suite is None:
        idle = {"part": ALL, "minutes": None, "toy": False, "commit": None}
    for name, default in idle.items():
        if cfg[name] != default:
            whose, instead = ("a suite", "suite=gpu") if cfg.suite is None else ("a case", "no suite")
            raise ValueError(
                f"{name}={cfg[name]} has no effect here: it is for {whose}; give {instead}, or leave it out"
            )


def _refuse_settings_of_others(cfg: DictConfig, group: str, names: Sequence[str], instead: str) -> None:
    """Refuse changed settings of cases or parts that are not measured. In a sweep, whose jobs share overrides, they
    only cause a warning.

    Args:
        group: ``cases`` or ``gpu``. names: those that are measured. instead: what to do, with ``{}`` for the other's
            name.

    Raises:
        ValueError: the message names the first such case or part.
    """
    default = OmegaConf.select(OmegaConf.load(config_folder() / "bench.yaml"), group)
    for name in [str(name) for name in cfg[group] if name not in names]:
        if cfg[group][name] == default.get(name):
            continue
        problem = f"nothing reads the settings given for {group}.{name} {instead.format(name)}, or leave them out"
        if not in_sweep():
            raise ValueError(problem)
        log.warning("%s", problem)


def _run_suite(cfg: DictConfig) -> dict[str, Any]:
    """Run every part, also a single one (``part=NAME``), in a separate process. In that process, measure the part."""
    from keygrip.benchmarks.gpu import suite as suites
    from keygrip.training.metadata import git_revision, machine

    _check_choice("suite", cfg.suite, ["gpu"])
    if cfg.tf32:
        raise ValueError("tf32=true is for a case: the parts of a suite measure TF32 beside float32 themselves")
    suites.refuse_without_gpu(cfg.toy)
    chosen = [cfg.part] if isinstance(cfg.part, str) else list(cfg.part)
    names = list(cfg.gpu) if chosen == [ALL] else [_check_choice("part", str(name), list(cfg.gpu)) for name in chosen]
    if PART_PROCESS not in os.environ:  # the process of a part has the arguments of all parts
        parts = ",".join(names)
        _refuse_settings_of_others(cfg, "gpu", names, f"with part=[{parts}]: give part=[{parts},{{}}]")
        _refuse_settings_of_others(cfg, "cases", [], "with suite=gpu: give those of a part, gpu.PART.NAME=VALUE")
    commit = cfg.commit or git_revision(records_count=False)  # a suite itself changes records
    # toy figures replace no measured ones
    folder = Path(cfg.output or ("runs/bench/gpu_toy" if cfg.toy else "benchmarks/gpu"))
    suite = suites.Suite(folder, commit, cfg.toy, tuple(sys.argv[1:]))
    if os.environ.get(PART_PROCESS) == cfg.part:
        # The suite stops a part with SIGINT, which background jobs of a shell ignore by default.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return suite.measure(cfg.part, instantiate(cfg.gpu[cfg.part], _convert_="all"))
    if commit is None:
        log.info("git has no commit of this package, so no case is skipped; give the commit with commit=NAME")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("part=", "commit=", "minutes="))]
    arguments += [f"commit={commit or 'unknown'}"]

    def command(name: str) -> list[str]:
        return ["env", f"{PART_PROCESS}={name}", sys.executable, "-m", "keygrip.bench", *arguments, f"part={name}"]

    records = suite.run(names, command, cfg.minutes)
    failed = {name: record["error"] for name, record in records.items() if "error" in record}
    result = {"suite": cfg.suite, "parts": records, "failed": failed, "toy": cfg.toy, "machine": machine()}
    return result | ({"not_begun": left} if (left := [name for name in names if name not in records]) else {})


def _check_choice(kind: str, name: str, names: list[str]) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"the nearest is {close[0]}; " if close else ""
    everything = f", and {ALL} for each of them" if kind != "suite" else ""
    raise ValueError(f"there is no {kind} {name!r}: {hint}{kind}s are {', '.join(names)}{everything}")


def _write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the result with its date and the command that reproduces it, completely or not at all."""
    command = shlex.join(["python", "-m", "keygrip.bench", *sys.argv[1:]])
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    write_json(path, {**result, "date": date, "command": command})
    log.info("written to %s", path)


def print_result(cfg: DictConfig) -> None:
    """Run the benchmarks and print the result as one line of JSON."""
    result = run(cfg)
    sys.stderr.flush()
    print(json_text(result, ascii_only=True))
    if result.get("failed"):
        sys.stdout.flush()
        raise ChildProcessError(
            "; ".join(f"part {name} failed: {error}" for name, error in result["failed"].items())
            + " (its record has the figures before that; the same command measures it again)"
        )


def main() -> None:
    """Command line."""
    entry_point("bench", print_result)


if __name__ == "__main__":
    main()
