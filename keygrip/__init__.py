"""keygrip: robot policies and video-language models on one DINO backbone.

Every run is a Hydra configuration: ``python -m keygrip.train model=... data=...``. Importing the package loads nothing
heavy.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
