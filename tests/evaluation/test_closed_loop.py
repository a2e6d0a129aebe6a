"""Closed-loop evaluation: intervals, conditions, and a policy that is given the goal against one that is not."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_episodes
from scripts import imported

from keygrip.data.video import read_video
from keygrip.envs.gymnasium_environment import GymnasiumTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation import closed_loop
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult, EpisodeResult, summarise
from keygrip.evaluation.rollout_report import write_report
from keygrip.evaluation.statistics import wilson_interval
from keygrip.models.policy import Plan
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.signals import Interrupted, ignore_terminal_signals


def test_wilson_interval_against_published_values() -> None:
    # Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion" (2001): limits by direct computation.
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson_interval(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert wilson_interval(100, 100)[1] == 1.0
    with pytest.raises(ValueError, match="needs trials"):
        wilson_interval(1, 0)


@dataclass
class Reacher:
    """Plans a straight path to the position of the ball that it is given; ``lost`` policies stay where they are."""

    goal: Any
    lost: bool = False

    def plan(self, observation: Any) -> Plan:
        start = np.asarray(observation["position"])
        goal = start if self.lost else self.goal()
        path = start + (goal - start) * np.linspace(0.25, 1, 4)[:, None]
        quaternion = np.tile(np.asarray(observation["quaternion"]), (1, 4, 1))
        return Plan(path[None], quaternion, np.ones((1, 4)), step_seconds=0.3)


class FakeModule:
    """Stands in for a loaded checkpoint: returns a policy."""

    worker: Any = None
    lost = False

    def policy(self) -> Reacher:
        return Reacher(lambda: FakeModule.worker._environment[1].layout.goal, self.lost)


def run(
    monkeypatch: pytest.MonkeyPatch, output: Path | None, lost: bool = False, **settings: Any
) -> list[ConditionResult]:
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: FakeModule())
    monkeypatch.setattr(FakeModule, "lost", lost)
    original = closed_loop._Worker.__init__

    def remember(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        FakeModule.worker = self

    monkeypatch.setattr(closed_loop._Worker, "__init__", remember)
    options: dict[str, Any] = {"episodes": 3, "processes": 1, "image_size": 64, "videos": 1}
    loop = ClosedLoop(TaskOptions(name="reach"), **{"conditions": {"as_trained": [{}]}, **options, **settings})
    return loop.run(Path("checkpoint"), output)


def test_a_policy_that_knows_succeeds_and_is_filmed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = run(monkeypatch, tmp_path)
    figures = summarise(results)
    assert figures["as_trained"]["success_rate"] == 1.0
    assert figures["as_trained"]["failures"] == {}
    assert [episode.seed for episode in results[0].episodes] == [1_000_000, 1_000_001, 1_000_002]
    (film,) = (tmp_path / "videos").iterdir()
    frames = read_video(film)
    steps = round(results[0].episodes[0].seconds * 10)
    assert frames.shape == (steps + 1, 128, 128, 3)
    assert frames.std() > 10
    assert write_report(results, tmp_path / "result.json", tasks=False) == {"conditions": figures}
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["episodes"]["as_trained"][0]["video"] == film.name


def test_a_policy_that_does_not_move_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = run(monkeypatch, None, lost=True)
    assert result.summary()["successes"] == 0
    assert result.summary()["failures"] == {"missed": 3}


def test_a_policy_can_be_changed_and_unknown_changes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = run(monkeypatch, None, policy={"lost": True})
    assert result.summary()["successes"] == 0
    with pytest.raises(ValueError, match="Reacher has no setting 'lots'; did you mean 'lost'"):
        run(monkeypatch, None, policy={"lots": True})


def test_a_grid_is_shared_out_over_the_episodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(
        closed_loop._Worker,
        "episode",
        lambda self, job: (
            seen.append((job.seed, job.overrides["camera_azimuth_deg"]))
            or EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None)
        ),
    )
    grid = [{"camera_azimuth_deg": -10.0}, {"camera_azimuth_deg": 10.0}]
    results = run(monkeypatch, None, conditions={"turned": grid}, episodes=4)
    assert sorted(seen) == [(1_000_000, -10.0), (1_000_001, 10.0), (1_000_002, -10.0), (1_000_003, 10.0)]
    assert len(results[0].episodes) == 4
    assert "are left out" not in caplog.text
    (fewer,) = run(monkeypatch, None, conditions={"turned": grid}, episodes=1)
    assert fewer.overrides == {"grid": grid[:1]}
    assert "episodes=1: 1 of the 2 entries of condition turned are left out" in caplog.text


def test_the_policys_own_failure_is_counted_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, observation: Any) -> Plan:
        raise ValueError("no ray meets its plane")

    monkeypatch.setattr(Reacher, "plan", fails)
    (result,) = run(monkeypatch, None)
    assert result.summary()["failures"] == {"policy_error": 3}
    assert result.episodes[0].detail == "no ray meets its plane"


def test_a_plan_that_is_not_finite_is_the_policys_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Reacher.plan
    monkeypatch.setattr(Reacher, "plan", lambda *given: replace(original(*given), position=np.full((1, 4, 3), np.nan)))
    (result,) = run(monkeypatch, tmp_path)
    assert result.summary()["failures"] == {"policy_error": 3}
    assert result.episodes[0].detail == "the policy's plan is not finite"
    assert len(list((tmp_path / "videos").iterdir())) == 1


def test_episodes_of_a_grids_entry_are_neighbours() -> None:
    """This also holds where entries differ in a mapping, which has no order."""
    grid = [{"options": {"a": 1}}, {"options": {"a": 2}}]
    loop = ClosedLoop(GymnasiumTask("my_lab:Lift-v0"), {"levels": grid}, episodes=4, videos=1)
    first, other = grid
    filmed, *others = loop._jobs(Path("out"))
    assert filmed.video is not None
    assert [(job.overrides, job.seed - loop.first_seed) for job in (filmed, *others)] == [
        (first, 0),
        (first, 2),
        (other, 1),
        (other, 3),
    ]


def test_an_evaluation_that_fails_keeps_the_episodes_that_had_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, seeds = closed_loop.run_episode, []

    def third_fails(environment: Any, policy: Any, control: Any, seed: int, video: Any) -> EpisodeResult:
        seeds.append(seed)
        if len(seeds) == 3:
            raise RuntimeError("the simulator became unstable")
        return original(environment, policy, control, seed, video)

    monkeypatch.setattr(closed_loop, "run_episode", third_fails)
    with pytest.raises(RuntimeError, match="unstable"):
        run(monkeypatch, tmp_path, videos=0)
    kept = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [(each["condition"], each["seed"], each["success"]) for each in kept] == [
        ("as_trained", 1_000_000, True),
        ("as_trained", 1_000_001, True),
    ]
    assert f"2 of 3 episodes had ended: {tmp_path / 'episodes.jsonl'}" in caplog.text


@pytest.mark.parametrize("dies", [(1,), (1, 2), (1, 2, 3)])
def test_an_episode_at_which_a_process_dies_twice_alone_ends_the_evaluation(
    dies: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, list[int]]] = []

    def at_episode_1(self: ClosedLoop, checkpoint: Path, jobs: Any, processes: int, results: Any) -> None:
        asked.append((processes, [job.seed - 1_000_000 for job in jobs]))
        for job in jobs:
            if job.seed == 1_000_001 and len(asked) in dies:
                raise BrokenProcessPool
            results.add(job, EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None))

    monkeypatch.setattr(ClosedLoop, "_run_in_pool", at_episode_1)
    if len(dies) == 3:
        with pytest.raises(ValueError, match=r"died .*, twice at an episode \(condition as_trained, seed 1000001\)"):
            run(monkeypatch, None, processes=2)
    else:
        (result,) = run(monkeypatch, None, processes=2)
        assert [episode.seed for episode in result.episodes] == [1_000_000, 1_000_001, 1_000_002]
    assert asked == [(2, [0, 1, 2])] + [(1, [1, 2])] * min(len(dies), 2)
    assert ("a process died at seed 1000001 of as_trained, which is run again" in caplog.text) == (len(dies) > 1)


def test_processes_may_die_at_several_episodes_and_only_those_that_ran_are_run_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, list[int]]] = []
    ends = {1: 2, 2: 1, 4: 0}  # attempt -> its number of results before a process dies

    def in_order(self: ClosedLoop, checkpoint: Path, jobs: Any, processes: int, results: Any) -> None:
        asked.append((processes, [job.seed - 1_000_000 for job in jobs]))
        for job in jobs[: ends.get(len(asked))]:
            results.add(job, EpisodeResult(job.seed, True, None, 1.0, 1, 1.0, None, None))
        if len(asked) in ends:
            raise BrokenProcessPool

    monkeypatch.setattr(ClosedLoop, "_run_in_pool", in_order)
    (result,) = run(monkeypatch, None, processes=2, episodes=8)
    assert [episode.seed for episode in result.episodes] == list(range(1_000_000, 1_000_008))
    # the processes die at episode 2 or 3, at 3 (its first death for certain), and at 4 or 5
    assert asked == [(2, list(range(8))), (1, [2, 3]), (1, [3]), (2, [4, 5, 6, 7]), (1, [4, 5]), (2, [6, 7])]
    assert sum("the 2 episodes that ran then are run again, one after another" in text for text in caplog.messages) == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_processes_of_an_evaluation_leave_a_terminals_signals_to_the_first_one(name: str) -> None:
    number = signal.Signals[name]
    shown = f"import signal; print(signal.getsignal(signal.{name}) == signal.SIG_IGN)"
    before = signal.getsignal(number)
    with ignore_terminal_signals():
        inside = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert inside.stdout.strip() == "True"
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_an_interrupted_evaluation_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[Any] = []

    def interrupted(self: Any, job: Any, result: EpisodeResult) -> None:
        running.extend(process for process in multiprocessing.active_children() if process not in others)
        raise Interrupted("stopped by SIGTERM")

    others = multiprocessing.active_children()
    monkeypatch.setattr(closed_loop, "_start_worker", slow_episodes.start)
    monkeypatch.setattr(closed_loop, "_work", slow_episodes.work)
    monkeypatch.setattr(closed_loop._Results, "add", interrupted)
    with pytest.raises(Interrupted):
        run(monkeypatch, None, processes=2)
    assert len(running) == 2
    for process in running:
        process.join(30)
    assert -signal.SIGTERM in [process.exitcode for process in running], "the one whose episode was under way"


def test_the_environment_of_the_last_episode_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = [], []
    original = closed_loop.open_environment

    def remembered(*given: Any) -> Any:
        environment = original(*given)
        opened.append(environment)
        close = environment.close
        monkeypatch.setattr(environment, "close", lambda: (closed.append(environment), close()))
        return environment

    monkeypatch.setattr(closed_loop, "open_environment", remembered)
    run(monkeypatch, None, conditions={"as_trained": [{}], "turned": [{"camera_azimuth_deg": 10.0}]}, episodes=1)
    assert len(opened) == 2
    assert closed == opened


@pytest.mark.slow
def test_processes_of_an_evaluation_close_their_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(closed_loop, "_start_worker", slow_episodes.start_closing)
    ClosedLoop(TaskOptions(name="reach"), {"as_trained": [{}]}, episodes=2, processes=2).run(tmp_path)
    worked, closed = ({file.name.partition("-")[2] for file in tmp_path.glob(f"{a}-*")} for a in ("worked", "closed"))
    assert worked
    assert closed == worked


def test_unknown_options_and_empty_conditions_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'region'"):
        ClosedLoop(TaskOptions(), conditions={"shifted": [{"regoin": "left"}]})
    with pytest.raises(ValueError, match="empty"):
        ClosedLoop(TaskOptions(), conditions={})
    with pytest.raises(ValueError, match="at least 1"):
        ClosedLoop(TaskOptions(), conditions={"a": [{}]}, episodes=0)
    with pytest.raises(ValueError, match=r"^closed_loop\.first_seed is at least 0, got -1\.$"):
        ClosedLoop(TaskOptions(), conditions={"a": [{}]}, first_seed=-1)
    with pytest.raises(ValueError, match="together"):
        ClosedLoop(TaskOptions(), conditions={"a": [{}]}, control=partial(RecedingHorizon, grip_below=None))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--env", "metaworld", "--hz", "20"], "--hz is for the YAM cell: Meta-World has one rate, 80 Hz"),
        (["--env", "yam", "--processes", "2"], "--processes is for Meta-World: the YAM cell runs in one process"),
    ],
)
def test_options_of_the_other_environment_are_refused_for_a_peer(
    given: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--server", "http://127.0.0.1:1", "--python", "/nowhere", *given])
    with pytest.raises(SystemExit) as ended:
        imported("benchmarks/peers/evaluate.py").main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
