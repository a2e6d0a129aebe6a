"""The rows of `samples.png`: images of one batch, one row per case, in the columns of the real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = 1.0  # white, as between the images


@dataclass(frozen=True)
class SampleRow:
    """The images that a case generated for a batch.

    Args:
        places: positions in the batch of the images that the case applies to. images: [N, 3, H, W] in 0..1, as many.
        labels: text for each image, for the title.
    """

    title: str
    places: Sequence[int]
    images: Tensor
    labels: Sequence[str] | None = None


class Samples:
    """Store the rows of the batch that fills most cells; of equal batches the first.

    Args:
        columns: maximum number of images in a row.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[tuple[str, Tensor]] = []  # titles and images [N, 3, H, W] on the CPU
        self._filled = (0, 0)  # columns, and cells with an image

    def offer(self, size: int, rows: Sequence[SampleRow]) -> None:
        """Replace the stored rows by those of a batch of `size` images if they fill more columns, or equally many with
        fewer empty cells. The columns are neighbouring ones, those with most images."""
        width = min(size, self.columns)
        windows = [range(start, start + width) for start in range(size - width + 1)]
        cells = [sum(column in window for row in rows for column in row.places) for window in windows]
        most_filled = max(cells)
        if (width, most_filled) <= self._filled:
            return
        window = windows[cells.index(most_filled)]
        self._filled = (width, most_filled)
        self.rows = [_arrange_row(row, window) for row in rows if any(column in window for column in row.places)]


def _arrange_row(row: SampleRow, window: range) -> tuple[str, Tensor]:
    """Return title and images [N, 3, H, W] of the columns, white where the row has none."""
    images = torch.full((len(window), *row.images.shape[1:]), EMPTY)
    labels = ["-"] * len(window)
    for index, column in enumerate(row.places):
        if column in window:
            images[column - window.start] = row.images[index].float().cpu()
            labels[column - window.start] = "" if row.labels is None else row.labels[index]
    title = row.title if row.labels is None else f"{row.title}: {', '.join(labels)}"
    full = all(column in row.places for column in window)
    return (title if full else f"{title} (empty: the case does not apply)"), images
