"""Images stored under their own keys, separate from their text: read as its frames, or the text is refused by name."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import picture, small_video

from keygrip.data.bad_samples import BadSample
from keygrip.data.manifests import make_manifests
from keygrip.data.shards import index as shard_index
from keygrip.data.shards.index import MANIFEST, ShardError, ShardIndex, index_path
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.separate_images import ELSEWHERE, group_members
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import MAX_FRAMES, read_sample, read_timed_conversations

Members = list[tuple[str, bytes]]
TURNS = [{"from": "human", "value": "What happens?"}, {"from": "gpt", "value": "It falls."}]


def text(**content: Any) -> bytes:
    return json.dumps(content).encode()


TALK = text(conversations=TURNS)
GOOD: Members = [("good.png", picture(9)), ("good.json", TALK), ("alone.json", TALK)]
READ = {"good": [9], "alone": []}


def images(key: str, numbers: list[str], ending: str = "png") -> Members:
    """Return images whose brightness is their number."""
    return [(f"{key}_{number}.{ending}", picture(int(number))) for number in numbers]


def question(**counts: Any) -> bytes:
    return text(user="What?", assistant="It falls.", source="x", **counts)


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def found(root: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the brightness of the frames of every sample that is read, and the reason for every other one, both by
    key."""
    make_manifests(root, max_broken_share=1.0)
    manifest = json.loads((root / MANIFEST).read_bytes())
    shards = ShardSet(root, quiet=True)
    named = {key: why for left in manifest["bad_samples"].values() for key, why in left.items()}
    frames = {}
    for number in range(len(shards)):
        try:
            sample = read_sample(shards, number, 8)
        except BadSample as error:
            named[shards.key(number)] = str(error)
            continue
        assert shards.columns["frames"][number] == len(sample.frames)
        assert read_timed_conversations(shards, number, MAX_FRAMES) == (sample.conversations, sample.seconds)
        frames[shards.key(number)] = sample.frames[:, 0, 0, 0].tolist()
    assert manifest["samples"] == len(shards)
    return frames, named


@pytest.mark.parametrize(
    ("members", "frames"),
    [
        ([*images("lay", ["000", "001", "002"]), ("lay.json", TALK)], [0, 1, 2]),
        ([("lay.json", TALK), *images("lay", ["10", "9", "8", *"7654321"])], list(range(1, 11))),
        ([*images("lay", ["0", "1"]), ("lay.txt", b"It falls.")], [0, 1]),
        ([*images("lay", ["000", "001"]), ("lay.json", question(num_frames=2))], [0, 1]),
        ([*images("lay", ["000", "001"]), ("lay.json", question(num_frames=2, frame_count=2))], [0, 1]),
        ([*images("lay", ["000", "001"], "PNG"), ("lay.JSON", TALK)], [0, 1]),
        ([*images("lay", ["000"]), ("lay.json", text(caption="It falls.", num_frames=None))], [0]),
    ],
)
@pytest.mark.parametrize("folder", ["", "x/y_1/"])
def test_images_with_numbered_keys_are_the_frames_of_their_text(
    members: Members, frames: list[int], folder: str, tmp_path: Path
) -> None:
    members = [(folder + name, content) for name, content in members]
    write_tar(tmp_path / "a.tar", [*members[:1], *GOOD, *members[1:]])
    assert found(tmp_path) == (READ | {f"{folder}lay": frames}, {})
    report = validate(tmp_path)
    assert (report["errors"], report["samples"]) == (0, 3)


