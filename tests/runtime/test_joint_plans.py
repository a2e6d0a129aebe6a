"""Plans with both joints and poses: followed by their joints within all limits, followed by their poses, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

import keygrip.run
from keygrip.config import compose
from keygrip.data.robot.native import read_native
from keygrip.envs.environment import Environment, JointEnvironment
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.expert import expert_actions
from keygrip.envs.yam.handover import HandoverTask, handover_actions
from keygrip.envs.yam.tasks import TaskOptions, sample_layout
from keygrip.envs.yam.two_arms import HandoverCell
from keygrip.inference import driving
from keygrip.models.policy import Needs, Observation, Plan
from keygrip.robots.joint_motion import JointLimits, JointMotion, JointMotionError
from keygrip.robots.kinematics import arm_chain, forward_kinematics
from keygrip.robots.self_collision import link_gaps
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.control_loop import ControlLoop, RunReport, Tick
from keygrip.runtime.dry_run import Rehearsal, rehearse
from keygrip.runtime.i2rt_yam import YamArms
from keygrip.runtime.limits import LimitedMotion, MotionLimits, UnsafePlanError
from keygrip.runtime.plan_terms import as_followed, refuse_idle_follow, waypoints_of
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.robot import JointRobot
from keygrip.runtime.sim_yam import SimulatedYam
from keygrip.runtime.takeover import Correction, CorrectionRecorder
from keygrip.runtime.watchdog import State, Watchdog, WatchdogSettings

HOME = np.array([0.0, 1.05, 1.0, 0.6, 0.0, 0.0])
LIMITS = MotionLimits(workspace_low=(0.05, -0.55, 0.0), workspace_high=(0.7, 0.55, 0.65))
TASK, SEED = TaskOptions(name="pick_place"), 7
EXECUTE_S, STEPS = 0.4, 8
NEEDS = Needs(("right",), plans_joints=True)


def arm(hz: float = 10.0, **options: Any) -> SimulatedYam:
    settings: dict[str, Any] = {"image_size": 32, "joints": JointLimits(), "real_time": False, "seed": SEED}
    return SimulatedYam(TASK, control_hz=hz, **(settings | options))


@lru_cache
def expert_joints(hz: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the scripted expert's actions [N, 8], and the joints [N, 6] that follow them within the limits."""
    layout = sample_layout(TASK, SEED)
    actions = np.asarray(expert_actions(layout, TASK, SEED, hz))
    motion = JointMotion(JointLimits(), layout.start_joints)
    return actions, np.stack([motion.step(action, 1 / hz) for action in actions])


@pytest.fixture(scope="module")
def still() -> Iterator[SimulatedYam]:
    """One arm for tests that hardly move it."""
    robot = arm()
    yield robot
    robot.close()


class Expert:
    """Plans the scripted expert's joints, one step per control period, with poses that are off by a centimetre; counts
    its plans, each of which is followed for `EXECUTE_S`."""

    needs = NEEDS

    def __init__(self, robot: SimulatedYam, edit: Callable[[Plan], Plan] = lambda plan: plan) -> None:
        self.hz, self.edit, self.plans = robot.control_hz, edit, 0
        self.actions, self.joints = expert_joints(robot.control_hz)

    def plan(self, observation: Observation) -> Plan:
        first = self.plans * round(EXECUTE_S * self.hz)
        self.plans += 1
        rows = np.minimum(first + np.arange(STEPS), len(self.joints) - 1)
        position, quaternion = forward_kinematics(self.joints[None, rows])
        opening = self.actions[None, rows, 7]
        aside = position + [0.0, 0.01, 0.0]
        return self.edit(Plan(aside, quaternion, opening, 1 / self.hz, joints=self.joints[None, rows]))


