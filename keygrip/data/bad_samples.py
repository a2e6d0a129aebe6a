"""Bad samples: what broken or hostile frames, videos, images and texts can raise, and how it is handled.

Readers of frames, videos, images and texts open files with the functions below, which check sizes before they allocate
or decode, and run under :func:`guard`, so that whatever a broken file raises becomes one :class:`BadSample` that says
what is wrong and where. :class:`BadSamples` counts those that were left out, keeps their names, and ends a run in which
they are too many.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import io
import json
import logging
import lzma
import math
import os
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

log = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB as RGB
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 26
MAX_ARRAY_BYTES = 1 << 30
MAX_DEPTH = 64  # nested lists and objects of JSON; deeper ones end in recursion errors where they are written again
MAX_INTEGER = 1 << 64
MAX_DIMENSIONS = 32
REASON_CHARACTERS = 300
NAMED_AT_MOST = 10  # bad samples in a message or by name in the log; all are counted
# Pillow decodes EPS by starting another program; formats that are not listed are not opened, whatever a file is called
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")

HOSTILE: tuple[type[BaseException], ...] = (
    ValueError,  # also UnicodeError and json.JSONDecodeError
    TypeError,
    AttributeError,
    LookupError,  # IndexError, KeyError, unknown encodings
    ArithmeticError,  # OverflowError, ZeroDivisionError
    OSError,
    EOFError,
    MemoryError,  # an absurd size that passed every check
    RuntimeError,  # RecursionError, NotImplementedError, encrypted zip members
    SyntaxError,  # headers of .npy files, broken PNG
    AssertionError,  # Pillow's own, for broken chunks
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    csv.Error,
    tokenize.TokenError,  # headers of .npy files
    Image.DecompressionBombError,
    av.FFmpegError,
)
"""What broken or hostile data can raise in the readers of this project and the packages that they use."""

OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ESTALE)


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        where: its name and place. what: what is wrong with it.
    """

    def __init__(self, where: object, what: str = "") -> None:
        super().__init__(str(where), what)
        self.where, self.what = str(where), what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.what else self.where


def reason_of(error: BaseException) -> str:
    """One line that says what an error means for a sample."""
    text = " ".join(str(error).split())[:REASON_CHARACTERS]
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"  # Pillow repeats the path
    if text and isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_of(reasons: Sequence[str]) -> str:
    """The first `NAMED_AT_MOST` reasons and the number of the others, for one message."""
    more = f"; and {len(reasons) - NAMED_AT_MOST} more" if len(reasons) > NAMED_AT_MOST else ""
    return "; ".join(reasons[:NAMED_AT_MOST]) + more


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is the machine's (full disk, too few file descriptors) and not the sample's."""
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


@contextlib.contextmanager
def guard(where: object, error: Callable[[str, str], Exception] = BadSample) -> Iterator[None]:
    """Turns whatever a broken sample raises inside the block into one error.

    Args:
        where: name and place of the sample, for the message. error: makes the exception of (where, what).

    Raises:
        BadSample: or what `error` makes. Errors of the machine (no space, no file descriptors) pass unchanged.
    """
    place = str(where)
    try:
        yield
    except HOSTILE as hostile:
        if is_of_the_machine(hostile):
            raise
        reason = reason_of(hostile)
        raise error(place, reason.removeprefix(f"{place}: ")) from hostile


# ---- counting --------------------------------------------------------------------------------------------------------


class BadSamples:
    """Counts the samples that were left out, and ends a run in which they are too many.

    Args:
        max_share: more than this share of the samples seen is an error; inf: none is.
        setting: name of the setting that holds `max_share`, for the message.
        checked_after: samples seen before the share is checked.
    """

    def __init__(self, max_share: float, setting: str = "data.max_skipped_share", checked_after: int = 200) -> None:
        if not (0 <= max_share <= 1 or max_share == math.inf):
            raise ValueError(f"{setting}={max_share}: it is a share, from 0 to 1")
        self.max_share, self.setting, self.checked_after = max_share, setting, checked_after
        self.seen = 0
        self.reasons: dict[str, int] = {}  # how often each was met

    @property
    def count(self) -> int:
        """Number of samples left out so far."""
        return sum(self.reasons.values())

    def add(self, seen: int, reasons: Sequence[str] = ()) -> None:
        """Counts `seen` more samples, and the bad ones among or before them.

        Raises:
            ValueError: too many are bad.
        """
        self.seen += seen
        for reason in reasons:
            if reason not in self.reasons and len(self.reasons) < NAMED_AT_MOST:
                log.warning("skipped: %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.seen >= self.checked_after:
            self.check()

    def check(self) -> None:
        """Raises ValueError: too many of the samples seen so far are bad."""
        if self.count > self.max_share * self.seen:
            raise ValueError(
                f"{self.count} of {self.seen} samples could not be read, more than {self.setting}={self.max_share:g} "
                f"allows; the first: {next(iter(self.reasons))}"
            )

    @property
    def summary(self) -> str:
        """One line; empty where nothing was left out."""
        if not self.count:
            return ""
        names = list(self.reasons)[:NAMED_AT_MOST]
        more = len(self.reasons) - len(names)
        return f"{self.count} of {self.seen} samples skipped: " + "; ".join(names) + (f"; {more} more" if more else "")


# ---- files and text --------------------------------------------------------------------------------------------------


def regular_file(path: Path | str) -> os.stat_result:
    """Raises BadSample: there is no file, or it is a folder, a named pipe or a device, which would be read forever."""
    with guard(path):
        found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a named pipe or a device"
        raise BadSample(path, f"it is {kind}, not a file")
    return found


def read_bytes(path: Path | str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The content of a regular file. Raises BadSample: it cannot be read or is larger than `max_bytes`."""
    size = regular_file(path).st_size
    if size > max_bytes:
        raise BadSample(path, f"it has {size} bytes, more than the {max_bytes} that such a file may have")
    with guard(path):
        return Path(path).read_bytes()


