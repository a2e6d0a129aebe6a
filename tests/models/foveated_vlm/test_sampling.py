"""Sampled tokens against transformers' own rules, and several answers to one conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from vlm_parts import sensitive_module

from keygrip.inference import video_chat
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.sampling import Sampling

TEXTS = ["Which digit is on the red cube? And which on the blue one? 7. Sure?"] * 3


def asked(frames: int, seed: int = 0, before: str = "") -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 28, 28, 3)).astype(np.uint8)
    video, words = {"type": "video", "video": pixels}, {"type": "text", "text": "Which digit?"}
    said = [{"type": "text", "text": before}] if before else []
    return [{"role": "user", "content": [*said, *([video] if frames else []), words]}]


@pytest.fixture
def chat(tmp_path: Path) -> VideoChat:
    return VideoChat(sensitive_module(tmp_path, TEXTS, query_source="coarse"))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.7), (5, None), (1, None), (8, 0.6), (0, 1), (10**6, 1e-6)])
def test_tokens_are_drawn_from_those_of_transformers_warpers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Also with table rows that have no token (-inf) and with equal logits at the edge of the k most probable
    tokens."""
    logits = 3 * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 40:] = -torch.inf
    logits[0, :20] = 7.0
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p not in (None, 1):
        warpers.append(TopPLogitsWarper(top_p))
    ids = torch.zeros(64, 1, dtype=torch.int64)
    own = Sampling(temperature, 3, top_k, top_p)
    rows = slice(0 if top_p in (None, 1) else 1, None)  # which of equal tokens top_p keeps depends on sorting
    wanted = warpers(ids, logits.clone())
    torch.testing.assert_close(own.kept(logits / temperature)[rows], wanted[rows], rtol=0, atol=0)
    generators = [own.generator(logits.device) for _ in logits]
    drawn = torch.cat([torch.multinomial(row.softmax(-1), 1, generator=own.generator(logits.device)) for row in wanted])
    assert torch.equal(own.next(logits, generators)[rows], drawn[rows])


def test_the_fewest_tokens_are_the_most_probable_one(chat: VideoChat) -> None:
    for talk in (asked(3), asked(2, 1, "In ")):
        greedy = chat.generate(talk, 8)
        for cut in ({"top_k": 1}, {"top_p": 1e-6}):
            assert chat.generate(talk, 8, 2.0, 5, **cut) == greedy
            assert "".join(chat.stream(talk, 8, 2.0, 5, **cut)) == greedy
        free = [chat.generate(talk, 8, 2.0, seed) for seed in range(4)]
        assert free == [chat.generate(talk, 8, 2.0, seed, top_k=0, top_p=1.0) for seed in range(4)]
        assert free != [chat.generate(talk, 8, 2.0, seed, top_p=0.5) for seed in range(4)]


