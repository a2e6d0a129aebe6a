"""Runs all checks on a folder of demonstrations and writes the report and the contact sheets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.artifacts import atomic_write, refuse_file, write_json
from keygrip.data.robot.discovery import find_demos, refuse_no_selection
from keygrip.data.robot.doctor.commands import check_commands
from keygrip.data.robot.doctor.contact_sheet import contact_sheet
from keygrip.data.robot.doctor.examination import NO_FAULTS, Examination, yam_model
from keygrip.data.robot.doctor.exchanged_arms import check_exchanged_arms
from keygrip.data.robot.doctor.frozen_poses import check_frozen_poses, check_poses_of_moving_images
from keygrip.data.robot.doctor.grippers import check_gripper
from keygrip.data.robot.doctor.html_report import html_report
from keygrip.data.robot.doctor.images import check_images
from keygrip.data.robot.doctor.images_and_poses import check_images_and_poses
from keygrip.data.robot.doctor.joint_tracks import check_joint_tracks
from keygrip.data.robot.doctor.kinematics import check_kinematics
from keygrip.data.robot.doctor.not_compared import NotCompared
from keygrip.data.robot.doctor.projection import check_projection
from keygrip.data.robot.doctor.tracks import (
    check_instructions,
    check_joint_unit,
    check_opening_unit,
    check_outlier_poses,
)
from keygrip.data.robot.doctor.trajectories import (
    check_heights,
    check_jumps,
    check_quaternions,
    check_times,
)
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import Demo, DemoError, left_out_cameras
from keygrip.data.spacing import evenly
from keygrip.progress import Progress
from keygrip.robots.surface import RobotSurface

log = logging.getLogger(__name__)


def examine(
    root: str | Path,
    output: str | Path | None,
    format: str,
    calibration: str | Path | None,
    max_demos: int | None,
    frames_per_demo: int,
    height_bins: int,
    pred_size: int,
    compare_images: bool,
    robot_model: RobotSurface | None = None,
) -> dict[str, Any]:
    """Run the step `doctor`: log every finding with its advice; return counts and the folder of the contact sheets."""
    folder = Path(output) if output is not None else Path("runs/doctor") / Path(root).resolve().name
    exam = doctor(
        root,
        folder,
        format=format,
        calibration=calibration,
        max_demos=max_demos,
        frames_per_demo=frames_per_demo,
        height_bins=height_bins,
        pred_size=pred_size,
        compare_images=compare_images,
        robot_model=robot_model,
    )
    for finding in exam.findings:
        log.warning("%s", finding)
    for note in exam.notes:
        log.info("%s", note)
    if not any(finding.check not in NO_FAULTS for finding in exam.findings):
        log.info("%s", no_fault_in(exam, str(root), compare_images))
    errors = sum(finding.severity == "error" for finding in exam.findings)
    log.info("report: %s", folder / "report.html")
    counts = {"errors": errors, "warnings": len(exam.findings) - errors, "notes": len(exam.notes)}
    return {"root": str(root), "output": str(folder), **counts}


def no_fault_in(exam: Examination, root: str, compare_images: bool) -> str:
    """Return the last line of the log if no fault was found. It states what was not examined and not compared."""
    examined, count = exam.measures["examined"], exam.measures["demos"]
    if examined < count:
        root = f"the {examined} of {count} demonstrations of {root} that were examined (max_demos=null: all)"
    if not compare_images:
        return (
            f"no fault found in what was compared of {root}; images were not compared with poses (compare_images=false)"
        )
    omissions = [finding for finding in (*exam.findings, *exam.notes) if finding.check in NO_FAULTS]
    if not omissions:
        return f"no fault found in {root}"
    locations = "; ".join(dict.fromkeys(finding.where for finding in omissions))
    return f"no fault found in what was compared of {root}; images were not compared with poses: {locations}"


def _read_demos(
    references: Sequence[DemoReference], progress: bool
) -> tuple[list[Demo], list[DemoError], list[DemoError]]:
    """Return the demos, the errors of demos that cannot be read, and the errors of demos that can be read only without
    their uncalibrated cameras."""
    demos: list[Demo] = []
    broken: list[DemoError] = []
    camera_errors: list[DemoError] = []
    for reference in Progress(references, desc="reading demos", unit="demo", shown=progress):
        try:
            demo, camera_error = _read_whole_or_calibrated(reference)
            for arm in demo.arms:
                yam_model(demo, arm)  # raises here: in the checks, one invalid demo would stop them for all demos
        except DemoError as error:
            broken.append(error)
            continue
        demos.append(demo)
        camera_errors += [camera_error] if camera_error else []
    return demos, broken, camera_errors


def _read_whole_or_calibrated(reference: DemoReference) -> tuple[Demo, DemoError | None]:
    """Return a demo with all cameras or, if that fails, with calibrated ones and the error. Raises DemoError: both
    fail."""
    try:
        return reference.read(uncalibrated=True), None  # some models need no calibration
    except DemoError as error:
        try:
            return reference.read(), error
        except DemoError:
            raise error from None


# Checks of poses, times and cameras, in the order of the report. The checks of images follow, then that of commands.
CHECKS: tuple[Callable[[Examination], None], ...] = (
    check_times,
    check_frozen_poses,
    check_heights,
    check_jumps,
    check_outlier_poses,
    check_joint_unit,
    check_exchanged_arms,
    check_kinematics,
    check_joint_tracks,
    check_quaternions,
    check_gripper,
    check_opening_unit,
    check_instructions,
    check_projection,
)


def doctor(
    root: Path | str,
    output: Path | str,
    format: str = "auto",
    calibration: Path | str | None = None,
    max_demos: int | None = 50,
    frames_per_demo: int = 12,
    height_bins: int = 32,
    pred_size: int = 56,
    compare_images: bool = True,
    progress: bool = True,
    robot_model: RobotSurface | None = None,
) -> Examination:
    """Run every check on the demonstrations under `root` and write the report. If `findings` is empty, no fault was
    found in what was compared; `notes` list what was not compared.

    Args:
        root, format, calibration: as for `find_demos`.
        output: folder for `contact_sheet_<camera>.png`, `report.html` and `report.json` (findings and all measures).
        max_demos: number of demos to examine, evenly spread over the folder; None: all.
        frames_per_demo: number of images per demo and camera, evenly spread, whose brightness is measured; three times
            as many are kept for the check of colours and the comparison with poses. All frames are decoded (of demos
            longer than `MOST_FRAMES`, every second, third, ...), to find damaged, frozen and outlier images.
        height_bins, pred_size: those of the policy, to compute the size of a bin and of a cell.
        compare_images: compare pixels with poses: the robot's silhouette with what moves in the images. False leaves
            only this comparison out: images are decoded and checked all the same.
        progress: show a progress bar on standard error.
        robot_model: the arms' surface; None: that of a YAM, if the recording names one.

    Raises:
        FileNotFoundError, ValueError: no data, or an unknown format (see `find_demos`).
        ValueError: `max_demos` or `frames_per_demo` is below 1, or `output` is a file.
    """
    refuse_no_selection(None, max_demos=max_demos, frames_per_demo=frames_per_demo)
    refuse_file(output, "output")
    output = Path(output)
    references = find_demos(root, format, calibration)
    indices = evenly(len(references), len(references) if max_demos is None else max_demos)
    demos, broken, camera_errors = _read_demos([references[index] for index in indices], progress)
    exam = Examination(demos, frames_per_demo, height_bins, pred_size)
    exam.measures |= {"root": str(root), "format": references[0].format, "demos": len(references)}
    exam.measures |= {"examined": len(indices), "readable": len(demos)}
    causes: dict[str, list[DemoError]] = {}
    for error in broken:
        causes.setdefault(error.cause or "files that are damaged or do not fit together", []).append(error)
    for cause, errors in causes.items():
        reason, remedy = errors[0].reason, errors[0].remedy
        exam.add(
            "broken_demo",
            "error",
            f"{len(errors)} of {len(indices)} demos cannot be read; the first: {reason.removesuffix('. ' + remedy)}",
            remedy or "Record them again or remove them; training leaves them out and stops at more than 10 %",
            cause=cause,
            demos=[error.name for error in errors],
        )
    if camera_errors:
        exam.add(
            "broken_camera",
            "warning",
            f"a camera that is not calibrated is broken in {len(camera_errors)} of {len(indices)} demos; the first: "
            f"{camera_errors[0].reason}",
            "Training leaves these demos out where it reads that camera",
            cause="damaged images of a camera that is not calibrated",
            demos=[error.name for error in camera_errors],
        )
    if left_out := {demo.name: cameras for demo in demos if (cameras := left_out_cameras(demo))}:
        camera, reason = next(iter(next(iter(left_out.values())).items()))
        exam.add(
            "left_out_camera",
            "warning",
            f"a camera is left out in {len(left_out)} of {len(indices)} demos; the first, {camera!r}: {reason}",
            "Training leaves these demos out where it needs that camera",
            cause="images that cannot be assigned to poses",
            demos=list(left_out),
        )
    output.mkdir(parents=True, exist_ok=True)
    sheets = {}
    if demos:
        for check in CHECKS:
            check(exam)
        small_images: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for camera in Progress(exam.cameras, desc="looking at images", unit="camera", shown=progress):
            for name, stream in check_images(exam, camera).items():
                small_images[name, camera] = dict(zip(stream.index.tolist(), stream.images, strict=True))
        check_poses_of_moving_images(exam)
        not_compared = NotCompared()
        if compare_images:
            not_compared = check_images_and_poses(exam, robot_model, small_images)
        check_commands(exam)
        not_compared.report(exam)
        for camera in exam.cameras:
            sheet = sheets[camera] = contact_sheet(exam, camera)
            with atomic_write(output / f"contact_sheet_{camera.replace('/', '_')}.png") as file:
                sheet.save(file, "PNG")
    with atomic_write(output / "report.html") as file:
        file.write(html_report(exam, sheets).encode())
    sections = {"findings": exam.findings, "notes": exam.notes}
    report = {**exam.measures, **{key: [asdict(finding) for finding in rows] for key, rows in sections.items()}}
    write_json(output / "report.json", report)
    return exam
