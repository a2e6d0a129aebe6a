"""Delays between tracks, and checks of the units of grippers and joints, outlier poses and instructions."""

from __future__ import annotations

import numpy as np
import torch

from keygrip.data.robot.checks import pose_outliers, reached_outliers
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.models.geometry.rotations import off_path

# Least distance from the reached poses, and the share of it that may remain with inverted poses.
INVERTED_M, INVERTED_GAIN = 0.015, 0.35
FAST_M = 0.003  # motion per frame from which a frame is used to measure the delay
UNITS = {1000.0: "millimetres", 100.0: "centimetres", 39.37: "inches", 3.2808: "feet"}
NO_INSTRUCTION = {"", "none", "null", "todo", "tbd", "n/a", "na", "nan", "unknown", "task", "instruction", "test"}


def unit_of(scale: float) -> str | None:
    """Return the unit in which lengths are `scale` times their value in metres; None: no usual unit."""
    return next((name for size, name in UNITS.items() if abs(scale / size - 1) < 0.03), None)


def best_delay(first: np.ndarray, second: np.ndarray, most: int) -> float:
    """Return the frames (fractional) by which `second` [N, D] follows `first`, -most to most; nan if nothing moves."""
    step_lengths = np.linalg.norm(np.diff(first, axis=0), axis=1)
    if (step_lengths > FAST_M).sum() < 3:
        return float("nan")
    most = int(min(most, len(first) // 2))
    delays = np.arange(-most, most + 1)
    costs = []
    for delay in delays.tolist():
        rows = np.arange(max(0, -delay), min(len(first), len(first) - delay))
        difference = first[rows] - second[rows + delay]
        # the offset is removed: it may be a fault
        costs.append(float(np.abs(difference - np.median(difference, axis=0)).mean()))
    best = int(np.argmin(costs))
    if best in (0, len(delays) - 1):
        return float(delays[best])
    left, middle, right = costs[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    return float(delays[best] + (0.5 * (left - right) / curvature if curvature > 0 else 0.0))


def pair_with_delay(reached: np.ndarray, commanded: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [M, D] of the commanded track and of the reached one, which follows it by `shift` frames."""
    rows = np.arange(max(0, -shift), min(len(commanded), len(commanded) - shift))
    return commanded[rows], reached[rows + shift]


def track_distance(reached: np.ndarray, commanded: np.ndarray) -> float:
    """Return the median distance (m) of two tracks [N, 3] at their best delay."""
    delay = best_delay(commanded, reached, 12)
    command, position = pair_with_delay(reached, commanded, round(delay) if np.isfinite(delay) else 0)
    return float(np.median(np.linalg.norm(command - position, axis=1)))


def check_opening_unit(exam: Examination) -> None:
    """Report openings that stay below a gripper's width in metres: they were not converted to 0..1."""
    for arm in exam.arms:
        demos = exam.with_arm(arm)
        highest = {demo.name: float(demo.arms[arm].gripper.max()) for demo in demos}
        small = [d.name for d in demos if highest[d.name] < 0.15 and np.ptp(d.arms[arm].gripper) > 0.005]
        if small:
            exam.add(
                "gripper_unit",
                "error",
                f"the gripper's opening stays between 0 and {max(highest[name] for name in small):.3f}: metres of "
                "opening are likely",
                "Divide by the widest opening: 0 is closed, 1 is open",
                cause="gripper opening in metres",
                demos=small,
                arm=arm,
            )


def are_degrees(arm: ArmTrajectory) -> bool:
    """Return whether joint angles are larger than any joint reaches in radians."""
    return arm.joints is not None and arm.joints.size > 0 and bool(np.abs(arm.joints).max() > 7.0)


def check_joint_unit(exam: Examination) -> None:
    """Report joint angles that are larger than any joint reaches in radians: they are in degrees."""
    for arm in exam.arms:
        found = [demo.name for demo in exam.with_arm(arm) if are_degrees(demo.arms[arm])]
        if found:
            exam.add(
                "joint_unit",
                "error",
                "joint angles reach more than 7 rad: degrees are likely",
                "Convert the joints to radians (multiply by pi / 180)",
                cause="joints in degrees",
                demos=found,
                arm=arm,
            )


def reached_frames_on_path(demo: Demo, arm: str) -> np.ndarray:
    """Return the frames [M] of an arm whose reached pose is no outlier, see `check_outlier_poses`."""
    reached = demo.arms[arm]
    outliers = _outlier_frames(reached, reached_outliers(reached, demo.timestamps, demo.fps))
    return np.setdiff1d(np.arange(len(demo)), outliers)


def check_outlier_poses(exam: Examination) -> None:
    """Report single frames, and two in succession, whose pose is off the path of their neighbours, in either track."""
    for arm in exam.arms:
        for track in ("reached", "commanded"):
            outliers: dict[str, list[int]] = {}
            for demo in exam.with_arm(arm):
                reached, commanded = demo.arms[arm], demo.arms[arm].commanded
                if track == "reached":
                    frames = _outlier_frames(reached, reached_outliers(reached, demo.timestamps, demo.fps))
                elif commanded is not None:
                    frames = _outlier_frames(commanded, pose_outliers(commanded))
                else:
                    continue
                if frames:
                    outliers[demo.name] = frames
            if outliers:
                name, first_frames = next(iter(outliers.items()))
                exam.add(
                    "outlier_pose",
                    "error",
                    f"{track} poses leave the path of their neighbours: {name} at frame "
                    f"{', '.join(map(str, first_frames[:5]))}",
                    "Replace them by the mean of the sound frames before and after, or cut the demo there",
                    cause=f"outlier {track} pose",
                    demos=outliers,
                    arm=arm,
                    frames=first_frames,
                )


def _outlier_frames(poses: ArmTrajectory, known: np.ndarray) -> list[int]:
    """Return the `known` outliers [M], and frames whose position or rotation is far from both neighbours, which agree
    with each other."""
    outliers = set(known.tolist())
    path = poses.position
    if len(path) < 5:
        return sorted(outliers)
    offset = np.linalg.norm(path[1:-1] - (path[:-2] + path[2:]) / 2, axis=1)
    spread = np.linalg.norm(path[2:] - path[:-2], axis=1)
    usual = max(float(np.quantile(offset, 0.9)), 1e-3)
    outliers |= set((np.flatnonzero((offset > 0.02) & (offset > 4 * usual) & (offset > 1.5 * spread)) + 1).tolist())
    outliers |= set(off_path(torch.tensor(poses.quaternion, dtype=torch.float64)).nonzero()[:, 0].tolist())
    return sorted(outliers)


def check_instructions(exam: Examination) -> None:
    """Report demos without an instruction."""
    empty = [demo.name for demo in exam.demos if demo.instruction.strip().lower() in NO_INSTRUCTION]
    if empty:
        exam.add(
            "empty_instruction",
            "warning" if len(empty) == len(exam.demos) else "error",
            f"{len(empty)} of {len(exam.demos)} demos have no instruction",
            "Write what the demo shows into its metadata; a policy that reads language learns nothing from these",
            cause="empty instruction",
            demos=empty,
        )
