"""Points on a robot's surface, moved by its joints: what a silhouette is drawn from without a renderer.

Frames: the arm's base, metres, rad. Shape legend: P points, L links, N poses, J joints.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.robots.kinematics import ARM_JOINTS, ArmChain, arm_chain, arm_file, gripper_file

POINTS_PER_M2 = 90_000.0  # one every 3.3 mm: no holes at the resolution at which silhouettes are compared
MOST_POINTS = 30_000
LARGEST_STL_BYTES = 64 << 20

LinkPoses = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RobotSurface:
    """Points on the links of one arm with its gripper.

    Args:
        name: for messages.
        points: [P, 3] in the frame of their link.
        links: [P] number of the link.
        link_poses: (joints [N, J], opening [N]) -> base_from_link [N, L, 4, 4].
        tool: joints [N, J] -> base_from_tool [N, 4, 4], the frame whose pose recordings hold; None: not known.
        joints: J, how many joints a recording must have.
    """

    name: str
    points: np.ndarray
    links: np.ndarray
    link_poses: LinkPoses
    tool: Callable[[np.ndarray], np.ndarray] | None
    joints: int

    def at(self, joints: np.ndarray, opening: np.ndarray, every: int = 1, base: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, P, 3] points in the base frame, or where `base` [4, 4] puts it; `every`: of each n points one."""
        poses = self.link_poses(np.asarray(joints, float), np.asarray(opening, float))
        poses = (poses if base is None else base @ poses).astype(np.float32)
        points, links = self.points[::every].astype(np.float32), self.links[::every]
        starts = np.flatnonzero(np.diff(links, prepend=-1))  # points of a link lie together
        placed = np.empty((len(poses), len(points), 3), dtype=np.float32)
        for start, end in pairwise([*starts, len(points)]):
            pose = poses[:, links[start]]
            np.matmul(points[start:end], pose[:, :3, :3].transpose(0, 2, 1), out=placed[:, start:end])
            placed[:, start:end] += pose[:, None, :3, 3]
        return placed

    def some(self, joints: np.ndarray, opening: np.ndarray, which: np.ndarray) -> np.ndarray:
        """[N, 3]: of each pose one point, number `which` [N] of all points."""
        poses = self.link_poses(np.asarray(joints, float), np.asarray(opening, float))
        poses = poses[np.arange(len(poses)), self.links[which]]
        return np.asarray((poses[:, :3, :3] @ self.points[which][..., None])[..., 0] + poses[:, :3, 3])

    def only(self, links: list[int]) -> RobotSurface:
        """The same robot with the points of some links alone."""
        kept = np.isin(self.links, links)
        return RobotSurface(self.name, self.points[kept], self.links[kept], self.link_poses, self.tool, self.joints)


def read_stl(path: Path) -> np.ndarray:
    """Triangles [F, 3, 3] of a binary STL file.

    Raises:
        ValueError: not a binary STL file, or larger than 64 MB.
    """
    if path.stat().st_size > LARGEST_STL_BYTES:
        raise ValueError(f"{path} has more than {LARGEST_STL_BYTES >> 20} MB: simplify the mesh")
    raw = path.read_bytes()
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    count = int.from_bytes(raw[80:84], "little")
    if len(raw) != 84 + count * record.itemsize:
        raise ValueError(f"{path} is not a binary STL file")
    return np.frombuffer(raw, record, count, 84)["corners"].astype(float)


