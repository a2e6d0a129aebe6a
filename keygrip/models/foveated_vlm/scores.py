"""Loss and exact matches of answers, summed by kind of question over any number of batches and processes.

Legend: B rows, n predicted tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from keygrip.data.batches import VideoTextBatch
from keygrip.models.foveated_vlm.loss import Kernel, fused_cross_entropy, token_cross_entropy
from keygrip.models.foveated_vlm.video_language import VLMOutput
from keygrip.training.distributed import world_size

REFINED = "coarse_fine_refined"  # name of `coarse_fine` with refinement


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch.

    Attributes:
        loss: sum over the supervised tokens, with gradient. tokens: their count.
        row_loss: [B] sums, row_tokens: [B] counts, of the supervised tokens, without gradient.
        answered: bool [B], rows with an answer in their text. exact: bool [B], rows where every token of the answers
            (the end token too) is the most probable one given the true ones before it: greedy generation gives them.
    """

    loss: Tensor
    tokens: Tensor
    row_loss: Tensor
    row_tokens: Tensor
    answered: Tensor
    exact: Tensor


def score(
    output: VLMOutput,
    batch: VideoTextBatch,
    weight: Tensor,
    chunk: int,
    kernel: Kernel = "chunked",
    tokens: int | None = None,
) -> BatchScores:
    """Score a network's output; `weight` is the language model's output layer [W, C], `tokens` as in
    `token_cross_entropy`.

    Without gradients the loss is computed in chunks for either kernel, so that any machine can evaluate. In training,
    the kernel `liger` searches for the most probable token among all rows of `weight`.
    """
    hidden, (row, token) = output.predicting(batch.loss_mask | batch.answer_mask)
    targets = batch.input_ids[row, token]
    if kernel == "liger" and torch.is_grad_enabled():
        losses, right = fused_cross_entropy(hidden, weight, targets)
    else:
        losses, right = token_cross_entropy(hidden, weight, targets, chunk, tokens)
    supervised, answers = batch.loss_mask[row, token].float(), batch.answer_mask[row, token]
    zeros = torch.zeros(len(batch), device=losses.device)
    wrong = zeros.index_add(0, row, (answers & ~right).float())
    answer_tokens = zeros.index_add(0, row, answers.float())
    weighted = losses * supervised
    return BatchScores(
        loss=weighted.sum(),
        tokens=supervised.sum(),
        row_loss=zeros.index_add(0, row, weighted.detach()),
        row_tokens=zeros.index_add(0, row, supervised),
        answered=answer_tokens > 0,
        exact=(answer_tokens > 0) & (wrong == 0),
    )


class Scores:
    """Sums over batches, by kind: loss, tokens, answered, exact."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    def add(self, scores: BatchScores, kinds: Sequence[str]) -> None:
        columns = torch.stack(
            [scores.row_loss, scores.row_tokens, scores.answered.float(), scores.exact.float()], dim=1
        ).tolist()
        for kind, row in zip(kinds, columns, strict=True):
            kind_sums = self.sums[kind]
            for index, value in enumerate(row):
                kind_sums[index] += value

    def figures(self) -> dict[str, float]:
        """Return `loss` and `perplexity` per token and `accuracy` per row over all processes, and loss and accuracy by
        kind (`accuracy_mark`)."""
        sums = self._gather_sums()
        total = [sum(kind_sums[index] for kind_sums in sums.values()) for index in range(4)]
        figures: dict[str, float] = {}
        if total[1]:
            figures["loss"] = total[0] / total[1]
            figures["perplexity"] = math.exp(min(figures["loss"], 50.0))
        if total[2]:
            figures["accuracy"] = total[3] / total[2]
        for kind, kind_sums in sorted(sums.items()):
            if kind_sums[1]:
                figures[f"loss_{kind}"] = kind_sums[0] / kind_sums[1]
            if kind_sums[2]:
                figures[f"accuracy_{kind}"] = kind_sums[3] / kind_sums[2]
        return figures

    def questions(self) -> dict[str, int]:
        """Return `questions_<kind>` over all processes: rows with an answer, the denominator of `accuracy_<kind>`."""
        return {f"questions_{kind}": int(sums[2]) for kind, sums in sorted(self._gather_sums().items()) if sums[2]}

    def _gather_sums(self) -> dict[str, list[float]]:
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
        for part in _of_all_processes(self.sums):
            for kind, kind_sums in part.items():
                sums[kind] = [a + b for a, b in zip(sums[kind], kind_sums, strict=True)]
        return dict(sums)


def gather_values(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return the values of all processes by name; every process must call it."""
    merged: dict[str, list[float]] = defaultdict(list)
    for part in _of_all_processes(values):
        for name, own in part.items():
            merged[name] += own
    return dict(merged)


def _of_all_processes(values: Mapping[str, Sequence[float]]) -> list[dict[str, list[float]]]:
    gathered: list[Any] = [dict(values)]
    if world_size() > 1:
        gathered = [None] * world_size()
        distributed.all_gather_object(gathered, dict(values))
    return gathered


def comparisons(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Compare the losses of two modes: ratio `fine_over_coarse`, relative differences `gap` and `gap_refined`."""
    loss = {mode: values["loss"] for mode, values in figures.items() if "loss" in values}
    metrics = {}
    if {"coarse_fine", "coarse_only"} <= loss.keys():
        metrics["fine_over_coarse"] = loss["coarse_fine"] / max(loss["coarse_only"], 1e-9)
    for name, mode in (("gap", "coarse_fine"), ("gap_refined", REFINED)):
        if {mode, "autoregressive"} <= loss.keys():
            metrics[name] = abs(loss[mode] - loss["autoregressive"]) / max(loss["autoregressive"], 1e-9)
    return metrics
