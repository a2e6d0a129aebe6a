"""Time from a camera image to a plan, one image at a time, as on a robot."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from keygrip.benchmarks.measuring import Timed, interleaved_seconds, milliseconds, random_module, threads
from keygrip.config import compose
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.exporting.graphs import export_program, write_onnx
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.models.volume_query.policy import VolumeQueryPolicy
from keygrip.progress import Progress


@dataclass(frozen=True)
class Inference(Timed):
    """Time of ``VolumeQueryPolicy.plan``, batch 1: with all CPU threads (the headline), with one thread, and on a GPU
    if there is one.

    Weights are random: their values do not change the time.

    Args (in addition to those of `Timed`, whose repetitions are plans of each setting):
        overrides: overrides of ``keygrip.train`` that select the policy. warm_up: plans before the measured ones.
    """

    overrides: Sequence[str]
    warm_up: int

    def run(self, quick: bool) -> dict[str, float]:
        """Return the figures of all settings, for the policy, the network alone (`network_*`), and the exported network
        (`graph_*`; with `quick` without onnxruntime, for which the export takes longest)."""
        config = compose("train", self.overrides)
        observation = looking_down(config.data.record.image_size)
        module = untrained(config)
        all_threads = torch.get_num_threads()
        settings = [("", torch.device("cpu"), all_threads), ("one_thread_", torch.device("cpu"), 1)]
        settings += [("gpu_", torch.device("cuda"), 1)] if torch.cuda.is_available() else []
        figures: dict[str, float] = {}
        for prefix, device, count in Progress(settings, desc="inference", unit="setting", leave=False):
            policy = module.to(device).policy()
            with threads(count):
                figures |= self._measure(policy, observation, device, prefix, quick)
        figures |= self._time_exported(module.to("cpu"), quick)
        return figures | {"threads": all_threads}

    def _time_exported(self, module: VolumeQueryModule, quick: bool) -> dict[str, float]:
        """Time the graph that `keygrip export` writes, batch 1: run eagerly, as a torch.export program, and in
        onnxruntime."""
        graph = module.export_graph()
        inputs = {name: value[:1] for name, value in graph.inputs.items()}  # one image; the examples have two
        program = export_program(graph).module()
        sides: dict[str, Callable[[], object]] = {
            "graph_eager_": lambda: graph.network(*inputs.values()),
            "graph_torch_export_": lambda: program(*inputs.values()),
        }
        with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as folder:
            if not quick and find_spec("onnxruntime") and find_spec("onnxscript"):  # the extra onnx
                import onnxruntime

                file = Path(folder) / "policy.onnx"
                write_onnx(graph, file)
                session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
                sides["graph_onnx_"] = lambda: session.run(None, feed)
            repetitions, limit_s = self.effort(quick)
            with torch.inference_mode():
                seconds = interleaved_seconds(sides, repetitions, torch.device("cpu"), limit_s, self.warm_up)
        return {f"{name}p50_ms": milliseconds(values, 50) for name, values in seconds.items()}

    def _measure(
        self, policy: VolumeQueryPolicy, observation: dict[str, Any], device: torch.device, prefix: str, quick: bool
    ) -> dict[str, float]:
        network, calls = policy.module.network, []
        hook = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        policy.plan(observation)
        hook.remove()
        arguments, keywords = calls[0]

        @torch.inference_mode()
        def network_alone() -> None:
            network(*arguments, **keywords)

        sides = {"": lambda: policy.plan(observation), "network_": network_alone}
        repetitions, limit_s = self.effort(quick)
        seconds = interleaved_seconds(sides, repetitions, device, limit_s, self.warm_up)
        return {
            f"{prefix}{name}p{percentile}_ms": milliseconds(values, percentile)
            for name, values in seconds.items()
            for percentile in (50, 95)
        }


def untrained(config: DictConfig) -> VolumeQueryModule:
    """Return the volume-query module of a training config with random weights, and with statistics of positions above a
    table; raises the errors of `random_module`."""
    module = random_module(config, VolumeQueryModule)
    data = config.data
    half_yaw = np.linspace(-math.pi / 4, math.pi / 4, 64)
    zero = np.zeros_like(half_yaw)
    downward = np.stack([zero, np.cos(half_yaw), np.sin(half_yaw), zero], axis=-1)  # w x y z, over a half turn
    with tempfile.TemporaryDirectory() as folder:
        module.set_statistics(
            DemoStatistics(
                height_range=(0.0, 0.3),
                position_range=((0.1, -0.3, 0.0), (0.5, 0.3, 0.3)),
                quaternions=dict.fromkeys(data.arms, downward),
                arms=tuple(data.arms),
                targets=data.targets,
                horizon=data.horizon,
                step_seconds=data.frame_stride / data.record.hz,
                geometry=ImageGeometry(data.image_size, tuple(data.mean), tuple(data.std), data.field),
                demos=0,
                frames=0,
                fingerprint="",
                cache_dir=Path(folder),
            )
        )
    return module.eval()


def looking_down(image_size: int) -> dict[str, Any]:
    """Return an observation with a noise image, from a camera 1 m above the table whose image covers 0.8 m of it."""
    generator = np.random.default_rng(0)
    focal = image_size / 0.8
    intrinsics = np.array([[focal, 0, image_size / 2], [0, focal, image_size / 2], [0, 0, 1.0]])
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = np.diag([1.0, -1.0, -1.0])
    world_to_camera[:3, 3] = world_to_camera[:3, :3] @ -np.array([0.3, 0.0, 1.0])
    return {
        "image": generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8),
        "intrinsics": intrinsics,
        "world_to_camera": world_to_camera,
        "position": np.array([0.3, 0.0, 0.2]),
        "quaternion": np.array([0.0, 1.0, 0.0, 0.0]),
        "gripper": 1.0,
    }
