"""A categorical distribution over pixel x height voxels, computed without materialising the volume.

The logit of voxel (z, y, x) is a sum: a term in (y, x), a term in z and a term that is constant over the volume. The
joint softmax over Z * H * W voxels then factorises exactly into a softmax over pixels and one over heights, so that

    CE(z, y, x) = CE(y, x) + CE(z),

the constant cancels, and loss, gradient, argmax and sampling cost O(HW + Z) per step instead of O(ZHW).

An optional term depends on pixel and height together (`VoxelScores`): the bilinear coupling
``sum_r pixel_factor[r, y, x] * height_factor[r, z]``, or the scores of further cameras
(:mod:`keygrip.models.volume_query.world`). It does not factorise, but sums over the volume are streamed over z with
O(HW) memory.

Shape legend: ``*`` leading shape (batch, arms, steps), H rows, W columns, Z height bins, C target cells, K target
heights, R rank of the coupling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from keygrip.models.nn.image_sampling import bilinear_cells, gather_pixels, two_hot
from keygrip.models.nn.precision import without_autocast


@dataclass(frozen=True)
class VolumeTarget:
    """Target distribution: voxels whose weights are products of pixel weights and height weights.

    Attributes:
        cells: ``[*, C, 2]`` int64 (row, column) and cell_weights: ``[*, C]`` that sum to one.
        heights: ``[*, K]`` int64 and height_weights: ``[*, K]`` that sum to one.
    """

    cells: Tensor
    cell_weights: Tensor
    heights: Tensor
    height_weights: Tensor


@dataclass(frozen=True)
class StepPlaces:
    """Decoded place of each step in the volume.

    Attributes:
        grid: ``[*, 2]`` (x, y) in cells and height: ``[*]`` in bins, both fractional, corner convention.
    """

    grid: Tensor
    height: Tensor


class VoxelScores(ABC):
    """The part of the logits that depends on pixel and height together, for every step."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``change`` to every tensor."""

    @classmethod
    @abstractmethod
    def stack(cls, scores: Sequence[Self]) -> Self:
        """Stack scores ``[B, T, ...]`` of A arms: ``[B, A, T, ...]``; tensors without steps come from the first arm."""

    @abstractmethod
    def slice(self, z: int) -> Tensor:
        """Scores ``[*, H, W]`` of the voxels of one height bin."""

    @abstractmethod
    def dense(self, bins: int) -> Tensor:
        """Scores ``[*, Z, H, W]`` of all voxels."""

    @abstractmethod
    def at(self, cells: Tensor) -> Tensor:
        """Scores ``[*, Z]`` of the voxels over one cell per step, ``[*, 2]`` (row, column)."""

    @abstractmethod
    def expectation(self, target: VolumeTarget) -> Tensor:
        """The mean score ``[*]`` over a target's voxels, by the target's weights."""

    @abstractmethod
    def log_normaliser(self, pixel: Tensor, height: Tensor) -> Tensor:
        """``[*]``: log of the sum over all voxels of exp(pixel + height + score), in O(HW) memory.

        Args:
            pixel: ``[*, H, W]``. height: ``[*, Z]``.
        """


