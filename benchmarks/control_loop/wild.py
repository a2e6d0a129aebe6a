"""Random plans for 10 000 control periods: the largest of everything that is limited, against its limit.

    python benchmarks/control_loop/wild.py > benchmarks/control_loop_wild.json
    python benchmarks/control_loop/wild.py --arm > benchmarks/control_loop_wild_arm.json

The first is a tool without joints, the second `YamArms` with a driver whose arm is where it was told to be; both have a
simulated clock. Prints one JSON record. Exit code 1 where a limit was exceeded; of an arm, where one was although no
command was refused, held back by the speed of the joints, or reached only within the tolerances of inverse kinematics.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Observation, Plan
from keygrip.robots.joint_motion import CURVED_M, JointLimits, JointMotionError
from keygrip.robots.kinematics import arm_chain
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.control_loop import ControlLoop
from keygrip.runtime.i2rt_yam import JOINTS, YamArms
from keygrip.runtime.limits import MotionLimits
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.watchdog import Watchdog, WatchdogSettings

LIMITS = MotionLimits(workspace_low=(0.05, -0.55, 0.0), workspace_high=(0.7, 0.55, 0.65))
JOINT_LIMITS = JointLimits()
ROTATION_RAD = 1e-3  # largest error of a rotation with which inverse kinematics ends early
START = np.array([0.3, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 1.0])


HOME = np.array([0.0, 1.05, 1.0, 0.6, 0.0, 0.0])  # rad; the tool at (0.353, 0, 0.523)


class PointArm:
    """A tool without joints that is where it was told to be, on a simulated clock."""

    control_hz = 10.0

    def __init__(self) -> None:
        self.poses, self.ticks, self.sent = START[None], 0, [START]

    def now(self) -> float:
        return self.ticks / self.control_hz

    def wait_until(self, moment: float) -> None:
        self.ticks = max(self.ticks, round(moment * self.control_hz))

    def observe(self, images: bool = True) -> dict[str, Any]:
        seen = {"position": self.poses[:, :3], "quaternion": self.poses[:, 3:7], "gripper": self.poses[:, 7]}
        return {**seen, "time_s": self.now()}

    def command(self, poses: np.ndarray) -> None:
        self.poses = poses.copy()
        self.sent.append(poses[0].copy())

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Wild:
    """Plans around the arm, a few centimetres to a few metres wide; one of twenty is not finite."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def plan(self, observation: Observation) -> Plan:
        spread = self.draw.choice([0.02, 0.05, 0.3, 3.0])
        position = observation["position"][:, None] + self.draw.normal(0, spread, (1, 8, 3))
        if self.draw.random() < 0.05:
            position = np.full_like(position, np.nan)
        turns = Rotation.random(8, rng=self.draw).as_quat(scalar_first=True)[None]
        return Plan(position, turns, self.draw.uniform(-0.3, 1.3, (1, 8)), 0.3)


class StandInDriver:
    """i2rt's robot as far as it is used: it clips a command to the joints' ranges, and is then where it was told to
    be."""

    def __init__(self) -> None:
        self.state = np.append(HOME, 1.0)

    def get_joint_pos(self) -> np.ndarray:
        return self.state

    def command_joint_pos(self, joint_pos: np.ndarray) -> None:
        ranges = arm_chain().limits
        self.state = np.append(np.clip(joint_pos[:JOINTS], ranges[:, 0], ranges[:, 1]), joint_pos[JOINTS])

    def close(self) -> None: ...


class BlankCamera:
    """A camera with a uniform image, taken when it is read."""

    def __init__(self) -> None:
        self.robot: WildYam | None = None

    def read(self) -> tuple[np.ndarray, float]:
        return np.full((48, 64, 3), 90, np.uint8), 0.0 if self.robot is None else self.robot.now()

    def close(self) -> None: ...


