"""Checks of the files, besides tokenizer.json, from which transformers builds a tokenizer, and of the tokenizer built.

tokenizer_config.json may name another file in place of tokenizer.json, further tokens, and numbers of tokens to create.
If there is no tokenizer.json, or the tokenizer's class does not read it, other vocabulary files are converted. Which of
these transformers reads depends on its version, so all are checked. Before transformers reads the files, they are
checked for contents that would take unlimited time or memory to read; then the tokenizer that was built is checked
against the limits of `tokenizer_json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keygrip.models.language.tokenizer_json import (
    LARGEST_GROWTH,
    LONGEST_TOKEN,
    check_content,
    longest_of_charsmap,
    read_small,
    refuse_ids,
    refuse_long,
    tokenizer_errors,
)

CONFIG_FILE = "tokenizer_config.json"
TOKEN_FILES = ("special_tokens_map.json", "added_tokens.json")
VOCABULARY_FILES = (
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm"),
)
OTHER_FILES = "fast_tokenizer_files"  # in the configuration: files of which some versions of transformers read one
NO_TOKENS = ("chat_template", "response_schema", "response_template")  # in the configuration: may be long
MADE = ("extra_ids", "num_madeup_words", "offset")  # in the configuration: how many tokens a tokenizer creates itself
MOST_MADE = 10_000  # T5 and Pegasus create some hundred
# Limit for the sum of the squared lengths of all tokens of a vocabulary: the time to find the merges of a token, which
# may be any two parts of it, grows like this. The largest known vocabularies have some ten millions.
MOST_DIVISIONS = 1 << 28
# Field numbers in a SentencePiece file: of the whole file, of a piece, of a normalizer. The fields SPECIAL of the
# trainer's settings are the texts of special tokens, and the text that is written for an unknown token.
PIECES, TRAINER, NORMALIZERS = 1, 2, (3, 5)
PIECE, CHARSMAP, SPECIAL = 1, 2, range(44, 49)


def check_config(file: Path, vocabulary: int | None = None) -> list[str]:
    """Check tokenizer_config.json.

    Returns:
        Names of files in the same folder, of which transformers may read one in place of tokenizer.json.

    Raises:
        ValueError: it is damaged, has a token that is longer, or an id that is larger, than any tokenizer needs, or
            names a file in a format that is not read.
    """
    config = _read_json_object(file)
    other_files = config.get(OTHER_FILES) or []
    if not isinstance(other_files, list) or not all(isinstance(value, str) for value in other_files):
        raise ValueError(f"{file}: {OTHER_FILES} is no list of names; remove it, and tokenizer.json is read")
    if config.get("gguf_file") is not None:
        raise ValueError(f"{file}: gguf_file is not taken here; give a folder with tokenizer.json")
    for name in MADE:
        if isinstance(count := config.get(name), int | float) and count > MOST_MADE:
            raise ValueError(f"{file}: {name}={count} tokens of its own; no tokenizer needs {MOST_MADE}")
    # other texts are settings, such as prompts, and may be of any length
    token_entries = {
        name: value for name, value in config.items() if name.endswith("_token") or not isinstance(value, str)
    }
    token_entries = {name: value for name, value in token_entries.items() if name not in NO_TOKENS}
    _refuse_texts([*_iterate_strings(token_entries)], str(file))
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(f"{file}: added_tokens_decoder is no object of tokens: download it again")
    token_ids = [
        (token, int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key)
        for key, token in added.items()
    ]
    refuse_ids(token_ids, str(file), vocabulary)
    return other_files


def check_tokens(file: Path, vocabulary: int | None = None) -> None:
    """Check special_tokens_map.json or added_tokens.json. Raises ValueError as `check_config`."""
    content = _read_json_object(file)
    _refuse_texts([*_iterate_strings(content)], str(file))
    refuse_ids(((token, each) for token, each in content.items() if type(each) is int), str(file), vocabulary)


def check_vocabulary(file: Path, vocabulary: int | None = None) -> None:
    """Check a vocabulary without tokenizer.json. Raises ValueError: it has a token that is longer, or an id that is
    larger, than any tokenizer needs, or it may expand a text far beyond its length."""
    if file.suffix == ".json":
        check_tokens(file, vocabulary)
        return
    content = read_small(file)
    if file.suffix != ".txt" and not content.isascii():
        check_sentencepiece(content, str(file))
        return
    # lines of tokens, sometimes in a file named like SentencePiece: two tokens of a merge, or one in base64 with its id
    lines = content.splitlines()
    if long := next((line for line in lines if len(line) > 4 * LONGEST_TOKEN), None):
        raise ValueError(f"{file}: a line has {len(long)} bytes; no tokenizer has one of {4 * LONGEST_TOKEN}")
    if file.suffix != ".txt":
        _refuse_many_divisions(map(len, lines), str(file))


def check_sentencepiece(content: bytes, where: str) -> None:
    """Check the file of a SentencePiece model; `where` is for messages. Raises ValueError as `check_vocabulary`."""
    texts: list[str] = []
    charsmaps = [b""]
    for field_number, value in _protobuf_fields(content, where):
        if not isinstance(value, bytes):
            continue
        subfields = list(_protobuf_fields(value, where)) if field_number in (PIECES, TRAINER, *NORMALIZERS) else []
        text_fields = {PIECES: (PIECE,), TRAINER: SPECIAL}.get(field_number, ())
        texts += [
            each.decode(errors="replace")
            for field, each in subfields
            if field in text_fields and isinstance(each, bytes)
        ]
        if field_number in NORMALIZERS:
            charsmaps += [each for field, each in subfields if field == CHARSMAP and isinstance(each, bytes)]
    if not texts:
        raise ValueError(f"{where} is damaged or no SentencePiece model (it has no pieces): download it again")
    _refuse_texts(texts, where)
    if (growth := max(map(longest_of_charsmap, charsmaps))) > LARGEST_GROWTH:
        raise ValueError(
            f"{where}: its normalizer may make {growth} characters of one, more than the {LARGEST_GROWTH} that any "
            "tokenizer needs"
        )


def check_built(tokenizer: Any, where: str, vocabulary: int | None = None) -> None:
    """Check a tokenizer of transformers, whatever files it was built from.

    Args:
        where: its origin, for messages. vocabulary: see `keygrip.models.language.tokenizer_json.parse_tokenizer`.

    Raises:
        ValueError: as `parse_tokenizer`.
    """
    with tokenizer_errors(where):
        token_ids = dict(tokenizer.get_vocab())
    refuse_ids(token_ids.items(), where, vocabulary)  # first, since writing a tokenizer iterates over all ids
    refuse_long(token_ids, where)
    refuse_long(tokenizer.all_special_tokens, where)
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        with tokenizer_errors(where):
            content = json.loads(fast.to_str())
        check_content(content, where, vocabulary)
    if (pieces := getattr(tokenizer, "sp_model", None)) is not None:
        check_sentencepiece(pieces.serialized_model_proto(), where)


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not of a tokenizer ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged or not of a tokenizer (it is no object): download it again")
    return content


def _iterate_strings(content: Any) -> Iterator[str]:
    """Yield all strings in JSON content, keys too."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from value
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str):
            yield value


def _refuse_texts(texts: Sequence[str], origin: str) -> None:
    refuse_long(texts, origin)
    _refuse_many_divisions(map(len, texts), origin)


def _refuse_many_divisions(lengths: Iterable[int], origin: str) -> None:
    if (divisions := sum(length**2 for length in lengths)) > MOST_DIVISIONS:
        raise ValueError(
            f"{origin}: its tokens are so many and so long that they may be divided in {divisions} ways (characters of "
            f"each squared); no tokenizer needs {MOST_DIVISIONS}"
        )


def _protobuf_fields(content: bytes, origin: str) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a protobuf message; fields of fixed width as bytes.

    Raises:
        ValueError: the content is no such message.
    """
    place, end = 0, len(content)
    damaged = f"{origin} is damaged or no SentencePiece model: download it again, or leave it out"

    def number() -> int:
        nonlocal place
        value = shift = 0
        while place < end and shift < 70:
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError(damaged)

    while place < end:
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
            continue
        length = number() if kind == 2 else {1: 8, 5: 4}.get(kind, end)
        if place + length > end:
            raise ValueError(damaged)
        place += length
        yield tag >> 3, content[place - length : place]
