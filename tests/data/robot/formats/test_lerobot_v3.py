"""LeRobot v3 data sets, written exactly as the format specifies, read back and compared with the scene."""

from __future__ import annotations

import io
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from five_joint_arm import MJCF, URDF, poses_in_closed_form
from macos import leave_notes
from PIL import Image
from robot_mutations import ROUNDS, assert_damage_is_found, contents
from scipy.spatial.transform import Rotation

from keygrip.data import parquet_tables
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.formats import frames, lerobot_v3
from keygrip.data.robot.formats.frames import ParquetFrames
from keygrip.data.robot.formats.lerobot_numbers import numbers
from keygrip.data.robot.formats.lerobot_v3 import DEPTH_MARKS, _is_depth
from keygrip.data.robot.frames import VideoFrames
from keygrip.data.robot.importing import import_demos
from keygrip.data.robot.lerobot_export.export import export_lerobot
from keygrip.data.robot.schema import DemoError
from keygrip.robots.kinematics import forward_kinematics

FPS = 20
LENGTHS = (6, 4, 5)  # episodes; 0 and 1 share a data file and a video file
KEY = "observation.images.top"


@pytest.fixture
def write_dataset(scene, write_video, calibration_text):
    def write(
        root: Path,
        pictures_in_parquet: bool = False,
        joints: np.ndarray | None = None,
        state: np.ndarray | None = None,
    ) -> dict:
        """Write three episodes of the scene's path. The state is position, quaternion xyzw and gripper in mm (80 is
        open), or as given."""
        quaternion = Rotation.from_matrix(scene.rotation).as_quat()
        position = scene.position if joints is None else forward_kinematics(joints)[0]
        given = state is not None
        if state is None:
            state = np.concatenate([position, quaternion, 80 * scene.gripper[:, None]], axis=1)
        if joints is not None:
            state = np.concatenate([joints, 80 * scene.gripper[:, None]], axis=1)
        pictures = scene.pictures(position)
        rows: list[dict] = []
        episodes: list[dict] = []
        placed = [(0, 0), (0, LENGTHS[0]), (1, 0)]  # (file, first frame in its video)
        for number, (length, (file, first)) in enumerate(zip(LENGTHS, placed, strict=True)):
            start = len(rows)
            for i in range(length):
                row = {
                    "observation.state": state[i].astype(np.float32).tolist(),
                    "action": state[min(i + 1, length - 1)].astype(np.float32).tolist(),
                    "timestamp": np.float32(i / FPS),
                    "frame_index": i,
                    "episode_index": number,
                    "index": len(rows),
                    "task_index": number % 2,
                }
                if pictures_in_parquet:
                    encoded = io.BytesIO()
                    Image.fromarray(pictures[i]).save(encoded, "PNG")
                    row[KEY] = {"bytes": encoded.getvalue(), "path": f"frame_{i:06d}.png"}
                rows.append(row)
            entry = {
                "episode_index": number,
                "tasks": [["Pick up the cube", "Put it down"][number % 2]],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": start,
                "dataset_to_index": start + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                "stats/action/min": [0.0],
            }
            if not pictures_in_parquet:
                entry |= {
                    f"videos/{KEY}/chunk_index": 0,
                    f"videos/{KEY}/file_index": file,
                    f"videos/{KEY}/from_timestamp": first / FPS,
                    f"videos/{KEY}/to_timestamp": (first + length) / FPS,
                }
            episodes.append(entry)
        for file in (0, 1):
            chosen = [number for number in range(3) if placed[number][0] == file]
            table = pa.Table.from_pylist([row for row in rows if row["episode_index"] in chosen])
            path = root / f"data/chunk-000/file-{file:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=4)
            if not pictures_in_parquet:
                stretch = np.concatenate([pictures[: LENGTHS[number]] for number in chosen])
                write_video(root / f"videos/{KEY}/chunk-000/file-{file:03d}.mp4", stretch, FPS)
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(episodes), path)
        tasks = pa.table({"task_index": [0, 1], "__index_level_0__": ["Pick up the cube", "Put it down"]})
        pq.write_table(tasks, root / "meta/tasks.parquet")
        names = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"] if joints is None and not given else None
        vector = {"dtype": "float32", "shape": [state.shape[1]], "names": names}
        info = {
            "codebase_version": "v3.0",
            "robot_type": "yam",
            "total_episodes": 3,
            "total_frames": len(rows),
            "total_tasks": 2,
            "chunks_size": 1000,
            "fps": FPS,
            "splits": {"train": "0:3"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": {
                "observation.state": vector,
                "action": vector,
                KEY: {
                    "dtype": "image" if pictures_in_parquet else "video",
                    "shape": [72, 96, 3],
                    "names": ["height", "width", "channels"],
                },
                **{
                    key: {"dtype": "int64", "shape": [1], "names": None}
                    for key in ("frame_index", "episode_index", "index", "task_index")
                },
            },
        }
        (root / "meta/info.json").write_text(json.dumps(info))
        calibration = {
            "schema": "keygrip.calibration/1",
            "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
            "cameras": {"top": calibration_text(scene)},
            "lerobot": {"arms": {"right": arm("observation.state") | {"commanded": arm("action")}}},
        }
        save(root, calibration)
        return calibration

    return write


