"""Drawn images with ground truth, small encoders, and image shards made with both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keygrip.data.image_text.bucket_folders import write_info
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.samples import PATCHES, describe_image_text
from keygrip.data.image_text.sources.encoding import as_tensor, encode_images, prepare_image
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.models.patch_dit.autoencoders import PixelPacking
from keygrip.models.patch_dit.dino_view import DinoView
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.text_encoders import RandomWordVectors

COLOURS = {"red": (220, 40, 40), "teal": (0, 130, 140)}
SQUARE, WIDE = Bucket(32, 32), Bucket(48, 32)


def small_encoders(dino_view: str = "grey", shape: str = "square", edge: int = 4) -> Encoders:
    view = DinoView("tiny", 48, "random", shape, width=16, depth=1, heads=2)
    return Encoders(PixelPacking(edge), RandomWordVectors(8, 8), view, dino_view)


def drawn(number: int, bucket: Bucket, scale: int = 2) -> tuple[Image.Image, dict[str, Any]]:
    """Draw a coloured square and a blue bar at places that depend on the number; return the image and its evidence."""
    rng = np.random.default_rng(number)
    width, height = bucket.width * scale, bucket.height * scale
    pixels = np.full((height, width, 3), 200 + rng.integers(0, 30), np.uint8)
    colour = list(COLOURS)[number % len(COLOURS)]
    edge, places = 5 * scale, {}
    for thing, rgb, size in (("block", (40, 60, 220), (2 * edge, edge)), ("cube", COLOURS[colour], (edge, edge))):
        x = int(rng.integers(1, width - size[0] - 1))
        y = int(rng.integers(1, height - size[1] - 1))
        pixels[y : y + size[1], x : x + size[0]] = rgb
        places[thing] = [(x + size[0] / 2) / width, (y + size[1] / 2) / height]
    return Image.fromarray(pixels), {**places, "colour": colour}


def write_images(
    root: Path,
    counts: Mapping[Bucket, int],
    encoders: Encoders,
    splits: Mapping[str, int] = {"train": 0, "val": 1000, "test": 2000},
    without_patches: tuple[int, ...] = (),
    evidence: bool = True,
    per_shard: int = 100,
    said: bool = True,
    keep_images: bool = False,
) -> Path:
    """Write shards of drawn images, with the given number of images per bucket in each split.

    Args:
        splits: number of the first image of each; {"": 0}: a set without splits. without_patches: numbers of the images
            without DINO patches. said: write images.json. keep_images: store pixels too.
    """
    for split, first in splits.items():
        for bucket, count in counts.items():
            folder = root / split / bucket.name
            for start in range(0, count, per_shard):
                with ShardWriter(folder / f"shard-{start // per_shard:06d}.tar") as writer:
                    for number in range(start, min(start + per_shard, count)):
                        picture, truth = drawn(first + number, bucket)
                        caption = f"a {truth['colour']} cube near the blue block"
                        more = {"evidence": truth} if evidence else {}
                        key = f"{split}-{bucket.name}-{first + number}"
                        ready = prepare_image(picture, caption, bucket, encoders, key, more)
                        views = as_tensor([ready.view])
                        encoded = encode_images(encoders, as_tensor([ready.pixels]), views, [caption])
                        kept = ready.pixels if keep_images else None
                        parts, row = encoded.sample(0, ready.record, trim_text=False, image=kept)
                        if first + number in without_patches:
                            parts = {name: content for name, content in parts.items() if name != PATCHES}
                            row = describe_image_text(parts)
                        writer.add(key, parts, row)
            write_manifest(folder, describe_image_text, progress=False)
    if said:
        write_info(root, {"fingerprint": encoders.fingerprint, "description": encoders.description})
    return root


def write_tiny_clip(folder: Path) -> tuple[Any, Any]:
    """Save a CLIP with random weights whose tokens are letters, in the hub's layout; return it and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size["projection_dim"] = 6
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(words)},
        vision_config={**size, "image_size": 28, "patch_size": 14},
        projection_dim=6,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(folder)
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    return clip, tokenizer
