"""Each kind of task has its own settings; a setting of another kind is refused, and the nearest valid one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keygrip import evaluate
from keygrip.command import entry_point
from keygrip.config import SettingError, compose
from keygrip.evaluation.kinds import KIND, KINDS, choose_kind
from keygrip.training import (
    checkpoints,
    fit,  # noqa: F401  (what a command imports while `holding` is in force would keep its reader)
)
from keygrip.training.results import read_result
from keygrip.training.run_folder import lock_folder
from keygrip.training.saving import AtomicCheckpointIO

COMMON = {"checkpoint_step", "seed", "debug", "run_dir", "checkpoint", "trust", "external", "tf32"}


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every checkpoint one of a model of a given kind."""

    def set_kinds(kinds: dict[str, str | None]) -> None:
        def header(path: Any, mapped: bool) -> dict[str, Any]:
            config = {"model": {"_target_": f"somewhere.{Path(path).name.title()}"}}
            return {checkpoints.HEADER: {"config": config, KIND: kinds[Path(path).name]}}

        monkeypatch.setattr(checkpoints, "find_checkpoint", lambda path, step=None: Path(path))
        monkeypatch.setattr(checkpoints, "read_checkpoint", header)

    return set_kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_chooses_the_settings_of_its_kind(kind: str, holding: Any) -> None:
    holding({"run": kind, "1_0": kind})
    assert compose("evaluate", ["checkpoint=1_0", "run_dir=2025_01_02"]).run_dir == "2025_01_02"
    cfg = compose("evaluate", ["checkpoint=run"])
    assert set(cfg) - COMMON == set(KINDS[kind].settings())
    assert {"checkpoint", "run_dir"} <= set(cfg)