def driven(
    robot: Any, policy: Any, seconds: float = TASK.time_limit_s, latency: float = 0.0, **settings: Any
) -> tuple[RunReport, np.ndarray]:
    """Return the report and the commanded joints [ticks, 6]."""
    sent: list[np.ndarray] = []
    more = {name: settings.pop(name) for name in ("takeover", "recorder", "watchdog") if name in settings}
    limits = settings.pop("limits", LIMITS)
    options = {"execute_seconds": EXECUTE_S, "blend_seconds": 0.0, "still_distance_m": 0.0} | settings
    execution = ChunkExecution(SimulatedPlanner(policy, lambda: latency), robot.control_hz, **options)

    def note(tick: Tick) -> None:
        sent.append(robot.cell.commanded_joints.copy())

    loop = ControlLoop(robot, execution, limits, on_tick=note, **more)
    return loop.run(seconds, over=lambda: any(map(bool, robot.outcome()))), np.stack(sent)


@pytest.mark.slow
def test_the_experts_joints_are_sent_as_they_are_with_and_without_a_server(running: Any) -> None:
    robot = arm()
    expert = Expert(robot)
    report, here = driven(robot, expert)
    assert robot.outcome()[0]
    assert report.state is State.RUNNING
    assert report.events == []
    assert report.summary()["joint_plans"] == report.plans > 10
    np.testing.assert_allclose(here, expert.joints[: len(here)], atol=1e-15)  # while its poses are 1 cm off
    robot.close()

    robot = arm()
    with RemotePolicy(running(Expert(robot), NEEDS).url, 120.0) as policy:
        assert policy.needs == NEEDS
        _, there = driven(robot, policy)
    np.testing.assert_array_equal(there, here)
    robot.close()

    robot = arm()
    report, poses = driven(robot, Expert(robot), follow="poses")
    assert report.joint_plans == 0
    beside = forward_kinematics(poses)[0][:40] - forward_kinematics(here)[0][:40]
    np.testing.assert_allclose(beside, np.tile([0, 0.01, 0], (40, 1)), atol=2e-3)
    robot.close()


def test_cartesian_limits_hold_joints_back_and_they_catch_up() -> None:
    """At 20 Hz the expert accelerates faster than the limits allow: the tool lags behind on the limited path, and
    arrives later."""
    robot = arm(20.0)
    expert = Expert(robot)
    start = np.concatenate([*robot.cell.tool_pose, [robot.cell.gripper_opening]])
    report, sent = driven(robot, expert)
    assert robot.outcome()[0]
    assert report.events == []
    as_planned = np.abs(sent - expert.joints[: len(sent)]).max(axis=1) < 1e-12
    assert 0.5 < as_planned.mean() < 0.9
    motion = LimitedMotion(LIMITS, start)
    targets = forward_kinematics(expert.joints[: len(sent)])
    for row, joints in enumerate(sent):
        limited = motion.step(np.concatenate([targets[0][row], targets[1][row], expert.actions[row, 7:]]), 0.05)
        np.testing.assert_allclose(forward_kinematics(joints)[0], limited[:3], atol=2e-4)
    robot.close()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda plan: replace(plan, joints=plan.joints + [0.3, 0, 0, 0, 0, 0]), "joints put the tool up to"),
        (lambda plan: replace(plan, joints=plan.joints + [0, 0, 0, 0, 0, 0.3]), "cm and 17 degrees beside the plan's"),
        (lambda plan: replace(plan, joints=plan.joints + [0, 0, 0, 0, 0, 9.0]), "joints are up to .* out of their"),
        (lambda plan: replace(plan, joints=np.full_like(plan.joints, np.nan)), "the plan's joints are not finite"),
        (lambda plan: replace(plan, position=plan.position * np.nan), "joints put the tool up to nan cm"),
        (lambda plan: replace(plan, joints=plan.joints[..., :5]), r"1 arms of 6 joints and 8 steps are \(1, 8, 6\)"),
        (lambda plan: replace(plan, joints=plan.joints[:, :5]), r"have the shape \(1, 5, 6\)"),
        (lambda plan: replace(plan, joints=plan.joints[0]), r"have the shape \(8, 6\)"),
    ],
)
def test_joints_that_are_not_those_of_the_poses_are_refused_by_name(edit: Any, said: str, still: SimulatedYam) -> None:
    with pytest.raises(UnsafePlanError, match=said):
        as_followed(Expert(still, edit).plan({}), "auto", still)
    still.reset(SEED)
    before = still.cell.commanded_joints.copy()
    report, sent = driven(still, Expert(still, edit), 0.5)
    assert "unsafe plan" in report.summary()["events"][0]
    np.testing.assert_allclose(sent, np.tile(before, (len(sent), 1)), atol=1e-3)  # the arm was held


