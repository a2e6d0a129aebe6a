"""Qwen2 and Qwen2.5 language models: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import ClassVar

from keygrip.models.language.llama import LlamaSized
from keygrip.training.parts import model_part


@model_part(from_checkpoint={"weights": "random"})
class Qwen2(LlamaSized):
    """A Qwen2 without sliding windows (the published models do not use them either); see `LlamaSized`."""

    architecture = "Qwen2"
    own: ClassVar = {"use_sliding_window": False}
