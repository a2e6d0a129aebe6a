"""Unreadable samples: replaced where they stand, counted where they are used, an error where there are many."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset

from keygrip.data.shards.sampling import ResumableLoader, SampleKey
from keygrip.data.shards.tars import SampleError

log = logging.getLogger(__name__)

SUBSTITUTES = 8  # tried in place of an unreadable sample
JUDGED_AFTER = 200  # samples, before the share of skipped ones is judged
NAMED_AT_MOST = 10
Sample = TypeVar("Sample", covariant=True)


class SubstitutingSamples(Dataset[Sample], ABC):
    """A data set that gives another sample for one that cannot be read; indexed by `SampleKey`."""

    @abstractmethod
    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """The sample itself, then those that may stand in for it: like ones, so that batches keep their size and the
        order stays a function of (seed, epoch, step)."""

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[Sample, list[str]]] | list[SampleError]:
        """A batch's samples, each with what was skipped on the way to it; or the error where nothing could be read."""
        found = []
        for key in keys:
            skipped: list[str] = []
            for candidate in self.candidates(key):
                try:
                    found.append((self[candidate], skipped))
                    break
                except SampleError as error:
                    skipped.append(str(error))
            else:
                return [SampleError(f"{len(skipped)} samples in a row cannot be read; the first: {skipped[0]}")]
        return found


@dataclass(frozen=True)
class Collate:
    """The loader's collate function: the batch, of how many samples it is, and what was skipped for it.

    Args:
        collator: makes a batch of samples.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(
        self, samples: list[tuple[Any, list[str]]] | list[SampleError]
    ) -> tuple[Any, int, list[str]] | SampleError:
        first = samples[0]
        if isinstance(first, SampleError):
            return first
        batch = self.collator([sample for sample, _ in samples])  # type: ignore[misc]
        return batch, len(samples), [reason for _, skipped in samples for reason in skipped]  # type: ignore[misc]


class Skipped:
    """Counts skipped samples in the main process.

    Args:
        max_share: more than this share of the samples seen is an error.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share, self.seen, self.reasons = max_share, 0, dict[str, int]()

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def add(self, samples: int, reasons: Sequence[str]) -> None:
        """Raises ValueError: too many."""
        self.seen += samples
        for reason in reasons:
            if reason not in self.reasons and len(self.reasons) < NAMED_AT_MOST:
                log.warning("skipped: %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.count > self.max_share * self.seen and self.seen >= JUDGED_AFTER:
            raise ValueError(
                f"{self.count} of {self.seen} samples could not be read, more than data.max_skipped_share="
                f"{self.max_share:g} allows; the first: {next(iter(self.reasons))}"
            )


class SkippingLoader(ResumableLoader):
    """A loader that hands out the batches alone and reports what was skipped for them."""

    skipped: Skipped | None = None

    def __iter__(self) -> Any:
        for batch, samples, reasons in super().__iter__():
            if self.skipped is not None:
                self.skipped.add(samples, reasons)
            yield batch
