"""The context: one builder, null embeddings that hide dropped conditions, masks, and the positions of patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_parts import conditions_of, flags, small_dit, stir

from keygrip.models.patch_dit.context import CATEGORIES, ConditionDropout, Conditions, ContextBuilder, kept
from keygrip.models.patch_dit.positions import grid_positions, position_features


@pytest.fixture
def builder() -> ContextBuilder:
    torch.manual_seed(0)
    builder = ContextBuilder(32, text_dim=6, dino_dim=10, position_cells=8)
    stir(builder)
    return builder


def test_709_tokens_in_order() -> None:
    """512 text tokens, CLS, 14 x 14 patches; 513 tokens for the baseline without patches."""
    conditions = conditions_of(lengths=(30, 512), text_length=512, grid=(14, 14))
    for use, count in ((True, 709), (False, 513)):
        builder = ContextBuilder(16, 6, 10, use_dino_patches=use)
        context = builder(conditions, flags(True, True), flags(True, True), 1.0)
        token = torch.full((2, 16), 7.0)
        tokens = context.tokens(token)
        assert tokens.shape == (2, count, 16)
        assert sum(context.groups) == count
        assert torch.equal(tokens[:, 512], token)
        mask = context.mask
        assert mask is not None
        assert mask.sum(1).tolist() == [30 + count - 512, count]


def test_null_text_is_the_same_for_every_caption(builder: ContextBuilder) -> None:
    """Trap 2: the caption's length must not be visible, neither in the unmasked tokens nor in their number."""
    conditions = conditions_of(lengths=(2, 7))
    context = builder(conditions, flags(False, False), flags(True, True), 1.0)
    mask = context.text_mask
    assert mask is not None
    assert torch.equal(mask[0], mask[1])
    assert torch.equal(context.text[0][mask[0]], context.text[1][mask[1]])
    none = builder(replace(conditions, text=None, text_mask=None), flags(True, True), flags(True, True), 1.0)
    assert torch.equal(none.text[0], context.text[0][mask[0]])


def test_an_empty_caption_is_no_caption(builder: ContextBuilder) -> None:
    empty = conditions_of(lengths=(0, 3))
    context = builder(empty, flags(True, True), flags(True, True), 1.0)
    dropped = builder(empty, flags(False, True), flags(True, True), 1.0)
    assert torch.equal(context.text, dropped.text)
    assert context.text_mask is not None
    assert dropped.text_mask is not None
    assert torch.equal(context.text_mask, dropped.text_mask)
    assert context.text_mask[0].sum() == 1


def test_what_is_dropped_leaves_no_trace(builder: ContextBuilder) -> None:
    """CLS and patches are dropped together; the other sample of the batch keeps its own."""
    first, second = conditions_of(seed=1), conditions_of(seed=2)
    drop_first = flags(False, True)
    one, two = (builder(conditions, flags(True, True), drop_first, 1.0) for conditions in (first, second))
    assert one.patches is not None
    assert two.patches is not None
    assert torch.equal(one.cls[0], two.cls[0])
    assert torch.equal(one.patches[0], two.patches[0])
    assert not torch.equal(one.cls[1], two.cls[1])
    assert not torch.equal(one.patches[1], two.patches[1])
    without = builder(replace(first, cls=None, patches=None), flags(True, True), flags(True, True), 1.0)
    assert without.patches is not None
    assert torch.equal(without.patches[0], one.patches[0])
    assert torch.equal(without.cls[0], one.cls[0])


def test_null_patches_start_at_zero() -> None:
    builder = ContextBuilder(32, 6, 10, position_cells=8)
    assert builder.null_dino_patches is not None
    assert not builder.null_dino_patches.any()
    assert builder.null_text.any()
    assert builder.null_dino.any()
    conditions = replace(conditions_of(grid=(2, 3)), cls=None, patches=None)
    patches = builder(conditions, flags(True, True), flags(True, True), 1.5).patches
    torch.testing.assert_close(patches[0], position_features(grid_positions((2, 3), 1.5), 32, 8))


def test_trimming_cuts_what_counts_nowhere(builder: ContextBuilder) -> None:
    context = builder(conditions_of(lengths=(3, 5)), flags(True, True), flags(True, True), 1.0)
    trimmed = context.trimmed()
    assert trimmed.text.shape[1] == 5
    assert trimmed.text_mask is not None
    assert torch.equal(trimmed.text_mask, torch.arange(5) < torch.tensor([[3], [5]]))
    same = builder(conditions_of(lengths=(4, 4)), flags(True, True), flags(True, True), 1.0).trimmed()
    assert same.mask is None


