"""Writing shard sets: in parallel and resumable; broken items are counted and never end the run."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import socket
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from shard_sets import conversations, picture

from keygrip import artifacts
from keygrip.command import describe_error
from keygrip.data.manifests import make_manifests
from keygrip.data.shards import set_writer, writer
from keygrip.data.shards.index import MANIFEST
from keygrip.data.shards.made_shards import MadeShards, complete_sets
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.set_writer import Broken, MadeSample, Written, fingerprint, write_shards
from keygrip.data.shards.writer import write_manifest
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import describe_video_text, video_text_parts
from keygrip.recording import video_text


@dataclass(frozen=True)
class NumberMaker:
    """Makes a sample for each number; multiples of 5 are broken, and number 13 also gives a broken item."""

    log: Path | None = None
    prefix: str = "n"

    def __call__(self, number: int) -> Iterable[MadeSample | Broken]:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
        if number % 5 == 0:
            raise ValueError(f"{number} is a multiple of five")
        name = f"{self.prefix}{number}"
        yield MadeSample(name, *video_text_parts([picture(number)], conversations(name), "n", 1.0, "png"))
        if number == 13:
            yield Broken("its other half is missing")


def written(root: Path, processes: int = 1, numbers: int = 20, log: Path | None = None, **options: object) -> Written:
    settings = options.pop("settings", {"made": "of numbers"})
    return write_shards(
        root,
        list(range(numbers)),
        NumberMaker(log),
        settings,
        4,
        "n",
        processes,
        progress=False,
        describe=describe_video_text,
        **options,  # type: ignore[arg-type]
    )


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_broken_items_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = written(tmp_path)
    assert (result.samples, result.written, result.failed, result.shards) == (16, 16, 5, 5)
    assert "0: 0 is a multiple of five" in result.reasons
    assert "its other half is missing" in result.reasons
    assert "5 items are broken" in caplog.text
    shards = ShardSet(tmp_path)
    assert [shards.key(n) for n in range(16)] == [f"n{n}" for n in range(20) if n % 5]


@pytest.mark.slow
def test_processes_and_interruptions_change_nothing(tmp_path: Path) -> None:
    written(tmp_path / "alone")
    written(tmp_path / "together", processes=2)
    assert files(tmp_path / "alone") == files(tmp_path / "together")
    for name in ("n-000002.tar", "n-000003.tar.index.npz", "n-000001.failed.json", MANIFEST):
        (tmp_path / "together" / name).unlink()
    log = tmp_path / "log"
    again = written(tmp_path / "together", log=log)
    assert sorted(int(line) for line in log.read_text().split()) == list(range(4, 16))  # three of the five shards
    assert again.samples == 16
    assert again.written == 9
    assert files(tmp_path / "alone") == files(tmp_path / "together")


def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> Future[object]:
        answer = Future[object]()
        answer.set_exception(BrokenProcessPool())
        return answer

    monkeypatch.setattr(ProcessPoolExecutor, "submit", killed)
    with pytest.raises(ChildProcessError) as died:
        written(tmp_path, processes=2)
    line, code = describe_error(died.value, "prepare", ())
    assert line.startswith("a process that writes shards died")
    assert "run again to continue" in line
    assert code == 1


def test_what_a_process_killed_on_another_machine_left_is_removed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a live process of this machine stay: a sample may take longer than any age."""
    here = socket.gethostname()
    for host, age, name in (("there", 3600, "there_old"), ("there", 5, "there_young"), (here, 3600, "here")):
        target = tmp_path / f"{name}.tar"
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with artifacts.atomic_write(target) as file:
            abandoned = Path(file.name)
        target.unlink()
        abandoned.write_bytes(b"half")
        os.utime(abandoned, (time.time() - age,) * 2)
    written(tmp_path)
    left = {path.name.split(".")[1] for path in tmp_path.glob(f".*{artifacts.WRITING}*")}
    assert left == {"there_young", "here"}


@dataclass(frozen=True)
class Named:
    """An item of a list that names a file, as in the sources of videos."""

    key: str
    text: str
    file: Path


def make_named(item: Named) -> Iterable[MadeSample | Broken]:
    text = f"{item.text} {item.file.read_text()}"
    yield MadeSample(item.key, *video_text_parts([picture(0)], conversations(text), "n", 1.0, "png"))


