"""Refuse options that move a camera whose images nobody uses."""

from __future__ import annotations

from collections.abc import Sequence

from keygrip.envs.yam.tasks import OUTER_CAMERAS, TaskOptions

MOVES = ("camera_azimuth_deg", "camera_elevation_deg")  # of the task's camera
JITTER = ("camera_jitter_deg", "camera_views")  # also of the other outer cameras, with jitter_every_camera


def refuse_unseen_moves(task: TaskOptions, cameras: Sequence[str], before: TaskOptions | None = None) -> None:
    """Raise ValueError if an option of a task moves only a camera that is not used: the images would be the same
    without it.

    Args:
        cameras: those that are used. before: only options that differ from these are checked; None: those that differ
            from their defaults.
    """
    if task.camera in cameras:
        return
    before = before or TaskOptions()
    jitters_others = task.jitter_every_camera or before.jitter_every_camera
    jitter_is_seen = jitters_others and not set(OUTER_CAMERAS).isdisjoint(cameras)
    names = MOVES if jitter_is_seen else (*MOVES, *JITTER)
    unseen = [name for name in names if getattr(task, name) != getattr(before, name)]
    if not unseen:
        return
    movable = [name for name in cameras if name in OUTER_CAMERAS]
    raise ValueError(
        f"{', '.join(unseen)}: this moves camera {task.camera!r}, and only {', '.join(cameras)} is used"
        + (f"; task option camera={movable[0]} moves that one" if movable else "")
    )
