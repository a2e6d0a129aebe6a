"""Readers of untrusted files: JSON, texts, images and arrays.

They check sizes before they allocate or decode. Every error that a broken file raises is converted into one
:class:`~keygrip.data.bad_samples.BadSample` with the reason and the place.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keygrip.data.bad_samples import BadSample, convert_errors

MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB as RGB
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 26
MAX_ARRAY_BYTES = 1 << 30
MAX_DEPTH = 64  # of nested JSON lists and objects; writing deeper ones again raises recursion errors
MAX_INTEGER = 1 << 64
MAX_DIMENSIONS = 32
# Formats that are not listed are not opened, whatever a file's name is: Pillow decodes EPS by starting another program
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")

# Pillow warns from 89 million pixels on; such an image is refused below, in one line. The filter is set once, because
# changing the filters around a call also changes them for other threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- files and text --------------------------------------------------------------------------------------------------


def regular_file(path: Path | str) -> os.stat_result:
    """Return the status of a regular file. Raise BadSample if there is none, or if it is a folder, a named pipe or a
    device: reading those might never end."""
    with convert_errors(path):
        status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a named pipe or a device"
        raise BadSample(path, f"it is {kind}, not a file")
    return status


def read_bytes(path: Path | str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Read the content of a regular file. Raise BadSample if it cannot be read or is larger than `max_bytes`."""
    size = regular_file(path).st_size
    if size > max_bytes:
        raise BadSample(path, f"it has {size} bytes, more than the {max_bytes} that such a file may have")
    with convert_errors(path):
        return Path(path).read_bytes()


