"""Chooses the part of a camera's image that the network sees, so that the arm's workspace stays in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.schema import CameraTrack, Demo
from keygrip.models.geometry.cameras import project

log = logging.getLogger(__name__)

KEPT_SHARE = 0.95  # share of the visible workspace that must stay in the image
GRID = 9  # points along each side of the workspace's box
DEMOS_AT_MOST = 30  # evenly chosen: hand-eye rigs and wrist cameras move from one demo to the next
FRAMES_AT_MOST = 8  # frames of each demo, for cameras that move


def workspace_points(demos: Sequence[Demo], arms: Sequence[str]) -> np.ndarray:
    """Return [M, 3] metres: a grid over the bounding box of all reached and commanded positions of the arms."""
    positions = [
        poses.position
        for demo in demos
        for arm in arms
        for poses in (demo.arms[arm], demo.arms[arm].commanded)
        if poses is not None
    ]
    stacked = np.concatenate(positions)
    sides = [np.linspace(low, high, GRID) for low, high in zip(stacked.min(0), stacked.max(0), strict=True)]
    return np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)


def kept_share(geometry: ImageGeometry, tracks: Sequence[CameraTrack], points: np.ndarray) -> tuple[float, float]:
    """Return how much of a workspace the network sees, and how much the camera itself sees.

    Args:
        geometry: the crop of the camera's image. tracks: the camera in some demos. points: [M, 3] metres.

    Returns:
        The share of the points in the camera's image that the network sees, and the share of all points that the camera
        sees, over all tracks.
    """
    inside = visible_count = count = 0
    for track in tracks:
        frames = np.unique(np.linspace(0, len(track.intrinsics) - 1, FRAMES_AT_MOST).astype(int))
        if track.world_to_camera.strides[0] == 0 and track.intrinsics.strides[0] == 0:
            frames = frames[:1]  # one matrix for all frames
        intrinsics = torch.from_numpy(np.ascontiguousarray(track.intrinsics[frames]))[:, None]
        pose = torch.from_numpy(np.ascontiguousarray(track.world_to_camera[frames]))[:, None]
        pixels, depth = project(torch.from_numpy(points)[None].expand(len(frames), -1, -1), intrinsics, pose)
        x, y = pixels[..., 0].numpy(), pixels[..., 1].numpy()
        visible = (x >= 0) & (x < track.width) & (y >= 0) & (y < track.height) & (depth.numpy() > 0)
        box = geometry.box(track.width, track.height)
        in_crop = visible & (x >= box.left) & (x < box.right) & (y >= box.top) & (y < box.bottom)
        inside, visible_count, count = (
            inside + int(in_crop.sum()),
            visible_count + int(visible.sum()),
            count + visible.size,
        )
    return inside / max(visible_count, 1), visible_count / max(count, 1)


def choose_fit(
    geometry: ImageGeometry, cameras: Mapping[str, Sequence[CameraTrack]], points: np.ndarray
) -> tuple[ImageGeometry, dict[str, tuple[float, float]]]:
    """Return the narrowest view that keeps 95 % of the part of the workspace that each camera sees.

    The central square is tried first, then the whole image squeezed into a square; each first with the requested field
    and then without a margin. The last one keeps everything.

    Args:
        geometry: size, mean, std, field. cameras: by name, each in some demos. points: [M, 3] metres, the workspace.

    Returns:
        The chosen geometry, and `kept_share` of each camera with it.
    """
    tried = [(fit, field) for fit in ("crop", "stretch") for field in (geometry.field, 1.0)]
    for fit, field in tried:
        chosen = replace(geometry, fit=fit, field=field)
        shares = {name: kept_share(chosen, tracks, points) for name, tracks in cameras.items()}
        if all(kept >= KEPT_SHARE for kept, _ in shares.values()):
            break
    return chosen, shares


def fit_to_workspace(
    demos: Sequence[Demo], cameras: Sequence[str], arms: Sequence[str], geometry: ImageGeometry
) -> ImageGeometry:
    """Return the geometry that `choose_fit` chooses for the workspace and the cameras of the demos, and log it.

    If no demo holds the calibration of a camera, the workspace's place in its image is not known. Then the whole image
    of every camera is used.
    """
    tracks = {camera: chosen_tracks(demos, camera) for camera in cameras}
    if unknown := [camera for camera, found in tracks.items() if not found]:
        log.warning(
            "data.fit=auto: where the workspace lies in camera %s is not known, since no demo has its calibration: "
            "fit=stretch field=1, the whole image of every camera",
            ", ".join(unknown),
        )
        return replace(geometry, fit="stretch", field=1.0)
    chosen, shares = choose_fit(geometry, tracks, workspace_points(demos, arms))
    log.info("data.fit=auto: fit=%s field=%g", chosen.fit, chosen.field)
    for camera, (kept, seen) in shares.items():
        message = "  camera %s sees %.1f %% of the workspace, the network %.1f %% of that"
        log.info(message, camera, 100 * seen, 100 * kept)
    return chosen


def chosen_tracks(demos: Sequence[Demo], camera: str) -> list[CameraTrack]:
    """Return the tracks of a camera in evenly chosen demos that hold the camera and its calibration."""
    tracks = [demo.cameras[camera] for demo in demos if camera in demo.cameras]
    tracks = [track for track in tracks if not track.uncalibrated]
    return tracks[:: max(1, len(tracks) // DEMOS_AT_MOST)]
