"""Native folders: what is read, what is refused by name, and what the writer leaves on the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flushes import Flushes
from macos import leave_notes
from PIL import Image
from robot_mutations import ROUNDS, assert_damage_is_found, contents

from keygrip.artifacts import DiskFullError
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.frames import JpegFrames, VideoFrames
from keygrip.data.robot.native import read_native
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter, write_demo
from keygrip.data.robot.schema import DemoError


def test_a_folder_written_by_hand_reads_to_the_letter(tmp_path: Path, native_demo: Callable[..., Path]) -> None:
    folder = native_demo(tmp_path / "root" / "demo", level=0.2)
    (reference,) = find_demos(tmp_path / "root")
    demo = reference.read()
    assert (demo.name, demo.robot, demo.task, demo.fps, len(demo)) == ("demo", "yam", "pick", 10.0, 12)
    assert demo.source == {"operator": "test"}
    arm, track = demo.arms["right"], demo.cameras["over"]
    with np.load(folder / "trajectory.npz") as stored:
        np.testing.assert_array_equal(arm.position, stored["right/position_m"])
        np.testing.assert_array_equal(arm.quaternion, stored["right/quaternion_wxyz"])
        np.testing.assert_array_equal(arm.gripper, stored["right/gripper_opening"])
        np.testing.assert_array_equal(arm.joints, stored["right/joint_positions_rad"])
        assert arm.commanded is not None
        np.testing.assert_array_equal(arm.commanded.position, stored["right/commanded_position_m"])
        np.testing.assert_array_equal(demo.timestamps, stored["timestamps_ns"])
    assert track.intrinsics.shape == (12, 3, 3)
    assert track.intrinsics.strides[0] == 0  # one matrix for all frames, not twelve copies
    assert track.world_to_camera.shape == (12, 4, 4)
    assert (track.width, track.height, len(track.frames)) == (48, 40, 12)
    picture = track.frames.read(7)
    np.testing.assert_array_equal(picture, np.asarray(Image.open(folder / "rgb" / "over" / "000007.jpg")))


def test_a_folder_with_the_metadata_of_the_documents_is_read(
    tmp_path: Path, native_demo: Callable[..., Path], change_archive: Callable[..., None]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?s)```json\n(.*?)```", page)
    metadata = json.loads(block)
    over = metadata["cameras"]["over"]
    size = {"width": over["width"], "height": over["height"], "frames": metadata["frames"]}
    folder = native_demo(tmp_path / "root" / "demo", cameras=("over", "front"), **size)
    (folder / "metadata.json").write_text(block)
    change_archive(folder / "cameras.npz", front__intrinsics=None, front__world_to_camera=None)
    change_archive(folder / "trajectory.npz", intervention=np.arange(metadata["frames"]) > 50)
    (folder / "depth" / "over").mkdir(parents=True)
    for index in range(metadata["frames"]):
        picture = np.full((over["height"], over["width"]), 900, np.uint16)
        Image.fromarray(picture).save(folder / (over["depth"] % index))
    (reference,) = find_demos(tmp_path / "root")
    assert list(reference.read().cameras) == ["over"]
    demo = read_native(folder)
    assert (demo.instruction, demo.source, len(demo)) == (metadata["instruction"], metadata["source"], 60)
    assert demo.intervention is not None
    assert demo.intervention.sum() == 9
    assert demo.cameras["over"].depth is not None
    assert demo.cameras["front"].uncalibrated == metadata["cameras"]["front"]["uncalibrated"]


def test_notes_of_macos_are_no_demos(tmp_path: Path, native_demo: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        native_demo(tmp_path / "root" / name)
    before = contents(tmp_path / "root")
    leave_notes(tmp_path / "root")
    assert [reference.name for reference in find_demos(tmp_path / "root")] == ["a", "b"]
    assert contents(tmp_path / "root") == before


def test_references_and_demos_travel_to_other_processes(tmp_path: Path, native_demo: Callable[..., Path]) -> None:
    native_demo(tmp_path / "root" / "demo")
    (reference,) = pickle.loads(pickle.dumps(find_demos(tmp_path / "root")))
    demo = pickle.loads(pickle.dumps(reference.read()))
    assert demo.cameras["over"].frames.read(3).shape == (40, 48, 3)


def quaternion(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    with np.load(folder / "trajectory.npz") as stored:
        return change(stored["right/quaternion_wxyz"])


def mirrored() -> np.ndarray:
    return np.diag([1.0, 1.0, -1.0, 1.0])


def with_nan(value: np.ndarray, frame: int) -> np.ndarray:
    value = value.copy()
    value[frame] = np.nan
    return value


CENTIMETRES_BELOW_10 = np.array([2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 12.0])[:, None] * np.eye(3)[0]
NEAR_BASE_CM = np.array([2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 20, 25.0])[:, None] * [1.0, 0.0, 0.0]

BREAKAGES: dict[str, tuple[Callable[[Path, Any, Any], object], str]] = {
    "no completion mark": (lambda f, m, a: (f / "metadata.json").unlink(), "no completion mark"),
    "not complete": (lambda f, m, a: m(f, complete=False), "no completion mark"),
    "metadata cut": (lambda f, m, a: (f / "metadata.json").write_text('{"schema": '), "not JSON"),
    "other schema": (lambda f, m, a: m(f, schema="keygrip.demo/2"), "schema is 'keygrip.demo/2'"),
    "quaternion order": (
        lambda f, m, a: m(
            f, conventions=json.loads((f / "metadata.json").read_text())["conventions"] | {"quaternion": "xyzw"}
        ),
        "convention 'quaternion' is 'xyzw', 'wxyz' is needed",
    ),
    "gripper polarity": (
        lambda f, m, a: m(
            f,
            conventions=json.loads((f / "metadata.json").read_text())["conventions"] | {"gripper": "1 closed, 0 open"},
        ),
        "convention 'gripper'",
    ),
    "metadata key": (lambda f, m, a: m(f, cameras={}), "names no camera"),
    "nan position": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=with_nan(np.zeros((12, 3)), 5)),
        "position of arm 'right' is NaN or infinite, first at frame 5",
    ),
    "nan command": (
        lambda f, m, a: a(f / "trajectory.npz", right__commanded_gripper_opening=with_nan(np.ones(12), 11)),
        "commanded gripper opening of arm 'right' is NaN",
    ),
    "quaternion norm": (
        lambda f, m, a: a(f / "trajectory.npz", right__quaternion_wxyz=quaternion(f, lambda q: 1.05 * q)),
        "norm 1.05.*w, x, y, z",
    ),
    "gripper range": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(0, 70, 12)),
        "0 to 70",
    ),
    "centimetres": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=np.full((12, 3), 34.0)),
        "divide centimetres by 100: the farthest is then 0.34 m",
    ),
    "millimetres": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=np.full((12, 3), 340.0)),
        "divide millimetres by 1000: the farthest is then 0.34 m",
    ),
    "centimetres or millimetres": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=np.full((12, 3), 150.0)),
        "divide centimetres by 100: the farthest is then 1.5 m, or divide millimetres by 1000: the farthest is then "
        "0.15 m",
    ),
    "centimetres near the base": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=NEAR_BASE_CM),
        "divide centimetres by 100: the farthest is then 0.25 m",
    ),
    "a wrong reading": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=np.eye(12, 3) * 34),
        "at frame 0, more than the 10 m of any arm on a table. Cut the demo there",
    ),
    "a wrong reading in a wide world": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=3 + np.eye(12, 3) * 31),
        "is 34 m from the origin at frame 0, more than the 10 m of any arm on a table. Cut the demo there",
    ),
    "centimetres of which few are beyond 10 m": (
        lambda f, m, a: a(f / "trajectory.npz", right__position_m=CENTIMETRES_BELOW_10),
        "where single readings stand apart, else convert positions to metres",
    ),
    "gripper in percent": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(0, 90, 12)),
        "Percent are likely: divide by 100; else subtract what it reads when closed, and divide by its range",
    ),
    "gripper in bytes": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(0, 230, 12)),
        "Bytes are likely: divide by 255",
    ),
    "gripper in millimetres": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(0, 80, 12)),
        "Subtract what it reads when closed",
    ),
    "gripper the other way": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(-0.4, 0, 12)),
        "Subtract what it reads when closed",
    ),
    "gripper that overshoots": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(-0.01, 1.02, 12)),
        "It overshoots: clip it, or calibrate",
    ),
    "gripper in degrees": (
        lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.linspace(-90, 10, 12)),
        "Subtract what it reads when closed",
    ),
    "lengths": (lambda f, m, a: a(f / "trajectory.npz", right__gripper_opening=np.ones(11)), r"shape \(11,\)"),
    "frames": (lambda f, m, a: m(f, frames=11), "11 frames"),
    "time runs back": (
        lambda f, m, a: a(f / "trajectory.npz", timestamps_ns=np.array([0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10, 11])),
        "time stamps do not increase at frame 4",
    ),
    "no arm": (lambda f, m, a: m(f, arms=["left"]), "no 'left/position_m'"),
    "no trajectory": (lambda f, m, a: (f / "trajectory.npz").unlink(), "trajectory.npz is missing"),
    "trajectory cut": (
        lambda f, m, a: (f / "trajectory.npz").write_bytes((f / "trajectory.npz").read_bytes()[:500]),
        "trajectory.npz cannot be read",
    ),
    "no intrinsics": (lambda f, m, a: a(f / "cameras.npz", over__intrinsics=None), "no 'over/intrinsics'"),
    "intrinsics of another picture": (
        lambda f, m, a: a(f / "cameras.npz", over__intrinsics=np.array([[40.0, 0, 320], [0, 40.0, 240], [0, 0, 1]])),
        "another resolution",
    ),
    "focal length in metres": (
        lambda f, m, a: a(f / "cameras.npz", over__intrinsics=np.array([[0.004, 0, 24], [0, 0.004, 20], [0, 0, 1]])),
        "do not fit an image of 48 x 40",
    ),
    "intrinsics transposed": (
        lambda f, m, a: a(f / "cameras.npz", over__intrinsics=np.array([[40.0, 0, 0], [0, 40.0, 0], [24, 20, 1]])),
        "intrinsics are not",
    ),
    "pose not rigid": (
        lambda f, m, a: a(f / "cameras.npz", over__world_to_camera=np.diag([1.0, 1.01, 1.0, 1.0])),
        "not a rigid transform",
    ),
    "pose mirrors": (lambda f, m, a: a(f / "cameras.npz", over__world_to_camera=mirrored()), "determinant -1"),
    "camera without a size": (
        lambda f, m, a: m(f, cameras={"over": {"height": 40, "frames": "rgb/over/%06d.jpg"}}),
        "camera 'over' of metadata.json has no 'width'",
    ),
    "camera folder": (lambda f, m, a: shutil.rmtree(f / "rgb" / "over"), "folder over is missing"),
    "a picture is missing": (
        lambda f, m, a: (f / "rgb" / "over" / "000004.jpg").unlink(),
        "1 of 12 images are missing, first 000004.jpg",
    ),
    "last picture cut": (
        lambda f, m, a: (f / "rgb" / "over" / "000011.jpg").write_bytes(
            (f / "rgb" / "over" / "000011.jpg").read_bytes()[:300]
        ),
        "camera 'over'",
    ),
    "picture size": (
        lambda f, m, a: Image.new("RGB", (20, 20)).save(f / "rgb" / "over" / "000000.jpg"),
        r"frame 0 is \(20, 20, 3\)",
    ),
    "path outside": (
        lambda f, m, a: m(f, cameras={"over": {"width": 48, "height": 40, "frames": "../x/%06d.jpg", "depth": None}}),
        "inside the demo",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_each_broken_demo_is_named_with_its_reason(
    kind: str, tmp_path: Path, native_demo: Any, change_metadata: Any, change_archive: Any
) -> None:
    native_demo(tmp_path / "root" / "a_good")
    folder = native_demo(tmp_path / "root" / "b_broken")
    breakage, message = BREAKAGES[kind]
    breakage(folder, change_metadata, change_archive)
    good, broken = find_demos(tmp_path / "root")
    good.read()
    with pytest.raises(DemoError, match=message) as caught:
        broken.read()
    assert caught.value.name == "b_broken"
    assert str(caught.value).startswith("demo 'b_broken': ")
    assert "\n" not in str(caught.value)


def test_rounding_is_no_breakage(tmp_path: Path, native_demo: Any, change_archive: Any) -> None:
    folder = native_demo(tmp_path / "root" / "demo")
    opening = np.linspace(-0.0005, 1.0005, 12)
    long = quaternion(folder, lambda q: 1.005 * q)
    change_archive(folder / "trajectory.npz", right__quaternion_wxyz=long, right__gripper_opening=opening)
    arm = find_demos(tmp_path / "root")[0].read().arms["right"]
    np.testing.assert_allclose(arm.quaternion, long / 1.005, atol=1e-12)
    assert (arm.gripper.min(), arm.gripper.max()) == (0, 1)


def test_demos_in_task_folders_are_found_in_order_and_hidden_ones_passed_over(tmp_path: Path, native_demo: Any) -> None:
    for name in ("stack/b", "pick/a", "pick/.c.host-123-abc.writing", "stack/a"):
        native_demo(tmp_path / name)
    assert [reference.name for reference in find_demos(tmp_path)] == ["pick/a", "stack/a", "stack/b"]


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path, native_demo: Any) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none'} does not exist; name a folder")):
        find_demos(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is empty.*data\.root=PATH \(of keygrip prepare: root=PATH\)"):
        find_demos(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        find_demos(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"looked for native.*raiden.*yam_abc.*lerobot_v3.*libero"):
        find_demos(tmp_path / "other")
    with pytest.raises(ValueError, match=r"unknown data format 'nativ'"):
        find_demos(tmp_path / "other", format="nativ")
    native_demo(tmp_path / "root" / "demo")
    with pytest.raises(ValueError, match=r"calibration=cal\.json has no effect"):
        find_demos(tmp_path / "root", calibration="cal.json")


def record(folder: Path, frames: int = 5, moving_camera: bool = False, **options: Any) -> DemoWriter:
    rng = np.random.default_rng(3)
    with DemoWriter(folder, "yam", "pick", "pick it up", 10.0, source={"seed": 1}, **options) as writer:
        for index in range(frames):
            pose = np.eye(4)
            pose[2, 3] = 1 + 0.1 * index * moving_camera
            reached = ArmPose(rng.normal(size=3), np.array([1.0, 0, 0, 0]), 0.5, rng.normal(size=6))
            writer.add(
                index * 10**8,
                {"over": np.full((16, 32, 3), 40 * index, np.uint8)},
                {"over": CameraPose(np.array([[30.0, 0, 16], [0, 30.0, 8], [0, 0, 1]]), pose)},
                {"right": reached},
                {"right": ArmPose(reached.position + 1, reached.quaternion, 0.25)},
                {"over": np.full((16, 32), 1000 + index, np.uint16)},
            )
        writer.text = {"captions": ["a cube is lifted"], "questions": []}
    return writer


def test_written_demos_read_back_equal(tmp_path: Path) -> None:
    record(tmp_path / "root" / "demo")
    (reference,) = find_demos(tmp_path / "root")
    demo = reference.read()
    rng = np.random.default_rng(3)
    arm = demo.arms["right"]
    for index in range(5):
        np.testing.assert_array_equal(arm.position[index], rng.normal(size=3))
        np.testing.assert_array_equal(arm.joints[index], rng.normal(size=6))
        assert abs(int(demo.cameras["over"].frames.read(index).mean()) - 40 * index) <= 1
        assert (demo.cameras["over"].depth.read(index) == 1000 + index).all()
    np.testing.assert_array_equal(arm.commanded.position, arm.position + 1)
    assert (demo.source, demo.text["captions"]) == ({"seed": 1}, ["a cube is lifted"])
    with np.load(tmp_path / "root" / "demo" / "cameras.npz") as cameras:
        assert cameras["over/world_to_camera"].shape == (4, 4)  # stored once where it never moved


@pytest.mark.parametrize("video", [False, True])
def test_a_demo_is_on_the_disk_before_it_has_its_name(
    video: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut it would count as recorded, without its images."""
    flushes = Flushes(monkeypatch, tmp_path / "demo")
    record(tmp_path / "demo", video=video)
    counts = {str(path.relative_to(tmp_path)): flushes.before_target(path) for path in tmp_path.rglob("*")}
    images = ["demo/rgb/over.mp4"] if video else [f"demo/rgb/over/{index:06d}.jpg" for index in range(5)]
    depth = [f"demo/depth/over/{index:06d}.png" for index in range(5)]
    assert {counts[name] for name in (*images, *depth, "demo/trajectory.npz", "demo/cameras.npz")} == {1}  # none twice
    assert all(counts.values())
    assert flushes.after_target(tmp_path) == 1


