from __future__ import annotations

import numpy as np
import pytest

from keygrip.envs.yam import tasks
from keygrip.envs.yam.colours import COLOURS, EQUAL_LUMINANCE
from keygrip.envs.yam.tasks import (
    BOWL_RADIUS,
    CAMERA_ORBITS,
    ELEVATIONS_DEG,
    REGIONS,
    TASKS,
    TaskOptions,
    in_region,
    sample_layout,
)


def flat(layout: object) -> str:
    return repr(layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "juggle"}, "pick_place"),
        ({"region": "middle"}, "left"),
        ({"camera": "top"}, "over"),
        ({"object_size_m": 0.2}, "object_size_m"),
        ({"distractors": 9}, "distractors"),
        ({"camera_views": 8}, "camera_jitter_deg"),
        ({"camera": "wrist", "camera_azimuth_deg": 5.0}, "wrist"),
        ({"varied_shapes": True}, "distractors"),
        ({"digits": True, "object": "bar"}, "digits"),
        ({"name": "stack", "object": "bar"}, "stack"),
        ({"name": "peg", "object": "bar"}, "its own object"),
        ({"name": "peg", "digits": True}, "digits"),
        ({"object": "bar", "object_size_m": 0.05}, "bowl"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TASKS)
def test_layout_is_a_function_of_seed_and_options(name: str) -> None:
    options = TaskOptions(name=name, distractors=2, randomise_colours=True, randomise_light=True, camera_jitter_deg=5.0)
    first = [flat(sample_layout(options, s)) for s in range(6)]
    assert first == [flat(sample_layout(options, s)) for s in range(6)]
    assert len(set(first)) == 6


def test_moving_the_camera_or_the_light_leaves_the_objects() -> None:
    plain = sample_layout(TaskOptions(), 11)
    varied = sample_layout(
        TaskOptions(camera_jitter_deg=20.0, camera_azimuth_deg=10.0, randomise_light=True, randomise_table=True), 11
    )
    np.testing.assert_array_equal(plain.object.position, varied.object.position)
    np.testing.assert_array_equal(plain.goal, varied.goal)
    np.testing.assert_array_equal(plain.start_joints, varied.start_joints)
    assert plain.camera != varied.camera
    assert plain.appearance != varied.appearance


@pytest.mark.parametrize("region", REGIONS)
def test_objects_start_in_their_region(region: str) -> None:
    points = np.array([sample_layout(TaskOptions(region=region), s).object.position for s in range(60)])
    tests = {
        "all": (points[:, 1] > 0).any() and (points[:, 1] < 0).any() and (points[:, 0] > 0.3).any(),
        "left": (points[:, 1] > 0).all(),
        "right": (points[:, 1] < 0).all(),
        "near": (points[:, 0] < 0.3).all(),
        "far": (points[:, 0] > 0.3).all(),
    }
    assert tests[region]
    assert all(in_region(p, region) for p in points)


@pytest.mark.parametrize("region", REGIONS)
def test_the_ball_to_reach_lies_in_the_region(region: str) -> None:
    layouts = [sample_layout(TaskOptions(name="reach", region=region), seed) for seed in range(40)]
    assert all(in_region(layout.goal[:2], region) for layout in layouts)
    if region != "all":  # the cube next to it, which is not moved, may be anywhere
        assert not all(in_region(layout.object.position[:2], region) for layout in layouts)


def test_the_bowl_is_not_confined_to_the_objects_region() -> None:
    goals = np.array([sample_layout(TaskOptions(region="left"), s).goal for s in range(40)])
    assert (goals[:, 1] > 0).any()
    assert (goals[:, 1] < 0).any()


def test_things_do_not_overlap() -> None:
    options = TaskOptions(distractors=3, object="bar")
    for seed in range(40):
        layout = sample_layout(options, seed)
        apart = np.linalg.norm(layout.object.position[:2] - layout.goal[:2])
        assert apart > BOWL_RADIUS + 0.03
        for d in layout.distractors:
            assert np.linalg.norm(d.position[:2] - layout.goal[:2]) > BOWL_RADIUS + 0.028
            assert np.linalg.norm(d.position[:2] - layout.object.position[:2]) > 0.1


def test_colours_of_an_episode_are_told_apart() -> None:
    options = TaskOptions(distractors=4, randomise_colours=True, equal_luminance=True)
    for seed in range(20):
        layout = sample_layout(options, seed)
        colours = [p.colour for p in layout.placed] + [layout.goal_colour]
        assert len(set(colours)) == len(colours)
        assert layout.object.colour in layout.instruction
        assert layout.goal_colour in layout.instruction


def test_equal_luminance_is_equal() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    luminances = [float(weights @ np.array(rgb) ** 2.2) for rgb in EQUAL_LUMINANCE.values()]
    np.testing.assert_allclose(luminances, 0.25, atol=1e-6)
    spread = [float(weights @ np.array(rgb) ** 2.2) for rgb in COLOURS.values()]
    assert max(spread) - min(spread) > 0.3


def test_camera_jitter_stays_in_its_cone_and_views_repeat() -> None:
    cones = [sample_layout(TaskOptions(camera_jitter_deg=25.0), s).camera for s in range(80)]
    angles = [np.hypot(c.azimuth_deg, c.elevation_deg) for c in cones]
    assert max(angles) <= 25.0
    assert max(angles) > 18.0
    views = {sample_layout(TaskOptions(camera_jitter_deg=25.0, camera_views=4), s).camera for s in range(80)}
    assert len(views) == 4
    more = {sample_layout(TaskOptions(camera_jitter_deg=25.0, camera_views=8), s).camera for s in range(80)}
    assert views < more


def test_a_camera_is_not_taken_below_the_table_or_straight_above_it() -> None:
    with pytest.raises(ValueError, match=r"camera 'front', which looks from 33 degrees up, .* give -28 to 35"):
        TaskOptions(camera="front", camera_elevation_deg=-28.5)
    TaskOptions(camera="front", camera_elevation_deg=-28.0)
    for camera, (_, own, _) in CAMERA_ORBITS.items():
        assert own - 35 < ELEVATIONS_DEG[0] or TaskOptions(camera=camera, camera_elevation_deg=-35.0)
        assert own + 35 <= ELEVATIONS_DEG[1]


def test_a_share_of_the_episodes_hides_the_object_from_either_camera() -> None:
    plain, half = TaskOptions(), TaskOptions(hidden_share=0.5)
    hidden = [sample_layout(half, seed).hidden_from for seed in range(60)]
    assert {name: 10 <= hidden.count(name) <= 40 for name in (None, "over", "front")} == dict.fromkeys(
        (None, "over", "front"), True
    )
    assert all(sample_layout(plain, seed).hidden_from is None for seed in range(10))
    assert sample_layout(half, 3).object.position.tolist() == sample_layout(plain, 3).object.position.tolist()
    with pytest.raises(ValueError, match=r"hidden_share=1\.5 is outside"):
        TaskOptions(hidden_share=1.5)


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        sample_layout(TaskOptions(), -1)


def test_a_table_too_full_for_the_distractors_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TOOL_CLEARANCE", 0.3)
    with pytest.raises(ValueError, match="no room on the table for 4 distractors"):
        sample_layout(TaskOptions(distractors=4), 0)
