"""Robot demonstrations as a data module: found, checked, divided, augmented, batched.

Legend of shapes: N frames of a demo, A arms, T future steps, S image size, M frames of the training split.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from keygrip.data.batches import CLOSED, MultiViewPolicyBatch, PolicyBatch, PolicyTargets
from keygrip.data.robot.augmentation import Augmentation, ImageGeometry, View
from keygrip.data.robot.demos import ArmTrajectory, Demo, DemoError, DemoReference, find_demos
from keygrip.data.robot.frame_cache import FrameCache, FrameShape
from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler, ResumableLoader, SampleKey, sample_generator
from keygrip.models.geometry.cameras import inside_image, project

log = logging.getLogger(__name__)

CACHE_FOLDER = ".keygrip"  # hidden: what is derived from a data folder and may be removed at any time
NAMED_AT_MOST = 20  # demos in one line of the log
CHUNKS_AT_MOST = 20_000  # of the statistics: means and quantiles to half a percent, and 10 MB
TARGETS = ("commanded", "reached")
IDLE_SPEED_MPS = 0.005  # slower than this is standing still: five times the tracking noise of a good arm at 10 Hz
IDLE_TURN_RPS = 0.05  # and turns slower than 3 degrees a second
IDLE_GRIPPER_PER_S = 0.05  # and a gripper that would need 20 s to close


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
        geometry: how a picture of the camera becomes the network's at inference.
        demos, frames: how many.
        fingerprint: hash of the poses behind the numbers above: a stored basis that carries another was fitted on
            other data.
        cache_dir: folder for what is derived from this data set.
        cameras: the views of a `MultiViewPolicyBatch`, in order, or the one camera.
        chunks: start poses and targets of training frames (all, or an even choice of 20 000), for what is normalised by
            the actions themselves.
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


def split_demos(names: Sequence[str], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divides demos into training and validation.

    A demo's side depends on its name and the seed alone, so that demos added later do not move the others. With two
    demos or more and a fraction above 0 each side gets at least one.

    Returns:
        Indices of training and of validation demos, both rising.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    draws = np.array(
        [int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64 for name in names]
    )
    held_out = draws < val_fraction
    if val_fraction > 0 and len(names) >= 2:
        if not held_out.any():
            held_out[draws.argmin()] = True
        if held_out.all():
            held_out[draws.argmax()] = False
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def targets_of(arm: ArmTrajectory, frame: int | np.ndarray, steps: np.ndarray, targets: str) -> tuple[np.ndarray, ...]:
    """Target poses `steps` frames after `frame`: position [..., T, 3], quaternion [..., T, 4], gripper [..., T],
    repeated [..., T].

    "reached" takes the pose measured at the future frame. "commanded" takes what the arm was told to be at that frame,
    which is the command given one frame earlier. Past the end of the demo the last pose is repeated.
    """
    future = np.asarray(frame)[..., None] + steps
    last = len(arm) - 1
    repeated = future > last
    if targets == "commanded":
        assert arm.commanded is not None
        poses, rows = arm.commanded, np.minimum(future - 1, last)
    else:
        poses, rows = arm, np.minimum(future, last)
    return poses.position[rows], poses.quaternion[rows], poses.gripper[rows], repeated


def keyframe_of(arm: ArmTrajectory, frame: int | np.ndarray, targets: str) -> np.ndarray:
    """Number of the next keyframe after `frame`, int [...]: the first frame in which the gripper is to have closed or
    opened, or the last frame of all (also for that one itself)."""
    _, _, gripper, _ = targets_of(arm, 1, np.arange(len(arm) - 1), targets)  # of frames 1 and on
    shut = gripper < CLOSED
    events = np.append(np.flatnonzero(shut[1:] != shut[:-1]) + 2, len(arm) - 1)
    return events[np.minimum(np.searchsorted(events, frame, side="right"), len(events) - 1)]


def moving_frames(demo: Demo, arms: Sequence[str], idle_s: float) -> np.ndarray:
    """bool [N]: frames outside of pauses that last longer than `idle_s`. A pause's first `idle_s` seconds stay in."""
    still = np.ones(len(demo) - 1, dtype=bool)
    seconds = np.diff(demo.timestamps) / 1e9
    for name in arms:
        arm = demo.arms[name]
        speed = np.linalg.norm(np.diff(arm.position, axis=0), axis=-1) / seconds
        dot = np.abs((arm.quaternion[1:] * arm.quaternion[:-1]).sum(-1)).clip(max=1)
        turn = 2 * np.arccos(dot) / seconds
        gripper = np.abs(np.diff(arm.gripper)) / seconds
        still &= (speed < IDLE_SPEED_MPS) & (turn < IDLE_TURN_RPS) & (gripper < IDLE_GRIPPER_PER_S)
    kept = np.ones(len(demo), dtype=bool)
    pause = 0.0
    for frame, idle in enumerate(still, start=1):
        pause = pause + float(seconds[frame - 1]) if idle else 0.0
        kept[frame] = pause <= idle_s
    return kept


