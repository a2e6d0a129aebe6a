"""Policies that plan joints are evaluated by their joints; by their poses where the setting or the environment requires
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vla_parts import CAMERAS, T, ready_module, small_module, small_statistics

from keygrip.data.batches import PolicyTargets
from keygrip.data.robot.native import read_native
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult, summarise
from keygrip.evaluation.rollouts import EpisodeResult, check_environment, run_episode
from keygrip.models.geometry_vla.policy import GeometryVLAPolicy
from keygrip.models.policy import Needs, Observation, Plan
from keygrip.recording.demonstrations import RecordSettings, record_episode
from keygrip.robots.kinematics import forward_kinematics
from keygrip.runtime.chunk_execution import RecedingHorizon

PICK, SEED, HZ = TaskOptions(name="pick"), 2, 10.0
STEPS, EXECUTED = 8, 4
CONTROL = partial(RecedingHorizon, execute_seconds=EXECUTED / HZ, still_distance_m=0.0)


class Replay:
    """Plans the reached joints of a recorded demonstration, with the recorded poses and gripper openings."""

    needs = Needs(("right",), plans_joints=True)

    def __init__(self, folder: Path, edit: Callable[[Plan], Plan] = lambda plan: plan) -> None:
        self.arm = read_native(folder, "demo").arms["right"]
        self.edit, self.plans = edit, 0

    def reset(self, seed: int) -> None:
        self.plans = 0

    def plan(self, observation: Observation) -> Plan:
        rows = np.minimum(self.plans * EXECUTED + np.arange(1, STEPS + 1), len(self.arm) - 1)
        self.plans += 1
        assert self.arm.joints is not None
        assert self.arm.commanded is not None
        there = [values[None, rows] for values in (self.arm.position, self.arm.quaternion)]
        opening = self.arm.commanded.gripper[None, rows - 1]
        return self.edit(Plan(*there, opening, 1 / HZ, joints=self.arm.joints[None, rows]))


@pytest.fixture(scope="module")
def cell() -> YamCell:
    return YamCell(PICK, image_size=32, hz=HZ)


@pytest.fixture(scope="module")
def demo(cell: YamCell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    assert record_episode(cell, RecordSettings(PICK, 32), root, SEED)
    (folder,) = root.iterdir()
    return folder


def noted(
    cell: YamCell, policy: Any, monkeypatch: pytest.MonkeyPatch, control: Any = CONTROL
) -> tuple[EpisodeResult, np.ndarray]:
    """Return the result of the episode and the commanded joints [steps, 6]."""
    joints, whole = [], YamCell.advance

    def advance(self: YamCell, *command: Any) -> None:
        whole(self, *command)
        joints.append(self.commanded_joints.copy())

    with monkeypatch.context() as patch:
        patch.setattr(YamCell, "advance", advance)
        result = run_episode(cell, policy, control, SEED)
    return result, np.stack(joints)


def test_recorded_joints_replayed_through_the_cell_succeed(
    cell: YamCell, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Replay(demo)
    result, joints = noted(cell, policy, monkeypatch)
    assert result.success
    assert result.joint_plans == result.plans > 5
    np.testing.assert_allclose(joints, policy.arm.joints[1 : len(joints) + 1], atol=1e-9)

    result, joints = noted(cell, Replay(demo), monkeypatch, partial(CONTROL, follow="poses"))
    assert result.success
    assert result.joint_plans == 0
    off = np.abs(joints - policy.arm.joints[1 : len(joints) + 1]).max()
    assert 1e-4 < off < 0.05  # inverse kinematics finds other joints

    bare = Replay(demo, lambda plan: replace(plan, joints=None))  # the same with a policy that plans poses
    bare.needs = Needs(("right",))
    np.testing.assert_array_equal(noted(cell, bare, monkeypatch)[1], joints)


def test_plans_that_were_held_back_are_counted(cell: YamCell, demo: Path) -> None:
    def every_second(plan: Plan) -> Plan:
        return replace(plan, held_back=np.array([[0.0, 0.11 * (policy.plans % 2), 1e-9]]))

    policy = Replay(demo, every_second)
    result = run_episode(cell, policy, CONTROL, SEED)
    assert result.clamped_plans == (result.plans + 1) // 2
    assert result.clamped_most_m == 0.11
    free = run_episode(cell, Replay(demo, lambda plan: replace(plan, held_back=np.zeros((1, 3)))), CONTROL, SEED)
    assert (free.clamped_plans, free.clamped_most_m) == (0, 0.0)
    unlimited = run_episode(cell, Replay(demo), CONTROL, SEED)
    assert (unlimited.clamped_plans, unlimited.clamped_most_m) == (None, None)

    figures = summarise([ConditionResult("all", {}, [result, free]), ConditionResult("none", {}, [unlimited])])
    assert figures["all"]["plans"] == 2 * result.plans
    assert figures["all"]["clamped_plans"] == result.clamped_plans
    assert figures["all"]["clamped_episodes"] == 1
    assert figures["all"]["clamped_most_m"] == 0.11
    assert "clamped_plans" not in figures["none"], "a policy that holds none back has no such figure"


def test_joints_are_what_is_judged(cell: YamCell, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poses that are off by a centimetre change nothing; joints that put the tool elsewhere than the poses are
    refused."""
    _, joints = noted(cell, Replay(demo), monkeypatch)
    beside = Replay(demo, lambda plan: replace(plan, position=plan.position + [0.0, 0.01, 0.0]))
    result, other = noted(cell, beside, monkeypatch)
    assert result.success
    np.testing.assert_array_equal(other, joints)
    for edit, said in (
        (lambda plan: replace(plan, joints=plan.joints + 0.2), "joints put the tool up to"),
        (lambda plan: replace(plan, joints=plan.joints * np.nan), "the plan's joints are not finite"),
        (lambda plan: replace(plan, joints=plan.joints[..., :5]), "1 arms of 6 joints and 8 steps"),
    ):
        result = run_episode(cell, Replay(demo, edit), CONTROL, SEED)
        assert result.failure == "policy_error"
        assert said in (result.detail or "")
        assert result.seconds == 0


