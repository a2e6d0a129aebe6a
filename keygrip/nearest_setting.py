"""Find the setting that a misspelt name means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known dotted key nearest to a misspelt one, or None: siblings first, then whole keys, then last parts.

    Equal initials, an equal last word and a common word also count as near: ``learning_rate`` finds ``lr``,
    ``seed`` finds ``first_seed``, ``gradient_clip_val`` finds ``clip_norm``.
    """
    known = sorted(key for key in set(known) if not name.startswith(f"{key}."))
    parent, _, last = name.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    initials = "".join(word[:1] for word in last.split("_"))
    by_last = {key.rpartition(".")[2]: key for key in siblings if parent}
    matches = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    if matches:
        return by_last[matches[0]]
    if "_" in last and initials in by_last:
        return by_last[initials]
    words = {word for word in last.split("_") if len(word) > 3}
    if sharing := [key for key in by_last if parent and words & set(key.split("_"))]:
        return by_last[sharing[0]]
    whole_matches = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if whole_matches:
        return whole_matches[0]
    by_last = {}
    for key in sorted(known, key=lambda key: (key.count("."), key)):
        by_last.setdefault(key.rpartition(".")[2], key)
    matches = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    matches = matches or [each for each in by_last if each.endswith(f"_{last}")]
    return by_last[matches[0]] if matches else None
