"""Unusual image files: each is decoded correctly, or left out with its name and a reason; none ends a run."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import small_encoders
from odd_images import EDGE, PLAIN, refused, right
from PIL import Image, ImageCms, ImageOps

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.decoding import decode_image, size_of, upright
from keygrip.data.image_text.samples import read_image_text
from keygrip.data.image_text.sources.images import encode_folder
from keygrip.data.shards.reader import ShardSet
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import shown_image


@pytest.mark.parametrize("name", list(right()))
def test_odd_images_are_decoded_as_they_look(tmp_path: Path, name: str) -> None:
    content, expected, tolerance = right()[name]
    (tmp_path / name).write_bytes(content)
    found = decode_image(tmp_path / name)
    assert found.mode == "RGB"
    assert size_of(tmp_path / name) == found.size  # read from the header; it determines the bucket
    difference = np.abs(np.asarray(found).astype(int) - expected.astype(int))
    assert difference.max() <= tolerance + (12 if tolerance > 1 else 0)  # lossy formats have artefacts at edges
    assert difference.mean() <= tolerance / 2 + 0.01


@pytest.mark.parametrize("name", [name for name, (_, expected, _) in right().items() if expected.shape == PLAIN.shape])
def test_images_of_conversations_are_those_of_shards(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(right()[name][0])
    with Image.open(tmp_path / name) as opened:
        np.testing.assert_array_equal(shown_image(opened, EDGE, "pad"), np.asarray(decode_image(tmp_path / name)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["tif", "jpg", "png", "webp"])
def test_the_header_tells_the_size_after_the_turn(tmp_path: Path, ending: str, orientation: int) -> None:
    """Pillow itself rotates TIFF images only."""
    noted = Image.Exif()
    noted[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.zeros((11, 20, 3), np.uint8)).save(path, exif=noted)
    wanted = (11, 20) if orientation in range(5, 9) else (20, 11)
    assert size_of(path) == decode_image(path).size == wanted


@pytest.mark.parametrize("dpi", [None, (72, 72)])
def test_damaged_exif_data_are_ignored(tmp_path: Path, dpi: tuple[int, int] | None) -> None:
    """With a resolution in the header, Pillow reads EXIF data only when asked for them."""
    path = tmp_path / "image.jpg"
    options = {} if dpi is None else {"dpi": dpi}
    Image.new("RGB", (12, 8), (200, 30, 30)).save(path, exif=b"Exif\0\0" + b"\xff" * 40, **options)
    assert size_of(path) == decode_image(path).size == (12, 8)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_rotated_image_with_other_damaged_exif_data_is_rotated_once(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    """Pillow cannot write the resolution, which is stored as text, again; the result is not rotated a second time."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    for name, content in (("damaged", exif), ("whole", Image.Exif())):
        if isinstance(content, Image.Exif):
            content[0x0112] = orientation
        options = {"lossless": True} if ending == "webp" else {}
        Image.fromarray(PLAIN[:20]).save(tmp_path / f"{name}.{ending}", exif=content, **options)
    found, plain = (decode_image(tmp_path / f"{name}.{ending}") for name in ("damaged", "whole"))
    with Image.open(tmp_path / f"whole.{ending}") as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    assert size_of(tmp_path / f"damaged.{ending}") == found.size
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(upright(plain)), np.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(upright(found)), np.asarray(wanted))


def test_a_profile_of_another_colour_space_changes_nothing(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    Image.fromarray(PLAIN).save(tmp_path / "a.png", icc_profile=lab.tobytes())
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "a.png")), PLAIN)


