"""A grid of rollout videos: successes (green frame) and failures (red frame), side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from keygrip.artifacts import atomic_path
from keygrip.data.video import read_video, write_video
from keygrip.evaluation.closed_loop import ConditionResult
from keygrip.evaluation.rollout_video import captioned

SIDE, BORDER = 192, 4  # pixels of a cell and of its frame
MOST_CELLS = 50
GREEN, RED = (40, 160, 70), (200, 50, 50)


def grid_of_rollouts(results: Sequence[ConditionResult], folder: Path, output: Path, fps: float = 10.0) -> Path | None:
    """Join the recorded episodes of several conditions into one video.

    Args:
        results: their episodes name their videos in `folder`. output: the file to write. fps: of the videos.

    Returns:
        `output`, or None if no episode has a video.
    """
    clips: list[np.ndarray] = []
    for result in results:
        for episode in result.episodes:
            if episode.video is not None and len(clips) < MOST_CELLS:
                clips.append(_cell(read_video(folder / episode.video), result.name, episode.success))
    if not clips:
        return None
    columns = int(np.ceil(np.sqrt(len(clips))))
    rows = int(np.ceil(len(clips) / columns))
    length, side = max(len(clip) for clip in clips), SIDE + 2 * BORDER
    frames = np.zeros((length, rows * side, columns * side, 3), np.uint8)
    for index, clip in enumerate(clips):
        row, column = divmod(index, columns)
        padded = clip[np.minimum(np.arange(length), len(clip) - 1)]  # repeat the last frame
        frames[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = padded
    with atomic_path(output) as path:
        write_video(path, frames, fps)
    return output


def _cell(frames: np.ndarray, name: str, success: bool) -> np.ndarray:
    """Return [N, SIDE + 2 BORDER, SIDE + 2 BORDER, 3] frames with a coloured border and the condition's name."""
    cells = []
    for frame in frames:
        image = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        # at the top; the instruction is at the bottom
        image = Image.fromarray(captioned(np.asarray(image), name, top=True))
        cells.append(np.asarray(ImageOps.expand(image, BORDER, GREEN if success else RED)))
    return np.stack(cells)
