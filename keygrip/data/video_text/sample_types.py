"""Types for a video with its conversations, and functions to select, repeat and pad frames."""

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
    """Text about a video. The video belongs to the first user turn; the model decides where its tokens are inserted.

    Args:
        turns: in order; at least one is from the assistant.
        kind: kind of question ("caption", "mark", "cue", "glance", "text", ...); every report lists kinds separately.
        evidence: the ground truth that determines the answer, plain JSON values; {} if there is none.
    """

    turns: tuple[Turn, ...]
    kind: str
    evidence: dict[str, Any]

    def for_frames(self, taken: Sequence[int]) -> Conversation:
        """Return the conversation for a selection of the video's frames: `frame` in the evidence becomes an index into
        the selected frames, and is removed if that frame was not selected."""
        frame, indices = self.evidence.get("frame"), list(taken)
        if not isinstance(frame, int) or (frame < len(indices) and indices[frame] == frame):
            return self
        other_evidence = {name: value for name, value in self.evidence.items() if name != "frame"}
        return replace(self, evidence=other_evidence | ({"frame": indices.index(frame)} if frame in indices else {}))

    @property
    def has_place(self) -> bool:
        """Whether the evidence has the position of its object in a frame: `frame`, `pixel` (x, y), `pixels_seen`."""
        return {"frame", "pixel", "pixels_seen"} <= self.evidence.keys()

    def in_square(self, sizes: Sequence[tuple[int, int]], size: int, fit: str) -> Conversation:
        """Return the conversation for frames that were fitted into a square: the position in the evidence is converted
        to pixels of the square, and removed if it was cut off.

        Args:
            sizes: (width, height) of each frame before. size: edge of the square. fit: one of `FITS`.
        """
        frame_index = self.evidence.get("frame")
        if not self.has_place or not isinstance(frame_index, int) or not 0 <= frame_index < len(sizes):
            return self
        if sizes[frame_index] == (size, size):
            return self
        width, height = sizes[frame_index]
        scales = {"crop": (size / min(width, height),) * 2, "pad": (size / max(width, height),) * 2}
        across, down = scales.get(fit, (size / width, size / height))
        x, y = self.evidence["pixel"]  # the centre of the frame is the centre of the square
        converted = {
            "pixel": [size / 2 + (x - width / 2) * across, size / 2 + (y - height / 2) * down],
            "pixels_seen": self.evidence["pixels_seen"] * across * down,
        }
        other_evidence = {name: value for name, value in self.evidence.items() if name not in converted}
        return replace(
            self, evidence=other_evidence | (converted if all(0 <= each <= size for each in converted["pixel"]) else {})
        )


@dataclass(frozen=True)
class VideoTextSample:
    """A video and the conversations about it, each independent of the others.

    Args:
        frames: uint8 [F, S, S, 3] RGB; F = 0 for text alone, 1 for an image.
        conversations: one or more.
        source: the collection that the sample is from ("robot_videos", "smoltalk", ...).
        key: unique in its collection.
        seconds: the times of the F frames; () for images without a common time; None if the times are unknown.
        cut: whether it is a clip of a longer video (`keygrip.data.video_text.clips`).
        left_out: number of conversations left out because their rows are too long (`keygrip.data.video_text.context`).
    """

    frames: np.ndarray
    conversations: tuple[Conversation, ...]
    source: str
    key: str
    seconds: tuple[float, ...] | None = None
    cut: bool = False
    left_out: int = 0


def kind_problem(kind: str) -> str | None:
    """Return what is wrong with the name of a kind; None if it is valid. Settings and the names of metrics use it."""
    if len(kind) > LONGEST_KIND:
        return f"the kind {kind[:20]!r}... has {len(kind)} characters, more than the {LONGEST_KIND} that one may have"
    if not kind.isprintable() or kind != kind.strip() or not kind:
        return (
            f"the kind {kind!r} is empty, has a line break or another character that cannot be printed, or a blank at "
            "its ends: write it without"
        )
    return None


def kinds_column(kinds: Iterable[str]) -> str:
    """Join kinds for a column of the index: sorted, separated by blanks, with %20 for a blank inside a name."""
    return " ".join(sorted({kind.replace("%", "%25").replace(" ", "%20") for kind in kinds}))


def kinds_of(column: str) -> list[str]:
    """Split the text of a `kinds_column` into kinds."""
    return [kind.replace("%20", " ").replace("%25", "%") for kind in column.split()]


def thinned(sample: VideoTextSample, max_frames: int) -> VideoTextSample:
    """Return the sample with at most `max_frames` evenly spaced frames."""
    if len(sample.frames) <= max_frames:
        return sample
    indices = evenly(len(sample.frames), max_frames)
    seconds = seconds_of(sample.seconds, indices) if sample.seconds else sample.seconds
    conversations = tuple(each.for_frames(indices) for each in sample.conversations)
    return replace(sample, frames=sample.frames[indices], conversations=conversations, seconds=seconds)


def repeat_image(
    frames: np.ndarray, seconds: tuple[float, ...], image_frames: int
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Repeat a single image [1, S, S, 3] as `image_frames` equal frames with the same second (() if there is none);
    return several frames, or none, unchanged."""
    if len(frames) != 1 or image_frames == 1:
        return frames, seconds
    return np.repeat(frames, image_frames, axis=0), seconds * image_frames


def pad_videos(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Return videos [F, S, S, 3] as one uint8 array [B, F, S, S, 3], padded at the end with black frames."""
    padded = np.zeros((len(videos), max(map(len, videos)), *videos[0].shape[1:]), np.uint8)
    for row, video in enumerate(videos):
        padded[row, : len(video)] = video
    return padded


def image_seconds(fps: Any, taken: Sequence[int]) -> tuple[float, ...]:
    """Return the times of images at `fps`, a number or its text; () if they have no common time (null).

    Raises:
        ValueError: `fps` is not a valid rate and there are several images; a single image is at second 0 for any rate.
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
    return tuple(index / rate for index in taken)


def seconds_of(seconds: Sequence[float] | np.ndarray, taken: Sequence[int]) -> tuple[float, ...] | None:
    """Return the seconds of the selected frames; None if a video has fewer frames than its length implies."""
    return tuple(float(seconds[n]) for n in taken) if not taken or taken[-1] < len(seconds) else None
