"""Small conversions that the foreign readers share. Legend: N frames.

Errors of these functions name what was wrong; the readers convert them to a DemoError.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

RIGID_TOLERANCE = 1e-2  # float32 products and hand-eye solutions stay far below; another layout or a scale is far above
OPENING_OVERSHOOT = 0.1  # drivers normalise by a measured stroke, and encoders exceed its ends by a few per cent


def rigid(matrix: np.ndarray, what: str) -> np.ndarray:
    """Return transforms [..., 4, 4] with exactly orthonormal rotations.

    Raises:
        ValueError: not 4 x 4, not finite, mirrored, scaled, or stored transposed.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape[-2:] != (4, 4):
        raise ValueError(f"{what} must be 4 x 4, it is {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} holds NaN or infinite values")
    if np.abs(matrix[..., 3, :] - [0, 0, 0, 1]).max() > 1e-6:
        raise ValueError(f"{what}: the last row must be 0 0 0 1; is the matrix transposed?")
    clean = matrix.copy()
    clean[..., :3, :3] = rotations(matrix[..., :3, :3], what)
    return clean


def rotations(matrix: np.ndarray, what: str) -> np.ndarray:
    """Return the nearest rotation matrices [..., 3, 3]. Raise ValueError if the input is not one up to rounding."""
    matrix = np.asarray(matrix, dtype=np.float64)
    defect = np.abs(matrix @ np.swapaxes(matrix, -1, -2) - np.eye(3)).max()
    if not defect < RIGID_TOLERANCE:
        raise ValueError(f"{what} is not a rotation: R R^T differs from the identity by {defect:.2g}")
    left, _, right = np.linalg.svd(matrix)
    nearest = left @ right
    if (np.linalg.det(nearest) < 0).any():
        raise ValueError(f"{what} mirrors (determinant -1); an axis has the wrong sign")
    return nearest


def invert(matrix: np.ndarray) -> np.ndarray:
    """Return the inverse of rigid transforms [..., 4, 4]."""
    rotation = np.swapaxes(matrix[..., :3, :3], -1, -2)
    inverse = np.zeros_like(matrix)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ matrix[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def transform(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """[N, 3] and [N, 3, 3] -> [N, 4, 4]."""
    matrix = np.zeros((*np.shape(position)[:-1], 4, 4))
    matrix[..., :3, :3], matrix[..., :3, 3], matrix[..., 3, 3] = rotation, position, 1.0
    return matrix


def quaternions(rotation: np.ndarray) -> np.ndarray:
    """[N, 3, 3] -> [N, 4] wxyz, without sign flips from one frame to the next."""
    return continuous(Rotation.from_matrix(rotation).as_quat(scalar_first=True))


def continuous(quaternion: np.ndarray) -> np.ndarray:
    """[N, 4]: q and -q are the same rotation; each row gets the sign that is nearer to the previous row."""
    quaternion = np.array(quaternion, dtype=np.float64)
    signs = np.where((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    quaternion[1:] *= np.cumprod(signs)[:, None]
    return quaternion


def opening(values: np.ndarray, what: str, closed: float = 0.0, opened: float = 1.0) -> np.ndarray:
    """Raw gripper readings [N] -> opening in [0, 1]; small overshoot at the ends of the stroke is clipped.

    Raises:
        ValueError: readings lie far outside the stroke: another unit, or its ends are swapped or wrong.
    """
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    if closed == opened:
        raise ValueError(f"{what}: closed and open are both {closed}")
    scaled = (values - closed) / (opened - closed)
    low, high = float(np.nanmin(scaled)), float(np.nanmax(scaled))
    if low < -OPENING_OVERSHOOT or high > 1 + OPENING_OVERSHOOT:
        raise ValueError(
            f"{what} runs from {values.min():.4g} to {values.max():.4g}, but closed is {closed:g} and open is "
            f"{opened:g}; other units?"
        )
    return np.clip(scaled, 0.0, 1.0)


def increasing(times: np.ndarray, fallback_step: int) -> np.ndarray:
    """Return time stamps [N] int64 ns in which repeated stamps are spread out.

    Recorders that run faster than a camera store a frame twice with the same stamp. Their ticks are evenly spaced, so
    repeated stamps get the times between their neighbours. Stamps that decrease are kept, so that the checks find them.
    """
    times = np.asarray(times).astype(np.int64)
    distinct = np.flatnonzero(np.concatenate([[True], np.diff(times) != 0]))
    if len(distinct) == len(times):
        return times
    index = np.arange(len(times))
    offsets = np.interp(index, distinct, (times[distinct] - times[0]).astype(np.float64))
    spread = times[0] + offsets.round().astype(np.int64)
    after_last = index > distinct[-1]
    spread[after_last] = times[distinct[-1]] + (index[after_last] - distinct[-1]) * fallback_step
    return spread
