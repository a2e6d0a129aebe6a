"""Tasks of the YAM cell: their options, and the layout of a seed.

Every part of an episode (objects, camera, appearance, variation of the expert) has its own random stream, so that
moving the camera or recolouring the table does not change the objects of a seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from keygrip.envs.yam.colours import COLOURS, EQUAL_LUMINANCE
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.training.parts import data_part

TASKS = ("reach", "pick", "pick_place", "stack", "named_place", "peg")
OBJECTS = ("cube", "bar")
REGIONS = ("all", "left", "right", "near", "far")
CAMERAS = ("over", "front", "wrist")
OUTER_CAMERAS = ("over", "front")  # cameras beside the table
# Their nominal views: azimuth from +x and elevation, degrees, around their target point; distance, m.
CAMERA_ORBITS = {"over": (-35.0, 46.0, 1.0), "front": (0.0, 33.0, 0.95)}
ELEVATIONS_DEG = (5.0, 88.0)  # above the table but not vertically above it
SHAPES = ("cube", "ball", "cylinder")
IN_BOWL = ("pick_place", "named_place")  # tasks whose object goes into the bowl
PHRASES = (  # of named_place
    "put {thing} into the bowl",
    "place {thing} in the bowl",
    "pick up {thing} and drop it into the bowl",
    "move {thing} to the bowl",
    "the bowl should hold {thing}",
    "take {thing}, then let go of it over the bowl",
)

# Where the tool can point vertically down with 13 cm of free space below it, m (base frame: x forward, y left).
WORKSPACE_X = (0.20, 0.40)
WORKSPACE_Y = (-0.17, 0.17)
WORKSPACE_RADIUS = 0.43
REGION_GAP = 0.01  # distance of each half from the dividing line, so that left and right never touch
MIDDLE_X = 0.30

REACHED_M, REACHED_RAD = 1e-3, 1e-2  # largest error of inverse kinematics at a pose that counts as reached
HOME = np.array([0.0, 1.0, 1.0, -0.6, 0.0, 0.0])  # rad: tool 25 cm above the table, tilted outwards

BOWL_RADIUS, BOWL_HEIGHT = 0.068, 0.044
BLOCK_SIZE = 0.05  # m, the base of a stack
PEG_HALF = (0.018, 0.008, 0.030)  # m: a flat standing peg, grasped across its thin side
SLOT_HALF = (0.025, 0.015)  # m: 7 mm clearance per side; a rigid peg fits up to 25 degrees, a held one rotates
SLOT_HEIGHT, SLOT_FLOOR, SLOT_WALL = 0.024, 0.004, 0.005
SLOT_RADIUS = float(np.hypot(*SLOT_HALF)) + SLOT_WALL
TABLE_MATERIALS = 4  # plain, wood, checks, speckle: see scene.py
PEDESTAL_LEAST = 0.003  # m: with a lower pedestal the object stands on the table
TOOL_CLEARANCE = 0.115  # m between centres: an open gripper (12 cm across) beside the next object


@data_part
@dataclass(frozen=True)
class TaskOptions:
    """A task and everything that may vary in it. Lengths in metres, angles in degrees.

    Raises:
        ValueError: A name is unknown or a value out of range; the message lists what is allowed.
    """

    environment: ClassVar[str] = "keygrip.envs.yam.environment.YamCell"
    name: str = "pick_place"
    object: str = "cube"
    object_size_m: float = 0.04  # edge of the cube; a bar is 2.5 x 1.25 x 0.75 of it
    region: str = "all"  # where the moved object or the ball to reach starts; the rest may be anywhere
    distractors: int = 0
    random_start: bool = True  # the arm starts anywhere above the table, else near its home pose
    camera: str = "over"
    camera_azimuth_deg: float = 0.0  # shifts the camera around the table's middle
    camera_elevation_deg: float = 0.0  # added to the camera's own, see CAMERA_ORBITS
    camera_jitter_deg: float = 0.0  # the camera of each episode is within this angle of that view, 5 to 88 degrees up
    camera_views: int = 0  # 0: a new view in each episode; n: one of n fixed views
    shadows: bool = False  # 3 times slower to render
    randomise_light: bool = False
    randomise_table: bool = False
    randomise_colours: bool = False
    equal_luminance: bool = False
    varied_shapes: bool = False  # distractors may be balls and cylinders
    digits: bool = False  # cubes carry a printed digit on every face
    pedestal_m: float = 0.0  # each object stands on a pedestal of random height up to this
    phrasings: int = 1  # named_place: number of different wordings of an instruction
    jitter_every_camera: bool = False  # camera_jitter_deg moves each outer camera separately, not only the task's
    hidden_share: float = 0.0  # of episodes: fraction with a screen between one of the outer cameras and the object
    steady_grip: bool = False  # the expert always uses the grasp nearest to its bearing, without random choice

    def __post_init__(self) -> None:
        for key, known in (("name", TASKS), ("object", OBJECTS), ("region", REGIONS), ("camera", CAMERAS)):
            if getattr(self, key) not in known:
                raise ValueError(f"task option {key}={getattr(self, key)!r} is unknown; choose from {', '.join(known)}")
        ranges = {
            "object_size_m": (0.02, 0.05),
            "distractors": (0, 4),
            "camera_azimuth_deg": (-180, 180),
            "camera_elevation_deg": (-35, 35),
            "camera_jitter_deg": (0, 40),
            "camera_views": (0, 4096),
            "pedestal_m": (0.0, 0.06),
            "hidden_share": (0.0, 1.0),
            "phrasings": (1, len(PHRASES)),
        }
        for key in ("distractors", "camera_views", "phrasings"):
            if not isinstance(getattr(self, key), int):
                raise ValueError(f"task option {key} is a whole number, got {getattr(self, key)!r}")
        for key, (low, high) in ranges.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"task option {key}={getattr(self, key)} is outside [{low}, {high}]")
        if self.camera_views and not self.camera_jitter_deg:
            raise ValueError("task option camera_views has no effect without camera_jitter_deg > 0")
        moves = self.camera_azimuth_deg or self.camera_elevation_deg or self.camera_jitter_deg
        if self.camera == "wrist" and moves:
            raise ValueError(
                "task options camera_azimuth_deg, _elevation_deg and _jitter_deg cannot move the wrist camera"
            )
        if self.camera in CAMERA_ORBITS and self.camera_elevation_deg:
            (low, high), base = ELEVATIONS_DEG, CAMERA_ORBITS[self.camera][1]
            if not low <= base + self.camera_elevation_deg <= high:
                raise ValueError(
                    f"task option camera_elevation_deg={self.camera_elevation_deg} takes camera {self.camera!r}, which "
                    f"looks from {base:g} degrees up, outside of {low:g} to {high:g}: give {max(low - base, -35):g} to "
                    f"{min(high - base, 35):g}"
                )
        if self.jitter_every_camera and not self.camera_jitter_deg:
            raise ValueError("task option jitter_every_camera has no effect without camera_jitter_deg > 0")
        if self.pedestal_m and self.name not in ("pick", *IN_BOWL):
            raise ValueError(f"task option pedestal_m is for pick, pick_place and named_place, not for {self.name!r}")
        if self.pedestal_m and self.varied_shapes:
            raise ValueError("task option pedestal_m cannot be combined with varied_shapes: balls roll off")
        if self.phrasings > 1 and self.name != "named_place":
            raise ValueError(f"task option phrasings has no effect in {self.name!r}; it is for named_place")
        if self.name == "named_place" and (not self.distractors or self.varied_shapes or self.object != "cube"):
            raise ValueError(
                "task 'named_place' names one of several cubes by its colour: it needs distractors > 0, object='cube' "
                "and varied_shapes=False"
            )
        if self.varied_shapes and not self.distractors:
            raise ValueError("task option varied_shapes has no effect without distractors > 0")
        if self.digits and self.object == "bar":
            raise ValueError("task option digits prints on cubes only; it cannot be combined with object='bar'")
        if self.object == "bar" and self.name in IN_BOWL and self.object_size_m > 0.042:
            raise ValueError(
                f"a bar of object_size_m={self.object_size_m} does not fit into the bowl; use 0.042 or less"
            )
        if self.object == "bar" and self.name in ("stack", "peg"):
            raise ValueError(f"task {self.name!r} has its own object; object='bar' works with reach, pick, pick_place")
        if self.name == "peg" and (self.digits or self.object_size_m != 0.04):
            raise ValueError("task 'peg' has its own object: digits and object_size_m have no effect")

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values, for metadata files."""
        return asdict(self)

    @property
    def half_extents(self) -> np.ndarray:
        """[3] half lengths of the moved object.

        A bar is long along its own x axis, longer than the gripper's opening, and so wide that a grasp rotated by 45
        degrees fails four times in five, while one rotated by 30 degrees still holds.
        """
        if self.name == "peg":
            return np.array(PEG_HALF)
        if self.object == "bar":
            return self.object_size_m / 2 * np.array([2.5, 1.25, 0.75])
        return np.full(3, self.object_size_m / 2)

    @property
    def time_limit_s(self) -> float:
        """Seconds after which an episode is truncated, about twice the expert's time."""
        return {"reach": 8.0, "pick": 12.0}.get(self.name, 20.0)

    @property
    def shape(self) -> str:
        """Shape of the moved object: cube, bar or peg."""
        return "peg" if self.name == "peg" else self.object

    @property
    def yaw_period(self) -> float:
        """Period of the gripper's yaw after which the grasp is equivalent, rad."""
        return np.pi / 2 if self.shape == "cube" else np.pi

    @property
    def palette(self) -> dict[str, tuple[float, float, float]]:
        """The colours that objects may have."""
        return EQUAL_LUMINANCE if self.equal_luminance else COLOURS