def test_shards_whose_items_or_files_have_changed_are_made_anew(tmp_path: Path) -> None:
    """A list that was corrected, or a file that was missing or has grown, causes it; moving the source does not."""
    source, root = tmp_path / "source", tmp_path / "set"

    def listed(folder: Path, *texts: str) -> list[Named]:
        return [Named(f"k{number}", text, folder / f"{number}.txt") for number, text in enumerate(texts)]

    def write(items: list[Named]) -> Written:
        return write_shards(root, items, make_named, {}, 2, "n", 1, 1.0, progress=False, describe=describe_video_text)

    source.mkdir()
    for number in (0, 1, 3):
        (source / f"{number}.txt").write_text("x")
    items = listed(source, "a", "b", "c", "d")
    first = write(items)
    assert (first.samples, first.failed, first.written) == (3, 1, 3)
    assert write(items).written == 0
    (source / "2.txt").write_text("there now")
    assert (write(items).written, write(items).samples) == (2, 4)
    (source / "0.txt").write_text("longer")
    assert write(items).written == 2
    assert write(listed(source, "a", "b", "c", "corrected")).written == 2
    assert b"corrected x" in (root / "n-000001.tar").read_bytes()
    source.rename(tmp_path / "moved")
    assert write(listed(tmp_path / "moved", "a", "b", "c", "corrected")).written == 0


def test_a_shard_made_anew_and_killed_at_any_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tar, its index and its log replace the old ones one by one; the process may end between them."""
    (tmp_path / "0.txt").write_text("x")

    def write(text: str) -> Written:
        items = [Named("k", text, tmp_path / "0.txt")]
        return write_shards(
            tmp_path / "set", items, make_named, {}, 1, "n", 1, progress=False, describe=describe_video_text
        )

    for number, (module, step) in enumerate([(set_writer, "write_json"), (writer, "write_bytes")]):
        write(f"old {number}")

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, step, killed)
            write(f"new {number}")
        assert write(f"new {number}").samples == 1
        content = (tmp_path / "set" / "n-000000.tar").read_bytes()
        assert f"new {number} x".encode() in content
        assert b"old" not in content


@dataclass(frozen=True)
class SlowMaker:
    """Makes samples slowly while another process waits for the set; the log lists the items that were made."""

    log: Path

    def __call__(self, number: int) -> Iterable[MadeSample | Broken]:
        with self.log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.1)
        yield MadeSample(f"s{number}", *video_text_parts([picture(number)], conversations("s"), "s", 1.0, "png"))


def write_slowly(root: Path) -> None:
    write_shards(
        root,
        list(range(12)),
        SlowMaker(root.parent / "log"),
        {},
        2,
        "s",
        1,
        progress=False,
        describe=describe_video_text,
    )


def test_two_processes_write_a_set_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=write_slowly, args=(tmp_path / "set",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(int(line) for line in (tmp_path / "log").read_text().split()) == list(range(12))
    assert len(ShardSet(tmp_path / "set")) == 12


def test_a_place_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(artifacts.fcntl, "flock", refused)
    assert written(tmp_path).samples == 16
    assert "cannot be locked (No locks available): make sure that no other process writes into it" in caplog.text


@pytest.mark.usefixtures("two_without_locks")
def test_several_processes_are_refused_in_a_place_without_locks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="several processes cannot divide the work: start one process alone"):
        written(tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_tours_whose_making_was_interrupted_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for whichever split was being written: a set without its held-out videos would seem complete."""

    def make(root: Path, interrupted: str | None) -> MadeShards:
        def split(place: Path, items: Sequence[int], *_: object, **__: object) -> Written:
            if place.name == interrupted:
                raise KeyboardInterrupt
            place.mkdir(parents=True, exist_ok=True)
            (place / MANIFEST).write_text("{}")
            return Written(str(place))

        monkeypatch.setattr(video_text, "write_shards", split)
        options = {"train": 2, "val": 1, "test": 1}
        return MadeShards("keygrip.recording.video_text.make_tours", options, root)

    for name in ("train", "val", "test"):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / name, name).complete()
        with pytest.raises(FileNotFoundError, match=r"no complete shards of the run in .* give data\.root=FOLDER; "):
            complete_sets({"data.root": replace(make(tmp_path / name, None), make_missing=False)})
        made = make(tmp_path / name, None)
        made.complete()
        assert sorted(path.parent.name for path in made.root.rglob(MANIFEST)) == ["test", "train", "val"]


def test_fingerprints_of_items_hold_no_addresses(tmp_path: Path) -> None:
    read = partial(make_named, Named("k", "a", tmp_path / "none"))
    assert fingerprint([read]) == fingerprint([partial(make_named, Named("k", "a", tmp_path / "none"))])
    assert fingerprint([read]) != fingerprint([partial(make_named, Named("k", "b", tmp_path / "none"))])
    assert fingerprint([object()]) == fingerprint([object()])
    assert fingerprint([{"a": (1, 2.5, None)}]) == fingerprint([{"a": [1, 2.5, None]}])


def test_sets_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(made: 'of numbers' there, 'of letters' now\)"):
        written(tmp_path, settings={"made": "of letters"})
    with pytest.raises(ValueError, match=r"items: 20 there, 24 now"):
        written(tmp_path, numbers=24)


