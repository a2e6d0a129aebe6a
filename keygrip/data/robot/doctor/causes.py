"""Causes of a camera's fitted change: the simplest explanation that fits nearly as well as the whole change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from keygrip.data.robot.doctor.compared_camera import ComparedCamera
from keygrip.data.robot.doctor.registration import FOCAL, LAG, NUMBERS, Fit, agreement_of, fit
from keygrip.data.robot.doctor.views import Placement, View, is_static, place, tool_poses

ROTATION_SET, SHIFT_SET = (0, 1, 2), (3, 4, 5)
FAMILIES: dict[str, tuple[int, ...]] = {
    "lag": (LAG,),
    "focal": (FOCAL,),
    "rotation": ROTATION_SET,
    "shift": SHIFT_SET,
    "crop": (0, 1, FOCAL),
    "extrinsics": (*ROTATION_SET, *SHIFT_SET),
}
SIMPLEST_FIRST = (("lag",), ("focal",), ("rotation", "shift", "crop"), ("extrinsics",))
# An explanation is as good as the full fit if it loses less agreement and raises the cost by a smaller factor.
AS_GOOD, COST_RATIO = 0.015, 1.12
LONG = np.array([0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.4, 8.0])
SCALES = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
BETTER = 0.03
OTHER_GAIN = 0.1  # gain in agreement from which a camera's images are attributed to another camera
# Relative offset of the principal point from the centre that no lens has; largest difference between its x and y parts.
OTHER_SIZE, SAME_SHARE = 0.06, 0.01


READINGS = {
    "conjugated": "quaternions conjugated (world to gripper)",
    "xyzw": "quaternions stored x, y, z, w",
    "inverted": "poses inverted (world to gripper in place of gripper to world)",
}


class Cause(NamedTuple):
    """Cause of a fitted change: in a few words, what was measured, what to do, and the check that reports it:
    `registration` for cameras and clocks, `pose_reading` if the recorded poses are wrong."""

    cause: str
    what: str
    advice: str
    check: str = "registration"


def family_fit(
    pairs: Sequence[tuple[View, Placement]], found: Fit, free: Sequence[int], centre: np.ndarray | None = None
) -> Fit:
    """Return the best change of only some of the numbers, starting from their values in a full fit."""
    base = np.zeros(NUMBERS) if centre is None else centre
    start = base.copy()
    start[list(free)] = found.change[list(free)]
    return fit(pairs, start=start, free=free, prior=LONG, centre=base, reaches=(12, 10, 8, 6, 4, 3))


def is_as_good_as_fit(
    pairs: Sequence[tuple[View, Placement]], found: Fit, free: Sequence[int], centre: np.ndarray | None = None
) -> bool:
    """Return whether a change of these numbers alone is as good as the full fit."""
    return _fits_as_well(family_fit(pairs, found, free, centre), found)


def _fits_as_well(alone: Fit, full: Fit) -> bool:
    return alone.after > full.after - AS_GOOD and alone.cost < COST_RATIO * full.cost + 0.005


def reinterpret_poses(view: View, arm: str, words: str) -> np.ndarray:
    """Return the tool's poses [N, 4, 4] under another interpretation of the recorded poses."""
    trajectory = view.demo.arms[arm]
    position, quaternion = trajectory.position, trajectory.quaternion
    conjugated = quaternion * [1, -1, -1, -1]
    if words == "conjugated":
        return tool_poses(position, conjugated)
    if words == "xyzw":
        return tool_poses(position, np.roll(quaternion, 1, axis=1))
    if words == "inverted":
        return np.linalg.inv(tool_poses(position, quaternion))
    return tool_poses(position / float(words), quaternion)


def place_reinterpreted(compared: ComparedCamera, name: str, words: str) -> Placement:
    """Return the robot's placement in a demo under another interpretation of its poses."""
    view, _ = compared.pairs[name]
    return place(view.demo, compared.arm, compared.model, reinterpret_poses(view, compared.arm, words))


def pose_cause(compared: ComparedCamera, names: Sequence[str], changes: Mapping[str, np.ndarray]) -> Cause | None:
    """Return another interpretation of the poses that is as good as changes of the camera [8], by demo, or None."""
    names = list(names)[:4]
    pairs = [compared.pairs[name] for name in names]
    recorded_agreement = agreement_of(pairs)
    fitted_agreement = float(np.mean([agreement_of([compared.pairs[name]], changes[name]) for name in names]))
    if any(robot.source == "joints" for _, robot in pairs):
        return None if pairs[0][1].others else _base_cause(pairs, recorded_agreement, fitted_agreement)
    readings = READINGS
    scores = {}
    for words in (*readings, *map(str, SCALES)):
        scores[words] = agreement_of(
            [(compared.pairs[name][0], place_reinterpreted(compared, name, words)) for name in names]
        )
    best = max(scores, key=lambda words: scores[words])
    if scores[best] < recorded_agreement + BETTER or scores[best] < fitted_agreement - BETTER / 3:
        return None
    if best in readings:
        return reading_cause(best)
    scale = _parabola_peak(SCALES, [scores[str(s)] for s in SCALES], float(best), recorded_agreement)
    return Cause(
        f"positions scaled by {scale:.2f}",
        f"images and poses go together if positions are divided by {scale:.2f}",
        "Check the unit and the calibration of the recorded positions",
        "pose_reading",
    )


