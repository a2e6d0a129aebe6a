"""The classifier finds the objects, reports its error, measures distances in pixels, and is trained once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import COLOURS, SQUARE, WIDE, drawn, small_encoders, write_images

from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.sources.encoding import as_tensor
from keygrip.evaluation.attribute_classifier import (
    AttributeClassifier,
    ClassifierOptions,
    TrainedClassifier,
    Truth,
    classifier_for,
    count_objects,
    distance_px,
    feature_distance,
    has_evidence,
    has_truth,
    measure_classifier,
    objects_as_named,
    real_images,
    train_classifier,
)

TRAINED = ClassifierOptions(width=16, steps=150, batch_size=16, lr=5e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {SQUARE: 120, WIDE: 40}
    return write_images(tmp_path_factory.mktemp("judged"), counts, small_encoders(), {"train": 0, "val": 5000})


def shards(root: Path) -> ImageShards:
    data = ImageShards(batch_size=16, root=root, num_workers=0)
    data.setup()
    return data


@pytest.mark.slow
def test_a_trained_classifier_finds_cubes_and_names_their_colours(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, encoders = shards(root), small_encoders()
    with caplog.at_level("INFO"):
        trained = classifier_for(data, encoders, TRAINED)
    assert trained is not None
    assert trained.network.colours == sorted(COLOURS)
    assert trained.error.images == 160
    assert trained.error.cube_px < 4
    assert trained.error.colour > 0.9
    assert trained.error.objects > 0.6
    assert "it misses cubes by" in caplog.text
    # its error is the one measured again on the validation images
    batches = list(data.held_out("val"))
    pictures = [(real_images(encoders, b), Truth.of(b.records, trained.network.colours)) for b in batches]
    again = measure_classifier(trained.network, pictures)
    assert again.cube_px == pytest.approx(trained.error.cube_px, rel=1e-4)
    assert again.near == pytest.approx(trained.error.near)
    files = list((root / ".keygrip").glob("attribute_classifier-*.pt"))
    before = files[0].stat().st_mtime_ns
    loaded = classifier_for(data, encoders, TRAINED)
    assert loaded is not None
    assert loaded.error == trained.error
    assert [file.stat().st_mtime_ns for file in files] == [before]  # trained once


@pytest.mark.slow
def test_other_data_or_options_are_another_classifier(root: Path, tmp_path: Path) -> None:
    short = ClassifierOptions(width=16, steps=1, batch_size=4)
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 5000})
    first, second = (classifier_for(shards(place), small_encoders(), short) for place in (root, tmp_path))
    third = classifier_for(shards(tmp_path), small_encoders(), ClassifierOptions(width=16, steps=2, batch_size=4))
    assert first is not None
    assert second is not None
    assert third is not None
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_the_error_is_that_on_the_validation_images_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be more validation images now than when a classifier of the same training images was last tested. The
    classifier is not trained again for that."""
    trainings = []

    def trained(*told: Any) -> TrainedClassifier:
        trainings.append("once")
        return train_classifier(*told)

    short = ClassifierOptions(width=16, steps=1, batch_size=4)
    counts, weights, fingerprints = [], [], set()
    for name, count in (("first", 4), ("more", 12)):
        write_images(tmp_path / name, {SQUARE: count}, small_encoders(), {"val": 5000})
    write_images(tmp_path / "set", {SQUARE: 4}, small_encoders(), {"train": 0, "val": 9000})
    monkeypatch.setattr("keygrip.evaluation.attribute_classifier.train_classifier", trained)
    for name in ("first", "more", "first"):
        shutil.rmtree(tmp_path / "set" / "val")
        shutil.copytree(tmp_path / name / "val", tmp_path / "set" / "val")
        found = classifier_for(shards(tmp_path / "set"), small_encoders(), short)
        assert found is not None
        counts.append(found.error.images)
        weights.append(found.network.maps.weight)
        fingerprints.add(found.fingerprint)
    assert counts == [4, 12, 4]
    assert (len(fingerprints), trainings) == (1, ["once"])  # its training images are the same
    assert all(torch.equal(weights[0], each) for each in weights)


def test_another_classifier_s_file_is_refused(root: Path) -> None:
    from keygrip.evaluation.attribute_classifier import load_classifier

    classifier_for(shards(root), small_encoders(), ClassifierOptions(width=16, steps=1, batch_size=4))
    file = next((root / ".keygrip").glob("attribute_classifier-*.pt"))
    with pytest.raises(ValueError, match="is trained again"):
        load_classifier(file, "another")


def test_without_ground_truth_there_is_no_classifier(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 100}, evidence=False)
    assert classifier_for(shards(tmp_path), small_encoders()) is None
    write_images(tmp_path / "two", {SQUARE: 8}, small_encoders(), {"train": 0, "test": 100}, evidence=False)
    assert classifier_for(shards(tmp_path / "two"), small_encoders()) is None  # no validation images are needed


def test_a_classifier_that_could_not_be_tested_is_not_trained(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0})
    with pytest.raises(ValueError, match="has no validation images"):
        classifier_for(shards(tmp_path), small_encoders())


