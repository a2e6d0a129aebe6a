"""Mixtures and buckets: exact shares, every sample once, little padding, the same result in every process."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from keygrip.data.shards.budget import Budget
from keygrip.data.shards.curriculum import Stage
from keygrip.data.shards.mixing import (
    BucketedSampler,
    Component,
    MixedBatchSampler,
    Mixture,
    bucketed,
    padded_share,
)


def component(
    name: str, size: int, share: float | None = None, buckets: int = 5, seed: int = 0, per_shard: int = 10
) -> Component:
    rng = np.random.default_rng(seed)
    bucket = rng.integers(1, buckets + 1, size) if share is None else np.zeros(size, dtype=np.int64)
    return Component(name, bucket, rng.integers(20, 400, size).astype(float), np.arange(size) // per_shard, share)


def retention(
    videos: int = 860, texts: int = 500, batch: int = 10, seed: int = 0, window: int | None = None
) -> Mixture:
    return Mixture([component("videos", videos), component("text", texts, 0.14)], batch, seed, window)


@pytest.mark.parametrize("window", [None, 7])
def test_an_epoch_delivers_every_lead_sample_once(window: int | None) -> None:
    mixture = retention(window=window)
    assert mixture.batches == 100
    for epoch in range(3):
        order = mixture.order(epoch)
        assert len(order) == 1000
        lead = order[order < 860]
        assert len(np.unique(lead)) == len(lead)
        assert len(lead) == mixture.counts(epoch)[0] in (859, 860, 861)
        text = order[order >= 860]
        assert len(np.unique(text)) == len(text)


def test_what_an_epoch_leaves_out_is_less_than_a_batch_and_changes() -> None:
    mixture = Mixture([component("videos", 47)], 10)
    left = [frozenset(range(47)) - frozenset(mixture.order(epoch).tolist()) for epoch in range(60)]
    assert {len(some) for some in left} == {7}
    assert frozenset().union(*left) == frozenset(range(47))


def test_the_share_is_exact_in_expectation() -> None:
    """14 % of 90 samples per epoch are 12.6: single epochs have 12 or 13, and their mean over seeds is 12.6."""
    counts = np.array([[retention(78, 50, 10, seed).counts(epoch)[1] for epoch in range(3)] for seed in range(1500)])
    assert set(np.unique(counts)) == {12, 13}
    assert np.abs(counts.mean(axis=0) - 12.6).max() < 4 * 0.49 / np.sqrt(1500)
    first = retention(78, 50, 10)
    totals = np.cumsum([first.counts(epoch)[1] for epoch in range(200)])
    assert np.abs(totals - 12.6 * np.arange(1, 201)).max() <= 1
    assert all(sum(first.counts(epoch)) == 90 for epoch in range(200))


def test_what_is_dropped_does_not_change_the_share() -> None:
    """The remainder is cut before bucketing: no bucket is more likely to be left out."""
    mixture = Mixture([component("videos", 49, buckets=2), component("text", 40, 0.3)], 10)
    seen = np.zeros(49)
    for epoch in range(300):
        order = mixture.order(epoch)
        np.add.at(seen, order[order < 49], 1)
    expected = 300 * 49 / 49
    by_bucket = [seen[mixture.components[0].bucket == bucket].mean() for bucket in (1, 2)]
    assert mixture.batches * 10 * 0.7 <= 49
    assert by_bucket[0] == pytest.approx(by_bucket[1], rel=0.02)
    assert max(by_bucket) <= expected


def test_a_small_source_is_gone_through_again_and_again_evenly() -> None:
    mixture = retention(texts=37)
    drawn = np.concatenate([order[order >= 860] for order in (mixture.order(epoch) for epoch in range(5))]) - 860
    counts = np.bincount(drawn, minlength=37)
    assert counts.max() - counts.min() <= 1
    assert len(drawn) == pytest.approx(700, abs=1)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): tuple(retention(seed=seed).order(epoch)) for seed in range(2) for epoch in range(2)}
    assert len(set(orders.values())) == 4
    again = retention(seed=1)
    again.order(7)
    assert tuple(again.order(1)) == orders[1, 1]


@pytest.mark.parametrize("window", [None, 9])
def test_batches_hold_alike_samples(window: int | None) -> None:
    mixture = Mixture([component("videos", 8600, per_shard=100), component("text", 3000, 0.14)], 10, 0, window)
    order = mixture.order(0)
    share = padded_share(order, 10, mixture.bucket, mixture.length)
    shuffled = np.random.default_rng(0).permutation(order)
    assert share < 0.08
    assert padded_share(shuffled, 10, mixture.bucket, mixture.length) > 0.35
    frames = mixture.bucket[order].reshape(-1, 10)
    assert (frames.min(axis=1) == frames.max(axis=1)).mean() > 0.9


def test_batches_are_shuffled() -> None:
    mixture = retention()
    firsts = [mixture.bucket[mixture.order(epoch)[0]] for epoch in range(200)]
    assert set(firsts) == {0, 1, 2, 3, 4, 5}
    means = [mixture.bucket[mixture.order(epoch)].reshape(-1, 10).mean(axis=1) for epoch in range(40)]
    neighbours = [np.corrcoef(some[:-1], some[1:])[0, 1] for some in means]
    assert abs(np.mean(neighbours)) < 4 * 0.1 / np.sqrt(40)


def test_windows_keep_to_few_shards_at_a_time() -> None:
    videos = component("videos", 2000, buckets=2, per_shard=50)
    mixture = Mixture([videos], 10, 0, window_shards=5)
    for epoch in range(2):
        order = mixture.order(epoch)
        assert sorted(order) == list(range(2000))
        for start in range(0, 2000, 250):
            assert len(np.unique(videos.shard[order[start : start + 250]])) <= 10
    assert mixture.order(0)[:250].tolist() != mixture.order(1)[:250].tolist()
    whole = Mixture([videos], 10, 0).order(0)
    assert len(np.unique(videos.shard[whole[:250]])) > 30


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_have_equally_many_batches_and_divide_them(ranks: int) -> None:
    mixture = retention(batch=6)
    batches = [list(MixedBatchSampler(mixture, rank, ranks)) for rank in range(ranks)]
    assert {len(part) for part in batches} == {mixture.batches}
    together = [[key.sample for part in step for key in part] for step in zip(*batches, strict=True)]
    assert list(itertools.chain(*together)) == mixture.order(0).tolist()


@pytest.mark.parametrize("done", [1, 99, 100, 237])
def test_one_number_resumes_the_order(done: int) -> None:
    whole: list[list[int]] = []
    for epoch in range(4):
        sampler = MixedBatchSampler(retention())
        sampler.set_epoch(epoch)
        whole += [[key.sample for key in batch] for batch in sampler]
    resumed = MixedBatchSampler(retention())
    after: list[list[int]] = []
    resumed.follow(lambda: done + len(after))
    while len(after) < 400 - done:
        after += [[key.sample for key in batch] for batch in resumed]
    assert after == whole[done:]


def test_leftovers_of_buckets_are_batched_with_their_neighbours() -> None:
    bucket = np.repeat(np.arange(7), 5)
    order = bucketed(np.arange(35), bucket, np.zeros(35), 4, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(35))
    batches = bucket[order[:32]].reshape(-1, 4)
    assert (batches.max(axis=1) - batches.min(axis=1)).max() <= 4
    assert (batches.max(axis=1) == batches.min(axis=1)).sum() == 7


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 20, 500])
def test_validation_is_one_fixed_order(ranks: int, limit: int | None) -> None:
    part = component("videos", 43)
    samplers = [BucketedSampler([part], 6, rank, ranks, limit) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(some) for some in batches}) == 1
    seen = [key.sample for some in batches for batch in some for key in batch]
    assert len(set(seen)) == min(43, limit or 43)
    assert len(seen) - len(set(seen)) < ranks
    samplers[0].set_epoch(3)
    assert next(iter(samplers[0]))[0].sample == batches[0][0][0].sample


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the shares of a make 0\.5; leave at least one source without a share"):
        Mixture([component("a", 5, 0.5)], 2)
    with pytest.raises(ValueError, match="the shares of a, b make 1; leave"):
        Mixture([component("a", 5, 0.5), component("b", 5, 0.5), component("c", 5)], 2)
    with pytest.raises(ValueError, match=r"the share of source 'a' is 1\.4"):
        Mixture([component("a", 5, 1.4), component("c", 5)], 2)
    with pytest.raises(ValueError, match="the source 'c' holds no samples"):
        Mixture([component("c", 0)], 2)
    with pytest.raises(ValueError, match=r"holds 5 samples .* fewer than one batch of 8; lower data\.batch_size"):
        Mixture([component("c", 5)], 8)
    with pytest.raises(ValueError, match=r"batch_size=10 .* must divide by the 3 processes"):
        MixedBatchSampler(retention(), 0, 3)


def staged(seed: int = 0) -> Mixture:
    parts = [component("easy", 60), component("hard", 100), component("text", 50, 0.2)]
    stages = [Stage({"easy": 1.0}, 7), Stage({"easy": 0.25, "hard": 0.75}, 20), Stage({"hard": 1.0})]
    return Mixture(parts, 10, seed, curriculum=stages)


def test_a_curriculum_goes_from_stage_to_stage_at_its_steps() -> None:
    mixture = staged()
    assert mixture.batches == 20
    order = np.concatenate([mixture.order(epoch) for epoch in range(3)]).reshape(60, 10)
    kinds = np.digitize(order, mixture.starts[1:-1])  # 0 easy, 1 hard, 2 text
    assert set(np.unique(kinds[:7])) == {0, 2}
    lead = kinds[8:26][kinds[8:26] < 2]
    assert lead.mean() == pytest.approx(0.75, abs=0.03)
    assert set(np.unique(kinds[28:])) == {1, 2}
    assert (kinds == 2).mean() == pytest.approx(0.2, abs=0.002)
    # every lead source continues where it stopped: no sample is repeated before all were used
    easy = order[:7][kinds[:7] == 0]
    assert len(np.unique(easy)) == len(easy)
    hard = order[kinds == 1]
    counts = np.bincount(hard - 60, minlength=100)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("budget", [None, Budget(40, 4000)])
def test_the_stages_of_a_curriculum_count_optimizer_steps(budget: Budget | None) -> None:
    """Regression: they counted batches. With gradients of four batches per step, stages ended after a quarter of their
    steps."""
    parts = [component("easy", 60), component("hard", 100), component("text", 50, 0.2)]

    def of(first: int, second: int, per_step: int) -> Mixture:
        stages = [Stage({"easy": 1.0}, first), Stage({"easy": 0.25, "hard": 0.75}, second), Stage({"hard": 1.0})]
        return Mixture(parts, 10, curriculum=stages, budget=budget, batches_per_step=per_step)

    steps, batches = of(2, 6, 4), of(8, 24, 1)
    assert steps.epochs_of_stages() == batches.epochs_of_stages()
    for epoch in range(4):
        for one, other in zip(steps.batches_of(epoch), batches.batches_of(epoch), strict=True):
            assert np.array_equal(one, other)
    assert any(not np.array_equal(a, b) for a, b in zip(steps.batches_of(0), of(2, 6, 1).batches_of(0), strict=False))


def test_a_curriculum_is_a_function_of_seed_and_epoch() -> None:
    assert np.array_equal(staged().order(1), staged().order(1))
    assert not np.array_equal(staged().order(1), staged(1).order(1))
    assert all(len(staged().order(epoch)) == 200 for epoch in range(6))


def test_a_curriculum_without_sense_is_refused() -> None:
    parts = [component("easy", 60), component("text", 50, 0.2)]
    for stages, message in (
        ([Stage({"other": 1.0})], "names other; sources without a share are easy"),
        ([Stage({"easy": 1.0}, 5)], "the last has none"),
        ([Stage({"easy": 1.0}), Stage({"easy": 1.0})], "but the last needs steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(parts, 10, curriculum=stages)
    with pytest.raises(ValueError, match="cannot be combined"):
        Mixture(parts, 10, window_shards=2, curriculum=[Stage({"easy": 1.0})])
    with pytest.raises(ValueError, match="of which one is above 0"):
        Stage({"easy": 0.0})
