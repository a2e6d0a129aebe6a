"""raiden's converted folders, written as its converter writes them, read back and compared with the scene."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from macos import leave_notes
from PIL import Image
from robot_mutations import ROUNDS, assert_damage_is_found, contents
from scipy.spatial.transform import Rotation

from keygrip.artifacts import locked
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.formats import raiden
from keygrip.data.robot.importing import LOCK_FILE, import_demos
from keygrip.data.robot.schema import DemoError
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion

LEFT_FROM_RIGHT = np.eye(4)
LEFT_FROM_RIGHT[:3, :3] = Rotation.from_euler("z", 25, degrees=True).as_matrix()
LEFT_FROM_RIGHT[:3, 3] = [0.05, -0.42, 0.01]
CAMERA_ON_HAND = np.eye(4)
CAMERA_ON_HAND[:3, 3] = [0.0, 0.06, -0.05]
RECORDERS_TOOL = np.eye(4)  # I2RT's grasp_site of linear_4310, in the frame of dreamscale-i2rt's
RECORDERS_TOOL[:3, 3] = [-0.0001, 0.00004, -0.00995]
TOOL_NOTE = "poses are computed from its joints, because the recorder's tool point is 10 mm from the grasp site"
LEFT_JOINTS = np.array([0.3, 1.2, 1.1, -1.0, 0.1, -0.4])


@pytest.fixture
def scene(scene):
    """Return the scene of all formats with a path that YAM arms at both bases reach."""
    step = np.linspace(0, 1, len(scene.position))
    position = np.stack([0.24 + 0.05 * step, -0.26 + 0.1 * step, 0.18 - 0.14 * step], axis=1)
    rotation = np.stack([pointing_down(-0.5 + 0.8 * each, 0.3 * each) for each in step])
    return replace(scene, position=position, rotation=rotation)


def joints_along(scene, base: np.ndarray) -> np.ndarray:
    """Return the joints [N, 6] of an arm at `base` whose grasp site follows the scene's path."""
    world = np.stack([pose(*each) for each in zip(scene.position, scene.rotation, strict=True)])
    return _solved((np.linalg.inv(base) @ world).tobytes())


@lru_cache
def _solved(own_poses: bytes) -> np.ndarray:
    found, start = [], np.array([0.0, 1.5, 1.5, -1.0, 0.0, 0.0])
    for own in np.frombuffer(own_poses).reshape(-1, 4, 4):
        solution = solve(own[:3, 3], own[:3, :3], start, position_tolerance=1e-8, angle_tolerance=1e-8)
        assert max(solution.position_error, solution.angle_error) < 1e-6
        start = solution.joints
        found.append(start)
    return np.stack(found)


def recorded_pose(joints: np.ndarray) -> np.ndarray:
    """Return the pose of the recorder's tool point in the arm's base, as the converter computes it from joints."""
    position, quaternion = forward_kinematics(joints)
    return pose(position, matrix_from_quaternion(quaternion)) @ RECORDERS_TOOL


