"""Compares the tool point of recorded poses with that of this project's kinematics.

Recorders compute poses with their own robot models. I2RT's `grasp_site` of the gripper linear_4310 lies 134.7 mm from
the last joint. That of dreamscale-i2rt, which `keygrip.robots.kinematics` reads and runs on an arm use, lies 144.65 mm
from it: a policy that is trained on poses of the first would stop the fingers 10 mm before the object. Poses that are
computed from the recorded joints have the same tool point in training and control. Legend: N frames.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.transforms import invert, transform
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion

LARGEST_OFFSET_M = 0.05  # 44 mm is the largest between the models of one gripper; a flange is farther away
LARGEST_SPREAD_M = 0.02  # versions of the YAM's link lengths cause up to 8 mm, a big_yam decimetres
LARGEST_TURN_DEG = 2.0  # the grippers' tool frames differ by nothing or by half a turn


def poses_from_joints(
    joints: np.ndarray, recorded: np.ndarray, arm: str, gripper: str, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the poses [N, 4, 4] of the grasp site in the arm's base, computed from joints [N, 6] in rad, and the mean
    position [3] of the recorded tool point in the grasp site's frame, m.

    Args:
        recorded: [N, 4, 4] in the arm's base, by another model of the same arm.
        label: what the joints and the recorded poses are, for the error.

    Raises:
        ValueError: values are not finite, or the recorded poses are not those of a point fixed to the same tool.
    """
    if not (np.isfinite(joints).all() and np.isfinite(recorded).all()):
        raise ValueError(f"{label}: poses or joints hold NaN or infinite values")
    position, quaternion = forward_kinematics(joints, arm, gripper)
    computed = transform(position, matrix_from_quaternion(quaternion))
    differences = invert(computed) @ recorded
    offset: np.ndarray = differences[:, :3, 3].mean(axis=0)
    distance = float(np.linalg.norm(offset))
    spread = float(np.linalg.norm(differences[:, :3, 3] - offset, axis=1).max())
    turn = float(np.degrees(Rotation.from_matrix(differences[:, :3, :3]).magnitude().max()))
    if distance > LARGEST_OFFSET_M or spread > LARGEST_SPREAD_M or turn > LARGEST_TURN_DEG:
        raise ValueError(  # within the 300 characters that a reason may have
            f"{label}: the poses do not belong to joints of a {arm} with {gripper}: the tool point is "
            f"{distance * 1e3:.0f} mm away, varies by {spread * 1e3:.0f} mm and turns by {turn:.0f} degrees (limits "
            f"{LARGEST_OFFSET_M * 1e3:.0f}, {LARGEST_SPREAD_M * 1e3:.0f}, {LARGEST_TURN_DEG:.0f}). Check the joints' "
            "zeros and by which robot model the recorder computed the poses"
        )
    return computed, offset
