"""Shards of other programs, or hostile ones: every sample is read, or reported with a reason."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import hostile_images
from PIL import Image
from shard_sets import conversations, picture, small_video, write_set

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.samples import image_text_parts, read_image_text
from keygrip.data.manifests import make_manifests
from keygrip.data.shards.index import split_name
from keygrip.data.shards.reader import ShardSet
from keygrip.data.validation import validate
from keygrip.data.video_text.batching import rows_of
from keygrip.data.video_text.conversations import (
    CAPTION_REQUEST,
    IMAGE_CAPTION_REQUEST,
    MAX_FRAMES,
    iterate_texts,
    parse_text,
    read_conversations,
    read_sample,
    read_timed_conversations,
    video_text_parts,
)
from keygrip.data.video_text.exact_lengths import count_lengths
from keygrip.data.video_text.foreign_text import own_text
from keygrip.data.video_text.sample_types import kinds_column
from keygrip.data.video_text.samples import Part
from keygrip.data.video_text.shard_source import OpenedSets, ShardSource
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.tokenizers import TrainedTokenizer

Members = list[tuple[str, bytes]]
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
SHOWING = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "!"}]}
PAIR = [{"user": "?", "assistant": "!"}]
OWN = video_text_parts([], conversations("n"), "x")[0]["json"]


def text(**content: Any) -> bytes:
    return json.dumps(content).encode()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


def deep_grey() -> bytes:
    """Return a PNG with 16 bits at half of the maximum brightness."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(key: str, image: str = "jpg", content: bytes | None = None) -> Members:
    return [(f"{key}.{image}", jpeg()), (f"{key}.json", text(conversations=TALK) if content is None else content)]


CAPTION = text(caption="c")
TWO = [("a.00.jpg", jpeg()), ("a.01.jpg", jpeg())]
GOOD = pair("good")


def published(frames: int | None = 2, **content: Any) -> bytes:
    """Return the json of a sample as in the shards of the published model."""
    told = {"user": "", "assistant": "A dog runs.", "source": "openvid"} | content
    return text(**told, **({} if frames is None else {"frame_count": frames}))


