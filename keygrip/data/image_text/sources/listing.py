"""The images of a folder with their captions and buckets, and those that are left out with the reason."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keygrip.artifacts import locked, sha256_file, write_text
from keygrip.data.bad_samples import BadSample, guard, open_image, parse_json, read_json, read_text, regular_file
from keygrip.data.image_text.bucket_folders import INFO
from keygrip.data.image_text.crops import Bucket, nearest_bucket
from keygrip.data.image_text.decoding import decode_image, size_of
from keygrip.data.source_files import is_hidden
from keygrip.progress import Progress

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".pgm")
# Images of types that are not decoded: named one by one. Files of any other ending are images where their content is.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr"),
    *(".svg", ".tga", ".psd", ".xcf", ".ico", ".icns"),
    *(".exr", ".hdr", ".dds", ".pcx", ".pam", ".qoi", ".eps", ".wmf", ".emf", ".fits"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
)
BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".md")  # captions and notes: no images
CAPTION_FILES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_NAMES, CAPTION_NAMES = ("file_name", "file", "image"), ("caption", "text", "captions")
ITEMS_FILE = ".items.jsonl"
KEY_BYTES = 80
MAX_LIST_BYTES = 1 << 33


@dataclass(frozen=True)
class Item:
    """An image of the source.

    Args:
        captions: one or several. bucket: None where it cannot be used, and `reason` says why.
        duplicate: of another image, which keeps its captions: left out and no failure.
        generation: how many times the list had been extended when it was added; shards hold one generation each.
        content: SHA-256 of a file that is taken on again after a shard could not take it; else empty.
        stamp: of the file when it was listed, see `stamp_of`; empty: not known, or it cannot be used.
    """

    key: str
    path: str
    captions: tuple[str, ...]
    bucket: str | None
    reason: str = ""
    duplicate: bool = False
    generation: int = 0
    content: str = ""
    stamp: str = ""


def stamp_of(path: Path) -> str:
    """Text that changes when a file is written again: its size and modification time."""
    found = path.stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


def find_captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Captions by file name from a folder's lists (metadata.jsonl, captions.csv, ...); empty without one.

    A file has all captions that any list, row and column has for it; a caption may be a list of texts.

    Returns:
        an empty tuple for a file whose caption is missing or is not text.

    Raises:
        ValueError: a list that cannot be read, or without the columns of file and caption.
    """
    found: dict[str, tuple[str, ...]] = {}
    lists = [path for path in folder.iterdir() if path.name.lower() in CAPTION_FILES]
    for path in sorted(lists, key=lambda path: (CAPTION_FILES.index(path.name.lower()), path.name)):
        for name, captions in _rows_of(path):
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *captions)))
    return found


def _rows_of(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """File name and captions of each row of a list. Raises ValueError as `find_captions`."""
    try:
        text = read_text(path, MAX_LIST_BYTES)
        with guard(path):
            if path.suffix.lower() == ".csv":
                rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
            else:
                numbered = enumerate(text.split("\n"), 1)
                rows = [parse_json(line, f"line {number}") for number, line in numbered if line.strip()]
            names = next(name for name in FILE_NAMES if name in rows[0])
            next(name for row in rows for name in CAPTION_NAMES if name in row)
            for row in rows:
                if not isinstance(row[names], str):
                    raise ValueError(f"{str(row[names])[:80]!r} does not name a file")
            told = ((row[names], [texts_of(row.get(name)) or () for name in CAPTION_NAMES]) for row in rows)
            return [(name, tuple(text for texts in columns for text in texts)) for name, columns in told]
    except (BadSample, StopIteration) as error:
        reason = error.what if isinstance(error, BadSample) else "a column is missing"
        raise ValueError(
            f"{path} is not a list of captions: it needs one of the columns {', '.join(FILE_NAMES)} and one of "
            f"{', '.join(CAPTION_NAMES)} ({reason}); repair it, or rename it if it is another kind of file"
        ) from error


def texts_of(value: Any) -> tuple[str, ...] | None:
    """The captions of a field: a text, or a list of texts and nulls, which are empty ones; None where it is neither."""
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in listed):
        return None
    return tuple(dict.fromkeys(text or "" for text in listed))


