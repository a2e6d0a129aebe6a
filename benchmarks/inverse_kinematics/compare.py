"""keygrip's inverse kinematics beside mink's (a quadratic program over MuJoCo's Jacobians) on the YAM arm.

    python -m venv mink-env
    mink-env/bin/pip install mink daqp scipy && mink-env/bin/pip install --no-deps dreamscale-i2rt
    PYTHONPATH=. mink-env/bin/python benchmarks/inverse_kinematics/compare.py > benchmarks/inverse_kinematics.json

Both solve the same targets on the same chain, with at most 100 iterations each, down to 0.1 mm and 1 mrad:

- `far`: poses reached by random joint angles above the table, from the arm's home pose;
- `path`: straight lines in steps of 1 cm, pointing down, each step from the one before, as a policy's plan is
  followed at control rate.

Reported: the share solved to 1 mm and 0.5 degrees, the largest error among those, milliseconds of processor time, and
joint angles beyond their limits.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import mink
import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.kinematics import ArmChain, arm_chain

HOME = np.array([0.0, 1.0, 1.1, -0.9, 0.0, 0.0])
ITERATIONS = 100
SOLVED_M, SOLVED_RAD = 1e-3, np.deg2rad(0.5)
Solve = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def mujoco_model(chain: ArmChain) -> mujoco.MjModel:
    """The chain without masses or shapes: kinematics is all that is asked."""
    opened, closed = [], ""
    for index in range(len(chain.axes)):
        quaternion = Rotation.from_matrix(chain.rotations[index]).as_quat(scalar_first=True)
        opened.append(
            f'<body pos="{_text(chain.offsets[index])}" quat="{_text(quaternion)}">'
            f'<joint axis="{_text(chain.axes[index])}" range="{_text(chain.limits[index])}"/>'
            '<inertial pos="0 0 0" mass="1" diaginertia="1 1 1"/>'
        )
        closed += "</body>"
    turn = Rotation.from_matrix(chain.tool_rotation).as_quat(scalar_first=True)
    site = f'<site name="tool" pos="{_text(chain.tool_offset)}" quat="{_text(turn)}"/>'
    xml = f'<mujoco><compiler angle="radian"/><worldbody>{"".join(opened)}{site}{closed}</worldbody></mujoco>'
    return mujoco.MjModel.from_xml_string(xml)


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.17g}" for value in values)


def ours(position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray:
    return solve(position, rotation, start, iterations=ITERATIONS).joints


def with_mink(model: mujoco.MjModel) -> Solve:
    """mink's own loop: integrate the velocity that its program finds, until the error is small."""
    configuration = mink.Configuration(model)
    task = mink.FrameTask("tool", "site", position_cost=1.0, orientation_cost=0.1, lm_damping=1e-4)
    limits = [mink.ConfigurationLimit(model)]

    def found(position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray:
        configuration.update(np.clip(start, model.jnt_range[:, 0], model.jnt_range[:, 1]))
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, position
        task.set_target(mink.SE3.from_matrix(pose))
        for _ in range(ITERATIONS):
            error = task.compute_error(configuration)
            if np.linalg.norm(error[:3]) < 1e-4 and np.linalg.norm(error[3:]) < 1e-3:
                break
            velocity = mink.solve_ik(configuration, [task], 1.0, solver="daqp", limits=limits)
            step = velocity * min(1.0, 0.2 / max(float(np.abs(velocity).max()), 1e-12))  # as ours: 0.2 rad at most
            configuration.integrate_inplace(step, 1.0)
        return configuration.q.copy()

    return found


def far_targets(chain: ArmChain, count: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    generator, targets = np.random.default_rng(0), []
    while len(targets) < count:
        position, rotation, _, _ = chain.frames(generator.uniform(chain.limits[:, 0], chain.limits[:, 1]))
        if position[2] > 0 and position[0] > 0.05:
            targets.append([(position, rotation)])
    return targets


def path_targets(count: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    generator, targets = np.random.default_rng(1), []
    for _ in range(count):
        start, end = generator.uniform([0.2, -0.17, 0.03], [0.4, 0.17, 0.2], (2, 3))
        yaw = generator.uniform(-0.7, 0.7)
        steps = np.linspace(0, 1, 2 + int(100 * np.linalg.norm(end - start)))
        targets.append([(start + share * (end - start), pointing_down(yaw)) for share in steps])
    return targets


def measure(chain: ArmChain, method: Solve, paths: list[list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, Any]:
    solved, times, beyond = [], [], 0.0
    for path in paths:
        joints = HOME
        for number, (position, rotation) in enumerate(path):
            began = time.process_time()
            joints = method(position, rotation, joints)
            if number or len(path) == 1:  # the first step of a path is a far one
                times.append(1e3 * (time.process_time() - began))
                tool, turned, _, _ = chain.frames(joints)
                off = float(np.linalg.norm(position - tool))
                angle = float(np.linalg.norm(Rotation.from_matrix(rotation @ turned.T).as_rotvec()))
                if off < SOLVED_M and angle < SOLVED_RAD:
                    solved.append((off, angle))
            beyond = max(beyond, float((chain.limits[:, 0] - joints).max()), float((joints - chain.limits[:, 1]).max()))
    errors = np.array(solved) if solved else np.zeros((1, 2))
    return {
        "targets": len(times),
        "solved_share": round(len(solved) / len(times), 4),
        "largest_solved_error_mm": round(1e3 * float(errors[:, 0].max()), 3),
        "largest_solved_error_deg": round(float(np.rad2deg(errors[:, 1].max())), 3),
        "median_ms": round(float(np.median(times)), 3),
        "p95_ms": round(float(np.quantile(times, 0.95)), 3),
        "beyond_limits_rad": round(max(beyond, 0.0), 9),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    chain = arm_chain()
    methods: dict[str, Solve] = {"keygrip": ours, "mink": with_mink(mujoco_model(chain))}
    sets = {"far": far_targets(chain, 500), "path": path_targets(25)}
    result: dict[str, Any] = {
        "case": "inverse_kinematics",
        "command": "PYTHONPATH=. mink-env/bin/python benchmarks/inverse_kinematics/compare.py "
        "(its head: how mink-env is made)",
        "mink": metadata.version("mink"),
        "mujoco": mujoco.__version__,
    }
    for name, paths in sets.items():
        result[name] = {method: measure(chain, found, paths) for method, found in methods.items()}
    sys.stdout.write(json.dumps(result | {"machine": "2 cores"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
