"""The trained network as a policy: an observation of several cameras and an instruction in, a plan of poses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from keygrip.data.robot.augmentation import View
from keygrip.models.nn.flow_matching import Solver
from keygrip.models.policy import Needs, Observation, Plan, arm_axis, views_of

if TYPE_CHECKING:
    from keygrip.models.geometry_vla.module import GeometryVLAModule


@dataclass
class GeometryVLAPolicy:
    """Plans with a trained module; everything that it needs lies in the module's checkpoint.

    The encoders run once a plan, the action head once a step of the sampler.

    Args:
        module: trained, with its statistics.
        margin_m: planned positions are kept within this distance of the positions seen in training: what lies beyond
            was never demonstrated, and may be the table. Poses in metres are kept so, never normalised actions.
        seed: of the noise. temperature, steps, solver: of the sampler; None takes the module's own.
    """

    module: GeometryVLAModule
    margin_m: float = 0.01
    seed: int = 0
    temperature: float | None = None
    steps: int | None = None
    solver: Solver | None = None

    def __post_init__(self) -> None:
        if not self.module.views:
            raise ValueError("The policy does not know its cameras: train it, or load a checkpoint of keygrip.train.")
        self.module.eval()
        changes = {name: getattr(self, name) for name in ("temperature", "steps", "solver")}
        changes = {name: value for name, value in changes.items() if value is not None}
        self._sampling = replace(self.module.sampling, **changes)
        self._geometry = self.module.statistics.geometry
        self._generator = torch.Generator().manual_seed(self.seed)

    @property
    def needs(self) -> Needs:
        """What it reads of an observation."""
        return Needs(arms=self.module.actions.arms, cameras=self.module.views, instruction=True)

    def reset(self, seed: int) -> None:
        """Starts an episode: the noise is from here on a function of the seeds."""
        self._generator.manual_seed(self.seed + seed)

    def session(self) -> Self:
        """Another policy on the same network, with a generator of its own."""
        return replace(self)

    @property
    def workspace(self) -> np.ndarray:
        """``[2, 3]`` lowest and highest position seen in training, metres."""
        return self.module.statistics.position_range.double().cpu().numpy()

    def plan(self, observation: Observation) -> Plan:
        """Poses of the next T steps.

        Raises:
            ValueError: a camera or the instruction is missing.
        """
        return self.plan_batch([observation], [self])[0]

    @torch.inference_mode()
    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        """The plans of several sessions in one pass; the noise of each is drawn by its own generator. As `plan`."""
        module, device = self.module, self.module.device
        instructions = [_instruction(seen) for seen in observations]
        views = [[self._view(view) for view in views_of(seen, module.views)] for seen in observations]
        pictures = torch.from_numpy(
            np.stack([np.stack([view.picture.transpose(2, 0, 1) for view in seen]) for seen in views])
        ).to(device)
        intrinsics, world_to_camera = (
            torch.as_tensor(
                np.stack([np.stack([getattr(view, name) for view in seen]) for seen in views]),
                dtype=torch.float32,
                device=device,
            )
            for name in ("intrinsics", "world_to_camera")
        )
        position, quaternion, gripper = (
            torch.as_tensor(
                np.stack([arm_axis(seen[name], trailing) for seen in observations]), dtype=torch.float32, device=device
            )
            for name, trailing in (("position", 1), ("quaternion", 1), ("gripper", 0))
        )
        scene = module.network.encode(pictures, instructions, intrinsics, world_to_camera)
        shape = (1, module.network.head.horizon, module.actions.size)
        noise = torch.cat([torch.randn(shape, generator=session._generator) for session in sessions]).to(device)
        state = module.actions.state(position, quaternion, gripper)
        sampled = module.network.sample(scene, noise, state, self._sampling)
        planned, turned, opening = module.actions.decode(sampled, position, quaternion)
        low, high = module.statistics.position_range
        kept = planned.clamp(low - self.margin_m, high + self.margin_m)
        return [
            Plan(
                position=kept[row].double().cpu().numpy(),
                quaternion=turned[row].double().cpu().numpy(),
                gripper=opening[row].clamp(0, 1).double().cpu().numpy(),
                step_seconds=module.statistics.step_seconds,
            )
            for row in range(len(observations))
        ]

    def _view(self, view: Mapping[str, Any]) -> View:
        return self._geometry.view(
            np.asarray(view["image"]), np.asarray(view["intrinsics"]), np.asarray(view["world_to_camera"])
        )


def _instruction(observation: Observation) -> str:
    instruction = observation.get("instruction")
    if not isinstance(instruction, str) or not instruction:
        raise ValueError("the observation lacks an instruction, which tells this policy what to do")
    return instruction
