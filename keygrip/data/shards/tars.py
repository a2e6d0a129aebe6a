"""Shards: tar files in webdataset's layout, read at random through a small index of offsets.

A shard set is a folder (or a URL) of ``*.tar`` files, an index ``<shard>.index.npz`` for each, and ``manifest.json``,
written last. A sample is all files of a tar that share the part of their name before the first dot; what follows the
dot names the part ("json", "00.jpg", "01.jpg", ...). The index holds where each part lies and one row of columns a
sample (frames, text length, width, ...), from which the order of samples, buckets and mixtures are computed without
opening a tar.

What parts and columns mean is the business of whoever writes and reads a set: here are only bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)

SCHEMA = "keygrip.shards/1"
MANIFEST = "manifest.json"
INDEX_SUFFIX = ".index.npz"
END_OF_TAR = 1024  # bytes of zeros
OPEN_FILES = 64  # per process
Parts = dict[str, bytes]
Row = Mapping[str, int | float | str]
Describe = Callable[[Parts], Row]


class ShardError(ValueError):
    """A shard that is cut off, not a tar file, or does not agree with its index. The message names it."""


class SampleError(ValueError):
    """A sample that cannot be read. The message names it and its shard."""


# ---- index -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in a shard lies: N samples, M parts.

    Args:
        keys: [N] str. first_part: [N + 1] int64, sample i owns the parts first_part[i] to first_part[i + 1].
        part_names: [M] str. part_offsets, part_sizes: [M] int64 bytes.
        columns: by name, [N] int64, float64 or str.
        size: of the tar, bytes.
    """

    keys: np.ndarray
    first_part: np.ndarray
    part_names: np.ndarray
    part_offsets: np.ndarray
    part_sizes: np.ndarray
    columns: dict[str, np.ndarray]
    size: int

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """As a file; the same index gives the same bytes."""
        arrays = {
            "keys": self.keys,
            "first_part": self.first_part,
            "part_names": self.part_names,
            "part_offsets": self.part_offsets,
            "part_sizes": self.part_sizes,
            "size": np.int64(self.size),
            **{f"column/{name}": values for name, values in self.columns.items()},
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> ShardIndex:
        """Raises ShardError: not an index; `name` is for the message."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
            columns = {k.removeprefix("column/"): v for k, v in arrays.items() if k.startswith("column/")}
            own = {key: arrays[key] for key in ("keys", "first_part", "part_names", "part_offsets", "part_sizes")}
            return cls(**own, columns=columns, size=int(arrays["size"]))
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ShardError(f"{name} is not a shard index ({error}): make it again with step=manifest") from error


def make_index(
    keys: Sequence[str], parts: Sequence[Sequence[tuple[str, int, int]]], rows: Sequence[Row], size: int
) -> ShardIndex:
    """The index of samples whose parts are (name, offset, bytes)."""
    flat = [part for sample in parts for part in sample]
    names, offsets, sizes = zip(*flat, strict=True) if flat else ((), (), ())
    columns = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return ShardIndex(
        keys=np.array(keys, dtype=np.str_),
        first_part=np.cumsum([0, *(len(sample) for sample in parts)]),
        part_names=np.array(names, dtype=np.str_),
        part_offsets=np.array(offsets, dtype=np.int64),
        part_sizes=np.array(sizes, dtype=np.int64),
        columns=columns,
        size=size,
    )


def split_name(name: str) -> tuple[str, str]:
    """Key and part of a file in a tar: "a/b.00.jpg" is ("a/b", "00.jpg")."""
    folder, _, file = name.rpartition("/")
    stem, _, part = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), part


def index_shard(path: Path, describe: Describe) -> ShardIndex:
    """Reads a whole shard's headers, and what `describe` wants of its samples.

    Raises:
        ShardError: it is cut off (also between two files), is no tar, is compressed, or repeats a key or a part.
    """
    size = path.stat().st_size
    keys: list[str] = []
    parts: list[list[tuple[str, int, int]]] = []
    rows: list[Row] = []
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            end = 0
            for member in tar:
                end = member.offset_data + (member.size + 511) // 512 * 512
                if end > size:
                    raise ShardError(f"{path} is cut off in {member.name}")
                if not member.isfile():
                    continue
                key, part = split_name(member.name)
                if not keys or keys[-1] != key:
                    keys.append(key)
                    parts.append([])
                parts[-1].append((part, member.offset_data, member.size))
            raw.seek(end)
            closing = raw.read(END_OF_TAR)
            if len(closing) < END_OF_TAR or any(closing):
                raise ShardError(f"{path} is cut off: the end mark after its {len(keys)} samples is missing")
            for key, sample in zip(keys, parts, strict=True):
                if len({name for name, _, _ in sample}) != len(sample):
                    raise ShardError(f"{path}: sample {key} has a part twice")
                content = {}
                for name, offset, length in sample:
                    raw.seek(offset)
                    content[name] = raw.read(length)
                try:
                    rows.append(describe(content))
                except (ValueError, KeyError, OSError, TypeError) as error:
                    raise ShardError(f"{path}: sample {key} cannot be described: {error}") from error
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole tar file: {error}") from error
    if len(set(keys)) != len(keys):
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise ShardError(f"{path}: the key {twice} stands for two samples")
    return make_index(keys, parts, rows, size)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.write_bytes(content)
    temporary.replace(path)


class ShardWriter:
    """Writes one shard; the tar appears when it is complete, its index after it. The same samples give the same bytes.

    A context manager: an exception inside leaves nothing behind.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.writing")
        self._keys: list[str] = []
        self._parts: list[list[tuple[str, int, int]]] = []
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, parts: Mapping[str, bytes], row: Row) -> None:
        """Adds a sample.

        Args:
            key: unique in the set; no dots, since webdataset ends a key there.
            parts: by extension without the leading dot.
            row: its columns; every sample of a set has the same.

        Raises:
            ValueError: a key with a dot or with characters that tar files cannot hold, or other columns.
        """
        if "." in key.rpartition("/")[2] or not key or len(key.encode()) > 90:
            raise ValueError(f"the key {key!r} cannot name a sample: 1 to 90 bytes without a dot")
        if self._rows and set(row) != set(self._rows[0]):
            raise ValueError(f"sample {key} has the columns {sorted(row)}, those before it {sorted(self._rows[0])}")
        placed = []
        for name, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size, member.mode, member.mtime = len(content), 0o644, 0
            offset = self._tar.offset + 512  # one header block
            self._tar.addfile(member, io.BytesIO(content))
            placed.append((name, offset, len(content)))
        self._keys.append(key)
        self._parts.append(placed)
        self._rows.append(row)

    def __exit__(self, kind: object, *_: object) -> None:
        self._tar.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        index = make_index(self._keys, self._parts, self._rows, self._temporary.stat().st_size)
        index_path(self.path).unlink(missing_ok=True)  # never an old index beside a new tar
        self._temporary.replace(self.path)
        write_whole(index_path(self.path), index.to_bytes())


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


