"""Evaluates a checkpoint: ``python -m keygrip.evaluate checkpoint=RUN_FOLDER``.

Prints one line of JSON last on standard output: open-loop errors on the validation demonstrations and closed-loop
success in the simulator, each under a name that holds its unit.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.config import EntrySchema, entry_point, register

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

log = logging.getLogger(__name__)


@dataclass
class EvaluateSchema(EntrySchema):
    """Root of ``conf/evaluate.yaml``."""

    checkpoint: str = MISSING
    open_loop: bool = True
    closed_loop: bool = True
    episodes: int = 100
    suites: Any = MISSING
    first_seed: int = 1_000_000
    processes: int | None = None
    videos: int = 2
    task: Any = None
    control: Any = None
    decoder: str | None = None
    mode: Any = None
    split: str = "test"
    limit_batches: int | None = None
    max_new_tokens: int = 64
    question_sets: Any = None
    conditions: Any = MISSING


register("evaluate_schema", EvaluateSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates as ``cfg`` says; returns what is printed.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one of a model that cannot be evaluated so.
    """
    from keygrip.training.checkpoints import find_checkpoint, load_module, read_checkpoint

    file = find_checkpoint(cfg.checkpoint)
    config = OmegaConf.create(read_checkpoint(file)["keygrip"]["config"])
    module = load_module(file)
    output = evaluation_output(file, cfg.run_dir)
    started = time.time()
    result: dict[str, Any] = {"checkpoint": str(file), "model": type(module).__name__}
    from keygrip.foveated_vlm.module import FoveatedVLMModule

    answering = isinstance(module, FoveatedVLMModule)
    if answering:
        result |= answers(module, config, cfg)
    elif cfg.mode is not None or cfg.question_sets:
        raise ValueError(
            f"mode and question_sets are for video-language models; {file} holds a {type(module).__name__}"
        )
    if cfg.open_loop and not answering:
        result["open_loop"] = open_loop(module, config)
    if cfg.closed_loop and not answering:
        result["closed_loop"] = closed_loop(module, config, cfg, file, output)
    result |= {"wall_s": round(time.time() - started, 1), "machine": machine()}
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / ".result.json"
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(output / "result.json")
    log.info("written to %s", output)
    return result


def evaluation_output(checkpoint: str | Path, run_dir: str | None) -> Path:
    """The folder for an evaluation's files: ``run_dir`` if given, else ``evaluation`` in the checkpoint's run
    folder."""
    if run_dir is not None:
        return Path(run_dir)
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "evaluation"


def machine() -> dict[str, Any]:
    """What computed a figure: processor, cores, GPU, versions."""
    import os

    import torch

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def open_loop(module: LightningModule, config: DictConfig) -> dict[str, float]:
    """Errors on the run's validation demonstrations, as in training's validation."""
    from hydra.utils import instantiate
    from lightning.pytorch import Trainer

    datamodule = instantiate(config.data, _convert_="all")
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
    (metrics,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    return {name.removeprefix("val/"): round(value, 5) for name, value in metrics.items()}


def answers(module: Any, config: DictConfig, cfg: DictConfig) -> dict[str, Any]:
    """Figures of a video-language model, by mode, on a split of its run's data and on local question sets.

    Raises:
        ValueError: a mode that the model does not have, or a split without samples.
    """
    import itertools

    import torch
    from hydra.utils import instantiate

    from keygrip.foveated_vlm.evaluation import evaluate_choices, evaluate_modes
    from keygrip.foveated_vlm.question_sets import read_question_set

    chosen = module.network.modes if cfg.mode is None else cfg.mode
    modes = [chosen] if isinstance(chosen, str) else list(chosen)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {}
    if cfg.split not in ("val", "test", "none"):
        raise ValueError(f"split={cfg.split}: choose val, test or none")
    if cfg.split != "none":
        datamodule = instantiate(config.data, _convert_="all")
        datamodule.collator = module.collator  # with the tokenizer of the checkpoint
        datamodule.prepare_data()
        datamodule.setup("validate")
        loader = datamodule.test_dataloader() if cfg.split == "test" else datamodule.val_dataloader()
        batches = itertools.islice(iter(loader), cfg.limit_batches)
        result[cfg.split] = evaluate_modes(module, batches, modes, cfg.max_new_tokens)
    for name, root in (_plain(cfg.question_sets) or {}).items():
        result[name] = evaluate_choices(module, read_question_set(name, root), modes)
    return result


def closed_loop(
    module: LightningModule, config: DictConfig, cfg: DictConfig, checkpoint: Path, output: Path
) -> dict[str, Any]:
    """Success in the simulator under the conditions of the chosen suites."""
    from hydra.utils import instantiate

    from keygrip.evaluation.callback import write_result
    from keygrip.evaluation.closed_loop import ClosedLoop, changed, summarise

    if not hasattr(module, "policy"):
        raise ValueError(
            f"{checkpoint} holds a {type(module).__name__}, which drives no robot: give closed_loop=false."
        )
    record = config.data.get("record")
    if record is None or config.data.get("root") is not None:
        raise ValueError(
            "this run was trained on recorded folders that the simulator knows nothing of: give "
            "closed_loop=false, or evaluate on the robot"
        )
    unknown = [suite for suite in cfg.suites if suite not in cfg.conditions]
    if unknown:
        raise ValueError(f"there is no suite {unknown[0]!r}: suites are {', '.join(cfg.conditions)}")
    conditions = {name: grid for suite in cfg.suites for name, grid in _plain(cfg.conditions[suite]).items()}
    if cfg.decoder is not None:
        from keygrip.volume_query.module import VolumeQueryModule

        if not isinstance(module, VolumeQueryModule):
            raise ValueError(f"decoder={cfg.decoder} has no meaning for a {type(module).__name__}: leave it out.")
    settings = ClosedLoop(
        task=changed(instantiate(record.task), _plain(cfg.task) or {}),
        conditions=conditions,
        episodes=cfg.episodes,
        first_seed=cfg.first_seed,
        image_size=record.image_size,
        hz=record.hz,
        control=_control(_plain(cfg.control) or {}),
        processes=cfg.processes,
        videos=cfg.videos,
        decoder=cfg.decoder,
    )
    results = settings.run(checkpoint, output)
    figures = summarise(results)
    write_result(output / "closed_loop.json", figures, results)
    return figures


def _control(options: dict[str, Any]) -> Callable[..., Any]:
    """The controller with some settings changed."""
    from keygrip.control import RecedingHorizon
    from keygrip.evaluation.closed_loop import refuse_unknown

    refuse_unknown(options, RecedingHorizon)
    return partial(RecedingHorizon, **options)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def print_result(cfg: DictConfig) -> None:
    """Evaluates and prints the result as one line of JSON."""
    print(json.dumps(run(cfg)))


def main() -> None:
    """Command line."""
    entry_point("evaluate", print_result)


if __name__ == "__main__":
    main()
