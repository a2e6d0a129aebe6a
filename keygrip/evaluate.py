"""Evaluates a checkpoint: ``python -m keygrip.evaluate checkpoint=RUN_FOLDER``.

What is measured is the model's affair (`evaluation()` of its LightningModule). Prints one line of JSON last on standard
output, each figure under a name that holds its unit.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.command import entry_point
from keygrip.config import EntrySchema, compose, register

if TYPE_CHECKING:
    from keygrip.evaluation.kinds import Evaluation

log = logging.getLogger(__name__)


@dataclass
class EvaluateSchema(EntrySchema):
    """Root of ``conf/evaluate.yaml``."""

    checkpoint: str = MISSING
    open_loop: bool = True
    simulate: bool = True
    episodes: int = 100
    suites: Any = MISSING
    first_seed: int = 1_000_000
    processes: int | None = None
    videos: int = 2
    task: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    mode: Any = None
    split: str = "test"
    limit_batches: int | None = None
    max_new_tokens: int = 64
    question_sets: dict[str, Any] = field(default_factory=dict)
    conditions: Any = MISSING
    cases: Any = None
    images: int = 128
    text_scales: Any = MISSING
    dino_scales: Any = MISSING
    grid_images: int = 32
    sampling: Any = None
    lpips: str = "auto"
    replace_words: dict[str, Any] = field(default_factory=dict)
    shown: int = 8


register("evaluate_schema", EvaluateSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates as ``cfg`` says; returns what is printed.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one of a model that cannot be evaluated so.
    """
    from keygrip.evaluation.kinds import Evaluable, Evaluated
    from keygrip.training.checkpoints import find_checkpoint, load_module, read_checkpoint
    from keygrip.training.metadata import machine

    file = find_checkpoint(cfg.checkpoint)
    config = OmegaConf.create(read_checkpoint(file)["keygrip"]["config"])
    module = load_module(file)
    if not hasattr(module, "evaluation"):
        raise ValueError(f"{file} holds a {type(module).__name__}, which has no evaluation")
    evaluation = cast(Evaluable, module).evaluation()
    _refuse_other_settings(cfg, evaluation, f"a {type(module).__name__}, which {file} holds")
    output = evaluation_output(file, cfg.run_dir)
    started = time.time()
    result: dict[str, Any] = {"checkpoint": str(file), "model": type(module).__name__}
    result |= evaluation.run(Evaluated(module, config, file, output), cfg)
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


def _refuse_other_settings(cfg: DictConfig, evaluation: Evaluation, what: str) -> None:
    """A setting that was changed and that this evaluation does not read would have no effect."""
    common = {"checkpoint", *EntrySchema.__dataclass_fields__}
    usual = compose("evaluate", ["checkpoint=none"])
    for name in EvaluateSchema.__dataclass_fields__:
        if name not in common | evaluation.settings and cfg[name] != usual[name]:
            raise ValueError(
                f"{name} has no meaning for {what}; its settings are {', '.join(sorted(evaluation.settings))}"
            )


def print_result(cfg: DictConfig) -> None:
    """Evaluates and prints the result as one line of JSON."""
    print(json.dumps(run(cfg)))


def main() -> None:
    """Command line."""
    entry_point("evaluate", print_result)


if __name__ == "__main__":
    main()
