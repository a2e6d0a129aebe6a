"""Compare bfloat16 with float32 on this processor: which precision ``strategy.precision=auto`` should choose, and in
which precision attention should be computed."""

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
    """Training steps of an MLP like that of the small models, under bf16 autocast and in float32, and training steps of
    attention in bf16, computed in three ways. Both run on one thread. The time is that thread's CPU time, which other
    processes on the same processor do not lengthen.

    Args (in addition to those of `Timed`, whose limits in seconds apply to each width and each number of positions):
        widths: token widths; the hidden layer of the MLP is four times as wide. tokens: tokens per step.
        quick_widths, quick_positions: those with `quick`; of the latter the two other kinds of rows have the last one.
        positions: row lengths for causal attention with 4 heads of width 32. wide_positions: row lengths for causal
            attention with 4 heads of width 64. uncausal_positions: row lengths for attention without a causal mask.
        rows: largest number of rows of a batch. batch_positions: largest number of positions of all rows of a batch.
    """

    widths: Sequence[int]
    tokens: int
    positions: Sequence[int]
    wide_positions: Sequence[int]
    uncausal_positions: Sequence[int]
    rows: int
    batch_positions: int
    quick_widths: Sequence[int]
    quick_positions: Sequence[int]

    def run(self, quick: bool) -> dict[str, float]:
        """`bf16_over_float32_time` is the mean over widths; `chosen_bf16` is 1 if ``auto`` chooses bf16 here.

        `attention_ms_<way>_<positions>`, some with the suffix ``_wide`` or ``_uncausal``, is the time of a forward and
        backward pass. The way is torch's fused kernel in bf16 (``bf16``), the same kernel in float32 between casts
        (``float32``; keygrip trains rows of up to `FLOAT32_KEYS` positions this way), or separate matrix products in
        bf16 (``plain``).
        """
        lengths = {"": self.positions, "_wide": self.wide_positions, "_uncausal": self.uncausal_positions}
        if quick:
            last = self.quick_positions[-1:]
            lengths = {"": self.quick_positions, "_wide": last, "_uncausal": last}
        with threads(1):
            times = {width: self._measure(width, quick) for width in (self.quick_widths if quick else self.widths)}
            attention = [
                self._time_attention(positions, kind, quick) for kind, each in lengths.items() for positions in each
            ]
        ratios = [bf16 / float32 for bf16, float32 in times.values()]
        figures = {
            "bf16_over_float32_time": round(sum(ratios) / len(ratios), 3),
            "chosen_bf16": float(cpu_is_faster_in_bf16()),
        }
        for width, (bf16, float32) in times.items():
            figures |= {f"bf16_ms_{width}": bf16, f"float32_ms_{width}": float32}
        for medians in attention:
            figures |= medians
        return figures

    def _time_attention(self, positions: int, kind: str, quick: bool) -> dict[str, float]:
        """Return the median milliseconds of each way; `kind` is "_wide", "_uncausal" or ""."""
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
        medians = self._medians({name: partial(step, way) for name, way in ways.items()}, quick)
        return {f"attention_ms_{name}_{positions}{kind}": medians[name] for name in ways}

    def _measure(self, width: int, quick: bool) -> tuple[float, float]:
        """Return the median milliseconds of an MLP step in bf16 and in float32."""
        network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        x = torch.randn(self.tokens, width)

        def step(enabled: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = network(x).float().pow(2).mean()
            loss.backward()

        medians = self._medians({"bf16": lambda: step(True), "float32": lambda: step(False)}, quick)
        return medians["bf16"], medians["float32"]

    def _medians(self, sides: Mapping[str, Callable[[], None]], quick: bool) -> dict[str, float]:
        """Return the median milliseconds of each side."""
        repetitions, limit_s = self.effort(quick)
        device = torch.device("cpu")
        seconds = interleaved_seconds(sides, repetitions, device, limit_s, warm_up=3, clock=time.thread_time)
        return {name: milliseconds(each) for name, each in seconds.items()}
