"""Measure time and memory of several functions for comparison."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from keygrip.benchmarks.deadline import deadlines
from keygrip.training.checkpoints import build_module

Work = Callable[[], object]
Module = TypeVar("Module", bound=LightningModule)

MIN_REPETITIONS = 3  # fewer give no usable median
MEASURED = "keygrip: the measured run"  # in a profiler's trace


def synchronise(device: torch.device) -> None:
    """Wait until the GPU has finished all started work; on a CPU do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A case that repeats its measurement. A side is one of the variants that it compares.

    Args:
        repetitions, quick_repetitions: repetitions of every side after the warm-up; the latter with `quick`.
        limit_s, quick_limit_s: seconds after which no further repetition of a measurement is started.
    """

    repetitions: int
    quick_repetitions: int
    limit_s: float
    quick_limit_s: float

    def effort(self, quick: bool) -> tuple[int, float]:
        """Return the number of repetitions and the limit in seconds."""
        return (self.quick_repetitions, self.quick_limit_s) if quick else (self.repetitions, self.limit_s)


def interleaved_seconds(
    sides: Mapping[str, Work],
    repetitions: int,
    device: torch.device,
    limit_s: float,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Return the seconds of every repetition of every side, ``[repetitions]`` each.

    The sides run alternately, so that other load on the machine slows all of them down equally. If the machine is too
    slow for all repetitions within ``limit_s``, or before the `deadline`, fewer are run, but at least
    ``MIN_REPETITIONS``. ``clock`` measures the seconds: wall time, or ``time.thread_time`` for work on one thread of a
    processor that other processes use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    end = min([time.perf_counter() + limit_s, *deadlines])
    for repetition in range(-warm_up, repetitions):
        late = time.perf_counter() > end
        if late and repetition >= MIN_REPETITIONS:
            break
        if late and -warm_up < repetition < 0:
            continue
        for name, work in sides.items():
            synchronise(device)
            started = clock()
            work()
            synchronise(device)
            if repetition >= 0:
                seconds[name].append(clock() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def random_module(config: DictConfig, kind: type[Module]) -> Module:
    """Return the module of a training config with random weights.

    Raises:
        ValueError: the module is not of the class `kind`.
    """
    OmegaConf.resolve(config)
    module = build_module({"model": OmegaConf.to_container(config.model)})
    if not isinstance(module, kind):
        raise ValueError(f"this case measures a {kind.__name__}; its overrides name a {type(module).__name__}")
    return module


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads in torch within the context, and the previous number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_extra_bytes(work: Work, device: torch.device) -> int:
    """Return the peak bytes of tensors that were alive at once during ``work``, minus the bytes alive before it.

    The work runs twice and the second run is measured. This excludes permanent allocations of the first run. It also
    lets the profiler record tensors that the work replaces (a cache that grows by copies): the profiler records the
    end of a tensor only if it recorded its allocation. On a GPU this is the count of the caching allocator. On the CPU
    it is the sum of the allocator's events in the profiler's trace, which includes buffers inside operators.
    """
    if device.type == "cuda":
        work()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # earlier garbage that is freed during the measurement would be subtracted
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
            with torch.profiler.record_function(MEASURED):
                work()
    finally:
        gc.enable()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    began = next(e["ts"] for e in events if e["name"] == MEASURED)
    # Events in the file are ordered by thread; time stamps have a resolution of nanoseconds.
    changes = sorted((e["ts"], index, e["args"]["Bytes"]) for index, e in enumerate(events) if e["name"] == "[memory]")
    alive = np.cumsum([0] + [change for timestamp, _, change in changes if timestamp >= began])
    return int(alive.max())


def milliseconds(seconds: np.ndarray, percentile: float = 50) -> float:
    """Return a percentile of seconds in milliseconds, rounded to microseconds."""
    return round(float(np.percentile(seconds, percentile)) * 1e3, 3)
