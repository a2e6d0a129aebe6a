"""Create keys of samples from file names of other programs."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from keygrip.artifacts import sha256_bytes

MOST_BYTES = 90  # of a key: together with its part it stays below the 100 bytes of a name in a tar file
NUMBER_BYTES = len("-00000000")  # which sources append to the name of a file


def sample_key(name: str, most: int = MOST_BYTES) -> str:
    """Return a key of 1 to `most` bytes for a non-empty name: the name itself if it has no dot or slash and is short
    enough. Otherwise the key is the end of the name, with "-" for dots and slashes, and a hash of the whole name, so
    that different names get different keys."""
    name = unicodedata.normalize("NFC", name)
    key = re.sub(r"[./]", "-", name).encode(errors="replace")  # bytes that are not UTF-8 are surrogates in `name`
    if key.decode() == name and len(key) <= most:
        return name
    mark = f"-{sha256_bytes(name.encode(errors='backslashreplace'))[:8]}"
    return key[len(mark) - most :].decode(errors="ignore") + mark


def file_keys(root: Path, paths: Sequence[Path]) -> list[str]:
    """Return the beginning of the sample keys of each file, to which "-" and a number of eight digits are appended. It
    is the path below `root` without its ending, with "-" for dots and slashes; or a `sample_key` of the path if that is
    too long or two files would have the same beginning."""
    plain = [re.sub(r"[./]", "-", str(path.relative_to(root).with_suffix(""))) for path in paths]
    times, most = Counter(plain), MOST_BYTES - NUMBER_BYTES
    return [
        sample_key(key if times[key] == 1 else str(path.relative_to(root)), most)
        for key, path in zip(plain, paths, strict=True)
    ]
