"""Videos from a user's disk: a video file, a folder of pictures, or one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keygrip.data.video_text.conversations import decode_picture, decode_video

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read_frames(path: str | Path, size: int, fit: str, max_frames: int) -> np.ndarray:
    """uint8 [F, S, S, 3]: a frame a second of a video, every picture of a folder in the order of its names.

    Of more than `max_frames`, so many evenly spaced ones are kept.

    Raises:
        FileNotFoundError: nothing there, or a folder without pictures. ValueError: it cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise FileNotFoundError(f"{path} holds no pictures ({', '.join(PICTURES)})")
        keep = _evenly(len(files), max_frames)
        return np.stack([_picture(files[number], size, fit) for number in keep])
    if not path.is_file():
        raise FileNotFoundError(f"there is no video, picture or folder at {path}")
    if path.suffix.lower() in PICTURES:
        return _picture(path, size, fit)[None]
    try:
        frames = decode_video(str(path), size, fit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return frames[_evenly(len(frames), max_frames)]


def _picture(file: Path, size: int, fit: str) -> np.ndarray:
    try:
        return decode_picture(file.read_bytes(), size, fit)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be decoded: {error}") from error


def _evenly(count: int, limit: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()
