"""Which environment a policy is evaluated in: as its demonstrations were recorded, or as `env=...` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keygrip.config import SettingError
from keygrip.envs.gymnasium_environment import GymnasiumTask
from keygrip.envs.metaworld.tasks import DIFFICULTY, task_names
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import ConditionResult
from keygrip.evaluation.kinds import Evaluated, changed, plain
from keygrip.evaluation.statistics import wilson_interval
from keygrip.training.parts import UntrustedPartError, build_stored

RECORDING_FILE = "recording.json"
LARGEST_RECORDING_FILE = 10_000_000  # bytes


@dataclass(frozen=True)
class EnvironmentSettings:
    """What `ClosedLoop` takes of an environment: see there. `tasks` are the conditions, where there are several."""

    task: Any
    image_size: int
    hz: float
    cameras: Sequence[str] | None
    tasks: tuple[str, ...] = ()
    control: Mapping[str, Any] | None = None
    python: str | None = None


def task_conditions(tasks: str | Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """A condition for each of several Meta-World tasks."""
    return {name: [{"name": name}] for name in task_names(tasks)}


def environment_settings(evaluated: Evaluated, env: Mapping[str, Any]) -> EnvironmentSettings:
    """The environment that `env` (of the composed settings) names, for a run.

    Raises:
        ValueError: the run's demonstrations do not say where they were recorded, or the settings do not fit.
    """
    data = evaluated.config.data
    trained_with = plain(data.get("cameras"))
    if env["name"] == "recorded":
        given = [key for key in ("tasks", "image_size", "hz", "cameras", "python") if env[key] is not None]
        if given:
            raise ValueError(f"env.{given[0]} is as recorded: give env=yam, metaworld or gymnasium to choose it")
        if env["control"] or env["task"]:
            name = "control" if env["control"] else "task"
            raise ValueError(f"env.{name} has no effect with env=recorded: give {name}.OPTION=... in place of it")
        record = data.get("record")
        if record is not None and data.get("root") is None:
            try:
                task = build_stored(plain(record.task), "data.record.task", evaluated.trust)
            except UntrustedPartError as error:
                raise UntrustedPartError(f"{error}; say where to judge it: env=yam, metaworld or gymnasium") from error
            return EnvironmentSettings(task, record.image_size, record.hz, trained_with)
        if not isinstance(data.root, str):
            raise ValueError(
                "the run was trained on several data sets: say where to evaluate it with env=yam, metaworld or "
                "gymnasium, or give simulate=false"
            )
        found = _of_folder(Path(data.root), trained_with)
        return found if trained_with else replace(found, cameras=_trained_camera(data, found.task))
    from hydra.utils import instantiate

    task = instantiate(dict(env["task"]), _convert_="all")
    tasks = task_names(env["tasks"]) if env["tasks"] is not None else ()
    cameras = env["cameras"] if env["cameras"] is not None else trained_with or _trained_camera(data, task)
    return EnvironmentSettings(task, env["image_size"], env["hz"], cameras, tasks, env["control"], env["python"])


def _trained_camera(data: Mapping[str, Any], task: Any) -> list[str] | None:
    """The one camera that a run was trained on, where it is not the task's own; None: the task's own."""
    name = data.get("camera")
    if name is None or name == getattr(task, "camera", None):
        return None
    if isinstance(task, GymnasiumTask):
        return [name] if data.get("root") is not None else None  # simulated recordings name the YAM cell's cameras
    try:
        replace(task, camera=name)
    except (TypeError, ValueError):  # another robot's camera: the environment has its own
        return None
    return [name]


def _of_folder(root: Path, cameras: Sequence[str] | None) -> EnvironmentSettings:
    """What a folder recorded in the YAM cell says of itself; its settings are data that is checked."""
    file, advice = root / RECORDING_FILE, "give env=yam, metaworld or gymnasium, or simulate=false"
    if not file.is_file():
        raise ValueError(f"{root} does not say in which environment it was recorded (no {RECORDING_FILE}): {advice}")
    try:
        if file.stat().st_size > LARGEST_RECORDING_FILE:
            raise ValueError("it is too large")
        settings = json.loads(file.read_text())["settings"]
        recorded_in = settings.get("environment")
        if recorded_in == "metaworld":
            raise SettingError(f"{root} was recorded in Meta-World: give env=metaworld env.tasks=...")
        if recorded_in == "gymnasium":  # a file of data does not say which package is imported
            raise SettingError(f"{root} was recorded in a gymnasium environment: give env=gymnasium env.task.id=...")
        stored = dict(settings["task"])
        task = changed(HandoverTask() if stored.get("name") == "handover" else TaskOptions(), stored)
        return EnvironmentSettings(task, int(settings["image_size"]), float(settings["hz"]), cameras)
    except SettingError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a recording ({type(error).__name__}: {error}): {advice}") from error


def over_tasks(results: Sequence[ConditionResult]) -> dict[str, Any]:
    """Figures over several tasks, each a condition: the mean of their success rates, and by difficulty group.

    `success_low` and `success_high` are the 95 % Wilson interval of the pooled episodes.
    """

    def pooled(chosen: Sequence[ConditionResult]) -> dict[str, Any]:
        episodes = [episode for result in chosen for episode in result.episodes]
        won = sum(episode.success for episode in episodes)
        low, high = wilson_interval(won, len(episodes))
        rates = [sum(episode.success for episode in each.episodes) / len(each.episodes) for each in chosen]
        mean = sum(rates) / len(rates)
        counts = {"tasks": len(chosen), "episodes": len(episodes), "successes": won}
        return {"success_rate": mean, "success_low": low, "success_high": high, **counts}

    groups: dict[str, list[ConditionResult]] = {}
    for result in results:
        groups.setdefault(DIFFICULTY.get(result.name, "other"), []).append(result)
    order = [group for group in ("easy", "medium", "hard", "very_hard", "other") if group in groups]
    return pooled(results) | {"by_difficulty": {group: pooled(groups[group]) for group in order}}
