"""Control an arm with a policy: ``python -m keygrip.run robot=sim_yam checkpoint=RUN_FOLDER``.

Limits and watchdog are on. Prints one line of JSON on standard output at the end, also if the watchdog stopped the arm;
the exit code is then 1. Ctrl-C, SIGTERM and closing the terminal also stop the arm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig

from keygrip.artifacts import json_text
from keygrip.command import entry_point
from keygrip.config import EntrySchema, register
from keygrip.runtime.refusal import StoppedError


@dataclass
class RunSchema(EntrySchema):
    """Root of ``conf/run.yaml``."""

    checkpoint: str | None = None
    seed: int = 0
    checkpoint_step: int | None = None
    server: str | None = None
    token: str | None = None
    ca: str | None = None
    trust: Any = ()
    external: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    tf32: bool = False
    policy: dict[str, Any] = field(default_factory=dict)
    robot: Any = MISSING
    limits: Any = None
    execution: Any = MISSING
    watchdog: Any = MISSING
    bounds: Any = MISSING
    takeover: Any = None
    record: str | None = None
    seconds: float = 60.0
    dry_run: str | None = None


register("run_schema", RunSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run with the settings of ``cfg`` and return the values of the report; see `keygrip.inference.driving.drive`."""
    from keygrip.inference.driving import drive  # torch takes seconds to import, and --help does not need it

    return drive(cfg)


def print_report(cfg: DictConfig) -> None:
    """Run and print the values of the report as one line of JSON, also those of a run that the watchdog stopped."""
    try:
        report = run(cfg)
    except StoppedError as error:
        print(json_text(error.report, ascii_only=True), flush=True)
        raise
    print(json_text(report, ascii_only=True), flush=True)


def main() -> None:
    """Command line."""
    entry_point("run", print_report)


if __name__ == "__main__":
    main()
