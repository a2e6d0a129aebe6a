"""Read captions of image files: from lists in a folder, and from files next to an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.csv_tables import table_rows
from keygrip.data.untrusted_files import parse_fields, read_text

CAPTION_FILES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
FILE_NAMES, CAPTION_NAMES = ("file_name", "file", "image"), ("caption", "text", "captions")
MAX_LIST_BYTES = 1 << 33


def find_captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Read captions by file name from a folder's lists (metadata.jsonl, captions.csv, ...); empty without a list.

    An image file gets all captions that any list, row and column has for it; a caption may be a list of texts.

    Returns:
        The captions of each listed file; an empty tuple for a file whose caption is missing or is not text.

    Raises:
        ValueError: a list cannot be read, or lacks the columns of file and caption.
    """
    captions_by_name: dict[str, tuple[str, ...]] = {}
    lists = [path for path in folder.iterdir() if path.name.lower() in CAPTION_FILES]
    for path in sorted(lists, key=lambda path: (CAPTION_FILES.index(path.name.lower()), path.name)):
        for name, captions in _read_rows(path):
            captions_by_name[name] = tuple(dict.fromkeys((*captions_by_name.get(name, ()), *captions)))
    return captions_by_name


def _read_rows(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return the file name and the captions of each row of a list. Raise ValueError as `find_captions` does."""
    try:
        text = read_text(path, MAX_LIST_BYTES)
        with convert_errors(path):
            if path.suffix.lower() == ".csv":
                rows: list[tuple[int, Any]] = list(table_rows(text))
            else:
                numbered = enumerate(text.split("\n"), 1)
                rows = [(number, _parse_json(line, f"line {number}")) for number, line in numbered if line.strip()]
            next(name for _, row in rows for name in FILE_NAMES if name in row)
            next(name for _, row in rows for name in CAPTION_NAMES if name in row)
            file_columns = (
                (_file_name_in(*each), [texts_of(each[1].get(name)) or () for name in CAPTION_NAMES]) for each in rows
            )
            return [(name, tuple(text for texts in columns for text in texts)) for name, columns in file_columns]
    except (BadSample, StopIteration) as error:
        reason = error.what if isinstance(error, BadSample) else "a column is missing"
        raise ValueError(
            f"{path} is not a list of captions: it needs one of the columns {', '.join(FILE_NAMES)} and one of "
            f"{', '.join(CAPTION_NAMES)} ({reason}); repair it, or rename it if it is another kind of file"
        ) from error


def _parse_json(text: str, location: object) -> Any:
    return parse_fields(text, location, (*FILE_NAMES, *CAPTION_NAMES))


def _file_name_in(number: int, row: Any) -> str:
    """Return the file name in the row at this line. Raise ValueError if there is none."""
    names = [row[name] for name in FILE_NAMES if isinstance(row, Mapping) and name in row]
    if not names:
        raise ValueError(f"line {number} has none of the columns {', '.join(FILE_NAMES)}")
    if not isinstance(names[0], str):
        raise ValueError(f"line {number}: {str(names[0])[:80]!r} does not name a file")
    return names[0]


def texts_of(value: Any) -> tuple[str, ...] | None:
    """Return the captions in a field: a text, or a list of texts and nulls (empty captions); None if it is neither."""
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in listed):
        return None
    return tuple(dict.fromkeys(text or "" for text in listed))


def captions_beside(path: Path, wrapped: list[str], capitals: Mapping[Path, Path] | None = None) -> tuple[str, ...]:
    """Read the captions of an image from `<name>.txt` and `<name>.caption` (one caption each) and `<name>.json` (all of
    "caption", "text" and "captions"; or a list of captions in place of an object).

    Args:
        wrapped: receives the names of text files with several lines, which are joined to one caption.
        capitals: files with an ending in upper case, by their path with the ending in lower case.

    Raises:
        BadSample: the captions cannot be read, or are not text.
    """
    captions: list[str] = []
    usual = [path.with_suffix(suffix) for suffix in (".txt", ".caption", ".json")]
    files = [file for each in usual for file in (each, (capitals or {}).get(each)) if file is not None]
    for file in (file for file in files if file.exists()):
        if file.suffix.lower() != ".json":
            lines = [line for line in read_text(file).splitlines() if line.strip()]
            captions.append(" ".join(" ".join(lines).split()))
            if len(lines) > 1:
                wrapped.append(file.name)
            continue
        content = _parse_json(read_text(file), file)
        if not isinstance(content, dict | list):
            raise BadSample(file, "it is neither an object nor a list of captions")
        fields = {"captions": content} if isinstance(content, list) else content
        columns = [texts_of(fields.get(name)) for name in CAPTION_NAMES]
        if None in columns:
            raise BadSample(file, "its caption is not text")
        captions += (text for texts in columns for text in texts or ())
    return tuple(dict.fromkeys(captions))