class WildYam(YamArms):
    """A YAM arm with the stand-in driver on a simulated clock, which keeps the state at the end of every period.

    Attributes:
        states: [7] joints in rad and opening, each. commands: [8] the last command that was taken, each. held_back:
            whether the joint speed shortened it, each. refused: whether a command was refused, each.
    """

    def __init__(self, folder: Path) -> None:
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
            "arms": {"right": {"world_from_base": np.eye(4).tolist()}},
        }
        file = folder / "calibration.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        self.driver, self.ticks, self._refused = StandInDriver(), 0, False
        self.states, self.held_back, self.refused = [self.driver.state], [False], [False]
        self.commands: list[np.ndarray] = []
        camera = BlankCamera()
        super().__init__({"right": self.driver}, {"over": camera}, file, JOINT_LIMITS)
        camera.robot = self
        self._command = np.append(self.poses_at(self.commanded_joints)[0], 1.0)
        self.commands.append(self._command)

    def now(self) -> float:
        return self.ticks / self.control_hz

    def wait_until(self, moment: float) -> None:
        while self.ticks < round(moment * self.control_hz):
            self.ticks += 1
            self.states.append(self.driver.state.copy())
            self.held_back.append(bool(self.joint_motion.held_back[0]))
            self.refused.append(self._refused)
            self.commands.append(self._command)
            self._refused = False

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        try:
            super().command(poses, joints)
        except JointMotionError:
            self._refused = True
            raise
        self._command = np.array(poses[0], float)


class WildPoses(Wild):
    """As `Wild`, and in half of the plans poses that the arm reaches by random motions of its joints: it cannot reach
    most poses of the others, which are refused."""

    def __init__(self, robot: WildYam) -> None:
        super().__init__()
        self.robot = robot

    def plan(self, observation: Observation) -> Plan:
        if self.draw.random() < 0.5:
            return super().plan(observation)
        steps = self.draw.normal(0, self.draw.choice([0.02, 0.1, 0.3]), (1, 8, JOINTS)).cumsum(axis=1)
        (ranges,) = self.robot.joint_ranges
        poses = self.robot.poses_at(np.clip(observation["joints"][:, None] + steps, ranges[:, 0], ranges[:, 1]))
        return Plan(poses[..., :3], poses[..., 3:], self.draw.uniform(-0.3, 1.3, (1, 8)), 0.3)


def motions(poses: np.ndarray, hz: float) -> dict[str, tuple[np.ndarray, float]]:
    """Return everything that is limited in each period, with its limit, from the poses [T, 8] at the periods' ends."""
    velocity = np.diff(poses[:, :3], axis=0) * hz
    turns = Rotation.from_quat(poses[:, 3:7], scalar_first=True)
    turning = (turns[1:] * turns[:-1].inv()).as_rotvec() * hz
    low, high = LIMITS.box()
    return {
        "speed_m_s": (np.linalg.norm(velocity, axis=1), LIMITS.speed_m_s),
        "acceleration_m_s2": (np.linalg.norm(np.diff(velocity, axis=0) * hz, axis=1), LIMITS.acceleration_m_s2),
        "turn_rad_s": (np.linalg.norm(turning, axis=1), LIMITS.turn_rad_s),
        "turn_acceleration_rad_s2": (
            np.linalg.norm(np.diff(turning, axis=0) * hz, axis=1),
            LIMITS.turn_acceleration_rad_s2,
        ),
        "gripper_per_s": (np.abs(np.diff(poses[:, 7])) * hz, LIMITS.gripper_per_s),
        "outside_workspace_m": (np.maximum(low - poses[:, :3], poses[:, :3] - high).max(axis=1), 0.0),
    }


def exceeded(values: np.ndarray, limit: float, tolerance: float = 0.0) -> np.ndarray:
    """Return where values exceed a limit by more than the tolerance and rounding."""
    return np.asarray(values > limit * (1 + 1e-6) + 1e-9 + tolerance)


