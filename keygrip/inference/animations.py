"""Animations that are given as PIL images (GIF, APNG, animated WebP), with the time of each frame."""

from __future__ import annotations

import numpy as np
from PIL import Image

from keygrip.data.bad_samples import guard
from keygrip.data.video_text.conversations import shown_image
from keygrip.data.video_text.sample_types import evenly

MOST_FRAMES = 10_000  # all are decoded, for what a frame changes lies in those before it
UNTIMED_MS = 100.0  # of a frame that says 0: what browsers show


def frame_count(image: Image.Image) -> int:
    """Frames or pages of a PIL image; a camera's JPEG with previews or a stereo pair has one.

    Raises:
        ValueError: it is damaged or closed.
    """
    with guard("an image that is given"):
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def animation_frames(image: Image.Image, size: int, fit: str, most: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """uint8 [F, S, S, 3] and the second of each frame from the first on; pages without durations come one per second.

    Args:
        size, fit: see `fit_image`. most: of more frames, so many evenly spaced.

    Raises:
        ValueError: a frame cannot be decoded, or there are more than `MOST_FRAMES`.
    """
    count = frame_count(image)
    if count > MOST_FRAMES:
        raise ValueError(f"an animation of {count} frames, more than {MOST_FRAMES}: give the frames that are meant")
    kept = set(evenly(count, most))
    frames, times, now, before = [], [], 0.0, image.tell()
    with guard("an animation that is given"):
        for number in range(count):
            image.seek(number)
            image.load()  # WebP says only then how long a frame is shown
            if number in kept:
                frames.append(shown_image(image, size, fit))
                times.append(now)
            now += (float(image.info.get("duration", 1000.0)) or UNTIMED_MS) / 1000
        image.seek(before)
    return np.stack(frames), tuple(times)
