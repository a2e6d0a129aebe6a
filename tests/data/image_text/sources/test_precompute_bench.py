"""The benchmark of precomputing writes real shards and reports how long the encoders waited."""

from __future__ import annotations

from keygrip.benchmarks.precompute import Precompute

SMALL = ["model=patch_dit", "encoders=tiny", "encoders.view.size=48", "encoders.view.width=16", "encoders.view.depth=1"]


def test_precompute_counts_images_and_waiting() -> None:
    case = Precompute(SMALL, 40, 10, 96, 64, 64, 16, 4, 0, "cpu")
    figures = case.run(quick=True)
    assert figures["items"] == 10
    assert figures["items_per_s"] > 0
    assert 0 < figures["data_wait_share"] < 1  # decoding runs in the same process, so the share is never 0
    assert figures["data_wait_share"] + figures["encode_share"] <= 1.01
    assert figures["mb_per_item"] > 0.02
