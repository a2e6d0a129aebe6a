"""Shards: written and read back, broken ones found and named, remote ones cached within their limit."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from flushes import Flushes
from shard_sets import conversations, picture, write_set

from keygrip.data import validation
from keygrip.data.bad_samples import BadSample
from keygrip.data.manifests import make_manifests
from keygrip.data.shards import index
from keygrip.data.shards.examination import ShardReport
from keygrip.data.shards.index import (
    MANIFEST,
    ShardError,
    ShardIndex,
    index_path,
    index_shard,
    members_of,
    split_name,
)
from keygrip.data.shards.reader import ShardSet, share_cache_limit, warn_of_small_cache
from keygrip.data.shards.remote import ShardCache, cache_of
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import describe_video_text, read_sample, video_text_parts
from keygrip.data.video_text.examination import report_shared
from keygrip.training.signals import Interrupted
from keygrip.worker_processes import prepare_worker


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    shards = ShardSet(write_set(tmp_path, [2, 0, 3, 1], per_shard=3))
    assert len(shards) == 4
    assert [shards.key(n) for n in range(4)] == ["s0", "s1", "s2", "s3"]
    assert shards.columns["frames"].tolist() == [2, 0, 3, 1]
    assert shards.columns["text_length"].tolist() == [len("mark s0?????s0")] * 4
    assert shards.columns["kinds"].tolist() == ["mark"] * 4
    assert shards.shard.tolist() == [0, 0, 0, 1]
    assert shards.read(3)["00.png"] == picture(3)
    sample = read_sample(shards, 2, size=8)
    assert sample.frames.shape == (3, 8, 8, 3)
    assert (sample.frames == 2).all()
    assert sample.conversations[0].turns[1].text == "s2"
    assert sample.conversations[0].evidence == {"n": 1}
    assert read_sample(shards, 1, size=8).frames.shape == (0, 8, 8, 3)


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    write_set(tmp_path, [2, 1, 0], per_shard=3)
    dataset = webdataset.WebDataset(str(tmp_path / "s-000.tar"), shardshuffle=False)
    samples = [dict(sample) for sample in dataset]
    assert [sample["__key__"] for sample in samples] == ["s0", "s1", "s2"]
    assert samples[0]["01.png"] == picture(0)
    assert json.loads(samples[2]["json"])["frames"] == 0


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(3):
            parts, _ = video_text_parts([picture(number)] * number, conversations(f"n{number}"), "x", extension="png")
            writer.write({"__key__": f"k{number}", **parts})
    manifest = write_manifest(tmp_path, describe_video_text, progress=False)
    assert manifest["samples"] == 3
    shards = ShardSet(tmp_path)
    assert [read_sample(shards, n, 8).frames.shape[0] for n in range(3)] == [0, 1, 2]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, [1, 2, 0])
    for file in ("s-000.tar", "s-000.tar.index.npz", MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert ShardSet(tmp_path / "a").fingerprint == ShardSet(tmp_path / "b").fingerprint


def test_an_index_made_from_the_tar_equals_the_writers(tmp_path: Path) -> None:
    root = write_set(tmp_path, [1, 2, 0, 5], per_shard=4)
    path = root / "s-000.tar"
    written = index_path(path).read_bytes()
    assert index_shard(path, describe_video_text).to_bytes() == written


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("k", {"json": b"{}"}, {"frames": 0})
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_keys_with_accents_are_those_that_a_reader_of_the_tar_has(tmp_path: Path) -> None:
    """macOS stores a letter and its accent as separate code points."""
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("cafe\u0301", *video_text_parts([], conversations("x"), "s"))
    write_manifest(tmp_path, describe_video_text, progress=False)
    assert ShardSet(tmp_path).key(0) == "caf\u00e9"
    assert index_shard(tmp_path / "a.tar", describe_video_text).keys.tolist() == ["caf\u00e9"]


def test_keys_that_webdataset_would_split_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        with pytest.raises(ValueError, match=r"'a\.b' cannot name a sample"):
            writer.add("a.b", {"json": b"{}"}, {"frames": 0})
        writer.add("a", {"json": b"{}"}, {"frames": 0})
        with pytest.raises(ValueError, match="the key 'a' comes twice"):
            writer.add("a", {"json": b"[]"}, {"frames": 0})
        with pytest.raises(ValueError, match=r"sample b has the columns \['length'\], those before it \['frames'\]"):
            writer.add("b", {"json": b"{}"}, {"length": 0})
    assert split_name("folder.x/key.00.jpg") == ("folder.x/key", "00.jpg")


@pytest.mark.parametrize("cut", [1, 600, 1500, "end mark", "between two samples"])
def test_a_cut_off_shard_is_found_when_indexing_and_named(tmp_path: Path, cut: int | str) -> None:
    root = write_set(tmp_path, [2] * 12, per_shard=4)
    path = root / "s-001.tar"
    whole = path.read_bytes()
    index = ShardSet(root).index(1)
    last = int(index.part_offsets[-1])
    keep = {
        "end mark": last + (int(index.part_sizes[-1]) + 511) // 512 * 512,
        "between two samples": int(index.part_offsets[index.first_part[2]]) - 512,
    }
    path.write_bytes(whole[: keep[cut]] if isinstance(cut, str) else whole[: last + 512 - cut])
    with pytest.raises(ShardError, match=r"s-001\.tar .*(cut off|not a whole tar)"):
        index_shard(path, describe_video_text)
    with pytest.raises(ShardError, match=r"s-001\.tar has \d+ bytes, its manifest says \d+"):
        ShardSet(root)
    with pytest.raises(ValueError, match=r"1 of 3 shards .* max_broken_share=0\.1 allows: .*s-001\.tar"):
        write_manifest(root, describe_video_text, progress=False)
    manifest = write_manifest(root, describe_video_text, max_broken_share=0.5, progress=False)
    assert list(manifest["broken"]) == ["s-001.tar"]
    assert manifest["samples"] == 8
    assert [ShardSet(root).key(n) for n in (3, 4)] == ["s3", "s8"]


def test_a_damaged_header_is_found(tmp_path: Path) -> None:
    root = write_set(tmp_path, [1] * 6, per_shard=6)
    path = root / "s-000.tar"
    header = int(ShardSet(root).index(0).part_offsets[4]) - 512
    overwrite(path, header + 100, b"\xff" * 40)
    with pytest.raises(ShardError, match=r"s-000\.tar"):
        index_shard(path, describe_video_text)


def test_repeated_keys_and_parts_are_left_out_by_name(tmp_path: Path) -> None:
    parts, _ = video_text_parts([], conversations("n0"), "x")
    for keys in (["a", "b", "a"], ["a", "a", "b"]):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for key in keys:
                member = tarfile.TarInfo(f"{key}.json")
                member.size = len(parts["json"])
                tar.addfile(member, io.BytesIO(parts["json"]))
        index = index_shard(tmp_path / "x.tar", describe_video_text)
        assert index.keys.tolist() == ["b"]
        assert list(index.bad) == ["a"]
        assert "it has the part 'json' twice" in index.bad["a"]


def pax_record(name: str, value: str) -> bytes:
    text = f" {name}={value}\n".encode()
    length = len(text) + 1
    while length != len(text) + len(str(length)):
        length = len(text) + len(str(length))
    return str(length).encode() + text


def tar_with_global_headers(path: Path, headers: dict[str, str]) -> Path:
    records = b"".join(pax_record(name, value) for name, value in headers.items())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("headers")
        member.type, member.size = tarfile.XGLTYPE, len(records)
        tar.addfile(member, io.BytesIO(records))
        for number in range(3):
            tar.addfile(tarfile.TarInfo(f"s{number}.txt"), io.BytesIO())
    return path


def test_global_headers_of_a_tar_are_bounded(tmp_path: Path) -> None:
    ordinary = tar_with_global_headers(tmp_path / "a.tar", {"comment": "0" * 40})
    assert [*members_of(ordinary).parts] == ["s0", "s1", "s2"]
    for headers in ({f"k{n}": "" for n in range(101)}, {"comment": "x" * 70_000}):
        found = members_of(tar_with_global_headers(tmp_path / "b.tar", headers))
        assert re.search(rf"b.tar has {len(headers)} global pax headers, more than the 100", str(found.fault))
        assert not found.parts


def test_the_members_of_a_tar_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(50):
            tar.addfile(tarfile.TarInfo(f"s{number}.txt"), io.BytesIO())
    kept, read = [], tarfile.TarFile.next

    def counted(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        kept.append(len(tar.members))
        return read(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert len(members_of(tmp_path / "a.tar").parts) == 50
    assert max(kept) <= 1


def test_a_key_of_more_parts_than_a_sample_may_have_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MOST_PARTS", 4)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, count in (("few", 4), ("many", 50)):
            for number in range(count):
                tar.addfile(tarfile.TarInfo(f"{key}.{number}"), io.BytesIO())
    found = members_of(tmp_path / "a.tar")
    assert list(found.bad) == ["many"]
    assert found.bad["many"].startswith("it has more than the 4 parts that a sample may have")
    assert "a key ends at the first dot of a name" in found.bad["many"]
    assert {key: len(parts) for key, parts in found.parts.items()} == {"few": 4, "many": 4}


def test_a_long_sample_is_indexed_from_its_tar_as_it_was_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for key, count in (("short", 5), ("long", 1100)):
            writer.add(key, *video_text_parts([picture(count % 256)] * count, conversations(key), "x", extension="png"))
    for again in (False, True):
        manifest = write_manifest(tmp_path, describe_video_text, again=again, progress=False)
        assert (manifest["samples"], manifest["bad_samples"]) == (2, {})
    assert ShardSet(tmp_path).columns["frames"].tolist() == [5, 1100]
    report = validate(tmp_path)
    assert (report["errors"], report["frames"]) == (0, {"5": 1, "1100": 1})


def test_the_columns_of_a_set_are_held_once(tmp_path: Path) -> None:
    """Those of its shards are parts of them, with the values and types of the shards' own indices."""
    root = write_set(tmp_path, [1, 2, 3, 4, 5], per_shard=2)
    stored = [ShardIndex.from_bytes(index_path(root / f"s-00{n}.tar").read_bytes(), "") for n in range(3)]
    shards = ShardSet(root)
    for number, own in enumerate(stored):
        columns = shards.index(number).columns
        assert set(columns) == set(own.columns)
        for name, values in columns.items():
            assert np.shares_memory(values, shards.columns[name])
            np.testing.assert_array_equal(values, own.columns[name])
    assert shards.columns["frames"].tolist() == [1, 2, 3, 4, 5]


