"""`keygrip generate`: batches of videos and questions, text alone, conversations from a file, unreadable videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlm_parts import sensitive_module, small_module

from keygrip import generate
from keygrip.config import compose
from keygrip.data.batches import Turn
from keygrip.inference import answers
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.module import FoveatedVLMModule

TEXTS = ["Which digit is on the red cube? And which on the blue one? 7. Sure?"] * 3
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def module(tmp_path: Path) -> FoveatedVLMModule:
    return sensitive_module(tmp_path, TEXTS, query_source="coarse")


@pytest.fixture
def run(module: FoveatedVLMModule, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(answers, "find_checkpoint", lambda path, step: path)
    monkeypatch.setattr(answers, "load_module", lambda path, **_: module)
    return lambda *overrides: generate.run(compose("generate", ["checkpoint=x", "max_new_tokens=6", *overrides]))


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Folders with 3, 1 and 2 frames."""
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
    batches: list[tuple[list[int], list[int]]] = []
    whole = answers.generate

    def counted(
        network: Any, tokenizer: Any, frames: Any, counts: list[int], prompts: Any, rows: list[int], *rest: Any
    ) -> Any:
        batches.append((counts, rows))
        return whole(network, tokenizer, frames, counts, prompts, rows, *rest)

    monkeypatch.setattr(answers, "generate", counted)
    asked = [listed(videos), 'question=["Which digit?","Sure?"]']
    together = run(*asked)
    apart = run(*asked, "batch_frames=4")
    # padding counts towards batch_frames, and each question needs a row of its own
    assert batches == [
        ([3, 1, 2], [0, 0, 1, 1, 2, 2]),
        *[([3], [0])] * 2,
        *[([count], [0, 0]) for count in (1, 2)],
    ]
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


