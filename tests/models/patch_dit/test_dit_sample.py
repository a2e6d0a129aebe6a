"""The sample command: words, images, both; files, seeds and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_parts import SMALL, write_images
from PIL import Image

from keygrip import sample, train
from keygrip.config import compose


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    root = write_images(folder / "images")
    train.run(compose("train", [*SMALL, f"data.root={root}", f"run_dir={folder / 'run'}", "max_steps=4"]))
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def drawn(trained: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*overrides: str, name: str = "out") -> dict[str, Any]:
        return sample.run(
            compose("sample", [f"checkpoint={trained / 'run'}", f"run_dir={tmp_path / name}", *overrides])
        )

    return run


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_words_picture_and_both(drawn: Callable[..., dict[str, Any]], trained: Path) -> None:
    image = f"image={trained / 'one.png'}"
    results = {
        "text": drawn("prompt=a red thing", name="text"),
        "dino": drawn(image, name="dino"),
        "both": drawn("prompt=a red thing", image, name="both"),
    }
    shown = {}
    for name, result in results.items():
        json.dumps(result)
        (path,) = result["images"]
        shown[name] = pixels(path)
        assert shown[name].shape == (16, 16, 3)
        assert Path(result["grid"]).is_file()
    assert not np.array_equal(shown["text"], shown["both"])
    assert not np.array_equal(shown["dino"], shown["both"])


def test_the_same_seed_draws_the_same_picture_alone_and_among_others(drawn: Callable[..., dict[str, Any]]) -> None:
    many = drawn("prompt=[a red thing,a green thing]", "samples=3", "seed=5", "batch_size=4", name="many")
    assert many["seeds"] == [5, 6, 7, 5, 6, 7]
    alone = drawn("prompt=a green thing", "seed=6", name="alone")
    assert np.abs(pixels(many["images"][4]) - pixels(alone["images"][0])).max() <= 1  # rounding to bytes
    assert np.abs(pixels(many["images"][4]) - pixels(many["images"][5])).max() > 1


def test_options_reach_the_sampler(drawn: Callable[..., dict[str, Any]], trained: Path) -> None:
    both = ["prompt=a red thing", f"image={trained / 'two.png'}"]
    result = drawn(
        *both, "text_scale=4", "dino_scale=1.5", "steps=3", "solver=heun", "interval=[0.1,0.9]", "size=24x16"
    )
    sampling = result["sampling"]
    assert (sampling["text_scale"], sampling["dino_scale"], sampling["steps"]) == (4.0, 1.5, 3)
    assert (sampling["solver"], sampling["interval"]) == ("heun", (0.1, 0.9))
    assert pixels(result["images"][0]).shape == (16, 24, 3)
    plain = drawn(*both, "steps=3", "size=24x16", name="plain")
    assert not np.array_equal(pixels(result["images"][0]), pixels(plain["images"][0]))


def test_a_size_that_was_not_trained_on_is_said(
    drawn: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    assert pixels(drawn("prompt=thing", "size=20")["images"][0]).shape == (20, 20, 3)
    assert "has not seen 20x20 in training; it has seen 16x16, 24x16" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to draw"),
        (["prompt=thing", "size=17"], "multiples of 4"),
        (["prompt=thing", "size=large"], "give a number"),
        (["prompt=thing", "dino_scale=2"], "no effect without image"),
        (["prompt=thing", "full_scale=2"], "prompt and image together"),
        (["prompt=[a,b]", "image=[a,b,c]"], "2 prompts and 3 images"),
        (["prompt=thing", "interval=[0.9,0.1]"], "lower one first"),
    ],
)
def test_errors(overrides: list[str], message: str, drawn: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(*overrides)


def test_missing_files(drawn: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        drawn("image=nowhere.png")
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        drawn(f"image={tmp_path / 'words.png'}")