def test_joints_a_little_out_of_range_are_moved_to_its_end(still: SimulatedYam) -> None:
    robot = still
    robot.reset(SEED)
    assert isinstance(robot, JointRobot)
    (ranges,) = robot.joint_ranges
    np.testing.assert_allclose(ranges, arm_chain().limits + [0.01, -0.01])
    joints = np.array([0.0, 1.05, 1.0, 0.6, 0.0, ranges[5, 1] + 0.05])[None, None]
    position, quaternion = forward_kinematics(joints)
    plan = as_followed(Plan(position, quaternion, np.ones((1, 1)), 0.1, joints=joints), "auto", robot)
    assert plan.joints is not None
    assert plan.joints[0, 0, 5] == ranges[5, 1]
    np.testing.assert_array_equal(waypoints_of(plan)[0, 0, :7], robot.poses_at(plan.joints)[0, 0])


def test_planned_joints_are_held_to_speed_range_and_free_space() -> None:
    limits = JointLimits()
    motion, ranges = JointMotion(limits, HOME), JointMotion(limits, HOME).ranges

    def step(joints: np.ndarray, seconds: float = 0.1) -> np.ndarray:
        return motion.step(np.concatenate([*forward_kinematics(joints), [1.0]]), seconds, joints)

    wanted = HOME + [0.2, -0.1, 0.05, 0.0, 0.1, -0.2]
    np.testing.assert_array_equal(step(wanted), wanted)  # unchanged
    reached = step(HOME + [0.8, 0, 0, 0, 0, 0])
    assert np.abs(reached - wanted).max() == pytest.approx(0.3)  # 3 rad/s, all joints scaled alike
    np.testing.assert_allclose((reached - wanted) / 0.3, (HOME + [0.8, 0, 0, 0, 0, 0] - wanted) / 0.6, atol=1e-12)
    motion.reset(HOME)
    beyond = np.append(HOME[:5], arm_chain().limits[5, 1])
    for _ in range(20):
        reached = step(beyond)
    assert reached[5] == ranges[5, 1]
    folded = np.array([1.05, 0.99, 0.13, -1.64, 0.98, 1.73])
    before = motion.joints.copy()
    with pytest.raises(JointMotionError, match="would come within"):
        step(folded)
    low = np.array([0.0, 2.9, 0.6, 0.0, 0.0, 0.0])
    with pytest.raises(JointMotionError, match="above the table"):
        step(low)
    for pose, joints in ((np.full(8, np.nan), None), (np.full(8, 0.3), np.full(6, np.inf))):
        with pytest.raises(JointMotionError, match="not finite"):
            motion.step(pose, 0.1, joints)
    np.testing.assert_array_equal(motion.joints, before)


