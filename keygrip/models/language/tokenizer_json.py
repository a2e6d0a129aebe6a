"""Stored tokenizers of others (tokenizer.json), checked before the library `tokenizers` takes them.

The library goes through all ids up to the largest, whatever tokens there are, and ends some damaged files with a panic
of Rust, which no `except Exception` sees. What a file puts in place of characters may be any length, and be replaced
again by the next part; a token may be any length, too, and decoding writes it out for every id.

The time of regular expressions is not bounded: `(.|..){20}(?!.|$)` and its kin take minutes for a short text. No
simple rule tells all of these from the expressions of known tokenizers, and the library has no limit to give them.
Whoever reads tokenizers of people that they do not trust does so in a process that they can end.
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
LARGEST_VOCABULARY = 4_000_000  # of a model that is not known; the largest known have a million tokens
LARGEST_FILE_BYTES = 256 << 20  # a tokenizer of a large vocabulary is some tens of megabytes
MOST_PARTS = 100  # of all that a tokenizer does beside its model; known ones have about ten
LARGEST_GROWTH = 256  # characters that these make of one; of known ones ALBERT's and SigLIP's come nearest, with 72
LONGEST_TOKEN = 4096  # characters; known vocabularies have runs of spaces or signs of some hundred
LONGEST_AFFIX = 64  # characters that a model puts before or behind each piece of a word: "##", "</w>"
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
LONGEST_WORD = 1000  # characters that WordPiece looks up all parts of; known ones have 100
STEPS = {"encoding": ("normalizer", "pre_tokenizer"), "decoding": ("decoder",), "adding tokens": ("post_processor",)}
NESTED = ("normalizers", "pretokenizers", "decoders", "processors")  # of the several kinds of a Sequence
# Characters that parts with a fixed rule may make of one.
FIXED_GROWTH = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 12, "Lowercase": 2},
    **{"ByteLevel": 3, "Metaspace": 2, "BPEDecoder": 2, "CTC": 2, "WordPiece": 2},
}
FORMS = ("NFC", "NFD", "NFKC", "NFKD", "BertNormalizer")
# Regular expressions of one character, or of one class of them without others within it, once or more: none of them
# matches nothing. Many others do not either; they are taken for such that do.
MATCHES_SOMETHING = re.compile(
    r"(?:[^\\^$|?*+()\[\]{}]|\\[dDsSwWnrt]|\\[pP]\{\^?\w+\}|\[\^?(?:\\.|[^\\\[\]&])+\])(?:\+|\{[1-9]\d*(?:,\d*)?\})?",
    re.DOTALL,
)


def parse_tokenizer(text: str | bytes, where: str, vocabulary: int | None = None) -> Tokenizer:
    """The tokenizer that tokenizer.json holds.

    Args:
        text: the file's content. where: it lies, for messages. vocabulary: tokens of its language model; None: not
            known.

    Raises:
        ValueError: it is damaged, has a token beyond the vocabulary, a longer one than any tokenizer needs, or parts
            that make far more of a text than there was.
    """
    from tokenizers import Tokenizer

    try:
        content = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{where} is damaged or no tokenizer ({error})") from error
    check_content(content, where, vocabulary)
    with tokenizer_errors(where):
        return Tokenizer.from_str(json.dumps(content))  # not `text`, where a name may stand twice


def check_content(content: Any, where: str, vocabulary: int | None = None) -> None:
    """Raises ValueError as `parse_tokenizer` for what tokenizer.json holds."""
    _refuse_ids_of(content, where, vocabulary)
    _refuse_lengths(content, where)
    _refuse_growth(content, where)


def check_tokenizer_file(file: Path, vocabulary: int | None = None) -> None:
    """Raises ValueError as `parse_tokenizer` for a file that somebody else reads."""
    parse_tokenizer(read_small(file), str(file), vocabulary)


def read_small(file: Path) -> bytes:
    """A file of a tokenizer. Raises ValueError: it is larger than any."""
    if file.stat().st_size > LARGEST_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any tokenizer: it is not read")
    return file.read_bytes()


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


def refuse_ids(ids: Iterable[tuple[Any, Any]], where: str, vocabulary: int | None = None) -> None:
    """Raises ValueError: of tokens and their ids, one has an id beyond the vocabulary."""
    most = LARGEST_VOCABULARY if vocabulary is None else vocabulary
    of = "any language model" if vocabulary is None else "its language model"
    for token, number in ids:
        if type(number) is not int or not 0 <= number < most:
            raise ValueError(
                f"{where}: the token {str(token)[:40]!r} has the id {str(number)[:40]}; {of} has ids below {most}"
            )


def refuse_long(texts: Iterable[Any], where: str) -> None:
    """Raises ValueError: a text is longer than any tokenizer's token."""
    long = next((text for text in texts if isinstance(text, str) and len(text) > LONGEST_TOKEN), None)
    if long is not None:
        raise ValueError(
            f"{where}: the token {long[:40]!r}... has {len(long)} characters; no tokenizer has one of more than "
            f"{LONGEST_TOKEN}"
        )


