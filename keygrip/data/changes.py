"""Describe in words what changed between two readings of the same data. Needs no torch, since recorders import it."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 3  # names listed per kind of change


def named_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describe the difference between two sets of hashes by name, for example "1 removed (a), 2 changed (b, c)"; "" if
    there is none."""
    removed = sorted(before.keys() - now.keys())
    added = sorted(now.keys() - before.keys())
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for kind, names in (("removed", removed), ("added", added), ("changed", changed))
        if names
    )
