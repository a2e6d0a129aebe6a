"""Videos for foveation: a gripper points at one cube per second, and the cubes' digits change every second.

An episode is a function of (options, seed). An image is recorded whenever the gripper has come to rest above a cube.
Kinds of questions, separate in every report:

- "mark": the digit on the cube of a given colour at a given second. The question names the cube.
- "cue": the digit on the cube at which the gripper pointed a second earlier: the video shows where to attend next.
- "glance": at which cube the gripper points; a coarse pass is enough.

There are no questions about what the image hides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from keygrip.envs.rendering import Lens
from keygrip.envs.yam import tasks
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import EpisodeLayout, TaskOptions, stream
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.mujoco_backend import mujoco

CUBE = 0.05  # m
HOVER = 0.035  # m from a cube's top to the finger tips
SEEN_SHARE = 0.7  # fraction of a cube's visible pixels without the arm; with less, its digit may be hidden
NOT_DRAWN = 4  # a group of geoms that MuJoCo does not render
CUBES = (1, 5)
FRAMES = (1, 4096)


@dataclass(frozen=True)
class TourOptions:
    """What varies between tours. Angles in degrees.

    Raises:
        ValueError: A value is out of range.
    """

    cubes: int = 5
    digits: int = 8  # 0 to digits - 1; chance is one in `digits`
    min_frames: int = 4  # seconds of the video
    max_frames: int = 4
    image_size: int = 128  # a cube is 17 pixels wide, and its digit is printed on its top and on its side
    fovy_deg: float = 23.0  # the work area fills the image
    yaw_deg: float = 20.0  # cubes are rotated by up to this from facing the camera: their digits stay readable
    even_lengths: bool = False  # equally many tours of 1, 2, 3-4, 5-8, ... frames; false: all lengths equally likely
    changing: bool = True  # new digits every second; false: the same in the whole video
    shadows: bool = False  # 3 times slower to render
    randomise_light: bool = False
    randomise_table: bool = False

    def __post_init__(self) -> None:
        if not CUBES[0] <= self.cubes <= CUBES[1]:
            raise ValueError(f"a tour has {CUBES[0]} to {CUBES[1]} cubes, not {self.cubes}")
        if not 2 <= self.digits <= 10:
            raise ValueError(f"a tour prints 2 to 10 different digits, not {self.digits}")
        if not FRAMES[0] <= self.min_frames <= self.max_frames <= FRAMES[1]:
            raise ValueError(
                f"a tour has {FRAMES[0]} to {FRAMES[1]} frames; min_frames={self.min_frames}, "
                f"max_frames={self.max_frames} make no range in it"
            )
        if not 10 <= self.fovy_deg <= 60 or not 0 <= self.yaw_deg <= 45:
            raise ValueError(f"fovy_deg={self.fovy_deg} is outside [10, 60], or yaw_deg={self.yaw_deg} outside [0, 45]")

    @property
    def task(self) -> TaskOptions:
        """The scene: loose cubes with digits, no object to move."""
        return TaskOptions(
            name="pick",
            object_size_m=CUBE,
            distractors=self.cubes - 1,
            randomise_colours=True,
            digits=True,
            shadows=self.shadows,
            randomise_light=self.randomise_light,
            randomise_table=self.randomise_table,
        )

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values; `even_lengths` is left out if false, to match data sets made before it existed."""
        return {name: value for name, value in asdict(self).items() if name != "even_lengths" or value}

    def length(self, seed: int, rng: np.random.Generator) -> int:
        """Return the number of frames of a seed's tour; with `even_lengths` seeds use the octaves in turn."""
        if not self.even_lengths:
            return int(rng.integers(self.min_frames, self.max_frames + 1))
        ranges = octaves(self.min_frames, self.max_frames)
        fewest, most = ranges[seed % len(ranges)]
        return int(rng.integers(fewest, most + 1))


def octaves(fewest: int, most: int) -> list[tuple[int, int]]:
    """Return ranges of frame counts that end with a power of two, as in `keygrip evaluate`'s accuracy by length."""
    ranges = []
    while fewest <= most:
        end = min(most, 1 << (fewest - 1).bit_length())
        ranges.append((fewest, end))
        fewest = end + 1
    return ranges


@dataclass(frozen=True)
class Tour:
    """A tour of F frames over K cubes.

    Args:
        frames: uint8 [F, S, S, 3], a second apart.
        colours: [K]. pointed: [F] index of the cube at which the gripper points. digits: [F, K].
        pixels: [F, K, 2] centre of each cube (x, y). visible: [F, K] visible pixels of each cube. uncovered: [K]
            visible pixels without the arm.
    """

    frames: np.ndarray
    colours: tuple[str, ...]
    pointed: np.ndarray
    digits: np.ndarray
    pixels: np.ndarray
    visible: np.ndarray
    uncovered: np.ndarray
    seed: int

    def readable(self) -> np.ndarray:
        """Return bool [F, K]: whether enough of a cube is visible to read its digit."""
        return self.visible >= SEEN_SHARE * np.maximum(self.uncovered, 1)


