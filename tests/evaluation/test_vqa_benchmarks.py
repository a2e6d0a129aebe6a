"""Small copies in the form of Video-MME, MLVU and MVBench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.data.video_text.video_files import read_frames
from keygrip.evaluation.vqa_benchmarks import read_benchmark


def video(path: Path, seconds: int = 3, fps: int = 5) -> Path:
    """A video whose brightness tells the second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * fps):
            picture = np.full((32, 32, 3), 40 + 60 * (number // fps), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_video_mme(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "videoID": name,
            "duration": "short",
            "task_type": "Counting",
            "question": "How many?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
            "answer": "C",
        }
        for name in ("here", "missing")
    ]
    (tmp_path / "videomme").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "videomme" / "test.parquet")
    video(tmp_path / "data" / "here.mp4")
    (question,) = read_benchmark("video_mme", tmp_path)
    assert question.options == ("One.", "Two.", "Three.", "Four.")
    assert (question.answer, question.task) == (2, "short")
    assert question.prompt == "How many?\nA. One.\nB. Two.\nC. Three.\nD. Four.\nAnswer with the option's letter."


@pytest.mark.parametrize("name", ["mlvu", "mvbench"])
def test_sets_of_candidates(name: str, tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["red", "blue"], "answer": "blue"}
    frames = {
        "video": "b",
        "question": "Where?",
        "candidates": ["left", "right"],
        "answer": "left",
        "question_type": "place",
    }
    write(tmp_path / "json" / "1_colour.json", [entry, frames, {"video": "a.mp4", "question": "Tell.", "answer": "x"}])
    write(tmp_path / "json" / "settings.json", {"unrelated": True})
    video(tmp_path / "video" / "x" / "a.mp4")
    for number in range(3):
        (tmp_path / "video" / "b").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number * 80, 0, 0)).save(tmp_path / "video" / "b" / f"{number:03d}.png")
    first, second = read_benchmark(name, tmp_path)
    assert (first.answer, first.task) == (1, "1_colour")
    assert (second.answer, second.task) == (0, "place")
    assert len(read_frames(first.video, 28, "stretch", 64)) == 3
    assert read_frames(second.video, 28, "stretch", 64)[:, 0, 0, 0].tolist() == [0, 80, 160]


def test_what_is_missing_or_of_another_form_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known are video_mme, mlvu, mvbench"):
        read_benchmark("other", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_benchmark("mlvu", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="parquet"):
        read_benchmark("video_mme", tmp_path)
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["red", "blue"], "answer": "green"}
    write(tmp_path / "q.json", [entry])
    with pytest.raises(FileNotFoundError, match="none of the videos"):
        read_benchmark("mlvu", tmp_path)
    video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"q\.json: the entry 'What\?'"):
        read_benchmark("mlvu", tmp_path)


def test_frames_of_a_video_a_folder_and_a_picture(tmp_path: Path) -> None:
    frames = read_frames(video(tmp_path / "v.mp4", seconds=4), 28, "stretch", 64)
    assert frames.shape == (4, 28, 28, 3)
    assert np.all(np.diff(frames.mean((1, 2, 3))) > 40)
    assert read_frames(tmp_path / "v.mp4", 28, "stretch", 2).shape[0] == 2
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "p.png")
    assert read_frames(tmp_path / "p.png", 28, "pad", 64).shape == (1, 28, 28, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        read_frames(tmp_path / "empty", 28, "pad", 64)
    with pytest.raises(FileNotFoundError, match="no video"):
        read_frames(tmp_path / "nothing.mp4", 28, "pad", 64)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        read_frames(tmp_path / "bad.mp4", 28, "pad", 64)
