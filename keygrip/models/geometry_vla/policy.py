"""The trained network as a policy: an observation of several cameras and an instruction in, a plan of poses out."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from keygrip.data.robot.augmentation import View
from keygrip.models.geometry_vla.network import Scene
from keygrip.models.nn.flow_matching import Solver
from keygrip.models.nn.inpainting import soft_mask
from keygrip.models.nn.low_precision import Precision
from keygrip.models.policy import (
    HELD_BACK_M,
    Needs,
    Observation,
    Plan,
    calibration_of,
    image_of,
    instruction_of,
    refuse_incomplete,
    refuse_not_finite,
    robot_number,
    view_names,
    views_of,
)
from keygrip.models.policy_tensors import plans_of, restored_on_error, stacked_poses, stacked_views
from keygrip.models.training_box import HeldBackWarning, Margin, check_margin, kept_in_box
from keygrip.training.compilation import missing_compiler

if TYPE_CHECKING:
    from keygrip.models.geometry_vla.module import GeometryVLAModule

log = logging.getLogger(__name__)

ROUNDING_S = 1e-6


@dataclass(frozen=True)
class _PlanInputs:
    """Inputs of B plans: `noise` [B, T, Da], `state` [B, Da], `position` [B, A, 3], `turn` [B, A, 4]."""

    scene: Scene
    noise: torch.Tensor
    state: torch.Tensor
    position: torch.Tensor
    turn: torch.Tensor


@dataclass
class GeometryVLAPolicy:
    """Plan with a trained module, whose checkpoint contains everything that the policy needs.

    The encoders run once per plan, the action head once per step of the sampler.

    Args:
        module: trained, with its statistics.
        margin_m: planned positions are kept within this distance of the bounding box of the training positions, along
            all axes or along x, y and z; None: no limit. Positions beyond were never demonstrated, and may be in the
            table. The limit applies to poses in metres, never to normalised actions. `held_back` of a plan gives how
            far it was moved; a warning reports this once per episode.
        embodiment: which robot is controlled, for a model with several robots; None for other models.
        seed: of the noise. temperature, steps, solver: of the sampler; None: the module's own.
        vlm_precision: of the vision-language model's weights: float32 as trained, bfloat16, or int8 (a quarter of the
            memory); in place, for all policies on this module.
        compiled: torch compiles the action head and a small geometry encoder: about a minute before the first plan,
            then faster plans for one observation. Plans for several observations at once run uncompiled, and so do all
            plans if torch's settings (threads, determinism, precision of products) change later. In place, as above.
    """

    converting: ClassVar = ("vlm_precision",)  # settings that change the module's weights as soon as they are set

    module: GeometryVLAModule
    margin_m: Margin = 0.01
    seed: int = 0
    temperature: float | None = None
    steps: int | None = None
    solver: Solver | None = None
    embodiment: str | None = None
    vlm_precision: Precision = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        check_margin(self.margin_m)
        if self.embodiment is not None:  # a missing one may be set later, by `replace`
            robot_number(self.module.embodiments, self.embodiment)
        if not self.module.views:
            raise ValueError("The policy has no cameras yet: train it, or load a checkpoint of keygrip.train.")
        self.module.eval()
        if self.vlm_precision != "float32":
            self.module.network.vlm.lower_precision(self.vlm_precision)
        changes = {name: getattr(self, name) for name in ("temperature", "steps", "solver")}
        changes = {name: value for name, value in changes.items() if value is not None}
        self._sampling = replace(self.module.sampling, **changes)
        if self.solver not in (None, "euler") and self._sampling.steps == 1:
            raise ValueError(
                f"policy.solver={self.solver} has no effect with a single step (policy.steps; model.sampling.steps): "
                "leave it out, or give more steps"
            )
        self._geometry = self.module.statistics.geometry
        self._generator = torch.Generator().manual_seed(self.seed)
        self._warning = HeldBackWarning()

    @property
    def needs(self) -> Needs:
        """What the policy reads from an observation."""
        return Needs(
            arms=self.module.actions.arms,
            cameras=self.module.views,
            instruction=True,
            calibration=self.module.reads_calibration,
            plans_joints=self.module.actions.kind == "joint",
        )

    def reset(self, seed: int) -> None:
        """Start an episode; from here on the noise depends only on the seeds."""
        self._warning.begin()
        self._generator.manual_seed(self.seed + seed)

    def make_ready(self) -> None:
        """With `compiled`, compile by planning from black images; do nothing if that is already done.

        Raises:
            ValueError: this machine has no compiler.
        """
        module = self.module
        if not self.compiled or module.network.compiled:
            return
        if missing := missing_compiler(module.device.type == "cuda"):
            raise ValueError(f"policy.compiled=true needs {missing}; or plan without, policy.compiled=false")
        log.info("the policy's action head and geometry encoder are being compiled, for about a minute")
        module.network.compile_parts()
        # Instructions of two lengths: after the second, torch treats the length as variable.
        for words in ("go", "go to the other place"):
            session = self.session()  # with its own generator, so that the noise of this policy's plans does not change
            session._plans([session._blank_observation(words)], [session])
        module.network.compiled = True

    def _blank_observation(self, instruction: str) -> Observation:
        """An observation of black images, with the arms in the middle of their workspace."""
        arms, size = len(self.module.actions.arms), self._geometry.image_size
        view = {"image": np.zeros((size, size, 3), np.uint8), "intrinsics": np.eye(3), "world_to_camera": np.eye(4)}
        return {
            "cameras": dict.fromkeys(self.module.views, view),
            "instruction": instruction,
            "position": np.tile(self.workspace.mean(axis=0), (arms, 1)),
            "quaternion": np.tile([1.0, 0.0, 0.0, 0.0], (arms, 1)),
            "gripper": np.ones(arms),
        }

    def session(self) -> Self:
        """Another policy on the same network, with its own random generator."""
        return replace(self)

    @property
    def workspace(self) -> np.ndarray:
        """``[2, 3]`` lowest and highest position seen in training, metres."""
        return self._position_range.double().cpu().numpy()

    @property
    def _position_range(self) -> torch.Tensor:
        module = self.module
        if not module.embodiments:
            return module.statistics.position_range
        return module.actions.position_range[self._robot_index]

    @property
    def _robot_index(self) -> int:
        """Index of its robot among the model's robots."""
        return robot_number(self.module.embodiments, self.embodiment)

    def _robot_indices(self, count: int) -> torch.Tensor | None:
        if not self.module.embodiments:
            return None
        return torch.full((count,), self._robot_index, device=self.module.device)

    def plan(self, observation: Observation) -> Plan:
        """Poses of the next T steps.

        Raises:
            ValueError: a camera, the instruction or an arm's pose is missing or invalid, or the plan is not
                finite.
        """
        refuse_incomplete(observation, self.needs)
        return self.plan_batch([observation], [self])[0]

    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        """Plan for several sessions in one pass; each session's own generator samples its noise. See `plan`. An error
        leaves the generators of all sessions unchanged."""
        self.make_ready()
        with self._without_recompilation(), restored_on_error([session._generator for session in sessions]):
            return self._plans(observations, sessions)

    def _without_recompilation(self) -> contextlib.AbstractContextManager[Any]:
        """Context without further compilation: new shapes run uncompiled, so that no robot has to wait."""
        ready = self.module.network.compiled
        return torch.compiler.set_stance("eager_on_recompile") if ready else contextlib.nullcontext()

    @torch.inference_mode()
    def _plans(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        inputs = self._network_inputs(observations, sessions)
        sampled = self.module.network.sample(inputs.scene, inputs.noise, inputs.state, self._sampling)
        return self._planned(sampled, inputs, sessions)

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """A plan that continues the one under way (real-time chunking, see :mod:`keygrip.models.nn.inpainting`).

        Joints and a controller's inputs are continued as such. If the plan under way has no joints, because its poses
        were moved into the training box, the new plan does not continue it, as after its end.

        Args:
            observation: with `time_s`. executing: a plan with its `time_s`, of the same clock.
            delay_s: time until the new plan arrives; for this time the plan under way is executed in any case.

        Raises:
            ValueError: a camera or the instruction is missing; a time is missing or not finite; the plan under way is
                not finite, or not a plan of this policy (other steps, joints or inputs); the new plan is not
                finite.
        """
        if executing.time_s is None or "time_s" not in observation:
            raise ValueError("a plan is continued by its time: the observation and the plan need time_s")
        for name, seconds in {"delay_s": delay_s, "time_s of the observation": observation["time_s"]}.items():
            if not math.isfinite(seconds):
                raise ValueError(f"{name} is {seconds}: it must be a finite number of seconds")
        refuse_not_finite(executing, "the plan under way")
        self.make_ready()
        with self._without_recompilation():
            return self._continued(observation, executing, executing.time_s, delay_s)

    @torch.no_grad()
    def _continued(self, observation: Observation, executing: Plan, began_s: float, delay_s: float) -> Plan:
        module = self.module
        dt, horizon = module.statistics.step_seconds, module.network.head.horizon
        if abs(executing.step_seconds - dt) > ROUNDING_S:
            raise ValueError(
                f"the plan under way has steps of {executing.step_seconds:g} s, those of this policy are {dt:g} s: it "
                "continues its own plans"
            )
        inputs = self._network_inputs([observation], [self])
        # positions of the new plan's steps in the plan under way, in its steps, counted from 0
        places = (float(observation["time_s"]) - began_s + dt * np.arange(1, horizon + 1)) / dt - 1
        steps = executing.gripper.shape[1]
        known_steps = int((places <= steps - 1 + 1e-6).sum())
        actions = self._encode_executing(executing, np.clip(places, 0, steps - 1), inputs) if known_steps else None
        if actions is None:
            sampled = module.network.sample(inputs.scene, inputs.noise, inputs.state, self._sampling)
            return self._planned(sampled, inputs, [self])[0]
        fixed = math.ceil(min(max(delay_s, 0.0) / dt, known_steps) - 1e-6)
        weight = soft_mask(horizon, fixed, known_steps, module.device)
        sampled = module.network.sample_continuing(
            inputs.scene, inputs.noise, inputs.state, actions, weight, self._sampling
        )
        return self._planned(sampled, inputs, [self])[0]

    def _encode_executing(self, executing: Plan, rows: np.ndarray, inputs: _PlanInputs) -> torch.Tensor | None:
        """A plan as normalised actions ``[1, T, Da]`` at the positions ``rows`` ``[T]``, in its steps from 0; None if
        the plan does not contain the quantities that the actions consist of."""
        actions, device = self.module.actions, self.module.device
        low = np.floor(rows).astype(int)
        high, share = np.minimum(low + 1, executing.gripper.shape[1] - 1), (rows - low)[None, :, None]

        def between(values: np.ndarray) -> torch.Tensor:
            # Also for a controller's inputs: each applies for one step, so a step across two steps mixes both.
            mixed = values[:, low] * (1 - share) + values[:, high] * share
            return torch.as_tensor(mixed, dtype=torch.float32, device=device)[None]

        opening = between(executing.gripper[..., None])
        if actions.reads:
            (name,) = actions.reads
            series = getattr(executing, name)
            if series is None:
                return None
            width = actions.columns - (actions.kind == "joint")  # the opening is no joint
            if series.shape[-1] != width:
                raise ValueError(
                    f"the plan under way has {series.shape[-1]} {name} per step, those of this policy have {width}: it "
                    "continues its own plans"
                )
            raw_actions = between(series)
            if actions.kind == "joint":
                raw_actions = torch.cat([raw_actions, opening], dim=-1)
            return actions.encode_numbers(raw_actions, self._robot_indices(1))
        nearest = np.where(share[0, :, 0] < 0.5, low, high)
        quaternion = torch.as_tensor(executing.quaternion[:, nearest], dtype=torch.float32, device=device)[None]
        return actions.encode_poses(
            *(between(executing.position), quaternion, opening[..., 0]),
            *(inputs.position, inputs.turn, self._robot_indices(1)),
        )

    def _network_inputs(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> _PlanInputs:
        """The encoders' pass, the present poses and the noise of several plans."""
        module, device, needs = self.module, self.module.device, self.needs
        instructions = [instruction_of(observation) for observation in observations]
        views = [
            [
                self._view(view, camera_name, needs.calibrated(name))
                for name, view, camera_name in zip(
                    needs.cameras,
                    views_of(observation, needs.cameras),
                    view_names(observation, needs.cameras),
                    strict=True,
                )
            ]
            for observation in observations
        ]
        images, intrinsics, world_to_camera = stacked_views(views, device)
        position, quaternion, gripper = stacked_poses(observations, len(needs.arms), device)
        robots = self._robot_indices(len(position))
        scene = module.with_places(module.network.encode(images, instructions, intrinsics, world_to_camera), robots)
        shape = (1, module.network.head.horizon, module.actions.size)
        noise = torch.cat([torch.randn(shape, generator=session._generator) for session in sessions]).to(device)
        state = module.actions.state(position, quaternion, gripper, robots)
        return _PlanInputs(scene, noise, state, position, quaternion)

    def _planned(self, sampled: torch.Tensor, inputs: _PlanInputs, sessions: Sequence[Self]) -> list[Plan]:
        module = self.module
        robots = self._robot_indices(len(sampled))
        planned, quaternion, opening = module.actions.decode(sampled, inputs.position, inputs.turn, robots)
        clamped, held_back = kept_in_box(planned, self._position_range, self.margin_m)
        terms = self._joints_or_inputs(sampled, held_back.amax(dim=(1, 2)) > HELD_BACK_M)
        plans = plans_of(clamped, quaternion, opening.clamp(0, 1), module.statistics.step_seconds, held_back=held_back)
        for session, plan in zip(sessions, plans, strict=True):
            session._warning.check_plan(plan, module.actions.arms, self.margin_m)
        return [replace(plan, **plan_terms) for plan, plan_terms in zip(plans, terms, strict=True)]

    def _joints_or_inputs(self, sampled: torch.Tensor, was_clamped: torch.Tensor) -> list[dict[str, Any]]:
        """The plans as joints or controller inputs, if these are the actions.

        A plan whose poses were moved into the workspace has no joints, because the planned joints must not be executed.
        Controller inputs stay, clipped to the controller's range, since their poses are only an estimate.
        """
        actions = self.module.actions
        if not actions.reads:
            return [{}] * len(sampled)
        values = actions.numbers(sampled, self._robot_indices(len(sampled))).double().cpu().numpy()
        (name,) = actions.reads
        if actions.kind != "joint":
            return [{name: row} for row in values.clip(-1, 1)]
        return [
            {} if outside else {name: row[..., :-1]} for outside, row in zip(was_clamped.tolist(), values, strict=True)
        ]

    def _view(self, view: Mapping[str, Any], camera: str, calibrated: bool) -> View:
        image = image_of(view, camera)
        if not calibrated:
            return self._geometry.view(image, np.eye(3), np.eye(4))
        return self._geometry.view(image, *calibration_of(view, camera))
