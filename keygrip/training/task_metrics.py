"""Validation metrics by task, because an average hides a task that is not learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor

MOST_TASKS = 200  # with more tasks none are logged by task, which would flood a logger


class MeansByTask:
    """Means of values for each of a known list of instructions, over all processes.

    Args:
        instructions: of the training split, in the same order on every process. With fewer than two or more than 200,
            no means are computed; a sentence that is not in the list is not counted.
    """

    def __init__(self, instructions: Sequence[str]) -> None:
        tasks = instructions if 2 <= len(instructions) <= MOST_TASKS else ()
        self.numbers = {instruction: index for index, instruction in enumerate(tasks)}
        self.keys = unique_short_names(list(tasks))
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Remove all added values."""
        self._sums = {}

    def add(self, instructions: Sequence[str], values: Mapping[str, Tensor], valid: Tensor) -> None:
        """Add a batch.

        Args:
            instructions: B sentences. values: by name, ``[B, ...]``. valid: bool of the same shape: values that count.
        """
        if not self.numbers:
            return
        task_indices = [self.numbers.get(instruction, -1) for instruction in instructions]
        rows = torch.tensor([row for row, index in enumerate(task_indices) if index >= 0], dtype=torch.long)
        tasks = torch.tensor([index for index in task_indices if index >= 0], dtype=torch.long)
        for name, value in values.items():
            usable = valid & torch.isfinite(value)
            totals = value.masked_fill(~usable, 0.0).flatten(1).sum(-1).double().cpu()
            counts = usable.flatten(1).sum(-1).double().cpu()
            sums = self._sums.setdefault(name, torch.zeros(2, len(self.numbers), dtype=torch.float64))
            sums.index_add_(1, tasks, torch.stack([totals, counts])[:, rows])

    def means(self) -> dict[str, float]:
        """Return ``<task>/<name>`` for every task with values on any process."""
        everywhere = self._sum_over_processes()
        averages = {}
        for name, (totals, counts) in everywhere.items():
            for index, key in enumerate(self.keys):
                if counts[index] > 0:
                    averages[f"{key}/{name}"] = float(totals[index] / counts[index])
        return averages

    def _sum_over_processes(self) -> dict[str, Tensor]:
        if not torch.distributed.is_initialized():
            return self._sums
        parts: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, self._sums)
        names = sorted({name for part in parts for name in part})
        return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}


def unique_short_names(sentences: Sequence[str]) -> list[str]:
    """Return unique short names for a logger."""
    keys: list[str] = []
    for instruction in sentences:
        key = re.sub(r"[^a-z0-9]+", "_", instruction.lower()).strip("_")[:40] or "no_instruction"
        keys.append(key if key not in keys else f"{key}_{len(keys)}")
    return keys