@dataclass(frozen=True)
class Recording:
    """The embedded demonstrations: what to record, and where it lies.

    Nothing is imported until demonstrations are missing: neither the simulator nor its graphics library is needed to
    train on a folder.

    Args:
        recorder: dotted name of the function that records; called with `task` built and the other arguments by name.
        task: configuration of the task (with its `_target_`).
        folder: where recordings go; each has a folder of its own below it, named by its task and a hash of all that it
            is made of, so that other options never mix with it.
        demos: how many. seed: of the first episode. image_size: edge of the recorded pictures. hz: frames a second.
        processes: None: one for each core. depth, video: as for `DemoWriter`.
        cameras: names; None: the task's own one.
    """

    recorder: str
    task: Mapping[str, Any]
    folder: str | Path = "data"
    demos: int = 100
    seed: int = 0
    image_size: int = 224
    hz: float = 10.0
    processes: int | None = None
    depth: bool = False
    video: bool = False
    cameras: Sequence[str] | None = None

    @property
    def root(self) -> Path:
        """The recording's folder."""
        options = {**self.task, "seed": self.seed, "image_size": self.image_size, "hz": self.hz}
        options |= {"recorder": self.recorder, "depth": self.depth, "video": self.video}
        if self.cameras is not None:  # recordings of the task's own camera keep the name that they had before
            options["cameras"] = list(self.cameras)
        # 10 and 10.0 are the same setting
        plain = {key: value + 0.0 if type(value) is int else value for key, value in options.items()}
        content = json.dumps(plain, sort_keys=True)
        return Path(self.folder) / f"{self.task['name']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def held(self) -> int:
        """Complete demos that are there."""
        return sum(1 for _ in self.root.glob("[!.]*/metadata.json"))

    def complete(self) -> None:
        """Records what is missing; says so."""
        held = self.held()
        if held >= self.demos:
            return
        log.info("%s holds %d of %d demonstrations: recording the others in the simulator", self.root, held, self.demos)
        from hydra.utils import get_method, instantiate

        get_method(self.recorder)(
            task=instantiate(dict(self.task)),
            root=self.root,
            demos=self.demos,
            seed=self.seed,
            image_size=self.image_size,
            hz=self.hz,
            processes=self.processes or os.cpu_count() or 1,
            depth=self.depth,
            video=self.video,
            cameras=None if self.cameras is None else tuple(self.cameras),
        )


def kept_frames(demo: Demo, arms: Sequence[str], drop_idle_s: float | None) -> np.ndarray:
    """Numbers of the frames that are samples: all, or those outside of pauses (see `moving_frames`)."""
    return np.arange(len(demo)) if drop_idle_s is None else np.flatnonzero(moving_frames(demo, arms, drop_idle_s))


