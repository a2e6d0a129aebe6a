"""Receding horizon, pauses, gripper latch and temporal ensembling, with policies whose plans are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from keygrip.models.policy import Observation, Plan
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.trajectory import control_periods

DOWN = np.array([0.0, 1.0, 0.0, 0.0])


def observation(position: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Observation:
    return {"position": np.array(position), "quaternion": DOWN, "gripper": np.array([1.0])}


class Scripted:
    """Returns the plans in order, and then the last one again and again."""

    def __init__(self, *plans: Plan) -> None:
        self.plans, self.calls = list(plans), 0

    def plan(self, observation: Observation) -> Plan:
        self.calls += 1
        return self.plans[min(self.calls, len(self.plans)) - 1]


def line(start: float, step: float, steps: int = 4, gripper: float = 1.0) -> Plan:
    x = start + step * np.arange(1, steps + 1)
    position = np.stack([x, np.zeros(steps), np.zeros(steps)], axis=1)[None]
    return Plan(position, np.tile(DOWN, (1, steps, 1)), np.full((1, steps), gripper), step_seconds=0.3)


def drive(controller: RecedingHorizon, ticks: int) -> np.ndarray:
    return np.stack([controller.act(observation())[0] for _ in range(ticks)])


def test_executes_the_first_steps_then_plans_again() -> None:
    policy = Scripted(line(0.0, 0.1), line(0.2, 0.1))
    controller = RecedingHorizon(policy, control_hz=10, execute_seconds=0.6)
    commands = drive(controller, 12)
    assert policy.calls == 2  # 2 steps of 3 ticks, then a new plan for the next 6
    np.testing.assert_allclose(commands[[2, 5, 8, 11], 0], [0.1, 0.2, 0.3, 0.4], atol=1e-12)
    assert (np.diff(commands[:, 0]) > 0).all()  # smooth, never backwards


def test_follows_a_pause_further_than_asked() -> None:
    moving_late = Plan(
        np.array([[[0.0, 0, 0], [0.0, 0, 0], [0.05, 0, 0], [0.1, 0, 0]]]),
        np.tile(DOWN, (1, 4, 1)),
        np.zeros((1, 4)),
        0.3,
    )
    patient, hasty = Scripted(moving_late), Scripted(moving_late)
    drive(RecedingHorizon(patient, control_hz=10, execute_seconds=0.3, still_distance_m=0.015), 9)
    drive(RecedingHorizon(hasty, control_hz=10, execute_seconds=0.3, still_distance_m=0.0), 9)
    assert patient.calls == 1
    assert hasty.calls == 3


def test_gripper_keeps_its_state_between_the_thresholds() -> None:
    openings = np.array([[0.9, 0.5, 0.3, 0.5, 0.55, 0.7]])
    plan = Plan(np.tile(np.linspace(0.1, 0.6, 6)[None, :, None], (1, 1, 3)), np.tile(DOWN, (1, 6, 1)), openings, 0.1)
    controller = RecedingHorizon(Scripted(plan), control_hz=10, execute_seconds=1.8)
    np.testing.assert_array_equal(drive(controller, 6)[:, 7], [1, 1, 0, 0, 0, 1])
    raw = RecedingHorizon(Scripted(plan), control_hz=10, execute_seconds=1.8, grip_below=None, release_above=None)
    np.testing.assert_allclose(drive(raw, 6)[:, 7], openings[0])


def test_opening_is_sent_when_its_pose_is_reached() -> None:
    plan = line(0.0, 0.1)
    plan.gripper[0, 1:] = 0.0  # closed at 0.2 m
    controller = RecedingHorizon(Scripted(plan), control_hz=10, execute_seconds=1.2)
    seen = {**observation(), "gripper": np.array([0.8])}  # the measured opening; the command was: open
    commands = np.stack([controller.act(seen)[0] for _ in range(9)])
    np.testing.assert_array_equal(commands[:, 7], [1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert commands[5, 0] == pytest.approx(0.2)


def test_ensembling_averages_poses_planned_for_the_same_moment() -> None:
    first, second = line(0.0, 0.1, steps=4), line(0.5, 0.1, steps=4)
    controller = RecedingHorizon(
        Scripted(first, second), control_hz=10, execute_seconds=0.3, ensemble=True, ensemble_decay=0.5
    )
    commands = drive(controller, 6)
    old, new = 0.2, 0.6  # both are for 0.6 s after the start
    weight = np.exp(-0.5)
    np.testing.assert_allclose(commands[5, 0], (new + weight * old) / (1 + weight), atol=1e-9)


@pytest.mark.parametrize("step_seconds", [0.15, 0.25, 4 / 30, 0.04])
def test_steps_that_are_no_whole_control_periods_keep_their_time(step_seconds: float) -> None:
    """Rounded to periods, a plan of 0.15 s steps would be followed at three quarters of its speed at 10 Hz."""
    plan = replace(line(0.0, 0.2 * step_seconds, steps=40), step_seconds=step_seconds)  # 0.2 m/s
    plan.gripper[0, 20:] = 0.0
    controller = RecedingHorizon(Scripted(plan), control_hz=10, execute_seconds=40 * step_seconds)
    ticks = math.ceil(400 * step_seconds - 1e-6)
    commands = drive(controller, ticks)
    assert controller.plans == 1
    assert controller.wants_observation  # the plan has been followed to its end
    times = np.minimum(0.1 * np.arange(1, ticks + 1), 40 * step_seconds)
    assert np.abs(commands[:, 0] - 0.2 * times).max() < 0.1 * 0.2 * step_seconds + 1e-9  # eased between waypoints
    np.testing.assert_array_equal(commands[:, 7], times < 21 * step_seconds - 1e-6)


def test_a_step_that_carries_float32_rounding_adds_no_control_period() -> None:
    """Checkpoints may hold 0.1 s as float32, 1.5e-9 s too long: over 50 steps at 100 Hz more than 1e-6 periods."""
    plan = replace(line(0.0, 0.002, steps=50), step_seconds=float(np.float32(0.1)))
    controller = RecedingHorizon(Scripted(plan), control_hz=100, execute_seconds=5.0)
    commands = drive(controller, 500)
    assert controller.plans == 1
    assert controller.wants_observation
    np.testing.assert_allclose(commands[-1, 0], 0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "steps", "hz", "periods"), [(0.1, 50, 100, 500), (0.3, 16, 10, 48), (0.35, 3, 10, 11)]
)
def test_a_motion_takes_the_periods_that_it_fills(step: float, steps: int, hz: float, periods: int) -> None:
    assert control_periods(steps * step, hz) == control_periods(steps * float(np.float32(step)), hz) == periods


def test_reset_forgets_the_episode() -> None:
    policy = Scripted(line(0.0, 0.1), line(0.0, 0.1))
    controller = RecedingHorizon(policy, control_hz=10, execute_seconds=1.2)
    before = drive(controller, 5)
    controller.reset()
    np.testing.assert_allclose(drive(controller, 5), before)
    assert controller.plans == 1


def test_two_arms_share_a_plan() -> None:
    one = line(0.0, 0.1)
    both = Plan(np.concatenate([one.position, -one.position]), np.tile(DOWN, (2, 4, 1)), np.ones((2, 4)), 0.3)
    start = {"position": np.zeros((2, 3)), "quaternion": np.tile(DOWN, (2, 1)), "gripper": np.ones(2)}
    controller = RecedingHorizon(Scripted(both), control_hz=10)
    command = [controller.act(start) for _ in range(3)][-1]
    np.testing.assert_allclose(command[:, 0], [0.1, -0.1], atol=1e-12)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="together"):
        RecedingHorizon(Scripted(), 10, grip_below=None)
    with pytest.raises(ValueError, match="above 0"):
        RecedingHorizon(Scripted(), 10, execute_seconds=0.0)


def test_ensembling_interpolates_between_the_steps_of_an_older_plan() -> None:
    plans = [replace(line(start, 0.1, steps=4), step_seconds=0.15) for start in (0.0, 0.5)]
    controller = RecedingHorizon(
        Scripted(*plans), control_hz=10, execute_seconds=0.15, ensemble=True, ensemble_decay=0.5
    )
    commands = drive(controller, 4)  # a step takes two periods, so the second plan begins at 0.2 s
    weight, old, new = np.exp(-0.5), 0.1 * 0.35 / 0.15, 0.6  # both are for 0.35 s
    np.testing.assert_allclose(commands[3, 0], (new + weight * old) / (1 + weight), atol=1e-9)
