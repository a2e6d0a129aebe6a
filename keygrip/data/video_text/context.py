"""Find rows that are longer than the language model's context; their samples or conversations are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keygrip.data.video_text.batching import MeasuringCollator
from keygrip.data.video_text.sample_types import Conversation


@dataclass(frozen=True)
class Context:
    """The context length of the language model.

    Args:
        positions: largest number of positions, visual and text tokens together. collator: computes the tokens of images
            and texts. max_frames: largest number of frames used from a sample.
    """

    positions: int
    collator: MeasuringCollator
    max_frames: int

    def may_be_exceeded(self, frames: np.ndarray) -> bool:
        """Whether a row of samples with these numbers of frames, int [n], might be too long, for the longest text."""
        text = self.collator.max_tokens
        return text is None or bool((self.room(frames) < text).any())

    def room(self, frames: np.ndarray) -> np.ndarray:
        """Return how many text tokens fit besides these numbers of frames, int [n] -> int [n]; 0 or less: none."""
        return self.positions - self.collator.tokens_per_frame * np.minimum(frames, self.max_frames)

    def problem(self, conversation: Conversation, frames: int, seconds: Sequence[float] | None = None) -> str | None:
        """Return why a conversation about `frames` frames is too long to be a row; None if it is not too long or cannot
        be a row for another reason.

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
        """Return advice on how to make rows shorter.

        Args:
            frames: whether the rows belong to samples with frames.
        """
        most = self.collator.max_tokens
        ways = [f"lower data.max_frames={self.max_frames}"] if frames else []
        ways.append("set collator.max_tokens" if most is None else f"lower collator.max_tokens={most}")
        return f"{' or '.join(ways)} (language.model.context can be raised where the weights are random)"
