"""The control loop on a simulated clock: time-stamped plans, latency, limits, watchdog, corrections."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scripts import imported

from keygrip.data.robot.frame_rates import other_rates
from keygrip.data.robot.native import read_native
from keygrip.data.robot.samples import weighted_frames
from keygrip.models.policy import Observation, Plan
from keygrip.robots.joint_motion import JointMotionError
from keygrip.runtime import planners
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.control_loop import ControlLoop, Tick
from keygrip.runtime.limits import MotionLimits
from keygrip.runtime.planners import PlanRequest, SimulatedPlanner, ThreadPlanner
from keygrip.runtime.robot import RobotLostError
from keygrip.runtime.takeover import (
    Correction,
    CorrectionRecorder,
    Device,
    GamepadTakeover,
    KeyboardTakeover,
    TakeoverLostError,
    moved_by,
)
from keygrip.runtime.watchdog import State, Watchdog, WatchdogSettings
from keygrip.training.signals import Interrupted

DOWN = np.array([0.0, 1.0, 0.0, 0.0])
START = np.concatenate([[0.3, 0.0, 0.2], DOWN, [1.0]])
LIMITS = MotionLimits(workspace_low=(0.1, -0.3, 0.0), workspace_high=(0.5, 0.3, 0.5))
IMAGE = np.zeros((16, 16, 3), np.uint8)


class PointArm:
    """A robot on a simulated clock whose tool is at the commanded pose; faults can be injected."""

    control_hz = 10.0

    def __init__(self) -> None:
        self.pose, self.ticks, self.stops = START[None].copy(), 0, 0
        self.sent: list[np.ndarray] = []
        self.frozen_at: float | None = None
        self.lost = self.refuses = False

    def now(self) -> float:
        return self.ticks / self.control_hz

    def wait_until(self, moment: float) -> None:
        self.ticks = max(self.ticks, round(moment * self.control_hz))

    def observe(self, images: bool = True) -> dict[str, Any]:
        if self.lost:
            raise RobotLostError("no answer")
        seen = {"position": self.pose[:, :3], "quaternion": self.pose[:, 3:7], "gripper": self.pose[:, 7]}
        taken = self.now() if self.frozen_at is None else min(self.now(), self.frozen_at)
        views = {"image": IMAGE, "intrinsics": np.eye(3), "world_to_camera": np.eye(4)} if images else {}
        return {**seen, **views, "time_s": taken}

    def command(self, poses: np.ndarray) -> None:
        if self.lost:
            raise RobotLostError("no answer")
        if self.refuses:
            raise JointMotionError("out of reach")
        self.pose = poses.copy()
        self.sent.append(poses[0].copy())

    def stop(self) -> None:
        self.stops += 1

    def close(self) -> None: ...


class Clockwork:
    """Plans along a known path x(t) = 0.3 + 0.05 sin(t), correct for the time of its observation."""

    def __init__(self, fault: BaseException | None = None, from_plan: int = 0) -> None:
        self.fault, self.from_plan, self.plans = fault, from_plan, 0

    def plan(self, observation: Observation) -> Plan:
        self.plans += 1
        if self.fault is not None and self.plans > self.from_plan:
            raise self.fault
        times = observation["time_s"] + 0.3 * np.arange(1, 9)
        position = np.stack([path(times), np.zeros(8), np.full(8, 0.2)], axis=1)[None]
        return Plan(position, np.tile(DOWN, (1, 8, 1)), np.ones((1, 8)), 0.3)


def path(times: Any) -> Any:
    return 0.3 + 0.05 * np.sin(times)


class Wild:
    """Plans random poses, and sometimes NaN."""

    def __init__(self, broken: float = 0.05) -> None:
        self.generator, self.broken = np.random.default_rng(0), broken

    def plan(self, observation: Observation) -> Plan:
        draw = self.generator
        spread = draw.choice([0.05, 0.3, 3.0])
        position = observation["position"][:, None] + draw.normal(0, spread, (1, 8, 3))
        if draw.random() < self.broken:
            position = np.full_like(position, np.nan)
        turns = Rotation.random(8, rng=draw).as_quat(scalar_first=True)[None]
        return Plan(position, turns, draw.uniform(-0.3, 1.3, (1, 8)), 0.3)


class Rising:
    """Returns the first plan of another policy unchanged, and later ones 5 m higher."""

    def __init__(self, policy: Clockwork) -> None:
        self.policy = policy

    def plan(self, observation: Observation) -> Plan:
        plan = self.policy.plan(observation)
        if self.policy.plans > 1:
            plan.position[..., 2] += 5.0
        return plan


def loop_of(policy: Any, robot: PointArm, latency: float = 0.0, **settings: Any) -> ControlLoop:
    planner = SimulatedPlanner(policy, lambda: latency)
    execution = ChunkExecution(planner, robot.control_hz, **settings.pop("execution", {}))
    return ControlLoop(robot, execution, settings.pop("limits", LIMITS), **settings)


class AstrayAtFirst:
    """Plans to stay where the arm is, but for the first step."""

    def __init__(self, first: list[float]) -> None:
        self.first = first

    def plan(self, observation: Observation) -> Plan:
        position = np.tile(START[:3], (1, 8, 1))
        position[0, 0] = self.first
        return Plan(position, np.tile(DOWN, (1, 8, 1)), np.ones((1, 8)), 0.3)


@pytest.mark.parametrize("first", [[0.3, 1.3, 0.2], [0.3, 0.29, 0.2], [np.nan, 0.0, 0.2]])
@pytest.mark.parametrize("latency", [0.0, 0.2, 0.32, 0.45])
def test_the_step_that_passes_while_a_plan_arrives_is_checked_too(first: list[float], latency: float) -> None:
    """Commands are interpolated from it to the next step."""
    robot = PointArm()
    limits = replace(LIMITS, speed_m_s=0.1)
    report = loop_of(AstrayAtFirst(first), robot, latency, limits=limits).run(6.0)
    assert report.state is State.STOPPED
    assert np.abs(np.array(robot.sent)[:, :3] - START[:3]).max() < 1e-9


def test_blocking_without_latency_is_the_receding_horizon() -> None:
    ours, theirs = Wild(broken=0.0), Wild(broken=0.0)
    reference = RecedingHorizon(theirs, 10.0)
    execution = ChunkExecution(SimulatedPlanner(ours, lambda: 0.0), 10.0, asynchronous=False)
    pose = START
    for tick in range(100):
        seen = {"position": pose[None, :3], "quaternion": pose[None, 3:7], "gripper": pose[None, 7]}
        pose = execution.target({**seen, "time_s": tick / 10}, tick / 10)[0]
        other = reference.act(seen)[0]
        np.testing.assert_allclose(pose[[0, 1, 2, 7]], other[[0, 1, 2, 7]], atol=1e-9)
        assert abs(pose[3:7] @ other[3:7]) == pytest.approx(1, abs=1e-9)
    assert execution.plans == reference.plans >= 5


def test_plans_are_followed_by_the_time_of_their_observation() -> None:
    """With 0.4 s of latency the arm is where the plan puts it at this time. In blocking mode it is not, and it stands
    still while the policy plans."""
    errors, still = {}, {}
    for asynchronous in (True, False):
        robot = PointArm()
        report = loop_of(Clockwork(), robot, 0.4, execution={"asynchronous": asynchronous}).run(20.0)
        x = np.array([pose[0] for pose in robot.sent])[: report.ticks]  # then the arm brakes
        times = (np.arange(len(x)) + 1) / 10
        errors[asynchronous] = np.abs(x - path(times))[20:].max()
        still[asynchronous] = int((np.abs(np.diff(x))[20:] < 1e-9).sum())
        assert report.state is State.RUNNING
        assert max(report.latencies_s) == pytest.approx(0.4)
    assert errors[True] < 0.006  # the easing between waypoints
    assert errors[False] > 0.01
    assert still[True] == 0
    assert still[False] > 20


LATENCIES = ((0.0,), (0.1,), (0.1, 0.3, 0.2, 0.1), (0.2,) + 7 * (0.06,))


@pytest.mark.parametrize(
    ("latencies", "execute_seconds"),
    [
        *((latencies, 0.3) for latencies in LATENCIES),
        *(pytest.param(each, 1.2, marks=() if len(each) == 4 else pytest.mark.slow) for each in LATENCIES),
    ],
)
@pytest.mark.quick_sets(3)
def test_the_gripper_closes_when_a_plan_says_so_and_never_before(
    latencies: tuple[float, ...], execute_seconds: float
) -> None:
    """This also holds where every plan is replaced before its first step is reached."""

    class Grip(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            plan.gripper[0] = np.where(observation["time_s"] + 0.3 * np.arange(1, 9) >= 2.0 - 1e-6, 0.0, 1.0)
            return plan

    for asynchronous in (True, False):
        robot, draws = PointArm(), iter(latencies * 2000)
        robot.control_hz = 50.0
        planner = SimulatedPlanner(Grip(), lambda draws=draws: next(draws))  # type: ignore[misc]
        blend = 0.2 * asynchronous
        execution = ChunkExecution(planner, 50.0, asynchronous, execute_seconds, blend, still_distance_m=0.0)
        ControlLoop(robot, execution, LIMITS).run(3.2)
        closed = np.array(robot.sent)[:, 7] < 0.5
        first = int(closed.argmax())
        assert closed[first:].all()
        assert 2.0 - 1e-6 <= (first + 1) / 50 <= 2.3 + (0 if asynchronous else 2 * max(latencies)) + 1e-6


@pytest.mark.parametrize("camera_age", [0.0, 0.2])
def test_the_next_plan_is_asked_for_early_by_the_measured_latency(camera_age: float) -> None:
    asked: list[float] = []

    class Camera(PointArm):
        def observe(self, images: bool = True) -> dict[str, Any]:
            seen = super().observe(images)
            return seen | {"time_s": seen["time_s"] - camera_age}

    class Noting(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            asked.append(observation["time_s"])
            return super().plan(observation)

    loop_of(Noting(), Camera(), 0.3, execution={"still_distance_m": 0.0}).run(6.0)
    # 1.2 s of execution minus 0.3 s; a request cannot compensate for the age of its image
    np.testing.assert_allclose(np.diff(asked)[1:], 0.9 - camera_age, atol=1e-6)


def test_what_a_person_presses_during_a_fault_does_not_act_after_it() -> None:
    """The device is read during the fault, and its correction dropped: otherwise it would answer with old keys."""
    read: list[float] = []
    robot = PointArm()

    class Pressing:
        def read(self, now: float, command: np.ndarray) -> Correction | None:
            read.append(now)
            late = robot.frozen_at is not None and now > robot.frozen_at + 0.7  # the observation is stale by then
            return Correction(np.array([0.0, 0.1, 0.0])) if late else None

        def close(self) -> None: ...

    def plant() -> bool:
        robot.frozen_at = 1.0 if 1.0 <= robot.now() < 2.0 else None
        return False

    loop_of(Clockwork(), robot, takeover=Pressing()).run(4.0, over=plant)
    assert len(read) == 40
    assert np.abs(np.array(robot.sent)[:, 1]).max() == 0.0


def test_a_gripper_that_is_switched_during_a_fault_stays_as_it_was_after_it() -> None:
    """An object that is held would be dropped."""
    robot = PointArm()
    keys = {0.3: "t", 1.8: " ", 1.9: "w"}  # the observation is stale from 1.5 s on

    class Keys(KeyboardTakeover):
        def __init__(self) -> None:
            Device.__init__(self)
            self.speed_m_s, self.turn_rad_s, self.repeat_seconds, self._pressed = 0.1, 0.6, 0.3, {}

        def _keys(self) -> str:
            return keys.pop(next((moment for moment in keys if moment <= robot.now()), -1.0), "")

    def plant() -> bool:
        robot.frozen_at = 1.0 if 1.0 <= robot.now() < 3.0 else None
        return False

    takeover = Keys()
    loop_of(Clockwork(), robot, takeover=takeover).run(4.0, over=plant)
    assert keys == {}
    assert takeover.active
    assert [pose[7] for pose in robot.sent[-5:]] == [1.0] * 5
    assert np.ptp([pose[0] for pose in robot.sent[-5:]]) == 0.0


def test_random_plans_never_exceed_a_limit() -> None:
    robot = PointArm()
    loop_of(Wild(), robot, 0.15, watchdog=Watchdog(WatchdogSettings(hold_seconds=1e9, most_holds=10**9))).run(60.0)
    sent = np.stack(robot.sent)
    low, high = LIMITS.box()
    velocity = np.diff(np.concatenate([START[None, :3], sent[:, :3]]), axis=0) * 10
    assert np.linalg.norm(velocity, axis=1).max() <= LIMITS.speed_m_s * (1 + 1e-6)
    assert np.linalg.norm(np.diff(velocity, axis=0) * 10, axis=1).max() <= LIMITS.acceleration_m_s2 * (1 + 1e-6)
    assert (sent[:, :3] >= low).all()
    assert (sent[:, :3] <= high).all()
    assert len(sent) == 600
    assert np.ptp(sent[:, 0]) > 0.05  # it moved


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("stale", "stale observation"),
        ("stuck", "stuck policy"),
        ("connection", "lost the policy"),
        ("policy", "ValueError: no plane"),
        ("unsafe", "outside the workspace"),
        ("robot", "lost the robot"),
        ("joints", "out of reach"),
    ],
)
def test_every_fault_ends_in_a_held_then_stopped_arm(fault: str, said: str) -> None:
    errors = {"connection": ConnectionError("gone"), "policy": ValueError("no plane")}
    robot, policy = PointArm(), Clockwork(errors.get(fault), from_plan=1)
    latency = iter([0.0] + [np.inf if fault == "stuck" else 0.1] * 1000)
    loop = loop_of(policy, robot)
    loop.execution.planner = SimulatedPlanner(Rising(policy) if fault == "unsafe" else policy, lambda: next(latency))
    began = 1.0

    def plant() -> bool:
        if robot.now() >= began:
            robot.frozen_at = began if fault == "stale" else None
            robot.lost, robot.refuses = fault == "robot", fault == "joints"
        return False

    ticks: list[Tick] = []
    loop.on_tick = ticks.append
    report = loop.run(30.0, over=plant)
    assert report.state is State.STOPPED
    assert said in (report.reason or "")
    states = [tick.state for tick in ticks]
    held = states.index(State.HOLDING)
    assert held >= 10
    assert set(states[held:-1]) == {State.HOLDING}
    assert states[-1] is State.STOPPED
    assert len(states) - held == pytest.approx(21, abs=1)  # hold_seconds
    np.testing.assert_allclose(ticks[-1].command, ticks[held + 5].command)  # it stood still
    assert robot.stops == 1


class Away(Clockwork):
    """Plans towards one point, at 0.44 m/s after 0.4 s."""

    def plan(self, observation: Observation) -> Plan:
        plan = super().plan(observation)
        plan.position[:] = [0.3, 0.29, 0.2]
        return replace(plan, step_seconds=0.8)


def velocities_of(robot: PointArm) -> np.ndarray:
    """Return [N, 3] m/s of the commands that were sent."""
    return np.diff(np.concatenate([START[None, :3], np.stack(robot.sent)[:, :3]]), axis=0) * robot.control_hz


def test_a_refused_command_brakes_the_arm_within_the_limits() -> None:
    """The arm used to stop at once: from 0.44 m/s within a thirtieth of a second."""

    class Choosy(PointArm):
        control_hz = 30.0
        refusals = 0

        def command(self, poses: np.ndarray) -> None:
            self.refuses = self.ticks == 11 and self.refusals == 0
            self.refusals += self.refuses
            super().command(poses)

    robot = Choosy()
    report = loop_of(Away(), robot).run(0.8)
    assert robot.refusals == 1
    assert report.ticks == 24
    velocity = velocities_of(robot)[:24]
    assert velocity[10, 1] > 0.4
    assert 0.1 < velocity[11, 1] < velocity[10, 1] - 0.1  # it braked in the period of the refused command
    assert np.linalg.norm(np.diff(velocity, axis=0) * 30, axis=1).max() <= LIMITS.acceleration_m_s2 * (1 + 1e-6)


@pytest.mark.parametrize("holds", [False, True])
def test_refused_commands_stop_the_arm_although_plans_arrive_without_latency(holds: bool) -> None:
    """Each new plan used to end the fault before the watchdog was told of it."""

    class Beyond(PointArm):
        def command(self, poses: np.ndarray) -> None:
            moves = not np.array_equal(poses, self.pose)
            self.refuses = self.now() >= 1.0 and (moves or not holds)
            super().command(poses)

    robot = Beyond()
    report = loop_of(Clockwork(), robot).run(30.0)
    assert report.state is State.STOPPED
    reason = "after 10 holds" if holds else "for 2.0 s"
    assert f"unsafe command: out of reach ({reason})" == report.reason
    assert report.seconds < 4.5


class Quick(PointArm):
    """Counts the commands that were sent before the stop."""

    control_hz = 30.0
    sent_before_stop = 0

    def stop(self) -> None:
        super().stop()
        self.sent_before_stop = len(self.sent)


@pytest.mark.parametrize("end", ["seconds", "over", "first fault", "second fault"])
def test_a_moving_arm_brakes_within_the_limits_before_it_is_stopped(end: str) -> None:
    """It used to be stopped from 0.44 m/s at once at the end of every run, and after too many holds."""
    robot, most_holds = Quick(), {"first fault": 0, "second fault": 1}.get(end, 10)

    def plant() -> bool:
        late = robot.now() > 0.39
        robot.frozen_at = -1.0 if "fault" in end and (late or (most_holds and robot.ticks == 1)) else None
        return end == "over" and late

    settings = WatchdogSettings(most_holds=most_holds)
    loop = loop_of(Away(), robot, watchdog=Watchdog(settings), execution={"still_distance_m": 0.0})
    report = loop.run(0.4 if end == "seconds" else 5.0, over=plant)
    assert report.state is (State.STOPPED if "fault" in end else State.RUNNING)
    assert report.seconds == pytest.approx(0.4, abs=1e-6)  # without the braking
    velocity = np.linalg.norm(velocities_of(robot), axis=1)
    assert velocity[11] > 0.3
    assert velocity[-1] == pytest.approx(0.0, abs=1e-9)
    assert len(robot.sent) - report.ticks <= np.ceil(LIMITS.braking_s * 30) + 1
    assert np.abs(np.diff(velocities_of(robot), axis=0)).max() * 30 <= LIMITS.axis_acceleration_m_s2 * (1 + 1e-6)
    assert (robot.stops, robot.sent_before_stop) == (1, len(robot.sent))
    assert robot.ticks == len(robot.sent)  # the last command has had its period


def test_braking_at_the_end_lasts_no_longer_than_a_hold() -> None:
    weak = replace(LIMITS, acceleration_m_s2=0.2, lag_m=1.0)
    for hold_seconds, periods in ((0.3, 9), (60.0, None)):
        robot = Quick()
        loop = loop_of(Away(), robot, limits=weak, watchdog=Watchdog(WatchdogSettings(hold_seconds=hold_seconds)))
        report = loop.run(1.0)
        speed = np.linalg.norm(velocities_of(robot), axis=1)
        assert speed[report.ticks - 1] > 0.1
        assert (speed[-1] < 1e-9) == (periods is None)
        needed = np.ceil(speed[report.ticks - 1] / weak.axis_acceleration_m_s2 * 30 - 1e-6)
        assert needed > 20
        assert len(robot.sent) - report.ticks == (periods or needed)


def test_an_exception_stops_the_arm_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Braking that fails ends at the last command, and says so."""

    def pressed(tick: Tick) -> None:
        if tick.time_s > 0.39:
            raise KeyboardInterrupt

    robot = Quick()
    with pytest.raises(KeyboardInterrupt):
        loop_of(Away(), robot, on_tick=pressed).run(5.0)
    assert (len(robot.sent), robot.stops) == (13, 1)
    assert np.linalg.norm(velocities_of(robot)[-1]) > 0.3

    robot = Quick()

    def lose() -> bool:
        robot.lost = robot.now() > 0.39
        return robot.lost

    loop_of(Away(), robot).run(5.0, over=lose)
    assert (len(robot.sent), robot.stops) == (12, 1)
    assert "was not braked within the limits: lost the robot: no answer" in caplog.text