@pytest.mark.parametrize(
    "options", [["-m"], ["--cfg", "job"], ["--config-dir", "mine"]], ids=["multirun", "cfg", "config_dir"]
)
def test_options_of_hydra_go_with_the_kind_that_is_chosen(
    options: list[str], holding: Any, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    holding({"run": "policy"})
    ran: list[tuple[str, bool]] = []

    def evaluated(cfg: Any) -> dict[str, Any]:
        ran.append((cfg.checkpoint, cfg.simulate))
        return {"checkpoint": cfg.checkpoint}

    monkeypatch.setattr(evaluate, "run", evaluated)
    Path("mine").mkdir()
    several = "true,false" if options == ["-m"] else "false"
    outcome = cli(*options, "checkpoint=run", f"simulate={several}", of="evaluate")
    assert outcome.code == 0, outcome.err
    if options[0] == "--cfg":
        assert "\nsimulate: false\n" in outcome.out
    else:
        assert ran == [("run", value == "true") for value in several.split(",")]


def test_a_setting_of_another_kind_is_refused_with_the_nearest_of_this_one(holding: Any) -> None:
    holding({"run": "image_text", "other": "policy", "none": None})
    with pytest.raises(SettingError, match=r"'videos' is a setting of evaluate=policy; .* settings are cases, split"):
        compose("evaluate", ["checkpoint=run", "videos=2"])
    with pytest.raises(SettingError, match="'mode' is a setting of evaluate=video_text"):
        compose("evaluate", ["checkpoint=other", "mode=coarse_only"])
    with pytest.raises(SettingError, match="'question_sets' is now 'vqa_benchmarks'"):
        compose("evaluate", ["checkpoint=run", "question_sets={}"])
    with pytest.raises(ValueError, match="holds a None, which has no evaluation"):
        compose("evaluate", ["checkpoint=none"])
    with pytest.raises(ValueError, match="separate commands"):
        compose("evaluate", ["checkpoint=run,other"])


@pytest.mark.parametrize(
    ("kind", "overrides", "idle"),
    [
        ("policy", ["simulate=false", "episodes=5"], "episodes"),
        ("policy", ["control.execute_seconds=1", "simulate=False"], "control.execute_seconds"),
        ("policy", ["simulate=false", "env=yam"], "env"),
        ("policy", ["open_loop=false", "data.root=moved", "data.num_workers=0"], "data.num_workers"),
        ("video_text", ["split=none", "limit_batches=3"], "limit_batches"),
    ],
)
def test_settings_of_what_is_left_out_are_refused(kind: str, overrides: list[str], idle: str, holding: Any) -> None:
    holding({"run": kind})
    with pytest.raises(SettingError, match=rf"nothing reads '{idle}' with (simulate=false|open_loop=false|split=none)"):
        compose("evaluate", ["checkpoint=run", *overrides])
    compose("evaluate", ["checkpoint=run", *(each for each in overrides if not each.startswith(idle))])


def test_how_frames_are_prepared_is_read_for_benchmarks_alone(holding: Any) -> None:
    holding({"run": "video_text"})
    settings = ["data.image_frames=8", "data.max_frames=16", "data.fit=pad"]
    cfg = compose("evaluate", ["checkpoint=run", "split=none", "vqa_benchmarks={mlvu: x}", *settings])
    assert cfg.data == {"image_frames": 8, "max_frames": 16, "fit": "pad"}
    with pytest.raises(SettingError, match=r"nothing reads 'data\.sources\.s\.root' with split=none"):
        compose("evaluate", ["checkpoint=run", "split=none", "data.sources.s.root=x"])


def test_the_command_composes_by_the_checkpoint_and_names_the_nearest_setting(
    holding: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holding({"run": "image_text"})
    seen: list[Any] = []
    monkeypatch.setattr("sys.argv", ["evaluate", "checkpoint=run", "images=3", "sampling.steps=2"])
    entry_point("evaluate", seen.append)
    assert (seen[0].images, seen[0].sampling.steps, seen[0].lpips) == (3, 2, "auto")
    monkeypatch.setattr("sys.argv", ["evaluate", "checkpoint=run", "image=3"])
    with pytest.raises(SystemExit) as stop:
        entry_point("evaluate", evaluate.print_result)
    assert stop.value.code == 2
    assert "the nearest is 'images'" in capsys.readouterr().err


def test_each_kept_step_has_a_result_of_its_own() -> None:
    for checkpoint, folder in (
        ("run/checkpoints/last.ckpt", "run/evaluation"),
        ("run/checkpoints/step-00000017.ckpt", "run/evaluation/step-00000017"),
        ("elsewhere/policy.ckpt", "elsewhere/evaluation"),
    ):
        assert evaluate.evaluation_output(checkpoint, None) == Path(folder)
        assert evaluate.evaluation_output(checkpoint, "here") == Path("here")


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_kept_step_is_evaluated_without_the_latest_checkpoint(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, kind in ((500, "policy"), (1000, "image_text"), (2000, "policy")):
        config = {"model": {"_target_": "somewhere.Model"}}
        content = {"state_dict": {}, "global_step": step}
        content |= {checkpoints.HEADER: {"format": checkpoints.FORMAT, "config": config, KIND: kind}}
        AtomicCheckpointIO().save_checkpoint(content, folder / f"step-{step:08d}.ckpt")
    last = folder / "last.ckpt"
    if damage == "changed":
        content_bytes = bytearray((folder / "step-00002000.ckpt").read_bytes())
        content_bytes[len(content_bytes) // 2] ^= 1
        last.write_bytes(content_bytes)
    run = f"checkpoint={tmp_path}"
    assert compose("evaluate", [run, "step=1000", "images=3"]).images == 3
    assert choose_kind([run, "checkpoint_step=500,2000"]) == ["evaluate=policy"]
    with pytest.raises(ValueError, match="separate commands"):
        choose_kind([run, "checkpoint_step=500,1000"])
    with pytest.raises(FileNotFoundError, match=r"keeps no checkpoint of step 7: it has 500, 1000, 2000"):
        choose_kind([run, "checkpoint_step=7"])
    for latest in ([run], [run, "checkpoint_step=null"]):
        with pytest.raises((FileNotFoundError, ValueError), match=r"last\.ckpt"):
            choose_kind(latest)


@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_jobs_of_a_sweep_over_one_checkpoint_keep_their_results_apart(
    launcher: str, holding: Any, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would otherwise write to the folder of the run, over the job before it."""

    class Model:
        evaluation_kind = "policy"

    def evaluated(evaluated: Any, cfg: Any) -> dict[str, Any]:
        rate = {"argmax": 0.25, "viterbi": 0.75}[cfg.policy.decoder]
        return {"closed_loop": {"left": {"success_rate": rate, "failures": {}}}}

    holding({"run": "policy"})
    monkeypatch.setattr(checkpoints, "load_module", lambda path, **options: Model())
    monkeypatch.setattr("keygrip.evaluation.policy.evaluate_policy", evaluated)
    rates = {"0": 0.25, "1": 0.75}
    given = ["checkpoint=run", "evaluate=policy"]
    if launcher == "basic":
        swept = ["policy.decoder=argmax,viterbi", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
        outcome = cli("-m", *given, *swept, of="evaluate")
        assert outcome.code == 0, outcome.err
        assert "closed_loop/left/success_rate" in Path("sweep/summary.csv").read_text().splitlines()[0]
    else:  # the commands of hydra/launcher=processes
        for job, decoder in (("0", "argmax"), ("1", "viterbi")):
            its_folder = [f"hydra.run.dir=sweep/{job}", "hydra.mode=RUN", f"hydra.job.num={job}"]
            outcome = cli(*given, f"policy.decoder={decoder}", *its_folder, of="evaluate")
            assert outcome.code == 0, outcome.err
    assert not Path("evaluation").exists()
    assert not Path("run").exists()
    for job, rate in rates.items():
        written = json.loads(Path("sweep", job, "evaluation", "result.json").read_text())
        assert written["closed_loop"]["left"]["success_rate"] == rate
        result = read_result(Path("sweep", job))
        assert result["status"] == "finished"
        assert result["metrics"] == {"closed_loop/left/success_rate": rate}


@pytest.mark.parametrize("file", ["result.json", "checkpoints/last.ckpt"])
def test_an_evaluation_does_not_overwrite_the_result_of_a_training(file: str, tmp_path: Path) -> None:
    checkpoint, run = "run/checkpoints/last.ckpt", tmp_path / "run"
    (run / file).parent.mkdir(parents=True)
    (run / file).write_text(json.dumps({"status": "finished", "started_at": 1.0}))
    with pytest.raises(ValueError, match=rf"run_dir={run} is a run folder, whose result\.json would be overwritten"):
        evaluate.evaluation_output(checkpoint, str(run))
    (tmp_path / "result.json").write_text(json.dumps({"checkpoint": checkpoint, "settings": {}}))
    for folder in (tmp_path, run / "evaluation", tmp_path / "new"):  # an earlier evaluation is replaced
        assert evaluate.evaluation_output(checkpoint, str(folder)) == folder


def test_two_evaluations_do_not_write_into_one_folder(
    holding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model:
        evaluation_kind = "policy"

    holding({"run": "policy"})
    monkeypatch.setattr(checkpoints, "load_module", lambda path, **options: Model())
    monkeypatch.setattr("keygrip.evaluation.policy.evaluate_policy", lambda evaluated, cfg: {"figure": 1.0})
    cfg = compose("evaluate", ["checkpoint=run", f"run_dir={tmp_path}"])
    with (
        lock_folder(tmp_path),
        pytest.raises(ValueError, match="still going on: wait until it ends, or give another run_dir"),
    ):
        evaluate.run(cfg)
    assert not (tmp_path / "result.json").exists()
    result = evaluate.run(cfg)
    assert result["figure"] == 1.0
    assert result["settings"]["episodes"] == cfg.episodes  # the requested settings are stored with the figures
    assert (tmp_path / "result.json").is_file()
    evaluate.print_result(cfg)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["figure"] == 1.0
    assert "settings" not in shown  # they would hide the figures
    assert {"wall_s", "machine"} <= set(shown)
    assert json.loads(Path(shown["file"]).read_text())["settings"] == result["settings"]
