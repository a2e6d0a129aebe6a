"""Random access to the samples of a shard set, by the offsets in its indices."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.index import INDEX_SUFFIX, MANIFEST, SCHEMA, Parts, ShardError, ShardIndex
from keygrip.data.shards.remote import ShardCache, cache_of, is_remote, share_limit
from keygrip.data.untrusted_files import read_json

log = logging.getLogger(__name__)

OPEN_FILES = 64  # per process
COPIES_TRIED = 3  # times that the copy of a remote shard is made again if it disappears before it is opened


class ShardSet:
    """The samples of a shard set, numbered consecutively over all its shards. Picklable; opens files when it reads.

    Args:
        root: folder or URL with a manifest.
        cache_dir: for remote sets, the folder of local copies. cache_gb: their limit (of several sets together after
            `share_cache_limit`). spares_copies: see `ShardCache`.
        quiet: do not log what the manifest leaves out.

    Attributes:
        columns: by name, [N]. shard: [N] int32, the index of each sample's shard. fingerprint: hash of all indices and
        of the samples left out of them; a copy of the set in another place has the same fingerprint.

    Raises:
        FileNotFoundError: no manifest. ShardError: a shard differs from the manifest.
    """

    def __init__(
        self,
        root: Path | str,
        cache_dir: Path | str | None = None,
        cache_gb: float = 32.0,
        quiet: bool = False,
        spares_copies: bool = False,
    ) -> None:
        self.root = str(root)
        self._cache: ShardCache | None = None
        if is_remote(root):
            self._cache = cache_of(self.root, cache_dir, cache_gb, spares_copies)
        manifest_path = self._local(MANIFEST, fresh=True)
        if not manifest_path.is_file():
            raise FileNotFoundError(
                f"no {MANIFEST} in {root}: make it with `python -m keygrip.prepare step=manifest root={root}`"
            )
        manifest = _read_manifest(manifest_path)
        self.shards: list[dict[str, Any]] = [shard for shard in manifest["shards"] if shard["samples"]]
        if not quiet:
            _warn_of_left_out(self.root, manifest)
        self._left_out: list[dict[str, str]] = []
        self._indices = [self._read_used_index(shard, manifest["bad_samples"]) for shard in self.shards]
        self._check_sizes()
        counts = [len(index) for index in self._indices]
        self._starts = np.cumsum([0, *counts])
        self.shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        names = manifest["columns"] if self._indices else []
        for shard, index in zip(self.shards, self._indices, strict=True):
            if len(index) != shard["samples"] or set(names) - set(index.columns):
                raise ShardError(
                    f"{root}/{shard['name']} does not agree with the manifest beside it: run step=manifest"
                )
        self.columns = {name: np.concatenate([index.columns[name] for index in self._indices]) for name in names}
        for number, index in enumerate(self._indices):  # views, so that a large set's columns take their memory once
            rows = slice(self._starts[number], self._starts[number + 1])
            views = {
                name: values[rows]
                for name, values in self.columns.items()
                if values.dtype.kind == index.columns[name].dtype.kind  # shards may have numbers of different types
            }
            self._indices[number] = replace(index, columns={**index.columns, **views})
        self._digests = [
            _digest(shard["index_sha256"], left) for shard, left in zip(self.shards, self._left_out, strict=True)
        ]
        self.fingerprint = hashlib.sha256("".join(self._digests).encode()).hexdigest()[:16]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def hashes(self, name: str) -> dict[str, str]:
        """Return 16 hex digits of a hash of each index and of the samples that the manifest leaves out of it, by
        NAME/SHARD."""
        digests = zip(self.shards, self._digests, strict=True)
        return {f"{name}/{shard['name']}": digest[:16] for shard, digest in digests}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def _local(self, name: str, size: int | None = None, fresh: bool = False) -> Path:
        return Path(self.root) / name if self._cache is None else self._cache.fetch(name, size, fresh)

    def _read_index(self, shard: Mapping[str, Any]) -> ShardIndex:
        path = self._local(shard["name"] + INDEX_SUFFIX)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make it with step=manifest root={self.root}")
        content = path.read_bytes()
        if self._cache is not None and hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            self._cache.drop(shard["name"])  # the shard has changed since it was copied
            content = self._local(path.name, fresh=True).read_bytes()
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise ShardError(f"{path} does not belong to the manifest beside it: make both with step=manifest")
        return ShardIndex.from_bytes(content, str(path))

    def _read_used_index(self, shard: Mapping[str, Any], bad: Mapping[str, Mapping[str, str]]) -> ShardIndex:
        """Return the index of a shard without the samples that only the manifest leaves out: those that are divided
        between tars, which the index of a single tar cannot show."""
        index = self._read_index(shard)
        left_out = {key: reason for key, reason in bad.get(shard["name"], {}).items() if key not in index.bad}
        self._left_out.append(left_out)
        return index.without(left_out) if left_out else index

    def _check_sizes(self) -> None:
        """Raise ShardError if a shard is missing or was cut off after indexing, so that training does not start."""
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
        """Return the index of a sample's shard, and the index of the sample in it."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a shard, with the samples that are used."""
        return self._indices[shard]

    def left_out(self, shard: int) -> dict[str, str]:
        """Return the samples of a shard that are left out because of other shards' contents: by key, the reason."""
        return self._left_out[shard]

    def first_sample(self, shard: int) -> int:
        """Return the index in the set of a shard's first sample."""
        return int(self._starts[shard])

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        shard, row = self.locate(sample)
        return str(self._indices[shard].keys[row])

    def where(self, sample: int) -> str:
        """Return the key and the shard of a sample, for messages."""
        return f"{self.key(sample)} of {self.root}/{self.shards[self.locate(sample)[0]]['name']}"

    def read(self, sample: int, names: Collection[str] | None = None) -> Parts:
        """Read all parts of a sample, or those of `names` that it has. Upper and lower case are the same in `names`; in
        the result, the parts have the names that the shard contains.

        Raises:
            BadSample: the parts cannot be read.
        """
        shard, row = self.locate(sample)
        index = self._indices[shard]
        selected = None if names is None else {name.lower() for name in names}
        parts = {}
        with convert_errors(self.where(sample)):
            file = self._file(shard)
            for part in range(int(index.first_part[row]), int(index.first_part[row + 1])):
                if selected is not None and str(index.part_names[part]).lower() not in selected:
                    continue
                size = int(index.part_sizes[part])
                content = os.pread(file, size, int(index.part_offsets[part]))
                if len(content) != size:
                    raise ValueError(f"the file ends within {index.part_names[part]}")
                if zlib.crc32(content) != index.part_crcs[part]:
                    raise ValueError(
                        f"the bytes of {index.part_names[part]} are not those that were indexed: bring the shard back, "
                        "or index it anew (step=manifest again=true) if it was changed on purpose"
                    )
                parts[str(index.part_names[part])] = content
        return parts

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self.shards[shard]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        for attempt in range(COPIES_TRIED):
            try:
                file = os.open(self._local(entry["name"], entry["bytes"]), os.O_RDONLY | os.O_CLOEXEC)
                break
            except FileNotFoundError:  # another process removed the copy of a remote shard to stay within the limit
                if self._cache is None or attempt == COPIES_TRIED - 1:
                    raise
        self._files[shard] = file
        return file

    def close(self) -> None:
        """Close the tar files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()


def share_cache_limit(sets: Iterable[ShardSet]) -> None:
    """Make `cache_gb` limit the local copies of several sets together, not those of each set."""
    share_limit(shards._cache for shards in sets if shards._cache is not None)


def warn_of_small_cache(
    sets: Iterable[ShardSet], cache_gb: float, window_shards: int | None, mixed_in: Iterable[ShardSet] = ()
) -> None:
    """Log a warning if training would copy remote shards again and again, because the cache holds too few of them.

    Args:
        sets: those that training reads. window_shards: number of shards within which it shuffles; None: all.
        mixed_in: those of `sets` whose samples are spread over all windows, from any of their shards.
    """
    # several sources, or training and validation, may read one set: each copy takes its space once
    sizes = {each._cache.folder: [shard["bytes"] for shard in each.shards] for each in sets if each._cache is not None}
    total = sum(map(sum, sizes.values()))
    if total <= cache_gb * 1e9:
        return
    if window_shards is None:
        log.warning(
            "the remote shards have %.3g GB, and data.cache_gb=%g: in an order over all of them, most are copied many "
            "times in an epoch; raise data.cache_gb or, in a new run without data.curriculum, set "
            "data.window_shards=64 (or fewer)",
            *(total / 1e9, cache_gb),
        )
        return
    spread = sum(sum(sizes.pop(each._cache.folder, ())) for each in mixed_in if each._cache is not None)
    windowed = sorted((size for shards in sizes.values() for size in shards), reverse=True)
    needed = spread + sum(windowed[: 2 * window_shards])
    if needed > cache_gb * 1e9:
        also, local = "", ""
        if spread:
            also = f", with the {spread / 1e9:.3g} GB of the sources with a share, of which every window has samples,"
            local = ", copy the sources with a share to a local folder"
        log.warning(
            "two windows of data.window_shards=%d remote shards%s have up to %.3g GB, and data.cache_gb=%g: shards are "
            "copied again while their window lasts; raise data.cache_gb%s or, in a new run, lower data.window_shards",
            *(window_shards, also, needed / 1e9, cache_gb, local),
        )


def all_samples(sets: Iterable[ShardSet]) -> Iterator[tuple[ShardSet, int]]:
    """Yield every sample of several sets, in order."""
    for shards in sets:
        for sample in range(len(shards)):
            yield shards, sample


def _digest(index_sha256: str, left_out: Collection[str]) -> str:
    """Return a hash of a shard's used samples: the hash of its index, combined with the left-out samples if any."""
    if not left_out:
        return index_sha256
    return hashlib.sha256("\0".join([index_sha256, *sorted(left_out)]).encode()).hexdigest()


