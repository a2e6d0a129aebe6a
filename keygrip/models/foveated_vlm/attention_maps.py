"""Attention of queries: maps over the patches of every frame, and the share on the object that is asked about."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.foveated_vlm.video_language import VideoLanguageNetwork, VLMOutput

Blocks = Literal["last", "all"]


def target_frame(batch: VideoTextBatch, row: int) -> int:
    """Return the number of the frame in a row's metadata (`evidence`)."""
    return int(batch.texts[row].evidence["frame"])


def patch_maps(network: FoveatedVLM, output: VLMOutput, rows: TextRows, blocks: Blocks = "last") -> Tensor:
    """Return the attention on the patches as images [S, F, h, w], averaged over heads.

    Args:
        blocks: `last`, which gives the embedding; or `all`, the mean over all blocks except the first, where queries
            depend only on the question.
    """
    assert output.passes is not None
    attention = network.attention(output.passes, rows.streams)  # [S, F, blocks, H, R + N]
    if blocks == "last" or attention.shape[2] == 1:
        attention = attention[:, :, -1:]
    else:
        attention = attention[:, :, 1:]
    patches = attention.mean((2, 3))[..., network.backbone.num_prefix_tokens :]
    side = round(patches.shape[-1] ** 0.5)
    return patches.unflatten(-1, (side, side))


def attention_on_targets(
    network: VideoLanguageNetwork, output: VLMOutput, rows: TextRows, batch: VideoTextBatch, blocks: Blocks = "last"
) -> list[tuple[str, float]]:
    """Return (kind of the question, attention on the object asked about relative to uniform attention) for each row
    whose metadata (`evidence`) gives the object's frame and position; `blocks` as in `patch_maps`."""
    target_rows = [n for n, text in enumerate(batch.texts) if {"frame", "pixel", "pixels_seen"} <= text.evidence.keys()]
    target_rows = [n for n in target_rows if target_frame(batch, n) < rows.frame_counts[rows.videos[n]]]
    if not target_rows or not isinstance(network, FoveatedVLM):
        return []
    maps = patch_maps(network, output, rows, blocks)  # [S, F, h, w]
    streams = rows.streams.of_row.tolist()
    results = []
    for n in target_rows:
        evidence = batch.texts[n].evidence
        x, y = evidence["pixel"]
        attention = attention_on_target(
            maps[streams[n], target_frame(batch, n)].cpu(),
            (float(x), float(y)),
            float(evidence["pixels_seen"]),
            batch.frames.shape[-1],
        )
        results.append((batch.kind[n], attention))
    return results


def attention_on_target(patches: Tensor, pixel: tuple[float, float], area: float, image_size: int) -> float:
    """Return the attention on an object relative to uniform attention.

    Args:
        patches: [h, w] attention on the patches, any scale. pixel: (x, y) of the object's centre, corner convention.
        area: visible pixels of the object; a square of that area represents it.

    Returns:
        the share of the attention on patches that the square covers by a quarter or more (at least the patch under its
        centre), divided by the share of these patches among all patches.
    """
    height, width = patches.shape
    side = math.sqrt(max(area, 1.0))
    cover = []
    for centre, count in ((pixel[1], height), (pixel[0], width)):
        cell = image_size / count
        edges = torch.arange(count) * cell
        overlap = (
            torch.minimum(edges + cell, torch.tensor(centre + side / 2)) - edges.clamp_min(centre - side / 2)
        ).clamp_min(0)
        cover.append(overlap / cell)
    touched = cover[0][:, None] * cover[1][None] >= 0.25
    row, column = (min(int(c / image_size * n), n - 1) for c, n in ((pixel[1], height), (pixel[0], width)))
    touched[row, column] = True
    share = float(patches[touched.to(patches.device)].sum() / patches.sum().clamp_min(1e-12))
    return share / (float(touched.sum()) / touched.numel())
