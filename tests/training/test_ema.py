from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keygrip import train
from keygrip.config import compose
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.ema import EMA


def test_average_follows_its_formula_and_validation_sees_it(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts

    history: list[dict[str, Tensor]] = []
    seen: list[tuple[int, Tensor]] = []

    def note(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        history.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def validate(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            seen.append((self.trainer.global_step, self.network[0].weight.detach().clone()))

    monkeypatch.setattr(toy_parts.ToyModule, "on_train_batch_start", note, raising=False)
    monkeypatch.setattr(toy_parts.ToyModule, "validation_step", validate)
    train.run(compose("train", toy_overrides("run", "callbacks.ema.decay=0.5")))
    checkpoint = read_checkpoint(tmp_path / "run")
    history.append(dict(checkpoint["state_dict"]))

    average = {name: value.clone() for name, value in history[0].items()}
    by_step = {}
    for n, weights in enumerate(history[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
        by_step[n] = average
    assert checkpoint["ema"]["updates"] == 13
    for name, value in checkpoint["ema"]["parameters"].items():
        torch.testing.assert_close(value, by_step[13][name])
    assert {step for step, _ in seen} == {4, 8, 12}
    for step, weight in seen:
        torch.testing.assert_close(weight, by_step[step]["network.0.weight"])


def test_validation_leaves_training_as_it_was(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    train.run(compose("train", toy_overrides("often", "val_every_n_steps=1")))
    train.run(compose("train", toy_overrides("never", "limit_val_batches=0")))
    often, never = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("often", "never"))
    for name in often:
        assert torch.equal(often[name], never[name])


def test_every_validation_draws_the_same_numbers_after_resuming_too(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts

    drawn: dict[int, list[float]] = {}

    def validate(self: toy_parts.ToyModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        drawn.setdefault(self.trainer.global_step, []).append(float(torch.rand(())))

    monkeypatch.setattr(toy_parts.ToyModule, "validation_step", validate)
    train.run(compose("train", toy_overrides("run", "max_steps=8")))
    train.run(compose("train", toy_overrides("run", "max_steps=12", "resume=true")))
    drawn.pop(0)  # the check before the first step
    assert drawn.keys() == {4, 8, 12}
    assert drawn[4] == drawn[8] == drawn[12]
    assert len(set(drawn[4])) == len(drawn[4]) > 1


def test_a_loader_that_shuffles_by_torchs_generator_has_another_order_after_each_validation(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts

    orders: list[list[int]] = []

    class Shuffled(toy_parts.ToyLoader):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            order = torch.randperm(40)
            orders.append(order.tolist())
            return self.data.batches(order, 0)

    monkeypatch.setattr(toy_parts.ToyData, "train_dataloader", lambda self: Shuffled(self, shuffled=True))
    train.run(compose("train", toy_overrides("run", "max_steps=15", "val_every_n_steps=5")))
    assert len({tuple(order) for order in orders}) == len(orders) >= 3


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=1.0)
    with pytest.raises(ValueError, match="every_n_steps"):
        EMA(every_n_steps=0)
