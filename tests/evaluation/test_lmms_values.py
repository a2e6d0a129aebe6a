"""The values that the adapter for lmms-eval returns, without the package: two of its classes are replaced by
stand-ins."""

from __future__ import annotations

import errno
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_parts import small_module

import keygrip.evaluation
from keygrip.data.batches import Turn
from keygrip.models.foveated_vlm.generation import rows_of

OPTIONS = ("red", "a blue one", "dark", "best option")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A small model behind the adapter, and a document whose video is a folder of two images."""
    classes = {
        "lmms_eval.api.instance": SimpleNamespace(GenerationResult=lambda text: SimpleNamespace(text=text)),
        "lmms_eval.api.model": SimpleNamespace(lmms=type("lmms", (), {"__init__": lambda self: None, "rank": 0})),
    }
    for name in ("lmms_eval", "lmms_eval.api", *classes):
        stand_in = ModuleType(name)
        vars(stand_in).update(vars(classes.get(name, SimpleNamespace())))
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, "keygrip.evaluation.lmms", raising=False)
    monkeypatch.setattr(keygrip.evaluation, "lmms", None, raising=False)  # restored afterwards
    lmms = importlib.import_module("keygrip.evaluation.lmms")
    module = small_module(tmp_path, ["What is it? red a blue one dark best option"] * 3)
    monkeypatch.setattr(lmms, "load_module", lambda *_, **__: module)
    (tmp_path / "a").mkdir()
    for number in range(2):
        Image.fromarray(np.full((30, 40, 3), 90 * number, np.uint8)).save(tmp_path / "a" / f"{number}.png")
    made = lmms.KeygripModel("run", device="cpu")
    made.task_dict = {"mini": {"test": [{"video": str(tmp_path / "a")}, {"video": str(tmp_path / "gone.mp4")}]}}
    yield made
    sys.modules.pop("keygrip.evaluation.lmms", None)  # imported with the stand-ins


def request(target: Any, number: int = 0) -> Any:
    see = lambda document: [document["video"]]  # noqa: E731
    return SimpleNamespace(args=("What is it?", target, see, number, "mini", "test"), task_name="mini")


def test_marks_of_image_positions_are_removed_from_a_question(model: Any) -> None:
    """MMMU writes them with a blank."""
    remove = sys.modules["keygrip.evaluation.lmms"]._remove_image_marks
    assert remove("<image 1> Is <image_2> like <image 12>?\n(A) <image 3>") == "Is like ?\n(A)"


def values(model: Any, *requests: Any) -> list[float]:
    return [found.text[0] for found in model.loglikelihood(requests)]


@torch.no_grad()
def log_likelihoods(model: Any, words: str) -> list[float]:
    """Return the log-likelihood of each token of an answer to the first document, from the logits of its whole row."""
    module = model.module
    inputs, counts, seconds = model._video(lambda document: [document["video"]], "mini", "test", 0)
    row = module.collator.prompt((Turn("user", "What is it?"), Turn("assistant", words)), seconds[0])
    output = module.network(inputs, rows_of([row], [0], counts, inputs.device, seconds), model.mode)
    logits = module.network.language.logits(output.hidden).log_softmax(-1)
    tokens = [n for n in range(row.prompt, len(row.ids)) if row.answer[n]][:-1]
    return [float(logits[0, output.layout.text_at[0, n] - 1, row.ids[n]]) for n in tokens]


def test_an_option_gets_its_mean_loss_of_which_the_lowest_is_the_likeliest(model: Any) -> None:
    """lmms-eval's multiple_choice is `np.argmin` over the values that its models return: float(loss), a mean over
    tokens."""
    found = values(model, *(request(f" {option}") for option in OPTIONS))
    each = [log_likelihoods(model, option) for option in OPTIONS]
    assert len({len(tokens) for tokens in each}) > 1
    assert found == pytest.approx([-float(np.mean(tokens)) for tokens in each], abs=1e-4)
    assert int(np.argmin(found)) == int(np.argmax([np.mean(tokens) for tokens in each]))


def test_the_target_of_a_loglikelihood_task_gets_its_log_likelihood(model: Any) -> None:
    """The perplexity is exp(-mean) of these values."""
    (found,) = values(model, request(lambda document: "a blue one"))
    assert found == pytest.approx(sum(log_likelihoods(model, "a blue one")), abs=1e-3)


def test_what_fails_is_never_the_option_chosen(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = values(model, request(" "), request(" dark", 1), request(" red"), request(lambda _: "dark", 1))
    assert (found[0], found[1], found[3]) == (math.inf, math.inf, -math.inf)
    assert int(np.argmin(found[:3])) == 2
    assert "its target is empty" in caplog.text


def test_the_response_cache_gets_no_likelihood_and_no_error(model: Any) -> None:
    """lmms-eval's `_is_valid_response` is bool(text and text.strip()) for every `GenerationResult`; a stored pair would
    be given to the task as a string. It finds responses by the task's name, also those that only its log has."""
    asked = [request(" red"), request(lambda document: "dark"), request(" dark", 1)]
    found = model.loglikelihood(asked)
    assert [bool(each.text and each.text.strip()) for each in found] == [False] * 3
    losses, greedy = zip(*(each.text for each in found), strict=True)
    assert losses[0] > 0 > losses[1]
    assert losses[2] == math.inf
    assert {type(each) for each in greedy} == {bool}
    assert all(isinstance(each.text, tuple) and len(each.text) == 2 for each in found)
    assert "mini" not in [each.task_name for each in asked]


