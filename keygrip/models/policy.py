"""The interface between policies and the code that runs them: the observation that a policy receives, and its plan.

Imports neither torch nor Lightning: clients of a policy server use it too.

Shape legend: A arms, T planned steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

LONGEST_INSTRUCTION = 1000  # bytes of UTF-8
UNIT_SLACK = 0.02  # tolerance of unit quaternions and rotation matrices, after float32 and JSON
FOCAL_LENGTHS = (1.0, 1e6)  # pixels
FARTHEST_M = 100.0  # largest distance of cameras and grippers from the world's origin
HELD_BACK_M = 1e-6  # less is rounding

Observation = Mapping[str, Any]
"""Output of the environment or of a robot's driver: ``image`` [H, W, 3] uint8, ``intrinsics`` [3, 3],
``world_to_camera`` [4, 4], ``position`` [A, 3] metres, ``quaternion`` [A, 4] wxyz, ``gripper`` [A] 0 closed .. 1 open;
with one arm the A axis may be left out. For policies that read them, ``instruction`` is a sentence, and ``cameras``
holds ``image``, ``intrinsics`` and ``world_to_camera`` of several cameras by name (None: the camera has no image now).
Robots add ``time_s``, the time of the observation in seconds on the robot's clock; arms that are controlled by joints
add ``joints`` [A, J], the angles reached, in radians."""


MATRICES = {"intrinsics": "3 x 3, pixels of that image", "world_to_camera": "4 x 4, metres"}  # of a camera


def refuse_incomplete(observation: Any, needs: Needs) -> None:
    """Refuse an input that is no observation, and an observation that lacks several entries; the message names all of
    them. A single missing entry is reported where it is read.

    Args:
        observation: input of a policy. needs: what that policy needs.

    Raises:
        ValueError: it is no mapping, or lacks several of the entries that the policy reads.
    """
    if not isinstance(observation, Mapping):
        raise ValueError(
            f"an observation is a mapping such as {{'image': ..., 'position': ...}}, not a "
            f'{type(observation).__name__}: docs/serving.md, "An observation", builds one'
        )
    views = observation.get("cameras") or {}
    missing = []
    for name in needs.cameras or ("",):
        if name and name not in views and (views or len(needs.cameras) > 1):
            missing.append(f"camera {name!r} in 'cameras'")
            continue
        view = views.get(name, observation)
        if view is None or (not name and views):  # masked, or reported by `image_of` with the known names
            continue
        prefix = f"cameras/{name}/" if name in views else ""
        missing += [f"'{prefix}image' (H x W x 3 uint8, RGB)"] if view.get("image") is None else []
        needs_calibration = needs.calibrated(name) if name else bool(needs.calibration)
        missing += [
            f"'{prefix}{part}' ({description})"
            for part, description in MATRICES.items()
            if needs_calibration and part not in view
        ]
    count = len(needs.arms)
    poses = {
        "position": f"{count} x 3 metres",
        "quaternion": f"{count} x 4, w x y z",
        "gripper": f"{count}, 0 closed to 1 open",
    }
    missing += [f"{part!r} ({description})" for part, description in poses.items() if part not in observation]
    missing += ["'instruction' (a sentence)"] if needs.instruction and not observation.get("instruction") else []
    if len(missing) > 1:
        seen = f"cameras {', '.join(views)}" if views else "one unnamed image" if "image" in observation else "no image"
        raise ValueError(
            f'the observation lacks {", ".join(missing)}; it has {seen}. docs/serving.md, "An observation", builds one'
        )


def views_of(observation: Observation, cameras: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the views of the named cameras, in this order: each with `image`, `intrinsics` and `world_to_camera`.

    Raises:
        ValueError: a camera is missing, or has no image.
    """
    views = views_or_none(observation, cameras)
    blind = [name for name, view in zip(cameras, views, strict=True) if view is None]
    if blind:
        raise ValueError(
            f"camera {blind[0]!r} of the observation is None: this policy needs all of {', '.join(cameras)}"
        )
    return [view for view in views if view is not None]


