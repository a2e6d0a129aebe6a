"""Files that are written whole or not at all, made once under a lock, and known by their hash.

Everything that keygrip writes goes through this module: checkpoints, shards, recordings, statistics, configuration,
metadata and results. A file appears under its name only when it is complete and on the disk; a process that is killed
leaves the previous file as it was. Temporaries are hidden files beside the target,
``.<name>.<host>-<pid>-<random>.writing``; those of processes that are gone are removed by a later write, when nothing
in them has changed for ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from keygrip.launch import started_together

log = logging.getLogger(__name__)

WRITING = ".writing"
BLOCK_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: `ulimit -f`
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
STALE_AFTER_S = 600.0  # without a change, after which what is half written is taken for left behind
LARGEST_RECORD = 1 << 26  # bytes, of `read_record`
LONGEST_INTEGER = 300  # digits; longer ones are no float either
USERINFO = re.compile(r"://[^/?#\s]*@")


class DiskFullError(OSError):
    """There is no room left for a file; the previous one is as it was and the temporary file is gone."""


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that takes the place of ``path`` when the block ends, and leaves no trace where the block fails.

    Folders above it are made. The content is flushed to the disk before the file is renamed.

    Args:
        path: the target. mode: "wb" or "w" (UTF-8).

    Raises:
        DiskFullError: the disk or the quota is full. ValueError: another mode.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_write writes whole files: mode is 'wb' or 'w', not {mode!r}")
    with (
        atomic_path(path) as temporary,
        temporary.open(mode, encoding="utf-8" if mode == "w" else None, newline="" if mode == "w" else None) as file,
    ):
        yield file


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """As :func:`atomic_write`, for libraries that open files themselves: the path to write to, of the same suffix.

    Raises:
        DiskFullError: the disk or the quota is full. FileNotFoundError: the block wrote no file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary = temporary.with_name(temporary.name + target.suffix)
    try:
        with full_disk_is_named(target):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        _flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """``text`` as UTF-8, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes) -> None:
    """``content``, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def json_text(
    content: Any, indent: int | None = None, ascii_only: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """``content`` as JSON that every reader takes: numbers that are not finite are null, for JSON has none.

    Args:
        indent, default: as for `json.dumps`. ascii_only: other characters are escaped, for any terminal.

    Raises:
        ValueError, TypeError: it is not JSON.
    """
    try:
        return json.dumps(content, indent=indent, ensure_ascii=ascii_only, default=default, allow_nan=False)
    except ValueError:  # also of what holds itself, at which this raises again
        standard = _finite(json.loads(json.dumps(content, default=default)))
        return json.dumps(standard, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_values(content: Any) -> Any:
    """``content`` as it comes back from a JSON file, to be stored and compared with what was stored: tuples are lists,
    numbers that are not finite their names ("Infinity"), and what JSON has no form for its `str`."""
    return json.loads(json.dumps(content, default=str), parse_constant=str)


def without_passwords(value: Any) -> Any:
    """Plain data in whose addresses neither a user nor a password stands: for what others get to see."""
    if isinstance(value, Mapping):
        return {key: without_passwords(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_passwords(child) for child in value)
    return USERINFO.sub("://", value) if isinstance(value, str) else value


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """``content`` as JSON (`json_text`) with a final newline, whole or not at all.

    Raises:
        ValueError, TypeError: it is not JSON; nothing is written then.
    """
    write_text(path, json_text(content, indent) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """The object in a small JSON file that a run, a sweep or a recording wrote, and that a full disk or somebody else
    may have damaged since.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read, is too large or holds no object; the message names the file.
    """
    try:
        if file.stat().st_size > LARGEST_RECORD:
            raise ValueError(f"it has more than {LARGEST_RECORD} bytes")
        content = json.loads(file.read_bytes(), parse_int=_integer)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no object of JSON")
    return content


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return int(digits)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes the name ``path`` when the block ends, and is removed where the block fails.

    Raises:
        FileExistsError: ``path`` exists with something in it, at the start or at the end.
        DiskFullError: the disk or the quota is full.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as temporary:
        yield temporary
        try:
            temporary.rename(target)  # an empty folder of that name is replaced
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                refuse_existing(target)
            raise
        _flush_folder(target.parent)


@contextlib.contextmanager
def scratch_folder(beside: str | Path) -> Iterator[Path]:
    """An empty hidden folder beside ``beside``, for files that are moved from it; removed when the block ends.

    Raises:
        DiskFullError: the disk or the quota is full.
    """
    target = Path(beside)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        with full_disk_is_named(target):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True, together_without: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on a file, across processes; the lock ends with the block or with the process. Where the
    file system has no locks (a cluster's disk may have none) a process that was started alone says so, once for each
    folder, and goes on.

    Args:
        path: the lock's own file, made where it is missing and left there. wait: False raises where another holds it.
        together_without: whether several processes that were started together go on without locks too: where each
            writes files whole, in which no harm is done when all do it; not where they append to a folder or divide
            work.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: the file system has no locks, and several processes would divide their work by them.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            cannot = f"{file.parent} cannot be locked ({error.strerror})"
            if not together_without and started_together() > 1:
                raise OSError(
                    f"{cannot}, so that several processes cannot divide the work: start one process alone, or use a "
                    "disk with file locks"
                ) from error
            if file.parent not in _without_locks:
                log.warning("%s: see that no other process writes into it", cannot)
            _without_locks.add(file.parent)
        yield


def is_locked(path: str | Path) -> bool | None:
    """Whether another process holds the lock of this file; None where the file system has no locks."""
    with _lock_file(Path(path)) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
    return False


@contextlib.contextmanager
def _lock_file(file: Path) -> Iterator[IO[Any]]:
    with file.open("a") as handle:
        _locks.add(handle)  # before it is held: another thread may fork meanwhile
        try:
            yield handle
        finally:
            _locks.discard(handle)


_locks: set[IO[Any]] = set()
_without_locks: set[Path] = set()  # folders of which that has been said


def _give_up_locks() -> None:
    """In a forked process: the lock is its parent's, and would outlive it with a loader worker that holds it too."""
    for handle in _locks:
        handle.close()
    _locks.clear()


os.register_at_fork(after_in_child=_give_up_locks)


def make_once(
    path: str | Path,
    complete: Callable[[Path], bool],
    make: Callable[[Path], None],
    together_without: bool = False,
) -> bool:
    """Makes what is missing, in one process at a time; the others wait and find it made. What is complete is not
    locked: it may lie where nothing can be written.

    Args:
        path: of the artefact. complete: whether it is there and whole. make: makes it; it writes atomically itself.
        together_without: as of `locked`: where it is one file.

    Returns:
        Whether this call made it.

    Raises:
        RuntimeError: it is still incomplete after ``make``. OSError: as `locked`.
    """
    target = Path(path)
    if complete(target):
        return False
    lock = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False, together_without=together_without))
        except BlockingIOError:
            log.info("another process makes %s: waiting for it", target)
            held.enter_context(locked(lock, together_without=together_without))
        if complete(target):
            return False
        make(target)
        if not complete(target):
            raise RuntimeError(f"{target} is incomplete after it was made")
        return True


def sha256_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts one behind the other, in hexadecimal; no two need be in memory at once."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return sha256_of(blocks_of(path))


def sha256_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return sha256_of([content])


def blocks_of(path: str | Path, size: int | None = None) -> Iterator[bytes]:
    """A file's content, or its first ``size`` bytes, in blocks."""
    with Path(path).open("rb") as file:
        left = file.seek(0, os.SEEK_END) if size is None else size
        file.seek(0)
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            yield block
            left -= len(block)


def nearest_existing(folder: Path) -> Path:
    """The first of a path and those above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def refuse_unwritable(target: str | Path, setting: str) -> None:
    """Tries to write where a result is to go, before hours are spent on it; leaves nothing.

    Raises:
        ValueError: `target` is a folder, or its folder takes no file.
    """
    path = Path(target)
    if path.is_dir():
        raise ValueError(f"{setting}={target} is a folder: name a file in it")
    try:
        probe = temporary_beside(nearest_existing(path.absolute().parent) / path.name)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{setting}={target} cannot be written ({error.strerror}): name another place") from error


def temporary_beside(target: Path) -> Path:
    """A name for the temporary file of ``target``, hidden, in the same folder, and unique."""
    here, now = (os.getpid(), target.parent), time.monotonic()
    if now - _looked.get(here, -math.inf) > STALE_AFTER_S:  # seldom: a folder may hold thousands of files
        _looked[here] = now
        _remove_stale(target.parent)
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{WRITING}")


_looked: dict[tuple[int, Path], float] = {}


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def _remove_stale(folder: Path) -> None:
    """Removes temporaries that processes of this machine left in a folder when they were killed.

    A process of another container or machine of the same host name is unknown here, though it lives: what it writes is
    known by its age alone.
    """
    pattern = re.compile(rf"\..+\.{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}{re.escape(WRITING)}(\.\w+)?")
    for path in folder.glob(f".*.{_host()}-*{WRITING}*"):
        found = pattern.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            with contextlib.suppress(OSError):
                changed = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
                if time.time() - changed < STALE_AFTER_S:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def full_disk_is_named(target: Path) -> Iterator[None]:
    """Turns the errors of a full disk, torch's own among them, into one sentence about ``target``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full_disk(error):
            raise
        raise DiskFullError(
            errno.ENOSPC, f"no space left for {target}: free some or choose another folder; nothing was written"
        ) from error


def _is_full_disk(error: OSError | RuntimeError) -> bool:
    if isinstance(error, DiskFullError):
        return False
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    # torch's zip writer reports every failed write as an assertion of its own, without the system's reason
    text = str(error)
    return "inline_container" in text or "PytorchStreamWriter" in text or "unexpected pos" in text


def refuse_existing(path: str | Path) -> None:
    """Raises FileExistsError: a folder that is to be written is there with something in it, or as something else."""
    target = Path(path)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, "it exists already: remove it or choose another folder", str(target))


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
