"""Multiple-choice questions: each video decoded and encoded once, letters scored, answers read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from shard_sets import small_video
from vlm_parts import small_module

from keygrip.data.batches import Turn
from keygrip.data.spacing import evenly
from keygrip.evaluation import multiple_choice, video_text
from keygrip.evaluation.multiple_choice import evaluate_choices
from keygrip.evaluation.video_text import evaluate_answers
from keygrip.evaluation.vqa_benchmarks import Benchmark, ChoiceQuestion, read_benchmark
from keygrip.models.foveated_vlm.generation import Answers, answer_scores
from keygrip.models.foveated_vlm.module import FoveatedVLMModule

TEXTS = ["Which colour? A. red B. blue C. green Answer with the option's letter."] * 3
OPTIONS = ("red", "blue", "green")


def question(
    video: str, answer: int, asked: str = "Which colour?", clip: tuple[float, float] | None = None
) -> ChoiceQuestion:
    return ChoiceQuestion(Path(video), asked, OPTIONS, answer, "colour", clip)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FoveatedVLMModule:
    """A module whose videos are random and whose calls are counted."""
    made = small_module(tmp_path, TEXTS)

    def decode(
        path: Path, size: int, fit: str, most: int, clip: object, fps: float
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        if path.name == "broken":
            raise ValueError("broken cannot be decoded")
        decoded.append((str(path), clip))
        return np.random.default_rng(len(path.name)).integers(0, 255, (3, 28, 28, 3)).astype(np.uint8), (0.0, 1.0, 2.0)

    decoded: list[object] = []
    encode = made.network.encode
    encodes: list[int] = []
    monkeypatch.setattr(multiple_choice, "read_timed_frames", decode)
    monkeypatch.setattr(made.network, "encode", lambda frames: (encodes.append(len(frames)), encode(frames))[1])
    made.decoded, made.encodes = decoded, encodes  # type: ignore[assignment]
    return made


def test_a_video_is_decoded_and_encoded_once_for_all_questions_and_modes(module: FoveatedVLMModule) -> None:
    asked = [question("a", 0), question("bb", 1), question("a", 2, "And now?"), question("a", 1, clip=(0.0, 2.0))]
    figures = evaluate_choices(module, [*asked, question("broken", 0)], ["coarse_fine", "autoregressive"], 4)
    assert module.decoded == [("a", None), ("bb", None), ("a", (0.0, 2.0))]
    assert module.encodes == [3, 3, 3]
    assert (figures["questions"], figures["unreadable"], figures["tokens_per_frame"]) == (4, 1, 1)
    assert figures["coarse_fine"]["ms_per_frame"] > 0
    assert set(figures["coarse_fine"]) == {
        "accuracy_likelihood",
        "accuracy_likelihood/colour",
        "accuracy_likelihood_task_mean",
        "accuracy_generation",
        "accuracy_generation/colour",
        "accuracy_generation_task_mean",
        "share_without_option",
        "ms_per_frame",
    }
    none = evaluate_choices(module, [question("broken", 0)], ["coarse_fine"])
    assert none == {"questions": 0, "unreadable": 1, "too_long": 0}


def test_time_by_mode_is_without_the_video_that_warms_up(
    module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call takes a minute and each further call a second; there are 3 frames and 3 letters."""
    calls: list[int] = []

    def scores(*given: Any) -> torch.Tensor:
        calls.append(1 if calls else 60)
        return answer_scores(*given)

    monkeypatch.setattr(multiple_choice, "answer_scores", scores)
    monkeypatch.setattr(multiple_choice, "time", SimpleNamespace(perf_counter=lambda: float(sum(calls))))
    asked = [question("a", 0), question("bb", 1), question("ccc", 1)]
    for count, first, second in ((3, 1000 / 9, 1000 / 9), (1, 60_000 / 9, 1000 / 9)):
        calls.clear()
        figures = evaluate_choices(module, [question("broken", 0), *asked[:count]], ["coarse_fine", "coarse_only"], 4)
        assert figures["coarse_fine"]["ms_per_frame"] == pytest.approx(first, abs=1e-3)
        assert figures["coarse_only"]["ms_per_frame"] == pytest.approx(second, abs=1e-3)


