"""Read settings of commands that are texts or lists of texts."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import ListConfig, OmegaConf


def texts_of(name: str, value: Any) -> list[str]:
    """Convert a setting that is one text or several to a list. A number is converted to text.

    Args:
        name: of the setting, for messages.

    Raises:
        ValueError: The setting has another type, such as null, true or a mapping (which YAML may read from unquoted
            text), or is an empty list.
    """
    return [text_of(name, each) for each in each_of(name, value)]


def each_of(name: str, value: Any) -> list[Any]:
    """Return the values of a setting, which is one value or a list. Raises ValueError if the list is empty."""
    found = list(value) if isinstance(value, ListConfig | list | tuple) else [value]
    if not found:
        raise ValueError(f"{name}=[] is an empty list: give at least one, or leave it out")
    return found


def text_of(name: str, value: Any) -> str:
    """Return one text; a number is converted to text. Raises ValueError as in `texts_of`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        given = json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, default=str)
        raise ValueError(f"{name} holds {given}, which is no text: put words in quotes, or leave it out")
    return str(value)
