"""Build the MuJoCo model: table, YAM arm with gripper, objects, bowl, cameras.

The robot models have no actuators, no cameras and bright colours, and their finger meshes cannot grasp (the convex hull
of a finger tip is a pyramid). This module adds or replaces these parts. Angles in radians, lengths in metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keygrip.envs.rendering import Lens
from keygrip.envs.yam import tasks
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.robots.kinematics import arm_file, gripper_file
from keygrip.robots.mujoco_backend import mujoco


@dataclass(frozen=True)
class RobotNames:
    """Names of the parts of one arm in the model."""

    prefix: str
    motors: str = ""  # prefix of the names of the motors

    @property
    def joints(self) -> tuple[str, ...]:
        """The six joints, from the base."""
        return tuple(f"{self.prefix}joint{i}" for i in range(1, 7))

    @property
    def finger_joints(self) -> tuple[str, str]:
        """The sliding joints of both fingers."""
        return f"{self.prefix}grip_joint7", f"{self.prefix}grip_joint8"

    @property
    def tool(self) -> str:
        """The site between the finger tips."""
        return f"{self.prefix}grip_grasp_site"

    @property
    def fingers(self) -> tuple[str, str]:
        """The bodies of both fingers."""
        return f"{self.prefix}grip_tip_left", f"{self.prefix}grip_tip_right"


YAM = RobotNames("yam_")
ARM_JOINT_NAMES, FINGER_JOINT_NAMES, TOOL_SITE, FINGERS = YAM.joints, YAM.finger_joints, YAM.tool, YAM.fingers

# The real robot's controller gains.
ARM_STIFFNESS = (80.0, 80.0, 80.0, 10.0, 10.0, 10.0)
ARM_DAMPING = (5.0, 5.0, 5.0, 1.5, 1.5, 1.5)
GRIPPER_STIFFNESS, GRIPPER_DAMPING, GRIPPER_FORCE = 1500.0, 30.0, 30.0

ROBOT_COLOURS = {
    "base": (0.22, 0.23, 0.26),
    "link1": (0.55, 0.57, 0.60),
    "link2": (0.82, 0.83, 0.85),
    "link3": (0.82, 0.83, 0.85),
    "link4": (0.30, 0.32, 0.36),
    "link5": (0.55, 0.57, 0.60),
    "gripper": (0.30, 0.32, 0.36),
    "tip_left": (0.10, 0.10, 0.12),
    "tip_right": (0.10, 0.10, 0.12),
}
MESH_CELL = 0.003  # m: closer vertices are merged, which makes rendering three times faster
OBJECT_MASS = 0.05
PEDESTAL_RIM = 0.004  # m by which a pedestal is wider than its object on each side; the open fingers pass beside it
# A screen that hides an object from a camera: half its edge, and its position as a fraction of the way from the camera.
SCREEN_HALF, SCREEN_SHARE = 0.03, 0.4
HIDDEN_GROUP = 3  # MuJoCo draws groups 0 to 2

# Nominal views: the point at the image centre, and the field of view; for camera positions see tasks.CAMERA_ORBITS.
# "over" is at the front right, where the wrist hides the grasped object least (two thirds of it stay visible; from
# behind the arm, or more than 55 degrees up, less than half); the work area fills its image.
CAMERA_TARGETS = {"over": (0.30, 0.01, 0.055), "front": (0.30, 0.0, 0.10)}
CAMERA_FOVY = {"over": 29.0, "front": 36.0, "wrist": 58.0}
# D405 on the wrist mount: optical frame relative to the flange, from the station's calibration, in MuJoCo camera axes.
WRIST_POSITION = (0.0, -0.070435, 0.077006)
WRIST_OPTICAL = (-0.976294888, 0.2164446617, 0.0, 0.0)


def lens_of(camera: str, width: int, height: int) -> Lens:
    """Return the pinhole lens of a named camera."""
    return Lens.from_field_of_view(width, height, CAMERA_FOVY[camera])


def camera_pose(camera: str, azimuth_deg: float = 0.0, elevation_deg: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return position [3] and MuJoCo quaternion [4] of an outer camera, rotated around its target point."""
    azimuth, elevation, distance = tasks.CAMERA_ORBITS[camera]
    return orbit_pose(CAMERA_TARGETS[camera], azimuth + azimuth_deg, elevation + elevation_deg, distance)


