"""Write shards: one tar file with its index, and the manifest of a folder."""

from __future__ import annotations

import io
import logging
import tarfile
import unicodedata
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from keygrip.artifacts import atomic_write, sha256_bytes, write_bytes, write_json
from keygrip.data.bad_samples import NAMED_AT_MOST, join_first
from keygrip.data.shards.index import (
    COMPRESSED,
    MANIFEST,
    SCHEMA,
    Describe,
    Row,
    ShardError,
    ShardIndex,
    index_path,
    index_shard,
    make_index,
)
from keygrip.data.shards.keys import MOST_BYTES
from keygrip.data.shards.separate_images import ELSEWHERE, TextlessImages
from keygrip.data.source_files import files_in, is_utf8
from keygrip.progress import Progress

log = logging.getLogger(__name__)


class ShardWriter:
    """Write one shard; the tar appears when it is complete, its index after it. The same samples give the same bytes.

    A context manager: after an exception inside, no file remains.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._keys: list[str] = []
        self._known: set[str] = set()
        self._parts: list[list[tuple[str, int, int, int]]] = []
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        self._target: AbstractContextManager[IO[Any]] = atomic_write(self.path)
        self._file = self._target.__enter__()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, parts: Mapping[str, bytes], row: Row) -> None:
        """Add a sample.

        Args:
            key: unique in the set; without dots, since in webdataset a key ends at the first dot.
            parts: by extension without the leading dot.
            row: values by column; every sample of a set has the same columns.

        Raises:
            ValueError: the key has a dot or characters that tar files cannot store, is empty, too long or already used,
                or the columns differ from those of the other samples.
        """
        key = unicodedata.normalize("NFC", key)  # readers of the tar file normalise keys the same way
        if "." in key.rpartition("/")[2] or not key or len(key.encode()) > MOST_BYTES:
            raise ValueError(f"the key {key!r} cannot name a sample: 1 to {MOST_BYTES} bytes without a dot")
        if key in self._known:
            raise ValueError(f"the key {key!r} comes twice: in the tar file both would be one sample")
        if self._rows and set(row) != set(self._rows[0]):
            raise ValueError(f"sample {key} has the columns {sorted(row)}, those before it {sorted(self._rows[0])}")
        placed = []
        for name, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size, member.mode, member.mtime = len(content), 0o644, 0
            offset = self._tar.offset + 512  # one header block
            self._tar.addfile(member, io.BytesIO(content))
            placed.append((name, offset, len(content), zlib.crc32(content)))
        self._known.add(key)
        self._keys.append(key)
        self._parts.append(placed)
        self._rows.append(row)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if kind is not None:
            self._target.__exit__(kind, error, traceback)
            return
        try:
            self._tar.close()
            index = make_index(self._keys, self._parts, self._rows, self._file.tell())
            index_path(self.path).unlink(missing_ok=True)  # never an old index next to a new tar
        except BaseException as failed:
            self._target.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._target.__exit__(None, None, None)
        write_bytes(index_path(self.path), index.to_bytes())


def write_manifest(
    root: Path | str, describe: Describe, max_broken_share: float = 0.1, again: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Index the shards of a folder that have no index yet (with `again`, all shards) and write the folder's manifest.

    An index depends on its tar alone. Samples that are divided between tars are visible only in the whole folder; they
    are searched every time and listed in the manifest. If an error is raised, the manifest and the existing indices
    stay unchanged; a new index of a tar without one is kept, since it does not depend on the other tars.

    Args:
        root: folder with ``*.tar``.
        describe: returns the columns of a sample from its parts.
        max_broken_share: a larger share of broken shards, or of bad samples in the others, is an error; up to this
            share they are named in the log and left out.

    Returns:
        The manifest: `shards` (name, bytes, samples, index_sha256), `samples`, `columns`, `broken` (shard: reason),
        `bad_samples` (shard: {key: reason}).

    Raises:
        FileNotFoundError: there are no shards. ValueError: too many are broken, or a shard's name is not UTF-8.
    """
    root = Path(root)
    paths = tar_files(root)
    compressed = compressed_shards(root)
    if odd := next((path.name for path in (*paths, *compressed) if not is_utf8(path.name)), None):
        raise ValueError(f"the name of the shard {odd!a} in {root} is not UTF-8, as a manifest is: rename the file")
    if not paths:
        hint = f"; {compressed[0].name} is compressed, {COMPRESSED}" if compressed else ""
        raise FileNotFoundError(f"no shards (*.tar) in {root}{hint}")
    shards: list[dict[str, Any]] = []
    broken = {path.name: f"{path} is compressed, {COMPRESSED}" for path in compressed}
    bad: dict[str, dict[str, str]] = {}
    columns: dict[str, str] = {}
    textless = TextlessImages()
    renewed: dict[Path, bytes] = {}  # indices that replace existing ones
    for path in Progress(paths, desc=f"index {root}", unit="shard", shown=progress):
        try:
            index, content = _load_or_make_index(path, describe, again)
        except ShardError as error:
            broken[path.name] = str(error)
            continue
        kinds = {name: str(values.dtype.kind) for name, values in index.columns.items()}
        if columns and len(index) and set(kinds) != set(columns):
            raise ValueError(
                f"{path} has the columns {sorted(kinds)}, the shards before it {sorted(columns)}: an earlier version "
                "indexed some of them (index all anew: step=manifest again=true), or their samples are of another kind"
            )
        columns = columns or kinds
        if index.bad:
            bad[path.name] = index.bad
        if index.textless:
            textless.add(path.name, index.textless)
        if not index_path(path).is_file():
            write_bytes(index_path(path), content)
        elif content != index_path(path).read_bytes():
            renewed[index_path(path)] = content
        digest = sha256_bytes(content)
        shards.append({"name": path.name, "bytes": index.size, "samples": len(index), "index_sha256": digest})
    if textless:
        _leave_out_divided(root, shards, bad, textless, renewed)
        bad = {shard["name"]: bad[shard["name"]] for shard in shards if shard["name"] in bad}
    for reason in broken.values():
        log.warning("left out: %s", reason)
    if len(broken) > max_broken_share * (len(paths) + len(compressed)) or not shards:
        raise ValueError(
            f"{len(broken)} of {len(paths) + len(compressed)} shards in {root} are broken, more than max_broken_share="
            f"{max_broken_share:g} allows: " + join_first(list(broken.values()))
        )
    samples = sum(shard["samples"] for shard in shards)
    reasons = [f"{key} of {root}/{name}: {reason}" for name, left in bad.items() for key, reason in left.items()]
    for reason in reasons[:NAMED_AT_MOST]:
        log.warning("left out: %s", reason)
    if len(reasons) > NAMED_AT_MOST:
        log.warning("and %d more samples, all named in %s", len(reasons) - NAMED_AT_MOST, root / MANIFEST)
    if len(reasons) > max_broken_share * (samples + len(reasons)):
        raise ValueError(
            f"{len(reasons)} of {samples + len(reasons)} samples in {root} are bad, more than max_broken_share="
            f"{max_broken_share:g} allows; the first: {reasons[0]}"
        )
    manifest = {
        "schema": SCHEMA,
        "samples": samples,
        "columns": sorted(columns),
        "shards": shards,
        "broken": broken,
        "bad_samples": bad,
    }
    for path, content in renewed.items():
        write_bytes(path, content)
    write_json(root / MANIFEST, manifest)
    return manifest


