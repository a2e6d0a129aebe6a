"""The surface of an arm from its MJCF or URDF file, and the doctor's checks with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.doctor import doctor
from keygrip.data.robot.doctor.calibrate import calibrate
from keygrip.data.robot.doctor.silhouettes import move_camera, project_points, splat
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.robots.kinematics import arm_file, forward_kinematics, matrix_from_quaternion
from keygrip.robots.model_file import arm_model, box, round_shape, surface_from_file, yam_surface
from keygrip.robots.surface import RobotSurface

# An upper arm of 30 cm that turns about the vertical and a forearm of 20 cm that turns about y, with a sliding finger.
MJCF = """<mujoco>
  <compiler angle="degree"/>
  <default>
    <geom type="capsule" size="0.03"/>
    <default class="finger"><joint type="slide" axis="0 1 0"/></default>
  </default>
  <worldbody>
    <geom type="plane" size="1 1 1"/>
    <body name="upper" pos="0 0 0.2">
      <joint name="pan" axis="0 0 1"/>
      <geom fromto="0 0 0 0.3 0 0"/>
      <body name="fore" pos="0.3 0 0" euler="0 90 0">
        <joint name="tilt" axis="0 1 0"/>
        <geom fromto="0 0 0 0.2 0 0"/>
        <site name="tip" pos="0.2 0 0"/>
        <body name="jaw" pos="0.2 0 0">
          <joint name="jaw" class="finger"/>
          <geom type="box" size="0.02 0.01 0.01"/>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>"""

URDF = """<robot name="two">
  <link name="base"/>
  <link name="upper"><visual><origin xyz="0.15 0 0" rpy="0 1.5707963267948966 0"/>
    <geometry><cylinder radius="0.03" length="0.3"/></geometry></visual></link>
  <link name="fore"><visual><origin xyz="0.1 0 0" rpy="0 1.5707963267948966 0"/>
    <geometry><cylinder radius="0.03" length="0.2"/></geometry></visual></link>
  <link name="tip"/>
  <link name="jaw"><visual><geometry><box size="0.04 0.02 0.02"/></geometry></visual></link>
  <joint name="pan" type="revolute"><origin xyz="0 0 0.2"/><axis xyz="0 0 1"/>
    <parent link="base"/><child link="upper"/></joint>
  <joint name="tilt" type="continuous"><origin xyz="0.3 0 0" rpy="0 1.5707963267948966 0"/><axis xyz="0 1 0"/>
    <parent link="upper"/><child link="fore"/></joint>
  <joint name="end" type="fixed"><origin xyz="0.2 0 0"/><parent link="fore"/><child link="tip"/></joint>
  <joint name="jaw" type="prismatic"><axis xyz="0 1 0"/><parent link="tip"/><child link="jaw"/></joint>
