"""Checks of a camera's images: dark, bright or frozen images, outliers, and exchanged red and blue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from keygrip.data.robot.doctor.examination import MOVED_M, Examination, tensor
from keygrip.data.robot.doctor.views import is_static, read_shrunk, readable_frames
from keygrip.data.robot.schema import Demo, DemoError, demo_guard
from keygrip.data.spacing import evenly
from keygrip.models.geometry.cameras import project

DARK, BRIGHT = 8.0, 247.0  # mean grey level of an image
CHANGED_PIXEL, CHANGED_SHARE = 8, 1e-4  # an image differs where this share of pixels changes by this many levels
BESIDE = 0.15  # share of the image's size by which a gripper may lie outside of it
SPAN_PIXELS = 2.5  # pixels of the small images by which the gripper must move during a frozen span
SPAN = 3  # identical frames in a row while the gripper moves: a stream that hung, not a repeated frame
# Grey levels by which an image differs from both neighbours, and the ratio to the difference between the neighbours.
OUTLIER_LEVELS, OUTLIER_RATIO = 6.0, 3.0
# Grey levels by which a demo's images differ from other demos, and the share left with red and blue exchanged.
EXCHANGED_LEVELS, EXCHANGED_RATIO = 6.0, 0.4
# Hues (degrees) of colour words that change when red and blue are exchanged.
HUES = {"red": 0, "orange": 30, "gold": 48, "yellow": 50, "teal": 182, "cyan": 185, "blue": 230}
HUE_WIDTH = 25.0
# Text after these words describes where the gripped object lies or goes, not the object.
PLACE_WORDS = (
    r"\b(?:into|onto|inside|in|on|to|towards?|next|near|beside|behind|under|over|above|at|from|with|by|off|and)\b"
)
PATCH_M = 0.035  # half edge of the patch around the gripped object


@dataclass(frozen=True)
class Stream:
    """Small images of a camera in a demo, in order: [F] frame numbers, [F, h, w, 3] uint8."""

    index: np.ndarray
    images: np.ndarray


def read_stream(demo: Demo, camera: str) -> Stream:
    """Read the frames of a demo's camera as small images, see `readable_frames`.

    Raises:
        DemoError: a frame cannot be read, or has another size than the recording states.
    """
    index, images = readable_frames(demo), []
    for frame in index.tolist():
        with demo_guard(demo.name, f"camera {camera!r}: frame {frame} cannot be used: "):
            images.append(read_shrunk(demo.cameras[camera], frame))
    return Stream(index, np.stack(images))


def _read_streams(exam: Examination, camera: str) -> Iterator[tuple[Demo, Stream]]:
    """Yield the demos of a camera with its images; then remove the camera from demos whose images cannot be used, with
    one finding for all of them."""
    demos = exam.with_camera(camera)
    errors: list[DemoError] = []
    for demo in demos:
        try:
            stream = read_stream(demo, camera)
        except DemoError as error:
            errors.append(error)
            continue
        yield demo, stream
    if not errors:
        return
    names = [error.name for error in errors]
    exam.add(
        "broken_image",
        "error",
        f"{len(errors)} of {len(demos)} demos have an image that cannot be used; the first: {errors[0].reason}",
        "Record them again or remove them; training leaves them out, or this camera of them if the model masks views",
        cause="damaged images, or images of another size",
        camera=camera,
        demos=names,
    )
    exam.demos = [
        replace(demo, cameras={name: track for name, track in demo.cameras.items() if name != camera})
        if demo.name in names
        else demo
        for demo in exam.demos
    ]


def check_images(exam: Examination, camera: str) -> dict[str, Stream]:
    """Run all checks of one camera's images; return the images that were read, for the comparison with poses. Demos
    with an image that cannot be used are reported, and continue without this camera."""
    dark, bright = [], []
    frozen: dict[str, list[int]] = {}
    outliers_by_demo: dict[str, list[int]] = {}
    levels, streams = [], {}
    for demo, stream in _read_streams(exam, camera):
        images = stream.images
        mean = float(images[evenly(len(images), exam.frames_per_demo)].mean())
        levels.append(mean)
        if mean < DARK:
            dark.append(demo.name)
        elif mean > BRIGHT:
            bright.append(demo.name)
        changed = changed_shares(images)
        exam.activity[demo.name, camera] = stream.index, changed
        still_frames = _still_frames(demo, camera, stream, changed)
        if still_frames:
            frozen[demo.name] = still_frames
        outliers = _outlier_frames(stream)
        if outliers:
            outliers_by_demo[demo.name] = outliers
        kept_indices = evenly(len(images), 3 * exam.frames_per_demo)
        streams[demo.name] = Stream(stream.index[kept_indices], images[kept_indices])
    if levels:
        exam.measures[f"camera/{camera}/mean_level"] = float(np.mean(levels))
    rows: list[tuple[str, list[str], str, str, str]] = [
        ("dark_camera", dark, "black", "Check the cable, the lens cap and the exposure", "no light or no signal"),
        ("bright_camera", bright, "white", "Lower the exposure or the gain", "overexposed"),
    ]
    for check, names, colour, advice, cause in rows:
        if names:
            message = f"the images are almost {colour}"
            exam.add(check, "error", message, advice, cause=cause, camera=camera, demos=names)
    if frozen:
        name, frames = next(iter(frozen.items()))
        exam.add(
            "frozen_camera",
            "error",
            f"the image stands still while the gripper moves, in {name} at frames {frames[0]} to {frames[-1]}",
            "The stream hung: leave these demos out and check the camera's cable and bandwidth",
            cause=f"frozen span of {len(frames)} frames",
            camera=camera,
            demos=frozen,
            frames=frames,
        )
    if outliers_by_demo:
        name, frames = next(iter(outliers_by_demo.items()))
        exam.add(
            "outlier_image",
            "error",
            f"single images differ from both neighbours, which agree: {name} at frame "
            f"{', '.join(map(str, frames[:5]))}",
            "A frame of another moment or a damaged one: replace it by its neighbour or cut the demo there",
            cause="outlier image",
            camera=camera,
            demos=outliers_by_demo,
            frames=frames,
        )
    _check_colour_order(exam, camera, streams)
    return streams


def changed_shares(images: np.ndarray) -> np.ndarray:
    """Return the share of pixels that change from each image [F, h, w, 3] to the next, [F - 1]."""
    shares = np.empty(len(images) - 1)
    for i in range(len(shares)):
        difference = np.abs(images[i + 1].astype(np.int16) - images[i]).max(axis=-1)
        shares[i] = (difference > CHANGED_PIXEL).mean()
    return shares


def _still_frames(demo: Demo, camera: str, stream: Stream, changed: np.ndarray) -> list[int]:
    """Return frames of spans in which nothing in the image changes while a gripper in it, or the camera, moves. For an
    uncalibrated camera neither motion is known, and no frames are returned."""
    track, index = demo.cameras[camera], stream.index
    if track.uncalibrated:
        return []
    scale = stream.images.shape[2] / track.width
    motion = np.zeros(len(index) - 1)
    for arm in demo.arms.values():
        pixels, _ = project(
            tensor(arm.position[index]), tensor(track.intrinsics[index]), tensor(track.world_to_camera[index])
        )
        scaled_pixels = pixels.numpy() * scale
        size = np.array([stream.images.shape[2], stream.images.shape[1]])
        # its arm is still visible
        inside = ((scaled_pixels > -BESIDE * size) & (scaled_pixels < (1 + BESIDE) * size)).all(axis=1)
        step = np.linalg.norm(np.diff(scaled_pixels, axis=0), axis=1)
        motion = np.maximum(motion, np.where(inside[1:] & inside[:-1], np.nan_to_num(step), 0))
    pose = np.asarray(track.world_to_camera)[index]
    camera_motion = np.linalg.norm(
        np.diff(-(pose[:, :3, :3].transpose(0, 2, 1) @ pose[:, :3, 3:])[..., 0], axis=0), axis=1
    )
    motion = np.maximum(motion, camera_motion * 200)  # one centimetre of camera motion counts as two pixels
    arm_motion = max(float(np.linalg.norm(np.ptp(arm.position, axis=0))) for arm in demo.arms.values())
    if arm_motion < MOVED_M:
        return []
    if not is_static(demo, camera):
        # a wrist camera may see only a uniform table: only an exactly equal image counts as repeated
        pairs = pairwise(stream.images)
        changed = np.array([float(not np.array_equal(previous, following)) for previous, following in pairs])
    repeated = changed < CHANGED_SHARE
    frames: list[int] = []
    run: list[int] = []
    path = np.concatenate([[0.0], np.cumsum(motion)])
    for i, flag in enumerate([*repeated, False]):
        if flag:
            run.append(int(index[i + 1]))
        else:
            neighbour_shares = [changed[j] for j in (i - len(run) - 1, i) if 0 <= j < len(changed)]
            run_motion = path[i] - path[i - len(run)]
            if len(run) >= SPAN and run_motion > SPAN_PIXELS and min(neighbour_shares, default=1.0) > 5 * CHANGED_SHARE:
                frames += run
            run = []
    return frames


def _outlier_frames(stream: Stream) -> list[int]:
    """Return frames whose image differs from both neighbours while the neighbours agree."""
    if len(stream.images) < 5:
        return []
    small = stream.images[:, ::2, ::2].astype(np.float32)
    deviation = np.abs(small[1:-1] - (small[:-2] + small[2:]) / 2).mean(axis=(1, 2, 3))
    neighbour_distance = np.abs(small[2:] - small[:-2]).mean(axis=(1, 2, 3))
    usual_deviation = float(np.median(deviation))
    outliers = (
        (deviation > OUTLIER_LEVELS)
        & (deviation > OUTLIER_RATIO * neighbour_distance)
        & (deviation > 4 * usual_deviation)
    )
    return [int(stream.index[i + 1]) for i in np.flatnonzero(outliers)]


def _check_colour_order(exam: Examination, camera: str, streams: dict[str, Stream]) -> None:
    """Report exchanged red and blue: in some demos compared with the others, or in all compared with instructions."""
    medians = {name: np.median(stream.images[::2], axis=0)[::2, ::2] for name, stream in streams.items()}
    shapes = {median.shape for median in medians.values()}
    exchanged: list[str] = []
    if len(shapes) == 1 and len(medians) >= 3:
        overall_median = np.median(np.stack(list(medians.values())), axis=0)
        for name, median in medians.items():
            difference = float(np.abs(median - overall_median).mean())
            swapped_difference = float(np.abs(median[..., ::-1] - overall_median).mean())
            if difference > EXCHANGED_LEVELS and swapped_difference < EXCHANGED_RATIO * difference:
                exchanged.append(name)
    votes = {demo.name: _vote(demo, camera, streams[demo.name]) for demo in exam.with_camera(camera)}
    cast_votes = [vote for name, vote in votes.items() if vote and name not in exchanged]
    votes_against = sum(vote < 0 for vote in cast_votes)
    exam.measures[f"camera/{camera}/colour_votes"] = [len(cast_votes) - votes_against, votes_against]
    everywhere = votes_against >= 2 and votes_against >= 0.8 * len(cast_votes)
    names = list(streams) if everywhere else exchanged
    if names:
        # if objects of several colours contradict their instructions, the reason is not one wrong word
        contradicted = {_colour_of_object(d.instruction) for d in exam.demos if votes.get(d.name, 0) < 0}
        certain = not everywhere or len(contradicted) > 1
        exam.add(
            "colour_order",
            "error" if certain else "warning",
            "red and blue are exchanged: "
            + (
                "what the instructions name has the exchanged colour" if everywhere else "other demos show it otherwise"
            ),
            "The images were written as BGR: reverse the channels (OpenCV reads and writes BGR)"
            if certain
            else "Look at the contact sheet first: instructions alone say so, and their colour word may be wrong. "
            "Where the images were written as BGR, reverse the channels (OpenCV reads and writes BGR)",
            cause="colour order BGR",
            camera=camera,
            demos=names,
        )


def _colour_of_object(instruction: str) -> str | None:
    """Return the colour word of the object that an instruction names for gripping; None: there is none, or several,
    before the words for the target place (which has a colour of its own)."""
    object_phrase = re.split(PLACE_WORDS, instruction.lower())[0]
    words = {word for word in re.findall(r"[a-z]+", object_phrase) if word in HUES}
    return words.pop() if len(words) == 1 else None


def _vote(demo: Demo, camera: str, stream: Stream) -> int:
    """Return 1 if the object gripped first has the colour stated in the instruction, -1 if it has that colour with red
    and blue exchanged, 0 if neither is certain."""
    word = _colour_of_object(demo.instruction)
    if word is None or not demo.arms or demo.cameras[camera].uncalibrated:
        return 0
    arm = next(iter(demo.arms.values()))
    closing = np.flatnonzero(arm.gripper < arm.gripper[0] - 0.3)
    grasp_position = arm.position[closing[0] if len(closing) else -1]
    track, first_frame = demo.cameras[camera], int(stream.index[0])
    pixels, depth = project(
        tensor(grasp_position),
        tensor(np.asarray(track.intrinsics)[first_frame]),
        tensor(np.asarray(track.world_to_camera)[first_frame]),
    )
    scale = stream.images.shape[2] / track.width
    x, y = (pixels.numpy() * scale).tolist()
    radius = PATCH_M * float(track.intrinsics[first_frame, 0, 0]) * scale / max(float(depth), 0.05)
    if not (np.isfinite([x, y]).all() and 0 <= x < stream.images.shape[2] and 0 <= y < stream.images.shape[1]):
        return 0
    top, left = max(0, round(y - radius)), max(0, round(x - radius))
    patch = stream.images[0, top : round(y + radius) + 1, left : round(x + radius) + 1].reshape(-1, 3).astype(float)
    stated, swapped = _count_pixels_of_hue(patch, HUES[word]), _count_pixels_of_hue(patch[:, ::-1], HUES[word])
    if max(stated, swapped) < max(4, 0.04 * len(patch)):
        return 0
    return 1 if stated > 3 * swapped else -1 if swapped > 3 * stated else 0


def _count_pixels_of_hue(pixels: np.ndarray, hue: float) -> int:
    """Return the number of saturated pixels among `pixels` [M, 3] that have a hue (degrees)."""
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    chroma = np.maximum(high - low, 1e-6)
    r, g, b = pixels.T
    angle = np.where(high == r, (g - b) / chroma % 6, np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    hue_distance = np.abs((angle * 60 - hue + 180) % 360 - 180)
    return int(((hue_distance < HUE_WIDTH) & (high - low > 0.45 * high) & (high > 50)).sum())
