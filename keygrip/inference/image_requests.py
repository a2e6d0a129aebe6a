"""Sample requests of `keygrip sample`: prompts and images from the command line, or the rows of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.csv_tables import table_rows
from keygrip.data.untrusted_files import parse_json, read_text
from keygrip.inference.given_texts import each_of, text_of, texts_of

COLUMNS = ("prompt", "image", "seed")
MOST_REQUESTS = 100_000
BLENDED = "blend=true puts several images together: give image=[FILE,FILE]"
SEEDS = range(-(2**63), 2**63)  # torch accepts these seeds, and those derived from them for `samples`

Row = tuple[str | None, tuple[str, ...], int]  # prompt, images that condition together, first seed


@dataclass(frozen=True)
class SampleRequest:
    """One image to generate.

    Args:
        prompt: text; None: no prompt. images: files that condition the sample together: none, one or several.
            seed: of its noise.
    """

    prompt: str | None
    images: tuple[str, ...]
    seed: int

    @property
    def reference(self) -> str | list[str] | None:
        """The images in the form in which they are printed."""
        return list(self.images) if len(self.images) > 1 else self.images[0] if self.images else None

    @property
    def title(self) -> str:
        """Title of the request's row in a grid."""
        names = " + ".join(Path(image).name for image in self.images)
        return ": ".join(part for part in (names, self.prompt) if part)


def requested(cfg: DictConfig) -> list[SampleRequest]:
    """Return one request for each pair of prompt and reference and each seed. A single prompt or reference is used for
    all values of the other.

    Raises:
        FileNotFoundError: The file of prompts does not exist. ValueError: Nothing is requested, a value is not text,
            lists have different lengths, a seed is out of range, or a file cannot be read.
    """
    if cfg.samples < 1 or cfg.batch_size < 1:
        raise ValueError("samples and batch_size must be at least 1")
    if cfg.seed not in SEEDS:
        raise ValueError(f"seed={cfg.seed} is out of range: give a number from {SEEDS[0]} to {SEEDS[-1]}")
    images = [] if cfg.image is None else texts_of("image", cfg.image)
    rows = _rows_from_command_line(cfg, images) if cfg.prompts is None else _rows_from_file(cfg, images)
    if len(rows) * cfg.samples > MOST_REQUESTS:
        raise ValueError(
            f"{cfg.samples} samples of {len(rows)} requests each: at most {MOST_REQUESTS} images by one command"
        )
    return [
        SampleRequest(prompt, references, seed + n) for prompt, references, seed in rows for n in range(cfg.samples)
    ]


def _rows_from_file(cfg: DictConfig, images: list[str]) -> list[Row]:
    """Read the rows of a file of prompts. If the file has no images, those of the command line are used."""
    if cfg.prompt is not None:
        raise ValueError("prompt and prompts both say what to draw: give one of them")
    rows = read_prompts(Path(cfg.prompts))
    if images and any(row["image"] for row in rows):
        raise ValueError(f"{cfg.prompts} names images itself: leave image out")
    if cfg.blend and len(images) < 2:
        raise ValueError(BLENDED)
    if len(images) > 1 and not cfg.blend:
        raise ValueError(f"{len(images)} images for a file of prompts: give one, or blend=true")
    return [
        (
            row["prompt"],
            (row["image"],) if row["image"] else tuple(images),
            cfg.seed if row["seed"] is None else row["seed"],
        )
        for row in rows
    ]


def _rows_from_command_line(cfg: DictConfig, images: list[str]) -> list[Row]:
    """Combine prompts and images: as many of each, or one that is used for all values of the other."""
    prompts = prompts_of(cfg.prompt)
    if prompts == [None] and not images:
        raise ValueError('nothing to draw: give prompt="...", image=FILE, or both')
    if cfg.blend and len(images) < 2:
        raise ValueError(BLENDED)
    sets: list[tuple[str, ...]] = [tuple(images)] if cfg.blend else [(image,) for image in images] or [()]
    count = max(len(prompts), len(sets))
    for name, values in (("prompt", prompts), ("image", sets)):
        if len(values) not in (1, count):
            raise ValueError(f"{len(prompts)} prompts and {len(sets)} images: give as many of each, or one {name}")
    if None in prompts and not images:
        raise ValueError(f"prompt {prompts.index(None)} of the list is empty and there is no image: nothing to draw")
    return [(prompts[n % len(prompts)], sets[n % len(sets)], cfg.seed) for n in range(count)]


def prompts_of(value: Any) -> list[str | None]:
    """Return the prompts of the command line. null or blank text, alone or in a list, is None: only the image
    conditions.

    Raises:
        ValueError: A value is neither text nor null, or the list is empty.
    """
    texts = ["" if each is None else text_of("prompt", each) for each in each_of("prompt", value)]
    return [text if text.strip() else None for text in texts]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file: `prompt`, `image`, `seed`, each of which may be None.

    .txt: a prompt in each line. .jsonl: an object in each line. .csv: a table with these columns. Relative image paths
    are relative to the folder of the file. Empty lines are ignored.

    Raises:
        FileNotFoundError: The file does not exist. ValueError: The file is of another kind, or a row is empty or has a
            seed out of range (the message gives its line).
    """
    if not path.exists():
        raise FileNotFoundError(f"prompts={path}: there is no such file")
    try:
        text = read_text(path)
        with convert_errors(path):
            kind = path.suffix.lower()
            if kind == ".txt":
                rows: list[Any] = [(n, {"prompt": line.strip()}) for n, line in enumerate(text.split("\n"), 1)]
                rows = [(n, row) for n, row in rows if row["prompt"]]
            elif kind == ".jsonl":
                lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
                rows = [(n, parse_json(line, f"line {n}", unique_keys=True)) for n, line in lines]
            elif kind == ".csv":
                rows = list(table_rows(text))
            else:
                raise ValueError(f"prompts are a .txt, .jsonl or .csv file, not {path.suffix or 'one without ending'}")
            if not rows:
                raise ValueError("it holds no prompt")
            if len(rows) > MOST_REQUESTS:
                raise ValueError(f"it holds {len(rows)} rows, more than {MOST_REQUESTS}")
            return [_checked_row(row, f"line {number}", path.parent) for number, row in rows]
    except BadSample as error:
        raise ValueError(str(error)) from error


def _checked_row(row: Any, location: str, folder: Path) -> dict[str, Any]:
    if not isinstance(row, Mapping) or set(row) - set(COLUMNS):
        raise ValueError(f"{location}: a row has {', '.join(COLUMNS)} and nothing else")
    for name in ("prompt", "image"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{location}: its {name} is not text")
    texts = {name: (row.get(name) or "").strip() or None for name in ("prompt", "image")}
    seed = row.get("seed")
    seed = seed.strip() if isinstance(seed, str) else seed
    if seed in (None, ""):
        seed = None
    elif isinstance(seed, bool) or not re.fullmatch("-?[0-9]+", str(seed)):
        raise ValueError(f"{location}: its seed {seed!r} is not a whole number")
    elif len(str(seed)) > len(str(SEEDS[0])) or int(seed) not in SEEDS:
        raise ValueError(f"{location}: its seed {str(seed)[:40]} is out of range: from {SEEDS[0]} to {SEEDS[-1]}")
    if texts["prompt"] is None and texts["image"] is None:
        raise ValueError(f"{location}: it has neither prompt nor image")
    image = None if texts["image"] is None else str(folder / texts["image"])
    return {"prompt": texts["prompt"], "image": image, "seed": None if seed is None else int(seed)}
