"""The benchmark cases on a small network: their results, and that measuring a frame leaves its cache unchanged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vlm_parts import small_backbone, small_language

import keygrip.bench  # noqa: F401  (registers its schema)
from keygrip.benchmarks import foveated_vlm, measuring
from keygrip.benchmarks.foveated_vlm import (
    VLMDecode,
    VLMMemory,
    VLMStep,
    VLMStream,
    VLMTokens,
    _Encoding,
    _Frame,
    _gflop,
    _Push,
    _Step,
    fullest,
)
from keygrip.benchmarks.measuring import peak_extra_bytes
from keygrip.config import compose
from keygrip.data.shards.budget import Budget
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows

LIMITS = {"threads": 1, "repetitions": 3, "quick_repetitions": 1, "limit_s": 5.0, "quick_limit_s": 1.0}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FoveatedVLM:
    torch.manual_seed(0)
    made = FoveatedVLM(small_backbone(), small_language())
    monkeypatch.setattr(foveated_vlm, "_network", lambda overrides: (made, torch.device("cpu")))
    return made


def test_cases_at_the_published_sizes_need_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are downloaded for a time that does not depend on them."""
    built: list[Any] = []
    monkeypatch.setattr(measuring, "build_module", built.append)
    cases = [case for case in compose("bench", []).cases.values() if "foveated_vlm" in case._target_]
    overrides = [list(case.overrides) for case in cases if "overrides" in case]
    assert len(overrides) == 4
    for each in overrides:
        with pytest.raises(ValueError, match="NoneType"):  # because the module is not built
            foveated_vlm._network(each)
    for config in built:
        network = config["model"]["network"]
        assert (network["language"]["weights"], network["backbone"]["weights"]) == ("random", "random")
        assert (network["language"]["layers"], network["backbone"]["variant"]) == (30, "dinov2_vits14")


@pytest.mark.parametrize("numbers", [{"frame_clock": "seconds"}, {"frame_clock": True}, {"frame_numbers": 8}])
def test_memory_of_a_network_that_numbers_frames_is_counted_without_weights(numbers: dict[str, Any]) -> None:
    with torch.device("meta"):
        counted = FoveatedVLM(small_backbone(), small_language(), **numbers)
    built = FoveatedVLM(small_backbone(), small_language(), **numbers)
    assert all(parameter.is_meta for parameter in counted.parameters())
    assert [(n, p.shape) for n, p in counted.named_parameters()] == [(n, p.shape) for n, p in built.named_parameters()]


def test_peak_of_a_step_has_the_gradients(network: FoveatedVLM) -> None:
    """The weights take more memory than anything else in the step."""
    images = torch.randn(1, 1, 3, network.backbone.image_size, network.backbone.image_size)
    step = _Step(network, images, TextRows(torch.tensor([[3, 4]]), [2], [0], [0], [1]), "coarse_fine")
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert peak_extra_bytes(step, torch.device("cpu")) >= 4 * trained


def test_operations_of_the_encoder_are_counted_by_frame(network: FoveatedVLM) -> None:
    size = network.backbone.image_size
    encoder, step = [], []
    for frames in (2, 4):
        images = torch.randn(1, frames, 3, size, size)
        rows = TextRows(torch.tensor([[3, 4, 5]]), [3], [0], [0], [frames])
        encoder.append(_gflop(_Encoding(network, images)))
        step.append(_gflop(_Step(network, images, rows, "coarse_fine")))
    assert encoder[1] == pytest.approx(2 * encoder[0], rel=1e-3)
    assert 0 < encoder[0] < step[0]
    assert step[1] - step[0] > encoder[1] - encoder[0]
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_figures_of_a_step_and_of_a_frame() -> None:
    case = VLMStep(
        [],
        frames=3,
        text_tokens=8,
        videos=2,
        questions=2,
        memory_frames=[8, 1],
        quick_image_size=32,
        quick_layers=1,
        **LIMITS,
    )
    step = case.run(quick=False)
    assert {"step_ms", "fine_over_coarse_time", "peak_mb", "question_first_fine_over_coarse_time"} <= step.keys()
    assert 0 < step["encoder_gflop"] < step["step_gflop"]
    assert step["peak_8_frames_mb"] > step["peak_1_frames_mb"] > 0
    decode = VLMDecode([], prompt_tokens=4, **LIMITS).run(quick=True)
    assert decode.keys() == {"ms_per_frame_8", "ms_per_frame_64", "frame_64_over_frame_8_time"}
    assert all(value > 0 for value in decode.values())


