"""Pairs of model and data, and parts of the config that nothing uses."""

from __future__ import annotations

import pytest

from keygrip.config import compose
from keygrip.training.compatibility import data_sets_of, refuse_unfit


@pytest.mark.parametrize("data", ["robot_videos", "webvid", "cauldron", "video_sft"])
def test_a_policy_does_not_take_videos_with_text(data):
    cfg = compose("train", ["model=volume_query", f"data={data}"])
    with pytest.raises(
        ValueError, match=r"VolumeQueryModule learns from PolicyBatch and VideoTexts gives Video.*choose data=.*yam"
    ):
        refuse_unfit(cfg)


def test_a_video_language_model_does_not_take_demonstrations():
    cfg = compose("train", ["model=foveated_vlm", "data=yam"])
    with pytest.raises(ValueError, match=r"choose .*data=robot_videos"):
        refuse_unfit(cfg)


@pytest.mark.parametrize(
    ("model", "data", "fitting"),
    [
        ("patch_dit", "yam", "robot_images"),
        ("geometry_vla", "yam", "yam_language"),
        ("volume_query", "robot_images", "yam"),
        ("foveated_vlm", "image_shards", "robot_videos"),
    ],
)
def test_systems_do_not_take_each_others_data(model, data, fitting):
    with pytest.raises(ValueError, match=rf"choose .*data={fitting}"):
        refuse_unfit(compose("train", [f"model={model}", f"data={data}"]))


def test_the_choices_named_are_those_that_pass():
    wanted = compose("train", ["model=foveated_vlm"]).model
    from keygrip.training.compatibility import batch_type

    named = data_sets_of(batch_type(wanted))
    assert {"robot_videos", "webvid", "cauldron", "video_sft"} <= set(named)
    for name in named:
        refuse_unfit(compose("train", ["model=foveated_vlm", f"data={name}"]))


def test_a_part_that_nothing_uses_is_refused():
    overrides = ["model=volume_query", "data=yam", "language=smollm2_135m"]
    with pytest.raises(ValueError, match="language=smollm2_135m has no effect: VolumeQueryModule has no language"):
        refuse_unfit(compose("train", overrides), overrides)


@pytest.mark.parametrize("override", ["rotation=kmeans", "backbone=dinov2_small"])
def test_a_part_that_the_model_uses_passes(override):
    refuse_unfit(compose("train", ["model=volume_query", "data=yam", override]), [override])


def test_parts_left_at_their_default_are_not_asked_about():
    refuse_unfit(compose("train", ["model=volume_query", "data=yam"]), ["max_steps=3", "model=volume_query"])
