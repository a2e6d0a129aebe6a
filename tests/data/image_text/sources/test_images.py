"""Encoding a folder of images into shards: buckets, captions, crops, failures, several processes, interruptions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import small_encoders
from PIL import Image
from torch import Tensor

from keygrip.artifacts import WRITING, atomic_write
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.image_text.decoding import decode_image, size_of
from keygrip.data.image_text.near_copies import near_copies
from keygrip.data.image_text.samples import read_image_text
from keygrip.data.image_text.sources import images as step
from keygrip.data.image_text.sources.encoding import prepare_image
from keygrip.data.image_text.sources.images import Rank, encode_folder
from keygrip.data.image_text.sources.jobs import Claims, jobs_of
from keygrip.data.image_text.sources.listing import key_of, list_items
from keygrip.data.manifests import make_manifests
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter
from keygrip.data.validation import validate
from keygrip.models.patch_dit.encoders import Encoders

OPTIONS: dict[str, Any] = {"size": 32, "bucket_step": 16, "max_aspect": 3.0, "images_per_shard": 4, "batch_size": 3}
OPTIONS |= {"workers": 0, "device": "cpu", "progress": False}


def picture(path: Path, size: tuple[int, int] = (64, 64), shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shade)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write ten square and three wide images with captions, and three files that cannot be used."""
    folder = tmp_path / "source"
    for number in range(10):
        picture(folder / f"square.{number}.png", shade=number)
        (folder / f"square.{number}.txt").write_text(f"picture\n number {number} ")
    for number in range(3):
        picture(folder / "wide" / f"{number}.png", (100, 45), 100 + number)
        (folder / "wide" / f"{number}.json").write_text(json.dumps({"caption": f"wide {number}"}))
    picture(folder / "untold.png")
    picture(folder / "small.png", (20, 20))
    (folder / "small.txt").write_text("too small")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("broken")
    return folder


def prepared(source: Path, root: Path, encoders: Encoders | None = None, **options: Any) -> dict[str, Any]:
    return encode_folder(source, root, encoders or small_encoders(), **{**OPTIONS, "max_failed_share": 0.5, **options})


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.tar"))}


# ---- one image -----------------------------------------------------------------------------------------------------


def centre_of_mark(pixels: np.ndarray) -> tuple[float, float]:
    weight = pixels.astype(float).mean(axis=2)
    y, x = np.indices(weight.shape)
    height, width = weight.shape
    return (weight * (x + 0.5)).sum() / weight.sum() / width, (weight * (y + 0.5)).sum() / weight.sum() / height


