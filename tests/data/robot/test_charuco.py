"""ChArUco calibration: a rendered board gives back the lens and the camera's place on the hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.data.robot.charuco import Board, calibrate_camera, charuco_board

pytestmark = pytest.mark.opencv
K = np.array([[420.0, 0, 322.0], [0, 425.0, 238.0], [0, 0, 1]])
BOARD = Board()


def pose(turn: list[float], place: list[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_rotvec(turn).as_matrix(), place
    return matrix


def rendered(camera_from_board: np.ndarray) -> np.ndarray:
    """The board's image through K (corner convention), 640 x 480."""
    import cv2

    scale = 4000  # pixels of the drawn board for each metre
    flat = charuco_board(BOARD).generateImage((round(7 * 0.03 * scale), round(5 * 0.03 * scale)))
    to_board = np.diag([1 / scale, 1 / scale, 1.0])
    to_board[:2, 2] = 0.5 / scale
    plane = camera_from_board[:3][:, [0, 1, 3]]
    centres = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    image = cv2.warpPerspective(flat, centres @ K @ plane @ to_board, (640, 480), flags=cv2.INTER_AREA, borderValue=200)
    return np.repeat(image[..., None], 3, axis=2)


@pytest.mark.parametrize("mounted", [True, False])
def test_board_gives_lens_and_place(mounted: bool) -> None:
    rng = np.random.default_rng(0)
    true = pose([0.1, -0.2, 0.3], [0.02, -0.05, 0.06]) if mounted else pose([2.2, 0.1, -0.2], [0.6, 0.1, 0.5])
    fixed = pose([0, 0, 0.4], [0.3, 0.1, 0.0]) if mounted else pose([0.1, 0.3, 0.2], [0.01, 0.02, 0.03])
    images, poses = [], []
    while len(images) < 14:
        camera_from_board = pose(rng.uniform(-0.45, 0.45, 3).tolist(), [-0.1, -0.07, rng.uniform(0.3, 0.45)])
        images.append(rendered(camera_from_board))
        board_in_arm = fixed @ np.linalg.inv(camera_from_board) @ np.linalg.inv(true)
        poses.append(board_in_arm if mounted else true @ camera_from_board @ np.linalg.inv(fixed))
    found = calibrate_camera(images, np.stack(poses), BOARD, mounted)
    off = np.linalg.inv(found.pose) @ true
    assert np.abs(found.intrinsics - K).max() < 3.0
    assert np.linalg.norm(off[:3, 3]) < 0.004
    assert np.degrees(Rotation.from_matrix(off[:3, :3]).magnitude()) < 0.4
    assert found.error_px < 0.5


def test_a_gripper_that_does_not_turn_is_refused() -> None:
    image = rendered(pose([0.1, 0.1, 0.0], [-0.1, -0.07, 0.35]))
    with pytest.raises(ValueError, match="turns by 0 degrees"):
        calibrate_camera([image] * 8, np.stack([np.eye(4)] * 8), BOARD, True)
