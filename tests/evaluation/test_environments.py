"""Environments with one interface: in this process, in another Python process, and chosen by name."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gym_lab import GOAL

from keygrip.config import option_of
from keygrip.data.video import read_video
from keygrip.envs.environment import Environment, open_environment
from keygrip.envs.gymnasium_environment import GymnasiumEnvironment, GymnasiumTask
from keygrip.envs.metaworld.tasks import MT10, MetaWorldTask
from keygrip.envs.workers import run_jobs
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation import closed_loop
from keygrip.evaluation.closed_loop import ClosedLoop, ConditionResult
from keygrip.evaluation.environments import EnvironmentSettings, environment_settings, task_conditions
from keygrip.evaluation.remote_rollouts import served
from keygrip.evaluation.rollout_grid import grid_of_rollouts
from keygrip.evaluation.rollout_report import over_tasks
from keygrip.evaluation.rollout_worker import policy_at
from keygrip.evaluation.rollouts import EpisodeResult
from keygrip.models.policy import Needs, Plan
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.training.parts import UntrustedPartError

POINT = GymnasiumTask("gym_lab:CalibratedPointMass-v0", instruction="go there", time_limit_s=3.0)
SUPPORT = str(Path(__file__).parents[1] / "support")


class ToGoal:
    """Plans a straight path to the goal, which is known."""

    needs = Needs(arms=("right",))

    def plan(self, observation: Any) -> Plan:
        here = np.asarray(observation["position"], float).reshape(3)
        share = np.linspace(0.25, 1, 4)[:, None]
        pose = np.tile([1.0, 0, 0, 0], (1, 4, 1))
        return Plan((here + share * (GOAL - here))[None], pose, np.ones((1, 4)), step_seconds=0.2)


class Module:
    def policy(self) -> Any:
        return ToGoal()


@pytest.fixture(autouse=True)
def _loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: Module())


def drive(output: Path | None, **settings: Any) -> list[ConditionResult]:
    loop = ClosedLoop(POINT, {"point": [{}]}, episodes=3, image_size=32, videos=1, **{"processes": 1, **settings})
    return loop.run(Path("checkpoint"), output)


def fixed(results: list[ConditionResult]) -> list[dict[str, Any]]:
    """Return the episodes without measured times."""
    return [{**vars(episode), "plan_ms": 0.0} for result in results for episode in result.episodes]


def test_a_gymnasium_environment_with_one_small_wrapper_is_evaluated(tmp_path: Path) -> None:
    here = drive(tmp_path / "here")
    assert [episode.success for episode in here[0].episodes] == [True, True, True]
    assert here[0].episodes[0].instruction == "go there"
    grid = grid_of_rollouts(here, tmp_path / "here" / "videos", tmp_path / "grid.mp4")
    assert grid is not None
    frames = read_video(grid)
    assert frames.shape[1:] == (200, 200, 3)
    red, green, _ = frames[0, 1].mean(axis=0)
    assert green > red + 60  # the green border marks a success


def test_episodes_in_another_process_are_those_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parents[2]), SUPPORT]))
    with monkeypatch.context() as context:
        context.setenv("POINT_MASS_CLOSED", str(tmp_path / "closed"))
        elsewhere = drive(tmp_path / "elsewhere", python=sys.executable)
    assert (tmp_path / "closed").exists()
    assert fixed(elsewhere) == fixed(drive(tmp_path / "here"))
    assert len(list((tmp_path / "elsewhere" / "videos").iterdir())) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this machine have a device "cuda"; returns the devices to which policies are moved, one for each copy."""
    places: list[str] = []

    class Placed(Module):
        def to(self, place: str) -> None:
            places.append(place)

    monkeypatch.setattr("keygrip.evaluation.trained_policy.load_module", lambda path, **options: Placed())
    for module in ("closed_loop", "trained_policy"):
        monkeypatch.setattr(f"keygrip.evaluation.{module}.refuse_missing_device", lambda device: None)
    return places


def work_here(self: ClosedLoop, source: Any, jobs: Any, processes: int, results: Any) -> None:
    """Do what the processes of an evaluation do, in this one."""
    worker = closed_loop._Worker(source, self)
    for job in jobs:
        results.add(job, worker.episode(job))
    worker.close()


