"""Arms behind the control loop: the simulated cell, and i2rt's driver interface with a stand-in and its simulation."""

from __future__ import annotations

import json
import queue
import re
import signal
import sys
import threading
import wave
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from keygrip.data.robot.doctor.examination import yam_model
from keygrip.data.robot.native import read_native
from keygrip.data.video import VideoWriter
from keygrip.envs.yam.expert import expert_actions
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.inference.driving import _recorder
from keygrip.models.policy import Needs, Observation, Plan
from keygrip.robots import joint_motion
from keygrip.robots.inverse_kinematics import Solution, pointing_down, solve
from keygrip.robots.joint_motion import ArmMotions, JointLimits, JointMotion, JointMotionError
from keygrip.robots.kinematics import arm_chain, forward_kinematics, quaternion_from_matrix
from keygrip.robots.self_collision import CAPSULES, MOVING, capsules_at, intrusion, link_frames, link_gaps, link_heights
from keygrip.runtime import cameras
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.cameras import VideoCamera
from keygrip.runtime.control_loop import ControlLoop, Tick
from keygrip.runtime.dry_run import describe_results, draw, dry_run, rehearse
from keygrip.runtime.i2rt_yam import JOINTS, YamArms
from keygrip.runtime.limits import MotionLimits
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.plausibility import Bounds, PlausiblePolicy
from keygrip.runtime.robot import RobotLostError
from keygrip.runtime.sim_yam import SimulatedYam
from keygrip.runtime.watchdog import State, Watchdog, WatchdogSettings
from keygrip.training.signals import Interrupted

HOME = np.array([0.0, 1.05, 1.0, 0.6, 0.0, 0.0])  # the tool at (0.353, 0, 0.523)
LIMITS = MotionLimits(workspace_low=(0.05, -0.55, 0.0), workspace_high=(0.7, 0.55, 0.65))


class Driver:
    """Behaves like i2rt's MotorChainRobot: it clips a command in place, and is then at the commanded joints. Once dead,
    it still reports the last state and accepts commands."""

    def __init__(self, joints: np.ndarray = HOME) -> None:
        self.state = np.append(joints, 1.0)
        self.commands: list[np.ndarray] = []
        self.motor_chain = SimpleNamespace(running=True)
        self.closed = False

    @property
    def dead(self) -> bool:
        return not self.motor_chain.running

    @dead.setter
    def dead(self, dead: bool) -> None:
        self.motor_chain.running = not dead

    def num_dofs(self) -> int:
        return 7

    def get_joint_pos(self) -> np.ndarray:
        return self.state

    def command_joint_pos(self, joint_pos: np.ndarray) -> None:
        limits = arm_chain().limits
        joint_pos[:6] = np.clip(joint_pos[:6], limits[:, 0], limits[:, 1])
        self.state = self.state if self.dead else joint_pos
        self.commands.append(joint_pos.copy())

    def close(self) -> None:
        self.closed = True


class Still:
    """A camera whose image is as old as the test requires."""

    def __init__(self) -> None:
        self.taken: Callable[[], float] = lambda: 0.0

    def read(self) -> tuple[np.ndarray, float]:
        return np.full((48, 64, 3), 90, np.uint8), self.taken()

    def close(self) -> None: ...


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {
            "over": {
                "width": 64,
                "height": 48,
                "intrinsics": {"fx": 60, "fy": 60, "cx": 31.5, "cy": 23.5},
                "world_to_camera": np.eye(4).tolist(),
            }
        },
        "arms": {"right": {"world_from_base": [[0, -1, 0, 0.1], [1, 0, 0, 0.2], [0, 0, 1, 0], [0, 0, 0, 1]]}},
    }
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def to_the_side(observation: Observation) -> Plan:
    position = observation["position"][:, None] + np.linspace(0, 0.08, 9)[1:, None] * np.array([0, 1, 0])
    return Plan(position, np.repeat(observation["quaternion"][:, None], 8, 1), np.full((len(position), 8), 0.1), 0.1)


class Sideways:
    needs = Needs(("right",), ("over",))

    def plan(self, observation: Observation) -> Plan:
        return to_the_side(observation)


def test_the_driver_gets_joints_that_bring_the_tool_where_the_plan_says(calibration: Path) -> None:
    driver, camera = Driver(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration)
    camera.taken = arm.now
    first = arm.observe()
    assert first["image"].shape == (48, 64, 3)
    position, _ = forward_kinematics(HOME)
    # the base is rotated by 90 degrees and stands at (0.1, 0.2)
    np.testing.assert_allclose(first["position"][0], [0.1 - position[1], 0.2 + position[0], position[2]], atol=1e-9)
    target = np.concatenate([first["position"][0] + [0.02, 0.0, 0.01], first["quaternion"][0], [0.3]])
    for _ in range(10):
        arm.command(target[None])
    seen = arm.observe(images=False)
    np.testing.assert_allclose(seen["position"][0], target[:3], atol=2e-3)
    assert seen["gripper"][0] == pytest.approx(0.3)
    assert "image" not in seen
    steps = np.diff(np.stack([HOME, *(command[:6] for command in driver.commands)]), axis=0)
    assert np.abs(steps).max() <= 3.0 / arm.control_hz + 1e-9
    with pytest.raises(JointMotionError, match="cannot reach"):
        arm.command(np.concatenate([[3.0, 0, 0.2], target[3:]])[None])
    arm.stop()
    np.testing.assert_allclose(driver.commands[-1], driver.state)
    with pytest.raises(RobotLostError, match="stopped"):
        arm.command(target[None])
    arm.close()
    assert driver.closed


class Holding(Driver):
    """An object between the fingers keeps them open."""

    object_opening = 0.45

    def get_joint_pos(self) -> np.ndarray:
        state = self.state.copy()
        state[6] = max(state[6], self.object_opening)
        return state


