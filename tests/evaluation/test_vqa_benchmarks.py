"""Small copies of Video-MME, MLVU and MVBench in their own formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keygrip.data.video_text.conversations import whole_seconds
from keygrip.data.video_text.video_files import numbers_of_clip, read_timed_frames
from keygrip.evaluation.vqa_benchmarks import Videos, read_benchmark


def read_frames(*arguments: Any, **settings: Any) -> np.ndarray:
    return read_timed_frames(*arguments, **settings)[0]


def video(path: Path, seconds: int = 3, fps: int = 5) -> Path:
    """Write a video whose brightness encodes the second."""
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


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_a_clip_of_an_animation(ending: str, tmp_path: Path) -> None:
    stills = [Image.new("RGB", (8, 8), (40 * second, 0, 0)) for second in range(4)]
    options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=1000, **options)
    for clip, most, shown in (((1.0, 3.0), 8, [1, 2]), ((1.2, 1.2), 8, [1]), ((0.0, 4.0), 2, [1, 3])):
        frames, times = read_timed_frames(path, 8, "stretch", most, clip)
        assert np.round(frames[:, 0, 0, 0] / 40).tolist() == shown
        assert times == tuple(float(second - shown[0]) for second in shown)
    with pytest.raises(ValueError, match=r"lasts 4\.0 s and the clip begins at 9 s"):
        read_frames(path, 8, "stretch", 8, (9.0, 10.0))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_video_mme(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
            "domain": "Knowledge",
        }
        for name in ("here", "missing")
    ]
    (tmp_path / "videomme").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "videomme" / "test.parquet")
    video(tmp_path / "data" / "here.mp4")
    benchmark = read_benchmark("video_mme", tmp_path)
    (question,) = benchmark.questions
    assert benchmark.without_video == 1
    assert "video_mme: 1 of 2 questions are left out" in caplog.text
    assert "the first: missing" in caplog.text
    assert question.options == ("One.", "Two.", "Three.", "Four.")
    assert (question.answer, question.task) == (2, "short")
    assert question.groups == ("domain/Knowledge", "task_type/Counting")
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
    found = read_benchmark(name, tmp_path)
    assert found.open_ended == 1
    first, second = found.questions
    assert (first.answer, first.task) == (1, "1_colour")
    assert (second.answer, second.task) == (0, "place")
    assert len(read_frames(first.video, 28, "stretch", 64)) == 3
    assert read_frames(second.video, 28, "stretch", 64)[:, 0, 0, 0].tolist() == [0, 80, 160]


def test_questions_without_candidates_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video(tmp_path / "a.mp4")
    told = {"video": "a.mp4", "question": "Tell.", "answer": "x"}
    write(tmp_path / "8_sub_scene.json", [told])
    with pytest.raises(ValueError, match="mlvu: all 1 questions are to be answered in words; choices alone are scored"):
        read_benchmark("mlvu", tmp_path)
    write(tmp_path / "1_colour.json", [told | {"candidates": ["x", "y"]}])
    found = read_benchmark("mlvu", tmp_path)
    assert (len(found.questions), found.open_ended, found.unscored) == (1, 1, 0)
    assert "mlvu: 1 questions are left out, which have no candidates; the first: " in caplog.text
    assert "8_sub_scene.json: 'Tell.'" in caplog.text
    write(tmp_path / "json" / "8_sub_scene.json", [told | {"video": "videos/a.mp4"}, told | {"video": "b.mp4"}])
    assert read_benchmark("mlvu", tmp_path).open_ended == 2  # a question repeated in another file counts once
    assert "8_sub_scene.json: 1 questions are left out, which another file has" in caplog.text


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
    with pytest.raises(ValueError, match=r"q\.json: of the entry 'What\?' the answer is 'green'"):
        read_benchmark("mlvu", tmp_path)


def test_answers_that_differ_in_writing_and_entries_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video(tmp_path / "a.mp4")
    answers = ["Blue", "blue .", " red  one.", "green", None, "dark"]
    entries = [
        {
            "video": "a.mp4",
            "question": f"Which {n}?",
            "candidates": ["blue.", "red one", "Dark", "dark."],
            "answer": said,
        }
        for n, said in enumerate(answers)
    ]
    more = [{**entries[0], "question": f"More {n}?"} for n in range(2)]
    more.append({**entries[0], "question": "Twice?", "candidates": ["red", "blue", "blue", "green"], "answer": "blue"})
    del entries[4]["answer"]
    write(tmp_path / "q.json", entries + more)
    benchmark = read_benchmark("mlvu", tmp_path)
    assert [question.answer for question in benchmark.questions] == [0, 0, 1, 0, 0, 2]
    assert benchmark.unscored == 3
    assert "3 questions are left out, which cannot be scored; the first: " in caplog.text
    assert "of the entry 'Which 3?' the answer is 'green', and not one of its 4 candidates" in caplog.text
    write(tmp_path / "q.json", entries[2:])
    with pytest.raises(
        ValueError, match=r"3 of 4 questions whose videos are there cannot be scored; the first: .*Which 3"
    ):
        read_benchmark("mlvu", tmp_path)


@pytest.mark.parametrize("list_", ["test.json", "all.json"])
def test_a_list_beside_those_of_the_tasks_does_not_double_the_questions(
    list_: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        {"video": f"{name}.mp4", "question": f"What {n}?", "candidates": ["x", "y"], "answer": "y"}
        for n, name in enumerate(("a", "a", "gone"))
    ]
    video(tmp_path / "a.mp4")
    write(tmp_path / "json" / "1_plotQA.json", entries[:2])
    write(tmp_path / "json" / "2_ego.json", entries[2:])
    write(tmp_path / list_, [*entries, {**entries[0], "candidates": ["z", "y"]}])
    benchmark = read_benchmark("mlvu", tmp_path)
    tasks = [question.task for question in benchmark.questions]
    assert tasks == ["1_plotQA", "1_plotQA", list_.removesuffix(".json")]
    assert benchmark.without_video == 1
    assert f"{list_}: 3 questions are left out, which another file has" in caplog.text


def test_frames_of_a_video_a_folder_and_an_image(tmp_path: Path) -> None:
    frames = read_frames(video(tmp_path / "v.mp4", seconds=4), 28, "stretch", 64)
    assert frames.shape == (4, 28, 28, 3)
    assert np.all(np.diff(frames.mean((1, 2, 3))) > 40)
    assert read_frames(tmp_path / "v.mp4", 28, "stretch", 2).shape[0] == 2
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "p.png")
    assert read_frames(tmp_path / "p.png", 28, "pad", 64).shape == (1, 28, 28, 3)
    (tmp_path / "numbered").mkdir()
    for number in (1, 2, 10, 11):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"numbered/frame{number}.png")
    assert read_frames(tmp_path / "numbered", 28, "stretch", 64)[:, 0, 0, 0].tolist() == [1, 2, 10, 11]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        read_frames(tmp_path / "empty", 28, "pad", 64)
    with pytest.raises(FileNotFoundError, match="no video"):
        read_frames(tmp_path / "nothing.mp4", 28, "pad", 64)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        read_frames(tmp_path / "bad.mp4", 28, "pad", 64)


def shades(frames: np.ndarray) -> list[int]:
    """Return the second of `video` that each frame shows."""
    return [round((float(frame.mean()) - 40) / 60) for frame in frames]


def test_start_and_end_choose_the_seconds(tmp_path: Path) -> None:
    """As in MVBench's scripts: only frames of the clip, from a video or from a folder with 3 frames per second."""
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y", "start": 1.0, "end": 3.0}
    folder = {**entry, "video": "b", "start": 2.0, "end": 4.0}
    write(tmp_path / "json" / "action_sequence.json", [entry])
    write(tmp_path / "json" / "episodic_reasoning.json", [folder])
    video(tmp_path / "star" / "Charades_v1_480" / "a.mp4", seconds=4)
    (tmp_path / "tvqa" / "b").mkdir(parents=True)
    for number in range(1, 16):
        Image.new("RGB", (8, 8), (number * 10, 0, 0)).save(tmp_path / "tvqa" / "b" / f"{number:05d}.jpg", quality=95)
    clipped, frames = read_benchmark("mvbench", tmp_path).questions
    assert (clipped.clip, frames.clip) == ((1.0, 3.0), (2.0, 4.0))
    assert shades(read_frames(clipped.video, 16, "stretch", 8, clipped.clip)) == [1, 2]
    assert shades(read_frames(clipped.video, 16, "stretch", 1, clipped.clip)) == [2]  # the middle
    # at 5 frames per second, get_index of its script takes frames 5 and 14 for 2 segments
    assert shades(read_frames(clipped.video, 16, "stretch", 2, (0.2, 3.9))) == [1, 2]
    reds = read_frames(frames.video, 8, "stretch", 8, frames.clip, folder_fps=3.0)[:, 0, 0, 0]
    assert np.round(reds / 10).tolist() == [6, 9]
    with pytest.raises(ValueError, match=r"lasts 4\.0 s and the clip begins at 9 s"):
        read_frames(clipped.video, 16, "stretch", 8, (9.0, 10.0))
    write(tmp_path / "json" / "action_sequence.json", [{**entry, "end": None}])
    with pytest.raises(ValueError, match=r"clip from 1\.0 to None"):
        read_benchmark("mvbench", tmp_path)