def read_text(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text from a regular file, with or without a byte order mark. Raise BadSample if it cannot be read."""
    return _decode_utf8(read_bytes(path, max_bytes), path)


def _decode_utf8(content: bytes, where: object) -> str:
    """Decode UTF-8 text, with or without a byte order mark. Raise BadSample if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(where, f"it is not UTF-8 text (from byte {error.start} on): save it as UTF-8") from error


def inside(folder: Path, relative: object) -> Path:
    """Return the path below `folder` of a file that data refer to. Raise BadSample if it is not a relative path inside
    `folder`."""
    with convert_errors(folder):
        path = Path(str(relative))
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise ValueError(f"it names the file {str(relative)[:200]!r}; paths must be relative and inside the demo")
        return folder / path


def parse_json(content: bytes | str, where: object, max_bytes: int = MAX_TEXT_BYTES, unique_keys: bool = False) -> Any:
    """Parse JSON with limits on its size and depth; numbers must be finite and text must be valid as UTF-8.

    Args:
        unique_keys: refuse an object that contains a key twice; otherwise the last value is used.

    Raises:
        BadSample: the content is not such JSON; `where` is for the message.
    """
    _refuse_large(content, where, max_bytes)
    text = _decode_utf8(content, where) if isinstance(content, bytes) else content
    with convert_errors(where):
        pairs = _refuse_repeated_keys if unique_keys else None
        value = json.loads(
            text,
            parse_float=_parse_finite_float,
            parse_int=_parse_bounded_integer,
            parse_constant=_refuse_constant,
            object_pairs_hook=pairs,
        )
        if text.count("[") + text.count("{") > MAX_DEPTH or "\\u" in text:
            _check_nesting(value)
    return value


def parse_fields(content: bytes | str, where: object, names: Collection[str]) -> Any:
    """Parse JSON of which only the fields `names` must be valid; if it is not an object, all of it must be. See
    :func:`sound_fields`.

    Raises:
        BadSample: it is not JSON, or too large, or :func:`parse_json` does not accept one of these fields; `where` is
            for the message.
    """
    try:
        return parse_json(content, where)
    except BadSample:
        value = parse_loosely(content, where)
        if not isinstance(value, dict):
            raise
    return sound_fields(value, where, names)


def parse_loosely(content: bytes | str, where: object, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Parse JSON and also accept NaN, numbers of any length (as floats) and halves of surrogate pairs.

    Raises:
        BadSample: it is not JSON.
    """
    _refuse_large(content, where, max_bytes)
    with convert_errors(where):
        text = _decode_utf8(content, where) if isinstance(content, bytes) else content
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


def sound_fields(value: Mapping[str, Any], where: object, names: Collection[str]) -> dict[str, Any]:
    """Return the fields of an object that :func:`parse_json` accepts. The others are left out: downloaders write NaN,
    numbers of any length and broken text in addition to the needed fields (LAION's `similarity`, EXIF).

    Raises:
        BadSample: one of `names` is among the fields left out; `where` is for the message.
    """
    sound: dict[str, Any] = {}
    for name, field in value.items():
        try:
            with convert_errors(where):  # fields may be nested too deeply to be written
                written = json.dumps({name: field})
            sound |= parse_json(written, where)
        except BadSample:
            if name in names:
                raise
    return sound


def read_json(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file; see :func:`parse_json`. Raise BadSample if it cannot be read."""
    return parse_json(read_bytes(path, max_bytes), path, max_bytes)


def _refuse_large(content: bytes | str, where: object, max_bytes: int) -> None:
    if len(content) > max_bytes:
        raise BadSample(where, f"its JSON has {len(content)} bytes, more than the {max_bytes} that it may have")


def _parse_finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _parse_bounded_integer(text: str) -> int:
    number = int(text) if len(text) < 32 else MAX_INTEGER
    if abs(number) >= MAX_INTEGER:
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands there twice")
    return mapping


def _check_nesting(value: Any) -> None:
    open_values = [(value, 1)]
    while open_values:
        current, depth = open_values.pop()
        if isinstance(current, str):
            current.encode()  # half a surrogate pair cannot be written or tokenized
        elif isinstance(current, (list, dict)):
            if depth > MAX_DEPTH:
                raise ValueError(f"its JSON is nested more than {MAX_DEPTH} deep")
            inner = [*current.keys(), *current.values()] if isinstance(current, dict) else current
            open_values += [(item, depth + 1) for item in inner]


# ---- images ----------------------------------------------------------------------------------------------------------


@functools.cache
def _supported_formats() -> tuple[str, ...]:
    """Return the formats of `IMAGE_FORMATS` that the installed Pillow can open."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def open_image(source: Path | str | bytes, where: object = None, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open a PIL image after checking the size in its header; decoding inside the block is guarded too.

    Args:
        source: a regular file, or its content. where: for messages; None: the path.
        max_pixels: larger images are refused before anything is decoded.

    Raises:
        BadSample: it is not an image that can be decoded, or is too large; or the block raises an error of `HOSTILE`.
    """
    location = where if where is not None else ("the image" if isinstance(source, bytes) else source)
    if isinstance(source, bytes):
        file: Any = io.BytesIO(source)
    else:
        regular_file(source)
        file = source
    with convert_errors(location):
        try:
            image = Image.open(file, formats=_supported_formats())
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"it has more than the {max_pixels} pixels that an image may have") from error
        with image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, more than the {max_pixels} that an image may have"
                )
            yield image


# ---- arrays ----------------------------------------------------------------------------------------------------------


def npy_header(content: bytes, where: object = "the array") -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read an .npy file's header: shape, Fortran order, dtype, and the offset at which the values begin.

    Raises:
        BadSample: it is not an .npy file, or it contains Python objects.
    """
    with convert_errors(where):
        buffer = io.BytesIO(content)
        version = np.lib.format.read_magic(buffer)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"it is an .npy file of version {version}; known are (1, 0) and (2, 0)")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = reader(buffer)
        if kind.hasobject or not kind.itemsize:
            raise ValueError(f"its type {kind} is not one of numbers or text")
        if len(shape) > MAX_DIMENSIONS or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(f"its shape {str(shape)[:80]} is not one of an array")
        return shape, fortran, kind, buffer.tell()


def parse_npy(content: bytes, where: object = "the array", max_bytes: int = MAX_ARRAY_BYTES) -> np.ndarray:
    """Parse the array of an .npy file. The header is checked against the content before memory is allocated; no pickle.

    Raises:
        BadSample: it is not such a file, contains less than its header states, or is larger than `max_bytes`.
    """
    shape, fortran, kind, start = npy_header(content, where)
    size = math.prod(shape) * kind.itemsize
    if size > max_bytes:
        raise BadSample(where, f"its array of shape {shape} has more than the {max_bytes} bytes that it may have")
    if size > len(content) - start:
        raise BadSample(where, f"it is cut off: {len(content) - start} bytes of the {size} of its array {shape}")
    with convert_errors(where):
        flat = np.frombuffer(content, kind, math.prod(shape), start)
        return flat.reshape(shape, order="F" if fortran else "C").copy()


def read_npy(path: Path | str) -> np.ndarray:
    """Read the array of an .npy file; see :func:`parse_npy`. Raise BadSample if it cannot be read."""
    return parse_npy(read_bytes(path, MAX_ARRAY_BYTES + (1 << 16)), path)


def read_npz(
    source: Path | str | bytes,
    names: Collection[str] | None = None,
    where: object = None,
    max_bytes: int = MAX_ARRAY_BYTES,
) -> Mapping[str, np.ndarray]:
    """Read arrays of an .npz file by name and verify their checksums; no pickle.

    Args:
        source: a regular file, or its content. names: read only these arrays, if they exist; None: all.
        where: for messages; None: the path. max_bytes: limit for the total size of the arrays that are read.

    Raises:
        BadSample: it is not such a file, is damaged, or is larger than `max_bytes`.
    """
    location = where if where is not None else ("the archive" if isinstance(source, bytes) else source)
    if not isinstance(source, bytes):
        regular_file(source)
    arrays: dict[str, np.ndarray] = {}
    with (
        convert_errors(location),
        zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive,
    ):
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("it holds two arrays of one name")
        selected = [name for name in members if names is None or name in names]
        total = sum(members[name].file_size for name in selected)
        if total > max_bytes:
            raise ValueError(f"its arrays have {total} bytes, more than the {max_bytes} that they may have")
        for name in selected:
            with archive.open(members[name]) as member:
                arrays[name] = parse_npy(member.read(members[name].file_size + 1), f"its array {name!r}", max_bytes)
    return arrays
