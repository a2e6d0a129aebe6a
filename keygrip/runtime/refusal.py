"""Answers of the policy server that are no plan."""

from __future__ import annotations


class Refusal(Exception):
    """An answer without a plan: a status of HTTP, a sentence, and whether to ask again soon."""

    def __init__(self, status: int, sentence: str, again: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.again = status, sentence, again
