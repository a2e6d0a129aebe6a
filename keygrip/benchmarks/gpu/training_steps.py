"""Training steps of a system at its real size: time, memory and GPU utilisation, with and without compilation."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from keygrip.benchmarks.gpu import Figures, synthetic
from keygrip.config import compose
from keygrip.training.compute import Compute
from keygrip.training.strategies import use_tf32

log = logging.getLogger(__name__)

System = Literal["volume_query", "foveated_vlm", "patch_dit", "geometry_vla"]

# Dense bf16 products with float32 accumulation, 10^12 operations per second, from data sheets, by words of a GPU's
# name. The first match is used.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.5,
    "GH200": 989.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "A100": 312.0,
    "A100X": 312.0,
    "L40S": 362.0,
    "L40": 181.05,
    "RTX 4090": 165.2,
    "A10": 125.0,
    "L4": 121.0,
}
# words in the name of a slower GPU, or of a part of one, that is not in the table
OTHERS = {"NVL", "MIG", "Laptop", "D"}
WORTH = 1.03  # a larger batch must be this much faster per sample for further doubling


def peak_tflops() -> float | None:
    """Return the bf16 peak from the GPU's data sheet; None for a GPU that is not in the table, and for a CPU."""
    if not torch.cuda.is_available():
        return None
    name_parts = set(torch.cuda.get_device_name().replace("-", " ").split())
    fitting = (value for gpu, value in PEAK_TFLOPS.items() if name_parts.issuperset(gpu.split()))
    return None if name_parts & OTHERS else next(fitting, None)


