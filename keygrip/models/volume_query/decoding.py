"""Decode logits into metric end-effector poses.

Shape legend: ``*`` leading shape ``[B, A, T]`` (batch, arms, steps), K candidate cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from keygrip.models.geometry.cameras import MIN_VERTICAL_SLOPE, camera_centre, cell_centres, pixel_rays, recover_3d
from keygrip.models.geometry.rotation_codecs import RotationCodec
from keygrip.models.nn.image_sampling import gather_pixels
from keygrip.models.volume_query.network import VolumeQueryOutput
from keygrip.models.volume_query.volume import (
    StepPlaces,
    VolumeLogits,
    argmax_voxel,
    pixel_entropy,
    sample_voxel,
    soft_argmax,
)
from keygrip.training.parts import ReadWhere, model_part

DecoderName = Literal["argmax", "soft_argmax", "sample", "viterbi"]


@dataclass(frozen=True)
class DecodedSteps:
    """Poses of every arm and step.

    Attributes:
        pixels: ``[*, 2]`` input pixels. position: ``[*, 3]`` metres, world frame. quaternion: ``[*, 4]`` wxyz.
        gripper: ``[*]`` 0 closed .. 1 open. entropy: ``[*]`` of the heatmap, 0 certain .. 1 uniform.
    """

    pixels: Tensor
    position: Tensor
    quaternion: Tensor
    gripper: Tensor
    entropy: Tensor


@model_part
@dataclass(frozen=True)
class Decoder:
    """Decoder that turns the predicted distribution into one trajectory.

    A voxel without a world point is never chosen: the ray of its cell does not meet its height plane in front of the
    camera, for example above the horizon (see `decode`).

    Args:
        name: "argmax": the most probable voxel, quantised. "soft_argmax": the mean in a window around it, finer than a
            cell. "sample": one sample per step. "viterbi": the most probable *path* through each step's best cells
            under a motion prior, then refined as in soft_argmax; independent argmaxes are known to jitter and to skip
            points in free space.
        window: cells (and bins) to each side that soft_argmax averages.
        candidates: cells per step that viterbi considers.
        motion_std_m: spread of the distance between consecutive steps in viterbi's prior, metres.
    """

    read_where: ClassVar = {
        "window": ReadWhere("name", "soft_argmax", "viterbi"),
        "candidates": ReadWhere("name", "viterbi"),
        "motion_std_m": ReadWhere("name", "viterbi"),
    }
    name: DecoderName = "soft_argmax"
    window: int = 3
    candidates: int = 24
    motion_std_m: float = 0.06

    def __post_init__(self) -> None:
        if self.name not in get_args(DecoderName):
            raise ValueError(f"decoder.name is one of {', '.join(get_args(DecoderName))}, not {self.name!r}.")
        if self.window < 1 or self.candidates < 2 or self.motion_std_m <= 0:
            raise ValueError(
                "decoder.window is at least 1, decoder.candidates at least 2 and decoder.motion_std_m positive."
            )

    def decode(
        self,
        output: VolumeQueryOutput,
        codecs: Sequence[RotationCodec],
        *,
        intrinsics: Tensor,
        world_to_camera: Tensor,
        height_range: Tensor,
        image_size: int,
        generator: torch.Generator | None = None,
        strict: bool = True,
    ) -> DecodedSteps:
        """Decode poses from the network's output, using only voxels that have a world point.

        A downward ray meets height planes below the camera, an upward ray those above it. Each step is decoded among
        the voxels on one side of the camera's height: the side that contains the most probable voxel. If the network
        has read gripper and rotation at places decoded earlier (`VolumeQueryOutput.places`), the positions are those
        places, and no voxel is chosen again.

        Args:
            output: leading shape ``[B, A, T]``. codecs: one per arm. intrinsics: ``[B, 3, 3]`` of the input image.
            world_to_camera: ``[B, 4, 4]``. height_range: ``[2]`` metres.
            strict: raise an error if a step has no voxel with a world point; otherwise its position is NaN.

        Raises:
            ParallelRayError: the camera sees none of the height planes.
        """
        places = output.places or self.places(
            output.volume,
            intrinsics=intrinsics,
            world_to_camera=world_to_camera,
            height_range=height_range,
            image_size=image_size,
            generator=generator,
        )
        pixels = places.grid * (image_size / output.volume.pixel.shape[-1])
        heights = _HeightScale(height_range, output.volume.height.shape[-1])(places.height)
        position = recover_3d(pixels, heights, intrinsics[:, None, None], world_to_camera[:, None, None], strict=strict)
        if self.name == "sample":
            quaternions = [
                codec.decode(_sample_class(output.rotation[:, i], generator)) for i, codec in enumerate(codecs)
            ]
        elif self.name == "argmax":
            quaternions = [codec.decode(output.rotation[:, i].argmax(-1)) for i, codec in enumerate(codecs)]
        else:
            quaternions = [
                codec.expectation(output.rotation[:, i].float(), self.window) for i, codec in enumerate(codecs)
            ]
        return DecodedSteps(
            pixels,
            position,
            torch.stack(quaternions, dim=1),
            self._gripper(output.gripper, generator),
            pixel_entropy(output.volume.float()),
        )

    def places(
        self,
        volume: VolumeLogits,
        *,
        intrinsics: Tensor,
        world_to_camera: Tensor,
        height_range: Tensor,
        image_size: int,
        generator: torch.Generator | None = None,
    ) -> StepPlaces:
        """Decode the place of each step from the volume alone; arguments as in `decode`.

        If a network is given this method as ``step_pixels``, it reads gripper and rotation at the places of the plan.
        """
        volume_f32 = volume.float()
        to_metres = _HeightScale(height_range, volume_f32.height.shape[-1])
        cameras = intrinsics[:, None, None], world_to_camera[:, None, None]
        logits = _mask_voxels_without_point(volume_f32, to_metres, *cameras, image_size)
        if self.name == "sample":
            cells, bins = sample_voxel(logits, generator)
        elif self.name == "viterbi":
            cells, bins = self._most_probable_path(logits, image_size / volume_f32.pixel.shape[-1], to_metres, *cameras)
        else:
            cells, bins = argmax_voxel(logits)
        if self.name in ("sample", "argmax"):
            return StepPlaces(cells.flip(-1) + 0.5, bins + 0.5)
        return StepPlaces(*soft_argmax(logits, cells, self.window))

    def _gripper(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        bins = logits.shape[-1]
        if self.name == "sample":
            return (_sample_class(logits, generator) + 0.5) / bins
        best = logits.argmax(-1, keepdim=True)
        if self.name == "argmax":
            return (best[..., 0] + 0.5) / bins
        index = torch.arange(bins, device=logits.device)
        near = (index - best).abs() <= self.window
        weights = logits.float().masked_fill(~near, -torch.inf).softmax(-1)
        return (weights * (index + 0.5)).sum(-1) / bins

    def _most_probable_path(
        self,
        logits: VolumeLogits,
        cell_size: float,
        to_metres: _HeightScale,
        intrinsics: Tensor,
        world_to_camera: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Viterbi over the K best cells per step: emission log-probability plus a Gaussian prior on the distance
        moved."""
        width = logits.pixel.shape[-1]
        log_prob = logits.pixel_marginal().flatten(-2).log_softmax(-1)  # [B, A, T, HW]
        emission, index = log_prob.topk(min(self.candidates, log_prob.shape[-1]), dim=-1)  # [B, A, T, K]
        cells = torch.stack([index // width, index % width], dim=-1)  # [B, A, T, K, 2]
        best_bins = [logits.height_given_pixel(cells[..., k, :]).argmax(-1) for k in range(cells.shape[-2])]
        bins = torch.stack(best_bins, dim=-1)  # [B, A, T, K]
        pixels = (cells.flip(-1) + 0.5) * cell_size
        points = recover_3d(
            pixels, to_metres(bins + 0.5), intrinsics[..., None, :, :], world_to_camera[..., None, :, :], strict=False
        )  # [B, A, T, K, 3]
        points = points.nan_to_num(0.0)  # cells without a world point, whose probability is zero
        steps = index.shape[2]
        score, back = emission[:, :, 0], []
        for t in range(1, steps):
            distance = torch.cdist(points[:, :, t - 1], points[:, :, t])  # [B, A, K from, K to]
            total = score[..., :, None] - distance.square() / (2 * self.motion_std_m**2)
            best, origin = total.max(dim=-2)
            score = best + emission[:, :, t]
            back.append(origin)
        choice = score.argmax(-1)  # [B, A]
        path = [choice]
        for origin in reversed(back):
            choice = origin.gather(-1, choice[..., None])[..., 0]
            path.append(choice)
        chosen = torch.stack(path[::-1], dim=-1)[..., None]  # [B, A, T, 1]
        chosen_cells = cells.gather(-2, chosen[..., None].expand(*chosen.shape, 2))[..., 0, :]
        return chosen_cells, bins.gather(-1, chosen)[..., 0]


@dataclass(frozen=True)
class _HeightScale:
    """Convert positions on the height bins' scale to metres."""

    height_range: Tensor
    bins: int

    def __call__(self, position: Tensor) -> Tensor:
        low, high = self.height_range.unbind()
        return low + position / self.bins * (high - low)


def _mask_voxels_without_point(
    logits: VolumeLogits, to_metres: _HeightScale, intrinsics: Tensor, world_to_camera: Tensor, image_size: int
) -> VolumeLogits:
    """Mask the voxels that have no world point, and for each step all voxels on one side of the camera's height.

    Every combination of a remaining cell and a remaining height, and every mean of such combinations, has a world
    point. Steps without any voxel that has one keep their logits.
    """
    cameras = intrinsics[..., None, None, :, :], world_to_camera[..., None, None, :, :]
    centres = cell_centres(logits.pixel.shape[-1], image_size, dtype=intrinsics.dtype, device=intrinsics.device)
    heights = to_metres(torch.arange(logits.height.shape[-1], device=centres.device) + 0.5)
    camera_offsets = heights - camera_centre(world_to_camera)[..., 2:]  # [B, 1, 1, Z]
    bins_below = camera_offsets < 0
    corners = pixel_rays(centres[[0, -1]][:, [0, -1]], *cameras)[..., 2]
    if bool((corners <= -MIN_VERTICAL_SLOPE).all() & bins_below.all()):  # usual case: the camera only looks down
        return logits  # rays between downward rays are downward
    slope = pixel_rays(centres, *cameras)[..., 2]  # [B, 1, 1, P, P]
    falling = slope <= -MIN_VERTICAL_SLOPE
    rising, bins_above = slope >= MIN_VERTICAL_SLOPE, camera_offsets > 0

    def of_candidates(cells: Tensor, bins: Tensor) -> VolumeLogits:
        pixel, height = logits.pixel.masked_fill(~cells, -torch.inf), logits.height.masked_fill(~bins, -torch.inf)
        return replace(logits, pixel=pixel, height=height)

    falling_logit = _best_logit(of_candidates(falling, bins_below))
    rising_logit = _best_logit(of_candidates(rising, bins_above))
    upward, no_point = rising_logit > falling_logit, torch.isneginf(torch.maximum(falling_logit, rising_logit))
    return of_candidates(
        torch.where(upward[..., None, None], rising, falling) | no_point[..., None, None],
        torch.where(upward[..., None], bins_above, bins_below) | no_point[..., None],
    )


def _best_logit(logits: VolumeLogits) -> Tensor:
    """Return the logit ``[*]`` of the most probable voxel, without the constant term."""
    cells, bins = argmax_voxel(logits)
    at_cells = gather_pixels(logits.pixel, cells[..., None, :]) + logits.height_given_pixel(cells)  # [*, Z]
    return at_cells.gather(-1, bins[..., None])[..., 0]


def _sample_class(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = logits.float().softmax(-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
