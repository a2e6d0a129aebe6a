"""Exceptions of runs and sweeps that a signal ended, and of sweeps that do not begin."""

from __future__ import annotations

import signal


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
