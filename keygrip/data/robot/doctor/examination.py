"""The input and the output of the doctor's checks: demonstrations, findings, measures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from keygrip.data.robot.arm_models import named_models
from keygrip.data.robot.schema import Demo

Severity = Literal["error", "warning", "note"]

# Findings about what was not examined: they are not faults.
NO_FAULTS = ("not_compared", "uncalibrated_camera")
MOVED_M = 0.02  # a gripper that moves this far must change the image


def yam_model(demo: Demo, arm: str) -> tuple[str, str] | None:
    """Return i2rt's names of a recorded YAM's arm and gripper, for its kinematics and shape; None: another robot.

    Readers that compute poses from joints store the models they used, whatever the robot's name (`bi_yam_follower`).
    For other recordings of a robot with the word yam in its name, the default models are assumed.

    Raises:
        DemoError: the recording names unknown models.
    """
    default_models = ("yam", "linear_4310") if named_yam(demo.robot) else None
    return named_models(demo, arm) or default_models


def named_yam(robot: str) -> bool:
    """Return whether a robot's name contains the word yam: `yam`, `i2rt_yam`, `bimanual_yam_follower`."""
    return re.search(r"(?<![a-z])yam(?![a-z])", robot.lower()) is not None


@dataclass(frozen=True)
class Finding:
    """A fault of a data set.

    Attributes:
        check: short name of the check that found it. severity: an `error` spoils training, a `warning` costs quality, a
            `note` states what was not examined and is not a fault.
        where: camera, arm and demos in words. what: what was measured. advice: what to do.
        cause: the likely cause in a few words, with its size.
        demos: names of the affected demos. camera, arm: their names, or empty.
        frames: affected frames of the first of these demos, if the finding is about single frames.
    """

    check: str
    severity: Severity
    where: str
    what: str
    advice: str
    cause: str
    demos: tuple[str, ...]
    camera: str = ""
    arm: str = ""
    frames: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity} [{self.check}] {self.where}: {self.what}. Likely cause: {self.cause}. {self.advice}"


@dataclass
class Examination:
    """Input and output of the checks."""

    demos: list[Demo]
    frames_per_demo: int
    height_bins: int
    pred_size: int
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)  # of severity `note`
    measures: dict[str, Any] = field(default_factory=dict)
    # By (demo, camera): frames [F] that were read, and the share of pixels [F - 1] that changes from one to the next.
    activity: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    overlays: list[tuple[str, np.ndarray]] = field(default_factory=list)  # caption and image, for the report

    def add(
        self,
        check: str,
        severity: Severity,
        what: str,
        advice: str,
        *,
        cause: str,
        demos: Iterable[str],
        camera: str = "",
        arm: str = "",
        frames: Iterable[int] = (),
    ) -> None:
        """Add a finding to `findings`, or to `notes` if its severity is `note`; arguments as in `Finding`."""
        names = tuple(demos)
        all_names = {demo.name for demo in self.demos}
        everywhere = len(all_names) > 1 and all_names <= set(names)
        parts = (
            f"camera {camera}" if camera else "",
            f"arm {arm}" if arm else "",
            "all demos" if everywhere else join_five(names),
        )
        location = ", ".join(part for part in parts if part)
        finding = Finding(check, severity, location, what, advice, cause, names, camera, arm, tuple(frames)[:20])
        (self.notes if severity == "note" else self.findings).append(finding)

    def found(self, *checks: str) -> bool:
        """Return whether one of these checks has found something."""
        return any(finding.check in checks for finding in self.findings)

    def named(self, *checks: str, arm: str | None = None, severity: str | None = None) -> set[str]:
        """Return names of the demos in findings of these checks; `arm`, `severity`: only findings with this value."""
        matching = [
            f for f in self.findings if f.check in checks and arm in (None, f.arm) and severity in (None, f.severity)
        ]
        return {name for finding in matching for name in finding.demos}

    @property
    def arms(self) -> list[str]:
        """Names of the arms of all demos."""
        return sorted({arm for demo in self.demos for arm in demo.arms})

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras of all demos."""
        return sorted({camera for demo in self.demos for camera in demo.cameras})

    def with_arm(self, arm: str) -> list[Demo]:
        """Demos that have the arm."""
        return [demo for demo in self.demos if arm in demo.arms]

    def with_camera(self, camera: str) -> list[Demo]:
        """Demos that have the camera."""
        return [demo for demo in self.demos if camera in demo.cameras]


def join_five(names: Iterable[str]) -> str:
    """Return the first five names, and the number of further ones."""
    all_names = list(names)
    return ", ".join(all_names[:5]) + (f" and {len(all_names) - 5} more" if len(all_names) > 5 else "")


def tensor(values: np.ndarray) -> torch.Tensor:
    """Return a float64 copy as a tensor."""
    return torch.from_numpy(np.array(values, dtype=np.float64))
