"""The behaviour that all modules share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy_parts
from torch import Tensor

from keygrip import train
from keygrip.config import compose
from keygrip.training.optimizers import AdamW
from keygrip.training.system import check_names


def test_only_a_validation_takes_a_mean_over_no_element_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In validation it has weight zero in the mean of the batches; in training it would be a value that no element
    had."""
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


def test_a_step_of_fewer_accumulated_batches_is_the_mean_over_them(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches per epoch, four per step: every second step has one batch."""
    batches: list[list[Tensor]] = []
    steps: list[list[Tensor]] = []
    whole_step = toy_parts.ToyModule.training_step

    def noted_step(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = whole_step(self, batch, batch_idx)
        batches.append(list(torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)))
        return loss

    def noted(self: toy_parts.ToyModule, optimizer: Any) -> None:
        steps.append([parameter.grad.clone() for parameter in self.parameters()])

    monkeypatch.setattr(toy_parts.ToyModule, "training_step", noted_step)
    monkeypatch.setattr(toy_parts.ToyModule, "on_before_optimizer_step", noted)
    options = ("accumulate_grad_batches=4", "max_steps=4", "limit_val_batches=0", "model.dropout=0")
    train.run(compose("train", toy_overrides("run", *options)))
    for found, window in zip(steps, (batches[:4], batches[4:5], batches[5:9], batches[9:]), strict=True):
        for gradient, own in zip(found, zip(*window, strict=True), strict=True):
            torch.testing.assert_close(gradient, torch.stack(own).mean(0))
