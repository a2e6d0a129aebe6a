"""Choose the samples of each batch: mixtures of sources and buckets of similar samples, a pure function of (seed,
epoch).

An epoch is one pass through the *lead* sources. Each of the other sources contributes a fixed share of all samples
(exact in expectation), sampled from an endless sequence of permutations. Samples of similar shape (a bucket) are then
grouped into global batches, which reduces padding, and the batches are shuffled. Nothing is streamed: the order of an
epoch is computed. Resuming therefore needs one number, and the order does not depend on workers or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from keygrip.data.shards.budget import (
    BLUR,
    POOL,
    SLACK,
    Budget,
    Sizes,
    group_by_rank,
    pack_batches,
    split_over_ranks,
    with_count,
)
from keygrip.data.shards.curriculum import Curriculum, Stage, check_stages
from keygrip.data.shards.packing import RowLengths
from keygrip.data.shards.sampling import GlobalBatchSampler
from keygrip.data.spacing import evenly

PACKED = 512  # batches that are packed to estimate the padding of an epoch; each takes milliseconds


@dataclass(frozen=True)
class Component:
    """A source in a mixture: N samples.

    Args:
        name: of the source.
        bucket: [N] int64, samples with the same number are batched together.
        length: [N] float, in tokens; within a bucket, batches consist of samples of similar length.
        shard: [N] int32, shard of each sample; used only for shuffling in windows of shards.
        share: of all samples, in (0, 1); None: a lead source, with every sample once per epoch.
        positions, rows: [N] float and int, what a sample uses of a budget: the positions of its longest row in the
            language model, and its number of rows. None: one position per frame (`bucket`) and token, and one row.
        row_tokens: float [sum of rows], tokens of each row, sample after sample; None: `length` for all rows of a
            sample. row_prefixes: [sum of rows], those of them before the visual tokens; None: not known.
    """

    name: str
    bucket: np.ndarray
    length: np.ndarray
    shard: np.ndarray
    share: float | None = None
    positions: np.ndarray | None = None
    rows: np.ndarray | None = None
    row_tokens: np.ndarray | None = None
    row_prefixes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.bucket)


class Mixture:
    """A mixture of consecutively numbered sources: sample i of component c has the number `starts[c] + i`.

    Args:
        components: at least one lead source.
        batch_size: global.
        seed: of the order.
        window_shards: shuffle the lead samples within windows of this many shards, with the windows in random order;
            for remote shards, of which only some fit on the disk at a time. None: shuffle over everything.
        curriculum: consecutive stages, the last without an end; each lead source is repeated as often as needed, and an
            epoch has as many batches as one pass through all lead sources. Empty: each epoch is one pass through all
            lead sources. With a budget, a batch in a stage of short samples has more of them.
        budget: of frames and positions per batch; None: `batch_size` samples of any size.
        batches_per_step: batches per optimizer step (`accumulate_grad_batches`); stages are counted in steps.

    Raises:
        ValueError: there is no lead source; the shares add up to 1 or more; a source is empty; there are too few
            samples for a batch; or a curriculum ends, names other sources, or is combined with window_shards.

    With a budget, a batch has as many samples as the budget allows, at most `batch_size`. Every epoch has the same
    number of batches; samples that do not fit into them are left out of that epoch.
    """

    def __init__(
        self,
        components: Sequence[Component],
        batch_size: int,
        seed: int = 0,
        window_shards: int | None = None,
        curriculum: Sequence[Stage] = (),
        budget: Budget | None = None,
        batches_per_step: int = 1,
    ) -> None:
        self.budget, self.batches_per_step = budget, batches_per_step
        self.components, self.batch_size, self.seed = list(components), batch_size, seed
        self.curriculum: Curriculum | None = None  # set below, once the number of batches per epoch is known
        self.window_shards = window_shards
        for part in self.components:
            if not len(part):
                raise ValueError(f"the source {part.name!r} holds no samples")
            if part.share is not None and not 0 < part.share < 1:
                raise ValueError(f"the share of source {part.name!r} is {part.share:g}; it must lie between 0 and 1")
        shares = sum(part.share or 0.0 for part in self.components)
        self.lead = [n for n, part in enumerate(self.components) if part.share is None]
        if not self.lead or shares >= 1:
            raise ValueError(
                f"the shares of {', '.join(p.name for p in self.components if p.share)} make {shares:g}; leave at "
                "least one source without a share: an epoch is one pass through it"
            )
        if window_shards is not None and window_shards < 1:
            raise ValueError(f"window_shards must be at least 1, not {window_shards}")
        self.names = [part.name for part in self.components]
        if curriculum:
            check_stages(curriculum, {self.names[n] for n in self.lead})
            if window_shards is not None:
                raise ValueError(
                    "a curriculum and window_shards cannot be combined: its stages draw their samples from everywhere"
                )
        self.starts = np.cumsum([0, *(len(part) for part in self.components)])
        self.bucket = np.concatenate([part.bucket for part in self.components])
        self.length = np.concatenate([part.length for part in self.components])
        self.sizes = sizes_of(self.components)
        leading = sum(len(self.components[n]) for n in self.lead)
        self.batches = math.floor(leading / (1 - shares) / batch_size)
        if self.batches < 1:
            raise ValueError(
                f"the training split holds {leading} samples beside the mixed-in ones, fewer than one batch of "
                f"{batch_size}; lower data.batch_size"
            )
        self.samples = self.batches * batch_size  # per epoch; with a budget, in one pass through the lead sources
        filling: list[float] | None = None
        if budget is not None:
            self.samples = math.floor(leading / (1 - shares))
            filled = sum(map(len, self._filled(0)))
            self.batches = min(self.samples, filled + 1 + filled // SLACK)
            filling = [self._samples_per_batch(stage) for stage in curriculum]
        if curriculum:
            self.curriculum = Curriculum(curriculum, self.batches, batch_size, filling, batches_per_step)

    def counts(self, epoch: int) -> list[int]:
        """Return the number of samples of each component in an epoch. Shares are exact in expectation over seeds, and
        within one sample over all epochs so far. The lead sources (counted together, at the first lead source's index)
        provide the rest."""
        counts = [0] * len(self.components)
        for index, part in enumerate(self.components):
            if part.share is not None:
                counts[index] = self._drawn(index, part.share, epoch + 1) - self._drawn(index, part.share, epoch)
        counts[self.lead[0]] = self._total(epoch) - sum(counts)
        return counts

    def _total(self, epoch: int) -> int:
        """Return the number of samples in an epoch; with a curriculum, the total of its stages."""
        return sum(self.curriculum.totals(epoch)) if self.curriculum else self.samples

    def _drawn(self, component_index: int, share: float, epoch: int) -> int:
        """Return how many samples of a component were used before an epoch; the mean over all random offsets is exactly
        its share of all samples."""
        offset = np.random.default_rng([self.seed, component_index, 1]).random()
        if self.curriculum and self.budget is not None:  # epochs have different numbers of samples
            return math.floor(share * sum(self._total(past) for past in range(epoch)) + offset)
        return math.floor(share * self.samples * epoch + offset)

    def _samples_per_batch(self, stage: Stage) -> float:
        """Return the mean number of samples in a batch of a stage within the budget. A short stage is measured on fewer
        samples, since fewer samples contain fewer similar ones."""
        ratio = self._measure_samples_per_batch(stage, self.samples)
        lasts = stage.batches(self.batches_per_step)
        stage_samples = math.inf if lasts is None else lasts * ratio
        return (
            ratio if stage_samples >= self.samples else self._measure_samples_per_batch(stage, math.ceil(stage_samples))
        )

    def _measure_samples_per_batch(self, stage: Stage, samples: int) -> float:
        """Return the ratio of `samples` samples of a stage, including mixed-in ones, to the batches that they fill."""
        assert self.budget is not None
        counts = [0 if part.share is None else round(part.share * samples) for part in self.components]
        counts = np.add(counts, stage.counts(self.names, samples - sum(counts))).tolist()
        parts = [self._take_permuted(n, len(part), 0, counts[n]) for n, part in enumerate(self.components)]
        pool = np.concatenate([start + part for start, part in zip(self.starts[:-1], parts, strict=True)])
        rng = np.random.default_rng([self.seed, 4])
        filled = len(pack_batches(rng.permutation(pool), self.sizes, self.budget, self.batch_size, rng))
        return len(pool) / (filled + 1 + filled // SLACK)

    def _lead_samples(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(np.concatenate([np.arange(*self.starts[n : n + 2]) for n in self.lead]))
        # with several mixed-in sources, rounding may require one lead sample more than exist: one is repeated
        return np.resize(order, self.counts(epoch)[self.lead[0]])

    def epochs_of_stages(self) -> list[int]:
        """Return epochs that together contain batches of every stage; without a curriculum, the first epoch."""
        return self.curriculum.epochs() if self.curriculum else [0]

    def _staged_counts(self, epoch: int) -> list[list[int]]:
        """Return for each of the epoch's stages the number of samples of each component (0 for mixed-in components)."""
        assert self.curriculum is not None
        return self.curriculum.counts(epoch, self.names, self.counts(epoch)[self.lead[0]])

    def _staged_samples(self, epoch: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the lead samples of an epoch, by stage; every component continues where the last epoch stopped."""
        taken_counts = [0] * len(self.components)
        for past in range(epoch):
            for counts in self._staged_counts(past):
                taken_counts = [a + b for a, b in zip(taken_counts, counts, strict=True)]
        pools = []
        for counts in self._staged_counts(epoch):
            parts = [
                self.starts[index] + self._take_permuted(index, len(part), taken_counts[index], count)
                for index, (part, count) in enumerate(zip(self.components, counts, strict=True))
            ]
            pools.append(rng.permutation(np.concatenate(parts)))
            taken_counts = [a + b for a, b in zip(taken_counts, counts, strict=True)]
        return pools

    def _mixed_in_samples(self, epoch: int) -> np.ndarray:
        counts, parts = self.counts(epoch), [np.zeros(0, dtype=np.int64)]
        for index, part in enumerate(self.components):
            if part.share is not None:
                first = self._drawn(index, part.share, epoch)
                parts.append(self.starts[index] + self._take_permuted(index, len(part), first, counts[index]))
        return np.concatenate(parts)

    def _take_permuted(self, component_index: int, size: int, first: int, count: int) -> np.ndarray:
        """Return elements `first` to `first + count` - 1 of a component's endless sequence of permutations."""
        if not count:
            return np.zeros(0, dtype=np.int64)
        rounds = range(first // size, (first + count - 1) // size + 1)
        orders = [np.random.default_rng([self.seed, component_index, r, 3]).permutation(size) for r in rounds]
        return np.concatenate(orders)[first - rounds[0] * size :][:count]

    def order(self, epoch: int) -> np.ndarray:
        """Return the epoch's samples, batch after batch: int64 [batches * batch_size]."""
        pools, extra, rng = self._make_pools(epoch)
        remainder, batches = np.zeros(0, dtype=np.int64), []
        for part, additional in zip(pools, extra, strict=True):
            pool = np.concatenate([remainder, part, additional])
            full = len(pool) // self.batch_size * self.batch_size
            remainder, pool = pool[full:], pool[:full]
            batches.append(bucketed(pool, self.bucket[pool], self.length[pool], self.batch_size, rng))
        assert not len(remainder)
        return np.concatenate(batches)

    def _make_pools(self, epoch: int) -> tuple[list[np.ndarray], list[np.ndarray], np.random.Generator]:
        """Return the epoch's lead samples in consecutive pools (stages or windows), the mixed-in samples of each pool,
        and the random generator for the next steps."""
        rng = np.random.default_rng([self.seed, epoch, 2])
        mixed_in = self._mixed_in_samples(epoch)
        if self.curriculum:
            pools = self._staged_samples(epoch, rng)
        else:
            lead = self._lead_samples(epoch, rng)
            pools = self._group_by_window(lead, rng) if self.window_shards else [lead]
        # Mixed-in samples are spread evenly over the pools; samples that do not fill a batch move to the next pool.
        ends = np.cumsum([len(pool) for pool in pools])
        extra = np.split(rng.permutation(mixed_in), np.round(ends[:-1] / ends[-1] * len(mixed_in)).astype(int))
        return pools, extra, rng

    def _filled(self, epoch: int) -> list[list[np.ndarray]]:
        """Return the epoch's batches, packed within the budget, by pool."""
        assert self.budget is not None
        pools, extra, rng = self._make_pools(epoch)
        batches = []
        for part, additional in zip(pools, extra, strict=True):
            pool = rng.permutation(np.concatenate([part, additional]))
            batches.append(pack_batches(pool, self.sizes, self.budget, self.batch_size, rng))
        return batches

    def batches_of(self, epoch: int) -> list[np.ndarray]:
        """Return the samples of each of the epoch's batches; every epoch has `self.batches` batches."""
        if self.budget is None:
            return list(self.order(epoch).reshape(self.batches, self.batch_size))
        filled = self._filled(epoch)
        if not self.curriculum:
            return with_count(list(chain.from_iterable(filled)), self.batches)
        counts = [batches for _, batches in self.curriculum.stages_of(epoch)]
        return list(chain.from_iterable(with_count(pool, count) for pool, count in zip(filled, counts, strict=True)))

    def parts(self, batch: np.ndarray, ranks: int) -> list[np.ndarray]:
        """Divide a batch over the ranks. The batches themselves do not depend on the number of ranks, so that a run can
        continue with a different number."""
        return np.array_split(batch, ranks) if self.budget is None else split_over_ranks(batch, self.sizes, ranks)

    def padding(
        self,
        epoch: int,
        ranks: int = 1,
        tokens_per_frame: int = 1,
        packed: bool = False,
        query_passes: float = 0.0,
    ) -> float:
        """Return the share of an epoch's positions that are padding, over all passes of the language model, if each
        rank pads all rows of its part of a batch to the longest of them.

        Args:
            tokens_per_frame: positions of a frame. packed: rows are packed into bins (`bins_of`); the share is then
                computed from 512 evenly spaced batches. query_passes: see `positions_of_passes`; not counted if some
                source's `row_prefixes` are not known.
        """
        row_lengths = row_lengths_of(self.components)
        batches = self.batches_of(epoch)
        if packed:
            batches = [batches[index] for index in evenly(len(batches), PACKED)]
        token_count = position_count = 0.0
        for part in chain.from_iterable(self.parts(batch, ranks) for batch in batches):
            held, total = row_lengths.positions(part, packed, query_passes, tokens_per_frame)
            token_count, position_count = token_count + held, position_count + total
        return float(1 - token_count / position_count) if position_count else 0.0

    def _group_by_window(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Group the samples by window of shards."""
        assert self.window_shards is not None
        component = np.searchsorted(self.starts, order, side="right") - 1
        shard_index = np.concatenate([part.shard for part in self.components])[order].astype(np.int64)
        names, shard = np.unique(np.stack([component, shard_index]), axis=1, return_inverse=True)
        window = (rng.permutation(names.shape[1]) // self.window_shards)[shard.ravel()]
        sorted_by_window = np.argsort(window, kind="stable")
        return np.split(order[sorted_by_window], np.flatnonzero(np.diff(window[sorted_by_window])) + 1)


def sizes_of(components: Sequence[Component]) -> Sizes:
    """Return what the samples of consecutive components use of a budget."""
    longest = [part.bucket + part.length if part.positions is None else part.positions for part in components]
    rows = [np.ones(len(part), np.int64) if part.rows is None else part.rows for part in components]
    return Sizes(*(np.concatenate(each) for each in ([part.bucket for part in components], longest, rows)))


def row_lengths_of(components: Sequence[Component]) -> RowLengths:
    """Return the lengths of the rows of consecutive components; the prefixes are None if one component has none."""
    sizes, prefixes = sizes_of(components), [part.row_prefixes for part in components if part.row_prefixes is not None]
    known = np.concatenate(prefixes) if len(prefixes) == len(components) else None
    return RowLengths(sizes.frames, sizes.rows, row_tokens_of(components), known)


def row_tokens_of(components: Sequence[Component]) -> np.ndarray:
    """Return the tokens of each row of consecutive components, sample after sample: float [total number of rows]."""
    uniform_tokens = [np.repeat(part.length, 1 if part.rows is None else part.rows) for part in components]
    recorded_tokens = [part.row_tokens for part in components]
    return np.concatenate(
        [
            uniform if recorded is None else recorded
            for uniform, recorded in zip(uniform_tokens, recorded_tokens, strict=True)
        ]
    )


def bucketed(
    samples: np.ndarray, bucket: np.ndarray, length: np.ndarray, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Order samples into batches of similar size, with the batches in random order; an incomplete batch comes last.

    Args:
        samples: [n], in random order. bucket, length: [n].

    Samples that do not fill a batch of their bucket are batched with the remaining samples of neighbouring buckets.
    """
    length = length * rng.uniform(1 - BLUR, 1 + BLUR, len(length))
    batches, remainders = [], []
    by_bucket = np.argsort(bucket, kind="stable")
    for group in np.split(by_bucket, np.flatnonzero(np.diff(bucket[by_bucket])) + 1):
        full = len(group) // batch_size * batch_size
        remainders.append(group[full:])
        for start in range(0, full, POOL * batch_size):
            pool = group[start : min(start + POOL * batch_size, full)]
            batches.append(pool[np.argsort(length[pool], kind="stable")].reshape(-1, batch_size))
    remainder = np.concatenate(remainders)
    remainder = remainder[np.lexsort((length[remainder], bucket[remainder]))]
    full = len(remainder) // batch_size * batch_size
    batches.append(remainder[:full].reshape(-1, batch_size))
    all_batches = np.concatenate(batches)
    return samples[np.concatenate([rng.permutation(all_batches).ravel(), remainder[full:]])]


class MixedBatchSampler(GlobalBatchSampler):
    """Yield this rank's part of each global batch of a mixture; otherwise the same as :class:`GlobalBatchSampler`.

    Args:
        mixture: of the training sources. rank, ranks: this process and the number of processes.
    """

    def __init__(self, mixture: Mixture, rank: int = 0, ranks: int = 1) -> None:
        divided = mixture.batch_size if mixture.budget is None else ranks  # a budget's batches differ in size anyway
        super().__init__(mixture.samples, divided, rank, ranks, mixture.seed, drop_last=False)
        self.mixture = mixture

    def __len__(self) -> int:
        return self.mixture.batches

    def parts_of(self, epoch: int, first: int = 0) -> Iterator[Sequence[np.ndarray]]:
        return (self.mixture.parts(batch, self.ranks) for batch in self.mixture.batches_of(epoch)[first:])


class BucketedSampler(GlobalBatchSampler):
    """Yield every sample once, in bucketed batches in a fixed order (validation).

    Args:
        components: consecutively numbered. limit: use only this many samples, the first of a fixed permutation.
        budget: of a batch; None: `batch_size` samples.
    """

    def __init__(
        self,
        components: Sequence[Component],
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        limit: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.sizes = sizes_of(components)
        self.bucket, self.length = self.sizes.frames, np.concatenate([part.length for part in components])
        samples = len(self.bucket) if limit is None else min(limit, len(self.bucket))
        divided = batch_size if budget is None else ranks  # a budget's batches differ in size anyway
        super().__init__(samples, divided, rank, ranks, seed=0, shuffle=False, drop_last=False)
        self.budget, self.most = budget, batch_size
        self.count = super().__len__() if budget is None else len(self._planned())

    def __len__(self) -> int:
        return self.count

    def order(self, epoch: int) -> np.ndarray:
        chosen, rng = self._select_samples()
        return bucketed(chosen, self.bucket[chosen], self.length[chosen], self.batch_size, rng)

    def parts_of(self, epoch: int, first: int = 0) -> Iterator[Sequence[np.ndarray]]:
        return super().parts_of(epoch, first) if self.budget is None else iter(self._planned()[first:])

    def _select_samples(self) -> tuple[np.ndarray, np.random.Generator]:
        rng = np.random.default_rng(0)
        return rng.permutation(len(self.bucket))[: self.samples], rng

    def _planned(self) -> list[list[np.ndarray]]:
        """Return batches in which every rank fills its own share of the budget; no sample occurs twice."""
        assert self.budget is not None
        chosen, rng = self._select_samples()
        frames, positions = (max(1, total // self.ranks) for total in (self.budget.frames, self.budget.positions))
        rank_budget = replace(self.budget, frames=frames, positions=positions)
        most = max(1, self.most // self.ranks)
        return group_by_rank(pack_batches(chosen, self.sizes, rank_budget, most, rng), self.ranks)


def padded_share(order: np.ndarray, batch_size: int, *sizes: np.ndarray) -> float:
    """Return `padding_of` the complete batches of an order: [n] samples, batch after batch."""
    return padding_of(order[: len(order) // batch_size * batch_size].reshape(-1, batch_size), *sizes)


def padding_of(batches: Iterable[np.ndarray], *sizes: np.ndarray) -> float:
    """Return the share of padding in batches if each sample is padded to the largest size in its batch.

    Args:
        batches: indices of samples. sizes: [N] each, for example frames and tokens.
    """
    used = places = 0.0
    for batch in batches:
        used += sum(float(size[batch].sum()) for size in sizes)
        places += sum(float(size[batch].max()) * len(batch) for size in sizes)
    return 1 - used / places if places else 0.0
