"""Closed-loop success by what the instruction asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.expert import expert_actions
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation import closed_loop
from keygrip.evaluation.callback import show_in_loggers
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult, EpisodeResult
from keygrip.models.policy import Observation, Plan, views_of
from keygrip.runtime.chunk_execution import RecedingHorizon

TASK = TaskOptions(name="named_place", distractors=2, pedestal_m=0.06, camera_jitter_deg=5.0)


def result(
    seed: int, success: bool, colour: str = "red", height_cm: float = 0.0, instruction: str = "do it"
) -> EpisodeResult:
    failure = None if success else "missed"
    return EpisodeResult(seed, success, failure, 5.0, 3, 10.0, None, None, None, instruction, colour, height_cm)


def test_rates_of_each_colour_and_height_stand_beside_the_total() -> None:
    episodes = [
        result(i, i % 4 != 0, ("red", "blue")[i % 2], height) for i, height in enumerate([0, 0.5, 3.9, 4, 5, 6.0])
    ]
    summary = ConditionResult("as_trained", {}, episodes).summary()
    assert (summary["successes"], summary["episodes"]) == (4, 6)
    colours = {name: (part["successes"], part["episodes"]) for name, part in summary["by_colour"].items()}
    assert colours == {"blue": (3, 3), "red": (1, 3)}
    heights = {name: (part["successes"], part["episodes"]) for name, part in summary["by_height"].items()}
    assert heights == {"0-2 cm": (1, 2), "2-4 cm": (1, 1), "4-6 cm": (1, 2), "6-8 cm": (1, 1)}
    red = summary["by_colour"]["red"]
    assert red["success_low"] < red["success_rate"] == 1 / 3 < red["success_high"]


def test_what_does_not_vary_is_not_broken_down() -> None:
    summary = ConditionResult("as_trained", {}, [result(0, True), result(1, False)]).summary()
    assert "by_colour" not in summary
    assert "by_height" not in summary
    assert "by_instruction" not in summary


def test_rates_of_each_instruction_stand_beside_the_total() -> None:
    sentences = ["lift it", "push it", "push it", ""]
    episodes = [result(i, i != 1, colour="", instruction=sentence) for i, sentence in enumerate(sentences)]
    summary = ConditionResult("as_trained", {}, episodes).summary()
    sentences_of = {name: (part["successes"], part["episodes"]) for name, part in summary["by_instruction"].items()}
    assert sentences_of == {"lift it": (1, 1), "no instruction": (1, 1), "push it": (1, 2)}
    pushed = summary["by_instruction"]["push it"]
    assert pushed["success_low"] < pushed["success_rate"] == 0.5 < pushed["success_high"]


def test_a_breakdown_of_more_than_200_instructions_is_left_out() -> None:
    for number in (200, 201):
        episodes = [result(i, True, instruction=f"go to place {i}") for i in range(number)]
        assert ("by_instruction" in ConditionResult("as_trained", {}, episodes).summary()) == (number == 200)


def test_rates_of_instructions_are_logged_by_short_names(tmp_path: Path) -> None:
    """Sentences may be long, and may have characters that a logger replaces."""
    sentences = [
        "Push the red block, then lift it slowly off the table",
        "Push the red block, then lift it slowly. Stop",
    ]
    episodes = [result(i, i == 0, colour="", instruction=sentence) for i, sentence in enumerate(sentences)]
    results = [ConditionResult("as_trained", {}, episodes)]
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda figures, step: logged.update(figures))
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=2)
    show_in_loggers(trainer, closed_loop.summarise(results), results, tmp_path)
    name = "closed_loop/as_trained/success_rate"
    short = "push_the_red_block_then_lift_it_slowly_o"
    other = "push_the_red_block_then_lift_it_slowly_s"
    assert logged == {name: 0.5, f"{name}_by_kind/{short}": 1.0, f"{name}_by_kind/{other}": 0.0}


class Person:
    """Plans the expert's actions for the cube that `choose` selects; stores its observations."""

    def __init__(self, choose: Callable[[Any, Observation], Any]) -> None:
        self.choose, self.cell = choose, None
        self.seeds: list[int] = []
        self.seen: list[Observation] = []

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)

    def plan(self, observation: Observation) -> Plan:
        self.seen.append(observation)
        layout = self.cell().layout  # type: ignore[misc]
        chosen = self.choose(layout, observation)
        others = tuple(cube for cube in layout.placed if cube is not chosen)
        actions = expert_actions(replace(layout, object=chosen, distractors=others), TASK, self.seeds[-1])
        return Plan(actions[None, :, :3], actions[None, :, 3:7], actions[None, :, 7], step_seconds=0.1)


