"""Log settings, images and text in the same way to every logger; one W&B run per run folder."""

from __future__ import annotations

import csv
import logging
import secrets
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard.summary import hparams

from keygrip.artifacts import atomic_write, without_passwords, write_text
from keygrip.launch import is_first_process
from keygrip.training.loss_curves import STEP_TFLOP
from keygrip.training.monitors import GRAD_NORM

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

WANDB_ID = "wandb_run_id.txt"
TABLE = "metrics.csv"  # of Lightning's CSVLogger
# Beginnings of names that callbacks and models log once a step has begun. What else they log has the number of the step
# that has just ended.
OF_BEGUN_STEPS = ("lr-", "health/", GRAD_NORM, STEP_TFLOP)


def _logger_settings(group: DictConfig | None) -> list[DictConfig]:
    """Return the settings of each logger, without loggers removed with `logger.NAME=null`."""
    return [part for part in (group or {}).values() if part is not None]


def refuse_missing_packages(group: DictConfig | None) -> None:
    """Reject a logger that cannot be built, without building any, because a logger starts to record at once.

    Raises:
        ValueError: W&B is requested and not installed.
    """
    if any(part._target_.endswith("WandbLogger") for part in _logger_settings(group)) and not _installed("wandb"):
        raise ValueError(
            "logger=wandb needs the package wandb: pip install 'keygrip[wandb]', or choose logger=tensorboard"
        )


def build_loggers(group: DictConfig | None, folder: Path, resumed_step: int) -> list[Any]:
    """Build the loggers of a run.

    Args:
        group: `logger` of the configuration; see `refuse_missing_packages`. folder: run folder. resumed_step: 0 for a
            new run.
    """
    loggers = []
    for part in _logger_settings(group):
        extra: dict[str, Any] = {}
        if part._target_.endswith("WandbLogger"):
            extra = {"id": wandb_id(folder), "resume": "allow"}
        elif resumed_step and part._target_.endswith("TensorBoardLogger"):
            # Steps that a killed run logged after its last checkpoint are logged again; their old values are dropped.
            extra = {"purge_step": resumed_step + 1}
        logger = instantiate(part, _convert_="all", **extra)
        if resumed_step and part._target_.endswith("CSVLogger") and is_first_process():
            _keep_table(logger, resumed_step)
        loggers.append(logger)
    return loggers