def poses_of(
    demo: Demo, arms: Sequence[str], frame: int | np.ndarray, steps: np.ndarray, targets: str
) -> dict[str, torch.Tensor]:
    """The tensors of `PolicyTargets` that are read from the arms, at one frame, or at M: then with a first dimension of
    M."""
    axis = np.asarray(frame).ndim
    trajectories = [demo.arms[name] for name in arms]
    ahead = zip(*(targets_of(arm, frame, steps, targets) for arm in trajectories), strict=True)
    position, quaternion, gripper, repeated = (np.stack(part, axis) for part in ahead)
    here = np.zeros(1, dtype=np.int64)
    keyframes = [targets_of(arm, keyframe_of(arm, frame, targets), here, targets)[0] for arm in trajectories]
    return {
        "start_position": _float(np.stack([arm.position[frame] for arm in trajectories], axis)),
        "start_quaternion": _float(np.stack([arm.quaternion[frame] for arm in trajectories], axis)),
        "start_gripper": _float(np.stack([arm.gripper[frame] for arm in trajectories], axis)),
        "position": _float(position),
        "quaternion": _float(quaternion),
        "gripper": _float(gripper),
        "repeated": torch.from_numpy(repeated),
        "keyframe": _float(np.stack([position[..., 0, :] for position in keyframes], axis)),
    }


class DemoSamples(Dataset[PolicyTargets]):
    """One sample for each frame (or moving frame) of some demos. Indexed by `SampleKey`; samples are unbatched
    `PolicyBatch`es.

    Args:
        demos, camera, arms, targets: what is read.
        demo_indices: number of each demo in the data module's list.
        frames: decoded frames of all demos of that list, by camera.
        steps: [T] frames ahead of each target.
        geometry: the nominal crop.
        augmentation: None at validation.
        seed: of the augmentation.
        drop_idle_s: see `moving_frames`; None keeps all.
    """

    def __init__(
        self,
        demos: Sequence[Demo],
        demo_indices: Sequence[int],
        frames: Mapping[str, FrameCache],
        camera: str,
        arms: Sequence[str],
        targets: str,
        steps: np.ndarray,
        geometry: ImageGeometry,
        augmentation: Augmentation | None,
        seed: int,
        drop_idle_s: float | None,
    ) -> None:
        self.demos, self.demo_indices, self.frames = list(demos), list(demo_indices), frames
        self.camera, self.arms, self.targets, self.steps = camera, tuple(arms), targets, steps
        self.geometry, self.augmentation, self.seed = geometry, augmentation, seed
        kept = [kept_frames(demo, arms, drop_idle_s) for demo in demos]
        self.sample_demo = np.repeat(np.arange(len(kept)), [len(part) for part in kept])
        self.sample_frame = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)
        self.dropped = sum(len(demo) for demo in demos) - len(self.sample_frame)

    def __len__(self) -> int:
        return len(self.sample_frame)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[PolicyTargets] | list[DemoError]:
        """A batch's samples, or what is wrong with a demo: an exception would leave a worker as a page of traceback."""
        try:
            return [self[key] for key in keys]
        except DemoError as error:
            return [error]

    def __getitem__(self, key: SampleKey | int) -> PolicyTargets:
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key), 0)
        number, frame = int(self.sample_demo[key.sample]), int(self.sample_frame[key.sample])
        common = poses_of(self.demos[number], self.arms, frame, self.steps, self.targets) | {
            "demo_index": torch.tensor(self.demo_indices[number]),
            "frame_index": torch.tensor(frame),
            "instruction": self.demos[number].instruction,  # one sentence; `collate` makes the list
        }
        return self._seen(number, frame, key, common)

    def _picture(self, number: int, camera: str, frame: int) -> np.ndarray:
        try:
            return self.frames[camera].read(self.demo_indices[number], frame)
        except (OSError, ValueError, IndexError) as error:
            name = self.demos[number].name
            raise DemoError(name, f"frame {frame} of camera {camera!r} cannot be read: {error}") from error

    def _seen(self, number: int, frame: int, key: SampleKey, common: dict[str, Any]) -> PolicyTargets:
        """The sample: what is common to all batches, and the camera's picture."""
        camera, picture = self.demos[number].cameras[self.camera], self._picture(number, self.camera, frame)
        world_to_camera = camera.world_to_camera[frame]
        if self.augmentation is None:
            image, intrinsics = self.geometry.apply(picture, camera.intrinsics[frame])
            pose = torch.from_numpy(np.asarray(world_to_camera, dtype=np.float32))
        else:
            generator = sample_generator(self.seed, key)
            image, intrinsics, pose = self.augmentation.apply(
                generator, self.geometry, picture, camera.intrinsics[frame], world_to_camera
            )
        return PolicyBatch(image=image, intrinsics=intrinsics, world_to_camera=pose, **common)


