"""Where queries attend: maps over the patches of every frame, and the share that falls on the thing asked about."""

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
    """The frame that a row's evidence speaks of."""
    return int(batch.texts[row].evidence["frame"])


def patch_maps(network: FoveatedVLM, output: VLMOutput, rows: TextRows, blocks: Blocks = "last") -> Tensor:
    """Attention on the patches as images [S, F, h, w], a mean over heads.

    Args:
        blocks: `last`, from which the embedding comes; or `all` but the first, where queries know only the question.
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
    """Attention on the thing asked about, relative to uniform, with the question's kind: for each row whose evidence
    says where the thing is, in the frame that it is asked about; `blocks` as in `patch_maps`."""
    asked = [n for n, text in enumerate(batch.texts) if {"frame", "pixel", "pixels_seen"} <= text.evidence.keys()]
    asked = [n for n in asked if target_frame(batch, n) < rows.frame_counts[rows.videos[n]]]
    if not asked or not isinstance(network, FoveatedVLM):
        return []
    maps = patch_maps(network, output, rows, blocks)  # [S, F, h, w]
    streams = rows.streams.of_row.tolist()
    found = []
    for n in asked:
        evidence = batch.texts[n].evidence
        x, y = evidence["pixel"]
        where = attention_on_target(
            maps[streams[n], target_frame(batch, n)].cpu(),
            (float(x), float(y)),
            float(evidence["pixels_seen"]),
            batch.frames.shape[-1],
        )
        found.append((batch.kind[n], where))
    return found


def attention_on_target(patches: Tensor, pixel: tuple[float, float], area: float, image_size: int) -> float:
    """Attention on a thing relative to uniform attention.

    Args:
        patches: [h, w] attention on the patches, any scale. pixel: (x, y) of the thing's centre, corner convention.
        area: pixels of the thing that are seen; a square of that area stands for it.

    Returns:
        the share of the attention on patches that the square touches by a quarter or more (at least the one under its
        centre), over the share of these patches among all.
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
