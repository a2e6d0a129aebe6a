"""Unusual image files with the pixels that they show, and others with the reason why they are left out."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

EDGE = 32
PLAIN = np.stack(np.broadcast_arrays(*np.ogrid[0:EDGE, 0:EDGE], 15), axis=-1).astype(np.uint8) * 8  # row, column, 120
GREY = PLAIN[..., 1]
ALPHA = np.where(np.arange(EDGE) < EDGE // 2, 0, 255).astype(np.uint8)[None].repeat(EDGE, 0)  # left half transparent
OVER_WHITE = np.where(ALPHA[..., None] == 0, 255, PLAIN)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey3(values: np.ndarray) -> np.ndarray:
    return values[..., None].repeat(3, -1)


def png(header: bytes, rows: bytes) -> bytes:
    """Build a PNG file by hand: header fields after IHDR's name, and uncompressed rows with their filter bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def as_stored(orientation: int) -> np.ndarray:
    """Return pixels that become `PLAIN` when a reader applies an EXIF orientation."""
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }
    return np.ascontiguousarray(undo[orientation](PLAIN))


def tiff(pixels: np.ndarray, photometric: int, *more: tuple[int, int], kind: int = 1, bits: int | None = None) -> bytes:
    """Build an uncompressed TIFF by hand, of any number of channels and bits, which Pillow cannot write.

    Args:
        photometric: 1 grey, 2 RGB, 5 CMYK. more: further tags of one short.
        kind: 1 unsigned, 2 signed, 3 floating point.
        bits: of each value, packed with the highest first; None: those of the array's type.
    """
    height, width, channels = (*pixels.shape, 1)[:3]
    data = pixels.tobytes()
    if bits is not None:
        numbers = pixels.reshape(height, -1, 1) >> np.arange(bits)[::-1] & 1
        data = np.packbits(numbers.reshape(height, -1), axis=1).tobytes()  # every row begins with a whole byte
    bits = bits or pixels.dtype.itemsize * 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, channels)]
    tags += [(278, height), (279, len(data)), (339, kind), *more]
    table, behind = b"", b""
    for tag, value in sorted(tags):
        if tag in (258, 339) and channels > 2:  # one for each channel, after the data
            table += struct.pack("<HHII", tag, 3, channels, 8 + len(data) + len(behind))
            behind += struct.pack(f"<{channels}H", *[value] * channels)
        elif tag in (258, 339) and channels == 2:
            table += struct.pack("<HHIHH", tag, 3, 2, value, value)
        else:
            table += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data) + len(behind))
        + data
        + behind
        + (struct.pack("<H", len(tags)) + table + struct.pack("<I", 0))
    )