def pose(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, position
    return matrix


def vector(matrix: np.ndarray, gripper: float) -> np.ndarray:
    return np.concatenate([matrix[:3, 3], matrix[:3, :3].flatten(), [gripper]])


def write_episode(
    folder: Path,
    scene,
    arms: int = 2,
    transform_in_rows: bool = True,
    protocol: int = 4,
    camera_in_left_base: bool | None = None,
) -> None:
    """Write an episode as `rd convert` does: float32 arrays, text as 0-d object arrays, metadata that state png and 14
    values. Poses are those of I2RT's tool point; without the transform, the right wrist camera is in the right base."""
    camera_in_left_base = transform_in_rows if camera_in_left_base is None else camera_in_left_base
    camera_to_world = np.linalg.inv(scene.world_to_camera).astype(np.float32)
    intrinsics = scene.intrinsics.astype(np.float32)
    intrinsics[:2, 2] -= 0.5  # drivers measure from the centre of the first pixel
    cameras = ["scene_camera"] + (["right_wrist_camera"] if arms == 2 else [])
    times = 1_700_000_000_000_000_000 + (np.arange(len(scene.position)) * 1e9 / 30).astype(np.int64)
    for camera in cameras:
        (folder / "rgb" / camera).mkdir(parents=True)
        np.save(folder / "rgb" / camera / "timestamps.npy", times)
        (folder / "depth" / camera).mkdir(parents=True)
    (folder / "lowdim").mkdir()
    base = LEFT_FROM_RIGHT if arms == 2 else np.eye(4)
    joints = joints_along(scene, base).astype(np.float32)
    targets = joints[[*range(1, len(joints)), -1]]
    for i, picture in enumerate(scene.pictures()):
        for camera in cameras:
            Image.fromarray(picture).save(folder / "rgb" / camera / f"{i:010d}.jpg", quality=95, subsampling=0)
            depth = np.full(picture.shape[:2], 700 + i, np.uint16)
            np.savez_compressed(folder / "depth" / camera / f"{i:010d}.npz", depth=depth)
        own = recorded_pose(joints[i])
        reached = [vector(own, scene.gripper[i])]
        commanded = [vector(recorded_pose(targets[i]), scene.gripper[i])]
        reached_joints, commanded_joints = [[*joints[i], scene.gripper[i]]], [[*targets[i], scene.gripper[i]]]
        if arms == 2:
            left = recorded_pose(LEFT_JOINTS)
            reached.insert(0, vector(left, 1.02))  # encoders slightly exceed the end of the stroke
            commanded.insert(0, vector(left, 1.0))
            reached_joints.insert(0, [*LEFT_JOINTS, 1.02])
            commanded_joints.insert(0, [*LEFT_JOINTS, 1.0])
        row = {
            "intrinsics": dict.fromkeys(cameras, intrinsics),
            "extrinsics": {"scene_camera": camera_to_world},
            "joints": np.concatenate(reached_joints).astype(np.float32),
            "action": np.concatenate(commanded).astype(np.float32),
            "actual_poses": np.concatenate(reached).astype(np.float32),
            "action_joints": np.concatenate(commanded_joints).astype(np.float32),
            "language_task": np.array("pick", dtype=object),
            "language_prompt": np.array("pick up the cube", dtype=object),
        }
        if arms == 2:
            stored_base = base if camera_in_left_base else np.eye(4)
            row["extrinsics"]["right_wrist_camera"] = (stored_base @ own @ CAMERA_ON_HAND).astype(np.float32)
            if transform_in_rows:
                row["T_left_from_right"] = base.astype(np.float32)
        (folder / "lowdim" / f"{i:010d}.pkl").write_bytes(pickle.dumps(row, protocol=protocol))
    metadata = {
        "info": {"name": "pick"},
        "cameras": cameras,
        "framerate": 30,
        "language": {"task": "pick", "prompt": ["pick up the cube"]},
        "num_frames": len(scene.position),
        "rgb": {"extension": "png"},
        "action": {"format": "joint_cmd", "dims": 14},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))


def write_calibration(path: Path, left_from_right: np.ndarray = LEFT_FROM_RIGHT) -> None:
    """raiden's name is that of the inverse: `right_base_to_left_base` converts left-base to right-base coordinates."""
    stored = np.linalg.inv(left_from_right).tolist()
    path.write_text(json.dumps({"bimanual_transform": {"right_base_to_left_base": stored}}))


def check_wrist_camera(demo, scene) -> None:
    """Assert that the right wrist camera is where it was mounted on the recorder's tool frame."""
    poses = np.linalg.inv(demo.cameras["right_wrist_camera"].world_to_camera)
    hand = poses @ np.linalg.inv(RECORDERS_TOOL @ CAMERA_ON_HAND)
    np.testing.assert_allclose(hand[:, :3, 3], scene.position, atol=2e-5)
    np.testing.assert_allclose(hand[:, :3, :3], scene.rotation, atol=2e-5)


