"""Cost of the patch-conditioned DiT: a sampling step compared with plain steps, solvers and guidance intervals, and a
training step compared with the CLS-only model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from keygrip.benchmarks.measuring import (
    Timed,
    Work,
    interleaved_seconds,
    milliseconds,
    peak_extra_bytes,
    synchronise,
    threads,
)
from keygrip.config import compose
from keygrip.data.batches import ImageTextBatch
from keygrip.models.nn.flow_matching import LogitNormalTimesteps, interpolate, seeded_noise, velocity
from keygrip.models.patch_dit.context import ConditionDropout, Conditions, kept
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.sampler import Sampling, Velocities, sample
from keygrip.progress import Progress
from keygrip.training.checkpoints import HEADER, load_module, read_checkpoint
from keygrip.training.memory import count_step
from keygrip.training.parts import build_stored

STEPS = 50  # sampling steps of a sample, over which the computations done once per sample are divided
FOUR = ("none", "text", "dino", "full")
THREE = FOUR[:3]
TOLERANCE = 1e-3  # relative; float32 rounding over 18 blocks is a hundredth of it


@dataclass(frozen=True)
class DiTWork(Timed):
    """A case that times the network on random images, captions and patches.

    Args (in addition to those of `Timed`):
        overrides: overrides of ``keygrip.train`` that select the network. quick_depth: blocks with `quick`; all blocks
            are alike, so the ratios are nearly those of the whole network, but ``step_ms`` is not.
        latent: side of the square latents. text_tokens: tokens of the caption; the rest of the encoders' text length is
            padding. patch_grid: side of the patch grid.
        batch: number of images. threads: number of CPU threads.
    """

    overrides: Sequence[str]
    quick_depth: int
    latent: int
    text_tokens: int
    patch_grid: int
    batch: int
    threads: int


@dataclass(frozen=True)
class DiTSampler(DiTWork):
    """A step of the sampler compared with plain steps: one pass per branch, one after the other, with the whole masked
    context.

    The published sampler computes four passes, although its formula needs three. Both sides give the same result, which
    is checked. Weights are random. A fiftieth of the computations done once per sample is added to the time of a step.
    """

    def run(self, quick: bool) -> dict[str, float]:
        """`speedup_over_four`, `speedup_over_three`, `step_ms`, the largest relative difference of the results."""
        depth = [f"model.network.depth={self.quick_depth}"] if quick else []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with threads(self.threads), torch.inference_mode():
            network, length = random_network([*self.overrides, *depth], device)
            conditions = random_conditions(network, self.batch, length, self.text_tokens, self.patch_grid, device)
            step = SamplingStep(network, conditions, self.latent)
            difference = max(step.difference(FOUR), step.difference(THREE))
            if difference > TOLERANCE:
                raise RuntimeError(
                    f"the sampler's velocity differs from the plain one's by {difference:.2g} of its size"
                )
            sides: dict[str, Work] = {
                "four": lambda: step.plain(FOUR),
                "three": lambda: step.plain(THREE),
                "first": step.first,
                "next": step.next,
            }
            repetitions, limit_s = self.effort(quick)
            # The check above was the warm-up.
            seconds = interleaved_seconds(sides, repetitions, device, limit_s, warm_up=0)
        mean_step = (seconds["first"] + (STEPS - 1) * seconds["next"]) / STEPS
        return {
            "speedup_over_four": round(float(np.median(seconds["four"] / mean_step)), 3),
            "speedup_over_three": round(float(np.median(seconds["three"] / mean_step)), 3),
            "step_ms": milliseconds(mean_step),
            "plain_four_step_ms": milliseconds(seconds["four"]),
            "plain_three_step_ms": milliseconds(seconds["three"]),
            "first_step_ms": milliseconds(seconds["first"]),
            "max_relative_difference": float(f"{difference:.2g}"),
            "context_tokens": step.context_tokens(),
            "plain_context_tokens": length + 1 + (self.patch_grid**2 if network.use_dino_patches else 0),
            "blocks": network.depth,
            "parameters_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 1),
        }


class SamplingStep:
    """The velocity of one Euler step, computed by the sampler's method and by the plain method."""

    def __init__(self, network: PatchDiT, conditions: Conditions, latent: int) -> None:
        self.network, self.conditions = network, conditions
        self.sampling = Sampling(text_scale=3.0, dino_scale=2.0)
        batch = len(conditions.text) if conditions.text is not None else 1
        device = next(network.parameters()).device
        self.x = seeded_noise(range(batch), (network.latent_channels, latent, latent), device)
        self.plainly = self._velocities(together=False, cached=False, trimmed=False)
        self.kept = self._velocities()
        self.kept(self.x, 1.0, THREE)  # the first step computes what the later steps reuse

    def _velocities(self, **options: Any) -> Velocities:
        return Velocities(self.network, self.conditions, len(self.x), 1.0, **options)

    def plain(self, branches: Sequence[str], level: float = 0.6) -> Tensor:
        """Compute every branch in a separate pass, including branches that the formula does not need. The tokens of the
        context are given: even a plain sampler projects its features once."""
        velocities = self.plainly(self.x, level, branches)
        return self.sampling.combine(velocities, self.x, level, self.conditions)

    def first(self) -> Tensor:
        """Compute the first step of a sample, including the computations done once per sample."""
        return self.sampling.combine(self._velocities()(self.x, 0.6, THREE), self.x, 0.6, self.conditions)

    def next(self, level: float = 0.6) -> Tensor:
        """Compute a later step of a sample."""
        return self.sampling.combine(self.kept(self.x, level, THREE), self.x, level, self.conditions)

    def difference(self, branches: Sequence[str]) -> float:
        """Return the largest difference between the two methods, relative to the plain result's root mean square."""
        plain = self.plain(branches)
        return float((self.next() - plain).abs().max() / plain.pow(2).mean().sqrt())

    def context_tokens(self) -> int:
        """Return the largest number of context tokens of a branch."""
        return max(sum(context.groups) for context, _ in self.kept._contexts.values())


