"""A stream answers as the whole video does, after any number of frames, and can be asked again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from vlm_parts import frames_of, small_module

from keygrip.data.batches import Turn
from keygrip.data.video_text.conversations import fit_image
from keygrip.models.foveated_vlm.generation import generate
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.streaming import StreamingSession, pieces

QUESTION = "Which digit was on the red cube?"


def video(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 255, (frames, 28, 28, 3)).astype(np.uint8)


def whole(module: FoveatedVLMModule, frames: np.ndarray, mode: str) -> str:
    prompt = module.collator.prompt((Turn("user", QUESTION),))
    inputs = module.as_input(frames)
    return generate(module.network, module.tokenizer, inputs, [len(frames)], [prompt], [0], mode, 12).texts[0]


@pytest.mark.parametrize("source", ["fine", "coarse"])
@pytest.mark.parametrize("order", ["visual_first", "question_first"])
@pytest.mark.parametrize("mode", ["autoregressive", "coarse_only"])
@pytest.mark.quick_sets(4)
def test_a_stream_answers_as_the_whole_video_does(tmp_path: Path, source: str, order: str, mode: str) -> None:
    module = small_module(tmp_path, [QUESTION] * 3, order, query_source=source, frame_clock=source == "fine")
    frames, stream = video(5), None
    stream = module.stream(QUESTION, mode)
    for count in range(1, 6):
        stream.push(frames[count - 1])
        if count in (1, 3, 5):
            wanted = whole(module, frames[:count], mode)
            assert stream.answer(12) == wanted
            assert stream.answer(12) == wanted  # the first answer left no state behind
    assert stream.frames == 5


def test_the_states_of_a_stream_are_those_of_the_whole_video(build: Callable[..., FoveatedVLM]) -> None:
    from vlm_parts import rows_of

    network = build(query_source="coarse", frame_clock=True)
    frames, rows = frames_of([6]), rows_of([(0, 9, 4)], [6])
    with torch.inference_mode():
        output = network(frames, rows, "autoregressive")
        session = StreamingSession(network, None)  # type: ignore[arg-type]
        session.read(rows.input_ids[0, :4].tolist())
        for frame in frames[0]:
            session.push(frame)
        session.read(rows.input_ids[0, 4:].tolist())
    torch.testing.assert_close(session._row.state[0, 0], output.hidden[0, -1], atol=1e-4, rtol=1e-4)


def test_a_conversation_that_is_kept_goes_on_where_it_stood(tmp_path: Path) -> None:
    """Text, a frame, an answer, text again: the same as reading all of it at once."""
    module = small_module(tmp_path, [QUESTION] * 3, query_source="coarse")
    frame = module.as_input(video(1))[0, 0]
    first, second = [5, 9, 7], [11, 4, 8]
    session = StreamingSession(module.network, module.tokenizer)
    session.push(frame)
    unfinished = session.tokens(first, 6, keep=True)
    next(unfinished)
    unfinished.close()  # leaves no state behind
    said = list(session.tokens(first, 6, keep=True))
    session.push(frame)
    again = StreamingSession(module.network, module.tokenizer)
    again.push(frame)
    again.read([*first, *said, module.tokenizer.end_of_turn])
    again.push(frame)
    assert list(session.tokens(second, 6)) == list(again.tokens(second, 6))
    torch.testing.assert_close(session._driving.state, again._driving.state, atol=1e-5, rtol=1e-5)


def test_more_frames_than_a_table_holds(tmp_path: Path) -> None:
    module = small_module(tmp_path, [QUESTION] * 3, frame_clock=True)
    numbered = small_module(tmp_path, [QUESTION] * 3, frame_numbers=2)
    stream, limited = module.stream("?"), numbered.stream("?")
    frames = video(70)
    for frame in frames:
        stream.push(frame)
    assert stream.frames == 70
    limited.push(frames[0])
    limited.push(frames[1])
    with pytest.raises(ValueError, match=r"stream is full.* 3 frames and model\.network\.frame_numbers=2.*frame_clock"):
        limited.push(frames[2])
    assert limited.room == 0
    assert limited.frames == 2
    assert stream.room > 0


def test_what_does_not_fit_leaves_the_stream_as_it_was(tmp_path: Path) -> None:
    """The language model has 128 positions: a question that is too long is refused, a shorter question answered."""
    module = small_module(tmp_path, [QUESTION] * 3, query_source="coarse")
    frame = module.as_input(video(1))[0, 0]
    tried, other = (StreamingSession(module.network, module.tokenizer) for _ in range(2))
    for session in (tried, other):
        session.read([5, 9, 7] * 40)
        session.push(frame)
    for refused in (lambda: list(tried.tokens([5] * 8, 1)), lambda: tried.read([5] * 8)):
        with pytest.raises(ValueError, match="a row has 129 positions"):
            refused()
    assert list(tried.tokens([5, 9], 3)) == list(other.tokens([5, 9], 3))
    tried.push(frame)
    other.push(frame)
    assert tried.mark().readers[0][0] == other.mark().readers[0][0] == 122
    assert torch.equal(tried._row.state, other._row.state)


def test_impossible_answers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    module = small_module(tmp_path, [QUESTION] * 3, query_source="coarse")
    stream = module.stream(QUESTION)
    stream.push(np.zeros((28, 28, 3), np.uint8))
    for bad in ({"temperature": "0.5"}, {"temperature": None}, {"temperature": 1e39}, {"seed": 2**70}, {"seed": 1.5}):
        with pytest.raises(ValueError, match=r"is no seed|give 0"):
            stream.answer(4, **bad)  # type: ignore[arg-type]
    for count in ("4", 2.5, 0):
        with pytest.raises(ValueError, match=f"max_new_tokens={count}: it must be at least 1, and a whole number"):
            stream.answer(count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"answer_tokens=2\.5: it must be at least 1, and a whole number"):
        module.stream(QUESTION, answer_tokens=2.5)  # type: ignore[arg-type]
    assert stream.answer(2) == stream.answer(2)


def test_frames_wait_for_the_end_of_an_answer(tmp_path: Path) -> None:
    """A frame pushed during an answer would be placed after half of the answer and be discarded with it."""
    module = small_module(tmp_path, [QUESTION] * 3, query_source="coarse")
    stream, other = module.stream(QUESTION), module.stream(QUESTION)
    frames = video(2)
    stream.push(frames[0])
    other.push(frames[0])
    answer = stream.session.tokens([5, 9], 8)
    next(answer)
    with pytest.raises(ValueError, match="an answer is under way"):
        stream.push(frames[1])
    with pytest.raises(ValueError, match="an answer is under way"):
        stream.answer()
    answer.close()
    for each in (stream, other):
        each.push(frames[1])
    assert stream.frames == other.frames == 2
    assert stream.answer(8) == other.answer(8)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    module = small_module(tmp_path, [QUESTION] * 3)
    with pytest.raises(ValueError, match="mode=coarse_fine: a stream is seen in autoregressive or coarse_only"):
        module.stream("?", "coarse_fine")
    for frame, said in ((np.zeros((28, 28, 3)), "float64"), (np.zeros((28, 28), np.uint8), r"uint8 \[28, 28\]")):
        with pytest.raises(ValueError, match=rf"a frame is uint8 \[H, W, 3\], not {said}"):
            module.stream("?").push(frame)
    with pytest.raises(ValueError, match="a question is a text, not NoneType"):
        module.stream(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a question is empty"):
        module.stream(" ")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        module.stream("a\ud83d")
    stream = module.stream("?")
    stream.push(np.zeros((28, 28, 3), np.uint8))
    with pytest.raises(ValueError, match="max_new_tokens=0: it must be at least 1"):
        stream.answer(0)


def test_a_model_of_coarse_passes_alone_answers_so(tmp_path: Path) -> None:
    """The queries of the fine pass still have their initial random values in such a model."""
    module = small_module(tmp_path, [QUESTION] * 3, query_source="fine")
    frames = video(3)
    assert module.answer_mode == "autoregressive"
    module.mode = "coarse_only"
    stream = module.stream(QUESTION)
    for frame in frames:
        stream.push(frame)
    assert stream.session.mode == module.answer_mode == "coarse_only"
    assert stream.answer(12) == whole(module, frames, "coarse_only")


def test_frames_of_a_camera_are_brought_to_the_models_size(tmp_path: Path) -> None:
    from PIL import Image

    module = small_module(tmp_path, [QUESTION] * 3)
    module.image_options["fit"] = "pad"
    frame = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    sized, given, opened = module.stream("?"), module.stream("?"), module.stream("?")
    given.push(frame)
    opened.push(Image.fromarray(frame))
    sized.push(fit_image(Image.fromarray(frame), 28, "pad"))
    assert sized.session._row.state is not None
    assert torch.equal(given.session._row.state, sized.session._row.state)
    assert torch.equal(opened.session._row.state, sized.session._row.state)


def test_a_model_that_is_told_the_times_needs_them_before_the_frames(tmp_path: Path) -> None:
    module = small_module(tmp_path, [QUESTION] * 3)
    module.collator.timestamps = True
    frames = video(3)
    with pytest.raises(ValueError, match="when the frames of a video were taken is not known"):
        module.stream(QUESTION)
    stream = module.stream(QUESTION, seconds=(0.0, 1.0, 2.0))
    for frame in frames:
        stream.push(frame)
    prompt = module.collator.prompt((Turn("user", QUESTION),), (0.0, 1.0, 2.0))
    inputs = module.as_input(frames)
    wanted = generate(module.network, module.tokenizer, inputs, [3], [prompt], [0], "autoregressive", 12).texts[0]
    assert stream.answer(12) == wanted


def test_frames_are_of_the_seconds_that_the_stream_was_told(tmp_path: Path) -> None:
    """A frame may be pushed without a second or with the same second; another second and a frame too many are
    refused."""
    module, frames, seconds = small_module(tmp_path, [QUESTION] * 3, frame_clock=True), video(3), (0.0, 3.0, 7.5)
    told, given = module.stream(QUESTION, seconds=seconds), module.stream(QUESTION)
    for frame, second in zip(frames, seconds, strict=True):
        told.push(frame)
        given.push(frame, second)
    assert torch.equal(told.session._row.state, given.session._row.state)
    assert told.room == 0
    with pytest.raises(ValueError, match="is full: it was given the times of 3 frames, and all have been pushed"):
        told.push(frames[0])
    again = module.stream(QUESTION, seconds=seconds)
    assert again.room == 3
    again.push(frames[0], 0.0)
    assert again.room == 2
    with pytest.raises(ValueError, match=r"the frame has second=1; `seconds` of the stream gives 3 for it"):
        again.push(frames[1], 1.0)
    for wrong in ((1.0, 0.0), (float("nan"),)):
        with pytest.raises(ValueError, match="are finite and do not fall back"):
            module.stream(QUESTION, seconds=wrong)
    for wrong in (5, ["soon"]):
        with pytest.raises(ValueError, match="a number for each frame to come"):
            module.stream(QUESTION, seconds=wrong)


@pytest.mark.parametrize("source", ["fine", "coarse"])
def test_seconds_that_are_none_or_fall_back_are_refused_and_leave_the_stream_as_it_was(
    tmp_path: Path, source: str
) -> None:
    module = small_module(tmp_path, [QUESTION] * 3, query_source=source, frame_clock="seconds")
    frames = video(4)
    tried, other = module.stream(QUESTION), module.stream(QUESTION)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"a frame of second {bad}, the first one: seconds are finite"):
            tried.push(frames[0], bad)
    for stream in (tried, other):
        stream.push(frames[0], 5.0)
    for bad in (float("nan"), float("-inf"), 4.5, -1.0):
        with pytest.raises(
            ValueError, match=rf"a frame of second {bad:g}, behind one of second 5: .* do not fall back"
        ):
            tried.push(frames[1], bad)
    for bad in (1.7e9, 1e39):  # the time of day, and a value that float32 cannot represent
        with pytest.raises(ValueError, match="seconds count from the video's beginning"):
            tried.push(frames[1], bad)
    for odd in ([1], None, "frame.png"):
        with pytest.raises(ValueError, match=r"a frame is uint8 \[H, W, 3\] or a PIL image, not"):
            tried.push(odd)  # type: ignore[arg-type]
    for stream in (tried, other):
        stream.push(frames[1], 5.0)  # several cameras, or a clock of whole seconds
        stream.push(frames[2], 7.25)
    assert tried.frames == 3
    for mine, others in zip(tried.session._readers(), other.session._readers(), strict=True):
        assert torch.equal(mine.state, others.state)
    assert tried.answer(8) == other.answer(8)


def test_a_frame_without_a_second_comes_a_second_after_the_last(tmp_path: Path) -> None:
    """Counts from 0 if no frame has a second, and continues from a mark after going back to it."""
    module = small_module(tmp_path, [QUESTION] * 3, frame_clock="seconds")
    frames = module.as_input(video(5))[0]

    def state(*seconds: float | None) -> torch.Tensor:
        session = StreamingSession(module.network, module.tokenizer)
        for frame, second in zip(frames, seconds, strict=False):
            session.push(frame, second)
        return session._row.state

    assert torch.equal(state(None, None, None), state(0.0, 1.0, 2.0))
    assert torch.equal(state(5.0, None, 9.5, None), state(5.0, 6.0, 9.5, 10.5))
    assert not torch.equal(state(5.0, None), state(5.0, 1e3))
    session = StreamingSession(module.network, module.tokenizer)
    session.push(frames[0], 5.0)
    mark = session.mark()
    session.push(frames[4], 90.0)
    session.back(mark)
    session.push(frames[1])
    assert torch.equal(session._row.state, state(5.0, 6.0))


def test_pieces_are_whole_characters() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

        def is_byte(self, token: int) -> bool:
            return False  # as in a byte-level tokenizer: later bytes do not change complete characters

    text = "a\u00e9\u20acb"
    found = list(pieces(Bytes(), iter(text.encode())))  # type: ignore[arg-type]
    assert found == list(text)
    found = list(pieces(Bytes(), iter(b" \n a  b \n")))  # type: ignore[arg-type]
    assert found == ["a", "  b"]  # the same as an answer that is not streamed
    assert list(pieces(Bytes(), iter(b"  "))) == []  # type: ignore[arg-type]


def test_a_full_stream_still_answers(tmp_path: Path) -> None:
    """A camera stream does not end: when only the room for an answer is left, frames are refused but answers are
    given."""
    module = small_module(tmp_path, [QUESTION] * 3, context=96)
    stream, frames = module.stream(QUESTION, answer_tokens=12), video(1)
    room = stream.room
    assert 1 < room < 96
    for _ in range(room):
        stream.push(frames[0])
    assert stream.room == 0
    with pytest.raises(ValueError, match=f"the stream is full: {room} frames and room for an answer of 12 tokens"):
        stream.push(frames[0])
    assert stream.answer(12) == stream.answer(12) == stream.answer()  # as many tokens as there is room for
    with pytest.raises(ValueError, match=r"max_new_tokens=13: .* has room for 12 tokens of an answer"):
        stream.answer(13)
    with pytest.raises(ValueError, match="no frame has room"):
        module.stream(QUESTION, answer_tokens=90)


def test_a_model_in_bfloat16_streams(tmp_path: Path) -> None:
    module = small_module(tmp_path, [QUESTION] * 3).to(torch.bfloat16)
    stream = module.stream(QUESTION)
    stream.push(video(1)[0])
    assert isinstance(stream.answer(4), str)