def sample_triangles(triangles: np.ndarray, density: float = POINTS_PER_M2, seed: int = 0) -> np.ndarray:
    """[P, 3] points spread evenly over triangles [F, 3, 3], `density` for each square metre; always the same."""
    edges = triangles[:, 1:] - triangles[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    total = float(areas.sum())
    if not total > 0:
        return np.zeros((0, 3))
    rng = np.random.default_rng(seed)
    count = int(np.clip(total * density, 50, MOST_POINTS))
    chosen = np.searchsorted(np.cumsum(areas) / total, (np.arange(count) + rng.uniform(0, 1, count)) / count)
    u, v = rng.uniform(0, 1, (2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    chosen = np.minimum(chosen, len(triangles) - 1)
    return np.asarray(triangles[chosen, 0] + u * edges[chosen, 0] + v * edges[chosen, 1])


def _numbers(element: ElementTree.Element, name: str, default: str) -> np.ndarray:
    return np.array([float(x) for x in element.get(name, default).split()])


def _pose(element: ElementTree.Element) -> np.ndarray:
    """[4, 4] pose of an XML element in its parent."""
    pose = np.eye(4)
    quaternion = _numbers(element, "quat", "1 0 0 0")
    pose[:3, :3] = Rotation.from_quat(quaternion, scalar_first=True).as_matrix()
    pose[:3, 3] = _numbers(element, "pos", "0 0 0")
    return pose


def _body_points(body: ElementTree.Element, folder: Path, files: dict[str, str], density: float) -> np.ndarray:
    found = [np.zeros((0, 3))]
    for geom in body.findall("geom"):
        mesh = geom.get("mesh")
        if mesh is None:
            continue
        points = sample_triangles(read_stl(folder / files[mesh]), density)
        pose = _pose(geom)
        found.append(points @ pose[:3, :3].T + pose[:3, 3])
    return np.concatenate(found)


def _meshes(root: ElementTree.Element, path: Path) -> tuple[Path, dict[str, str]]:
    compiler = root.find("compiler")
    folder = path.parent / ((compiler.get("meshdir") if compiler is not None else None) or "")
    return folder, {mesh.get("name", ""): mesh.get("file", "") for mesh in root.iter("mesh")}


@lru_cache(maxsize=4)
def yam_surface(arm: str = "yam", gripper: str = "linear_4310", density: float = POINTS_PER_M2) -> RobotSurface:
    """The surface of a YAM arm with its gripper, from the models of dreamscale-i2rt.

    Links: 0 the base, 1 to 6 what turns with that joint, 7 the gripper's housing, 8 and on its fingers.

    Raises:
        ValueError, FileNotFoundError: as `arm_file`.
    """
    chain = arm_chain(arm, gripper)
    path = arm_file(arm)
    root = ElementTree.parse(path).getroot()
    folder, files = _meshes(root, path)
    points, links = [], []
    body = root.find("worldbody/body")
    link = 0
    while body is not None:
        own = _body_points(body, folder, files, density)
        points.append(own)
        links.append(np.full(len(own), link))
        body, link = body.find("body"), link + 1
    path = gripper_file(gripper)
    root = ElementTree.parse(path).getroot()
    folder, files = _meshes(root, path)
    mount = root.find("worldbody/body")
    assert mount is not None
    own = _body_points(mount, folder, files, density)
    points.append(own)
    links.append(np.full(len(own), ARM_JOINTS + 1))
    fingers: list[tuple[np.ndarray, np.ndarray, float]] = []  # pose in the mount, axis, stroke
    for number, finger in enumerate(mount.findall("body")):
        joint = finger.find("joint")
        axis = np.zeros(3) if joint is None else _numbers(joint, "axis", "0 0 1")
        stroke = 0.0 if joint is None else float(_numbers(joint, "range", "0 0")[1])
        fingers.append((_pose(finger), axis, stroke))
        own = _body_points(finger, folder, files, density)
        points.append(own)
        links.append(np.full(len(own), ARM_JOINTS + 2 + number))
    mounted = _pose(mount)

    def link_poses(joints: np.ndarray, opening: np.ndarray) -> np.ndarray:
        poses = np.zeros((len(joints), ARM_JOINTS + 2 + len(fingers), 4, 4))
        poses[..., 3, 3] = 1
        poses[:, : ARM_JOINTS + 1] = _joint_poses(chain, joints)
        poses[:, ARM_JOINTS + 1] = poses[:, ARM_JOINTS] @ mounted
        for number, (pose, axis, stroke) in enumerate(fingers):
            slid = np.broadcast_to(pose, (len(joints), 4, 4)).copy()
            slid[:, :3, 3] += (opening * stroke)[:, None] * (pose[:3, :3] @ axis)
            poses[:, ARM_JOINTS + 2 + number] = poses[:, ARM_JOINTS + 1] @ slid
        return poses

    def tool(joints: np.ndarray) -> np.ndarray:
        offset = np.eye(4)
        offset[:3, :3], offset[:3, 3] = chain.tool_rotation, chain.tool_offset
        return np.asarray(_joint_poses(chain, joints)[:, -1] @ offset)

    return RobotSurface(
        f"{arm} with {gripper}", np.concatenate(points), np.concatenate(links), link_poses, tool, ARM_JOINTS
    )


def _joint_poses(chain: ArmChain, joints: np.ndarray) -> np.ndarray:
    """base_from_link [N, J + 1, 4, 4] of the base and of what turns with each joint."""
    count = len(joints)
    poses = np.zeros((count, ARM_JOINTS + 1, 4, 4))
    poses[:, :, 3, 3] = 1
    poses[:, 0, :3, :3] = np.eye(3)
    for i in range(ARM_JOINTS):
        before = poses[:, i]
        turn = Rotation.from_rotvec(joints[:, i : i + 1] * chain.axes[i]).as_matrix()
        poses[:, i + 1, :3, :3] = before[:, :3, :3] @ chain.rotations[i] @ turn
        poses[:, i + 1, :3, 3] = before[:, :3, 3] + before[:, :3, :3] @ chain.offsets[i]
    return poses


def gripper_blob(length: float = 0.16, radius: float = 0.035, density: float = POINTS_PER_M2) -> RobotSurface:
    """What any gripper looks like from afar: a capsule from the finger tips back along the approach.

    `link_poses` takes joints [N, 12], the tool's pose as the first three rows of a matrix, row by row.
    """
    count = int(2 * np.pi * radius * length * density)
    rng = np.random.default_rng(0)
    along, angle = rng.uniform(-length, 0.0, count), rng.uniform(0, 2 * np.pi, count)
    wide = radius * np.clip(0.4 - along / length, 0.4, 1.0)
    points = np.stack([wide * np.cos(angle), wide * np.sin(angle), along], axis=1)

    def link_poses(joints: np.ndarray, opening: np.ndarray) -> np.ndarray:
        poses = np.zeros((len(joints), 1, 4, 4))
        poses[:, 0, :3] = joints.reshape(-1, 3, 4)
        poses[:, 0, 3, 3] = 1
        return poses

    return RobotSurface("the gripper's own motion", points, np.zeros(count, int), link_poses, None, 12)
