"""Integrity of recordings: manifests, one check of every frame, and the version of a data set."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.data import video_index
from keygrip.data.manifests import make_manifests
from keygrip.data.robot import frames, importing, integrity
from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.importing import import_demos
from keygrip.data.robot.integrity import MANIFEST, VERIFIED, data_version, file_hashes, read_manifest
from keygrip.data.robot.samples import DemoSamples
from keygrip.data.robot.schema import Demo, DemoError
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.untrusted_files import open_image
from keygrip.data.video import frames_between, read_frame, write_video
from keygrip.launch import name_of_start

Make = Callable[..., RobotDemos]
FRAME = Path("rgb/over/000005.jpg")


@pytest.fixture
def root(native_root: Path) -> Path:
    """Write ten recordings with manifests."""
    report = make_manifests(native_root)
    assert (report["recordings"], report["written"], report["broken"]) == (10, 10, [])
    return native_root


def ready(data: RobotDemos) -> RobotDemos:
    data.setup("fit")
    return data


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", [FRAME, Path("trajectory.npz"), Path("cameras.npz"), Path("metadata.json")])
def test_a_flipped_bit_leaves_its_recording_out(root: Path, robot_demos: Make, file: Path) -> None:
    flip_a_bit(root / "demo_03" / file)
    data = ready(robot_demos(root))
    assert [error.name for error in data.broken] == ["demo_03"]
    assert len(data.demos) == 9
    if file == FRAME:
        assert f"{FRAME}: it is not the file that was recorded" in data.broken[0].reason
        assert data.origin["left_out"] == {"demo_03": data.broken[0].reason}


def test_too_many_damaged_recordings_refuse_the_run(root: Path, robot_demos: Make) -> None:
    for name in ("demo_03", "demo_08"):
        (root / name / FRAME).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 of 10 demos .* data.max_broken_share=0.1 .*demo_03: .*; demo_08: "):
        ready(robot_demos(root))
    assert len(ready(robot_demos(root, max_broken_share=0.2)).demos) == 8


def test_a_held_out_frame_that_cannot_be_read_is_left_out(native_root: Path, robot_demos: Make) -> None:
    """A neighbour in its place would count twice."""
    data = ready(robot_demos(native_root, verify=False, num_workers=0))
    demo = data.demos[data.val_indices[0]]
    before = [int(frame) for batch in data.val_dataloader() for frame in batch.frame_index]
    (demo.path / FRAME).write_bytes(b"no image")
    data = ready(robot_demos(native_root, verify=False, num_workers=0, cache_gb=0))
    after = [int(frame) for batch in data.val_dataloader() for frame in batch.frame_index]
    before.remove(5)
    assert sorted(after) == sorted(before)
    assert data.skipped.count == 1


def test_another_frame_replaces_one_that_is_several_samples() -> None:
    """Frames that a person corrected are sampled more often (`intervention_weight`)."""
    samples: Any = SimpleNamespace(
        sample_demo=np.repeat([0, 1], [23, 2]), sample_frame=np.array([4, *[5] * 20, 6, 8, 5, 6])
    )
    found = [key.sample for key in DemoSamples.candidates(samples, SampleKey(10, 3))]
    assert found[0] == 10
    assert [int(samples.sample_frame[sample]) for sample in found[1:]] == [4, 6, 8]
    assert {int(samples.sample_demo[sample]) for sample in found} == {0}


def test_without_a_manifest_every_frame_is_still_decoded(native_root: Path, robot_demos: Make) -> None:
    path = native_root / "demo_03" / FRAME
    path.write_bytes(path.read_bytes()[:-60])
    data = ready(robot_demos(native_root))
    assert [error.name for error in data.broken] == ["demo_03"]
    assert "camera 'over': frame 5 cannot be used" in data.broken[0].reason
    assert len(ready(robot_demos(native_root, verify=False)).demos) == 10


def test_recordings_are_looked_at_once(root: Path, robot_demos: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    real = integrity._verdict
    monkeypatch.setattr(integrity, "_verdict", lambda demo, *rest: checked.append(demo.name) or real(demo, *rest))
    first = ready(robot_demos(root))
    assert sorted(checked) == [f"demo_{number:02d}" for number in range(10)]
    assert ready(robot_demos(root)).contents == first.contents
    assert len(checked) == 10
    flip_a_bit(root / "demo_04" / FRAME)
    assert [error.name for error in ready(robot_demos(root)).broken] == ["demo_04"]
    assert checked[10:] == ["demo_04"]
    (root / ".keygrip" / VERIFIED).write_text('{"a": [1, 2]}')  # a damaged file of earlier results is ignored
    assert [error.name for error in ready(robot_demos(root)).broken] == ["demo_04"]
    assert len(checked) == 21


def test_images_are_decoded_by_the_check_alone(root: Path, robot_demos: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither twice at the first start, nor at a later start."""
    decoded: list[Any] = []

    def count(source: Any, *where: Any) -> Any:
        decoded.append(source)
        return open_image(source, *where)

    monkeypatch.setattr(frames, "open_image", count)
    monkeypatch.setattr(integrity, "open_image", count)
    ready(robot_demos(root))
    assert len(decoded) == 10 * 12
    ready(robot_demos(root))
    assert len(decoded) == 10 * 12
    ready(robot_demos(root, verify=False))
    assert len(decoded) == 10 * 12 + 10 * 2


