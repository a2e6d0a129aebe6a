"""Cost of the geometry-injected policy: time of the parts of an action chunk, parameters of the compressors, and
memory of a training step and of a plan at real size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from keygrip.benchmarks.inference import looking_down
from keygrip.benchmarks.measuring import Timed, Work, interleaved_seconds, milliseconds, random_module, threads
from keygrip.config import compose
from keygrip.data.batches import MultiViewPolicyBatch, PolicyTargets
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.models.geometry_vla.compression import TYPES, build_geom_compressor
from keygrip.models.geometry_vla.geometry import GeometryEncoder, GeometryFeatures
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.geometry_vla.network import Scene
from keygrip.models.nn.low_precision import Precision
from keygrip.models.policy_statistics import PolicyStatistics
from keygrip.training.memory import GIB, count_forward
from keygrip.training.system import parameters_m

INSTRUCTION = "put the red cube into the bowl"
CHUNK = ("p50_ms", "p95_ms", "vlm_ms", "geometry_ms", "head_ms")  # the first policy's, also reported without its name


@dataclass(frozen=True)
class VLAParams:
    """Parameters of the three compressors, in millions, at the sizes given in the config.

    Args:
        geom_dim: width of a geometry token. width, blocks: of the action head. tokens, heads: see
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
    """Time from an observation to an action chunk, and time of its three parts. Weights are random.

    Args (in addition to those of `Timed`, whose repetitions are chunks of each policy):
        policies: overrides of ``keygrip.train`` for each policy, by name; the policies are timed alternately.
        compiled: names of the policies that are also timed with `policy.compiled=true`; not with `quick`.
        warm_up: chunks before the measured ones. threads: number of CPU threads.
    """

    policies: Mapping[str, Sequence[str]]
    compiled: Sequence[str]
    warm_up: int
    threads: int

    def run(self, quick: bool) -> dict[str, float]:
        """For each policy: `vlm_ms`, `geometry_ms` (with its compressors), `head_ms` (all steps of the sampler),
        `p50_ms` and `p95_ms` of the whole chunk (`compiled_p50_ms` and `compiled_p95_ms` if compiled), and `px`, the
        side of its images in pixels. Measured on the GPU if there is one. Figures without a policy name are those of
        the first policy."""
        with threads(self.threads):
            figures = self._figures(quick)
        first = next(iter(self.policies))
        headline = {name: figures[f"{first}_{name}"] for name in CHUNK if f"{first}_{name}" in figures}
        return headline | figures

    def _figures(self, quick: bool) -> dict[str, float]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        repetitions, limit_s = self.effort(quick)
        plans: dict[str, Work] = {}
        sides: dict[str, Work] = {}
        figures: dict[str, float] = {}
        for name, overrides in self.policies.items():
            config = compose("train", overrides)
            module, size = untrained(config).to(device), config.data.image_size
            parts = _Parts(module, device, size)
            plans[name] = partial(module.policy().plan, observation(module, size))
            if name in self.compiled and not quick:
                compiled_module = untrained(config).to(device)  # compiling is in place
                compiled_policy = replace(compiled_module.policy(), compiled=True)
                compiled_policy.make_ready()
                plans[f"{name}_compiled"] = partial(compiled_policy.plan, observation(compiled_module, size))
            sides |= {f"{name}_vlm": parts.vlm, f"{name}_head": parts.head}
            if module.network.geometry is not None:
                sides[f"{name}_geometry"] = parts.geometry
            figures[f"{name}_px"] = size
        seconds = interleaved_seconds(plans | sides, repetitions, device, limit_s, self.warm_up)
        for side, values in seconds.items():
            if side in plans:
                figures |= {f"{side}_p{percentile}_ms": milliseconds(values, percentile) for percentile in (50, 95)}
            else:
                figures[f"{side}_ms"] = milliseconds(values)
        return figures | {"threads": torch.get_num_threads()}


