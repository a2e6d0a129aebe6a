"""Rigid transforms of cameras, arms and boards: checked, inverted, and made of positions and rotations."""

from __future__ import annotations

import numpy as np

RIGID_TOLERANCE = 1e-2  # float32 products and hand-eye solutions stay far below; another layout or a scale is far above


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
    """Return rigid transforms [..., 4, 4] of positions [..., 3] and rotations [..., 3, 3]."""
    matrix = np.zeros((*np.shape(position)[:-1], 4, 4))
    matrix[..., :3, :3], matrix[..., :3, 3], matrix[..., 3, 3] = rotation, position, 1.0
    return matrix