def test_many_questions_about_a_video_are_answered_in_parts_and_it_is_encoded_once(
    run: Run, module: FoveatedVLMModule, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    encoded: list[int] = []
    whole, encode = answers.generate, module.network.encode
    monkeypatch.setattr(answers, "generate", lambda *given: (parts.append(len(given[4])), whole(*given))[1])
    monkeypatch.setattr(module.network, "encode", lambda frames: (encoded.append(len(frames)), encode(frames))[1])
    questions = ["Which digit?", "Sure?", "And which on the blue one?"]
    found = run(listed(videos[1:]), f"question={json.dumps(questions * 22)}", "batch_frames=1000")
    assert (parts, encoded) == ([64, 64, 4], [3])
    few = run(listed(videos[1:]), f"question={json.dumps(questions)}")["answers"]
    assert found["answers"] == [each for n in (0, 3) for each in few[n : n + 3] * 22]


def test_questions_that_do_not_fit_are_named_and_the_others_answered(
    run: Run, module: FoveatedVLMModule, videos: list[Path]
) -> None:
    """The context has 128 positions: the long question does not fit; another fits with one frame but not with three."""
    alone = run(listed(videos[:2]), "question=Sure?")
    taken = len(module.collator.prompt((Turn("user", "Sure?"),)).ids)
    close = "Sure?" + " 7" * (128 - 6 - taken - 1)  # with answer and one frame it takes 128, if "7" takes one each
    while len(module.collator.prompt((Turn("user", close),)).ids) > 128 - 6 - 1:
        close = close[:-1]
    for more in ([], ["stream=true"]):
        found = run(listed(videos[:2]), f"question={json.dumps(['Sure? ' * 100, 'Sure?', close])}", *more)
        asked = [(Path(each["video"]).name, each["question"]) for each in found["answers"]]
        assert asked == [("a", "Sure?"), ("b", "Sure?"), ("b", close)]
        assert found["answers"][:2] == alone["answers"]
        left = [(Path(each["video"]).name, each["question"]) for each in found["unanswered"]]
        assert left == [("a", "Sure? " * 100), ("a", close), ("b", "Sure? " * 100)]
        assert all("the language model holds 128" in each["reason"] for each in found["unanswered"])
    assert "unanswered" not in alone
    with pytest.raises(ValueError, match=r"no question can be answered; the first: .* the language model holds 128"):
        run(listed(videos[:2]), f"question={'Sure? ' * 100}")


def test_a_video_of_more_frames_than_the_model_numbers_is_named_and_the_others_answered(
    run: Run, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = small_module(tmp_path, TEXTS, frame_numbers=2)
    monkeypatch.setattr(answers, "load_module", lambda path, **_: numbered)
    found = run(listed(videos), "question=Sure?")
    assert [Path(each["video"]).name for each in found["answers"]] == ["b", "c"]
    (left,) = found["unanswered"]
    assert "3 frames and the model numbers 2" in left["reason"]


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf", "-0.5", "1e-40"])
def test_a_temperature_that_is_none_is_refused_before_the_model_is_loaded(
    run: Run, videos: list[Path], temperature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(answers, "load_module")
    with pytest.raises(ValueError, match=rf"temperature={temperature}.*: give 0 .* or a number of at least"):
        run(listed(videos), "question=Sure?", f"temperature={temperature}")


def test_a_figure_shows_the_videos_and_passes_over_text_alone(run: Run, videos: list[Path], tmp_path: Path) -> None:
    paths = f"video=[null,{videos[0]},{videos[2]}]"
    found = run(paths, "question=Sure?", "batch_frames=1", f"figure={tmp_path / 'a.png'}")
    assert (len(found["answers"]), found["figure"]) == (3, str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="or text alone"):
        run("video=null", "question=Sure?", f"figure={tmp_path / 'b.png'}")
    assert not (tmp_path / "b.png").exists()


def test_rows_of_a_figure_of_several_videos_begin_with_their_names(
    run: Run, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def drawn(strips: list[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
        titles.extend(title for title, *_ in strips)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(answers, "draw_attention", drawn)
    monkeypatch.chdir(tmp_path)
    figure = f"figure={tmp_path / 'a.png'}"
    run(f"video=[null,{videos[0]},{videos[0]}]", "question=Sure?", figure)
    assert [title.startswith("Sure?   ") for title in titles] == [True, True]  # one video needs no name
    titles.clear()
    images = [videos[0] / "0.png", videos[1] / "0.png", "c/1.png"]  # two of one name, and a relative path
    run(f"video=[{','.join(map(str, images))}]", "question=[Sure?,Which?]", "batch_frames=2", figure)
    assert [title.partition("?")[0] for title in titles] == [
        f"{name}: {question}" for name in ("a/0.png", "b/0.png", "c/1.png") for question in ("Sure", "Which")
    ]


def test_a_streamed_answer_has_the_room_of_any(run: Run, tmp_path: Path) -> None:
    """A streamed answer may be as long as without a stream: up to the largest max_new_tokens with which all frames
    fit."""
    (tmp_path / "long").mkdir()
    for number in range(8):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / "long" / f"{number}.png")
    question = "Sure? " * 12
    tokens, too_many, found = 1, 128, {}
    while too_many - tokens > 1:
        middle = (tokens + too_many) // 2
        try:
            found = run(f"video={tmp_path / 'long'}", f"question={question}", f"max_new_tokens={middle}")
            tokens = middle
        except ValueError:
            too_many = middle
    assert 1 < tokens < 127
    streamed = run(f"video={tmp_path / 'long'}", f"question={question}", f"max_new_tokens={tokens}", "stream=true")
    assert streamed["answers"] == found["answers"]
    alone = ["video=null", f"question={question}", f"max_new_tokens={tokens + 8}"]  # also the frames' room
    assert run(*alone, "stream=true")["answers"] == run(*alone)["answers"]


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
    """Several turns, a video between words, and text alone."""
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


def test_lines_of_sharegpt_are_answered_as_messages_are(
    run: Run, module: FoveatedVLMModule, videos: list[Path]
) -> None:
    file = videos[0].parent / "talks.jsonl"
    said = [{"from": "human", "value": "<video>\nWhich digit?"}]
    ends = [*said, {"from": "gpt", "value": "7."}]
    file.write_text("\n".join(json.dumps({"conversations": talk, "video": "a"}) for talk in (said, ends)))
    items = [{"type": "video", "video": str(videos[0])}, {"type": "text", "text": "Which digit?"}]
    wanted = VideoChat(module).generate([{"role": "user", "content": items}], 6)
    found = run(f"conversations={file}")
    assert found["answers"] == [{"conversation": 1, "answer": wanted}]
    assert (
        "ends with a user's message, and this one with that of the assistant: leave it out" in found["unreadable"]["2"]
    )


def test_samples_and_cuts_are_those_of_a_chat(run: Run, module: FoveatedVLMModule, videos: list[Path]) -> None:
    """For questions about videos and for conversations; also in several batches."""
    talks = [
        [{"role": "user", "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": question}]}]
        for path in videos
        for question in ("Which digit?", "Sure?")
    ]
    chat, how = VideoChat(module), ["temperature=2", "top_k=50", "top_p=0.9", "seed=3"]
    wanted = chat.generate(talks, 6, 2.0, 3, top_k=50, top_p=0.9, samples=3)
    assert all(len(set(answers)) > 1 for answers in wanted)
    asked = [listed(videos), 'question=["Which digit?","Sure?"]', *how]
    for more in ([], ["batch_frames=4"]):
        found = run(*asked, "samples=3", *more)["answers"]
        assert [each["answers"] for each in found] == wanted
        assert [(Path(each["video"]).name, each["question"]) for each in found[:2]] == [
            ("a", "Which digit?"),
            ("a", "Sure?"),
        ]
    for more in ([], ["stream=true"]):
        assert [each["answer"] for each in run(*asked, *more)["answers"]] == [answers[0] for answers in wanted]
    file = videos[0].parent / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, talks)))
    found = run(f"conversations={file}", *how, "samples=3")["answers"]
    assert found == [{"conversation": n, "answers": answers} for n, answers in enumerate(wanted, 1)]
    streamed = run(f"conversations={file}", *how, "stream=true")["answers"]
    assert [each["answer"] for each in streamed] == [answers[0] for answers in wanted]


