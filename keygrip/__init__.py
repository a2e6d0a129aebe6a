"""keygrip: robot policies and vision models on one DINO backbone.

>>> import keygrip
>>> sorted(keygrip.__all__)
['__version__', 'evaluate', 'load', 'load_policy', 'train']

Importing the package is cheap: each name is imported when it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if os.name == "nt":
    raise ImportError("keygrip runs on Linux and macOS: it locks files and takes signals as they do. On Windows: WSL 2")

if TYPE_CHECKING:
    from keygrip.api import load, load_policy
    from keygrip.evaluate import evaluate
    from keygrip.train import train

__all__ = ["__version__", "evaluate", "load", "load_policy", "train"]

__version__ = "0.1.0"


if not TYPE_CHECKING:  # for a type checker, a module with __getattr__ has every name, even misspelt ones

    def __getattr__(name: str) -> Any:
        import importlib

        if name in ("train", "evaluate"):  # modules of the commands, which can be called
            return importlib.import_module(f"keygrip.{name}")
        if name in ("load", "load_policy"):
            return getattr(importlib.import_module("keygrip.api"), name)
        raise AttributeError(f"module 'keygrip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