def orbit_pose(
    target: tuple[float, float, float], azimuth_deg: float, elevation_deg: float, distance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return position [3] and MuJoCo quaternion [4] of a camera aimed at a point from an azimuth (from +x) and
    elevation. An elevation outside of 5 to 88 degrees, which an episode's jitter may cause, is clipped to that
    range."""
    a, e = np.deg2rad(azimuth_deg), np.deg2rad(np.clip(elevation_deg, *tasks.ELEVATIONS_DEG))
    back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return np.array(target) + distance * back, quaternion


@lru_cache(maxsize=32)
def _coarse_mesh(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [V, 3] and triangles [F, 3] of a binary STL with each grid cell's vertices merged."""
    raw = path.read_bytes()
    count = int.from_bytes(raw[80:84], "little")
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    if len(raw) != 84 + count * record.itemsize:
        raise ValueError(f"{path} is not a binary STL file: reinstall dreamscale-i2rt")
    corners = np.frombuffer(raw, record, count, 84)["corners"].reshape(-1, 3).astype(float)
    keys = np.floor(corners / cell).astype(np.int64)
    _, label = np.unique(keys, axis=0, return_inverse=True)
    label = label.ravel()
    sizes = np.bincount(label)
    vertices = np.stack([np.bincount(label, corners[:, k]) / sizes for k in range(3)], axis=1)
    faces = label.reshape(-1, 3)
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (a != c)]
    first = np.argsort(faces, axis=1)[:, :1]  # same triangle, same orientation: start at the smallest vertex
    rolled = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return vertices, np.unique(rolled, axis=0)


def _load_part(path: Path) -> mujoco.MjSpec:
    """Load a robot part with coarse meshes and plain colours, without collisions."""
    spec = mujoco.MjSpec.from_file(str(path))
    folder = path.parent / (spec.meshdir or "")
    for mesh in spec.meshes:
        vertices, faces = _coarse_mesh(folder / mesh.file, MESH_CELL)
        mesh.file = ""
        mesh.uservert, mesh.userface = vertices.ravel(), faces.astype(np.int32).ravel()
        # Bodies specify their inertia; without "shell" the compiler refuses the thin meshes.
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    for body in spec.bodies:
        for geom in body.geoms:
            # The convex hulls of the arm's links overlap and would block it; the fingers get pads instead.
            geom.contype, geom.conaffinity = 0, 0
            if geom.meshname in ROBOT_COLOURS:
                geom.rgba = [*ROBOT_COLOURS[geom.meshname], 1.0]
    return spec


def _set_joint(joint: mujoco.MjsJoint, armature: float, damping: float) -> None:
    joint.armature = armature
    try:
        joint.damping[0] = damping  # an array since MuJoCo 3.4
    except TypeError:
        joint.damping = damping


