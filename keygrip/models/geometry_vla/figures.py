"""Figure of a scene: planned and demonstrated path in each view, true and predicted depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from keygrip.data.batches import MultiViewPolicyBatch
from keygrip.models.geometry.cameras import project
from keygrip.models.geometry_vla.geometry import GeometryFeatures
from keygrip.models.geometry_vla.pointing import map_means, probabilities
from keygrip.training.figures import drawable, figure_to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_SHARES = torch.tensor([0.0, 0.75])  # quantiles of the known depths at the ends of the colour scale


def scene_figure(
    batch: MultiViewPolicyBatch,
    planned: Tensor | None,
    geometry: GeometryFeatures | None,
    sample: int = 0,
    pointing: Tensor | None = None,
) -> np.ndarray:
    """Draw one sample, one column per view: the image with both paths (if its camera is calibrated) and keyframes, and
    below it the depth maps, if any.

    Args:
        batch: with the demonstrated targets.
        planned: positions ``[B, A, T, 3]``; None: no paths, for models that learn no actions.
        geometry: the encoder's predictions. sample: index in the batch.
        pointing: logits ``[B, V, A, M, g, g]`` of `Pointing`; the keyframe's map is drawn.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    views = batch.images.shape[1]
    true = None if batch.depth is None else batch.depth[sample].float().cpu()
    guess = None if geometry is None or geometry.log_depth is None else geometry.log_depth[sample].float().exp().cpu()
    maps = [("depth, recorded (m)", true), ("depth, predicted (m)", guess)]
    depth_maps = [(title, depth_map) for title, depth_map in maps if depth_map is not None]
    figure = Figure(figsize=(3.2 * views, 3.3 * (1 + len(depth_maps))), layout="constrained")
    axes = figure.subplots(1 + len(depth_maps), views, squeeze=False)
    figure.suptitle(drawable(batch.instruction[sample]), fontsize=9, parse_math=False)
    valid = None if true is None else true[true > 0]
    for view in range(views):
        top: Axes = axes[0, view]
        top.imshow(batch.images[sample, view].permute(1, 2, 0).cpu().numpy())
        camera = batch.view_intrinsics[sample, view].float().cpu(), batch.view_world_to_camera[sample, view].float()
        placed = not torch.equal(camera[1].cpu(), torch.eye(4))  # else not calibrated, see `CameraTrack`
        paths = (
            [] if planned is None or not placed else [("shown", batch.position, "white"), ("planned", planned, "red")]
        )
        for label, path, colour in paths:
            pixels, _ = project(path[sample].float().cpu(), camera[0], camera[1].cpu())
            for arm, points in enumerate(pixels):
                top.plot(*points.T.numpy(), ".-", color=colour, markersize=4, linewidth=1, label=None if arm else label)
        size = batch.images.shape[-1]
        if pointing is not None and pointing.shape[3] > batch.position.shape[2]:
            pointed = probabilities(pointing[sample, view, :, -1]).cpu()
            true_pixels, _ = project(batch.keyframe[sample].float().cpu(), camera[0], camera[1].cpu())
            markers = [("keyframe", true_pixels, "white"), ("pointed at", size * map_means(pointed), "yellow")]
            for label, points, colour in markers:
                top.plot(*points.T.numpy(), "+", color=colour, markersize=9, label=label)
            top.imshow(pointed.amax(dim=0).numpy(), extent=(0, size, size, 0), cmap="inferno", alpha=0.35)
        top.set(title=batch.cameras[view] + ("" if placed else " (not calibrated)"), xlim=(0, size), ylim=(size, 0))
        for row, (title, depth) in enumerate(depth_maps, start=1):
            # The colour scale excludes the walls; with them the table would have a single colour.
            low, high = (None, None) if valid is None or not len(valid) else valid.quantile(SHOWN_SHARES).tolist()
            artist = axes[row, view].imshow(depth[view].numpy(), cmap="turbo", vmin=low, vmax=high)
            axes[row, view].set_title(title, fontsize=8)
            figure.colorbar(artist, ax=axes[row, view], shrink=0.7)
    if planned is not None:
        drawn_paths = axes[0, 0].get_legend_handles_labels()
        figure.legend(*drawn_paths, loc="outside lower center", ncols=4, fontsize=7, facecolor="0.65")  # shows white
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure_to_image(figure)
