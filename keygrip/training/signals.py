"""Exceptions for an orderly end of a command: a run or a sweep stopped by a signal, and a rejected sweep; and processes
that ignore the signals of a terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(BaseException):
    """A signal ended the run; the message states where it stopped and how to resume.

    Like KeyboardInterrupt it is not an ``Exception``, so that code which catches all errors and continues does not
    catch it, e.g. the control loop for errors of a policy or an arm's driver, and torch's `load_state_dict`.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


class SweepInterrupted(Interrupted):
    """A signal ended a job of a sweep and thereby the sweep. For an ``Exception`` Hydra would record one failed job and
    start the next."""


class SweepRefused(BaseException):
    """A sweep does not begin; the message states why. Not an ``Exception``, which Hydra turns into a warning."""


@contextlib.contextmanager
def ignore_terminal_signals() -> Iterator[None]:
    """Processes that are started in this context ignore SIGINT and SIGHUP, such as from a terminal."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
