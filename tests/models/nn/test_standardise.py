"""Running standardisation: the statistics, what they do not depend on, and several processes."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed

from keygrip.models.nn.standardise import RunningStandardisation


def batches(count: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(size, 4, 5, generator=generator) + 7 for _ in range(count)]


def test_the_first_batches_count_alike() -> None:
    norm, seen = RunningStandardisation(4, 5, memory=50), batches(20)
    for batch in seen:
        norm(batch)
    every = torch.cat(seen)
    torch.testing.assert_close(norm.mean, every.mean(dim=0))
    torch.testing.assert_close(norm.square, every.square().mean(dim=0))
    expected = (every - every.mean(dim=0)) / every.std(dim=0, correction=0)
    torch.testing.assert_close(norm.eval()(every), expected, atol=1e-4, rtol=1e-4)


def test_old_batches_are_forgotten() -> None:
    norm = RunningStandardisation(4, 5, memory=5)
    for batch in [each + 100 for each in batches(5)] + batches(80):
        norm(batch)
    assert (norm.mean - 7).abs().max() < 3


def test_samples_of_a_batch_do_not_mix_and_statistics_have_no_gradient() -> None:
    norm = RunningStandardisation(4, 5)
    norm(batches(1)[0])
    x = batches(1)[0].requires_grad_()
    norm(x)[0].sum().backward()
    assert x.grad is not None
    assert not x.grad[1:].any()
    norm.eval()
    torch.testing.assert_close(norm(x)[:2], norm(x[:2]))
    same = norm(torch.ones(3, 4, 5))
    assert torch.isfinite(same).all()


def test_a_number_that_never_changes_becomes_zero() -> None:
    norm = RunningStandardisation(2)
    for _ in range(3):
        out = norm(torch.tensor([[5.0, 0.0], [5.0, 1.0]]))
    assert torch.equal(out[:, 0], torch.zeros(2))
    assert norm(torch.tensor([[5.001, 0.0]]))[0, 0] < 1.1  # and is not amplified


def test_training_goes_on_from_the_stored_statistics() -> None:
    whole, seen = RunningStandardisation(4, 5, memory=4), batches(9)
    for batch in seen[:6]:
        whole(batch)
    rest = RunningStandardisation(4, 5, memory=4)
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))
    for batch in seen[6:]:
        assert torch.equal(whole(batch), rest(batch))


def _half(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    norm = RunningStandardisation(4, 5)
    for batch in batches(3):
        norm(batch[:3] if rank == 0 else batch[3:])  # of different sizes
    torch.save(norm.state_dict(), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_statistics_of_one(tmp_path: Path) -> None:
    mp.start_processes(_half, (str(tmp_path),), nprocs=2, start_method="fork")  # spawned, they import torch again
    one = RunningStandardisation(4, 5)
    for batch in batches(3):
        one(batch)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(found[name], value)