@dataclass(frozen=True)
class Placed:
    """One object on the table at the start."""

    name: str
    shape: str
    colour: str
    position: np.ndarray  # [3] m, centre
    yaw: float
    digit: int | None = None
    pedestal: float = 0.0  # m, height of its pedestal


@dataclass(frozen=True)
class CameraPose:
    """Rotation of the outer cameras around the middle of the table, relative to their nominal view, degrees."""

    azimuth_deg: float
    elevation_deg: float


@dataclass(frozen=True)
class Appearance:
    """Light and table of one episode."""

    table: int  # index of the table material
    table_rgb: tuple[float, float, float]
    floor_rgb: tuple[float, float, float]
    ambient: float
    diffuse: float
    light_direction: tuple[float, float, float]


@dataclass(frozen=True)
class EpisodeLayout:
    """Everything that is sampled from the seed before an episode starts."""

    object: Placed
    goal: np.ndarray  # [3] m: bowl centre, block centre or the ball to reach
    goal_colour: str
    goal_yaw: float
    distractors: tuple[Placed, ...]
    start_joints: np.ndarray  # [6] rad
    camera: CameraPose
    appearance: Appearance
    instruction: str
    other_cameras: dict[str, CameraPose] = field(default_factory=dict)  # rotations of outer cameras except the task's
    hidden_from: str | None = None  # the outer camera whose view of the object a screen blocks

    @property
    def placed(self) -> tuple[Placed, ...]:
        """The object to move and the distractors."""
        return (self.object, *self.distractors)


