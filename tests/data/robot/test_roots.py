"""Several data sets at once: their demos' names, weights, calibrations, and what each is checked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keygrip.data.robot.datamodule import RobotDemos
from keygrip.data.shards.sampling import GlobalBatchSampler

Make = Callable[..., RobotDemos]


@pytest.fixture
def roots(tmp_path: Path, native_demo: Any, change_metadata: Any) -> list[str]:
    """A set of six demos of 12 frames, and one of two of 24, of another robot."""
    for number in range(6):
        native_demo(tmp_path / "a" / f"demo_{number}", seed=number, level=0.1 + 0.01 * number)
    for number in range(2):
        folder = native_demo(tmp_path / "b" / f"demo_{number}", seed=10 + number, frames=24, level=0.4 + number / 10)
        change_metadata(folder, robot="panda")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def ready(data: RobotDemos) -> RobotDemos:
    data.setup("fit")
    return data


def drawn(data: RobotDemos, epochs: int = 4) -> Counter[str]:
    """How often each set is drawn in some epochs."""
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
    assert data.statistics.position_range[1][2] > 0.45  # of both
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
    ],
)
def test_what_cannot_be_is_said(roots: list[str], robot_demos: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        robot_demos(changes.pop("root", roots), **changes)
