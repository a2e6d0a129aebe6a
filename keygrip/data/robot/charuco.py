"""Calibrates cameras with a ChArUco board and OpenCV: the intrinsics, and the camera's pose by hand-eye calibration.

Either the board is fixed and the camera moves with the gripper (`mounted`), or the camera is fixed and the gripper
holds the board. The recording's poses are gripper poses in the world. Needs the extra `charuco`.
Legend: N frames in which the board was found, M corners.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from scipy.spatial.transform import Rotation

from keygrip.artifacts import atomic_write
from keygrip.data.robot.calibration import SCHEMA
from keygrip.data.robot.corrections import OffsetFrames
from keygrip.data.robot.discovery import find_demos, refuse_no_selection
from keygrip.data.robot.formats.frames import SelectedFrames
from keygrip.data.robot.frames import NumberedFiles, VideoFrames
from keygrip.data.robot.schema import CameraTrack, Demo, FrameSource
from keygrip.data.robot.transforms import invert, transform
from keygrip.data.spacing import evenly
from keygrip.robots.kinematics import matrix_from_quaternion

log = logging.getLogger(__name__)

LEAST_FRAMES, LEAST_CORNERS = 8, 6
LARGEST_ERROR_PX = 2.0
NOTICED_PX = 0.5  # smaller displacements by the lens count as no distortion
SMALLEST_TURN_DEG = 15.0  # gripper rotation about each of two axes; one axis leaves the pose along and about it open
LARGEST_SPREAD_M, LARGEST_SPREAD_DEG = 0.02, 5.0  # of a fixed board's pose; larger values are not arm noise
# An image is left out if its board pose deviates by more than this multiple of the median and by more than this shift,
# or by the same multiple and more than this rotation. Deviations are those from a fit without the image, so that it
# cannot shift what it is compared with. In simulated recordings of 8 sound images a multiple of 5 refuses one in ten.
OUTLYING, OUTLYING_M, OUTLYING_DEG = 7.0, 0.002, 1.0


@dataclass(frozen=True)
class Board:
    """A ChArUco board: numbers of squares, edge lengths of a square and of a marker (m), OpenCV's dictionary."""

    across: int = 7
    down: int = 5
    square_m: float = 0.03
    marker_m: float = 0.022
    dictionary: str = "DICT_4X4_50"


@dataclass(frozen=True)
class CameraResult:
    """A calibrated camera.

    Args:
        intrinsics: [3, 3], pixels, corner convention (0, 0 is the first pixel's corner). distortion: [5] of OpenCV.
        pose: [4, 4], gripper_from_camera of a mounted camera, else world_from_camera.
        error_px: root mean square reprojection error. spread_m, spread_deg: of the board's pose over the frames.
        frames: number of frames used for the pose; left_out: number of frames whose poses do not fit the others.
    """

    intrinsics: np.ndarray
    distortion: np.ndarray
    pose: np.ndarray
    error_px: float
    spread_m: float
    spread_deg: float
    frames: int
    left_out: int = 0


def opencv() -> ModuleType:
    """Return OpenCV. If it is missing, raise ModuleNotFoundError with the command that installs it."""
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a board is found by OpenCV, which is missing: pip install 'keygrip[charuco]'"
        ) from error
    return cv2


def charuco_board(board: Board) -> Any:
    """Return OpenCV's board. Raise ValueError for an unknown dictionary or impossible sizes."""
    cv2 = opencv()
    dictionary_id = getattr(cv2.aruco, board.dictionary, None)
    if not board.dictionary.startswith("DICT_") or dictionary_id is None:
        raise ValueError(f"dictionary={board.dictionary!r} is not one of OpenCV's, such as DICT_4X4_50")
    if not 0 < board.marker_m < board.square_m:
        raise ValueError(f"marker_m={board.marker_m} must be below square_m={board.square_m}")
    dictionary = cv2.aruco.getPredefinedDictionary(dictionary_id)
    return cv2.aruco.CharucoBoard((board.across, board.down), board.square_m, board.marker_m, dictionary)


