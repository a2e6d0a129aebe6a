"""The images of a folder with their captions and buckets, and those that are left out with the reason."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from keygrip.artifacts import make_once, write_text
from keygrip.data.bad_samples import BadSample, guard, open_image, parse_json, read_json, read_text, regular_file
from keygrip.data.image_text.crops import Bucket, nearest_bucket

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OTHER_SUFFIXES = (".gif", ".avif", ".jfif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".ppm", ".tga", ".psd", ".ico")
CAPTION_FILES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_NAMES, CAPTION_NAMES = ("file_name", "file", "image"), ("caption", "text")
ITEMS_FILE = ".items.jsonl"
KEY_BYTES = 80
MAX_LIST_BYTES = 1 << 33


@dataclass(frozen=True)
class Item:
    """An image of the source. bucket: None where it cannot be used, and `reason` says why."""

    key: str
    path: str
    caption: str
    bucket: str | None
    reason: str = ""


def find_captions(source: Path) -> dict[str, str | None]:
    """Captions by file name from a list beside the images (metadata.jsonl, captions.csv, ...); empty without one.

    Returns:
        None for a file whose caption is missing or is not text.

    Raises:
        ValueError: a list that cannot be read, or without the columns of file and caption.
    """
    path = next((source / name for name in CAPTION_FILES if (source / name).exists()), None)
    if path is None:
        return {}
    try:
        text = read_text(path, MAX_LIST_BYTES)
        with guard(path):
            if path.suffix == ".csv":
                rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
            else:
                numbered = enumerate(text.split("\n"), 1)
                rows = [parse_json(line, f"line {number}") for number, line in numbered if line.strip()]
            names = next(name for name in FILE_NAMES if name in rows[0])
            texts = next(name for name in CAPTION_NAMES if name in rows[0])
            found = {}
            for row in rows:
                if not isinstance(row[names], str):
                    raise ValueError(f"{str(row[names])[:80]!r} does not name a file")
                found[row[names]] = row[texts] if isinstance(row.get(texts), str) else None
            return found
    except (BadSample, StopIteration) as error:
        reason = error.what if isinstance(error, BadSample) else "a column is missing"
        raise ValueError(
            f"{path} is not a list of captions: it needs one of the columns {', '.join(FILE_NAMES)} and one of "
            f"{', '.join(CAPTION_NAMES)} ({reason})"
        ) from error


def caption_beside(path: Path) -> str | None:
    """The caption of an image from `<name>.txt`, `<name>.caption` or `<name>.json` ("caption"); None without one.

    Raises:
        BadSample: it cannot be read, or is not text.
    """
    for suffix in (".txt", ".caption"):
        if path.with_suffix(suffix).exists():
            return " ".join(read_text(path.with_suffix(suffix)).split())
    if path.with_suffix(".json").exists():
        content = read_json(path.with_suffix(".json"))
        found = content.get("caption") if isinstance(content, dict) else None
        if found is not None and not isinstance(found, str):
            raise BadSample(path.with_suffix(".json"), "its caption is not text")
        return found
    return None


def key_of(name: str, taken: set[str]) -> str:
    """A key for a file: its path without dots, cut short where it is long; never one that is taken."""
    stem, _, suffix = name.rpartition(".")
    key = stem.replace(".", "-")
    if key in taken:
        key = f"{key}-{suffix}"
    if len(key.encode()) > KEY_BYTES or not key.isascii() or key in taken:
        key = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    taken.add(key)
    return key


def decode_image(path: Path) -> Image.Image:
    """An RGB image, turned as its EXIF data says. Raises BadSample: it cannot be decoded, or is too large."""
    with open_image(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image after its EXIF turn, from its header. Raises BadSample: it cannot be read."""
    with open_image(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def list_items(source: Path, buckets: Sequence[Bucket], max_enlargement: float, progress: bool) -> list[Item]:
    """Every image below a folder with its bucket, in the order of names; those that cannot be used with a reason.

    Images of other types, links to nothing and named pipes are listed too, so that nothing is missed without a word.

    Raises:
        FileNotFoundError: no folder, or no images in it.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images at {source}")
    known = (*SUFFIXES, *OTHER_SUFFIXES)
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in known and not path.is_dir())
    if not any(path.suffix.lower() in SUFFIXES for path in paths):
        other = f", only {len(paths)} of other types ({paths[0].name})" if paths else ""
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {source}{other}")
    listed, taken = find_captions(source), set[str]()

    def examine(path: Path) -> tuple[str | None, Bucket | None, str]:
        name = path.relative_to(source).as_posix()
        caption = None
        try:
            if path.suffix.lower() not in SUFFIXES:
                raise BadSample(name, f"{path.suffix} is not encoded (known: {', '.join(SUFFIXES)}): convert it")
            if not is_utf8(name):
                raise BadSample(name, "its name is not UTF-8: rename it")
            regular_file(path)
            caption = listed.get(name) if listed else caption_beside(path)
            if caption is None:
                raise BadSample(name, "it has no caption")
            width, height = size_of(path)
        except BadSample as error:
            return caption, None, error.what
        bucket = nearest_bucket(width, height, buckets)
        enlargement = max(bucket.width / width, bucket.height / height)
        if enlargement > max_enlargement:
            reason = f"{width} x {height} pixels would be enlarged {enlargement:.2g} times for {bucket.name}"
            return caption, None, reason
        return caption, bucket, ""

    items = []
    with (
        ThreadPoolExecutor(16) as pool,
        tqdm(total=len(paths), desc=f"list {source}", unit="image", delay=1, disable=not progress) as bar,
    ):
        for path, (caption, bucket, reason) in zip(paths, pool.map(examine, paths), strict=True):
            name = path.relative_to(source).as_posix().encode(errors="backslashreplace").decode()
            items.append(Item(key_of(name, taken), name, caption or "", bucket.name if bucket else None, reason))
            bar.update()
    return items


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def frozen_items(root: Path, source: Path, buckets: Sequence[Bucket], enlargement: float, progress: bool) -> list[Item]:
    """The list of items of a root, made by the first process that asks and never changed after."""

    def make(file: Path) -> None:
        items = list_items(source, buckets, enlargement, progress)
        write_text(file, "".join(json.dumps(asdict(item)) + "\n" for item in items))

    file = root / ITEMS_FILE
    make_once(file, Path.is_file, make)
    return [Item(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
