"""Health metrics of the foveation, each with its healthy range, and counts of training rows.

Legend: V videos, F frames of the longest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.foveated_vlm.scores import BatchScores
from keygrip.models.foveated_vlm.video_language import VLMOutput
from keygrip.training.distributed import global_sum
from keygrip.training.monitors import Range

HEALTH_FRAMES = 64  # enough for an average, few enough for the memory that attention maps take

RANGES = {
    "attention_entropy": Range(
        0.0,
        0.95,
        "the queries attend nearly uniformly: raise model.network.query_std, keep deep_query=true",
    ),
    "static_query_std": Range(
        0.5, 2.0, "the learned query has left the scale at which attention is neither uniform nor a single point"
    ),
    "query_effect": Range(
        0.5,
        math.inf,
        "embeddings are nearly the same under different queries (mean absolute difference; the queries do nothing)",
    ),
    "val/fine_over_coarse": Range(
        0.0, 0.99, "chosen queries do not lower the loss: do any questions in the data need them?"
    ),
    "grad_norm_clipped": Range(1e-6, math.inf, "the gradients are zero"),
    "visual_over_text_std": Range(
        0.2, 5.0, "visual tokens are not on the scale of the token embeddings: see model.network.visual_scale"
    ),
}


def ranges_of(network: torch.nn.Module) -> dict[str, Range]:
    """Return `RANGES`; without that of the static query if it starts as CLS: it then has the encoder's scale, whatever
    that is."""
    starts_as_cls = isinstance(network, FoveatedVLM) and network.starts_as_cls
    return {name: range_ for name, range_ in RANGES.items() if not (starts_as_cls and name == "static_query_std")}


class RowCounts:
    """Counts of the rows of training batches, summed since the last report: a single batch is not representative if
    texts come in batches of their own.

    Args:
        tokens_per_frame, packed: settings of the network, to count the language model's positions.
    """

    counted = ("rows", "text_only", "positions", "held", "truncated", "left_out", "clips")

    def __init__(self, tokens_per_frame: int, packed: bool) -> None:
        self.tokens_per_frame, self.packed = tokens_per_frame, packed
        self._counts: Counter[str] = Counter()
        self._left_out = 0  # since training began or was resumed

    def add(self, batch: VideoTextBatch, rows: TextRows, query_passes: int = 0) -> None:
        """Count a batch of this process, given with its rows and the number of passes that predicted its queries."""
        held, positions = map(int, rows.positions(self.tokens_per_frame, self.packed, query_passes))
        text_only = sum(not rows.frame_counts[video] for video in rows.videos)
        self._counts.update(rows=len(batch), text_only=text_only, positions=positions, held=held)
        self._counts.update(truncated=batch.truncated, left_out=batch.left_out, clips=batch.clips)

    def report(self, device: torch.device) -> dict[str, float]:
        """Return shares and counts over the batches of all processes and reset them; `left_out_rows` is not reset.

        Every process must call it at the same step.
        """
        local_counts = torch.tensor([self._counts[name] for name in self.counted], dtype=torch.int64, device=device)
        counts = dict(zip(self.counted, global_sum(local_counts).tolist(), strict=True))
        self._counts.clear()
        self._left_out += counts["left_out"]
        return {
            "padding_share": 1 - counts["held"] / max(1, counts["positions"]),
            "text_only_share": counts["text_only"] / max(1, counts["rows"]),
            "truncated_rows": float(counts["truncated"]),
            "left_out_rows": float(self._left_out),
            "clips": float(counts["clips"]),
        }


@torch.no_grad()
def health_figures(
    network: FoveatedVLM,
    output: VLMOutput,
    rows: TextRows,
    frames: Tensor,
    scores: BatchScores,
    score: Callable[[VLMOutput], BatchScores],
) -> dict[str, Tensor]:
    """Compute metrics for `RANGES`, [] each, on one process's rows; those about frames are left out if all are text.

    Nothing here waits for other processes, because their rows may be text when these are not.

    Args:
        output, scores: results of the training step. score: computes the scores of another output for the same batch.
        frames: [V, F, 3, H, W], the input of the network.
    """
    figures: dict[str, Tensor] = {"static_query_std": network.static_query.float().std()}
    passes, streams = output.passes, rows.streams
    if passes is None:
        return figures
    attention = network.attention_by_frame(passes, streams, HEALTH_FRAMES).flatten(0, 1)
    slots = streams.slots if passes.queries is not None else torch.arange(len(attention), device=frames.device)
    figures["attention_entropy"] = relative_entropy(attention[slots[slots < len(attention)]])
    visual = passes.visual.flatten(0, 1)[streams.places]
    figures["visual_over_text_std"] = visual.float().std() / network.language.embedding_std
    if passes.fine is not None:
        coarse = streams.to_streams(passes.coarse)
        figures["query_effect"] = (passes.fine - coarse).flatten(0, 1)[streams.places].float().abs().mean()
        kv = [type(block)(block.key.detach(), block.value.detach()) for block in passes.kv]
        coarse_scores = score(network(frames, rows, "coarse_only", kv=kv))
        figures["loss_fine_over_coarse"] = scores.loss / coarse_scores.loss.clamp_min(1e-9)
    return figures


def relative_entropy(attention: Tensor) -> Tensor:
    """Return the entropy of attention [..., N] divided by log N, averaged over rows with any: 1 is uniform, 0 a single
    token."""
    mass = attention.sum(-1) > 0.5
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(-1) / math.log(attention.shape[-1])
    return (entropy * mass).sum() / mass.sum().clamp_min(1)
