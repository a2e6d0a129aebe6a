"""A frozen encoder: caching of its frame features, and a query path with its own weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlm_parts import frames_of, rows_of, small_backbone, small_language, small_module

from keygrip.data.batches import Conversation, Turn, VideoTextSample
from keygrip.models.backbone import DinoBackbone
from keygrip.models.foveated_vlm.baseline import PooledVLM
from keygrip.models.foveated_vlm.frame_cache import FrameCache, frame_names
from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.models.nn.processor_attention import trained_on

COUNTS = [3, 0, 1]
TEXTS = [(0, 9, 4), (1, 6, 3), (2, 7, 2), (0, 8, 5)]


def frozen() -> DinoBackbone:
    backbone = small_backbone("tiny")
    backbone._set_trainable("frozen")
    return backbone


def with_path(path: str, **options: object) -> FoveatedVLM:
    torch.manual_seed(0)
    return FoveatedVLM(frozen(), small_language(), query_path=path, **options)  # type: ignore[arg-type]


def test_kept_keys_give_what_fresh_ones_do() -> None:
    network = with_path("shared").eval()
    frames, rows = frames_of(COUNTS, 32), rows_of(TEXTS, COUNTS)
    real = torch.cat([video[:count] for video, count in zip(frames, COUNTS, strict=True)])
    cache, calls = FrameCache(1.0), 0

    def encode(images: torch.Tensor) -> list:
        nonlocal calls
        calls += 1
        return network.encode(images)

    with torch.no_grad():
        fresh = network(frames, rows, "coarse_fine")
        for _ in range(2):
            kv = cache.get([b"a", b"b", b"c", b"d"], real, encode)
            kept = network(frames, rows, "coarse_fine", kv=kv)
            torch.testing.assert_close(kept.hidden, fresh.hidden, atol=2e-5, rtol=1e-4)
    assert calls == 4  # each frame is encoded once


def test_kept_pooled_patches_give_what_fresh_ones_do() -> None:
    torch.manual_seed(0)
    network = PooledVLM(frozen(), small_language(), 4).eval()
    frames, rows = frames_of(COUNTS, 32), rows_of(TEXTS, COUNTS)
    real = torch.cat([video[:count] for video, count in zip(frames, COUNTS, strict=True)])
    cache = FrameCache(1.0)
    with torch.no_grad():
        fresh = network(frames, rows, "many_tokens").hidden
        for encode in (network.encode, None):  # the second time, everything comes from the cache
            kv = cache.get([b"a", b"b", b"c", b"d"], real, encode)  # type: ignore[arg-type]
            kept = network(torch.full_like(frames, torch.nan), rows, "many_tokens", kv=kv).hidden
            torch.testing.assert_close(kept, fresh, atol=2e-5, rtol=1e-4)
    assert sum(kept.nbytes for kept in cache.kept.values()) == 4 * 4 * network.backbone.embed_dim * 4  # float32


def test_a_frame_has_one_name_wherever_it_comes(tmp_path: Path) -> None:
    """The name of a frame is the same in clips and whole videos, under any key and with any padding; frames of a video
    without a question have names too."""
    collator = small_module(tmp_path, ["Which digit?"] * 3).collator
    shades = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 28, 28, 3))
    asked, unasked = ((Turn("user", "?"), Turn("assistant", "x")), (Turn("assistant", "x"),))

    def sample(first: int, last: int, key: str = "0000", turns: tuple[Turn, ...] = asked) -> Any:
        return VideoTextSample(shades[first:last], (Conversation(turns, "mark", {}),), "set", key)

    names = frame_names(collator([sample(0, 5), sample(2, 4), sample(1, 2, "1"), sample(4, 5, turns=unasked)]))
    assert len(names) == 5 + 2 + 1 + 1
    assert len(set(names[:5])) == 5
    assert names[5:] == [names[2], names[3], names[1], names[4]]


def test_what_is_kept_does_not_depend_on_the_batch() -> None:
    network, frames = with_path("shared").eval(), frames_of([2, 2, 2], 32).flatten(0, 1)
    first, second = FrameCache(1.0), FrameCache(1.0)
    names = [b"a", b"b", b"c", b"d", b"e", b"f"]
    one = first.get(names, frames, network.encode)
    order = [4, 5, 0, 1]
    other = second.get([names[place] for place in order], frames[order], network.encode)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.key[order], b.key)
        assert torch.equal(a.value[order], b.value)


def test_what_is_kept_in_training_is_what_validation_would_keep(tmp_path: Path) -> None:
    """On a CPU, bf16 training uses a different attention, which the frozen encoder does not use."""
    module, kept = small_module(tmp_path, ["Which digit?"] * 3), []
    frames = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3)).astype(np.uint8)
    turns = (Turn("user", "?"), Turn("assistant", "x"))
    batch = module.collator([VideoTextSample(frames, (Conversation(turns, "mark", {}),), "set", "a")])
    for context in (trained_on, lambda device: contextlib.nullcontext()):
        module.frame_cache = FrameCache(1.0)
        with torch.autocast("cpu", torch.bfloat16), context(torch.device("cpu")):
            module.encoder_inputs(batch, text_rows(batch))
        kept.append(module.frame_cache.kept)
    for name, blocks in kept[0].items():
        for one, other in zip(blocks, kept[1][name], strict=True):
            assert torch.equal(one.key, other.key)
            assert torch.equal(one.value, other.value)


def test_there_is_no_more_kept_than_allowed() -> None:
    network, frames = with_path("shared").eval(), frames_of([1, 1], 32)[:, 0]
    size = sum(block.key.nbytes + block.value.nbytes for block in network.encode(frames[:1]))
    cache = FrameCache(1.5 * size / 2**30)
    cache.get([b"a", b"b"], frames, network.encode)
    assert list(cache.kept) == [b"a"]
    held = sum(part.untyped_storage().nbytes() for block in cache.kept[b"a"] for part in (block.key, block.value))
    assert held == size  # not a view of a larger tensor


def test_training_goes_on_where_validation_kept_frames() -> None:
    """Lightning validates in inference mode, whose tensors cannot be written or used for training outside of it."""
    network, frames, rows = with_path("own"), frames_of([1, 1], 32), rows_of([(0, 9, 4), (1, 6, 3)], [1, 1])
    cache, fresh = FrameCache(1.0), network.encode(frames[:, 0])
    with torch.inference_mode():
        cache.get([b"a"], frames[:1, 0], network.encode)
    kv = cache.get([b"a", b"b"], frames[:, 0], network.encode)
    assert len({part.untyped_storage().data_ptr() for part in (cache.kept[b"a"][0].key, cache.kept[b"b"][0].key)}) == 1
    for kept, block in zip(kv, fresh, strict=True):
        torch.testing.assert_close(kept.key, block.key)
        torch.testing.assert_close(kept.value, block.value)
    network(frames, rows, "coarse_fine", kv=kv).hidden.square().sum().backward()
    assert network.static_query.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_path_of_its_own_begins_as_the_encoder(mode: str) -> None:
    frames, rows = frames_of(COUNTS, 32), rows_of(TEXTS, COUNTS)
    with torch.no_grad():
        shared, own = (with_path(path).eval()(frames, rows, mode).hidden for path in ("shared", "own"))
    torch.testing.assert_close(own, shared)


def test_a_path_of_its_own_learns_and_the_encoder_does_not() -> None:
    network = with_path("own")
    frames, rows = frames_of(COUNTS, 32), rows_of(TEXTS, COUNTS)
    network(frames, rows, "coarse_fine").hidden.square().sum().backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert network.query_path is not None
    learning = {name for name, p in network.query_path.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("net.blocks.0.mlp") for name in learning)
    assert not any(name.startswith("net.patch_embed") for name in learning)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["coarse", "fine"])
@pytest.mark.parametrize("counts", [COUNTS, [1, 1]])
def test_every_trained_parameter_has_a_gradient(mode: str, source: str, counts: list[int]) -> None:
    """Else processes would wait for each other (DDP)."""
    network = with_path("own", query_source=source).train()
    texts = [(number, 6, 2) for number in range(len(counts))]
    network(frames_of(counts, 32), rows_of(texts, counts), mode).hidden.square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_bad_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="is shared or own, not 'both'"):
        with_path("both")
    with pytest.raises(ValueError, match="is for a frozen encoder"):
        FoveatedVLM(small_backbone("tiny"), small_language(), query_path="own")


@pytest.mark.parametrize("mode", MODES)
def test_numbered_frames_are_the_same_alone_in_a_batch_and_in_order(mode: str) -> None:
    """Each visual token is read with the vector of its frame number, in whichever order a mode computes its passes."""
    network = with_path("shared", frame_numbers=5).eval()
    frames, rows = frames_of(COUNTS, 32, longest=4), rows_of(TEXTS, COUNTS)
    with torch.no_grad():
        together = network(frames, rows, mode)
        alone = network(frames[:1, :3], type(rows)(rows.input_ids[:1], [9], [4], [0], [3]), mode)
    torch.testing.assert_close(together.hidden[0, :12], alone.hidden[0, :12], atol=2e-5, rtol=1e-4)
    if mode == "autoregressive":
        passes = together.passes
        assert passes is not None
        with torch.no_grad():
            chosen = network.choose_queries(passes.visual, rows.streams)
        torch.testing.assert_close(chosen[0, :3], passes.queries[0, :3], atol=2e-5, rtol=1e-4)  # type: ignore[index]


def test_more_frames_than_numbers_is_an_error(build: Callable[..., FoveatedVLM]) -> None:
    network = build(frame_numbers=2)
    with pytest.raises(ValueError, match=r"a video has 3 frames and model\.network\.frame_numbers=2"):
        network(frames_of([3]), rows_of([(0, 6, 2)], [3]), "coarse_only")


def test_the_coarse_pass_may_begin_with_the_encoders_cls_token() -> None:
    network = with_path("own", query_start="cls")
    images = frames_of([2], 32)[0]
    with torch.no_grad():
        coarse = network.eval().query_frames(network.static_query.expand(2, -1, -1), network.encode(images))[:, 0]
        torch.testing.assert_close(coarse, network.backbone.eval()(images).cls, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="is random or cls, not 'zero'"):
        with_path("shared", query_start="zero")
