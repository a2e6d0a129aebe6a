"""Imports foreign recordings into native folders, demo by demo, so that it can be interrupted and continued."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from keygrip.artifacts import locked
from keygrip.data.bad_samples import BadSample, is_of_the_machine, join_first
from keygrip.data.robot.discovery import find_demos, refuse_no_selection
from keygrip.data.robot.fingerprint import hashed_arrays
from keygrip.data.robot.frames import VideoFrames
from keygrip.data.robot.native import RECORDING_FILE, read_native
from keygrip.data.robot.native_writer import write_demo
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import Demo, DemoError
from keygrip.data.untrusted_files import read_json
from keygrip.progress import Progress

logger = logging.getLogger(__name__)

LOCK_FILE = ".importing.lock"
SAME = 1e-9  # tolerance for values that were computed on another machine


@dataclass(frozen=True)
class ImportSummary:
    """Result of an import.

    Attributes:
        written: demos written now. skipped: demos that were there already.
        broken: (name, reason) of demos that could not be read.
        notes: decisions that a reader made by itself, each listed once.
    """

    written: int
    skipped: int
    broken: list[tuple[str, str]]
    notes: list[str]


def import_demos(
    source: Path | str,
    destination: Path | str,
    format: str = "auto",
    calibration: Path | str | None = None,
    cameras: Sequence[str] | None = None,
    video: bool = False,
    jpeg_quality: int = 95,
    max_demos: int | None = None,
    max_broken_share: float = 0.1,
    progress: bool = True,
) -> ImportSummary:
    """Write every demo under `source` as a native folder of the same name under `destination`.

    A demo is written under a hidden name and renamed when it is complete. Existing demos are not changed, so a second
    call continues where the first was stopped. Before anything is written, all existing demos are read in both folders
    and compared: their values, calibration, cameras, instruction and `video`, not their images. A second import into
    the same folder waits until the first has ended.

    Args:
        source: folder of recordings. destination: folder of native demos; created if it is missing.
        format, calibration: as for `find_demos`.
        cameras: cameras to keep; None: all.
        video, jpeg_quality: how images are stored. Without `video`, JPEG files are copied byte by byte.
        max_demos: number of demos to import, the first ones by name; None: all.
        max_broken_share: a larger share of unreadable demos is an error, which lists them; demos written before stay.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError: no data. ValueError: source and destination are one folder; the destination holds a
            recording; too many broken demos; a demo of the same name was imported from elsewhere, or with another
            calibration or other cameras; `cameras` is empty or `max_demos` below 1.
    """
    refuse_no_selection(cameras, max_demos=max_demos)
    source, destination = Path(source), Path(destination)
    if source.resolve() == destination.resolve() or source.resolve() in destination.resolve().parents:
        raise ValueError(f"the destination {destination} lies in the source {source}; choose another folder")
    if (destination / RECORDING_FILE).is_file():
        raise ValueError(
            f"{destination} holds a recording ({RECORDING_FILE}), which is never mixed with other demos: import into "
            "another folder"
        )
    references = find_demos(source, format, calibration, "source=PATH")[:max_demos]
    written, skipped = 0, 0
    broken: list[tuple[str, str]] = []
    notes: dict[str, None] = {}
    with locked(destination / LOCK_FILE):  # another import would remove what this one is writing
        # existing demos first: nothing is written if one of them is refused
        order = sorted(references, key=lambda reference: not _is_imported(destination / reference.name))
        for reference in Progress(order, desc=f"importing {references[0].format}", unit="demo", shown=progress):
            folder = destination / reference.name
            try:
                if _is_imported(folder):
                    _refuse_other_recording(reference, folder)
                    _refuse_changed(reference, folder, cameras, video)
                    skipped += 1
                    continue
                notes.update(dict.fromkeys(_import_demo(reference, folder, cameras, video, jpeg_quality)))
            except DemoError as error:
                broken.append((error.name, error.reason))
                continue
            written += 1
    for note in notes:
        logger.info("%s", note)
    share = len(broken) / len(references)
    if broken:
        listed = join_first([f"{name}: {reason}" for name, reason in broken])
        if share > max_broken_share or len(broken) == len(references):
            raise ValueError(f"{len(broken)} of {len(references)} demos in {source} are broken: {listed}")
        logger.warning("%d of %d demos in %s are broken and left out: %s", len(broken), len(references), source, listed)
    return ImportSummary(written, skipped, broken, list(notes))


def _is_imported(folder: Path) -> bool:
    return (folder / "metadata.json").is_file()


def _refuse_other_recording(reference: DemoReference, folder: Path) -> None:
    """Raise ValueError if a native folder holds another recording of the same name."""
    origin = _read_import_origin(folder)
    if origin is None or origin.resolve() == reference.path.resolve():
        return
    if reference.format == "native" and _read_import_origin(reference.path) == origin:  # a copy keeps its origin
        return
    raise ValueError(
        f"{folder} was imported from {origin}, and {reference.path} has a demo of the same name: import it into "
        "another folder"
    )


def _refuse_changed(reference: DemoReference, folder: Path, cameras: Sequence[str] | None, video: bool) -> None:
    """Raise ValueError if a demo differs from what an import would write now, DemoError if one of the two is broken."""
    current = reference.read(images=False, uncalibrated=True)
    imported_reference = replace(
        reference, path=folder, format="native", reader=partial(read_native, folder, reference.name)
    )
    try:
        imported = imported_reference.read(images=False, uncalibrated=True)
    except DemoError as error:
        raise DemoError(reference.name, f"{folder} is damaged ({error.reason}): remove it") from error
    if changed := _describe_difference(imported, current, cameras, video):
        raise ValueError(
            f"{folder} was imported before, and now {changed}. What is there must be what would be written now "
            "(its numbers, calibration, cameras, instruction and `video` are compared): import into another "
            "folder, or remove what is there"
        )


def _describe_difference(imported: Demo, current: Demo, cameras: Sequence[str] | None, video: bool) -> str:
    """Describe the first difference between an imported demo and its source; empty if there is none."""
    camera_names = sorted(current.cameras if cameras is None else cameras)
    if sorted(imported.cameras) != camera_names:
        return f"its cameras are {', '.join(camera_names)}; there they are {', '.join(sorted(imported.cameras))}"
    if any(isinstance(track.frames, VideoFrames) != video for track in imported.cameras.values()):
        return f"video={str(video).lower()} is asked for; there it is {str(not video).lower()}"
    for field in ("instruction", "task", "robot", "fps"):
        old_text, new_text = getattr(imported, field), getattr(current, field)
        if old_text != new_text:
            return f"its {field} is {new_text!r}; there it is {old_text!r}"
    for name in camera_names:
        old_depth, new_depth = (demo.cameras[name].depth is not None for demo in (imported, current))
        if old_depth != new_depth:
            there = ("no depth images", "depth images")
            return f"its camera {name!r} has {there[new_depth]}; there it has {there[old_depth]}"
    old_arrays, new_arrays = _stored_arrays(imported, camera_names), _stored_arrays(current, camera_names)
    for name in sorted(old_arrays.keys() | new_arrays.keys()):
        old, new = old_arrays.get(name), new_arrays.get(name)
        if old is None or new is None:
            if old is not new:
                return f"it has {'no ' if new is None else ''}{name}; there it has {'no' if old is None else 'some'}"
        elif old.shape != new.shape or not np.allclose(old, new, rtol=SAME, atol=SAME):
            return f"its {name} is another than there"
    return ""


def _stored_arrays(demo: Demo, cameras: Sequence[str]) -> dict[str, np.ndarray | None]:
    """Return the values of a demo that a native folder holds: for cameras those of the calibrated ones among `cameras`,
    for commands only the poses."""
    calibrated = {name: track for name, track in demo.cameras.items() if name in cameras and not track.uncalibrated}
    arms = {
        name: replace(arm, commanded=arm.commanded and replace(arm.commanded, joints=None, controller=None))
        for name, arm in demo.arms.items()
    }
    return {
        "times": demo.timestamps - demo.timestamps[0],
        # flags that are all false are not stored
        "intervention": None if demo.intervention is None or not demo.intervention.any() else demo.intervention * 1.0,
        **dict(hashed_arrays(replace(demo, cameras=calibrated, arms=arms))),
    }


def _read_import_origin(folder: Path) -> Path | None:
    """Return the path from which a native demo was imported; None if its metadata do not contain it."""
    try:
        origin = read_json(folder / "metadata.json")["source"]["imported_from"]
    except (BadSample, LookupError, TypeError):
        return None
    return Path(origin) if isinstance(origin, str) else None


def _import_demo(
    reference: DemoReference, folder: Path, cameras: Sequence[str] | None, video: bool, jpeg_quality: int
) -> list[str]:
    demo = reference.read(cameras=cameras, uncalibrated=True)
    try:
        write_demo(demo, folder, cameras, video, jpeg_quality)
    except (OSError, ValueError) as error:
        if isinstance(error, DemoError) or is_of_the_machine(error):  # a full disk does not mean a broken recording
            raise
        raise DemoError(reference.name, f"{error}") from error
    return [str(note) for note in demo.source.get("notes", [])]
