"""Shards of robot videos: simulated tours and demonstrations, and recorded demonstrations of any known format."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from keygrip.config import config_folder, leaves_of
from keygrip.cores import usable_cores
from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.schema import Demo, missing_camera
from keygrip.data.robot.split import split_demos
from keygrip.data.shards.keys import sample_key
from keygrip.data.shards.set_writer import MadeSample, write_shards
from keygrip.data.spacing import evenly
from keygrip.data.untrusted_files import read_json
from keygrip.data.video_text.conversations import (
    MAX_FRAMES,
    answer,
    caption,
    describe_video_text,
    encode_jpeg,
    fit_image,
    rate_of,
    shard_frame_settings,
    video_text_parts,
)
from keygrip.data.video_text.sample_types import Conversation
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.envs.yam.tours import TourCell, TourOptions, describe
from keygrip.recording.demonstrations import record
from keygrip.recording.split_seeds import FIRST_SEEDS, split_seeds

log = logging.getLogger(__name__)

TOUR_QUALITY = 95  # JPEG quality; lower values blur small digits
TOURS, DEMOS = "tours", "demos"
# Questions about one camera's image; other questions are about the motion, independent of the camera.
OF_ONE_CAMERA = frozenset({"side_of_goal", "side_of_object", "nearest", "count", "shape", "digit", "goal_colour"})


def conversations_of(text: Mapping[str, Any], without: Collection[str] = ()) -> list[Conversation]:
    """Return a demo's `text.json`: its captions of the whole video, and its questions except kinds in `without`."""
    captions = [
        caption(c["text"], c.get("evidence"))
        for c in text.get("captions", [])
        if c.get("kind", "video") in ("caption", "video")
    ]
    questions = [
        answer(q["question"], q["answer"], q["kind"], q.get("evidence"))
        for q in text.get("questions", [])
        if q["kind"] not in without
    ]
    return captions + questions


# ---- tours -----------------------------------------------------------------------------------------------------------


@dataclass
class TourMaker:
    """Create the sample of a tour's seed."""

    options: TourOptions
    _cell: TourCell | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "_cell": None}

    def __call__(self, seed: int) -> Iterable[MadeSample]:
        self._cell = self._cell or TourCell(self.options)
        tour = self._cell.tour(seed)
        frames = [encode_jpeg(frame, TOUR_QUALITY) for frame in tour.frames]
        yield MadeSample(f"tour-{seed:07d}", *video_text_parts(frames, conversations_of(describe(tour)), TOURS))


