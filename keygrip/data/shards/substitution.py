"""Replace each bad sample in a batch by another sample, so that batches keep their size, and count it."""

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
    """A valid sample from which this run can use nothing: for example, its text is too long."""


class SubstitutingSamples(Dataset[Sample], ABC):
    """A data set that replaces samples that cannot be read or used by others; indexed by `SampleKey`.

    Attributes:
        leaves_out: leave out samples that cannot be read or used: in evaluation a replacement would count twice.
        never_empty: if a batch would be empty, one sample is replaced all the same, since all processes of a
            distributed run need the same number of batches.
    """

    leaves_out: bool = False
    never_empty: bool = False

    @abstractmethod
    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield the sample itself, then similar samples that may replace it. Batches keep their size, and the order
        remains a function of (seed, epoch, step)."""

    def usable_candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield samples that may replace an unusable one. A subclass returns others than `candidates` if similar
        samples are likely to be unusable too."""
        return itertools.islice(self.candidates(key), 1, None)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[Sample | None, list[BadSample]]] | list[BadSample]:
        """Return a batch's samples, each with the bad samples that it replaces (None: left out, see `leaves_out`). If
        neither a sample nor any of its replacements can be used, return a single error."""
        results: list[tuple[Sample | None, list[BadSample]]] = []
        for key in keys:
            result = self._found(key, self.leaves_out)
            if isinstance(result, BadSample):
                return [result]
            results.append(result)
        if self.never_empty and all(sample is None for sample, _ in results):
            result = self._found(keys[0], leaves_out=False)
            if isinstance(result, BadSample):
                return [result]
            results[0] = result
        return results

    def _found(self, key: SampleKey, leaves_out: bool) -> tuple[Sample | None, list[BadSample]] | BadSample:
        skipped: list[BadSample] = []
        waiting = self.candidates(key)
        while (candidate := next(waiting, None)) is not None:
            try:
                return self[candidate], skipped
            except BadSample as error:
                if leaves_out:
                    return None, [error]
                if isinstance(error, UnusableSample) and not any(isinstance(e, UnusableSample) for e in skipped):
                    waiting = self.usable_candidates(candidate)
                skipped.append(error)
        verb = "used" if isinstance(skipped[0], UnusableSample) else "read"
        return BadSample(f"{len(skipped)} samples in a row cannot be {verb}; the first: {skipped[0]}")


@dataclass(frozen=True)
class Collate:
    """The loader's collate function. It returns the batch (None: no sample is left), its number of samples, and the
    errors of skipped samples.

    Args:
        collator: makes a batch from samples.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(
        self, samples: list[tuple[Any, list[BadSample]]] | list[BadSample]
    ) -> tuple[Any, int, list[BadSample]] | BadSample:
        first = samples[0]
        if isinstance(first, BadSample):
            return first
        kept = [sample for sample, _ in samples if sample is not None]  # type: ignore[misc]
        errors = [error for _, skipped in samples for error in skipped]  # type: ignore[misc]
        return self.collator(kept) if kept else None, len(samples), errors


class CountingLoader(ResumableLoader):
    """A loader that yields only the batches and counts the skipped samples: those that could not be read, and
    separately those that could not be used."""

    skipped: BadSamples | None = None
    unusable: BadSamples | None = None

    def __iter__(self) -> Any:
        for batch, samples, errors in super().__iter__():
            for counted, sort in ((self.skipped, False), (self.unusable, True)):
                if counted is not None:
                    counted.add(samples, [str(e) for e in errors if isinstance(e, UnusableSample) == sort])
            if batch is not None:
                yield batch
