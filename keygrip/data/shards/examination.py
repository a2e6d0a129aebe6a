"""The report of examining a shard; each kind of data adds the findings in its samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from keygrip.artifacts import sha256_of
from keygrip.data.shards.index import Parts

NAMED_AT_MOST = 20  # problems in the log


@dataclass
class ShardReport:
    """Result of examining a shard."""

    name: str
    problems: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # problems that the shard's index or the manifest already lists
    keys: list[str] = field(default_factory=list)
    contents: list[tuple[str, str]] = field(default_factory=list)  # (digest of images and text, name of the sample)
    media: list[str] = field(default_factory=list)  # digests of images and videos alone, for samples with text
    kinds: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    has: Counter[str] = field(default_factory=Counter)  # for images with text: number of samples with each part
    thumbnails: dict[str, bytes] = field(default_factory=dict)  # for images with text: thumbnails by name


def unknown_member(where: str, name: str, known: str) -> str:
    """Return the problem of a sample with a member that nothing reads; `where` names the sample."""
    return f"{where}: unknown member {name!r} (known: {known}); remove it or add a decoder"


def digest_of(parts: Parts) -> str:
    """Return the SHA-256 of parts with their names, independent of their order."""
    return sha256_of(name.encode() + b"\0" + parts[name] for name in sorted(parts))