@pytest.mark.parametrize(
    ("follow", "seconds"),
    [("auto", 12), *(pytest.param(each, 30, marks=pytest.mark.slow) for each in ("auto", "poses"))],
)
def test_random_plans_of_joints_never_exceed_a_limit(follow: str, seconds: int) -> None:
    robot, draw = arm(), np.random.default_rng(0)
    robot.outcome = lambda: (False, None)  # type: ignore[method-assign]

    class Wild:
        def plan(self, observation: Observation) -> Plan:
            (ranges,) = robot.joint_ranges
            steps = draw.normal(0, draw.choice([0.02, 0.1, 0.6]), (1, STEPS, 6)).cumsum(axis=1)
            joints = np.clip(observation["joints"] + steps, ranges[:, 0], ranges[:, 1])
            return Plan(*forward_kinematics(joints), draw.uniform(0, 1, (1, STEPS)), 0.3, joints=joints)

    patient = Watchdog(WatchdogSettings(hold_seconds=1e9, most_holds=10**9))
    before = robot.cell.commanded_joints.copy()
    report, sent = driven(
        robot, Wild(), float(seconds), latency=0.15, blend_seconds=0.2, watchdog=patient, follow=follow
    )
    way = np.stack([before, *sent])
    assert len(sent) == 10 * seconds
    assert np.ptp(way, axis=0).max() > seconds / 30  # it did move
    assert report.joint_plans > 0.8 * seconds or follow == "poses"
    assert any("unsafe plan" in event for event in report.summary()["events"])
    assert np.abs(np.diff(way, axis=0)).max() <= 0.3 + 1e-9
    (ranges,) = robot.joint_ranges
    assert (way >= np.minimum(ranges[:, 0], before) - 1e-12).all()
    assert (way <= np.maximum(ranges[:, 1], before) + 1e-12).all()
    tools = forward_kinematics(way)[0]
    low, high = LIMITS.box()
    assert (tools >= low - 1e-3).all()
    assert (tools <= high + 1e-3).all()
    assert np.linalg.norm(np.diff(tools, axis=0), axis=1).max() <= 0.1 * LIMITS.speed_m_s + 1e-3
    assert min(link_gaps(joints).min() for joints in sent) >= 0.005
    robot.close()


# the base rotated by half a turn, the arm bent over backwards: the same pose of the tool
POSTURE = np.array([-0.68, 0.55, 1.41, 0.91, -0.85, -1.88])
OTHER = np.array([2.4616, 1.0218, 1.3599, 1.0326, 0.8501, 1.2649])


def test_another_posture_of_the_same_pose_swings_no_tool() -> None:
    here = np.concatenate([*forward_kinematics(POSTURE), [1.0]])
    motion = JointMotion(JointLimits(), POSTURE)
    other = motion.check(here, OTHER)
    assert np.abs(other - POSTURE).max() > 3
    with pytest.raises(JointMotionError, match=r"of another posture, too far to reach at joints.speed_rad_s=3"):
        motion.step(here, 0.1, other)

    robot = arm()
    robot.cell.commanded_joints = POSTURE.copy()
    robot._motion = JointMotion(JointLimits(), POSTURE)

    class Backwards:
        def plan(self, observation: Observation) -> Plan:
            joints = np.tile(other, (1, STEPS, 1))
            return Plan(*forward_kinematics(joints), np.ones((1, STEPS)), 0.3, joints=joints)

    robot.observe = (
        lambda images=True: {  # type: ignore[method-assign]
            "position": here[:3],
            "quaternion": here[3:7],
            "gripper": np.array(1.0),
            "time_s": robot.now(),
        }
    )
    wide = MotionLimits(workspace_low=(-0.9, -0.9, 0.0), workspace_high=(0.9, 0.9, 1.0))
    report, sent = driven(robot, Backwards(), 8.0, latency=0.2, limits=wide)
    assert report.state is State.STOPPED
    assert "of another posture" in report.summary()["events"][0]
    tools = forward_kinematics(np.stack([POSTURE, *sent]))[0]
    assert np.linalg.norm(np.diff(tools, axis=0), axis=1).max() <= wide.speed_m_s * 0.1 + 1e-3
    robot.close()


