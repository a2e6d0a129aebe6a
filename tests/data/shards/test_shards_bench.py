"""The benchmark of shards reports its figures, and they show what bucketing must achieve."""

from __future__ import annotations

import numpy as np
import pytest

from keygrip.benchmarks.shards import BudgetPadding, Shards, same_neighbours


def test_figures() -> None:
    figures = Shards(epoch_samples=50_000, batch_size=32, videos=24, quick_videos=16, frames=2, image_size=32).run(True)
    assert figures["padding_share"] < 0.1 < figures["unbucketed_padding_share"]
    assert figures["text_only_share"] == pytest.approx(0.14, abs=1e-4)
    assert figures["frames_a_sample"] == 2
    assert figures["samples_per_s"] > 0
    assert figures["resume_s"] >= figures["order_s"] > 0


@pytest.mark.slow
def test_padding_of_a_stages_budget() -> None:
    """On 60 000 samples, texts with counted tokens have less than a tenth of padding; planned by characters, twice as
    much. Packed rows have the least. From epoch to epoch, batches differ as much as those of estimated lengths."""
    case = BudgetPadding({"stage1": ["experiment=vlm_stage1"]}, [], 0, 60000, 0.12)
    figures = {name.removeprefix("stage1_"): figure for name, figure in case.run(quick=True).items()}
    assert figures["padding_share"] < 0.1 < 0.15 < figures["estimated_padding_share"] < 0.3
    assert figures["padding_share"] == pytest.approx(figures["known_padding_share"], abs=0.01)
    assert figures["packed_padding_share"] < figures["padding_share"]
    assert figures["estimated_packed_padding_share"] < figures["estimated_padding_share"]
    assert figures["left_out_share"] == 0 < figures["estimated_left_out_share"] < 0.01
    assert 0.6 < figures["filled_share"] <= 1
    assert figures["same_neighbours_share"] == pytest.approx(figures["estimated_same_neighbours_share"], abs=0.03)
    assert figures["same_neighbours_share"] < 0.3


@pytest.mark.parametrize(
    ("stage", "images", "samples"), [(2, ["stage"], 1500), pytest.param(3, [], 30000, marks=pytest.mark.slow)]
)
def test_rows_are_packed_in_stages_where_more_than_a_tenth_would_be_padding(
    stage: int, images: list[str], samples: int
) -> None:
    """Questions differ in length more than whole rows, and so do the rows of an image; both passes count."""
    recipes = {"stage": [f"experiment=vlm_stage{stage}", "model.init_from=null"]}
    figures = BudgetPadding(recipes, images, 0, samples, 0.12).run(quick=True)
    assert 0 < figures["stage_packed_padding_share"] == figures["stage_recipe_padding_share"] < 0.1
    assert figures["stage_padding_share"] > 0.1
    assert figures["stage_padding_share"] > 0.03 + figures["stage_rows_padding_share"]


def test_neighbours_that_two_epochs_share() -> None:
    first = [np.array([0, 1, 2]), np.array([3, 4])]
    assert same_neighbours(first, first) == 1
    assert same_neighbours(first, [np.array([0, 3]), np.array([1, 4]), np.array([2])]) == 0
    assert same_neighbours(first, [np.array([0, 1, 3]), np.array([2, 4])]) == pytest.approx(1 / 4)
