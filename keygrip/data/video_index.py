"""Times of a video's frames, read from its packets without decoding.

To find them, the whole file is read. Of videos below a folder for which `keep_indices` names a cache folder, each index
is therefore stored there, named by a hash of the file's path, size and times of change; other processes and later
starts read it. Indices of other videos stay in memory.
Loader workers that are not forked (macOS) do not know such folders: each reads the videos again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keygrip.artifacts import write_bytes
from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.untrusted_files import read_npz
from keygrip.data.video_containers import open_container

log = logging.getLogger(__name__)

FOLDER = "video-indices"  # in the cache folder of a data set
IN_MEMORY = 256  # stored indices that a process keeps; reading one again is faster than opening its video


@dataclass(frozen=True)
class VideoIndex:
    """Times of a video's frames.

    Args:
        times: int64 [N], presentation times of the frames, ascending. keys: int64 [K, 2], presentation and decoding
            time of each key frame, ascending. unit_s: unit of these times, seconds.
    """

    times: np.ndarray
    keys: np.ndarray
    unit_s: float


_FOLDERS: dict[Path, Path] = {}  # cache folder by folder of videos
_NOT_STORED: dict[str, VideoIndex] = {}  # by file; inherited by loader workers that are forked
# by process and file; a process that was forked while one was held does not wait for it
_LOCKS: dict[tuple[int, str], threading.Lock] = {}
_REPORTED: set[Path] = set()  # folders that cannot be written


def file_identity(path: Path) -> str:
    """Return a text that changes when the file changes: its path, size and modification time."""
    stat = path.stat()
    return f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"


def _file_version(path: Path) -> str:
    """Return a text that also changes when a file's content is replaced by another one of equal size and modification
    time, as when a damaged file is restored: an index of the damaged one would remain."""
    return f"{file_identity(path)}:{path.stat().st_ctime_ns}"


def keep_indices(root: Path, cache_dir: Path) -> None:
    """Store the indices of the videos below `root` in `cache_dir`, from now on, and read them from there."""
    _FOLDERS[root.absolute()] = cache_dir.absolute() / FOLDER


def video_index(path: Path) -> VideoIndex:
    """Return the index of a video file: from memory, from its cache folder, or from the file's packets. Raise OSError
    if the file cannot be read."""
    identity = _file_version(path)
    stored = _stored_file(path, identity)
    if (index := _known_index(identity, stored)) is not None:
        return index
    key = (os.getpid(), identity)
    try:
        with _LOCKS.setdefault(key, threading.Lock()):  # several threads read episodes of one file
            if (index := _known_index(identity, stored)) is None:
                index = _make_index(path)
                if stored is None or _file_version(path) != identity or not _store(index, stored):
                    _NOT_STORED[identity] = index
            return index
    finally:
        _LOCKS.pop(key, None)


def _stored_file(path: Path, identity: str) -> Path | None:
    """Return the file for a video's index; None: it is in no folder whose indices are kept."""
    folder = next((_FOLDERS[parent] for parent in path.absolute().parents if parent in _FOLDERS), None)
    if folder is None:
        return None
    name = hashlib.sha256(identity.encode()).hexdigest()
    return folder / name[:2] / f"{name[2:34]}.npz"  # subfolders, since a data set may have 100 000 videos


def _known_index(identity: str, stored: Path | None) -> VideoIndex | None:
    if identity in _NOT_STORED:
        return _NOT_STORED[identity]
    try:
        return None if stored is None else _load(stored)
    except BadSample:  # it is missing or damaged
        return None


@functools.lru_cache(IN_MEMORY)
def _load(stored: Path) -> VideoIndex:
    arrays = read_npz(stored)
    with convert_errors(stored):
        index = VideoIndex(arrays["times"], arrays["keys"], float(arrays["unit_s"]))
        _check(index)
    return index


def _check(index: VideoIndex) -> None:
    """Raise ValueError if arrays of a stored index are not those of an index."""
    times, keys = index.times, index.keys
    if times.ndim != 1 or keys.ndim != 2 or keys.shape[1] != 2 or not times.dtype == keys.dtype == np.int64:
        raise ValueError(f"times {times.shape} {times.dtype}, key frames {keys.shape} {keys.dtype} are not an index")
    if not (np.all(times[1:] > times[:-1]) and np.all(keys[1:, 0] > keys[:-1, 0])):
        raise ValueError("times of frames or key frames do not increase")
    if not (np.isin(keys[:, 0], times).all() and np.isfinite(index.unit_s) and index.unit_s > 0):
        raise ValueError("a key frame is none of the frames, or the unit of time is not positive")


def _store(index: VideoIndex, stored: Path) -> bool:
    """Write an index. Return False if its folder cannot be written."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, times=index.times, keys=index.keys, unit_s=np.float64(index.unit_s))
    try:
        write_bytes(stored, buffer.getvalue())
    except OSError as error:
        if stored.parent.parent not in _REPORTED:
            _REPORTED.add(stored.parent.parent)
            log.info("%s cannot be written (%s): videos are read again next time", stored.parent.parent, error)
        return False
    return True


def _make_index(path: Path) -> VideoIndex:
    """Read the packets without decoding them. Their sorted presentation times are those of the frames."""
    container, stream = open_container(path)
    timestamps: list[int] = []
    keys: list[tuple[int, int]] = []
    with container:
        unit_s = float(stream.time_base)  # read it here: closing the container frees the stream's memory
        for packet in container.demux(stream):
            if packet.pts is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise OSError(f"{path}: the video is cut off or damaged after {len(timestamps)} frames")
            timestamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
    if len(set(timestamps)) != len(timestamps):
        raise OSError(f"{path}: two frames of the video carry the same time stamp, so frames cannot be told apart")
    times, key_times = np.array(sorted(timestamps), np.int64), np.array(sorted(keys), np.int64)
    return VideoIndex(times, key_times.reshape(-1, 2), unit_s)