THREE = [("a.000.jpg", jpeg()), ("a.001.jpg", jpeg())]
# name: members, and number of frames of the samples that are read; all other keys are reported
LAYOUTS: dict[str, tuple[Members, dict[str, int]]] = {
    "the published model's frames": ([*THREE, ("a.json", published())], {"a": 2}),
    "the published model's image": ([("a.jpg", jpeg()), ("a.json", published(1, user="Which?"))], {"a": 1}),
    "the published model's text": ([("a.json", published(0, user="Why?", source="smoltalk"))], {"a": 0}),
    "the published model's video": ([("a.mp4", small_video()), ("a.json", published(None))], {"a": 2}),
    "the published model's, a frame lost": ([THREE[0], ("a.json", published())], {}),
    "the published model's, all frames lost": ([("a.json", published())], {}),
    "the published model's, no question": ([("a.json", published(0))], {}),
    "the published model's, no answer": ([*THREE, ("a.json", published(assistant=""))], {}),
    "the published model's preferences": (
        [("a.jpg", jpeg()), ("a.json", text(user="?", chosen_assistant="!", rejected_assistant="?", frame_count=1))],
        {},
    ),
    "the published model's tokens": ([("a.jpg", jpeg()), ("a.json", text(token_ids=[1], loss_mask=[1]))], {}),
    "who sent it is no question": (
        [("a.jpg", jpeg()), ("a.txt", b"a cube"), ("a.json", text(user="ann"))],
        {"a": 1},
    ),
    "a null caption": ([("a.jpg", jpeg()), ("a.json", text(caption=None))], {}),
    "jpg beside json": (pair("a"), {"a": 1}),
    "jpeg": (pair("a", "jpeg"), {"a": 1}),
    "upper case": ([("a.JPG", jpeg()), ("a.JSON", text(conversations=TALK))], {"a": 1}),
    "upper case png": (pair("a", "PNG"), {"a": 1}),
    "upper case txt": ([("a.JPG", jpeg()), ("a.TXT", b"a cube")], {"a": 1}),
    "upper case txt, metadata in json": (
        [("a.MP4", small_video()), ("a.Txt", b"a cube"), ("a.Json", text(id=3))],
        {"a": 2},
    ),
    "webp and png mixed": ([("a.00.jpg", jpeg()), ("a.01.PNG", picture(3)), ("a.json", CAPTION)], {"a": 2}),
    "folders": (pair("x/y/a"), {"x/y/a": 1}),
    "text first": ([("a.json", text(conversations=TALK)), ("a.jpg", jpeg())], {"a": 1}),
    "all images, then all texts": (
        [("a.jpg", jpeg()), ("b.jpg", jpeg()), ("a.json", CAPTION), ("b.json", CAPTION)],
        {"a": 1, "b": 1},
    ),
    "caption in txt": ([("a.jpg", jpeg()), ("a.txt", b"a cube")], {"a": 1}),
    "caption in txt, metadata in json": (
        [("a.mp4", small_video()), ("a.txt", b"a cube"), ("a.json", text(id=3))],
        {"a": 2},
    ),
    **{
        f"caption in txt, metadata with {what}": (
            [("a.jpg", jpeg()), ("a.txt", b"a cube"), ("a.json", json_)],
            {"a": 1},
        )
        for what, json_ in {
            "NaN": b'{"score": NaN}',
            "a number out of range": b'{"score": 1e999}',
            "an endless number": b'{"id": ' + b"9" * 5000 + b"}",
            "half a character": b'{"title": "x\\ud800"}',
        }.items()
    },
    **{
        f"{field} beside the caption in json{' and a txt' if txt else ''}": (
            [("a.jpg", jpeg()), *txt, ("a.json", b'{"caption": "a cube", ' + field.encode() + b"}")],
            {} if "text" in field or (not txt and "fps" in field) else {"a": 1},
        )
        for field in ('"s": NaN', '"exif": ["\\ud800"]', f'"n": {"9" * 5000}', '"text": NaN', '"fps": NaN')
        for txt in ([], [("a.txt", b"t")])
    },
    "txt beside a json that is cut off": ([("a.jpg", jpeg()), ("a.txt", b"t"), ("a.json", b'{"id": ')], {}),
    "txt beside a json that is very deep": (
        [("a.jpg", jpeg()), ("a.txt", b"t"), ("a.json", b"[" * 100000 + b"]" * 100000)],
        {},
    ),
    **{
        f"images of fps {fps!r}": (
            [("a.00.jpg", jpeg()), ("a.01.jpg", jpeg()), ("a.json", text(caption="c", fps=fps))],
            {"a": 2} if fps in ("30", 2, None) else {},
        )
        for fps in ("30", 2, None, 0, -1, "fast", True, [2])
    },
    "one image of fps 0": (pair("a", content=text(caption="c", fps=0)), {"a": 1}),
    "caption in json": (pair("a", content=text(caption="a cube", width=8)), {"a": 1}),
    "text in json": (pair("a", content=text(text="a cube")), {"a": 1}),
    "messages": (
        pair("a", content=text(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])),
        {"a": 1},
    ),
    "messages of items": (
        pair(
            "a",
            content=text(
                messages=[
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
                ]
            ),
        ),
        {"a": 1},
    ),
    "items of sound": (
        pair("a", content=text(messages=[{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}])),
        {},
    ),
    "texts of pairs": (pair("a", content=text(texts=[{"user": "?", "assistant": "!"}])), {"a": 1}),
    "a list of turns": (pair("a", content=json.dumps(TALK).encode()), {"a": 1}),
    "frames from 1": ([("a.001.jpg", jpeg()), ("a.002.jpg", jpeg()), ("a.json", CAPTION)], {"a": 2}),
    "upper case video": ([("a.MP4", small_video()), ("a.json", CAPTION)], {"a": 2}),
    "16 bits": ([("a.png", deep_grey()), ("a.json", CAPTION)], {"a": 1}),
    "masks beside": ([*pair("a"), ("a.seg.bin", b"1")], {"a": 1}),
    "text alone": ([("a.json", text(conversations=[{"user": "?", "assistant": "!"}]))], {"a": 0}),
    "accents taken apart": ([("e\u0301.jpg", jpeg()), ("\u00e9.json", CAPTION)], {"\u00e9": 1}),
    "roles in capitals": (
        pair("a", content=text(conversations=[{"from": "Human", "value": "?"}, {"from": "GPT", "value": "!"}])),
        {"a": 1},
    ),
    "a caption of nothing": ([("a.json", CAPTION)], {}),
    "frames in a folder": ([("a/0.jpg", jpeg()), ("a/1.jpg", jpeg()), ("a.json", CAPTION)], {}),
    "a named image that is not there": ([("a.json", text(image="x.jpg", texts=[{"user": "?", "assistant": "!"}]))], {}),
    **{
        f"a video that {name} names, without it": ([("a.json", text(texts=PAIR, **{name: said}))], {})
        for name, said in {
            "video_path": "videos/a.mp4",
            "media": ["a.mp4"],
            "Videos": ["a"],
            "video_url": "https://a.example/1",
            "file": "a.webm",
        }.items()
    },
    "a video that its own form names, without it": ([("a.json", OWN[:-1] + b', "video_path": "a.mp4"}')], {}),
    "a video that is named, with it": (
        [("a.json", text(video_path="videos/a.mp4", texts=PAIR)), ("a.mp4", small_video())],
        {"a": 2},
    ),
    **{
        f"a placeholder without an image: {asked}": ([("a.json", text(texts=[{"user": asked, "assistant": "!"}]))], {})
        for asked in ("<image>\nWhat?", "What?\n <video> ", "In <image_1> what?")
    },
    "an answer that shows an image": (
        pair("a", content=text(messages=[TALK[0], SHOWING])),
        {},
    ),
    **{
        f"placeholders of {what}": (
            [*media, ("a.json", text(texts=[{"user": asked, "assistant": "!"}], **named))],
            wanted,
        )
        for what, media, asked, named, wanted in (
            ("two images, one there", [("a.jpg", jpeg())], "<image> or <image>?", {}, {}),
            ("one image, two named", TWO, "<image>\n?", {"images": ["x", "y"]}, {}),
            ("one video, its frames named", TWO, "<video>\n?", {"images": ["x", "y"]}, {"a": 2}),
            ("two images", TWO, "<image> or <image>?", {"images": ["x", "y"]}, {"a": 2}),
            ("a video in two frames", TWO, "<video>\n?", {}, {"a": 2}),
            ("two videos, one there", [("a.mp4", small_video())], "<video> or <video> or <video>?", {}, {}),
            ("a video, one for each frame", [("a.mp4", small_video())], "<image><image>\n?", {}, {"a": 2}),
            ("no words", [("a.jpg", jpeg())], "<image>\n", {}, {}),
        )
    },
    "text that names no image": (
        [("a.json", text(texts=PAIR, images=[], video=None, url="https://a.example", file="a.txt"))],
        {"a": 0},
    ),
    "keys with dots": ([("v1.a.jpg", jpeg()), ("v1.a.json", CAPTION)], {}),
    "an image that is not there": ([("a.json", text(conversations=TALK))], {}),
    "an item that is not there": (
        [
            (
                "a.json",
                text(
                    messages=[{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "!"}]
                ),
            )
        ],
        {},
    ),
    "byte order mark": (pair("a", content=b"\xef\xbb\xbf" + text(caption="c")), {"a": 1}),
    "a frame is missing": ([("a.00.jpg", jpeg()), ("a.02.jpg", jpeg()), ("a.json", CAPTION)], {}),
    "fewer frames than said": ([("a.00.jpg", jpeg()), ("a.json", OWN.replace(b'"frames":0', b'"frames":4'))], {}),
    "frames from 2": ([("a.02.jpg", jpeg()), ("a.03.jpg", jpeg()), ("a.json", CAPTION)], {}),
    "one number twice": ([("a.00.jpg", jpeg()), ("a.0.png", picture(1)), ("a.json", CAPTION)], {}),
    "upper and lower case": ([("a.jpg", jpeg()), ("a.JPG", jpeg()), ("a.json", CAPTION)], {}),
    "a key in upper and lower case": ([("IMG1.JPG", jpeg()), ("img1.json", CAPTION)], {}),
    "a part in upper case": ([("img1.JPG", jpeg()), ("img1.json", CAPTION)], {"img1": 1}),
    "video and images": ([("a.mp4", small_video()), ("a.jpg", jpeg()), ("a.json", CAPTION)], {}),
    "two videos": ([("a.mp4", small_video()), ("a.webm", small_video()), ("a.json", CAPTION)], {}),
    "unknown image": ([("a.gif", b"GIF89a"), ("a.json", CAPTION)], {}),
    "named image": ([("a.image.jpg", jpeg()), ("a.json", CAPTION)], {}),
    "no text": ([("a.jpg", jpeg())], {}),
    "class label": ([("a.jpg", jpeg()), ("a.cls", b"7")], {}),
    "empty caption": ([("a.jpg", jpeg()), ("a.txt", b" \n")], {}),
    "txt that is not text": ([("a.jpg", jpeg()), ("a.txt", b"\xff\xfe\xff")], {}),
    "json without text": (pair("a", content=text(width=8)), {}),
    "json that is cut off": (pair("a", content=text(caption="a cube")[:-4]), {}),
    "json of a number": (pair("a", content=b"5"), {}),
    "unknown role": (pair("a", content=text(conversations=[{"from": "robot", "value": "x"}])), {}),
    "answer without question": (pair("a", content=text(conversations=TALK[1:])), {}),
    "question without answer": (pair("a", content=text(conversations=TALK[:1])), {}),
    "turns that are text": (pair("a", content=text(conversations="hello")), {}),
    "turns that are numbers": (pair("a", content=text(conversations=[1, 2])), {}),
    "video cut in half": ([("a.mp4", small_video()[: len(small_video()) // 2]), ("a.json", CAPTION)], {}),
    "empty video": ([("a.mp4", b""), ("a.json", CAPTION)], {}),
    "webm that is none": ([("a.webm", b"\x1aE\xdf\xa3" + b"\0" * 99), ("a.json", CAPTION)], {}),
    "a part twice": ([*pair("a"), ("a.jpg", jpeg())], {}),
    "a key twice": ([*pair("a"), *pair("b"), *pair("a")], {"b": 1}),
    "hidden files": ([("._a.jpg", b"\0\5"), *pair("a")], {"a": 1}),
    "no key": ([(".json", CAPTION)], {}),
    "no ending": ([("README", b"x")], {}),
}


def write_tar(path: Path, members: Members, change: Callable[[tarfile.TarFile], None] = lambda tar: None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        change(tar)
    return path


def delivered_and_named(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of frames of every sample that is read, and the reason for every other one, both by key.
    Readers of texts without images must find the same conversations and times."""
    make_manifests(root, max_broken_share=1.0)
    shards = ShardSet(root)
    named = {key: why for index in map(shards.index, range(len(shards.shards))) for key, why in index.bad.items()}
    frames = {}
    for number in range(len(shards)):
        try:
            sample = read_sample(shards, number, 8)
            assert read_conversations(shards, number) == sample.conversations
            timed = read_timed_conversations(shards, number, MAX_FRAMES)
            assert timed == (sample.conversations, sample.seconds)
            frames[shards.key(number)] = len(sample.frames)
        except BadSample as error:
            named[shards.key(number)] = str(error)
    return frames, named


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_sample_is_delivered_or_named(name: str, tmp_path: Path) -> None:
    members, wanted = LAYOUTS[name]
    write_tar(tmp_path / "a.tar", [*members, *GOOD])
    frames, named = delivered_and_named(tmp_path)
    assert frames == wanted | {"good": 1}
    keys = {split_name(unicodedata.normalize("NFC", file))[0] for file, _ in members} - {
        ""
    }  # hidden files belong to no sample
    assert set(frames) | set(named) == keys | {"good"}
    assert all(named.values())


def test_texts_are_found_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    """This holds for counting tokens, training a tokenizer and validation as well as for reading samples."""
    talk = text(caption="a dog runs over the grass")
    for case in (str.lower, str.upper):
        members = [
            (f"{n}.{case(part)}", content) for n in range(3) for part, content in (("jpg", picture(n)), ("json", talk))
        ]
        root = tmp_path / case("set")
        root.mkdir()
        write_tar(root / "a.tar", members)
        make_manifests(root)
    lower, upper = ShardSet(tmp_path / "set"), ShardSet(tmp_path / "SET")
    assert list(iterate_texts([upper])) == list(iterate_texts([lower]))
    collator = ConversationCollator(TrainedTokenizer(320), "question_first", "answers")
    collator.prepare(tmp_path, lambda: iterate_texts([upper]))
    counts = [count_lengths(shards, np.arange(3), collator, tmp_path).longest.tolist() for shards in (lower, upper)]
    assert counts[1] == counts[0]
    assert min(counts[0]) > 0
    assert [validate(tmp_path / name)["errors"] for name in ("set", "SET")] == [0, 0]


def test_deep_images_keep_their_brightness(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", LAYOUTS["16 bits"][0])
    make_manifests(tmp_path)
    assert (read_sample(ShardSet(tmp_path), 0, 8).frames == 128).all()


def test_what_transparency_hides_is_not_shown(tmp_path: Path) -> None:
    members: Members = []
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))  # black and fully transparent
    drawn.putpixel((0, 0), (255, 0, 0, 255))
    for key, image in (("a", drawn), ("b", drawn.getchannel("R").convert("LA")), ("c", drawn.quantize(4))):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.json", CAPTION)]
    write_tar(tmp_path / "a.tar", members)
    make_manifests(tmp_path)
    shards = ShardSet(tmp_path)
    for sample in (0, 2):
        frame = read_sample(shards, sample, 8).frames[0]
        assert frame[0, 0].tolist() == [255, 0, 0]
        assert (frame[1:] == 255).all()
    assert (read_sample(shards, 1, 8).frames[0, 1:] == 0).all()  # opaque, although the mode (LA) has transparency


def test_placeholders_are_no_words_of_the_question(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", GOOD)
    make_manifests(tmp_path)
    (conversation,) = read_sample(ShardSet(tmp_path), 0, 8).conversations
    assert [(turn.role, turn.text) for turn in conversation.turns] == [("user", "What?"), ("assistant", "This.")]


@pytest.mark.parametrize(
    "mark",
    [
        *("<image_1>", "<image2>", "<|image|>", "<|video_pad|>", "<IMAGE>", "<img>a.jpg</img>", "<start_of_image>"),
        *("<IMG_CONTEXT>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>"),
    ],
)
def test_placeholders_of_other_models_are_known(mark: str) -> None:
    talk = [{"from": "human", "value": f"{mark} What? {mark}"}, TALK[1]]
    own = own_text({"conversations": talk}, "")
    assert own["shown"]
    assert own["conversations"][0]["turns"][0]["text"] == "What?"
    assert own["places"] == (1 if mark.startswith(("<image_", "<image2")) else 2)


@pytest.mark.parametrize(
    ("named", "places"),
    [
        *(({"image": "a.jpg"}, 1), ({"images": ["a.jpg"]}, 1), ({"image_path": "a.jpg"}, 1), ({}, 1)),
        *(({"video": "a.mp4"}, 2), ({"image": "a.mp4"}, 1), ({"media": ["a.jpg", "b.mp4"]}, 1)),
    ],
)
def test_a_key_says_of_which_kind_the_placeholders_are(named: dict[str, Any], places: int) -> None:
    talk = [{"from": "human", "value": "<image>\nWhich has the <video> tag?"}, TALK[1]]
    own = own_text({"conversations": talk, **named}, "", packed=True)
    assert own["places"] == places


def test_words_on_both_sides_of_a_placeholder_stay_apart(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "In <image> what\n<image>\nis <b>this</b>?"}, TALK[1]]
    write_tar(tmp_path / "a.tar", [*TWO, ("a.json", text(conversations=turns))])
    make_manifests(tmp_path)
    (conversation,) = read_sample(ShardSet(tmp_path), 0, 8).conversations
    assert conversation.turns[0].text == "In what\nis <b>this</b>?"


HTML = "<body>\n  <video>\n    <source>\n  </video>\n</body> <image> <|image_pad|>"


@pytest.mark.parametrize(
    ("asked", "packed", "read"),
    [
        ("<image>\nWrite HTML", True, "Write HTML"),
        ("Which?\n<image>\nOptions:\nA. red", True, "Which?\nOptions:\nA. red"),
        ("In <image> what?", True, "In what?"),
        ("<image>\nMend this:\n<video>\n</video>", True, "Mend this:\n<video>\n</video>"),
        ("<image>\nWhich has the <video> tag?", True, "Which has the <video> tag?"),
        ("How to use the <video> tag in HTML?", False, "How to use the <video> tag in HTML?"),
        ("Mend this:\n<video>\n  <source>\n</video>", False, "Mend this:\n<video>\n  <source>\n</video>"),
    ],
)
def test_html_is_text_and_what_stands_for_an_image_is_none(asked: str, packed: bool, read: str, tmp_path: Path) -> None:
    """Nothing is removed from answers: the model learns them unchanged."""
    talk = text(conversations=[{"user": asked, "assistant": HTML}])
    write_tar(tmp_path / "a.tar", pair("a", content=talk) if packed else [("a.json", talk)])
    frames, named = delivered_and_named(tmp_path)
    assert (frames, named) == ({"a": int(packed)}, {})
    (conversation,) = read_conversations(ShardSet(tmp_path), 0)
    assert [turn.text for turn in conversation.turns] == [read, HTML]


def test_characters_beyond_ascii_count_as_a_token_each(tmp_path: Path) -> None:
    """Batches are planned with four characters per token: a Chinese text would count as a quarter of its tokens."""
    members = [
        m for key, said in (("a", "x" * 40), ("b", "\u6c49" * 40)) for m in pair(key, content=text(caption=said))
    ]
    write_tar(tmp_path / "a.tar", members)
    make_manifests(tmp_path)
    plain, chinese = ShardSet(tmp_path).columns["text_length"].tolist()
    assert chinese - plain == 3 * 40


def test_images_are_upright(tmp_path: Path) -> None:
    """Images are rotated as their EXIF orientation says; with damaged EXIF data an image stays as it is stored."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255
    exif = Image.Exif()
    exif[0x112] = 6  # to be rotated clockwise by 90 degrees
    members: Members = []
    for key, noted in (("a", exif.tobytes()), ("b", b"Exif\0\0" + b"\xff" * 30), ("c", b"")):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95, exif=noted)
        members += [(f"{key}.jpg", buffer.getvalue()), (f"{key}.json", CAPTION)]
    write_tar(tmp_path / "a.tar", members)
    make_manifests(tmp_path)
    shards = ShardSet(tmp_path)
    turned, damaged, plain = (read_sample(shards, number, 16).frames[0] > 128 for number in range(3))
    assert (turned == np.rot90(image, -1).astype(bool)).mean() > 0.95
    assert (damaged == image.astype(bool)).mean() > 0.95
    assert (plain == image.astype(bool)).mean() > 0.95


def test_hostile_images_leave_their_shard_whole(tmp_path: Path) -> None:
    images = [*hostile_images()]
    members = [m for n, content in enumerate(images) for m in ((f"h{n}.png", content), (f"h{n}.json", CAPTION))]
    write_tar(tmp_path / "a.tar", [*members, *GOOD])
    frames, named = delivered_and_named(tmp_path)
    assert (frames, len(named)) == ({"good": 1}, len(images))
    report = make_manifests(tmp_path, max_broken_share=1.0)
    assert report["bad_samples"] + len(ShardSet(tmp_path)) == len(images) + 1


def hard_link(tar: tarfile.TarFile) -> None:
    """Add a hard link as some programs write it: with the size of the linked file and without its bytes."""
    info = tarfile.TarInfo("linked.jpg")
    info.type, info.linkname, info.size = tarfile.LNKTYPE, "good.jpg", 4000
    tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT))  # type: ignore[union-attr]
    tar.offset += 512
    sample_behind(tar)


def sample_behind(tar: tarfile.TarFile) -> None:
    for name, content in pair("behind"):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def test_a_hard_link_is_named_and_what_lies_behind_it_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("linked.json", CAPTION), *GOOD], hard_link)
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1, "behind": 1}
    assert "is a link or a device" in named["linked"]


