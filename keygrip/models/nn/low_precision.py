"""Weights of a frozen network in fewer bits, for inference: bfloat16, or int8 for linear layers.

Shape legend: I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.nn.lora import merge

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
LARGEST = 127  # largest absolute int8 value used


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with a scale per output; products are computed in the precision of the
    input, with the weights dequantised layer by layer (Dettmers et al., "LLM.int8()", 2022, without its treatment of
    outliers).

    Args:
        layer: its weights ``[O, I]`` are rounded to 255 levels, scaled by the largest value of a row; its bias is not
            changed.
    """

    weight_int8: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST  # [O, 1]
        self.register_buffer("weight_int8", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight_int8 * self.scale).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


@torch.no_grad()
def lower_precision(network: nn.Module, precision: Precision) -> None:
    """Round a network's weights in place; it cannot be trained afterwards. Buffers (rotary frequencies) stay in
    float32, because rounding would shift positions.

    Args:
        precision: ``bfloat16``: all parameters; ``int8``: the weights of linear layers, with the others in bfloat16.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "float32":
        return
    merge(network)  # LoRA's differences are rounded together with the weights
    if precision == "int8":
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.bfloat16)
