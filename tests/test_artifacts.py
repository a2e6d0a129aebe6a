"""Files are written whole or not at all, also when the process is killed or the disk is full."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flushes import Flushes

from keygrip import artifacts, generate, sample

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(KeyError), artifacts.atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]
    artifacts.write_bytes(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    with pytest.raises(ValueError, match="mode"), artifacts.atomic_write(path, "a"):
        pass


def test_json_that_is_none_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        artifacts.write_json(tmp_path / "x.json", {"a": object()})
    assert names(tmp_path) == []
    artifacts.write_json(tmp_path / "x.json", {"ä": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n "ä": 1\n}\n'


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    """JSON has no NaN: browsers, Go and Rust refuse a file that holds one."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = {"loss": float("nan"), "each": (1.5, np.float64("inf")), "text": "NaN"}
    artifacts.write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == {
        "loss": None,
        "each": [1.5, None],
        "text": "NaN",
    }
    assert artifacts.json_text({"ä": float("-inf"), "file": tmp_path}, ascii_only=True, default=str) == (
        f'{{"\\u00e4": null, "file": "{tmp_path}"}}'
    )
    holds_itself: list[object] = []
    holds_itself.append(holds_itself)
    with pytest.raises(ValueError, match="Circular"):
        artifacts.json_text(holds_itself)


