"""Rows that are longer than the language model's context: which samples and conversations are left out for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.sample_types import Conversation


@dataclass(frozen=True)
class Context:
    """The positions of the language model's longest row.

    Args:
        positions: at most, visual and text tokens together. collator: says how many tokens images and texts take.
        max_frames: taken of a sample.
    """

    positions: int
    collator: MeasuringCollator
    max_frames: int

    def may_be_exceeded(self, frames: np.ndarray) -> bool:
        """Whether a row of samples with so many frames, int [n], might be too long, whatever its text is."""
        text = self.collator.max_tokens
        return text is None or bool((self.room(frames) < text).any())

    def room(self, frames: np.ndarray) -> np.ndarray:
        """Tokens of text for which samples with so many frames leave room, int [n] -> int [n]; below 0: for none."""
        return self.positions - self.collator.tokens_per_frame * np.minimum(frames, self.max_frames)

    def problem(self, conversation: Conversation, frames: int, seconds: Sequence[float] | None = None) -> str | None:
        """Why a conversation about so many frames is too long to be a row; None where it is not, or cannot be a row for
        another reason.

        Args:
            seconds: see `MeasuringCollator`.
        """
        tokens, each = self.collator.text_tokens(conversation, seconds), self.collator.tokens_per_frame
        if not tokens or frames * each + tokens <= self.positions:
            return None
        return (
            f"a row of it has {frames * each + tokens} positions ({frames} frames of {each} and {tokens} tokens of "
            f"text), more than the language model's context of {self.positions}; "
            f"{self.advice(frames > 0)}"
        )

    def advice(self, frames: bool = True) -> str:
        """What makes rows shorter.

        Args:
            frames: whether they are of samples with frames.
        """
        most = self.collator.max_tokens
        ways = [f"lower data.max_frames={self.max_frames}"] if frames else []
        ways.append("set collator.max_tokens" if most is None else f"lower collator.max_tokens={most}")
        return f"{' or '.join(ways)} (language.model.context can be raised where the weights are random)"
