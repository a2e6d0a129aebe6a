"""Evaluation of a robot policy: errors on recorded demonstrations, success in the simulator."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from omegaconf import DictConfig

from keygrip.evaluation.closed_loop import ClosedLoop
from keygrip.evaluation.environments import environment_settings
from keygrip.evaluation.kinds import Evaluated, plain, refuse_unknown
from keygrip.evaluation.rollout_report import write_report
from keygrip.evaluation.trained_policy import policy_of
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.fit import quiet_lightning

DEFAULT_SUITES = ["in_distribution", "position", "viewpoint"]  # as in conf/evaluate/policy.yaml


def evaluate_policy(evaluated: Evaluated, cfg: DictConfig) -> dict[str, Any]:
    """`open_loop` and `closed_loop`, as far as they are asked for."""
    result: dict[str, Any] = {}
    if cfg.open_loop:
        result["open_loop"] = open_loop(evaluated)
    if cfg.simulate:
        result["closed_loop"] = closed_loop(evaluated, cfg)
    return result


def open_loop(evaluated: Evaluated) -> dict[str, float]:
    """Errors on the run's validation demonstrations, as in training's validation."""
    from lightning.pytorch import Trainer

    quiet_lightning(warnings_too=True)
    datamodule = evaluated.stored_data()
    if hasattr(datamodule, "asked_by"):
        datamodule.asked_by(evaluated.module)
    if getattr(datamodule, "fit_to_workspace", False):  # the run has chosen; other data would choose otherwise
        datamodule.fit_to_workspace, datamodule.geometry = False, evaluated.module.statistics.geometry  # type: ignore
    datamodule.prepare_data()
    datamodule.setup("validate")
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    (metrics,) = trainer.validate(evaluated.module, datamodule=datamodule, verbose=False)
    return {name.removeprefix("val/"): round(value, 5) for name, value in metrics.items()}


def closed_loop(evaluated: Evaluated, cfg: DictConfig) -> dict[str, Any]:
    """Success in the environment under the conditions of the chosen suites, or in each of its tasks.

    Raises:
        ValueError: the model drives no robot, its demonstrations do not say which environment they are from, or it
            cannot do what a setting asks for.
    """
    module: Any = evaluated.module
    checkpoint, output = evaluated.checkpoint, evaluated.output
    if not hasattr(module, "policy"):
        raise ValueError(f"{checkpoint} holds a {type(module).__name__}, which drives no robot: give simulate=false.")
    env = environment_settings(evaluated.config.data, plain(cfg.env), evaluated.trust)
    conditions: dict[str, Any] = {}
    if env.tasks:
        if plain(cfg.suites) != DEFAULT_SUITES:
            raise ValueError(f"suites are for one task: the tasks of env={cfg.env.name} are its conditions")
    else:
        unknown = [suite for suite in cfg.suites if suite not in cfg.conditions]
        if unknown:
            raise ValueError(f"there is no suite {unknown[0]!r}: suites are {', '.join(cfg.conditions)}")
        conditions = {name: grid for suite in cfg.suites for name, grid in plain(cfg.conditions[suite]).items()}
    policy = plain(cfg.policy) or {}
    policy_of(module, checkpoint, policy)  # what it cannot do is refused now, not in a worker
    make = partial(
        ClosedLoop,
        conditions=conditions,
        episodes=cfg.episodes,
        first_seed=cfg.first_seed,
        control=_control(plain(cfg.control) or {}),
        processes=cfg.processes,
        videos=cfg.videos,
        policy=policy,
        trust=evaluated.trust,
        external=evaluated.external,
    )
    settings = env.closed_loop(make, plain(cfg.task) or {})
    report = write_report(settings.run(checkpoint, output), output / "closed_loop.json", settings.of_tasks)
    figures: dict[str, Any] = report["conditions"]
    return {"tasks": figures, "all": report["all"]} if settings.of_tasks else figures


def _control(options: dict[str, Any]) -> partial[RecedingHorizon]:
    """The controller with some settings changed."""
    refuse_unknown(options, RecedingHorizon)
    return partial(RecedingHorizon, **options)