def test_notes_of_macos_are_no_episodes_and_no_rows(tmp_path, scene):
    for number in range(2):
        write_episode(tmp_path / "pick" / f"{number:04d}", scene)
    before = contents(tmp_path)
    leave_notes(tmp_path)
    assert [reference.name for reference in find_demos(tmp_path)] == ["pick/0000", "pick/0001"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_two_arms_are_read_into_the_left_base(tmp_path, scene, check_geometry, protocol):
    write_episode(tmp_path / "pick" / "0000", scene, protocol=protocol)
    (reference,) = find_demos(tmp_path)
    assert (reference.name, reference.format) == ("pick/0000", "raiden")
    demo = reference.read()
    check_geometry(demo, "scene_camera", "right")
    right = demo.arms["right"]
    np.testing.assert_allclose(right.position, scene.position, atol=1e-6)  # not of the recorder's tool point
    matrices = Rotation.from_quat(right.quaternion, scalar_first=True).as_matrix()
    np.testing.assert_allclose(matrices, scene.rotation, atol=1e-6)
    np.testing.assert_allclose(right.gripper, scene.gripper, atol=1e-6)
    np.testing.assert_allclose(right.commanded.position[:-1], scene.position[1:], atol=1e-6)
    np.testing.assert_allclose(right.joints, joints_along(scene, LEFT_FROM_RIGHT), atol=1e-6)
    np.testing.assert_allclose(demo.arms["left"].position[3], forward_kinematics(LEFT_JOINTS)[0], atol=1e-6)
    assert demo.arms["left"].gripper.max() == 1.0
    assert (demo.robot, demo.task, demo.instruction, demo.fps) == ("yam_bimanual", "pick", "pick up the cube", 30.0)
    assert demo.timestamps[0] == 1_700_000_000_000_000_000
    assert demo.cameras["scene_camera"].depth.read(3)[0, 0] == 703
    check_wrist_camera(demo, scene)
    assert demo.source["models"] == {"left": ["yam", "linear_4310"], "right": ["yam", "linear_4310"]}
    assert demo.source["notes"] == [f"arm {arm}: {TOOL_NOTE} by which runs command an arm" for arm in ("left", "right")]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "joints",
            lambda values: values + [0, 0, 0, 0.4, 0, 0, 0],
            "right and joints: the poses do not belong.*by which robot model the recorder computed the poses$",
        ),
        ("action_joints", np.zeros_like, "action of arm right and action_joints: the poses do not belong"),
        ("joints", lambda values: values + [0, 0, 0, 0, 0, 0.1, 0], "turns by 6 degrees"),
        ("joints", lambda values: values * [1, np.nan, 1, 1, 1, 1, 1], "hold NaN"),
    ],
    ids=["another zero", "no commands", "a turned tool", "NaN"],
)
def test_joints_that_do_not_belong_to_the_poses_are_refused(tmp_path, scene, key, change, message):
    write_episode(tmp_path / "0000", scene, arms=1)
    edit(tmp_path / "0000", lambda row: row.update({key: change(row[key]).astype(np.float32)}), every=True)
    with pytest.raises(DemoError, match=message):
        find_demos(tmp_path)[0].read()


@pytest.mark.parametrize(("distance", "is_read"), [(0.0, True), (-0.044, True), (-0.135, False)])
def test_tool_points_up_to_some_centimetres_away_are_replaced(tmp_path, scene, distance, is_read):
    write_episode(tmp_path / "0000", scene, arms=1)

    def moved(row: dict) -> None:
        for key in ("actual_poses", "action"):
            approach = row[key][[5, 8, 11]]  # the last column of a row-major rotation
            row[key][:3] += (distance - RECORDERS_TOOL[2, 3]).astype(np.float32) * approach

    for path in sorted((tmp_path / "0000" / "lowdim").glob("*.pkl")):
        row = pickle.loads(path.read_bytes())
        moved(row)
        path.write_bytes(pickle.dumps(row))
    if not is_read:
        with pytest.raises(DemoError, match=r"tool point is 135 mm away, varies by 0 mm and turns by 0 degrees"):
            find_demos(tmp_path)[0].read()
        return
    demo = find_demos(tmp_path)[0].read()
    np.testing.assert_allclose(demo.arms["right"].position, scene.position, atol=1e-6)
    assert [note for note in demo.source["notes"] if "44 mm" in note] == demo.source["notes"]
    assert len(demo.source["notes"]) == (distance != 0)


@pytest.mark.parametrize("key", ["joints", "action_joints"])
def test_without_joints_the_recorders_tool_point_is_kept_with_a_warning(tmp_path, scene, caplog, key):
    for number in range(2):
        write_episode(tmp_path / "pick" / f"{number:04d}", scene, arms=1)
        edit(tmp_path / "pick" / f"{number:04d}", lambda row: row.pop(key, None), every=True)
    demos = [reference.read() for reference in find_demos(tmp_path)]
    moved = scene.position + scene.rotation @ RECORDERS_TOOL[:3, 3]
    for demo in demos:
        np.testing.assert_allclose(demo.arms["right"].position, moved, atol=1e-6)
        np.testing.assert_allclose(demo.arms["right"].commanded.position[:-1], moved[1:], atol=1e-6)
        assert demo.source["notes"] == [f"the lowdim files have no {key}: poses stay at the recorder's tool point"]
        assert "models" not in demo.source
    (warning,) = [record.getMessage() for record in caplog.records if "tool point" in record.getMessage()]
    assert warning.startswith(f"{tmp_path / 'pick'}: the lowdim files have no {key}")