def test_takeover_recorder_hold_and_plans_without_joints(tmp_path: Path) -> None:
    """The commanded joints are known whatever moved the arm: nothing jumps when a plan's joints are followed again."""

    class Script:
        def read(self, now: float, command: np.ndarray) -> Correction | None:
            return Correction(np.array([0.0, 0.0, 0.1]), gripper=1.0) if 0.5 <= now < 1.0 else None

        def close(self) -> None: ...

    robot = arm()

    class Poses(Expert):
        """Every third plan has no joints, like a plan whose poses were moved."""

        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            return plan if self.plans % 3 else replace(plan, joints=None)

    with CorrectionRecorder(tmp_path / "demo", "yam", "t", "do it", ["right"], ["front"], 10.0) as recorder:
        report, sent = driven(
            robot, Poses(robot), 4.0, takeover=Script(), recorder=recorder, latency=0.1, blend_seconds=0.3
        )
    assert report.events == []
    assert report.corrected_ticks == 5
    assert 0 < report.joint_plans < report.plans
    assert np.abs(np.diff(sent, axis=0)).max() <= 0.3 + 1e-9
    assert np.linalg.norm(np.diff(forward_kinematics(sent)[0], axis=0), axis=1).max() <= LIMITS.speed_m_s / 10 + 1e-3
    demo = read_native(tmp_path / "demo", "demo")
    commanded = demo.arms["right"].commanded
    assert commanded is not None
    np.testing.assert_allclose(commanded.position, forward_kinematics(sent)[0], atol=5e-4)
    robot.close()


def test_a_fault_holds_an_arm_that_follows_joints() -> None:
    robot = arm()

    class Fails(Expert):
        def plan(self, observation: Observation) -> Plan:
            if self.plans == 4:
                raise ValueError("no plane")
            return super().plan(observation)

    report, sent = driven(robot, Fails(robot))
    assert report.state is State.STOPPED
    assert "no plane" in (report.reason or "")
    assert report.joint_plans == 4
    np.testing.assert_allclose(sent[-1], sent[-10], atol=1e-3)
    robot.close()


class PosesAlone:
    """A robot with only the methods of `Robot`."""

    def __init__(self, robot: SimulatedYam) -> None:
        self.robot, self.cell, self.control_hz = robot, robot.cell, robot.control_hz
        for name in ("now", "wait_until", "observe", "stop", "close", "outcome"):
            setattr(self, name, getattr(robot, name))

    def command(self, poses: np.ndarray) -> None:
        self.robot.command(poses)


def test_plans_of_poses_are_followed_to_the_bit_as_ever() -> None:
    """With a robot that takes joints, with a robot that takes none, and with joints that are ignored."""
    sent = []
    for follow, joints, alone in (("auto", False, False), ("auto", True, True), ("poses", True, False)):
        robot = arm()
        policy = Expert(robot, (lambda plan: plan) if joints else (lambda plan: replace(plan, joints=None)))
        target = PosesAlone(robot) if alone else robot
        assert isinstance(target, JointRobot) is not alone
        report, way = driven(target, policy, 4.0, latency=0.15, blend_seconds=0.2, follow=follow)
        assert report.joint_plans == 0
        sent.append(way)
        robot.close()
    np.testing.assert_array_equal(sent[0], sent[1])
    np.testing.assert_array_equal(sent[0], sent[2])


class Bare(PosesAlone):
    """A robot with only the methods of `JointRobot`."""

    @property
    def joint_ranges(self) -> np.ndarray:
        return self.robot.joint_ranges

    @property
    def commanded_joints(self) -> np.ndarray:
        return self.robot.commanded_joints

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        return self.robot.poses_at(joints)

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        self.robot.command(poses, joints)


