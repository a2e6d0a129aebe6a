"""Sub-clips of longer videos for training: their time begins at 0 again, in frames, metadata and words, or is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from keygrip.data.shards.sampling import SampleKey
from keygrip.data.video_text.sample_types import Conversation, Turn, VideoTextSample, thinned
from keygrip.training.parts import data_part

SECOND = re.compile(r"\b(seconds?\s+)(\d+)\b", re.IGNORECASE)  # "At second 12, ..."
NUMBER = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty)"
)
ORDINAL = (
    r"(?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|last|final|"
    r"opening|closing|next|previous)"
)
# Other ways to say a time, which are not rewritten: 00:04, after 4 seconds, from second 3 to 5, after four seconds, at
# minute 2, second four, in the 4th or the last second, t=4.
OTHER_TIMES = re.compile(
    r"\b\d+:\d\d\b|\b\d+(?:\.\d+)?\s*-?(?:s|secs?|seconds?|mins?|minutes?)\b"
    r"|\bseconds?\s+\d+\s*(?:to|and|or|until|,|-|\u2013)\s*\d+"
    rf"|\b{NUMBER}[\s-]+(?:more\s+)?(?:seconds?|minutes?)\b|\bminutes?\s+(?:\d|{NUMBER}\b)|\bseconds?\s+{NUMBER}\b"
    rf"|\b{ORDINAL}\s+(?:few\s+|couple\s+of\s+)?(?:seconds?|minutes?)\b(?!\s+\d)|\bt\s*=\s*\d",
    re.IGNORECASE,
)
STREAM = 1  # of random numbers, apart from that of the choice of questions


@data_part
@dataclass(frozen=True)
class SubClips:
    """How clips are cut out of training videos of one frame per second.

    A clip keeps the conversations whose evidence names a frame of it; those about the whole video (captions) tell of
    more than it shows and are left out. Seconds in words are known in the form "second 12"; conversations that say
    times in another form ("00:12", "after 12 seconds") are left out of a clip whose time begins anew. A video in which
    nothing is asked about the clip, or whose frames are not a second apart, stays whole. Training refuses clips where
    no video that was tried can be cut (`may_be_cut`).

    Args:
        frames: [fewest, most] of a clip; shorter videos stay whole.
        share: of the longer videos, at random, cut in each epoch; the others stay whole.
        lookback: by kind, how many frames before its own a question speaks of: these too must lie in the clip.
        rebased: times of a clip begin at second 0. False: frames and words keep the video's, for a model whose frames
            say their second (`frame_clock=seconds`): it learns late seconds from few frames.

    Raises:
        ValueError: a range that is none, a share outside of 0..1, or a lookback that is no number of frames.
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

    def may_be_cut(self, conversations: Sequence[Conversation]) -> bool:
        """Whether some conversation says of which frame it speaks."""
        return any(isinstance(each.evidence.get("frame"), int) for each in conversations)

    def of(self, sample: VideoTextSample, seed: int, key: SampleKey) -> VideoTextSample:
        """The sample, or a clip of it: a pure function of the seed, the sample and the epoch."""
        fewest, most = self.frames
        count = len(sample.frames)
        if count <= fewest or sample.seconds != tuple(float(n) for n in range(count)):
            return sample
        entropy = np.random.SeedSequence((seed, key.epoch, key.sample, STREAM))
        rng = np.random.Generator(np.random.PCG64(entropy))
        if rng.random() >= self.share:
            return sample
        length = int(rng.integers(fewest, min(most, count) + 1))
        start = int(rng.integers(0, count - length + 1))
        return self.cut(sample, start, start + length) or sample

    def cut(self, sample: VideoTextSample, start: int, stop: int) -> VideoTextSample | None:
        """Frames `start` to `stop` (exclusive) with the questions about them; None where there are none."""
        kept = [self._of_clip(each, start, stop) for each in sample.conversations]
        conversations = tuple(each for each in kept if each is not None)
        if not conversations:
            return None
        return replace(
            sample,
            frames=sample.frames[start:stop],
            conversations=conversations,
            key=f"{sample.key}[{start}:{stop}]",  # other frames: a name of their own wherever something is kept by name
            cut=True,
            seconds=tuple(float(n) for n in (range(stop - start) if self.rebased else range(start, stop))),
        )

    def _of_clip(self, conversation: Conversation, start: int, stop: int) -> Conversation | None:
        frame = conversation.evidence.get("frame")
        if not isinstance(frame, int) or not start <= frame - self.lookback.get(conversation.kind, 0) <= frame < stop:
            return None
        said = [int(match[2]) for turn in conversation.turns for match in SECOND.finditer(turn.text)]
        if not all(start <= second < stop for second in said):
            return None
        turns = conversation.turns
        if self.rebased and any(OTHER_TIMES.search(turn.text) for turn in turns):
            return None
        if self.rebased:
            turns = tuple(
                Turn(turn.role, SECOND.sub(lambda match: f"{match[1]}{int(match[2]) - start}", turn.text))
                for turn in turns
            )
        return replace(conversation, turns=turns, evidence={**conversation.evidence, "frame": frame - start})


def clipped(
    sample: VideoTextSample, clips: SubClips | None, max_frames: int, seed: int, key: SampleKey
) -> VideoTextSample:
    """A clip of a sample where there are any, then at most so many frames, evenly."""
    return thinned(sample if clips is None else clips.of(sample, seed, key), max_frames)
