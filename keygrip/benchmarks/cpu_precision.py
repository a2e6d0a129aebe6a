"""Products in bfloat16 against those in float32 on this processor: what ``strategy.precision=auto`` should take, and
what attention should be computed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from keygrip.benchmarks.measuring import Timed, interleaved_seconds, milliseconds, threads
from keygrip.models.nn.processor_attention import float32_attention
from keygrip.training.strategies import cpu_is_faster_in_bf16


@dataclass(frozen=True)
class CpuPrecision(Timed):
    """Training steps of an MLP as the small models have it, under bf16 autocast and in float32, and those of attention
    in bf16, by three ways; on one thread, in its processor time, which others on that processor do not lengthen.

    Args (beside those of `Timed`, whose seconds are for each width and each number of positions):
        widths: of the tokens; the MLP is four times as wide. tokens: of a step.
        positions: of the rows that attend, causally, with 4 heads of 32 numbers. wide_positions: of those with heads of
            64 numbers. uncausal_positions: of those of which every position attends to all.
        rows: of a batch, at most. batch_positions: of all rows of a batch together, at most.
    """

    widths: Sequence[int]
    tokens: int
    positions: Sequence[int]
    wide_positions: Sequence[int]
    uncausal_positions: Sequence[int]
    rows: int
    batch_positions: int

    def run(self, quick: bool) -> dict[str, float]:
        """`bf16_over_float32_time` is the mean over widths; `chosen_bf16` is 1 where ``auto`` takes bf16 here.

        `attention_ms_<way>_<positions>`, and with ``_wide`` or ``_uncausal`` behind: of a forward and backward pass, by
        torch's fused kernel in bf16 (``bf16``), by that kernel in float32 between casts (``float32``), as keygrip
        trains rows that are no longer than `FLOAT32_KEYS`, and by products in bf16 (``plain``).
        """
        with threads(1):
            times = {width: self._measure(width, quick) for width in self.widths}
            attention = [
                *(self._attention(positions, "", quick) for positions in self.positions),
                *(self._attention(positions, "_wide", quick) for positions in self.wide_positions),
                *(self._attention(positions, "_uncausal", quick) for positions in self.uncausal_positions),
            ]
        ratios = [bf16 / float32 for bf16, float32 in times.values()]
        figures = {
            "bf16_over_float32_time": round(sum(ratios) / len(ratios), 3),
            "chosen_bf16": float(cpu_is_faster_in_bf16()),
        }
        for width, (bf16, float32) in times.items():
            figures |= {f"bf16_ms_{width}": bf16, f"float32_ms_{width}": float32}
        for found in attention:
            figures |= found
        return figures

    def _attention(self, positions: int, kind: str, quick: bool) -> dict[str, float]:
        """Median milliseconds by way; `kind` is "_wide", "_uncausal" or nothing."""
        rows, width = max(1, min(self.rows, self.batch_positions // positions)), 64 if kind == "_wide" else 32
        operands = [torch.randn(rows, 4, positions, width, requires_grad=True) for _ in range(3)]

        def step(way: Callable[..., Tensor]) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                attended = way(*operands, is_causal=kind != "_uncausal")
            attended.float().pow(2).mean().backward()

        def plain(queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)

        ways: dict[str, Callable[..., Tensor]] = {
            "bf16": F.scaled_dot_product_attention,
            "float32": float32_attention,
            "plain": plain,
        }
        found = self._medians({name: partial(step, way) for name, way in ways.items()}, quick)
        return {f"attention_ms_{name}_{positions}{kind}": found[name] for name in ways}

    def _measure(self, width: int, quick: bool) -> tuple[float, float]:
        """Median milliseconds of a step in bf16 and in float32."""
        network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        x = torch.randn(self.tokens, width)

        def step(enabled: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = network(x).float().pow(2).mean()
            loss.backward()

        found = self._medians({"bf16": lambda: step(True), "float32": lambda: step(False)}, quick)
        return found["bf16"], found["float32"]

    def _medians(self, sides: Mapping[str, Callable[[], None]], quick: bool) -> dict[str, float]:
        """Median milliseconds of each."""
        repetitions, limit_s = self.effort(quick)
        device = torch.device("cpu")
        seconds = interleaved_seconds(sides, repetitions, device, limit_s, warm_up=3, clock=time.thread_time)
        return {name: milliseconds(each) for name, each in seconds.items()}
