"""Train a module from a configuration: build data, model, callbacks, loggers and trainer, and record the run."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from keygrip.artifacts import write_json, write_text
from keygrip.config import SettingError, TrainSchema, group_options
from keygrip.launch import set_rendezvous_of_step, tasks_of_srun
from keygrip.setting_types import refuse_ill_typed, written
from keygrip.training import run_folder
from keygrip.training.checkpoints import Header, build_module, read_checkpoint
from keygrip.training.compatibility import (
    log_no_validation,
    no_validation,
    refuse_divided,
    refuse_idle_limits,
    refuse_missing_weights,
    refuse_uneven_batch,
    refuse_unfit,
)
from keygrip.training.compute import Compute
from keygrip.training.dry_run import dry_run
from keygrip.training.idle_settings import refuse_idle
from keygrip.training.loggers import build_loggers, finish, log_settings, refuse_missing_packages
from keygrip.training.metadata import run_metadata
from keygrip.training.monitors import RandomnessByStep
from keygrip.training.pretraining import complete_stages, with_run_folders
from keygrip.training.progress import Throughput
from keygrip.training.results import (
    DRY_RUN,
    FINISHED,
    RUNNING,
    note_beginning,
    read_result,
    remove_traces,
    this_start,
    wall_time,
    write_result,
)
from keygrip.training.resuming import check_resumed, checkpoint_to_resume
from keygrip.training.saving import AtomicCheckpointIO, CopyRestoredMoments, keep_resumed
from keygrip.training.strategies import MissingGPUError, Strategy
from keygrip.training.system import System, parameters_m
from keygrip.training.time_limit import TimeLimit
from keygrip.training.validating import ValidateBySteps
from keygrip.unread_settings import refuse_unread

log = logging.getLogger(__name__)


def fit(cfg: DictConfig, folder: Path, command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train with the settings of ``cfg``, in a folder locked by this process, and return the headline metrics.

    Args:
        command: the keygrip command, for ``result.json``: ``train``, or a command with its own recipe, as ``demo``.
        overrides: those that ``cfg`` was composed with.

    Raises:
        ValueError: unsuitable settings or data. FileNotFoundError: data, weights or a checkpoint to resume are
            missing. keygrip.training.signals.Interrupted: a signal ended the run, after saving.
    """
    started = time.monotonic()
    resume = checkpoint_to_resume(cfg, folder)
    quiet_lightning(warnings_too=not cfg.debug)
    plain = _checked_settings(cfg, overrides)
    resolved = with_run_folders(plain)
    built = OmegaConf.create(resolved)  # with run folders instead of pretraining stages
    refuse_missing_packages(built.logger)
    # before generating data and training stages, which may take hours
    configured_callbacks = _instantiate_callbacks(built.callbacks)
    strategy = instantiate(cfg.strategy)
    refuse_divided(cfg.optimizer, strategy.kind)
    # Before anything slow, so that a missing GPU is reported at once. A dry run may be for another machine.
    arguments = {} if cfg.dry_run else strategy.trainer_arguments()
    processes = _count_processes(strategy, cfg.dry_run)
    refuse_uneven_batch(cfg.data, processes)
    compilation = None if cfg.compile is None else instantiate(cfg.compile)
    if compilation is not None and not cfg.dry_run:  # a dry run compiles nothing
        compilation.check(strategy.on_gpu)
    resumed_step = check_resumed(resume, resolved) if resume else 0
    if resume is None:
        refuse_missing_weights(plain)
    origin = run_metadata()
    if job := run_folder.resuming_job(cfg.resume):
        origin[run_folder.RESUMED_BY] = job
    _seed_generators(cfg)

    # Before the stages, which may take hours, unless the data are encoded with the weights of a stage.
    datamodule = _build_data(built, processes) if plain["data"] == resolved["data"] else None
    complete_stages(plain, train=not cfg.dry_run, begin=lambda: run_folder.begin(folder))
    if datamodule is None:
        datamodule = _build_data(built, processes)
    module = _build_module(cfg, resolved, resumed=resume is not None)
    run_folder.begin(folder)
    trained = _read_trained_metrics(folder, resumed_step) if resume else {}
    metadata_file = _write_start(folder, cfg, command, overrides, origin, trained, resume is not None, started)
    if hasattr(module, "set_statistics"):
        _set_statistics(module, datamodule, origin, metadata_file, resume)
    if cfg.dry_run:
        report = dry_run(datamodule, module, cfg, strategy)
        if metadata_file is not None:
            write_result(folder, read_result(folder) | {"status": DRY_RUN, "dry_run": report})
        return report
    if compilation is not None:
        compilation.apply(module)  # before DDP or FSDP wraps anything
    loggers = build_loggers(cfg.logger, folder, resumed_step)
    ended = False
    try:  # from here W&B has an open run; if it stayed open, the next job of a sweep would log to it
        log_settings(loggers, resolved, resumed_step)
        trained_metrics = TrainedMetrics(folder, trained.get("metrics", {}))
        callbacks = [RandomnessByStep(cfg.seed), Header(resolved, origin), *configured_callbacks, trained_metrics]
        if resume is not None:
            callbacks.append(CopyRestoredMoments())
        if cfg.max_minutes is not None:
            callbacks.append(TimeLimit(cfg.max_minutes))
        if cfg.val_every_n_steps:
            monitor = OmegaConf.select(cfg, "callbacks.checkpoint.monitor")
            callbacks.append(ValidateBySteps(cfg.val_every_n_steps, monitor))
        if not loggers:  # LearningRateMonitor requires a logger
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        trainer = _build_trainer(cfg, folder, arguments, callbacks, loggers, resumed=resume is not None)
        _warn_of_default_backbone(cfg)
        _warn_of_missing_checkpoint(configured_callbacks)
        _log_start(cfg, module, resume, resumed_step)
        if resume is not None and hasattr(datamodule, "begin_from"):
            state = read_checkpoint(resume, mapped=True).get(type(datamodule).__qualname__)  # Lightning's key
            if state:
                datamodule.begin_from(state)
        trainer.fit(module, datamodule=datamodule, ckpt_path=None if resume is None else str(resume), weights_only=True)
        # whether a step was left is known only now: a run may also be limited by epochs or minutes
        no_step_was_left = bool(resume) and trainer.global_step == resumed_step
        if resume is not None and no_step_was_left:
            keep_resumed(resume, folder)
        validation_is_left = no_step_was_left and not trained and _validation_was_due(cfg, resumed_step)
        evaluated: dict[str, float] = {}
        if validation_is_left and strategy.kind == "fsdp":  # the shards are no longer available for it
            log.warning("no step is left, and no figures of the last validation are stored: there will be none")
        elif validation_is_left:
            log.info(
                "no step is left, and no figures of the last validation are stored: validate at step %d", resumed_step
            )
            evaluated = _select_headline_metrics(
                trainer, module
            )  # of the evaluation after training; validate drops them
            trainer.validate(module, datamodule=datamodule, verbose=False)
        ended = True
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning converts Ctrl-C to SystemExit
            raise KeyboardInterrupt from stop
        raise
    finally:
        finish(loggers, failed=not ended)

    metrics = trained_metrics.before | evaluated | _select_headline_metrics(trainer, module)
    if trainer.is_global_zero:
        _write_final_result(folder, trainer, metrics, {"command": command, "overrides": list(overrides)})
    return metrics