def to_version_2(root: Path) -> None:
    """Convert a data set of `write_dataset` to version 2.1, with one file per episode."""
    info = json.loads((root / "meta/info.json").read_text())
    rows = [row for path in sorted(root.glob("data/*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for path in sorted(root.glob("data/*/*.parquet")):
        path.unlink()
    for episode in episodes:
        number = episode["episode_index"]
        own = [row for row in rows if row["episode_index"] == number]
        pq.write_table(pa.Table.from_pylist(own), root / f"data/chunk-000/episode_{number:06d}.parquet")
    (root / "meta/episodes/chunk-000/file-000.parquet").unlink()
    keys = ("episode_index", "tasks", "length")
    lines = [json.dumps({key: episode[key] for key in keys}) for episode in episodes]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    tasks = ["Pick up the cube", "Put it down"]
    lines = [json.dumps({"task_index": number, "task": task}) for number, task in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("in_parquet", [False, True])
def test_version_2_reads_as_version_3(tmp_path, write_dataset, write_video, scene, check_geometry, in_parquet):
    write_dataset(tmp_path / "three", pictures_in_parquet=in_parquet)
    write_dataset(tmp_path / "two", pictures_in_parquet=in_parquet)
    to_version_2(tmp_path / "two")
    if not in_parquet:
        for number, length in enumerate(LENGTHS):
            path = tmp_path / f"two/videos/chunk-000/{KEY}/episode_{number:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, scene.pictures()[:length], FPS)
    old, new = find_demos(tmp_path / "two"), find_demos(tmp_path / "three")
    assert [reference.name for reference in old] == [reference.name for reference in new]
    assert {reference.format for reference in old} == {"lerobot_v2"}
    for before, after in zip(old, new, strict=True):
        demo, same = before.read(), after.read()
        check_geometry(demo, "top", "right")
        assert (demo.instruction, demo.fps, len(demo)) == (same.instruction, same.fps, len(same))
        np.testing.assert_array_equal(demo.arms["right"].position, same.arms["right"].position)
        np.testing.assert_array_equal(demo.timestamps, same.timestamps)
    (tmp_path / "two/meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 6}\n[1]\n')
    with pytest.raises(ValueError, match=r"episodes\.jsonl: line 2 holds no object"):
        find_demos(tmp_path / "two")
    (tmp_path / "two/meta/episodes.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"episodes\.jsonl is missing"):
        find_demos(tmp_path / "two")


@pytest.mark.parametrize("version", [2, 3])
def test_a_video_of_another_rate_is_refused(tmp_path, write_dataset, write_video, scene, version):
    """Row i would be read as video frame i, which was recorded at another time."""
    write_dataset(tmp_path)
    if version == 2:
        to_version_2(tmp_path)
        file = tmp_path / f"videos/chunk-000/{KEY}/episode_000000.mp4"
    else:
        file = tmp_path / f"videos/{KEY}/chunk-000/file-000.mp4"
    pictures = np.concatenate([scene.pictures()[: LENGTHS[0]], scene.pictures()])
    write_video(file, pictures[: LENGTHS[0]] if version == 2 else pictures, FPS)
    assert len(find_demos(tmp_path)[0].read()) == LENGTHS[0]
    write_video(file, np.repeat(pictures, 3, axis=0), 3 * FPS)
    with pytest.raises(DemoError, match=f"the video has {3 * FPS} frames per second and the data set {FPS}"):
        find_demos(tmp_path)[0].read()
    corrections = {"corrections": {"top": {"lag_frames": 1}}}  # a lag of one frame does not change the rate
    (tmp_path / "corrected.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((tmp_path / "calibration.yaml").read_text()) | corrections)
    )
    with pytest.raises(DemoError, match=f"the video has {3 * FPS} frames per second and the data set {FPS}"):
        find_demos(tmp_path, calibration=tmp_path / "corrected.yaml")[0].read()
    if version == 2:
        write_video(file, pictures[: LENGTHS[0] + 1], FPS)
        with pytest.raises(DemoError, match=f"holds {LENGTHS[0] + 1} frames for {LENGTHS[0]} rows"):
            find_demos(tmp_path)[0].read()
    info = json.loads((tmp_path / "meta/info.json").read_text())
    for key in ("info", "video_info"):
        info["features"][KEY] |= {"info": None, "video_info": None, key: {"video.fps": 3.0 * FPS}}
        (tmp_path / "meta/info.json").write_text(json.dumps(info))
        with pytest.raises(DemoError, match=f"states {3 * FPS} frames per second of the video and {FPS}"):
            find_demos(tmp_path)[0].read()
    write_video(file, pictures[: LENGTHS[0]] if version == 2 else pictures, FPS)
    info["features"][KEY]["video_info"] = {"video.fps": FPS - 0.9}  # LeRobot truncates this number to an integer
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    assert len(find_demos(tmp_path)[0].read()) == LENGTHS[0]


def test_times_that_are_uneven_are_said_as_such(tmp_path, write_video, scene, monkeypatch):
    """Such a video, encoded again at the data set's rate, would have one frame too many."""
    write_video(tmp_path / "x.mp4", scene.pictures()[:6], FPS)
    times = np.array([0, 1, 2, 4, 5, 6]) / FPS  # no frame 3
    monkeypatch.setattr("keygrip.data.robot.frames.frame_times", lambda path: times)
    with pytest.raises(OSError, match=rf"frame 3 is shown \+{1 / FPS:.3f} s away from its row, and so are 2 of 5"):
        VideoFrames(tmp_path / "x.mp4", 5, rate=FPS).verify()
    VideoFrames(tmp_path / "x.mp4", 6, rate=FPS, whole=True).verify()  # a frame for each row
    VideoFrames(tmp_path / "x.mp4", 3, rate=FPS).verify()


def test_cameras_without_calibration_are_for_models_that_read_none(tmp_path, write_dataset):
    calibration = write_dataset(tmp_path)
    del calibration["cameras"]
    save(tmp_path, calibration)
    reference = find_demos(tmp_path)[0]
    track = reference.read(uncalibrated=True).cameras["top"]
    assert "has no entry for it" in track.uncalibrated
    assert track.frames.read(0).shape == (72, 96, 3)
    import_demos(tmp_path, tmp_path.parent / "native", progress=False)
    native = find_demos(tmp_path.parent / "native")[0]
    assert native.read(uncalibrated=True).cameras["top"].uncalibrated == track.uncalibrated
    with pytest.raises(DemoError, match="no camera is calibrated"):
        native.read()


@pytest.mark.parametrize(("named", "models"), [({}, {}), ({"gripper": "crank_4310"}, {"right": ["yam", "crank_4310"]})])
def test_recorded_poses_are_of_a_yam_only_where_the_calibration_file_says_so(tmp_path, write_dataset, named, models):
    calibration = write_dataset(tmp_path)
    calibration["arms"] = {"right": {"world_from_base": np.eye(4).tolist(), **named}}
    save(tmp_path, calibration)
    assert find_demos(tmp_path)[0].read().source["models"] == models


def arm(feature: str) -> dict:
    return {
        "position": {"feature": feature, "index": [0, 1, 2]},
        "rotation": {"feature": feature, "names": ["qx", "qy", "qz", "qw"], "as": "quaternion_xyzw"},
        "gripper": {"feature": feature, "index": 7, "closed": 0.0, "open": 80.0},
    }


def save(root: Path, calibration: dict) -> None:
    (root / "calibration.yaml").write_text(yaml.safe_dump(calibration))


@pytest.mark.parametrize("pictures_in_parquet", [False, True])
def test_every_episode_finds_its_rows_and_its_stretch_of_video(
    tmp_path, scene, write_dataset, check_geometry, pictures_in_parquet
):
    write_dataset(tmp_path, pictures_in_parquet)
    references = find_demos(tmp_path)
    assert [reference.name for reference in references] == ["episode_000000", "episode_000001", "episode_000002"]
    assert {reference.format for reference in references} == {"lerobot_v3"}
    for number, reference in enumerate(references):
        demo, length = reference.read(), LENGTHS[number]
        assert len(demo) == length
        check_geometry(demo, "top", "right")
        right = demo.arms["right"]
        np.testing.assert_allclose(right.position, scene.position[:length], atol=1e-6)
        matrices = Rotation.from_quat(right.quaternion, scalar_first=True).as_matrix()
        np.testing.assert_allclose(matrices, scene.rotation[:length], atol=1e-6)
        np.testing.assert_allclose(right.gripper, scene.gripper[:length], atol=1e-6)
        np.testing.assert_allclose(right.commanded.position[:-1], right.position[1:], atol=1e-6)
        assert demo.instruction == ["Pick up the cube", "Put it down"][number % 2]
        assert (demo.robot, demo.fps) == ("yam", FPS)
        np.testing.assert_allclose(np.diff(demo.timestamps), 1e9 / FPS, rtol=1e-6)


def test_a_file_of_many_episodes_is_read_once(tmp_path, write_dataset, monkeypatch):
    write_dataset(tmp_path)
    read, files = lerobot_v3.read_table, []

    def counted(file, *options):
        files.append(file)
        return read(file, *options)

    references = find_demos(tmp_path)
    monkeypatch.setattr(lerobot_v3, "read_table", counted)
    demos = [reference.read() for reference in references]
    assert tuple(map(len, demos)) == LENGTHS
    data_files = [file.name for file in files if file.parent.parent.name == "data"]
    assert data_files == ["file-000.parquet", "file-001.parquet"]
    path = tmp_path / "data/chunk-000/file-001.parquet"  # the file that is read last
    rows = read(path).to_pylist()
    for row in rows:
        row["observation.state"][0] += 0.5
    pq.write_table(pa.Table.from_pylist(rows), path)
    moved = references[2].read().arms["right"].position - demos[2].arms["right"].position
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.5, atol=1e-6)


def stored_pictures(
    path: Path, first: int, columns: tuple[str, ...] = ("left", "right")
) -> dict[str, list[np.ndarray]]:
    """Store 12 images in each of two columns, in row groups of 4. The pixels of image i are `first` + i, and 100 more
    in the right column."""
    pictures = {
        name: [np.full((8, 8, 3), first + 100 * number + i, np.uint8) for i in range(12)]
        for number, name in enumerate(columns)
    }
    cells: dict[str, list[dict]] = {name: [] for name in columns}
    for name in columns:
        for picture in pictures[name]:
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "PNG")
            cells[name].append({"bytes": encoded.getvalue(), "path": None})
    pq.write_table(pa.table(cells), path, row_group_size=4)
    return pictures


@pytest.fixture
def group_reads(monkeypatch) -> list[tuple[int, str]]:
    """Return the list of (row group, column) of every read."""
    reads: list[tuple[int, str]] = []
    read = pq.ParquetFile.read_row_group

    def counted(self, number, columns):
        reads.append((number, *columns))
        return read(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return reads


def test_images_in_parquet_are_read_a_row_group_at_a_time(tmp_path, group_reads):
    path = tmp_path / "images.parquet"
    pictures = stored_pictures(path, first=0)
    rows = (9, 10, 2, 3, 4, 5, 6, 11)
    sources = {name: ParquetFrames(path, name, rows, tmp_path) for name in pictures}
    for index, row in enumerate(rows):
        for name, source in sources.items():  # the cameras alternate
            np.testing.assert_array_equal(source.read(index), pictures[name][row])
    assert group_reads == [(2, "left"), (2, "right"), (0, "left"), (0, "right"), (1, "left"), (1, "right")]
    other = stored_pictures(path, first=20)  # another file under the same name
    os.utime(path, ns=(0, 0))
    np.testing.assert_array_equal(sources["right"].read(0), other["right"][9])
    with pytest.raises(OSError, match="has no row 12"):
        ParquetFrames(path, "left", (12,), tmp_path).read(0)


def test_the_identity_of_images_in_parquet_reads_no_row(tmp_path: Path, group_reads: list[tuple[int, str]]) -> None:
    path = tmp_path / "images.parquet"
    stored_pictures(path, first=0)
    identities = {
        ParquetFrames(path, name, rows, tmp_path).identity() for name in ("left", "right") for rows in ((9, 10), (2,))
    }
    assert len(identities) == 4
    assert group_reads == []


def test_images_beside_the_table_count_as_its_content(tmp_path: Path) -> None:
    """A later start verifies them again if they have been replaced or removed."""
    images = [tmp_path / "images" / f"{index}.png" for index in range(3)]
    images[0].parent.mkdir()
    for path in images:
        Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(path)
    rows = [{"bytes": None, "path": f"images/{path.name}"} for path in images]
    pq.write_table(pa.table({"left": rows}), tmp_path / "images.parquet")
    source = ParquetFrames(tmp_path / "images.parquet", "left", (0, 1, 2), tmp_path)
    before = source.identity()
    assert source.identity() == before
    Image.fromarray(np.full((4, 6, 3), 91, np.uint8)).save(images[2])
    changed = source.identity()
    images[2].unlink()
    assert len({before, changed, source.identity()}) == 3


@pytest.mark.parametrize(("limit", "value"), [("KEPT_BYTES", 1), ("GROUPS_KEPT", 1)])
def test_few_row_groups_of_images_are_kept(tmp_path, group_reads, monkeypatch, limit, value):
    monkeypatch.setattr(frames, limit, value)
    pictures = stored_pictures(tmp_path / "images.parquet", first=0)
    source = ParquetFrames(tmp_path / "images.parquet", "left", tuple(range(12)), tmp_path)
    for row in (0, 1, 4, 5, 0):
        np.testing.assert_array_equal(source.read(row), pictures["left"][row])
    assert group_reads == [(0, "left"), (1, "left"), (0, "left")]


def test_images_that_repeat_are_held_once(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(encoded, "PNG")
    content = encoded.getvalue()
    cells = [{"bytes": content, "path": None}] * 2000
    pq.write_table(pa.table({"top": cells}), tmp_path / "images.parquet", store_schema=False)
    assert (tmp_path / "images.parquet").stat().st_size < 3 * len(content)
    source = ParquetFrames(tmp_path / "images.parquet", "top", (1999,), tmp_path)
    np.testing.assert_array_equal(source.read(0), np.asarray(Image.open(io.BytesIO(content))))
    assert frames._row_groups.held[-1].values.nbytes < 10 * len(content)


@pytest.mark.parametrize("part", ["meta/episodes/chunk-000/file-000", "data/chunk-000/file-000", "meta/tasks"])
def test_a_small_table_that_unpacks_to_a_large_one_is_refused(tmp_path, write_dataset, monkeypatch, part):
    write_dataset(tmp_path)
    path = tmp_path / f"{part}.parquet"
    table = pq.read_table(path)
    table = pa.concat_tables([table] * (1000 // len(table) + 1))
    texts = ["x" * 10_000] * len(table)
    pq.write_table(table.append_column("told", pa.array(texts)), path, compression="zstd", store_schema=False)
    monkeypatch.setattr(parquet_tables, "MAX_ARRAY_BYTES", 1 << 22)
    read = {
        "meta/episodes/chunk-000/file-000": lerobot_v3._episodes,
        "data/chunk-000/file-000": lambda root: lerobot_v3._without_images(path, "made anew"),
        "meta/tasks": lerobot_v3._tasks,
    }[part]
    with pytest.raises(ValueError, match=rf"{path.name}: unpacked, it has more than the \d+ bytes") as refused:
        read(tmp_path)
    assert "copy the data set again" not in str(refused.value)  # copying again would not help


def five_joints(root: Path, model: str, calibration: dict, **joints: object) -> None:
    """Write the model of a five-joint arm, and a calibration file for states in degrees with their own joint order,
    signs and zeros (-1, 90 and so on)."""
    (root / "robot").mkdir(exist_ok=True)
    (root / "robot" / model).write_text(MJCF if model.endswith("xml") else URDF)
    names = ["lift", "pan", "elbow", "flex", "roll"]
    base = [[0, -1, 0, 0.5], [1, 0, 0, 0], [0, 0, 1, 0.2], [0, 0, 0, 1]]
    calibration["arms"] = {
        "right": {"world_from_base": base, "model": f"robot/{model}", "tool": "tip", "joints": names}
    }
    numbers: dict = {
        "index": [0, 1, 2, 3, 4],
        "units": "degrees",
        "signs": [-1, 1, 1, 1, 1],
        "zeros": [90, 0, -90, 0, 0],
    }

    def arm(feature: str) -> dict:
        return {
            "joints": {"feature": feature, **numbers, **joints},
            "gripper": {"feature": feature, "index": 5, "closed": 0, "open": 100},
        }

    calibration["lerobot"] = {"arms": {"right": arm("observation.state") | {"commanded": arm("action")}}}
    save(root, calibration)


@pytest.fixture
def joint_states() -> tuple[np.ndarray, np.ndarray]:
    """Return [6, 5] joints in rad, and [6, 6] the stored state of such a data set with the gripper in percent."""
    joints = np.random.default_rng(0).uniform(-1.2, 1.2, (6, 5))
    degrees = np.degrees(joints)
    stored = [90 - degrees[:, 1], degrees[:, 0], degrees[:, 2] - 90, degrees[:, 3], degrees[:, 4]]
    return joints, np.stack([*stored, np.linspace(100, 0, 6)], axis=1)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("model", ["arm.xml", "arm.urdf"])
def test_joints_of_any_arm_become_poses(tmp_path, write_dataset, write_video, scene, joint_states, model, version):
    joints, stored = joint_states
    calibration = write_dataset(tmp_path, state=stored)
    if version == 2:
        to_version_2(tmp_path)
        path = tmp_path / f"videos/chunk-000/{KEY}/episode_000000.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, scene.pictures(), FPS)
    five_joints(tmp_path, model, calibration)
    demo = pickle.loads(pickle.dumps(find_demos(tmp_path)[0])).read()  # as workers read it
    arm, closed_form = demo.arms["right"], poses_in_closed_form(joints)
    np.testing.assert_allclose(arm.joints, joints[:, [1, 0, 2, 3, 4]], atol=1e-6)
    x, y, z = closed_form[:, :3, 3].T
    np.testing.assert_allclose(arm.position, np.stack([0.5 - y, x, 0.2 + z], axis=1), atol=1e-6)
    turned = Rotation.from_euler("z", 90, degrees=True) * Rotation.from_matrix(closed_form[:, :3, :3])
    assert (turned.inv() * Rotation.from_quat(arm.quaternion, scalar_first=True)).magnitude().max() < 1e-6
    np.testing.assert_allclose(arm.gripper, np.linspace(1, 0, 6), atol=1e-6)
    np.testing.assert_allclose(
        arm.commanded.position[:-1], arm.position[1:], atol=1e-9
    )  # each action is the next state
    assert demo.source["models"] == {}  # only models of YAM arms are listed
    export_lerobot(tmp_path, tmp_path / "again", max_demos=1, progress=False)
    again = find_demos(tmp_path / "again")[0].read().arms["right"]
    np.testing.assert_allclose(again.position, arm.position, atol=1e-12)
    np.testing.assert_allclose(again.joints, arm.joints, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "joints", "message"),
    [
        ({"tool": "tipp"}, {}, r"arm\.xml has no body, link or site 'tipp'; did you mean 'tip'"),
        ({"joints": ["lift", "pan", "elbo", "flex", "roll"]}, {}, "no joint 'elbo'; did you mean 'elbow'"),
        ({"joints": ["lift", "pan", "elbow", "flex"]}, {}, "the joint 'roll' moves the tool 'tip' and is not named"),
        ({"joints": ["lift", "pan", "elbow", "flex", "roll", "jaw"]}, {}, r"joints names 5 numbers, .* are 6 \(lift, "),
        ({"joints": "lift"}, {}, r"arms\.right\.joints a list of names"),
        ({"model": "/robot/arm.xml"}, {}, r"arms\.right\.model is '/robot/arm\.xml': the file must lie beside"),
        ({"model": "../arm.xml"}, {}, r"arms\.right\.model is '\.\./arm\.xml': the file must lie beside"),
        ({"model": "robot/five.xml"}, {}, r"five\.xml, the model of an arm in the calibration file, is missing"),
        ({"gripper": "linear_4310"}, {}, "needs model, tool and joints together, and no arm or gripper"),
        ({}, {"units": None}, r"joints\.units is None: say degrees or radians\. .* -100 to 100"),
        ({}, {"units": "normalized"}, r"units is 'normalized': say degrees or radians\. .* use_degrees=true"),
        ({}, {"units": "radians"}, "joint 'lift' runs from .* rad, and its model allows -2 to 2: other units, signs"),
        ({}, {"signs": [2, 1, 1, 1, 1]}, "signs are 1, or -1"),
        ({}, {"zeros": [90]}, r"joints\.zeros must be a list of 5 numbers"),
        ({}, {"index": [0, 1, 2]}, r"joints\.signs must be a list of 3 numbers"),
    ],
)
def test_a_model_that_does_not_fit_the_joints_is_refused(
    tmp_path, write_dataset, joint_states, change, joints, message
):
    calibration = write_dataset(tmp_path, state=joint_states[1])
    five_joints(tmp_path, "arm.xml", calibration, **joints)
    calibration["arms"]["right"] |= change
    save(tmp_path, calibration)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert "\n" not in str(caught.value)


def test_what_a_data_set_needs_is_said_at_once(tmp_path, write_dataset, joint_states):
    calibration = write_dataset(tmp_path, state=joint_states[1])
    (tmp_path / "calibration.yaml").unlink()
    both = r"\(lerobot\.arms\) .*\(cameras\): docs/data\.md, 'Other formats', shows both"
    with pytest.raises(FileNotFoundError, match=both + r"\. Write .*calibration\.yaml, or name a file with data\.cali"):
        find_demos(tmp_path)
    del calibration["lerobot"]
    save(tmp_path, calibration)
    with pytest.raises(ValueError, match=rf"has no lerobot\.arms: .*{both}"):
        find_demos(tmp_path)
    five = {"joints": {"feature": "observation.state", "index": [0, 1, 2, 3, 4]}, "gripper": {}}
    save(tmp_path, calibration | {"lerobot": {"arms": {"right": five}}})
    with pytest.raises(ValueError, match=r"joints names 5 numbers, and a YAM has 6 joints: another arm needs model"):
        find_demos(tmp_path)[0].read()
    five["joints"]["index"] = [0, 1, 2, 3, 4, 5]
    so100 = {"lerobot": {"arms": {"right": five}}, "arms": {"right": {"arm": "so100"}}}
    save(tmp_path, calibration | so100)
    with pytest.raises(ValueError, match=r"unknown arm 'so100'; known: .*; an arm that is no YAM needs model, tool"):
        find_demos(tmp_path)[0].read()


def test_joints_of_a_yam_become_poses(tmp_path, write_dataset, check_geometry):
    step = np.linspace(0, 1, 6)[:, None]
    joints = np.array([0.2, 1.0, 1.2, -1.1, 0.1, 0.0]) + step * np.array([-0.3, 0.2, 0.1, -0.2, -0.2, 0.4])
    calibration = write_dataset(tmp_path, joints=joints)
    calibration["lerobot"] = {
        "arms": {
            "right": {
                "joints": {"feature": "observation.state", "index": [0, 1, 2, 3, 4, 5]},
                "gripper": {"feature": "observation.state", "index": [6], "closed": 0, "open": 80},
            }
        }
    }
    save(tmp_path, calibration)
    demo = find_demos(tmp_path)[0].read()
    np.testing.assert_allclose(demo.arms["right"].position, forward_kinematics(joints)[0], atol=1e-6)
    np.testing.assert_allclose(demo.arms["right"].joints, joints, atol=1e-6)
    assert demo.arms["right"].commanded is None
    assert demo.source["models"] == {"right": ["yam", "linear_4310"]}
    check_geometry(demo, "top", "right")
    joint_entry = calibration["lerobot"]["arms"]["right"]["joints"]
    for change, said in (
        ({"zeros": [0, 1.6, 0, 0, 0, 0]}, r"joint 'joint2' runs from -0\.6 to .* rad, and its model allows 0 to 3\.67"),
        ({"index": [0, 1, 2, 6, 4, 5]}, r"joint 'joint4' runs from .* to 80 rad, and its model allows -1\.69 to 1\.57"),
    ):
        joint_entry |= change
        save(tmp_path, calibration)
        with pytest.raises(ValueError, match=r"lerobot\.arms\.right\.joints: " + said):
            find_demos(tmp_path)[0].read()
        joint_entry.pop("zeros", None)


def test_joints_of_a_yam_in_degrees_need_their_units(tmp_path, write_dataset):
    joints = np.array([0.2, 1.0, 1.2, -1.1, 0.1, 0.0]) + np.linspace(0, 0.1, 6)[:, None]
    gripper = np.full((6, 1), 40.0)
    calibration = write_dataset(tmp_path, state=np.concatenate([np.degrees(joints), gripper], axis=1))
    joint_entry = {"feature": "observation.state", "index": [0, 1, 2, 3, 4, 5]}
    grip = {"feature": "observation.state", "index": [6], "closed": 0, "open": 80}
    calibration["lerobot"] = {"arms": {"right": {"joints": joint_entry, "gripper": grip}}}
    save(tmp_path, calibration)
    with pytest.raises(ValueError, match=r"joints: joint 'joint1' runs from 11\.5 to 17\.2 rad.*: other units, signs"):
        find_demos(tmp_path)[0].read()
    joint_entry["units"] = "degrees"
    save(tmp_path, calibration)
    arm = find_demos(tmp_path)[0].read().arms["right"]
    np.testing.assert_allclose(arm.joints, joints, atol=1e-6)
    np.testing.assert_allclose(arm.position, forward_kinematics(joints)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "encode"),
    [
        ("quaternion_wxyz", lambda r: r.as_quat(scalar_first=True)),
        ("rotation_vector", lambda r: r.as_rotvec()),
        ("matrix", lambda r: r.as_matrix().reshape(-1, 9)),
        ("euler_xyz", lambda r: r.as_euler("xyz")),
    ],
)
def test_rotations_in_every_notation(scene, kind, encode):
    from keygrip.data.robot.formats.lerobot_poses import _matrices

    values = encode(Rotation.from_matrix(scene.rotation))
    np.testing.assert_allclose(_matrices(values, kind, "x"), scene.rotation, atol=1e-9)


def test_an_old_version_and_missing_parts_are_refused(tmp_path, write_dataset):
    write_dataset(tmp_path)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    (tmp_path / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"version v1\.6; versions 2\.0, 2\.1 and 3 are read\. Versions 1\.x") as error:
        find_demos(tmp_path)
    assert "convert_dataset_v21_to_v30" not in str(error.value)  # that script takes only 2.1
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    (tmp_path / "data/chunk-000/file-001.parquet").unlink()
    references = find_demos(tmp_path)
    references[0].read()
    with pytest.raises(DemoError, match=r"file-001\.parquet is missing"):
        references[2].read()
    (tmp_path / "videos" / KEY / "chunk-000/file-000.mp4").unlink()
    with pytest.raises(DemoError, match=r"file-000\.mp4"):
        references[0].read()
    (tmp_path / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has no meta/episodes"):
        find_demos(tmp_path)


def test_notes_of_macos_change_nothing(tmp_path, write_dataset):
    write_dataset(tmp_path, pictures_in_parquet=True)
    before = contents(tmp_path)
    leave_notes(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"PAR1" * 9, None])
def test_a_damaged_list_of_episodes_is_named(tmp_path, write_dataset, content):
    write_dataset(tmp_path)
    file = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    file.write_bytes(file.read_bytes()[:-30] if content is None else content)
    with pytest.raises(ValueError, match=r"meta/episodes/chunk-000/file-000\.parquet: .*copy the data set again"):
        find_demos(tmp_path)


def test_episodes_that_are_counted_and_not_listed_are_broken_demos(tmp_path, write_dataset):
    write_dataset(tmp_path)
    file = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(file).to_pylist()
    for listed, broken, reason in (
        ([rows[0], rows[2]], "episode_000001", "info.json counts it and meta does not list it"),
        ([*rows, rows[1]], "episode_000001", "listed twice"),
    ):
        pq.write_table(pa.Table.from_pylist(listed), file)
        found = {reference.name: reference for reference in find_demos(tmp_path)}
        assert list(found) == [f"episode_{number:06d}" for number in range(3)]
        found["episode_000000"].read()
        with pytest.raises(DemoError, match=reason):
            found[broken].read()
    info = json.loads((tmp_path / "meta/info.json").read_text())
    (tmp_path / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 10**12}))
    with pytest.raises(ValueError, match="counts 1000000000000 episodes, and 3 are listed"):
        find_demos(tmp_path)
    (tmp_path / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 2}))  # some were removed by hand
    assert len(find_demos(tmp_path)) == 3


@pytest.mark.parametrize(("tasks", "said"), [([None], ""), (["Pick", "Place"], "Pick"), ([7], None)])
def test_tasks_are_text(tmp_path, write_dataset, tasks, said):
    write_dataset(tmp_path, pictures_in_parquet=True)
    to_version_2(tmp_path)
    file = tmp_path / "meta/episodes.jsonl"
    lines = [json.loads(line) | {"tasks": tasks} for line in file.read_text().split("\n") if line]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    if said is None:  # a task index that tasks.jsonl does not contain
        assert find_demos(tmp_path)[0].read().instruction == ""
        return
    demo = find_demos(tmp_path)[0].read()
    assert demo.instruction == said
    assert ("notes" in demo.source) == (len(tasks) > 1)


def test_a_line_of_version_2_ends_with_a_line_feed_alone(tmp_path, write_dataset):
    write_dataset(tmp_path, pictures_in_parquet=True)
    to_version_2(tmp_path)
    file = tmp_path / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    lines[0]["tasks"] = ["Pick\u2028up\x85it"]
    file.write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert find_demos(tmp_path)[0].read().instruction == "Pick\u2028up\x85it"


def test_a_video_that_is_too_short_for_its_episodes_is_refused(tmp_path, scene, write_dataset, write_video):
    write_dataset(tmp_path)
    write_video(tmp_path / "videos" / KEY / "chunk-000/file-000.mp4", scene.pictures(), FPS)
    references = find_demos(tmp_path)
    references[0].read()
    with pytest.raises(DemoError, match="the video holds 6 frames, 10 are needed"):
        references[1].read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("lerobot"), r"no lerobot\.arms"),
        (lambda c: c["lerobot"]["arms"]["right"].pop("gripper"), "needs gripper"),
        (lambda c: c["lerobot"]["arms"]["right"].update(gripers=1), "right has an unknown key 'gripers'; did"),
        (lambda c: c["lerobot"].update(intervene={}), "lerobot has an unknown key 'intervene'; did you mean 'interv"),
        (
            lambda c: c["lerobot"]["arms"]["right"]["gripper"].update(opened=0.085),
            r"right\.gripper has an unknown key 'opened'; did you mean 'open'",
        ),
        (
            lambda c: c["lerobot"]["arms"]["right"]["position"].update(names=["x"]),
            r"\{feature: NAME, index: \[\.\.\.\]\} or .*: give one of the two",
        ),
        (
            lambda c: c["lerobot"]["arms"]["right"].update(commanded={"postion": 3}),
            r"right\.commanded has an unknown key 'postion'; did you mean 'position'",
        ),
        (
            lambda c: c["lerobot"]["arms"]["right"]["rotation"].update(order="xyzw"),
            r"right\.rotation has an unknown key 'order'",
        ),
        (lambda c: c["lerobot"]["arms"]["right"].pop("rotation"), "needs position and rotation, or joints"),
        (lambda c: c["lerobot"]["arms"]["right"]["rotation"].update({"as": "xyzw"}), "must be one of quaternion_wxyz"),
        (
            lambda c: c["lerobot"]["arms"]["right"].update(
                position={"feature": "observation.state", "names": ["x", "q"]}
            ),
            "names q; .* has x, y, z",
        ),
        (lambda c: c["lerobot"]["arms"]["right"]["position"].update(index=[0, 1, 9]), "asks for number 9"),
        (lambda c: c["lerobot"]["arms"]["right"]["position"].update(feature="state"), "the data set has"),
        (
            lambda c: c["lerobot"]["arms"]["right"]["gripper"].update(index=7.5),
            r"right\.gripper\.index is 7\.5: observation\.state is counted by whole numbers from 0",
        ),
        (lambda c: c["lerobot"]["arms"]["right"]["position"].update(index=[0, 1, -1]), r"position\.index is -1"),
        (
            lambda c: c["lerobot"]["arms"]["right"]["gripper"].update(index=[6, 7]),
            r"right\.gripper names 2 numbers of observation\.state: the opening is one, give one index",
        ),
        (lambda c: c["lerobot"]["arms"]["right"]["gripper"].update(open=1.0), "other units"),
        (
            lambda c: c.update(cameras={"front": c["cameras"]["top"]}),
            r"no camera is calibrated \(top: .* no entry for it\)",
        ),
    ],
)
def test_wrong_sidecars_are_one_clear_line(tmp_path, write_dataset, change, message):
    calibration = write_dataset(tmp_path)
    change(calibration)
    save(tmp_path, calibration)
    with pytest.raises(ValueError, match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"left": ["x", "y", "z", "q"], "right": ["x", "y", "z", "q"]}, "several numbers of the name x: give index"),
        (["x", "y", "z"], "observation.state has 3 names for 8 numbers: give index"),
    ],
)
def test_names_that_do_not_tell_numbers_apart_are_refused(names: Any, message: str) -> None:
    table = {"observation.state": [list(range(8)), list(range(8))]}
    info = {"features": {"observation.state": {"names": names}}}
    entry = {"feature": "observation.state", "names": ["x", "y", "z"]}
    with pytest.raises(ValueError, match=message):
        numbers(table, info, "arms.right.position", entry, Path("calibration.yaml"))
    by_index = {"feature": "observation.state", "index": [4, 5, 6]}
    assert numbers(table, info, "arms.right.position", by_index, Path("c.yaml"))[0].tolist() == [4, 5, 6]


def test_a_stretch_of_video_belongs_to_one_episode(tmp_path, write_dataset):
    """LeRobot's merge once gave all episodes of a source the last of its video files."""
    write_dataset(tmp_path)
    path = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row[f"videos/{KEY}/file_index"] = rows[-1][f"videos/{KEY}/file_index"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    references = find_demos(tmp_path)
    for reference, other in ((references[0], 2), (references[2], 0)):
        with pytest.raises(DemoError, match=f"also given to episode {other} in meta/episodes"):
            reference.read()


@pytest.mark.parametrize("described", ["info", "video_info"])
def test_depth_maps_are_told_by_either_name_of_the_description(described: str) -> None:
    """Version 2.0 has `video_info`."""
    for mark in DEPTH_MARKS:
        assert _is_depth({"dtype": "video", described: {mark: True}})
        assert not _is_depth({"dtype": "video", described: {mark: False}})
    assert not _is_depth({"dtype": "video", described: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, r"info\.json: fps is 0; the data set's frames per second, above 0, are needed"),
        ({"fps": None}, r"info\.json: fps is None"),
        ({"fps": "fast"}, r"info\.json: fps is 'fast'"),
        ({"video_path": None}, r"info\.json: video_path is None; the pattern by which video files are found is needed"),
        ({"data_path": None}, r"info\.json: data_path is None"),
    ],
)
def test_a_wrong_description_is_one_clear_line(tmp_path, write_dataset, change, message):
    write_dataset(tmp_path)
    file = tmp_path / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DemoError, match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert "\n" not in str(caught.value)


def test_two_features_are_not_one_camera(tmp_path, write_dataset):
    write_dataset(tmp_path)
    file = tmp_path / "meta/info.json"
    info = json.loads(file.read_text())
    info["features"]["top"] = info["features"]["observation.images.top"]
    file.write_text(json.dumps(info))
    with pytest.raises(DemoError, match=r"observation\.images\.top and top would both be camera top: rename one"):
        find_demos(tmp_path)[0].read()


def test_a_row_without_numbers_is_named(tmp_path, write_dataset):
    write_dataset(tmp_path)
    file = tmp_path / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(file).to_pylist()
    whole = rows[3]["observation.state"]
    for given, said in ((None, "is empty"), (whole[:5], "has 5 numbers")):
        rows[3]["observation.state"] = given
        pq.write_table(pa.Table.from_pylist(rows), file)
        with pytest.raises(
            DemoError, match=rf"observation\.state {said} at frame 3 .* others have 8 .*right\.position"
        ):
            find_demos(tmp_path)[0].read()


def test_an_import_is_continued_with_what_it_was_begun_with(tmp_path, write_dataset):
    """All episodes have the same origin, the data set. The origin states neither the calibration nor the episode
    numbers."""
    write_dataset(tmp_path / "raw")
    source, destination = tmp_path / "raw", tmp_path / "native"
    imported = partial(import_demos, source, destination, progress=False)
    assert imported(max_demos=2).written == 2
    held = {path: path.stat().st_mtime_ns for path in destination.rglob("*")}
    file = source / "calibration.yaml"
    given = file.read_text()
    for entry, change, said in (
        ("cameras", lambda c: c["top"]["intrinsics"].update(fx=91.0), "its top/intrinsics is another than there"),
        ("cameras", lambda c: c.clear(), "it has no top/intrinsics; there it has some"),
        ("lerobot", lambda c: c["arms"]["right"]["gripper"].update(open=100.0), "its right/gripper is another"),
        ("lerobot", lambda c: c["arms"]["right"].pop("commanded"), "it has no right/commanded/gripper; there it has s"),
    ):
        content = yaml.safe_load(given)
        change(content[entry])
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(
            ValueError, match=f"episode_000000 was imported before, and now {said}.*into another folder"
        ):
            imported()
    file.write_text(given)
    with pytest.raises(ValueError, match="now video=true is asked for; there it is false"):
        imported(video=True)
    with pytest.raises(ValueError, match="now its cameras are top, wrist; there they are top"):
        imported(cameras=["top", "wrist"])
    table = source / "meta/episodes/chunk-000/file-000.parquet"
    episodes = table.read_bytes()
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"tasks": ["Take it"]} for row in rows]), table)
    with pytest.raises(ValueError, match="now its instruction is 'Take it'; there it is 'Pick up the cube'"):
        imported()
    table.write_bytes(episodes)
    assert {path: path.stat().st_mtime_ns for path in destination.rglob("*")} == held
    assert (imported().written, imported().skipped) == (1, 3)
    (destination / "episode_000002/trajectory.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"episode_000002: .*episode_000002 is damaged \(.*: remove it"):
        imported()


def test_import_to_native(tmp_path, write_dataset, check_geometry):
    write_dataset(tmp_path / "raw")
    summary = import_demos(tmp_path / "raw", tmp_path / "native", video=True, progress=False)
    assert summary.written == 3
    for reference in find_demos(tmp_path / "native"):
        check_geometry(reference.read(), "top", "right")


@ROUNDS
@pytest.mark.parametrize("pictures_in_parquet", [False, True])
def test_damage_is_named_or_left_out(tmp_path, write_dataset, pictures_in_parquet, rounds):
    write_dataset(tmp_path / "set", pictures_in_parquet)
    assert_damage_is_found(tmp_path / "set", rounds, unnoticed=(".json", ".yaml", ".parquet", ".mp4"))
