from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keygrip import artifacts
from keygrip.artifacts import temporary_beside
from keygrip.command import describe_error
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.reference import DemoReference
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import TaskOptions, sample_layout
from keygrip.recording import demonstrations as recorder
from keygrip.recording import recorded_folder
from keygrip.recording.demonstrations import RecordSettings, record, record_episode
from keygrip.recording.recorded_folder import LOCK_FILE, failed_seeds
from keygrip.robots.kinematics import forward_kinematics

SIZE = 48
PICK = TaskOptions(name="pick")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def by_name(root: Path) -> dict[str, DemoReference]:
    return {reference.name: reference for reference in find_demos(root, format="native")}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four demos recorded without interruption in this process."""
    root = tmp_path_factory.mktemp("serial")
    record(PICK, root, 4, image_size=SIZE, progress=False)
    return root


def test_a_recording_is_read_back_whole(serial: Path) -> None:
    demos = by_name(serial)
    assert sorted(demos) == [f"pick_{seed:07d}" for seed in range(4)]
    demo = demos["pick_0000002"].read()
    arm, camera = demo.arms["right"], demo.cameras["over"]
    assert (demo.robot, demo.task, demo.fps, demo.instruction) == ("yam", "pick", 10.0, "pick up the red cube")
    assert len(camera.frames) == len(demo.timestamps) == len(arm.position)
    np.testing.assert_array_equal(np.diff(demo.timestamps), 100_000_000)
    assert camera.frames.read(0).shape == (SIZE, SIZE, 3)
    assert demo.source["seed"] == 2
    assert demo.source["task"]["name"] == "pick"
    assert arm.joints is not None
    np.testing.assert_allclose(forward_kinematics(arm.joints)[0], arm.position, atol=1e-6)


def test_commands_lead_and_the_arm_follows(serial: Path) -> None:
    arm = by_name(serial)["pick_0000001"].read().arms["right"]
    assert arm.commanded is not None
    next_gap = np.linalg.norm(arm.position[1:] - arm.commanded.position[:-1], axis=1)
    same_gap = np.linalg.norm(arm.position - arm.commanded.position, axis=1)
    assert next_gap.max() < same_gap.max()  # row i is the target of frame i + 1
    assert 0.004 < next_gap.max() < 0.03
    assert set(np.unique(arm.commanded.gripper)) == {0.0, 1.0}


def test_the_environment_shows_the_recorded_image(serial: Path) -> None:
    demo = by_name(serial)["pick_0000000"].read()
    camera = demo.cameras["over"]
    cell = YamCell(PICK, image_size=SIZE)
    seen, _ = cell.reset(seed=0)
    difference = np.abs(seen["image"].astype(int) - camera.frames.read(0).astype(int))
    assert difference.mean() < 2.0  # the loss of JPEG
    np.testing.assert_allclose(seen["intrinsics"], camera.intrinsics[0])
    np.testing.assert_allclose(seen["world_to_camera"], camera.world_to_camera[0], atol=1e-7)
    np.testing.assert_allclose(seen["position"], demo.arms["right"].position[0], atol=1e-7)
    cell.close()


def test_two_processes_write_the_same_bytes(serial: Path, tmp_path: Path) -> None:
    summary = record(PICK, tmp_path / "demos", 4, image_size=SIZE, processes=2, progress=False)
    assert (summary.demos, summary.recorded, summary.failed) == (4, 4, 0)
    assert contents(tmp_path / "demos") == contents(serial)


def test_a_killed_recorder_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> Future[object]:
        answer = Future[object]()
        answer.set_exception(BrokenProcessPool())
        return answer

    monkeypatch.setattr(ProcessPoolExecutor, "submit", killed)
    with pytest.raises(ChildProcessError) as died:
        record(PICK, tmp_path / "demos", 4, image_size=SIZE, processes=2, progress=False)
    line, code = describe_error(died.value, "prepare", ())
    assert line.startswith("a recording process died")
    assert f"the demos in {tmp_path / 'demos'} are whole: run again to continue" in line
    assert code == 1


@pytest.mark.slow
def test_a_setting_that_a_worker_process_cannot_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole steps"):
        record(PICK, tmp_path, 4, image_size=SIZE, hz=30.0, processes=2, progress=False)


def test_an_interrupted_recording_continues_to_the_same_folders(
    serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "demos"
    steps = 0
    advance = YamCell.advance

    def interrupted(cell: YamCell, action: np.ndarray) -> None:
        nonlocal steps
        steps += 1
        if steps == 100:  # in the middle of the third demo
            raise KeyboardInterrupt
        advance(cell, action)

    monkeypatch.setattr(YamCell, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(PICK, root, 4, image_size=SIZE, progress=False)
    monkeypatch.undo()
    left = sorted(by_name(root))
    assert left == ["pick_0000000", "pick_0000001"]
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    own = temporary_beside(root / "pick_0000002").name
    remainder = root / own.replace(f"-{os.getpid()}-", f"-{int(gone.stdout)}-")  # of a recorder that was killed
    remainder.mkdir()
    os.utime(remainder, (0, 0))
    artifacts._looked.clear()  # as in a new process
    summary = record(PICK, root, 4, image_size=SIZE, progress=False)
    assert (summary.demos, summary.recorded) == (4, 2)
    assert contents(root) == contents(serial)
    assert not remainder.exists()
    again = record(PICK, root, 4, image_size=SIZE, progress=False)
    assert (again.demos, again.recorded) == (4, 0)


def test_other_settings_do_not_mix_into_a_folder(serial: Path) -> None:
    with pytest.raises(ValueError, match="image_size: 48 there, 64 now"):
        record(PICK, serial, 4, image_size=64, progress=False)
    with pytest.raises(ValueError, match="region: 'all' there, 'left' now"):
        record(TaskOptions(name="pick", region="left"), serial, 4, image_size=SIZE, progress=False)


@pytest.mark.parametrize("held", ["meta/info.json", "pick_0000000/metadata.json", "task_demo.hdf5"])
def test_a_folder_with_data_that_nobody_recorded_is_refused(held: str, tmp_path: Path) -> None:
    file = tmp_path / held
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    with pytest.raises(
        ValueError, match=rf"holds other data \({held.split('/')[0]}\) .*record into a new or empty folder"
    ):
        record(PICK, tmp_path, 1, image_size=SIZE, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, held.split("/")[0]]
    for number in range(4):
        (tmp_path / f"a_{number}").mkdir()
    with pytest.raises(ValueError, match=r"\(a_0, a_1, a_2, and 2 more\)"):
        failed_seeds(tmp_path, {}, {})


def test_hidden_files_and_a_recording_that_ended_early_are_no_other_data(tmp_path: Path) -> None:
    (tmp_path / ".keygrip").mkdir()
    settings = {"task": "pick"}
    assert failed_seeds(tmp_path, settings, []) == []
    (tmp_path / "pick_0000000").mkdir()
    recorded_folder.store(tmp_path, settings, [1])
    assert failed_seeds(tmp_path, settings, []) == [1]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{", "[]", "{}", '{"settings": {}}', '{"settings": 3, "failed_seeds": []}']
)
def test_a_damaged_record_of_a_recording_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "pick_0000000").mkdir()
    (tmp_path / "recording.json").write_text(content)
    with pytest.raises(ValueError, match=r"recording\.json is damaged.*record into another folder"):
        failed_seeds(tmp_path, {}, [])
    assert (tmp_path / "recording.json").read_text() == content


def test_a_try_that_failed_before_its_first_demonstration_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="camera"):
        record(PICK, tmp_path, 1, image_size=SIZE, cameras=("none",), progress=False)
    assert (tmp_path / "recording.json").is_file()
    assert record(PICK, tmp_path, 1, image_size=SIZE, progress=False).recorded == 1
    assert json.loads((tmp_path / "recording.json").read_text())["settings"]["cameras"] == ["over"]


def test_numbers_that_are_not_finite_are_the_same_settings_again(tmp_path: Path) -> None:
    limits = {"task": {"speed": float("inf"), "box": (1.0, float("nan"))}}
    assert failed_seeds(tmp_path, limits, []) == []
    (tmp_path / "pick_0").mkdir()
    recorded_folder.store(tmp_path, limits, [3])
    assert failed_seeds(tmp_path, limits, []) == [3]
    with pytest.raises(ValueError, match=r"\(task\.speed: 'Infinity' there, None now\)"):
        failed_seeds(tmp_path, {"task": {**limits["task"], "speed": None}}, [])


@pytest.mark.slow
def test_failed_episodes_are_dropped_counted_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = recorder.expert_actions

    def clumsy(layout: object, task: TaskOptions, seed: int, hz: float) -> np.ndarray:
        actions = expert(layout, task, seed, hz)  # type: ignore[arg-type]
        if seed == 1:
            actions[:, 7] = 1.0
        return actions

    monkeypatch.setattr(recorder, "expert_actions", clumsy)
    summary = record(PICK, tmp_path, 3, image_size=SIZE, progress=False)
    assert (summary.demos, summary.failed) == (3, 1)
    assert sorted(by_name(tmp_path)) == ["pick_0000000", "pick_0000002", "pick_0000003"]
    assert json.loads((tmp_path / "recording.json").read_text())["failed_seeds"] == [1]
    assert [path.name for path in tmp_path.glob(".*")] == [LOCK_FILE]


def test_an_expert_that_cannot_do_it_stops_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def helpless(layout: object, task: TaskOptions, seed: int, hz: float) -> np.ndarray:
        return np.tile([0.3, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 1.0], (2, 1))

    monkeypatch.setattr(recorder, "expert_actions", helpless)
    with pytest.raises(ValueError, match="expert failed in"):
        record(PICK, tmp_path, 6, image_size=16, progress=False)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demos"):
        record(PICK, tmp_path, 0)
    with pytest.raises(ValueError, match="jpeg_quality"):
        record(PICK, tmp_path, 1, jpeg_quality=50)
    for moves in ({"camera_jitter_deg": 15.0}, {"camera_azimuth_deg": 20.0}):
        (name,) = moves
        with pytest.raises(ValueError, match=f"{name}: this moves camera 'over', and only front is used; task option"):
            record(replace(PICK, **moves), tmp_path / "new", 1, cameras=("front",))
    assert not (tmp_path / "new").exists()


def test_camera_jitter_moves_the_camera_in_file_and_image(tmp_path: Path) -> None:
    task = TaskOptions(name="reach", camera_jitter_deg=15.0)
    record(task, tmp_path, 2, image_size=SIZE, cameras=("over", "front"), progress=False)
    one, two = (by_name(tmp_path)[f"reach_000000{i}"].read() for i in range(2))
    first, second = one.cameras["over"], two.cameras["over"]
    assert np.abs(first.world_to_camera[0] - second.world_to_camera[0]).max() > 0.01
    np.testing.assert_array_equal(first.world_to_camera[0], first.world_to_camera[-1])
    # The other cameras do not move, and neither does the point that "over" looks at.
    np.testing.assert_array_equal(one.cameras["front"].world_to_camera[0], two.cameras["front"].world_to_camera[0])
    for track in (first, second):
        looked_at = track.world_to_camera[0] @ np.array([0.30, 0.01, 0.055, 1.0])
        np.testing.assert_allclose(looked_at[:3], [0, 0, 1.0], atol=1e-6)
    still = YamCell(TaskOptions(name="reach"), image_size=SIZE)
    difference = np.abs(still.reset(seed=0)[0]["image"].astype(int) - first.frames.read(0).astype(int))
    assert difference.mean() > 3.0
    still.close()


def test_depth_is_in_millimetres_along_the_axis(tmp_path: Path) -> None:
    task = TaskOptions(name="reach")
    cell = YamCell(task, image_size=SIZE)
    settings = RecordSettings(task, SIZE, depth=True)
    assert record_episode(cell, settings, tmp_path, 5)
    cell.close()
    folder = tmp_path / "reach_0000005"
    depth = np.asarray(Image.open(folder / "depth" / "over" / "000000.png"))
    assert depth.shape == (SIZE, SIZE)
    assert depth.dtype == np.uint16
    demo = by_name(tmp_path)["reach_0000005"].read()
    assert demo.cameras["over"].depth is not None
    # The cube's centre lies half a cube behind the surface that the camera sees.
    camera = demo.cameras["over"]
    point = sample_layout(task, 5).object.position
    in_camera = camera.world_to_camera[0] @ np.append(point, 1.0)
    u, v, w = camera.intrinsics[0] @ in_camera[:3]
    assert in_camera[2] * 1000 - depth[int(v / w), int(u / w)] == pytest.approx(25, abs=12)


def test_the_sky_has_no_depth(tmp_path: Path) -> None:
    task = TaskOptions(name="reach", camera_elevation_deg=-35.0)  # the image's top is above the horizon
    record(task, tmp_path, 1, image_size=SIZE, depth=True, progress=False)
    (reference,) = find_demos(tmp_path)
    track = reference.read().cameras["over"].depth
    assert track is not None
    depth = track.read(0)
    assert (depth[0] == 0).mean() > 0.5  # around the arm
    assert depth.max() < 59_000  # mm; the far plane is at 60 m
    assert 500 < depth[SIZE // 2, SIZE // 2] < 2000  # mm


def test_the_wrist_camera_moves_with_the_hand(tmp_path: Path) -> None:
    record(TaskOptions(name="reach"), tmp_path, 1, image_size=SIZE, cameras=("over", "wrist"), progress=False)
    demo = by_name(tmp_path)["reach_0000000"].read()
    wrist = demo.cameras["wrist"].world_to_camera
    assert np.abs(wrist[0] - wrist[-1]).max() > 0.02
    # The tool stays at one place in the frame of the wrist camera.
    arm = demo.arms["right"]
    seen = np.einsum("nij,nj->ni", wrist[:, :3, :3], arm.position) + wrist[:, :3, 3]
    np.testing.assert_allclose(seen, np.broadcast_to(seen[0], seen.shape), atol=1e-4)
