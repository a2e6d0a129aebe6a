"""The writer of LeRobot data sets: our reader reads back what was written, and the metadata describe it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.lerobot_export import files, statistics
from keygrip.data.robot.lerobot_export.export import export_lerobot
from keygrip.data.robot.lerobot_export.layout import Layout
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter


@pytest.fixture
def demos(tmp_path: Path, native_demo) -> Path:
    """Write three demos of two arms and two cameras, with 12, 9 and 12 frames; the camera `over` moves in the second
    demo."""
    root = tmp_path / "demos"
    for number, frames in enumerate((12, 9, 12)):
        folder = native_demo(
            root / f"demo_{number}", frames=frames, arms=("left", "right"), cameras=("over", "side"), seed=number % 2
        )
        times = np.cumsum(np.full(frames, 100_000_000)) + 7_000_000 * (np.arange(frames) % 2)  # jitter
        with np.load(folder / "trajectory.npz") as archive:
            arrays = dict(archive)
        np.savez(folder / "trajectory.npz", **(arrays | {"timestamps_ns": times - times[0]}))
        for camera in ("over", "side"):
            for index in range(frames):
                smooth = np.zeros((40, 48, 3), np.uint8)
                smooth[..., 0], smooth[..., 1] = 20 * number + 4 * index, np.arange(48)
                Image.fromarray(smooth).save(folder / "rgb" / camera / f"{index:06d}.jpg", quality=95)
        if number == 1:
            with np.load(folder / "cameras.npz") as archive:
                arrays = dict(archive)
            moving = np.repeat(arrays["over/world_to_camera"][None], frames, axis=0)
            moving[:, 0, 3] = 0.01 * np.arange(frames)
            np.savez(folder / "cameras.npz", **(arrays | {"over/world_to_camera": moving}))
    return root


def test_our_reader_reads_back_what_was_written(demos: Path, tmp_path: Path) -> None:
    summary = export_lerobot(demos, tmp_path / "set", progress=False)
    assert (summary.episodes, summary.frames, summary.tasks, summary.broken) == (3, 33, 2, [])
    written = [reference.read() for reference in find_demos(demos)]
    entries = yaml.safe_load((tmp_path / "set/calibration.yaml").read_text())["lerobot"]["arms"]
    assert {arm: entry["joints"]["units"] for arm, entry in entries.items()} == dict.fromkeys(entries, "radians")
    back = [reference.read() for reference in find_demos(tmp_path / "set")]
    assert [demo.source["format"] for demo in back] == ["lerobot_v3"] * 3
    for ours, theirs in zip(written, back, strict=True):
        assert (theirs.task, theirs.instruction, theirs.robot) == (ours.task, ours.instruction, ours.robot)
        np.testing.assert_array_equal(theirs.timestamps, ours.timestamps)
        for name, arm in ours.arms.items():
            read = theirs.arms[name]
            assert arm.commanded is not None
            assert read.commanded is not None
            for first, second in ((arm, read), (arm.commanded, read.commanded)):
                np.testing.assert_allclose(second.position, first.position, rtol=0, atol=1e-15)
                np.testing.assert_allclose(second.quaternion, first.quaternion, rtol=0, atol=1e-14)
                np.testing.assert_array_equal(second.gripper, first.gripper)
            np.testing.assert_array_equal(read.joints, arm.joints)
        for name, track in ours.cameras.items():
            np.testing.assert_array_equal(theirs.cameras[name].intrinsics, track.intrinsics)
            np.testing.assert_array_equal(theirs.cameras[name].world_to_camera, track.world_to_camera)
            for index in range(len(ours)):
                one, other = track.frames.read(index), theirs.cameras[name].frames.read(index)
                assert np.abs(one.astype(int) - other.astype(int)).mean() < 2, f"{ours.name}, {name}, frame {index}"


def test_actions_are_commands_and_signs_are_continuous(demos: Path, tmp_path: Path) -> None:
    folder = demos / "demo_0"
    with np.load(folder / "trajectory.npz") as archive:
        arrays = dict(archive)
    arrays["left/quaternion_wxyz"][5:] *= -1
    np.savez(folder / "trajectory.npz", **arrays)
    export_lerobot(demos, tmp_path / "set", max_demos=1, cameras=["over"], progress=False)
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert [key for key in info["features"] if key.startswith("observation.images.")] == ["observation.images.over"]
    assert info["features"]["action"]["names"][:2] == ["left.x", "left.y"]
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    state, action = (np.array(table[key].to_pylist()) for key in ("observation.state", "action"))
    np.testing.assert_allclose(action[:, 0], arrays["left/commanded_position_m"][:, 0], atol=1e-7)
    assert (state[:, 3] > 0).all()
    assert ((state[:, 3:7] * action[:, 3:7]).sum(axis=1) > 0).all()
    np.testing.assert_allclose(table["timestamp"].to_numpy(), np.arange(12) / 10, atol=1e-6)


def test_what_lerobot_has_no_word_for_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "VIDEO_FILE_S", 0.5)  # to write several files
    rng, matrix, rate = np.random.default_rng(0), np.diag([60.0, 60.0, 1.0]), 29.97
    words = ["", "把红色方块放进碗里 ☕", "go"]
    for number, sentence in enumerate(words):
        lost = {"lost": "nobody measured it"}
        with DemoWriter(tmp_path / f"demos/{number}", "duo", "lift it", sentence, rate, uncalibrated=lost) as writer:
            for index in range(10 + number):
                arms = {
                    name: ArmPose(rng.normal(size=3), np.eye(4)[0], 0.5, rng.normal(size=6), rng.normal(size=2))
                    for name in ("left", "right")
                }
                image = np.full((16, 32, 3), 10 * number + index, np.uint8)
                writer.add(
                    round(index * 1e9 / rate) + 10**18,
                    {"over": image, "lost": image},
                    dict.fromkeys(("over", "lost"), CameraPose(matrix, np.eye(4))),
                    arms,
                    depth={"over": np.full((16, 32), 40_000, np.uint16)},
                    intervention=number == 1 and index > 4,
                )
    summary = export_lerobot(tmp_path / "demos", tmp_path / "set", progress=False)
    assert (summary.episodes, summary.left_out) == (3, ["depth of over"])
    assert len(list((tmp_path / "set").rglob("file-*.mp4"))) == 2 * 3
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet").to_pydict()["task"]
    assert tasks == ["lift it", *words[1:]]  # LeRobot's policies receive the task's name if there is no instruction
    for reference, back, sentence in zip(
        find_demos(tmp_path / "demos"), find_demos(tmp_path / "set"), words, strict=True
    ):
        ours, theirs = reference.read(uncalibrated=True), back.read(uncalibrated=True)
        assert (theirs.instruction, theirs.task, theirs.fps) == (sentence, "lift it", rate)
        np.testing.assert_array_equal(theirs.timestamps, ours.timestamps - ours.timestamps[0])
        for name, arm in ours.arms.items():
            assert arm.controller is not None
            np.testing.assert_array_equal(theirs.arms[name].controller, arm.controller)
            assert theirs.arms[name].commanded is None
        np.testing.assert_array_equal(
            np.zeros(len(ours), bool) if theirs.intervention is None else theirs.intervention,
            (np.arange(len(ours)) > 4) & (sentence == words[1]),
        )
        assert bool(theirs.cameras["lost"].uncalibrated)
        assert not theirs.cameras["over"].uncalibrated
        assert (
            abs(int(theirs.cameras["over"].frames.read(9).mean()) - int(ours.cameras["over"].frames.read(9).mean())) < 3
        )


def test_a_broken_demo_is_left_out_and_the_others_stay_in_place(demos: Path, tmp_path: Path) -> None:
    (demos / "demo_1/rgb/side/000004.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 3 demos in .* are broken: demo_1: .*frame 4"):
        export_lerobot(demos, tmp_path / "set", progress=False)
    assert list(tmp_path.iterdir()) == [demos]
    summary = export_lerobot(demos, tmp_path / "set", max_broken_share=0.5, progress=False)
    assert [name for name, _ in summary.broken] == ["demo_1"]
    last = find_demos(tmp_path / "set")[1].read()
    assert last.instruction == "pick up the cube number 0"
    assert abs(int(last.cameras["side"].frames.read(3)[..., 0].mean()) - (2 * 20 + 3 * 4)) < 4


def test_an_export_says_where_frames_are_missing(
    demos: Path, tmp_path: Path, change_archive, caplog: pytest.LogCaptureFixture
) -> None:
    times = np.arange(12) * 100_000_000
    times[6:] += 5_000_000_000
    change_archive(demos / "demo_2/trajectory.npz", timestamps_ns=times)
    export_lerobot(demos, tmp_path / "set", progress=False)
    (said,) = [record.getMessage() for record in caplog.records if "time stamps jump" in record.getMessage()]
    assert "in 1 demos (demo_2 (5.10 s))" in said
    read = find_demos(tmp_path / "set")[2].read()
    np.testing.assert_array_equal(read.timestamps, times)  # our reader still finds the gap


def test_models_of_arms_are_read_back_and_may_not_differ(demos: Path, tmp_path: Path, change_metadata) -> None:
    """The joints of a YAM give other poses with another gripper."""
    models = {"left": ["yam", "linear_4310"], "right": ["yam_pro", "flexible_4310"]}
    for number in range(3):
        change_metadata(demos / f"demo_{number}", source={"recorder": "keygrip.run", "models": models})
    export_lerobot(demos, tmp_path / "set", progress=False)
    for reference in find_demos(tmp_path / "set"):
        assert reference.read().source["models"] == models
    change_metadata(demos / "demo_1", source={"models": {"right": ["yam_pro", "flexible_4310"]}})  # left: the default
    export_lerobot(demos, tmp_path / "again", progress=False)
    change_metadata(demos / "demo_2", source={})
    with pytest.raises(ValueError, match=r"'demo_2' has models .*linear_4310.* the first one .*flexible_4310"):
        export_lerobot(demos, tmp_path / "other", progress=False)
    for named, said in [
        ("yam", r"demo_2: source\.models\.right is 'yam': the names of an arm and of its grip"),
        (
            ["../yam", "linear_4310"],
            r"demo_2: source\.models\.right is \['\.\./yam', .*the names of an arm",
        ),
        (["yam", "claw"], r"demo_2: source\.models\.right: unknown gripper 'claw'; known: .*linear_4310"),
        (["yum", "linear_4310"], r"demo_2: source\.models\.right: unknown arm 'yum'; known: .*yam"),
    ]:
        change_metadata(demos / "demo_2", source={"models": {"right": named}})
        with pytest.raises(ValueError, match=said):
            export_lerobot(demos, tmp_path / "other", progress=False)


def test_arms_in_another_order_are_written_in_that_of_the_first_demo(
    demos: Path, tmp_path: Path, change_metadata
) -> None:
    change_metadata(demos / "demo_2", arms=["right", "left"])
    export_lerobot(demos, tmp_path / "set", progress=False)
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet").to_pydict()
    names = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]["observation.state"]["names"]
    episode = np.array(table["episode_index"])
    for arm in ("left", "right"):
        start = names.index(f"{arm}.x")
        for feature, exact in (("observation.state", f"pose.{arm}"), ("action", f"commanded.{arm}")):
            written, poses = np.array(table[feature])[:, start : start + 3], np.array(table[exact])[:, :3]
            np.testing.assert_allclose(written, poses, atol=1e-6)
    with np.load(demos / "demo_2/trajectory.npz") as archive:
        assert np.abs(archive["left/position_m"] - archive["right/position_m"]).max() > 0.01
        np.testing.assert_allclose(np.array(table["pose.left"])[episode == 2, :3], archive["left/position_m"])


def test_a_misspelt_camera_is_refused(demos: Path, tmp_path: Path, native_demo) -> None:
    with pytest.raises(ValueError, match=r"3 of 3 demos .*demo_0: it has no camera 'sied'; it has over, side"):
        export_lerobot(demos, tmp_path / "set", cameras=["over", "sied"], progress=False)
    assert not (tmp_path / "set").exists()
    native_demo(demos / "half", arms=("left", "right"), cameras=("over",))
    both = {"cameras": ["over", "side"], "max_broken_share": 0.5, "progress": False}
    assert export_lerobot(demos, tmp_path / "set", **both).broken == [("half", "it has no camera 'side'; it has over")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cameras": []}, r"^cameras=\[\]: name at least one camera"),
        ({"max_demos": 0}, "^max_demos=0: it must be at least 1$"),
        ({"max_demos": -1}, "^max_demos=-1: it must be at least 1$"),
    ],
)
def test_an_export_of_nothing_is_refused(demos: Path, tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export_lerobot(demos, tmp_path / "set", **settings, progress=False)
    assert not (tmp_path / "set").exists()


def test_what_a_data_set_cannot_hold_is_refused(demos: Path, tmp_path: Path, native_demo) -> None:
    native_demo(demos / "other", arms=("right",), cameras=("over", "side"))
    with pytest.raises(ValueError, match=r"'other' has joints .* the first one .*left"):
        export_lerobot(demos, tmp_path / "set", progress=False)
    demo = find_demos(demos)[0].read()
    odd = {"over": replace(demo.cameras["over"], width=49)}
    with pytest.raises(ValueError, match=r"'over' is 49 x 40; H.264 takes even sizes"):
        Layout.of(replace(demo, cameras=odd), None)
    with pytest.raises(ValueError, match=r"7\.5 frames per second; LeRobot takes whole rates"):
        Layout.of(replace(demo, fps=7.5), None)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_lerobot(demos, tmp_path / "set", progress=False)


def test_statistics_are_numpys_and_merge_to_those_of_all() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) * [1, 10, 0] + [0, 5, 2] for n in (400, 50)]
    together, one = statistics.of_episodes([statistics.of_numbers(part) for part in parts]), parts[0]
    everything = np.concatenate(parts)
    for name, expected in (("mean", everything.mean(0)), ("std", everything.std(0)), ("min", everything.min(0))):
        np.testing.assert_allclose(together[name], expected, rtol=1e-12, atol=1e-12)
    assert together["count"].tolist() == [450]
    bins = (one.max(0) - one.min(0)) / statistics.BINS
    found = statistics.of_numbers(one)
    for name, share in statistics.QUANTILES.items():
        ordered = np.sort(one, axis=0)  # the exact quantile: this share of the values lies at or below it
        at = ordered[int(np.ceil(share * len(one))) - 1]
        assert (np.abs(found[name] - at) <= 2 * bins + 1e-12).all(), name
    counter, images = statistics.ImageCounter(), rng.integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)
    for image in images:
        counter.add(image)
    np.testing.assert_allclose(counter.statistics()["std"].reshape(3), (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)
    assert statistics.sampled_frames(3) == [0, 1, 2]
    assert len(statistics.sampled_frames(2000)) == 299
