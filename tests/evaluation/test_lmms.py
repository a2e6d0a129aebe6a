"""The adapter for lmms-eval, with the real package: it is found by name, and receives requests in the forms of real
tasks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import small_video
from vlm_parts import small_module

if TYPE_CHECKING:
    from keygrip.evaluation.lmms import KeygripModel

pytestmark = pytest.mark.lmms
DOCUMENTS = [
    {"video": "a", "question": "What is it?", "candidates": ["red", "blue"], "answer": "red"},
    {"video": "b", "question": "What was it?", "candidates": ["red", "blue"], "answer": "blue"},
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeygripModel:
    from keygrip.evaluation import lmms

    # Video-MME's prompt is long
    module = small_module(tmp_path, ["What is it? (A) red (B) blue Best option: ("] * 3, context=512)
    monkeypatch.setattr(lmms, "load_module", lambda *_, **__: module)
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(3):
            shade = np.full((30, 40, 3), 60 * number + ord(name) % 7, np.uint8)
            Image.fromarray(shade).save(tmp_path / name / f"{number}.png")
    made = lmms.KeygripModel.create_from_arg_string("checkpoint=run,max_frames=2", {"batch_size": 1, "device": "cpu"})
    made.task_dict = {"mini": {"test": DOCUMENTS}}
    made.root = tmp_path
    return made


def instances(model: Any, kind: str, second: Any) -> list[Any]:
    from lmms_eval.api.instance import Instance

    def see(document: dict[str, Any]) -> list[str]:
        return [str(model.root / document["video"])]

    return [
        Instance(
            request_type=kind,
            arguments=(f"<video>\n{document['question']}", second, see, number, "mini", "test"),
            idx=0,
            metadata={"task": "mini", "doc_id": number, "repeats": 1},
        )
        for number, document in enumerate(DOCUMENTS)
    ]


@pytest.mark.parametrize("first", ["lmms_eval.models", "keygrip.evaluation.lmms"])
def test_lmms_eval_finds_the_model_by_name(first: str) -> None:
    """The entry point of the installed package is used, whichever of the two is imported first."""
    code = f"import {first}; from lmms_eval.models import get_model; print(get_model('keygrip').__module__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split()[-1:] == ["keygrip.evaluation.lmms"], found.stderr
    assert "Failed to load" not in found.stderr


def test_answers_end_where_the_task_says(model: KeygripModel) -> None:
    first, _ = model.generate_until(instances(model, "generate_until", {"max_new_tokens": 6, "until": []}))
    assert isinstance(first, str)
    assert first == model.generate_until(instances(model, "generate_until", {"max_new_tokens": 6}))[0]
    if len(first) > 2:
        stopped = model.generate_until(instances(model, "generate_until", {"max_new_tokens": 6, "until": first[2]}))
        assert stopped[0] == first.split(first[2])[0].strip()


@torch.no_grad()
def test_likelihoods_are_those_of_the_target_behind_the_prompt(model: KeygripModel) -> None:
    from keygrip.data.batches import Turn

    found = model.loglikelihood(instances(model, "loglikelihood", lambda document: document["answer"]))
    module = model.module
    inputs, counts, seconds = model._video(lambda d: [str(model.root / d["video"])], "mini", "test", 0)
    assert (counts, seconds) == ([2], [(0.0, 2.0)])
    row = module.collator.prompt((Turn("user", "What is it?"), Turn("assistant", "red")))
    from keygrip.models.foveated_vlm.generation import rows_of

    rows = rows_of([row], [0], counts, inputs.device)
    output = module.network(inputs, rows, model.mode)
    logits = module.network.language.logits(output.hidden).log_softmax(-1)
    words = [n for n in range(row.prompt, len(row.ids)) if row.answer[n]][:-1]
    at = output.layout.text_at[0]
    expected = sum(float(logits[0, at[n] - 1, row.ids[n]]) for n in words)
    assert found[0].text[0] == pytest.approx(expected, abs=1e-3)


def test_images_without_a_common_time_are_numbered_by_a_clock_of_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.api.instance import Instance

    from keygrip.evaluation import lmms
    from keygrip.inference.video_chat import VideoChat

    module = small_module(tmp_path, ["What is it?"] * 3, context=512, frame_clock="seconds")
    monkeypatch.setattr(lmms, "load_module", lambda *_, **__: module)
    model = lmms.KeygripModel.create_from_arg_string("checkpoint=run", {"batch_size": 1, "device": "cpu"})
    model.task_dict = {"mini": {"test": DOCUMENTS}}
    images = [Image.new("RGB", (30, 30), shade) for shade in ("red", "blue")]
    asked = Instance(
        request_type="generate_until",
        arguments=("What is it?", {"max_new_tokens": 4}, lambda _: images, 0, "mini", "test"),
        idx=0,
        metadata={"task": "mini", "doc_id": 0, "repeats": 1},
    )
    (said,) = model.generate_until([asked])
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]
    assert said == VideoChat(module).generate([{"role": "user", "content": content}], 4)


def test_a_part_of_a_video_is_read(model: KeygripModel) -> None:
    (model.root / "v.mp4").write_bytes(small_video())  # two seconds
    whole = {"type": "video", "url": str(model.root / "v.mp4")}
    _, counts, seconds = model._video(lambda _: [whole], "mini", "test", 0)
    assert counts == [2]
    _, counts, seconds = model._video(lambda _: [whole | {"video_start": 1.0, "video_end": 2.0}], "mini", "test", 0)
    assert (counts, seconds) == ([1], [(0.0,)])
    with pytest.raises(ValueError, match="needs its path, video_start and video_end"):
        model._video(lambda _: [whole | {"video_start": 1.0}], "mini", "test", 0)


def test_a_video_is_encoded_once_for_requests_that_follow_each_other(
    model: KeygripModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = instances(model, "generate_until", {"max_new_tokens": 3})
    wanted = model.generate_until(asked)
    encode, encodes = model.module.network.encode, []
    monkeypatch.setattr(model.module.network, "encode", lambda frames: (encodes.append(1), encode(frames))[1])
    assert model.generate_until([asked[0], asked[0], asked[1], asked[0]]) == [wanted[n] for n in (0, 0, 1, 0)]
    assert len(encodes) == 3


def test_requests_that_fail_are_named_and_the_others_answered(
    model: KeygripModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A video that does not exist, one whose task exits Python, and one that cannot be decoded."""
    from lmms_eval.api.instance import Instance

    def leave(document: dict[str, Any]) -> list[str]:
        raise SystemExit("video path does not exist")

    (model.root / "broken.mp4").write_bytes(b"no video")
    asked = instances(model, "generate_until", {"max_new_tokens": 4})
    wanted = model.generate_until(asked)
    sees = (lambda _: [str(model.root / "gone.mp4")], leave, lambda _: [str(model.root / "broken.mp4")])
    bad = [
        Instance(
            request_type="generate_until",
            arguments=("What is it?", {"max_new_tokens": 4}, see, 0, "mini", "test"),
            idx=0,
            metadata={"task": "mini", "doc_id": 0, "repeats": 1},
        )
        for see in sees
    ]
    assert model.generate_until([asked[0], *bad, asked[1]]) == [wanted[0], "-", "-", "-", wanted[1]]
    for words in ("document 0 of mini, test", "gone.mp4", "video path does not exist", "broken.mp4", "3 of 5"):
        assert words in caplog.text
    with pytest.raises(ValueError, match="all of 3 requests failed"):
        model.generate_until(bad)
    with pytest.raises(ValueError, match=r"more than max_failed_share=0\.05 allows"):
        model.generate_until([*asked * 5, *bad * 64])
    options = instances(model, "loglikelihood", lambda document: document["answer"])
    assert model.loglikelihood([options[0]])[0].text[0] > -float("inf")