def test_on_a_gpu_one_copy_plans_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    """Seeds and episodes are those of the CPU."""
    expected = fixed(drive(tmp_path / "here"))
    monkeypatch.setattr(ClosedLoop, "_run_in_pool", work_here)
    assert fixed(drive(tmp_path / "served", device="cuda", processes=2)) == expected
    assert gpu == ["cuda"]
    assert fixed(drive(tmp_path / "one", device="cuda")) == expected  # one process plans itself
    assert gpu == ["cuda", "cuda"]


@pytest.mark.slow
def test_processes_request_plans_from_the_copy_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    expected = fixed(drive(tmp_path / "here"))
    assert fixed(drive(tmp_path / "served", device="cuda", processes=2)) == expected
    assert gpu == ["cuda"]


def test_a_policy_that_fails_on_the_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, gpu: list[str]) -> None:
    def fails(self: Any, observation: Any) -> Plan:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fails_otherwise(self: Any, observation: Any) -> Plan:
        raise RuntimeError("CUDA error")

    def worker_fails(*given: Any) -> Any:
        said = "the policy server answers 500: the policy failed: OutOfMemoryError: CUDA out of memory"
        raise ValueError(f"a worker process ended: {said}, twice at the job {{}}")

    monkeypatch.setattr(ClosedLoop, "_run_in_pool", work_here)
    with monkeypatch.context() as context:
        context.setattr(ToGoal, "plan", fails)
        for processes in (1, 2):
            with pytest.raises(ValueError, match="does not fit into the free memory of device=cuda: give device=cpu"):
                drive(None, device="cuda", processes=processes)
        context.setattr(closed_loop, "run_remote", worker_fails)
        with pytest.raises(ValueError, match="does not fit into the free memory of device=cuda: give device=cpu"):
            drive(None, device="cuda", python="python")
        context.setattr(ToGoal, "plan", fails_otherwise)
        said = (
            "closed loop with device=cuda: the policy server answers 500: the policy failed: RuntimeError: CUDA error"
        )
        with pytest.raises(ValueError, match=said):
            drive(None, device="cuda", processes=2)
    monkeypatch.setattr(Module, "policy", lambda self: fails(self, None))
    with pytest.raises(ValueError, match=r"does not fit into the free memory of device=cuda: give device=cpu"):
        drive(None, device="cuda")


def test_a_plan_may_wait_for_the_plans_of_all_processes() -> None:
    with served(ToGoal(), 96, 0) as url, policy_at(url, 96) as client:
        limits = client.health()["limits"]
        assert limits["plan_s"] == 300 + 96 * 30
        assert limits["session_s"] > limits["plan_s"]
        assert client._connection.timeout > limits["plan_s"]  # the server's answer says why there is no plan


def test_a_plan_that_takes_too_long_names_the_processes_that_wait(
    monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    advice = r"0\.1 s.*; this includes the wait for the plans of 2 processes: give fewer processes=N"

    def slow(self: Any, observation: Any) -> Any:
        time.sleep(0.5)

    def worker_fails(*given: Any) -> Any:
        raise ValueError(
            "a worker process ended: the policy server answers 504: the plan took longer than 0.1 s, twice"
        )

    monkeypatch.setattr(ClosedLoop, "_run_in_pool", work_here)
    monkeypatch.setattr("keygrip.evaluation.remote_rollouts.plan_timeout_s", lambda processes: 0.1)
    monkeypatch.setattr(ToGoal, "plan", slow)
    with pytest.raises(ValueError, match=f"closed loop with device=cuda: .* answers 504: .* longer than {advice}"):
        drive(None, device="cuda", processes=2)
    monkeypatch.setattr("keygrip.evaluation.remote_rollouts.run_jobs", worker_fails)
    with pytest.raises(ValueError, match=f"a worker process ended: .* longer than {advice}"):
        drive(None, python="python", processes=2)


def test_a_device_that_is_not_there_is_refused_before_any_episode() -> None:
    with pytest.raises(ValueError, match="device=cuda:99: this machine has"):
        ClosedLoop(POINT, {"point": [{}]}, device="cuda:99")
    with pytest.raises(ValueError, match="device=gpu: torch has no such device; give cpu or cuda"):
        ClosedLoop(POINT, {"point": [{}]}, device="gpu")


def test_an_environment_is_checked_where_its_episodes_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parents[2]), SUPPORT]))
    there = ClosedLoop(POINT, {"point": [{}]}, image_size=32, python=sys.executable)
    there.check(Needs(arms=("right",), instruction=True))
    with pytest.raises(ValueError, match="has 1 arms, the policy moves 2: left, right"):
        there.check(Needs(arms=("left", "right")))
    with pytest.raises(ValueError, match=r"give env\.image_size=32"):
        replace(there, image_size=64).check(None)


