"""A setting that is unknown, or whose value has a type that its receiver does not accept, is named before anything is
built."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from configs import composed
from omegaconf import OmegaConf

from keygrip import prepare
from keygrip.config import SettingError
from keygrip.evaluation.kinds import changed
from keygrip.models.patch_dit.guidance import Order
from keygrip.models.patch_dit.sampler import Sampling
from keygrip.runtime.watchdog import WatchdogSettings
from keygrip.setting_types import hints_of, refuse_ill_typed, type_problem

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, -1], [True, 2.0, "3", None, [3]]),
        (float, [3, 0.5, -1e9], [NAN, INF, "0.5", False, None, {}]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["a", Path("a")], [None, ["a"], {"a": 1}, 3, 0.5]),
        (float | None, [None, 1], ["none", NAN]),
        (int | Literal["auto"], [2, "auto"], ["atuo", 2.5]),
        (str | Path | Sequence[str | Path] | None, [None, "a", ["a", "b"]], [{"a": 1}, [["a"]]]),
        (tuple[float, float], [[0.9, 0.99], (1, 2)], [0.9, [0.9], [0.9, 0.9, 0.9], ["a", "b"], "ab"]),
        (Sequence[int], [[], [1, 2]], ["12", 12, [1, 2.5], {"a": 1}]),
        (Mapping[str, float], [{}, {"a": 1}, {"a": None}], [[], "a", 3, {"a": "b"}, {"a": NAN}, {"a": 1, "b": [2]}]),
        (int | Mapping[str, int], [3, {"a": 1}], ["a", {"a": "b"}]),
        (Any, [None, 3, "a", {}], []),
        (Path | WatchdogSettings, ["a", {"_target_": "x.Y"}], []),
    ],
)
def test_kinds(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [type_problem(value, hint) for value in good] == [None] * len(good)
    assert all(type_problem(value, hint) for value in bad)


def test_alternatives_are_told_so_that_each_is_read_as_what_it_is() -> None:
    """A null among the values of a list is different from a null in place of the list."""
    margins = float | tuple[float | None, float | None, float | None] | None
    said = "a finite number or null, or a list of 3, each of it a finite number or null"
    assert type_problem([0.1, "far", None], margins) == said
    assert type_problem([0.1], margins) == "a finite number or a list of 3 or null"
    assert type_problem("b", Literal["a", "c"] | None) == "null, or one of a, c"
    assert type_problem("a", int | Mapping[str, int]) == "a whole number or settings by name"


def test_fields_that_a_dataclass_inherits_have_the_types_of_the_file_that_names_them() -> None:
    hint = hints_of(Sampling)["guidance"]
    assert type_problem("none", hint) is None
    assert type_problem("text", hint) == type_problem("text", Order) is not None


def test_the_same_name_in_the_files_of_a_dataclass_and_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (
        ("base", "Size = int\n@dataclass\nclass Base:\n    first: Size = 1"),
        ("derived", "from base import Base\nSize = str\n@dataclass\nclass Derived(Base):\n    second: Size = 'a'"),
    ):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(f"from __future__ import annotations\nfrom dataclasses import dataclass\n{code}", vars(module))
    assert hints_of(module.Derived) == {"first": int, "second": str}
    monkeypatch.delitem(sys.modules, "base")  # like a script, or a file loaded by path
    assert hints_of(module.Derived) == {"first": Any, "second": str}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    found: Any = OmegaConf.to_container(composed("train", []), resolve=True)
    found["data"]["root"] = "demos"
    return found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.lr", "abc", "optimizer.lr='abc': must be a finite number"),
        ("optimizer.lr", NAN, "optimizer.lr=nan: must be a finite number"),
        ("optimizer.lr", None, "optimizer.lr=null: must be a finite number"),
        ("optimizer.betas", [0.9], "optimizer.betas=[0.9]: must be a list of 2"),
        ("optimizer.clip_norm", INF, "optimizer.clip_norm=inf: must be a finite number or null"),
        ("callbacks.ema.decay", [1], "callbacks.ema.decay=[1]: must be a finite number"),
        ("callbacks.checkpoint.keep", 2.5, "callbacks.checkpoint.keep=2.5: must be a whole number"),
        ("data.batch_size", "many", "data.batch_size='many': must be a whole number"),
        ("data.batch_size", True, "data.batch_size=True: must be a whole number"),
        ("data.arms", "right", "data.arms='right': must be a list"),
        ("data.verify", 3, "data.verify=3: must be true or false"),
        ("data.camera", ["over"], "data.camera=['over']: must be text"),
        (
            "data.camera",
            130322270735,
            "data.camera=130322270735: must be text; what you gave is read as a number: put it in two kinds of quotes, "
            "\"data.camera='...'\"",
        ),
        (
            "data.cameras",
            ["over", 1303],
            "data.cameras=['over', 1303]: must be null, or a list, each of it text; what you gave is read as a number: "
            "put it in two kinds of quotes, \"data.cameras=['...']\"",
        ),
        ("data.augmentation.shift", "far", "data.augmentation.shift='far': must be a finite number"),
        ("data.batchsize", 3, "there is no setting 'data.batchsize': the nearest is 'data.batch_size'"),
        ("optimizer.learning_rate", 3, "there is no setting 'optimizer.learning_rate': the nearest is 'optimizer.lr'"),
        ("model.pictures", True, "the setting 'model.pictures' is now 'model.log_images_every_n_steps'"),
        ("model.network.blocks", -1, "model.network.blocks=-1: must be at least 1"),
        ("model.network.height_bins", 0, "model.network.height_bins=0: must be at least 1"),
        ("backbone.width", 0, "backbone.width=0: must be at least 1"),
        ("data.batch_size", 0, "data.batch_size=0: must be at least 1"),
        ("strategy.devices", "both", "strategy.devices='both': must be a whole number or one of auto"),
    ],
)
def test_settings_that_cannot_be_are_named(plain: dict[str, Any], key: str, value: Any, said: str) -> None:
    refuse_ill_typed({name: plain[name] for name in ("optimizer", "strategy", "callbacks")})
    given = copy.deepcopy(plain)
    *path, last = key.split(".")
    node = given
    for name in path:
        node = node[name]
    node[last] = value
    with pytest.raises(SettingError) as refused:
        refuse_ill_typed({path[0]: given[path[0]]})
    assert str(refused.value) == said


def test_precision_may_be_a_number(plain: dict[str, Any]) -> None:
    for precision in (16, 32, "bf16-mixed"):
        refuse_ill_typed({"strategy": plain["strategy"] | {"precision": precision}})


def test_a_step_names_the_setting_that_was_given() -> None:
    for override, said in (
        ("first_seed=abc", "first_seed='abc': must be a whole number"),
        ("task.random_start=3", "task.random_start=3: must be true or false"),
        ("task.regoin=left", "there is no setting 'task.regoin': the nearest is 'task.region'"),
        ("demos=2.5", "demos=2.5: must be a whole number"),
    ):
        with pytest.raises(SettingError) as refused:
            prepare.run(composed("prepare", ["step=record", "root=nowhere", override]))
        assert str(refused.value) == said


def test_changes_of_options_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"WatchdogSettings.most_holds='few': must be a whole number"):
        changed(WatchdogSettings(), {"most_holds": "few"})
    with pytest.raises(ValueError, match=r"WatchdogSettings.stale_seconds=nan: must be a finite number"):
        changed(WatchdogSettings(), {"stale_seconds": NAN})