def reading_cause(words: str) -> Cause:
    """Return the cause for poses in another convention, named by a key of `READINGS`."""
    cause = READINGS[words]
    return Cause(
        cause,
        f"images and poses go together with {cause}",
        "Store gripper-to-world poses, quaternions w, x, y, z",
        "pose_reading",
    )


def other_reading(compared: ComparedCamera, name: str, found: Fit, usual_agreement: float) -> str | None:
    """Return the convention, a key of `READINGS`, in which the poses of one demo agree with its images clearly better
    than after the best change of the camera, and about as well as in the other demos; None: in none, or joints place
    the robot, so that the convention of its poses hardly changes where it is."""
    _, robot = compared.pairs[name]
    if robot.source == "joints" or robot.others or compared.model is not None:
        return None
    scores = {
        words: agreement_of([(compared.pairs[name][0], place_reinterpreted(compared, name, words))], compared.change)
        for words in READINGS
    }
    best = max(scores, key=lambda words: scores[words])
    return best if scores[best] > max(found.after + BETTER, 0.6 * usual_agreement) else None


def _base_cause(
    pairs: Sequence[tuple[View, Placement]], recorded_agreement: float, fitted_agreement: float
) -> Cause | None:
    """Return the cause if joints and images agree on a gripper position other than the recorded one, or None."""
    base = pairs[0][1].base
    distance_cm = float(np.linalg.norm(base[:3, 3])) * 100
    angle_deg = float(np.degrees(np.arccos(np.clip((np.trace(base[:3, :3]) - 1) / 2, -1, 1))))
    if distance_cm < 0.5 and angle_deg < 0.5:
        return None
    agreement_at_origin = agreement_of([(view, replace(robot, base=np.eye(4))) for view, robot in pairs])
    if agreement_at_origin < recorded_agreement + BETTER / 2 or agreement_at_origin < fitted_agreement - BETTER:
        return None
    offset = f"{distance_cm:.1f} cm" + (f" and {angle_deg:.1f} degrees" if angle_deg > 1 else "")
    return Cause(
        f"recorded positions offset by {offset}",
        f"joints and images go together, and put the gripper {offset} from the recorded positions",
        "Correct the base frame of the recorded positions: the joints' own base is the world",
        "pose_reading",
    )


def _parabola_peak(scales: Sequence[float], scores: Sequence[float], best: float, unscaled_score: float) -> float:
    """Return the maximum of a parabola through the best scale and its neighbours."""
    scores_by_scale = dict(zip(scales, scores, strict=True)) | {1.0: unscaled_score}
    ordered = sorted(scores_by_scale)
    index = ordered.index(best)
    if index in (0, len(ordered) - 1):
        return best
    x = np.array(ordered[index - 1 : index + 2])
    a, b, _ = np.polyfit(x, [scores_by_scale[float(v)] for v in x], 2)
    return float(np.clip(-b / (2 * a), x[0], x[2])) if a < 0 else best


def other_camera(compared: ComparedCamera, names: Sequence[str], found: Fit) -> str | None:
    """Return the camera of the same demos whose calibration fits these images as well as the best change of their own
    camera, and clearly better than their own unchanged camera; None: there is none."""
    views = [compared.pairs[name] for name in names]
    shared_cameras = sorted(set.intersection(*(set(view.demo.cameras) for view, _ in views)) - {compared.camera})
    scores = {}
    for camera in shared_cameras:
        pairs = [(_with_calibration_of(view, camera), robot) for view, robot in views]
        if all(view is not None for view, _ in pairs):
            scores[camera] = agreement_of([(view, robot) for view, robot in pairs if view is not None])
    best = max(scores, key=lambda camera: scores[camera], default=None)
    good = best is not None and scores[best] > max(found.before + OTHER_GAIN, found.after - AS_GOOD)
    return best if good else None


def _with_calibration_of(view: View, camera: str) -> View | None:
    """Return a view's images with the calibration of another camera of its demo; None: that camera moves, or its images
    have another size."""
    own_track, track = view.demo.cameras[view.camera], view.demo.cameras[camera]
    if not is_static(view.demo, camera) or (track.width, track.height) != (own_track.width, own_track.height):
        return None
    scale_y = view.size[0] / own_track.height
    intrinsics = np.diag([view.scale, scale_y, 1.0]) @ np.asarray(track.intrinsics[0])
    return replace(view, intrinsics=intrinsics, world_to_camera=np.asarray(track.world_to_camera[0]))


