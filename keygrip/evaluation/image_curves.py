"""The curves of the image suite: figures over guidance scales and over numbers of steps, on fewer images."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keygrip.evaluation.image_cases import AskedConditions, Suite
from keygrip.evaluation.image_statistics import grain, real_figures, set_figures, summarise
from keygrip.models.patch_dit.sampler import Sampling
from keygrip.progress import Progress

STEPPED = ("reconstruction", "text_only")  # cases that are generated in the case `steps`


class Curves:
    """Generate the same `grid_images` images of a suite with many settings."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.options, self.sampling = suite, suite.options, suite.sampling
        self._grids: dict[str, list[tuple[AskedConditions, tuple[int, int]]]] = {}
        self._anchors: dict[tuple[int, ...], dict[str, float]] = {}  # by the numbers of the images

    def scales(self) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
        """Return the figures of `Suite.scaled_case` for each pair of scales, and a row of images per text scale."""
        case = self.suite.scaled_case
        pairs = [(float(t), float(d)) for t in self.options.text_scales for d in self.options.dino_scales]
        images: dict[float, list[Tensor]] = defaultdict(list)
        example_count = max(1, self.options.shown // 4)
        table = []
        for text, dino in Progress(pairs, desc="scales", unit="pair", leave=False):
            figures, examples = self._generate_case(
                case, self.sampling.replaced(text_scale=text, dino_scale=dino), example_count
            )
            if figures:
                table.append({"text_scale": text, "dino_scale": dino, **self._add_grain_difference(case, figures)})
                images[text].append(examples)
        dinos = ", ".join(f"{scale:g}" for scale in self.options.dino_scales)
        rows = [(f"text scale {t:g}; DINO scale {dinos}, {len(p[0])} each", torch.cat(p)) for t, p in images.items()]
        return table, rows

    def word_scales(self) -> list[dict[str, Any]]:
        """Return the figures of images from text only for each text scale."""
        table = []
        for text in Progress(self.options.text_scales, desc="text scales", unit="scale", leave=False):
            figures, _ = self._generate_case("text_only", self.sampling.replaced(text_scale=float(text)))
            if figures:
                table.append({"text_scale": float(text), **self._add_grain_difference("text_only", figures)})
        return table

    def steps(self) -> list[dict[str, Any]]:
        """Return the figures of reconstructions and images from text only by number of steps, with an image's cost."""
        table = []
        pairs = [(case, steps) for case in STEPPED for steps in self.options.step_counts]
        for case, steps in Progress(pairs, desc="steps", unit="curve point", leave=False):
            figures, _ = self._generate_case(case, replace(self.sampling, steps=int(steps)))
            if figures:
                table.append({"case": case, "steps": int(steps), **figures})
        return table

    @torch.no_grad()
    def real(self, case: str) -> dict[str, float]:
        """Return the anchor of a case: the real images that it uses, compared with the same training images; empty if
        it applies to no image."""
        grid = self._list_conditions(case)
        seeds = tuple(seed for asked, _ in grid for seed in asked.seeds)
        if seeds and seeds not in self._anchors:
            features = torch.cat([self.suite.features.features(asked.target).float().cpu() for asked, _ in grid])
            grains = torch.cat([grain(asked.target).float().cpu() for asked, _ in grid])
            self._anchors[seeds] = real_figures(features, grains, self.suite.reference)
        return self._anchors.get(seeds, {})

    def _add_grain_difference(self, case: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Add the difference between the grain and that of the same real images: higher is noise, lower is blur."""
        return {**figures, "grain_off": round(abs(figures["grain"] - self.real(case)["grain"]), 5)}

    def _list_conditions(self, case: str) -> list[tuple[AskedConditions, tuple[int, int]]]:
        """Return the conditions of a case for the images of the curves, with the latents' size of each batch."""
        if case not in self._grids:
            self._grids[case] = [
                (asked, (batch.latents.shape[2], batch.latents.shape[3]))
                for batch, real, numbers in self.suite.batches(self.options.grid_images)
                if (asked := self.suite.ask(case, batch, real, numbers)) is not None
            ]
        return self._grids[case]

    @torch.no_grad()
    def _generate_case(self, case: str, sampling: Sampling, max_examples: int = 0) -> tuple[dict[str, Any], Tensor]:
        """Return the figures of a case generated with the given sampling, and up to `max_examples` images of the first
        batch with that many, or else of the largest batch; empty if the case applies to no image."""
        suite, values = self.suite, defaultdict[str, list[Tensor]](list)
        parts, examples, spent, evaluations = [], torch.zeros(0), 0.0, 0
        for asked, size in self._list_conditions(case):
            started = time.perf_counter()
            drawn = suite.draw(asked, size, sampling).cpu()
            spent += time.perf_counter() - started
            drawn = drawn.to(suite.module.device)
            for name, figure_values in suite.measure(drawn, asked).items():
                values[name].append(figure_values)
            evaluations = suite.module.sampling_at(size, sampling).evaluations(asked.conditions)
            parts.append(suite.features.features(drawn).float().cpu())
            if min(len(drawn), max_examples) > len(examples):
                examples = drawn[:max_examples].cpu()
        if not parts:
            return {}, examples
        features = torch.cat(parts)
        cost = {"evaluations": evaluations, "s_per_image": round(spent / len(features), 4)}
        return summarise(values) | set_figures(features, suite.reference) | cost, examples
