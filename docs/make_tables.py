"""Writes the tables of README.md and docs/*.md from the figures in benchmarks/: ``python docs/make_tables.py``.

A table stands between ``<!-- table NAME -->`` and ``<!-- /table -->``; NAME is a function of this file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FIRST, FRESH = "first_seed_1000000", "first_seed_2000000"


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    low, high = 100 * result["success_low"], 100 * result["success_high"]
    return (
        f"{100 * result['success_rate']:.0f} % ({low:.0f} to {high:.0f}), {result['successes']} of {result['episodes']}"
    )


def seeds() -> str:
    """Success of the demo's settings by task and training seed."""
    rows = [(r["task"], r["training_seed"], rate(r[FIRST]), rate(r[FRESH])) for r in read("volume_query_seeds")["runs"]]
    return markdown(["task", "training seed", "seeds from 1 000 000", "fresh seeds from 2 000 000"], rows)


def errors() -> str:
    """The demo's errors on held-out demonstrations beside what quantisation alone costs."""
    figures = read("volume_query_seeds")["demo_after_float32_geometry"]["errors"]
    rows = [
        (name, f"{scale * figures[key]:.1f} {unit}", f"{scale * figures[floor]:.1f} {unit}")
        for name, key, floor, scale, unit in (
            ("pixel (argmax)", "val/pix_argmax", "val/pix_floor", 1, "px"),
            ("height", "val/height_m", "val/height_m_floor", 1000, "mm"),
            ("position", "val/position_cm", "val/position_cm_floor", 1, "cm"),
            ("rotation", "val/rotation_deg", "val/rotation_deg_floor", 1, "deg"),
        )
    ]
    return markdown(["", "error", "floor"], rows)


def shifts() -> str:
    """Volume query against coordinate regression."""
    results = read("volume_query_shifts")["results"]
    keys = list(dict.fromkeys((r["trained_on"], r["training"], r["tested_on"]) for r in results))
    found = {(r["trained_on"], r["tested_on"], r["model"]): r for r in results}
    rows = [
        (
            on,
            training,
            at,
            *(rate(found.get((on, at, model))) for model in ("volume_query_tuned", "coordinate_regression")),
        )
        for on, training, at in keys
    ]
    return markdown(["trained on", "training", "tested on", "volume query", "coordinate regression"], rows)


def options() -> str:
    """The ablation of the volume query's options."""
    rows = []
    for job in read("volume_query_options")["jobs"]:
        m = job["metrics"]
        rows.append(
            (
                job["overrides"]["ablation"].removeprefix("vq_"),
                f"{100 * m['closed_loop/in_distribution/success_rate']:.0f} %",
                f"{m['val/pix_argmax']:.1f} px",
                f"{1000 * m['val/height_m']:.0f} mm",
                f"{m['val/position_cm']:.1f} cm",
                f"{m['val/rotation_deg']:.0f} deg",
                f"{job['wall_s'] / 60:.1f} min",
            )
        )
    return markdown(["switched off", "success, 50 episodes", "pixel", "height", "position", "rotation", "time"], rows)


def speed() -> str:
    """Loss, training, loading and inference of the volume query."""
    loss, training, loader, inference = (read(name) for name in ("volume_loss", "training", "loader", "inference"))
    rows = [
        (
            "exact loss against the dense volume, forward and backward, T = 50, batch 8, float32",
            f"{loss['time_ratio']:.0f} times faster, {loss['memory_ratio']:.0f} times less extra memory",
            "`keygrip.bench case=volume_loss`",
        ),
        ("the same at T = 8", f"{loss['time_ratio_t8']:.1f} and {loss['memory_ratio_t8']:.1f} times", ""),
        (
            "training the demo",
            f"{training['samples_per_s']:.0f} samples/s; "
            f"{100 * training['data_wait_share']:.1f} % of the time waiting for data",
            "`case=training`",
        ),
        (
            "data loader alone, one worker",
            f"{loader['samples_per_s']:.0f} samples/s cached, {loader['uncached_samples_per_s']:.0f} decoded",
            "`case=loader`",
        ),
        (
            "a plan",
            f"{inference['p50_ms']:.0f} ms (p95 {inference['p95_ms']:.0f}); "
            f"one thread {inference['one_thread_p50_ms']:.0f} ms",
            "`case=inference`",
        ),
    ]
    return markdown(["figure", "value", "command"], rows)


def headline() -> str:
    """README: the policy in a few lines."""
    rows: list[tuple[str, str]] = []
    runs = read("volume_query_seeds")["runs"]
    for task in ("pick_place", "pick"):
        counts = [r[FRESH] or r[FIRST] for r in runs if r["task"] == task]
        successes = ", ".join(str(c["successes"]) for c in counts)
        rows.append((f"{task}, {len(counts)} training seeds", f"{successes} of {counts[0]['episodes']}"))
    found = {(r["trained_on"], r["tested_on"], r["model"]): r for r in read("volume_query_shifts")["results"]}
    for on, at, words in (
        ("bar", "bar", "pick_place of a bar, whose yaw matters"),
        ("left_right", "left_to_right", "trained on the left half of the table, tested on the right"),
        ("views", "views_64", "trained at one view, tested at 64 views up to 25 degrees off"),
    ):
        ours, theirs = (found[on, at, model] for model in ("volume_query_tuned", "coordinate_regression"))
        rows.append(
            (
                words,
                f"{ours['successes']} of {ours['episodes']}; coordinate regression: "
                f"{theirs['successes']} of {theirs['episodes']}",
            )
        )
    return markdown(["task (simulator, 100 demonstrations, held-out seeds)", "success"], rows)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (seeds, errors, shifts, options, speed, headline)
}


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}: tables written\n")


if __name__ == "__main__":
    main()
