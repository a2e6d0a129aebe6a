"""Evaluation of a robot policy: errors on recorded demonstrations, success in the simulator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig

from keygrip.evaluation.callback import write_result
from keygrip.evaluation.closed_loop import ClosedLoop, changed, refuse_unknown, summarise
from keygrip.evaluation.kinds import Evaluated, plain
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.parts import build_stored


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

    datamodule = evaluated.stored_data()
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
    """Success in the simulator under the conditions of the chosen suites.

    Raises:
        ValueError: the model drives no robot, was trained on what the simulator does not know, or cannot do what a
            setting asks for.
    """
    module: Any = evaluated.module
    checkpoint, output = evaluated.checkpoint, evaluated.output
    if not hasattr(module, "policy"):
        raise ValueError(f"{checkpoint} holds a {type(module).__name__}, which drives no robot: give simulate=false.")
    record = evaluated.config.data.get("record")
    if record is None or evaluated.config.data.get("root") is not None:
        raise ValueError(
            "this run was trained on recorded folders that the simulator knows nothing of: give "
            "simulate=false, or evaluate on the robot"
        )
    unknown = [suite for suite in cfg.suites if suite not in cfg.conditions]
    if unknown:
        raise ValueError(f"there is no suite {unknown[0]!r}: suites are {', '.join(cfg.conditions)}")
    conditions = {name: grid for suite in cfg.suites for name, grid in plain(cfg.conditions[suite]).items()}
    policy = plain(cfg.policy) or {}
    changed(module.policy(), policy)  # what it cannot do is refused now, not in a worker
    settings = ClosedLoop(
        task=changed(build_stored(plain(record.task), "data.record.task", evaluated.trust), plain(cfg.task) or {}),
        conditions=conditions,
        episodes=cfg.episodes,
        first_seed=cfg.first_seed,
        image_size=record.image_size,
        hz=record.hz,
        cameras=plain(evaluated.config.data.get("cameras")),
        control=_control(plain(cfg.control) or {}),
        processes=cfg.processes,
        videos=cfg.videos,
        policy=policy,
        trust=evaluated.trust,
    )
    results = settings.run(checkpoint, output)
    figures = summarise(results)
    write_result(output / "closed_loop.json", figures, results)
    return figures


def _control(options: dict[str, Any]) -> Callable[..., Any]:
    """The controller with some settings changed."""
    refuse_unknown(options, RecedingHorizon)
    return partial(RecedingHorizon, **options)