def refuse_negative(seed: int) -> None:
    """Raise ValueError if a number cannot be the seed of an episode."""
    if seed < 0:
        raise ValueError(f"seed={seed}: episode seeds are non-negative integers")


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Return the random stream of one purpose ("objects", "camera", "appearance", "expert") of one seed."""
    refuse_negative(seed)
    return np.random.default_rng([int(seed), *purpose.encode()])


def in_region(position: np.ndarray, region: str) -> bool:
    """Return whether a point of the table is in a named region; left is +y, far is +x, as seen from the robot."""
    x, y = float(position[0]), float(position[1])
    inside = WORKSPACE_X[0] <= x <= WORKSPACE_X[1] and WORKSPACE_Y[0] <= y <= WORKSPACE_Y[1]
    inside = inside and np.hypot(x, y) <= WORKSPACE_RADIUS
    halves = {
        "all": True,
        "left": y >= REGION_GAP,
        "right": y <= -REGION_GAP,
        "near": x <= MIDDLE_X - REGION_GAP,
        "far": x >= MIDDLE_X + REGION_GAP,
    }
    return bool(inside and halves[region])


def _sample_free_spot(
    rng: np.random.Generator, region: str, taken: list[tuple[np.ndarray, float]], keep_out: float
) -> np.ndarray | None:
    """Return a random point of the region, at least `keep_out + radius` from each (point, radius) taken, or None."""
    for _ in range(400):
        point = rng.uniform([WORKSPACE_X[0], WORKSPACE_Y[0]], [WORKSPACE_X[1], WORKSPACE_Y[1]])
        if in_region(point, region) and all(np.hypot(*(point - p)) >= keep_out + r for p, r in taken):
            return point
    return None


def _sample_start_joints(rng: np.random.Generator, random_start: bool) -> np.ndarray:
    near_home = HOME + rng.normal(0, 0.05, 6)
    if not random_start or rng.random() < 0.3:
        return near_home
    for _ in range(50):
        point = np.array([rng.uniform(0.22, 0.38), rng.uniform(-0.15, 0.15), rng.uniform(0.13, 0.22)])
        yaw = np.arctan2(point[1], point[0]) + rng.uniform(-0.8, 0.8)
        solution = solve(point, pointing_down(yaw, rng.uniform(0.1, 0.5)), HOME)
        if solution.position_error < REACHED_M and solution.angle_error < REACHED_RAD:
            return solution.joints
    return near_home


def _sample_appearance(rng: np.random.Generator, options: TaskOptions) -> Appearance:
    table, table_rgb, floor_rgb = 0, (0.76, 0.66, 0.52), (0.42, 0.44, 0.48)
    ambient, diffuse, direction = 0.35, 0.45, (0.15, 0.35, -1.0)
    if options.randomise_table:
        table = int(rng.integers(0, TABLE_MATERIALS))
        base, floor = rng.uniform(0.45, 0.85), rng.uniform(0.2, 0.7, 3)
        tint = np.clip(base + rng.uniform(-0.15, 0.15, 3), 0, 1)
        table_rgb = (float(tint[0]), float(tint[1]), float(tint[2]))
        floor_rgb = (float(floor[0]), float(floor[1]), float(floor[2]))
    if options.randomise_light:
        ambient, diffuse = float(rng.uniform(0.2, 0.4)), float(rng.uniform(0.25, 0.5))
        direction = (float(rng.uniform(-0.7, 0.7)), float(rng.uniform(-0.7, 0.7)), -1.0)
    return Appearance(table, table_rgb, floor_rgb, ambient, diffuse, direction)


def _sample_camera_pose(options: TaskOptions, seed: int, name: str = "") -> CameraPose:
    """Return the rotation of the task's camera; with `name`, of another camera, which has independent jitter."""
    azimuth, elevation = (0.0, 0.0) if name else (options.camera_azimuth_deg, options.camera_elevation_deg)
    if options.camera_jitter_deg:
        # With a fixed set of views, the view's index seeds its pose, so view 7 is the same in every run.
        view = int(stream(seed, "view").integers(0, options.camera_views)) if options.camera_views else None
        rng = stream(seed, "camera" + name) if view is None else stream(view, "fixed view" + name)
        angle, radius = rng.uniform(0, 2 * np.pi), options.camera_jitter_deg * np.sqrt(rng.uniform())
        azimuth, elevation = azimuth + radius * np.cos(angle), elevation + radius * np.sin(angle)
    return CameraPose(float(azimuth), float(elevation))


