"""Keys of samples from the names that other programs gave them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from keygrip.artifacts import sha256_bytes

MOST_BYTES = 90  # of a key: with its part it stays below the 100 of a name in a tar file
NUMBER_BYTES = len("-00000000")  # which sources put behind the name of a file


def sample_key(name: str, most: int = MOST_BYTES) -> str:
    """A key of 1 to `most` bytes for a name of one or more: the name itself where it has neither a point nor a slash
    and is short enough; otherwise its end with "-" for these, and a hash of the whole name, so that two names do not
    become one key."""
    name = unicodedata.normalize("NFC", name)
    key = re.sub(r"[./]", "-", name).encode(errors="replace")  # bytes that are no UTF-8 come as surrogates
    if key.decode() == name and len(key) <= most:
        return name
    mark = f"-{sha256_bytes(name.encode(errors='backslashreplace'))[:8]}"
    return key[len(mark) - most :].decode(errors="ignore") + mark


def file_keys(root: Path, paths: Sequence[Path]) -> list[str]:
    """What the keys of the samples of each file begin with, before "-" and a number of eight digits: its path below
    `root` without its ending, "-" for a point or a slash; a `sample_key` of the path where that is too long, or where
    two files would have the same."""
    plain = [re.sub(r"[./]", "-", str(path.relative_to(root).with_suffix(""))) for path in paths]
    times, most = Counter(plain), MOST_BYTES - NUMBER_BYTES
    return [
        sample_key(key if times[key] == 1 else str(path.relative_to(root)), most)
        for key, path in zip(plain, paths, strict=True)
    ]
