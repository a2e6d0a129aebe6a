"""Tests that need Meta-World run only when selected by `-m metaworld`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "metaworld" in config.getoption("markexpr"):
        return
    chosen = [item for item in items if item.get_closest_marker("metaworld")]
    if chosen:
        config.hook.pytest_deselected(items=chosen)
        items[:] = [item for item in items if item not in chosen]
