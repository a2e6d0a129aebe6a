"""The two-arm task `handover`: the right arm picks up a bar and hands it to the left arm in the air.

World frame = the right arm's base. The left arm's base is at `LEFT_BASE` with the same orientation. Arms are in the
order of `ARMS` wherever an array has an axis of arms. Metres, radians.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.envs.yam.colours import COLOURS
from keygrip.envs.yam.expert import CLOSED, CLOSING_S, LOWEST_TOOL, OPEN, OPENING_S, move
from keygrip.envs.yam.tasks import HOME, REACHED_M, REACHED_RAD, stream
from keygrip.robots.inverse_kinematics import pointing_down, solve
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion
from keygrip.training.parts import data_part

ARMS = ("left", "right")
LEFT_BASE = np.array([0.0, 0.40, 0.0])
BASES = np.stack([LEFT_BASE, np.zeros(3)])  # [2, 3]
BAR_HALF = (0.060, 0.011, 0.011)
GRIP_APART = 0.035  # distance of each hand from the middle of the bar
BAR_X, BAR_Y = (0.22, 0.36), (-0.10, 0.10)  # position of the middle of the bar at the start
BAR_TURN = np.deg2rad(35.0)  # the bar points at the left arm within this angle
MEETING = np.array([0.30, 0.20])  # between the arms, in reach of both
DRAWS = 5000  # of a layout: most are out of reach of one arm; of a hundred draws sometimes all are
MEETING_HEIGHT = (0.12, 0.15)
SETTLE_S = 0.3  # how long both hands stand still before they close
CAMERAS = {"over": (0.0, 52.0, 1.12, 38.0), "front": (-30.0, 35.0, 1.12, 38.0)}  # azimuth, elevation, distance, fovy
CAMERA_TARGET = (0.28, 0.18, 0.06)
HALF_TURN = np.pi


@data_part
@dataclass(frozen=True)
class HandoverTask:
    """The options of the two-arm handover.

    Raises:
        ValueError: The name is unknown.
    """

    environment: ClassVar[str] = "keygrip.envs.yam.two_arms.HandoverCell"
    name: str = "handover"
    camera: str = "over"
    random_start: bool = True  # the arms start anywhere above their halves of the table, else near their home poses
    shadows: bool = False  # 3 times slower to render

    def __post_init__(self) -> None:
        if self.name != "handover":
            raise ValueError(f"task option name={self.name!r}: HandoverTask is the task handover")
        if self.camera not in CAMERAS:
            raise ValueError(f"task option camera={self.camera!r} is unknown; choose from {', '.join(CAMERAS)}")

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values, for metadata files."""
        return asdict(self)

    @property
    def time_limit_s(self) -> float:
        """Seconds after which an episode is truncated, about twice the expert's time."""
        return 25.0


@dataclass(frozen=True)
class HandoverLayout:
    """The layout of a seed: the middle of the bar [3], its yaw, both arms' joints [2, 6] and the instruction."""

    bar: np.ndarray
    yaw: float
    start_joints: np.ndarray
    meeting_height: float
    instruction: str = "hand the red bar to the left arm"
    colour: tuple[float, float, float] = COLOURS["red"]


@dataclass(frozen=True)
class HandoverPhase:
    """The targets of both tools after `seconds`: position [3] in the world, yaw and gripper of each, by arm."""

    seconds: float
    position: dict[str, np.ndarray]
    yaw: dict[str, float]
    gripper: dict[str, float]


def sample_handover(task: HandoverTask, seed: int) -> HandoverLayout:
    """Sample the layout of an episode, which both arms can do: a pure function of the options and the seed.

    Raises:
        ValueError: No layout within reach was found.
    """
    rng = stream(seed, "objects")
    for _ in range(DRAWS):
        bar = np.array([rng.uniform(*BAR_X), rng.uniform(*BAR_Y), BAR_HALF[2]])
        yaw = float(np.pi / 2 + rng.uniform(-BAR_TURN, BAR_TURN))
        height = float(rng.uniform(*MEETING_HEIGHT))
        layout = HandoverLayout(bar, yaw, np.stack([HOME, HOME]), height)
        poses = {
            (arm, tuple(phase.position[arm].tolist()), phase.yaw[arm])
            for phase in handover_phases(layout, np.random.default_rng(0))
            for arm in ARMS
        }
        if all(_is_reachable(arm, np.array(position), yaw) for arm, position, yaw in sorted(poses)):
            starts = stream(seed, "start")
            joints = np.stack([_sample_start_joints(starts, task.random_start, arm) for arm in ARMS])
            return HandoverLayout(bar, yaw, joints, height)
    raise ValueError("no bar within reach of both arms was found")


def _is_reachable(arm: str, position: np.ndarray, yaw: float) -> bool:
    found = solve(position - BASES[ARMS.index(arm)], pointing_down(yaw), HOME)
    return bool(found.position_error < REACHED_M and found.angle_error < REACHED_RAD)


