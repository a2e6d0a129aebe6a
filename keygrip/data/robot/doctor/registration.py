"""Fits a camera to images: the robot's outline is projected with the recorded poses, then moved to where the images
show it.

A change has 8 numbers: rotation vector about the camera's own axes (3, rad), shift in the camera's axes (3, m), the
logarithm of the focal length's factor, and the frames by which the images are early. Shape legend: F frames, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from keygrip.data.robot.doctor.silhouettes import (
    agreement,
    average_blocks,
    move_camera,
    outline_of,
    project_points,
    shifted,
    splat,
)
from keygrip.data.robot.doctor.views import Placement, View, foreground

ROTATION, SHIFT, FOCAL, LAG = slice(0, 3), slice(3, 6), 6, 7
NUMBERS = 8
# Prior standard deviations: 8 degrees about each axis, 5 cm along each axis, 12 % of focal length, 3 frames.
PRIOR = np.array([0.14, 0.14, 0.14, 0.05, 0.05, 0.05, 0.12, 3.0])
REACHES = (12, 9, 6, 5, 4, 3)  # search distance around the outline in pixels, one for each pass
OUTLINE = 160  # points on the outline of a frame
LEAST_POINTS = 60  # outline points on all frames together; fewer give no fit
EVERY = 3  # every n-th surface point for coarse fits; the outline of few points lies too far inside
PIXEL_SIGMA = 1.0  # standard deviation of an outline's position
LEAST_CONTRAST = 20.0  # grey levels (of 255); weaker edges are not measured at half contrast
CORRELATED = 12.0  # neighbouring outline points have correlated errors: this many count as one


@dataclass(frozen=True)
class Fit:
    """Result of a fit.

    Args:
        change: [8], see above. sigma: [8] one standard deviation. before, after: agreement of silhouettes and images
        (-1..1) without and with the change. residual: median distance of the outline in pixels of the small images,
        after the fit. points: number of outline points that were found in the images. cost: mean robust cost of all
        outline points after the fit, 0 for a perfect fit, 1 if no outline is found.
    """

    change: np.ndarray
    sigma: np.ndarray
    before: float
    after: float
    residual: float
    points: int
    cost: float

    @property
    def degrees(self) -> float:
        """Angle of the rotation."""
        return float(np.degrees(np.linalg.norm(self.change[ROTATION])))

    @property
    def metres(self) -> float:
        """Length of the camera's shift."""
        return float(np.linalg.norm(self.change[SHIFT]))

    @property
    def focal(self) -> float:
        """Factor by which the focal length changes."""
        return float(np.exp(self.change[FOCAL]))

    @property
    def lag(self) -> float:
        """Frames by which the images are late."""
        return float(-self.change[LAG])


