"""Crops, resizes and normalises camera images for the network, and adapts the intrinsics to the new pixels.

Every step is an affine map A of pixels (corner convention), so that the new intrinsics are exactly ``A K``: Pillow's
resize accepts a box with fractional edges, and its affine transform samples at pixel centres. `ImageGeometry` is the
fixed map for validation and inference, stored in the checkpoint; `Augmentation` samples a random map and a random
change of colours for training.

Legend of shapes: H, W the image's height and width, S the network's image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keygrip.data.robot.schema import check_image
from keygrip.training.parts import data_part

FITS = ("crop", "stretch")
GREY = np.array([0.299, 0.587, 0.114])  # luma weights of ITU-R BT.601, the grey for saturation and contrast


@dataclass(frozen=True)
class Box:
    """A rectangle of the source image in pixels (corner convention, fractional), rotated by `angle` radians about its
    centre."""

    left: float
    top: float
    right: float
    bottom: float
    angle: float = 0.0

    def to_image(self, size: int) -> np.ndarray:
        """Return the 3x3 map from source pixels to the pixels of the S x S image that is cropped from this box."""
        width, height = self.right - self.left, self.bottom - self.top
        centre_x, centre_y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        centre = np.array([[1, 0, -centre_x], [0, 1, -centre_y], [0, 0, 1.0]])
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
        scale = np.array([[size / width, 0, size / 2], [0, size / height, size / 2], [0, 0, 1.0]])
        return scale @ turn @ centre


def cut(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Crop the box from an H x W x 3 uint8 image and resample it (with anti-aliasing) to S x S x 3 uint8.

    Parts of a rotated box outside the image are black.
    """
    pil_image = Image.fromarray(image)
    if box.angle == 0.0:
        corners = (box.left, box.top, box.right, box.bottom)
        return np.asarray(pil_image.resize((size, size), Image.Resampling.BILINEAR, box=corners))
    # Pillow's affine transform does not anti-alias, so the image is first resized to about its final scale.
    ratio_x, ratio_y = size / (box.right - box.left), size / (box.bottom - box.top)
    width = max(1, round(pil_image.width * ratio_x)) if ratio_x < 1 else pil_image.width
    height = max(1, round(pil_image.height * ratio_y)) if ratio_y < 1 else pil_image.height
    if (width, height) != pil_image.size:
        scaled = np.diag([width / pil_image.width, height / pil_image.height, 1.0])
        pil_image = pil_image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        scaled = np.eye(3)
    backward = scaled @ np.linalg.inv(box.to_image(size))
    coefficients = tuple(backward[:2].reshape(-1))
    return np.asarray(
        pil_image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    )