def test_a_stopped_arm_keeps_its_grip(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the measured opening were commanded, the fingers would no longer press, and the object would fall."""
    driver, camera = Holding(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration)
    seen = arm.observe(images=False)
    assert seen["gripper"][0] == 1.0
    for _ in range(3):
        arm.command(np.concatenate([seen["position"][0], seen["quaternion"][0], [0.1]])[None])
    assert arm.observe(images=False)["gripper"][0] == driver.object_opening
    arm.stop()
    np.testing.assert_allclose(driver.commands[-1], np.append(driver.get_joint_pos()[:6], 0.1))

    def lost(joint_pos: np.ndarray) -> None:
        raise OSError("the bus is gone")

    monkeypatch.setattr(driver := Holding(), "command_joint_pos", lost)
    arm = YamArms({"right": driver}, {"over": camera}, calibration)
    with pytest.raises(RobotLostError, match="not taken"):
        arm.command(np.concatenate([seen["position"][0], seen["quaternion"][0], [0.9]])[None])
    monkeypatch.undo()
    driver.state[JOINTS] = 0.2
    arm.stop()
    assert driver.commands[-1][JOINTS] == driver.object_opening  # not 0.9, which the driver never accepted


def test_an_arm_without_a_command_is_held_where_it_may_float(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is passed in may have i2rt's default mode, which only compensates the arm's weight."""
    from i2rt.robots import get_robot

    given, connected = Holding(), Holding()
    YamArms({"right": given}, {"over": Still()}, calibration).stop()
    np.testing.assert_array_equal(given.commands, [given.get_joint_pos()])
    monkeypatch.setattr(get_robot, "get_yam_robot", lambda **options: connected)
    YamArms({"right": "can0"}, {"over": Still()}, calibration).stop()
    assert connected.commands == []  # held since it was connected


def test_an_arm_sees_through_the_corrections_that_it_was_trained_with(
    calibration: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Demonstrations are read with the result of `step=calibrate`; without it the policy would receive other camera
    poses."""
    change = np.eye(4)
    change[:3] = [[0, -1, 0, 0.01], [1, 0, 0, -0.02], [0, 0, 1, 0.03]]
    content = yaml.safe_load(calibration.read_text())
    hand = np.eye(4)
    hand[:3] = [[0, 0, 1, 0.05], [1, 0, 0, 0.0], [0, 1, 0, -0.02]]
    over = content["cameras"]["over"]
    content["cameras"]["hand"] = {name: over[name] for name in ("width", "height", "intrinsics")}
    content["cameras"]["hand"] |= {"mounted_on": "right", "camera_to_gripper": hand.tolist()}
    plain = views_of_still(calibration, content)
    content["corrections"] = {
        "over": {"camera_change": change.tolist(), "focal_factor": 1.1, "lag_frames": 2},
        "hand": {"camera_change": change.tolist()},
    }
    seen = views_of_still(calibration, content)
    assert seen["over"]["intrinsics"].tolist() == (np.array([[66, 0, 32], [0, 66, 24], [0, 0, 1.0]])).tolist()
    assert seen["hand"]["intrinsics"].tolist() == plain["hand"]["intrinsics"].tolist()
    for name in ("over", "hand"):
        np.testing.assert_allclose(seen[name]["world_to_camera"], change @ plain[name]["world_to_camera"], atol=1e-12)
    assert "images are 2 frames late" in caplog.text
    content["corrections"]["side"] = {"lag_frames": 7}
    with pytest.raises(ValueError, match=r"corrections\.side corrects no camera: there is no cameras\.side$"):
        views_of_still(calibration, content)
    for unread in (None, over):
        content["cameras"]["side"] = unread
        assert (
            seen["over"]["intrinsics"].tolist() == views_of_still(calibration, content)["over"]["intrinsics"].tolist()
        )
    assert "7 frames late" not in caplog.text


def views_of_still(calibration: Path, content: dict[str, Any]) -> dict[str, Any]:
    calibration.write_text(yaml.safe_dump(content))
    views: dict[str, Any] = YamArms({"right": Driver()}, {"over": Still(), "hand": Still()}, calibration).observe()
    return dict(views["cameras"])


def as_model(calibration: Path, arm: str, gripper: str) -> Path:
    content = yaml.safe_load(calibration.read_text())
    content["arms"]["right"] |= {"arm": arm, "gripper": gripper}
    calibration.write_text(yaml.safe_dump(content))
    return calibration


@pytest.mark.parametrize(
    ("arm", "gripper", "table"),
    [("yam", "crank_4310", 0.01), ("big_yam", "linear_4310", None), ("yam_pro", "linear_3507", None)],
)
def test_an_arm_whose_links_are_not_known_is_driven_without_their_distances_alone(
    calibration: Path, arm: str, gripper: str, table: float | None
) -> None:
    """The capsules are those of one arm model: links of other models collide where the capsules are free. The gripper
    is not among the links that are kept off the table, so it may be another one."""
    cameras = {"over": Still()}
    file = as_model(calibration, arm, gripper)
    with pytest.raises(ValueError, match=rf"arms\.right is {arm} with {gripper}.*clearance_m=null"):
        YamArms({"right": Driver()}, cameras, file)
    if table is None:
        with pytest.raises(ValueError, match=r"alone\. robot\.joints\.table_clearance_m=null drives .* off the table$"):
            YamArms({"right": Driver()}, cameras, file, JointLimits(clearance_m=None))
    driver = Driver()
    free = JointLimits(clearance_m=None, table_clearance_m=table)
    robot = YamArms({"right": driver}, cameras, file, free, control_hz=5.0)
    seen = robot.observe(images=False)
    target = seen["position"][0] + [0.01, 0.0, 0.02]
    robot.command(np.concatenate([target, seen["quaternion"][0], [0.5]])[None])
    np.testing.assert_allclose(robot.observe(images=False)["position"][0], target, atol=2e-4)
    in_base = forward_kinematics(driver.state[:6], arm, gripper)[0]
    np.testing.assert_allclose([0.1 - in_base[1], 0.2 + in_base[0], in_base[2]], target, atol=2e-4)


def test_corrections_on_an_arm_say_which_arm_and_gripper_it_is(calibration: Path, tmp_path: Path) -> None:
    """Otherwise the doctor would compare their poses with those of the usual gripper."""
    file = as_model(calibration, "yam_pro", "crank_4310")
    free = JointLimits(clearance_m=None, table_clearance_m=None)
    arm = YamArms({"right": Driver()}, {"over": Still()}, file, free)
    with _recorder(tmp_path / "demo", arm) as recorder:
        for moment in (0.0, 0.1):
            seen = arm.observe()
            pose = np.concatenate([seen["position"], seen["quaternion"], seen["gripper"][:, None]], axis=1)
            recorder.add(seen, pose, True, moment)
    assert yam_model(read_native(tmp_path / "demo", "demo"), "right") == ("yam_pro", "crank_4310")


def test_the_driver_is_told_which_arm_and_gripper_it_has(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default i2rt uses the motors, gains and ranges of another arm."""
    from i2rt.robots import get_robot

    told: dict[str, Any] = {}
    monkeypatch.setattr(get_robot, "get_yam_robot", lambda **options: told.update(options) or Driver())
    file = as_model(calibration, "yam_pro", "crank_4310")
    free = JointLimits(clearance_m=None, table_clearance_m=None)
    YamArms({"right": "can3"}, {"over": Still()}, file, free)
    assert (told["channel"], told["arm_type"].value, told["gripper_type"].value) == ("can3", "yam_pro", "crank_4310")


def test_fingers_that_connecting_moves_are_announced_and_known_ends_spare_it(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from i2rt.robots import get_robot

    told: list[Any] = []

    def connected(**options: Any) -> Driver:
        told.append((options["gripper_limits_override"], "fingers are now driven" in caplog.text))
        return Driver()

    monkeypatch.setattr(get_robot, "get_yam_robot", connected)
    YamArms({"right": "can3"}, {"over": Still()}, calibration)
    assert told == [(None, True)]
    assert "can3: the fingers" in caplog.text
    caplog.clear()
    YamArms({"right": "can3"}, {"over": Still()}, calibration, gripper_limits={"right": [0.1, -4.7]})
    YamArms({"right": "can3"}, {"over": Still()}, calibration, sim=True)
    assert told[1][0].tolist() == [0.1, -4.7]
    assert caplog.text == ""
    two = r"right is \[closed, open\], two angles"
    for wrong, said in (
        ({"left": [0, 1]}, "is of no arm"),
        ({"right": [1, 1]}, two),
        ({"right": 0.5}, two),
        ({"right": [None, 1]}, two),
        ({"right": {"closed": 0}}, two),
        ([0, 1], r"is \{ARM: \[closed, open\]\}, got \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=said):
            YamArms({"right": "can3"}, {"over": Still()}, calibration, gripper_limits=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sim=true has none"):
        YamArms({"right": "can3"}, {"over": Still()}, calibration, sim=True, gripper_limits={"right": [0.1, 1]})


def test_a_calibration_of_other_images_or_arms_is_refused_before_an_arm_is_connected(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting a real arm moves its fingers."""
    from i2rt.robots import get_robot

    connected: list[Driver] = []
    monkeypatch.setattr(get_robot, "get_yam_robot", lambda **options: connected.append(Driver()) or connected[-1])
    fitting = calibration.read_text()
    over = yaml.safe_load(fitting)["cameras"]["over"]
    on_another_arm = {name: over[name] for name in ("width", "height", "intrinsics")}
    on_another_arm |= {"mounted_on": "left", "camera_to_gripper": np.eye(4).tolist()}
    for entry, said in (
        ({**over, "rotate": 90}, r"camera 'over' is calibrated at 64 x 48, its frames are 48 x 64"),
        (on_another_arm, r"cameras\.over is mounted on arm left, and robot\.arms names right: correct"),
    ):
        calibration.write_text(yaml.safe_dump({**yaml.safe_load(fitting), "cameras": {"over": entry}}))
        camera = Closing()
        with pytest.raises(ValueError, match=said):
            YamArms({"right": "can3"}, {"over": camera}, calibration)
        assert (connected, camera.closed) == ([], True)

    calibration.write_text(fitting)
    camera = Closing()
    camera.lost = True
    arm = YamArms({"right": "can3"}, {"over": camera}, calibration)
    with pytest.raises(RobotLostError, match="has no image"):
        arm.observe()
    camera.lost = False
    assert arm.observe()["image"].shape == (48, 64, 3)


class Closing(Still):
    """A camera that may have no image, and records that it was closed."""

    lost = closed = False

    def read(self) -> tuple[np.ndarray, float]:
        if self.lost:
            raise RobotLostError("the camera has no image")
        return super().read()

    def close(self) -> None:
        self.closed = True


WIDE = MotionLimits(workspace_low=(-0.5, -0.5, 0.0), workspace_high=(0.7, 1.0, 1.0))


class Turning:
    """Rotates the tool about its own axis at 3 rad/s, too fast for joints of 2 rad/s, then moves it sideways at 0.5
    m/s."""

    needs = Needs(("right",), ("over",))

    def __init__(self, arm: YamArms) -> None:
        seen = arm.observe(images=False)
        self.position, self.turn = seen["position"], Rotation.from_quat(seen["quaternion"][0], scalar_first=True)

    def plan(self, observation: Observation) -> Plan:
        times = observation["time_s"] + 0.1 * np.arange(1, 13)
        aside = 0.5 * np.clip(times - 0.6, 0, 0.3)[:, None] * [1, 0, 0]
        about = np.clip(3.0 * times, 0, 1.8)[:, None] * [0, 0, 1]
        turns = (self.turn * Rotation.from_rotvec(about)).as_quat(scalar_first=True)
        return Plan(self.position[:, None] + aside, turns[None], np.ones((1, 12)), 0.1)


class WildPoses:
    """Poses that the arm reaches by random motions of its joints."""

    needs = Needs(("right",), ("over",))

    def __init__(self, arm: YamArms) -> None:
        self.arm, self.draw = arm, np.random.default_rng(0)

    def plan(self, observation: Observation) -> Plan:
        steps = self.draw.normal(0, self.draw.choice([0.02, 0.1, 0.3]), (1, 8, 6)).cumsum(axis=1)
        (ranges,) = self.arm.joint_ranges
        poses = self.arm.poses_at(np.clip(observation["joints"][:, None] + steps, ranges[:, 0], ranges[:, 1]))
        return Plan(poses[..., :3], poses[..., 3:], self.draw.uniform(0, 1, (1, 8)), 0.3)


@pytest.mark.parametrize(("policy", "seconds"), [(Turning, 3.0), pytest.param(WildPoses, 20.0, marks=pytest.mark.slow)])
def test_poses_that_the_joints_cannot_follow_in_time_never_exceed_a_limit(
    calibration: Path, policy: Any, seconds: float
) -> None:
    """The joint speed used to hold the tool back, and the tool then caught up at any speed."""
    driver, camera = Driver(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration, JointLimits(speed_rad_s=2.0), control_hz=30.0)
    clock = [0.0]
    arm.now = camera.taken = lambda: clock[0]  # type: ignore[method-assign]
    arm.wait_until = lambda moment: clock.__setitem__(0, max(clock[0], moment))  # type: ignore[method-assign]
    plans = policy(arm)
    execution = ChunkExecution(SimulatedPlanner(plans, lambda: 0.1), 30.0, still_distance_m=0.0)
    patient = Watchdog(WatchdogSettings(hold_seconds=1e9, most_holds=10**9))
    ControlLoop(arm, execution, WIDE, patient).run(seconds)
    joints = np.stack([HOME, *(command[:6] for command in driver.commands[:-1])])  # the last one is of `stop`
    assert np.abs(np.diff(joints, axis=0)).max() == pytest.approx(2 / 30)  # the joint speed was limited
    tools = arm.poses_at(joints[None])[0, :, :3]
    speed = 30 * np.linalg.norm(np.diff(tools, axis=0), axis=1)
    assert speed.max() > 0.3
    assert speed.max() <= WIDE.speed_m_s + 0.04  # joint motions curve the path a little
    change = 30 * np.linalg.norm(np.diff(tools, n=2, axis=0), axis=1)
    assert change[np.diff(speed) >= 0].max() <= WIDE.acceleration_m_s2 / 30 + 0.04
    low, high = WIDE.box()
    assert (tools >= low - 2e-3).all()
    assert (tools <= high + 2e-3).all()
    if policy is Turning:
        assert np.diff(speed).min() >= -WIDE.acceleration_m_s2 / 30 - 0.04  # nor does it stop at once on arrival
        np.testing.assert_allclose(tools[-1], plans.position[0] + [0.15, 0, 0], atol=2e-3)
        seen = Rotation.from_quat(arm.poses_at(joints[-1:])[0, 3:], scalar_first=True)
        assert (plans.turn.inv() * seen).magnitude() == pytest.approx(1.8, abs=0.1)  # angle_tolerance_rad


@pytest.mark.parametrize("hz", [5.0, 10.0])
@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0)])
@pytest.mark.parametrize("planned", [False, True])
def test_a_turn_in_place_is_slowed_at_low_rates_and_not_refused(
    hz: float, axis: tuple[int, int, int], planned: bool
) -> None:
    """On the way to the joints of a large rotation the tool leaves its position, by more in a longer period. It used to
    creep by a millimetre per period and was refused in the end as another posture; with planned joints it was refused
    at once."""
    motion = JointMotion(JointLimits(speed_rad_s=2.0), HOME)
    position, quaternion = forward_kinematics(HOME)
    turn = Rotation.from_quat(quaternion, scalar_first=True) * Rotation.from_rotvec(0.7 * np.array(axis))
    pose = np.concatenate([position, turn.as_quat(scalar_first=True), [1.0]])
    slowed, there = 0, motion.check(pose) if planned else None
    for _ in range(round(2 * hz)):
        before = motion.joints
        joints = motion.step(pose, 1 / hz, there)
        slowed += motion.held_back
        assert np.abs(joints - before).max() <= 2.0 / hz + 1e-9
        np.testing.assert_allclose(forward_kinematics(joints)[0], position, atol=3e-3)
    assert slowed > 0
    assert (turn.inv() * Rotation.from_quat(forward_kinematics(joints)[1], scalar_first=True)).magnitude() < 2e-3


def test_a_way_that_the_joints_cannot_begin_is_refused_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer and nearer poses used to be tried, up to a dozen within the period. The last one was the current pose, so
    the arm stood still for ever without an error."""
    limits = JointLimits(speed_rad_s=2.0, clearance_m=None, table_clearance_m=None)
    before = np.array([0.656, 3.256, 0.516, -0.026, 0.0, -0.075])
    pose = np.array([-0.124, -0.0956, -0.1606, 0.0354, 0.1048, -0.8562, 0.5046, 1.0])
    motion, solved = JointMotion(limits, before), []
    monkeypatch.setattr(joint_motion, "solve", lambda *given: solved.append(given[4:]) or solve(*given))
    with pytest.raises(JointMotionError, match=r"cannot begin the way to a pose .* move the tool off its way"):
        motion.step(pose, 1 / 30)
    np.testing.assert_array_equal(motion.joints, before)
    assert solved == [(), *[(20,)] * 4]

    def standing(*given: Any) -> Solution:
        return Solution(before, 1.0, 1.0) if given[4:] else solve(*given)

    monkeypatch.setattr(joint_motion, "solve", standing)
    with pytest.raises(JointMotionError, match=r"cannot begin the way to a pose .* move the tool no nearer"):
        motion.step(pose, 1 / 30)


def two_arms(tmp_path: Path, limits: JointLimits, apart: float = 0.35) -> tuple[YamArms, dict[str, Driver]]:
    """Return two arms side by side with the same orientation."""
    beside = np.eye(4)
    beside[1, 3] = apart
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {},
        "arms": {"right": {"world_from_base": np.eye(4).tolist()}, "left": {"world_from_base": beside.tolist()}},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    drivers = {"right": Driver(), "left": Driver()}
    return YamArms(drivers, {}, tmp_path / "two.yaml", limits), drivers


def led_together(arms: YamArms) -> None:
    """Move both tools towards the middle between them, in steps of 5 mm."""
    poses = np.concatenate([arms.poses_at(arms.commanded_joints), [[1.0], [1.0]]], axis=1)
    for _ in range(34):
        poses[:, 1] += [0.005, -0.005]
        arms.command(poses)


def gap(drivers: dict[str, Driver], command: int) -> float:
    ends, radii = zip(*(capsules_at(driver.commands[command][:6]) for driver in drivers.values()), strict=True)
    across = ends[1] + [0, 0.35, 0]
    shares = np.linspace(0, 1, 21)[:, None]
    first, second = (e[:, None, 0] + shares * (e[:, None, 1] - e[:, None, 0]) for e in (ends[0], across))  # [C, 21, 3]
    distances = np.linalg.norm(first[:, None, :, None] - second[None, :, None], axis=-1).min(axis=(2, 3))
    return float((distances - radii[0][:, None] - radii[1][None]).min())


def test_two_arms_that_are_led_to_one_point_do_not_meet(tmp_path: Path) -> None:
    arms, drivers = two_arms(tmp_path, JointLimits())
    with pytest.raises(
        JointMotionError, match=r"of arm right and \w+ of arm left would come within -?0\.\d cm of each"
    ):
        led_together(arms)
    count = len(drivers["right"].commands)
    assert count == len(drivers["left"].commands) > 5
    assert 0.004 < gap(drivers, -1) < 0.03
    assert gap(drivers, 0) > gap(drivers, -1) + 0.05
    np.testing.assert_array_equal(arms.commanded_joints[0], drivers["right"].commands[-1][:6])  # neither has moved
    np.testing.assert_array_equal(arms.commanded_joints[1], drivers["left"].commands[-1][:6])
    free, drivers = two_arms(tmp_path, JointLimits(arms_clearance_m=None))
    led_together(free)
    assert gap(drivers, -1) < -0.02
    entangled = free.poses_at(free.commanded_joints)
    close, drivers = two_arms(tmp_path, JointLimits())
    for motion, joints in zip(close.joint_motion.motions, free.commanded_joints, strict=True):
        motion.reset(joints)
    entangled[:, 1] += [-0.005, 0.005]
    close.command(np.concatenate([entangled, [[1.0], [1.0]]], axis=1))  # they move apart
    assert gap(drivers, -1) < 0.0


def test_bases_beside_each_other_hide_no_other_links(tmp_path: Path) -> None:
    """Their capsules overlap, so the bases used to be the closest links whatever the arms did."""
    arms, drivers = two_arms(tmp_path, JointLimits(), apart=0.22)
    with pytest.raises(JointMotionError, match=r"gripper of arm right and gripper of arm left would come within -?0"):
        led_together(arms)
    assert len(drivers["right"].commands) > 1


def test_links_in_a_collision_hide_no_others() -> None:
    """Links whose distance did not change, here whatever the wrist did, used to be the only ones checked."""
    free = JointLimits(clearance_m=None, arms_clearance_m=None, table_clearance_m=None)

    def turned(before: np.ndarray, after: np.ndarray, **limits: float) -> None:
        pose = np.concatenate([*forward_kinematics(after), [1.0]])
        JointMotion(free, before).step(pose, 0.1, after)
        JointMotion(replace(free, **limits), before).step(np.concatenate([*forward_kinematics(before), [1.0]]), 0.1)
        JointMotion(replace(free, **limits), before).step(pose, 0.1, after)

    with pytest.raises(JointMotionError, match=r"base and gripper would come within -1\.4 cm of each other"):
        turned(
            np.array([2.71, 2.64, 0.15, 0.83, 0.71, -1.8]),
            np.array([2.71, 2.64, 0.15, 0.57, 0.87, -1.96]),
            clearance_m=0.005,
        )
    low = np.array([0.0, 1.2, 1.0, 0.2, 0.0, 0.0])
    assert MOVING[-1] == "link5"
    table = link_heights(low)[-1] - 0.01
    assert link_heights(low)[0] < table - 0.2
    with pytest.raises(JointMotionError, match=r"link5 would be -\d\.\d cm above the table"):
        turned(low, low - [0, 0, 0, 0.25, 0, 0], table_clearance_m=0.0, table_height_m=table)

    beside = np.eye(4)
    beside[1, 3] = 0.35
    one = np.array([-1.05, 1.2, 1.02, -1.01, 0.93, 1.81])
    other, after = np.array([-1.29, 2.12, 1.54, -0.37, 0.86, 0.25]), np.array([-1.29, 2.12, 1.54, -0.53, 0.81, 0.47])
    limits = replace(free, arms_clearance_m=0.005)
    arms = ArmMotions([JointMotion(limits, joints) for joints in (one, other)], [np.eye(4), beside], ["right", "left"])
    wanted = np.stack([one, after])
    position, quaternion = forward_kinematics(wanted)
    position[1] += beside[:3, 3]
    with pytest.raises(JointMotionError, match=r"base of arm right and gripper of arm left would come within -1\.3 cm"):
        arms.step(np.concatenate([position, quaternion, np.ones((2, 1))], axis=1), 0.1, wanted)
    np.testing.assert_array_equal(arms.joints, [one, other])


class Unclosable(Driver):
    def close(self) -> None:
        super().close()
        raise OSError("the bus is gone")


def test_an_arm_that_is_refused_gives_its_motors_back(calibration: Path, caplog: pytest.LogCaptureFixture) -> None:
    """i2rt's threads keep the process alive: it would hang after its error message, with the motors under torque."""
    content = yaml.safe_load(calibration.read_text())
    content["arms"]["left"] = content["arms"]["right"]
    calibration.write_text(yaml.safe_dump(content))
    wrong_zero, silent = Driver(np.array([0.0, -1.0, 1.0, 0.6, 0.0, 0.0])), Driver()
    silent.dead = True
    for second, said in ((wrong_zero, "set its zero position"), (silent, "arm right: its driver has ended")):
        first = Unclosable()
        with pytest.raises((ValueError, RobotLostError), match=said):
            YamArms({"left": first, "right": second}, {"right": Still()}, renamed(calibration))
        assert first.closed
        assert second.closed
        assert "left could not be closed: OSError: the bus is gone" in caplog.text


def renamed(calibration: Path) -> Path:
    """Rename the camera in the calibration file to the name of an arm; return the file."""
    calibration.write_text(calibration.read_text().replace("over:", "right:", 1))
    return calibration


class Chain:
    """Motors on a bus that are at the commanded positions if a gain is not zero."""

    same_bus_device_driver = None

    def __init__(self) -> None:
        self.running, self.position = True, np.append(HOME, 0.5)

    def __len__(self) -> int:
        return 7

    def read_states(self) -> list[Any]:
        zero = dict.fromkeys(("vel", "eff", "temp_mos", "temp_rotor", "timestamp"), 0.0)
        return [SimpleNamespace(pos=value, **zero) for value in self.position]

    def set_commands(self, torques: np.ndarray, pos: np.ndarray, kp: np.ndarray, **_: Any) -> list[Any]:
        self.position = np.array(pos) if np.any(kp) else self.position
        return self.read_states()

    def close(self) -> None:
        self.running = False


@pytest.mark.parametrize("ends", ["chain", "server"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_driver_of_i2rt_whose_thread_has_ended_is_a_lost_robot(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """It still reports the last joints of the arm, and still accepts commands."""
    from i2rt.robots.motor_chain_robot import MotorChainRobot

    chain = Chain()
    driver = MotorChainRobot(
        chain,
        use_gravity_comp=False,
        joint_limits=arm_chain().limits,
        gripper_index=6,
        gripper_limits=np.array([0.0, 1.0]),
        kp=[10.0] * 7,
        kd=[1.0] * 7,
        zero_gravity_mode=False,
    )
    arm = YamArms({"right": driver}, {"over": Still()}, calibration)
    np.testing.assert_allclose(arm.observe(images=False)["joints"][0], HOME, atol=1e-6)
    if ends == "chain":
        chain.running = False
    else:
        monkeypatch.setattr(driver, "update", lambda: 1 / 0)
        driver._server_thread.join(10)
    np.testing.assert_allclose(driver.get_joint_pos()[:6], HOME, atol=1e-6)
    with pytest.raises(RobotLostError, match="arm right: its driver has ended"):
        arm.observe(images=False)
    arm.close()


def test_a_dead_driver_and_a_frozen_camera_stop_the_arm(calibration: Path) -> None:
    for fault, said in (("driver", "lost the robot"), ("camera", "stale observation")):
        driver, camera = Driver(), Still()
        arm = YamArms({"right": driver}, {"over": camera}, calibration, control_hz=20.0)
        clock = [0.0]
        arm.now = lambda clock=clock: clock[0]  # type: ignore[method-assign, misc]
        arm.wait_until = lambda moment, clock=clock: clock.__setitem__(0, max(clock[0], moment))  # type: ignore

        def taken(arm: YamArms = arm, fault: str = fault) -> float:
            return min(arm.now(), 1.0) if fault == "camera" else arm.now()

        camera.taken = taken

        def plant(driver: Driver = driver, arm: YamArms = arm, fault: str = fault) -> bool:
            driver.dead = fault == "driver" and arm.now() >= 1.0
            return False

        execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), 20.0, execute_seconds=0.3)
        report = ControlLoop(arm, execution, LIMITS).run(20.0, over=plant)
        assert report.state is State.STOPPED
        assert said in (report.reason or "")
        assert driver.commands
    with pytest.raises(RobotLostError, match="6 joints"):
        broken = Driver()
        broken.state = np.zeros(6)
        YamArms({"right": broken}, {}, calibration)
    with pytest.raises(ValueError, match="zero position"):
        YamArms({"right": Driver(np.array([0, -0.5, 0, 0, 0, 0.0]))}, {}, calibration)


@pytest.mark.parametrize("method", ["get_joint_pos", "command_joint_pos"])
def test_a_signal_within_the_driver_is_no_fault_of_the_arm(calibration: Path, method: str) -> None:
    """When it was treated as a lost arm, the signal was forgotten one control period later, and the arm drove on."""
    driver, camera = Driver(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration, control_hz=50.0)
    camera.taken = arm.now
    driver_method = getattr(driver, method)
    calls: list[int] = []

    def stopped(*values: np.ndarray) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted("stopped by SIGTERM", signal.SIGTERM)
        return driver_method(*values)

    setattr(driver, method, stopped)
    execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), 50.0, execute_seconds=0.3)
    with pytest.raises(Interrupted):
        ControlLoop(arm, execution, LIMITS).run(1.0)
    assert arm.stopped


@pytest.mark.parametrize("reported", [None, np.full(JOINTS + 1, np.nan), np.zeros(JOINTS)], ids=["dead", "NaN", "6"])
def test_an_arm_that_moved_while_it_was_lost_is_led_from_where_it_is(
    calibration: Path, reported: np.ndarray | None
) -> None:
    """This also holds where the loop commands the old pose at once: joint steps start from the measured joints."""
    driver, camera = Driver(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration)
    seen = arm.observe(images=False)
    before = np.concatenate([seen["position"][0], seen["quaternion"][0], [1.0]])[None]
    arm.command(before)
    driver.dead = reported is None
    driver.state = driver.state if reported is None else reported
    with pytest.raises(RobotLostError):
        arm.observe(images=False)
    driver.state = np.append(HOME + 0.2, 1.0)
    driver.dead = False
    arm.observe(images=False)
    arm.command(before)
    moved = driver.commands[-1][:6] - (HOME + 0.2)
    assert 0.05 < np.abs(moved).max() <= 3.0 / arm.control_hz + 1e-9


@pytest.mark.parametrize("then", ["old image", "no image", "driver that hangs"])
def test_an_arm_that_moved_while_it_was_lost_is_held_where_it_is_found(calibration: Path, then: str) -> None:
    """While observations were still refused, the arm was driven to the pose from before the loss, and beyond it."""
    driver, camera = Driver(), Closing()
    arm = YamArms({"right": driver}, {"over": camera}, calibration, JointLimits(speed_rad_s=2.0), control_hz=30.0)
    clock = [0.0]
    arm.now = lambda: clock[0]  # type: ignore[method-assign]
    arm.wait_until = lambda moment: clock.__setitem__(0, max(clock[0], moment))  # type: ignore[method-assign]
    camera.taken = lambda: min(arm.now(), 1.0) if then == "old image" and arm.now() < 1.9 else arm.now()
    found, blocked_s = HOME + [0, -0.15, 0, 0, 0, 0], [0.6] if then == "driver that hangs" else []

    def state() -> np.ndarray:
        if arm.now() >= 1.6 and blocked_s:
            clock[0] += blocked_s.pop()
        return driver.state

    def plant() -> bool:
        if not driver.dead and 1.0 <= arm.now() < 1.6:
            driver.dead, driver.state = True, np.append(found, 1.0)
        driver.dead = driver.dead and arm.now() < 1.6
        camera.lost = then == "no image" and 1.0 <= arm.now() < 1.9
        return False

    driver.get_joint_pos = state  # type: ignore[method-assign]
    ticks: list[tuple[float, State, np.ndarray]] = []

    def noted(tick: Tick) -> None:
        ticks.append((tick.time_s, tick.state, driver.commands[-1][:JOINTS]))

    execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), 30.0, execute_seconds=0.3)
    report = ControlLoop(arm, execution, WIDE, on_tick=noted).run(2.6, over=plant)
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING]
    held = np.stack([joints for moment, state, joints in ticks if moment >= 1.6 and state is State.HOLDING])
    assert len(held) >= (1 if then == "driver that hangs" else 8)
    np.testing.assert_allclose(held, np.tile(found, (len(held), 1)), atol=2e-3)
    resumed = np.stack(
        [found, *(joints for moment, state, joints in ticks if moment >= 1.6 and state is State.RUNNING)]
    )
    tools = arm.poses_at(resumed[None])[0, :, :3]
    speed = 30 * np.linalg.norm(np.diff(tools, axis=0), axis=1)
    assert 0.05 < speed.max() <= WIDE.speed_m_s + 0.04  # it follows the policy again, from there


class Quick(Sideways):
    """Moves sideways at 0.4 m/s."""

    def plan(self, observation: Observation) -> Plan:
        plan = super().plan(observation)
        return replace(plan, position=4 * plan.position - 3 * observation["position"][:, None])


def test_an_arm_whose_camera_alone_is_lost_brakes(calibration: Path) -> None:
    """It still answers, so it is not set at rest in the middle of its motion, as an arm that was lost is."""
    driver, camera = Driver(), Closing()
    arm = YamArms({"right": driver}, {"over": camera}, calibration, control_hz=30.0)
    clock = [0.0]
    arm.now = camera.taken = lambda: clock[0]  # type: ignore[method-assign]
    arm.wait_until = lambda moment: clock.__setitem__(0, max(clock[0], moment))  # type: ignore[method-assign]

    def plant() -> bool:
        camera.lost = arm.now() >= 0.5
        return False

    execution = ChunkExecution(SimulatedPlanner(Quick(), lambda: 0.0), 30.0, execute_seconds=0.3)
    report = ControlLoop(arm, execution, WIDE).run(0.9, over=plant)
    assert [event[1:] for event in report.events] == [
        (State.HOLDING, "lost the robot: camera over: the camera has no image")
    ]
    tools = arm.poses_at(np.stack([HOME, *(command[:JOINTS] for command in driver.commands[:-1])])[None])[0, :, :3]
    speed = 30 * np.linalg.norm(np.diff(tools, axis=0), axis=1)
    assert speed[17] > 0.3  # the image was needed in the period after
    assert speed[-1] < 1e-3
    assert np.diff(speed).min() >= -WIDE.axis_acceleration_m_s2 / 30 - 0.02


@pytest.mark.parametrize("fault", ["command", "NaN"])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_other_arm_brakes_within_the_limits_while_one_is_lost(calibration: Path, fault: str, lost: int) -> None:
    """It was sent back to its command of the period before, or set at rest at its observed pose."""
    content = yaml.safe_load(calibration.read_text())
    base = np.array(content["arms"]["right"]["world_from_base"], float)
    base[0, 3] -= 0.5
    content["arms"]["left"] = {"world_from_base": base.tolist()}
    calibration.write_text(yaml.safe_dump(content))

    class Faulty(Driver):
        def faulty(self, kind: str) -> bool:
            return self is drivers[lost] and fault == kind and 0.49 < clock[0] < 0.52  # one period

        def get_joint_pos(self) -> np.ndarray:
            joints = self.commands[-2] if len(self.commands) > 1 else self.state  # it lags behind by a period
            return np.full(JOINTS + 1, np.nan) if self.faulty("NaN") else joints

        def command_joint_pos(self, joint_pos: np.ndarray) -> None:
            if self.faulty("command"):
                raise OSError("the bus is full")
            super().command_joint_pos(joint_pos)

    clock, drivers = [0.0], [Faulty(), Faulty()]
    camera = Still()
    arms = YamArms(dict(zip(("right", "left"), drivers, strict=True)), {"over": camera}, calibration, control_hz=30.0)
    arms.now = camera.taken = lambda: clock[0]  # type: ignore[method-assign]
    arms.wait_until = lambda moment: clock.__setitem__(0, max(clock[0], moment))  # type: ignore[method-assign]
    execution = ChunkExecution(SimulatedPlanner(Quick(), lambda: 0.1 * (clock[0] > 0.4)), 30.0, execute_seconds=0.3)
    limits = replace(WIDE, workspace_high=(0.7, 1.3, 1.0))
    report = ControlLoop(arms, execution, limits).run(0.8)
    assert [state for _, state, _ in report.events] == [State.HOLDING, State.RUNNING]
    assert report.events[0][2].startswith(f"lost the robot: arm {arms.arms[lost]}")
    joints = np.stack([HOME, *(command[:JOINTS] for command in drivers[1 - lost].commands)])
    assert len(drivers[1 - lost].commands) >= report.ticks  # a command in every period
    model = arms.poses_at(np.stack([joints, joints]))[0, :, :3]
    velocity = 30 * np.diff(model, axis=0)
    assert np.linalg.norm(velocity[14]) > 0.2
    change = np.linalg.norm(np.diff(velocity, axis=0), axis=1).max()
    assert change <= WIDE.acceleration_m_s2 / 30 + 0.02


def test_an_arm_that_was_lost_near_the_end_of_a_joint_may_stay_there(calibration: Path) -> None:
    driver = Driver()
    arm = YamArms({"right": driver}, {"over": Still()}, calibration, JointLimits(margin_rad=0.2))
    driver.dead = True
    with pytest.raises(RobotLostError):
        arm.observe(images=False)
    near_the_end = HOME.copy()
    near_the_end[0] = arm_chain().limits[0, 1] - 0.05
    driver.state = np.append(near_the_end, 1.0)
    driver.dead = False
    seen = arm.observe(images=False)
    arm.command(np.concatenate([seen["position"][0], seen["quaternion"][0], [1.0]])[None])
    np.testing.assert_allclose(driver.commands[-1][:6], near_the_end, atol=2e-3)


def test_i2rts_own_simulated_robot_is_driven(calibration: Path, tmp_path: Path) -> None:
    film = VideoWriter(tmp_path / "film.mp4", 64, 48, 10.0)
    for _ in range(5):
        film.write(np.full((48, 64, 3), 120, np.uint8))
    film.close()
    camera = VideoCamera(str(tmp_path / "film.mp4"), format=None)
    arm = YamArms({"right": "can0"}, {"over": camera}, calibration, control_hz=50.0, sim=True)
    start = arm.observe()
    assert abs(int(start["image"].mean()) - 120) < 8
    lifted = start["position"][0] + [0.0, 0.0, 0.02]
    for _ in range(20):
        arm.command(np.concatenate([lifted, start["quaternion"][0], [0.5]])[None])
    np.testing.assert_allclose(arm.observe(images=False)["position"][0], lifted, atol=5e-3)
    arm.stop()
    arm.close()


class Feed:
    """A capture whose frames arrive when `give` is called."""

    def __init__(self, first: np.ndarray) -> None:
        self._frames: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._frames.put(first)
        self._asked = threading.Semaphore(0)

    @contextmanager
    def opened(self, *asked: object) -> Iterator[Iterator[tuple[np.ndarray, None]]]:
        def arriving() -> Iterator[tuple[np.ndarray, None]]:
            while (frame := self._frames.get()) is not None:
                yield frame, None
                self._asked.release()  # the camera has this frame and asks for the next one

        yield arriving()

    def taken(self) -> None:
        """Wait until the camera has the given frame."""
        self._asked.acquire()

    def give(self, frame: np.ndarray | None) -> None:
        self._frames.put(frame)
        if frame is not None:
            self.taken()


@pytest.mark.parametrize("repeats_are_new", [False, True])
def test_a_camera_that_repeats_its_image_grows_old(
    repeats_are_new: bool, calibration: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bridges of streams do this when they stall. One level of one pixel makes an image a new one."""
    image = np.full((48, 64, 3), 90, np.uint8)
    other = image.copy()
    other[47, 63, 2] += 1
    feed, now = Feed(image), [10.0]
    monkeypatch.setattr(cameras, "live_frames", feed.opened)
    camera = VideoCamera("/dev/video0", repeats_are_new=repeats_are_new, clock=lambda: now[0])
    feed.taken()
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    for seconds, frame, stands_for in ((10.1, other, 10.1), (10.5, other.copy(), 10.1), (10.9, other.copy(), 10.1)):
        now[0] = seconds
        feed.give(frame)
        assert camera.read()[1] == (seconds if repeats_are_new else stands_for)
    assert arm.observe()["time_s"] == (10.9 if repeats_are_new else 10.1)  # the watchdog compares it with its clock
    told = [record.getMessage() for record in caplog.records if "has repeated its image" in record.getMessage()]
    assert len(told) == (0 if repeats_are_new else 1)
    now[0] = 11.0
    feed.give(image)
    assert camera.read()[1] == 11.0
    feed.give(None)
    camera.close()


@pytest.mark.parametrize(("file", "waits"), [(True, [0.1, 0.2]), (False, [])])
def test_a_film_is_played_at_its_own_rate(
    file: bool, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It used to be read as fast as it was decoded, and was then an old image."""
    waited: list[float] = []

    class Pausing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread() is threading.main_thread():
                return super().wait(timeout)
            waited.append(timeout or 0.0)
            return False

    @contextmanager
    def film(*asked: object) -> Iterator[Iterable[tuple[np.ndarray, float]]]:
        yield [(np.full((48, 64, 3), level, np.uint8), 5.0 + level / 10) for level in range(3)]

    source = tmp_path / "film.mp4"
    if file:
        source.touch()
    monkeypatch.setattr(cameras, "live_frames", film)
    monkeypatch.setattr(cameras, "threading", SimpleNamespace(Event=Pausing, Thread=threading.Thread))
    camera = VideoCamera(str(source), format=None, clock=lambda: 10.0)
    camera._thread.join(10)
    assert [wait for wait in waited if wait] == pytest.approx(waits)
    assert camera.read()[0].max() == 2
    assert "film.mp4 gives no more images: it has ended" in caplog.text
    camera.close()


@pytest.mark.parametrize("size", [{"width": 1280}, {"height": 720}])
def test_one_edge_of_a_camera_image_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^the camera /dev/video9: width=.* and height=.*: give both"):
        VideoCamera("/dev/video9", **size)


def test_a_source_without_an_image_is_a_lost_camera_with_its_reason(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(RobotLostError, match=r"sound\.wav gave no image: .*sound\.wav: "):
        VideoCamera(str(tmp_path / "sound.wav"), format=None)


def test_capsules_hold_every_vertex_of_the_meshes() -> None:
    mujoco = pytest.importorskip("mujoco")
    from keygrip.robots.kinematics import arm_file

    model = mujoco.MjModel.from_xml_path(str(arm_file()))
    joints = np.array([0.4, 1.2, 0.9, -0.3, 0.5, 0.2])
    data = mujoco.MjData(model)
    data.qpos[:6] = joints
    mujoco.mj_forward(model, data)
    origins, rotations = link_frames(joints)
    ends, radii = capsules_at(joints)
    for link, body in enumerate(("base", "link1", "link2", "link3", "link4", "link5")):
        index = model.body(body).id
        np.testing.assert_allclose(origins[link], data.xpos[index], atol=1e-6)
        np.testing.assert_allclose(rotations[link], data.xmat[index].reshape(3, 3), atol=1e-4)
        geom = next(g for g in range(model.ngeom) if model.geom_bodyid[g] == index)
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        world = vertices @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        own = [number for number, (owner, *_) in enumerate(CAPSULES) if owner == link]
        gaps = []
        for number in own:
            start, along = ends[number, 0], ends[number, 1] - ends[number, 0]
            share = np.clip((world - start) @ along / (along @ along), 0, 1)
            gaps.append(np.linalg.norm(world - start - share[:, None] * along, axis=1) - radii[number])
        assert np.min(gaps, axis=0).max() < 1.5e-3


def test_an_arm_at_rest_whose_links_overlap_may_turn_its_base() -> None:
    """The gaps stay the same, except for rounding."""
    rest = np.zeros(6)
    before = link_gaps(rest)
    assert before.min() < -0.01
    for turn in np.linspace(-1.0, 1.0, 41):
        assert intrusion(link_gaps(rest + [turn, 0, 0, 0, 0, 0]), before, 0.01) is None


@pytest.mark.parametrize("end", [0, 1])
def test_a_pose_that_the_margin_of_a_joint_keeps_the_tool_from_is_refused(end: int) -> None:
    at_the_end = HOME.copy()
    at_the_end[0] = arm_chain().limits[0, end]
    before = at_the_end + [0.25 * (-1) ** end, 0, 0, 0, 0, 0]
    pose = np.concatenate([*forward_kinematics(at_the_end), [1.0]])
    motion = JointMotion(JointLimits(margin_rad=0.2), before)
    with pytest.raises(
        JointMotionError, match=r"cannot reach .* with its joints joints\.margin_rad=0\.2 from the ends"
    ):
        motion.step(pose, 0.1)
    np.testing.assert_array_equal(motion.joints, before)
    motion = JointMotion(JointLimits(margin_rad=0.02), before)
    position, _ = forward_kinematics(motion.step(pose, 0.1))
    assert 0.005 < np.linalg.norm(position - pose[:3]) < 0.01  # within the tolerance
    staying = JointMotion(JointLimits(margin_rad=0.2), at_the_end)
    np.testing.assert_allclose(staying.step(pose, 0.1), at_the_end, atol=1e-6)


def test_collisions_are_refused_and_demonstrated_motions_are_not() -> None:
    folded = np.array([1.05, 0.99, 0.13, -1.64, 0.98, 1.73])
    assert link_gaps(folded).min() < -0.05
    motion = JointMotion(JointLimits(), HOME)
    position, quaternion = forward_kinematics(folded)
    with pytest.raises(JointMotionError, match="would come within"):
        for _ in range(100):
            motion.step(np.concatenate([position, quaternion, [1.0]]), 0.1)
    assert link_gaps(motion.joints).min() >= 0.005
    task = TaskOptions(name="pick_place")
    robot = SimulatedYam(task, image_size=32, joints=JointLimits(), real_time=False, seed=3)
    assert robot.cell.layout is not None
    for action in expert_actions(robot.cell.layout, task, 3, 10.0):
        robot.command(action[None])
        assert link_gaps(robot.cell.commanded_joints).min() > 0.02
        assert link_heights(robot.cell.commanded_joints).min() > 0.02
    success, _ = robot.outcome()
    assert success
    robot.close()


def test_a_dry_run_moves_nothing_and_says_what_would_happen(tmp_path: Path, calibration: Path) -> None:
    driver, camera = Driver(), Still()
    arm = YamArms({"right": driver}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), arm.control_hz)
    result = dry_run(Sideways(), arm, WIDE, tmp_path / "plan.png", execution)
    assert driver.commands == []
    assert result["refused"] is None
    assert 0 < result["fastest_m_s"] <= LIMITS.speed_m_s + 1e-9
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    refused = dry_run(Sideways(), arm, LIMITS, tmp_path / "refused.png", execution)
    assert "outside the workspace" in refused["refused"]
    json.dumps(result)


@pytest.mark.parametrize(("planned", "commanded"), [(0.45, 1.0), (0.35, 0.0), (0.7, 1.0)])
def test_a_dry_run_shows_the_gripper_commands_of_a_run(planned: float, commanded: float, calibration: Path) -> None:
    """It showed the planned openings, so that a policy that never closes the gripper seemed to grip."""

    class Half(Sideways):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            return replace(plan, gripper=np.full_like(plan.gripper, planned))

    for dead_band, last in (({}, commanded), ({"grip_below": None, "release_above": None}, planned)):
        camera = Still()
        arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
        camera.taken = arm.now
        execution = ChunkExecution(SimulatedPlanner(Half(), lambda: 0.0), arm.control_hz, **dead_band)
        found = rehearse(Half(), arm, WIDE, execution)
        assert found.commands[0, 0, 7] == found.targets[0, 0, 7] == 1.0  # as observed
        assert found.commands[-1, 0, 7] == pytest.approx(last)
        assert found.targets[-1, 0, 7] == last
        if dead_band:
            continue
        observation = arm.observe()
        run_targets = [execution.target(observation | {"time_s": 0.0}, tick / 30.0)[0, 7] for tick in range(20)]
        np.testing.assert_array_equal(found.targets[1:21, 0, 7], run_targets)


def test_the_simulated_arm_moves_no_camera_that_is_not_seen() -> None:
    with pytest.raises(ValueError, match="camera_azimuth_deg: this moves camera 'over', and only front is used"):
        SimulatedYam(TaskOptions(name="reach", camera_azimuth_deg=20), image_size=16, cameras=["front"])


def test_the_result_of_a_simulated_task_is_that_before_the_arm_brakes() -> None:
    robot = SimulatedYam(TaskOptions(name="reach"), image_size=16, real_time=False, seed=3)
    assert robot.outcome() == (False, None)
    for success in (True, False):
        robot.cell.progress.success = success
        assert robot.outcome() == (True, None)
    robot.reset(3)
    robot.cell.elapsed = 1000
    assert robot.outcome() == (False, "missed")
    robot.cell.progress.success = True
    assert robot.outcome() == (False, "missed")
    robot.close()


def test_a_dry_run_reports_plans_and_starts_far_from_the_training_data(tmp_path: Path, calibration: Path) -> None:
    class Boxed(Sideways):
        workspace = np.array([[5.0, 5.0, 5.0], [6.0, 6.0, 6.0]])

    camera = Still()
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Boxed(), lambda: 0.0), arm.control_hz)
    for bounds, said in (
        (Bounds(image_levels=0), r"bounds\.start_m"),
        (Bounds(image_levels=0, start_m=100.0), r"bounds\.plan_m"),
    ):
        policy = PlausiblePolicy(Boxed(), bounds)
        result = dry_run(policy, arm, WIDE, tmp_path / "plan.png", execution)
        assert re.search(said, result["refused"])
        (tmp_path / "plan.png").unlink()


def test_the_figure_of_a_dry_run_names_the_arms_and_the_limits(calibration: Path) -> None:
    camera = Still()
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), arm.control_hz)
    found = rehearse(Sideways(), arm, LIMITS, execution)
    figure = draw(found, LIMITS)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    assert {"x, right", "z, right", "right", "limit"} <= set(legends)
    (said,) = texts
    low, high = LIMITS.box()
    for line in (
        "arm: right",
        f"m/s (limit {LIMITS.speed_m_s:g})",
        f"cm (limit {100 * LIMITS.lag_m:g})",
        f"x {low[0]:g} to {high[0]:g}",
    ):
        assert line in said
    assert "outside the workspace" in " ".join(said.split())
    assert not any(name in said for name in found.summary() if "_" in name)  # keys of the figures in JSON
    assert "limit" not in "\n".join(describe_results(found, None)).replace("limits: none", "")