class TourCell(YamCell):
    """The cell in which tours are recorded; built once, used for many seeds."""

    def __init__(self, options: TourOptions) -> None:
        super().__init__(options.task, options.image_size)
        self.options = options
        size = options.image_size
        self.lenses["over"] = Lens.from_field_of_view(size, size, options.fovy_deg, shift=(0.0, -0.02))

    def layout_of(self, seed: int) -> EpisodeLayout:
        """Return the scene of a seed: cubes that face the camera."""
        rng = stream(seed, "tour layout")
        facing = np.deg2rad(tasks.CAMERA_ORBITS["over"][0])
        layout = tasks.sample_layout(self.task, seed)
        limit = np.deg2rad(self.options.yaw_deg)
        placed = [replace(p, yaw=float(facing + rng.uniform(-limit, limit)), digit=0) for p in layout.placed]
        return replace(layout, object=placed[0], distractors=tuple(placed[1:]))

    def tour(self, seed: int) -> Tour:
        """Record the tour of a seed."""
        options, rng = self.options, stream(seed, "tour")
        self.seed, self.layout = int(seed), self.layout_of(seed)
        self._arrange(self.layout)
        self.commanded_joints = self.layout.start_joints.copy()
        placed, count = self.layout.placed, options.length(self.seed, rng)
        pointed = _sample_cube_order(rng, len(placed), count)
        digits = rng.integers(0, options.digits, (count, len(placed)))
        if not options.changing:
            digits[:] = digits[:1]
        frames, sights = [], []
        for frame in range(count):
            for thing, digit in zip(placed, digits[frame], strict=True):
                self._paint(thing.name, self.task.palette[thing.colour], int(digit))
            self._go_above(placed[pointed[frame]].position)
            frames.append(self.frame("over"))
            sights.append(self.sight("over"))
        return Tour(
            frames=np.stack(frames),
            colours=tuple(thing.colour for thing in placed),
            pointed=pointed,
            digits=digits,
            pixels=np.array([[s.centres[p.name] for p in placed] for s in sights]),
            visible=np.array([[s.visible[p.name] for p in placed] for s in sights]),
            uncovered=self._count_uncovered_pixels(),
            seed=self.seed,
        )

    def _count_uncovered_pixels(self) -> np.ndarray:
        """Return [K] pixels of each cube that would be visible without the arm."""
        assert self.layout is not None
        names = [thing.name for thing in self.layout.placed]
        stay = [0, *(self.model.body(name).id for name in names)]  # the first body is the world
        groups = self.model.geom_group.copy()
        self.model.geom_group[~np.isin(self.model.geom_bodyid, stay)] = NOT_DRAWN
        try:
            visible = self.sight("over").visible
        finally:
            self.model.geom_group[:] = groups
        return np.array([visible[name] for name in names])

    def _go_above(self, cube: np.ndarray) -> None:
        """Place the arm at rest above a cube. The way there touches nothing and is not simulated."""
        goal = np.array([cube[0], cube[1], CUBE + HOVER])
        turn = pointing_down(float(np.arctan2(goal[1], goal[0])), 0.0)
        self.commanded_joints = solve(goal, turn, self.commanded_joints).joints
        self.data.qpos[self._arm_qpos] = self.commanded_joints
        self.data.qpos[self._finger_qpos] = 0.0
        mujoco.mj_forward(self.model, self.data)


def _sample_cube_order(rng: np.random.Generator, cubes: int, count: int) -> np.ndarray:
    """Return [count] cubes; if there are several, never the same one twice in a row."""
    order = [int(rng.integers(cubes))]
    if cubes == 1:
        return np.zeros(count, dtype=int)
    while len(order) < count:
        order.append((order[-1] + int(rng.integers(1, cubes))) % cubes)
    return np.array(order)


def describe(tour: Tour) -> dict[str, list[dict[str, Any]]]:
    """Return a caption and all questions of a tour, each with its metadata, as
    :func:`keygrip.envs.yam.text.describe`."""
    readable = tour.readable()
    names = [f"the {tour.colours[cube]} cube" for cube in tour.pointed]
    story = "A robot arm points at " + ", then at ".join(names) + "."
    captions = [{"text": story, "kind": "caption", "evidence": {"pointed": [tour.colours[c] for c in tour.pointed]}}]
    questions: list[dict[str, Any]] = []

    def ask(question: str, answer: str, kind: str, frame: int, cube: int) -> None:
        evidence = {
            "frame": frame,
            "colour": tour.colours[cube],
            "pixel": [round(float(v), 1) for v in tour.pixels[frame, cube]],
            "pixels_seen": int(tour.visible[frame, cube]),
        }
        questions.append({"question": question, "answer": answer, "kind": kind, "evidence": evidence})

    for frame in range(len(tour.frames)):
        when = f"At second {frame}"
        pointed_cube = int(tour.pointed[frame])
        ask(f"{when}, at which cube does the gripper point?", tour.colours[pointed_cube], "glance", frame, pointed_cube)
        for cube in np.flatnonzero(readable[frame]).tolist():
            digit = str(tour.digits[frame, cube])
            ask(f"{when}, which digit is on the {tour.colours[cube]} cube?", digit, "mark", frame, cube)
        if frame and readable[frame, tour.pointed[frame - 1]]:
            cube = int(tour.pointed[frame - 1])
            question = f"{when}, which digit is on the cube at which the gripper pointed a second before?"
            ask(question, str(tour.digits[frame, cube]), "cue", frame, cube)
    return {"captions": captions, "questions": questions}
