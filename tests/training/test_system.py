"""What every module shares."""

from __future__ import annotations

import logging

import pytest
import torch
import toy_parts

from keygrip.training.optimizers import AdamW
from keygrip.training.system import check_names


def test_only_a_validation_takes_a_mean_over_no_element_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It weighs nothing in the mean of the batches; in training it would be a value that no element had."""
    module = toy_parts.ToyModule(optimizer=AdamW(lr=0.1))
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    none = {"error": torch.tensor(float("nan"))}
    for split in ("train", "val"):
        module.log_values(split, none, 2, counts={"error": torch.tensor(0)})
    assert logged == {"train/error": pytest.approx(float("nan"), nan_ok=True), "val/error": 0.0}


def test_names_are_compared_where_both_runs_have_some(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_names("R", cameras=((), ("over",)), arms=(("left",), ()))
        assert not caplog.messages
        check_names("R", cameras=(("front",), ("over",)))
    assert caplog.messages[0].startswith("R has the cameras front, this run over")