def test_a_package_that_serving_needs_is_missed_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "keygrip.runtime.server", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    there = ClosedLoop(POINT, {"point": [{}]}, image_size=32, python="nowhere/python")
    with pytest.raises(ModuleNotFoundError, match=r"serving needs aiohttp: pip install 'keygrip\[serve\]'"):
        there.check(None)
    monkeypatch.setattr("keygrip.evaluation.closed_loop.refuse_missing_device", lambda device: None)
    on_gpu = replace(there, python=None, processes=2, device="cuda")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'keygrip\[serve\]'; or give processes=1 .*device=cuda"):
        on_gpu.check(None)
    for unserved in ({"processes": 1}, {"device": "cpu"}, {"episodes": 1}):
        replace(on_gpu, **unserved).refuse_missing_packages()


def test_a_missing_interpreter_and_a_failing_worker_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no Python interpreter at nowhere/python.*env\.python"):
        drive(None, python="nowhere/python")
    with pytest.raises(ValueError, match="exit code"):
        list(run_jobs(sys.executable, "keygrip.no_such_module", {}, [{}], 1))
    setup = {"url": "http://127.0.0.1:9", "processes": 1, "control": {}}
    with pytest.raises(ValueError, match="no policy server answers"):
        list(run_jobs(sys.executable, "keygrip.evaluation.rollout_worker", setup, [{}], 1))


def test_environments_that_do_not_fit_are_named() -> None:
    assert isinstance(open_environment(POINT, 32, 10.0), Environment)
    assert isinstance(YamCell(TaskOptions(name="reach"), render_images=False), Environment)
    with pytest.raises(ValueError, match="cannot make 'Nothing-v0'"):
        open_environment(GymnasiumTask("Nothing-v0"), 32, 10.0)
    with pytest.raises(ValueError, match=r"lacks image, .*docs/environments.md"):
        open_environment(GymnasiumTask("gym_lab:PointMass-v0"), 32, 10.0).reset(seed=0)
    with pytest.raises(ValueError, match="is None: make the environment with render_mode='rgb_array'"):
        open_environment(GymnasiumTask("gym_lab:Blind-v0"), 32, 10.0).reset(seed=0)
    with pytest.raises(ValueError, match=r"env\.image_size=32"):
        open_environment(POINT, 64, 10.0).reset(seed=0)
    with pytest.raises(ValueError, match="names no environment"):
        open_environment(object(), 64, 10.0)


TWO = GymnasiumTask("gym_lab:TwoCameraPointMass-v0")


def test_the_first_named_camera_is_the_main_one() -> None:
    seen = open_environment(TWO, 32, 10.0, ("side", "over")).reset(seed=0)[0]
    assert seen["image"].max() == 45
    assert seen["world_to_camera"][0, 3] == pytest.approx(0.1)
    cell = open_environment(TWO, 32, 10.0)
    assert cell.reset(seed=0)[0]["image"].max() == 90
    cell.advance(np.array([0.0, 0, 0, 1, 0, 0, 0, 1]))
    assert cell.observation()["instruction"] == cell.outcome()[2]["instruction"] == "go to the goal"
    with pytest.raises(ValueError, match=r"no camera 'wrist' .* over, side: give env\.cameras"):
        open_environment(TWO, 32, 10.0, ("over", "wrist")).reset(seed=0)


