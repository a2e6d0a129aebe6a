"""``dry_run=true``: pass one batch through the model and report the memory of a training step, without training."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from keygrip.launch import started_together
from keygrip.training.strategies import Strategy, automatic_precision
from keygrip.training.system import System

log = logging.getLogger(__name__)


def dry_run(datamodule: Any, module: LightningModule, cfg: DictConfig, strategy: Strategy) -> dict[str, Any]:
    """Pass one process's batch through a module (`System.dry_run`), and determine the memory of a training step on this
    batch, or on the batch with the highest memory if the data module provides it; no training.

    Memory is measured on a GPU if there is one. If parameters are sharded over processes, it is counted instead, since
    a single device may be too small for all of them.

    Raises:
        ValueError: a module or data without a dry run, several processes that would each do the whole dry run, or a
            batch that does not fit on the GPU.
    """
    if not isinstance(module, System):
        raise ValueError(f"dry_run=true: a {type(module).__name__} has no dry run; train it with max_steps=1 instead")
    if started_together() > 1:
        raise ValueError(
            "dry_run=true computes one process's share in one process: start it without torchrun or srun, with "
            "strategy.devices=GPUS_OF_A_MACHINE strategy.num_nodes=MACHINES"
        )
    processes, sharded = strategy.processes, strategy.kind == "fsdp"
    if processes > 1 and not hasattr(datamodule, "processes"):
        raise ValueError(
            f"dry_run=true: a {type(datamodule).__name__} divides no batch over {processes} processes without a "
            "trainer; choose strategy=auto"
        )
    device = "cuda" if torch.cuda.is_available() and not sharded else "cpu"
    chosen = strategy.precision
    if chosen == "auto" and device == "cuda" and strategy.accelerator != "cpu":
        chosen = automatic_precision(on_gpu=True)  # as training on this GPU; a count is for one with bf16
    bf16 = chosen != "32-true"  # float16 is as large
    ema = (cfg.callbacks or {}).get("ema") is not None
    try:
        batch = next(iter(datamodule.train_dataloader())).to(device)
        slow = "; at real size minutes on a CPU" if device == "cpu" else ""
        log.info("dry run: losses of a batch, then the memory of a step%s", slow)
        report = {"processes": processes} | module.to(device).dry_run(batch)
        worst = datamodule.worst_batches() if hasattr(datamodule, "worst_batches") else []
        log.info("dry run: memory of a step on %s", f"{len(worst)} of the largest batches" if worst else "that batch")
        accumulated = cfg.accumulate_grad_batches > 1
        moments = 4 * module.optimizer_recipe.moments(module.trained_part())
        counts = [
            replace(module.step_memory(each.to(device), bf16, ema, accumulated), optimizer=moments)
            for each in worst or [batch]
        ]
        largest = max(range(len(counts)), key=lambda number: counts[number].total)
        largest_step = counts[largest]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"dry_run=true: the GPU does not hold a step of one process's batch (data.batch_size="
            f"{cfg.data.get('batch_size')} over {processes}): lower data.batch_size, or divide it over more "
            "(strategy.devices); without a GPU (CUDA_VISIBLE_DEVICES=) the same command counts how much it takes"
        ) from error
    memory = (largest_step.divided(processes) if sharded else largest_step).report()
    report |= {"worst_bucket": worst[largest].sizes() | memory} if worst else {"memory": memory}
    for name, value in report.items():
        log.info("  %-20s %s", name, json.dumps(value))
    return report
