"""Samples of robot demonstrations: an observation at one frame and the targets that follow it.

Legend of shapes: N frames of a demo, A arms, T future steps, V views, S image size, M chosen frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keygrip.data.bad_samples import BadSample
from keygrip.data.batches import CLOSED, MultiViewPolicyBatch, PolicyBatch, PolicyTargets
from keygrip.data.robot.augmentation import Augmentation, ImageGeometry, View, channels_first
from keygrip.data.robot.frame_cache import FrameCache
from keygrip.data.robot.schema import ArmTrajectory, Demo, DemoError, demo_guard
from keygrip.data.shards.sampling import SampleKey, sample_generator
from keygrip.data.shards.substitution import SubstitutingSamples

TARGETS = ("commanded", "reached")
SUBSTITUTES = 8  # frames on each side that may replace an unreadable frame
IDLE_SPEED_MPS = 0.005  # slower counts as standing still: five times the tracking noise of a good arm at 10 Hz
IDLE_TURN_RPS = 0.05  # and turns slower than 3 degrees per second
IDLE_GRIPPER_PER_S = 0.05  # and a gripper that would need 20 s to close


def targets_of(
    arm: ArmTrajectory, frame: int | np.ndarray, steps: np.ndarray, targets: str, gripper_targets: str | None = None
) -> tuple[np.ndarray, ...]:
    """Target poses `steps` frames after `frame`: position [..., T, 3], quaternion [..., T, 4], gripper [..., T],
    is_pad [..., T].

    "reached": the pose measured at the future frame. "commanded": the pose commanded for the future frame, which is the
    command given one frame earlier. After the end of the demo the last pose is repeated.

    Args:
        gripper_targets: "reached" or "commanded" for the gripper's opening only; None: as `targets`.
    """
    future = np.asarray(frame)[..., None] + steps
    poses, rows = _target_rows(arm, future, targets)
    openings, opening_rows = _target_rows(arm, future, gripper_targets or targets)
    return poses.position[rows], poses.quaternion[rows], openings.gripper[opening_rows], future > len(arm) - 1


def _target_rows(arm: ArmTrajectory, future: np.ndarray, targets: str) -> tuple[ArmTrajectory, np.ndarray]:
    """Return a trajectory and its rows, int [...], that hold the targets for the frames `future`."""
    if targets == "commanded":
        assert arm.commanded is not None
        return arm.commanded, np.minimum(future - 1, len(arm) - 1)
    return arm, np.minimum(future, len(arm) - 1)


def keyframe_of(
    arm: ArmTrajectory, frame: int | np.ndarray, targets: str, gripper_targets: str | None = None
) -> np.ndarray:
    """Number of the next keyframe after `frame`, int [...]: the first later frame at which the target gripper has
    closed or opened, else the demo's last frame (which is its own keyframe)."""
    _, _, gripper, _ = targets_of(arm, 1, np.arange(len(arm) - 1), targets, gripper_targets)  # from frame 1 on
    shut = gripper < CLOSED
    events = np.append(np.flatnonzero(shut[1:] != shut[:-1]) + 2, len(arm) - 1)
    return events[np.minimum(np.searchsorted(events, frame, side="right"), len(events) - 1)]


def moving_frames(demo: Demo, arms: Sequence[str], idle_s: float) -> np.ndarray:
    """bool [N]: frames outside of pauses longer than `idle_s`. The first `idle_s` seconds of a pause are kept."""
    stationary = np.ones(len(demo) - 1, dtype=bool)
    seconds = np.diff(demo.timestamps) / 1e9
    for name in arms:
        arm = demo.arms[name]
        speed = np.linalg.norm(np.diff(arm.position, axis=0), axis=-1) / seconds
        dot = np.abs((arm.quaternion[1:] * arm.quaternion[:-1]).sum(-1)).clip(max=1)
        turn = 2 * np.arccos(dot) / seconds
        gripper = np.abs(np.diff(arm.gripper)) / seconds
        stationary &= (speed < IDLE_SPEED_MPS) & (turn < IDLE_TURN_RPS) & (gripper < IDLE_GRIPPER_PER_S)
    kept_mask = np.ones(len(demo), dtype=bool)
    pause = 0.0
    for frame, idle in enumerate(stationary, start=1):
        pause = pause + float(seconds[frame - 1]) if idle else 0.0
        kept_mask[frame] = pause <= idle_s
    return kept_mask


