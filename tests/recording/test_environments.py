"""`prepare step=record`: settings of evaluations, and environments without an expert, are refused by name; the expert
of any gymnasium environment is recorded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate

from keygrip.config import compose
from keygrip.data.robot.discovery import find_demos
from keygrip.data.video import read_video
from keygrip.envs.environment import open_environment
from keygrip.envs.gymnasium_environment import GymnasiumEnvironment, GymnasiumTask
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import TaskOptions
from keygrip.evaluation import rollouts
from keygrip.evaluation.rollouts import check_environment, run_episode
from keygrip.models.policy import Needs, Plan
from keygrip.prepare import run
from keygrip.recording import demonstrations, gymnasium_worker, metaworld
from keygrip.runtime.chunk_execution import RecedingHorizon

ROOT = Path(__file__).parents[2]
HANDOVER = "keygrip.envs.yam.handover.HandoverTask"


@pytest.mark.parametrize("plus", ["", "+"])
def test_options_of_the_task_are_taken_by_name(plus: str) -> None:
    task = compose("prepare", ["step=record", "root=x", f"{plus}task.region=left", "task.name=pick"]).task
    assert instantiate(task) == TaskOptions(name="pick", region="left")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["env=metaworld", "env.cameras=[corner2,topview]"], "env.cameras is for evaluations"),
        (["env.hz=20"], "env.hz is for evaluations"),
        (["env=gymnasium"], r"env\.task\.id is missing"),
        (
            ["env=gymnasium", "env.task.id=A-v0", "task.name=pick"],
            "task is no setting of the recordings of env=gymnasium",
        ),
        (["env=gymnasium", "env.task.id=A-v0", "hz=0"], "hz=0.*: give a rate above 0"),
        (["env=yam", "first_seed=-1"], "first_seed=-1: it must be at least 0"),
        (["env=gymnasium", "env.task.id=A-v0", "first_seed=-2"], "first_seed=-2: it must be at least 0"),
        (["env=yam", "hz=0"], "hz=0.*: give a rate above 0"),
        (["env=metaworld", "hz=-10"], "hz=-10.*: give a rate above 0"),
        (["env=gymnasium", "env.task.id=A-v0", "processes=-1"], "processes=-1: give at least 1"),
        (["env=metaworld", "processes=0"], "processes=0: give at least 1"),
        (["env=gymnasium", "env.task.id=A-v0", "recoveries=0.1"], "recoveries is no setting"),
        (["env=yam", "env.task.name=pick"], r"env\.task is for evaluations: for a recording set task"),
        (["env=metaworld", "+env.task.shadows=true"], r"for a recording set tasks, cameras and shadows"),
        (
            ["env=yam_handover", "task.random_start=false"],
            r"task is no setting of .* env=yam_handover: give env\.task, e\.g\. env\.task\.random_start=false",
        ),
        (
            ["env=yam_handover", f"task._target_={HANDOVER}", "task.name=handover", "env.task.camera=front"],
            r"task and env\.task hold different tasks of env=yam_handover: give env\.task alone",
        ),
        (["env=yam", "shadows=true"], "shadows is no setting of the recordings of env=yam"),
        (["env=recorded"], "env=recorded has no scripted expert"),
        (["env=yam", "cameras=[]"], r"cameras=\[\]: name at least one camera"),
        (["env=metaworld", "cameras=[]"], r"cameras=\[\]: name at least one camera"),
        (["env=gymnasium", "env.task.id=A-v0", "cameras=[]"], r"cameras=\[\]: name at least one camera"),
        (["env=metaworld", "depth=true"], "depth is no setting of the recordings of env=metaworld"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: object, overrides: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        run(compose("prepare", ["step=record", f"root={tmp_path}/new", "demos=1", *overrides]))
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [["record", "demos=1"], ["import", "source=x"], ["export_lerobot"], ["images"]])
def test_a_file_where_a_step_writes_a_folder_is_named_with_its_setting(tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("")
    setting = "to" if options == ["export_lerobot"] else "root"
    needed = {"export_lerobot": [f"root={tmp_path}"], "images": ["source=x"]}.get(options[0], [])
    for place, said in ((f"{file}", ""), (f"{file}/below", f": {file}")):
        settings = [f"step={options[0]}", *options[1:], *needed, f"{setting}={place}"]
        with pytest.raises(ValueError, match=rf"^{setting}={re.escape(place + said)} is a file: give a folder$"):
            run(compose("prepare", settings))
    assert file.read_text() == ""


@dataclass(frozen=True)
class Lift:
    """A task of somebody's own, for evaluations."""

    height_m: float


