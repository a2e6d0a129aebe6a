"""Values of buffers are read from their device once after each change, and are never out of date."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from keygrip.training.host_copy import HostCopy


class Holder(nn.Module):
    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._known = HostCopy()
        self.register_buffer("known", torch.tensor([1.0, 2.0]))

    def read(self) -> list[float]:
        found: list[float] = self._known(self.known)
        return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the tensors that were read, in order."""
    found, tolist = [], Tensor.tolist

    def counted(self: Tensor) -> object:
        found.append(self)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return found


def test_it_is_read_once_after_each_change(reads: list[Tensor]) -> None:
    holder = Holder()
    assert [holder.read() for _ in range(3)] == [[1, 2]] * 3
    assert len(reads) == 1
    for number, change in enumerate(
        (
            lambda: holder.known.fill_(3.0),
            lambda: holder.known[0].mul_(2.0),  # a view of it
            lambda: holder.load_state_dict({"known": torch.tensor([4.0, 5.0])}),
            lambda: holder.load_state_dict({"known": torch.tensor([5.0, 5.0])}, assign=True),
            lambda: holder.double(),
        )
    ):
        change()
        assert holder.read() == holder.read() == [float(each) for each in holder.known]
        assert len(reads) == number + 2


@pytest.mark.parametrize("made", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_a_copy_says_what_its_own_buffer_holds(made: object) -> None:
    """The change counter of a copied tensor starts at another number."""
    holder = Holder()
    for changes in range(4):
        assert holder.read() == [float(each) for each in holder.known]
        other = made(holder)  # type: ignore[operator]
        for _ in range(4):
            other.known += 1
            assert other.read() == [float(each) for each in other.known]
        holder.known.fill_(float(changes))


def test_tensors_whose_changes_are_not_counted_are_read_each_time() -> None:
    with torch.inference_mode():
        holder = Holder()
        assert holder.read() == [1, 2]
        holder.known.add_(1)
        assert holder.read() == [2, 3]