def cut_depth(depth: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Crop the box from an H x W depth map. Return S x S of the same type, 0 outside the map.

    Each value is that of the nearest pixel: a mean over a depth edge is a distance at which there is no surface.
    """
    backward = np.linalg.inv(box.to_image(size))
    centres = np.arange(size) + 0.5
    # x is one row and y one column; for a rotated box both are full grids.
    rotated = box.angle != 0.0
    x = backward[0, 0] * centres[None, :] + backward[0, 1] * (centres[:, None] if rotated else 0.0) + backward[0, 2]
    y = backward[1, 0] * (centres[None, :] if rotated else 0.0) + backward[1, 1] * centres[:, None] + backward[1, 2]
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    height, width = depth.shape
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    values = depth[row.clip(0, height - 1), column.clip(0, width - 1)]
    return np.where(inside, values, np.zeros_like(values))


def follow_pixels(
    to_image: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the intrinsics and camera pose of an image whose pixels were mapped by the affine `to_image`.

    ``A K`` alone would put an in-plane rotation into K. It is split into an upper triangular K' and a roll of the
    camera about its optical axis, ``A K = K' R``, so that K' has the usual form of intrinsics. Without rotation, R is
    the identity.

    Args:
        to_image: 3x3. intrinsics: 3x3. world_to_camera: 4x4.

    Returns:
        K' 3x3 and the new world_to_camera 4x4.
    """
    new_intrinsics = to_image @ intrinsics
    if new_intrinsics[1, 0] == 0.0:
        return new_intrinsics, world_to_camera
    length = math.hypot(new_intrinsics[1, 0], new_intrinsics[1, 1])
    sin, cos = new_intrinsics[1, 0] / length, new_intrinsics[1, 1] / length
    roll = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    straight = new_intrinsics @ roll[:3, :3].T
    straight[1, 0] = 0.0  # exactly, where rounding left 1e-17
    return straight, roll @ world_to_camera


@dataclass(frozen=True)
class Colours:
    """A linear change of colours: ``matrix @ rgb + offset`` on values 0 to 255, then clipping as in a sensor.

    Args:
        matrix: 3x3. offset: [3].
    """

    matrix: np.ndarray
    offset: np.ndarray


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float], colours: Colours | None = None) -> Tensor:
    """S x S x 3 uint8 -> float32 [3, S, S], ``(value / 255 - mean) / std`` per channel, after the change of colours
    if one is given."""
    scale = (1 / (255 * np.asarray(std))).astype(np.float32)[:, None]
    offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)[:, None]
    size = image.shape[:2]
    if colours is None:
        flat = np.ascontiguousarray(image.reshape(-1, 3).T, dtype=np.float32)
        flat *= scale
        flat += offset
    else:
        # one product for colours and scale; clipping at black and white comes after it, at their normalised values
        matrix = (scale * colours.matrix).astype(np.float32)
        flat = matrix @ image.reshape(-1, 3).astype(np.float32).T
        flat += scale * colours.offset.astype(np.float32)[:, None] + offset
        np.clip(flat, offset, scale * 255 + offset, out=flat)
    return torch.from_numpy(flat.reshape(3, *size))


def recolour(image: np.ndarray, colours: Colours) -> np.ndarray:
    """Return the image (H x W x 3 uint8) after a change of colours, uint8."""
    changed = image.reshape(-1, 3).astype(np.float32) @ colours.matrix.T.astype(np.float32)
    changed += colours.offset.astype(np.float32)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8).reshape(image.shape)


@dataclass(frozen=True)
class View:
    """One camera's image as the network reads it, before normalisation.

    Args:
        image: S x S x 3 uint8 RGB. intrinsics: 3x3 and world_to_camera: 4x4 of that image.
        depth: S x S float32 metres along the optical axis, 0 where unknown; None if there is no depth.
        detail: Q x Q x 3 uint8 RGB, the same view at a higher resolution; None if not requested.
    """

    image: np.ndarray
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    depth: np.ndarray | None
    detail: np.ndarray | None = None


@dataclass(frozen=True)
class ImageGeometry:
    """The preprocessing of every image at validation and inference. Stored in the checkpoint.

    Args:
        image_size: S, side of the network's image.
        mean, std: those of the backbone, per channel.
        field: share of the image's shorter side that the network sees; training crops can shift into the remaining
            part.
        fit: "crop" uses the central square (pixels stay square); "stretch" uses the whole aspect ratio and squeezes it
            into a square, for wide cameras whose edges matter. The intrinsics are adapted exactly in both cases.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    field: float = 1.0
    fit: str = "crop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers with std above 0, not {self.mean} and {self.std}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, not {self.image_size}")
        if not 0 < self.field <= 1:
            raise ValueError(f"field must be above 0 and at most 1 (the whole image), not {self.field}")
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")

    def box(self, width: int, height: int) -> Box:
        """Return the part of a `width` x `height` image that the network sees."""
        shorter = min(width, height)
        box_width, box_height = (shorter, shorter) if self.fit == "crop" else (width, height)
        half_width, half_height = self.field * box_width / 2, self.field * box_height / 2
        return Box(width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height)

    def apply(self, image: np.ndarray, intrinsics: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Return one camera image as the network reads it.

        Args:
            image: H x W x 3 uint8 RGB. intrinsics: 3x3 of that image.

        Returns:
            float32 [3, S, S], normalised, and float32 [3, 3], the intrinsics of the result.
        """
        check_image(image)
        box = self.box(image.shape[1], image.shape[0])
        new_intrinsics = box.to_image(self.image_size) @ np.asarray(intrinsics, dtype=np.float64)
        normalised = normalise(cut(image, box, self.image_size), self.mean, self.std)
        return normalised, torch.from_numpy(new_intrinsics.astype(np.float32))

    def detail(self, image: np.ndarray, size: int) -> Tensor:
        """Return the same crop of an image (H x W x 3 uint8 RGB) at another resolution, uint8 [3, size, size]."""
        check_image(image)
        return channels_first(cut(image, self.box(image.shape[1], image.shape[0]), size))

    def absent_view(self, depth: bool = False) -> View:
        """Return a placeholder for a missing camera, which is masked: black, at the origin; with `depth`, unknown."""
        size = self.image_size
        metres = np.zeros((size, size), dtype=np.float32) if depth else None
        return View(np.zeros((size, size, 3), dtype=np.uint8), np.eye(3), np.eye(4), metres)

    def view(
        self,
        image: np.ndarray,
        intrinsics: np.ndarray,
        world_to_camera: np.ndarray,
        depth: np.ndarray | None = None,
        detail_size: int | None = None,
    ) -> View:
        """Return the view of one of several cameras, with uint8 pixels; `depth` H x W uint16 millimetres;
        `detail_size`: side of an additional crop at a higher resolution. Otherwise as `apply`."""
        check_image(image)
        box = self.box(image.shape[1], image.shape[0])
        return _cut_view(box, self.image_size, image, intrinsics, world_to_camera, depth, detail_size)


