"""Prepare data: ``python -m keygrip.prepare step=record|import|doctor|...``; prints its counts as one line of JSON."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from keygrip.artifacts import json_text, refuse_file
from keygrip.command import entry_point
from keygrip.setting_types import refuse_ill_typed


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the chosen step and return its report. Raises ValueError if its `root` or `to` is a file."""
    call_settings: Any = OmegaConf.to_container(cfg.call, resolve=False)
    passed_on = {
        f"call.{key}": value[2:-1] for key, value in call_settings.items() if re.fullmatch(r"\$\{[\w.]+\}", str(value))
    }
    refuse_ill_typed(OmegaConf.to_container(cfg.call, resolve=True), "call", passed_on)
    for setting in ("root", "to"):
        if isinstance(folder := cfg.get(setting), str):
            refuse_file(folder, setting)
    report = instantiate(cfg.call, _convert_="all")
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) and not isinstance(report, type) else report


def print_report(cfg: DictConfig) -> None:
    """Run the step and print its report.

    Raises:
        ValueError: the step found errors in the data.
    """
    report = run(cfg)
    print(json_text(report, ascii_only=True, default=str), flush=True)
    if report.get("errors"):
        problems_file = report.get("problems_file")
        listed = f"all listed in {problems_file}" if problems_file else "the first listed above"
        raise ValueError(f"{report['errors']} errors in {report.get('root')}, {listed}: fix them before training")


def main() -> None:
    """Command line."""
    entry_point("prepare", print_report)


if __name__ == "__main__":
    main()