def test_a_profile_of_the_pixels_is_followed(tmp_path: Path) -> None:
    """The file has the sRGB profile with exchanged red and green primaries, under its original name."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {
        bytes(srgb[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(int.from_bytes(srgb[128:132], "big"))
    }
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    srgb[red + 4 : red + 12], srgb[green + 4 : green + 12] = srgb[green + 4 : green + 12], srgb[red + 4 : red + 12]
    Image.fromarray(PLAIN).save(tmp_path / "a.png", icc_profile=bytes(srgb))
    difference = np.asarray(decode_image(tmp_path / "a.png")).astype(int) - PLAIN[..., [1, 0, 2]]
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("alpha", [False, True])
def test_a_linear_profile_that_is_called_srgb_is_followed(tmp_path: Path, alpha: bool) -> None:
    """The curves of a profile count, not its name: the file has the sRGB profile with linear curves under its original
    name."""
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(132, 132 + 12 * int.from_bytes(linear[128:132], "big"), 12):
        start = int.from_bytes(linear[entry + 4 : entry + 8], "big")
        if bytes(linear[entry : entry + 4]).endswith(b"TRC"):  # a parametric curve: a single exponent of 1
            linear[start + 8 : start + 10], linear[start + 12 : start + 16] = bytes(2), struct.pack(">i", 65536)
    grey = Image.new("RGBA" if alpha else "RGB", (80, 80), (55, 55, 55))
    grey.save(tmp_path / "a.png", icc_profile=bytes(linear))
    light = 55 / 255
    wanted = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(decode_image(tmp_path / "a.png")) - wanted).max() <= 2  # 128


@pytest.mark.parametrize("place", ["list", "decoding"])
def test_every_odd_file_of_a_folder_is_encoded_or_named(tmp_path: Path, place: str) -> None:
    """The whole folder in one run: no file ends the run, and every file is in the samples or in the list of
    failures."""
    if place == "decoding":
        for name, (content, reason) in refused().items():
            (tmp_path / name).write_bytes(content)
            if "enlarged" not in reason and "is not encoded" not in reason:
                with pytest.raises(BadSample, match=reason or "."):
                    decode_image(tmp_path / name)
        return
    source, files = tmp_path / "source", {name: content for name, (content, *_) in right().items()}
    files |= {name: content for name, (content, _) in refused().items()}
    source.mkdir()
    rows = []
    for name, content in files.items():
        (source / name).write_bytes(content)
        rows.append(json.dumps({"file_name": name, "text": f"the file {name}"}))
    (source / "film.mp4").write_bytes(b"no image and no claim to be one")
    (source / "metadata.jsonl").write_text("\n".join(rows))
    options: dict[str, Any] = {"size": EDGE, "bucket_step": 16, "max_aspect": 1.0, "workers": 0, "device": "cpu"}
    report = encode_folder(source, tmp_path / "root", small_encoders(), max_failed_share=0.5, progress=False, **options)
    left = {row["source"]: row["reason"] for row in map(json.loads, (tmp_path / "root" / "failed.jsonl").open())}
    assert report["samples"] + report["failed"] + report["duplicates"] == len(files) > 120
    assert report["failed"] == len(refused())
    for name, (_, reason) in refused().items():
        assert reason in left[name]
    assert all("the same file as" in reason for name, reason in left.items() if name not in refused())


# ---- captions, additions and duplicates ------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"size": 32, "bucket_step": 16, "max_aspect": 1.0, "images_per_shard": 2, "batch_size": 2}
OPTIONS |= {"workers": 0, "device": "cpu", "progress": False, "max_failed_share": 0.9}


def noise(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def listed(source: Path, *rows: tuple[str, Any]) -> None:
    source.mkdir(exist_ok=True)
    for number, name in enumerate(dict.fromkeys(name for name, _ in rows)):
        if not (source / name).exists():
            noise(source / name, number)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (source / "metadata.jsonl").write_text("\n".join(lines))


def test_all_captions_are_kept_and_taken_in_turn(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    rows: list[tuple[str, Any]] = [("a.png", "one"), ("b.png", ["two", None, "three", "two"]), ("a.png", "four words")]
    listed(source, *rows, ("c.png", None), ("d.png", "  "), ("e.png", ""))
    report = encode_folder(source, root, small_encoders(), **OPTIONS)
    assert report["samples"] == 2
    left = {row["source"]: row["reason"] for row in map(json.loads, (root / "failed.jsonl").open())}
    assert left == {"c.png": "it has no caption", "d.png": "its caption is empty", "e.png": "its caption is empty"}
    shards, encoders = ShardSet(root / "bucket_32x32"), small_encoders()
    for number, captions in enumerate((["one", "four words"], ["two", "three"])):
        for turn in range(3):
            sample = read_image_text(shards, number, turn)
            states, mask = encoders.encode_text([captions[turn % 2]])
            assert sample.record["caption"] == captions[turn % 2]
            np.testing.assert_array_equal(sample.text_mask, mask[0].numpy())
            np.testing.assert_allclose(sample.text_states, states[0].numpy(), atol=2e-3)
    assert validate(root)["errors"] == 0
    data = ImageShards(batch_size=1, root=root, num_workers=0, val_fraction=1e-9)
    data.setup()
    seen = set()
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        seen |= {batch.captions[0] for batch in loader}
    assert seen == {"one", "four words", "two", "three"}


def test_images_added_later_get_shards_of_their_own(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    listed(source, ("b.png", "one"), ("c.png", "two"), ("d.png", "three"), ("e.png", ""))
    encode_folder(source, root, small_encoders(), **OPTIONS)
    before = {path.name: path.read_bytes() for path in root.rglob("*.tar")}
    again = encode_folder(source, root, small_encoders(), **OPTIONS)
    assert (again["items"], again["samples"]) == (0, 3)
    noise(source / "a.png", 100)
    (source / "z.png").write_bytes((source / "b.png").read_bytes())
    listed(source, ("a.png", "new"), ("b.png", "one"), ("c.png", "two"), ("d.png", "three"), ("e.png", "told now"))
    report = encode_folder(source, root, small_encoders(), **OPTIONS)
    assert (report["items"], report["samples"], report["shards"]) == (2, 5, 3)
    after = {path.name: path.read_bytes() for path in root.rglob("*.tar")}
    assert {name: after[name] for name in before} == before
    shards = ShardSet(root / "bucket_32x32")
    assert sorted(shards.key(number) for number in range(5)) == ["a", "b", "c", "d", "e"]
    assert validate(root)["errors"] == 0


def test_images_are_kept_where_asked(tmp_path: Path) -> None:
    """Their pixels are stored but read for evaluation only. Validation finds a broken one, and so does whoever reads
    it."""
    source, root = tmp_path / "source", tmp_path / "root"
    listed(source, ("a.png", "one"), ("b.png", "two"))
    encode_folder(source, root, small_encoders(), keep_images=True, **OPTIONS)
    assert validate(root)["errors"] == 0
    shards = ShardSet(root / "bucket_32x32")
    assert read_image_text(shards, 0).image is None
    kept = read_image_text(shards, 0, with_image=True).image
    assert kept is not None
    np.testing.assert_array_equal(kept, np.asarray(Image.open(source / "a.png").convert("RGB")))
    with pytest.raises(ValueError, match="made with other settings"):
        encode_folder(source, root, small_encoders(), **OPTIONS)
    tar = next(root.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"IHDR", b"IHDX"))
    assert read_image_text(shards, 0).image is None
    with pytest.raises(BadSample):
        read_image_text(shards, 0, with_image=True)


def test_files_of_one_content_are_one_sample_with_all_captions(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    for name in ("x", "y"):
        noise(source / f"{name}.png", 5)
    noise(source / "z.png", 6)
    listed(source, ("y.png", "second"), ("x.png", "first"), ("z.png", "third"))
    report = encode_folder(source, root, small_encoders(), **{**OPTIONS, "max_failed_share": 0.0})
    assert (report["samples"], report["failed"], report["duplicates"]) == (2, 0, 1)
    assert read_image_text(ShardSet(root / "bucket_32x32"), 0).record["captions"] == ["first", "second"]
    assert "the same file as x.png" in (root / "failed.jsonl").read_text()
    # A copy in another format becomes a sample of its own; `validate` finds it by its latent.
    other = tmp_path / "other"
    other.mkdir()
    noise(other / "x.png", 5)
    noise(other / "x2.bmp", 5)
    listed(other, ("x.png", "first"), ("x2.bmp", "copy"))
    encode_folder(other, tmp_path / "copies", small_encoders(), **OPTIONS)
    problems = validate(tmp_path / "copies")["problems"]
    assert len(problems) == 1
    assert re.match(r"the same content occurs twice: x2?\.(png|bmp) \(.*\) and x2?\.(png|bmp) \(", problems[0])
    assert "x.png (" in problems[0]
    assert "x2.bmp (" in problems[0]


def test_no_caption_is_lost_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions are used or reported: names written in other ways, names of files that do not exist, captions next to an
    image that the list omits, and captions that the text encoder truncates."""
    source, root = tmp_path / "source", tmp_path / "root"
    (source / "b").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b/c.png", "d.png", "e.png")):
        noise(source / name, number)
    (source / "d.json").write_text(json.dumps({"captions": None, "caption": "one", "text": "two"}))
    (source / "e.txt").write_text("a caption of more than the eight words that fit")
    rows = [("./a.png", "first"), ("b\\c.png", "second"), ("gone.png", "third")]
    (source / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    (source / "captions.csv").write_text("file,caption\na.png,other\n")
    with caplog.at_level("WARNING"):
        report = encode_folder(source, root, small_encoders(), **OPTIONS)
    assert (report["samples"], report["failed"], report["captions_cut"]) == (4, 0, 1)
    shards = ShardSet(root / "bucket_32x32")
    records = [read_image_text(shards, number).record for number in range(4)]
    assert [record.get("captions", [record["caption"]]) for record in records] == [
        ["first", "other"],
        ["second"],
        ["one", "two"],
        ["a caption of more than the eight words that fit"],
    ]
    assert "names 1 files that are not in" in caplog.text
    assert "1 captions are longer than the text encoder takes" in caplog.text


def grey_profile(gamma: float) -> bytes:
    """Build a grey ICC profile by hand (version 2.1: description, copyright, white point and one gamma)."""

    def numbers(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    white = numbers(0.9642, 1.0, 0.8249)  # D50
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)),
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = b"lcms\x02\x10\0\0mntrGRAYXYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    head = struct.pack(">I", 128 + len(table) + len(body)) + head + bytes(28) + white
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("kind", ["8 bit", "16 bit png", "16 bit tiff", "alpha", "one transparent value"])
def test_a_profile_of_grey_is_followed_in_every_kind_of_grey(tmp_path: Path, kind: str) -> None:
    """The grey values are proportional to light: a mid-grey is 188 in sRGB."""
    grey = np.arange(0, 256, dtype=np.uint8)[None].repeat(4, 0)
    light = grey / 255
    screen = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    path, options = tmp_path / ("a.tif" if "tiff" in kind else "a.png"), {"icc_profile": grey_profile(1.0)}
    image = Image.fromarray(grey.astype(np.uint16) * 257 if "16" in kind else grey)
    if kind == "alpha":
        image.putalpha(Image.fromarray(np.full_like(grey, 255)))
    if kind == "one transparent value":
        options["transparency"] = 7  # type: ignore[assignment]
        screen[grey == 7] = 255  # composited over white
    image.save(path, **options)
    found = np.asarray(decode_image(path)).astype(int)
    off = np.abs(found - screen[..., None])
    assert off[grey >= 16].max() <= 2
    assert off.max() <= 12  # LittleCMS converts 8-bit values with tables that are coarse near black
