"""Chunked cross-entropy, and scores per kind of question."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_ranks import logged_by, on_two_ranks
from torch.utils.data import DataLoader
from vlm_parts import small_backbone, small_language

from keygrip.data.batches import Conversation, Turn, VideoTextBatch, VideoTextSample
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.loss import token_cross_entropy
from keygrip.models.foveated_vlm.module import COARSE_MISSES, FoveatedVLMModule
from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.models.foveated_vlm.scores import Scores, comparisons
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.training.monitors import GradientNorm, gradient_norm
from keygrip.training.optimizers import AdamW


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_the_loss_nor_the_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.randint(11, (7,))
    gradients = []
    for size in (None, chunk):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if size is None:
            loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="none")
            right = (inputs[0] @ inputs[1].T).argmax(-1) == targets
        else:
            found, hits = token_cross_entropy(*inputs, targets, size)
            torch.testing.assert_close(found, loss)
            assert torch.equal(hits, right)
            loss = found
        loss.square().sum().backward()
        gradients.append([part.grad for part in inputs])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_no_token_to_predict_gives_no_loss_and_a_gradient_of_zero() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    loss, right = token_cross_entropy(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.int64))
    assert loss.shape == right.shape == (0,)
    loss.sum().backward()
    assert hidden.grad is not None


def conversation(question: str, answer: str, kind: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), kind, {})


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., tuple[FoveatedVLMModule, VideoTextBatch]]:
    """Build a module and a batch of a video with two questions, a longer video and a text."""

    def make(**options: object) -> tuple[FoveatedVLMModule, VideoTextBatch]:
        torch.manual_seed(0)
        collator = ConversationCollator(
            TrainedTokenizer(320), "question_first", str(options.pop("supervise", "answers"))
        )
        collator.prepare(tmp_path, lambda: iter(["Which digit is on the red cube?", "3", "blue"] * 3))
        network = FoveatedVLM(small_backbone(), small_language())
        module = FoveatedVLMModule(network, collator, AdamW(1e-3), **options)  # type: ignore[arg-type]
        frames = np.random.default_rng(0).integers(0, 255, (3, 28, 28, 3)).astype(np.uint8)
        samples = [
            VideoTextSample(
                frames[:2], (conversation("Which?", "3", "mark"), conversation("Blue?", "no", "cue")), "s", "0"
            ),
            VideoTextSample(frames, (conversation("Which digit is on it?", "blue", "mark"),), "s", "1"),
            VideoTextSample(frames[:0], (conversation("Say 3", "3", "text"),), "t", "2"),
        ]
        return module.eval(), collator(samples)

    return make


def test_scores_are_the_mean_over_supervised_tokens_by_kind(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    with torch.no_grad():
        output = module(batch, "coarse_fine")
        found = module.score(output, batch)
        logits = module.network.language.logits(output.hidden)
    expected, hits = [], []
    for row in range(len(batch)):
        at = output.layout.text_at[row] - 1
        places = batch.loss_mask[row].nonzero()[:, 0]
        own = logits[row, at[places]]
        expected.append(F.cross_entropy(own, batch.input_ids[row, places], reduction="sum"))
        hits.append(bool((own.argmax(-1) == batch.input_ids[row, places]).all()))
    torch.testing.assert_close(found.row_loss, torch.stack(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, torch.stack(expected).sum(), atol=1e-4, rtol=1e-4)
    assert found.tokens == batch.loss_mask.sum()
    assert found.exact.tolist() == hits
    scores = Scores()
    scores.add(found, batch.kind)
    scores.add(found, batch.kind)
    figures = scores.figures()
    mark = batch.loss_mask[[0, 2]].sum()
    assert figures["loss_mark"] == pytest.approx(float((expected[0] + expected[2]) / mark), rel=1e-4)
    assert figures["loss"] == pytest.approx(float(sum(expected) / batch.loss_mask.sum()), rel=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert {"accuracy_mark", "accuracy_cue", "accuracy_text"} <= figures.keys()


def test_a_module_with_the_fused_kernel_evaluates_on_any_machine(parts: Callable[..., tuple]) -> None:
    (fused, batch), (chunked, _) = parts(loss_kernel="liger"), parts()
    with torch.no_grad():
        found, expected = (module.score(module(batch, "coarse_fine"), batch) for module in (fused, chunked))
    assert torch.equal(found.row_loss, expected.row_loss)
    assert torch.equal(found.exact, expected.exact)


def test_processes_log_loss_and_accuracy_of_all_rows(
    parts: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process has one answer of 10 tokens, which is wrong; the other has three right ones of 30."""
    built = [parts(mode="coarse_only", refinement=0, log_images_every_n_steps=0) for _ in range(2)]

    def step(rank: int) -> dict[str, float]:
        module, batch = built[rank]
        answers = torch.ones(2 * rank + 1, dtype=torch.bool)
        scores = SimpleNamespace(
            loss=torch.tensor((10.0, 90.0)[rank]),
            tokens=torch.tensor((10, 30)[rank]),
            answered=answers,
            exact=answers & bool(rank),
        )
        module.score = lambda *_: scores
        module.due = module._is_health_due = lambda *_: False
        module.trainer = SimpleNamespace(accumulate_grad_batches=1, log_every_n_steps=1, global_step=0)
        logged = logged_by(module)
        module.training_step(batch, 0)
        return logged

    expected = {"train/loss": pytest.approx(100 / 40), "train/accuracy": pytest.approx(3 / 4)}
    assert on_two_ranks(monkeypatch, step) == [expected] * 2


