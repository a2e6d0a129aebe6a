"""Curriculum: stages of a run with different proportions of the sources of a mixture, a pure function of the epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keygrip.training.parts import data_part

log = logging.getLogger(__name__)


@data_part
@dataclass(frozen=True)
class Stage:
    """A part of the run with its own proportions of the lead sources (a curriculum: easy ones first).

    Args:
        weights: by name of the lead source; sources that are not named are not used in this stage.
        steps: length of the stage in optimizer steps, each of `accumulate_grad_batches` batches; None: to the end. If
            the batches of an epoch are not a multiple of that, its last step has fewer batches, and a stage ends up to
            one step later for each epoch.

    Raises:
        ValueError: weights are negative or all zero, or `steps` is below 1.
    """

    weights: Mapping[str, float]
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"a stage of the curriculum needs weights of which one is above 0, not {self.weights}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a stage of the curriculum lasts at least one step, not {self.steps}")

    def batches(self, per_step: int) -> int | None:
        """Return the length of the stage in batches, with `per_step` batches per step; None: to the end."""
        return None if self.steps is None else self.steps * per_step

    def counts(self, names: Sequence[str], samples: int) -> list[int]:
        """Divide `samples` by the weights: return the number of samples of each source of `names`."""
        weights = np.array([self.weights.get(name, 0.0) for name in names])
        borders = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        return np.diff(np.round(borders * samples).astype(int)).tolist()


def check_stages(stages: Sequence[Stage], names: Collection[str]) -> None:
    """Check the stages of a curriculum.

    Args:
        names: of the lead sources.

    Raises:
        ValueError: a stage names another source, the last stage has an end, or an earlier stage has none.
    """
    if unknown := sorted({name for stage in stages for name in stage.weights} - set(names)):
        raise ValueError(
            f"the curriculum names {', '.join(unknown)}; sources without a share are {', '.join(sorted(names))}"
        )
    ends = [stage.steps is not None for stage in stages]
    if ends != [True] * (len(ends) - 1) + [False]:
        raise ValueError("every stage of the curriculum but the last needs steps, and the last has none")


def first_steps(stages: Sequence[Stage], batches: int, per_step: int) -> list[int]:
    """Return for each stage of a checked curriculum the optimizer step that has its first batch.

    Args:
        batches: per epoch. per_step: batches per optimizer step; the last step of an epoch may have fewer.
    """
    first_batches = np.cumsum([0, *(stage.batches(per_step) or 0 for stage in stages[:-1])])
    epochs, batches_into_epoch = np.divmod(first_batches, batches)
    return (epochs * math.ceil(batches / per_step) + batches_into_epoch // per_step).tolist()


def warn_of_unreached(stages: Sequence[Stage], first: Sequence[int], end: float) -> None:
    """Log a warning for each stage that training does not reach; it names the sources of the stage that no earlier
    stage uses.

    Args:
        first: for each stage the step at which it begins (`first_steps`). end: the step at which training stops.
    """
    seen: set[str] = set()
    for number, (stage, begin) in enumerate(zip(stages, first, strict=True), 1):
        used = {name for name, weight in stage.weights.items() if weight}
        if begin >= end:
            new = ", ".join(sorted(used - seen))
            log.warning(
                "data.curriculum: stage %d begins at optimizer step %d, but training ends at step %d, so the stage is "
                "not reached%s; train for more steps (max_steps), or shorten the stages before it (steps)",
                *(number, begin, end, f" and nothing is trained on {new}" if new else ""),
            )
        seen |= used


@dataclass(frozen=True)
class Curriculum:
    """Consecutive stages over epochs with equal numbers of batches.

    Args:
        stages: the last one has no end, see :func:`check_stages`.
        batches: per epoch.
        batch_size: samples per batch.
        filling: with a budget, the mean number of samples in a batch, by stage; used in place of batch_size.
        batches_per_step: batches per optimizer step; the length of a stage is given in steps.
    """

    stages: Sequence[Stage]
    batches: int
    batch_size: int
    filling: Sequence[float] | None = None
    batches_per_step: int = 1

    def epochs(self) -> list[int]:
        """Return epochs that together contain batches of every stage: the first epoch, each epoch in which a stage
        begins, and the next epoch if the stage continues there."""
        new_epochs, start = {0}, 0
        for stage in self.stages:
            epoch = start // self.batches
            new_epochs.add(epoch)
            lasts = stage.batches(self.batches_per_step)
            if lasts is None or start + lasts > (epoch + 1) * self.batches:
                new_epochs.add(epoch + 1)
            start += lasts or 0
        return sorted(new_epochs)

    def stages_of(self, epoch: int) -> list[tuple[int, int]]:
        """Return the indices of the stages of an epoch's batches, each with its number of batches."""
        stage_batches, start = [], 0
        first, last = epoch * self.batches, (epoch + 1) * self.batches
        for index, stage in enumerate(self.stages):
            lasts = stage.batches(self.batches_per_step)
            stop = last if lasts is None else start + lasts
            inside = min(stop, last) - max(start, first)
            if inside > 0:
                stage_batches.append((index, inside))
            start = stop
        return stage_batches

    def totals(self, epoch: int) -> list[int]:
        """Return the number of samples in each of the epoch's stages, including mixed-in samples."""
        if self.filling is None:
            return [self.batch_size * batches for _, batches in self.stages_of(epoch)]
        # two more samples than batches: rounding can remove a sample, and no batch may be empty
        return [max(round(self.filling[n] * batches), batches + 2) for n, batches in self.stages_of(epoch)]

    def counts(self, epoch: int, names: Sequence[str], lead: int) -> list[list[int]]:
        """Return for each of the epoch's stages the number of samples of each source of `names` (0 for sources that are
        mixed in).

        Args:
            lead: samples of all lead sources in the epoch.
        """
        cumulative = 0
        rows: list[list[int]] = []
        totals = self.totals(epoch)
        for (index, _), total in zip(self.stages_of(epoch), totals, strict=True):
            cumulative += total
            stage_samples = round(lead * cumulative / sum(totals)) - sum(sum(row) for row in rows)
            rows.append(self.stages[index].counts(names, stage_samples))
        return rows
