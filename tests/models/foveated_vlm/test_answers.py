"""`keygrip generate`: many videos and questions in batches, text alone, conversations of a file, bad videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlm_parts import small_module

from keygrip import generate
from keygrip.config import compose
from keygrip.inference import answers
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.module import FoveatedVLMModule

TEXTS = ["Which digit is on the red cube? And which on the blue one? 7. Sure?"] * 3
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def module(tmp_path: Path) -> FoveatedVLMModule:
    return small_module(tmp_path, TEXTS, query_source="coarse")


@pytest.fixture
def run(module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(answers, "find_checkpoint", lambda path, step: path)
    monkeypatch.setattr(answers, "load_module", lambda path, **_: module)
    return lambda *overrides: generate.run(compose("generate", ["checkpoint=x", "max_new_tokens=6", *overrides]))


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Folders of 3, 1 and 2 frames."""
    generator = np.random.default_rng(0)
    folders = []
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = generator.integers(0, 255, (28, 28, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
        folders.append(tmp_path / name)
    return folders


def listed(paths: list[Path]) -> str:
    return f"video=[{','.join(map(str, paths))}]"


def test_batches_give_what_all_together_do(run: Run, videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    whole = answers.generate

    def counted(network: Any, tokenizer: Any, frames: Any, counts: list[int], *rest: Any, **named: Any) -> Any:
        batches.append(counts)
        return whole(network, tokenizer, frames, counts, *rest, **named)

    monkeypatch.setattr(answers, "generate", counted)
    asked = [listed(videos), 'question=["Which digit?","Sure?"]']
    together = run(*asked)
    apart = run(*asked, "batch_frames=4")
    assert batches == [[3, 1, 2], [3], [1, 2]]  # padding counts
    assert apart["answers"] == together["answers"]
    assert [(Path(each["video"]).name, each["question"]) for each in apart["answers"]] == [
        (name, question) for name in "abc" for question in ("Which digit?", "Sure?")
    ]
    assert together["frames"] == apart["frames"] == 6
    assert run(*asked, "stream=true")["answers"] == together["answers"]
    assert run(*asked, "max_frames=1")["frames"] == 3


def test_videos_that_cannot_be_read_are_named_and_the_others_answered(run: Run, videos: list[Path]) -> None:
    broken, missing = videos[0].parent / "broken.mp4", videos[0].parent / "missing.mp4"
    broken.write_bytes(b"no video")
    alone = run(listed(videos[:1]), "question=Sure?")
    found = run(listed([broken, videos[0], missing]), "question=Sure?")
    assert found["answers"] == alone["answers"]
    assert "unreadable" not in alone
    assert set(found["unreadable"]) == {str(broken), str(missing)}
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        run(listed([broken, broken]), "question=Sure?")


def test_text_alone(run: Run, module: FoveatedVLMModule) -> None:
    wanted = VideoChat(module).generate([{"role": "user", "content": "Which digit?"}], 6)
    for more in ([], ["stream=true"]):
        found = run("video=null", "question=Which digit?", *more)
        assert found["answers"] == [{"video": None, "question": "Which digit?", "answer": wanted}]


def test_times_are_told_to_a_stream_too(run: Run, module: FoveatedVLMModule, videos: list[Path]) -> None:
    module.collator.timestamps = True
    asked = [listed(videos), "question=Sure?"]
    assert run(*asked, "stream=true")["answers"] == run(*asked)["answers"]


def test_conversations_of_a_file(
    run: Run, module: FoveatedVLMModule, videos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Several turns, a video between words, text alone."""
    video = {"type": "video", "video": str(videos[0])}
    words = {"type": "text", "text": "Which digit?"}
    talks = [
        [{"role": "user", "content": [video, words]}],
        [
            {"role": "user", "content": [words, video, words]},
            {"role": "assistant", "content": "7."},
            {"role": "user", "content": "Sure?"},
        ],
        [{"role": "user", "content": "Sure?\u2028And?"}],
    ]
    file = videos[0].parent / "talks.jsonl"
    lines = [json.dumps(talks[0]), "", json.dumps({"messages": talks[1]}), json.dumps(talks[2], ensure_ascii=False)]
    file.write_text("\n".join(lines))
    wanted = VideoChat(module).generate(talks, 6)
    found = run(f"conversations={file}")
    assert found["answers"] == [{"conversation": n, "answer": text} for n, text in enumerate(wanted, 1)]
    assert run(f"conversations={file}", "stream=true")["answers"] == found["answers"]
    assert "[2] " in capsys.readouterr().err


def test_conversations_that_cannot_be_read_are_named_and_the_others_answered(run: Run, videos: list[Path]) -> None:
    broken = videos[0].parent / "broken.mp4"
    broken.write_bytes(b"no video")
    talks = [
        [{"role": "user", "content": [{"type": "video", "video": str(broken)}, {"type": "text", "text": "Sure?"}]}],
        [{"role": "user", "content": "Sure?"}],
        [{"role": "user", "content": "Sure? " * 100}],
    ]
    file = videos[0].parent / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, talks)))
    found = run(f"conversations={file}")
    assert [each["conversation"] for each in found["answers"]] == [2]
    assert "broken.mp4" in found["unreadable"]["1"]
    assert "the language model holds 128" in found["unreadable"]["3"]
    assert run(f"conversations={file}", "stream=true")["answers"] == found["answers"]
    file.write_text(json.dumps(talks[0]))
    with pytest.raises(ValueError, match="no conversation can be read"):
        run(f"conversations={file}")


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(
    run: Run, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(answers, "load_module")
    file = videos[0].parent / "talks.jsonl"
    file.write_text('[{"role": "user", "content": "?"}]\n{"turns": []}\n')
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 2: it is no list of messages"):
        run(f"conversations={file}")
    with pytest.raises(ValueError, match="in place of video and question"):
        run(f"conversations={file}", "question=Sure?")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        run("conversations=none.jsonl")
    with pytest.raises(ValueError, match="max_frames=0: it must be at least 1"):
        run(listed(videos), "question=Sure?", "max_frames=0")
    with pytest.raises(ValueError, match="leave one out"):
        run(listed(videos), "question=Sure?", "stream=true", "figure=x.png")
    with pytest.raises(FileNotFoundError, match=r"no video, image or folder at none\.mp4"):
        run("video=[none.mp4,nothing.mp4]", "question=Sure?")
    with pytest.raises(ValueError, match="holds 64 answers at most, not 66"):
        run(listed(videos), f"question=[{','.join('Sure?' for _ in range(22))}]", "figure=x.png")
    for asked in (["video=[]", "question=Sure?"], [listed(videos), "question=null"]):
        with pytest.raises(ValueError, match="at least one of each"):
            run(*asked)


def test_a_conversation_with_another_form_is_named_by_its_number(run: Run, videos: list[Path]) -> None:
    file = videos[0].parent / "talks.jsonl"
    file.write_text('[{"role": "user", "content": "?"}]\n["hello"]\n')
    with pytest.raises(ValueError, match=r"conversation 2 of .*talks\.jsonl: a message is no object but 'hello'"):
        run(f"conversations={file}")
