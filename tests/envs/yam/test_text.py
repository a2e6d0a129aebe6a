from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.discovery import find_demos
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.recording.demonstrations import record


def options(name: str) -> TaskOptions:
    return TaskOptions(name=name, distractors=2, randomise_colours=True, varied_shapes=True, digits=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any], Any]]:
    """Return (text, source, demo) of one or two episodes of each task."""
    found = []
    for name, episodes in {"pick": 1, "pick_place": 2, "stack": 1, "reach": 1}.items():
        root = tmp_path_factory.mktemp(name)
        record(options(name), root, episodes, seed=500_000, image_size=96, progress=False)
        for reference in find_demos(root, format="native"):
            text = json.loads((root / reference.name / "text.json").read_text())
            demo = reference.read()
            found.append((text, demo.source, demo))
    return found


def asked(text: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [q for q in text["questions"] if q["kind"] == kind]


def pixel(demo: Any, point: list[float]) -> np.ndarray:
    camera = demo.cameras["over"]
    in_camera = camera.world_to_camera[0] @ np.append(point, 1.0)
    u, v, w = camera.intrinsics[0] @ in_camera[:3]
    return np.array([u / w, v / w])


@pytest.mark.slow
def test_every_kind_of_question_comes_up(told: list[Any]) -> None:
    kinds = {q["kind"] for text, _, _ in told for q in text["questions"]}
    assert kinds >= {
        "count", "shape", "digit", "goal_colour", "side_of_goal", "side_of_object", "moved_colour", "moved",
        "final_place", "held_at", "when_lifted", "how_long",
    }  # fmt: skip


@pytest.mark.slow
def test_answers_about_the_scene_follow_from_the_layout(told: list[Any]) -> None:
    for text, source, _ in told:
        objects = {o["colour"]: o for o in source["objects"]}
        for q in asked(text, "shape"):
            colour = q["question"].removeprefix("What shape is the ").split()[0]
            assert q["answer"] == objects[colour]["shape"]
        for q in asked(text, "digit"):
            colour = q["question"].removeprefix("Which digit is printed on the ").split()[0]
            assert q["answer"] == str(objects[colour]["digit"])
        if source["task"]["name"] == "stack":  # the block below is also a cube
            assert not any("cube" in q["question"] for q in asked(text, "count"))
        for q in asked(text, "count"):
            shape = q["question"].removeprefix("How many ").split("s are")[0]
            extra = int(shape == "ball" and source["task"]["name"] == "reach")
            assert int(q["answer"]) == sum(o["shape"] == shape for o in source["objects"]) + extra
        for q in asked(text, "goal_colour"):
            assert q["answer"] == source["goal"]["colour"]


def test_left_and_right_are_those_of_the_image(told: list[Any]) -> None:
    checked = 0
    for text, source, demo in told:
        objects = {f"{o['colour']} {o['shape']}": o["position_m"] for o in source["objects"]}
        thing = source["objects"][0]
        centre = pixel(demo, thing["position_m"])
        for q in asked(text, "side_of_goal"):
            gap = centre[0] - pixel(demo, source["goal"]["position_m"])[0]
            assert q["answer"] == ("left" if gap < 0 else "right")
            checked += 1
        for q in asked(text, "side_of_object"):
            words = q["question"].removeprefix("At the start, is the ").split(" left or right")[0]
            assert q["answer"] == ("left" if pixel(demo, objects[words])[0] < centre[0] else "right")
            checked += 1
    assert checked >= 8


def test_answers_about_the_motion_follow_from_the_trajectory(told: list[Any]) -> None:
    held_answers = set()
    for text, source, demo in told:
        arm, name = demo.arms["right"], source["task"]["name"]
        moved = {q["answer"] for q in asked(text, "moved_colour")}
        if name == "reach":
            assert not moved
            assert not asked(text, "held_at")
            continue
        assert moved == {source["objects"][0]["colour"]}
        (place,) = asked(text, "final_place")
        goal = source["goal"]["colour"]
        assert place["answer"] == {
            "pick": "in the gripper", "pick_place": f"in the {goal} bowl", "stack": f"on the {goal} block"
        }[name]  # fmt: skip
        for q in asked(text, "held_at"):
            frame = q["evidence"]["demo_frame"]
            assert f"{frame / 10:.1f} seconds" in q["question"]
            # A hand that holds a 4 cm cube has stopped closing at 4 cm of its full opening of 9.5 cm.
            gripping = arm.commanded.gripper[frame] < 0.5 and 0.35 < arm.gripper[frame] < 0.65
            assert q["answer"] == ("yes" if gripping else "no")
            held_answers.add(q["answer"])
        for q in asked(text, "how_long"):
            assert int(q["answer"]) == pytest.approx(np.sum(arm.commanded.gripper < 0.5) / 10, abs=1.1)
    assert held_answers == {"yes", "no"}


def test_captions_tell_what_happens_in_order(told: list[Any]) -> None:
    for text, source, demo in told:
        end = (len(demo.timestamps) - 1) / demo.fps
        video = [c for c in text["captions"] if c["kind"] == "video"]
        assert len(video) == 1
        assert (video[0]["start_s"], video[0]["end_s"]) == (0.0, end)
        for o in source["objects"] if source["task"]["name"] != "reach" else source["objects"][1:]:
            assert f"{o['colour']} {o['shape']}" in video[0]["text"]
        events = [c for c in text["captions"] if c["kind"] == "event"]
        for before, after in itertools.pairwise(events):
            assert before["end_s"] == after["start_s"] < after["end_s"] <= end
        if source["task"]["name"] in ("pick_place", "stack"):
            assert len(events) == 3
            arm = demo.arms["right"]
            opening = np.flatnonzero(np.diff(arm.commanded.gripper) > 0.5)[0] / demo.fps
            assert events[2]["start_s"] == pytest.approx(opening, abs=0.35)


def test_a_frame_caption_lists_what_is_visible_from_left_to_right(told: list[Any]) -> None:
    for text, source, demo in told:
        first = next(c for c in text["captions"] if c["kind"] == "frame" and c["start_s"] == 0.0)
        named = [o for o in source["objects"] if f"{o['colour']} {o['shape']}" in first["text"]]
        assert named
        order = sorted(named, key=lambda o: first["text"].index(f"{o['colour']} {o['shape']}"))
        across = [pixel(demo, o["position_m"])[0] for o in order]
        assert across == sorted(across)


@pytest.mark.slow
def test_text_is_the_same_each_time(tmp_path: Path) -> None:
    task = options("pick")
    for name in ("one", "two"):
        record(task, tmp_path / name, 1, seed=9, image_size=64, progress=False)
    one, two = ((tmp_path / n / "pick_0000009" / "text.json").read_bytes() for n in ("one", "two"))
    assert one == two
