"""Validation runs every n optimizer steps, however many batches a step has; a run without validation reports it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import toy_parts

from keygrip import train
from keygrip.config import compose
from keygrip.training.signals import Interrupted


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps at which a toy validates, without the check before training."""
    steps: list[int] = []

    def note(self: toy_parts.ToyModule) -> None:
        if not self.trainer.sanity_checking:
            steps.append(self.global_step)

    monkeypatch.setattr(toy_parts.ToyModule, "on_validation_epoch_start", note)
    return steps


QUICK = ((1, None), (7, None), (2, 4), (7, 7))


@pytest.mark.parametrize(
    ("accumulated", "stopped_at"),
    [
        pytest.param(accumulated, stopped_at, marks=() if (accumulated, stopped_at) in QUICK else pytest.mark.slow)
        for accumulated in (1, 2, 7)
        for stopped_at in (None, 4, 7)  # never; after a validation; before one
    ],
)
def test_every_so_many_steps_also_where_an_epoch_ends_one_early(
    accumulated: int,
    stopped_at: int | None,
    toy_overrides: Callable[..., list[str]],
    validated: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An epoch has five batches: five steps of one, two steps of two and a step of one, or one step."""
    overrides = toy_overrides("run", f"accumulate_grad_batches={accumulated}", "max_steps=12", "val_every_n_steps=4")
    expected = [4, 8, 12]
    if stopped_at is not None:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"at step {stopped_at + 1}"):
            patch.setenv("TOY_STOP_AT", str(stopped_at))
            patch.setenv("TOY_SIGNAL", "SIGTERM")
            train.run(compose("train", overrides))
        overrides.append("resume=true")
        expected = [4, 8, 12] if stopped_at == 4 else [4, 12]
    train.run(compose("train", overrides))
    assert validated == expected


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"max_steps": -1, "max_epochs": 1}, "val_every_n_steps=6 is above the 5 steps of this run"),
        ({"max_steps": 100, "max_epochs": 1}, "val_every_n_steps=6 is above the 5 steps of this run"),
        ({"max_steps": 5, "max_epochs": -1}, "val_every_n_steps=6 is above max_steps=5"),
        ({"max_steps": 5, "max_epochs": 1}, "val_every_n_steps=6 is above max_steps=5"),
        ({"max_steps": 5, "max_epochs": 1, "data.samples": 24}, "val_every_n_steps=6 is above max_steps=5"),
        ({"max_steps": -1, "max_epochs": 2}, None),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(
    length: dict[str, int],
    said: str | None,
    toy_overrides: Callable[..., list[str]],
    validated: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    of_length = [f"{name}={value}" for name, value in length.items()]
    best = "callbacks.checkpoint.monitor=val/loss"
    with caplog.at_level("INFO"):
        train.run(compose("train", toy_overrides("run", *of_length, "val_every_n_steps=6", best)))
    assert validated == ([] if said else [6])
    messages = [record.message for record in caplog.records if "validation: " in record.message]
    assert messages == ([f"no validation: {said}"] if said else [])
    assert ("without validation there is no best checkpoint" in caplog.text) == bool(said)