def test_a_robot_with_the_methods_alone_follows_joints_and_is_known_to_be_held_back() -> None:
    robot = arm()
    bare, expert = Bare(robot), Expert(robot)
    assert isinstance(bare, JointRobot)
    assert rehearsed(Expert(robot), bare, "joints").refused is None
    report, sent = driven(bare, expert, 2.0, follow="joints")
    assert report.joint_plans == report.plans > 3
    np.testing.assert_allclose(sent, expert.joints[: len(sent)], atol=1e-15)
    robot.close()

    robot = arm(joints=JointLimits(speed_rad_s=1.0))  # the limits let the tool rotate at 3 rad/s
    start = Rotation.from_quat(robot.cell.tool_pose[1], scalar_first=True)
    position = np.tile(robot.cell.tool_pose[0], (1, 9, 1))
    turned = (start * Rotation.from_rotvec([0, 0, 0.8])).as_quat(scalar_first=True)
    plan = Plan(position, np.tile(turned, (1, 9, 1)), np.ones((1, 9)), 0.1)
    ticks: list[Tick] = []

    class Turn:
        def plan(self, observation: Observation) -> Plan:
            return plan

    execution = ChunkExecution(SimulatedPlanner(Turn(), lambda: 0.0), 10.0, still_distance_m=0.0)
    ControlLoop(Bare(robot), execution, LIMITS, on_tick=ticks.append).run(0.3)
    led = Rotation.from_quat(ticks[-1].command[0, 3:7], scalar_first=True)
    seen = Rotation.from_quat(robot.poses_at(robot.commanded_joints)[0, 3:7], scalar_first=True)
    assert 0.1 < (start.inv() * seen).magnitude() < 0.5
    assert (seen.inv() * led).magnitude() < 0.01  # the motion continues from the tool's actual pose
    robot.close()


def test_both_controllers_make_the_same_of_joints(still: SimulatedYam) -> None:
    robot = still
    robot.reset(SEED)
    ours, theirs = Expert(robot), Expert(robot)
    ours.hz = theirs.hz = 10.0 / 3  # steps of 0.3 s
    reference = RecedingHorizon(theirs, 10.0, still_distance_m=0.0)
    execution = ChunkExecution(SimulatedPlanner(ours, lambda: 0.0), 10.0, asynchronous=False, still_distance_m=0.0)
    reference.arms = execution.arms = robot
    observation = robot.observe(images=False)
    start = np.concatenate([observation["position"], observation["quaternion"], [1.0], observation["joints"]])[None]
    command = start
    for tick in range(60):
        command = execution.target(observation, tick / 10, command)
        other = reference.act(observation)
        assert command.shape == (1, 14)
        np.testing.assert_allclose(command, other, atol=1e-9)
        np.testing.assert_allclose(command[:, :7], robot.poses_at(command[:, 8:]), atol=1e-12)
    assert execution.joint_plans == reference.joint_plans == 5


def test_ensembling_averages_joints_planned_for_the_same_moment(still: SimulatedYam) -> None:
    robot = still
    robot.reset(SEED)
    joints = np.stack([np.tile(HOME, (4, 1)), np.tile(HOME + [0.1, 0, 0, 0, 0, 0], (4, 1))])
    plans = iter([*joints, *joints])

    class Two:
        def plan(self, observation: Observation) -> Plan:
            angles = next(plans)[None]
            return Plan(*forward_kinematics(angles), np.ones((1, 4)), 0.3, joints=angles)

    controller = RecedingHorizon(Two(), 10.0, execute_seconds=0.3, still_distance_m=0, ensemble=True)
    controller.arms = robot
    seen = robot.observe(images=False) | {"joints": HOME}
    commands = np.concatenate([controller.act(seen) for _ in range(6)])
    weight = np.exp(-0.5)
    np.testing.assert_allclose(commands[2, 8:], HOME, atol=1e-12)
    np.testing.assert_allclose(commands[5, 8], 0.1 / (1 + weight), atol=1e-12)
    np.testing.assert_allclose(commands[5:, :7], robot.poses_at(commands[5:, 8:]), atol=1e-12)


def test_a_dry_run_shows_the_way_of_the_joints(still: SimulatedYam) -> None:
    robot = still
    robot.reset(SEED)
    found = rehearsed(Expert(robot), robot)
    assert found.refused is None
    assert found.plan.joints is not None
    np.testing.assert_allclose(found.targets[1:, 0, :7], robot.poses_at(found.plan.joints)[0], atol=1e-9)
    wrong = Expert(robot, lambda plan: replace(plan, joints=plan.joints + 0.3))  # type: ignore[operator]
    assert "joints put the tool up to" in (rehearsed(wrong, robot).refused or "")
    assert rehearsed(wrong, robot, "poses").refused is None


