"""Processes are as many as the cores that a job has, not as the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keygrip.cores import usable_cores
from keygrip.data.robot.datamodule import RobotDemos


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone keeps a process on some cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # as schedulers of clusters do
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_loaders_of_a_job_with_few_cores_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def workers() -> int:
        image = (32, [0.5] * 3, [0.2] * 3)
        return RobotDemos(tmp_path, "over", ["right"], *image, horizon=1, frame_stride=1, batch_size=1).num_workers

    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {6, 7}, raising=False)
    assert workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)
    assert workers() == 4
