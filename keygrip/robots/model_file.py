"""The surface of an arm from its MJCF or URDF file, read by MuJoCo: visual shapes, and their poses at given joints.

Hinges and slides are read, ball and free joints refused. Shapes that MJCF adds to the world itself are left out,
because they do not move. Frames: the base is the file's world (MJCF) or root link (URDF). Metres, rad.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.robots.kinematics import arm_file, gripper_file
from keygrip.robots.mujoco_backend import mujoco
from keygrip.robots.surface import POINTS_PER_M2, RobotSurface, sample_triangles
from keygrip.robots.xml_text import LARGEST_XML_BYTES, parse_xml

MOST_BODIES = 500
NEVER_DRAWN = {int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_HFIELD)}
COLLISION_GROUP = 3  # by the convention of MuJoCo's own robots, visual shapes are in groups 0 to 2


def surface_from_file(
    path: str | Path,
    tool: str | None = None,
    fingers: Mapping[str, Sequence[float]] | None = None,
    density: float = POINTS_PER_M2,
) -> RobotSurface:
    """Return the surface of the arm in an MJCF or URDF file.

    Args:
        path: the file; mesh paths are relative to its folder.
        tool: the body, link or MJCF site whose pose recordings hold; None: unknown, and the base is used as the world.
        fingers: joints that the gripper's opening moves: [closed, open], m or rad. All others, in the file's order, are
            the recorded joints.
        density: points per square metre.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is not such a file, has no shapes or no joint, or names something that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"robot_model.path={path}: there is no such file")
    model = _compile_model(path)
    fingers = dict(fingers or {})
    names = _joint_names(model)
    readable_types = {int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)}
    if odd := [name for name, kind in zip(names, model.jnt_type.tolist(), strict=True) if kind not in readable_types]:
        raise ValueError(f"{path}: joint {odd[0]!r} is a ball or floats free: only hinges and slides are read")
    if unknown := [name for name in fingers if name not in names]:
        raise ValueError(f"{path} has no joint {unknown[0]!r}; it has {', '.join(names) or 'none'}")
    if wrong := [name for name, ends in fingers.items() if len(ends) != 2]:
        raise ValueError(f"finger {wrong[0]!r} needs two numbers: where it is closed and where it is open")
    if not set(names) - set(fingers):
        raise ValueError(f"{path} has no joint that moves the arm")
    known_names = sorted(filter(None, [*_names(model.body, model.nbody)[1:], *_names(model.site, model.nsite)]))
    if tool is not None and tool not in known_names:
        raise ValueError(f"{path} has no body, link or site {tool!r}; it has {', '.join(known_names)}")
    surface = _surface(path.name, model, tool, fingers, density)
    if not len(surface.points):
        raise ValueError(f"{path} has nothing to draw: give it shapes or meshes")
    return surface


@lru_cache(maxsize=4)
def yam_surface(arm: str = "yam", gripper: str = "linear_4310", density: float = POINTS_PER_M2) -> RobotSurface:
    """Return the surface of a YAM arm with its gripper, from the models of dreamscale-i2rt; the tool is the
    `grasp_site`.

    Raises:
        ValueError, FileNotFoundError: as in `arm_file`.
    """
    spec, mounted = (
        _configure_for_poses(mujoco.MjSpec.from_file(str(file))) for file in (arm_file(arm), gripper_file(gripper))
    )
    spec.body("gripper").add_frame().attach_body(mounted.body("gripper"), "grip_", "")
    model = spec.compile()
    slides = [joint for joint in map(model.joint, range(model.njnt)) if joint.name.startswith("grip_")]
    fingers = {joint.name: (0.0, float(joint.range[1])) for joint in slides}
    return _surface(f"{arm} with {gripper}", model, "grip_grasp_site", fingers, density)