def test_conversations_that_cannot_be_read_are_named_and_the_others_answered(run: Run, videos: list[Path]) -> None:
    broken = videos[0].parent / "broken.mp4"
    broken.write_bytes(b"no video")
    talks = [
        [{"role": "user", "content": [{"type": "video", "video": str(broken)}, {"type": "text", "text": "Sure?"}]}],
        [{"role": "user", "content": "Sure?"}],
        [{"role": "user", "content": "Sure? " * 100}],
        [{"role": "user", "content": [{"type": "video", "video": "missing.mp4"}, {"type": "text", "text": "Sure?"}]}],
        [{"role": "user", "content": 3}],
        ["hello"],
        [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}],
        [{"role": "user", "content": "Which digit?"}],
    ]
    file = videos[0].parent / "talks.jsonl"
    file.write_text("\n".join([*map(json.dumps, talks), "no json", '{"messages": []}']))
    found = run(f"conversations={file}")
    assert [each["conversation"] for each in found["answers"]] == [2, 8]
    reasons = {
        "1": "broken.mp4",
        "3": "the language model holds 128",
        "4": "there is no video, image or folder at missing.mp4",
        "5": "the content of a user's message is '3': it is text or a list of items",
        "6": "a message is no object but 'hello'",
        "7": "begins with an answer",
        "9": "talks.jsonl, line 9: ",
        "10": "talks.jsonl, line 10: it is no list of messages",
    }
    assert found["unreadable"].keys() == reasons.keys()
    assert all(reason in found["unreadable"][number] for number, reason in reasons.items())
    streamed = run(f"conversations={file}", "stream=true")
    assert (streamed["answers"], streamed["unreadable"]) == (found["answers"], found["unreadable"])
    alone = videos[0].parent / "alone.jsonl"
    alone.write_text("\n".join(json.dumps(talks[number]) for number in (1, 7)))
    assert [each["answer"] for each in run(f"conversations={alone}")["answers"]] == [
        each["answer"] for each in found["answers"]
    ]
    file.write_text(json.dumps(talks[0]))
    with pytest.raises(ValueError, match="no conversation can be read"):
        run(f"conversations={file}")


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(
    run: Run, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(answers, "load_module")
    file = videos[0].parent / "talks.jsonl"
    file.write_text('{"turns": []}\nno json\n')
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 1: it is no list of messages"):
        run(f"conversations={file}")
    with pytest.raises(ValueError, match="video='': a path is empty"):
        run("video=''", "question=Sure?")
    for odd in ("{a: b}", "[[a,b],c]", "true"):
        with pytest.raises(ValueError, match=r"question holds .*, which is no text"):
            run(listed(videos), f"question={odd}")
    with pytest.raises(ValueError, match="a question is empty"):
        run(listed(videos), "question=['Sure?','']")
    with pytest.raises(ValueError, match=r"figure=\.\.\. shows where queries attended, which this model"):
        run("video=null", "question=Sure?", "figure=x.png")
    with pytest.raises(ValueError, match=r"figure=.* is a folder: name a file in it"):
        run(listed(videos), "question=Sure?", f"figure={videos[0].parent}")
    with pytest.raises(ValueError, match="in place of video and question"):
        run(f"conversations={file}", "question=Sure?")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        run("conversations=none.jsonl")
    with pytest.raises(ValueError, match="max_frames=0: it must be at least 1"):
        run(listed(videos), "question=Sure?", "max_frames=0")
    with pytest.raises(ValueError, match=r"seed=9+ is no seed: give a whole number"):
        run(listed(videos), "question=Sure?", f"seed={'9' * 20}")
    with pytest.raises(ValueError, match=r"figure=a\.txt: it is written as PNG"):
        run(listed(videos), "question=Sure?", "figure=a.txt")
    with pytest.raises(ValueError, match=r"figure=/proc/x\.png cannot be written"):
        run(listed(videos), "question=Sure?", "figure=/proc/x.png")
    with pytest.raises(ValueError, match="leave one out"):
        run(listed(videos), "question=Sure?", "stream=true", "figure=x.png")
    with pytest.raises(FileNotFoundError, match=r"no video, image or folder at none\.mp4"):
        run("video=[none.mp4,nothing.mp4]", "question=Sure?")
    with pytest.raises(ValueError, match="holds 64 answers at most, not 66"):
        run(listed(videos), f"question=[{','.join('Sure?' for _ in range(22))}]", "figure=x.png")
    with pytest.raises(ValueError, match=r"samples=2: stream=True shows one answer to each question"):
        run(listed(videos), "question=Sure?", "temperature=1", "samples=2", "stream=true")
    with pytest.raises(ValueError, match=r"samples=2: figure=x\.png shows one answer to each question"):
        run(listed(videos), "question=Sure?", "temperature=1", "samples=2", "figure=x.png")
    with pytest.raises(ValueError, match="samples=2: at temperature=0 all answers"):
        run(listed(videos), "question=Sure?", "samples=2")
    with pytest.raises(ValueError, match=r"top_p=0\.5 has no effect at temperature=0"):
        run(listed(videos), "question=Sure?", "top_p=0.5")
    for asked in (["video=[]", "question=Sure?"], [listed(videos), "question=null"]):
        with pytest.raises(ValueError, match="at least one of each"):
            run(*asked)