def test_a_shard_with_another_type_of_column_keeps_its_own(tmp_path: Path) -> None:
    """Joined columns have one type, and validation compares each shard's own numbers with its tar."""
    for number, value in enumerate((2**53 + 1, 0.5)):
        with ShardWriter(tmp_path / f"{number}.tar") as writer:
            writer.add(f"k{number}", *video_text_parts([], conversations("x"), "s"))
        path = index_path(tmp_path / f"{number}.tar")
        own = ShardIndex.from_bytes(path.read_bytes(), path.name)
        path.write_bytes(replace(own, columns={**own.columns, "rate": np.array([value])}).to_bytes())
    write_manifest(tmp_path, describe_video_text, progress=False)
    shards = ShardSet(tmp_path)
    assert shards.columns["rate"].dtype == np.float64
    assert shards.index(0).columns["rate"].tolist() == [2**53 + 1]


def test_validation_names_an_index_of_an_earlier_version(tmp_path: Path) -> None:
    """It may lack columns that were added later; the other shards are examined."""
    write_set(tmp_path, [1] * 4, per_shard=2)
    old = ("s-000.tar", "s-001.tar")
    for name in old:
        stored = ShardIndex.from_bytes(index_path(tmp_path / name).read_bytes(), name)
        columns = {
            key: values for key, values in stored.columns.items() if key not in ("conversations", "first_answer")
        }
        index_path(tmp_path / name).write_bytes(replace(stored, columns=columns).to_bytes())
    write_manifest(tmp_path, describe_video_text, progress=False)
    report = validate(tmp_path)
    said = "its index is of an earlier version (no conversations, first_answer): step=manifest again=true"
    assert report["problems"] == [f"{tmp_path}/{name}: {said}" for name in old]
    write_manifest(tmp_path, describe_video_text, again=True, progress=False)
    assert validate(tmp_path)["errors"] == 0


