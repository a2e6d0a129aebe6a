"""Inverse kinematics by damped least squares (Wampler 1986; Nakamura and Hanafusa 1986)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.robots.kinematics import ArmChain, arm_chain


@dataclass(frozen=True)
class Solution:
    """Joint angles and the remaining error between the tool and its target."""

    joints: np.ndarray  # [6] rad
    position_error: float  # m
    angle_error: float  # rad


def solve(
    position: np.ndarray,
    rotation: np.ndarray,
    start: np.ndarray,
    chain: ArmChain | None = None,
    iterations: int = 100,
    damping: float = 1e-4,
    largest_step: float = 0.2,
    position_tolerance: float = 1e-4,
    angle_tolerance: float = 1e-3,
    patience: int = 15,
) -> Solution:
    """Find joints that move the grasp site to a pose, from `start`, so that successive targets give a smooth path.

    Args:
        position: [3] m in the base frame.
        rotation: [3, 3].
        start: [6] rad.
        patience: stop after this many iterations without improvement (the target is out of reach).

    Returns:
        The closest solution found within the joint limits; an unreachable target has a large `position_error`.
    """
    chain = chain or arm_chain()
    joints = np.clip(np.asarray(start, float), chain.limits[:, 0], chain.limits[:, 1])
    best, stalled = Solution(joints, np.inf, np.inf), 0
    for _ in range(iterations):
        tool, tool_rotation, origins, axes = chain.frames(joints)
        error = np.concatenate([position - tool, Rotation.from_matrix(rotation @ tool_rotation.T).as_rotvec()])
        distance, angle = float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))
        stalled += 1
        # 0.1 m/rad converts angles to lengths
        if distance + 0.1 * angle < best.position_error + 0.1 * best.angle_error:
            best, stalled = Solution(joints, distance, angle), 0
        if stalled == patience or (distance < position_tolerance and angle < angle_tolerance):
            break
        jacobian = np.concatenate([np.cross(axes, tool - origins), axes], axis=1).T  # [6, J]
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damping * np.eye(6), error)
        step *= min(1.0, largest_step / max(float(np.abs(step).max()), 1e-12))
        joints = np.clip(joints + step, chain.limits[:, 0], chain.limits[:, 1])
    return best


def pointing_down(yaw: float, tilt: float = 0.0) -> np.ndarray:
    """Return the [3, 3] rotation of a gripper that points down, closing along (-sin yaw, cos yaw, 0).

    `tilt` (rad) tilts the approach outwards, away from the base, in the plane of `yaw`.
    """
    c, s = np.cos(yaw), np.sin(yaw)
    closing = np.array([-s, c, 0.0])
    approach = np.array([np.sin(tilt) * c, np.sin(tilt) * s, -np.cos(tilt)])
    return np.stack([np.cross(closing, approach), closing, approach], axis=1)


def yaw_of(rotation: np.ndarray) -> float:
    """Return the yaw (rad) of the closing axis, the inverse of `pointing_down`."""
    return float(np.arctan2(-rotation[0, 1], rotation[1, 1]))
