"""A Hydra launcher that gives every job of a sweep a process of its own. Hydra looks for launchers here only."""

from __future__ import annotations

from hydra_plugins.keygrip_launcher.processes import ProcessLauncher

__all__ = ["ProcessLauncher"]