def _sample_start_joints(rng: np.random.Generator, random_start: bool, arm: str) -> np.ndarray:
    near_home = HOME + rng.normal(0, 0.05, 6)
    if not random_start:
        return near_home
    side = 1.0 if arm == "left" else -1.0  # away from the other arm
    for _ in range(50):
        point = np.array([rng.uniform(0.22, 0.34), side * rng.uniform(0.0, 0.12), rng.uniform(0.13, 0.22)])
        yaw = np.arctan2(point[1], point[0]) + rng.uniform(-0.6, 0.6)
        solution = solve(point, pointing_down(yaw, rng.uniform(0.1, 0.4)), HOME)
        if solution.position_error < REACHED_M and solution.angle_error < REACHED_RAD:
            return solution.joints
    return near_home


def _nearest_half_turn(yaw: float, reference: float) -> float:
    return float(reference + (yaw - reference + HALF_TURN / 2) % HALF_TURN - HALF_TURN / 2)


def handover_phases(layout: HandoverLayout, rng: np.random.Generator) -> list[HandoverPhase]:
    """Return the expert's plan: pick, lift, meet, grasp with the other hand, release, move apart."""
    pace = float(rng.uniform(0.85, 1.2))
    bar_axis = np.array([np.cos(layout.yaw), np.sin(layout.yaw)])
    near = layout.bar[:2] - (GRIP_APART + rng.normal(0, 0.002)) * bar_axis + rng.normal(0, 0.0015, 2)
    meeting = MEETING + rng.normal(0, 0.004, 2)
    give, take = meeting - [0, GRIP_APART], meeting + [0, GRIP_APART + rng.normal(0, 0.002)]
    height = layout.meeting_height
    give_yaw = _nearest_half_turn(np.pi / 2, float(np.arctan2(give[1], give[0])))
    grip_yaw = give_yaw + (layout.yaw - np.pi / 2) + float(rng.normal(0, 0.03))
    offset = take - LEFT_BASE[:2]
    left_yaw = _nearest_half_turn(np.pi / 2, float(np.arctan2(offset[1], offset[0]))) + float(rng.normal(0, 0.03))
    wait = np.array([*(take + [-0.02, 0.08] + rng.normal(0, 0.01, 2)), height + float(rng.uniform(0.05, 0.08))])
    low, up = LOWEST_TOOL, float(rng.uniform(0.08, 0.10))
    right, left, right_yaw, grips = np.array([*near, up]), wait, grip_yaw, {"left": OPEN, "right": OPEN}
    phases: list[HandoverPhase] = []

    def then(seconds: float) -> None:
        yaws = {"left": left_yaw, "right": right_yaw}
        phases.append(HandoverPhase(seconds, {"left": left, "right": right}, yaws, dict(grips)))

    then(1.4 * pace)
    right = np.array([*near, low])
    then(0.9 * pace)
    then(SETTLE_S)  # as with the left hand below; policies trained without this pause succeed as often
    grips["right"] = CLOSED
    then(CLOSING_S)
    right = np.array([*near, height])
    then(0.9 * pace)
    right, right_yaw = np.array([*give, height]), give_yaw
    then((0.7 + 3.0 * float(np.hypot(*(give - near)))) * pace)
    left = np.array([*take, wait[2]])
    then(0.7 * pace)
    left = np.array([*take, height])
    then(0.9 * pace)
    then(SETTLE_S)
    grips["left"] = CLOSED
    then(CLOSING_S)
    grips["right"] = OPEN
    then(OPENING_S)
    right = np.array([*(give - [0.0, 0.01]), height + 0.08])
    then(0.8 * pace)
    left, right = np.array([*(take + [0.0, 0.04]), height + 0.02]), np.array([*(give - [0.0, 0.08]), height + 0.08])
    then(0.8 * pace)
    then(0.4)
    return phases


def handover_actions(layout: HandoverLayout, seed: int, hz: float = 10.0) -> np.ndarray:
    """Return the expert's actions for an episode, at `hz` per second: [N, 2, 8], for each arm as in
    `HandoverCell.advance`."""
    poses = []
    for joints, base in zip(layout.start_joints, BASES, strict=True):
        position, quaternion = forward_kinematics(joints)
        poses.append((position + base, Rotation.from_matrix(matrix_from_quaternion(quaternion))))
    parts = []
    for phase in handover_phases(layout, stream(seed, "expert")):
        arm_actions = []
        for index, arm in enumerate(ARMS):
            target = phase.position[arm], Rotation.from_matrix(pointing_down(phase.yaw[arm]))
            arm_actions.append(move(poses[index], target, phase.gripper[arm], phase.seconds, hz))
            poses[index] = target
        parts.append(np.stack(arm_actions, axis=1))
    return np.concatenate(parts)
