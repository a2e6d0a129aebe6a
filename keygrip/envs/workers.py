"""Worker processes of another Python environment, for simulators whose packages are incompatible with keygrip's.

A worker is a module of keygrip that calls `serve_jobs`. Jobs and reports are lines of JSON on its standard input and
output; output that libraries print goes to standard error. The other environment needs keygrip itself (`pip install
--no-deps`) and the few packages that the worker imports, but not torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Report = dict[str, Any]
CLOSE_S = 20.0  # for a worker to close its simulator at the end of its input


def run_jobs(
    python: str | Path, module: str, setup: Report, jobs: Sequence[Report], processes: int, advice: str = ""
) -> Iterator[tuple[int, Report]]:
    """Distribute jobs over workers; yield (index of the job, report) as they arrive. A job may send several reports.

    If a worker dies before it has reported anything about its job, it is started again and the job is repeated once.

    Args:
        python: interpreter of the other environment. module: started with ``python -m``. setup: sent to each worker
            first. jobs: one line each. processes: number of workers, at least 1. advice: what to do if the interpreter
            is missing.

    Raises:
        ValueError: The interpreter does not exist, `processes` is below 1, or a worker refused its setup or a job, died
            twice at a job, or died after it had reported something about the job.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: at least 1 worker is needed")
    file = Path(python)
    if not file.is_file() or not os.access(file, os.X_OK):
        raise ValueError(f"there is no Python interpreter at {python}. {advice}".strip())
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
    workers = [_Worker(file, module, setup) for _ in range(min(processes, len(jobs)))]
    threads = [threading.Thread(target=worker.serve, args=(jobs, waiting, reports), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        unfinished = len(jobs)
        while unfinished:
            index, report = reports.get()
            if "error" in report:
                raise ValueError(str(report["error"]))
            if report.pop("done", False):
                unfinished -= 1
            if report:
                yield index, report
        for worker in workers:
            worker.finish()
    finally:
        for worker in workers:
            worker.close()


class _DeadError(Exception):
    """A worker process ended, or reported that it cannot continue; the message states the reason."""


class _Worker:
    """A process of the other environment and the communication with it, which uses one thread."""

    def __init__(self, python: Path, module: str, setup: Report) -> None:
        self._command = [str(python), "-W", "ignore", "-m", module]
        self._setup = setup
        self._lock = threading.Lock()  # protects a restart against a concurrent `close`
        self._closed = False
        self._patience_s = 0.0  # for the process to end by itself
        self._process: subprocess.Popen[str] | None = None

    def serve(
        self,
        jobs: Sequence[Report],
        waiting: queue.SimpleQueue[int],
        reports: queue.SimpleQueue[tuple[int, Report]],
    ) -> None:
        """Process jobs from `waiting` until it is empty, and put the process's reports into `reports`. The last report
        of a job is ``done`` or ``error``."""
        while not self._closed:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            died = ""
            for _ in range(2):
                received = 0
                try:
                    for report in self._run_job(jobs[index]):
                        received += 1
                        reports.put((index, report))
                    break
                except _DeadError as error:
                    died = f"{error}, {'twice ' if died else ''}at the job {json.dumps(jobs[index])[:300]}"
                    self._stop()
                    if received or self._closed:
                        reports.put((index, {"error": died}))
                        return
                    log.warning("%s", died)
            else:  # died a second time
                reports.put((index, {"error": died}))
                return

    def finish(self) -> None:
        """End the process's input, once all jobs are done: it closes its simulator and ends, which `close` awaits."""
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError):  # it has ended already
                    self._process.stdin.close()
                self._patience_s = CLOSE_S

    def close(self) -> None:
        """End the process; it is not started again."""
        with self._lock:
            self._closed = True
        self._stop()

    def _run_job(self, job: Report) -> Iterator[Report]:
        """Yield the process's reports about a job, up to its end.

        Raises:
            _DeadError: The process has ended, or ends because of an error that may not happen again.
        """
        process = None
        try:
            process = self._running()
            _send(process, job)
            while True:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise BrokenPipeError
                report = json.loads(line)
                if report.get("ends"):
                    raise _DeadError(f"a worker process ended: {report['ends']}")
                yield report
                if "error" in report or report.get("done", False):
                    return
        except OSError as error:
            process = process or self._process
            code = None if process is None else process.wait()
            text = f"a worker process ended with exit code {code} (what it said stands above)"
            raise _DeadError(text) from error
        except ValueError as error:
            yield {"error": f"a worker sent what is no report: {error}"}

    def _running(self) -> subprocess.Popen[str]:
        """Return the process; start and set it up if there is none."""
        with self._lock:
            if self._closed:
                raise BrokenPipeError
            if self._process is not None:
                return self._process
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}  # as many workers as cores
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, env=environment)
        _send(self._process, self._setup)
        return self._process

    def _stop(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._patience_s)
            process.terminate()  # without effect if it has ended
            process.wait()


def _send(worker: subprocess.Popen[str], content: Report) -> None:
    assert worker.stdin is not None
    worker.stdin.write(f"{json.dumps(content)}\n")
    worker.stdin.flush()


def serve_jobs(start: Callable[[Report], Callable[[Report], Iterator[Report]]]) -> None:
    """The worker's side: ``start(setup)`` returns the function that yields the reports of a job. Ends at the end of the
    input.

    A ValueError or another expected error becomes a report, and the worker ends: refusals as ``error``, errors that may
    not happen again (a simulator or a connection that failed) as ``ends``.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to standard output
    try:
        work = None
        for line in sys.stdin:
            content = json.loads(line)
            if work is None:
                work = start(content)
                continue
            for report in work(content):
                answers.write(f"{json.dumps(report)}\n")
            answers.write('{"done": true}\n')
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        kind = "error" if isinstance(error, ValueError | ImportError) else "ends"
        answers.write(f"{json.dumps({kind: str(error) or type(error).__name__})}\n")
    except KeyboardInterrupt:
        return
