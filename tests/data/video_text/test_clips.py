"""Sub-clips: frames, evidence and text have the same time, which begins at 0; by default nothing is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import CharacterCollator, picture, write_set

from keygrip.data.shards.remote import ShardCache
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.shards.writer import ShardWriter, write_manifest
from keygrip.data.video_text.clips import SubClips
from keygrip.data.video_text.conversations import answer, caption, describe_video_text, video_text_parts
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.sample_types import Conversation, VideoTextSample
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.tokenizers import TrainedTokenizer


def asked(frame: int, kind: str = "mark") -> Conversation:
    """Return a question about a second; its answer is the shade of the frame."""
    return answer(f"At second {frame}, which shade?", str(6 * frame), kind, {"frame": frame, "colour": "red"})


def tour(count: int, *conversations: Conversation) -> VideoTextSample:
    frames = np.stack([np.full((4, 4, 3), 6 * n, np.uint8) for n in range(count)])
    return VideoTextSample(frames, conversations, "tours", "t1", tuple(float(n) for n in range(count)))


def test_a_clip_has_one_time_in_frames_evidence_and_words() -> None:
    sample = tour(8, caption("all of it"), *[asked(n) for n in range(8)], asked(3, "cue"), asked(4, "cue"))
    clip = SubClips([2, 4], lookback={"cue": 1}).cut(sample, 3, 6)
    assert clip is not None
    assert clip.frames[:, 0, 0, 0].tolist() == [18, 24, 30]
    assert clip.seconds == (0.0, 1.0, 2.0)
    assert clip.key == "t1[3:6]"
    told = [(c.kind, c.turns[0].text, c.turns[1].text, c.evidence["frame"]) for c in clip.conversations]
    assert told == [
        ("mark", "At second 0, which shade?", "18", 0),
        ("mark", "At second 1, which shade?", "24", 1),
        ("mark", "At second 2, which shade?", "30", 2),
        ("cue", "At second 1, which shade?", "24", 1),  # the cue at frame 3 refers to frame 2
    ]
    assert sample.conversations[4].evidence["frame"] == 3  # the evidence of the video is unchanged


def test_a_clip_may_keep_the_times_of_its_video() -> None:
    sample = tour(8, *[asked(n) for n in range(8)], asked(4, "cue"))
    clip = SubClips([2, 4], lookback={"cue": 1}, rebased=False).cut(sample, 3, 6)
    assert clip is not None
    assert clip.frames[:, 0, 0, 0].tolist() == [18, 24, 30]
    assert clip.seconds == (3.0, 4.0, 5.0)
    told = [(c.kind, c.turns[0].text, c.turns[1].text, c.evidence["frame"]) for c in clip.conversations]
    assert told == [
        ("mark", "At second 3, which shade?", "18", 0),  # evidence counts the clip's own frames
        ("mark", "At second 4, which shade?", "24", 1),
        ("mark", "At second 5, which shade?", "30", 2),
        ("cue", "At second 4, which shade?", "24", 1),
    ]


def test_words_about_seconds_outside_of_the_clip_leave_a_question_out() -> None:
    both = answer("From second 2 to Second 5, what?", "x", "mark", {"frame": 4})
    clips = SubClips([2, 4])
    kept = clips.cut(tour(8, both), 2, 6)
    assert kept is not None
    assert kept.conversations[0].turns[0].text == "From second 0 to Second 3, what?"
    assert clips.cut(tour(8, both), 3, 6) is None


def test_clips_are_a_function_of_sample_and_epoch() -> None:
    sample = tour(40, *[asked(n) for n in range(40)])
    clips = SubClips([4, 9], share=0.5)
    cut = [clips.of(sample, 0, SampleKey(n, 0)) for n in range(200)]
    lengths = [len(clip.frames) for clip in cut]
    assert set(lengths) == {4, 5, 6, 7, 8, 9, 40}
    assert 70 <= lengths.count(40) <= 130  # half of them stay whole
    starts = {int(clip.frames[0, 0, 0, 0]) for clip in cut}
    assert len(starts) > 20
    assert all(clips.of(sample, 0, SampleKey(n, 0)).key == cut[n].key for n in range(20))
    assert [clips.of(sample, 0, SampleKey(n, 1)).key for n in range(20)] != [clip.key for clip in cut[:20]]


def test_what_has_no_clip_stays_whole() -> None:
    clips = SubClips([4, 9], share=1.0)
    key = SampleKey(0, 0)
    short, about_all = tour(4, asked(0)), tour(12, caption("all of it"))
    sparse = VideoTextSample(tour(12).frames, (asked(3),), "tours", "t", tuple(2.0 * n for n in range(12)))
    unknown = VideoTextSample(tour(12).frames, (asked(3),), "tours", "t")
    for sample in (short, about_all, sparse, unknown):
        assert clips.of(sample, 0, key) is sample
    whole = tour(12, *[asked(n) for n in range(12)])
    assert SubClips([4, 9], share=0.0).of(whole, 0, key) is whole
    for wrong in ([0, 3], [5, 4], [3]):
        with pytest.raises(ValueError, match=r"data\.clips\.frames"):
            SubClips(wrong)
    with pytest.raises(ValueError, match=r"data\.clips\.share=2"):
        SubClips([1, 2], share=2)


def batches(root: Path, clips: SubClips | None, max_frames: int = 8) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """Return (key, frames, questions and answers) of the video of every training row. Check its frames against the
    text."""
    data = VideoTexts(
        {"tours": ShardSource(root)},
        CharacterCollator(),
        image_size=4,
        batch_size=4,
        max_frames=max_frames,
        clips=clips,
        num_workers=0,
    )
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        for row, text in enumerate(batch.texts):
            video = int(batch.video_index[row])
            count = int(batch.frame_mask[video].sum())
            if "[" in batch.key[row]:
                shade = int(batch.frames[video, text.evidence["frame"], 0, 0, 0])
                assert shade == int(text.turns[1].text)
                assert text.turns[0].text.startswith(f"At second {text.evidence['frame']},")
            found.append((batch.key[row], count, [(turn.role, turn.text) for turn in text.turns]))
    return found


def test_training_batches_hold_clips_and_by_default_none(tmp_path: Path) -> None:
    """Clips come from all parts of a video, of which training otherwise uses every third frame."""
    with ShardWriter(tmp_path / "train" / "t-000.tar") as writer:
        for number in range(12):
            told = [asked(n) for n in range(24)]
            images = [picture(6 * n, 4) for n in range(24)]
            writer.add(f"t{number}", *video_text_parts(images, told, "tours", extension="png"))
    write_manifest(tmp_path / "train", describe_video_text, progress=False)
    cut = batches(tmp_path, SubClips([3, 8], share=0.7))
    assert {count for key, count, _ in cut if "[" in key} <= set(range(3, 9))
    assert {count for key, count, _ in cut if "[" not in key} == {8}
    assert 2 <= len({key for key, _, _ in cut if "[" in key}) <= 12
    assert batches(tmp_path, None) == batches(tmp_path, SubClips([3, 8], share=0.0))


def test_two_sources_of_one_set_are_cut_differently(tmp_path: Path) -> None:
    """One source has clips of single frames, the other clips as `data.clips` says; held-out videos stay whole."""
    for split in ("train", "val"):
        with ShardWriter(tmp_path / split / "t-000.tar") as writer:
            for number in range(8):
                images = [picture(6 * n, 4) for n in range(8)]
                parts = video_text_parts(images, [asked(n) for n in range(8)], "tours", extension="png")
                writer.add(f"t{number}", *parts)
        write_manifest(tmp_path / split, describe_video_text, progress=False)
    single = ShardSource(tmp_path, clips=SubClips([1, 1], share=1.0), train_only=True)
    data = VideoTexts(
        {"tours": ShardSource(tmp_path), "single": single},
        CharacterCollator(),
        image_size=4,
        batch_size=4,
        clips=SubClips([3, 4], share=1.0),
        num_workers=0,
    )
    data.setup("fit")
    counts: dict[str, set[int]] = {"tours": set(), "single": set()}
    for batch in data.train_dataloader():
        for row, source in enumerate(batch.source):
            counts[source].add(int(batch.frame_mask[int(batch.video_index[row])].sum()))
    assert counts == {"tours": {3, 4}, "single": {1}}
    assert not data.statistics.clips_keep_times
    assert data.statistics.longest_video == 8  # of validation, which has whole videos
    assert max(part.longest_shown(64) for part in data.parts["train"]) == 4
    whole = [replace(part, clips=SubClips([3, 4], share=0.5)) for part in data.parts["train"]]
    assert max(part.longest_shown(64) for part in whole) == 8
    held_out = list(data.val_dataloader())
    assert {int(count) for batch in held_out for count in batch.frame_mask.sum(1)} == {8}
    assert {source for batch in held_out for source in batch.source} == {"tours"}
    assert {int(count) for count in data.worst_batches()[0].frame_mask.sum(1)} == {8}


def test_clips_are_refused_where_no_video_can_be_cut(tmp_path: Path) -> None:
    """Captions of web videos do not state which frame they describe."""
    with ShardWriter(tmp_path / "train" / "t-000.tar") as writer:
        for number in range(8):
            images = [picture(6 * n, 4) for n in range(9)]
            writer.add(f"t{number}", *video_text_parts(images, [caption("all of it")], "web", extension="png"))
    write_manifest(tmp_path / "train", describe_video_text, progress=False)
    with pytest.raises(
        ValueError, match=r"data\.clips: none of 8 training videos of more than 3 frames that were tried"
    ):
        batches(tmp_path, SubClips([3, 8]))
    with pytest.raises(ValueError, match=r"data\.clips: none of 0 training videos of more than 9 frames"):
        batches(tmp_path, SubClips([9, 20]))


def test_videos_that_cannot_be_reached_are_not_taken_for_uncut_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path / "far" / "train" / "t-000.tar") as writer:
        images = [picture(6 * n, 4) for n in range(8)]
        for number in range(4):
            writer.add(f"t{number}", *video_text_parts(images, [asked(n) for n in range(8)], "tours", extension="png"))
    write_manifest(tmp_path / "far" / "train", describe_video_text, progress=False)
    fetch = ShardCache.fetch

    def fetch_without_tars(self: ShardCache, name: str, *rest: Any, **options: Any) -> Path:
        if name == "t-000.tar":
            raise ConnectionError(f"{self.url}/{name} cannot be read")
        return fetch(self, name, *rest, **options)

    monkeypatch.setattr(ShardCache, "fetch", fetch_without_tars)
    source = {"tours": ShardSource(f"file://{tmp_path / 'far'}")}
    how = {"image_size": 4, "batch_size": 4, "clips": SubClips([2, 3]), "cache_dir": tmp_path / "near"}
    data = VideoTexts(source, CharacterCollator(), num_workers=0, **how)  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match=r"^file://.*t-000\.tar cannot be read$"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("kinds", "questions"), [(["cue"], None), (None, {"mark": 0}), (["cue", "mark"], {"mark": 0, "cue": 1})]
)
def test_a_clip_without_questions_of_the_kinds_that_are_used_is_none(
    kinds: list[str] | None, questions: dict[str, int] | None, tmp_path: Path
) -> None:
    """Every sample can be used, since it has a cue about its first second and marks about later ones."""
    with ShardWriter(tmp_path / "train" / "t-000.tar") as writer:
        for number in range(12):
            told = [asked(0, "cue"), *[asked(n) for n in range(8)]]
            images = [picture(6 * n, 4) for n in range(8)]
            writer.add(f"t{number}", *video_text_parts(images, told, "tours", extension="png"))
    write_manifest(tmp_path / "train", describe_video_text, progress=False)

    def module(clips: SubClips) -> VideoTexts:
        source = {"tours": ShardSource(tmp_path, kinds=kinds)}
        how = {"image_size": 4, "batch_size": 4, "clips": clips, "num_workers": 0, "questions": questions}
        return VideoTexts(source, CharacterCollator(), **how)

    data = module(SubClips([2, 3], share=1.0))
    data.setup("fit")
    rows = [
        (key, text.kind) for batch in data.train_dataloader() for key, text in zip(batch.key, batch.texts, strict=True)
    ]
    assert len(rows) == 12
    assert {kind for _, kind in rows} == {"cue"}
    cut = [key for key, _ in rows if "[" in key]
    assert 0 < len(cut) < 12
    assert all("[0:" in key for key in cut)


def test_clips_are_refused_where_no_question_that_is_used_names_a_frame(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train" / "t-000.tar") as writer:
        for number in range(4):
            told = [caption("all of it"), *[asked(n) for n in range(8)]]
            writer.add(f"t{number}", *video_text_parts([picture(6 * n, 4) for n in range(8)], told, "tours"))
    write_manifest(tmp_path / "train", describe_video_text, progress=False)
    clips = SubClips([2, 3], share=1.0)
    source = {"tours": ShardSource(tmp_path, kinds=["caption"])}
    data = VideoTexts(source, CharacterCollator(), image_size=4, batch_size=4, clips=clips, num_workers=0)
    with pytest.raises(ValueError, match=r"data\.clips: none of 4 .* of the kinds that are used"):
        data.setup("fit")


@pytest.mark.parametrize("fps", [2, None])
def test_clips_are_refused_where_frames_are_not_one_second_apart(fps: int | None, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train" / "t-000.tar") as writer:
        for number in range(4):
            images = [picture(6 * n, 4) for n in range(8)]
            writer.add(f"t{number}", *video_text_parts(images, [asked(n) for n in range(8)], "tours", fps, "png"))
    write_manifest(tmp_path / "train", describe_video_text, progress=False)
    with pytest.raises(
        ValueError, match=r"data\.clips: none of 4 .*more than 2 frames .* has frames that are one second apart"
    ):
        batches(tmp_path, SubClips([2, 3], share=1.0))


@pytest.mark.parametrize(
    ("clips", "words", "can"),
    [
        (SubClips([1, 2], lookback={"cue": 1}), "What?", True),
        (SubClips([1, 1], lookback={"cue": 1}), "What?", False),  # a clip of one frame lacks the frame before
        (SubClips([2, 8], lookback={"cue": 4}), "What?", False),  # the video has only 3 frames before
        (SubClips([2, 3]), "From second 1 to second 3, what?", True),
        (SubClips([2, 3]), "From second 3 to second 5, what?", True),
        (SubClips([2, 3]), "From second 2 to second 5, what?", False),
        (SubClips([2, 8]), "From second 3 to second 8, what?", False),  # the video ends at second 7
        (SubClips([2, 3]), "At 00:03, what?", False),
        (SubClips([2, 3], rebased=False), "At 00:03, what?", True),
        (SubClips([8, 9]), "What?", False),  # no longer than the shortest clip
    ],
)
def test_a_video_may_be_cut_if_one_of_all_its_clips_keeps_a_question(clips: SubClips, words: str, can: bool) -> None:
    said = answer(words, "x", "cue", {"frame": 3})
    assert clips.may_be_cut([caption("all of it"), said], 8) == can
    lengths = range(clips.frames[0], min(clips.frames[1], 7) + 1)
    all_clips = [clips.cut(tour(8, said), start, start + length) for length in lengths for start in range(9 - length)]
    assert any(clip is not None for clip in all_clips) == can


def test_clips_of_a_batch_are_counted(tmp_path: Path) -> None:
    collator = ConversationCollator(TrainedTokenizer(400), "question_first", "answers")
    whole = tour(8, *[asked(n) for n in range(8)])
    collator.prepare(tmp_path, lambda: iter(turn.text for c in whole.conversations for turn in c.turns))
    clip = SubClips([2, 4]).cut(whole, 3, 6)
    assert clip is not None
    assert collator([whole, clip, clip]).clips == 2


@pytest.mark.parametrize(
    "words",
    [
        *("What is there at 00:04?", "After 4 seconds, which shade?", "From second 3 to 5, which shade?", "at 4s?"),
        *("After three seconds, which?", "At the 3rd second, which?", "At minute 2, which?", "At second four, which?"),
        *("In the last second, which?", "Which in the first second?", "At t=4, which?", "In the first few seconds?"),
        *("In the second second?", "Which after twenty-one seconds?", "In minute two?", "At seconds 4 through 5?"),
        *("At seconds 4 & 5?", "At second 4/5?", "second 4 ~ 7", "second 4...7", "second 4-5", "second 4, 5 and 6?"),
        *("Second 4 until six?", "From 3 to second 5?", "At second 4.5?", "At second 4:30?", "Within seconds 4 came."),
        *("Within a second 4 came.", "At timestamp 4?", "In frame 4?", "In the 4th frame?", "At sec 4?", "second: 4?"),
        *("Second #4?", "4000 ms in?", "At time 4?", "At 4, which?", "At the beginning of the video?", "At the end?"),
        *("At the end of the scene, which?", "In the middle of the video?", "When the scene begins, which?"),
        *("When the video ends, which?", "In the last few seconds?", "When does it point at red?", "Which second?"),
    ],
)
def test_times_in_other_words_leave_a_question_out_of_a_clip_whose_time_begins_anew(words: str) -> None:
    said = answer(words, "24", "mark", {"frame": 4})
    sample = tour(8, said, asked(4))
    clip = SubClips([2, 4]).cut(sample, 3, 6)
    assert clip is not None
    assert [each.turns[0].text for each in clip.conversations] == ["At second 1, which shade?"]
    kept = SubClips([2, 4], rebased=False).cut(sample, 3, 6)
    assert kept is not None
    assert len(kept.conversations) == 2


@pytest.mark.parametrize(
    "words",
    [
        *("Which is the second cube?", "At second 4, is the last one red?", "The second of two?"),
        *("At second 4, how many of 3 cubes? (A) 3 (B) 5", "At second 4 two cubes are where?", "On second 4: 7"),
        *("At second 4, what is at the end of the table?", "At which cube did it point a second before?"),
        *(
            "At second 4, in the middle of the scene, which cube is red?",
            "At second 4, which half of the scene is dark?",
        ),
        *("Which digit does it show when it points?", "From second 4 to second 4, what?", "At second 4?\n3 or 5?"),
    ],
)
def test_words_that_are_no_times_stay_in_a_clip(words: str) -> None:
    clip = SubClips([2, 4]).cut(tour(8, answer(words, "24", "mark", {"frame": 4})), 3, 6)
    assert clip is not None
    assert clip.conversations[0].turns[0].text == words.replace("second 4", "second 1")


def test_a_lookback_is_a_number_of_frames_of_a_kind_that_there_is(tmp_path: Path) -> None:
    for wrong in (-3, "one", 1.5):
        with pytest.raises(ValueError, match=r"data\.clips\.lookback\.cue=.*: a number of frames, from 0 on"):
            SubClips([1, 2], lookback={"cue": wrong})  # type: ignore[dict-item]
    write_set(tmp_path / "train", [9] * 4)
    with pytest.raises(ValueError, match=r"clips\.lookback names 'cuee'; the sources hold mark"):
        batches(tmp_path, SubClips([1, 2], lookback={"cuee": 1}))
