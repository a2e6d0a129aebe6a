"""Integrity of recordings: manifests of hashes, one check of every frame, the version of a data set.

A native recording holds `manifest.json`, written together with it: size and SHA-256 of each of its files. When a data
set is first used, every file is compared with its manifest and every frame is decoded. The results are stored in
`verified.json` in the data set's cache folder, keyed by the files' names, sizes and modification times. Later starts
check only recordings that changed or that an earlier start found broken. Foreign recordings have no manifest: their
frames and poses are hashed during the check.

Threads check the frames: decoders and hashes release Python's lock, and no data have to be sent to another process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.artifacts import locked, sha256_bytes, sha256_file, write_json
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import HOSTILE, BadSample, convert_errors, is_of_the_machine, reason_of
from keygrip.data.robot.corrections import OffsetFrames
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.fingerprint import demo_fingerprint, timing_fingerprint
from keygrip.data.robot.frames import JpegFrames, NumberedFiles, VideoFrames, refuse_deep_pixels, verify_source
from keygrip.data.robot.schema import CameraTrack, Demo, DemoError, FrameSource, demo_guard
from keygrip.data.untrusted_files import inside, open_image, read_bytes, read_json
from keygrip.data.video import frames_between
from keygrip.launch import is_helper_process, name_of_start
from keygrip.progress import Progress

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "keygrip.manifest/1"
VERIFIED = "verified.json"
THREADS = 8  # more threads only wait for the disk
DEPTH_CHECK = "uint16"  # changed with what depth must be: recordings that passed another check are checked again
KEPT_ENTRIES = 200_000  # largest number of entries in the file of checked recordings
KEPT_EVERY_S = 60.0  # interval at which results so far are stored: a first check may take hours
AGAIN = "restore the file, or, where it was changed on purpose, run prepare step=manifest again=true"


# ---- manifests -------------------------------------------------------------------------------------------------------


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``{"bytes", "sha256"}`` of each file below a recording's folder, by its path relative to the folder.
    Hidden files are skipped."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in sorted(name for name, _ in _files(folder) if name != MANIFEST)
    }


def write_manifest(folder: Path) -> None:
    """Write the manifest of a native recording from its current files."""
    write_json(folder / MANIFEST, {"schema": MANIFEST_SCHEMA, "files": file_hashes(folder)})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the files of a recording's manifest in the form of `file_hashes`; None if there is no manifest.

    Raises:
        BadSample: it is not a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = read_json(path)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("schema") != MANIFEST_SCHEMA:
        raise BadSample(MANIFEST, f"it is not of schema {MANIFEST_SCHEMA!r}; {AGAIN}")
    for name, entry in files.items():
        inside(folder, name)
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("bytes")) is not int
        ):
            raise BadSample(MANIFEST, f"its entry of {name[:80]!r} has no bytes and sha256; {AGAIN}")
    return files


def compare_with_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BadSample if a file of the manifest is missing or is not the one that was recorded."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise BadSample(name, f"it is missing, and {MANIFEST} lists it; {AGAIN}")
        if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            raise BadSample(name, f"it is not the file that was recorded (its hash is not that of {MANIFEST}); {AGAIN}")


def make_manifests(root: Path | str, again: bool = False, max_broken_share: float = 0.1) -> dict[str, Any]:
    """Write the manifests of native recordings that have none, after decoding every frame.

    Args:
        root: folder of native recordings. again: also write those that exist (files were changed on purpose).
        max_broken_share: a larger share of unreadable recordings is an error.

    Raises:
        FileNotFoundError: there is no recording. ValueError: too many are broken.
    """
    report: dict[str, Any] = {"root": str(root), "recordings": 0, "written": 0, "broken": []}
    for reference in Progress(find_demos(root, "native"), desc=f"manifests of {root}", unit="demo"):
        report["recordings"] += 1
        if not again and (reference.path / MANIFEST).is_file():
            continue
        try:
            demo = reference.read(uncalibrated=True)
            _check_pixels(demo, tuple(demo.cameras), depth=True)
        except DemoError as error:
            report["broken"].append(str(error))
            log.warning("no manifest: %s", error)
            continue
        write_manifest(reference.path)
        report["written"] += 1
    if len(report["broken"]) > max_broken_share * report["recordings"]:
        raise ValueError(
            f"{len(report['broken'])} of {report['recordings']} recordings in {root} are broken, more than "
            f"max_broken_share={max_broken_share:g} allows; the first: {report['broken'][0]}"
        )
    return report


# ---- one check of everything -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Result of the check of one recording. content: hash of its whole content. problem: why it is left out. start:
    `name_of_start` of the processes that found a problem. views: why a camera other than the first cannot be used, by
    camera name."""

    name: str
    content: str
    problem: str | None = None
    start: str = ""
    views: dict[str, str] = field(default_factory=dict)