def matmul_tflops(size: int, repetitions: int = 10) -> float:
    """Measure the speed of a product of two bf16 `size` x `size` matrices, in 10^12 operations per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repetitions):
        _synchronize()
        started = time.perf_counter()
        matrix @ matrix
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / float(np.median(seconds[repetitions // 2 :])) / 1e12


@dataclass(frozen=True)
class TrainingSteps:
    """Steps of the trainer that users start (bf16 autocast, clipping, EMA, deterministic kernels) on one random batch
    on the GPU.

    For every variant, the batch size is doubled from `batch` on until memory or time is exhausted or samples per second
    no longer increase. Then the fastest batch size is measured with compiled blocks. ``mfu`` is the fraction of the
    data sheet's peak: the operations that torch counts in a step, divided by the step's time. With gradient
    checkpointing the recomputed operations count too.

    Args:
        system: the system.
        overrides: of ``keygrip.train``. toy_overrides: used instead of them at toy size.
        variants: further overrides by name, measured one after another; at toy size only the first one's name is used.
        frames: per video, by variant. text_tokens: per conversation; both for ``foveated_vlm``.
        latent, patch_grid: sides, for ``patch_dit``; toy_latent, toy_patch_grid: at toy size.
        batch: the first batch size, which is doubled up to max_batch. max_batch: the largest batch size that is tried.
        steps: measured steps. warm_up: steps before those.
        compiled: whether compiled blocks are measured. toy_compiled: at toy size too, with `aot_eager` instead of
            inductor.
        limit_s: no further batch is tried after this time, for all variants together.
    """

    system: System
    overrides: Sequence[str]
    toy_overrides: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    batch: int
    max_batch: int
    steps: int = 10
    warm_up: int = 4
    compiled: bool = True
    toy_compiled: bool = False
    limit_s: float = 360.0
    frames: Mapping[str, int] | None = None
    text_tokens: int = 64
    latent: int = 64
    patch_grid: int = 14
    toy_latent: int = 8
    toy_patch_grid: int = 12

    def run(self, toy: bool, figures: Figures) -> None:
        """Add `<variant>_batch_<n>_step_ms`, `_samples_per_s`, `_peak_gb`, `_mfu` of all batches, and of the fastest
        one under `<variant>_...`.

        Raises:
            RuntimeError: A variant failed; the figures of the others are added.
        """
        started, failed = time.perf_counter(), []
        figures["matmul_tflops"] = round(matmul_tflops(256 if toy else 8192), 1)
        for variant in list(self.variants)[: 1 if toy else None]:
            try:
                self._measure_variant(variant, toy, figures, started)
            except Exception as error:  # the other variants continue
                log.debug("variant %s failed", variant, exc_info=True)
                failed.append(f"{variant}: {type(error).__name__}: {error}")
            _free_memory()
        if failed:
            raise RuntimeError("; ".join(failed))

    def _measure_variant(self, variant: str, toy: bool, figures: Figures, started: float) -> None:
        overrides = list(self.toy_overrides) if toy else [*self.overrides, *self.variants[variant]]
        config = compose("train", overrides)
        module, make_batch = self._module(overrides, variant, toy)
        figures[f"{variant}_parameters_m"] = round(sum(p.numel() for p in module.parameters()) / 1e6, 1)
        batch, best, speed, flop = (2 if toy else self.batch), 0, 0.0, 0.0
        while batch <= (2 if toy else self.max_batch):
            try:
                measured = self._steps(config, module, make_batch(batch), toy)
            except torch.OutOfMemoryError:
                if not best:
                    raise
                figures[f"{variant}_out_of_memory_batch"] = batch
                break
            self._note(figures, f"{variant}_batch_{batch}", measured, batch)
            samples_per_s = batch / measured["step_s"]
            if samples_per_s > speed:
                best, flop = batch, measured["tflop"]
                self._note(figures, variant, measured, batch)
            if samples_per_s < WORTH * speed or time.perf_counter() - started > self.limit_s:
                break
            speed, batch = max(samples_per_s, speed), 2 * batch
            _free_memory(module)
        measure_compiled = self.compiled and self.toy_compiled if toy else self.compiled
        if measure_compiled and (toy or time.perf_counter() - started < self.limit_s):
            _free_memory(module)
            recipe = compose("train", ["compile=inductor"]).compile
            compilation = instantiate({**recipe, "backend": "aot_eager"} if toy else recipe)
            compilation.check(not toy and torch.cuda.is_available())
            compilation.apply(module)
            began = time.perf_counter()
            measured = self._steps(config, module, make_batch(best), toy, count_operations=False)
            figures[f"{variant}_compiled_first_steps_s"] = round(time.perf_counter() - began, 1)
            self._note(figures, f"{variant}_compiled", {**measured, "tflop": flop}, best)

    def _module(self, overrides: Sequence[str], variant: str, toy: bool) -> tuple[LightningModule, synthetic.MakeBatch]:
        if self.system == "volume_query":
            return synthetic.volume_query(overrides)
        if self.system == "geometry_vla":
            return synthetic.geometry_vla(overrides)
        if self.system == "foveated_vlm":
            frames = 2 if toy else (self.frames or {})[variant]
            return synthetic.foveated_vlm(overrides, frames, 12 if toy else self.text_tokens)
        return synthetic.patch_dit(
            overrides, self.toy_latent if toy else self.latent, self.toy_patch_grid if toy else self.patch_grid
        )

    def _steps(
        self, config: DictConfig, module: LightningModule, batch: Any, toy: bool, count_operations: bool = True
    ) -> dict[str, float]:
        """Return median seconds of a step, peak bytes, and the operations of a step, in 10^12."""
        on_gpu = torch.cuda.is_available()
        batch = batch.to("cuda" if on_gpu else "cpu")
        count, warm_up = (1, 2) if toy else (self.steps, self.warm_up)
        times, compute = StepTimes(warm_up), Compute(every_n_steps=10**9)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        determinism = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(bool(config.deterministic), warn_only=True)
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as in training
        use_tf32(config.strategy.tf32, on_gpu, "strategy.tf32")
        try:
            trainer = Trainer(
                accelerator="gpu" if on_gpu else "cpu",
                devices=1,
                precision="bf16-mixed" if on_gpu else "32-true",
                max_steps=warm_up + count,
                max_epochs=1,
                limit_val_batches=0,
                gradient_clip_val=config.optimizer.get("clip_norm"),
                callbacks=[times, *([compute] if count_operations else []), _ema_callback(config)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            module.train()
            trainer.fit(module, DataLoader([batch] * (warm_up + count), batch_size=None))  # type: ignore[arg-type]
        finally:
            torch.use_deterministic_algorithms(determinism[0], warn_only=determinism[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            use_tf32(False, on_gpu)
        tflop = compute.summary.get("tflop", math.nan) / (warm_up + count)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {"step_s": float(np.median(times.seconds)), "tflop": tflop, "peak_bytes": peak}

    def _note(self, figures: Figures, prefix: str, measured: Mapping[str, float], batch: int) -> None:
        figures[f"{prefix}_batch"] = batch
        figures[f"{prefix}_step_ms"] = round(1e3 * measured["step_s"], 2)
        figures[f"{prefix}_samples_per_s"] = round(batch / measured["step_s"], 2)
        figures[f"{prefix}_step_tflop"] = float(f"{measured['tflop']:.4g}")
        if measured["peak_bytes"]:
            figures[f"{prefix}_peak_gb"] = round(measured["peak_bytes"] / 1e9, 2)
        peak = peak_tflops()
        if peak is not None:
            figures[f"{prefix}_mfu"] = round(measured["tflop"] / measured["step_s"] / peak, 4)


class StepTimes(Callback):
    """Measure seconds from the end of a step to the end of the next, after the first `warm_up` steps."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = max(warm_up, 1)  # the start of the first step is unknown
        self.seconds: list[float] = []
        self._before = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _synchronize()
        now = time.perf_counter()
        if batch_idx >= self.warm_up:
            self.seconds.append(now - self._before)
        self._before = now


def _ema_callback(config: DictConfig) -> Callback:
    recipes = [part for part in config.callbacks.values() if part is not None and "training.ema" in part._target_]
    callback: Callback = instantiate(recipes[0]) if recipes else lightning.pytorch.Callback()
    return callback


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free_memory(module: LightningModule | None = None) -> None:
    """Free the memory of gradients and of unreferenced tensors."""
    if module is not None:
        module.zero_grad(set_to_none=True)
        module.trainer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