@pytest.mark.parametrize("shape", ["square", "aspect"])
@pytest.mark.parametrize("size", [(300, 160), (160, 300)])
def test_what_goes_to_dino_and_to_the_autoencoder_shows_one_crop(size: tuple[int, int], shape: str) -> None:
    """This test fails if the view shows the whole image, or its central square, while the latent shows the bucket's
    crop."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = size[0] // 2 + 15, size[1] // 2 - 20
    pixels[y - 5 : y + 5, x - 5 : x + 5] = 255
    bucket, encoders = Bucket(64, 48), small_encoders(shape=shape)
    ready = prepare_image(Image.fromarray(pixels), "", bucket, encoders, "k")
    assert ready.pixels.shape == (48, 64, 3)
    assert ready.view.shape[1::-1] == encoders.view_size(64, 48)
    np.testing.assert_allclose(centre_of_mark(ready.pixels), centre_of_mark(ready.view), atol=0.006)
    left, top, right, bottom = ready.record["crop"]
    expected = ((x - left) / (right - left), (y - top) / (bottom - top))
    np.testing.assert_allclose(centre_of_mark(ready.view), expected, atol=0.006)


def test_images_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    wide = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    exif = wide.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert size_of(tmp_path / "turned.jpg") == (40, 80)
    assert decode_image(tmp_path / "turned.jpg").size == (40, 80)


# ---- the list --------------------------------------------------------------------------------------------------------


def test_captions_of_a_list_beside_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b" / "c.png", shade=1)
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b/c.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [item.captions for item in list_items(tmp_path, [Bucket(32, 32)], 1.0, False)] == [("one",), ("two",)]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "captions.csv").write_text('file,caption\na.png,"one, and more"\n')
    items = list_items(tmp_path, [Bucket(32, 32)], 1.0, False)
    assert [(item.captions, item.reason) for item in items] == [(("one, and more",), ""), ((), "it has no caption")]
    (tmp_path / "captions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a list of captions"):
        list_items(tmp_path, [Bucket(32, 32)], 1.0, False)


def test_captions_of_all_lists_columns_and_files_beside_an_image_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", shade=1)
    row = {"caption": "x", "captions": ["x", "y"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **row}) + '\n{"file_name": "b.png"}\n')
    (tmp_path / "captions.csv").write_text("file,text,caption\na.png,z,y\nb.png,,one\n")
    (tmp_path / "a.txt").write_text("a line\nand its end\n")
    (tmp_path / "a.caption").write_text("w")
    (tmp_path / "a.json").write_text(json.dumps({"text": "v", "captions": ["x"]}))
    with caplog.at_level("WARNING"):
        items = list_items(tmp_path, [Bucket(32, 32)], 1.0, False)
    assert [item.captions for item in items] == [("x", "y", "z", "a line and its end", "w", "v"), ("one",)]
    assert "1 caption files have several lines, which are read as one caption (a.txt" in caplog.text


def test_lists_of_captions_in_folders_below_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions in the layout of the hub's image folders are read: a list in the folder of each split, with names
    relative to that folder."""
    for number, name in enumerate(("0", "train/0", "train/more/1", "test/0", "test/2")):
        picture(tmp_path / f"{name}.png", shade=number)
    lists = {
        "": [("0.png", "own"), ("train/0.png", "above"), ("test/0.png", "both")],
        "train/": [("0.png", "zero"), ("./more/1.png", "one"), ("../0.png", "outside"), ("3.png", "gone")],
        "test/": [("0.png", "both")],
    }
    for folder, rows in lists.items():
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    with caplog.at_level("WARNING"):
        items = {item.path: item for item in list_items(tmp_path, [Bucket(32, 32)], 1.0, False)}
    assert {path: item.captions for path, item in items.items()} == {
        "0.png": ("own",),
        "test/0.png": ("both",),
        "test/2.png": (),
        "train/0.png": ("above", "zero"),
        "train/more/1.png": ("one",),
    }
    assert items["test/2.png"].reason == "it has no caption"
    assert f"names 2 files that are not in {tmp_path / 'train'} (../0.png)" in caplog.text
    assert "1 images have other captions in the list of one folder than in that of another (train/0.png)" in caplog.text
    (tmp_path / "test" / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"test/metadata\.csv is not a list of captions: .* rename it"):
        list_items(tmp_path, [Bucket(32, 32)], 1.0, False)


def test_captions_of_a_copy_that_came_too_late_are_said_to_be_missing(tmp_path: Path) -> None:
    """The finished sample keeps the captions that it was encoded with."""
    source, root = tmp_path / "source", tmp_path / "root"
    picture(source / "b.png")
    (source / "b.txt").write_text("one")
    prepared(source, root)
    for name, caption in (("a", "two"), ("c", "one")):
        shutil.copy(source / "b.png", source / f"{name}.png")
        (source / f"{name}.txt").write_text(caption)
    for _ in range(2):
        assert prepared(source, root)["duplicates"] == 2
        left = {row["source"]: row["reason"] for row in map(json.loads, (root / "failed.jsonl").open())}
        assert left["a.png"].startswith("the same file as b.png, which was encoded without its captions")
        assert left["c.png"] == "the same file as b.png, which has its captions"
    assert read_image_text(ShardSet(root / "bucket_32x32"), 0).record["caption"] == "one"