def test_distances_are_in_pixels_of_an_image_with_a_shorter_side_of_64() -> None:
    places, truth = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.5]])
    assert float(distance_px(places, truth, (64, 64))) == pytest.approx(16)
    assert float(distance_px(places, truth, (48, 80))) == pytest.approx(0.25 * 80 * 64 / 48)
    assert float(distance_px(places, truth, (6, 10))) == pytest.approx(0.25 * 80 * 64 / 48)  # in any unit of length


def test_places_lie_in_the_image_and_follow_what_it_shows() -> None:
    classifier = AttributeClassifier(["red", "teal"], 8).eval()
    with torch.no_grad():
        classifier.maps.weight.mul_(40)  # sharp maps
    picture, _ = drawn(3, SQUARE, 1)
    shown = as_tensor([np.asarray(picture)]).float() / 255
    verdict = classifier(shown)
    assert verdict.places.shape == (1, 2, 2)
    assert bool(((verdict.places > 0) & (verdict.places < 1)).all())
    turned = classifier(shown.flip(-1))
    assert not torch.allclose(turned.places[..., 0], verdict.places[..., 0])
    assert classifier(torch.rand(2, 3, 24, 40)).features.shape == (2, 32, 12, 20)


def test_objects_are_counted_and_not_only_placed() -> None:
    """Images without a cube, with two cubes, with cubes of two colours, without a block, and as named."""
    logits = torch.full((6, 3, 32, 32), -5.0)  # red, teal, block

    def put(image: int, kind: int, y: int, x: int) -> None:
        logits[image, kind, y, x] = 4.0
        logits[image, kind, y, x + 1] = 3.0  # a neighbouring value belongs to the same peak

    for image in range(1, 5):
        put(image, 0, 8, 8)
    put(2, 0, 20, 20)
    put(3, 1, 20, 20)
    for image in (0, 1, 2, 3):
        put(image, 2, 9, 9)  # a block may lie next to a cube
    put(5, 1, 8, 8)
    put(5, 2, 20, 8)
    cubes, blocks = count_objects(logits)
    assert cubes.tolist() == [[0, 0], [1, 0], [2, 0], [1, 1], [1, 0], [0, 1]]
    assert blocks.tolist() == [1, 1, 1, 1, 0, 1]
    red, teal = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    assert objects_as_named(logits, red).tolist() == [False, True, False, False, False, False]
    assert objects_as_named(logits, teal).tolist() == [False] * 5 + [True]


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


def test_ground_truth_is_needed_in_the_split_to_classify_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some images without it are an error, and a split of such images alone has no classifier."""
    write_images(tmp_path, {SQUARE: 4, WIDE: 4}, small_encoders(), {"train": 0, "val": 100})
    write_images(tmp_path, {SQUARE: 4}, small_encoders(), {"test": 200}, evidence=False)
    data = shards(tmp_path)
    assert has_truth(data)
    assert has_truth(data, "val", (8, 2))
    assert "none of its" not in caplog.text
    assert not has_truth(data, "test", (4, 2))
    assert f"{tmp_path} has ground truth (evidence) of its training images and none of its test images" in caplog.text
    assert classifier_for(data, small_encoders(), TRAINED, "test", (4,)) is None
    write_images(tmp_path, {WIDE: 4}, small_encoders(), {"test": 200})
    with pytest.raises(ValueError, match=r"some test images of .* have ground truth \(evidence: .* or for none"):
        has_truth(shards(tmp_path), "test", (8,))
    write_images(tmp_path, {WIDE: 4}, small_encoders(), {"val": 100}, evidence=False)
    with pytest.raises(ValueError, match="some val images of"):
        has_truth(shards(tmp_path))


def test_training_images_of_which_only_some_have_ground_truth_are_refused_before_training(tmp_path: Path) -> None:
    write_images(tmp_path, {SQUARE: 4}, small_encoders(), {"train": 0, "val": 100})
    assert has_truth(shards(tmp_path))
    write_images(tmp_path, {WIDE: 2}, small_encoders(), {"train": 300}, evidence=False)
    data = shards(tmp_path)
    assert has_evidence([next(data.samples("train").records())])
    with pytest.raises(ValueError, match=r"some train images of .* have ground truth \(evidence: .* or for none"):
        has_truth(data)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_colour_that_no_training_image_shows_is_refused(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, {SQUARE: 4}, small_encoders(), {"train": 0, "val": 100, "test": 200})
    monkeypatch.setitem(COLOURS, "gold", (230, 180, 30))
    write_images(tmp_path, {WIDE: 6}, small_encoders(), {split: 300})
    data = shards(tmp_path)
    with pytest.raises(ValueError, match=rf"the {split} images of .* show the colours \['gold'\], which no training"):
        has_truth(data, split, (10,))
    with pytest.raises(ValueError, match=rf"the {split} images of .* show the colours \['gold'\], which no training"):
        classifier_for(data, small_encoders(), TRAINED, "test", (10,))