def reads(layout: Any, observation: Observation) -> Any:
    (named,) = [cube for cube in layout.placed if f" {cube.colour} " in observation["instruction"]]
    return named


def prefers_red(layout: Any, observation: Observation) -> Any:
    (red,) = [cube for cube in layout.placed if cube.colour == "red"]
    return red


def drive(monkeypatch: pytest.MonkeyPatch, policy: Person, **settings: Any) -> ConditionResult:
    module = type("Module", (), {"policy": lambda self: policy})()
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: module)
    original = closed_loop._Worker.__init__

    def remember(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        policy.cell = lambda: self._environment[1]  # type: ignore[assignment]

    monkeypatch.setattr(closed_loop._Worker, "__init__", remember)
    control = partial(RecedingHorizon, execute_seconds=300.0)
    loop = ClosedLoop(TASK, {"as_trained": [{}]}, control=control, processes=1, image_size=32, videos=0, **settings)
    return loop.run(Path("checkpoint"))[0]


def test_who_reads_the_instruction_succeeds_and_sees_every_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Person(reads)
    condition = drive(monkeypatch, policy, cameras=["over", "front"], episodes=3)
    assert condition.summary()["successes"] == 3
    assert policy.seeds == [1_000_000, 1_000_001, 1_000_002]
    assert [episode.colour in episode.instruction for episode in condition.episodes] == [True] * 3
    assert len({episode.height_cm for episode in condition.episodes}) == 3
    over, front = views_of(policy.seen[0], ("over", "front"))
    assert over["image"].shape == front["image"].shape == (32, 32, 3)
    assert not np.array_equal(over["image"], front["image"])


def test_images_are_drawn_for_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping the other images does not change the result."""
    drawn: list[int] = []
    observe = YamCell.observation

    def count(cell: YamCell) -> dict[str, Any]:
        drawn.append(cell.elapsed)
        return observe(cell)

    monkeypatch.setattr(YamCell, "observation", count)
    (seldom,) = drive(monkeypatch, Person(reads), episodes=1).episodes
    assert len(drawn) <= 3  # at the start, and after the one long plan
    monkeypatch.setattr(RecedingHorizon, "wants_observation", True)
    (always,) = drive(monkeypatch, Person(reads), episodes=1).episodes
    assert len(drawn) > 30
    assert (seldom.success, seldom.seconds, seldom.plans) == (always.success, always.seconds, always.plans)


def test_who_does_not_read_it_moves_the_wrong_object(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = drive(monkeypatch, Person(prefers_red), episodes=4).summary()
    named = summary["by_colour"]
    assert {colour: part["success_rate"] for colour, part in named.items()} == {
        colour: float(colour == "red") for colour in named
    }
    assert summary["failures"] == {"wrong_object": 4 - summary["successes"]}


def test_a_view_that_the_policy_was_trained_with_must_be_there() -> None:
    plain = {"image": 1, "intrinsics": 2, "world_to_camera": 3}
    assert views_of(plain, ("over",)) == [plain]
    assert views_of({"cameras": {"a": plain, "b": plain | {"image": 4}}}, ("b", "a")) == [plain | {"image": 4}, plain]
    with pytest.raises(ValueError, match=r"lacks camera 'over'.*it has one unnamed image"):
        views_of(plain, ("over", "front"))
    with pytest.raises(ValueError, match=r"lacks camera 'wrist'.*it has over, front"):
        views_of({"cameras": {"over": plain, "front": plain}}, ("over", "wrist"))