def test_keys_have_no_dots_and_never_meet() -> None:
    taken: set[str] = set()
    names = ["a.b/c.d.png", "x.png", "x.jpg", "x-jpg.png", "long" * 40 + ".png", "ü.png"]
    found = [key_of(name, taken) for name in names]
    assert found[:3] == ["a-b/c-d", "x", "x-jpg"]
    assert len(set(found)) == len(names)
    assert all("." not in key and len(key.encode()) <= 80 for key in found)


def test_without_images_it_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of images at"):
        prepared(tmp_path / "none", tmp_path / "root")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        prepared(tmp_path / "empty", tmp_path / "root")


# ---- the step --------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_shards_that_can_be_trained_on(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    report = prepared(source, root)
    assert report["samples"] == report["items"] == 13
    assert report["buckets"] == {"bucket_32x32": 10, "bucket_48x16": 3}
    assert report["shards"] == 4  # of 4, 4 and 2 square samples, and of 3 wide ones
    assert report["failed"] == 3
    assert 0 <= report["data_wait_share"] <= 1
    assert 0 < report["encode_share"] <= 1
    assert report["items_per_s"] > 0
    failed = {row["source"]: row["reason"] for row in map(json.loads, (root / "failed.jsonl").read_text().splitlines())}
    assert set(failed) == {"untold.png", "small.png", "broken.jpg"}
    assert failed["untold.png"] == "it has no caption"
    assert "enlarged 1.6 times" in failed["small.png"]
    found = read_image_text(ShardSet(root / "bucket_32x32"), 3)
    assert found.key == "square-3"
    assert found.record["caption"] == "picture number 3"
    assert found.record["source"] == "square.3.png"
    assert validate(root)["errors"] == 0
    data = ImageShards(batch_size=3, root=root, num_workers=0, val_fraction=0.1)
    data.setup()
    assert data.statistics.encoders == small_encoders().fingerprint


class Counting(Encoders):
    """Counts encoded images and raises KeyboardInterrupt after `limit` of them, as if the process were killed."""

    def __init__(self, limit: int | None = None) -> None:
        plain = small_encoders()
        super().__init__(plain.autoencoder, plain.text, plain.view, plain.dino_view)
        self.count, self.limit = 0, limit

    def encode_images(self, pictures: Tensor) -> Tensor:
        if self.limit is not None and self.count >= self.limit:
            raise KeyboardInterrupt
        self.count += len(pictures)
        return super().encode_images(pictures)


def test_an_interrupted_run_goes_on_without_doing_anything_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepared(source, whole)
    first = Counting(limit=6)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, parts, first)
    assert not (parts / "images.json").exists()
    assert list(contents(parts)) == ["bucket_32x32/shard-000000.tar"]  # 4 images; those of the open shard are lost
    assert not list(parts.rglob(f"*{WRITING}*"))
    with monkeypatch.context() as patch:  # a process that was killed on another node
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        with atomic_write(parts / "bucket_32x32" / "shard-000001.tar") as file:
            abandoned = Path(file.name)
    (parts / "bucket_32x32" / "shard-000001.tar").rename(abandoned)
    os.utime(abandoned, (0, 0))
    second = Counting()
    report = prepared(source, parts, second)
    assert second.count == report["items"] == 9
    assert contents(parts) == contents(whole)
    assert not list(parts.rglob(f"*{WRITING}*"))
    third = Counting()
    assert prepared(source, parts, third)["samples"] == 13
    assert third.count == 0


