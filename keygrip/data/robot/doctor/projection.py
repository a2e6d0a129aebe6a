"""Checks of cameras: whether the gripper projects into the image, and how accurately points can be localised in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from keygrip.data.robot.doctor.examination import MOVED_M, Examination, join_five, tensor
from keygrip.data.robot.schema import CameraTrack, Demo
from keygrip.models.geometry.cameras import camera_centre, inside_image, pixel_rays, project, recover_3d
from keygrip.robots.kinematics import matrix_from_quaternion

ON_SCREEN_SHARE = 0.9  # share of frames; below it training loses targets, below half of it the calibration is wrong
LARGEST_CELL_MM = 25.0  # edge of a cell of the prediction grid on the table
GRAZING_SLOPE = 0.1  # sine of the angle between a viewing ray and the horizontal: 6 degrees
AIMED_ELSEWHERE = "a camera that looks elsewhere, or a wrong calibration"


def check_projection(exam: Examination) -> None:
    """Check whether the gripper projects into each image, and how accurately points on the table can be localised."""
    for camera in exam.cameras:
        uncalibrated = {demo.name: demo.cameras[camera].uncalibrated for demo in exam.with_camera(camera)}
        uncalibrated = {name: reason for name, reason in uncalibrated.items() if reason}
        demos = [demo for demo in exam.with_camera(camera) if demo.name not in uncalibrated]
        if uncalibrated:
            exam.add(
                "uncalibrated_camera",
                "warning",
                f"it is not calibrated: {next(iter(uncalibrated.values()))}. Nothing that needs its pose was checked",
                "Some models need no calibration (docs/data.md); for the others give it in a calibration file",
                cause="no calibration of this camera",
                camera=camera,
                demos=uncalibrated,
            )
        if not demos:
            continue
        carrier = _find_carrying_arm(demos, camera)
        exam.measures[f"camera/{camera}/mounted_on"] = carrier
        centres = {demo.name: _relative_centre(demo.cameras[camera]) for demo in demos}
        misfit = [name for name, centre in centres.items() if np.abs(centre - 0.5).max() > 0.25]
        if misfit:
            centre = centres[misfit[0]]
            track = next(demo.cameras[camera] for demo in demos if demo.name == misfit[0])
            exam.add(
                "intrinsics",
                "error",
                f"the optical centre lies at {centre[0]:.2f}, {centre[1]:.2f} of an image of {track.width} x "
                f"{track.height}",
                "The intrinsics are for another resolution or crop: scale them with the image",
                cause="intrinsics of another resolution or crop",
                camera=camera,
                demos=misfit,
            )
            # this explains any result of their projection
            demos = [demo for demo in demos if demo.name not in misfit]
        if carrier is not None or not demos:
            continue  # a wrist camera sees its gripper always at the same place or never, which is no evidence
        for arm in sorted({arm for demo in demos for arm in demo.arms}):
            _check_view(exam, camera, arm, [demo for demo in demos if arm in demo.arms])


def _relative_centre(track: CameraTrack) -> np.ndarray:
    """Return the optical centre [2] as a share of the image's width and height."""
    return np.asarray(track.intrinsics[0, :2, 2]) / [track.width, track.height]


def _find_carrying_arm(demos: Sequence[Demo], camera: str) -> str | None:
    """Return the arm on which a camera is mounted: a moving camera is rigid on that arm's gripper. None: no arm."""
    for demo in demos:
        pose = np.linalg.inv(np.asarray(demo.cameras[camera].world_to_camera))
        if np.ptp(pose[:, :3, 3], axis=0).max() < MOVED_M:
            return None
        for arm, trajectory in demo.arms.items():
            world_to_gripper = matrix_from_quaternion(trajectory.quaternion).transpose(0, 2, 1)
            camera_in_gripper = (world_to_gripper @ (pose[:, :3, 3] - trajectory.position)[..., None])[..., 0]
            if np.ptp(camera_in_gripper, axis=0).max() < 0.25 * np.ptp(pose[:, :3, 3], axis=0).max():
                return arm
    return None