def captions_beside(path: Path, wrapped: list[str], capitals: Mapping[Path, Path] | None = None) -> tuple[str, ...]:
    """The captions of an image from `<name>.txt` and `<name>.caption` (one each) and `<name>.json` ("caption", "text"
    and "captions", all of them).

    Args:
        wrapped: takes the names of text files of several lines, which are one caption.
        capitals: files whose ending is in capitals, by their path with the ending in lower case.

    Raises:
        BadSample: they cannot be read, or are not text.
    """
    found: list[str] = []
    usual = [path.with_suffix(suffix) for suffix in (".txt", ".caption", ".json")]
    files = [file for each in usual for file in (each, (capitals or {}).get(each)) if file is not None]
    for file in (file for file in files if file.exists()):
        if file.suffix.lower() != ".json":
            lines = [line for line in read_text(file).splitlines() if line.strip()]
            found.append(" ".join(" ".join(lines).split()))
            if len(lines) > 1:
                wrapped.append(file.name)
            continue
        content = read_json(file)
        told = content if isinstance(content, dict) else {}
        columns = [texts_of(told.get(name)) for name in CAPTION_NAMES]
        if None in columns:
            raise BadSample(file, "its caption is not text")
        found += (text for texts in columns for text in texts or ())
    return tuple(dict.fromkeys(found))


def key_of(name: str, taken: set[str]) -> str:
    """A key for a file: its path without dots, cut short where it is long; never one that is taken."""
    stem, dot, suffix = name.rpartition(".")
    stem = stem if dot else name
    key = stem.replace(".", "-")
    if key in taken:
        key = f"{key}-{suffix}"
    if len(key.encode()) > KEY_BYTES or not key.isascii() or key in taken:
        key = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    taken.add(key)
    return key


def list_items(
    source: Path,
    buckets: Sequence[Bucket],
    max_enlargement: float,
    progress: bool,
    known: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Item]:
    """Every image below a folder with its bucket, in the order of names; those that cannot be used with a reason.

    Images of other types, links to nothing and named pipes are listed too, so that nothing is missed without a word.
    A file of any other name is an image where its content is; those that are none are counted in the log. An image has
    the captions of the lists, which may stand in any folder above it, and of the files beside it. Of files with the
    same content the first is used, with the captions of all.

    Args:
        known: captions that were encoded, by path; among files of one content these are preferred.

    Raises:
        FileNotFoundError: no folder, or no images in it. ValueError: a list of captions that cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images at {source}")
    every = sorted(path for path in source.rglob("*") if not path.is_dir())
    hidden = [path for path in every if is_hidden(path)]
    if hidden:
        log.warning("%d hidden files in %s are not read (%s, ...)", len(hidden), source, hidden[0].relative_to(source))
    beside = [path for path in every if path.suffix.lower() in BESIDE]
    capitals = {path.with_suffix(path.suffix.lower()): path for path in beside if path.suffix != path.suffix.lower()}
    others: Counter[str] = Counter()
    paths = []
    for path in every:
        if path.suffix.lower() in BESIDE or is_hidden(path):
            continue
        if path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES) or is_image(path):
            paths.append(path)
        else:
            others[path.suffix.lower() or "no ending"] += 1
    if others:
        counted = ", ".join(f"{ending} {count}" for ending, count in sorted(others.items()))
        log.warning("%d other files in %s are no images (%s)", others.total(), source, counted)
    if all(path.suffix.lower() in OTHER_SUFFIXES for path in paths):
        other = f", only {len(paths)} of other types ({paths[0].name})" if paths else ""
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {source}{other}")
    folders = sorted({path.parent for path in beside if path.name.lower() in CAPTION_FILES})
    listed, taken = _of_these(source, paths, folders), set[str]()
    wrapped: list[str] = []
    partly: list[str] = []

    def examine(path: Path) -> tuple[tuple[str, ...], Bucket | None, str]:
        name = path.relative_to(source).as_posix()
        captions: tuple[str, ...] = ()
        try:
            if path.suffix.lower() in OTHER_SUFFIXES:
                raise BadSample(name, f"{path.suffix} is not encoded (known: {', '.join(SUFFIXES)}): convert it")
            if not is_utf8(name):
                raise BadSample(name, "its name is not UTF-8: rename it")
            regular_file(path)
            told = (*listed.get(name, ()), *captions_beside(path, wrapped, capitals))
            captions = tuple(dict.fromkeys(caption for caption in told if caption.strip()))
            if captions and not all(caption.strip() for caption in told):
                partly.append(name)
            if not captions:
                raise BadSample(name, "its caption is empty" if told else "it has no caption")
            width, height = size_of(path)
        except BadSample as error:
            return captions, None, error.what
        bucket = nearest_bucket(width, height, buckets)
        enlargement = max(bucket.width / width, bucket.height / height)
        if enlargement > max_enlargement:
            reason = f"{width} x {height} pixels would be enlarged {enlargement:.2g} times for {bucket.name}"
            return captions, None, reason
        return captions, bucket, ""

    items = []
    with (
        ThreadPoolExecutor(16) as pool,
        Progress(total=len(paths), desc=f"list {source}", unit="image", shown=progress) as bar,
    ):
        for path, (captions, bucket, reason) in zip(paths, pool.map(examine, paths), strict=True):
            name = path.relative_to(source).as_posix().encode(errors="backslashreplace").decode()
            stamp = stamp_of(source / name) if bucket else ""
            called = bucket.name if bucket else None
            items.append(Item(key_of(name, taken), name, captions, called, reason, stamp=stamp))
            bar.update()
    if partly:
        log.warning(
            "%d images have empty captions beside others, which are left out (%s, ...)", len(partly), min(partly)
        )
    if wrapped:
        log.warning(
            "%d caption files have several lines, which are read as one caption (%s, ...); several captions stand in "
            '"captions" of a .json',
            len(wrapped),
            min(wrapped),
        )
    return merge_duplicates(source, items, known or {})


def _of_these(source: Path, paths: Sequence[Path], folders: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Captions of the lists in some folders by the names of these files; names that mean none of them, or none inside
    the folder of the list, are said in the log, and so are files of which lists of several folders say different
    things.

    A list may write `./a.png` or `b\\a.png` for `a.png` and `b/a.png`; its names are relative to its own folder.
    """
    names = {path.relative_to(source).as_posix() for path in paths}
    found: dict[str, tuple[str, ...]] = {}
    several = []
    for folder in folders:
        above = "" if folder == source else f"{folder.relative_to(source).as_posix()}/"
        here: dict[str, tuple[str, ...]] = {}
        missing = []
        for name, captions in find_captions(folder).items():
            own = above + name
            if own not in names:  # a path that leaves the folder is never in them
                own = above + posixpath.normpath(name.replace("\\", "/"))
            if own in names:
                here[own] = tuple(dict.fromkeys((*here.get(own, ()), *captions)))
            else:
                missing.append(name)
        if missing:
            log.warning("the list of captions names %d files that are not in %s (%s)", len(missing), folder, missing[0])
        several += [own for own, captions in here.items() if own in found and set(captions) != set(found[own])]
        found |= {own: tuple(dict.fromkeys((*found.get(own, ()), *captions))) for own, captions in here.items()}
    if several:
        log.warning(
            "%d images have other captions in the list of one folder than in that of another (%s): all are kept",
            len(several),
            several[0],
        )
    return found