@pytest.mark.parametrize("place", ["episode", "task", "argument"])
def test_the_bases_come_from_the_calibration_file_where_the_rows_lack_them(tmp_path, scene, check_geometry, place):
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False)
    path = {
        "episode": tmp_path / "pick" / "0000" / "calibration_results.json",
        "task": tmp_path / "pick" / "calibration_results.json",
        "argument": tmp_path / "elsewhere.json",
    }[place]
    write_calibration(path)
    (reference,) = find_demos(tmp_path, calibration=path if place == "argument" else None)
    demo = reference.read()
    check_geometry(demo, "scene_camera", "right")
    check_wrist_camera(demo, scene)
    assert demo.source["notes"][0].startswith("right_wrist_camera is moved with its arm from the right arm's base")
    assert all(TOOL_NOTE in note for note in demo.source["notes"][1:])


@pytest.mark.parametrize("newer", [False, True])
def test_the_wrist_camera_moves_with_its_arm_where_a_calibration_is_named(tmp_path, scene, newer):
    """The rows hold the transform of their conversion; the named file may be of a later calibration."""
    write_episode(tmp_path / "pick" / "0000", scene)
    path = tmp_path / "elsewhere.json"
    transform = LEFT_FROM_RIGHT.copy()
    if newer:
        transform[:3, 3] += [0.03, -0.02, 0.01]
    write_calibration(path, transform)
    demo = find_demos(tmp_path, calibration=path)[0].read()
    moved = transform @ np.linalg.inv(LEFT_FROM_RIGHT)
    expected = replace(
        scene,
        position=scene.position @ moved[:3, :3].T + moved[:3, 3],
        rotation=moved[:3, :3] @ scene.rotation,
    )
    np.testing.assert_allclose(demo.arms["right"].position, expected.position, atol=1e-6)
    check_wrist_camera(demo, expected)
    assert any("the named calibration" in note for note in demo.source["notes"]) == newer


def test_a_wrist_camera_that_is_already_in_the_left_base_stays_there(tmp_path, scene):
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False, camera_in_left_base=True)
    write_calibration(tmp_path / "pick" / "calibration_results.json")
    demo = find_demos(tmp_path)[0].read()
    check_wrist_camera(demo, scene)
    assert all(TOOL_NOTE in note for note in demo.source["notes"])


def test_an_uncalibrated_wrist_camera_is_not_moved(tmp_path, scene):
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False)
    write_calibration(tmp_path / "pick" / "calibration_results.json")
    edit(
        tmp_path / "pick" / "0000",
        lambda row: row["extrinsics"].update(right_wrist_camera=np.eye(4, dtype=np.float32)),
        every=True,
    )
    (reference,) = find_demos(tmp_path)
    demo = reference.read(uncalibrated=True)
    camera = demo.cameras["right_wrist_camera"]
    assert "its pose is the identity" in camera.uncalibrated
    assert (camera.world_to_camera == np.eye(4)).all()
    assert not any("moved" in note for note in demo.source["notes"])


def test_a_calibration_of_bases_and_corrections_brings_both(tmp_path, scene, check_geometry):
    """`prepare step=calibrate` writes corrections beside what the calibration held."""
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False)
    file = tmp_path / "elsewhere.json"
    write_calibration(file)
    content = json.loads(file.read_text()) | {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "corner", "length": "m"},
        "corrections": {"scene_camera": {"focal_factor": 1.0}},
    }
    file.write_text(json.dumps(content))
    (reference,) = find_demos(tmp_path, calibration=file)
    check_geometry(reference.read(), "scene_camera", "right")


