"""Figures over the batches of a split: each video is encoded once for all modes and their answers, long questions are
counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from shard_sets import picture, write_set
from vlm_parts import small_backbone, small_language, small_module

from keygrip.config import compose
from keygrip.data.batches import Conversation, Turn, VideoTextBatch, VideoTextSample
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, read_sample, video_text_parts
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.data.video_text.sources.cauldron import cauldron
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.evaluation import multiple_choice, video_text
from keygrip.evaluation.video_text import evaluate_modes
from keygrip.evaluation.vqa_benchmarks import Benchmark
from keygrip.models.foveated_vlm.baseline import PooledVLM
from keygrip.models.foveated_vlm.generation import Answers
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.training.optimizers import AdamW

CAPTION = answer("What happens?", "a red cube falls", "caption")
VQA = answer("Which colour?", "red", "vqa", {"answers": ["red"] * 10})
MARK = answer("Where is it?", "left", "mark")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FoveatedVLMModule:
    # METEOR is computed by Java, and takes longer than everything else here
    monkeypatch.setattr(video_text, "caption_metrics", lambda said, true: {"bleu_4": float(len(said))})
    made = small_module(tmp_path, ["What happens? Which colour? Where is it? a red cube falls left"] * 3)
    made.refinement = 1
    return made


def batch(module: FoveatedVLMModule, *samples: tuple[int, tuple[Conversation, ...]]) -> VideoTextBatch:
    """Return a batch of samples, each given by a number of frames and its conversations."""
    draw = np.random.default_rng(len(samples))
    return module.collator(
        [
            VideoTextSample(draw.integers(0, 255, (count, 28, 28, 3)).astype(np.uint8), said, "set", f"{number:04d}")
            for number, (count, said) in enumerate(samples)
        ]
    )


def evaluated(
    module: FoveatedVLMModule, batches: list[VideoTextBatch], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> tuple[dict[str, Any], list[list[str]], list[int]]:
    """Return the figures, the generated texts, and how many frames each call encoded."""
    said: list[list[str]] = []
    encodes: list[int] = []
    generate, encode = video_text.generate, module.network.encode

    def heard(*given: Any, **named: Any) -> Answers:
        answers = generate(*given, **named)
        said.append(answers.texts)
        return answers

    with monkeypatch.context() as patched:
        patched.setattr(video_text, "generate", heard)
        patched.setattr(module.network, "encode", lambda frames: (encodes.append(len(frames)), encode(frames))[1])
        if not shared:
            patched.setattr(video_text, "encoded", lambda *_: None)
        found = evaluate_modes(module, batches, ["coarse_only", "coarse_fine", "autoregressive"], 6)
    return found, said, encodes


def test_each_video_is_encoded_once_for_all_modes_and_what_they_say(
    module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [
        batch(module, (2, (MARK,)), (3, (CAPTION, MARK)), (0, (VQA,)), (1, (MARK,)), (4, (VQA,))),
        batch(module, (2, (VQA, CAPTION)), (3, (CAPTION,))),
        batch(module, (2, (MARK,)), (0, (VQA,))),
        batch(module, (0, (CAPTION,))),
    ]
    figures, said, encodes = evaluated(module, batches, monkeypatch, shared=True)
    assert encodes == [10, 5, 2]
    wanted, said_apart, encoded_apart = evaluated(module, batches, monkeypatch, shared=False)
    assert len(encoded_apart) == 3 * 4 + 2 * 3  # for each mode, one of them refined, and again for generation
    assert said == said_apart
    assert [len(texts) for texts in said] == [3] * 3 + [3] * 3 + [1] * 3 + [1] * 3
    for mode in ("coarse_only", "coarse_fine", "autoregressive", "coarse_fine_refined"):
        assert figures[mode].pop("ms_per_frame") > 0
        del wanted[mode]["ms_per_frame"]
        assert figures[mode] == pytest.approx(wanted[mode], abs=1e-5)
    assert {"bleu_4", "vqa_accuracy"} <= figures["autoregressive"].keys()
    assert {name for name in figures if name not in wanted} == set()
    assert figures["too_long"] == 0


def test_captions_of_a_video_are_references_of_one_generated_caption(
    module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[list[str], list[list[str]]]] = []
    monkeypatch.setattr(video_text, "caption_metrics", lambda said, true: scored.append((said, true)) or {})
    further, other = answer("What happens?", "it falls", "caption"), answer("Where is it?", "to the left", "caption")
    videos = (2, (CAPTION, other, further)), (3, (CAPTION, MARK)), (2, (further, CAPTION))
    evaluate_modes(module, [batch(module, *videos[:2]), batch(module, *videos)], ["autoregressive"], 4)
    ((said, true),) = scored
    first, second = "a red cube falls", "it falls"
    # the videos of the second batch have the keys of those of the first, as in shards that begin at 0 again
    assert true == [
        [first, second],
        ["to the left"],
        [first],
        [first, second],
        ["to the left"],
        [first],
        [second, first],
    ]
    assert len(said) == 7


def test_only_one_caption_is_generated_for_its_references_and_answers_of_annotators_are_all_scored(
    module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []
    scored: list[str] = []

    def counted(*given: Any, **others: Any) -> Answers:
        generated.append(len(given[4]))
        return generate(*given, **others)

    generate = video_text.generate
    monkeypatch.setattr(video_text, "generate", counted)
    monkeypatch.setattr(video_text, "vqa_accuracy", lambda said, true: float(scored.append(true[0]) is None))
    annotated = [answer("What happens?", text, "caption", {"answers": [text] * 10}) for text in ("red", "left")]
    further = answer("What happens?", "it falls", "caption")
    figures = evaluate_modes(
        module, [batch(module, (2, (CAPTION, *annotated, further)), (1, (MARK,)))], ["autoregressive"], 4
    )
    assert generated == [3]
    assert scored == ["red", "left"]
    assert figures["autoregressive"]["vqa_accuracy"] == 1.0


def test_time_by_mode_is_without_the_batch_that_warms_up(
    module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call takes a minute and each further one a second."""
    calls: list[int] = []
    module.network.register_forward_pre_hook(lambda *_: calls.append(1 if calls else 60))
    monkeypatch.setattr(multiple_choice, "time", SimpleNamespace(perf_counter=lambda: float(sum(calls))))
    batches = [batch(module, (2, (MARK,))), batch(module, (3, (MARK,)), (2, (MARK,))), batch(module, (3, (MARK,)))]
    modes = ["coarse_only", "coarse_fine"]
    figures = evaluate_modes(module, batches, modes)
    assert [figures[mode]["ms_per_frame"] for mode in modes] == [250.0, 250.0]  # two seconds of eight frames
    text = batch(module, (0, (MARK,)))
    for order in ([text, *batches], [*batches, text, text]):
        calls.clear()
        figures = evaluate_modes(module, order, modes)
        assert [figures[mode]["ms_per_frame"] for mode in modes] == [250.0, 250.0]  # text alone has no frames
    calls.clear()
    figures = evaluate_modes(module, batches[:1], modes)
    assert [figures[mode]["ms_per_frame"] for mode in modes] == [30_000.0, 500.0]


