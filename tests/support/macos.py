"""AppleDouble files, which macOS leaves on disks of other systems and in archives."""

from __future__ import annotations

from pathlib import Path

NOTE = b"\0\5\x16\7\0\2\0\0Mac OS X        "


def leave_notes(root: Path) -> int:
    """Put a file `._name` next to every file below a folder, and another into `__MACOSX`, as in Finder's archives.
    Return how many."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    for path in files:
        for folder in (path.parent, root / "__MACOSX" / path.parent.relative_to(root)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"._{path.name}").write_bytes(NOTE)
    return 2 * len(files)