def names_in_the_script(start: float, end: float, images: int, segments: int) -> list[int]:
    """MVBench's own selection of images, reimplemented: names are numbers from 1, 3 per second."""
    first, last = max(1, round(start * 3)), min(round(end * 3), images)
    part = float(last - first) / segments
    return [int(first + part / 2 + np.round(part * number)) for number in range(segments)]


def test_images_of_folders_are_those_of_mvbenchs_script() -> None:
    rng, compared = np.random.default_rng(0), 0
    for _ in range(2000):
        images, segments = int(rng.integers(60, 400)), int(rng.choice([4, 8, 16]))
        start = float(rng.uniform(0, images / 3 - 1))
        end = start + float(rng.uniform(0, 60))
        wanted = names_in_the_script(start, end, images, segments)
        chosen = (numbers_of_clip(images, (start, end), 3.0, segments) + 1).tolist()
        if whole_seconds(min(end, images / 3) - start) > segments:
            compared += 1
            assert chosen == wanted
        else:  # one per second, where its script takes more
            assert chosen[0] == max(1, round(start * 3))
            assert set(np.diff(chosen)) <= {3, 2, 1, 0}
            assert max(chosen) <= images
    assert compared > 1000


def test_clips_of_mvbench_that_are_turned_round_or_a_moment(tmp_path: Path) -> None:
    """MVBench's script shows the time between start and end, whichever comes first."""
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
    spans = [(3.0, 1.0), (2.0, 2.0), (-1.0, 1.0)]
    clips = [{**entry, "start": start, "end": end} for start, end in spans]
    write(tmp_path / "json" / "action_sequence.json", clips)
    video(tmp_path / "star" / "a.mp4", seconds=4)
    questions = read_benchmark("mvbench", tmp_path).questions
    assert [shades(read_frames(q.video, 16, "stretch", 8, q.clip)) for q in questions] == [[1, 2], [2], [0]]


