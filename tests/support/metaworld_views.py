"""Print where Meta-World's cameras show objects at known places, and what a seed determines: one line of JSON.

`tests/envs/metaworld/test_metaworld.py` runs this file in the Python environment that has Meta-World.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from keygrip.envs.metaworld.environment import DOWN, MetaWorldEnvironment
from keygrip.envs.metaworld.tasks import MetaWorldTask
from keygrip.robots.mujoco_backend import mujoco

GOALS = ([0.1, 0.7, 0.3], [-0.15, 0.75, 0.25], [0.0, 0.6, 0.35], [0.25, 0.6, 0.05])
CHANGED = 8  # grey levels


def changed(now: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> np.ndarray:
    """Return the [n, 2] centres of the pixels in which two images of a camera differ."""
    differs = np.abs(now["image"].astype(int) - before["image"]).max(-1) > CHANGED
    return np.argwhere(differs)[:, ::-1] + 0.5


def described(view: dict[str, np.ndarray], point: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    """Return a camera, a point of the world, and the pixels that changed with the point."""
    camera = {name: view[name].tolist() for name in ("intrinsics", "world_to_camera")}
    return camera | {"point": point.tolist(), "pixels": pixels.tolist()}


def goals(environment: MetaWorldEnvironment, cameras: list[str]) -> dict[str, list[dict[str, Any]]]:
    """For each camera, return where the mark of the goal is drawn, for several goals."""
    model, data = environment.env.model, environment.env.data
    mark = model.site("goal").id

    def seen(place: Any) -> dict[str, dict[str, np.ndarray]]:
        model.site_pos[mark] = place
        mujoco.mj_forward(model, data)
        return {camera: environment.view(camera) for camera in cameras}

    without, found = seen([0.0, 0.0, -50.0]), {camera: [] for camera in cameras}
    for goal in GOALS:
        for camera, view in seen(goal).items():
            found[camera].append(described(view, data.site_xpos[mark], changed(view, without[camera])))
    return found


def fingers(environment: MetaWorldEnvironment, camera: str) -> dict[str, Any]:
    """Return the pixels that change when the hand, moved to the side, stands still and closes its fingers."""
    target = np.concatenate([environment.position + [0.1, 0.0, 0.05], DOWN])
    views = []
    for opening in (1.0, 0.0):
        for _ in range(60):
            environment.advance(np.append(target, opening))
        views.append(environment.view(camera))
    return described(views[1], environment.position, changed(views[1], views[0]))


def starts(environment: MetaWorldEnvironment) -> list[list[float]]:
    """Return the sensed state at the start of the seeds 3, 4 and 3, with some steps between them."""
    found = []
    for seed in (3, 4, 3):
        environment.reset(seed=seed)
        found.append(environment.sensed.tolist())
        for _ in range(30):
            environment.step_body(np.array([1.0, -1.0, -1.0]), 0.0)
    return found


if __name__ == "__main__":
    seen_by = sys.argv[1:]
    lab = MetaWorldEnvironment(MetaWorldTask("reach-v3"), 224, cameras=tuple(seen_by))
    lab.reset(seed=3)
    content = {"fingers": fingers(lab, seen_by[0]), "starts": starts(lab), "goals": goals(lab, seen_by)}
    sys.stdout.write(json.dumps(content))