def data_version(contents: Mapping[str, str], demos: Sequence[Demo]) -> str:
    """Return one hash of a data set, computed from the names and hashes of its recordings.

    Args:
        contents: as in `Verdict`, by name. demos: the recordings. The content of one whose files are not hashed lacks
            its times and corrected frames: they are added here.
    """
    timing = {demo.name: timing_fingerprint(demo) for demo in demos if not _is_native(demo)}
    hashes = {name: content + timing.get(name, "") for name, content in contents.items()}
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()[:16]


def verify(
    demos: Sequence[Demo], cameras: Sequence[str], depth: bool, cache_dir: Path, threads: int | None = None
) -> list[Verdict]:
    """Check every file and frame of recordings. Recordings that passed before are compared by size and time only.

    Results are stored every minute, and when the check is interrupted. Processes that were started together leave out
    the same recordings: the results of the first process hold for all.

    Args:
        demos: as read. cameras: cameras whose frames are decoded. depth: decode their depth too. cache_dir: folder for
            the results. threads: number of threads; None: one per core, at most 8.

    Returns:
        One verdict per recording, in their order. Errors of the machine (no file descriptors left) pass unchanged.
    """
    identities = [_recording_identity(demo, cameras, depth) for demo in demos]
    with _writable_lock(cache_dir):
        verdicts = _load_valid_verdicts(cache_dir / VERIFIED)
        fresh = [index for index, identity in enumerate(identities) if identity not in verdicts]
        if fresh:
            workers = min(threads or usable_cores(), THREADS)
            with ThreadPoolExecutor(workers) as pool:
                checked = pool.map(lambda index: _verdict(demos[index], cameras, depth), fresh)
                progress = Progress(
                    checked,
                    desc="verifying recordings",
                    total=len(fresh),
                    unit="demo",
                    leave=False,
                )
                saved_at = time.monotonic()
                try:
                    for index, verdict in zip(fresh, progress, strict=True):
                        verdicts[identities[index]] = verdict
                        if time.monotonic() - saved_at > KEPT_EVERY_S:
                            _keep(verdicts, cache_dir)
                            saved_at = time.monotonic()
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)  # an interruption waits for no further recordings
                    _keep(verdicts, cache_dir)
    return [verdicts[identity] for identity in identities]


def _keep(verdicts: Mapping[str, Verdict], cache_dir: Path) -> None:
    entries = {identity: asdict(verdict) for identity, verdict in list(verdicts.items())[-KEPT_ENTRIES:]}
    try:
        write_json(cache_dir / VERIFIED, entries, indent=None)
    except OSError as error:
        log.info("%s cannot be written (%s): the recordings are verified again next time", cache_dir, error)


@contextlib.contextmanager
def _writable_lock(folder: Path) -> Iterator[None]:
    """If the folder is writable, let one process check at a time; the others then read its results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        yield
        return
    with locked(folder / f".{VERIFIED}.lock", together_without=True):
        yield


def _load_valid_verdicts(path: Path) -> dict[str, Verdict]:
    """Return results of earlier checks that are still valid; none if the file is missing or damaged.

    A problem is valid only for the processes of the same start: a restored file has its old size and time, and a disk
    may have failed only for a moment. Lightning starts its helper processes after the first process checked everything.
    """
    helper, start = is_helper_process(), name_of_start()
    with contextlib.suppress(BadSample), convert_errors(path):
        verdicts = {str(identity): Verdict(**entry) for identity, entry in read_json(path, 1 << 28).items()}
        return {
            identity: verdict
            for identity, verdict in verdicts.items()
            if (verdict.problem is None and not verdict.views) or helper or (start and verdict.start == start)
        }
    return {}


def _recording_identity(demo: Demo, cameras: Sequence[str], depth: bool) -> str:
    """Return a hash that changes with a recording's poses, with the names, sizes or times of its files, and with
    `DEPTH_CHECK` if depth is used."""
    digest = hashlib.sha256(f"{demo_fingerprint(demo)}\n{list(cameras)}\n{depth and DEPTH_CHECK}\n".encode())
    if _is_native(demo):
        lines = sorted(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in _files(demo.path))
    else:
        lines = [
            _identity_of(source)
            for _, track in _camera_tracks(demo, cameras)
            for source in _frame_sources(track, depth)
        ]
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()


def _identity_of(source: FrameSource) -> str:
    """Return the identity of a camera's images, or why it has none: the check of its frames then reports that."""
    try:
        return source.identity()
    except OSError as error:
        if is_of_the_machine(error):
            raise
        return reason_of(error)


def _verdict(demo: Demo, cameras: Sequence[str], depth: bool) -> Verdict:
    views: dict[str, str] = {}
    try:
        with demo_guard(demo.name):
            content = _checked_content(demo, cameras, depth, views)
    except DemoError as error:
        return Verdict(demo.name, "", error.reason, name_of_start())
    return Verdict(demo.name, content, start=name_of_start() if views else "", views=views)


