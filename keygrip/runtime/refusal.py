"""Refusals of the policy server and of the watchdog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """An answer without a plan: an HTTP status, a message, and whether the client may retry soon."""

    def __init__(self, status: int, sentence: str, again: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.again = status, sentence, again


class StoppedError(ValueError):
    """The watchdog stopped the arm; the message gives the reason. This is an error of the run, not of the program.

    Attributes:
        report: figures of the run.
    """

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = dict(report)