def _checked_settings(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved settings as plain data, after all checks that need neither data nor a model.

    Raises:
        ValueError (also SettingError): settings are inconsistent, have no effect, or have a wrong type.
    """
    refuse_unfit(cfg)
    refuse_unread(cfg, TrainSchema)
    refuse_idle(cfg, overrides)
    for group in ("callbacks", "logger"):
        _refuse_parts_without_class(group, cfg[group])
    refuse_idle_limits(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    refuse_ill_typed(plain)
    _refuse_other_checkpoint_folder(plain)
    return plain


def _refuse_other_checkpoint_folder(settings: Mapping[str, Any]) -> None:
    """Raise SettingError if the run's checkpoints would be in another folder than the one that is read when it is
    resumed or evaluated. Further callbacks may save elsewhere."""
    given = ((settings["callbacks"] or {}).get("checkpoint") or {}).get("folder")
    folder = (Path(settings["run_dir"]) / run_folder.CHECKPOINT).parent
    if given is not None and Path(given).resolve() != folder.resolve():
        raise SettingError(
            f"callbacks.checkpoint.folder={given}: the checkpoints of a run are in its folder, {folder}: leave it out, "
            "and choose the run folder with run_dir=FOLDER"
        )


def _count_processes(strategy: Strategy, dry_run: bool) -> int:
    """Return the number of processes, of this run or assumed by a dry run. Raises MissingGPUError if it depends on the
    number of GPUs and this machine has none."""
    try:
        return strategy.processes
    except MissingGPUError as error:
        if not dry_run:
            raise
        raise MissingGPUError(f"{error}; or let dry_run=true count for N GPUs, with strategy.devices=N") from error


def _seed_generators(cfg: DictConfig) -> None:
    """Seed all random generators, and make torch's kernels deterministic if requested."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.deterministic:  # read at the first matrix product on a GPU; without it torch warns at each product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(cfg.deterministic), warn_only=True)
    # Filling memory that is overwritten anyway costs a sixth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _build_data(cfg: DictConfig, processes: int) -> Any:
    """Return the data module, before it has read any data. Missing data are an error here."""
    datamodule = instantiate(cfg.data, _convert_="all")
    # The data module is set up before the trainer exists.
    limits = {name: cfg[name] for name in ("max_steps", "max_epochs")}
    for name, value in {"accumulated": cfg.accumulate_grad_batches, "processes": processes, **limits}.items():
        if hasattr(datamodule, name):
            setattr(datamodule, name, value)
    if hasattr(datamodule, "refuse_missing"):
        datamodule.refuse_missing()
    return datamodule


def _build_module(cfg: DictConfig, resolved: dict[str, Any], resumed: bool) -> LightningModule:
    """Return the module, after its checks of the run and of the optimizer.

    Args:
        resolved: settings with run folders instead of pretraining stages.
    """
    module = build_module(resolved)
    if isinstance(module, System):
        module.check_run(cfg.max_steps, begins=not resumed and not cfg.dry_run)
        module.optimizer_recipe.check(module.trained_part(), endless=cfg.max_steps == cfg.max_epochs == -1)
        module.resumed = resumed
    return module


def _set_statistics(
    module: Any, datamodule: Any, origin: dict[str, Any], metadata_file: Path | None, resume: Path | None
) -> None:
    """Set up the data, pass its statistics to the module, and add the data's origin to `origin` and to its file."""
    if hasattr(datamodule, "configure_for"):
        datamodule.configure_for(module)
    if resume is not None and hasattr(module, "resume_data"):
        module.resume_data(datamodule, read_checkpoint(resume, mapped=True))
    datamodule.prepare_data()
    datamodule.setup("fit")
    if hasattr(datamodule, "origin"):
        origin["data"] = datamodule.origin
        if metadata_file is not None:
            write_json(metadata_file, origin)
    report = module.set_statistics(datamodule.statistics)
    for name, value in (report or {}).items():
        log.info("  %-28s %.4g", name, value)


def _build_trainer(
    cfg: DictConfig,
    folder: Path,
    arguments: dict[str, Any],
    callbacks: list[Callback],
    loggers: list[Any],
    resumed: bool,
) -> Trainer:
    """Return Lightning's trainer for `cfg`; `arguments` come from the strategy."""
    environment: list[Any] = []
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own reaction to SLURM's warning signal saves in the middle of a step, to a file that a resumed
        # run does not read; `SaveOnInterrupt` is used instead. Without srun, or with a single srun task, this is the
        # only process, and SLURM's variables may describe the whole job: LightningEnvironment starts the others.
        if by_srun := tasks_of_srun() > 1:
            # values of this step, since the job's may differ or be missing; Lightning compares the trainer's with them
            os.environ["SLURM_NTASKS_PER_NODE"] = str(arguments["devices"])
            os.environ["SLURM_NNODES"] = str(arguments["num_nodes"])
            set_rendezvous_of_step()
        environment = [SLURMEnvironment(auto_requeue=False) if by_srun else LightningEnvironment()]
    return lightning.Trainer(
        **arguments,
        max_steps=cfg.max_steps,
        max_epochs=cfg.max_epochs,
        val_check_interval=cfg.val_every_n_steps,  # in batches: see `ValidateBySteps`
        check_val_every_n_epoch=None if cfg.val_every_n_steps else 1,
        limit_val_batches=cfg.limit_val_batches,
        num_sanity_val_steps=0 if resumed else 1,
        log_every_n_steps=cfg.log_every_n_steps,
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        gradient_clip_val=cfg.optimizer.get("clip_norm") if cfg.optimizer else None,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO(), *environment],
        default_root_dir=str(folder),
        enable_model_summary=False,
        # Lightning would add a callback of its own where the configuration has none
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )


