"""The judge: it finds what is there, says how well, keeps to pixels, and is trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import COLOURS, SQUARE, WIDE, drawn, small_encoders, write_images

from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.sources.encoding import as_tensor
from keygrip.evaluation.attribute_classifier import (
    Judge,
    JudgeOptions,
    Truth,
    distance_px,
    feature_distance,
    has_evidence,
    judge_for,
    measure_judge,
    real_pictures,
)

TRAINED = JudgeOptions(width=16, steps=150, batch_size=16, lr=5e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {SQUARE: 120, WIDE: 40}
    return write_images(tmp_path_factory.mktemp("judged"), counts, small_encoders(), {"train": 0, "val": 5000})


def shards(root: Path) -> ImageShards:
    data = ImageShards(batch_size=16, root=root, num_workers=0)
    data.setup()
    return data


def test_a_trained_judge_finds_cubes_and_names_their_colours(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, encoders = shards(root), small_encoders()
    with caplog.at_level("INFO"):
        trained = judge_for(data, encoders, TRAINED)
    assert trained is not None
    assert trained.judge.colours == sorted(COLOURS)
    assert trained.error.pictures == 160
    assert trained.error.cube_px < 4
    assert trained.error.colour > 0.9
    assert "it misses cubes by" in caplog.text
    # its error is what is measured on the validation pictures afresh
    batches = list(data.held_out("val"))
    pictures = [(real_pictures(encoders, b), Truth.of(b.records, trained.judge.colours)) for b in batches]
    again = measure_judge(trained.judge, pictures)
    assert again.cube_px == pytest.approx(trained.error.cube_px, rel=1e-4)
    assert again.near == pytest.approx(trained.error.near)
    files = list((root / ".keygrip").glob("judge-*.pt"))
    before = files[0].stat().st_mtime_ns
    loaded = judge_for(data, encoders, TRAINED)
    assert loaded is not None
    assert loaded.error == trained.error
    assert [file.stat().st_mtime_ns for file in files] == [before]  # trained once


def test_other_data_or_options_are_another_judge(root: Path, tmp_path: Path) -> None:
    short = JudgeOptions(width=16, steps=1, batch_size=4)
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 5000})
    first, second = (judge_for(shards(place), small_encoders(), short) for place in (root, tmp_path))
    third = judge_for(shards(tmp_path), small_encoders(), JudgeOptions(width=16, steps=2, batch_size=4))
    assert first is not None
    assert second is not None
    assert third is not None
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_another_judge_s_file_is_refused(root: Path) -> None:
    from keygrip.evaluation.attribute_classifier import load_judge

    judge_for(shards(root), small_encoders(), JudgeOptions(width=16, steps=1, batch_size=4))
    file = next((root / ".keygrip").glob("judge-*.pt"))
    with pytest.raises(ValueError, match="is trained again"):
        load_judge(file, "another")


def test_without_ground_truth_there_is_no_judge(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 100}, evidence=False)
    assert judge_for(shards(tmp_path), small_encoders()) is None


def test_a_judge_that_could_not_be_tested_is_not_trained(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0})
    with pytest.raises(ValueError, match="has no validation images"):
        judge_for(shards(tmp_path), small_encoders())


def test_distances_are_in_pixels_of_a_picture_with_a_shorter_side_of_64() -> None:
    places, truth = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.5]])
    assert float(distance_px(places, truth, (64, 64))) == pytest.approx(16)
    assert float(distance_px(places, truth, (48, 80))) == pytest.approx(0.25 * 80 * 64 / 48)
    assert float(distance_px(places, truth, (6, 10))) == pytest.approx(0.25 * 80 * 64 / 48)  # whatever the unit


def test_places_lie_in_the_picture_and_follow_what_it_shows() -> None:
    judge = Judge(["red", "teal"], 8).eval()
    with torch.no_grad():
        judge.maps.weight.mul_(40)  # sharp maps
    picture, _ = drawn(3, SQUARE, 1)
    shown = as_tensor([np.asarray(picture)]).float() / 255
    verdict = judge(shown)
    assert verdict.places.shape == (1, 2, 2)
    assert bool(((verdict.places > 0) & (verdict.places < 1)).all())
    turned = judge(shown.flip(-1))
    assert not torch.allclose(turned.places[..., 0], verdict.places[..., 0])
    assert judge(torch.rand(2, 3, 24, 40)).features.shape == (2, 32, 12, 20)


def test_feature_distance_is_nought_for_the_same_and_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 8, 4, 4, generator=generator)
    noise = torch.randn(3, 8, 4, 4, generator=generator)
    near, far = (feature_distance(features, features + s * noise) for s in (0.1, 1.0))
    assert torch.allclose(feature_distance(features, 2 * features), torch.zeros(3), atol=1e-6)
    assert bool((near < far).all())
    assert bool((far > 0.1).all())


@pytest.mark.parametrize("evidence", [None, {}, {"cube": [0, 0], "colour": "red"}])
def test_evidence_must_be_whole(evidence: Any) -> None:
    whole = {"evidence": {"cube": [0.1, 0.2], "block": [0.3, 0.4], "colour": "red"}}
    assert has_evidence([whole])
    assert not has_evidence([whole, {"evidence": evidence}])
