"""Checks of the images of a camera: too dark, too bright, frozen."""

from __future__ import annotations

import numpy as np

from keygrip.data.robot.doctor.examination import MOVED_M, Examination, listed, spread

DARK, BRIGHT = 8.0, 247.0  # mean grey level of an image
CHANGED_PIXEL, CHANGED_SHARE = 8, 1e-4  # an image differs where this share of pixels changes by this many levels


def check_images(exam: Examination, camera: str) -> None:
    dark, bright, frozen = [], [], []
    levels = []
    for demo in exam.with_camera(camera):
        track = demo.cameras[camera]
        pick = spread(len(demo), exam.frames_per_demo)
        pictures = [track.frames.read(index) for index in pick]
        mean = float(np.mean([picture.mean() for picture in pictures]))
        levels.append(mean)
        if mean < DARK:
            dark.append(demo.name)
        elif mean > BRIGHT:
            bright.append(demo.name)
        still = moved = 0.0
        for before, after, i, j in zip(pictures, pictures[1:], pick, pick[1:], strict=False):
            way = max(float(np.linalg.norm(arm.position[j] - arm.position[i])) for arm in demo.arms.values())
            moved += way
            change = np.abs(after.astype(np.int16) - before).max(axis=-1)
            if (change > CHANGED_PIXEL).mean() < CHANGED_SHARE:
                still += way
        if still > MOVED_M and still > 0.25 * moved:
            frozen.append(demo.name)
    exam.measures[f"camera/{camera}/mean_level"] = float(np.mean(levels))
    rows: list[tuple[str, list[str], str, str]] = [
        ("dark_camera", dark, "the pictures are almost black", "Check the cable, the lens cap and the exposure"),
        ("bright_camera", bright, "the pictures are almost white", "Lower the exposure or the gain"),
        (
            "frozen_camera",
            frozen,
            "the picture stands still while the gripper moves",
            "The stream hung: leave these demos out and check the camera's cable and bandwidth",
        ),
    ]
    for check, names, what, advice in rows:
        if names:
            exam.add(check, "error", f"camera {camera}, {listed(names)}", what, advice)