def calibrate_camera(
    images: Sequence[np.ndarray],
    gripper: np.ndarray,
    board: Board,
    mounted: bool,
    intrinsics: np.ndarray | None = None,
) -> CameraResult:
    """Return intrinsics (unless given) and the camera's pose from images [H, W, 3] and world_from_gripper [N, 4, 4].

    Raises:
        ValueError: the board is found in too few images, the gripper rotates too little or about one axis only, or the
            poses do not fit the images.
    """
    cv2 = opencv()
    model = charuco_board(board)
    detector = cv2.aruco.CharucoDetector(model)
    size = images[0].shape[1::-1]
    objects, pixels, indices = [], [], []
    for index, image in enumerate(images):
        corners, corner_ids, _, _ = detector.detectBoard(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY))
        if corner_ids is None or len(corner_ids) < LEAST_CORNERS:
            continue
        board_points, image_points = model.matchImagePoints(corners, corner_ids)
        objects.append(board_points.astype(np.float32))
        pixels.append(image_points.astype(np.float32))
        indices.append(index)
    if len(indices) < LEAST_FRAMES:
        raise ValueError(
            f"the board was found in {len(indices)} of {len(images)} images, at least {LEAST_FRAMES} are needed: check "
            f"across={board.across}, down={board.down} and dictionary={board.dictionary}, and show it larger"
        )
    poses = gripper[indices]
    refuse_turns_about_one_axis(poses)
    if intrinsics is None:
        error, matrix, distortion, turns, shifts = cv2.calibrateCamera(
            objects, pixels, size, None, None, flags=cv2.CALIB_FIX_K3
        )
    else:
        matrix, distortion = intrinsics - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]), np.zeros(5)
        solved = [cv2.solvePnP(o, p, matrix, distortion)[1:] for o, p in zip(objects, pixels, strict=True)]
        turns, shifts = [turn for turn, _ in solved], [shift for _, shift in solved]
        error = _reprojection_error_px(cv2, objects, pixels, turns, shifts, matrix, distortion)
    if error > LARGEST_ERROR_PX:
        raise ValueError(f"the board's corners lie {error:.1f} px off on average: check the board and the images")
    board_in_camera = transform(
        np.stack([np.ravel(shift) for shift in shifts]), np.stack([cv2.Rodrigues(turn)[0] for turn in turns])
    )
    pose, used, spread_m, spread_deg = camera_place(poses, board_in_camera, mounted)
    corner = matrix + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # OpenCV counts from the first pixel's centre
    return CameraResult(
        intrinsics=corner,
        distortion=np.ravel(distortion)[:5],
        pose=pose,
        error_px=float(error),
        spread_m=spread_m,
        spread_deg=spread_deg,
        frames=len(used),
        left_out=len(indices) - len(used),
    )


def largest_displacement(found: CameraResult, width: int, height: int) -> float:
    """Return the largest displacement of an image point by the lens, in pixels, compared with no distortion.

    Args:
        found: with OpenCV's distortion k1, k2, p1, p2, k3. width, height: of the image, pixels.
    """
    columns, rows = np.meshgrid(np.linspace(0, width, 65), np.linspace(0, height, 65))
    x, y, _ = np.linalg.inv(found.intrinsics) @ np.stack([columns.ravel(), rows.ravel(), np.ones(columns.size)])
    k1, k2, p1, p2, k3 = np.pad(found.distortion, (0, 5 - len(found.distortion)))
    square = x**2 + y**2
    radial = k1 * square + k2 * square**2 + k3 * square**3
    shift = np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2),
            y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y,
        ]
    )
    return float(np.linalg.norm(found.intrinsics[:2, :2] @ shift, axis=0).max())