def test_a_moving_camera_is_stored_by_frame(tmp_path: Path) -> None:
    record(tmp_path / "root" / "demo", moving_camera=True)
    track = find_demos(tmp_path / "root")[0].read().cameras["over"]
    np.testing.assert_allclose(track.world_to_camera[:, 2, 3], [1.0, 1.1, 1.2, 1.3, 1.4])
    assert track.intrinsics.strides[0] == 0


def test_an_interrupted_or_discarded_recording_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DemoWriter(tmp_path / "demo", "yam", "pick", "", 10.0) as writer:
        writer.add(
            0,
            {"over": np.zeros((16, 16, 3), np.uint8)},
            {"over": CameraPose(np.eye(3), np.eye(4))},
            {"right": ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 0.0)},
        )
        raise KeyboardInterrupt
    with DemoWriter(tmp_path / "demo", "yam", "pick", "", 10.0) as writer:
        writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", [False, True])
def test_a_signal_within_a_frame_costs_that_frame_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: bool
) -> None:
    """The recorder of corrections keeps what was recorded before Ctrl-C."""
    save, saved = Image.Image.save, []

    def interrupted(self: Image.Image, path: Path, **options: Any) -> None:
        saved.append(path)
        if path.name == ("000003.png" if depth else "000003.jpg"):
            raise KeyboardInterrupt
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with DemoWriter(tmp_path / "root" / "demo", "yam", "pick", "pick it up", 10.0) as writer:
        for index in range(4):
            with pytest.raises(KeyboardInterrupt) if index == 3 else contextlib.nullcontext():
                writer.add(
                    index * 10**8,
                    {"over": np.full((16, 16, 3), index, np.uint8)},
                    {"over": CameraPose(np.diag([30.0, 30.0, 1.0]), np.eye(4))},
                    {"right": ArmPose(np.full(3, index), np.array([1.0, 0, 0, 0]), 0.0)},
                    depth={"over": np.ones((16, 16), np.uint16)} if depth else None,
                )
    assert len(saved) == (8 if depth else 4)
    demo = find_demos(tmp_path / "root")[0].read()
    assert demo.arms["right"].position[:, 0].tolist() == [0, 1, 2]
    assert not list(tmp_path.rglob("000003.*"))


