"""Worker processes of another Python environment, for simulators whose packages cannot be installed beside keygrip's.

A worker is a module of keygrip that calls `serve_jobs`. Jobs and reports are lines of JSON on its standard input and
output; what libraries print goes to standard error. The other environment needs keygrip itself (`pip install
--no-deps`) and the few packages that the worker imports, not torch.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def run_jobs(
    python: str | Path, module: str, setup: Report, jobs: Sequence[Report], processes: int, advice: str = ""
) -> Iterator[tuple[int, Report]]:
    """Spreads jobs over workers; yields (number of the job, report) as they come, several for a job if it sends them.

    Args:
        python: interpreter of the other environment. module: started with ``python -m``. setup: sent to each worker
            first. jobs: one line each. processes: workers. advice: what to do where the interpreter is missing.

    Raises:
        ValueError: no such interpreter, a worker died, or a worker refused its setup or a job.
    """
    file = Path(python)
    if not file.is_file() or not os.access(file, os.X_OK):
        raise ValueError(f"there is no Python interpreter at {python}. {advice}".strip())
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
    workers = [_start(file, module) for _ in range(min(processes, len(jobs)))]
    threads = [
        threading.Thread(target=_feed, args=(worker, setup, jobs, waiting, reports), daemon=True) for worker in workers
    ]
    try:
        for thread in threads:
            thread.start()
        left = len(jobs)
        while left:
            number, report = reports.get()
            if "error" in report:
                raise ValueError(str(report["error"]))
            if report.pop("done", False):
                left -= 1
            if report:
                yield number, report
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _start(python: Path, module: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}  # as many workers as cores
    command = [str(python), "-W", "ignore", "-m", module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _feed(
    worker: subprocess.Popen[str],
    setup: Report,
    jobs: Sequence[Report],
    waiting: queue.SimpleQueue[int],
    reports: queue.SimpleQueue[tuple[int, Report]],
) -> None:
    """One worker's conversation; its end is always a report."""
    number = -1
    try:
        _send(worker, setup)
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            _send(worker, jobs[number])
            while True:
                assert worker.stdout is not None
                line = worker.stdout.readline()
                if not line:
                    raise BrokenPipeError
                report = json.loads(line)
                finished = "error" in report or report.get("done", False)
                reports.put((number, report))
                if finished:
                    break
    except OSError:
        code = worker.wait()
        text = f"a worker process ended with exit code {code}: what it said stands above"
        reports.put((number, {"error": text}))
    except ValueError as error:
        reports.put((number, {"error": f"a worker sent what is no report: {error}"}))


def _send(worker: subprocess.Popen[str], content: Report) -> None:
    assert worker.stdin is not None
    worker.stdin.write(f"{json.dumps(content)}\n")
    worker.stdin.flush()


def serve_jobs(start: Callable[[Report], Callable[[Report], Iterator[Report]]]) -> None:
    """The worker's side: ``start(setup)`` gives the function that yields the reports of a job. Ends with its input.

    A ValueError or another error that names its cause becomes a report, and the worker ends.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print
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
        answers.write(f"{json.dumps({'error': str(error) or type(error).__name__})}\n")
    except KeyboardInterrupt:
        return
