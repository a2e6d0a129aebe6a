"""Export folders contain what a checkpoint contains for inference, and a changed byte is detected."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from keygrip import export
from keygrip.artifacts import DiskFullError
from keygrip.config import compose
from keygrip.exporting.folder import CARD, CONFIG, PROCESSOR, WEIGHTS, is_export, model_card, read_export, write_export
from keygrip.training.checkpoints import find_checkpoint

HEADER = {"keygrip": {"format": 1, "config": {"model": {"_target_": "keygrip.models.x.Y", "sizes": [1, 2]}}}}


def content(**more: Any) -> dict[str, Any]:
    weights = {"a": torch.randn(3, 4), "b": torch.arange(3), "flag": torch.tensor(True)}
    return HEADER | {"state_dict": weights, "global_step": 7, "optimizer_states": [object()], "loops": {}} | more


def write(folder: Path, **more: Any) -> dict[str, Any]:
    made = content(**more)
    write_export(folder, made, made["state_dict"], "# card\n")
    return made


def test_a_round_trip_keeps_weights_statistics_and_nothing_of_training(tmp_path: Path) -> None:
    stored = {"views": ("over", "wrist"), "mean": torch.rand(5, dtype=torch.float64), "names": {"é": [None, 1.5, True]}}
    made = write(tmp_path / "model", my_model=stored, ema={"updates": 3, "parameters": {"a": torch.zeros(3, 4)}})
    assert is_export(tmp_path / "model")
    read = read_export(tmp_path / "model")
    assert set(read) == {"keygrip", "state_dict", "global_step", "my_model"}
    assert read["keygrip"] == made["keygrip"]
    assert read["my_model"]["views"] == ("over", "wrist")
    assert read["my_model"]["names"] == stored["names"]
    assert torch.equal(read["my_model"]["mean"], stored["mean"])
    assert all(torch.equal(read["state_dict"][name], value) for name, value in made["state_dict"].items())
    assert read["state_dict"]["b"].dtype == torch.int64
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CARD, CONFIG, WEIGHTS, PROCESSOR]


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path) -> None:
    write(tmp_path / "model", extra=torch.rand(4))
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {modes[CONFIG]}


def test_addresses_in_header_and_card_have_no_password(tmp_path: Path) -> None:
    """Whoever calls `write_export`: a caller need not remove them."""
    root = "https://me:pass@word@host/set"
    header = {"config": {"data": {"sources": [{"root": root}], "other": "s3://bucket/a@b"}}}
    made = content(keygrip=header, words={"tokens": [root]})
    write_export(tmp_path / "model", made, made["state_dict"], f"Trained on `{root}` by me@host\n")
    read = read_export(tmp_path / "model")
    data = {"sources": [{"root": "https://host/set"}], "other": "s3://bucket/a@b"}
    assert read["keygrip"] == {"config": {"data": data}}
    assert (tmp_path / "model" / CARD).read_text() == "Trained on `https://host/set` by me@host\n"
    assert read["words"] == {"tokens": [root]}  # data of the module, such as a tokenizer, are not changed
    assert header["config"]["data"]["sources"] == [{"root": root}]  # nor is the caller's header


def test_numbers_that_json_lacks_are_read_as_they_were(tmp_path: Path) -> None:
    """An unlimited range of a simulator's option is infinite. Before, such an export could not be read."""
    options = {"healthy_z_range": [0.7, float("inf")], "best": (-float("inf"), 1.5)}
    header = {"config": {"env": {"options": options}}}
    made = content(keygrip=header, scores={"last": float("nan"), "first": np.float64("inf")})
    write_export(tmp_path / "model", made, made["state_dict"], "# card\n")
    read = read_export(tmp_path / "model")
    assert read["keygrip"] == header
    assert math.isnan(read["scores"]["last"])
    assert read["scores"]["first"] == math.inf
    json.loads((tmp_path / "model" / CONFIG).read_text(), parse_constant=pytest.fail)  # standard JSON


