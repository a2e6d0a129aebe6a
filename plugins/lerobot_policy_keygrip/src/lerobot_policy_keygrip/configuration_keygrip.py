"""What LeRobot's observations and actions do not say, and keygrip's policies need."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode

ACTIONS = ("pose", "position_step")
OF_STEPS = ("step_m", "body_offset", "body_low", "body_high", "closed_effort", "open_effort")


@dataclass
class CameraCalibration:
    """One image of the observation.

    Args:
        intrinsics: 3 x 3, pixels of the image as LeRobot gives it (flips included), corner convention.
        world_to_camera: 4 x 4 rigid, OpenCV camera, metres.
        width, height: the image size that the intrinsics are for; images of other sizes scale them. 0: as they come.
        name: keygrip's name of the camera; empty: the last part of the feature's name.
    """

    intrinsics: list[list[float]]
    world_to_camera: list[list[float]]
    width: int = 0
    height: int = 0
    name: str = ""


@dataclass
class ArmLayout:
    """Where one arm's pose stands in `observation.state`.

    Args:
        position: indices of x, y, z, metres in the world. offset: added to it, metres in the world, where the state's
            point is not the gripper point of the demonstrations.
        quaternion: indices of w, x, y, z; empty: the gripper does not turn, its quaternion is `fixed_quaternion`.
        gripper: index of the opening; closed, open: its values there.
    """

    position: list[int]
    gripper: int
    quaternion: list[int] = field(default_factory=list)
    fixed_quaternion: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0, 0.0])
    offset: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    closed: float = 0.0
    open: float = 1.0


@PreTrainedConfig.register_subclass("keygrip")
@dataclass
class KeygripConfig(PreTrainedConfig):
    """A trained keygrip policy.

    Args:
        checkpoint: run folder, checkpoint file or exported folder; None: `keygrip/` beside this configuration.
        server: URL of `python -m keygrip.serve`, in place of a checkpoint.
        trust: packages beside keygrip whose model parts the checkpoint may name.
        external: files that the model needs and the checkpoint does not hold, by dotted setting, e.g.
            `network.instruction.source` (a frozen text tower).
        planning: changes to how it plans, e.g. `{"compiled": True}` (geometry_vla) or `{"decoder": "viterbi"}`
            (volume_query); of a checkpoint alone, a server has its own.
        control_hz: calls of `select_action` per second.
        control: changes to keygrip's controller, e.g. `execute_seconds`, `still_distance_m`.
        cameras: calibration by image feature.
        arms: one entry per arm, in the policy's order; empty: 8 numbers per arm, x, y, z, qw, qx, qy, qz, gripper.
        action: "pose": 8 numbers per arm, the commanded pose. "position_step": a step of the point that one arm's hand
            follows (Meta-World's mocap body), within -1 .. 1, to the commanded position, and the gripper's effort. The
            observation does not hold that point: it is known from where it stands when an episode begins, and the steps
            since then. It is not for environments whose step is from where the hand itself is.
        step_gain: no longer read; policies that were saved with it say so.
        step_m: of "position_step", metres of a step of 1; 0.01 is Meta-World's.
        body_offset: of "position_step", where that point stands beside the hand when an episode begins, metres.
        body_low, body_high: of "position_step", x, y, z between which the environment keeps that point, metres, as
            positions stand in the state (Meta-World's `hand_low`, `hand_high`); empty: it does not.
        closed_effort, open_effort: of "position_step", where the commanded opening is below 0.5 and elsewhere; those of
            keygrip's Meta-World environment (which closes with 0.1 in pick-out-of-hole-v3).
    """

    checkpoint: str | None = None
    server: str | None = None
    trust: list[str] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    planning: dict[str, Any] = field(default_factory=dict)
    control_hz: float = 10.0
    control: dict[str, float] = field(default_factory=dict)
    cameras: dict[str, CameraCalibration] = field(default_factory=dict)
    arms: list[ArmLayout] = field(default_factory=list)
    action: str = "pose"
    step_gain: float | None = None
    step_m: float = 0.01
    body_offset: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    body_low: list[float] = field(default_factory=list)
    body_high: list[float] = field(default_factory=list)
    closed_effort: float = 0.6
    open_effort: float = -1.0
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {self.action!r}")
        if self.action == "pose":
            self.step_gain = None  # older configurations hold it whatever their action
        if self.checkpoint and self.server:
            raise ValueError("give checkpoint or server, not both")
        if self.step_m <= 0:
            raise ValueError(f"step_m is the length of a step in metres, above 0, not {self.step_m}")
        if (len(self.body_offset), len(self.body_low), len(self.body_high)) not in ((3, 0, 0), (3, 3, 3)):
            raise ValueError(
                "body_offset, body_low and body_high are x, y, z, the last two of them both or neither, not "
                f"{self.body_offset}, {self.body_low}, {self.body_high}"
            )
        for name in ("planning", "external", "trust"):
            if self.server and getattr(self, name):
                raise ValueError(f"{name} has no effect with server: give it to `python -m keygrip.serve`")

    def validate_features(self) -> None:
        """Raises ValueError: an image that no camera is calibrated for, or none at all; an older `position_step`; a
        setting of steps with poses."""
        # The first two not while the file is read: LeRobot would hide the reason.
        changed = [each.name for each in fields(self) if each.name in OF_STEPS and not _is_default(self, each)]
        if self.action == "pose" and changed:
            raise ValueError(
                f"{changed[0]} has an effect only with action=position_step, and action is pose: leave it out"
            )
        if self.step_gain is not None:
            raise ValueError(
                "step_gain is no longer read: position_step moves the body that the hand follows, by step_m metres a "
                "step of 1; give step_m, body_offset, body_low and body_high (see README.md) and save the policy again"
            )
        if not self.cameras:
            raise ValueError("cameras is empty: keygrip needs the calibration of each image (see README.md)")
        missing = [name for name in self.cameras if self.input_features and name not in self.input_features]
        if missing:
            raise ValueError(
                f"cameras names {missing[0]!r}; the observation has {', '.join(self.input_features or {})}"
            )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError("keygrip's policies are trained by `python -m keygrip.train`, not by lerobot-train")

    def get_scheduler_preset(self) -> None:
        return None


def _is_default(config: KeygripConfig, setting: Field[Any]) -> bool:
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    value = getattr(config, setting.name)
    return bool((list(value) if isinstance(value, (list, tuple)) else value) == default)