LAY = images("lay", ["000", "001"])
NOT_READ = "has no text under its own.*read are KEY.00.jpg"
# members, the keys of texts that are refused, and why
REFUSED: dict[str, tuple[Members, list[str], str]] = {
    "folders of images and of texts": ([("images/a.png", picture(1)), ("texts/a.json", TALK)], ["texts/a"], NOT_READ),
    "the same in upper case": ([("images/A.PNG", picture(1)), ("texts/a.json", TALK)], ["texts/a"], NOT_READ),
    "folders of frames and of texts": (
        [*images("images/a", ["0", "1"]), ("texts/a.json", TALK)],
        ["texts/a"],
        NOT_READ,
    ),
    "folders of videos and of texts": ([("v/a.mp4", small_video()), ("texts/a.json", TALK)], ["texts/a"], NOT_READ),
    "a folder for each sample": (
        [("dir/b/000.png", picture(1)), ("dir/b/001.png", picture(1)), ("dir/b/meta.json", TALK)],
        ["dir/b/meta"],
        NOT_READ,
    ),
    "a folder with an image and several texts": (
        [("b/0.png", picture(1)), *((f"b/q{n}.json", TALK) for n in range(3))],
        ["b/q0", "b/q1", "b/q2"],
        NOT_READ,
    ),
    "folders of frames, texts beside": (
        [("images/b/0.png", picture(1)), ("texts/b.json", TALK)],
        ["texts/b"],
        NOT_READ,
    ),
    "a folder of frames beside its text": ([("b/0.png", picture(1)), ("b.json", TALK)], ["b"], NOT_READ),
    "an image beside the folder of its text": ([("b.png", picture(1)), ("b/qa.json", TALK)], ["b/qa"], NOT_READ),
    "another mark before the number": ([("lay-000.png", picture(0)), ("lay.json", TALK)], ["lay"], NOT_READ),
    "a word before the number": ([("lay_frame0.png", picture(0)), ("lay.json", TALK)], ["lay"], NOT_READ),
    "a word behind the text": ([("lay.png", picture(0)), ("lay_qa.json", TALK)], ["lay_qa"], NOT_READ),
    "seven digits": ([("lay_0000000.png", picture(0)), ("lay.json", TALK)], ["lay"], NOT_READ),
    "numbered videos": ([("lay_000.mp4", small_video()), ("lay.json", TALK)], ["lay"], NOT_READ),
    "an image that is not read": ([*LAY, ("lay_002.gif", b"GIF89a"), ("lay.json", TALK)], ["lay"], NOT_READ),
    "a frame in two formats": ([*LAY, ("lay_001.jpg", picture(1)), ("lay.json", TALK)], ["lay"], NOT_READ),
    "a frame twice": ([*LAY, LAY[1], ("lay.json", TALK)], ["lay"], NOT_READ),
    "a frame that is a sample": ([*LAY, ("lay_001.txt", b"It falls."), ("lay.json", TALK)], ["lay"], NOT_READ),
    "a frame is missing": ([*images("lay", ["0", "2"]), ("lay.json", TALK)], ["lay"], r"numbered \[0, 2\]"),
    "one number twice": ([*images("lay", ["0", "00"]), ("lay.json", TALK)], ["lay"], r"numbered \[0, 0\]"),
    "fewer than its num_frames": ([*LAY, ("lay.json", question(num_frames=3))], ["lay"], "2 images of 3 "),
    "more than its frame_count": ([*LAY, ("lay.json", question(frame_count=1))], ["lay"], "2 images of 1 "),
    "two numbers of frames": (
        [*LAY, ("lay.json", question(num_frames=2, frame_count=3))],
        ["lay"],
        r"2 images of \[3, 2\] ",
    ),
    "turns of more frames": (
        [*LAY, ("lay.json", text(conversations=TURNS, num_frames=3))],
        ["lay"],
        "2 images of 3 ",
    ),
    "a caption of more frames": (
        [*LAY, ("lay.json", text(caption="It falls.", frame_count=3))],
        ["lay"],
        "2 images of 3 ",
    ),
    "a text of frames, without any": ([("lay.json", question(num_frames=2))], ["lay"], "0 images of 2 "),
    "turns of frames, without any": (
        [("lay.json", text(conversations=TURNS, num_frames=2))],
        ["lay"],
        "0 images of 2 ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_texts_whose_images_are_not_read_with_them_are_refused_by_name(name: str, tmp_path: Path) -> None:
    members, keys, reason = REFUSED[name]
    write_tar(tmp_path / "a.tar", [*GOOD, *members, ("good2.png", picture(7)), ("good2.json", TALK)])
    frames, named = found(tmp_path)
    assert {key: frames.get(key) for key in (*READ, "good2")} == READ | {"good2": [7]}
    assert not {*keys} & {*frames}
    for key in keys:
        assert re.search(reason, named[key])


def test_texts_alone_are_read_beside_whole_samples_and_an_image_that_lost_its_text(tmp_path: Path) -> None:
    members = [*GOOD, ("b.png", picture(3)), ("b.json", TALK), ("lost.png", picture(4)), ("c_1.json", TALK)]
    write_tar(tmp_path / "a.tar", members)
    frames, named = found(tmp_path)
    assert frames == READ | {"b": [3], "c_1": []}
    assert list(named) == ["lost"]


def test_numbered_samples_are_no_frames_of_a_text(tmp_path: Path) -> None:
    numbered = [
        (f"talk_{n}.{part}", content) for n in (0, 1) for part, content in (("png", picture(n)), ("json", TALK))
    ]
    write_tar(tmp_path / "a.tar", [*numbered, ("talk.json", TALK)])
    assert found(tmp_path) == ({"talk_0": [0], "talk_1": [1], "talk": []}, {})


def test_images_that_are_links_are_no_text_about_nothing(tmp_path: Path) -> None:
    """tar stores links as links unless it is told to follow them."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("lay_000.png", picture(0)), ("lay.json", TALK), ("t/a.json", TALK)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name in ("lay_001.png", "i/a.png"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "../x.png"
            tar.addfile(info)
    frames, named = found(tmp_path)
    assert (frames, sorted(named)) == ({}, ["i/a", "lay", "lay_000", "lay_001", "t/a"])


def parted(at: int) -> tuple[Members, Members]:
    members = [*images("lay", ["000", "001", "002"]), ("lay.json", TALK)]
    return members[:at], members[at:]


DIVIDED = r"not all of its images are in its tar: .\.tar has .* without text.*pack all files of a sample into one tar"


@pytest.mark.parametrize(
    ("first", "second", "key", "reason"),
    [
        (*parted(1), "lay", DIVIDED),
        (*parted(2), "lay", r"numbered \[2\]"),
        (*parted(3), "lay", DIVIDED),
        (*parted(1)[::-1], "lay", DIVIDED),
        ([("a.png", picture(1))], [("a.json", TALK)], "a", DIVIDED),
        ([("images/a.png", picture(1))], [("texts/a.json", TALK)], "texts/a", DIVIDED),
        (images("images/a", ["0"]), [("texts/a.json", TALK)], "texts/a", DIVIDED),
    ],
)
def test_a_sample_that_is_divided_between_two_tars_is_refused(
    first: Members, second: Members, key: str, reason: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [*GOOD, *first])
    write_tar(tmp_path / "b.tar", [("b_7.png", picture(7)), ("b_7.json", TALK), ("b.json", TALK), *second])
    frames, named = found(tmp_path)
    assert frames == READ | {"b_7": [7], "b": []}
    assert re.search(reason, named[key])
    content = (tmp_path / MANIFEST).read_bytes()
    problems = validate(tmp_path)["problems"]
    assert any(named[key] in problem for problem in problems)
    assert not any("again=true" in problem for problem in problems)  # the index belongs to the tar
    for again in (False, True):
        make_manifests(tmp_path, again, max_broken_share=1.0)
        assert (tmp_path / MANIFEST).read_bytes() == content


def test_a_set_of_images_in_one_tar_and_texts_in_another_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "images.tar", [(f"{n}.png", picture(n)) for n in range(4)])
    write_tar(tmp_path / "texts.tar", [(f"{n}.json", TALK) for n in range(4)])
    with pytest.raises(ValueError, match=r"8 of 8 samples in .* are bad"):
        make_manifests(tmp_path)
    assert found(tmp_path)[0] == {}


def test_keys_that_begin_anew_in_every_tar_are_no_divided_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*LAY, ("k_1.png", picture(1))])
    write_tar(tmp_path / "b.tar", [*LAY, ("lay.json", TALK), ("k.png", picture(2)), ("k.json", TALK)])
    frames, named = found(tmp_path)
    assert frames == {"lay": [0, 1], "k": [2]}
    assert sorted(named) == ["k_1", "lay_000", "lay_001"]


def test_the_index_keeps_which_images_have_no_text(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*GOOD, ("x.png", picture(1)), ("y.cls", b"1")])
    make_manifests(tmp_path, max_broken_share=1.0)
    stored = index_path(tmp_path / "a.tar").read_bytes()
    index = ShardIndex.from_bytes(stored, "a")
    assert index.textless == {"x": ("png",)}
    assert index.to_bytes() == stored
    assert index.without(["good"]).textless == index.textless
    for name, values in (("names", ["png", "jpg"]), ("names", []), ("counts", [-1]), ("counts", [1, 1])):
        with np.load(io.BytesIO(stored)) as arrays:
            content = dict(arrays)
        content[f"textless_{name}"] = np.array(values, dtype=content[f"textless_{name}"].dtype)
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        with pytest.raises(ShardError, match=r"b is not a shard index"):
            ShardIndex.from_bytes(buffer.getvalue(), "b")


def dotted(key: str, numbers: list[str]) -> Members:
    return [(f"{key}.{number}.png", picture(int(number))) for number in numbers]


@pytest.mark.parametrize("swapped", [False, True], ids=["text first", "text last"])
@pytest.mark.parametrize("folder", ["", "a/", "a/b/"])
@pytest.mark.parametrize(
    ("with_text", "without"),
    [
        (dotted("k", ["00", "01"]), [dotted("k", ["02", "03"])]),
        (dotted("k", ["00"]), [dotted("k", ["01"])]),
        (dotted("k", ["01", "02"]), [dotted("k", ["00"])]),
        (dotted("k", ["00", "01"]), [dotted("k", ["02"]), dotted("k", ["03"])]),
        (dotted("k", ["00", "01"]), [dotted("k", ["00", "01", "02"])]),
        (images("k", ["00", "01"]), [dotted("k", ["02"])]),
        ([("k.png", picture(0))], [dotted("k", ["01"])]),
        ([("k.mp4", small_video())], [[("k.png", picture(0))]]),
    ],
    ids=["halves", "1 and 1", "end first", "three tars", "more", "two layouts", "1 without a number", "its preview"],
)
@pytest.mark.quick_sets(16)
def test_no_part_of_a_video_that_tars_cut_is_learned(
    with_text: Members, without: list[Members], folder: str, swapped: bool, tmp_path: Path
) -> None:
    parts = [[*with_text, ("k.json", TALK)], *without]
    for tar, members in zip("abc", parts[::-1] if swapped else parts, strict=False):
        others = samples([f"{tar}{n}" for n in range(2)], "png", "json")
        write_tar(
            tmp_path / f"{tar}.tar", [*others[:2], *((folder + name, each) for name, each in members), *others[2:]]
        )
    frames, _ = found(tmp_path)
    assert frames == {f"{tar}{n}": [1] for tar in "abc"[: len(parts)] for n in range(2)}
    bad = json.loads((tmp_path / MANIFEST).read_bytes())["bad_samples"]
    assert {tar: list(left) for tar, left in bad.items()} == {
        f"{tar}.tar": [f"{folder}k"] for tar in "abc"[: len(parts)]
    }
    text_in = "abc"[len(parts) - 1 if swapped else 0]
    reason = bad[f"{text_in}.tar"][f"{folder}k"]
    assert re.search(rf"{DIVIDED[:35]}.*{folder}k\.(\d+\.)?png without text", reason)
    assert any(reason in problem for problem in validate(tmp_path)["problems"])
    content = contents(tmp_path)
    make_manifests(tmp_path, again=True, max_broken_share=1.0)
    assert contents(tmp_path) == content


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([*dotted("k", ["00", "01"]), ("k.json", TALK)], dotted("k", ["0", "1"])),
        ([*dotted("k", ["00", "01"]), ("k.json", TALK)], dotted("k", ["00"])),
        ([("k.png", picture(0)), ("k.json", TALK)], [("k.jpg", picture(0))]),
        ([*dotted("k", ["00"]), ("k.json", TALK)], [*dotted("k", ["00", "01"]), ("k.json", TALK)]),
        ([("k.json", TALK)], [*dotted("k", ["00", "01"]), ("k.json", TALK)]),
        ([*dotted("k", ["00"]), ("k.json", TALK)], [("k.json", TALK)]),
    ],
)
def test_another_sample_of_the_same_key_in_another_tar_takes_nothing_away(
    first: Members, second: Members, tmp_path: Path
) -> None:
    """The second tar uses the same key for another sample, which is complete or has lost its text."""
    write_tar(tmp_path / "a.tar", first)
    write_tar(tmp_path / "b.tar", [*GOOD, *second])
    make_manifests(tmp_path, max_broken_share=1.0)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    assert [shard["samples"] for shard in manifest["shards"]] == [1, 2 + ("k.json" in dict(second))]
    assert "a.tar" not in manifest["bad_samples"]


def samples(keys: list[str], *endings: str) -> Members:
    content = {"png": picture(1), "json": TALK}
    return [(f"{key}.{ending}", content[ending]) for key in keys for ending in endings]


def numbers(first: int, end: int) -> list[str]:
    return [f"{n:06d}" for n in range(first, end)]


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_images_of_keys_of_their_own_may_be_many_and_have_the_limit_of_all_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", [("lay.json", TALK), *samples([f"lay_{n:04d}" for n in range(1100)], "png")])
    make_manifests(tmp_path)
    assert ShardSet(tmp_path).columns["frames"].tolist() == [1100]
    assert validate(tmp_path)["frames"] == {"1100": 1}
    monkeypatch.setattr(shard_index, "MOST_PARTS", 1100)
    make_manifests(tmp_path, again=True, max_broken_share=1.0)
    bad = json.loads((tmp_path / MANIFEST).read_bytes())["bad_samples"]
    assert bad == {"a.tar": {"lay": "it has 1101 parts, more than the 1100 that a sample may have"}}


@pytest.mark.parametrize("again", [False, True])
def test_a_refused_manifest_leaves_a_set_as_it_was(again: bool, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(numbers(0, 20), "json"))
    make_manifests(tmp_path)
    before = contents(tmp_path)
    write_tar(tmp_path / "b.tar", [*samples(numbers(0, 5), "png"), *samples(["x"], "png", "json")])
    with pytest.raises(ValueError, match=r"10 of 26 samples in .* are bad"):
        make_manifests(tmp_path, again)
    assert before.items() <= contents(tmp_path).items()
    assert len(ShardSet(tmp_path)) == 20
    for path in (tmp_path / "b.tar", index_path(tmp_path / "b.tar")):
        path.unlink()
    make_manifests(tmp_path)
    assert contents(tmp_path) == before


def test_indices_made_anew_are_written_with_their_manifest_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(numbers(0, 4), "json"))
    make_manifests(tmp_path)
    before = contents(tmp_path)
    # of the same size, so that the size does not reveal that the index is of another tar
    write_tar(tmp_path / "a.tar", [*samples(numbers(0, 3), "json"), ("000003.json", b"{" * len(TALK))])
    with pytest.raises(ValueError, match=r"1 of 4 samples in .* are bad"):
        make_manifests(tmp_path, again=True)
    after = contents(tmp_path)
    assert after.pop("a.tar") != before.pop("a.tar")
    assert after == before
    make_manifests(tmp_path, again=True, max_broken_share=0.5)
    assert len(ShardSet(tmp_path)) == 3


def test_what_is_left_out_depends_on_the_tars_that_are_there_and_not_on_earlier_manifests(tmp_path: Path) -> None:
    """The set is `a.tar` alone, then with an image of x in `b.tar`, then `a.tar` alone again."""
    write_tar(tmp_path / "a.tar", samples(["x", "y"], "json"))
    assert found(tmp_path) == ({"x": [], "y": []}, {})
    alone = contents(tmp_path)
    write_tar(tmp_path / "b.tar", [*samples(["x"], "png"), *samples([f"w{n}" for n in range(9)], "png", "json")])
    make_manifests(tmp_path, max_broken_share=1.0)
    bad = json.loads((tmp_path / MANIFEST).read_bytes())["bad_samples"]
    assert {name: list(left) for name, left in bad.items()} == {"a.tar": ["x"], "b.tar": ["x"]}
    assert re.search(DIVIDED, bad["a.tar"]["x"])
    assert contents(tmp_path)["a.tar.index.npz"] == alone["a.tar.index.npz"]
    with_both = ShardSet(tmp_path)
    assert [with_both.key(n) for n in range(len(with_both))] == ["y", *(f"w{n}" for n in range(9))]
    for path in (tmp_path / "b.tar", index_path(tmp_path / "b.tar")):
        path.unlink()
    assert found(tmp_path) == ({"x": [], "y": []}, {})
    assert contents(tmp_path) == alone
    # counts and checkpoints of one set are not used for the other
    assert with_both.hashes("s")["s/a.tar"] != ShardSet(tmp_path).hashes("s")["s/a.tar"]
    assert with_both.left_out(0).keys() == {"x"}


def test_an_index_without_a_sample_that_an_earlier_version_found_divided_is_made_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(["x", "y"], "json"))
    make_manifests(tmp_path)
    stored = index_path(tmp_path / "a.tar").read_bytes()
    index = ShardIndex.from_bytes(stored, "a")
    earlier = replace(index.without(["x"]), bad={"x": f"{ELSEWHERE} b.tar has x without text"})
    index_path(tmp_path / "a.tar").write_bytes(earlier.to_bytes())
    assert found(tmp_path) == ({"x": [], "y": []}, {})
    assert index_path(tmp_path / "a.tar").read_bytes() == stored


def test_an_index_that_does_not_say_which_images_have_no_text_is_made_anew(tmp_path: Path) -> None:
    """Earlier versions stored only the keys, or nothing."""
    write_tar(tmp_path / "a.tar", [*dotted("k", ["00", "01"]), ("k.json", TALK)])
    write_tar(tmp_path / "b.tar", [*GOOD, *dotted("k", ["02"])])
    make_manifests(tmp_path, max_broken_share=1.0)
    expected = contents(tmp_path)
    for kept in ([], ["textless"]):
        with np.load(index_path(tmp_path / "b.tar")) as arrays:
            earlier = {name: each for name, each in arrays.items() if name in kept or not name.startswith("textless")}
        np.savez(index_path(tmp_path / "b.tar"), **earlier)
        assert ShardIndex.from_bytes(index_path(tmp_path / "b.tar").read_bytes(), "b").textless is None
        make_manifests(tmp_path, max_broken_share=1.0)
        assert contents(tmp_path) == expected


@pytest.mark.parametrize("text", ["caption", "conversations"])
def test_videos_that_tars_cut_are_refused_where_several_writers_number_from_0(text: str, tmp_path: Path) -> None:
    """Each writer numbers its keys from 0. The other writer's video of the same key is refused as well."""
    content = json.dumps({"caption": "a cup"}).encode() if text == "caption" else TALK
    for writer in range(2):
        members = [
            member
            for number in range(20)
            for member in (
                (f"{number:06d}.json", content),
                *((f"{number:06d}_{frame:03d}.png", picture(frame)) for frame in range(6)),
            )
        ]
        for shard, first in enumerate(range(0, len(members), 40)):
            write_tar(tmp_path / f"rank{writer}-{shard}.tar", members[first : first + 40])
    make_manifests(tmp_path, max_broken_share=1.0)
    frames = ShardSet(tmp_path).columns["frames"]
    assert len(frames) > 20
    assert set(frames.tolist()) == {6}


def test_a_sample_that_is_divided_where_one_tar_ends_is_found_beside_many_whole_ones(tmp_path: Path) -> None:
    """Its key belongs to no other sample. Therefore most samples being complete proves nothing about it."""
    write_tar(tmp_path / "a.tar", [*samples(numbers(0, 50), "png", "json"), *samples(["000050"], "png")])
    write_tar(tmp_path / "b.tar", [*samples(["000050"], "json"), *samples(numbers(51, 99), "png", "json")])
    make_manifests(tmp_path)
    bad = json.loads((tmp_path / MANIFEST).read_bytes())["bad_samples"]
    assert re.search(DIVIDED, bad["b.tar"]["000050"])


def test_tars_of_images_and_tars_of_texts_whose_keys_begin_anew_are_refused(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"images-{shard}.tar", samples(numbers(0, 4), "png"))
        write_tar(tmp_path / f"texts-{shard}.tar", samples(numbers(0, 4), "json"))
    assert found(tmp_path)[0] == {}


@pytest.mark.parametrize("long", ["png", "json"])
@pytest.mark.parametrize("mark", ["-", "/"])
def test_long_keys_with_many_marks_take_little_memory(long: str, mark: str) -> None:
    """Such a key has 244 prefixes; stored for each member of a tar, they took 68 kB of memory."""
    tail = mark * 243 + "x"
    parts = {f"{n:06d}{tail}": [(long, 0, 0)] for n in range(500)}
    parts |= {"000007": [("json" if long == "png" else "png", 0, 0)]}
    tracemalloc.start()
    try:
        _, refused = group_members(parts, ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(refused) == (["000007"] if long == "png" else [f"000007{tail}"])
    assert peak < 500 * 4000


# numbers of texts alone, complete samples and images alone in one folder, and whether the texts are read
FOLDERS = {
    "one image beside many texts, as a preview or an image of many questions": (100, 0, 1, False),
    "images that lost their texts, more than whole ones": (50, 2, 3, False),
    "fewer than whole ones": (5, 4, 3, True),
    "as many as texts": (4, 2, 4, False),
}


@pytest.mark.parametrize("folder", ["", "x/"])
@pytest.mark.parametrize("name", FOLDERS)
def test_texts_beside_more_images_without_text_than_whole_samples_are_refused(
    name: str, folder: str, tmp_path: Path
) -> None:
    texts, whole, lost, read = FOLDERS[name]
    counts = {"t": texts, "w": whole, "i": lost}
    keys = {kind: [f"{folder}{kind}{n:03d}" for n in range(count)] for kind, count in counts.items()}
    write_tar(
        tmp_path / "a.tar",
        [*samples(keys["t"], "json"), *samples(keys["w"], "png", "json"), *samples(keys["i"], "png")],
    )
    frames, named = found(tmp_path)
    assert len(named) == lost + (0 if read else texts)
    assert len(frames) == whole + (texts if read else 0)
    assert {*keys["i"]} <= {*named}  # every lost image is reported
