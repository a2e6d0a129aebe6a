"""The scripted expert: plans from the known layout, with random variation in path, speed and grasp.

Motions are straight lines with smooth starts and stops. Episodes vary in speed, approach (often off-centre and then
corrected), heights, the curve of the carrying path, and small errors of position and yaw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from keygrip.envs.yam import tasks
from keygrip.envs.yam.tasks import EpisodeLayout, TaskOptions
from keygrip.robots.inverse_kinematics import pointing_down
from keygrip.robots.kinematics import forward_kinematics, matrix_from_quaternion, quaternion_from_matrix

OPEN, CLOSED = 1.0, 0.0
LOWEST_TOOL = 0.008  # m: the finger tips never press on the table
CLEARANCE = 0.015  # m between the finger tips and objects below their path; the arm lags behind by a centimetre
PICKED = 0.08  # m above its grasp pose at which a picked object is held
CLOSING_S = 0.6  # the fingers need 0.4 s from fully open to a firm grip
OPENING_S = 0.5


@dataclass(frozen=True)
class Waypoint:
    """The tool's target after `seconds`; its gripper opening applies on the way there."""

    position: tuple[float, float, float]
    yaw: float
    gripper: float
    seconds: float
    tilt: float = 0.0


def nearest_turn(yaw: float, period: float, reference: float) -> float:
    """Return the yaw equal to `yaw` modulo `period` that is closest to `reference`."""
    return reference + (yaw - reference + period / 2) % period - period / 2


def grasp_height(options: TaskOptions) -> float:
    """Return the height of the tool above the object's support when the fingers close: the tips are well below the
    object's middle and above the table."""
    if options.name == "peg":  # near its top, so that in the slot the tips stay above the walls
        return 1.4 * float(options.half_extents[2])
    return max(LOWEST_TOOL, 0.7 * float(options.half_extents[2]))


def _travel_height(layout: EpisodeLayout, options: TaskOptions) -> float:
    """Return the height at which the finger tips travel above all objects on pedestals; 0 without pedestals, because
    then all travelling heights of the expert are above all objects."""
    if not options.pedestal_m:
        return 0.0
    return max(thing.pedestal for thing in layout.placed) + options.object_size_m + CLEARANCE


def _plan_approach(
    layout: EpisodeLayout, options: TaskOptions, rng: np.random.Generator, pace: float
) -> list[Waypoint]:
    """Move to the object, down, close."""
    x, y = layout.object.position[:2]
    bearing = float(np.arctan2(y, x))
    habit = float(rng.normal(0, 0.1))  # random choice between two equivalent grasps that are about equally far
    yaw = nearest_turn(layout.object.yaw, options.yaw_period, bearing + (0.0 if options.steady_grip else habit))
    yaw += float(rng.normal(0, 0.04))
    x, y = float(x + rng.normal(0, 0.0025)), float(y + rng.normal(0, 0.0025))
    low, path = grasp_height(options) + layout.object.pedestal, []
    clearance = _travel_height(layout, options)
    if rng.random() < 0.6:  # approach beside the object, then correct
        offset = rng.normal(0, 0.02, 2)
        above = (float(x + offset[0]), float(y + offset[1]), max(clearance, float(rng.uniform(0.075, 0.13))))
        path.append(Waypoint(above, yaw + float(rng.normal(0, 0.3)), OPEN, float(rng.uniform(0.9, 1.5)) * pace))
        path.append(Waypoint((x, y, max(clearance, float(rng.uniform(0.065, 0.10)))), yaw, OPEN, 0.5 * pace))
    else:
        above = (x, y, max(clearance, float(rng.uniform(0.08, 0.12))))
        path.append(Waypoint(above, yaw, OPEN, float(rng.uniform(1.2, 1.6)) * pace))
    path.append(Waypoint((x, y, low), yaw, OPEN, 0.8 * pace))
    path.append(Waypoint((x, y, low), yaw, CLOSED, CLOSING_S))
    return path