def add_robot(
    spec: mujoco.MjSpec,
    arm: str,
    gripper: str,
    names: RobotNames = YAM,
    base: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Add an arm with motors and finger pads, its base at a point of the world with the world's orientation."""
    arm_spec, gripper_spec = _load_part(arm_file(arm)), _load_part(gripper_file(gripper))
    arm_spec.body("gripper").add_frame().attach_body(gripper_spec.body("gripper"), "grip_", "")
    spec.worldbody.add_frame(pos=list(base)).attach_body(arm_spec.body("base"), names.prefix, "")
    for i, name in enumerate(names.joints):
        joint = spec.joint(name)
        _set_joint(joint, 0.02 if i < 3 else 0.005, 0.5 if i < 3 else 0.1)
        label = f"{names.motors}motor{i + 1}"
        motor = spec.add_actuator(name=label, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        motor.set_to_position(kp=ARM_STIFFNESS[i], kv=ARM_DAMPING[i])
        motor.ctrllimited, motor.ctrlrange = True, joint.range
    finger = names.finger_joints[0]
    for name in names.finger_joints:
        _set_joint(spec.joint(name), 0.05, 5.0)
    label = f"{names.motors}motor_gripper"
    motor = spec.add_actuator(name=label, target=finger, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    motor.set_to_position(kp=GRIPPER_STIFFNESS, kv=GRIPPER_DAMPING)
    motor.ctrllimited, motor.ctrlrange = True, spec.joint(finger).range
    motor.forcelimited, motor.forcerange = True, [-GRIPPER_FORCE, GRIPPER_FORCE]
    for body in spec.bodies:
        if body.name.startswith(names.prefix):
            body.gravcomp = 1.0
    _add_finger_pads(spec, names)


def _add_finger_pads(spec: mujoco.MjSpec, names: RobotNames) -> None:
    """Add boxes that collide instead of the finger meshes: a flat pad at the tip and the finger's shank above it."""
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    tool, frame = data.site(names.tool).xpos, data.site(names.tool).xmat.reshape(3, 3)
    parts = {"pad": ((0.0035, -0.013), (0.010, 0.003, 0.013)), "shank": ((0.0115, -0.048), (0.015, 0.004, 0.022))}
    for finger, side in zip(names.fingers, (1.0, -1.0), strict=True):
        origin, turn = data.body(finger).xpos, data.body(finger).xmat.reshape(3, 3)
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, (turn.T @ frame).ravel())
        for part, ((across, along), size) in parts.items():
            centre = np.array([0.0, side * across, along])  # in the tool frame, fingers closed
            spec.body(finger).add_geom(
                name=f"{finger}_{part}",
                type=mujoco.mjtGeom.mjGEOM_BOX,
                size=size,
                pos=turn.T @ (tool + frame @ centre - origin),
                quat=quaternion,
                friction=[1.5, 0.02, 0.001],
                condim=4,
                solref=[0.01, 1.0],
                priority=1,
                mass=0.0,
                group=HIDDEN_GROUP,
            )


def _smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> np.ndarray:
    """Return [size, size] smooth noise in 0..1 with about `cells` bumps down and across."""
    coarse = rng.random((cells[0] + 1, cells[1] + 1))
    y, x = np.linspace(0, cells[0] - 1e-6, size), np.linspace(0, cells[1] - 1e-6, size)
    iy, ix = y.astype(int), x.astype(int)
    fy, fx = (y - iy)[:, None], (x - ix)[None]
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    top = coarse[iy][:, ix] * (1 - fx) + coarse[iy][:, ix + 1] * fx
    bottom = coarse[iy + 1][:, ix] * (1 - fx) + coarse[iy + 1][:, ix + 1] * fx
    return top * (1 - fy) + bottom * fy


def _table_textures() -> list[np.ndarray]:
    """Return grey textures [S, S] in 0..1 that are multiplied with the table's colour: wood, checks, speckle."""
    size, rng = 256, np.random.default_rng(7)
    rings = _smooth_noise(rng, size, (3, 24)) + 0.4 * _smooth_noise(rng, size, (6, 90))
    wood = 0.78 + 0.22 * (0.5 + 0.5 * np.sin(14 * rings))
    squares = (np.indices((size, size)) // 32).sum(axis=0) % 2
    speckle = 0.7 + 0.3 * rng.random((size // 2, size // 2)).repeat(2, axis=0).repeat(2, axis=1)
    return [wood, 0.72 + 0.28 * squares, speckle]


def _add_texture(spec: mujoco.MjSpec, name: str, pixels: np.ndarray, repeat: tuple[float, float]) -> None:
    texture = spec.add_texture(
        name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=pixels.shape[1], height=pixels.shape[0], nchannel=3
    )
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    texture.data = np.round(rgb * 255).astype(np.uint8).tobytes()
    material = spec.add_material(name=name, texrepeat=list(repeat))
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def _add_digit(spec: mujoco.MjSpec, digit: int) -> None:
    """Add a material that prints a digit on the six faces of a cube, upright on the sides and never mirrored."""
    image = np.round(digit_image(digit) * 255).astype(np.uint8)
    # Order +x, -x, +y, -y, +z, -z; each face of MuJoCo's cube texture has its own up direction.
    faces = np.concatenate([np.rot90(image, turns) for turns in (1, 3, 2, 0, 0, 0)])
    size, name = image.shape[0], f"digit{digit}"
    kind = mujoco.mjtTexture.mjTEXTURE_CUBE
    texture = spec.add_texture(name=name, type=kind, width=size, height=6 * size, nchannel=3)
    texture.data = faces.tobytes()
    spec.add_material(name=name).textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def digit_image(digit: int, size: int = 64) -> np.ndarray:
    """Return [size, size, 3] in 0..1: a dark digit on white, multiplied with the cube's colour when rendered."""
    image = Image.new("L", (size, size), 255)
    font = ImageFont.load_default(size=int(size * 0.84))
    draw = ImageDraw.Draw(image)
    # bold, because on a cube of 16 pixels a thin stroke would not be visible
    draw.text((size / 2, size / 2), str(digit), fill=0, font=font, anchor="mm", stroke_width=size // 64)
    if digit in (6, 9):  # on a rotated cube the line under them distinguishes them
        draw.rectangle((size * 0.3, size * 0.88, size * 0.7, size * 0.93), fill=0)
    return np.repeat(np.asarray(image, float)[..., None] / 255, 3, axis=2)


def add_loose(spec: mujoco.MjSpec, name: str, shapes: tuple[str, ...], half: np.ndarray) -> None:
    """Add a loose body. With several shapes it has a geom "<name>_<shape>" for each, of which an episode uses one."""
    kinds = {
        "cube": (mujoco.mjtGeom.mjGEOM_BOX, list(half)),
        "bar": (mujoco.mjtGeom.mjGEOM_BOX, list(half)),
        "peg": (mujoco.mjtGeom.mjGEOM_BOX, list(half)),
        "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, [half[0], 0, 0]),
        "cylinder": (mujoco.mjtGeom.mjGEOM_CYLINDER, [half[0], half[2], 0]),
    }
    body = spec.worldbody.add_body(name=name, pos=[0.3, 0.0, half[2]])
    body.add_freejoint(name=f"{name}_free")
    for shape in shapes:
        kind, size = kinds[shape]
        # A ball without rolling friction rolls forever, hence condim 6 and the third value.
        friction, condim = ([1.0, 0.02, 0.02], 6) if shape == "ball" else ([1.0, 0.02, 0.001], 4)
        label, mass = name if len(shapes) == 1 else f"{name}_{shape}", OBJECT_MASS / len(shapes)
        body.add_geom(name=label, type=kind, size=size, mass=mass, friction=friction, condim=condim)


def _add_pedestal(spec: mujoco.MjSpec, name: str, half: np.ndarray, height: float) -> None:
    """Add a block of the maximum height under a loose body; the environment lowers it into the table as needed."""
    body = spec.worldbody.add_body(name=f"{name}_pedestal", pos=[0.3, 0.0, -height])
    size = [half[0] + PEDESTAL_RIM, half[1] + PEDESTAL_RIM, height / 2]
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, friction=[1.0, 0.02, 0.001])


def _add_bowl(spec: mujoco.MjSpec, walls: int = 20) -> None:
    body = spec.worldbody.add_body(name="goal", pos=[0.3, -0.1, 0.0])
    half_height = tasks.BOWL_HEIGHT / 2
    floor = [tasks.BOWL_RADIUS, 0.003, 0]
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=floor, pos=[0, 0, 0.003], friction=[1.0, 0.02, 0.001])
    width = tasks.BOWL_RADIUS * np.tan(np.pi / walls) + 0.0005
    for i in range(walls):
        angle = 2 * np.pi * i / walls
        centre = [tasks.BOWL_RADIUS * np.cos(angle), tasks.BOWL_RADIUS * np.sin(angle), half_height]
        turn = [np.cos(angle / 2), 0, 0, np.sin(angle / 2)]
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.003, width, half_height], pos=centre, quat=turn)


def _add_slot(spec: mujoco.MjSpec) -> None:
    """Add a box without a lid, into which the peg fits in two orientations."""
    body = spec.worldbody.add_body(name="goal", pos=[0.3, -0.1, 0.0])
    (long, wide), wall, half = tasks.SLOT_HALF, tasks.SLOT_WALL / 2, tasks.SLOT_HEIGHT / 2
    parts: list[tuple[tuple[float, float, float], tuple[float, float, float]]]
    parts = [((0, 0, tasks.SLOT_FLOOR / 2), (long, wide, tasks.SLOT_FLOOR / 2))]
    parts += [((side * (long + wall), 0, half), (wall, wide + 2 * wall, half)) for side in (-1, 1)]
    parts += [((0, side * (wide + wall), half), (long, wall, half)) for side in (-1, 1)]
    for centre, size in parts:
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=centre, friction=[0.5, 0.02, 0.001])


def _add_goal(spec: mujoco.MjSpec, options: TaskOptions) -> None:
    if options.name in tasks.IN_BOWL:
        _add_bowl(spec)
    elif options.name == "peg":
        _add_slot(spec)
    elif options.name == "stack":
        add_loose(spec, "goal", ("cube",), np.full(3, tasks.BLOCK_SIZE / 2))
    elif options.name == "reach":  # a ball on a post: visible, without contacts
        body = spec.worldbody.add_body(name="goal", mocap=True)
        ghost = {"contype": 0, "conaffinity": 0}
        body.add_geom(name="goal_ball", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[0.012, 0, 0], **ghost)
        post = spec.worldbody.add_body(name="post", mocap=True)
        post.add_geom(name="post", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.003, 0.1, 0], **ghost)