@pytest.mark.parametrize(
    ("environment", "task", "options", "recorded"),
    [
        ("yam", f"{__name__}.Lift", ["+env.task.height_m=0.1"], "TaskOptions"),
        ("yam_handover", f"{__name__}.Lift", ["+env.task.height_m=0.1"], "HandoverTask"),
        ("yam", HANDOVER, [], "TaskOptions"),
    ],
)
def test_a_task_that_no_recorder_records_is_refused(
    tmp_path: Path, environment: str, task: str, options: list[str], recorded: str
) -> None:
    settings = [f"env={environment}", f"env.task._target_={task}", *options]
    said = rf"env\.task\._target_ is for evaluations: env={environment} records a {recorded}, not a {task}\."
    with pytest.raises(Exception, match=said):
        run(compose("prepare", ["step=record", f"root={tmp_path}/new", "demos=1", *settings]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ([], HandoverTask()),
        (["env.task.random_start=false", "env.task.camera=front"], HandoverTask(camera="front", random_start=False)),
        ([f"task._target_={HANDOVER}", "task.name=handover", "task.shadows=true"], HandoverTask(shadows=True)),
    ],
)
def test_the_handover_is_recorded_with_its_options(
    settings: list[str], recorded: HandoverTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Any] = []
    monkeypatch.setattr(demonstrations, "record_step", lambda task, *given, **more: tasks.append(task) or {})
    run(compose("prepare", ["step=record", "env=yam_handover", f"root={tmp_path}/new", *settings]))
    assert tasks == [recorded]


def record(root: Path, *overrides: str) -> dict[str, Any]:
    settings = ["step=record", "env=gymnasium", f"root={root}", "image_size=32", "processes=1", *overrides]
    return run(compose("prepare", settings))


def test_the_expert_of_a_gymnasium_environment_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests/support'}")
    there, name = tmp_path / "new", "env.task.id=gym_lab:TwoCameraPointMass-v0"
    assert record(there, name, "demos=1")["recorded"] == 1
    report = record(there, name, "demos=2", "processes=2")
    assert (report["demos"], report["recorded"], report["failed_episodes"]) == (2, 1, 0)  # the first is kept
    demos = {reference.name: reference.read() for reference in find_demos(there, format="native")}
    assert list(demos) == ["task_0000000", "task_0000001"]
    demo = demos["task_0000001"]
    arm = demo.arms["right"]
    assert arm.commanded is not None
    assert (demo.instruction, demo.fps, list(demo.cameras)) == ("go to the goal", 10.0, ["over", "side"])
    np.testing.assert_allclose(
        arm.position[1:], arm.commanded.position[:-1], atol=1e-12
    )  # the tool is at the commanded pose
    side = demo.cameras["side"]
    assert abs(int(side.frames.read(0).mean()) - 45) <= 1
    assert side.world_to_camera[0, 0, 3] == pytest.approx(0.1)

    cell = open_environment(GymnasiumTask("gym_lab:TwoCameraPointMass-v0"), 32, 10.0)
    cell.reset(seed=1)
    for position, opening in zip(arm.commanded.position, arm.commanded.gripper, strict=True):
        assert not cell.outcome()[0]
        cell.advance(np.concatenate([position, [1.0, 0, 0, 0], [opening]]))
    assert cell.outcome()[0]  # the commands replay the episode

    with pytest.raises(Exception, match=r"other settings \(cameras: None there, \['side'\] now\)"):
        record(there, name, "demos=2", "cameras=[side]")
    with pytest.raises(Exception, match="has no method expert_action"):
        record(tmp_path / "none", "env.task.id=gym_lab:Inexpert-v0", "demos=1")
    assert [path.name for path in (tmp_path / "none").iterdir() if path.is_dir()] == []
    assert record(tmp_path / "none", name, "demos=1")["recorded"] == 1  # the failed attempt leaves no settings


def test_the_expert_of_two_arms_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests/support'}")
    assert record(tmp_path, "env.task.id=gym_lab:TwoArmPointMass-v0", "demos=1")["recorded"] == 1
    (reference,) = find_demos(tmp_path, format="native")
    left, right = (reference.read().arms[name] for name in ("left", "right"))
    np.testing.assert_allclose(right.position, left.position * [1, -1, 1], atol=1e-12)
    np.testing.assert_allclose(left.position[1:], left.commanded.position[:-1], atol=1e-12)
    np.testing.assert_allclose(right.commanded.position, left.commanded.position * [1, -1, 1], atol=1e-12)
    assert (left.commanded.gripper.min(), right.commanded.gripper.max()) == (1.0, 0.0)
    task = GymnasiumTask("gym_lab:TwoArmPointMass-v0")
    for arms in (("left", "right"), ("one", "other")):
        check_environment(task, 32, 10.0, None, 1, Needs(arms))
    with pytest.raises(ValueError, match=r"data\.arms=\[left,right\]"):
        check_environment(task, 32, 10.0, None, 1, Needs(("right", "left")))


