"""Computation that autocast does not change."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of `like`, in which products have the types of their operands:
    for geometry and losses, which bf16 would round."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
