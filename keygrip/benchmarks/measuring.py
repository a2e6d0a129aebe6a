"""Time and memory of pieces of work that stand side by side."""

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

from keygrip.training.checkpoints import build_module

Work = Callable[[], object]
Module = TypeVar("Module", bound=LightningModule)

MIN_REPETITIONS = 3  # fewer give no usable median
MEASURED = "keygrip: the measured run"  # in a profiler's trace


def synchronise(device: torch.device) -> None:
    """Waits for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A case that repeats what it measures.

    Args:
        repetitions, quick_repetitions: of every side, after the warm-up; the latter with `quick`.
        limit_s, quick_limit_s: seconds after which fewer are done.
    """

    repetitions: int
    quick_repetitions: int
    limit_s: float
    quick_limit_s: float

    def effort(self, quick: bool) -> tuple[int, float]:
        """Repetitions and seconds."""
        return (self.quick_repetitions, self.quick_limit_s) if quick else (self.repetitions, self.limit_s)


def interleaved_seconds(
    sides: Mapping[str, Work],
    repetitions: int,
    device: torch.device,
    limit_s: float,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of every repetition of every side, ``[repetitions]`` each.

    The sides take turns, so that whatever else slows the machine down for a while slows all of them. On a machine
    that is too slow for all repetitions within ``limit_s`` fewer are done, but ``MIN_REPETITIONS`` at least. ``clock``
    gives the seconds that are measured: those of the wall, or ``time.thread_time`` for work on one thread of a
    processor that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for repetition in range(-warm_up, repetitions):
        late = time.perf_counter() - began > limit_s
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
    """The module of a training config with random weights.

    Raises:
        ValueError: it is none of this kind.
    """
    OmegaConf.resolve(config)
    module = build_module({"model": OmegaConf.to_container(config.model)})
    if not isinstance(module, kind):
        raise ValueError(f"this case measures a {kind.__name__}; its overrides name a {type(module).__name__}")
    return module


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes with so many threads, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_extra_bytes(work: Work, device: torch.device) -> int:
    """Most bytes of tensors that were alive at once during ``work``, beyond those that were alive before it.

    The work runs twice and the second time counts: what it allocates for good the first time is not its own, and what
    it replaces (a cache that grows by copies) is then known to the profiler, which sees a tensor freed only where it
    saw it made. On a GPU this is the caching allocator's own count. On the CPU it is added up from the allocator's
    events in the profiler's trace, which has buffers inside of operators too.
    """
    if device.type == "cuda":
        work()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # garbage from before that is freed meanwhile would be subtracted
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
    # The order in the file is that of threads; time stamps have nanoseconds.
    changes = sorted(
        (e["ts"], number, e["args"]["Bytes"]) for number, e in enumerate(events) if e["name"] == "[memory]"
    )
    alive = np.cumsum([0] + [change for at, _, change in changes if at >= began])
    return int(alive.max())


def milliseconds(seconds: np.ndarray, percentile: float = 50) -> float:
    """A percentile of seconds, in milliseconds rounded to microseconds."""
    return round(float(np.percentile(seconds, percentile)) * 1e3, 3)
