"""Times of frames: a clock that counts seconds, and time stamps in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from macos import leave_notes
from PIL import Image
from shard_sets import picture
from vlm_parts import frames_of, rows_of, small_module

from keygrip.data.batches import Turn, VideoTextSample, VideoTextStatistics
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.conversations import answer, describe_video_text, read_sample, video_text_parts
from keygrip.data.video_text.sample_types import thinned
from keygrip.data.video_text.video_files import read_timed_frames
from keygrip.models.foveated_vlm.conversations import ConversationCollator, frame_times
from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.streaming import StreamingSession
from keygrip.models.language.tokenizers import TrainedTokenizer

Build = Callable[..., FoveatedVLM]
TEXTS = [(0, 9, 4), (1, 7, 7), (0, 5, 0)]
COUNTS = [3, 5]
THINNED = [(0.0, 7.5, 15.0), (0.0, 3.0, 6.0, 9.0, 12.0)]


@torch.no_grad()
def test_seconds_of_one_frame_per_second_are_frame_numbers(build: Build) -> None:
    frames, rows = frames_of(COUNTS), rows_of(TEXTS, COUNTS)
    each = replace(rows, seconds=[tuple(map(float, range(count))) for count in COUNTS])
    thinned = replace(rows, seconds=THINNED)
    counting, clock = build(frame_clock="seconds"), build(frame_clock=True)
    for mode in MODES:
        wanted = clock(frames, rows, mode).hidden
        torch.testing.assert_close(counting(frames, each, mode).hidden, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(clock(frames, thinned, mode).hidden, wanted)  # it counts frames, whatever the seconds
        assert not torch.allclose(counting(frames, thinned, mode).hidden, wanted, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_row_knows_its_own_seconds_in_a_batch_too(build: Build, mode: str) -> None:
    network = build(frame_clock="seconds", query_source="coarse")
    frames, rows = frames_of(COUNTS), rows_of(TEXTS, COUNTS)
    together = network(frames, replace(rows, seconds=THINNED), mode).hidden
    for row, (video, length, at) in enumerate(TEXTS):
        alone = rows_of([(0, length, at)], [COUNTS[video]])
        alone = replace(alone, input_ids=rows.input_ids[row : row + 1, :length], seconds=[THINNED[video]])
        hidden = network(frames[video : video + 1, : COUNTS[video]], alone, mode).hidden
        torch.testing.assert_close(together[row, : hidden.shape[1]], hidden[0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_stream_of_timed_frames_is_the_whole_video(build: Build) -> None:
    network = build(frame_clock="seconds")
    frames, rows = frames_of([5]), rows_of([(0, 9, 4)], [5])
    session = StreamingSession(network, None)  # type: ignore[arg-type]
    session.read(rows.input_ids[0, :4].tolist())
    for frame, second in zip(frames[0], THINNED[1], strict=True):
        session.push(frame, second)
    session.read(rows.input_ids[0, 4:].tolist())
    whole = network(frames, replace(rows, seconds=[THINNED[1]]), "autoregressive").hidden
    assert session._row.state is not None
    torch.testing.assert_close(session._row.state[0, 0], whole[0, -1], atol=1e-4, rtol=1e-4)


def test_unknown_seconds_and_clocks_are_refused(build: Build) -> None:
    network, frames = build(frame_clock="seconds"), frames_of(COUNTS)
    for seconds in (None, [THINNED[0], None], [THINNED[0], THINNED[0]]):
        with pytest.raises(ValueError, match="when the frames were taken is not known"):
            network(frames, replace(rows_of(TEXTS, COUNTS), seconds=seconds), "coarse_only")
    with pytest.raises(ValueError, match="frame_clock is true, false or seconds"):
        build(frame_clock="minutes")


@pytest.mark.parametrize("clock", [False, True, "seconds"])
def test_clips_that_keep_their_times_need_frames_that_say_them(tmp_path: Path, clock: bool | str) -> None:
    texts = ["At second 3, what? 7"] * 3
    module = small_module(tmp_path, texts, frame_clock=clock)
    kept = VideoTextStatistics(tmp_path, "f", 28, "stretch", 8, lambda: iter(texts), clips_keep_times=True)
    if clock == "seconds":
        module.set_statistics(kept)
    else:
        with pytest.raises(ValueError, match=r"data\.clips\.rebased=false.*frame_clock=seconds"):
            module.set_statistics(kept)
    module.set_statistics(replace(kept, clips_keep_times=False))


def test_a_video_longer_than_the_frame_numbers_is_refused_before_training(tmp_path: Path) -> None:
    texts = ["At second 3, what? 7"] * 3
    module = small_module(tmp_path, texts, frame_numbers=4)
    there = VideoTextStatistics(tmp_path, "f", 28, "stretch", 8, lambda: iter(texts), longest_video=4)
    module.set_statistics(there)
    with pytest.raises(ValueError, match=r"frame_numbers=4: the data have videos of 5 frames"):
        module.set_statistics(replace(there, longest_video=5))


def test_kinds_of_coarse_steps_must_be_asked(tmp_path: Path) -> None:
    texts = ["At second 3, what? 7"] * 3
    module = small_module(tmp_path, texts)
    module.coarse_kinds = frozenset(["glance", "cuee"])
    there = VideoTextStatistics(tmp_path, "f", 28, "stretch", 8, lambda: iter(texts))
    module.set_statistics(there)  # the kinds are unknown here
    with pytest.raises(ValueError, match=r"model\.coarse_kinds=\['cuee'\]: asked are glance, mark"):
        module.set_statistics(replace(there, kinds=frozenset(["mark", "glance"])))


def sample(count: int, seconds: tuple[float, ...] | None) -> VideoTextSample:
    frames = np.zeros((count, 28, 28, 3), np.uint8)
    return VideoTextSample(frames, (answer("At second 3, what?", "7", "mark"),), "tours", "t", seconds)


def collator(folder: Path, **options: object) -> ConversationCollator:
    made = ConversationCollator(TrainedTokenizer(320), "question_first", "answers", **options)  # type: ignore[arg-type]
    made.prepare(folder, lambda: iter(["At second 3, what? 7", "12 frames, one every 1 s, from 0 s to 11 s."] * 3))
    return made


def test_time_stamps_are_told_before_the_question(tmp_path: Path) -> None:
    assert frame_times((0.0, 1.0, 2.0)) == "3 frames, one every 1 s, from 0 s to 2 s."
    assert frame_times((0.0, 2.5, 5.0)) == "3 frames, one every 2.5 s, from 0 s to 5 s."
    assert frame_times((4.0,)) == "1 frame, at 4 s."
    assert frame_times((0.0, 999.4, 9999.4)) == "3 frames, one every 5000 s, from 0 s to 9999 s."
    assert frame_times((0.0, 999.4)) == "2 frames, one every 999 s, from 0 s to 999.4 s."
    assert frame_times((0.0, 10799.0)) == "2 frames, one every 10799 s, from 0 s to 10799 s."
    assert frame_times((12345.4, 13345.2)) == "2 frames, one every 1000 s, from 12345 s to 13345 s."
    assert frame_times((9999.6,)) == "1 frame, at 10000 s."
    plain, told = collator(tmp_path), collator(tmp_path, timestamps=True)
    samples = [sample(3, (0.0, 2.5, 5.0)), sample(0, ())]
    without, with_times = plain(samples), told(samples)
    said = [
        told.tokenizer.decode(ids[mask].tolist())
        for ids, mask in zip(  # type: ignore[union-attr]
            with_times.input_ids, with_times.attention_mask, strict=True
        )
    ]
    assert "3 frames, one every 2.5 s, from 0 s to 5 s.\nAt second 3, what?" in said[0]
    assert "frame" not in said[1]
    count = int(without.attention_mask[1].sum())
    assert torch.equal(with_times.input_ids[1, :count], without.input_ids[1, :count])
    prompt = told.prompt((Turn("user", "At second 3, what?"),), (0.0, 2.5, 5.0))
    assert with_times.input_ids[0, : len(prompt.ids)].tolist() == prompt.ids
    assert prompt.visual_at == with_times.visual_at[0]  # after the question
    assert with_times.seconds == [(0.0, 2.5, 5.0), ()]
    assert with_times.seconds_of(0) == (0.0, 2.5, 5.0)


def test_times_that_are_not_known_are_no_row(tmp_path: Path) -> None:
    told = collator(tmp_path, timestamps=True)
    batch = told([sample(2, (0.0, 1.0)), sample(2, None)])
    assert (len(batch), batch.left_out) == (1, 1)
    with pytest.raises(ValueError, match=r"collator\.timestamps=true: when the frames of a video were taken"):
        told.prompt((Turn("user", "?"),))
    assert collator(tmp_path).prompt((Turn("user", "?"),)).ids  # by default the times are not needed


def test_images_without_a_common_time_are_told_none_and_numbered(build: Build, tmp_path: Path) -> None:
    told = collator(tmp_path, timestamps=True)
    batch = told([sample(3, ()), sample(1, (0.0,))])
    said = [told.tokenizer.decode(ids[mask]) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert "frame" not in said[0]
    assert "1 frame, at 0 s." in said[1]
    assert thinned(sample(5, ()), 3).seconds == ()
    rows, frames = rows_of(TEXTS, COUNTS), frames_of(COUNTS)
    timed = [tuple(map(float, range(3))), THINNED[1]]
    network = build(frame_clock="seconds")
    hidden = [network(frames, replace(rows, seconds=each), "coarse_only").hidden for each in ([(), THINNED[1]], timed)]
    torch.testing.assert_close(*hidden)


def test_shards_and_folders_say_when_their_frames_were_taken(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set" / "s-000.tar") as writer:
        for number, fps in enumerate((2.0, 1.0)):
            parts = video_text_parts([picture(n) for n in range(9)], [answer("?", "x", "mark")], "s", fps, "png")
            writer.add(f"s{number}", *parts)
    write_manifest(tmp_path / "set", describe_video_text, progress=False)
    shards = ShardSet(tmp_path / "set")
    assert read_sample(shards, 0, 8).seconds == tuple(n / 2 for n in range(9))
    assert read_sample(shards, 1, 8, max_frames=3).seconds == (0.0, 4.0, 8.0)
    for number in range(5):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.png")
    leave_notes(tmp_path / "images")
    assert read_timed_frames(tmp_path / "images", 8, "stretch", 3)[1] == (0.0, 2.0, 4.0)
    assert read_timed_frames(tmp_path / "images", 8, "stretch", 9, (2.0, 4.0))[1] == (0.0, 1.0)
