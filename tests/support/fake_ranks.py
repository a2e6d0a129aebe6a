"""Two threads in place of two processes that train together: only sums over both are supported."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from torch import Tensor, distributed

T = TypeVar("T")


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], T]) -> list[T]:
    """Return what `work` returns on each rank; it may call `torch.distributed.all_reduce`, on both ranks equally
    often."""
    barrier, own, given = threading.Barrier(2, timeout=60), threading.local(), dict[int, Tensor]()

    def all_reduce(value: Tensor) -> None:
        given[own.rank] = value.clone()
        barrier.wait()
        total = given[0] + given[1]
        barrier.wait()
        value.copy_(total)

    def run(rank: int) -> T:
        own.rank = rank
        try:
            return work(rank)
        except BaseException:
            barrier.abort()  # the other one waits for no further sum
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(distributed, "is_initialized", lambda: True)
        patch.setattr(distributed, "get_world_size", lambda: 2)
        patch.setattr(distributed, "all_reduce", all_reduce)
        return list(pool.map(run, (0, 1)))


def logged_by(module: object) -> dict[str, float]:
    """Return a dictionary that will hold what the module logs."""
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[attr-defined]
    return logged
