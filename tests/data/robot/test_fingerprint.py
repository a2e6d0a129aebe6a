"""A run that is resumed on other demonstrations reports what has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.fingerprint import demo_fingerprint, fingerprints, refuse_changed, timing_fingerprint
from keygrip.data.robot.integrity import data_version
from keygrip.data.robot.schema import Demo


def test_changes_of_poses_calibration_and_instruction_are_seen(
    robot_demos: Callable[..., RobotDemos], native_root: Path
) -> None:
    data = robot_demos(native_root)
    data.setup("fit")
    demo = data.demos[0]
    same = demo_fingerprint(demo)
    assert demo_fingerprint(replace(demo, path=Path("/elsewhere"))) == same
    (name, arm), *_ = demo.arms.items()
    raised = arm.position.copy()
    raised[3, 2] += 1e-6
    assert demo_fingerprint(replace(demo, arms={name: replace(arm, position=raised)})) != same
    assert demo_fingerprint(replace(demo, instruction="another")) != same
    (view, camera), *_ = demo.cameras.items()
    moved = camera.world_to_camera + 0.01
    assert demo_fingerprint(replace(demo, cameras={view: replace(camera, world_to_camera=moved)})) != same


def test_changes_of_times_rate_and_corrected_frames_are_seen(
    robot_demos: Callable[..., RobotDemos], native_root: Path
) -> None:
    data = robot_demos(native_root)
    data.setup("fit")
    demo = data.demos[0]
    frames = np.arange(len(demo))
    same = timing_fingerprint(demo)
    assert timing_fingerprint(replace(demo, timestamps=demo.timestamps + 5_000)) == same
    assert timing_fingerprint(replace(demo, intervention=frames < 0)) == same
    later = demo.timestamps + (frames == 4)
    others = [
        replace(demo, timestamps=later),
        replace(demo, fps=20.0),
        replace(demo, intervention=frames == 3),
        replace(demo, intervention=frames == 4),
    ]
    assert len({same, *map(timing_fingerprint, others)}) == 5
    assert {demo_fingerprint(other) for other in others} == {demo_fingerprint(demo)}  # as in earlier checkpoints
    contents = {demo.name: "hash"}
    assert {data_version(contents, [other]) for other in others} == {data_version(contents, [])}  # files are hashed
    elsewhere = [replace(other, path=Path("/elsewhere")) for other in (demo, *others)]
    assert len({data_version(contents, [other]) for other in elsewhere}) == 5


def test_resuming_with_other_corrected_frames_or_times_is_refused(
    robot_demos: Callable[..., RobotDemos], native_root: Path, change_archive: Any
) -> None:
    def reread() -> RobotDemos:
        data = robot_demos(native_root, verify=False)
        data.setup("fit")
        return data

    state = reread().state_dict()
    file = native_root / "demo_03" / "trajectory.npz"
    change_archive(file, intervention=np.arange(12) == 3)
    with pytest.raises(ValueError, match=r"1 changed \(demo_03\); restore them"):
        reread().load_state_dict(state)
    change_archive(file, intervention=None)
    reread().load_state_dict(state)
    change_archive(native_root / "demo_04" / "trajectory.npz", timestamps_ns=np.arange(12) * 98_000_000)
    with pytest.raises(ValueError, match=r"1 changed \(demo_04\); restore them"):
        reread().load_state_dict(state)
    del state["timing"]  # as in an older checkpoint
    reread().load_state_dict(state)


def test_resuming_on_changed_demonstrations_stops_with_their_names(
    robot_demos: Callable[..., RobotDemos], native_root: Path
) -> None:
    data = robot_demos(native_root)
    data.setup("fit")
    state = data.state_dict()
    assert state["demonstrations"] == fingerprints(data.demos)
    data.load_state_dict(state)
    other = dict(state["demonstrations"])
    first = next(iter(other))
    state["demonstrations"] = other | {first: "x", "gone": "y"}
    with pytest.raises(ValueError, match=rf"1 removed \(gone\), 1 changed \({first}\); restore them"):
        data.load_state_dict(state)
    refuse_changed(other, other)
    with pytest.raises(ValueError, match="not those of the checkpoint: they come in another order; restore them"):
        refuse_changed(other, dict(reversed(other.items())))  # roots of several data sets, given in another order
    with pytest.raises(ValueError, match=r"5 added \(a, b, c, ...\)"):
        refuse_changed({}, dict.fromkeys("abcde", ""))


def test_checkpoints_of_one_run_hash_its_demonstrations_once(
    robot_demos: Callable[..., RobotDemos],
    native_root: Path,
    change_archive: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hashed(data: RobotDemos) -> tuple[dict[str, Any], list[str]]:
        """Return the state of two checkpoints, and the names of the demonstrations that were hashed for it."""
        names: list[str] = []
        with monkeypatch.context() as patch:
            for name, function in (("demo_fingerprint", demo_fingerprint), ("timing_fingerprint", timing_fingerprint)):

                def record(demo: Demo, function: Callable[[Demo], str] = function) -> str:
                    names.append(demo.name)
                    return function(demo)

                patch.setattr(f"keygrip.data.robot.fingerprint.{name}", record)
            states = [data.state_dict() for _ in range(2)]
            data.load_state_dict(states[0])
        assert states[0] == states[1]
        return states[0], names

    data = robot_demos(native_root, verify=False)
    assert data.state_dict()["demonstrations"] == {}
    data.setup("fit")
    state, names = hashed(data)
    assert sorted(names) == sorted(2 * [demo.name for demo in data.demos])
    assert state["demonstrations"] == fingerprints(data.demos)
    change_archive(native_root / "demo_03" / "trajectory.npz", timestamps_ns=np.arange(12) * 98_000_000)
    data.demos = []
    data.setup("fit")  # reads the changed demonstrations
    changed, names = hashed(data)
    assert sorted(names) == sorted(2 * [demo.name for demo in data.demos])
    assert [name for name in state["timing"] if state["timing"][name] != changed["timing"][name]] == ["demo_03"]


def test_demonstrations_that_a_run_trained_on_are_not_validated_on_as_held_out(
    robot_demos: Callable[..., RobotDemos], native_root: Path, native_demo: Callable[..., Path], tmp_path: Path
) -> None:
    """Which demo is held out depends on the others if none has a draw below the fraction."""
    settings = {"val_fraction": 0.2, "split_seed": 0}
    run = robot_demos(native_root)
    run.setup("fit")
    state = run.state_dict()

    def evaluate(root: Path, **changes: Any) -> list[str]:
        data = robot_demos(root, **changes)
        data.setup("validate")
        data.refuse_trained(state, settings)
        return [data.demos[index].name for index in data.val_indices]

    held_out = [run.demos[index].name for index in run.val_indices]
    assert evaluate(native_root) == held_out
    assert evaluate(Path(shutil.copytree(native_root, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))))
    for folder in ("part", "part_named_otherwise/morning"):
        for demo in run.train_demos[:3]:
            shutil.copytree(demo.path, tmp_path / folder / demo.name)
    with pytest.raises(
        ValueError, match=r"1 of 1 demonstrations .* trained on by this run: (demo_\d+)\. Errors on them"
    ):
        evaluate(tmp_path / "part")
    with pytest.raises(ValueError, match=rf": morning/demo_\d+\. .*run's own: {', '.join(held_out)}\).*data\.root="):
        evaluate(tmp_path / "part_named_otherwise")
    with pytest.raises(ValueError, match=r"of 9 demonstrations that would be validated on were trained on"):
        evaluate(native_root, val_fraction=0.99)
    with pytest.raises(ValueError, match="were trained on by this run"):
        evaluate(native_root, split_seed=2)
    for number, demo in enumerate(run.train_demos[:3]):  # other demonstrations, which happen to have the same names
        native_demo(tmp_path / "new" / demo.name, level=0.3 + 0.01 * number, seed=20 + number)
    assert len(evaluate(tmp_path / "new")) == 1
    for number, demo in enumerate(run.val_indices):
        shutil.copytree(run.demos[demo].path, tmp_path / "own" / run.demos[demo].name)
        native_demo(tmp_path / "own" / f"later_{number}", level=0.4 + 0.01 * number, seed=30 + number)
    assert set(held_out) <= set(evaluate(tmp_path / "own"))
    settings["val_fraction"] = 0.0  # the run's own, not that of the evaluation: everything was trained on
    with pytest.raises(ValueError, match=r"restore the held-out ones and leave out data\.val_fraction"):
        evaluate(native_root)
    del state["demonstrations"]  # an older checkpoint, or an export
    assert evaluate(native_root, val_fraction=0.99)
