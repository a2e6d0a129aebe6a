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

from keygrip.data.robot.doctor.silhouettes import _shifted, agreement, boundary, moved, seen, splat
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
    return intrinsics, moved(view.world_to_camera, change[:6])


def silhouette(view: View, placement: Placement, change: np.ndarray, half: bool = True, every: int = 4) -> np.ndarray:
    """Return [F, h, w] bool: where the robot should be visible; `half`: at half the resolution."""
    intrinsics, pose = camera_with(view, change)
    pixels, _ = seen(placement.at(view.index + change[LAG], every), intrinsics, pose)
    height, width = view.size
    return splat(pixels / 2, height // 2, width // 2)[0] if half else splat(pixels, height, width)[0]


def halved(changed: np.ndarray) -> np.ndarray:
    """[F, h, w] -> [F, h // 2, w // 2], averaged."""
    frames, height, width = changed.shape
    even = changed[:, : height // 2 * 2, : width // 2 * 2]
    return np.asarray(even.reshape(frames, height // 2, 2, width // 2, 2).mean(axis=(2, 4)))


def agreement_of(pairs: Sequence[tuple[View, Placement]], change: np.ndarray | None = None) -> float:
    """Return the mean agreement of the views with their robots, -1..1."""
    change = np.zeros(NUMBERS) if change is None else change
    scores = [agreement(silhouette(view, robot, change), halved(view.foreground)) for view, robot in pairs]
    return float(np.mean(scores))


def uncovered_background(images: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median [h, w, 3] over frames in which a pixel is not covered, and bool [h, w]: enough such frames."""
    counts = (~covered).sum(axis=0)
    values = np.where(covered[..., None], np.float32(1e6), images.astype(np.float32))
    values.sort(axis=0)
    middle = np.clip((counts - 1) // 2, 0, len(images) - 1)
    return np.take_along_axis(values, middle[None, ..., None], axis=0)[0], counts >= 3


def _cover(view: View, placement: Placement, change: np.ndarray, margin: int) -> np.ndarray:
    mask = silhouette(view, placement, change, half=False, every=EVERY)
    for _ in range(margin):
        mask = _shifted(mask, np.logical_or)
    return mask


def evidence(view: View, placement: Placement, change: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the foreground [F, h, w] against a background without the robot (at its estimated place), 0.5 where the
    background is never visible; and the difference of the images from it, [F, h, w, 3], 0 where it is not known."""
    background, known = uncovered_background(view.images, _cover(view, placement, change, margin))
    found = foreground(view.images, np.where(known[..., None], background, 0))
    found[:, ~known] = 0.5
    return found, np.where(known[..., None], view.images - background, 0).astype(np.float32)


def _outline(
    changed: np.ndarray, pixels: np.ndarray, rng: np.random.Generator, reach: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return outline points of one view: frame [M], point [M], normal [M, 2], distance to the outline in the image [M],
    weight [M]."""
    height, width = changed.shape[1:]
    mask, which = splat(pixels, height, width)
    edge = boundary(mask) & (which >= 0)
    frames, rows, columns = np.nonzero(edge)
    kept = []
    for frame in range(len(mask)):
        own = np.flatnonzero(frames == frame)
        kept.append(own if len(own) <= OUTLINE else rng.choice(own, OUTLINE, replace=False))
    chosen = np.concatenate(kept)
    frames, rows, columns = frames[chosen], rows[chosen], columns[chosen]
    smooth = gaussian_filter(mask.astype(np.float32), (0, 1.5, 1.5))
    down, across = np.gradient(smooth, axis=(1, 2))
    normal = -np.stack([across[frames, rows, columns], down[frames, rows, columns]], axis=1)
    length = np.linalg.norm(normal, axis=1)
    normal = normal / np.maximum(length, 1e-6)[:, None]
    points = which[frames, rows, columns]
    at = pixels[frames, points]
    steps = np.arange(-reach, reach + 0.25, 0.5 if reach < 7 else 1.0)
    x = at[:, :1] + steps * normal[:, :1] - 0.5
    y = at[:, 1:] + steps * normal[:, 1:] - 0.5
    where = np.stack([np.broadcast_to(frames[:, None], x.shape), y, x])
    profile = map_coordinates(changed, where, order=1, mode="constant", cval=0.5)
    inside = np.cumsum(profile - 0.5, axis=1)
    # the step that splits the profile best: foreground before it, background after it
    split = 2 * inside - inside[:, -1:]
    best = split.argmax(axis=1)
    count = len(steps)
    share = split[np.arange(len(best)), best] / (0.5 * count)
    # near an end of the profile one side is not visible: no step was found
    good = (best > 1) & (best < count - 3) & (share > 0.6) & (length > 0.02)
    out = (at[:, 0] < 1) | (at[:, 1] < 1) | (at[:, 0] > width - 2) | (at[:, 1] > height - 2)
    weight = np.where(good & ~out, share, 0.0)
    return frames, points, normal, steps[best] + (steps[1] - steps[0]) / 2, weight


def at_half_contrast(
    added: np.ndarray, frames: np.ndarray, at: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return where along the normals of outline points [M] the image is halfway between robot and background, in pixels
    from `at` [M, 2], and bool [M]: whether this place is within a pixel.

    With a threshold on the foreground, edges of high contrast lie further out than others, and blurred ones (as of
    JPEG's colours) even further. At half of its own contrast, an edge is at its true place.

    Args:
        added: [F, h, w, 3], see `evidence`. frames: [M]. normal: [M, 2], outwards.
    """
    steps = np.arange(-2.5, 1.55, 0.25)
    x = at[:, :1] + steps * normal[:, :1] - 0.5
    y = at[:, 1:] + steps * normal[:, 1:] - 0.5
    where = np.stack([np.broadcast_to(frames[:, None], x.shape), y, x])
    profile = np.stack([map_coordinates(added[..., c], where, order=1, mode="nearest") for c in range(3)], axis=-1)
    own = profile[:, steps <= -1.0].mean(axis=1)  # the robot's colour there, relative to the background
    share = np.einsum("msc,mc->ms", profile, own) / np.maximum((own**2).sum(axis=1), 1.0)[:, None]
    near = np.flatnonzero(steps >= -1.0)
    below = share[:, near] < 0.5
    first = near[below.argmax(axis=1)]
    rows = np.arange(len(at))
    high, low = share[rows, first - 1], share[rows, first]
    part = (high - 0.5) / np.maximum(high - low, 1e-6)
    good = below.any(axis=1) & (first > near[0]) & (np.linalg.norm(own, axis=1) > LEAST_CONTRAST)
    return steps[first - 1] + part * (steps[1] - steps[0]), good


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
    before = agreement_of(pairs)
    numbers = [*free, NUMBERS]  # one more number: by how much outlines in images are wider than those of the points
    inverse_prior = np.concatenate([1 / prior**2, [1.0]])[numbers]
    information, residual, count, cost = np.diag(inverse_prior), 0.0, 0, 1.0
    wider = 0.0
    every = 1 if fine else EVERY
    changed: list[tuple[np.ndarray, np.ndarray]] = []
    for number, reach in enumerate(reaches):
        if number in (0, len(reaches) - 2):
            changed = [evidence(view, robot, change, min(reach, 6)) for view, robot in pairs]
        rows, distances, weights = [], [], []
        for (view, robot), (shown, added) in zip(pairs, changed, strict=True):
            intrinsics, pose = camera_with(view, change)
            points = robot.at(view.index + change[LAG], every)
            pixels, camera = seen(points, intrinsics, pose)
            frames, chosen, normal, distance, weight = _outline(shown, pixels, rng, reach)
            if fine:
                start_at = pixels[frames, chosen] + distance[:, None] * normal
                more, good = at_half_contrast(added, frames, start_at, normal)
                distance, weight = distance + more, np.where(good, weight, 0.0)
            if LAG in free:
                speed = robot.speed(view.index[frames] + change[LAG], chosen, every) @ pose[:3, :3].T
            else:
                speed = np.zeros((len(frames), 3))
            jacobian = _jacobian(camera[frames, chosen], intrinsics, pose, change, speed)
            rows.append(np.einsum("mi,mij->mj", normal, jacobian))
            distances.append(distance)
            weights.append(weight)
        matrix = np.concatenate([np.concatenate(rows), np.ones((sum(map(len, distances)), 1))], axis=1)[:, numbers]
        distance, weight = np.concatenate(distances) - wider, np.concatenate(weights)
        used = weight > 0
        count = int(used.sum())
        if count < LEAST_POINTS:
            break
        spread = 1.5 + float(np.median(np.abs(distance[used])))
        weight = weight / (1 + (distance / spread) ** 2)  # Cauchy weights: outlines of other objects hardly count
        weight = weight / CORRELATED / PIXEL_SIGMA**2
        information = matrix.T @ (matrix * weight[:, None]) + np.diag(inverse_prior)
        away = np.concatenate([change - centre, [wider]])[numbers]
        step = np.linalg.solve(information, matrix.T @ (weight * distance) - inverse_prior * away)
        change[list(free)] += step[:-1]
        wider += float(step[-1])
        residual = float(np.median(np.abs(distance[used])))
        lost = np.where(used, np.minimum(np.abs(distance) / reaches[-1], 1.0), 1.0)
        cost = float(lost.mean())
    sigma = np.zeros(NUMBERS)
    sigma[list(free)] = np.sqrt(np.diag(np.linalg.inv(information)))[:-1]
    return Fit(change, sigma, before, agreement_of(pairs, change), residual, count, cost)


def _jacobian(
    camera: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray, change: np.ndarray, speed: np.ndarray
) -> np.ndarray:
    """Return the derivatives [M, 2, 8] of pixels with respect to a change, at points [M, 3] in the camera's axes."""
    x, y, z = camera.T.astype(float)
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    by_point = np.zeros((len(x), 2, 3))
    by_point[:, 0, 0], by_point[:, 0, 2] = fx / z, -fx * x / z**2
    by_point[:, 1, 1], by_point[:, 1, 2] = fy / z, -fy * y / z**2
    turned = camera - change[SHIFT]  # the shift comes after the rotation
    cross = np.zeros((len(x), 3, 3))
    cross[:, 0, 1], cross[:, 0, 2] = turned[:, 2], -turned[:, 1]
    cross[:, 1, 0], cross[:, 1, 2] = -turned[:, 2], turned[:, 0]
    cross[:, 2, 0], cross[:, 2, 1] = turned[:, 1], -turned[:, 0]
    jacobian = np.zeros((len(x), 2, NUMBERS))
    jacobian[:, :, ROTATION] = by_point @ cross
    jacobian[:, :, SHIFT] = by_point
    jacobian[:, 0, FOCAL], jacobian[:, 1, FOCAL] = fx * x / z, fy * y / z
    jacobian[:, :, LAG] = (by_point @ speed[..., None])[..., 0]
    return jacobian
