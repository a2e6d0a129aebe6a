"""Local copies of the files of remote shard sets, up to a limit of disk space."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from keygrip.artifacts import DiskFullError, atomic_path, full_disk_errors, locked
from keygrip.data.shards.index import ShardError
from keygrip.data.source_files import files_in

log = logging.getLogger(__name__)

SHARD = ".tar"
RETRY_S = 0.2  # waiting time before the second attempt; four times as long before the third


def is_remote(root: str | Path) -> bool:
    """Whether a root is a URL."""
    return re.match(r"^[a-z0-9]+://", str(root)) is not None


def folder_beside(place: str) -> Path:
    """Return the folder for files derived from shards: inside the shards' folder, or in the user's cache if the shards
    are remote or their folder is not writable."""
    if not is_remote(place) and Path(place).is_dir() and os.access(place, os.W_OK):
        return Path(place) / ".keygrip"
    return Path.home() / ".cache" / "keygrip" / hashlib.sha256(place.encode()).hexdigest()[:16]


def cache_of(
    url: str | Path, cache_dir: str | Path | None, cache_gb: float = 1.0, spares_copies: bool = False
) -> ShardCache:
    """Return the cache of a remote folder, below `cache_dir` (None: the user's cache folder)."""
    folder = Path(cache_dir or Path.home() / ".cache" / "keygrip" / "shards")
    set_folder = folder / hashlib.sha256(str(url).encode()).hexdigest()[:16]
    return ShardCache(str(url), set_folder, int(cache_gb * 1e9), spares_copies)


def _means_file_is_missing(error: Exception) -> bool:
    """Whether a transport error means that a file does not exist. fsspec raises FileNotFoundError for every HTTP error,
    with the actual reason as its cause."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    if type(cause).__module__.partition(".")[0] == "aiohttp":
        return getattr(cause, "status", None) in (404, 410)
    return not isinstance(cause, OSError)


@dataclass(eq=False)
class LimitedCopies:
    """Copies of shards that have one limit together.

    Args:
        folders: of the copies, one per shard set.
        made: those that this process made. removal_logged: whether a removal was logged.
    """

    folders: set[Path]
    made: set[Path] = field(default_factory=set)
    removal_logged: bool = False


def share_limit(caches: Iterable[ShardCache]) -> None:
    """Make the limit of each cache apply to the copies of all of them together, as if they were one set."""
    caches = list(caches)
    copies = LimitedCopies(
        {folder for cache in caches for folder in cache.copies.folders},
        {path for cache in caches for path in cache.copies.made},
    )
    for cache in caches:
        cache.copies = copies  # the caches of a run are pickled together, so that its workers share it too


class ShardCache:
    """Copies of remote files on a local disk, up to a limit; several processes may share the folder.

    Args:
        url: of the shard set; anything fsspec opens (https, s3 and gs with their packages, file).
        folder: of the copies.
        limit: bytes of shards, of this set and of those that `share_limit` adds; the least recently used copies are
            removed first. The requested copy always stays.
        spares_copies: to stay within the limit, remove only copies that this process made, and none from other
            processes, whose limit may be higher. Sets of which it made no copy then do not count towards the limit:
            their copies would take the place of its own.
    """

    def __init__(self, url: str, folder: Path, limit: int, spares_copies: bool = False) -> None:
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit
        self.spares_copies = spares_copies
        self.copies = LimitedCopies({folder})
        self._checked = False  # whether the copies of earlier runs were compared with the limit

    def fetch(self, name: str, size: int | None = None, fresh: bool = False) -> Path:
        """Return the local copy of a file; copy it now if it is missing or has another size.

        Args:
            size: expected size, bytes; None: any. fresh: copy the file again, so that changes of the remote set are
                read; if the remote file cannot be reached, the old copy is used and a warning is logged.

        Raises:
            FileNotFoundError: there is no such file. ConnectionError: it cannot be read, or it is unknown whether it
            exists. ModuleNotFoundError: a package that reads such addresses is missing. ShardError: it has another size
            than `size`.
        """
        target, copied = self.folder / name, False
        # one process copies, the others wait for it
        with locked(self.folder / f".{name}.lock", together_without=True):
            if not target.is_file() or (size is not None and target.stat().st_size != size):
                self._copy(name, target, size)
                copied = True
            elif fresh:
                try:
                    self._copy(name, target, size)
                    copied = True
                except (FileNotFoundError, ConnectionError) as error:
                    log.warning("%s is read as it was when it was copied: %s", self.url, error)
            os.utime(target)
        # other files do not count towards the limit; a copy that was there already takes no more space, and may not be
        # removed if copies of others are spared
        if target.suffix.lower() == SHARD and (copied or not (self._checked or self.spares_copies)):
            self._evict(keep=target)
            self._checked = True
        return target

    def fetch_optional(self, name: str) -> Path | None:
        """Return the result of `fetch` with `fresh=True`; None if there is no such file and no copy of it.

        Raises:
            ConnectionError: it is unknown whether the file exists, now and from earlier calls.
        """
        absent = self.folder / f".{name}.absent"
        try:
            copy = self.fetch(name, fresh=True)
        except FileNotFoundError:
            absent.touch()
            return None
        except ConnectionError as error:
            if not absent.is_file():
                raise
            log.warning("%s is taken to have no %s, as before: %s", self.url, name, error)
            return None
        absent.unlink(missing_ok=True)
        return copy

    def drop(self, name: str) -> None:
        """Remove the copy of a file that has changed."""
        with locked(self.folder / f".{name}.lock", together_without=True):
            (self.folder / name).unlink(missing_ok=True)

    def _copy(self, name: str, target: Path, size: int | None) -> None:
        import fsspec

        with atomic_path(target) as temporary:
            for attempt in range(3):
                try:
                    with (
                        full_disk_errors(target),
                        fsspec.open(f"{self.url}/{name}", "rb") as source,
                        temporary.open("wb") as copy,
                    ):
                        while block := source.read(1 << 20):
                            copy.write(block)
                        reported_size = getattr(source, "size", None)
                    received, expected = temporary.stat().st_size, size if reported_size is None else reported_size
                    # fsspec treats "no such range" as the end of a file
                    if expected is not None and received != expected:
                        raise OSError(f"{received} bytes came of {expected}")
                    break
                except DiskFullError:
                    raise
                except ImportError as error:  # of fsspec: "Install s3fs to access S3", caused by the package's absence
                    package = getattr(error.__cause__ or error, "name", None)
                    remedy = f" (pip install {package})" if package else ""
                    raise ModuleNotFoundError(f"{self.url} cannot be read: {error}{remedy}") from error
                except Exception as error:  # whatever the transport raises
                    if _means_file_is_missing(error):
                        raise FileNotFoundError(
                            f"{self.url}/{name} is not there: check the address, or write the set's files anew where "
                            "it lies (python -m keygrip.prepare step=manifest)"
                        ) from error
                    if attempt == 2:
                        raise ConnectionError(
                            f"{self.url}/{name} cannot be read ({error.__cause__ or error}): check the address and the "
                            "connection, or copy the shards to a local folder"
                        ) from error
                    time.sleep(RETRY_S * 4**attempt)
            if size is not None and temporary.stat().st_size != size:
                raise ShardError(
                    f"{self.url}/{name} has {temporary.stat().st_size} bytes, its manifest says {size}: it is cut off"
                )
        if target.suffix.lower() == SHARD:
            self.copies.made.add(target)

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used copies. Readers are not affected: open files stay readable until closed."""
        folders = {path.parent for path in self.copies.made} if self.spares_copies else self.copies.folders
        copies = []
        for path in (path for folder in folders for path in files_in(folder, SHARD)):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process has already removed it
            copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        removed, freed = 0, 0
        for _, size, path in sorted(copies):
            if total - freed <= self.limit:
                break
            if path != keep and not (self.spares_copies and path not in self.copies.made):
                path.unlink(missing_ok=True)
                self.copies.made.discard(path)
                removed, freed = removed + 1, freed + size
        if removed and not self.copies.removal_logged:  # log only once: later removals make room for one shard each
            self.copies.removal_logged = True
            sets = len(folders)
            of, place = (self.url, self.folder) if sets == 1 else (f"{sets} shard sets", self.folder.parent)
            log.info(
                "%d of %d copies of the shards of %s, %.3g of %.3g GB, are removed from %s, the least recently used "
                "first, and so on as others come: data.cache_gb=%g is the limit",
                *(removed, len(copies), of, freed / 1e9, total / 1e9, place, self.limit / 1e9),
            )