def _refuse_ids_of(content: Any, where: str, vocabulary: int | None) -> None:
    parts = content if isinstance(content, dict) else {}
    model, added = parts.get("model"), parts.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError(f"{where} is damaged or no tokenizer (it has no model with a vocabulary)")
    known = model.get("vocab")
    ids = list(known.items()) if isinstance(known, dict) else []  # in a list the place is the id
    ids += [(token.get("content"), token.get("id")) for token in added if isinstance(token, dict)]
    if isinstance(known, list) and known:
        ids.append((known[-1], len(known) - 1))
    refuse_ids(ids, where, vocabulary)


def _refuse_lengths(content: dict[str, Any], where: str) -> None:
    """Of tokens, and of what else is written out for each piece of a text."""
    model = content["model"]
    known = model.get("vocab")
    if isinstance(known, list):  # of tokens and how probable they are
        known = [each[0] if isinstance(each, list) and each else each for each in known]
    texts = list(known) if isinstance(known, list | dict) else []
    # a SentencePiece's map, whose texts count in the growth, and regular expressions are no tokens; merges hold known
    # tokens, or the library refuses them
    apart = ("vocab", "merges", "precompiled_charsmap", "Regex")
    waiting: list[Any] = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            texts += each
            waiting += [value for name, value in each.items() if name not in apart]
        elif isinstance(each, list):
            waiting += each
        else:
            texts.append(each)
    refuse_long(texts, where)
    for name in AFFIXES:
        if isinstance(affix := model.get(name), str) and len(affix) > LONGEST_AFFIX:
            raise ValueError(f"{where}: its {name} has {len(affix)} characters; no tokenizer needs {LONGEST_AFFIX}")
    if type(longest := model.get("max_input_chars_per_word")) is int and longest > LONGEST_WORD:
        raise ValueError(
            f"{where}: max_input_chars_per_word={longest}: it looks up all parts of a word of so many characters, and "
            f"no tokenizer needs {LONGEST_WORD}"
        )


def _refuse_growth(content: dict[str, Any], where: str) -> None:
    found = {step: [p for name in names for p in _parts(content.get(name), where)] for step, names in STEPS.items()}
    if (count := sum(map(len, found.values()))) > MOST_PARTS:
        raise ValueError(f"{where} has a normalizer, decoder, ... of {count} parts; no tokenizer needs {MOST_PARTS}")
    for step, parts in found.items():
        # The first of Unicode's forms makes more of a few rare characters alone, as long as no part before it can have
        # made them; of another one it is not known what the parts in between have made.
        first = next((number for number, part in enumerate(parts) if part.get("type") in FORMS), len(parts))
        before, behind = (math.prod(map(_growth, some)) for some in (parts[:first], parts[first + 1 :]))
        made = "".join(str(part.get(name, "")) for part in parts[:first] for name in ("content", "prepend"))
        form = _growth(parts[first]) if first < len(parts) and (before > 1 or not made.isascii()) else 1
        growth = before * form * behind
        if growth > LARGEST_GROWTH:
            names = " and ".join(STEPS[step])
            raise ValueError(
                f"{where}: in {step} its {names} may make {growth:.0f} characters or tokens of one, more than the "
                f"{LARGEST_GROWTH} that any tokenizer needs"
            )


def _parts(node: Any, where: str) -> list[dict[str, Any]]:
    """The parts of a normalizer, a decoder, ..., those of sequences within sequences too, in their order."""
    parts: list[dict[str, Any]] = []
    waiting = [] if node is None else [node]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):  # the library takes a list for the fields of a part, too
            raise ValueError(f"{where} is damaged or no tokenizer ({str(each)[:40]!r} is no part of a normalizer, ...)")
        for inner in (each[name] for name in NESTED if name in each):
            waiting += reversed(inner) if isinstance(inner, list) else [inner]
        parts.append(each)
    return parts


def _growth(part: dict[str, Any]) -> float:
    """Characters that a part makes of one at most, or tokens of one; what is no such part the library refuses."""
    growth = float(FIXED_GROWTH.get(str(part.get("type")), 1))
    content, pattern, added = part.get("content"), part.get("pattern"), part.get("prepend")
    if isinstance(content, str):
        given = pattern.get("String") if isinstance(pattern, dict) else pattern
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(given, str) and given:
            growth *= max(1.0, len(content) / len(given))
        elif isinstance(expression, str) and MATCHES_SOMETHING.fullmatch(expression):
            growth *= max(1, len(content))
        else:  # a regular expression may match nothing, before every character
            growth *= 1 + len(content)
    if isinstance(added, str):
        growth *= 1 + len(added)
    if isinstance(part.get("precompiled_charsmap"), str):
        with suppress(ValueError):  # which the library refuses
            growth *= longest_of_charsmap(base64.b64decode(part["precompiled_charsmap"]))
    templates = [each for each in (part.get("single"), part.get("pair")) if isinstance(each, list)]
    return growth * max([1, *(_tokens_of(each, part.get("special_tokens")) for each in templates)])


def longest_of_charsmap(charsmap: bytes) -> int:
    """Length of the longest text that a SentencePiece's map has in place of a character: behind a table, of which the
    first four bytes say the size, they stand one after the other, each with a zero byte behind it."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))


def _tokens_of(template: list[Any], special: Any) -> int:
    """Tokens that a template of a post-processor makes of one, with those that it adds."""
    count = 0
    for piece in template:
        named = piece.get("SpecialToken") if isinstance(piece, dict) else None
        token = special.get(str(named.get("id"))) if isinstance(named, dict) and isinstance(special, dict) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        count += len(ids) if isinstance(ids, list) else 1
    return count
