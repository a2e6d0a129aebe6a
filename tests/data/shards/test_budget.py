"""Batches within a budget of frames and positions: all fit, no sample is lost or repeated, and padding stays small."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keygrip.data.shards.budget import (
    Budget,
    Sizes,
    cost,
    costliest,
    group_by_rank,
    pack_batches,
    queries,
    split_over_ranks,
    with_count,
)
from keygrip.data.shards.curriculum import Stage
from keygrip.data.shards.mixing import BucketedSampler, Component, MixedBatchSampler, Mixture, padding_of
from keygrip.data.video_text.batching import rows_of

BUDGET = Budget(frames=256, positions=4096)


def component(name: str, samples: int, share: float | None = None, most: int = 64) -> Component:
    rng = np.random.default_rng(len(name))
    frames = np.minimum(np.exp(rng.normal(2.3, 1.0, samples)), most).astype(np.int64) if share is None else None
    length = np.minimum(np.exp(rng.normal(5.5, 0.8, samples)), 2000.0) / 4
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
        assert len(videos) >= 0.98 * 20000  # samples of surplus batches are left out of an epoch
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
    parts = [list(MixedBatchSampler(mixture, rank, ranks)) for rank in range(ranks)]
    for batch, *shares in zip(mixture.batches_of(0), *parts, strict=True):
        assert all(shares)
        together = [key.sample for share in shares for key in share]
        assert sorted(together) == sorted(batch.tolist()) or (
            len(batch) < ranks and set(together) == set(batch.tolist())
        )
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
    sampler = MixedBatchSampler(mixture, 0, ranks)
    sampler.follow(lambda: mixture.batches + 7)  # in the second epoch
    (first, *_), wanted = list(sampler), mixture.parts(mixture.batches_of(1)[7], ranks)[0]
    assert [key.sample for key in first] == wanted.tolist()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_rank_has_more_than_its_share_of_the_rows_and_one_sample(ranks: int) -> None:
    """Regression: when the samples were split by length, in which batches are sorted, one rank had all the longest
    ones."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(ranks, 40))
        rows, frames = rng.choice([1, 1, 2, 8], count), rng.integers(8, 12, count)
        sizes = Sizes(frames, rng.uniform(10, 99, count), rows)
        parts = split_over_ranks(rng.permutation(count), sizes, ranks)
        assert sorted(np.concatenate(parts).tolist()) == list(range(count))
        for part in parts:
            assert rows[part].sum() - rows[part].max() <= rows.sum() / ranks
            assert len(part) <= -(-count // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_held_out_samples_come_once_and_each_rank_keeps_to_its_share(ranks: int) -> None:
    part = replace(component("videos", 300), rows=np.random.default_rng(0).integers(1, 5, 300))
    samplers = [BucketedSampler([part], 64, rank, ranks, budget=BUDGET) for rank in range(ranks)]
    batches = [[[key.sample for key in batch] for batch in sampler] for sampler in samplers]
    assert len({len(own) for own in batches}) == 1
    assert sorted(n for own in batches for batch in own for n in batch) == list(range(300))
    for batch in (np.array(batch) for own in batches for batch in own):
        frames, positions = cost(batch, samplers[0].sizes)
        assert len(batch) == 1 or (frames * ranks <= BUDGET.frames and positions * ranks <= BUDGET.positions)


def test_fewer_samples_than_ranks_are_repeated() -> None:
    sets = [[np.array([3]), np.array([5, 6])], [np.array([3])]]
    assert [sorted(int(n) for step in group_by_rank(each, 4) for part in step for n in part) for each in sets] == [
        [3, 3, 5, 6],
        [3, 3, 3, 3],
    ]


def test_the_costliest_batches_are_the_largest_by_each_measure(mixture: Mixture) -> None:
    batches, sizes = mixture.batches_of(0), mixture.sizes
    costs = [cost(batch, sizes) for batch in batches]
    found = [cost(batch, sizes) for batch in costliest(batches, sizes, BUDGET, 3)]
    by_both = sorted(costs, key=lambda each: each[0] / 256 + each[1] / 4096)[:-4:-1]
    assert found[:3] == by_both
    assert {max(f for f, _ in costs)} <= {f for f, _ in found}
    assert {max(p for _, p in costs)} <= {p for _, p in found}
    assert len(found) <= 12


def test_the_batch_with_the_most_rows_times_frames_is_one_of_the_costliest() -> None:
    """Batch [0] has the most frames and batch [1, 2] the most positions, and both cost more in total. Batch [3, 4] has
    the most rows times frames."""
    sizes = Sizes(
        np.array([200, 10, 0, 60, 60]), np.array([300.0, 20.0, 4000.0, 80.0, 80.0]), np.array([1, 9, 1, 9, 2])
    )
    batches = [np.array(each) for each in ([0], [2], [1, 2], [3, 4])]
    assert [queries(sizes.frames[b], sizes.rows[b]) for b in batches] == [200, 0, 90, 9 * 120]
    by_cost = [cost(batch, sizes) for batch in batches]
    assert by_cost == [(200, 300), (0, 4000), (10, 40000), (120, 880)]
    found = [batch.tolist() for batch in costliest(batches, sizes, BUDGET, 1)]
    assert found == [[1, 2], [0], [3, 4]]


def test_the_positions_of_all_rows_count() -> None:
    """One video with eight questions takes as many positions as eight videos with one question."""
    alone = component("videos", 2000)
    rows = np.random.default_rng(0).integers(1, 9, 2000)
    part, longest = replace(alone, rows=rows), alone.bucket + alone.length
    batches = [[key.sample for key in batch] for batch in BucketedSampler([part], 64, budget=BUDGET)]
    for batch in [*Mixture([part], 64, budget=BUDGET).batches_of(0), *batches]:
        assert len(batch) == 1 or rows[batch].sum() * longest[batch].max() <= 4096


def test_rows_that_samples_give_at_most() -> None:
    count, kinds = np.array([1, 9, 30]), ["caption", "mark cue", "mark cue text"]
    found = [rows_of(how, count, kinds).tolist() for how in (None, 3, {"mark": 4, "cue": 3, "caption": 0})]
    assert found == [[1, 9, 30], [1, 3, 3], [1, 7, 30]]  # all rows of a kind not named: their number is unknown


def test_a_sample_larger_than_the_budget_is_alone() -> None:
    sizes = Sizes(np.array([300, 1, 1]), np.array([310.0, 5.0, 5.0]), np.array([1, 1, 1]))
    batches = pack_batches(np.arange(3), sizes, BUDGET, 64, np.random.default_rng(0))
    assert sorted(batch.tolist() for batch in batches) in ([[0], [1, 2]], [[0], [2, 1]])


def test_batches_are_halved_or_left_out_to_be_as_many_as_wanted() -> None:
    batches = [np.arange(6), np.arange(6, 9), np.arange(9, 10)]
    assert [len(batch) for batch in with_count(batches, 4)] == [3, 3, 3, 1]
    assert [len(batch) for batch in with_count(batches, 2)] == [6, 3]
    with pytest.raises(ValueError, match="10 samples do not make 11 batches"):
        with_count(batches, 11)


def test_halves_of_many_batches_are_found_without_looking_at_all_of_them_each_time() -> None:
    """A set of ten million videos has some 180 000 batches, of which one in a hundred is halved."""
    looked_at = 0

    class Counted(list[int]):
        def __len__(self) -> int:
            nonlocal looked_at
            looked_at += 1
            return super().__len__()

    batches: list[Any] = [Counted([n] * (4 + n % 3)) for n in range(1000)]
    found = with_count(batches, 1100)
    assert looked_at < 5 * 1000
    halved = [n for n in range(1000) if n % 3 == 2][:100]  # the first ones of the largest
    assert [list(batch) for batch in found] == [
        part for n in range(1000) for part in ([[n] * 3] * 2 if n in halved else [[n] * (4 + n % 3)])
    ]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.budget: frames=0"):
        Budget(0, 5)


def test_a_curriculum_within_a_budget() -> None:
    """Stages change at their steps and have their weights and shares, batches fit the budget, and all epochs are
    equally long."""
    easy, hard = component("short", 3000, most=3), component("long", 3000)
    stages = [Stage({"short": 1.0}, 15), Stage({"short": 0.5, "long": 0.5}, 400), Stage({"long": 1.0})]
    mixture = Mixture([easy, hard, component("text", 500, 0.14)], 64, curriculum=stages, budget=BUDGET)
    plain = Mixture(mixture.components, 64, budget=BUDGET)
    assert mixture.batches == plain.batches > 15
    epochs = [mixture.batches_of(epoch) for epoch in range(4)]
    assert {len(batches) for batches in epochs} == {mixture.batches}
    steps = [batch for batches in epochs for batch in batches]
    for batch in steps:
        frames, positions = cost(batch, mixture.sizes)
        assert len(batch) == 1 or (frames <= 256 and positions <= 4096)
    parts = [np.concatenate(part) for part in (steps[:15], steps[15:415], steps[415:])]
    of = [np.searchsorted(mixture.starts, part, side="right") for part in parts]
    shares = [[float((number == n).mean()) for n in (1, 2, 3)] for number in of]
    assert shares[0] == pytest.approx([0.86, 0.0, 0.14], abs=0.06)  # 15 batches, of which one or two are left out
    assert shares[1] == pytest.approx([0.43, 0.43, 0.14], abs=0.02)
    assert shares[2] == pytest.approx([0.0, 0.86, 0.14], abs=0.02)
    assert len(parts[0]) / 15 > 1.5 * len(parts[2]) / (len(steps) - 415)  # more short samples fit in a batch
    long = parts[2][(parts[2] >= 3000) & (parts[2] < 6000)]
    often = Counter(long.tolist())
    assert len(often) == 3000
    longest = hard.bucket == 64  # few of these fill a batch; they must not be left out more often
    mean = [np.mean([often[3000 + n] for n in np.flatnonzero(of)]) for of in (longest, ~longest)]
    assert mean[0] == pytest.approx(mean[1], rel=0.08)
    again = Mixture(mixture.components, 64, curriculum=stages, budget=BUDGET)
    assert all(np.array_equal(a, b) for a, b in zip(again.batches_of(2), epochs[2], strict=True))


def test_validation_delivers_every_sample_once_within_the_budget() -> None:
    part = component("videos", 500)
    batches = [[key.sample for key in batch] for batch in BucketedSampler([part], 64, budget=BUDGET)]
    assert sorted(sample for batch in batches for sample in batch) == list(range(500))
    assert max(part.bucket[batch].sum() for batch in map(np.array, batches)) <= 256