@pytest.mark.parametrize("execute_seconds", [0.2, 2.0])
def test_a_dry_run_refuses_no_command_that_a_new_plan_replaces(still: SimulatedYam, execute_seconds: float) -> None:
    """The end of the plan is out of the arm's reach, but no run drives to it."""
    robot = still
    robot.reset(SEED)
    position, quaternion = robot.cell.tool_pose
    out = position * [1, 1, 0] / np.linalg.norm(position[:2])  # straight outwards
    way = position + 0.025 * np.arange(1, 16)[:, None] * out

    class Outwards:
        def plan(self, observation: Observation) -> Plan:
            return Plan(way[None], np.tile(quaternion, (1, 15, 1)), np.ones((1, 15)), 0.1)

    limits = MotionLimits(workspace_low=(-2, -2, 0), workspace_high=(2, 2, 2))
    planner = SimulatedPlanner(Outwards(), lambda: 0.0)
    found = rehearse(Outwards(), robot, limits, ChunkExecution(planner, 10.0, execute_seconds=execute_seconds))
    summary = found.summary()
    now, later = ("refused_later", "refused") if execute_seconds == 0.2 else ("refused", "refused_later")
    assert "the arm cannot reach" in summary[now]
    assert float(summary[now].split()[3]) > 0.5
    assert summary[later] is None
    for asynchronous in (True, False):  # the plan is blended out while the arm moves on
        waiting = ChunkExecution(planner, 10.0, asynchronous, execute_seconds=0.5, blend_seconds=1.5)
        found = rehearse(Outwards(), robot, limits, waiting)
        assert (found.refused is not None) is asynchronous
        assert (found.refused_later is None) is asynchronous


def rehearsed(policy: Any, robot: Any, follow: Any = "auto") -> Rehearsal:
    execution = ChunkExecution(SimulatedPlanner(policy, lambda: 0.0), robot.control_hz, follow=follow)
    return rehearse(policy, robot, LIMITS, execution)


class Driver:
    """Is at the commanded joints."""

    def __init__(self) -> None:
        self.state = np.append(HOME, 1.0)

    def get_joint_pos(self) -> np.ndarray:
        return self.state

    def command_joint_pos(self, joint_pos: np.ndarray) -> None:
        self.state = joint_pos

    def close(self) -> None: ...


def test_real_arms_take_joints_wherever_their_bases_stand(tmp_path: Path) -> None:
    bases = {"left": [[0, -1, 0, 0.1], [1, 0, 0, 0.2], [0, 0, 1, 0], [0, 0, 0, 1]], "right": np.eye(4).tolist()}
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {},
        "arms": {name: {"world_from_base": base} for name, base in bases.items()},
    }
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    drivers = {name: Driver() for name in bases}
    arms = YamArms(drivers, {}, tmp_path / "calibration.yaml", control_hz=10.0)
    assert isinstance(arms, JointRobot)
    wanted = np.stack([HOME + [0.1, 0.1, 0, 0, 0, 0.2], HOME - [0.1, 0, 0.1, 0, 0, 0.1]])
    poses = arms.poses_at(wanted)
    turn = Rotation.from_matrix(np.array(bases["left"])[:3, :3])
    position, quaternion = forward_kinematics(wanted[0])
    np.testing.assert_allclose(poses[0, :3], turn.apply(position) + [0.1, 0.2, 0], atol=1e-12)
    turned = turn * Rotation.from_quat(quaternion, scalar_first=True)
    assert (turned.inv() * Rotation.from_quat(poses[0, 3:], scalar_first=True)).magnitude() < 1e-9
    assert arms.poses_at(np.stack([wanted] * 3, axis=1)).shape == (2, 3, 7)
    arms.command(np.concatenate([poses, [[0.3], [0.4]]], axis=1), wanted)
    for name, joints, opening in zip(bases, wanted, (0.3, 0.4), strict=True):
        np.testing.assert_array_equal(drivers[name].state, np.append(joints, opening))
    np.testing.assert_array_equal(arms.commanded_joints, wanted)
    np.testing.assert_allclose(arms.observe(images=False)["position"], poses[:, :3], atol=1e-9)
    folded = np.stack([wanted[0], [1.05, 0.99, 0.13, -1.64, 0.98, 1.73]])
    with pytest.raises(JointMotionError, match="would come within"):
        arms.command(np.concatenate([arms.poses_at(folded), [[0.3], [0.4]]], axis=1), folded)
    np.testing.assert_array_equal(arms.commanded_joints, wanted)  # all arms or none