def test_a_validation_that_is_stopped_does_not_examine_the_remaining_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined, pools, stopped = list[int](), list[Any](), threading.Event()

    class Threads(ThreadPoolExecutor):
        """Threads in place of processes; after the first shard their work waits until the pool is shut down."""

        def __init__(self, processes: int, context: Any, initializer: Any, arguments: Any) -> None:
            super().__init__(processes)
            pools.append((processes, initializer, arguments))

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait=wait)

    def examine(place: str, number: int) -> ShardReport:
        examined.append(number)
        assert number == 0 or stopped.wait(60)
        return ShardReport(f"{place}/{number}")

    def stop(futures: Any, **options: Any) -> Iterator[Any]:
        yield futures[0]
        raise Interrupted("stopped by SIGTERM")

    write_set(tmp_path, [1] * 40, per_shard=1)
    for name, replacement in (("ProcessPoolExecutor", Threads), ("examine_shard", examine), ("Progress", stop)):
        monkeypatch.setattr(validation, name, replacement)
    monkeypatch.setattr(validation, "usable_cores", lambda: 3)
    with pytest.raises(Interrupted):
        validate(tmp_path, processes=None)  # one per usable core
    assert pools == [(3, prepare_worker, (os.getpid(),))]
    assert len(examined) <= 4  # the first one, and those in work at the signal


def test_a_sample_may_have_as_many_parts_as_frames_are_documented() -> None:
    assert index.MOST_PARTS > index.MOST_FRAMES == 4096
    parts, row = video_text_parts([b""] * 4096, conversations("x"), "x")
    assert row["frames"] == 4096
    assert len(parts) <= index.MOST_PARTS


