"""Which files of a folder are read: those of some endings in upper or lower case, without hidden ones.

macOS leaves notes beside files on disks and in archives that are not its own: `._a.jpg` beside `a.jpg`, or a folder
`__MACOSX` of them. They are called as what they are about and hold nothing of it.
"""

from __future__ import annotations

import os
from pathlib import Path

MACOS_NOTES = "__MACOSX"


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden by its own name, or is macOS's folder of notes."""
    return path.name.startswith(".") or path.name == MACOS_NOTES


def files_in(folder: Path, *endings: str, below: bool = False) -> list[Path]:
    """What has one of these endings in a folder, in the order of paths, without hidden files. A folder, a link or a
    pipe of such a name is among them: who reads it says what it is.

    Args:
        endings: in lower case; several dots may be in one (".tar.gz"). below: in all folders below it too.
    """
    found = folder.rglob("*") if below else folder.glob("*")
    return sorted(path for path in found if path.name.lower().endswith(endings) and not is_hidden(path))


def file_below(source: Path, folder: Path, name: str) -> Path:
    """A file of a collection that a list of it names, relative to a folder there.

    Raises:
        ValueError: it lies outside the collection.
    """
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(source)):
        raise ValueError(f"it names the file {name[:200]!r}, which lies outside of {source}")
    return path
