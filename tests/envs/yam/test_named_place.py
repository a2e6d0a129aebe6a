"""The task whose instruction names one of several cubes: layouts, the expert, and the success criterion."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.data.robot.discovery import find_demos
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.expert import expert_actions
from keygrip.envs.yam.tasks import PHRASES, EpisodeLayout, TaskOptions, sample_layout
from keygrip.recording import demonstrations as recorder
from keygrip.recording.demonstrations import RecordSettings, record, record_episode

# From the version before pedestals and named cubes: object, bowl, distractor 1 and camera; object and yaw of a stack.
EARLIER = [
    0.372624023528, -0.065609241646, 0.02, 0.235129807177, 0.105005751529, 0.0,
    0.295704642773, -0.169626347423, 0.02, 8.283838489573,
]  # fmt: skip
EARLIER_STACK = [0.286987716454, -0.08711613574, 0.02, -0.725204161874]

LANGUAGE = TaskOptions(
    name="named_place", distractors=2, pedestal_m=0.06, camera_jitter_deg=5.0, jitter_every_camera=True
)


def play(cell: YamCell, actions: np.ndarray) -> dict[str, Any]:
    """Play to the end of the episode, repeating the last action; return the last info."""
    for i in range(10_000):
        _, _, terminated, truncated, info = cell.step(actions[min(i, len(actions) - 1)])
        if terminated or truncated:
            return info
    raise AssertionError("the episode did not end")


def mistaken(layout: EpisodeLayout) -> EpisodeLayout:
    """Return the layout with the named cube and the first of the other cubes exchanged."""
    return replace(layout, object=layout.distractors[0], distractors=(layout.object, *layout.distractors[1:]))


# ------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "named_place"}, "one of several cubes"),
        ({"name": "named_place", "distractors": 2, "object": "bar"}, "one of several cubes"),
        ({"name": "named_place", "distractors": 2, "varied_shapes": True}, "one of several cubes"),
        ({"name": "stack", "pedestal_m": 0.03}, "pedestal_m is for pick, pick_place and named_place"),
        ({"name": "pick", "pedestal_m": 0.2}, "pedestal_m"),
        ({"name": "pick", "pedestal_m": 0.03, "distractors": 1, "varied_shapes": True}, "roll off"),
        ({"name": "pick", "phrasings": 3}, "no effect in 'pick'"),
        ({"name": "named_place", "distractors": 1, "phrasings": 7}, "phrasings"),
        ({"jitter_every_camera": True}, "camera_jitter_deg"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskOptions(**options)


def test_earlier_tasks_are_what_they_were() -> None:
    """Recordings and results of earlier versions stay comparable."""
    layout = sample_layout(TaskOptions(distractors=2, randomise_colours=True, camera_jitter_deg=10.0), 7)
    stack = sample_layout(TaskOptions(name="stack"), 3)
    flat = [*layout.object.position, *layout.goal, *layout.distractors[1].position, layout.camera.azimuth_deg]
    np.testing.assert_allclose(flat, EARLIER, atol=1e-9)
    np.testing.assert_allclose([*stack.object.position, stack.goal_yaw], EARLIER_STACK, atol=1e-9)
    assert layout.instruction == "put the yellow cube into the red bowl"


def test_each_cube_is_as_likely_to_be_named_and_nothing_gives_it_away() -> None:
    layouts = [sample_layout(LANGUAGE, seed) for seed in range(300)]
    named = Counter(layout.object.colour for layout in layouts)
    assert set(named) == {"red", "blue", "green"}
    assert min(named.values()) > 70  # 100 are expected
    # distance to the nearest other cube, distance to the bowl, position and height do not reveal which cube is named
    for feature in (
        lambda cube, layout: min(np.hypot(*(cube.position - o.position)[:2]) for o in layout.placed if o is not cube),
        lambda cube, layout: np.hypot(*(cube.position - layout.goal)[:2]),
        lambda cube, layout: cube.position[0],
        lambda cube, layout: cube.pedestal,
    ):
        ours = np.array([feature(layout.object, layout) for layout in layouts])
        others = np.array([feature(cube, layout) for layout in layouts for cube in layout.distractors])
        error = np.hypot(ours.std() / np.sqrt(len(ours)), others.std() / np.sqrt(len(others)))
        assert abs(ours.mean() - others.mean()) < 3.5 * error


def test_the_instruction_names_the_cube_and_nothing_else_in_the_scene_changes_with_its_wording() -> None:
    plain = [sample_layout(LANGUAGE, seed) for seed in range(40)]
    assert all(layout.instruction == f"put the {layout.object.colour} cube into the bowl" for layout in plain)
    worded = [sample_layout(replace(LANGUAGE, phrasings=len(PHRASES)), seed) for seed in range(40)]
    assert len({layout.instruction.replace(layout.object.colour, "?") for layout in worded}) == len(PHRASES)
    for one, other in zip(plain, worded, strict=True):
        assert f"the {other.object.colour} cube" in other.instruction
        assert repr(one) == repr(replace(other, instruction=one.instruction))


def test_heights_are_spread_and_cubes_stand_apart() -> None:
    heights = []
    for seed in range(60):
        layout = sample_layout(LANGUAGE, seed)
        colours = [cube.colour for cube in layout.placed] + [layout.goal_colour]
        assert len(set(colours)) == 4
        for i, cube in enumerate(layout.placed):
            assert cube.position[2] == pytest.approx(0.02 + cube.pedestal)
            heights.append(cube.pedestal)
            for other in layout.placed[:i]:
                assert np.hypot(*(cube.position - other.position)[:2]) > 0.11
    assert np.quantile(heights, [0.1, 0.5, 0.9]) == pytest.approx([0.006, 0.03, 0.054], abs=0.008)


def test_each_camera_moves_by_itself() -> None:
    layouts = [sample_layout(LANGUAGE, seed) for seed in range(30)]
    turns = np.array(
        [
            [pose.azimuth_deg, pose.elevation_deg]
            for layout in layouts
            for pose in (layout.camera, layout.other_cameras["front"])
        ]
    ).reshape(30, 2, 2)
    assert np.hypot(*turns.reshape(-1, 2).T).max() <= 5.0
    assert abs(np.corrcoef(turns[:, 0, 0], turns[:, 1, 0])[0, 1]) < 0.5
    still = replace(LANGUAGE, jitter_every_camera=False)
    assert all(sample_layout(still, seed).camera == layouts[seed].camera for seed in range(5))  # its pose is the same
    assert not sample_layout(still, 0).other_cameras


# ------------------------------------------------------------------------------------------------------------ episodes


def test_the_expert_puts_the_named_cube_into_the_bowl() -> None:
    cell = YamCell(LANGUAGE, render_images=False)
    colours, heights = set(), []
    for seed in range(8):
        _, info = cell.reset(seed=seed)
        assert cell.layout is not None
        info = play(cell, expert_actions(cell.layout, LANGUAGE, seed))
        assert info["success"], (seed, info["failure_reason"])
        assert info["object_colour"] in info["instruction"]
        colours.add(info["object_colour"])
        heights.append(info["object_height_m"])
    assert colours == {"red", "green", "blue"}
    assert max(heights) > 0.03


@pytest.mark.parametrize("task", ["pick", "pick_place"])
def test_pedestals_suit_the_tasks_with_one_object_too(task: str) -> None:
    options = TaskOptions(name=task, pedestal_m=0.06, distractors=1)
    cell = YamCell(options, render_images=False)
    for seed in range(4):
        cell.reset(seed=seed)
        assert cell.layout is not None
        assert play(cell, expert_actions(cell.layout, options, seed))["success"], seed


@pytest.mark.slow
def test_another_cube_in_the_bowl_is_the_wrong_object() -> None:
    cell = YamCell(LANGUAGE, render_images=False)
    for seed in (0, 1):
        cell.reset(seed=seed)
        assert cell.layout is not None
        wrong = mistaken(cell.layout)
        info = play(cell, expert_actions(wrong, LANGUAGE, seed))
        assert (info["success"], info["failure_reason"]) == (False, "wrong_object")


@pytest.mark.slow
def test_both_cubes_in_the_bowl_are_no_success() -> None:
    """Putting every cube into the bowl would not require the instruction."""
    cell = YamCell(LANGUAGE, render_images=False)
    cell.reset(seed=0)
    assert cell.layout is not None
    first = expert_actions(mistaken(cell.layout), LANGUAGE, 0)
    second = expert_actions(cell.layout, LANGUAGE, 0)
    info = play(cell, np.concatenate([first, second]))
    assert (info["success"], info["failure_reason"]) == (False, "wrong_object")
    assert cell.progress.lifted  # the named cube was lifted too


@pytest.mark.slow
def test_lifting_another_cube_and_giving_up_is_the_wrong_object() -> None:
    cell = YamCell(LANGUAGE, render_images=False)
    cell.reset(seed=1)
    assert cell.layout is not None
    actions = expert_actions(mistaken(cell.layout), LANGUAGE, 1)
    lifted = int(np.flatnonzero(actions[:, 7] < 0.5)[0]) + 17
    assert play(cell, actions[:lifted])["failure_reason"] == "wrong_object"


def test_touching_nothing_is_missed() -> None:
    cell = YamCell(LANGUAGE, render_images=False)
    cell.reset(seed=2)
    assert cell.layout is not None
    actions = expert_actions(cell.layout, LANGUAGE, 2)
    assert play(cell, actions[:3])["failure_reason"] == "missed"


# ------------------------------------------------------------------------------------------------- images and folders


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record two demonstrations with two cameras and depth."""
    root = tmp_path_factory.mktemp("named")
    record(LANGUAGE, root, 2, image_size=96, cameras=("over", "front"), depth=True, progress=False)
    return root


