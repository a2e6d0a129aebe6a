"""Files of `keygrip sample`: each image as soon as it is drawn, then grids of them; all in their places, or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keygrip.artifacts import atomic_write, nearest_existing
from keygrip.data.image_text.crops import Bucket
from keygrip.inference.image_requests import SampleRequest
from keygrip.models.patch_dit.figures import as_bytes, image_grid

GRID_ROWS = 24  # of one grid file
GRID_COLUMNS = 64  # drawn images in a row of it


@dataclass(frozen=True)
class ImageFiles:
    """Names of what a command writes.

    Args:
        images: file name of each request. grids: file names. rows: of the grids, one for each pair of words and
            references at one size: its title and the numbers of its requests.
    """

    images: tuple[str, ...]
    grids: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]

    def refuse_names(self, folder: Path) -> None:
        """Raises ValueError: a folder has the name of one of them."""
        for path in (folder / name for name in (*self.images, *self.grids)):
            if path.is_dir():
                raise ValueError(f"{path} is a folder, and an image would have its name: give another run_dir")


def files_of(requests: Sequence[SampleRequest], buckets: Sequence[Bucket]) -> ImageFiles:
    """The files of some requests, each drawn at the size of its bucket."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for number, (request, bucket) in enumerate(zip(requests, buckets, strict=True)):
        rows.setdefault((request.prompt, request.images, bucket), []).append(number)  # titles leave out folders
    grids = range(-(-len(rows) // GRID_ROWS))
    return ImageFiles(
        tuple(f"{number:03d}_seed{request.seed}.png" for number, request in enumerate(requests)),
        tuple(f"grid_{number:02d}.png" if number else "grid.png" for number in grids),
        tuple((requests[numbers[0]].title, tuple(numbers)) for numbers in rows.values()),
    )


def write_image(path: Path, image: Tensor) -> None:
    """[3, H, W] in 0..1 as a PNG file."""
    _write(path, as_bytes(image[None])[0])


def write_grids(folder: Path, files: ImageFiles, shown: Callable[[int], Sequence[Tensor]]) -> None:
    """The grids, from the images that lie in the folder.

    Args:
        shown: of the number of a request, its references [3, H, W] in 0..1, which stand first in its row.
    """
    for place, name in enumerate(files.grids):
        rows = files.rows[place * GRID_ROWS : (place + 1) * GRID_ROWS]
        _write(folder / name, image_grid([_row(folder, files, title, numbers, shown) for title, numbers in rows]))


def move_files(scratch: Path, folder: Path, files: ImageFiles) -> None:
    """From the folder in which they were written to their own.

    Raises:
        OSError: they cannot be moved; none of them is there then, but files of their names that were there before may
            be gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undone:
        for name in (*files.images, *files.grids):
            (scratch / name).replace(folder / name)
            undone.callback((folder / name).unlink, missing_ok=True)
        undone.pop_all()


def refuse_folder(folder: Path) -> None:
    """Raises ValueError: no folder can be made there. Nothing is made yet: a failure leaves nothing behind."""
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"run_dir={folder}: {there} is {'not writable' if there.is_dir() else 'no folder'}")


def _row(
    folder: Path, files: ImageFiles, title: str, numbers: Sequence[int], shown: Callable[[int], Sequence[Tensor]]
) -> tuple[str, Tensor]:
    drawn = []
    for number in numbers[:GRID_COLUMNS]:
        with Image.open(folder / files.images[number]) as image:
            drawn.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    left_out = f" (the first {GRID_COLUMNS} of {len(numbers)})" if len(numbers) > GRID_COLUMNS else ""
    return title + left_out, torch.stack([*shown(numbers[0]), *drawn])


def _write(path: Path, frame: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(frame).save(file, "PNG")
