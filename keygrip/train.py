"""Train a model: ``python -m keygrip.train model=... data=... [experiment=...]``."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from keygrip.command import entry_point
from keygrip.config import SettingError, as_list, compose_with_choices
from keygrip.config_errors import constructor_errors, setting_errors
from keygrip.training import run_folder
from keygrip.training.idle_settings import refuse_idle
from keygrip.training.main_guard import refuse_unguarded_script
from keygrip.training.results import read_result

_starts = itertools.count(1)  # counts trainings of this process that were not started by a command


def run(cfg: DictConfig, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Train with the settings of ``cfg`` and return the headline metrics.

    Files in the run folder: ``config.yaml`` (resolved), ``metadata.json``, ``checkpoints/``, the loggers' files and
    ``result.json`` (status, metrics, overrides, wall time).

    Args:
        cfg: composed from ``conf/train.yaml``; ``keygrip.config.compose("train", [...])`` outside the command line.
        overrides: those that ``cfg`` was composed with, for ``result.json``; None: those of the command line.

    Raises:
        ValueError: unsuitable settings or data. If they are rejected before the work begins, a new run folder is
            removed.
        FileNotFoundError: data, weights or a checkpoint to resume are missing.
        keygrip.training.signals.Interrupted: a signal ended the run, after saving.
    """
    cfg = cfg.copy()
    command = "train"
    by_command = overrides is None and HydraConfig.initialized()
    if by_command:  # Hydra has chosen the folder
        hydra = HydraConfig.get()
        folder, command, overrides = Path(hydra.runtime.output_dir), hydra.job.name, hydra.overrides.task
    else:
        folder = _folder_of(cfg, overrides)
    with open_dict(cfg):
        cfg.run_dir = str(folder)
    try:
        with run_folder.lock_folder(folder):
            from keygrip.training.fit import fit  # torch and lightning take seconds to import; an error above does not

            return fit(cfg, folder, command, list(overrides or ()))
    except BaseException:
        if not by_command:  # a command removes the folder itself, together with its log
            run_folder.remove_unbegun(folder)
        raise


def _folder_of(cfg: DictConfig, overrides: Sequence[str] | None) -> Path:
    """Return the run folder of a training that was not started by a command. The options of the groups are unknown
    here, so a new folder is named after the classes of model and data."""
    model = str(cfg.model._target_).rpartition(".")[2]
    data = str(cfg.data._target_).rpartition(".")[2]
    return Path(run_folder.choose_folder(cfg.run_dir, cfg.resume, model, data, next(_starts), overrides)).absolute()


def train(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train as ``python -m keygrip.train`` does with the same overrides.

    Args:
        overrides: Hydra overrides, e.g. ``["model=volume_query", "data=yam", "seed=1"]``.

    Returns:
        The content of ``result.json``: ``status``, ``steps``, ``metrics``, ``run_dir``, ``checkpoint``, ``wall_s``.

    Raises:
        ValueError, FileNotFoundError: as the command; keygrip.config.SettingError for a setting that does not exist,
            and for ``sweep=NAME``, which is several trainings.
    """
    refuse_unguarded_script()
    given = as_list(overrides)
    if {"-m", "--multirun"} & set(given):
        raise SettingError("a sweep (-m) is several trainings, for the command: keygrip train -m ...")
    with setting_errors("train", given):
        cfg, choices = compose_with_choices("train", given)
        if (sweep := choices.get("sweep")) is not None:
            raise SettingError(f"sweep={sweep} is several trainings, for the command: keygrip train sweep={sweep}")
        refuse_idle(cfg, given)  # before a folder is made
    model, data = choices["model"], choices["data"]
    cfg.run_dir = run_folder.choose_folder(cfg.run_dir, cfg.resume, model, data, next(_starts), given)
    with constructor_errors():
        run(cfg, given)
    return read_result(Path(cfg.run_dir))


def main() -> None:
    """Command line."""
    entry_point("train", run)


class TrainModule(types.ModuleType):
    """A callable module: ``keygrip.train(...)``."""

    def __call__(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        return train(overrides)


sys.modules[__name__].__class__ = TrainModule

if __name__ == "__main__":
    main()