def _add_screen(spec: mujoco.MjSpec) -> None:
    """Add a screen: visible, without contacts; out of view until an episode places it."""
    body = spec.worldbody.add_body(name="screen", mocap=True, pos=[0, 0, -2])
    size, grey = [SCREEN_HALF, SCREEN_HALF, 0.001], [0.3, 0.3, 0.32, 1.0]
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, rgba=grey, contype=0, conaffinity=0)


def _add_cameras(spec: mujoco.MjSpec) -> None:
    for name in tasks.CAMERA_ORBITS:
        position, quaternion = camera_pose(name)
        spec.worldbody.add_camera(name=name, pos=position, quat=quaternion, fovy=CAMERA_FOVY[name])
    quaternion = np.zeros(4)
    mujoco.mju_mulQuat(quaternion, np.array(WRIST_OPTICAL), np.array([0.0, 1.0, 0.0, 0.0]))
    flange = spec.body(f"{YAM.prefix}gripper")
    flange.add_camera(
        name="wrist", pos=WRIST_POSITION, quat=quaternion / np.linalg.norm(quaternion), fovy=CAMERA_FOVY["wrist"]
    )


def build_spec(options: TaskOptions, arm: str = "yam", gripper: str = "linear_4310") -> mujoco.MjSpec:
    """Build the scene of a task; differences between its episodes are written into the compiled model."""
    spec = empty_cell()
    if options.randomise_table:
        for i, pixels in enumerate(_table_textures()):
            _add_texture(spec, f"table{i + 1}", pixels, (2, 2))
    add_robot(spec, arm, gripper)
    if options.digits:
        for digit in range(10):
            _add_digit(spec, digit)
    add_loose(spec, "object", (options.shape,), options.half_extents)
    for i in range(options.distractors):
        shapes = tasks.SHAPES if options.varied_shapes else ("cube",)
        add_loose(spec, f"distractor{i}", shapes, np.full(3, options.object_size_m / 2))
    if options.pedestal_m:
        _add_pedestal(spec, "object", options.half_extents, options.pedestal_m)
        for i in range(options.distractors):
            _add_pedestal(spec, f"distractor{i}", np.full(3, options.object_size_m / 2), options.pedestal_m)
    _add_goal(spec, options)
    if options.hidden_share:
        _add_screen(spec)
    _add_cameras(spec)
    return spec