def write_manifest(
    root: Path | str, describe: Describe, max_broken_share: float = 0.1, again: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Indexes the shards of a folder that have no index yet (all with `again`) and writes its manifest.

    Args:
        root: folder with ``*.tar``.
        describe: the columns of a sample, from its parts.
        max_broken_share: more broken shards than this are an error; up to it they are named and left out.

    Returns:
        The manifest: `shards` (name, bytes, samples, index_sha256), `samples`, `columns`, `broken` (name: reason).

    Raises:
        FileNotFoundError: no shards. ValueError: too many are broken.
    """
    root = Path(root)
    paths = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"no shards (*.tar) in {root}")
    shards: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    columns: dict[str, str] = {}
    for path in tqdm(paths, desc=f"index {root}", unit="shard", delay=2, leave=False, disable=not progress):
        try:
            content = index_path(path).read_bytes() if index_path(path).is_file() and not again else None
            index = ShardIndex.from_bytes(content, str(index_path(path))) if content is not None else None
            if index is not None and index.size != path.stat().st_size:
                raise ShardError(f"{path} has {path.stat().st_size} bytes, its index says {index.size}: it is cut off")
            if index is None or content is None:
                index = index_shard(path, describe)
                content = index.to_bytes()
                write_whole(index_path(path), content)
        except ShardError as error:
            broken[path.name] = str(error)
            log.warning("left out: %s", error)
            continue
        found = {name: str(values.dtype.kind) for name, values in index.columns.items()}
        if columns and len(index) and set(found) != set(columns):
            raise ValueError(f"{path} has the columns {sorted(found)}, the shards before it {sorted(columns)}")
        columns = columns or found
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"name": path.name, "bytes": index.size, "samples": len(index), "index_sha256": digest})
    if len(broken) > max_broken_share * len(paths) or not shards:
        raise ValueError(
            f"{len(broken)} of {len(paths)} shards in {root} are broken, more than max_broken_share="
            f"{max_broken_share:g} allows: " + "; ".join(broken.values())
        )
    manifest = {
        "schema": SCHEMA,
        "samples": sum(shard["samples"] for shard in shards),
        "columns": sorted(columns),
        "shards": shards,
        "broken": broken,
    }
    write_whole(root / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


# ---- remote ----------------------------------------------------------------------------------------------------------


def is_remote(root: str | Path) -> bool:
    """Whether a root is a URL."""
    return re.match(r"^[a-z0-9]+://", str(root)) is not None


class ShardCache:
    """Copies of remote files on a local disk, up to a limit; several processes may share the folder.

    Args:
        url: of the shard set; anything fsspec opens (https, s3 and gs with their packages, file).
        folder: of the copies.
        limit: bytes; the least recently used copies go first. The file just asked for always stays.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit

    def fetch(self, name: str, size: int | None = None) -> Path:
        """The local copy of a file, copied now if it is not there.

        Raises:
            FileNotFoundError: there is no such file, or no connection. ShardError: it has another size than `size`.
        """
        target = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process copies, the others wait for it
            if not target.is_file():
                self._copy(name, target, size)
            os.utime(target)
        self._evict(keep=target)
        return target

    def _copy(self, name: str, target: Path, size: int | None) -> None:
        import fsspec

        temporary = target.with_name(f".{name}.{os.getpid()}.writing")
        try:
            for attempt in range(3):
                try:
                    with fsspec.open(f"{self.url}/{name}", "rb") as source, temporary.open("wb") as copy:
                        while block := source.read(1 << 20):
                            copy.write(block)
                    break
                except FileNotFoundError:
                    raise
                except Exception as error:  # whatever the transport raises
                    if attempt == 2:
                        raise FileNotFoundError(
                            f"{self.url}/{name} cannot be read ({error}): check the address and the connection, or "
                            "copy the shards to a local folder"
                        ) from error
                    time.sleep(0.2 * 4**attempt)
            if size is not None and temporary.stat().st_size != size:
                raise ShardError(
                    f"{self.url}/{name} has {temporary.stat().st_size} bytes, its manifest says {size}: it is cut off"
                )
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        """Open files live on until they are closed: unlinking takes nothing from a reader."""
        copies = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process was quicker
            copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


# ---- reading ---------------------------------------------------------------------------------------------------------


class ShardSet:
    """The samples of a shard set, numbered through all its shards in order. Picklable; opens files when it reads.

    Args:
        root: folder or URL with a manifest.
        cache_dir: for remote sets, where copies lie. cache_gb: their limit.

    Attributes:
        columns: by name, [N]. shard: [N] int32, the number of each sample's shard. fingerprint: of all indices; the
        same set in another place has the same.

    Raises:
        FileNotFoundError: no manifest. ShardError: a shard differs from the manifest.
    """

    def __init__(self, root: Path | str, cache_dir: Path | str | None = None, cache_gb: float = 32.0) -> None:
        self.root = str(root)
        self._cache: ShardCache | None = None
        if is_remote(root):
            digest = hashlib.sha256(self.root.encode()).hexdigest()[:16]
            folder = Path(cache_dir or Path.home() / ".cache" / "keygrip" / "shards") / digest
            self._cache = ShardCache(self.root, folder, int(cache_gb * 1e9))
        manifest_path = self._local(MANIFEST)
        if not manifest_path.is_file():
            raise FileNotFoundError(
                f"no {MANIFEST} in {root}: make it with `python -m keygrip.prepare step=manifest root={root}`"
            )
        manifest = json.loads(manifest_path.read_text())
        if manifest.get("schema") != SCHEMA:
            raise ShardError(f"{manifest_path} is a manifest of {manifest.get('schema')!r}, not of {SCHEMA!r}")
        self.shards: list[dict[str, Any]] = [shard for shard in manifest["shards"] if shard["samples"]]
        for name, reason in manifest.get("broken", {}).items():
            log.warning("%s is left out: %s (%s)", name, reason, self.root)
        self._indices = [self._read_index(shard) for shard in self.shards]
        self._check_sizes()
        counts = [len(index) for index in self._indices]
        self._starts = np.cumsum([0, *counts])
        self.shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        names = manifest["columns"] if self._indices else []
        self.columns = {name: np.concatenate([index.columns[name] for index in self._indices]) for name in names}
        self.fingerprint = hashlib.sha256("".join(shard["index_sha256"] for shard in self.shards).encode()).hexdigest()[
            :16
        ]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def _local(self, name: str, size: int | None = None) -> Path:
        return Path(self.root) / name if self._cache is None else self._cache.fetch(name, size)

    def _read_index(self, shard: Mapping[str, Any]) -> ShardIndex:
        path = self._local(shard["name"] + INDEX_SUFFIX)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make it with step=manifest root={self.root}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise ShardError(f"{path} does not belong to the manifest beside it: make both with step=manifest")
        return ShardIndex.from_bytes(content, str(path))

    def _check_sizes(self) -> None:
        """A shard that was cut off after indexing is found before training and not in the middle of it."""
        if self._cache is not None:
            return
        for shard in self.shards:
            path = Path(self.root) / shard["name"]
            if not path.is_file():
                raise ShardError(
                    f"{path} is in the manifest and not in the folder: bring it back, or run step=manifest"
                )
            if path.stat().st_size != shard["bytes"]:
                raise ShardError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {shard['bytes']}: copy it again, "
                    "or run step=manifest"
                )

    def locate(self, sample: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard."""
        return self._indices[shard]

    def first_sample(self, shard: int) -> int:
        """Number in the set of a shard's first sample."""
        return int(self._starts[shard])

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return str(self._indices[shard].keys[row])

    def where(self, sample: int) -> str:
        """Key and shard of a sample, for messages."""
        return f"{self.key(sample)} of {self.root}/{self.shards[self.locate(sample)[0]]['name']}"

    def read(self, sample: int, names: Collection[str] | None = None) -> Parts:
        """All parts of a sample, or those named that it has.

        Raises:
            SampleError: they cannot be read.
        """
        shard, row = self.locate(sample)
        index = self._indices[shard]
        parts = {}
        try:
            file = self._file(shard)
            for part in range(int(index.first_part[row]), int(index.first_part[row + 1])):
                if names is not None and str(index.part_names[part]) not in names:
                    continue
                size = int(index.part_sizes[part])
                content = os.pread(file, size, int(index.part_offsets[part]))
                if len(content) != size:
                    raise SampleError(f"{self.where(sample)}: the file ends within {index.part_names[part]}")
                parts[str(index.part_names[part])] = content
        except (OSError, ShardError) as error:
            raise SampleError(f"{self.where(sample)}: {error}") from error
        return parts

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self.shards[shard]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._local(entry["name"], entry["bytes"]), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def close(self) -> None:
        """Closes the tar files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()


def all_samples(sets: Iterable[ShardSet]) -> Iterator[tuple[ShardSet, int]]:
    """Every sample of some sets, in order."""
    for shards in sets:
        for sample in range(len(shards)):
            yield shards, sample
