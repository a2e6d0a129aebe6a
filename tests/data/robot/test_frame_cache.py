"""The frame cache changes how often frames are decoded and nothing else."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot import frame_cache
from keygrip.data.robot.frame_cache import DISK_RESERVE, FrameCache, FrameShape

FRAMES, HEIGHT, WIDTH = 6, 10, 8
DEMO_BYTES = FRAMES * HEIGHT * WIDTH * 3


@dataclass(frozen=True)
class Counted:
    """Frames that depend on the demo's number and the index; each decoding appends a line to a file."""

    number: int
    log: Path
    version: int = 0

    def __len__(self) -> int:
        return FRAMES

    def read(self, index: int) -> np.ndarray:
        with self.log.open("a") as handle:
            handle.write(f"{self.number} {index}\n")
        rng = np.random.default_rng((self.number, index, self.version))
        return rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)

    def identity(self) -> str:
        return f"{self.number} {self.version}"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FrameCache]:
    def build(
        limit: int,
        demos: int = 3,
        version: int = 0,
        folder: Path | None = None,
        camera: str = "over",
        reserved: int = 0,
    ) -> FrameCache:
        sources = [Counted(number, tmp_path / "decoded", version) for number in range(demos)]
        shapes = [FrameShape(FRAMES, HEIGHT, WIDTH)] * demos
        return FrameCache(sources, shapes, folder or tmp_path / "cache", camera, limit, reserved)

    return build


def all_frames(cache: FrameCache) -> np.ndarray:
    return np.stack([cache.read(demo, frame) for demo in range(3) for frame in range(FRAMES)])


def decodings(tmp_path: Path) -> int:
    return len((tmp_path / "decoded").read_text().splitlines()) if (tmp_path / "decoded").exists() else 0


def test_on_off_and_limited_give_the_same_frames(tmp_path: Path, make: Callable[..., FrameCache]) -> None:
    reference = all_frames(make(0))
    for limit, expected in ((0, 36), (DEMO_BYTES + 500, 36 - 8), (10 * DEMO_BYTES, 18)):
        (tmp_path / "decoded").unlink()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        cache = make(limit)
        for _ in range(2):
            np.testing.assert_array_equal(all_frames(cache), reference)
        assert decodings(tmp_path) == expected
    assert (tmp_path / "cache").exists()


def test_a_limit_is_said_once(make: Callable[..., FrameCache], caplog: pytest.LogCaptureFixture) -> None:
    cache = make(DEMO_BYTES)
    all_frames(cache)
    all_frames(cache)
    assert [record.message for record in caplog.records if "decoded every time" in record.message] == [
        "the frame cache holds 0.00 of 0.00 GB of frames of camera over; the others are decoded every time "
        "(raise data.cache_gb to keep them)"
    ]


def test_a_second_process_finds_the_frames(tmp_path: Path, make: Callable[..., FrameCache]) -> None:
    first = all_frames(make(10**6))
    again = pickle.loads(pickle.dumps(make(10**6)))
    np.testing.assert_array_equal(all_frames(again), first)
    assert decodings(tmp_path) == 18


def test_changed_files_get_a_cache_of_their_own(make: Callable[..., FrameCache]) -> None:
    old = all_frames(make(10**6, version=0))
    new = all_frames(make(10**6, version=1))
    np.testing.assert_array_equal(new, all_frames(make(0, version=1)))
    assert not np.array_equal(old, new)


def read_in_process(cache: FrameCache, seed: int, queue: Any) -> None:
    rng = np.random.default_rng(seed)
    frames = {}
    for _ in range(8):
        for number in rng.permutation(18).tolist():
            demo, frame = divmod(number, FRAMES)
            frames[demo, frame] = cache.read(demo, frame).copy()
    queue.put(frames)


def test_processes_may_fill_it_at_once(tmp_path: Path, make: Callable[..., FrameCache]) -> None:
    cache = make(10**6)
    cache.read(0, 0)  # opened before the fork: children must not use the parent's files
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_in_process, args=(cache, seed, queue)) for seed in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    reference = make(0)
    for frames in results:
        for (demo, frame), picture in frames.items():
            np.testing.assert_array_equal(picture, reference.sources[demo].read(frame))