def make_tours(root: Path | str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Record tours into `<root>/train`, `val` and `test`; no seed is in two splits.

    Args:
        root: folder of the splits.
        options: `train`, `val`, `test` (numbers of videos), `videos_per_shard`, `processes` (None: one per core),
            `tour`: the fields of :class:`keygrip.envs.yam.tours.TourOptions`, and `even_lengths`: the splits with
            equally many short and long tours, see `TourOptions.even_lengths`.

    Raises:
        ValueError: `even_lengths` contains an unknown split.

    Returns:
        samples by split and seconds.
    """
    tour_options, even = TourOptions(**(options.get("tour") or {})), list(options.get("even_lengths") or [])
    if set(even) - set(FIRST_SEEDS):
        raise ValueError(f"even_lengths={even} names splits; these are {', '.join(FIRST_SEEDS)}")
    report: dict[str, Any] = {"root": str(root), "wall_s": 0.0}
    for split, seeds in split_seeds(options).items():
        if not seeds:
            continue
        tour = replace(tour_options, even_lengths=True) if split in even else tour_options
        written = write_shards(
            Path(root) / split,
            seeds,
            TourMaker(tour),
            {"tour": tour.as_dict(), "first_seed": seeds.start},
            int(options.get("videos_per_shard", 100)),
            TOURS,
            options.get("processes"),
            describe=describe_video_text,
        )
        report |= {split: written.samples}
        report["wall_s"] = round(report["wall_s"] + written.wall_s, 1)
    return report


# ---- demonstrations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoMaker:
    """Create the sample of a demonstration: one frame per second, at most `max_frames`, and its instruction as caption
    if it has no text. If the text describes another camera, questions about the scene are left out."""

    camera: str | None
    image_size: int
    fit: str
    max_frames: int = MAX_FRAMES

    def __call__(self, reference: Any) -> Iterable[MadeSample]:
        camera = self.camera or _first_camera(reference.read(images=False, uncalibrated=True))
        demo = reference.read(cameras=(camera,), uncalibrated=True)  # a video needs no calibration
        if camera not in demo.cameras:
            raise ValueError(missing_camera(demo, camera))
        frame_indices = np.arange(0, len(demo), max(demo.fps, 1e-6)).round().astype(int)
        fps = 1.0
        if len(frame_indices) > self.max_frames:
            frame_indices = np.array(evenly(len(demo), self.max_frames))
            fps = rate_of(frame_indices / demo.fps)
        source = demo.cameras[camera].frames
        frames = [
            encode_jpeg(fit_image(Image.fromarray(source.read(int(n))), self.image_size, self.fit), TOUR_QUALITY)
            for n in np.minimum(frame_indices, len(demo) - 1)
        ]
        path = demo.path / "text.json"
        text = read_json(path) if path.is_file() else {}
        if not isinstance(text, dict):
            raise BadSample(path, "it holds no object of JSON")
        text_camera = text.get("camera") or camera  # texts of other sources contain no camera
        if text_camera != camera:
            _warn_of_omitted_questions(camera, text_camera)
        with convert_errors(path):
            conversations = conversations_of(text, () if text_camera == camera else OF_ONE_CAMERA)
        if not any(c.kind == "caption" for c in conversations) and demo.instruction:
            sentence = demo.instruction[0].upper() + demo.instruction[1:].rstrip(".") + "."
            conversations.insert(0, caption(sentence, request="What is the robot told to do?"))
        yield MadeSample(sample_key(demo.name), *video_text_parts(frames, conversations, DEMOS, fps))


def _first_camera(demo: Demo) -> str:
    """Return the first calibrated camera, or the first of all if none is calibrated."""
    return min(demo.cameras, key=lambda name: bool(demo.cameras[name].uncalibrated))


@cache  # once per process
def _warn_of_omitted_questions(camera: str, described: str) -> None:
    log.warning(
        "videos of camera %s: questions about the scene (%s) are left out, since the recording's text describes what "
        "its camera %s shows",
        camera,
        ", ".join(sorted(OF_ONE_CAMERA)),
        described,
    )


def robot_videos(
    source: Path | str | None,
    root: Path | str,
    format: str = "auto",
    camera: str | None = None,
    image_size: int = 224,
    fit: str = "pad",
    val_fraction: float = 0.1,
    videos_per_shard: int = 100,
    processes: int | None = None,
    calibration: str | Path | None = None,
    simulated: Mapping[str, Any] | None = None,
    max_frames: int = MAX_FRAMES,
) -> dict[str, Any]:
    """Write shards of recorded demonstrations, one frame per second, with their captions and questions.

    Args:
        source: folder of demonstrations of any known format; None: tours from the simulator, with the options
            `simulated` (see :func:`make_tours`). root: receives `train/` and `val/`.
        camera: camera of the images; None: each demo's first calibrated camera, or its first. A simulated recording's
            text describes its first recorded camera; for another camera, questions about the scene are left out.
            image_size, fit: of the images.
        val_fraction: whole demos, by the same rule as for training a policy.
        max_frames: longer demonstrations are reduced to that many evenly spaced frames.

    Raises:
        FileNotFoundError, ValueError: There are no demonstrations, or too many are broken; max_frames is out of range;
            a setting of demonstrations is given for tours, or one of tours for demonstrations.
    """
    frames = shard_frame_settings(image_size, fit, max_frames)
    if source is None and "max_frames" in frames:
        raise ValueError(
            f"max_frames={max_frames} is of demonstrations, and no source of any is named: tours have from "
            "simulated.tour.min_frames to simulated.tour.max_frames frames"
        )
    if source is None:
        given = {"format": format, "camera": camera, "fit": fit, "val_fraction": val_fraction}
        _refuse_settings_of_demonstrations({**given, "calibration": calibration})
        return make_tours(root, {**(simulated or {}), "videos_per_shard": videos_per_shard, "processes": processes})
    _refuse_settings_of_tours(simulated or {}, image_size, source)
    references = find_demos(source, format, calibration, "source=PATH")
    train, val = split_demos([reference.name for reference in references], val_fraction, 0)
    report: dict[str, Any] = {"root": str(root), "wall_s": 0.0, "failed": 0}
    maker = DemoMaker(camera, image_size, fit, max_frames)
    settings = {"source": str(source), "format": format, "camera": camera, **frames}
    for split, indices in (("train", train), ("val", val)):
        if not indices:
            continue
        items = [references[n] for n in indices]
        folder = Path(root) / split
        written = write_shards(
            folder, items, maker, settings, videos_per_shard, DEMOS, processes, describe=describe_video_text
        )
        report |= {split: written.samples, "failed": report["failed"] + written.failed}
        report["wall_s"] = round(report["wall_s"] + written.wall_s, 1)
    return report


def _refuse_settings_of_demonstrations(given: Mapping[str, Any]) -> None:
    """Reject settings that tours do not read and that differ from the defaults: `source` was probably forgotten."""
    usual = inspect.signature(robot_videos).parameters
    for name, value in given.items():
        if value != usual[name].default:
            raise ValueError(
                f"{name}={value} is of demonstrations, and no source of any is named, so that tours would be written: "
                f"give source=FOLDER, or leave {name} out"
            )


def _refuse_settings_of_tours(simulated: Mapping[str, Any], image_size: int, source: Path | str) -> None:
    """Reject options of tours that differ from those of `step=robot_videos`: demonstrations do not read them."""
    if not simulated:
        return
    step: Any = OmegaConf.load(config_folder() / "step" / "robot_videos.yaml")
    step.image_size = image_size  # the tours of the step have the same
    own, usual = (
        dict(leaves_of(options, ("simulated",)))
        for options in (dict(simulated), OmegaConf.to_container(step.simulated, resolve=True))
    )
    for path in own | usual:
        if own.get(path) != usual.get(path):
            raise ValueError(
                f"{'.'.join(path)}={own.get(path)} is of tours, and source={source} names demonstrations, which do not "
                "read it: leave one of the two out"
            )


def make_demos(root: Path | str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Record demonstrations in the simulator and write them as shards, with separate seeds for every split.

    Args:
        root: folder of the splits; the demonstrations are written to `<root>/demos-<split>`.
        options: `train`, `val`, `test` (numbers of videos), `videos_per_shard`, `image_size`, `processes`, and `task`:
            the fields of :class:`keygrip.envs.yam.tasks.TaskOptions`.
    """
    task = TaskOptions(**(options.get("task") or {}))
    size, processes = int(options["image_size"]), options.get("processes")
    report: dict[str, Any] = {"root": str(root), "wall_s": 0.0}
    for split, seeds in split_seeds(options).items():
        if not seeds:
            continue
        recorded = record(
            task,
            Path(root) / f"demos-{split}",
            len(seeds),
            seed=seeds.start,
            image_size=size,
            processes=processes or usable_cores(),
        )
        references = find_demos(recorded.root, "native")[: len(seeds)]
        settings = {"task": task.as_dict(), "image_size": size, "first_seed": seeds.start}
        maker = DemoMaker(task.camera, size, "stretch")
        per_shard = int(options.get("videos_per_shard", 100))
        written = write_shards(
            Path(root) / split, references, maker, settings, per_shard, DEMOS, processes, describe=describe_video_text
        )
        report |= {split: written.samples}
        report["wall_s"] = round(report["wall_s"] + written.wall_s + recorded.seconds, 1)
    return report


# ---- text alone ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextMaker:
    """Create a text-only sample of a seed: a story about a gripper and cubes, and a question about it."""

    def __call__(self, seed: int) -> Iterable[MadeSample]:
        yield MadeSample(f"text-{seed:07d}", *video_text_parts([], [story(seed)], "robot_texts"))


def story(seed: int) -> Conversation:
    """Return a few sentences and a question that they answer. A pure function of the seed."""
    rng = np.random.default_rng([seed, 7])
    colours = ("red", "blue", "green", "yellow", "purple", "orange", "white")
    count = int(rng.integers(2, 6))
    order = [colours[n] for n in rng.permutation(len(colours))[:count]]
    digits = [int(n) for n in rng.integers(0, 10, count)]
    digit_sentences = [
        f"The {colour} cube carries the digit {digit}." for colour, digit in zip(order, digits, strict=True)
    ]
    visits = [order[n] for n in rng.permutation(count)]
    walk_sentence = "A robot arm points at " + ", then at ".join(f"the {colour} cube" for colour in visits) + "."
    pick = int(rng.integers(count))
    kind = int(rng.integers(4))
    if kind == 0:
        text, question, reply = (
            " ".join(digit_sentences),
            f"Which digit is on the {order[pick]} cube?",
            str(digits[pick]),
        )
    elif kind == 1:
        question, reply = ("At which cube does the arm point first?", visits[0])
        text = walk_sentence
    elif kind == 2:
        question, reply = ("At which cube does the arm point last?", visits[-1])
        text = walk_sentence
    else:
        text, question, reply = walk_sentence, "How many cubes does the arm point at?", str(count)
    return answer(f"{text} {question}", reply, "text", {"seed": seed})


def make_texts(root: Path | str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write text-only samples, which exercise the text path when SmolTalk is not available.

    Args:
        root: folder of the splits. options: `train`, `val`, `test` (numbers of samples).
    """
    report: dict[str, Any] = {"root": str(root)}
    for split, seeds in split_seeds(options).items():
        if seeds:
            written = write_shards(
                Path(root) / split,
                seeds,
                TextMaker(),
                {"first_seed": seeds.start},
                1000,
                "texts",
                1,
                describe=describe_video_text,
            )
            report |= {split: written.samples}
    return report
