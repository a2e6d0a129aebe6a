"""Exceptions that end a command in good order: a run or a sweep that a signal stopped, and a sweep that is refused."""

from __future__ import annotations

import signal


class Interrupted(BaseException):
    """A signal ended the run; the message says where it stopped and how to go on.

    Not an ``Exception``, like KeyboardInterrupt, so that code which catches any error and continues does not swallow
    it: the control loop with errors of a policy or an arm's driver, and torch's `load_state_dict`.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


class SweepInterrupted(Interrupted):
    """A signal ended a job of a sweep and with it the sweep. Hydra would take an ``Exception`` for one failed job and
    start the next."""


class SweepRefused(BaseException):
    """A sweep does not begin; the message says why. Not an ``Exception``: Hydra makes a warning of a callback's."""
