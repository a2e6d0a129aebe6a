"""What `keygrip evaluate` evaluates of a policy: suites that fit its task, and demonstrations that are held out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import OmegaConf

from keygrip.config import compose
from keygrip.evaluate import run as evaluate
from keygrip.evaluation.closed_loop import ClosedLoop
from keygrip.evaluation.policy import closed_loop_settings, evaluate_policy, open_loop
from keygrip.evaluation.rollout_report import remove_report


class Model(LightningModule):
    def policy(self) -> Any:
        return SimpleNamespace()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("no demonstration is held out")


class NothingHeldOut(LightningDataModule):
    def val_dataloader(self) -> list[Any]:
        return []


def evaluated(kind: str, cameras: Sequence[str] | None = None, **task: Any) -> Any:
    stored = {"_target_": f"keygrip.envs.yam.{kind}", **task}
    data = {"root": None, "cameras": cameras, "record": {"task": stored, "image_size": 32, "hz": 10.0}}
    return SimpleNamespace(
        module=Model(),
        checkpoint=Path("run"),
        output=Path("run"),
        config=OmegaConf.create({"data": data}),
        trust=(),
        external={},
        stored_data=lambda changes: NothingHeldOut(),
    )


def settings(run: Any, overrides: Sequence[str] = ()) -> tuple[ClosedLoop, dict[str, str]]:
    return closed_loop_settings(run, compose("evaluate", ["checkpoint=run", "evaluate=policy", *overrides]))


POSITION = ["left", "right", "near", "far"]
VIEWPOINT = ["azimuth_10", "azimuth_20", "elevation_10"]


@pytest.mark.parametrize(
    ("run", "missing"),
    [
        (evaluated("tasks.TaskOptions", name="pick"), {}),
        (
            evaluated("tasks.TaskOptions", name="pick", camera_elevation_deg=30.0),
            {"viewpoint.elevation_10": "camera_elevation_deg=40.0 is outside [-35, 35]"},
        ),
        (
            evaluated("tasks.TaskOptions", name="reach", camera="wrist"),
            {f"viewpoint.{name}": "cannot move the wrist camera" for name in VIEWPOINT},
        ),
        (
            evaluated("tasks.TaskOptions", ["front"], name="pick"),
            {f"viewpoint.{name}": "moves camera 'over', and only front is used" for name in VIEWPOINT},
        ),
        (evaluated("tasks.TaskOptions", ["front", "over"], name="pick"), {}),
        (
            evaluated("handover.HandoverTask"),
            {f"position.{name}": "HandoverTask has no setting 'region'" for name in POSITION}
            | {f"viewpoint.{name}": "HandoverTask has no setting 'camera_" for name in VIEWPOINT},
        ),
    ],
    ids=["pick", "steep", "wrist", "other_camera", "two_cameras", "handover"],
)
def test_default_conditions_that_a_task_cannot_do_are_left_out_and_said(
    run: Any, missing: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    found, left_out = settings(run)
    assert [*left_out] == [place.partition(".")[2] for place in missing]
    assert [*found.grids] == [name for name in ["in_distribution", *POSITION, *VIEWPOINT] if name not in left_out]
    for place, reason in missing.items():
        suite, _, name = place.partition(".")
        assert reason in left_out[name]
        assert f"conditions.{place} is left out: {left_out[name]}" in caplog.text
        others = [f"conditions.{other}=null" for other in missing if other != place and other.startswith(suite)]
        with pytest.raises(
            ValueError, match=rf"conditions\.{place}: .*{re.escape(reason)}.*\({'conditions.' + place}=null"
        ):
            settings(run, [f"suites=[in_distribution,{suite}]", *others])
        settings(run, [f"suites=[in_distribution,{suite}]", *others, f"conditions.{place}=null"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["episodes=0"], "episodes=0: it must be at least 1"),
        (["first_seed=-1"], "first_seed=-1: it must be at least 0"),
        (["processes=0"], "processes=0: it must be at least 1"),
        (["videos=-1"], "videos=-1: it must be at least 0"),
        (["suites=[]"], "suites=[]: name at least one of in_distribution, position, "),
        (["suites=views"], "suites=views is one text: give a list, suites=[views]"),
        (["suites='position,views'"], "suites=position,views is one text: give a list, suites=[position,views]"),
        (["suites=[nowhere]"], "there is no suite 'nowhere': suites are in_distribution, "),
        (["control.ensemble=no"], "RecedingHorizon.ensemble='no': must be true or false"),
        (["control.ensemble_decay=1"], "control.ensemble_decay has no effect without control.ensemble=true"),
        (["env=yam", "env.control.ensemble_decay=1"], "control.ensemble_decay has no effect without"),
        (["env=yam", "+env.control.ensemble=no"], "RecedingHorizon.ensemble='no': must be true or false"),
        (["env=yam", "+env.task.distractors=many"], "env.task.distractors='many': must be a whole number"),
        (["suites=[position]", "conditions.position=null"], "conditions is empty: name at least one"),
        (
            ["conditions.distractors.distractors=[{distractors: 4}]"],
            "nothing reads conditions.distractors, since suites=[in_distribution,position,viewpoint]: add the suite "
            "with suites=[in_distribution,position,viewpoint,distractors], or leave it out",
        ),
        (["suites=[views]", "conditions.position=null"], "nothing reads conditions.position, since suites=[views]"),
        (["+conditions.own={here: [{}]}"], "nothing reads conditions.own, since suites="),
        (["conditions=null"], "conditions=None: the conditions of a suite are left out with suites=[...]"),
        (["open_loop=false", "simulate=false"], "open_loop=false and simulate=false: there is nothing to evaluate"),
    ],
)
def test_settings_are_refused_by_the_names_that_the_command_has(overrides: list[str], said: str) -> None:
    cfg = compose("evaluate", ["checkpoint=run", "evaluate=policy", *overrides])
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate_policy(evaluated("tasks.TaskOptions", name="pick"), cfg)


def test_own_conditions_are_used_in_the_suites_that_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = evaluated("tasks.TaskOptions", name="pick")
    given = ["conditions.distractors.distractors=[{distractors: 3}]", "+conditions.own={here: [{}]}"]
    grids = settings(run, [*given, "suites=[distractors,own]"])[0].grids
    assert grids == {"distractors": [{"distractors": 3}], "here": [{}]}
    assert caplog.text == ""
    monkeypatch.setattr("keygrip.evaluation.policy.in_sweep", lambda: True)  # its jobs share the overrides
    assert [*settings(run, [*given, "suites=[own]"])[0].grids] == ["here"]
    assert "nothing in this job reads conditions.distractors: its suites are own" in caplog.text


def test_conditions_are_refused_where_the_tasks_are_the_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    several = SimpleNamespace(tasks=("reach-v3", "push-v3"), control={}, closed_loop=lambda make, changes: make)
    monkeypatch.setattr("keygrip.evaluation.policy.environment_settings", lambda *_: several)
    run = evaluated("tasks.TaskOptions", name="pick")
    assert settings(run, ["env=metaworld"])[0].keywords["conditions"] == {}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"nothing reads conditions\.position: .*tasks of env=metaworld"):
        settings(run, ["env=metaworld", "conditions.position.left=null"])


def test_a_suite_of_null_has_no_conditions() -> None:
    run = evaluated("tasks.TaskOptions", name="pick")
    assert [*settings(run, ["conditions.position=null"])[0].grids] == ["in_distribution", *VIEWPOINT]


def test_plans_are_averaged_with_the_decay_that_is_given() -> None:
    run = evaluated("tasks.TaskOptions", name="pick")
    found, _ = settings(run, ["env=yam", "+env.control.ensemble=true", "control.ensemble_decay=1"])
    controller = found.control(policy=None, control_hz=10.0)
    assert (controller.ensemble, controller.ensemble_decay) == (True, 1)


def test_what_cannot_be_done_is_refused_before_the_demonstrations_are_gone_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("keygrip.evaluation.policy.open_loop", lambda *_: pytest.fail("it was not refused first"))
    cfg = compose("evaluate", ["checkpoint=run", "evaluate=policy", "suites=[viewpoint]"])
    with pytest.raises(ValueError, match=r"conditions\.viewpoint"):
        evaluate_policy(evaluated("handover.HandoverTask"), cfg)


def test_a_package_for_the_episodes_is_missed_before_the_demonstrations_are_gone_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = evaluated("tasks.TaskOptions", name="pick")
    run.output = tmp_path
    monkeypatch.delitem(sys.modules, "keygrip.runtime.server", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setattr("keygrip.evaluation.closed_loop.refuse_missing_device", lambda device: None)
    monkeypatch.setattr("keygrip.evaluation.policy.closed_loop", lambda *_: {})
    given = ["checkpoint=run", "evaluate=policy", "device=cuda"]
    with monkeypatch.context() as context:
        context.setattr("keygrip.evaluation.policy.open_loop", lambda *_: pytest.fail("it was not refused first"))
        with pytest.raises(ModuleNotFoundError, match=r"serving needs aiohttp: .*; or give processes=1"):
            evaluate_policy(run, compose("evaluate", [*given, "processes=2"]))
    monkeypatch.setattr("keygrip.evaluation.policy.open_loop", lambda *_: {"loss": 1.0})
    assert evaluate_policy(run, compose("evaluate", [*given, "processes=1"]))["open_loop"] == {"loss": 1.0}


def test_viewpoints_are_moved_from_the_view_of_the_recordings() -> None:
    run = evaluated("tasks.TaskOptions", name="pick", camera_azimuth_deg=20.0, camera_elevation_deg=5.0)
    grids = settings(run, ["suites=[viewpoint]"])[0].grids
    assert grids["azimuth_20"] == [{"camera_azimuth_deg": 0.0}, {"camera_azimuth_deg": 40.0}]
    assert grids["elevation_10"] == [{"camera_elevation_deg": -5.0}, {"camera_elevation_deg": 15.0}]
    here = settings(run, ["suites=[viewpoint]", "task.camera_azimuth_deg=-30"])[0].grids
    assert here["azimuth_10"] == [{"camera_azimuth_deg": -40}, {"camera_azimuth_deg": -20}]
    behind = settings(run, ["suites=[viewpoint]", "task.camera_azimuth_deg=170"])[0].grids  # the angle wraps
    assert behind["azimuth_10"] == [{"camera_azimuth_deg": 160}, {"camera_azimuth_deg": 180}]
    assert behind["azimuth_20"] == [{"camera_azimuth_deg": 150}, {"camera_azimuth_deg": -170}]
    wrong = ["suites=[viewpoint]", "conditions.viewpoint.azimuth_10=[{camera_azimuth_deg: far}]"]
    with pytest.raises(
        ValueError, match=r"conditions\.viewpoint\.azimuth_10: TaskOptions.camera_azimuth_deg='far': must be"
    ):
        settings(run, wrong)


@pytest.mark.filterwarnings("error:Total length")
def test_a_camera_that_the_policy_does_not_see_is_not_moved() -> None:
    """The conditions had the episodes of in_distribution, and were reported as success from other viewpoints."""
    front = evaluated("tasks.TaskOptions", ["front"], name="pick")
    with pytest.raises(ValueError, match=r"conditions\.views\.views: camera_jitter_deg, camera_views: this moves"):
        settings(front, ["suites=[views]"])
    with pytest.raises(ValueError, match=r"camera_azimuth_deg: this moves camera 'over'.*option camera=front moves"):
        settings(front, ["suites=[in_distribution]", "task.camera_azimuth_deg=10"])
    with pytest.raises(ValueError, match="camera_azimuth_deg: this moves camera 'over'"):
        settings(front, ["suites=[in_distribution]", "env=yam", "env.task.camera_azimuth_deg=10"])
    turned, left_out = settings(front, ["task.camera=front"])
    assert not left_out
    assert turned.grids["azimuth_10"] == [{"camera_azimuth_deg": -10.0}, {"camera_azimuth_deg": 10.0}]
    # moves that were recorded, of a camera that the policy does not see, are no condition
    recorded = evaluated("tasks.TaskOptions", ["front"], name="pick", camera_jitter_deg=5.0)
    assert settings(recorded)[0].task.camera_jitter_deg == 5.0
    every = evaluated("tasks.TaskOptions", ["front"], name="pick", camera_jitter_deg=5.0, jitter_every_camera=True)
    assert "views" in settings(every, ["suites=[views]"])[0].grids
    still = ["suites=[in_distribution]", "task.camera_jitter_deg=0", "task.jitter_every_camera=false"]
    assert settings(every, still)[0].task.camera_jitter_deg == 0  # the front camera no longer moves


def test_a_run_that_holds_nothing_out_has_no_open_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = evaluated("tasks.TaskOptions", name="pick")
    monkeypatch.setattr("keygrip.evaluation.policy.closed_loop", lambda run, settings: {"in_distribution": {}})
    found = evaluate_policy(run, compose("evaluate", ["checkpoint=run", "evaluate=policy"]))
    assert found == {"closed_loop": {"in_distribution": {}}}
    assert "open_loop is left out: the run holds out no demonstrations" in caplog.text
    with pytest.raises(ValueError, match=r"one demonstration\): nothing is left to evaluate; .*val_fraction=0\.99"):
        evaluate_policy(run, compose("evaluate", ["checkpoint=run", "evaluate=policy", "simulate=false"]))


@pytest.mark.parametrize("simulate", [True, False])
def test_an_evaluation_leaves_no_results_of_an_earlier_one(
    simulate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused evaluation removes nothing, and no evaluation removes a file that is not one of its own."""
    videos = tmp_path / "videos"
    videos.mkdir()
    lines = [{"video": None}, {"video": "left-1.mp4"}, {"video": "../mine.mp4"}, {"video": "notes.txt"}, 3]
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"video": "cut-')
    stale = {"episodes.jsonl", "closed_loop.json", "result.json", "rollouts.mp4", "videos/left-1.mp4"}
    own = {"last.ckpt", "mine.mp4", "videos/mine.mp4", "videos/notes.txt"}
    for name in (stale | own) - {"episodes.jsonl"}:
        (tmp_path / name).write_text("")

    def present() -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}

    run = evaluated("tasks.TaskOptions", name="pick")
    run.output = tmp_path
    seen: list[set[str]] = []
    monkeypatch.setattr("keygrip.evaluation.policy.closed_loop", lambda *_: seen.append(present()))
    overrides = ["checkpoint=run", "evaluate=policy", f"simulate={simulate}"]
    with pytest.raises(ValueError, match="episodes=0: it must" if simulate else "nothing is left to evaluate"):
        evaluate_policy(run, compose("evaluate", [*overrides, "episodes=0"] if simulate else overrides))
    assert present() == stale | own
    monkeypatch.setattr("keygrip.evaluation.policy.open_loop", lambda *_: {"loss": 1.0})
    if simulate:
        missing = [*overrides, "env=yam", "env.python=/no/python"]
        with pytest.raises((OSError, ValueError), match="/no/python"):
            evaluate_policy(run, compose("evaluate", missing))
        assert present() == stale | own
    monkeypatch.setattr(ClosedLoop, "check", lambda *_: None)
    evaluate_policy(run, compose("evaluate", overrides))
    assert present() == own
    assert seen == [own] * simulate


