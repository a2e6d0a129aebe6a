"""Layers of Qwen2.5-VL's vision tower that compute what those of transformers do, in fewer and faster operations.

Shape legend: N patches of all images, H width of the tower, P side of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """The vision tower's first layer as a matrix product, which a CPU computes faster than a convolution. It is the
    same because the kernels do not overlap."""

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PatchProjection:
        """Replace a convolution; the parameters are the same objects."""
        with torch.device("meta"):  # no second set of weights, and no random initialisation
            projection = cls(
                convolution.in_channels,
                convolution.out_channels,
                convolution.kernel_size,  # type: ignore[arg-type]  # a tuple of any length, to its annotation
                stride=convolution.stride,  # type: ignore[arg-type]
                bias=convolution.bias is not None,
            )
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection

    def forward(self, input: Tensor) -> Tensor:
        """``[N, H, 1, 1, 1]`` of patches ``[N, 3, frames, P, P]``."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


class BatchedAttention(nn.Module):
    """Attention of a block of the vision tower within windows of equal length, all in one call.

    transformers calls attention once per window, and reads the windows' lengths from the device in each layer.

    Args:
        attention: the layer that is replaced; its linear layers are the same objects and keep their names.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.train(attention.training)

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """Return ``[N, H]``, called as the layer that is replaced.

        Args:
            hidden_states: ``[N, H]``, the patches of a window next to each other.
            cu_seqlens: ``[windows + 1]`` limits of the windows; only the number is used.
            position_embeddings: cosines and sines ``[N, H / heads]``.
        """
        queries, keys, values = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        cos, sin = (part[:, None].float() for part in position_embeddings)
        parts = (_rotated(queries, cos, sin), _rotated(keys, cos, sin), values)
        windows = [part.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for part in parts]
        attended = F.scaled_dot_product_attention(*windows)  # [windows, heads, length, H / heads]
        return self.proj(attended.transpose(1, 2).reshape(hidden_states.shape))


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys ``[N, heads, d]`` rotated by their positions, computed in float32."""
    values = heads.float()
    first, second = values.chunk(2, dim=-1)
    return (values * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


def replace_layers(tower: Any, image_size: int) -> None:
    """Replace layers of a vision tower of transformers, in place, for square images of one size.

    Attention is replaced where all windows have the same length: in layers that attend to whole images, and in the
    others if windows divide an image. The tower then also accepts `grid_thw` on the CPU, whatever its own device: the
    limits of windows are computed from it without waiting for the device.

    Args:
        image_size: side of all images in pixels.

    Raises:
        ValueError: a window is smaller than a token.
    """
    tower.patch_embed.proj = PatchProjection.of(tower.patch_embed.proj)
    side = image_size // (tower.patch_size * tower.spatial_merge_size)
    window = tower.window_size // tower.spatial_merge_size // tower.patch_size  # in tokens, rounded as in transformers
    if window < 1:
        smallest = tower.patch_size * tower.spatial_merge_size
        raise ValueError(f"vlm.vision.window={tower.window_size} must be at least {smallest}, two patches.")
    equal = side <= window or side % window == 0
    for index, block in enumerate(tower.blocks):
        if equal or index in tower.fullatt_block_indexes:
            block.attn = BatchedAttention(block.attn)
    tower.rotary_pos_emb.register_forward_pre_hook(_move_inputs)


def _move_inputs(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move the positions, which transformers computes where the grid is, to the device of the module's frequencies."""
    device = module.inv_freq.device
    return tuple(each.to(device, non_blocking=True) if isinstance(each, Tensor) else each for each in inputs)