def test_streams_draw_what_generate_does(chat: VideoChat) -> None:
    frames = asked(3)[0]["content"][0]["video"]
    session = chat.stream("Which digit?")
    for frame in frames:
        session.push(frame)
    cut: dict[str, Any] = {"temperature": 2.0, "seed": 4, "top_k": 20, "top_p": 0.8}
    wanted = chat.generate(asked(3), 8, **cut)
    assert wanted != chat.generate(asked(3), 8, temperature=2.0, seed=4)
    assert session.answer(8, **cut) == "".join(chat.stream(asked(3), 8, **cut)) == wanted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.9}, r"top_p=0\.9 has no effect at temperature=0"),
        ({"top_k": 5}, "top_k=5 has no effect at temperature=0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1\.5: give a share above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 0}, "top_p=0: give a share"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p=nan: give a share"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1: give a whole number from 1 on"),
        ({"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5: give a whole number"),
    ],
)
def test_cuts_that_cannot_be_are_refused(chat: VideoChat, settings: dict[str, Any], words: str) -> None:
    session = chat.stream("Which?")
    for refused in (
        lambda: chat.generate(asked(0), 4, **settings),
        lambda: chat.stream(asked(0), 4, **settings),
        lambda: session.answer(4, **settings),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


def test_other_settings_are_refused_with_those_that_there_are(chat: VideoChat) -> None:
    session = chat.stream("Which?")
    for refused, what in (
        (lambda **given: chat.generate(asked(0), 4, **given), r"VideoChat\.generate"),
        (lambda **given: chat.stream(asked(0), 4, **given), r"VideoChat\.stream"),
        (lambda **given: session.answer(4, **given), "a session's answer"),
    ):
        with pytest.raises(
            TypeError, match=rf"{what} has no num_beams: .*max_new_tokens, temperature, seed, top_k, top_p"
        ):
            refused(num_beams=4)
        with pytest.raises(TypeError, match="in place of do_sample: temperature says it"):
            refused(do_sample=True)
    with pytest.raises(TypeError, match="in place of num_return_sequences: samples=n"):
        chat.generate(asked(0), 4, num_return_sequences=3)


def test_samples_are_the_answers_of_the_seeds_that_follow(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a video before the words, text alone and a video between words; also if the samples do not fit into one
    batch."""
    talks = [asked(3), asked(0), asked(1, 1), asked(2, 2, "In ")]
    how: dict[str, Any] = {"temperature": 2.0, "top_p": 0.95}
    alone = [[chat.generate(talk, 6, seed=7 + sample, **how) for sample in range(5)] for talk in talks]
    assert all(len(set(answers)) > 1 for answers in alone)
    assert chat.generate(talks, 6, seed=7, **how) == [answers[0] for answers in alone]
    assert chat.generate(talks, 6, seed=7, samples=5, **how) == alone
    assert chat.generate(talks[0], 6, seed=7, samples=5, **how) == alone[0]
    assert chat.generate(talks[0], 6, seed=7, samples=1, **how) == alone[0][:1]
    assert chat.generate(talks[0], 6, samples=1) == [chat.generate(talks[0], 6)]
    rows: list[int] = []
    encodes: list[int] = []
    whole, encode = video_chat.generate, chat.module.network.encode
    monkeypatch.setattr(video_chat, "generate", lambda *given: (rows.append(len(given[4])), whole(*given))[1])
    monkeypatch.setattr(chat.module.network, "encode", lambda frames: (encodes.append(len(frames)), encode(frames))[1])
    assert chat.generate(talks[:3], 6, seed=7, samples=5, batch_frames=6, **how) == alone[:3]
    # 3 frames: two rows at a time; text alone: five rows, which leave no room for the last one; encoded once
    assert (rows, encodes) == ([2, 2, 1, 5, 5], [3, 1])
    monkeypatch.setattr(video_chat, "BATCH_ROWS", 12)
    rows.clear()
    assert chat.generate(talks[:3], 6, seed=7, samples=5, **how) == alone[:3]
    assert rows == [10, 5]


def test_samples_of_what_cannot_be_read_are_left_out(chat: VideoChat) -> None:
    left_out: dict[int, str] = {}
    found = chat.generate([asked(0), [{"role": "user", "content": 3}]], 4, 1.0, samples=2, left_out=left_out)
    assert found == [chat.generate(asked(0), 4, 1.0, samples=2), ["", ""]]
    assert list(left_out) == [1]


def test_samples_that_cannot_be_are_refused(chat: VideoChat) -> None:
    with pytest.raises(ValueError, match="samples=3: at temperature=0 all answers to a conversation are the same"):
        chat.generate(asked(0), 4, samples=3)
    for none in (0, 1.5):
        with pytest.raises(ValueError, match=f"samples={none}: it must be at least 1"):
            chat.generate(asked(0), 4, 1.0, samples=none)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is no seed"):
        chat.generate(asked(0), 4, 1.0, seed=2**63 - 1, samples=2)


def test_a_share_that_is_reached_exactly_leaves_the_next_token_out() -> None:
    assert Sampling(1.0, top_p=0.5).kept(torch.zeros(1, 2)).isfinite().sum() == 1
