"""Configuration: information that keygrip's policies need and LeRobot's observations and actions do not contain."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode

ACTIONS = ("pose", "position_step")
OF_STEPS = ("step_m", "body_offset", "body_low", "body_high", "closed_effort", "open_effort")


@dataclass
class CameraCalibration:
    """Calibration of the camera of one image of the observation.

    Args:
        intrinsics: 3 x 3, in pixels of the image as LeRobot returns it (after any flips), corner convention.
        world_to_camera: 4 x 4 rigid, OpenCV camera, metres.
        width, height: the image size that the intrinsics are for; for images of other sizes they are scaled. 0: the
            intrinsics are used unchanged.
        name: keygrip's name of the camera; empty: the last part of the feature's name.
    """

    intrinsics: list[list[float]]
    world_to_camera: list[list[float]]
    width: int = 0
    height: int = 0
    name: str = ""


@dataclass
class ArmLayout:
    """The indices of one arm's pose in `observation.state`.

    Args:
        position: indices of x, y, z, metres in the world. offset: added to the position, metres in the world; needed if
            the point in the state is not the gripper point of the demonstrations.
        quaternion: indices of w, x, y, z; empty: the gripper does not rotate, its quaternion is `fixed_quaternion`.
        gripper: index of the opening; closed, open: the state's values for a closed and an open gripper.
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
        checkpoint: run folder, checkpoint file or exported folder; None: `keygrip/` in the folder of this
            configuration.
        server: URL of `python -m keygrip.serve`, instead of a checkpoint.
        token: of that server, if it has one. ca: PEM file of the certificate (or authority) to trust with https; None:
            those that the system trusts.
        trust: packages other than keygrip whose model parts the checkpoint may name.
        external: files that the model needs and the checkpoint does not contain, by dotted setting, e.g.
            `network.instruction.source` (a frozen text tower). This, `trust`, `token` and `ca` are not saved and not
            accepted from a policy's folder: give them each time the policy is loaded.
        planning: changes to the policy's planning, e.g. `{"compiled": True}` (geometry_vla) or
            `{"decoder": "viterbi"}` (volume_query); only with a checkpoint, because a server has its own.
        control_hz: calls of `select_action` per second.
        control: changes to keygrip's controller (`RecedingHorizon`), e.g. `execute_seconds`, `still_distance_m`.
        cameras: calibration by image feature.
        arms: one entry per arm, in the policy's order; empty: the state has 8 values per arm, x, y, z, qw, qx, qy, qz,
            gripper.
        action: "pose": 8 values per arm, the commanded pose. "position_step": a step towards the commanded position,
            within -1 .. 1, of the point that the hand of one arm follows (Meta-World's mocap body), and the gripper's
            effort. The observation does not contain that point: it is computed from its position at the start of the
            episode and the steps since then. Do not use it in environments whose step starts at the hand itself.
        step_gain: no longer read; a policy that was saved with it is refused with a message.
        step_m: for "position_step": length in metres of a step of 1; Meta-World's is 0.01.
        body_offset: for "position_step": offset of that point from the hand at the start of an episode, metres.
        body_low, body_high: for "position_step": lowest and highest x, y, z to which the environment limits that point,
            metres, in the frame of the state's positions (Meta-World's `hand_low`, `hand_high`); empty: no limits.
        closed_effort, open_effort: for "position_step": effort where the commanded opening is below 0.5, and elsewhere;
            the defaults are those of keygrip's Meta-World environment (which closes with 0.1 in pick-out-of-hole-v3).
    """

    checkpoint: str | None = None
    server: str | None = None
    token: str | None = None
    ca: str | None = None
    trust: list[str] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    planning: dict[str, Any] = field(default_factory=dict)
    control_hz: float = 10.0
    control: dict[str, Any] = field(default_factory=dict)
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
            self.step_gain = None  # older configurations contain it with any action
        if self.checkpoint and self.server:
            raise ValueError("give checkpoint or server, not both")
        for name in ("token", "ca"):
            if getattr(self, name) and not self.server:
                raise ValueError(f"{name} has no effect without server")
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
        """Raise ValueError if no camera is calibrated or a calibrated image is not in the observation, if the
        configuration has an older `position_step`, or if a setting of "position_step" is given with "pose"."""
        # The first two are not checked in __post_init__: LeRobot would hide an error raised while it reads the file.
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