def test_an_answer_is_exact_only_with_all_its_tokens_and_its_end(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    with torch.no_grad():
        output = module(batch, "coarse_only")
        # a perfect readout: hidden states are replaced by the embeddings of the next tokens
        weight = torch.eye(320)[:, :320]
        hidden = torch.zeros(*output.hidden.shape[:2], 320)
        for row in range(len(batch)):
            for place in batch.answer_mask[row].nonzero()[:, 0].tolist():
                hidden[row, output.layout.text_at[row, place] - 1, batch.input_ids[row, place]] = 9.0
        perfect = type(output)(hidden, output.layout, output.visual, output.passes)
        from keygrip.models.foveated_vlm.scores import score

        assert score(perfect, batch, weight, 4096).exact.all()
        last = batch.answer_mask[2].nonzero()[-1, 0]
        hidden[2, output.layout.text_at[2, last] - 1] = 0.0  # the end of the turn is predicted wrongly
        assert score(perfect, batch, weight, 4096).exact.tolist() == [True, True, False, True]


def test_rows_of_the_table_that_no_token_has_make_no_answer_wrong(
    parts: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation never outputs tokens of these rows."""
    module, batch = parts()
    size = module.tokenizer.size
    assert size < 320
    with torch.no_grad():
        output = module(batch, "coarse_only")
        weight = torch.cat([torch.eye(320)[:size], torch.full((320 - size, 320), 2.0)])
        hidden = torch.zeros(*output.hidden.shape[:2], 320)
        for row, place in batch.answer_mask.nonzero().tolist():
            hidden[row, output.layout.text_at[row, place] - 1, batch.input_ids[row, place]] = 9.0
        perfect = type(output)(hidden, output.layout, output.visual, output.passes)
        monkeypatch.setattr(type(module.network.language), "head_weight", property(lambda self: weight))
        scored = module.score(perfect, batch)
    assert scored.exact.all()
    assert scored.loss > 9 * int(scored.tokens)  # these rows are part of the loss, as in training


@pytest.mark.parametrize("supervise", ["all", "answers"])
def test_all_modes_are_scored_on_the_same_tokens(parts: Callable[..., tuple], supervise: str) -> None:
    module, batch = parts(supervise=supervise)
    with torch.no_grad():
        counts = {mode: module.score(module(batch, mode), batch).row_tokens.tolist() for mode in MODES}
    assert counts["coarse_only"] == counts["coarse_fine"] == counts["autoregressive"]
    if supervise == "answers":
        assert counts["coarse_only"] == batch.loss_mask.sum(1).tolist()


def test_keys_and_values_computed_once_serve_all_modes(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    frames, rows = module.inputs(batch)
    calls = []
    module.network.backbone.register_forward_hook(lambda *_: calls.append("whole"))
    original = module.network.backbone.keys_and_values
    module.network.backbone.keys_and_values = lambda images: (calls.append("kv"), original(images))[1]
    with torch.no_grad():
        first = module.network(frames, rows, "coarse_only")
        again = [module.network(frames, rows, mode, kv=first.passes.kv) for mode in MODES]
    assert calls == ["kv"]
    torch.testing.assert_close(again[0].hidden, first.hidden)


def test_comparisons_between_modes() -> None:
    figures = {
        "coarse_only": {"loss": 2.0},
        "coarse_fine": {"loss": 1.0},
        "autoregressive": {"loss": 1.25},
        "coarse_fine_refined": {"loss": 1.25},
    }
    assert comparisons(figures) == pytest.approx({"fine_over_coarse": 0.5, "gap": 0.2, "gap_refined": 0.0})
    assert comparisons({"many_tokens": {"loss": 1.0}}) == {}


def test_rows_of_a_batch(parts: Callable[..., tuple]) -> None:
    _, batch = parts()
    rows = text_rows(batch)
    assert rows.videos == [0, 0, 1, 2]
    assert rows.frame_counts == [2, 3, 0]
    assert list(rows.lengths) == batch.attention_mask.sum(1).tolist()


def test_settings_without_effect_are_refused(parts: Callable[..., tuple]) -> None:
    for options, words in (
        ({"mode": "fine"}, "has coarse_only, coarse_fine, autoregressive"),
        ({"val_modes": ["many_tokens"]}, "val_modes=many_tokens"),
        ({"mode": "coarse_only", "refinement": 2}, "no effect"),
        ({"refinement": -1}, "refinement"),
        ({"coarse_share": 1.0}, "coarse_share=1.0 must lie in 0..1"),
        ({"mode": "coarse_only", "refinement": 0, "coarse_share": 0.5}, "coarse_share=0.5 has no effect"),
        ({"loss_chunk": 0}, "loss_chunk"),
        ({"loss_kernel": "triton"}, "loss_kernel='triton': must be one of chunked, liger"),
    ):
        with pytest.raises(ValueError, match=words):
            parts(**options)


def test_dry_run_reports_every_mode(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    report = module.dry_run(batch)
    assert set(report["modes"]) == set(MODES)
    assert report["parameters"]["all"] == sum(p.numel() for p in module.network.parameters())
    assert report["modes"]["coarse_fine"]["kv_cache_mb"] > 0
    assert report["supervised_tokens"] == batch.loss_mask.sum()


@pytest.mark.slow
def test_a_steps_memory_is_counted_as_it_is(parts: Callable[..., tuple]) -> None:
    """The estimate matches torch's profile of a real step; gradient checkpointing needs less."""
    from torch.profiler import ProfilerActivity, profile

    module, batch = parts(refinement=1)
    counted = module.step_memory(batch, bf16=False, ema=False)
    module.train()
    frames, rows = module.inputs(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        frames, rows = module.inputs(batch)
        scores = module.score(module.network(frames, rows, "coarse_fine", 1), batch)
        (scores.loss / scores.tokens).backward()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    assert counted.step == pytest.approx(peak, rel=0.05)
    module.network.language.gradient_checkpointing = module.network.backbone.gradient_checkpointing = True
    assert module.step_memory(batch, bf16=False, ema=False).step < 0.8 * counted.step
    assert all(p.grad is not None for p in module.network.parameters() if p.requires_grad)


def test_the_first_videos_of_a_batch(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    first = batch.first_videos(1)
    assert len(first.frame_mask) == 1
    assert first.video_index.tolist() == [0] * int((batch.video_index == 0).sum())
    with torch.no_grad():
        own, of_all = (module.network(*module.inputs(b), "coarse_fine") for b in (first, batch))
        count = first.attention_mask.sum(1)
        for row in range(len(first)):
            at = own.layout.text_at[row, : count[row]]
            torch.testing.assert_close(
                own.hidden[row, at], of_all.hidden[row, of_all.layout.text_at[row, : count[row]]]
            )


def test_refinement_begins_with_its_share_of_the_time_where_that_comes_first(parts: Callable[..., tuple]) -> None:
    """Also in a run without a last step."""
    module, _ = parts(refinement=2, refinement_from=0.4)
    configured = AdamW(1e-3, schedule="constant").configure(module.network, math.inf)
    rates = configured["lr_scheduler"]["scheduler"]

    def drawn(share: float) -> set[int]:
        rates.take_time_share(share)
        found = set()
        for step in range(30):
            trainer = SimpleNamespace(
                global_step=step,
                estimated_stepping_batches=math.inf,
                lr_scheduler_configs=[SimpleNamespace(scheduler=rates)],
            )
            module._trainer = trainer
            found.add(module.refinement_now())
        return found

    assert drawn(0.39) == {0}
    assert drawn(0.41) == {0, 1, 2}


class Descent(FoveatedVLMModule):
    """Plain gradient descent: the update is the negative gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=1.0)


def fitted(module: FoveatedVLMModule, batches: list[VideoTextBatch], **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_share_of_the_steps_trains_the_coarse_pass_alone(parts: Callable[..., tuple]) -> None:
    quiet = {"monitor_every_n_steps": 0, "log_images_every_n_steps": 0}
    module, batch = parts(refinement=1, refinement_from=0.0, coarse_share=0.4, **quiet)
    module.__class__ = Descent
    visual_tokens, steps = module.network.visual_tokens, []

    def watched(frames: Any, rows: Any, mode: str, refinement: int = 0, kv: Any = None) -> Any:
        steps.append((mode, refinement, module.network.query_projection.weight.detach().clone()))
        return visual_tokens(frames, rows, mode, refinement, kv)

    module.network.visual_tokens = watched
    fitted(module, [batch] * 40, gradient_clip_val=1.0)
    assert len(steps) == 40
    assert 8 <= sum(mode == "coarse_only" for mode, _, _ in steps) <= 24
    assert {(mode, refinement) for mode, refinement, _ in steps} == {
        ("coarse_only", 0),
        ("coarse_fine", 0),
        ("coarse_fine", 1),
    }
    for (mode, _, before), (_, _, after) in itertools.pairwise(steps):
        assert torch.equal(before, after) == (mode == "coarse_only")  # weights for choosing queries unused


def test_answering_leaves_the_loss_of_some_kinds_alone(parts: Callable[..., tuple]) -> None:
    module, batch = parts()
    cue = batch.kind.index("cue")
    some = batch.answering(["cue", "glance"])
    assert torch.equal(some.input_ids, batch.input_ids)
    assert some.kind == batch.kind
    with torch.no_grad():
        whole, part = (module.score(module(each, "coarse_only"), each) for each in (batch, some))
    torch.testing.assert_close(part.loss, whole.row_loss[cue])
    assert part.tokens == batch.loss_mask[cue].sum()
    assert part.answered.tolist() == [kind == "cue" for kind in batch.kind]


@pytest.mark.filterwarnings("ignore")
def test_coarse_steps_learn_from_the_named_kinds_alone(
    parts: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coarse steps change nothing and log nothing if the batch has none of the named kinds; after many such steps the
    kinds are refused."""
    settings = {"monitor_every_n_steps": 1, "log_images_every_n_steps": 0}
    module, batch = parts(coarse_share=0.5, coarse_kinds=["glance"], **settings)
    module.__class__ = Descent
    reported: list[float] = []
    report_health = module._report_health

    def watch_health(figures: dict[str, Any]) -> None:
        reported.extend(float(value) for name, value in figures.items() if name == "grad_norm_clipped")
        report_health(figures)

    module._report_health = watch_health
    norms: list[Any] = []

    def watch_norm(parameters: Any) -> Any:
        norms.append(gradient_norm(parameters))
        return norms[-1]

    monkeypatch.setattr("keygrip.models.foveated_vlm.module.gradient_norm", watch_norm)
    visual_tokens, steps = module.network.visual_tokens, []

    def watched(frames: Any, rows: Any, mode: str, refinement: int = 0, kv: Any = None) -> Any:
        if torch.is_grad_enabled():  # otherwise for the figures of the network's health
            steps.append((mode, [p.detach().clone() for p in module.network.parameters()]))
        return visual_tokens(frames, rows, mode, refinement, kv)

    module.network.visual_tokens = watched
    trainer = fitted(module, [batch] * 12, gradient_clip_val=1.0)
    assert {mode for mode, _ in steps} == {"coarse_only", "coarse_fine"}
    assert {name for name in trainer.callback_metrics if name.endswith("loss")} == {"train/loss"}
    assert len(reported) == sum(mode == "coarse_fine" for mode, _ in steps)
    assert min(reported) > 0
    assert len(norms) == 12  # in every step: with sharded parameters all processes compute it together
    for (mode, before), (_, after) in itertools.pairwise(steps):
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (mode == "coarse_only")
    with pytest.raises(ValueError, match=r"coarse_kinds=\['glance'\].*cue, mark, text"):
        fitted(module, [batch] * (3 * COARSE_MISSES), gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="coarse_kinds=\\[\\]"):
        parts(coarse_share=0.5, coarse_kinds=[])


@pytest.mark.filterwarnings("ignore")
def test_batches_of_a_step_count_by_their_tokens(parts: Callable[..., tuple]) -> None:
    """Three batches with very different numbers of tokens in two steps: the loss of a step is the mean over all its
    tokens."""
    module, _ = parts(mode="coarse_only", refinement=0, monitor_every_n_steps=0, log_images_every_n_steps=0)
    module.__class__ = Descent
    words = " ".join(["digit"] * 8)
    texts = ["3", words, "no"]
    frames = np.random.default_rng(1).integers(0, 255, (2, 28, 28, 3)).astype(np.uint8)
    batches = [module.collator([VideoTextSample(frames, (conversation("Which?", t, "mark"),), "s", t)]) for t in texts]
    counts = [int(batch.loss_mask.sum()) for batch in batches]
    assert max(counts) > 3 * min(counts)
    start = {name: value.clone() for name, value in module.network.state_dict().items()}
    norms: list[Any] = []
    for window in (batches[:2], batches[2:]):
        module.zero_grad()
        scores = [module.score(module(batch, "coarse_only"), batch) for batch in window]
        (sum(each.loss for each in scores) / sum(each.tokens for each in scores)).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.network.parameters() if p.grad is not None]))
        with torch.no_grad():
            for parameter in module.network.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    wanted = {name: value.clone() for name, value in module.network.state_dict().items()}
    module.zero_grad()
    module.network.load_state_dict(start)
    norm = GradientNorm(every_n_steps=1)
    logged: list[Any] = []
    module.log = lambda name, value, **_: logged.append(value) if name == "train/grad_norm" else None
    trainer = fitted(module, batches, accumulate_grad_batches=2, callbacks=[norm])
    assert trainer.global_step == 2
    torch.testing.assert_close(logged, norms, atol=1e-5, rtol=1e-4)
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4)
