"""The pretended GPU refuses what CUDA refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretended_gpu import MixedDevices, pretended_gpu, waits
from torch import Tensor, nn


def there(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


MIXED: dict[str, Callable[[], object]] = {
    "a sum": lambda: there(3) + torch.ones(3),
    "a product of matrices": lambda: torch.ones(2, 3) @ there(3, 2),
    "a layer that stayed": lambda: nn.Linear(3, 2)(there(2, 3)),
    "a joined tensor": lambda: torch.cat([there(2), torch.zeros(2)]),
    "indices on the GPU": lambda: torch.ones(3)[torch.zeros(2, dtype=torch.long, device="cuda")],
    "values on the CPU": lambda: there(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "an embedding": lambda: nn.functional.embedding(torch.tensor([1]), there(3, 2)),
    "numpy": lambda: there(3).numpy(),
    "a generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator of a draw": lambda: torch.multinomial(there(3), 1, generator=torch.Generator().manual_seed(0)),
    "in place": lambda: torch.ones(3).add_(there(3)),
}


@pytest.mark.parametrize("what", list(MIXED))
def test_what_cuda_refuses_is_refused(what: str) -> None:
    with pretended_gpu(), pytest.raises(MixedDevices):
        MIXED[what]()


def test_what_cuda_allows_is_allowed() -> None:
    """Scalars, indices on the CPU, copies in both directions, and a generator of its own; outside the context no GPU is
    pretended."""
    with pretended_gpu():
        x = there(3)
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
        assert x[torch.tensor([0, 2])].device.type == "cuda"
        x[torch.tensor([1])] = 5.0
        assert x.cpu().numpy().tolist() == [1, 5, 1]
        other = torch.zeros(3)
        other.copy_(x)
        assert other.device.type == "cpu"
        assert torch.arange(2).to(x).device == x.device
        assert x.new_tensor([1.0]).device == x.device == torch.zeros_like(x).device
        assert torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).device == x.device
        assert float(x.sum()) == 7
    assert not torch.cuda.is_available()
    assert torch.Generator().device.type == "cpu"


WAITING: dict[str, Callable[[], object]] = {
    "a number": lambda: float(there(1)),
    "a condition": lambda: bool((there(3) > 0).all()),
    "a list": lambda: there(3).tolist(),
    "a copy": lambda: there(3).cpu(),
    "where a mask is true": lambda: there(3).nonzero(),
    "what is under a mask": lambda: there(3)[there(3) > 0],
    "repetitions": lambda: there(2).repeat_interleave(torch.tensor([1, 2], device="cuda")),
}


@pytest.mark.parametrize("what", list(WAITING))
def test_reading_from_the_gpu_waits_for_it(what: str) -> None:
    with pretended_gpu():
        WAITING[what]()
        assert len(waits) == 1
        assert __file__ in waits[0]


def test_computing_on_the_gpu_waits_for_nothing() -> None:
    with pretended_gpu():
        x = there(3)
        x[torch.tensor([0, 2], device="cuda")] = x.where(x > 0, -x)[:2]
        torch.ones(3).to("cuda").masked_fill_(x > 0, 0).sum()
        assert not waits


def test_training_computes_what_it_does_on_the_cpu() -> None:
    def trained(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        tied = nn.Linear(4, 4)
        network = nn.Sequential(tied, nn.LayerNorm(4), nn.Dropout(0.5), tied).to(device)
        assert network[0] is network[3]
        optimizer = torch.optim.AdamW(network.parameters(), 0.1)
        for _ in range(3):
            x = torch.randn(4, 4).to(device)
            attended = nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
            loss = network(attended[0, 0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert {parameter.device.type for parameter in network.parameters()} == {device}
        return [parameter.detach().cpu() for parameter in network.parameters()]

    expected = trained("cpu")
    with pretended_gpu():
        found = trained("cuda")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
