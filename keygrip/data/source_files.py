"""Select the files of a folder that are read: those with given endings in upper or lower case, without hidden files.

macOS writes metadata files next to other files on foreign disks and in archives: `._a.jpg` next to `a.jpg`, or a folder
`__MACOSX` of them. Such a file has the name of the file that it describes, but not its content.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

MACOS_NOTES = "__MACOSX"


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden by its own name, or is the folder of macOS metadata."""
    return path.name.startswith(".") or path.name == MACOS_NOTES


def is_utf8(name: str) -> bool:
    """Whether a file name is UTF-8: Python represents other bytes as halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """Return a name for an error, with bytes that are not UTF-8 as escapes."""
    return name.encode(errors="backslashreplace").decode()


def files_in(folder: Path, *endings: str, below: bool = False) -> list[Path]:
    """Return the entries of a folder with one of these endings, sorted by path, without hidden files. Folders, links
    and pipes with such a name are included: readers refuse them and name them in the error.

    Args:
        endings: in lower case; one ending may contain several dots (".tar.gz"). below: also search all subfolders.
    """
    found = everything_below(folder) if below else folder.glob("*")
    return sorted(path for path in found if path.name.lower().endswith(endings) and not is_hidden(path))


def everything_below(folder: Path) -> list[Path]:
    """Return all files and folders below a folder, sorted by path. Linked folders are followed, hidden ones are not
    entered.

    A folder that several paths lead to is listed once: a link to a folder that is read anyway is logged, not followed.
    """
    entries: list[Path] = []
    visited: set[str] = set()
    repeated: list[Path] = []
    above = {str(path) for path in Path(os.path.realpath(folder)).parents}
    waiting = [folder]
    while waiting:
        starts, linked = waiting, list[Path]()
        for start in starts:
            if os.path.realpath(start) in visited | above:
                repeated.append(start)
                continue
            for directory, folders, files in os.walk(start):
                real = os.path.realpath(directory)
                if real in visited:  # below a linked folder
                    folders.clear()
                    continue
                visited.add(real)
                paths = [Path(directory, name) for name in folders]
                entries += [*paths, *(Path(directory, name) for name in files)]
                paths = [path for path in paths if not is_hidden(path)]
                folders[:] = [path.name for path in paths]  # os.walk continues into these
                linked += [path for path in paths if path.is_symlink()]
        waiting = sorted(linked)  # after everything that is reached without links, so that paths without links win
    if repeated:
        log.warning("%d links lead to folders that are read anyway (%s, ...)", len(repeated), repeated[0])
    return sorted(entries)


def refuse_written_into_source(root: Path | str, source: Path | str, below: bool) -> None:
    """Raise ValueError if a set would be written to a place where it would be read as part of its own source.

    Args:
        below: whether folders below `source` are read too.
    """
    written, read = Path(os.path.realpath(root)), Path(os.path.realpath(source))
    if written == read or (below and written.is_relative_to(read)):
        raise ValueError(
            f"root={root} is {'' if written == read else 'in '}source={source}: name a folder outside of it"
        )


def file_below(source: Path, folder: Path, name: str) -> Path:
    """Return the path of a file that a list in a collection names, relative to a folder in the collection.

    Raises:
        ValueError: the file lies outside the collection.
    """
    if "\0" in name:
        raise ValueError(f"it names the file {name[:200]!r}, which no file can be called")
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(source)):
        raise ValueError(f"it names the file {name[:200]!r}, which lies outside of {source}")
    return path
