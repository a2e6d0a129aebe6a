"""The table of docs/training.md that explains each scalar of a run."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
PREFIX = re.compile(r"^(train|val)/")


def patterns(model: str | None = None) -> list[str]:
    """Return the names in the first column: `*` stands for any text. model: only the rows of every model and of this
    one, or of the one that it is a variant of (patch_dit_base)."""
    section = PAGE.read_text(encoding="utf-8").partition("### What a run logs")[2].partition("\n## ")[0]
    names, is_asked = [], True
    for line in section.splitlines():
        if line.startswith("| **"):
            of = line.split("**")[1]
            is_asked = model is None or any(f"{model}_".startswith(f"{name}_") for name in of.split(", "))
            is_asked |= of == "every model"
        elif line.startswith("| `") and is_asked:
            names += re.findall(r"`([^`]+)`", line.split("|")[1])
    return names


def unexplained(tags: Iterable[str]) -> list[str]:
    """Return the scalars that no row names, with or without `train/` and `val/` before them."""
    known = patterns()
    assert known
    names = {tag: (tag, PREFIX.sub("", tag)) for tag in tags}
    return sorted(
        tag for tag, forms in names.items() if not any(fnmatch.fnmatchcase(f, k) for f in forms for k in known)
    )


def one_sided(model: str, tags: Iterable[str]) -> list[str]:
    """Return the names that the model's rows give without a prefix, for training and validation, although the scalars
    of a run of the model have them in one of both only; and the rows with a prefix whose name has the other one too."""
    prefixes: dict[str, set[str]] = {}
    for tag in tags:
        if found := PREFIX.match(tag):
            prefixes.setdefault(PREFIX.sub("", tag), set()).add(found[1])
    wrong = []
    for pattern in patterns(model):
        given = PREFIX.match(pattern)
        matching = [of for name, of in prefixes.items() if fnmatch.fnmatchcase(name, PREFIX.sub("", pattern))]
        logged = set().union(*matching)
        if logged and logged != ({given[1]} if given else {"train", "val"}):
            wrong.append(pattern)
    return sorted(wrong)