def other_image_size(view: View) -> tuple[int, int] | None:
    """Return the width and height of the images to which a camera matrix belongs, estimated from its principal point if
    this is off the centre of the stored images by the same share in x and y; None: it is not."""
    track = view.demo.cameras[view.camera]
    matrix = np.asarray(track.intrinsics[0])
    size = 2 * matrix[0, 2], 2 * matrix[1, 2]
    ratio_x, ratio_y = size[0] / track.width, size[1] / track.height
    if abs(ratio_x - 1) < OTHER_SIZE or abs(ratio_x - ratio_y) > SAME_SHARE:
        return None
    return round(size[0]), round(size[1])


def camera_cause(compared: ComparedCamera, names: Sequence[str], found: Fit) -> Cause:
    """Return the cause for which a fit had to change a camera in all demos."""
    pairs = [compared.pairs[name] for name in names]
    calibrate = "Calibrate again, or let `prepare step=calibrate` write the corrected calibration"
    agreement = f"agreement {found.before:.2f} as recorded, {found.after:.2f}"
    family = "all"
    for group in SIMPLEST_FIRST:
        fits = {name: family_fit(pairs, found, FAMILIES[name]) for name in group}
        good = {name: alone for name, alone in fits.items() if _fits_as_well(alone, found)}
        if good:  # a rotation, a shift and a crop look similar: choose the one that fits best
            family, found = min(good.items(), key=lambda entry: entry[1].cost)
            break
    if family != "lag" and (size := other_image_size(pairs[0][0])) is not None:
        track = pairs[0][0].demo.cameras[compared.camera]
        return Cause(
            f"cropped or resized images with old K (of {size[0]} x {size[1]} pixels)",
            f"the robot is seen elsewhere ({agreement} after a fit), and the principal point is the centre of images "
            f"of {size[0]} x {size[1]} pixels",
            f"Give the intrinsics of the images as they are stored, {track.width} x {track.height}. " + calibrate,
        )
    if family != "lag" and (by_poses := pose_cause(compared, names, dict.fromkeys(names, found.change))) is not None:
        return by_poses
    turn, shift, focal, lag = found.degrees, found.metres * 100, (found.focal - 1) * 100, found.lag
    if family == "lag":
        frames = max(1, round(abs(lag)))
        late = "late" if lag > 0 else "early"
        return Cause(
            f"images {frames} frames {late}",
            f"the images show the robot {abs(lag):.1f} frames {'later' if lag > 0 else 'earlier'} than the poses "
            f"({agreement} with this undone)",
            f"Shift the images by {frames} frames {'earlier' if lag > 0 else 'later'}",
        )
    if family == "focal":
        return Cause(
            f"focal length off by {-focal / (1 + focal / 100):.1f} percent",
            f"the robot is seen as through a lens with {focal:+.1f} percent of focal length ({agreement} with it)",
            "Images were cropped and resized with the old K, or the intrinsics are another camera's. " + calibrate,
        )
    if family == "crop":
        return Cause(
            f"cropped images with old K (focal length {focal:+.1f} percent, centre moved)",
            f"the robot is seen as through a crop of the image: {focal:+.1f} percent of focal length and another "
            f"centre ({agreement} with it)",
            "Give the intrinsics of the images as they are stored. " + calibrate,
        )
    if family == "rotation":
        return Cause(
            f"extrinsics off by {turn:.1f} degrees",
            f"the robot is seen as by a camera turned by {turn:.1f} degrees ({agreement} with it)",
            calibrate,
        )
    if family == "shift":
        joints = any(robot.source == "joints" for _, robot in pairs)
        return Cause(
            f"extrinsics or the robot's base off by {shift:.1f} cm",
            f"the robot is seen as by a camera shifted by {shift:.1f} cm ({agreement} with it)"
            + ("" if joints else "; a base offset of the positions looks the same"),
            calibrate,
        )
    late_words = f", images {abs(lag):.1f} frames {'late' if lag > 0 else 'early'}" if abs(lag) > 0.5 else ""
    focal_words = f", focal length {focal:+.1f} percent" if family == "all" and abs(focal) > 2 else ""
    return Cause(
        f"extrinsics off by {turn:.1f} degrees and {shift:.1f} cm{focal_words}{late_words}",
        f"the robot is seen as by a camera turned by {turn:.1f} degrees and shifted by {shift:.1f} cm{focal_words}"
        f"{late_words} ({agreement} with it)",
        calibrate,
    )
