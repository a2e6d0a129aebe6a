"""The benchmark of precomputing makes real shards and says how long the encoders waited."""

from __future__ import annotations

from keygrip.benchmarks.precompute import Precompute

SMALL = ["model=patch_dit", "encoders=tiny", "encoders.view.size=48", "encoders.view.width=16", "encoders.view.depth=1"]


def test_precompute_counts_images_and_waiting() -> None:
    case = Precompute(SMALL, 40, 10, 96, 64, 64, 16, 4, 0, "cpu")
    figures = case.run(quick=True)
    assert figures["items"] == 10
    assert figures["items_per_s"] > 0
    assert 0 < figures["data_wait_share"] < 1  # decoding in the same process: there is always some
    assert figures["data_wait_share"] + figures["encode_share"] <= 1.01
    assert figures["mb_per_item"] > 0.02
