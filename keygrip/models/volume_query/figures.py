"""Figure of a prediction: heatmap, trajectories, height profile, gripper and rotation strips."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from keygrip.models.volume_query.targets import StepTargets
from keygrip.models.volume_query.volume import VolumeLogits, argmax_voxel


def prediction_figure(
    image: Tensor,
    volume: VolumeLogits,
    gripper: Tensor,
    rotation: Tensor,
    targets: StepTargets,
    rotation_target: Tensor,
    heights: Tensor,
    *,
    sample: int,
    arm: int,
) -> Figure:
    """Draw one sample's prediction together with its target, as a matplotlib figure.

    Args:
        image: ``[3, S, S]`` in 0 .. 1. volume: leading shape ``[B, A, T]``. gripper: ``[B, A, T, G]`` logits.
        rotation: ``[B, A, T, R]`` logits. rotation_target: ``[B, T]`` classes of this arm. heights: ``[Z]`` metres.
    """
    side = image.shape[-1]
    cells, _bins = argmax_voxel(volume)
    heatmaps = volume.pixel_marginal()[sample, arm].flatten(1).softmax(-1).view(volume.pixel.shape[2:]).float().cpu()
    predicted = (cells[sample, arm].flip(-1).float().cpu() + 0.5) * side / heatmaps.shape[-1]
    true = targets.pixels[sample, arm].float().cpu()
    valid = targets.valid[sample, arm].cpu()
    start = targets.start_pixels[sample, arm].float().cpu()
    pixels = image.permute(1, 2, 0).float().cpu().numpy()

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["heat", "paths", "height"], ["heat", "paths", "grip"], ["heat", "paths", "turn"]], width_ratios=[1, 1, 0.9]
    )
    heat, paths = axes["heat"], axes["paths"]
    for axis in (heat, paths):
        axis.imshow(pixels, extent=(0, side, side, 0))
    _draw_heatmap(heat, heatmaps, start, side)
    scatter = _draw_paths(paths, predicted, true, valid)
    figure.colorbar(scatter, ax=[heat, paths], label="step", location="bottom", shrink=0.5, aspect=40)
    for axis in (heat, paths):
        axis.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])

    cell_heights = volume.height_given_pixel(cells)[sample, arm].softmax(-1).float().cpu()  # [T, Z]
    _draw_distribution(
        axes["height"], cell_heights, targets.heights[sample, arm].cpu(), "height (cm)", heights.cpu() * 100
    )
    opening = (torch.arange(gripper.shape[-1]) + 0.5) / gripper.shape[-1]
    _draw_distribution(
        axes["grip"],
        gripper[sample, arm].softmax(-1).float().cpu(),
        targets.gripper[sample, arm].cpu(),
        "opening",
        opening,
    )
    classes = torch.arange(rotation.shape[-1]).float()
    _draw_distribution(
        axes["turn"],
        rotation[sample, arm].softmax(-1).float().cpu(),
        rotation_target[sample].cpu(),
        "rotation class",
        classes,
    )
    axes["turn"].set_xlabel("step (circles: target)")
    return figure


def _draw_heatmap(axis, heatmaps: Tensor, start: Tensor, side: int) -> None:  # type: ignore[no-untyped-def]
    """Draw pixel probabilities per step ``[T, P, P]`` over the image, and the start pixel ``[2]``."""
    # Maximum over steps at each pixel: a sum over steps would hide sharp heatmaps behind broad ones.
    strength = (heatmaps / heatmaps.amax((1, 2), keepdim=True)).amax(0).numpy()
    axis.imshow(
        strength, cmap="inferno", alpha=0.9 * np.sqrt(strength), extent=(0, side, side, 0), interpolation="bilinear"
    )
    axis.plot(*start.tolist(), marker="+", color="white", markersize=12)
    axis.set_title("heatmap (+ gripper now)")


def _draw_paths(axis, predicted: Tensor, true: Tensor, valid: Tensor):  # type: ignore[no-untyped-def]
    """Draw predicted pixels and those true pixels that are ``valid`` ``[T]``, both ``[T, 2]``.

    Return the points coloured by step, for a colour bar.
    """
    times = np.arange(1, len(predicted) + 1)
    axis.plot(true[valid, 0], true[valid, 1], color="white", linewidth=0.8, alpha=0.7)
    axis.plot(predicted[:, 0], predicted[:, 1], color="black", linewidth=0.8, alpha=0.7)
    axis.scatter(
        true[valid, 0], true[valid, 1], c=times[valid.numpy()], cmap="viridis", marker="o", s=48, edgecolors="white"
    )
    axis.set_title("predicted (x) and true (o)")
    return axis.scatter(predicted[:, 0], predicted[:, 1], c=times, cmap="viridis", marker="X", s=60, edgecolors="black")


def _draw_distribution(axis, probability: Tensor, target: Tensor, label: str, values: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Draw probabilities ``[T, C]`` as columns over time, and the target bins ``[T]`` as circles."""
    steps, _bins = probability.shape
    spread = float(values[1] - values[0]) / 2
    extent = (0.5, steps + 0.5, float(values[0]) - spread, float(values[-1]) + spread)
    axis.imshow(
        probability.T.numpy(), origin="lower", aspect="auto", cmap="magma", extent=extent, interpolation="nearest"
    )
    axis.plot(
        np.arange(1, steps + 1), values[target], "o", markerfacecolor="none", markeredgecolor="white", markersize=5
    )
    axis.set_ylabel(label)
