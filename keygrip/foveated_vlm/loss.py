"""Cross-entropy of text tokens without ever holding the logits of all of them.

Legend: n predicted tokens, C language width, W vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether its most probable token is the right one.

    Logits are computed for `chunk` tokens at a time, and again in the backward pass: with a vocabulary of 49152 they
    would take more memory than the rest of the network.

    Args:
        hidden: [n, C], the states that predict. weight: [W, C], the output layer. targets: int64 [n].

    Returns:
        float32 [n] and bool [n].
    """
    losses, right = [], []
    for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if hidden.requires_grad and torch.is_grad_enabled() and len(hidden) > chunk:
            loss, hit = checkpoint(_one_chunk, states, weight, wanted, use_reentrant=False)
        else:
            loss, hit = _one_chunk(states, weight, wanted)
        losses.append(loss)
        right.append(hit)
    if not losses:
        return hidden.sum(-1).float(), torch.zeros(0, dtype=torch.bool, device=hidden.device)
    return torch.cat(losses), torch.cat(right)


def _one_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
