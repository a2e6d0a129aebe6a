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
    """Build a small DiT. Zero layers are filled if ``stirred``: a network that starts as the identity hides its
    effects."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"width": 32, "depth": 3, "heads": 2, "patch_size": 2, "position_cells": 8}
    network = PatchDiT(CHANNELS, TEXT_DIM, DINO_DIM, **(options | changes))
    if stirred:
        stir(network)
    return network.eval()


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Fill parameters that are zero at the start with small random values, as training would."""
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
    """Return random conditions. Padding holds noise, which must not matter."""
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
    """Write image shards with a square and a wide bucket: noise in two colours with captions, encoded by small
    encoders."""
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


def write_flux(folder: Path) -> Path:
    """Write a folder like FLUX.1's, with a small random autoencoder, T5 encoder (states of 24) and tokenizer."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    config = T5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *["a", "red", "gold", "cube", "left", "right", "of", "the", "blue", "block", "near"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer_2")
    return folder
