"""Write files atomically, create artefacts once under a lock, and hash files.

Checkpoints, shards, recordings, exports, statistics, configuration, metadata and results are written through this
module. A file or folder appears under its name only when it is complete and on the disk. If the process is killed, the
previous file stays unchanged. Temporary files are hidden files next to the target,
``.<name>.<host>-<pid>-<random>.writing<suffix>``. A later write removes the temporary files of dead processes if they
have not changed for ten minutes.

Not written through it: the cache of decoded frames (`data/robot/frame_cache.py`), which fills its files in place, with
a checksum per frame, and locks them itself; the episodes of an evaluation, appended line by line; logs; and what other
packages download.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from keygrip.launch import started_together

log = logging.getLogger(__name__)

WRITING = ".writing"
BLOCK_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: `ulimit -f`
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
STALE_AFTER_S = 600.0  # an incomplete file without a change for this long counts as abandoned
FLUSHES = 8  # at the same time: a journaling file system then writes its journal once for several files
LARGEST_RECORD = 1 << 26  # maximum bytes for `read_record`
LONGEST_INTEGER = 300  # digits; longer integers do not fit into a float either
USERINFO = re.compile(r"://[^/?#\s]*@")


class DiskFullError(OSError):
    """The disk is full. The previous file is unchanged, and the temporary file is removed."""


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yield a file that replaces ``path`` when the block ends; if the block fails, the file is removed.

    Missing parent folders are created. The content is flushed to the disk before the file is renamed.

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
    """As :func:`atomic_write`, for libraries that open files themselves: yield a path with the same suffix.

    Raises:
        DiskFullError: the disk or the quota is full. FileNotFoundError: the block wrote no file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary = temporary.with_name(temporary.name + target.suffix)
    try:
        with full_disk_errors(target):
            yield temporary
            _flush(temporary)
            temporary.replace(target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, completely or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content``, completely or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def json_text(
    content: Any, indent: int | None = None, ascii_only: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """Return ``content`` as standard JSON. Numbers that are not finite become null, because JSON has no such numbers.

    Args:
        indent, default: as for `json.dumps`. ascii_only: escape all other characters, for any terminal.

    Raises:
        ValueError, TypeError: the content cannot be represented as JSON.
    """
    try:
        return json.dumps(content, indent=indent, ensure_ascii=ascii_only, default=default, allow_nan=False)
    except ValueError:  # also for content that contains itself, for which the next line raises again
        standard = _replace_non_finite(json.loads(json.dumps(content, default=default)))
        return json.dumps(standard, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _replace_non_finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_replace_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_values(content: Any) -> Any:
    """Return ``content`` as it would be read from a JSON file, to compare it with stored content: tuples become lists,
    numbers that are not finite become their names ("Infinity"), and objects without a JSON form become their `str`."""
    return json.loads(json.dumps(content, default=str), parse_constant=str)


def without_passwords(value: Any) -> Any:
    """Return plain data without user names and passwords in its URLs, for output that other people see."""
    if isinstance(value, Mapping):
        return {key: without_passwords(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_passwords(child) for child in value)
    return USERINFO.sub("://", value) if isinstance(value, str) else value


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write ``content`` as JSON (`json_text`) with a final newline, completely or not at all.

    Raises:
        ValueError, TypeError: the content cannot be represented as JSON; nothing is written.
    """
    write_text(path, json_text(content, indent) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """Read the object in a small JSON file that a run, a sweep or a recording wrote. The file may be damaged, by a full
    disk or by another program.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, is too large or contains no object; the message names the file.
    """
    try:
        if file.stat().st_size > LARGEST_RECORD:
            raise ValueError(f"it has more than {LARGEST_RECORD} bytes")
        content = json.loads(file.read_bytes(), parse_int=_parse_integer)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no object of JSON")
    return content


def _parse_integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return int(digits)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``path`` when the block ends (`move_folder`), and removed if it fails.

    Raises:
        FileExistsError: ``path`` exists and is not empty, at the start or at the end.
        DiskFullError: the disk or the quota is full.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as temporary:
        yield temporary
        move_folder(temporary, target)


def move_folder(temporary: Path, target: Path) -> None:
    """Flush every file and folder in a temporary folder to the disk, then rename it to ``target``.

    Raises:
        FileExistsError: ``target`` exists and is not an empty folder, which would be replaced.
    """
    with ThreadPoolExecutor(FLUSHES) as threads:
        list(threads.map(_flush, [temporary, *temporary.rglob("*")]))  # raises the first error
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            refuse_existing(target)
        raise
    _flush(target.parent)


@contextlib.contextmanager
def scratch_folder(beside: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to ``beside``, for files that are moved out of it; removed when the block ends.

    Raises:
        DiskFullError: the disk or the quota is full.
    """
    target = Path(beside)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        with full_disk_errors(target):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True, together_without: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, across processes, until the block or the process ends. If the file system has
    no locks (as on some clusters), a process that was started alone logs a warning, once per folder, and continues.

    Args:
        path: the lock's own file, created if missing and not removed. wait: False: raise if another process holds it.
        together_without: whether several processes that were started together also continue without locks. True is safe
            if each process writes complete files, False is needed if they append to a folder or divide work.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
        OSError: the file system has no locks, and several processes need them to divide their work.
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
                log.warning("%s: make sure that no other process writes into it", cannot)
            _without_locks.add(file.parent)
        yield


@contextlib.contextmanager
def locked_or_wait(path: str | Path, target: Path, together_without: bool = False) -> Iterator[None]:
    """Hold a lock as `locked`; if another process holds it, log that it writes ``target`` and wait."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False, together_without=together_without))
        except BlockingIOError:
            log.info("another process writes %s: waiting for it", target)
            stack.enter_context(locked(path, together_without=together_without))
        yield


def is_locked(path: str | Path) -> bool | None:
    """Return whether another process holds the lock of this file; None if the file system has no locks."""
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
        _locks.add(handle)  # before the lock is held, because another thread may fork meanwhile
        try:
            yield handle
        finally:
            _locks.discard(handle)


_locks: set[IO[Any]] = set()
_without_locks: set[Path] = set()  # folders for which the warning has been logged


def _give_up_locks() -> None:
    """Close the locks in a forked process: they belong to its parent, and a worker could hold them after it ended."""
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
    """Create a missing artefact in one process; other processes wait and then use it. A complete artefact is not
    locked, because it may be in a read-only folder.

    Args:
        path: path of the artefact. complete: returns whether the artefact exists and is complete. make: creates it,
            with atomic writes. together_without: as for `locked`; True for an artefact of a single file.

    Returns:
        Whether this call created it.

    Raises:
        RuntimeError: the artefact is still incomplete after ``make``. OSError: as `locked`.
    """
    target = Path(path)
    if complete(target):
        return False
    with locked_or_wait(target.with_name(f".{target.name}.lock"), target, together_without):
        if complete(target):
            return False
        make(target)
        if not complete(target):
            raise RuntimeError(f"{target} is incomplete after it was made")
        return True


def sha256_of(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of the concatenated parts, in hexadecimal; only one part is in memory at a time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return sha256_of(read_blocks(path))


def sha256_bytes(content: bytes) -> str:
    """Return the SHA-256 of ``content``, in hexadecimal."""
    return sha256_of([content])


def read_blocks(path: str | Path, size: int | None = None) -> Iterator[bytes]:
    """Yield a file's content, or its first ``size`` bytes, in blocks."""
    with Path(path).open("rb") as file:
        left = file.seek(0, os.SEEK_END) if size is None else size
        file.seek(0)
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            yield block
            left -= len(block)


def nearest_existing(folder: Path) -> Path:
    """Return the path itself if it exists, else its nearest existing parent."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def refuse_file(folder: str | Path, setting: str) -> None:
    """Raise ValueError if a setting names a file, or a path below a file, where a folder is needed."""
    existing = nearest_existing(Path(folder))
    if not existing.is_dir():
        place = "" if existing == Path(folder) else f": {existing}"
        raise ValueError(f"{setting}={folder}{place} is a file: give a folder")


def refuse_unwritable(target: str | Path, setting: str) -> None:
    """Check that a result file can be written, before hours are spent on computing it. No file is left behind.

    Raises:
        ValueError: `target` is a folder, or its folder is not writable.
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
    """Return a unique, hidden name for the temporary file of ``target``, in the same folder."""
    key, now = (os.getpid(), target.parent), time.monotonic()
    if now - _looked.get(key, -math.inf) > STALE_AFTER_S:  # rarely, because a folder may have thousands of files
        _looked[key] = now
        remove_stale(target.parent)
    return target.with_name(f".{target.name}.{_host_name()}-{os.getpid()}-{secrets.token_hex(4)}{WRITING}")


_looked: dict[tuple[int, Path], float] = {}


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def remove_stale(folder: Path, of_any_machine: bool = False) -> None:
    """Remove temporary files in a folder that killed processes left behind: of this machine, or of any.

    A live process on another machine, or in another container with the same host name, is not visible here. Its
    temporary files can only be recognised by their age.
    """
    own = _host_name()
    host = "[A-Za-z0-9_]*" if of_any_machine else re.escape(own)
    pattern = re.compile(rf"\..+\.({host})-(\d+)-[0-9a-f]{{8}}{re.escape(WRITING)}(\.\w+)?")
    for path in folder.glob(f".*-*{WRITING}*"):
        match = pattern.fullmatch(path.name)
        if match and not (match[1] == own and _is_alive(int(match[2]))):
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
def full_disk_errors(target: Path) -> Iterator[None]:
    """Convert the errors of a full disk, including torch's own, to a `DiskFullError` that names ``target``."""
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
    # torch's zip writer reports every failed write as an assertion error, without the system's reason
    text = str(error)
    return "inline_container" in text or "PytorchStreamWriter" in text or "unexpected pos" in text


def refuse_existing(path: str | Path) -> None:
    """Raise FileExistsError if a folder to be written exists and is not empty, or if the path is not a folder."""
    target = Path(path)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, "it exists already: remove it or choose another folder", str(target))


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
