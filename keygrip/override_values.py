"""Parse the values of overrides, and quote strings as values."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from omegaconf import OmegaConf

# Strings that Hydra reads as numbers and would change: 2025_01_02 to 20250102, 1.10 to 1.1.
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d[\d_]*)?")


def values_of(key: str, value: str) -> list[str]:
    """Return the values of an override: one string, several for a sweep, or none if the value cannot be parsed (Hydra
    reports the reason) or is missing (``???``). ``${oc.env:NAME}`` is resolved.

    Raises:
        OmegaConfBaseException: an environment variable is not set, or the value refers to another setting.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

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


def texts_quoted(overrides: Sequence[str], texts: Container[str]) -> list[str]:
    """Return the overrides with number-like values of the settings `texts` quoted, so that they stay strings:
    ``run_dir=2025_01_02`` names a folder, not 20250102."""
    return [_quote_number(each) if each.lstrip("+").partition("=")[0] in texts else each for each in overrides]


def _quote_number(override: str) -> str:
    key, _, value = override.partition("=")
    if re.search(r"[\"'\[({]", value):
        return override  # the user has quoted the strings
    parts = [part.strip() for part in value.split(",")]  # several parts for a sweep
    return f"{key}={','.join(quoted(each) if NUMBER.fullmatch(each) else each for each in parts)}"
