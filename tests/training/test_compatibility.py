"""Pairs of model and data."""

from __future__ import annotations

import pytest

from keygrip.config import compose
from keygrip.training.compatibility import batch_type, data_sets_of, no_validation, refuse_unfit


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("volume_query", "webvid", r"VolumeQueryModule learns from PolicyBatch and VideoTexts gives Video.*data=yam"),
        ("volume_query", "robot_images", r"choose .*data=yam"),
        ("foveated_vlm", "yam", r"choose .*data=robot_videos"),
        ("foveated_vlm", "image_shards", r"choose .*data=robot_videos"),
        ("patch_dit", "yam", r"choose .*data=robot_images"),
        ("geometry_vla", "yam", r"choose .*data=yam_language"),
    ],
)
def test_systems_do_not_take_each_others_data(model: str, data: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_unfit(compose("train", [f"model={model}", f"data={data}"]))


def test_the_choices_named_are_those_that_pass() -> None:
    named = data_sets_of(batch_type(compose("train", ["model=foveated_vlm"]).model))  # type: ignore[arg-type]
    assert set(named) == {
        "robot_videos",
        "robot_tours",
        "robot_tours_single_first",
        "robot_long_tours",
        "robot_lengths",
        "webvid",
        "cauldron",
        "video_sft",
    }
    for name in named:
        refuse_unfit(compose("train", ["model=foveated_vlm", f"data={name}"]))


@pytest.mark.parametrize("never", ["limit_val_batches=0", "val_every_n_steps=1000"])
def test_settings_that_leave_no_validation_are_said(never: str) -> None:
    settings = ["max_steps=9", "val_every_n_steps=3"]
    assert not no_validation(compose("train", settings))
    assert no_validation(compose("train", [*settings, never])).startswith(never)
