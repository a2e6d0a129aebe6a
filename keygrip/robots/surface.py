"""Points on a robot's surface, moved by its joints, for silhouettes without a renderer.

Frames: the arm's base, metres, rad. Shape legend: P points, L links, N poses, J joints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

POINTS_PER_M2 = 90_000.0  # one per 3.3 mm: no holes at the resolution at which silhouettes are compared
MOST_POINTS = 30_000

LinkPoses = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RobotSurface:
    """Points on the links of one arm with its gripper.

    Args:
        name: for messages.
        points: [P, 3] in the frame of their link.
        links: [P] index of the link.
        link_poses: (joints [N, J], opening [N]) -> base_from_link [N, L, 4, 4].
        tool: joints [N, J] -> base_from_tool [N, 4, 4], the frame whose pose recordings hold; None: unknown.
        joints: J, number of joints that a recording must have.
    """

    name: str
    points: np.ndarray
    links: np.ndarray
    link_poses: LinkPoses
    tool: Callable[[np.ndarray], np.ndarray] | None
    joints: int

    def at(self, joints: np.ndarray, opening: np.ndarray, every: int = 1, base: np.ndarray | None = None) -> np.ndarray:
        """Return float32 [N, P, 3] points in the base frame, transformed by `base` [4, 4]; only every n-th point."""
        poses = self.link_poses(np.asarray(joints, float), np.asarray(opening, float))
        poses = (poses if base is None else base @ poses).astype(np.float32)
        points, links = self.points[::every].astype(np.float32), self.links[::every]
        starts = np.flatnonzero(np.diff(links, prepend=-1))  # the points of a link are contiguous
        placed = np.empty((len(poses), len(points), 3), dtype=np.float32)
        for start, end in pairwise([*starts, len(points)]):
            pose = poses[:, links[start]]
            np.matmul(points[start:end], pose[:, :3, :3].transpose(0, 2, 1), out=placed[:, start:end])
            placed[:, start:end] += pose[:, None, :3, 3]
        return placed

    def some(self, joints: np.ndarray, opening: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Return [N, 3]: for each pose one point, with index `which` [N] among all points."""
        poses = self.link_poses(np.asarray(joints, float), np.asarray(opening, float))
        poses = poses[np.arange(len(poses)), self.links[which]]
        return np.asarray((poses[:, :3, :3] @ self.points[which][..., None])[..., 0] + poses[:, :3, 3])


def sample_triangles(triangles: np.ndarray, density: float = POINTS_PER_M2) -> np.ndarray:
    """Return [P, 3] points spread evenly over triangles [F, 3, 3], `density` per square metre; deterministic."""
    edges = triangles[:, 1:] - triangles[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    total = float(areas.sum())
    if not total > 0:
        return np.zeros((0, 3))
    rng = np.random.default_rng(0)
    count = int(np.clip(total * density, 50, MOST_POINTS))
    chosen = np.searchsorted(np.cumsum(areas) / total, (np.arange(count) + rng.uniform(0, 1, count)) / count)
    u, v = rng.uniform(0, 1, (2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    chosen = np.minimum(chosen, len(triangles) - 1)
    return np.asarray(triangles[chosen, 0] + u * edges[chosen, 0] + v * edges[chosen, 1])


def gripper_blob() -> RobotSurface:
    """Approximate any gripper's surface by a capsule from the finger tips back along the approach.

    `link_poses` takes joints [N, 12], the first three rows of the tool's pose matrix, row by row.
    """
    length, radius = 0.16, 0.035  # metres
    count = int(2 * np.pi * radius * length * POINTS_PER_M2)
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
