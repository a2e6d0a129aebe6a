"""Several data sets at once: names of their demos, weights, calibrations, and the checks of each set."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.robot.frame_rates import equal_strides
from keygrip.data.robot.roots import refuse_renamed
from keygrip.data.shards.sampling import GlobalBatchSampler, sample_generator

Make = Callable[..., RobotDemos]


@pytest.fixture
def roots(tmp_path: Path, native_demo: Any, change_metadata: Any) -> list[str]:
    """Write a set of six demos of 12 frames, and a set of two demos of 24 frames of another robot."""
    for number in range(6):
        native_demo(tmp_path / "a" / f"demo_{number}", seed=number, level=0.1 + 0.01 * number)
    for number in range(2):
        folder = native_demo(tmp_path / "b" / f"demo_{number}", seed=10 + number, frames=24, level=0.4 + number / 10)
        change_metadata(folder, robot="panda")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("data/a", "moved/b", True),
        (None, "data/a", True),
        (["data/a"], "data/a", True),
        (["data/a", "data/b"], ["new/b", "new/a"], True),
        (["data/a", "data/b"], "data/a", False),
        (["data/a", "data/b"], ["data/a", "data/c"], False),
        ("data/a", ["data/a", "data/b"], False),
    ],
)
def test_roots_that_would_change_the_split_of_a_run_are_refused(before: Any, now: Any, same: bool) -> None:
    if same:
        refuse_renamed(before, now)
    else:
        with pytest.raises(ValueError, match="some of them trained on: name folders with the same names"):
            refuse_renamed(before, now)


def ready(data: RobotDemos) -> RobotDemos:
    data.setup("fit")
    return data


def drawn(data: RobotDemos, epochs: int = 4) -> Counter[str]:
    """Count how often each set is sampled in some epochs."""
    sampler = data.train_dataloader().batch_sampler
    order = np.concatenate([sampler.order(epoch) for epoch in range(epochs)])
    names = [data.train_samples.demos[demo].name for demo in data.train_samples.sample_demo[order]]
    return Counter(name.partition("/")[0] for name in names)


def test_demos_of_all_roots_are_there_under_names_that_tell_them_apart(roots: list[str], robot_demos: Make) -> None:
    data = ready(robot_demos(roots, val_fraction=0.0))
    assert [demo.name for demo in data.demos] == [f"a/demo_{n}" for n in range(6)] + ["b/demo_0", "b/demo_1"]
    assert data.root_of == [0] * 6 + [1] * 2
    assert set(data.contents) == {demo.name for demo in data.demos}
    assert data.origin["root"] == roots
    assert data.statistics.position_range[1][2] > 0.45  # the range covers both sets
    alone = ready(robot_demos([roots[0]], val_fraction=0.0))
    assert alone.demos[0].name == "demo_0"
    assert alone.contents == {name[2:]: content for name, content in data.contents.items() if name.startswith("a/")}


def test_weights_are_shares_of_every_epoch(roots: list[str], robot_demos: Make) -> None:
    plain = drawn(ready(robot_demos(roots, val_fraction=0.0)))
    assert plain["a"] == 72 * 4  # each frame once
    weighted = drawn(ready(robot_demos(roots, val_fraction=0.0, weights=[1, 3])))
    assert (weighted["a"], weighted["b"]) == (30 * 4, 90 * 4)
    seen = ready(robot_demos(roots, val_fraction=0.0, weights=[1, 3]))
    state = seen.state_dict()
    with pytest.raises(ValueError, match=r"data\.weights=\[1\.0, 3\.0\], this run has \[1\.0, 1\.0\]"):
        ready(robot_demos(roots, val_fraction=0.0, weights=[1, 1])).load_state_dict(state)


def test_shares_are_exact_and_equal_without_weights() -> None:
    groups = np.repeat([0, 1, 2], [50, 30, 21])
    sampler = GlobalBatchSampler(101, 10, groups=groups, weights=[0.5, 0.25, 0.25])
    for epoch in range(3):
        counts = np.bincount(groups[sampler.order(epoch)])
        assert counts.sum() == 101
        assert np.abs(counts - 101 * np.array([0.5, 0.25, 0.25])).max() < 1
    with pytest.raises(ValueError, match="2 weights for 3 groups"):
        GlobalBatchSampler(101, 10, groups=groups, weights=[1, 1])


def test_what_a_weight_repeats_in_an_epoch_is_augmented_anew() -> None:
    groups = np.repeat([0, 1], [90, 10])
    sampler = GlobalBatchSampler(100, 10, groups=groups, weights=[0.5, 0.5])
    keys = [key for batch in sampler for key in batch]
    assert len(set(keys)) == 100
    few = [key for key in keys if key.sample >= 90]
    assert sorted({key.repeat for key in few}) == [0, 1, 2, 3, 4]
    draws = {sample_generator(0, key).random() for key in keys}
    assert len(draws) == 100
    sampler.position = lambda: 4  # a resumed run continues with the same keys
    assert [key for batch in sampler for key in batch] == keys[40:]
    plain = [key for batch in GlobalBatchSampler(100, 10) for key in batch]
    assert {key.repeat for key in plain} == {0}
    first = np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, plain[0].epoch, plain[0].sample)))).random()
    assert sample_generator(0, plain[0]).random() == first


def test_max_demos_is_the_number_of_each_set(roots: list[str], robot_demos: Make) -> None:
    data = ready(robot_demos(roots, val_fraction=0.0, max_demos=2))
    assert [demo.name for demo in data.demos] == ["a/demo_0", "a/demo_1", "b/demo_0", "b/demo_1"]
    with pytest.raises(ValueError, match=r"data\.max_demos=3, but .*b holds 2 readable demos"):
        robot_demos(roots, max_demos=3).setup("fit")


def test_a_broken_set_is_not_hidden_by_a_good_one(roots: list[str], robot_demos: Make) -> None:
    (Path(roots[1]) / "demo_0" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 demos in .*b are broken"):
        robot_demos(roots).setup("fit")
    data = ready(robot_demos(roots, max_broken_share=0.5, val_fraction=0.0))
    assert [error.name for error in data.broken] == ["b/demo_0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": [1.0]}, "one for each of several"),
        ({"weights": [1.0, 0.0]}, "must be positive"),
        ({"weights": [1.0, float("nan")]}, "must be positive"),
        ({"weights": [1.0, 1.0], "balance": "task"}, "give one of them"),
        ({"calibration": ["x.yaml"]}, "1 files for 2 roots"),
        ({"root": ["x/demos", "y/demos"]}, "two roots are called 'demos'"),
        ({"root": []}, "empty list"),
        ({"root": "x", "weights": [1.0]}, "one for each of several"),
        ({"frame_stride": [1, 2, 3]}, "names 3 strides for 2 roots"),
        ({"frame_stride": [1, 0]}, "whole numbers of at least 1"),
        ({"frame_stride": 0}, "whole numbers of at least 1"),
        ({"camera_names": {"c": {"top": "over"}}}, "no root 'c'; roots are a, b"),
        ({"camera_names": {"b": {"top": "over", "side": "over"}}}, "two cameras would have the same name"),
    ],
)
def test_what_cannot_be_is_said(roots: list[str], robot_demos: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        robot_demos(changes.pop("root", roots), **changes)


def resampled(demo: Path, fps: float, change_metadata: Any, change_archive: Any) -> None:
    """Give a demo another frame rate with the same frames."""
    with np.load(demo / "trajectory.npz") as archive:
        frames = len(archive["timestamps_ns"])
    change_archive(demo / "trajectory.npz", timestamps_ns=(np.arange(frames) * 1e9 / fps).round().astype(np.int64))
    change_metadata(demo, fps=fps)


@pytest.fixture
def rates(roots: list[str], change_metadata: Any, change_archive: Any) -> list[str]:
    """Give the first set 30 frames per second and the second 20."""
    for root, fps in zip(roots, (30.0, 20.0), strict=True):
        for demo in Path(root).iterdir():
            resampled(demo, fps, change_metadata, change_archive)
    return roots


def test_sets_of_different_rates_have_steps_of_as_many_seconds(rates: list[str], robot_demos: Make) -> None:
    data = ready(robot_demos(rates, frame_stride=[3, 2], targets="reached"))
    assert data.statistics.step_seconds == pytest.approx(0.1)
    assert data.origin["frame_stride"] == [3, 2]
    assert data.statistics.horizon == 3
    for samples in (data.train_samples, data.val_samples):
        for key in range(0, len(samples), 5):
            sample = samples[key]
            demo = data.demos[int(sample.demo_index)]
            stride = {"a": 3, "b": 2}[demo.name[0]]
            ahead = np.minimum(int(sample.frame_index) + stride * np.arange(1, 4), len(demo) - 1)
            np.testing.assert_allclose(sample.position[0], demo.arms["right"].position[ahead], atol=1e-6)
    chunks = data.statistics.chunks
    assert chunks is not None
    moved = (chunks.position[:, 0, 0] - chunks.start_position[:, 0])[~chunks.action_is_pad[:, 0, 0], 0]
    assert {round(float(way), 4) for way in moved} == {0.015, 0.01}  # 5 mm per frame, three and two frames per step
    off = data.off_screen_shares()
    alone = ready(robot_demos(rates[1], frame_stride=2, targets="reached")).off_screen_shares()
    assert {name[2:]: share for name, share in off.items() if name.startswith("b/")} == alone


def test_steps_of_different_times_are_refused_with_strides_that_fit(
    rates: list[str], robot_demos: Make, change_metadata: Any, change_archive: Any
) -> None:
    said = (
        r"different times in the data sets \(a 30 frames/s and a stride of 2: 0\.0667 s, b 20 frames/s and a stride of "
        r"2: 0\.1 s\): data\.frame_stride=\[3,2\], in the order of data\.root, makes steps of 0\.1 s in all"
    )
    with pytest.raises(ValueError, match=said):
        robot_demos(rates, frame_stride=2).setup("fit")
    resampled(Path(rates[0]) / "demo_3", 20.0, change_metadata, change_archive)
    with pytest.raises(ValueError, match=r"demos of a run at different rates .*a/demo_3: 20 .*a folder for each rate"):
        robot_demos(rates, frame_stride=[3, 2]).setup("fit")


@pytest.mark.parametrize(
    ("rates", "seconds", "strides"),
    [
        ((30, 20), 0.05, [3, 2]),
        ((30, 20), 0.21, [6, 4]),
        ((10, 50, 30), 0.1, [1, 5, 3]),
        ((29.97, 30, 20), 0.1, [3, 3, 2]),
        ((7.3, 30), 0.14, [1, 4]),
        ((1000, 20), 0.1, [100, 2]),
        ((25, 30), 0.1, [5, 6]),
        ((10, 10.7), 0.2, [14, 15]),
    ],
)
def test_strides_that_fit_make_equal_steps_of_about_the_time_that_was_asked_for(
    rates: tuple[float], seconds: float, strides: list[int]
) -> None:
    assert equal_strides(rates, seconds) == strides


def test_cameras_that_are_called_otherwise_in_one_set_are_renamed(
    roots: list[str], robot_demos: Make, tmp_path: Path, native_demo: Any
) -> None:
    rows, samples = (0, 80, 110), ready(robot_demos(roots, val_fraction=0.0)).train_samples
    expected = [samples[row] for row in rows]
    for demo in Path(roots[1]).iterdir():
        shutil.rmtree(demo)
    for number in range(2):
        native_demo(
            tmp_path / "b" / f"demo_{number}", seed=10 + number, frames=24, level=0.4 + number / 10, cameras=("top",)
        )
    with pytest.raises(ValueError, match="it has no camera 'over'; it has top"):
        robot_demos(roots).setup("fit")
    data = ready(robot_demos(roots, val_fraction=0.0, camera_names={"b": {"top": "over"}}, cache_gb=0.1))
    for row, other in zip(rows, expected, strict=True):
        one = data.train_samples[row]
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.intrinsics, other.intrinsics)
    for ours in ("wrist", "over"):  # also a name that another camera of the set has already
        with pytest.raises(ValueError, match=r"camera_names\.a: no demo of .* has a camera 'side'"):
            robot_demos(roots, camera_names={"b": {"top": "over"}, "a": {"side": ours}}).setup("fit")
    native_demo(tmp_path / "b" / "demo_9", cameras=("top", "over"))
    both = robot_demos(roots, camera_names={"b": {"top": "over"}}, max_broken_share=0.5)
    both.setup("fit")
    assert ["two of its cameras" in error.reason for error in both.broken] == [True]


@pytest.mark.parametrize(
    ("embodiments", "may_keep_apart", "told"), [((), True, True), ((), False, False), (("yam", "panda"), True, False)]
)
def test_robots_that_a_model_could_keep_apart_and_does_not_are_told(
    roots: list[str],
    robot_demos: Make,
    caplog: pytest.LogCaptureFixture,
    embodiments: tuple[str, ...],
    may_keep_apart: bool,
    told: bool,
) -> None:
    caplog.set_level("INFO")
    data = robot_demos(roots)
    data.configure_for(SimpleNamespace(embodiments=embodiments, may_keep_apart=may_keep_apart))
    ready(data)
    assert ("model.actions.embodiments=[panda,yam]" in caplog.text) == told
    assert f"{roots[0]}, {roots[1]}: {len(data.demos)} demos, " in caplog.text
    caplog.clear()
    one = robot_demos(roots[:1])
    one.configure_for(SimpleNamespace(embodiments=(), may_keep_apart=True))
    ready(one)
    assert "model.actions.embodiments" not in caplog.text