@pytest.mark.parametrize("arms", [1, 2])
def test_a_calibration_file_without_effect_is_refused(tmp_path, scene, calibration_text, arms):
    root, file = tmp_path / "root", tmp_path / "mine.json"
    write_episode(root / "pick" / "0000", scene, arms)
    head = {"schema": "keygrip.calibration/1", "conventions": {"camera": "opencv", "pixel": "corner", "length": "m"}}
    cameras = {"cameras": {"scene_camera": calibration_text(scene)}}
    write_calibration(file)
    for content, message in [
        (head | cameras, r"mine\.json: cameras has no effect, as raiden's recordings hold their own"),
        (json.loads(file.read_text()) | head | cameras, r"mine\.json: cameras has no effect"),
        (head, r"mine\.json has no effect: it has no bimanual_transform\.right_base_to_left_base"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            find_demos(root, calibration=file)
    (root / "calibration.json").write_text(json.dumps(head | cameras))
    with pytest.raises(ValueError, match=r"calibration\.json: cameras has no effect"):
        find_demos(root)
    (root / "calibration.json").write_text(json.dumps(head | {"corrections": {"scene_camera": {"focal_factor": 1.0}}}))
    assert len(find_demos(root)) == 1


def test_a_transform_of_the_other_direction_is_noticed_by_the_wrist_camera(tmp_path, scene, check_geometry):
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False, camera_in_left_base=True)
    stored = {"bimanual_transform": {"right_base_to_left_base": LEFT_FROM_RIGHT.tolist()}}
    (tmp_path / "pick" / "calibration_results.json").write_text(json.dumps(stored))
    demo = find_demos(tmp_path)[0].read()
    check_geometry(demo, "scene_camera", "right")
    assert "the other way round" in demo.source["notes"][0]


def test_one_arm_is_called_right_and_needs_no_transform(tmp_path, scene, check_geometry):
    write_episode(tmp_path / "0000", scene, arms=1)
    demo = find_demos(tmp_path)[0].read()
    assert list(demo.arms) == ["right"]
    assert demo.robot == "yam"
    check_geometry(demo, "scene_camera", "right")


def test_png_images_are_read_as_well(tmp_path, scene, check_geometry):
    write_episode(tmp_path / "0000", scene, arms=1)
    for path in (tmp_path / "0000" / "rgb" / "scene_camera").glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    check_geometry(find_demos(tmp_path)[0].read(), "scene_camera", "right")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_does_nothing_but_fail(tmp_path, scene):
    write_episode(tmp_path / "0000", scene, arms=1)
    target = tmp_path / "ran"
    row = tmp_path / "0000" / "lowdim" / f"{2:010d}.pkl"
    for payload in (
        pickle.dumps({"intrinsics": Malicious(target), "extrinsics": {}}),
        b'cbuiltins\neval\n(S\'__import__("os").mkdir("' + str(target).encode() + b"\")'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        pickle.dumps(np.array([Malicious(target)], dtype=object)),
    ):
        row.write_bytes(payload)
        with pytest.raises(DemoError, match=r"0000000002\.pkl: the pickle asks for"):
            find_demos(tmp_path)[0].read()
        assert not target.exists()


class Built:
    """An object whose pickle calls a function, and then sets the state and the items of the result."""

    def __init__(self, function, arguments, state=None, items=None):
        self.parts = (function, arguments, state, None, None if items is None else iter(items))

    def __reduce__(self):
        return self.parts


RECONSTRUCT = np.zeros(1).__reduce__()[0]
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
ADDRESS = 0x4141_4141


def forged_dtype() -> Built:
    """Return an array whose bytes count as the addresses of objects: its dtype says that it holds no references."""
    kind = Built(np.dtype, ("O8", False, True), (3, "|", None, None, None, 8, 8, 48))
    return Built(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, ADDRESS.to_bytes(8, "little")))


def overwritten_objects() -> list:
    """Return an array of objects, and one of numbers in the same memory that overwrites the first address."""
    objects = np.array([None, None], dtype=object)
    return [objects, Built(FROM_BUFFER, (objects, np.dtype("i8"), (2,), "C"), None, [(0, ADDRESS)])]


@pytest.mark.parametrize("attack", [forged_dtype, overwritten_objects])
def test_a_pickle_that_makes_objects_of_addresses_does_nothing_but_fail(tmp_path, scene, attack):
    """In a process of its own, as a read of such an address ends it."""
    write_episode(tmp_path / "0000", scene, arms=1)
    row = tmp_path / "0000" / "lowdim" / f"{2:010d}.pkl"
    row.write_bytes(pickle.dumps({"intrinsics": {}, "extrinsics": {}, "actual_poses": attack()}))
    script = "import sys; from keygrip.data.robot.discovery import find_demos; find_demos(sys.argv[1])[0].read()"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "0000000002.pkl: " in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Built(np.dtype, ([("x", "O")],)), "asks for arrays of"),
        (np.zeros(2, "i4,O"), "asks for arrays of"),
        (np.zeros(2, "M8[ns]"), "asks for arrays of 'M8'"),
        (OrderedDict(a=1), None),
        (Built(OrderedDict, (), {"keys": 1}), "asks for attributes of a OrderedDict"),
        (Built(FROM_BUFFER, (bytes(8), "f8", (1,), "C")), "is not made of its bytes"),
    ],
)
def test_a_pickle_gives_a_state_to_plain_arrays_alone(tmp_path, value, message):
    file = tmp_path / "row.pkl"
    file.write_bytes(pickle.dumps(value))
    if message is None:
        assert raiden.safe_load(file) == value
        return
    with pytest.raises(ValueError, match=message):
        raiden.safe_load(file)


