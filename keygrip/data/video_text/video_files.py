"""Videos from a user's disk: a video file, a folder of images, or one image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keygrip.data.bad_samples import BadSample, read_bytes
from keygrip.data.video_text.conversations import decode_image, decode_video

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_frames(path: str | Path, size: int, fit: str, max_frames: int) -> np.ndarray:
    """uint8 [F, S, S, 3]: one frame per second of a video, every image of a folder in the order of its names.

    Of more than `max_frames`, so many evenly spaced ones are kept.

    Raises:
        FileNotFoundError: nothing there, or a folder without images. ValueError: it cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        keep = _evenly(len(files), max_frames)
        return np.stack([_image(files[number], size, fit) for number in keep])
    if not path.is_file():
        raise FileNotFoundError(f"there is no video, image or folder at {path}")
    if path.suffix.lower() in SUFFIXES:
        return _image(path, size, fit)[None]
    try:
        frames = decode_video(str(path), size, fit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return frames[_evenly(len(frames), max_frames)]


def _image(file: Path, size: int, fit: str) -> np.ndarray:
    try:
        return decode_image(read_bytes(file), size, fit)
    except BadSample as error:
        raise ValueError(f"{file} cannot be decoded: {error.what}") from error


def _evenly(count: int, limit: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()