def _format_instruction(options: TaskOptions, colour: str, goal_colour: str, phrase: int = 0) -> str:
    thing = f"the {colour} {options.shape}"
    return {
        "reach": f"touch the {goal_colour} ball",
        "pick": f"pick up {thing}",
        "pick_place": f"put {thing} into the {goal_colour} bowl",
        "stack": f"stack {thing} on the {goal_colour} block",
        "peg": f"put {thing} into the {goal_colour} slot",
        "named_place": PHRASES[phrase].format(thing=thing),
    }[options.name]


def sample_layout(options: TaskOptions, seed: int) -> EpisodeLayout:
    """Return the layout of an episode: a pure function of the options and the seed.

    Raises:
        ValueError: No arrangement without overlap was found (too many distractors for the region).
    """
    layout = (
        _sample_named_layout(options, seed) if options.name == "named_place" else _sample_plain_layout(options, seed)
    )
    layout = _raise_on_pedestals(layout, options, seed)
    rng = stream(seed, "screen")
    if rng.uniform() < options.hidden_share:
        layout = replace(layout, hidden_from=str(rng.choice(OUTER_CAMERAS)))
    if not options.jitter_every_camera:
        return layout
    other_cameras = {name: _sample_camera_pose(options, seed, name) for name in OUTER_CAMERAS if name != options.camera}
    return replace(layout, other_cameras=other_cameras)


