"""Files of `keygrip sample`: images, each written when it is generated, then grids. A failed run leaves none."""

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

from keygrip.artifacts import atomic_write, nearest_existing, refuse_file
from keygrip.data.image_text.crops import Bucket
from keygrip.inference.image_requests import SampleRequest
from keygrip.models.patch_dit.figures import as_bytes, image_grid

GRID_ROWS = 24  # rows of one grid file
GRID_COLUMNS = 64  # generated images in one row of a grid


@dataclass(frozen=True)
class ImageFiles:
    """Names of the files that a command writes.

    Args:
        images: file name of each request. grids: file names. rows: of the grids, one for each pair of prompt and
            references at one size: its title and the indices of its requests.
    """

    images: tuple[str, ...]
    grids: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]

    def refuse_names(self, folder: Path) -> None:
        """Raise ValueError if a folder already has the name of one of the files."""
        for path in (folder / name for name in (*self.images, *self.grids)):
            if path.is_dir():
                raise ValueError(f"{path} is a folder, and an image would have its name: give another run_dir")


def files_of(requests: Sequence[SampleRequest], buckets: Sequence[Bucket]) -> ImageFiles:
    """Return the files of some requests, each generated at the size of its bucket."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for index, (request, bucket) in enumerate(zip(requests, buckets, strict=True)):
        # not by title: it has no folder names
        rows.setdefault((request.prompt, request.images, bucket), []).append(index)
    grids = range(-(-len(rows) // GRID_ROWS))
    return ImageFiles(
        tuple(f"{index:03d}_seed{request.seed}.png" for index, request in enumerate(requests)),
        tuple(f"grid_{index:02d}.png" if index else "grid.png" for index in grids),
        tuple((requests[indices[0]].title, tuple(indices)) for indices in rows.values()),
    )


def write_image(path: Path, image: Tensor) -> None:
    """Write an image [3, H, W] in 0..1 as a PNG file."""
    _write(path, as_bytes(image[None])[0])


def write_grids(folder: Path, files: ImageFiles, shown: Callable[[int], Sequence[Tensor]]) -> None:
    """Write the grids from the image files in the folder.

    Args:
        shown: maps the index of a request to its references [3, H, W] in 0..1, which come first in its row.
    """
    for grid_index, name in enumerate(files.grids):
        rows = files.rows[grid_index * GRID_ROWS : (grid_index + 1) * GRID_ROWS]
        _write(folder / name, image_grid([_grid_row(folder, files, title, indices, shown) for title, indices in rows]))


def move_files(scratch: Path, folder: Path, files: ImageFiles) -> None:
    """Move the files from the temporary folder to their final folder.

    Raises:
        OSError: The files cannot be moved. None of them is in the final folder then, but earlier files with the same
            names may have been deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undone:
        for name in (*files.images, *files.grids):
            (scratch / name).replace(folder / name)
            undone.callback((folder / name).unlink, missing_ok=True)
        undone.pop_all()


def refuse_folder(folder: Path) -> None:
    """Raise ValueError if the folder cannot be created. It is not created yet: a failed run leaves nothing behind."""
    refuse_file(folder, "run_dir")
    existing = nearest_existing(folder)
    if not os.access(existing, os.W_OK):
        raise ValueError(f"run_dir={folder}: {existing} is not writable")


def _grid_row(
    folder: Path, files: ImageFiles, title: str, numbers: Sequence[int], shown: Callable[[int], Sequence[Tensor]]
) -> tuple[str, Tensor]:
    samples = []
    for index in numbers[:GRID_COLUMNS]:
        with Image.open(folder / files.images[index]) as image:
            samples.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    left_out = f" (the first {GRID_COLUMNS} of {len(numbers)})" if len(numbers) > GRID_COLUMNS else ""
    return title + left_out, torch.stack([*shown(numbers[0]), *samples])


def _write(path: Path, frame: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(frame).save(file, "PNG")
