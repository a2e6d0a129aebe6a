"""Which files of a folder are read: those of some endings in upper or lower case, without hidden ones.

macOS leaves notes beside files on disks and in archives that are not its own: `._a.jpg` beside `a.jpg`, or a folder
`__MACOSX` of them. Such a note has the name of the file that it is about, and none of its content.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

MACOS_NOTES = "__MACOSX"


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden by its own name, or is macOS's folder of notes."""
    return path.name.startswith(".") or path.name == MACOS_NOTES


def is_utf8(name: str) -> bool:
    """Whether a file name is UTF-8: Python hands out other bytes as halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def files_in(folder: Path, *endings: str, below: bool = False) -> list[Path]:
    """What has one of these endings in a folder, in the order of paths, without hidden files. Folders, links
    and pipes of such a name are among them: readers refuse them by name.

    Args:
        endings: in lower case; several dots may be in one (".tar.gz"). below: in all folders below it too.
    """
    found = everything_below(folder) if below else folder.glob("*")
    return sorted(path for path in found if path.name.lower().endswith(endings) and not is_hidden(path))


def everything_below(folder: Path) -> list[Path]:
    """All files and folders below a folder, in the order of paths; linked folders too, what is in hidden ones not.

    What several ways lead to is there once: a link to a folder that is read anyway is said in the log and not followed.
    """
    found: list[Path] = []
    read: set[str] = set()
    twice: list[Path] = []
    above = {str(path) for path in Path(os.path.realpath(folder)).parents}
    waiting = [folder]
    while waiting:
        here, linked = waiting, list[Path]()
        for start in here:
            if os.path.realpath(start) in read | above:
                twice.append(start)
                continue
            for place, folders, files in os.walk(start):
                real = os.path.realpath(place)
                if real in read:  # below a linked folder
                    folders.clear()
                    continue
                read.add(real)
                paths = [Path(place, name) for name in folders]
                found += [*paths, *(Path(place, name) for name in files)]
                paths = [path for path in paths if not is_hidden(path)]
                folders[:] = [path.name for path in paths]  # into which os.walk goes on
                linked += [path for path in paths if path.is_symlink()]
        waiting = sorted(linked)  # after everything that lies there by itself, so that a way without links comes first
    if twice:
        log.warning("%d links lead to folders that are read anyway (%s, ...)", len(twice), twice[0])
    return sorted(found)


def refuse_written_into_source(root: Path | str, source: Path | str, below: bool) -> None:
    """Raises ValueError: a set is to be written where it would be read as a part of what it is made of.

    Args:
        below: folders below `source` are read too.
    """
    written, read = Path(os.path.realpath(root)), Path(os.path.realpath(source))
    if written == read or (below and written.is_relative_to(read)):
        raise ValueError(
            f"root={root} is {'' if written == read else 'in '}source={source}: name a folder outside of it"
        )


def file_below(source: Path, folder: Path, name: str) -> Path:
    """A file of a collection that a list of it names, relative to a folder there.

    Raises:
        ValueError: it lies outside the collection.
    """
    if "\0" in name:
        raise ValueError(f"it names the file {name[:200]!r}, which no file can be called")
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(source)):
        raise ValueError(f"it names the file {name[:200]!r}, which lies outside of {source}")
    return path