class Recorded:
    """Stands for the package rerun, with the part of its interface that a dry run uses; other arguments are errors.

    `logged`: path, kind and values of each entity, and its time: timeline and value, None if it is static.
    """

    def __init__(self) -> None:
        logged: list[tuple[str, str, dict[str, Any], tuple[str, float] | None]] = []

        class RecordingStream:
            def __init__(self, application_id: str) -> None:
                self.time: dict[str, float] = {}

            def save(self, path: Path) -> None:
                path.write_bytes(b"RRF2")

            def set_time(self, timeline: str, *, sequence: int | None = None, duration: float | None = None) -> None:
                assert (sequence is None) != (duration is None)
                self.time[timeline] = float(duration if sequence is None else sequence)  # type: ignore[arg-type]

            def reset_time(self) -> None:
                self.time.clear()

            def log(self, entity_path: str, entity: tuple[str, dict[str, Any]], *, static: bool = False) -> None:
                times = [*self.time.items()]
                assert static or len(times) == 1, "logged without a time, or on two timelines"
                logged.append((entity_path, *entity, None if static else times[0]))

            def flush(self) -> None: ...

            def disconnect(self) -> None: ...

        self.RecordingStream, self.logged = RecordingStream, logged

    def Image(self, image: np.ndarray) -> tuple[str, dict[str, Any]]:
        return "image", {"image": image}

    def LineStrips3D(self, strips: list[np.ndarray]) -> tuple[str, dict[str, Any]]:
        return "strips", {"strips": strips}

    def Points3D(self, positions: list[np.ndarray], *, radii: list[float]) -> tuple[str, dict[str, Any]]:
        return "points", {"positions": positions, "radii": radii}

    def Boxes3D(self, *, centers: list[np.ndarray], half_sizes: list[np.ndarray]) -> tuple[str, dict[str, Any]]:
        return "boxes", {"centers": centers, "half_sizes": half_sizes}

    def Scalars(self, scalars: float) -> tuple[str, dict[str, Any]]:
        assert type(scalars) is float
        return "scalars", {"scalars": scalars}

    def TextDocument(self, text: str) -> tuple[str, dict[str, Any]]:
        return "text", {"text": text}

    def static(self, path: str) -> list[dict[str, Any]]:
        """Return what was logged at a path without a time."""
        return [values for at, _, values, time in self.logged if at == path and time is None]

    def series(self, path: str) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the timeline, times and values of a path's numbers."""
        rows = [(*time, values["scalars"]) for at, _, values, time in self.logged if at == path and time is not None]
        (timeline,) = {row[0] for row in rows}
        return timeline, np.array([row[1] for row in rows]), np.array([row[2] for row in rows])


