"""MessagePack with numpy arrays in the format of openpi's client, with limits on everything that a sender controls.

The format is that of https://github.com/msgpack/msgpack/blob/master/spec.md without extension types. An array is a map
with ``__ndarray__``, ``data``, ``dtype`` and ``shape``; a numpy scalar is a map with ``__npgeneric__``, ``data`` and
``dtype`` (keys as bytes or strings). Reading creates only plain values and numeric arrays and never runs code.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_VALUES = 512  # values per message; an observation of eight cameras has about 170
DEEPEST = 8  # nesting depth of maps and lists
LONGEST_TEXT = 4096  # bytes of a string; a key has at most LONGEST_KEY
LONGEST_KEY = 128
MOST_DIMENSIONS = 4
DTYPES = ("|u1", "|b1", "<f4", "<f8", "<i4", "<i8")

_UNSIGNED = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS = {**_UNSIGNED, 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q", 0xCA: ">f", 0xCB: ">d"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_TEXT = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class MessagePackError(ValueError):
    """A message that is not in the format, or exceeds a limit."""


def unpack(message: bytes) -> Any:
    """Decode a message; its arrays are read-only views of the message's bytes.

    Raises:
        MessagePackError: The message is not in the format, or exceeds one of this module's limits.
    """
    reader = _Reader(message)
    value = reader.value(0)
    if reader.place != len(message):
        raise MessagePackError(f"{len(message) - reader.place} bytes follow the message")
    return value


def pack(value: Any) -> bytes:
    """Encode a value of maps with string keys, lists, strings, bytes, numbers, booleans, None and numpy arrays.

    Raises:
        TypeError: A value has another type. OverflowError: An integer has more than 64 bits.
    """
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


class _Reader:
    def __init__(self, message: bytes) -> None:
        self.message, self.place, self.values = memoryview(message), 0, 0

    def take(self, count: int) -> memoryview:
        end = self.place + count
        if end > len(self.message):
            raise MessagePackError("the message ends in the middle of a value")
        piece = self.message[self.place : end]
        self.place = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        self.values += 1
        if self.values > MOST_VALUES:
            raise MessagePackError(f"the message has more than {MOST_VALUES} values")
        if depth > DEEPEST:
            raise MessagePackError(f"the message has more than {DEEPEST} maps or lists within each other")
        kind = self.take(1)[0]
        if kind < 0x80:
            return kind
        if kind >= 0xE0:
            return kind - 256
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind in _BYTES:
            return self.take(self.number(_BYTES[kind]))
        if 0xA0 <= kind < 0xC0 or kind in _TEXT:
            return self.text(kind & 0x1F if kind < 0xC0 else self.number(_TEXT[kind]))
        if 0x90 <= kind < 0xA0 or kind in _LISTS:
            length = kind & 0x0F if kind < 0xA0 else self.number(_LISTS[kind])
            self.expect(length)
            return [self.value(depth + 1) for _ in range(length)]
        if 0x80 <= kind < 0x90 or kind in _MAPS:
            length = kind & 0x0F if kind < 0x90 else self.number(_MAPS[kind])
            self.expect(length)
            return self.mapping(length, depth)
        raise MessagePackError(f"the message has an extension or reserved type (byte 0x{kind:02x})")

    def expect(self, count: int) -> None:
        if count > MOST_VALUES:
            raise MessagePackError(f"the message has more than {MOST_VALUES} values")

    def text(self, length: int) -> str:
        if length > LONGEST_TEXT:
            raise MessagePackError(f"the message has a string of {length} bytes; {LONGEST_TEXT} are taken")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise MessagePackError(f"the message has a string that is not UTF-8: {error}") from error

    def mapping(self, length: int, depth: int) -> Any:
        entries: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if isinstance(key, memoryview) and len(key) <= LONGEST_KEY:
                key = bytes(key).decode(errors="replace")
            if not isinstance(key, str) or len(key) > LONGEST_KEY:
                raise MessagePackError(f"the message has a key that is no string of at most {LONGEST_KEY} characters")
            if key in entries:
                raise MessagePackError(f"the message has the key {key!r} twice")
            entries[key] = self.value(depth + 1)
        if "__ndarray__" in entries or "__npgeneric__" in entries:
            return _array(entries)
        return entries


def _array(entries: Mapping[str, Any]) -> np.ndarray:
    """Return the array [...] that a map represents."""
    dtype, data = entries.get("dtype"), entries.get("data")
    if isinstance(dtype, memoryview):
        dtype = bytes(dtype).decode(errors="replace")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MessagePackError(f"the message has an array of type {dtype!r}; {', '.join(DTYPES)} are taken")
    if "__npgeneric__" in entries:
        if not isinstance(data, int | float):
            raise MessagePackError("the message has a numpy scalar that is no number")
        try:
            return np.array(data, np.dtype(dtype))
        except (OverflowError, ValueError) as error:  # ValueError: NaN for a type of integers
            raise MessagePackError(f"the message has a numpy scalar outside its type {dtype}") from error
    shape = entries.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
        or not isinstance(data, memoryview)
    ):
        raise MessagePackError(f"the message has an array without bytes or a shape of at most {MOST_DIMENSIONS} sizes")
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(data):
        raise MessagePackError(f"the message has an array of shape {shape} and type {dtype} in {len(data)} bytes")
    try:
        return np.frombuffer(data, kind).reshape(shape)
    except (ValueError, OverflowError) as error:  # dimensions beyond numpy's maximum, next to a dimension of 0
        raise MessagePackError(f"the message has an array of shape {shape}, which no array has") from error


def _write(value: Any, parts: list[bytes]) -> None:
    if value is None:
        parts.append(b"\xc0")
    elif isinstance(value, bool):
        parts.append(b"\xc3" if value else b"\xc2")
    elif isinstance(value, int):
        parts.append(_integer(value))
    elif isinstance(value, float):
        parts.append(struct.pack(">Bd", 0xCB, value))
    elif isinstance(value, str):
        text = value.encode()
        parts += [_encode_head(len(text), None, (0xD9, 0xDA, 0xDB)), text]
    elif isinstance(value, bytes):
        parts += [_encode_head(len(value), None, (0xC4, 0xC5, 0xC6)), value]
    elif isinstance(value, np.ndarray):
        _write_array(value, parts)
    elif isinstance(value, Mapping):
        parts.append(_encode_head(len(value), 0x80, (None, 0xDE, 0xDF)))
        for key, entry in value.items():
            if not isinstance(key, str | bytes):
                raise TypeError(f"a key of a message is a string, not {type(key).__name__}")
            _write(key, parts)
            _write(entry, parts)
    elif isinstance(value, Sequence):
        parts.append(_encode_head(len(value), 0x90, (None, 0xDC, 0xDD)))
        for entry in value:
            _write(entry, parts)
    else:
        raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _write_array(value: np.ndarray, parts: list[bytes]) -> None:
    if value.dtype.str not in DTYPES:
        raise TypeError(f"a message cannot hold an array of {value.dtype}")
    entries = {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": [int(size) for size in value.shape],
    }
    _write(entries, parts)


def _integer(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes([value])
    for kind, form in ((0xD0, "b"), (0xD1, "h"), (0xD2, "i"), (0xD3, "q"), (0xCF, "Q")):
        try:
            return struct.pack(f">B{form}", kind, value)
        except struct.error:
            continue
    raise OverflowError(f"a message cannot hold the integer {value}")


def _encode_head(length: int, short_form: int | None, kinds: tuple[int | None, int, int]) -> bytes:
    """Encode type and length: in one byte if the type has a `short_form`, else with a length of 1, 2 or 4 bytes."""
    if short_form is not None and length < 16:
        return bytes([short_form | length])
    for kind, form, largest in zip(kinds, "BHI", (0xFF, 0xFFFF, 0xFFFFFFFF), strict=True):
        if kind is not None and length <= largest:
            return struct.pack(f">B{form}", kind, length)
    raise OverflowError(f"a message cannot hold {length} bytes or entries")
