"""The surface of any arm from its MJCF or URDF file: bodies, joints and the shapes that are drawn. Needs no MuJoCo.

Read are boxes, spheres, ellipsoids, cylinders, capsules and binary STL meshes, hinges and slides, MJCF's default
classes and compiler settings (angle, meshdir, eulerseq). Not read, and refused: includes, replicates, frames, other
mesh formats, ball and free joints. What MJCF puts into the world itself is left out: it does not move.
Frames: the base is the file's world (MJCF) or root link (URDF). Metres, rad.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.robots.surface import POINTS_PER_M2, RobotSurface, read_stl, sample_triangles

LARGEST_FILE_BYTES = 8 << 20
MOST_BODIES = 500
MOVING = {"hinge": False, "slide": True, "revolute": False, "continuous": False, "prismatic": True}


@dataclass
class _Body:
    """One body: its parent's number (-1: the base), pose in the parent, joints, points in its own frame."""

    name: str
    parent: int
    pose: np.ndarray
    joints: list[_Joint] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Joint:
    """A joint: whether it slides, axis [3] and anchor [3] in its body's frame."""

    name: str
    slides: bool
    axis: np.ndarray
    anchor: np.ndarray


def surface_from_file(
    path: str | Path,
    tool: str | None = None,
    fingers: Mapping[str, Sequence[float]] | None = None,
    density: float = POINTS_PER_M2,
) -> RobotSurface:
    """The surface of the arm in an MJCF or URDF file.

    Args:
        path: the file; meshes are looked for from its folder.
        tool: the body, link or MJCF site whose pose recordings hold; None: not known, and the base is taken for the
            world.
        fingers: joints that the gripper's opening moves: [closed, open], m or rad. All others, in the file's order, are
            the recorded joints.
        density: points for each square metre.

    Raises:
        FileNotFoundError: the file or a mesh is missing.
        ValueError: it is not such a file, has nothing to draw or no joint, or names something that is not read.
    """
    path = Path(path)
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise ValueError(f"{path} has more than {LARGEST_FILE_BYTES >> 20} MB: not a robot's description")
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError(f"{path} declares entities: remove them, a robot's description needs none")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML: {error}") from error
    if root.tag == "mujoco":
        bodies, sites = _Mjcf(path, root, density).read()
    elif root.tag == "robot":
        bodies, sites = _read_urdf(path, root, density), {}
    else:
        raise ValueError(f"{path} begins with <{root.tag}>: MJCF begins with <mujoco>, URDF with <robot>")
    return _surface(path, bodies, sites, tool, dict(fingers or {}))


def arm_model(
    path: str | Path | None, tool: str | None = None, fingers: Mapping[str, Sequence[float]] | None = None
) -> RobotSurface | None:
    """As `surface_from_file`; None where no file is named.

    Raises:
        ValueError: a tool or fingers without a file; and as `surface_from_file`.
    """
    if path is None:
        if tool is not None or fingers:
            raise ValueError("robot_model.tool and robot_model.fingers need robot_model.path: an MJCF or URDF file")
        return None
    return surface_from_file(path, tool, fingers)


def _surface(
    path: Path,
    bodies: list[_Body],
    sites: dict[str, tuple[int, np.ndarray]],
    tool: str | None,
    fingers: dict[str, Sequence[float]],
) -> RobotSurface:
    names = [joint.name for body in bodies for joint in body.joints]
    if unknown := [name for name in fingers if name not in names]:
        raise ValueError(f"{path} has no joint {unknown[0]!r}; it has {', '.join(names) or 'none'}")
    if wrong := [name for name, ends in fingers.items() if len(ends) != 2]:
        raise ValueError(f"finger {wrong[0]!r} needs two numbers: where it is closed and where it is open")
    arm = [name for name in names if name not in fingers]
    if not arm:
        raise ValueError(f"{path} has no joint that moves the arm")
    points = [np.concatenate([np.zeros((0, 3)), *body.points]) for body in bodies]
    if not sum(map(len, points)):
        raise ValueError(f"{path} has nothing to draw: give it shapes or meshes")
    columns = {name: index for index, name in enumerate(arm)}
    places = {body.name: (number, np.eye(4)) for number, body in enumerate(bodies) if body.name} | sites
    if tool is not None and tool not in places:
        raise ValueError(f"{path} has no body, link or site {tool!r}; it has {', '.join(sorted(places))}")

    def link_poses(joints: np.ndarray, opening: np.ndarray) -> np.ndarray:
        poses = np.zeros((len(joints), len(bodies), 4, 4))
        for number, body in enumerate(bodies):
            pose = body.pose if body.parent < 0 else poses[:, body.parent] @ body.pose
            pose = np.broadcast_to(pose, (len(joints), 4, 4))
            for joint in body.joints:
                if joint.name in fingers:
                    closed, opened = fingers[joint.name]
                    value = closed + opening * (opened - closed)
                else:
                    value = joints[:, columns[joint.name]]
                pose = pose @ _moved(joint, value)
            poses[:, number] = pose
        return poses

    def tool_poses(joints: np.ndarray) -> np.ndarray:
        assert tool is not None
        number, pose = places[tool]
        return np.asarray(link_poses(np.asarray(joints, float), np.ones(len(joints)))[:, number] @ pose)

    links = np.concatenate([np.full(len(own), number) for number, own in enumerate(points)])
    return RobotSurface(
        path.name, np.concatenate(points), links, link_poses, None if tool is None else tool_poses, len(arm)
    )


