"""Select the environment in which a policy is evaluated, for `keygrip evaluate` and for the evaluation after training.

``env=NAME`` (an option of the group ``env``) selects it. Settings left open (null) are those of the recording of the
demonstrations, if they were recorded in this environment, and defaults otherwise. ``env=recorded`` selects the
environment of the recording.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate

from keygrip.config import SettingError, option_of
from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.hub import folder_of as hub_folder
from keygrip.data.robot.hub import hub_name
from keygrip.data.robot.native import RECORDING_FILE
from keygrip.data.untrusted_files import read_json
from keygrip.envs.gymnasium_environment import GymnasiumTask
from keygrip.envs.metaworld.tasks import HZ, MT10, MT50, MetaWorldTask, newly_rotated_cameras, task_names
from keygrip.envs.yam.camera_moves import refuse_unseen_moves
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import CAMERAS, TaskOptions
from keygrip.evaluation.closed_loop import HELD_OUT_SEED, ClosedLoop
from keygrip.evaluation.kinds import changed, plain, refuse_invalid
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.setting_types import refuse_ill_typed
from keygrip.training.parts import UntrustedPartError, build_stored

log = logging.getLogger(__name__)

LARGEST_RECORDING_FILE = 10_000_000  # bytes
# Option of the group env by the task class of its recordings.
ENVIRONMENTS: dict[type, str] = {
    TaskOptions: "yam",
    HandoverTask: "yam_handover",
    MetaWorldTask: "metaworld",
    GymnasiumTask: "gymnasium",
}
CHOICE = "env=yam, yam_handover, metaworld or gymnasium"
# Used if neither the settings nor a recording contain the value.
DEFAULT_IMAGE_SIZE = 224
DEFAULT_HZ = {"metaworld": HZ}
OTHER_HZ = 10.0
DEFAULT_TASKS = {"metaworld": MT10}


@dataclass(frozen=True)
class EnvironmentSettings:
    """The arguments of `ClosedLoop` that depend on the environment; see `ClosedLoop`. `tasks` are the conditions, if
    there are several; `recorded` describes the recording for training."""

    task: Any
    image_size: int
    hz: float
    cameras: Sequence[str] | None
    tasks: tuple[str, ...] = ()
    control: Mapping[str, Any] | None = None
    python: str | None = None
    recorded: Recorded | None = None

    def closed_loop(self, make: partial[ClosedLoop], changes: Mapping[str, Any] | None = None) -> ClosedLoop:
        """Create the evaluation in this environment.

        Args:
            make: `ClosedLoop` with all other arguments: conditions (none if there are several tasks), episodes,
            control, ...
            changes: to the task.

        Raises:
            ValueError: Conditions are given together with several tasks, or a setting does not exist or has no effect.
        """
        conditions = {name: grid for name, grid in make.keywords.get("conditions", {}).items() if grid is not None}
        if self.tasks and conditions:
            raise ValueError(f"conditions are for one task, and {len(self.tasks)} tasks are conditions themselves")
        refuse_invalid(self.control or {}, RecedingHorizon)
        control = make.keywords.get("control", partial(RecedingHorizon))
        task = changed(self.task, changes or {})
        self.refuse_unseen_moves(self.task, task)
        evaluation = make(
            task=task,
            conditions=task_conditions(self.tasks) if self.tasks else conditions,
            image_size=self.image_size,
            hz=self.hz,
            cameras=self.cameras,
            control=partial(control.func, **{**(self.control or {}), **control.keywords}),
            python=self.python,
            of_tasks=bool(self.tasks),
        )
        for name, grid in conditions.items():
            for cell in grid:
                try:
                    self.refuse_unseen_moves(task, changed(task, cell))
                except ValueError as error:
                    raise ValueError(f"condition {name}: {error}") from error
        episodes = range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes)
        cells = [cell for grid in conditions.values() for cell in grid]
        recorded = self._recorded_seeds([changed(evaluation.task, cell) for cell in cells] or [evaluation.task])
        if recorded_count := sum(seed in recorded for seed in episodes):
            log.warning(
                "%d of the episodes %d to %d were recorded for training, so that success there is not that of new "
                "ones: first_seed=%d and further ones are held out",
                *(recorded_count, episodes[0], episodes[-1], HELD_OUT_SEED),
            )
        return evaluation

    def refuse_unseen_moves(self, task: Any, condition: Any) -> None:
        """Raise ValueError if a condition (a task with changes) moves only a camera that the policy does not see."""
        if self.cameras is not None and isinstance(task, TaskOptions) and isinstance(condition, TaskOptions):
            refuse_unseen_moves(condition, self.cameras, before=task)

    def _recorded_seeds(self, tasks: Sequence[Any]) -> Container[int]:
        """Return the recorded seeds of one of these tasks, or of `tasks`. Another task's episode of a seed differs."""
        if self.recorded is None:
            return ()
        if self.tasks:
            same_task = not set(self.tasks).isdisjoint(self.recorded.tasks)
        else:
            same_task = self.recorded.task is None or self.recorded.task in tasks
        return self.recorded.seeds if same_task else ()


