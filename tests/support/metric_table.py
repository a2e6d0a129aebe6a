"""The table of docs/training.md that explains each scalar of a run."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def patterns() -> list[str]:
    """Return the names in the first column: `*` stands for any text."""
    section = PAGE.read_text(encoding="utf-8").partition("### What a run logs")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def unexplained(tags: Iterable[str]) -> list[str]:
    """Return the scalars that no row names, with or without `train/` and `val/` before them."""
    known = patterns()
    assert known
    names = {tag: (tag, re.sub(r"^(train|val)/", "", tag)) for tag in tags}
    return sorted(
        tag for tag, forms in names.items() if not any(fnmatch.fnmatchcase(f, k) for f in forms for k in known)
    )