@dataclass(frozen=True)
class DiTCurve:
    """Cost of a sample and its distance from the exact solution, by solver, steps and guidance interval.

    The exact solution is computed with many small steps of Heun's method and guidance at all noise levels. Distance is
    the root mean square difference over latents of unit variance. The network is that of a checkpoint, sampled with its
    own guidance scales and shift from features and captions of its val images. Without a checkpoint, a small network is
    trained briefly to generate a blurred copy of its patches in the colour named by the words; its velocity is smooth,
    like that of a fully trained network.

    Args:
        checkpoint: a run of a patch-conditioned DiT; None: the small network. train_steps, quick_train_steps: training
            steps of the small network.
        samples, quick_samples: number of images. exact_steps, quick_exact_steps: steps of the exact solution.
        settings: lists of [solver, steps, lowest level, highest level].
    """

    checkpoint: str | None
    train_steps: int
    quick_train_steps: int
    samples: int
    quick_samples: int
    exact_steps: int
    quick_exact_steps: int
    settings: Sequence[Sequence[Any]]
    threads: int

    def run(self, quick: bool) -> dict[str, float]:
        """For each setting: `distance`, `ms` per image and branch `evaluations`, with names such as `heun_10_...`."""
        count = self.quick_samples if quick else self.samples
        with threads(self.threads):
            network, conditions, size, usual, guide = self._trained(
                count, self.quick_train_steps if quick else self.train_steps
            )
            steps = self.quick_exact_steps if quick else self.exact_steps
            everywhere = replace(usual, interval=(0.0, 1.0), solver="heun", steps=steps)
            exact = sample(network, conditions, size, everywhere, range(count), guide=guide)
            figures: dict[str, float] = {"latent_std": round(float(exact.std()), 4)}
            for solver, steps, low, high in Progress(self.settings, desc="settings", unit="setting", leave=False):
                sampling = replace(usual, solver=solver, steps=int(steps), interval=(float(low), float(high)))
                samples, seconds, evaluations = timed(
                    network, conditions, size, sampling, range(count), 1 if quick else 3, guide
                )
                name = f"{solver}_{steps}" + ("" if (low, high) == (0, 1) else f"_interval_{low:g}_{high:g}")
                figures[f"{name}_distance"] = round(float((samples - exact).pow(2).mean().sqrt()), 4)
                figures[f"{name}_ms"] = round(1e3 * seconds / count, 2)
                figures[f"{name}_evaluations"] = evaluations
        return figures

    def _trained(
        self, count: int, train_steps: int
    ) -> tuple[PatchDiT, Conditions, tuple[int, int], Sampling, PatchDiT | None]:
        """Return the network, conditions, size of the latents, sampling, and the model's guide network or None."""
        if self.checkpoint is None:
            toy, usual = ToyImages(), Sampling(text_scale=3.0, dino_scale=2.0)
            return toy.trained(train_steps), toy.batch(count, 10**6)[1], toy.size, usual, None

        module = load_module(self.checkpoint, expected=PatchDiTModule)
        assert isinstance(module, PatchDiTModule)
        batch = held_out_batch(self.checkpoint, count)
        size = batch.latents.shape[2], batch.latents.shape[3]
        conditions, sampling = module.statistics.conditions(batch), module.sampling_at(size)
        return module.network, conditions, size, sampling, module.guide_network


