"""A diffusion transformer of a few thousand parameters whose every part has an effect, and random conditions for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from keygrip.config import compose
from keygrip.data.image_text.bucket_folders import write_info
from keygrip.data.image_text.samples import describe_image_text, image_text_parts
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.network import PatchDiT

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


SMALL = [
    "model=patch_dit",
    "data=image_shards",
    "encoders=tiny",
    "encoders.autoencoder.edge=4",
    "encoders.text.length=6",
    "encoders.text.width=8",
    "encoders.view.size=48",
    "encoders.view.width=16",
    "encoders.view.depth=1",
    "encoders.view.heads=2",
    "model.network.width=32",
    "model.network.depth=3",
    "model.network.heads=2",
    "model.sampling.steps=2",
    "model.shown=2",
    "optimizer.weight_decay=0.01",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "data.batch_size=4",
    "data.num_workers=0",
    "strategy=cpu",
    "strategy.precision=32-true",
    "logger=none",
    "log_every_n_steps=1",
    "limit_val_batches=1",
]


def write_images(root: Path, overrides: Sequence[str] = (), train: int = 10, val: int = 4) -> Path:
    """Image shards in a square and a wide bucket, of noise in two colours with a caption each, by small encoders."""
    config = compose("train", [*SMALL, *overrides])
    encoders = instantiate(config.encoders)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for width, height in ((16, 16), (24, 16)):
            folder = root / split / f"bucket_{width}x{height}"
            with ShardWriter(folder / "shard-000000.tar") as writer:
                for number in range(count):
                    picture = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
                    caption = f"a {('red', 'green')[number % 2]} thing {number}"
                    view = torch.nn.functional.interpolate(picture.float(), encoders.view_size(width, height)[::-1])
                    states, mask = encoders.encode_text([caption])
                    cls, patches = encoders.encode_view(view.to(torch.uint8))
                    record = {
                        "caption": caption,
                        "size": [width, height],
                        "crop": [0, 0, width, height],
                        "patch_grid": list(encoders.dino_grid(width, height)),
                    }
                    latent = encoders.encode_images(picture)
                    arrays = [part[0].numpy() for part in (latent, states, mask, cls, patches)]
                    writer.add(f"{split}_{width}_{number}", *image_text_parts(*arrays, record))
            write_manifest(folder, describe_image_text, progress=False)
    write_info(root, {"fingerprint": encoders.fingerprint, "description": encoders.description})
    return root