def test_cameras_may_have_images_of_other_sizes(tmp_path: Path) -> None:
    """The image size is that of the observation's `image`, whichever cameras are used."""
    small = replace(TWO, id="gym_lab:SmallSidePointMass-v0")
    for cameras, size in ((None, 32), (("side",), 16), (("over", "side"), 32)):
        cell = open_environment(small, 32, 10.0, cameras)
        seen = cell.reset(seed=0)[0]
        assert seen["image"].shape == (size, size, 3)
        assert seen["cameras"]["side"]["intrinsics"][0, 0] == 20.0
        with pytest.raises(ValueError, match=r"are 32 x 32: give env\.image_size=32"):
            open_environment(small, 16, 10.0, cameras).reset(seed=0)
    loop = ClosedLoop(small, {"a": [{}]}, episodes=1, image_size=32, processes=1, cameras=["side", "over"])
    assert loop.run(Path("checkpoint"), tmp_path)[0].episodes[0].success


def test_an_episode_ends_when_the_environment_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PointMass-v0 is registered with 40 steps; a limit in seconds may end the episode earlier."""

    def steps(limit: float | None, hz: float, name: str = "CalibratedPointMass-v0") -> int:
        cell = open_environment(GymnasiumTask(f"gym_lab:{name}", time_limit_s=limit), 32, hz)
        cell.reset(seed=0)
        for step in range(1, 100):
            cell.advance(np.array([0.0, 0, 0, 1, 0, 0, 0, 1]))
            success, over, info = cell.outcome()
            if success or over:
                assert info["failure_reason"] == "timeout"
                return step
        raise AssertionError("it has not ended")

    assert GymnasiumTask("gym_lab:CalibratedPointMass-v0").time_limit_s is None
    assert steps(None, 1.0) == 40  # 40 s
    assert steps(3.0, 10.0) == 30
    assert steps(9.0, 10.0) == 40
    assert steps(1.5, 10.0, "EndlessPointMass-v0") == 15
    with pytest.raises(ValueError, match=r"has no max_episode_steps, .*: give env\.task\.time_limit_s=SECONDS"):
        steps(None, 10.0, "EndlessPointMass-v0")
    with pytest.raises(ValueError, match=r"env\.task\.time_limit_s=0: give seconds above 0, or null"):
        steps(0, 10.0)


@pytest.mark.parametrize("given", [None, "go to the goal"])
def test_an_instruction_that_is_none_is_no_text(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """Environments may leave the key at None, always or after the reset."""
    cell = open_environment(replace(TWO, instruction="go there"), 32, 10.0)
    reset, step = cell.env.reset, cell.env.step
    monkeypatch.setattr(cell.env, "reset", lambda **options: (reset(**options)[0], {"instruction": given}))
    monkeypatch.setattr(cell.env, "step", lambda action: (*step(action)[:4], {"instruction": None}))
    expected = given or "go there"
    assert cell.reset(seed=0)[0]["instruction"] == expected
    cell.advance(np.array([0.0, 0, 0, 1, 0, 0, 0, 1]))
    assert cell.observation()["instruction"] == cell.outcome()[2]["instruction"] == expected


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Needs(arms=("right",), instruction=True), "gives no instruction"),
        (Needs(arms=("right",), cameras=("over", "side")), "lacks camera 'over'"),
        (Needs(arms=("left", "right")), "has 1 arms, the policy moves 2"),
    ],
)
def test_what_the_environment_does_not_give_is_no_failed_episode(
    needs: Needs, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToGoal, "needs", needs)
    monkeypatch.setattr(sys.modules[__name__], "POINT", replace(POINT, instruction=""))
    with pytest.raises(ValueError, match=said):
        drive(None)


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        ("go to\nthe goal", r"instruction 'go to\\nthe goal' holds characters that are not printable"),
        ("go\u00a0there", r"instruction 'go\\xa0there' holds characters that are not printable, .*no-break spaces"),
        ("go" * 501, "instruction has 1002 bytes, more than 1000"),
    ],
)
@pytest.mark.parametrize("place", [{}, {"device": "cuda", "processes": 2}], ids=["here", "served"])
def test_instructions_that_a_server_refuses_are_no_failed_episodes(
    place: dict[str, Any], instruction: str, said: str, monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    monkeypatch.setattr(ClosedLoop, "_run_in_pool", work_here)
    monkeypatch.setattr(sys.modules[__name__], "POINT", replace(POINT, instruction=instruction))
    assert drive(None, **place)[0].summary()["success_rate"] == 1.0  # this policy does not read it
    monkeypatch.setattr(ToGoal, "needs", Needs(arms=("right",), instruction=True))
    with pytest.raises(ValueError, match=said):
        drive(None, **place)
    step = GymnasiumEnvironment.advance

    def advance(self: Any, action: np.ndarray) -> None:
        step(self, action)
        self._instruction = instruction

    monkeypatch.setattr(GymnasiumEnvironment, "advance", advance)  # in the middle of an episode
    monkeypatch.setattr(sys.modules[__name__], "POINT", replace(POINT, instruction="go there"))
    with pytest.raises(ValueError, match=said):
        drive(None, control=partial(RecedingHorizon, execute_seconds=0.2), **place)


RECORDED = option_of("env", "recorded")


def trained_on(root: Path | None, **data: Any) -> dict[str, Any]:
    return {"root": root and str(root), "record": {}, "cameras": None} | data


def write_recording(root: Path, *demos: str, **settings: Any) -> None:
    for name in demos:
        (root / name).mkdir(parents=True)
        (root / name / "metadata.json").write_text("{}")
    (root / "recording.json").write_text(json.dumps({"settings": settings}))


def chosen(data: dict[str, Any], name: str, **changes: Any) -> EnvironmentSettings:
    return environment_settings(data, option_of("env", name) | changes)


def test_a_recorded_folder_says_where_its_policy_is_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    with pytest.raises(ValueError, match="does not say in which environment"):
        environment_settings(trained_on(tmp_path), RECORDED)
    write_recording(tmp_path, task={"name": "pick", "object_size_m": 0.03}, image_size=96, hz=5.0)
    for name in ("recorded", "yam"):
        found = chosen(trained_on(tmp_path), name)
        assert (found.task, found.image_size, found.hz) == (TaskOptions(name="pick", object_size_m=0.03), 96, 5.0)
    write_recording(tmp_path, environment="gymnasium", task={"id": "os:Lift-v0"}, image_size=96, hz=5.0)
    with pytest.raises(ValueError, match=r"env=gymnasium env\.task\.id"):  # it does not choose the imported module
        environment_settings(trained_on(tmp_path), RECORDED)
    with pytest.raises(ValueError, match="trained on several data sets"):
        environment_settings({"root": ["a", "b"], "record": {}, "cameras": None}, RECORDED)
    large = '{"settings": {"environment": "gymnasium", "image_size": 1e400, "hz": 5}}'
    for broken in (
        large,
        "[" * 100_000,
        "[]",
        "{",
        '{"settings": 3}',
        '{"settings": {"task": {"nmae": "pick"}}}',
        '{"settings": {}}',
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match="does not describe a recording"):
            environment_settings(trained_on(tmp_path), RECORDED)


def test_what_a_chosen_environment_leaves_open_is_as_recorded_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_recording(tmp_path, task={"name": "pick", "object_size_m": 0.03}, image_size=96, hz=5.0)
    kind = {"_target_": "keygrip.envs.yam.tasks.TaskOptions"}
    found = chosen(trained_on(tmp_path), "yam", task=kind | {"object_size_m": 0.05}, image_size=128)
    assert found.task == TaskOptions(name="pick", object_size_m=0.05)
    assert (found.image_size, found.hz) == (128, 5.0)
    assert "env.image_size=128, and the demonstrations were recorded with 96" in caplog.text
    caplog.clear()
    elsewhere = chosen(trained_on(tmp_path), "yam_handover")
    assert (elsewhere.task, elsewhere.image_size, elsewhere.hz) == (HandoverTask(), 224, 10.0)
    assert "recorded in yam; the policy is judged in yam_handover" in caplog.text
    handover = tmp_path / "handover"
    handover.mkdir()
    write_recording(handover, task={"name": "handover", "camera": "front"}, image_size=96, hz=5.0)
    for name in ("recorded", "yam_handover"):
        found = chosen(trained_on(handover, camera="over"), name)
        assert (found.task, found.image_size, found.cameras) == (HandoverTask(camera="front"), 96, ["over"])
    simulated = {"task": kind | {"name": "reach"}, "image_size": 72, "hz": 5.0}
    found = chosen(trained_on(None, record=simulated, camera="over"), "yam")
    assert (found.task, found.image_size, found.hz, found.cameras) == (TaskOptions(name="reach"), 72, 5.0, None)
    unknown = chosen(trained_on(tmp_path / "a_real_robot", camera="table"), "yam")
    assert (unknown.task, unknown.image_size, unknown.cameras) == (TaskOptions(), 224, None)


@pytest.mark.parametrize(("first_seed", "episodes", "seen"), [(6, 9, 2), (0, 7, 0), (8, 2, 0), (1_000_000, 1, 1)])
@pytest.mark.parametrize("folder", [True, False])
def test_episodes_that_were_recorded_for_training_are_said(
    folder: bool, first_seed: int, episodes: int, seen: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = {"name": "pick"}
    write_recording(tmp_path, "pick_0000007", "pick_0000010", "pick_1000000", task=task, image_size=96, hz=5.0)
    data = trained_on(tmp_path)
    if not folder:
        kind = {"_target_": "keygrip.envs.yam.tasks.TaskOptions"}
        record = {"task": kind | task, "image_size": 96, "hz": 5.0}
        data = trained_on(None, record=record | {"seed": 1_000_000 if seen == 1 else 10, "demos": 2})
    make = partial(ClosedLoop, conditions={"all": [{}]}, first_seed=first_seed, episodes=episodes)
    for name in ("recorded", "yam"):
        caplog.clear()
        chosen(data, name).closed_loop(make)
        said = f"{seen} of the episodes {first_seed} to {first_seed + episodes - 1} were recorded for training"
        assert (said in caplog.text) == bool(seen)
        assert ("recorded for training" in caplog.text) == bool(seen)


@pytest.mark.parametrize(
    ("first", "demos", "seen"), [(0, 10**12, 10), (5, 2, 2), (0, "x", 0), (None, 9, 0), (0, 1.5, 0)]
)
def test_what_a_checkpoint_says_of_its_demonstrations_is_counted_whatever_it_is(
    first: Any, demos: Any, seen: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = {"_target_": "keygrip.envs.yam.tasks.TaskOptions", "name": "pick"}
    data = trained_on(None, record={"task": task, "image_size": 96, "hz": 5.0, "seed": first, "demos": demos})
    make = partial(ClosedLoop, conditions={"all": [{}]}, first_seed=0, episodes=10)
    chosen(data, "recorded").closed_loop(make)
    assert ("recorded for training" in caplog.text) == bool(seen)
    assert (f"{seen} of the episodes 0 to 9" in caplog.text) == bool(seen)


def test_episodes_of_another_task_were_not_recorded_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same seed is a different layout in another task."""
    kind = {"_target_": "keygrip.envs.yam.tasks.TaskOptions"}
    write_recording(tmp_path / "cell", "pick_0000000", task={"name": "pick"}, image_size=96, hz=5.0)
    metaworld = {"environment": "metaworld", "every": 4, "image_size": 96, "cameras": ["corner2"]}
    write_recording(tmp_path / "metaworld", "push-v3_0000000", **metaworld)
    make = partial(ClosedLoop, first_seed=0, episodes=4)
    cell, other = trained_on(tmp_path / "cell"), trained_on(tmp_path / "metaworld", camera="corner2")

    def warned(settings: EnvironmentSettings, conditions: Any = None, **changes: Any) -> bool:
        caplog.clear()
        settings.closed_loop(partial(make, conditions=conditions or {}), changes)
        return "recorded for training" in caplog.text

    yam = {"all": [{}]}
    assert warned(chosen(cell, "yam"), yam)
    assert not warned(chosen(cell, "yam", task=kind | {"name": "stack"}), yam)
    assert not warned(chosen(cell, "recorded"), yam, region="left")
    assert not warned(chosen(cell, "yam"), {"left": [{"region": "left"}]})
    assert warned(chosen(cell, "yam"), {"left": [{"region": "left"}], "all": [{}]})
    assert warned(chosen(other, "recorded"))
    assert warned(chosen(other, "metaworld", tasks=["reach", "push"]))
    assert not warned(chosen(other, "metaworld", tasks=["reach"]))