def _are_in_image(track: CameraTrack, position: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    """Return bool [N]: which positions [N, 3] are in the image."""
    pixels, _ = project(tensor(position), tensor(track.intrinsics), tensor(world_to_camera))
    return inside_image(pixels, track.width, track.height).numpy()


_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
# Cause, what to do, and the conversion of a stored pose to the right one.
_ALTERNATIVES: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
    ("camera_to_world stored as world_to_camera", "store its inverse", np.linalg.inv),
    (
        "world_to_camera of OpenGL's camera axes (y up, looking along -z)",
        "flip y and z of the camera's axes",
        lambda pose: _FLIP @ pose,
    ),
    (
        "camera_to_world of OpenGL's camera axes (y up, looking along -z) stored as world_to_camera",
        "store its inverse, and flip y and z of the camera's axes",
        lambda pose: _FLIP @ np.linalg.inv(pose),
    ),
]


def _check_view(exam: Examination, camera: str, arm: str, demos: list[Demo]) -> None:
    tracks = [demo.cameras[camera] for demo in demos]
    positions = [demo.arms[arm].position for demo in demos]
    inside = [
        _are_in_image(track, position, track.world_to_camera) for track, position in zip(tracks, positions, strict=True)
    ]
    share = float(np.concatenate(inside).mean())
    exam.measures[f"camera/{camera}/arm/{arm}/on_screen"] = share
    if share < ON_SCREEN_SHARE:
        cause = AIMED_ELSEWHERE
        advice = "Look at the contact sheet, aim the camera at the workspace or leave these demos out"
        for words, remedy, change in _ALTERNATIVES:
            converted = [
                _are_in_image(track, position, change(np.asarray(track.world_to_camera)))
                for track, position in zip(tracks, positions, strict=True)
            ]
            if np.concatenate(converted).mean() > max(ON_SCREEN_SHARE, share + 0.3):
                cause, advice = words, f"Read so, it puts the gripper into the image: {remedy}"
                break
        shares = [float(found.mean()) for found in inside]
        worst = sorted((n for n, found in enumerate(shares) if found < 1), key=lambda n: shares[n])
        exam.add(
            "off_screen",
            "error" if share < 0.5 else "warning",
            f"the gripper is in the image in only {share:.0%} of the frames, least in "
            f"{join_five(demos[n].name for n in worst[:3])}",
            advice,
            cause=cause,
            camera=camera,
            arm=arm,
            demos=[demos[n].name for n in worst],
            frames=np.flatnonzero(~inside[worst[0]]).tolist(),
        )
    if share == 0:
        return
    slopes, cells = [], []
    lowest = float(np.min([position[:, 2].min() for position in positions]))
    for track, position, visible in zip(tracks, positions, inside, strict=True):
        if not visible.any():
            continue
        intrinsics, pose = tensor(track.intrinsics)[visible], tensor(track.world_to_camera)[visible]
        pixels, _ = project(tensor(position)[visible], intrinsics, pose)
        slopes.append(pixel_rays(pixels, intrinsics, pose)[:, 2].abs().numpy())
        cell = min(track.width, track.height) / exam.pred_size
        height = torch.full((len(pixels),), lowest, dtype=pixels.dtype)
        corners = [
            recover_3d(
                pixels + torch.tensor(step, dtype=pixels.dtype) * cell / 2, height, intrinsics, pose, strict=False
            )
            for step in ([-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0])
        ]
        above = camera_centre(pose)[:, 2] > lowest
        cell_size = torch.maximum((corners[1] - corners[0]).norm(dim=-1), (corners[3] - corners[2]).norm(dim=-1))
        cells.append(cell_size[above & cell_size.isfinite()].numpy())
    grazing = float((np.concatenate(slopes) < GRAZING_SLOPE).mean())
    found = np.concatenate(cells)
    exam.measures[f"camera/{camera}/arm/{arm}/grazing_share"] = grazing
    exam.measures[f"camera/{camera}/arm/{arm}/cell_mm"] = float(np.median(found) * 1e3) if len(found) else None
    if grazing > 0.05:
        exam.add(
            "grazing_rays",
            "error" if grazing > 0.5 else "warning",
            f"{grazing:.0%} of the viewing rays to the gripper are within 6 degrees of the horizontal",
            "A pixel and a height do not determine such a point: put the camera higher and look down more steeply",
            cause="a camera that stands too low",
            camera=camera,
            arm=arm,
            demos=[demo.name for demo in demos],
        )
    elif len(found) and np.median(found) * 1e3 > LARGEST_CELL_MM:
        exam.add(
            "cell_size",
            "warning",
            f"one of {exam.pred_size} x {exam.pred_size} cells covers {np.median(found) * 1e3:.0f} mm on the table",
            "Move the camera nearer, crop, or raise pred_size",
            cause="a camera that stands far off, or few cells",
            camera=camera,
            arm=arm,
            demos=[demo.name for demo in demos],
        )
