"""The network: size, which inputs change its output and which must not, initial values, options, routing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from dit_parts import CHANNELS, conditions_of, flags, small_dit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keygrip.models.nn.attention import rotated
from keygrip.models.nn.flow_matching import interpolate, velocity_from_data
from keygrip.models.patch_dit.context import Conditions, Context
from keygrip.models.patch_dit.network import ContextCache, PatchDiT
from keygrip.models.patch_dit.positions import grid_positions, rotary_angles
from keygrip.models.patch_dit.routing import TokenRouting

BOTH = flags(True, True)


def latents(height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(3))


def context(
    network: PatchDiT, conditions: Conditions, aspect: float = 1.0, text: Tensor = BOTH, dino: Tensor = BOTH
) -> Context:
    return network.context_builder(conditions, text, dino, aspect)


@torch.no_grad()
def velocity(network: PatchDiT, conditions: Conditions, x: Tensor | None = None, **keep: Tensor) -> Tensor:
    x = latents() if x is None else x
    told = context(network, conditions, x.shape[-1] / x.shape[-2], **keep)
    return network(x, torch.tensor([0.3, 0.8]), told).velocity


def difference(left: Tensor, right: Tensor) -> float:
    """Return the difference relative to the size of the first."""
    return float(((left - right).norm() / left.norm()).detach())


@pytest.mark.parametrize(("use_patches", "low", "high"), [(True, 237e6, 239e6), (False, 237e6, 239e6)])
def test_reference_size(use_patches: bool, low: float, high: float) -> None:
    with torch.device("meta"):
        network = PatchDiT(16, 4096, 1024, width=768, depth=18, heads=12, use_dino_patches=use_patches)
        conditions = Conditions(
            torch.empty(1, 512, 4096),
            torch.ones(1, 512).bool(),
            torch.empty(1, 1024),
            torch.empty(1, 196, 1024),
            (14, 14),
        )
        told = context(network, conditions, text=flags(True), dino=flags(True))
        assert sum(told.groups) == (709 if use_patches else 513)
        assert network(torch.empty(1, 16, 64, 64), torch.empty(1), told).velocity.shape == (1, 16, 64, 64)
    assert low <= sum(p.numel() for p in network.parameters()) <= high


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_shuffled_patches_change_the_output(size: tuple[int, int]) -> None:
    """Trap 1: the layout depends on the positions of the patches, in every bucket."""
    network, conditions, x = small_dit(), conditions_of(grid=(3, 4)), latents(*size)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = replace(conditions, patches=conditions.patches[:, order])  # type: ignore[index]
    assert difference(velocity(network, conditions, x), velocity(network, shuffled, x)) > 0.01
    blind = small_dit(patch_positions=False)
    assert difference(velocity(blind, conditions, x), velocity(blind, shuffled, x)) < 1e-5


@pytest.mark.parametrize("adaln", ["shift_scale", "gated"])
def test_every_input_counts(adaln: Any) -> None:
    network, conditions = small_dit(adaln=adaln), conditions_of()
    before = velocity(network, conditions)
    other = conditions_of(seed=9)
    for name in ("text", "cls", "patches"):
        assert difference(before, velocity(network, replace(conditions, **{name: getattr(other, name)}))) > 0.01
    changed_level = network(latents(), torch.tensor([0.4, 0.8]), context(network, conditions)).velocity
    assert difference(before[0], changed_level[0]) > 0.01
    torch.testing.assert_close(before[1], changed_level[1])


def test_padding_of_the_text_does_not_count() -> None:
    network, conditions = small_dit(), conditions_of(lengths=(3, 5))
    assert conditions.text is not None
    assert conditions.text_mask is not None
    noise = torch.where(conditions.text_mask[..., None], conditions.text, torch.full_like(conditions.text, 50.0))
    torch.testing.assert_close(velocity(network, conditions), velocity(network, replace(conditions, text=noise)))


def test_the_unconditional_branch_does_not_know_the_caption() -> None:
    """Trap 2, at the output: it depends neither on the words nor on their number, nor on the CLS or the patches."""
    network, short, long = small_dit(), conditions_of(lengths=(1, 2), seed=4), conditions_of(lengths=(8, 7), seed=5)
    nothing = {"text": flags(False, False), "dino": flags(False, False)}
    torch.testing.assert_close(velocity(network, short, **nothing), velocity(network, long, **nothing))
    assert difference(velocity(network, short), velocity(network, long)) > 0.01


def test_cls_drives_the_norms_and_is_a_token() -> None:
    """The sum of CLS and timestep is used twice: without either use it still changes the output."""
    conditions = conditions_of()
    other = replace(conditions, cls=-conditions.cls)  # type: ignore[operator]
    no_token = small_dit()
    with torch.no_grad():
        for block in no_token.blocks:
            block.cross_attention.output.weight.zero_()
    assert difference(velocity(no_token, conditions), velocity(no_token, other)) > 0.01
    no_norms = small_dit()
    with torch.no_grad():
        for block in no_norms.blocks:
            block.modulation.linear.weight.zero_()
    assert difference(velocity(no_norms, conditions), velocity(no_norms, other)) > 1e-3


@pytest.mark.parametrize("adaln", ["shift_scale", "gated"])
def test_starts_at_zero_and_wakes_up(adaln: Any) -> None:
    """The first output is zero and every block the identity; a few steps later each parameter gets a gradient."""
    network = small_dit(stirred=False, adaln=adaln).train()
    parts = {name: len(p) // 32 for name, p in network.named_parameters() if name.endswith("modulation.linear.bias")}
    assert set(parts.values()) == {6 if adaln == "shift_scale" else 9}
    conditions, x, level = conditions_of(), latents(), torch.tensor([0.3, 0.8])
    taps: list[Tensor] = []
    for tap in (1, network.depth):
        output = network(x, level, context(network, conditions), tap=tap)
        assert output.tapped is not None
        taps.append(output.tapped.tokens)
    assert not output.velocity.any()
    torch.testing.assert_close(taps[0], taps[1])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (
            network(x, level, context(network, conditions, dino=flags(True, False), text=flags(False, True))).velocity
            - x
        )
        loss.pow(2).mean().backward()
        optimizer.step()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_prediction_of_the_clean_latent() -> None:
    """The same raw output, read as data, gives the velocity towards that data, bounded near the data."""
    v_network, x_network = small_dit(), small_dit(prediction="x")
    conditions, x = conditions_of(), latents()
    level = torch.tensor([0.01, 0.8])
    with torch.no_grad():
        raw = v_network(x, level, context(v_network, conditions)).velocity
        implied = x_network(x, level, context(x_network, conditions)).velocity
        exact = x_network(x, level, context(x_network, conditions), floor=1e-3).velocity
    torch.testing.assert_close(implied, (x - raw) / torch.tensor([0.05, 0.8]).view(2, 1, 1, 1))
    torch.testing.assert_close(exact, (x - raw) / level.view(2, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_a_perfect_prediction_has_no_loss(prediction: Any) -> None:
    """At every timestep, also below the floor; above the floor the target is the velocity of the path."""
    network = small_dit(prediction=prediction, timestep_floor=0.2 if prediction == "x" else None)
    data, noise, level = latents(), torch.randn(2, CHANNELS, 8, 8), torch.tensor([0.1, 0.6])
    x = interpolate(data, noise, level)
    target = network.target(x, data, noise, level)
    torch.testing.assert_close(target[1], (noise - data)[1])
    if prediction == "x":
        torch.testing.assert_close(target, velocity_from_data(x, data, level, floor=0.2))
    else:
        torch.testing.assert_close(target, noise - data)


@pytest.mark.parametrize(("size", "grid"), [((4, 12), (2, 5)), ((12, 4), (3, 3)), ((2, 2), (1, 1))])
def test_every_bucket(size: tuple[int, int], grid: tuple[int, int]) -> None:
    network, x = small_dit(), latents(*size)
    assert velocity(network, conditions_of(grid=grid), x).shape == x.shape
    tokens = network._to_tokens(x)
    torch.testing.assert_close(network._to_latent(tokens, *network.grid(x)), x)


def test_samples_of_a_batch_do_not_mix() -> None:
    network, conditions = small_dit(), conditions_of()
    other = conditions_of(seed=8)
    mixed = Conditions(
        *(
            torch.cat([a[:1], b[1:]])
            for a, b in ((conditions.text, other.text), (conditions.text_mask, other.text_mask))
        ),  # type: ignore[index]
        *(torch.cat([a[:1], b[1:]]) for a, b in ((conditions.cls, other.cls), (conditions.patches, other.patches))),  # type: ignore[index]
        conditions.patch_grid,
    )
    before, after = velocity(network, conditions), velocity(network, mixed)
    torch.testing.assert_close(before[0], after[0])
    assert difference(before[1], after[1]) > 0.01


def test_attention_shares_by_block() -> None:
    network, conditions = small_dit(), conditions_of()
    shares = network.attention_shares(latents(), torch.tensor([0.3, 0.8]), context(network, conditions))
    assert shares.shape == (3, 2, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2))
    assert shares.min() > 0


def test_attention_stays_fused() -> None:
    """The context's mask must not make torch use the unfused attention kernel, in float32 or under autocast."""
    network, conditions = small_dit(), conditions_of()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        velocity(network, conditions)
        with torch.autocast("cpu", torch.bfloat16):
            assert velocity(network, conditions).dtype == torch.float32


