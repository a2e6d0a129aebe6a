"""Images that could not be encoded: they are encoded once they are repaired, and until then counted and named once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import small_encoders
from PIL import Image
from torch import Tensor

from keygrip.data.image_text.samples import read_image_text
from keygrip.data.image_text.sources.images import encode_folder
from keygrip.data.shards.reader import ShardSet
from keygrip.data.validation import validate
from keygrip.models.patch_dit.encoders import Encoders

OPTIONS: dict[str, Any] = {"size": 32, "bucket_step": 16, "max_aspect": 3.0, "images_per_shard": 4, "batch_size": 3}
OPTIONS |= {"workers": 0, "device": "cpu", "progress": False, "max_failed_share": 0.5}


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shade)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


def prepared(source: Path, root: Path, encoders: Encoders | None = None, **options: Any) -> dict[str, Any]:
    return encode_folder(source, root, encoders or small_encoders(), **{**OPTIONS, **options})


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.tar"))}


def failures(root: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (root / "failed.jsonl").read_text().splitlines()]
    found = {row["source"]: row["reason"] for row in rows}
    assert len(found) == len(rows)  # each image is named once
    return found


def test_an_image_that_broke_while_it_was_read_is_encoded_once_it_is_repaired(tmp_path: Path) -> None:
    """Three images break after their headers: one is repaired, one becomes a copy of another, one stays broken."""
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(7):
        picture(source / f"{number}.jpg", number)
        (source / f"{number}.txt").write_text(f"number {number}")
    whole = {number: (source / f"{number}.jpg").read_bytes() for number in (1, 3, 5)}
    for number, content in whole.items():
        (source / f"{number}.jpg").write_bytes(content[: len(content) // 2])
    report = prepared(source, root)
    assert (report["items"], report["samples"], report["failed"]) == (7, 4, 3)
    before = contents(root)
    assert prepared(source, root)["items"] == 0  # nothing was repaired
    assert contents(root) == before
    (source / "3.jpg").write_bytes(whole[3])
    (source / "5.jpg").write_bytes((source / "0.jpg").read_bytes())
    (source / "5.txt").write_text("number 0")
    for items in (1, 0):
        report = prepared(source, root)
        assert (report["items"], report["samples"], report["failed"], report["duplicates"]) == (items, 5, 1, 1)
        assert before.items() <= contents(root).items()
        assert len(contents(root)) == len(before) + 1
        assert set(failures(root)) == {"1.jpg", "5.jpg"}
        assert "truncated" in failures(root)["1.jpg"]
        assert failures(root)["5.jpg"] == "the same file as 0.jpg, which has its captions"
    shards = ShardSet(root / "bucket_32x32")
    assert [shards.key(number) for number in range(5)] == ["0", "2", "4", "6", "3"]
    assert read_image_text(shards, 4).record["caption"] == "number 3"
    assert validate(root)["errors"] == 0


def test_too_many_images_that_broke_are_repaired_by_the_same_command(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(4):
        picture(source / f"{number}.jpg", number)
        (source / f"{number}.txt").write_text(f"number {number}")
    whole = (source / "2.jpg").read_bytes()
    (source / "2.jpg").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 4 images are left out"):
            prepared(source, root, max_failed_share=0.1)
    (source / "2.jpg").write_bytes(whole)
    report = prepared(source, root, max_failed_share=0.1)
    assert (report["items"], report["samples"], report["failed"]) == (1, 4, 0)
    assert (root / "images.json").is_file()


def test_images_that_were_removed_from_the_source_do_not_count(tmp_path: Path) -> None:
    """Of two images without a caption and two that break after their headers, one of each is removed, then the rest:
    the share and `failed.jsonl` are of the images that are there. An image that comes back is encoded."""
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(8):
        picture(source / f"{number}.jpg", number)
        (source / f"{number}.txt").write_text(f"number {number}")
    whole = (source / "3.jpg").read_bytes()
    for number in (0, 1):
        (source / f"{number}.txt").unlink()
    for number in (2, 3):
        content = (source / f"{number}.jpg").read_bytes()
        (source / f"{number}.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"4 of 8 images are left out .*: repair or remove them"):
        prepared(source, root, max_failed_share=0.1)
    before = contents(root)
    for number in (0, 2):
        (source / f"{number}.jpg").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="2 of 6 images are left out"):
            prepared(source, root, max_failed_share=0.1)
        assert set(failures(root)) == {"1.jpg", "3.jpg"}
    for number in (1, 3):
        (source / f"{number}.jpg").unlink()
    for _ in range(2):
        report = prepared(source, root, max_failed_share=0.1)
        assert (report["items"], report["samples"], report["failed"], report["duplicates"]) == (0, 4, 0, 0)
        assert failures(root) == {}
        assert (root / "images.json").is_file()
        assert contents(root) == before
    (source / "3.jpg").write_bytes(whole)
    report = prepared(source, root, max_failed_share=0.1)
    assert (report["items"], report["samples"], report["failed"]) == (1, 5, 0)
    (source / "3.jpg").unlink()  # encoded by now: its sample stays
    assert prepared(source, root, max_failed_share=0.1)["samples"] == 5
    assert validate(root)["errors"] == 0


class Overflowing(Encoders):
    """Gives latents of black images that half precision cannot represent."""

    def __init__(self) -> None:
        plain = small_encoders()
        super().__init__(plain.autoencoder, plain.text, plain.view, plain.dino_view)

    def encode_images(self, pictures: Tensor) -> Tensor:
        black = (pictures == 0).flatten(1).all(1)
        return torch.where(black[:, None, None, None], float("inf"), super().encode_images(pictures))


def test_an_image_whose_features_cannot_be_stored_is_not_tried_in_every_run(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(3):
        picture(source / f"{number}.png", number)
        (source / f"{number}.txt").write_text(f"number {number}")
    Image.new("RGB", (64, 64)).save(source / "1.png")
    reports = [prepared(source, root, Overflowing()) for _ in range(3)]
    assert [report["items"] for report in reports] == [3, 1, 0]
    assert "not finite" in failures(root)["1.png"]
    picture(source / "1.png", 1)
    report = prepared(source, root, Overflowing())
    assert (report["items"], report["samples"], report["failed"]) == (1, 3, 0)