def test_arrays_that_the_caller_changes_later_are_stored_as_they_were(tmp_path: Path) -> None:
    position, matrix = np.zeros(3), np.eye(4)
    with DemoWriter(tmp_path / "root" / "demo", "yam", "pick", "pick it up", 10.0) as writer:
        for index in range(3):
            position[:], matrix[2, 3] = index, 1 + index
            writer.add(
                index * 10**8,
                {"over": np.zeros((16, 16, 3), np.uint8)},
                {"over": CameraPose(np.diag([30.0, 30.0, 1.0]), matrix)},
                {"right": ArmPose(position, np.array([1.0, 0, 0, 0]), 0.0)},
            )
    demo = find_demos(tmp_path / "root")[0].read()
    assert demo.arms["right"].position[:, 0].tolist() == [0, 1, 2]
    assert demo.cameras["over"].world_to_camera[:, 2, 3].tolist() == [1, 2, 3]


def test_a_full_disk_names_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DiskFullError, match=f"no space left for {tmp_path / 'demo'}: free some"):
        record(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["", "rgb/over/000000.jpg", "depth"])
def test_a_recording_whose_files_are_removed_meanwhile_is_not_published(tmp_path: Path, lost: str) -> None:
    with (
        pytest.raises(FileNotFoundError, match=rf"\.demo\..* was removed while {tmp_path / 'demo'} was written"),
        DemoWriter(tmp_path / "demo", "yam", "pick", "", 10.0) as writer,
    ):
        for index in range(4):
            writer.add(
                index,
                {"over": np.zeros((16, 16, 3), np.uint8)},
                {"over": CameraPose(np.eye(3), np.eye(4))},
                {"right": ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 0.0)},
                depth={"over": np.ones((16, 16), np.uint16)},
            )
            if index == 1:
                (hidden,) = tmp_path.iterdir()
                removed = next(hidden.rglob(lost)) if lost else hidden
                shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
    assert list(tmp_path.iterdir()) == []


