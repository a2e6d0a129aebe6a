"""Damaged and hostile images with text, in shards and before encoding: skipped or refused with a one-line message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from macos import leave_notes
from mutations import Outcomes, flipped, hostile_images, hostile_json, hostile_npy
from PIL import Image
from shard_sets import picture

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import aspect_buckets
from keygrip.data.image_text.samples import (
    NEEDED,
    RECORD,
    TEXT_MASK,
    describe_image_text,
    image_text_parts,
    missing_parts,
    read_image_text,
)
from keygrip.data.image_text.sources.jobs import SourceImages, ViewSizes, jobs_of
from keygrip.data.image_text.sources.listing import list_items
from keygrip.data.shards.index import MANIFEST, index_path
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter, write_manifest

ROUNDS = [pytest.param(24, id="quick"), pytest.param(200, id="large", marks=pytest.mark.slow)]


def members(number: int) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    mask = np.array([True, True, False])
    record = {"caption": f"image {number}", "patch_grid": [2, 3]}
    latent, states, cls, patches = (rng.normal(size=shape) for shape in ((4, 2, 2), (3, 5), (6,), (6, 6)))
    return image_text_parts(latent, states, mask, cls, patches, record)[0]


def write(root: Path, changes: dict[str, bytes] | None = None) -> Path:
    """Write five samples without an index; `changes` replaces members of sample 2."""
    with ShardWriter(root / "a.tar") as writer:
        for number in range(5):
            writer.add(f"s{number}", members(number) | ((changes or {}) if number == 2 else {}), {"n": 0})
    index_path(root / "a.tar").unlink()
    return root


def everything(root: Path, index: bool = True) -> dict[str, Any]:
    """Return the arrays (hashed) and records of every sample that can be read."""
    if index:
        write_manifest(root, describe_image_text, max_broken_share=0.9, progress=False)
    shards, found = ShardSet(root), {}
    for number in range(len(shards)):
        if missing_parts({name: values[number] for name, values in shards.columns.items()}):
            continue
        try:
            sample = read_image_text(shards, number)
        except BadSample:
            continue
        arrays = (sample.latent, sample.text_states, sample.text_mask, sample.dino_cls, sample.dino_patches)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        found[sample.key] = (digest, [array.shape for array in arrays], sample.record)
    return found


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_shards(tmp_path: Path, rounds: int) -> None:
    """A tar file has no checksum of its content. A change before indexing that leaves finite values of the same shape
    gives a different sample, and only for the sample that was changed. After indexing, every changed byte is
    detected."""
    rng, outcomes = np.random.default_rng(0), Outcomes()
    whole = everything(write(tmp_path / "whole"))
    assert len(whole) == 5
    for number in range(rounds):
        for file in ("a.tar", "a.tar", MANIFEST, "a.tar.index.npz"):
            root = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", root)
            fresh = file == "a.tar" and number % 2 == 0
            path = root / file
            path.write_bytes(flipped(path.read_bytes(), rng))
            if fresh:
                index_path(root / "a.tar").unlink()
            found = outcomes.run(f"{file} {number}", lambda root=root, fresh=fresh: everything(root, fresh), whole)
            if found is not None and found != whole:
                changed = sum(whole.get(key) != value for key, value in found.items())
                assert changed <= (2 if fresh else 0)
            shutil.rmtree(root)
    outcomes.assert_clean()
    assert outcomes.counts["refused"] + outcomes.counts["skipped"] > rounds


@pytest.mark.slow
def test_hostile_members(tmp_path: Path) -> None:
    """A sample with a hostile member is left out; the others of its shard are read unchanged."""
    sentinel, outcomes = tmp_path / "ran", Outcomes()
    whole = everything(write(tmp_path / "whole"))
    others = {key: value for key, value in whole.items() if key != "s2"}
    arrays = [name for name in NEEDED if name != RECORD]
    cases = [{arrays[n % len(arrays)]: content} for n, content in enumerate(hostile_npy(sentinel) * len(arrays))]
    cases += [{RECORD: content} for field in (b'"caption"', b'"patch_grid"') for content in hostile_json(field)]
    for grid in ([3, 3], [-2, -3], [2.0, 3.0], [6], "23", [1e300, 1], None):
        cases.append({RECORD: json.dumps({"caption": "c", "patch_grid": grid}).encode()})
    record = members(2)[RECORD]
    for number, changes in enumerate(cases):
        root = write(tmp_path / str(number), changes)
        found = outcomes.run(f"{next(iter(changes))} {number}", lambda root=root: everything(root), whole)
        assert found is not None, outcomes.unexpected
        assert {key: value for key, value in found.items() if key != "s2"} == others
        if TEXT_MASK not in changes and "s2" in found:  # another caption gives another sample; a caption may be missing
            assert isinstance(found["s2"][2].get("caption", ""), str)
            assert changes.get(RECORD) != record
    outcomes.assert_clean(sentinel)


# ---- images that are to be encoded -----------------------------------------------------------------------------------


class Views:
    """Sizes of DINO views, without an encoder."""

    def view_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def dino_grid(self, width: int, height: int) -> tuple[int, int]:
        return height // 8, width // 8


def prepared(source: Path) -> dict[str, Any]:
    """Return the pixels (hashed) and captions of every image that can be used."""
    buckets = aspect_buckets(32, 16, 2.0)
    items = list_items(source, buckets, 1.0, progress=False)
    assert all("\n" not in item.reason for item in items)
    jobs = jobs_of(source, items, 100)
    images = SourceImages(jobs, source, ViewSizes.of(Views(), buckets))  # type: ignore[arg-type]
    found = {}
    for number, job in enumerate(jobs):
        for item in range(len(job.items)):
            (batch,) = images.__getitems__([(number, item)])
            assert all("\n" not in reason for reason in batch.failed)
            for key, caption, pixels in zip(
                batch.keys, batch.captions, batch.pixels if batch.keys else [], strict=True
            ):
                found[key] = (caption, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
    return found


def image_folder(root: Path) -> Path:
    root.mkdir()
    for number, ending in enumerate(("png", "jpg", "webp", "bmp", "tif")):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"i{number}.{ending}")
    (root / "i0.txt").write_text("caption 0")
    (root / "i1.caption").write_text("caption 1")
    for number in (2, 3, 4):
        (root / f"i{number}.json").write_text(json.dumps({"caption": f"caption {number}"}))
    return root


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_image_folders(tmp_path: Path, rounds: int) -> None:
    """JPEG, WebP, BMP and TIFF have no checksum of their pixels, and texts have none at all. A change that can still be
    decoded gives other pixels or another text, and only for the image that was changed."""
    rng, outcomes = np.random.default_rng(0), Outcomes()
    source = image_folder(tmp_path / "source")
    whole = prepared(source)
    assert len(whole) == 5
    files = sorted(source.iterdir())
    for number in range(rounds):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(flipped(content, rng))
        found = outcomes.run(f"{path.name} {number}", lambda: prepared(source), whole)
        path.write_bytes(content)
        assert found is not None, outcomes.unexpected
        assert {k: v for k, v in found.items() if k != path.stem} == {k: v for k, v in whole.items() if k != path.stem}
    outcomes.assert_clean()


def test_hostile_images_and_captions(tmp_path: Path) -> None:
    source, outcomes = image_folder(tmp_path / "source"), Outcomes()
    whole = prepared(source)
    for number, content in enumerate(hostile_images()):
        (source / f"h{number}.png").write_bytes(content)
        (source / f"h{number}.txt").write_text("hostile")
    for number, content in enumerate(hostile_json(b'"caption"')):
        (source / f"c{number}.png").write_bytes((source / "i0.png").read_bytes() + bytes([number]))
        (source / f"c{number}.json").write_bytes(content)
    found = outcomes.run("hostile", lambda: prepared(source), whole)
    assert {key: value for key, value in found.items() if key not in whole}.keys() == {"c6"}  # {"caption": "x"}
    assert found["c6"][0] == "x"
    assert {key: found[key] for key in whole} == whole
    outcomes.counts.clear()
    outcomes.assert_clean()


def test_what_is_no_image_to_encode_is_named(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "pipe.txt")
    (source / "link.jpg").symlink_to(source / "gone.jpg")
    for name in ("a.heic", "b.jxl", "c.JFIF"):
        (source / name).write_bytes(picture(1))
    (source / os.fsdecode(b"d\xff.png")).write_bytes(picture(1))
    (source / "i1.caption").unlink()
    os.mkfifo(source / "i1.txt")
    buckets = aspect_buckets(32, 16, 2.0)
    reasons = {item.path: item.reason for item in list_items(source, buckets, 1.0, progress=False) if not item.bucket}
    assert list(reasons) == ["a.heic", "b.jxl", "c.JFIF", "d\\udcff.png", "i1.jpg", "link.jpg", "pipe.png"]
    for name, reason in (
        ("a.heic", ".heic is not encoded"),
        ("b.jxl", ".jxl is not encoded"),
        ("c.JFIF", "it has no caption"),
        ("d\\udcff.png", "its name is not UTF-8"),
        ("i1.jpg", "a named pipe"),
        ("link.jpg", "No such file"),
        ("pipe.png", "a named pipe"),
    ):
        assert reason in reasons[name]


def test_captions_in_capitals_are_read_and_notes_of_macos_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = image_folder(tmp_path / "source")
    whole = prepared(source)
    for path in sorted(source.iterdir()):
        path.rename(path.with_suffix(path.suffix.upper()))
    (source / "i0.TXT").unlink()
    (source / "Captions.CSV").write_text("file_name,caption\ni0.PNG,caption 0\n")
    assert prepared(source) == whole
    notes = leave_notes(source)
    items = list_items(source, aspect_buckets(32, 16, 2.0), 1.0, progress=False)
    assert [(item.path, item.reason) for item in items] == [
        (name, "") for name in ("i0.PNG", "i1.JPG", "i2.WEBP", "i3.BMP", "i4.TIF")
    ]
    hidden = notes // 2 + 1  # the notes next to the files, and the folder __MACOSX
    assert f"{hidden} hidden files and folders in {source} are not read (._Captions.CSV, ...)" in caplog.text


def test_captions_that_are_null_are_no_captions(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    for beside in (source / "i0.txt", source / "i1.caption", source / "i2.json"):
        beside.unlink()
    rows = [{"file_name": "i0.png", "text": None}, {"file_name": "i1.jpg", "text": "one"}, {"file_name": "i2.webp"}]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = list_items(source, aspect_buckets(32, 16, 2.0), 1.0, progress=False)
    assert [(item.captions, item.reason) for item in items[:3]] == [
        ((), "it has no caption"),
        (("one",), ""),
        ((), "it has no caption"),
    ]
    (source / "metadata.jsonl").write_text('{"file_name": "i0.png", "text": "a"}\n' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not a list of captions.*line 2: it is nested too deeply"):
        list_items(source, aspect_buckets(32, 16, 2.0), 1.0, progress=False)