def held_out_batch(checkpoint: str, count: int) -> ImageTextBatch:
    """Return `count` validation images of one size, from the data of a training run.

    Raises:
        FileNotFoundError: the shards do not exist. ValueError: the shards have fewer than `count` images of each size.
    """
    data = build_stored(read_checkpoint(checkpoint)[HEADER]["config"]["data"], "data")
    data.batch_size, data.num_workers = count, 0
    data.prepare_data()
    data.setup()
    for batch in data.held_out("val"):
        if len(batch) == count:
            found: ImageTextBatch = batch
            return found
    raise ValueError(f"{data.place} has fewer than {count} val images of one size: give fewer samples")


def timed(
    network: PatchDiT,
    conditions: Conditions,
    size: tuple[int, int],
    sampling: Sampling,
    seeds: Sequence[int],
    repetitions: int,
    guide: PatchDiT | None = None,
) -> tuple[Tensor, float, int]:
    """Return a sample, the median of its times in seconds, and the number of branch evaluations per image (an
    evaluation of the guide network counts as one)."""
    rows: list[int] = []
    networks = [each for each in (network, guide) if each is not None]
    hooks = [each.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0]))) for each in networks]
    device = next(network.parameters()).device
    seconds = []
    for _ in range(repetitions):
        rows.clear()
        synchronise(device)
        started = time.perf_counter()
        samples = sample(network, conditions, size, sampling, seeds, guide=guide)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    for hook in hooks:
        hook.remove()
    return samples, float(np.median(seconds)), sum(rows) // len(seeds)


class ToyImages:
    """8 x 8 latents of 3 channels: a bump at the position given by the patches, in the colour given by the words."""

    size = (8, 8)
    colours = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randn(self.colours, 16, generator=generator)
        self.shades = torch.randn(self.colours, 3, generator=generator)

    def batch(self, count: int, seed: int) -> tuple[Tensor, Conditions]:
        """Return latents and their conditions."""
        generator = torch.Generator().manual_seed(seed)
        centre = torch.rand(count, 2, generator=generator) * 1.6 - 0.8
        colour = torch.randint(self.colours, (count,), generator=generator)
        axis = torch.linspace(-1, 1, 8)
        distance = (axis[None, :, None] - centre[:, 0, None, None]) ** 2 + (
            axis[None, None] - centre[:, 1, None, None]
        ) ** 2
        bump = torch.exp(-distance / 0.15)  # [B, 8, 8]
        latents = 3 * bump[:, None] * self.shades[colour][:, :, None, None] - 0.3
        patches = bump.flatten(1)[..., None] * torch.ones(8) * 3 - 0.5
        text = self.words[colour][:, None]
        mask = torch.ones(count, 1, dtype=torch.bool)
        return latents, Conditions(text, mask, patches.mean(1), patches, (8, 8))

    def trained(self, steps: int) -> PatchDiT:
        """Return a small network trained for `steps` steps."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = PatchDiT(3, 16, 8, width=96, depth=4, heads=3, patch_size=1, position_cells=8)
            optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.98))
            levels, dropout = LogitNormalTimesteps(), ConditionDropout()
            for step in Progress(range(steps), desc="training the small network", unit="step", leave=False):
                for group in optimizer.param_groups:
                    group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 2.5 * (1 - step / steps) + 0.02)
                data, conditions = self.batch(32, step)
                level, noise = levels(32), torch.randn_like(data)
                context = network.context_builder(conditions, *kept(dropout.draw(32)), 1.0)
                predicted = network(interpolate(data, noise, level), level, context).velocity
                optimizer.zero_grad()
                (predicted - velocity(data, noise)).pow(2).mean().backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
        return network.eval()


@dataclass(frozen=True)
class DiTStep(DiTWork):
    """Time and memory of a training step (forward, loss, backward), compared with a step of the CLS-only model.

    ``estimated_512px_bf16_gb`` is counted, not measured. It is the sum of the permanent memory (float32 weights, two
    Adam moments and the EMA: ``estimated_weights_and_states_gb``) and of the peak of activations, gradients and bf16
    copies of the weights together (``estimated_step_gb``), with a fused attention kernel, as on a GPU.
    """

    def run(self, quick: bool) -> dict[str, float]:
        """`patches_over_cls_time`, `step_ms`, `peak_mb`, `patches_over_cls_memory` and the estimate."""
        depth = [f"model.network.depth={self.quick_depth}"] if quick else []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sides: dict[str, Work] = {}
        figures: dict[str, float] = {}
        with threads(self.threads):
            for name, use in (("patches", "true"), ("cls", "false")):
                options = [*self.overrides, *depth, f"model.network.use_dino_patches={use}"]
                sides[name] = self._step(options, device)
            repetitions, limit_s = self.effort(quick)
            seconds = interleaved_seconds(sides, repetitions, device, limit_s)
            # On the CPU the events of every tensor are recorded, so only one step of each side is measured.
            peaks = {name: peak_extra_bytes(work, device) for name, work in sides.items()}
            figures["patches_over_cls_time"] = round(float(np.median(seconds["patches"] / seconds["cls"])), 3)
            figures["step_ms"] = milliseconds(seconds["patches"])
            figures["cls_step_ms"] = milliseconds(seconds["cls"])
            figures["peak_mb"] = round(peaks["patches"] / 2**20, 1)
            figures["patches_over_cls_memory"] = round(peaks["patches"] / peaks["cls"], 3)
            sides.clear()
            figures["blocks"] = self.quick_depth if quick else blocks_of(self.overrides)
            if self.batch == 1:
                figures |= self._estimate()
        return figures

    def _step(self, overrides: Sequence[str], device: torch.device) -> TrainingStep:
        network, length = random_network(overrides, device)
        conditions = random_conditions(network, self.batch, length, self.text_tokens, self.patch_grid, device)
        return TrainingStep(network.train(), conditions, self.latent)

    def _estimate(self) -> dict[str, float]:
        """Count the memory of a step at full depth under bf16 autocast (`keygrip.training.memory`)."""
        meta = torch.device("meta")
        network, length = random_network(self.overrides, meta)
        cpu = torch.device("cpu")
        conditions = random_conditions(network, self.batch, length, self.text_tokens, self.patch_grid, cpu)
        step = TrainingStep(network.train(), conditions, self.latent)
        memory = count_step(network, lambda of_batch: step.loss(cpu), bf16=True, ema=True)
        fixed = sum(p.numel() for p in network.parameters()) * (4 + 8 + 4)
        return {
            "estimated_512px_bf16_gb": round(memory.total / 1e9, 2),
            "estimated_step_gb": round((memory.total - fixed) / 1e9, 2),
            "estimated_weights_and_states_gb": round(fixed / 1e9, 2),
        }


@dataclass(frozen=True)
class TrainingStep:
    """Forward, loss and backward of one batch with fixed noise and noise levels."""

    network: PatchDiT
    conditions: Conditions
    latent: int

    def loss(self, device: torch.device | None = None) -> Tensor:
        """Return the loss, computed on `device`; None: the network's device."""
        device = device or next(self.network.parameters()).device
        batch = len(self.conditions.text) if self.conditions.text is not None else 1
        data, noise = (
            seeded_noise(range(start, start + batch), (self.network.latent_channels, self.latent, self.latent), device)
            for start in (0, batch)
        )
        level = torch.full((batch,), 0.6, device=device)
        everything = torch.ones(batch, dtype=torch.bool, device=device)
        context = self.network.context_builder(self.conditions, everything, everything, 1.0)
        predicted = self.network(interpolate(data, noise, level), level, context).velocity
        return (predicted.float() - velocity(data, noise)).pow(2).mean()

    def __call__(self) -> None:
        self.loss().backward()
        self.network.zero_grad(set_to_none=True)  # not before: the gradients are part of this step's peak memory