@pytest.mark.parametrize("verify", [True, False])
def test_images_of_16_bits_are_refused(native_root: Path, robot_demos: Make, verify: bool) -> None:
    for name in ("000000", "000005"):
        Image.fromarray(np.zeros((40, 48), np.uint16)).save(native_root / f"demo_02/rgb/over/{name}.jpg", "PNG")
    data = ready(robot_demos(native_root, verify=verify))
    (broken,) = data.broken
    assert broken.name == "demo_02"
    assert "more than 8 bits per pixel" in broken.reason


@pytest.mark.parametrize("verify", [True, False])
def test_a_later_start_does_not_read_videos(
    native_root: Path, robot_demos: Make, change_metadata: Any, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    for folder in native_root.iterdir():
        write_video(folder / "over.mp4", np.full((12, 40, 48, 3), 90, np.uint8), fps=10)
        entry = json.loads((folder / "metadata.json").read_text())["cameras"]["over"]
        change_metadata(folder, cameras={"over": entry | {"frames": "over.mp4"}})
    assert len(ready(robot_demos(native_root, verify=verify)).demos) == 10
    video_index._load.cache_clear()
    opened: list[Path] = []
    open_container = video_index.open_container
    monkeypatch.setattr(video_index, "open_container", lambda path: opened.append(path) or open_container(path))
    assert len(ready(robot_demos(native_root, verify=verify)).demos) == 10
    assert opened == []
    write_video(native_root / "demo_04" / "over.mp4", np.full((9, 40, 48, 3), 90, np.uint8), fps=10)
    (broken,) = ready(robot_demos(native_root, verify=verify)).broken
    assert "holds 9 frames, the demo 12" in broken.reason
    assert opened == [native_root / "demo_04" / "over.mp4"]


def test_a_recording_that_was_restored_is_taken_again(root: Path, robot_demos: Make) -> None:
    """`rsync -a` restores bytes, size and time. By size and time, the recording is unchanged since it was found
    broken."""
    path = root / "demo_03" / FRAME
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip_a_bit(path)
    os.utime(path, ns=times)
    assert [error.name for error in ready(robot_demos(root)).broken] == ["demo_03"]
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert ready(robot_demos(root)).broken == []


def test_a_restored_video_gets_an_index_of_its_own(native_root: Path, robot_demos: Make, change_metadata: Any) -> None:
    """`rsync -a` restores bytes, size and time; the index of the damaged video must not remain."""
    folder = native_root / "demo_03"
    entry = json.loads((folder / "metadata.json").read_text())["cameras"]["over"]
    change_metadata(folder, cameras={"over": entry | {"frames": "over.mp4"}})
    video, whole = folder / "over.mp4", native_root.parent / "whole.mp4"
    write_video(whole, np.full((12, 40, 48, 3), 90, np.uint8), fps=10)
    write_video(video, np.full((9, 40, 48, 3), 90, np.uint8), fps=10)
    size = max(video.stat().st_size, whole.stat().st_size)
    for path in (video, whole):  # padded with an atom that players skip
        missing = size + 8 - path.stat().st_size
        with path.open("ab") as file:
            file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
    times = (video.stat().st_atime_ns, video.stat().st_mtime_ns)
    (broken,) = ready(robot_demos(native_root)).broken
    assert "holds 9 frames, the demo 12" in broken.reason
    video.write_bytes(whole.read_bytes())
    os.utime(video, ns=times)
    assert ready(robot_demos(native_root)).broken == []


TORCHRUN = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
LAUNCHERS = {  # variables of the first and the second process of a launch, and of the next launch
    "torchrun": (TORCHRUN | {"LOCAL_RANK": "0"}, TORCHRUN | {"LOCAL_RANK": "1"}, TORCHRUN | {"MASTER_PORT": "1"}),
    # the first process may have set its rendezvous already
    "srun": (
        SRUN | {"SLURM_PROCID": "0", "MASTER_PORT": "15007"},
        SRUN | {"SLURM_PROCID": "1"},
        SRUN | {"SLURM_STEP_ID": "1"},
    ),
    "lightning": ({}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {}),
}


def test_starts_that_their_launcher_gives_one_name_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun on several machines without a run id of its own sets the same variables at every launch."""
    for name, value in (TORCHRUN | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert name_of_start()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert name_of_start() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert name_of_start()


def test_starts_by_hand_have_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by mpirun or Kubernetes, which set no id, and often the same port."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert name_of_start() == ""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_one_process_leaves_out_all_of_its_start_do(
    root: Path, robot_demos: Make, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """If a disk failed for a moment, the processes would otherwise have different demonstrations in their batches."""
    names = {name for case in LAUNCHERS.values() for variables in case for name in variables}
    checked: list[str] = []
    real = integrity._checked_content
    failing = {"demo_03"}

    def check(demo: Demo, *rest: Any) -> str:
        checked.append(demo.name)
        if demo.name in failing:
            raise OSError(5, "Input/output error")
        return real(demo, *rest)

    def start(variables: dict[str, str]) -> list[str]:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        checked.clear()
        return [error.name for error in ready(robot_demos(root)).broken]

    monkeypatch.setattr(integrity, "_checked_content", check)
    first, second, again = LAUNCHERS[launcher]
    assert start(first) == ["demo_03"]
    failing.clear()
    assert (start(second), checked) == (["demo_03"], [])
    assert (start(again), checked) == ([], ["demo_03"])


@pytest.mark.parametrize("every_s", [60.0, 0.0])
def test_an_interrupted_check_goes_on_from_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float
) -> None:
    demos = [reference.read() for reference in find_demos(root)]
    checked: list[str] = []
    real, keep = integrity._verdict, integrity._keep
    kept: list[int] = []

    def interrupted(demo: Demo, *rest: Any) -> integrity.Verdict:
        if demo.name == "demo_05":
            raise KeyboardInterrupt
        return real(demo, *rest)

    monkeypatch.setattr(integrity, "KEPT_EVERY_S", every_s)
    monkeypatch.setattr(integrity, "_keep", lambda known, folder: kept.append(len(known)) or keep(known, folder))
    monkeypatch.setattr(integrity, "_verdict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        integrity.verify(demos, ["over"], False, tmp_path / "cache", threads=1)
    assert kept == ([5] if every_s else [1, 2, 3, 4, 5, 5])
    monkeypatch.setattr(integrity, "_verdict", lambda demo, *rest: checked.append(demo.name) or real(demo, *rest))
    verdicts = integrity.verify(demos, ["over"], False, tmp_path / "cache", threads=1)
    assert checked == [f"demo_{number:02d}" for number in range(5, 10)]
    assert [verdict.problem for verdict in verdicts] == [None] * 10


def test_the_version_follows_the_files_and_not_their_place(
    root: Path, robot_demos: Make, tmp_path: Path, change_metadata: Any
) -> None:
    version = ready(robot_demos(root)).origin["version"]
    moved = root.rename(tmp_path / "elsewhere")
    assert ready(robot_demos(moved)).origin["version"] == version
    for folder in moved.iterdir():
        (folder / MANIFEST).unlink(missing_ok=True)
    assert ready(robot_demos(moved)).origin["version"] == version
    change_metadata(moved / "demo_02", source={"operator": "another"})
    assert ready(robot_demos(moved)).origin["version"] != version
    assert data_version({"a": "1", "b": "2"}, []) == data_version({"b": "2", "a": "1"}, [])
    assert data_version({"a": "1", "b": "2"}, []) != data_version({"a": "1"}, [])


def test_changes_on_purpose_need_a_new_manifest(root: Path, robot_demos: Make, change_metadata: Any) -> None:
    change_metadata(root / "demo_02", instruction="another")
    assert "prepare step=manifest again=true" in ready(robot_demos(root)).broken[0].reason
    assert make_manifests(root)["written"] == 0
    assert make_manifests(root, again=True)["written"] == 10
    assert ready(robot_demos(root)).broken == []


def test_resuming_on_other_pixels_is_refused_unless_allowed(
    native_root: Path, robot_demos: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="keygrip")
    state = ready(robot_demos(native_root)).state_dict()
    frames = native_root / "demo_05" / "rgb/over"
    (frames / "000003.jpg").write_bytes((frames / "000004.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"1 changed \(demo_05\); restore them.*data.allow_changed=true"):
        ready(robot_demos(native_root)).load_state_dict(state)
    ready(robot_demos(native_root, allow_changed=True)).load_state_dict(state)
    assert "1 changed (demo_05); going on with them" in caplog.text
    del state["recordings"]  # as in an older checkpoint
    ready(robot_demos(native_root)).load_state_dict(state)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"schema": "keygrip.manifest/1", "files": {"../../x": {"bytes": 1, "sha256": "0"}}}',
     '{"schema": "keygrip.manifest/1", "files": {"metadata.json": {"bytes": "1", "sha256": "0"}}}',
     '{"schema": "keygrip.manifest/1", "files": {"metadata.json": 3}}'],
)  # fmt: skip
def test_hostile_manifests_leave_one_recording_out(root: Path, robot_demos: Make, content: str) -> None:
    (root / "demo_01" / MANIFEST).write_text(content)
    assert [error.name for error in ready(robot_demos(root)).broken] == ["demo_01"]


def test_imported_recordings_carry_their_manifest(native_root: Path, tmp_path: Path) -> None:
    import_demos(native_root, tmp_path / "imported", max_demos=2, progress=False)
    folder = tmp_path / "imported" / "demo_00"
    held = read_manifest(folder)
    assert held == file_hashes(folder)
    assert {"metadata.json", "trajectory.npz", "cameras.npz", str(FRAME)} <= set(held or {})


@pytest.mark.parametrize("video", [False, True])
def test_a_damaged_image_of_an_import_is_named(native_root: Path, tmp_path: Path, video: bool) -> None:
    damaged = native_root / "demo_00" / FRAME
    damaged.write_bytes(b"")
    summary = import_demos(
        native_root, tmp_path / "imported", video=video, max_demos=2, max_broken_share=0.5, progress=False
    )
    reason = f"camera 'over', frame 5: {damaged}: it is not an image of a known format"
    assert (summary.written, summary.broken) == (1, [("demo_00", reason)])
    assert [path.name for path in (tmp_path / "imported").glob("demo*")] == ["demo_01"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cameras": []}, r"^cameras=\[\]: name at least one camera, or leave it out for all$"),
        ({"max_demos": 0}, "^max_demos=0: it must be at least 1$"),
        ({"max_demos": -1}, "^max_demos=-1: it must be at least 1$"),
    ],
)
def test_an_import_of_nothing_is_refused(
    native_root: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        import_demos(native_root, tmp_path / "imported", **settings, progress=False)
    assert not (tmp_path / "imported").exists()


def test_a_wrong_source_of_an_import_is_named_as_its_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cube_demo.hdf5").touch()
    for name, said in (
        ("none", "does not exist; name a folder of demos with source=PATH"),
        ("empty", "is empty; record demos into it or name another with source=PATH"),
        ("cube_demo.hdf5", "is a file; name the folder that it is in with source=PATH"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{said}$"):
            import_demos(tmp_path / name, tmp_path / "imported")


def test_nothing_is_imported_into_a_recording(native_root: Path, tmp_path: Path) -> None:
    destination = tmp_path / "recorded"
    destination.mkdir()
    (destination / "recording.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a recording \(recording.json\), .* import into another folder"):
        import_demos(native_root, destination, progress=False)
    assert [path.name for path in destination.iterdir()] == ["recording.json"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a tape", "source must be an object, not 'a tape'"),
        ({"notes": "moved"}, "source.notes must be a list, not 'moved'"),
        ({"uncalibrated": "over"}, "source.uncalibrated must be an object, not 'over'"),
        ({"damaged": ["over"]}, r"source.damaged must be an object, not \['over'\]"),
    ],
)
def test_a_source_that_readers_could_not_use_is_named(
    native_root: Path, change_metadata: Any, source: Any, reason: str
) -> None:
    change_metadata(native_root / "demo_00", source=source)
    with pytest.raises(DemoError, match=reason):
        find_demos(native_root)[0].read(cameras=("side",), uncalibrated=True)


def test_another_recording_of_the_same_name_is_not_taken_for_the_imported_one(
    native_root: Path, tmp_path: Path, change_metadata: Any
) -> None:
    destination, other = tmp_path / "imported", tmp_path / "other"
    assert import_demos(native_root, destination, max_demos=2, progress=False).written == 2
    assert import_demos(native_root, destination, max_demos=2, progress=False).skipped == 2
    assert import_demos(destination, tmp_path / "again", progress=False).written == 2
    assert import_demos(destination, tmp_path / "again", progress=False).skipped == 2
    shutil.copytree(native_root, other)
    with pytest.raises(ValueError, match=r"demo_00 was imported from .* and .*other.demo_00 has a demo of the same"):
        import_demos(other, destination, progress=False)


def test_commands_of_which_poses_alone_are_kept_do_not_end_an_import(
    native_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commanded(reader: Callable[[], Demo]) -> Demo:
        demo = reader()
        arm = demo.arms["right"]
        assert arm.commanded is not None
        track = replace(arm.commanded, joints=np.zeros((len(demo), 6)), controller=np.zeros((len(demo), 2)))
        return replace(demo, arms=demo.arms | {"right": replace(arm, commanded=track)})

    given = [replace(found, reader=partial(commanded, found.reader)) for found in find_demos(native_root)]
    monkeypatch.setattr(importing, "find_demos", lambda *rest: given)
    assert import_demos(native_root, tmp_path / "imported", max_demos=2, progress=False).written == 2
    summary = import_demos(native_root, tmp_path / "imported", max_demos=3, progress=False)
    assert (summary.written, summary.skipped) == (1, 2)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda demo: replace(demo, fps=15.0), "its fps is 15.0; there it is 10.0"),
        (lambda demo: replace(demo, task="stack"), "its task is 'stack'; there it is"),
        (lambda demo: replace(demo, robot="panda"), "its robot is 'panda'; there it is"),
        (lambda demo: replace(demo, intervention=np.arange(len(demo)) == 3), "it has intervention; there it has no"),
        (lambda demo: replace(demo, intervention=np.zeros(len(demo), bool)), ""),
        (
            lambda demo: replace(
                demo, cameras={name: replace(track, depth=track.frames) for name, track in demo.cameras.items()}
            ),
            "its camera 'over' has depth images; there it has no depth images",
        ),
    ],
)
def test_an_import_is_not_continued_from_changed_recordings(
    native_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Demo], Demo],
    difference: str,
) -> None:
    import_demos(native_root, tmp_path / "imported", max_demos=2, progress=False)
    changed = [
        replace(found, reader=partial(lambda reader: change(reader()), found.reader))
        for found in find_demos(native_root)
    ]
    monkeypatch.setattr(importing, "find_demos", lambda *rest: changed)
    if not difference:
        assert import_demos(native_root, tmp_path / "imported", max_demos=2, progress=False).skipped == 2
        return
    with pytest.raises(ValueError, match=re.escape(difference)):
        import_demos(native_root, tmp_path / "imported", max_demos=2, progress=False)


def test_a_manifest_is_not_written_for_a_recording_that_cannot_be_read(native_root: Path) -> None:
    (native_root / "demo_06" / FRAME).write_bytes(b"no image")
    report = make_manifests(native_root)
    assert report["written"] == 9
    assert "demo 'demo_06': camera 'over': frame 5 cannot be used" in report["broken"][0]
    assert not (native_root / "demo_06" / MANIFEST).exists()
    json.dumps(report)
    (native_root / "demo_07" / FRAME).unlink()
    with pytest.raises(ValueError, match="2 of 10 recordings"):
        make_manifests(native_root, again=True)


def test_manifests_are_also_of_cameras_without_calibration(native_root: Path, change_metadata: Any) -> None:
    for name in ("demo_06", "demo_07"):
        entry = json.loads((native_root / name / "metadata.json").read_text())["cameras"]["over"]
        change_metadata(native_root / name, cameras={"over": entry | {"uncalibrated": "no entry"}})
    (native_root / "demo_07" / FRAME).write_bytes(b"no image")
    report = make_manifests(native_root)
    assert report["written"] == 9
    assert "demo 'demo_07': camera 'over': frame 5 cannot be used" in report["broken"][0]


def test_videos_are_decoded_in_order_by_their_own_reader(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", frames, fps=10)
    for number, image in enumerate(frames_between(tmp_path / "v.mp4", 3, 9), start=3):
        assert np.array_equal(image, read_frame(tmp_path / "v.mp4", number))
    with pytest.raises(IndexError):
        list(frames_between(tmp_path / "v.mp4", 10, 13))


def test_several_threads_read_single_frames_of_one_video(tmp_path: Path) -> None:
    """Demonstrations of one file are checked at the same time."""
    frames = np.random.default_rng(0).integers(0, 255, (60, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", frames, fps=10)
    expected = list(frames_between(tmp_path / "v.mp4", 0, 60))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda first: [read_frame(tmp_path / "v.mp4", first + i) for i in range(30)], range(30)))
    for first, part in enumerate(parts):
        np.testing.assert_array_equal(np.stack(part), np.stack(expected[first : first + 30]))