def test_a_pickle_changes_no_function_of_the_reader(tmp_path):
    """The operation that gives a state would set attributes of a function, such as its defaults."""
    payload = b"c_codecs\nencode\n(N}S'__defaults__'\n(S'latin1'\ntstb."
    (tmp_path / "row.pkl").write_bytes(payload)
    with pytest.raises(ValueError, match="asks for attributes of a function"):
        raiden.safe_load(tmp_path / "row.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_kind_are_loaded_as_they_were_stored(tmp_path, protocol):
    big = np.dtype(">f8")
    kinds = [np.arange(6).astype(kind) for kind in ("?", "i1", "u2", ">i4", "f2", ">f4", "f8", "c16", ">U3", "S3")]
    values = [
        *kinds,
        *(np.arange(4, dtype=big), np.full(2, 7, dtype=big)),  # they share a dtype
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        *([np.zeros((0, 3), np.float32)] if protocol > 2 else []),  # protocol 2 calls a function for empty bytes
        np.array("pick", dtype=object),
        np.array(["a", None, 1.5], dtype=object),
        *(np.float32(1.5), np.int64(-3), np.str_("go"), np.bool_(True)),
    ]
    file = tmp_path / "row.pkl"
    file.write_bytes(pickle.dumps(values, protocol=protocol))
    trusting = pickle.loads(file.read_bytes())  # of numpy's arrays, the byte order may become that of the machine
    for value, other, read in zip(values, trusting, raiden.safe_load(file), strict=True):
        assert type(read) is type(value)
        assert (read.dtype, read.shape, read.flags.f_contiguous) == (other.dtype, value.shape, value.flags.f_contiguous)
        np.testing.assert_array_equal(read, value)
    assert np.dtype("f8").isnative  # the shared dtypes of this process are as before


def many_times(value: object, kind: object = list) -> object:
    for _ in range(4):  # a hundred million values from a kilobyte; without a limit there could be any number of them
        value = kind([value] * 100)
    return value


def object_array(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@pytest.mark.parametrize(
    "poses",
    [
        many_times(0.0),
        many_times(0.0, tuple),
        many_times(0.0, object_array),
        [np.zeros(2000)] * 2000,
        [bytearray(2000)] * 2000,
    ],
    ids=["lists", "tuples", "arrays of objects", "arrays", "bytes"],
)
def test_a_small_pickle_that_stands_for_many_values_is_refused(tmp_path, scene, poses):
    write_episode(tmp_path / "0000", scene, arms=1)
    loop: list = []
    loop.append(loop)
    row = tmp_path / "0000" / "lowdim" / f"{2:010d}.pkl"
    for value in (poses, loop):
        row.write_bytes(pickle.dumps({"intrinsics": {}, "extrinsics": {}, "actual_poses": value}))
        assert row.stat().st_size < 40_000
        with pytest.raises(DemoError, match=r"0000000002\.pkl: its \d+ bytes stand for too many values"):
            find_demos(tmp_path)[0].read()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "metadata.json").unlink(), "conversion was cut off"),
        (
            lambda folder: (folder / "rgb/scene_camera/0000000003.jpg").unlink(),
            "1 of 6 images are missing, first number 3",
        ),
        (lambda folder: (folder / "lowdim/0000000002.pkl").unlink(), r"lowdim file 0000000002\.pkl is missing"),
        (lambda folder: (folder / "lowdim/0000000002.pkl").write_bytes(b"\x80\x04"), r"0000000002\.pkl"),
        (lambda folder: (folder / "rgb/scene_camera/timestamps.npy").unlink(), r"timestamps\.npy"),
        (lambda folder: edit(folder, lambda row: row["actual_poses"].__setitem__(0, np.nan)), "NaN"),
        (lambda folder: edit(folder, lambda row: row["actual_poses"].__setitem__(12, 57.0)), "other units"),
        (lambda folder: edit(folder, lambda row: row["actual_poses"].__setitem__(3, 9.0)), "is not a rotation"),
        (lambda folder: edit(folder, lambda row: row.pop("actual_poses")), "Run `rd convert` again"),
        (lambda folder: edit(folder, uncalibrate, every=True), "was not calibrated"),
    ],
)
def test_broken_episodes_are_named(tmp_path, scene, damage, message):
    write_episode(tmp_path / "pick" / "0000", scene, arms=1)
    damage(tmp_path / "pick" / "0000")
    with pytest.raises(DemoError, match=message) as caught:
        find_demos(tmp_path)[0].read()
    assert caught.value.name == "pick/0000"


