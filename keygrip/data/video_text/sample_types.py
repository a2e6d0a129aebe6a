"""A video with its conversations, and which of its frames are taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keygrip.data.spacing import evenly

LONGEST_KIND = 64  # characters


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. role: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Text about a video, which belongs to the first user turn; where its tokens go is the model's affair.

    Args:
        turns: in order; at least one is the assistant's.
        kind: what is asked ("caption", "mark", "cue", "glance", "text", ...); every report keeps kinds apart.
        evidence: the ground truth from which the answer follows, plain JSON values; {} where there is none.
    """

    turns: tuple[Turn, ...]
    kind: str
    evidence: dict[str, Any]

    def among(self, taken: Sequence[int]) -> Conversation:
        """The same about some frames of the video: its evidence counts the frame that it names (`frame`) among those
        taken, and names none where that was left out."""
        frame, places = self.evidence.get("frame"), list(taken)
        if not isinstance(frame, int) or (frame < len(places) and places[frame] == frame):
            return self
        other = {name: value for name, value in self.evidence.items() if name != "frame"}
        return replace(self, evidence=other | ({"frame": places.index(frame)} if frame in places else {}))

    @property
    def has_place(self) -> bool:
        """Whether its evidence says where in a frame its thing is: `frame`, `pixel` (x, y), `pixels_seen`."""
        return {"frame", "pixel", "pixels_seen"} <= self.evidence.keys()

    def in_square(self, sizes: Sequence[tuple[int, int]], size: int, fit: str) -> Conversation:
        """The same about frames that were brought into a square: the place in its evidence in pixels of the square, and
        none where it was cut off.

        Args:
            sizes: (width, height) of each frame before. size: edge of the square. fit: how, one of `FITS`.
        """
        number = self.evidence.get("frame")
        if not self.has_place or not isinstance(number, int) or not 0 <= number < len(sizes):
            return self
        if sizes[number] == (size, size):
            return self
        width, height = sizes[number]
        by = {"crop": (size / min(width, height),) * 2, "pad": (size / max(width, height),) * 2}
        across, down = by.get(fit, (size / width, size / height))
        x, y = self.evidence["pixel"]  # the middle stays the middle
        place = {
            "pixel": [size / 2 + (x - width / 2) * across, size / 2 + (y - height / 2) * down],
            "pixels_seen": self.evidence["pixels_seen"] * across * down,
        }
        other = {name: value for name, value in self.evidence.items() if name not in place}
        return replace(self, evidence=other | (place if all(0 <= each <= size for each in place["pixel"]) else {}))


@dataclass(frozen=True)
class VideoTextSample:
    """A video and the conversations about it, each independent of the others.

    Args:
        frames: uint8 [F, S, S, 3] RGB; F = 0 for text alone, 1 for an image.
        conversations: one or more.
        source: the collection that it is from ("robot_videos", "smoltalk", ...).
        key: unique in its collection.
        seconds: F, when each frame was taken; () of images that have no common time; None where it is not known.
        cut: it is a clip of a longer one (`keygrip.data.video_text.clips`).
        left_out: conversations that are missing since their rows are too long (`keygrip.data.video_text.context`).
    """

    frames: np.ndarray
    conversations: tuple[Conversation, ...]
    source: str
    key: str
    seconds: tuple[float, ...] | None = None
    cut: bool = False
    left_out: int = 0


def kind_problem(kind: str) -> str | None:
    """What is wrong with the name of a kind; None where nothing is. It is chosen by in settings, and metrics are named
    after it."""
    if len(kind) > LONGEST_KIND:
        return f"the kind {kind[:20]!r}... has {len(kind)} characters, more than the {LONGEST_KIND} that one may have"
    if not kind.isprintable() or kind != kind.strip() or not kind:
        return (
            f"the kind {kind!r} is empty, has a line break or another character that cannot be printed, or a blank at "
            "its ends: write it without"
        )
    return None


def kinds_column(kinds: Iterable[str]) -> str:
    """Kinds as an index holds them: sorted, with a blank between two, and %20 for one within a name."""
    return " ".join(sorted({kind.replace("%", "%25").replace(" ", "%20") for kind in kinds}))


def kinds_of(column: str) -> list[str]:
    """The kinds of a `kinds_column`."""
    return [kind.replace("%20", " ").replace("%25", "%") for kind in column.split()]


def thinned(sample: VideoTextSample, max_frames: int) -> VideoTextSample:
    """The sample with at most so many of its frames, evenly spaced."""
    if len(sample.frames) <= max_frames:
        return sample
    taken = evenly(len(sample.frames), max_frames)
    seconds = seconds_of(sample.seconds, taken) if sample.seconds else sample.seconds
    told = tuple(each.among(taken) for each in sample.conversations)
    return replace(sample, frames=sample.frames[taken], conversations=told, seconds=seconds)


def image_repeated(
    frames: np.ndarray, seconds: tuple[float, ...], image_frames: int
) -> tuple[np.ndarray, tuple[float, ...]]:
    """A single image [1, S, S, 3] as so many equal frames of one moment, with their seconds (() where there is none);
    more frames, or none, as they are."""
    if len(frames) != 1 or image_frames == 1:
        return frames, seconds
    return np.repeat(frames, image_frames, axis=0), seconds * image_frames


def image_seconds(fps: Any, taken: Sequence[int]) -> tuple[float, ...]:
    """When images were taken at `fps`, a number or its text; () where they have no common time (null).

    Raises:
        ValueError: it is no rate, and there are several images: one is of second 0 at any rate.
    """
    if fps is None:
        return ()
    if len(taken) < 2:
        return (0.0,) * len(taken)
    try:
        rate = float("nan" if isinstance(fps, bool) else fps)
    except (TypeError, ValueError):
        rate = math.nan
    if not 1e-6 < rate < 1e6:
        raise ValueError(
            f"its fps is {str(fps)[:40]!r}: frames per second are a positive number, or null for images "
            "without a common time"
        )
    return tuple(number / rate for number in taken)


def seconds_of(seconds: Sequence[float] | np.ndarray, taken: Sequence[int]) -> tuple[float, ...] | None:
    """Seconds of the frames that were taken; None where a video gave fewer frames than its length promises."""
    return tuple(float(seconds[n]) for n in taken) if not taken or taken[-1] < len(seconds) else None
