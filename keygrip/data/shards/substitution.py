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
    """A data set that gives another sample for one that cannot be read or used; indexed by `SampleKey`.

    Attributes:
        leaves_out: samples that cannot be used are left out: in evaluation a replacement would count twice.
        never_empty: but where nothing of a batch would be left, one is replaced, since every process of a distributed
            run needs as many batches as the others.
    """

    leaves_out: bool = False
    never_empty: bool = False

    @abstractmethod
    def candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """The sample itself, then similar ones that may replace it, so that batches keep their size and the
        order stays a function of (seed, epoch, step)."""

    def usable_candidates(self, key: SampleKey) -> Iterator[SampleKey]:
        """Samples that may replace one of which nothing can be used. A subclass gives others than `candidates` where
        similar samples are likely to be unusable too."""
        return itertools.islice(self.candidates(key), 1, None)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[Sample | None, list[BadSample]]] | list[BadSample]:
        """A batch's samples, each with the bad samples that it replaces (None: left out, see `leaves_out`); or a single
        error where neither a sample nor any of its replacements could be used."""
        found: list[tuple[Sample | None, list[BadSample]]] = []
        for key in keys:
            one = self._found(key, self.leaves_out)
            if isinstance(one, BadSample):
                return [one]
            found.append(one)
        if self.never_empty and all(sample is None for sample, _ in found):
            one = self._found(keys[0], leaves_out=False)
            if isinstance(one, BadSample):
                return [one]
            found[0] = one
        return found

    def _found(self, key: SampleKey, leaves_out: bool) -> tuple[Sample | None, list[BadSample]] | BadSample:
        skipped: list[BadSample] = []
        waiting = self.candidates(key)
        while (candidate := next(waiting, None)) is not None:
            try:
                return self[candidate], skipped
            except UnusableSample as error:
                if leaves_out:
                    return None, [*skipped, error]
                if not any(isinstance(earlier, UnusableSample) for earlier in skipped):
                    waiting = self.usable_candidates(candidate)
                skipped.append(error)
            except BadSample as error:
                skipped.append(error)
        verb = "used" if isinstance(skipped[0], UnusableSample) else "read"
        return BadSample(f"{len(skipped)} samples in a row cannot be {verb}; the first: {skipped[0]}")


@dataclass(frozen=True)
class Collate:
    """The loader's collate function: the batch (None: nothing is left of it), of how many samples it is, and what was
    skipped for it.

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
        kept = [sample for sample, _ in samples if sample is not None]  # type: ignore[misc]
        errors = [error for _, skipped in samples for error in skipped]  # type: ignore[misc]
        return self.collator(kept) if kept else None, len(samples), errors


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
            if batch is not None:
                yield batch