def test_the_response_cache_asks_failed_requests_again(
    model: KeygripModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the cache restores responses from its log, as in a second run of several processes."""
    from lmms_eval.api.instance import unwrap_generation_output
    from lmms_eval.caching.response_cache import ResponseCache

    def run(kind: str, second: Any) -> list[Any]:
        cache = ResponseCache(str(tmp_path / "cache.db"), str(tmp_path / "cache.jsonl"), "keygrip|checkpoint=run")
        try:
            found = cache.execute(model, kind, instances(model, kind, second))
        finally:
            cache.close()
        return [unwrap_generation_output(each)[0] for each in found]

    settings = {"max_new_tokens": 4}
    wanted = model.generate_until(instances(model, "generate_until", settings))
    pairs = [each.text for each in model.loglikelihood(instances(model, "loglikelihood", " red"))]
    (tmp_path / "b").rename(tmp_path / "away")
    assert run("generate_until", settings) == [wanted[0], "-"]
    assert run("loglikelihood", " red") == [pairs[0], (float("inf"), False)]
    (tmp_path / "away").rename(tmp_path / "b")
    asked: list[int] = []
    answer = type(model)._answer.__get__(model)
    monkeypatch.setattr(model, "_answer", lambda *given: (asked.append(given[0].doc_id), answer(*given))[1])
    assert run("generate_until", settings) == wanted
    assert asked == [1]
    assert run("generate_until", settings) == wanted
    assert asked == [1]
    assert [run("loglikelihood", " red") for _ in range(2)] == [pairs] * 2


def test_each_process_of_several_knows_its_place(
    model: KeygripModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval distributes the documents by these values, and gathers counts on the model's device."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    second = type(model)("run", device="cpu")
    assert (second.rank, second.world_size, second.device.type) == (1, 2, "cpu")


@pytest.mark.parametrize("task", ["mvbench", "videomme"])
def test_documents_of_the_real_tasks_are_answered_and_scored_by_their_own_functions(
    task: str, model: KeygripModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents in the form of MVBench or Video-MME, with lmms-eval's own prompts, paths and scores. The video of
    one document is missing, and it counts as wrong."""
    from lmms_eval.api.instance import Instance

    utils = importlib.import_module(f"lmms_eval.tasks.{task}.utils")
    monkeypatch.setattr(utils, "base_cache_dir", str(tmp_path))
    place = {"mvbench": "mvbench_video/ssv2_video_mp4", "videomme": "videomme/data"}[task]
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "a.mp4").write_bytes(small_video())
    settings = {"sub_task": "action_antonym", "post_prompt": "Only give the best option.\n"}
    if task == "mvbench":
        own = {"video": "a.mp4", "question": "Which?", "candidates": ["red", "blue"], "answer": "blue"}
        documents = [own, own | {"video": "gone.mp4"}]
        see, ask = partial(utils.mvbench_doc_to_visual, lmms_eval_specific_kwargs=settings), utils.mvbench_doc_to_text
        score, total = utils.mvbench_process_results, utils.mvbench_aggregate_results
        figure = "mvbench_accuracy"
    else:
        own = {
            "videoID": "a",
            "question_id": "1",
            "question": "Which?",
            "options": ["A. red", "B. blue"],
            "answer": "B",
        }
        own |= {"duration": "short", "domain": "Knowledge", "sub_category": "Law", "task_type": "Counting Problem"}
        documents = [own, own | {"videoID": "gone"}]
        see, ask = utils.videomme_doc_to_visual, utils.videomme_doc_to_text
        score, total = utils.videomme_process_results, utils.videomme_aggregate_results
        figure = "videomme_perception_score"
    model.task_dict = {task: {"test": documents}}
    asked = [
        Instance(
            request_type="generate_until",
            arguments=(ask(document, settings), {"max_new_tokens": 16, "temperature": 0}, see, number, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": number, "repeats": 1},
        )
        for number, document in enumerate(documents)
    ]
    said: list[str] = []
    monkeypatch.setattr(model, "_answer", lambda *given: (said.append(answer(*given)), "B")[1])
    answer = type(model)._answer.__get__(model)
    answers = model.generate_until(asked)
    assert answers == ["B", "-"]
    assert len(said) == 1
    results = [score(document, [text])[figure] for document, text in zip(documents, answers, strict=True)]
    assert total(results) == 50.0


def test_a_question_to_which_nothing_is_said_stays_in_mvbenchs_accuracy(
    model: KeygripModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score of lmms-eval leaves out empty answers."""
    from lmms_eval.tasks.mvbench import utils

    from keygrip.evaluation import lmms

    texts = iter(["B", "  "])
    monkeypatch.setattr(lmms, "generate", lambda *_, **__: SimpleNamespace(texts=[next(texts)], ids=[[5]]))
    answers = model.generate_until(instances(model, "generate_until", {"max_new_tokens": 4}))
    assert answers == ["B", "-"]
    document = {"candidates": ["red", "blue"], "answer": "blue"}
    results = [utils.mvbench_process_results(document, [text])["mvbench_accuracy"] for text in answers]
    assert utils.mvbench_aggregate_results(results) == 50.0


def test_a_small_task_of_its_own_format_is_scored(model: KeygripModel, tmp_path: Path) -> None:
    """lmms-eval's evaluator runs from the YAML of a task to its figure; the figure matches the answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [{**document, "path": str(tmp_path / document["video"])} for document in DOCUMENTS]
    (tmp_path / "mini.json").write_text(json.dumps(rows))
    (tmp_path / "functions.py").write_text(
        "def see(document):\n    return [document['path']]\n"
        "def ask(document, settings=None):\n    return document['question']\n"
        "def score(document, results):\n    return {'length': float(len(results[0]))}\n"
    )
    (tmp_path / "mini.yaml").write_text(
        f"""
task: mini_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "mini.json"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.see
doc_to_text: !function functions.ask
doc_to_target: answer
process_results: !function functions.score
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - {{metric: length, aggregation: mean, higher_is_better: true}}
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    said = model.generate_until(instances(model, "generate_until", {"max_new_tokens": 4}))
    found = simple_evaluate(model=model, tasks=["mini_task"], task_manager=manager, batch_size=1, log_samples=False)
    assert found["results"]["mini_task"]["length,none"] == sum(map(len, said)) / 2


def test_a_multiple_choice_task_takes_the_likeliest_option(model: KeygripModel, tmp_path: Path) -> None:
    """lmms-eval's evaluator chooses the option with the lowest value. The video of one document is missing; its answer
    is the second option, so choosing the first is wrong."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from keygrip.data.batches import Turn
    from keygrip.models.foveated_vlm.generation import answer_likelihoods

    options = ["red", "a blue one", "dark", "best option"]
    module, rows = model.module, []
    for name in "ab":
        inputs, counts, seconds = model._video(lambda _, name=name: [str(tmp_path / name)], "mini", "test", 0)
        texts = [
            module.collator.prompt((Turn("user", "What is it?"), Turn("assistant", option)), seconds[0])
            for option in options
        ]
        found = answer_likelihoods(
            module.network, inputs, counts, texts, [0] * len(texts), model.mode, with_end=False, seconds=seconds
        )
        likeliest = int((found.total / found.tokens).argmax())
        rows.append({"path": str(tmp_path / name), "question": "What is it?", "answer": likeliest})
    rows.append({"path": str(tmp_path / "gone.mp4"), "question": "What is it?", "answer": 1})
    (tmp_path / "choice.json").write_text(json.dumps([{**row, "options": options} for row in rows]))
    (tmp_path / "functions.py").write_text(
        "def see(document):\n    return [document['path']]\n"
        "def ask(document, settings=None):\n    return document['question']\n"
        "def options(document):\n    return document['options']\n"
        "def right(document):\n    return document['answer']\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"""
task: choice_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "choice.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function functions.see
doc_to_text: !function functions.ask
doc_to_target: !function functions.right
doc_to_choice: !function functions.options
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["choice_task"], task_manager=manager, batch_size=1, log_samples=False)
    assert found["results"]["choice_task"]["acc,none"] == pytest.approx(2 / 3)
