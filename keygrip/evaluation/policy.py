"""Evaluation of a robot policy: errors on recorded demonstrations, success in the simulator."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from keygrip.config import SettingError, config_folder
from keygrip.data.robot.frame_rates import refuse_other_steps
from keygrip.data.robot.roots import refuse_renamed
from keygrip.evaluation.closed_loop import EPISODES_FILE, ClosedLoop
from keygrip.evaluation.environments import EnvironmentSettings, environment_settings
from keygrip.evaluation.kinds import Evaluated, changed, plain, refuse_invalid
from keygrip.evaluation.rollout_report import REPORT, remove_report, write_report
from keygrip.evaluation.trained_policy import check_policy, default_device
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.fit import quiet_lightning
from keygrip.training.sweep_jobs import in_sweep
from keygrip.training.torch_files import refuse_missing_device

log = logging.getLogger(__name__)

DEFAULT_SUITES = ["in_distribution", "position", "viewpoint"]  # as in conf/evaluate/policy.yaml
# Options that a condition adds to the task's own values: it moves the camera from its place in the demonstrations.
AZIMUTH = "camera_azimuth_deg"
CAMERA_MOVES = (AZIMUTH, "camera_elevation_deg")
NONE_HELD_OUT = "the run holds out no demonstrations (data.val_fraction=0, or there is only one demonstration)"


def evaluate_policy(evaluated: Evaluated, cfg: DictConfig) -> dict[str, Any]:
    """Return `open_loop` and `closed_loop`, if requested, and `conditions_left_out` by name, with the
    reason.

    Raises:
        ValueError: Nothing is requested, or a request cannot be met. ModuleNotFoundError: A package for it is missing.
    """
    if not (cfg.open_loop or cfg.simulate):
        raise ValueError("open_loop=false and simulate=false: there is nothing to evaluate")
    result: dict[str, Any] = {}
    settings = None
    # first, so that impossible requests are refused before the validation demonstrations are evaluated
    if cfg.simulate:
        settings, left_out = closed_loop_settings(evaluated, cfg)
        settings.refuse_missing_packages()
        if left_out:
            result["conditions_left_out"] = left_out
    if cfg.open_loop:
        errors = open_loop(evaluated, plain(cfg.data), cfg.device)
        if errors:
            result["open_loop"] = errors
        elif settings is None:
            raise ValueError(
                f"{NONE_HELD_OUT}: nothing is left to evaluate; on a single new one, evaluate with data.root=FOLDER "
                "data.val_fraction=0.99"
            )
        else:
            log.warning("open_loop is left out: %s", NONE_HELD_OUT)
    if (evaluated.output / EPISODES_FILE).is_file():  # an evaluation that is refused leaves the results of the earlier
        if settings is not None:
            settings.check(None)
        remove_report(evaluated.output)
    if settings is not None:
        result["closed_loop"] = closed_loop(evaluated, settings)
    return result


def open_loop(
    evaluated: Evaluated, changes: Mapping[str, Any] | None = None, device: str | None = None
) -> dict[str, float]:
    """Return the errors on the run's validation demonstrations, as in training's validation; empty if there are none.

    Args:
        changes: settings of the run's data that replace stored ones. device: None: the GPU if there is one.

    Raises:
        ValueError: This machine does not have the device; with `changes`, or after demonstrations were removed, the run
            was trained on some of them; or their target steps do not last as long as those that the policy plans.
    """
    device = device or default_device()  # Lightning's "auto" would select MPS on a Mac
    refuse_missing_device(device)
    place = torch.device(device)
    quiet_lightning(warnings_too=True)
    if changes and "root" in changes:
        refuse_renamed(plain(evaluated.config.data.get("root")), changes["root"])
    datamodule = evaluated.stored_data(changes)
    if hasattr(datamodule, "configure_for"):
        datamodule.configure_for(evaluated.module)
    if getattr(datamodule, "fit_to_workspace", False):  # use the run's choice; other data would lead to another one
        datamodule.fit_to_workspace, datamodule.geometry = False, evaluated.module.statistics.geometry  # type: ignore
    datamodule.prepare_data()
    datamodule.setup("validate")
    seconds = getattr(getattr(evaluated.module, "statistics", None), "step_seconds", None)
    if seconds is not None and hasattr(datamodule, "root_of"):
        strides = [root.stride for root in datamodule.roots]
        refuse_other_steps(datamodule.demos, datamodule.root_of, strides, seconds)
    if hasattr(datamodule, "refuse_trained"):
        state = read_checkpoint(evaluated.checkpoint, mapped=True).get(type(datamodule).__qualname__)  # Lightning's key
        datamodule.refuse_trained(state or {}, plain(evaluated.config.data))  # an export has no state
    trainer = Trainer(
        accelerator=place.type,
        devices=1 if place.type == "cpu" or place.index is None else [place.index],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    results = trainer.validate(evaluated.module, datamodule=datamodule, verbose=False)
    return {name.removeprefix("val/"): round(value, 5) for metrics in results for name, value in metrics.items()}


def closed_loop_settings(evaluated: Evaluated, cfg: DictConfig) -> tuple[ClosedLoop, dict[str, str]]:
    """Return the evaluation in the environment, under the conditions of the chosen suites or in each of its tasks; and
    the conditions of the default suites that its task does not support, with the reason.

    Raises:
        ValueError: The model is not a robot policy, its demonstrations do not contain their environment, or it cannot
            do what a setting requests.
    """
    for name, minimum in (("episodes", 1), ("first_seed", 0), ("processes", 1), ("videos", 0)):
        if cfg[name] is not None and cfg[name] < minimum:
            raise ValueError(f"{name}={cfg[name]}: it must be at least {minimum}")
    module: Any = evaluated.module
    checkpoint = evaluated.checkpoint
    if not hasattr(module, "policy"):
        raise ValueError(f"{checkpoint} holds a {type(module).__name__}, which drives no robot: give simulate=false.")
    if not cfg.open_loop and "root" in (plain(cfg.data) or {}) and evaluated.config.data.get("root") is None:
        raise ValueError("data.root has no effect with open_loop=false: the run says itself how its data were recorded")
    env = environment_settings(_relocate_data(evaluated.config.data, cfg.data), plain(cfg.env), evaluated.trust)
    changes = plain(cfg.task) or {}
    conditions: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    if not env.tasks:
        conditions, left_out = _select_conditions(cfg, env, changed(env.task, changes))
    elif plain(cfg.suites) != DEFAULT_SUITES:
        raise ValueError(f"suites are for one task: the tasks of env={cfg.env.name} are its conditions")
    elif own := _suites_with_own_conditions(cfg):
        raise ValueError(
            f"nothing reads conditions.{own[0]}: the conditions are for one task, and the tasks of env={cfg.env.name} "
            "are tested as they are: leave it out"
        )
    policy = plain(cfg.policy) or {}
    check_policy(module, checkpoint, policy)  # refuses invalid settings now, not in a worker
    make = partial(
        ClosedLoop,
        conditions=conditions,
        episodes=cfg.episodes,
        first_seed=cfg.first_seed,
        control=_build_controller(plain(cfg.control) or {}, env.control or {}),
        processes=cfg.processes,
        videos=cfg.videos,
        policy=policy,
        trust=evaluated.trust,
        external=evaluated.external,
        device=cfg.device or default_device(),
    )
    return env.closed_loop(make, changes), left_out


def _relocate_data(stored: Any, changes: Any) -> dict[str, Any]:
    """Return the run's data settings, with the folder to which its demonstrations were moved."""
    data, root = dict(plain(stored)), (plain(changes) or {}).get("root")
    if root is None or data.get("root") is None:  # a run that recorded its own data contains how it did
        return data
    return {**data, "root": root}


