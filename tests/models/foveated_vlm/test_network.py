"""The three modes compared with each other and with a dense reference; padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from vlm_parts import SIZES, frames_of, rows_of, small_backbone, small_language

from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.rows import Packing, TextRows

Build = Callable[..., FoveatedVLM]
# videos of 4, 1 and 3 frames, a text without frames, two questions about the first video
COUNTS = [4, 1, 0, 3]
MIXED = [(0, 9, 4), (1, 6, 3), (2, 7, 0), (3, 8, 2), (0, 7, 5)]
PUBLISHED = {"published_projections": True}
VISUAL_FIRST = [(video, length, 0) for video, length, _ in MIXED]


@pytest.mark.parametrize("variant", list(SIZES))
def test_a_query_that_starts_as_the_cls_token_gives_dinos_own_cls_output(build: Build, variant: str) -> None:
    network = build(variant)
    images = frames_of([3], SIZES[variant])[0]
    with torch.no_grad():
        found = network.query_frames(network.backbone.cls_input().expand(3, -1, -1), network.encode(images))[:, 0]
        torch.testing.assert_close(found, network.backbone(images).cls, atol=2e-6, rtol=1e-5)


def test_keys_and_values_alone_are_those_of_the_whole_forward() -> None:
    for variant, size in SIZES.items():
        torch.manual_seed(0)
        backbone = small_backbone(variant).eval()
        images = frames_of([2], size)[0]
        with torch.no_grad():
            whole, alone = backbone.forward_with_kv(images)[1], backbone.keys_and_values(images)
        assert len(whole) == len(alone) == 3
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(b.key, a.key, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(b.value, a.value, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def reference(network: FoveatedVLM, frames: Tensor, ids: Tensor, at: int, mode: str) -> tuple[Tensor, Tensor]:
    """Compute one row without caches, batches or shortcuts: hidden states [T, C] and z [F, D]."""
    backbone, language = network.backbone, network.language

    def look(frame: Tensor, query: Tensor) -> Tensor:
        _, kv = backbone.forward_with_kv(frame[None])
        if network.query_input is None or network.embedding_output is None:
            return backbone.query(query.view(1, 1, -1), kv[network.first_block :], network.first_block)[0, 0]
        entering = torch.nn.functional.linear(
            query.view(1, 1, -1), network.query_input.weight, network.query_input.bias
        )
        z = backbone.query(entering, kv[network.first_block :], network.first_block)[0, 0]
        return network.embedding_output.weight @ z + network.embedding_output.bias

    def read(seen: list[Tensor], text_after: bool) -> Tensor:
        parts = [language.embed(ids[:at])]
        parts += [network.connector(z)[None] for z in seen]
        parts += [language.embed(ids[at:])] if text_after else []
        row = torch.cat(parts)
        return language(row[None])[0] if len(row) else row

    coarse = [look(frame, network.static_query) for frame in frames]
    fine: list[Tensor] = []
    for number, frame in enumerate(frames):
        past = {"coarse_only": coarse, "coarse_fine": coarse, "autoregressive": fine}[mode][:number]
        if network.query_source == "coarse":
            past = coarse[:number]
        before = read(past, text_after=False)
        fine.append(look(frame, network.query_projection(before[-1]) if len(before) else network.first_query))
    seen = coarse if mode == "coarse_only" else fine
    return read(seen, text_after=True), torch.stack(seen)


@pytest.mark.parametrize("texts", [MIXED, VISUAL_FIRST], ids=["question_first", "visual_first"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"query_source": "coarse"}, {"deep_query": False}, PUBLISHED], ids=str)
@pytest.mark.quick_sets(12)
def test_a_batch_gives_what_each_row_gives_alone_by_the_book(
    build: Build, texts: list[tuple[int, int, int]], mode: str, options: dict[str, object]
) -> None:
    network = build(**options)
    frames, rows = frames_of(COUNTS), rows_of(texts, COUNTS, width=12)
    with torch.no_grad():
        output = network(frames, rows, mode)
    for number, (video, length, at) in enumerate(texts):
        own = frames[video, : COUNTS[video]]
        if not len(own):
            continue
        hidden, _ = reference(network, own, rows.input_ids[number, :length], at, mode)
        assert output.layout.valid[number].sum() == len(hidden)
        torch.testing.assert_close(output.hidden[number, : len(hidden)], hidden, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(build: Build, mode: str) -> None:
    network = build()
    for texts in (MIXED, VISUAL_FIRST):
        frames, rows = frames_of(COUNTS, longest=6), rows_of(texts, COUNTS, width=15)
        with torch.no_grad():
            together = network(frames, rows, mode)
        for number, (video, length, at) in enumerate(texts):
            count = COUNTS[video]
            alone = TextRows(rows.input_ids[number : number + 1, :length], [length], [at], [0], [count])
            with torch.no_grad():
                single = network(frames[video : video + 1, :count], alone, mode)
            whole = count + length
            assert single.hidden.shape[1] == whole
            torch.testing.assert_close(together.hidden[number, :whole], single.hidden[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("texts", [[(0, 7, 0), (1, 4, 0)], [(0, 7, 0), (1, 4, 0), (2, 5, 2)]], ids=["alone", "mixed"])
def test_text_without_frames_is_the_plain_language_model(
    build: Build, mode: str, texts: list[tuple[int, int, int]]
) -> None:
    network = build()
    counts = [0, 0, 2][: len(texts)]
    rows = rows_of(texts, counts)
    frames = frames_of(counts) if len(texts) == 3 else torch.zeros(2, 0, 3, 0, 0)
    with torch.no_grad():
        output = network(frames, rows, mode)
        for number, length in ((0, 7), (1, 4)):
            ids = rows.input_ids[number : number + 1, :length]
            plain = network.language.model(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(output.hidden[number, :length], plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
def test_gradients_reach_everything_also_in_a_batch_of_text_alone(build: Build, options: dict[str, bool]) -> None:
    for texts, counts, mode in (
        ([(0, 7, 0)], [0], "coarse_fine"),
        ([(0, 7, 2)], [3], "coarse_only"),
        ([(0, 7, 2)], [3], "coarse_fine"),
        ([(0, 7, 0)], [1], "coarse_fine"),
    ):
        network = build(**options).train()
        frames = frames_of(counts) if counts[0] else torch.zeros(1, 0, 3, 0, 0)
        network(frames, rows_of(texts, counts), mode).hidden.sum().backward()
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_enough_refinement_reaches_the_autoregressive_pass(build: Build) -> None:
    """Each pass makes one more frame exact, because a query depends on earlier frames only."""
    network = build()
    frames, rows = frames_of([4]), rows_of([(0, 6, 3)], [4])
    with torch.no_grad():
        exact = network(frames, rows, "autoregressive").hidden
        errors = [float((network(frames, rows, "coarse_fine", n).hidden - exact).abs().max()) for n in range(4)]
    assert errors[3] < 2e-5
    assert errors[0] > 1e-3
    with pytest.raises(ValueError, match="no effect"):
        network(frames, rows, "autoregressive", 1)


def test_with_the_coarse_source_there_is_no_gap_by_construction(build: Build) -> None:
    frames, rows = frames_of([5, 2]), rows_of([(0, 6, 3), (1, 4, 1)], [5, 2])
    for source, same in (("coarse", True), ("fine", False)):
        network = build(query_source=source)
        with torch.no_grad():
            parallel = network(frames, rows, "coarse_fine")
            ordered = network(frames, rows, "autoregressive")
        gap = (parallel.hidden - ordered.hidden)[parallel.layout.valid].abs().max()
        assert (gap < 2e-5) == same


def test_the_question_reaches_the_queries_only_when_it_stands_before_the_frames(build: Build) -> None:
    network = build()
    frames = frames_of([3])
    for at, same in ((0, True), (4, False)):
        queries = [
            network(frames, rows_of([(0, 6, at)], [3], seed=seed), "coarse_fine").passes.queries for seed in (2, 3)
        ]
        assert torch.equal(queries[0], queries[1]) == same


def test_the_same_tokens_are_predicted_in_every_mode_and_the_first_one_too(build: Build) -> None:
    network = build()
    frames, rows = frames_of(COUNTS), rows_of(VISUAL_FIRST, COUNTS, width=12)
    mask = torch.arange(12)[None] < torch.tensor(rows.lengths)[:, None]
    masks = []
    with torch.no_grad():
        for mode in MODES:
            hidden, predicted = network(frames, rows, mode).predicting(mask)
            assert len(hidden) == len(predicted[0])
            masks.append(torch.zeros_like(mask).index_put(predicted, torch.tensor(True)))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    # the last visual token predicts the first text token; without frames nothing does
    assert masks[0][:, 0].tolist() == [True, True, False, True, True]
    assert masks[0].sum() == mask.sum() - 1


def test_the_hidden_state_that_predicts_a_token_is_the_one_before_it(build: Build) -> None:
    network = build()
    frames, rows = frames_of([2]), rows_of([(0, 5, 2)], [2])
    with torch.no_grad():
        output = network(frames, rows, "coarse_only")
    hidden, (row, token) = output.predicting(torch.ones(1, 5, dtype=torch.bool))
    assert row.tolist() == [0, 0, 0, 0]
    assert token.tolist() == [1, 2, 3, 4]
    # positions: text 0, text 1, frame 0, frame 1, text 2, ...
    torch.testing.assert_close(hidden, output.hidden[0, [0, 3, 4, 5]])


def test_attention_of_the_chosen_queries_belongs_to_their_streams(build: Build) -> None:
    network = build("tiny")
    counts, texts = [2, 3], [(1, 5, 2), (0, 4, 3), (1, 4, 1)]
    frames, rows = frames_of(counts, 32), rows_of(texts, counts)
    with torch.no_grad():
        output = network(frames, rows, "coarse_fine")
    maps = network.attention(output.passes, rows.streams)
    assert maps.shape == (3, 3, 3, 2, 5 + 4)  # streams, frames, blocks, heads, prefix and patches
    torch.testing.assert_close(maps.sum(-1)[0], torch.ones(3, 3, 2))
    assert not maps[1, 2].any()  # the second stream's video has two frames
    single = TextRows(rows.input_ids[2:, :4], [4], [1], [0], [3])
    with torch.no_grad():
        alone = network(frames[1:], single, "coarse_fine")
    torch.testing.assert_close(network.attention(alone.passes, single.streams)[0], maps[2], atol=1e-5, rtol=1e-4)


def test_unknown_modes_and_sources_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="choose one of coarse_only"):
        build()(frames_of([1]), rows_of([(0, 3, 1)], [1]), "fine")
    with pytest.raises(ValueError, match="fine or coarse"):
        build(query_source="both")
    with pytest.raises(ValueError, match=r"frame_numbers=-1: 0 for none"):
        build(frame_numbers=-1)
    for name in ("query_std", "projection_std"):
        with pytest.raises(ValueError, match=rf"{name}=-1: a standard deviation, above 0"):
            build(**{name: -1})


def test_the_projection_of_queries_has_a_scale_of_its_own(build: Build) -> None:
    """projection_std changes the scale of the projection alone; without it, the projection is bit-identical to
    before."""
    plain, small, apart = build(), build(query_std=0.02), build(query_std=0.02, projection_std=1.0)
    assert torch.equal(apart.query_projection.weight, plain.query_projection.weight)
    assert torch.equal(apart.static_query, small.static_query)
    assert torch.equal(small.query_projection.weight, build(projection_std=0.02).query_projection.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_the_published_model_has_two_maps_on_either_side_of_the_encoder(build: Build, bias: bool) -> None:
    """The places, biases and initial values of the maps are those of github.com/spsanps/nanoSmol,
    fVLM/release/model."""
    network, plain = build(published_projections=True, query_bias=bias), build()
    assert network.query_input is not None
    assert network.embedding_output is not None
    assert network.query_projection.bias is not None
    assert (network.query_input.bias is not None) == bias
    for linear in (network.query_projection, network.query_input, network.embedding_output, network.connector.linear):
        bound = linear.in_features**-0.5  # the bound of torch's default initialisation
        assert 0.9 * bound < linear.weight.abs().max() <= bound
    assert torch.equal(network.static_query, plain.static_query), "the learned queries are as large as before"
    added = network.state_dict().keys() - plain.state_dict().keys()
    maps = {"query_input.weight", "embedding_output.weight", "embedding_output.bias", "query_projection.bias"}
    assert added == maps | ({"query_input.bias"} if bias else set())
    for wrong in ({"query_start": "cls"}, {"projection_std": 0.1}):
        with pytest.raises(ValueError, match=r"published_projections=true needs query_start=random and projection_std"):
            build(published_projections=True, **wrong)


@pytest.mark.parametrize("mode", MODES)
def test_every_query_enters_through_the_published_map(build: Build, mode: str) -> None:
    """The bias of the map acts on all queries alike (published claim A3); without a bias, a map of zero removes all
    differences between queries."""
    network = build(published_projections=True)
    frames, rows = frames_of(COUNTS), rows_of(MIXED, COUNTS, width=12)
    with torch.no_grad():
        network.query_input.weight.zero_()
        zero = network(frames, rows, mode)
        network.static_query.normal_()
        network.first_query.normal_()
        network.query_projection.weight.normal_()
        torch.testing.assert_close(network(frames, rows, mode).hidden, zero.hidden, atol=0, rtol=0)


def test_rows_that_do_not_fit_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="inside each row"):
        rows_of([(0, 3, 4)], [1])
    with pytest.raises(ValueError, match="video indices"):
        rows_of([(1, 3, 1)], [1])
    with pytest.raises(ValueError, match="context=128"):
        build()(frames_of([4]), rows_of([(0, 126, 1)], [4]), "coarse_only")
    with pytest.raises(ValueError, match=r"a row has 130 positions and .*context=128"):
        build(pack_rows=True)(frames_of([4]), rows_of([(0, 126, 1), (0, 3, 1)], [4]), "coarse_only")


SEVERAL = [(0, 9, 4), (0, 3, 2), (1, 5, 0), (2, 12, 6), (1, 2, 1)]
LONG = [
    (0, 70, 4),
    (0, 57, 2),
    (2, 60, 6),
    (1, 54, 1),
    (2, 55, 3),
    (2, 50, 1),
]  # packed into bins longer than the context of 128


@pytest.mark.parametrize("texts", [SEVERAL, LONG], ids=["short", "long"])
@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
def test_packed_rows_give_what_padded_ones_do(
    build: Callable[..., FoveatedVLM], mode: str, texts: list[tuple[int, int, int]]
) -> None:
    """Rows of very different lengths, some of text alone; gradients are the same too."""
    counts = [3, 1, 0]
    frames, rows = frames_of(counts), rows_of(texts, counts)
    found = []
    for pack in (False, True):
        network = build(pack_rows=pack)
        output = network(frames, rows, mode)
        real = output.hidden[output.layout.valid]
        real.square().sum().backward()
        found.append((real.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for padded, packed in zip(found[0][1], found[1][1], strict=True):
        largest = max(1.0, float(padded.abs().max()))
        torch.testing.assert_close(padded / largest, packed / largest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("order", ["question_first", "visual_first"])
@pytest.mark.parametrize(("mode", "refinement"), [("coarse_only", 0), ("coarse_fine", 0), ("coarse_fine", 2)])
def test_counted_positions_are_those_that_the_language_model_computes(
    build: Build, mode: str, refinement: int, order: str, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the pass that predicts queries was left out of the padding that is reported."""
    network = build(pack_rows=pack)
    computed: list[int] = []
    run = network.language._run

    def watched(embeddings: Tensor, *rest: object) -> Tensor:
        computed.append(embeddings.shape[:2].numel())
        return run(embeddings, *rest)

    monkeypatch.setattr(network.language, "_run", watched)
    rows = rows_of(MIXED if order == "question_first" else VISUAL_FIRST, COUNTS)
    network(frames_of(COUNTS), rows, mode, refinement)
    passes = network.query_passes(mode, refinement)
    assert len(computed) == 1 + passes == (1 if mode == "coarse_only" else 2 + refinement)
    held, total = rows.positions(packed=pack, query_passes=passes)
    assert total == sum(computed)
    # a query pass reads what stands before the frames, and all frames but the last: of each row, or of each video
    before = {"question_first": (4 + 3) + (3 + 0) + (2 + 2) + (5 + 3), "visual_first": 3 + 0 + 2}[order]
    assert held == sum(length + COUNTS[video] for video, length, _ in MIXED) + passes * before
    assert rows.padding_share(packed=pack, query_passes=passes) == pytest.approx(1 - held / total)


