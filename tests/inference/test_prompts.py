"""The images and videos of messages, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.inference.prompts import PromptReader, check


def talk(kind: str, given: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: given}, {"type": "text", "text": "?"}]}]


def test_frames_of_a_video_may_be_paths_of_images(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (8, 8), (40 * number,) * 3).save(paths[-1])
    reader = PromptReader(8, "pad", 3)
    prompt = reader.read(talk("video", paths))
    assert prompt.visuals[0][:, 0, 0, 0].tolist() == [0, 80, 160]  # at most three, evenly spaced
    assert prompt.times == ((0.0, 2.0, 4.0),)
    assert np.array_equal(
        prompt.visuals[0], reader.read(talk("video", [Image.open(path) for path in paths])).visuals[0]
    )
    assert len(reader.read(talk("image", paths[:1])).visuals[0]) == 1
    with pytest.raises(ValueError, match="an image of 2 frames: give them as a video"):
        reader.read(talk("image", paths[:2]))
    with pytest.raises(ValueError, match="is one of several frames, and no image: give a folder or a video alone"):
        reader.read(talk("video", [paths[0], str(tmp_path)]))
    with pytest.raises(FileNotFoundError, match=r"there is no video, image or folder at .*gone\.png"):
        check(talk("video", [paths[0], str(tmp_path / "gone.png")]))
    with pytest.raises(ValueError, match=r"'https://a\.example/b\.png' is an address, and nothing is fetched"):
        check(talk("video", [paths[0], "https://a.example/b.png"]))
    with pytest.raises(
        ValueError, match=r"'file:///b\.png' is the address of a local file: give its path, without file"
    ):
        check(talk("image", "file:///b.png"))
    embedded = "data:image/png;base64," + 5000 * "iVBO"  # as in OpenAI's messages
    for given in (embedded, [paths[0], embedded]):
        with pytest.raises(ValueError, match=r"holds a file in its own text: decode it") as refused:
            check(talk("video", given))
        assert len(str(refused.value)) < 200
    with pytest.raises(FileNotFoundError, match="there is no video, image or folder at aaa") as refused:
        check(talk("image", 5000 * "a"))
    assert len(str(refused.value)) < 400
    with pytest.raises(ValueError, match="an item of type video has none"):
        check(talk("video", [paths[0], " "]))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"fps": 2.0}, r"fps=2\.0"),
        ({"video_start": 3, "video_end": 5}, "video_start=3, video_end=5"),
        ({"nframes": 8}, "nframes=8"),
        ({"fps": "1", "video_start": 0, "max_frames": 4}, "max_frames=4"),
        ({"min_frames": 4, "sample_fps": 2}, "sample_fps=2, min_frames=4"),
    ],
)
def test_frames_of_a_video_that_a_message_chooses_otherwise_are_refused(told: dict[str, Any], said: str) -> None:
    """These are Qwen's keys: the answer would be about other frames than requested."""
    image = Image.new("RGB", (8, 8))
    video = {"type": "video", "video": [image, image]}
    words = {"type": "text", "text": "?"}
    with pytest.raises(ValueError, match=f"message 1: a video with {said}: of a video a frame per second is seen"):
        check([{"role": "user", "content": [{**video, **told}, words]}])
    check(
        [
            {
                "role": "user",
                "content": [{**video, "fps": 1.0, "sample_fps": "1", "video_start": 0, "max_pixels": 9}, words],
            }
        ]
    )
    check([{"role": "user", "content": [{"type": "image", "image": image, **told}, words]}])