def test_a_fault_that_ends_lets_the_arm_go_on() -> None:
    robot = PointArm()
    loop = loop_of(Clockwork(), robot, 0.1)

    def blink() -> bool:
        robot.lost = 2.0 <= robot.now() < 3.0
        return False

    ticks: list[Tick] = []
    loop.on_tick = ticks.append
    report = loop.run(6.0, over=blink)
    assert report.state is State.RUNNING
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING]
    assert abs(ticks[-1].command[0, 0] - path(6.0)) < 0.01


def test_a_plan_that_comes_late_holds_the_arm_until_it_is_there() -> None:
    """It was requested 2.5 s ago: it is not followed, and the next plan is."""
    robot, ticks, policy = PointArm(), [], Clockwork()  # type: ignore[var-annotated]
    latencies = itertools.chain([0.0, 2.5], itertools.repeat(0.0))
    loop = loop_of(policy, robot, on_tick=ticks.append)
    loop.execution.planner = SimulatedPlanner(policy, lambda: next(latencies))
    report = loop.run(8.0)
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING]
    held, over = (moment for moment, *_ in report.events)
    assert over - held == pytest.approx(2.5 - 2.1)  # from one period late until it arrives
    assert report.plans == policy.plans - 1
    assert abs(ticks[-1].command[0, 0] - path(8.0)) < 0.01