def test_each_question_about_an_image_of_the_cauldron_is_asked_by_itself(
    module: FoveatedVLMModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queries receive it, its prompt contains no answer to another question, and each is scored, also by
    collection."""
    pairs = [("Which colour?", "red"), ("Where is it?", "left")]
    texts = [{"user": asked, "assistant": said, "source": "x"} for asked, said in pairs]
    row = {"images": [{"bytes": picture(9, 28), "path": None}], "texts": texts}
    for name in ("vqav2", "okvqa", "ai2d"):  # ai2d has options by letter, not short answers
        (tmp_path / "download" / name).mkdir(parents=True)
        parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "download" / name / "train-0.parquet")
    cauldron(tmp_path / "download", tmp_path / "set", None, 28, processes=1)
    shards = ShardSet(tmp_path / "set")
    made = module.collator([read_sample(shards, number, 28) for number in range(3)])
    decode = module.tokenizer.decode
    before = [decode(made.input_ids[row, :at].tolist()).rstrip() for row, at in enumerate(made.visual_at)]
    assert [text.endswith(asked) for text, (asked, _) in zip(before, pairs * 3, strict=True)] == [True] * 6
    assert [text.count("?") for text in before] == [1] * 6

    def red(*given: Any, **_: Any) -> Any:
        return Answers(["red"] * len(given[4]), [], None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(video_text, "generate", red)
    figures = evaluate_modes(module, [made], ["coarse_fine"], 4)["coarse_fine"]
    assert figures["questions_image_instruction"] == 6
    scored = {name: value for name, value in figures.items() if name.startswith("vqa_accuracy")}
    assert scored == {"vqa_accuracy": 0.5, "vqa_accuracy/vqav2": 0.5, "vqa_accuracy/okvqa": 0.5}


def test_questions_that_do_not_fit_are_counted_and_end_nothing(
    module: FoveatedVLMModule, caplog: pytest.LogCaptureFixture
) -> None:
    """They still count in the losses: a row fits if it needs no room for a generated answer."""
    long = answer("Which colour?" + " ?" * 30, "red", "vqa", {"answers": ["red"] * 10})
    fits = len(module.collator.prompt(VQA.turns[:-1]).ids) + 2 + 60
    assert fits <= module.network.language.context < len(module.collator.prompt(long.turns[:-1]).ids) + 2 + 60
    found = evaluate_modes(module, [batch(module, (2, (VQA, long, long)))], ["coarse_only", "coarse_fine"], 60)
    assert found["too_long"] == 2
    assert found["coarse_fine"]["questions_vqa"] == 3
    assert "vqa_accuracy" in found["coarse_fine"]
    (said,) = (record.getMessage() for record in caplog.records if "nothing is generated" in record.getMessage())
    assert said.startswith("nothing is generated for 2 questions, which with their frames and an answer of up to 60")
    assert said.endswith("; the first: 0000 in set, with 2 frames")
    alone = evaluate_modes(module, [batch(module, (2, (long,)))], ["coarse_fine"], 60)
    assert alone["too_long"] == 1
    assert "vqa_accuracy" not in alone["coarse_fine"]


def test_what_ends_with_the_users_turn_is_counted(module: FoveatedVLMModule, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the annotators answered the last question or the one before it is not known."""
    more = Conversation((*VQA.turns, Turn("user", "Where is it?")), VQA.kind, VQA.evidence)
    found = evaluate_modes(module, [batch(module, (2, (VQA, more))), batch(module, (1, (more,)))], ["coarse_fine"], 6)
    assert (found["unanswered"], found["too_long"]) == (2, 0)
    assert found["coarse_fine"]["questions_vqa"] == 3
    (said,) = (record.getMessage() for record in caplog.records if "no answer is scored" in record.getMessage())
    assert said.endswith("of 2 conversations, which end with the user's turn; the first: 0000 in set")


def test_a_network_that_keeps_no_keys_is_evaluated_too(module: FoveatedVLMModule) -> None:
    torch.manual_seed(0)
    pooled = FoveatedVLMModule(
        PooledVLM(small_backbone(), small_language(), 4),
        module.collator,
        AdamW(1e-3),
        "many_tokens",
        monitor_every_n_steps=0,
    )
    found = evaluate_modes(pooled.eval(), [batch(module, (2, (CAPTION,)), (1, (VQA, MARK)))], ["many_tokens"], 4)
    assert {"bleu_4", "vqa_accuracy", "accuracy_mark"} <= found["many_tokens"].keys()


def test_another_set_is_shown_as_the_model_was_trained(
    module: FoveatedVLMModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set stores no image options; its wide image is made square in the same way as the frames of training."""
    wide = np.random.default_rng(0).integers(0, 255, (28, 84, 3)).astype(np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "set" / split / "s-000.tar") as writer:
            parts = video_text_parts([(tmp_path / "wide.png").read_bytes()], [MARK], "s", extension="png")
            writer.add(f"{split}0", *parts)
        write_manifest(tmp_path / "set" / split, describe_video_text, progress=False)
    module.image_options = {"image_size": 28, "fit": "crop", "max_frames": 8}

    def stored(changes: dict[str, Any]) -> VideoTexts:
        return VideoTexts({"s": ShardSource(tmp_path / "set")}, module.collator, 28, 1, num_workers=0, **changes)

    shown: list[VideoTextBatch] = []
    monkeypatch.setattr(video_text, "evaluate_modes", lambda module, batches, *_: shown.extend(batches) or {})
    evaluated: Any = SimpleNamespace(module=module, stored_data=stored)
    for changes, fit in (([], "crop"), (["+data.fit=pad"], "pad")):
        overrides = ["evaluate=video_text", "checkpoint=run", "split=val", *changes]
        video_text.evaluate_answers(evaluated, compose("evaluate", overrides))
        expected, _ = read_timed_frames(tmp_path / "wide.png", 28, fit, 8)
        assert torch.equal(shown.pop().frames[0].permute(0, 2, 3, 1), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("most", [1, 3, 8])
def test_fewer_frames_than_in_training_show_an_image_of_the_split_as_fewer(
    most: int, module: FoveatedVLMModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's data show an image as 4 frames."""
    write_set(tmp_path / "set" / "train", [1])
    write_set(tmp_path / "set" / "val", [1])
    module.image_options = {"image_size": 28, "fit": "stretch", "max_frames": 8, "image_frames": 4}

    def stored(changes: dict[str, Any]) -> VideoTexts:
        settings = {"max_frames": 8, "image_frames": 4, "num_workers": 0, **changes}
        return VideoTexts({"s": ShardSource(tmp_path / "set")}, module.collator, 28, 1, **settings)

    shown: list[VideoTextBatch] = []
    monkeypatch.setattr(video_text, "evaluate_modes", lambda module, batches, *_: shown.extend(batches) or {})
    evaluated: Any = SimpleNamespace(module=module, stored_data=stored)
    overrides = ["evaluate=video_text", "checkpoint=run", "split=val", f"max_frames={most}"]
    video_text.evaluate_answers(evaluated, compose("evaluate", overrides))
    assert [int(batch.frame_mask.sum()) for batch in shown] == [min(most, 4)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("+data.image_size=64", r"data\.image_size=64: the model was trained on frames of 28 pixels"),
        ("+data.collator.max_tokens=3", r"data\.collator has no effect"),
    ],
)
def test_what_the_model_was_trained_on_cannot_be_changed(module: FoveatedVLMModule, change: str, said: str) -> None:
    module.image_options = {"image_size": 28, "fit": "stretch", "max_frames": 8}
    evaluated: Any = SimpleNamespace(module=module)
    with pytest.raises(ValueError, match=said):
        video_text.evaluate_answers(evaluated, compose("evaluate", ["evaluate=video_text", "checkpoint=run", change]))


@pytest.mark.parametrize(
    ("changes", "prepared"),
    [
        ([], {"fit": "crop", "max_frames": 8, "image_frames": 4}),
        (["+data.max_frames=16", "+data.fit=pad"], {"fit": "pad", "max_frames": 16, "image_frames": 4}),
        (["+data.max_frames=16", "max_frames=2"], {"fit": "crop", "max_frames": 2, "image_frames": 2}),
        (["+data.image_frames=6", "+data.fit=auto"], {"fit": "crop", "max_frames": 8, "image_frames": 6}),
    ],
)
def test_benchmarks_are_read_like_the_split(
    changes: list[str], prepared: dict[str, Any], module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.image_options = {"image_size": 28, "fit": "crop", "max_frames": 8, "image_frames": 4}
    seen: list[dict[str, Any]] = []

    def choices(module: FoveatedVLMModule, questions: Any, modes: Any, most: int, record: list[Any]) -> dict[str, Any]:
        seen.append(dict(module.image_options))
        record.append({})
        return {}

    monkeypatch.setattr(video_text, "read_benchmark", lambda name, root: Benchmark([], 0))
    monkeypatch.setattr(video_text, "evaluate_choices", choices)
    overrides = ["evaluate=video_text", "checkpoint=run", "split=none", "vqa_benchmarks={mlvu: x}"]
    video_text.evaluate_answers(SimpleNamespace(module=module), compose("evaluate", [*overrides, *changes]))  # type: ignore[arg-type]
    assert seen == [{"image_size": 28, **prepared}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("+data.max_frames=0", "max_frames=0: a sample has 1 to"),
        ("+data.fit=wide", "fit='wide': must be one of"),
        ("+data.image_frames=9", "image_frames=9: an image has 1 to max_frames=8"),
    ],
)
def test_frames_that_cannot_be_prepared_so_are_refused(module: FoveatedVLMModule, change: str, said: str) -> None:
    module.image_options = {"image_size": 28, "fit": "crop", "max_frames": 8, "image_frames": 4}
    overrides = ["evaluate=video_text", "checkpoint=run", "split=none", "vqa_benchmarks={mlvu: x}", change]
    with pytest.raises(ValueError, match=said):
        video_text.evaluate_answers(SimpleNamespace(module=module), compose("evaluate", overrides))  # type: ignore[arg-type]
