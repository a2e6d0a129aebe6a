"""Dry run of a training: shapes and parameter counts of one batch, and the memory of the largest batch.

`module` is a `FoveatedVLMModule`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch, normalised
from keygrip.models.foveated_vlm.loss import fused_cross_entropy, token_cross_entropy
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.training.memory import StepMemory, count_step, measure_step

CPU_FRAMES = 64  # a batch for a GPU would take minutes on a CPU


@torch.no_grad()
def report_on(module: Any, batch: VideoTextBatch) -> dict[str, Any]:
    """Report shapes, parameter counts by group and memory of one batch in each mode."""
    on_gpu = module.device.type == "cuda"
    if not on_gpu:
        batch = batch.first_videos(CPU_FRAMES)
    groups: dict[str, int] = defaultdict(int)
    for name, parameter in module.network.named_parameters():
        part = name.partition(".")[0]
        groups[part if part in ("backbone", "language") else "connector"] += parameter.numel()
    network = module.network
    padding = text_rows(batch).padding_share(network.tokens_per_frame, network.pack_rows, module.query_passes)
    report: dict[str, Any] = {
        "frames": list(batch.frames.shape),
        "input_ids": list(batch.input_ids.shape),
        "supervised_tokens": int(batch.loss_mask.sum()),
        "padding_share": round(padding, 4),
        "parameters": dict(groups) | {"all": sum(groups.values())},
        "modes": {},
    }
    for mode in module.network.modes:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        output = module(batch, mode)
        scores = module.score(output, batch)
        figures: dict[str, Any] = {
            "hidden": list(output.hidden.shape),
            "visual": list(output.visual.shape),
            "loss": round(float(scores.loss / scores.tokens.clamp_min(1)), 4),
        }
        if on_gpu:
            figures["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        if output.passes is not None:
            cache = sum(block.key.nbytes + block.value.nbytes for block in output.passes.kv)
            figures["kv_cache_mb"] = round(cache / 2**20, 2)
        report["modes"][mode] = figures
    return report


def step_memory(module: Any, batch: VideoTextBatch, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
    """Return the memory of a training step on a batch, with the largest number of refinements that training samples."""
    network, was_training = module.network, module.training
    rows = text_rows(batch)
    predicted = int((batch.loss_mask | batch.answer_mask).sum())
    on_gpu = module.device.type == "cuda"
    refinement = {"refinement": module.refinement} if module.refinement else {}

    def step(of_batch: Callable[[Tensor], Tensor]) -> Tensor:
        frames = normalised(of_batch(batch.frames), network.backbone.mean, network.backbone.std)
        output = network(frames, replace(rows, input_ids=of_batch(batch.input_ids)), module.mode, **refinement)
        # any states serve: the memory depends on how many states predict, not on which ones
        states = output.hidden.flatten(0, 1)
        picked = of_batch(torch.arange(predicted) % states.shape[0])
        targets = of_batch(torch.zeros(predicted, dtype=torch.int64))
        if module.loss_kernel == "liger" and on_gpu:
            losses, _ = fused_cross_entropy(states[picked], network.language.head_weight, targets)
        else:
            losses, _ = token_cross_entropy(states[picked], network.language.head_weight, targets, module.loss_chunk)
        return losses.mean()

    module.train()
    try:
        memory = (measure_step if on_gpu else count_step)(network, step, bf16, ema, accumulated)
        return memory if module.frame_cache is None else replace(memory, cache=module.frame_cache.room)
    finally:
        module.train(was_training)