def is_image(path: Path) -> bool:
    """Whether a file of any name is an image by its content."""
    try:
        with open_image(path):
            return True
    except BadSample:
        return False


def merge_duplicates(source: Path, items: Sequence[Item], known: Mapping[str, tuple[str, ...]]) -> list[Item]:
    """The items without files of the same content: one of them keeps the captions of all.

    Two copies of one image would be two samples, of which one may be held out and the other trained on.

    Args:
        known: captions that were encoded, by path; their samples stay as they are.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        if item.bucket is not None:
            by_size[(source / item.path).stat().st_size].append(number)
    by_content: dict[str, list[int]] = defaultdict(list)
    for members in by_size.values():
        if len(members) > 1:  # files of different sizes differ
            for number in members:
                by_content[sha256_file(source / items[number].path)].append(number)
    found = list(items)
    for members in by_content.values():
        first, *rest = sorted(members, key=lambda number: (items[number].path not in known, number))
        captions = dict.fromkeys(caption for number in sorted(members) for caption in items[number].captions)
        own = items[first]
        more = tuple(caption for caption in captions if caption not in own.captions)
        found[first] = replace(own, captions=(*own.captions, *more))
        for number in rest:
            lost = set(items[number].captions) - set(known.get(own.path, captions))
            what = "was encoded without its captions: a new root has them" if lost else "has its captions"
            reason = f"the same file as {own.path}, which {what}"
            found[number] = replace(items[number], bucket=None, reason=reason, duplicate=True)
    return found


def is_utf8(name: str) -> bool:
    """Whether a file name can be written as UTF-8 (names on disk may hold any bytes)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def frozen_items(
    root: Path,
    source: Path,
    buckets: Sequence[Bucket],
    enlargement: float,
    progress: bool,
    unread_of: Callable[[Sequence[Item]], Mapping[str, str] | None],
) -> list[Item]:
    """The list of items of a root, made by the first process that asks and kept while shards are open.

    When none is open, whether the set is complete or too much of it was left out, the source is listed again: images
    that came to it since, can be used now, or were repaired, are appended, and images.json is removed until their
    shards are done too.

    Args:
        unread_of: of a list of items, those paths that the shards could not take, with the reasons; None: not all
            shards are written.
    """
    file, info = root / ITEMS_FILE, root / INFO
    with locked(root / f"{ITEMS_FILE}.lock"):
        items = [read_item(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        unread = unread_of(items) if items else {}
        if unread is None:
            return items
        used = {path: item.captions for path, item in last_entries(items).items() if item.bucket and path not in unread}
        found = extended(items, list_items(source, buckets, enlargement, progress, used), source, unread)
        if found != items:
            info.unlink(missing_ok=True)
            write_text(file, "".join(json.dumps(asdict(item)) + "\n" for item in found))
        return found


def read_item(line: str) -> Item:
    """An item of a line of the list."""
    told = json.loads(line)
    return Item(**{**told, "captions": tuple(told["captions"])})


def last_entries(items: Sequence[Item]) -> dict[str, Item]:
    """The entry that counts of each path: the last one. Earlier ones are those of shards that could not take it."""
    return {item.path: item for item in items}


def extended(items: Sequence[Item], found: Sequence[Item], source: Path, unread: Mapping[str, str]) -> list[Item]:
    """A list of items with those that were found since: images that are new, can be used now, or were repaired.

    What was used stays as it is: its shards are written. Changed captions of it are said in the log.

    Args:
        unread: paths that the shards could not take. Their entries stay, since shards are cut from the list by place;
            a second one stands at the end.
    """
    if not items:
        return list(found)
    generation = 1 + max(item.generation for item in items)
    now = {item.path: item for item in found}
    last = last_entries(items)
    kept = []
    for item in items:
        new = now.get(item.path)
        if item.bucket is None and new is not None and item is last[item.path]:
            item = replace(new, key=item.key, generation=generation if new.bucket else item.generation)
        kept.append(item)
    encoded = [item for path, item in last.items() if item.bucket and path not in unread]
    changed = [item.path for item in encoded if item.path in now and now[item.path].captions != item.captions]
    gone = [item.path for item in encoded if item.path not in now]
    stamps = {item.path: (item.stamp, now[item.path].stamp) for item in encoded if item.path in now}
    written = [path for path, (before, after) in stamps.items() if before and before != after]
    for what, paths in (
        ("have other captions than when they were encoded", changed),
        ("were written again since they were listed", written),
        ("are gone", gone),
    ):
        if paths:
            log.warning(
                "%d images %s (%s, ...): their samples stay as they are; a new root is made from all",
                len(paths),
                what,
                paths[0],
            )
    tried = [last[path] for path in unread if path in last and last[path].bucket and path in now]
    with ThreadPoolExecutor(8) as pool:
        again = pool.map(lambda item: _taken_on_again(source, item, now[item.path]), tried)
        repaired = [replace(item, generation=generation) for item in again if item is not None]
    if any(item.bucket for item in repaired):
        log.info("%d images that could not be encoded were repaired", sum(item.bucket is not None for item in repaired))
    taken = {item.key for item in items}
    new_items = (item for path, item in now.items() if path not in last)
    added = [replace(item, key=key_of(item.path, taken), generation=generation) for item in new_items]
    if any(item.bucket for item in added):
        log.info("%d images came to the source since the list was made", sum(item.bucket is not None for item in added))
    return [*kept, *repaired, *added]


def _taken_on_again(source: Path, tried: Item, new: Item) -> Item | None:
    """A second entry for an image that a shard could not take; None while nothing has changed.

    It keeps its key, under which no sample was written. A file that can be decoded and was refused all the same (its
    features were not finite) is tried once more, and then again when the file or its captions are others.
    """
    if new.bucket is None:  # listed now as a copy, or without a caption
        return replace(new, key=tried.key)
    try:
        decode_image(source / tried.path)
    except BadSample:
        return None
    content = sha256_file(source / tried.path)
    if (tried.content, tried.captions) == (content, new.captions):
        return None
    return replace(new, key=tried.key, content=content)