@pytest.mark.parametrize("name", [WEIGHTS, PROCESSOR])
def test_a_changed_byte_is_found(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model", extra=torch.rand(4))
    file = tmp_path / "model" / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
        read_export(tmp_path / "model")


def test_values_that_are_no_data_are_refused_and_nothing_remains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/extra/0 is a object"):
        write(tmp_path / "model", extra=[object()])
    with pytest.raises(ValueError, match="keys that JSON cannot hold"):
        write(tmp_path / "model", extra={1: 2})
    for name in ("__tensor__", "__tuple__", "__float__"):
        with pytest.raises(ValueError, match=rf"^/extra has keys that JSON cannot hold: \['{name}'\]$"):
            write(tmp_path / "model", extra={name: 2})
    with pytest.raises(KeyError):
        write_export(tmp_path / "model", content(), {"a": torch.ones(1)}, "", also=lambda folder: {}["missing"])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "model")


def test_a_file_in_place_of_the_folder_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("")
    with pytest.raises(ValueError, match=rf"^to={re.escape(f'{file}/below: {file}')} is a file: give a folder$"):
        export.run(compose("export", ["checkpoint=none", f"to={file}/below"]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda config: [], "not a keygrip export"),
        (lambda config: config | {"schema": "other/1"}, "other/1"),
        (lambda config: config | {"sha256": {}}, "does not name the hashes"),
        (lambda config: config | {"sha256": {WEIGHTS: config["sha256"][WEIGHTS]}}, "does not name the hashes"),
        (lambda config: config | {"sha256": config["sha256"] | {"../../secret": "0"}}, "does not name the hashes"),
        (lambda config: config | {"checkpoint": [1]}, "holds no checkpoint"),
        (lambda config: config | {"checkpoint": {"x": {"__tensor__": "gone"}}}, "names the tensor 'gone'"),
        (lambda config: config | {"checkpoint": {"x": {"__tensor__": []}}}, r"names the tensor \[\]"),
        (lambda config: config | {"checkpoint": {"x": {"__float__": "1.5"}}}, "has the number '1.5', which is none of"),
        (lambda config: config | {"checkpoint": {"x": {"__float__": []}}}, r"has the number \[\], which is none of"),
        (lambda config: config | {"checkpoint": {"x": json.loads("[" * 80 + "]" * 80)}}, "levels deep"),
    ],
)
def test_hostile_configurations_are_refused_in_a_sentence(change: Any, sentence: str, tmp_path: Path) -> None:
    write(tmp_path / "model")
    file = tmp_path / "model" / CONFIG
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=sentence):
        read_export(tmp_path / "model")