@pytest.mark.parametrize("count", [3, 200])
def test_names_with_several_dots_are_told_where_a_key_ends(tmp_path: Path, count: int) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("video", {f"v1.{n:06d}.{end}": b"" for n in range(count) for end in ("jpg", "json")}, {"frames": 0})
    reason = index_shard(tmp_path / "a.tar", describe_video_text).bad["video"]
    assert "only v1.000000.jpg" in reason
    assert "a key ends at the first dot of a name" in reason


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shards \(\*\.tar\) in"):
        write_manifest(tmp_path, describe_video_text)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in .*step=manifest"):
        ShardSet(tmp_path)
    root = write_set(tmp_path / "set", [1] * 4, per_shard=2)
    index_path(root / "s-000.tar").rename(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match=r"s-000\.tar\.index\.npz is missing"):
        ShardSet(root)
    shutil.copy(index_path(root / "s-001.tar"), index_path(root / "s-000.tar"))
    with pytest.raises(ShardError, match=r"s-000\.tar\.index\.npz does not belong to the manifest"):
        ShardSet(root)
    (tmp_path / "index").rename(index_path(root / "s-000.tar"))
    (root / "s-001.tar").unlink()
    with pytest.raises(ShardError, match=r"s-001\.tar is in the manifest and not in the folder"):
        ShardSet(root)


def test_a_broken_image_is_named_with_its_shard(tmp_path: Path) -> None:
    root = write_set(tmp_path, [2] * 3)
    shards = ShardSet(root)
    part = int(shards.index(0).first_part[1]) + 2
    overwrite(root / "s-000.tar", int(shards.index(0).part_offsets[part]), b"\0" * 60)
    with pytest.raises(BadSample, match=r"s1 of .*s-000\.tar: .*"):
        read_sample(shards, 1, 8)
    assert read_sample(shards, 2, 8).frames.shape == (2, 8, 8, 3)


def test_one_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    root = write_set(tmp_path, [2] * 3)
    shards, whole = ShardSet(root), (root / "s-000.tar").read_bytes()
    index = shards.index(0)
    for part in range(int(index.first_part[1]), int(index.first_part[2])):
        offset = int(index.part_offsets[part] + index.part_sizes[part] // 2)
        overwrite(root / "s-000.tar", offset, bytes([whole[offset] ^ 1]))
        with pytest.raises(
            BadSample, match=rf"s1 of .*s-000\.tar: the bytes of {index.part_names[part]} are not those"
        ):
            shards.read(1)
        assert shards.read(0)
        overwrite(root / "s-000.tar", offset, whole[offset : offset + 1])
    assert shards.read(1)


def test_an_index_without_checksums_is_refused(tmp_path: Path) -> None:
    index = ShardSet(write_set(tmp_path, [2] * 3)).index(0)
    with np.load(io.BytesIO(index.to_bytes())) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "part_crcs"}
    np.savez_compressed(tmp_path / "without.npz", **arrays)
    with pytest.raises(ShardError, match=r"s-0 is not a shard index \(.*part_crcs.*step=manifest again=true"):
        ShardIndex.from_bytes((tmp_path / "without.npz").read_bytes(), "s-0")
    with pytest.raises(ShardError, match="do not belong together"):
        ShardIndex.from_bytes(replace(index, part_crcs=np.zeros(1, np.int64)).to_bytes(), "other")


def test_a_sample_without_one_of_its_images_is_left_out_by_name(tmp_path: Path) -> None:
    parts, row = video_text_parts([picture(n) for n in range(3)], conversations("n0"), "x", extension="png")
    for gone, reason in (("01.png", r"numbered \[0, 2\]"), ("02.png", "2 images of 3"), ("00.png", "2 images of 3")):
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add("a", {name: content for name, content in parts.items() if name != gone}, row)
        index = index_shard(tmp_path / "a.tar", describe_video_text)
        assert (len(index), list(index.bad)) == (0, ["a"])
        assert re.search(reason, index.bad["a"])
        write_manifest(tmp_path, describe_video_text, progress=False)  # the writer's index, which is not checked
        with pytest.raises(BadSample, match=reason):
            read_sample(ShardSet(tmp_path), 0, 8)


def test_many_shards_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keygrip.data.shards.reader.OPEN_FILES", 2)
    shards = ShardSet(write_set(tmp_path, [1] * 12, per_shard=2))
    assert [read_sample(shards, n, 8).frames[0, 0, 0, 0] for n in (0, 11, 5, 0, 7, 11)] == [0, 11, 5, 0, 7, 11]
    assert len(shards._files) == 2
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(4) == shards.read(4)


