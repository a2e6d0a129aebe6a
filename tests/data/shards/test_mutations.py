"""Damaged and hostile video-text data: every reader skips or refuses it with a one-line message; nothing else ends a
run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from mutations import Outcomes, flipped, hostile_images, hostile_json
from shard_sets import conversations, picture, small_video

from keygrip.data.bad_samples import BadSample
from keygrip.data.shards.index import MANIFEST, index_path
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.set_writer import SETTINGS_FILE
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import describe_video_text, read_sample, video_text_parts
from keygrip.data.video_text.sources.cauldron import cauldron
from keygrip.data.video_text.sources.smoltalk import smoltalk
from keygrip.data.video_text.sources.video_sft import video_sft
from keygrip.data.video_text.sources.webvid import webvid

SIZE = 8
ROUNDS = [pytest.param(24, id="quick"), pytest.param(200, id="large", marks=pytest.mark.slow)]


def members(number: int) -> dict[str, bytes]:
    parts, _ = video_text_parts([picture(n) for n in range(number % 3)], conversations(f"n{number}"), "x", 1.0, "png")
    if number == 5:
        parts = {"json": parts["json"].replace(b'"frames":2,', b""), "mp4": small_video()}
    return parts


def write(root: Path, changes: dict[tuple[int, str], bytes | None] | None = None) -> Path:
    """Write six samples without an index; `changes` replaces members (None: without the member)."""
    with ShardWriter(root / "a.tar") as writer:
        for number in range(6):
            parts: dict[str, Any] = members(number)
            parts |= {name: content for (n, name), content in (changes or {}).items() if n == number}
            writer.add(f"s{number}", {k: v for k, v in parts.items() if v is not None}, {"frames": 0})
    index_path(root / "a.tar").unlink()
    return root


def everything(root: Path, index: bool = True) -> dict[str, Any]:
    """Return the frames (hashed) and texts of every sample that can be read."""
    if index:
        write_manifest(root, describe_video_text, max_broken_share=0.9, progress=False)
    shards, found = ShardSet(root), {}
    for number in range(len(shards)):
        try:
            sample = read_sample(shards, number, SIZE)
        except BadSample:
            continue
        frames = hashlib.sha256(sample.frames.tobytes()).hexdigest()
        found[sample.key] = (len(sample.frames), frames, sample.conversations, sample.source)
    return found


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_shards(tmp_path: Path, rounds: int) -> None:
    """Bytes of the tar are changed before and after it is indexed, and bytes of the index and the manifest.

    A tar file has no checksum of its content. A change before indexing that leaves a valid image or a valid text gives
    a different sample, and only for the sample that was changed. After indexing, the index has the checksum of every
    part.
    """
    rng, outcomes = np.random.default_rng(0), Outcomes()
    whole = everything(write(tmp_path / "whole"))
    assert len(whole) == 6
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
            if found is not None and file != "a.tar" and found != whole:
                # a manifest hashes the index, but not keys and the lists of left-out samples
                assert file == MANIFEST
            if found is not None and file == "a.tar" and not fresh:
                assert {key: whole.get(key) for key in found} == found
            if found is not None and file == "a.tar":
                assert sum(whole.get(key) != value for key, value in found.items()) <= 2
            shutil.rmtree(root)
    outcomes.assert_clean()
    assert outcomes.counts["refused"] + outcomes.counts["skipped"] > rounds


def test_hostile_members(tmp_path: Path) -> None:
    """A sample with a hostile member is left out or refused; the others of its shard are read unchanged."""
    outcomes = Outcomes()
    whole = everything(write(tmp_path / "whole"))
    others = {key: value for key, value in whole.items() if key != "s2"}
    cases: list[dict[tuple[int, str], bytes | None]] = [{(2, "01.png"): content} for content in hostile_images()]
    cases += [{(2, "json"): content} for field in (b'"conversations"', b'"frames"') for content in hostile_json(field)]
    text = json.loads(members(2)["json"])
    for turns in (
        [{"role": "user", "text": None}],
        [{"role": "assistant", "text": "x"}],
        [{"role": "wizard", "text": "x"}],
        [{"role": "user"}],
        [[]],
        "turns",
        5,
        [],
    ):
        changed = {**text, "conversations": [{"kind": "k", "turns": turns}]}
        cases.append({(2, "json"): json.dumps(changed).encode()})
    cases += [{(2, "json"): json.dumps({**text, "frames": frames}).encode()} for frames in (9, -1, None, "2", [2], 2.5)]
    cases += [
        {(2, "01.png"): None, (2, name): picture(1)} for name in ("99.png", "01.gif", "1e9.jpg", "999999999999d.png")
    ]
    cases += [{(2, name): small_video()[:cut]} for name in ("mp4", "webm") for cut in (0, 40, 900, 1200)]
    for number, changes in enumerate(cases):
        root = write(tmp_path / str(number), changes)
        found = outcomes.run(f"{[*changes][-1]} {number}", lambda root=root: everything(root), whole)
        assert found == others, (changes, outcomes.unexpected)  # neither refused nor different
    outcomes.assert_clean()


def test_a_pipe_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.tar")
    outcomes = Outcomes()
    outcomes.run("pipe", lambda: everything(tmp_path), {})
    write(tmp_path)
    assert len(outcomes.run("pipe beside a shard", lambda: everything(tmp_path), {}) or ()) == 6
    (tmp_path / "a.tar").unlink()
    os.mkfifo(tmp_path / "a.tar")
    outcomes.run("pipe after indexing", lambda: everything(tmp_path, index=False), {})
    assert outcomes.counts["refused"] == 2
    assert not outcomes.unexpected


# ---- sources ---------------------------------------------------------------------------------------------------------


def talk(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]}


def sft_folder(root: Path) -> dict[str, Any]:
    root.mkdir()
    (root / "v.mp4").write_bytes(small_video())
    (root / "i.png").write_bytes(picture(7))
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "this"}]
    entries = [{"id": n, "video": "v.mp4" if n % 2 else "i.png", "conversations": turns} for n in range(4)]
    (root / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return {"list.jsonl": lambda out: video_sft(root, out, SIZE, workers=1, max_failed_share=0.8)}


def smoltalk_folder(root: Path) -> dict[str, Any]:
    root.mkdir()
    parquet.write_table(
        arrow.Table.from_pylist([talk(n) for n in range(12)]), root / "train-0.parquet", row_group_size=6
    )
    return {"train-0.parquet": lambda out: smoltalk(root, out, 1, processes=1)}


def cauldron_folder(root: Path) -> dict[str, Any]:
    (root / "c").mkdir(parents=True)
    rows = [{"images": [{"bytes": picture(n)}], "texts": [{"user": "q", "assistant": f"a{n}"}]} for n in range(4)]
    parquet.write_table(arrow.Table.from_pylist(rows), root / "c" / "train-0.parquet")
    return {"c/train-0.parquet": lambda out: cauldron(root, out, None, SIZE, processes=1)}


def webvid_folder(root: Path) -> dict[str, Any]:
    (root / "videos" / "p").mkdir(parents=True)
    for number in range(3):
        (root / "videos" / "p" / f"{number}.mp4").write_bytes(small_video())
    lines = "".join(f"{n},p,caption {n}\n" for n in range(3))
    (root / "list.csv").write_text("videoid,page_dir,name\n" + lines)
    return {"list.csv": lambda out: webvid(root, out, SIZE, workers=1)}


def webvid_tars(root: Path) -> dict[str, Any]:
    root.mkdir()
    with ShardWriter(root / "w.tar") as writer:
        for number in range(3):
            writer.add(f"k{number}", {"mp4": small_video(), "json": b'{"caption": "c"}'}, {"n": 0})
    return {"w.tar": lambda out: webvid(root, out, SIZE, workers=1)}


FOLDERS = [sft_folder, smoltalk_folder, cauldron_folder, webvid_folder, webvid_tars]
SOURCE_ROUNDS = [pytest.param(5, id="quick"), pytest.param(40, id="large", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rounds", SOURCE_ROUNDS)
@pytest.mark.parametrize("make", FOLDERS)
def test_damaged_sources(tmp_path: Path, make: Callable[[Path], dict[str, Any]], rounds: int) -> None:
    """If a list, table or archive is damaged, entries are counted as failed, or the step ends with one line.

    Lists and texts have no checksum: a changed letter gives another text, and a changed end of a line gives other rows.
    Every row of a list is written or counted as failed; a table or archive whose samples are lost has failures.
    """
    rng, outcomes = np.random.default_rng(1), Outcomes()
    ((file, prepare),) = make(tmp_path / "source").items()

    def outcome(out: Path) -> dict[str, Any]:
        reports[out] = prepare(out)
        return everything_in(out)

    reports: dict[Path, dict[str, Any]] = {}
    whole = outcome(tmp_path / "whole")
    assert whole
    assert (reports[tmp_path / "whole"]["samples"], reports[tmp_path / "whole"]["failed"]) == (len(whole), 0)
    content = (tmp_path / "source" / file).read_bytes()
    for number in range(rounds):
        (tmp_path / "source" / file).write_bytes(flipped(content, rng))
        out = tmp_path / f"out{number}"
        found = outcomes.run(f"{file} {number}", lambda out=out: outcome(out), whole)
        if found is not None:
            written, failed = reports[out]["samples"], reports[out]["failed"]
            assert written == len(found) > 0, number
            if file.startswith("list."):
                assert written + failed == json.loads((out / SETTINGS_FILE).read_text())["items"], number
            else:
                assert failed or whole.keys() <= found.keys(), number
    outcomes.assert_clean()


def everything_in(root: Path) -> dict[str, Any]:
    shards = ShardSet(root)
    return {shards.key(n): read_sample(shards, n, SIZE).conversations for n in range(len(shards))}


def test_hostile_rows_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    root = tmp_path / "sft"
    prepare = sft_folder(root)["list.jsonl"]
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.mp4")
    bad = [
        b'{"conversations": null}',
        b'{"conversations": [1]}',
        b'{"conversations": [{"from": "human", "value": null}], "video": "v.mp4"}',
        b'{"conversations": [], "video": 3}',
        b'{"conversations": [{"from": "human", "value": "x"}], "video": {"a": 1}}',
        b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "image": "pipe.png"}',
        b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "video": "pipe.mp4"}',
        b"[" * 100_000,
        b"1e400",
        b"{",
    ]
    with (root / "list.jsonl").open("ab") as file:
        file.write(b"\n".join(bad))
    report = prepare(tmp_path / "out")
    assert (report["samples"], report["failed"]) == (4, len(bad))