def test_images_with_questions_of_different_lengths_are_packed_beside_text_when_a_clock_counts_seconds(
    build: Build,
) -> None:
    """As in stage 2: an image has second 0, or no time, and a text has no frames."""
    texts = [(0, 9, 6), (0, 30, 20), (0, 5, 2), (1, 40, 8), (2, 12, 0), (1, 6, 3)]
    frames, rows = frames_of([1, 1, 0]), replace(rows_of(texts, [1, 1, 0]), seconds=[(0.0,), (), ()])
    found = []
    for pack in (False, True):
        network = build(pack_rows=pack, frame_clock="seconds", query_source="coarse", query_start="cls")
        output = network(frames, rows, "coarse_fine")
        found.append(output.hidden[output.layout.valid])
        found[-1].square().sum().backward()
        assert network.frame_clock is not None
        assert network.frame_clock.linear.weight.grad.abs().sum() > 0
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert rows.padding_share(packed=True, query_passes=1) < 0.1 < 0.4 < rows.padding_share(query_passes=1)


@pytest.mark.parametrize(("setting", "scale", "said"), [(None, 0.05, False), (0.14, 0.14, True), (0.05, 0.05, False)])
def test_a_scale_of_the_visual_tokens_that_replaces_that_of_the_weights_is_said(
    build: Build, setting: float | None, scale: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"connector.scale": torch.tensor(0.05), "other": torch.ones(2)}
    started = build(visual_scale=setting).with_own_scale(weights)
    assert started["connector.scale"].item() == pytest.approx(scale)
    assert started["other"] is weights["other"]
    replaced = "model.network.visual_scale=0.14 replaces 0.05, the scale of the visual tokens with which the initial"
    assert [message.startswith(replaced) for message in caplog.messages] == [True] * said