def deep_png(kind: int, depth: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """Build a PNG by hand with further chunks before its pixels, such as a gamma or a transparent colour."""
    header = struct.pack(">IIBBBBB", EDGE, EDGE, depth, kind, 0, 0, 0)
    whole = png(header, b"".join(b"\0" + row for row in rows))
    more = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    place = whole.index(b"IDAT") - 4
    return whole[:place] + more + whole[place:]


def unusual() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Depths, colour spaces and transparencies that few programs write, and most readers decode wrongly without an
    error."""
    whole, wide = Image.fromarray(PLAIN), GREY.astype(np.uint16) * 257
    deep = PLAIN.astype(np.uint16) * 257
    half = np.full_like(ALPHA, 128)
    over = np.rint(PLAIN * (128 / 255) + 255 * (1 - 128 / 255)).astype(np.uint8)
    found: dict[str, tuple[bytes, np.ndarray, int]] = {}
    two, four = GREY // 64, GREY // 16
    packed = [np.packbits((row[:, None] >> np.array([1, 0])) & 1).tobytes() for row in two]
    found["grey_two_bits.png"] = deep_png(0, 2, packed), grey3((two * 85).astype(np.uint8)), 0
    packed = [((row[::2] << 4) | row[1::2]).astype(np.uint8).tobytes() for row in four]
    found["grey_four_bits.png"] = deep_png(0, 4, packed), grey3((four * 17).astype(np.uint8)), 0
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]])
    shares = np.array([128, 255, 0, 255]) / 255
    shown = colours * shares[:, None] + 255 * (1 - shares[:, None])
    entries = (b"PLTE", colours.astype(np.uint8).tobytes()), (b"tRNS", bytes([128, 255, 0, 255]))
    rows = [row.tobytes() for row in two]
    found["palette_half_clear.png"] = deep_png(3, 8, rows, *entries), np.rint(shown).astype(np.uint8)[two], 0
    big = [row.astype(">u2").tobytes() for row in wide]
    clear = (b"tRNS", struct.pack(">H", int(wide[0, 4])))
    found["sixteen_one_clear.png"] = (
        deep_png(0, 16, big, clear),
        np.where(grey3(GREY) == GREY[0, 4], 255, grey3(GREY)).astype(np.uint8),
        0,
    )
    clear = (b"tRNS", struct.pack(">HHH", *(int(value) for value in deep[3, 4])))
    found["sixteen_colour_clear.png"] = (
        deep_png(2, 16, [row.astype(">u2").tobytes() for row in deep], clear),
        np.where((PLAIN[3, 4] == PLAIN).all(-1, keepdims=True), 255, PLAIN).astype(np.uint8),
        0,
    )
    pairs = np.dstack([wide, ALPHA.astype(np.uint16) * 257])
    found["sixteen_grey_alpha.png"] = (
        deep_png(4, 16, [row.astype(">u2").tobytes() for row in pairs]),
        np.where(ALPHA[..., None] == 0, 255, grey3(GREY)).astype(np.uint8),
        0,
    )
    found["half_clear.png"] = saved(Image.fromarray(np.dstack([PLAIN, half])), "PNG"), over, 0
    plain_rows = [row.tobytes() for row in PLAIN]
    light = (255 * (PLAIN / 255.0) ** (1 / 2.2)).round().astype(np.uint8)
    linear, usual = ((b"gAMA", struct.pack(">I", value)) for value in (100000, 45455))
    found["linear_gamma.png"] = deep_png(2, 8, plain_rows, linear), light, 0
    found["usual_gamma.png"] = deep_png(2, 8, plain_rows, usual), PLAIN, 0
    found["srgb_counts_more_than_gamma.png"] = deep_png(2, 8, plain_rows, (b"sRGB", b"\0"), linear), PLAIN, 0
    found["linear_sixteen.png"] = deep_png(0, 16, big, linear), grey3(light[..., 1]), 0
    found["sixteen_rgb.tif"] = tiff(deep, 2), PLAIN, 0
    found["sixteen_rgba.tif"] = tiff(np.dstack([deep, ALPHA.astype(np.uint16) * 257]), 2, (338, 2)), OVER_WHITE, 0
    found["sixteen_cmyk.tif"] = tiff(np.dstack([65535 - deep, np.zeros_like(wide)]), 5), PLAIN, 0
    faint = np.dstack([np.rint(PLAIN * (128 / 255)).astype(np.uint8), half])
    found["premultiplied.tif"] = tiff(faint, 2, (338, 1)), over, 1
    found["fourth_channel_says_nothing.tif"] = tiff(np.dstack([PLAIN, ALPHA]), 2, (338, 0)), PLAIN, 0
    twelve = np.rint(GREY * (4095 / 255)).astype(np.uint16)
    found["twelve.tif"] = tiff(twelve, 1, bits=12), grey3(GREY), 0
    found["twelve_turned.tif"] = tiff(twelve.T, 1, (0x0112, 5), bits=12), grey3(GREY), 0
    signed = GREY.astype(np.int32) * 32767 // 255
    found["signed.tif"] = tiff(signed.astype(np.int16), 1, kind=2), grey3(GREY), 1
    found["white_is_zero.tif"] = tiff(255 - GREY, 0), grey3(GREY), 0
    for ending, kind, options in (
        ("webp", "WEBP", {"lossless": True, "exif": exif(6)}),
        ("tif", "TIFF", {"tiffinfo": {0x0112: 6}}),
        ("avif", "AVIF", {"quality": 95, "exif": exif(6)}),
    ):
        turned = saved(Image.fromarray(as_stored(6)), kind, **options)
        found[f"turned.{ending}"] = turned, PLAIN, 12 if ending == "avif" else 0
    oblong = np.hstack([PLAIN, PLAIN[:, ::-1]])
    for orientation in (0, 9, 42):
        odd = saved(Image.fromarray(oblong), "JPEG", quality=95, exif=exif(orientation))
        found[f"no_such_turn_{orientation}.jpg"] = odd, oblong, 12
    found["broken_exif.jpg"] = saved(whole, "JPEG", quality=95, exif=b"Exif\0\0" + b"\xff" * 40), PLAIN, 12
    found["more_behind_the_end.jpg"] = saved(whole, "JPEG", quality=95) + b"x" * 999, PLAIN, 12
    found["words.ppm"] = b"P3\n32 32\n255\n" + b" ".join(str(v).encode() for v in PLAIN.reshape(-1)), PLAIN, 0
    found["sixteen.ppm"] = b"P6\n32 32\n65535\n" + deep.astype(">u2").tobytes(), PLAIN, 0
    hundred = GREY.astype(int) * 100 // 255
    found["white_is_100.pgm"] = (
        b"P5\n32 32\n100\n" + hundred.astype(np.uint8).tobytes(),
        grey3(np.rint(hundred / 100 * 255).astype(np.uint8)),
        1,
    )
    floats = np.flipud((GREY / 255).astype("<f4")).tobytes()
    found["shares.pfm"] = b"Pf\n32 32\n-1.0\n" + floats, grey3(GREY), 0
    found["one_frame.png"] = saved(whole, "PNG", save_all=True, append_images=[]), PLAIN, 0
    return found


@functools.cache
def right() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Return files with the pixels that they show, and how much a lossy format may differ from them."""
    whole, grey = Image.fromarray(PLAIN), Image.fromarray(GREY)
    wide = GREY.astype(np.uint16) * 257
    rgba = Image.fromarray(np.dstack([PLAIN, ALPHA]))
    half = Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
    found: dict[str, tuple[bytes, np.ndarray, int]] = {}
    for ending, kind in (("png", "PNG"), ("bmp", "BMP"), ("tif", "TIFF"), ("ppm", "PPM")):
        found[f"rgb.{ending}"] = saved(whole, kind), PLAIN, 0
        found[f"grey.{ending}"] = saved(grey, kind), grey3(GREY), 0
    for ending, kind in (("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF")):
        found[f"rgb.{ending}"] = saved(whole, kind, quality=95), PLAIN, 12
    found["grey.jpg"] = saved(grey, "JPEG", quality=95), grey3(GREY), 6
    found["progressive.jpeg"] = saved(whole, "JPEG", quality=95, progressive=True), PLAIN, 12
    found["lossless.webp"] = saved(whole, "WEBP", lossless=True), PLAIN, 0
    found["camera.jfif"] = saved(whole, "JPEG", quality=95), PLAIN, 12
    found["wrong_ending.jpg"] = saved(whole, "PNG"), PLAIN, 0
    found["unknown.ending"] = saved(whole, "PNG"), PLAIN, 0
    found["no_ending"] = saved(whole, "PNG"), PLAIN, 0
    found["upper.PNG"] = saved(whole, "PNG"), PLAIN, 0
    found["sixteen.png"] = saved(Image.fromarray(wide), "PNG"), grey3(GREY), 0
    found["sixteen.tif"] = saved(Image.fromarray(wide), "TIFF"), grey3(GREY), 0
    inverted = saved(Image.fromarray(65535 - wide), "TIFF", tiffinfo={262: 0})
    found["sixteen_white_is_zero.tif"] = inverted, grey3(GREY), 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PLAIN.astype(np.uint16) * 257)
    found["sixteen_rgb.png"] = png(struct.pack(">IIBBBBB", EDGE, EDGE, 16, 2, 0, 0, 0), rows), PLAIN, 0
    deep = np.dstack([PLAIN, ALPHA]).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    found["sixteen_rgba.png"] = png(struct.pack(">IIBBBBB", EDGE, EDGE, 16, 6, 0, 0, 0), rows), OVER_WHITE, 0
    found["integers.tif"] = saved(Image.fromarray(wide.astype(np.int32)), "TIFF"), grey3(GREY), 0
    found["sixteen.pgm"] = b"P5\n32 32\n65535\n" + wide.astype(">u2").tobytes(), grey3(GREY), 0
    found["shares.tif"] = saved(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), grey3(GREY), 0
    found["alpha.png"] = saved(rgba, "PNG"), OVER_WHITE, 0
    found["alpha.webp"] = saved(rgba, "WEBP", lossless=True, exact=True), OVER_WHITE, 0
    found["alpha.tif"] = saved(rgba, "TIFF"), OVER_WHITE, 0
    found["grey_alpha.png"] = saved(half, "PNG"), np.where(ALPHA[..., None] == 0, 255, grey3(GREY)), 0
    palette = Image.fromarray((GREY // 64).astype(np.uint8), "P")
    palette.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250, 9, 9, 9])
    coloured = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]], np.uint8)[GREY // 64]
    found["palette.png"] = saved(palette, "PNG"), coloured, 0
    found["palette.gif"] = saved(palette, "GIF"), coloured, 0
    found["palette.bmp"] = saved(palette, "BMP"), coloured, 0
    clear = np.where((GREY // 64 == 1)[..., None], 255, coloured)
    found["palette_clear.png"] = saved(palette, "PNG", transparency=1), clear, 0
    found["palette_clear.gif"] = saved(palette, "GIF", transparency=1), clear, 0
    found["one_clear.png"] = saved(grey, "PNG", transparency=8), np.where(grey3(GREY) == 8, 255, grey3(GREY)), 0
    shade = (8, 16, 120)
    clear = np.where((np.array(shade) == PLAIN).all(-1, keepdims=True), 255, PLAIN)
    found["one_colour_clear.png"] = saved(whole, "PNG", transparency=shade), clear, 0
    bits = GREY > 100
    found["one_bit.png"] = saved(Image.fromarray(bits), "PNG"), grey3(bits.astype(np.uint8) * 255), 0
    found["one_bit.tif"] = saved(Image.fromarray(bits), "TIFF", compression="group4"), found["one_bit.png"][1], 0
    found["cmyk.tif"] = saved(whole.convert("CMYK"), "TIFF"), PLAIN, 1
    found["cmyk.jpg"] = saved(whole.convert("CMYK"), "JPEG", quality=98), PLAIN, 14
    for orientation in range(1, 9):
        turned = Image.fromarray(as_stored(orientation))
        found[f"turned_{orientation}.png"] = saved(turned, "PNG", exif=exif(orientation)), PLAIN, 0
        found[f"turned_{orientation}.jpg"] = saved(turned, "JPEG", quality=95, exif=exif(orientation)), PLAIN, 12
    buffer = io.BytesIO()
    whole.save(buffer, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(255 - PLAIN)])
    found["phone.mpo.jpg"] = buffer.getvalue(), PLAIN, 12
    spaces = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
    lab = ImageCms.profileToProfile(whole, *spaces, outputMode="LAB")
    assert lab is not None
    found["lab.tif"] = saved(lab, "TIFF"), PLAIN, 16
    found["ycbcr.tif"] = saved(whole.convert("YCbCr"), "TIFF"), PLAIN, 4
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        found[f"{compression}.tif"] = saved(whole, "TIFF", compression=compression), PLAIN, 0
    found["sixteen_big_endian.tif"] = saved(Image.fromarray(wide.astype(">u2")), "TIFF"), grey3(GREY), 0
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found["srgb_profile.png"] = saved(whole, "PNG", icc_profile=srgb), PLAIN, 0
    found["grey_with_rgb_profile.png"] = saved(grey, "PNG", icc_profile=srgb), grey3(GREY), 0
    notes = PngInfo()
    notes.add_text("comment", "x" * 2000)
    found["notes.png"] = saved(whole, "PNG", pnginfo=notes), PLAIN, 0
    return found | unusual()


@functools.cache
def refused() -> dict[str, tuple[bytes, str]]:
    """Return files with the reason why they are left out."""
    whole = Image.fromarray(PLAIN)
    frames = [whole, Image.fromarray(255 - PLAIN)]
    several = {"save_all": True, "append_images": frames[1:]}
    bomb, smaller_bomb = (
        png(struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0), b"") for size in ((20000, 10000), (10000, 9500))
    )
    floats = (GREY * 3.0).astype(np.float32)
    hole = (GREY / 255).astype(np.float32)
    hole[0, 0] = np.nan
    good = saved(whole, "PNG")
    return {
        "animated.gif": (
            saved(frames[0].quantize(), "GIF", save_all=True, append_images=[frames[1].quantize()]),
            "2 frames",
        ),
        "animated.png": (saved(whole, "PNG", **several), "2 frames"),
        "animated.webp": (saved(whole, "WEBP", **several), "2 frames"),
        "pages.tif": (saved(whole, "TIFF", **several), "2 frames or pages"),
        "bomb.png": (bomb, "more than the"),
        "smaller_bomb.png": (smaller_bomb, "it has 10000 x 9500 pixels, more than the"),  # Pillow only warns of it
        "floats.tif": (saved(Image.fromarray(floats), "TIFF"), "0..744, not in 0..1"),
        "hole.tif": (saved(Image.fromarray(hole), "TIFF"), "nan..nan, not in 0..1"),
        "negative.tif": (saved(Image.fromarray(GREY.astype(np.int32) - 5), "TIFF"), "-5..243, not in 0..65535"),
        "large_integers.tif": (saved(Image.fromarray(GREY.astype(np.int32) * 999), "TIFF"), "not in 0..65535"),
        "negative_signed.tif": (tiff(GREY.astype(np.int16) - 5, 1, kind=2), "-5..243, not in 0..32767"),
        "signed_bytes.tif": (tiff(GREY.astype(np.int8), 1, kind=2), "signed 8-bit"),
        "unsigned.tif": (tiff(2**32 - 1 - GREY.astype(np.uint32), 1), "4294967047..4294967295, not in 0..65535"),
        "broken_profile.png": (saved(whole, "PNG", icc_profile=b"no profile"), "colour profile cannot be used"),
        "cut.png": (good[: len(good) // 2], ""),
        "empty.png": (b"", "not an image of a known format"),
        "text.png": (b"words", "not an image of a known format"),
        "drawing.svg": (b"<svg/>", ".svg is not encoded"),
        "phone.heic": (b"\0\0\0\x18ftypheic", ".heic is not encoded"),
        "raw.dng": (b"II*\0", ".dng is not encoded"),
        "still_beside_its_animation.png": (
            saved(whole, "PNG", default_image=True, **several),
            "2 frames or pages",
        ),
        "half_floats.tif": (tiff((GREY / 255).astype(np.float16), 1, kind=3), "not an image of a known format"),
        "doubles.tif": (tiff((GREY / 255).astype(np.float64), 1, kind=3), "not an image of a known format"),
        "colour_floats.tif": (tiff((PLAIN / 255).astype(np.float32), 2, kind=3), "not an image of a known format"),
        "no_gamma.png": (
            deep_png(2, 8, [row.tobytes() for row in PLAIN], (b"gAMA", struct.pack(">I", 10**7))),
            "its gamma",
        ),
        "cut.jpg": (saved(Image.effect_noise((64, 64), 90), "JPEG", quality=95)[:-900], "truncated"),
        "phone_with_another_ending.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "known format"),
        "jpeg_xl.jpg": (b"\xff\x0a" + b"\0" * 99, "known format"),
        "page_not_found.jpg": (b"<html>404</html>", "known format"),
        "cinema.jp2": (saved(whole, "JPEG2000"), ".jp2 is not encoded"),
        "cinema_with_another_ending.jpg": (saved(whole, "JPEG2000"), "known format"),
        "game.tga": (saved(whole, "TGA"), ".tga is not encoded"),
        "old.pcx": (saved(whole, "PCX"), ".pcx is not encoded"),
        "texture.dds": (saved(whole, "DDS"), ".dds is not encoded"),
        "icon.ico": (saved(whole, "ICO"), ".ico is not encoded"),
        "camera.arw": (b"II*\0", ".arw is not encoded"),
        "nothing.png": (png(struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0), b""), ""),
        "small.png": (saved(whole.resize((9, 9)), "PNG"), "would be enlarged"),
    }
