"""Bad samples in a batch: each is replaced by another sample, so that batches keep their size, and counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset

from keygrip.data.bad_samples import BadSample, BadSamples
from keygrip.data.shards.sampling import ResumableLoader, SampleKey

SUBSTITUTES = 8  # samples tried in place of an unreadable one
Sample = TypeVar("Sample", covariant=True)


class SubstitutingSamples(Dataset[Sample], ABC):
    """A data set that gives another sample for one that cannot be read; indexed by `SampleKey`."""

    @abstractmethod
    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """The sample itself, then similar ones that may replace it, so that batches keep their size and the
        order stays a function of (seed, epoch, step)."""

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[Sample, list[str]]] | list[BadSample]:
        """A batch's samples, each with what was skipped on the way to it; or the error where nothing could be read."""
        found = []
        for key in keys:
            skipped: list[str] = []
            for candidate in self.candidates(key):
                try:
                    found.append((self[candidate], skipped))
                    break
                except BadSample as error:
                    skipped.append(str(error))
            else:
                return [BadSample(f"{len(skipped)} samples in a row cannot be read; the first: {skipped[0]}")]
        return found


@dataclass(frozen=True)
class Collate:
    """The loader's collate function: the batch, of how many samples it is, and what was skipped for it.

    Args:
        collator: makes a batch of samples.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(
        self, samples: list[tuple[Any, list[str]]] | list[BadSample]
    ) -> tuple[Any, int, list[str]] | BadSample:
        first = samples[0]
        if isinstance(first, BadSample):
            return first
        batch = self.collator([sample for sample, _ in samples])  # type: ignore[misc]
        return batch, len(samples), [reason for _, skipped in samples for reason in skipped]  # type: ignore[misc]


class CountingLoader(ResumableLoader):
    """A loader that hands out the batches alone and counts the samples that were skipped for them."""

    skipped: BadSamples | None = None

    def __iter__(self) -> Any:
        for batch, samples, reasons in super().__iter__():
            if self.skipped is not None:
                self.skipped.add(samples, reasons)
            yield batch