def test_a_policy_that_knows_images_upside_down_is_not_judged_on_upright_ones(tmp_path: Path) -> None:
    recording = {"environment": "metaworld", "every": 4, "image_size": 96, "cameras": ["corner3", "corner2"]}
    write_recording(tmp_path, "push-v3_0000000", **recording)
    for name in ("recorded", "metaworld"):
        with pytest.raises(ValueError, match=r"images of corner3 that were recorded upside down.*record into a new"):
            chosen(trained_on(tmp_path, camera="corner3"), name)
    assert chosen(trained_on(tmp_path, camera="corner2"), "metaworld").cameras == ["corner2"]


def test_a_recording_of_meta_world_says_tasks_size_and_cameras(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demos = ("push-v3_0000000", "push-v3_0000004", "assembly-v3_0000001", ".reach-v3_0000000.12-ab.partial")
    recording = {"environment": "metaworld", "every": 4, "image_size": 448, "cameras": ["corner3", "topview"]}
    write_recording(tmp_path, *demos, **recording, shadows=True, turned_upright=["corner3"])
    data = trained_on(tmp_path, camera="corner3", cameras=["corner3", "topview"])
    for name in ("recorded", "metaworld"):
        found = chosen(data, name)
        assert found.task == MetaWorldTask(camera="corner3", shadows=True)
        assert found.tasks == ("push-v3", "assembly-v3")
        assert (found.image_size, found.hz, found.cameras) == (448, 80.0, ["corner3", "topview"])
        assert found.python == ".venv-metaworld/bin/python"
        assert found.control == {"execute_seconds": 0.6}
    assert chosen(trained_on(tmp_path, camera="topview"), "metaworld").cameras == ["topview"]
    assert not caplog.records
    given = chosen(data, "metaworld", tasks=["reach", "push"], image_size=224)
    assert (given.tasks, given.image_size) == (("reach-v3", "push-v3"), 224)
    assert "recorded with 448" in caplog.text
    assert "env.tasks names reach-v3, of which there are no demonstrations" in caplog.text
    anywhere = chosen(trained_on(tmp_path / "elsewhere"), "metaworld")
    assert (anywhere.tasks, anywhere.image_size) == (MT10, 224)
    write_recording(tmp_path / "empty", "other_0000000", **recording)
    with pytest.raises(ValueError, match="holds no demonstrations"):
        chosen(trained_on(tmp_path / "empty"), "recorded")


def test_settings_of_an_environment_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    for name in ("control", "task"):
        with pytest.raises(ValueError, match=rf"env\.{name} has no effect with env=recorded: give {name}\.OPTION"):
            environment_settings(trained_on(tmp_path), RECORDED | {name: {"execute_seconds": 0.6}})
    with pytest.raises(ValueError, match=r"env\.image_size is as recorded: give env=yam, yam_handover, metaworld or"):
        environment_settings(trained_on(tmp_path), RECORDED | {"image_size": 96})
    several = chosen(trained_on(tmp_path), "metaworld", tasks=["reach"])
    with pytest.raises(ValueError, match="conditions are for one task"):
        several.closed_loop(partial(ClosedLoop, conditions={"as_recorded": [{}]}))


def test_a_checkpoint_names_no_module_through_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary_was_here"
    (tmp_path / "stored_canary.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = {"_target_": "keygrip.envs.gymnasium_environment.GymnasiumTask", "id": "stored_canary:Lift-v0"}
    data = {"root": None, "record": {"task": task, "image_size": 32, "hz": 10.0}}
    with pytest.raises(UntrustedPartError, match="say where to judge it: env=yam, yam_handover, metaworld or gym"):
        environment_settings(data, RECORDED)
    assert chosen(data, "yam").task == TaskOptions()
    assert not canary.exists()


def test_a_policy_is_evaluated_with_the_camera_that_it_was_trained_on(tmp_path: Path) -> None:
    write_recording(tmp_path, task={"name": "pick"}, image_size=96, hz=5.0)
    for camera, expected in (("over", None), ("front", ["front"]), ("somewhere", None)):
        assert environment_settings(trained_on(tmp_path, camera=camera), RECORDED).cameras == expected
    both = trained_on(tmp_path, camera="front", cameras=["front", "over"])
    assert environment_settings(both, RECORDED).cameras == ["front", "over"]
    task = {"_target_": "keygrip.envs.gymnasium_environment.GymnasiumTask", "id": "Lift-v0"}
    write_recording(tmp_path, environment="gymnasium", task={"id": "Lift-v0"}, image_size=32, hz=20.0)
    side = chosen(trained_on(tmp_path, camera="side"), "gymnasium", task=task)
    assert (side.cameras, side.image_size, side.hz) == (["side"], 32, 20.0)
    assert chosen(trained_on(tmp_path, camera="side"), "gymnasium", task=task, cameras=["over"]).cameras == ["over"]


@pytest.mark.parametrize(
    ("camera", "moves"),
    [
        ("wrist", {"camera_jitter_deg": 5.0}),  # the wrist camera cannot be moved
        ("front", {"camera_elevation_deg": -30.0}),  # possible for over, and too low for front
    ],
)
def test_moves_of_the_recorded_camera_do_not_exchange_the_camera_of_the_policy(
    camera: str, moves: dict[str, float], tmp_path: Path
) -> None:
    write_recording(tmp_path, task={"name": "pick", **moves}, image_size=96, hz=5.0)
    for name in ("recorded", "yam"):
        settings = chosen(trained_on(tmp_path, camera=camera), name)
        assert (settings.cameras, settings.task) == ([camera], TaskOptions(name="pick", **moves))
    make = partial(ClosedLoop, conditions={"views": [{"camera_azimuth_deg": 25.0}]})
    with pytest.raises(ValueError, match=f"condition views: camera_azimuth_deg: .* only {camera} is used"):
        settings.closed_loop(make)
    assert chosen(trained_on(tmp_path, camera="somewhere"), "yam").cameras is None


def test_conditions_after_training_move_a_camera_that_the_policy_sees(tmp_path: Path) -> None:
    write_recording(tmp_path, task={"name": "pick"}, image_size=96, hz=5.0)
    make = partial(ClosedLoop, conditions={"views": [{"camera_jitter_deg": 25.0}]})
    for camera in ("front", "wrist"):
        settings = environment_settings(trained_on(tmp_path, camera=camera), RECORDED)
        with pytest.raises(ValueError, match=f"condition views: camera_jitter_deg: .* only {camera} is used"):
            settings.closed_loop(make)
    both = trained_on(tmp_path, camera="front", cameras=["front", "over"])
    assert environment_settings(both, RECORDED).closed_loop(make).cameras == ["front", "over"]


def test_figures_over_tasks_are_means_of_tasks_with_pooled_intervals() -> None:
    def result(name: str, wins: int, of: int) -> ConditionResult:
        return ConditionResult(
            name, {}, [EpisodeResult(seed, seed < wins, None, 1.0, 1, 1.0, None, None) for seed in range(of)]
        )

    conditions = task_conditions(["reach-v3", "push-v3", "door-open"])
    assert list(conditions) == ["reach-v3", "push-v3", "door-open-v3"]
    figures = over_tasks([result("reach-v3", 4, 4), result("door-open-v3", 0, 2), result("push-v3", 1, 4)])
    assert figures["success_rate"] == pytest.approx((1 + 0 + 0.25) / 3)
    assert (figures["successes"], figures["episodes"]) == (5, 10)
    assert figures["success_low"] < 0.5 < figures["success_high"]
    assert figures["by_difficulty"]["easy"]["success_rate"] == 0.5
    assert figures["by_difficulty"]["hard"]["tasks"] == 1
