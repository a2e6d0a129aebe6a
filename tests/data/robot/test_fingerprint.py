"""A run that is resumed on other demonstrations reports what has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.fingerprint import demo_fingerprint, fingerprints, refuse_changed


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
