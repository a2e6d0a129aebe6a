"""Demos stored as one folder each: finds them below a root, names them, and reads their JSON files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import Demo, DemoError
from keygrip.data.source_files import is_hidden
from keygrip.data.untrusted_files import read_json

SEARCH_DEPTH = 3  # folders below `root` that are searched: root/demo, root/task/demo, root/robot/task/demo


def demo_folders(root: Path, is_demo: Callable[[Path], bool], depth: int = SEARCH_DEPTH) -> list[Path]:
    """Return the folders that are demos, complete or cut off, sorted by name; `root` itself may be one. Hidden folders
    (unfinished demos of a writer) are skipped."""
    if is_demo(root):
        return [root]
    if depth == 0:
        return []
    children = sorted(child for child in root.iterdir() if child.is_dir() and not is_hidden(child))
    return [demo for child in children for demo in demo_folders(child, is_demo, depth - 1)]


def folder_references(
    root: Path, folders: Sequence[Path], format: str, read: Callable[[Path, str], Demo]
) -> list[DemoReference]:
    """Return references to demos, which are not read yet, each named after its path below `root`.

    Args:
        read: returns the demo of a folder and a name; picklable.
    """
    names = [folder.name if folder == root else folder.relative_to(root).as_posix() for folder in folders]
    return [
        DemoReference(name, folder, format, partial(read, folder, name))
        for name, folder in zip(names, folders, strict=True)
    ]


def read_object(path: Path, demo: str) -> dict[str, Any]:
    """Return the object in a JSON file of a demo. Raise DemoError if the file is not JSON or holds no object."""
    try:
        content = read_json(path)
    except BadSample as error:
        raise DemoError(demo, f"{path.name} is not JSON ({error.what})") from error
    if not isinstance(content, dict):
        raise DemoError(demo, f"{path.name} holds no object")
    return content
