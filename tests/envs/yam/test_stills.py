"""Images with captions: functions of the seed that match their ground truth, with colours of equal luminance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_sets import small_encoders
from PIL import Image

from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.sources.encoding import as_tensor
from keygrip.envs.yam.stills import CUBE_COLOURS, Still, StillCell, StillOptions, describe, palette
from keygrip.models.patch_dit.dino_view import grey
from keygrip.recording.image_text import evidence, make_images

SIZES = ((104, 96, 2), (160, 100, 1), (100, 160, 1))


@pytest.fixture(scope="module")
def cell() -> Iterator[StillCell]:
    cell = StillCell(StillOptions(SIZES))
    yield cell
    cell.close()


@pytest.fixture(scope="module")
def pictures(cell: StillCell) -> list[Still]:
    return [cell.still(seed) for seed in range(16)]


def cut(picture: Still, place: tuple[float, float], half: int) -> np.ndarray:
    """Return the pixels around a position: float [n, 3]."""
    x, y = (round(v) for v in place)
    return picture.pixels[max(0, y - half) : y + half, max(0, x - half) : x + half].reshape(-1, 3).astype(float)


def test_a_image_is_a_function_of_its_seed(cell: StillCell, pictures: list[Still]) -> None:
    again = cell.still(5)
    assert np.array_equal(again.pixels, pictures[5].pixels)
    assert (again.caption, again.cube, again.colour) == (pictures[5].caption, pictures[5].cube, pictures[5].colour)
    assert len({picture.pixels.tobytes() for picture in pictures}) == len(pictures)


def test_images_come_in_all_sizes_and_colours(pictures: list[Still]) -> None:
    assert {picture.pixels.shape[:2] for picture in pictures} == {(96, 104), (100, 160), (160, 100)}
    assert {picture.colour for picture in pictures} == set(CUBE_COLOURS)


def test_where_the_cube_is_said_to_be_its_colour_is_seen(pictures: list[Still]) -> None:
    for picture in pictures:
        hue = np.array(palette()[picture.colour])
        seen = cut(picture, picture.cube, 2).mean(axis=0) / 255
        others = {name: np.array(rgb) for name, rgb in palette().items()} | {"table": np.array([1.0, 0.93, 0.82])}
        likeness = {name: seen @ rgb / np.linalg.norm(seen) / np.linalg.norm(rgb) for name, rgb in others.items()}
        assert max(likeness, key=likeness.__getitem__) == picture.colour, (picture.seed, likeness)
        assert float(seen @ hue) > 0.1


def test_where_the_block_is_said_to_be_it_is_blue(pictures: list[Still]) -> None:
    for picture in pictures:
        red, green, blue = cut(picture, picture.block, 2).mean(axis=0)
        assert blue > 1.3 * red
        assert blue > 1.3 * green


def test_a_grey_view_shows_the_cube_and_hides_its_colour(cell: StillCell) -> None:
    """The same scene with cubes of all colours: the grey images are the same, the coloured ones differ."""
    from dataclasses import replace

    shown = []
    lens = cell.lens_of_size(104, 96)
    for key in CUBE_COLOURS.values():
        layout = cell.layout_of(3, 0)
        cell.layout = replace(layout, distractors=(replace(layout.distractors[0], colour=key),))
        cell._arrange(cell.layout)
        shown.append(cell._take(lens)[0])
    pixels = as_tensor(shown).float() / 255
    colour_spread = pixels.std(dim=0).amax()
    grey_spread = grey(pixels).std(dim=0).amax()
    assert float(colour_spread) > 0.2
    assert float(grey_spread) < 0.02
    table = grey(pixels)[:, 0, -10:, -10:].mean()
    assert float((grey(pixels)[0, 0] - table).abs().amax()) > 0.1  # the cube is visible in grey


def test_captions_say_what_is_seen(pictures: list[Still]) -> None:
    for picture in pictures:
        words = picture.caption.split()
        assert picture.colour in words
        assert "blue" in words
        width = picture.pixels.shape[1]
        apart = (picture.cube[0] - picture.block[0]) / width
        if "left" in words or "right" in words:
            first = words.index(picture.colour) < words.index("blue")
            cube_left = ("left" in words) == first
            assert cube_left == (apart < 0)
        else:
            assert abs(apart) < 0.05
    assert len({describe("red", 0.2, 0.8, seed) for seed in range(40)}) >= 4


def test_no_face_is_overexposed(pictures: list[Still]) -> None:
    assert max(int(picture.pixels.max()) for picture in pictures) < 250


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": ((16, 64, 1),)}, "edges of 32 to 1280"),
        ({"sizes": ()}, "sizes is empty"),
        ({"fovy_deg": 5.0}, "outside"),
        ({"textures": True, "randomise_table": False}, "no effect"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=said):
        StillOptions(**options)


def test_evidence_is_in_fractions_of_the_crop() -> None:
    picture = Still(np.zeros((100, 200, 3), np.uint8), "", "red", (100.0, 50.0), (60.0, 25.0), 7)
    found = evidence(picture, Bucket(64, 64))  # the middle 100 x 100
    assert found == {"cube": [0.5, 0.5], "block": [0.1, 0.25], "colour": "red", "seed": 7}


# ---- shards ----------------------------------------------------------------------------------------------------------


def options(tmp_path: Path) -> dict:  # type: ignore[type-arg]
    encoders = {
        "_target_": "keygrip.models.patch_dit.encoders.Encoders",
        "dino_view": "grey",
        "autoencoder": {"_target_": "keygrip.models.patch_dit.autoencoders.PixelPacking", "edge": 4},
        "text": {"_target_": "keygrip.models.patch_dit.text_encoders.RandomWordVectors", "length": 8, "width": 8},
        "view": {
            "_target_": "keygrip.models.patch_dit.dino_view.DinoView",
            **{"variant": "tiny", "size": 48, "weights": "random", "width": 16, "depth": 1, "heads": 2},
        },
    }
    return {
        **{"train": 9, "val": 3, "test": 0, "images_per_shard": 4, "processes": 1},
        **{"buckets": [[32, 32], [40, 24], [24, 40]], "image": {"sizes": SIZES}, "encoders": encoders},
    }


def test_images_become_shards_in_buckets_with_their_truth(tmp_path: Path, cell: StillCell) -> None:
    report = make_images(tmp_path, options(tmp_path))
    assert (report["train"], report["val"], report["test"]) == (9, 3, 0)
    data = ImageShards(batch_size=1, root=tmp_path, num_workers=0)
    data.setup()
    assert data.encoders == small_encoders().fingerprint
    seen = {}
    for batch in data.train_dataloader():
        seen |= {record["evidence"]["seed"]: (batch, record) for record in batch.records}
    assert set(seen) == set(range(9))
    for seed, (batch, record) in seen.items():
        picture = cell.still(seed)
        assert batch.captions == [picture.caption]
        assert batch.latents.shape[2:] == (record["bucket"][1] // 4, record["bucket"][0] // 4)
        left, top, right, bottom = record["crop"]
        x, y = record["evidence"]["cube"]
        assert (left + x * (right - left), top + y * (bottom - top)) == pytest.approx(picture.cube, abs=0.01)
        shown = Image.fromarray(
            (small_encoders().decode_latents(batch.latents)[0] * 255).byte().permute(1, 2, 0).numpy()
        )
        source = Image.fromarray(picture.pixels).resize(shown.size, box=(left, top, right, bottom))
        assert np.abs(np.asarray(shown, float) - np.asarray(source, float)).mean() < 6


@pytest.mark.slow
def test_making_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    make_images(tmp_path / "whole", options(tmp_path))
    make_images(tmp_path / "parts", options(tmp_path))
    gone = sorted((tmp_path / "parts").rglob("*.tar"))[1]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.tar") if p != gone}
    gone.unlink()
    make_images(tmp_path / "parts", options(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    left, right = (
        {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*.tar")}
        for name in ("whole", "parts")
    )
    assert left == right


def test_other_encoders_do_not_mix_into_a_set(tmp_path: Path) -> None:
    small = {**options(tmp_path), "train": 1, "val": 0}
    make_images(tmp_path, small)
    with pytest.raises(ValueError, match="other settings"):
        make_images(tmp_path, {**small, "encoders": {**small["encoders"], "dino_view": "colour"}})
    with pytest.raises(ValueError, match="'picture' of the images is now 'image'"):
        make_images(tmp_path, {**small, "picture": {"sizes": SIZES}})