def kept_frames(demo: Demo, arms: Sequence[str], drop_idle_s: float | None) -> np.ndarray:
    """Numbers of the frames that are samples: all, or those outside of pauses (see `moving_frames`)."""
    return np.arange(len(demo)) if drop_idle_s is None else np.flatnonzero(moving_frames(demo, arms, drop_idle_s))


def weighted_frames(
    frames: np.ndarray, intervention: np.ndarray | None, weight: float, corrected_before: int = 0
) -> np.ndarray:
    """Return frame numbers [M] in which each corrected frame occurs `weight` times in a row; fractions are spread
    evenly over the corrected frames of all demos.

    Args:
        frames: ascending numbers of the frames that are samples. intervention: bool [N], which of the demo's frames a
            person corrected; None: no frame. corrected_before: number of corrected frames in earlier demos. If the
            count began at 0 in each demo, each would lose a fraction of a frame, short corrections all their weight.
    """
    if intervention is None or weight == 1.0:
        return frames
    corrected = intervention[frames]
    ends = np.floor(weight * (corrected_before + np.arange(corrected.sum() + 1)) + 1e-9).astype(np.int64)
    counts = np.ones(len(frames), dtype=np.int64)
    counts[corrected] = np.diff(ends)
    return np.repeat(frames, counts)