def unprojected(
    depth: np.ndarray, pixel: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray
) -> np.ndarray:
    """Return the world point [3] at a pixel (x, y)."""
    x, y = int(pixel[0]), int(pixel[1])
    ray = np.linalg.inv(intrinsics) @ [x + 0.5, y + 0.5, 1.0]
    return (np.linalg.inv(world_to_camera) @ np.append(ray * depth[y, x] / 1000, 1.0))[:3]


@pytest.mark.slow
def test_both_cameras_see_the_cubes_where_they_are_in_colour_and_depth(recorded: Path) -> None:
    seen = 0
    for reference in find_demos(recorded, format="native"):
        demo = reference.read()
        assert demo.instruction == f"put the {demo.source['objects'][0]['colour']} cube into the bowl"
        for camera in demo.cameras.values():
            assert camera.depth is not None
            depth, picture = camera.depth.read(0), camera.frames.read(0)
            assert depth.dtype == np.uint16
            for cube in demo.source["objects"]:
                top = np.array(cube["position_m"]) + [0, 0, 0.02]
                in_camera = camera.world_to_camera[0] @ np.append(top, 1.0)
                u, v, w = camera.intrinsics[0] @ in_camera[:3]
                if abs(in_camera[2] * 1000 - depth[int(v / w), int(u / w)]) > 30:
                    continue  # another object occludes it
                point = unprojected(depth, (u / w, v / w), camera.intrinsics[0], camera.world_to_camera[0])
                np.testing.assert_allclose(point, top, atol=0.009)  # a pixel is 6 mm wide
                strongest = ["red", "green", "blue"][int(picture[int(v / w), int(u / w)].argmax())]
                assert strongest == cube["colour"]
                seen += 1
    assert seen >= 8  # of 12


