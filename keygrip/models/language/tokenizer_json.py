"""Checks of untrusted tokenizers (tokenizer.json) before the library `tokenizers` reads them.

The library iterates over all ids up to the largest, however few tokens there are, and some damaged files cause a panic
of Rust, which `except Exception` does not catch. The text that replaces a character may have any length, and the next
part may replace it again. A token may have any length, too, and decoding writes it for every id.

The time of regular expressions is not bounded: `(.|..){20}(?!.|$)` and similar ones take minutes for a short text. No
simple rule distinguishes all of these from the expressions of known tokenizers, and the library has no time limit for
them. To read tokenizers from untrusted sources, use a process that can be terminated.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
LARGEST_VOCABULARY = 4_000_000  # if the model is not known; the largest known ones have a million tokens
LARGEST_FILE_BYTES = 256 << 20  # a tokenizer of a large vocabulary is some tens of megabytes
MOST_PARTS = 100  # parts of a tokenizer (normalizers, decoders, ...) besides its model; known ones have about ten
LARGEST_GROWTH = 256  # characters that these make from one; the largest known are ALBERT's and SigLIP's, with 72
LONGEST_TOKEN = 4096  # characters; known vocabularies have runs of spaces or signs of some hundred
LONGEST_AFFIX = 64  # characters that a model puts before or behind each piece of a word: "##", "</w>"
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
LONGEST_WORD = 1000  # characters of a word of which WordPiece looks up all parts; known ones have 100
STEPS = {"encoding": ("normalizer", "pre_tokenizer"), "decoding": ("decoder",), "adding tokens": ("post_processor",)}
NESTED = ("normalizers", "pretokenizers", "decoders", "processors")  # keys of the parts of a Sequence, by its kind
# Characters that parts with a fixed rule may make from one.
FIXED_GROWTH = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 12, "Lowercase": 2},
    **{"ByteLevel": 3, "Metaspace": 2, "BPEDecoder": 2, "CTC": 2, "WordPiece": 2},
}
FORMS = ("NFC", "NFD", "NFKC", "NFKD", "BertNormalizer")
# Regular expressions of one character, or of one character class without nested classes, once or more: none of them
# matches the empty string. Many others do not either; they are treated as if they did.
MATCHES_SOMETHING = re.compile(
    r"(?:[^\\^$|?*+()\[\]{}]|\\[dDsSwWnrt]|\\[pP]\{\^?\w+\}|\[\^?(?:\\.|[^\\\[\]&])+\])(?:\+|\{[1-9]\d*(?:,\d*)?\})?",
    re.DOTALL,
)


def parse_tokenizer(text: str | bytes, where: str, vocabulary: int | None = None) -> Tokenizer:
    """Parse the tokenizer in the content of tokenizer.json.

    Args:
        text: the file's content. where: its location, for messages. vocabulary: tokens of its language model; None:
            not known.

    Raises:
        ValueError: it is damaged, has a token beyond the vocabulary, a longer one than any tokenizer needs, or parts
            that may expand a text far beyond its length.
    """
    from tokenizers import Tokenizer

    try:
        content = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{where} is damaged or no tokenizer ({error})") from error
    check_content(content, where, vocabulary)
    with tokenizer_errors(where):
        return Tokenizer.from_str(json.dumps(content))  # not `text`, where a key may occur twice


def check_content(content: Any, where: str, vocabulary: int | None = None) -> None:
    """Check the parsed content of tokenizer.json. Raises ValueError as `parse_tokenizer`."""
    _refuse_bad_ids(content, where, vocabulary)
    _refuse_lengths(content, where)
    _refuse_growth(content, where)


def check_tokenizer_file(file: Path, vocabulary: int | None = None) -> None:
    """Check a file that other code reads. Raises ValueError as `parse_tokenizer`."""
    parse_tokenizer(read_small(file), str(file), vocabulary)


def read_small(file: Path) -> bytes:
    """Read a file of a tokenizer. Raises ValueError: it is larger than any tokenizer."""
    if file.stat().st_size > LARGEST_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any tokenizer: it is not read")
    return file.read_bytes()


@contextmanager
def tokenizer_errors(where: str) -> Iterator[None]:
    """Convert the library's errors to a ValueError with `where`."""
    try:
        yield
    except BaseException as error:
        # pyo3's PanicException derives from BaseException, and cannot be imported from any module
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is damaged or no tokenizer ({error})") from error


def refuse_ids(ids: Iterable[tuple[Any, Any]], where: str, vocabulary: int | None = None) -> None:
    """Raise ValueError if one of the pairs of token and id has an id beyond the vocabulary."""
    limit = LARGEST_VOCABULARY if vocabulary is None else vocabulary
    owner = "any language model" if vocabulary is None else "its language model"
    for token, token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < limit:
            raise ValueError(
                f"{where}: the token {str(token)[:40]!r} has the id {str(token_id)[:40]}; {owner} has ids below {limit}"
            )


def refuse_long(texts: Iterable[Any], where: str) -> None:
    """Raise ValueError if a text is longer than any tokenizer's token."""
    long = next((text for text in texts if isinstance(text, str) and len(text) > LONGEST_TOKEN), None)
    if long is not None:
        raise ValueError(
            f"{where}: the token {long[:40]!r}... has {len(long)} characters; no tokenizer has one of more than "
            f"{LONGEST_TOKEN}"
        )