def _warn_of_left_out(root: str, manifest: Mapping[str, Any]) -> None:
    """Log one line for shards and one for samples: a large set may have bad samples in thousands of shards."""
    broken, bad = manifest["broken"], manifest["bad_samples"]
    if broken:
        name, reason = next(iter(broken.items()))
        log.warning("%d shards of %s are left out (named in its %s); %s: %s", len(broken), root, MANIFEST, name, reason)
    if bad:
        name, reasons = next(iter(bad.items()))
        key, reason = next(iter(reasons.items()))
        arguments = (sum(map(len, bad.values())), len(bad), root, MANIFEST, key, name, reason)
        log.warning("%d samples in %d shards of %s are left out (named in its %s); %s of %s: %s", *arguments)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest. Raise ShardError if it is damaged, or of another kind."""
    try:
        manifest = read_json(path)
        with convert_errors(path):
            if manifest.get("schema") != SCHEMA:
                raise ShardError(f"{path} is a manifest of {manifest.get('schema')!r}, not of {SCHEMA!r}")
            for shard in manifest["shards"]:
                if Path(shard["name"]).name != shard["name"]:
                    raise ValueError(f"{shard['name']!r} does not name a file in its folder")
                if not all(isinstance(shard[key], int) and shard[key] >= 0 for key in ("bytes", "samples")):
                    raise ValueError(f"it gives no sizes of {shard['name']}")
                if not isinstance(shard["index_sha256"], str):
                    raise ValueError(f"it gives no hash of the index of {shard['name']}")
            columns = [str(name) for name in manifest["columns"]]
            left_out = {key: dict(manifest.get(key) or {}) for key in ("broken", "bad_samples")}
    except BadSample as error:
        if isinstance(error.__cause__, ShardError):
            raise error.__cause__ from None
        raise ShardError(f"{path} is damaged ({error.what}): make it again with step=manifest") from error
    bad = {name: dict(left) for name, left in left_out["bad_samples"].items() if left}
    return {"shards": list(manifest["shards"]), "columns": columns, "broken": left_out["broken"], "bad_samples": bad}
