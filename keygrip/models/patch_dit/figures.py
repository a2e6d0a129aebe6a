"""Samples as a grid: a row for each set of conditions, a column for each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST = 96  # pixels: smaller images are enlarged by whole factors
TITLE, FONT = 18, 12  # pixels: height of a title and of its letters; smaller letters lose the blanks between words


def image_grid(rows: Sequence[tuple[str, Tensor]]) -> np.ndarray:
    """``[H, W, 3]`` uint8: each row a title and images ``[N, 3, H, W]`` in 0..1, all of one size."""
    strips = []
    for title, images in rows:
        frames = as_bytes(images)
        scale = max(1, -(-SMALLEST // min(frames.shape[1:3])))
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
        framed = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strip = np.concatenate(list(framed), axis=1)
        head = Image.new("RGB", (strip.shape[1], TITLE), "white")
        visible_title = title[: strip.shape[1]]  # a letter is a pixel wide or more
        ImageDraw.Draw(head).text((2, 1), visible_title, fill="black", font=ImageFont.load_default(FONT))
        strips.append(np.concatenate([np.asarray(head), strip], axis=0))
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return np.concatenate(padded, axis=0)


def as_bytes(images: Tensor) -> np.ndarray:
    """``[N, H, W, 3]`` uint8 of images ``[N, 3, H, W]`` in 0..1."""
    scaled = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()
