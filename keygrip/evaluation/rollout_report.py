"""The report of a closed-loop evaluation: figures of each condition, every episode, and a grid of the videos."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keygrip.artifacts import write_json
from keygrip.envs.metaworld.tasks import DIFFICULTY
from keygrip.evaluation.closed_loop import EPISODES_FILE, ConditionResult, clamped, success_rates, summarise
from keygrip.evaluation.rollout_grid import grid_of_rollouts

log = logging.getLogger(__name__)

REPORT, RESULT = "closed_loop.json", "result.json"  # in a run folder's closed_loop/, the report is result.json
VIDEOS, GRID = "videos", "rollouts.mp4"


def write_report(results: list[ConditionResult], file: Path, tasks: bool) -> dict[str, Any]:
    """Write figures and episodes as JSON, and for several tasks also a grid of their videos in the same folder.

    Args:
        file: in the folder that holds `videos`. tasks: whether the conditions are tasks.

    Returns:
        `conditions`: the figures by name; for several tasks also `all`: see `over_tasks`.
    """
    report: dict[str, Any] = {"conditions": summarise(results)}
    if tasks:
        report["all"] = over_tasks(results)
    episodes = {result.name: [vars(episode) for episode in result.episodes] for result in results}
    write_json(file, {**report, "episodes": episodes})
    if tasks:
        grid_of_rollouts(results, file.parent / VIDEOS, file.parent / GRID)
    return report


def remove_report(folder: Path) -> None:
    """Remove the report, the episodes and the videos of an earlier evaluation, which would pass for those of the next.

    A folder without the episodes of an evaluation is left as it is, and so are videos that the episodes do not name.
    """
    episodes = folder / EPISODES_FILE
    if not episodes.is_file():
        return
    log.info("the closed-loop results of an earlier evaluation are removed from %s", folder)
    for name in _named_videos(episodes):
        (folder / VIDEOS / name).unlink(missing_ok=True)
    for file in (
        folder / GRID,
        folder / REPORT,
        folder / RESULT,
        episodes,
    ):  # the episodes last: they name what else is to be removed
        file.unlink(missing_ok=True)


def _named_videos(episodes: Path) -> Iterator[str]:
    """Yield the names of the videos in a file of episodes, whose last line may be cut off."""
    for line in episodes.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            video = json.loads(line).get("video")
        except (ValueError, AttributeError):
            continue
        if isinstance(video, str) and video == Path(video).name and video.endswith(".mp4"):
            yield video


def over_tasks(results: Sequence[ConditionResult]) -> dict[str, Any]:
    """Return figures over several tasks, each a condition: the mean of their success rates, and by difficulty group.

    `success_low` and `success_high` are the 95 % Wilson interval of the pooled episodes.
    """

    def pooled(chosen: Sequence[ConditionResult]) -> dict[str, Any]:
        episodes = [episode for result in chosen for episode in result.episodes]
        mean = sum(success_rates(each.episodes)["success_rate"] for each in chosen) / len(chosen)
        return success_rates(episodes) | {"success_rate": mean, "tasks": len(chosen)} | clamped(episodes)

    groups: dict[str, list[ConditionResult]] = {}
    for result in results:
        groups.setdefault(DIFFICULTY.get(result.name, "other"), []).append(result)
    order = [group for group in ("easy", "medium", "hard", "very_hard", "other") if group in groups]
    return pooled(results) | {"by_difficulty": {group: pooled(groups[group]) for group in order}}