def views_or_none(observation: Observation, cameras: Sequence[str]) -> list[Mapping[str, Any] | None]:
    """As `views_of`, with None for a camera that the observation names and that has no image now.

    Raises:
        ValueError: a camera is not named.
    """
    views = observation.get("cameras") or {}
    if not views and len(cameras) == 1:
        return [observation]
    absent = [name for name in cameras if name not in views]
    if absent:
        available = f"it has {', '.join(views)}" if views else "it has one unnamed image"
        raise ValueError(f"the observation lacks camera {absent[0]!r}, which the policy was trained with; {available}")
    return [views[name] for name in cameras]


def view_names(observation: Observation, cameras: Sequence[str]) -> Sequence[str]:
    """Return the names of the views of `views_or_none` for messages (see `image_of`): the cameras' names if the
    observation names its cameras, otherwise "" for the observation's own image."""
    return cameras if observation.get("cameras") else ("",)


def poses_of(observation: Observation, arms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the poses of the arms in an observation: position ``[A, 3]``, quaternion ``[A, 4]`` and gripper ``[A]``;
    with one arm, the observation may leave out the A axis.

    Raises:
        ValueError: one of them is missing, of another shape, not finite, or implausible.
    """
    return (
        _read_numbers(observation, "position", (arms, 3), arms),
        _read_numbers(observation, "quaternion", (arms, 4), arms),
        _read_numbers(observation, "gripper", (arms,), arms),
    )


def image_of(view: Mapping[str, Any], camera: str = "") -> np.ndarray:
    """Return the image ``[H, W, 3]`` uint8, RGB, of a camera.

    Args:
        camera: its name in the observation's `cameras`, for messages; "": the view is the observation.

    Raises:
        ValueError: the image is missing, has no pixels, or is of another shape or type.
    """
    if view.get("image") is None:
        cameras = view.get("cameras") or {}
        hint = f"; it has the cameras {', '.join(cameras)}, and this policy reads one without a name" if cameras else ""
        raise ValueError(f"{_describe_origin(camera)} lacks 'image', which is H x W x 3 uint8, RGB{hint}")
    image = np.asarray(view["image"])
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        sides = " x ".join(map(str, image.shape)) or "a single value"
        raise ValueError(
            f"'image' of {_describe_origin(camera)} must be H x W x 3 uint8, RGB, not {sides} {image.dtype}"
        )
    return image


def instruction_of(observation: Observation) -> str:
    """Return the observation's instruction.

    Raises:
        ValueError: the instruction is missing, empty, or longer than `LONGEST_INSTRUCTION`.
    """
    instruction = observation.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError("the observation lacks an instruction, and this policy needs one")
    if (size := len(instruction.encode(errors="replace"))) > LONGEST_INSTRUCTION:
        raise ValueError(
            f"'instruction' of the observation has {size} bytes, more than {LONGEST_INSTRUCTION}: give one sentence"
        )
    return instruction


def calibration_of(view: Mapping[str, Any], camera: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return the intrinsics ``[3, 3]`` and the pose ``[4, 4]``, world to camera, of a camera.

    Args:
        camera: as for `image_of`.

    Raises:
        ValueError: as `poses_of`.
    """
    origin = _describe_origin(camera)
    return (
        _read_numbers(view, "intrinsics", (3, 3), origin=origin),
        _read_numbers(view, "world_to_camera", (4, 4), origin=origin),
    )


def _describe_origin(camera: str) -> str:
    return f"camera {camera!r} of the observation" if camera else "the observation"


def _read_numbers(
    entries: Mapping[str, Any], name: str, shape: tuple[int, ...], arms: int = 0, origin: str = "the observation"
) -> np.ndarray:
    expected = " x ".join(map(str, shape))
    if name not in entries:
        raise ValueError(f"{origin} lacks {name!r}, which is {expected} numbers")
    try:
        value = np.array(entries[name], dtype=np.float64)  # a copy: torch warns of read-only arrays
        value = arm_axis(value, len(shape) - 1) if arms == 1 else value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} of {origin} must be {expected} numbers: {error}") from error
    if value.shape != shape:
        actual = " x ".join(map(str, np.shape(entries[name]))) or "a single number"
        raise ValueError(f"{name!r} of {origin} must be {expected}, not {actual}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name!r} of {origin} holds numbers that are not finite")
    if problem := implausible_because(name, value):
        raise ValueError(f"{name!r} of {origin} {problem}")
    return value