@pytest.mark.parametrize("aspect", [0.5, 1.0, 16 / 9])
def test_one_frame_for_latents_and_patches(aspect: float) -> None:
    """A patch that covers 2 x 2 latent cells has the position of these cells, in every bucket."""
    cells = grid_positions((8, 12), aspect).unflatten(0, (8, 12))
    patches = grid_positions((4, 6), aspect).unflatten(0, (4, 6))
    torch.testing.assert_close(cells.unflatten(0, (4, 2)).unflatten(2, (6, 2)).mean((1, 3)), patches)
    whole = grid_positions((1, 1), aspect)
    torch.testing.assert_close(whole, torch.zeros(1, 2))
    # The border is half a cell beyond the outermost centres: sides 1 / sqrt(aspect) and sqrt(aspect).
    low, high = cells[0, 0], cells[-1, -1]
    sides = (high - low) * torch.tensor([8 / 7, 12 / 11])
    torch.testing.assert_close(sides, torch.tensor([aspect**-0.5, aspect**0.5]))


def test_positions_tell_every_cell_apart() -> None:
    features = position_features(grid_positions((16, 16), 1.0), 64, 16)
    near = torch.cdist(features, features) + 1e3 * torch.eye(256)
    assert near.min() > 1.0
    # Neighbouring cells are more similar than distant ones.
    product = (features @ features.T).unflatten(0, (16, 16)).unflatten(2, (16, 16))
    assert product[8, 8, 8, 9] > product[8, 8, 8, 15]
    with pytest.raises(ValueError, match="divides by 4"):
        position_features(grid_positions((2, 2), 1.0), 6, 8)


def test_dropout_categories_are_exclusive_and_have_their_shares() -> None:
    torch.manual_seed(0)
    category = ConditionDropout().draw(40000)
    shares = torch.bincount(category, minlength=4) / len(category)
    torch.testing.assert_close(shares, torch.tensor([0.10, 0.30, 0.05, 0.55]), atol=0.01, rtol=0)
    text, dino = kept(torch.arange(4))
    assert text.tolist() == [False, True, False, True]
    assert dino.tolist() == [False, False, True, True]
    assert CATEGORIES == ("none", "text", "dino", "both")
    only = ConditionDropout(0.0, 0.0, 0.0, 1.0).draw(100)
    assert only.eq(3).all()
    with pytest.raises(ValueError, match="add up to 1"):
        ConditionDropout(0.5, 0.5, 0.5, 0.5)


def test_patches_count_in_or_around_a_rectangle() -> None:
    """For the requested share of samples; at zero no random numbers are used and nothing changes."""
    count, grid = 2000, (4, 6)
    whole = Conditions(None, None, torch.zeros(count, 2), torch.zeros(count, 24, 2), grid)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert ConditionDropout().masked(whole) is whole
    assert torch.equal(torch.get_rng_state(), before)
    text = whole.without_dino()
    assert ConditionDropout(masked_patches=1.0).masked(text) is text
    mask = ConditionDropout(masked_patches=0.4).masked(whole).patch_mask
    assert mask is not None
    partly = mask[~mask.all(dim=1)].unflatten(1, grid)
    assert len(partly) / count == pytest.approx(0.4, abs=0.05)
    shares = partly.float().mean(dim=(1, 2))
    assert shares.std() > 0.2
    assert float(partly[:, 0, 0].float().mean()) > 0.3
    assert float(partly[:, 2, 3].float().mean()) > 0.3
    for one in partly[:200]:
        boxes = []
        for side in (one, ~one):
            rows, columns = side.any(dim=1).nonzero().flatten(), side.any(dim=0).nonzero().flatten()
            box = torch.zeros_like(side)
            if len(rows):
                box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            boxes.append(torch.equal(box, side))
        assert any(boxes)
    given = replace(whole, patch_mask=torch.zeros(count, 24, dtype=torch.bool))
    assert not ConditionDropout(masked_patches=1.0).masked(given).patch_mask.any()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="masked_patches=2"):
        ConditionDropout(masked_patches=2.0)


def test_halves_belong_together() -> None:
    whole = conditions_of()
    with pytest.raises(ValueError, match="both or neither"):
        replace(whole, text_mask=None)
    with pytest.raises(ValueError, match="both or neither"):
        replace(whole, cls=None)
    with pytest.raises(ValueError, match="has 12 patches, got 9"):
        replace(whole, patch_grid=(3, 4))
    assert isinstance(replace(whole, cls=None, patches=None), Conditions)


def test_the_same_builder_serves_the_network() -> None:
    """Trap 3: there is only one, and the network builds its context tokens in no other way."""
    network = small_dit()
    builders = [part for part in network.modules() if isinstance(part, ContextBuilder)]
    assert builders == [network.context_builder]