def test_remote_shards_are_copied_once_and_within_the_limit(tmp_path: Path) -> None:
    root = write_set(tmp_path / "far", [3] * 12, per_shard=3)
    size = (root / "s-000.tar").stat().st_size
    url = f"file://{root}"
    shards = ShardSet(url, tmp_path / "near", cache_gb=2.5 * size / 1e9)
    folder = next((tmp_path / "near").iterdir())
    assert list(folder.glob("*.tar")) == []  # opening the set reads only the indices
    assert len(shards) == 12
    for sample in (0, 3, 6, 9, 0):
        assert read_sample(shards, sample, 8).key == f"s{sample}"
        shards.close()
        assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= 2.5 * size
    assert {path.name for path in folder.glob("*.tar")} == {"s-003.tar", "s-000.tar"}
    assert ShardSet(root).fingerprint == shards.fingerprint
    shutil.move(root / "s-000.tar", tmp_path / "gone.tar")
    assert read_sample(shards, 1, 8).key == "s1"  # read from the cached copy
    with pytest.raises(BadSample, match=r"s3 of file.*s-001\.tar"):
        (root / "s-001.tar").unlink()
        read_sample(shards, 3, 8)


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut it would have the expected size, without its content."""
    root = write_set(tmp_path / "far", [3], per_shard=3)
    (shard,) = root.glob("*.tar")
    flushes = Flushes(monkeypatch, tmp_path / "near" / shard.name)
    copy = ShardCache(f"file://{root}", tmp_path / "near", 10**9).fetch(shard.name)
    assert copy.read_bytes() == shard.read_bytes()
    assert flushes.before_target(copy) == 1


def test_a_copy_that_another_process_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the least recently used one when that process looked."""
    root = write_set(tmp_path / "far", [3] * 6, per_shard=3)
    shards = ShardSet(f"file://{root}", tmp_path / "near", cache_gb=1.0)
    fetch, removals = ShardCache.fetch, [True, True]

    def fetch_and_lose(self: ShardCache, name: str, *rest: Any, **options: Any) -> Path:
        path = fetch(self, name, *rest, **options)
        if removals:
            removals.pop()
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    assert read_sample(shards, 0, 8).key == "s0"
    assert removals == []
    shards.close()
    removals += [True] * 3
    with pytest.raises(BadSample, match="s3 of"):
        read_sample(shards, 3, 8)


def test_a_limit_that_spares_copies_removes_its_own_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This is the limit of an evaluation that runs next to a training with a higher limit."""
    root = write_set(tmp_path / "far", [3] * 18, per_shard=3)
    gb = (root / "s-000.tar").stat().st_size / 1e9
    url, near = f"file://{root}", tmp_path / "near"
    training = ShardSet(url, near, cache_gb=10 * gb)
    for sample in (0, 3, 6, 9):
        read_sample(training, sample, 8)
    (folder,) = near.iterdir()

    def copies() -> set[int]:
        return {int(path.stem[2:]) for path in folder.glob("*.tar")}

    sparing = ShardSet(url, near, cache_gb=2.5 * gb, spares_copies=True)
    for sample, there in ((9, {0, 1, 2, 3}), (12, {0, 1, 2, 3, 4}), (15, {0, 1, 2, 3, 5}), (12, {0, 1, 2, 3, 4})):
        assert read_sample(sparing, sample, 8).key == f"s{sample}"
        assert copies() == there
        sparing.close()
    with caplog.at_level("INFO"):
        read_sample(ShardSet(url, near, cache_gb=2.5 * gb), 9, 8)
    assert copies() == {3, 4}
    assert f"3 of 5 copies of the shards of {url}" in caplog.text
    assert f"removed from {folder}" in caplog.text


@pytest.mark.parametrize("spares", [False, True])
def test_several_sets_share_one_limit(spares: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The least recently used copy of all is removed first, also in worker processes, which unpickle the sets."""
    urls = [f"file://{write_set(tmp_path / name, [3] * 9, per_shard=3)}" for name in ("a", "b")]
    size = (tmp_path / "a" / "s-000.tar").stat().st_size
    options = {"cache_gb": 2.5 * size / 1e9, "spares_copies": spares}
    sets = [ShardSet(url, tmp_path / "near", **options) for url in urls]  # type: ignore[arg-type]
    share_cache_limit([*sets, ShardSet(tmp_path / "a")])
    sets = pickle.loads(pickle.dumps(sets))
    folders = [cache_of(url, tmp_path / "near").folder for url in urls]
    order = [(0, 0, "a0"), (1, 3, "a0 b1"), (1, 6, "b1 b2"), (0, 3, "a1 b2"), (1, 6, "a1 b2"), (0, 6, "a2 b2")]
    with caplog.at_level("INFO"):
        for seconds, (number, sample, expected) in enumerate(order):
            assert read_sample(sets[number], sample, 8).key == f"s{sample}"
            sets[number].close()
            os.utime(folders[number] / f"s-00{sample // 3}.tar", (seconds, seconds))  # the clock of files is coarse
            copies = [
                name + path.stem[-1] for name, each in zip("ab", folders, strict=True) for path in each.glob("*.tar")
            ]
            assert sorted(copies) == expected.split()
    assert caplog.text.count("1 of 3 copies of the shards of 2 shard sets") == 1
    assert f"removed from {tmp_path / 'near'}," in caplog.text