def _instantiate_callbacks(group: DictConfig | None) -> list[Any]:
    return [instantiate(part, _convert_="all") for part in (group or {}).values() if part is not None]


def _refuse_parts_without_class(group: str, parts: DictConfig | None) -> None:
    """Raise SettingError if a callback or a logger is neither null nor settings with a class."""
    for name, part in (parts or {}).items():
        place = f"{group}.{name!s}"
        if part is not None and not isinstance(part, DictConfig):
            raise SettingError(
                f"{place}={written(part)}: it is left out with {place}=null, and its settings are {place}.NAME"
            )
        if part is not None and part.get("_target_") is None:
            hint = ": add closed_loop=yam" if place == "callbacks.closed_loop" else ""
            hint = f": choose logger={name!s}" if group == "logger" and name in group_options(group) else hint
            raise SettingError(f"{place} has settings and no _target_, so nothing reads them{hint}")


class TrainedMetrics(Callback):
    """Record a run's metrics at the end of training, before the evaluation. If the run is interrupted after that and
    resumed, it has no step left that would log them.

    Args:
        folder: run folder. before: metrics recorded by the resumed training, used if no step is left.
    """

    def __init__(self, folder: Path, before: dict[str, Any] | None = None) -> None:
        self.folder, self.before, self.trains = folder, before or {}, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.trains = True
        if self.before and trainer.is_global_zero:  # training continues, so the earlier metrics are outdated
            result = read_result(self.folder) | {"metrics": {}}
            write_result(self.folder, {name: value for name, value in result.items() if name != "steps"})
        self.before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.trains:  # without a step left, a validation that was cut off still follows
            found = {"steps": trainer.global_step, "metrics": _select_headline_metrics(trainer, pl_module)}
            write_result(self.folder, read_result(self.folder) | found)


