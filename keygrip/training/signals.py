"""How a signal travels through a run."""

from __future__ import annotations


class Interrupted(Exception):
    """A signal ended the run in good order; the message says where it stopped and how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class SweepInterrupted(BaseException):
    """The same for a sweep. Not an ``Exception``: Hydra takes those for one failed job and starts the next."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
