"""The benchmark of shards: its figures are there and hold what bucketing promises."""

from __future__ import annotations

import pytest

from keygrip.benchmarks.shards import BudgetPadding, Shards


def test_figures() -> None:
    figures = Shards(epoch_samples=50_000, batch_size=32, videos=24, quick_videos=16, frames=2, image_size=32).run(True)
    assert figures["padding_share"] < 0.1 < figures["unbucketed_padding_share"]
    assert figures["text_only_share"] == pytest.approx(0.14, abs=1e-4)
    assert figures["frames_a_sample"] == 2
    assert figures["samples_per_s"] > 0
    assert figures["resume_s"] >= figures["order_s"] > 0


def test_padding_of_a_stages_budget() -> None:
    """Texts of known length pad less than those whose tokens vary; packed rows least."""
    case = BudgetPadding(["experiment=vlm_stage2", "model.init_from=null"], 0, 20000, 0.12)
    figures = case.run(quick=True)
    assert figures["known_padding_share"] < 0.13 < figures["padding_share"] < 0.3
    assert figures["packed_padding_share"] < figures["padding_share"]
    assert figures["left_out_share"] < 0.01
    assert 0.6 < figures["filled_share"] <= 1
