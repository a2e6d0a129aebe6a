"""Checks of a set of demonstrations against the settings: missing data, outliers, targets outside the image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keygrip.data.bad_samples import join_first_names
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.checks import pose_outliers, reached_outliers
from keygrip.data.robot.samples import targets_of
from keygrip.data.robot.schema import Demo
from keygrip.models.geometry.cameras import inside_image, project

log = logging.getLogger(__name__)

GRIP_BELOW = 0.4  # opening below which plans close the gripper (conf/execution/options.yaml)
CLOSED_BY = 0.3  # change of the opening; a smaller one is not a grasp


def refuse_unfit(module: Any, detail_size: int | None, view_dropout: float, depth: bool) -> None:
    """Raise ValueError if a model does not read one of these settings of the data, or learns from depth that it would
    not get."""
    if detail_size is not None and not getattr(module, "reads_detail", False):
        raise ValueError(
            f"data.detail_size={detail_size}: this model has no second look that reads it; leave it out, or set "
            "model.network.second_look"
        )
    if view_dropout and not getattr(module, "masks_views", False):
        raise ValueError(
            f"data.view_dropout={view_dropout:g}: this model masks no views; leave it out, or set "
            "model.network.world_views=true of a volume-query policy"
        )
    if not depth and getattr(module, "learns_depth", False):
        raise ValueError(
            "data.depth=false, but this model learns from depth: set data.depth=true or, to train geometry_vla on the "
            "actions alone, geometry=dino_multiview_no_depth"
        )


def refuse_missing(
    demos: Sequence[Demo],
    arms: Sequence[str],
    targets: str,
    gripper_targets: str | None,
    extra: Sequence[str],
    strides: Sequence[int],
) -> None:
    """Raise ValueError if some demos lack data from which the targets are computed.

    Args:
        targets, gripper_targets: "commanded" or "reached"; gripper_targets None: as `targets`.
        extra: "joints" and "controller", if the model reads them.
        strides: frames from one target to the next, for each root.
    """
    for setting, chosen in (("targets", targets), ("gripper_targets", gripper_targets)):
        without = [demo.name for demo in demos if any(demo.arms[arm].commanded is None for arm in arms)]
        if chosen == "commanded" and without:
            raise ValueError(
                f"data.{setting}=commanded, but {len(without)} of {len(demos)} demos hold no commanded poses "
                f"(first: {without[0]}); use data.{setting}=reached"
            )
    for quantity in extra:
        without = [demo.name for demo in demos if any(getattr(demo.arms[arm], quantity) is None for arm in arms)]
        if without:
            raise ValueError(
                f"model.actions.kind needs {quantity}, which {len(without)} of {len(demos)} demos do not hold (first: "
                f"{without[0]}): use model.actions.kind=absolute or delta"
            )
    if "controller" in extra and max(strides) != 1:
        raise ValueError(
            f"model.actions.kind=osc needs every action of the controller: data.frame_stride is {max(strides)}, 1 is "
            "needed"
        )


def check_robots(demos: Sequence[Demo], embodiments: Sequence[str], may_keep_apart: bool) -> None:
    """Warn about demos of several robots if the model could use statistics per robot and does not.

    Args:
        embodiments: robots for which the model has statistics of their own. may_keep_apart: whether it supports that.

    Raises:
        ValueError: there are demos of a robot that `embodiments` does not name.
    """
    robots = sorted({demo.robot for demo in demos})
    unlisted = [name for name in robots if name not in embodiments]
    if embodiments and unlisted:
        raise ValueError(
            f"model.actions.embodiments names {', '.join(embodiments)}, and there are demos of {unlisted[0]!r}"
        )
    if len(unlisted) > 1 and may_keep_apart:
        log.warning(
            "there are demos of several robots (%s), and actions are normalised, positions limited by all of them "
            "together: model.actions.embodiments=[%s] keeps them apart",
            ", ".join(robots),
            ",".join(robots),
        )


def refuse_short(demos: Sequence[Demo], horizon: int, strides: Sequence[int]) -> None:
    """Warn about demonstrations that end before their first target, and about steps after the end of all of them.

    Args:
        demos: those of the training split. horizon: T. strides: frames from one target to the next, for each demo.

    Raises:
        ValueError: no demo reaches its first target.
    """
    ahead = [(len(demo) - 1) // stride for demo, stride in zip(demos, strides, strict=True)]
    most, index = max(ahead), int(np.argmax(ahead))
    longest = f"{demos[index].name}, with {len(demos[index])} frames the longest"
    if not most:
        raise ValueError(
            f"data.frame_stride={strides[index]}: the first target lies behind the end of all {len(demos)} training "
            f"demos ({longest}), so that there is nothing to learn: lower it"
        )
    if most < horizon:
        log.warning(
            "data.horizon=%d steps of data.frame_stride=%d frames: the last %d lie behind the end of all training "
            "demos (%s), where the last pose is repeated: no demo shows them; data.horizon=%d would do%s",
            *(horizon, strides[index], horizon - most, longest, most),
            ", or a lower data.frame_stride, with shorter steps" if strides[index] > 1 else "",
        )
    short = [demo.name for demo, steps in zip(demos, ahead, strict=True) if not steps]
    if short:
        log.warning(
            "%d of %d training demos are shorter than one step of data.frame_stride frames and hold no target: %s",
            *(len(short), len(demos), join_first_names(short)),
        )


def report_corrections(demos: Sequence[Demo], weight: float, held_out: Sequence[Demo] = ()) -> None:
    """Log how many training frames a person corrected. Raise ValueError if there are none and they have a weight.

    Args:
        held_out: demos for validation.
    """
    corrected, elsewhere = (
        [0 if demo.intervention is None else int(demo.intervention.sum()) for demo in part]
        for part in (demos, held_out)
    )
    if any(corrected):
        log.info(
            "a person corrected %d of %d training frames, in %d demos; data.intervention_weight=%g",
            sum(corrected),
            sum(len(demo) for demo in demos),
            sum(count > 0 for count in corrected),
            weight,
        )
    elif weight != 1 and any(elsewhere):
        names = join_first_names([demo.name for demo, count in zip(held_out, elsewhere, strict=True) if count])
        raise ValueError(
            f"data.intervention_weight={weight:g}, but all frames that a person corrected are held out for validation "
            f"(data.val_fraction): {names}; add further recordings, or set data.val_fraction=0"
        )
    elif weight != 1:
        raise ValueError(
            f"data.intervention_weight={weight:g}, but a person corrected no frame of these demonstrations: leave it "
            "out, or add recordings of `keygrip run takeover=... record=FOLDER` with data.root=[DEMOS,FOLDER]"
        )


def report_absent_views(demos: Sequence[Demo], cameras: Sequence[str]) -> None:
    """Warn about demos in which a camera is masked: it, or its calibration, is missing, or its frames are damaged.

    Raises:
        ValueError: no demo has the camera.
    """
    for camera in cameras:
        without = [demo for demo in demos if camera not in demo.cameras]
        if not without:
            continue
        records = [without[0].source.get(key) for key in ("damaged", "uncalibrated")]
        reasons = [record[camera] for record in records if isinstance(record, Mapping) and camera in record]
        reason = reasons[0] if reasons else "it has no such camera"
        first = f"first: {without[0].name}: {reason}"
        if len(without) == len(demos):
            raise ValueError(
                f"no demo has a calibrated and sound camera {camera!r}, which data.cameras names ({first})"
            )
        log.warning("camera %s is masked in %d of %d demos (%s)", camera, len(without), len(demos), first)


def report_uncalibrated(demos: Sequence[Demo], cameras: Sequence[str]) -> None:
    """Log which cameras are not calibrated, for a model that does not need the calibration."""
    for camera in cameras:
        without = [demo for demo in demos if camera in demo.cameras and demo.cameras[camera].uncalibrated]
        if without:
            first = f"first: {without[0].name}: {without[0].cameras[camera].uncalibrated}"
            log.info("camera %s is not calibrated in %d of %d demos (%s)", camera, len(without), len(demos), first)


def refuse_flat(demos: Sequence[Demo], cameras: Sequence[str]) -> None:
    """Raise ValueError if no demo holds depth. Warn about demos without depth: theirs counts as unknown."""
    flat = [
        demo.name
        for demo in demos
        if any(demo.cameras[camera].depth is None for camera in cameras if camera in demo.cameras)
    ]
    if len(flat) == len(demos):
        raise ValueError(
            f"data.depth=true, but no demo holds depth for all of {', '.join(cameras)} (first: {flat[0]}); use "
            "data.depth=false, for geometry_vla together with geometry=dino_multiview_no_depth"
        )
    if flat:
        log.warning(
            "%d of %d demos hold no depth for all of %s (first: %s); theirs counts as unknown",
            len(flat),
            len(demos),
            ", ".join(cameras),
            flat[0],
        )


def report_outliers(demos: Sequence[Demo], arms: Sequence[str], targets: str) -> None:
    """Warn about single wrong readings: one of them stretches the height bins of all demos.

    Args:
        targets: "commanded" or "reached". The bins span the reached positions in either case.
    """
    for kind in dict.fromkeys(("reached", targets)):
        outliers = []
        for demo in demos:
            for arm in arms:
                reached = demo.arms[arm]
                if kind == "reached":
                    frames = reached_outliers(reached, demo.timestamps, demo.fps)
                else:
                    frames = np.zeros(0, int) if reached.commanded is None else pose_outliers(reached.commanded)
                outliers += [f"{demo.name} frame {frame}" for frame in frames]
        if outliers:
            log.warning(
                "%d %s positions leave the path of their neighbours by more than 10 cm, which stretches the height "
                "bins (repair or remove these demos): %s",
                len(outliers),
                kind,
                join_first_names(outliers),
            )


def report_wide_targets(demos: Sequence[Demo], arms: Sequence[str], targets: str) -> None:
    """Warn about demonstrations that close a gripper, but whose target openings are too large for a plan to close it.

    A held object keeps the fingers apart: reached openings stop there, commanded openings go on.

    Args:
        targets: "commanded" or "reached", for the opening.
    """
    least: dict[str, float] = {}
    for demo in demos:
        for arm in arms:
            _, _, opening, _ = targets_of(demo.arms[arm], 0, np.arange(1, len(demo)), targets)
            if len(opening) and opening.min() > GRIP_BELOW and opening.max() - opening.min() > CLOSED_BY:
                least[demo.name] = min(float(opening.min()), least.get(demo.name, 1.0))
    if least:
        remedy = "set data.gripper_targets=commanded where the demos hold commands, or " if targets == "reached" else ""
        log.warning(
            "%d of %d demos close a gripper, and their %s openings stay above %g (execution.grip_below): what is held "
            "keeps the fingers apart, and a robot that follows such openings never shuts its gripper: %sraise "
            "execution.grip_below and execution.release_above above them when the policy runs: %s",
            *(len(least), len(demos), targets, GRIP_BELOW, remedy),
            join_first_names([f"{name} ({opening:.2f})" for name, opening in least.items()]),
        )


def off_screen_shares(
    demos: Sequence[Demo],
    camera: str,
    arms: Sequence[str],
    geometry: ImageGeometry,
    steps: Callable[[int], np.ndarray],
    targets: str,
) -> dict[str, float]:
    """Return, by demo, the share of target steps that project outside the nominal (unaugmented) image, over all arms.
    Demos whose camera is not calibrated are left out.

    Args:
        steps: returns [T], how many frames each target lies ahead, for the index of a demo.
    """
    shares = {}
    for index, demo in enumerate(demos):
        track = demo.cameras[camera]
        if track.uncalibrated:
            continue
        box = geometry.box(track.width, track.height).to_image(geometry.image_size)
        fixed = track.intrinsics.strides[0] == track.world_to_camera.strides[0] == 0  # one matrix for all frames
        cameras = 1 if fixed else len(demo)
        intrinsics = torch.from_numpy(box @ track.intrinsics[:cameras])[:, None]
        pose = torch.from_numpy(np.array(track.world_to_camera[:cameras]))[:, None]
        ahead = steps(index)
        inside = []
        for arm in arms:
            if fixed:  # it sees the target at a frame from all frames in the same place: each is projected once
                points, _, _, _ = targets_of(demo.arms[arm], np.zeros(1, np.int64), np.arange(len(demo)), targets)
            else:
                points, _, _, is_pad = targets_of(demo.arms[arm], np.arange(len(demo)), ahead, targets)
            pixels, _ = project(torch.from_numpy(points), intrinsics, pose)
            visible = inside_image(pixels, geometry.image_size, geometry.image_size).numpy()
            inside += [visible[0, step:] for step in ahead] if fixed else [visible[~is_pad]]
        if len(targets_inside := np.concatenate(inside)):  # a demo that is shorter than a step has no target
            shares[demo.name] = float(1 - targets_inside.mean())
    return shares


def report_off_screen(shares: Mapping[str, float], limit: float, camera: str, count: int, folders: str) -> None:
    """Warn about demos with a larger share of steps than `limit` outside the image.

    Args:
        shares: from `off_screen_shares`. camera, count, folders: for messages; `count` is the number of all demos.

    Raises:
        ValueError: the arm is outside in all demos.
    """
    outside = {name: share for name, share in shares.items() if share > limit}
    if not outside:
        return
    worst = sorted(outside, key=lambda name: -outside[name])
    if len(outside) == count and min(outside.values()) > 0.95:
        raise ValueError(
            f"the arm is outside of camera {camera}'s image in all {count} demos of {folders}: "
            "the calibration does not belong to these images (python -m keygrip.prepare step=doctor says more), or "
            "data.camera names the wrong one"
        )
    log.warning(
        "%d of %d demos have more than %.0f %% of their steps outside camera %s's image as the network sees "
        "it, where they have no "
        "pixel to learn (check the calibration with the geometry doctor, or set data.fit=stretch): %s",
        len(outside),
        count,
        100 * limit,
        camera,
        join_first_names([f"{name} ({100 * outside[name]:.0f} %)" for name in worst]),
    )


def report_views(demos: Sequence[Demo], cameras: Sequence[str], geometry: ImageGeometry) -> None:
    """Log which part of each camera's image the network sees."""
    for camera in cameras:
        track = next(demo.cameras[camera] for demo in demos if camera in demo.cameras)
        box = geometry.box(track.width, track.height)
        log.info(
            "camera %s: the network sees %.0f %% of the width and %.0f %% of the height of %d x %d pixels",
            camera,
            100 * (box.right - box.left) / track.width,
            100 * (box.bottom - box.top) / track.height,
            track.width,
            track.height,
        )
