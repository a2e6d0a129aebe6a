"""From shards to answers: train, resume in mid-epoch, evaluate by mode, answer a question; training stages."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shard_sets import write_set
from vlm_parts import small_module

from keygrip import evaluate, generate, train
from keygrip.config import compose
from keygrip.data.batches import VideoTextBatch
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.evaluation import text_metrics as metrics
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.monitor import RANGES
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.training import build_limits, checkpoints
from keygrip.training.checkpoints import load_module, read_checkpoint

SMALL = [
    "data=robot_videos",
    "data.sources.demos=null",
    "data.num_workers=0",
    "data.batch_size=4",
    "data.questions=null",
    "backbone.image_size=32",
    "+backbone.width=32",
    "+backbone.depth=2",
    "+backbone.heads=2",
    "language.model.width=32",
    "language.model.layers=1",
    "language.model.mlp_width=48",
    "language.model.vocabulary=400",
    "strategy=cpu",
    "strategy.precision=32-true",
    "logger=none",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "limit_val_batches=1",
    "log_every_n_steps=1",
]


@pytest.fixture
def overrides(tmp_path: Path) -> Callable[..., list[str]]:
    videos, texts = tmp_path / "videos", tmp_path / "texts"
    write_set(videos / "train", [2, 3, 1, 2, 3, 1, 2, 2, 3, 1], kinds=("mark", "cue"))
    write_set(videos / "val", [2, 3, 1], prefix="v", kinds=("mark", "caption"))
    write_set(videos / "test", [2, 3], prefix="w", kinds=("mark", "caption"))
    write_set(texts / "train", [0] * 6, prefix="t", kinds=("text",))
    sources = [f"data.sources.tours.root={videos}", f"data.sources.texts.root={texts}"]

    def make(name: str, *more: str, model: str = "foveated_vlm") -> list[str]:
        return [f"model={model}", *SMALL, *sources, f"run_dir={tmp_path / name}", *more]

    return make


def tokenizer_of(videos: Path) -> Path:
    (file,) = (videos / ".keygrip").glob("texts-*/tokenizer-400.json")
    return file


def replace_tokenizer(videos: Path) -> None:
    file = tokenizer_of(videos)
    file.unlink()
    TrainedTokenizer(400).load(file.parent, ["quite other words"] * 9)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder)["state_dict"]


@pytest.mark.parametrize(
    "cache",
    [pytest.param([], marks=pytest.mark.slow), ["model.vision_cache_gb=0.1", "backbone.trainable=frozen"]],
    ids=["", "cache"],
)
def test_a_run_resumed_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    overrides: Callable[..., list[str]], tmp_path: Path, cache: list[str]
) -> None:
    """Also if encoder features of frames are cached and validation is the first to use some of the frames."""
    options = [
        *cache,
        "model.refinement=2",
        "model.refinement_from=0.0",
        "model.monitor_every_n_steps=2",
        "val_every_n_steps=2",
    ]
    made = overrides("whole", "max_steps=5", *options)
    shutil.rmtree(tmp_path / "videos" / "val")
    shutil.copytree(tmp_path / "videos" / "train", tmp_path / "videos" / "val")
    logged = train.run(compose("train", made))
    assert {"val/loss", "val/gap", "val/gap_refined", "val/autoregressive/accuracy_mark"} <= logged.keys()
    assert read_checkpoint(tmp_path / "whole/checkpoints/best.ckpt")["global_step"] in (2, 4)  # by val/loss
    train.run(compose("train", overrides("parts", "max_steps=3", *options)))
    assert read_checkpoint(tmp_path / "parts")["global_step"] == 3
    train.run(compose("train", overrides("parts", "max_steps=5", *options, "resume=true")))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


@pytest.mark.slow
def test_a_run_goes_on_with_data_that_have_moved(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    options = ["val_every_n_steps=3", "model.monitor_every_n_steps=0"]
    train.run(compose("train", overrides("whole", "max_steps=4", *options)))
    train.run(compose("train", overrides("parts", "max_steps=2", *options)))
    places = [(tmp_path / name).rename(tmp_path / f"moved_{name}") for name in ("videos", "texts")]
    moved = [f"data.sources.{name}.root={place}" for name, place in zip(("tours", "texts"), places, strict=True)]
    moved += ["data.memory_gb=0.1", "data.max_skipped_share=0.5", "resume=true"]
    train.run(compose("train", overrides("parts", "max_steps=4", *options, *moved)))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    write_set(places[0] / "train", [2, 3, 1, 2, 3, 1, 2, 2, 3, 1], kinds=("cue", "mark"))
    with pytest.raises(ValueError, match="the data are not those of the checkpoint: 1 changed"):
        train.run(compose("train", overrides("parts", "max_steps=5", *options, *moved)))


BUDGET = "data.budget={_target_: keygrip.data.shards.budget.Budget, frames: 6, positions: 400}"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], [BUDGET]], ids=["", "budget"])
def test_a_resumed_run_reads_with_its_own_tokenizer(
    overrides: Callable[..., list[str]], tmp_path: Path, more: list[str]
) -> None:
    """Whichever tokenizer is next to the data by then: an id must mean the same word in all steps."""
    options = [*more, "val_every_n_steps=3", "model.monitor_every_n_steps=0"]
    train.run(compose("train", overrides("whole", "max_steps=3", *options)))
    train.run(compose("train", overrides("parts", "max_steps=1", *options)))
    replace_tokenizer(tmp_path / "videos")
    train.run(compose("train", overrides("parts", "max_steps=3", *options, "resume=true")))
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert parts["language"]["tokenizer"] == whole["language"]["tokenizer"]
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())


DDP = "strategy=ddp_cpu"
FSDP = ("strategy=fsdp", "strategy.accelerator=cpu", "strategy.devices=2", "strategy.precision=32-true")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[DDP], FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("batch", [["data.batch_size=2"], ["data.batch_size=6", BUDGET]], ids=["two", "budget"])
def test_two_processes_of_which_one_may_have_text_alone_train_the_weights_of_one(
    overrides: Callable[..., list[str]],
    command: Callable[..., Any],
    tmp_path: Path,
    batch: list[str],
    strategy: Sequence[str],
) -> None:
    """Monitors run in every step: their computations on one process must not wait for the other. With a budget, the
    processes have different numbers of rows. Validation goes frame by frame through videos of different lengths."""
    options = [*batch, "data.sources.texts.share=0.5", "model.monitor_every_n_steps=1", "max_steps=6"]
    options += ["val_every_n_steps=3", "model.log_images_every_n_steps=2", "logger=csv"]
    train.run(compose("train", overrides("one", *options)))
    parallel = [each for each in overrides("two", *options) if each != "strategy=cpu"]
    done = command("keygrip.train", *parallel, *strategy)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # On some processors, rounding makes 2e-5, where Adam divides gradients near 0 by themselves. The next test shows
    # how much a wrong mean makes with a budget.
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=0, msg=name)
    for name in ("train/loss", "health/grad_norm_clipped"):
        found = values_of(tmp_path / "two", name)
        assert len(found) == 6
        assert found == pytest.approx(values_of(tmp_path / "one", name), abs=1e-4), name
    name = "train/text_only_share"
    assert values_of(tmp_path / "two", name) == values_of(tmp_path / "one", name)


@pytest.mark.slow
def test_a_mean_over_each_processes_own_tokens_would_be_found(
    overrides: Callable[..., list[str]], command: Callable[..., Any], tmp_path: Path
) -> None:
    """It trains weights that differ more from those of one process than the test above allows, if the processes have
    different numbers of tokens, as with a budget."""
    (tmp_path / "own_means.py").write_text(
        "from keygrip import train\n"
        "from keygrip.models.foveated_vlm import module\n"
        "module.global_mean = lambda total, count: total / count\n"
        "if __name__ == '__main__':\n"
        "    train.main()\n"
    )
    options = ["data.batch_size=6", BUDGET, "data.sources.texts.share=0.5", "max_steps=6", "limit_val_batches=0"]
    train.run(compose("train", overrides("one", *options)))
    done = command("own_means", *(each for each in overrides("two", *options) if each != "strategy=cpu"), DDP)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((two[name] - value).abs().max()) for name, value in one.items()) > 1e-3


def values_of(folder: Path, name: str) -> list[float]:
    """Return the values of a metric at all steps of a run at which it was logged."""
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"image_size": "32"}, "image_size='32'"),
        ({"image_size": 10**9}, "image_size=1000000000"),
        ({"max_frames": None}, "max_frames=None"),
        ({"fit": "x"}, "fit='x'"),
        (None, "missing 3 required"),
    ],
)
def test_a_checkpoint_with_impossible_frames_is_refused_when_it_is_read(
    images: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    module = small_module(tmp_path, ["Which?"] * 3)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["language"]["images"]
    checkpoint["language"]["images"] = {} if images is None else kept | images
    with pytest.raises((ValueError, TypeError), match=said):
        module.on_load_checkpoint(checkpoint)


def test_a_configuration_of_a_million_layers_is_not_built(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(compose("train", overrides("run", "max_steps=1")))
    content = read_checkpoint(tmp_path / "run")
    content["keygrip"]["config"]["model"]["network"]["language"]["layers"] = 1_000_000
    monkeypatch.setattr(build_limits, "EXTERNAL_PARAMETERS", 500)  # stops sooner than with 20 000
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda *_, **__: content)
    with pytest.raises(ValueError, match=r"builds more than \d+ parameters, far more than it holds"):
        load_module(tmp_path / "run")


@pytest.mark.parametrize("query_start", ["random", "cls"])
def test_what_is_computed_now_and_then_is_logged(
    overrides: Callable[..., list[str]], query_start: str, tmp_path: Path
) -> None:
    often = ["logger=csv", "log_every_n_steps=2", "model.monitor_every_n_steps=2", "max_steps=4"]
    often += ["val_every_n_steps=4", f"model.network.query_start={query_start}"]
    train.run(compose("train", overrides("run", *often)))
    (logged,) = (tmp_path / "run").rglob("metrics.csv")
    header = logged.read_text().splitlines()[0].split(",")
    assert {"train/padding_share", "train/text_only_share", "data/skipped"} <= set(header)
    # every range belongs to a metric that is logged
    assert {name if "/" in name else f"health/{name}" for name in RANGES} <= set(header)


def test_stages_of_a_curriculum_end_after_their_optimizer_steps(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[set[str]] = []
    step = FoveatedVLMModule.training_step

    def watched(self: FoveatedVLMModule, batch: VideoTextBatch, batch_idx: int) -> Any:
        sources.append(set(batch.source))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FoveatedVLMModule, "training_step", watched)
    stages = "data.curriculum=[{_target_: keygrip.data.shards.curriculum.Stage, steps: 1, weights: {tours: 1}},"
    stages += "{_target_: keygrip.data.shards.curriculum.Stage, weights: {texts: 1}}]"
    more = ["data.sources.texts.share=null", "data.batch_size=2", "accumulate_grad_batches=3", "max_steps=2"]
    train.run(compose("train", overrides("run", stages, *more, "limit_val_batches=0")))
    assert sources == [{"tours"}] * 3 + [{"texts"}] * 3


def test_rows_that_the_context_does_not_hold_are_said_before_training(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Before, the first such batch ended the training with "a row has 50 positions and language.model.context=46"."""
    more = ["max_steps=1", "limit_val_batches=0"]
    with pytest.raises(
        ValueError, match=r"every sample of the source 'tours' .* lower data\.max_frames=64 or lower collator"
    ):
        train.run(compose("train", overrides("none", "language.model.context=6", *more)))
    assert not list((tmp_path / "none").rglob("*.ckpt"))


