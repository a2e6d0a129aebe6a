"""The order of samples: the same for any number of ranks and workers, each sample once, resumed from one number."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from keygrip.data.shards.resuming import ResumableData
from keygrip.data.shards.sampling import GlobalBatchSampler, ResumableLoader, SampleKey, sample_generator, start_worker


class Keys(Dataset[torch.Tensor]):
    """Returns which sample was requested, in which epoch, and the first random number of its generator."""

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        return torch.tensor([key.sample, key.epoch, sample_generator(5, key).uniform()], dtype=torch.float64)


def delivered(
    rank: int, ranks: int, workers: int, epochs: int = 2, samples: int = 37, batch: int = 12
) -> list[torch.Tensor]:
    sampler = GlobalBatchSampler(samples, batch, rank, ranks, seed=3)
    loader = ResumableLoader(
        Keys(),
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (3, 2)])
def test_any_ranks_and_workers_deliver_the_same_global_batches(ranks: int, workers: int) -> None:
    reference = delivered(0, 1, 0)
    parts = [delivered(rank, ranks, workers) for rank in range(ranks)]
    together = [torch.cat(batch) for batch in zip(*parts, strict=True)]
    assert len(together) == len(reference) == 6
    for ours, theirs in zip(together, reference, strict=True):
        assert torch.equal(ours, theirs)


def test_each_sample_once_an_epoch_and_another_order_in_the_next() -> None:
    sampler = GlobalBatchSampler(36, 12, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert sorted(key.sample for key in keys) == list(range(36))
        assert {key.epoch for key in keys} == {epoch}
        orders.append([key.sample for key in keys])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [key.sample for batch in GlobalBatchSampler(36, 12, seed=2) for key in batch]


def test_what_drop_last_leaves_out_changes_with_the_epoch() -> None:
    sampler = GlobalBatchSampler(10, 4)
    left_out = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        keys = [key.sample for batch in sampler for key in batch]
        assert len(keys) == len(set(keys)) == 8
        left_out.append(frozenset(range(10)) - frozenset(keys))
    assert frozenset().union(*left_out) == frozenset(range(10))


@pytest.mark.parametrize(("samples", "ranks"), [(37, 1), (37, 4), (38, 4), (36, 4), (3, 4)])
def test_validation_sees_every_sample_and_all_ranks_have_equal_numbers_of_batches(samples: int, ranks: int) -> None:
    samplers = [GlobalBatchSampler(samples, 12, rank, ranks, shuffle=False, drop_last=False) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(part) for part in batches} == {len(samplers[0])}
    assert all(batch for part in batches for batch in part)
    indices = [key.sample for part in batches for batch in part for key in batch]
    assert set(indices) == set(range(samples))
    assert len(indices) == max(samples, ranks)  # no sample is repeated, unless there are fewer samples than ranks
    assert max(len(batch) for part in batches for batch in part) <= 12 // ranks + 1
    samplers[0].set_epoch(5)  # as Lightning does in the sixth epoch
    assert list(samplers[0]) == batches[0]


def total_length(before: list[int], batches: list[list[SampleKey]]) -> int:
    return sum(before) + len(batches)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_one_number_resumes_the_order(done: int, ranks: int) -> None:
    for rank in range(ranks):
        whole = GlobalBatchSampler(37, 12, rank, ranks, seed=3)
        uninterrupted = []
        for epoch in range(3):
            whole.set_epoch(epoch)
            uninterrupted += list(whole)
        resumed = GlobalBatchSampler(37, 12, rank, ranks, seed=3)
        after: list[list[SampleKey]] = []
        resumed.follow(partial(total_length, [done], after))
        while len(after) < 9 - done:
            assert len(resumed) == 3
            after += list(resumed)
        assert after == uninterrupted[done:]


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    draws = {
        (seed, epoch, index): sample_generator(seed, SampleKey(index, epoch)).uniform()
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(set(draws.values())) == 27
    assert draws[1, 2, 0] == sample_generator(1, SampleKey(0, 2)).uniform()


def test_permutations_are_uniform() -> None:
    sampler = GlobalBatchSampler(4, 4)
    first = np.bincount([sampler.order(epoch)[0] for epoch in range(4000)], minlength=4)
    assert np.abs(first - 1000).max() < 120  # 4 standard deviations


def test_batches_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=9 .* must divide by the 2 processes; 8 would"):
        GlobalBatchSampler(100, 9, 0, 2)
    with pytest.raises(ValueError, match=r"holds 5 samples, fewer than one batch of 8; lower data\.batch_size"):
        GlobalBatchSampler(5, 8)


class NoSharedMemory(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: object) -> int:
        raise RuntimeError("unable to write to file </torch_91_1>: No space left on device (28)")


def test_too_little_shared_memory_is_one_sentence() -> None:
    loader = ResumableLoader(NoSharedMemory(), batch_size=2)
    with pytest.raises(OSError, match=r"^the loader's workers ran out of shared memory \(/dev/shm\): .*num_workers"):
        list(loader)


def test_balanced_epochs_hold_as_many_samples_of_each_group() -> None:
    groups = np.repeat([7, 3, 5], [4, 25, 11])
    sampler = GlobalBatchSampler(40, 8, seed=2, groups=groups)
    orders = [sampler.order(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(np.unique(groups[order], return_counts=True)[1]) == [13, 13, 14]
        assert (
            np.bincount(order[groups[order] == 7]).max() - np.bincount(order[groups[order] == 7], minlength=4).min()
            <= 1
        )
        assert np.bincount(order[groups[order] == 3]).max() == 1
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[2], GlobalBatchSampler(40, 8, seed=2, groups=groups).order(2))
    ranks = [list(GlobalBatchSampler(40, 8, rank, 2, seed=2, groups=groups)) for rank in range(2)]
    together = [key.sample for step in zip(*ranks, strict=True) for part in step for key in part]
    np.testing.assert_array_equal(together, orders[0])


def test_the_position_is_the_checkpoints_until_the_trainer_has_its_own() -> None:
    data, total = ResumableData(), SimpleNamespace(processed=0)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    data.trainer = SimpleNamespace(fit_loop=loop)  # type: ignore[assignment]
    data.begin_from({"batches_done": 7})
    assert data.batches_done() == 7
    total.processed = 9
    assert data.batches_done() == 9


def test_shares_of_groups_are_rounded_by_the_largest_remainder() -> None:
    sampler = GlobalBatchSampler(10, 2, groups=np.repeat([0, 1], 5), weights=[0.58, 0.42])
    assert (sampler.order(0) < 5).sum() == 6