def _validation_was_due(cfg: DictConfig, step: int) -> bool:
    """Return whether a run that ends at this step had a validation."""
    return not no_validation(cfg) and (cfg.val_every_n_steps is None or step >= cfg.val_every_n_steps)


def _read_trained_metrics(folder: Path, step: int) -> dict[str, Any]:
    """Return what `TrainedMetrics` recorded for a training that ended at this step; empty if there is none."""
    before = read_result(folder)
    return {name: before[name] for name in ("steps", "metrics")} if before.get("steps") == step else {}


def _write_start(
    folder: Path,
    cfg: DictConfig,
    command: str,
    overrides: Sequence[str],
    origin: dict[str, Any],
    trained: dict[str, Any],
    resumed: bool,
    began: float,
) -> Path | None:
    """Write settings, metadata and the initial result, on the first process; return the path of the metadata.

    Args:
        trained: see `_read_trained_metrics`. began: see `note_beginning`.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return None
    suffix = time.strftime(".resumed_%Y-%m-%d_%H-%M-%S") if resumed else ""
    write_text(folder / f"config{suffix}.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    metadata = folder / f"metadata{suffix}.json"
    write_json(metadata, origin)
    earlier = read_result(folder) if resumed else {}
    times = {"started_at": earlier.get("started_at", time.time())}
    if "wall_s" in earlier:  # of the starts before this one
        times["wall_s"] = earlier["wall_s"]
    note_beginning(folder, began)
    remove_traces(folder)
    start = {"status": RUNNING, "command": command, "overrides": list(overrides), "metrics": {}, "run_dir": str(folder)}
    job = {name: origin[name] for name in (run_folder.RESUMED_BY,) if name in origin}
    write_result(folder, start | times | job | trained | this_start())
    return metadata


def _warn_of_default_backbone(cfg: DictConfig) -> None:
    """Log a warning if the small default backbone, made for simulated demonstrations, is used with other data."""
    own_data = cfg.data.get("root") is not None
    backbone = cfg.get("backbone")
    if (
        own_data
        and backbone is not None
        and backbone.get("variant") == "tiny"
        and cfg.model.get("rotation") is not None
    ):
        log.warning(
            "backbone=tiny starts from random weights at %d px: enough for the simulator, poor on a real robot's "
            "images; the recipe for those is experiment=yam_dinov3 (DINOv3 ViT-S/16+, 448 px, pretrained)",
            backbone.image_size,
        )


def _warn_of_missing_checkpoint(configured: Sequence[Callback]) -> None:
    """Log a warning if no callback of the configuration saves checkpoints."""
    if not any(isinstance(callback, Checkpoint) for callback in configured):
        log.warning(
            "callbacks.checkpoint is left out: without %s this run cannot be resumed, evaluated or exported",
            run_folder.CHECKPOINT,
        )


def _log_start(cfg: DictConfig, module: LightningModule, resume: Path | None, step: int) -> None:
    count = parameters_m(module)["all"]
    log.info("%s: %.2f M parameters, %.2f M of them trained", type(module).__name__, count["all"], count["trained"])
    ends = [f"{cfg.max_steps} steps"] if cfg.max_steps > 0 else []
    ends += [f"{cfg.max_epochs} epochs"] if cfg.max_epochs > 0 else []
    ends += [f"{cfg.max_minutes} minutes"] if cfg.max_minutes is not None else []
    log.info(
        "%s, %s, into %s",
        f"resuming {resume} at step {step}" if resume else "training",
        f"for {' or '.join(ends)}" if ends else "until it is stopped",
        cfg.run_dir,
    )
    if never := no_validation(cfg):
        log_no_validation(never, OmegaConf.select(cfg, "callbacks.checkpoint.monitor"))


def _select_headline_metrics(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """Return the module's ``headline_metrics`` (names) if it has them, else all metrics; also results of the evaluation
    after training, speed and compute."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = getattr(module, "headline_metrics", None)
    metrics = {name: logged[name] for name in (logged if names is None else names) if name in logged}
    metrics |= {name: value for name, value in logged.items() if name.startswith(("closed_loop/", "images/"))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput | Compute):
            metrics.update(callback.summary)
    return metrics