def _checked_content(demo: Demo, cameras: Sequence[str], depth: bool, views: dict[str, str]) -> str:
    """Check a recording's files and frames, and return the hash of its whole content.

    Args:
        views: receives, by camera name, what is wrong with a camera other than the first.
    """
    native = _is_native(demo)
    recorded = read_manifest(demo.path) if native else None
    digest = hashlib.sha256(demo_fingerprint(demo).encode())
    take: Callable[[Any], None] = (lambda content: None) if native else digest.update

    def check(chosen: Sequence[str], files: Collection[str]) -> None:
        if recorded is not None:
            compare_with_manifest(demo.path, {name: entry for name, entry in recorded.items() if name in files})
        _check_pixels(demo, chosen, depth, take)

    further = _camera_tracks(demo, cameras[1:])
    view_files = {name: _camera_files(demo.path, track) if native else set() for name, track in further}
    check(cameras[:1], (recorded or {}).keys() - {file for files in view_files.values() for file in files})
    for name, files in view_files.items():
        try:
            with demo_guard(demo.name):
                check((name,), files)
        except DemoError as error:
            views[name] = error.reason
    if not native:
        content_hash = digest.hexdigest()
    else:
        listed = file_hashes(demo.path) if recorded is None else recorded
        content_hash = sha256_bytes(json.dumps(sorted(listed.items())).encode())
    return (sha256_bytes(json.dumps([content_hash, sorted(views)]).encode()) if views else content_hash)[:32]


def _camera_files(folder: Path, track: CameraTrack) -> set[str]:
    """Return the files of a camera's images and depth, as paths relative to the recording's folder."""
    paths: set[Path] = set()
    for source in _frame_sources(track, depth=True):
        if isinstance(source, OffsetFrames):
            source = source.source
        if isinstance(source, NumberedFiles):
            paths.update(source.path(index) for index in range(len(source)))
        elif isinstance(source, VideoFrames):
            paths.add(source.path)
    return {path.relative_to(folder).as_posix() for path in paths}


def _is_native(demo: Demo) -> bool:
    return (demo.path / "metadata.json").is_file()


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield regular files below a folder, by their path relative to it; hidden files and folders are skipped."""
    open_folders = [""]
    while open_folders:
        prefix = open_folders.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append(f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield f"{prefix}{entry.name}", entry.stat()


def _camera_tracks(demo: Demo, cameras: Sequence[str]) -> list[tuple[str, CameraTrack]]:
    return [(name, demo.cameras[name]) for name in cameras if name in demo.cameras]


def _frame_sources(track: CameraTrack, depth: bool) -> list[FrameSource]:
    return [track.frames, *([track.depth] if depth and track.depth is not None else [])]


# ---- frames ----------------------------------------------------------------------------------------------------------


def _check_pixels(
    demo: Demo, cameras: Sequence[str], depth: bool, take: Callable[[Any], None] = lambda content: None
) -> None:
    """Decode every frame.

    Args:
        take: called with what was read: the encoded bytes if a frame is a file, otherwise its pixels.

    Raises:
        DemoError: a frame cannot be used; the message names the camera and the first such frame.
    """
    for name, track in _camera_tracks(demo, cameras):
        for source in _frame_sources(track, depth):
            kind = "frame"
            shape: tuple[int, ...] = (track.height, track.width, 3)
            if source is track.depth:
                kind, shape = "depth frame", (track.height, track.width)
            frame = 0
            try:
                for frame_shape in _decode_frame_shapes(source, take):
                    if frame_shape != shape:
                        raise ValueError(f"it has shape {frame_shape}, the recording says {shape}")
                    frame += 1
            except HOSTILE as error:
                if is_of_the_machine(error):
                    raise
                raise DemoError(
                    demo.name, f"camera {name!r}: {kind} {frame} cannot be used: {reason_of(error)}"
                ) from error


def _decode_frame_shapes(source: FrameSource, take: Callable[[Any], None]) -> Iterator[tuple[int, ...]]:
    """Yield the shape of each frame after decoding it; `take` is called with what was read."""
    if isinstance(source, JpegFrames):
        for index in range(len(source)):
            content = read_bytes(source.path(index))
            take(content)
            yield _decode_image_shape(content, source.path(index).name, turned=source.rotate in (90, 270))
    elif isinstance(source, VideoFrames):
        source.verify()
        for image in frames_between(source.path, source.start, source.start + len(source)):
            take(image.data)
            height, width, channels = image.shape
            yield (width, height, channels) if source.rotate in (90, 270) else (height, width, channels)
    else:
        verify_source(source)
        for index in range(len(source)):
            frame = np.ascontiguousarray(source.read(index))
            if frame.dtype != (kind := np.uint16 if frame.ndim == 2 else np.uint8):
                raise ValueError(f"it holds {frame.dtype}, {kind.__name__} is needed")
            take(frame.data)
            yield frame.shape


def _decode_image_shape(content: bytes, file_name: str, turned: bool) -> tuple[int, int, int]:
    """Return [H, W, 3] of an image file after decoding all of its data. A JPEG is decoded at an eighth of its size,
    which reads every byte in a fraction of the time."""
    with open_image(content, file_name) as image:
        width, height = image.size
        refuse_deep_pixels(image)
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return (width, height, 3) if turned else (height, width, 3)
