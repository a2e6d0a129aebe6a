"""The two-arm handover: layouts, expert, success criterion, and what a policy receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.discovery import find_demos
from keygrip.envs.environment import Environment, open_environment
from keygrip.envs.yam.handover import ARMS, BASES, GRIP_APART, HandoverTask, handover_actions, sample_handover
from keygrip.envs.yam.two_arms import HandoverCell
from keygrip.evaluation.rollouts import check_environment, run_episode
from keygrip.models.policy import Needs, Plan
from keygrip.recording.demonstrations import record
from keygrip.robots.kinematics import forward_kinematics
from keygrip.runtime.chunk_execution import RecedingHorizon


def play(cell: HandoverCell, actions: np.ndarray) -> tuple[bool, dict[str, Any]]:
    """Run until the episode ends, repeating the last action."""
    for i in range(1000):
        cell.advance(actions[min(i, len(actions) - 1)])
        success, truncated, info = cell.outcome()
        if success or truncated:
            return success, info
    raise AssertionError("the episode did not end")


@pytest.fixture(scope="module")
def cell() -> HandoverCell:
    return HandoverCell(HandoverTask(), image_size=64, render_images=False)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_expert_hands_the_bar_over(cell: HandoverCell, seed: int) -> None:
    cell.reset(seed=seed)
    assert cell.layout is not None
    success, info = play(cell, handover_actions(cell.layout, seed))
    assert success, (seed, info)
    assert info["failure_reason"] is None
    tools, bar = cell.tool_poses[0], cell.object_position
    assert bar[2] > 0.1
    assert np.linalg.norm(tools[0] - bar) == pytest.approx(GRIP_APART, abs=0.015)  # the left hand on its side
    assert np.linalg.norm(tools[1] - bar) > 0.06


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_hand_stands_still_for_a_plans_step_before_it_closes(seed: int) -> None:
    """The gripper command of a plan may close up to one step early: the hand must have reached the grasp pose by
    then."""
    actions = handover_actions(sample_handover(HandoverTask(), seed), seed, hz=10.0)
    for arm in range(2):
        closes = int(np.flatnonzero(actions[:, arm, 7] < 0.5)[0])
        before = actions[closes - 4 : closes, arm, :3]
        assert np.abs(before - actions[closes, arm, :3]).max() < 1e-9


@pytest.mark.slow
def test_it_is_not_done_while_the_right_hand_holds_or_the_left_does_not(cell: HandoverCell) -> None:
    cell.reset(seed=0)
    assert cell.layout is not None
    actions = handover_actions(cell.layout, 0)
    opening = int(np.flatnonzero(actions[:, 1, 7] < 0.5)[-1])
    kept = actions[: opening + 1].copy()
    success, info = play(cell, kept)  # both hands hold it until the time limit
    assert not success
    assert info["failure_reason"] == "timeout"
    cell.reset(seed=0)
    alone = actions.copy()
    alone[:, 0] = actions[0, 0]  # the left arm does nothing: the bar falls
    success, info = play(cell, alone)
    assert not success
    assert info["failure_reason"] == "dropped"


def test_layouts_are_functions_of_the_seed_and_the_arms_start_where_they_say(cell: HandoverCell) -> None:
    one, again, other = (sample_handover(HandoverTask(), seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.bar, again.bar)
    np.testing.assert_array_equal(one.start_joints, again.start_joints)
    assert (one.bar != other.bar).any()
    observation, info = cell.reset(seed=3)
    assert info["instruction"] == "hand the red bar to the left arm"
    for arm, base in enumerate(BASES):
        position, quaternion = forward_kinematics(one.start_joints[arm])
        np.testing.assert_allclose(observation["position"][arm], position + base, atol=2e-3)
        assert abs(observation["quaternion"][arm] @ quaternion) > 0.9999
    np.testing.assert_allclose(observation["gripper"], 1.0, atol=0.01)


def test_wrong_actions_and_options_are_refused(cell: HandoverCell) -> None:
    cell.reset(seed=0)
    for action in (np.zeros(8), np.zeros((2, 8)), np.full((2, 8), np.nan)):
        with pytest.raises(ValueError, match="8 finite numbers for each of left, right"):
            cell.advance(action)
    for options in ({"name": "pick"}, {"camera": "wrist"}):
        with pytest.raises(ValueError, match="task option"):
            HandoverTask(**options)
    with pytest.raises(ValueError, match="over, front"):
        HandoverCell(HandoverTask(), cameras=("wrist",))


class Expert:
    """Plans the actions of the expert, from the beginning of the episode."""

    def __init__(self, actions: np.ndarray) -> None:
        self.actions, self.seen = actions, []

    def plan(self, observation: Any) -> Plan:
        self.seen.append(observation)
        ahead = self.actions.transpose(1, 0, 2)
        return Plan(ahead[..., :3], ahead[..., 3:7], ahead[..., 7], step_seconds=0.1)


@pytest.mark.slow
def test_a_recording_is_read_back_and_a_policy_drives_both_arms(tmp_path: Path) -> None:
    summary = record(HandoverTask(), tmp_path / "demos", 1, seed=1, image_size=64, progress=False)
    assert (summary.demos, summary.failed) == (1, 0)
    record(HandoverTask(), tmp_path / "demos", 1, seed=1, image_size=64, progress=False)  # nothing left to do
    (reference,) = find_demos(tmp_path / "demos", "native", None)
    demo = reference.read(cameras=("over",))
    assert sorted(demo.arms) == sorted(ARMS)
    environment = open_environment(HandoverTask(), 64, 10.0, ("over",))
    assert isinstance(environment, Environment)
    actions = handover_actions(sample_handover(HandoverTask(), 1), 1)
    for index, arm in enumerate(ARMS):
        told = demo.arms[arm].commanded
        assert told is not None
        np.testing.assert_allclose(told.position, actions[:, index, :3], atol=5e-3)
    policy = Expert(actions)
    result = run_episode(environment, policy, lambda **given: RecedingHorizon(**given, execute_seconds=30.0), 1)
    environment.close()
    assert result.success, result
    camera = demo.cameras["over"]
    np.testing.assert_allclose(policy.seen[0]["world_to_camera"], camera.world_to_camera[0], atol=1e-9)
    tools = policy.seen[0]["position"]
    in_camera = np.einsum("ij,aj->ai", camera.world_to_camera[0][:3, :3], tools) + camera.world_to_camera[0][:3, 3]
    pixels = np.einsum("ij,aj->ai", camera.intrinsics[0], in_camera)
    assert ((pixels[:, :2] / pixels[:, 2:] > 0) & (pixels[:, :2] / pixels[:, 2:] < 64)).all()  # both hands are in view


def test_a_policy_whose_arms_are_in_another_order_is_refused() -> None:
    """Demonstrations are read by arm name: the policy would receive the pose of the other arm, and would move it."""
    check_environment(HandoverTask(), 32, 10.0, None, 1, Needs(ARMS))
    with pytest.raises(ValueError, match=r"data\.arms=\[left,right\]"):
        check_environment(HandoverTask(), 32, 10.0, None, 1, Needs(ARMS[::-1]))


@pytest.mark.slow
def test_a_seed_whose_first_hundred_draws_are_out_of_reach_has_a_layout():
    assert sample_handover(HandoverTask(), 1_000_003).bar.shape == (3,)
