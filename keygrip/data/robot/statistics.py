"""What a model must know of its training demonstrations.

Legend of shapes: M frames of the training split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from keygrip.data.batches import PolicyTargets
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.frame_rates import step_seconds
from keygrip.data.robot.samples import SampleOptions, kept_frames, poses_of
from keygrip.data.robot.schema import Demo

CHUNKS_AT_MOST = 20_000  # action chunks for the statistics: means and quantiles to half a percent, 10 MB


@dataclass(frozen=True)
class DemoStatistics:
    """What a model must know of its training data; from the training split only.

    Args:
        height_range: lowest and highest world z, metres, of the targets that are trained on *and* of the reached poses,
            over all arms.
        position_range: the same for x, y, z: two rows of three, metres.
        quaternions: by arm, [M, 4] w x y z, the targets' rotations: what a rotation basis is fitted on.
        arms: names, in the order of a batch's arm dimension.
        targets: "commanded" or "reached".
        horizon: T, future steps. step_seconds: time from one to the next.
        geometry: how an image of the camera becomes the network's at inference.
        demos, frames: how many.
        fingerprint: hash of the poses behind the numbers above: a stored basis that carries another was fitted on
            other data.
        cache_dir: folder for what is derived from this data set.
        cameras: the views of a `MultiViewPolicyBatch`, in order, or the one camera.
        calibrated: those of them that are calibrated in all demos, of both splits.
        chunks: start poses and targets of training frames (all, or an even choice of 20 000), for what is normalised by
            the actions themselves.
        instructions: the different sentences of the training split, sorted.
    """

    height_range: tuple[float, float]
    position_range: tuple[tuple[float, float, float], tuple[float, float, float]]
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
    calibrated: tuple[str, ...] = ()


def compute_statistics(
    demos: Sequence[Demo],
    train_indices: Sequence[int],
    options: SampleOptions,
    cache_dir: Path,
    cameras: Sequence[str],
) -> DemoStatistics:
    """Statistics of the training split.

    Args:
        demos: all demos of the data module. train_indices: those of the training split.
        options: what is read of each training sample.
        cache_dir, cameras: as in `DemoStatistics`.
    """
    train = [demos[index] for index in train_indices]
    quaternions: dict[str, np.ndarray] = {}
    positions: list[np.ndarray] = []
    digest = hashlib.sha256(f"{options.targets}:{options.arms}".encode())
    for arm in options.arms:
        reached = [demo.arms[arm] for demo in train]
        goals = [pose.commanded if options.targets == "commanded" else pose for pose in reached]
        quaternions[arm] = np.concatenate([goal.quaternion for goal in goals if goal is not None])
        positions += [pose.position for pose in (*reached, *goals) if pose is not None]
        digest.update(np.ascontiguousarray(quaternions[arm]).tobytes())
    stacked = np.concatenate(positions)
    digest.update(np.ascontiguousarray(stacked).tobytes())
    low, high = stacked.min(axis=0), stacked.max(axis=0)
    return DemoStatistics(
        height_range=(float(low[2]), float(high[2])),
        position_range=(tuple(low.tolist()), tuple(high.tolist())),
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
        chunks=_chunks(train, train_indices, options),
        instructions=tuple(sorted({demo.instruction for demo in train})),
        calibrated=tuple(name for name in cameras if all(_is_calibrated(demo, name) for demo in demos)),
    )


def _is_calibrated(demo: Demo, camera: str) -> bool:
    return camera in demo.cameras and not demo.cameras[camera].uncalibrated


def _chunks(train: Sequence[Demo], train_indices: Sequence[int], options: SampleOptions) -> PolicyTargets:
    """Targets of training frames, without images: all frames that are samples, or an even choice of them."""
    kept = [kept_frames(demo, options.arms, options.drop_idle_s) for demo in train]
    every = max(1, math.ceil(sum(len(frames) for frames in kept) / CHUNKS_AT_MOST))
    parts: list[dict[str, torch.Tensor]] = []
    instructions: list[str] = []
    skip = 0  # frames to pass over at the beginning of the next demo, so that the choice is even over all of them
    for index, demo, frames in zip(train_indices, train, kept, strict=True):
        chosen = frames[skip::every]
        skip = (skip - len(frames)) % every
        which = {"demo_index": torch.full((len(chosen),), index), "frame_index": torch.from_numpy(chosen)}
        if options.embodiments:
            which["embodiment"] = torch.full((len(chosen),), options.embodiments.index(demo.robot))
        parts.append(poses_of(demo, options.arms, chosen, options.steps(index), options.targets, options.extra) | which)
        instructions += [demo.instruction] * len(chosen)
    return PolicyTargets(
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, instruction=instructions
    )