@pytest.mark.parametrize("command", [generate.print_answers, sample.print_result])
@pytest.mark.parametrize(
    ("text", "encoding", "errors", "readable"),
    [
        ("“十”", "utf-8", "strict", True),
        ("Öl", "latin-1", "strict", True),
        ("Öl “十”", "latin-1", "strict", False),
        ("Öl “十”", "ascii", "replace", False),
        ("Öl \udcff.mp4", "utf-8", "surrogateescape", False),
        ("Öl", None, None, True),
    ],
)
def test_results_are_printed_on_every_terminal(
    command: Callable[[Any], None],
    text: str,
    encoding: str | None,
    errors: str | None,
    readable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Readable where its encoding has the characters, else escaped; never lost or altered."""
    content = io.BytesIO()
    stream = io.StringIO() if encoding is None else io.TextIOWrapper(content, encoding, errors)
    monkeypatch.setattr(sys.modules[command.__module__], "run", lambda cfg: {"answer": text})
    monkeypatch.setattr(sys, "stdout", stream)
    command(None)
    stream.flush()
    printed = stream.getvalue() if isinstance(stream, io.StringIO) else content.getvalue().decode(stream.encoding)
    assert json.loads(printed) == {"answer": text}
    assert (text in printed) == readable


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    script = (
        "import sys, time\nfrom keygrip.artifacts import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('now', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    (left,) = tmp_path.glob(".*")  # left by the killed process
    os.utime(left, (0, 0))
    artifacts.write_text(path, "new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(artifacts.DiskFullError, match=f"no space left for {path}"), artifacts.atomic_write(path):
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with pytest.raises(artifacts.DiskFullError), artifacts.atomic_folder(tmp_path / "folder") as folder:
        (folder / "part").touch()
        raise error
    assert names(tmp_path) == ["file"]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), artifacts.atomic_write(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "denied")
    with pytest.raises(RuntimeError, match="shape"), artifacts.atomic_write(tmp_path / "file"):
        raise RuntimeError("shape mismatch")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with artifacts.atomic_folder(tmp_path / "made") as folder:
        (folder / "part").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "part").read_text() == "x"
    with pytest.raises(FileExistsError, match="exists already"), artifacts.atomic_folder(tmp_path / "made"):
        pass
    (tmp_path / "empty").mkdir()
    with artifacts.atomic_folder(tmp_path / "empty") as folder:
        (folder / "part").touch()
    assert names(tmp_path) == ["empty", "made"]
    with pytest.raises(FileExistsError), artifacts.atomic_folder(tmp_path / "raced") as folder:
        (tmp_path / "raced").mkdir()
        (tmp_path / "raced" / "other").touch()
    assert names(tmp_path / "raced") == ["other"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a library wrote into it."""
    flushes = Flushes(monkeypatch, tmp_path / "made")
    with artifacts.atomic_folder(tmp_path / "made") as folder:
        (folder / "below").mkdir()
        for name in ("part", "below/part"):
            (folder / name).write_text(name)
    made = [tmp_path / "made" / name for name in ("part", "below", "below/part")]
    assert [flushes.before_target(path) for path in (tmp_path / "made", *made)] == [1, 1, 1, 1]
    assert flushes.after_target(tmp_path) == 1


@pytest.mark.parametrize(
    ("kind", "error", "raised"),
    [
        ("file", OSError(errno.ENOSPC, "No space left on device"), artifacts.DiskFullError),
        ("file", OSError(errno.EIO, "Input/output error"), OSError),
        ("folder", OSError(errno.EINVAL, "Invalid argument"), None),  # some file systems cannot flush folders
    ],
)
def test_a_file_that_cannot_be_flushed_leaves_no_folder(
    kind: str, error: OSError, raised: type[OSError] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (kind == "folder"):
            raise error

    monkeypatch.setattr(os, "fsync", refused)
    expected = contextlib.nullcontext() if raised is None else pytest.raises(raised)
    with expected, artifacts.atomic_folder(tmp_path / "made") as folder:
        (folder / "part").touch()
    assert names(tmp_path) == (["made"] if raised is None else [])


def test_a_lock_excludes_another_process_and_ends_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    script = (
        "import sys, time\nfrom keygrip.artifacts import locked\n"
        "with locked(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BlockingIOError), artifacts.locked(lock, wait=False):
            pass
        process.kill()
    deadline = time.monotonic() + 30
    while True:
        try:
            with artifacts.locked(lock, wait=False):
                break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_is_no_forked_processes_own(tmp_path: Path) -> None:
    """A loader worker that outlives a killed training for some seconds must not hold its run folder."""
    lock = tmp_path / "lock"
    script = (
        "import os, sys, time\nfrom keygrip.artifacts import locked\n"
        "with locked(sys.argv[1]):\n"
        "    if not os.fork():\n        print(os.getpid(), flush=True)\n"  # the child has released the lock by now
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(BlockingIOError), artifacts.locked(lock, wait=False):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)  # it still runs
            with artifacts.locked(lock, wait=False):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_place_without_locks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [OSError(errno.ENOSYS, "Function not implemented"), OSError(errno.ENOLCK, "No locks available")]

    def refused(*_: object) -> None:
        raise errors[0]

    monkeypatch.setattr(artifacts.fcntl, "flock", refused)
    entered = 0
    while errors:
        with artifacts.locked(tmp_path / "lock"):
            entered += 1
        errors.pop(0)
    said = f"{tmp_path} cannot be locked (Function not implemented): make sure that no other process writes into it"
    assert (entered, caplog.messages) == (2, [said])
    errors.append(OSError(errno.ENOLCK, "No locks available"))
    assert artifacts.is_locked(tmp_path / "lock") is None
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun: each process would do all of the work
    told = f"{tmp_path} cannot be locked (No locks available), so that several processes cannot divide the work: start"
    with pytest.raises(OSError, match=re.escape(told)), artifacts.locked(tmp_path / "lock"):
        pass
    with artifacts.locked(tmp_path / "lock", together_without=True):
        errors.pop()
    errors.append(OSError(errno.ENOLCK, "No locks available"))
    with pytest.raises(OSError, match=re.escape(told)):
        artifacts.make_once(tmp_path / "set", Path.is_dir, Path.mkdir)
    assert artifacts.make_once(tmp_path / "file", Path.is_file, Path.touch, together_without=True)
    errors.pop()
    assert caplog.messages == [said]
    errors.append(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"), artifacts.locked(tmp_path / "lock"):
        pass


def test_what_is_missing_is_made_by_one_process_alone(tmp_path: Path) -> None:
    target = tmp_path / "made"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom keygrip.artifacts import make_once, write_text\n"
        "def make(path):\n    time.sleep(0.3); write_text(path, 'x')\n"
        "print(make_once(sys.argv[1], Path.is_file, make))\n"
    )
    command = [sys.executable, "-c", script, str(target)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["False", "True"]
    with pytest.raises(RuntimeError, match="incomplete"):
        artifacts.make_once(tmp_path / "other", Path.is_file, lambda path: None)


def test_hashes_are_sha256(tmp_path: Path) -> None:
    content = os.urandom(3 * artifacts.BLOCK_BYTES + 5)
    (tmp_path / "file").write_bytes(content)
    assert artifacts.sha256_file(tmp_path / "file") == artifacts.sha256_bytes(content)
    assert artifacts.sha256_of(artifacts.read_blocks(tmp_path / "file", 7)) == artifacts.sha256_bytes(content[:7])
    assert artifacts.sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_what_is_complete_is_not_locked(tmp_path: Path) -> None:
    made = artifacts.make_once(tmp_path / "no" / "folder", lambda path: True, lambda path: pytest.fail("made again"))
    assert not made
    assert names(tmp_path) == []


def test_what_a_process_that_is_gone_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    """Another container with the same host name has its own process ids, so an id without a process is not enough."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    own = f"-{os.getpid()}-"
    for age, times in (("young", 0.5), ("old", 2.0)):
        then = time.time() - times * artifacts.STALE_AFTER_S
        for name in ("file", "folder", "changed_within"):
            path = artifacts.temporary_beside(tmp_path / f"{age}_{name}")
            path = path.with_name(path.name.replace(own, f"-{int(gone.stdout)}-"))
            if name == "file":
                path.touch()
            else:
                (path / "rgb").mkdir(parents=True)
                (path / "rgb" / "000000.jpg").touch()
            for each in [*path.rglob("*"), path]:
                os.utime(each, (then, then))
            if name == "changed_within":
                (path / "rgb" / "000000.jpg").touch()
    artifacts._looked.clear()  # as in a new process
    artifacts.temporary_beside(tmp_path / "next")
    left = {path.name.split(".")[1] for path in tmp_path.iterdir()}
    assert left == {"young_file", "young_folder", "young_changed_within", "old_changed_within"}


def test_what_a_process_of_another_user_writes_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifacts.temporary_beside(tmp_path / "file")
    path.touch()
    then = time.time() - 2 * artifacts.STALE_AFTER_S
    os.utime(path, (then, then))

    def refused(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    artifacts.remove_stale(tmp_path)
    assert path.exists()
