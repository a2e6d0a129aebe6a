"""Determine the size of nested containers: a few bytes of a pickle can reference one list any number of times, so that
visiting all its values would not end."""

from __future__ import annotations

from typing import Any

import numpy as np


def size_of(content: Any) -> float:
    """Return the number of values in nested containers and arrays, counted once per reference; infinite for a container
    inside itself."""
    sizes: dict[int, float] = {}
    ancestors: set[int] = set()
    waiting = [(content, False)]
    while waiting:
        value, is_leaving = waiting.pop()
        children = inside_of(value)
        if is_leaving:
            ancestors.discard(id(value))
            sizes[id(value)] = 1.0 + sum(sizes.get(id(each), _own_size(each)) for each in children)
        elif id(value) in ancestors:
            return float("inf")
        elif children and id(value) not in sizes:
            ancestors.add(id(value))
            waiting.append((value, True))
            waiting += [(each, False) for each in children]
    return sizes.get(id(content), _own_size(content))


def inside_of(value: Any) -> list[Any]:
    """Return the items of a container, including keys; empty for other values."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return list(value.flat)
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def _own_size(value: Any) -> int:
    return value.size if isinstance(value, np.ndarray) else len(value) if isinstance(value, bytearray) else 1