def _keep_table(logger: Any, resumed_step: int) -> None:
    """Keep the rows that a run's CSVLogger wrote before the step at which the run resumes, because Lightning removes
    the table of an earlier start. Later rows are logged again; rows cut off by a killed process are dropped."""
    file = Path(logger.log_dir) / TABLE
    aside = file.with_name("metrics.before_resume.csv")  # holds the rows while Lightning removes the table
    source = file if file.is_file() else aside
    if not source.is_file():
        return
    with source.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(line for line in lines if line.endswith("\n"))
        names, rows = list(table.fieldnames or ()), list(table)
    if "step" not in names:
        log.warning("%s has no table of this run's earlier steps: it begins anew", source)
        return
    whole_rows = [row for row in rows if None not in row and None not in row.values() and row["step"].isdecimal()]
    if len(whole_rows) < len(rows):
        log.warning("%s: %d torn rows are left out", source, len(rows) - len(whole_rows))
    with atomic_write(aside, "w") as kept_file:
        table_writer = csv.DictWriter(kept_file, names)
        table_writer.writeheader()
        table_writer.writerows(row for row in whole_rows if _precedes(row, resumed_step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the table will be deleted
        writer = logger.experiment
    aside.replace(file)
    writer.metrics_keys = names


def _precedes(row: Mapping[str, str], resumed_step: int) -> bool:
    """Return whether a row of a CSVLogger's table was logged before a run's checkpoint of ``resumed_step`` steps.

    Lightning numbers its own rows, which have an epoch, by the step in which they were logged, from 0; callbacks number
    theirs by the steps that are done, so that those of the last step before the checkpoint have its number.
    """
    step = int(row["step"])
    if step != resumed_step:
        return step < resumed_step
    return row.get("epoch") == "" and not any(value and name.startswith(OF_BEGUN_STEPS) for name, value in row.items())


def wandb_id(folder: Path) -> str:
    """Return the id of the W&B run: created once and stored in the run folder, so that a resumed run continues it.

    Only the first process of a run logs and stores its id. The ids of other processes are not used.
    """
    file = folder / WANDB_ID
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(8)
    if is_first_process():
        write_text(file, run_id + "\n")
    return run_id


def log_settings(loggers: Iterable[Any], resolved: Mapping[str, Any], step: int = 0) -> None:
    """Log the resolved configuration as hyperparameters in every logger that accepts them; in TensorBoard also as text.
    Passwords in URLs are removed, because a logger may send the configuration to a server.

    Args:
        step: optimizer step at which the run starts or resumes.
    """
    settings = without_passwords(resolved)
    flat = flattened(settings)
    for logger in loggers:
        logger.log_hyperparams(flat)
        if isinstance(logger, TensorBoardLogger) and is_first_process():
            # Without a metric, Lightning writes them only to a YAML file, which TensorBoard does not read.
            for part in hparams(flat, {}):
                logger.experiment.file_writer.add_summary(part, step)
            text = OmegaConf.to_yaml(OmegaConf.create(settings))
            logger.experiment.add_text("config", f"```yaml\n{text}```", step)


def flattened(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries, ``{"model.network.width": 3}``; lists and too large integers become strings."""
    if isinstance(node, Mapping):
        return {
            key: value for name, child in node.items() for key, value in flattened(child, f"{prefix}{name}.").items()
        }
    is_loggable = (
        node is None or isinstance(node, float | str) or (isinstance(node, int) and abs(node) <= sys.float_info.max)
    )
    value = node if is_loggable else str(node)
    return {prefix.removesuffix("."): value}


def takes_images(loggers: Iterable[Any]) -> bool:
    """Return whether any logger accepts images; if none does, no images need to be rendered."""
    return any(hasattr(logger, "log_image") or hasattr(_logger_experiment(logger), "add_image") for logger in loggers)


def log_final_figures(loggers: Iterable[Any], figures: Mapping[str, float], step: int) -> None:
    """Log figures that are measured after the last step. A run that is resumed at this step measures them again: in the
    table of a CSVLogger, the new row replaces the earlier one.

    Args:
        step: optimizer step.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger) and is_first_process():
            _remove_rows(logger, figures, step)
        logger.log_metrics(figures, step=step)


def _remove_rows(logger: CSVLogger, names: Iterable[str], step: int) -> None:
    """Remove the rows of a step that have one of the figures."""
    logger.save()  # adds rows that are still in memory
    file = Path(logger.log_dir) / TABLE
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        columns, rows = list(table.fieldnames or ()), list(table)
    kept = [row for row in rows if row["step"] != str(step) or not any(row.get(name) for name in names)]
    if len(kept) < len(rows):
        with atomic_write(file, "w") as table_file:
            table_writer = csv.DictWriter(table_file, columns)
            table_writer.writeheader()
            table_writer.writerows(kept)


def log_image(loggers: Iterable[Any], key: str, image: np.ndarray, step: int) -> None:
    """Log an image to TensorBoard and W&B.

    Args:
        key: with the split, ``val/prediction``. image: ``[H, W, 3]`` uint8. step: optimizer step.
    """
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [image], step=step)
        elif hasattr(_logger_experiment(logger), "add_image"):
            _logger_experiment(logger).add_image(key, image, step, dataformats="HWC")


def log_text(loggers: Iterable[Any], key: str, text: str, step: int) -> None:
    """Log a text to TensorBoard and W&B."""
    for logger in loggers:
        if hasattr(logger, "log_text"):
            logger.log_text(key, columns=["text"], data=[[text]], step=step)
        elif hasattr(_logger_experiment(logger), "add_text"):
            _logger_experiment(logger).add_text(key, text, step)


def finish(loggers: Iterable[Any], failed: bool) -> None:
    """Close loggers that would otherwise continue in the next job of a sweep: W&B has one run per process.

    Args:
        failed: whether the run did not finish; W&B then shows it as failed, until it is resumed.
    """
    if any(type(logger).__name__ == "WandbLogger" for logger in loggers):
        # From the package: a logger whose run could not be started would try again on access.
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            run.finish(exit_code=int(failed))


def _logger_experiment(logger: Any) -> Any:
    return getattr(logger, "experiment", None)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported in a way that left no specification
        return False
