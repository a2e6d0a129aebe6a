"""`data.fit=auto`, tested by projecting the YAM arm's reachable workspace into common cameras."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from looking import looking_at

from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.schema import CameraTrack
from keygrip.data.robot.workspace_view import choose_fit, fit_to_workspace, kept_share
from keygrip.robots.kinematics import arm_chain, forward_kinematics

PRODUCTION = ImageGeometry(448, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), field=0.95)  # of experiment=yam_dinov3


@pytest.fixture(scope="module")
def reachable() -> np.ndarray:
    """Return [M, 3] positions that the arm reaches above the table and in front of its base."""
    limits = arm_chain().limits
    joints = np.random.default_rng(0).uniform(limits[:, 0], limits[:, 1], (4000, len(limits)))
    positions = forward_kinematics(joints)[0]
    return positions[(positions[:, 2] > 0) & (positions[:, 2] < 0.5) & (positions[:, 0] > 0.1)]


def camera(width: int, height: int, points: np.ndarray, fill: float, wide: bool) -> CameraTrack:
    """Return a camera in front of the table. The points fill the share `fill` of its image, in width or in the
    direction that is filled first."""
    eye, target = np.array([1.4, 0.0, 0.9]), points.mean(axis=0)
    pose = looking_at(eye, target)
    seen = points @ pose[:3, :3].T + pose[:3, 3]
    spread = np.abs(seen[:, :2] / seen[:, 2:]).max(axis=0)
    across, down = fill * width / 2 / spread[0], fill * height / 2 / spread[1]
    focal = across if wide else min(across, down)
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    matrices = CameraTrack.broadcast(intrinsics, 3), CameraTrack.broadcast(pose, 3)
    return CameraTrack(width, height, *matrices, frames=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1280, 720), (640, 480), (1024, 768), (640, 360)])
@pytest.mark.parametrize("fill", [0.5, 0.98])
@pytest.mark.parametrize("wide", [True, False])
def test_the_reachable_workspace_stays_in_view(
    reachable: np.ndarray, size: tuple[int, int], fill: float, wide: bool
) -> None:
    track = camera(*size, reachable, fill, wide)
    chosen, shares = choose_fit(PRODUCTION, {"over": [track, track]}, reachable)
    assert shares["over"] == kept_share(chosen, [track], reachable)
    assert shares["over"][0] >= 0.95
    cropped = kept_share(PRODUCTION, [track], reachable)[0]
    assert (chosen == PRODUCTION) == (cropped >= 0.95)  # the central crop wherever it shows enough
    if size == (1280, 720) and wide and fill == 0.98:
        assert cropped < 0.8  # the share that the recipe's crop showed
        assert chosen.fit == "stretch"


def test_the_data_module_chooses_and_says_so(
    native_root: Path, robot_demos: Callable[..., RobotDemos], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="keygrip")
    narrow, wide = (robot_demos(native_root, fit="auto", field=field) for field in (0.9, 0.03))
    for data in (narrow, wide):
        data.setup("fit")
        assert data.statistics.geometry == data.geometry
    assert (narrow.geometry.fit, narrow.geometry.field) == ("crop", 0.9)
    assert "data.fit=auto: fit=crop field=0.9" in caplog.text
    assert wide.geometry.field == 1.0  # such a small part of the image would not be enough
    assert "camera over sees 100.0 % of the workspace, the network 100.0 % of that" in caplog.text
    size = narrow.demos[0].cameras["over"]
    assert size.width > size.height
    across = 90 * size.height / size.width
    said = f"camera over: the network sees {across:.0f} % of the width and 90 % of the height of {size.width} x "
    assert said in caplog.text


def test_the_whole_image_of_all_cameras_where_one_is_not_calibrated(
    native_root: Path, robot_demos: Callable[..., RobotDemos], caplog: pytest.LogCaptureFixture
) -> None:
    data = robot_demos(native_root, fit="auto", field=0.857)
    data.setup("fit")
    known = data.train_demos
    found = [demo.cameras["over"].frames for demo in known]
    wide = [
        CameraTrack.without_calibration(1280, 720, frames, len(demo), "no calibration file")
        for demo, frames in zip(known, found, strict=True)
    ]
    for cameras in (("hand",), ("over", "hand")):
        caplog.clear()
        demos = [
            replace(demo, cameras={**demo.cameras, "hand": track}) for demo, track in zip(known, wide, strict=True)
        ]
        chosen = fit_to_workspace(demos, cameras, data.arms, data.geometry)
        assert (chosen.fit, chosen.field) == ("stretch", 1.0)
        assert "camera hand is not known" in caplog.text
    demos[1:] = known[1:]  # one calibrated demonstration is enough
    demos[-1] = replace(known[-1], cameras={**known[-1].cameras, "hand": known[-1].cameras["over"]})
    assert fit_to_workspace(demos, ("over", "hand"), data.arms, data.geometry) == data.geometry
