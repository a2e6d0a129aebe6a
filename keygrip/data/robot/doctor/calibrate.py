"""Self-calibration: estimates a camera's pose, focal length and clock from the robot's outline in the images.

Writes a calibration file with corrections (`keygrip/data/robot/corrections.py`); recordings are not changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from keygrip.artifacts import atomic_write
from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.calibration import NAMES, SCHEMA, read_mapping
from keygrip.data.robot.corrections import entry
from keygrip.data.robot.discovery import find_demos, refuse_no_selection
from keygrip.data.robot.doctor.examination import yam_model
from keygrip.data.robot.doctor.not_compared import LEAST_FRAMES, cannot_compare, lacking
from keygrip.data.robot.doctor.registration import FOCAL, NUMBERS, PRIOR, Fit, agreement_of, fit
from keygrip.data.robot.doctor.search import LONG_PRIOR, starts
from keygrip.data.robot.doctor.silhouettes import move_camera
from keygrip.data.robot.doctor.views import Placement, View, is_static, make_view, place_all
from keygrip.data.robot.schema import Demo, DemoError, demo_guard
from keygrip.data.spacing import evenly
from keygrip.override_values import as_typed
from keygrip.progress import Progress
from keygrip.robots.surface import RobotSurface

log = logging.getLogger(__name__)

FINE_REACHES = (5, 4, 3, 3, 3, 3, 3, 3)
LEAST_AGREEMENT = 0.3  # agreement after the fit; below it the images do not show this robot at these poses
LAST_PRIOR = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 20.0])  # wide prior of the last fit: the images alone decide


def calibrate(
    root: str | Path,
    output: str | Path | None,
    format: str,
    calibration: str | Path | None,
    cameras: Sequence[str] | None,
    max_demos: int,
    frames_per_demo: int,
    model: RobotSurface | None = None,
) -> dict[str, Any]:
    """Run the step `calibrate`: fit every static camera and write the corrections.

    Args:
        root, format, calibration: as for `find_demos`.
        output: the file to write; None: FOLDER_calibration.yaml next to the data folder FOLDER.
        cameras: names; None: all cameras that are static within each demo.
        max_demos, frames_per_demo: numbers of demos and images to use, evenly spread.
        model: the arm's surface; None: that of a YAM, if the recording names one.

    Raises:
        ValueError: no camera is static, or none could be fitted; an unknown camera, an empty list of cameras, or a
            number below 1.
        FileExistsError: the file to write exists, or another file exists at the place of an arm model's copy.
        FileNotFoundError: no demonstrations, or the model of an arm in the calibration file is missing.
    """
    refuse_no_selection(cameras, max_demos=max_demos, frames_per_demo=frames_per_demo)
    root = Path(root)
    folder = root.resolve() if root.name in ("", "..") else root  # Path(".").parent is `.`
    target = Path(output) if output is not None else folder.parent / f"{root.resolve().name}_calibration.yaml"
    if target.exists():
        raise FileExistsError(f"{target} exists: name another file with output=PATH, or remove it")
    references = find_demos(root, format, calibration)
    demos: list[Demo] = []
    for index in Progress(evenly(len(references), max_demos), desc="reading demos", unit="demo"):
        try:
            demo = references[index].read()
            for arm in demo.arms if model is None else ():
                yam_model(demo, arm)  # raises here: later, one invalid demo would end the step for all demos
        except BadSample as error:
            log.warning("left out: %s", error)
            continue
        demos.append(demo)
    camera_names = sorted({camera for demo in demos for camera in demo.cameras})
    if unknown := [camera for camera in cameras or () if camera not in camera_names]:
        raise ValueError(f"no demo has camera {unknown[0]!r}; there are {', '.join(camera_names)}")
    calibration_file = (
        Path(calibration) if calibration is not None else next((root / n for n in NAMES if (root / n).is_file()), None)
    )
    content: dict[str, Any] = {} if calibration_file is None else read_mapping(calibration_file)
    if content.get("corrections"):
        raise ValueError(
            f"{calibration_file} holds corrections already, and what would be written were further ones alone: begin "
            "with the calibration that it was made from (of native demonstrations, none)"
        )
    if references[0].format == "native":
        content = {}
    copies = {} if calibration_file is None else move_models(content, calibration_file, target)
    content.setdefault("schema", SCHEMA)
    content.setdefault("conventions", {"camera": "opencv", "pixel": "corner", "length": "m"})
    content["corrections"], report = {}, {}
    failures: dict[str, str] = {}  # why a camera gets no correction
    uncertain: list[bool] = []  # of each corrected camera
    for camera in cameras or camera_names:
        pairs = _pair_views_with_robot(demos, camera, frames_per_demo, model)
        if not pairs:
            failures[camera] = _explain_left_out(demos, camera, model)
            log.warning("camera %s is left as it is: %s", camera, failures[camera])
            continue
        camera_fit = best_fit(pairs)
        if camera_fit.after < LEAST_AGREEMENT or camera_fit.points == 0:
            failures[camera] = f"images and poses do not come together (agreement {camera_fit.after:.2f})"
            log.warning("camera %s is left as it is: %s; run step=doctor", camera, failures[camera])
            continue
        report[camera] = summary(camera_fit)
        log.info("camera %s: %s", camera, report[camera])
        uncertain.append(is_within_uncertainty(camera_fit))
        if uncertain[-1]:
            log.warning(
                "camera %s: no correction is larger than its standard deviation, so that nothing is known to be wrong "
                "with this camera: remove its entry from %s",
                camera,
                target,
            )
        track = next(demo for demo in demos if camera in demo.cameras).cameras[camera]
        lag = round(camera_fit.lag)
        uncertainty = {key: value for key, value in summary(camera_fit).items() if key.startswith("sigma_")}
        uncertainty = {key.removeprefix("sigma_"): value for key, value in uncertainty.items()}
        content["corrections"][camera] = entry(
            _correction_matrix(camera_fit), camera_fit.focal, lag, uncertainty, track
        )
    if not report:
        reasons = "; ".join(f"{camera}: {reason}" for camera, reason in failures.items())
        raise ValueError(f"no camera in {root} could be calibrated from its images ({reasons}): run step=doctor")
    for model_file, copy in copies.items():
        with atomic_write(copy) as file:
            file.write(model_file.read_bytes())
    with atomic_write(target) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())
    advice = "" if all(uncertain) else f"; use them with {as_typed('data.calibration', target)}"
    log.info("corrections: %s%s", target, advice)
    return {"root": str(root), "output": str(target), "cameras": report}


def move_models(content: dict[str, Any], source: Path, target: Path) -> dict[Path, Path]:
    """Adapt the paths of the arms' models in a calibration file, which are relative to it, to another folder.

    Args:
        content: of the file, changed in place. source: path from which it was read. target: path to be written.

    Returns:
        Files to copy, by their new path: models that lie neither next to `target` nor below; others are not read.

    Raises:
        FileNotFoundError: a model is missing. FileExistsError: another file exists at the place of a copy.
    """
    copies: dict[Path, Path] = {}
    arms = [arm for arm in (content.get("arms") or {}).values() if isinstance(arm, dict) and "model" in arm]
    for arm in arms:
        model_path = Path(str(arm["model"]))
        file = source.parent.resolve() / model_path
        if not file.is_file():
            raise FileNotFoundError(f"{file}, the model of an arm in {source}, is missing: copy it there")
        new_path = Path(os.path.relpath(file, target.parent.resolve()))
        if ".." in new_path.parts:
            new_path = Path("_".join((target.stem, *model_path.parts)))
            copy = target.parent / new_path
            if copy.exists() and copy.read_bytes() != file.read_bytes():
                raise FileExistsError(
                    f"{target} needs a copy of {file} beside it, and {copy} is another file: name another place with "
                    "output=PATH, or remove it"
                )
            copies[file] = copy
        arm["model"] = new_path.as_posix()
    return copies


def _correction_matrix(camera_fit: Fit) -> np.ndarray:
    return move_camera(np.eye(4), camera_fit.change[:6])


def summary(found: Fit) -> dict[str, float]:
    """Return the values of a fit that are written and logged."""
    sigma = found.sigma
    return {
        "turn_deg": round(found.degrees, 3),
        "shift_mm": round(found.metres * 1e3, 2),
        "focal_percent": round((found.focal - 1) * 100, 3),
        "late_frames": round(found.lag, 3),
        "sigma_turn_deg": round(float(np.degrees(np.linalg.norm(sigma[:3]))), 3),
        "sigma_shift_mm": round(float(np.linalg.norm(sigma[3:6])) * 1e3, 2),
        "sigma_focal_percent": round(float(sigma[FOCAL]) * 100, 3),
        "sigma_lag_frames": round(float(sigma[-1]), 3),
        "agreement_before": round(found.before, 3),
        "agreement_after": round(found.after, 3),
    }


def is_within_uncertainty(found: Fit) -> bool:
    """Return whether no correction is larger than its standard deviation; a lag that rounds to 0 is no correction."""
    values = summary(found)
    return (
        values["turn_deg"] <= values["sigma_turn_deg"]
        and values["shift_mm"] <= values["sigma_shift_mm"]
        and abs(values["focal_percent"]) <= values["sigma_focal_percent"]
        and (round(found.lag) == 0 or abs(found.lag) <= values["sigma_lag_frames"])
    )


def _pair_views_with_robot(
    demos: Sequence[Demo], camera: str, frames: int, model: RobotSurface | None
) -> list[tuple[View, Placement]]:
    pairs = []
    for demo in demos:
        if camera not in demo.cameras or cannot_compare(demo, camera) is not None:
            continue
        try:
            with demo_guard(demo.name, f"camera {camera!r}: an image cannot be used: "):
                view = make_view(demo, camera, frames)
        except DemoError as error:
            log.warning("left out for this camera: %s", error)
            continue
        robot = place_all(demo, model)
        if robot is not None and robot.source != "poses":
            pairs.append((view, robot))
    return pairs


def _explain_left_out(demos: Sequence[Demo], camera: str, model: RobotSurface | None) -> str:
    """Return why a camera's images can be fitted in no demo, and what to do about it."""
    with_camera = [demo for demo in demos if camera in demo.cameras]
    static_demos = [demo for demo in with_camera if is_static(demo, camera)]
    if not static_demos:
        return "it moves with the arm"
    if all(len(demo) < LEAST_FRAMES for demo in static_demos):
        return f"its demos have fewer than {LEAST_FRAMES} frames"
    demo = next(demo for demo in static_demos if len(demo) >= LEAST_FRAMES)
    reason = cannot_compare(demo, camera) or lacking(demo, model)
    return f"{reason.why}. {reason.remedy}"


def best_fit(pairs: Sequence[tuple[View, Placement]]) -> Fit:
    """Return the change of a camera that fits all images best, from the best of several initial changes.

    First, a coarse fit uses some images and some points of the robot; then a fine fit uses all of them.
    """
    subset = [pairs[index] for index in evenly(len(pairs), 6)]
    initial_agreement = agreement_of(subset)
    fits = [fit(subset)]
    for _, change in starts(subset, best=3):
        fits.append(fit(subset, start=change, prior=LONG_PRIOR))
    best = max(fits, key=lambda found: found.after)
    if initial_agreement > best.after:
        best = fit(subset, np.zeros(NUMBERS), prior=PRIOR)
    return fit(pairs, start=best.change, reaches=FINE_REACHES, prior=LAST_PRIOR, fine=True)