def _write_final_result(folder: Path, trainer: Trainer, metrics: dict[str, float], given: dict[str, Any]) -> None:
    start, checkpoint = read_result(folder), folder / run_folder.CHECKPOINT
    wall_s = wall_time(folder, start)
    result = {
        "status": FINISHED,
        "steps": trainer.global_step,
        "wall_s": wall_s,
        "metrics": metrics,
        **given,
        "run_dir": str(folder),
        "checkpoint": str(checkpoint) if checkpoint.is_file() else None,
        "started_at": start.get("started_at"),
    }
    result |= {name: start[name] for name in (run_folder.RESUMED_BY,) if name in start}
    write_result(folder, result)
    for name, value in metrics.items():
        log.info("  %-28s %.5g", name, value)
    log.info("finished %d steps in %.0f s: %s", trainer.global_step, wall_s, folder)


def quiet_lightning(warnings_too: bool) -> None:
    """Suppress general messages of Lightning and torch; keep warnings about a run."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).handlers.clear()  # its own handler would print every message twice
        logging.getLogger(name).propagate = True
    if not warnings_too:
        return
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*dataloader is\\s+not resumable.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*GPU available but not used.*",
        ".*Total length of .list. across ranks is zero.*",  # no held-out demonstrations; the log reports it
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*Grad strides do not match bucket view strides.*",
        ".*in eval mode at the start of training.*",  # frozen parts are, on purpose
    ):
        warnings.filterwarnings("ignore", message=text)