def implausible_because(name: str, value: np.ndarray) -> str | None:
    """Return why an entry of an observation, of the right shape and finite, is implausible; None: it is plausible."""
    if name == "intrinsics":
        focal = (value[0, 0], value[1, 1])
        if min(focal) < FOCAL_LENGTHS[0] or not np.allclose(value[2], [0, 0, 1]):
            return "is no camera matrix: its focal lengths must be positive (pixels), its last row 0 0 1"
        if np.abs(value).max() > FOCAL_LENGTHS[1]:
            return f"is no camera matrix: it holds numbers above {FOCAL_LENGTHS[1]:g} pixels"
    if name == "world_to_camera":
        rotation = value[:3, :3]
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=UNIT_SLACK) or not np.allclose(
            value[3], [0, 0, 0, 1]
        ):
            return "is no rigid transform: a rotation, a translation in metres, last row 0 0 0 1"
        if np.linalg.det(rotation) < 0:
            return "is no rigid transform: its rotation is mirrored (determinant -1); one of its axes points backwards"
        if np.abs(value[:3, 3]).max() > FARTHEST_M:
            return f"puts the camera farther than {FARTHEST_M:g} m away: its translation is in metres"
    if name == "position" and np.abs(value).max(initial=0) > FARTHEST_M:
        return f"lies farther than {FARTHEST_M:g} m from the world's origin: it must be in metres"
    if name == "quaternion" and (abs(np.linalg.norm(value, axis=-1) - 1) > UNIT_SLACK).any():
        return "is no unit quaternion (w x y z)"
    if name == "gripper" and ((value < -0.1) | (value > 1.1)).any():
        return "must lie in 0 (closed) to 1 (open)"
    return None


@dataclass(frozen=True)
class Plan:
    """Future poses of the gripper(s).

    Attributes:
        position: ``[A, T, 3]`` metres, world frame. quaternion: ``[A, T, 4]`` wxyz. gripper: ``[A, T]`` 0 closed .. 1
            open.
        step_seconds: time between steps; step 1 is that far in the future.
        uncertainty: ``[A, T]`` 0 certain .. 1, or None where the policy has none.
        joints: ``[A, T, J]`` radians. controller: ``[A, T, D]`` inputs of the robot's controller. The same motion in
            the space in which the policy plans, for robots that accept these inputs; None if it plans poses.
        time_s: time of the observation that the plan is computed from, seconds on the robot's clock; None if it is not
            known. Step k is due at time_s + k step_seconds, k from 1.
        held_back: ``[A, 3]`` metres along x, y and z: the largest distance by which the policy moved positions of an
            arm's steps back towards those seen in training (see `margin_m` of the policy). Zeros: no position was
            moved; None: the policy moves no positions.
    """

    position: np.ndarray
    quaternion: np.ndarray
    gripper: np.ndarray
    step_seconds: float
    uncertainty: np.ndarray | None = None
    time_s: float | None = None
    joints: np.ndarray | None = None
    controller: np.ndarray | None = None
    held_back: np.ndarray | None = None


def held_back_m(plan: Plan) -> float | None:
    """Return the largest distance along an axis, metres, by which a plan was held back, 0 if it was not; None: its
    policy holds no plan back."""
    if plan.held_back is None:
        return None
    largest = float(np.max(plan.held_back, initial=0.0))
    return largest if largest > HELD_BACK_M else 0.0