def poses_of(
    demo: Demo,
    arms: Sequence[str],
    frame: int | np.ndarray,
    steps: np.ndarray,
    targets: str,
    extra: Sequence[str] = (),
    gripper_targets: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of `PolicyTargets` that are read from the arms, at one frame, or at M frames with a first
    dimension of M.

    Args:
        targets, gripper_targets: see `targets_of`.
        extra: "joints" and "controller", if the model reads them in addition to poses.
    """
    axis = np.asarray(frame).ndim
    trajectories, chosen = [demo.arms[name] for name in arms], (targets, gripper_targets)
    ahead = zip(*(targets_of(arm, frame, steps, *chosen) for arm in trajectories), strict=True)
    position, quaternion, gripper, is_pad = (np.stack(part, axis) for part in ahead)
    zero_step = np.zeros(1, dtype=np.int64)
    keyframes = [targets_of(arm, keyframe_of(arm, frame, *chosen), zero_step, targets)[0] for arm in trajectories]
    further = {}
    if extra:
        future = np.asarray(frame)[..., None] + steps
        last = len(demo) - 1
    if "joints" in extra:
        joints = [arm.joints for arm in trajectories if arm.joints is not None]
        further["start_joints"] = _float_tensor(np.stack([values[frame] for values in joints], axis))
        further["joints"] = _float_tensor(np.stack([values[np.minimum(future, last)] for values in joints], axis))
    if "controller" in extra:
        controls = [arm.controller for arm in trajectories if arm.controller is not None]
        further["controller"] = _float_tensor(
            np.stack([values[np.minimum(future - 1, last)] for values in controls], axis)
        )
    return further | {
        "start_position": _float_tensor(np.stack([arm.position[frame] for arm in trajectories], axis)),
        "start_quaternion": _float_tensor(np.stack([arm.quaternion[frame] for arm in trajectories], axis)),
        "start_gripper": _float_tensor(np.stack([arm.gripper[frame] for arm in trajectories], axis)),
        "position": _float_tensor(position),
        "quaternion": _float_tensor(quaternion),
        "gripper": _float_tensor(gripper),
        "action_is_pad": torch.from_numpy(is_pad),
        "keyframe": _float_tensor(np.stack([position[..., 0, :] for position in keyframes], axis)),
    }


@dataclass(frozen=True)
class SampleOptions:
    """What is read from a demonstration for each sample.

    Args:
        camera: the first camera. arms: names of the arms, in the order of the batch.
        targets, gripper_targets: see `targets_of`.
        horizon: T. strides: frames from one target to the next, for each demo in the data module's list.
        geometry: the nominal crop.
        augmentation: None at validation.
        seed: seed of the augmentation.
        drop_idle_s: see `moving_frames`; None keeps all.
        intervention_weight: how many times an epoch contains each frame in which a person corrected a policy.
        detail_size: side in pixels of a second crop of the first camera's image, the same part at a higher resolution;
            None: none.
        extra: "joints" and "controller", if the model reads them in addition to poses.
        embodiments: robots for which the model has statistics of their own.
        view_dropout: probability that a camera other than the first is masked in a sample.
        masks_views: the model masks views: if a frame of a camera other than the first cannot be read, the camera is
            masked in the sample. Otherwise the sample is replaced.
    """

    camera: str
    arms: tuple[str, ...]
    targets: str
    horizon: int
    strides: tuple[int, ...]
    geometry: ImageGeometry
    augmentation: Augmentation | None
    seed: int
    drop_idle_s: float | None
    intervention_weight: float = 1.0
    detail_size: int | None = None
    extra: tuple[str, ...] = ()
    embodiments: tuple[str, ...] = ()
    view_dropout: float = 0.0
    gripper_targets: str | None = None
    masks_views: bool = False

    def steps(self, demo: int) -> np.ndarray:
        """Return [T], how many frames each target lies ahead. `demo` is the index in the data module's list."""
        return np.arange(1, self.horizon + 1) * self.strides[demo]

    def poses(self, demo: Demo, number: int, frame: int | np.ndarray) -> dict[str, torch.Tensor]:
        """Return `poses_of` for a demo. `number` is its index in the data module's list."""
        return poses_of(demo, self.arms, frame, self.steps(number), self.targets, self.extra, self.gripper_targets)


class DemoSamples(SubstitutingSamples[PolicyTargets]):
    """One sample for each frame (or moving frame) of some demos. Indexed by `SampleKey`; samples are unbatched
    `PolicyBatch`es.

    A sample whose frame cannot be read is replaced by the sample of the nearest frame in its demo, with the targets of
    that frame.

    Args:
        demos: the demos to sample from.
        demo_indices: index of each demo in the data module's list.
        frames: decoded frames of all demos of that list, by camera.
        options: what is read from each demo.
    """

    def __init__(
        self,
        demos: Sequence[Demo],
        demo_indices: Sequence[int],
        frames: Mapping[str, FrameCache],
        options: SampleOptions,
    ) -> None:
        self.demos, self.demo_indices, self.frames = list(demos), list(demo_indices), frames
        self.options = options
        frame_indices = [kept_frames(demo, options.arms, options.drop_idle_s) for demo in demos]
        kept_count = sum(map(len, frame_indices))
        corrected = [
            0 if demo.intervention is None else int(demo.intervention[indices].sum())
            for indices, demo in zip(frame_indices, demos, strict=True)
        ]
        frame_indices = [
            weighted_frames(indices, demo.intervention, options.intervention_weight, before)
            for indices, demo, before in zip(frame_indices, demos, np.cumsum([0, *corrected])[:-1], strict=True)
        ]
        self.sample_demo = np.repeat(np.arange(len(frame_indices)), [len(indices) for indices in frame_indices])
        self.sample_frame = np.concatenate(frame_indices) if frame_indices else np.zeros(0, dtype=np.int64)
        self.dropped = sum(len(demo) for demo in demos) - kept_count

    def __len__(self) -> int:
        return len(self.sample_frame)

    def groups(self, by: str) -> np.ndarray:
        """int64 [samples]: the group of each sample, by its demo's "instruction" or "task" (``by``)."""
        _, numbers = np.unique([str(getattr(demo, by)) for demo in self.demos], return_inverse=True)
        return numbers[self.sample_demo]

    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield the sample, then samples of other frames of the same demo, nearest first."""
        yield key
        same_demo = np.flatnonzero(self.sample_demo == self.sample_demo[key.sample])
        # a corrected frame may be several samples, see `weighted_frames`
        frames, first = np.unique(self.sample_frame[same_demo], return_index=True)
        position = int(np.searchsorted(frames, self.sample_frame[key.sample]))
        for distance in range(1, SUBSTITUTES + 1):
            for near in (position - distance, position + distance):
                if 0 <= near < len(frames):
                    yield SampleKey(int(same_demo[first[near]]), key.epoch)

    def __getitem__(self, key: SampleKey | int) -> PolicyTargets:
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key), 0)
        number, frame = int(self.sample_demo[key.sample]), int(self.sample_frame[key.sample])
        read = self.options
        index = self.demo_indices[number]
        common = read.poses(self.demos[number], index, frame) | {
            "demo_index": torch.tensor(index),
            "frame_index": torch.tensor(frame),
            "instruction": self.demos[number].instruction,  # one sentence; `collate` makes the list
        }
        if read.embodiments:
            common["embodiment"] = torch.tensor(read.embodiments.index(self.demos[number].robot))
        return self._with_images(number, frame, key, common)

    def _image(self, number: int, camera: str, frame: int) -> np.ndarray:
        with demo_guard(self.demos[number].name, f"frame {frame} of camera {camera!r} cannot be read: "):
            return self.frames[camera].read(self.demo_indices[number], frame)

    def _with_images(self, number: int, frame: int, key: SampleKey, common: dict[str, Any]) -> PolicyTargets:
        """Return the sample: the fields that all batch types share, and the camera's image."""
        options = self.options
        camera, pixels = self.demos[number].cameras[options.camera], self._image(number, options.camera, frame)
        world_to_camera = camera.world_to_camera[frame]
        if options.augmentation is None:
            image, intrinsics = options.geometry.apply(pixels, camera.intrinsics[frame])
            pose = torch.from_numpy(np.asarray(world_to_camera, dtype=np.float32))
            size = options.detail_size
            detail = None if size is None else options.geometry.detail(pixels, size)
        else:
            generator = sample_generator(options.seed, key)
            image, intrinsics, pose, detail = options.augmentation.apply(
                generator, options.geometry, pixels, camera.intrinsics[frame], world_to_camera, options.detail_size
            )
        return PolicyBatch(image=image, intrinsics=intrinsics, world_to_camera=pose, detail=detail, **common)


class MultiViewSamples(DemoSamples):
    """`DemoSamples` of several cameras: samples are unbatched `MultiViewPolicyBatch`es.

    Each view is cropped and recoloured independently, because each camera has its own mounting and white balance. The
    depth map is cropped like its image. A camera other than the first is black and masked if the demo lacks it and, if
    the model masks views, also if its frame cannot be read. The loader counts the unreadable frames.

    Args (in addition to those of `DemoSamples`):
        cameras: their names, in the order of the views; the first is `options.camera`.
        depth: whether the samples hold depth.
    """

    def __init__(
        self,
        demos: Sequence[Demo],
        demo_indices: Sequence[int],
        frames: Mapping[str, FrameCache],
        options: SampleOptions,
        cameras: Sequence[str],
        depth: bool,
    ) -> None:
        super().__init__(demos, demo_indices, frames, options)
        self.cameras, self.depth = tuple(cameras), depth
        self._masked: list[BadSample] = []  # samples of the current batch with unreadable views

    def __getitems__(
        self, keys: Sequence[SampleKey]
    ) -> list[tuple[PolicyTargets | None, list[BadSample]]] | list[BadSample]:
        """As for all `SubstitutingSamples`. The bad samples returned with the first sample also contain the samples
        with unreadable views."""
        self._masked = []
        samples = super().__getitems__(keys)
        if isinstance(first := samples[0], tuple):
            first[1].extend(self._masked)
        return samples

    def _with_images(self, number: int, frame: int, key: SampleKey, common: dict[str, Any]) -> PolicyTargets:
        options = self.options
        generator = sample_generator(options.seed, key)
        present = self._shown_views(number, generator)
        views = []
        unread: list[str] = []
        for index, name in enumerate(self.cameras):
            view = self._read_view(number, name, frame, generator, unread) if present[index] else None
            present[index] = view is not None
            views.append(view or options.geometry.absent_view(self.depth))
        if unread:
            self._masked.append(BadSample("; ".join(unread)))
        depth = [view.depth for view in views if view.depth is not None]
        detail = views[0].detail
        return MultiViewPolicyBatch(
            images=torch.from_numpy(np.stack([view.image.transpose(2, 0, 1) for view in views])),
            detail=None if detail is None else channels_first(detail),
            view_intrinsics=_float_tensor(np.stack([view.intrinsics for view in views])),
            view_world_to_camera=_float_tensor(np.stack([view.world_to_camera for view in views])),
            depth=torch.from_numpy(np.stack(depth)) if depth else None,
            view_mask=torch.tensor(present),
            cameras=self.cameras,
            mean=options.geometry.mean,
            std=options.geometry.std,
            **common,
        )

    def _shown_views(self, number: int, generator: np.random.Generator) -> list[bool]:
        """Return which views a sample shows: of the demo's cameras, the first and those that are not dropped."""
        present = [name in self.demos[number].cameras for name in self.cameras]
        if self.options.view_dropout:  # no random number is used otherwise, as in a run without this option
            keep_mask = generator.random(len(present) - 1) >= self.options.view_dropout
            present[1:] = [has and bool(keeps) for has, keeps in zip(present[1:], keep_mask, strict=True)]
        return present

    def _read_view(
        self, number: int, name: str, frame: int, generator: np.random.Generator, unread: list[str]
    ) -> View | None:
        """Return one camera's view, or None if it cannot be read and may be masked; `unread` then gets the reason."""
        try:
            return self._view(number, name, frame, generator)
        except DemoError as error:
            if name == self.options.camera or not self.options.masks_views:
                raise
            unread.append(f"{error}; this view is masked")
            return None

    def _view(self, number: int, name: str, frame: int, generator: np.random.Generator) -> View:
        """Return one camera's view, augmented if the samples are augmented."""
        options = self.options
        camera, pixels = self.demos[number].cameras[name], self._image(number, name, frame)
        detail_size = options.detail_size if name == options.camera else None
        depth = self._depth(number, name, frame)
        inputs = (pixels, camera.intrinsics[frame], camera.world_to_camera[frame], depth, detail_size)
        if options.augmentation is None:
            return options.geometry.view(*inputs)
        return options.augmentation.view(generator, options.geometry, *inputs)

    def _depth(self, number: int, camera: str, frame: int) -> np.ndarray | None:
        """Return H x W uint16 millimetres, all 0 (unknown) if depth was not recorded; None if depth is not used."""
        track = self.demos[number].cameras[camera]
        if not self.depth:
            return None
        if track.depth is None:
            return np.zeros((track.height, track.width), dtype=np.uint16)
        with demo_guard(self.demos[number].name, f"depth {frame} of camera {camera!r} cannot be read: "):
            return track.depth.read(frame)


def collate(samples: list[PolicyTargets]) -> PolicyTargets:
    """Stack samples into a batch."""
    return type(samples[0]).collate(samples)


def _float_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
