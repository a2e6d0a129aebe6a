"""yam-abc episodes, written as its recorder writes them, read back and compared with the scene."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from macos import leave_notes
from robot_mutations import ROUNDS, assert_damage_is_found, contents
from scipy.spatial.transform import Rotation

from keygrip.data.robot.calibration import read_calibration
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.kinematics import check_kinematics
from keygrip.data.robot.doctor.run import doctor
from keygrip.data.robot.doctor.views import place
from keygrip.data.robot.importing import import_demos
from keygrip.data.robot.native_writer import write_demo
from keygrip.data.robot.reading import ReadingOptions
from keygrip.data.robot.roots import ReadRoots, data_roots, read_roots
from keygrip.data.robot.schema import DemoError
from keygrip.robots.kinematics import forward_kinematics

CONVENTIONS = {"camera": "opencv", "pixel": "centre", "length": "m"}
RIGHT_BASE = np.eye(4)
RIGHT_BASE[:3, :3] = Rotation.from_euler("z", 10, degrees=True).as_matrix()
RIGHT_BASE[:3, 3] = [0.0, -0.3, 0.02]
N = 6


@pytest.fixture
def joints() -> np.ndarray:
    step = np.linspace(0, 1, N)[:, None]
    return np.array([0.2, 1.0, 1.2, -1.1, 0.1, 0.0]) + step * np.array([0.2, 0.2, 0.1, -0.2, -0.2, 0.4])


def world(joints: np.ndarray, base: np.ndarray) -> np.ndarray:
    return forward_kinematics(joints)[0] @ base[:3, :3].T + base[:3, 3]


@pytest.fixture
def write_episode(scene, joints, write_video, calibration_text):
    def write(
        folder: Path,
        arms: tuple[str, ...] = ("left", "right"),
        bases: dict[str, np.ndarray] | None = None,
        slow_camera: bool = False,
    ) -> None:
        """Write an episode. Arm `arms[-1]` carries the disc. `slow_camera`: the second camera has only every second
        image."""
        folder.mkdir(parents=True)
        bases = {"left": np.eye(4), "right": RIGHT_BASE} if bases is None else bases
        path = world(joints, bases[arms[-1]])
        for arm in arms:
            np.save(folder / f"{arm}-joint_pos.npy", joints if arm == arms[-1] else 0.5 * joints)
            np.save(folder / f"{arm}-gripper_pos.npy", np.linspace(1, 0, N)[:, None])
            np.save(folder / f"action-{arm}-joint.npy", np.concatenate([joints[1:], joints[-1:]]))
            np.save(folder / f"action-{arm}-gripper.npy", np.linspace(1, 0, N)[:, None])
        times = 1.7e12 + np.arange(N) * 1000 / 30
        pictures = scene.pictures(path)
        write_video(folder / "top-images-rgb.mp4", pictures, 30)
        np.save(folder / "top-timestamp.npy", times)
        part = slice(None, None, 2) if slow_camera else slice(None)
        write_video(folder / "wrist-images-rgb.mp4", pictures[part], 30)
        np.save(folder / "wrist-timestamp.npy", times[part] + 1.0)
        camera = {"type": "realsense", "mode": "mono", "image_keys": ["rgb"], "width": 96, "height": 72, "fps": 30}
        metadata = {
            "yam_abc_reproduce_version": "0.1.0",
            "schema_version": 1,
            "created_at": "2026-01-01T00:00:00",
            "task_name": "Pick up the cube",
            "arm_names": list(arms),
            "num_arm_joints": 6,
            "control_hz": 30.0,
            "cameras": [{"name": "d435", "role": role, **camera} for role in ("top", "wrist")],
            "num_frames": N,
        }
        (folder / "metadata.json").write_text(json.dumps(metadata))
        (folder / "write_complete.flag").write_text("")

    return write


@pytest.fixture
def calibrate(scene, calibration_text):
    def write(root: Path, arms: dict | None = None, name: str = "calibration.yaml", **cameras: dict) -> dict:
        content = {
            "schema": "keygrip.calibration/1",
            "conventions": dict(CONVENTIONS),
            "cameras": {"top": calibration_text(scene), **cameras},
        }
        if arms is not None:
            content["arms"] = arms
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
        return content

    return write


BASES = {"left": {}, "right": {"world_from_base": RIGHT_BASE.tolist()}}


def test_notes_of_macos_are_no_episodes(tmp_path, write_episode, calibrate):
    write_episode(tmp_path / "pick" / "20260101_120000_1a2b3c4d")
    calibrate(tmp_path, BASES)
    before = contents(tmp_path)
    leave_notes(tmp_path)
    assert [reference.name for reference in find_demos(tmp_path)] == ["pick/20260101_120000_1a2b3c4d"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arm", "gripper"), [("yam", "crank_4310"), ("big_yam", "linear_4310"), ("yam_pro", "linear_4310")]
)
def test_the_doctor_knows_which_arm_the_poses_were_computed_of(tmp_path, write_episode, calibrate, arm, gripper):
    """Regression: compared with the poses of another arm, correct poses were reported as errors, 4.7 cm from the grasp
    site."""
    write_episode(tmp_path / "data" / "pick" / "20260101_120000_1a2b3c4d", ("right",))
    calibrate(tmp_path / "data", {"right": {"arm": arm, "gripper": gripper}})
    import_demos(tmp_path / "data", tmp_path / "native")
    for root in (tmp_path / "data", tmp_path / "native"):
        (reference,) = find_demos(root)
        demo = reference.read()
        exam = Examination([demo], frames_per_demo=4, height_bins=32, pred_size=56)
        check_kinematics(exam)
        assert exam.findings == []
        np.testing.assert_allclose(exam.measures["arm/right/site_offset_m"], 0, atol=1e-3)
        placed = place(demo, "right")
        np.testing.assert_allclose(placed.base, np.eye(4), atol=1e-6)
    demo.source["models"]["right"] = ["../yam", gripper]
    with pytest.raises(DemoError, match="the names of an arm and of its gripper"):
        place(demo, "right")


def test_a_folders_own_calibration_brings_its_corrections(tmp_path, write_episode, calibrate):
    """It has the same effect as a calibration file that is named explicitly. `step=calibrate` writes the cameras that
    it was given, and corrections."""
    write_episode(tmp_path / "data" / "pick" / "20260101_120000_1a2b3c4d")
    calibrate(tmp_path / "data", BASES)
    plain = find_demos(tmp_path / "data")[0].read().cameras["top"]
    file = tmp_path / "data/calibration.yaml"
    content = yaml.safe_load(file.read_text()) | {"corrections": {"top": {"focal_factor": 1.1, "lag_frames": 2}}}
    file.write_text(yaml.safe_dump(content))
    (tmp_path / "named.yaml").write_text(file.read_text())
    for calibration in (None, tmp_path / "named.yaml"):
        (reference,) = find_demos(tmp_path / "data", calibration=calibration)
        track = reference.read().cameras["top"]
        assert len(track.frames) == N - 2
        np.testing.assert_allclose(track.intrinsics[:, 0, 0], 1.1 * plain.intrinsics[0, 0, 0])


def test_an_arm_of_another_model_is_refused(tmp_path, write_episode, calibrate):
    write_episode(tmp_path / "pick" / "20260101_120000_1a2b3c4d")
    other = {"model": "so100.urdf", "tool": "tip", "joints": ["pan"]}
    calibrate(tmp_path, {name: entry | other for name, entry in BASES.items()})
    with pytest.raises(ValueError, match=r"arms\.\w+\.model is of another arm, and a YAM is needed here"):
        find_demos(tmp_path)[0].read()


def test_merge_keys_of_a_calibration_are_not_multiplied_out(tmp_path):
    """Each line has ten times the pairs of the line before: parsing ten such lines would fill any memory."""
    lines = ["a0: &a0 {x: 1}"] + [f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}" for i in range(5)]
    (tmp_path / "calibration.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"calibration\.yaml: line 2 merges another mapping \(<<\)"):
        read_calibration(tmp_path / "calibration.yaml")


@pytest.mark.parametrize("name", ["calibration.yaml", "calibration.json"])
def test_poses_come_from_the_kinematics_and_cameras_from_the_user(
    tmp_path, joints, write_episode, calibrate, check_geometry, name
):
    write_episode(tmp_path / "pick_up_the_cube" / "20260101_120000_1a2b3c4d")
    calibrate(tmp_path, BASES, name)
    (reference,) = find_demos(tmp_path)
    assert (reference.name, reference.format) == ("pick_up_the_cube/20260101_120000_1a2b3c4d", "yam_abc")
    demo = reference.read()
    assert list(demo.cameras) == ["top"]  # the wrist camera is not calibrated
    check_geometry(demo, "top", "right")
    right = demo.arms["right"]
    np.testing.assert_allclose(right.position, world(joints, RIGHT_BASE), atol=1e-12)
    np.testing.assert_allclose(right.gripper, np.linspace(1, 0, N))
    np.testing.assert_allclose(right.joints, joints)
    np.testing.assert_allclose(right.commanded.position[:-1], right.position[1:], atol=1e-12)
    np.testing.assert_allclose(demo.arms["left"].position, world(0.5 * joints, np.eye(4)), atol=1e-12)
    turned = Rotation.from_matrix(RIGHT_BASE[:3, :3]) * Rotation.from_quat(
        forward_kinematics(joints)[1], scalar_first=True
    )
    found = Rotation.from_quat(right.quaternion, scalar_first=True)
    assert (turned.inv() * found).magnitude().max() < 1e-9
    assert (np.sum(right.quaternion[1:] * right.quaternion[:-1], axis=1) > 0).all()
    assert (demo.robot, demo.instruction, demo.fps) == ("yam_bimanual", "Pick up the cube", 30.0)
    assert abs(int(demo.timestamps[1] - demo.timestamps[0]) - 33_333_333) < 1_000


def test_one_arm_stands_at_the_origin_unless_told_and_is_called_right(
    tmp_path, write_episode, calibrate, check_geometry
):
    write_episode(tmp_path / "a" / "b", arms=("left",))
    calibrate(tmp_path)
    demo = find_demos(tmp_path)[0].read()
    assert list(demo.arms) == ["right"]
    assert demo.source["arms"] == ["left"]
    check_geometry(demo, "top", "right")


def test_a_camera_on_the_hand_moves_with_it(tmp_path, joints, write_episode, calibrate, calibration_text, scene):
    write_episode(tmp_path / "a" / "b")
    on_hand = np.eye(4)
    on_hand[:3, 3] = [0, 0.05, -0.06]
    wrist = {
        **{key: value for key, value in calibration_text(scene).items() if key != "world_to_camera"},
        "mounted_on": "right",
        "camera_to_gripper": on_hand.tolist(),
    }
    calibrate(tmp_path, BASES, wrist=wrist)
    demo = find_demos(tmp_path)[0].read()
    pose = np.linalg.inv(demo.cameras["wrist"].world_to_camera[3])
    right = demo.arms["right"]
    matrix = Rotation.from_quat(right.quaternion[3], scalar_first=True).as_matrix()
    np.testing.assert_allclose(pose[:3, 3], right.position[3] + matrix @ on_hand[:3, 3], atol=1e-9)
    np.testing.assert_allclose(pose[:3, :3], matrix, atol=1e-9)


def test_a_camera_is_mounted_on_the_only_arm_by_either_name(
    tmp_path, write_episode, calibrate, calibration_text, scene
):
    """`step=charuco` writes the name that keygrip gives the only arm ("right"). In a calibration file of two arms, this
    name denotes the other arm."""
    write_episode(tmp_path / "a" / "b", arms=("left",))
    wrist = {key: value for key, value in calibration_text(scene).items() if key != "world_to_camera"}
    wrist["camera_to_gripper"] = np.eye(4).tolist()
    for name, arms in (("left", None), ("right", None), ("right", {"left": {}})):
        calibrate(tmp_path, arms, wrist=wrist | {"mounted_on": name})
        demo = find_demos(tmp_path)[0].read()
        place = np.linalg.inv(demo.cameras["wrist"].world_to_camera[3])[:3, 3]
        np.testing.assert_allclose(place, demo.arms["right"].position[3], atol=1e-9)
    calibrate(tmp_path, BASES, wrist=wrist | {"mounted_on": "right"})
    with pytest.raises(DemoError, match="mounted on arm 'right'; recorded are left"):
        find_demos(tmp_path)[0].read()


def test_a_slower_camera_gives_the_nearest_image(tmp_path, write_episode, calibrate, calibration_text, scene):
    write_episode(tmp_path / "a" / "b", slow_camera=True)
    calibrate(tmp_path, BASES, wrist=calibration_text(scene))
    demo = find_demos(tmp_path)[0].read()
    frames = demo.cameras["wrist"].frames
    assert len(frames) == N
    assert np.array_equal(frames.read(2), frames.read(3)) != np.array_equal(frames.read(3), frames.read(4))
    assert np.abs(frames.read(4).astype(int) - demo.cameras["top"].frames.read(4)).mean() < 2


def test_a_camera_that_began_later_gives_the_nearest_image(tmp_path, write_episode, calibrate, calibration_text, scene):
    """Regression: with equal numbers of images, each row had the image of its number, here two ticks after its pose."""
    folder = tmp_path / "a" / "b"
    write_episode(folder)
    calibrate(tmp_path, BASES, wrist=calibration_text(scene))
    (reference,) = find_demos(tmp_path)
    times = np.load(folder / "wrist-timestamp.npy")

    def images(stamps: np.ndarray) -> list[int]:
        """Return which image of the video each row gets."""
        np.save(folder / "wrist-timestamp.npy", stamps)
        demo = reference.read()
        top, wrist = demo.cameras["top"].frames, demo.cameras["wrist"].frames
        every = np.stack([top.read(index) for index in range(N)]).astype(int)
        return [int(np.abs(every - wrist.read(row)).mean(axis=(1, 2, 3)).argmin()) for row in range(N)]

    tick = 1000 / 30
    assert images(times + 2 * tick) == [0, 0, 0, 1, 2, 3]
    assert images(times - 2 * tick) == [2, 3, 4, 5, 5, 5]
    assert images(times + 0.4 * tick) == list(range(N))
    repeated = times.copy()
    repeated[1::2] = repeated[0::2]  # a slower camera, whose image was stored at two ticks
    assert images(repeated) == list(range(N))
    # the first camera is slower than the ticks, and its repeated stamps are spread out: so are the rows' times
    np.save(folder / "top-timestamp.npy", repeated)
    assert images(times + 0.6 * tick) == [0, 0, 1, 2, 3, 4]
    assert images(times - 0.6 * tick) == [1, 2, 3, 4, 5, 5]


UNUSABLE_STAMPS = [
    (lambda times: times - 1.7e12, r"begin -1\.7e\+09 s from those of the first camera"),
    (lambda times: times[::-1], "decrease"),
    (lambda times: np.append(times[1:], np.nan), "hold NaN"),
]


@pytest.mark.parametrize(("change", "said"), UNUSABLE_STAMPS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_camera_whose_stamps_cannot_be_used_is_left_out(
    tmp_path, write_episode, calibrate, calibration_text, scene, change, said, listed
):
    """A run that does not use it reads the demo; one that needs it is told why it is missing."""
    root, folder = tmp_path / "data", tmp_path / "data" / "a" / "b"
    write_episode(folder)
    calibrate(root, BASES, **({"wrist": calibration_text(scene)} if listed else {}))
    stamps = folder / "wrist-timestamp.npy"
    np.save(stamps, change(np.load(stamps)))
    reason = rf"wrist-images-rgb\.mp4: its time stamps {said}"
    (reference,) = find_demos(root)
    demo = reference.read()
    assert list(demo.cameras) == ["top"]
    (note,) = demo.source["notes"]
    assert re.search(rf"camera wrist is left out: {reason}", note)

    def read(*cameras: str, names: dict[str, str] | None = None) -> ReadRoots:
        (data_root,) = data_roots([root], None, 1, {"data": names} if names else None)
        return read_roots([data_root], "auto", ReadingOptions(cameras, ("right",)), tmp_path / "cache")

    assert [demo.name for demo in read("top").demos] == ["a/b"]
    with pytest.raises(ValueError, match=rf"its camera 'wrist' is left out: {reason}"):
        read("top", "wrist")
    with pytest.raises(ValueError, match=rf"its camera 'hand' is left out: {reason}"):
        read("top", "hand", names={"wrist": "hand"})
    assert len(read("top", names={"wrist": "hand"}).demos) == 1  # the set has this camera
    with pytest.raises(DemoError, match=rf"its camera 'wrist' is left out: {reason}"):
        write_demo(demo, tmp_path / "native", ["wrist"])
    (finding,) = [
        finding
        for finding in doctor(root, tmp_path / "report", compare_images=False, progress=False).findings
        if finding.check == "left_out_camera"
    ]
    assert re.search(rf"in 1 of 1 demos; the first, 'wrist': {reason}", finding.what)


def test_without_any_usable_camera_the_reasons_are_named(tmp_path, write_episode, calibrate, calibration_text, scene):
    folder = tmp_path / "a" / "b"
    write_episode(folder)
    np.save(folder / "wrist-timestamp.npy", np.arange(N)[::-1] * 33.0)
    for top, said in ((None, r"no camera can be used \(wrist: .*decrease"), ({}, r"calibrated \(wrist: .*; top: ")):
        content = calibrate(tmp_path, BASES, wrist=calibration_text(scene), front=calibration_text(scene))
        content["cameras"].pop("top")
        content["cameras"] |= {"top": None} if top is None else {}
        (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
        (reference,) = find_demos(tmp_path)
        with pytest.raises(DemoError, match=said):
            reference.read()
    np.save(folder / "top-timestamp.npy", np.full(N, np.nan))
    with pytest.raises(DemoError, match=r"top-timestamp\.npy, the times of all ticks, holds NaN"):
        reference.read()


def test_corrections_of_a_camera_that_is_left_out_leave_the_demo(
    tmp_path, write_episode, calibrate, calibration_text, scene
):
    folder = tmp_path / "a" / "b"
    write_episode(folder)
    np.save(folder / "wrist-timestamp.npy", np.arange(N)[::-1] * 33.0)
    content = calibrate(tmp_path, BASES, wrist=calibration_text(scene))
    content["corrections"] = {"wrist": {"focal_factor": 1.1}}
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    assert list(find_demos(tmp_path)[0].read().cameras) == ["top"]


def test_frames_of_another_resolution_scale_the_intrinsics(
    tmp_path, write_episode, calibrate, calibration_text, scene, check_geometry
):
    write_episode(tmp_path / "a" / "b")
    double = calibration_text(scene)
    values = {"fx": 180.0, "fy": 184.0, "cx": 2 * 47.0 - 0.5, "cy": 2 * 35.0 - 0.5}
    calibrate(tmp_path, BASES, top={**double, "width": 192, "height": 144, "intrinsics": values})
    check_geometry(find_demos(tmp_path)[0].read(), "top", "right")
    calibrate(tmp_path, BASES, top={**double, "width": 192, "height": 108})
    with pytest.raises(DemoError, match="another shape is a crop"):
        find_demos(tmp_path)[0].read()


def test_turned_frames_and_camera_to_world(tmp_path, scene, write_episode, calibrate, calibration_text, write_video):
    write_episode(tmp_path / "a" / "b")
    turned = calibration_text(scene)
    turned["camera_to_world"] = np.linalg.inv(np.array(turned.pop("world_to_camera"))).tolist()
    calibrate(tmp_path, BASES, top={**turned, "rotate": 180})
    track = find_demos(tmp_path)[0].read().cameras["top"]
    np.testing.assert_allclose(track.world_to_camera[0], scene.world_to_camera, atol=1e-9)
    calibrate(tmp_path, BASES, top=turned)
    straight = find_demos(tmp_path)[0].read().cameras["top"]
    np.testing.assert_array_equal(track.frames.read(1), straight.frames.read(1)[::-1, ::-1])


def test_repeated_time_stamps_of_a_slow_camera_are_spread_out(tmp_path, write_episode, calibrate):
    write_episode(tmp_path / "a" / "b")
    path = tmp_path / "a" / "b" / "top-timestamp.npy"
    times = np.load(path)
    times[1::2] = times[0::2]
    np.save(path, times)
    calibrate(tmp_path, BASES)
    steps = np.diff(find_demos(tmp_path)[0].read().timestamps)
    np.testing.assert_allclose(steps, 1e9 / 30, rtol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "write_complete.flag").unlink(), "recording was cut off"),
        (lambda folder: (folder / "right-gripper_pos.npy").unlink(), r"right-gripper_pos\.npy is missing"),
        (lambda folder: np.save(folder / "right-joint_pos.npy", np.zeros((N, 7))), r"\(frames, 6\) is needed"),
        (lambda folder: np.save(folder / "left-joint_pos.npy", np.zeros((3, 6))), "3 states|3 states and|lengths|rows"),
        (lambda folder: np.save(folder / "right-gripper_pos.npy", np.full((N, 1), 45.0)), "other units"),
        (lambda folder: np.save(folder / "top-timestamp.npy", np.arange(4.0)), "4 stamps"),
        (lambda folder: cut(folder / "top-images-rgb.mp4"), "top-images-rgb"),
    ],
)
def test_broken_episodes_are_named(tmp_path, write_episode, calibrate, damage, message):
    write_episode(tmp_path / "task" / "episode")
    calibrate(tmp_path, BASES)
    damage(tmp_path / "task" / "episode")
    with pytest.raises(DemoError, match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert caught.value.name == "task/episode"


@pytest.mark.parametrize("changed", ["role", "key", "arm"])
def test_names_of_an_episode_do_not_lead_out_of_its_folder(tmp_path, write_episode, calibrate, changed):
    folder = tmp_path / "task" / "episode"
    write_episode(folder)
    calibrate(tmp_path, BASES)
    metadata = json.loads((folder / "metadata.json").read_text())
    outside = "/../../../outside"
    if changed == "arm":
        metadata["arm_names"] = [outside, *metadata["arm_names"][1:]]
    elif changed == "role":
        metadata["cameras"][0]["role"] = outside
    else:
        metadata["cameras"][0]["image_keys"] = [outside]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DemoError, match="outside"):
        find_demos(tmp_path)[0].read()


def cut(video: Path) -> None:
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])


def test_without_a_calibration_the_message_says_what_to_write(tmp_path, write_episode):
    write_episode(tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match=r"write .*calibration\.yaml \(intrinsics and world_to_camera"):
        find_demos(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_demos(tmp_path, calibration=tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="x"), "schema is 'x'"),
        (lambda c: c["conventions"].pop("pixel"), r"conventions\.pixel must be centre"),
        (lambda c: c["conventions"].update(camera="opengl"), "camera: opencv"),
        (lambda c: c["cameras"]["top"].update(intrinsic=1), "did you mean 'intrinsics'"),
        (lambda c: c["cameras"]["top"].pop("width"), r"cameras\.top\.width is missing"),
        (lambda c: c["cameras"]["top"].pop("world_to_camera"), "needs one of world_to_camera"),
        (lambda c: c["cameras"]["top"].update(camera_to_world=np.eye(4).tolist()), "needs one of world_to_camera"),
        (lambda c: c["cameras"]["top"].update(mounted_on="right"), "mounted_on with camera_to_gripper"),
        (lambda c: c["cameras"]["top"].update(world_to_camera=np.eye(3).tolist()), "must be 4 x 4"),
        (lambda c: c["cameras"]["top"]["world_to_camera"][0].__setitem__(0, 5.0), "is not a rotation"),
        (lambda c: c["cameras"]["top"].update(world_to_camera=np.diag([1, 1, -1, 1.0]).tolist()), "mirrors"),
        (lambda c: c["cameras"]["top"].update(rotate=45), "rotate must be"),
        (lambda c: c["cameras"]["top"].update(width=0), r"top\.width is a number of pixels, at least 1, not 0"),
        (lambda c: c["cameras"]["top"].update(height=47.5), r"top\.height is a number of pixels"),
        (lambda c: c["cameras"]["top"].update(intrinsics=np.diag([-60.0, 60, 1]).tolist()), "focal lengths above 0"),
        (lambda c: c["cameras"]["top"].update(intrinsics=np.diag([60, np.nan, 1]).tolist()), "must be finite"),
        (lambda c: c["cameras"]["top"].update(intrinsics=np.diag([60.0, 60, 2]).tolist()), "the last row"),
        (lambda c: c["arms"].pop("right"), r"no arms\.right\.world_from_base"),
        (
            lambda c: c.update(cameras={"front": c["cameras"]["top"]}),
            r"no camera is calibrated \(top: .*; wrist: .* no entry",
        ),
    ],
)
def test_wrong_calibrations_are_one_clear_line(tmp_path, write_episode, calibrate, change, message):
    write_episode(tmp_path / "a" / "b")
    content = calibrate(tmp_path, {"left": {}, "right": {"world_from_base": RIGHT_BASE.tolist()}})
    change(content)
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert "\n" not in str(caught.value)


def test_import_to_native(tmp_path, write_episode, calibrate, check_geometry):
    write_episode(tmp_path / "raw" / "a" / "b")
    calibrate(tmp_path / "raw", BASES)
    import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    check_geometry(find_demos(tmp_path / "native")[0].read(), "top", "right")


@ROUNDS
def test_damage_is_named_or_left_out(tmp_path, write_episode, calibrate, rounds):
    write_episode(tmp_path / "set" / "pick" / "0")
    write_episode(tmp_path / "set" / "pick" / "1", arms=("right",))
    calibrate(tmp_path / "set", BASES)
    assert_damage_is_found(tmp_path / "set", rounds, unnoticed=(".json", ".yaml", ".npy", ".mp4"))
