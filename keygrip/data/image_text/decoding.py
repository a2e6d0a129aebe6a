"""Decode image files of any kind to 8-bit RGB; used for shards, for sampling and for the images of conversations.

| content of a file | decoding |
| --- | --- |
| EXIF orientation | rotated or mirrored accordingly |
| transparency (alpha channel, transparent palette entries or a single transparent value) | composited over white |
| 16-bit grey, 12-bit TIFFs | scaled to 8 bits from the full range of that bit depth |
| signed integers in TIFFs | 16-bit: 0 is black and 32767 white, values below 0 are refused; 8-bit are refused |
| floating point | 0..1 is black to white; other ranges are refused |
| 32-bit integers | values within 0..65535 as 16-bit; others are refused |
| CMYK, YCbCr, Lab, palettes, 1 bit, grey | converted; with the ICC profile if there is one |
| RGB | converted with the ICC profile if its colours differ from sRGB, whatever the profile's name is |
| PNG with a gamma (gAMA) and neither profile nor sRGB | converted to the gamma of a screen |
| several frames or pages | refused, except the second frames of a camera's multi-picture JPEG |
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from keygrip.data.bad_samples import HOSTILE
from keygrip.data.untrusted_files import open_image

EXIF_ORIENTATION = 0x0112
ORIENTATIONS = {  # how an image of these EXIF orientations is rotated or mirrored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HAVE_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # in the information of an image
TURNED_BY_A_QUARTER = range(5, 9)  # rotated by 90 degrees; values outside EXIF's 1..8 are ignored
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 256, 257, 258, 262, 0
TIFF_FORMAT, UNSIGNED, SIGNED = 339, 1, 2  # sample format
DEEPEST = 65535  # white of 16-bit grey
DEEPEST_SIGNED = 32767
MATTE = (255, 255, 255)
SCREEN_GAMMA = 2.2
NEARLY = 0.05  # relative tolerance of gamma; the usual gAMA value 0.45455 is the gamma of a screen
# Colour spaces of ICC profiles by the modes of images that they can describe.
PROFILED = {"RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK", "L": "GRAY"}


def size_of(path: Path | str) -> tuple[int, int]:
    """Return the width and height of an image after its EXIF rotation, from its header.

    Raises:
        BadSample: the image cannot be read, is too large, or has several frames.
    """
    with open_image(path) as image:
        refuse_frames(image)
        # Pillow rotates a TIFF when it decodes it, and some versions report the rotated size before decoding.
        stored = (image.width, image.height)
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            stored = (tags[TIFF_WIDTH], tags[TIFF_HEIGHT])
        return stored[::-1] if _orientation(image) in TURNED_BY_A_QUARTER else stored


def decode_image(path: Path | str) -> Image.Image:
    """Decode an image file to RGB; see the table above.

    Raises:
        BadSample: the image cannot be decoded, is too large, has several frames, or it is unknown which value is white.
    """
    with open_image(path) as image:
        refuse_frames(image)
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Convert an opened image of any mode to 8-bit RGB, rotated according to its EXIF data; see the table above.

    Raises:
        ValueError: it is unknown which value is white, or the values cannot be converted.
    """
    tags = getattr(image, "tag_v2", None) or {}  # of a TIFF; rotating the image loses them
    bits, kind = tags.get(TIFF_BITS, (0,))[0], tags.get(TIFF_FORMAT, (UNSIGNED,))[0]
    white = 2**bits - 1 if image.mode == "I;16" and bits else DEEPEST
    if kind == SIGNED and bits == 8:  # Pillow reads them as unsigned
        raise ValueError("its numbers are signed 8-bit integers: save it with unsigned ones")
    if kind == SIGNED and bits == 16:
        white = DEEPEST_SIGNED
    unsigned = image.mode == "I" and kind == UNSIGNED and bits == 32
    return rgb(_apply_orientation(image), tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO, white, unsigned)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. Damaged EXIF data are ignored and do not make the image a bad sample."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        return int(orientation) if orientation in ORIENTATIONS else 1
    except HOSTILE:
        return 1


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate and mirror an image according to its EXIF data, and remove these from the result.

    `ImageOps.exif_transpose` writes them again without the orientation, which fails if any other entry is damaged.
    """
    if _orientation(image) not in ORIENTATIONS:
        return image
    image.load()
    orientation = _orientation(image)  # Pillow has rotated a TIFF by now, and removed its orientation
    if orientation not in ORIENTATIONS:
        return image
    rotated = image.transpose(ORIENTATIONS[orientation])
    for name in HAVE_ORIENTATION:
        rotated.info.pop(name, None)
    return rotated


def refuse_frames(image: Image.Image) -> None:
    """Raise ValueError if the image has several frames or pages: it is unknown which one to use."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with previews or a stereo pair: the first is the photo
        raise ValueError(f"it has {frames} frames or pages: save the one that is meant as a file of its own")


