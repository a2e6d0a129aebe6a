"""The values of a LeRobot data set that keygrip writes: their names, and how they are read from a demonstration.

LeRobot's own policies read `observation.images.<camera>`, `observation.state` and `action`: for each arm x, y, z
(metres, world), qw, qx, qy, qz (sign continuous) and the gripper's opening, float32. The action of frame i is the
command given at frame i or, if a demo has no commands, the pose reached at frame i + 1.

The data set also holds the exact values, under names that LeRobot passes to no policy: `pose.<arm>`,
`commanded.<arm>`, `joints.<arm>`, `calibration.<camera>.intrinsics` (3 x 3, row-major),
`calibration.<camera>.world_to_camera` (4 x 4, row-major), `controller.<arm>` (the input of the robot's own controller)
and `time_s` from the demo's start, float64, frame by frame, so that cameras may move, and `intervention`, 1 where a
person corrected a policy. A `calibration.yaml` assigns these features for our reader, so that the data set is read back
unchanged. Depth, captions and questions are left out.

Legend of shapes: N frames, J joints, D inputs of a controller, H and W the height and width of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keygrip.data.robot.arm_models import named_models
from keygrip.data.robot.calibration import SCHEMA, ArmCalibration
from keygrip.data.robot.schema import ArmTrajectory, Demo, DemoError, missing_camera

IMAGES = "observation.images."
POSE = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")
USUAL_MODELS = (ArmCalibration().arm, ArmCalibration().gripper)  # used if a demo or a calibration file names none
RATE_TOLERANCE = 0.01  # share of the rate; LeRobot stores whole rates


@dataclass(frozen=True)
class Layout:
    """What all demos of a data set have in common.

    Attributes:
        fps: a whole number. robot: its name. joints: J by arm, 0 if there are none. controllers: D by arm, 0 if there
            are none. commanded: whether commands were recorded. sizes: (H, W) by camera. uncalibrated: cameras whose
            pose is not known. models: i2rt's names of each arm and its gripper, for the kinematics of a YAM's joints;
            if a demo names none, the defaults of a calibration file. named: arms whose models the demo names.
    """

    fps: int
    robot: str
    joints: dict[str, int]
    controllers: dict[str, int]
    commanded: bool
    sizes: dict[str, tuple[int, int]]
    uncalibrated: tuple[str, ...]
    models: dict[str, tuple[str, str]]
    named: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, demo: Demo, cameras: Sequence[str] | None) -> Layout:
        """Return a demo's layout.

        Args:
            cameras: names of the cameras to keep; None: all.

        Raises:
            ValueError: LeRobot cannot hold it. DemoError: it lacks a camera, or its arm models are unknown.
        """
        absent = [name for name in cameras or () if name not in demo.cameras]
        if absent:
            raise DemoError(demo.name, missing_camera(demo, absent[0]))
        fps = max(1, round(demo.fps))
        if abs(demo.fps - fps) > RATE_TOLERANCE * demo.fps:
            raise ValueError(f"demo {demo.name!r} has {demo.fps:g} frames per second; LeRobot takes whole rates")
        sizes = {name: (track.height, track.width) for name, track in demo.cameras.items()}
        sizes = {name: size for name, size in sizes.items() if cameras is None or name in cameras}
        for name, (height, width) in sizes.items():
            if height % 2 or width % 2:
                raise ValueError(f"camera {name!r} is {width} x {height}; H.264 takes even sizes: leave it out")
        commanded = {name: arm.commanded is not None for name, arm in demo.arms.items()}
        if any(commanded.values()) and not all(commanded.values()):
            arms_with_commands = ", ".join(name for name, there in commanded.items() if there)
            raise ValueError(
                f"demo {demo.name!r} holds commands of {arms_with_commands} alone: an action is of all arms or of none"
            )
        models = {name: named_models(demo, name) for name in demo.arms}
        return cls(
            fps,
            demo.robot,
            {name: 0 if arm.joints is None else arm.joints.shape[1] for name, arm in demo.arms.items()},
            {name: 0 if arm.controller is None else arm.controller.shape[1] for name, arm in demo.arms.items()},
            all(commanded.values()),
            sizes,
            tuple(name for name in sizes if demo.cameras[name].uncalibrated),
            {name: found or USUAL_MODELS for name, found in models.items()},
            frozenset(name for name, found in models.items() if found is not None),
        )

    @property
    def calibrated(self) -> list[str]:
        """Cameras whose pose is known."""
        return [name for name in self.sizes if name not in self.uncalibrated]

    def features(self) -> dict[str, dict[str, Any]]:
        """Return the values and videos of a frame, as `meta/info.json` describes them."""
        names = [f"{arm}.{part}" for arm in self.joints for part in POSE]
        entries = {
            f"{IMAGES}{name}": {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
            for name, size in self.sizes.items()
        }
        entries |= {key: _describe_feature("float32", names) for key in ("observation.state", "action")}
        for arm, count in self.joints.items():
            entries[f"pose.{arm}"] = _describe_feature("float64", list(POSE))
            if self.commanded:
                entries[f"commanded.{arm}"] = _describe_feature("float64", list(POSE))
            if count:
                entries[f"joints.{arm}"] = _describe_feature(
                    "float64", [f"joint_{number}" for number in range(1, count + 1)]
                )
            if self.controllers[arm]:
                input_names = [f"input_{number}" for number in range(1, self.controllers[arm] + 1)]
                entries[f"controller.{arm}"] = _describe_feature("float64", input_names)
        for camera in self.calibrated:
            entries[f"calibration.{camera}.intrinsics"] = _describe_feature("float64", _matrix_entry_names("k", 3))
            entries[f"calibration.{camera}.world_to_camera"] = _describe_feature("float64", _matrix_entry_names("t", 4))
        entries["time_s"] = _describe_feature("float64", None)
        entries["timestamp"] = _describe_feature("float32", None)
        integer_features = ("intervention", "frame_index", "episode_index", "index", "task_index")
        return entries | {key: _describe_feature("int64", None) for key in integer_features}

    def sidecar(self) -> dict[str, Any]:
        """Return the content of `calibration.yaml`, which assigns the features for our reader."""

        def pose(feature: str) -> dict[str, Any]:
            return {
                "position": {"feature": feature, "index": [0, 1, 2]},
                "rotation": {"feature": feature, "index": [3, 4, 5, 6], "as": "quaternion_wxyz"},
                "gripper": {"feature": feature, "index": 7, "closed": 0.0, "open": 1.0},
            }

        arms: dict[str, Any] = {}
        for arm, count in self.joints.items():
            arms[arm] = pose(f"pose.{arm}")
            if count:
                indices = list(range(count))
                arms[arm]["joints"] = {"feature": f"joints.{arm}", "index": indices, "units": "radians"}
            if self.controllers[arm]:
                indices = list(range(self.controllers[arm]))
                arms[arm]["controller"] = {"feature": f"controller.{arm}", "index": indices}
            if self.commanded:
                arms[arm]["commanded"] = pose(f"commanded.{arm}")
        tracks = {
            camera: {
                part: {"feature": f"calibration.{camera}.{part}", "index": list(range(size))}
                for part, size in (("intrinsics", 9), ("world_to_camera", 16))
            }
            for camera in self.calibrated
        }
        bases: dict[str, dict[str, Any]] = {}
        for name, models in self.models.items():
            bases[name] = {"world_from_base": np.eye(4).tolist()}  # the poses are in the world already
            if name in self.named or models != USUAL_MODELS:
                bases[name] |= {"arm": models[0], "gripper": models[1]}
        return {
            "schema": SCHEMA,
            "conventions": {"camera": "opencv", "pixel": "corner", "length": "m"},
            "arms": bases,
            "lerobot": {
                "arms": arms,
                "cameras": tracks,
                "time": {"feature": "time_s", "index": 0},
                "intervention": {"feature": "intervention", "index": 0},
            },
        }


def _describe_feature(dtype: str, names: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [len(names) if names else 1], "names": names}


def _matrix_entry_names(letter: str, size: int) -> list[str]:
    return [f"{letter}{row}{column}" for row in range(size) for column in range(size)]


def numbers_of(demo: Demo, layout: Layout) -> dict[str, np.ndarray]:
    """Return all values of a demo's frames, each [N] or [N, F], except those that depend on its place in the data.

    Args:
        layout: that of the data set: states and actions join the arms in its order, which a demo's may differ from.
    """
    frames = len(demo)
    states, actions = [], []
    values: dict[str, np.ndarray] = {}
    for name in layout.joints:
        arm = demo.arms[name]
        reached = _pose_rows(arm)
        values[f"pose.{name}"] = reached
        if layout.commanded:
            assert arm.commanded is not None
            values[f"commanded.{name}"] = _pose_rows(arm.commanded)
        if arm.joints is not None:
            values[f"joints.{name}"] = np.asarray(arm.joints, dtype=np.float64)
        if arm.controller is not None:
            values[f"controller.{name}"] = np.asarray(arm.controller, dtype=np.float64)
        state = _with_continuous_quaternions(reached)
        target = values[f"commanded.{name}"] if layout.commanded else np.concatenate([reached[1:], reached[-1:]])
        # each target's quaternion gets the sign of the state in the same row
        sign = np.where((target[:, 3:7] * state[:, 3:7]).sum(axis=1) < 0, -1.0, 1.0)
        actions.append(np.concatenate([target[:, :3], target[:, 3:7] * sign[:, None], target[:, 7:]], axis=1))
        states.append(state)
    values["observation.state"] = np.concatenate(states, axis=1).astype(np.float32)
    values["action"] = np.concatenate(actions, axis=1).astype(np.float32)
    for camera in layout.calibrated:
        track = demo.cameras[camera]
        values[f"calibration.{camera}.intrinsics"] = np.asarray(track.intrinsics, np.float64).reshape(frames, 9)
        values[f"calibration.{camera}.world_to_camera"] = np.asarray(track.world_to_camera, np.float64).reshape(
            frames, 16
        )
    values["time_s"] = (demo.timestamps - demo.timestamps[0]) / 1e9
    values["timestamp"] = (np.arange(frames) / layout.fps).astype(np.float32)
    values["frame_index"] = np.arange(frames)
    intervention = np.zeros(frames, dtype=bool) if demo.intervention is None else demo.intervention
    values["intervention"] = intervention.astype(np.int64)
    return values


def _pose_rows(arm: ArmTrajectory) -> np.ndarray:
    """Return [N, 8]: position, quaternion w x y z, gripper."""
    return np.concatenate([arm.position, arm.quaternion, arm.gripper[:, None]], axis=1).astype(np.float64)


def _with_continuous_quaternions(poses: np.ndarray) -> np.ndarray:
    """Return the same poses [N, 8], with w >= 0 in the first quaternion and without sign flips between frames."""
    poses = poses.copy()
    quaternions = poses[:, 3:7]
    flips = np.where((quaternions[1:] * quaternions[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    poses[:, 3:7] *= np.cumprod(np.concatenate([[-1.0 if quaternions[0, 0] < 0 else 1.0], flips]))[:, None]
    return poses