class MultiViewSamples(DemoSamples):
    """`DemoSamples` of several cameras: samples are unbatched `MultiViewPolicyBatch`es.

    Each view is cropped and coloured by itself, as cameras are mounted and balanced one by one; depth follows its
    picture.

    Args (beside those of `DemoSamples`):
        cameras: their names, in the order of the views; the first is `camera`.
        depth: whether the samples hold depth.
    """

    def __init__(self, *common: Any, cameras: Sequence[str], depth: bool) -> None:
        super().__init__(*common)
        self.cameras, self.depth = tuple(cameras), depth

    def _seen(self, number: int, frame: int, key: SampleKey, common: dict[str, Any]) -> PolicyTargets:
        generator = sample_generator(self.seed, key)
        views: list[View] = []
        for name in self.cameras:
            camera, picture = self.demos[number].cameras[name], self._picture(number, name, frame)
            seen = (picture, camera.intrinsics[frame], camera.world_to_camera[frame], self._depth(number, name, frame))
            if self.augmentation is None:
                views.append(self.geometry.view(*seen))
            else:
                views.append(self.augmentation.view(generator, self.geometry, *seen))
        depth = [view.depth for view in views if view.depth is not None]
        return MultiViewPolicyBatch(
            images=torch.from_numpy(np.stack([view.picture.transpose(2, 0, 1) for view in views])),
            view_intrinsics=_float(np.stack([view.intrinsics for view in views])),
            view_world_to_camera=_float(np.stack([view.world_to_camera for view in views])),
            depth=torch.from_numpy(np.stack(depth)) if depth else None,
            cameras=self.cameras,
            mean=self.geometry.mean,
            std=self.geometry.std,
            **common,
        )

    def _depth(self, number: int, camera: str, frame: int) -> np.ndarray | None:
        """H x W uint16 millimetres, where depth is wanted."""
        source = self.demos[number].cameras[camera].depth
        if not self.depth or source is None:
            return None
        try:
            return source.read(frame)
        except (OSError, ValueError, IndexError) as error:
            name = self.demos[number].name
            raise DemoError(name, f"depth {frame} of camera {camera!r} cannot be read: {error}") from error


def collate(samples: list[PolicyTargets] | list[DemoError]) -> PolicyTargets | DemoError:
    """Stacks samples; hands on an error, which `ResumableLoader` raises in the main process."""
    first = samples[0]
    return first if isinstance(first, DemoError) else type(first).collate(samples)  # type: ignore[arg-type]


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


