"""Images that were not compared with poses, why, and what to do: in these images faults may remain unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from keygrip.data.robot.doctor.examination import Examination, Severity, yam_model
from keygrip.data.robot.doctor.views import is_static
from keygrip.data.robot.schema import Demo
from keygrip.robots.kinematics import ARM_JOINTS
from keygrip.robots.surface import RobotSurface

LEAST_SIDE, LEAST_FRAMES = 96, 6  # pixels of an image's longer side, frames of a demo: below, nothing is compared


class Reason(NamedTuple):
    """Why a camera's images were not compared with the poses: severity (`warning` if the user can change it, `note` if
    it is not a fault), the reason in words, and what to do."""

    severity: Severity
    why: str
    remedy: str


MOVES = Reason("note", "the camera moves within the demo, as one on the hand does", "Nothing to do")
SHORT = Reason("note", f"the demo has fewer than {LEAST_FRAMES} frames", "Nothing to do")
STILL = Reason(
    "note", "hardly anything moves in the images", "Aim the camera at the workspace, if it was to see the arm"
)
EXPLAINED = Reason("note", "another finding explains any disagreement", "Run the doctor again once that is mended")
SEVERAL = Reason(
    "warning",
    "of several arms one has no recorded joints, and nothing says where its base stands",
    "Record the joints of each arm",
)
NO_JOINTS = Reason(
    "warning", "without recorded joints nothing says where the arm's links are", "Record joints beside the poses"
)
OUT_OF_REACH = Reason(
    "warning",
    "there are no recorded joints, and a YAM that stands at the world's origin cannot reach the recorded poses",
    "Record joints beside the poses, or give the poses in the frame of the arm's base",
)


def too_small(width: int, height: int) -> Reason:
    """Return the reason for images smaller than `LEAST_SIDE` pixels."""
    return Reason(
        "warning",
        f"images of {width} x {height} pixels are too small for it (the longer side needs {LEAST_SIDE})",
        f"Use the recording at {LEAST_SIDE} pixels or more",
    )


def no_model(robot: str) -> Reason:
    """Return the reason for an arm whose shape is not known."""
    return Reason(
        "warning",
        f"nothing says what robot {robot!r} looks like",
        "Name its MJCF or URDF file with robot_model.path=FILE; recorded joints are needed, too",
    )


def too_few_joints(recorded: int, model: RobotSurface | None) -> Reason:
    """Return the reason for an arm with fewer recorded joints than its model has (None: a YAM)."""
    if model is None:
        return Reason(
            "warning", f"{recorded} joints are recorded, a YAM has {ARM_JOINTS}", "Record all joints of the arm"
        )
    return Reason(
        "warning",
        f"{recorded} joints are recorded, the arm in robot_model.path has {model.joints} (without robot_model.fingers)",
        "Name the joints that the opening moves with robot_model.fingers, or record all joints of the arm",
    )


def lacking(demo: Demo, model: RobotSurface | None) -> Reason:
    """Return why the links of a demo's arms are not known; call it only if they are not known."""
    yam = all(yam_model(demo, arm) is not None for arm in demo.arms)
    if model is None and not yam:
        return no_model(demo.robot)
    recorded = min((track.joints.shape[1] for track in demo.arms.values() if track.joints is not None), default=None)
    if recorded is not None and recorded < (ARM_JOINTS if model is None else model.joints):
        return too_few_joints(recorded, model)
    if all(track.joints is not None for track in demo.arms.values()):
        return EXPLAINED  # recorded joints were left out because of another finding
    if len(demo.arms) > 1:
        return SEVERAL
    return OUT_OF_REACH if model is None else NO_JOINTS


def cannot_compare(demo: Demo, camera: str) -> Reason | None:
    """Return why a calibrated camera's images in a demo cannot be compared with any arm; None: they can."""
    track = demo.cameras[camera]
    if not is_static(demo, camera):
        return MOVES
    if len(demo) < LEAST_FRAMES:
        return SHORT
    return too_small(track.width, track.height) if max(track.width, track.height) < LEAST_SIDE else None


class NotCompared:
    """Collects what was not compared, by camera and reason."""

    def __init__(self) -> None:
        self.demos: dict[tuple[str, Reason], list[str]] = {}

    def add(self, camera: str, reason: Reason, names: Iterable[str]) -> None:
        """Add demos whose images of a camera were not compared."""
        demo_names = self.demos.setdefault((camera, reason), [])
        demo_names += [name for name in names if name not in demo_names]

    def report(self, exam: Examination) -> None:
        """Add a finding `not_compared` for each camera and reason: warnings to the findings, others to the notes."""
        for (camera, reason), names in self.demos.items():
            if names:
                exam.add(
                    "not_compared",
                    reason.severity,
                    f"images and poses were not compared: {reason.why}",
                    reason.remedy,
                    cause="no fault of the recording" if reason.severity == "note" else "what it needs is missing",
                    camera=camera,
                    demos=names,
                )
