"""Products in bfloat16 against those in float32 on this processor: what ``strategy.precision=auto`` should take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from keygrip.benchmarks.measuring import Timed, interleaved_seconds, milliseconds, threads
from keygrip.training.strategies import cpu_is_faster_in_bf16


@dataclass(frozen=True)
class CpuPrecision(Timed):
    """Training steps of an MLP as the small models have it, under bf16 autocast and in float32, on one thread.

    Args (beside those of `Timed`, whose seconds are for each width):
        widths: of the tokens; the MLP is four times as wide. tokens: of a step.
    """

    widths: Sequence[int]
    tokens: int

    def run(self, quick: bool) -> dict[str, float]:
        """`bf16_over_float32_time` is the mean over widths; `chosen_bf16` is 1 where ``auto`` takes bf16 here."""
        with threads(1):
            times = {width: self._measure(width, quick) for width in self.widths}
        ratios = [bf16 / float32 for bf16, float32 in times.values()]
        figures = {
            "bf16_over_float32_time": round(sum(ratios) / len(ratios), 3),
            "chosen_bf16": float(cpu_is_faster_in_bf16()),
        }
        for width, (bf16, float32) in times.items():
            figures |= {f"bf16_ms_{width}": bf16, f"float32_ms_{width}": float32}
        return figures

    def _measure(self, width: int, quick: bool) -> tuple[float, float]:
        """Median milliseconds of a step in bf16 and in float32."""
        network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        x = torch.randn(self.tokens, width)

        def step(enabled: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = network(x).float().pow(2).mean()
            loss.backward()

        repetitions, limit_s = self.effort(quick)
        sides = {"bf16": lambda: step(True), "float32": lambda: step(False)}
        seconds = interleaved_seconds(sides, repetitions, torch.device("cpu"), limit_s, warm_up=3)
        return milliseconds(seconds["bf16"]), milliseconds(seconds["float32"])
