"""Exceptions of runs and sweeps that a signal ended, and of sweeps that do not begin; a SLURM job is queued again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess

log = logging.getLogger(__name__)


class Interrupted(BaseException):
    """A signal ended the run in good order; the message says where it stopped and how to go on.

    Not an ``Exception``, as KeyboardInterrupt is none: what catches whatever goes wrong would take it for that and go
    on, as the control loop does with what a policy or an arm's driver raises, and torch's `load_state_dict`.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


class SweepRefused(BaseException):
    """A sweep does not begin; the message says why. Not an ``Exception``: Hydra makes a warning of a callback's."""


class SweepInterrupted(BaseException):
    """The same for a sweep. Not an ``Exception``: Hydra takes those for one failed job and starts the next."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def queue_again() -> None:
    """Asks SLURM to queue this job again, if it is one of its."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        failure = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except OSError as error:
        failure = str(error)
    if failure:
        log.warning("SLURM did not queue job %s again: %s", job, failure)
    else:
        log.info("SLURM queues job %s again", job)