class GeometryStandIn(GeometryEncoder):
    """Stand-in for a frozen encoder that is not available: zero tokens of its number and width, and its scale token.

    Args:
        dim: width of a token. tokens: number of tokens per view.
    """

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.dim, self.tokens = dim, tokens

    @property
    def gives_scale(self) -> bool:
        return True

    def forward(self, images: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> GeometryFeatures:
        samples, views = images.shape[:2]
        found = torch.zeros(samples, views * self.tokens + 1, self.dim, device=images.device)
        return GeometryFeatures(found[:, :-1], scale=found[:, -1])


@dataclass(frozen=True)
class VLAMemory:
    """Memory of a training step of recipes at real size, counted without computing (`keygrip.training.memory`).

    Without `weights`, the weights and activations of the geometry encoder are not counted: a stand-in outputs its
    tokens. With `weights`, the whole encoder is counted on each GPU. Where weights are sharded over several GPUs, all
    gradients are counted on each GPU, which overestimates the memory.

    Args:
        recipes: overrides of ``keygrip.train`` by name. gpus: number of GPUs of each recipe, over which weights,
            optimizer states, EMA and the batch are divided.
        geom_dim: width of a geometry token. geom_tokens: tokens per view. gpu_gib: memory of a GPU.
        weights: weights of the recipes' MapAnything, whose own token width and number are then used; None: not
            available.
    """

    recipes: Mapping[str, Sequence[str]]
    gpus: Mapping[str, int]
    geom_dim: int
    geom_tokens: int
    gpu_gib: float
    weights: str | None = None

    def run(self, quick: bool) -> dict[str, float]:
        """For each recipe, per GPU: `total_gib`; its parts `weights_gib`, `optimizer_gib`, `ema_gib` and `step_gib`
        (activations, copies in bf16, and gradients, including accumulated gradients of earlier batches if the recipe
        accumulates them); `spare_gib`, which remains for the allocator's losses and, without `weights`, for the
        encoder; the `batch`; and parameters in millions: `parameters_m`, `trained_m`."""
        figures: dict[str, float] = {}
        for name, overrides in [*self.recipes.items()][: 1 if quick else None]:
            config, shards = compose("train", overrides), self.gpus[name]
            module = _without_memory(config, self.geom_dim, self.geom_tokens, self.weights)
            batch = config.data.batch_size // shards
            ema = (config.callbacks or {}).get("ema") is not None
            accumulated = config.accumulate_grad_batches > 1
            memory = module.step_memory(_shapes(module, config, batch), True, ema, accumulated).divided(shards)
            figures |= {f"{name}_{part}": value for part, value in memory.report().items() if part != "how"}
            figures[f"{name}_spare_gib"] = round(self.gpu_gib - memory.total / GIB, 2)
            figures |= {f"{name}_batch": batch, f"{name}_gpus": shards}
            for kind, value in parameters_m(module.network)["all"].items():
                figures[f"{name}_{'trained' if kind == 'trained' else 'parameters'}_m"] = value
        return figures


@dataclass(frozen=True)
class VLAPlanMemory:
    """Memory of a plan at real size for several precisions of the vision-language model's weights, counted as in
    `VLAMemory`, without the allocator's losses.

    Args:
        overrides: overrides of ``keygrip.train``. geom_dim, geom_tokens, weights: see `VLAMemory`.
        precisions: see `keygrip.models.nn.low_precision`; with `quick` only the first.
    """

    overrides: Sequence[str]
    geom_dim: int
    geom_tokens: int
    precisions: Sequence[Precision]
    weights: str | None = None

    def run(self, quick: bool) -> dict[str, float]:
        """For each precision: `weights_gib` (all parts of the policy), `plan_gib` (activations, and with int8 the layer
        whose weights are dequantized) and `total_gib`."""
        figures: dict[str, float] = {}
        for precision in self.precisions[: 1 if quick else None]:
            config = compose("train", self.overrides)
            module = _without_memory(config, self.geom_dim, self.geom_tokens, self.weights).eval()
            module.network.vlm.lower_precision(precision)
            batch = _shapes(module, config, 1)
            noise = torch.zeros(1, module.network.head.horizon, module.actions.size)

            memory = count_forward(module.network, partial(_sample_plan, module, batch, noise))
            figures |= {
                f"{precision}_weights_gib": round(memory.weights / GIB, 2),
                f"{precision}_plan_gib": round(memory.step / GIB, 2),
                f"{precision}_total_gib": round(memory.total / GIB, 2),
            }
        return figures


def _sample_plan(
    module: GeometryVLAModule, batch: MultiViewPolicyBatch, noise: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    changed_batch = batch.map(change)
    return module.network.sample(module(changed_batch), noise, module.state(changed_batch), module.sampling)


def _without_memory(
    config: DictConfig, geom_dim: int, geom_tokens: int, weights: str | None = None
) -> GeometryVLAModule:
    """Return the module of a training config with statistics and its parameters on torch's device `meta`. Its geometry
    encoder is MapAnything loaded from `weights`, or a stand-in if `weights` is None."""
    encoder = None
    if weights is not None:
        with open_dict(config):
            config.geometry.weights, config.geometry.scale_token, config.geometry.cache = weights, True, None
        encoder = instantiate(config.geometry, _convert_="all")
        geom_dim = encoder.dim
    with open_dict(config):
        config.vlm.weights = "random"
        config.vlm.tokenizer = {"_target_": "keygrip.models.language.tokenizers.TrainedTokenizer"}
        stand_in = f"{GeometryStandIn.__module__}.{GeometryStandIn.__qualname__}"
        config.geometry = {"_target_": stand_in, "dim": geom_dim, "tokens": geom_tokens}
    OmegaConf.resolve(config)
    with torch.device("meta"):
        module: GeometryVLAModule = instantiate(config.model, _convert_="all")
    if encoder is not None:
        module.network.geometry = encoder  # the network was built for tokens of its width and a scale token
    module.statistics, module.actions = PolicyStatistics(), instantiate(config.model.actions, _convert_="all")
    _set_random_statistics(module, config)
    return module


def _shapes(module: GeometryVLAModule, config: DictConfig, batch: int) -> MultiViewPolicyBatch:
    """Return a batch of the recipe's sizes; only its shapes are meaningful."""
    views, size, arms, steps = len(module.views), config.data.image_size, len(config.data.arms), config.data.horizon
    return MultiViewPolicyBatch(
        start_position=torch.zeros(batch, arms, 3),
        start_quaternion=torch.tensor([1.0, 0, 0, 0]).expand(batch, arms, 4),
        start_gripper=torch.zeros(batch, arms),
        position=torch.zeros(batch, arms, steps, 3),
        quaternion=torch.tensor([1.0, 0, 0, 0]).expand(batch, arms, steps, 4),
        gripper=torch.zeros(batch, arms, steps),
        action_is_pad=torch.zeros(batch, arms, steps, dtype=torch.bool),
        keyframe=torch.zeros(batch, arms, 3),
        demo_index=torch.zeros(batch, dtype=torch.long),
        frame_index=torch.zeros(batch, dtype=torch.long),
        instruction=[INSTRUCTION] * batch,
        images=torch.zeros(batch, views, 3, size, size, dtype=torch.uint8),
        view_intrinsics=torch.eye(3).expand(batch, views, 3, 3),
        view_world_to_camera=torch.eye(4).expand(batch, views, 4, 4),
        depth=None,
        cameras=tuple(module.views),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
    )


class _Parts:
    """The parts of a chunk, each run on inputs that were computed before."""

    def __init__(self, module: GeometryVLAModule, device: torch.device, size: int) -> None:
        self.module = module
        views = len(module.views)
        self.images = torch.randint(0, 256, (1, views, 3, size, size), dtype=torch.uint8, device=device)
        camera = looking_down(size)
        self.cameras = tuple(
            torch.as_tensor(camera[name], dtype=torch.float32, device=device).expand(1, views, -1, -1)
            for name in ("intrinsics", "world_to_camera")
        )
        with torch.inference_mode():
            self.scene: Scene = module.with_places(module.network.encode(self.images, [INSTRUCTION], *self.cameras))
            self.noise = torch.randn(1, module.network.head.horizon, module.actions.size, device=device)
            self.state = torch.zeros(1, module.actions.size, device=device)

    @torch.inference_mode()
    def vlm(self) -> None:
        self.module.network.vlm(self.images, [INSTRUCTION], len(self.module.network.head.blocks))

    @torch.inference_mode()
    def geometry(self) -> None:
        network = self.module.network
        assert network.geometry is not None
        tokens = network.geometry(self.images, *self.cameras).tokens
        for compressor in (network.compressor, network.vlm_compressor):
            if compressor is not None:  # None if the action head reads geometry only at the pointed places
                compressor(tokens)

    @torch.inference_mode()
    def head(self) -> None:
        fresh = [type(context)(context.tokens, context.mask) for context in self.scene.contexts]  # nothing cached yet
        self.module.network.sample(replace(self.scene, contexts=fresh), self.noise, self.state, self.module.sampling)


def untrained(config: DictConfig) -> GeometryVLAModule:
    """Return the module of a training config with random weights and with statistics of random poses above a table;
    raises the errors of `random_module`."""
    module = random_module(config, GeometryVLAModule)
    _set_random_statistics(module, config)
    return module.eval()


def _set_random_statistics(module: GeometryVLAModule, config: DictConfig) -> None:
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
                geometry=ImageGeometry(data.image_size, tuple(data.mean), tuple(data.std), data.field),
                demos=0,
                frames=count,
                fingerprint="",
                cache_dir=Path(folder),
                cameras=tuple(data.cameras),
                chunks=chunks,
                calibrated=tuple(data.cameras),
            )
        )


def observation(module: GeometryVLAModule, size: int) -> dict[str, Any]:
    """Return an observation for an untrained policy: every camera of the module points down, the arms do not move."""
    arms = len(module.actions.arms)
    camera = looking_down(size)
    return {
        "cameras": dict.fromkeys(module.views, camera),
        "instruction": INSTRUCTION,
        "position": np.tile([0.2, 0.2, 0.2], (arms, 1)),
        "quaternion": np.tile([0.0, 1.0, 0.0, 0.0], (arms, 1)),
        "gripper": np.ones(arms),
    }
