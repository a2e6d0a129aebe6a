"""Shards of robot videos: from tours, from recorded demonstrations, and text alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hydra.errors import ConfigCompositionException, InstantiationException

from keygrip.config import compose
from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter, write_demo
from keygrip.data.shards.reader import ShardSet
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import parse_conversations, read_sample
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.prepare import run
from keygrip.recording import video_text
from keygrip.recording.demonstrations import record
from keygrip.recording.video_text import (
    DemoMaker,
    conversations_of,
    make_demos,
    make_texts,
    make_tours,
    robot_videos,
    story,
)


def test_tours_become_shards_with_kinds_and_seeds_apart(tmp_path: Path) -> None:
    options = {"train": 5, "val": 2, "test": 1, "videos_per_shard": 2, "processes": 1}
    report = make_tours(tmp_path, {**options, "tour": {"image_size": 64, "min_frames": 2, "max_frames": 4}})
    assert (report["train"], report["val"], report["test"]) == (5, 2, 1)
    found = validate(tmp_path)
    assert found["errors"] == 0
    assert set(found["kinds"]) == {"caption", "mark", "cue", "glance"}
    assert found["kinds"]["caption"] == 8
    keys = {
        split: [ShardSet(tmp_path / split).key(n) for n in range(options[split])] for split in ("train", "val", "test")
    }
    assert keys["train"][0] == "tour-0000000"
    assert keys["val"] == ["tour-0500000", "tour-0500001"]
    assert keys["test"] == ["tour-1000000"]
    shards = ShardSet(tmp_path / "train")
    sample = read_sample(shards, 3, 64)
    assert len(sample.frames) == shards.columns["frames"][3]
    assert {c.kind for c in sample.conversations} <= {"caption", "mark", "cue", "glance"}
    mark = next(c for c in sample.conversations if c.kind == "mark")
    assert mark.turns[0].text.startswith("At second")
    assert set(mark.evidence) == {"frame", "colour", "pixel", "pixels_seen"}


def test_tests_have_as_many_short_tours_as_long_ones(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": 1, "val": 0, "test": 6, "processes": 1, "even_lengths": ["val", "test"]}
    make_tours(tmp_path, options | {"tour": {"image_size": 32, "min_frames": 1, "max_frames": 4}})
    frames = ShardSet(tmp_path / "test").columns["frames"].tolist()
    assert Counter(1 << (count - 1).bit_length() for count in frames) == {1: 2, 2: 2, 4: 2}
    with pytest.raises(ValueError, match="names splits"):
        make_tours(tmp_path, options | {"even_lengths": ["tests"]})


def test_a_split_has_no_fewer_samples_than_none_and_no_seeds_of_the_next(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val=-2: a split has 0 \(none\) to 500000 samples"):
        make_texts(tmp_path, {"train": 1, "val": -2, "test": 0})
    with pytest.raises(ValueError, match="train=500001"):
        make_texts(tmp_path, {"train": 500_001, "val": 1, "test": 0})
    assert not list(tmp_path.iterdir())


class LongDemo:
    """70 seconds at 10 Hz, without text of its own."""

    fps, instruction = 10.0, "lift the cube"
    cameras: ClassVar[dict[str, Any]] = {
        "front": SimpleNamespace(frames=SimpleNamespace(read=lambda n: np.full((8, 8, 3), n % 256, np.uint8)))
    }

    def __init__(self, path: Path, name: str = "pick_0") -> None:
        self.path, self.name = path, name

    def __len__(self) -> int:
        return 700


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{", "[]", '{"questions": [{}]}', '{"captions": 3}', '{"a": 1e999}']
)
def test_a_demonstration_with_a_damaged_text_is_a_bad_sample(content: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(BadSample, match=r"text\.json: "):
        list(DemoMaker("front", 8, "stretch")(SimpleNamespace(read=lambda **given: LongDemo(tmp_path))))


def test_frames_of_long_demonstrations_keep_their_seconds(tmp_path: Path) -> None:
    reference = SimpleNamespace(read=lambda **given: LongDemo(tmp_path))
    (sample,) = DemoMaker("front", 8, "stretch")(reference)
    content = json.loads(sample.parts["json"])
    assert content["frames"] == 64
    assert content["fps"] == pytest.approx(63 / 69.9)
    (whole,) = DemoMaker("front", 8, "stretch", max_frames=70)(reference)
    content = json.loads(whole.parts["json"])
    assert (content["frames"], content["fps"], whole.row["frames"]) == (70, 1.0, 70)


def test_more_frames_than_usual_are_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a setting of the step and of the set that the step writes: a set with another limit is not continued."""
    reference = SimpleNamespace(name="pick_0", read=lambda **given: LongDemo(tmp_path))
    monkeypatch.setattr(video_text, "find_demos", lambda *given: [reference])
    step = ["step=robot_videos", f"source={tmp_path}", "camera=front", "image_size=8", "val_fraction=0", "processes=1"]
    for limit, frames in ((70, 70), (65, 65)):
        run(compose("prepare", [*step, f"root={tmp_path / str(limit)}", f"max_frames={limit}"]))
        assert ShardSet(tmp_path / str(limit) / "train").columns["frames"].tolist() == [frames]
    with pytest.raises(InstantiationException, match="max_frames: 70 there, None now"):
        run(compose("prepare", [*step, f"root={tmp_path / '70'}"]))
    with pytest.raises(InstantiationException, match="max_frames=5000: a sample has 1 to 4096"):
        run(compose("prepare", [*step, f"root={tmp_path / 'more'}", "max_frames=5000"]))
    with pytest.raises(
        InstantiationException, match=r"max_frames=70 is of demonstrations.* simulated\.tour\.max_frames"
    ):
        run(compose("prepare", ["step=robot_videos", f"root={tmp_path / 'tours'}", "max_frames=70"]))


