"""Meta-World itself, through its recorder and rollouts, in its own Python environment: `make metaworld-test`.

Elsewhere these are deselected, and pytest says how many; asked for by `-m metaworld` without the environment, they
fail.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.discovery import find_demos
from keygrip.envs.metaworld.tasks import HELD_OUT_SEED, MetaWorldTask
from keygrip.evaluation.remote_rollouts import RemoteSettings, run_remote
from keygrip.models.policy import Needs, Plan
from keygrip.recording.metaworld import record_step
from keygrip.runtime.chunk_execution import RecedingHorizon

pytestmark = pytest.mark.metaworld


def interpreter() -> str:
    python = os.environ.get("METAWORLD_PYTHON", ".venv-metaworld/bin/python")
    assert Path(python).is_file(), f"no Meta-World at {python}: run `make metaworld-test`"
    return python


def remote(python: str, cameras: list[str] | None = None) -> RemoteSettings:
    control = partial(RecedingHorizon, execute_seconds=0.5)
    return RemoteSettings(python, "keygrip.envs.metaworld.tasks.MetaWorldTask", 64, 80.0, cameras, control)


class Replay:
    """Commands what a demonstration commanded, from its first frame on: every `stride`-th frame, 10 in a plan."""

    needs = Needs(arms=("right",))

    def __init__(self, demo: Any, stride: int = 1) -> None:
        self.arm, self.at, self.stride = demo.arms["right"].commanded, 0, stride

    def plan(self, observation: Any) -> Plan:
        rows = np.minimum(self.at + self.stride * np.arange(10), len(self.arm) - 1)
        self.at += 10
        parts = (self.arm.position[rows], self.arm.quaternion[rows], self.arm.gripper[rows])
        return Plan(*(part[None] for part in parts), 0.05 * self.stride)


def test_scripted_demonstrations_are_recorded_and_their_commands_succeed(tmp_path: Path) -> None:
    python = interpreter()
    report = record_step(["drawer-close-v3"], tmp_path, 2, image_size=64, recoveries=0.0, processes=1, python=python)
    assert report["demos"] == report["recorded"] == 2
    demos = [reference.read() for reference in find_demos(tmp_path)]
    assert {demo.instruction for demo in demos} == {"Push and close a drawer"}
    camera = demos[0].cameras["corner2"]
    x, y, depth = (
        camera.intrinsics[0] @ (camera.world_to_camera[0] @ np.append(demos[0].arms["right"].position[0], 1))[:3]
    )
    assert 0 < x / depth < 64
    assert 0 < y / depth < 64
    assert camera.frames.read(0).std() > 10
    again = record_step(["drawer-close-v3"], tmp_path, 2, image_size=64, recoveries=0.0, processes=1, python=python)
    assert again["recorded"] == 0
    settings = remote(python)
    task = MetaWorldTask("drawer-close")
    ((_, result),) = run_remote(Replay(demos[0]), settings, [(task, demos[0].source["seed"], tmp_path / "a.mp4")], 1)
    assert result.success
    assert (tmp_path / "a.mp4").is_file()
    ((_, still),) = run_remote(_Still(), settings, [(MetaWorldTask("push", step_limit=40), HELD_OUT_SEED, None)], 1)
    assert (still.success, still.failure, still.seconds) == (False, "timeout", 0.5)
    elsewhere = remote(python, ["nowhere"])
    with pytest.raises(ValueError, match="has no camera 'nowhere'; it has corner2"):
        list(run_remote(_Still(), elsewhere, [(task, HELD_OUT_SEED, None)], 1))


@pytest.mark.parametrize("task", ["box-close-v3", "handle-pull-v3", "handle-pull-side-v3"])
def test_scripts_that_swing_are_eased_and_succeed_from_positions_every_tenth_of_a_second(
    task: str, tmp_path: Path
) -> None:
    python = interpreter()
    record_step([task], tmp_path, 1, image_size=32, recoveries=0.0, processes=1, python=python)
    (reference,) = find_demos(tmp_path)
    demo = reference.read()
    moved = np.abs(np.diff(demo.arms["right"].commanded.position, axis=0)).max()
    assert moved < 0.026  # m in a frame of four steps; the script itself moves 0.04
    job = (MetaWorldTask(task), demo.source["seed"], None)
    ((_, result),) = run_remote(Replay(demo, stride=2), remote(python), [job], 1)
    assert result.success


class _Still:
    needs = Needs(arms=("right",))

    def plan(self, observation: Any) -> Plan:
        here, turn = (np.asarray(observation[name]).reshape(1, 1, -1) for name in ("position", "quaternion"))
        return Plan(here, turn, np.ones((1, 1)), 0.5)