def test_sets_whose_settings_are_not_finite_are_continued(tmp_path: Path) -> None:
    limits = {"limits": [float("nan"), float("inf")]}
    written(tmp_path, settings=limits)
    assert written(tmp_path, settings=limits).written == 0
    with pytest.raises(ValueError, match=r"limits: \['NaN', 'Infinity'\] there, \['NaN', None\] now"):
        written(tmp_path, settings={"limits": [float("nan"), None]})


def test_too_much_that_is_broken_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"16 samples, and 5 items are broken, more than .*=0\.\d+ allows, all named in .*; the first: 0: 0 is",
    ):
        written(tmp_path, max_failed_share=0.1)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="it is a share, from 0 to 1"):
            written(tmp_path / "no_share", max_failed_share=share)
    assert not (tmp_path / "no_share").exists()
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(ValueError, match=r"would hold 0 samples"):
        written(tmp_path / "none", numbers=1)
    with pytest.raises(ValueError, match=r"would hold 0 rows of A, and 1 items are broken, all named in .*; the first"):
        written(tmp_path / "allowed", numbers=1, max_failed_share=1, kind="rows of A")  # not too many are broken
    with pytest.raises(ValueError, match="nothing to write"):
        written(tmp_path / "empty", numbers=0)


def test_validation_passes_what_is_good(tmp_path: Path) -> None:
    written(tmp_path)
    report = validate(tmp_path)
    assert report["errors"] == 0
    assert (report["shards"], report["samples"]) == (5, 16)
    assert report["kinds"] == {"mark": 16}
    assert report["frames"] == {"1": 16}


def damage(root: Path, shard: str, what: bytes, by: bytes) -> None:
    content = (root / shard).read_bytes()
    assert what in content
    (root / shard).write_bytes(content.replace(what, by, 1))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_validation_names_every_kind_of_fault(tmp_path: Path, processes: int) -> None:
    for split, first in (("train", 0), ("val", 2)):
        numbers = [n for n in range(first, first + 12) if n % 5]
        write_shards(
            tmp_path / split, numbers, NumberMaker(), {}, 4, "n", 1, progress=False, describe=describe_video_text
        )
    train = tmp_path / "train"
    damage(train, "n-000000.tar", b"\x89PNG", b"\0\0\0\0")  # an image that does not decode
    damage(train, "n-000001.tar", b'"text":"n6"', b'"text":"  "')  # an answer that is empty
    damage(train, "n-000002.tar", b'"kind":"mark"', b'"kind":"cues"')  # a column that does not fit
    report = validate(tmp_path, processes)
    problems = "\n".join(report["problems"])
    assert "n1 of" in problems
    assert "n6 of" in problems
    assert "would carry no loss" in problems
    assert "n11 has kinds cues, its manifest says mark" in problems
    assert "the key n3 occurs twice" in problems
    assert "the same content occurs twice" in problems
    assert report["errors"] >= 3 + 2 * 6


def test_validation_names_samples_of_shards_without_a_good_one_and_shards_that_came_later(tmp_path: Path) -> None:
    written(tmp_path)
    for name, key in (("z-bad.tar", "lonely"), ("z-new.tar", "later")):
        with tarfile.open(tmp_path / name, "w") as file:
            part = tarfile.TarInfo(f"{key}.jpg")
            part.size = 3
            file.addfile(part, io.BytesIO(b"abc"))
        if key == "lonely":
            write_manifest(tmp_path, describe_video_text, progress=False)
    report = validate(tmp_path)
    assert report["errors"] == 2
    problems = "\n".join(report["problems"])
    assert "z-bad.tar, lonely: " in problems
    assert "z-new.tar is not in the manifest, so it is not read: run step=manifest" in problems


def test_validation_finds_an_index_of_another_tar(tmp_path: Path) -> None:
    written(tmp_path / "a")
    items = list(range(20))
    write_shards(
        tmp_path / "b", items, NumberMaker(prefix="m"), {}, 4, "n", 1, progress=False, describe=describe_video_text
    )
    shutil.copy(tmp_path / "b" / "n-000002.tar", tmp_path / "a" / "n-000002.tar")  # of the same size
    report = validate(tmp_path / "a")
    assert any("its index is not of this tar (keys differ)" in problem for problem in report["problems"])


def test_manifests_are_made_for_shards_from_elsewhere(tmp_path: Path) -> None:
    written(tmp_path / "train")
    before = files(tmp_path / "train")
    for path in (tmp_path / "train").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    report = make_manifests(tmp_path)
    assert report == {"root": str(tmp_path), "shards": 5, "samples": 16, "broken": 0, "bad_samples": 0}
    after = files(tmp_path / "train")
    assert {name: after[name] for name in after} == {name: before[name] for name in after}
    with pytest.raises(FileNotFoundError, match=r"data folder .*nothing does not exist"):
        make_manifests(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^no native recordings and no shards \(\*\.tar\) in .*empty,"):
        make_manifests(tmp_path / "empty")
    with pytest.raises(ValueError, match="https://host/set is a URL: manifests are made"):
        make_manifests("https://host/set")