def test_copies_of_mvbench_that_hold_clips_alone_are_not_cut_again(tmp_path: Path) -> None:
    """As in lmms-eval's copies: the clip is named in the questions, or only on the disk."""
    entry = {"question": "What?", "candidates": ["x", "y"], "answer": "y", "start": 1.25, "end": 15.4}
    write(tmp_path / "json" / "action_sequence.json", [{**entry, "video": "USNP1_1.25_15.4.mp4"}])
    write(tmp_path / "json" / "object_interaction.json", [{**entry, "question": "Which?", "video": "USNP1.mp4"}])
    cut = video(tmp_path / "star" / "Charades_segment" / "USNP1_1.25_15.4.mp4")
    questions = read_benchmark("mvbench", tmp_path).questions
    assert [(question.video, question.clip) for question in questions] == [(cut, None)] * 2
    video(tmp_path / "star" / "Charades_v1_480" / "USNP1.mp4")
    first, second = read_benchmark("mvbench", tmp_path).questions
    assert (first.clip, second.clip) == (None, (1.25, 15.4))
    assert second.video.name == "USNP1.mp4"


def test_question_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", seconds=1)
    (tmp_path / "x.json").write_text('[{"video": ')
    with pytest.raises(ValueError, match=r"x\.json"):
        read_benchmark("mvbench", tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x\.parquet"):
        read_benchmark("video_mme", tmp_path)


def test_videos_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """They are distinguished by the path in an entry, or by the folder in which the set keeps the videos of a task;
    never at random."""
    entry = {"question": "What?", "candidates": ["x", "y"], "answer": "y"}
    for folder in ("clevrer/video_validation", "perception/videos", "7_other"):
        video(tmp_path / folder / "v.1.mp4", seconds=1)
    write(tmp_path / "moving_count.json", [{**entry, "video": "v.1.mp4"}])
    write(tmp_path / "action_count.json", [{**entry, "video": "v.1.mp4"}])
    write(tmp_path / "x.json", [{**entry, "video": "7_other/v.1.mp4"}])
    found = {question.task: question.video.parent.name for question in read_benchmark("mvbench", tmp_path).questions}
    assert found == {"moving_count": "video_validation", "action_count": "videos", "x": "7_other"}
    copy = tmp_path / "data0613" / "clevrer" / "video_validation" / "v.1.mp4"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((tmp_path / "clevrer/video_validation/v.1.mp4").read_bytes())
    assert len(read_benchmark("mvbench", tmp_path).questions) == 3
    for folder in ("perception/videos", "7_other", "data0613/clevrer/video_validation"):  # other videos, other content
        video(tmp_path / folder / "v.1.mp4", seconds=2)
    with pytest.raises(ValueError, match=r"moving_count\.json: the entry 'What\?'.*may be"):
        read_benchmark("mvbench", tmp_path)
    copy.unlink()
    write(tmp_path / "y.json", [{**entry, "video": "v.1.mp4"}])
    with pytest.raises(ValueError, match=r"y\.json: the entry 'What\?'.*may be .*v\.1\.mp4 or .*v\.1\.mp4"):
        read_benchmark("mvbench", tmp_path)


def test_another_video_of_the_same_name_is_not_taken(tmp_path: Path) -> None:
    """The other video is in another folder of MVBench, below folders other than those in the name, or lacks the name's
    ending."""
    only = video(tmp_path / "star" / "Charades_v1_480" / "X1.mp4", seconds=1)
    videos = Videos(tmp_path)
    for name, folder in (
        ("X1.mp4", "sta/sta_video"),
        ("b/X1.mp4", "star/Charades_v1_480"),
        ("b/X1", "1_plotQA"),
        ("X1.cut", "star/Charades_v1_480"),
        ("Charades_v1_480/X1.cut", "star/Charades_v1_480"),
    ):
        assert videos.find(name, folder) is None, (name, folder)
    for name, folder in (
        ("X1.mp4", "star/Charades_v1_480"),
        ("X1.mp4", "1_plotQA"),
        ("X1", "star/Charades_v1_480"),
        ("X1.webm", "star/Charades_v1_480"),
        ("Charades_v1_480/X1.MP4", "star/Charades_v1_480"),
        ("star/Charades_v1_480/X1", "data"),
    ):
        assert videos.find(name, folder) == only, (name, folder)
    entry = {"video": "X1.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
    write(tmp_path / "json" / "action_sequence.json", [entry])
    write(tmp_path / "json" / "action_localization.json", [entry, {**entry, "start": 0.0, "end": 1.0}])
    benchmark = read_benchmark("mvbench", tmp_path)
    assert ([question.task for question in benchmark.questions], benchmark.without_video) == (["action_sequence"], 2)
    (tmp_path / "v.1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "v.1" / "0.png")
    own = video(tmp_path / "sta" / "sta_video" / "X1.mkv", seconds=1)
    videos = Videos(tmp_path)
    assert videos.find("X1.mp4", "sta/sta_video") == own  # not the one with the same name in star/
    assert videos.find("v.1", "data") == videos.find("v.1.mp4", "data") == tmp_path / "v.1"
    assert videos.find("v", "data") is None


@pytest.mark.parametrize("candidates", [{"A": "x", "B": "y"}, "ab", [["x"], ["y"]]])
def test_candidates_of_another_form_are_refused(tmp_path: Path, candidates: Any) -> None:
    video(tmp_path / "videos" / "a.mp4")
    entry = {"video": "a.mp4", "question": "Which?", "candidates": candidates, "answer": "A"}
    write(tmp_path / "task.json", [entry])
    with pytest.raises(ValueError, match="no list of texts"):
        read_benchmark("mvbench", tmp_path)


def test_folders_of_videos_and_of_questions_may_be_links(tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "question": "What?", "candidates": ["red", "blue"], "answer": "blue"}
    write(tmp_path / "disk" / "json" / "1_colour.json", [entry])
    video(tmp_path / "disk" / "videos" / "a.mp4")
    (tmp_path / "set").mkdir()
    for name in ("json", "videos"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "disk" / name)
    benchmark = read_benchmark("mvbench", tmp_path / "set")
    assert (len(benchmark.questions), benchmark.without_video) == (1, 0)
    assert len(read_frames(benchmark.questions[0].video, 28, "stretch", 64)) == 3


def mme(file: Path, *rows: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = {"videoID": "a", "duration": "short", "question": "Which?", "options": ["A. x", "B. y"], "answer": "B"}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([whole | row for row in rows]), file)


def test_answers_of_video_mme_that_are_no_letter_of_theirs_are_counted(tmp_path: Path) -> None:
    video(tmp_path / "data" / "a.mp4")
    written = [{"question": f"{said}?", "answer": said} for said in ("b", "B.", "(B)", "B. y", "E", "", None)]
    mme(tmp_path / "videomme" / "test.parquet", *written)
    found = read_benchmark("video_mme", tmp_path)
    assert [(question.question, question.answer) for question in found.questions] == [
        (f"{said}?", 1) for said in ("b", "B.", "(B)", "B. y")
    ]
    assert found.unscored == 3


def test_a_parquet_file_of_something_else_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    video(tmp_path / "data" / "a.mp4")
    pq.write_table(pa.table({"path": ["a"], "vector": [[1.0]]}), tmp_path / "features.parquet")
    with pytest.raises(FileNotFoundError, match="no parquet file with the questions"):
        read_benchmark("video_mme", tmp_path)
    mme(tmp_path / "videomme" / "test.parquet", {})
    assert len(read_benchmark("video_mme", tmp_path).questions) == 1
    assert "features.parquet is left out: no questions of Video-MME, its columns are path, vector" in caplog.text
    pq.write_table(pa.table({"question": ["?"], "options": [["A. x"]], "videoID": ["a"]}), tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"more\.parquet: of the columns .* it lacks answer, duration"):
        read_benchmark("video_mme", tmp_path)


def test_options_of_video_mme_lose_their_letters_alone(tmp_path: Path) -> None:
    video(tmp_path / "data" / "a.mp4")
    given = [["A. A. Milne", "B. C. Lewis"], ["(A) x", "(B) y"], ["U.S.A.", "I. Newton"]]
    mme(tmp_path / "videomme" / "test.parquet", *({"question": f"{n}?", "options": o} for n, o in enumerate(given)))
    options = [question.options for question in read_benchmark("video_mme", tmp_path).questions]
    assert options == [("A. Milne", "C. Lewis"), ("x", "y"), ("U.S.A.", "I. Newton")]


def test_questions_of_video_mme_found_twice_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video(tmp_path / "data" / "a.mp4")
    for folder in ("one", "two"):
        mme(tmp_path / folder / "test.parquet", {}, {"question": "Another?"})
    assert len(read_benchmark("video_mme", tmp_path).questions) == 2
    assert "2 questions are left out, which another file has" in caplog.text


def test_a_list_without_answers_does_not_displace_one_with_them(tmp_path: Path) -> None:
    """MLVU's test set has the questions in one file, and the same questions with answers in another."""
    entry = {"video": "a.mp4", "question": "Which?", "candidates": ["x", "y"], "question_type": "count"}
    video(tmp_path / "video" / "a.mp4")
    write(tmp_path / "leaderboard" / "test_question.json", [entry])
    write(tmp_path / "test-ground-truth" / "test_mcq_gt.json", [{**entry, "answer": "y"}])
    found = read_benchmark("mlvu", tmp_path)
    assert [question.answer for question in found.questions] == [1]
    assert found.unscored == 0


def test_a_list_of_all_tasks_need_not_say_which_video_of_a_name(tmp_path: Path) -> None:
    entries = {
        "moving_count": {"video": "v.mp4", "question": "How many move?", "candidates": ["1", "2"], "answer": "1"},
        "action_count": {"video": "v.mp4", "question": "How often?", "candidates": ["1", "2"], "answer": "2"},
    }
    video(tmp_path / "clevrer" / "video_validation" / "v.mp4", seconds=2)
    video(tmp_path / "perception" / "videos" / "v.mp4", seconds=3)
    for name, entry in entries.items():
        write(tmp_path / "json" / f"{name}.json", [entry])
    write(tmp_path / "test.json", list(entries.values()))
    found = {question.task: question.video.parts[-3] for question in read_benchmark("mvbench", tmp_path).questions}
    assert found == {"moving_count": "clevrer", "action_count": "perception"}
    write(tmp_path / "test.json", [{**entries["moving_count"], "question": "Another?"}])
    with pytest.raises(ValueError, match="may be"):
        read_benchmark("mvbench", tmp_path)


def test_hidden_folders_and_notes_of_macos_are_no_part_of_a_set(tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "question": "Which?", "candidates": ["x", "y"], "answer": "y"}
    video(tmp_path / "data" / "a.mp4")
    write(tmp_path / "json" / "count.json", [entry])
    write(tmp_path / "json" / ".ipynb_checkpoints" / "count-checkpoint.json", [{**entry, "question": "Old?"}])
    for name in ("__MACOSX/data/a.mp4", "data/._a.mp4", "__MACOSX/json/._count.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a note")
    (question,) = read_benchmark("mvbench", tmp_path).questions
    assert (question.question, question.video) == ("Which?", tmp_path / "data" / "a.mp4")


def test_a_question_with_one_candidate_cannot_be_scored(tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "question": "Which?", "candidates": ["x", "y"], "answer": "y"}
    video(tmp_path / "a.mp4")
    write(tmp_path / "json" / "count.json", [entry, {**entry, "question": "One?", "candidates": ["y"]}])
    found = read_benchmark("mvbench", tmp_path)
    assert (len(found.questions), found.unscored) == (1, 1)
