"""A diffusion transformer of a few thousand parameters whose every part has an effect, and random conditions for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keygrip.patch_dit.context import Conditions
from keygrip.patch_dit.network import PatchDiT

TEXT_DIM, DINO_DIM, CHANNELS = 6, 10, 3


def small_dit(seed: int = 0, stirred: bool = True, **changes: Any) -> PatchDiT:
    """Zero layers are filled where ``stirred``: a network that starts as the identity hides what it would do."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "patch_size": 2, "position_cells": 8}
    network = PatchDiT(CHANNELS, TEXT_DIM, DINO_DIM, **(options | changes))
    if stirred:
        stir(network)
    return network.eval()


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Fills what starts at zero with small random numbers, as training would."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)


def conditions_of(
    batch: int = 2,
    lengths: tuple[int, ...] = (3, 5),
    text_length: int = 8,
    grid: tuple[int, int] = (3, 3),
    seed: int = 1,
) -> Conditions:
    """Padding holds noise, which must not matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(text_length) < torch.tensor(lengths)[:, None]
    patches = normal(batch, grid[0] * grid[1], DINO_DIM)
    return Conditions(normal(batch, text_length, TEXT_DIM), mask, normal(batch, DINO_DIM), patches, grid)


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)