@pytest.mark.usefixtures("network")
def test_many_tokens_are_read_in_their_number(network: FoveatedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    read = network.language.forward
    monkeypatch.setattr(network.language, "forward", lambda row: (lengths.append(row.shape[1]), read(row))[1])
    figures = VLMTokens([], text_tokens=6, frames=[1, 3, 5], tokens=[1, 2, 4], **LIMITS).run(quick=False)
    assert {
        "frames_5_tokens_4_ms",
        "frames_1_tokens_1_ms",
        "tokens_4_over_1_time",
        "tokens_2_over_1_time",
    } <= figures.keys()
    assert set(lengths) == {6 + frames * tokens for frames in (1, 3, 5) for tokens in (1, 2, 4)}
    quick = VLMTokens([], text_tokens=6, frames=[1, 3, 5], tokens=[1, 2, 4], **LIMITS).run(quick=True)
    assert {name for name in quick if name.endswith("_ms")} == {
        f"frames_{frames}_tokens_{tokens}_ms" for frames in (1, 3) for tokens in (1, 2)
    }


def test_a_measured_frame_is_one_more_and_leaves_its_cache_as_it_was(network: FoveatedVLM) -> None:
    network.eval()
    with torch.inference_mode():
        frame = _Frame(network, network.encode(torch.randn(1, 3, 28, 28)), 5, torch.device("cpu"))
        lengths = []
        extend = network.language.extend
        network.language.extend = lambda *a: (extend(*a), lengths.append(frame.cache.length))[0]  # type: ignore[method-assign]
        frame()
        frame()
    assert lengths == [6, 6]
    assert frame.cache.length == frame.cache.layers.get_seq_length() == 5


def test_a_measured_push_is_one_frame_more_and_leaves_the_stream_as_it_was(network: FoveatedVLM) -> None:
    network.eval()
    push = _Push(network, 4, 8, torch.device("cpu"))
    seen: list[int] = []
    extend = network.language.extend
    network.language.extend = lambda *a: (extend(*a), seen.append(push.session.mark().readers[0][0]))[0]  # type: ignore[method-assign]
    before = push.session.mark()
    push()
    push()
    assert seen == [12, 12]
    assert push.session.mark().frames == before.frames == 7
    assert push.session.mark().readers[0][0] == 11
    figures = VLMStream([], prompt_tokens=4, frames=[8, 64], **LIMITS).run(quick=True)
    assert figures.keys() == {
        "push_ms_8",
        "push_ms_64",
        "push_extra_mb_8",
        "push_extra_mb_64",
        "frame_64_over_8_time",
    }
    assert all(value > 0 for value in figures.values())


def test_the_fullest_batches_of_a_budget() -> None:
    """With the stages' budget, batches reach both limits from 16 frames, with less text, to 22, with nearly the longest
    text."""
    budget = Budget(1024, 24576)
    assert fullest(budget, 64, 0, 0, 512) == (64, 384)
    assert fullest(budget, 64, 16, 16, 512) == (64, 368)
    assert fullest(budget, 64, 22, 22, 512) == (46, 512)
    assert fullest(budget, 64, 64, 64, 512) == (16, 512)
    assert fullest(budget, 64, 16, 16 * 16, 512) == (64, 128)  # the baseline with 16 tokens per frame
    assert fullest(budget, 64, 16, 64 * 16, 512) == (16, 512)  # and with 64
    for frames in range(65):
        videos, text = fullest(budget, 64, frames, frames, 512)
        assert videos * frames <= 1024
        assert videos * (frames + text) <= 24576


@pytest.mark.slow
def test_memory_of_a_recipe_at_its_budgets_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model with the recipe's own configuration; accumulated gradients take memory from the start of the
    step."""
    monkeypatch.setattr(foveated_vlm, "GIB", 1)  # so that memory is in bytes
    small = ["language=tiny", "backbone=tiny", "backbone.image_size=32", "data.batch_size=4", "collator.max_tokens=16"]
    budget = ["data.budget.frames=8", "data.budget.positions=200"]
    stage1 = ["experiment=vlm_stage1", *small, *budget]
    recipes = {"stage1": stage1, "accumulated": [*stage1, "accumulate_grad_batches=2"]}
    figures = VLMMemory(recipes, [0, 2, 8], [2], ema=True).run(quick=False)
    assert figures["stage1_worst_gib"] >= figures["stage1_weights_gib"] > 0
    assert {"stage1_0_frames_gib", "stage1_2_frames_gib", "stage1_8_frames_gib"} <= figures.keys()
    assert figures["accumulated_2_frames_gib"] > figures["stage1_2_frames_gib"]
    assert figures["accumulated_weights_gib"] == figures["stage1_weights_gib"]
    assert figures["measured"] == float(torch.cuda.is_available())


def test_a_recipe_without_a_measured_length_has_no_figures_of_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = SimpleNamespace(
        network=SimpleNamespace(tokens_per_frame=1),
        step_memory=lambda *_: SimpleNamespace(total=4, weights=1, optimizer=1, ema=1, measured=False),
    )

    def settings(overrides: list[str]) -> tuple[Any, dict[str, Any], int, bool]:
        budget = {"frames": 1024, "positions": 24576}
        return module, {"budget": budget, "max_frames": int(overrides[0]), "batch_size": 4}, 16, False

    monkeypatch.setattr(foveated_vlm, "GIB", 1)
    monkeypatch.setattr(foveated_vlm, "_module_and_settings", settings)
    monkeypatch.setattr(foveated_vlm, "_full_batch", lambda *_: None)
    for first in ({}, {"long": ["64"]}):
        figures = VLMMemory({**first, "short": ["32"]}, [64], [64], ema=True).run(quick=False)
        assert not [name for name in figures if name.startswith("short")]
        assert bool(figures) == bool(first)
        assert "short is left out: its videos have at most 32 frames" in caplog.text
