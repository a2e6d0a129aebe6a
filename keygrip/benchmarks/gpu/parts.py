"""Parts other than training steps: plans, image samples, and the cases of ``keygrip.bench`` at GPU size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from keygrip.benchmarks import geometry_vla, inference
from keygrip.benchmarks.gpu import Figures
from keygrip.benchmarks.measuring import Work, interleaved_seconds, milliseconds
from keygrip.benchmarks.patch_dit import random_conditions, random_network
from keygrip.config import compose
from keygrip.evaluation.trained_policy import policy_of
from keygrip.models.patch_dit.sampler import Sampling, sample
from keygrip.training.strategies import use_tf32


@dataclass(frozen=True)
class MeasuredCase:
    """A case of ``keygrip.bench`` with other settings; it runs on the GPU if there is one.

    Args:
        case: name of the case. settings: changes to its settings in ``conf/bench.yaml``; toy_settings: those at toy
            size.
    """

    case: str
    settings: Mapping[str, Any]
    toy_settings: Mapping[str, Any]

    def run(self, toy: bool, figures: Figures) -> None:
        """Add the figures of the case."""
        recipe = compose("bench").cases[self.case]
        changed = OmegaConf.merge(recipe, dict(self.toy_settings if toy else self.settings))
        figures |= instantiate(changed, _convert_="all").run(quick=toy)


@dataclass(frozen=True)
class PlanLatency:
    """Time from an observation to a plan on the GPU, batch 1: in float32, in TF32 and under bf16 autocast.

    Args:
        system: which policy. overrides: overrides of ``keygrip.train``. toy_overrides: their replacement at toy size.
        policy: changes to the policy, by the names of its fields.
        repetitions: measured plans of each precision. warm_up: plans before them. limit_s: seconds after which
            repetitions are cut short.
    """

    system: Literal["volume_query", "geometry_vla"]
    overrides: Sequence[str]
    toy_overrides: Sequence[str]
    policy: Mapping[str, Any] = field(default_factory=dict)
    repetitions: int = 200
    warm_up: int = 10
    limit_s: float = 200.0

    def run(self, toy: bool, figures: Figures) -> None:
        """Add `<precision>_p50_ms`, `<precision>_p95_ms`, `<precision>_peak_gb` of `float32`, `tf32` (on a GPU) and
        `bf16`; the peak includes the weights."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = self._plan(self.toy_overrides if toy else self.overrides, device)

        def bf16() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                plan()

        def tf32() -> None:
            use_tf32(True, on_gpu=True)
            try:
                plan()
            finally:
                use_tf32(False, on_gpu=True)

        sides: dict[str, Work] = {"float32": plan, "bf16": bf16} | ({"tf32": tf32} if device.type == "cuda" else {})
        count, warm_up = (1, 0) if toy else (self.repetitions, self.warm_up)
        seconds = interleaved_seconds(sides, count, device, self.limit_s, warm_up)
        for name, values in seconds.items():
            figures |= {f"{name}_p{percentile}_ms": milliseconds(values, percentile) for percentile in (50, 95)}
        if device.type == "cuda":
            for name, work in sides.items():
                torch.cuda.reset_peak_memory_stats()
                work()
                figures[f"{name}_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)

    def _plan(self, overrides: Sequence[str], device: torch.device) -> Callable[[], object]:
        config = compose("train", overrides)
        if self.system == "volume_query":
            module: Any = inference.untrained(config)
            observation: Any = inference.looking_down(config.data.record.image_size)
        else:
            tiny = compose("train", ["model=geometry_vla", "data=yam_language", "vlm=tiny"])
            config.vlm.tokenizer = tiny.vlm.tokenizer  # the pretrained one would be a download
            module = geometry_vla.untrained(config)
            observation = geometry_vla.observation(module, config.data.image_size)
        return partial(policy_of(module, f"system={self.system}", self.policy, device.type).plan, observation)


@dataclass(frozen=True)
class SampleLatency:
    """Time of sampling images from the diffusion transformer under bf16 autocast, without the autoencoder.

    Args:
        overrides: overrides of ``keygrip.train``. toy_overrides: their replacement at toy size.
        latent, patch_grid: sides of the latents and of the patch grid; toy_latent, toy_patch_grid: those at toy size.
        text_tokens: tokens of the caption.
        steps: steps of the solver. batches: batch sizes. repetitions: of each batch size.
    """

    overrides: Sequence[str]
    toy_overrides: Sequence[str]
    latent: int = 64
    patch_grid: int = 14
    text_tokens: int = 40
    steps: int = 50
    batches: Sequence[int] = (1, 8)
    repetitions: int = 5
    limit_s: float = 120.0
    toy_latent: int = 8
    toy_patch_grid: int = 12

    def run(self, toy: bool, figures: Figures) -> None:
        """Add `batch_<n>_image_ms` (per image) and `batch_<n>_peak_gb`."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        latent, grid, tokens = (
            (self.toy_latent, self.toy_patch_grid, 4) if toy else (self.latent, self.patch_grid, self.text_tokens)
        )
        network, length = random_network(self.toy_overrides if toy else self.overrides, device)
        sampling = Sampling(text_scale=3.0, dino_scale=2.0, steps=2 if toy else self.steps)
        for batch in list(self.batches)[: 1 if toy else None]:
            conditions = random_conditions(network, batch, length, tokens, grid, device)

            def draw(conditions: Any = conditions, batch: int = batch) -> None:
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                    sample(network, conditions, (latent, latent), sampling, range(batch))

            seconds = interleaved_seconds(
                {"": draw}, 1 if toy else self.repetitions, device, self.limit_s, warm_up=0 if toy else 1
            )[""]
            figures[f"batch_{batch}_image_ms"] = round(milliseconds(seconds) / batch, 2)
            if device.type == "cuda":
                figures[f"batch_{batch}_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
