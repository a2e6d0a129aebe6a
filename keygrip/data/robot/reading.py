"""Reads, checks and verifies the demonstrations that were found. Broken ones are named, counted and left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from keygrip.data.bad_samples import join_first
from keygrip.data.robot.checks import check_depth, check_images
from keygrip.data.robot.frame_rates import other_rates, report_gaps
from keygrip.data.robot.integrity import verify
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import Demo, DemoError, missing_camera
from keygrip.data.video_index import keep_indices
from keygrip.progress import Progress

log = logging.getLogger(__name__)

NOTES_AT_MOST = 10  # notes of the readers in the log, each logged once


@dataclass(frozen=True)
class ReadingOptions:
    """Requirements for every demonstration.

    Args:
        cameras, arms: names that it must have. depth: whether its depth is read.
        max_demos: number of demonstrations to use, the first ones that can be read; those that are left out later, for
            their frame rate or by `verify` (also for their images), are not replaced. None: all.
        masks_views: the model masks views, so only the first camera must be present, calibrated and undamaged.
        max_broken_share: a larger share of broken demonstrations is an error. verify: check every file and frame once.
        calibrated: True: cameras whose pose is not known are left out. False: for models that read no calibration.
            Names of cameras: for models that read the calibration of these cameras only.
    """

    cameras: tuple[str, ...]
    arms: tuple[str, ...]
    depth: bool = False
    max_demos: int | None = None
    max_broken_share: float = 0.1
    verify: bool = True
    calibrated: bool | tuple[str, ...] = True
    masks_views: bool = False

    @property
    def uncalibrated(self) -> bool | tuple[str, ...]:
        """Cameras whose pose may be unknown, in the form that `DemoReference.read` accepts."""
        if isinstance(self.calibrated, bool):
            return not self.calibrated
        return tuple(name for name in self.cameras if name not in self.calibrated)


@dataclass
class ReadDemos:
    """Demonstrations that can be used, in the order in which they were found.

    Attributes:
        broken: demonstrations that were left out, with the reason. contents: hash of each demonstration's content, by
            name; empty if nothing was verified.
    """

    demos: list[Demo]
    broken: list[DemoError] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)


def read_demos(root: Path, references: Sequence[DemoReference], options: ReadingOptions, cache_dir: Path) -> ReadDemos:
    """Return the usable demonstrations of a data set.

    Args:
        root: its folder. references: the demonstrations that were found. cache_dir: folder for the results of the
            verification and the indices of videos.

    Raises:
        ValueError: too many are broken (they are listed), there are fewer than `max_demos`, or the time stamps of most
            give another rate than the metadata.
    """
    read = ReadDemos([])
    keep_indices(root, cache_dir)
    looked_at = 0
    for reference in Progress(references, desc=f"reading {root}", unit="demo", leave=False):
        if options.max_demos is not None and len(read.demos) == options.max_demos:
            break
        looked_at += 1
        try:
            read.demos.append(_read_with_requirements(reference, options))
        except DemoError as error:
            read.broken.append(error)
    notes = dict.fromkeys(str(note) for demo in read.demos for note in demo.source.get("notes", []))
    for note in list(notes)[:NOTES_AT_MOST]:
        log.info("%s: %s", root, note)
    rates = other_rates(read.demos, root)
    read.broken += [DemoError(name, reason) for name, reason in rates.items()]
    read.demos = [demo for demo in read.demos if demo.name not in rates]
    if options.verify:
        _drop_damaged(read, options, cache_dir)
    for broken in read.broken:
        log.warning("left out: %s", broken)
    if read.broken:
        share = len(read.broken) / looked_at
        log.warning("%d of %d demos in %s are broken and left out", len(read.broken), looked_at, root)
        if share > options.max_broken_share or not read.demos:
            raise ValueError(
                f"{len(read.broken)} of {looked_at} demos in {root} are broken, more than "
                f"data.max_broken_share={options.max_broken_share:g} allows: "
                + join_first([f"{error.name}: {error.reason}" for error in read.broken])
            )
    if options.max_demos is not None and len(read.demos) + len(read.broken) < options.max_demos:
        raise ValueError(f"data.max_demos={options.max_demos}, but {root} holds {len(read.demos)} readable demos")
    report_gaps(read.demos, root)
    return read


def _read_with_requirements(reference: DemoReference, options: ReadingOptions) -> Demo:
    needed = options.cameras[:1] if options.masks_views else options.cameras
    # `verify` decodes all images and all depth; without it, the first and last ones are decoded
    demo = reference.read(images=not options.verify, cameras=needed, uncalibrated=options.uncalibrated)
    missing = [camera for camera in needed if camera not in demo.cameras]
    if missing and (reason := demo.source.get("uncalibrated", {}).get(missing[0])):
        raise DemoError(demo.name, f"camera {missing[0]!r} is not calibrated, which this model needs: {reason}")
    if missing:
        raise DemoError(demo.name, missing_camera(demo, missing[0]))
    absent = [arm for arm in options.arms if arm not in demo.arms]
    if absent:
        raise DemoError(demo.name, f"it has no arm {absent[0]!r}; it has {', '.join(demo.arms)}")
    if options.verify:
        return demo
    if options.depth:
        for name in needed:
            check_depth(demo.name, name, demo.cameras[name], len(demo))
    return _without_damaged(demo, [name for name in options.cameras if name not in needed], options.depth)


def _without_damaged(demo: Demo, cameras: Sequence[str], depth: bool) -> Demo:
    """Return the demo without those of `cameras` whose first or last image, or depth if used, cannot be used."""
    damaged: dict[str, str] = {}
    for name in cameras:
        if name in demo.cameras:
            try:
                check_images(demo.name, name, demo.cameras[name], len(demo))
                if depth:
                    check_depth(demo.name, name, demo.cameras[name], len(demo))
            except DemoError as error:
                damaged[name] = error.reason
    return _without_views(demo, damaged)


def _without_views(demo: Demo, damaged: dict[str, str]) -> Demo:
    """Return the demo without the damaged cameras, which are logged and recorded in its `source`."""
    for name, reason in damaged.items():
        log.warning("demo %r: camera %r is masked: %s", demo.name, name, reason)
    if not damaged:
        return demo
    sound = {name: track for name, track in demo.cameras.items() if name not in damaged}
    return replace(demo, cameras=sound, source=demo.source | {"damaged": damaged})


def _drop_damaged(read: ReadDemos, options: ReadingOptions, cache_dir: Path) -> None:
    """Leave out the demonstrations whose files or frames are damaged. If the model masks views, damage to the files of
    a camera other than the first removes only that camera."""
    verdicts = verify(read.demos, options.cameras, options.depth, cache_dir)
    sound_demos = []
    for demo, verdict in zip(read.demos, verdicts, strict=True):
        problem, views = verdict.problem, verdict.views
        if problem is None and views and not options.masks_views:
            problem = next(iter(views.values()))
        if problem is not None:
            read.broken.append(DemoError(demo.name, problem))
            continue
        sound_demos.append(_without_views(demo, views))
        read.contents[demo.name] = verdict.content
    read.demos = sound_demos