def camera_place(poses: np.ndarray, board: np.ndarray, mounted: bool) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return a camera's pose by `hand_eye` without frames that do not fit: each wrong pose shifts a least-squares fit.

    Args:
        poses: world_from_gripper [N, 4, 4]. board: camera_from_board [N, 4, 4]. mounted: the camera is on the gripper.

    Returns:
        The pose [4, 4] (see `CameraResult.pose`), the indices of the frames used for it, and the spread of the board's
        pose over them (m, the median; degrees).

    Raises:
        ValueError: poses and images do not belong together, or one of the last `LEAST_FRAMES` frames does not fit.
    """
    # in the frame of the gripper that holds the board, a fixed camera is the moving one
    arm = poses if mounted else invert(poses)
    pose, used, spread_m, spread_deg = _fit_without_outliers(arm, board)
    if spread_m > LARGEST_SPREAD_M or spread_deg > LARGEST_SPREAD_DEG:
        other_spread_m = _fit_without_outliers(invert(arm), board)[2]
        raise ValueError(
            f"the board's place, which is one, is spread over {1e3 * spread_m:.0f} mm and {spread_deg:.0f} degrees: "
            "the poses do not fit the images. "
            + (
                f"With mounted={str(not mounted).lower()} it is spread over {1e3 * other_spread_m:.1f} mm: set that"
                if other_spread_m < min(spread_m / 2, LARGEST_SPREAD_M)
                else "Check arm=, mounted=, and that images and poses are of the same moments"
            )
        )
    distance_m, angle_deg, excess = _deviations(arm[used], board[used])
    worst = int(excess.argmax())
    if excess[worst] > 1:
        raise ValueError(
            f"{len(used)} of {len(arm)} images of the board are left, the least that are needed, and one of them does "
            f"not fit the others: its pose puts the board {1e3 * distance_m[worst]:.0f} mm from its place and turns it "
            f"by {angle_deg[worst]:.0f} degrees. Record more images, and hold the arm still in each"
        )
    if len(used) < len(arm):
        log.warning(
            "%d of %d images of the board are left out: their poses put it farther from its place, or turn it more, "
            "than the others' do (%s times the median). Did the arm move, or is the board small in them?",
            len(arm) - len(used),
            len(arm),
            f"{OUTLYING:g}",
        )
    return pose, used, spread_m, spread_deg


def refuse_turns_about_one_axis(poses: np.ndarray) -> None:
    """Raise ValueError if poses [N, 4, 4] rotate too little or about one axis only to determine the camera's pose."""
    most, least = _turns_about_two_axes(poses)
    if min(most, least) < SMALLEST_TURN_DEG:
        raise ValueError(
            f"the gripper turns by {most:.0f} degrees, and by {least:.0f} about a second axis: turn it by at least "
            f"{SMALLEST_TURN_DEG:.0f} about two axes, or the camera's place is not determined"
        )


def _turns_about_two_axes(poses: np.ndarray) -> tuple[float, float]:
    """Return the largest rotations between poses [N, 4, 4] about their main axis and about a second one, degrees."""
    first, second = np.triu_indices(len(poses), 1)
    between = poses[second, :3, :3].transpose(0, 2, 1) @ poses[first, :3, :3]
    turns = Rotation.from_matrix(between).as_rotvec()
    axes = np.linalg.svd(turns, full_matrices=False)[2]
    most, least = np.degrees(np.abs(turns @ axes[:2].T).max(axis=0))
    return float(most), float(least)


def hand_eye(arm: np.ndarray, board: np.ndarray) -> np.ndarray:
    """Return X [4, 4] such that arm[i] @ X @ board[i] is equal for all i; inputs [N, 4, 4] (Park and Martin, 1994).

    The rotation aligns the axes of the motions between frames; the translation follows by least squares.
    """
    first, second = np.triu_indices(len(arm), 1)
    of_arm, of_board = invert(arm[second]) @ arm[first], board[second] @ invert(board[first])
    turns = Rotation.from_matrix(of_arm[:, :3, :3]).as_rotvec(), Rotation.from_matrix(of_board[:, :3, :3]).as_rotvec()
    pose = np.eye(4)
    pose[:3, :3] = Rotation.align_vectors(*turns)[0].as_matrix()
    left = (of_arm[:, :3, :3] - np.eye(3)).reshape(-1, 3)
    right = (of_board[:, :3, 3] @ pose[:3, :3].T - of_arm[:, :3, 3]).reshape(-1)
    pose[:3, 3] = np.linalg.lstsq(left, right, rcond=None)[0]
    return pose