class RobotDemos(ResumableData):
    """Demonstrations of one robot and task, from folders of any known format.

    Args:
        root: the data folder, or None: the folder of `record`, which is recorded first where demos are missing.
        record: how the embedded demonstrations are made; unused where `root` is given.
        format: "auto", "native", or a foreign format's name.
        calibration: calibration file for foreign formats that need one.
        camera: which camera the policy sees. arms: which arms it moves, in the order of the batch's arm dimension.
        cameras: several cameras, `camera` first: batches are then `MultiViewPolicyBatch`es with these views. None: one
            camera, `PolicyBatch`es. depth: whether those views come with depth.
        image_size, mean, std: the backbone's.
        field, fit: see `ImageGeometry`.
        augmentation: random views of training pictures; None: the nominal crop always.
        horizon: T, future steps. frame_stride: frames from one to the next.
        targets: "commanded" (what the arm was told) or "reached" (where it was).
        drop_idle_s: leave out training frames of pauses beyond this many seconds; None keeps all.
        batch_size: global, divided over the ranks.
        val_fraction: share of demos held out. split_seed: which ones.
        seed: order and augmentation.
        max_demos: use the first so many (by name); None: all.
        max_broken_share: more broken demos than this stop the run.
        max_off_screen_share: demos with more steps than this outside the nominal picture are named.
        cache_gb: size limit of decoded frames on disk; 0: decode every time. cache_dir: where; None: beside the data.
        num_workers: loader processes; None: one for each core but one, 4 at most. 0: load in the main process.
        prefetch_batches: batches that each worker keeps ready.
    """

    @staticmethod
    def batch_type(options: Mapping[str, Any]) -> type[PolicyTargets]:
        """What batches the settings ``options`` give."""
        return PolicyBatch if options.get("cameras") is None else MultiViewPolicyBatch

    def __init__(
        self,
        root: str | Path | None,
        camera: str,
        arms: Sequence[str],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        horizon: int,
        frame_stride: int,
        batch_size: int,
        record: Recording | None = None,
        format: str = "auto",
        calibration: str | Path | None = None,
        field: float = 1.0,
        fit: str = "crop",
        augmentation: Augmentation | None = None,
        targets: str = "reached",
        drop_idle_s: float | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        max_demos: int | None = None,
        max_broken_share: float = 0.1,
        max_off_screen_share: float = 0.25,
        cache_gb: float = 8.0,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        prefetch_batches: int = 4,
        cameras: Sequence[str] | None = None,
        depth: bool = False,
    ) -> None:
        super().__init__()
        if root is None and record is None:
            raise ValueError("no data: name a folder with data.root=PATH (or leave data.record as it is)")
        if targets not in TARGETS:
            raise ValueError(f"data.targets must be one of {', '.join(TARGETS)}, not {targets!r}")
        if horizon < 1 or frame_stride < 1:
            raise ValueError(f"horizon and frame_stride must be at least 1, not {horizon} and {frame_stride}")
        if not arms or len(set(arms)) != len(arms):
            raise ValueError(f"arms must name each arm once, not {list(arms)}")
        if cameras is not None and (not cameras or len(set(cameras)) != len(cameras) or cameras[0] != camera):
            raise ValueError(
                f"data.cameras must name each camera once, data.camera={camera} first; it is {list(cameras)}"
            )
        if depth and cameras is None:
            raise ValueError("data.depth=true needs data.cameras: only batches of several views hold depth")
        if max_demos is not None and max_demos < 1:
            raise ValueError(f"max_demos must be at least 1, not {max_demos}")
        self.root = Path(root) if root is not None else record.root  # type: ignore[union-attr]
        self.record = record if root is None else None
        self.format, self.calibration = format, calibration
        self.camera, self.arms = camera, tuple(arms)
        self.several, self.cameras = cameras is not None, tuple(cameras or (camera,))
        self.depth = depth
        self.geometry = ImageGeometry(image_size, tuple(mean), tuple(std), field, fit)  # type: ignore[arg-type]
        self.augmentation = augmentation
        self.horizon, self.frame_stride = horizon, frame_stride
        self.targets, self.drop_idle_s = targets, drop_idle_s
        self.batch_size, self.val_fraction, self.split_seed, self.seed = batch_size, val_fraction, split_seed, seed
        # a recording may hold more demos than this run asks for (an earlier one asked for more): its own are the first
        self.max_demos = self.record.demos if max_demos is None and self.record is not None else max_demos
        self.max_broken_share, self.max_off_screen_share = max_broken_share, max_off_screen_share
        self.cache_gb = cache_gb
        self.cache_dir = Path(cache_dir) if cache_dir is not None else self.root / CACHE_FOLDER
        self.num_workers = min((os.cpu_count() or 1) - 1, 4) if num_workers is None else num_workers
        self.prefetch_batches = prefetch_batches
        # the folder lies where every node sees it; one process of all records or not at all
        self.prepare_data_per_node = False
        self.demos: list[Demo] = []
        self.broken: list[DemoError] = []
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []
        self._statistics: DemoStatistics | None = None
        self._frames: dict[str, FrameCache] | None = None
        self._train: DemoSamples | None = None
        self._val: DemoSamples | None = None

    # ---------------------------------------------------------------------------------------------------------- reading

    def prepare_data(self) -> None:
        """Records the embedded demonstrations where they are missing and the user named no folder."""
        if self.record is None:
            return
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # a recorder's worker that runs the caller's script again would wait here for the lock of its own parent
            raise RuntimeError(
                "recording starts processes, which import the script that asked for it: put its work under "
                "if __name__ == '__main__'"
            )
        self.root.parent.mkdir(parents=True, exist_ok=True)
        lock = self.root.parent / f".{self.root.name}.lock"
        with lock.open("w") as handle:
            fcntl.flock(
                handle, fcntl.LOCK_EX
            )  # several processes of one run may get here; one records, the others wait
            self.record.complete()

    def setup(self, stage: str | None = None) -> None:
        """Finds, reads, checks and divides the demos; once.

        Raises:
            FileNotFoundError: no data. ValueError: too many demos are broken (they are listed), or they lack what the
                options ask for.
        """
        if self.demos:
            return
        if self.record is not None and not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not there; prepare_data() records it on the first process")
        demos = self._read(find_demos(self.root, self.format, self.calibration))
        if self.cache_dir == self.root / CACHE_FOLDER and not os.access(self.root, os.W_OK):
            digest = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]
            self.cache_dir = Path.home() / ".cache" / "keygrip" / digest
            log.info("%s cannot be written; what is derived from it goes to %s", self.root, self.cache_dir)
        self._common_rate(demos)
        if self.targets == "commanded":
            without = [d.name for d in demos if any(d.arms[arm].commanded is None for arm in self.arms)]
            if without:
                raise ValueError(
                    f"data.targets=commanded, but {len(without)} of {len(demos)} demos hold no commanded poses "
                    f"(first: {without[0]}); "
                    "use data.targets=reached"
                )
        if self.depth:
            flat = [d.name for d in demos if any(d.cameras[camera].depth is None for camera in self.cameras)]
            if flat:
                raise ValueError(
                    f"data.depth=true, but {len(flat)} of {len(demos)} demos hold no depth for all of "
                    f"{', '.join(self.cameras)} (first: {flat[0]}); use data.depth=false"
                )
        self.demos = demos
        self.train_indices, self.val_indices = split_demos([d.name for d in demos], self.val_fraction, self.split_seed)
        log.info(
            "%s: %d demos, %d frames; %d for training, %d for validation",
            self.root,
            len(demos),
            sum(len(demo) for demo in demos),
            len(self.train_indices),
            len(self.val_indices),
        )
        self._report_off_screen()

    def _read(self, references: Sequence[DemoReference]) -> list[Demo]:
        """The readable ones, at most `max_demos`; broken ones are named, counted and left out."""
        demos: list[Demo] = []
        self.broken = []
        looked_at = 0
        for reference in tqdm(references, desc=f"reading {self.root}", unit="demo", delay=2, leave=False):
            if self.max_demos is not None and len(demos) == self.max_demos:
                break
            looked_at += 1
            try:
                demo = reference.read(cameras=self.cameras)
                missing = [camera for camera in self.cameras if camera not in demo.cameras]
                if missing:
                    raise DemoError(demo.name, f"it has no camera {missing[0]!r}; it has {', '.join(demo.cameras)}")
                absent = [arm for arm in self.arms if arm not in demo.arms]
                if absent:
                    raise DemoError(demo.name, f"it has no arm {absent[0]!r}; it has {', '.join(demo.arms)}")
            except DemoError as error:
                self.broken.append(error)
                continue
            demos.append(demo)
        for broken in self.broken:
            log.warning("left out: %s", broken)
        if self.broken:
            share = len(self.broken) / looked_at
            log.warning("%d of %d demos in %s are broken and left out", len(self.broken), looked_at, self.root)
            if share > self.max_broken_share or not demos:
                raise ValueError(
                    f"{len(self.broken)} of {looked_at} demos in {self.root} are broken, more than "
                    f"data.max_broken_share={self.max_broken_share:g} allows: "
                    + "; ".join(f"{error.name}: {error.reason}" for error in self.broken)
                )
        if self.max_demos is not None and len(demos) + len(self.broken) < self.max_demos:
            raise ValueError(f"data.max_demos={self.max_demos}, but {self.root} holds {len(demos)} readable demos")
        return demos

    @property
    def train_demos(self) -> list[Demo]:
        return [self.demos[index] for index in self.train_indices]

    @property
    def val_demos(self) -> list[Demo]:
        return [self.demos[index] for index in self.val_indices]

    @property
    def steps(self) -> np.ndarray:
        """[T] frames ahead of each target."""
        return np.arange(1, self.horizon + 1) * self.frame_stride

    # ------------------------------------------------------------------------------------------------------- statistics

    @property
    def statistics(self) -> DemoStatistics:
        """Of the training split; needs `setup`."""
        if self._statistics is None:
            if not self.train_indices:
                raise ValueError("no statistics before setup('fit') has found training demos")
            self._statistics = self._compute_statistics()
        return self._statistics

    def _compute_statistics(self) -> DemoStatistics:
        demos = self.train_demos
        quaternions: dict[str, np.ndarray] = {}
        positions: list[np.ndarray] = []
        digest = hashlib.sha256(f"{self.targets}:{self.arms}".encode())
        for arm in self.arms:
            reached = [demo.arms[arm] for demo in demos]
            goals = [pose.commanded if self.targets == "commanded" else pose for pose in reached]
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
            arms=self.arms,
            targets=self.targets,
            horizon=self.horizon,
            step_seconds=self.frame_stride / self._common_rate(demos),
            geometry=self.geometry,
            demos=len(demos),
            frames=sum(len(demo) for demo in demos),
            fingerprint=digest.hexdigest()[:16],
            cache_dir=self.cache_dir,
            cameras=self.cameras,
            chunks=self._chunks(),
        )

    def _chunks(self) -> PolicyTargets:
        """Targets of training frames, without pictures: all frames that are samples, or an even choice of them."""
        kept = [kept_frames(demo, self.arms, self.drop_idle_s) for demo in self.train_demos]
        every = max(1, math.ceil(sum(len(frames) for frames in kept) / CHUNKS_AT_MOST))
        parts: list[dict[str, torch.Tensor]] = []
        instructions: list[str] = []
        skip = 0  # frames to pass over at the beginning of the next demo, so that the choice is even over all of them
        for index, demo, frames in zip(self.train_indices, self.train_demos, kept, strict=True):
            chosen = frames[skip::every]
            skip = (skip - len(frames)) % every
            which = {"demo_index": torch.full((len(chosen),), index), "frame_index": torch.from_numpy(chosen)}
            parts.append(poses_of(demo, self.arms, chosen, self.steps, self.targets) | which)
            instructions += [demo.instruction] * len(chosen)
        return PolicyTargets(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, instruction=instructions
        )

    @staticmethod
    def _common_rate(demos: Sequence[Demo]) -> float:
        """Frames a second of the demos; a step of so many frames must mean the same time in all of them."""
        rates = [demo.fps for demo in demos]
        if max(rates) > 1.05 * min(rates):
            slow, fast = (demos[index].name for index in (int(np.argmin(rates)), int(np.argmax(rates))))
            raise ValueError(
                f"the demos run at different rates ({slow}: {min(rates):g} frames/s, {fast}: {max(rates):g}), so "
                "that a step of data.frame_stride frames means different times: train on one rate, or resample while "
                "importing"
            )
        return float(np.median(rates))

    def off_screen_shares(self) -> dict[str, float]:
        """By demo: the share of target steps that project outside the nominal (unaugmented) picture, over all arms."""
        shares = {}
        for demo in self.demos:
            track = demo.cameras[self.camera]
            box = self.geometry.box(track.width, track.height).to_picture(self.geometry.image_size)
            intrinsics = torch.from_numpy(box @ track.intrinsics)[:, None]
            pose = torch.from_numpy(np.ascontiguousarray(track.world_to_camera))[:, None]
            inside = []
            for arm in self.arms:
                points, _, _, repeated = targets_of(demo.arms[arm], np.arange(len(demo)), self.steps, self.targets)
                pixels, _ = project(torch.from_numpy(points), intrinsics, pose)
                seen = inside_image(pixels, self.geometry.image_size, self.geometry.image_size)
                inside.append(seen.numpy()[~repeated])
            shares[demo.name] = float(1 - np.concatenate(inside).mean())
        return shares

    def _report_off_screen(self) -> None:
        outside = {name: share for name, share in self.off_screen_shares().items() if share > self.max_off_screen_share}
        if not outside:
            return
        worst = sorted(outside, key=lambda name: -outside[name])
        log.warning(
            "%d of %d demos have more than %.0f %% of their steps outside camera %s's picture as the network sees "
            "it, where they are masked "
            "out of the loss (check the calibration with the geometry doctor, or set data.fit=stretch): %s%s",
            len(outside),
            len(self.demos),
            100 * self.max_off_screen_share,
            self.camera,
            ", ".join(f"{name} ({100 * outside[name]:.0f} %)" for name in worst[:NAMED_AT_MOST]),
            f" and {len(worst) - NAMED_AT_MOST} more" if len(worst) > NAMED_AT_MOST else "",
        )

    # ---------------------------------------------------------------------------------------------------------- loading

    @property
    def frames(self) -> dict[str, FrameCache]:
        """Decoded frames of all demos, training and validation, by camera: one size limit for all."""
        if self._frames is None:
            self._frames = {}
            left = int(self.cache_gb * 1e9)
            for camera in self.cameras:
                tracks = [demo.cameras[camera] for demo in self.demos]
                cache = FrameCache(
                    [track.frames for track in tracks],
                    [FrameShape(len(track.frames), track.height, track.width) for track in tracks],
                    self.cache_dir,
                    camera,
                    left,
                )
                self._frames[camera] = cache
                left -= cache.limit_bytes
        return self._frames

    def _samples(self, indices: Sequence[int], augmentation: Augmentation | None, drop_idle: bool) -> DemoSamples:
        common = (
            [self.demos[index] for index in indices],
            indices,
            self.frames,
            self.camera,
            self.arms,
            self.targets,
            self.steps,
            self.geometry,
            augmentation,
            self.seed,
            self.drop_idle_s if drop_idle else None,
        )
        if self.several:
            return MultiViewSamples(*common, cameras=self.cameras, depth=self.depth)
        return DemoSamples(*common)

    @property
    def train_samples(self) -> DemoSamples:
        if self._train is None:
            self._train = self._samples(self.train_indices, self.augmentation, drop_idle=True)
            if self._train.dropped:
                log.info("%d training frames of pauses are left out (data.drop_idle_s)", self._train.dropped)
        return self._train

    @property
    def val_samples(self) -> DemoSamples:
        if self._val is None:
            self._val = self._samples(self.val_indices, None, drop_idle=False)
        return self._val

    def _loader(self, samples: DemoSamples, shuffle: bool) -> DataLoader[Any]:
        sampler = GlobalBatchSampler(len(samples), self.batch_size, *self.ranks, self.seed, shuffle, drop_last=shuffle)
        if shuffle and self.trainer is not None:
            sampler.follow(self.batches_done)
        return ResumableLoader(collate_fn=collate, **self.loader_options(samples, sampler))

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_samples, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation frames in one fixed shuffled order, unaugmented; no loader where no demo is held out."""
        return self._loader(self.val_samples, shuffle=False) if self.val_indices else []
