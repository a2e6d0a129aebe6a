"""Compares images with poses: flips, lags, wrong demos, moved and wrongly calibrated cameras.

The robot's silhouette at the recorded poses is compared with what moves in the images of a static camera; then its
outline is fitted to the images. The change that the fit needs identifies the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from keygrip.data.robot.doctor.causes import (
    FAMILIES,
    READINGS,
    Cause,
    camera_cause,
    is_as_good_as_fit,
    other_camera,
    other_reading,
    place_reinterpreted,
    pose_cause,
    reading_cause,
)
from keygrip.data.robot.doctor.compared_camera import ComparedCamera
from keygrip.data.robot.doctor.examination import Examination, yam_model
from keygrip.data.robot.doctor.flips import POOR, check_flips, check_own_motion
from keygrip.data.robot.doctor.frozen_poses import demos_with_frozen_poses
from keygrip.data.robot.doctor.kinematics import demos_shown_by_joints
from keygrip.data.robot.doctor.not_compared import EXPLAINED, STILL, NotCompared, cannot_compare, lacking
from keygrip.data.robot.doctor.overlays import add_overlays
from keygrip.data.robot.doctor.projection import AIMED_ELSEWHERE
from keygrip.data.robot.doctor.registration import (
    FOCAL,
    LAG,
    PRIOR,
    Fit,
    agreement_of,
    fit,
)
from keygrip.data.robot.doctor.search import wide_fit
from keygrip.data.robot.doctor.tracks import are_degrees
from keygrip.data.robot.doctor.views import Placement, View, make_view, place_all
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.data.spacing import evenly
from keygrip.robots.surface import RobotSurface

FITTED, FRAMES = 5, 8  # demos of a joint fit, and images of each
LEAST_MOTION = 25.0  # pixels (of the small images) that change, on average: below, nothing can be compared
# At least twice the values in clean recordings of the simulator: degrees, metres, factor, frames.
TURN_DEG, SHIFT_M, FOCAL_SHARE, LAG_FRAMES = 1.3, 0.02, 0.05, 0.5
CLEAR_GAIN = 0.04  # gain in agreement that no clean data set shows
GAIN = 0.015  # least gain in agreement for which a fault is reported
DEMO_TURN_DEG, DEMO_SHIFT_M, DEMO_LAG = 1.6, 0.02, 0.4  # the same limits for one demo compared with the others
DEMO_GAIN = 0.02
LAGS = (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6)  # lags in frames that are tried before a fit
# Rotation up and down, left and right, about the axis (rad), and frames, that are tried before a demo is fitted.
FAR_DEG = 15.0
STEPS, STEP_GAIN = ((0, 0.015), (1, 0.015), (2, 0.03), (LAG, 0.7)), 0.005


def check_images_and_poses(
    exam: Examination,
    model: RobotSurface | None = None,
    small_images: dict[tuple[str, str], dict[int, np.ndarray]] | None = None,
) -> NotCompared:
    """Compare each static camera with all arms together, because all of them move in its images.

    Args:
        model: the arms' surface; None: that of a YAM, if the recording names one.
        small_images: small images that were read already, by (demo, camera) and frame.

    Returns:
        What was not compared, and why.
    """
    not_compared = NotCompared()
    # Poses that are frozen, or misread or scaled according to joints; poses without joints are compared with images.
    explained_demos = {
        arm: exam.named("position_scale", arm=arm, severity="error")  # found from joints alone
        | exam.named("pose_direction", arm=arm, severity="error")
        | exam.named("quaternion_order", arm=arm, severity="error") & demos_shown_by_joints(exam, arm)
        | demos_with_frozen_poses(exam, arm, ["poses"])
        for arm in exam.arms
    }
    for camera in exam.cameras:
        static_demos = []
        for demo in exam.with_camera(camera):
            if demo.cameras[camera].uncalibrated:
                continue  # reported by another check
            reason = cannot_compare(demo, camera)
            if reason is None:
                static_demos.append(demo)
            else:
                not_compared.add(camera, reason, [demo.name])
        exam.measures[f"camera/{camera}/standing_demos"] = len(static_demos)
        if explained_views := _explained_views(exam, camera):
            not_compared.add(camera, EXPLAINED, [demo.name for demo in static_demos if demo.name in explained_views])
            static_demos = [demo for demo in static_demos if demo.name not in explained_views]
        for arms in sorted({tuple(sorted(demo.arms)) for demo in static_demos}):
            arm_names = " and ".join(arms)
            pairs: dict[str, tuple[View, Placement]] = {}
            for demo in static_demos:
                if tuple(sorted(demo.arms)) != arms:
                    continue
                if any(demo.name in explained_demos[arm] for arm in arms):
                    not_compared.add(camera, EXPLAINED, [demo.name])
                    continue
                view = make_view(demo, camera, FRAMES, (small_images or {}).get((demo.name, camera)))
                if float((view.foreground > 0.5).sum(axis=(1, 2)).mean()) < LEAST_MOTION:
                    not_compared.add(camera, STILL, [demo.name])
                    continue
                robot = place_all(
                    replace(demo, arms={arm: _without_reported_faults(exam, arm, demo) for arm in arms}), model
                )
                if robot is None:
                    not_compared.add(camera, lacking(demo, model), [demo.name])
                else:
                    pairs[demo.name] = (view, robot)
            exam.measures[f"camera/{camera}/arm/{arm_names}/compared_demos"] = len(pairs)
            if pairs and not _compare_camera(exam, ComparedCamera(camera, arm_names, pairs, model), small_images or {}):
                for demo_name, (view, _) in pairs.items():
                    not_compared.add(camera, lacking(view.demo, model), [demo_name])
    return not_compared


def _explained_views(exam: Examination, camera: str) -> set[str]:
    """Return the names of demos in which a finding explains any disagreement of a camera's images with the poses: wrong
    intrinsics, or a camera pose in another convention."""
    findings = [found for found in exam.findings if found.camera == camera]
    if any(found.check == "off_screen" and found.cause != AIMED_ELSEWHERE for found in findings):
        return {demo.name for demo in exam.with_camera(camera)}  # that convention is one of the whole set
    return {name for found in findings if found.check == "intrinsics" for name in found.demos}


def _without_reported_faults(exam: Examination, arm: str, demo: Demo) -> ArmTrajectory:
    """Return a track without reported faults, which could appear as a moved camera: joints in degrees or frozen joints
    are removed (the poses then give the robot's place), and an inverted opening is corrected."""
    track = demo.arms[arm]
    if are_degrees(track) or demo.name in demos_with_frozen_poses(exam, arm, ["joints"]):
        track = replace(track, joints=None)
    inverted = exam.named("gripper_polarity", arm=arm, severity="error")  # a warning is not certain enough
    return replace(track, gripper=1 - track.gripper) if demo.name in inverted else track


def _compare_camera(
    exam: Examination, compared: ComparedCamera, small_images: dict[tuple[str, str], dict[int, np.ndarray]]
) -> bool:
    """Compare one camera with its arms. Return False if the arm's links are not known, so that little was compared."""
    compared.scores = {name: agreement_of([pair]) for name, pair in compared.pairs.items()}
    key = f"camera/{compared.camera}/arm/{compared.arm}"
    exam.measures[f"{key}/agreement"] = {name: round(score, 3) for name, score in compared.scores.items()}
    sources = sorted({robot.source for _, robot in compared.pairs.values()})
    exam.measures[f"{key}/robot"] = sources
    if sources == ["poses"]:  # no joints, and poses that the arm cannot reach
        if not _check_readings(exam, compared):
            check_own_motion(exam, compared, small_images)
            return False
        return True
    flipped = check_flips(exam, compared)
    unflipped = {name: pair for name, pair in compared.pairs.items() if name not in flipped}
    if not unflipped:
        return True
    compared.pairs = unflipped
    camera_fit = _fit_camera(exam, compared)
    far_change = compared.change if compared.change.any() else None  # too far off to check single demos
    add_overlays(
        exam, compared.camera, compared.arm, compared.pairs, far_change if camera_fit is None else camera_fit.change
    )
    if camera_fit is not None:
        _check_demos(exam, compared)
    return True


def _check_readings(exam: Examination, compared: ComparedCamera) -> bool:
    """For poses that a YAM cannot reach, report another convention in which it reaches them and images agree."""
    names = [name for name, (view, _) in compared.pairs.items() if yam_model(view.demo, compared.arm) is not None][:3]
    if not names or compared.model is not None:
        return False
    scores = {}
    for words in (*READINGS, "0.8", "0.9", "1.1", "1.2"):
        pairs = [(compared.pairs[name][0], place_reinterpreted(compared, name, words)) for name in names]
        if all(robot.source != "poses" for _, robot in pairs):
            scores[words] = agreement_of(pairs)
    best = max(scores, key=lambda words: scores[words], default="")
    if scores.get(best, 0.0) < POOR:
        return False  # the arm's base may be elsewhere than the world's origin
    cause = READINGS.get(best, f"positions scaled by {best}")
    exam.add(
        "pose_reading",
        "error",
        f"a YAM cannot reach the recorded poses; read as {cause}, it does, and is seen there",
        "Store gripper-to-world poses of the grasp site in metres, quaternions w, x, y, z",
        cause=cause,
        camera=compared.camera,
        arm=compared.arm,
        demos=compared.pairs,
    )
    return True


def _select_for_fit(compared: ComparedCamera) -> list[str]:
    """Return the demos for the joint fit: those whose agreement is not far below that of the others."""
    usual = float(np.median([compared.scores[name] for name in compared.pairs]))
    names = [name for name in compared.pairs if compared.scores[name] >= 0.6 * usual] or list(compared.pairs)
    return [names[index] for index in evenly(len(names), FITTED)]


def _fit_camera(exam: Examination, compared: ComparedCamera) -> Fit | None:
    """Fit one change to the camera in all demos; None if single demos cannot be checked after it or the fit fails."""
    names = _select_for_fit(compared)
    pairs = [compared.pairs[name] for name in names]
    camera_fit = fit(pairs)
    if camera_fit.after < POOR or camera_fit.degrees > 3 or abs(camera_fit.lag) > 2:
        if (other := other_camera(compared, names, camera_fit)) is not None:
            _add_other_camera(exam, compared, list(compared.pairs), other)
            return None
        camera_fit = wide_fit(pairs)
    key = f"camera/{compared.camera}/arm/{compared.arm}"
    exam.measures[f"{key}/fit"] = plain_values(camera_fit)
    if camera_fit.after < 0.15 or camera_fit.points == 0:
        exam.add(
            "disagreement",
            "error",
            f"what moves in the images has nothing to do with the poses (agreement {camera_fit.before:.2f}, "
            f"{camera_fit.after:.2f} after a fit)",
            "Check that images and poses are of the same demo and camera, and the world frame of the poses",
            cause="another demo's images, another camera, or another world frame",
            camera=compared.camera,
            arm=compared.arm,
            demos=compared.pairs,
        )
        return None
    gain = camera_fit.after - camera_fit.before
    # rotation, shift and zoom can replace each other: each number is uncertain, but a clear gain of all is not
    sigma = camera_fit.sigma * (3 if gain < CLEAR_GAIN else 0)
    turned = camera_fit.degrees > max(TURN_DEG, np.degrees(float(np.linalg.norm(sigma[:3]))))
    shifted = camera_fit.metres > max(SHIFT_M, float(np.linalg.norm(sigma[3:6])))
    zoomed = abs(camera_fit.change[FOCAL]) > max(FOCAL_SHARE, sigma[FOCAL])
    late = abs(camera_fit.lag) > LAG_FRAMES
    if not ((turned or shifted or zoomed or late) and gain > GAIN):
        return camera_fit
    improved = [n for n, pair in compared.pairs.items() if agreement_of([pair], camera_fit.change) > compared.scores[n]]
    # One demo with a fault of its own also shifts a joint fit.
    if len(set(improved) & set(names)) > 0.6 * len(names):
        _add_registration(exam, compared, improved, camera_cause(compared, names, camera_fit))
        compared.change = camera_fit.change
        if camera_fit.degrees > FAR_DEG:
            return None  # too far for a meaningful fit of one demo
    return camera_fit


def plain_values(found: Fit) -> dict[str, object]:
    """Return plain values of a fit, for the report."""
    return {
        "turn_deg": [round(float(v), 2) for v in np.degrees(found.change[:3])],
        "shift_mm": [round(float(v) * 1e3, 1) for v in found.change[3:6]],
        "focal_percent": round((found.focal - 1) * 100, 2),
        "late_frames": round(found.lag, 2) + 0.0,
        "agreement_before": round(found.before, 3),
        "agreement_after": round(found.after, 3),
        "residual_px": round(found.residual, 2),
    }


def _check_demos(exam: Examination, compared: ComparedCamera) -> None:
    """Report demos whose camera, clock or poses differ from those of the others."""
    free = (0, 1, 2, 3, 4, 5, LAG)
    prior = PRIOR.copy()
    fits: dict[str, Fit] = {}
    agreements = {name: agreement_of([pair], compared.change) for name, pair in compared.pairs.items()}
    usual_agreement = float(np.median(list(agreements.values())))
    for name, pair in compared.pairs.items():
        # if images and poses do not match at all, no small step helps: that is no reason to skip a demo
        if agreements[name] >= 0.6 * usual_agreement and not _can_improve(pair, compared.change, agreements[name]):
            continue
        fits[name] = fit(
            [pair],
            start=lag_start(pair, compared.change),
            centre=compared.change,
            free=free,
            prior=prior,
            reaches=(12, 9, 6, 4, 4),
        )
    key = f"camera/{compared.camera}/arm/{compared.arm}"
    exam.measures[f"{key}/demo_fits"] = {
        name: plain_values(demo_fit) | {"agreement_before": round(agreements[name], 3)}
        for name, demo_fit in fits.items()
    }
    names_by_demo: dict[str, list[str]] = {}
    reports: dict[str, Callable[[], None]] = {}  # report of each demo whose fault is a change of clock or camera
    for name, demo_fit in fits.items():
        if agreements[name] < 0.45 * usual_agreement and demo_fit.after < 0.7 * usual_agreement:
            demo_fit = fits[name] = wide_fit([compared.pairs[name]])
        change = demo_fit.change - compared.change
        turn, shift = np.degrees(np.linalg.norm(change[:3])), float(np.linalg.norm(change[3:6]))
        lag, gain = float(-change[LAG]), demo_fit.after - agreements[name]
        sigma = 0.0 if gain > CLEAR_GAIN else np.degrees(float(np.linalg.norm(demo_fit.sigma[:3])))
        poor = demo_fit.after < 0.6 * usual_agreement
        if (
            poor
            and agreements[name] < 0.6 * usual_agreement
            and (other := _find_matching_demo(compared, name, agreements[name])) is not None
        ):
            names_by_demo.setdefault(other, []).append(name)
        elif gain > DEMO_GAIN and abs(lag) > DEMO_LAG and _lag_explains(compared, name, demo_fit):
            reports[name] = partial(_add_lag, exam, compared, name, lag)
        elif gain > DEMO_GAIN and (turn > max(DEMO_TURN_DEG, 3 * sigma) or shift > DEMO_SHIFT_M):
            camera = other_camera(compared, [name], demo_fit)
            reports[name] = partial(_add_moved_camera, exam, compared, name, demo_fit)
            if camera is not None:
                reports[name] = partial(_add_other_camera, exam, compared, [name], camera)
        elif agreements[name] < 0.3 * usual_agreement and agreements[name] < 0.15:
            names_by_demo.setdefault("", []).append(name)
    changes = {name: fits[name].change for name in reports}
    cause = pose_cause(compared, list(reports), changes) if len(reports) > max(1, len(compared.pairs) / 2) else None
    if cause is not None:  # one fault of all demos instead of a different one in each
        _add_registration(exam, compared, list(compared.pairs), cause)
    else:
        misread = {
            name: words for name in reports if (words := other_reading(compared, name, fits[name], usual_agreement))
        }
        for name, report in reports.items():
            if name not in misread:
                report()
        for words in sorted(set(misread.values())):
            cause = reading_cause(words)
            _add_registration(exam, compared, [name for name, other in misread.items() if other == words], cause)
    for other, names in names_by_demo.items():
        exam.add(
            "wrong_demo",
            "error",
            "the robot in the images does not move as the poses of this demo say"
            + (f", but as those of {other}" if other else ""),
            "Pair each demo's images with its own poses, or leave these demos out",
            cause="images and poses are of different demos" + (f" (images of {other})" if other else ""),
            camera=compared.camera,
            arm=compared.arm,
            demos=names,
        )


def lag_start(pair: tuple[View, Placement], change: np.ndarray) -> np.ndarray:
    """Return a change whose lag is the whole number of frames at which silhouettes and images agree best. From a lag
    that is too far off, a fit of outlines would rotate the camera instead of shifting the clock."""

    def at(lag: int) -> np.ndarray:
        other = change.copy()
        other[LAG] += lag
        return other

    return max((at(lag) for lag in (0, *LAGS)), key=lambda other: agreement_of([pair], other))


def _can_improve(pair: tuple[View, Placement], change: np.ndarray, recorded_agreement: float) -> bool:
    """Return whether a small rotation of the camera or a small lag raises the agreement: at the optimum, none does."""
    for index, step in STEPS:
        for sign in (1, -1):
            other = change.copy()
            other[index] += sign * step
            if agreement_of([pair], other) > recorded_agreement + STEP_GAIN:
                return True
    return False


def _find_matching_demo(compared: ComparedCamera, name: str, own_agreement: float) -> str | None:
    """Return the demo whose poses match this demo's images best, if clearly better than its own poses, or None."""
    view = compared.pairs[name][0]
    agreements = {
        other: agreement_of([(view, robot)], compared.change)
        for other, (_, robot) in compared.pairs.items()
        if other != name
    }
    if not agreements:
        return None
    best = max(agreements, key=lambda other: agreements[other])
    return best if agreements[best] > own_agreement + 0.1 and agreements[best] > 0.3 else None


def _lag_explains(compared: ComparedCamera, name: str, demo_fit: Fit) -> bool:
    return is_as_good_as_fit([compared.pairs[name]], demo_fit, FAMILIES["lag"], compared.change)


def _add_registration(exam: Examination, compared: ComparedCamera, names: list[str], cause: Cause) -> None:
    exam.add(
        cause.check,
        "error",
        cause.what,
        cause.advice,
        cause=cause.cause,
        camera=compared.camera,
        arm=compared.arm,
        demos=names,
    )


def _add_other_camera(exam: Examination, compared: ComparedCamera, names: list[str], other: str) -> None:
    exam.add(
        "other_camera",
        "error",
        f"the images show the robot as {other} is calibrated, not as {compared.camera} is",
        "Pair each camera's images with its own intrinsics and pose",
        cause=f"images or calibrations of {compared.camera} and {other} exchanged",
        camera=compared.camera,
        arm=compared.arm,
        demos=names,
    )


def _add_lag(exam: Examination, compared: ComparedCamera, name: str, lag: float) -> None:
    frames = max(1, round(abs(lag)))
    exam.add(
        "image_lag",
        "error",
        f"the images show the robot {abs(lag):.1f} frames {'later' if lag > 0 else 'earlier'} than the poses",
        f"Shift the images by {frames} frames {'earlier' if lag > 0 else 'later'}, or leave this demo out",
        cause=f"images {frames} frames {'late' if lag > 0 else 'early'}",
        camera=compared.camera,
        arm=compared.arm,
        demos=[name],
    )


def _add_moved_camera(exam: Examination, compared: ComparedCamera, name: str, demo_fit: Fit) -> None:
    change = demo_fit.change - compared.change
    turn, shift = np.degrees(np.linalg.norm(change[:3])), float(np.linalg.norm(change[3:6]))
    exam.add(
        "moved_camera",
        "error",
        f"in this demo the images fit the poses with the camera turned by {turn:.1f} degrees and shifted by "
        f"{shift * 100:.1f} cm (agreement {demo_fit.before:.2f}, {demo_fit.after:.2f} after the fit)",
        "The camera was moved: leave this demo out, or put it into a folder of its own and calibrate that folder "
        "(prepare step=calibrate fits one correction to all demos of a folder)",
        cause=f"camera moved by {turn:.1f} degrees and {shift * 100:.1f} cm in this demo",
        camera=compared.camera,
        arm=compared.arm,
        demos=[name],
    )
