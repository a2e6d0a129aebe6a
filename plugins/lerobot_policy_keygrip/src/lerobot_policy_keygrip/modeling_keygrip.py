"""A keygrip policy with LeRobot's interface. Shapes: B environments, A arms, T planned steps, F state values."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

import keygrip
from keygrip.artifacts import atomic_folder
from keygrip.exporting.folder import is_export
from keygrip.models.policy import Needs, Policy
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.sessions import stochastic
from lerobot_policy_keygrip.configuration_keygrip import ArmLayout, CameraCalibration, KeygripConfig
from lerobot_policy_keygrip.processor_keygrip import make_keygrip_pre_post_processors

WEIGHTS = "keygrip"  # folder of the checkpoint, next to config.json
# Settings that only the person who loads a policy may give, not its folder.
GRANTS = ("trust", "external", "token", "ca")
# Arguments of `from_pretrained` that decide which config.json is read.
HUB_OPTIONS = ("force_download", "resume_download", "proxies", "token", "cache_dir", "local_files_only", "revision")


class KeygripPolicy(PreTrainedPolicy):
    """Returns one action per call from keygrip's plans, separately for each environment of the batch.

    The seed of a policy's sampling is the number of the episode: environment b in the n-th batch of B episodes has
    number n B + b.

    Args:
        config: see `KeygripConfig`. dataset_stats, dataset_meta: passed by LeRobot's factory and not used, because
            keygrip has its own normalisation.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or the configuration does not fit the policy.
    """

    config_class = KeygripConfig
    name = "keygrip"

    def __init__(self, config: KeygripConfig, dataset_stats: Any = None, dataset_meta: Any = None) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: KeygripConfig = config
        self.policy = _load(config)
        self.needs: Needs = self.policy.needs
        arms = len(self.needs.arms)
        self.layouts = config.arms or [
            ArmLayout([8 * a, 8 * a + 1, 8 * a + 2], 8 * a + 7, _quaternion_columns(a)) for a in range(arms)
        ]
        if len(self.layouts) != arms:
            raise ValueError(
                f"arms describes {len(self.layouts)}, the policy moves {arms}: {', '.join(self.needs.arms)}"
            )
        if config.action == "position_step" and arms != 1:
            raise ValueError(f"action=position_step moves one arm, the policy moves {', '.join(self.needs.arms)}")
        names = {camera.name or feature.rpartition(".")[2]: feature for feature, camera in config.cameras.items()}
        trained = (self.needs.camera,) if self.needs.camera else ()
        read = self.needs.cameras or trained
        absent = [name for name in read if name not in names]
        if absent and max(len(read), len(names)) > 1:  # with a single camera on each side, the names need not match
            raise ValueError(
                f"the policy was trained on camera {absent[0]!r}; cameras calibrates {', '.join(names)}: give the one "
                f"in its place name={absent[0]!r}, or of a policy of one camera calibrate that one alone"
            )
        if not read and len(names) > 1:
            raise ValueError(
                "the policy does not say which camera it was trained on (an older checkpoint): calibrate that one "
                f"alone, not {', '.join(names)}"
            )
        self.camera = read[0] if read and not absent else next(iter(names))  # its image is observation["image"]
        self.controllers: list[RecedingHorizon] = []  # one per environment, for the running episodes
        self.bodies: list[Body] = []  # one per environment, with action="position_step"
        self._policies: list[Any] = []  # one per environment, reused for all episodes
        self._episodes = 0  # episodes started so far

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **options: Any
    ) -> KeygripPolicy:
        """Load the policy from a folder that `save_policy` wrote.

        Args:
            config: its configuration with changes, as from LeRobot's command line. `GRANTS` are accepted only here: a
                folder's own config.json must not contain them.

        Raises:
            ValueError: the folder's config.json has one of `GRANTS`, or `use_peft` is set. Also the errors of the
                class.
        """
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        stored = _refuse_grants(pretrained_name_or_path, **hub_options)
        if config is None:
            config = stored
        assert isinstance(config, KeygripConfig)
        if config.token and getattr(stored, "server", None):
            raise ValueError(
                f"config.json of {pretrained_name_or_path} has server={stored.server}, which would be sent the token: "
                "remove server from that file, and give --policy.server on LeRobot's command line"
            )
        if getattr(config, "use_peft", False):  # the configuration would be that of another folder, the adapter's
            raise ValueError("use_peft=true: keygrip's policies are trained by `python -m keygrip.train`, without peft")
        if not config.checkpoint and not config.server:
            config = dataclasses.replace(config, checkpoint=str(Path(pretrained_name_or_path) / WEIGHTS))
        return cls(config).eval()

    def reset(self) -> None:
        """Discard the running plans; called at the start of an episode."""
        self.controllers = []

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """Return the commanded poses [B, 8 A], or with `action=position_step` the steps [B, 4].

        Args:
            batch: `observation.state` [B, F], images [B, 3, H, W] in 0 .. 1, and, if the policy reads an instruction,
                `task`, B sentences.
        """
        observations = self._observations(batch)
        controllers = self._running(len(observations))
        commands = [
            controller.act(observation) for controller, observation in zip(controllers, observations, strict=True)
        ]
        if self.config.action == "pose":
            actions = [command.reshape(-1) for command in commands]
        else:
            if not self.bodies:
                self.bodies = [self._body(observation["position"][0]) for observation in observations]
            actions = [self._step(command[0], body) for command, body in zip(commands, self.bodies, strict=True)]
        return torch.as_tensor(np.stack(actions), dtype=torch.float32, device=batch["observation.state"].device)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """Return the planned poses [B, T, 8 A], one every `step_seconds` of the plan.

        Raises:
            ValueError: the action is not a pose.
        """
        if self.config.action != "pose":
            raise ValueError(
                f"predict_action_chunk gives poses, and action is {self.config.action!r}: use select_action"
            )
        observations = self._observations(batch)
        chunks = []
        for controller, observation in zip(self._running(len(observations)), observations, strict=True):
            plan = controller.policy.plan(observation)
            poses = np.concatenate([plan.position, plan.quaternion, plan.gripper[..., None]], axis=-1)  # [A, T, 8]
            chunks.append(poses.transpose(1, 0, 2).reshape(poses.shape[1], -1))
        return torch.as_tensor(np.stack(chunks), dtype=torch.float32, device=batch["observation.state"].device)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        raise NotImplementedError("keygrip's policies are trained by `python -m keygrip.train`, not by lerobot-train")

    def get_optim_params(self) -> dict[str, Any]:
        return {}

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the configuration, without `GRANTS`, and the checkpoint that it names."""
        folder = Path(save_directory)
        config = self.config
        if config.checkpoint and Path(config.checkpoint).resolve() != (folder / WEIGHTS).resolve():
            if is_export(config.checkpoint):
                shutil.copytree(config.checkpoint, folder / WEIGHTS)
            else:
                # imported here, because a policy of a server must work without omegaconf and hydra
                from omegaconf import OmegaConf

                from keygrip import export

                export.run(
                    OmegaConf.structured(
                        export.ExportSchema(
                            checkpoint=config.checkpoint,
                            to=str(folder / WEIGHTS),
                            trust=list(config.trust),
                            external=dict(config.external),
                        )
                    )
                )
        # without the checkpoint's path, also for the folder it was loaded from: a path would be wrong after a move
        ungranted = {"trust": [], "external": {}, "token": None, "ca": None}
        if config.token:  # it is given with the server each time
            ungranted["server"] = None
        dataclasses.replace(config, checkpoint=None, **ungranted)._save_pretrained(folder)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _running(self, environments: int) -> list[RecedingHorizon]:
        """Return the controllers of the running episodes, one per environment; create new ones after `reset`."""
        if len(self.controllers) != environments:
            draws = stochastic(self.policy)
            while len(self._policies) < environments:
                self._policies.append(self.policy.session() if draws else self.policy)
            for index, policy in enumerate(self._policies[:environments] if draws else ()):
                policy.reset(self._episodes + index)
            self._episodes += environments
            self.controllers = [self._controller(policy) for policy in self._policies[:environments]]
            self.bodies = []
        return self.controllers

    def _controller(self, policy: Policy) -> RecedingHorizon:
        settings = {each.name: each for each in dataclasses.fields(RecedingHorizon) if each.init}
        unknown = sorted(set(self.config.control) - set(settings) | {"policy", "control_hz"} & set(self.config.control))
        if unknown:
            raise ValueError(f"control has no setting {unknown[0]!r}; it has {', '.join(list(settings)[2:])}")
        changes = {key: _setting_of(settings[key], value) for key, value in self.config.control.items()}
        return RecedingHorizon(policy, self.config.control_hz, **changes)

    def _observations(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Return keygrip's observation of each environment."""
        states = batch["observation.state"].detach().cpu().numpy().astype(np.float64)
        views = {name: _camera_view(batch, name, camera) for name, camera in self.config.cameras.items()}
        observations = []
        for index, state in enumerate(states):
            poses = [_pose(layout, state) for layout in self.layouts]
            env_views = {name: view | {"image": view["image"][index]} for name, view in views.values()}
            observation: dict[str, Any] = {
                **env_views[self.camera],
                "position": np.stack([pose[0] for pose in poses]),
                "quaternion": np.stack([pose[1] for pose in poses]),
                "gripper": np.array([pose[2] for pose in poses]),
            }
            if len(env_views) > 1:
                observation["cameras"] = env_views
            if self.needs.instruction:
                if "task" not in batch:
                    raise ValueError("the policy reads an instruction; the observation has no task")
                task = batch["task"]
                observation["instruction"] = task if isinstance(task, str) else task[index]
            observations.append(observation)
        return observations

    def _body(self, position: np.ndarray) -> Body:
        """Return the body that the steps move, for an episode that starts with the gripper at this position."""
        offset = np.asarray(self.layouts[0].offset, np.float64)
        low, high = (np.add(edge, offset) if edge else None for edge in (self.config.body_low, self.config.body_high))
        return Body(np.add(position, self.config.body_offset), self.config.step_m, low, high)

    def _step(self, command: np.ndarray, body: Body) -> np.ndarray:
        """Return LeRobot's action [4] for the command [8] of the arm."""
        effort = self.config.closed_effort if command[7] < 0.5 else self.config.open_effort
        return np.append(body.step_to(command[:3]), effort)


@dataclasses.dataclass
class Body:
    """The point that the steps of `action="position_step"` move and the hand follows.

    Args:
        position: [3] current position, metres in the world; `step_to` changes it. step_m: metres of a step of 1.
        low, high: [3] bounds to which the environment limits it; None: not known.
    """

    position: np.ndarray
    step_m: float
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def step_to(self, goal: np.ndarray) -> np.ndarray:
        """Return the step [3] towards a position [3], within -1 .. 1 along each axis, and move the body by it."""
        if self.low is not None and self.high is not None:
            goal = np.clip(goal, self.low, self.high)
        step = np.clip((goal - self.position) / self.step_m, -1, 1)
        self.position = self.position + self.step_m * step
        return step


def save_policy(config: KeygripConfig, folder: str | Path) -> Path:
    """Write a folder for `--policy.path`: configuration, processors, and the checkpoint's weights.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be loaded, or the configuration does not fit it.
        FileExistsError: the folder is not empty.
    """
    policy = KeygripPolicy(config)
    with atomic_folder(folder) as temporary:
        policy.save_pretrained(temporary)
        for processor in make_keygrip_pre_post_processors(config):
            processor.save_pretrained(temporary)
    return Path(folder)


def _refuse_grants(place: str | Path, **hub_options: Any) -> PreTrainedConfig:
    """Return the configuration in a policy's folder. Raises ValueError if it has one of `GRANTS`.

    The folder may be downloaded, and is no place for a token. `trust` lets a checkpoint run code of a package, and
    `external` lets it read files and addresses, so that a folder with these settings would decide about its own
    checkpoint.
    """
    stored: PreTrainedConfig = PreTrainedConfig.from_pretrained(place, **hub_options)
    for name in GRANTS:
        if value := getattr(stored, name, None):
            shown = "..." if name == "token" else value  # errors end up in logs
            given = shown if name == "token" else json.dumps(value)
            raise ValueError(
                f"config.json of {place} has {name}={shown}: which packages are trusted, which files are read and "
                "which token is sent is decided by who loads a policy, not by its folder. Remove "
                f"{name} from that file; if you want it, give --policy.{name}='{given}' on LeRobot's command line"
            )
    return stored


def _load(config: KeygripConfig) -> Any:
    if config.server:
        return RemotePolicy(config.server, token=config.token, ca=config.ca)
    if not config.checkpoint:
        raise ValueError(
            "keygrip needs checkpoint (a run folder, checkpoint file or exported folder) or server (a URL)"
        )
    return keygrip.load_policy(
        config.checkpoint,
        trust=config.trust,
        external=config.external or None,
        device=str(config.device),
        **config.planning,
    )


def _setting_of(setting: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value of `control` in the type of the controller's setting.

    Raises:
        ValueError: it is no value of that type.
    """
    kind = type(setting.default)
    if value is None and "None" in str(setting.type):  # switched off, such as grip_below and release_above
        return None
    if value is None or (kind is bool and value not in (0, 1)):
        raise ValueError(f"control.{setting.name}={value!r}: give a value of type {setting.type}")
    return kind(value)


def _quaternion_columns(arm: int) -> list[int]:
    return [8 * arm + 3, 8 * arm + 4, 8 * arm + 5, 8 * arm + 6]


def _camera_view(batch: dict[str, Any], feature: str, camera: CameraCalibration) -> tuple[str, dict[str, Any]]:
    """Return keygrip's name of a camera, and its images [B, H, W, 3] uint8 with intrinsics for their size and
    world_to_camera."""
    if feature not in batch:
        raise ValueError(f"the observation has no image {feature!r}; it has {', '.join(batch)}")
    images = batch[feature].detach().cpu().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    scale = [
        images.shape[2] / camera.width if camera.width else 1.0,
        images.shape[1] / camera.height if camera.height else 1.0,
        1.0,
    ]
    intrinsics = np.diag(scale) @ np.asarray(camera.intrinsics, dtype=np.float64)
    return camera.name or feature.rpartition(".")[2], {
        "image": images,
        "intrinsics": intrinsics,
        "world_to_camera": np.asarray(camera.world_to_camera, dtype=np.float64),
    }


def _pose(layout: ArmLayout, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return position [3], unit quaternion [4] and opening of one arm."""
    quaternion = state[layout.quaternion] if layout.quaternion else np.asarray(layout.fixed_quaternion, np.float64)
    opening = (state[layout.gripper] - layout.closed) / (layout.open - layout.closed)
    position = state[layout.position] + np.asarray(layout.offset, np.float64)
    return position, quaternion / np.linalg.norm(quaternion), float(np.clip(opening, 0, 1))