def test_copies_of_a_training_take_no_place_of_an_evaluation_of_another_split(tmp_path: Path) -> None:
    """Otherwise each shard of the evaluation would be removed as soon as the next one is copied."""
    train, val = (f"file://{write_set(tmp_path / name, [3] * 9, per_shard=3)}" for name in ("train", "val"))
    near, gb = tmp_path / "near", (tmp_path / "train" / "s-000.tar").stat().st_size / 1e9
    training = ShardSet(train, near, cache_gb=10 * gb)
    for sample in (0, 3, 6):
        read_sample(training, sample, 8)
    sets = [ShardSet(url, near, cache_gb=2.5 * gb, spares_copies=True) for url in (train, val)]
    share_cache_limit(sets)

    def copies(url: str) -> list[str]:
        return sorted(path.name for path in cache_of(url, near).folder.glob("*.tar"))

    for sample, there in ((0, ["s-000.tar"]), (3, ["s-000.tar", "s-001.tar"]), (0, ["s-000.tar", "s-001.tar"])):
        read_sample(sets[1], sample, 8)
        sets[1].close()
        assert copies(val) == there
    read_sample(sets[1], 6, 8)
    assert len(copies(val)) == 2  # its own copies stay within the limit
    read_sample(sets[0], 0, 8)
    assert copies(train) == ["s-000.tar", "s-001.tar", "s-002.tar"]


def test_a_cache_that_is_too_small_for_the_order_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_set(tmp_path / "far", [3] * 18, per_shard=3)
    gb = (root / "s-000.tar").stat().st_size / 1e9
    here, far = ShardSet(root), ShardSet(f"file://{root}", tmp_path / "near")
    with caplog.at_level("WARNING"):
        for sets, cache, window in (([here], 0.0, None), ([here, far], 6.5, None), ([far], 4.5, 2)):
            warn_of_small_cache(sets, cache * gb, window)
        assert not caplog.text
        warn_of_small_cache([here, far], 5.5 * gb, None)
        warn_of_small_cache([far], 3.5 * gb, 2)
    both, windows = (record.getMessage() for record in caplog.records)
    assert both.startswith(f"the remote shards have {6 * gb:.3g} GB, and data.cache_gb={5.5 * gb:g}: ")
    assert both.endswith("or, in a new run without data.curriculum, set data.window_shards=64 (or fewer)")
    assert windows.startswith(f"two windows of data.window_shards=2 remote shards have up to {4 * gb:.3g} GB")
    assert windows.endswith("raise data.cache_gb or, in a new run, lower data.window_shards")


def test_one_set_of_several_sources_takes_its_space_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_set(tmp_path / "far", [3] * 18, per_shard=3)
    gb = (root / "s-000.tar").stat().st_size / 1e9
    sets = [ShardSet(f"file://{root}", tmp_path / "near") for _ in range(3)]
    with caplog.at_level("WARNING"):
        warn_of_small_cache(sets, 6.5 * gb, None)
        assert not caplog.text
        warn_of_small_cache(sets, 5.5 * gb, 2)  # two windows have 4 of its shards
        assert not caplog.text
        warn_of_small_cache(sets, 5.5 * gb, None)
    assert f"the remote shards have {6 * gb:.3g} GB" in caplog.text


def test_the_cache_needs_every_shard_of_a_mixed_in_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its samples come from all of its shards in every window."""
    roots = [write_set(tmp_path / name, [3] * 3 * shards, per_shard=3) for name, shards in (("lead", 9), ("mixed", 3))]
    lead, mixed = (ShardSet(f"file://{root}", tmp_path / "near") for root in roots)
    gb = (roots[0] / "s-000.tar").stat().st_size / 1e9
    assert sum(path.stat().st_size for path in roots[1].glob("*.tar")) / 1e9 == pytest.approx(3 * gb)
    with caplog.at_level("WARNING"):
        warn_of_small_cache([lead, mixed], 7.5 * gb, 2, [mixed])
        warn_of_small_cache([lead, mixed], 6.5 * gb, 2)
        assert not caplog.text
        warn_of_small_cache([lead, mixed], 6.5 * gb, 2, [mixed, mixed])
    message = caplog.records[0].getMessage()
    assert f"with the {3 * gb:.3g} GB of the sources with a share" in message
    assert f"have up to {7 * gb:.3g} GB, and data.cache_gb={6.5 * gb:g}" in message
    assert "raise data.cache_gb, copy the sources with a share to a local folder or, in a new run, lower" in message


def test_a_missing_package_for_an_address_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if there is a copy, which would otherwise be read without looking for changes."""
    tries: list[str] = []

    def without_package(url: str, mode: str) -> None:
        tries.append(url)
        error = ImportError("Install s3fs to access S3")
        raise error from ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    monkeypatch.setattr("fsspec.open", without_package)
    cache = ShardCache("s3://bucket/set", tmp_path, 1000)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError) as caught:
        cache.fetch("manifest.json", fresh=True)
    assert str(caught.value) == "s3://bucket/set cannot be read: Install s3fs to access S3 (pip install s3fs)"
    assert tries == ["s3://bucket/set/manifest.json"]


