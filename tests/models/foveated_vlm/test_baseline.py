"""The pooled baseline: which visual tokens a row attends to, padding, text alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vlm_parts import frames_of, rows_of, small_backbone, small_language

from keygrip import generate
from keygrip.config import compose
from keygrip.models.foveated_vlm.baseline import PooledVLM
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.training import checkpoints
from keygrip.training.checkpoints import FORMAT, HEADER
from keygrip.training.optimizers import AdamW
from keygrip.training.saving import AtomicCheckpointIO


def build(tokens: int = 4) -> PooledVLM:
    torch.manual_seed(0)
    return PooledVLM(small_backbone(), small_language(), tokens).eval()


def test_tokens_are_the_means_of_the_frames_quarters() -> None:
    network = build()  # 28 px with patches of 14: one visual token per patch
    frames = frames_of([2])
    with torch.no_grad():
        visual, passes, _ = network.visual_tokens(frames, rows_of([(0, 3, 1)], [2]), "many_tokens")
        patches = network.backbone(frames[0]).patches
    torch.testing.assert_close(visual[0], network.connector(patches).flatten(0, 1))
    assert passes is None


def test_rows_give_the_same_alone_and_padded_in_a_batch_and_text_the_plain_language_model() -> None:
    network, counts = build(), [3, 1, 0]
    texts = [(0, 6, 2), (1, 5, 0), (2, 4, 0), (0, 4, 4)]
    frames, rows = frames_of(counts, longest=4), rows_of(texts, counts, width=9)
    with torch.no_grad():
        together = network(frames, rows, "many_tokens")
        for number, (video, length, at) in enumerate(texts):
            count = counts[video]
            alone = TextRows(rows.input_ids[number : number + 1, :length], [length], [at], [0], [count])
            single = network(frames[video : video + 1, :count], alone, "many_tokens").hidden[0]
            assert len(single) == length + 4 * count
            torch.testing.assert_close(together.hidden[number, : len(single)], single, atol=2e-5, rtol=1e-4)
        plain = network.language.model(input_ids=rows.input_ids[2:3, :4]).last_hidden_state[0]
    torch.testing.assert_close(together.hidden[2, :4], plain, atol=1e-5, rtol=1e-4)


def test_gradients_reach_everything_also_in_a_batch_of_text_alone() -> None:
    network = build().train()
    network(torch.zeros(1, 0, 3, 0, 0), rows_of([(0, 3, 0)], [0]), "many_tokens").hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_other_modes_and_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="many_tokens only"):
        build()(frames_of([1]), rows_of([(0, 3, 1)], [1]), "coarse_fine")
    for tokens in (3, 9):
        with pytest.raises(ValueError, match="must be a square of at most 2 x 2"):
            build(tokens)


def test_health_of_queries_that_there_are_none_of_is_refused(tmp_path: Path) -> None:
    collator = ConversationCollator(TrainedTokenizer(320), "question_first", "answers")
    with pytest.raises(ValueError, match=r"monitor_every_n_steps=100: health is of queries, and a PooledVLM"):
        FoveatedVLMModule(build(), collator, AdamW(1e-3), mode="many_tokens")


def test_a_stream_is_refused_with_what_to_leave_out() -> None:
    with pytest.raises(ValueError, match="a PooledVLM answers whole videos only: leave out stream=true"):
        FoveatedVLMModule.stream(SimpleNamespace(network=build()), "?")  # type: ignore[arg-type]


def test_a_stream_is_refused_before_the_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = {"_target_": "keygrip.models.foveated_vlm.baseline.PooledVLM", "tokens_per_frame": 4}
    model = {"_target_": "keygrip.models.foveated_vlm.module.FoveatedVLMModule", "network": network}
    content = {HEADER: {"format": FORMAT, "config": {"model": model}}, "state_dict": {}, "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "pooled.ckpt")

    def build(*_: Any) -> Any:
        raise AssertionError("the model is built")

    monkeypatch.setattr(checkpoints, "build_stored", build)
    asked = [f"checkpoint={tmp_path / 'pooled.ckpt'}", "video=null", "question=Which?"]
    with pytest.raises(ValueError, match="a PooledVLM answers whole videos only: leave out stream=true"):
        generate.run(compose("generate", [*asked, "stream=true"]))
    with pytest.raises(AssertionError, match="is built"):
        generate.run(compose("generate", asked))
