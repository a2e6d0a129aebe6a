"""Listing the images of a folder: tables in which captions would be lost, linked folders, and renamed files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import small_encoders
from PIL import Image

from keygrip.data.csv_tables import table_rows
from keygrip.data.image_text.crops import Bucket
from keygrip.data.image_text.sources.images import encode_folder
from keygrip.data.image_text.sources.listing import Item, list_items
from keygrip.data.shards.reader import ShardSet
from keygrip.data.source_files import everything_below, files_in
from keygrip.data.validation import validate


def picture(path: Path, shade: int = 0, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def listed(source: Path) -> list[Item]:
    return list_items(source, [Bucket(32, 32)], 1.0, False)


def prepared(source: Path, root: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "size": 32,
        "bucket_step": 16,
        "max_aspect": 3.0,
        "images_per_shard": 4,
        "batch_size": 3,
        "workers": 0,
    }
    return encode_folder(source, root, small_encoders(), **options, device="cpu", progress=False, max_failed_share=0.5)


# ---- tables of captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,caption\na.png,a red cube, left of the block\n", "line 2: it has more fields than .* quotes"),
        ('file_name,caption\na.png,"a cube\nb.png,two\n', "unexpected end of data"),
        ("file_name,caption,caption\na.png,one,two\n", "the column caption stands there twice"),
        ("file_name,caption\na.png,one\0\0\0\0\0\0two\n", "line 2 contains a NUL byte: the file is damaged"),
        ("\0f\0i\0l\0e", "line 1 contains a NUL byte: .* not UTF-8; write it anew"),
    ],
)
def test_a_table_in_which_captions_would_be_lost_is_refused(tmp_path: Path, table: str, said: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(table)
    with pytest.raises(ValueError, match=rf"captions\.csv is not a list of captions: .*{said}"):
        listed(tmp_path)


def test_a_table_keeps_commas_and_lines_in_quotes() -> None:
    text = 'a,b\r\n1,"x, ""y""\nz"\r\n2\r\n'
    assert list(table_rows(text)) == [(3, {"a": "1", "b": 'x, "y"\nz'}), (4, {"a": "2", "b": None})]


def test_names_of_columns_may_have_spaces_around_them(tmp_path: Path) -> None:
    assert list(table_rows("a, b ,c\n1, 2 ,3\n", ["b"])) == [(2, {"a": "1", "b": " 2 ", "c": "3"})]
    with pytest.raises(ValueError, match="the column a stands there twice"):
        list(table_rows("a, a\n1,2\n"))
    for text, said in (("file;caption\nx.png;a, b\n", "semicolons"), ("file\tcaption\nx.png\ta\n", "tabs")):
        with pytest.raises(ValueError, match=f"line 1: {said} separate the columns .*: save the table with commas"):
            list(table_rows(text, ["file"]))
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("file_name , caption\na.png,a red cube\n")
    assert [item.captions for item in listed(tmp_path)] == [("a red cube",)]


@pytest.mark.parametrize(
    ("content", "captions", "reason"),
    [
        (["one", "two", "one"], ("one", "two"), ""),
        ([], (), "it has no caption"),
        ([{"caption": "one"}], (), "its caption is not text"),
        ("one", (), "it is neither an object nor a list of captions"),
        (None, (), "it is neither an object nor a list of captions"),
    ],
)
def test_a_list_beside_an_image_is_its_captions(
    content: object, captions: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    (item,) = listed(tmp_path)
    assert item.captions == captions
    assert item.reason.endswith(reason)
    assert bool(item.reason) == bool(reason)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), "a.txt: it is not UTF-8 text (from byte 3 on): save it as UTF-8"),
        ("a.json", '{"caption": "caf\u00e9"}'.encode("latin-1"), "a.json: it is not UTF-8 text (from byte 16 on)"),
        ("a.json", b"{caption: one}", "a.json: Expecting property name"),
        ("a.json", b'{"caption": "half of a pair \\ud83d"}', "a.json: UnicodeEncodeError"),
        ("a.json", b"[" * 100000, "a.json: "),
        ("a.caption", None, "a.caption: it is a folder, not a file"),
    ],
)
def test_a_broken_file_of_captions_is_named(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    """The reason names the caption file, not the valid image next to it. The reason for a broken image does not repeat
    the name of the image."""
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "b.txt").write_text("one")
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    whole, broken = listed(tmp_path)
    assert whole.reason.startswith(reason)
    assert whole.bucket is None
    assert broken.reason == "it is not an image of a known format"


def test_what_stands_beside_a_caption_is_no_fault_of_it(tmp_path: Path) -> None:
    """Other values stored with a caption do not matter: img2dataset writes NaN for scores that an image lacks
    (LAION's), and EXIF as it stands in the file."""
    beside = {"similarity": float("nan"), "hash": 10**40, "exif": "\ud83d"}
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "one", **beside}))
    picture(tmp_path / "b.png", 1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "two", **beside}))
    assert [(item.captions, item.reason) for item in listed(tmp_path)] == [(("one",), ""), (("two",), "")]


