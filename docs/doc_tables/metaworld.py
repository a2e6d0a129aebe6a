"""Tables about policies of several MetaWorld tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from doc_tables.base import LAST_MT50, markdown, rate, read, table


@table
def metaworld_tasks() -> str:
    """Success of each policy of the record on MT10, by task."""
    runs = read("metaworld_mt10")["runs"]
    rows = _by_task(runs, runs[0]["result"]["tasks"])
    rows.append(("mean", *(rate(run["result"]["all"]) for run in runs)))
    return markdown(["task", *(run["name"] for run in runs)], rows)


def _by_task(runs: Sequence[dict[str, Any]], tasks: Iterable[str]) -> list[tuple[str, ...]]:
    """Return a row for each task: its name, and the success of each run."""
    return [(task.removesuffix("-v3"), *(rate(run["result"]["tasks"][task]) for run in runs)) for task in tasks]


@table
def metaworld_groups() -> str:
    """Success of each policy of the record on MT10, by difficulty group."""
    rows = [
        (run["name"], group, rate(figures))
        for run in read("metaworld_mt10")["runs"]
        for group, figures in run["result"]["all"]["by_difficulty"].items()
    ]
    return markdown(["policy", "group", "success"], rows)


@table
def metaworld_mt50() -> str:
    """Success on MT50 by difficulty group: one policy for all tasks, and the scripts that it imitates."""
    runs = read("metaworld_mt50")["runs"]
    groups = ("easy", "medium", "hard", "very_hard")
    rows = [
        (
            run["name"],
            *(rate(run["result"]["all"]["by_difficulty"].get(group)) for group in groups),
            rate(run["result"]["all"]),
        )
        for run in runs
    ]
    return markdown(["policy", *(group.replace("_", " ") for group in groups), "all 50 tasks"], rows)


@table
def metaworld_mt50_tasks() -> str:
    """Success on MT50 by task, in ascending order of the success of the last policy."""
    runs = read("metaworld_mt50")["runs"]
    last = next(run for run in runs if run["name"] == LAST_MT50)["result"]["tasks"]
    tasks = sorted(last, key=lambda name: last[name]["success_rate"])
    return markdown(["task", *(run["name"] for run in runs)], _by_task(runs, tasks))


@table
def metaworld_equal_time() -> str:
    """Success on MT10 of policies that were trained on the same demonstrations for the same wall time."""
    rows = [
        (run["name"], run["demos"], run["steps"], run["batch"], rate(run["result"]["all"]))
        for run in read("metaworld_equal_time")["runs"]
    ]
    return markdown(["policy", "demonstrations per task", "steps", "batch", "success"], rows)


@table
def metaworld_equal_time_tasks() -> str:
    """Success of the policies of `metaworld_equal_time`, by task."""
    runs = read("metaworld_equal_time")["runs"]
    header = ["task", *(f"{run['name']}, {run['demos']}" for run in runs)]
    return markdown(header, _by_task(runs, runs[0]["result"]["tasks"]))
