"""Conversions of rotations, openings and times that the foreign readers share. Legend: N frames.

Errors of these functions name what was wrong; the readers convert them to a DemoError.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

OPENING_OVERSHOOT = 0.1  # drivers normalise by a measured stroke, and encoders exceed its ends by a few per cent


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