def test_rows_may_name_their_file_in_different_columns(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 1)
    rows = [{"file_name": "a.png", "text": "one"}, {"image": "b.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.captions for item in listed(tmp_path)] == [("one",), ("two",)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "three"}])))
    with pytest.raises(ValueError, match="line 3 has none of the columns file_name, file, image"):
        listed(tmp_path)


# ---- linked folders --------------------------------------------------------------------------------------------------


def test_linked_folders_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "source" / "a.png", 0, "one")
    picture(tmp_path / "disk" / "b.png", 1, "two")
    picture(tmp_path / "other" / "deep" / "c.png", 2, "three")
    (tmp_path / "source" / "part").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "further").symlink_to(tmp_path / "other")
    found = {item.path: item.captions for item in listed(tmp_path / "source")}
    assert found == {"a.png": ("one",), "part/b.png": ("two",), "part/further/deep/c.png": ("three",)}
    assert [path.name for path in files_in(tmp_path / "source", ".png", below=True)] == ["a.png", "b.png", "c.png"]


def test_what_several_ways_lead_to_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    picture(source / "z" / "a.png")
    (source / "a-link").symlink_to(source / "z")  # sorts before `z`
    (source / "z" / "up").symlink_to(source)
    (source / "above").symlink_to(tmp_path)
    picture(tmp_path / "disk" / "x" / "b.png")
    (source / "disk").symlink_to(tmp_path / "disk")
    (source / "x").symlink_to(tmp_path / "disk" / "x")
    with caplog.at_level("WARNING"):
        found = [path.relative_to(source).as_posix() for path in everything_below(source) if path.is_file()]
    assert found == ["disk/x/b.png", "z/a.png"]
    assert "4 links lead to folders that are read anyway" in caplog.text


# ---- files that got another name -------------------------------------------------------------------------------------


def test_a_renamed_file_is_no_new_sample(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(6):
        picture(source / f"p{number}.png", number, f"picture {number}")
    assert prepared(source, root)["samples"] == 6
    for ending in ("png", "txt"):
        (source / f"p0.{ending}").rename(source / f"zz.{ending}")
    picture(source / "p9.png", 9, "picture 9")
    report = prepared(source, root)
    assert (report["samples"], report["duplicates"]) == (7, 1)
    reasons = {row["source"]: row["reason"] for row in map(json.loads, (root / "failed.jsonl").open())}
    assert reasons == {"zz.png": "the same content as p0.png had when it was encoded: its sample stays"}
    assert validate(root)["errors"] == 0
    for ending in ("png", "txt"):  # rename the files back
        (source / f"zz.{ending}").rename(source / f"p0.{ending}")
    assert prepared(source, root)["samples"] == 7


def prepared_with_a_copy(folder: Path) -> tuple[Path, Path]:
    """Return a source of three pictures and a copy ``q.png`` of the first, and the set made of it."""
    source, root = folder / "source", folder / "root"
    for number in range(3):
        picture(source / f"p{number}.png", number, f"picture {number}")
    shutil.copy(source / "p0.png", source / "q.png")
    (source / "q.txt").write_text("a copy")
    assert prepared(source, root)["samples"] == 3
    return source, root


def test_a_copy_whose_original_was_removed_is_no_new_sample(tmp_path: Path) -> None:
    source, root = prepared_with_a_copy(tmp_path)
    (source / "p0.png").unlink()
    picture(source / "p5.png", 5, "picture 5")
    assert prepared(source, root)["samples"] == 4
    assert validate(root)["errors"] == 0
    picture(source / "q.png", 7, "another picture")  # another image under the name of the copy
    assert prepared(source, root)["samples"] == 5


def test_a_file_that_takes_another_ones_name_is_no_second_sample(tmp_path: Path) -> None:
    """A renumbered folder, with a new picture in front: the last file is the only one under a new name, and its content
    was encoded under the name before it."""
    source, root = tmp_path / "source", tmp_path / "root"
    for number in range(4):
        picture(source / f"p{number}.png", number, f"picture {number}")
    assert prepared(source, root)["samples"] == 4
    for number in reversed(range(4)):
        for ending in ("png", "txt"):
            (source / f"p{number}.{ending}").rename(source / f"p{number + 1}.{ending}")
    picture(source / "p0.png", 9, "picture 9")
    report = prepared(source, root)
    assert (report["items"], report["samples"], report["duplicates"]) == (0, 4, 1)
    reasons = {row["source"]: row["reason"] for row in map(json.loads, (root / "failed.jsonl").open())}
    assert reasons == {"p4.png": "the same content as p3.png had when it was encoded: its sample stays"}
    assert validate(root)["errors"] == 0


@pytest.mark.parametrize("change", ["replaced", "without a caption"])
def test_a_copy_whose_original_changed_is_no_new_sample(change: str, tmp_path: Path) -> None:
    source, root = prepared_with_a_copy(tmp_path)
    if change == "replaced":
        picture(source / "p0.png", 8)
    else:
        (source / "p0.txt").unlink()
    report = prepared(source, root)
    assert (report["items"], report["samples"], report["duplicates"]) == (0, 3, 1)
    assert validate(root)["errors"] == 0


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_reads_every_caption(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    picture(source / "a.png")
    (source / "a.json").write_text(json.dumps({"captions": ["one", "two"]}))
    prepared(source, root)
    assert validate(root)["errors"] == 0
    (tar,) = sorted(root.rglob("*.tar"))
    shards = ShardSet(tar.parent)
    assert "t5h_1.npy" in shards.read(0)
    content = tar.read_bytes()
    place = content.index(b"\x93NUMPY", content.index(b"t5h_1.npy"))
    tar.write_bytes(content[:place] + b"\x00NUMPY" + content[place + 6 :])
    report = validate(root)
    assert report["errors"] >= 1
    assert any("t5h_1.npy" in problem for problem in report["problems"])
