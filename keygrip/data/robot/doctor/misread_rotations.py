"""Which demos have rotations that go with the recorded joints only in another convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

SCATTER_DEG = 5.0  # spread of the rotation between recorded poses and forward kinematics
READING_GAIN = 0.5  # share of the spread that may remain in another convention
LEAST_FRAMES = 8  # frames of a demo from which it is decided about it alone
LEAST_OTHERS = 2  # demos that must share the base with which a single demo is compared
OTHER_BASE_DEG = 15.0  # difference from the base of the other demos from which a demo is compared with it
XYZW, CONJUGATED, INVERTED = "xyzw", "conjugated", "inverted"
ROTATION_READINGS = (XYZW, CONJUGATED)  # the rotations of an inverted pose are conjugated, too
INVERTED_SPREAD_M = 0.01  # spread of the difference of inverted positions from forward kinematics


class ComparedPoses(NamedTuple):
    """Some frames of a demo: positions [N, 3] and rotations [N, 3, 3] as recorded, and as computed from joints."""

    name: str
    position: np.ndarray
    rotation: np.ndarray
    own_position: np.ndarray
    own_rotation: np.ndarray
    misread: np.ndarray  # recorded rotations if their quaternions were x, y, z, w

    def turns(self, reading: str | None = None) -> np.ndarray:
        """Return the rotations [N, 3, 3] from those of the joints to the recorded ones, in a reading of these."""
        rotation = self.misread if reading == XYZW else self.rotation
        rotation = rotation.transpose(0, 2, 1) if reading == CONJUGATED else rotation
        return rotation @ self.own_rotation.transpose(0, 2, 1)


class Misread(NamedTuple):
    """Demos whose poses are in another convention, with the largest angle (degrees) between the recorded rotations and
    those of the joints, as recorded and in that convention."""

    reading: str
    demos: list[ComparedPoses]
    as_recorded: float
    as_read: float


def mean_turn(turns: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean of rotations [N, 3, 3] and the largest angle to it in degrees."""
    mean = Rotation.from_matrix(turns).mean().as_matrix()
    return mean, float(angles_to(mean, turns).max())


def angles_to(base: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Return the angles [N] in degrees between a rotation [3, 3] and rotations [N, 3, 3]."""
    return np.degrees((Rotation.from_matrix(base).inv() * Rotation.from_matrix(turns)).magnitude())


def find_misread(demos: Sequence[ComparedPoses]) -> list[Misread]:
    """Return the demos whose rotations go with the joints only in another convention, grouped by the convention.

    All demos are named if the convention explains all of them together and no demo shows that it is right as recorded.
    Otherwise each demo is judged alone: by the spread of its own rotations or, because a base absorbs any constant
    rotation of a gripper that hardly turns, by the base that most of the demos share.
    """
    if not demos:
        return []
    for reading in ROTATION_READINGS:
        scatter, other = _scatter(demos), _scatter(demos, reading)
        shared = scatter > SCATTER_DEG and other < READING_GAIN * scatter
        if shared and not any(_contradicts(reading, demo) for demo in demos):
            named = INVERTED if reading == CONJUGATED and _are_inverted(demos) else reading
            return [Misread(named, list(demos), scatter, other)]
    found: dict[str, Misread] = {}
    decided = [(demo, by_itself) for demo in demos if (by_itself := _decide_by_itself(demo)) is not None]
    names = {demo.name for demo, _ in decided}
    rest = [demo for demo in demos if demo.name not in names]
    base = _usual_base(rest, len(demos))
    if base is not None:
        decided += [(demo, by_base) for demo in rest if (by_base := _decide_by_base(demo, base)) is not None]
    for demo, (reading, scatter, other) in decided:
        reading = INVERTED if reading == CONJUGATED and _are_inverted([demo]) else reading
        group = found.get(reading, Misread(reading, [], 0.0, 0.0))
        found[reading] = Misread(
            reading, [*group.demos, demo], max(group.as_recorded, scatter), max(group.as_read, other)
        )
    return list(found.values())


def _scatter(demos: Sequence[ComparedPoses], reading: str | None = None) -> float:
    return mean_turn(np.concatenate([demo.turns(reading) for demo in demos]))[1]


def _contradicts(reading: str, demo: ComparedPoses) -> bool:
    """Return whether the rotations of a demo go with its joints as recorded, and do not in this convention."""
    return _scatter([demo]) <= SCATTER_DEG < _scatter([demo], reading)


def _decide_by_itself(demo: ComparedPoses) -> tuple[str, float, float] | None:
    """Return the convention in which the rotations of one demo go with its joints, with the spread (degrees) as
    recorded and in it. None: they do as recorded, they do in none, or there are too few frames."""
    if len(demo.rotation) < LEAST_FRAMES:
        return None
    scatter = _scatter([demo])
    best = min(ROTATION_READINGS, key=lambda reading: _scatter([demo], reading))
    other = _scatter([demo], best)
    clear = scatter > SCATTER_DEG and other < READING_GAIN * scatter and other <= SCATTER_DEG
    return (best, scatter, other) if clear else None


def _usual_base(demos: Sequence[ComparedPoses], total: int) -> np.ndarray | None:
    """Return the rotation [3, 3] of the base in more than half of all `total` demos; None: these do not share one."""
    steady = [demo for demo in demos if _scatter([demo]) <= SCATTER_DEG]
    if not steady:
        return None
    means = np.stack([mean_turn(demo.turns())[0] for demo in steady])
    near = np.stack([angles_to(mean, means) <= SCATTER_DEG for mean in means])
    sharing = near[int(near.sum(axis=1).argmax())]
    if sharing.sum() < LEAST_OTHERS or sharing.sum() <= total / 2:
        return None
    return mean_turn(means[sharing])[0]


def _decide_by_base(demo: ComparedPoses, base: np.ndarray) -> tuple[str, float, float] | None:
    """Return the convention in which a demo has the usual base, with the largest angle (degrees) to that base as
    recorded and in it. None: it has that base as recorded, it has it in none, or there are too few frames."""
    if len(demo.rotation) < LEAST_FRAMES:
        return None
    recorded = float(angles_to(base, demo.turns()).max())
    best = min(ROTATION_READINGS, key=lambda reading: angles_to(base, demo.turns(reading)).max())
    other = float(angles_to(base, demo.turns(best)).max())
    return (best, recorded, other) if recorded > OTHER_BASE_DEG and other <= SCATTER_DEG else None


def _are_inverted(demos: Sequence[ComparedPoses]) -> bool:
    """Return whether the positions of demos with conjugated rotations go with the joints if the poses are inverted."""
    base, _ = mean_turn(np.concatenate([demo.turns(CONJUGATED) for demo in demos]))
    offsets = np.concatenate(
        [
            -(demo.rotation.transpose(0, 2, 1) @ demo.position[..., None])[..., 0] - demo.own_position @ base.T
            for demo in demos
        ]
    )
    return float(np.linalg.norm(offsets - np.median(offsets, axis=0), axis=1).mean()) < INVERTED_SPREAD_M
