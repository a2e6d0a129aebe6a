"""Parts of a network that autocast leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """A context in which products have the types of their operands, on the device of `like`, also under autocast: for
    geometry and losses, which bf16 would round."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