@pytest.mark.parametrize(
    "setting", ["camera=wrist", "format=native", "calibration=cameras.json", "fit=crop", "val_fraction=0.2"]
)
def test_a_setting_of_demonstrations_without_a_source_is_refused(setting: str, tmp_path: Path) -> None:
    """Otherwise a forgotten source would end in 2400 simulated tours."""
    with pytest.raises(InstantiationException, match=rf"{setting} is of demonstrations.* give source=FOLDER"):
        run(compose("prepare", ["step=robot_videos", f"root={tmp_path / 'set'}", setting]))
    assert not list(tmp_path.iterdir())


def test_settings_of_tours_are_refused_for_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = SimpleNamespace(name="pick_0", read=lambda **given: LongDemo(tmp_path))
    monkeypatch.setattr(video_text, "find_demos", lambda *given: [reference])
    step = [
        "step=robot_videos",
        f"root={tmp_path / 'set'}",
        "source=demos",
        "camera=front",
        "image_size=8",
        "processes=1",
    ]
    for setting in ("simulated.train=500", "simulated.tour.image_size=16"):
        with pytest.raises(InstantiationException, match=f"{setting} is of tours, and source=demos names"):
            run(compose("prepare", [*step, setting]))
    assert not list(tmp_path.iterdir())
    assert run(compose("prepare", step))["train"] == 1  # with tours of the same image size


def test_long_tours_are_tours_alone(tmp_path: Path) -> None:
    step = ["step=long_tours", f"root={tmp_path / 'set'}", "image_size=32", "processes=1"]
    for setting in ("source=demos", "camera=wrist", "val_fraction=0.2"):
        with pytest.raises(ConfigCompositionException, match=setting):
            compose("prepare", [*step, setting])
    few = ["simulated.val=0", "simulated.test=2", "simulated.tour.min_frames=2", "simulated.tour.max_frames=4"]
    report = run(compose("prepare", [*step, *few]))
    assert (report["train"], report["test"]) == (1, 2)
    written = ShardSet(tmp_path / "set" / "test")
    assert read_sample(written, 0, 32).frames[0].shape == (32, 32, 3)
    assert sorted(written.columns["frames"].tolist()) in ([2, 3], [2, 4]), "one of each octave"