def test_lost_pixels_are_decoded_again(tmp_path: Path, make: Callable[..., FrameCache]) -> None:
    cache = make(10**6)
    reference = all_frames(cache)
    cache.close()
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    content = bytearray(pixels.read_bytes())
    content[:DEMO_BYTES] = bytes(DEMO_BYTES)  # marks were written to the disk, the first demo's pixels were not
    pixels.write_bytes(content)
    np.testing.assert_array_equal(all_frames(make(10**6)), reference)
    assert decodings(tmp_path) == 18 + FRAMES


def test_a_full_disk_is_said_and_survived(
    make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = all_frames(make(0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(all_frames(make(10**6)), reference)
    assert "no frame cache: it needs" in caplog.text
    monkeypatch.undo()

    def refuse(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    cache = make(10**6)
    monkeypatch.setattr(os, "pwrite", refuse)
    np.testing.assert_array_equal(all_frames(cache), reference)
    assert caplog.text.count("stops growing") == 1


def test_caches_of_several_cameras_share_the_free_space(
    tmp_path: Path, make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files are sparse: what the first cache will fill still counts as free."""
    size = 3 * FRAMES * HEIGHT * WIDTH * 3
    free = DISK_RESERVE + size + size // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))  # type: ignore[attr-defined]
    first = make(10**6)
    assert (first.limit_bytes, first.unwritten_bytes) == (size, size)
    assert make(10**6, camera="front").limit_bytes == size
    assert "no frame cache" not in caplog.text
    assert make(10**6, camera="hand", reserved=first.unwritten_bytes).limit_bytes == 0
    assert "no frame cache: it needs" in caplog.text
    all_frames(first)
    assert make(10**6).unwritten_bytes < size  # what is on the disk is no longer counted


def test_a_folder_that_cannot_be_written_is_said_and_survived(
    tmp_path: Path, make: Callable[..., FrameCache], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    np.testing.assert_array_equal(all_frames(make(10**6, folder=tmp_path / "file")), all_frames(make(0)))
    assert "cannot be written" in caplog.text


def test_old_unused_caches_are_removed_and_used_ones_kept(
    tmp_path: Path, make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(10**6, version=1)
    all_frames(old)
    used = make(10**6, version=2)
    all_frames(used)
    old.close()
    young = make(10**6, version=3)
    all_frames(young)
    young.close()
    long_ago = time.time() - 2 * frame_cache.STALE_AFTER_S
    for cache in (old, used):
        os.utime(cache.marks_path, (long_ago, long_ago))
    all_frames(make(10**6, version=4))
    assert not old.marks_path.exists()
    assert not old.pixels_path.exists()
    assert used.marks_path.exists()
    assert young.marks_path.exists()


def test_old_caches_of_machines_that_are_gone_are_removed(
    make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container has a new machine name at each start."""
    caches = []
    for number in range(3):
        monkeypatch.setattr(frame_cache.platform, "node", lambda number=number: f"pod-{number}")
        caches.append(make(10**6))
        all_frames(caches[-1])
    gone, young, used = caches
    for cache in (gone, young):
        cache.close()
    for cache, weeks in ((gone, 1.1), (young, 0.9), (used, 1.1)):
        long_ago = time.time() - weeks * frame_cache.STALE_ELSEWHERE_S
        os.utime(cache.marks_path, (long_ago, long_ago))
    monkeypatch.setattr(frame_cache.platform, "node", lambda: "pod-9")
    make(10**6)
    assert not gone.marks_path.exists()
    assert not gone.pixels_path.exists()
    assert young.marks_path.exists()
    assert used.marks_path.exists()


def test_caches_that_cannot_be_removed_are_left(
    make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache may belong to another user of a shared set, may just have been removed by another process that starts, or
    may be in use again."""
    caches = []
    long_ago = time.time() - 2 * frame_cache.STALE_ELSEWHERE_S
    for number in range(3):
        monkeypatch.setattr(frame_cache.platform, "node", lambda number=number: f"pod-{number}")
        caches.append(make(10**6))
    for cache in caches:
        os.utime(cache.marks_path, (long_ago, long_ago))
    foreign, used, gone = (cache.marks_path for cache in caches)
    vanished = gone.with_name(gone.name.replace("pod-2", "pod-3"))
    vanished.symlink_to("nothing")  # a listed file that does not exist
    real_open, real_lock = os.open, frame_cache.fcntl.flock

    def opened(path: Any, *rest: Any) -> int:
        if path == foreign:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *rest)

    def locked(descriptor: int, how: int) -> None:
        real_lock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), used.stat()):
            os.utime(used)

    monkeypatch.setattr(frame_cache.os, "open", opened)
    monkeypatch.setattr(frame_cache.fcntl, "flock", locked)
    monkeypatch.setattr(frame_cache.platform, "node", lambda: "pod-9")
    cache = make(10**6)
    assert cache.limit_bytes == cache.total_bytes
    assert caplog.text == ""
    assert (foreign.exists(), used.exists(), gone.exists()) == (True, True, False)


def test_names_that_begin_alike_are_others(make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """Camera "over" is not "over-left", and machine "node" is not "node-2", whose cache is kept for a week."""
    monkeypatch.setattr(frame_cache.platform, "node", lambda: "node-2")
    left, elsewhere = make(10**6, camera="over-left"), make(10**6)
    monkeypatch.setattr(frame_cache.platform, "node", lambda: "node")
    for cache, seconds in ((left, 2 * frame_cache.STALE_ELSEWHERE_S), (elsewhere, 2 * frame_cache.STALE_AFTER_S)):
        os.utime(cache.marks_path, (time.time() - seconds,) * 2)
    make(10**6)
    assert left.marks_path.exists()
    assert elsewhere.marks_path.exists()


def test_a_cache_in_use_is_never_old(
    tmp_path: Path, make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If locks of another machine are not visible, only the age of a cache shows whether it is in use."""
    long_ago = time.time() - 2 * frame_cache.STALE_ELSEWHERE_S
    cache = make(10**6)
    os.utime(cache.marks_path, (long_ago, long_ago))
    again = make(10**6)  # not opened yet
    assert time.time() - again.marks_path.stat().st_mtime < 60
    all_frames(again)
    os.utime(again.marks_path, (long_ago, long_ago))
    all_frames(again)
    assert time.time() - again.marks_path.stat().st_mtime > 60
    monkeypatch.setattr(frame_cache, "TOUCHED_EVERY_S", 0.0)
    all_frames(again)
    assert time.time() - again.marks_path.stat().st_mtime < 60

    def stale_handle(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(frame_cache.os, "utime", stale_handle)
    all_frames(again)  # no frame counts as broken


def test_frames_of_other_sizes_than_promised_are_refused(tmp_path: Path) -> None:
    source = Counted(0, tmp_path / "decoded")
    cache = FrameCache([source], [FrameShape(FRAMES, HEIGHT, WIDTH + 1)], tmp_path / "cache", "over", 10**6)
    with pytest.raises(ValueError, match="was promised"):
        cache.read(0, 0)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="keygrip")


def test_a_cache_where_nothing_can_be_locked_is_used_and_never_removed(
    make: Callable[..., FrameCache], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    refusal = OSError(errno.ENOSYS, "Function not implemented")

    def refused(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(frame_cache.fcntl, "flock", refused)
    cache = make(10**6)
    assert np.array_equal(all_frames(cache), all_frames(cache))
    assert decodings(tmp_path) == 3 * FRAMES
    assert cache.marks_path is not None
    long_ago = time.time() - 2 * frame_cache.STALE_AFTER_S
    os.utime(cache.marks_path, (long_ago, long_ago))
    assert caplog.text == ""
    for version in (1, 2):
        make(10**6, version=version)
    assert cache.marks_path.exists()
    assert caplog.messages == [f"old frame caches in {cache.marks_path.parent} are not removed: they cannot be locked"]
    refusal = OSError(errno.EIO, "Input/output error")
    all_frames(make(10**6))
    assert "no frame cache: it cannot be opened ([Errno 5] Input/output error)" in caplog.text


@pytest.mark.parametrize("shorter", [False, True])
def test_a_cache_that_cannot_be_opened_is_no_broken_frame(
    make: Callable[..., FrameCache], caplog: pytest.LogCaptureFixture, shorter: bool
) -> None:
    cache, expected = make(10**6), all_frames(make(0))
    assert cache.pixels_path is not None
    assert cache.marks_path is not None
    if shorter:
        os.truncate(cache.pixels_path, 4)
    else:
        cache.marks_path.unlink()
    open_files = len(list(Path("/dev/fd").iterdir()))
    assert np.array_equal(all_frames(cache), expected)
    assert caplog.text.count("no frame cache: it cannot be opened") == 1
    assert len(list(Path("/dev/fd").iterdir())) == open_files
