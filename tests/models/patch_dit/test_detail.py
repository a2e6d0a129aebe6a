"""The detail head: starts at zero, mixes nearby tokens but not the whole image, packs pixels as the autoencoder
does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dit_parts import CHANNELS, conditions_of, flags, small_dit, stir
from torch import Tensor
from torch.nn import functional

from keygrip.models.patch_dit.autoencoders import PixelPacking
from keygrip.models.patch_dit.detail import DetailHead
from keygrip.models.patch_dit.network import ContextCache

HEAD = partial(DetailHead, width=8, blocks=1)
SIDE = 16  # side of a token in pixels: 2 x 2 cells of 8


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Return the head's inputs for latents of 64 px images with cells of 8 px."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "noisy": normal(2, 192, 8, 8),
        "draft": normal(2, 192, 8, 8),
        "tokens": normal(2, 16, 12),
        "condition": normal(2, 12),
    }


def head(**changes: Any) -> DetailHead:
    torch.manual_seed(1)
    made = HEAD(**({"latent_channels": 192, "token_width": 12, "patch_size": 2, "cell": 8} | changes))
    stir(made)
    return made.eval()


def test_it_starts_as_nothing() -> None:
    given = inputs()
    new = HEAD(latent_channels=192, token_width=12, patch_size=2, cell=8)
    torch.testing.assert_close(new(**given), given["draft"], rtol=0, atol=0)
    assert float((head()(**given) - given["draft"]).detach().abs().max()) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", ["noisy", "draft"])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_sees_pixels_of_other_tokens_that_are_near(name: str, stride: int) -> None:
    """One pixel at a token's border changes pixels of the next token, and none farther away than the convolutions
    reach. Group norms, which average over the whole image, are replaced by identities for the test."""
    network = head(stride=stride)
    for block in network.blocks:
        block.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    network.norm = torch.nn.Identity()
    given = inputs()
    pixels = functional.pixel_shuffle(given[name], 8)
    pixels[:, :, 31, SIDE - 1] += 1.0  # the last column of the first token
    changed = given | {name: functional.pixel_unshuffle(pixels, 8)}
    before, after = (PixelPacking(8).decode(network(**each)) for each in (given, changed))
    moved = (before - after).abs().amax((0, 1)) > 1e-6
    rows, columns = moved.nonzero().unbind(1)
    reach = 4 * stride + stride  # four convolutions of 3 x 3 cells, and the cell itself
    assert int(columns.max()) >= SIDE
    assert int((columns - SIDE + 1).abs().max()) <= reach
    assert int((rows - 31).abs().max()) <= reach


@torch.no_grad()
def test_every_input_counts() -> None:
    network, given, other = head(), inputs(), inputs(1)
    before = network(**given)
    for name in given:
        assert float((network(**given | {name: other[name]}) - before).abs().max()) > 0.01, name


@torch.no_grad()
def test_tokens_stand_where_their_pixels_are() -> None:
    network, given = head(), inputs()
    other = given | {"tokens": given["tokens"].clone()}
    other["tokens"][:, 6] += 5.0  # row 1, column 2 of 4 x 4
    network.norm = torch.nn.Identity()
    for block in network.blocks:
        block.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    moved = PixelPacking(8).decode((network(**given) - network(**other)).abs()).amax((0, 1)) - 0.5
    rows, columns = (moved == moved.max()).nonzero()[0].tolist()
    assert (rows // SIDE, columns // SIDE) == (1, 2)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_in_the_network(size: tuple[int, int]) -> None:
    """It adds zero at first, in every shape, and gives the same with cached keys and values."""
    plain, conditions, both = small_dit(), conditions_of(), flags(True, True)
    network = small_dit(stirred=False, detail=partial(HEAD, stride=2))
    network.load_state_dict(plain.state_dict(), strict=False)
    x, level = torch.randn(2, CHANNELS, *size), torch.tensor([0.3, 0.8])

    def velocity(of: Any, cache: ContextCache | None = None) -> Tensor:
        return of(x, level, of.context_builder(conditions, both, both, size[1] / size[0]), cache).velocity

    torch.testing.assert_close(velocity(network), velocity(plain))
    stir(network)
    expected, cache = velocity(network), ContextCache()
    assert float((expected - velocity(plain)).abs().max()) > 0.01
    for _ in range(2):
        torch.testing.assert_close(velocity(network, cache), expected, rtol=1e-4, atol=1e-5)


def test_checkpointed_gradients_are_the_same_and_the_head_is_computed_twice() -> None:
    conditions, both = conditions_of(), flags(True, True)
    x, level = torch.randn(2, CHANNELS, 8, 8), torch.tensor([0.3, 0.8])
    found = []
    for option in (False, True):
        network = small_dit(detail=HEAD, gradient_checkpointing=option).train()
        told, calls = network.context_builder(conditions, both, both, 1.0), []
        assert network.detail is not None
        network.detail.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        network(x, level, told).velocity.square().mean().backward()
        assert len(calls) == 1 + option
        found.append({name: value.grad for name, value in network.named_parameters() if value.grad is not None})
    assert {"detail.image_in.weight", "detail.token_in.weight"} <= set(found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cell": 5}, r"model.network.detail.cell=5: .* give encoders\.autoencoder\.edge"),
        ({"cell": 0}, "model.network.detail.cell=0"),
        ({"stride": 3}, "model.network.detail.stride=3"),
        ({"width": 6}, "width=6"),
        ({"blocks": 0}, "blocks=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        head(**changes)


def test_cells_are_those_of_the_latents() -> None:
    made = head(cell=2)
    made.check(2)
    with pytest.raises(ValueError, match=r"model\.network\.detail\.cell=2: these encoders give latents of cells of 4"):
        made.check(4)
