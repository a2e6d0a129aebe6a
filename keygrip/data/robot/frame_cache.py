"""Cache of decoded frames on disk, shared through the page cache by all loader workers and ranks of a machine.

There is one file of raw pixels and one of marks per data set and camera. Their names contain a hash of the frames'
sources (paths, sizes, modification times), so a changed file is never served from an old cache. A slot is filled when
its frame is first requested: pixels first, then its mark, both by plain writes (a full disk is then an error that is
caught, not a signal that kills the process). The mark is a checksum. Each process checks it when it first reads a
slot; pixels that did not reach the disk because of a crash are decoded again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keygrip.artifacts import NO_LOCKS
from keygrip.data.robot.schema import FrameSource

log = logging.getLogger(__name__)

STALE_AFTER_S = 86400.0  # an unused cache of other content is removed when it is older than a day
# For caches of another machine, whose locks may not be visible here. A container has a new machine name every time.
STALE_ELSEWHERE_S = 7 * STALE_AFTER_S
TOUCHED_EVERY_S = 3600.0  # the time stamp of a cache in use is never much older
DISK_RESERVE = 1 << 30  # bytes of the disk that the cache leaves free


@dataclass(frozen=True)
class FrameShape:
    """Size of a demo's frames in the cache: `frames` images of height x width x 3."""

    frames: int
    height: int
    width: int


