"""Observations: the code block of the docs that builds one, and the error for an observation that lacks several
entries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keygrip
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.models.dark_images import spread_of_image
from keygrip.models.policy import Needs, calibration_of, image_of, instruction_of, poses_of, refuse_incomplete, views_of
from keygrip.recording.demonstrations import record
from keygrip.runtime.plausibility import Bounds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
ONE, TWO = Needs(("right",)), Needs(("left", "right"), ("over", "front"), instruction=True, calibration=("over",))
VIEW = {"image": np.zeros((4, 6, 3), np.uint8), "intrinsics": np.eye(3), "world_to_camera": np.eye(4)}
POSE = {"position": np.zeros(3), "quaternion": [1.0, 0, 0, 0], "gripper": 1.0}


class Reads:
    """A policy that reads from an observation what its needs list."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs

    def plan(self, observation: Any) -> Any:
        refuse_incomplete(observation, self.needs)
        for view in views_of(observation, self.needs.cameras) if self.needs.cameras else [observation]:
            assert image_of(view).shape == (72, 72, 3)
            calibration_of(view)
        assert instruction_of(observation)
        position, _, _ = poses_of(observation, len(self.needs.arms))
        return type("Plan", (), {"position": position[:, None], "step_seconds": 0.1})


@pytest.mark.parametrize("cameras", [(), ("over", "front")])
def test_the_block_of_the_documents_builds_what_a_policy_reads(
    cameras: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(TaskOptions(name="reach"), tmp_path / "data" / "my_picks", 1, image_size=72, progress=False)
    section = PAGE.read_text(encoding="utf-8").partition("## An observation")[2].partition("\n## ")[0]
    (block,) = re.findall(r"(?s)```python\n(.*?)```", section)
    policy = Reads(Needs(("right",), cameras[:1], instruction=True))
    monkeypatch.setattr(keygrip, "load_policy", lambda run: policy)
    names: dict[str, Any] = {}
    exec(block, names)  # the code comes from a page of this repository
    assert np.isfinite(names["plan"].position).all()


def test_all_that_an_observation_lacks_is_said_at_once() -> None:
    for nothing in (None, [1.0], VIEW["image"]):
        with pytest.raises(ValueError, match=r"an observation is a mapping such as .* not a "):
            refuse_incomplete(nothing, ONE)
    entries = ("image", "intrinsics", "world_to_camera", "position", "quaternion", "gripper")
    with pytest.raises(ValueError, match=r"lacks .*" + ".*".join(rf"'{name}' \(" for name in entries)):
        refuse_incomplete({}, ONE)
    with pytest.raises(ValueError, match="the observation lacks") as caught:
        refuse_incomplete({"cameras": {"over": {"image": VIEW["image"]}}, **POSE}, TWO)
    said = str(caught.value)
    lacking = ("'cameras/over/intrinsics'", "'cameras/over/world_to_camera'", "camera 'front' in", "'instruction'")
    assert all(each in said for each in lacking)
    assert "cameras/front" not in said
    assert "'position'" not in said


def test_what_is_complete_or_lacks_one_entry_is_left_to_who_reads_it() -> None:
    whole = {**VIEW, **POSE}
    refuse_incomplete(whole, ONE)
    refuse_incomplete({**POSE, "image": VIEW["image"]}, Needs(("right",), calibration=False))
    refuse_incomplete({name: value for name, value in whole.items() if name != "gripper"}, ONE)
    told = {**POSE, "instruction": "pick", "cameras": {"over": VIEW, "front": {"image": VIEW["image"]}}}
    refuse_incomplete(told, TWO)
    refuse_incomplete({**told, "cameras": {"over": VIEW, "front": None}}, TWO)  # a camera without an image
    refuse_incomplete({**whole, "instruction": "pick"}, Needs(("right",), ("over",), instruction=True))


@pytest.mark.parametrize("flip", [np.s_[::-1], np.s_[:, ::-1], np.s_[..., ::-1]])  # upside down, mirrored, BGR
def test_a_flipped_view_of_an_image_is_checked_as_its_copy(flip: Any) -> None:
    """Renderers return images upside down, OpenCV as BGR; what numpy makes of them has negative strides."""
    pixels = np.zeros((130, 128, 3), np.uint8)
    pixels[64:, :40, 1] = 90
    image = pixels[flip]
    assert spread_of_image(image) == spread_of_image(image.copy()) == 30.0
    Bounds().refuse_images({"image": image}, Needs(("right",), calibration=False))