def read_text(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """UTF-8 text of a regular file, with or without a byte order mark. Raises BadSample: it cannot be read."""
    return _decoded(read_bytes(path, max_bytes), path)


def _decoded(content: bytes, where: object) -> str:
    """UTF-8 text, with or without a byte order mark. Raises BadSample: it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(where, f"it is not UTF-8 text (from byte {error.start} on): save it as UTF-8") from error


def inside(folder: Path, relative: object) -> Path:
    """The path of a file that data name, below `folder`. Raises BadSample: it is no relative path inside of it."""
    with guard(folder):
        path = Path(str(relative))
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise ValueError(f"it names the file {str(relative)[:200]!r}; paths must be relative and inside the demo")
        return folder / path


def parse_json(content: bytes | str, where: object, max_bytes: int = MAX_TEXT_BYTES, unique_keys: bool = False) -> Any:
    """JSON within limits: its size, its depth, finite numbers and text that can be written as UTF-8.

    Args:
        unique_keys: an object that holds a key twice is refused; else the last one counts.

    Raises:
        BadSample: it is not such JSON; `where` is for the message.
    """
    _refuse_large(content, where, max_bytes)
    text = _decoded(content, where) if isinstance(content, bytes) else content
    with guard(where):
        pairs = _unique if unique_keys else None
        value = json.loads(
            text, parse_float=_finite, parse_int=_integer, parse_constant=_not_a_number, object_pairs_hook=pairs
        )
        if text.count("[") + text.count("{") > MAX_DEPTH or "\\u" in text:
            _check_nesting(value)
    return value


def parse_fields(content: bytes | str, where: object, names: Collection[str]) -> Any:
    """JSON of which some fields count, or all where it is no object. See :func:`sound_fields`.

    Raises:
        BadSample: it is no JSON, or too large, or one of these fields is none that :func:`parse_json` takes; `where` is
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
    """JSON with NaN, numbers of any length (as floats) and halves of surrogate pairs. Raises BadSample: it is none."""
    _refuse_large(content, where, max_bytes)
    with guard(where):
        text = _decoded(content, where) if isinstance(content, bytes) else content
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


def sound_fields(value: Mapping[str, Any], where: object, names: Collection[str]) -> dict[str, Any]:
    """The fields of an object that :func:`parse_json` takes. Others are left out: downloaders write NaN, numbers of any
    length and broken text beside what counts (LAION's `similarity`, EXIF).

    Raises:
        BadSample: one of these names is among those left out; `where` is for the message.
    """
    kept: dict[str, Any] = {}
    for name, field in value.items():
        try:
            with guard(where):  # of fields that are nested too deeply to be written
                written = json.dumps({name: field})
            kept |= parse_json(written, where)
        except BadSample:
            if name in names:
                raise
    return kept


def read_json(path: Path | str, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """A JSON file; see :func:`parse_json`. Raises BadSample: it cannot be read."""
    return parse_json(read_bytes(path, max_bytes), path, max_bytes)


def _refuse_large(content: bytes | str, where: object, max_bytes: int) -> None:
    if len(content) > max_bytes:
        raise BadSample(where, f"its JSON has {len(content)} bytes, more than the {max_bytes} that it may have")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _integer(text: str) -> int:
    number = int(text) if len(text) < 32 else MAX_INTEGER
    if abs(number) >= MAX_INTEGER:
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands there twice")
    return found


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
def _formats() -> tuple[str, ...]:
    """Those of `IMAGE_FORMATS` that the installed Pillow can open."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def open_image(source: Path | str | bytes, where: object = None, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A PIL image whose size was checked from its header; decoding in the block is guarded too.

    Args:
        source: a regular file, or its content. where: for messages; None: the path.
        max_pixels: larger images are refused before anything is decoded.

    Raises:
        BadSample: it is not an image that can be decoded, or is too large. Also what the block raises of `HOSTILE`.
    """
    place = where if where is not None else ("the image" if isinstance(source, bytes) else source)
    if isinstance(source, bytes):
        file: Any = io.BytesIO(source)
    else:
        regular_file(source)
        file = source
    with guard(place):
        try:
            image = Image.open(file, formats=_formats())
        except Image.DecompressionBombError as error:
            raise ValueError(f"it has more than the {max_pixels} pixels that an image may have") from error
        with image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, more than the {max_pixels} that an image may have"
                )
            yield image


# ---- arrays ----------------------------------------------------------------------------------------------------------


def npy_header(content: bytes, where: object = "the array") -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, type and where the numbers begin of an .npy file.

    Raises:
        BadSample: it is not an .npy file, or one of Python objects.
    """
    with guard(where):
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
    """An .npy file's array. The header is checked against the content before anything is allocated; no pickle.

    Raises:
        BadSample: it is not such a file, holds less than its header says, or is larger than `max_bytes`.
    """
    shape, fortran, kind, start = npy_header(content, where)
    size = math.prod(shape) * kind.itemsize
    if size > max_bytes:
        raise BadSample(where, f"its array of shape {shape} has more than the {max_bytes} bytes that it may have")
    if size > len(content) - start:
        raise BadSample(where, f"it is cut off: {len(content) - start} bytes of the {size} of its array {shape}")
    with guard(where):
        flat = np.frombuffer(content, kind, math.prod(shape), start)
        return flat.reshape(shape, order="F" if fortran else "C").copy()


def read_npy(path: Path | str) -> np.ndarray:
    """The array of an .npy file; see :func:`parse_npy`. Raises BadSample: it cannot be read."""
    return parse_npy(read_bytes(path, MAX_ARRAY_BYTES + (1 << 16)), path)


def read_npz(
    source: Path | str | bytes,
    names: Collection[str] | None = None,
    where: object = None,
    max_bytes: int = MAX_ARRAY_BYTES,
) -> Mapping[str, np.ndarray]:
    """Arrays of an .npz file by name, their checksums verified; no pickle.

    Args:
        source: a regular file, or its content. names: only these, where they are there; None: all.
        where: for messages; None: the path. max_bytes: of all arrays that are read, together.

    Raises:
        BadSample: it is not such a file, is damaged, or larger than `max_bytes`.
    """
    place = where if where is not None else ("the archive" if isinstance(source, bytes) else source)
    if not isinstance(source, bytes):
        regular_file(source)
    arrays: dict[str, np.ndarray] = {}
    with guard(place), zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("it holds two arrays of one name")
        wanted = [name for name in members if names is None or name in names]
        total = sum(members[name].file_size for name in wanted)
        if total > max_bytes:
            raise ValueError(f"its arrays have {total} bytes, more than the {max_bytes} that they may have")
        for name in wanted:
            with archive.open(members[name]) as member:
                arrays[name] = parse_npy(member.read(members[name].file_size + 1), f"its array {name!r}", max_bytes)
    return arrays