def test_a_changed_value_of_the_configuration_is_found(tmp_path: Path) -> None:
    write(tmp_path / "model", heights=[0.25, 1.5])
    file = tmp_path / "model" / CONFIG
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text)))  # another layout of the same values
    assert read_export(tmp_path / "model")["heights"] == [0.25, 1.5]
    file.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(ValueError, match=r"config\.json is not the file that was exported"):
        read_export(tmp_path / "model")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_json_are_refused(raw: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model")
    (tmp_path / "model" / CONFIG).write_bytes(raw)
    with pytest.raises(ValueError, match="is not JSON"):
        read_export(tmp_path / "model")


def test_the_card_names_figures_and_command() -> None:
    result = {"steps": 7, "metrics": {"val/loss": 0.25, "bad": float("nan")}, "overrides": ["model=x", "seed=1"]}
    card = model_card("my_model", content(), {"a": torch.ones(1_500_000)}, "of the last step", result)
    assert "The model is a `Y`." in card
    assert "1.50 M parameters" in card
    assert "| val/loss | 0.25 |" in card
    assert "nan" not in card
    assert "python -m keygrip.train model=x seed=1" in card
    demo = {"command": "demo", "overrides": ["data.root=my demos", "optimizer.lr_multipliers={backbone: 0.1}"]}
    card = model_card("my_model", content(), {"a": torch.ones(1)}, "of the last step", demo)
    assert "The figures are the run's own" in card
    line = next(line for line in card.splitlines() if "python -m" in line)
    assert shlex.split(line) == ["python", "-m", "keygrip.demo", *demo["overrides"]]


class Network:
    about = "a network's own word"


class Drives:
    about, evaluation_kind, network = "my_policy, a robot policy", "policy", object()


class Answers:
    about, evaluation_kind, usage, network = "my_vlm", "video_text", 'chat = Chat("{name}")', Network()


def test_the_card_shows_what_users_of_such_a_model_call() -> None:
    weights = {"a": torch.ones(1)}
    card = model_card("mine", content(), weights, "of the last step", {}, Drives())
    assert "The model is my_policy, a robot policy." in card
    assert 'policy = keygrip.load_policy("mine")\n' in card
    assert "plan = policy.plan(observation)" in card
    assert "keygrip run checkpoint=mine robot=sim_yam" in card
    assert "keygrip.load(" not in card
    card = model_card("mine", content(), weights, "of the last step", {}, Answers())
    assert "The model is a network's own word." in card
    assert 'chat = Chat("mine")' in card
    assert "keygrip generate checkpoint=mine" in card


def test_the_card_tells_success_with_its_count_or_not_at_all() -> None:
    counts = {"success_rate": 0.0, "success_low": 0.0, "success_high": 0.6576, "episodes": 2, "successes": 0}
    metrics = {"closed_loop/hall/success_rate": 0.0, "closed_loop/hall/plan_ms_median": 8.0}

    def rows(closed_loop: dict[str, Any]) -> list[str]:
        card = model_card(
            "mine", content(), {}, "of the last step", {"steps": 7, "metrics": metrics}, None, closed_loop
        )
        return [line for line in card.splitlines() if line.startswith("| closed_loop/hall/")]

    time = "| closed_loop/hall/plan_ms_median | 8 |"
    assert rows({"conditions": {"hall": counts}}) == [
        time,
        "| closed_loop/hall/success | 0 of 2 (95 % interval 0 to 0.66) |",
    ]
    assert rows({}) == [time]
    assert rows({"conditions": {"hall": counts | {"success_rate": 0.5}}}) == [time]  # from another evaluation


@pytest.mark.parametrize(
    ("steps", "which", "said"),
    [
        (7, "EMA of 6 steps", None),
        (9, "EMA of 6 steps", "measured at step 9, not with these weights, and are left out"),
        (7, "of the last step", "measured with the EMA of 6 steps, not with these weights, and are left out"),
    ],
)
def test_the_card_has_no_figures_of_other_weights(steps: int, which: str, said: str | None) -> None:
    counts = {"success_rate": 1.0, "success_low": 0.8, "success_high": 1.0, "episodes": 20, "successes": 20}
    metrics = {"val/loss": 0.25, "closed_loop/hall/success_rate": 1.0}
    result = {"steps": steps, "metrics": metrics, "overrides": ["seed=1"]}
    closed_loop = {"conditions": {"hall": counts}}
    card = model_card("mine", content(), {}, which, result, None, closed_loop, measured="EMA of 6 steps")
    shown = said is None
    assert ("| val/loss | 0.25 |" in card, "20 of 20" in card, "The figures are the run's own" in card) == (shown,) * 3
    assert shown or str(said) in card
    assert "keygrip.train seed=1" in card


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "model", mean=torch.zeros(2))
    (tmp_path / "model" / PROCESSOR).unlink()
    os.mkfifo(tmp_path / "model" / PROCESSOR)
    with pytest.raises(FileNotFoundError, match=f"{PROCESSOR} is missing, or is no file"):
        read_export(tmp_path / "model")


def test_a_folder_of_other_safetensors_is_no_export(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS)
    assert not is_export(tmp_path)


@pytest.mark.parametrize(("there", "lacking"), [(CONFIG, WEIGHTS), (WEIGHTS, CONFIG)])
def test_half_an_export_says_what_it_lacks(there: str, lacking: str, tmp_path: Path) -> None:
    (tmp_path / there).write_bytes(b"{}")
    with pytest.raises(
        FileNotFoundError, match=rf"no checkpoint in .*; of an export it has {there} and lacks {lacking}"
    ):
        find_checkpoint(tmp_path)


def test_a_full_disk_is_named_by_the_folder_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("keygrip.exporting.folder.save_file", full)
    with pytest.raises(DiskFullError, match=r"no space left for \S*new: free some or choose another folder"):
        write_export(tmp_path / "new", {}, {"a": torch.zeros(2)}, "card")
    assert list(tmp_path.iterdir()) == []
