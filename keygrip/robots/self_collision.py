"""Collisions of YAM arms with themselves, with each other and with their table: distances between capsules around the
links.

A capsule encloses every vertex of a link's mesh (the finger tips at every opening), so a pose that the check accepts
is free of collisions. The check may refuse a pose that is still some centimetres away from a collision. Neighbouring
links are connected and not compared.

Frames: the arm's base, metres. Shape legend: C capsules, P pairs of capsules, M capsules of moving links.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keygrip.robots.kinematics import ARM_JOINTS, ArmChain, arm_chain, axis_rotation

# Link (0 base, 1 to 6 moved by that joint, 7 the gripper in the tool's frame), both ends of the axis, radius.
# Fitted to the meshes of dreamscale-i2rt: the smallest capsules that hold all vertices.
CAPSULES: tuple[tuple[int, tuple[float, float, float], tuple[float, float, float], float], ...] = (
    (0, (0.0, -0.083, 0.033), (0.0, 0.073, 0.029), 0.050),
    (1, (-0.027, -0.034, -0.013), (-0.029, 0.031, -0.010), 0.039),
    (2, (0.0, -0.034, 0.264), (-0.001, -0.034, 0.0), 0.046),
    (3, (-0.059, -0.033, -0.090), (-0.025, -0.035, -0.001), 0.073),
    (3, (-0.061, -0.034, -0.195), (-0.063, -0.035, -0.249), 0.046),
    (4, (0.004, 0.033, 0.001), (-0.061, 0.034, -0.070), 0.054),
    (5, (0.028, 0.0, 0.008), (0.041, -0.001, -0.002), 0.040),
    (7, (-0.001, 0.018, -0.111), (-0.002, -0.020, -0.112), 0.051),
    (7, (0.0, -0.032, -0.053), (-0.001, 0.032, -0.053), 0.057),
)
# Arms and grippers that the capsules enclose. Other arms' links have other shapes or frames, and other grippers have
# other shapes.
HELD = (("yam", "linear_4310"), ("yam", "flexible_4310"))
GRIPPER = 7
# Links fewer joints apart touch by construction, because the wrist is one block.
APART = 3
ROUNDING_M = 1e-9  # of sums of distances that do not change, e.g. when only the base joint rotates


def link_frames(joints: np.ndarray, chain: ArmChain | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return origins [8, 3] and rotations [8, 3, 3] of base, the six links and the tool.

    Args:
        joints: [6] rad.
    """
    chain = chain or arm_chain()
    tool, tool_rotation, origins, _ = chain.frames(joints)
    rotations, rotation = [np.eye(3)], np.eye(3)
    for index in range(ARM_JOINTS):
        rotation = rotation @ chain.rotations[index] @ axis_rotation(chain.axes[index], float(joints[index]))
        rotations.append(rotation)
    return np.concatenate([np.zeros((1, 3)), origins, tool[None]]), np.stack([*rotations, tool_rotation])


def capsules_at(joints: np.ndarray, chain: ArmChain | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends [C, 2, 3] of the capsules' axes in the base frame, and their radii [C]."""
    origins, rotations = link_frames(joints, chain)
    ends = np.stack([origins[link] + np.array([start, end]) @ rotations[link].T for link, start, end, _ in CAPSULES])
    return ends, np.array([radius for *_, radius in CAPSULES])


def link_gaps(joints: np.ndarray, chain: ArmChain | None = None) -> np.ndarray:
    """Return distances [P] in metres between the links of an arm that are not neighbours, `PAIRS`, negative if they
    overlap.

    Args:
        joints: [6] rad.
    """
    ends, radii = capsules_at(joints, chain)
    first, second = _PAIRS
    return np.asarray(_segment_distances(ends[first], ends[second]) - radii[first] - radii[second])


def link_gaps_of_two(
    joints: Sequence[np.ndarray], chains: Sequence[ArmChain], world_from_base: Sequence[np.ndarray]
) -> np.ndarray:
    """Return distances [P] in metres between the links of two arms, one of each, `PAIRS_OF_TWO`.

    Args:
        joints: [6] rad of each. chains: of each. world_from_base: [4, 4] of each.
    """
    ends, radii = [], []
    for angles, chain, base in zip(joints, chains, world_from_base, strict=True):
        in_base, radius = capsules_at(angles, chain)
        ends.append(in_base @ base[:3, :3].T + base[:3, 3])
        radii.append(radius)
    first, second = _PAIRS_OF_TWO
    return np.asarray(_segment_distances(ends[0][first], ends[1][second]) - radii[0][first] - radii[1][second])


def link_heights(joints: np.ndarray, chain: ArmChain | None = None) -> np.ndarray:
    """Return heights [M] in metres of the lowest points of the moving links 2 to 5, `MOVING`, in the base frame.

    The gripper is left out, because it works at the table and its tool has a separate height limit.
    """
    ends, radii = capsules_at(joints, chain)
    return np.asarray(ends[_MOVING, :, 2].min(axis=1) - radii[_MOVING])


def intrusion(values: np.ndarray, before: np.ndarray, least: float) -> int | None:
    """Return the index of a gap or height [P or M] whose change is not allowed; None if the motion is allowed. Values
    of at least `least` must not fall below it. The sum of the others must not decrease: on the way out of a collision
    two colliding links may come slightly closer, and one collision does not hide another."""
    fallen = (values < least) & (values < before)
    entered = fallen & (before >= least)
    if not entered.any():
        if not fallen.any() or np.minimum(values, least).sum() >= np.minimum(before, least).sum() - ROUNDING_M:
            return None
        entered = fallen
    return int(np.where(entered, values, np.inf).argmin())


def _name(capsule: int) -> str:
    link = CAPSULES[capsule][0]
    return {0: "base", GRIPPER: "gripper"}.get(link, f"link{link}")


def _pairs() -> np.ndarray:
    links = [min(link, ARM_JOINTS) for link, *_ in CAPSULES]  # the gripper is fixed to the last joint
    pairs = [
        (first, second)
        for first in range(len(links))
        for second in range(first + 1, len(links))
        if links[second] - links[first] >= APART
    ]
    return np.array(pairs).T


_PAIRS = _pairs()
_PAIRS_OF_TWO = np.indices((len(CAPSULES), len(CAPSULES))).reshape(2, -1)
_MOVING = [index for index, (link, *_) in enumerate(CAPSULES) if 2 <= link < GRIPPER]
# names of the links
PAIRS, PAIRS_OF_TWO = ([(_name(i), _name(j)) for i, j in pairs.T.tolist()] for pairs in (_PAIRS, _PAIRS_OF_TWO))
MOVING = [_name(index) for index in _MOVING]


def _segment_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the smallest distances [P] between segments [P, 2, 3]: an inner minimum, or one with an end of either."""
    a, b = first[:, 0], second[:, 0]
    u, v = first[:, 1] - a, second[:, 1] - b
    w = a - b
    uu, vv, uv = (u * u).sum(1), (v * v).sum(1), (u * v).sum(1)
    uw, vw = (u * w).sum(1), (v * w).sum(1)
    between = uu * vv - uv * uv
    along = np.where(between > 1e-12, np.clip((uv * vw - vv * uw) / np.maximum(between, 1e-12), 0, 1), 0.0)
    # the best point on the other segment for the best on one, and back once more: exact for two segments
    across = np.clip((uv * along + vw) / np.maximum(vv, 1e-12), 0, 1)
    along = np.clip((uv * across - uw) / np.maximum(uu, 1e-12), 0, 1)
    return np.asarray(np.linalg.norm(w + along[:, None] * u - across[:, None] * v, axis=1))
