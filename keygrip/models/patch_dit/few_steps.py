"""Sampling in few steps: a student learns straight paths through windows of noise levels from its guided teacher.

The noise levels from 1 to 0 are divided into windows. In each window, the teacher's sampler takes a noised image from
the upper level to the lower one; the student learns the constant velocity of the straight line between the two ends, at
every level in between. It is sampled with one Euler step per window, without small steps and without guidance branches.

Source: Yan et al., "PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator" (2024); straightening by
Liu et al., "Flow Straight and Fast" (2023).
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.artifacts import sha256_of
from keygrip.models.nn.flow_matching import integrate, interpolate, noise_levels
from keygrip.models.nn.lora import merge
from keygrip.models.patch_dit.context import CATEGORIES, ConditionDropout, Conditions
from keygrip.models.patch_dit.dino_view import weights_digest
from keygrip.models.patch_dit.foreign_settings import plain
from keygrip.models.patch_dit.guidance import SCALES, Guidance
from keygrip.models.patch_dit.init_source import InitSource
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.sampler import FLOOR, Sampling, Velocities
from keygrip.training.memory import is_counting
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)


@model_part
class FewSteps:
    """The loss of a student that is sampled in one step per window.

    Args:
        windows: number of windows of noise levels. teacher_steps: steps of the teacher's sampler in each. teacher: how
            the teacher is sampled, with guidance; `teacher_steps` and `timestep_shift` set its steps and its shift.
        timestep_shift: of the windows, see `noise_levels`; it applies to the student's and the teacher's sampling.

    Raises:
        ValueError: numbers below 1, or settings of the teacher's sampling without effect.
    """

    def __init__(self, windows: int, teacher_steps: int, teacher: Sampling, timestep_shift: float = 1.0) -> None:
        if min(windows, teacher_steps) < 1:
            raise ValueError(f"model.few_steps: windows={windows} and teacher_steps={teacher_steps} must be at least 1")
        self.windows, self.teacher_steps, self.teacher = windows, teacher_steps, teacher
        self.timestep_shift = timestep_shift
        noise_levels(windows, timestep_shift)  # raises ValueError for impossible values
        for name, instead in (("steps", "teacher_steps"), ("timestep_shift", "timestep_shift")):
            if getattr(teacher, name) != getattr(Sampling, name):
                raise ValueError(
                    f"model.few_steps.teacher.{name}={getattr(teacher, name)} has no effect: it is "
                    f"model.few_steps.{instead} that counts"
                )
        if teacher.solver != "euler" and teacher_steps == 1:
            raise ValueError(
                f"model.few_steps.teacher.solver={teacher.solver} has no effect with teacher_steps=1: euler"
            )
        lowest, highest = teacher.interval
        ends = itertools.pairwise(self.levels())
        guided = teacher.guidance != "none" and any(getattr(teacher, name) for name in SCALES)
        levels = [level for high, low in ends for level in self._inside(high, low)[:-1]]
        if guided and not any(lowest <= level <= highest for level in levels):
            raise ValueError(
                f"model.few_steps.teacher.interval={list(teacher.interval)} has none of the teacher's steps in it: it "
                "would be drawn without guidance, which is guidance=none"
            )
        self._network: PatchDiT | None = None  # the teacher's network
        self._guide: PatchDiT | None = None  # the network that the teacher is guided away from
        self.teacher_digest: str | None = None  # hash of the teacher's weights

    def check(self, sampling: Sampling) -> None:
        """Raise ValueError if the student would be sampled in another way than it is trained for."""
        chosen = (sampling.steps, sampling.guidance, sampling.solver, sampling.timestep_shift)
        if chosen != (self.windows, "none", "euler", self.timestep_shift):
            raise ValueError(
                f"model.few_steps: a student of {self.windows} windows is drawn with model.sampling.steps="
                f"{self.windows}, guidance=none, solver=euler and timestep_shift={self.timestep_shift:g}, not with "
                f"steps={chosen[0]}, guidance={chosen[1]}, solver={chosen[2]} and timestep_shift={chosen[3]:g}"
            )

    def networks(self) -> list[nn.Module]:
        """The teacher's network and its guide, as far as there are any: neither trained nor stored."""
        return [network for network in (self._network, self._guide) if network is not None]

    def take_teacher(self, network: PatchDiT, source: InitSource) -> None:
        """Store a copy of a trained network as the teacher, and its guide if `teacher.guide_scale` requires one.

        Args:
            source: of the network.

        Raises:
            ValueError: the guide is missing, or is of another network.
        """
        teacher = copy.deepcopy(network)
        merge(teacher)  # for a LoRA student: its low-rank differences are zero at the start
        self._network = teacher.eval().requires_grad_(False)
        self.teacher_digest = weights_digest(self._network)
        self._warn_of_other_guidance(source)
        if not self.teacher.guide_scale:
            return
        if not source.guide:
            raise ValueError(
                f"model.few_steps.teacher.guide_scale={self.teacher.guide_scale}: model.init_from={source.path} has no "
                "guide (model.guide), or its step had not come: 0"
            )
        self._guide = copy.deepcopy(self._network)
        try:
            self._guide.load_state_dict(source.guide)
        except RuntimeError as error:
            raise ValueError(f"model.init_from={source.path}: its guide is of another network than this one") from error
        self.teacher_digest = sha256_of([self.teacher_digest.encode(), weights_digest(self._guide).encode()])[:16]

    def _warn_of_other_guidance(self, source: InitSource) -> None:
        """Warn if `teacher` is guided in another way than the samples of its own run."""
        run = source.model.get("sampling")
        if not isinstance(run, Mapping):
            return
        ways = [
            {part.name: _format_setting(settings.get(part.name, part.default)) for part in fields(Guidance)}
            for settings in (run, vars(self.teacher))
        ]
        other = [name for name in ways[0] if ways[0][name] != ways[1][name]]
        if not other or ways[0]["guidance"] == ways[1]["guidance"] == "none":  # then nothing else has an effect
            return
        run_text, teacher_text = (", ".join(f"{name}={settings[name]}" for name in other) for settings in ways)
        log.warning(
            "%s is drawn with %s, and its student learns from it with %s; as its run draws it: %s",
            *(source.path, run_text, teacher_text),
            " ".join(f"model.few_steps.teacher.{name}={ways[0][name]}" for name in other),
        )

    def refuse_other_teacher(self, digest: str | None) -> None:
        """Raise ValueError if training would continue with another teacher than that of the checkpoint."""
        if None not in (digest, self.teacher_digest) and digest != self.teacher_digest:
            raise ValueError(
                "model.init_from holds other weights than the teacher that this student began with (a run that was "
                "trained on, or another one in its place): bring those back, or train a new student"
            )

    def levels(self, shift: float = 1.0) -> list[float]:
        """The ends of the windows, from 1 to 0. shift: for the resolution, see `resolution_shift`."""
        return noise_levels(self.windows, self.timestep_shift * shift)

    def loss(
        self,
        student: PatchDiT,
        data: Tensor,
        conditions: Conditions,
        dropout: ConditionDropout,
        shift: float = 1.0,
    ) -> Tensor:
        """Mean squared error of the velocity along the teacher's chord through one window, sampled for each batch.

        Args:
            data: normalised latents ``[B, C, h, w]``. conditions: of these. dropout: shares of the conditions that a
                batch keeps; `none` counts as both, since a student without guidance does not need it.
            shift: of the windows, for the resolution, in addition to their own shift.
        """
        count = len(data)
        category = CATEGORIES[int(dropout.draw(1))]
        kept_conditions = conditions
        if category == "text":
            kept_conditions = conditions.without_dino()
        elif category == "dino":
            kept_conditions = replace(conditions, text=None, text_mask=None)
        window = int(torch.randint(self.windows, ()))
        noise, share = torch.randn_like(data), torch.rand(count, device=data.device)
        return self.chord_loss(student, data, conditions, window, noise, share, shift, kept_conditions)

    def largest_loss(self, student: PatchDiT, data: Tensor, conditions: Conditions, shift: float = 1.0) -> Tensor:
        """`chord_loss` in the middle of the chord, with all conditions, in the window in which the teacher has most
        branches: the training step that needs the most memory."""
        ends = list(itertools.pairwise(self.levels(shift)))
        branch_counts = [
            max(len(self.teacher.branches(conditions, level)) for level in self._inside(high, low)[:-1])
            for high, low in ends
        ]
        window = branch_counts.index(max(branch_counts))
        share = torch.full((len(data),), 0.5, device=data.device)
        return self.chord_loss(student, data, conditions, window, torch.randn_like(data), share, shift)

    @torch.no_grad()
    def validation_loss(
        self,
        student: PatchDiT,
        data: Tensor,
        conditions: Conditions,
        generator: torch.Generator,
        shift: float = 1.0,
    ) -> Tensor:
        """The mean of `chord_loss` over all windows, with all conditions. generator: on the CPU, for the noise."""
        losses = []
        for window in range(self.windows):
            noise = torch.randn(data.shape, generator=generator).to(data)
            share = torch.rand(len(data), generator=generator).to(data.device)
            losses.append(self.chord_loss(student, data, conditions, window, noise, share, shift))
        return torch.stack(losses).mean()

    def chord_loss(
        self,
        student: PatchDiT,
        data: Tensor,
        conditions: Conditions,
        window: int,
        noise: Tensor,
        share: Tensor,
        shift: float = 1.0,
        kept: Conditions | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity along the teacher's chord through one window.

        Args:
            data, noise: ``[B, C, h, w]``. share: ``[B]`` in 0..1, the position on the chord, from its lower end.
                shift: see `levels`. kept: the conditions that are used; None: all. The others are passed to the student
                and dropped there, so that the same parameters have gradients in all processes.
        """
        kept = conditions if kept is None else kept
        count, device, aspect = len(data), data.device, data.shape[3] / data.shape[2]
        high, low = self.levels(shift)[window : window + 2]
        start = interpolate(data, noise, torch.full((count,), high, device=device))
        end = self.teacher_end(start, kept, high, low)
        keep = [torch.full((count,), has, device=device) for has in (kept.has_text, kept.has_dino)]
        context = student.context_builder(conditions, keep[0], keep[1], aspect)
        x, level = interpolate(end, start, share), low + (high - low) * share
        predicted = student(x, level, context, floor=FLOOR).velocity
        error = predicted.float() - ((start - end) / (high - low)).float()
        if student.prediction == "x":  # near the data, an image error is divided by almost zero
            error = error * (level / student.timestep_floor).clamp(max=1.0)[:, None, None, None]
        return error.pow(2).mean()

    @torch.no_grad()
    def teacher_end(self, start: Tensor, conditions: Conditions, high: float, low: float) -> Tensor:
        """The teacher's latents at the noise level ``low``, sampled from ``start`` ``[B, C, h, w]`` at ``high``."""
        assert self._network is not None, "take_teacher comes first"
        network = self._network.to(start.device)
        guide = None if self._guide is None else self._guide.to(start.device)
        aspect, trimmed = start.shape[3] / start.shape[2], not is_counting()  # a counted mask has no content
        velocities = Velocities(network, conditions, len(start), aspect, trimmed=trimmed, guide=guide)

        def velocity_at(x: Tensor, level: float) -> Tensor:
            by_branch = velocities(x, level, self.teacher.branches(conditions, level))
            return self.teacher.combine(by_branch, x, level, conditions)

        return integrate(velocity_at, start, self._inside(high, low), self.teacher.solver)

    def _inside(self, high: float, low: float) -> list[float]:
        """The teacher's noise levels from the upper end of a window to the lower one."""
        return [low + (high - low) * level for level in noise_levels(self.teacher_steps)]


def _format_setting(value: Any) -> str:
    """A sampling setting in the form of the command line; equal settings (2 and 2.0, list and tuple) become equal."""
    if value is None:
        return "null"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_format_setting(each) for each in value)}]"
    return f"{value:g}" if isinstance(value, int | float) else plain(value)