def test_a_folder_without_episodes_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("closed_loop.json", "rollouts.mp4"):
        (tmp_path / name).write_text("mine")
    remove_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed_loop.json", "rollouts.mp4"]


def test_the_open_loop_of_a_mac_computes_where_training_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the CPU: MPS, which Lightning's "auto" uses where it is available, has no float64."""
    chosen = {}

    class Recorder:
        def __init__(self, **settings: Any) -> None:
            chosen.update(settings)

        def validate(self, *_: Any, **__: Any) -> list[Any]:
            return []

    data = SimpleNamespace(prepare_data=lambda: None, setup=lambda stage: None)
    monkeypatch.setattr("keygrip.evaluation.policy.Trainer", Recorder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    open_loop(SimpleNamespace(stored_data=lambda changes: data, module=None))  # type: ignore[arg-type]
    assert chosen["accelerator"] == "cpu"


@pytest.mark.parametrize(
    ("given", "available", "device", "accelerator"),
    [
        ([], False, "cpu", ("cpu", 1)),
        ([], True, "cuda", ("cuda", 1)),
        (["device=cpu"], True, "cpu", ("cpu", 1)),
        (["device=cuda:1"], True, "cuda:1", ("cuda", [1])),
    ],
)
def test_a_policy_is_evaluated_on_the_gpu_if_there_is_one(
    given: list[str], available: bool, device: str, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {}

    class Recorder:
        def __init__(self, **settings: Any) -> None:
            chosen.update(settings)

        def validate(self, *_: Any, **__: Any) -> list[Any]:
            return []

    monkeypatch.setattr("keygrip.evaluation.policy.Trainer", Recorder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    for module in ("closed_loop", "policy"):
        monkeypatch.setattr(f"keygrip.evaluation.{module}.refuse_missing_device", lambda device: None)
    run = evaluated("tasks.TaskOptions", name="pick")
    assert settings(run, given)[0].device == device
    with pytest.raises(ValueError, match="nothing is left to evaluate"):
        evaluate_policy(run, compose("evaluate", ["checkpoint=run", "evaluate=policy", "simulate=false", *given]))
    assert (chosen["accelerator"], chosen["devices"]) == accelerator


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = evaluated("tasks.TaskOptions", name="pick"), ["checkpoint=run", "evaluate=policy", "device=cuda:99"]
    for overrides in ([], ["simulate=false"]):
        with pytest.raises(ValueError, match="device=cuda:99: this machine has"):
            evaluate_policy(run, compose("evaluate", [*given, *overrides]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="tf32=true is for GPUs, and this process computes on the CPU"):
        evaluate(compose("evaluate", ["checkpoint=run", "evaluate=policy", "tf32=true", "device=cpu"]))


@pytest.mark.parametrize("env", [[], ["env=yam"]])
def test_the_folder_to_which_demonstrations_have_moved_says_how_they_were_recorded(
    env: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "new").mkdir()
    recorded = {"task": {"name": "pick"}, "image_size": 96, "hz": 5.0}
    (tmp_path / "new" / "recording.json").write_text(json.dumps({"settings": recorded}))
    run = evaluated("tasks.TaskOptions")
    run.config.data.root = str(tmp_path / "old")
    found, _ = settings(run, [f"data.root={tmp_path / 'new'}", "open_loop=false", *env])
    assert (found.task.name, found.image_size, found.hz) == ("pick", 96, 5.0)
    assert caplog.text == ""
    if env:
        settings(run, env)
        assert f"the demonstrations are not in {tmp_path / 'old'}" in caplog.text
        assert caplog.records[0].levelname == "WARNING"
    else:
        with pytest.raises(ValueError, match=r"/old, which would say .* is not there: data\.root=FOLDER names"):
            settings(run)
    run.config.data.root = None  # recorded for the run, whose config holds the settings
    assert settings(run, [f"data.root={tmp_path / 'new'}", *env])[0].image_size == 32
    with pytest.raises(ValueError, match=r"data\.root has no effect with open_loop=false"):
        settings(run, [f"data.root={tmp_path / 'new'}", "open_loop=false", *env])


def test_the_open_loop_compares_its_demonstrations_with_those_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    class Demos(NothingHeldOut):
        def setup(self, stage: str) -> None:
            compared.append(stage)

        def refuse_trained(self, state: Any, settings: Any) -> None:
            compared.append((state, settings["record"]["hz"]))
            raise ValueError("trained on")

    content: dict[str, Any] = {Demos.__qualname__: {"demonstrations": {"a": "hash"}}}
    monkeypatch.setattr("keygrip.evaluation.policy.read_checkpoint", lambda path, mapped: content)
    run = evaluated("tasks.TaskOptions")
    run.stored_data = lambda changes: Demos()
    for state in ({"demonstrations": {"a": "hash"}}, {}):
        with pytest.raises(ValueError, match="trained on"):
            open_loop(run)
        assert compared == ["validate", (state, 10.0)]
        content.clear()  # an export holds no state of the data
        compared.clear()


@pytest.mark.parametrize(
    ("rates", "root_of", "strides", "said"),
    [
        ([10.0], [0, 0], [3], None),
        ([10.3], [0, 0], [3], None),  # recorders keep their rate to a few percent
        ([30.0], [0, 0], [3], "=3 frames lasts 0.1 s .* plans steps of 0.3 s, .*: set data.frame_stride=9$"),
        ([20.0, 10.0], [0, 0, 1], [6, 3], None),
        ([20.0, 10.0], [0, 0, 1], [2, 1], r"=\[2,1\] frames lasts 0.1 s .*: set data.frame_stride=\[6,3\]$"),
        ([20.0, 10.0], [0, 0], [2, 1], r": set data.frame_stride=\[6,1\]$"),  # nothing could be read of the second
        ([5.0], [0], [1], "no data.frame_stride gives such steps at 5 frames/s"),
        ([2.0], [0], [1], "no data.frame_stride gives such steps at 2 frames/s"),
    ],
)
def test_the_open_loop_refuses_steps_of_another_duration(
    rates: list[float],
    root_of: list[int],
    strides: list[int],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: planned poses were compared with recorded ones of other times."""

    class Demos(NothingHeldOut):
        def setup(self, stage: str) -> None:
            self.demos = [SimpleNamespace(fps=rates[root]) for root in root_of]
            self.root_of, self.roots = root_of, [SimpleNamespace(stride=stride) for stride in strides]

    run = evaluated("tasks.TaskOptions")
    run.stored_data = lambda changes: Demos()
    run.module.statistics = SimpleNamespace(step_seconds=0.3)
    if said is None:
        assert open_loop(run) == {}
    else:
        with pytest.raises(ValueError, match=said):
            open_loop(run)