def test_until_the_end_the_folder_has_no_name(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watched(DemoWriter):
        def _finish(self) -> None:
            seen.append([path.name for path in tmp_path.glob("[!.]*")])
            super()._finish()
            seen.append([path.name for path in tmp_path.glob("[!.]*")])

    with Watched(tmp_path / "demo", "yam", "pick", "", 10.0) as writer:
        for index in range(2):
            writer.add(
                index,
                {"over": np.zeros((16, 16, 3), np.uint8)},
                {"over": CameraPose(np.eye(3), np.eye(4))},
                {"right": ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 0.0)},
            )
    assert seen == [[], ["demo"]]


def test_the_writer_refuses_what_would_not_read_back(tmp_path: Path) -> None:
    record(tmp_path / "demo")
    with pytest.raises(FileExistsError, match="exists already"):
        DemoWriter(tmp_path / "demo", "yam", "pick", "", 10.0)
    pose, view = ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 0.0), CameraPose(np.eye(3), np.eye(4))
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="arms of"), DemoWriter(tmp_path / "x", "yam", "pick", "", 10.0) as writer:
        writer.add(0, {"over": picture}, {"over": view}, {"right": pose})
        writer.add(1, {"over": picture}, {"over": view}, {"left": pose})
    with pytest.raises(ValueError, match="frame 1 is"), DemoWriter(tmp_path / "x", "yam", "pick", "", 10.0) as writer:
        writer.add(0, {"over": picture}, {"over": view}, {"right": pose})
        writer.add(1, {"over": picture[:8]}, {"over": view}, {"right": pose})
    with pytest.raises(ValueError, match="at least 2"), DemoWriter(tmp_path / "x", "yam", "pick", "", 10.0) as writer:
        writer.add(0, {"over": picture}, {"over": view}, {"right": pose})
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((16, 32), 1.5, np.float32), "depth holds float32; uint16 millimetres are needed"),
        (np.full((16, 32), 70_000, np.int32), "depth holds int32 from 70000 to 70000"),
        (np.full((8, 16), 900, np.uint16), r"depth is \(8, 16\), its image \(16, 32\)"),
    ],
)
def test_depth_that_the_readers_would_refuse_is_not_written(
    values: np.ndarray, said: str, video: bool, tmp_path: Path
) -> None:
    """The frames before and after it are a whole demo."""
    record(tmp_path / "jpeg")
    picture = (tmp_path / "jpeg/rgb/over/000003.jpg").read_bytes()
    view = CameraPose(np.array([[30.0, 0, 16], [0, 30.0, 8], [0, 0, 1]]), np.eye(4))
    pose = ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 0.0)
    with DemoWriter(tmp_path / "demos/demo", "yam", "pick", "", 10.0, video=video) as writer:
        for index in range(3):
            image = np.full((16, 32, 3), 40 * index, np.uint8)
            for wrong in (image, picture):
                with pytest.raises(ValueError, match=f"camera 'over': {said}"):
                    writer.add(index, {"over": wrong}, {"over": view}, {"right": pose}, depth={"over": values})
            good = {"over": np.full((16, 32), 900 + index)}  # int64
            writer.add(index * 10**8, {"over": image}, {"over": view}, {"right": pose}, depth=good)
    (reference,) = find_demos(tmp_path / "demos")
    camera = reference.read().cameras["over"]
    assert [int(camera.depth.read(index).min()) for index in range(3)] == [900, 901, 902]
    means = [float(camera.frames.read(index).mean()) for index in range(3)]
    np.testing.assert_allclose(means, [0, 40, 80], atol=6)