def test_routing_is_for_training_alone() -> None:
    routing = TokenRouting(share=0.5, start=1, stop=-1)
    routed, plain = small_dit(routing=routing), small_dit()
    conditions = conditions_of()
    torch.testing.assert_close(velocity(routed, conditions), velocity(plain, conditions))
    routed.train()
    torch.manual_seed(0)
    assert difference(velocity(plain, conditions), velocity(routed, conditions)) > 0.01


def test_tokens_are_taken_and_put_back_as_by_gather_and_scatter() -> None:
    torch.manual_seed(0)
    whole, tokens = torch.randn(3, 7, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    index = TokenRouting(share=0.3, start=1, stop=2).choose(3, 7, whole.device)
    wide = index[..., None].expand(-1, -1, 4)
    for found, expected in (
        (TokenRouting.take(whole, index), whole.gather(1, wide)),
        (TokenRouting.put_back(whole, tokens, index), whole.scatter(1, wide, tokens)),
    ):
        assert torch.equal(found, expected)
        weights, inputs = torch.randn_like(found), [whole, tokens]
        gradients = (
            torch.autograd.grad((each * weights).sum(), inputs, allow_unused=True) for each in (found, expected)
        )
        for one, other in zip(*gradients, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_routed_tokens_pass_by_the_middle() -> None:
    """The middle blocks receive a share of the tokens; the others return unchanged to their places."""
    network = small_dit(routing=TokenRouting(share=0.75, start=1, stop=2)).train()
    seen: list[Tensor] = []
    network.blocks[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    first: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda _, arguments, output: first.append(output))
    last: list[Tensor] = []
    network.blocks[2].register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    output = network(latents(), torch.tensor([0.3, 0.8]), context(network, conditions_of()), tap=2)
    assert seen[0].shape[1] == 4
    tapped = output.tapped
    assert tapped is not None
    assert tapped.index is not None
    passed = torch.ones(2, 16, dtype=torch.bool).scatter(1, tapped.index, False)
    assert torch.equal(last[0][passed], first[0][passed])
    torch.testing.assert_close(TokenRouting.take(last[0], tapped.index), tapped.tokens)
    for share, start, stop, message in ((1.0, 1, 2, "between 0 and 1"), (0.5, 0, 2, "middle"), (0.5, 2, 1, "middle")):
        with pytest.raises(ValueError, match=message):
            TokenRouting(share, start, stop).check(3)


def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_gradient() -> None:
    gradients = []
    for option in (False, True):
        network = small_dit(gradient_checkpointing=option).train()
        calls = [0] * len(network.blocks)
        for number, block in enumerate(network.blocks):
            block.register_forward_pre_hook(partial(count_call, calls, number))
        output = network(latents(), torch.tensor([0.3, 0.8]), context(network, conditions_of()))
        assert calls == [1] * len(calls)
        output.velocity.pow(2).mean().backward()
        assert calls == [1 + option] * len(calls)
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def count_call(calls: list[int], number: int, *_: object) -> None:
    calls[number] += 1


def test_errors_name_the_setting() -> None:
    for changes, message in (
        ({"adaln": "none"}, "shift_scale or gated"),
        ({"prediction": "eps"}, "is v or x"),
        ({"timestep_floor": 0.2}, "no effect with prediction=v"),
        ({"prediction": "x", "timestep_floor": 2.0}, "timestep_floor=2"),
        ({"width": 30}, "multiple of 4"),
        ({"heads": 3}, "into 3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            small_dit(**changes)
    with pytest.raises(ValueError, match="sides divide by 2"):
        velocity(small_dit(), conditions_of(), latents(5, 8))


# ---- rotary positions ------------------------------------------------------------------------------------------------


def test_products_under_rotation_depend_on_the_distance_alone() -> None:
    """For queries and keys of two pairs of places with the same offset, in a square and a wide grid."""
    for grid, aspect in (((4, 4), 1.0), ((3, 6), 2.0)):
        angles = rotary_angles(grid_positions(grid, aspect), 16, 8)
        query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

        def product(asked: int, told: int, angles: Tensor = angles, q: Tensor = query, k: Tensor = key) -> float:
            return float((rotated(q, angles[asked : asked + 1]) * rotated(k, angles[told : told + 1])).sum())

        columns = grid[1]
        for step in (1, columns, columns + 1):  # right, down, both
            assert product(0, step) == pytest.approx(product(1, step + 1), abs=1e-5)
        assert product(0, 1) != pytest.approx(product(0, columns), abs=1e-3)
        assert product(0, 1) != pytest.approx(product(1, 0), abs=1e-3)
        torch.testing.assert_close(rotated(query, angles).norm(dim=-1), query.norm(dim=-1).expand(1, 1, len(angles)))


def test_rotary_positions_enter_the_self_attention_alone() -> None:
    """They change the output and add no parameter; a cached context and checkpointed gradients stay the same."""
    plain, turned = small_dit(depth=2), small_dit(depth=2, rotary=True)
    turned.load_state_dict(plain.state_dict())
    conditions = conditions_of()
    assert difference(velocity(plain, conditions), velocity(turned, conditions)) > 0.01
    x, level, told = latents(), torch.tensor([0.3, 0.8]), context(turned, conditions)
    cache = ContextCache()
    with torch.no_grad():
        turned(x, torch.tensor([0.9, 0.9]), told, cache=cache)
        torch.testing.assert_close(turned(x, level, told, cache=cache).velocity, velocity(turned, conditions))
    with pytest.raises(ValueError, match=r"model\.network\.rotary=true needs heads whose width divides by 4"):
        small_dit(width=36, heads=6, rotary=True)


def test_routed_tokens_keep_their_places() -> None:
    """A block that is given the routed tokens and their angles must give the same as among tokens that it may not
    attend to: here its self-attention on the same tokens with angles selected by hand."""
    network = small_dit(rotary=True, depth=4, routing=TokenRouting(0.5, 1, -1)).train()
    seen: list[Tensor] = []
    for block in network.blocks:
        block.self_attention.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args, kwargs: seen.append(kwargs["angles"]), with_kwargs=True
        )
    network(latents(), torch.tensor([0.3, 0.8]), context(network, conditions_of()))
    whole = seen[0]
    assert [angles.shape[-2] for angles in seen] == [16, 8, 8, 16]
    assert torch.equal(seen[3], whole)
    for sample in seen[1]:  # the rows of the whole table, in order
        places = [int((whole == row).all(1).nonzero()[0]) for row in sample]
        assert places == sorted(set(places))