def empty_cell(centre: tuple[float, float] = (0.3, 0.0)) -> mujoco.MjSpec:
    """Create light, floor and a table of 1 x 1.2 m around a point, its surface at z = 0."""
    spec = mujoco.MjSpec()
    spec.modelname = "keygrip_yam_cell"
    spec.compiler.degree = False
    spec.option.timestep = 0.002
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10  # stiff friction, so that a held cube does not slip
    spec.visual.quality.offsamples = 0  # multisampling makes a software renderer seven times slower
    spec.visual.quality.shadowsize = 1024
    spec.visual.global_.offwidth, spec.visual.global_.offheight = 1280, 1280
    # MuJoCo would use the far floor as the scene's size, which determines near plane and shadow resolution.
    spec.stat.center, spec.stat.extent = [*centre, 0.1], 1.2
    spec.visual.map.znear = 0.005  # of the extent: the wrist camera sees its own fingers from 7 cm
    spec.visual.map.shadowclip = 0.9
    world = spec.worldbody
    directional = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    world.add_light(name="sun", pos=[0.3, -0.5, 1.6], dir=[0, 0.3, -1], type=directional, castshadow=True)
    plane, box = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
    world.add_geom(name="floor", type=plane, size=[30, 30, 0.1], pos=[0, 0, -0.75])
    table = [*centre, -0.02]
    world.add_geom(name="table", type=box, size=[0.5, 0.6, 0.02], pos=table, friction=[1.0, 0.005, 0.0001])
    return spec
