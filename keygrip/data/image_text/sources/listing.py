"""List the images of a folder with their captions and buckets, and the images left out with the reasons."""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from keygrip.artifacts import locked, sha256_file, write_text
from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.bucket_folders import INFO, ITEMS_FILE
from keygrip.data.image_text.crops import Bucket, nearest_bucket
from keygrip.data.image_text.decoding import decode_image, size_of
from keygrip.data.image_text.sources.captions import CAPTION_FILES, captions_beside, find_captions
from keygrip.data.source_files import everything_below, is_hidden, is_utf8
from keygrip.data.untrusted_files import open_image, regular_file
from keygrip.progress import Progress

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".pgm")
# Image types that are not decoded; such files are reported one by one. A file with any other ending is an image if its
# content is one.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr"),
    *(".svg", ".tga", ".psd", ".xcf", ".ico", ".icns"),
    *(".exr", ".hdr", ".dds", ".pcx", ".pam", ".qoi", ".eps", ".wmf", ".emf", ".fits"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
)
BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".md")  # captions and notes, not images
KEY_BYTES = 80
TOO_SMALL = "pixels would be enlarged"
REMOVED = "it could not be read and was removed from the source"


@dataclass(frozen=True)
class Item:
    """An image of the source.

    Args:
        captions: one or several. bucket: None if the image cannot be used; `reason` then contains the reason.
        duplicate: the file has the same content as another image, which gets its captions: left out, but not a failure.
        generation: how often the list had been extended when the image was added; a shard has images of one generation.
        content: SHA-256 of a file that is tried again after a shard could not include it; otherwise empty.
        sha256: hash of the file when it was listed; empty: unknown, or the file cannot be used.
        stamp: stamp of the file when it was listed, see `stamp_of`; empty: unknown, or the file cannot be used.
        removed: a shard could not include the image, and it is not in the source any more: it does not count.
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
    sha256: str = ""
    removed: bool = False


def stamp_of(path: Path) -> str:
    """Return a text that changes when a file is written again: its size and modification time."""
    found = path.stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


def key_of(name: str, taken: set[str]) -> str:
    """Return a key for a file that is not taken yet: its path without dots, or a hash if the path is too long."""
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
    before: Sequence[Item] = (),
) -> list[Item]:
    """List every image below a folder with its bucket, sorted by name; images that cannot be used have a reason.

    Images of unsupported types, broken links and named pipes are listed too, so that nothing is left out silently. A
    file with any other ending is an image if its content is one; the other files are counted in the log. An image gets
    the captions of the lists, which may be in any folder above it, and of the files next to it. Of several files with
    the same content the first is used, with the captions of all.

    Args:
        known: captions that were encoded, by path; of several files with the same content, these files are preferred.
        before: items of an earlier list; their hashes are used for files that were not written since.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it. ValueError: a list of captions cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images at {source}")
    paths, sidecars = _image_files(source)
    capitals = {path.with_suffix(path.suffix.lower()): path for path in sidecars if path.suffix != path.suffix.lower()}
    folders = sorted({path.parent for path in sidecars if path.name.lower() in CAPTION_FILES})
    listed, used_keys = _read_listed_captions(source, paths, folders), set[str]()
    wrapped: list[str] = []
    partly_empty: list[str] = []

    def examine(path: Path) -> tuple[tuple[str, ...], Bucket | None, str]:
        name = path.relative_to(source).as_posix()
        captions: tuple[str, ...] = ()
        try:
            if path.suffix.lower() in OTHER_SUFFIXES:
                raise BadSample(name, f"{path.suffix} is not encoded (known: {', '.join(SUFFIXES)}): convert it")
            if not is_utf8(name):
                raise BadSample(name, "its name is not UTF-8: rename it")
            regular_file(path)
            texts = (*listed.get(name, ()), *captions_beside(path, wrapped, capitals))
            captions = tuple(dict.fromkeys(caption for caption in texts if caption.strip()))
            if captions and not all(caption.strip() for caption in texts):
                partly_empty.append(name)
            if not captions:
                raise BadSample(name, "its caption is empty" if texts else "it has no caption")
            width, height = size_of(path)
        except BadSample as error:
            broken = Path(error.where).name  # the image, or a caption file next to it
            return captions, None, error.what if broken == path.name else f"{broken}: {error.what}"
        bucket = nearest_bucket(width, height, buckets)
        enlargement = max(bucket.width / width, bucket.height / height)
        if enlargement > max_enlargement:
            reason = f"{width} x {height} {TOO_SMALL} {enlargement:.2g} times for {bucket.name}"
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
            bucket_name = bucket.name if bucket else None
            items.append(Item(key_of(name, used_keys), name, captions, bucket_name, reason, stamp=stamp))
            bar.update()
    if partly_empty:
        log.warning(
            "%d images have empty captions beside others, which are left out (%s, ...)",
            len(partly_empty),
            min(partly_empty),
        )
    if wrapped:
        log.warning(
            "%d caption files have several lines, which are read as one caption (%s, ...); several captions stand in "
            '"captions" of a .json',
            len(wrapped),
            min(wrapped),
        )
    return merge_duplicates(with_hashes(items, source, before, progress), known or {})