def test_to_look_whether_a_remote_set_is_there_removes_no_shard(tmp_path: Path) -> None:
    """The copies may belong to a training, whose limit is not known here."""
    url = f"file://{write_set(tmp_path / 'far', [1])}"
    cache = cache_of(url, tmp_path / "near")
    cache.folder.mkdir(parents=True)
    with (cache.folder / "s-007.tar").open("wb") as file:
        file.truncate(2 * cache.limit)  # a sparse file
    assert cache.fetch_optional("manifest.json") is not None
    assert (cache.folder / "s-007.tar").is_file()


def test_a_remote_set_that_has_changed_is_not_read_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{write_set(tmp_path / 'far', [1] * 3)}"
    before = ShardSet(url, tmp_path / "near")
    assert len(read_sample(before, 0, 8).frames) == 1
    shutil.rmtree(tmp_path / "far")
    write_set(tmp_path / "far", [2] * 3)  # files of the same names
    after = ShardSet(url, tmp_path / "near")
    assert [len(read_sample(after, sample, 8).frames) for sample in range(3)] == [2, 2, 2]
    assert after.fingerprint != before.fingerprint
    assert "as it was" not in caplog.text
    shutil.rmtree(tmp_path / "far")  # as without a connection
    again = ShardSet(url, tmp_path / "near")
    assert len(read_sample(again, 0, 8).frames) == 2
    assert "is read as it was when it was copied" in caplog.text


def test_a_remote_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.tar").write_bytes(b"x" * 100)
    cache = ShardCache(f"file://{tmp_path / 'far'}", tmp_path / "near", 1000)
    with pytest.raises(ShardError, match=r"a\.tar has 100 bytes, its manifest says 120"):
        cache.fetch("a.tar", 120)
    assert list((tmp_path / "near").glob("*.tar")) == []
    assert cache.fetch("a.tar", 100).read_bytes() == b"x" * 100