def test_questions_that_do_not_fit_are_counted_and_end_nothing(
    module: FoveatedVLMModule, caplog: pytest.LogCaptureFixture
) -> None:
    figures = evaluate_choices(module, [question("a", 0), question("a", 0, "? " * 200)], ["coarse_fine"], 4)
    assert (figures["questions"], figures["unreadable"], figures["too_long"]) == (1, 0, 1)
    assert "1 questions about a left out: the conversation takes 443 positions" in caplog.text
    module.network.frame_tokens = torch.nn.Parameter(torch.zeros(2, module.network.language.width))  # for two frames
    none = evaluate_choices(module, [question("a", 0)], ["coarse_fine"], 4)
    assert none == {"questions": 0, "unreadable": 0, "too_long": 1}
    assert "no question is left: the videos of 0 cannot be decoded, and 1 are too long" in caplog.text
    assert "the conversation has 3 frames and the model numbers 2" in caplog.text


@torch.no_grad()
def test_the_likeliest_letter_is_that_of_a_whole_row(module: FoveatedVLMModule) -> None:
    """It is compared with the log-likelihood of the prompt followed by each letter, computed separately."""
    asked = question("a", 0)
    frames, _ = multiple_choice._frames(module, asked)
    inputs = module.as_input(frames)
    alone = []
    for letter in "ABC":
        row = module.collator.prompt((Turn("user", asked.prompt), Turn("assistant", letter)))
        assert module.tokenizer.decode(row.ids[row.prompt :], special=True).startswith(letter)
        alone.append(float(answer_scores(module.network, inputs, [3], [row], [0], "coarse_fine")[0]))
    for right in range(3):
        figures = evaluate_choices(module, [question("a", right)], ["coarse_fine"], 4)
        assert figures["coarse_fine"]["accuracy_likelihood"] == float(right == int(np.argmax(alone)))


