"""Comparison of the encoders' settings that image shards store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

OPTIONS = {"view.image_size": "view.size", "text.kind": "text", "autoencoder.kind": "autoencoder"}  # of settings


def differing_settings(
    stored: Mapping[str, Any],
    own: Mapping[str, Any],
    prefix: str = "",
    places: tuple[str, str] = ("there", "here"),
) -> list[str]:
    """Return a text for each setting of encoders that has another value in the description that shards store; settings
    that are not in both are skipped.

    Args:
        stored: of the shards. own: of other encoders. prefix: of the names, such as "view.". places: what the texts
            call the two.
    """
    texts = []
    for name, value in own.items():
        if name not in stored:
            continue
        if isinstance(value, Mapping):
            if isinstance(stored[name], Mapping):
                texts += differing_settings(stored[name], value, f"{name}.", places)
        elif stored[name] != value:
            option = OPTIONS.get(prefix + name, prefix + name)
            values = json.dumps(stored[name]), json.dumps(value)
            texts.append(f"encoders.{option} is {values[0]} {places[0]} and {values[1]} {places[1]}")
    return texts
