"""The public Python interface: light to import, and the same as the commands."""

from __future__ import annotations

import doctest
import json
import multiprocessing
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract_parts import QUICK, observation

import keygrip
from keygrip.config import SettingError, compose
from keygrip.models.volume_query.module import VolumeQueryModule


def test_importing_loads_nothing_heavy_and_is_typed() -> None:
    script = (
        "import sys, keygrip\n"
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'lightning', 'mujoco'} & set(sys.modules)\n"
        "print(sorted(heavy), keygrip.__version__, len([m for m in sys.modules if m.startswith('keygrip')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", keygrip.__version__, "1"]
    assert (Path(keygrip.__file__).parent / "py.typed").is_file()
    assert doctest.testmod(keygrip).failed == 0
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        keygrip.lode  # noqa: B018


def test_another_system_is_named() -> None:
    windows = "import os; os.name = 'nt'; import keygrip"
    done = subprocess.run([sys.executable, "-c", windows], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: keygrip runs on Linux and macOS")


@pytest.mark.slow
def test_a_type_checker_finds_what_is_not_there(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("import keygrip\nplan = keygrip.load_policy('run').plan({})\nkeygrip.load_polcy('run')\n")
    done = subprocess.run([sys.executable, "-m", "mypy", str(script)], capture_output=True, text=True)
    assert re.findall(r"mine.py:(\d+): error: (.*?);", done.stdout) == [("3", 'Module has no attribute "load_polcy"')]


def test_a_model_is_trained_loaded_and_exported_from_python(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    often = "callbacks.checkpoint.every_n_steps=2"
    result = keygrip.train([*toy_overrides("run"), "max_steps=3", "val_every_n_steps=3", often])
    assert result["status"] == "finished"
    assert result["steps"] == 3
    assert Path(result["run_dir"]) == tmp_path / "run"
    module = keygrip.load(result["run_dir"], trust=["toy_parts"])
    assert type(module).__name__ == "ToyModule"
    from keygrip import export

    checkpoint = f"checkpoint={result['run_dir']}"
    with pytest.raises(ValueError, match="has no graph to export"):
        export.run(compose("export", [checkpoint, f"to={tmp_path / 'x'}", "format=onnx", "trust=[toy_parts]"]))
    assert not (tmp_path / "x").exists()
    export.run(compose("export", [f"checkpoint={result['run_dir']}", f"to={tmp_path / 'toy'}", "trust=[toy_parts]"]))
    again = keygrip.load(tmp_path / "toy", trust=["toy_parts"])
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.scale == module.scale  # type: ignore[attr-defined]
    assert "val/loss" in (tmp_path / "toy" / "README.md").read_text()
    for name, other, measured in (("early", "step=2", "at step 3"), ("last", "ema=false", "with the EMA of 3 steps")):
        export.run(compose("export", [checkpoint, f"to={tmp_path / name}", "trust=[toy_parts]", other]))
        card = (tmp_path / name / "README.md").read_text()
        assert "val/loss" not in card
        assert f"The run's figures were measured {measured}, not with these weights, and are left out." in card
    again = f"checkpoint={tmp_path / 'toy'}"
    with pytest.raises(ValueError, match=r"ema=false has no effect: .*toy is an export of the EMA weights alone"):
        export.run(compose("export", [again, f"to={tmp_path / 'x'}", "trust=[toy_parts]", "ema=false"]))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="ema=false has no effect"):
        keygrip.load(tmp_path / "toy", trust=["toy_parts"], ema=False)
    own = keygrip.load(result["run_dir"], trust=["toy_parts"], ema=False)
    last = keygrip.load(tmp_path / "last", trust=["toy_parts"], ema=False)  # the weights of the last step
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in last.state_dict().items())
    with pytest.raises(ValueError, match="which drives no robot"):
        keygrip.load_policy(tmp_path / "toy", trust=["toy_parts"])


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as printed, with settings that make it small."""
    monkeypatch.chdir(tmp_path)
    example, *_ = re.findall(r"(?s)```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text())
    settings = '["experiment=demo"]'
    assert example.count(settings) == 1
    one_arm = SimpleNamespace(needs=SimpleNamespace(arms=("right",), cameras=()))
    names: dict[str, Any] = {
        "__name__": "__main__",
        "small": ["experiment=demo", "closed_loop=null", *VolumeQueryModule.toy_overrides, *QUICK],
        "observation": observation(one_arm),
    }
    exec(example.replace(settings, "small"), names)
    assert names["result"]["status"] == "finished"
    assert names["plan"].position.shape[::2] == (1, 3)


def test_an_export_holds_no_password_of_an_address(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    from keygrip import export
    from keygrip.training.checkpoints import find_checkpoint, read_checkpoint
    from keygrip.training.results import read_result, write_result
    from keygrip.training.saving import AtomicCheckpointIO

    run = Path(keygrip.train(toy_overrides("run", "max_steps=1"))["run_dir"])
    content, root = read_checkpoint(run), "https://me:p@,ss:word@host/set"
    content["keygrip"]["config"]["data"]["roots"] = [root, "s3://bucket/a@b"]
    AtomicCheckpointIO().save_checkpoint(content, find_checkpoint(run))
    write_result(run, read_result(run) | {"overrides": [f"data.roots=[{root}]"]})
    export.run(compose("export", [f"checkpoint={run}", f"to={tmp_path / 'toy'}", "trust=[toy_parts]"]))
    texts = [path.read_text(errors="replace") for path in (tmp_path / "toy").iterdir()]
    assert not any("ss:word" in text or "me:p" in text for text in texts)
    assert sum("https://host/set" in text for text in texts) == 2
    assert sum("s3://bucket/a@b" in text for text in texts) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lrr=1"], "there is no setting 'optimizer.lrr' in train.yaml: the nearest is 'optimizer.lr'"),
        (["optimizer.lr=1e-3,1e-4"], "optimizer.lr=1e-3,1e-4 holds a comma: as a list write"),
        (["-m", "seed=0,1"], "a sweep (-m) is several trainings, for the command: keygrip train -m"),
        (["model=volume_quer"], "no option 'volume_quer' in group 'model': nearest is model=volume_query"),
        (["sweep=vla_comparison"], "several trainings, for the command: keygrip train sweep=vla_comparison"),
        (["max_stepz=1"], "there is no setting 'max_stepz' in train.yaml: the nearest is 'max_steps'"),
    ],
)
def test_what_cannot_be_composed_is_a_setting_error(overrides: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        keygrip.train(overrides)


def test_a_setting_that_no_evaluation_has_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match=r"no setting 'episodez' in evaluate\.yaml: the nearest is 'episodes'"):
        keygrip.evaluate("run", ["evaluate=policy", "episodez=3"])


def test_trainings_of_one_process_have_folders_of_their_own(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders are named like those of the command, so that each finds the other's; each records its overrides."""
    monkeypatch.chdir(tmp_path)
    asked = [each for each in toy_overrides("run", "max_steps=1") if not each.startswith("run_dir=")]
    results = [keygrip.train([*asked, f"seed={seed}"]) for seed in (0, 1)]
    folders = [Path(result["run_dir"]) for result in results]
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {Path.cwd() / "runs" / "toy_toy"}
    for folder, seed in zip(folders, (0, 1), strict=True):
        assert json.loads((folder / "result.json").read_text())["overrides"] == [*asked, f"seed={seed}"]
    again = keygrip.train([*asked, "seed=1", "max_steps=2", "resume=true"])  # the newest run of this model and data
    assert (Path(again["run_dir"]), again["steps"]) == (folders[1], 2)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        keygrip.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        keygrip.evaluate(tmp_path / "it's, [not] there")
    with pytest.raises(ValueError, match="overrides are a list"):
        keygrip.train("model=volume_query")
    for given in ([2], ["max_steps=2", None]):
        with pytest.raises(ValueError, match=rf"overrides are a list of settings, .* {given[-1]!r} is no text"):
            keygrip.train(given)  # type: ignore[arg-type]


def test_settings_in_place_of_a_run_are_refused_with_what_to_say() -> None:
    with pytest.raises(ValueError, match=r"the run comes first, then the settings, keygrip\.evaluate\(RUN, \['ep"):
        keygrip.evaluate(["checkpoint=run", "episodes=20"])  # type: ignore[arg-type]


def test_what_a_part_refuses_is_its_own_error(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Hydra's error around it is no ValueError."""
    with pytest.raises(ValueError, match=r"^strategy\.devices=0: must be at least 1") as raised:
        keygrip.train(toy_overrides("run", "strategy.devices=0"))
    assert raised.value.__notes__ == ["setting: strategy"]
    assert "InstantiationException" not in "".join(traceback.format_exception(raised.value))


def test_a_process_that_imports_its_parents_script_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    for work in (lambda: keygrip.train(["experiment=demo"]), lambda: keygrip.evaluate("run")):
        with pytest.raises(RuntimeError, match="put its work under if __name__ == '__main__'"):
            work()
    assert list(tmp_path.iterdir()) == []


def test_modules_of_commands_stay_modules() -> None:
    import keygrip.train
    from keygrip import evaluate, train

    assert train is keygrip.train is sys.modules["keygrip.train"]
    assert callable(train.run)
    assert callable(evaluate.run)