@dataclass(frozen=True)
class BilinearCoupling(VoxelScores):
    """``sum_r pixel_factor[r, y, x] * height_factor[r, z]``.

    It is computed in float32 under autocast too: the normaliser and its gradient must use the same logits.

    Attributes:
        pixel_factor: ``[*, R, H, W]``. height_factor: ``[R, Z]``.
    """

    pixel_factor: Tensor
    height_factor: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> BilinearCoupling:
        return BilinearCoupling(change(self.pixel_factor), change(self.height_factor))

    @classmethod
    def stack(cls, scores: Sequence[BilinearCoupling]) -> BilinearCoupling:
        return cls(torch.stack([each.pixel_factor for each in scores], dim=1), scores[0].height_factor)

    def slice(self, z: int) -> Tensor:
        return _couple_at_height(self.pixel_factor, self.height_factor[:, z])

    def dense(self, bins: int) -> Tensor:
        with without_autocast(self.pixel_factor):
            return torch.einsum("...rhw,rz->...zhw", self.pixel_factor, self.height_factor)

    def at(self, cells: Tensor) -> Tensor:
        factors = self._factors_at(cells[..., None, :])[..., 0]  # [*, R]
        with without_autocast(factors):
            return factors @ self.height_factor

    def expectation(self, target: VolumeTarget) -> Tensor:
        pixel = (self._factors_at(target.cells) * target.cell_weights[..., None, :]).sum(-1)  # [*, R]
        at_heights = self.height_factor.T[target.heights]  # [*, K, R]
        return (pixel * (at_heights * target.height_weights[..., None]).sum(-2)).sum(-1)

    def log_normaliser(self, pixel: Tensor, height: Tensor) -> Tensor:
        return _StreamedLogSumExp.apply(pixel, height, self.pixel_factor, self.height_factor)

    def _factors_at(self, cells: Tensor) -> Tensor:
        """Pixel factors ``[*, R, C]`` of cells ``[*, C, 2]``."""
        rank = self.pixel_factor.shape[-3]
        return gather_pixels(self.pixel_factor, cells[..., None, :, :].expand(*cells.shape[:-2], rank, -1, -1))


@dataclass(frozen=True)
class VolumeLogits:
    """Logits of the volume as separate terms.

    Attributes:
        pixel: ``[*, H, W]``. height: ``[*, Z]``.
        constant: ``[*]`` the same for every voxel. It cancels in the softmax and gets no gradient from the loss.
        voxel: term that depends on pixel and height together; None: the softmax factorises.
    """

    pixel: Tensor
    height: Tensor
    constant: Tensor
    voxel: VoxelScores | None = None

    def dense(self) -> Tensor:
        """The whole volume ``[*, Z, H, W]``: the reference for tests and benchmarks, never used in training."""
        volume = self.pixel[..., None, :, :] + self.height[..., :, None, None] + self.constant[..., None, None, None]
        return volume if self.voxel is None else volume + self.voxel.dense(self.height.shape[-1])

    def map(self, change: Callable[[Tensor], Tensor]) -> VolumeLogits:
        """Apply ``change`` to every part."""
        voxel = None if self.voxel is None else self.voxel.map(change)
        return VolumeLogits(change(self.pixel), change(self.height), change(self.constant), voxel)

    def float(self) -> VolumeLogits:
        """Convert to float32: softmax and log-sum-exp are computed in it also under reduced-precision autocast."""
        return self.map(Tensor.float)

    def detach(self) -> VolumeLogits:
        """Without gradients."""
        return self.map(Tensor.detach)

    @staticmethod
    def stack(volumes: Sequence[VolumeLogits]) -> VolumeLogits:
        """Stack logits ``[B, T, ...]`` of A arms: ``[B, A, T, ...]``."""
        voxels = [volume.voxel for volume in volumes if volume.voxel is not None]
        return VolumeLogits(
            torch.stack([volume.pixel for volume in volumes], dim=1),
            torch.stack([volume.height for volume in volumes], dim=1),
            torch.stack([volume.constant for volume in volumes], dim=1),
            type(voxels[0]).stack(voxels) if voxels else None,
        )

    def height_given_pixel(self, cells: Tensor) -> Tensor:
        """Logits over heights ``[*, Z]`` at the cells ``[*, 2]`` (row, column)."""
        return self.height if self.voxel is None else self.height + self.voxel.at(cells)

    def pixel_marginal(self) -> Tensor:
        """Logits over pixels ``[*, H, W]`` with the height summed out (up to a constant per step)."""
        if self.voxel is None:
            return self.pixel
        total: Tensor | None = None
        for z in range(self.height.shape[-1]):  # streamed, so that no more than one slice exists
            slice_ = self.height[..., z, None, None] + self.voxel.slice(z)
            total = slice_ if total is None else torch.logaddexp(total, slice_)
        assert total is not None
        return self.pixel + total


def hard_target(cells: Tensor, heights: Tensor) -> VolumeTarget:
    """One voxel per step, from cells ``[*, 2]`` (row, column) and height bins ``[*]``."""
    ones = torch.ones(heights.shape, device=heights.device)[..., None]
    return VolumeTarget(cells[..., None, :], ones, heights[..., None], ones)