class Slow(PointArm):
    """An arm whose observations take time, with a time stamp of their begin or their end."""

    control_hz = 20.0

    def __init__(self, takes_s: float, stamped: str) -> None:
        super().__init__()
        self.clock, self.takes_s, self.stamped = 0.0, 0.0, stamped
        self.slow_s = takes_s

    def now(self) -> float:
        return self.clock

    def wait_until(self, moment: float) -> None:
        self.clock = max(self.clock, moment)

    def observe(self, images: bool = True) -> dict[str, Any]:
        began = self.clock
        self.clock += self.takes_s
        return {**super().observe(images), "time_s": began if self.stamped == "begin" else self.clock}


def test_a_driver_that_hangs_is_a_stale_observation() -> None:
    """Its observation is old when it arrives, although it was new when it was requested."""
    robot = Slow(1.5, "begin")

    def plant() -> bool:
        robot.takes_s = robot.slow_s if robot.now() >= 1.0 else 0.0
        return False

    ticks: list[Tick] = []
    loop = loop_of(Clockwork(), robot, 0.0)
    loop.on_tick = ticks.append
    report = loop.run(30.0, over=plant)
    assert report.state is State.STOPPED
    assert "stale observation: 1.50 s old" in (report.reason or "")
    assert all(tick.state is not State.RUNNING for tick in ticks if tick.time_s >= 1.0)
    assert report.seconds < 1.0 + 2.0 + 2 * 1.5 + 0.1  # hold_seconds, and two periods