def closed_loop(evaluated: Evaluated, settings: ClosedLoop) -> dict[str, Any]:
    """Return the success by condition; for several tasks `tasks` and `all`."""
    output = evaluated.output
    report = write_report(settings.run(evaluated.checkpoint, output), output / REPORT, settings.of_tasks)
    figures: dict[str, Any] = report["conditions"]
    return {"tasks": figures, "all": report["all"]} if settings.of_tasks else figures


def _select_conditions(cfg: DictConfig, env: EnvironmentSettings, task: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the conditions of the chosen suites for a task, and the conditions of the default suites that it does not
    support, with the reason. A moved camera that the policy does not see is not supported either.

    Raises:
        ValueError: A suite does not exist, or a chosen suite has a condition that the task does not support.
    """
    conditions: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    own = _suites_with_own_conditions(cfg)
    if not cfg.suites:
        raise ValueError(f"suites=[]: name at least one of {', '.join(cfg.conditions)}, or give simulate=false")
    if isinstance(cfg.suites, str):  # it would be read as a list of letters
        raise SettingError(f"suites={cfg.suites} is one text: give a list, suites=[{cfg.suites}]")
    for suite in cfg.suites:
        if suite not in cfg.conditions:
            raise ValueError(f"there is no suite {suite!r}: suites are {', '.join(cfg.conditions)}")
        for name, grid in (plain(cfg.conditions[suite]) or {}).items():  # null leaves all of them out
            if grid is None:
                continue
            entries = [_add_camera_moves(task, entry) for entry in grid]
            try:
                for entry in entries:
                    env.refuse_unseen_moves(task, changed(task, entry))
            except ValueError as error:
                place = f"conditions.{suite}.{name}"
                if plain(cfg.suites) != DEFAULT_SUITES:
                    raise ValueError(
                        f"{place}: {error} ({place}=null leaves it out, suites=[in_distribution] all)"
                    ) from error
                log.warning("%s is left out: %s", place, error)
                left_out[name] = str(error)
            else:
                conditions[name] = entries
    for suite in [suite for suite in own if suite not in cfg.suites]:
        if not in_sweep():
            suites = ",".join([*cfg.suites, suite])
            raise ValueError(
                f"nothing reads conditions.{suite}, since suites=[{','.join(cfg.suites)}]: add the suite with "
                f"suites=[{suites}], or leave it out"
            )
        log.warning("nothing in this job reads conditions.%s: its suites are %s", suite, ", ".join(cfg.suites))
    return conditions, left_out


def _suites_with_own_conditions(cfg: DictConfig) -> list[str]:
    """Return the suites whose conditions differ from those of ``conf/evaluate/policy.yaml``.

    Raises:
        ValueError: the conditions of all suites together are replaced by something else than suites.
    """
    if not isinstance(cfg.conditions, DictConfig):
        raise ValueError(f"conditions={cfg.conditions}: the conditions of a suite are left out with suites=[...]")
    default = OmegaConf.load(config_folder() / "evaluate" / "policy.yaml").conditions
    return [str(suite) for suite in cfg.conditions if plain(cfg.conditions[suite]) != plain(default.get(suite))]


def _add_camera_moves(task: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Return a condition's options, with the camera's moves added to the task's own values."""
    moves = {name: entry[name] for name in CAMERA_MOVES if isinstance(entry.get(name), int | float)}
    camera_values = {name: getattr(task, name, 0.0) + by for name, by in moves.items()}
    if abs(camera_values.get(AZIMUTH, 0.0)) > 180:
        camera_values[AZIMUTH] -= math.copysign(360, camera_values[AZIMUTH])
    return {**entry, **camera_values}


def _build_controller(options: dict[str, Any], own: Mapping[str, Any]) -> partial[RecedingHorizon]:
    """Return the controller with some settings changed.

    Args:
        own: the settings of the environment, which `options` replace.

    Raises:
        ValueError: An option does not exist, cannot have the value, or has no effect.
    """
    refuse_invalid(options, RecedingHorizon)
    if "ensemble_decay" in {**own, **options} and not {**own, **options}.get("ensemble"):
        raise ValueError("control.ensemble_decay has no effect without control.ensemble=true: leave one of them out")
    return partial(RecedingHorizon, **options)