@data_part
@dataclass(frozen=True)
class Augmentation:
    """Random crops and colours for training, which depend on the generator only.

    Args:
        scale: the crop's side relative to the nominal one, uniform between these two values.
        shift: the crop's centre moves by up to this share of the nominal side in each direction, within the image.
        rotate_degrees: largest rotation of the crop in each direction (costs a second resampling; 0 leaves it out).
        brightness, contrast, saturation: factors 1 +- this.
        channel_gain: a factor 1 +- this for each of red, green and blue (white balance).
    """

    scale: tuple[float, float] = (0.9, 1.1)
    shift: float = 0.08
    rotate_degrees: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    channel_gain: float = 0.08

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(float(value) for value in self.scale))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augmentation scale must be two rising positive numbers, not {self.scale}")
        for name in ("shift", "rotate_degrees", "brightness", "contrast", "saturation", "channel_gain"):
            value = getattr(self, name)
            limit = 180 if name == "rotate_degrees" else 1
            if not 0 <= value < limit:
                raise ValueError(f"augmentation {name} must be at least 0 and below {limit}, not {value}")

    def box(self, generator: np.random.Generator, geometry: ImageGeometry, width: int, height: int) -> Box:
        """Return a random box near the nominal one, inside the image if it fits."""
        nominal = geometry.box(width, height)
        side_x, side_y = nominal.right - nominal.left, nominal.bottom - nominal.top
        factor = generator.uniform(*self.scale)
        shift_x, shift_y = generator.uniform(-self.shift, self.shift, size=2)
        angle = math.radians(generator.uniform(-self.rotate_degrees, self.rotate_degrees))
        # a crop larger than the image would contain areas that the camera did not record
        factor = min(factor, width / side_x, height / side_y)
        crop_x, crop_y = factor * side_x, factor * side_y
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        centre_x = _clamp_centre(width / 2 + shift_x * side_x, (cos * crop_x + sin * crop_y) / 2, width)
        centre_y = _clamp_centre(height / 2 + shift_y * side_y, (sin * crop_x + cos * crop_y) / 2, height)
        left, right = centre_x - crop_x / 2, centre_x + crop_x / 2
        top, bottom = centre_y - crop_y / 2, centre_y + crop_y / 2
        if angle == 0.0:  # exactly: Pillow refuses an edge that rounding puts 1e-14 outside
            left, right = max(left, 0.0), min(right, float(width))
            top, bottom = max(top, 0.0), min(bottom, float(height))
        return Box(left, top, right, bottom, angle)

    def colours(self, generator: np.random.Generator, image: np.ndarray) -> Colours:
        """Return a random change of the colours of an image (S x S x 3 uint8); contrast is relative to its mean
        grey."""
        brightness = 1 + generator.uniform(-self.brightness, self.brightness)
        contrast = 1 + generator.uniform(-self.contrast, self.contrast)
        saturation = 1 + generator.uniform(-self.saturation, self.saturation)
        gain = 1 + generator.uniform(-self.channel_gain, self.channel_gain, size=3)
        matrix = saturation * np.eye(3) + (1 - saturation) * np.tile(GREY, (3, 1))
        level = float(image[::4, ::4].reshape(-1, 3).mean(axis=0) @ GREY)  # from a sixteenth of the pixels
        return Colours(
            matrix=brightness * contrast * gain[:, None] * matrix, offset=brightness * (1 - contrast) * gain * level
        )

    def apply(
        self,
        generator: np.random.Generator,
        geometry: ImageGeometry,
        image: np.ndarray,
        intrinsics: np.ndarray,
        world_to_camera: np.ndarray,
        detail_size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return a random view of one camera image.

        Args:
            generator: the only source of randomness.
            geometry: the nominal map that the random one varies.
            image: H x W x 3 uint8 RGB. intrinsics: 3x3. world_to_camera: 4x4.
            detail_size: Q, side of the same view at a higher resolution, pixels; None: none is made.

        Returns:
            float32 [3, S, S] normalised, intrinsics [3, 3] and world_to_camera [4, 4] of the result (a rotated
            crop is a roll of the camera), and the view at the higher resolution uint8 [3, Q, Q], not normalised, or
            None.
        """
        box = self.box(generator, geometry, image.shape[1], image.shape[0])
        size = geometry.image_size
        new_intrinsics, new_pose = follow_pixels(box.to_image(size), intrinsics, world_to_camera)
        crop = cut(image, box, size)
        colours = self.colours(generator, crop)
        detail = None if detail_size is None else channels_first(recolour(cut(image, box, detail_size), colours))
        return (
            normalise(crop, geometry.mean, geometry.std, colours),
            torch.from_numpy(new_intrinsics.astype(np.float32)),
            torch.from_numpy(np.asarray(new_pose, dtype=np.float32)),
            detail,
        )

    def view(
        self,
        generator: np.random.Generator,
        geometry: ImageGeometry,
        image: np.ndarray,
        intrinsics: np.ndarray,
        world_to_camera: np.ndarray,
        depth: np.ndarray | None = None,
        detail_size: int | None = None,
    ) -> View:
        """Return a random view of one of several cameras, with uint8 pixels. The other arguments are those of
        `ImageGeometry.view`. Otherwise as `apply`."""
        box = self.box(generator, geometry, image.shape[1], image.shape[0])
        cropped_view = _cut_view(box, geometry.image_size, image, intrinsics, world_to_camera, depth, detail_size)
        colours = self.colours(generator, cropped_view.image)
        detail = None if cropped_view.detail is None else recolour(cropped_view.detail, colours)
        return replace(cropped_view, image=recolour(cropped_view.image, colours), detail=detail)


def channels_first(image: np.ndarray) -> Tensor:
    """Return an image [H, W, C] as [C, H, W], contiguous."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _cut_view(
    box: Box,
    size: int,
    image: np.ndarray,
    intrinsics: np.ndarray,
    world_to_camera: np.ndarray,
    depth: np.ndarray | None,
    detail_size: int | None,
) -> View:
    new_intrinsics, new_pose = follow_pixels(box.to_image(size), np.asarray(intrinsics, np.float64), world_to_camera)
    metres = None
    if depth is not None:
        if depth.shape != image.shape[:2]:
            raise ValueError(f"the depth map is {depth.shape}, its image {image.shape[:2]}: they must be aligned")
        metres = cut_depth(depth, box, size).astype(np.float32) / 1000
    detail = None if detail_size is None else cut(image, box, detail_size)
    return View(cut(image, box, size), new_intrinsics, new_pose, metres, detail)


def _clamp_centre(centre: float, half: float, length: float) -> float:
    """`centre` moved so that [centre - half, centre + half] lies in [0, length]; length / 2 if it does not fit."""
    return length / 2 if 2 * half > length else min(max(centre, half), length - half)