def refuse_transparency(image: Image.Image) -> None:
    """Raise ValueError if parts of a mask are transparent: it is unknown whether they count as black or white."""
    if _may_be_transparent(image) and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise ValueError("parts of it are transparent, and a mask is black and white: save it without transparency")


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def rgb(image: Image.Image, white_is_zero: bool = False, white: int = DEEPEST, unsigned: bool = False) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Args:
        white_is_zero: for 16-bit, 32-bit and floating-point grey: the lowest value is white. Pillow inverts 8-bit grey
            itself.
        white: for 16-bit and 32-bit grey: the value of white; 4095 for a 12-bit TIFF, which Pillow opens as 16-bit
            without scaling it.
        unsigned: for 32-bit grey: the values are unsigned; Pillow always opens them as signed.

    Raises:
        ValueError: it is unknown which value is white, or the values cannot be converted.
    """
    exponent = _gamma_exponent(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        grey = Image.fromarray(_grey_bytes(image, white_is_zero, white, exponent, unsigned))
        return (_convert_to_srgb(grey, profile) if profile else grey).convert("RGB")
    transparent = _may_be_transparent(image)
    if transparent and profile and image.mode in ("L", "LA"):  # a grey profile does not apply to RGBA
        alpha = image.convert("RGBA").getchannel("A")
        image = _convert_to_srgb(image.convert("L"), profile).convert("RGB")
        image.putalpha(alpha)
        profile = None
    if transparent or image.mode in ("P", "PA"):
        image = image.convert("RGBA" if transparent else "RGB")
    image = _convert_to_srgb(image, profile) if profile else image
    if exponent != 1:
        image = _raise_to_exponent(image if image.mode == "RGBA" else image.convert("RGB"), exponent)
    if image.mode == "RGBA":
        background = Image.new("RGBA", image.size, (*MATTE, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _gamma_exponent(image: Image.Image) -> float:
    """Return the exponent that converts values (as shares of white) to the gamma of a screen. It is 1 except for a PNG
    with a gamma and neither profile nor sRGB.

    Raises:
        ValueError: the gamma is not plausible for an image.
    """
    gamma = image.info.get("gamma")
    if image.format not in ("PNG", None) or gamma is None or {"icc_profile", "srgb"} & set(image.info):
        return 1.0
    if not 0.1 <= gamma <= 10:
        raise ValueError(f"its gamma (gAMA) is {gamma:g}: save it without")
    exponent = 1 / (SCREEN_GAMMA * gamma)
    return 1.0 if abs(exponent - 1) <= NEARLY else exponent


def _raise_to_exponent(image: Image.Image, exponent: float) -> Image.Image:
    """Raise each colour of an RGB or RGBA image, as a share of white, to a power; alpha is unchanged."""
    table = [round(255 * (value / 255) ** exponent) for value in range(256)]
    return image.point(table * 3 + list(range(256)) * (image.mode == "RGBA"))


def _grey_bytes(image: Image.Image, white_is_zero: bool, white: int, exponent: float, unsigned: bool) -> np.ndarray:
    """Convert an image with 16-bit or 32-bit pixels to uint8 [H, W]: shares of white, raised to the exponent."""
    values = np.asarray(image)
    values = values.view(np.uint32) if unsigned else values
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise ValueError(
                f"its floating-point numbers lie in {low:g}..{high:g}, not in 0..1: save it as 8 or 16 bit"
            )
        shares = values.astype(np.float64)
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > white:
            raise ValueError(f"its integers lie in {low}..{high}, not in 0..{white}: save it as 8 or 16 bit")
        shares = values.astype(np.float64) / white
    shares = (1 - shares if white_is_zero else shares) ** exponent
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shares = np.where(values == transparent, 1.0, shares)
    return np.asarray((shares * 255).round().astype(np.uint8))


def _convert_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert the image to sRGB. A profile for another colour space than that of the pixels is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if PROFILED.get(image.mode) != space or (space == "RGB" and _shows_as_srgb(profile)):
            return image
        target = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=target)
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its colour profile cannot be used ({error}): save it without, as sRGB") from error
    assert converted is not None
    return converted


@functools.lru_cache(maxsize=32)  # most images of a set share a few profiles
def _shows_as_srgb(profile: bytes) -> bool:
    """Whether an RGB profile changes no channel of any colour by more than 1 of 255. Its name is ignored: some linear
    profiles are called sRGB too. Raise PyCMSError or OSError if it cannot be used."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(Image.fromarray(colours), source, ImageCms.createProfile("sRGB"))
    return int(np.abs(np.asarray(converted, np.int16) - colours).max()) <= 1