def _load_or_make_index(path: Path, describe: Describe, again: bool) -> tuple[ShardIndex, bytes]:
    """Return the index of a shard and the content of its file; create it if there is none or with `again`.

    Raises:
        ShardError: the shard is broken, or is not the shard that was indexed.
    """
    if not again and index_path(path).is_file():
        content = index_path(path).read_bytes()
        index = ShardIndex.from_bytes(content, str(index_path(path)))
        if index.size != path.stat().st_size:
            raise ShardError(
                f"{path} has {path.stat().st_size} bytes, its index was made of {index.size}: it is cut off, "
                "or replaced (again=true indexes it anew)"
            )
        # indices of earlier versions are made again: they left out divided samples (even after the other tar was gone),
        # or did not contain which images have no text
        if index.textless is not None and not any(reason.startswith(ELSEWHERE) for reason in index.bad.values()):
            return index, content
    index = index_shard(path, describe)
    return index, index.to_bytes()


def _leave_out_divided(
    root: Path,
    shards: list[dict[str, Any]],
    bad: dict[str, dict[str, str]],
    textless: TextlessImages,
    renewed: Mapping[Path, bytes],
) -> None:
    """Subtract the samples whose images are partly or all in another shard from `shards`, and list them in `bad`.

    Args:
        renewed: indices that are not written yet.
    """
    for shard in shards:
        path = index_path(root / shard["name"])
        index = ShardIndex.from_bytes(renewed.get(path) or path.read_bytes(), str(path))
        if reasons := textless.divided(_member_names_by_key(index), shard["name"]):
            shard["samples"] -= len(reasons)
            bad[shard["name"]] = bad.get(shard["name"], {}) | reasons


def _member_names_by_key(index: ShardIndex) -> dict[str, list[str]]:
    """Return the members' names of each sample in an index, by key."""
    names = np.split(index.part_names, index.first_part[1:-1])
    return {key: each.tolist() for key, each in zip(index.keys.tolist(), names[: len(index)], strict=True)}


def tar_files(root: Path) -> list[Path]:
    """Return the tar files of a folder, without hidden files."""
    return files_in(root, ".tar")


def compressed_shards(root: Path) -> list[Path]:
    """Return the compressed tar files of a folder, without hidden files."""
    endings = ["gz", "bz2", "xz", "zst", "lz4", "lzma", "z", "br"]
    names = [*(f".tar.{ending}" for ending in endings), ".tgz", ".tbz2", ".tbz", ".txz", ".tzst"]
    return [path for path in files_in(root, *names) if path.is_file()]
