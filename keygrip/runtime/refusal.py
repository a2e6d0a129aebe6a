"""Answers of the policy server that contain no plan."""

from __future__ import annotations


class Refusal(Exception):
    """An answer without a plan: an HTTP status, a message, and whether the client may retry soon."""

    def __init__(self, status: int, sentence: str, again: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.again = status, sentence, again