def excesses(
    motion: Mapping[str, tuple[np.ndarray, float]], tolerances: Mapping[str, float], causes: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return the largest value, the limit, and number and size of the excesses of everything that is limited.

    Args:
        motion: values of the periods, with their limit; without the first periods where they are differences.
            tolerances: smaller excesses do not count. causes: whether each period has a cause of excesses, by its name.
            An excess is counted for the first cause that one of the differenced periods has, else as ``otherwise``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (values, limit) in motion.items():
        over = exceeded(values, limit, tolerances.get(name, 0.0))
        beyond, counts, left = values[over] - limit, {}, over.copy()
        for cause, present in causes.items():
            before = len(present) - len(values)
            explained = np.lib.stride_tricks.sliding_window_view(present, before + 1).any(axis=1)
            counts[cause] = int((left & explained).sum())
            left &= ~explained
        found[name] = {
            "largest": round(float(values.max()), 6),
            "limit": limit,
            "tolerance": round(tolerances.get(name, 0.0), 6),
            "periods_over": {**counts, "otherwise": int(left.sum())},
            "excess_median": round(float(np.median(beyond)), 6) if len(beyond) else 0.0,
            "excess_largest": round(float(beyond.max()), 6) if len(beyond) else 0.0,
        }
    return found


def of_point(robot: PointArm) -> tuple[dict[str, Any], bool]:
    """Return what a run of the tool without joints showed, and whether it was within the limits."""
    measured = motions(np.stack(robot.sent), robot.control_hz)
    within = not any(exceeded(values, limit).any() for values, limit in measured.values())
    largest = {name: [round(float(values.max()), 6), limit] for name, (values, limit) in measured.items()}
    return {"largest_and_limit": largest, "within_limits": within}, within


def of_arm(robot: WildYam) -> tuple[dict[str, Any], bool]:
    """Return what a run of the arm showed, and whether no limit was exceeded without a cause that the pages name.

    A short motion of the joints may move the tool farther than a straight path by `CURVED_M`, and inverse kinematics
    leaves an error of up to `ROTATION_RAD`: smaller excesses than these make do not count.
    """
    states, hz = np.stack(robot.states), robot.control_hz
    poses = np.concatenate([robot.poses_at(states[None, :, :JOINTS])[0], states[:, JOINTS:]], axis=1)
    joint_speed = np.abs(np.diff(states[:, :JOINTS], axis=0)).max(axis=1) * hz
    measured = motions(poses, hz) | {"joint_speed_rad_s": (joint_speed, JOINT_LIMITS.speed_rad_s)}
    tolerances = {
        "speed_m_s": CURVED_M * hz,
        "acceleration_m_s2": CURVED_M * hz**2,
        "turn_rad_s": 2 * ROTATION_RAD * hz,
        "turn_acceleration_rad_s2": 4 * ROTATION_RAD * hz**2,
        "outside_workspace_m": CURVED_M,
    }
    commands = np.stack(robot.commands)
    turned, told = (Rotation.from_quat(each[:, 3:7], scalar_first=True) for each in (poses, commands))
    beside = np.linalg.norm(poses[:, :3] - commands[:, :3], axis=1) > CURVED_M
    causes = {
        "command_refused": np.array(robot.refused),
        "slowed_by_joint_speed": np.array(robot.held_back),
        "reached_within_tolerance": beside | ((told.inv() * turned).magnitude() > ROTATION_RAD),
    }
    found = excesses(measured, tolerances, causes)
    within = not any(each["periods_over"]["otherwise"] for each in found.values())
    periods = {cause: int(present.sum()) for cause, present in causes.items()}
    return {"limits": found, "periods_with_a_cause": periods, "within_limits_otherwise": within}, within


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="store_true", help="an arm with joints in place of a tool without")
    parser.add_argument("--ticks", type=int, default=10_000, help="control periods")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keygrip-wild-") as folder:
        robot = WildYam(Path(folder)) if arguments.arm else PointArm()
    policy = WildPoses(robot) if isinstance(robot, WildYam) else Wild()
    latencies = np.random.default_rng(1)
    planner = SimulatedPlanner(policy, lambda: float(latencies.uniform(0.1, 0.2)))
    watchdog = Watchdog(WatchdogSettings(hold_seconds=1e9, most_holds=10**9))
    loop = ControlLoop(robot, ChunkExecution(planner, robot.control_hz), LIMITS, watchdog)
    report = loop.run(arguments.ticks / robot.control_hz)
    figures, within = of_arm(robot) if isinstance(robot, WildYam) else of_point(robot)
    refused = {kind: sum(f"unsafe {kind}" in reason for _, _, reason in report.events) for kind in ("plan", "command")}
    record = {
        "case": "control_loop_wild_arm" if arguments.arm else "control_loop_wild",
        "command": " ".join(["python benchmarks/control_loop/wild.py", *sys.argv[1:]]),
        "ticks": report.ticks,
        "plans_followed": report.plans,
        "plans_refused": refused["plan"],
        **({"commands_refused": refused["command"]} if arguments.arm else {}),
        **figures,
        "machine": f"{os.cpu_count()} cores",
        "date": f"{datetime.date.today()}",
    }
    sys.stdout.write(f"{json.dumps(record, indent=1)}\n")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
