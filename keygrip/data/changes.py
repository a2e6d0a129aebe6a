"""What has changed between data that were read before and now, in words. Needs no torch: recorders import it."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 3  # names of each kind of change


def named_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two sets of hashes by name, in words: "1 removed (a), 2 changed (b, c)"; "" where nothing
    does."""
    removed = sorted(before.keys() - now.keys())
    added = sorted(now.keys() - before.keys())
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    return ", ".join(
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("removed", removed), ("added", added), ("changed", changed))
        if names
    )
