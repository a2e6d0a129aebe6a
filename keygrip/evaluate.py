"""Evaluate a checkpoint: ``python -m keygrip.evaluate checkpoint=RUN_FOLDER``.

The checkpoint's model determines the measurements (`keygrip.evaluation.kinds`) and the settings, which are in
``conf/evaluate/<kind>.yaml``. The last line on standard output is JSON, with units in the names of the values. The file
``evaluation/result.json`` contains these values and the settings; a job of a sweep (``-m``) writes it to the folder of
the job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from keygrip.artifacts import json_text, write_json
from keygrip.command import entry_point
from keygrip.config import as_list, compose, leaves_of, register_completion
from keygrip.config_errors import constructor_errors, setting_errors
from keygrip.evaluation.kinds import KIND, KINDS, Evaluated, checked_kind, choose_kind, plain
from keygrip.override_values import quoted
from keygrip.training.main_guard import refuse_unguarded_script
from keygrip.training.results import RESULT, read_result
from keygrip.training.run_folder import CHECKPOINT, given_folder, lock_folder
from keygrip.training.strategies import use_tf32
from keygrip.training.sweep_jobs import in_sweep

log = logging.getLogger(__name__)

register_completion("evaluate", choose_kind)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with the settings of ``cfg``; return the metrics and the settings, as written to the result file.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, a model that cannot be evaluated, settings of another kind,
            or TF32 without a GPU.
    """
    import torch

    from keygrip.training.checkpoints import (
        external_files,
        find_checkpoint,
        load_module,
        read_checkpoint,
        trusted_packages,
    )
    from keygrip.training.metadata import machine

    # `device` is a setting of robot policies only
    use_tf32(cfg.tf32, torch.cuda.is_available() and cfg.get("device") != "cpu")
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    config = OmegaConf.create(read_checkpoint(file, mapped=True)["keygrip"]["config"])
    trust = trusted_packages(cfg)
    external = external_files(cfg)
    module = load_module(file, trust=trust, external=external)
    description = f"{file} holds a {type(module).__name__}"
    name = checked_kind(getattr(module, KIND, None), description)
    if set(KINDS[name].settings()) - set(cfg):
        raise ValueError(f"{description}: its settings are those of evaluate={name}")
    output = evaluation_output(file, cfg.run_dir)
    started = time.perf_counter()
    settings = {name: value for name, value in plain(cfg).items() if value is not None}
    used_settings = {name: value for name, value in settings.items() if name not in ("checkpoint", "run_dir")}
    result: dict[str, Any] = {"checkpoint": str(file), "model": type(module).__name__, "settings": used_settings}
    with lock_folder(output):  # two evaluations of one run would mix their results and videos
        result |= get_method(KINDS[name].run)(Evaluated(module, config, file, output, trust, external), cfg)
        result |= {"wall_s": round(time.perf_counter() - started, 1), "machine": machine()}
        write_json(output / RESULT, result)
    log.info("written to %s", output)
    return result


def evaluation_output(checkpoint: str | Path, run_dir: str | None) -> Path:
    """Return the folder for an evaluation's files: ``run_dir`` if given, else ``evaluation`` in the checkpoint's run
    folder; for an earlier checkpoint a subfolder with its name, ``evaluation/step-N``.

    Raises:
        ValueError: ``run_dir`` is a file or a run folder, whose ``result.json`` would be overwritten.
    """
    if run_dir is not None:
        chosen = given_folder("run_dir", run_dir)
        if (chosen / CHECKPOINT).is_file() or "status" in read_result(chosen):
            raise ValueError(
                f"run_dir={run_dir} is a run folder, whose {RESULT} would be overwritten: leave out run_dir (the "
                "results are then in the checkpoint's run folder, in evaluation/), or give another folder"
            )
        return chosen
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    if folder.name != CHECKPOINT.parent.name:
        return folder / "evaluation"
    latest = folder.parent / "evaluation"
    return latest if path.name == CHECKPOINT.name else latest / path.stem


def print_result(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate and print the metrics as one line of JSON, with the path of the file that also has the settings.

    In a sweep the folder for the files is ``evaluation`` in the folder of the job, because several jobs may evaluate
    one run.

    Returns:
        The metrics by path, ``closed_loop/left/success_rate``, for the table of a sweep.
    """
    if in_sweep():
        cfg = cfg.copy()
        cfg.run_dir = str(Path(HydraConfig.get().runtime.output_dir) / "evaluation")
    result = run(cfg)
    printed = {name: value for name, value in result.items() if name != "settings"}
    file = evaluation_output(result["checkpoint"], cfg.run_dir) / RESULT
    print(json_text(printed | {"file": str(file)}, ascii_only=True))
    metrics = {name: value for name, value in printed.items() if name not in ("machine", "wall_s")}
    return {"/".join(path): value for path, value in leaves_of(metrics, ())}


def evaluate(checkpoint: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate as ``python -m keygrip.evaluate checkpoint=...`` does with the same overrides.

    Args:
        checkpoint: a run folder, a checkpoint file or an export.
        overrides: e.g. ``["episodes=20", "suites=[position]"]``.

    Returns:
        The metrics, as in ``evaluation/result.json``.

    Raises:
        ValueError, FileNotFoundError: as the command; keygrip.config.SettingError for a setting that does not exist.
    """
    refuse_unguarded_script()
    if not isinstance(checkpoint, str | os.PathLike):
        raise ValueError(
            f"keygrip.evaluate({str(checkpoint)[:80]}): the run comes first, then the settings, "
            "keygrip.evaluate(RUN, ['episodes=20'])"
        )
    given = [f"checkpoint={quoted(str(checkpoint))}", *as_list(overrides)]
    with setting_errors("evaluate", given):
        cfg = compose("evaluate", given)
    with constructor_errors():
        return run(cfg)


def main() -> None:
    """Command line."""
    entry_point("evaluate", print_result)


class EvaluateModule(types.ModuleType):
    """A callable module: ``keygrip.evaluate(...)``."""

    def __call__(self, checkpoint: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
        return evaluate(checkpoint, overrides)


sys.modules[__name__].__class__ = EvaluateModule

if __name__ == "__main__":
    main()
