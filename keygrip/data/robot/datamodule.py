"""Data module of robot demonstrations: finds, checks, splits, augments and batches them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import DataLoader

from keygrip.cores import usable_cores
from keygrip.data.bad_samples import BadSamples
from keygrip.data.batches import MultiViewPolicyBatch, PolicyBatch, PolicyTargets
from keygrip.data.robot.augmentation import Augmentation, ImageGeometry
from keygrip.data.robot.fingerprint import DataHashes, refuse_trained
from keygrip.data.robot.frame_cache import FrameCache, FrameShape
from keygrip.data.robot.frames import NoFrames
from keygrip.data.robot.integrity import data_version
from keygrip.data.robot.reading import ReadingOptions
from keygrip.data.robot.recordings import Recording
from keygrip.data.robot.roots import checked_weights, data_roots, read_roots
from keygrip.data.robot.samples import TARGETS, DemoSamples, MultiViewSamples, SampleOptions, collate
from keygrip.data.robot.schema import Demo, DemoError
from keygrip.data.robot.set_checks import (
    check_robots,
    off_screen_shares,
    refuse_flat,
    refuse_missing,
    refuse_short,
    refuse_unfit,
    report_absent_views,
    report_corrections,
    report_off_screen,
    report_outliers,
    report_uncalibrated,
    report_views,
    report_wide_targets,
)
from keygrip.data.robot.split import SEED, VAL_FRACTION, split_demos
from keygrip.data.robot.statistics import DemoStatistics, compute_statistics
from keygrip.data.robot.workspace_view import fit_to_workspace
from keygrip.data.shards.remote import folder_beside
from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler
from keygrip.data.shards.substitution import Collate, CountingLoader
from keygrip.training.main_guard import refuse_unguarded_script
from keygrip.training.parts import ReadWhere, data_part

log = logging.getLogger(__name__)

BALANCES = ("instruction", "task")
CACHE_FOLDER = ".keygrip"  # hidden folder for files derived from a data folder; may be removed at any time


@data_part(from_checkpoint={"make_missing": False, "cache_dir": None}, external=["cache_dir"])
class RobotDemos(ResumableData):
    """Demonstrations of one robot and task, from folders of any known format.

    Args:
        root: the data folder; `hub:OWNER/NAME` for a data set of the Hugging Face hub; or None: the folder of `record`,
            where missing demos are recorded first. A list: demos of all, their names prefixed with their folder's.
        weights: with several roots, the share of each in every training epoch; None: each frame counts the same.
        record: how the embedded demonstrations are recorded; unused if `root` is given.
        format: "auto", "native", or a foreign format's name.
        calibration: calibration file for foreign formats that need one; with several roots, one each or one for all.
        camera_names: new camera names, as {name of a root's folder: {name in its recordings: new name}}.
        camera: the camera that the policy receives. arms: the arms that it moves, in the order of the batch's arm
            dimension.
        cameras: several cameras, `camera` first: batches are then `MultiViewPolicyBatch`es with these views. None: one
            camera, `PolicyBatch`es. If the model masks views, demos may lack all but the first. depth: whether these
            views come with depth.
        view_dropout: probability that a camera other than the first is masked in a training sample; 0: never.
        image_size, mean, std: those of the backbone.
        detail_size: side in pixels of a second crop of the first camera's image, the same part at a higher resolution,
            that batches include; None: none.
        field, fit: see `ImageGeometry`. fit "auto": crop or stretch, chosen so that the workspace of the training
            demos stays in view (see :mod:`keygrip.data.robot.workspace_view`).
        augmentation: random crops and colours of training images; None: always the nominal crop.
        horizon: T, future steps. frame_stride: frames from one to the next; with several roots one number per root, if
            their frame rates differ, so that a step has the same duration in all of them.
        targets: "commanded" (the commanded poses) or "reached" (the measured poses). gripper_targets: the same for the
            gripper's opening only; None: as `targets`.
        drop_idle_s: training samples that start later than this many seconds in a pause are left out; their targets
            keep their timing. None keeps all.
        balance: "instruction" or "task": each instruction, or each task, gets the same share of every training epoch.
            None: each frame does.
        intervention_weight: how many times an epoch contains each training frame in which a person corrected a policy.
        batch_size: global, divided over the ranks.
        val_fraction: share of demos held out (see :func:`keygrip.data.robot.split.split_demos`). split_seed: seed of
            the split.
        seed: seed of sample order and augmentation.
        max_demos: number of demos to use of each root, the first ones by name that can be read; those found damaged
            later are not replaced. None: all.
        max_broken_share: a larger share of broken demos, or of unreadable frames among the requested ones, is an error.
        max_off_screen_share: demos with a larger share of steps outside the nominal image are named in a warning.
        cache_gb: size limit of decoded frames on disk; 0: decode every time. cache_dir: folder of the cache; None:
            `.keygrip` in the data folder, or the user's cache folder if the data folder is read-only.
        num_workers: loader processes; None: one per core except one, at most 4. 0: load in the main process.
        prefetch_batches: batches that each worker keeps ready.
        verify: check every file and frame when the set is first used (see :mod:`keygrip.data.robot.integrity`).
        allow_changed: allow a run to be resumed after its demonstrations have changed.
        make_missing: False: a missing data set of the hub is an error (set for checkpoints: they download nothing).
    """

    read_where: ClassVar = {"record": ReadWhere("root", None), "view_dropout": ReadWhere("cameras")}
    order_depends_on = ("batch_size", "seed", "balance", "intervention_weight", "weights")
    compares_contents = True

    @staticmethod
    def batch_type(options: Mapping[str, Any]) -> type[PolicyTargets]:
        """Return the type of the batches for the settings ``options``."""
        return PolicyBatch if options.get("cameras") is None else MultiViewPolicyBatch

    def __init__(
        self,
        root: str | Path | Sequence[str | Path] | None,
        camera: str,
        arms: Sequence[str],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        horizon: int,
        frame_stride: int | Sequence[int],
        batch_size: int,
        record: Recording | None = None,
        format: str = "auto",
        calibration: str | Path | Sequence[str | Path | None] | None = None,
        field: float = 1.0,
        fit: str = "crop",
        augmentation: Augmentation | None = None,
        targets: str = "reached",
        drop_idle_s: float | None = None,
        intervention_weight: float = 1.0,
        val_fraction: float = VAL_FRACTION,
        split_seed: int = SEED,
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
        balance: str | None = None,
        detail_size: int | None = None,
        verify: bool = True,
        allow_changed: bool = False,
        weights: Sequence[float] | None = None,
        view_dropout: float = 0.0,
        camera_names: Mapping[str, Mapping[str, str]] | None = None,
        make_missing: bool = True,
        gripper_targets: str | None = None,
    ) -> None:
        super().__init__()
        self.make_missing = make_missing
        if balance not in (None, *BALANCES):
            raise ValueError(f"data.balance must be one of {', '.join(BALANCES)}, or null for none; it is {balance!r}")
        if root is None and record is None:
            raise ValueError("no data: name a folder with data.root=PATH (or leave data.record as it is)")
        if weights is not None and balance is not None:
            raise ValueError("data.weights and data.balance both say what an epoch is made of: give one of them")
        for name, chosen in (("targets", targets), ("gripper_targets", gripper_targets or targets)):
            if chosen not in TARGETS:
                raise ValueError(f"data.{name} must be one of {', '.join(TARGETS)}, not {chosen!r}")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, not {horizon}")
        if not arms or len(set(arms)) != len(arms):
            raise ValueError(f"arms must name each arm once, not {list(arms)}")
        if cameras is not None and (not cameras or len(set(cameras)) != len(cameras) or cameras[0] != camera):
            raise ValueError(
                f"data.cameras must name each camera once, data.camera={camera} first; it is {list(cameras)}"
            )
        if depth and cameras is None:
            raise ValueError("data.depth=true needs data.cameras: only batches of several views hold depth")
        if not 0 <= view_dropout < 1 or (view_dropout and (cameras is None or len(cameras) < 2)):
            raise ValueError(
                f"data.view_dropout={view_dropout} must be at least 0 and below 1, and needs several data.cameras"
            )
        if detail_size is not None and detail_size < image_size:
            raise ValueError(f"data.detail_size={detail_size} must be at least data.image_size={image_size}")
        if not (np.isfinite(intervention_weight) and intervention_weight >= 0):
            raise ValueError(f"data.intervention_weight must be finite and at least 0, not {intervention_weight}")
        shares = {"max_broken_share": max_broken_share, "max_off_screen_share": max_off_screen_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"data.{name}={share}: it is a share, 0 to 1")
        for name, least in (("cache_gb", cache_gb), ("drop_idle_s", drop_idle_s)):
            if least is not None and not (np.isfinite(least) and least >= 0):
                raise ValueError(f"data.{name}={least}: must be finite and at least 0")
        if max_demos is not None and max_demos < 1:
            raise ValueError(f"max_demos must be at least 1, not {max_demos}")
        folders = root if root is not None else record.root  # type: ignore[union-attr]
        self.roots = data_roots(folders, calibration, frame_stride, camera_names)
        self.weights = checked_weights(weights, len(self.roots))
        self.root = self.roots[0].folder
        self.record = record if root is None else None
        self.format = format
        self.camera, self.arms = camera, tuple(arms)
        self.several, self.cameras = cameras is not None, tuple(cameras or (camera,))
        self.depth, self.balance, self.detail_size, self.view_dropout = depth, balance, detail_size, view_dropout
        self.fit_to_workspace = fit == "auto"
        chosen = "stretch" if fit == "auto" else fit  # until `setup` has read the workspace
        self.geometry = ImageGeometry(image_size, tuple(mean), tuple(std), field, chosen)  # type: ignore[arg-type]
        self.augmentation = augmentation
        self.horizon, self.targets, self.drop_idle_s = horizon, targets, drop_idle_s
        self.gripper_targets, self.intervention_weight = gripper_targets, intervention_weight
        self.batch_size, self.val_fraction, self.split_seed, self.seed = batch_size, val_fraction, split_seed, seed
        # a recording may hold more demos than this run needs (made for an earlier run): this run uses the first ones
        self.max_demos = self.record.demos if max_demos is None and self.record is not None else max_demos
        self.max_broken_share, self.max_off_screen_share = max_broken_share, max_off_screen_share
        self.skipped = BadSamples(max_broken_share, setting="data.max_broken_share")
        self.cache_gb = cache_gb
        self.cache_dir = Path(cache_dir) if cache_dir is not None else self.root / CACHE_FOLDER
        self.num_workers = min(usable_cores() - 1, 4) if num_workers is None else num_workers
        self.prefetch_batches = prefetch_batches
        self.verify, self.allow_changed = verify, allow_changed
        self.reads_calibration: bool | tuple[str, ...] = True  # of the model: which cameras must be calibrated
        self.masks_views = False  # of the model; if True, demos may lack cameras other than the first
        self.extra_targets: tuple[str, ...] = ()  # of the model: what its actions contain besides poses
        self.embodiments: tuple[str, ...] = ()  # of the model: robots with statistics of their own
        self.may_keep_apart = False  # of the model: whether it supports such robots
        # every node has access to the folder, so only one process of all nodes records
        self.prepare_data_per_node = False
        self.demos: list[Demo] = []
        self.broken: list[DemoError] = []
        self.root_of: list[int] = []  # index of each demo's root
        self.contents: dict[str, str] = {}  # hash of each demo's files, by name, if they were verified
        self._hashes = DataHashes([], {})
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []
        self._statistics: DemoStatistics | None = None
        self._frames: dict[str, FrameCache] | None = None
        self._train: DemoSamples | None = None
        self._val: DemoSamples | None = None

    # ---------------------------------------------------------------------------------------------------------- reading

    def refuse_missing(self) -> None:
        """Raise FileNotFoundError if a data set is missing that is not recorded here. Called before any slow work."""
        for part in self.roots if self.record is None else ():
            part.refuse_missing(self.make_missing)

    def prepare_data(self) -> None:
        """Record missing demonstrations if the user named no folder; download data sets of the hub."""
        for root in self.roots:
            root.download(self.make_missing)
        if self.record is None:
            return
        refuse_unguarded_script()  # a recorder's worker would wait here for a lock that its parent holds
        self.record.complete()

    def setup(self, stage: str | None = None) -> None:
        """Find, read, check and split the demos; once.

        Raises:
            FileNotFoundError: no data. ValueError: too many demos are broken (they are listed), or they lack what the
                options require.
        """
        if self.demos:
            return
        if self.record is not None and not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not there; prepare_data() records it on the first process")
        unwritable = self.root.is_dir() and not os.access(self.root, os.W_OK)
        if unwritable and self.cache_dir == self.root / CACHE_FOLDER:
            self.cache_dir = folder_beside(str(self.root.resolve()))
            log.info("%s cannot be written; what is derived from it goes to %s", self.root, self.cache_dir)
        settings = (self.cameras, self.arms, self.depth, self.max_demos, self.max_broken_share, self.verify)
        options = ReadingOptions(*settings, calibrated=self.reads_calibration, masks_views=self.masks_views)
        read = read_roots(self.roots, self.format, options, self.cache_dir)
        demos, self.broken, self.contents, self.root_of = read.demos, read.broken, read.contents, read.root_of
        targets = (self.targets, self.gripper_targets, self.extra_targets)
        refuse_missing(demos, self.arms, *targets, [root.stride for root in self.roots])
        check_robots(demos, self.embodiments, self.may_keep_apart)
        report_absent_views(demos, self.cameras[1:])
        report_uncalibrated(demos, self.cameras)
        if self.depth:
            refuse_flat(demos, self.cameras)
        self.demos, self._hashes = demos, DataHashes(demos, self.contents)
        self.train_indices, self.val_indices = split_demos([d.name for d in demos], self.val_fraction, self.split_seed)
        folders = ", ".join(str(root.folder) for root in self.roots)
        log.info(
            "%s: %d demos, %d frames; %d for training, %d for validation",
            folders,
            len(demos),
            sum(len(demo) for demo in demos),
            len(self.train_indices),
            len(self.val_indices),
        )
        if stage != "validate":  # demos for evaluation may be shorter
            if not self.train_indices:
                raise ValueError(
                    f"data.val_fraction={self.val_fraction:g} holds out the only demonstration, {demos[0].name}: set "
                    "data.val_fraction=0 to train on it"
                )
            strides = [self.roots[self.root_of[index]].stride for index in self.train_indices]
            refuse_short(self.train_demos, self.horizon, strides)
            report_corrections(self.train_demos, self.intervention_weight, [demos[each] for each in self.val_indices])
        if self.fit_to_workspace:
            self.geometry = fit_to_workspace(self.train_demos, self.cameras, self.arms, self.geometry)
        report_outliers(self.demos, self.arms, self.targets)
        report_off_screen(self.off_screen_shares(), self.max_off_screen_share, self.camera, len(demos), folders)
        if "controller" not in self.extra_targets:  # the controller's inputs are recorded commands
            report_wide_targets(self.demos, self.arms, self.gripper_targets or self.targets)
        report_views(self.demos, self.cameras, self.geometry)
        self._report_detail()

    def _report_detail(self) -> None:
        """Warn if the detail image has a higher resolution than the recorded image."""
        track = self.demos[0].cameras[self.camera]
        pixels = self.geometry.field * (min(track.width, track.height) if self.geometry.fit == "crop" else track.width)
        if self.detail_size is not None and self.detail_size > 1.1 * pixels:
            log.warning(
                "data.detail_size=%d, but the part of camera %s's image that the network sees has %d pixels: record "
                "larger images, or take a smaller model.network.second_look",
                self.detail_size,
                self.camera,
                pixels,
            )

    def configure_for(self, module: Any) -> None:
        """Store what a model reads from the demonstrations besides images and poses; call it before `setup`.

        Raises:
            ValueError: this model does not read one of the settings, or learns from depth and `depth` is off.
        """
        refuse_unfit(module, self.detail_size, self.view_dropout, self.depth)
        self.masks_views = bool(getattr(module, "masks_views", False))
        self.reads_calibration = getattr(module, "reads_calibration", True)
        self.extra_targets = tuple(getattr(module, "extra_targets", ()))
        self.embodiments = tuple(getattr(module, "embodiments", ()))
        self.may_keep_apart = bool(getattr(module, "may_keep_apart", False))
        if self.gripper_targets is not None and "controller" in self.extra_targets:
            raise ValueError(
                f"data.gripper_targets={self.gripper_targets}: with model.actions.kind=osc the gripper is one of the "
                "controller's inputs; leave it out"
            )

    def off_screen_shares(self) -> dict[str, float]:
        """Return, by demo, the share of target steps outside the nominal (unaugmented) image, over all arms."""
        steps = self._sample_options(None, drop_idle=False).steps
        return off_screen_shares(self.demos, self.camera, self.arms, self.geometry, steps, self.targets)

    @property
    def camera_is_calibrated(self) -> bool:
        """Whether `camera` is calibrated in all demonstrations; needs `setup`."""
        return not any(demo.cameras[self.camera].uncalibrated for demo in self.demos)

    @property
    def cameras_are_calibrated(self) -> bool:
        """Whether all `cameras` are calibrated in all demonstrations that have them; needs `setup`."""
        return not any(
            demo.cameras[name].uncalibrated for demo in self.demos for name in self.cameras if name in demo.cameras
        )

    @property
    def train_demos(self) -> list[Demo]:
        """Demonstrations of the training split; needs `setup`."""
        return [self.demos[index] for index in self.train_indices]

    # ------------------------------------------------------------------------------------------------------- statistics

    @property
    def statistics(self) -> DemoStatistics:
        """Statistics of the training split; needs `setup`."""
        if self._statistics is None:
            if not self.train_indices:
                raise ValueError("no statistics before setup('fit') has found training demos")
            options = self._sample_options(None, drop_idle=True)
            self._statistics = compute_statistics(self.demos, self.train_indices, options, self.cache_dir, self.cameras)
        return self._statistics

    # ---------------------------------------------------------------------------------------------------------- loading

    @property
    def frames(self) -> dict[str, FrameCache]:
        """Decoded frames of all demos, training and validation, by camera. One size limit applies to all."""
        if self._frames is None:
            self._frames = {}
            remaining, reserved = int(self.cache_gb * 1e9), 0
            for camera in self.cameras:
                tracks = [demo.cameras.get(camera) for demo in self.demos]
                sources = [NoFrames() if track is None else track.frames for track in tracks]
                shapes = [
                    FrameShape(len(track.frames), track.height, track.width) if track else FrameShape(0, 0, 0)
                    for track in tracks
                ]
                cache = FrameCache(sources, shapes, self.cache_dir, camera, remaining, reserved)
                self._frames[camera] = cache
                remaining -= cache.limit_bytes
                reserved += cache.unwritten_bytes
        return self._frames

    def _sample_options(
        self, augmentation: Augmentation | None, drop_idle: bool, training: bool = False
    ) -> SampleOptions:
        return SampleOptions(
            camera=self.camera,
            arms=self.arms,
            targets=self.targets,
            gripper_targets=self.gripper_targets,
            horizon=self.horizon,
            strides=tuple(self.roots[root].stride for root in self.root_of),
            geometry=self.geometry,
            augmentation=augmentation,
            seed=self.seed,
            drop_idle_s=self.drop_idle_s if drop_idle else None,
            intervention_weight=self.intervention_weight if training else 1.0,
            detail_size=self.detail_size,
            extra=self.extra_targets,
            embodiments=self.embodiments,
            view_dropout=self.view_dropout if training else 0.0,
            masks_views=self.masks_views,
        )

    def _samples(self, indices: Sequence[int], augmentation: Augmentation | None, training: bool) -> DemoSamples:
        demos = [self.demos[index] for index in indices]
        options = self._sample_options(augmentation, drop_idle=training, training=training)
        if self.several:
            return MultiViewSamples(demos, indices, self.frames, options, self.cameras, self.depth)
        return DemoSamples(demos, indices, self.frames, options)

    @property
    def train_samples(self) -> DemoSamples:
        """Augmented samples of the training split; needs `setup`."""
        if self._train is None:
            self._train = self._samples(self.train_indices, self.augmentation, training=True)
            if self._train.dropped:
                log.info("%d training frames of pauses are left out (data.drop_idle_s)", self._train.dropped)
        return self._train

    @property
    def val_samples(self) -> DemoSamples:
        """Unaugmented samples of the validation split; needs `setup`."""
        if self._val is None:
            self._val = self._samples(self.val_indices, None, training=False)
            self._val.leaves_out, self._val.never_empty = True, self.ranks[1] > 1
        return self._val

    def _loader(self, samples: DemoSamples, shuffle: bool) -> DataLoader[Any]:
        groups = samples.groups(self.balance) if shuffle and self.balance is not None else None
        weights = self.weights if shuffle else None
        if weights is not None:
            groups = np.array(self.root_of)[samples.demo_indices][samples.sample_demo]
        sampler = GlobalBatchSampler(
            len(samples), self.batch_size, *self.ranks, self.seed, shuffle, shuffle, groups=groups, weights=weights
        )
        if shuffle and self.trainer is not None:
            sampler.follow(self.batches_done)
        loader = CountingLoader(collate_fn=Collate(collate), **self.loader_options(samples, sampler))
        loader.skipped = self.skipped
        return loader

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_samples, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation frames in one fixed shuffled order, unaugmented; no loader if no demo is held out."""
        return self._loader(self.val_samples, shuffle=False) if self.val_indices else []

    @property
    def origin(self) -> dict[str, Any]:
        """What the run folder records about the data: version, number of demos, demos left out, damaged cameras."""
        return {
            "root": [str(root.folder) for root in self.roots] if len(self.roots) > 1 else str(self.root),
            "frame_stride": [root.stride for root in self.roots] if len(self.roots) > 1 else self.roots[0].stride,
            "version": data_version(self.contents, self.demos) if self.contents else None,
            "demos": len(self.demos),
            "left_out": {error.name: error.reason for error in self.broken},
            "masked": {demo.name: demo.source["damaged"] for demo in self.demos if "damaged" in demo.source},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the hashes of the demonstrations on which the run is trained."""
        return super().state_dict() | self._hashes.by_kind

    def refuse_trained(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise ValueError if a run was trained on demonstrations that are held out here; needs `setup`.

        Args:
            state: of the run's data, from its checkpoint (`state_dict`). settings: the run's data settings.
        """
        held_out = [self.demos[index] for index in self.val_indices]
        refuse_trained(held_out, state.get("demonstrations") or {}, settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position at which the checkpoint was written.

        Raises:
            ValueError: the demonstrations or the order of samples are not those of the checkpoint.
        """
        self._hashes.refuse_changed(state_dict, self.allow_changed)
        super().load_state_dict(
            {"balance": None, "intervention_weight": 1.0, "weights": None} | state_dict
        )  # older checkpoints lack these keys