def test_an_answer_that_is_cut_off_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the answer "range not satisfiable" (416) fsspec makes an empty file."""
    asked: list[str] = []

    class Answer(io.BytesIO):
        size = 100

    def answered(url: str, mode: str) -> Answer:
        asked.append(url)
        return Answer(b"x" * (100 if len(asked) == 2 else 0))

    monkeypatch.setattr("fsspec.open", answered)
    monkeypatch.setattr("keygrip.data.shards.remote.RETRY_S", 0.0)
    cache = ShardCache("https://far.example/set", tmp_path / "near", 1000)
    assert cache.fetch("images.json", fresh=True).read_bytes() == b"x" * 100
    assert len(asked) == 2
    with pytest.raises(ConnectionError, match=r"a\.tar cannot be read \(0 bytes came of 100\)"):
        cache.fetch("a.tar", 100)
    assert len(asked) == 5


def test_the_limit_of_copies_counts_shards_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    cache = ShardCache(f"file://{tmp_path / 'far'}", tmp_path / "near", 250)
    for number in range(4):
        (tmp_path / "far" / f"{number}.TAR").write_bytes(b"x" * 100)
        cache.fetch(f"{number}.TAR", 100)
    assert sorted(path.name for path in (tmp_path / "near").glob("*.TAR")) == ["2.TAR", "3.TAR"]


def test_rows_may_have_any_columns(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for width in (64, 32):
            writer.add(
                f"w{width}", {"jpg": b"\0" * width}, {"width": width, "aspect": width / 64, "label": f"c{width}"}
            )
    write_manifest(tmp_path, lambda parts: {}, progress=False)
    shards = ShardSet(tmp_path)
    assert shards.columns["width"].tolist() == [64, 32]
    assert shards.columns["label"].tolist() == ["c64", "c32"]
    assert shards.columns["aspect"].dtype == np.float64
    assert shards.read(1) == {"jpg": b"\0" * 32}


def test_a_bad_sample_is_left_out_by_name_and_the_rest_of_its_shard_is_kept(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(8):
            parts, row = video_text_parts([picture(number)], conversations(f"n{number}"), "x", extension="png")
            writer.add(f"s{number}", {**parts, "json": b"{"} if number == 3 else parts, row)
    index_path(tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 samples .*_share=0\.1 allows; the first: s3 of .*a\.tar: json"):
        write_manifest(tmp_path, describe_video_text, progress=False)
    for again in (False, True):  # from the index, and from the tar
        manifest = write_manifest(tmp_path, describe_video_text, max_broken_share=0.2, again=again, progress=False)
        assert (manifest["samples"], list(manifest["bad_samples"]["a.tar"])) == (7, ["s3"])
    shards = ShardSet(tmp_path)
    assert [shards.key(n) for n in range(7)] == ["s0", "s1", "s2", "s4", "s5", "s6", "s7"]
    assert [int(read_sample(shards, n, 8).frames[0, 0, 0, 0]) for n in range(7)] == [0, 1, 2, 4, 5, 6, 7]


def test_what_is_left_out_of_many_shards_is_said_in_two_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """WebVid has 20 000 shards, and bad samples in most of them."""
    for shard in range(5):
        with ShardWriter(tmp_path / f"{shard}.tar") as writer:
            for number in range(4):
                parts, row = video_text_parts([picture(number)], conversations(f"n{number}"), "x", extension="png")
                writer.add(f"s{shard}-{number}", {**parts, "json": b"{"} if number > 1 else parts, row)
        index_path(tmp_path / f"{shard}.tar").unlink()
    for shard in (3, 4):
        (tmp_path / f"{shard}.tar").write_bytes((tmp_path / f"{shard}.tar").read_bytes()[:-2000])
    write_manifest(tmp_path, describe_video_text, max_broken_share=0.8, progress=False)
    caplog.clear()
    assert len(ShardSet(tmp_path)) == 6
    shards, samples = (record.getMessage() for record in caplog.records)
    assert shards.startswith(f"2 shards of {tmp_path} are left out (named in its manifest.json); 3.tar: ")
    assert samples.startswith(
        f"6 samples in 3 shards of {tmp_path} are left out (named in its manifest.json); s0-2 of 0."
    )


@pytest.mark.parametrize(
    ("names", "frames"),
    [
        (["jpg"], 1),
        (["JPG"], 1),
        (["jpeg"], 1),
        (["00.JPG", "01.jpeg", "02.PNG"], 3),
        (["00.gif"], "unknown member '00.gif'"),
        (["00.jpg", "01.tiff"], "unknown member '01.tiff'"),
        (["seg.jpg"], "unknown member 'seg.jpg'"),
        (["frames.npy"], "unknown member 'frames.npy'"),
        (["jpg", "00.jpg"], r"images are numbered \[0, 0\]"),
    ],
)
def test_other_layouts_are_read_or_refused_by_name(tmp_path: Path, names: list[str], frames: int | str) -> None:
    parts, row = video_text_parts([], conversations("n0"), "x")
    text = parts["json"].replace(b'"frames":0', b'"fps":1')
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("key", {"json": text, **{name: picture(n) for n, name in enumerate(names)}}, row)
    index = index_shard(tmp_path / "a.tar", describe_video_text)
    if isinstance(frames, str):
        assert re.search(frames, index.bad["key"])
    else:
        assert index.columns["frames"].tolist() == [frames]
        write_manifest(tmp_path, describe_video_text, again=True, progress=False)
        found = read_sample(ShardSet(tmp_path), 0, 8).frames
        assert found[:, 0, 0, 0].tolist() == list(range(frames))


def test_images_with_other_text_in_another_split_are_said(caplog: pytest.LogCaptureFixture) -> None:
    train, val = ShardReport("set/train/a.tar", media=["x", "y", "y"]), ShardReport("set/val/a.tar", media=["z", "x"])
    report_shared([train, val])
    assert (
        "1 images or videos stand in several splits, with other text (the first in set/train, set/val)" in caplog.text
    )
    assert "divided by keys" not in caplog.text
    caplog.clear()
    report_shared([train, ShardReport("set/val/a.tar", media=["z"])])
    assert not caplog.records
    report_shared([train])
    assert "1 samples have the images or the video of another one" in caplog.text


def test_compressed_shards_are_named(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [1] * 4, per_shard=2)
    (root / "s-002.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 3 shards .*s-002\.tar\.gz is compressed.*unpack it"):
        write_manifest(root, describe_video_text, progress=False)
    (tmp_path / "s.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"s\.tar\.gz is compressed"):
        write_manifest(tmp_path, describe_video_text, progress=False)


@pytest.mark.parametrize("content", ["[]", '{"images": [{"file_name": "a.jpg"}]}'])
@pytest.mark.parametrize("place", ["", "train"])
def test_a_list_of_images_of_another_program_beside_videos_is_not_read(
    content: str, place: str, tmp_path: Path
) -> None:
    """images.json lists image shards in buckets; a downloaded set may have a file of this name."""
    root = write_set(tmp_path / "train", [1] * 4, per_shard=2)
    (root / MANIFEST).unlink()
    (tmp_path / place / "images.json").write_text(content)
    report = make_manifests(tmp_path)
    assert (report["shards"], report["samples"], report["broken"]) == (2, 4, 0)
    assert validate(tmp_path)["errors"] == 0
    assert (tmp_path / place / "images.json").read_text() == content


def test_a_manifest_that_points_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [1] * 4, per_shard=2)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["shards"][0]["name"] = "../s-000.tar"
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="does not name a file in its folder"):
        ShardSet(root)