def _image_files(source: Path) -> tuple[list[Path], list[Path]]:
    """Return the images below a folder, including unsupported types, and the files of captions and notes. Hidden files
    and files of other kinds are counted in the log.

    Raises:
        FileNotFoundError: there are no images that can be decoded.
    """
    below = everything_below(source)
    hidden = [path.relative_to(source) for path in below if is_hidden(path)]
    if hidden:
        log.warning("%d hidden files and folders in %s are not read (%s, ...)", len(hidden), source, hidden[0])
    other_endings: Counter[str] = Counter()
    paths, sidecars = [], []
    for path in (path for path in below if not path.is_dir()):
        ending = path.suffix.lower()
        if ending in BESIDE:
            sidecars.append(path)
        elif is_hidden(path):
            continue
        elif ending in (*SUFFIXES, *OTHER_SUFFIXES) or is_image(path):
            paths.append(path)
        else:
            other_endings[ending or "no ending"] += 1
    if other_endings:
        counted = ", ".join(f"{ending} {count}" for ending, count in sorted(other_endings.items()))
        log.warning("%d other files in %s are no images (%s)", other_endings.total(), source, counted)
    if all(path.suffix.lower() in OTHER_SUFFIXES for path in paths):
        hint = f", only {len(paths)} of other types ({paths[0].name})" if paths else ""
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {source}{hint}")
    return paths, sidecars