def test_a_single_demonstration_is_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name: of this one, the hash is below the fraction."""
    reference = SimpleNamespace(name="demo_002", read=lambda **given: LongDemo(tmp_path))
    monkeypatch.setattr(video_text, "find_demos", lambda *given: [reference])
    report = robot_videos(tmp_path, tmp_path / "set", camera="front", image_size=8, val_fraction=0.1, processes=1)
    assert report["train"] == len(ShardSet(tmp_path / "set" / "train")) == 1
    assert not (tmp_path / "set" / "val").exists()


def test_demonstrations_of_like_names_keep_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["pick_0", "day/pick-1", "day-pick.1", "\u00e4" * 90]
    found = [SimpleNamespace(name=name, read=lambda name=name, **given: LongDemo(tmp_path, name)) for name in names]
    monkeypatch.setattr(video_text, "find_demos", lambda *given: found)
    report = robot_videos(tmp_path, tmp_path / "set", camera="front", image_size=8, val_fraction=0, processes=1)
    assert (report["train"], report["failed"]) == (4, 0)
    keys = [ShardSet(tmp_path / "set" / "train").key(sample) for sample in range(4)]
    assert keys[0] == "pick_0"
    assert len(set(keys)) == 4


def test_demonstrations_become_shards_with_their_text(tmp_path: Path) -> None:
    options = {"train": 3, "val": 1, "test": 0, "image_size": 64, "processes": 1}
    make_demos(tmp_path / "made", {**options, "task": {"name": "pick", "distractors": 1}})
    shards = ShardSet(tmp_path / "made" / "train")
    sample = read_sample(shards, 0, 64)
    demo = tmp_path / "made" / "demos-train" / sample.key
    metadata = json.loads((demo / "metadata.json").read_text())
    assert len(sample.frames) == -(-metadata["frames"] // 10)  # one per second of ten
    kinds = Counter(c.kind for c in sample.conversations)
    assert kinds["caption"] == 1
    assert kinds.total() > 3
    text = json.loads((demo / "text.json").read_text())
    assert sample.conversations == parse_conversations(
        {
            "conversations": [
                {"kind": c.kind, "turns": [{"role": t.role, "text": t.text} for t in c.turns], "evidence": c.evidence}
                for c in conversations_of(text)
            ]
        }
    )
    assert validate(tmp_path / "made")["errors"] == 0
    # the same recordings through the step, without their text: the instruction becomes the caption
    for folder in (tmp_path / "made" / "demos-train").glob("pick_*"):
        (folder / "text.json").unlink()
    report = robot_videos(
        tmp_path / "made" / "demos-train", tmp_path / "set", image_size=48, val_fraction=0.34, processes=1
    )
    assert (report["train"], report["val"]) == (2, 1)
    plain = read_sample(ShardSet(tmp_path / "set" / "train"), 0, 48)
    assert [c.kind for c in plain.conversations] == ["caption"]
    assert plain.conversations[0].turns[1].text == "Pick up the red cube."


def test_another_camera_is_asked_nothing_about_the_scene_of_the_first(tmp_path: Path) -> None:
    task = TaskOptions(name="pick_place", distractors=2, digits=True)
    record(task, tmp_path / "both", 1, image_size=96, cameras=("over", "front"), progress=False)
    (reference,) = find_demos(tmp_path / "both")
    demo = reference.read()
    write_demo(demo, tmp_path / "front" / demo.name, cameras=["front"])
    kinds: dict[tuple[str, str | None], set[str]] = {}
    for source, camera in (("both", None), ("both", "front"), ("front", None)):
        root = tmp_path / f"{source}-{camera}"
        robot_videos(tmp_path / source, root, camera=camera, image_size=32, val_fraction=0, processes=1)
        sample = read_sample(ShardSet(root / "train"), 0, 32)
        kinds[source, camera] = {c.kind for c in sample.conversations}
    every = kinds["both", None]
    assert every >= {"digit", "count", "goal_colour", "held_at", "moved_colour"}
    assert every & {"side_of_goal", "side_of_object"}
    of_the_scene = {"side_of_goal", "side_of_object", "nearest", "count", "shape", "digit", "goal_colour"}
    assert kinds["both", "front"] == kinds["front", None] == every - of_the_scene


@pytest.mark.parametrize(("camera", "calibrated"), [("hand", True), ("hand", False), (None, False), (None, True)])
def test_videos_need_no_calibration(tmp_path: Path, camera: str | None, calibrated: bool) -> None:
    """Without `camera`, the first calibrated camera of a demonstration is used, or the first one if none is
    calibrated."""
    unknown = {"hand": "no entry"} if calibrated else {"hand": "no entry", "over": "no entry"}
    with DemoWriter(tmp_path / "demos/demo_0", "yam", "pick", "pick it", 10.0, uncalibrated=unknown) as writer:
        for index in range(12):
            writer.add(
                index * 100_000_000,
                {"hand": np.full((16, 16, 3), 200, np.uint8), "over": np.zeros((16, 16, 3), np.uint8)},
                dict.fromkeys(("hand", "over"), CameraPose(np.diag([20.0, 20.0, 1.0]), np.eye(4))),
                {"right": ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 1.0)},
            )
    report = robot_videos(
        tmp_path / "demos", tmp_path / "set", camera=camera, image_size=16, val_fraction=0, processes=1
    )
    assert (report["train"], report["failed"]) == (1, 0)
    frames = read_sample(ShardSet(tmp_path / "set" / "train"), 0, 16).frames
    assert (np.mean([np.asarray(frame).mean() for frame in frames]) > 100) == ((camera, calibrated) != (None, True))


@pytest.mark.parametrize("camera", ["over", None])
def test_a_camera_of_which_no_video_is_made_may_be_broken(tmp_path: Path, camera: str | None) -> None:
    with DemoWriter(tmp_path / "demos/demo_0", "yam", "pick", "pick it", 10.0, uncalibrated={"hand": "x"}) as writer:
        for index in range(12):
            writer.add(
                index * 100_000_000,
                dict.fromkeys(("hand", "over"), np.zeros((16, 16, 3), np.uint8)),
                dict.fromkeys(("hand", "over"), CameraPose(np.diag([20.0, 20.0, 1.0]), np.eye(4))),
                {"right": ArmPose(np.zeros(3), np.array([1.0, 0, 0, 0]), 1.0)},
            )
    (tmp_path / "demos/demo_0/rgb/hand/000011.jpg").write_bytes(b"cut off")
    report = robot_videos(
        tmp_path / "demos", tmp_path / "set", camera=camera, image_size=16, val_fraction=0, processes=1
    )
    assert (report["train"], report["failed"]) == (1, 0)


def test_texts_are_answered_by_what_they_say() -> None:
    kinds = Counter()
    for seed in range(200):
        conversation = story(seed)
        text, reply = conversation.turns[0].text, conversation.turns[1].text
        assert story(seed) == conversation
        sentences = text.split(". ")
        if "Which digit" in text:
            colour = text.split("is on the ")[1].split()[0]
            assert f"The {colour} cube carries the digit {reply}." in text
            kinds["digit"] += 1
        elif "first" in text:
            assert sentences[0].split("points at the ")[1].startswith(reply)
            kinds["first"] += 1
        elif "last" in text:
            assert sentences[0].endswith(f"the {reply} cube")
            kinds["last"] += 1
        else:
            assert sentences[0].count("cube") == int(reply)
            kinds["count"] += 1
    assert min(kinds.values()) > 25


def test_texts_have_no_frames(tmp_path: Path) -> None:
    make_texts(tmp_path, {"train": 12, "val": 3, "test": 0})
    shards = ShardSet(tmp_path / "train")
    assert len(shards) == 12
    assert not np.any(shards.columns["frames"])
    assert set(shards.columns["kinds"].tolist()) == {"text"}


def test_the_steps_run_from_their_configs(tmp_path: Path) -> None:
    overrides = ["simulated.train=2", "simulated.val=1", "simulated.test=0", "image_size=48", "processes=1"]
    report = run(compose("prepare", ["step=robot_videos", f"root={tmp_path / 'set'}", *overrides]))
    assert report["train"] == 2
    assert run(compose("prepare", ["step=manifest", f"root={tmp_path / 'set'}", "again=true"]))["samples"] == 3
    assert run(compose("prepare", ["step=validate", f"root={tmp_path / 'set'}"]))["errors"] == 0


@pytest.mark.parametrize("step", ["smoltalk", "cauldron", "webvid", "video_sft"])
def test_steps_name_a_download_that_is_missing(step: str, tmp_path: Path) -> None:
    stage = ["stage=1"] if step == "smoltalk" else []
    cfg = compose("prepare", [f"step={step}", f"source={tmp_path / 'nothing'}", f"root={tmp_path / 'set'}", *stage])
    with pytest.raises(Exception, match="nothing"):
        run(cfg)