def test_packing_puts_every_position_once() -> None:
    lengths = [300, 20, 250, 30, 33, 1]  # bins are as long as the longest row
    packing = Packing.of(lengths, 310)
    assert packing.source.shape == (3, 300)
    rows, positions = packing.rows[packing.rows >= 0], packing.positions[packing.rows >= 0]
    assert sorted(zip(rows.tolist(), positions.tolist(), strict=True)) == [
        (row, at) for row, length in enumerate(lengths) for at in range(length)
    ]
    values = torch.randn(6, 310, 2)
    back = packing.unpack(packing.pack(values))
    for row, length in enumerate(lengths):
        assert torch.equal(back[row, :length], values[row, :length])
    assert Packing.of([7, 2, 5], 9).source.shape == (2, 7)
    assert Packing.of([73, 60, 60, 55, 55, 50], 73).source.shape == (3, 133)  # no two rows fit into a bin of 73
    assert Packing.of([100, 70, 60, 60, 50], 100).source.shape == (2, 170)  # five bins of 100 would take more
    assert Packing.of([100] * 5, 100).source.shape == (5, 100)  # two and a half bins of 200 would take more
    assert Packing.of([], 0).source.shape == (0, 0)


def test_the_longest_text_and_the_longest_video_may_belong_to_different_rows() -> None:
    torch.manual_seed(0)
    network = FoveatedVLM(small_backbone(), small_language(context=16)).eval()
    counts, texts = [2, 9], [(0, 14, 12), (1, 4, 2)]  # rows of 16 and 13 positions; 14 + 9 would be too many
    frames, rows = frames_of(counts), rows_of(texts, counts)
    with torch.no_grad():
        together = network(frames, rows, "autoregressive")
        for number, (video, length, at) in enumerate(texts):
            alone = TextRows(rows.input_ids[number : number + 1, :length], [length], [at], [0], [counts[video]])
            single = network(frames[video : video + 1, : counts[video]], alone, "autoregressive")
            whole = counts[video] + length
            torch.testing.assert_close(together.hidden[number, :whole], single.hidden[0], atol=2e-5, rtol=1e-4)
