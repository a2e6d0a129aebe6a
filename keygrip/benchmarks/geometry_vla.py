"""What the geometry-injected policy costs: the parts of an action chunk, and the parameters of its compressors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from keygrip.benchmarks.inference import looking_down
from keygrip.benchmarks.measuring import Timed, Work, interleaved_seconds, milliseconds
from keygrip.config import compose
from keygrip.data.batches import PolicyTargets
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.models.geometry_vla.compression import TYPES, build_geom_compressor
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.geometry_vla.network import Scene
from keygrip.training.parts import build_stored

INSTRUCTION = "put the red cube into the bowl"


@dataclass(frozen=True)
class VLAParams:
    """Parameters of the three compressors, in millions, at sizes that the config names.

    Args:
        geom_dim: width of a geometry token. width: of the action head. blocks: of it. tokens, heads: see
            `build_geom_compressor`.
    """

    geom_dim: int
    width: int
    blocks: int
    tokens: int
    heads: int

    def run(self, quick: bool) -> dict[str, float]:
        """`pool_m`, `per_layer_m`, `qformer_m`."""

        figures = {}
        for kind in TYPES:
            with torch.device("meta"):
                part = build_geom_compressor(kind, self.geom_dim, self.width, self.blocks, self.tokens, self.heads)
            figures[f"{kind}_m"] = round(sum(parameter.numel() for parameter in part.parameters()) / 1e6, 3)
        return figures


@dataclass(frozen=True)
class VLAChunk(Timed):
    """Time from an observation to an action chunk, and of the three parts that it is made of. Weights are random.

    Args (beside those of `Timed`, whose repetitions are chunks):
        overrides: of ``keygrip.train``, which say what policy. warm_up: chunks before those.
    """

    overrides: Sequence[str]
    warm_up: int

    def run(self, quick: bool) -> dict[str, float]:
        """`vlm_ms`, `geometry_ms` (with its compressor), `head_ms` (all steps of the sampler), `p50_ms` and `p95_ms` of
        the whole, on the GPU where there is one."""
        config = compose("train", self.overrides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = untrained(config).to(device)
        repetitions, limit_s = self.effort(quick)
        policy, seen = module.policy(), observation(module, config.data.image_size)
        parts = _Parts(module, device, config.data.image_size)
        sides: dict[str, Work] = {
            "": partial(policy.plan, seen),
            "vlm_": parts.vlm,
            "geometry_": parts.geometry,
            "head_": parts.head,
        }
        if module.network.geometry is None:
            del sides["geometry_"]
        seconds = interleaved_seconds(sides, repetitions, device, limit_s, self.warm_up)
        figures = {f"{name}ms": milliseconds(values) for name, values in seconds.items() if name}
        figures |= {f"p{percentile}_ms": milliseconds(seconds[""], percentile) for percentile in (50, 95)}
        return figures | {"threads": torch.get_num_threads()}


class _Parts:
    """The parts of a chunk, each on inputs that are there already."""

    def __init__(self, module: GeometryVLAModule, device: torch.device, size: int) -> None:
        self.module = module
        views = len(module.views)
        self.images = torch.randint(0, 256, (1, views, 3, size, size), dtype=torch.uint8, device=device)
        camera = looking_down(size)
        self.cameras = tuple(
            torch.as_tensor(camera[name], dtype=torch.float32, device=device).expand(1, views, -1, -1)
            for name in ("intrinsics", "world_to_camera")
        )
        network = module.network
        with torch.inference_mode():
            self.scene: Scene = network.encode(self.images, [INSTRUCTION], *self.cameras)
            self.noise = torch.randn(1, network.head.horizon, module.actions.size, device=device)
            self.state = torch.zeros(1, module.actions.size, device=device)

    @torch.inference_mode()
    def vlm(self) -> None:
        self.module.network.vlm(self.images, [INSTRUCTION], len(self.module.network.head.blocks))

    @torch.inference_mode()
    def geometry(self) -> None:
        network = self.module.network
        assert network.geometry is not None
        assert network.compressor is not None
        network.compressor(network.geometry(self.images, *self.cameras).tokens)

    @torch.inference_mode()
    def head(self) -> None:
        fresh = [type(context)(context.tokens, context.mask) for context in self.scene.contexts]  # nothing kept yet
        scene = type(self.scene)(fresh, self.scene.groups, self.scene.geometry)
        self.module.network.sample(scene, self.noise, self.state, self.module.sampling)


def untrained(config: DictConfig) -> GeometryVLAModule:
    """The module of a training config with random weights, and statistics of poses above a table."""

    OmegaConf.resolve(config)
    module = build_stored(OmegaConf.to_container(config.model), "model")  # random weights
    if not isinstance(module, GeometryVLAModule):
        raise ValueError(
            f"this case measures the geometry-injected policy; its overrides name a {type(module).__name__}"
        )
    data, count = config.data, 64
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    arms, horizon = len(data.arms), data.horizon
    chunks = PolicyTargets(
        start_position=uniform(count, arms, 3) * 0.4,
        start_quaternion=rotation_exp(uniform(count, arms, 3)),
        start_gripper=uniform(count, arms),
        position=uniform(count, arms, horizon, 3) * 0.4,
        quaternion=rotation_exp(uniform(count, arms, horizon, 3)),
        gripper=uniform(count, arms, horizon),
        action_is_pad=torch.zeros(count, arms, horizon, dtype=torch.bool),
        keyframe=uniform(count, arms, 3) * 0.4,
        demo_index=torch.zeros(count, dtype=torch.long),
        frame_index=torch.arange(count),
        instruction=[INSTRUCTION] * count,
    )
    with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as folder:
        module.set_statistics(
            DemoStatistics(
                height_range=(0.0, 0.4),
                position_range=((0.0, 0.0, 0.0), (0.4, 0.4, 0.4)),
                quaternions={arm: chunks.start_quaternion[:, index].numpy() for index, arm in enumerate(data.arms)},
                arms=tuple(data.arms),
                targets=data.targets,
                horizon=horizon,
                step_seconds=data.frame_stride / data.record.hz,
                geometry=ImageGeometry(data.image_size, tuple(data.mean), tuple(data.std), data.field, data.fit),
                demos=0,
                frames=count,
                fingerprint="",
                cache_dir=Path(folder),
                cameras=tuple(data.cameras),
                chunks=chunks,
            )
        )
    return module.eval()


def observation(module: GeometryVLAModule, size: int) -> dict[str, Any]:
    arms = len(module.actions.arms)
    camera = looking_down(size)
    return {
        "cameras": dict.fromkeys(module.views, camera),
        "instruction": INSTRUCTION,
        "position": np.tile([0.2, 0.2, 0.2], (arms, 1)),
        "quaternion": np.tile([0.0, 1.0, 0.0, 0.0], (arms, 1)),
        "gripper": np.ones(arms),
    }