def bilinear_target(grid_position: Tensor, height_position: Tensor, shape: tuple[int, int], bins: int) -> VolumeTarget:
    """The 4 cells and 2 heights around a continuous position, with bilinear weights.

    Args:
        grid_position: ``[*, 2]`` (x, y) in cells, corner convention. height_position: ``[*]`` in bins.
        shape: (H, W). bins: Z.
    """
    cells, weights = bilinear_cells(grid_position, shape)
    heights, height_weights = two_hot(height_position, bins)
    return VolumeTarget(cells, weights, heights, height_weights)


def volume_cross_entropy(logits: VolumeLogits, target: VolumeTarget) -> Tensor:
    """Joint cross-entropy over all Z * H * W voxels, one value per step ``[*]``.

    Exact: equals the cross-entropy of ``logits.dense()`` (tests show loss and gradient equal to 1e-9 in float64).
    ``logits.constant`` cancels and receives no gradient.
    """
    if logits.voxel is not None:
        pixel = (gather_pixels(logits.pixel, target.cells) * target.cell_weights).sum(-1)
        height = (logits.height.gather(-1, target.heights) * target.height_weights).sum(-1)
        voxel = logits.voxel.expectation(target)
        return logits.voxel.log_normaliser(logits.pixel, logits.height) - pixel - height - voxel
    index = target.cells[..., 0] * logits.pixel.shape[-1] + target.cells[..., 1]
    pixel = _CrossEntropy.apply(logits.pixel.flatten(-2), index, target.cell_weights)
    return pixel + _CrossEntropy.apply(logits.height, target.heights, target.height_weights)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits ``[*, N]`` against a few weighted classes ``[*, C]``, one value ``[*]``.

    Backward computes the gradient ``softmax - target`` in one buffer. Autograd would hold four buffers of the logits'
    size, and the factorised loss needs no other memory.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        weights = weights.to(logits.dtype)
        normaliser = logits.logsumexp(-1)
        ctx.save_for_backward(logits, classes, weights, normaliser)
        return normaliser - (logits.gather(-1, classes) * weights).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        logits, classes, weights, normaliser = ctx.saved_tensors
        gradient = (logits - normaliser[..., None]).exp_().mul_(grad[..., None])
        return gradient.scatter_add_(-1, classes, -weights * grad[..., None]), None, None


