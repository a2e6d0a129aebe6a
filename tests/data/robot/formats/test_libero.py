"""LIBERO's HDF5 files, written as its `create_dataset.py` writes them, read back and compared with the scene."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from macos import leave_notes
from robot_mutations import ROUNDS, assert_damage_is_found, contents
from scipy.spatial.transform import Rotation

from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.formats import frames, libero
from keygrip.data.robot.formats.frames import HDF5Frames
from keygrip.data.robot.importing import import_demos
from keygrip.data.robot.samples import poses_of
from keygrip.data.robot.schema import DemoError

FILE = "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate_demo.hdf5"
SIDE = 64
FOVY = 45.0


@pytest.fixture
def square(scene):
    """Return the scene seen by a MuJoCo camera of 45 degrees and 64 x 64 pixels."""
    focal = 0.5 * SIDE / np.tan(np.radians(FOVY) / 2)
    scene.intrinsics = np.array([[focal, 0, SIDE / 2], [0, focal, SIDE / 2], [0, 0, 1]])
    scene.width = scene.height = SIDE
    return scene


def model(scene, name: str = "agentview") -> str:
    """Return the part of a robosuite model with the camera: an OpenGL camera, position and wxyz quaternion."""
    pose = np.linalg.inv(scene.world_to_camera)
    quaternion = Rotation.from_matrix(pose[:3, :3] @ np.diag([1, -1, -1])).as_quat(scalar_first=True)
    return (
        "<mujoco><worldbody>"
        '<camera name="frontview" mode="fixed" pos="1 0 1" quat="0.5 0.5 0.5 0.5"/>'
        f'<camera name="{name}" mode="fixed" pos="{" ".join(map(str, pose[:3, 3]))}" '
        f'quat="{" ".join(map(str, quaternion))}"/>'
        '<body name="robot0_base"/></worldbody></mujoco>'
    )


def write_file(path: Path, scene, demos: int = 2, convention: str | None = "opengl", xml: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flip = -1 if convention != "opencv" else 1
    frames = len(scene.position)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Kitchen_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the black bowl on the plate"})
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        data.attrs["num_demos"] = demos
        if convention is not None:
            data.attrs["macros_image_convention"] = convention
        for number in range(demos):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = frames
            demo.attrs["model_file"] = model(scene) if xml is None else xml
            demo["actions"] = np.zeros((frames, 7))
            demo["states"] = np.zeros((frames, 79))
            demo["rewards"] = np.zeros(frames, np.uint8)
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = scene.pictures()[:, ::flip]
            obs["eye_in_hand_rgb"] = scene.pictures()[:, ::flip]
            vectors = Rotation.from_matrix(scene.rotation).as_rotvec()
            obs["ee_states"] = np.concatenate([scene.position, vectors], axis=1)
            obs["ee_pos"], obs["ee_ori"] = scene.position, vectors
            obs["gripper_states"] = np.stack([0.04 * scene.gripper, -0.04 * scene.gripper], axis=1)
            obs["joint_states"] = np.zeros((frames, 7))


@pytest.mark.parametrize("convention", ["opengl", "opencv", None])
def test_agentview_comes_from_the_stored_model_and_is_turned_upright(tmp_path, square, check_geometry, convention):
    write_file(tmp_path / "libero_90" / FILE, square, convention=convention)
    references = find_demos(tmp_path)
    stem = f"libero_90/{FILE.removesuffix('.hdf5')}"
    assert [reference.name for reference in references] == [f"{stem}/demo_0", f"{stem}/demo_1"]
    demo = references[1].read()
    assert list(demo.cameras) == ["agentview"]
    check_geometry(demo, "agentview", "right")
    right = demo.arms["right"]
    np.testing.assert_allclose(right.position, square.position)
    matrices = Rotation.from_quat(right.quaternion, scalar_first=True).as_matrix()
    np.testing.assert_allclose(matrices, square.rotation, atol=1e-9)
    np.testing.assert_allclose(right.gripper, square.gripper, atol=1e-12)
    assert right.commanded is None
    assert (demo.robot, demo.instruction, demo.fps) == ("panda", "put the black bowl on the plate", 20.0)
    assert demo.task == "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
    assert demo.timestamps[2] == 100_000_000
    notes = " ".join(demo.source["notes"])
    assert ("turned upright" in notes) == (convention != "opencv")
    assert "eye_in_hand is left out" in notes


def test_instructions_of_several_words_and_the_controllers_inputs_are_kept(tmp_path, square):
    write_file(tmp_path / "raw" / FILE, square, demos=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (len(square.position), 7))
    with h5py.File(tmp_path / "raw" / FILE, "r+") as file:
        words = ["put", "the", "black", "bowl", "down"]
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": words})
        file["data/demo_0/actions"][...] = actions
    demo = find_demos(tmp_path / "raw")[0].read(uncalibrated=True)
    assert demo.instruction == "put the black bowl down"
    controller = demo.arms["right"].controller
    np.testing.assert_array_equal(controller[:-1], actions[1:])  # each follows the observation of its row
    assert demo.cameras["eye_in_hand"].uncalibrated
    poses = poses_of(demo, ["right"], 2, np.array([1, 2, 3]), "reached", ("controller",))
    np.testing.assert_allclose(poses["controller"][0], actions[3:6], atol=1e-6)
    import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    native = find_demos(tmp_path / "native")[0].read(uncalibrated=True)
    np.testing.assert_array_equal(native.arms["right"].controller, controller)
    assert native.cameras["eye_in_hand"].uncalibrated == demo.cameras["eye_in_hand"].uncalibrated


def test_files_without_attributes_are_those_of_openvla(tmp_path, square):
    """Files regenerated without no-ops: each observation precedes the action of its own row, and no attribute gives the
    task."""
    write_file(tmp_path / FILE, square, demos=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (len(square.position), 7))
    with h5py.File(tmp_path / FILE, "r+") as file:
        file["data/demo_0/actions"][...] = actions
        for group in (file["data"], file["data/demo_0"]):
            for name in list(group.attrs):
                del group.attrs[name]
    demo = find_demos(tmp_path)[0].read(uncalibrated=True)
    np.testing.assert_array_equal(demo.arms["right"].controller, actions)
    assert (demo.instruction, demo.fps) == ("put the black bowl on the plate", 20.0)
    assert demo.task == "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
    assert "actions are taken as given at their own row" in " ".join(demo.source["notes"])
    (tmp_path / FILE).rename(tmp_path / "LIVING_ROOM_SCENE10_put_it_down_demo.hdf5")
    assert find_demos(tmp_path)[0].read(uncalibrated=True).instruction == "put it down"


def test_a_calibration_file_adds_the_hand_and_overrides_the_model(tmp_path, square, calibration_text, check_geometry):
    write_file(tmp_path / FILE, square, xml="<mujoco/>")
    with pytest.raises(DemoError, match=r"no camera is calibrated \(agentview: .*calibration\.yaml"):
        find_demos(tmp_path)[0].read()
    entry = calibration_text(square)
    hand = {key: value for key, value in entry.items() if key != "world_to_camera"}
    hand |= {"mounted_on": "right", "camera_to_gripper": np.eye(4).tolist()}
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {"agentview": entry, "eye_in_hand": hand},
    }
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    demo = find_demos(tmp_path)[0].read()
    check_geometry(demo, "agentview", "right")
    pose = np.linalg.inv(demo.cameras["eye_in_hand"].world_to_camera[3])
    np.testing.assert_allclose(pose[:3, 3], square.position[3], atol=1e-9)
    np.testing.assert_allclose(pose[:3, :3], square.rotation[3], atol=1e-9)


def test_a_camera_that_the_calibration_gives_as_null_is_left_out(tmp_path, square, check_geometry):
    write_file(tmp_path / FILE, square)
    content = {
        "schema": "keygrip.calibration/1",
        "conventions": {"camera": "opencv", "pixel": "centre", "length": "m"},
        "cameras": {"eye_in_hand": None},
    }
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(content))
    demo = find_demos(tmp_path)[0].read(uncalibrated=True)
    assert list(demo.cameras) == ["agentview"]
    check_geometry(demo, "agentview", "right")


def test_a_data_set_in_the_place_of_a_group_is_not_searched(tmp_path, square):
    """`in` on an h5py data set reads its values: here 2^40 values, which take no space in the file."""
    write_file(tmp_path / FILE, square)
    with h5py.File(tmp_path / FILE, "r+") as file:
        del file["data/demo_0/obs"]
        file["data/demo_0"].create_dataset("obs", shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))
        del file["data/demo_1"]
        file["data"].create_dataset("demo_1", shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))
    broken, other = find_demos(tmp_path, "libero")
    with pytest.raises(DemoError, match="demo_0/obs is no group"):
        broken.read()
    with pytest.raises(DemoError, match="demo_1 is no group"):
        other.read()
    assert not libero.detect(tmp_path)


def test_broken_files_are_named(tmp_path, square):
    write_file(tmp_path / FILE, square)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / "cut_demo.hdf5").write_bytes(whole[: len(whole) // 3])
    references = find_demos(tmp_path)
    assert len(references) == 3
    broken = next(reference for reference in references if reference.name == "cut_demo")
    with pytest.raises(DemoError, match=r"the HDF5 file cannot be read: .*truncated"):
        broken.read()
    with h5py.File(tmp_path / FILE, "r+") as file:
        del file["data/demo_0/obs/ee_ori"]
        file["data/demo_1/obs/gripper_states"][...] = 5.0 * np.array([1.0, -1.0])
    demos = {reference.name.rpartition("/")[2]: reference for reference in find_demos(tmp_path)}
    with pytest.raises(DemoError, match="obs/ee_ori is missing; it holds agentview_rgb"):
        demos["demo_0"].read()
    with pytest.raises(DemoError, match=r"gripper_states .* other units"):
        demos["demo_1"].read()


def test_a_stored_model_that_declares_entities_is_refused(tmp_path, square):
    write_file(tmp_path / FILE, square, demos=1, xml="<!DOCTYPE a [<!ENTITY b 'c'>]><mujoco>&b;</mujoco>")
    with pytest.raises(DemoError, match="the model stored with the demo declares entities"):
        find_demos(tmp_path)[0].read()


@pytest.mark.parametrize("part", ["actions", "obs/ee_ori", "obs/joint_states", "obs/agentview_rgb"])
def test_data_sets_of_other_lengths_are_refused_before_any_is_read(tmp_path, square, monkeypatch, part):
    write_file(tmp_path / FILE, square, demos=1)
    with h5py.File(tmp_path / FILE, "r+") as file:
        demo = file["data/demo_0"]
        shape = demo[part].shape[1:]
        del demo[part]
        demo.create_dataset(part, shape=(1_000_000, *shape), dtype="u1", chunks=(1, *shape))  # no values are stored
    monkeypatch.setattr(libero, "own_array", lambda *data_set: pytest.fail("numbers were read"))
    said = f"{part.rpartition('/')[2]} holds 1000000 (rows|images), the demo {len(square.position)} poses"
    with pytest.raises(DemoError, match=said):
        find_demos(tmp_path)[0].read()


@pytest.mark.parametrize("stored", ["nothing", "one chunk", "packed zeros"])
def test_long_data_sets_that_are_hardly_stored_are_not_read(tmp_path, square, monkeypatch, stored):
    write_file(tmp_path / FILE, square, demos=1)
    with h5py.File(tmp_path / FILE, "r+") as file:
        demo, rows = file["data/demo_0"], 100_000
        for part in ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states", "obs/joint_states", "actions"):
            width = demo[part].shape[1]
            del demo[part]
            options = {"chunks": (1000, width), "compression": "gzip"}
            zeros = demo.create_dataset(part, shape=(rows, width), dtype="f4", **options)
            written = {"nothing": 0, "one chunk": 1000, "packed zeros": rows}[stored]
            zeros[:written] = np.zeros((written, width))
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            del demo[f"obs/{camera}"]
            demo["obs"].create_dataset(camera, shape=(rows, 8, 8, 3), dtype="u1", chunks=(1, 8, 8, 3))
    assert (tmp_path / FILE).stat().st_size < 250_000
    monkeypatch.setattr(libero, "own_array", lambda *data_set: pytest.fail("numbers were read"))
    with pytest.raises(DemoError, match=rf"ee_pos.*actions would take {rows * 22 * 8} bytes, but only \d+ are stored"):
        find_demos(tmp_path)[0].read()


def test_a_long_demo_that_is_stored_is_read(tmp_path, square, monkeypatch):
    write_file(tmp_path / FILE, square, demos=1)
    monkeypatch.setattr(frames, "SMALL_BYTES", 0)
    demo = find_demos(tmp_path)[0].read()
    np.testing.assert_allclose(demo.arms["right"].position, square.position)


def test_a_chunk_that_is_larger_than_an_image_may_be_is_not_unpacked(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        options = {"maxshape": (None, 8, 8, 3), "dtype": "u1", "compression": "gzip"}
        file.create_dataset("small", shape=(4, 8, 8, 3), chunks=(16, 8, 8, 3), **options)
        large = file.create_dataset("large", shape=(4, 8, 8, 3), chunks=(17, 8, 8, 3), **options)
        large.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(17 * 8 * 8 * 3)))
    monkeypatch.setattr(frames, "MAX_PIXELS", 16 * 8 * 8)
    assert HDF5Frames(tmp_path / "a.hdf5", "small", 4).read(1).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"large is stored in chunks of shape \(17, 8, 8, 3\), more than can be read"):
        HDF5Frames(tmp_path / "a.hdf5", "large", 4).read(1)


def test_links_are_not_followed_out_of_the_file(tmp_path, square):
    write_file(tmp_path / "other" / FILE, square)
    write_file(tmp_path / "set" / FILE, square, demos=3)
    with h5py.File(tmp_path / "set" / FILE, "r+") as file:
        file["ext"] = h5py.ExternalLink(str(tmp_path / "other" / FILE), "data/demo_0")
        for name, path in (("demo_0/obs", "ext/obs"), ("demo_1/obs/agentview_rgb", "ext/obs/agentview_rgb")):
            del file["data"][name]
            file["data"][name] = h5py.SoftLink(f"/{path}")
        del file["data/demo_2"]
        file["data/demo_2"] = h5py.ExternalLink(str(tmp_path / "other" / FILE), "data/demo_0")
    references = find_demos(tmp_path / "set")
    for reference, name in zip(references, ("demo_0/obs", "agentview_rgb", "demo_2"), strict=True):
        with pytest.raises(DemoError, match=f"{name} is a link to another place or file"):
            reference.read()


def test_files_in_capitals_are_read_and_notes_of_macos_are_not(tmp_path, square):
    write_file(tmp_path / "set" / FILE, square)
    write_file(tmp_path / "set" / "other_demo.HDF5", square)
    before = contents(tmp_path / "set")
    assert sum(name.endswith("poses") for name in before) == 4
    leave_notes(tmp_path / "set")
    assert len(find_demos(tmp_path / "set")) == 4
    assert contents(tmp_path / "set") == before


def test_other_hdf5_files_are_not_taken_for_libero(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(FileNotFoundError, match="holds no demos in a known format"):
        find_demos(tmp_path)


def test_import_to_native(tmp_path, square, check_geometry):
    write_file(tmp_path / "raw" / FILE, square)
    summary = import_demos(tmp_path / "raw", tmp_path / "native", progress=False)
    assert summary.written == 2
    assert any("turned upright" in note for note in summary.notes)
    for reference in find_demos(tmp_path / "native"):
        check_geometry(reference.read(), "agentview", "right")


@ROUNDS
def test_damage_is_named_or_left_out(tmp_path, square, rounds):
    """HDF5 data sets of LIBERO have no checksums."""
    write_file(tmp_path / "set" / FILE, square)
    assert_damage_is_found(tmp_path / "set", rounds, unnoticed=(".hdf5",))