def camera_with(view: View, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics [3, 3] and world_to_camera [4, 4] of a view after a change."""
    intrinsics = view.intrinsics.copy()
    intrinsics[0, 0] *= np.exp(change[FOCAL])
    intrinsics[1, 1] *= np.exp(change[FOCAL])
    return intrinsics, move_camera(view.world_to_camera, change[:6])


def silhouette(view: View, placement: Placement, change: np.ndarray, half: bool = True, every: int = 4) -> np.ndarray:
    """Return [F, h, w] bool: where the robot should be visible; `half`: at half the resolution."""
    intrinsics, pose = camera_with(view, change)
    pixels, _ = project_points(placement.at(view.index + change[LAG], every), intrinsics, pose)
    height, width = view.size
    return splat(pixels / 2, height // 2, width // 2)[0] if half else splat(pixels, height, width)[0]


def agreement_of(pairs: Sequence[tuple[View, Placement]], change: np.ndarray | None = None) -> float:
    """Return the mean agreement of the views with their robots, -1..1."""
    change = np.zeros(NUMBERS) if change is None else change
    scores = [agreement(silhouette(view, robot, change), average_blocks(view.foreground, 2)) for view, robot in pairs]
    return float(np.mean(scores))


def uncovered_background(images: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median [h, w, 3] over frames in which a pixel is not covered, and bool [h, w]: enough such frames."""
    counts = (~covered).sum(axis=0)
    values = np.where(covered[..., None], np.float32(1e6), images.astype(np.float32))
    values.sort(axis=0)
    middle_index = np.clip((counts - 1) // 2, 0, len(images) - 1)
    return np.take_along_axis(values, middle_index[None, ..., None], axis=0)[0], counts >= 3


def _grown_silhouette(view: View, placement: Placement, change: np.ndarray, margin: int) -> np.ndarray:
    mask = silhouette(view, placement, change, half=False, every=EVERY)
    for _ in range(margin):
        mask = shifted(mask, np.logical_or)
    return mask


def foreground_evidence(
    view: View, placement: Placement, change: np.ndarray, margin: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the foreground [F, h, w] against a background without the robot (at its estimated place), 0.5 where the
    background is never visible; and the difference of the images from it, [F, h, w, 3], 0 where it is not known."""
    background, uncovered = uncovered_background(view.images, _grown_silhouette(view, placement, change, margin))
    certainty = foreground(view.images, np.where(uncovered[..., None], background, 0))
    certainty[:, ~uncovered] = 0.5
    return certainty, np.where(uncovered[..., None], view.images - background, 0).astype(np.float32)


def _outline(
    changed: np.ndarray, pixels: np.ndarray, rng: np.random.Generator, reach: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return outline points of one view: frame [M], point [M], normal [M, 2], distance to the outline in the image [M],
    weight [M]."""
    height, width = changed.shape[1:]
    mask, point_index = splat(pixels, height, width)
    edge = outline_of(mask) & (point_index >= 0)
    frames, rows, columns = np.nonzero(edge)
    sampled = []
    for frame in range(len(mask)):
        in_frame = np.flatnonzero(frames == frame)
        sampled.append(in_frame if len(in_frame) <= OUTLINE else rng.choice(in_frame, OUTLINE, replace=False))
    chosen = np.concatenate(sampled)
    frames, rows, columns = frames[chosen], rows[chosen], columns[chosen]
    smooth = gaussian_filter(mask.astype(np.float32), (0, 1.5, 1.5))
    gradient_y, gradient_x = np.gradient(smooth, axis=(1, 2))
    normal = -np.stack([gradient_x[frames, rows, columns], gradient_y[frames, rows, columns]], axis=1)
    length = np.linalg.norm(normal, axis=1)
    normal = normal / np.maximum(length, 1e-6)[:, None]
    points = point_index[frames, rows, columns]
    outline_pixels = pixels[frames, points]
    steps = np.arange(-reach, reach + 0.25, 0.5 if reach < 7 else 1.0)
    x = outline_pixels[:, :1] + steps * normal[:, :1] - 0.5
    y = outline_pixels[:, 1:] + steps * normal[:, 1:] - 0.5
    coordinates = np.stack([np.broadcast_to(frames[:, None], x.shape), y, x])
    profile = map_coordinates(changed, coordinates, order=1, mode="constant", cval=0.5)
    cumulative = np.cumsum(profile - 0.5, axis=1)
    # the step that splits the profile best: foreground before it, background after it
    split = 2 * cumulative - cumulative[:, -1:]
    best = split.argmax(axis=1)
    count = len(steps)
    share = split[np.arange(len(best)), best] / (0.5 * count)
    # near an end of the profile one side is not visible: no step was found
    reliable = (best > 1) & (best < count - 3) & (share > 0.6) & (length > 0.02)
    near_border = (
        (outline_pixels[:, 0] < 1)
        | (outline_pixels[:, 1] < 1)
        | (outline_pixels[:, 0] > width - 2)
        | (outline_pixels[:, 1] > height - 2)
    )
    weight = np.where(reliable & ~near_border, share, 0.0)
    return frames, points, normal, steps[best] + (steps[1] - steps[0]) / 2, weight


def half_contrast_offsets(
    added: np.ndarray, frames: np.ndarray, at: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return where along the normals of outline points [M] the image is halfway between robot and background, in pixels
    from `at` [M, 2], and bool [M]: whether this place is within a pixel.

    With a threshold on the foreground, edges of high contrast lie further out than others, and blurred ones (as of
    JPEG's colours) even further. At half of its own contrast, an edge is at its true place.

    Args:
        added: [F, h, w, 3], see `foreground_evidence`. frames: [M]. normal: [M, 2], outwards.
    """
    steps = np.arange(-2.5, 1.55, 0.25)
    x = at[:, :1] + steps * normal[:, :1] - 0.5
    y = at[:, 1:] + steps * normal[:, 1:] - 0.5
    coordinates = np.stack([np.broadcast_to(frames[:, None], x.shape), y, x])
    profile = np.stack(
        [map_coordinates(added[..., c], coordinates, order=1, mode="nearest") for c in range(3)], axis=-1
    )
    robot_colour = profile[:, steps <= -1.0].mean(axis=1)  # the robot's colour there, relative to the background
    share = np.einsum("msc,mc->ms", profile, robot_colour) / np.maximum((robot_colour**2).sum(axis=1), 1.0)[:, None]
    candidates = np.flatnonzero(steps >= -1.0)
    below = share[:, candidates] < 0.5
    crossing = candidates[below.argmax(axis=1)]
    rows = np.arange(len(at))
    high, low = share[rows, crossing - 1], share[rows, crossing]
    fraction = (high - 0.5) / np.maximum(high - low, 1e-6)
    reliable = below.any(axis=1) & (crossing > candidates[0]) & (np.linalg.norm(robot_colour, axis=1) > LEAST_CONTRAST)
    return steps[crossing - 1] + fraction * (steps[1] - steps[0]), reliable


def fit(
    pairs: Sequence[tuple[View, Placement]],
    start: np.ndarray | None = None,
    free: Sequence[int] = tuple(range(NUMBERS)),
    reaches: Sequence[int] = REACHES,
    prior: np.ndarray = PRIOR,
    centre: np.ndarray | None = None,
    fine: bool = False,
) -> Fit:
    """Fit one change to all views of a camera by weighted least squares on the distances of outlines.

    Args:
        pairs: views with the robot's placement in them. start: initial change; None: no change.
        free: which of the 8 numbers may change. reaches: search distance for the outline in each pass, pixels.
        prior: one sigma of each number around `centre` (None: no change); it limits numbers that images leave open.
        fine: for subpixel accuracy: use all points of the robot's surface, and edges at half their contrast.
    """
    change = np.zeros(NUMBERS) if start is None else start.astype(float).copy()
    centre = np.zeros(NUMBERS) if centre is None else centre
    rng = np.random.default_rng(0)
    initial_agreement = agreement_of(pairs)
    indices = [*free, NUMBERS]  # one more number: by how much outlines in images are wider than those of the points
    inverse_prior = np.concatenate([1 / prior**2, [1.0]])[indices]
    information, residual, count, cost = np.diag(inverse_prior), 0.0, 0, 1.0
    widening = 0.0
    stride = 1 if fine else EVERY
    evidences: list[tuple[np.ndarray, np.ndarray]] = []
    for iteration, reach in enumerate(reaches):
        if iteration in (0, len(reaches) - 2):
            evidences = [foreground_evidence(view, robot, change, min(reach, 6)) for view, robot in pairs]
        rows, distances, weights = [], [], []
        for (view, robot), (certainty, difference) in zip(pairs, evidences, strict=True):
            intrinsics, pose = camera_with(view, change)
            points = robot.at(view.index + change[LAG], stride)
            pixels, camera_points = project_points(points, intrinsics, pose)
            frames, point_index, normal, distance, weight = _outline(certainty, pixels, rng, reach)
            if fine:
                start_at = pixels[frames, point_index] + distance[:, None] * normal
                correction, reliable = half_contrast_offsets(difference, frames, start_at, normal)
                distance, weight = distance + correction, np.where(reliable, weight, 0.0)
            if LAG in free:
                speed = robot.speed(view.index[frames] + change[LAG], point_index, stride) @ pose[:3, :3].T
            else:
                speed = np.zeros((len(frames), 3))
            jacobian = _jacobian(camera_points[frames, point_index], intrinsics, pose, change, speed)
            rows.append(np.einsum("mi,mij->mj", normal, jacobian))
            distances.append(distance)
            weights.append(weight)
        matrix = np.concatenate([np.concatenate(rows), np.ones((sum(map(len, distances)), 1))], axis=1)[:, indices]
        distance, weight = np.concatenate(distances) - widening, np.concatenate(weights)
        valid = weight > 0
        count = int(valid.sum())
        if count < LEAST_POINTS:
            break
        spread = 1.5 + float(np.median(np.abs(distance[valid])))
        weight = weight / (1 + (distance / spread) ** 2)  # Cauchy weights: outlines of other objects hardly count
        weight = weight / CORRELATED / PIXEL_SIGMA**2
        information = matrix.T @ (matrix * weight[:, None]) + np.diag(inverse_prior)
        deviation = np.concatenate([change - centre, [widening]])[indices]
        step = np.linalg.solve(information, matrix.T @ (weight * distance) - inverse_prior * deviation)
        change[list(free)] += step[:-1]
        widening += float(step[-1])
        residual = float(np.median(np.abs(distance[valid])))
        losses = np.where(valid, np.minimum(np.abs(distance) / reaches[-1], 1.0), 1.0)
        cost = float(losses.mean())
    sigma = np.zeros(NUMBERS)
    sigma[list(free)] = np.sqrt(np.diag(np.linalg.inv(information)))[:-1]
    return Fit(change, sigma, initial_agreement, agreement_of(pairs, change), residual, count, cost)


def _jacobian(
    camera: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray, change: np.ndarray, speed: np.ndarray
) -> np.ndarray:
    """Return the derivatives [M, 2, 8] of pixels with respect to a change, at points [M, 3] in the camera's axes."""
    x, y, z = camera.T.astype(float)
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    by_point = np.zeros((len(x), 2, 3))
    by_point[:, 0, 0], by_point[:, 0, 2] = fx / z, -fx * x / z**2
    by_point[:, 1, 1], by_point[:, 1, 2] = fy / z, -fy * y / z**2
    rotated = camera - change[SHIFT]  # the shift comes after the rotation
    cross = np.zeros((len(x), 3, 3))
    cross[:, 0, 1], cross[:, 0, 2] = rotated[:, 2], -rotated[:, 1]
    cross[:, 1, 0], cross[:, 1, 2] = -rotated[:, 2], rotated[:, 0]
    cross[:, 2, 0], cross[:, 2, 1] = rotated[:, 1], -rotated[:, 0]
    jacobian = np.zeros((len(x), 2, NUMBERS))
    jacobian[:, :, ROTATION] = by_point @ cross
    jacobian[:, :, SHIFT] = by_point
    jacobian[:, 0, FOCAL], jacobian[:, 1, FOCAL] = fx * x / z, fy * y / z
    jacobian[:, :, LAG] = (by_point @ speed[..., None])[..., 0]
    return jacobian
