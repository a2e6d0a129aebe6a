"""The tasks of Meta-World: names, instructions, sets and difficulty groups.

Instructions and groups are those of LeRobot's Meta-World environment, so that results by group can be compared. The
groups come from Seo et al., "Masked World Models for Visual Control" (2022).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from keygrip.training.parts import data_part

HZ = 80.0  # control periods per second: MuJoCo steps of 2.5 ms, five per control step
STEP_LIMIT = 500  # of an episode, as in the benchmark
# Episode seeds, as in the YAM cell: training from 0, tuning from 500 000, held-out evaluation from 1 000 000.
TRAINING_SEED, TUNING_SEED, HELD_OUT_SEED = 0, 500_000, 1_000_000
CAMERAS = ("corner2", "corner", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")  # as the scenes mount them; their images are rotated upright

INSTRUCTIONS: dict[str, dict[str, str]] = {  # by difficulty
    "easy": {
        "button-press-v3": "Press a button",
        "button-press-topdown-v3": "Press a button from the top",
        "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
        "button-press-wall-v3": "Bypass a wall and press a button",
        "coffee-button-v3": "Push a button on the coffee machine",
        "dial-turn-v3": "Rotate a dial 180 degrees",
        "door-close-v3": "Close a door with a revolving joint",
        "door-lock-v3": "Lock the door by rotating the lock clockwise",
        "door-open-v3": "Open a door with a revolving joint",
        "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
        "drawer-close-v3": "Push and close a drawer",
        "drawer-open-v3": "Open a drawer",
        "faucet-close-v3": "Rotate the faucet clockwise",
        "faucet-open-v3": "Rotate the faucet counter-clockwise",
        "handle-press-v3": "Press a handle down",
        "handle-press-side-v3": "Press a handle down sideways",
        "handle-pull-v3": "Pull a handle up",
        "handle-pull-side-v3": "Pull a handle up sideways",
        "lever-pull-v3": "Pull a lever down 90 degrees",
        "plate-slide-v3": "Slide a plate into a cabinet",
        "plate-slide-back-v3": "Get a plate from the cabinet",
        "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
        "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
        "reach-v3": "Reach a goal position",
        "reach-wall-v3": "Bypass a wall and reach a goal",
        "window-close-v3": "Push and close a window",
        "window-open-v3": "Push and open a window",
        "peg-unplug-side-v3": "Unplug a peg sideways",
    },
    "medium": {
        "basketball-v3": "Dunk the basketball into the basket",
        "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
        "box-close-v3": "Grasp the cover and close the box with it",
        "coffee-pull-v3": "Pull a mug from a coffee machine",
        "coffee-push-v3": "Push a mug under a coffee machine",
        "hammer-v3": "Hammer a screw on the wall",
        "peg-insert-side-v3": "Insert a peg sideways",
        "push-wall-v3": "Bypass a wall and push a puck to a goal",
        "soccer-v3": "Kick a soccer into the goal",
        "sweep-v3": "Sweep a puck off the table",
        "sweep-into-v3": "Sweep a puck into a hole",
    },
    "hard": {
        "assembly-v3": "Pick up a nut and place it onto a peg",
        "hand-insert-v3": "Insert the gripper into a hole",
        "pick-out-of-hole-v3": "Pick up a puck from a hole",
        "pick-place-v3": "Pick and place a puck to a goal",
        "push-v3": "Push the puck to a goal",
        "push-back-v3": "Push the puck to a goal",
    },
    "very_hard": {
        "shelf-place-v3": "Pick and place a puck onto a shelf",
        "disassemble-v3": "Pick a nut out of a peg",
        "stick-pull-v3": "Grasp a stick and pull a box with the stick",
        "stick-push-v3": "Grasp a stick and push a box using the stick",
        "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    },
}
DIFFICULTY: dict[str, str] = {task: group for group, tasks in INSTRUCTIONS.items() for task in tasks}
MT50: tuple[str, ...] = tuple(sorted(DIFFICULTY))
MT10: tuple[str, ...] = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
SETS = {"mt10": MT10, "mt50": MT50}


def newly_rotated_cameras(cameras: Sequence[str]) -> list[str]:
    """Return the cameras whose images are rotated upright now but were not in earlier versions, unlike corner2's."""
    return [camera for camera in cameras if camera in UPSIDE_DOWN and camera != "corner2"]


def task_names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of tasks from "mt10", "mt50", a difficulty group, one name or several.

    Raises:
        ValueError: A name is unknown, or given twice.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names: list[str] = []
    for name in given:
        names += SETS.get(name) or tuple(INSTRUCTIONS.get(name, ())) or (checked_name(name),)
    if not names:
        raise ValueError("tasks is empty: give mt10, mt50 or names of tasks")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks names {next(name for name in names if names.count(name) > 1)!r} twice")
    return tuple(names)


def checked_name(name: str) -> str:
    """Return the full name of a task, which may be given without its version ("-v3").

    Raises:
        ValueError: The task does not exist.
    """
    full = name if name.endswith("-v3") else f"{name}-v3"
    if full not in DIFFICULTY:
        near = difflib.get_close_matches(full, MT50, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"sets are {', '.join(SETS)}; tasks are {', '.join(MT50)}"
        raise ValueError(
            f"Meta-World has no task {name!r}: {hint} (lists of tasks are Meta-World's; an environment such as env=yam "
            "has one task: env.task.name=... where it is evaluated, task.name=... where it is recorded)"
        )
    return full


@data_part
@dataclass(frozen=True)
class MetaWorldTask:
    """One task of Meta-World and its camera.

    Args:
        name: of the task, with or without "-v3".
        camera: of the scene. "corner2" is moved to LeRobot's position, 0.75 0.075 0.7 m. The upside-down images of the
            four corner cameras are rotated upright, together with their extrinsics.
        shadows: with shadows and reflections, which take five times as long to render.
        step_limit: control steps of an episode, 1/80 s each.

    Raises:
        ValueError: The task or camera is unknown, or a limit is out of range.
    """

    environment: ClassVar[str] = "keygrip.envs.metaworld.environment.MetaWorldEnvironment"
    name: str = "reach-v3"
    camera: str = "corner2"
    shadows: bool = False
    step_limit: int = STEP_LIMIT

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", checked_name(self.name))
        if self.camera not in CAMERAS:
            raise ValueError(f"Meta-World has no camera {self.camera!r}; it has {', '.join(CAMERAS)}")
        if not 1 <= self.step_limit <= STEP_LIMIT:
            raise ValueError(f"step_limit={self.step_limit} is outside 1 .. {STEP_LIMIT}, the benchmark's own limit")

    @property
    def instruction(self) -> str:
        """The task's instruction."""
        return INSTRUCTIONS[DIFFICULTY[self.name]][self.name]

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
        return asdict(self)
