"""A Hydra launcher that runs every job of a sweep in its own process. Hydra finds launchers only in this package."""

from __future__ import annotations

from hydra_plugins.keygrip_launcher.processes import ProcessLauncher

__all__ = ["ProcessLauncher"]
