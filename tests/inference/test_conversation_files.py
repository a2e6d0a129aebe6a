"""Files of conversations: media given next to the messages are put in their place, or the line is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keygrip.data.video_text.foreign_text import asked_in, without_placeholders
from keygrip.data.video_text.placeholders import Placeholders
from keygrip.inference.conversation_files import read_conversations


def read(folder: Path, **row: Any) -> list[Any]:
    """Return the conversation of a line, which is followed by a readable one. Raises ValueError with the reason if it
    cannot be read."""
    (folder / "talks.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps([user('?')])}\n")
    talks, broken = read_conversations(folder / "talks.jsonl")
    assert talks[1:] == [[user("?")]]
    if broken:
        raise ValueError(broken[0])
    return talks[0]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_files_beside_the_messages_take_the_places_of_placeholders(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    here = str(tmp_path / "a.mp4")
    video, image = {"type": "video", "video": here}, {"type": "image", "image": "b.jpg"}
    shown = [user([video, words("Which cube?")])]
    assert read(tmp_path, messages=[user("<video>\nWhich cube?")], videos=["a.mp4"]) == shown
    assert read(tmp_path, messages=[user("<image>\nWhich cube?")], video="a.mp4", images=[]) == shown
    assert read(tmp_path, messages=[user("Which cube?")], videos=["a.mp4"]) == shown
    talk = [
        user([{"type": "image"}, words("?")]),
        {"role": "assistant", "content": "<image>"},
        user("In <video> and\n<image>\nwhat? <|vision_start|><|image_pad|><|vision_end|>"),
    ]
    found = read(tmp_path, messages=talk, videos=["a.mp4"], images=["b.jpg"] * 3, system="Be brief.")
    assert found == [
        {"role": "system", "content": "Be brief."},
        user([image, words("?")]),
        talk[1],
        user([words("In "), video, words(" and\n"), image, words("\nwhat?"), image]),
    ]


def test_lines_of_sharegpt_and_llava_are_read(tmp_path: Path) -> None:
    """They equal `messages` with the same words, also with files next to the turns and with a system turn; a bare list
    is read too."""
    (tmp_path / "a.mp4").write_bytes(b"")
    said = [
        {"from": "human", "value": "<video>\nWhich?"},
        {"from": "gpt", "value": "<b>7"},
        {"from": "Human", "value": "?"},
    ]
    same = [user("<video>\nWhich?"), {"role": "assistant", "content": "<b>7"}, user("?")]
    for beside in ({"video": "a.mp4"}, {"videos": ["a.mp4"], "system": "Be brief.", "id": "0", "source": "x"}):
        found = read(tmp_path, conversations=said, **beside)
        assert found == read(tmp_path, messages=same, **beside)
        assert {"type": "video", "video": str(tmp_path / "a.mp4")} in found[-3]["content"]
    assert read(tmp_path, conversations=same, video="a.mp4") == read(tmp_path, messages=same, video="a.mp4")
    items = [{"type": "video", "video": "a.mp4"}, words("Which?")]
    assert read(tmp_path, conversations=[{"from": "human", "value": items}]) == read(tmp_path, messages=[user(items)])
    (tmp_path / "talks.jsonl").write_text(json.dumps([{"from": "system", "value": "Be brief."}, said[2]]))
    assert read_conversations(tmp_path / "talks.jsonl") == (
        [[{"role": "system", "content": "Be brief."}, user("?")]],
        {},
    )
    assert read(tmp_path, messages=[user("!")], conversations=said) == [user("!")]
    with pytest.raises(ValueError, match=r"line 1: a message is from 'robot'; known are human, user, gpt"):
        read(tmp_path, conversations=[{"from": "robot", "value": "?"}])
    with pytest.raises(ValueError, match=r"line 1: it is no list of messages, nor an object with messages or conver"):
        read(tmp_path, texts=[{"user": "?", "assistant": "!"}])


def test_files_that_items_name_are_those_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    here, long = str(tmp_path / "clips" / "a.mp4"), "data:" + "x" * 5000

    def asked(video: Any, path: Any) -> list[Any]:
        shown = [{"type": "video", "video": video}, {"type": "video", "path": path}]
        return [{"role": "system", "content": "clips/a.mp4"}, user([*shown, words("clips/a.mp4")])]

    given, found = asked("clips/a.mp4", ["clips/a.mp4", "gone.png"]), asked(here, [here, "gone.png"])
    assert read(tmp_path, messages=given) == found
    assert read(tmp_path, messages=asked(long, ""), images=[]) == asked(long, "")
    (tmp_path / "talks.jsonl").write_text(json.dumps(given))
    assert read_conversations(tmp_path / "talks.jsonl") == ([found], {})


def test_several_images_under_video_are_the_frames_of_one(tmp_path: Path) -> None:
    for said, key in (("<video>\nWhich?", "video"), ("Which?", "videos"), ("<image>\nWhich?", "videos")):
        talk = read(tmp_path, messages=[user(said)], **{key: ["0.jpg", "1.PNG"]})
        assert talk == [user([{"type": "video", "video": ["0.jpg", "1.PNG"]}, words("Which?")])]
    with pytest.raises(ValueError, match="have 1 places for videos, and it names 2"):
        read(tmp_path, messages=[user("<video>?")], video=["a.mp4", "b.mp4"])
    one = [user([{"type": "video", "video": "0.jpg"}, words("or"), {"type": "video", "video": "1.jpg"}, words("?")])]
    assert read(tmp_path, messages=[user("<video>or<video>?")], video=["0.jpg", "1.jpg"]) == one


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ("<image_2>hi", "<image_1>hi", ("1.jpg", "0.jpg")),
        ("<image_1>hi", "<|image_2|>hi", ("0.jpg", "1.jpg")),
        ("<image_1>hi", "<image_0>hi", ("1.jpg", "0.jpg")),
        ("<image>hi", "<image_1>hi", ("1.jpg", "0.jpg")),
        ("<image 2>hi", "<image 1>hi", ("1.jpg", "0.jpg")),
    ],
)
def test_numbers_say_which_file_a_place_has(first: str, second: str, shown: tuple[str, str], tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "<image_1>"}
    found = read(tmp_path, messages=[user(first), said, user(second)], images=["0.jpg", "1.jpg"])
    one, two = ({"type": "image", "image": name} for name in shown)
    assert found == [user([one, words("hi")]), said, user([two, words("hi")])]


def test_a_number_that_is_said_again_is_no_further_place(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "yes"}
    talk = [user("<image_1>hi"), said, user("and <image_1>?"), said, user("<|image_1|>\nNow, in\n<image_1> too?")]
    found = read(tmp_path, messages=talk, images=["0.jpg"])
    assert found[0]["content"] == [{"type": "image", "image": "0.jpg"}, words("hi")]
    assert [found[2], found[4]] == [user([words("and ?")]), user([words("Now, in\ntoo?")])]
    turns = [("user", message["content"]) for message in talk if message["role"] == "user"]
    places = Placeholders.of(asked_in(turns), ("image",))
    assert places.count(asked_in(turns)) == 1
    trained = [text for _, text in without_placeholders(turns, places)]
    assert trained == ["hi", "and ?", "Now, in\ntoo?"]  # as in training


def test_a_mark_of_what_is_not_named_is_a_word_and_a_path_says_nothing_of_the_kind(tmp_path: Path) -> None:
    shown = {"type": "image", "image": "0.jpg"}
    asked = "Which page uses the <video> tag?"
    for place in ("<image>\n", "<img>videos/0.jpg</img>\n", "<img>videos/0.jpg</img>"):
        assert read(tmp_path, messages=[user(place + asked)], images=["0.jpg"]) == [user([shown, words(asked)])]
    assert read(tmp_path, messages=[user(asked)], images=["0.jpg"]) == [user([shown, words(asked)])]


def test_items_keep_their_own_files_and_text_alone_its_words(tmp_path: Path) -> None:
    own = [user([{"type": "image", "path": "c.jpg"}, {"type": "video"}, words("<image>?")])]
    found = read(tmp_path, messages=own, videos=["d.mp4"])
    assert found[0]["content"] == [own[0]["content"][0], {"type": "video", "video": "d.mp4"}, words("<image>?")]
    assert read(tmp_path, messages=[user("What is <video> in HTML?")], images=None) == [
        user("What is <video> in HTML?")
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [user("<image><image>?")], "images": ["a"]}, "have 2 places for images, and it names 1"),
        ({"messages": [user("<image>?")], "images": ["a", "b"]}, "have 1 places for images, and it names 2"),
        ({"messages": [user("<video>?")], "images": ["a"]}, "have 0 places for images, and it names 1"),
        ({"messages": [user("?")], "images": ["a"], "videos": ["b"]}, "their order is not known"),
        (
            {"messages": [user("<image_3>"), user("<image_1>")], "images": ["a", "b"]},
            r"numbers \[3, 1\], and its .*1 to 2",
        ),
        ({"messages": [user("<image_0><image_2>?")], "images": ["a", "b"]}, r"numbers \[0, 2\], and its images 0 to 1"),
        ({"messages": [user("<image_1><image_2>?")], "images": ["a"]}, "have 2 places for images, and it names 1"),
        ({"messages": [user("<image_1><video_1>?")], "videos": ["a", "b"]}, r"numbers \[1, 1\], and its videos 1 to 2"),
        ({"messages": [user("?")], "video_path": "a.mp4"}, "its `video_path` names an image or a video; known beside"),
        ({"messages": [user("<audio>?")], "audios": ["a.wav"]}, "its `audios` names audio files, and only images and"),
        ({"messages": [user("?")], "images": ["a"], "audio": "a.wav"}, "its `audio` names audio files"),
        ({"messages": [user("?")], "images": [{"bytes": "x"}]}, "its `images` names a file by .*, which is no text"),
    ],
)
def test_files_without_a_place_are_refused_by_name(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"talks\.jsonl, line 1: .*{why}"):
        read(tmp_path, **row)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_files_that_items_name_and_the_line_names_again_are_refused(key: str, tmp_path: Path) -> None:
    named = [user([{"type": "image", key: "a.jpg"}, words("?")])]
    with pytest.raises(ValueError, match=r"line 1: its items name their files, and so do images .*: name each once"):
        read(tmp_path, messages=named, images=["a.jpg"])
    (tmp_path / "talks.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in ({"messages": named, "images": ["a.jpg"]}, {"messages": named}))
    )
    talks, broken = read_conversations(tmp_path / "talks.jsonl")
    assert (talks, list(broken)) == ([[], named], [0])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_of_conversations_is_told_from_json_lines(indent: int | None, tmp_path: Path) -> None:
    """LLaMA-Factory's data sets have this form."""
    file = tmp_path / "talks.json"
    for talks in ([{"messages": [user("?")]}] * 2, [[user("?")]] * 2):
        file.write_text(json.dumps(talks, indent=indent))
        with pytest.raises(ValueError, match=r"talks\.json.*: each conversation stands on a line of its own \(jq -c"):
            read_conversations(file)


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([user("?")], r"not JSON Lines: .*\(jq -c \. FILE"),
        ({"messages": [user("?")]}, r"not JSON Lines: .*\(jq -c \. FILE"),
        ([{"conversations": [user("?")]}], r"not JSON Lines: .*\(jq -c '\.\[\]' FILE"),
    ],
)
def test_json_over_several_lines_is_told_how_to_become_lines(talk: Any, words: str, tmp_path: Path) -> None:
    """A single conversation is not split."""
    file = tmp_path / "talks.json"
    for copies, blank in ((1, ""), (1, "\n \n"), (2, "")):
        if copies == 2 and isinstance(talk, list) and "conversations" in talk[0]:
            continue
        file.write_text(blank + (json.dumps(talk, indent=1) + "\n") * copies)
        with pytest.raises(ValueError, match=words):
            read_conversations(file)


def test_a_list_of_llama_factorys_on_one_line_is_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "talks.json").write_text(json.dumps([{"conversations": [user("?")]}]))
    with pytest.raises(ValueError, match=r"line 1: it is a list of conversations: .*jq -c '\.\[\]'"):
        read_conversations(tmp_path / "talks.json")
