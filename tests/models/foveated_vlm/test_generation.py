"""Generation with the cache against a reference that computes the whole row again for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vlm_parts import frames_of

from keygrip.models.foveated_vlm.conversations import EncodedText
from keygrip.models.foveated_vlm.generation import answer_scores, generate
from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.foveated_vlm.sampling import Sampling

Build = Callable[..., FoveatedVLM]
COUNTS = [3, 0, 1]


class Letters:
    """Stand-in for a tokenizer: token n is the n-th character."""

    size = 300  # fewer than the embedding table has rows
    stop_tokens = frozenset([299])

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(chr(0x4E00 + n) for n in ids)


def prompt(length: int, at: int, seed: int) -> EncodedText:
    ids = torch.randint(3, 299, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return EncodedText(ids, [False] * length, [False] * length, at, length)


@torch.no_grad()
def by_the_book(
    network: FoveatedVLM, frames: torch.Tensor, text: EncodedText, count: int, mode: str, n: int
) -> list[int]:
    ids = list(text.ids)
    for _ in range(n):
        rows = TextRows(torch.tensor([ids]), [len(ids)], [text.visual_at], [0], [count])
        output = network(frames[None, :count], rows, mode)
        token = int(network.language.logits(output.hidden[0, -1])[: Letters.size].argmax())
        if token in Letters.stop_tokens:
            break
        ids.append(token)
    return ids[len(text.ids) :]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_prompts_of_all_lengths_gives_what_each_gives_alone_without_a_cache(build: Build, mode: str) -> None:
    network, frames = build(), frames_of(COUNTS)
    prompts = [prompt(9, 4, 0), prompt(5, 0, 1), prompt(6, 6, 2), prompt(4, 2, 3)]
    videos = [0, 1, 2, 0]
    answers = generate(network, Letters(), frames, COUNTS, prompts, videos, mode, max_new_tokens=6)
    for text, video, ids in zip(prompts, videos, answers.ids, strict=True):
        assert ids == by_the_book(network, frames[video], text, COUNTS[video], mode, 6)
    assert answers.texts == [Letters.decode(ids) for ids in answers.ids]


def test_drawn_answers_do_not_depend_on_what_else_is_asked(build: Build) -> None:
    network, frames = build(), frames_of(COUNTS)
    prompts = [prompt(9, 4, 0), prompt(5, 0, 1), prompt(6, 6, 2), prompt(4, 2, 3)]
    how: dict[str, Any] = {"max_new_tokens": 6, "sampling": Sampling(1.0, seed=3)}
    together = generate(network, Letters(), frames, COUNTS, prompts, [0, 1, 2, 0], **how).ids
    for own, video, ids in zip(prompts, [0, 1, 2, 0], together, strict=True):
        count = COUNTS[video]
        assert generate(network, Letters(), frames[video : video + 1, :count], [count], [own], [0], **how).ids == [ids]
    other = generate(
        network, Letters(), frames, COUNTS, prompts, [0, 1, 2, 0], **{**how, "sampling": Sampling(1.0, seed=4)}
    ).ids
    assert other != together


def test_an_answer_stops_at_the_end_of_its_turn_while_others_go_on(build: Build) -> None:
    network, frames = build(), frames_of([2])
    prompts = [prompt(5, 2, seed) for seed in range(4)]
    plain = generate(network, Letters(), frames, [2], prompts, [0] * 4, "coarse_only", max_new_tokens=5)
    stop = plain.ids[0][2]

    class Stopping(Letters):
        stop_tokens = frozenset([299, stop])

    stopped = generate(network, Stopping(), frames, [2], prompts, [0] * 4, "coarse_only", max_new_tokens=5)
    for before, after in zip(plain.ids, stopped.ids, strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)
    assert len(stopped.ids[0]) <= 2


def test_tokens_that_the_tokenizer_does_not_have_are_never_said(build: Build) -> None:
    network = build()

    class Few(Letters):
        size, stop_tokens = 10, frozenset([2])

    how: dict[str, Any] = {"sampling": Sampling(5.0), "max_new_tokens": 40}
    answers = generate(network, Few(), frames_of([1]), [1], [prompt(4, 1, 0)], [0], **how)
    assert max(answers.ids[0], default=0) < 10
    again = generate(network, Few(), frames_of([1]), [1], [prompt(4, 1, 0)], [0], **how)
    assert again.ids == answers.ids


def test_answers_that_do_not_fit_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="holds 128"):
        generate(build(), Letters(), frames_of([3]), [3], [prompt(9, 4, 0)], [0], max_new_tokens=120)


def test_scores_of_given_answers_are_their_mean_log_likelihood(build: Build) -> None:
    network, frames = build(), frames_of([2, 1])
    texts = []
    for number, length in enumerate((2, 4)):
        question, answer = prompt(5, 3, 0), prompt(length, 0, 10 + number)
        texts.append(EncodedText(question.ids + answer.ids, [], [False] * 5 + [True] * length, 3, 5))
    scores = answer_scores(network, frames, [2, 1], texts, [0, 1], "coarse_fine")
    for number, (text, count) in enumerate(zip(texts, (2, 1), strict=True)):
        rows = TextRows(torch.tensor([text.ids]), [len(text.ids)], [3], [0], [count])
        with torch.no_grad():
            hidden = network(frames[number : number + 1, :count], rows, "coarse_fine").hidden[0]
            chances = network.language.logits(hidden).log_softmax(-1)
        said = [chances[count + place - 1, text.ids[place]] for place in range(5, len(text.ids))]
        torch.testing.assert_close(scores[number], torch.stack(said).mean(), atol=1e-5, rtol=1e-4)