class _StreamedLogSumExp(torch.autograd.Function):
    """log sum over the coupled volume, streamed over z: O(HW) memory forward and backward.

    Forward stores only the log-sum over pixels for every z. Backward recomputes each slice's probabilities and adds
    its contribution to the gradients; one slice exists at a time.
    """

    @staticmethod
    def forward(ctx, pixel: Tensor, height: Tensor, pixel_factor: Tensor, height_factor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        slices = []
        for z in range(height.shape[-1]):
            slice_ = _couple_at_height(pixel_factor, height_factor[:, z]).add_(pixel)
            slices.append(slice_.flatten(-2).logsumexp(-1))
        total = (torch.stack(slices, dim=-1) + height).logsumexp(-1)
        ctx.save_for_backward(pixel, height, pixel_factor, height_factor, total)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[no-untyped-def]
        pixel, height, pixel_factor, height_factor, total = ctx.saved_tensors
        grad_pixel, grad_height = torch.zeros_like(pixel), torch.zeros_like(height)
        grad_pixel_factor, grad_height_factor = torch.zeros_like(pixel_factor), torch.zeros_like(height_factor)
        for z in range(height.shape[-1]):
            slice_ = _couple_at_height(pixel_factor, height_factor[:, z]).add_(pixel)
            slice_ += (height[..., z] - total)[..., None, None]
            weighted = slice_.exp_() * grad_total[..., None, None]  # probability times incoming gradient
            grad_pixel += weighted
            grad_height[..., z] = weighted.sum((-2, -1))
            grad_pixel_factor += weighted[..., None, :, :] * height_factor[:, z, None, None]
            with without_autocast(weighted):
                grad_height_factor[:, z] = torch.einsum("...hw,...rhw->r", weighted, pixel_factor)
        return grad_pixel, grad_height, grad_pixel_factor, grad_height_factor


def _couple_at_height(pixel_factor: Tensor, height_factor: Tensor) -> Tensor:
    """Coupling of all pixels with one height, ``[*, R, H, W]`` and ``[R]`` -> ``[*, H, W]``."""
    with without_autocast(pixel_factor):
        return torch.einsum("...rhw,r->...hw", pixel_factor, height_factor)


def argmax_voxel(logits: VolumeLogits) -> tuple[Tensor, Tensor]:
    """The most probable voxel: cells ``[*, 2]`` (row, column) and height bins ``[*]``; equals the dense argmax."""
    width = logits.pixel.shape[-1]
    if logits.voxel is None:
        best, heights = logits.pixel.flatten(-2).argmax(-1), logits.height.argmax(-1)
    else:
        best_value: Tensor | None = None
        for z in range(logits.height.shape[-1]):
            value, index = (logits.pixel + logits.voxel.slice(z)).flatten(-2).max(-1)
            value = value + logits.height[..., z]
            if best_value is None:
                best_value, best, heights = value, index, torch.zeros_like(index)
            else:
                better = value > best_value
                best_value = torch.where(better, value, best_value)
                best = torch.where(better, index, best)
                heights = torch.where(better, z, heights)
    return torch.stack([best // width, best % width], dim=-1), heights


def sample_voxel(logits: VolumeLogits, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Sample one voxel per step from the joint distribution: the pixel from its marginal, then the height given the
    pixel."""
    width = logits.pixel.shape[-1]
    marginal = logits.pixel_marginal().flatten(-2)
    pixel = torch.multinomial(marginal.softmax(-1).reshape(-1, marginal.shape[-1]), 1, generator=generator)
    pixel = pixel.view(marginal.shape[:-1])
    cells = torch.stack([pixel // width, pixel % width], dim=-1)
    height_logits = logits.height_given_pixel(cells)
    heights = torch.multinomial(height_logits.softmax(-1).reshape(-1, height_logits.shape[-1]), 1, generator=generator)
    return cells, heights.view(height_logits.shape[:-1])


def soft_argmax(logits: VolumeLogits, cells: Tensor, window: int = 3) -> tuple[Tensor, Tensor]:
    """Sub-cell positions: the mean of the distribution in a window around the given cells and their best height.

    Args:
        cells: ``[*, 2]`` (row, column). window: cells to each side.

    Returns:
        Grid positions ``[*, 2]`` (x, y) in cells and height positions ``[*]`` in bins, corner convention.
    """
    rows = torch.arange(logits.pixel.shape[-2], device=cells.device)
    columns = torch.arange(logits.pixel.shape[-1], device=cells.device)
    near_row = (rows - cells[..., 0, None]).abs() <= window  # [*, H]
    near_column = (columns - cells[..., 1, None]).abs() <= window  # [*, W]
    near = near_row[..., :, None] & near_column[..., None, :]
    weights = (
        logits.pixel_marginal().masked_fill(~near, -torch.inf).flatten(-2).softmax(-1).unflatten(-1, near.shape[-2:])
    )
    x = (weights.sum(-2) * (columns + 0.5)).sum(-1)
    y = (weights.sum(-1) * (rows + 0.5)).sum(-1)
    height_logits = logits.height_given_pixel(cells)
    bins = torch.arange(height_logits.shape[-1], device=cells.device)
    near_bin = (bins - height_logits.argmax(-1, keepdim=True)).abs() <= window
    height_weights = height_logits.masked_fill(~near_bin, -torch.inf).softmax(-1)
    return torch.stack([x, y], dim=-1), (height_weights * (bins + 0.5)).sum(-1)


def best_places(logits: VolumeLogits) -> StepPlaces:
    """`soft_argmax` around the most probable voxel."""
    return StepPlaces(*soft_argmax(logits, argmax_voxel(logits)[0]))


def pixel_entropy(logits: VolumeLogits) -> Tensor:
    """Entropy ``[*]`` of the heatmap relative to log(HW): 0 is certain, 1 is uniform."""
    log_prob = F.log_softmax(logits.pixel_marginal().flatten(-2), dim=-1)
    return -(log_prob.exp() * log_prob).sum(-1) / torch.log(torch.tensor(float(log_prob.shape[-1])))
