"""Read animations that PIL opens (GIF, APNG, animated WebP), one frame per second, as for videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from keygrip.data.bad_samples import convert_errors
from keygrip.data.video import TIME_TOLERANCE_S
from keygrip.data.video_text.conversations import shown_image

MOST_FRAMES = 10_000  # all frames are decoded, since each one only stores changes to the earlier ones
UNTIMED_MS = 100.0  # duration of a frame that states 0, as in browsers


def frame_count(image: Image.Image) -> int:
    """Return the number of frames or pages of a PIL image; 1 for a camera's JPEG with previews or a stereo pair.

    Raises:
        ValueError: the image is damaged or closed.
    """
    with convert_errors("an image that is given"):
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def animation_frames(
    image: Image.Image, size: int, fit: str, times: Callable[[float], Sequence[float] | np.ndarray]
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return frames uint8 [F, S, S, 3] and the second of each; pages without durations are shown for one second each.

    Args:
        size, fit: see `fit_image`. times: see `keygrip.data.video.frames_at`.

    Raises:
        ValueError: a frame cannot be decoded, there are more than `MOST_FRAMES` frames, or `times` raises it.
    """
    count = frame_count(image)
    if count > MOST_FRAMES:
        raise ValueError(f"an animation of {count} frames, more than {MOST_FRAMES}: give the frames that are meant")
    current_page = image.tell()
    with convert_errors("an animation that is given"):
        # the duration of a WebP frame is known only after it is loaded
        durations = [float(frame.info.get("duration", 1000.0)) or UNTIMED_MS for frame in _load_frames(image, count)]
        ends = np.cumsum(durations) / 1000
        seconds = times(float(ends[-1]))
        indices = np.searchsorted(ends, np.array(seconds) + TIME_TOLERANCE_S, side="right").clip(max=count - 1).tolist()
        frames = enumerate(_load_frames(image, count))
        page_images = {index: shown_image(frame, size, fit) for index, frame in frames if index in indices}
        image.seek(current_page)
    return np.stack([page_images[index] for index in indices]), tuple(map(float, seconds))


def _load_frames(image: Image.Image, count: int) -> Iterator[Image.Image]:
    """Yield the image at each of its frames in turn: if a frame were skipped, its content would be missing later."""
    for number in range(count):
        image.seek(number)
        image.load()
        yield image
