"""Small data sets: native folders written by hand, exactly as the format specifies and not through our writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.data.robot.datamodule import RobotDemos

WIDTH, HEIGHT, FRAMES = 48, 40, 12


def write_native_by_hand(
    folder: Path,
    frames: int = FRAMES,
    width: int = WIDTH,
    height: int = HEIGHT,
    level: float = 0.1,
    commanded: bool = True,
    arms: tuple[str, ...] = ("right",),
    cameras: tuple[str, ...] = ("over",),
    seed: int = 0,
) -> Path:
    """Write one demo: the arm moves 5 mm per frame along x at height `level`; commands lead by one frame and are 1 mm
    higher."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    trajectory: dict[str, Any] = {"timestamps_ns": np.arange(frames, dtype=np.int64) * 100_000_000}
    cases: dict[str, Any] = {}
    for number, arm in enumerate(arms):
        path = np.zeros((frames + 1, 3))
        path[:, 0], path[:, 1], path[:, 2] = 0.005 * np.arange(frames + 1), 0.02 * number, level
        angle = 0.05 * np.arange(frames + 1)
        turn = np.stack([np.cos(angle / 2), 0 * angle, 0 * angle, np.sin(angle / 2)], axis=1)
        opening = np.linspace(1, 0, frames + 1)
        trajectory |= {
            f"{arm}/position_m": path[:-1],
            f"{arm}/quaternion_wxyz": turn[:-1],
            f"{arm}/gripper_opening": opening[:-1],
            f"{arm}/joint_positions_rad": rng.normal(size=(frames, 6)),
        }
        if commanded:
            trajectory |= {
                f"{arm}/commanded_position_m": path[1:] + [0, 0, 0.001],
                f"{arm}/commanded_quaternion_wxyz": turn[1:],
                f"{arm}/commanded_gripper_opening": opening[1:],
            }
    world_to_camera = np.diag([1.0, -1.0, -1.0, 1.0])
    world_to_camera[2, 3] = 1.0  # one metre above the table, looking down
    for camera in cameras:
        (folder / "rgb" / camera).mkdir(parents=True)
        for index in range(frames):
            picture = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(picture).save(folder / "rgb" / camera / f"{index:06d}.jpg", quality=95)
        cases[f"{camera}/intrinsics"] = np.array([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]])
        cases[f"{camera}/world_to_camera"] = world_to_camera
    np.savez(folder / "trajectory.npz", **trajectory)
    np.savez(folder / "cameras.npz", **cases)
    (folder / "metadata.json").write_text(
        json.dumps(
            {
                "schema": "keygrip.demo/1",
                "complete": True,
                "robot": "yam",
                "task": "pick",
                "instruction": f"pick up the cube number {seed}",
                "fps": 10.0,
                "frames": frames,
                "arms": list(arms),
                "cameras": {
                    camera: {"width": width, "height": height, "frames": f"rgb/{camera}/%06d.jpg", "depth": None}
                    for camera in cameras
                },
                "conventions": {
                    "quaternion": "wxyz",
                    "world": "z-up, metres",
                    "camera": "opencv, world_to_camera",
                    "pixel": "corner",
                    "gripper": "0 closed, 1 open",
                    "time": "ns",
                },
                "source": {"operator": "test"},
            }
        )
    )
    return folder


@pytest.fixture
def native_demo() -> Callable[..., Path]:
    return write_native_by_hand


@pytest.fixture
def native_root(tmp_path: Path) -> Path:
    """Write ten demos of twelve frames at different heights."""
    root = tmp_path / "demos"
    for number in range(10):
        write_native_by_hand(root / f"demo_{number:02d}", level=0.1 + 0.01 * number, seed=number)
    return root


@pytest.fixture
def robot_demos() -> Callable[..., RobotDemos]:
    """Return a function that builds a data module with small settings; keyword arguments replace them."""

    def make(root: Path | None, **changes: Any) -> RobotDemos:
        settings: dict[str, Any] = {
            "camera": "over",
            "arms": ["right"],
            "image_size": 32,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.25, 0.3),
            "horizon": 3,
            "frame_stride": 2,
            "batch_size": 8,
            "field": 0.8,
            "val_fraction": 0.2,
            "cache_gb": 0.0,
            "num_workers": 0,
        }
        return RobotDemos(root, **(settings | changes))

    return make


def edit_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_archive(path: Path, **changes: np.ndarray | None) -> None:
    """Replace arrays of an .npz file by name (None removes an array). In the keywords, "/" is written as "__"."""
    with np.load(path) as archive:
        content = {key: archive[key] for key in archive.files}
    for key, value in changes.items():
        name = key.replace("__", "/")
        content.pop(name, None)
        if value is not None:
            content[name] = value
    np.savez(path, **content)


@pytest.fixture
def change_metadata() -> Callable[..., None]:
    return edit_metadata


@pytest.fixture
def change_archive() -> Callable[..., None]:
    return edit_archive


def write_counting_video(
    path: Path, frames: int, codec: str = "libx264", gop: int = 12, options: dict[str, str] | None = None
) -> Path:
    """Write a video of 96 x 48 pixels in which frame i shows the number i in binary, as six black or white bars."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(20))
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        stream.options, stream.gop_size = options or {}, gop
        for index in range(frames):
            picture = np.zeros((48, 96, 3), np.uint8)
            for bit in range(6):
                picture[8:40, 16 * bit + 2 : 16 * bit + 14] = 255 * ((index >> bit) & 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def number_shown(picture: np.ndarray) -> int:
    return sum(1 << bit for bit in range(6) if picture[16:32, 16 * bit + 5 : 16 * bit + 11].mean() > 128)


@pytest.fixture
def counting_video() -> Callable[..., Path]:
    return write_counting_video


@pytest.fixture
def shown_number() -> Callable[[np.ndarray], int]:
    return number_shown