def random_network(overrides: Sequence[str], device: torch.device) -> tuple[PatchDiT, int]:
    """Return the network of a training config, with random weights in place of all-zero weight matrices, and the text
    length of its encoders."""
    config = compose("train", overrides)
    encoders = instantiate(config.encoders)
    make: Callable[..., PatchDiT] = instantiate(OmegaConf.to_container(config.model.network, resolve=True))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        network = make(latent_channels=encoders.latent_channels, text_dim=encoders.text_dim, dino_dim=encoders.dino_dim)
        if device.type != "meta":
            with torch.no_grad():  # layers that start at zero would make every result zero and every check pass
                for parameter in network.parameters():
                    if parameter.ndim == 2 and not parameter.any():
                        parameter.normal_(std=0.3 / math.sqrt(parameter.shape[1]))
    return network.eval(), encoders.text_length


def random_conditions(
    network: PatchDiT, batch: int, length: int, tokens: int, grid: int, device: torch.device
) -> Conditions:
    """Return conditions with noise as features; the first `tokens` text tokens are valid, the rest is padding."""
    if tokens > length:
        raise ValueError(f"text_tokens={tokens} do not fit into the encoders' {length}")
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(length) < tokens).expand(batch, -1)
    text = torch.randn(batch, length, network.text_dim, generator=generator)
    cls = torch.randn(batch, network.dino_dim, generator=generator)
    patches = torch.randn(batch, grid**2, network.dino_dim, generator=generator)
    return Conditions(text, mask, cls, patches, (grid, grid)).to(device)


def blocks_of(overrides: Sequence[str]) -> int:
    """Return the depth of the network in a training config."""
    return int(compose("train", overrides).model.network.depth)