</robot>"""

FINGERS = {"jaw": [0.0, 0.05]}


@pytest.fixture(params=["arm.xml", "arm.urdf"])
def two_links(request, tmp_path) -> RobotSurface:
    (tmp_path / request.param).write_text(MJCF if request.param.endswith("xml") else URDF)
    return surface_from_file(tmp_path / request.param, "tip", FINGERS, density=20_000)


def test_joints_turn_the_arm_and_the_opening_slides_the_finger(two_links):
    pan, tilt = np.array([0.0, np.pi / 2, 0.4]), np.array([0.0, -np.pi / 2, -0.7])
    joints, opening = np.stack([pan, tilt], axis=1), np.array([0.0, 0.0, 1.0])
    assert two_links.joints == 2
    reach = 0.3 + 0.2 * np.cos(np.pi / 2 + tilt)  # a forearm that hangs down at tilt 0
    tip = np.stack([reach * np.cos(pan), reach * np.sin(pan), 0.2 - 0.2 * np.sin(np.pi / 2 + tilt)], axis=1)
    assert two_links.tool(joints)[:, :3, 3] == pytest.approx(tip, abs=1e-12)
    placed = two_links.at(joints, opening)
    finger = two_links.links == two_links.links.max()
    across = np.stack([-np.sin(pan), np.cos(pan), np.zeros(3)], axis=1)
    assert placed[:, finger].mean(axis=1) == pytest.approx(tip + 0.05 * opening[:, None] * across, abs=4e-3)
    low, high = placed[0].min(axis=0), placed[0].max(axis=0)
    assert low[2] == pytest.approx(-0.025, abs=0.012)  # the end of the forearm, or of its finger
    assert high == pytest.approx([0.33, 0.03, 0.23], abs=0.004)


def test_points_lie_on_their_shapes():
    points = box(np.array([0.1, 0.2, 0.3]), 5_000)
    assert np.abs(np.abs(points) / [0.1, 0.2, 0.3]).max(axis=1) == pytest.approx(1, abs=1e-9)
    assert len(points) == pytest.approx(5_000 * 8 * (0.02 + 0.03 + 0.06), rel=0.01)
    for kind, size in (
        ("sphere", [0.1]),
        ("capsule", [0.1, 0.2]),
        ("cylinder", [0.1, 0.2]),
        ("ellipsoid", [0.1, 0.2, 0.3]),
    ):
        points = round_shape(kind, np.array(size), 20_000, steps=48)
        x, y, z = points.T
        if kind == "cylinder":
            off = np.minimum(np.abs(np.hypot(x, y) - 0.1), np.abs(np.abs(z) - 0.2))
        elif kind == "ellipsoid":
            off = 0.1 * np.abs(np.linalg.norm(points / size, axis=1) - 1)
        else:
            half = size[1] if kind == "capsule" else 0.0
            off = np.abs(np.linalg.norm(points - np.clip(z, -half, half)[:, None] * [0, 0, 1], axis=1) - 0.1)
        assert off.max() < 1e-3, kind  # chords of 48 steps


@pytest.mark.parametrize(
    ("text", "tool", "fingers", "said"),
    [
        ("<html/>", None, {}, "begins with <html>"),
        ("<mujoco", None, {}, "is not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><mujoco/>', None, {}, "declares entities"),
        ("<mujoco/>", None, {}, "no joint that moves"),
        ("<mujoco><worldbody><body/></worldbody></mujoco>", None, {}, "no joint that moves"),
        (MJCF.replace('type="slide"', 'type="ball"'), None, {}, "only hinges and slides are read"),
        (MJCF.replace('size="0.03"', 'size="-1"'), None, {}, "size 0 must be positive in geom.*line 11"),
        (MJCF.replace('axis="0 0 1"', 'axis="0 0 0"'), None, {}, "axis too small in joint.*pan"),
        (MJCF.replace('axis="0 0 1"', 'axis="0 0 x"'), None, {}, "bad format in attribute .axis"),
        (
            MJCF.replace('<site name="tip" pos="0.2 0 0"/>', '<geom type="mesh" mesh="x"/>'),
            None,
            {},
            "mesh 'x' not found",
        ),
        (MJCF.replace("<worldbody>", '<worldbody><include file="b.xml"/>'), None, {}, r"opening file '.*b\.xml'"),
        (MJCF, "hand", {}, "no body, link or site 'hand'; it has fore, jaw, tip, upper"),
        (MJCF, None, {"thumb": [0, 1]}, "no joint 'thumb'; it has pan, tilt, jaw"),
        (MJCF, None, {"jaw": [0.05]}, "needs two numbers"),
        (URDF.replace('type="continuous"', 'type="floating"'), None, {}, "free joint"),
        (URDF.replace('<child link="fore"/>', '<child link="upper"/>'), None, {}, "multiple parents"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, text, tool, fingers, said):
    (tmp_path / "arm.xml").write_text(text)
    with pytest.raises(ValueError, match="(?s)" + said.replace("'", ".")):
        surface_from_file(tmp_path / "arm.xml", tool, fingers)


def test_without_a_file_there_is_no_model_and_nothing_to_set():
    assert arm_model(None) is None
    with pytest.raises(ValueError, match=r"robot_model\.path"):
        arm_model(None, tool="tip")
    with pytest.raises(FileNotFoundError):
        arm_model("nowhere.xml")


def _recorded(folder: Path, robot: RobotSurface, mirrored: bool) -> Path:
    """Write three demos of the arm waving in front of a camera, rendered as its silhouette."""
    intrinsics = np.array([[150.0, 0, 64.0], [0, 150.0, 64.0], [0, 0, 1]])
    pose = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0.25], [-1, 0, 0, 1.3], [0, 0, 0, 1]])  # from the front, level
    frames = np.arange(16)
    for number in range(3):
        joints = np.stack(
            [0.6 * np.sin(0.4 * frames + number) + 0.3, -0.9 + 0.7 * np.cos(0.3 * frames + number)], axis=1
        )
        opening = np.interp(frames, [0, 5, 8, 16], [1.0, 1.0, 0.2, 0.2])
        mask, _ = splat(project_points(robot.at(joints, opening), intrinsics, pose)[0], 128, 128)
        table = np.full((128, 128, 3), 170, np.uint8)
        images = np.where(mask[..., None], np.array([50, 60, 70], np.uint8), table)
        tool = robot.tool(joints)
        with DemoWriter(folder / f"demo_{number}", "two_links", "wave", "wave the arm", 10.0) as writer:
            for i in range(len(frames)):
                image = images[i, :, ::-1] if mirrored else images[i]
                arm = ArmPose(tool[i, :3, 3], _quaternion(tool[i]), float(opening[i]), joints[i])
                writer.add(i * 100_000_000, {"front": image}, {"front": CameraPose(intrinsics, pose)}, {"left": arm})
    return folder


def _quaternion(pose: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(pose[:3, :3]).as_quat(scalar_first=True, canonical=True)


@pytest.mark.parametrize("mirrored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_doctor_compares_an_arm_of_a_file_with_its_images(tmp_path, mirrored):
    (tmp_path / "arm.xml").write_text(MJCF)
    robot = surface_from_file(tmp_path / "arm.xml", "tip", FINGERS, density=30_000)
    root = _recorded(tmp_path / "data", robot, mirrored)
    findings = doctor(root, tmp_path / "out", progress=False, robot_model=robot).findings
    by_images = [f for f in findings if f.camera == "front" and f.check != "grazing_rays"]  # the camera stands level
    assert [finding.cause for finding in by_images] == (["images mirrored left-right"] if mirrored else [])


def test_the_yams_tool_and_links_are_where_its_kinematics_put_them():
    yam, arm_alone = yam_surface(), surface_from_file(arm_file("yam"))
    joints, opening = np.random.default_rng(0).uniform(-1, 1, (5, 6)), np.linspace(0, 1, 5)
    assert (yam.joints, arm_alone.joints) == (6, 6)
    position, quaternion = forward_kinematics(joints)
    tool = yam.tool(joints)
    assert tool[:, :3, 3] == pytest.approx(position, abs=1e-12)
    assert tool[:, :3, :3] == pytest.approx(matrix_from_quaternion(quaternion), abs=1e-12)
    poses, expected = yam.link_poses(joints, opening), arm_alone.link_poses(joints, opening)
    assert poses[:, : expected.shape[1]] == pytest.approx(expected, abs=1e-12)
    # In the tool's frame the fingers slide apart by twice the stroke, along the closing axis y.
    fingers = (np.linalg.inv(tool)[:, None] @ poses[:, -2:])[..., :3, 3]
    apart = fingers[:, 0] - fingers[:, 1]
    assert apart - apart[0] == pytest.approx(2 * 0.0475 * opening[:, None] * [[0, 1, 0]], abs=1e-6)


def _tetrahedron(path: Path) -> None:
    corners = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]], dtype="<f4")
    faces = [(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)]
    if path.suffix == ".obj":
        lines = [f"v {x} {y} {z}" for x, y, z in corners] + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
        path.write_text("\n".join(lines))
        return
    record = np.zeros(4, dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    record["corners"] = corners[np.array(faces)]
    path.write_bytes(b"\0" * 80 + (4).to_bytes(4, "little") + record.tobytes())


@pytest.mark.parametrize("mesh", ["hand.stl", "hand.obj"])
@pytest.mark.parametrize("kind", ["urdf", "mjcf"])
def test_a_mesh_lies_where_its_file_puts_it(tmp_path, mesh, kind):
    (tmp_path / "meshes").mkdir()
    _tetrahedron(tmp_path / "meshes" / mesh)
    if kind == "urdf":
        text = f"""<robot name="r"><link name="base"/><link name="hand">
          <visual><origin xyz="1 2 3"/><geometry><mesh filename="package://any/meshes/{mesh}" scale="2 2 2"/></geometry>
          </visual><collision><geometry><sphere radius="5"/></geometry></collision></link>
          <joint name="turn" type="revolute"><origin xyz="0 0 1"/><axis xyz="0 0 1"/>
          <parent link="base"/><child link="hand"/></joint></robot>"""
    else:
        text = f"""<mujoco><compiler meshdir="meshes"/><asset><mesh name="m" file="{mesh}" scale="2 2 2"/></asset>
          <worldbody><geom type="box" size="9 9 9"/><body name="hand" pos="0 0 1"><joint name="turn" axis="0 0 1"/>
          <geom type="mesh" mesh="m" pos="1 2 3" contype="0" conaffinity="0" group="2"/>
          <geom type="sphere" size="5" group="3"/></body></worldbody></mujoco>"""
    (tmp_path / f"arm.{kind}").write_text(text)
    robot = surface_from_file(tmp_path / f"arm.{kind}", "hand", density=50_000)
    placed = robot.at(np.array([[0.0], [np.pi / 2]]), np.zeros(2))
    relative = placed[0] - [1, 2, 4]
    assert relative.min() == pytest.approx(0, abs=1e-5)
    assert relative.max() == pytest.approx(0.2, abs=0.01)
    assert relative.sum(axis=1).max() == pytest.approx(0.2, abs=1e-5)  # the slanted face
    assert placed[1] == pytest.approx(np.stack([-placed[0, :, 1], placed[0, :, 0], placed[0, :, 2]], axis=1), abs=1e-5)
    assert robot.tool(np.zeros((1, 1)))[0, :3, 3] == pytest.approx([0, 0, 1])


@pytest.mark.slow
def test_calibration_with_an_arm_of_a_file(tmp_path):
    (tmp_path / "arm.xml").write_text(MJCF)
    robot = surface_from_file(tmp_path / "arm.xml", "tip", FINGERS, density=30_000)
    root = _recorded(tmp_path / "data", robot, mirrored=False)
    change = np.array([0.04, -0.03, 0.05, 0.01, -0.02, 0.02])
    for demo in root.iterdir():
        cameras = dict(np.load(demo / "cameras.npz"))
        for key in cameras:
            if key.endswith("world_to_camera"):
                cameras[key] = move_camera(np.eye(4), change) @ cameras[key]
        np.savez(demo / "cameras.npz", **cameras)
        (demo / "manifest.json").unlink(missing_ok=True)
    wrong = find_demos(root)[0].read().cameras["front"].world_to_camera[0]
    calibrate(root, tmp_path / "fixed.yaml", "auto", None, None, 3, 16, robot)
    right = np.linalg.inv(move_camera(np.eye(4), change)) @ wrong
    found = find_demos(root, calibration=tmp_path / "fixed.yaml")[0].read().cameras["front"].world_to_camera[0]
    off = found @ np.linalg.inv(right)
    assert np.degrees(Rotation.from_matrix(off[:3, :3]).magnitude()) < 0.7
    assert np.linalg.norm(np.linalg.inv(found)[:3, 3] - np.linalg.inv(right)[:3, 3]) < 0.02