@pytest.mark.parametrize(("part", "message"), [("rgb", "no images"), ("lowdim", "no lowdim files")])
def test_episodes_that_lack_a_whole_part_are_named(tmp_path, scene, part, message):
    for number in range(2):
        write_episode(tmp_path / "pick" / f"{number:04d}", scene, arms=1)
    shutil.rmtree(tmp_path / "pick" / "0001" / part)
    whole, cut = find_demos(tmp_path)
    whole.read()
    assert cut.name == "pick/0001"
    with pytest.raises(DemoError, match=message):
        cut.read()


@pytest.mark.parametrize(
    ("row", "language", "said"),
    [
        ("stack", {"prompt": ["other"]}, "stack"),
        (None, {"prompt": ["put it down", "or so"]}, "put it down"),
        (None, {"prompt": "put it down"}, "put it down"),
        (None, {"prompt": None, "task": "pick"}, "pick"),
        (None, {}, ""),
    ],
)
def test_instructions_are_whole_sentences(tmp_path, scene, row, language, said):
    write_episode(tmp_path / "pick" / "0000", scene, arms=1)
    edit(tmp_path / "pick" / "0000", lambda each: each.update(language_prompt=np.array(row, dtype=object)), every=True)
    file = tmp_path / "pick" / "0000" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language": language}))
    assert find_demos(tmp_path)[0].read().instruction == said


def edit(folder: Path, change, every: bool = False) -> None:
    for path in sorted((folder / "lowdim").glob("*.pkl"))[1 : None if every else 2]:
        row = pickle.loads(path.read_bytes())
        change(row)
        path.write_bytes(pickle.dumps(row))
    if every:
        path = folder / "lowdim" / f"{0:010d}.pkl"
        row = pickle.loads(path.read_bytes())
        change(row)
        path.write_bytes(pickle.dumps(row))


def uncalibrate(row: dict) -> None:
    row["extrinsics"]["scene_camera"] = np.eye(4, dtype=np.float32)


def without_pose(row: dict) -> None:
    del row["extrinsics"]["right_wrist_camera"]


def filled(value: float):
    return lambda row: row["extrinsics"]["right_wrist_camera"].fill(value)


@pytest.mark.parametrize("damage", [without_pose, filled(np.nan), filled(0.0)], ids=["absent", "NaN", "zeros"])
def test_a_camera_without_a_pose_is_left_out_and_the_others_are_read(tmp_path, scene, check_geometry, damage):
    episode = tmp_path / "pick" / "0000"
    write_episode(episode, scene, transform_in_rows=False)
    write_calibration(episode / "calibration_results.json")
    edit(episode, damage, every=True)
    (reference,) = find_demos(tmp_path)
    demo = reference.read()
    check_geometry(demo, "scene_camera", "right")
    assert list(demo.cameras) == ["scene_camera"]
    (note,) = [note for note in demo.source["notes"] if TOOL_NOTE not in note]
    assert note.startswith(
        "camera right_wrist_camera is left out: its extrinsics are absent, NaN or zero in all frames"
    )
    wrist = reference.read(uncalibrated=True).cameras["right_wrist_camera"]
    assert "was not calibrated" in wrist.uncalibrated
    assert wrist.frames.read(3).shape == (72, 96, 3)
    assert wrist.depth.read(3)[0, 0] == 703


@pytest.mark.parametrize(
    ("damage", "message"),
    [(without_pose, "no intrinsics or extrinsics in some frames"), (filled(np.nan), "NaN"), (filled(0.0), "last row")],
    ids=["absent", "NaN", "zeros"],
)
def test_a_camera_without_a_pose_in_one_frame_is_damaged(tmp_path, scene, damage, message):
    write_episode(tmp_path / "pick" / "0000", scene)
    edit(tmp_path / "pick" / "0000", damage)
    with pytest.raises(DemoError, match=message):
        find_demos(tmp_path)[0].read(uncalibrated=True)


def test_two_arms_without_a_transform_are_refused(tmp_path, scene):
    write_episode(tmp_path / "pick" / "0000", scene, transform_in_rows=False)
    with pytest.raises(DemoError, match="calibrate both wrist cameras together"):
        find_demos(tmp_path)[0].read()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        raiden.find(tmp_path, tmp_path / "nothing.json")


