"""Seeded damage to files, and the outcome of reading them: unchanged, refused or skipped in one line, or different."""

from __future__ import annotations

import io
import logging
import pickle
import signal
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

HANG_S = 20
REFUSALS = (ValueError, FileNotFoundError)  # a command prints these as one line


class Hang(BaseException):
    """Not an Exception, so that no reader handles it as a broken sample."""


@contextmanager
def time_limit(seconds: int = HANG_S) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class TouchesFile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage bytes without knowledge of the format: bits, bytes, blocks and cuts."""
    changed = bytearray(content or b"\0")
    place = int(rng.integers(len(changed)))
    kind = int(rng.integers(7))
    if kind == 0:
        changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[place] = int(rng.choice([0, 0x7F, 0x80, 0xFF]))
    elif kind == 2:
        del changed[place:]
    elif kind == 3:
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif kind == 4:
        changed[place:place] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 5:
        changed[place : place + 512] = rng.bytes(len(changed[place : place + 512]))
    else:
        changed[place:place] = changed[place : place + 512]
    return bytes(changed)


def png_saying(width: int, height: int) -> bytes:
    """Return a PNG file whose header states that size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def npy_saying(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def hostile_images() -> list[bytes]:
    return [
        png_saying(20000, 10000),
        png_saying(2**31 - 1, 2**31 - 1),
        png_saying(0, 5),
        png_saying(65000, 1),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
        b"GIF89a",
        b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 64,
        b"\xff\xd8\xff\xe1\xff\xff" + b"Exif\0\0" * 30,
        b"",
    ]


def hostile_json(field: bytes) -> list[bytes]:
    """Return JSON that is no valid sample; `field` is a key that readers use."""
    values = [
        b"1e400",
        b"NaN",
        b"null",
        b"true",
        b"-3",
        b"9" * 5000,
        b'"x"',
        b"[]",
        b"{}",
        b'[["\\ud800"]]',
        b'{"a":[1,[2]]}',
    ]
    nested = [b"[" * 100_000, b'{"a":' * 50_000, b"[" * 500 + b"]" * 500]
    return (
        [b"{" + field + b":" + value + b"}" for value in values]
        + values
        + nested
        + [b"", b"\xff\xfe", b"{", b"\0" * 99]
    )


EXECUTING = 2


def hostile_npy(sentinel: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.array([TouchesFile(sentinel)], dtype=object), allow_pickle=True)
    shapes = [
        "(1000000000000,)",
        "(-1,)",
        "(True,)",
        "()",
        "(0, 10**99)",
        "(0, 99999999999999999999)",
        "[3]",
        "(1,)" * 90,
    ]
    headers = [f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}" for shape in shapes]
    types = ["|O", "|V0", "<U0", "<c16", "|S4", "nonsense", "<f8", "<M8[s]"]
    headers += [f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (4,), }}" for kind in types]
    headers += ["('", "{'descr': ", "L" * 60, "[" * 90, "1" * 90, "{}"]
    # the first EXECUTING ones create the file
    return [buffer.getvalue(), pickle.dumps(TouchesFile(sentinel)), *map(npy_saying, headers), b"\x93NUMPY", b""]


class Outcomes:
    """Counts the outcomes of mutations."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.different: list[str] = []

    def run(self, name: str, read: Callable[[], Any], whole: Any) -> Any:
        """Read a mutated set. Return what `read` returns, or None if it refused."""
        try:
            with time_limit():
                found = read()
        except REFUSALS as error:
            message = str(error)
            if "\n" in message.strip() or not message:
                self.counts["unexpected"] += 1
                self.unexpected.append(f"{name}: not one line: {message[:200]!r}")
            else:
                self.counts["refused"] += 1
            return None
        except Hang:
            self.counts["hang"] += 1
            self.unexpected.append(f"{name}: hang")
            return None
        except Exception as error:
            self.counts["unexpected"] += 1
            self.unexpected.append(f"{name}: {type(error).__name__}: {error}")
            return None
        if found == whole:
            self.counts["same"] += 1
        elif all(whole.get(key) == value for key, value in found.items()):
            self.counts["skipped"] += 1
        else:
            self.counts["different"] += 1
            self.different.append(name)
        return found

    def assert_clean(self, sentinel: Path | None = None) -> None:
        """Assert that no read hung or raised anything but a refusal.

        Args:
            sentinel: the file that the mutations would create if they were executed (`TouchesFile`); None: none would.
        """
        log.info("outcomes of %d mutations: %s", self.counts.total(), dict(self.counts))
        assert not self.unexpected, "\n".join(self.unexpected)
        assert sentinel is None or not sentinel.exists(), "a file of data ran code"
