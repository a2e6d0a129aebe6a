"""Demos that are folders: where they lie below a root, their names, and their JSON files."""

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
    """Folders that are demos, complete or cut off, in the order of their names; `root` may be one itself. Hidden
    folders (a writer's unfinished ones) are passed over."""
    if is_demo(root):
        return [root]
    if depth == 0:
        return []
    children = sorted(child for child in root.iterdir() if child.is_dir() and not is_hidden(child))
    return [demo for child in children for demo in demo_folders(child, is_demo, depth - 1)]


def folder_references(
    root: Path, folders: Sequence[Path], format: str, read: Callable[[Path, str], Demo]
) -> list[DemoReference]:
    """References to demos, unread, each named after its path below `root`.

    Args:
        read: makes the demo of a folder and a name; picklable.
    """
    names = [folder.name if folder == root else folder.relative_to(root).as_posix() for folder in folders]
    return [
        DemoReference(name, folder, format, partial(read, folder, name))
        for name, folder in zip(names, folders, strict=True)
    ]


def read_object(path: Path, demo: str) -> dict[str, Any]:
    """The object that a JSON file of a demo holds. Raises DemoError: it is not JSON, or no object."""
    try:
        content = read_json(path)
    except BadSample as error:
        raise DemoError(demo, f"{path.name} is not JSON ({error.what})") from error
    if not isinstance(content, dict):
        raise DemoError(demo, f"{path.name} holds no object")
    return content
