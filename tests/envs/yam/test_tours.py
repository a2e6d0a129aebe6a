"""Tours: the questions and answers match the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from keygrip.envs.yam.colours import COLOURS
from keygrip.envs.yam.tours import Tour, TourCell, TourOptions, describe, octaves

SIZE = 96


@pytest.fixture(scope="module")
def cell() -> Iterator[TourCell]:
    cell = TourCell(TourOptions(image_size=SIZE, min_frames=3, max_frames=5))
    yield cell
    cell.close()


def test_a_tour_is_a_function_of_its_seed(cell: TourCell) -> None:
    one, other, again = cell.tour(7), cell.tour(8), cell.tour(7)
    assert one.frames.dtype == np.uint8
    assert one.frames.shape[1:] == (SIZE, SIZE, 3)
    assert np.array_equal(one.frames, again.frames)
    assert np.array_equal(one.digits, again.digits)
    assert one.colours == again.colours
    assert one.colours != other.colours or not np.array_equal(one.pixels[0], other.pixels[0])


def test_tours_vary_as_they_should(cell: TourCell) -> None:
    tours = [cell.tour(seed) for seed in range(12)]
    assert {len(tour.frames) for tour in tours} == {3, 4, 5}
    assert all(len(set(tour.colours)) == 5 for tour in tours)
    assert all((np.diff(tour.pointed) != 0).all() for tour in tours)
    digits = np.concatenate([tour.digits.ravel() for tour in tours])
    assert set(digits.tolist()) == set(range(8))
    share = np.mean([(tour.digits[1:] == tour.digits[:-1]).mean() for tour in tours])
    assert share == pytest.approx(1 / 8, abs=0.1)  # sampled again each second, so equal only by chance


def test_even_lengths_give_each_octave_as_many_tours() -> None:
    """Accuracy is reported by octave. Within an octave all lengths are equally likely, and a seed always gives the same
    length."""
    assert octaves(1, 64) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
    assert octaves(65, 200) == [(65, 128), (129, 200)]
    options = TourOptions(min_frames=1, max_frames=64, even_lengths=True)
    lengths = [options.length(seed, np.random.default_rng(seed)) for seed in range(1_000_000, 1_000_210)]
    assert Counter(1 << (count - 1).bit_length() for count in lengths) == {1 << n: 30 for n in range(7)}
    assert len(set(lengths)) > 30
    assert lengths[:5] == [options.length(seed, np.random.default_rng(seed)) for seed in range(1_000_000, 1_000_005)]
    uniform = replace(options, even_lengths=False)
    short = sum(uniform.length(seed, np.random.default_rng(seed)) <= 4 for seed in range(210))
    assert short < 30
    assert "even_lengths" not in uniform.as_dict()
    assert options.as_dict()["even_lengths"] is True


def test_cubes_are_where_the_evidence_says(cell: TourCell) -> None:
    """A fully visible cube shows its own colour around its centre: the nearest colour of the palette is that of the
    cube."""
    tour = cell.tour(3)
    right = []
    for frame, cube in zip(*np.nonzero(tour.readable()), strict=True):
        x, y = np.floor(tour.pixels[frame, cube]).astype(int)
        patch = tour.frames[frame, y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).astype(float).max(axis=0)
        hues = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
        nearest = max(hues, key=lambda name: hues[name] @ patch / np.linalg.norm(patch))
        right.append(nearest == tour.colours[cube])
    assert np.mean(right) > 0.9


def test_the_digit_is_what_changes_in_the_image(cell: TourCell) -> None:
    """Between two seconds, the image of a cube that stays visible changes exactly when its digit changes."""
    same, different = [], []
    for seed in range(14):
        tour = cell.tour(seed)
        seen = tour.readable() & (tour.visible == tour.visible.max(axis=0))
        for frame in range(1, len(tour.frames)):
            for cube in range(5):
                if not (seen[frame, cube] and seen[frame - 1, cube]):
                    continue
                x, y = tour.pixels[frame, cube].astype(int)
                window = np.s_[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
                change = np.abs(tour.frames[frame][window].astype(int) - tour.frames[frame - 1][window]).max()
                (same if tour.digits[frame, cube] == tour.digits[frame - 1, cube] else different).append(change)
    assert len(same) > 10
    assert np.median(same) == 0
    assert np.median(different) > 20


def test_the_gripper_is_above_the_cube_at_which_it_points(cell: TourCell) -> None:
    for seed in range(4):
        tour = cell.tour(seed)
        tool = cell.data.site_xpos[cell._tool]
        position = cell.layout.placed[tour.pointed[-1]].position  # type: ignore[union-attr]
        assert np.abs(tool[:2] - position[:2]).max() < 2e-3
        assert tool[2] == pytest.approx(0.05 + 0.035, abs=2e-3)


def a_tour() -> Tour:
    visible = np.array([[40, 40, 0], [40, 10, 50], [40, 40, 50]])
    return Tour(
        frames=np.zeros((3, 4, 4, 3), np.uint8),
        colours=("red", "blue", "green"),
        pointed=np.array([1, 0, 2]),
        digits=np.array([[1, 2, 3], [4, 5, 6], [7, 0, 1]]),
        pixels=np.zeros((3, 3, 2)),
        visible=visible,
        uncovered=np.array([40, 40, 50]),
        seed=0,
    )


def test_questions_have_the_right_answers_and_ask_nothing_hidden() -> None:
    text = describe(a_tour())
    assert text["captions"][0]["text"] == (
        "A robot arm points at the blue cube, then at the red cube, then at the green cube."
    )
    asked = {(q["kind"], q["evidence"]["frame"], q["evidence"]["colour"]): q["answer"] for q in text["questions"]}
    marks = {key[1:]: answer for key, answer in asked.items() if key[0] == "mark"}
    assert marks == {
        (0, "red"): "1",
        (0, "blue"): "2",
        (1, "red"): "4",
        (1, "green"): "6",
        (2, "red"): "7",
        (2, "blue"): "0",
        (2, "green"): "1",
    }
    assert {key[1:]: answer for key, answer in asked.items() if key[0] == "cue"} == {(2, "red"): "7"}
    assert {key[1]: answer for key, answer in asked.items() if key[0] == "glance"} == {0: "blue", 1: "red", 2: "green"}
    cue = next(q for q in text["questions"] if q["kind"] == "cue")
    assert "red" not in cue["question"]  # the video shows which cube is meant


def test_a_cube_that_the_arm_hides_all_the_time_is_not_asked_about() -> None:
    hidden = replace(a_tour(), visible=np.array([[40, 2, 50]] * 3))
    asked = {q["evidence"]["colour"] for q in describe(hidden)["questions"] if q["kind"] != "glance"}
    assert asked == {"red", "green"}


def test_what_would_be_seen_of_a_cube_does_not_depend_on_where_the_arm_stands(cell: TourCell) -> None:
    short = TourCell(replace(cell.options, min_frames=1, max_frames=1))
    long = TourCell(replace(cell.options, min_frames=12, max_frames=12))
    hidden = 0
    for seed in range(8):
        one, many = short.tour(seed), long.tour(seed)
        assert np.array_equal(one.uncovered, many.uncovered)
        assert (many.visible <= many.uncovered).all()
        assert np.array_equal(many.visible.max(axis=0), many.uncovered)  # the arm points elsewhere at some second
        asked = {q["evidence"]["colour"] for q in describe(one)["questions"] if q["kind"] == "mark"}
        for colour, seen, whole in zip(one.colours, one.visible[0], one.uncovered, strict=True):
            assert (colour in asked) == (seen >= 0.7 * whole)
            hidden += colour not in asked
    short.close()
    long.close()
    assert hidden >= 2  # of 40


def test_digits_may_stay(cell: TourCell) -> None:
    still = TourCell(replace(cell.options, changing=False, cubes=3, digits=4))
    tour = still.tour(1)
    still.close()
    assert tour.digits.shape[1] == 3
    assert (tour.digits == tour.digits[0]).all()
    assert tour.digits.max() < 4


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"cubes": 6}, "a tour has 1 to 5 cubes, not 6"),
        ({"digits": 1}, "prints 2 to 10 different digits, not 1"),
        ({"min_frames": 5, "max_frames": 4}, "min_frames=5, max_frames=4 make no range"),
        ({"max_frames": 4097}, "1 to 4096 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            TourOptions(**options)  # type: ignore[arg-type]