def test_an_observation_that_waits_for_its_camera_is_not_ahead_of_the_clock() -> None:
    """Its time stamp is that of the camera, more than one period after the period began."""
    robot = Slow(0.07, "end")
    robot.takes_s = robot.slow_s
    report = loop_of(Clockwork(), robot, 0.0).run(4.0)
    assert report.events == []
    assert report.plans > 2


def test_a_policy_that_hangs_blocks_nothing() -> None:
    hang = threading.Event()

    class Hanging:
        def plan(self, observation: Observation) -> Plan:
            hang.wait(20)
            raise ValueError("too late")

    planner = ThreadPlanner(Hanging())
    planner.request(PlanRequest({}, 1.0))
    assert planner.poll(100.0) is None
    assert planner.busy_since == 1.0
    hang.set()


def test_a_policy_that_panics_is_an_error_and_not_a_thread_that_is_gone() -> None:
    class Panic(BaseException):
        """As in pyo3: a panic of a Rust extension is not an `Exception`."""

    class Panicking(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            raise Panic("index out of bounds")

    planner = ThreadPlanner(Panicking())
    for moment in (1.0, 2.0):
        planner.request(PlanRequest({}, moment))
        deadline = time.monotonic() + 20
        while (outcome := planner.poll(100.0)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert outcome is not None
        assert "Panic: index out of bounds" in str(outcome.error)


def test_the_end_waits_for_the_thread_that_plans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that is inside torch when Python ends would abort the process."""
    inside, ended, hang = threading.Event(), threading.Event(), threading.Event()

    class Slow(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            inside.set()
            time.sleep(0.3)
            ended.set()
            return super().plan(observation)

    class Hanging(Slow):
        def plan(self, observation: Observation) -> Plan:
            inside.set()
            hang.wait(20)
            return super().plan(observation)

    before = set(threading.enumerate())
    idle = ThreadPlanner(Slow())
    idle.close()
    slow = ThreadPlanner(Slow())
    slow.request(PlanRequest({}, 1.0))
    inside.wait(20)
    slow.close()
    assert ended.is_set()
    assert set(threading.enumerate()) <= before
    assert caplog.text == ""
    inside.clear()
    monkeypatch.setattr(planners, "ENDING_S", 0.05)
    stuck = ThreadPlanner(Hanging())
    stuck.request(PlanRequest({}, 1.0))
    inside.wait(20)
    stuck.close()
    assert "still computes after 0.05 s" in caplog.text
    caplog.clear()
    inside.clear()
    remote = ThreadPlanner(Hanging(), awaited=False)
    remote.request(PlanRequest({}, 1.0))
    inside.wait(20)
    others = set(threading.enumerate())
    remote.close()
    assert set(threading.enumerate()) == others, "its answer was waited for"
    assert caplog.text == "", "nothing of this process computes there"
    hang.set()


class Script:
    """Takes over from 1 s to 2 s, moves up and closes the gripper."""

    def read(self, now: float, command: np.ndarray) -> Correction | None:
        return Correction(np.array([0.0, 0.0, 0.1]), gripper=0.0) if 1.0 <= now < 2.0 else None

    def close(self) -> None: ...


SLOW = replace(LIMITS, speed_m_s=0.15, acceleration_m_s2=1.5, turn_rad_s=0.8, turn_acceleration_rad_s2=8.0)


@pytest.mark.parametrize("limits", [LIMITS, SLOW])
@pytest.mark.parametrize("control_hz", [10.0, 30.0])
def test_a_person_moves_the_arm_at_the_speed_that_is_set(limits: MotionLimits, control_hz: float) -> None:
    """It was 0.069 m/s in place of 0.15 with the slow limits at 30 Hz, because each period's target was only one period
    ahead. Released, the arm stops within the limits."""

    class Stick:
        """Full deflection from 0.5 to 1.5 s; then released."""

        def read(self, now: float, command: np.ndarray) -> Correction:
            wanted = 0.5 <= now + 1e-6 < 1.5
            return Correction(wanted * np.array([0.0, 0.15, 0.0]), wanted * np.array([0.0, 0.0, -0.8]))

        def close(self) -> None: ...

    robot = PointArm()
    robot.control_hz = control_hz
    loop_of(Clockwork(), robot, limits=limits, takeover=Stick()).run(2.5)
    velocity = velocities_of(robot)
    turns = Rotation.from_quat(np.stack([START, *robot.sent])[:, 3:7], scalar_first=True)
    turn_velocity = (turns[1:] * turns[:-1].inv()).as_rotvec() * control_hz
    steady = slice(round(1.0 * control_hz), round(1.5 * control_hz))
    np.testing.assert_allclose(velocity[steady], np.tile([0.0, 0.15, 0.0], (len(velocity[steady]), 1)), atol=1e-9)
    np.testing.assert_allclose(turn_velocity[steady, 2], -0.8, atol=1e-6)
    assert np.linalg.norm(velocity, axis=1).max() <= 0.15 + 1e-9
    change, turn_change = np.diff(velocity, axis=0) * control_hz, np.diff(turn_velocity, axis=0) * control_hz
    assert np.linalg.norm(change, axis=1).max() <= limits.acceleration_m_s2 * (1 + 1e-6)
    assert np.linalg.norm(turn_change, axis=1).max() <= limits.turn_acceleration_rad_s2 * (1 + 1e-6)
    released = round((1.5 + limits.braking_s) * control_hz) + 1
    assert np.abs(velocity[released:]).max() < 1e-9
    assert np.abs(turn_velocity[released:]).max() < 1e-6


def test_a_person_cannot_move_the_arm_beyond_the_limits() -> None:
    class Stick:
        def read(self, now: float, command: np.ndarray) -> Correction:
            return Correction(np.array([0.0, 5.0, 0.0]), np.array([0.0, 0.0, 50.0]), gripper=3.0)

        def close(self) -> None: ...

    robot = PointArm()
    robot.control_hz = 30.0
    loop_of(Clockwork(), robot, takeover=Stick()).run(3.0)
    velocity = velocities_of(robot)
    assert velocity[:, 1].max() == pytest.approx(LIMITS.speed_m_s)
    assert np.abs(np.diff(velocity, axis=0)).max() * 30 <= LIMITS.axis_acceleration_m_s2 * (1 + 1e-6)
    sent = np.stack([START, *robot.sent])
    assert sent[:, 1].max() <= 0.3  # the wall
    assert sent[-1, 1] > 0.299
    turns = Rotation.from_quat(sent[:, 3:7], scalar_first=True)
    fastest = (turns[1:] * turns[:-1].inv()).magnitude().max() * 30
    assert fastest == pytest.approx(LIMITS.turn_rad_s)
    assert sent[:, 7].max() == 1.0


def test_a_correction_that_is_not_finite_ends_the_run() -> None:
    class Stick:
        def read(self, now: float, command: np.ndarray) -> Correction:
            return Correction(np.array([0.0, np.nan, 0.0]))

        def close(self) -> None: ...

    robot = PointArm()
    with pytest.raises(ValueError, match=r"a velocity is finite, got \[0\.0, nan, 0\.0\] m/s"):
        loop_of(Clockwork(), robot, takeover=Stick()).run(1.0)
    assert (robot.sent, robot.stops) == ([], 1)


def test_a_correction_moves_the_arm_and_is_recorded_and_weighted(tmp_path: Path) -> None:
    robot = PointArm()
    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder:
        report = loop_of(Clockwork(), robot, 0.1, takeover=Script(), recorder=recorder).run(3.0)
    assert report.corrected_ticks == 10
    demo = read_native(tmp_path / "demo", "demo")
    assert demo.intervention is not None
    assert demo.intervention.sum() == 10
    commanded = demo.arms["right"].commanded
    assert commanded is not None
    during = commanded.position[demo.intervention, 2]
    assert during[-1] - during[0] > 0.05
    assert commanded.gripper[demo.intervention][-1] < 0.1
    frames = np.arange(len(demo))
    weighted = weighted_frames(frames, demo.intervention, 2.5)
    assert len(weighted) == len(frames) + 15
    assert set(np.unique(weighted)) == set(frames)
    np.testing.assert_array_equal(weighted_frames(frames, demo.intervention, 1.0), frames)
    assert not demo.intervention[weighted_frames(frames, demo.intervention, 0.0)].any()


@dataclass
class Between(Script):
    """Moves up for a while."""

    begin: float
    end: float

    def read(self, now: float, command: np.ndarray) -> Correction | None:
        return Correction(np.array([0.0, 0.0, 0.02])) if self.begin <= now < self.end else None


def test_a_plan_that_comes_while_a_person_has_the_arm_is_no_fault() -> None:
    robot, ticks = PointArm(), []  # type: ignore[var-annotated]
    loop = loop_of(Clockwork(), robot, 0.3, takeover=Between(1.15, 6.0), on_tick=ticks.append)
    report = loop.run(9.0)
    assert report.events == []
    assert report.corrected_ticks == 48
    assert abs(ticks[-1].command[0, 0] - path(9.0)) < 0.01  # and the policy continues


def test_a_person_takes_the_arm_of_a_policy_that_is_stuck() -> None:
    robot, policy = PointArm(), Clockwork()
    latencies = itertools.chain([0.0], itertools.repeat(np.inf))
    loop = loop_of(policy, robot, takeover=Between(4.0, 8.0))
    loop.execution.planner = SimulatedPlanner(policy, lambda: next(latencies))
    report = loop.run(20.0)
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING, State.HOLDING, State.STOPPED]
    assert [moment for moment, *_ in report.events][1:] == pytest.approx([4.0, 8.0, 10.0])
    assert report.corrected_ticks == 40
    assert robot.pose[0, 2] == pytest.approx(0.28, abs=0.01)


def test_a_fault_after_a_correction_leaves_the_gripper_as_the_person_left_it() -> None:
    """The policy's half-open command, within the dead band, leaves the gripper unchanged: closed by the person."""

    class HalfOpen(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            plan.gripper[:] = 0.5
            return plan

    class Glitch(PointArm):
        def observe(self, images: bool = True) -> dict[str, Any]:
            self.lost = self.ticks == 20  # the period after the correction
            return super().observe(images)

    robot = Glitch()
    report = loop_of(HalfOpen(), robot, takeover=Script()).run(4.0)
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING]
    openings = np.array(robot.sent)[:, 7]
    np.testing.assert_array_equal(openings[:10], 1.0)
    np.testing.assert_array_equal(openings[12:], 0.0)


def test_an_arm_that_a_person_drove_stops_with_their_device(tmp_path: Path) -> None:
    class Unplugged(Script):
        def read(self, now: float, command: np.ndarray) -> Correction | None:
            if now >= 1.5:
                raise TakeoverLostError("lost the gamepad")
            return super().read(now, command)

    robot = PointArm()
    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder:
        report = loop_of(Clockwork(), robot, 0.1, takeover=Unplugged(), recorder=recorder).run(9.0)
    assert report.state is State.STOPPED
    assert report.reason is not None
    assert report.reason.startswith("lost the gamepad")
    demo = read_native(tmp_path / "demo", "demo")
    assert demo.intervention is not None
    assert demo.intervention.sum() == report.corrected_ticks == 5
    commanded = demo.arms["right"].commanded
    assert commanded is not None
    last = np.flatnonzero(demo.intervention)[-1]
    assert np.abs(commanded.position[last + 1 :] - commanded.position[last]).max() < 0.02  # it brakes and stands


def test_a_run_without_corrections_leaves_no_demonstration(tmp_path: Path) -> None:
    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder:
        loop_of(Clockwork(), PointArm(), recorder=recorder).run(1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyboardTakeover]:
    """The keyboard of a terminal in which nobody types."""
    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        taken = KeyboardTakeover(speed_m_s=0.2)
        yield taken
        taken.close()
    os.close(master)


def test_every_axis_of_the_gamepad_moves_its_own_way(tmp_path: Path) -> None:
    device = tmp_path / "js0"
    rest = [(0, 0, 0x82, axis) for axis in (0, 1, 3, 4)]
    pushed = [(2, value, 2, axis) for axis, value in ((0, 16384), (1, -32767), (3, 24575), (4, 8192))]
    device.write_bytes(b"".join(GamepadTakeover.EVENT.pack(*event) for event in [*rest, (1, 1, 1, 0), *pushed]))
    correction = GamepadTakeover(str(device), speed_m_s=0.4, turn_rad_s=0.8).read(0.0, START[None])
    assert correction is not None
    np.testing.assert_allclose(correction.velocity, [0.4, -0.2, -0.1], atol=1e-4)
    np.testing.assert_allclose(correction.turn, [0, 0, -0.6], atol=1e-4)


def test_keys_and_sticks(keys: KeyboardTakeover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys.read(0.0, START[None]) is None
    for key in "tw ":
        keys.press(key, 0.0, START[7])
    correction = keys.read(0.1, START[None])
    assert correction is not None
    np.testing.assert_allclose(correction.velocity, [0.2, 0, 0])
    assert correction.gripper == 0.0
    np.testing.assert_allclose(moved_by(START[None], correction, 0.1)[0, :3], [0.32, 0.0, 0.2])
    later = keys.read(1.0, START[None])
    assert later is not None
    assert not later.velocity.any()  # the key was released

    (tmp_path / "idle_js0").touch()
    device = tmp_path / "js0"
    # sticks at rest, then take over, push the left one, pull a trigger a little, grip; triggers (2, 5) rest at an end
    rest = [(0, 0, 0x82, axis) for axis in (0, 1, 3, 4)] + [(0, -32767, 0x82, 2), (0, -32767, 0x82, 5)]
    events = [*rest, (1, 1, 1, 0), (2, -32767, 2, 1), (3, 100, 2, 0), (4, -20000, 2, 2), (5, 1, 1, 1)]
    device.write_bytes(b"".join(GamepadTakeover.EVENT.pack(*event) for event in events))
    pad = GamepadTakeover(str(device), speed_m_s=0.3)
    correction = pad.read(0.0, START[None])
    assert correction is not None
    np.testing.assert_allclose(correction.velocity, [0.3, 0, 0])
    assert not correction.turn.any()
    assert correction.gripper == 0.0
    pad.close()
    with pytest.raises(TakeoverLostError, match="lost the gamepad"):  # the device is gone while a person has control
        pad.read(0.1, START[None])
    idle = GamepadTakeover(str(tmp_path / "idle_js0"))
    idle.close()
    assert idle.read(0.1, START[None]) is None  # the policy has control: it continues
    triggers = GamepadTakeover(str(device), axes=(0, 1, 2, 5))
    correction = triggers.read(0.0, START[None])
    triggers.close()
    assert correction is not None
    assert not correction.turn.any()  # axes that were never at rest
    with pytest.raises(FileNotFoundError, match="no gamepad"):
        GamepadTakeover(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="four different axes"):
        GamepadTakeover(str(device), axes=(0, 1, 1, 3))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(ValueError, match="standard input is none"):
        KeyboardTakeover()


def test_taking_over_leaves_the_gripper_as_it_is(keys: KeyboardTakeover) -> None:
    """The arm holds an object: only the grip key opens the gripper, and each takeover begins with the current
    opening."""

    class Holding(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            plan.gripper[:] = 0.0
            return plan

    class Pressed:
        def __init__(self, presses: dict[int, str]) -> None:
            self.presses = presses

        def read(self, now: float, command: np.ndarray) -> Correction | None:
            for key in self.presses.get(round(10 * now), ""):
                keys.press(key, now, float(command[0, 7]))
            return keys.read(now, command)

        def close(self) -> None: ...

    robot = PointArm()
    loop_of(Holding(), robot, takeover=Pressed({20: "t", 25: "t", 30: "t", 33: " ", 36: " ", 40: "t"})).run(5.0)
    openings = np.array(robot.sent)[:, 7]
    np.testing.assert_array_equal(openings[10:33], 0.0)
    np.testing.assert_array_equal(openings[33:36], 1.0)
    np.testing.assert_array_equal(openings[36:], 0.0)


@pytest.mark.parametrize("active", [True, False])
def test_a_terminal_that_is_closed_holds_the_arm_that_a_person_has(
    active: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A closed terminal can always be read: the loop would read keys for ever and never command the arm again."""
    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keyboard = KeyboardTakeover()
        if active:
            keyboard.press("t", 0.0, 1.0)
        os.close(master)
        for _ in range(2):
            if active:
                with pytest.raises(TakeoverLostError, match="lost the terminal"):
                    keyboard.read(0.1, START[None])
            else:
                assert keyboard.read(0.1, START[None]) is None
        assert [record.getMessage() for record in caplog.records] == (
            []
            if active
            else ["lost the terminal in which a person drove the arm: the policy drives on, and nobody can take over"]
        )
        keyboard.close()


def test_a_recording_has_quaternions_of_continuous_signs(tmp_path: Path) -> None:
    """A robot gives q or -q, here in turns, and in an array that it uses again."""
    arms, steps = ["left", "right"], 6
    turns = Rotation.from_rotvec(np.linspace(2.9, 3.4, steps)[:, None] * [1, 0, 0]).as_quat(scalar_first=True)
    observation = {"quaternion": np.empty((2, 4)), "position": np.zeros((2, 3)), "gripper": np.ones(2)}
    observation |= {"image": IMAGE, "intrinsics": np.eye(3), "world_to_camera": np.eye(4)}
    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", arms, ["over"], 10.0) as recorder:
        for step, turn in enumerate(turns):
            sign = (-1) ** step
            observation["quaternion"][:] = sign * turn, turn
            command = np.concatenate([np.zeros((2, 3)), np.stack([turn, sign * turn]), np.ones((2, 1))], axis=1)
            recorder.add(observation, command, corrected=True, now=step / 10)
    demo = read_native(tmp_path / "demo", "demo")
    for arm in arms:
        commanded = demo.arms[arm].commanded
        assert commanded is not None
        np.testing.assert_allclose(demo.arms[arm].quaternion, turns, atol=1e-6)
        np.testing.assert_allclose(commanded.quaternion, turns, atol=1e-6)


def test_a_run_that_is_interrupted_keeps_its_corrections(tmp_path: Path) -> None:
    for number, stop in enumerate((KeyboardInterrupt(), Interrupted("stopped by SIGTERM", signal.SIGTERM))):
        with (
            pytest.raises(type(stop)),
            CorrectionRecorder(tmp_path / f"{number}", "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder,
        ):

            def stopped(tick: Tick, stop: BaseException = stop) -> None:
                if tick.time_s > 1.5:
                    raise stop

            loop_of(Clockwork(), PointArm(), takeover=Script(), recorder=recorder, on_tick=stopped).run(3.0)
        demo = read_native(tmp_path / f"{number}", "demo")
        assert demo.intervention is not None
        assert demo.intervention.sum() == 7
    with (
        pytest.raises(ZeroDivisionError),
        CorrectionRecorder(tmp_path / "broken", "yam", "t", "do it", ["right"], ["over"], 10.0),
    ):
        _ = 1 / 0
    assert not (tmp_path / "broken").exists()


def test_a_signal_while_the_policy_plans_ends_the_run() -> None:
    """When it was treated as a failure of the policy, another plan followed, and the arm drove on."""
    robot, policy = PointArm(), Clockwork(Interrupted("stopped by SIGTERM", signal.SIGTERM), from_plan=1)
    with pytest.raises(Interrupted):
        loop_of(policy, robot).run(5.0)
    assert (policy.plans, robot.stops) == (2, 1)


def test_a_recording_keeps_the_times_of_an_arm_that_was_held(tmp_path: Path) -> None:
    """Refused plans hold the arm, and the robot is lost for a while: frames keep the times of the robot's clock."""

    class Away(PointArm):
        def observe(self, images: bool = True) -> dict[str, Any]:
            self.lost = 2.2 <= self.now() < 2.75
            return super().observe(images)

    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder:
        loop_of(Rising(Clockwork()), Away(), takeover=Script(), recorder=recorder).run(3.5)
    demo = read_native(tmp_path / "demo", "demo")
    steps = np.diff(demo.timestamps) / 1e9
    assert demo.intervention is not None
    assert demo.intervention.sum() == 10
    assert sorted(set(np.round(steps, 6))) == [0.1, 0.7]  # the gap is there


@pytest.mark.parametrize(("period_s", "fps"), [(0.15, 6.667), (0.102, 10.0)])
def test_a_recording_of_a_slow_loop_states_the_rate_that_was_reached(
    period_s: float, fps: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stated the rate of the settings, and training left it out."""

    class Late(PointArm):
        def now(self) -> float:
            return self.ticks * period_s

        def wait_until(self, moment: float) -> None:
            self.ticks += 1

    def record(name: str, error: Exception | None = None) -> None:
        with CorrectionRecorder(tmp_path / name, "yam", "t", "do it", ["right"], ["over"], 10.0) as recorder:
            loop_of(Clockwork(), Late(), takeover=Script(), recorder=recorder).run(3.0)
            if error is not None:
                raise error

    with pytest.raises(OSError, match="disk"):
        record("broken", OSError("disk"))
    assert not (tmp_path / "broken").exists()
    assert "were recorded" not in caplog.text
    record("demo")
    reference = read_native(tmp_path / "demo", "demo")
    assert len(reference) > 15
    assert reference.fps == pytest.approx(fps, rel=1e-3)
    assert other_rates([reference], tmp_path) == {}
    assert ("6.667 frames per second were recorded, not 10 (robot.control_hz)" in caplog.text) == (fps < 10)


def test_after_a_lost_connection_the_arm_goes_on_from_where_it_is() -> None:
    class Pushed(PointArm):
        """Lost from 2 to 3 s and pushed by 15 cm meanwhile. It holds an object, so its gripper is not shut."""

        def observe(self, images: bool = True) -> dict[str, Any]:
            self.lost = 2.0 - 1e-6 <= self.now() < 3.0 - 1e-6
            if self.lost:
                self.pose[0, 1] = -0.15
            seen = super().observe(images)
            return {**seen, "gripper": seen["gripper"] + 0.3}

    class Shut(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            plan.gripper[:] = 0.0
            return plan

    robot = Pushed()
    seen: list[tuple[float, np.ndarray]] = []
    report = loop_of(Shut(), robot, on_tick=lambda tick: seen.append((tick.time_s, tick.command[0]))).run(6.0)
    assert report.state is State.RUNNING
    assert np.isclose(robot.pose[0, 1], 0.0, atol=1e-3)  # back on its path
    after = np.array([command for moment, command in seen if moment > 3.0 - 1e-6])
    way = np.concatenate([[[0.3, -0.15]], after[:, :2]])
    assert (np.abs(np.diff(way[:, 1])) <= LIMITS.speed_m_s / 10 + 1e-9).all()
    np.testing.assert_array_equal(after[:, 7], 0.0)  # the object is not released


@pytest.mark.parametrize("ahead", [100.0, np.nan])
def test_times_ahead_of_the_clock_hold_the_arm(ahead: float) -> None:
    class Ahead(PointArm):
        def observe(self, images: bool = True) -> dict[str, Any]:
            seen = super().observe(images)
            return {**seen, "time_s": seen["time_s"] + ahead}

    report = loop_of(Clockwork(), Ahead()).run(5.0)
    assert report.state is State.STOPPED
    assert "ahead of the robot's clock" in str(report.reason)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="execute_seconds"):
        ChunkExecution(SimulatedPlanner(Wild(), lambda: 0.0), 10.0, execute_seconds=float("nan"))
    with pytest.raises(ValueError, match="stale_seconds"):
        WatchdogSettings(stale_seconds=0.0)


def test_plans_that_the_policy_held_back_are_counted() -> None:
    class Held(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            return replace(plan, held_back=np.array([[0.0, 0.07 * (self.plans % 2), 1e-9]]))

    figures = loop_of(Held(), PointArm()).run(6.0).summary()
    assert figures["plans"] > 3
    assert figures["clamped_plans"] == (figures["plans"] + 1) // 2
    assert figures["clamped_most_m"] == 0.07

    class Free(Clockwork):
        def plan(self, observation: Observation) -> Plan:
            return replace(super().plan(observation), held_back=np.zeros((1, 3)))

    figures = loop_of(Free(), PointArm()).run(6.0).summary()
    assert (figures["clamped_plans"], figures["clamped_most_m"]) == (0, 0.0)
    assert "clamped_plans" not in loop_of(Clockwork(), PointArm()).run(6.0).summary(), "it holds none back"


@pytest.fixture(scope="module")
def wild() -> ModuleType:
    return imported("benchmarks/control_loop/wild.py")


class TestRandomPlans:
    """benchmarks/control_loop/wild.py."""

    def test_excesses_are_counted_by_their_first_cause(self, wild: ModuleType) -> None:
        speeds, jumps = np.array([1.0, 3.0, 1.1, 2.5, 1.0]), np.array([0.0, 5.0, 0.0, 5.0])  # of 6 periods
        causes = {
            "refused": np.array([False, False, True, False, False, False]),
            "slowed": np.array([False, False, False, False, True, False]),
        }
        motion = {"speed": (speeds, 1.0), "jump": (jumps, 4.0)}
        found = wild.excesses(motion, {"speed": 0.2}, causes)
        assert found["speed"] == {
            "largest": 3.0,
            "limit": 1.0,
            "tolerance": 0.2,
            "periods_over": {"refused": 1, "slowed": 1, "otherwise": 0},
            "excess_median": 1.75,
            "excess_largest": 2.0,
        }
        assert found["jump"]["periods_over"] == {"refused": 1, "slowed": 1, "otherwise": 0}
        left = wild.excesses(motion, {}, {"slowed": causes["slowed"]})
        assert left["speed"]["periods_over"] == {"slowed": 1, "otherwise": 2}

    @pytest.mark.parametrize(
        ("settings", "measured"),
        [
            (["--ticks", "100"], "largest_and_limit"),
            (["--arm", "--ticks", "40"], "limits"),
        ],
    )
    def test_a_short_run_has_every_limit(
        self,
        wild: ModuleType,
        settings: list[str],
        measured: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["wild.py", *settings])
        with pytest.raises(SystemExit) as ended:
            wild.main()
        record = json.loads(capsys.readouterr().out)
        assert ended.value.code == 0
        assert record["command"] == f"python benchmarks/control_loop/wild.py {' '.join(settings)}"
        assert record["ticks"] == int(settings[-1])
        assert record["plans_followed"] > 0
        names = {"speed_m_s", "acceleration_m_s2", "turn_rad_s", "turn_acceleration_rad_s2", "gripper_per_s"}
        of_joints = {"joint_speed_rad_s"} if "--arm" in settings else set()
        assert set(record[measured]) == names | {"outside_workspace_m"} | of_joints
        if "--arm" in settings:
            assert 0.1 < record["limits"]["joint_speed_rad_s"]["largest"] <= 3.0 + 1e-6
            assert record["limits"]["speed_m_s"]["largest"] > 0.1

    def test_poses_of_the_arm_are_compared_with_its_commands(self, wild: ModuleType, tmp_path: Path) -> None:
        robot = wild.WildYam(tmp_path)
        pose = robot.commands[0].copy()
        pose[:3] += [0.01, 0, 0]
        robot.command(pose[None])
        robot.wait_until(1 / robot.control_hz)
        robot.wait_until(2 / robot.control_hz)
        (found, within) = wild.of_arm(robot)
        # at 0.3 m/s from the first period on, and then at rest at once
        assert found["limits"]["acceleration_m_s2"]["periods_over"]["otherwise"] == 1
        assert found["limits"]["acceleration_m_s2"]["largest"] == pytest.approx(9.0, rel=0.02)
        assert not within
        with pytest.raises(JointMotionError):
            robot.command(np.array([[3.0, 0, 0.2, 0, 1, 0, 0, 1]]))
        robot.wait_until(3 / robot.control_hz)
        assert robot.refused == [False, False, False, True]


@pytest.fixture(scope="module")
def latency_benchmark() -> ModuleType:
    return imported("benchmarks/control_loop/control_loop.py")


class TestPeriodsChangedByLimits:
    """benchmarks/control_loop/control_loop.py."""

    @pytest.mark.parametrize(
        ("offset", "turn", "opening", "changed"),
        [
            (0.0, 0.0, 1.0, False),
            (0.9e-3, 0.009, 0.995, False),
            (1.1e-3, 0.0, 1.0, True),
            (0.0, 0.011, 1.0, True),
            (0.0, 0.0, 0.98, True),
        ],
    )
    def test_a_command_beside_its_target_is_changed(
        self, latency_benchmark: ModuleType, offset: float, turn: float, opening: float, changed: bool
    ) -> None:
        turned = Rotation.from_rotvec([0.0, turn, 0.0]) * Rotation.from_quat(DOWN, scalar_first=True)
        other = np.concatenate([START[:3] + [0.0, offset, 0.0], -turned.as_quat(scalar_first=True), [opening]])
        still = np.concatenate([START[:7], [1.3]])  # an opening above 1 is 1
        for target, command in ((np.stack([still, still]), np.stack([START, other])), (still[None], other[None])):
            tick = Tick(0.0, target, command, State.RUNNING, False, 0.0)
            assert latency_benchmark.changed_by_limits(tick) is changed
        assert not latency_benchmark.changed_by_limits(Tick(0.0, None, START[None], State.HOLDING, False, 0.0))

    @pytest.mark.parametrize(("speed_m_s", "changed"), [(0.6, False), (0.02, True)])
    def test_the_record_has_the_share_of_periods_that_limits_changed(
        self, latency_benchmark: ModuleType, speed_m_s: float, changed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It had the share of periods with a person's command, which was always 0."""

        class Cell(PointArm):
            cell = SimpleNamespace(task=SimpleNamespace(time_limit_s=3.0))

            def reset(self, seed: int) -> None: ...

            def outcome(self) -> tuple[bool, str | None]:
                return self.now() >= 2.0, None

        monkeypatch.setitem(latency_benchmark._state, "policy", Clockwork())
        monkeypatch.setitem(latency_benchmark._state, "robot", Cell())
        monkeypatch.setattr(latency_benchmark, "LIMITS", replace(LIMITS, speed_m_s=speed_m_s))
        result = latency_benchmark.episode("CHECKPOINT", {"task": {}, "asynchronous": {}}, "asynchronous_150_ms", 3)
        assert result["ticks"] == 20
        figures = latency_benchmark.summary([result, result | {"ticks": 60, "ticks_changed_by_limits": 0}])
        assert figures["share_changed_by_limits"] == round(result["ticks_changed_by_limits"] / 80, 4)
        assert (figures["share_changed_by_limits"] > 0.1) is changed
        assert (figures["share_changed_by_limits"] == 0) is not changed
