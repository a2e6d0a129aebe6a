"""Bad samples in a batch: each is replaced by another sample, so that batches keep their size, and counted."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset

from keygrip.data.bad_samples import BadSample, BadSamples
from keygrip.data.shards.sampling import ResumableLoader, SampleKey

SUBSTITUTES = 8  # samples tried in place of a bad one
Sample = TypeVar("Sample", covariant=True)


class UnusableSample(BadSample):
    """A sample that is sound, but of which this run can use nothing: its text is too long, for example."""


class SubstitutingSamples(Dataset[Sample], ABC):
    """A data set that gives another sample for one that cannot be read or used; indexed by `SampleKey`."""

    @abstractmethod
    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """The sample itself, then similar ones that may replace it, so that batches keep their size and the
        order stays a function of (seed, epoch, step)."""

    def usable_candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Samples that may replace one of which nothing can be used. A subclass gives others than `candidates` where
        similar samples are likely to be unusable too."""
        return itertools.islice(self.candidates(key), 1, None)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[Sample, list[BadSample]]] | list[BadSample]:
        """A batch's samples, each with the bad samples that it replaces; or a single error where neither a sample nor
        any of its replacements could be used."""
        found = []
        for key in keys:
            skipped: list[BadSample] = []
            waiting = self.candidates(key)
            while (candidate := next(waiting, None)) is not None:
                try:
                    found.append((self[candidate], skipped))
                    break
                except UnusableSample as error:
                    if not any(isinstance(earlier, UnusableSample) for earlier in skipped):
                        waiting = self.usable_candidates(candidate)
                    skipped.append(error)
                except BadSample as error:
                    skipped.append(error)
            else:
                verb = "used" if isinstance(skipped[0], UnusableSample) else "read"
                return [BadSample(f"{len(skipped)} samples in a row cannot be {verb}; the first: {skipped[0]}")]
        return found


@dataclass(frozen=True)
class Collate:
    """The loader's collate function: the batch, of how many samples it is, and what was skipped for it.

    Args:
        collator: makes a batch of samples.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(
        self, samples: list[tuple[Any, list[BadSample]]] | list[BadSample]
    ) -> tuple[Any, int, list[BadSample]] | BadSample:
        first = samples[0]
        if isinstance(first, BadSample):
            return first
        batch = self.collator([sample for sample, _ in samples])  # type: ignore[misc]
        return batch, len(samples), [error for _, skipped in samples for error in skipped]  # type: ignore[misc]


class CountingLoader(ResumableLoader):
    """A loader that hands out the batches alone and counts the samples that were skipped for them: those that could not
    be read, and, apart from them, those that could not be used."""

    skipped: BadSamples | None = None
    unusable: BadSamples | None = None

    def __iter__(self) -> Any:
        for batch, samples, errors in super().__iter__():
            for counted, sort in ((self.skipped, False), (self.unusable, True)):
                if counted is not None:
                    counted.add(samples, [str(e) for e in errors if isinstance(e, UnusableSample) == sort])
            yield batch