@pytest.mark.slow
def test_cells_take_joints_as_they_are() -> None:
    for cell in (YamCell(TASK, 32, render_images=False), HandoverCell(HandoverTask(), 32, render_images=False)):
        assert isinstance(cell, JointEnvironment)
        assert isinstance(cell, Environment)
        cell.reset(seed=3)
        assert cell.layout is not None
        if isinstance(cell, YamCell):
            actions = expert_actions(cell.layout, TASK, 3, 10.0)  # type: ignore[arg-type]
        else:
            actions = handover_actions(cell.layout, 3)  # type: ignore[arg-type]
        joints = []
        for action in actions:
            cell.advance(action)
            joints.append(cell.commanded_joints)
        assert cell.outcome()[0]
        cell.reset(seed=3)
        for action, wanted in zip(actions, joints, strict=True):
            where = np.asarray(cell.poses_at(wanted.reshape(-1, 6))).reshape(*action.shape[:-1], 7)
            cell.advance(np.concatenate([where, action[..., 7:]], axis=-1), wanted)
            np.testing.assert_array_equal(cell.commanded_joints, wanted)
        assert cell.outcome()[0]
        for bad in (np.zeros((3, 6)), np.full(wanted.shape, np.nan)):
            with pytest.raises(ValueError, match="6 finite angles"):
                cell.advance(actions[0], bad)
        cell.close()


def test_what_cannot_be_followed_is_said_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch, still: SimulatedYam
) -> None:
    absolute = Needs(("right",))
    for needs in (NEEDS, absolute, None):
        refuse_idle_follow("auto", "execution.follow", needs, True)
        refuse_idle_follow("auto", "execution.follow", needs, False)
    refuse_idle_follow("joints", "execution.follow", NEEDS, True)
    refuse_idle_follow("poses", "execution.follow", NEEDS, True)
    with pytest.raises(ValueError, match=r"execution.follow=joints cannot be: the policy plans none \(geometry_vla"):
        refuse_idle_follow("joints", "execution.follow", absolute, True)
    with pytest.raises(ValueError, match=r"control.follow=joints cannot be: the arms take no joints; leave it out"):
        refuse_idle_follow("joints", "control.follow", NEEDS, False)
    for needs, takes in ((absolute, True), (NEEDS, False), (None, False)):
        with pytest.raises(ValueError, match="follow=poses has no effect"):
            refuse_idle_follow("poses", "execution.follow", needs, takes)
    for make in (RecedingHorizon, ChunkExecution):
        with pytest.raises(ValueError, match="follow is one of auto, joints, poses, not 'both'"):
            make(None, 10.0, follow="both")  # type: ignore[operator]
    plan = Expert(still).plan({})
    with pytest.raises(UnsafePlanError, match="follow=joints, and the plan holds none"):
        as_followed(replace(plan, joints=None), "joints", still)
    with pytest.raises(UnsafePlanError, match="follow=joints, and the arms take none"):
        as_followed(plan, "joints", None)
    assert as_followed(plan, "auto", None).joints is None

    class Still:
        needs = absolute

        def plan(self, observation: Observation) -> Plan:
            raise AssertionError("nothing is planned")

    monkeypatch.setattr(driving, "_policy", lambda cfg: Still())
    small = ("robot.real_time=false", "robot.image_size=32", "seconds=1.5", "checkpoint=here")
    with pytest.raises(ValueError, match=r"execution.follow=joints cannot be"):
        keygrip.run.run(compose("run", [*small, "execution.follow=joints"]))