def test_import_copies_jpeg_bytes_and_keeps_everything(tmp_path: Path, native_demo: Any) -> None:
    source = native_demo(tmp_path / "a" / "demo", arms=("left", "right"), cameras=("over", "wrist"))
    demo = read_native(source)
    write_demo(demo, tmp_path / "b" / "demo", cameras=["over"])
    copy = find_demos(tmp_path / "b")[0].read()
    assert set(copy.cameras) == {"over"}
    for arm in ("left", "right"):
        np.testing.assert_array_equal(copy.arms[arm].quaternion, demo.arms[arm].quaternion)
        np.testing.assert_array_equal(copy.arms[arm].commanded.gripper, demo.arms[arm].commanded.gripper)
    assert (tmp_path / "b/demo/rgb/over/000003.jpg").read_bytes() == (source / "rgb/over/000003.jpg").read_bytes()
    with pytest.raises(DemoError, match="no camera 'front'"):
        write_demo(demo, tmp_path / "c", cameras=["front"])


def test_video_demos_read_back_frame_by_frame(tmp_path: Path) -> None:
    record(tmp_path / "root" / "demo", frames=7, video=True)
    track = find_demos(tmp_path / "root")[0].read().cameras["over"]
    for index in (6, 0, 3, 2, 5):
        assert abs(int(track.frames.read(index).mean()) - min(255, 40 * index)) <= 2


