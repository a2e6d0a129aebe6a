"""Run the parts of a suite, each in a separate process, and record the results.

The record of a part contains its figures, the commit, the machine, the time it took, and the command with all
arguments that change the part. The record of a part that failed also has an ``error``. A part that is already recorded
for the current commit and command is not measured again, unless it failed.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from keygrip.artifacts import write_json
from keygrip.benchmarks.gpu import Figures, Part
from keygrip.training.metadata import machine
from keygrip.training.signals import Interrupted

log = logging.getLogger(__name__)

PART_LIMIT_S = 480.0  # a part is killed after this; its own limits are lower


def refuse_without_gpu(toy: bool) -> None:
    """Raise ValueError if there is no GPU and `toy` is false."""
    if not toy and not torch.cuda.is_available():
        raise ValueError(
            "suite=gpu measures a GPU and this machine has none that torch can use (nvidia-smi shows what the driver "
            "sees); toy=true runs every part at toy size on the CPU"
        )


@dataclass(frozen=True)
class Suite:
    """Runs parts and keeps their records in a folder.

    Args:
        folder: folder of the records, one file per part.
        commit: revision that the records belong to; None: unknown, then no part is skipped.
        toy: whether parts run at toy size. arguments: of the command; those that change a part are written to its
            record.
        limit_s: seconds after which the process of a part is interrupted. grace_s: further seconds after which it is
            killed.
    """

    folder: Path
    commit: str | None
    toy: bool
    arguments: tuple[str, ...] = ()
    limit_s: float = PART_LIMIT_S
    grace_s: float = 15.0

    def run(
        self, names: Sequence[str], command: Callable[[str], Sequence[str]], minutes: float | None = None
    ) -> dict[str, Any]:
        """Measure the parts that are not recorded yet; return the records by part.

        Args:
            names: parts. command: returns the command that measures a part in a new process by calling `measure`.
            minutes: after this time no further part is started.
        """
        records: dict[str, Any] = {}
        started = time.monotonic()
        for number, name in enumerate(names, start=1):
            if minutes is not None and time.monotonic() - started >= 60 * minutes:
                log.warning("minutes=%g are over, not begun: %s", minutes, ", ".join(names[number - 1 :]))
                break
            if (recorded := self.kept(name)) is not None:
                log.info("%s is recorded for this commit in %s", name, self.file(name))
                records[name] = recorded
                continue
            log.info("part %d of %d: %s", number, len(names), name)
            # If the process died, an old record would be mistaken for the record of this run.
            self.file(name).unlink(missing_ok=True)
            ending = self._process(command(name))
            if not self.file(name).is_file():
                self._write(name, {}, 0.0, ending or "its process ended without a record")
            elif ending and "error" not in (record := self._read(name)):
                self._write(name, record["figures"], record["wall_s"], ending)
            records[name] = self._read(name)
            if "error" in records[name]:
                log.warning("%s failed: %s", name, records[name]["error"])
        return records

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return the record of the same commit, machine and command if there is one without an error, else None."""
        if self.commit is None or self.commit.endswith("+changes") or not self.file(name).is_file():
            return None
        record = self._read(name)
        expected = (self.commit, self.toy, machine(), self._command(name))
        is_same = tuple(record.get(key) for key in ("commit", "toy", "machine", "command")) == expected
        return record if is_same and "error" not in record else None

    def measure(self, name: str, part: Part) -> dict[str, Any]:
        """Run a part in this process and write its record, also if the part fails or is interrupted."""
        figures: Figures = {}
        started, error = time.perf_counter(), None
        try:
            part.run(self.toy, figures)
        except (Exception, KeyboardInterrupt, Interrupted) as failure:  # a part's failure is a result: the others go on
            log.debug("the part failed", exc_info=True)
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:600]}"
        self._write(name, figures, time.perf_counter() - started, error)
        for figure, value in figures.items():
            log.info("  %-44s %.5g", figure, value)
        return self._read(name)

    def file(self, name: str) -> Path:
        """Return the path of the record of a part."""
        return self.folder / f"{name}.json"

    def _process(self, command: Sequence[str]) -> str | None:
        """Run the process of a part; at the time limit interrupt it, then kill it with its children. Return why it
        failed, or None if it succeeded."""
        process = subprocess.Popen(command, stdout=sys.stderr.fileno(), start_new_session=True)
        try:
            code = process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {self.limit_s:g} s"
        finally:
            if process.poll() is None:  # timed out, or this process was interrupted
                process.send_signal(signal.SIGINT)  # so that it records the figures it has
                try:
                    process.wait(self.grace_s)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return None if code == 0 else f"its process ended with exit code {code}"

    def _write(self, name: str, figures: Mapping[str, float], wall_s: float, error: str | None) -> None:
        record = {
            "part": name,
            "figures": dict(figures),
            **({} if error is None else {"error": error}),
            "commit": self.commit,
            "toy": self.toy,
            "machine": machine(),
            "wall_s": round(wall_s, 1),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": self._command(name),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file(name), record)

    def _command(self, name: str) -> str:
        changes = [given for given in self.arguments if given.lstrip("+~").startswith(f"gpu.{name}.")]
        toy = ["toy=true"] if self.toy else []
        return shlex.join(["python", "-m", "keygrip.bench", "suite=gpu", f"part={name}", *toy, *changes])

    def _read(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
        return record