def test_import_keeps_images_byte_for_byte_and_can_be_continued(tmp_path, scene, check_geometry):
    for number in range(3):
        write_episode(tmp_path / "raw" / "pick" / f"{number:04d}", scene)
    first = import_demos(tmp_path / "raw", tmp_path / "native", max_demos=2, progress=False)
    assert (first.written, first.skipped, first.broken) == (2, 0, [])
    before = (tmp_path / "native/pick/0000/metadata.json").stat().st_mtime_ns
    second = import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    assert (second.written, second.skipped) == (1, 2)
    assert (tmp_path / "native/pick/0000/metadata.json").stat().st_mtime_ns == before
    references = find_demos(tmp_path / "native")
    assert [(reference.name, reference.format) for reference in references] == [
        (f"pick/{number:04d}", "native") for number in range(3)
    ]
    demo = references[2].read()
    check_geometry(demo, "scene_camera", "right")
    original = tmp_path / "raw/pick/0002/rgb/scene_camera/0000000001.jpg"
    copied = tmp_path / "native/pick/0002/rgb/scene_camera/000001.jpg"
    assert copied.read_bytes() == original.read_bytes()
    assert demo.cameras["scene_camera"].depth.read(2)[0, 0] == 702
    assert demo.source["imported_from"] == str(tmp_path / "raw/pick/0002")


def test_import_counts_broken_demos_and_stops_at_too_many(tmp_path, scene):
    for number in range(3):
        write_episode(tmp_path / "raw" / f"{number:04d}", scene, arms=1)
    (tmp_path / "raw/0001/metadata.json").unlink()
    summary = import_demos(tmp_path / "raw", tmp_path / "native", max_broken_share=0.4, progress=False)
    assert summary.written == 2
    assert summary.broken[0][0] == "0001"
    with pytest.raises(ValueError, match=r"1 of 3 demos .* are broken: 0001: no metadata\.json"):
        import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    with pytest.raises(ValueError, match="lies in the source"):
        import_demos(tmp_path / "raw", tmp_path / "raw" / "native", progress=False)


def test_a_full_disk_breaks_no_recording_and_imports_wait_for_each_other(tmp_path, scene, monkeypatch):
    write_episode(tmp_path / "raw" / "0000", scene, arms=1)

    def full(*arguments):
        with pytest.raises(BlockingIOError), locked(tmp_path / "native" / LOCK_FILE, wait=False):
            pass
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("keygrip.data.robot.importing.write_demo", full)
    with pytest.raises(OSError, match="No space left"):
        import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    with locked(tmp_path / "native" / LOCK_FILE, wait=False):
        pass


@ROUNDS
def test_damage_is_named_or_left_out(tmp_path, scene, rounds):
    write_episode(tmp_path / "set" / "0000", scene)
    write_episode(tmp_path / "set" / "0001", scene, arms=1, protocol=2)
    assert_damage_is_found(tmp_path / "set", rounds, unnoticed=(".json", ".npy", ".pkl", ".jpg"))


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (np.full((72, 96), 0.62, np.float32), "depth holds float32; uint16 millimetres are needed"),
        (np.full((72, 96), 200, np.uint8), "depth holds uint8; uint16 millimetres are needed"),
        (np.full((72, 96), 70_000, np.int32), "depth holds int32 from 70000 to 70000; uint16 millimetres are needed"),
        (np.full((72, 96), -1, np.int64), "depth holds int64 from -1 to -1; uint16 millimetres are needed"),
        (np.zeros((72, 96, 1), np.uint16), r"depth must have one channel, it has shape \(72, 96, 1\)"),
    ],
)
def test_depth_that_is_not_uint16_millimetres_is_refused(tmp_path, scene, depth, said):
    """0.62 m would become 0 mm, which means "no reading", and 1.4 m would become 1 mm."""
    write_episode(tmp_path / "pick" / "0000", scene)
    file = tmp_path / "pick" / "0000" / "depth" / "scene_camera" / "0000000002.npz"
    source = find_demos(tmp_path)[0].read().cameras["scene_camera"].depth
    np.savez_compressed(file, depth=depth)
    with pytest.raises(ValueError, match=rf"0000000002\.npz: {said}"):
        source.read(2)
    np.savez_compressed(file, depth=np.full((72, 96), 65_535, np.int32))
    assert source.read(2).dtype == np.uint16
    assert (source.read(2) == 65_535).all()