class FrameCache:
    """Frames of one camera of many demos, decoded at most once each while the size limit lasts.

    Args:
        sources: the frames of each demo.
        shapes: their number and size.
        folder: where the cache files go.
        name: the camera's name, part of the file names.
        limit_bytes: frames beyond it are decoded each time (logged once); 0 caches nothing.
        reserved_bytes: free bytes of the same disk that other caches will fill.

    `unwritten_bytes` is what this cache may still take from the disk.

    Picklable: a loader worker opens the files itself.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        shapes: Sequence[FrameShape],
        folder: Path,
        name: str,
        limit_bytes: int,
        reserved_bytes: int = 0,
    ) -> None:
        self.sources = list(sources)
        self.shapes = list(shapes)
        sizes = np.array([shape.height * shape.width * 3 for shape in shapes], dtype=np.int64)
        counts = np.array([shape.frames for shape in shapes], dtype=np.int64)
        self._frame_bytes = sizes
        self._first_byte = np.concatenate([[0], np.cumsum(sizes * counts)])
        self._first_slot = np.concatenate([[0], np.cumsum(counts)])
        self.total_bytes = int(self._first_byte[-1])
        self.total_frames = int(self._first_slot[-1])
        self.limit_bytes = min(int(limit_bytes), self.total_bytes)
        self.unwritten_bytes = 0
        self.pixels_path: Path | None = None
        self.marks_path: Path | None = None
        self._open_in: int | None = None
        if self.limit_bytes > 0:
            self._prepare(folder, name, reserved_bytes)

    def _prepare(self, folder: Path, name: str, reserved_bytes: int) -> None:
        digest = hashlib.sha256()
        for source, shape in zip(self.sources, self.shapes, strict=True):
            digest.update(f"{shape}\n{source.identity()}\n".encode())
        # the machine is part of the name: on a network disk another machine's writes may become visible in any order.
        # Names of cameras and machines contain no "@", so the prefix of "top" does not match files of "top-left"
        machine = "".join(letter if letter.isalnum() else "-" for letter in platform.node()) or "host"
        stem = f"frames-{name}@{machine}@{digest.hexdigest()[:16]}"
        pixels, marks = folder / f"{stem}.pixels", folder / f"{stem}.marks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale(folder, f"frames-{name}@", machine, keep=stem)
            allocated_bytes = pixels.stat().st_blocks * 512 if pixels.exists() else 0
            free = max(0, shutil.disk_usage(folder).free - reserved_bytes)
            unwritten_bytes = max(0, self.limit_bytes - allocated_bytes)
            if unwritten_bytes > free - DISK_RESERVE:
                log.warning(
                    "no frame cache: it needs %.1f GB in %s, where %.1f GB are free; frames are decoded every time "
                    "(data.cache_gb sets the limit, data.cache_dir the place)",
                    self.limit_bytes / 1e9,
                    folder,
                    free / 1e9,
                )
                self.limit_bytes = 0
                return
            for path, size in ((pixels, self.total_bytes), (marks, 4 * self.total_frames)):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    if os.fstat(descriptor).st_size != size:
                        os.ftruncate(descriptor, size)  # sparse: uses disk space only for filled slots
                finally:
                    os.close(descriptor)
            os.utime(marks)  # else another process could remove it as stale before it is opened and locked here
        except OSError as error:
            log.warning("no frame cache: %s cannot be written (%s); frames are decoded every time", folder, error)
            self.limit_bytes = 0
            return
        self.pixels_path, self.marks_path, self.unwritten_bytes = pixels, marks, unwritten_bytes
        if self.limit_bytes < self.total_bytes:
            log.warning(
                "the frame cache holds %.2f of %.2f GB of frames of camera %s; the others are decoded every time "
                "(raise data.cache_gb to keep them)",
                self.limit_bytes / 1e9,
                self.total_bytes / 1e9,
                name,
            )

    @staticmethod
    def _remove_stale(folder: Path, prefix: str, machine: str, keep: str) -> None:
        """Remove caches of other content that no process has open and that were not used for a day (for caches of
        another machine: a week)."""
        for marks in folder.glob(f"{prefix}*.marks"):
            limit = STALE_AFTER_S if marks.name.startswith(f"{prefix}{machine}@") else STALE_ELSEWHERE_S
            try:
                if marks.stem == keep or time.time() - marks.stat().st_mtime < limit:
                    continue
                descriptor = os.open(marks, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if time.time() - marks.stat().st_mtime >= limit:  # neither used nor recreated before it was locked
                        marks.with_suffix(".pixels").unlink(missing_ok=True)
                        marks.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)
            except OSError as error:
                # in use, owned by another user, or removed by another starting process: no problem for this cache
                if error.errno in NO_LOCKS:
                    _warn_not_removed(folder)

    def __getstate__(self) -> dict[str, object]:
        dropped = ("_open_in", "_pixels", "_marks", "_pixels_file", "_marks_file", "_compared")
        return {**{key: value for key, value in self.__dict__.items() if key not in dropped}, "_open_in": None}

    def _open(self) -> bool:
        """Open the files in this process; after a fork they are opened again, so that no two processes share the record
        of compared slots. If they cannot be opened, log it once and return False."""
        assert self.pixels_path is not None
        assert self.marks_path is not None
        try:
            with contextlib.ExitStack() as opened:
                self._pixels_file = os.open(self.pixels_path, os.O_RDWR)
                opened.callback(os.close, self._pixels_file)
                self._marks_file = os.open(self.marks_path, os.O_RDWR)
                opened.callback(os.close, self._marks_file)
                try:
                    fcntl.flock(self._marks_file, fcntl.LOCK_SH)
                except OSError as error:  # where nothing can be locked, `_remove_stale` removes nothing
                    if error.errno not in NO_LOCKS:
                        raise
                self._touch()
                pixels = np.memmap(self.pixels_path, dtype=np.uint8, mode="r", shape=(self.total_bytes,))
                marks = np.memmap(self.marks_path, dtype=np.uint32, mode="r", shape=(self.total_frames,))
                opened.pop_all()
        except (OSError, ValueError) as error:  # ValueError: a file is shorter than the mapping
            log.warning("no frame cache: it cannot be opened (%s); frames are decoded every time", error)
            self.limit_bytes = 0
            return False
        self._pixels, self._marks = pixels, marks
        self._compared = np.zeros(self.total_frames, dtype=bool)
        self._open_in = os.getpid()
        return True

    def _touch(self) -> None:
        self._touched = time.monotonic()
        os.utime(self._marks_file)

    def close(self) -> None:
        """Close this process's files."""
        if self._open_in == os.getpid():
            os.close(self._pixels_file)
            os.close(self._marks_file)
            del self._pixels, self._marks
        self._open_in = None

    def __del__(self) -> None:
        if getattr(self, "_open_in", None) == os.getpid():
            self.close()

    def read(self, demo: int, frame: int) -> np.ndarray:
        """Return frame `frame` of demo number `demo`: H x W x 3 uint8 (do not write into it)."""
        first = int(self._first_byte[demo] + frame * self._frame_bytes[demo])
        last = first + int(self._frame_bytes[demo])
        if last > self.limit_bytes:
            return self.sources[demo].read(frame)
        if self._open_in != os.getpid() and not self._open():
            return self.sources[demo].read(frame)
        if time.monotonic() - self._touched > TOUCHED_EVERY_S:
            with contextlib.suppress(OSError):  # then it may appear unused and be removed
                self._touch()
        slot = int(self._first_slot[demo]) + frame
        shape = self.shapes[demo]
        mark = int(self._marks[slot])
        if mark:
            pixels = self._pixels[first:last]
            if self._compared[slot] or _mark(pixels) == mark:
                self._compared[slot] = True
                return np.asarray(pixels).reshape(shape.height, shape.width, 3)
        image = np.ascontiguousarray(self.sources[demo].read(frame))
        if image.shape != (shape.height, shape.width, 3):
            raise ValueError(f"frame {frame} has shape {image.shape}, {(shape.height, shape.width, 3)} was promised")
        try:
            _write_all_at(self._pixels_file, image.reshape(-1).data, first)
            _write_all_at(self._marks_file, _mark(image.reshape(-1)).to_bytes(4, "little"), 4 * slot)
        except OSError as error:
            log.warning("the frame cache stops growing (%s); frames are decoded every time", error)
            self.limit_bytes = 0
        return image


@functools.cache
def _warn_not_removed(folder: Path) -> None:
    """Log a warning once per folder, not once per cache and camera."""
    log.warning("old frame caches in %s are not removed: they cannot be locked", folder)


def _mark(pixels: np.ndarray) -> int:
    """Return a checksum that is never 0 (0 marks an empty slot)."""
    return zlib.adler32(pixels.data) or 1


def _write_all_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
