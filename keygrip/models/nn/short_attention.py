"""Which of torch's attention kernels short rows are computed with."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 256  # positions; at 257 the fused kernel is faster again


def short_attention(device: torch.device, positions: int) -> contextlib.AbstractContextManager[None]:
    """On a processor, and for rows of at most SHORT positions, plain attention: torch's fused kernel takes three times
    as long in its backward pass there, half of a training step. Elsewhere nothing."""
    if device.type == "cpu" and positions <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint: activations are recomputed by the kernel of the forward pass.

    The backward pass runs outside `short_attention`; with another kernel there the recomputed tensors would not be
    those that were saved, which torch refuses.
    """
    plain = not torch.backends.cuda.flash_sdp_enabled()
    return contextlib.nullcontext(), sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