def _surface(
    name: str, model: mujoco.MjModel, tool: str | None, fingers: Mapping[str, Sequence[float]], density: float
) -> RobotSurface:
    """Return the surface of a compiled model that has the tool and the fingers; its links are the model's bodies."""
    points, links = _visual_points(model, density)
    joint_names = _joint_names(model)
    arm = [index for index, each in enumerate(joint_names) if each not in fingers]
    sites = _names(model.site, model.nsite)

    # With only hinges and slides, joint i is qpos[i].
    def placed(joints: np.ndarray, opening: np.ndarray, site: int | None = None) -> np.ndarray:
        """Return [N, L, 4, 4] of all links, or [N, 1, 4, 4] of one site."""
        data = mujoco.MjData(model)  # one per call, because several threads may use the same robot
        poses = np.zeros((len(joints), model.nbody if site is None else 1, 4, 4))
        poses[..., 3, 3] = 1
        for index, (arm_joints, opened) in enumerate(zip(joints, opening, strict=True)):
            data.qpos[arm] = arm_joints
            for finger, (closed, wide) in fingers.items():
                data.qpos[joint_names.index(finger)] = closed + opened * (wide - closed)
            mujoco.mj_kinematics(model, data)
            turns = data.xmat if site is None else data.site_xmat[[site]]
            positions = data.xpos if site is None else data.site_xpos[[site]]
            poses[index, :, :3, :3] = turns.reshape(-1, 3, 3)
            poses[index, :, :3, 3] = positions
        return poses

    def tool_poses(joints: np.ndarray) -> np.ndarray:
        joints, opening = np.asarray(joints, float), np.ones(len(joints))
        if tool in sites:
            return placed(joints, opening, sites.index(tool))[:, 0]
        return placed(joints, opening)[:, _names(model.body, model.nbody).index(str(tool))]

    return RobotSurface(name, points, links, placed, None if tool is None else tool_poses, len(arm))


def _names(element_at: Callable[[int], Any], count: int) -> list[str]:
    return [element_at(number).name for number in range(count)]


def _joint_names(model: mujoco.MjModel) -> list[str]:
    return [name or f"joint {number}" for number, name in enumerate(_names(model.joint, model.njnt))]


def arm_model(
    path: str | Path | None, tool: str | None = None, fingers: Mapping[str, Sequence[float]] | None = None
) -> RobotSurface | None:
    """As `surface_from_file`; None if no file is given.

    Raises:
        ValueError: A tool or fingers are given without a file; also as in `surface_from_file`.
    """
    if path is None:
        if tool is not None or fingers:
            raise ValueError("robot_model.tool and robot_model.fingers need robot_model.path: an MJCF or URDF file")
        return None
    return surface_from_file(path, tool, fingers)


