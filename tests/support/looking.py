"""Camera poses for tests."""

from __future__ import annotations

import numpy as np


def looking_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return world to camera [4, 4] (OpenCV) of an upright camera at `eye` directed at `target`, both [3] in metres."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    pose[:3, 3] = -pose[:3, :3] @ eye
    return pose