def test_a_set_of_which_nothing_is_left_keeps_what_others_gave(
    module: FoveatedVLMModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"mvbench": [question("a", 0)], "mlvu": [question("broken", 0)]}
    monkeypatch.setattr(video_text, "read_benchmark", lambda name, root: Benchmark(sets[name], 0))
    settings = {"mode": "coarse_fine", "split": "none", "max_frames": None, "limit_batches": None}
    kept = tmp_path / "answers.jsonl"

    def evaluated(*names: str, **others: Any) -> dict[str, Any]:
        cfg = {
            **settings,
            **others,
            "max_new_tokens": 4,
            "vqa_answers": str(kept),
            "vqa_benchmarks": dict.fromkeys(names, "x"),
        }
        data = SimpleNamespace(collator=None, prepare_data=bool, setup=bool, val_dataloader=list)
        run: Any = SimpleNamespace(module=module, stored_data=lambda _: data)
        return evaluate_answers(run, OmegaConf.create(cfg))

    with pytest.raises(ValueError, match="no question is left of mlvu: 1 whose videos cannot be decoded and 0 that"):
        evaluated("mlvu")
    assert kept.read_text() == ""  # answers of an earlier run are removed
    monkeypatch.setattr(video_text, "evaluate_modes", lambda *_: {"coarse_fine": {}})
    with pytest.raises(ValueError, match="no question is left of mlvu: 1 whose videos cannot be decoded and 0 that"):
        evaluated("mlvu", split="val", data=None)
    found = evaluated("mvbench", "mlvu")
    assert found["mlvu"] == {
        "questions": 0,
        "unreadable": 1,
        "too_long": 0,
        "without_video": 0,
        "unscored": 0,
        "open_ended": 0,
    }
    assert found["mvbench"]["questions"] == len(kept.read_text().splitlines()) == 1
    kept.unlink()
    monkeypatch.setitem(sets, "mlvu", [question("a", 7)])  # 7 is no option: this set ends the evaluation
    monkeypatch.setattr(multiple_choice, "_likeliest", lambda *given: [0] if given[1][0].answer == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluated("mvbench", "mlvu")
    assert len(kept.read_text().splitlines()) == 1


def test_generated_answers_are_read_as_options(module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"Which colour?": "The answer is B.", "And now?": "A thing", "Last?": "green"}

    def answers(
        network: object, tokenizer: object, frames: object, counts: object, prompts: list, *_: object, **__: object
    ) -> Answers:
        asked = [next(text for text in said if text in module.tokenizer.decode(prompt.ids)) for prompt in prompts]
        return Answers([said[text] for text in asked], [], None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(multiple_choice, "generate", answers)
    asked = [question("a", 1), question("a", 0, "And now?"), question("a", 2, "Last?")]
    figures = evaluate_choices(module, asked, ["coarse_fine"])["coarse_fine"]
    assert figures["accuracy_generation"] == pytest.approx(2 / 3, abs=1e-5)
    assert figures["share_without_option"] == pytest.approx(1 / 3, abs=1e-5)
    asked[2] = replace(asked[2], task="place", groups=("domain/indoors",))
    figures = evaluate_choices(module, asked, ["coarse_fine"])["coarse_fine"]
    assert (figures["accuracy_generation/colour"], figures["accuracy_generation/place"]) == (0.5, 1.0)
    assert figures["accuracy_generation/domain/indoors"] == 1.0
    assert figures["accuracy_generation_task_mean"] == 0.75


@pytest.mark.parametrize("most", [3, 20])
def test_generated_answers_are_as_long_as_the_setting_allows(
    most: int, module: FoveatedVLMModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is untrained, so its answers have no end. They are generated through the command's function."""
    lengths: list[int] = []
    generate = multiple_choice.generate

    def counted(*given: Any, **named: Any) -> Answers:
        answers = generate(*given, **named)
        lengths.extend(map(len, answers.ids))
        return answers

    module.tokenizer.stop_tokens = frozenset()
    monkeypatch.setattr(multiple_choice, "generate", counted)
    monkeypatch.setattr(
        video_text,
        "read_benchmark",
        lambda *_: SimpleNamespace(questions=[question("a", 1)], without_video=0, unscored=0, open_ended=0),
    )
    settings = {"mode": "coarse_fine", "split": "none", "vqa_answers": None, "vqa_benchmarks": {"mvbench": "x"}}
    cfg = OmegaConf.create({**settings, "max_frames": None, "limit_batches": None, "max_new_tokens": most})
    evaluate_answers(SimpleNamespace(module=module), cfg)  # type: ignore[arg-type]
    assert lengths == [most]


def test_mini_sets_are_scored_from_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MVBench with start and end, MLVU and Video-MME in the form of the hub; the answers state which second is
    shown."""
    made = small_module(tmp_path, TEXTS)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (made.network.backbone.mean, made.network.backbone.std)
    )

    def says_the_second(
        network: object,
        tokenizer: object,
        frames: torch.Tensor,
        counts: object,
        prompts: list,
        *_: object,
        **__: object,
    ) -> Answers:
        shade = 255 * float((frames[0, 0] * std + mean).mean())  # 0 at second 0, 120 at second 1
        return Answers([f"The answer is ({'AB'[round(shade / 120)]})."] * len(prompts), [], None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(multiple_choice, "generate", says_the_second)
    content, asked = small_video(), {"question": "Which second?", "candidates": ["zero", "one"]}
    for place in ("mvbench/star/Charades_v1_480", "mlvu/video/1_plotQA", "mme/data"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.mp4").write_bytes(content)
    clips = [
        {**asked, "video": "a.mp4", "start": 1.0, "end": 2.0, "answer": "one"},
        {**asked, "video": "a.mp4", "start": 0.0, "end": 1.0, "answer": "zero"},
        {**asked, "video": "gone.mp4", "start": 0.0, "end": 1.0, "answer": "zero"},
    ]
    for place, entries in (
        ("mvbench/json/action_sequence.json", clips),
        ("mlvu/json/1_plotQA.json", [{**asked, "video": "a.mp4", "question_type": "plotQA", "answer": "zero"}]),
    ):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps(entries))
    row = {"videoID": "a", "duration": "short", "domain": "Knowledge", "question": "Which second?", "answer": "B"}
    (tmp_path / "mme" / "videomme").mkdir()
    parquet.write_table(
        arrow.Table.from_pylist([{**row, "options": ["A. zero", "B. one"]}]),
        tmp_path / "mme" / "videomme" / "t.parquet",
    )
    folders = {"mvbench": "mvbench", "mlvu": "mlvu", "video_mme": "mme"}
    cfg = OmegaConf.create(
        {
            "mode": "coarse_fine",
            "split": "none",
            "max_frames": None,
            "limit_batches": None,
            "max_new_tokens": 4,
            "vqa_answers": str(tmp_path / "answers.jsonl"),
            "vqa_benchmarks": {name: str(tmp_path / folder) for name, folder in folders.items()},
        }
    )
    result = evaluate_answers(SimpleNamespace(module=made), cfg)  # type: ignore[arg-type]
    found = {name: (result[name]["questions"], result[name]["without_video"]) for name in folders}
    assert found == {"mvbench": (2, 1), "mlvu": (1, 0), "video_mme": (1, 0)}
    right = {name: result[name]["coarse_fine"]["accuracy_generation"] for name in folders}
    assert right == {"mvbench": 1.0, "mlvu": 1.0, "video_mme": 0.0}
    assert result["video_mme"]["coarse_fine"]["accuracy_generation/domain/Knowledge"] == 0.0
    assert result["mvbench"]["coarse_fine"]["accuracy_likelihood"] in (0.0, 0.5, 1.0)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(a["benchmark"], a["clip"], a["generated"], a["named"], a["answer"]) for a in answers] == [
        ("mvbench", [1.0, 2.0], "The answer is (B).", "B", "B"),
        ("mvbench", [0.0, 1.0], "The answer is (A).", "A", "A"),
        ("mlvu", None, "The answer is (A).", "A", "A"),
        ("video_mme", None, "The answer is (A).", "A", "B"),
    ]
    for changed, words in (
        ({"vqa_benchmarks": {}, "split": "val"}, "name one"),
        ({"vqa_benchmarks": {}, "vqa_answers": None}, "nothing"),
        ({"vqa_answers": str(tmp_path)}, "is a folder: name a file in it"),
        ({"vqa_answers": "/proc/answers.jsonl"}, r"vqa_answers=/proc/answers\.jsonl cannot be written"),
        ({"mode": []}, r"mode=\[\]: FoveatedVLM has coarse_only"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it must be at least 1"),
        ({"limit_batches": -1}, "limit_batches=-1: it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_answers(SimpleNamespace(module=made), OmegaConf.create({**cfg, **changed}))  # type: ignore[arg-type]


def test_whole_videos_of_mvbench_are_shown_as_its_script_shows_them(tmp_path: Path) -> None:
    """40 seconds in 16 frames: MVBench takes the middles of equal parts, other sets take the first, the last and frames
    between."""
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
    for name in ("mvbench", "mlvu"):
        (tmp_path / name / "perception" / "videos").mkdir(parents=True)
        (tmp_path / name / "state_change.json").write_text(json.dumps([entry]))
        with av.open(str(tmp_path / name / "perception" / "videos" / "a.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for number in range(200):  # the brightness encodes the second
                image = np.full((32, 32, 3), 40 + 5 * (number // 5), np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode(None))
    module: Any = SimpleNamespace(image_options={"image_size": 16, "fit": "stretch", "max_frames": 16})

    def shown(name: str) -> tuple[list[int], tuple[float, ...]]:
        (question,) = read_benchmark(name, tmp_path / name).questions
        assert question.clip is None
        frames, seconds = multiple_choice._frames(module, question)
        return [round((float(frame.mean()) - 40) / 5) for frame in frames], seconds

    part = (200 - 1) / 16  # get_index of its script, with the last frame's number for the number of frames
    of_script = [int(part / 2 + np.round(part * number)) // 5 for number in range(16)]
    assert shown("mvbench") == (of_script, tuple(2.5 * number for number in range(16)))
    assert shown("mlvu")[0] == list(evenly(40, 16))
    assert (of_script[0], shown("mlvu")[0][0]) == (1, 0)

    folder = tmp_path / "mvbench" / "perception" / "videos" / "a.mp4"
    folder.unlink()
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (40 + 5 * number,) * 3).save(folder / f"{number}.png")
    assert shown("mvbench")[0] == [0, 1, 2, 3], "of a short folder every image"
