"""The action head: which inputs change the actions and which must not, caches, several noise samples, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keygrip.models.geometry_vla.action_head import ActionHead, BlockContext, HeadBlock
from keygrip.models.nn.attention import AttentionRecord

B, T, DA, DS, H, M = 2, 4, 10, 10, 32, 9


def head(**changes: int) -> ActionHead:
    torch.manual_seed(0)
    options = {"future_tokens": 3, "head_size": 16, "self_attention_every": 1} | changes
    built = ActionHead(H, 3, DS, DA, T, **options)
    for block in [*built.blocks, *built.mixers]:  # AdaLN starts at zero, which would hide the noise level
        torch.nn.init.normal_(block.modulation.linear.weight, std=0.2)
    return built


def inputs(draws: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(B * draws, T, DA, generator=generator)
    level = torch.rand(B * draws, generator=generator)
    return actions, level, torch.randn(B, DS, generator=generator)


def tokens(seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, M, H, generator=generator) for _ in range(3)]


def contexts(values: list[Tensor], mask: Tensor | None = None) -> list[BlockContext]:
    return [BlockContext(value, mask) for value in values]


def test_every_input_changes_the_velocity() -> None:
    built = head()
    actions, level, state = inputs()
    plain = built(actions, level, state, contexts(tokens()))
    assert plain.shape == (B, T, DA)

    def changed(*arguments: object) -> float:
        return float((built(*arguments) - plain).detach().abs().max())

    assert changed(actions + 0.5, level, state, contexts(tokens())) > 1e-3
    assert changed(actions, level * 0.5, state, contexts(tokens())) > 1e-3
    assert changed(actions, level, state + 0.5, contexts(tokens())) > 1e-3, "the state must reach the actions"
    for index in range(3):
        other = tokens()
        other[index] = other[index] + 0.5 * torch.randn(B, M, H, generator=torch.Generator().manual_seed(5))
        assert changed(actions, level, state, contexts(other)) > 1e-3, f"block {index} must read its context"


def test_self_attention_blocks_mix_the_tokens() -> None:
    """If all blocks attended to the context only, tokens would never mix: a change of one action must reach the
    others."""
    built = head()
    actions, level, state = inputs()
    other = actions.clone()
    other[:, 2] += 1.0
    difference = built(other, level, state, contexts(tokens())) - built(actions, level, state, contexts(tokens()))
    assert (difference.abs().amax(dim=(0, 2)) > 1e-4).all(), "every step hears of a change of step 2"


def test_without_self_attention_the_state_would_be_ignored() -> None:
    """This is why it cannot be switched off: blocks with a context alone do not carry the state to the actions."""
    with pytest.raises(ValueError, match="the state has no effect"):
        head(self_attention_every=0)
    with pytest.raises(ValueError, match="give 1 to 3"):
        head(self_attention_every=4)
    block = HeadBlock(H, 2, H, 4)
    x, condition = torch.randn(B, 5, H), torch.randn(B, H)
    context = BlockContext(torch.randn(B, M, H))
    other = x.clone()
    other[:, 0] = torch.randn(B, H)
    torch.testing.assert_close(block(other, condition, context)[:, 1:], block(x, condition, context)[:, 1:])
    assert (block(other, condition)[:, 1:] - block(x, condition)[:, 1:]).abs().max() > 1e-3


def test_padding_of_the_context_does_not_matter() -> None:
    built = head()
    actions, level, state = inputs()
    short = [value[:, :6] for value in tokens()]
    mask = torch.arange(M)[None].expand(B, M) < 6
    plain = built(actions, level, state, contexts(short))
    torch.testing.assert_close(built(actions, level, state, contexts(tokens(), mask)), plain)
    assert (built(actions, level, state, contexts(tokens())) - plain).abs().max() > 1e-3, "without the mask it would"


def test_draws_of_a_sample_share_its_context() -> None:
    """R noise samples in one call give the same as R calls with one each."""
    built = head()
    actions, level, state = inputs(draws=3)
    together = built(actions, level, state, contexts(tokens()))
    for draw in range(3):
        alone = built(actions[draw::3], level[draw::3], state, contexts(tokens()))
        torch.testing.assert_close(together[draw::3], alone, rtol=1e-4, atol=1e-5)


def test_keys_and_values_are_computed_once_over_the_steps_of_a_sampler() -> None:
    built = head()
    calls = []
    for block in built.blocks:
        block.attention.key_value.register_forward_hook(lambda *_: calls.append(1))
    actions, level, state = inputs()
    given = contexts(tokens())
    with torch.no_grad():
        cached = [built(actions * scale, level, state, given) for scale in (1.0, 0.5, 0.2, 0.1)]
        assert len(calls) == 3
        fresh = [built(actions * scale, level, state, contexts(tokens())) for scale in (1.0, 0.5, 0.2, 0.1)]
    for one, other in zip(cached, fresh, strict=True):
        torch.testing.assert_close(one, other)
    calls.clear()
    trained = contexts(tokens())
    built(actions, level, state, trained)
    built(actions, level, state, trained)
    assert len(calls) == 6, "in training they would hold on to an old graph"


def test_head_computes_in_float32_under_autocast() -> None:
    built = head()
    actions, level, state = inputs()
    plain = built(actions, level, state, contexts(tokens()))
    with torch.autocast("cpu", torch.bfloat16):
        under = built(actions.bfloat16(), level, state, contexts(tokens()))
        assert under.dtype == torch.float32
        exact = built(actions, level, state, contexts(tokens()))
    assert torch.equal(exact, plain)


def test_every_parameter_gets_a_gradient() -> None:
    built = head()
    actions, level, state = inputs()
    built(actions, level, state, contexts(tokens())).square().mean().backward()
    without = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_attention_shares_add_up() -> None:
    built = head()
    actions, level, state = inputs()
    record = AttentionRecord((6, 3))
    built(actions, level, state, contexts(tokens()), record)
    assert len(record.shares) == 3
    torch.testing.assert_close(torch.stack(record.shares).sum(-1), torch.ones(3, B))
