"""What the examination of a shard found; each kind of data adds what it finds in its samples."""

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
    known: list[str] = field(default_factory=list)  # that its index names, and the manifest
    keys: list[str] = field(default_factory=list)
    contents: list[tuple[str, str]] = field(default_factory=list)  # digests of images and text, and whose
    media: list[str] = field(default_factory=list)  # of images and videos alone, of samples with text
    kinds: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    has: Counter[str] = field(default_factory=Counter)  # of images with text: how many samples have what
    thumbnails: dict[str, bytes] = field(default_factory=dict)  # of images with text that have one, by name


def unknown_member(where: str, name: str, known: str) -> str:
    """The problem of a sample that has a member which nothing reads; `where` names the sample."""
    return f"{where}: unknown member {name!r} (known: {known}); remove it or add a decoder"


def digest_of(parts: Parts) -> str:
    """SHA-256 of parts with their names, whatever their order."""
    return sha256_of(name.encode() + b"\0" + parts[name] for name in sorted(parts))