def _compile_model(path: Path) -> mujoco.MjModel:
    """Compile the file to a MuJoCo model, with all bodies and all visual shapes."""
    with path.open("rb") as file:
        text = file.read(LARGEST_XML_BYTES + 1)
    try:
        root = parse_xml(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if root.tag not in ("mujoco", "robot"):
        raise ValueError(f"{path} begins with <{root.tag}>: MJCF begins with <mujoco>, URDF with <robot>")
    try:
        if root.tag == "robot":
            spec = mujoco.MjSpec.from_string(_urdf_for_mujoco(path, root))
        elif path.suffix.lower() == ".xml":
            spec = mujoco.MjSpec.from_file(str(path))
        else:  # MuJoCo reads MJCF only from files with the extension .xml
            spec = mujoco.MjSpec.from_string(text.decode())
            spec.modelfiledir = str(path.resolve().parent)
        model = _configure_for_poses(spec).compile()
    except ValueError as error:  # MuJoCo's own messages name the element and its line
        raise ValueError(f"{path} is not read by MuJoCo: {' '.join(str(error).split())}") from error
    if model.nbody > MOST_BODIES:
        raise ValueError(f"{path} has more than {MOST_BODIES} bodies")
    return model


def _configure_for_poses(spec: mujoco.MjSpec) -> mujoco.MjSpec:
    """Configure compiling without masses and closed meshes, which many files lack and poses do not need."""
    spec.compiler.fusestatic = False
    spec.compiler.boundmass, spec.compiler.boundinertia = 1e-3, 1e-6
    for mesh in spec.meshes:
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    return spec


def _urdf_for_mujoco(path: Path, root: ElementTree.Element) -> str:
    """Add settings for MuJoCo to the URDF: visual shapes are kept, mesh paths are relative to the file."""
    for link in root.iter("link"):
        if link.find("visual") is not None:
            for collision in link.findall("collision"):
                link.remove(collision)
    for mesh in root.iter("mesh"):
        file = mesh.get("filename", "").removeprefix("file://")
        if file.startswith("package://"):
            file = file.removeprefix("package://").partition("/")[2]
        mesh.set("filename", str((path.parent / file).resolve()))
    for element in root.findall("mujoco"):
        root.remove(element)
    settings = ElementTree.SubElement(root, "mujoco")
    ElementTree.SubElement(settings, "compiler", discardvisual="false", strippath="false", fusestatic="false")
    return ElementTree.tostring(root, encoding="unicode")


def _visual_points(model: mujoco.MjModel, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points [P, 3] in their bodies' frames, and the body [P] of each; the points of a body are contiguous."""
    points, links = [np.zeros((0, 3))], [np.zeros(0, int)]
    # Body 0 is the world: its shapes (table, floor) do not move and are not part of the arm.
    geoms = [n for n in range(model.ngeom) if model.geom_bodyid[n] > 0 and int(model.geom_type[n]) not in NEVER_DRAWN]
    # A file may have only collision shapes.
    visible = [number for number in geoms if model.geom_group[number] < COLLISION_GROUP] or geoms
    for number in sorted(visible, key=lambda number: int(model.geom_bodyid[number])):
        size, kind = model.geom_size[number], mujoco.mjtGeom(model.geom_type[number])
        if kind == mujoco.mjtGeom.mjGEOM_MESH:
            shape = _mesh_points(model, int(model.geom_dataid[number]), density)
        elif kind == mujoco.mjtGeom.mjGEOM_BOX:
            shape = box(size, density)
        elif kind in ROUND:
            shape = round_shape(ROUND[kind], size, density)
        else:
            raise ValueError(f"the shape {kind.name} cannot be drawn; box, sphere, cylinder, capsule and mesh can")
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, model.geom_quat[number])
        points.append(shape @ turn.reshape(3, 3).T + model.geom_pos[number])
        links.append(np.full(len(shape), model.geom_bodyid[number]))
    return np.concatenate(points), np.concatenate(links)


ROUND = {
    mujoco.mjtGeom.mjGEOM_SPHERE: "sphere",
    mujoco.mjtGeom.mjGEOM_ELLIPSOID: "ellipsoid",
    mujoco.mjtGeom.mjGEOM_CYLINDER: "cylinder",
    mujoco.mjtGeom.mjGEOM_CAPSULE: "capsule",
}


def _mesh_points(model: mujoco.MjModel, mesh: int, density: float) -> np.ndarray:
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
    return sample_triangles(vertices[faces].astype(float), density)


def box(half: np.ndarray, density: float) -> np.ndarray:
    """Return [P, 3] points on a box of half edges [3]."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * half
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [[corners[f[0]], corners[f[i]], corners[f[i + 1]]] for f in faces for i in (1, 2)]
    return sample_triangles(np.array(triangles), density)


def round_shape(kind: str, size: np.ndarray, density: float, steps: int = 24) -> np.ndarray:
    """Return [P, 3] points on a sphere (radius), ellipsoid (3 radii), cylinder or capsule (radius, half length)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, steps // 2 + 1)
    across, up = np.cos(angle), np.sin(angle)
    if kind == "cylinder":
        across, up = np.array([0.0, 1.0, 1.0, 0.0]), np.array([-1.0, -1.0, 1.0, 1.0])
        scale = np.array([size[0], size[0], size[1]])
    elif kind == "capsule":
        across = np.concatenate([across[: steps // 4 + 1], across[steps // 4 :]]) * size[0]
        up = np.concatenate([up[: steps // 4 + 1] * size[0] - size[1], up[steps // 4 :] * size[0] + size[1]])
        scale = np.ones(3)
    else:
        scale = np.broadcast_to(size[:3], 3) if len(size) >= 3 else np.full(3, size[0])
    turn = np.linspace(0, 2 * np.pi, steps + 1)
    grid = np.stack(
        [
            across[:, None] * np.cos(turn),
            across[:, None] * np.sin(turn),
            np.broadcast_to(up[:, None], (len(up), len(turn))),
        ],
        axis=-1,
    )
    grid = grid * scale
    first = np.stack([grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:]], axis=2)
    second = np.stack([grid[:-1, :-1], grid[1:, 1:], grid[:-1, 1:]], axis=2)
    return sample_triangles(np.concatenate([first.reshape(-1, 3, 3), second.reshape(-1, 3, 3)]), density)
