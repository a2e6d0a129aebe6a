"""Read records, and format and register tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, Callable[..., str]] = {}
LAST_MT50 = "two cameras, eased scripts, from the one before"  # name of the run of the last policy


def table(make: Callable[..., str]) -> Callable[..., str]:
    """Register a function that returns the table of its name when it is called without arguments."""
    TABLES[make.__name__] = make
    return make


def read(name: str) -> dict[str, Any]:
    """Return a record. Keys that have had another name were renamed in the records too."""
    record: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    return record


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines: list[list[object]] = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    low, high = 100 * result["success_low"], 100 * result["success_high"]
    return (
        f"{100 * result['success_rate']:.0f} % ({low:.0f} to {high:.0f}), {result['successes']} of {result['episodes']}"
    )


def ablation(recorded: str) -> str:
    """Return the current name of an ablation whose name in the record has an old prefix (``vlm_small_query``)."""
    system, _, name = recorded.partition("_")
    folders = {"vq": "volume_query", "vlm": "foveated_vlm", "dit": "patch_dit", "vla": "geometry_vla"}
    return "unchanged recipe" if name == "none" else f"`ablation={folders[system]}/{name}`"


def over_seeds(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Return the mean of some values; for several values also the lowest and the highest."""
    mean = f"{sum(values) / len(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def span(values: Iterable[float], digits: int = 2) -> str:
    """Return the lowest and the highest value, or one value if both are equal after rounding."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (ordered[0], ordered[-1])))


def gigabytes(mebibytes: float) -> str:
    """Return GB for MiB, the unit of the records."""
    return f"{mebibytes * 2**20 / 1e9:.1f}"