def refuse_not_finite(plan: Plan, what: str = "the policy's plan") -> None:
    """Raise ValueError if a plan contains numbers that are not finite; `what` names the plan in the message."""
    for part in fields(plan):
        value = getattr(plan, part.name)
        if value is not None and not np.isfinite(value).all():
            raise ValueError(
                f"{what} is not finite in its {part.name}: an observation far from the training data gives such "
                "numbers (is its position in metres, in the world frame?), and so do weights that are not finite"
            )


@dataclass(frozen=True)
class UnderWay:
    """A plan that is being executed, for policies that continue it (real-time chunking).

    Attributes:
        plan: the plan, with `time_s` on the same clock as the observation's.
        delay_s: seconds until the next plan arrives; until then, this plan is executed in any case.
    """

    plan: Plan
    delay_s: float


@dataclass(frozen=True)
class Needs:
    """What the code that runs a policy needs to know: which entries of an observation the policy reads, besides the
    poses of its arms, and what its plans contain besides poses.

    Attributes:
        arms: names, in the order of the observation's A axis.
        cameras: names of the entries of `cameras`; none: the observation's own `image`, of one camera.
        camera: without `cameras`, the name of the camera whose images it was trained on; None: not known.
        instruction: whether it reads the instruction.
        calibration: whether it reads `intrinsics` and `world_to_camera`, or the cameras for which it reads them;
            otherwise the observation may leave them out.
        plans_joints: whether its plans contain joints (plans whose poses it had to move may lack them).
    """

    arms: tuple[str, ...]
    cameras: tuple[str, ...] = ()
    instruction: bool = False
    calibration: bool | tuple[str, ...] = True
    plans_joints: bool = False
    camera: str | None = None

    def calibrated(self, camera: str) -> bool:
        """Whether it reads the calibration of one of its `cameras`."""
        return self.calibration if isinstance(self.calibration, bool) else camera in self.calibration


class Policy(Protocol):
    """Anything that plans from one observation.

    A policy that samples at random also has `reset(seed)`, called at the start of an episode, so that its samples
    depend on the episode and not on earlier ones, and `session()`, which returns a policy on the same network with its
    own random generator.

    A policy may have `plan_batch(observations, sessions)`, which plans for several sessions in one pass, and
    `workspace` ``[2, 3]``, the lowest and highest position seen in training, metres. A server uses both. A
    `plan_batch` that raises must leave the sessions' random generators unchanged: the server then plans for each
    session alone.

    A policy that continues the plan being executed has `plan_continuing(observation, executing, delay_s)`;
    `can_continue` returns whether a policy does.
    """

    def plan(self, observation: Observation) -> Plan: ...


def can_continue(policy: Policy) -> bool:
    """Return whether a policy can continue the plan being executed; a policy on a server has this as an attribute."""
    return bool(getattr(policy, "continues", hasattr(policy, "plan_continuing")))


def robot_number(known: Sequence[str], name: str | None) -> int:
    """Return the number of the robot that a policy drives, among the robots that the model distinguishes.

    Args:
        known: the model's `embodiments`; empty: it distinguishes none. name: the policy's `embodiment`.

    Raises:
        ValueError: the model does not know the robot, or knows several and none is named.
    """
    if name is not None and name not in known:
        raise ValueError(f"policy.embodiment={name}: the model was trained for {', '.join(known) or 'one robot only'}")
    if name is None and len(known) > 1:
        raise ValueError(
            f"the model was trained for {', '.join(known)}: choose one with policy.embodiment=NAME (in training "
            "+callbacks.closed_loop.closed_loop.policy.embodiment=NAME)"
        )
    return known.index(name) if name is not None else 0


def arm_axis(value: Any, trailing: int) -> np.ndarray:
    """Return an observation's entry with its arm axis: ``[A, ...]`` from ``[A, ...]`` or, with one arm, ``[...]``."""
    array = np.asarray(value, dtype=np.float64)
    return array[None] if array.ndim == trailing else array