def test_a_rerun_recording_of_a_dry_run_has_plan_limits_and_times(
    tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no limit, no speed and no series of planning times."""

    class Fast(Sideways):
        """1 m/s."""

        def plan(self, observation: Observation) -> Plan:
            return replace(super().plan(observation), step_seconds=0.01)

    camera, file = Still(), tmp_path / "plan.rrd"
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Fast(), lambda: 0.0), arm.control_hz)
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "rerun", recorded)
    assert dry_run(Fast(), arm, WIDE, file, execution)["dry_run"] == str(file)
    assert [path.name for path in tmp_path.glob("plan*")] == ["plan.rrd"]
    found = rehearse(Fast(), arm, WIDE, execution)
    times, commands = found.times, found.commands[:, 0]

    timeline, numbers, planning = recorded.series("planning_ms")
    assert timeline == "plan_number"
    np.testing.assert_array_equal(numbers, [1, 2, 3, 4, 5])
    summary = json.loads(recorded.static("summary")[0]["text"])
    assert round(float(planning.max()), 1) == summary["plan_ms_max"]

    for path, poses in (("limited", commands), ("plan", found.targets[:, 0])):
        timeline, moments, speeds = recorded.series(f"speed_m_s/{path}/right")
        assert timeline == "plan"
        np.testing.assert_allclose(moments, times[1:])
        np.testing.assert_allclose(speeds, np.linalg.norm(np.diff(poses[:, :3], axis=0), axis=1) * arm.control_hz)
        np.testing.assert_allclose(recorded.static(f"right/{path}")[0]["strips"][0], poses[:, :3])
    assert speeds.max() > WIDE.speed_m_s  # of the plan: the limits have something to do
    _, moments, behind = recorded.series("behind_m/right")
    np.testing.assert_allclose(moments, times)
    assert behind.max() == pytest.approx(summary["furthest_behind_cm"] / 100, abs=1e-4)
    for path, limit in (("speed_m_s/limit", WIDE.speed_m_s), ("behind_m/limit", WIDE.lag_m)):
        _, moments, values = recorded.series(path)
        np.testing.assert_allclose(moments, times)
        assert set(values) == {limit}
    np.testing.assert_allclose(recorded.series("right/gripper")[2], commands[:, 7])

    (box,) = recorded.static("limits/workspace")
    np.testing.assert_allclose(box["centers"][0] - box["half_sizes"][0], WIDE.box()[0])
    np.testing.assert_allclose(box["centers"][0] + box["half_sizes"][0], WIDE.box()[1])
    (table,) = recorded.static("limits/table")[0]["strips"]
    assert (table[:, 2] == WIDE.table_height_m).all()
    assert (table[:, :2].min(axis=0) < commands[:, :2].min(axis=0)).all()
    assert (table[:, :2].max(axis=0) > commands[:, :2].max(axis=0)).all()
    assert f"(limit {WIDE.speed_m_s:g})" in recorded.static("results")[0]["text"]
    assert recorded.static("camera")[0]["image"].shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        (None, set()),
        (MotionLimits(table_height_m=None), {"speed_m_s/limit", "behind_m/limit"}),
        (MotionLimits(), {"speed_m_s/limit", "behind_m/limit", "limits/table"}),  # its box is open at five sides
    ],
)
def test_a_rerun_recording_has_only_the_limits_that_exist(
    limits: MotionLimits | None, shown: set[str], tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera, recorded = Still(), Recorded()
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Sideways(), lambda: 0.0), arm.control_hz)
    monkeypatch.setitem(sys.modules, "rerun", recorded)
    dry_run(Sideways(), arm, limits, tmp_path / "plan.rrd", execution)
    assert {
        path for path, *_ in recorded.logged if "limit" in path.split("/", 1)[0] or path.endswith("/limit")
    } == shown
    assert "speed_m_s/limited/right" in {path for path, *_ in recorded.logged}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: replace(plan, step_seconds=0.01), None),  # shorter than a control period
        (lambda plan: replace(plan, position=plan.position * np.nan), "position is not finite"),
        (lambda plan: replace(plan, quaternion=plan.quaternion * 0), "norm 0, not 1"),
        (lambda plan: replace(plan, step_seconds=0.0), "step_seconds is 0.0"),
        (lambda plan: replace(plan, gripper=plan.gripper.repeat(2, axis=0)), "for 2 arms, the robot has 1"),
    ],
)
def test_a_dry_run_says_of_any_plan_whether_it_would_be_followed(
    change: Callable[[Plan], Plan], said: str | None, tmp_path: Path, calibration: Path
) -> None:
    class Changed(Sideways):
        def plan(self, observation: Observation) -> Plan:
            plan = super().plan(observation)
            return change(Plan(plan.position[:, :1], plan.quaternion[:, :1], plan.gripper[:, :1], plan.step_seconds))

    camera = Still()
    arm = YamArms({"right": Driver()}, {"over": camera}, calibration)
    camera.taken = arm.now
    execution = ChunkExecution(SimulatedPlanner(Changed(), lambda: 0.0), arm.control_hz)
    result = dry_run(Changed(), arm, WIDE, tmp_path / "plan.png", execution)
    if said is None:
        assert result["refused"] is None
        assert 0 < result["fastest_m_s"] <= LIMITS.speed_m_s + 1e-9
    else:
        assert said in result["refused"]
        assert result["fastest_m_s"] == 0
    json.dumps(result, allow_nan=False)


def test_the_expert_as_a_policy_succeeds_under_latency() -> None:
    """The whole chain: time stamps, blending, limits, joints, physics."""
    task = TaskOptions(name="pick_place")
    robot = SimulatedYam(task, image_size=32, joints=JointLimits(), real_time=False, seed=7)
    assert robot.cell.layout is not None
    actions = expert_actions(robot.cell.layout, task, 7, 10.0)

    class Expert:
        def plan(self, observation: Observation) -> Plan:
            first = round(observation["time_s"] * 10)
            rows = np.minimum(first + 3 * np.arange(1, 9) - 1, len(actions) - 1)
            chosen = np.stack([actions[row] for row in rows])[None]
            return Plan(chosen[..., :3], chosen[..., 3:7], chosen[..., 7], 0.3)

    draw = np.random.default_rng(0)
    planner = SimulatedPlanner(Expert(), lambda: float(draw.uniform(0.1, 0.2)))
    loop = ControlLoop(robot, ChunkExecution(planner, 10.0), LIMITS)
    report: Any = loop.run(task.time_limit_s, over=lambda: any(map(bool, robot.outcome())))
    assert robot.outcome()[0]
    assert report.state is State.RUNNING
    assert report.events == []
    robot.close()


def test_pointing_down_is_reachable_in_the_middle_of_the_table() -> None:
    motion = JointMotion(JointLimits(), HOME)
    quaternion = quaternion_from_matrix(pointing_down(0.0))
    assert motion.check(np.concatenate([[0.3, 0.0, 0.1], quaternion, [1.0]])).shape == (6,)