@pytest.mark.slow
def test_a_pedestal_raises_its_cube_in_the_image(recorded: Path) -> None:
    for reference in find_demos(recorded, format="native"):
        for cube in reference.read().source["objects"]:
            assert cube["position_m"][2] == pytest.approx(0.02 + cube["pedestal_m"])


@pytest.mark.slow
def test_an_episode_repeats_bit_for_bit(tmp_path: Path, recorded: Path) -> None:
    settings = RecordSettings(LANGUAGE, 96, cameras=("over", "front"), depth=True)
    cell = YamCell(LANGUAGE, 96, cameras=settings.cameras)
    assert record_episode(cell, settings, tmp_path, 1)  # alone, after no other episode
    cell.close()
    folder = "named_place_0000001"
    files = sorted(path.relative_to(recorded) for path in (recorded / folder).rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".png"]) == 2 * len(
        list((recorded / folder / "rgb" / "over").iterdir())
    )
    for path in files:
        if path.suffix == ".npz":
            with np.load(recorded / path) as there, np.load(tmp_path / path) as here:
                assert all(np.array_equal(there[key], here[key]) for key in there.files)
        else:
            assert (recorded / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_an_observation_holds_both_cameras_and_the_instruction() -> None:
    cell = YamCell(LANGUAGE, image_size=48, cameras=("over", "front"))
    seen, info = cell.reset(seed=0)
    assert cell.observation_space.contains(seen)
    assert seen["instruction"] == info["instruction"]
    assert list(seen["cameras"]) == ["over", "front"]
    for name, value in seen["cameras"]["over"].items():
        np.testing.assert_array_equal(value, seen[name])
    for camera, view in seen["cameras"].items():
        np.testing.assert_array_equal(view["image"], cell.frame(camera))
        np.testing.assert_array_equal(view["world_to_camera"], cell.world_to_camera(camera))
    assert not np.array_equal(seen["cameras"]["front"]["image"], seen["image"])
    cell.close()
    one = YamCell(LANGUAGE, image_size=48)
    seen, _ = one.reset(seed=0)
    assert "cameras" not in seen
    assert one.observation_space.contains(seen)
    one.close()


def test_a_recording_whose_settings_lack_an_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "record_episode", lambda *arguments: True)
    task = TaskOptions(name="reach")
    record(task, tmp_path, 1, image_size=48, progress=False)
    (tmp_path / "reach-000000").mkdir()  # in place of a demonstration, as `record_episode` writes none here
    stored = json.loads((tmp_path / "recording.json").read_text())
    del stored["settings"]["task"]["pedestal_m"]
    (tmp_path / "recording.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"pedestal_m: None there, .* now.*use another folder or remove it"):
        record(task, tmp_path, 1, image_size=48, progress=False)


@pytest.mark.slow
def test_depth_images_are_sixteen_bit_files(recorded: Path) -> None:
    with Image.open(next(recorded.glob("*/depth/front/000000.png"))) as picture:
        assert picture.mode.startswith("I;16") or picture.mode == "I"
        assert picture.size == (96, 96)