def test_training_and_evaluation_leave_the_same_rows_out(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the evaluation ended at the first row longer than the context."""
    scored: list[tuple[str, str]] = []
    score = FoveatedVLMModule.score

    def watched(self: FoveatedVLMModule, output: Any, batch: VideoTextBatch) -> Any:
        scored.extend(zip(batch.key, batch.kind, strict=True))
        return score(self, output, batch)

    monkeypatch.setattr(FoveatedVLMModule, "score", watched)
    train.run(compose("train", overrides("run", "language.model.context=36", "max_steps=1")))
    trained = {row for row in scored if row[0].startswith("v")}
    assert trained == {("v0", "mark"), ("v0", "caption"), ("v1", "mark"), ("v2", "mark"), ("v2", "caption")}
    scored.clear()
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)  # Java takes seconds to start
    options = ["split=val", "max_new_tokens=3", "mode=coarse_only"]
    result = evaluate.run(compose("evaluate", [f"checkpoint={tmp_path / 'run'}", *options]))
    assert set(scored) == trained
    assert result["val"]["coarse_only"]["questions_mark"] == 3
    assert result["val"]["coarse_only"]["questions_caption"] == 2
    assert (result["val"]["left_out_rows"], result["val"]["left_out_samples"]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({}, 1),
        ({"mode": "coarse_only"}, 0),
        ({"coarse_share": 0.25}, 0.75),
        ({"refinement": 2, "refinement_from": 0.4}, 1 + 0.6 * 1),
        ({"refinement": 1, "refinement_from": 0.5, "coarse_share": 0.2}, 0.8 * (1 + 0.5 * 0.5)),
    ],
)
def test_the_mean_number_of_passes_that_predict_queries(options: dict[str, Any], mean: float, tmp_path: Path) -> None:
    module = small_module(tmp_path, ["What is it?"])
    for name, value in options.items():
        setattr(module, name, value)
    assert module.query_passes == pytest.approx(mean)


def test_shares_of_rows_are_those_of_all_batches_since_the_last(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts come in batches of their own if there are enough of them: the share of one batch is 0 or 1."""
    batches: list[VideoTextBatch] = []
    step = FoveatedVLMModule.training_step

    def heard(self: FoveatedVLMModule, batch: VideoTextBatch, batch_idx: int) -> torch.Tensor:
        batches.append(replace(batch, left_out=1, clips=2))
        return step(self, batches[-1], batch_idx)

    monkeypatch.setattr(FoveatedVLMModule, "training_step", heard)
    more = ["data.sources.texts.share=0.5", "logger=csv", "log_every_n_steps=2", "accumulate_grad_batches=2"]
    more += ["model.monitor_every_n_steps=0", "model.refinement=0"]  # one pass predicts queries in every step
    train.run(compose("train", overrides("run", *more, "max_steps=4")))
    names = ("text_only_share", "padding_share", "clips")
    values = {name: values_of(tmp_path / "run", f"train/{name}") for name in names}
    assert len(batches) == 7  # the step at the end of an epoch has one batch
    for number, part in enumerate((batches[:4], batches[4:])):
        lengths = [(each.attention_mask.sum(1) + each.frame_mask.sum(1)[each.video_index]).tolist() for each in part]
        lengths += [streams for each in part if (streams := text_rows(each).streams.read_lengths)]  # the query pass
        held, places = sum(map(sum, lengths)), sum(len(each) * max(each) for each in lengths)
        assert values["padding_share"][number] == pytest.approx(1 - held / places, abs=1e-6)
        rows, texts = sum(map(len, part)), sum(each.source.count("texts") for each in part)
        assert 0 < texts < rows
        assert values["text_only_share"][number] == pytest.approx(texts / rows, abs=1e-6)
    assert values["clips"] == [8, 6]
    assert values_of(tmp_path / "run", "train/left_out_rows") == [4, 7]  # counted from the start


def test_a_checkpoint_alone_evaluates_and_answers(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)  # Java takes seconds to start
    run = str(tmp_path / "run")
    train.run(compose("train", overrides("run", "max_steps=2", "val_every_n_steps=2")))
    tokenizer_of(tmp_path / "videos").unlink()  # the checkpoint contains it
    result = evaluate.run(
        compose("evaluate", [f"checkpoint={run}", "max_new_tokens=3", "mode=[coarse_fine,coarse_only]"])
    )
    modes = {"coarse_fine", "coarse_only", "coarse_fine_refined"}
    videos = {"videos_of_2": 1, "videos_of_4": 1}
    counted = {"too_long", "unanswered", "left_out_rows", "left_out_samples", "unreadable_samples"}
    assert modes | {"fine_over_coarse", "tokens_per_frame"} | counted | videos.keys() == result["test"].keys()
    assert videos.items() <= result["test"].items()
    assert {"loss_mark", "accuracy_caption", "perplexity", "bleu_4", "ms_per_frame"} <= result["test"][
        "coarse_fine"
    ].keys()
    by_length = {name for name in result["test"]["coarse_fine"] if name.startswith("accuracy_mark_of_")}
    assert by_length == {"accuracy_mark_of_2", "accuracy_mark_of_4"}  # videos of 2 and of 3 frames
    counts = {name: result["test"]["coarse_fine"][f"questions_mark{name}"] for name in ("", "_of_2", "_of_4")}
    assert counts == {"": 2, "_of_2": 1, "_of_4": 1}
    json.dumps(result)
    write_set(tmp_path / "longer" / "train", [5, 5])
    write_set(tmp_path / "longer" / "test", [5, 9], prefix="w", kinds=("mark",))
    other = ["mode=coarse_only", f"data.sources.tours.root={tmp_path / 'longer'}", "data.batch_size=2", "max_frames=6"]
    longer = evaluate.run(compose("evaluate", [f"checkpoint={run}", *other]))
    assert (longer["test"]["videos_of_8"], longer["test"]["coarse_only"]["questions_mark"]) == (2, 2)  # 5 and 6 frames
    with pytest.raises(ValueError, match="max_framez"):
        evaluate.run(compose("evaluate", [f"checkpoint={run}", "data.max_framez=3"]))

    pictures = tmp_path / "frames"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(pictures / f"{number}.png")
    asked = [f"checkpoint={run}", f"video={pictures}", "max_new_tokens=3"]
    answered = generate.run(compose("generate", [*asked, "question=[Which?,What?]", f"figure={tmp_path / 'p.png'}"]))
    assert [entry["question"] for entry in answered["answers"]] == ["Which?", "What?"]
    assert (answered["mode"], answered["frames"]) == ("autoregressive", 3)
    assert Image.open(tmp_path / "p.png").width > 100
    with pytest.raises(ValueError, match="mode=fine"):
        generate.run(compose("generate", [*asked, "question=Which?", "mode=fine"]))
    several = [f"checkpoint={run}", f"video=[{pictures},{pictures / '2.png'}]", "max_new_tokens=3", "question=[Which?]"]
    together, streamed = (generate.run(compose("generate", [*several, f"stream={on}"])) for on in ("false", "true"))
    assert together["answers"] == streamed["answers"]
    assert [entry["video"] for entry in together["answers"]] == [str(pictures), str(pictures / "2.png")]
    assert together["answers"][0]["answer"] == answered["answers"][0]["answer"]

    folder = VideoChat.from_pretrained(run).save_pretrained(tmp_path / "hub")
    assert 'VideoChat.from_pretrained("hub")' in (folder / "README.md").read_text()
    chat = VideoChat.from_pretrained(folder)
    talk = [
        {"role": "user", "content": [{"type": "video", "video": str(pictures)}, {"type": "text", "text": "Which?"}]}
    ]
    assert chat.generate(talk, 3) == answered["answers"][0]["answer"]


def test_a_stage_begins_with_the_weights_of_the_one_before(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    train.run(compose("train", overrides("one", "max_steps=2")))
    frozen = ["max_steps=1", "optimizer.lr=1e-12", f"model.init_from={tmp_path / 'one'}"]
    train.run(compose("train", overrides("two", *frozen)))
    first = load_module(tmp_path / "one").state_dict()
    for name, value in load_module(tmp_path / "two").state_dict().items():
        torch.testing.assert_close(value, first[name], atol=1e-6, rtol=0, msg=name)
    train.run(compose("train", overrides("scaled", *frozen, "model.network.visual_scale=1.0")))
    scaled = load_module(tmp_path / "scaled").state_dict()
    assert scaled.pop("network.connector.scale") == 1.0 != first["network.connector.scale"]
    for name, value in scaled.items():
        torch.testing.assert_close(value, first[name], atol=1e-6, rtol=0, msg=name)
    replace_tokenizer(tmp_path / "videos")
    remedies = r"language\.tokenizer\.init_from=.* before 30 November 2026, begin again with stage 1"
    with pytest.raises(ValueError, match=f"another tokenizer.*{remedies}"):
        train.run(compose("train", overrides("three", *frozen)))
    train.run(compose("train", overrides("four", *frozen, "language.tokenizer.init_from=${model.init_from}")))
    first_words, taken = (read_checkpoint(tmp_path / name)["language"]["tokenizer"] for name in ("one", "four"))
    assert taken == first_words
    for name, value in load_module(tmp_path / "four").state_dict().items():
        torch.testing.assert_close(value, first[name], atol=1e-6, rtol=0, msg=name)


def test_the_baseline_trains_on_the_same_data(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    options = ["max_steps=2", "val_every_n_steps=2", "model.network.tokens_per_frame=4"]
    logged = train.run(compose("train", overrides("pooled", *options, model="pooled_vlm")))
    assert logged["val/many_tokens/loss"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["model.network.query_source=coarse", "model.refinement=2"],
            r"model\.network\.query_source=coarse inference computes them from coarse tokens: set model\.refinement=0",
        ),
        (
            ["model.network.frame_numbers=1"],
            r"model\.network\.frame_numbers=1: the data have videos of [2-9] frames: raise it",
        ),
        (["collator.pack_rows=true"], r"that of model\.network\.pack_rows=False: set that"),
    ],
)
def test_settings_that_do_not_fit_each_other_or_the_data_are_refused_before_the_first_step(
    overrides: Callable[..., list[str]], options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keygrip.models.foveated_vlm.module.FoveatedVLMModule.training_step", None)
    with pytest.raises(ValueError, match=said):
        train.run(compose("train", overrides("run", "max_steps=2", *options)))


def test_the_fused_loss_on_a_cpu_is_refused_in_a_sentence(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"model\.loss_kernel=liger computes on a GPU and this run is on the CPU"):
        train.run(compose("train", overrides("run", "max_steps=1", "model.loss_kernel=liger")))


@pytest.mark.parametrize("dry_run", [[], ["dry_run=true"]], ids=["training", "dry run"])
def test_batches_smaller_than_the_number_of_processes_are_named_before_training(
    overrides: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    dry_run: list[str],
) -> None:
    """The data module is set up before there is a trainer, so it has to be told the number of processes."""
    found: list[tuple[int, int]] = []

    def stop(module: Any, datamodule: VideoTexts, *_: Any) -> None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        assert datamodule.mixture is not None
        sizes = [len(batch) for batch in datamodule.mixture.batches_of(0)]
        found.append((sum(size < 4 for size in sizes), len(sizes)))
        raise InterruptedError

    monkeypatch.setattr("keygrip.training.fit._set_statistics", stop)
    several = ["strategy=ddp_cpu", "strategy.devices=4", "data.batch_size=8", BUDGET, *dry_run]
    with caplog.at_level("WARNING"), pytest.raises(InterruptedError):
        train.run(compose("train", overrides("run", *several)))
    ((small, batches),) = found
    assert small > 0
    said = f"{small} of {batches} batches hold fewer samples than there are processes (4), so that some"
    assert sum(said in message for message in caplog.messages) == 1


def test_a_dry_run_writes_no_checkpoint_and_says_what_it_does(
    overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        report: dict[str, Any] = train.run(compose("train", overrides("dry", "dry_run=true")))
    assert [line.partition(":")[0] for line in caplog.messages].count("dry run") == 2
    assert set(report["modes"]) == {"coarse_only", "coarse_fine", "autoregressive"}
    assert not (tmp_path / "dry" / "checkpoints").exists()


def test_the_optimizers_groups_have_the_designs_ratios(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from keygrip.training.checkpoints import build_module

    cfg = OmegaConf.to_container(
        compose("train", overrides("x", "experiment=vlm_stage1", "language=tiny", "backbone=tiny")), resolve=True
    )
    module = build_module(cfg)  # type: ignore[arg-type]
    assert isinstance(module, FoveatedVLMModule)
    rates: dict[str, float] = {}
    for group in module.optimizer_recipe.parameter_groups(module.network):
        for parameter in group["params"]:
            name = next(n for n, p in module.network.named_parameters() if p is parameter)
            rates[name.partition(".")[0]] = group["lr"]
    assert rates == pytest.approx(
        {
            "backbone": 1e-5,
            "language": 1e-5,
            "connector": 1e-4,
            "query_projection": 1e-4,
            "static_query": 1e-4,
            "first_query": 1e-4,
            "frame_clock": 1e-4,
        }
    )
