"""Finds rotated and mirrored images, by the robot's silhouette or, for an arm without a model, its gripper's motion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.registration import NUMBERS, halved, silhouette
from keygrip.data.robot.doctor.seen import Seen
from keygrip.data.robot.doctor.silhouettes import agreement
from keygrip.data.robot.doctor.views import Placement, View, make_view

POOR, FLIP_MARGIN = 0.3, 0.12  # agreement below which flips are tried, and the gain that a flip needs
# For the gripper alone, a small part of what moves: images per demo, least number of demos, share of demos that must
# agree, mean agreement that a flip needs, and its margin over the mean agreement as recorded. In clean recordings
# no flip agrees better than the images as recorded.
OWN_FRAMES, OWN_DEMOS, OWN_SHARE, OWN_AGREEMENT, OWN_MARGIN = 24, 3, 0.8, 0.14, 0.08

FLIPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored left-right": lambda images: images[:, :, ::-1],
    "mirrored up-down": lambda images: images[:, ::-1],
    "turned by 180 degrees": lambda images: images[:, ::-1, ::-1],
    "turned by 90 degrees clockwise": lambda images: images.swapaxes(1, 2)[:, ::-1],
    "turned by 90 degrees anticlockwise": lambda images: images.swapaxes(1, 2)[:, :, ::-1],
    "transposed": lambda images: images.swapaxes(1, 2),
    "transposed and turned by 180 degrees": lambda images: images.swapaxes(1, 2)[:, ::-1, ::-1],
}


def _tried(view: View, robot: Placement) -> dict[str, float]:
    """Return the agreement of a view's images with the robot after each rotation or mirroring; "": unchanged."""
    square = view.size[0] == view.size[1]
    expected, shown = silhouette(view, robot, np.zeros(NUMBERS)), halved(view.foreground)
    flips = {
        flip: agreement(expected, change(shown))
        for flip, change in FLIPS.items()
        if square or ("90" not in flip and "transposed" not in flip)
    }
    return {"": agreement(expected, shown)} | flips


def check_flips(exam: Examination, seen: Seen) -> set[str]:
    """Report demos whose images agree with the poses only after a rotation or mirroring. Return their names."""
    names: dict[str, list[str]] = {}
    usual = float(np.median(list(seen.scores.values())))
    for name, (view, robot) in seen.pairs.items():
        own = seen.scores[name]
        if own > POOR and own > 0.6 * usual:
            continue
        tried = _tried(view, robot)
        tried.pop("")
        best = max(tried, key=lambda flip: tried[flip])
        if tried[best] > own + FLIP_MARGIN and tried[best] > 1.5 * own and tried[best] > 0.2:
            names.setdefault(best, []).append(name)
    flipped: set[str] = set()
    for flip, demos in sorted(names.items(), key=lambda entry: -len(entry[1])):
        if len(demos) < max(1, round(0.25 * len(seen.pairs))) and usual < POOR:
            continue  # if all demos agree poorly, a few flips agree by chance
        flipped |= set(demos)
        own = float(np.mean([seen.scores[name] for name in demos]))
        _add(exam, seen, flip, demos, "the robot in the images moves as the poses say", own)
    return flipped


def check_own_motion(
    exam: Examination, seen: Seen, small_images: Mapping[tuple[str, str], dict[int, np.ndarray]]
) -> None:
    """Report flips of all demos from the gripper's motion alone, if the arm's shape is not known.

    Most of what moves in the images is not the gripper: agreement is poor in correct recordings, too, and is no
    evidence about a single demo. Rotated or mirrored images that agree clearly better in nearly all demos are evidence.
    """
    if len(seen.pairs) < OWN_DEMOS:
        return
    tried = []
    for name, (view, robot) in seen.pairs.items():
        more = make_view(view.demo, seen.camera, OWN_FRAMES, small_images.get((name, seen.camera)))
        tried.append(_tried(more, robot))
    common = [flip for flip in tried[0] if all(flip in scores for scores in tried)]  # images may differ in shape
    mean = {flip: float(np.mean([scores[flip] for scores in tried])) for flip in common}
    best = max(mean, key=lambda flip: mean[flip])
    wins = sum(scores[best] > scores[""] for scores in tried)
    enough = mean[best] > OWN_AGREEMENT and mean[best] > max(mean[""] + OWN_MARGIN, 2 * mean[""])
    exam.measures[f"camera/{seen.camera}/arm/{seen.arm}/agreement_by_flip"] = {
        flip or "as recorded": round(value, 3) for flip, value in mean.items()
    }
    if enough and wins >= OWN_SHARE * len(tried):
        _add(exam, seen, best, list(seen.pairs), "what moves in the images goes along with the gripper", mean[""])


def _add(exam: Examination, seen: Seen, flip: str, demos: list[str], what: str, own: float) -> None:
    exam.add(
        "flipped_images",
        "error",
        f"{what} only if the images are undone as {flip} (agreement {own:.2f} as they are)",
        "Undo this before writing the images, or describe it in camera poses and intrinsics",
        cause=f"images {flip}",
        camera=seen.camera,
        arm=seen.arm,
        demos=demos,
    )
