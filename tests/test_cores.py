"""The number of processes follows the cores of the job, not of the machine; the number of open files follows the
system's limit."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from keygrip.cores import usable_cores
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.shards.resuming import ensure_enough_files


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone keeps a process on some cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # as cluster schedulers do
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


def test_loaders_from_python_open_as_many_files_as_the_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, no command has raised the soft limit."""
    limits = {resource.RLIMIT_NOFILE: (256, 4096)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    ensure_enough_files(0)  # without workers the process is not changed
    assert limits == {resource.RLIMIT_NOFILE: (256, 4096)}
    ensure_enough_files(20)
    assert limits == {resource.RLIMIT_NOFILE: (4096, 4096)}
    limits[resource.RLIMIT_NOFILE] = (256, 256)
    with pytest.raises(OSError, match="may open 256 files, and 20 loader workers need about 860: raise the limit"):
        ensure_enough_files(20)