def test_cameras_of_different_sizes_are_recorded(tmp_path: Path) -> None:
    cell = GymnasiumEnvironment(GymnasiumTask("gym_lab:SmallSidePointMass-v0"), 32, 10.0)
    assert gymnasium_worker.record_episode(cell, tmp_path / "task_0000000", 0, video=False)
    (reference,) = find_demos(tmp_path, format="native")
    over, side = (reference.read().cameras[name] for name in ("over", "side"))
    assert (over.frames.read(0).shape, side.frames.read(0).shape) == ((32, 32, 3), (16, 16, 3))
    assert side.intrinsics[0].tolist() == [[20, 0, 8], [0, 20, 8], [0, 0, 1]]


@pytest.mark.parametrize("arms", [2, None, ("left", "right"), (object(), object())])
@pytest.mark.parametrize("count", [1, 2])
def test_arms_of_another_kind_are_an_environments_own_matter(
    monkeypatch: pytest.MonkeyPatch, arms: Any, count: int
) -> None:
    class Own:
        hz = 10.0

        def reset(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
            return {"position": np.zeros((count, 3)), "instruction": "lift"}, {}

        def close(self) -> None: ...

    Own.arms = arms  # type: ignore[attr-defined]
    monkeypatch.setattr(rollouts, "open_environment", lambda *given: Own())
    check_environment(None, 32, 10.0, None, 1, Needs(("left", "right")[:count]))


def test_failures_of_earlier_calls_end_no_metaworld_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy fails in every fifth episode; the same 80 demonstrations are requested twice."""
    seeds, none_recorded = range(100), {"task": "reach-v3", "recorded": False}
    reports = [(0, {**none_recorded, "seed": seed, "success": seed % 5 != 4}) for seed in seeds]
    monkeypatch.setattr(metaworld, "run_jobs", lambda *given: iter(reports))
    first, again = (metaworld.record_step(["reach-v3"], tmp_path, 80) for _ in range(2))
    assert json.loads((tmp_path / "recording.json").read_text())["failed_seeds"] == {"reach-v3": [*seeds[4::5]]}
    for report in (first, again):
        assert (report["demos"], report["failed_episodes"]) == (80, {"reach-v3": 20})
    hopeless = [(0, {**none_recorded, "seed": seed, "success": False}) for seed in seeds]
    monkeypatch.setattr(metaworld, "run_jobs", lambda *given: iter(hopeless))
    with pytest.raises(ValueError, match="failed in 20 of 20 episodes of reach-v3"):
        metaworld.record_step(["reach-v3"], tmp_path, 80)


class Watching:
    """Plans the given commands; stores the shapes of the images that it receives."""

    needs = Needs(arms=("right",))

    def __init__(self, commands: np.ndarray) -> None:
        self.commands = commands
        self.seen: list[tuple[int, ...]] = []

    def plan(self, observation: Any) -> Plan:
        self.seen.append(observation["image"].shape)
        turn = np.tile([1.0, 0, 0, 0], (1, len(self.commands), 1))
        return Plan(self.commands[None], turn, np.ones((1, len(self.commands))), step_seconds=0.1)


def test_images_that_are_not_square_are_recorded_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests/support'}")
    assert record(tmp_path, "env.task.id=gym_lab:WidePointMass-v0", "demos=1", "video=true")["recorded"] == 1
    (reference,) = find_demos(tmp_path, format="native")
    demo = reference.read()
    track, commanded = demo.cameras["camera"], demo.arms["right"].commanded
    assert track.frames.read(0).shape == (32, 48, 3)
    assert (track.width, track.height) == (48, 32)
    cell = open_environment(GymnasiumTask("gym_lab:WidePointMass-v0"), 32, 10.0)
    policy = Watching(commanded.position)
    control = partial(RecedingHorizon, execute_seconds=9.0)
    result = run_episode(cell, policy, control, demo.source["seed"], tmp_path / "rollout.mp4")
    assert result.success
    assert set(policy.seen) == {(32, 48, 3)}
    assert read_video(tmp_path / "rollout.mp4").shape[1:] == (64, 96, 3)
    with pytest.raises(ValueError, match=r"are 32 x 48: give env\.image_size=32, their shorter edge"):
        open_environment(GymnasiumTask("gym_lab:WidePointMass-v0"), 48, 10.0).reset(seed=0)
