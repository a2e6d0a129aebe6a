"""Finds rotated and mirrored images, by the robot's silhouette or, for an arm without a model, its gripper's motion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from keygrip.data.robot.doctor.compared_camera import ComparedCamera
from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.registration import NUMBERS, silhouette
from keygrip.data.robot.doctor.silhouettes import agreement, average_blocks
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


def _agreement_by_flip(view: View, robot: Placement) -> dict[str, float]:
    """Return the agreement of a view's images with the robot after each rotation or mirroring; "": unchanged."""
    square = view.size[0] == view.size[1]
    expected, observed = silhouette(view, robot, np.zeros(NUMBERS)), average_blocks(view.foreground, 2)
    flips = {
        flip: agreement(expected, change(observed))
        for flip, change in FLIPS.items()
        if square or ("90" not in flip and "transposed" not in flip)
    }
    return {"": agreement(expected, observed)} | flips


def check_flips(exam: Examination, compared: ComparedCamera) -> set[str]:
    """Report demos whose images agree with the poses only after a rotation or mirroring. Return their names."""
    demos_by_flip: dict[str, list[str]] = {}
    usual_score = float(np.median(list(compared.scores.values())))
    for name, (view, robot) in compared.pairs.items():
        score = compared.scores[name]
        if score > POOR and score > 0.6 * usual_score:
            continue
        scores_by_flip = _agreement_by_flip(view, robot)
        scores_by_flip.pop("")
        best = max(scores_by_flip, key=lambda flip: scores_by_flip[flip])
        if (
            scores_by_flip[best] > score + FLIP_MARGIN
            and scores_by_flip[best] > 1.5 * score
            and scores_by_flip[best] > 0.2
        ):
            demos_by_flip.setdefault(best, []).append(name)
    flipped: set[str] = set()
    for flip, demos in sorted(demos_by_flip.items(), key=lambda entry: -len(entry[1])):
        if len(demos) < max(1, round(0.25 * len(compared.pairs))) and usual_score < POOR:
            continue  # if all demos agree poorly, a few flips agree by chance
        flipped |= set(demos)
        score = float(np.mean([compared.scores[name] for name in demos]))
        _add_flip_finding(exam, compared, flip, demos, "the robot in the images moves as the poses say", score)
    return flipped


def check_own_motion(
    exam: Examination, compared: ComparedCamera, small_images: Mapping[tuple[str, str], dict[int, np.ndarray]]
) -> None:
    """Report flips of all demos from the gripper's motion alone, if the arm's shape is not known.

    Most of what moves in the images is not the gripper: agreement is poor in correct recordings, too, and is no
    evidence about a single demo. Rotated or mirrored images that agree clearly better in nearly all demos are evidence.
    """
    if len(compared.pairs) < OWN_DEMOS:
        return
    flip_scores = []
    for name, (view, robot) in compared.pairs.items():
        denser_view = make_view(view.demo, compared.camera, OWN_FRAMES, small_images.get((name, compared.camera)))
        flip_scores.append(_agreement_by_flip(denser_view, robot))
    # images may differ in shape
    common = [flip for flip in flip_scores[0] if all(flip in scores for scores in flip_scores)]
    mean_scores = {flip: float(np.mean([scores[flip] for scores in flip_scores])) for flip in common}
    best = max(mean_scores, key=lambda flip: mean_scores[flip])
    wins = sum(scores[best] > scores[""] for scores in flip_scores)
    clear_gain = mean_scores[best] > OWN_AGREEMENT and mean_scores[best] > max(
        mean_scores[""] + OWN_MARGIN, 2 * mean_scores[""]
    )
    exam.measures[f"camera/{compared.camera}/arm/{compared.arm}/agreement_by_flip"] = {
        flip or "as recorded": round(value, 3) for flip, value in mean_scores.items()
    }
    if clear_gain and wins >= OWN_SHARE * len(flip_scores):
        _add_flip_finding(
            exam,
            compared,
            best,
            list(compared.pairs),
            "what moves in the images goes along with the gripper",
            mean_scores[""],
        )


def _add_flip_finding(
    exam: Examination, compared: ComparedCamera, flip: str, demos: list[str], message: str, recorded_agreement: float
) -> None:
    exam.add(
        "flipped_images",
        "error",
        f"{message} only if the images are undone as {flip} (agreement {recorded_agreement:.2f} as they are)",
        "Undo this before writing the images, or describe it in camera poses and intrinsics",
        cause=f"images {flip}",
        camera=compared.camera,
        arm=compared.arm,
        demos=demos,
    )