def test_frames_per_second_may_be_the_text_of_a_number(tmp_path: Path) -> None:
    images = [(f"a.{n}.jpg", jpeg()) for n in range(3)]
    write_tar(tmp_path / "a.tar", [*images, ("a.json", text(caption="c", fps="2"))])
    make_manifests(tmp_path)
    assert read_sample(ShardSet(tmp_path), 0, 8).seconds == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("asked", "named", "seconds"),
    [
        ("<image> or <image>?", {}, ()),
        ("Which?", {"images": ["x.jpg", "y.jpg"]}, ()),
        ("a caption", {"images": ["x.jpg", "y.jpg"]}, ()),
        ("<image> or <image>?", {"fps": 2}, (0.0, 0.5)),
        ("<image> or <image>?", {"video": "x.mp4"}, (0.0, 1.0)),
        ("<video>\nWhich?", {}, (0.0, 1.0)),
        ("<video>\nWhich?", {"images": ["x.jpg", "y.jpg"]}, (0.0, 1.0)),
        ("Which?", {}, (0.0, 1.0)),
    ],
)
def test_several_images_of_a_conversation_have_no_common_time(
    asked: str, named: dict[str, Any], seconds: tuple[float, ...], tmp_path: Path
) -> None:
    """The exceptions are frames of a video, and images with a given rate."""
    said = {"caption": "two"} if "caption" in asked else {"texts": [{"user": asked, "assistant": "!"}]}
    write_tar(tmp_path / "a.tar", [*TWO, ("a.json", text(**said, **named))])
    make_manifests(tmp_path)
    shards = ShardSet(tmp_path)
    assert read_sample(shards, 0, 8).seconds == seconds
    assert read_timed_conversations(shards, 0, MAX_FRAMES)[1] == seconds


