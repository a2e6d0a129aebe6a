"""What a step of training takes of a device's memory: measured on a GPU, counted elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.models.patch_dit.network import PatchDiT

MB = 2**20


def memory_of_a_step(network: PatchDiT, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """The loss, and memory in MB of one step in bf16 with float32 weights under AdamW and EMA.

    Args:
        loss: of one batch, with gradients.

    Returns:
        ``loss``; ``weights_mb`` (weights, gradients, two moments and EMA: 20 bytes a trained number, 8 a frozen one);
        ``activations_mb``, what forward keeps for backward (with gradient checkpointing the blocks' inputs and one
        block's own); ``step_mb``, their sum; and on a GPU ``peak_mb``, measured with weights and gradients alone.
    """
    device = next(network.parameters()).device
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}
    blocks: list[int] = []  # bytes kept by each block
    inputs: list[int] = []
    handles = []

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].nbytes)
        blocks.append(-sum(kept.values()))

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        blocks[-1] += sum(kept.values())

    for block in network.blocks:
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    training, checkpointing = network.training, network.gradient_checkpointing
    network.train()
    network.gradient_checkpointing = False
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            value = loss()
        activations = sum(kept.values())
        if checkpointing:
            activations += sum(inputs) + max(blocks) - sum(blocks)
        found: dict[str, Any] = {"loss": round(float(value.detach()), 5)}
        del value
        if device.type == "cuda":
            network.gradient_checkpointing = checkpointing
            torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss().backward()
            found["peak_mb"] = round(torch.cuda.max_memory_allocated(device) / MB, 1)
            network.zero_grad(set_to_none=True)
    finally:
        network.gradient_checkpointing = checkpointing
        network.train(training)
        for handle in handles:
            handle.remove()
    weights = 20 * trained + 8 * frozen
    found |= {"weights_mb": round(weights / MB, 1), "activations_mb": round(activations / MB, 1)}
    return found | {"step_mb": round((weights + activations) / MB, 1), "gradient_checkpointing": checkpointing}
