"""Stages of a run in which the sources of a mixture have other proportions, as a pure function of the epoch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keygrip.training.parts import data_part


@data_part
@dataclass(frozen=True)
class Stage:
    """A part of the run in which the lead sources have their own proportions (a curriculum: easy ones first).

    Args:
        weights: by name of the lead source; one that is not named takes no part.
        steps: how many optimiser steps it lasts, each of `accumulate_grad_batches` batches; None: to the end. Where an
            epoch does not divide by these, its last step takes fewer batches, and a stage ends up to one step later for
            each epoch.

    Raises:
        ValueError: weights that are negative or all zero, or no steps.
    """

    weights: Mapping[str, float]
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"a stage of the curriculum needs weights of which one is above 0, not {self.weights}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a stage of the curriculum lasts at least one step, not {self.steps}")

    def batches(self, per_step: int) -> int | None:
        """How many batches it lasts, where a step takes so many; None: to the end."""
        return None if self.steps is None else self.steps * per_step

    def counts(self, names: Sequence[str], samples: int) -> list[int]:
        """So many samples by the weights: of each source of `names`."""
        weights = np.array([self.weights.get(name, 0.0) for name in names])
        borders = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        return np.diff(np.round(borders * samples).astype(int)).tolist()


def check_stages(stages: Sequence[Stage], names: Collection[str]) -> None:
    """Checks the stages of a curriculum.

    Args:
        names: of the lead sources.

    Raises:
        ValueError: a stage names another source, or it is not the last stage alone that has no end.
    """
    if other := sorted({name for stage in stages for name in stage.weights} - set(names)):
        raise ValueError(
            f"the curriculum names {', '.join(other)}; sources without a share are {', '.join(sorted(names))}"
        )
    ends = [stage.steps is not None for stage in stages]
    if ends != [True] * (len(ends) - 1) + [False]:
        raise ValueError("every stage of the curriculum but the last needs steps, and the last has none")


@dataclass(frozen=True)
class Curriculum:
    """Stages one after the other, over epochs of equally many batches.

    Args:
        stages: the last without an end, see :func:`check_stages`.
        batches: of an epoch.
        batch_size: samples of a batch.
        filling: with a budget, how many samples fill a batch on average, in place of batch_size; by stage.
        batches_per_step: of an optimiser step, in which stages count.
    """

    stages: Sequence[Stage]
    batches: int
    batch_size: int
    filling: Sequence[float] | None = None
    batches_per_step: int = 1

    def epochs(self) -> list[int]:
        """Epochs that together hold batches of every stage: the first one, and the one in which each stage begins,
        with the next where it goes on there."""
        found, start = {0}, 0
        for stage in self.stages:
            epoch = start // self.batches
            found.add(epoch)
            lasts = stage.batches(self.batches_per_step)
            if lasts is None or start + lasts > (epoch + 1) * self.batches:
                found.add(epoch + 1)
            start += lasts or 0
        return sorted(found)

    def stages_of(self, epoch: int) -> list[tuple[int, int]]:
        """The numbers of the stages that an epoch's batches belong to, each with how many of them."""
        found, start = [], 0
        first, last = epoch * self.batches, (epoch + 1) * self.batches
        for number, stage in enumerate(self.stages):
            lasts = stage.batches(self.batches_per_step)
            stop = last if lasts is None else start + lasts
            inside = min(stop, last) - max(start, first)
            if inside > 0:
                found.append((number, inside))
            start = stop
        return found

    def totals(self, epoch: int) -> list[int]:
        """Samples of each of the epoch's stages, mixed-in ones with them."""
        if self.filling is None:
            return [self.batch_size * batches for _, batches in self.stages_of(epoch)]
        # rounding takes a sample away here and there, and no batch may be empty
        return [max(round(self.filling[n] * batches), batches + 2) for n, batches in self.stages_of(epoch)]

    def counts(self, epoch: int, names: Sequence[str], lead: int) -> list[list[int]]:
        """For each of the epoch's stages, samples of each source of `names` (zero for those that are mixed in).

        Args:
            lead: samples of all lead sources in the epoch.
        """
        before = 0
        rows: list[list[int]] = []
        totals = self.totals(epoch)
        for (number, _), total in zip(self.stages_of(epoch), totals, strict=True):
            before += total
            here = round(lead * before / sum(totals)) - sum(sum(row) for row in rows)
            rows.append(self.stages[number].counts(names, here))
        return rows