def link(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("linked.jpg")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(info)


def not_utf8(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("caf\udce9.json")
    info.size = len(CAPTION)
    tar.addfile(info, io.BytesIO(CAPTION))


def sparse(tar: tarfile.TarFile) -> None:
    """Add a file as `tar --sparse` writes it (4 MB, all hole except its last block), and a sample after it."""
    info = tarfile.TarInfo("holes.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00017777000\0" + b"00000001000\0"  # one piece: its offset and size
    header[482:483] = b"\0"  # no further pieces
    header[483:495] = b"00020000000\0"  # the size with the holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar.fileobj.write(bytes(header) + b"\xff" * 512)  # type: ignore[union-attr]
    tar.offset += 1024
    sample_behind(tar)


def test_a_sparse_member_is_named_and_what_lies_behind_it_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("holes.json", CAPTION), *GOOD], sparse)
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1, "behind": 1}
    assert "sparse" in named["holes"]


@pytest.mark.parametrize(
    ("change", "key", "why"),
    [(link, "linked", "is a link or a device"), (not_utf8, r"caf\udce9", "not UTF-8")],
)
def test_members_that_are_no_files_of_text_names(
    change: Callable[[tarfile.TarFile], None], key: str, why: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [("linked.json", CAPTION), *GOOD] if key == "linked" else GOOD, change)
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    assert why in named[key]