def _plan_carry(
    layout: EpisodeLayout, options: TaskOptions, rng: np.random.Generator, grip: Waypoint
) -> list[Waypoint]:
    """From the closed gripper to above the goal, down, open, up."""
    pace = float(rng.uniform(0.85, 1.2))
    x, y, _ = grip.position
    low = grasp_height(options)
    goal_x, goal_y = float(layout.goal[0]), float(layout.goal[1])
    bearing = float(np.arctan2(goal_y, goal_x))
    if options.name == "stack":
        scatter, release = 0.001, tasks.BLOCK_SIZE + low + 0.003
        # The grasp's yaw error rotates with the cube; align the cube's faces, not the fingers.
        yaw = nearest_turn(layout.goal_yaw + grip.yaw - layout.object.yaw, np.pi / 2, bearing)
    elif options.name == "peg":
        scatter, release = 0.001, low + tasks.SLOT_FLOOR + 0.002
        yaw = nearest_turn(layout.goal_yaw + grip.yaw - layout.object.yaw, np.pi, bearing)
    else:
        scatter, release = 0.006, low + 0.035 + float(rng.uniform(0, 0.015))
        yaw = bearing + float(rng.normal(0, 0.15))
    goal_x, goal_y = goal_x + float(rng.normal(0, scatter)), goal_y + float(rng.normal(0, scatter))
    high = float(rng.uniform(0.105, 0.13))
    if options.pedestal_m:
        high = max(high, _travel_height(layout, options) + low)  # the object hangs below the finger tips
    across = np.array([goal_y - y, x - goal_x]) / max(np.hypot(goal_x - x, goal_y - y), 1e-6)
    middle = np.array([(x + goal_x) / 2, (y + goal_y) / 2]) + across * rng.normal(0, 0.015)
    reach = float(np.hypot(*middle))
    middle *= min(1.0, 0.40 / reach)  # the curve must stay within the arm's reach
    travel = (0.5 + 3.0 * float(np.hypot(goal_x - x, goal_y - y))) * pace
    path = [
        Waypoint((x, y, high), grip.yaw, CLOSED, 0.9 * pace),
        Waypoint((float(middle[0]), float(middle[1]), high), (grip.yaw + yaw) / 2, CLOSED, travel * 0.55),
        Waypoint((goal_x, goal_y, high), yaw, CLOSED, travel * 0.55),
        Waypoint((goal_x, goal_y, release), yaw, CLOSED, 0.8 * pace),
        Waypoint((goal_x, goal_y, release), yaw, OPEN, OPENING_S),
        Waypoint((goal_x, goal_y, high), yaw, OPEN, 0.7 * pace),
    ]
    if options.name in ("stack", "peg"):  # a moving arm lags by a centimetre: wait before release
        path.insert(4, Waypoint((goal_x, goal_y, release), yaw, CLOSED, 0.3))
    if options.name == "peg":  # and before slowly inserting it into the slot
        above = release + tasks.SLOT_HEIGHT + 0.008
        path[3:4] = [
            Waypoint((goal_x, goal_y, above), yaw, CLOSED, 0.7 * pace),
            Waypoint((goal_x, goal_y, above), yaw, CLOSED, 0.3),
            Waypoint((goal_x, goal_y, release), yaw, CLOSED, 1.2 * pace),
        ]
    return path


def waypoints(layout: EpisodeLayout, options: TaskOptions, rng: np.random.Generator) -> list[Waypoint]:
    """Return the expert's plan for a layout; `rng` samples the variation."""
    pace = float(rng.uniform(0.85, 1.2))
    if options.name == "reach":
        ball = (float(layout.goal[0]), float(layout.goal[1]), float(layout.goal[2]))
        yaw = float(np.arctan2(ball[1], ball[0])) + float(rng.normal(0, 0.15))
        offset = rng.normal(0, 0.02, 2)
        above = (ball[0] + float(offset[0]), ball[1] + float(offset[1]), ball[2] + float(rng.uniform(0.03, 0.06)))
        above = (above[0], above[1], min(above[2], 0.14))
        return [
            Waypoint(above, yaw, OPEN, float(rng.uniform(1.0, 1.6)) * pace),
            Waypoint(ball, yaw, OPEN, 0.8 * pace),
            Waypoint(ball, yaw, OPEN, 0.6),
        ]
    path = _plan_approach(layout, options, rng, pace)
    if options.name == "pick":
        x, y, _ = path[-1].position
        high = float(rng.uniform(0.125, 0.14))
        if options.pedestal_m:
            high = max(high, path[-1].position[2] + PICKED)
        path += [Waypoint((x, y, high), path[-1].yaw, CLOSED, 0.9 * pace)]
        path += [Waypoint((x, y, high), path[-1].yaw, CLOSED, 0.4)]
        return path
    return path + _plan_carry(layout, options, rng, path[-1])


def expert_actions(layout: EpisodeLayout, options: TaskOptions, seed: int, hz: float = 10.0) -> np.ndarray:
    """Return the expert's actions for an episode, at `hz` per second.

    Returns:
        [N, 8]: tool position 3 (m), quaternion wxyz 4, gripper opening 1, as in `YamCell.step`.
    """
    position, quaternion = forward_kinematics(layout.start_joints)
    rotation = Rotation.from_matrix(matrix_from_quaternion(quaternion))
    actions = []
    for point in waypoints(layout, options, tasks.stream(seed, "expert")):
        target, target_rotation = np.array(point.position), Rotation.from_matrix(pointing_down(point.yaw, point.tilt))
        actions.append(move((position, rotation), (target, target_rotation), point.gripper, point.seconds, hz))
        position, rotation = target, target_rotation
    return np.concatenate(actions)


def move(
    start: tuple[np.ndarray, Rotation],
    target: tuple[np.ndarray, Rotation],
    gripper: float,
    seconds: float,
    hz: float,
) -> np.ndarray:
    """Return the actions of a straight motion between two poses (position [3], rotation), at rest at both ends.

    Returns:
        [N, 8] as of `expert_actions`, at `hz` per second, without the start.
    """
    steps = max(1, round(seconds * hz))
    u = np.arange(1, steps + 1) / steps
    u = u * u * (3 - 2 * u)  # at rest at both ends
    path = start[0] + u[:, None] * (target[0] - start[0])
    turns = Slerp([0.0, 1.0], Rotation.concatenate([start[1], target[1]]))(np.clip(u, 0.0, 1.0))
    return np.concatenate([path, quaternion_from_matrix(turns.as_matrix()), np.full((steps, 1), gripper)], axis=1)