def _read_listed_captions(source: Path, paths: Sequence[Path], folders: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Read the captions of these files from the lists in some folders, by file name. The log reports names that refer
    to none of the files or to a file outside the folder of the list. It also reports files for which the lists of
    several folders have different captions.

    A list may write `./a.png` or `b\\a.png` for `a.png` and `b/a.png`; its names are relative to its own folder.
    """
    names = {path.relative_to(source).as_posix() for path in paths}
    all_captions: dict[str, tuple[str, ...]] = {}
    conflicting = []
    for folder in folders:
        prefix = "" if folder == source else f"{folder.relative_to(source).as_posix()}/"
        folder_captions: dict[str, tuple[str, ...]] = {}
        missing = []
        for name, captions in find_captions(folder).items():
            image_name = prefix + name
            if image_name not in names:  # a path that leaves the folder is never in `names`
                image_name = prefix + posixpath.normpath(name.replace("\\", "/"))
            if image_name in names:
                folder_captions[image_name] = tuple(dict.fromkeys((*folder_captions.get(image_name, ()), *captions)))
            else:
                missing.append(name)
        if missing:
            log.warning("the list of captions names %d files that are not in %s (%s)", len(missing), folder, missing[0])
        conflicting += [
            image_name
            for image_name, captions in folder_captions.items()
            if image_name in all_captions and set(captions) != set(all_captions[image_name])
        ]
        all_captions |= {
            image_name: tuple(dict.fromkeys((*all_captions.get(image_name, ()), *captions)))
            for image_name, captions in folder_captions.items()
        }
    if conflicting:
        log.warning(
            "%d images have other captions in the list of one folder than in that of another (%s): all are kept",
            len(conflicting),
            conflicting[0],
        )
    return all_captions


def is_image(path: Path) -> bool:
    """Whether the content of a file, whatever its name is, is an image."""
    try:
        with open_image(path):
            return True
    except BadSample:
        return False


def merge_duplicates(items: Sequence[Item], known: Mapping[str, tuple[str, ...]]) -> list[Item]:
    """Mark all but one of the files with the same content as duplicates; the remaining one gets the captions of all.

    Two copies of one image would be two samples, one of which may be used for validation and the other for training.

    Args:
        items: items with hashes of the usable files. known: captions that were encoded, by path; their samples stay
            unchanged.
    """
    by_content: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        if item.bucket is not None:
            by_content[item.sha256].append(number)
    merged = list(items)
    for members in by_content.values():
        first, *copies = sorted(members, key=lambda number: (items[number].path not in known, number))
        captions = dict.fromkeys(caption for number in sorted(members) for caption in items[number].captions)
        original = items[first]
        added_captions = tuple(caption for caption in captions if caption not in original.captions)
        merged[first] = replace(original, captions=(*original.captions, *added_captions))
        for number in copies:
            lost = set(items[number].captions) - set(known.get(original.path, captions))
            note = "was encoded without its captions: a new root has them" if lost else "has its captions"
            reason = f"the same file as {original.path}, which {note}"
            merged[number] = replace(items[number], bucket=None, reason=reason, duplicate=True)
    return merged


def frozen_items(
    root: Path,
    source: Path,
    buckets: Sequence[Bucket],
    enlargement: float,
    progress: bool,
    unread_of: Callable[[Sequence[Item]], Mapping[str, str] | None],
) -> list[Item]:
    """Return the list of items of a root. The first process writes it, and it stays unchanged while shards are open.

    When no shard is open (whether the set is complete or too many images were left out), the source is listed again.
    Images that were added since, are usable now, or were repaired are appended, and images.json is removed until their
    shards are finished too.

    Args:
        unread_of: returns for a list of items the paths that the shards could not include, with the reasons; None: not
            all shards are written.
    """
    file, info = root / ITEMS_FILE, root / INFO
    with locked(root / f"{ITEMS_FILE}.lock"):
        items = [read_item(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        unread = unread_of(items) if items else {}
        if unread is None:
            return items
        used = {path: item.captions for path, item in last_entries(items).items() if item.bucket and path not in unread}
        extended_items = extend_items(
            items, list_items(source, buckets, enlargement, progress, used, items), source, unread
        )
        if extended_items != items:
            info.unlink(missing_ok=True)
            write_text(file, "".join(json.dumps(asdict(item)) + "\n" for item in extended_items))
        return extended_items


def lists_usable_images(root: Path) -> bool:
    """Return whether a root has a list of items with an image that can be used; otherwise it has no shards."""
    file = root / ITEMS_FILE
    if not file.is_file():
        return False
    with file.open(encoding="utf-8") as lines:
        return any(read_item(line).bucket for line in lines)


def with_hashes(items: Sequence[Item], source: Path, before: Sequence[Item], progress: bool) -> list[Item]:
    """Add the SHA-256 of each usable file, which identifies an image when its file is renamed.

    Args:
        before: items of an earlier list; their hashes are used for files that were not written since.
    """
    known_hashes = {(item.path, item.stamp): item.sha256 for item in before if item.sha256 and item.stamp}

    def hashed(item: Item) -> Item:
        if item.bucket is None:
            return item
        return replace(item, sha256=known_hashes.get((item.path, item.stamp)) or sha256_file(source / item.path))

    show_bar = progress and any(item.bucket and (item.path, item.stamp) not in known_hashes for item in items)
    with ThreadPoolExecutor(8) as pool:
        hashed_items = pool.map(hashed, items)
        return list(Progress(hashed_items, total=len(items), desc=f"hash {source}", unit="image", shown=show_bar))


def read_item(line: str) -> Item:
    """Parse an item from a line of the list."""
    fields = json.loads(line)
    return Item(**{**fields, "captions": tuple(fields["captions"])})


def last_entries(items: Sequence[Item]) -> dict[str, Item]:
    """Return the last entry of each path, which is the valid one. Earlier entries belong to shards that could not
    include the image."""
    return {item.path: item for item in items}


def extend_items(items: Sequence[Item], found: Sequence[Item], source: Path, unread: Mapping[str, str]) -> list[Item]:
    """Extend a list of items with the images found since: images that are new, are usable now, or were repaired. Images
    that were left out and are not in the source any more leave the list.

    Used items stay unchanged, since their shards are written. The log reports changes of their captions.

    Args:
        unread: paths that the shards could not include. Their entries stay, since shards are consecutive parts of the
            list; a second entry is appended, also if the file was removed.
    """
    if not items:
        return list(found)
    generation = 1 + max(item.generation for item in items)
    last = last_entries(items)
    current = _mark_encoded_copies(found, [item for path, item in last.items() if item.bucket and path not in unread])
    kept_items = []
    for item in items:
        new = current.get(item.path)
        if item.bucket is None:
            if new is not None:
                item = replace(new, key=item.key, generation=generation if new.bucket else item.generation)
            elif item.path in unread:
                item = replace(item, reason=REMOVED, duplicate=False, removed=True)
            else:
                continue  # no shard depends on it
        kept_items.append(item)
    encoded = [item for path, item in last.items() if item.bucket and path not in unread]
    changed = [item.path for item in encoded if item.path in current and current[item.path].captions != item.captions]
    gone = [item.path for item in encoded if item.path not in current]
    stamps = {item.path: (item.stamp, current[item.path].stamp) for item in encoded if item.path in current}
    written = [path for path, (old_stamp, new_stamp) in stamps.items() if old_stamp and old_stamp != new_stamp]
    for change, paths in (
        ("have other captions than when they were encoded", changed),
        ("were written again since they were listed", written),
        ("are gone", gone),
    ):
        if paths:
            log.warning(
                "%d images %s (%s, ...): their samples stay as they are; a new root is made from all",
                len(paths),
                change,
                paths[0],
            )
    retried = [last[path] for path in unread if path in last and last[path].bucket and path in current]
    with ThreadPoolExecutor(8) as pool:
        second_entries = pool.map(lambda item: _second_entry(source, item, current[item.path]), retried)
        repaired = [replace(item, generation=generation) for item in second_entries if item is not None]
    if any(item.bucket for item in repaired):
        log.info("%d images that could not be encoded were repaired", sum(item.bucket is not None for item in repaired))
    removed = [
        replace(last[path], bucket=None, reason=REMOVED, removed=True, generation=generation)
        for path in unread
        if path in last and last[path].bucket and path not in current
    ]
    used_keys = {item.key for item in items}
    new_items = (item for path, item in current.items() if path not in last)
    added = [replace(item, key=key_of(item.path, used_keys), generation=generation) for item in new_items]
    if any(item.bucket for item in added):
        log.info("%d images came to the source since the list was made", sum(item.bucket is not None for item in added))
    return [*kept_items, *repaired, *removed, *added]


def _mark_encoded_copies(items: Sequence[Item], encoded: Sequence[Item]) -> dict[str, Item]:
    """Return the found items by path. Files whose content was already encoded from a file that is now missing, changed
    or unusable (renamed files, and copies of originals that were removed or replaced) become duplicates: their samples
    exist."""
    hashes = {item.path: item.sha256 for item in items}
    earlier = {item.sha256: item.path for item in encoded if item.sha256 and hashes.get(item.path) != item.sha256}
    encoded_paths = {item.path for item in encoded}
    by_path = {}
    for item in items:
        first = earlier.get(item.sha256) if item.bucket and item.path not in encoded_paths else None
        if first is not None:
            reason = f"the same content as {first} had when it was encoded: its sample stays"
            item = replace(item, bucket=None, reason=reason, duplicate=True)
        by_path[item.path] = item
    return by_path


def _second_entry(source: Path, tried: Item, new: Item) -> Item | None:
    """Return a second entry for an image that a shard could not include; None if nothing has changed.

    The entry keeps the image's key, since no sample was written under it. A file that can be decoded but was refused
    (its features were not finite) is tried once more, and after that only if the file or its captions change.
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
