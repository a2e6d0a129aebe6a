"""One or several data sets: their folders and their demonstrations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from keygrip.data.robot import hub
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.reading import ReadDemos, ReadingOptions, read_demos
from keygrip.data.robot.schema import DemoError


@dataclass(frozen=True)
class DataRoot:
    """A data set.

    Args:
        folder: where it lies. label: what its demos' names begin with; empty where it is the only one.
        calibration: its calibration file. hub_name: OWNER/NAME of a data set of the hub.
    """

    folder: Path
    label: str = ""
    calibration: str | Path | None = None
    hub_name: str | None = None

    def download(self) -> None:
        """Downloads a data set of the hub where it is not complete."""
        if self.hub_name is not None:
            hub.download(self.hub_name)


def data_roots(
    root: str | Path | Sequence[str | Path], calibration: str | Path | Sequence[str | Path | None] | None
) -> list[DataRoot]:
    """The data sets that `data.root` and `data.calibration` name.

    Raises:
        ValueError: none, two of one name, or another number of calibration files.
    """
    if isinstance(root, str | Path):
        if not (calibration is None or isinstance(calibration, str | Path)):
            raise ValueError("data.calibration is a list, and data.root is one folder")
        return [_data_root(root, "", calibration)]
    several = list(root)
    if not several:
        raise ValueError("data.root is an empty list: name folders of demonstrations")
    files = [calibration] * len(several) if calibration is None or isinstance(calibration, str | Path) else calibration
    if len(files) != len(several):
        raise ValueError(
            f"data.calibration names {len(files)} files for {len(several)} roots; null where one needs none"
        )
    found = [_data_root(part, Path(str(part)).name, file) for part, file in zip(several, files, strict=True)]
    labels = [part.label for part in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(
            f"two roots are called {twice!r}, so that their demos could not be told apart: rename a folder"
        )
    return found if len(found) > 1 else [replace(found[0], label="")]


def _data_root(root: str | Path, label: str, calibration: str | Path | None) -> DataRoot:
    name = hub.hub_name(root)
    return DataRoot(Path(root) if name is None else hub.folder_of(name), label, calibration, name)


def checked_weights(weights: Sequence[float] | None, roots: int) -> list[float] | None:
    """The weights of the roots as floats.

    Raises:
        ValueError: another number than there are roots, or one that is no weight.
    """
    if weights is None:
        return None
    found = [float(weight) for weight in weights]
    if len(found) != roots or roots < 2:
        raise ValueError(
            f"data.weights has {len(found)} numbers and data.root {roots} folders: one for each of several"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in found):
        raise ValueError(f"data.weights must be positive, not {found}: leave out a root that takes no part")
    return found


@dataclass
class ReadRoots(ReadDemos):
    """Demonstrations of several data sets; `root_of` is the number of each one's root."""

    root_of: list[int] = field(default_factory=list)


def read_roots(roots: Sequence[DataRoot], format: str, options: ReadingOptions, cache_dir: Path) -> ReadRoots:
    """The usable demonstrations of all data sets, in their order. `options` hold for each.

    Raises:
        FileNotFoundError: there is no data. ValueError: too many demos of a set are broken.
    """
    everything = ReadRoots([], [], {}, [])
    for number, root in enumerate(roots):
        references = find_demos(root.folder, format, root.calibration)
        read = read_demos(root.folder, references, options, cache_dir)
        before = f"{root.label}/" if root.label else ""
        everything.demos += [replace(demo, name=before + demo.name) for demo in read.demos] if before else read.demos
        everything.broken += [DemoError(before + error.name, error.reason) for error in read.broken]
        everything.contents |= {before + name: content for name, content in read.contents.items()}
        everything.root_of += [number] * len(read.demos)
    return everything
