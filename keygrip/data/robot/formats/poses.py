"""Small conversions that the foreign readers share. Legend: N frames.

Every function here names what it refuses; the readers turn that into an error of the demo.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

RIGID_TOLERANCE = 1e-2  # float32 products and hand-eye solutions stay far below; another layout or a scale is far above
OPENING_OVERSHOOT = 0.1  # drivers normalise by a measured stroke, and encoders pass its ends by a few per cent


def rigid(matrix: np.ndarray, what: str) -> np.ndarray:
    """[..., 4, 4] transforms with their rotations made exactly orthonormal.

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
    """[..., 3, 3] nearest rotation matrices. Raises ValueError where the input is not one but for rounding."""
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
    """Inverse of rigid transforms [..., 4, 4]."""
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
    """[N, 4]: q and -q are the same rotation; each row gets the sign that is nearer to the row before."""
    quaternion = np.array(quaternion, dtype=np.float64)
    signs = np.where((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    quaternion[1:] *= np.cumprod(signs)[:, None]
    return quaternion


def opening(values: np.ndarray, what: str, closed: float = 0.0, opened: float = 1.0) -> np.ndarray:
    """Raw gripper readings [N] -> opening in [0, 1]; small overshoot at the ends of the stroke is cut off.

    Raises:
        ValueError: readings far outside the stroke: another unit, or the ends are swapped or wrong.
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
    """Time stamps [N] int64 ns with repeats spread out.

    Recorders that tick faster than a camera store a frame twice with the same stamp. The ticks themselves are even, so
    repeats get the times between their neighbours; stamps that go back are left for the checks to find.
    """
    times = np.asarray(times).astype(np.int64)
    fresh = np.flatnonzero(np.concatenate([[True], np.diff(times) != 0]))
    if len(fresh) == len(times):
        return times
    index = np.arange(len(times))
    spread = times[0] + np.interp(index, fresh, (times[fresh] - times[0]).astype(np.float64)).round().astype(np.int64)
    behind = index > fresh[-1]
    spread[behind] = times[fresh[-1]] + (index[behind] - fresh[-1]) * fallback_step
    return spread