def test_a_shard_whose_writing_failed_is_never_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one sample of the first shard, and no longer full for the samples after it."""
    add = ShardWriter.add

    def full_once(self: Any, key: str, parts: Any, row: Any) -> None:
        if key == "square-1":
            raise OSError(28, "No space left on device")
        add(self, key, parts, row)

    monkeypatch.setattr(ShardWriter, "add", full_once)
    with pytest.raises(OSError, match="No space left"):
        prepared(source, tmp_path / "root")
    assert "bucket_32x32/shard-000000.tar" not in contents(tmp_path / "root")
    monkeypatch.undo()
    assert prepared(source, tmp_path / "root")["samples"] == 13


def test_loader_processes_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "one")
    prepared(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_settings_in_a_folder_are_refused(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path)
    with pytest.raises(ValueError, match="made with other settings"):
        prepared(source, tmp_path, small_encoders("colour"))


def test_a_folder_in_which_nothing_was_listed_is_still_new(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        prepared(tmp_path / "empty", tmp_path / "root")
    assert prepared(source, tmp_path / "root", size=48)["samples"] == 13


def test_empty_captions_beside_others_are_counted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "wide" / "1.json").write_text(json.dumps({"captions": ["one", "two", None, ""]}))
    (source / "wide" / "2.json").write_text(json.dumps({"captions": [None, ""]}))
    report = prepared(source, tmp_path / "root")
    assert "1 images have empty captions beside others, which are left out (wide/1.png, ...)" in caplog.text
    assert report["samples"] == 12
    failed = (tmp_path / "root" / "failed.jsonl").read_text()
    assert "wide/2.png" in failed
    assert "its caption is empty" in failed


def test_a_image_that_was_replaced_is_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(source, tmp_path / "root")
    before = contents(tmp_path / "root")
    prepared(source, tmp_path / "root")
    assert "written again" not in caplog.text
    picture(source / "square.5.png", shade=77)
    prepared(source, tmp_path / "root")
    assert "1 images were written again since they were listed (square.5.png, ...): their samples stay" in caplog.text
    assert contents(tmp_path / "root") == before


def test_a_image_that_breaks_while_it_is_read_is_listed(source: Path, tmp_path: Path) -> None:
    path = source / "square.5.png"
    path.write_bytes(path.read_bytes()[:200])  # only the header is complete
    report = prepared(source, tmp_path / "root")
    assert (report["samples"], report["failed"]) == (12, 4)
    assert "square.5.png" in (tmp_path / "root" / "failed.jsonl").read_text()


def test_a_bucket_of_broken_images_alone_is_examined_and_read(source: Path, tmp_path: Path) -> None:
    picture(source / "tall.png", (45, 100))
    (source / "tall.txt").write_text("a tall picture")
    (source / "tall.png").write_bytes((source / "tall.png").read_bytes()[:200])  # only the header is complete
    root = tmp_path / "root"
    for _ in range(2):  # the second command finds nothing to do
        report = prepared(source, root)
        assert (report["samples"], report["failed"]) == (13, 4)
    (empty,) = [name for name, count in report["buckets"].items() if not count]
    assert ShardSet(root / empty).shards == []
    examined = validate(root)
    assert (examined["errors"], examined["samples"]) == (0, 13)
    assert make_manifests(root)["samples"] == 13
    data = ImageShards(batch_size=2, root=root, num_workers=0)
    data.setup()
    assert sum(len(data.samples(split)) for split in ("train", "val")) == 13
    assert empty not in {part.bucket.name for parts in data.parts.values() for part in parts}


def test_too_many_broken_images_leave_a_set_that_nobody_trains_on(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 of 16 images are left out .* more than max_failed_share=0\.1 allows"):
        prepared(source, tmp_path / "root", max_failed_share=0.1)
    assert not (tmp_path / "root" / "images.json").exists()
    with pytest.raises(ValueError, match=r"root is not complete .* run the same step=images command again"):
        ImageShards(batch_size=2, root=tmp_path / "root", num_workers=0).setup()
    assert any("root is not complete" in problem for problem in validate(tmp_path / "root")["problems"])
    with pytest.raises(ValueError, match="root is not complete"):
        make_manifests(tmp_path / "root", again=True)
    assert not (tmp_path / "root" / "images.json").exists()


def test_an_interrupted_set_is_neither_validated_nor_indexed(source: Path, tmp_path: Path) -> None:
    """A manifest and an images.json made from the finished shards would make it complete for training."""
    root = tmp_path / "root"
    with pytest.raises(KeyboardInterrupt):
        prepared(source, root, Counting(limit=6))
    assert len(contents(root)) == 1
    report = validate(root)
    assert (report["errors"], report["shards"], report["samples"]) == (1, 0, 0)
    assert "root is not complete" in report["problems"][0]
    assert Path(report["problems_file"]).read_text().startswith(report["problems"][0])
    with pytest.raises(ValueError, match=r"root is not complete .* run the same step=images command again"):
        make_manifests(root)
    assert not list(root.rglob("manifest.json"))
    assert not (root / "images.json").exists()
    assert prepared(source, root)["samples"] == 13
    assert make_manifests(root)["samples"] == 13
    assert json.loads((root / "images.json").read_text())["encoders"]["fingerprint"]
    assert validate(root)["errors"] == 0


def test_a_split_that_is_not_complete_is_refused(source: Path, tmp_path: Path) -> None:
    """Splits are made one by one below a folder that needs no list of its own."""
    prepared(source, tmp_path / "root" / "train")
    data = ImageShards(batch_size=2, root=tmp_path / "root", num_workers=0)
    data.setup()
    assert len(data.samples("train")) == 13
    with pytest.raises(ValueError, match="more than max_failed_share=0 allows"):
        prepared(source, tmp_path / "root" / "val", max_failed_share=0)
    with pytest.raises(ValueError, match="val is not complete"):
        ImageShards(batch_size=2, root=tmp_path / "root", num_workers=0).setup()
    assert any("val is not complete" in problem for problem in validate(tmp_path / "root")["problems"])


def test_images_json_of_the_root_does_not_make_its_splits_complete(source: Path, tmp_path: Path) -> None:
    """It is copied from one of the splits."""
    root = tmp_path / "root"
    prepared(source, root / "train")
    with pytest.raises(KeyboardInterrupt):
        prepared(source, root / "val", Counting(limit=6))
    shutil.copy(root / "train" / "images.json", root)
    with pytest.raises(ValueError, match="val is not complete"):
        make_manifests(root)
    assert any("val is not complete" in problem for problem in validate(root)["problems"])
    with pytest.raises(ValueError, match="val is not complete"):
        ImageShards(batch_size=2, root=root, num_workers=0).setup()
    prepared(source, root / "val")
    assert make_manifests(root)["samples"] == 26
    data = ImageShards(batch_size=2, root=root, num_workers=0)
    data.setup()
    assert len(data.samples("val")) == 13
    (root / "train" / "images.json").unlink()  # as while the command adds images to this split
    with pytest.raises(ValueError, match="train is not complete"):
        ImageShards(batch_size=2, root=root, num_workers=0).setup()


def test_a_set_to_which_images_are_added_is_refused_until_they_are_encoded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    prepared(source, root)
    picture(source / "new.png", shade=99)
    (source / "new.txt").write_text("new")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="stopped"):
        patched.setattr(step, "_encode_claimed_jobs", _stop)
        prepared(source, root)
    with pytest.raises(ValueError, match="root is not complete"):
        ImageShards(batch_size=2, root=root, num_workers=0).setup()
    assert prepared(source, root)["samples"] == 14
    ImageShards(batch_size=2, root=root, num_workers=0).setup()


def pictures(folder: Path, shades: range, size: tuple[int, int] = (64, 64)) -> Path:
    """Write images that are called 0.png, 1.png, ..., with captions."""
    for number, shade in enumerate(shades):
        name = f"{'square' if size == (64, 64) else 'wide'}{number}"
        picture(folder / f"{name}.png", size, shade)
        (folder / f"{name}.txt").write_text(name)
    return folder


def opened(root: Path) -> ImageShards:
    data = ImageShards(batch_size=2, root=root, num_workers=0)
    data.setup()
    return data


def test_images_that_are_added_to_a_split_are_trained_on_or_the_set_is_refused(tmp_path: Path) -> None:
    """The command writes the list of buckets of its split; training reads that of the root."""
    source, root = pictures(tmp_path / "train", range(3)), tmp_path / "root"
    prepared(source, root / "train")
    prepared(pictures(tmp_path / "val", range(3, 5)), root / "val")
    shutil.copy(root / "train" / "images.json", root)
    make_manifests(root)
    assert len(opened(root).samples("train")) == 3
    pictures(source, range(5, 7), (100, 45))
    assert prepared(source, root / "train")["samples"] == 5
    with pytest.raises(ValueError, match=r"not named: train/bucket_48x\d+\): run step=manifest root=.*root$"):
        opened(root)
    make_manifests(root)
    assert validate(root)["errors"] == 0
    assert (len(opened(root).samples("train")), len(opened(root).samples("val"))) == (5, 2)


def test_splits_may_have_equal_file_names(tmp_path: Path) -> None:
    """Keys are made from file names; the same content in two splits is still an error."""
    root = tmp_path / "root"
    prepared(pictures(tmp_path / "train", range(3)), root / "train")
    prepared(pictures(tmp_path / "val", range(3, 5)), root / "val")
    assert make_manifests(root)["samples"] == 5
    assert validate(root)["errors"] == 0
    prepared(pictures(tmp_path / "test", range(2, 4)), root / "test")
    make_manifests(root)
    report = validate(root)
    assert report["errors"] == 2
    assert all("the same content occurs twice" in problem for problem in report["problems"])
    shutil.copytree(root / "val" / "bucket_32x32", root / "val" / "bucket_64x32")
    assert sum("the key square" in problem for problem in validate(root)["problems"]) == 2  # twice in one split


@pytest.mark.parametrize("with_copy", [True, False])
def test_splits_of_different_encoders_are_refused(with_copy: bool, tmp_path: Path) -> None:
    """Their features have the same sizes."""
    root = tmp_path / "root"
    for split, shades, view in (("train", range(3), "grey"), ("val", range(3, 5), "colour")):
        prepared(pictures(tmp_path / split, shades), root / split, small_encoders(view))
    if with_copy:
        shutil.copy(root / "train" / "images.json", root)
    named = (
        r'train and .*val were made with different encoders \(encoders\.dino_view is "grey" in train/ and "colour" in '
        r"val/\): make one of the two again"
    )
    for refused in (opened, make_manifests):
        with pytest.raises(ValueError, match=named):
            refused(root)
    assert sum("different encoders" in problem for problem in validate(root)["problems"]) == 1
    shutil.rmtree(root / "val")
    prepared(tmp_path / "val", root / "val", small_encoders("grey"))
    make_manifests(root)
    assert validate(root)["errors"] == 0
    assert opened(root).encoders == small_encoders("grey").fingerprint


def test_an_images_json_of_encoders_from_before_is_refused_until_it_is_written_again(tmp_path: Path) -> None:
    source, root = pictures(tmp_path / "source", range(3)), tmp_path / "root"
    prepared(source, root / "train", small_encoders("grey"))
    make_manifests(root)  # copies the encoders of the splits
    assert opened(root).encoders == small_encoders("grey").fingerprint
    shutil.rmtree(root / "train")
    prepared(source, root / "train", small_encoders("colour"))
    named = (
        r'other encoders than .*train/images\.json \(encoders\.dino_view is "colour" in train/images\.json and "grey"'
    )
    with pytest.raises(ValueError, match=named):
        opened(root)
    assert any("run step=manifest" in problem for problem in validate(root)["problems"])
    make_manifests(root)
    assert validate(root)["errors"] == 0
    assert opened(root).encoders == small_encoders("colour").fingerprint


def _stop(*_: Any) -> int:
    raise OSError("stopped")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused_at_the_start(share: float, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"max_failed_share={share}: it is a share, from 0 to 1"):
        prepared(source, tmp_path / "root", max_failed_share=share)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": -1}, "workers=-1 must be at least 0"),
        *(({"max_enlargement": each}, f"max_enlargement={each} must be above 0") for each in (0, -1, float("nan"))),
        ({"bucket_step": 0}, "bucket_step=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name_before_anything_is_written(
    options: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^{said}"):
        prepared(source, tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("others", [0, 1])
def test_a_size_at_which_no_image_can_be_used_is_corrected_in_the_same_folder(others: int, tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(3):
        picture(source / f"{number}.png", shade=number)
        (source / f"{number}.txt").write_text(f"number {number}")
    if others:
        (source / "broken.png").write_bytes(b"no picture")
        (source / "broken.txt").write_text("broken")
    advice = "3 are smaller than their bucket: give a size below 128, or max_enlargement above 1"
    advice += "; repair the others" if others else ""
    with pytest.raises(ValueError, match=rf"none of the {3 + others} images .* can be used: .*\. {advice}$"):
        prepared(source, root, size=128)
    report = prepared(source, root, size=32)
    assert (report["samples"], report["failed"], report["buckets"]) == (3, others, {"bucket_32x32": 3})
    with pytest.raises(ValueError, match="holds shards made with other settings"):
        prepared(source, root, size=64)


@pytest.mark.parametrize("place", [".", "shards", "wide/shards", "../link"])
def test_shards_are_not_written_where_images_are_read(place: str, source: Path, tmp_path: Path) -> None:
    """Images that are stored there would be listed as new ones by the next call."""
    (tmp_path / "link").symlink_to(source / "wide")
    before = sorted(source.rglob("*"))
    with pytest.raises(ValueError, match=r"root=.* is (in )?source=.*: name a folder outside of it"):
        prepared(source, source / place)
    assert sorted(source.rglob("*")) == before
    assert prepared(source, tmp_path)["samples"] == 13  # files above the source folder and next to it are not read


@pytest.mark.parametrize("share", [0.1, 0.5], ids=["too many left out", "none can be used"])
def test_a_list_that_failed_is_repaired_by_the_same_command(share: float, tmp_path: Path) -> None:
    """Captions that are added after a refused run are used in the next one; finished shards stay."""
    source, root, told = tmp_path / "source", tmp_path / "root", 7 if share == 0.1 else 0
    for number in range(10):
        picture(source / f"{number}.png", shade=number)
    for number in range(told):
        (source / f"{number}.txt").write_text(f"number {number}")
    refused = r"3 of 10 images are left out .*failed\.jsonl: repair" if told else r"none of the 10 .*\. Repair them"
    with pytest.raises(ValueError, match=refused):
        prepared(source, root, max_failed_share=share)
    before = contents(root)
    for number in range(told, 10):
        (source / f"{number}.txt").write_text(f"number {number}")
    report = prepared(source, root, max_failed_share=share)
    assert (report["items"], report["samples"], report["failed"]) == (10 - told, 10, 0)
    assert before.items() <= contents(root).items()
    assert (root / "images.json").is_file()
    again = prepared(source, root, max_failed_share=share)
    assert (again["items"], again["samples"]) == (0, 10)


def test_buckets_must_fit_the_latents(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not divide by the latent's stride"):
        prepared(source, tmp_path / "root", small_encoders(edge=32))


# ---- near copies -----------------------------------------------------------------------------------------------------


def scene(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    fields = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return fields.resize((160, 160), Image.Resampling.BICUBIC)


def test_images_that_were_saved_or_scaled_anew_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    for number in range(5):
        scene(number).save(source / f"own{number}.png")
    scene(0).save(source / "saved.jpg", quality=80)
    scene(1).resize((96, 96)).save(source / "scaled.png")
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    prepared(source, root)
    with caplog.at_level("WARNING"):
        report = validate(root)
    assert (report["errors"], report["near_copies"]) == (0, 4)  # the images of two pairs
    assert "4 images are near copies of another one" in caplog.text
    assert "own0.png (own0 of" in caplog.text
    assert "saved.jpg" in caplog.text
    assert "own2.png" not in caplog.text


def test_held_out_images_are_compared_with_those_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, names in (("train", "abc"), ("val", "de")):
        source = tmp_path / f"source_{split}"
        source.mkdir()
        for name in names:
            scene(ord(name)).save(source / f"{name}.png")
            (source / f"{name}.txt").write_text(name)
        if split == "val":
            scene(ord("b")).save(source / "b2.jpg", quality=80)
            (source / "b2.txt").write_text("b")
        prepared(source, tmp_path / "root" / split)
    with caplog.at_level("WARNING"):
        assert validate(tmp_path / "root")["near_copies"] == 1
    assert "1 images of val/ are near copies of images of train/: b2.jpg" in caplog.text


def test_near_copies_of_several_equal_thumbnails() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(50, 200, 192, dtype=np.uint8) for _ in range(2))
    same = [one.tobytes()] * 3
    assert [number for number, other in near_copies([*same, two.tobytes()]) if number != other] == [0, 1, 2]
    assert near_copies([(one + 5).tobytes(), (one + 6).tobytes()], same[:1]) == [(0, 0)]
    assert near_copies([one.tobytes()]) == near_copies([]) == []


# ---- several processes -----------------------------------------------------------------------------------------------


def test_processes_share_the_shards_and_none_is_written_twice(source: Path, tmp_path: Path) -> None:
    """Simulate two processes in one: a shard that one of them holds cannot be claimed by the other until it is
    released."""
    items = list_items(source, step.aspect_buckets(32, 16, 3.0), 1.0, False)
    jobs = jobs_of(tmp_path, items, 4)
    left, right = Claims(jobs, 2, first=0), Claims(jobs, 2, first=2)
    ours = iter(left)
    first = next(ours)
    assert first == [(0, 0), (0, 1)]
    theirs = [batch[0][0] for batch in right]
    assert 0 not in theirs
    assert set(theirs) == {1, 2, 3}
    assert theirs[0] == 2  # the second process starts at another shard
    assert list(ours) == [[(0, 2), (0, 3)]]
    left.release_all()
    assert right.claim(0)
    right.release_all()


def test_the_shards_of_a_process_that_died_are_free_again(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    items = list_items(source, step.aspect_buckets(32, 16, 3.0), 1.0, False)
    job = jobs_of(root, items, 4)[1]
    job.path.parent.mkdir(parents=True)
    with job.lock_path.open("w") as lock:  # a process that is still running holds the lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not Claims([job], 2).claim(0)
    assert prepared(source, root)["samples"] == 13  # the lock was released when its holder ended


def test_without_locks_one_process_encodes_and_several_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    jobs = jobs_of(tmp_path, list_items(source, step.aspect_buckets(32, 16, 3.0), 1.0, False), 4)
    alone = Claims(jobs, 2)
    assert alone.claim(0)
    alone.release_all()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OSError, match="several processes cannot divide the work: start one process alone"):
        Claims(jobs, 2).claim(0)
    with pytest.raises(OSError, match="cannot be locked"):
        prepared(source, tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.tar"))


def test_ranks_are_those_of_torchrun_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert Rank.here() == Rank(0, 1, 0)
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(5, 8, 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(3, 4, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Rank.here().device("auto") == "cuda:1"
    assert Rank.here().device("cpu") == "cpu"


def test_a_second_rank_leaves_the_rest_to_the_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    report = prepared(source, root)
    assert report["items"] == 13
    assert not (root / "images.json").exists()  # rank 0 writes it when all shards are there
    monkeypatch.setenv("RANK", "0")
    report = prepared(source, root)
    assert (report["items"], report["samples"]) == (0, 13)
    assert (root / "images.json").is_file()


def test_the_command_makes_shards(source: Path, tmp_path: Path) -> None:
    from keygrip import prepare
    from keygrip.config import compose

    shutil.rmtree(source / "wide")
    overrides = ["step=images", "encoders=tiny", f"source={source}", f"root={tmp_path / 'root'}", "size=32"]
    overrides += ["bucket_step=16", "workers=0", "max_failed_share=0.5", "max_aspect=1"]
    small = ["encoders.view.size=48", "encoders.view.width=16", "encoders.view.depth=1", "encoders.autoencoder.edge=4"]
    cfg = compose("prepare", [*overrides, *small])
    assert prepare.run(cfg)["samples"] == 10