def test_plans_without_joints_are_followed_by_their_poses_or_refused(cell: YamCell, demo: Path) -> None:
    def every_second(plan: Plan) -> Plan:
        return plan if policy.plans % 2 else replace(plan, joints=None)

    policy = Replay(demo, every_second)
    result = run_episode(cell, policy, CONTROL, SEED)
    assert result.success
    assert result.joint_plans == (result.plans + 1) // 2
    result = run_episode(cell, policy, partial(CONTROL, follow="joints"), SEED)
    assert result.failure == "policy_error"
    assert "follow=joints, and the plan holds none" in (result.detail or "")
    assert run_episode(cell, Replay(demo), partial(CONTROL, follow="joints"), SEED).success


class PosesAlone:
    """An environment with only the methods of `Environment`."""

    def __init__(self, cell: YamCell) -> None:
        self.cell, self.hz = cell, cell.hz
        for name in ("reset", "outcome", "observation", "close"):
            setattr(self, name, getattr(cell, name))

    def advance(self, action: np.ndarray) -> None:
        assert action.shape == (8,)
        self.cell.advance(action)


def test_what_cannot_be_followed_is_no_failed_episode(cell: YamCell, demo: Path) -> None:
    elsewhere: Any = PosesAlone(cell)
    result = run_episode(elsewhere, Replay(demo), CONTROL, SEED)  # as in Meta-World
    assert result.success
    assert result.joint_plans == 0
    absolute = Replay(demo)
    absolute.needs = Needs(("right",))
    for environment, policy, follow, said in (
        (elsewhere, Replay(demo), "joints", "control.follow=joints cannot be: the arms take no joints"),
        (elsewhere, Replay(demo), "poses", "control.follow=poses has no effect, since the arms take no joints"),
        (cell, absolute, "joints", "the policy plans none"),
        (cell, absolute, "poses", "control.follow=poses has no effect, since the policy plans none"),
    ):
        with pytest.raises(ValueError, match=said):
            run_episode(environment, policy, partial(CONTROL, follow=follow), SEED)
    check_environment(PICK, 32, HZ, None, SEED, Replay.needs, "joints")
    with pytest.raises(ValueError, match="the policy plans none"):  # before training
        check_environment(PICK, 32, HZ, None, SEED, absolute.needs, "joints")


def test_a_small_untrained_policy_of_joints_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its action statistics are of joints around a pose over the table; its plans jump within 0.1 rad."""
    generator = np.random.default_rng(0)
    joints = np.array([0.0, 1.2, 1.0, 0.3, 0.0, 0.0]) + generator.uniform(-0.1, 0.1, (64, 1, T + 1, 6))
    position, quaternion = forward_kinematics(joints)
    values = {"position": position, "quaternion": quaternion, "joints": joints}
    tensors = {name: torch.from_numpy(value[:, :, 1:].astype(np.float32)) for name, value in values.items()}
    tensors |= {f"start_{name}": torch.from_numpy(value[:, :, 0].astype(np.float32)) for name, value in values.items()}
    module = small_module(kind="joint", action_kind="joint")
    statistics = small_statistics(tmp_path)
    assert isinstance(statistics.chunks, PolicyTargets)
    module.set_statistics(replace(statistics, chunks=replace(statistics.chunks, **tensors)))
    module.statistics._position_range.copy_(torch.tensor([[-2.0] * 3, [2.0] * 3]))  # no plan is clamped to it
    assert GeometryVLAPolicy(module).needs.plans_joints
    assert not GeometryVLAPolicy(ready_module(tmp_path)).needs.plans_joints
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: module)
    task = TaskOptions(name="reach")
    conditions = {"as_trained": [{}]}
    figures = {}
    for follow in ("auto", "poses"):
        loop = ClosedLoop(
            task,
            conditions,
            2,
            image_size=32,
            cameras=CAMERAS,
            processes=1,
            videos=0,
            control=partial(RecedingHorizon, follow=follow),
        )
        (result,) = loop.run(tmp_path / "checkpoint")
        assert [episode.seconds for episode in result.episodes] == 2 * [task.time_limit_s]
        figures[follow] = summarise([result])["as_trained"]
        assert figures[follow]["failures"] == {"missed": 2}
    assert figures["auto"]["joint_plans"] == 1.0
    assert "joint_plans" not in figures["poses"]