def _refuse_bad_ids(content: Any, origin: str, vocabulary: int | None) -> None:
    parts = content if isinstance(content, dict) else {}
    model, added_tokens = parts.get("model"), parts.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added_tokens, list):
        raise ValueError(f"{origin} is damaged or no tokenizer (it has no model with a vocabulary)")
    vocab = model.get("vocab")
    ids = list(vocab.items()) if isinstance(vocab, dict) else []  # in a list the index is the id
    ids += [(token.get("content"), token.get("id")) for token in added_tokens if isinstance(token, dict)]
    if isinstance(vocab, list) and vocab:
        ids.append((vocab[-1], len(vocab) - 1))
    refuse_ids(ids, origin, vocabulary)


def _refuse_lengths(content: dict[str, Any], origin: str) -> None:
    """Raise ValueError if a token, or another text that is written for each piece of a text, is too long."""
    model = content["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # pairs of a token and its probability
        vocab = [item[0] if isinstance(item, list) and item else item for item in vocab]
    texts = list(vocab) if isinstance(vocab, list | dict) else []
    # the map of a SentencePiece model, whose texts count as growth, and regular expressions are no tokens; merges
    # contain known tokens, otherwise the library refuses them
    excluded = ("vocab", "merges", "precompiled_charsmap", "Regex")
    stack: list[Any] = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            texts += item
            stack += [value for name, value in item.items() if name not in excluded]
        elif isinstance(item, list):
            stack += item
        else:
            texts.append(item)
    refuse_long(texts, origin)
    for name in AFFIXES:
        if isinstance(affix := model.get(name), str) and len(affix) > LONGEST_AFFIX:
            raise ValueError(f"{origin}: its {name} has {len(affix)} characters; no tokenizer needs {LONGEST_AFFIX}")
    if type(longest := model.get("max_input_chars_per_word")) is int and longest > LONGEST_WORD:
        raise ValueError(
            f"{origin}: max_input_chars_per_word={longest}: it looks up all parts of a word of so many characters, and "
            f"no tokenizer needs {LONGEST_WORD}"
        )


def _refuse_growth(content: dict[str, Any], origin: str) -> None:
    parts_by_step = {
        step: [p for name in names for p in _flatten_parts(content.get(name), origin)] for step, names in STEPS.items()
    }
    if (count := sum(map(len, parts_by_step.values()))) > MOST_PARTS:
        raise ValueError(f"{origin} has a normalizer, decoder, ... of {count} parts; no tokenizer needs {MOST_PARTS}")
    for step, parts in parts_by_step.items():
        # The first Unicode normal form expands only a few rare characters, if no part before it can have made them; for
        # a further normal form, the output of the parts in between is not known.
        first = next((index for index, part in enumerate(parts) if part.get("type") in FORMS), len(parts))
        growth_before, growth_after = (
            math.prod(map(_largest_growth, some)) for some in (parts[:first], parts[first + 1 :])
        )
        added_text = "".join(str(part.get(name, "")) for part in parts[:first] for name in ("content", "prepend"))
        form_growth = (
            _largest_growth(parts[first])
            if first < len(parts) and (growth_before > 1 or not added_text.isascii())
            else 1
        )
        growth = growth_before * form_growth * growth_after
        if growth > LARGEST_GROWTH:
            names = " and ".join(STEPS[step])
            raise ValueError(
                f"{origin}: in {step} its {names} may make {growth:.0f} characters or tokens of one, more than the "
                f"{LARGEST_GROWTH} that any tokenizer needs"
            )


def _flatten_parts(node: Any, origin: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, a decoder, ..., in order, including those of nested sequences."""
    parts: list[dict[str, Any]] = []
    stack = [] if node is None else [node]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):  # the library also accepts a list as the fields of a part
            raise ValueError(
                f"{origin} is damaged or no tokenizer ({str(part)[:40]!r} is no part of a normalizer, ...)"
            )
        for inner in (part[name] for name in NESTED if name in part):
            stack += reversed(inner) if isinstance(inner, list) else [inner]
        parts.append(part)
    return parts


def _largest_growth(part: dict[str, Any]) -> float:
    """Return how many characters or tokens a part makes from one at most; the library refuses unknown parts."""
    growth = float(FIXED_GROWTH.get(str(part.get("type")), 1))
    content, pattern, prepended = part.get("content"), part.get("pattern"), part.get("prepend")
    if isinstance(content, str):
        literal = pattern.get("String") if isinstance(pattern, dict) else pattern
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            growth *= max(1.0, len(content) / len(literal))
        elif isinstance(expression, str) and MATCHES_SOMETHING.fullmatch(expression):
            growth *= max(1, len(content))
        else:  # a regular expression may match the empty string, before every character
            growth *= 1 + len(content)
    if isinstance(prepended, str):
        growth *= 1 + len(prepended)
    if isinstance(part.get("precompiled_charsmap"), str):
        with suppress(ValueError):  # which the library refuses
            growth *= longest_of_charsmap(base64.b64decode(part["precompiled_charsmap"]))
    templates = [template for template in (part.get("single"), part.get("pair")) if isinstance(template, list)]
    return growth * max([1, *(_count_template_tokens(template, part.get("special_tokens")) for template in templates)])


def longest_of_charsmap(charsmap: bytes) -> int:
    """Return the length of the longest text that replaces a character in the map of a SentencePiece model. The first
    four bytes give the size of a table; after it the texts follow one after the other, each with a zero byte at its
    end."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))


def _count_template_tokens(template: list[Any], special_tokens: Any) -> int:
    """Return how many tokens a template of a post-processor makes from one, including those that it adds."""
    count = 0
    for piece in template:
        named = piece.get("SpecialToken") if isinstance(piece, dict) else None
        token = (
            special_tokens.get(str(named.get("id")))
            if isinstance(named, dict) and isinstance(special_tokens, dict)
            else None
        )
        ids = token.get("ids") if isinstance(token, dict) else None
        count += len(ids) if isinstance(ids, list) else 1
    return count
