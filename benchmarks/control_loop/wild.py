"""Random plans for 10 000 control periods: the largest of everything that is limited, against its limit.

    python benchmarks/control_loop/wild.py > benchmarks/control_loop_wild.json

Prints one JSON record; exit code 1 where a limit was exceeded.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Observation, Plan
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.control_loop import ControlLoop
from keygrip.runtime.limits import MotionLimits
from keygrip.runtime.planners import SimulatedPlanner
from keygrip.runtime.watchdog import Watchdog, WatchdogSettings

LIMITS = MotionLimits(workspace_low=(0.05, -0.55, 0.0), workspace_high=(0.7, 0.55, 0.65))
START = np.array([0.3, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 1.0])


class PointArm:
    """An arm that is where it was told to be, on a simulated clock."""

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


def main() -> None:
    """Command line."""
    robot, ticks = PointArm(), 10_000
    latencies = np.random.default_rng(1)
    execution = ChunkExecution(SimulatedPlanner(Wild(), lambda: float(latencies.uniform(0.1, 0.2))), robot.control_hz)
    watchdog = Watchdog(WatchdogSettings(hold_seconds=1e9, most_holds=10**9))
    report = ControlLoop(robot, execution, LIMITS, watchdog).run(ticks / robot.control_hz)
    sent = np.stack(robot.sent)
    velocity = np.diff(sent[:, :3], axis=0) * robot.control_hz
    turns = Rotation.from_quat(sent[:, 3:7], scalar_first=True)
    turning = (turns[1:] * turns[:-1].inv()).as_rotvec() * robot.control_hz
    low, high = LIMITS.box()
    measured = {
        "speed_m_s": (float(np.linalg.norm(velocity, axis=1).max()), LIMITS.speed_m_s),
        "acceleration_m_s2": (
            float(np.linalg.norm(np.diff(velocity, axis=0) * robot.control_hz, axis=1).max()),
            LIMITS.acceleration_m_s2,
        ),
        "turn_rad_s": (float(np.linalg.norm(turning, axis=1).max()), LIMITS.turn_rad_s),
        "turn_acceleration_rad_s2": (
            float(np.linalg.norm(np.diff(turning, axis=0) * robot.control_hz, axis=1).max()),
            LIMITS.turn_acceleration_rad_s2,
        ),
        "gripper_per_s": (float(np.abs(np.diff(sent[:, 7])).max()) * robot.control_hz, LIMITS.gripper_per_s),
        "outside_workspace_m": (float(np.maximum(low - sent[:, :3], sent[:, :3] - high).max()), 0.0),
    }
    within = all(value <= limit * (1 + 1e-6) + 1e-9 for value, limit in measured.values())
    record = {
        "case": "control_loop_wild",
        "command": "python benchmarks/control_loop/wild.py",
        "ticks": report.ticks,
        "plans_followed": report.plans,
        "plans_refused": sum("unsafe plan" in reason for _, _, reason in report.events),
        "largest_and_limit": {name: [round(value, 6), limit] for name, (value, limit) in measured.items()},
        "within_limits": within,
        "machine": f"{os.cpu_count()} cores",
    }
    sys.stdout.write(f"{json.dumps(record, indent=1)}\n")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
