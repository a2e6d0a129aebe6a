"""Batches by a budget of frames and positions: all fit, nothing is lost or doubled, padding stays small."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from keygrip.data.shards.budget import Budget, Sizes, budgeted, cost, costliest, exactly
from keygrip.data.shards.mixing import (
    CHARACTERS_A_TOKEN,
    BucketedSampler,
    BudgetedBatchSampler,
    Component,
    Mixture,
    Stage,
    padding_of,
)
from keygrip.data.video_text.batching import rows_of

BUDGET = Budget(frames=256, positions=4096)


def component(name: str, samples: int, share: float | None = None, most: int = 64) -> Component:
    rng = np.random.default_rng(len(name))
    frames = np.minimum(np.exp(rng.normal(2.3, 1.0, samples)), most).astype(np.int64) if share is None else None
    length = np.minimum(np.exp(rng.normal(5.5, 0.8, samples)), 2000.0)
    shard = np.arange(samples, dtype=np.int32) // 100
    return Component(name, np.zeros(samples, np.int64) if frames is None else frames, length, shard, share)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture([component("videos", 20000), component("text", 3500, 0.14)], 64, budget=BUDGET)


def test_every_batch_fits_and_every_sample_comes_once(mixture: Mixture) -> None:
    sizes = mixture.sizes
    for epoch in range(3):
        batches = mixture.batches_of(epoch)
        assert len(batches) == mixture.batches
        for batch in batches:
            frames, positions = cost(batch, sizes)
            assert len(batch) == 1 or (frames <= 256 and positions <= 4096)
            assert len(batch) <= 64
        seen = Counter(np.concatenate(batches).tolist())
        videos = [count for sample, count in seen.items() if sample < 20000]
        assert set(videos) == {1}
        assert len(videos) >= 0.98 * 20000  # what makes too many batches is left out of an epoch
        assert sum(seen.values()) - len(videos) == pytest.approx(0.14 * mixture.samples, rel=0.05)


def test_batches_hold_alike_samples(mixture: Mixture) -> None:
    sizes = mixture.sizes
    assert padding_of(mixture.batches_of(0), sizes.positions) <= 0.1
    loose = np.array_split(np.random.default_rng(0).permutation(len(sizes.frames)), mixture.batches)
    assert padding_of(loose, sizes.positions) > 0.4


def test_the_order_is_a_function_of_seed_and_epoch(mixture: Mixture) -> None:
    again = Mixture(mixture.components, 64, budget=BUDGET)
    for epoch in (0, 5):
        pairs = zip(mixture.batches_of(epoch), again.batches_of(epoch), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert not np.array_equal(mixture.batches_of(0)[0], mixture.batches_of(1)[0])


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_ranks_share_each_batch(mixture: Mixture, ranks: int) -> None:
    parts = [list(BudgetedBatchSampler(mixture, rank, ranks)) for rank in range(ranks)]
    for batch, *shares in zip(mixture.batches_of(0), *parts, strict=True):
        assert all(shares)
        together = [key.sample for share in shares for key in share]
        assert together == batch.tolist() or (len(batch) < ranks and set(together) == set(batch.tolist()))
    sampler = BudgetedBatchSampler(mixture, 0, ranks)
    sampler.follow(lambda: mixture.batches + 7)  # in the second epoch
    (first, *_), wanted = list(sampler), np.array_split(mixture.batches_of(1)[7], ranks)[0]
    assert [key.sample for key in first] == wanted.tolist()


def test_the_costliest_batch_is_the_largest_one(mixture: Mixture) -> None:
    batches, sizes = mixture.batches_of(0), mixture.sizes
    frames, positions = cost(costliest(batches, sizes, BUDGET), sizes)
    shares = [f / 256 + p / 4096 for f, p in (cost(batch, sizes) for batch in batches)]
    assert frames / 256 + positions / 4096 == max(shares)


def test_rows_of_a_video_count() -> None:
    """Eight questions about each video take eight times its positions."""
    part = replace(component("videos", 2000), rows=8)
    asked = Mixture([part], 64, budget=BUDGET)
    positions = part.bucket + part.length / CHARACTERS_A_TOKEN
    for batch in asked.batches_of(0):
        assert len(batch) == 1 or 8 * len(batch) * positions[batch].max() <= 4096
    batches = [[k.sample for k in b] for b in BucketedSampler(part.bucket, part.length, 64, budget=BUDGET, rows=8)]
    assert all(len(batch) == 1 or 8 * len(batch) * positions[batch].max() <= 4096 for batch in batches)
    assert [rows_of(questions) for questions in (None, 3, {"mark": 4, "cue": 3, "caption": 0})] == [1, 3, 7]


def test_a_sample_larger_than_the_budget_is_alone() -> None:
    sizes = Sizes(np.array([300, 1, 1]), np.array([310.0, 5.0, 5.0]))
    batches = budgeted(np.arange(3), sizes, BUDGET, 64, np.random.default_rng(0))
    assert sorted(batch.tolist() for batch in batches) in ([[0], [1, 2]], [[0], [2, 1]])


def test_batches_are_halved_or_left_out_to_be_as_many_as_wanted() -> None:
    batches = [np.arange(6), np.arange(6, 9), np.arange(9, 10)]
    assert [len(batch) for batch in exactly(batches, 4)] == [3, 3, 3, 1]
    assert [len(batch) for batch in exactly(batches, 2)] == [6, 3]
    with pytest.raises(ValueError, match="10 samples do not make 11 batches"):
        exactly(batches, 11)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.budget: frames=0"):
        Budget(0, 5)
    with pytest.raises(ValueError, match="a curriculum and budget cannot be combined"):
        Mixture([component("videos", 100)], 8, curriculum=[Stage({"videos": 1.0})], budget=BUDGET)


def test_validation_delivers_every_sample_once_within_the_budget() -> None:
    part = component("videos", 500)
    batches = [[key.sample for key in batch] for batch in BucketedSampler(part.bucket, part.length, 64, budget=BUDGET)]
    assert sorted(sample for batch in batches for sample in batch) == list(range(500))
    assert max(part.bucket[batch].sum() for batch in map(np.array, batches)) <= 256