def test_the_response_cache_serves_answers_but_no_failed_request(model: Any) -> None:
    asked = [request({"max_new_tokens": 4}), request({"max_new_tokens": 4}, 1), request({"max_new_tokens": 4})]
    answers = model.generate_until(asked)
    assert answers[1] == "-" != answers[0] == answers[2]
    assert [each.task_name == "mini" for each in asked] == [True, False, True]
    assert asked[1].args[4] == "mini"


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (MemoryError("a video of 2**40 frames"), False),
        (RuntimeError("a broken stream"), False),
    ],
)
def test_an_error_of_the_machine_is_no_wrong_answer(
    error: Exception, ends: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model._video

    def second_fails(get_visuals: Any, task: str, split: str, index: int) -> Any:
        if index == 1:
            raise error
        return read(get_visuals, task, split, index)

    monkeypatch.setattr(model, "_video", second_fails)
    asked: dict[Any, Callable[[], list[Any]]] = {
        "-": lambda: model.generate_until([answering(max_new_tokens=2), request({"max_new_tokens": 2}, 1)]),
        math.inf: lambda: values(model, request(" red"), request(" red", 1)),
    }
    for wrong, ask in asked.items():
        if ends:
            with pytest.raises(type(error)) as raised:
                ask()
            assert raised.value is error
            assert error.__notes__[-1] == "at document 1 of mini, test"
        else:
            assert ask()[1] == wrong


def test_acc_norm_is_said_to_be_no_result_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """lmms-eval divides the loss per token by the characters of the option: acc_norm prefers the longest."""
    values(model, request(lambda document: "dark"))
    assert "acc_norm" not in caplog.text
    values(model, request(" red"), request(" dark"))
    assert caplog.text.count("ignore acc_norm, where a task has it") == 1


def answering(**settings: Any) -> Any:
    return request(settings)


def test_an_answer_may_be_as_long_as_the_context_has_room_for(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks ask for up to 49152 tokens; the small model's context holds 128."""
    lengths: list[int] = []
    whole = keygrip.evaluation.lmms.generate
    monkeypatch.setattr(
        keygrip.evaluation.lmms,
        "generate",
        lambda *given, **named: (lengths.append(given[7]), whole(*given, **named))[1],
    )
    monkeypatch.setattr(model.module.tokenizer, "stop_tokens", frozenset())
    (long,) = model.generate_until([answering(max_new_tokens=49152)])
    assert model.generate_until([answering(max_new_tokens=49152)]) == [long]
    assert caplog.text.count("mini: answers are cut off where the language model's context ends") == 1
    (short,) = model.generate_until([answering(max_new_tokens=20)])
    prompt = model.module.collator.prompt((Turn("user", "What is it?"),), (0.0, 1.0))
    assert lengths == [128 - len(prompt.ids) - 2] * 2 + [20]
    assert len(short) < len(long)
    assert long.startswith(short)


def test_repeated_requests_are_drawn_anew_and_the_same_again(model: Any) -> None:
    drawn = answering(max_new_tokens=12, temperature=1.0)
    answers = model.generate_until([drawn] * 4)
    assert len(set(answers)) > 1
    assert model.generate_until([drawn] * 4) == answers
    assert model.generate_until([answering(max_new_tokens=12, temperature=1.0)]) == answers[:1]


def test_settings_without_effect_are_said(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.generate_until([answering(max_new_tokens=2, temperature=0, do_sample=False, num_beams=1, top_p=0.1, top_k=5)])
    assert "has no effect" not in caplog.text
    model.generate_until([answering(max_new_tokens=2, temperature=0.7, top_p=0.95, num_beams=5)] * 2)
    assert caplog.text.count("mini: num_beams=5 has no effect") == 1
    assert caplog.text.count("has no effect") == 1


def test_tokens_are_drawn_from_the_most_probable_ones_alone_where_a_task_says_so(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (greedy,) = model.generate_until([answering(max_new_tokens=12)])
    drawn = {"max_new_tokens": 12, "temperature": 1.0}
    free = model.generate_until([answering(**drawn)] * 4)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.9, "do_sample": True}):
        assert model.generate_until([answering(**drawn, **cut)] * 4) == [greedy] * 4
    assert not caplog.text
    for whole in ({"top_k": -1}, {"top_k": 0, "top_p": 1}, {"top_p": 1.0, "top_k": None}):
        assert model.generate_until([answering(**drawn, **whole)] * 4) == free
    few = model.generate_until([answering(**drawn, top_k=2)] * 4)
    assert len(set(few)) > 1
    assert few != free
    assert not caplog.text
    assert model.generate_until([answering(**drawn, top_p=0)]) == [greedy]
    assert "mini: temperature=1.0 with top_p=0 has no effect" in caplog.text


def test_do_sample_says_whether_tokens_are_drawn(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    (greedy,) = model.generate_until([answering(max_new_tokens=12)])
    assert model.generate_until([answering(max_new_tokens=12, temperature=1.0, do_sample=False)] * 4) == [greedy] * 4
    assert "mini: temperature=1.0 with do_sample=False has no effect" in caplog.text
    assert model.generate_until([answering(max_new_tokens=12, do_sample=True)] * 4) == [greedy] * 4
    assert "mini: do_sample=True without a temperature has no effect" in caplog.text
    caplog.clear()
    assert len(set(model.generate_until([answering(max_new_tokens=12, temperature=1.0, do_sample=True)] * 4))) > 1
    assert not caplog.text