def _raise_on_pedestals(layout: EpisodeLayout, options: TaskOptions, seed: int) -> EpisodeLayout:
    """Return the layout with each loose object raised by its own height."""
    if not options.pedestal_m:
        return layout
    heights = stream(seed, "pedestals").uniform(0, options.pedestal_m, len(layout.placed))
    heights[heights < PEDESTAL_LEAST] = 0.0
    raised = [
        replace(thing, position=thing.position + [0, 0, height], pedestal=float(height))
        for thing, height in zip(layout.placed, heights, strict=True)
    ]
    return replace(layout, object=raised[0], distractors=tuple(raised[1:]))


def _sample_named_layout(options: TaskOptions, seed: int) -> EpisodeLayout:
    """Cubes that differ only in colour, position and height; which of them is named is sampled independently.

    With the rules of `_sample_plain_layout` the object could be identified by its position, because its distance from
    the others is larger than the distances between them.
    """
    rng = stream(seed, "objects")
    count = options.distractors + 1
    for _ in range(400):
        bowl = _sample_free_spot(rng, "all", [], 0.0)
        assert bowl is not None
        areas = [(bowl, BOWL_RADIUS - 0.03)]
        spots: list[np.ndarray] = []
        while len(spots) < count:
            region = options.region if not spots else "all"
            spot = _sample_free_spot(rng, region, areas, TOOL_CLEARANCE)
            if spot is None:
                break
            spots.append(spot)
            areas.append((spot, 0.0))
        if len(spots) == count:
            break
    else:
        raise ValueError(f"no room on the table for {count} cubes with region={options.region!r}: ask for fewer")
    if options.region == "all":  # otherwise the first spot is the one in the region
        spots = [spots[i] for i in rng.permutation(count)]
    turns, printed = rng.uniform(-np.pi, np.pi, count), rng.permutation(10)
    names = list(options.palette)
    if options.randomise_colours:
        names = [names[i] for i in rng.permutation(len(names))]
    goal_colour, shuffled = names[-1], [names[i] for i in rng.permutation(count)]
    cubes = [
        Placed(
            name="object" if i == 0 else f"distractor{i - 1}",
            shape="cube",
            colour=colour,
            position=np.array([*spots[i], options.object_size_m / 2]),
            yaw=float(turns[i]),
            digit=int(printed[i]) if options.digits else None,
        )
        for i, colour in enumerate(shuffled)
    ]
    phrase = int(stream(seed, "phrase").integers(options.phrasings))
    return EpisodeLayout(
        object=cubes[0],
        goal=np.array([*bowl, 0.0]),
        goal_colour=goal_colour,
        goal_yaw=float(rng.uniform(-np.pi / 4, np.pi / 4)),
        distractors=tuple(cubes[1:]),
        start_joints=_sample_start_joints(stream(seed, "start"), options.random_start),
        camera=_sample_camera_pose(options, seed),
        appearance=_sample_appearance(stream(seed, "appearance"), options),
        instruction=_format_instruction(options, cubes[0].colour, goal_colour, phrase),
    )


