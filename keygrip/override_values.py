"""Parse the values of overrides, and quote strings as values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

# Strings that Hydra reads as numbers and would change: 2025_01_02 to 20250102, 1.10 to 1.1.
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d[\d_]*)?")
# A sweep, as is ``sweep=NAME``, whose options set the mode.
MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
# Settings that hold sentences, in whichever command.
SENTENCES = frozenset(
    {
        "question",
        "prompt",
        "collator.system",
        "robot.instruction",
        "task.instruction",
        "env.task.instruction",
        "callbacks.closed_loop.env.task.instruction",
    }
)


def values_of(key: str, value: str) -> list[str]:
    """Return the values of an override: one string, several for a sweep, or none if the value cannot be parsed (Hydra
    reports the reason) or is missing (``???``). ``${oc.env:NAME}`` is resolved.

    Raises:
        OmegaConfBaseException: an environment variable is not set, or the value refers to another setting.
    """
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    except HydraException:
        return []
    texts = [str(each.text if hasattr(each, "text") else each) for each in values if each is not None]
    texts = [text.strip("'\"") if override.is_sweep_override() else text for text in texts if text not in ("", "???")]
    return [str(OmegaConf.create({key: text})[key]) if "${" in text else text for text in texts]


def quoted(text: str) -> str:
    """Quote any string as the value of an override. Backslashes are doubled only before a quote."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def as_typed(key: str, value: object) -> str:
    """Return an override as it is typed in a shell, with its value as a single string: quoted only where it must be."""
    text = str(value)
    if re.fullmatch(r"[\w./:@%+-]+", text):
        return f"{key}={text}"
    override = f"{key}={quoted(text)}"
    return shlex.quote(override) if re.search(r'["$`!\\]', text) else f'"{override}"'


def texts_quoted(overrides: Sequence[str], texts: Container[str]) -> list[str]:
    """Return the overrides with those strings quoted that Hydra would read in another way, or not at all.

    Always: number-like values of the settings `texts` (``run_dir=2025_01_02`` names a folder, not 20250102), and values
    with letters outside ASCII (``data.root=/home/jürgen``). Outside a sweep also sentences, whatever they hold:
    ``question=What's left, red or blue?``; other values with commas are then left as they are, so that Hydra's error
    shows the value as it was given.
    """
    is_sweep = any(each in MULTIRUN or each.startswith("sweep=") for each in overrides)
    complete = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        separates = is_sweep or "," not in value
        if key in texts and separates:
            override = _quote_number(override)
        if key in SENTENCES and not is_sweep:
            override = _quote_sentence(override)
        elif not override.isascii() and separates:
            override = _quote_letters(override)
        complete.append(override)
    return complete


def _quote_number(override: str) -> str:
    key, _, value = override.partition("=")
    if re.search(r"[\"'\[({]", value):
        return override  # the user has quoted the strings
    parts = [part.strip() for part in value.split(",")]  # several parts for a sweep
    return f"{key}={','.join(quoted(each) if NUMBER.fullmatch(each) else each for each in parts)}"


def _quote_letters(override: str) -> str:
    """Return an override whose values are names with letters outside ASCII, which Hydra accepts in quotes only."""
    key, equals, value = override.partition("=")
    if not equals or not key.isascii() or re.search(r"[\"'\[\](){}$]", value):
        return override  # the user has quoted the strings, or the value has a structure
    parts = [part.strip() for part in value.split(",")]  # several parts for a sweep
    return f"{key}={','.join(each if each.isascii() else quoted(each) for each in parts)}"


def _quote_sentence(override: str) -> str:
    """Return the override of a setting that holds a sentence, quoted unless Hydra reads the sentence as it stands.

    Null, true, false, lists, quoted strings and functions such as ``choice(a,b)`` are left to Hydra, also those with a
    mistake.
    """
    key, _, value = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override).value()
    except HydraException:
        is_list = re.fullmatch(r"\[[^\[\]]*\]", value) is not None
        is_quoted = value[:1] in ("'", '"') and value[-1:] == value[:1] and value.count(value[0]) % 2
        return override if is_list or is_quoted else f"{key}={quoted(value)}"
    if isinstance(parsed, str):
        is_same = parsed == value or value.lstrip()[:1] in ("'", '"')
    elif isinstance(parsed, int | float):
        is_same = isinstance(parsed, bool)
    else:
        is_same = not (isinstance(parsed, ChoiceSweep) and parsed.simple_form)
    return override if is_same else f"{key}={quoted(value)}"
