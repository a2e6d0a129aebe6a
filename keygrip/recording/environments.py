"""``keygrip prepare step=record``: select the recorder of the requested environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keygrip.envs.gymnasium_environment import GymnasiumTask
from keygrip.envs.metaworld.tasks import MetaWorldTask
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.recording import demonstrations, gymnasium, metaworld

DEFAULT_HZ, METAWORLD_HZ = 10.0, 20.0  # stored frames per second
METAWORLD_RECOVERIES = 0.2
# the class of env.task in the environments that have a recorder of their own
TASK_CLASSES: dict[str, type] = {"yam": TaskOptions, "yam_handover": HandoverTask, "metaworld": MetaWorldTask}


def record_step(
    environment: str,
    task: TaskOptions | HandoverTask,
    tasks: str | Sequence[str] | None,
    root: str | Path,
    demos: int,
    seed: int,
    image_size: int,
    hz: float | None,
    processes: int | None,
    cameras: Sequence[str] | None,
    depth: bool,
    video: bool,
    recoveries: float | None,
    shadows: bool | None,
    python: str | None,
    env_task: Any = None,
    unread: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record demonstrations; see `demonstrations.record` (yam), `metaworld.record_step` and `gymnasium.record_step`.
    Return their report.

    Args:
        env_task: of the group env: the environment of env=gymnasium, the task of env=yam_handover; for other
            environments it belongs to evaluations.
        unread: settings of the group env that only an evaluation uses, with their values: None if they are not set.

    Raises:
        ValueError: The environment has no scripted expert or does not have a setting, env.task is of a class without a
            recorder, cameras is empty, or seed, hz or processes is out of range.
    """
    for name, value in (unread or {}).items():
        if value is not None:
            raise ValueError(f"env.{name} is for evaluations: for a recording set {name} ({name}=...)")
    if seed < 0:
        raise ValueError(f"first_seed={seed}: it must be at least 0")
    if hz is not None and not hz > 0:
        raise ValueError(f"hz={hz}: give a rate above 0")
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes}: give at least 1, or leave it out for one per core")
    if cameras is not None and not cameras:
        raise ValueError("cameras=[]: name at least one camera, or leave it out for the environment's own choice")
    rate = DEFAULT_HZ if hz is None else hz
    if isinstance(env_task, GymnasiumTask):
        unsupported: dict[str, Any] = {
            "tasks": tasks,
            "recoveries": recoveries,
            "shadows": shadows,
            "depth": depth or None,
        }
        _refuse_settings([name for name, value in unsupported.items() if value is not None], environment)
        _refuse_task(task, environment, "env.task.id")
        return gymnasium.record_step(
            env_task, root, demos, seed, image_size, rate, processes, cameras, video=video, python=python
        )
    _refuse_task_class(env_task, environment)
    if environment == "yam_handover":
        task = _handover_task(task, env_task)
    elif environment in TASK_CLASSES and env_task is not None and env_task != type(env_task)():
        settings = "tasks, cameras and shadows" if environment == "metaworld" else "task (task=...)"
        raise ValueError(f"env.task is for evaluations: for a recording set {settings}")
    if environment in ("yam", "yam_handover"):
        unsupported = {"tasks": tasks, "recoveries": recoveries, "shadows": shadows, "env.python": python}
        _refuse_settings([name for name, value in unsupported.items() if value is not None], environment)
        return demonstrations.record_step(
            task, root, demos, seed, image_size, rate, processes, cameras, depth=depth, video=video
        )
    if environment != "metaworld":
        raise ValueError(
            f"env={environment} has no scripted expert to record: choose env=yam, yam_handover, metaworld or gymnasium"
        )
    if depth:
        _refuse_settings(["depth"], environment)
    _refuse_task(task, environment, "tasks")
    return metaworld.record_step(
        tasks or "mt10",
        root,
        demos,
        seed=seed,
        image_size=image_size,
        hz=METAWORLD_HZ if hz is None else hz,
        cameras=cameras or ("corner2",),
        recoveries=METAWORLD_RECOVERIES if recoveries is None else recoveries,
        shadows=bool(shadows),
        video=video,
        processes=processes,
        python=python,
    )


def _refuse_task_class(env_task: Any, environment: str) -> None:
    """Raise ValueError if env.task is of another class than the recorder of the environment: the recorder would record
    its own task instead."""
    recorded = {**TASK_CLASSES, "gymnasium": GymnasiumTask}.get(environment)
    if env_task is None or recorded is None or type(env_task) is recorded:
        return
    given = f"{type(env_task).__module__}.{type(env_task).__qualname__}"
    raise ValueError(
        f"env.task._target_ is for evaluations: env={environment} records a {recorded.__name__}, not a {given}. "
        "Recorders exist for env=yam, yam_handover and metaworld with their own tasks, and for env=gymnasium: leave "
        "env.task._target_ out, or register your environment with gymnasium (docs/environments.md)"
    )


def _handover_task(task: TaskOptions | HandoverTask, env_task: HandoverTask | None) -> HandoverTask:
    """Return the task to record. Raises ValueError if `task` is set too, or to another task."""
    own = env_task or HandoverTask()
    if isinstance(task, HandoverTask):
        if own not in (HandoverTask(), task):
            raise ValueError("task and env.task hold different tasks of env=yam_handover: give env.task alone")
        return task
    _refuse_task(task, "yam_handover", "env.task, e.g. env.task.random_start=false")
    return own


def _refuse_task(task: TaskOptions | HandoverTask, environment: str, replacement: str) -> None:
    if task != TaskOptions(name="pick_place"):  # the default of the settings
        raise ValueError(f"task is no setting of the recordings of env={environment}: give {replacement}")


def _refuse_settings(names: list[str], environment: str) -> None:
    if names:
        raise ValueError(f"{names[0]} is no setting of the recordings of env={environment}")