def _sample_plain_layout(options: TaskOptions, seed: int) -> EpisodeLayout:
    rng = stream(seed, "objects")
    half = options.half_extents
    reach_of_object = float(np.hypot(half[0], half[1]))
    object_region, goal_region = ("all", options.region) if options.name == "reach" else (options.region, "all")
    for _ in range(200):
        areas: list[tuple[np.ndarray, float]] = []
        spot = _sample_free_spot(rng, object_region, areas, 0.0)
        yaw = float(rng.uniform(-np.pi, np.pi))
        if spot is None:
            continue
        areas.append((spot, max(0.0, reach_of_object - 0.028)))  # 0.028: for the 4 cm cube, included in TOOL_CLEARANCE
        goal_radius = BOWL_RADIUS if options.name in IN_BOWL else SLOT_RADIUS if options.name == "peg" else 0.03
        goal_yaw = float(rng.uniform(-np.pi / 4, np.pi / 4))
        goal_height = float(rng.uniform(0.04, 0.13))
        goal_spot = _sample_free_spot(rng, goal_region, areas, TOOL_CLEARANCE + goal_radius - 0.03)
        if options.name != "pick":
            if goal_spot is None:
                continue
            areas.append((goal_spot, goal_radius - 0.03))
        spots = []
        for _ in range(options.distractors):
            free = _sample_free_spot(rng, "all", areas, TOOL_CLEARANCE)
            if free is None:
                break
            spots.append((free, float(rng.uniform(-np.pi, np.pi))))
            areas.append((free, -0.035))  # distractors may be closer: no gripper goes between them
        if len(spots) == options.distractors:
            break
    else:
        raise ValueError(
            f"no room on the table for {options.distractors} distractors with region={options.region!r}: ask for fewer"
        )
    names = list(options.palette)
    order = rng.permutation(len(names))
    shapes = rng.integers(0, len(SHAPES), 4)
    printed = rng.permutation(10)
    shuffled = [names[i] for i in order]
    colour, goal_colour = (shuffled[0], shuffled[1]) if options.randomise_colours else ("red", "green")
    free_colours = [n for n in shuffled if n not in (colour, goal_colour)]

    def placed(i: int, name: str, shape: str, tone: str, at: np.ndarray, turn: float) -> Placed:
        height = half[2] if name == "object" else options.object_size_m / 2
        digit = int(printed[i]) if options.digits and shape == "cube" else None
        return Placed(name, shape, tone, np.array([*at, height]), turn, digit)

    main_object = placed(0, "object", options.shape, colour, spot, yaw)
    distractors = []
    for i, (at, turn) in enumerate(spots):
        shape = SHAPES[int(shapes[i])] if options.varied_shapes else "cube"
        distractors.append(placed(i + 1, f"distractor{i}", shape, free_colours[i % len(free_colours)], at, turn))
    height = {"reach": goal_height, "stack": BLOCK_SIZE / 2}.get(options.name, 0.0)
    goal = np.array([*(goal_spot if goal_spot is not None else (0.3, 0.0)), height])
    return EpisodeLayout(
        object=main_object,
        goal=goal,
        goal_colour=goal_colour,
        goal_yaw=goal_yaw + float(np.arctan2(goal[1], goal[0])),
        distractors=tuple(distractors),
        start_joints=_sample_start_joints(stream(seed, "start"), options.random_start),
        camera=_sample_camera_pose(options, seed),
        appearance=_sample_appearance(stream(seed, "appearance"), options),
        instruction=_format_instruction(options, colour, goal_colour),
    )
