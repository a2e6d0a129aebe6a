"""Finds the demonstrations under a folder, in any known format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from keygrip.data.bad_samples import HOSTILE, BadSample, is_of_the_machine, reason_of
from keygrip.data.robot import native
from keygrip.data.robot.calibration import NAMES, read_mapping, setting
from keygrip.data.robot.corrections import read_corrections, with_corrections
from keygrip.data.robot.formats import lerobot_v2, lerobot_v3, libero, raiden, yam_abc
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import SCHEMA
from keygrip.data.source_files import escaped, is_utf8

FOREIGN_FORMATS: dict[str, ModuleType] = {
    "raiden": raiden,
    "yam_abc": yam_abc,
    "lerobot_v2": lerobot_v2,
    "lerobot_v3": lerobot_v3,
    "libero": libero,
}  # each module has LAYOUT, detect(root) and find(root, calibration)
FORMATS = ("native", *FOREIGN_FORMATS)


def find_demos(
    root: Path | str, format: str = "auto", calibration: Path | str | None = None, named_by: str | None = None
) -> list[DemoReference]:
    """Return the demos under `root`, sorted by name.

    Args:
        root: folder of a data set.
        format: one of `FORMATS`, or "auto": the format whose files the folder holds.
        calibration: calibration file. Some foreign formats need it (cameras, base poses); for any format it may hold
            corrections from `prepare step=calibrate`. Native demos contain their own cameras.
        named_by: the setting that names the folder, for errors; None: `data.root`.

    Raises:
        FileNotFoundError: the folder is missing or empty, or holds no demo.
        ValueError: unknown format, no format or several recognised, calibration given for native demos.
    """
    root = Path(root)
    named_by = named_by or setting("root")
    refuse_no_folder(root, named_by)
    if not any(root.iterdir()):
        raise FileNotFoundError(f"data folder {root} is empty; record demos into it or name another with {named_by}")
    if format not in ("auto", *FORMATS):
        raise ValueError(f"unknown data format {format!r}; known are {', '.join(FORMATS)} and auto")
    with _report_broken_folder(root):
        references = _find_references(root, format, calibration)
    for reference in references:
        if not is_utf8(reference.name):
            raise ValueError(f"the name {escaped(reference.name)} in {root} holds bytes that are not UTF-8: rename it")
    return references


def refuse_no_folder(root: Path, named_by: str | None = None) -> None:
    """Raise FileNotFoundError if there is no folder of that name. The error shows the setting `named_by`."""
    named_by = named_by or setting("root")
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; name a folder of demos with {named_by}")
    if not root.is_dir():
        which = "the folder that it is in" if root.suffix in (".hdf5", ".h5") else "a folder of demos"
        raise FileNotFoundError(f"data folder {root} is a file; name {which} with {named_by}")


def refuse_no_selection(cameras: Sequence[str] | None, **counts: int | None) -> None:
    """Raise ValueError if settings select nothing: an empty list of cameras, or a number below 1. None: not limited.

    Args:
        cameras: names of cameras. counts: numbers, such as that of demos, by the name of their setting.
    """
    if cameras is not None and not cameras:
        raise ValueError("cameras=[]: name at least one camera, or leave it out for all")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: it must be at least 1")


@contextlib.contextmanager
def _report_broken_folder(root: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except HOSTILE as error:
        if is_of_the_machine(error):
            raise
        raise BadSample(root, reason_of(error)) from error


def _find_references(root: Path, format: str, calibration: Path | str | None) -> list[DemoReference]:
    if format == "auto" and native.detect(root):
        # a native demo decides the format; anything else found there is then reported as a broken demo
        format = "native"
    if format == "auto":
        recognised = [name for name in FOREIGN_FORMATS if FOREIGN_FORMATS[name].detect(root)]
        if len(recognised) > 1:
            like = " and ".join(recognised)
            raise ValueError(f"{root} looks like {like}; say which with {setting('format', 'NAME')}")
        if not recognised:
            layouts = ", ".join(f"{name} ({module.LAYOUT})" for name, module in FOREIGN_FORMATS.items())
            raise FileNotFoundError(
                f"{root} holds no demos in a known format; looked for native (a folder per demo with metadata.json of "
                f"schema {SCHEMA!r} and trajectory.npz), {layouts}"
            )
        format = recognised[0]
    path = None if calibration is None else Path(calibration)
    if path is None and format != "native":
        path = next((root / name for name in NAMES if (root / name).is_file()), None)
    content = read_mapping(path) if path is not None and path.is_file() else {}
    corrections = {} if path is None else read_corrections(path, content.get("corrections") or {})
    if format == "native":
        if path is not None and not corrections:
            raise ValueError(
                f"calibration={calibration} has no effect: native demos carry their cameras; leave it out, "
                "or name a file with corrections (prepare step=calibrate)"
            )
        references = native.find(root)
    else:
        uses_calibration = calibration is not None and (
            not corrections or content.keys() & {"cameras", "arms", "lerobot", "bimanual_transform"}
        )
        references = FOREIGN_FORMATS[format].find(root, calibration=path if uses_calibration else None)
    if not references:
        raise FileNotFoundError(f"{root} holds no demos of format {format}")
    if path is None or not corrections:
        return references
    return [
        replace(reference, reader=with_corrections(reference.reader, corrections, path)) for reference in references
    ]
