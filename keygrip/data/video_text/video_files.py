"""Read videos from a user's disk: a video file, a folder of images, or one image."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from keygrip.data.bad_samples import BadSample
from keygrip.data.source_files import files_in
from keygrip.data.spacing import evenly
from keygrip.data.untrusted_files import open_image, read_bytes
from keygrip.data.video import frames_at
from keygrip.data.video_text.animations import animation_frames, frame_count
from keygrip.data.video_text.conversations import MAX_FRAMES, decode_image, decode_timed, fit_image, whole_seconds

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_timed_frames(
    path: str | Path,
    size: int,
    fit: str,
    max_frames: int,
    clip: tuple[float, float] | None = None,
    folder_fps: float | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read frames uint8 [F, S, S, 3]: one frame per second of a video or an animation, or every image of a folder,
    sorted by the numbers in the names (2.jpg before 10.jpg). Also return the second of each frame, from the first frame
    (of the clip).

    If there are more than `max_frames` frames, `max_frames` evenly spaced ones are used.

    Args:
        clip: read only these seconds (start, end), at least one frame; if they are more than `max_frames` seconds, read
            the frames in the middle of `max_frames` equal parts. folder_fps: images per second of a folder, for clips;
            a clip of more than `max_frames` seconds has the same images as in MVBench's script (`numbers_of_clip`), a
            shorter clip has one image per second. None: the images are at seconds 0, 1, 2, ...

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no images. ValueError: the file cannot be decoded,
            or ends before the clip begins.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(files_in(path, *SUFFIXES), key=_number_sort_key)
        if not files:
            raise FileNotFoundError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        if clip is not None:
            times = clip_times(len(files) / (folder_fps or 1), clip, max_frames, path)
            indices = times.astype(int)
            if folder_fps is not None:
                indices = numbers_of_clip(len(files), clip, folder_fps, max_frames)
                times = indices / folder_fps
            return np.stack([read_image(files[index], size, fit) for index in indices]), _relative_to_first(times)
        keep = evenly(len(files), max_frames)
        return np.stack([read_image(files[index], size, fit) for index in keep]), tuple(map(float, keep))
    if not path.exists():
        raise FileNotFoundError(f"there is no video, image or folder at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a named pipe or a device, not a file")
    if path.suffix.lower() in SUFFIXES:
        animation = read_animation(path, size, fit, max_frames, clip)
        return animation or (read_image(path, size, fit)[None], (0.0,))
    times = np.zeros(0)

    def chosen(duration: float) -> np.ndarray:
        nonlocal times
        assert clip is not None
        times = clip_times(duration, clip, max_frames, path)
        return times

    try:
        if clip is not None:
            clip_frames = frames_at(str(path), chosen, lambda image: fit_image(image, size, fit))
            return np.stack(clip_frames), _relative_to_first(times)
        frames, times = decode_timed(str(path), size, fit, max(MAX_FRAMES, max_frames))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    keep = evenly(len(frames), max_frames)
    return frames[keep], tuple(float(times[index]) for index in keep)


def _relative_to_first(times: np.ndarray) -> tuple[float, ...]:
    return tuple(float(time - times[0]) for time in times)


def clip_times(duration: float, clip: tuple[float, float] | None, max_frames: int, path: Path) -> np.ndarray:
    """Return the seconds of a clip's frames, at least one; without a clip, those of the whole video. Raise ValueError
    if the video ends before the clip begins."""
    if clip is None:
        return np.array(evenly(whole_seconds(duration), max_frames), float)
    start, end = clip[0], min(clip[1], duration)
    if start > 0 and start >= duration:
        raise ValueError(f"{path} lasts {duration:.1f} s and the clip begins at {start:g} s")
    count = whole_seconds(end - start)
    if count <= max_frames:
        return start + np.arange(count)
    return start + (np.arange(max_frames) + 0.5) * (end - start) / max_frames


def numbers_of_clip(count: int, clip: tuple[float, float], fps: float, max_frames: int) -> np.ndarray:
    """Return which of a folder's `count` images, counted from 0, belong to a clip (see `clip_times`). As in MVBench's
    script (`get_index` with first_idx=1), image n, counted from 1, is at second n / fps, and for a clip of more than
    `max_frames` seconds the middles are rounded. A shorter clip has one image per second; the script uses the same
    number of images for every clip."""
    first, last = max(1, round(clip[0] * fps)), min(round(clip[1] * fps), count)
    seconds = whole_seconds(min(clip[1], count / fps) - clip[0])
    if seconds <= max_frames:
        numbers = first + np.round(np.arange(seconds) * fps)
    else:
        part = (last - first) / max_frames
        numbers = first + np.floor(part / 2 + np.round(part * np.arange(max_frames)))
    return np.minimum(numbers.astype(int), count) - 1


def read_animation(
    file: Path, size: int, fit: str, max_frames: int, clip: tuple[float, float] | None = None
) -> tuple[np.ndarray, tuple[float, ...]] | None:
    """Read an animation as `read_timed_frames` does; return None if the file has only one image."""
    try:
        with open_image(file) as opened:
            if frame_count(opened) == 1:
                return None
            chosen = partial(clip_times, clip=clip, max_frames=max_frames, path=file)
            frames, times = animation_frames(opened, size, fit, chosen)
    except BadSample as error:
        raise ValueError(f"{file} cannot be decoded: {error.what}") from error
    return frames, _relative_to_first(np.array(times))


def is_animation(file: Path) -> bool:
    """Whether an image file has several frames. Raise ValueError if it cannot be opened."""
    try:
        with open_image(file) as opened:
            return frame_count(opened) > 1
    except BadSample as error:
        raise ValueError(f"{file} cannot be decoded: {error.what}") from error


def read_image(file: Path, size: int, fit: str) -> np.ndarray:
    """Read a file with one image as uint8 [S, S, 3]. Raise ValueError if it cannot be decoded or is an animation."""
    try:
        return decode_image(read_bytes(file), size, fit)
    except BadSample as error:
        raise ValueError(f"{file} cannot be decoded: {error.what}") from error


def _number_sort_key(file: Path) -> list[tuple[int, str]]:
    """Return a sort key that orders names by the numbers in them."""
    parts = re.split(r"([0-9]+)", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
