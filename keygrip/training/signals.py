"""Exceptions of runs and sweeps that a signal ended, and of sweeps that do not begin."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """A signal ended the run in good order; the message says where it stopped and how to go on.

    OmegaConf makes exceptions that pass through it anew from their message alone: hence the number's default.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


RECEIVED: list[int] = []  # numbers of signals that ended this command


def unmasked(run: Callable[[Any], Any], cfg: Any) -> Any:
    """``run(cfg)``, whose `Interrupted` stays one where a library makes another error of it: torch's `load_state_dict`
    collects all exceptions as weights that do not fit."""
    try:
        return run(cfg)
    except Interrupted:
        raise
    except Exception as error:
        if not RECEIVED:
            raise
        raise Interrupted(f"stopped by {signal.Signals(RECEIVED[-1]).name}", RECEIVED[-1]) from error


class SweepRefused(BaseException):
    """A sweep does not begin; the message says why. Not an ``Exception``: Hydra makes a warning of a callback's."""


class SweepInterrupted(BaseException):
    """The same for a sweep. Not an ``Exception``: Hydra takes those for one failed job and starts the next."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