def test_shards_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The files are compressed, cut off, not tar, in upper case, in other folders, or two tars joined into one."""
    write_tar(tmp_path / "a.TAR", pair("upper"))
    write_tar(tmp_path / "b.tar", GOOD)
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress((tmp_path / "b.tar").read_bytes()))
    (tmp_path / "d.tar").write_bytes(gzip.compress((tmp_path / "b.tar").read_bytes()))
    (tmp_path / "e.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1100])
    (tmp_path / "f.tar").write_bytes(b"")
    (tmp_path / "g.tar").write_bytes((tmp_path / "b.tar").read_bytes() * 2)
    write_set(tmp_path / "00001", [1])
    for name in ("._a.TAR", "._c.tar.gz"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")  # AppleDouble files of macOS
    frames, _ = delivered_and_named(tmp_path)
    assert frames == {"upper": 1, "good": 1}
    report = make_manifests(tmp_path, max_broken_share=1.0)
    assert report["broken"] == 5
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"{name}.tar" in said for name in "cdefg")
    assert "joined by cat" in said
    assert all(f"{name} is compressed, and samples are read at random" in said for name in ("c.tar.gz", "d.tar"))
    assert "._" not in said
    assert "00001" in said
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "c.tar.gz").rename(alone / "c.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"c\.tar\.gz is compressed"):
        make_manifests(alone)


def test_shards_beside_the_splits_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [1] * 4)
    ShardSource(tmp_path).open("train", OpenedSets())
    write_set(tmp_path / "train", [1] * 2, prefix="t")
    for step in (make_manifests, validate):
        with pytest.raises(ValueError, match=r"has shards in .* and in .*train: bring all of them into train/"):
            step(tmp_path)
    with pytest.raises(ValueError, match=r"is a shard set and so is its train/"):
        ShardSource(tmp_path).open("train", OpenedSets())


def test_validation_names_what_is_new_first_and_everything_in_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = [(f"bad{number:02d}.jpg", jpeg()) for number in range(25)]
    cut = [("cut.jpg", jpeg()[:-300]), ("cut.json", CAPTION)]
    write_tar(tmp_path / "a.tar", [*known, *cut, *GOOD])
    write_tar(tmp_path / "b.tar", pair("other", content=CAPTION))
    make_manifests(tmp_path, max_broken_share=1.0)
    caplog.clear()
    report = validate(tmp_path)
    assert report["errors"] == 26
    assert "cut" in report["problems"][0]
    lines = Path(report["problems_file"]).read_text().splitlines()
    assert len(lines) == 26
    assert all(any(f"bad{number:02d}" in line for line in lines) for number in range(25))
    assert "are left out" not in caplog.text  # would appear once per shard
    write_tar(tmp_path / "a.tar", GOOD)
    make_manifests(tmp_path, again=True)
    assert (validate(tmp_path)["problems_file"], (tmp_path / "problems.txt").exists()) == (None, False)


def text_of_kind(kind: str, said: str = "!") -> bytes:
    turns = [{"role": "user", "text": "?"}, {"role": "assistant", "text": said}]
    return text(conversations=[{"kind": kind, "turns": turns}])


def test_a_name_of_a_million_characters_costs_its_own_sample_alone(tmp_path: Path) -> None:
    """The arrays of an index are as wide as their longest entry."""
    endless = "n" * 1_000_000
    members = [
        (f"{endless}.json", text_of_kind("text")),
        (f"{endless}2.json", text_of_kind("text")),
        ("part.json", text_of_kind("text")),
        (f"part.{endless}", b""),
        ("kind.json", text_of_kind(endless)),
        (
            "kinds.json",
            text(conversations=[json.loads(text_of_kind(f"k{n:060d}"))["conversations"][0] for n in range(99)]),
        ),
    ]
    write_tar(tmp_path / "a.tar", [*members, *GOOD])
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    assert len(named) == len(members) - 1
    assert len((tmp_path / "manifest.json").read_bytes()) < 4000
    why = " ".join(named.values())
    for what in ("its key has 1000000 ", "its key has 1000001 ", "'nnnn", "the kind 'nn", "its kinds have 6"):
        assert what in why, what
    index = ShardSet(tmp_path).index(0)
    assert max(array.dtype.itemsize for array in (index.keys, index.part_names, index.columns["kinds"])) < 200


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_off_in_a_name_that_is_not_utf8_is_named(tmp_path: Path, form: int) -> None:
    write_tar(tmp_path / "b.tar", GOOD)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        not_utf8(tar)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(CAPTION) + 4])
    frames, _ = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    (broken,) = json.loads((tmp_path / "manifest.json").read_text())["broken"].values()
    assert broken.endswith(r"a.tar is cut off in caf\udce9.json")
    (tmp_path / "a.tar").rename(tmp_path / "caf\udce9.tar")
    with pytest.raises(ValueError, match=r"the name of the shard 'caf\\udce9\.tar' in .* is not UTF-8.* rename"):
        make_manifests(tmp_path)


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (("a.tar", "bucket_1/b.tar"), "bucket_1 holds shards that training would not read"),
        (("bucket_1/b.tar",), "bucket_1 holds shards that training would not read"),
        (("bucket_064x64/b.tar",), "bucket_064x64 holds shards that training would not read"),
        (("train/a.tar", "train/bucket_1/b.tar"), "train/bucket_1 holds shards that training would not read"),
        (("a.tar", "bucket_64x64/b.tar"), "has shards and so has .*bucket_64x64, and training would read the ones or"),
    ],
)
def test_folders_that_training_does_not_read_are_not_counted(
    tmp_path: Path, paths: tuple[str, ...], named: str
) -> None:
    for number, path in enumerate(paths):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / path, [*pair(f"a{number}")])
        if number:  # a set of its own
            make_manifests((tmp_path / path).parent)
    for step in (make_manifests, validate):
        with pytest.raises(ValueError, match=named):
            step(tmp_path)


@pytest.mark.parametrize("first", [True, False])
def test_a_sample_of_another_kind_costs_itself_alone(first: bool, tmp_path: Path) -> None:
    """An image whose features are missing looks like a video of one frame; the columns of the two differ."""
    arrays = (np.zeros((3, 2, 2)), np.ones((5, 6)), np.array([True, *[False] * 4]), np.ones(7), np.zeros((4, 7)))
    encoded: Members = []
    for number in range(3):
        parts, _ = image_text_parts(*arrays, {"caption": f"number {number}", "patch_grid": [2, 2]})
        encoded += [(f"a{number}.{name}", content) for name, content in parts.items()]
    plain = pair("plain", content=CAPTION)
    write_tar(tmp_path / "a.tar", [*plain, *encoded] if first else [*encoded, *plain])
    make_manifests(tmp_path, max_broken_share=0.5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["samples"], manifest["broken"]) == (3, {})
    assert manifest["bad_samples"]["a.tar"]["plain"] == (
        "it is of another kind than most samples of its tar (only one of the two has caption_length, dino, grid_height)"
        ": add the parts that it lacks, or move it to a set of its own"
    )
    shards = ShardSet(tmp_path)
    assert [shards.key(number) for number in range(3)] == ["a0", "a1", "a2"]
    assert [read_image_text(shards, number).record["caption"] for number in range(3)] == [
        *("number 0", "number 1", "number 2")
    ]


def test_a_list_of_files_in_place_of_a_video_is_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would read the files that the list names, from the working directory, and they would become training
    data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mp4").write_bytes(small_video())
    write_tar(tmp_path / "a.tar", [("a.mp4", b"ffconcat version 1.0\nfile 'secret.mp4'\n"), ("a.json", CAPTION), *GOOD])
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    assert "none of the kinds of video that are read" in named["a"]


@pytest.mark.parametrize("kind", ["visual question", "50 %", "%20", "a%2520b", "plain"])
def test_kinds_with_blanks_can_be_chosen(tmp_path: Path, kind: str) -> None:
    members = [
        (f"{n}.json", text_of_kind(each, str(n))) for n, each in enumerate((kind, "visual", "question", "other"))
    ]
    write_tar(tmp_path / "a.tar", members)
    make_manifests(tmp_path)
    found = ShardSource(tmp_path, kinds=[kind], val_fraction=0).open("train", OpenedSets())
    assert found is not None
    shards, chosen = found
    assert [shards.key(number) for number in chosen] == ["0"]
    assert Part("s", shards, np.arange(4)).kinds_present() == {kind, "visual", "question", "other"}
    assert rows_of({kind: 1, "other": 1}, np.array([3]), [kinds_column([kind, "other"])]).tolist() == [2]
    with pytest.raises(ValueError, match=r"holds no conversations of \['no kind'\]; .* parts kinds at their blanks"):
        ShardSource(tmp_path, kinds=["no kind"], val_fraction=0).open("train", OpenedSets())
    assert validate(tmp_path)["kinds"] == dict.fromkeys((kind, "visual", "question", "other"), 1)


@pytest.mark.parametrize("kind", ["", " ", " mark", "mark\n", "a\nb", "a\tb"])
def test_kinds_that_cannot_be_chosen_are_named(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "a.tar", [("a.json", text_of_kind(kind)), *GOOD])
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    assert named["a"].startswith(f"the kind {kind!r} is empty, has a line break")
    with pytest.raises(ValueError, match="the kind"):
        video_text_parts([], conversations("n", kinds=[kind]), "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (text(caption="of the json", text="other"), "of the json"),
        (text(text="of the json"), "of the json"),
        (text(conversations=TALK), "This."),
        (text(caption="", width=8), "of the txt"),
        (text(caption=None, id=3), "of the txt"),
        (text(caption={"en": "of another form"}, text=7), "of the txt"),
        (text(user="Who?", assistant="of the json", caption=" "), "of the json"),
        (text(assistant="gpt-4o"), "of the txt"),
        (text(user="uploader", caption="of the json", assistant="gpt-4o"), "of the json"),
        (b'{"user": NaN, "assistant": "gpt-4o"}', "of the txt"),
        (b'{"user": NaN, "caption": "of the json"}', "of the json"),
    ],
)
def test_text_of_a_json_counts_before_a_txt(tmp_path: Path, content: bytes, said: str) -> None:
    """The precedence is documented in `docs/foveated_vlm.md`."""
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.txt", b"of the txt"), ("a.json", content)])
    make_manifests(tmp_path)
    (conversation,) = read_sample(ShardSet(tmp_path), 0, 8).conversations
    assert conversation.turns[-1].text == said


@pytest.mark.parametrize(
    ("content", "asked", "kind"),
    [
        ({"source": "webvid"}, "What would be the WebVid caption for this video?", "caption"),
        ({"source": "vript", "user": None}, "Provide a detailed narration of what happens in this video.", "caption"),
        ({"source": "other"}, "Describe this.", "caption"),
        ({"source": "webvid", "user": "<video>\nWho runs?"}, "Who runs?", "text"),
    ],
)
def test_the_source_of_a_published_sample_says_what_is_asked(content: dict[str, Any], asked: str, kind: str) -> None:
    found = own_text({"user": "", "assistant": "A dog.", "frame_count": 3} | content, "Describe it.", packed=True)
    said = found["conversations"][0]
    assert [turn["text"] for turn in said["turns"]] == [asked, "A dog."]
    assert (said["kind"], found["source"], found["frames"]) == (kind, content["source"], 3)


@pytest.mark.parametrize(
    ("source", "asked"), [("openvid", "Write a brief caption for this video."), ("x", "Describe it.")]
)
def test_the_source_of_a_caption_says_what_is_asked(source: str, asked: str) -> None:
    found = own_text({"caption": "A dog.", "source": source}, "Describe it.", packed=True)
    assert found["conversations"][0]["turns"][0]["text"] == asked


@pytest.mark.parametrize(
    ("source", "asked"), [("openvid", "Write a brief caption for this video."), ("x", None), (3, None)]
)
def test_the_source_beside_a_caption_in_txt_says_what_is_asked(source: Any, asked: str | None) -> None:
    told = {"jpg": jpeg(), "txt": b"A dog.", "json": text(source=source, id=3, fps=29.97)}
    found = parse_text(told)
    assert [turn["text"] for turn in found["conversations"][0]["turns"]] == [asked or IMAGE_CAPTION_REQUEST, "A dog."]
    assert parse_text({**told, "json": b"3"})["conversations"][0]["turns"][0]["text"] == IMAGE_CAPTION_REQUEST
    assert "fps" not in found  # it is the rate of the downloaded file, not of these images


@pytest.mark.parametrize(
    ("members", "asked"),
    [
        ({"jpg": jpeg(), "txt": b"A dog."}, IMAGE_CAPTION_REQUEST),
        ({"PNG": deep_grey(), "json": text(caption="A dog.", url="https://x.org/a.jpg")}, IMAGE_CAPTION_REQUEST),
        ({"00.jpg": jpeg(), "json": text(text="A dog.", image="a.jpg")}, IMAGE_CAPTION_REQUEST),
        ({"00.jpg": jpeg(), "json": text(caption="A dog.", video="a.mp4")}, CAPTION_REQUEST),  # a frame of a video
        ({"00.jpg": jpeg(), "01.jpg": jpeg(), "txt": b"A dog."}, CAPTION_REQUEST),
        ({"mp4": small_video(), "txt": b"A dog."}, CAPTION_REQUEST),
    ],
)
def test_a_caption_of_one_image_is_not_asked_for_as_that_of_a_video(
    members: dict[str, bytes], asked: str, tmp_path: Path
) -> None:
    """This holds wherever the text is read, with its images or without."""
    write_tar(tmp_path / "a.tar", [(f"a.{name}", content) for name, content in members.items()])
    make_manifests(tmp_path)
    shards = ShardSet(tmp_path)
    read = (
        read_sample(shards, 0, 8).conversations,
        read_conversations(shards, 0),
        read_timed_conversations(shards, 0, 8)[0],
    )
    assert [[turn.text for turn in each.turns] for (each,) in read] == [[asked, "A dog."]] * 3
    assert shards.columns["text_length"].tolist() == [len(asked) + len("A dog.")]


ANSWERS = ["a test", {"answer": "test", "answer_confidence": "yes"}]


@pytest.mark.parametrize(
    "content", [{"conversations": TALK}, {"texts": PAIR}, {"user": "What?", "assistant": "This.", "source": "x"}]
)
def test_answers_of_annotators_to_one_question_are_its_evidence(content: dict[str, Any], tmp_path: Path) -> None:
    """The answers are stored as in sets of `step=video_sft`, for the VQA rule."""
    told = [ANSWERS, [], None]
    members = [(f"{n}.json", text(**content, answers=each)) for n, each in enumerate(told)]
    write_tar(tmp_path / "a.tar", [each for member in members for each in (member, (f"{member[0][0]}.jpg", jpeg()))])
    make_manifests(tmp_path)
    shards = ShardSet(tmp_path)
    found = [read_sample(shards, sample, 8).conversations[0].evidence for sample in range(3)]
    assert found == [{"answers": ["a test", "test"]}, {}, {}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((text(conversations=TALK, answers=given), "its `answers` are no list of texts") for given in ("red", [1], 5)),
        (text(conversations=TALK, answers={"answer": "red"}), "its `answers` are no list of texts"),
        (
            text(conversations=TALK * 2, answers=["red"]),
            "its `answers` are of annotators to one question, and it has 2",
        ),
        (b'{"user": "?", "assistant": "!", "answers": [NaN]}', "NaN is not a number"),
    ],
)
def test_answers_of_annotators_in_another_form_are_named(content: bytes, reason: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*GOOD, *pair("bad", content=content)])
    frames, named = delivered_and_named(tmp_path)
    assert frames == {"good": 1}
    assert re.search(reason, named["bad"])


@pytest.mark.parametrize("beside", [{"caption": " "}, {"caption": 3}, {"text": {"en": "A dog."}}, {"text": []}])
def test_what_is_no_caption_beside_a_question_leaves_it_a_question(beside: dict[str, Any]) -> None:
    found = own_text({"user": "Who?", "assistant": "A dog."} | beside, "Describe it.")
    assert [turn["text"] for turn in found["conversations"][0]["turns"]] == ["Who?", "A dog."]


def test_a_text_that_is_empty_is_named_as_empty() -> None:
    with pytest.raises(ValueError, match=r"the caption of its json is empty \(null\)"):
        own_text({"caption": None, "url": "x"}, "")
    with pytest.raises(ValueError, match=r"the assistant of its json is empty"):
        own_text({"user": "Who?", "assistant": ""}, "")
    with pytest.raises(ValueError, match=r"user with assistant; it holds assistant"):
        own_text({"assistant": "A dog."}, "")
    for user in (0, False, []):  # not a question, but not a missing one either
        with pytest.raises(ValueError, match=r"a turn has no role or no text|a user.s turn without words"):
            own_text({"user": user, "assistant": "A dog."}, "", packed=True)
    with pytest.raises(ValueError, match=r"its json holds none of .*; it holds url"):
        own_text({"url": "x"}, "")
