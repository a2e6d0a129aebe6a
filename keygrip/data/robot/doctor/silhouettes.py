"""Silhouettes of points, and their agreement with what moves in the images.

Shape legend: F frames, P points, h and w of the images.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.transforms import transform


def move_camera(world_to_camera: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Rotate a camera [4, 4] by the rotation vector change[:3] (rad) about its own axes and shift it by change[3:6]."""
    turn = Rotation.from_rotvec(change[:3]).as_matrix()
    return transform(turn @ world_to_camera[:3, 3] + change[3:6], turn @ world_to_camera[:3, :3])


def project_points(
    points: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [F, P, 2] (NaN behind the camera) and camera coordinates [F, P, 3] of world points [F, P, 3]."""
    pose = world_to_camera.astype(np.float32)
    camera = points @ pose[:3, :3].T + pose[:3, 3]
    depth = np.where(camera[..., 2] > 0.02, camera[..., 2], np.nan)
    k = intrinsics.astype(np.float32)
    pixels = np.stack([k[0, 0] * camera[..., 0] / depth + k[0, 2], k[1, 1] * camera[..., 1] / depth + k[1, 2]], axis=-1)
    return pixels, camera


def average_blocks(changed: np.ndarray, side: int) -> np.ndarray:
    """Return the means of blocks of `side` x `side` pixels: [F, h, w] -> [F, h // side, w // side]."""
    frames, height, width = changed.shape
    rows, columns = height // side, width // side
    cropped = changed[:, : rows * side, : columns * side]
    return np.asarray(cropped.reshape(frames, rows, side, columns, side).mean(axis=(2, 4)))


def shifted(mask: np.ndarray, join: np.ufunc) -> np.ndarray:
    """Return the 3 x 3 maximum or minimum of masks [F, h, w]; pixels beyond the border are ignored."""
    result = mask.copy()
    join(result[:, 1:], mask[:, :-1], out=result[:, 1:])
    join(result[:, :-1], mask[:, 1:], out=result[:, :-1])
    rows = result.copy()
    join(result[:, :, 1:], rows[:, :, :-1], out=result[:, :, 1:])
    join(result[:, :, :-1], rows[:, :, 1:], out=result[:, :, :-1])
    return result


def splat(pixels: np.ndarray, height: int, width: int, close: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return bool masks [F, h, w] of pixels [F, P, 2], and for each pixel the index of one point there (-1: none)."""
    frames = len(pixels)
    with np.errstate(invalid="ignore"):
        x, y = np.floor(pixels[..., 0]), np.floor(pixels[..., 1])
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    frame, point = np.nonzero(inside)
    flat = (frame * height + y[inside].astype(np.int64)) * width + x[inside].astype(np.int64)
    hit = np.full(frames * height * width, -1, dtype=np.int32)
    hit[flat] = point
    point_index = hit.reshape(frames, height, width)
    mask = point_index >= 0
    if close:
        mask = shifted(shifted(mask, np.logical_or), np.logical_and)
    return mask, point_index


def outline_of(mask: np.ndarray) -> np.ndarray:
    """Return pixels of masks [F, h, w] next to a pixel outside the mask, at least 2 pixels from the image's border."""
    edge = mask & ~shifted(mask, np.logical_and)
    edge[:, :2], edge[:, -2:], edge[:, :, :2], edge[:, :, -2:] = False, False, False, False
    return edge


def agreement(silhouettes: np.ndarray, changed: np.ndarray) -> float:
    """Return the correlation, -1..1, of silhouettes and foreground [F, h, w] in their changes over the frames.

    What never moves (the base, the table) has no effect. Where the robot is in most frames, it belongs to the
    background (the median), and the foreground shows when it leaves: there, silhouettes are inverted. The result is 0
    if nothing moves.
    """
    share = silhouettes.mean(axis=0, dtype=np.float32)
    variation = (silhouettes ^ (share > 0.5)).astype(np.float32)
    variation -= variation.mean(axis=0)
    foreground_variation = changed - changed.mean(axis=0)
    power = float((variation * variation).sum()), float((foreground_variation * foreground_variation).sum())
    if min(power) < 1:
        return 0.0
    return float((variation * foreground_variation).sum() / np.sqrt(power[0] * power[1]))
