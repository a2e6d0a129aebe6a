"""Statistics of the training demonstrations that a model needs.

Legend of shapes: M frames of the training split.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from keygrip.data.batches import PolicyTargets
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.frame_rates import step_seconds
from keygrip.data.robot.samples import SampleOptions, kept_frames
from keygrip.data.robot.schema import ArmTrajectory, Demo
from keygrip.models.geometry.cameras import camera_centre

CHUNKS_AT_MOST = 20_000  # action chunks per robot for statistics: means and quantiles to half a percent, 10 MB
FRAMES_OF_A_DEMO = 16  # approximate number of frames per demo from which camera positions are read
Range = tuple[tuple[float, float, float], tuple[float, float, float]]  # lowest and highest x, y, z, metres


@dataclass(frozen=True)
class CameraDistance:
    """Distance between two cameras: medians over evenly chosen frames of the training demonstrations.

    Args:
        distance_m: between their centres, metres. angle_deg: between the rays from them to the middle of the workspace.
    """

    distance_m: float
    angle_deg: float


@dataclass(frozen=True)
class DemoStatistics:
    """Statistics of the training data that a model needs; from the training split only.

    Args:
        height_range: lowest and highest world z, metres, of the targets that are trained on *and* of the reached poses,
            over all arms.
        position_range: the same for x, y, z: two rows of three, metres.
        robot_ranges: the same for each robot for which the model has its own statistics, by name.
        apart: for each pair of calibrated cameras, by their names.
        quaternions: by arm, [M, 4] w x y z, the rotations of the targets, on which a rotation basis is fitted; the
            demos one after another, with all their frames in temporal order.
        arms: names, in the order of a batch's arm dimension.
        targets: "commanded" or "reached".
        horizon: T, future steps. step_seconds: time from one to the next.
        geometry: preprocessing of a camera image for the network at inference.
        demos, frames: how many.
        fingerprint: hash of the poses from which these statistics were computed; a stored basis with another
            fingerprint was fitted on other data.
        cache_dir: folder for files derived from this data set.
        cameras: the views of a `MultiViewPolicyBatch`, in order, or the one camera.
        calibrated: those of `cameras` that are calibrated in all demos of both splits.
        chunks: start poses and targets of training frames (all, or 20 000 evenly chosen ones per robot with its own
            statistics), for normalisation based on the actions themselves.
        instructions: the distinct sentences of the training split, sorted. all_instructions: those of both splits.
    """

    height_range: tuple[float, float]
    position_range: Range
    quaternions: dict[str, np.ndarray]
    arms: tuple[str, ...]
    targets: str
    horizon: int
    step_seconds: float
    geometry: ImageGeometry
    demos: int
    frames: int
    fingerprint: str
    cache_dir: Path
    cameras: tuple[str, ...] = ()
    chunks: PolicyTargets | None = None
    instructions: tuple[str, ...] = ()
    all_instructions: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    robot_ranges: Mapping[str, Range] = field(default_factory=dict)
    apart: Mapping[tuple[str, str], CameraDistance] = field(default_factory=dict)


def compute_statistics(
    demos: Sequence[Demo],
    train_indices: Sequence[int],
    options: SampleOptions,
    cache_dir: Path,
    cameras: Sequence[str],
) -> DemoStatistics:
    """Compute the statistics of the training split.

    Args:
        demos: all demos of the data module. train_indices: indices of the training split.
        options: what is read for each training sample.
        cache_dir, cameras: as in `DemoStatistics`.
    """
    train = [demos[index] for index in train_indices]
    quaternions: dict[str, np.ndarray] = {}
    digest = hashlib.sha256(f"{options.targets}:{options.arms}".encode())
    for arm in options.arms:
        quaternions[arm] = np.concatenate([goal.quaternion for goal in _target_trajectories(train, arm, options)])
        digest.update(np.ascontiguousarray(quaternions[arm]).tobytes())
    positions = _reached_and_target_positions(train, options)
    digest.update(np.ascontiguousarray(positions).tobytes())
    low, high = _position_range(positions)
    calibrated = tuple(name for name in cameras if all(_is_calibrated(demo, name) for demo in demos))
    by_robot = {name: [demo for demo in train if demo.robot == name] for name in options.embodiments}
    return DemoStatistics(
        height_range=(low[2], high[2]),
        position_range=(low, high),
        quaternions=quaternions,
        arms=options.arms,
        targets=options.targets,
        horizon=options.horizon,
        step_seconds=step_seconds(train, [options.strides[index] for index in train_indices]),
        geometry=options.geometry,
        demos=len(train),
        frames=sum(len(demo) for demo in train),
        fingerprint=digest.hexdigest()[:16],
        cache_dir=cache_dir,
        cameras=tuple(cameras),
        chunks=_collect_training_targets(train, train_indices, options),
        instructions=tuple(sorted({demo.instruction for demo in train})),
        all_instructions=tuple(sorted({demo.instruction for demo in demos})),
        calibrated=calibrated,
        robot_ranges={
            name: _position_range(_reached_and_target_positions(robot_demos, options))
            for name, robot_demos in by_robot.items()
            if robot_demos
        },
        apart=_camera_separations(train, calibrated, (np.array(low) + np.array(high)) / 2),
    )


def _target_trajectories(demos: Sequence[Demo], arm: str, options: SampleOptions) -> list[ArmTrajectory]:
    goals = [demo.arms[arm].commanded if options.targets == "commanded" else demo.arms[arm] for demo in demos]
    return [goal for goal in goals if goal is not None]


def _reached_and_target_positions(demos: Sequence[Demo], options: SampleOptions) -> np.ndarray:
    """Return all reached positions and all target positions, [P, 3] metres."""
    tracks = [
        track
        for arm in options.arms
        for track in (*(d.arms[arm] for d in demos), *_target_trajectories(demos, arm, options))
    ]
    return np.concatenate([track.position for track in tracks])


def _position_range(positions: np.ndarray) -> Range:
    low, high = positions.min(axis=0).tolist(), positions.max(axis=0).tolist()
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _camera_separations(
    demos: Sequence[Demo], cameras: Sequence[str], workspace_centre: np.ndarray
) -> dict[tuple[str, str], CameraDistance]:
    """Return the distance of each pair of cameras; `workspace_centre` [3]: middle of the workspace, metres."""
    centres: dict[str, np.ndarray] = {}
    for name in cameras:
        poses = [demo.cameras[name].world_to_camera[:: max(1, len(demo) // FRAMES_OF_A_DEMO)] for demo in demos]
        centres[name] = camera_centre(torch.from_numpy(np.concatenate(poses)).double()).numpy()
    separations = {}
    for pair in itertools.combinations(cameras, 2):
        first, second = (centres[name] for name in pair)
        rays = [centre - workspace_centre for centre in (first, second)]
        rays = [ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-9) for ray in rays]
        # from the chord, because the cosine of a small angle loses the angle to rounding
        angles = 2 * np.arcsin(np.clip(np.linalg.norm(rays[0] - rays[1], axis=1) / 2, 0, 1))
        distance = np.median(np.linalg.norm(first - second, axis=1))
        separations[pair] = CameraDistance(float(distance), float(np.degrees(np.median(angles))))
    return separations


def _is_calibrated(demo: Demo, camera: str) -> bool:
    return camera in demo.cameras and not demo.cameras[camera].uncalibrated


def _collect_training_targets(
    train: Sequence[Demo], train_indices: Sequence[int], options: SampleOptions
) -> PolicyTargets:
    """Return targets of training frames, without images: of all frames that are samples, or of evenly chosen ones.
    Frames are chosen separately for each robot with its own statistics, so that a rare robot is not left out."""
    frames_per_demo = [kept_frames(demo, options.arms, options.drop_idle_s) for demo in train]
    robots = [demo.robot if options.embodiments else "" for demo in train]
    frames_of: dict[str, int] = defaultdict(int)
    for robot, frames in zip(robots, frames_per_demo, strict=True):
        frames_of[robot] += len(frames)
    chunks: list[dict[str, torch.Tensor]] = []
    instructions: list[str] = []
    # frames to skip at the beginning of a robot's next demo, so that the choice is even over all its demos
    skip: dict[str, int] = defaultdict(int)
    for index, demo, robot, frames in zip(train_indices, train, robots, frames_per_demo, strict=True):
        every = max(1, math.ceil(frames_of[robot] / CHUNKS_AT_MOST))
        chosen = frames[skip[robot] :: every]
        skip[robot] = (skip[robot] - len(frames)) % every
        indices = {"demo_index": torch.full((len(chosen),), index), "frame_index": torch.from_numpy(chosen)}
        if options.embodiments:
            indices["embodiment"] = torch.full((len(chosen),), options.embodiments.index(demo.robot))
        chunks.append(options.poses(demo, index, chosen) | indices)
        instructions += [demo.instruction] * len(chosen)
    return PolicyTargets(
        **{name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}, instruction=instructions
    )