@dataclass(frozen=True)
class Recorded:
    """Where demonstrations were recorded.

    Attributes:
        environment: option of the group env; None: an environment without option. task: None: the data files do not
            contain it. hz: control periods per second. tasks: tasks with demonstrations, for environments with several.
        seeds: of the recorded episodes (of a recording not yet made: of its first ones). upside_down: cameras whose
            recorded images are as the scene mounts them, and which the environment now rotates upright.
    """

    environment: str | None
    task: Any
    image_size: int
    hz: float
    tasks: tuple[str, ...] = ()
    seeds: Container[int] = ()
    upside_down: tuple[str, ...] = ()


def task_conditions(tasks: str | Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Return a condition for each of several Meta-World tasks."""
    return {name: [{"name": name}] for name in task_names(tasks)}


def environment_settings(
    data: Mapping[str, Any], env: Mapping[str, Any], trust: Sequence[str] = ()
) -> EnvironmentSettings:
    """Return the environment that `env` selects, for a policy that was trained on `data`.

    Args:
        data: the run's data settings. env: an option of the group env, with changes. trust: packages besides keygrip
            whose tasks `data` may name.

    Raises:
        ValueError: With env=recorded, the run's demonstrations do not contain where they were recorded; or the settings
            do not fit.
    """
    data = plain(data)
    if env["name"] == "recorded":
        _refuse_changes(env)
        recorded = recorded_in(data, trust)
        if recorded.environment == "gymnasium":  # a data file must not choose which package is imported
            raise SettingError(f"{data['root']} was recorded in gymnasium: give env=gymnasium env.task.id=...")
        if recorded.environment is None:
            cameras = _trained_cameras(data, recorded.task)
            return EnvironmentSettings(recorded.task, recorded.image_size, recorded.hz, cameras, recorded=recorded)
        env = option_of("env", recorded.environment)
        return _resolve_settings(data, env, recorded.task, recorded)
    refuse_ill_typed(env["task"], "env.task")
    kind: Any = get_class(env["task"]["_target_"])
    recorded_there = _find_recording(data, trust, env["name"], kind)
    options = {name: value for name, value in env["task"].items() if name != "_target_"}
    if recorded_there is None or recorded_there.task is None:
        return _resolve_settings(data, env, instantiate(dict(env["task"]), _convert_="all"), recorded_there)
    return _resolve_settings(data, env, changed(recorded_there.task, options), recorded_there)


def _resolve_settings(
    data: Mapping[str, Any], env: Mapping[str, Any], task: Any, recorded: Recorded | None
) -> EnvironmentSettings:
    """Use the setting of `env`, else that of the recording, else the default."""
    name = env["name"]
    _warn_of_changed_settings(env, recorded)
    image_size, hz, tasks = env["image_size"], env["hz"], env["tasks"]
    if image_size is None:
        image_size = DEFAULT_IMAGE_SIZE if recorded is None else recorded.image_size
    if hz is None:
        hz = DEFAULT_HZ.get(name, OTHER_HZ) if recorded is None else recorded.hz
    if tasks is None:
        tasks = DEFAULT_TASKS.get(name) if recorded is None else recorded.tasks or None
    cameras = env["cameras"] if env["cameras"] is not None else _trained_cameras(data, task)
    names = () if tasks is None else task_names(tasks)
    if recorded is not None and (changed_since := set(recorded.upside_down) & set(cameras or [task.camera])):
        raise SettingError(
            f"the policy was trained on images of {', '.join(sorted(changed_since))} that were recorded upside down, "
            f"and env={name} now turns them upright: record into a new folder, and train on "
            "that; simulate=false evaluates it on its recording"
        )
    settings = EnvironmentSettings(task, image_size, hz, cameras, names, env["control"], env["python"], recorded)
    settings.refuse_unseen_moves(TaskOptions() if recorded is None or recorded.task is None else recorded.task, task)
    return settings


def _refuse_changes(env: Mapping[str, Any]) -> None:
    """Raise ValueError if settings are given for an environment that is used as recorded."""
    given = [key for key in ("tasks", "image_size", "hz", "cameras", "python") if env[key] is not None]
    if given:
        raise ValueError(f"env.{given[0]} is as recorded: give {CHOICE} to choose it")
    if env["control"] or env["task"]:
        name = "control" if env["control"] else "task"
        raise ValueError(f"env.{name} has no effect with env=recorded: give {name}.OPTION=... in place of it")


def _warn_of_changed_settings(env: Mapping[str, Any], recorded: Recorded | None) -> None:
    """Warn of settings that differ from the recording of the same environment."""
    if recorded is None:
        return
    for name, recorded_value in (("image_size", recorded.image_size), ("hz", recorded.hz)):
        if env[name] is not None and env[name] != recorded_value:
            log.warning("env.%s=%s, and the demonstrations were recorded with %s", name, env[name], recorded_value)
    if env["tasks"] is not None and recorded.tasks:
        unrecorded = [name for name in task_names(env["tasks"]) if name not in recorded.tasks]
        if unrecorded:
            log.warning("env.tasks names %s, of which there are no demonstrations", ", ".join(unrecorded))


def _find_recording(data: Mapping[str, Any], trust: Sequence[str], name: str, kind: type) -> Recorded | None:
    """Return the recording of the demonstrations, if it was in the environment of these tasks; else log the reason."""
    try:
        recorded = recorded_in(data, trust)
    except ValueError:
        root = data.get("root")
        if isinstance(root, str) and not _data_folder(root).exists():
            log.warning(
                "env=%s with its own defaults: the demonstrations are not in %s, which would say how they were "
                "recorded (data.root=FOLDER names where they are)",
                *(name, root),
            )
        else:
            log.info("env=%s with its own defaults: the demonstrations do not say how they were recorded", name)
        return None
    if recorded.environment != ENVIRONMENTS.get(kind) or (
        recorded.task is not None and type(recorded.task) is not kind
    ):
        simulator = recorded.environment or type(recorded.task).__name__
        log.warning(
            "the demonstrations were recorded in %s; the policy is judged in %s (%s)", simulator, name, kind.__name__
        )
        return None
    return recorded


# -- where demonstrations were recorded ------------------------------------------------------------------------------


def recorded_in(data: Mapping[str, Any], trust: Sequence[str] = ()) -> Recorded:
    """Return where and how the demonstrations of a run were recorded.

    Args:
        data: the run's data settings, plain. trust: packages besides keygrip whose tasks they may name.

    Raises:
        ValueError: The data do not contain it; UntrustedPartError: The task belongs to another package.
    """
    record = data.get("record")
    if record is not None and data.get("root") is None:
        try:
            task = build_stored(record["task"], "data.record.task", trust)
        except UntrustedPartError as error:
            raise UntrustedPartError(f"{error}; say where to judge it: {CHOICE}") from error
        first, demos = record.get("seed", 0), record.get("demos", 0)
        valid = isinstance(first, int) and isinstance(demos, int)
        seeds = range(first, first + demos) if valid else ()  # a data file may contain any value
        return Recorded(ENVIRONMENTS.get(type(task)), task, record["image_size"], record["hz"], seeds=seeds)
    if not isinstance(data.get("root"), str):
        raise ValueError(
            f"the run was trained on several data sets: say where to evaluate it with {CHOICE}, or give simulate=false"
        )
    return _read_recording(_data_folder(data["root"]))


def _data_folder(root: str) -> Path:
    """Return the folder that a setting `data.root` names."""
    name = hub_name(root)
    return Path(root) if name is None else hub_folder(name)


def _read_recording(root: Path) -> Recorded:
    """Read the description of a recorded folder; its settings are untrusted data and are checked."""
    file, advice = root / RECORDING_FILE, f"give {CHOICE}, or simulate=false"
    if not root.exists():
        raise ValueError(
            f"{root}, which would say in which environment the run's demonstrations were recorded, is not there: "
            f"data.root=FOLDER names where they are; or {advice}"
        )
    if not file.is_file():
        raise ValueError(f"{root} does not say in which environment it was recorded (no {RECORDING_FILE}): {advice}")
    try:
        settings = read_json(file, LARGEST_RECORDING_FILE)["settings"]
        recorded_in, image_size = settings.get("environment"), int(settings["image_size"])
        if recorded_in == "gymnasium":
            return Recorded("gymnasium", None, image_size, float(settings["hz"]), seeds=_list_recorded_seeds(root))
        if recorded_in == "metaworld":
            task = changed(
                MetaWorldTask(), {"camera": settings["cameras"][0], "shadows": settings.get("shadows", False)}
            )
            upright_cameras = settings.get("turned_upright", [])
            old = tuple(
                camera for camera in newly_rotated_cameras(settings["cameras"]) if camera not in upright_cameras
            )
            return Recorded(
                "metaworld", task, image_size, HZ, _list_recorded_tasks(root), _list_recorded_seeds(root), old
            )
        stored = dict(settings["task"])
        cell = changed(HandoverTask() if stored.get("name") == "handover" else TaskOptions(), stored)
        hz, seeds = float(settings["hz"]), _list_recorded_seeds(root)
        return Recorded(ENVIRONMENTS[type(cell)], cell, image_size, hz, seeds=seeds)
    except BadSample as error:
        raise ValueError(f"{file} does not describe a recording ({error.what}): {advice}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{file} does not describe a recording ({type(error).__name__}: {error}): {advice}") from error


def _list_recorded_tasks(root: Path) -> tuple[str, ...]:
    """Return the Meta-World tasks with demonstrations in a folder, in the benchmark's order.

    Raises:
        ValueError: There are none.
    """
    names = {file.parent.name.rpartition("_")[0] for file in root.glob("[!.]*/metadata.json")}
    tasks = tuple(name for name in dict.fromkeys((*MT10, *MT50)) if name in names)
    if not tasks:
        raise ValueError("the folder holds no demonstrations")
    return tasks


def _list_recorded_seeds(root: Path) -> frozenset[int]:
    """Return the seeds of a folder's demonstrations, which are at the end of their names."""
    ends = (file.parent.name.rpartition("_")[2] for file in root.glob("[!.]*/metadata.json"))
    return frozenset(int(end) for end in ends if end.isdecimal() and len(end) < 20)


def _trained_cameras(data: Mapping[str, Any], task: Any) -> list[str] | None:
    """Return the cameras that a run was trained on, if they are not the task's own camera; None: the task's own."""
    if data.get("cameras"):
        return list(data["cameras"])
    name = data.get("camera")
    if name is None or name == getattr(task, "camera", None):
        return None
    if isinstance(task, GymnasiumTask):
        return [name] if data.get("root") is not None else None  # simulated recordings have cameras of the YAM cell
    if isinstance(task, TaskOptions):  # its moves of its own camera may be impossible for this one
        return [name] if name in CAMERAS else None
    try:
        replace(task, camera=name)
    except (TypeError, ValueError):  # another robot's camera: the environment uses its own
        return None
    return [name]