def _fit_without_outliers(arm: np.ndarray, board: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    used = np.arange(len(arm))
    while len(used) > LEAST_FRAMES:
        excess = _deviations(arm[used], board[used])[2]
        if excess.max() <= 1:
            break
        used = np.delete(used, excess.argmax())  # one at a time: each removal changes the fits without the others
    pose = hand_eye(arm[used], board[used])
    boards = arm[used] @ pose @ board[used]
    distances = np.linalg.norm(boards[:, :3, 3] - np.median(boards[:, :3, 3], axis=0), axis=1)
    return pose, used, float(np.median(distances)), _max_rotation_deg(boards) / 2


def _deviations(arm: np.ndarray, board: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the board's pose in each image with a fit to the other images.

    Args:
        arm, board: as for `hand_eye`.

    Returns:
        Deviations in metres [N] and in degrees [N], and the larger of the two relative to the limit above which an
        image does not fit [N]. All are 0 for an image without which the rotations are about one axis: the other images
        do not determine a fit.
    """
    found = np.zeros((3, len(arm)))
    for index in range(len(arm)):
        others = np.delete(np.arange(len(arm)), index)
        if min(_turns_about_two_axes(arm[others])) < SMALLEST_TURN_DEG:
            continue
        boards = arm @ hand_eye(arm[others], board[others]) @ board
        distances = np.linalg.norm(boards[:, :3, 3] - np.median(boards[others, :3, 3], axis=0), axis=1)
        turns = Rotation.from_matrix(boards[:, :3, :3])
        angles = np.degrees((turns[others].mean().inv() * turns).magnitude())
        excess = max(
            distances[index] / max(OUTLYING * float(np.median(distances[others])), OUTLYING_M),
            angles[index] / max(OUTLYING * float(np.median(angles[others])), OUTLYING_DEG),
        )
        found[:, index] = distances[index], angles[index], excess
    return found[0], found[1], found[2]


def _max_rotation_deg(poses: np.ndarray) -> float:
    cosine = (np.einsum("nij,ij->n", poses[:, :3, :3], poses[0, :3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1)).max()))


def _reprojection_error_px(
    cv2: ModuleType,
    objects: Sequence[np.ndarray],
    pixels: Sequence[np.ndarray],
    turns: Sequence[np.ndarray],
    shifts: Sequence[np.ndarray],
    matrix: np.ndarray,
    distortion: np.ndarray,
) -> float:
    residuals = [
        cv2.projectPoints(board_points, turn, shift, matrix, distortion)[0].reshape(-1, 2) - image_points.reshape(-1, 2)
        for board_points, image_points, turn, shift in zip(objects, pixels, turns, shifts, strict=True)
    ]
    return float(np.sqrt((np.concatenate(residuals) ** 2).sum(axis=-1).mean()))


def charuco(
    root: str | Path,
    output: str | Path,
    format: str,
    calibration: str | Path | None,
    camera: str,
    arm: str,
    mounted: bool,
    keep_intrinsics: bool,
    board: Board,
    max_images: int,
) -> dict[str, Any]:
    """Run the step `charuco`: calibrate one camera from a recording of a board and write a calibration file.

    Args:
        root, format, calibration: as for `find_demos`. output: the file to write.
        camera, arm: names in the recording. mounted: the camera moves with this arm and the board is fixed.
        keep_intrinsics: use the recording's K; false: fit K too.
        max_images: number of images to use, evenly spread over all demos.

    Raises:
        ValueError: no such camera or arm, no K to keep, no images, or see `calibrate_camera`.
        FileExistsError: `output` exists.
    """
    refuse_no_selection(None, max_images=max_images)
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"{target} exists: name another file with output=PATH, or remove it")
    references = find_demos(root, format, calibration)
    # the camera to calibrate may be uncalibrated in the recording
    demos = [reference.read(cameras=(camera,), uncalibrated=True) for reference in references]
    demos = [demo for demo in demos if camera in demo.cameras and arm in demo.arms]
    if not demos:
        raise ValueError(f"no demo in {root} has camera {camera!r} and arm {arm!r}")
    track = demos[0].cameras[camera]
    if keep_intrinsics and _has_placeholder_intrinsics(track):
        raise ValueError(
            f"keep_intrinsics=true: {demos[0].name} has no intrinsics of camera {camera!r} to keep; leave it out"
        )
    images, poses = _read_images_and_poses(demos, camera, arm, max_images)
    intrinsics = np.asarray(track.intrinsics[0]) if keep_intrinsics else None
    result = calibrate_camera(images, poses, board, mounted, intrinsics)
    pose_entry = (
        {"mounted_on": arm, "camera_to_gripper": result.pose.tolist()}
        if mounted
        else {"world_to_camera": invert(result.pose).tolist()}
    )
    rotate = _rotation_of(track.frames)
    content = {
        "schema": SCHEMA,
        "conventions": {"camera": "opencv", "pixel": "corner", "length": "m"},
        "cameras": {
            camera: {
                "width": track.width,
                "height": track.height,
                "intrinsics": result.intrinsics.tolist(),
                **pose_entry,
                **({"rotate": rotate} if rotate else {}),  # the frames that were calibrated are turned ones
            }
        },
    }
    with atomic_write(target) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())
    displaced = largest_displacement(result, track.width, track.height)
    if displaced > NOTICED_PX:
        log.warning(
            "camera %s: its lens displaces points of the image by up to %.1f px, and a calibration file holds no "
            "distortion: undistort the images with these coefficients (cv2.undistort) before training, in recordings "
            "and on the robot alike",
            camera,
            displaced,
        )
    return {
        "output": str(target),
        "images": result.frames,
        "images_left_out": result.left_out,
        "reprojection_px": round(result.error_px, 3),
        "board_spread_mm": round(result.spread_m * 1e3, 2),
        "board_spread_deg": round(result.spread_deg, 3),
        "distortion": [round(float(value), 4) for value in result.distortion],
        "distortion_px": round(displaced, 2),
    }


def _has_placeholder_intrinsics(track: CameraTrack) -> bool:
    """Return whether the intrinsics are placeholders, those of a camera without calibration."""
    unknown = CameraTrack.without_calibration(track.width, track.height, track.frames, 1, "")
    return bool(track.uncalibrated) and np.array_equal(track.intrinsics[0], unknown.intrinsics[0])


def _rotation_of(frames: FrameSource) -> int:
    """Return the clockwise degrees by which images are turned on reading, as the recording's calibration file asks."""
    while isinstance(frames, SelectedFrames | OffsetFrames):
        frames = frames.source
    return frames.rotate if isinstance(frames, NumberedFiles | VideoFrames) else 0


def _read_images_and_poses(
    demos: Sequence[Demo], camera: str, arm: str, max_images: int
) -> tuple[list[np.ndarray], np.ndarray]:
    pairs = [(demo, index) for demo in demos for index in range(len(demo))]
    images, poses = [], []
    for pair_index in evenly(len(pairs), max_images):
        demo, index = pairs[pair_index]
        images.append(demo.cameras[camera].frames.read(index))
        track = demo.arms[arm]
        poses.append(transform(track.position[index], matrix_from_quaternion(track.quaternion[index])))
    return images, np.stack(poses)
