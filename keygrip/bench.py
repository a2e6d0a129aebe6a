"""Measures: ``python -m keygrip.bench [case=NAME] [quick=true] [record=true]``; prints its figures as one line of JSON.

Standard output ends with that line: the figures of the case by name, with the unit in the name, and the machine that
computed them. Progress and logs go to standard error.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from keygrip.command import entry_point
from keygrip.config import EntrySchema, register

log = logging.getLogger(__name__)

ALL = "all"


@dataclass
class BenchSchema(EntrySchema):
    """Root of ``conf/bench.yaml``."""

    case: str = ALL
    quick: bool = False
    record: bool = False
    output: str | None = None
    cases: Any = MISSING


register("bench_schema", BenchSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measures one case, or all of them one after the other; returns what is printed.

    Raises:
        ValueError: no such case.
    """
    from hydra.utils import instantiate

    from keygrip.training.metadata import machine

    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "9"
    )  # the profiler that counts memory would talk about GPUs that are not there
    names = list(cfg.cases) if cfg.case == ALL else [_known(cfg.case, list(cfg.cases))]
    figures = {}
    for name in names:
        log.info("measuring %s", name)
        figures[name] = instantiate(cfg.cases[name], _convert_="all").run(cfg.quick)
        for figure, value in figures[name].items():
            log.info("  %-36s %.5g", figure, value)
    result = {"case": cfg.case, **(figures if cfg.case == ALL else figures[cfg.case])}
    result |= {"quick": cfg.quick, "machine": machine()}
    if cfg.output or cfg.record:
        _write(Path(cfg.output or Path("benchmarks") / f"{cfg.case}.json"), result)
    return result


def _known(name: str, cases: list[str]) -> str:
    if name in cases:
        return name
    close = difflib.get_close_matches(name, cases, n=1, cutoff=0.4)
    hint = f"the nearest is {close[0]}; " if close else ""
    raise ValueError(f"there is no case {name!r}: {hint}cases are {', '.join(cases)}, and {ALL} for each of them")


def _write(path: Path, result: dict[str, Any]) -> None:
    """The result with its date and the command that makes it again, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "keygrip.bench", *sys.argv[1:]])
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps({**result, "date": date, "command": command}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    log.info("written to %s", path)


def print_result(cfg: DictConfig) -> None:
    """Measures and prints the result as one line of JSON."""
    result = run(cfg)
    sys.stderr.flush()
    print(json.dumps(result))


def main() -> None:
    """Command line."""
    entry_point("bench", print_result)


if __name__ == "__main__":
    main()
