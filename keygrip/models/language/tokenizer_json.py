"""Stored tokenizers of others (tokenizer.json), checked before the library `tokenizers` takes them.

The library goes through all ids up to the largest, whatever tokens there are, and ends some damaged files with a panic
of Rust, which no `except Exception` sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
LARGEST_VOCABULARY = 4_000_000  # of a model that is not known; the largest known have a million tokens
LARGEST_FILE_BYTES = 256 << 20  # a tokenizer of a large vocabulary is some tens of megabytes


def parse_tokenizer(text: str | bytes, where: str, vocabulary: int | None = None) -> Tokenizer:
    """The tokenizer that tokenizer.json holds.

    Args:
        text: the file's content. where: it lies, for messages. vocabulary: tokens of its language model; None: not
            known.

    Raises:
        ValueError: it is damaged, or has a token beyond the vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        content = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{where} is damaged or no tokenizer ({error})") from error
    _refuse_ids(content, where, vocabulary)
    with tokenizer_errors(where):
        return Tokenizer.from_str(json.dumps(content))  # not `text`, where a name may stand twice


def check_tokenizer_file(file: Path, vocabulary: int | None = None) -> None:
    """Raises ValueError as `parse_tokenizer` for a file that somebody else reads."""
    if file.stat().st_size > LARGEST_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any tokenizer: it is not read")
    parse_tokenizer(file.read_bytes(), str(file), vocabulary)


@contextmanager
def tokenizer_errors(where: str) -> Iterator[None]:
    """Makes a ValueError with `where` of what the library raises."""
    try:
        yield
    except BaseException as error:
        # pyo3's PanicException derives from BaseException, and no module has it to import
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is damaged or no tokenizer ({error})") from error


def _refuse_ids(content: Any, where: str, vocabulary: int | None) -> None:
    parts = content if isinstance(content, dict) else {}
    model, added = parts.get("model"), parts.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError(f"{where} is damaged or no tokenizer (it has no model with a vocabulary)")
    most = LARGEST_VOCABULARY if vocabulary is None else vocabulary
    of = "any language model" if vocabulary is None else "its language model"
    known = model.get("vocab")
    ids = list(known.items()) if isinstance(known, dict) else []  # in a list the place is the id
    ids += [(token.get("content"), token.get("id")) for token in added if isinstance(token, dict)]
    if isinstance(known, list) and len(known) > most:
        ids.append((known[most], most))
    for token, number in ids:
        if type(number) is not int or not 0 <= number < most:
            raise ValueError(f"{where}: the token {str(token)[:40]!r} has the id {number}; {of} has ids below {most}")
