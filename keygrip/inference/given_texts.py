"""Settings of commands that are texts, or lists of them."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import ListConfig, OmegaConf


def texts_of(name: str, value: Any) -> list[str]:
    """A setting that is one text or a list of them, as a list; a number is the text that is written so.

    Args:
        name: of the setting, for messages.

    Raises:
        ValueError: something else, such as null, true or a mapping, which YAML reads where no quotes are; or an empty
            list.
    """
    return [text_of(name, each) for each in each_of(name, value)]


def each_of(name: str, value: Any) -> list[Any]:
    """The values of a setting that is one or a list of them. Raises ValueError: an empty list."""
    found = list(value) if isinstance(value, ListConfig | list | tuple) else [value]
    if not found:
        raise ValueError(f"{name}=[] is an empty list: give at least one, or leave it out")
    return found


def text_of(name: str, value: Any) -> str:
    """One text; a number is the text that is written so. Raises ValueError as `texts_of`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        given = json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, default=str)
        raise ValueError(f"{name} holds {given}, which is no text: put words in quotes, or leave it out")
    return str(value)
