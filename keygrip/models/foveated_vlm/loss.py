"""Cross-entropy of text tokens without the logits of all tokens in memory at once: in chunks, or by a fused kernel.

Legend: n predicted tokens, C language width, W vocabulary.
"""

from __future__ import annotations

from importlib import metadata
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kernel = Literal["chunked", "liger"]
KERNELS: tuple[str, ...] = get_args(Kernel)
OLDEST_LIGER = (0, 8, 2)  # in older versions the output layer's gradient is wrong where tokens have different weights


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and whether the most probable token is the right one.

    Logits are computed for `chunk` tokens at a time, and again in the backward pass: with a vocabulary of 49152 they
    would take more memory than the rest of the network.

    Args:
        hidden: [n, C], the states that predict. weight: [W, C], the output layer. targets: int64 [n].
        tokens: number of rows of W, from the first on, among which the most probable token is searched: the output
            layer may have more rows than the tokenizer has tokens, and generation never chooses the others. None: all.

    Returns:
        float32 [n] and bool [n].
    """
    losses, right = [], []
    for states, chunk_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if hidden.requires_grad and torch.is_grad_enabled() and len(hidden) > chunk:
            loss, hit = checkpoint(_chunk_loss, states, weight, chunk_targets, tokens, use_reentrant=False)
        else:
            loss, hit = _chunk_loss(states, weight, chunk_targets, tokens)
        losses.append(loss)
        right.append(hit)
    if not losses:
        return hidden.sum(-1).float(), torch.zeros(0, dtype=torch.bool, device=hidden.device)
    return torch.cat(losses), torch.cat(right)


def fused_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `token_cross_entropy` over all rows with the Triton kernel of the package liger-kernel: softmax, loss and
    gradient of the logits in one pass over each of its own chunks.

    The output layer may be tied to the embeddings, or frozen. It must not be sharded: under strategy=fsdp it is
    gathered within a step, since it belongs to the module's outermost part. Its gradients are summed in float32.

    Paper: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training (2024).
    """
    if not len(hidden):
        return token_cross_entropy(hidden, weight, targets)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    output = liger_fused_linear_cross_entropy(
        hidden, weight, targets, reduction="none", accum_dtype=torch.float32, return_predicted_tokens=True
    )
    return output.loss.float(), output.predicted_tokens == targets


def check_liger(device: torch.device) -> None:
    """Raise ValueError, with advice, if the fused kernel cannot be used on this machine."""
    if device.type != "cuda":
        raise ValueError(
            "model.loss_kernel=liger computes on a GPU and this run is on the CPU: choose model.loss_kernel=chunked, "
            "or strategy=gpu"
        )
    try:
        installed = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "model.loss_kernel=liger needs the package liger-kernel: pip install 'keygrip[liger]', or choose "
            "model.loss_kernel=chunked"
        ) from None
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < OLDEST_LIGER:
        raise ValueError(
            f"liger-kernel {installed} gives wrong gradients here: pip install 'liger-kernel>="
            f"{'.'.join(map(str, OLDEST_LIGER))}'"
        )


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach()[:, :tokens].argmax(-1) == targets
