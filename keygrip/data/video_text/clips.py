"""Cut clips out of longer training videos; their times (of frames, in metadata and in words) restart at 0 or stay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from keygrip.data.shards.sampling import SampleKey
from keygrip.data.video_text.sample_types import Conversation, Turn, VideoTextSample, thinned
from keygrip.training.parts import data_part

SECOND = re.compile(r"\b(seconds?\s+)(\d+)\b", re.IGNORECASE)  # "At second 12, ..."
# The only form that is rewritten. "seconds 12" may begin a range, or be in "within seconds 12 people came".
ONE_SECOND = re.compile(r"\bsecond\s+\d+\b(?![.,:]\d)", re.IGNORECASE)
TAKEN_OUT = "\0"  # replaces such a second while the text is searched for other forms of times
NUMBER = (
    r"(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|dozen|half\s+an?|few|several|couple\s+of)"
)
ORDINAL = (
    r"(?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|last|final|"
    r"opening|closing|next|previous)"
)
UNIT = r"(?:ms|(?:milli)?sec(?:ond)?s?|mins?|minutes?|hours?|hrs?|frames?)"
COUNTED = rf"(?:{UNIT}|time\s?(?:stamps?|codes?)?|moment)"  # words that a number may follow
JOINED = r"(?:to|and|or|until|till|through|thru|vs|versus)\b"
RANGE = r"(?:[/&~+\u2013\u2014\u2026-]|\.{2,})"
VIDEO = r"(?:video|clip|recording|footage|film|movie|sequence)"
SCENE = rf"(?:{VIDEO}|scene)"  # the middle or half of a scene may be spatial, so these are matched with VIDEO only
OTHER_TIMES = re.compile(
    "|".join(
        (
            r"\d:\d\d\b|\bt\s*=\s*\d",  # 00:04, t=4
            rf"\b{NUMBER}[\s-]*(?:more\s+)?(?:{UNIT}|s)\b",  # 4s, after four seconds, 4000 ms
            rf"\b{ORDINAL}[\s-]+(?:{NUMBER}\s+)?(?:{COUNTED})\b",  # the 4th frame, the last few seconds
            rf"\b{COUNTED}[\W_]*(?:(?:no|nr|number|index)\b[\W_]*)?(?:is\s+)?(?:\d|{NUMBER}\b)",  # frame 4, second #4
            rf"{TAKEN_OUT}\s*(?:(?:{RANGE}|,)\s*\d|(?:,\s*)?{JOINED}\s*{NUMBER}\b)",  # second 4 & 7, second 4 through 7
            rf"\b{NUMBER}\s*(?:{RANGE}|{JOINED})\s*{TAKEN_OUT}",  # 4 to second 7
            rf"\b(?:an?|each|every|per|the)\s+{TAKEN_OUT}",  # within a second 4 people came
            # at 4, from 4 to 7
            rf"\b(?:at|until|till|since|from|between)\s+\d+\s*(?:$|[,;?!)]|\.(?!\d)|{RANGE}|{JOINED})",
            # the end of the video, when the video begins, at the start
            rf"\b(?:middle|half|quarter|rest)\s+of\s+(?:the|this)\s+(?:\w+\s+)?{VIDEO}\b",
            rf"\b(?:beginning|start|end)\s+of\s+(?:the|this)\s+(?:\w+\s+)?{SCENE}\b",
            rf"\b{SCENE}(?:'s|\s+\w+)?\s+(?:begins|starts|ends|stops|beginning|start|end)\b",
            r"\bat\s+the\s+(?:very\s+)?(?:beginning|start|end)\s*(?:$|[,.;?!])",
        )
    ),
    re.IGNORECASE,
)
# A question about a time that is answered by a number alone.
ASKED_TIME = re.compile(
    rf"\b(?:when\s+(?:is|are|was|were|do|does|did|has|have|will)|(?:which|what)\s+{COUNTED})\b.*\n\W*{NUMBER}\W*$",
    re.IGNORECASE | re.MULTILINE,
)
STREAM = 1  # random stream for clips, separate from that for the choice of questions


@data_part
@dataclass(frozen=True)
class SubClips:
    """Settings for cutting clips out of training videos with one frame per second.

    A clip keeps the conversations whose evidence names one of its frames. Conversations about the whole video
    (captions) describe more than the clip shows and are left out. Times in words are recognised only in the form
    "second 12". If the clip's time restarts at 0, conversations with times in another form ("00:12", "after 12
    seconds", "seconds 12 to 15", "frame 12", "the end of the video") are left out. A video stays whole if no question
    is about the clip or its frames are not one second apart. Training refuses clips if none of the tested videos can be
    cut (`may_be_cut`).

    Args:
        frames: [fewest, most] of a clip; shorter videos stay whole.
        share: share of the longer videos, chosen at random, that are cut in each epoch; the others stay whole.
        lookback: by kind, the number of frames before its own that a question refers to; the clip must contain these
            frames too.
        rebased: True: times in a clip restart at second 0. False: frames and words keep the times of the video, for a
            model that receives the second of each frame (`frame_clock=seconds`): it learns late seconds from few
            frames.

    Raises:
        ValueError: the range is invalid, the share is outside of 0..1, or a lookback is not a number of frames.
    """

    frames: Sequence[int]
    share: float = 0.5
    lookback: Mapping[str, int] = field(default_factory=dict)
    rebased: bool = True

    def __post_init__(self) -> None:
        if len(self.frames) != 2 or not 1 <= self.frames[0] <= self.frames[1]:
            raise ValueError(f"data.clips.frames={list(self.frames)}: [fewest, most] frames, at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"data.clips.share={self.share}: a share lies in 0..1")
        for kind, frames in self.lookback.items():
            if not isinstance(frames, int) or frames < 0:
                raise ValueError(f"data.clips.lookback.{kind}={frames!r}: a number of frames, from 0 on")

    def may_be_cut(self, conversations: Sequence[Conversation], frames: int) -> bool:
        """Whether some clip of a video with `frames` frames, one second apart, keeps one of its conversations."""
        return frames > self.frames[0] and any(self._fits_some_clip(each, frames) for each in conversations)

    def _fits_some_clip(self, conversation: Conversation, frames: int) -> bool:
        frame, length = conversation.evidence.get("frame"), min(self.frames[1], frames)  # the longest clips keep most
        if not isinstance(frame, int):
            return False
        first = min([frame - self.lookback.get(conversation.kind, 0), *_named_seconds(conversation)])
        start = max(0, min(first, frames - length))  # the clip that ends last of those with all the frames required
        return self._convert_to_clip(conversation, start, start + length) is not None

    def of(self, sample: VideoTextSample, seed: int, key: SampleKey) -> VideoTextSample:
        """Return the sample, or a clip of it: a pure function of the seed, the sample and the epoch."""
        fewest, most = self.frames
        count = len(sample.frames)
        if count <= fewest or not one_second_apart(sample.seconds, count):
            return sample
        entropy = np.random.SeedSequence((seed, key.epoch, key.sample, STREAM))
        rng = np.random.Generator(np.random.PCG64(entropy))
        if rng.random() >= self.share:
            return sample
        length = int(rng.integers(fewest, min(most, count) + 1))
        start = int(rng.integers(0, count - length + 1))
        return self.cut(sample, start, start + length) or sample

    def cut(self, sample: VideoTextSample, start: int, stop: int) -> VideoTextSample | None:
        """Return frames `start` to `stop` (exclusive) with the questions about them; None if there are no questions."""
        clip_conversations = [self._convert_to_clip(each, start, stop) for each in sample.conversations]
        conversations = tuple(each for each in clip_conversations if each is not None)
        if not conversations:
            return None
        return replace(
            sample,
            frames=sample.frames[start:stop],
            conversations=conversations,
            key=f"{sample.key}[{start}:{stop}]",  # different frames need a different key where caches use the key
            cut=True,
            seconds=tuple(float(n) for n in (range(stop - start) if self.rebased else range(start, stop))),
        )

    def _convert_to_clip(self, conversation: Conversation, start: int, stop: int) -> Conversation | None:
        frame = conversation.evidence.get("frame")
        if not isinstance(frame, int) or not start <= frame - self.lookback.get(conversation.kind, 0) <= frame < stop:
            return None
        if not all(start <= second < stop for second in _named_seconds(conversation)):
            return None
        turns = conversation.turns
        if self.rebased:
            if _contains_other_times(turns):
                return None
            turns = tuple(
                Turn(turn.role, SECOND.sub(lambda match: f"{match[1]}{int(match[2]) - start}", turn.text))
                for turn in turns
            )
        return replace(conversation, turns=turns, evidence={**conversation.evidence, "frame": frame - start})


def one_second_apart(seconds: Sequence[float] | None, frames: int) -> bool:
    """Whether the times of `frames` frames are 0, 1, 2, ... seconds."""
    return seconds is not None and tuple(seconds) == tuple(float(n) for n in range(frames))


def _named_seconds(conversation: Conversation) -> list[int]:
    """Return the seconds that a conversation names in the form "second 12"."""
    return [int(match[2]) for turn in conversation.turns for match in SECOND.finditer(turn.text)]


def _contains_other_times(turns: Sequence[Turn]) -> bool:
    """Whether a conversation contains a time in another form than "second 12"."""
    rest = [ONE_SECOND.sub(TAKEN_OUT, turn.text) for turn in turns]
    return any(map(OTHER_TIMES.search, rest)) or ASKED_TIME.search("\n".join(rest)) is not None


def clipped(
    sample: VideoTextSample, clips: SubClips | None, max_frames: int, seed: int, key: SampleKey
) -> VideoTextSample:
    """Return a clip of a sample (if `clips` are given), reduced to at most `max_frames` evenly spaced frames."""
    return thinned(sample if clips is None else clips.of(sample, seed, key), max_frames)
