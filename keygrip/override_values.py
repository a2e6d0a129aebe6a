"""What the values of overrides stand for, and how a text is written as one."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from omegaconf import OmegaConf

# What Hydra reads as a number, which it would hand on as 20250102 or 1.1: 2025_01_02, 1.10.
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d[\d_]*)?")


def values_of(key: str, value: str) -> list[str]:
    """What an override's value names: one text, the several of a sweep, or none where it cannot be read (Hydra will say
    why) or is missing (``???``). ``${oc.env:NAME}`` is resolved.

    Raises:
        OmegaConfBaseException: an environment variable that is not set, or another setting as the value.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        found = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    except HydraException:
        return []
    texts = [str(each.text if hasattr(each, "text") else each) for each in found if each is not None]
    texts = [text.strip("'\"") if override.is_sweep_override() else text for text in texts if text not in ("", "???")]
    return [str(OmegaConf.create({key: text})[key]) if "${" in text else text for text in texts]


def quoted(text: str) -> str:
    """A text as the value of an override, whatever signs it holds. Backslashes count double before a quote alone."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def texts_quoted(overrides: Sequence[str], texts: Container[str]) -> list[str]:
    """The same overrides; those of the settings `texts` whose value looks like a number keep its letters:
    ``run_dir=2025_01_02`` names a folder, not 20250102."""
    return [_quoted_number(each) if each.lstrip("+").partition("=")[0] in texts else each for each in overrides]


def _quoted_number(override: str) -> str:
    key, _, value = override.partition("=")
    if re.search(r"[\"'\[({]", value):
        return override  # its author has quoted what is text
    parts = [part.strip() for part in value.split(",")]  # several: of a sweep
    return f"{key}={','.join(quoted(each) if NUMBER.fullmatch(each) else each for each in parts)}"