def _moved(joint: _Joint, value: np.ndarray) -> np.ndarray:
    """[N, 4, 4] of a joint at values [N]."""
    poses = np.zeros((len(value), 4, 4))
    poses[:, 3, 3] = 1
    if joint.slides:
        poses[:, :3, :3] = np.eye(3)
        poses[:, :3, 3] = value[:, None] * joint.axis
    else:
        poses[:, :3, :3] = Rotation.from_rotvec(value[:, None] * joint.axis).as_matrix()
        poses[:, :3, 3] = joint.anchor - poses[:, :3, :3] @ joint.anchor
    return poses


def _numbers(
    path: Path, attributes: Mapping[str, str], name: str, default: str, count: int | None = None
) -> np.ndarray:
    text = attributes.get(name, default)
    try:
        values = np.array([float(x) for x in text.split()])
    except ValueError as error:
        raise ValueError(f'{path}: {name}="{text}" holds something that is not a number') from error
    if not np.isfinite(values).all() or (count is not None and len(values) != count):
        raise ValueError(f'{path}: {name}="{text}" must be {count or "some"} finite numbers')
    return values


def _unit(path: Path, vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    if not length > 0:
        raise ValueError(f"{path}: a joint's axis or a quaternion is zero")
    return np.asarray(vector / length)


def _rigid(position: np.ndarray, turn: Rotation) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.as_matrix(), position
    return pose


def _mesh(path: Path, file: Path, scale: np.ndarray, density: float) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{path} names the mesh {file}, which is missing")
    if file.suffix.lower() != ".stl":
        raise ValueError(f"{path}: {file.name} is not an STL mesh; convert it, or give shapes")
    return sample_triangles(read_stl(file) * scale, density)


def box(half: np.ndarray, density: float) -> np.ndarray:
    """[P, 3] points on a box of half edges [3]."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * half
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [[corners[f[0]], corners[f[i]], corners[f[i + 1]]] for f in faces for i in (1, 2)]
    return sample_triangles(np.array(triangles), density)


def round_shape(kind: str, size: np.ndarray, density: float, steps: int = 24) -> np.ndarray:
    """[P, 3] points on a sphere (radius), ellipsoid (3 radii), cylinder or capsule (radius, half length), along z."""
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


class _Mjcf:
    """Reads the bodies and sites of an MJCF file."""

    def __init__(self, path: Path, root: ElementTree.Element, density: float) -> None:
        self.path, self.root, self.density = path, root, density
        if odd := next(
            (tag for tag in ("include", "replicate", "frame") if next(root.iter(tag), None) is not None), None
        ):
            raise ValueError(f"{path}: <{odd}> is not read; save the compiled model (mujoco's `compile`) and give that")
        settings: dict[str, str] = {}
        for compiler in root.findall("compiler"):
            settings |= compiler.attrib
        self.scale = 1.0 if settings.get("angle", "degree") == "radian" else np.pi / 180
        self.order = settings.get(
            "eulerseq", "xyz"
        ).swapcase()  # small letters: axes that turn along, in scipy capitals
        folder = path.parent / settings.get("meshdir", settings.get("assetdir", ""))
        self.classes: dict[str, dict[str, dict[str, str]]] = {}
        for default in root.findall("default"):
            self._add_class(default, {}, "main")
        self.meshes: dict[str, tuple[Path, np.ndarray]] = {}
        for mesh in root.findall("asset/mesh"):
            given = self.classes.get(mesh.get("class", "main"), {}).get("mesh", {}) | mesh.attrib
            if "file" in given:
                name = given.get("name", Path(given["file"]).stem)
                self.meshes[name] = folder / given["file"], _numbers(path, given, "scale", "1 1 1", 3)
        self.bodies: list[_Body] = []
        self.sites: dict[str, tuple[int, np.ndarray]] = {}

    def _add_class(self, element: ElementTree.Element, above: dict[str, dict[str, str]], name: str) -> None:
        own = {tag: dict(values) for tag, values in above.items()}
        for child in element:
            if child.tag != "default":
                own[child.tag] = own.get(child.tag, {}) | child.attrib
        self.classes[element.get("class", name)] = own
        for child in element.findall("default"):
            self._add_class(child, own, "")

    def read(self) -> tuple[list[_Body], dict[str, tuple[int, np.ndarray]]]:
        world = self.root.find("worldbody")
        if world is None:
            raise ValueError(f"{self.path} has no <worldbody>")
        for body in world.findall("body"):
            self._add(body, -1, "main")
        return self.bodies, self.sites

    def _given(self, element: ElementTree.Element, inherited: str) -> dict[str, str]:
        name = element.get("class", inherited)
        if name not in self.classes and name != "main":
            raise ValueError(f"{self.path}: the default class {name!r} is not defined")
        return self.classes.get(name, {}).get(element.tag, {}) | element.attrib

    def _pose(self, given: Mapping[str, str]) -> np.ndarray:
        numbers = self.path, given
        if "euler" in given:
            turn = Rotation.from_euler(self.order, _numbers(*numbers, "euler", "", 3) * self.scale)
        elif "axisangle" in given:
            values = _numbers(*numbers, "axisangle", "", 4)
            turn = Rotation.from_rotvec(_unit(self.path, values[:3]) * values[3] * self.scale)
        elif "zaxis" in given:
            turn = _from_z(_unit(self.path, _numbers(*numbers, "zaxis", "", 3)))
        elif "xyaxes" in given:
            x, y = _numbers(*numbers, "xyaxes", "", 6).reshape(2, 3)
            x = _unit(self.path, x)
            y = _unit(self.path, y - (x @ y) * x)
            turn = Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=1))
        else:
            quaternion = _unit(self.path, _numbers(*numbers, "quat", "1 0 0 0", 4))
            turn = Rotation.from_quat(quaternion, scalar_first=True)
        return _rigid(_numbers(*numbers, "pos", "0 0 0", 3), turn)

    def _add(self, element: ElementTree.Element, parent: int, inherited: str) -> None:
        if len(self.bodies) >= MOST_BODIES:
            raise ValueError(f"{self.path} has more than {MOST_BODIES} bodies")
        inherited = element.get("childclass", inherited)
        number = len(self.bodies)
        body = _Body(element.get("name", ""), parent, self._pose(element.attrib))
        self.bodies.append(body)
        for child in element:
            if child.tag == "freejoint":
                raise ValueError(f"{self.path}: body {body.name!r} floats free: an arm stands on its base")
            if child.tag == "joint":
                given = self._given(child, inherited)
                kind = given.get("type", "hinge")
                if kind not in MOVING:
                    raise ValueError(
                        f"{self.path}: joint {given.get('name')!r} is of type {kind}; hinge and slide are read"
                    )
                axis = _unit(self.path, _numbers(self.path, given, "axis", "0 0 1", 3))
                anchor = _numbers(self.path, given, "pos", "0 0 0", 3)
                body.joints.append(_Joint(given.get("name", f"joint {number}"), MOVING[kind], axis, anchor))
            elif child.tag == "geom":
                body.points.append(self._points(self._given(child, inherited)))
            elif child.tag == "site" and child.get("name"):
                self.sites[child.get("name", "")] = number, self._pose(self._given(child, inherited))
        for child in element.findall("body"):
            self._add(child, number, inherited)

    def _points(self, given: Mapping[str, str]) -> np.ndarray:
        kind = given.get("type", "mesh" if "mesh" in given else "sphere")
        pose = self._pose(given)
        if kind == "mesh":
            if given.get("mesh") not in self.meshes:
                raise ValueError(f"{self.path}: a geom names the mesh {given.get('mesh')!r}, which no <asset> has")
            points = _mesh(self.path, *self.meshes[given["mesh"]], self.density)
        elif kind in ("sphere", "capsule", "ellipsoid", "cylinder", "box"):
            size = _numbers(self.path, given, "size", "")
            if "fromto" in given:
                start, end = _numbers(self.path, given, "fromto", "", 6).reshape(2, 3)
                pose = _rigid((start + end) / 2, _from_z(_unit(self.path, end - start)))
                size = np.append(size[:1], np.linalg.norm(end - start) / 2)
            if len(size) < {"sphere": 1, "capsule": 2, "cylinder": 2}.get(kind, 3) or not (size > 0).all():
                raise ValueError(f'{self.path}: a {kind} of size "{given.get("size", "")}" cannot be')
            points = box(size[:3], self.density) if kind == "box" else round_shape(kind, size, self.density)
        else:
            return np.zeros((0, 3))  # a plane or a height field is not the robot's
        return np.asarray(points @ pose[:3, :3].T + pose[:3, 3])


def _from_z(axis: np.ndarray) -> Rotation:
    """The smallest rotation that brings z to an axis [3] of length 1."""
    across = np.cross([0.0, 0.0, 1.0], axis)
    sine, cosine = float(np.linalg.norm(across)), float(axis[2])
    if sine < 1e-9:
        return Rotation.identity() if cosine > 0 else Rotation.from_rotvec([np.pi, 0.0, 0.0])
    return Rotation.from_rotvec(across / sine * np.arctan2(sine, cosine))


def _read_urdf(path: Path, root: ElementTree.Element, density: float) -> list[_Body]:
    """The links of a URDF file, parents before their children."""
    links = {link.get("name", ""): link for link in root.findall("link")}
    below: dict[str, list[tuple[str, ElementTree.Element]]] = {}
    children = set()
    for joint in root.findall("joint"):
        ends = [end.get("link", "") if (end := joint.find(tag)) is not None else "" for tag in ("parent", "child")]
        if ends[0] not in links or ends[1] not in links or ends[1] in children:
            raise ValueError(
                f"{path}: joint {joint.get('name')!r} must join a known link to one that has no other parent"
            )
        children.add(ends[1])
        below.setdefault(ends[0], []).append((ends[1], joint))
    bodies: list[_Body] = []
    waiting: list[tuple[str, int, ElementTree.Element | None]] = []
    waiting += [(name, -1, None) for name in links if name not in children][::-1]
    while waiting:
        name, parent, by = waiting.pop()
        if len(bodies) >= MOST_BODIES:
            raise ValueError(f"{path} has more than {MOST_BODIES} links")
        body = _Body(name, parent, np.eye(4) if by is None else _origin(path, by))
        kind = "fixed" if by is None else by.get("type", "")
        if by is not None and kind in MOVING:
            axis = by.find("axis")
            way = _numbers(path, {} if axis is None else axis.attrib, "xyz", "1 0 0", 3)
            body.joints.append(_Joint(by.get("name", ""), MOVING[kind], _unit(path, way), np.zeros(3)))
        elif kind != "fixed":
            raise ValueError(
                f"{path}: a joint of type {kind!r} is not read; revolute, continuous, prismatic and fixed are"
            )
        shown = links[name].findall("visual") or links[name].findall("collision")
        body.points += [_urdf_points(path, shape, density) for shape in shown]
        bodies.append(body)
        waiting += [(child, len(bodies) - 1, own) for child, own in below.get(name, [])][::-1]
    return bodies


def _origin(path: Path, element: ElementTree.Element) -> np.ndarray:
    origin = element.find("origin")
    given = {} if origin is None else origin.attrib
    turn = Rotation.from_euler("xyz", _numbers(path, given, "rpy", "0 0 0", 3))
    return _rigid(_numbers(path, given, "xyz", "0 0 0", 3), turn)


def _urdf_points(path: Path, shape: ElementTree.Element, density: float) -> np.ndarray:
    pose, geometry = _origin(path, shape), shape.find("geometry")
    kind = None if geometry is None else next(iter(geometry), None)
    if kind is None:
        return np.zeros((0, 3))
    if kind.tag == "mesh":
        file = kind.get("filename", "").removeprefix("file://")
        if file.startswith("package://"):
            file = file.removeprefix("package://").partition("/")[2]
        points = _mesh(path, path.parent / file, _numbers(path, kind.attrib, "scale", "1 1 1", 3), density)
    elif kind.tag == "box":
        points = box(_numbers(path, kind.attrib, "size", "", 3) / 2, density)
    elif kind.tag in ("sphere", "cylinder"):
        size = _numbers(path, kind.attrib, "radius", "", 1)
        if kind.tag == "cylinder":
            size = np.append(size, _numbers(path, kind.attrib, "length", "", 1) / 2)
        points = round_shape(kind.tag, size, density)
    else:
        raise ValueError(f"{path}: the shape <{kind.tag}> is not read; box, sphere, cylinder and mesh are")
    return np.asarray(points @ pose[:3, :3].T + pose[:3, 3])