def test_turned_images(tmp_path: Path) -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[0, 0] = 200
    Image.fromarray(picture).save(tmp_path / "0.png")
    for rotate, corner, shape in ((90, (0, -1), (3, 2)), (180, (-1, -1), (2, 3)), (270, (-1, 0), (3, 2))):
        turned = JpegFrames(tmp_path, "%d.png", 1, rotate=rotate).read(0)
        assert turned.shape[:2] == shape
        assert (turned[corner] == 200).all()
        assert turned.sum() == 600
    with pytest.raises(ValueError, match="rotate must be"):
        JpegFrames(tmp_path, "%d.png", 1, rotate=45)


def test_images_of_more_than_8_bits_do_not_become_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 3), 700, np.uint16)).save(tmp_path / "0.png")  # depth in millimetres
    with pytest.raises(ValueError, match=r"0\.png: it has more than 8 bits per pixel \(mode I;16\)"):
        JpegFrames(tmp_path, "%d.png", 1).read(0)


VIDEOS: dict[str, tuple[str, str, int, dict[str, str]]] = {
    "B-frames": ("mp4", "libx264", 12, {"bf": "3"}),
    "open groups": ("mp4", "libx264", 8, {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
    "one group": ("mp4", "libx264", 250, {"bf": "3"}),
    "matroska": ("mkv", "libx264", 7, {"bf": "2"}),
    "transport stream": ("ts", "libx264", 12, {"bf": "3"}),
    "mpeg4": ("mp4", "mpeg4", 9, {"bf": "2"}),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_video_frames_are_exact_in_any_order(kind: str, tmp_path: Path, counting_video: Any, shown_number: Any) -> None:
    ending, codec, gop, options = VIDEOS[kind]
    video = VideoFrames(counting_video(tmp_path / f"video.{ending}", 60, codec, gop, options))
    assert len(video) == 60
    rng = np.random.default_rng(0)
    order = [*range(60), *rng.integers(0, 60, 60).tolist(), *range(59, -1, -1)]
    assert [shown_number(video.read(index)) for index in order] == order


def test_more_videos_than_stay_open(tmp_path: Path, counting_video: Any, shown_number: Any) -> None:
    videos = [VideoFrames(counting_video(tmp_path / f"{number}.mp4", 5 + number)) for number in range(20)]
    assert [len(video) for video in videos] == list(range(5, 25))
    for index in (4, 0, 2):
        assert {shown_number(video.read(index)) for video in videos} == {index}


def test_a_video_that_was_replaced_is_read_anew(tmp_path: Path, counting_video: Any, shown_number: Any) -> None:
    video = VideoFrames(counting_video(tmp_path / "video.mp4", 9))
    assert (len(video), shown_number(video.read(8))) == (9, 8)
    before = video.identity()
    counting_video(tmp_path / "video.mp4", 30)
    assert (len(video), shown_number(video.read(29))) == (30, 29)
    assert video.identity() != before


def test_a_part_of_a_video_and_its_bounds(tmp_path: Path, counting_video: Any, shown_number: Any) -> None:
    path = counting_video(tmp_path / "video.mp4", 40)
    part = VideoFrames(path, frames=10, start=17)  # starts between key frames
    assert [shown_number(part.read(index)) for index in (9, 0, 4)] == [26, 17, 21]
    with pytest.raises(IndexError, match="frames 0 to 9"):
        part.read(10)
    with pytest.raises(OSError, match="holds 40 frames, 45 are needed; it is cut off"):
        VideoFrames(path, frames=10, start=35).verify()
    turned = VideoFrames(path, rotate=180).read(5)
    assert shown_number(turned[::-1, ::-1]) == 5


def test_a_video_that_starts_between_key_frames(tmp_path: Path, counting_video: Any, shown_number: Any) -> None:
    import av

    whole = counting_video(tmp_path / "whole.mp4", 40, options={"bf": "0"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "part.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and number >= 5:
                packet.stream = copy
                target.mux(packet)
    video = VideoFrames(tmp_path / "part.mp4")
    # no decoder can decode frames before the first key frame: an error, never a wrong image
    with pytest.raises(OSError, match="frame 0 cannot be decoded"):
        video.read(0)
    first_key = 12 - 5
    assert shown_number(video.read(first_key + 3)) == 15
    assert shown_number(video.read(first_key)) == 12


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95, 0.99])
def test_a_cut_video_is_named(
    share: float, tmp_path: Path, counting_video: Any, native_demo: Any, change_metadata: Any
) -> None:
    import av

    folder = native_demo(tmp_path / "root" / "demo", frames=60, width=96, height=48)
    shutil.rmtree(folder / "rgb" / "over")
    plain = counting_video(tmp_path / "plain.mp4", 60)
    whole = folder / "rgb" / "over.mp4"
    with av.open(str(plain)) as source, av.open(str(whole), "w", options={"movflags": "faststart"}) as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    change_metadata(folder, cameras={"over": {"width": 96, "height": 48, "frames": "rgb/over.mp4", "depth": None}})
    (reference,) = find_demos(tmp_path / "root")
    reference.read()
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DemoError, match=r"over\.mp4.*(cut off|cannot be opened)"):
        reference.read()


@ROUNDS
def test_damage_is_named_or_left_out(tmp_path: Path, native_demo: Callable[..., Path], rounds: int) -> None:
    """Arrays have checksums (zip); JPEG, video and JSON have none."""
    native_demo(tmp_path / "set" / "by_hand")
    record(tmp_path / "set" / "video", video=True)
    assert_damage_is_found(tmp_path / "set", rounds, unnoticed=(".json", ".jpg", ".mp4"))
