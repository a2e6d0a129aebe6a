"""Rotations as unit quaternions in torch. All quaternions are (w, x, y, z); q and -q are the same rotation.

Shape legend: ``...`` any batch shape. Angles are radians.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A rotation is off the path of its neighbours if it is farther from both than this, than OFF_PATH_USUAL times what
# OFF_PATH_SHARE of the rotations are, and than OFF_PATH_ACROSS times the angle between the two.
OFF_PATH_RAD, OFF_PATH_USUAL, OFF_PATH_SHARE, OFF_PATH_ACROSS = 0.35, 4.0, 0.9, 1.5


def normalise(quaternion: Tensor) -> Tensor:
    """Scale ``[..., 4]`` to unit norm."""
    return quaternion / quaternion.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(quaternion.dtype).tiny)


def canonical(quaternion: Tensor) -> Tensor:
    """Whichever of q and -q has w >= 0, ``[..., 4]``."""
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def quaternion_multiply(first: Tensor, second: Tensor) -> Tensor:
    """Hamilton product ``[..., 4]``: the rotation that applies ``second`` first, then ``first``."""
    w1, x1, y1, z1 = first.unbind(-1)
    w2, x2, y2, z2 = second.unbind(-1)
    return torch.stack(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ],
        dim=-1,
    )


def quaternion_conjugate(quaternion: Tensor) -> Tensor:
    """The inverse rotation of unit quaternions ``[..., 4]``."""
    return quaternion * quaternion.new_tensor([1.0, -1.0, -1.0, -1.0])


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of unit quaternions ``[..., 4]``."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]`` (w >= 0) of rotation matrices ``[..., 3, 3]``.

    Each of the four components can serve as divisor; the largest is used, so the result is accurate for every rotation
    (half turns included).
    """
    m = matrix
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    four_squares = torch.stack(
        [1 + trace, 1 + 2 * m[..., 0, 0] - trace, 1 + 2 * m[..., 1, 1] - trace, 1 + 2 * m[..., 2, 2] - trace], dim=-1
    )  # 4 w^2, 4 x^2, 4 y^2, 4 z^2
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    candidates = torch.stack(
        [
            torch.stack([four_squares[..., 0], wx, wy, wz], dim=-1),
            torch.stack([wx, four_squares[..., 1], xy, xz], dim=-1),
            torch.stack([wy, xy, four_squares[..., 2], yz], dim=-1),
            torch.stack([wz, xz, yz, four_squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )  # each row is 4 * (its component) * q
    best = four_squares.argmax(dim=-1)
    chosen = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    return canonical(normalise(chosen))


def quaternion_to_columns(quaternion: Tensor) -> Tensor:
    """The first two columns of the rotation matrix, ``[..., 3, 2]``: a continuous representation with six values
    (Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", 2019)."""
    return quaternion_to_matrix(quaternion)[..., :2]


def columns_to_quaternion(columns: Tensor) -> Tensor:
    """Rotations ``[..., 4]`` by Gram-Schmidt from two raw columns ``[..., 3, 2]`` (any length, not orthogonal)."""
    first = F.normalize(columns[..., 0], dim=-1)
    second = F.normalize(columns[..., 1] - (first * columns[..., 1]).sum(-1, keepdim=True) * first, dim=-1)
    third = torch.linalg.cross(first, second)
    return matrix_to_quaternion(torch.stack([first, second, third], dim=-1))


def rotation_log(quaternion: Tensor) -> Tensor:
    """Rotation vectors ``[..., 3]`` (axis times angle, angle in [0, pi]) of unit quaternions ``[..., 4]``."""
    q = canonical(quaternion)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, q[..., :1])
    # Near zero the ratio angle / sin(angle / 2) tends to 2 / w; dividing there would give 0 / 0.
    small = sine < 1e-7
    return q[..., 1:] * torch.where(small, 2 / q[..., :1].clamp_min(0.5), angle / sine.masked_fill(small, 1.0))


def rotation_exp(vector: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]`` of rotation vectors ``[..., 3]``."""
    angle = vector.norm(dim=-1, keepdim=True)
    half = angle / 2
    # sinc keeps the limit at zero: sin(a / 2) / a = sinc(a / 2 / pi) / 2.
    return torch.cat([half.cos(), vector * torch.sinc(half / torch.pi) / 2], dim=-1)


def geodesic_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle ``[...]`` in [0, pi] of the rotation between two unit quaternions ``[..., 4]``."""
    relative = quaternion_multiply(quaternion_conjugate(first), second)
    # atan2 of both parts is accurate for tiny angles, where the arc cosine of a dot product is not.
    return 2 * torch.atan2(relative[..., 1:].norm(dim=-1), relative[..., 0].abs())


def mean_rotation(quaternions: Tensor) -> Tensor:
    """Mean ``[4]`` of rotations ``[N, 4]`` that minimises the summed squared chordal distance.

    The principal eigenvector of the quaternions' scatter matrix, which does not depend on their signs (Markley et al.,
    "Averaging Quaternions", 2007).
    """
    scatter = quaternions.double().T @ quaternions.double()
    mean = torch.linalg.eigh(scatter).eigenvectors[:, -1]
    return canonical(mean).to(quaternions.dtype)


def off_path(quaternion: Tensor) -> Tensor:
    """Whether rotations ``[N, 4]``, in temporal order, are far from the one before and from the one after, which agree
    with each other: bool ``[N]``. This holds for wrong readings of single frames, and for neither the first nor the
    last rotation."""
    found = quaternion.new_zeros(len(quaternion), dtype=torch.bool)
    if len(quaternion) < 3:
        return found
    steps = geodesic_angle(quaternion[:-1], quaternion[1:])
    nearest = torch.minimum(steps[:-1], steps[1:])
    usual = float(np.quantile(nearest.cpu().numpy(), OFF_PATH_SHARE))
    far = nearest > max(OFF_PATH_RAD, OFF_PATH_USUAL * usual)
    found[1:-1] = far & (nearest > OFF_PATH_ACROSS * geodesic_angle(quaternion[:-2], quaternion[2:]))
    return found
