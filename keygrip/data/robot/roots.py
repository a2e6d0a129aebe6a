"""One or several data sets: their folders and their demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from keygrip.data.robot import hub
from keygrip.data.robot.discovery import find_demos, refuse_no_folder
from keygrip.data.robot.frame_rates import checked_strides, refuse_unequal_steps
from keygrip.data.robot.reading import ReadDemos, ReadingOptions, read_demos
from keygrip.data.robot.schema import Demo, DemoError, left_out_cameras


@dataclass(frozen=True)
class DataRoot:
    """A data set.

    Args:
        folder: its location. label: prefix of its demos' names; empty if it is the only data set.
        calibration: its calibration file. hub_name: OWNER/NAME of a data set on the hub.
        stride: frames from one target step to the next. camera_names: {name in the recordings: new name}; other
            cameras keep their names.
    """

    folder: Path
    label: str = ""
    calibration: str | Path | None = None
    hub_name: str | None = None
    stride: int = 1
    camera_names: Mapping[str, str] = field(default_factory=dict)

    def refuse_missing(self, make_missing: bool = True) -> None:
        """Raise FileNotFoundError if the folder is missing and, for a data set of the hub, cannot be downloaded."""
        if self.hub_name is None:
            refuse_no_folder(self.folder)
        else:
            hub.refuse_missing(self.hub_name, make_missing)

    def download(self, make_missing: bool = True) -> None:
        """Download a data set of the hub if it is not complete; without `make_missing`, raise FileNotFoundError."""
        if self.hub_name is not None:
            hub.download(self.hub_name, make_missing)


def data_roots(
    root: str | Path | Sequence[str | Path],
    calibration: str | Path | Sequence[str | Path | None] | None,
    frame_stride: int | Sequence[int] = 1,
    camera_names: Mapping[str, Mapping[str, str]] | None = None,
) -> list[DataRoot]:
    """Return the data sets that the settings of the same names under `data` describe.

    Args:
        frame_stride: one number for all roots, or one per root. camera_names: new camera names, as {name of a
            root's folder: {name in its recordings: new name}}.

    Raises:
        ValueError: there is no root, two have the same name, the number of calibration files or strides is not that of
            the roots, `camera_names` names a root that does not exist, or two cameras would have the same name.
    """
    roots = _make_data_roots(root, calibration)
    strides = checked_strides(frame_stride, len(roots))
    names = {name: dict(mapping) for name, mapping in (camera_names or {}).items()}
    folder_names = [data_root.folder.name for data_root in roots]
    if unknown := next((name for name in names if name not in folder_names), None):
        raise ValueError(f"data.camera_names: there is no root {unknown!r}; roots are {', '.join(folder_names)}")
    for name, mapping in names.items():
        if len(set(mapping.values())) < len(mapping):
            raise ValueError(f"data.camera_names.{name}={mapping}: two cameras would have the same name")
    return [
        replace(data_root, stride=stride, camera_names=names.get(folder_name, {}))
        for data_root, stride, folder_name in zip(roots, strides, folder_names, strict=True)
    ]


def refuse_renamed(
    before: str | Path | Sequence[str | Path] | None, now: str | Path | Sequence[str | Path] | None
) -> None:
    """Raise ValueError if the demos in the roots `now` get other names than those in the roots `before`, from which the
    split into training and validation is computed: demos of one root have no prefix, those of several have their
    folder's name."""
    labels = [
        sorted(root.label for root in _make_data_roots(value, None)) if value is not None else [""]
        for value in (before, now)
    ]
    if labels[0] != labels[1]:
        named = [" and ".join(names) if names != [""] else "one folder" for names in labels]
        raise ValueError(
            f"data.root: the run was trained on {named[0]}, and this names {named[1]}. Other demonstrations would then "
            "be held out, some of them trained on: name folders with the same names"
        )


def _make_data_roots(
    root: str | Path | Sequence[str | Path], calibration: str | Path | Sequence[str | Path | None] | None
) -> list[DataRoot]:
    if isinstance(root, str | Path):
        if not (calibration is None or isinstance(calibration, str | Path)):
            raise ValueError("data.calibration is a list, and data.root is one folder")
        return [_make_data_root(root, "", calibration)]
    several = list(root)
    if not several:
        raise ValueError("data.root is an empty list: name folders of demonstrations")
    files = [calibration] * len(several) if calibration is None or isinstance(calibration, str | Path) else calibration
    if len(files) != len(several):
        raise ValueError(
            f"data.calibration names {len(files)} files for {len(several)} roots; null where one needs none"
        )
    roots = [_make_data_root(part, Path(str(part)).name, file) for part, file in zip(several, files, strict=True)]
    labels = [part.label for part in roots]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(
            f"two roots are called {twice!r}, so that their demos could not be told apart: rename a folder"
        )
    return roots if len(roots) > 1 else [replace(roots[0], label="")]


def _make_data_root(root: str | Path, label: str, calibration: str | Path | None) -> DataRoot:
    name = hub.hub_name(root)
    return DataRoot(Path(root) if name is None else hub.folder_of(name), label, calibration, name)


def checked_weights(weights: Sequence[float] | None, roots: int) -> list[float] | None:
    """Return the weights of the roots as floats.

    Raises:
        ValueError: their number is not that of the roots, there is one root only, or one is not positive and finite.
    """
    if weights is None:
        return None
    values = [float(weight) for weight in weights]
    if len(values) != roots or roots < 2:
        raise ValueError(
            f"data.weights has {len(values)} numbers and data.root {roots} folders: one for each of several"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in values):
        raise ValueError(f"data.weights must be positive, not {values}: leave out a root that takes no part")
    return values


@dataclass
class ReadRoots(ReadDemos):
    """Demonstrations of several data sets; `root_of` is the index of each demonstration's root."""

    root_of: list[int] = field(default_factory=list)


def read_roots(roots: Sequence[DataRoot], format: str, options: ReadingOptions, cache_dir: Path) -> ReadRoots:
    """Return the usable demonstrations of all data sets, in the order of `roots`. `options` apply to each data set.

    Raises:
        FileNotFoundError: there is no data. ValueError: too many demos of a set are broken, a target step would have
            different durations in some, or no demo has a camera that is renamed.
    """
    everything = ReadRoots([], [], {}, [])
    for index, root in enumerate(roots):
        references = find_demos(root.folder, format, root.calibration)
        if root.camera_names:
            references = [
                replace(reference, reader=partial(_read_with_renamed_cameras, reference.reader, root.camera_names))
                for reference in references
            ]
        read = read_demos(root.folder, references, options, cache_dir)
        _refuse_absent_cameras(root, read.demos)
        prefix = f"{root.label}/" if root.label else ""
        everything.demos += [replace(demo, name=prefix + demo.name) for demo in read.demos] if prefix else read.demos
        everything.broken += [DemoError(prefix + error.name, error.reason) for error in read.broken]
        everything.contents |= {prefix + name: content for name, content in read.contents.items()}
        everything.root_of += [index] * len(read.demos)
    names = [root.label or str(root.folder) for root in roots]
    refuse_unequal_steps(everything.demos, everything.root_of, names, [root.stride for root in roots])
    return everything


def _read_with_renamed_cameras(reader: Callable[[], Demo], names: Mapping[str, str]) -> Demo:
    """Read a demo and rename its cameras. Raise DemoError if two would have the same name."""
    demo = reader()
    cameras = {names.get(name, name): track for name, track in demo.cameras.items()}
    if len(cameras) < len(demo.cameras):
        raise DemoError(
            demo.name, f"with data.camera_names two of its cameras {', '.join(demo.cameras)} would have the same name"
        )
    source = demo.source | {"renamed": [name for name in names if name in demo.cameras]}
    if left_out := left_out_cameras(demo):
        source["renamed"] += [name for name in names if name in left_out]
        source["left_out"] = {names.get(name, name): reason for name, reason in left_out.items()}
    return replace(demo, cameras=cameras, source=source)


def _refuse_absent_cameras(root: DataRoot, demos: Sequence[Demo]) -> None:
    """Raise ValueError if a camera to rename exists in no demo."""
    there = {name for demo in demos for name in demo.source.get("renamed", [])}
    for theirs in root.camera_names:
        if theirs not in there:
            raise ValueError(f"data.camera_names.{root.folder.name}: no demo of {root.folder} has a camera {theirs!r}")
