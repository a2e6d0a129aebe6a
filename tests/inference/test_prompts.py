"""What messages show, decoded."""

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
    assert prompt.visuals[0][:, 0, 0, 0].tolist() == [0, 80, 160]  # at most three, evenly
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
    with pytest.raises(ValueError, match="an item of type video has none"):
        check(talk("video", [paths[0], " "]))
